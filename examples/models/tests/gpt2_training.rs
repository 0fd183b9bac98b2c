//! Training as a whole: the choice of chunks, threads and micro-batches, dropout, faults, and that
//! modes agree where they must.
#![allow(clippy::unwrap_used)]

mod common;

use bdia_core::backend::Backend;
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Error, Fault, Gamma, Reference, Sign, Site};
use bdia_cpu::Cpu;
use bdia_models::gpt2::model::{Dims, Gpt2, Inference, Outcome, Setup, Step};
use common::{Memory, grid, lay_out, small};

fn setup(mode: Mode) -> Setup {
    Setup {
        dims: small(),
        batch: 4,
        accumulate: 1,
        context: 9,
        mode,
        grid: if mode == Mode::Bdia { grid() } else { None },
        gamma: Gamma::new(0.5, Sign::Random).unwrap(),
        rule: Some(Rule::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 }),
        adapters: None,
        fused: true,
        verify: mode == Mode::Bdia,
        threads: 3,
        library: 0,
    }
}

const STEP: Step = Step { step: 0, seed: 11, lr: 1e-2, weight_decay: 0.1, clip: 0.0 };

/// Sample `i` of the global batch: a sequence that can be learnt.
fn sample(i: usize, x: &mut [i32], y: &mut [i32]) {
    for (t, (x, y)) in x.iter_mut().zip(y).enumerate() {
        (*x, *y) = (((i * 5 + t * 3) % 19) as i32, ((i * 5 + (t + 1) * 3) % 19) as i32);
    }
}

fn run<B: Backend>(
    be: &mut B,
    model: &mut Gpt2,
    steps: u32,
    step: Step,
) -> Result<(Vec<Outcome>, Vec<B::Real>), Error> {
    let (context, batch) = (model.setup().context, model.setup().batch);
    model.initialize(be, 3)?;
    let mut outcomes = Vec::new();
    for i in 0..steps {
        outcomes.push(model.train(be, &Step { step: i, ..step }, |micro, x, y| {
            for (j, (x, y)) in x.chunks_mut(context).zip(y.chunks_mut(context)).enumerate() {
                sample(micro * batch + j, x, y);
            }
            Ok::<(), Error>(())
        })?);
    }
    let mut all = Vec::new();
    for t in model.tensors() {
        let mut v = vec![bdia_core::Real::of(0.0); t.values.len()];
        be.read_reals(t.values, &mut v)?;
        all.extend(v);
    }
    Ok((outcomes, all))
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

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|x| x.to_bits()).collect()
}

/// Whole runs give the same bits for 1, 2 and 3 threads, in every mode, with dropout.
#[test]
fn threads_change_no_bit() {
    for mode in [Mode::Bdia, Mode::Standard, Mode::Checkpoint { every: 2 }, Mode::BdiaFloat] {
        let dims = Dims { width: 48, heads: 3, inner: 96, dropout: [0.1; 3], ..small() };
        let s = Setup { dims, ..setup(mode) };
        let choice = Choice { chunk: 2, head_rows: 8 };
        let one = on_cpu(&s, choice, 1, 4, STEP);
        for threads in [2, 3] {
            let more = on_cpu(&s, choice, threads, 4, STEP);
            assert_eq!(bits(&one.1), bits(&more.1), "{mode:?}");
            let loss = |r: &[Outcome]| r.iter().map(|o| o.loss.to_bits()).collect::<Vec<_>>();
            assert_eq!(loss(&one.0), loss(&more.0), "{mode:?}");
        }
        assert!(one.0.iter().all(|o| o.mismatches == 0));
    }
}

/// Rebuilding is exact with dropout, on both backends, for every chunk size, and chunks move
/// gradients by rounding only.
#[test]
fn chunks_and_backends() {
    let dims = Dims { dropout: [0.2; 3], ..small() };
    let s = Setup { dims, ..setup(Mode::Bdia) };
    let (mut model, layout) = lay_out::<f64>(&s, 4, 36);
    let mut memory = Memory::<f64>::new(&layout);
    let (exact, reference) = run(&mut memory.backend(&layout), &mut model, 3, STEP).unwrap();
    for chunk in 1..=4 {
        let (mut model, layout) = lay_out::<f64>(&s, chunk, 5);
        let mut memory = Memory::<f64>::new(&layout);
        let (outcomes, values) = run(&mut memory.backend(&layout), &mut model, 3, STEP).unwrap();
        assert!(outcomes.iter().all(|o| o.mismatches == 0));
        // Only sums of gradients are ordered otherwise: 1e-15 of each, and Adam divides by small
        // roots.
        for (a, b) in values.iter().zip(&reference) {
            assert!((a - b).abs() < 1e-7, "chunk {chunk}: {a} {b}");
        }
        let (outcomes, _) = on_cpu(&s, Choice { chunk, head_rows: 5 }, 2, 3, STEP);
        for (a, b) in outcomes.iter().zip(&exact) {
            assert_eq!(a.mismatches, 0);
            // f32 against f64 through a grid of 2^-14, whose roundings may fall to the other side.
            assert!((a.loss - b.loss).abs() < 2e-3, "chunk {chunk}: {} {}", a.loss, b.loss);
        }
    }
}

