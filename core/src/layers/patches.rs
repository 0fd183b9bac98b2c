//! Images as tokens: patches, a linear layer, a class token in front, learned positions.
//!
//! `x[0] = class + pos[0]`, `x[1 + n] = linear(norm(patch[n])) + pos[1 + n]`, then dropout. With
//! shifted patch tokenization (Lee, Lee and Song, "Vision Transformer for Small-Size Datasets",
//! 2021) a patch is cut from the image and from its four copies shifted by one pixel, and
//! normalized; without it a patch is the image's alone, and there is no norm (Dosovitskiy et al.,
//! 2021).

use super::{Init, Matrix, Parameter, Tensor, linear, linear_vjp};
use crate::arena::{Reals, product};
use crate::backend::{Backend, Chunk, Order};
use crate::error::{Error, Result};
use crate::real::Real;
use crate::rng::Draw;
use crate::stack::Input;

/// How images are cut into patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patches {
    /// Channels `C`.
    pub channels: usize,
    /// Rows of pixels; a multiple of the patch.
    pub height: usize,
    /// Columns of pixels; a multiple of the patch.
    pub width: usize,
    /// Rows and columns of a patch, `P`.
    pub patch: usize,
    /// Shifted patch tokenization: the image and its four copies shifted by one pixel.
    pub shifted: bool,
}

/// Where a copy takes its pixel from, rows and columns: the image itself, and the image moved
/// right, left, down and up.
const SHIFTS: [(isize, isize); 5] = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)];

impl Patches {
    /// Checks the dimensions.
    ///
    /// # Errors
    /// [`Error::Setting`] names the first that is wrong; [`Error::TooLarge`] for sizes beyond the
    /// address space.
    pub fn check(&self) -> Result<()> {
        for (what, n) in [
            ("channels", self.channels),
            ("image height", self.height),
            ("image width", self.width),
            ("patch", self.patch),
        ] {
            if n == 0 {
                return Err(Error::setting(what, 0.0, "1 or more"));
            }
        }
        for (what, n) in [("image height", self.height), ("image width", self.width)] {
            if !n.is_multiple_of(self.patch) {
                return Err(Error::setting(what, n as f64, "a multiple of the patch"));
            }
        }
        product("image", &[self.channels, self.height, self.width, SHIFTS.len()]).map(|_| ())
    }

    fn copies(&self) -> usize {
        if self.shifted { SHIFTS.len() } else { 1 }
    }

    /// Patches of an image, `N`.
    pub const fn count(&self) -> usize {
        (self.height / self.patch) * (self.width / self.patch)
    }

    /// Values of a patch: `P·P·C`, times five where shifted.
    pub fn values(&self) -> usize {
        self.patch * self.patch * self.channels * self.copies()
    }

    /// Cuts one image `[C, height, width]` into `out[N, P, P, copies, C]`; pixels outside the image
    /// are 0.
    ///
    /// # Errors
    /// [`Error::Shape`] for slices of other lengths.
    pub fn cut<R: Real>(&self, image: &[R], out: &mut [R]) -> Result<()> {
        let (c, h, w, p) = (self.channels, self.height, self.width, self.patch);
        for (what, expected, found) in [
            ("pixels of an image", c * h * w, image.len()),
            ("values of patches", self.count() * self.values(), out.len()),
        ] {
            if expected != found {
                return Err(Error::Shape { what, expected, found });
            }
        }
        let across = w / p;
        for (place, out) in out.chunks_exact_mut(self.copies() * c).enumerate() {
            let (n, inside) = (place / (p * p), place % (p * p));
            let (row, col) = (n / across * p + inside / p, n % across * p + inside % p);
            for (copy, out) in SHIFTS.iter().zip(out.chunks_exact_mut(c)) {
                let at = row.checked_add_signed(copy.0).filter(|&r| r < h);
                let at = at.zip(col.checked_add_signed(copy.1).filter(|&c| c < w));
                for (channel, out) in out.iter_mut().enumerate() {
                    *out = at.map_or(R::zero(), |(row, col)| image[(channel * h + row) * w + col]);
                }
            }
        }
        Ok(())
    }
}

