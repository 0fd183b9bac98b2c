//! Several ranks, as threads of this process: the same losses as one, the same bits on all, and
//! what stops all of them.

use core::time::Duration;

use crate::common::{ADAMW, STANDARD, bdia, bdia_float, checkpoint, small, verified};
use bdia_core::layers::Gradients;
use bdia_core::network::{Outcome, Step};
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Error, Exchange, Fault, Halt, Sign, Site, Storage};
use bdia_cpu::Cpu;
use bdia_models::gpt2::model::{Dims, Gpt2, Setup};
use bdia_models::plan::Plan;
use bdia_ranks::{Local, Ranks, Replica};

/// Samples of a micro-batch, of all ranks.
const BATCH: usize = 4;
const STEPS: u32 = 4;
const STEP: Step = Step { step: 0, seed: 11, lr: 1e-3, weight_decay: 0.1, clip: 0.0 };

fn setup(mode: Mode, gradients: Gradients) -> Setup {
    Setup {
        accumulate: if gradients.fused() { 1 } else { 2 },
        gradients,
        ..crate::common::setup(Dims { dropout: [0.1; 3], ..small() }, BATCH, 9, mode)
    }
}

const FUSED: Gradients = Gradients::Fused(ADAMW);
const FULL: Gradients = Gradients::Full(ADAMW);

/// Mode `bdia`, which counts the values that it rebuilds wrongly.
fn exact() -> Mode {
    verified(bdia(14, Sign::Random))
}

/// Sample `i` of the global batch: lengths differ, so ranks have different numbers of targets.
fn sample(i: usize, x: &mut [i32], y: &mut [i32]) {
    for (t, (x, y)) in x.iter_mut().zip(y).enumerate() {
        *x = ((i * 5 + t * 3) % 19) as i32;
        *y = if t > 3 + i % 5 { -1 } else { ((i * 5 + (t + 1) * 3) % 19) as i32 };
    }
}

type Be<'a> = Replica<'a, Cpu>;

