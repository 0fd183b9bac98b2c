//! Training as a whole: the choice of chunks, threads and micro-batches, dropout, faults, and that
//! modes agree where they must.

use crate::common::{
    ADAMW, Memory, SGD, STANDARD, bdia, bdia_float, bits, checkpoint, float, lay_out, quantized,
    run, sample, small, verified,
};
use bdia_core::layers::Gradients;
use bdia_core::network::{Outcome, Step};
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Error, Fault, Gamma, Reference, Sign, Site};
use bdia_cpu::Cpu;
use bdia_models::gpt2::model::{Dims, Gpt2, Setup};

const STEP: Step = Step { step: 0, seed: 11, lr: 1e-2, weight_decay: 0.1, clip: 0.0 };

/// Mode `bdia`, which counts the values that it rebuilds wrongly.
fn exact() -> Mode {
    verified(bdia(14, Sign::Random))
}

fn setup(mode: Mode) -> Setup {
    let gradients = Gradients::Fused(ADAMW);
    Setup { gradients, threads: 3, ..crate::common::setup(small(), 4, 9, mode) }
}

fn on_cpu(
    setup: &Setup,
    choice: Choice,
    threads: usize,
    steps: u32,
    step: Step,
) -> (Vec<Outcome>, Vec<f32>) {
    let (mut model, layout) = Gpt2::layout::<Cpu>(&Setup { threads, ..*setup }, choice).unwrap();
    let mut be = Cpu::new(&layout, threads).unwrap();
    run(&mut be, &mut model, steps, step).unwrap()
}

/// Whole runs give the same bits for 1, 2 and 3 threads, in every mode, with dropout.
#[test]
fn threads_change_no_bit() {
    for mode in [exact(), STANDARD, checkpoint(2), bdia_float(Sign::Random)] {
        let dims = Dims { width: 48, heads: 3, inner: 96, dropout: [0.1; 3], ..small() };
        let s = Setup { dims, ..setup(mode) };
        let choice = Choice::new(2, 8);
        let one = on_cpu(&s, choice, 1, 4, STEP);
        for threads in [2, 3] {
            let more = on_cpu(&s, choice, threads, 4, STEP);
            assert_eq!(bits(&one.1), bits(&more.1), "{mode:?}");
            let loss = |r: &[Outcome]| r.iter().map(|o| o.loss.to_bits()).collect::<Vec<_>>();
            assert_eq!(loss(&one.0), loss(&more.0), "{mode:?}");
        }
        assert!(one.0.iter().all(|o| o.rebuilt.mismatches == 0));
    }
}

/// Rebuilding is exact with dropout, on both backends, for every chunk size, and chunks move
/// gradients by rounding only.
#[test]
fn chunks_and_backends() {
    let dims = Dims { dropout: [0.2; 3], ..small() };
    let s = Setup { dims, ..setup(exact()) };
    let (mut model, layout) = lay_out::<f64>(&s, 4, 36);
    let mut memory = Memory::<f64>::new(&layout);
    let (exact, reference) = run(&mut memory.backend(&layout), &mut model, 3, STEP).unwrap();
    for chunk in 1..=4 {
        let (mut model, layout) = lay_out::<f64>(&s, chunk, 5);
        let mut memory = Memory::<f64>::new(&layout);
        let (outcomes, values) = run(&mut memory.backend(&layout), &mut model, 3, STEP).unwrap();
        assert!(outcomes.iter().all(|o| o.rebuilt.mismatches == 0));
        // Only sums of gradients are ordered otherwise: 1e-15 of each, and Adam divides by small
        // roots.
        for (a, b) in values.iter().zip(&reference) {
            assert!((a - b).abs() < 1e-7, "chunk {chunk}: {a} {b}");
        }
        let (outcomes, _) = on_cpu(&s, Choice::new(chunk, 5), 2, 3, STEP);
        for (a, b) in outcomes.iter().zip(&exact) {
            assert_eq!(a.rebuilt.mismatches, 0);
            // f32 against f64 through a grid of 2^-14, whose roundings may fall to the other side.
            assert!((a.loss - b.loss).abs() < 2e-3, "chunk {chunk}: {} {}", a.loss, b.loss);
        }
    }
}

