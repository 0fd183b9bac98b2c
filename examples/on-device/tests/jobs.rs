//! The jobs on the host: gradients of the ends, what is frozen, what does not fit, what goes wrong.
#![allow(clippy::unwrap_used)]

use bdia_core::arena::{Category, Reals};
use bdia_core::optim::Rule;
use bdia_core::stack::Mode;
use bdia_core::{Error, Fault};
use bdia_mcu::data::{Samples, Weights};
use bdia_mcu::jobs::{
    ADAM, ARENA, Arena, BUDGET, FULL, HEAD, JOBS, RAM, REFUSED, TEST, TUNE, VECTORS, arena,
};
use bdia_mcu::model::{Be, Job, Model};
use bdia_mcu::train::{Session, plan};

/// Values of one tensor, with its place in flash.
type Tensors = Vec<(usize, Vec<f32>)>;

fn tensors(session: &Session<'_>, be: &Be<'_>) -> Tensors {
    let mut all = Vec::new();
    let read = |_: &_, values: Reals, at| {
        all.push((at, be.reals(values)?.to_vec()));
        Ok(())
    };
    session.model().load(read).unwrap();
    all
}

fn set(session: &Session<'_>, be: &mut Be<'_>, tensors: &Tensors) {
    let mut all = tensors.iter();
    let write = |_: &_, values: Reals, _| {
        be.reals_mut(values)?.copy_from_slice(&all.next().unwrap().1);
        Ok(())
    };
    session.model().load(write).unwrap();
}

/// The loss of the first batch at `start` (or at the job's own weights), and parameters before and
/// after its step.
fn first_step<const N: usize>(
    job: &Job,
    memory: &mut Arena<N>,
    start: Option<&Tensors>,
) -> (f64, Tensors, Tensors) {
    let mut model = Model::plan(job).unwrap();
    let mut be = memory.backend(&model.layout).unwrap();
    let mut session = Session::new(job, &mut model, &mut be, TUNE).unwrap();
    if let Some(start) = start {
        set(&session, &mut be, start);
    }
    let before = tensors(&session, &be);
    let loss = session.step(&mut be).unwrap();
    (loss, before, tensors(&session, &be))
}

/// With stochastic gradient descent at the constant rate 1, a step is the gradient. Along the
/// gradient of each tensor the loss changes as that says: patch embedding, positions, blocks, norm
/// and head.
#[test]
fn gradients_against_finite_differences() {
    const STANDARD: Mode = Mode::Standard { grid: None };
    const PLAIN: Job = Job { mode: STANDARD, lr: 1.0, epochs: 0, weights: None, ..FULL };
    let mut memory = Box::new(Arena::<{ arena(&[PLAIN]) }>::new());
    let (_, start, after) = first_step(&PLAIN, &mut memory, None);
    for i in 0..start.len() {
        let gradient: Vec<f64> = start[i]
            .1
            .iter()
            .zip(&after[i].1)
            .map(|(&b, &a)| f64::from(b) - f64::from(a))
            .collect();
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        let mut loss_at = |distance: f64| {
            let mut moved = start.clone();
            for (p, g) in moved[i].1.iter_mut().zip(&gradient) {
                *p = (f64::from(*p) + distance * g / norm) as f32;
            }
            first_step(&PLAIN, &mut memory, Some(&moved)).0
        };
        let slope = (loss_at(0.02) - loss_at(-0.02)) / 0.04;
        // The losses carry f32 noise of about 1e-6, and the difference an error of third order in
        // 0.02.
        assert!((slope - norm).abs() < 2e-4 + 0.01 * norm, "tensor {i}: {slope} against {norm}");
    }
}

/// Training only the vectors moves them, bit for bit, as training everything does in the first
/// step: frozen matrices come from flash one block at a time, and are the same.
#[test]
fn frozen_matrices_change_nothing_else() {
    const SGD: Job = Job { rule: FULL.rule, lr: FULL.lr, epochs: FULL.epochs, ..VECTORS };
    let mut memory = Box::new(Arena::<ARENA>::new());
    let (loss, _, all) = first_step(&FULL, &mut memory, None);
    let (same, before, after) = first_step(&SGD, &mut memory, None);
    assert_eq!(loss.to_bits(), same.to_bits());
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let mut vectors = 0;
    for ((at, before), (_, after)) in before.iter().zip(&after) {
        if *at == 0 {
            assert_eq!(bits(before), bits(after), "the patch embedding is frozen");
            continue;
        }
        let (_, whole) = all.iter().find(|(place, _)| place == at).unwrap();
        assert_eq!(bits(whole), bits(after), "the tensor at {at}");
        assert_ne!(bits(before), bits(after), "the tensor at {at}");
        vectors += 1;
    }
    assert_eq!(vectors, 1 + 6 * 8 + 4);
}

