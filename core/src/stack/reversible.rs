//! The exact machine: two integer activations, side bits, and everything else rebuilt.

use super::blocks::{Blocks, Call, Context, Head, Input};
use super::workspace::{Common, Sizes, Workspace};
use super::{Config, LastStep, Mode, Pass, Tail};
use crate::arena::{Category, Ints, Layout, Reals, Words, product};
use crate::backend::{Chunk, Storage, UpdateOps};
#[cfg(doc)]
use crate::error::Error;
use crate::error::{Result, Site, ok};
use crate::real::Real;
use crate::update::{FloatGamma, Gamma, Grid, Policy};

/// A stack in mode `bdia`, laid out in the arenas of a backend. It holds handles only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reversible {
    pub(super) common: Common,
    grid: Grid,
    gamma: Policy,
    /// `X_k` in `x[k % 2]`.
    x: [Ints; 2],
    /// `G_k` in `g[k % 2]`.
    g: [Reals; 2],
    side: Words,
    sums: Words,
    /// One chunk: `X_K`.
    top: Ints,
    verify: Option<Originals>,
}

/// What `verify` keeps in addition.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Originals {
    /// `X_0 … X_{n-1}`, whole batch, where `n` planes are stored.
    x: Ints,
    /// A 64-bit counter.
    differing: Words,
}

/// γ of the step of block `k`; none where that is `X_{k+1} = X_k + Q(h_k(x_k))`.
fn gamma_at(policy: &Policy, config: &Config, step: u32, k: usize) -> Option<Gamma> {
    let ends = config.tail == Tail::Head && k + 1 == config.blocks;
    (k > 0 && !(ends && policy.ends_plain())).then(|| policy.at(step))
}

impl Reversible {
    /// Lays the stack out.
    ///
    /// # Errors
    /// As [`Stack::layout`](super::Stack::layout).
    pub const fn layout(
        config: &Config,
        grid: Grid,
        gamma: Policy,
        verify: bool,
        layout: &mut Layout,
    ) -> Result<Self> {
        let mode = Mode::Bdia { grid, gamma, verify };
        let workspace = ok!(Workspace::layout(&[(*config, mode)], layout));
        Self::layout_in(config, grid, gamma, verify, &workspace, layout)
    }

    /// Lays the stack out around a workspace that was made for it and others.
    ///
    /// # Errors
    /// As [`layout`](Self::layout).
    pub const fn layout_in(
        config: &Config,
        grid: Grid,
        gamma: Policy,
        verify: bool,
        workspace: &Workspace,
        layout: &mut Layout,
    ) -> Result<Self> {
        let mode = Mode::Bdia { grid, gamma, verify };
        let s = ok!(Sizes::of(config, &mode));
        let common = ok!(Common::layout(config, &mode, workspace, layout));
        let (stored, planes) = (stored_planes(config), gamma.planes() as usize);
        let words = [config.batch, config.per_sample.div_ceil(32), planes, stored];
        let side = ok!(product("side bits", &words));
        let originals = ok!(product("originals", &[s.whole, stored]));
        let (l, w) = (layout, workspace);
        Ok(Self {
            common,
            grid,
            gamma,
            x: [l.ints(Category::Activations, s.whole), l.ints(Category::Activations, s.whole)],
            g: [w.g[0].sub(0, s.whole), w.g[1].sub(0, s.whole)],
            side: l.words(Category::SideBits, side),
            sums: l.words(Category::SideBits, 2 * (config.blocks + 2)),
            top: w.top_ints.sub(0, s.part),
            verify: if verify {
                Some(Originals {
                    x: l.ints(Category::Verify, originals),
                    differing: l.words(Category::Verify, 2),
                })
            } else {
                None
            },
        })
    }

    /// The sizes, with the chunk that is used.
    pub const fn config(&self) -> &Config {
        &self.common.config
    }

    /// What becomes of the last step.
    pub const fn last_step(&self) -> LastStep {
        LastStep::of(&self.gamma, self.config().tail, self.config().blocks)
    }

    /// Gives all blocks a second input.
    pub const fn set_context(&mut self, context: Context) {
        self.common.context = Some(context);
    }

    /// `G_k` of the whole batch, while the backward pass is at block `k` or `k - 1`.
    pub const fn gradient(&self, k: usize) -> Reals {
        self.g[k % 2]
    }

    /// `X_k` of the whole batch, while it is one of the two that are kept.
    pub const fn activation(&self, k: usize) -> Ints {
        self.x[k % 2]
    }

