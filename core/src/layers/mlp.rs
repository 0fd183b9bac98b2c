//! The MLP branch `g(x) = dropout(c_proj(dropout(gelu(c_fc(ln_2(x))))))`.

use super::block::{At, Branch, Cut};
use super::{Freeze, Init, Room, Scheme, Tensor, linear, linear_vjp};
use crate::arena::Reals;
use crate::backend::{Backend, Gelu};
use crate::error::Result;
use crate::rng::Draw;
use crate::stack::Needs;

/// Dimensions and constants of an MLP branch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MlpShape {
    /// Tokens `T` of a sample.
    pub tokens: usize,
    /// Width `d`.
    pub width: usize,
    /// Hidden width.
    pub inner: usize,
    /// `ε` of the norm.
    pub eps: f64,
    /// Which GELU.
    pub gelu: Gelu,
    /// Dropout between the two layers.
    pub hidden_dropout: f64,
    /// Dropout of the branch's output.
    pub residual_dropout: f64,
    /// How matrices begin.
    pub init: Scheme,
}

/// Norm, two linear layers, GELU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mlp {
    shape: MlpShape,
    /// Norm, `c_fc`, `c_proj`: weight and bias each.
    tensors: [Tensor; 6],
}

impl Mlp {
    /// The branch; its tensors take their places in `room`.
    pub const fn new(shape: MlpShape, freeze: Freeze, room: Room) -> (Self, Room) {
        let (d, i, init) = (shape.width, shape.inner, shape.init);
        let mut tensors = [
            Tensor::vector("ln_2.weight", d, Init::Ones),
            Tensor::vector("ln_2.bias", d, Init::Zeros),
            Tensor::matrix("mlp.c_fc.weight", d, i, init.matrix(i)),
            Tensor::vector("mlp.c_fc.bias", i, Init::Zeros),
            Tensor::matrix("mlp.c_proj.weight", i, d, init.projection(d)),
            Tensor::vector("mlp.c_proj.bias", d, Init::Zeros),
        ];
        let room = room.place(&mut tensors, freeze);
        (Self { shape, tensors }, room)
    }

    /// The tensors.
    pub const fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The same for samples of another length.
    #[must_use]
    pub const fn with_tokens(mut self, tokens: usize) -> Self {
        self.shape.tokens = tokens;
        self
    }

    /// What the branch needs.
    pub const fn needs(&self) -> Needs {
        let (t, d, i) = (self.shape.tokens, self.shape.width, self.shape.inner);
        Needs {
            // ln_2; c_fc before and after GELU; statistics of the norm.
            frame: t.saturating_mul(d.saturating_add(i.saturating_mul(2)).saturating_add(2)),
            // Backward: d and dact.
            scratch: t.saturating_mul(d.saturating_add(i)),
            fixed: 0,
        }
    }

    fn frame(&self, at: &At<'_>, rows: usize) -> Frame {
        let (d, i) = (self.shape.width, self.shape.inner);
        let mut cut = Cut(at.frame);
        Frame {
            ln_2: cut.take(rows * d),
            c_fc: cut.take(rows * i),
            act: cut.take(rows * i),
            stats: cut.take(2 * rows),
        }
    }
}

/// The intermediates of one call, for `rows` rows.
struct Frame {
    /// `[rows, d]`.
    ln_2: Reals,
    /// `[rows, inner]`, before GELU.
    c_fc: Reals,
    /// `[rows, inner]`, after GELU.
    act: Reals,
    /// `[rows, 2]`, mean and rstd.
    stats: Reals,
}

impl<B: Backend> Branch<B> for Mlp {
    fn needs(&self, _: usize, _: usize) -> Needs {
        self.needs()
    }

    // Numbers of dropout are drawn by the place in a sample.
    fn by_token(&self) -> bool {
        self.shape.hidden_dropout == 0.0 && self.shape.residual_dropout == 0.0
    }

    fn forward(&self, be: &mut B, at: &At<'_>, x: Reals, y: Reals) -> Result<()> {
        self.again(be, at, x, y)?;
        let s = &self.shape;
        let rows = x.len().checked_div(s.width).unwrap_or(0);
        let (frame, [.., proj_w, proj_b]) = (self.frame(at, rows), &self.tensors);
        let m = at.matrix(be, proj_w)?;
        linear(be, rows, m, at.value(proj_b), frame.act, y)?;
        at.dropout(be, Draw::MlpResidualDropout, s.residual_dropout, y)
    }

    fn again(&self, be: &mut B, at: &At<'_>, x: Reals, _: Reals) -> Result<()> {
        let s = &self.shape;
        let rows = x.len().checked_div(s.width).unwrap_or(0);
        let (frame, [ln_w, ln_b, fc_w, fc_b, ..]) = (self.frame(at, rows), &self.tensors);
        be.layer_norm(s.eps, at.value(ln_w), at.value(ln_b), x, frame.ln_2, frame.stats)?;
        let m = at.matrix(be, fc_w)?;
        linear(be, rows, m, at.value(fc_b), frame.ln_2, frame.c_fc)?;
        be.gelu(s.gelu, frame.c_fc, frame.act)?;
        at.dropout(be, Draw::MlpHiddenDropout, s.hidden_dropout, frame.act)
    }

    fn vjp(&self, be: &mut B, at: &At<'_>, x: Reals, gy: Reals, gx: Reals) -> Result<()> {
        let s = &self.shape;
        let rows = x.len().checked_div(s.width).unwrap_or(0);
        let (frame, [ln_w, ln_b, fc_w, fc_b, proj_w, proj_b]) =
            (self.frame(at, rows), &self.tensors);
        let mut scratch = Cut(at.scratch);
        let (dln, dact) = (scratch.take(rows * s.width), scratch.take(rows * s.inner));
        let gy = at.dropped(be, Draw::MlpResidualDropout, s.residual_dropout, gy, dln)?;
        let m = at.matrix(be, proj_w)?;
        linear_vjp(be, rows, m, (at.slope(proj_w), at.slope(proj_b)), frame.act, gy, dact)?;
        at.dropout(be, Draw::MlpHiddenDropout, s.hidden_dropout, dact)?;
        be.gelu_vjp(s.gelu, frame.c_fc, dact)?;
        let m = at.matrix(be, fc_w)?;
        linear_vjp(be, rows, m, (at.slope(fc_w), at.slope(fc_b)), frame.ln_2, dact, dln)?;
        let (weight, slopes) = (at.value(ln_w), [at.slope(ln_w), at.slope(ln_b)]);
        be.layer_norm_vjp(weight, x, frame.stats, dln, gx, slopes[0], slopes[1])
    }
}
