//! The storing machine: blocks in segments whose intermediates are kept.
//!
//! `standard` and `bdia-float` are one segment of all blocks. `checkpoint` keeps the input of every
//! `n`-th block and recomputes a segment before its vector-Jacobian products.

use super::blocks::{Blocks, Call, Context, Head, Input};
use super::workspace::{Common, Sizes, Workspace};
use super::{Config, Mode, Pass, Tail};
use crate::arena::{Category, Ints, Layout, Reals, Words, product};
use crate::backend::{Chunk, Storage, UpdateOps};
use crate::error::{Error, Result, Site, ok};
use crate::real::Real;
use crate::update::{FloatGamma, Grid, Sign};

/// A stack in one of the modes that store, laid out in the arenas of a backend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segmented {
    pub(super) common: Common,
    mode: Mode,
    flow: Flow,
    /// `G_k`; with γ only of even `k`.
    g: Reals,
    /// With [`Tail::Output`]: `x_K`.
    output: Reals,
}

/// How one activation leads to the next.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Flow {
    /// `x_{k+1} = x_k + h_k(x_k)`.
    Float {
        /// Inputs of segments; none where there is one segment.
        saved: Reals,
    },
    /// `X_{k+1} = X_k + Q(h_k(x_k))`.
    Grid {
        grid: Grid,
        /// Inputs of segments.
        saved: Ints,
        /// The state of one chunk.
        running: Ints,
    },
    /// `x_{k+1} = γ·x_{k-1} + (1-γ)·x_k + (1+γ)·h_k(x_k)`.
    Gamma {
        gamma: FloatGamma,
        /// `G_k` of odd `k`.
        odd: Reals,
        /// With `verify`: an input and a frame in addition.
        spare: Option<[Reals; 2]>,
        /// Largest difference between rebuilt and original activations of the last step.
        rebuild_error: f64,
    },
}

impl Segmented {
    /// Lays the stack out around a workspace that was made for it and others.
    ///
    /// # Errors
    /// As [`Stack::layout`](super::Stack::layout); [`Error::Setting`] in mode `bdia`, which is
    /// [`Reversible`](super::Reversible)'s.
    pub const fn layout_in(
        config: &Config,
        mode: &Mode,
        workspace: &Workspace,
        layout: &mut Layout,
    ) -> Result<Self> {
        let s = ok!(Sizes::of(config, mode));
        let common = ok!(Common::layout(config, mode, workspace, layout));
        let segments = mode.segments(config);
        let saved = ok!(product("saved inputs", &[s.whole, segments]));
        let (l, w) = (layout, workspace);
        let flow = match *mode {
            Mode::Bdia { .. } => {
                return Err(Error::unfit("mode", "bdia", "a mode that stores activations"));
            }
            Mode::Standard { grid: Some(grid) } | Mode::Checkpoint { grid: Some(grid), .. } => {
                let running = l.ints(Category::Workspace, s.part);
                Flow::Grid { grid, saved: l.ints(Category::Activations, saved), running }
            }
            Mode::Standard { grid: None } | Mode::Checkpoint { grid: None, .. } => Flow::Float {
                saved: l.reals(Category::Activations, if segments > 1 { saved } else { 0 }),
            },
            Mode::BdiaFloat { gamma, verify } => Flow::Gamma {
                gamma,
                odd: w.g[1].sub(0, s.whole),
                spare: if verify {
                    Some([l.reals(Category::Verify, s.part), l.reals(Category::Verify, s.frame)])
                } else {
                    None
                },
                rebuild_error: 0.0,
            },
        };
        let output = if matches!(config.tail, Tail::Output) { s.whole } else { 0 };
        Ok(Self {
            common,
            mode: *mode,
            flow,
            g: w.g[0].sub(0, s.whole),
            output: l.reals(Category::Activations, output),
        })
    }

    /// The sizes, with the chunk that is used.
    pub const fn config(&self) -> &Config {
        &self.common.config
    }

    /// Gives all blocks a second input.
    pub const fn set_context(&mut self, context: Context) {
        self.common.context = Some(context);
    }

    /// `G_k` of the whole batch, while the backward pass is at block `k` or `k - 1`.
    pub const fn gradient(&self, k: usize) -> Reals {
        match self.flow {
            Flow::Gamma { odd, .. } if k % 2 == 1 => odd,
            _ => self.g,
        }
    }

