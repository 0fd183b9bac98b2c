//! The promises of the stack, shown with blocks that know nothing of this crate's layers: they
//! implement [`Blocks`] over the first two trait layers, keep their own parameters, intermediates
//! and optimizer.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use bdia_core::arena::{Ints, Layout, Reals, Words};
use bdia_core::backend::{Backend, Chunk};
use bdia_core::rng::{Draw, philox};
use bdia_core::stack::{
    Blocks, Call, Config, Context, Head, Input, Mode, Needs, Pass, Reversible, Segmented, Stack,
    Tail, Workspace,
};
use bdia_core::{
    Category, Error, Fault, FloatGamma, Gamma, Grid, Policy, Real, Reference, Result, Sign, Site,
    Storage, UpdateOps, Wrapper,
};

/// Residual MLP blocks `h(x) = W2·tanh(W1·x + b)`, applied to every row of `width` values: a
/// foreign framework.
struct Mlp {
    width: usize,
    hidden: usize,
    /// `[blocks][W1, b, W2]`.
    params: Vec<Vec<f64>>,
    grads: Vec<Vec<f64>>,
    /// What the framework's autograd would keep, by frame: block, input, tanh.
    graph: HashMap<usize, (usize, Vec<f64>, Vec<f64>)>,
    lr: f64,
    done: Vec<usize>,
    /// Calls of `residual` so far, and the one that goes wrong and how.
    calls: usize,
    sabotage: Option<(usize, f64)>,
    /// What a block does that it should not: which one, to which sample.
    misdeed: Option<(usize, usize, Misdeed)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Misdeed {
    /// Adds this to the gradient of its input.
    Gradient(f64),
    /// Writes into its input.
    Input,
}

impl Mlp {
    fn new(blocks: usize, width: usize, hidden: usize) -> Self {
        let len = 2 * width * hidden + hidden;
        let params = (0..blocks)
            .map(|k| {
                (0..len)
                    .map(|i| noise(77, k as u32, i as u32) * 0.8 / (width as f64).sqrt())
                    .collect()
            })
            .collect::<Vec<_>>();
        let grads = params.iter().map(|p: &Vec<f64>| vec![0.0; p.len()]).collect();
        Self {
            width,
            hidden,
            params,
            grads,
            graph: HashMap::new(),
            lr: 0.0,
            done: Vec::new(),
            calls: 0,
            sabotage: None,
            misdeed: None,
        }
    }

    /// The misdeed of a call, and the index of the first value of its sample.
    fn misdeed(&self, call: &Call) -> Option<(Misdeed, usize)> {
        let (block, sample, misdeed) = self.misdeed?;
        let at = sample.checked_sub(call.chunk.first).filter(|&at| at < call.chunk.samples)?;
        (block == call.block).then(|| (misdeed, at * call.x.len() / call.chunk.samples))
    }
}

/// A number in -1 … 1.
fn noise(key: u64, a: u32, b: u32) -> f64 {
    f64::from(philox(key, [a, b, 0, 0])[0] as i32) / f64::from(1_u32 << 31)
}

fn fetch<B: Storage>(be: &B, r: Reals) -> Result<Vec<f64>> {
    let mut v = vec![B::Real::of(0.0); r.len()];
    be.read_reals(r, &mut v)?;
    Ok(v.iter().map(|x| x.wide()).collect())
}

fn store<B: Storage>(be: &mut B, r: Reals, v: &[f64]) -> Result<()> {
    be.write_reals(r, &v.iter().map(|&x| B::Real::of(x)).collect::<Vec<_>>())
}

impl<B: Storage> Blocks<B> for Mlp {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        let (d, n, p) = (self.width, self.hidden, &self.params[call.block]);
        let x = fetch(be, call.x)?;
        let (mut t, mut y) = (Vec::new(), vec![0.0; x.len()]);
        for (row, out) in x.chunks(d).zip(y.chunks_mut(d)) {
            for j in 0..n {
                let a = (0..d).map(|i| row[i] * p[i * n + j]).sum::<f64>() + p[d * n + j];
                let a = libm::tanh(a);
                t.push(a);
                for i in 0..d {
                    out[i] += a * p[d * n + n + j * d + i];
                }
            }
        }
        self.calls += 1;
        if let Some((_, value)) = self.sabotage.filter(|s| s.0 == self.calls) {
            y[d / 2] = value;
        }
        if let Some((Misdeed::Input, at)) = self.misdeed(call) {
            store(be, call.x.sub(at, 1), &[x[at] + 0.01])?;
        }
        if call.keep {
            self.graph.insert(call.chunk.frame, (call.block, x, t));
        }
        store(be, h, &y)
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        let (d, n, p) = (self.width, self.hidden, &self.params[call.block]);
        let (block, x, t) = &self.graph[&call.chunk.frame];
        assert_eq!(*block, call.block, "the frame holds another block's intermediates");
        let (gh, mut gx_host) = (fetch(be, gh)?, fetch(be, gx)?);
        let g = &mut self.grads[call.block];
        for r in 0..x.len() / d {
            for j in 0..n {
                let a = t[r * n + j];
                let mut da = 0.0;
                for i in 0..d {
                    g[d * n + n + j * d + i] += a * gh[r * d + i];
                    da += p[d * n + n + j * d + i] * gh[r * d + i];
                }
                let ds = da * (1.0 - a * a);
                g[d * n + j] += ds;
                for i in 0..d {
                    g[i * n + j] += x[r * d + i] * ds;
                    gx_host[r * d + i] += p[i * n + j] * ds;
                }
            }
        }
        if let Some((Misdeed::Gradient(value), at)) = self.misdeed(call) {
            gx_host[at] += value;
        }
        store(be, gx, &gx_host)
    }

