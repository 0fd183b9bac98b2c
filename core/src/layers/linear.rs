//! The linear layer `y = x·W + b`; weights are `[in, out]`.

use super::Matrix;
use crate::arena::Reals;
use crate::backend::{NnOps, Order, Product};
use crate::error::Result;

/// `y[rows, out] = x[rows, in]·W[in, out] + b`, without the bias where that is empty.
///
/// # Errors
/// Any error of the backend.
pub fn linear<B: NnOps>(
    be: &mut B,
    rows: usize,
    w: Matrix,
    b: Reals,
    x: Reals,
    y: Reals,
) -> Result<()> {
    let (a, order) = (Order::Plain, Order::Plain);
    let (cols, inner) = (w.outputs, w.inputs);
    let p = Product { rows, cols, inner, a, b: order, accumulate: false };
    be.matmul(&p, x, w.values, Some(b).filter(|b| !b.is_empty()), y)
}

/// The gradients of [`linear`]: `dW += xᵀ·dy`, `db += Σ dy`, and `dx = dy·Wᵀ`; each is left out
/// where its handle is empty.
///
/// # Errors
/// Any error of the backend.
pub fn linear_vjp<B: NnOps>(
    be: &mut B,
    rows: usize,
    w: Matrix,
    (dw, db): (Reals, Reals),
    x: Reals,
    dy: Reals,
    dx: Reals,
) -> Result<()> {
    let (inner, cols) = (w.inputs, w.outputs);
    if !dw.is_empty() {
        let (a, b) = (Order::Transposed, Order::Plain);
        let p = Product { rows: inner, cols, inner: rows, a, b, accumulate: true };
        be.matmul(&p, x, dy, None, dw)?;
    }
    if !db.is_empty() {
        be.sum_rows(dy, db)?;
    }
    if dx.is_empty() {
        return Ok(());
    }
    let (a, b) = (Order::Plain, Order::Transposed);
    let p = Product { rows, cols: inner, inner: cols, a, b, accumulate: false };
    be.matmul(&p, dy, w.values, None, dx)
}