    /// Scratch shared by blocks, head and input; free between calls.
    pub const fn scratch(&self) -> Reals {
        self.common.scratch
    }

    /// All stored side bits.
    pub const fn side_bits(&self) -> Words {
        self.side
    }

    /// Number of elements in which rebuilt activations differed from the originals since
    /// [`embed`](Self::embed), with `verify`.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn mismatches<B: Storage>(&self, be: &B) -> Result<u64> {
        let Some(originals) = &self.verify else { return Ok(0) };
        let mut words = [0; 2];
        be.read_words(originals.differing, &mut words)?;
        Ok(u64::from(words[1]) << 32 | u64::from(words[0]))
    }

    /// One forward and backward pass with input and head. The deferred status of the backend says
    /// whether it is good.
    ///
    /// # Errors
    /// Any error of the backend, the blocks, the input or the head.
    pub fn train<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        head: &mut impl Head<B>,
        pass: &Pass,
    ) -> Result<()> {
        self.embed(be, input, pass)?;
        self.forward(be, blocks, pass)?;
        self.turn(be, blocks, head, pass)?;
        self.backward(be, blocks, pass)?;
        self.embed_vjp(be, input, pass)
    }

    /// `X_0` from the input.
    ///
    /// # Errors
    /// Any error of the backend or the input.
    pub fn embed<B: UpdateOps>(
        &mut self,
        be: &mut B,
        input: &mut impl Input<B>,
        pass: &Pass,
    ) -> Result<()> {
        be.fill_words(self.sums, 0)?;
        if let Some(originals) = &self.verify {
            be.fill_words(originals.differing, 0)?;
        }
        let c = &self.common;
        for (_, first, n) in c.chunks() {
            let chunk = c.chunk(pass, Site::Embedding, 0, first, n);
            let x = c.input_of(&chunk);
            input.forward(be, &chunk, true, x, c.scratch)?;
            be.quantize(&chunk, self.grid, x, c.of_ints(self.x[0], &chunk), self.sum(0))?;
        }
        Ok(())
    }

    /// The blocks below the last one; all of them with [`Tail::Output`].
    ///
    /// # Errors
    /// Any error of the backend or the blocks.
    pub fn forward<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
    ) -> Result<()> {
        let c = &self.common;
        for k in 0..c.config.blocks - usize::from(c.config.tail == Tail::Head) {
            if let Some(originals) = &self.verify
                && k < stored_planes(&c.config)
            {
                let whole = self.x[0].len();
                be.copy_ints(self.x[k % 2], originals.x.sub(k * whole, whole))?;
            }
            for (_, first, n) in c.chunks() {
                let chunk = c.chunk(pass, Site::Block(k), 0, first, n);
                let next = c.of_ints(self.x[(k + 1) % 2], &chunk);
                self.residual(be, blocks, &chunk, k, false)?;
                let side = self.side_of(k.wrapping_sub(1), &chunk);
                self.advance(be, &chunk, k, next, side, self.sum(k + 1))?;
            }
        }
        Ok(())
    }

    /// The result of [`forward`](Self::forward) with [`Tail::Output`]: `x_K` of the whole batch, in
    /// the place of `G_K`. Read it, then put `∂L/∂x_K` over it and call
    /// [`backward`](Self::backward).
    ///
    /// # Errors
    /// [`Error::Setting`] with [`Tail::Head`], whose `x_K` the head alone sees; what the backend
    /// reports.
    pub fn output<B: UpdateOps>(&self, be: &mut B) -> Result<Reals> {
        self.common.config.tail.expect_output()?;
        let (k, place) = (self.common.config.blocks, self.gradient(self.common.config.blocks));
        be.dequantize(self.grid, self.activation(k), place)?;
        Ok(place)
    }

    /// The last block, the head and the way back through the last block, chunk by chunk.
    ///
    /// # Errors
    /// Any error of the backend, the blocks or the head.
    pub fn turn<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        head: &mut impl Head<B>,
        pass: &Pass,
    ) -> Result<()> {
        let c = &self.common;
        c.config.tail.expect_head()?;
        let last = c.config.blocks - 1;
        be.fill_reals(self.g[last % 2], B::Real::of(0.0))?;
        for (_, first, n) in c.chunks() {
            let chunk = c.chunk(pass, Site::Block(last), 0, first, n);
            let top = c.part(c.top, &chunk);
            self.residual(be, blocks, &chunk, last, true)?;
            let next = self.top.sub(0, top.len());
            if self.gamma_at(&chunk, last).is_some() {
                be.copy_ints(c.of_ints(self.x[(last + 1) % 2], &chunk), next)?;
            }
            self.advance(be, &chunk, last, next, Words::EMPTY, Words::EMPTY)?;
            be.dequantize(self.grid, next, top)?;
            let (at_head, g) = (Chunk { site: Site::Head, ..chunk }, self.gradient(last + 1));
            head.forward_backward(be, &at_head, top, c.of(g, &chunk), c.scratch)?;
            be.check_gradient(&at_head, c.of(g, &chunk))?;
            self.backpropagate(be, blocks, &chunk, last)?;
        }
        blocks.done(be, last)
    }

    /// From the last two activations and `G_K` back to `G_0`.
    ///
    /// # Errors
    /// Any error of the backend or the blocks.
    pub fn backward<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
    ) -> Result<()> {
        let (c, k) = (&self.common, self.common.config.blocks);
        let head = c.config.tail == Tail::Head;
        if !head {
            be.fill_reals(self.g[(k - 1) % 2], B::Real::of(0.0))?;
            c.check_given(be, pass, self.gradient(k))?;
        }
        let compared = self.sum(k + 1);
        for k in (0..k - usize::from(head)).rev() {
            be.fill_words(compared, 0)?;
            for (_, first, n) in c.chunks() {
                let chunk = c.chunk(pass, Site::Block(k), 0, first, n);
                self.residual(be, blocks, &chunk, k, true)?;
                let far = c.of_ints(self.x[(k + 1) % 2], &chunk);
                let h = c.part(c.h, &chunk);
                if let Some(gamma) = self.gamma_at(&chunk, k) {
                    let (x, side) = (c.input_of(&chunk), self.side_of(k - 1, &chunk));
                    be.inverse(&chunk, self.grid, gamma, far, x, h, side, compared)?;
                } else {
                    // Block 0. X_0 is there already: rebuilding it once more, beside X_1, shows
                    // whether the block repeats itself.
                    let again = self.top.sub(0, far.len());
                    be.copy_ints(far, again)?;
                    be.subtract_quantized(&chunk, self.grid, again, h, compared)?;
                }
                self.backpropagate(be, blocks, &chunk, k)?;
            }
            let rebuilt = k.saturating_sub(1);
            be.compare(self.sum(rebuilt), compared, rebuilt, k)?;
            if let Some(originals) = &self.verify
                && k > 0
            {
                let whole = self.x[0].len();
                let original = originals.x.sub((k - 1) * whole, whole);
                be.count_differences(self.x[(k - 1) % 2], original, originals.differing)?;
            }
            blocks.done(be, k)?;
        }
        Ok(())
    }

    /// Gives `G_0` to the input.
    ///
    /// # Errors
    /// Any error of the backend or the input.
    pub fn embed_vjp<B: UpdateOps>(
        &mut self,
        be: &mut B,
        input: &mut impl Input<B>,
        pass: &Pass,
    ) -> Result<()> {
        self.common.embed_vjp(be, input, pass, self.gradient(0))
    }

    /// Inference over `samples` samples (at most a chunk): from the input to `x_K`, whose place is
    /// returned. With [`FloatGamma::ZERO`] it is the standard transformer,
    /// `x_{k+1} = x_k + h_k(x_k)`; dropout is off. Uses the workspace only.
    ///
    /// # Errors
    /// [`Error::Shape`] for more samples than a chunk holds; what the backend, the blocks or the
    /// input report.
    pub fn infer<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        samples: usize,
        gamma: FloatGamma,
    ) -> Result<Reals> {
        self.common.infer(be, blocks, input, samples, gamma)
    }

    /// Inference on the grid, `X_{k+1} = X_k + Q(h_k(x_k))` as in the paper, or with the γ that a
    /// policy has in a pass. Uses the `X` pair. The result is the place of `x_K`.
    ///
    /// # Errors
    /// As [`infer`](Self::infer).
    pub fn infer_quantized<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        samples: usize,
        gamma: Option<(Policy, Pass)>,
    ) -> Result<Reals> {
        let (c, none) = (&self.common, Words::EMPTY);
        c.fits(samples)?;
        let pass = gamma.map_or(Pass::INFERENCE, |(_, pass)| pass);
        let at = |site| c.chunk(&pass, site, 0, 0, samples);
        let x = c.input_of(&at(Site::Embedding));
        let pair = [0, 1].map(|i| self.x[i].sub(0, x.len()));
        input.forward(be, &at(Site::Embedding), false, x, c.scratch)?;
        be.quantize(&at(Site::Embedding), self.grid, x, pair[0], none)?;
        for k in 0..c.config.blocks {
            let chunk = at(Site::Block(k));
            let h = c.part(c.h, &chunk);
            let (cur, next) = (pair[k % 2], pair[(k + 1) % 2]);
            be.dequantize(self.grid, cur, x)?;
            blocks.residual(be, &Call { train: false, ..c.call(chunk, k, false) }, h)?;
            match gamma.and_then(|(policy, pass)| gamma_at(&policy, &c.config, pass.step, k)) {
                Some(gamma) => be.step(&chunk, self.grid, gamma, next, x, h, none, none)?,
                None => {
                    be.copy_ints(cur, next)?;
                    be.add_quantized(&chunk, self.grid, next, h, none)?;
                }
            }
        }
        be.dequantize(self.grid, pair[c.config.blocks % 2], x)?;
        Ok(x)
    }

    fn gamma_at(&self, chunk: &Chunk, k: usize) -> Option<Gamma> {
        gamma_at(&self.gamma, &self.common.config, chunk.step, k)
    }

    /// Side bits of the chunk's `X_k`; none where they are not stored.
    fn side_of(&self, k: usize, chunk: &Chunk) -> Words {
        let config = &self.common.config;
        if k >= stored_planes(config) {
            return Words::EMPTY;
        }
        // A step with fewer planes than are planned uses the first words of its samples' room.
        let room = config.per_sample.div_ceil(32) * self.gamma.planes() as usize;
        let used = config.per_sample.div_ceil(32) * self.gamma.at(chunk.step).planes() as usize;
        self.side.sub((k * config.batch + chunk.first) * room, chunk.samples * used)
    }

    /// Checksum of `X_k` (two words); index `K + 1` is the one that the backward pass compares
    /// with.
    const fn sum(&self, k: usize) -> Words {
        self.sums.sub(2 * k, 2)
    }

    /// `h_k` of the chunk's `X_k`.
    fn residual<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        chunk: &Chunk,
        k: usize,
        keep: bool,
    ) -> Result<()> {
        let call = self.common.call(*chunk, k, keep);
        let x = self.common.of_ints(self.x[k % 2], chunk);
        be.dequantize(self.grid, x, call.x)?;
        blocks.residual(be, &call, self.common.part(self.common.h, chunk))?;
        be.check_input(chunk, self.grid, x, call.x)
    }

    /// `X_{k+1}` of the chunk over `next`, which holds `X_{k-1}` where the step has a γ.
    fn advance<B: UpdateOps>(
        &self,
        be: &mut B,
        chunk: &Chunk,
        k: usize,
        next: Ints,
        side: Words,
        sum: Words,
    ) -> Result<()> {
        let c = &self.common;
        let h = c.part(c.h, chunk);
        if let Some(gamma) = self.gamma_at(chunk, k) {
            be.step(chunk, self.grid, gamma, next, c.input_of(chunk), h, side, sum)
        } else {
            be.copy_ints(c.of_ints(self.x[k % 2], chunk), next)?;
            be.add_quantized(chunk, self.grid, next, h, sum)
        }
    }

    /// `G_k` and `G_{k-1}` of the chunk from `G_{k+1}`; the block's intermediates are in its frame.
    fn backpropagate<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        chunk: &Chunk,
        k: usize,
    ) -> Result<()> {
        let c = &self.common;
        let (next, cur) = (c.of(self.gradient(k + 1), chunk), c.of(self.gradient(k), chunk));
        let h = c.part(c.h, chunk);
        let gamma = self.gamma_at(chunk, k).map_or(FloatGamma::ZERO, Gamma::float);
        be.combine(chunk, gamma, next, cur, h)?;
        c.vjp(be, blocks, chunk, k, cur)
    }
}