/// One sample at a time: the same losses and the same parameters, bit for bit, since gradients add
/// up in the same order.
#[test]
fn micro_batches_add_up() {
    const MICRO: Job = Job { micro_batch: 1, ..FULL };
    let mut memory = Box::new(Arena::<{ arena(&[FULL, MICRO]) }>::new());
    let (loss, _, whole) = first_step(&FULL, &mut memory, None);
    let (same, _, parts) = first_step(&MICRO, &mut memory, None);
    assert_eq!(loss.to_bits(), same.to_bits());
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for ((at, whole), (_, parts)) in whole.iter().zip(&parts) {
        assert_eq!(bits(whole), bits(parts), "the tensor at {at}");
    }
    let error = Model::plan(&Job { micro_batch: 3, ..FULL }).unwrap_err();
    assert!(matches!(error, Error::Setting { what: "micro-batch", .. }));
}

#[test]
fn plans_that_do_not_fit_are_refused_with_their_size() {
    for job in &JOBS {
        let layout = plan(job, BUDGET).unwrap().layout;
        let (ints, reals, words) = layout.arenas();
        assert_eq!(layout.total(), 4 * (ints + reals + words));
        assert!(layout.total() <= 4 * ARENA && 4 * ARENA <= BUDGET);
    }
    for job in &REFUSED {
        let minimum = Model::plan(job).unwrap().layout.total();
        assert_eq!(plan(job, BUDGET).unwrap_err(), Error::Budget { budget: BUDGET, minimum });
        assert!(minimum > RAM, "{}: not even without a stack", job.name);
    }
    // Frozen blocks: one block's weights at a time.
    let bytes = |job: &Job, c| Model::plan(job).unwrap().layout.bytes(c);
    assert!(bytes(&VECTORS, Category::Parameters) < bytes(&FULL, Category::Parameters) / 3);
    assert!(bytes(&HEAD, Category::Parameters) < bytes(&FULL, Category::Parameters) / 5);
}

#[test]
fn what_goes_wrong_is_an_error() {
    let mut memory = Box::new(Arena::<ARENA>::new());
    let mut start = |job: &Job, tune| {
        let mut model = Model::plan(job).unwrap();
        let mut be = memory.backend(&model.layout).unwrap();
        let mut session = Session::new(job, &mut model, &mut be, tune)?;
        (0..40).try_for_each(|_| session.step(&mut be).map(|_| ()))
    };
    // Too high a learning rate.
    for job in [FULL, Job { rule: Rule::Sgd { momentum: 0.0 }, ..VECTORS }] {
        let error = start(&Job { lr: 1e30, ..job }, TUNE).unwrap_err();
        assert!(matches!(
            error,
            Error::Fault(
                Fault::Range { .. }
                    | Fault::Loss { .. }
                    | Fault::Gradient { .. }
                    | Fault::ActivationGradient { .. }
            )
        ));
    }
    // Samples that are nonsense: pixels and labels of 255.
    let nonsense = Samples(&[255; 65 * 16]);
    assert!(matches!(start(&FULL, nonsense), Err(Error::Fault(Fault::Token { value: 255, .. }))));
    assert!(matches!(start(&HEAD, Samples(&[0; 64])), Err(Error::Shape { found: 0, .. })));
    // Weights of another network, or cut off.
    for job in [Job { weights: ADAM.weights, ..FULL }, Job { weights: FULL.weights, ..ADAM }] {
        assert!(matches!(start(&job, TUNE), Err(Error::Shape { what: "pretrained weights", .. })));
    }
    assert!(matches!(
        start(&Job { weights: Some(Weights(&[0; 10])), ..VECTORS }, TUNE),
        Err(Error::Shape { .. })
    ));
}

/// Every job learns the new sensor.
#[test]
fn fine_tuning_helps() {
    let mut memory = Box::new(Arena::<ARENA>::new());
    for (job, gain) in JOBS.iter().zip([0.4, 0.4, 0.25, 0.15]) {
        let mut model = plan(job, BUDGET).unwrap();
        let mut be = memory.backend(&model.layout).unwrap();
        let mut session = Session::new(job, &mut model, &mut be, TUNE).unwrap();
        let before = session.evaluate(&mut be, TEST).unwrap();
        for _ in 0..session.steps() * job.epochs {
            session.step(&mut be).unwrap();
        }
        let after = session.evaluate(&mut be, TEST).unwrap();
        let gained = (after.right as f64 - before.right as f64) / after.samples as f64;
        assert!(gained > gain, "{}: {before} before, {after} after", job.name);
    }
}
