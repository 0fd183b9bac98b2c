//! Norms of rows: layer normalization, and root-mean-square normalization.

use super::Parameter;
use crate::arena::Reals;
use crate::backend::{Columns, NnOps, RmsNorm};
use crate::error::Result;

/// A norm outside of blocks, with its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    /// [`NnOps::layer_norm`].
    Layer {
        /// `ε`.
        eps: f64,
        /// `[d]`.
        weight: Parameter,
        /// `[d]`.
        bias: Parameter,
    },
    /// [`NnOps::rms_norm`] of whole rows.
    Rms {
        /// `ε`.
        eps: f64,
        /// [`RmsNorm::offset`].
        offset: f64,
        /// `[d]`.
        weight: Parameter,
    },
}

/// Whole rows of a matrix.
pub(super) const fn rows_of(of: Reals, width: usize) -> Columns {
    Columns { of, stride: width, at: 0 }
}

impl Norm {
    /// Most values that are kept of a row from [`forward`](Self::forward) to [`vjp`](Self::vjp).
    pub const STATS: usize = 2;

    /// `y[rows, d]` from `x[rows, d]`; `stats` has room for [`STATS`](Self::STATS) values a row.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn forward<B: NnOps>(&self, be: &mut B, x: Reals, y: Reals, stats: Reals) -> Result<()> {
        match *self {
            Self::Layer { eps, weight, bias } => {
                be.layer_norm(eps, weight.value, bias.value, x, y, stats)
            }
            Self::Rms { eps, offset, weight } => {
                let (norm, stats) = rms(eps, offset, weight.value, x, stats);
                let width = norm.width;
                be.rms_norm(&norm, weight.value, rows_of(x, width), rows_of(y, width), stats)
            }
        }
    }

    /// *Adds* to `dx` and to the gradients of the parameters.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn vjp<B: NnOps>(
        &self,
        be: &mut B,
        x: Reals,
        stats: Reals,
        dy: Reals,
        dx: Reals,
    ) -> Result<()> {
        match *self {
            Self::Layer { weight, bias, .. } => {
                be.layer_norm_vjp(weight.value, x, stats, dy, dx, weight.grad, bias.grad)
            }
            Self::Rms { eps, offset, weight } => {
                let (norm, stats) = rms(eps, offset, weight.value, x, stats);
                let [x, dy, dx] = [x, dy, dx].map(|of| rows_of(of, norm.width));
                be.rms_norm_vjp(&norm, weight.value, x, stats, dy, dx, weight.grad)
            }
        }
    }
}

/// A norm of whole rows, and the part of `stats` that it uses.
fn rms(eps: f64, offset: f64, weight: Reals, x: Reals, stats: Reals) -> (RmsNorm, Reals) {
    let width = weight.len();
    let rows = x.len().checked_div(width).unwrap_or(0);
    (RmsNorm { groups: 1, width, eps, offset }, stats.sub(0, rows))
}
