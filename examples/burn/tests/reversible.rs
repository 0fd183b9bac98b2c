//! Against burn's own autodiff over the same function, bits that repeat, and what goes wrong.
#![allow(clippy::unwrap_used)]

use core::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bdia_burn::model::Model;
use bdia_burn::{Error, Options, Policy, Residual, Reversible, Sign};
use bdia_core::Fault;
use burn::backend::{Autodiff, NdArray};
use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

type B = Autodiff<NdArray>;

const BLOCKS: usize = 5;

/// burn's backend has one generator for the whole process, so tests that draw from it, also for
/// parameters, take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn model(dropout: f64) -> Model<B> {
    let device = Default::default();
    B::seed(&device, 3);
    Model::new(BLOCKS, 16, dropout, &device)
}

/// Images `[n, 6, 4]` and targets `[n, 10]`.
fn data(n: usize) -> (Tensor<B, 3>, Tensor<B, 2>) {
    let wave = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin()).collect::<Vec<_>>();
    let device = Default::default();
    (
        Tensor::from_data(TensorData::new(wave(n * 24, 0.37), [n, 6, 4]), &device),
        Tensor::from_data(TensorData::new(wave(n * 10, 0.71), [n, 10]), &device),
    )
}

fn values<C: Backend, const D: usize>(t: Tensor<C, D>) -> Vec<f32> {
    t.into_data().to_vec().unwrap()
}

/// Gradients by parameter, in the model's order; a missing one fails the test.
fn listed<M: AutodiffModule<B>>(grads: GradientsParams, model: &M) -> Vec<Vec<f32>> {
    struct List(GradientsParams, Vec<Vec<f32>>);
    impl ModuleVisitor<B> for List {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.1.push(values(self.0.remove::<NdArray, D>(param.id).expect("a gradient")));
        }
    }
    let mut list = List(grads, Vec::new());
    model.visit(&mut list);
    assert!(list.0.is_empty());
    list.1
}

type Outcome = (Vec<f32>, f32, u64, Vec<Vec<f32>>);

/// `x_K`, loss, differing values and gradients of the reversible stack.
fn reversible(model: &Model<B>, options: Options, n: usize) -> Outcome {
    let mut stack = Reversible::new(options);
    let (x, target) = data(n);
    let (y, tape) = stack.forward(&model.blocks, model.embed.forward(x)).unwrap();
    let out = values(y.clone());
    let loss = model.loss(y, target);
    let number = loss.clone().into_scalar();
    let grads = tape.backward(loss, model).unwrap();
    (out, number, stack.mismatches(), listed(grads, model))
}

/// `f(x·2^l)·2^-l` with the gradient of the identity.
fn straight_through(
    x: Tensor<B, 3>,
    frac_bits: u32,
    f: impl Fn(usize, f64) -> f64,
) -> Tensor<B, 3> {
    let scale = f64::from(1_u32 << frac_bits);
    let f = |(i, v): (usize, &f32)| (f(i, f64::from(*v) * scale) / scale) as f32;
    let y: Vec<f32> = values(x.clone()).iter().enumerate().map(f).collect();
    let y = Tensor::from_data(TensorData::new(y, x.dims()), &x.device());
    x.clone() + (y - x.detach())
}

/// `X + s` of the update, a multiple of `2^m`: for `m = 1` the next one, otherwise the nearest.
/// Ties go down at even places in a sample, which has an even number of values here.
fn multiple(m: u32, place: usize, x: f64) -> f64 {
    let unit = f64::from(1_u32 << m);
    let tie = (x / unit).fract().abs() == 0.5;
    unit * match (m, tie, place % 2) {
        (1, ..) | (_, true, 1) => (x / unit).ceil(),
        (_, true, _) => (x / unit).floor(),
        (_, false, _) => (x / unit).round(),
    }
}

/// Two bits up to step 7, three from step 8 on; one sign per sample.
fn scheduled() -> Policy {
    Policy::scheduled(&[(0, 2), (8, 3)], Sign::Shared).unwrap()
}

