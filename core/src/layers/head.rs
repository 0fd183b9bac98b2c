//! Final norm, logits and loss: `loss = cross_entropy(norm(x_K)·Wᵀ, targets)`, a few rows of logits
//! at a time.

use super::{Init, Norm, Parameter, Tensor};
use crate::arena::{Ints, Reals};
use crate::backend::{Backend, Chunk, Columns, CrossEntropy, Order, Product};
use crate::error::Result;
use crate::packing::Packed;
use crate::real::Real;
use crate::stack::Head;

/// The head of a language model. Parameters and gradients belong to the model; `weight` is
/// the embedding where tied.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LmHead {
    /// Width `d`.
    pub width: usize,
    /// Tokens `T` of a sample.
    pub per_sample: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// The norm before the logits.
    pub norm: Norm,
    /// `[vocab, d]`. Gradients that are empty are not computed.
    pub weight: Parameter,
    /// The weight where it is stored in few bits, and room for its pieces:
    /// [`tile`](Self::tile) values.
    pub packed: Option<(Packed, Reals)>,
    /// `[B, T]`; negative: masked.
    pub targets: Ints,
    /// `[micro-batches, B, T]`: the loss of every token.
    pub losses: Reals,
    /// The micro-batch that is trained on. [`loss`](Self::loss) writes to the place of the first.
    pub micro_batch: usize,
    /// `[rows at once, vocab]`.
    pub logits: Reals,
    /// `1 / number of unmasked targets` of the whole optimizer step.
    pub scale: f64,
    /// Label smoothing of training; [`loss`](Self::loss) has none.
    pub smoothing: f64,
}

impl LmHead {
    /// The tensors of a GPT-2: the norm's, and the matrix of the logits, which a model with tied
    /// embeddings does not have.
    pub const fn tensors(vocab: usize, width: usize, tied: bool) -> [Tensor; 3] {
        [
            Tensor::vector("ln_f.weight", width, Init::Ones),
            Tensor::vector("ln_f.bias", width, Init::Zeros),
            Tensor::matrix("lm_head.weight", vocab, width, Init::Normal(0.02)).when(!tied),
        ]
    }

    /// Reals of scratch for chunks of `samples` samples.
    pub const fn scratch(width: usize, per_sample: usize, samples: usize) -> usize {
        samples.saturating_mul(per_sample).saturating_mul(width.saturating_mul(2).saturating_add(2))
    }

    /// Rows of a weight in few bits that are unpacked at a time.
    const TILE: usize = 1024;

    /// Reals of room for the pieces of a weight in few bits, where `rows` rows of logits exist at a
    /// time.
    pub const fn tile(vocab: usize, width: usize, rows: usize) -> usize {
        let n = if vocab < Self::TILE { vocab } else { Self::TILE };
        n.saturating_mul(width.saturating_add(rows))
    }

    /// For every piece of a weight in few bits: `f` of its first row, its rows, their values
    /// `[n, d]`, and room for `[rows, n]` logits.
    fn tiles<B: Backend>(
        &self,
        be: &mut B,
        (packed, room): &(Packed, Reals),
        rows: usize,
        mut f: impl FnMut(&mut B, usize, usize, Reals, Reals) -> Result<()>,
    ) -> Result<()> {
        let most = Self::TILE.min(self.vocab);
        for first in (0..self.vocab).step_by(most.max(1)) {
            let n = most.min(self.vocab - first);
            let wide = room.sub(0, n * self.width);
            be.unpack(packed, first, wide)?;
            f(be, first, n, wide, room.sub(most * self.width, rows * n))?;
        }
        Ok(())
    }

    /// Rows of logits that exist at a time.
    fn rows_at_once(&self) -> usize {
        self.logits.len().checked_div(self.vocab).unwrap_or(0).max(1)
    }

    /// Normalizes all rows of `x`; returns them, room for their gradient, and the statistics.
    fn normalize<B: Backend>(
        &self,
        be: &mut B,
        x: Reals,
        scratch: Reals,
    ) -> Result<(Reals, Reals, Reals)> {
        let y = scratch.sub(0, x.len());
        let dy = scratch.sub(x.len(), x.len());
        let rows = x.len().checked_div(self.width).unwrap_or(0);
        let stats = scratch.sub(2 * x.len(), Norm::STATS * rows);
        self.norm.forward(be, x, y, stats)?;
        Ok((y, dy, stats))
    }

