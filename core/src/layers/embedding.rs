//! Token and position embedding: `x = dropout(wte[token] + wpe[position])`.

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
    pub wte: Reals,
    /// `[≥ T, d]`.
    pub wpe: Reals,
    /// Gradient of `wte`; empty where both tables are frozen.
    pub dwte: Reals,
    /// Gradient of `wpe`; empty where both tables are frozen.
    pub dwpe: Reals,
    /// Dropout of the sum.
    pub dropout: f64,
}

impl TokenEmbedding {
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
        be.embed(chunk, self.tokens(chunk), self.wte, self.wpe, self.width, x)?;
        if train && self.dropout > 0.0 {
            be.dropout(chunk, Draw::EmbeddingDropout, self.dropout, x)?;
        }
        Ok(())
    }

    fn vjp(&mut self, be: &mut B, chunk: &Chunk, gx: Reals, _: Reals) -> Result<()> {
        if self.dwte.is_empty() && self.dwpe.is_empty() {
            return Ok(());
        }
        if self.dropout > 0.0 {
            be.dropout(chunk, Draw::EmbeddingDropout, self.dropout, gx)?;
        }
        be.embed_vjp(chunk, self.tokens(chunk), gx, self.width, self.dwte, self.dwpe)
    }
}
