//! The update on raw buffers, for programs with a loop of their own: quantize, step, inverse,
//! gradient.
//!
//! Element by element with the functions of `bdia_core::update`, which define the bits that every
//! backend gives.

use bdia_core::update::{LIMIT, checksum, combine};
use bdia_core::{Chunk, Error, Gamma, Grid, Sign, Site};

use crate::pointer::{disjoint, input, one_mut, output, span, values};
use crate::stack::side_words;
use crate::{Failure, Outcome, Status, border};

/// What went out of range, if anything did.
fn outcome(first: Option<(usize, f64)>, per_sample: usize) -> Outcome {
    match first {
        None => Ok(()),
        Some((i, value)) => Err(Failure::new(
            Status::Range,
            format_args!(
                "sample {}, value {}: {value:e} is not finite or outside the range of the grid",
                i.checked_div(per_sample).unwrap_or(0),
                i.checked_rem(per_sample).unwrap_or(0)
            ),
        )),
    }
}

/// `sigma` of every sample: 1 or -1.
fn check_signs(sigma: &[i8]) -> Outcome {
    match sigma.iter().find(|&&s| s != 1 && s != -1) {
        None => Ok(()),
        Some(&s) => Err(Error::setting("sigma", s.into(), "1 or -1").into()),
    }
}

/// The sign that goes into the formulas, which take γ = sigma·|γ|.
fn magnitude(gamma: f64) -> Result<Gamma, Failure> {
    if gamma < 0.0 {
        let possible = "0.5, 0.25 ... 2^-8; its sign is given by sigma";
        return Err(Error::setting("gamma", gamma, possible).into());
    }
    Ok(Gamma::from_value(gamma, Sign::Plus)?)
}

/// x[i] = round_ties_even(y[i] * 2^frac_bits). Values that are not finite or beyond 2^30 become 0
/// and give BDIA_STATUS_RANGE; the message names the first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_quantize(
    frac_bits: u32,
    y: *const f32,
    x: *mut i32,
    n: usize,
) -> Status {
    border(|| {
        let grid = Grid::new(frac_bits)?;
        disjoint(&[span(y, n), span(x, n)])?;
        // SAFETY: promised by the caller; they do not overlap.
        let (y, x) = unsafe { (input("y", y, n)?, output("x", x, n)?) };
        let mut first = None;
        for (i, (x, &y)) in x.iter_mut().zip(y).enumerate() {
            *x = grid.quantize(y).unwrap_or_else(|| {
                first.get_or_insert((i, f64::from(y)));
                0
            });
        }
        outcome(first, n)
    })
}

/// y[i] = x[i] * 2^-frac_bits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_dequantize(
    frac_bits: u32,
    x: *const i32,
    y: *mut f32,
    n: usize,
) -> Status {
    border(|| {
        let grid = Grid::new(frac_bits)?;
        disjoint(&[span(x, n), span(y, n)])?;
        // SAFETY: promised by the caller; they do not overlap.
        let (x, y) = unsafe { (input("x", x, n)?, output("y", y, n)?) };
        for (y, &x) in y.iter_mut().zip(x) {
            *y = grid.dequantize(x);
        }
        Ok(())
    })
}

/// x[i] += round_ties_even(h[i] * 2^frac_bits): the step of block 0, and of a network without
/// gamma. Range as in bdia_step.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_add_quantized(
    frac_bits: u32,
    x: *mut i32,
    h: *const f32,
    n: usize,
) -> Status {
    border(|| {
        let grid = Grid::new(frac_bits)?;
        disjoint(&[span(x, n), span(h, n)])?;
        // SAFETY: promised by the caller; they do not overlap.
        let (x, h) = unsafe { (output("x", x, n)?, input("h", h, n)?) };
        let mut first = None;
        for (i, (x, &h)) in x.iter_mut().zip(h).enumerate() {
            let q = grid.quantize(h).unwrap_or_else(|| {
                first.get_or_insert((i, f64::from(h)));
                0
            });
            *x = x.wrapping_add(q);
            if x.unsigned_abs() > LIMIT as u32 {
                first.get_or_insert((i, grid.dequantize(*x)));
            }
        }
        outcome(first, n)
    })
}

