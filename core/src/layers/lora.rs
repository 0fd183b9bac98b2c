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

use super::{Params, Tensor, place};
use crate::arena::{Layout, Reals, product};
use crate::backend::{Columns, NnOps, Order, Product};
use crate::error::{Error, Result, ok};
use crate::optim::Rule;
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

    const fn check(&self, width: usize) -> Result<()> {
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

/// Tensors of a block's adapters.
pub const LORA_TENSORS: usize = 2;

/// The adapters of `K` blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lora {
    shape: LoraShape,
    width: usize,
    tensors: [Tensor; LORA_TENSORS],
    /// Parameters, one group a block.
    pub params: Params,
}

impl Lora {
    /// Lays out the adapters of `blocks` blocks of width `width`, with their gradients and
    /// optimizer state.
    ///
    /// # Errors
    /// [`Error::Setting`] for a rank that does not fit or a factor that is none;
    /// [`Error::TooLarge`].
    pub const fn layout(
        shape: LoraShape,
        width: usize,
        blocks: usize,
        rule: Option<Rule>,
        fused: bool,
        layout: &mut Layout,
    ) -> Result<Self> {
        ok!(shape.check(width));
        ok!(product("adapters", &[shape.rank, 12, width]));
        let (rows, cols, matrix) = (2 * shape.rank, width, true);
        let mut tensors = [
            Tensor { name: "lora_A", rows, cols, matrix, offset: 0 },
            Tensor { name: "lora_B", rows, cols, matrix, offset: 0 },
        ];
        let len = place(&mut tensors);
        let params = ok!(Params::layout(layout, blocks, len, LORA_TENSORS, rule, fused));
        Ok(Self { shape, width, tensors, params })
    }

    /// Rank and factor.
    pub const fn shape(&self) -> &LoraShape {
        &self.shape
    }

    /// `A` and the parameters of `B`, both `[2r, d]`.
    pub const fn tensors(&self) -> &[Tensor; LORA_TENSORS] {
        &self.tensors
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
    fn lay<B: NnOps>(&self, be: &mut B, block: usize, whole: Reals) -> Result<()> {
        be.fill_reals(whole, B::Real::of(0.0))?;
        for (part, place) in self.parts(self.tensors[1].of(self.params.group(block)), whole) {
            be.add_columns(self.width, self.shape.scale(), part, place)?;
        }
        Ok(())
    }

    /// `u = x·Aᵀ` and `qkv += u·(s·B)`, for `rows` rows of `x`. `u[rows, 2r]` is kept for
    /// [`backward`](Self::backward); `scratch` holds [`whole`](Self::whole) values.
    pub(super) fn forward<B: NnOps>(
        &self,
        be: &mut B,
        (block, rows): (usize, usize),
        x: Reals,
        u: Reals,
        qkv: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (r, d, whole) = (self.rows(), self.width, scratch.sub(0, self.whole()));
        let a = self.tensors[0].of(self.params.group(block));
        let p = Product {
            rows,
            cols: r,
            inner: d,
            a: Order::Plain,
            b: Order::Transposed,
            accumulate: false,
        };
        be.matmul(&p, x, a, None, u)?;
        self.lay(be, block, whole)?;
        let p = Product {
            rows,
            cols: 3 * d,
            inner: r,
            a: Order::Plain,
            b: Order::Plain,
            accumulate: true,
        };
        be.matmul(&p, u, whole, None, qkv)
    }

    /// The gradients of `A` and `B`, and the adapters' part of `dx`, which is *added*. `scratch`
    /// holds twice [`whole`](Self::whole) and `rows·2r` values.
    pub(super) fn backward<B: NnOps>(
        &self,
        be: &mut B,
        (block, rows): (usize, usize),
        x: Reals,
        u: Reals,
        dqkv: Reals,
        dx: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (r, d, n) = (self.rows(), self.width, self.whole());
        let (whole, dwhole, du) =
            (scratch.sub(0, n), scratch.sub(n, n), scratch.sub(2 * n, rows * r));
        let (a, gradients) =
            (self.tensors[0].of(self.params.group(block)), self.params.gradient(block));
        let [da, db] = [0, 1].map(|i| self.tensors[i].of(gradients));
        // d(s·B) = uᵀ·dqkv; only what is a parameter is taken of it.
        let p = Product {
            rows: r,
            cols: 3 * d,
            inner: rows,
            a: Order::Transposed,
            b: Order::Plain,
            accumulate: false,
        };
        be.matmul(&p, u, dqkv, None, dwhole)?;
        for (part, place) in self.parts(db, dwhole) {
            be.add_columns(d, self.shape.scale(), place, part)?;
        }
        // du = dqkv·(s·B)ᵀ, dA += duᵀ·x, dx += du·A
        self.lay(be, block, whole)?;
        let p = Product {
            rows,
            cols: r,
            inner: 3 * d,
            a: Order::Plain,
            b: Order::Transposed,
            accumulate: false,
        };
        be.matmul(&p, dqkv, whole, None, du)?;
        let p = Product {
            rows: r,
            cols: d,
            inner: rows,
            a: Order::Transposed,
            b: Order::Plain,
            accumulate: true,
        };
        be.matmul(&p, du, x, None, da)?;
        let p =
            Product { rows, cols: d, inner: r, a: Order::Plain, b: Order::Plain, accumulate: true };
        be.matmul(&p, du, a, None, dx)
    }
}
