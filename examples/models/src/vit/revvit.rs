//! The two-stream reversible network that BDIA is compared with (Mangalam et al., "Reversible
//! Vision Transformers", 2022), over the same attention and MLP branches as the ordinary stack.
//!
//! ```text
//! y1 = x1 + f(x2)   y2 = x2 + g(y1)   both streams start as the embedding; the head reads y1 + y2
//! x2 = y2 - g(y1)   x1 = y1 - f(x2)   the inverse: in float, so it is exact up to rounding only
//! ```
//! The mean of the streams differs from their sum by a factor, which the head's norm takes out.

use bdia_core::arena::{Category, Layout, Reals, product};
use bdia_core::backend::{Backend, Chunk, Columns};
use bdia_core::error::Result;
use bdia_core::layers::PreNorm;
use bdia_core::stack::{Blocks, Call, Config, Head, Input, Pass, largest_difference};
use bdia_core::{Fault, Site};

/// The blocks' branches.
const F: usize = 0;
const G: usize = 1;

/// The two streams laid out in the arenas of a backend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RevStack {
    config: Config,
    /// The streams, whole batch.
    x: [Reals; 2],
    /// Their gradients.
    g: [Reals; 2],
    frame: Reals,
    /// One chunk: a branch's output.
    h: Reals,
    /// One chunk: the sum of the streams.
    top: Reals,
    scratch: Reals,
    /// The embedding of the whole batch, with `verify`.
    original: Reals,
    rebuild_error: f64,
}

impl RevStack {
    /// Lays the streams out.
    ///
    /// # Errors
    /// [`bdia_core::Error::TooLarge`] for sizes beyond the address space.
    pub fn layout(config: Config, verify: bool, l: &mut Layout) -> Result<Self> {
        let whole = product("activations", &[config.batch, config.per_sample])?;
        let part = product("activations of a chunk", &[config.chunk, config.per_sample])?;
        let scratch = product("scratch", &[config.chunk, config.needs.scratch])?
            .saturating_add(config.needs.fixed);
        Ok(Self {
            x: [0; 2].map(|_| l.reals(Category::Activations, whole)),
            g: [0; 2].map(|_| l.reals(Category::ActivationGradients, whole)),
            frame: l
                .reals(Category::Workspace, product("frame", &[config.chunk, config.needs.frame])?),
            h: l.reals(Category::Workspace, part),
            top: l.reals(Category::Workspace, part),
            scratch: l.reals(Category::Workspace, scratch.max(config.ends_scratch)),
            original: l.reals(Category::Verify, if verify { whole } else { 0 }),
            rebuild_error: 0.0,
            config,
        })
    }

    /// The configuration.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Scratch, free between calls.
    pub const fn scratch(&self) -> Reals {
        self.scratch
    }

    /// Largest difference between the embedding and what the backward pass rebuilt of it, in the
    /// last step (`verify`).
    pub const fn rebuild_error(&self) -> f64 {
        self.rebuild_error
    }

    fn chunk(&self, pass: &Pass, site: Site, first: usize, samples: usize) -> Chunk {
        Chunk {
            seed: pass.seed,
            step: pass.step,
            stack: self.config.id,
            site,
            first,
            samples,
            global: pass.global.wrapping_add(first as u32),
            frame: 0,
        }
    }

    fn of(&self, whole: Reals, chunk: &Chunk) -> Reals {
        whole.sub(chunk.first * self.config.per_sample, chunk.samples * self.config.per_sample)
    }