    fn done(&mut self, be: &mut B, block: usize) -> Result<()> {
        self.done.push(block);
        if self.lr != 0.0 && be.peek_fault()?.is_none() {
            for (p, g) in self.params[block].iter_mut().zip(&mut self.grads[block]) {
                *p -= self.lr * *g;
                *g = 0.0;
            }
        }
        Ok(())
    }
}

/// Given inputs, and the loss `½·Σ(x_K − target)²` with targets near the inputs.
struct Ends {
    inputs: Vec<f64>,
    targets: Vec<f64>,
    per: usize,
    loss: f64,
    input_gradient: Vec<f64>,
}

impl Ends {
    fn new(batch: usize, per: usize, scale: f64) -> Self {
        let of =
            |key| (0..batch * per).map(|i| noise(key, 0, i as u32) * scale).collect::<Vec<f64>>();
        Self {
            inputs: of(1),
            targets: of(2),
            per,
            loss: 0.0,
            input_gradient: vec![0.0; batch * per],
        }
    }

    fn range(&self, c: &Chunk) -> core::ops::Range<usize> {
        c.first * self.per..(c.first + c.samples) * self.per
    }
}

impl<B: Storage> Input<B> for Ends {
    fn forward(&mut self, be: &mut B, c: &Chunk, _: bool, x: Reals, _: Reals) -> Result<()> {
        store(be, x, &self.inputs[self.range(c)])
    }

    fn vjp(&mut self, be: &mut B, c: &Chunk, gx: Reals, _: Reals) -> Result<()> {
        let range = self.range(c);
        self.input_gradient[range].copy_from_slice(&fetch(be, gx)?);
        Ok(())
    }
}

impl<B: Storage> Head<B> for Ends {
    fn forward_backward(
        &mut self,
        be: &mut B,
        c: &Chunk,
        x: Reals,
        gx: Reals,
        _: Reals,
    ) -> Result<()> {
        let g: Vec<f64> =
            fetch(be, x)?.iter().zip(&self.targets[self.range(c)]).map(|(x, t)| x - t).collect();
        self.loss += g.iter().map(|d| 0.5 * d * d).sum::<f64>();
        store(be, gx, &g)
    }
}

/// Input and head of one value cannot be borrowed twice: the head borrows nothing of the input.
struct HeadOf<'a>(&'a mut Ends);

impl<B: Storage> Head<B> for HeadOf<'_> {
    fn forward_backward(
        &mut self,
        be: &mut B,
        c: &Chunk,
        x: Reals,
        gx: Reals,
        s: Reals,
    ) -> Result<()> {
        self.0.forward_backward(be, c, x, gx, s)
    }
}

fn config(batch: usize, per_sample: usize, blocks: usize, chunk: usize) -> Config {
    Config {
        id: 0,
        batch,
        per_sample,
        blocks,
        chunk,
        tail: Tail::Head,
        needs: Needs::default(),
        ends_scratch: 0,
    }
}

/// Mode `bdia` with the originals kept.
fn bdia(frac_bits: u32, gamma: Gamma) -> Mode {
    let grid = Grid::new(frac_bits).unwrap();
    Mode::Bdia { grid, gamma: Policy::fixed(gamma), verify: true }
}

/// The same with the paper's γ on a grid of 2^-14.
fn paper() -> Mode {
    bdia(14, Gamma::new(1, Sign::Random).unwrap())
}

/// Every scheme of signs; fixed magnitudes, and one that changes before the step of [`PASS`].
fn policies() -> [Policy; 6] {
    let fixed = |m, sign| Policy::fixed(Gamma::new(m, sign).unwrap());
    [
        Policy::PAPER,
        fixed(3, Sign::Random),
        fixed(2, Sign::Shared),
        fixed(1, Sign::Plus),
        fixed(2, Sign::Minus),
        Policy::scheduled(&[(0, 1), (3, 4)], Sign::Shared).unwrap(),
    ]
}

fn float(gamma: f64) -> Mode {
    Mode::BdiaFloat { gamma: FloatGamma::new(gamma, Sign::Random).unwrap(), verify: true }
}

const STANDARD: Mode = Mode::Standard { grid: None };

const fn checkpoint(every: usize) -> Mode {
    Mode::Checkpoint { every, grid: None }
}

fn reversible(stack: &Stack) -> &Reversible {
    match stack {
        Stack::Reversible(machine) => machine,
        Stack::Segmented(_) => panic!("not in mode bdia"),
    }
}

const PASS: Pass = Pass { seed: 5, step: 3, global: 40 };

struct Memory<R>(Layout, Vec<i32>, Vec<R>, Vec<u32>);

impl<R: Real> Memory<R> {
    fn new(layout: Layout) -> Self {
        let (i, r, w) = layout.arenas();
        Self(layout, vec![i32::MIN; i], vec![R::nan(); r], vec![0xA5A5_A5A5; w])
    }

    fn backend(&mut self) -> Reference<'_, R> {
        Reference::new(&self.0, &mut self.1, &mut self.2, &mut self.3).unwrap()
    }
}

