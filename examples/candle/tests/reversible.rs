//! Against candle's own autograd over the same function, and what goes wrong.
#![allow(clippy::unwrap_used)]

use bdia_candle::model::{Block, Config, Ends, TOKENS, initialize, norm};
use bdia_candle::run::{Run, train};
use bdia_candle::{Dropout, Error, Options, Policy, Reversible, Sign, WithSkip};
use bdia_core::Fault;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, ModuleT, Tensor, Var};
use candle_nn::{VarBuilder, VarMap, loss::cross_entropy};

const MODEL: Config = Config { blocks: 5, width: 16, heads: 2, hidden: 24, dropout: 0.0 };

fn model(c: &Config) -> (VarMap, Ends, Vec<Block>) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let ends = Ends::new(c, vb.clone()).unwrap();
    let blocks = (0..c.blocks).map(|k| Block::new(c, vb.pp(format!("h.{k}"))).unwrap()).collect();
    initialize(&vars, 3).unwrap();
    (vars, ends, blocks)
}

fn images(n: usize) -> (Tensor, Tensor) {
    let pixels: Vec<f32> = (0..n * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    let classes: Vec<u32> = (0..n as u32).map(|i| i * 7 % 10).collect();
    (
        Tensor::from_vec(pixels, (n, 64), &Device::Cpu).unwrap(),
        Tensor::from_vec(classes, n, &Device::Cpu).unwrap(),
    )
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

type Named = Vec<(String, Vec<f32>)>;

/// The gradient of every parameter; a missing one fails the test.
fn named(vars: &VarMap, grads: &GradStore) -> Named {
    let data = vars.data().lock().unwrap();
    let mut all: Vec<_> =
        data.iter().map(|(name, v)| (name.clone(), values(grads.get(v).expect(name)))).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// Asserts that all gradients agree up to a part of the largest value of each tensor.
fn assert_close(a: &Named, b: &Named, tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for ((name, a), (_, b)) in a.iter().zip(b) {
        let size = b.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        assert!(size > 0.0, "{name}");
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() <= tolerance * size, "{name}: {a} {b}, largest {size}");
        }
    }
}

/// Loss, differing values and gradients of the example's model, by the reversible stack.
fn reversible(c: &Config, options: Options, n: usize) -> (f32, u64, Named) {
    let (vars, ends, blocks) = model(c);
    let mut stack = Reversible::new(blocks, options).unwrap();
    let (x, y) = images(n);
    let (out, tape) = stack.forward(&ends.embed(&x).unwrap()).unwrap();
    let loss = cross_entropy(&ends.logits(&out).unwrap(), &y).unwrap();
    let grads = tape.backward(&loss).unwrap();
    (loss.to_scalar().unwrap(), stack.mismatches(), named(&vars, &grads))
}

/// `f(x·2^l)·2^-l` with the gradient of the identity.
fn straight_through(x: &Tensor, frac_bits: u32, f: impl Fn(usize, f64) -> f64) -> Tensor {
    let scale = f64::from(1_u32 << frac_bits);
    let f = |(i, v): (usize, &f32)| (f(i, f64::from(*v) * scale) / scale) as f32;
    let y: Vec<f32> = values(x).iter().enumerate().map(f).collect();
    let y = Tensor::from_vec(y, x.shape(), x.device()).unwrap();
    (x + (y - x.detach()).unwrap()).unwrap()
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

/// The same by candle alone: the formula of the update, written out over its graph.
fn by_candle(c: &Config, options: &Options, n: usize) -> (f32, Named) {
    let (vars, ends, blocks) = model(c);
    let (images, classes) = images(n);
    let gamma = options.gamma.at(options.step);
    let grid = |x: &Tensor| straight_through(x, options.frac_bits, |_, x| x.round_ties_even());
    let mut old = grid(&ends.embed(&images).unwrap());
    let mut cur = (&old + grid(&blocks[0].forward_t(&old, true).unwrap())).unwrap();
    for (k, block) in blocks.iter().enumerate().skip(1) {
        let sign = |i: usize| gamma.sigma(options.seed, options.step, i as u32, 0, k as u16) as f32;
        let signs = Tensor::from_vec((0..n).map(sign).collect::<Vec<_>>(), (n, 1, 1), &Device::Cpu)
            .unwrap();
        let signed = (signs * gamma.float().magnitude()).unwrap();
        let (minus, plus) = ((1.0 - &signed).unwrap(), (1.0 + &signed).unwrap());
        let h = block.forward_t(&cur, true).unwrap();
        let new = (cur.broadcast_mul(&minus).unwrap() + h.broadcast_mul(&plus).unwrap()).unwrap();
        let shifted =
            straight_through(&old, options.frac_bits, |i, x| multiple(gamma.planes(), i, x));
        let next = (shifted.broadcast_mul(&signed).unwrap() + grid(&new)).unwrap();
        (old, cur) = (cur, next);
    }
    let loss = cross_entropy(&ends.logits(&cur).unwrap(), &classes).unwrap();
    let grads = loss.backward().unwrap();
    (loss.to_scalar().unwrap(), named(&vars, &grads))
}

/// Loss and every gradient are those of candle's autograd through the same quantized, signed
/// update.
#[test]
fn gradients_are_those_of_candle() {
    for options in [
        Options { verify: true, chunk: 2, seed: 11, ..Options::default() },
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
        let (ours, mismatches, gradients) = reversible(&MODEL, options, 5);
        assert_eq!(mismatches, 0);
        let (theirs, reference) = by_candle(&MODEL, &options, 5);
        assert!((ours - theirs).abs() < 1e-5, "{ours} {theirs}");
        // f32 sums in another order, and a value now and then on the neighbouring point of the
        // grid; a wrong sign or factor would be of the size 1.
        assert_close(&gradients, &reference, if options.frac_bits == 14 { 5e-4 } else { 5e-3 });
    }
}

/// Chunks change gradients by the rounding of their sums only, dropout masks not at all.
#[test]
fn chunks_change_rounding_only() {
    let options = Options { seed: 2, verify: true, ..Options::default() };
    let dropping = Config { dropout: 0.3, ..MODEL };
    let (loss, _, first) = reversible(&dropping, Options { chunk: 1, ..options }, 6);
    for chunk in [2, 4, 6] {
        let (l, mismatches, other) = reversible(&dropping, Options { chunk, ..options }, 6);
        assert_eq!(mismatches, 0);
        // Products of other shapes may take other paths in candle, so even the loss may differ by
        // rounding.
        assert!((l - loss).abs() < 1e-4, "{l} {loss}");
        assert_close(&other, &first, 5e-3);
    }
}

/// The same pass twice gives the same bits, dropout included; another step has other signs and
/// masks.
#[test]
fn a_pass_repeats_itself() {
    let options = Options { seed: 7, verify: true, ..Options::default() };
    let dropping = Config { dropout: 0.2, ..MODEL };
    let (a, b) = (reversible(&dropping, options, 4), reversible(&dropping, options, 4));
    assert!(a == b && a.1 == 0);
    let c = reversible(&dropping, Options { step: 1, ..options }, 4);
    assert!(c.1 == 0 && c.0.to_bits() != a.0.to_bits());
}

/// The gradient that reaches one stack's input goes on to the stack below and to candle's graph.
/// One block is `x + Q(h)` whatever γ, so two stacks of one block are the plain network.
#[test]
fn stacks_can_follow_each_other() {
    let (vars, ends, blocks) = model(&Config { blocks: 2, ..MODEL });
    let (x, y) = images(4);
    let mut low =
        Reversible::new(blocks[..1].to_vec(), Options { frac_bits: 20, ..Options::default() })
            .unwrap();
    let mut high =
        Reversible::new(blocks[1..].to_vec(), Options { frac_bits: 20, ..Options::default() })
            .unwrap();
    let (middle, below) = low.forward(&ends.embed(&x).unwrap()).unwrap();
    let (out, above) = high.forward(&middle).unwrap();
    let mut grads = cross_entropy(&ends.logits(&out).unwrap(), &y).unwrap().backward().unwrap();
    above.backward_into(&mut grads).unwrap();
    below.backward_into(&mut grads).unwrap();

    let whole = Reversible::new(blocks, Options::default()).unwrap();
    let out = whole.standard(&ends.embed(&x).unwrap(), true).unwrap();
    let plain = cross_entropy(&ends.logits(&out).unwrap(), &y).unwrap().backward().unwrap();
    assert_close(&named(&vars, &grads), &named(&vars, &plain), 5e-4);
}

/// A module that adds its input itself is wrapped.
#[test]
fn a_block_with_its_skip() {
    #[derive(Clone)]
    struct Whole(Block);
    impl ModuleT for Whole {
        fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
            x + self.0.forward_t(x, train)?
        }
    }
    let (vars, ends, blocks) = model(&MODEL);
    let (x, y) = images(3);
    let options = Options { verify: true, ..Options::default() };
    let mut stack =
        Reversible::new(blocks.into_iter().map(|b| WithSkip(Whole(b))).collect(), options).unwrap();
    let (out, tape) = stack.forward(&ends.embed(&x).unwrap()).unwrap();
    let grads = tape.backward(&cross_entropy(&ends.logits(&out).unwrap(), &y).unwrap()).unwrap();
    assert_eq!(stack.mismatches(), 0);
    // (x + h) − x rounds h, which puts some values on the neighbouring point of the grid.
    assert_close(&named(&vars, &grads), &reversible(&MODEL, options, 3).2, 5e-3);
}

fn rows(n: usize) -> Tensor {
    Tensor::from_vec(
        (0..n * 8).map(|i| (i as f32 * 0.3).cos()).collect::<Vec<_>>(),
        (n, 8),
        &Device::Cpu,
    )
    .unwrap()
}

type Closure = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor>>;

fn stack_of(
    f: impl Fn(&Tensor) -> candle_core::Result<Tensor> + Clone + 'static,
    n: usize,
) -> Reversible<Closure> {
    Reversible::new((0..n).map(|_| Box::new(f.clone()) as Closure).collect(), Options::default())
        .unwrap()
}

fn backward(stack: &mut Reversible<Closure>, x: &Tensor) -> Result<GradStore, Error> {
    let (y, tape) = stack.forward(x)?;
    tape.backward(&y.sqr()?.mean_all()?)
}

/// candle's own dropout cannot be replayed: the checksum says so, and no gradient comes out. Ours
/// can.
#[test]
fn a_block_that_does_not_repeat_itself_is_an_error() {
    let mut stack = stack_of(|x| candle_nn::ops::dropout(x, 0.5)? * 0.1, 4);
    let error = backward(&mut stack, &rows(4)).unwrap_err();
    assert!(matches!(error, Error::Fault(Fault::Checksum { activation: 2, block: 3 })), "{error}");
    let mut stack = stack_of(|x| Dropout::new(0.5).forward(x, true)? * 0.1, 4);
    backward(&mut stack, &rows(4)).unwrap();
}

/// Values, types, shapes and graphs that do not fit are errors that name them; the next pass is as
/// if they had not been.
#[test]
fn mistakes_are_named() {
    let w = Var::from_tensor(&rows(8)).unwrap();
    let linear = |w: Var| move |x: &Tensor| x.matmul(&w)? * 0.05;
    let gradient = |stack: &mut Reversible<Closure>| {
        values(backward(stack, &rows(4)).unwrap().get(&w).unwrap())
    };
    let mut used = stack_of(linear(w.clone()), 3);
    let first = gradient(&mut used);

    let wide = Tensor::zeros((4, 8), DType::F64, &Device::Cpu).unwrap();
    assert!(matches!(used.forward(&wide), Err(Error::Input { dtype: DType::F64, .. })));
    assert!(matches!(used.forward(&rows(4).flatten_all().unwrap()), Err(Error::Input { .. })));
    let far = (rows(4) * 1e6).unwrap();
    assert!(matches!(used.forward(&far), Err(Error::Fault(Fault::Range { .. }))));
    let (_, tape) = used.forward(&rows(4)).unwrap();
    assert!(matches!(tape.backward(&rows(2).mean_all().unwrap()), Err(Error::Unused)));
    drop(used.forward(&rows(3)).unwrap()); // abandoned, and another shape

    let blocks = (0..3).map(|_| Box::new(linear(w.clone())) as Closure).collect();
    let mut fresh =
        Reversible::new(blocks, Options { step: used.step(), ..Options::default() }).unwrap();
    let again = gradient(&mut used);
    assert_eq!(again, gradient(&mut fresh));
    assert_ne!(again, first, "another step has other signs");

    let mut nan = stack_of(|x| x * f64::NAN, 3);
    assert!(matches!(nan.forward(&rows(2)), Err(Error::Fault(Fault::Range { .. }))));
    let mut narrow = stack_of(|x| x.narrow(1, 0, 4), 2);
    assert!(matches!(narrow.forward(&rows(2)), Err(Error::Residual { block: 0, .. })));
    let mut broken = stack_of(|x| x.matmul(&rows(3)), 2);
    assert!(matches!(broken.forward(&rows(2)), Err(Error::Candle(_))));
    let mut cut = stack_of(|x| candle_nn::ops::softmax_last_dim(&(x * 0.1)?), 2);
    assert!(matches!(backward(&mut cut, &rows(2)), Err(Error::Cut { block: 1 })));
    assert!(matches!(
        Reversible::<Closure>::new(Vec::new(), Options::default()),
        Err(Error::Setting(_))
    ));
    let fine = Options { frac_bits: 31, ..Options::default() };
    assert!(matches!(Reversible::new(vec![|x: &Tensor| x * 0.1], fine), Err(Error::Setting(_))));
}

/// On the digits, with dropout, every rebuilt value verified.
#[test]
fn digits_are_learned() {
    let options = Options { verify: true, seed: 1, ..Options::default() };
    let model = Config { blocks: 6, width: 32, heads: 4, hidden: 64, dropout: 0.05 };
    let run = Run {
        model,
        batch: 64,
        steps: 300,
        lr: 3e-3,
        reversible: Some(options),
        seed: 1,
        validate: false,
    };
    let outcome = train(&run, |_, _| ()).unwrap();
    assert_eq!(outcome.rebuilt, 300 * 5 * 64 * (TOKENS * 32) as u64);
    assert_eq!(outcome.mismatches, 0);
    assert!(outcome.accuracy > 0.85, "{outcome:?}"); // 89.1 % where it was measured
}

/// The example's norm has a gradient; candle's fused one has none, and cuts the graph without a
/// word.
#[test]
fn the_norm_has_a_gradient() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let x = Var::from_tensor(&rows(2)).unwrap();
    let ours = norm(8, vb.pp("a")).unwrap().forward(&x).unwrap();
    let theirs = candle_nn::layer_norm(8, 1e-5, vb.pp("a")).unwrap().forward(&x).unwrap();
    assert!(values(&ours).iter().zip(values(&theirs)).all(|(a, b)| (a - b).abs() < 1e-5));
    let gradient = |y: Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap().remove(&x);
    assert!(gradient(ours).is_some());
    assert!(
        gradient(theirs).is_none(),
        "the fused norm has a gradient now: drop the notes about it"
    );
}