/// Runs `work` on every rank, with a model of its own; what they return, in the order of ranks.
fn on<T: Send>(
    ranks: usize,
    setup: &Setup,
    work: impl Fn(&mut Be<'_>, &mut Gpt2) -> T + Sync,
) -> Vec<T> {
    let setup = Setup { batch: setup.batch / ranks, ..*setup };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (Local::group(ranks, Duration::from_secs(30)).into_iter())
            .map(|link| {
                scope.spawn(|| {
                    let (mut model, layout) =
                        Gpt2::layout::<Cpu>(&setup, Choice::new(1, 9)).unwrap();
                    let mut be = Cpu::new(&layout, 1).unwrap();
                    let mut ranks = Ranks::start(move || Ok(link)).unwrap();
                    ranks.reserve(&[model.exchanged()]);
                    let result = work(&mut Replica::new(&mut be, &mut ranks), &mut model);
                    ranks.close();
                    result
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn step(
    be: &mut Be<'_>,
    model: &mut Gpt2,
    step: &Step,
    wrong: Option<usize>,
) -> Result<Outcome, Error> {
    let (context, batch) = (model.setup().context, model.setup().batch);
    let (rank, ranks) = (be.rank(), be.ranks());
    model.train(be, step, |micro, x, y| {
        for (j, (x, y)) in x.chunks_mut(context).zip(y.chunks_mut(context)).enumerate() {
            let i = (micro * ranks + rank) * batch + j;
            sample(i, x, y);
            if wrong == Some(i) {
                x[2] = 1000;
            }
        }
        Ok(())
    })
}

fn parameters(be: &Be<'_>, model: &Gpt2) -> Vec<u32> {
    let mut all = Vec::new();
    for t in model.saved() {
        let mut bits = vec![0; t.len()];
        t.get(be, 0, &mut bits).unwrap();
        all.extend(bits);
    }
    all
}

fn train(ranks: usize, setup: &Setup, plan: &Step) -> (Vec<Outcome>, Vec<u32>) {
    let ends = on(ranks, setup, |be, model| {
        model.initialize(be, 3).unwrap();
        let outcomes: Vec<_> = (0..STEPS)
            .map(|i| step(be, model, &Step { step: i, ..*plan }, None).unwrap())
            .collect();
        (outcomes, parameters(be, model))
    });
    for end in &ends {
        assert_eq!(*end, ends[0], "replicas differ");
    }
    ends.into_iter().next().unwrap()
}

/// 1, 2 and 4 ranks: the same loss up to the rounding of the gradients' sum, in every mode, with
/// dropout and random signs; the first loss, before any gradient, up to that of a sum of numbers in
/// f64.
#[test]
fn losses_do_not_depend_on_the_number_of_ranks() {
    let clipped = Step { clip: 0.5, ..STEP };
    for (mode, gradients, plan, blocks_per_step) in [
        (exact(), FUSED, STEP, 1),
        (exact(), FULL, clipped, 1),
        (STANDARD, FUSED, STEP, 1),
        (checkpoint(2), FUSED, STEP, 1),
        (bdia_float(Sign::Random), FULL, clipped, 1),
        // The last step has one block.
        (exact(), FUSED, STEP, 2),
        (exact(), FULL, clipped, 2),
        (STANDARD, FUSED, STEP, 2),
    ] {
        let mut setup = Setup { blocks_per_step, ..setup(mode, gradients) };
        if blocks_per_step > 1 {
            setup.dims.layers = 5;
        }
        let (one, start) = train(1, &setup, &plan);
        for ranks in [2, 4] {
            let (several, end) = train(ranks, &setup, &plan);
            let first = (several[0].loss - one[0].loss).abs();
            assert!(
                first <= 1e-14 * one[0].loss,
                "{mode:?}, {ranks} ranks: the first loss differs by {first:e}"
            );
            for (a, b) in one.iter().zip(&several) {
                // A gradient's sum is rounded to 2^-24 of itself; four steps of AdamW make at most
                // a thousand times that.
                assert!(
                    (a.loss - b.loss).abs() <= 1e-5 * a.loss,
                    "{mode:?}, {ranks} ranks: {} {}",
                    a.loss,
                    b.loss
                );
                assert!(
                    (a.grad_norm - b.grad_norm).abs() <= 1e-4 * a.grad_norm,
                    "{mode:?}: {a:?} {b:?}"
                );
                assert_eq!((a.rebuilt.mismatches, b.rebuilt.mismatches), (0, 0));
            }
            assert_eq!(start.len(), end.len());
        }
    }
}

/// A token that does not exist, in one rank's part: all stop with that rank's fault, and nothing is
/// updated on any.
#[test]
fn a_fault_of_one_rank_stops_all_before_an_update() {
    for (ranks, wrong) in [(2, 3), (2, 0), (4, 2)] {
        for gradients in [FUSED, FULL] {
            let ends = on(ranks, &setup(exact(), gradients), |be, model| {
                model.initialize(be, 3).unwrap();
                step(be, model, &STEP, None).unwrap();
                let before = parameters(be, model);
                let end = step(be, model, &Step { step: 1, ..STEP }, Some(wrong));
                assert!(parameters(be, model) == before, "a parameter was updated");
                // And the next step is as ever.
                step(be, model, &Step { step: 1, ..STEP }, None).unwrap();
                end.map(|o| o.loss)
            });
            let part = BATCH / ranks;
            let fault = Fault::Token { sample: wrong % part, value: 1000, vocab: 19 };
            let expected = Err(Error::Rank { rank: wrong / part, why: Halt::Fault(fault) });
            assert!(ends.iter().all(|e| *e == expected), "{ends:?}");
        }
    }
}

/// A gradient that is too large on one rank is too large in the sum: all stop alike.
#[test]
fn a_gradient_that_is_too_large_stops_all() {
    let ends = on(2, &setup(STANDARD, FUSED), |be, model| {
        model.initialize(be, 3).unwrap();
        // Activations of 1e30 and weights of 1e-30: what is computed stays as it is, the weights'
        // gradient does not.
        if be.rank() == 1 {
            for (name, factor) in [("h.1.ln_2.weight", 1e30), ("h.1.mlp.c_fc.weight", 1e-30)] {
                let values = model.tensors().iter().find(|t| t.name == name).unwrap().values;
                let mut v = vec![0.0; values.len()];
                be.read_reals(values, &mut v).unwrap();
                v.iter_mut().for_each(|x| *x *= factor);
                be.write_reals(values, &v).unwrap();
            }
        }
        step(be, model, &STEP, None).map(|o| o.loss)
    });
    let fault = Err(Error::Fault(Fault::Gradient { site: Site::Block(1) }));
    assert!(ends.iter().all(|e| *e == fault), "{ends:?}");
}
