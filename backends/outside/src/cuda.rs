//! On a CUDA device: kernels of our own through the backend's launcher.

use bdia_core::{Reals, Result};
use bdia_cuda::{Cuda, CustomKernel};

use crate::{RmsNorm, check};

const SOURCE: &str = include_str!("rms_norm.cu");
/// Rows of a block: a warp each.
const WARPS: usize = 8;
/// Columns of a block: a thread each.
const THREADS: usize = 256;

// SAFETY: it keeps to operands with the shapes that `rms_norm` checks.
static FORWARD: CustomKernel = unsafe { CustomKernel::new(SOURCE, "rms_norm") };
// SAFETY: as above, those of `rms_norm_vjp`.
static BACKWARD_X: CustomKernel = unsafe { CustomKernel::new(SOURCE, "rms_norm_dx") };
// SAFETY: as above.
static BACKWARD_W: CustomKernel = unsafe { CustomKernel::new(SOURCE, "rms_norm_dw") };

impl RmsNorm for Cuda {
    fn rms_norm(&mut self, eps: f32, w: Reals, x: Reals, y: Reals, rstd: Reals) -> Result<()> {
        check(rstd.len(), &[w], &[x, y], &[w, x], &[y, rstd])?;
        let grid = [rstd.len().div_ceil(WARPS), 1, 1];
        let args = [eps.into(), w.into(), x.into(), y.into(), rstd.into()];
        self.launch(&FORWARD, grid, args)
    }

    fn rms_norm_vjp(
        &mut self,
        w: Reals,
        x: Reals,
        rstd: Reals,
        dy: Reals,
        dx: Reals,
        dw: Reals,
    ) -> Result<()> {
        check(rstd.len(), &[w, dw], &[x, dy, dx], &[w, x, rstd, dy], &[dx, dw])?;
        let grid = [rstd.len().div_ceil(WARPS), 1, 1];
        self.launch(&BACKWARD_X, grid, [w.into(), x.into(), rstd.into(), dy.into(), dx.into()])?;
        let grid = [dw.len().div_ceil(THREADS), 1, 1];
        self.launch(&BACKWARD_W, grid, [x.into(), rstd.into(), dy.into(), dw.into()])
    }
}