/// One pass; returns the stack, the fault, and the ends.
fn run<B: UpdateOps>(
    be: &mut B,
    stack: &mut Stack,
    mlp: &mut Mlp,
    ends: &mut Ends,
) -> Result<Option<Fault>> {
    mlp.done.clear();
    ends.loss = 0.0;
    stack.embed(be, ends, &PASS)?;
    stack.forward(be, mlp, &PASS)?;
    stack.turn(be, mlp, &mut HeadOf(ends), &PASS)?;
    stack.backward(be, mlp, &PASS)?;
    stack.embed_vjp(be, ends, &PASS)?;
    be.take_fault()
}

/// Rebuilt X equals the original in every bit: shapes, depths, planes, signs, chunks, grids, values
/// up to the limit.
#[test]
fn rebuilt_activations_are_exact() {
    let mut cases = 0;
    for n in 0..220_u32 {
        let w = philox(99, [n, 0, 0, 0]);
        let v = philox(99, [n, 1, 0, 0]);
        let (batch, rows, width) =
            (1 + w[0] as usize % 4, 1 + w[1] as usize % 5, 1 + w[2] as usize % 9);
        let blocks = 1 + n as usize % 9;
        let mut c = config(batch, rows * width, blocks, 1 + w[3] as usize % batch);
        let sign = [Sign::Random, Sign::Shared, Sign::Plus, Sign::Minus][v[1] as usize % 4];
        let l = [0, 5, 9, 14, 20, 24][v[2] as usize % 6];
        let (grid, mode) =
            (Grid::new(l).unwrap(), bdia(l, Gamma::new(1 + v[0] % 3, sign).unwrap()));
        // Small values; some grid steps; nearly the whole range (halved, since x_1 = x_0 + h_0 and
        // drift need room).
        let range = f64::from(1 << 30) / f64::from(1 << l);
        let scale =
            [1.0, 300.0 / f64::from(1 << l), range * 0.5][v[3] as usize % 3].min(range * 0.5);
        c.tail = if n % 5 == 0 { Tail::Output } else { Tail::Head };
        let mut layout = Layout::new(4);
        let mut stack = Stack::layout(&c, &mode, &mut layout).unwrap();
        let mut memory = Memory::<f32>::new(layout.checked().unwrap());
        let mut be = memory.backend();
        let (mut mlp, mut ends) =
            (Mlp::new(blocks, width, 3), Ends::new(batch, rows * width, scale));
        if l < 5 {
            // On a coarse grid the blocks must be coarse too, or every Q(h) is zero.
            mlp.params.iter_mut().flatten().for_each(|p| *p *= 8.0);
        }
        let fault = if c.tail == Tail::Output {
            stack.embed(&mut be, &mut ends, &PASS).unwrap();
            stack.forward(&mut be, &mut mlp, &PASS).unwrap();
            let output = stack.output(&mut be).unwrap();
            let x_k = be.ints(reversible(&stack).activation(blocks)).unwrap();
            let pairs = x_k.iter().zip(be.reals(output).unwrap());
            assert!(pairs.into_iter().all(|(&x, &y)| grid.dequantize::<f32>(x) == y));
            be.fill_reals(output, 1.0).unwrap();
            stack.backward(&mut be, &mut mlp, &PASS).unwrap();
            be.take_fault().unwrap()
        } else {
            assert!(matches!(stack.output(&mut be), Err(Error::Setting { what: "tail", .. })));
            run(&mut be, &mut stack, &mut mlp, &mut ends).unwrap()
        };
        assert_eq!(fault, None, "case {n}: {c:?} {mode:?}");
        assert_eq!(stack.mismatches(&be).unwrap(), 0, "case {n}: {c:?} {mode:?}");
        // The whole way back: X_0 is Q(input).
        let x_0: Vec<i32> = ends.inputs.iter().map(|&y| grid.quantize(y as f32).unwrap()).collect();
        let found = be.ints(reversible(&stack).activation(0)).unwrap();
        assert_eq!(found, x_0, "case {n}: {c:?} {mode:?}");
        cases += 1;
    }
    assert_eq!(cases, 220);
}

/// Chunks change no bit of activations, side bits or checksums.
#[test]
fn chunks_change_no_bit() {
    let mut seen: Option<(Vec<u32>, Vec<i32>)> = None;
    for chunk in 1..=5 {
        let mut layout = Layout::new(8);
        let mut stack = Stack::layout(&config(5, 12, 6, chunk), &paper(), &mut layout).unwrap();
        let mut memory = Memory::<f64>::new(layout);
        let mut be = memory.backend();
        let (mut mlp, mut ends) = (Mlp::new(6, 4, 7), Ends::new(5, 12, 1.0));
        stack.embed(&mut be, &mut ends, &PASS).unwrap();
        stack.forward(&mut be, &mut mlp, &PASS).unwrap();
        let x = be.ints(reversible(&stack).activation(5)).unwrap().to_vec();
        let side = be.words(reversible(&stack).side_bits()).unwrap().to_vec();
        match &seen {
            None => seen = Some((side, x)),
            Some(first) => assert!(*first == (side, x), "chunk {chunk}"),
        }
    }
}

/// A backend that turns one side bit of one block: what a memory fault would do.
struct BitFlip<B> {
    inner: B,
    block: u16,
}

impl<B: Backend> Wrapper for BitFlip<B> {
    type Inner = B;

    fn inner(&self) -> &B {
        &self.inner
    }

    fn inner_mut(&mut self) -> &mut B {
        &mut self.inner
    }