/// The input of a vision transformer. Parameters and gradients belong to the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PatchEmbedding {
    /// Width `d`.
    pub width: usize,
    /// Patches of an image, `N`; a sample has `T = N + 1` tokens.
    pub count: usize,
    /// `[B, N, values of a patch]`, as [`Patches::cut`] leaves them.
    pub patches: Reals,
    /// `ε` of the norm.
    pub eps: f64,
    /// Weight and bias of the norm of a patch, `[values]`; empty where there is none.
    pub norm: [Parameter; 2],
    /// The linear layer's matrix, `[values, d]`.
    pub weight: Parameter,
    /// Its bias, `[d]`.
    pub bias: Parameter,
    /// The class token, `[d]`.
    pub class: Parameter,
    /// Positions, `[T, d]`.
    pub positions: Parameter,
    /// Dropout of the sum.
    pub dropout: f64,
}

impl PatchEmbedding {
    /// Norm of a patch (two), linear layer (two), class token, positions.
    pub fn tensors(patches: &Patches, width: usize) -> [Tensor; 6] {
        let (values, norm, tokens) = (patches.values(), patches.shifted, patches.count() + 1);
        let token = Init::Normal(0.02);
        [
            Tensor::vector("patch_embed.norm.weight", values, Init::Ones).when(norm),
            Tensor::vector("patch_embed.norm.bias", values, Init::Zeros).when(norm),
            Tensor::matrix("patch_embed.proj.weight", values, width, Init::InverseRoot),
            Tensor::vector("patch_embed.proj.bias", width, Init::Zeros),
            Tensor::vector("cls_token", width, token),
            Tensor::matrix("pos_embed", tokens, width, token),
        ]
    }

    /// Values of a patch.
    fn values(&self) -> usize {
        self.weight.value.len().checked_div(self.width).unwrap_or(0)
    }

    fn matrix(&self) -> Matrix {
        Matrix {
            values: self.weight.value,
            inputs: self.values(),
            outputs: self.width,
            order: Order::Plain,
        }
    }

    /// Reals of scratch for chunks of `samples` samples.
    pub const fn scratch(values: usize, count: usize, width: usize, samples: usize) -> usize {
        // Normalized patches, their gradients, gradients of the patches themselves, which nothing
        // uses; embeddings; statistics.
        samples
            .saturating_mul(count)
            .saturating_mul(values.saturating_mul(3).saturating_add(width).saturating_add(2))
    }

    /// The chunk's patches, and what is embedded: the normalized patches in the scratch, or the
    /// patches themselves.
    fn embedded<B: Backend>(&self, be: &mut B, chunk: &Chunk, scratch: Reals) -> Result<Parts> {
        let (values, rows) = (self.values(), chunk.samples * self.count);
        let raw = self.patches.sub(chunk.first * self.count * values, rows * values);
        let mut at = 0;
        let mut take = |len: usize| {
            at += len;
            scratch.sub(at - len, len)
        };
        let (e, normal) = (take(rows * self.width), take(rows * values));
        let parts = Parts {
            raw,
            normal,
            e,
            stats: take(2 * rows),
            dnormal: take(rows * values),
            draw: take(rows * values),
        };
        let [weight, bias] = self.norm;
        if weight.value.is_empty() {
            return Ok(Parts { normal: raw, ..parts });
        }
        be.layer_norm(self.eps, weight.value, bias.value, raw, normal, parts.stats)?;
        Ok(parts)
    }
}

/// Handles of one chunk, `rows = samples·N`.
struct Parts {
    raw: Reals,
    /// `[rows, values]`.
    normal: Reals,
    /// `[rows, d]`.
    e: Reals,
    stats: Reals,
    dnormal: Reals,
    draw: Reals,
}

impl<B: Backend> Input<B> for PatchEmbedding {
    fn forward(
        &mut self,
        be: &mut B,
        chunk: &Chunk,
        train: bool,
        x: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (d, rows) = (self.width, chunk.samples * self.count);
        let parts = self.embedded(be, chunk, scratch)?;
        linear(be, rows, self.matrix(), self.bias.value, parts.normal, parts.e)?;
        for i in 0..chunk.samples {
            let x = x.sub(i * (self.count + 1) * d, (self.count + 1) * d);
            be.copy_reals(self.class.value, x.sub(0, d))?;
            be.copy_reals(
                parts.e.sub(i * self.count * d, self.count * d),
                x.sub(d, self.count * d),
            )?;
            be.add(x, self.positions.value)?;
        }
        if train && self.dropout > 0.0 {
            be.dropout(chunk, Draw::EmbeddingDropout, self.dropout, x)?;
        }
        Ok(())
    }

