//! Training on the CPU with factors as bf16: exact, the same bits for any number of threads, and
//! learning.
#![allow(clippy::unwrap_used)]

mod common;

use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Error, Gamma, Sign, Storage};
use bdia_cpu::{Cpu, Precision, Products};
use bdia_models::gpt2::model::{Gpt2, Outcome, Setup, Step};
use common::{grid, small};

const STEPS: u32 = 25;

/// Outcomes and the bits of all parameters.
fn run(products: Products, threads: usize) -> (Vec<Outcome>, Vec<u32>) {
    let s = Setup {
        dims: small(),
        batch: 4,
        accumulate: 1,
        adapters: None,
        context: 9,
        mode: Mode::Bdia,
        grid: grid(),
        gamma: Gamma::new(0.5, Sign::Random).unwrap(),
        rule: Some(Rule::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 }),
        fused: true,
        verify: true,
        threads,
        library: 0,
    };
    let (mut model, layout) = Gpt2::layout::<Cpu>(&s, Choice { chunk: 4, head_rows: 9 }).unwrap();
    let mut be = Cpu::with_products(&layout, threads, products).unwrap();
    model.initialize(&mut be, 3).unwrap();
    let outcomes = (0..STEPS).map(|step| {
        let step = Step { step, seed: 11, lr: 1e-2, weight_decay: 0.0, clip: 0.0 };
        let outcome = model.train(&mut be, &step, |_, x, y| {
            for j in 0..x.len() {
                let (n, t) = (j / s.context, j % s.context);
                (x[j], y[j]) = (((n * 5 + t * 3) % 19) as i32, ((n * 5 + (t + 1) * 3) % 19) as i32);
            }
            Ok::<(), Error>(())
        });
        outcome.unwrap()
    });
    let outcomes = outcomes.collect();
    let mut bits = vec![];
    for t in model.tensors() {
        let mut values = vec![0.0; t.values.len()];
        be.read_reals(t.values, &mut values).unwrap();
        bits.extend(values.into_iter().map(f32::to_bits));
    }
    (outcomes, bits)
}

#[test]
fn short_factors_are_exact_too() {
    let (full, full_bits) = run(Products::best(Precision::F32), 1);
    for products in
        Products::ALL.into_iter().filter(|p| p.is_available() && p.precision() == Precision::Bf16)
    {
        let (outcomes, bits) = run(products, 1);
        assert!(outcomes.iter().all(|o| o.mismatches == 0), "{products:?}");
        // Logits of about 1 from factors with 8 bits.
        assert!(
            (outcomes[0].loss - full[0].loss).abs() < 0.02,
            "{products:?}: {} {}",
            outcomes[0].loss,
            full[0].loss
        );
        let last = outcomes.last().unwrap().loss;
        assert!(last < 0.8 * outcomes[0].loss, "{products:?}: {last}");
        assert!(bits != full_bits, "{products:?} is not f32");
        assert!(bits == run(products, 3).1, "{products:?} gives other bits with other threads");
    }
}
