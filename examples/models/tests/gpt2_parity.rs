//! Loss, every gradient, activations and ten training losses against the state files of independent
//! PyTorch programs (`tests/torch`), in f64 on both sides.
#![allow(clippy::unwrap_used)]

mod common;

use bdia_core::optim::Rule;
use bdia_core::stack::Mode;
use bdia_core::update::{Gamma, Grid, Sign};
use bdia_core::{Error, Reference, Storage};
use bdia_models::gpt2::model::{Gpt2, Inference, Step};
use common::{Memory, State, lay_out, state};

fn load(model: &Gpt2, be: &mut Reference<'_, f64>, state: &State) {
    for t in model.tensors() {
        be.write_reals(t.values, &state.reals[&format!("param.{}", t.name)]).unwrap();
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

/// Largest difference over all elements, relative to the largest magnitude of the tensor (and 1e-3,
/// below which a gradient of these models is noise).
fn difference(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let scale = theirs.iter().fold(1e-3_f64, |a, x| a.max(x.abs()));
    ours.iter().zip(theirs).fold(0.0_f64, |a, (x, y)| a.max((x - y).abs())) / scale
}

/// Two f64 programs that sum some hundred terms in different orders agree to about 1e-13; the rest
/// is margin.
const TOLERANCE: f64 = 1e-10;

fn check(file: &str, mode: Mode, gamma: f64, sign: Sign, chunk: usize, head_rows: usize) {
    let s = state(file);
    let grid = (mode == Mode::Bdia).then(|| Grid::new(s.size("frac_bits") as u32).unwrap());
    let mut setup = s.setup();
    setup.mode = mode;
    setup.grid = grid;
    setup.gamma = Gamma::new(gamma, sign).unwrap();
    let (tokens, targets) = (&s.ints["tokens"], &s.ints["targets"]);

    // Gradients: a step of SGD with rate 0 leaves them in full buffers.
    setup.rule = Some(Rule::Sgd { momentum: 0.0 });
    setup.fused = false;
    let (mut model, layout) = lay_out::<f64>(&setup, chunk, head_rows);
    let mut memory = Memory::new(&layout);
    let mut be = memory.backend(&layout);
    load(&model, &mut be, &s);
    let step = Step { step: 0, seed: 0, lr: 0.0, weight_decay: 0.0, clip: 0.0 };
    let fill = |_: usize, a: &mut [i32], b: &mut [i32]| {
        a.copy_from_slice(tokens);
        b.copy_from_slice(targets);
        Ok::<(), Error>(())
    };
    // With a constant sign, training's forward pass is inference with that γ.
    let inference = match (mode, sign) {
        (Mode::Bdia, Sign::Minus) => Inference::Quantized(Gamma::new(-gamma, Sign::Plus).unwrap()),
        (Mode::Bdia, _) => Inference::Quantized(Gamma::new(gamma, Sign::Plus).unwrap()),
        _ => Inference::Float(Gamma::new(0.0, Sign::Plus).unwrap()),
    };
    let (context, vocab) = (setup.context, setup.dims.vocab);
    for (i, sample) in tokens.chunks(context).enumerate() {
        let ours = model.logits(&mut be, sample, 0..context, inference).unwrap();
        let d = difference(&ours, &s.reals["logits"][i * context * vocab..][..context * vocab]);
        assert!(d < TOLERANCE, "{file}: logits of sample {i} differ by {d:e}");
    }
    let outcome = model.train(&mut be, &step, fill).unwrap();
    assert!(
        (outcome.loss - s.reals["loss"][0]).abs() < TOLERANCE,
        "{file}: loss {} vs {}",
        outcome.loss,
        s.reals["loss"][0]
    );
    for t in model.tensors() {
        let d = difference(be.reals(t.gradient).unwrap(), &s.reals[&format!("grad.{}", t.name)]);
        assert!(d < TOLERANCE, "{file}: gradient of {} differs by {d:e}", t.name);
    }
    if mode == Mode::Bdia {
        // After the backward pass X_0 and X_1 are the rebuilt ones.
        for k in [0, 1] {
            assert_eq!(
                be.ints(model.stack.activation(k)).unwrap(),
                s.ints[&format!("X.{k}")],
                "{file}: X_{k}"
            );
        }
    }

    for name in ["sgd", "adamw", "set_adam"] {
        for fused in [true, false] {
            let (rule, lr, weight_decay) = rule(name, &s);
            setup.rule = Some(rule);
            setup.fused = fused;
            let (mut model, layout) = lay_out::<f64>(&setup, chunk, head_rows);
            let mut memory = Memory::new(&layout);
            let mut be = memory.backend(&layout);
            for t in model.tensors() {
                for state in t.state {
                    be.fill_reals(state, 0.0).unwrap();
                }
            }
            load(&model, &mut be, &s);
            for (i, theirs) in s.reals[&format!("losses.{name}")].iter().enumerate() {
                let step = Step { step: i as u32, lr, weight_decay, ..step };
                let ours = model.train(&mut be, &step, fill).unwrap().loss;
                assert!(
                    (ours - theirs).abs() < 1e-8,
                    "{file}, {name}: loss {i} is {ours}, theirs {theirs}"
                );
            }
        }
    }
}

#[test]
fn standard() {
    check("standard_f64.safetensors", Mode::Standard, 0.5, Sign::Plus, 3, 36);
    check("standard_f64.safetensors", Mode::Standard, 0.5, Sign::Plus, 2, 5);
}

#[test]
fn checkpoint() {
    for every in 1..=4 {
        check("standard_f64.safetensors", Mode::Checkpoint { every }, 0.5, Sign::Plus, 2, 7);
    }
}

#[test]
fn bdia_plus() {
    check("bdia_plus_f64.safetensors", Mode::Bdia, 0.5, Sign::Plus, 3, 36);
    check("bdia_plus_f64.safetensors", Mode::Bdia, 0.5, Sign::Plus, 1, 1);
}

#[test]
fn bdia_minus() {
    check("bdia_minus_f64.safetensors", Mode::Bdia, 0.5, Sign::Minus, 2, 7);
}

#[test]
fn bdia_two_planes() {
    check("bdia_m2_f64.safetensors", Mode::Bdia, 0.25, Sign::Plus, 2, 7);
}

/// Without a grid the same γ gives nearly the same gradients: the grid is all that separates the
/// two modes.
#[test]
fn bdia_float_is_close() {
    let s = state("bdia_plus_f64.safetensors");
    let mut setup = s.setup();
    setup.mode = Mode::BdiaFloat;
    setup.gamma = Gamma::new(0.5, Sign::Plus).unwrap();
    setup.rule = Some(Rule::Sgd { momentum: 0.0 });
    setup.fused = false;
    setup.verify = true;
    let (mut model, layout) = lay_out::<f64>(&setup, 2, 7);
    let mut memory = Memory::new(&layout);
    let mut be = memory.backend(&layout);
    load(&model, &mut be, &s);
    let step = Step { step: 0, seed: 0, lr: 0.0, weight_decay: 0.0, clip: 0.0 };
    let outcome = model
        .train(&mut be, &step, |_, a, b| {
            a.copy_from_slice(&s.ints["tokens"]);
            b.copy_from_slice(&s.ints["targets"]);
            Ok::<(), Error>(())
        })
        .unwrap();
    // The grid is 2^-14: activations, and so the loss, move by some multiples of it.
    assert!((outcome.loss - s.reals["loss"][0]).abs() < 1e-3);
    for t in model.tensors() {
        let d = difference(be.reals(t.gradient).unwrap(), &s.reals[&format!("grad.{}", t.name)]);
        assert!(d < 1e-2, "gradient of {} differs by {d:e}", t.name);
    }
    // Rebuilding in f64 multiplies rounding by about 2 a block; it is small, and it is not zero.
    assert!(
        outcome.rebuild_error > 0.0 && outcome.rebuild_error < 1e-12,
        "{:e}",
        outcome.rebuild_error
    );
}
