//! Token and position embedding: `x = dropout(scale·(wte[token] + wpe[position]))`.

use super::{Init, Parameter, Tensor};
use crate::arena::{Ints, Reals};
use crate::backend::{Backend, Chunk, Columns};
use crate::error::Result;
use crate::packing::Packed;
use crate::real::Real;
use crate::rng::Draw;
use crate::stack::Input;

/// The input of a language model. Parameters and gradients belong to the model.
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
    /// The same where it is stored in few bits.
    pub packed: Option<Packed>,
    /// `[≥ T, d]`; empty where positions are not learned.
    pub wpe: Parameter,
    /// Factor of the sum: 1, or `√d` (Gemma). Another one than 1 needs `[samples·T, d]` of scratch.
    pub scale: f64,
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

    /// `to = scale·from`.
    fn scaled<B: Backend>(&self, be: &mut B, from: Reals, to: Reals) -> Result<()> {
        be.fill_reals(to, B::Real::of(0.0))?;
        let of = |of| Columns { of, stride: self.width, at: 0 };
        be.add_columns(self.width, self.scale, of(from), of(to))
    }

    /// `x = wte[token] + wpe[position]`.
    fn look_up<B: Backend>(&self, be: &mut B, chunk: &Chunk, x: Reals) -> Result<()> {
        let (tokens, positions) = (self.tokens(chunk), self.wpe.value);
        let Some(packed) = &self.packed else {
            return be.embed(chunk, tokens, self.wte.value, positions, self.width, x);
        };
        be.unpack_rows(chunk, packed, tokens, x)?;
        if positions.is_empty() {
            return Ok(());
        }
        let sample = self.per_sample * self.width;
        let positions = positions.sub(0, sample);
        (0..chunk.samples).try_for_each(|i| be.add(x.sub(i * sample, sample), positions))
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
        scratch: Reals,
    ) -> Result<()> {
        let to = if self.scale == 1.0 { x } else { scratch.sub(0, x.len()) };
        self.look_up(be, chunk, to)?;
        if self.scale != 1.0 {
            self.scaled(be, to, x)?;
        }
        if train && self.dropout > 0.0 {
            be.dropout(chunk, Draw::EmbeddingDropout, self.dropout, x)?;
        }
        Ok(())
    }

    fn vjp(&mut self, be: &mut B, chunk: &Chunk, gx: Reals, scratch: Reals) -> Result<()> {
        if self.wte.grad.is_empty() && self.wpe.grad.is_empty() {
            return Ok(());
        }
        if self.dropout > 0.0 {
            be.dropout(chunk, Draw::EmbeddingDropout, self.dropout, gx)?;
        }
        let mut g = gx;
        if self.scale != 1.0 {
            g = scratch.sub(0, gx.len());
            self.scaled(be, gx, g)?;
        }
        be.embed_vjp(chunk, self.tokens(chunk), g, self.width, self.wte.grad, self.wpe.grad)
    }
}
