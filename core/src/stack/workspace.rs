//! What both machines share: sizes, the memory of one chunk, and inference.

use super::blocks::{Blocks, Call, Context, Input};
use super::{Config, Mode, Pass, Tail};
use crate::arena::{Category, Ints, Layout, Reals, product};
use crate::backend::{Chunk, UpdateOps};
use crate::error::{Error, Result, Site, ok};
use crate::update::FloatGamma;

/// What stacks that run one after the other share, such as an encoder and its decoder: the memory
/// of one chunk, and the gradients `G`, which are free again after a stack's backward pass. (The
/// intermediates that modes other than `bdia` and `checkpoint 1` store belong to each stack alone.)
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Workspace {
    pub(super) g: [Reals; 2],
    pub(super) inputs: Reals,
    pub(super) frames: Reals,
    pub(super) h: Reals,
    pub(super) top: Reals,
    pub(super) top_ints: Ints,
    pub(super) scratch: Reals,
}

impl Workspace {
    /// Lays out what each of these stacks needs.
    ///
    /// # Errors
    /// As [`Stack::layout`](super::Stack::layout).
    pub const fn layout(stacks: &[(Config, Mode)], layout: &mut Layout) -> Result<Self> {
        let mut most =
            Sizes { samples: 0, whole: 0, part: 0, inputs: 0, frame: 0, frames: 0, scratch: 0 };
        let (mut pair, mut ints, mut i) = (0, 0, 0);
        while i < stacks.len() {
            let (config, mode) = (&stacks[i].0, &stacks[i].1);
            let s = ok!(Sizes::of(config, mode));
            most.whole = larger(most.whole, s.whole);
            most.part = larger(most.part, s.part);
            most.scratch = larger(most.scratch, s.scratch);
            if !mode.stores_frames(config) {
                most.inputs = larger(most.inputs, s.inputs);
                most.frames = larger(most.frames, s.frames);
            }
            if matches!(mode, Mode::Bdia { .. } | Mode::BdiaFloat { .. }) {
                pair = larger(pair, s.whole);
            }
            if matches!(mode, Mode::Bdia { .. }) {
                ints = larger(ints, s.part);
            }
            i += 1;
        }
        let l = layout;
        Ok(Self {
            g: [
                l.reals(Category::ActivationGradients, most.whole),
                l.reals(Category::ActivationGradients, pair),
            ],
            inputs: l.reals(Category::Workspace, most.inputs),
            frames: l.reals(Category::Workspace, most.frames),
            h: l.reals(Category::Workspace, most.part),
            top: l.reals(Category::Workspace, most.part),
            top_ints: l.ints(Category::Workspace, ints),
            scratch: l.reals(Category::Workspace, most.scratch),
        })
    }
}

impl Mode {
    /// Blocks in a segment.
    pub(super) const fn segment(&self, config: &Config) -> usize {
        match self {
            Self::Checkpoint { every, .. } => smaller(*every, config.blocks),
            _ => config.blocks,
        }
    }

    /// Number of segments.
    pub(super) const fn segments(&self, config: &Config) -> usize {
        config.blocks.div_ceil(self.segment(config))
    }

    /// Whether a single segment waits from the forward to the backward pass with all its
    /// intermediates, because something else runs in between.
    pub(super) const fn waits(&self, config: &Config) -> bool {
        matches!(config.tail, Tail::Output)
            && !matches!(self, Self::Bdia { .. })
            && self.segments(config) == 1
    }

    /// Whether all chunks of a block use one frame: their inputs are somewhere else, too.
    pub(super) const fn one_frame(&self, config: &Config) -> bool {
        let saved = self.segments(config) > 1
            || matches!(
                self,
                Self::Standard { grid: Some(_) } | Self::Checkpoint { grid: Some(_), .. }
            );
        matches!(self, Self::Bdia { .. })
            || (self.segment(config) == 1 && saved && !self.waits(config))
    }

    /// Whether intermediates are stored rather than recomputed.
    pub(super) const fn stores_frames(&self, config: &Config) -> bool {
        self.waits(config) || !matches!(self, Self::Bdia { .. } | Self::Checkpoint { every: 1, .. })
    }
}

