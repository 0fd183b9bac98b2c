//! Loss, every gradient, activations and ten training losses against the state files of independent
//! PyTorch programs (`tests/torch`), in f64 on both sides.

use crate::common::{
    Memory, SGD, STANDARD, STILL, State, bdia_float, checkpoint, difference, float, lay_out, state,
    verified,
};
use bdia_core::Error;
use bdia_core::layers::Gradients;
use bdia_core::network::Step;
use bdia_core::optim::Rule;
use bdia_core::stack::{Mode, Stack};
use bdia_core::update::{Gamma, Grid, Policy, Sign};
use bdia_models::gpt2::model::Setup;
use bdia_models::inference::Inference;

fn setup(s: &State, mode: Mode) -> Setup {
    crate::common::setup(s.dims(), s.size("batch"), s.size("seq_len"), mode)
}

fn fill(s: &State) -> impl FnMut(usize, &mut [i32], &mut [i32]) -> Result<(), Error> + '_ {
    |_, x, y| {
        x.copy_from_slice(&s.ints["tokens"]);
        y.copy_from_slice(&s.ints["targets"]);
        Ok(())
    }
}

fn rule(name: &str, s: &State) -> (Rule, f64, f64) {
    let n = |key: &str| s.number(&format!("{name}.{key}"));
    match name {
        "sgd" => (Rule::Sgd { momentum: n("momentum") }, n("lr"), 0.0),
        "adamw" => (
            Rule::AdamW { beta1: n("beta1"), beta2: n("beta2"), eps: n("eps") },
            n("lr"),
            n("weight_decay"),
        ),
        _ => (Rule::SetAdam { beta1: n("beta1"), beta2: n("beta2"), eps: n("eps") }, n("lr"), 0.0),
    }
}

/// Below this a gradient of these models is noise.
const LEAST: f64 = 1e-3;

/// Two f64 programs that sum some hundred terms in different orders agree to about 1e-13; the rest
/// is margin.
const TOLERANCE: f64 = 1e-10;

fn check(file: &str, mode: Mode, inference: Inference, chunk: usize, head_rows: usize) {
    let s = state(&format!("gpt2/{file}"));

    // Gradients: a step of SGD with rate 0 leaves them in full buffers.
    let whole = Setup { gradients: Gradients::Full(SGD), ..setup(&s, mode) };
    let (mut model, layout) = lay_out::<f64>(&whole, chunk, head_rows);
    let mut memory = Memory::<f64>::new(&layout);
    let mut be = memory.backend(&layout);
    let tensors = model.tensors();
    s.load(&mut be, &tensors);
    let (context, vocab) = (whole.context, whole.dims.vocab);
    for (i, sample) in s.ints["tokens"].chunks(context).enumerate() {
        let ours = model.logits(&mut be, sample, 0..context, inference).unwrap();
        let theirs = &s.reals["logits"][i * context * vocab..][..context * vocab];
        let d = difference(&ours, theirs, LEAST);
        assert!(d < TOLERANCE, "{file}: logits of sample {i} differ by {d:e}");
    }
    let outcome = model.train(&mut be, &STILL, fill(&s)).unwrap();
    assert!(
        (outcome.loss - s.reals["loss"][0]).abs() < TOLERANCE,
        "{file}: loss {} vs {}",
        outcome.loss,
        s.reals["loss"][0]
    );
    for (t, theirs) in tensors.iter().zip(s.of("grad", &tensors)) {
        let d = difference(be.reals(t.gradient).unwrap(), &theirs, LEAST);
        assert!(d < TOLERANCE, "{file}: gradient of {} differs by {d:e}", t.name);
    }
    if let Stack::Reversible(stack) = &model.stack {
        // After the backward pass X_0 and X_1 are the rebuilt ones.
        for k in [0, 1] {
            assert_eq!(
                be.ints(stack.activation(k)).unwrap(),
                s.ints[&format!("X.{k}")],
                "{file}: X_{k}"
            );
        }
    }

    for name in ["sgd", "adamw", "set_adam"] {
        let (rule, lr, weight_decay) = rule(name, &s);
        for gradients in [Gradients::Fused(rule), Gradients::Full(rule)] {
            let setup = Setup { gradients, ..setup(&s, mode) };
            let (mut model, layout) = lay_out::<f64>(&setup, chunk, head_rows);
            let mut memory = Memory::<f64>::new(&layout);
            let mut be = memory.backend(&layout);
            s.load(&mut be, &model.tensors());
            for (i, theirs) in s.reals[&format!("losses.{name}")].iter().enumerate() {
                let step = Step { step: i as u32, lr, weight_decay, ..STILL };
                let ours = model.train(&mut be, &step, fill(&s)).unwrap().loss;
                assert!(
                    (ours - theirs).abs() < 1e-8,
                    "{file}, {name}: loss {i} is {ours}, theirs {theirs}"
                );
            }
        }
    }
}

/// With a constant sign, training's forward pass is inference with that γ.
fn check_bdia(file: &str, gamma: f64, sign: Sign, chunk: usize, head_rows: usize) {
    let grid = Grid::new(state(&format!("gpt2/{file}")).size("frac_bits") as u32).unwrap();
    let gamma = Gamma::from_value(gamma, sign).unwrap();
    let mode = Mode::Bdia { grid, gamma: Policy::fixed(gamma), verify: false };
    check(file, mode, Inference::constant(gamma), chunk, head_rows);
}

#[test]
fn standard() {
    check("standard_f64.safetensors", STANDARD, float(0.0), 3, 36);
    check("standard_f64.safetensors", STANDARD, float(0.0), 2, 5);
}

#[test]
fn checkpoints() {
    for every in 1..=4 {
        check("standard_f64.safetensors", checkpoint(every), float(0.0), 2, 7);
    }
}

#[test]
fn bdia_plus() {
    check_bdia("bdia_plus_f64.safetensors", 0.5, Sign::Plus, 3, 36);
    check_bdia("bdia_plus_f64.safetensors", 0.5, Sign::Plus, 1, 1);
}

#[test]
fn bdia_minus() {
    check_bdia("bdia_minus_f64.safetensors", 0.5, Sign::Minus, 2, 7);
}

#[test]
fn bdia_two_planes() {
    check_bdia("bdia_m2_f64.safetensors", 0.25, Sign::Plus, 2, 7);
}

/// Without a grid the same γ gives nearly the same gradients: the grid is all that separates the
/// two modes.
#[test]
fn bdia_float_is_close() {
    let s = state("gpt2/bdia_plus_f64.safetensors");
    let mode = verified(bdia_float(Sign::Plus));
    let setup = Setup { gradients: Gradients::Full(SGD), ..setup(&s, mode) };
    let (mut model, layout) = lay_out::<f64>(&setup, 2, 7);
    let mut memory = Memory::<f64>::new(&layout);
    let mut be = memory.backend(&layout);
    let tensors = model.tensors();
    s.load(&mut be, &tensors);
    let outcome = model.train(&mut be, &STILL, fill(&s)).unwrap();
    // The grid is 2^-14: activations, and so the loss, move by some multiples of it.
    assert!((outcome.loss - s.reals["loss"][0]).abs() < 1e-3);
    for (t, theirs) in tensors.iter().zip(s.of("grad", &tensors)) {
        let d = difference(be.reals(t.gradient).unwrap(), &theirs, LEAST);
        assert!(d < 1e-2, "gradient of {} differs by {d:e}", t.name);
    }
    // Rebuilding in f64 multiplies rounding by about 2 a block; it is small, and it is not zero.
    let error = outcome.rebuilt.error;
    assert!(error > 0.0 && error < 1e-12, "{error:e}");
}
