//! Token and position embedding: `x = dropout(wte[token] + wpe[position])`.

use super::{Init, Parameter, Tensor};
use crate::arena::{Ints, Reals};
use crate::backend::{Backend, Chunk};
use crate::error::Result;
use crate::rng::Draw;
use crate::stack::Input;

/// The input of a GPT-2. Parameters and gradients belong to the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenEmbedding {
    /// Width `d`.
    pub width: usize,
    /// Tokens `T` of a sample.
    pub per_sample: usize,
    /// `[B, T]`.
    pub tokens: Ints,
    /// `[vocab, d]`.
    pub wte: Parameter,
    /// `[≥ T, d]`.
    pub wpe: Parameter,
    /// Dropout of the sum.
    pub dropout: f64,
}

impl TokenEmbedding {
    /// `wte` and `wpe`, normal with deviation `sigma` at the start.
    pub const fn tensors(vocab: usize, positions: usize, width: usize, sigma: f64) -> [Tensor; 2] {
        [
            Tensor::matrix("wte.weight", vocab, width, Init::Normal(sigma)),
            Tensor::matrix("wpe.weight", positions, width, Init::Normal(sigma)),
        ]
    }

    fn tokens(&self, chunk: &Chunk) -> Ints {
        self.tokens.sub(chunk.first * self.per_sample, chunk.samples * self.per_sample)
    }
}

impl<B: Backend> Input<B> for TokenEmbedding {
    fn forward(
        &mut self,
        be: &mut B,
        chunk: &Chunk,
        train: bool,
        x: Reals,
        _: Reals,
    ) -> Result<()> {
        be.embed(chunk, self.tokens(chunk), self.wte.value, self.wpe.value, self.width, x)?;
        if train && self.dropout > 0.0 {
            be.dropout(chunk, Draw::EmbeddingDropout, self.dropout, x)?;
        }
        Ok(())
    }

    fn vjp(&mut self, be: &mut B, chunk: &Chunk, gx: Reals, _: Reals) -> Result<()> {
        if self.wte.grad.is_empty() && self.wpe.grad.is_empty() {
            return Ok(());
        }
        if self.dropout > 0.0 {
            be.dropout(chunk, Draw::EmbeddingDropout, self.dropout, gx)?;
        }
        be.embed_vjp(chunk, self.tokens(chunk), gx, self.width, self.wte.grad, self.wpe.grad)
    }
}