/// Micro-batches are the same step as one batch: the same signs, the same dropout, the same loss.
#[test]
fn accumulation_is_the_same_step() {
    let dims = Dims { dropout: [0.1; 3], ..small() };
    let mut s = Setup { dims, gradients: Gradients::Full(ADAMW), ..setup(exact()) };
    let mut results = Vec::new();
    for (batch, accumulate) in [(4, 1), (2, 2), (1, 4)] {
        (s.batch, s.accumulate) = (batch, accumulate);
        let (mut model, layout) = lay_out::<f64>(&s, 2, 9);
        let mut memory = Memory::<f64>::new(&layout);
        results.push(run(&mut memory.backend(&layout), &mut model, 3, STEP).unwrap());
    }
    for other in &results[1..] {
        for (a, b) in other.0.iter().zip(&results[0].0) {
            assert!((a.loss - b.loss).abs() < 1e-9 && (a.grad_norm - b.grad_norm).abs() < 1e-7);
        }
    }
    // Full gradient buffers and fused updates are the same bits: the order of every sum is the
    // same.
    let whole = Setup { batch: 4, accumulate: 1, ..s };
    let fused = Setup { gradients: Gradients::Fused(ADAMW), ..whole };
    let choice = Choice::new(2, 9);
    let of = |s| bits(&on_cpu(s, choice, 2, 3, STEP).1);
    assert_eq!(of(&whole), of(&fused));
}

/// Clipping scales the gradient to the norm; with SGD the step is then that long.
#[test]
fn clipping() {
    let s = Setup { gradients: Gradients::Full(SGD), ..setup(STANDARD) };
    let distance = |clip: f64| {
        let (mut model, layout) = lay_out::<f64>(&s, 4, 36);
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        let step = Step { lr: 1.0, weight_decay: 0.0, clip, ..STEP };
        let (_, before) = run(&mut be, &mut model, 0, step).unwrap();
        let (outcomes, after) = run(&mut be, &mut model, 1, step).unwrap();
        let d = before.iter().zip(&after).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
        (outcomes[0].grad_norm, d)
    };
    let (norm, free) = distance(0.0);
    assert!((norm - free).abs() < 1e-9 * norm);
    let (same, clipped) = distance(0.1);
    assert!(same == norm && norm > 0.1 && (clipped - 0.1).abs() < 1e-9, "{norm} {clipped}");
}

/// The network learns, in every mode and with every optimizer, to the same quality.
#[test]
fn every_mode_learns() {
    for mode in [exact(), STANDARD, checkpoint(3), bdia_float(Sign::Random)] {
        for rule in [
            ADAMW,
            Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 1e-18 },
            Rule::Sgd { momentum: 0.9 },
        ] {
            let s = Setup { gradients: Gradients::Fused(rule), ..setup(mode) };
            let lr = if matches!(rule, Rule::Sgd { .. }) { 0.1 } else { 3e-3 };
            let step = Step { lr, weight_decay: 0.0, ..STEP };
            let (outcomes, _) = on_cpu(&s, Choice::new(4, 36), 2, 150, step);
            let (first, last) = (outcomes[0].loss, outcomes[149].loss);
            assert!(first > 2.5 && last < 0.5, "{mode:?} {rule:?}: {first} to {last}");
        }
    }
}

/// A checkpoint segment computes what `standard` computes, bit for bit.
#[test]
fn checkpointing_changes_no_bit() {
    let dims = Dims { dropout: [0.1; 3], ..small() };
    for grid in [None, Some(crate::common::grid())] {
        let of = |mode| {
            let choice = Choice::new(2, 9);
            bits(&on_cpu(&Setup { dims, ..setup(mode) }, choice, 2, 3, STEP).1)
        };
        let standard = of(Mode::Standard { grid });
        for every in 1..=4 {
            let other = of(Mode::Checkpoint { every, grid });
            assert_eq!(standard, other, "every {every}, grid {}", grid.is_some());
        }
    }
}