/// The same by burn alone: the formula of the update, unrolled into one graph over all blocks.
fn by_burn(model: &Model<B>, options: &Options, n: usize) -> (Vec<f32>, f32, Vec<Vec<f32>>) {
    let (x, target) = data(n);
    let gamma = options.gamma.at(options.step);
    let grid = |x| straight_through(x, options.frac_bits, |_, x| x.round_ties_even());
    let mut old = grid(model.embed.forward(x));
    let mut cur = old.clone() + grid(model.blocks[0].residual(old.clone()));
    for (k, block) in model.blocks.iter().enumerate().skip(1) {
        let sign = |i: usize| gamma.sigma(options.seed, options.step, i as u32, 0, k as u16) as f32;
        let signs = TensorData::new((0..n).map(sign).collect::<Vec<_>>(), [n, 1, 1]);
        let signed = Tensor::<B, 3>::from_data(signs, &cur.device()) * gamma.float().magnitude();
        let new = cur.clone() * (1.0 - signed.clone())
            + block.residual(cur.clone()) * (1.0 + signed.clone());
        let shifted =
            straight_through(old, options.frac_bits, |i, x| multiple(gamma.planes(), i, x));
        (old, cur) = (cur, shifted * signed + grid(new));
    }
    let loss = model.loss(cur.clone(), target);
    let grads = GradientsParams::from_grads(loss.backward(), model);
    (values(cur), loss.into_scalar(), listed(grads, model))
}

/// Asserts that all gradients agree up to a part of the largest value of each tensor.
fn assert_close(a: &[Vec<f32>], b: &[Vec<f32>], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let size = b.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(b) {
            assert!(
                (a - b).abs() <= tolerance * size + 1e-7,
                "parameter {i}: {a} {b}, largest {size}"
            );
        }
    }
}

/// Loss and every gradient are those of burn's autodiff through the whole quantized, signed
/// recurrence.
#[test]
fn gradients_are_those_of_burn() {
    let _alone = alone();
    let model = model(0.0);
    for options in [
        Options { verify: true, chunk: 5, seed: 11, ..Options::default() },
        Options { verify: true, chunk: 2, seed: 4, ..Options::default() },
        Options { verify: true, chunk: 3, seed: 4, step: 8, frac_bits: 9, ..Options::default() },
        Options {
            verify: true,
            chunk: 3,
            seed: 4,
            step: 7,
            gamma: scheduled(),
            ..Options::default()
        },
        Options {
            verify: true,
            chunk: 3,
            seed: 4,
            step: 8,
            gamma: scheduled(),
            ..Options::default()
        },
    ] {
        let (_, ours, mismatches, gradients) = reversible(&model, options, 5);
        assert_eq!(mismatches, 0);
        let (_, theirs, reference) = by_burn(&model, &options, 5);
        assert!((ours - theirs).abs() < 1e-5, "{ours} {theirs}");
        // f32 sums in another order, and a value now and then on the neighbouring point of the
        // grid; a wrong sign or factor would be of the size 1.
        assert_close(&gradients, &reference, if options.frac_bits == 14 { 5e-4 } else { 5e-3 });
    }
}

/// Where a chunk is the whole batch, burn computes the same products in both, and every bit of
/// `x_K` is the same.
#[test]
fn the_output_has_the_bits_of_the_recurrence() {
    let _alone = alone();
    let (model, options) = (model(0.0), Options { chunk: 4, seed: 6, ..Options::default() });
    let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(reversible(&model, options, 4).0), bits(by_burn(&model, &options, 4).0));
}

/// Every rebuilt value has the original's bits, with burn's dropout in attention and blocks, in
/// chunks that do and do not divide the batch, and from the first pass on, in which burn draws the
/// parameters; the same pass gives the same bits again, and another step other signs and masks.
#[test]
fn bits_are_rebuilt_and_a_pass_repeats_itself() {
    let _alone = alone();
    let model = model(0.3);
    for chunk in [1, 3, 4, 16] {
        let options = Options { verify: true, seed: 7, chunk, ..Options::default() };
        let first = reversible(&model, options, 6);
        assert_eq!(first.2, 0);
        assert_eq!(first, reversible(&model, options, 6));
        let other = reversible(&model, Options { step: 1, ..options }, 6);
        assert!(other.2 == 0 && other.1.to_bits() != first.1.to_bits());
    }
}