    fn logits_of<B: Backend>(&self, be: &mut B, rows: usize, y: Reals) -> Result<Reals> {
        let logits = self.logits.sub(0, rows * self.vocab);
        let p = Product {
            rows,
            cols: self.vocab,
            inner: self.width,
            a: Order::Plain,
            b: Order::Transposed,
            accumulate: false,
        };
        let Some(packed) = &self.packed else {
            be.matmul(&p, y, self.weight.value, None, logits)?;
            return Ok(logits);
        };
        be.fill_reals(logits, B::Real::of(0.0))?;
        self.tiles(be, packed, rows, |be, first, n, wide, part| {
            be.matmul(&Product { cols: n, ..p }, y, wide, None, part)?;
            let to = Columns { of: logits, stride: self.vocab, at: first };
            be.add_columns(n, 1.0, Columns { of: part, stride: n, at: 0 }, to)
        })?;
        Ok(logits)
    }

    /// `dy = dlogits·W`.
    fn logits_vjp<B: Backend>(
        &self,
        be: &mut B,
        rows: usize,
        logits: Reals,
        dy: Reals,
    ) -> Result<()> {
        let p = Product {
            rows,
            cols: self.width,
            inner: self.vocab,
            a: Order::Plain,
            b: Order::Plain,
            accumulate: false,
        };
        let Some(packed) = &self.packed else {
            return be.matmul(&p, logits, self.weight.value, None, dy);
        };
        self.tiles(be, packed, rows, |be, first, n, wide, part| {
            be.fill_reals(part, B::Real::of(0.0))?;
            let from = Columns { of: logits, stride: self.vocab, at: first };
            be.add_columns(n, 1.0, from, Columns { of: part, stride: n, at: 0 })?;
            let p = Product { inner: n, accumulate: first > 0, ..p };
            be.matmul(&p, part, wide, None, dy)
        })
    }

    fn loss_of<B: Backend>(
        &self,
        be: &mut B,
        chunk: &Chunk,
        (row, rows): (usize, usize),
        logits: Reals,
        (losses, smoothing): (Reals, f64),
    ) -> Result<()> {
        let at = chunk.first * self.per_sample + row;
        let ce = CrossEntropy {
            vocab: self.vocab,
            tokens: self.per_sample,
            row,
            scale: self.scale,
            smoothing,
        };
        be.cross_entropy(chunk, &ce, logits, self.targets.sub(at, rows), losses.sub(at, rows))
    }

    /// Losses of the chunk without gradients, for evaluation.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn loss<B: Backend>(
        &self,
        be: &mut B,
        chunk: &Chunk,
        x: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (y, ..) = self.normalize(be, x, scratch)?;
        let (all, step) = (chunk.samples * self.per_sample, self.rows_at_once());
        for row in (0..all).step_by(step) {
            let rows = step.min(all - row);
            let logits = self.logits_of(be, rows, y.sub(row * self.width, rows * self.width))?;
            self.loss_of(be, chunk, (row, rows), logits, (self.losses, 0.0))?;
        }
        Ok(())
    }

    /// Logits of the rows `x` (at most those that exist at a time): the place of `[rows, vocab]`.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn logits<B: Backend>(&self, be: &mut B, x: Reals, scratch: Reals) -> Result<Reals> {
        let (y, ..) = self.normalize(be, x, scratch)?;
        self.logits_of(be, x.len().checked_div(self.width).unwrap_or(0), y)
    }
}

impl<B: Backend> Head<B> for LmHead {
    fn forward_backward(
        &mut self,
        be: &mut B,
        chunk: &Chunk,
        x: Reals,
        gx: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (y, dy, stats) = self.normalize(be, x, scratch)?;
        let dweight = self.weight.grad;
        let (all, step, d) = (chunk.samples * self.per_sample, self.rows_at_once(), self.width);
        let batch = self.targets.len();
        let losses = self.losses.sub(self.micro_batch * batch, batch);
        for row in (0..all).step_by(step) {
            let rows = step.min(all - row);
            let (y, dy) = (y.sub(row * d, rows * d), dy.sub(row * d, rows * d));
            let logits = self.logits_of(be, rows, y)?;
            // From here on `logits` are their own gradient.
            self.loss_of(be, chunk, (row, rows), logits, (losses, self.smoothing))?;
            let p = Product {
                rows: self.vocab,
                cols: d,
                inner: rows,
                a: Order::Transposed,
                b: Order::Plain,
                accumulate: true,
            };
            if !dweight.is_empty() {
                be.matmul(&p, logits, y, None, dweight)?;
            }
            self.logits_vjp(be, rows, logits, dy)?;
        }
        be.fill_reals(gx, B::Real::of(0.0))?;
        self.norm.vjp(be, x, stats, dy, gx)
    }
}