    fn part(&self, one: Reals, chunk: &Chunk) -> Reals {
        one.sub(0, chunk.samples * self.config.per_sample)
    }

    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (batch, chunk) = (self.config.batch, self.config.chunk);
        (0..batch).step_by(chunk).map(move |first| (first, chunk.min(batch - first)))
    }

    /// A call of block `k`; the branches take their input as an argument.
    fn call(&self, chunk: Chunk, k: usize, train: bool, keep: bool) -> Call {
        let x = Reals::EMPTY;
        Call {
            chunk,
            block: k,
            x,
            frame: self.frame,
            scratch: self.scratch,
            context: None,
            train,
            keep,
        }
    }

    /// `x -= y`.
    fn subtract<B: Backend>(&self, be: &mut B, x: Reals, y: Reals) -> Result<()> {
        let per = self.config.per_sample;
        let sample = |of| Columns { of, stride: per, at: 0 };
        be.add_columns(per, -1.0, sample(y), sample(x))
    }

    /// Block `k` of one chunk, in place.
    fn forward<B: Backend>(
        &self,
        be: &mut B,
        blocks: &PreNorm,
        call: &Call,
        [x1, x2]: [Reals; 2],
    ) -> Result<()> {
        let h = self.part(self.h, &call.chunk);
        blocks.branch(be, F, call, x2, h)?;
        be.add(x1, h)?;
        blocks.branch(be, G, call, x1, h)?;
        be.add(x2, h)
    }

    /// One forward and backward pass. The deferred status of the backend says whether it is good.
    ///
    /// # Errors
    /// Whatever the backend or the ends report.
    pub fn train<B: Backend>(
        &mut self,
        be: &mut B,
        blocks: &mut PreNorm,
        input: &mut impl Input<B>,
        head: &mut impl Head<B>,
        pass: &Pass,
    ) -> Result<()> {
        self.rebuild_error = 0.0;
        for (first, n) in self.chunks() {
            let chunk = self.chunk(pass, Site::Embedding, first, n);
            let [x1, x2] = self.x.map(|x| self.of(x, &chunk));
            input.forward(be, &chunk, true, x1, self.scratch)?;
            be.copy_reals(x1, x2)?;
            if !self.original.is_empty() {
                be.copy_reals(x1, self.of(self.original, &chunk))?;
            }
            for k in 0..self.config.blocks {
                let chunk = Chunk { site: Site::Block(k), ..chunk };
                self.forward(be, blocks, &self.call(chunk, k, true, false), [x1, x2])?;
            }
            let at_head = Chunk { site: Site::Head, ..chunk };
            let top = self.part(self.top, &chunk);
            be.copy_reals(x1, top)?;
            be.add(top, x2)?;
            let [g1, g2] = self.g.map(|g| self.of(g, &chunk));
            head.forward_backward(be, &at_head, top, g1, self.scratch)?;
            be.copy_reals(g1, g2)?;
        }
        for k in (0..self.config.blocks).rev() {
            for (first, n) in self.chunks() {
                let chunk = self.chunk(pass, Site::Block(k), first, n);
                let ([x1, x2], [g1, g2]) =
                    (self.x.map(|x| self.of(x, &chunk)), self.g.map(|g| self.of(g, &chunk)));
                let (call, h) = (self.call(chunk, k, true, true), self.part(self.h, &chunk));
                blocks.branch(be, G, &call, x1, h)?;
                self.subtract(be, x2, h)?;
                blocks.branch_vjp(be, G, &call, x1, g2, g1)?;
                blocks.branch(be, F, &call, x2, h)?;
                self.subtract(be, x1, h)?;
                be.copy_reals(g1, h)?;
                blocks.branch_vjp(be, F, &call, x2, h, g2)?;
            }
            Blocks::<B>::done(blocks, be, k)?;
        }
        for (first, n) in self.chunks() {
            let chunk = self.chunk(pass, Site::Embedding, first, n);
            let [g1, g2] = self.g.map(|g| self.of(g, &chunk));
            if !self.original.is_empty() {
                let [x1, x2] = self.x.map(|x| self.of(x, &chunk));
                let original = self.of(self.original, &chunk);
                for x in [x1, x2] {
                    let error = largest_difference(be, x, original)?;
                    if !error.is_finite() {
                        be.raise(Fault::Range {
                            site: Site::Embedding,
                            sample: first,
                            value: error,
                        });
                    }
                    self.rebuild_error = self.rebuild_error.max(error);
                }
            }
            be.add(g1, g2)?;
            input.vjp(be, &chunk, g1, self.scratch)?;
        }
        Ok(())
    }

    /// Inference over `samples` samples, at most a chunk: the place of `y1 + y2`.
    ///
    /// # Errors
    /// Whatever the backend or the input report.
    pub fn infer<B: Backend>(
        &self,
        be: &mut B,
        blocks: &PreNorm,
        input: &mut impl Input<B>,
        samples: usize,
    ) -> Result<Reals> {
        let chunk = self.chunk(&Pass { seed: 0, step: 0, global: 0 }, Site::Embedding, 0, samples);
        let [x1, x2] = self.x.map(|x| self.of(x, &chunk));
        input.forward(be, &chunk, false, x1, self.scratch)?;
        be.copy_reals(x1, x2)?;
        for k in 0..self.config.blocks {
            let chunk = Chunk { site: Site::Block(k), ..chunk };
            self.forward(be, blocks, &self.call(chunk, k, false, false), [x1, x2])?;
        }
        be.add(x1, x2)?;
        Ok(x1)
    }
}
