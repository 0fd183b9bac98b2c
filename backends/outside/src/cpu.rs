//! On the CPU: rows over the threads, lanes within a row.

use bdia_core::{Reals, Result};
use bdia_cpu::{Cpu, Inputs};

use crate::{RmsNorm, check};

/// Partial sums of a row, a register of most processors.
const LANES: usize = 8;
/// Values of a part: enough work for a thread to come for. The shape alone cuts the work, so the bits
/// are the same for any number of threads.
const PART: usize = 1 << 13;
/// Columns of a part of `dw`: four cache lines.
const COLUMNS: usize = 64;

/// `Σ f(c)` over the columns of a row: lane by lane, then the lanes in order.
#[inline]
fn sum(width: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = width / LANES * LANES;
    for c in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(c + lane);
        }
    }
    let rest: f32 = (whole..width).map(f).sum();
    lanes.iter().sum::<f32>() + rest
}

impl RmsNorm for Cpu {
    fn rms_norm(&mut self, eps: f32, w: Reals, x: Reals, y: Reals, rstd: Reals) -> Result<()> {
        check(rstd.len(), &[w], &[x, y], &[w, x], &[y, rstd])?;
        let width = w.len();
        let rows = (PART / width.max(1)).max(1);
        let outputs = [(y, rows * width), (rstd, rows)];
        self.each_part("rms_norm", Inputs::reals([w, x]), outputs, |part, from, [y, rstd]| {
            let [w, x] = from.reals;
            for (i, (y, rstd)) in y.chunks_mut(width).zip(rstd).enumerate() {
                let x = &x[(part * rows + i) * width..][..width];
                let r = 1.0 / (sum(width, |c| x[c] * x[c]) / width as f32 + eps).sqrt();
                *rstd = r;
                for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                    *y = x * r * w;
                }
            }
        })
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
        let rows = (PART / width.max(1)).max(1);
        let inputs = Inputs::reals([w, x, rstd, dy]);
        self.each_part("rms_norm_vjp", inputs, [(dx, rows * width)], |part, from, [dx]| {
            let [w, x, rstd, dy] = from.reals;
            for (i, dx) in dx.chunks_mut(width).enumerate() {
                let row = part * rows + i;
                let line = row * width..(row + 1) * width;
                let (x, dy, r) = (&x[line.clone()], &dy[line], rstd[row]);
                let mean = sum(width, |c| dy[c] * w[c] * x[c]) / width as f32;
                for (c, dx) in dx.iter_mut().enumerate() {
                    *dx += r * (dy[c] * w[c] - x[c] * r * r * mean);
                }
            }
        })?;
        // Each part has some columns, and adds up their rows in order.
        self.each_part("rms_norm_vjp", inputs, [(dw, COLUMNS)], |part, from, [dw]| {
            let [_, x, rstd, dy] = from.reals;
            for (row, r) in rstd.iter().enumerate() {
                let at = row * width + part * COLUMNS;
                let (x, dy) = (&x[at..][..dw.len()], &dy[at..][..dw.len()]);
                for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                    *dw += dy * x * r;
                }
            }
        })
    }
}