    fn step(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        gamma: Gamma,
        x: Ints,
        cur: Reals,
        h: Reals,
        side: Words,
        sum: Words,
    ) -> Result<()> {
        self.inner.step(chunk, grid, gamma, x, cur, h, side, sum)?;
        if chunk.block() == self.block && !side.is_empty() {
            let mut word = [0];
            self.inner.read_words(side.sub(0, 1), &mut word)?;
            self.inner.write_words(side.sub(0, 1), &[word[0] ^ 1])?;
        }
        Ok(())
    }
}

/// A pass over six blocks of four rows, with something wrong.
fn troubled(
    flip: u16,
    sabotage: Option<(usize, f64)>,
    mode: Mode,
) -> (Option<Fault>, u64, Mlp, Vec<Vec<f64>>) {
    let mut layout = Layout::new(8);
    let mut stack = Stack::layout(&config(3, 12, 6, 1), &mode, &mut layout).unwrap();
    let mut memory = Memory::<f64>::new(layout);
    let mut be = BitFlip { inner: memory.backend(), block: flip };
    let (mut mlp, mut ends) = (Mlp::new(6, 3, 5), Ends::new(3, 12, 1.0));
    mlp.lr = 0.1;
    mlp.sabotage = sabotage;
    let before = mlp.params.clone();
    let fault = run(&mut be, &mut stack, &mut mlp, &mut ends).unwrap();
    let mismatches = stack.mismatches(&be).unwrap();
    (fault, mismatches, mlp, before)
}

#[test]
fn one_flipped_side_bit_is_noticed_before_the_update() {
    for gamma in policies() {
        let mode = Mode::Bdia { grid: Grid::DEFAULT, gamma, verify: true };
        for block in 1..=4_u16 {
            let (fault, mismatches, mlp, before) = troubled(block, None, mode);
            let k = usize::from(block);
            assert_eq!(fault, Some(Fault::Checksum { activation: k - 1, block: k }));
            assert!(mismatches > 0, "verify sees it too");
            for j in 0..6 {
                assert_eq!(mlp.params[j] != before[j], j > k, "block {j} with a flip at {k}");
            }
        }
        let (fault, mismatches, mlp, before) = troubled(99, None, mode);
        assert_eq!((fault, mismatches), (None, 0));
        assert!((0..6).all(|j| mlp.params[j] != before[j]));
        assert_eq!(mlp.done, [5, 4, 3, 2, 1, 0]);
    }
}

/// Every policy against the formula in plain `f64`, without a grid and without this crate's update:
/// the loss, and its gradient by finite differences. A grid of 2^-24 is near enough to compare.
#[test]
fn every_policy_has_the_gradient_of_its_formula() {
    const K: usize = 5;
    const PER: usize = 8;
    fn h(mlp: &Mlp, k: usize, x: &[f64]) -> Vec<f64> {
        let (d, n, p) = (mlp.width, mlp.hidden, &mlp.params[k]);
        let mut y = vec![0.0; x.len()];
        for (row, out) in x.chunks(d).zip(y.chunks_mut(d)) {
            for j in 0..n {
                let a = (0..d).map(|i| row[i] * p[i * n + j]).sum::<f64>() + p[d * n + j];
                (0..d).for_each(|i| out[i] += libm::tanh(a) * p[d * n + n + j * d + i]);
            }
        }
        y
    }
    // The words of the paper's section 4, and of the schemes: σ of a sample and block.
    let loss = |policy: &Policy, tail: Tail, mlp: &Mlp, ends: &Ends| {
        let mut loss = 0.0;
        for (s, (x, t)) in ends.inputs.chunks(PER).zip(ends.targets.chunks(PER)).enumerate() {
            let (mut before, mut x) = (vec![0.0; PER], x.to_vec());
            for k in 0..K {
                let h = h(mlp, k, &x);
                let m = policy.at(PASS.step);
                let sigma = m.sigma(PASS.seed, PASS.step, PASS.global + s as u32, 0, k as u16);
                let shared_end = m.sign() == Sign::Shared && tail == Tail::Head && k + 1 == K;
                let gamma = match k {
                    0 => 0.0,
                    _ if shared_end => 0.0,
                    _ => f64::from(sigma) / f64::from(1 << m.planes()),
                };
                let next = (0..PER)
                    .map(|i| gamma * before[i] + (1.0 - gamma) * x[i] + (1.0 + gamma) * h[i])
                    .collect();
                before = core::mem::replace(&mut x, next);
            }
            loss += x.iter().zip(t).map(|(x, t)| 0.5 * (x - t) * (x - t)).sum::<f64>();
        }
        loss
    };
    for policy in policies() {
        for tail in [Tail::Head, Tail::Output] {
            let what = format!("{policy:?} {tail:?}");
            let mode = Mode::Bdia { grid: Grid::new(24).unwrap(), gamma: policy, verify: true };
            let mut layout = Layout::new(8);
            let config = Config { tail, ..config(3, PER, K, 2) };
            let mut stack = Stack::layout(&config, &mode, &mut layout).unwrap();
            let mut memory = Memory::<f64>::new(layout);
            let mut be = memory.backend();
            let (mut mlp, mut ends) = (Mlp::new(K, 4, 3), Ends::new(3, PER, 1.0));
            stack.embed(&mut be, &mut ends, &PASS).unwrap();
            stack.forward(&mut be, &mut mlp, &PASS).unwrap();
            if tail == Tail::Head {
                stack.turn(&mut be, &mut mlp, &mut HeadOf(&mut ends), &PASS).unwrap();
            } else {
                let y = stack.output(&mut be).unwrap();
                let x = fetch(&be, y).unwrap();
                let g: Vec<f64> = x.iter().zip(&ends.targets).map(|(x, t)| x - t).collect();
                ends.loss = g.iter().map(|d| 0.5 * d * d).sum();
                store(&mut be, y, &g).unwrap();
            }
            stack.backward(&mut be, &mut mlp, &PASS).unwrap();
            stack.embed_vjp(&mut be, &mut ends, &PASS).unwrap();
            assert_eq!((be.take_fault().unwrap(), stack.mismatches(&be).unwrap()), (None, 0));
            // Steps of 2^-24 in 15 activations of a sample: a relative distance of about 1e-6.
            let near = |a: f64, b: f64| (a - b).abs() < 1e-5 * (1.0 + a.abs());
            assert!(near(ends.loss, loss(&policy, tail, &mlp, &ends)), "{what}");
            let e = 1e-5;
            let of = |change: &dyn Fn(&mut Mlp, &mut Ends, f64)| {
                let [plus, minus] = [e, -e].map(|e| {
                    let (mut mlp, mut ends) = (Mlp::new(K, 4, 3), Ends::new(3, PER, 1.0));
                    change(&mut mlp, &mut ends, e);
                    loss(&policy, tail, &mlp, &ends)
                });
                (plus - minus) / (2.0 * e)
            };
            for k in 0..K {
                for i in 0..mlp.params[k].len() {
                    let slope = of(&|mlp, _, e| mlp.params[k][i] += e);
                    let found = mlp.grads[k][i];
                    assert!(near(slope, found), "{what} block {k} {i}: {slope} {found}");
                }
            }
            for i in 0..3 * PER {
                let slope = of(&|_, ends, e| ends.inputs[i] += e);
                assert!(near(slope, ends.input_gradient[i]), "{what} input {i}: {slope}");
            }
        }
    }
}

