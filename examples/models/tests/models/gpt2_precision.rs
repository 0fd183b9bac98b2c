//! Training on the CPU with factors as bf16: exact, the same bits for any number of threads, and
//! learning.

use crate::common::{ADAMW, bdia, bits, small, verified};
use bdia_core::Sign;
use bdia_core::layers::Gradients;
use bdia_core::network::{Outcome, Step};
use bdia_core::plan::Choice;
use bdia_cpu::{Cpu, Precision, Products};
use bdia_models::gpt2::model::{Gpt2, Setup};

/// Outcomes and the bits of all parameters.
fn run(products: Products, threads: usize) -> (Vec<Outcome>, Vec<u32>) {
    let s = Setup {
        gradients: Gradients::Fused(ADAMW),
        threads,
        ..crate::common::setup(small(), 4, 9, verified(bdia(14, Sign::Random)))
    };
    let (mut model, layout) = Gpt2::layout::<Cpu>(&s, Choice::new(4, 9)).unwrap();
    let mut be = Cpu::with_products(&layout, threads, products).unwrap();
    let step = Step { step: 0, seed: 11, lr: 1e-2, weight_decay: 0.0, clip: 0.0 };
    let (outcomes, values) = crate::common::run(&mut be, &mut model, 25, step).unwrap();
    (outcomes, bits(&values))
}

#[test]
fn short_factors_are_exact_too() {
    let (full, full_bits) = run(Products::best(Precision::F32), 1);
    for products in
        Products::ALL.into_iter().filter(|p| p.is_available() && p.precision() == Precision::Bf16)
    {
        let (outcomes, bits) = run(products, 1);
        assert!(outcomes.iter().all(|o| o.rebuilt.mismatches == 0), "{products:?}");
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
