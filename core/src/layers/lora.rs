//! Low-rank adapters of attention (LoRA, arXiv 2106.09685): `qkv = x·W + b + s·(x·Aᵀ)·B`, where `W`
//! and `b` are frozen.
//!
//! Queries and values have an adapter of rank `r` each, keys have none; `s = α/r`. All of it is one
//! adapter of `c_attn` with rank `2r` and factor `2α`, which is how it is saved for other programs:
//!
//! ```text
//! A [2r, d]    rows 0 … r: of the queries; rows r … 2r: of the values
//! B [2r, 3d]   rows 0 … r in columns 0 … d, rows r … 2r in columns 2d … 3d, zero elsewhere
//! ```
//! Only the parts of `B` that are not zero are parameters, `[2r, d]`; the whole of it is laid out
//! when it is used.

use super::block::At;
use super::{Init, Tensor};
use crate::arena::{Reals, product};
use crate::backend::{Columns, NnOps, Order, Product};
use crate::error::{Error, Result, ok};
use crate::real::Real;

/// Rank and factor of the adapters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraShape {
    /// Rank `r` of each adapter.
    pub rank: usize,
    /// `α`: the factor is `α/r`.
    pub alpha: f64,
}

impl LoraShape {
    /// The factor `s = α/r`.
    pub const fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    pub(super) const fn check(&self, width: usize) -> Result<()> {
        if self.rank == 0 || self.rank > width {
            let possible = "1 up to the width";
            return Err(Error::setting("LoRA rank", self.rank as f64, possible));
        }
        if !(self.alpha > 0.0 && self.alpha < f64::INFINITY) {
            return Err(Error::setting("LoRA alpha", self.alpha, "a finite number above 0"));
        }
        Ok(())
    }
}

/// The adapters of a block's `c_attn`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Lora {
    shape: LoraShape,
    width: usize,
}

impl Lora {
    /// `A` and the parameters of `B`.
    pub(super) const TENSORS: usize = 2;

    pub(super) const fn new(shape: LoraShape, width: usize) -> Result<Self> {
        ok!(shape.check(width));
        ok!(product("adapters", &[shape.rank, 12, width]));
        Ok(Self { shape, width })
    }

    /// Rank and factor.
    pub(super) const fn shape(&self) -> &LoraShape {
        &self.shape
    }

    /// `A` and the parameters of `B`, both `[2r, d]`. `B` begins as 0, so that the network is
    /// unchanged.
    pub(super) const fn tensors(&self) -> [Tensor; Self::TENSORS] {
        [
            Tensor::matrix("attn.c_attn.lora_A", self.rows(), self.width, Init::Adapter),
            Tensor::matrix("attn.c_attn.lora_B", self.rows(), self.width, Init::Zeros),
        ]
    }

    /// `2r`.
    pub(super) const fn rows(&self) -> usize {
        2 * self.shape.rank
    }

    /// Values of `B` with its zeros.
    pub(super) const fn whole(&self) -> usize {
        self.rows() * 3 * self.width
    }

    /// The parts of `B` and where they belong: rows, and columns of the whole.
    fn parts(&self, parameters: Reals, whole: Reals) -> [(Columns, Columns); 2] {
        let (r, d) = (self.shape.rank, self.width);
        [0, 1].map(|i| {
            let part = Columns { of: parameters.sub(i * r * d, r * d), stride: d, at: 0 };
            (
                part,
                Columns { of: whole.sub(i * r * 3 * d, r * 3 * d), stride: 3 * d, at: 2 * i * d },
            )
        })
    }

    /// `s·B` with its zeros, into `whole`.
    fn lay<B: NnOps>(&self, be: &mut B, b: Reals, whole: Reals) -> Result<()> {
        be.fill_reals(whole, B::Real::of(0.0))?;
        for (part, place) in self.parts(b, whole) {
            be.add_columns(self.width, self.shape.scale(), part, place)?;
        }
        Ok(())
    }

    /// `u = x·Aᵀ` and `qkv += u·(s·B)`, for `rows` rows of `x`. `u[rows, 2r]` is kept for
    /// [`vjp`](Self::vjp); the scratch of the call holds [`whole`](Self::whole) values.
    pub(super) fn forward<B: NnOps>(
        &self,
        be: &mut B,
        at: &At<'_>,
        [a, b]: [&Tensor; Self::TENSORS],
        rows: usize,
        x: Reals,
        u: Reals,
        qkv: Reals,
    ) -> Result<()> {
        let (r, d, whole) = (self.rows(), self.width, at.scratch.sub(0, self.whole()));
        let p = product_of(rows, r, d, (Order::Plain, Order::Transposed), false);
        be.matmul(&p, x, at.value(a), None, u)?;
        self.lay(be, at.value(b), whole)?;
        let p = product_of(rows, 3 * d, r, (Order::Plain, Order::Plain), true);
        be.matmul(&p, u, whole, None, qkv)
    }

    /// The gradients of `A` and `B`, and the adapters' part of `dx`, which is *added*. `scratch`
    /// holds twice [`whole`](Self::whole) and `rows·2r` values.
    pub(super) fn vjp<B: NnOps>(
        &self,
        be: &mut B,
        at: &At<'_>,
        [a, b]: [&Tensor; Self::TENSORS],
        rows: usize,
        x: Reals,
        u: Reals,
        dqkv: Reals,
        dx: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (r, d, n) = (self.rows(), self.width, self.whole());
        let (whole, dwhole) = (scratch.sub(0, n), scratch.sub(n, n));
        let du = scratch.sub(2 * n, rows * r);
        // d(s·B) = uᵀ·dqkv; only what is a parameter is taken of it.
        let p = product_of(r, 3 * d, rows, (Order::Transposed, Order::Plain), false);
        be.matmul(&p, u, dqkv, None, dwhole)?;
        for (part, place) in self.parts(at.slope(b), dwhole) {
            be.add_columns(d, self.shape.scale(), place, part)?;
        }
        // du = dqkv·(s·B)ᵀ, dA += duᵀ·x, dx += du·A
        self.lay(be, at.value(b), whole)?;
        let p = product_of(rows, r, 3 * d, (Order::Plain, Order::Transposed), false);
        be.matmul(&p, dqkv, whole, None, du)?;
        let p = product_of(r, d, rows, (Order::Transposed, Order::Plain), true);
        be.matmul(&p, du, x, None, at.slope(a))?;
        let p = product_of(rows, d, r, (Order::Plain, Order::Plain), true);
        be.matmul(&p, du, at.value(a), None, dx)
    }
}

const fn product_of(
    rows: usize,
    cols: usize,
    inner: usize,
    (a, b): (Order, Order),
    accumulate: bool,
) -> Product {
    Product { rows, cols, inner, a, b, accumulate }
}