    /// Scratch shared by blocks, head and input; free between calls.
    pub const fn scratch(&self) -> Reals {
        self.common.scratch
    }

    /// Largest difference between rebuilt and original activations of the last step, with `verify`
    /// in mode `bdia-float`.
    pub const fn rebuild_error(&self) -> f64 {
        match self.flow {
            Flow::Gamma { rebuild_error, .. } => rebuild_error,
            _ => 0.0,
        }
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

    /// `x_0` from the input.
    ///
    /// # Errors
    /// Any error of the backend or the input.
    pub fn embed<B: UpdateOps>(
        &mut self,
        be: &mut B,
        input: &mut impl Input<B>,
        pass: &Pass,
    ) -> Result<()> {
        if let Flow::Gamma { rebuild_error, .. } = &mut self.flow {
            *rebuild_error = 0.0;
        }
        let c = &self.common;
        for (number, first, n) in c.chunks() {
            let chunk = c.chunk(pass, Site::Embedding, self.frame_index(0, number), first, n);
            let x = c.input_of(&chunk);
            match self.flow {
                Flow::Grid { grid, saved, .. } => {
                    input.forward(be, &chunk, true, x, c.scratch)?;
                    be.quantize(&chunk, grid, x, c.of_ints(saved, &chunk), Words::EMPTY)?;
                }
                Flow::Float { saved } if !saved.is_empty() => {
                    input.forward(be, &chunk, true, c.of(saved, &chunk), c.scratch)?;
                }
                Flow::Float { .. } | Flow::Gamma { .. } => {
                    input.forward(be, &chunk, true, x, c.scratch)?;
                }
            }
        }
        Ok(())
    }

    /// The segments below the last one; all of them with [`Tail::Output`].
    ///
    /// # Errors
    /// Any error of the backend or the blocks.
    pub fn forward<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
    ) -> Result<()> {
        let (c, waits) = (self.common, self.mode.waits(self.config()));
        let below = self.mode.segments(&c.config) - usize::from(c.config.tail == Tail::Head);
        for s in 0..below {
            for (number, first, n) in c.chunks() {
                self.run_segment(be, blocks, pass, s, (number, first, n), waits)?;
                if waits && matches!(self.flow, Flow::Gamma { spare: Some(_), .. }) {
                    let chunk = c.chunk(pass, Site::Head, 0, first, n);
                    be.copy_reals(c.of(self.output, &chunk), c.part(c.top, &chunk))?;
                    self.measure_rebuilding(be, blocks, pass, (number, first, n))?;
                }
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
        let place = self.gradient(self.common.config.blocks);
        be.copy_reals(self.output, place)?;
        Ok(place)
    }

    /// The last segment, the head and the way back through the last segment, chunk by chunk.
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
        let c = self.common;
        c.config.tail.expect_head()?;
        let (last, segments) = (c.config.blocks - 1, self.mode.segments(&c.config));
        if matches!(self.flow, Flow::Gamma { .. }) {
            be.fill_reals(self.gradient(last), B::Real::of(0.0))?;
        }
        for (number, first, n) in c.chunks() {
            let chunk = c.chunk(pass, Site::Block(last), self.frame_index(last, number), first, n);
            self.run_segment(be, blocks, pass, segments - 1, (number, first, n), true)?;
            self.measure_rebuilding(be, blocks, pass, (number, first, n))?;
            let (at_head, top) = (Chunk { site: Site::Head, ..chunk }, c.part(c.top, &chunk));
            let g = c.of(self.gradient(last + 1), &chunk);
            head.forward_backward(be, &at_head, top, g, c.scratch)?;
            be.check_gradient(&at_head, g)?;
            self.backpropagate(be, blocks, &chunk, last)?;
        }
        blocks.done(be, last)?;
        self.rest_of_segment(be, blocks, pass, segments - 1)
    }

    /// From `G_K` back to `G_0`.
    ///
    /// # Errors
    /// Any error of the backend or the blocks.
    pub fn backward<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
    ) -> Result<()> {
        let (c, mode) = (&self.common, &self.mode);
        let (segment, k, waits) = (mode.segment(&c.config), c.config.blocks, mode.waits(&c.config));
        let output = c.config.tail == Tail::Output;
        if output {
            c.check_given(be, pass, self.gradient(k))?;
            if matches!(self.flow, Flow::Gamma { .. }) {
                be.fill_reals(self.gradient(k - 1), B::Real::of(0.0))?;
            }
        }
        for s in (0..mode.segments(&c.config) - usize::from(!output)).rev() {
            let last = ((s + 1) * segment).min(k) - 1;
            for (number, first, n) in c.chunks() {
                if !waits {
                    self.run_segment(be, blocks, pass, s, (number, first, n), true)?;
                }
                let frame = self.frame_index(last, number);
                let chunk = c.chunk(pass, Site::Block(last), frame, first, n);
                self.backpropagate(be, blocks, &chunk, last)?;
            }
            blocks.done(be, last)?;
            self.rest_of_segment(be, blocks, pass, s)?;
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

    /// As [`Reversible::infer`](super::Reversible::infer).
    ///
    /// # Errors
    /// As [`Reversible::infer`](super::Reversible::infer).
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

    /// Frame of block `k` and chunk `c`.
    fn frame_index(&self, k: usize, c: usize) -> usize {
        let config = &self.common.config;
        if self.mode.one_frame(config) {
            return 0;
        }
        (k % self.mode.segment(config)) * config.batch.div_ceil(config.chunk) + c
    }

    /// γ of the step of block `k`, which has none where mode `bdia` has none.
    fn gamma_at(&self, k: usize) -> FloatGamma {
        let plain = k == 0 || self.ends_plain() && k + 1 == self.common.config.blocks;
        match self.flow {
            Flow::Gamma { gamma, .. } if !plain => gamma,
            _ => FloatGamma::ZERO,
        }
    }

    /// As [`Policy::ends_plain`](crate::update::Policy::ends_plain), before a head.
    fn ends_plain(&self) -> bool {
        let shared = matches!(self.flow, Flow::Gamma { gamma, .. } if gamma.sign() == Sign::Shared);
        shared && self.common.config.tail == Tail::Head
    }

    /// Runs segment `s` on one chunk, from its stored input to the stored input of the next one, or
    /// to `x_K`.
    fn run_segment<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
        s: usize,
        (number, first, n): (usize, usize, usize),
        keep: bool,
    ) -> Result<()> {
        let c = &self.common;
        let (segment, k) = (self.mode.segment(&c.config), c.config.blocks);
        let whole = c.config.batch * c.config.per_sample;
        let range = s * segment..((s + 1) * segment).min(k);
        let output = c.config.tail == Tail::Output;
        for j in range.clone() {
            let chunk = c.chunk(pass, Site::Block(j), self.frame_index(j, number), first, n);
            let (h, call) = (c.part(c.h, &chunk), c.call(chunk, j, keep));
            match self.flow {
                Flow::Grid { grid, saved, running } => {
                    let running = running.sub(0, call.x.len());
                    if j == range.start {
                        be.copy_ints(c.of_ints(saved.sub(s * whole, whole), &chunk), running)?;
                    }
                    be.dequantize(grid, running, call.x)?;
                }
                Flow::Float { saved } if j == range.start && !saved.is_empty() => {
                    be.copy_reals(c.of(saved.sub(s * whole, whole), &chunk), call.x)?;
                }
                Flow::Float { .. } | Flow::Gamma { .. } => {}
            }
            blocks.residual(be, &call, h)?;
            if let Flow::Grid { grid, running, .. } = self.flow {
                be.check_input(&chunk, grid, running.sub(0, call.x.len()), call.x)?;
            }
            let ends = j + 1 == range.end;
            if ends && keep && (j + 1 < k || (output && !self.mode.waits(&c.config))) {
                // A recomputed segment: its result is known, only its frames were wanted.
                return Ok(());
            }
            let last = if output { c.of(self.output, &chunk) } else { c.part(c.top, &chunk) };
            let after = (s + 1) * whole;
            let saved = match self.flow {
                Flow::Grid { grid, saved, running } => {
                    let running = running.sub(0, call.x.len());
                    be.add_quantized(&chunk, grid, running, h, Words::EMPTY)?;
                    if j + 1 == k {
                        be.dequantize(grid, running, last)?;
                    } else if ends {
                        be.copy_ints(running, c.of_ints(saved.sub(after, whole), &chunk))?;
                    }
                    continue;
                }
                Flow::Float { saved } => saved,
                Flow::Gamma { .. } => Reals::EMPTY,
            };
            let target = if j + 1 == k {
                last
            } else if ends {
                c.of(saved.sub(after, whole), &chunk)
            } else {
                c.input_of(&Chunk { frame: self.frame_index(j + 1, number), ..chunk })
            };
            let gamma = self.gamma_at(j);
            if gamma.magnitude() != 0.0 {
                let before = Chunk { frame: self.frame_index(j - 1, number), ..chunk };
                be.copy_reals(c.input_of(&before), target)?;
            }
            be.blend(&chunk, gamma, target, call.x, h)?;
        }
        Ok(())
    }

    /// The VJPs of a segment below its last block, whose frames are all there.
    fn rest_of_segment<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
        s: usize,
    ) -> Result<()> {
        let c = &self.common;
        let (segment, k) = (self.mode.segment(&c.config), c.config.blocks);
        for j in (s * segment..((s + 1) * segment).min(k) - 1).rev() {
            for (number, first, n) in c.chunks() {
                let chunk = c.chunk(pass, Site::Block(j), self.frame_index(j, number), first, n);
                self.backpropagate(be, blocks, &chunk, j)?;
            }
            blocks.done(be, j)?;
        }
        Ok(())
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
        if matches!(self.flow, Flow::Gamma { .. }) {
            be.combine(chunk, self.gamma_at(k), next, cur, h)?;
        } else {
            be.copy_reals(cur, h)?;
        }
        c.vjp(be, blocks, chunk, k, cur)
    }