/// What goes wrong in the numbers stops the step and leaves parameters as they were.
#[test]
fn faults_leave_parameters_untouched() {
    let s = setup(exact());
    let (mut model, layout) = Gpt2::layout::<Cpu>(&s, Choice::new(2, 9)).unwrap();
    let mut be = Cpu::new(&layout, 3).unwrap();
    let (_, before) = run(&mut be, &mut model, 2, STEP).unwrap();
    let named = model.tensors();
    let find = |name: &str| named.iter().find(|t| t.name == name).unwrap().values;
    let snapshot = |be: &Cpu| -> Vec<u32> {
        named.iter().flat_map(|t| bits(be.reals(t.values).unwrap())).collect()
    };

    let mut attempt = |be: &mut Cpu, token: i32| {
        model.train(be, &Step { step: 5, ..STEP }, |_, x, y| {
            x.fill(token.min(18));
            y.fill(3);
            x[10] = token;
            Ok::<(), Error>(())
        })
    };
    let clean = snapshot(&be);
    assert_eq!(clean, bits(&before));

    let bias = find("h.2.mlp.c_proj.bias").sub(0, 1);
    let good = be.reals(bias).unwrap()[0];
    for (value, what) in
        [(f32::NAN, "not a number"), (1e9, "out of range"), (f32::INFINITY, "infinite")]
    {
        be.reals_mut(bias).unwrap()[0] = value;
        let spoiled = snapshot(&be);
        match attempt(&mut be, 4) {
            Err(Error::Fault(Fault::Range { site, sample, .. })) => {
                assert_eq!((site, sample), (Site::Block(2), 0), "{what}");
            }
            other => panic!("{what}: {other:?}"),
        }
        assert_eq!(spoiled, snapshot(&be), "{what}");
    }
    be.reals_mut(bias).unwrap()[0] = good;

    match attempt(&mut be, 19) {
        Err(Error::Fault(Fault::Token { sample, value, vocab })) => {
            assert_eq!((sample, value, vocab), (1, 19, 19))
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(clean, snapshot(&be));

    // The final norm's weight: the activations are fine, the loss is not.
    let norm = find("ln_f.weight").sub(0, 1);
    let good = be.reals(norm).unwrap()[0];
    be.reals_mut(norm).unwrap()[0] = f32::NAN;
    let spoiled = snapshot(&be);
    assert!(matches!(attempt(&mut be, 4), Err(Error::Fault(Fault::Loss { sample: 0, .. }))));
    assert_eq!(spoiled, snapshot(&be));

    // And with everything as it was, the step goes through.
    be.reals_mut(norm).unwrap()[0] = good;
    assert!(attempt(&mut be, 4).unwrap().loss.is_finite());
    assert_ne!(clean, snapshot(&be));
}

/// Inference is the standard transformer; the grid moves it by rounding; a constant γ is another
/// network.
#[test]
fn inference() {
    let s = setup(exact());
    let (mut model, layout) = lay_out::<f64>(&s, 2, 18);
    let mut memory = Memory::<f64>::new(&layout);
    let mut be: Reference<'_, f64> = memory.backend(&layout);
    run(&mut be, &mut model, 60, Step { lr: 3e-3, ..STEP }).unwrap();
    let (mut x, mut y) = ([0; 18], [0; 18]);
    for i in 0..2 {
        sample(i, &mut x[i * 9..][..9], &mut y[i * 9..][..9]);
    }
    let mut loss = |inference| model.evaluate(&mut be, &x, &y, inference).unwrap();
    let (standard, n) = loss(float(0.0));
    assert_eq!(n, 18);
    let (rounded, _) = loss(quantized(0.0));
    assert!((standard - rounded).abs() < 1e-2 && standard != rounded, "{standard} {rounded}");
    let (plus, minus) = (loss(float(0.5)).0, loss(float(-0.5)).0);
    assert!(plus != standard && minus != standard && plus.is_finite() && minus.is_finite());
    let on_grid = loss(quantized(0.5)).0;
    assert!((plus - on_grid).abs() < 1e-2, "{plus} {on_grid}");

    // Logits of single positions are those that the loss is made of, and do not see what follows.
    let all = model.logits(&mut be, &x[..9], 0..9, float(0.0)).unwrap();
    let some = model.logits(&mut be, &x[..5], 3..5, float(0.0)).unwrap();
    assert_eq!(all[3 * 19..5 * 19], some[..]);
    let mut sum = 0.0;
    for (row, &target) in all.chunks(19).zip(&y[..9]) {
        sum += row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[target as usize];
    }
    let (expected, _) = model.evaluate(&mut be, &x[..9], &y[..9], float(0.0)).unwrap();
    assert!((sum - expected).abs() < 1e-9);
}

/// Plans and settings that cannot be are refused, with a reason.
#[test]
fn refusals() {
    let choice = Choice::new(1, 1);
    let lay = |s: &Setup| {
        Gpt2::layout::<Cpu>(s, choice).and_then(|(_, l)| l.checked()).unwrap_err().to_string()
    };
    let s = setup(exact());
    assert!(lay(&Setup { context: 11, ..s }).contains("expected 10, found 11"));
    assert!(
        lay(&Setup { dims: Dims { heads: 5, ..small() }, ..s }).contains("divisor of the width")
    );
    assert!(lay(&Setup { dims: Dims { layers: 0, ..small() }, ..s }).contains("blocks is 0"));
    assert!(
        lay(&Setup { dims: Dims { vocab: usize::MAX / 4, ..small() }, ..s })
            .contains("address space")
    );
    assert!(lay(&Setup { batch: usize::MAX / 8, ..s }).contains("address space"));
    let gamma = Gamma::from_value(0.3, Sign::Plus).unwrap_err();
    assert!(gamma.to_string().contains("0.5, 0.25"));
    let (mut model, layout) =
        Gpt2::layout::<Cpu>(&Setup { accumulate: 2, ..s }, Choice::new(2, 9)).unwrap();
    let mut be = Cpu::new(&layout, 1).unwrap();
    let error = run(&mut be, &mut model, 1, STEP).unwrap_err();
    assert!(error.to_string().contains("the gradients of all groups"), "{error}");
}