/// Three chunks a block: 15 calls forward, 3 at the turn, then block 4 from call 19 on.
/// Inference on the grid with the γ of a pass has the bits of that pass, for every policy.
#[test]
fn inference_with_the_gamma_of_a_pass() {
    let mut losses = Vec::new();
    for policy in policies() {
        for tail in [Tail::Head, Tail::Output] {
            let mode = Mode::Bdia { grid: Grid::DEFAULT, gamma: policy, verify: false };
            let mut layout = Layout::new(8);
            let config = Config { tail, ..config(2, 8, 5, 2) };
            let mut stack = Stack::layout(&config, &mode, &mut layout).unwrap();
            let mut memory = Memory::<f64>::new(layout);
            let mut be = memory.backend();
            let (mut mlp, mut ends) = (Mlp::new(5, 4, 3), Ends::new(2, 8, 1.0));
            let quantized = Some((policy, PASS));
            let x = stack.infer_quantized(&mut be, &mut mlp, &mut ends, 2, quantized).unwrap();
            let x = fetch(&be, x).unwrap();
            stack.embed(&mut be, &mut ends, &PASS).unwrap();
            stack.forward(&mut be, &mut mlp, &PASS).unwrap();
            if tail == Tail::Head {
                stack.turn(&mut be, &mut mlp, &mut HeadOf(&mut ends), &PASS).unwrap();
                let loss = x.iter().zip(&ends.targets).map(|(x, t)| 0.5 * (x - t) * (x - t)).sum();
                assert_eq!(f64::to_bits(loss), ends.loss.to_bits(), "{policy:?}");
                losses.push(ends.loss);
            } else {
                let y = stack.output(&mut be).unwrap();
                assert_eq!(x, fetch(&be, y).unwrap(), "{policy:?}");
            }
            assert_eq!(be.take_fault().unwrap(), None);
        }
    }
    // They are different networks.
    losses.sort_by(f64::total_cmp);
    losses.dedup();
    assert_eq!(losses.len(), policies().len());
}

#[test]
fn a_block_that_does_not_repeat_itself_is_noticed() {
    for (k, value) in (0..=4).flat_map(|k| [(k, 0.37), (k, f64::NAN), (k, 1e9)]) {
        let call = 18 + 3 * (4 - k) + 2;
        let (fault, _, mlp, before) = troubled(99, Some((call, value)), paper());
        let activation = k.saturating_sub(1);
        assert_eq!(fault, Some(Fault::Checksum { activation, block: k }));
        assert!((0..6).all(|j| (mlp.params[j] != before[j]) == (j > k)), "block {k}");
    }
}

#[test]
fn values_out_of_range_stop_the_step_with_block_and_sample() {
    for mode in [paper(), STANDARD, checkpoint(2), float(0.5)] {
        for value in [f64::NAN, f64::INFINITY, 1e9] {
            if mode != paper() && value == 1e9 {
                continue;
            }
            for (k, sample) in [(0, 0), (2, 1), (4, 2), (5, 1)] {
                // Reversible: block by block. Segmented: chunk by chunk within a segment.
                let call = match mode {
                    Mode::Bdia { .. } => k * 3 + sample + 1,
                    Mode::Checkpoint { .. } => k / 2 * 6 + sample * 2 + k % 2 + 1,
                    // `verify` runs five more for the rebuilding.
                    Mode::BdiaFloat { .. } => sample * 11 + k + 1,
                    Mode::Standard { .. } => sample * 6 + k + 1,
                };
                let (fault, _, mlp, before) = troubled(99, Some((call, value)), mode);
                match fault {
                    Some(Fault::Range { site, sample: s, value: v }) => {
                        assert_eq!((site, s), (Site::Block(k), sample), "{mode:?} {value}");
                        assert!(!v.is_finite() || v.abs() > 65_536.0);
                    }
                    other => panic!("{mode:?} block {k} sample {sample}: {other:?}"),
                }
                assert!(mlp.params == before, "parameters are untouched: {mode:?} block {k}");
            }
        }
    }
}

