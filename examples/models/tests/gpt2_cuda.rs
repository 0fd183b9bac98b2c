//! Training on a CUDA device: exact, repeatable, and what the reference backend computes.
//!
//! Ignored unless asked for, because they need a device; `.ci/cuda` runs them on the emulated one.
#![allow(clippy::unwrap_used)]

mod common;

use bdia_core::backend::Half;
use bdia_core::layers::LoraShape;
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Error, Fault, Gamma, Sign, Site, Storage};
use bdia_cuda::{Cuda, Options, Precision};
use bdia_models::gpt2::model::{Adapters, Dims, Gpt2, Outcome, Setup, Step};
use common::{Memory, grid, lay_out, small};

const STEP: Step = Step { step: 0, seed: 11, lr: 3e-3, weight_decay: 0.1, clip: 0.0 };

fn setup(mode: Mode) -> Setup {
    Setup {
        dims: Dims { dropout: [0.1; 3], ..small() },
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
        threads: 1,
        library: 0,
    }
}

fn run<B: bdia_core::Backend>(
    be: &mut B,
    model: &mut Gpt2,
    steps: u32,
    step: Step,
) -> (Vec<Outcome>, Vec<B::Real>) {
    let (context, batch) = (model.setup().context, model.setup().batch);
    model.initialize(be, 3).unwrap();
    if model.setup().adapters.is_some() {
        model.initialize_adapters(be, 3).unwrap();
    }
    let mut outcomes = vec![];
    for i in 0..steps {
        let outcome = model.train(be, &Step { step: i, ..step }, |micro, x, y| {
            for j in 0..x.len() {
                let (n, t) = (micro * batch + j / context, j % context);
                (x[j], y[j]) = (((n * 5 + t * 3) % 19) as i32, ((n * 5 + (t + 1) * 3) % 19) as i32);
            }
            Ok::<(), Error>(())
        });
        outcomes.push(outcome.unwrap());
    }
    let mut all = vec![];
    for t in model.trained() {
        let mut v = vec![bdia_core::Real::of(0.0); t.values.len()];
        be.read_reals(t.values, &mut v).unwrap();
        all.extend(v);
    }
    (outcomes, all)
}

fn on_cuda(
    s: &Setup,
    chunk: usize,
    precision: Precision,
    steps: u32,
    step: Step,
) -> (Vec<Outcome>, Vec<u32>) {
    let (mut model, layout) = Gpt2::layout::<Cuda>(s, Choice { chunk, head_rows: 9 }).unwrap();
    let mut be =
        Cuda::new(&layout, Options { device: 0, precision }).map_err(|e| e.to_string()).unwrap();
    let (outcomes, values) = run(&mut be, &mut model, steps, step);
    (outcomes, values.into_iter().map(f32::to_bits).collect())
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn exact_and_like_the_reference() {
    for rule in [
        Rule::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 },
        Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 1e-18 },
    ] {
        let s = Setup { rule: Some(rule), ..setup(Mode::Bdia) };
        let (mut model, layout) = lay_out::<f64>(&s, 4, 36);
        let mut memory = Memory::<f64>::new(&layout);
        let (exact, _) = run(&mut memory.backend(&layout), &mut model, 3, STEP);
        for chunk in [1, 4] {
            let (outcomes, bits) = on_cuda(&s, chunk, Precision::F32, 3, STEP);
            for (a, b) in outcomes.iter().zip(&exact) {
                assert_eq!(a.mismatches, 0);
                // f32 against f64 through a grid of 2^-14, whose roundings may fall to the other
                // side.
                assert!((a.loss - b.loss).abs() < 2e-3, "chunk {chunk}: {} {}", a.loss, b.loss);
            }
            assert_eq!(
                bits,
                on_cuda(&s, chunk, Precision::F32, 3, STEP).1,
                "a run repeats its bits"
            );
        }
    }
}

