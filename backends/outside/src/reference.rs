//! On the scalar backend: plain loops, sums in `f64`.

use bdia_core::{Real, Reals, Reference, Result};

use crate::{RmsNorm, check};

impl<R: Real> RmsNorm for Reference<'_, R> {
    fn rms_norm(&mut self, eps: f32, w: Reals, x: Reals, y: Reals, rstd: Reals) -> Result<()> {
        check(rstd.len(), &[w], &[x, y], &[w, x], &[y, rstd])?;
        let (scales, width) = (rstd, w.len());
        let (w, x) = (self.reals(w)?.to_vec(), self.reals(x)?.to_vec());
        for (row, x) in x.chunks(width.max(1)).enumerate() {
            let squares: f64 = x.iter().map(|x| x.wide() * x.wide()).sum();
            let rstd = 1.0 / (squares / width as f64 + f64::from(eps)).sqrt();
            self.reals_mut(scales)?[row] = R::of(rstd);
            for (c, y) in self.reals_mut(y.sub(row * width, width))?.iter_mut().enumerate() {
                *y = R::of(x[c].wide() * rstd * w[c].wide());
            }
        }
        Ok(())
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
        let width = w.len();
        let mut sums: Vec<f64> = self.reals(dw)?.iter().map(|x| x.wide()).collect();
        for row in 0..rstd.len() {
            let line = |h: Reals| h.sub(row * width, width);
            let wide = |h: Reals| -> Result<Vec<f64>> {
                Ok(self.reals(h)?.iter().map(|x| x.wide()).collect())
            };
            let (w, x, dy) = (wide(w)?, wide(line(x))?, wide(line(dy))?);
            let r = self.reals(rstd)?[row].wide();
            let mean = (0..width).map(|c| dy[c] * w[c] * x[c]).sum::<f64>() / width as f64;
            for (c, dx) in self.reals_mut(line(dx))?.iter_mut().enumerate() {
                *dx = R::of(dx.wide() + r * (dy[c] * w[c] - x[c] * r * r * mean));
                sums[c] += dy[c] * x[c] * r;
            }
        }
        for (dw, sum) in self.reals_mut(dw)?.iter_mut().zip(sums) {
            *dw = R::of(sum);
        }
        Ok(())
    }
}
