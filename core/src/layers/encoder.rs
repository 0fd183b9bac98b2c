//! What lies between an encoder and its decoder.

use super::{Init, Parameter, Tensor};
use crate::arena::Reals;
use crate::backend::Backend;
use crate::error::Result;
use crate::real::Real;
use crate::stack::{Context, Stack};

/// The memory of a decoder, `norm(x_K)` of its encoder, and the way back. Parameters and gradients
/// belong to the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncoderOutput {
    /// `ε` of the norm.
    pub eps: f64,
    /// Weight and bias of the norm, `[d]` each.
    pub norm: [Parameter; 2],
    /// The memory and its gradient, `[B, S, d]` each.
    pub context: Context,
    /// `[B · S, 2]`, mean and rstd.
    pub stats: Reals,
}

impl EncoderOutput {
    /// The norm's tensors.
    pub const fn tensors(width: usize) -> [Tensor; 2] {
        [
            Tensor::vector("encoder.norm.weight", width, Init::Ones),
            Tensor::vector("encoder.norm.bias", width, Init::Zeros),
        ]
    }

    /// The memory from the result of the encoder's forward pass; its gradient becomes 0.
    ///
    /// # Errors
    /// Any error of the backend or of [`Stack::output`].
    pub fn forward<B: Backend>(&self, be: &mut B, encoder: &Stack) -> Result<()> {
        let x = encoder.output(be)?;
        self.normalize(be, x, self.context.value, self.stats)?;
        be.fill_reals(self.context.grad, B::Real::of(0.0))
    }

    /// The norm of some rows alone.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn normalize<B: Backend>(
        &self,
        be: &mut B,
        x: Reals,
        y: Reals,
        stats: Reals,
    ) -> Result<()> {
        let [weight, bias] = self.norm;
        be.layer_norm(self.eps, weight.value, bias.value, x, y, stats)
    }

    /// After the decoder's backward pass: the gradient of the encoder's result, where its backward
    /// pass expects it. The memory is overwritten.
    ///
    /// # Errors
    /// Any error of the backend or of [`Stack::output`].
    pub fn vjp<B: Backend>(&self, be: &mut B, encoder: &Stack) -> Result<()> {
        let (x, Context { value, grad }) = (encoder.output(be)?, self.context);
        be.fill_reals(value, B::Real::of(0.0))?;
        let [w, b] = self.norm;
        be.layer_norm_vjp(w.value, x, self.stats, grad, value, w.grad, b.grad)?;
        be.copy_reals(value, x)
    }
}