/// What a [`Small`] block does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Right,
    /// Its residual depends on how often it was called.
    Counting,
    Infinite,
    Narrow,
    Detached,
}

#[derive(Module, Debug)]
struct Small<B: Backend> {
    linear: Linear<B>,
    #[module(skip)]
    kind: Kind,
}

impl<B: Backend> Residual<B, 2> for Small<B> {
    fn residual(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        thread_local!(static CALLS: Cell<f32> = const { Cell::new(1.0) });
        let [samples, width] = x.dims();
        match self.kind {
            Kind::Right => self.linear.forward(x),
            Kind::Counting => self.linear.forward(x) * CALLS.replace(CALLS.get() + 1.0),
            Kind::Infinite => self.linear.forward(x) / 0.0,
            Kind::Narrow => self.linear.forward(x).slice([0..samples, 0..width / 2]),
            Kind::Detached => self.linear.forward(x.detach()),
        }
    }
}

fn small(kind: Kind) -> Vec<Small<B>> {
    let device = Default::default();
    B::seed(&device, 5);
    (0..4).map(|_| Small { linear: LinearConfig::new(6, 6).init(&device), kind }).collect()
}

fn rows(n: usize) -> Tensor<B, 2> {
    let wave = (0..n * 6).map(|i| (i as f32 * 0.3).cos()).collect::<Vec<_>>();
    Tensor::from_data(TensorData::new(wave, [n, 6]), &Default::default())
}

fn backward(
    stack: &mut Reversible,
    blocks: &Vec<Small<B>>,
    x: Tensor<B, 2>,
) -> Result<GradientsParams, Error> {
    let (y, tape) = stack.forward(blocks, x)?;
    tape.backward(y.powi_scalar(2).mean(), blocks)
}

/// Blocks, values and shapes that do not fit are errors that name them; the next pass is as if they
/// had not been.
#[test]
fn mistakes_are_named() {
    let _alone = alone();
    let fails = |kind| {
        backward(&mut Reversible::new(Options::default()), &small(kind), rows(4)).unwrap_err()
    };
    let e = fails(Kind::Counting);
    assert!(matches!(e, Error::Fault(Fault::Checksum { activation: 2, block: 3 })), "{e}");
    assert!(matches!(fails(Kind::Infinite), Error::Fault(Fault::Range { .. })));
    assert!(matches!(fails(Kind::Narrow), Error::Residual { block: 0 }));
    assert!(matches!(fails(Kind::Detached), Error::Cut { block: 3 }));

    let blocks = small(Kind::Right);
    let mut used = Reversible::new(Options::default());
    let first = listed(backward(&mut used, &blocks, rows(4)).unwrap(), &blocks);
    assert!(matches!(used.forward(&blocks, rows(4) * 1e6), Err(Error::Fault(Fault::Range { .. }))));
    let (_, tape) = used.forward(&blocks, rows(4)).unwrap();
    assert!(matches!(tape.backward(rows(2).mean(), &blocks), Err(Error::Unused)));
    drop(used.forward(&blocks, rows(3)).unwrap()); // abandoned, and another shape

    let mut fresh = Reversible::new(Options { step: used.step(), ..Options::default() });
    let again = listed(backward(&mut used, &blocks, rows(4)).unwrap(), &blocks);
    assert_eq!(again, listed(backward(&mut fresh, &blocks, rows(4)).unwrap(), &blocks));
    assert_ne!(again, first, "another step has other signs");

    assert!(matches!(fresh.forward::<B, Small<B>, 2>(&[], rows(4)), Err(Error::Setting(_))));
    let fine = Options { frac_bits: 31, ..Options::default() };
    assert!(matches!(Reversible::new(fine).forward(&blocks, rows(4)), Err(Error::Setting(_))));
}