/// A pass over six blocks and four samples in chunks of three, with a misdeed, or a `G_K` that has
/// `given` in one sample: the fault, and how many blocks from the top were updated.
fn misdone(
    mode: Mode,
    tail: Tail,
    misdeed: Option<(usize, usize, Misdeed)>,
    given: Option<(usize, f64)>,
) -> (Option<Fault>, usize) {
    struct Wild(Ends, Option<(usize, f64)>);

    impl<B: Storage> Head<B> for Wild {
        fn forward_backward(
            &mut self,
            be: &mut B,
            c: &Chunk,
            x: Reals,
            gx: Reals,
            s: Reals,
        ) -> Result<()> {
            self.0.forward_backward(be, c, x, gx, s)?;
            let wild = self.1.filter(|(sample, _)| (c.first..c.first + c.samples).contains(sample));
            wild.map_or(Ok(()), |(sample, value)| {
                store(be, gx.sub((sample - c.first) * self.0.per, 1), &[value])
            })
        }
    }

    let mut layout = Layout::new(8);
    let config = Config { tail, ..config(4, 12, 6, 3) };
    let mut stack = Stack::layout(&config, &mode, &mut layout).unwrap();
    let mut memory = Memory::<f64>::new(layout);
    let mut be = memory.backend();
    let (mut mlp, mut ends) = (Mlp::new(6, 3, 5), Ends::new(4, 12, 1.0));
    (mlp.lr, mlp.misdeed) = (0.1, misdeed);
    let before = mlp.params.clone();
    stack.embed(&mut be, &mut ends, &PASS).unwrap();
    stack.forward(&mut be, &mut mlp, &PASS).unwrap();
    let mut head = Wild(ends, given);
    if tail == Tail::Head {
        stack.turn(&mut be, &mut mlp, &mut head, &PASS).unwrap();
    } else {
        let g = stack.output(&mut be).unwrap();
        be.fill_reals(g, 0.5).unwrap();
        if let Some((sample, value)) = given {
            be.write_reals(g.sub(sample * 12, 1), &[value]).unwrap();
        }
    }
    stack.backward(&mut be, &mut mlp, &PASS).unwrap();
    assert_eq!(mlp.done, [5, 4, 3, 2, 1, 0]);
    let updated = (0..6).rev().take_while(|&k| mlp.params[k] != before[k]).count();
    assert!((0..6 - updated).all(|k| mlp.params[k] == before[k]), "{updated}");
    (be.take_fault().unwrap(), updated)
}

const MODES: [fn() -> Mode; 7] = [
    paper,
    || STANDARD,
    || Mode::Standard { grid: Some(Grid::DEFAULT) },
    || checkpoint(1),
    || checkpoint(2),
    || Mode::Checkpoint { every: 4, grid: Some(Grid::DEFAULT) },
    || float(0.5),
];

/// Whoever gives it: the head, the caller that took the output, a block. Blocks from there on are
/// not updated, and the fault has block, sample and value.
#[test]
fn gradients_that_are_not_finite_are_noticed_before_the_update() {
    for mode in MODES.map(|mode| mode()) {
        for tail in [Tail::Head, Tail::Output] {
            assert_eq!(misdone(mode, tail, None, None), (None, 6), "{mode:?} {tail:?}");
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for sample in [0, 2, 3] {
                    let check = |(fault, updated), at: Site, expected: usize| {
                        let what = format!("{mode:?} {tail:?} {at:?} {sample} {value}: {fault:?}");
                        let Some(Fault::ActivationGradient { site, sample: s, value: v }) = fault
                        else {
                            panic!("{what}")
                        };
                        assert_eq!((site, s, updated), (at, sample, expected), "{what}");
                        assert!(v == value || v.is_nan() && value.is_nan(), "{what}");
                    };
                    check(misdone(mode, tail, None, Some((sample, value))), Site::Head, 0);
                    for k in [0, 2, 5] {
                        let misdeed = Some((k, sample, Misdeed::Gradient(value)));
                        check(misdone(mode, tail, misdeed, None), Site::Block(k), 5 - k);
                    }
                }
            }
        }
    }
}

/// An input that a block writes into, however little: in all modes whose inputs come from integers.
#[test]
fn a_block_that_writes_into_its_input_is_noticed() {
    for mode in MODES.map(|mode| mode()) {
        let on_grid = matches!(
            mode,
            Mode::Bdia { .. }
                | Mode::Standard { grid: Some(_) }
                | Mode::Checkpoint { grid: Some(_), .. }
        );
        for tail in [Tail::Head, Tail::Output] {
            for (k, sample) in [(0, 0), (2, 3), (5, 2)] {
                let (fault, updated) = misdone(mode, tail, Some((k, sample, Misdeed::Input)), None);
                let expected = Fault::Input { site: Site::Block(k), sample };
                if on_grid {
                    assert_eq!((fault, updated), (Some(expected), 0), "{mode:?} {tail:?}");
                } else {
                    assert_eq!(fault, None, "{mode:?} {tail:?}");
                }
            }
        }
    }
}