/// Numbers of values of a stack's buffers.
pub(super) struct Sizes {
    /// Samples of a chunk.
    pub(super) samples: usize,
    /// Activations of a batch, and of a chunk.
    pub(super) whole: usize,
    pub(super) part: usize,
    /// All inputs of blocks that are there at a time.
    pub(super) inputs: usize,
    /// One frame, and all.
    pub(super) frame: usize,
    pub(super) frames: usize,
    pub(super) scratch: usize,
}

impl Sizes {
    pub(super) const fn of(config: &Config, mode: &Mode) -> Result<Self> {
        let b = ok!(positive("batch", config.batch));
        let p = ok!(positive("values of a sample", config.per_sample));
        ok!(positive("blocks", config.blocks));
        if config.blocks > 1 << 16 {
            return Err(Error::setting("blocks", config.blocks as f64, "up to 65536"));
        }
        if let Mode::Checkpoint { every, .. } = mode {
            ok!(positive("checkpoint-every", *every));
        }
        let samples = smaller(ok!(positive("chunk", config.chunk)), b);
        let part = ok!(product("activations of a chunk", &[samples, p]));
        let count = if mode.one_frame(config) {
            1
        } else {
            ok!(product("frames", &[mode.segment(config), b.div_ceil(samples)]))
        };
        let frame = ok!(product("frame", &[samples, config.needs.frame]));
        let Some(scratch) = ok!(product("scratch", &[samples, config.needs.scratch]))
            .checked_add(config.needs.fixed)
        else {
            return Err(Error::TooLarge("scratch"));
        };
        Ok(Self {
            samples,
            whole: ok!(product("activations", &[b, p])),
            part,
            inputs: ok!(product("inputs of blocks", &[count, part])),
            frame,
            frames: ok!(product("frames", &[count, frame])),
            scratch: larger(scratch, config.ends_scratch),
        })
    }
}

const fn positive(what: &'static str, n: usize) -> Result<usize> {
    if n == 0 { Err(Error::setting(what, 0.0, "1 or more")) } else { Ok(n) }
}

const fn smaller(a: usize, b: usize) -> usize {
    if a < b { a } else { b }
}

pub(super) const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

/// The sizes of a stack and the memory of one chunk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Common {
    /// With the chunk that is used.
    pub(super) config: Config,
    /// `x_k` of every frame.
    pub(super) inputs: Reals,
    pub(super) frames: Reals,
    /// `h_k`, then the gradient that the block's VJP is applied to.
    pub(super) h: Reals,
    /// `x_K`.
    pub(super) top: Reals,
    pub(super) scratch: Reals,
    pub(super) context: Option<Context>,
}

impl Common {
    /// Around a workspace that was made for this stack and others. What a mode stores in place of
    /// recomputing it is `layout`'s.
    pub(super) const fn layout(
        config: &Config,
        mode: &Mode,
        workspace: &Workspace,
        layout: &mut Layout,
    ) -> Result<Self> {
        let (s, w) = (ok!(Sizes::of(config, mode)), workspace);
        let (inputs, frames) = if mode.stores_frames(config) {
            (
                layout.reals(Category::Activations, s.inputs),
                layout.reals(Category::Activations, s.frames),
            )
        } else {
            (w.inputs.sub(0, s.inputs), w.frames.sub(0, s.frames))
        };
        Ok(Self {
            config: Config { chunk: s.samples, ..*config },
            inputs,
            frames,
            h: w.h.sub(0, s.part),
            top: w.top.sub(0, s.part),
            scratch: w.scratch.sub(0, s.scratch),
            context: None,
        })
    }

