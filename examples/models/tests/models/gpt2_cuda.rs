//! Training on a CUDA device: exact, repeatable, and what the reference backend computes.
//!
//! Ignored unless asked for, because they need a device; `.ci/cuda` runs them on the emulated one.

use crate::common::{ADAMW, Memory, STANDARD, bdia, checkpoint, lay_out, run, small, verified};
use bdia_core::layers::{Gradients, LoraShape};
use bdia_core::network::{Outcome, Step};
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Error, Fault, Packing, Sign, Site, Storage};
use bdia_cuda::{Cuda, Options, Precision};
use bdia_models::gpt2::model::{Dims, Gpt2, Setup};
use bdia_models::language::frozen;
use bdia_models::named::{Adapters, Frozen};

const STEP: Step = Step { step: 0, seed: 11, lr: 3e-3, weight_decay: 0.1, clip: 0.0 };

fn setup(mode: Mode) -> Setup {
    let dims = Dims { dropout: [0.1; 3], ..small() };
    Setup { gradients: Gradients::Fused(ADAMW), ..crate::common::setup(dims, 4, 9, mode) }
}

/// Mode `bdia`, which counts the values that it rebuilds wrongly.
fn exact() -> Mode {
    verified(bdia(14, Sign::Random))
}

fn on_cuda(
    s: &Setup,
    chunk: usize,
    precision: Precision,
    steps: u32,
    step: Step,
) -> (Vec<Outcome>, Vec<u32>) {
    let (mut model, layout) = Gpt2::layout::<Cuda>(s, Choice::new(chunk, 9)).unwrap();
    let mut be =
        Cuda::new(&layout, Options { device: 0, precision }).map_err(|e| e.to_string()).unwrap();
    let (outcomes, values) = run(&mut be, &mut model, steps, step).unwrap();
    (outcomes, values.into_iter().map(f32::to_bits).collect())
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn exact_and_like_the_reference() {
    for rule in [ADAMW, Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 1e-18 }] {
        let s = Setup { gradients: Gradients::Fused(rule), ..setup(exact()) };
        let (mut model, layout) = lay_out::<f64>(&s, 4, 36);
        let mut memory = Memory::<f64>::new(&layout);
        let (reference, _) = run(&mut memory.backend(&layout), &mut model, 3, STEP).unwrap();
        for chunk in [1, 4] {
            let (outcomes, bits) = on_cuda(&s, chunk, Precision::F32, 3, STEP);
            for (a, b) in outcomes.iter().zip(&reference) {
                assert_eq!(a.rebuilt.mismatches, 0);
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
    for half in [None, Some(Packing::Bf16), Some(Packing::F16)] {
        let s = setup(exact());
        let frozen = half.map_or(Frozen::default(), |p| frozen::packed(&s.dims, p).unwrap());
        let shape = LoraShape { rank: 3, alpha: 12.0 };
        let s = Setup { adapters: Some(Adapters { shape, frozen }), ..s };
        let (mut model, layout) = lay_out::<f64>(&s, 4, 36);
        let mut memory = Memory::<f64>::new(&layout);
        let step = Step { lr: 3e-2, ..STEP };
        let (reference, _) = run(&mut memory.backend(&layout), &mut model, 3, step).unwrap();
        let (outcomes, bits) = on_cuda(&s, 2, Precision::F32, 3, step);
        for (a, b) in outcomes.iter().zip(&reference) {
            assert_eq!(a.rebuilt.mismatches, 0);
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
    let (fused, full) = (Gradients::Fused(ADAMW), Gradients::Full(ADAMW));
    let of = |mode, gradients, step| {
        on_cuda(&Setup { gradients, ..setup(mode) }, 2, Precision::F32, 2, step)
    };
    let (standard, bits) = of(STANDARD, fused, STEP);
    assert_eq!(bits, of(checkpoint(2), fused, STEP).1);
    assert_eq!(bits, of(STANDARD, full, STEP).1);
    let clipped = of(STANDARD, full, Step { clip: 0.01, ..STEP });
    assert!(
        standard[0].loss == clipped.0[0].loss && clipped.0[0].grad_norm > 0.01 && bits != clipped.1
    );
}

/// Products with short factors: the rest, and with it exactness, is as before, and the network
/// learns.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn short_factors_are_exact_too() {
    let s = Setup { dims: small(), ..setup(exact()) };
    let step = Step { weight_decay: 0.0, lr: 1e-2, ..STEP };
    let (full, bits) = on_cuda(&s, 4, Precision::F32, 25, step);
    for precision in [Precision::Tf32, Precision::Bf16] {
        let (outcomes, short) = on_cuda(&s, 4, precision, 25, step);
        assert!(outcomes.iter().all(|o| o.rebuilt.mismatches == 0), "{precision:?}");
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
    let (mut model, layout) = Gpt2::layout::<Cuda>(&setup(exact()), Choice::new(2, 9)).unwrap();
    let mut be = Cuda::new(&layout, Options::default()).map_err(|e| e.to_string()).unwrap();
    run(&mut be, &mut model, 1, STEP).unwrap();
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
