//! A fast operation that `bdia` does not have, brought to its backends from outside: RMS
//! normalization (Zhang and Sennrich, 2019) and its vector-Jacobian product.
//!
//! ```text
//! y   = x·r·w                         r = 1/√(mean(x²) + ε), for each row x of `width` values
//! dx += r·(g − x·r²·mean(g·x))        g = dy·w
//! dw += Σ_rows dy·x·r
//! ```
//!
//! A backend's type is another crate's, but a trait of one's own can be implemented for it.
//! [`RmsNorm`] is: for the reference backend by plain loops, for the CPU by a loop over the backend's
//! threads ([`Cpu::each_part`](bdia_cpu::Cpu::each_part)), for CUDA by kernels that go through the
//! backend's launcher ([`Cuda::launch`](bdia_cuda::Cuda::launch)). Blocks that need it ask for
//! `B: Backend + RmsNorm`.

mod cpu;
mod cuda;
mod reference;

use bdia_core::check::{disjoint, same};
use bdia_core::{Reals, Result, Storage};

/// RMS normalization.
pub trait RmsNorm: Storage {
    /// `y = x·rstd·w` for `rstd.len()` rows of `w.len()` values, and `rstd` of each row.
    ///
    /// # Errors
    /// Sizes that do not agree, handles outside their arena or of another layout, and outputs that
    /// overlap another operand.
    fn rms_norm(&mut self, eps: f32, w: Reals, x: Reals, y: Reals, rstd: Reals) -> Result<()>;

    /// Its vector-Jacobian product: *adds* to `dx` and `dw`.
    ///
    /// # Errors
    /// As [`rms_norm`](Self::rms_norm).
    fn rms_norm_vjp(
        &mut self,
        w: Reals,
        x: Reals,
        rstd: Reals,
        dy: Reals,
        dx: Reals,
        dw: Reals,
    ) -> Result<()>;
}

/// Refuses sizes that do not agree (vectors are as long as a row, matrices have `rows` rows), and
/// outputs that overlap another operand. Whether handles are inside, the backend checks.
fn check(
    rows: usize,
    vectors: &[Reals],
    matrices: &[Reals],
    inputs: &[Reals],
    outputs: &[Reals],
) -> Result<()> {
    let width = vectors[0].len();
    if rows > 0 {
        same("width of rms_norm (at least)", width.max(1), width)?;
    }
    for v in vectors {
        same("vector of rms_norm", width, v.len())?;
    }
    for m in matrices {
        same("matrix of rms_norm", rows * width, m.len())?;
    }
    let places = |handles: &[Reals]| handles.iter().map(|h| h.range()).collect::<Vec<_>>();
    disjoint("rms_norm", &places(inputs), &places(outputs))
}