/// The number of 32-bit words of side bits that bdia_step writes: samples * m * ceil(per_sample /
/// 32) with gamma = 2^-m.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_side_words(
    gamma: f64,
    samples: usize,
    per_sample: usize,
    words: *mut usize,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let words = unsafe { one_mut("words", words) }?;
        *words = side_words(magnitude(gamma)?, samples, per_sample)?;
        Ok(())
    })
}

/// The signs that a stack with this bdia_config.sign has for the samples global ... global +
/// samples - 1: sigma[i] = 1 or -1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_signs(
    seed: u64,
    step: u32,
    global: u32,
    block: u16,
    sign: i32,
    sigma: *mut i8,
    samples: usize,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let sigma = unsafe { output("sigma", sigma, samples) }?;
        let (gamma, site) = (Gamma::new(1, crate::stack::sign(sign)?)?, Site::Block(block.into()));
        let chunk = Chunk { seed, step, stack: 0, site, first: 0, samples, global, frame: 0 };
        for (i, s) in sigma.iter_mut().enumerate() {
            *s = chunk.sigma(gamma, i) as i8;
        }
        Ok(())
    })
}

/// The arrays that a step and its inverse have in common.
struct Update<'a> {
    grid: Grid,
    gamma: Gamma,
    per_sample: usize,
    sigma: &'a [i8],
    x: &'a mut [i32],
    cur: &'a [f32],
    h: &'a [f32],
}

impl<'a> Update<'a> {
    /// The arrays, and the number of words of side bits.
    ///
    /// # Safety
    /// The arrays are NULL or as long as [`bdia_step`] says.
    unsafe fn new(
        frac_bits: u32,
        gamma: f64,
        (samples, per_sample): (usize, usize),
        sigma: *const i8,
        x: *mut i32,
        cur: *const f32,
        h: *const f32,
        side: *const u32,
    ) -> Result<(Self, usize), Failure> {
        let (grid, gamma) = (Grid::new(frac_bits)?, magnitude(gamma)?);
        let n = values("a batch", samples, per_sample)?;
        let words = side_words(gamma, samples, per_sample)?;
        disjoint(&[span(x, n), span(cur, n), span(h, n), span(side, words), span(sigma, samples)])?;
        // SAFETY: promised by the caller; they do not overlap.
        let (sigma, x, cur, h) = unsafe {
            (
                input("sigma", sigma, samples)?,
                output("x", x, n)?,
                input("cur", cur, n)?,
                input("h", h, n)?,
            )
        };
        check_signs(sigma)?;
        Ok((Self { grid, gamma, per_sample, sigma, x, cur, h }, words))
    }

    /// Calls `f(index, sigma, index within the sample, x, mixed value, word and bit of the
    /// element's lowest plane)` for every element in turn. The words of a higher plane lie
    /// [`stride`](Self::stride) further each.
    fn each(&mut self, mut f: impl FnMut(usize, i32, usize, &mut i32, f32, (usize, usize))) {
        let (p, words) = (self.per_sample, self.gamma.planes() as usize * self.stride());
        for (s, &sigma) in self.sigma.iter().enumerate() {
            let sigma = i32::from(sigma);
            for e in 0..p {
                let i = s * p + e;
                let mixed = self.gamma.mix(sigma, self.cur[i], self.h[i]);
                f(i, sigma, e, &mut self.x[i], mixed, (s * words + e / 32, e % 32));
            }
        }
    }

    /// Words of one plane of a sample.
    fn stride(&self) -> usize {
        self.per_sample.div_ceil(32)
    }
}