const fn stored_planes(config: &Config) -> usize {
    match config.tail {
        Tail::Head => config.blocks.saturating_sub(2),
        Tail::Output => config.blocks.saturating_sub(1),
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;
    use crate::reference::Reference;
    use crate::rng::philox;
    use crate::stack::Needs;
    use crate::update::Sign;

    const BATCH: usize = 5;
    const PER: usize = 40;
    const BLOCKS: usize = 7;

    /// `h(x) = sin(3x + k)`, without a gradient; the inputs; the loss's gradient is `x`.
    struct Toy;

    impl Blocks<Reference<'_, f32>> for Toy {
        fn residual(&mut self, be: &mut Reference<'_, f32>, call: &Call, h: Reals) -> Result<()> {
            let x = be.reals(call.x)?.to_vec();
            let h = be.reals_mut(h)?;
            h.iter_mut().zip(x).for_each(|(h, x)| *h = libm::sinf(3.0 * x + call.block as f32));
            Ok(())
        }

        fn vjp(&mut self, _: &mut Reference<'_, f32>, _: &Call, _: Reals, _: Reals) -> Result<()> {
            Ok(())
        }
    }

    impl Input<Reference<'_, f32>> for Toy {
        fn forward(
            &mut self,
            be: &mut Reference<'_, f32>,
            c: &Chunk,
            _: bool,
            x: Reals,
            _: Reals,
        ) -> Result<()> {
            for (i, x) in be.reals_mut(x)?.iter_mut().enumerate() {
                *x = philox(3, [(c.first * PER + i) as u32, 0, 0, 0])[0] as i32 as f32 / 2e9;
            }
            Ok(())
        }

        fn vjp(&mut self, _: &mut Reference<'_, f32>, _: &Chunk, _: Reals, _: Reals) -> Result<()> {
            Ok(())
        }
    }

    impl Head<Reference<'_, f32>> for Toy {
        fn forward_backward(
            &mut self,
            be: &mut Reference<'_, f32>,
            _: &Chunk,
            x: Reals,
            gx: Reals,
            _: Reals,
        ) -> Result<()> {
            be.copy_reals(x, gx)
        }
    }

    /// Steps of 1 and 3 planes in turn, in the room of 3: exact, whatever the chunks and the signs.
    #[test]
    fn steps_with_fewer_planes_than_planned_are_replayed() {
        for sign in [Sign::Random, Sign::Shared, Sign::Minus] {
            let stages = [(0, 1), (1, 3), (2, 1), (3, 3)];
            let policy = Policy::scheduled(&stages, sign).unwrap();
            assert_eq!(policy.planes(), 3);
            for (tail, chunk) in [(Tail::Head, 1), (Tail::Head, 2), (Tail::Output, 3)] {
                let config = Config {
                    id: 0,
                    batch: BATCH,
                    per_sample: PER,
                    blocks: BLOCKS,
                    chunk,
                    tail,
                    needs: Needs::NONE,
                    ends_scratch: 0,
                };
                let mut layout = Layout::new(4);
                let mut stack =
                    Reversible::layout(&config, Grid::DEFAULT, policy, true, &mut layout).unwrap();
                // What a plan says of the last step is what is done and kept.
                let perturbed = gamma_at(&policy, &config, 0, BLOCKS - 1).is_some();
                let inverted = stored_planes(&config) == BLOCKS - 1;
                let last = match (perturbed, inverted) {
                    (false, false) => LastStep::Plain,
                    (true, false) => LastStep::Perturbed,
                    (true, true) => LastStep::Inverted,
                    (false, true) => panic!("side bits that nothing needs"),
                };
                assert_eq!(stack.last_step(), last);
                let (i, r, w) = layout.arenas();
                let (mut i, mut r, mut w) = (vec![0; i], vec![0.0_f32; r], vec![u32::MAX; w]);
                let mut be = Reference::new(&layout, &mut i, &mut r, &mut w).unwrap();
                for step in 0..4 {
                    let pass = Pass { seed: 1, step, global: 0 };
                    stack.embed(&mut be, &mut Toy, &pass).unwrap();
                    let x_0 = be.ints(stack.activation(0)).unwrap().to_vec();
                    stack.forward(&mut be, &mut Toy, &pass).unwrap();
                    // No two chunks and no two blocks share a word.
                    let mut places = Vec::new();
                    for (_, first, n) in stack.common.chunks() {
                        for k in 0..stored_planes(&config) {
                            let chunk = stack.common.chunk(&pass, Site::Block(k + 1), 0, first, n);
                            let side = stack.side_of(k, &chunk);
                            let planes = policy.at(step).planes() as usize;
                            assert_eq!(side.len(), n * planes * PER.div_ceil(32));
                            places.push(side.range());
                        }
                    }
                    places.sort_by_key(|place| place.start);
                    assert!(places.is_sorted_by(|a, b| a.end <= b.start));
                    match tail {
                        Tail::Head => stack.turn(&mut be, &mut Toy, &mut Toy, &pass).unwrap(),
                        Tail::Output => stack.output(&mut be).map(|_| ()).unwrap(),
                    }
                    stack.backward(&mut be, &mut Toy, &pass).unwrap();
                    assert_eq!(be.take_fault(), Ok(None));
                    assert_eq!(stack.mismatches(&be), Ok(0));
                    assert_eq!(be.ints(stack.activation(0)).unwrap(), x_0);
                }
            }
        }
    }
}