/// Adapters beside a model whose matrices are kept in 16 bits.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn adapters_are_trained() {
    for half in [None, Some(Half::Bf16), Some(Half::F16)] {
        let adapters = Some(Adapters { shape: LoraShape { rank: 3, alpha: 12.0 }, half });
        let s = Setup { adapters, ..setup(Mode::Bdia) };
        let (mut model, layout) = lay_out::<f64>(&s, 4, 36);
        let mut memory = Memory::<f64>::new(&layout);
        let step = Step { lr: 3e-2, ..STEP };
        let (exact, _) = run(&mut memory.backend(&layout), &mut model, 3, step);
        let (outcomes, bits) = on_cuda(&s, 2, Precision::F32, 3, step);
        for (a, b) in outcomes.iter().zip(&exact) {
            assert_eq!(a.mismatches, 0);
            assert!((a.loss - b.loss).abs() < 2e-3, "{half:?}: {} {}", a.loss, b.loss);
        }
        assert_eq!(bits, on_cuda(&s, 2, Precision::F32, 3, step).1, "a run repeats its bits");
    }
}

/// A checkpoint segment computes what `standard` computes; full gradient buffers and fused updates
/// are the same.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn modes_agree_bit_for_bit() {
    let of = |mode, fused| on_cuda(&Setup { fused, ..setup(mode) }, 2, Precision::F32, 2, STEP);
    let (standard, bits) = of(Mode::Standard, true);
    assert_eq!(bits, of(Mode::Checkpoint { every: 2 }, true).1);
    assert_eq!(bits, of(Mode::Standard, false).1);
    let clipped = on_cuda(
        &Setup { fused: false, ..setup(Mode::Standard) },
        2,
        Precision::F32,
        2,
        Step { clip: 0.01, ..STEP },
    );
    assert!(
        standard[0].loss == clipped.0[0].loss && clipped.0[0].grad_norm > 0.01 && bits != clipped.1
    );
}

/// Products with short factors: the rest, and with it exactness, is as before, and the network
/// learns.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn short_factors_are_exact_too() {
    let s = Setup { dims: small(), ..setup(Mode::Bdia) };
    let step = Step { weight_decay: 0.0, lr: 1e-2, ..STEP };
    let (full, bits) = on_cuda(&s, 4, Precision::F32, 25, step);
    for precision in [Precision::Tf32, Precision::Bf16] {
        let (outcomes, short) = on_cuda(&s, 4, precision, 25, step);
        assert!(outcomes.iter().all(|o| o.mismatches == 0), "{precision:?}");
        assert!(
            (outcomes[0].loss - full[0].loss).abs() < 0.02,
            "{precision:?}: {} {}",
            outcomes[0].loss,
            full[0].loss
        );
        assert!(outcomes[24].loss < 0.8 * outcomes[0].loss, "{precision:?}: {}", outcomes[24].loss);
        assert_ne!(bits, short, "{precision:?} is not f32");
        assert_eq!(short, on_cuda(&s, 4, precision, 25, step).1, "{precision:?} repeats its bits");
    }
}

/// What goes wrong in the numbers stops the step and leaves parameters as they were.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn faults_leave_parameters_untouched() {
    let (mut model, layout) =
        Gpt2::layout::<Cuda>(&setup(Mode::Bdia), Choice { chunk: 2, head_rows: 9 }).unwrap();
    let mut be = Cuda::new(&layout, Options::default()).map_err(|e| e.to_string()).unwrap();
    let _ = run(&mut be, &mut model, 1, STEP);
    let named = model.tensors();
    let snapshot = |be: &Cuda| -> Vec<u32> {
        let mut all = vec![];
        for t in &named {
            let mut values = vec![0.0; t.values.len()];
            be.read_reals(t.values, &mut values).unwrap();
            all.extend(values.into_iter().map(f32::to_bits));
        }
        all
    };
    let bias = named.iter().find(|t| t.name == "h.2.mlp.c_proj.bias").unwrap().values.sub(0, 1);
    for (value, token) in [(f32::NAN, 4), (1e9, 4), (0.0, 19)] {
        be.write_reals(bias, &[value]).unwrap();
        let before = snapshot(&be);
        let outcome = model.train(&mut be, &Step { step: 5, ..STEP }, |_, x, y| {
            x.fill(3);
            y.fill(3);
            x[10] = token;
            Ok::<(), Error>(())
        });
        match outcome {
            Err(Error::Fault(Fault::Range { site: Site::Block(2), sample: 0, .. }))
                if token == 4 => {}
            Err(Error::Fault(Fault::Token { sample: 1, value: 19, vocab: 19 })) if token == 19 => {}
            other => panic!("{value} {token}: {other:?}"),
        }
        assert_eq!(before, snapshot(&be), "{value} {token}");
    }
}
