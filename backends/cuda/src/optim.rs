//! [`OptimOps`]: one kernel an update, three for SET-Adam, up to five for Adafactor. Nothing is
//! read back.

use bdia_core::optim::{Rule, Update};
use bdia_core::{Exchange, OptimOps, Reals, Result, Site, State};

use crate::Cuda;
use crate::device::{AT_ONCE, Kernel, THREADS, arg};
use crate::nn::streamed;
use crate::span::{Adafactor, Constants, Span};
use crate::status::{Cause, Code};

/// Blocks of a sum over a tensor, each with a partial sum.
const PARTIALS: usize = 512;
/// Bytes of the partial sums that one pass leaves: two of double precision for each block.
const PASS: usize = 2 * 8 * PARTIALS;
/// Most blocks of threads of an update with codes.
const CODED_BLOCKS: usize = 2048;
/// Threads of a block that sums columns.
const TALL: u32 = 1024;

fn blocks(len: usize) -> usize {
    len.div_ceil(AT_ONCE * THREADS as usize).clamp(1, PARTIALS)
}

/// `1 − β^t`.
fn correction(beta: f64, t: u32) -> f64 {
    1.0 - libm::pow(beta, f64::from(t))
}

impl Cuda {
    /// `len` partial sums (of 4 or 8 bytes, as the kernels know) of the `pass`-th pass.
    fn pass(&self, pass: usize, len: usize) -> Span {
        Span { at: self.scratch.at + (pass * PASS) as u64, len: len as u64 }
    }

    /// One update by Adafactor; `row` is all of the second moment where there is no `col`.
    fn adafactor(
        &self,
        rule: &Adafactor,
        [rows, cols]: [u64; 2],
        [p, g, row, col]: [Span; 4],
        blocks: usize,
    ) -> Result<()> {
        let (status, grid) = (self.status.at, [blocks, 1, 1]);
        let (parts, mut mean) = (self.pass(0, blocks), self.pass(1, 1));
        if col.len == 0 {
            mean = Span::EMPTY;
            let args = &mut [arg(&status), arg(rule), arg(&g), arg(&row), arg(&parts)];
            self.device.launch(Kernel::AdafactorVector, grid, THREADS, args)?;
        } else {
            let warps = [row.len.div_ceil(u64::from(THREADS / 32)) as usize, 1, 1];
            let args = &mut [arg(&status), arg(rule), arg(&g), arg(&cols), arg(&row)];
            self.device.launch(Kernel::AdafactorRows, warps, THREADS, args)?;
            let strips = [col.len.div_ceil(32) as usize, 1, 1];
            let args = &mut [arg(&status), arg(rule), arg(&g), arg(&rows), arg(&col)];
            self.device.launch(Kernel::AdafactorCols, strips, TALL, args)?;
            let args = &mut [arg(&status), arg(&row), arg(&mean)];
            self.device.launch(Kernel::AdafactorMean, [1, 1, 1], THREADS, args)?;
            let args = &mut [
                arg(&status),
                arg(rule),
                arg(&g),
                arg(&row),
                arg(&col),
                arg(&mean),
                arg(&parts),
            ];
            self.device.launch(Kernel::AdafactorSquares, grid, THREADS, args)?;
        }
        let args = &mut [
            arg(&status),
            arg(rule),
            arg(&g),
            arg(&row),
            arg(&col),
            arg(&mean),
            arg(&parts),
            arg(&p),
        ];
        self.device.launch(Kernel::AdafactorStep, grid, THREADS, args)
    }
}

impl Exchange for Cuda {}

impl OptimOps for Cuda {
    /// Also raises [`Fault::Gradient`](bdia_core::Fault::Gradient) where the sum itself leaves the
    /// range of `f32`: no norm, no clipping.
    fn sum_squares(&mut self, site: Site, g: Reals, out: Reals) -> Result<()> {
        self.arenas.sum_squares(g, out)?;
        let blocks = blocks(g.len());
        let report = self.report(Cause::new(Code::Gradient, site));
        let (g, out, parts) = (self.reals(g), self.reals(out), self.pass(0, blocks));
        let finished = Span { at: self.finished.at, len: 1 };
        let args = &mut [arg(&report), arg(&g), arg(&parts), arg(&finished), arg(&out)];
        self.device.launch(Kernel::Squares, [blocks, 1, 1], THREADS, args)
    }