    fn vjp(&mut self, be: &mut B, chunk: &Chunk, gx: Reals, scratch: Reals) -> Result<()> {
        let (d, rows) = (self.width, chunk.samples * self.count);
        let grads = (self.weight.grad, self.bias.grad);
        let [norm, bias] = self.norm;
        let slopes = [norm, bias, self.class, self.positions].map(|p| p.grad);
        if grads.0.is_empty() && grads.1.is_empty() && slopes.iter().all(|g| g.is_empty()) {
            return Ok(());
        }
        if self.dropout > 0.0 {
            be.dropout(chunk, Draw::EmbeddingDropout, self.dropout, gx)?;
        }
        let parts = self.embedded(be, chunk, scratch)?;
        for i in 0..chunk.samples {
            let gx = gx.sub(i * (self.count + 1) * d, (self.count + 1) * d);
            if !self.positions.grad.is_empty() {
                be.add(self.positions.grad, gx)?;
            }
            if !self.class.grad.is_empty() {
                be.add(self.class.grad, gx.sub(0, d))?;
            }
            be.copy_reals(
                gx.sub(d, self.count * d),
                parts.e.sub(i * self.count * d, self.count * d),
            )?;
        }
        linear_vjp(be, rows, self.matrix(), grads, parts.normal, parts.e, parts.dnormal)?;
        let ([weight, bias, ..], x) = (slopes, parts.raw);
        if weight.is_empty() && bias.is_empty() {
            return Ok(());
        }
        // Images are not trained: their gradient is a by-product.
        be.fill_reals(parts.draw, B::Real::of(0.0))?;
        be.layer_norm_vjp(norm.value, x, parts.stats, parts.dnormal, parts.draw, weight, bias)
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    /// Two channels of 2×4 pixels, patches of 2×2; every value by hand.
    #[test]
    fn patches_by_hand() {
        let image: Vec<f64> = (1..=16).map(f64::from).collect();
        let plain = Patches { channels: 2, height: 2, width: 4, patch: 2, shifted: false };
        let mut out = vec![0.0; 16];
        plain.cut(&image, &mut out).unwrap();
        //  1  2 |  3  4      9 10 | 11 12
        //  5  6 |  7  8     13 14 | 15 16
        let expected = [1, 9, 2, 10, 5, 13, 6, 14, 3, 11, 4, 12, 7, 15, 8, 16].map(f64::from);
        assert_eq!(out, expected);

        let shifted = Patches { shifted: true, ..plain };
        assert_eq!((shifted.count(), shifted.values()), (2, 40));
        let mut out = vec![0.0; 80];
        shifted.cut(&image, &mut out).unwrap();
        // The pixel in row 0 and column 1: itself, its left neighbour, its right one, the one
        // above, the one below.
        assert_eq!(out[10..20], [2.0, 10.0, 1.0, 9.0, 3.0, 11.0, 0.0, 0.0, 6.0, 14.0]);
        // The last pixel.
        assert_eq!(out[70..80], [8.0, 16.0, 7.0, 15.0, 0.0, 0.0, 4.0, 12.0, 0.0, 0.0]);
    }

    #[test]
    fn images_that_do_not_fit_are_refused() {
        let ok = Patches { channels: 3, height: 32, width: 32, patch: 4, shifted: true };
        assert_eq!((ok.check(), ok.count(), ok.values()), (Ok(()), 64, 240));
        assert!(matches!(
            Patches { height: 30, ..ok }.check(),
            Err(Error::Setting { what: "image height", .. })
        ));
        assert!(matches!(
            Patches { patch: 0, ..ok }.check(),
            Err(Error::Setting { what: "patch", .. })
        ));
        assert!(Patches { channels: usize::MAX, ..ok }.check().is_err());
        assert!(ok.cut(&[0.0; 7], &mut [0.0; 7]).is_err());
    }
}
