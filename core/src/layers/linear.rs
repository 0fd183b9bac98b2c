//! The linear layer `y = x·W + b`; weights are `[in, out]`.

use super::block::At;
use super::{Init, LoraShape, Matrix, Tensor};
use crate::arena::Reals;
use crate::backend::{Columns, NnOps, Order, Product};
use crate::error::Result;
use crate::real::Real;

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
    let (cols, inner) = (w.outputs, w.inputs);
    let p = Product { rows, cols, inner, a: Order::Plain, b: w.order, accumulate: false };
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
    let (a, b) = (Order::Plain, w.order.transposed());
    let p = Product { rows, cols: inner, inner: cols, a, b, accumulate: false };
    be.matmul(&p, dy, w.values, None, dx)
}

/// A linear layer with an adapter, among the tensors of a branch.
///
/// ```text
/// y = x·W + b + u·B,   u = s·x·Aᵀ      A [r, in], B [r, out], s = α/r
/// ```
/// (LoRA, arXiv 2106.09685; its `B` is the transpose of ours.)
#[derive(Debug, Clone, Copy)]
pub(super) struct Linear<'a> {
    /// `[in, out]`.
    pub weight: &'a Tensor,
    /// `[out]`, or none.
    pub bias: &'a Tensor,
    /// `A` and `B`, or none.
    pub adapter: [&'a Tensor; 2],
    /// `s`.
    pub scale: f64,
}

/// The names of a layer's tensors.
pub(super) struct Names {
    pub weight: &'static str,
    pub bias: &'static str,
    pub adapter: [&'static str; 2],
}

/// [`Names`] that begin with one word.
macro_rules! names {
    ($name:literal) => {
        $crate::layers::linear::Names {
            weight: concat!($name, ".weight"),
            bias: concat!($name, ".bias"),
            adapter: [concat!($name, ".lora_A"), concat!($name, ".lora_B")],
        }
    };
}
pub(super) use names;

impl Names {
    /// Weight and bias.
    pub(super) const fn own(
        &self,
        inputs: usize,
        outputs: usize,
        bias: bool,
        init: Init,
    ) -> [Tensor; 2] {
        [
            Tensor::matrix(self.weight, inputs, outputs, init),
            Tensor::vector(self.bias, outputs, Init::Zeros).when(bias),
        ]
    }

    /// `A` and `B`. `B` begins as 0, so that the network is unchanged.
    pub(super) const fn adapter(
        &self,
        inputs: usize,
        outputs: usize,
        lora: Option<LoraShape>,
    ) -> [Tensor; 2] {
        let rank = match lora {
            Some(lora) => lora.rank,
            None => 0,
        };
        [
            Tensor::matrix(self.adapter[0], rank, inputs, Init::Adapter),
            Tensor::matrix(self.adapter[1], rank, outputs, Init::Zeros),
        ]
    }
}

impl Linear<'_> {
    const fn rank(&self) -> usize {
        if self.adapter[0].is_empty() { 0 } else { self.adapter[0].rows }
    }

    /// Sets `y` and `u`, `[rows, r]`, which is kept for [`vjp`](Self::vjp). `scratch` holds as many
    /// values as `u`.
    pub(super) fn forward<B: NnOps>(
        &self,
        be: &mut B,
        at: &At<'_>,
        rows: usize,
        x: Reals,
        (y, u): (Reals, Reals),
        scratch: Reals,
    ) -> Result<()> {
        let w = at.matrix(be, self.weight)?;
        linear(be, rows, w, at.value(self.bias), x, y)?;
        let r = self.rank();
        if r == 0 {
            return Ok(());
        }
        self.inside(be, at, rows, x, u, scratch)?;
        let p = product_of([rows, w.outputs, r], Order::Plain, Order::Plain, true);
        be.matmul(&p, u, at.value(self.adapter[1]), None, y)
    }

    /// Sets `u` alone.
    pub(super) fn inside<B: NnOps>(
        &self,
        be: &mut B,
        at: &At<'_>,
        rows: usize,
        x: Reals,
        u: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let r = self.rank();
        if r == 0 {
            return Ok(());
        }
        let (raw, a) = (scratch.sub(0, u.len()), self.adapter[0]);
        let p = product_of([rows, r, a.cols], Order::Plain, Order::Transposed, false);
        be.matmul(&p, x, at.value(a), None, raw)?;
        self.scaled(be, r, raw, u)
    }

    /// `to = s·from`, rows of `r` values.
    fn scaled<B: NnOps>(&self, be: &mut B, r: usize, from: Reals, to: Reals) -> Result<()> {
        be.fill_reals(to, B::Real::of(0.0))?;
        let of = |of| Columns { of, stride: r, at: 0 };
        be.add_columns(r, self.scale, of(from), of(to))
    }

    /// Adds to the gradients of what is trained, and sets `dx`, or adds to it. `scratch` holds
    /// twice as many values as `u`.
    pub(super) fn vjp<B: NnOps>(
        &self,
        be: &mut B,
        at: &At<'_>,
        rows: usize,
        (x, u): (Reals, Reals),
        dy: Reals,
        (dx, accumulate): (Reals, bool),
        scratch: Reals,
    ) -> Result<()> {
        let w = at.matrix(be, self.weight)?;
        linear_vjp(be, rows, w, (at.slope(self.weight), at.slope(self.bias)), x, dy, Reals::EMPTY)?;
        let (a, b) = (Order::Plain, w.order.transposed());
        let p = product_of([rows, w.inputs, w.outputs], a, b, accumulate);
        be.matmul(&p, dy, w.values, None, dx)?;
        let r = self.rank();
        if r == 0 {
            return Ok(());
        }
        let [[a, b], [da, db]] =
            [self.adapter.map(|t| at.value(t)), self.adapter.map(|t| at.slope(t))];
        let (raw, du) = (scratch.sub(0, u.len()), scratch.sub(u.len(), u.len()));
        // dB += uᵀ·dy, du = s·dy·Bᵀ, dA += duᵀ·x, dx += du·A
        let p = product_of([r, w.outputs, rows], Order::Transposed, Order::Plain, true);
        be.matmul(&p, u, dy, None, db)?;
        let p = product_of([rows, r, w.outputs], Order::Plain, Order::Transposed, false);
        be.matmul(&p, dy, b, None, raw)?;
        self.scaled(be, r, raw, du)?;
        let p = product_of([r, w.inputs, rows], Order::Transposed, Order::Plain, true);
        be.matmul(&p, du, x, None, da)?;
        let p = product_of([rows, w.inputs, r], Order::Plain, Order::Plain, true);
        be.matmul(&p, du, a, None, dx)
    }
}

const fn product_of(
    [rows, cols, inner]: [usize; 3],
    a: Order,
    b: Order,
    accumulate: bool,
) -> Product {
    Product { rows, cols, inner, a, b, accumulate }
}
