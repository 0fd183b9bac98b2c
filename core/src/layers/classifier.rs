//! The head of a vision transformer: `loss = cross_entropy(norm(x_K[class token])·W + b, label)`.

use super::{Init, Matrix, Parameter, Tensor, linear, linear_vjp};
use crate::arena::{Ints, Reals};
use crate::backend::{Backend, Chunk, CrossEntropy, Order};
use crate::error::Result;
use crate::real::Real;
use crate::stack::Head;

/// Final norm of the class token, linear layer, loss. Parameters and gradients belong to the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassHead {
    /// Width `d`.
    pub width: usize,
    /// Tokens `T` of a sample; the class token is the first.
    pub per_sample: usize,
    /// `ε` of the norm.
    pub eps: f64,
    /// Weight and bias of the norm, `[d]` each.
    pub norm: [Parameter; 2],
    /// `[d, classes]`.
    pub weight: Parameter,
    /// `[classes]`.
    pub bias: Parameter,
    /// `[B]`; negative: masked.
    pub labels: Ints,
    /// `[B]`: the loss of every sample with its label.
    pub losses: Reals,
    /// `1 / number of labels` of the whole optimizer step.
    pub scale: f64,
    /// Label smoothing of training.
    pub smoothing: f64,
    /// Mixup in training.
    pub mixup: Option<Mixup>,
}

/// Two labels a sample (Zhang et al., "mixup", 2018): the loss is `share·loss(label) +
/// (1-share)·loss(other)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mixup {
    /// Share of the first label, from 0 to 1.
    pub share: f64,
    /// The second labels, `[B]`.
    pub labels: Ints,
    /// `[B]`: the loss of every sample with its second label.
    pub losses: Reals,
}

/// Handles of one chunk of `n` samples.
struct Parts {
    /// `[n, d]`: class tokens.
    class: Reals,
    /// `[n, d]`: normalized.
    y: Reals,
    /// `[n, d]`.
    dy: Reals,
    /// `[n, 2]`.
    stats: Reals,
    /// `[n, classes]`.
    logits: Reals,
    /// `[n, classes]`, for the second label.
    other: Reals,
}

impl ClassHead {
    /// The norm's tensors, weight and bias.
    pub const fn tensors(width: usize, classes: usize) -> [Tensor; 4] {
        [
            Tensor::vector("norm.weight", width, Init::Ones),
            Tensor::vector("norm.bias", width, Init::Zeros),
            Tensor::matrix("head.weight", width, classes, Init::InverseRoot),
            Tensor::vector("head.bias", classes, Init::Zeros),
        ]
    }

    const fn classes(&self) -> usize {
        self.bias.value.len()
    }

    const fn matrix(&self) -> Matrix {
        Matrix {
            values: self.weight.value,
            inputs: self.width,
            outputs: self.classes(),
            order: Order::Plain,
        }
    }

    /// Reals of scratch for chunks of `samples` samples.
    pub const fn scratch(width: usize, classes: usize, samples: usize) -> usize {
        let per =
            width.saturating_mul(3).saturating_add(classes.saturating_mul(2)).saturating_add(2);
        samples.saturating_mul(per)
    }

    fn forward<B: Backend>(&self, be: &mut B, n: usize, x: Reals, scratch: Reals) -> Result<Parts> {
        let (d, classes, [norm, bias]) = (self.width, self.classes(), self.norm);
        let mut at = 0;
        let mut take = |len: usize| {
            at += len;
            scratch.sub(at - len, len)
        };
        let parts = Parts {
            class: take(n * d),
            y: take(n * d),
            dy: take(n * d),
            logits: take(n * classes),
            other: take(n * classes),
            stats: take(2 * n),
        };
        for i in 0..n {
            be.copy_reals(x.sub(i * self.per_sample * d, d), parts.class.sub(i * d, d))?;
        }
        let (x, y) = (parts.class, parts.y);
        be.layer_norm(self.eps, norm.value, bias.value, x, y, parts.stats)?;
        linear(be, n, self.matrix(), self.bias.value, y, parts.logits)?;
        Ok(parts)
    }

    /// Logits of the chunk, `[n, classes]`: their place in the scratch.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn logits<B: Backend>(
        &self,
        be: &mut B,
        chunk: &Chunk,
        x: Reals,
        scratch: Reals,
    ) -> Result<Reals> {
        Ok(self.forward(be, chunk.samples, x, scratch)?.logits)
    }

    /// Losses of the chunk from its `logits`, without smoothing, for evaluation. The logits are
    /// overwritten.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn loss<B: Backend>(&self, be: &mut B, chunk: &Chunk, logits: Reals) -> Result<()> {
        self.cross_entropy(be, chunk, logits, (self.labels, self.losses), 0.0, self.scale)
    }

    fn cross_entropy<B: Backend>(
        &self,
        be: &mut B,
        chunk: &Chunk,
        logits: Reals,
        (labels, losses): (Ints, Reals),
        smoothing: f64,
        scale: f64,
    ) -> Result<()> {
        let ce = CrossEntropy { vocab: self.classes(), tokens: 1, row: 0, scale, smoothing };
        let (first, n) = (chunk.first, chunk.samples);
        be.cross_entropy(chunk, &ce, logits, labels.sub(first, n), losses.sub(first, n))
    }
}

impl<B: Backend> Head<B> for ClassHead {
    fn forward_backward(
        &mut self,
        be: &mut B,
        chunk: &Chunk,
        x: Reals,
        gx: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (d, n) = (self.width, chunk.samples);
        let parts = self.forward(be, n, x, scratch)?;
        let share = self.mixup.map_or(1.0, |m| m.share);
        if let Some(m) = self.mixup {
            be.copy_reals(parts.logits, parts.other)?;
            let scale = self.scale * (1.0 - share);
            self.cross_entropy(
                be,
                chunk,
                parts.other,
                (m.labels, m.losses),
                self.smoothing,
                scale,
            )?;
        }
        // From here on `logits` are their own gradient.
        let own = (self.labels, self.losses);
        self.cross_entropy(be, chunk, parts.logits, own, self.smoothing, self.scale * share)?;
        if self.mixup.is_some() {
            be.add(parts.logits, parts.other)?;
        }
        let grads = (self.weight.grad, self.bias.grad);
        linear_vjp(be, n, self.matrix(), grads, parts.y, parts.logits, parts.dy)?;
        // Only the class token has a gradient; `y` is read no more and takes it.
        be.fill_reals(parts.y, B::Real::of(0.0))?;
        let ([norm, bias], (x, gx_class)) = (self.norm, (parts.class, parts.y));
        let grads = [norm.grad, bias.grad];
        be.layer_norm_vjp(norm.value, x, parts.stats, parts.dy, gx_class, grads[0], grads[1])?;
        be.fill_reals(gx, B::Real::of(0.0))?;
        for i in 0..n {
            be.copy_reals(parts.y.sub(i * d, d), gx.sub(i * self.per_sample * d, d))?;
        }
        Ok(())
    }
}