/// The gradient of every mode against finite differences of the float modes, whose function is
/// smooth.
#[test]
fn gradients_against_finite_differences() {
    for mode in [float(0.5), float(0.3), STANDARD, checkpoint(2)] {
        let pass = |mlp: &mut Mlp, ends: &mut Ends| {
            let mut layout = Layout::new(8);
            let mut stack = Stack::layout(&config(3, 8, 5, 2), &mode, &mut layout).unwrap();
            let mut memory = Memory::<f64>::new(layout);
            assert_eq!(run(&mut memory.backend(), &mut stack, mlp, ends).unwrap(), None);
        };
        let (mut mlp, mut ends) = (Mlp::new(5, 4, 3), Ends::new(3, 8, 1.0));
        pass(&mut mlp, &mut ends);
        let e = 1e-5;
        let probe = |mlp: &mut Mlp, ends: &mut Ends| {
            pass(mlp, ends);
            ends.loss
        };
        for k in 0..5 {
            for i in [0, 7, 13, 20] {
                let (mut a, mut b) = (Mlp::new(5, 4, 3), Mlp::new(5, 4, 3));
                a.params[k][i] += e;
                b.params[k][i] -= e;
                let mut scrap = Ends::new(3, 8, 1.0);
                let slope = (probe(&mut a, &mut scrap) - probe(&mut b, &mut scrap)) / (2.0 * e);
                // Central differences with 1e-5: the error is about 1e-10 of the third derivative,
                // plus rounding.
                assert!(
                    (slope - mlp.grads[k][i]).abs() < 1e-7 * (1.0 + slope.abs()),
                    "{mode:?} block {k} parameter {i}"
                );
            }
        }
        for i in [0, 5, 23] {
            let slope = {
                let (mut a, mut b) = (Ends::new(3, 8, 1.0), Ends::new(3, 8, 1.0));
                a.inputs[i] += e;
                b.inputs[i] -= e;
                (probe(&mut Mlp::new(5, 4, 3), &mut a) - probe(&mut Mlp::new(5, 4, 3), &mut b))
                    / (2.0 * e)
            };
            assert!(
                (slope - ends.input_gradient[i]).abs() < 1e-7 * (1.0 + slope.abs()),
                "{mode:?} input {i}"
            );
        }
    }
}

/// Streams of a foreign block: each its own, none that this crate draws from, the same whatever the
/// chunk.
#[test]
fn a_foreign_block_has_random_numbers_of_its_own() {
    let chunk = |first: usize| Chunk {
        seed: 5,
        step: 3,
        stack: 0,
        site: Site::Block(9),
        first,
        samples: 2,
        global: first as u32,
        frame: 0,
    };
    let mut places: Vec<u32> = (0..128).map(|n| chunk(0).own_stream(1, n).place).collect();
    places.extend(
        [Draw::Sign, Draw::MlpResidualDropout, Draw::Sample].map(|d| chunk(0).stream(1, d).place),
    );
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), 131);
    assert_eq!(chunk(0).own_stream(1, 7), chunk(1).own_stream(0, 7));
    assert_ne!(chunk(0).own_stream(1, 7), chunk(0).own_stream(0, 7));
}

/// A foreign optimizer over exact reversible training learns what it is asked.
#[test]
fn a_foreign_block_is_trained() {
    let mut layout = Layout::new(8);
    let mut stack = Stack::layout(&config(6, 8, 6, 4), &paper(), &mut layout).unwrap();
    let mut memory = Memory::<f64>::new(layout);
    let mut be = memory.backend();
    let (mut mlp, mut ends) = (Mlp::new(6, 8, 16), Ends::new(6, 8, 1.0));
    mlp.lr = 0.01;
    let mut losses = Vec::new();
    for _ in 0..120 {
        assert_eq!(run(&mut be, &mut stack, &mut mlp, &mut ends).unwrap(), None);
        assert_eq!(stack.mismatches(&be).unwrap(), 0);
        losses.push(ends.loss);
    }
    assert!(losses[119] < 0.2 * losses[0], "{} to {}", losses[0], losses[119]);
}

/// Blocks `h(x, c) = w·c·x` with a context `c` for every sample: its gradient adds up over blocks
/// and chunks.
struct Gate(f64);

impl<B: Storage> Blocks<B> for Gate {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        let c = fetch(be, call.context.ok_or(Error::Handle("context"))?.value)?;
        let x = fetch(be, call.x)?;
        let per = x.len() / c.len();
        store(
            be,
            h,
            &x.iter().enumerate().map(|(i, x)| self.0 * c[i / per] * x).collect::<Vec<_>>(),
        )
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        let context = call.context.ok_or(Error::Handle("context"))?;
        let (c, mut gc) = (fetch(be, context.value)?, fetch(be, context.grad)?);
        let (x, gh, mut gx_host) = (fetch(be, call.x)?, fetch(be, gh)?, fetch(be, gx)?);
        let per = x.len() / c.len();
        for i in 0..x.len() {
            gx_host[i] += self.0 * c[i / per] * gh[i];
            gc[i / per] += self.0 * x[i] * gh[i];
        }
        store(be, context.grad, &gc)?;
        store(be, gx, &gx_host)
    }
}