    /// `bdia-float` with `verify`: rebuilds the chunk's activations from `x_K` and `x_{K-1}` and
    /// keeps the largest error.
    fn measure_rebuilding<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
        (number, first, n): (usize, usize, usize),
    ) -> Result<()> {
        let Flow::Gamma { gamma, spare: Some([input, frame]), .. } = self.flow else {
            return Ok(());
        };
        if gamma.magnitude() == 0.0 {
            return Ok(());
        }
        let (c, k) = (&self.common, self.common.config.blocks);
        let of = |j: usize| c.chunk(pass, Site::Block(j), self.frame_index(j, number), first, n);
        let stored = |j: usize| c.input_of(&of(j));
        let probe = c.chunk(pass, Site::Block(0), 0, first, n);
        // `far` holds x_{j+1} and becomes x_{j-1}; `near` holds x_j.
        let (mut far, mut near) = (c.part(c.top, &probe), c.part(input, &probe));
        // x_K is needed by the head afterwards: it waits in G, which the head sets.
        let keep = c.of(self.gradient(k), &probe);
        be.copy_reals(far, keep)?;
        // A plain last step is not inverted: x_{K-1} and x_{K-2} are kept.
        let last = if self.ends_plain() && k > 1 {
            be.copy_reals(stored(k - 1), far)?;
            k - 1
        } else {
            k
        };
        be.copy_reals(stored(last - 1), near)?;
        let mut worst = 0.0_f64;
        for j in (1..last).rev() {
            let chunk = of(j);
            let h = c.part(c.h, &chunk);
            let call = Call { x: near, frame, ..c.call(chunk, j, false) };
            blocks.residual(be, &call, h)?;
            be.unblend(&chunk, gamma, far, near, h)?;
            (far, near) = (near, far);
            worst = worst.max(largest_difference(be, near, stored(j - 1))?);
        }
        be.copy_reals(keep, c.part(c.top, &probe))?;
        if let Flow::Gamma { rebuild_error, .. } = &mut self.flow {
            *rebuild_error = rebuild_error.max(worst);
        }
        Ok(())
    }
}

/// Largest `|a − b|`, piece by piece through the host; infinite where one of them is not a number.
///
/// # Errors
/// Any error of the backend.
pub fn largest_difference<B: Storage>(be: &B, a: Reals, b: Reals) -> Result<f64> {
    let (mut pa, mut pb) = ([B::Real::of(0.0); 64], [B::Real::of(0.0); 64]);
    let (mut worst, mut at) = (0.0_f64, 0);
    while at < a.len() {
        let n = pa.len().min(a.len() - at);
        be.read_reals(a.sub(at, n), &mut pa[..n])?;
        be.read_reals(b.sub(at, n), &mut pb[..n])?;
        for (x, y) in pa[..n].iter().zip(&pb[..n]) {
            let d = (x.wide() - y.wide()).abs();
            worst = if d.is_nan() { f64::INFINITY } else { worst.max(d) };
        }
        at += n;
    }
    Ok(worst)
}