    /// The chunks of the batch: number, first sample and number of samples.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (batch, chunk) = (self.config.batch, self.config.chunk);
        (0..batch.div_ceil(chunk)).map(move |c| (c, c * chunk, chunk.min(batch - c * chunk)))
    }

    pub(super) fn chunk(
        &self,
        pass: &Pass,
        site: Site,
        frame: usize,
        first: usize,
        samples: usize,
    ) -> Chunk {
        Chunk {
            seed: pass.seed,
            step: pass.step,
            stack: self.config.id,
            site,
            first,
            samples,
            global: pass.global.wrapping_add(first as u32),
            frame,
        }
    }

    /// The part of a whole-batch tensor of reals.
    pub(super) fn of(&self, whole: Reals, chunk: &Chunk) -> Reals {
        let per = self.config.per_sample;
        whole.sub(chunk.first * per, chunk.samples * per)
    }

    pub(super) fn of_ints(&self, whole: Ints, chunk: &Chunk) -> Ints {
        let per = self.config.per_sample;
        whole.sub(chunk.first * per, chunk.samples * per)
    }

    /// The part of a one-chunk tensor.
    pub(super) fn part(&self, one: Reals, chunk: &Chunk) -> Reals {
        one.sub(0, chunk.samples * self.config.per_sample)
    }

    pub(super) fn input_of(&self, chunk: &Chunk) -> Reals {
        let part = self.config.chunk * self.config.per_sample;
        self.part(self.inputs.sub(chunk.frame * part, part), chunk)
    }

    fn frame_of(&self, chunk: &Chunk) -> Reals {
        let frame = self.config.chunk * self.config.needs.frame;
        self.frames.sub(chunk.frame * frame, frame)
    }

    pub(super) fn call(&self, chunk: Chunk, block: usize, keep: bool) -> Call {
        let context = self.context.map(|c| {
            let slice = |r: Reals| {
                let per = r.len() / self.config.batch;
                r.sub(chunk.first * per, chunk.samples * per)
            };
            Context { value: slice(c.value), grad: slice(c.grad) }
        });
        let (x, frame) = (self.input_of(&chunk), self.frame_of(&chunk));
        Call { chunk, block, x, frame, scratch: self.scratch, context, train: true, keep }
    }

    /// Tests the `G_K` of the whole batch that the stack's caller has set.
    pub(super) fn check_given<B: UpdateOps>(
        &self,
        be: &mut B,
        pass: &Pass,
        g: Reals,
    ) -> Result<()> {
        for (_, first, n) in self.chunks() {
            let chunk = self.chunk(pass, Site::Head, 0, first, n);
            be.check_gradient(&chunk, self.of(g, &chunk))?;
        }
        Ok(())
    }

    /// The block's vector-Jacobian product of what [`h`](Self::h) holds, and a test of what it has
    /// added to `gx` and to the context's gradient.
    pub(super) fn vjp<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        chunk: &Chunk,
        k: usize,
        gx: Reals,
    ) -> Result<()> {
        let call = self.call(*chunk, k, true);
        blocks.vjp(be, &call, self.part(self.h, chunk), gx)?;
        be.check_gradient(chunk, gx)?;
        call.context.map_or(Ok(()), |context| be.check_gradient(chunk, context.grad))
    }

    /// Gives the gradient of `x_0` to the input; `g` is that of the whole batch.
    pub(super) fn embed_vjp<B: UpdateOps>(
        &self,
        be: &mut B,
        input: &mut impl Input<B>,
        pass: &Pass,
        g: Reals,
    ) -> Result<()> {
        for (_, first, n) in self.chunks() {
            let chunk = self.chunk(pass, Site::Embedding, 0, first, n);
            input.vjp(be, &chunk, self.of(g, &chunk), self.scratch)?;
        }
        Ok(())
    }

    /// Refuses more samples than inference has room for.
    pub(super) fn fits(&self, samples: usize) -> Result<()> {
        let expected = self.config.chunk;
        if samples > expected {
            return Err(Error::Shape { what: "samples of inference", expected, found: samples });
        }
        Ok(())
    }

    pub(super) fn infer<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        samples: usize,
        gamma: FloatGamma,
    ) -> Result<Reals> {
        self.fits(samples)?;
        let at = |site| self.chunk(&Pass::INFERENCE, site, 0, 0, samples);
        let embedding = at(Site::Embedding);
        let (mut cur, mut other) = (self.input_of(&embedding), self.part(self.top, &embedding));
        input.forward(be, &embedding, false, cur, self.scratch)?;
        for k in 0..self.config.blocks {
            let chunk = at(Site::Block(k));
            let h = self.part(self.h, &chunk);
            let call = Call { x: cur, train: false, ..self.call(chunk, k, false) };
            blocks.residual(be, &call, h)?;
            be.blend(&chunk, if k == 0 { FloatGamma::ZERO } else { gamma }, other, cur, h)?;
            (cur, other) = (other, cur);
        }
        Ok(cur)
    }
}