#[test]
fn context_has_a_gradient_of_its_own() {
    let loss = |mode: Mode, shift: f64, sample: usize| {
        let mut layout = Layout::new(8);
        let (value, grad) =
            (layout.reals(Category::Workspace, 3), layout.reals(Category::Workspace, 3));
        let mut stack = Stack::layout(&config(3, 4, 4, 2), &mode, &mut layout).unwrap();
        stack.set_context(Context { value, grad });
        let mut memory = Memory::<f64>::new(layout);
        let mut be = memory.backend();
        let mut c = [0.3, -0.4, 0.9];
        c[sample] += shift;
        be.write_reals(value, &c).unwrap();
        be.fill_reals(grad, 0.0).unwrap();
        let mut ends = Ends::new(3, 4, 1.0);
        let mut gate = Gate(0.7);
        stack.embed(&mut be, &mut ends, &PASS).unwrap();
        stack.forward(&mut be, &mut gate, &PASS).unwrap();
        stack.turn(&mut be, &mut gate, &mut HeadOf(&mut ends), &PASS).unwrap();
        stack.backward(&mut be, &mut gate, &PASS).unwrap();
        assert_eq!(be.take_fault().unwrap(), None);
        // A gradient of the context that is not finite.
        let gradient = be.reals(grad).unwrap()[sample];
        be.write_reals(grad.sub(sample, 1), &[f64::NAN]).unwrap();
        stack.embed(&mut be, &mut ends, &PASS).unwrap();
        stack.forward(&mut be, &mut gate, &PASS).unwrap();
        stack.turn(&mut be, &mut gate, &mut HeadOf(&mut Ends::new(3, 4, 1.0)), &PASS).unwrap();
        let fault = be.take_fault().unwrap();
        let here = matches!(
            fault,
            Some(Fault::ActivationGradient { site: Site::Block(3), sample: s, .. }) if s == sample
        );
        assert!(here, "{fault:?}");
        (ends.loss, gradient)
    };
    let e = 1e-5;
    for sample in 0..3 {
        let (_, gradient) = loss(float(0.5), 0.0, sample);
        let slope = (loss(float(0.5), e, sample).0 - loss(float(0.5), -e, sample).0) / (2.0 * e);
        assert!((gradient - slope).abs() < 1e-7 * (1.0 + slope.abs()), "{gradient} {slope}");
        // On the grid (2^-14, four blocks) the same up to some grid steps.
        let (_, on_grid) = loss(paper(), 0.0, sample);
        assert!((gradient - on_grid).abs() < 1e-2 * (1.0 + gradient.abs()), "{gradient} {on_grid}");
    }
}

#[test]
fn settings_that_do_not_fit_are_refused() {
    let lay = |c: Config, mode: Mode| {
        Stack::layout(&c, &mode, &mut Layout::new(4)).map(|_| ()).unwrap_err()
    };
    let good = config(2, 4, 3, 1);
    for mode in [paper(), STANDARD, checkpoint(2), float(0.3)] {
        let lay = |c: Config| lay(c, mode);
        assert!(matches!(lay(Config { blocks: 0, ..good }), Error::Setting { what: "blocks", .. }));
        let many = Config { blocks: (1 << 16) + 1, ..good };
        assert!(matches!(lay(many), Error::Setting { what: "blocks", .. }));
        assert!(matches!(lay(Config { batch: 0, ..good }), Error::Setting { what: "batch", .. }));
        assert!(matches!(lay(Config { batch: usize::MAX / 2, ..good }), Error::TooLarge(_)));
    }
    let zero = lay(good, checkpoint(0));
    assert!(matches!(zero, Error::Setting { what: "checkpoint-every", .. }));
    // What a mode lacks or has too much cannot be written down. What is left: a γ that is none of
    // the grid's, and a machine for another mode.
    for gamma in [0.0, 0.3, 1.0] {
        let error = Gamma::from_value(gamma, Sign::Plus).unwrap_err();
        assert!(matches!(error, Error::Setting { what: "gamma", .. }), "{error}");
    }
    let mut layout = Layout::new(4);
    let workspace = Workspace::layout(&[(good, paper())], &mut layout).unwrap();
    let error = Segmented::layout_in(&good, &paper(), &workspace, &mut layout).unwrap_err();
    assert!(matches!(error, Error::Setting { what: "mode", .. }), "{error}");
    assert_eq!(error.to_string(), "mode is bdia; possible: a mode that stores activations");
}

/// Activation memory of the reversible mode grows by side bits and checksums only.
#[test]
fn depth_costs_side_bits_only() {
    let plan = |blocks, mode| {
        let mut layout = Layout::new(4);
        Stack::layout(&config(4, 320, blocks, 1), &mode, &mut layout).unwrap();
        layout
    };
    let mode = Mode::Bdia {
        grid: Grid::new(14).unwrap(),
        gamma: Policy::fixed(Gamma::new(1, Sign::Random).unwrap()),
        verify: false,
    };
    let (a, b) = (plan(6, mode), plan(48, mode));
    for category in Category::ALL {
        if category != Category::SideBits {
            assert_eq!(a.bytes(category), b.bytes(category), "{category}");
        }
    }
    // One bit a value and block: 4 · 320 / 8 = 160 bytes a plane, and 8 bytes of checksum.
    let padded = |bytes: usize| bytes.next_multiple_of(64);
    assert_eq!(b.bytes(Category::SideBits), padded(46 * 160) + padded(50 * 8));
    assert!(plan(48, STANDARD).total() > 4 * b.total());
}