/// Micro-batches are the same step as one batch: the same signs, the same dropout, the same loss.
#[test]
fn accumulation_is_the_same_step() {
    let dims = Dims { dropout: [0.1; 3], ..small() };
    let mut s = Setup { dims, fused: false, ..setup(Mode::Bdia) };
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
    let (a, b) = (
        on_cpu(&whole, Choice { chunk: 2, head_rows: 9 }, 2, 3, STEP).1,
        on_cpu(&Setup { fused: true, ..whole }, Choice { chunk: 2, head_rows: 9 }, 2, 3, STEP).1,
    );
    assert_eq!(bits(&a), bits(&b));
}

/// Clipping scales the gradient to the norm; with SGD the step is then that long.
#[test]
fn clipping() {
    let rule = Some(Rule::Sgd { momentum: 0.0 });
    let s = Setup { fused: false, rule, ..setup(Mode::Standard) };
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
    for mode in [Mode::Bdia, Mode::Standard, Mode::Checkpoint { every: 3 }, Mode::BdiaFloat] {
        for rule in [
            Rule::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 },
            Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 1e-18 },
            Rule::Sgd { momentum: 0.9 },
        ] {
            let s = Setup { rule: Some(rule), ..setup(mode) };
            let lr = if matches!(rule, Rule::Sgd { .. }) { 0.1 } else { 3e-3 };
            let step = Step { lr, weight_decay: 0.0, ..STEP };
            let (outcomes, _) = on_cpu(&s, Choice { chunk: 4, head_rows: 36 }, 2, 150, step);
            let (first, last) = (outcomes[0].loss, outcomes[149].loss);
            assert!(first > 2.5 && last < 0.5, "{mode:?} {rule:?}: {first} to {last}");
        }
    }
}

/// A checkpoint segment computes what `standard` computes, bit for bit.
#[test]
fn checkpointing_changes_no_bit() {
    let dims = Dims { dropout: [0.1; 3], ..small() };
    for grid in [None, grid()] {
        let of = |mode| {
            let s = Setup { dims, grid, ..setup(mode) };
            bits(
                &on_cpu(
                    &Setup { verify: false, ..s },
                    Choice { chunk: 2, head_rows: 9 },
                    2,
                    3,
                    STEP,
                )
                .1,
            )
        };
        let standard = of(Mode::Standard);
        for every in 1..=4 {
            assert_eq!(
                standard,
                of(Mode::Checkpoint { every }),
                "every {every}, grid {}",
                grid.is_some()
            );
        }
    }
}

/// What goes wrong in the numbers stops the step and leaves parameters as they were.
#[test]
fn faults_leave_parameters_untouched() {
    let s = setup(Mode::Bdia);
    let (mut model, layout) = Gpt2::layout::<Cpu>(&s, Choice { chunk: 2, head_rows: 9 }).unwrap();
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
    let s = setup(Mode::Bdia);
    let (mut model, layout) = lay_out::<f64>(&s, 2, 18);
    let mut memory = Memory::<f64>::new(&layout);
    let mut be: Reference<'_, f64> = memory.backend(&layout);
    run(&mut be, &mut model, 60, Step { lr: 3e-3, ..STEP }).unwrap();
    let (mut x, mut y) = ([0; 18], [0; 18]);
    for i in 0..2 {
        sample(i, &mut x[i * 9..][..9], &mut y[i * 9..][..9]);
    }
    let gamma = |g: f64| Gamma::new(g, Sign::Plus).unwrap();
    let mut loss = |inference| model.evaluate(&mut be, &x, &y, inference).unwrap();
    let (float, n) = loss(Inference::Float(gamma(0.0)));
    assert_eq!(n, 18);
    let (quantized, _) = loss(Inference::Quantized(gamma(0.0)));
    assert!((float - quantized).abs() < 1e-2 && float != quantized, "{float} {quantized}");
    let (plus, minus) =
        (loss(Inference::Float(gamma(0.5))).0, loss(Inference::Float(gamma(-0.5))).0);
    assert!(plus != float && minus != float && plus.is_finite() && minus.is_finite());
    let on_grid = loss(Inference::Quantized(gamma(0.5))).0;
    assert!((plus - on_grid).abs() < 1e-2, "{plus} {on_grid}");

    // Logits of single positions are those that the loss is made of, and do not see what follows.
    let none = Inference::Float(gamma(0.0));
    let all = model.logits(&mut be, &x[..9], 0..9, none).unwrap();
    let some = model.logits(&mut be, &x[..5], 3..5, none).unwrap();
    assert_eq!(all[3 * 19..5 * 19], some[..]);
    let mut sum = 0.0;
    for (row, &target) in all.chunks(19).zip(&y[..9]) {
        sum += row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[target as usize];
    }
    let (expected, _) = model.evaluate(&mut be, &x[..9], &y[..9], none).unwrap();
    assert!((sum - expected).abs() < 1e-9);
}

/// Plans and settings that cannot be are refused, with a reason.
#[test]
fn refusals() {
    let choice = Choice { chunk: 1, head_rows: 1 };
    let lay = |s: &Setup| {
        Gpt2::layout::<Cpu>(s, choice).and_then(|(_, l)| l.checked()).unwrap_err().to_string()
    };
    let s = setup(Mode::Bdia);
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
    assert!(lay(&Setup { gamma: Gamma::new(0.3, Sign::Plus).unwrap(), ..s }).contains("0.5, 0.25"));
    let (mut model, layout) =
        Gpt2::layout::<Cpu>(&Setup { accumulate: 2, ..s }, Choice { chunk: 2, head_rows: 9 })
            .unwrap();
    let mut be = Cpu::new(&layout, 1).unwrap();
    let error = run(&mut be, &mut model, 1, STEP).unwrap_err();
    assert!(error.to_string().contains("full gradient buffers"));
}