    fn update(
        &mut self,
        u: &Update,
        shape: [usize; 2],
        p: Reals,
        g: Reals,
        state: &State,
    ) -> Result<()> {
        self.arenas.update(u, shape, p, g, state)?;
        let [m, v] = state.reals;
        if p.is_empty() {
            return Ok(());
        }
        let (all, blocks) = (streamed(p.len() as u64), blocks(p.len()));
        let status = self.status.at;
        let (p, g, m, v) = (self.reals(p), self.reals(g), self.reals(m), self.reals(v));
        let constants = Constants {
            shrink: (u.lr * u.decay) as f32,
            scale: u.scale as f32,
            ..Constants::default()
        };
        let moments = |beta1: f64, beta2: f64, eps: f64| Constants {
            rate: (u.lr / correction(beta1, u.t)) as f32,
            keep1: beta1 as f32,
            take1: (1.0 - beta1) as f32,
            keep2: beta2 as f32,
            take2: (1.0 - beta2) as f32,
            inverse: (1.0 / correction(beta2, u.t)) as f32,
            eps: eps as f32,
            correction: correction(beta2, u.t),
            ..constants
        };
        let grid = [blocks, 1, 1];
        match u.rule {
            Rule::Sgd { momentum } => {
                let rule = Constants { keep1: momentum as f32, rate: u.lr as f32, ..constants };
                let args = &mut [arg(&status), arg(&rule), arg(&p), arg(&g), arg(&m)];
                self.device.launch(Kernel::Sgd, all, THREADS, args)
            }
            Rule::AdamW8bit { beta1, beta2, eps } if !state.codes[0].is_empty() => {
                let rule = moments(beta1, beta2, eps);
                let [first, second] = state.codes.map(|codes| self.words(codes));
                // A block of threads computes the codes' values before its first block of values.
                let blocks = (m.len as usize).min(CODED_BLOCKS);
                let args = &mut [
                    arg(&status),
                    arg(&rule),
                    arg(&p),
                    arg(&g),
                    arg(&m),
                    arg(&v),
                    arg(&first),
                    arg(&second),
                ];
                self.device.launch(Kernel::AdamW8bit, [blocks, 1, 1], THREADS, args)
            }
            Rule::Adafactor { decay, eps, threshold } => {
                let take = libm::pow(f64::from(u.t), -decay);
                let rule = Adafactor {
                    shrink: constants.shrink,
                    scale: constants.scale,
                    keep: (1.0 - take) as f32,
                    take: take as f32,
                    eps,
                    lr: u.lr,
                    threshold,
                };
                self.adafactor(&rule, shape.map(|n| n as u64), [p, g, m, v], blocks)
            }
            Rule::AdamW { beta1, beta2, eps } | Rule::AdamW8bit { beta1, beta2, eps } => {
                let rule = moments(beta1, beta2, eps);
                let args = &mut [arg(&status), arg(&rule), arg(&p), arg(&g), arg(&m), arg(&v)];
                self.device.launch(Kernel::AdamW, all, THREADS, args)
            }
            Rule::SetAdam { beta1, beta2, eps } => {
                let rule = moments(beta1, beta2, eps);
                let (extremes, sums) = (self.pass(0, 2 * blocks), self.pass(1, 2 * blocks));
                let first = Span { len: blocks as u64, ..sums };
                let second = Span { at: sums.at + 8 * blocks as u64, ..first };
                let args = &mut [
                    arg(&status),
                    arg(&rule),
                    arg(&p),
                    arg(&g),
                    arg(&m),
                    arg(&v),
                    arg(&extremes),
                ];
                self.device.launch(Kernel::SetAdamMoments, grid, THREADS, args)?;
                let args = &mut [arg(&status), arg(&v), arg(&extremes), arg(&sums)];
                self.device.launch(Kernel::SetAdamSums, grid, THREADS, args)?;
                let args = &mut [
                    arg(&status),
                    arg(&rule),
                    arg(&m),
                    arg(&v),
                    arg(&extremes),
                    arg(&first),
                    arg(&second),
                    arg(&p),
                ];
                self.device.launch(Kernel::SetAdamStep, grid, THREADS, args)
            }
        }
    }
}