/// The step, in place: x holds X_{k-1} and becomes
///     X_{k+1} = sigma (X_{k-1} + s) / 2^m + Q((1 - gamma) cur + (1 + gamma) h),
///     with gamma = sigma 2^-m,
/// where cur is x_k and h is h_k(x_k), all samples times per_sample values; sigma has one sign (1
/// or -1) per sample. side (bdia_side_words of them) takes the low m bits of X_{k-1}, in the order
/// that bdia_stack_side_bits describes. What is out of range counts as 0 in Q, the sum is kept as
/// it is, and BDIA_STATUS_RANGE is returned. No two arrays may overlap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_step(
    frac_bits: u32,
    gamma: f64,
    samples: usize,
    per_sample: usize,
    sigma: *const i8,
    x: *mut i32,
    cur: *const f32,
    h: *const f32,
    side: *mut u32,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let (mut u, words) = unsafe {
            Update::new(
                frac_bits,
                gamma,
                (samples, per_sample),
                sigma,
                x,
                cur,
                h,
                side.cast_const(),
            )
        }?;
        // SAFETY: promised by the caller; it does not overlap the others.
        let side = unsafe { output("side", side, words) }?;
        side.fill(0);
        let (grid, gamma, stride, mut first) = (u.grid, u.gamma, u.stride(), None);
        u.each(|i, sigma, e, x, mixed, (word, bit)| {
            let q = grid.quantize(mixed).unwrap_or_else(|| {
                first.get_or_insert((i, f64::from(mixed)));
                0
            });
            let (next, r) = gamma.step(sigma, *x, q, e);
            for plane in 0..gamma.planes() {
                side[word + plane as usize * stride] |= (r >> plane & 1) << bit;
            }
            *x = next;
            if x.unsigned_abs() > LIMIT as u32 {
                first.get_or_insert((i, grid.dequantize(*x)));
            }
        });
        outcome(first, per_sample)
    })
}

/// The inverse of bdia_step, in place: x holds X_{k+1} and becomes X_{k-1}, in every bit, if all
/// other arrays are the same bits as in the step (side is what it wrote, and is not changed).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_inverse(
    frac_bits: u32,
    gamma: f64,
    samples: usize,
    per_sample: usize,
    sigma: *const i8,
    x: *mut i32,
    cur: *const f32,
    h: *const f32,
    side: *const u32,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let (mut u, words) = unsafe {
            Update::new(frac_bits, gamma, (samples, per_sample), sigma, x, cur, h, side)
        }?;
        // SAFETY: promised by the caller.
        let side = unsafe { input("side", side, words) }?;
        let (grid, gamma, stride) = (u.grid, u.gamma, u.stride());
        u.each(|_, sigma, e, x, mixed, (word, bit)| {
            let r = (0..gamma.planes())
                .fold(0, |r, plane| r | (side[word + plane as usize * stride] >> bit & 1) << plane);
            *x = gamma.inverse(sigma, *x, grid.quantize(mixed).unwrap_or(0), r, e);
        });
        Ok(())
    })
}

/// The gradient of the step: next holds G_{k+1} and becomes gamma G_{k+1}, the first part of
/// G_{k-1}; cur += (1 - gamma) G_{k+1}; h becomes (1 + gamma) G_{k+1}, what the vector-Jacobian
/// product of the block is applied to, its result to be added to cur. Sizes and signs as in
/// bdia_step.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_step_gradient(
    gamma: f64,
    samples: usize,
    per_sample: usize,
    sigma: *const i8,
    next: *mut f32,
    cur: *mut f32,
    h: *mut f32,
) -> Status {
    border(|| {
        let gamma = magnitude(gamma)?;
        let n = values("a batch", samples, per_sample)?;
        disjoint(&[span(next, n), span(cur, n), span(h, n), span(sigma, samples)])?;
        // SAFETY: promised by the caller; they do not overlap.
        let (sigma, next, cur, h) = unsafe {
            (
                input("sigma", sigma, samples)?,
                output("next", next, n)?,
                output("cur", cur, n)?,
                output("h", h, n)?,
            )
        };
        check_signs(sigma)?;
        for (s, &sigma) in sigma.iter().enumerate() {
            let gamma = gamma.value(sigma.into());
            for i in s * per_sample..(s + 1) * per_sample {
                (next[i], cur[i], h[i]) = combine(gamma, next[i], cur[i]);
            }
        }
        Ok(())
    })
}

/// The checksum of n integers: a change of any one of them changes it. Sums of parts add up to the
/// sum of the whole if first is the index of the part's first value in the whole.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_checksum(
    x: *const i32,
    n: usize,
    first: usize,
    sum: *mut u64,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let (x, sum) = unsafe { (input("x", x, n)?, one_mut("sum", sum)?) };
        *sum = x
            .iter()
            .enumerate()
            .fold(0_u64, |sum, (i, &x)| sum.wrapping_add(checksum(x, first.wrapping_add(i))));
        Ok(())
    })
}
