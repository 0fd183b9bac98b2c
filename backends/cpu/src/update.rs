//! [`UpdateOps`]: the reversible update in lanes and threads, with the bits of
//! [`bdia_core::update`].
//!
//! Kernels work on groups of 32 elements, one word of side bits; the last group of a sample is
//! filled up with zeros, which no checksum counts. Products and sums are rounded separately:
//! nothing here calls `mul_add`.

use bdia_core::update::{CHECKSUM_FACTORS, CHECKSUM_STRIDE, LIMIT};
use bdia_core::{Chunk, Fault, FloatGamma, Gamma, Grid, Ints, Reals, Result, UpdateOps, Words};
use wide::bytemuck::cast;
use wide::{f32x8, i32x8};

use crate::memory::{Shared, get, get_mut, split};
use crate::simd::LANES;
use crate::{BLOCK, Cpu, Team};

/// Elements of a group.
const GROUP: usize = 32;
/// Registers of a group.
const PARTS: usize = GROUP / LANES;

/// How the elements of a chunk are cut into pieces: by sample, then into blocks that are a multiple
/// of [`GROUP`].
#[derive(Clone, Copy)]
pub(crate) struct Pieces {
    samples: usize,
    /// Elements of a sample.
    pub(crate) per: usize,
    /// Blocks of a sample.
    blocks: usize,
}

impl Pieces {
    pub(crate) fn new(chunk: &Chunk, per: usize) -> Self {
        Self { samples: chunk.samples, per, blocks: per.div_ceil(BLOCK) }
    }

    pub(crate) fn count(self) -> usize {
        if self.per == 0 { 0 } else { self.samples * self.blocks }
    }

    /// Sample, first element within the sample, and number of elements of a piece.
    pub(crate) fn locate(self, piece: usize) -> (usize, usize, usize) {
        let (sample, start) = (piece / self.blocks, piece % self.blocks * BLOCK);
        (sample, start, BLOCK.min(self.per - start))
    }
}

/// What a piece reports: its part of the checksum, and its first bad value by index in the chunk.
#[derive(Clone, Copy)]
struct Report {
    sum: u64,
    bad: Option<(usize, f64)>,
}

impl Report {
    const NONE: Self = Self { sum: 0, bad: None };

    fn join(self, other: Self) -> Self {
        let bad = match (self.bad, other.bad) {
            (Some(a), Some(b)) => Some(if a.0 <= b.0 { a } else { b }),
            (a, b) => a.or(b),
        };
        Self { sum: self.sum.wrapping_add(other.sum), bad }
    }

    fn see(&mut self, index: usize, value: f64) {
        self.bad.get_or_insert((index, value));
    }
}

/// Adds to a 64-bit number kept in two words; nothing where there are none.
fn accumulate(words: &mut [u32], add: u64) {
    if let [low, high] = words {
        let sum = (u64::from(*high) << 32 | u64::from(*low)).wrapping_add(add);
        (*low, *high) = (sum as u32, (sum >> 32) as u32);
    }
}

/// Keeps the fault that `of(sample, value)` is, where a value is bad.
fn fault_of(
    fault: &mut Option<Fault>,
    chunk: &Chunk,
    pieces: Pieces,
    report: Report,
    of: impl FnOnce(usize, f64) -> Fault,
) {
    if let Some((index, value)) = report.bad {
        let sample = chunk.first.wrapping_add(index.checked_div(pieces.per).unwrap_or(0));
        fault.get_or_insert(of(sample, value));
    }
}

fn range_fault(fault: &mut Option<Fault>, chunk: &Chunk, pieces: Pieces, report: Report) {
    let site = chunk.site;
    fault_of(fault, chunk, pieces, report, |sample, value| Fault::Range { site, sample, value });
}

fn gradient_fault(fault: &mut Option<Fault>, chunk: &Chunk, pieces: Pieces, report: Report) {
    let site = chunk.site;
    fault_of(fault, chunk, pieces, report, |sample, value| Fault::ActivationGradient {
        site,
        sample,
        value,
    });
}

/// The states of the even and the odd elements of a group of zeros whose first element is element
/// 0 of its tensor.
const STATES: [[u64; GROUP / 2]; 2] = {
    let mut states = [[0; GROUP / 2]; 2];
    let mut i = 0;
    while i < GROUP {
        states[i % 2][i / 2] = CHECKSUM_STRIDE.wrapping_mul(i as u64);
        i += 1;
    }
    states
};
/// The lower half of 64 bits.
const LOW: u64 = 0xFFFF_FFFF;

/// The checksum ([`bdia_core::update::checksum`]) of a group whose first element has the index
/// `first` in its tensor; `left` elements of the piece are left from there on.
#[inline]
fn group_sum(x: &[i32; GROUP], left: usize, first: usize) -> u64 {
    if left < GROUP {
        return x[..left].iter().enumerate().fold(0, |sum: u64, (i, &x)| {
            sum.wrapping_add(bdia_core::update::checksum(x, first.wrapping_add(i)))
        });
    }
    // Pairs of 32-bit lanes are taken apart as 64-bit ones, and the halves of a state lie in two
    // of them, whose upper halves hold anything: the product of two lower halves is a single
    // instruction.
    let base = (first as u64).wrapping_mul(CHECKSUM_STRIDE);
    let pairs: &[u64; GROUP / 2] = &cast(*x);
    let mut sums = [0_u64; 4];
    for start in (0..GROUP / 2).step_by(4) {
        for (odd, states) in STATES.iter().enumerate() {
            let (mut high, mut low) = ([0_u64; 4], [0_u64; 4]);
            for i in 0..4 {
                let state = base.wrapping_add(states[start + i]);
                high[i] = state >> 32;
                low[i] = state ^ (pairs[start + i] >> (32 * odd));
            }
            for factor in CHECKSUM_FACTORS {
                let mut next = [0_u64; 4];
                for i in 0..4 {
                    let p = (low[i] & LOW) * u64::from(factor);
                    next[i] = high[i] ^ p ^ p >> 32;
                }
                (high, low) = (low, next);
            }
            for i in 0..4 {
                sums[i] = sums[i].wrapping_add(high[i] << 32 | low[i] & LOW);
            }
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// `Q(y)`, 0 where it is out of range, and the mask of the lanes that are in range.
#[inline]
fn quantize(y: f32x8, scale: f32x8) -> (i32x8, i32x8) {
    let q = (y * scale).round_ties_even();
    // A NaN is not within.
    let within = !(q.abs().simd_gt(f32x8::splat(LIMIT as f32)) | q.is_nan());
    ((q & within).fast_trunc_int(), cast(within))
}

/// The highest bit of every lane.
#[inline]
fn sign_bits(x: i32x8) -> u32 {
    cast::<i32x8, f32x8>(x).to_bitmask()
}

/// The mask of the lanes beyond the limit.
#[inline]
fn beyond(x: i32x8) -> i32x8 {
    x.simd_gt(i32x8::splat(LIMIT)) | x.simd_lt(i32x8::splat(-LIMIT))
}

#[inline]
fn part(a: &[f32; GROUP], p: usize) -> f32x8 {
    let (parts, _) = a.as_chunks::<LANES>();
    f32x8::new(parts[p])
}

#[inline]
fn int_part(a: &[i32; GROUP], p: usize) -> i32x8 {
    let (parts, _) = a.as_chunks::<LANES>();
    i32x8::new(parts[p])
}

#[inline]
fn set_part(a: &mut [i32; GROUP], p: usize, v: i32x8) {
    let (parts, _) = a.as_chunks_mut::<LANES>();
    parts[p] = v.to_array();
}

/// Up to 32 values, filled up with zeros.
#[inline]
fn padded<T: Copy + Default>(tail: &[T]) -> [T; GROUP] {
    let mut a = [T::default(); GROUP];
    a[..tail.len()].copy_from_slice(tail);
    a
}

/// Runs `f(group number, x, y)` over whole groups and the filled-up last one.
#[inline]
fn groups2(x: &mut [i32], y: &[f32], mut f: impl FnMut(usize, &mut [i32; GROUP], &[f32; GROUP])) {
    let ((xs, x_tail), (ys, y_tail)) = (x.as_chunks_mut::<GROUP>(), y.as_chunks::<GROUP>());
    let whole = xs.len();
    for (g, (x, y)) in xs.iter_mut().zip(ys).enumerate() {
        f(g, x, y);
    }
    if !x_tail.is_empty() {
        let mut a = padded(x_tail);
        f(whole, &mut a, &padded(y_tail));
        x_tail.copy_from_slice(&a[..x_tail.len()]);
    }
}

/// As [`groups2`] with two inputs.
#[inline]
fn groups3(
    x: &mut [i32],
    y: &[f32],
    z: &[f32],
    mut f: impl FnMut(usize, &mut [i32; GROUP], &[f32; GROUP], &[f32; GROUP]),
) {
    let ((xs, x_tail), (ys, y_tail), (zs, z_tail)) =
        (x.as_chunks_mut::<GROUP>(), y.as_chunks::<GROUP>(), z.as_chunks::<GROUP>());
    let whole = xs.len();
    for (g, ((x, y), z)) in xs.iter_mut().zip(ys).zip(zs).enumerate() {
        f(g, x, y, z);
    }
    if !x_tail.is_empty() {
        let mut a = padded(x_tail);
        f(whole, &mut a, &padded(y_tail), &padded(z_tail));
        x_tail.copy_from_slice(&a[..x_tail.len()]);
    }
}

/// The constants of one sample: `1-γ`, `1+γ`, γ, `2^l`, and σ as a mask to negate by.
#[derive(Clone, Copy)]
struct Sample {
    less: f32x8,
    more: f32x8,
    gamma: f32x8,
    negate: i32x8,
}

impl Sample {
    fn new(chunk: &Chunk, gamma: FloatGamma, sample: usize) -> Self {
        let sigma = chunk.sigma(gamma, sample);
        let g = gamma.value::<f32>(sigma);
        Self {
            less: f32x8::splat(1.0 - g),
            more: f32x8::splat(1.0 + g),
            gamma: f32x8::splat(g),
            negate: i32x8::splat(if sigma < 0 { -1 } else { 0 }),
        }
    }

    /// `(1-γ)·x + (1+γ)·h`.
    #[inline]
    fn mix(&self, x: f32x8, h: f32x8) -> f32x8 {
        self.less * x + self.more * h
    }

    /// `σ·v`, wrapping.
    #[inline]
    fn signed(&self, v: i32x8) -> i32x8 {
        (v ^ self.negate) - self.negate
    }
}

/// Mask of the lanes with an odd index (groups start at even ones).
const ODD: i32x8 = i32x8::new([0, -1, 0, -1, 0, -1, 0, -1]);
/// The bit of each lane.
const BITS: i32x8 = i32x8::new([1, 2, 4, 8, 16, 32, 64, 128]);

/// [`bdia_core::update::shift`] in lanes; `ONE` says that `m = 1`.
#[inline]
fn shift<const ONE: bool>(m: u32, r: i32x8) -> i32x8 {
    if ONE {
        return r;
    }
    let half = i32x8::splat(1 << (m - 1));
    let up = r.simd_gt(half) | (r.simd_eq(half) & ODD);
    (up & i32x8::splat(1 << m)) - r
}

/// Places of the words of side bits: sample by sample, plane by plane.
#[derive(Clone, Copy)]
struct Planes {
    m: usize,
    /// Words of one plane.
    stride: usize,
}

impl Planes {
    fn words(self, sample: usize, plane: usize, start: usize) -> usize {
        (sample * self.m + plane) * self.stride + start / GROUP
    }
}

/// The step over one piece. `ONE`: `m = 1`.
#[inline]
fn step_piece<const ONE: bool>(
    s: &Sample,
    m: u32,
    scale: f32x8,
    unit: f64,
    x: &mut [i32],
    cur: &[f32],
    h: &[f32],
    first: usize,
    mut keep: impl FnMut(usize, usize, u32),
    with_sum: bool,
) -> Report {
    let (len, mut report) = (x.len(), Report::NONE);
    groups3(x, cur, h, |g, x, cur, h| {
        let mut words = [0_u32; Gamma::MAX_PLANES as usize];
        let (mut wrong, mut unquantized) = (0_u32, 0_u32);
        for p in 0..PARTS {
            let (q, within) = quantize(s.mix(part(cur, p), part(h, p)), scale);
            let old = int_part(x, p);
            let r = old & i32x8::splat((1 << m) - 1);
            if ONE {
                words[0] |= sign_bits(old << 31_i32) << (p * LANES);
            } else {
                for plane in 0..m {
                    words[plane as usize] |= sign_bits(old << (31 - plane)) << (p * LANES);
                }
            }
            let shifted = (old + shift::<ONE>(m, r)) >> m;
            let new = s.signed(shifted) + q;
            set_part(x, p, new);
            unquantized |= sign_bits(!within) << (p * LANES);
            wrong |= sign_bits(!within | beyond(new)) << (p * LANES);
        }
        for plane in 0..m as usize {
            keep(plane, g, words[plane]);
        }
        if with_sum {
            let (left, first) = (len - g * GROUP, first.wrapping_add(g * GROUP));
            report.sum = report.sum.wrapping_add(group_sum(x, left, first));
        }
        if wrong != 0 {
            let i = wrong.trailing_zeros() as usize;
            let value = if unquantized >> i & 1 == 1 {
                f64::from(s.mix(f32x8::splat(cur[i]), f32x8::splat(h[i])).to_array()[0])
            } else {
                f64::from(x[i]) * unit
            };
            report.see(g * GROUP + i, value);
        }
    });
    report
}

/// The inverse over one piece. `ONE`: `m = 1`.
#[inline]
fn inverse_piece<const ONE: bool>(
    s: &Sample,
    m: u32,
    scale: f32x8,
    x: &mut [i32],
    cur: &[f32],
    h: &[f32],
    first: usize,
    side: impl Fn(usize, usize) -> u32,
    with_sum: bool,
) -> u64 {
    let (len, mut sum) = (x.len(), 0_u64);
    groups3(x, cur, h, |g, x, cur, h| {
        let mut words = [0_u32; Gamma::MAX_PLANES as usize];
        for plane in 0..m as usize {
            words[plane] = side(plane, g);
        }
        for p in 0..PARTS {
            let (q, _) = quantize(s.mix(part(cur, p), part(h, p)), scale);
            let lanes = |plane: u32| {
                let bits = i32x8::splat((words[plane as usize] >> (p * LANES)) as i32) & BITS;
                bits.simd_eq(BITS) & i32x8::splat(1 << plane)
            };
            let mut r = lanes(0);
            if !ONE {
                for plane in 1..m {
                    r |= lanes(plane);
                }
            }
            let old = (s.signed(int_part(x, p) - q) << m) - shift::<ONE>(m, r);
            set_part(x, p, old);
        }
        if with_sum {
            sum = sum.wrapping_add(group_sum(x, len - g * GROUP, first.wrapping_add(g * GROUP)));
        }
    });
    sum
}

/// Three tensors of reals, piece by piece: `f(constants of the sample, first, second, third)`.
fn reals3(
    team: &Team,
    chunk: &Chunk,
    gamma: FloatGamma,
    pieces: Pieces,
    tensors: [&mut [f32]; 3],
    f: impl Fn(&Sample, &mut [f32], &mut [f32], &mut [f32]) -> Option<(usize, f64)> + Sync,
) -> Report {
    let [a, b, c] = tensors.map(Shared::new);
    team.reduce(
        pieces.count(),
        Report::NONE,
        |piece| {
            let (sample, start, len) = pieces.locate(piece);
            let at = sample * pieces.per + start;
            // SAFETY: pieces are disjoint, and the tensors come from disjoint handles.
            let (a, b, c) = unsafe { (a.part(at, len), b.part(at, len), c.part(at, len)) };
            let bad = f(&Sample::new(chunk, gamma, sample), a, b, c);
            Report { sum: 0, bad: bad.map(|(i, v)| (at + i, v)) }
        },
        Report::join,
    )
}

/// Whether a value is not finite: a comparison of bits, which is one of lanes.
#[inline]
fn wild(x: f32) -> bool {
    const EXPONENT: u32 = 0x7F80_0000;
    x.to_bits() & EXPONENT == EXPONENT
}

/// The first of `n` indices that is bad. Looked for in blocks, without a branch per element.
#[inline]
fn first_bad(n: usize, bad: impl Fn(usize) -> bool) -> Option<usize> {
    const BLOCK: usize = 256;
    (0..n)
        .step_by(BLOCK)
        .map(|start| start..n.min(start + BLOCK))
        .find(|block| block.clone().fold(false, |any, i| any | bad(i)))
        .and_then(|mut block| block.find(|&i| bad(i)))
}

/// The first value that is not finite.
fn first_wild(x: &[f32]) -> Option<(usize, f64)> {
    first_bad(x.len(), |i| wild(x[i])).map(|i| (i, f64::from(x[i])))
}

/// `first(start, length)`, the first bad value of a piece, over all pieces.
fn checked(
    team: &Team,
    pieces: Pieces,
    first: impl Fn(usize, usize) -> Option<(usize, f64)> + Sync,
) -> Report {
    team.reduce(
        pieces.count(),
        Report::NONE,
        |piece| {
            let (sample, start, len) = pieces.locate(piece);
            let at = sample * pieces.per + start;
            Report { sum: 0, bad: first(at, len).map(|(i, v)| (at + i, v)) }
        },
        Report::join,
    )
}

impl UpdateOps for Cpu {
    fn quantize(&mut self, chunk: &Chunk, grid: Grid, y: Reals, x: Ints, sum: Words) -> Result<()> {
        let pieces = Pieces::new(chunk, self.arenas().quantize("quantize", chunk, y, x, sum)?);
        let x = get_mut(&mut self.ints, x, "quantize")?;
        let y = get(&self.reals, y, "quantize")?;
        let sum = get_mut(&mut self.words, sum, "quantize")?;
        let (x, with_sum, scale) = (Shared::new(x), !sum.is_empty(), f32x8::splat(grid.scale()));
        let report = self.team.reduce(
            pieces.count(),
            Report::NONE,
            |piece| {
                let (sample, start, len) = pieces.locate(piece);
                let at = sample * pieces.per + start;
                let first = chunk.first.wrapping_mul(pieces.per).wrapping_add(at);
                let mut report = Report::NONE;
                // SAFETY: pieces are disjoint.
                groups2(unsafe { x.part(at, len) }, &y[at..at + len], |g, x, y| {
                    let mut wrong = 0;
                    for p in 0..PARTS {
                        let (q, within) = quantize(part(y, p), scale);
                        set_part(x, p, q);
                        wrong |= sign_bits(!within) << (p * LANES);
                    }
                    if with_sum {
                        let (left, first) = (len - g * GROUP, first.wrapping_add(g * GROUP));
                        report.sum = report.sum.wrapping_add(group_sum(x, left, first));
                    }
                    if wrong != 0 {
                        let i = wrong.trailing_zeros() as usize;
                        report.see(at + g * GROUP + i, f64::from(y[i]));
                    }
                });
                report
            },
            Report::join,
        );
        accumulate(sum, report.sum);
        range_fault(&mut self.fault, chunk, pieces, report);
        Ok(())
    }

    fn dequantize(&mut self, grid: Grid, x: Ints, y: Reals) -> Result<()> {
        self.arenas().dequantize(x, y)?;
        let x = get(&self.ints, x, "dequantize")?;
        let y = get_mut(&mut self.reals, y, "dequantize")?;
        let (y, unit) = (Shared::new(y), grid.unit::<f32>());
        self.team.each(x.len().div_ceil(BLOCK), |_, b| {
            let x = &x[b * BLOCK..x.len().min((b + 1) * BLOCK)];
            // SAFETY: blocks are disjoint.
            let y = unsafe { y.part(b * BLOCK, x.len()) };
            for (y, &x) in y.iter_mut().zip(x) {
                *y = x as f32 * unit;
            }
        });
        Ok(())
    }

    fn add_quantized(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        x: Ints,
        h: Reals,
        sum: Words,
    ) -> Result<()> {
        let pieces = Pieces::new(chunk, self.arenas().quantize("add_quantized", chunk, h, x, sum)?);
        let x = get_mut(&mut self.ints, x, "add_quantized")?;
        let h = get(&self.reals, h, "add_quantized")?;
        let sum = get_mut(&mut self.words, sum, "add_quantized")?;
        let (x, with_sum) = (Shared::new(x), !sum.is_empty());
        let (scale, unit) = (f32x8::splat(grid.scale()), grid.unit::<f64>());
        let report = self.team.reduce(
            pieces.count(),
            Report::NONE,
            |piece| {
                let (sample, start, len) = pieces.locate(piece);
                let at = sample * pieces.per + start;
                let first = chunk.first.wrapping_mul(pieces.per).wrapping_add(at);
                let mut report = Report::NONE;
                // SAFETY: pieces are disjoint.
                groups2(unsafe { x.part(at, len) }, &h[at..at + len], |g, x, h| {
                    let (mut wrong, mut unquantized) = (0_u32, 0_u32);
                    for p in 0..PARTS {
                        let (q, within) = quantize(part(h, p), scale);
                        let new = int_part(x, p) + q;
                        set_part(x, p, new);
                        unquantized |= sign_bits(!within) << (p * LANES);
                        wrong |= sign_bits(!within | beyond(new)) << (p * LANES);
                    }
                    if with_sum {
                        let (left, first) = (len - g * GROUP, first.wrapping_add(g * GROUP));
                        report.sum = report.sum.wrapping_add(group_sum(x, left, first));
                    }
                    if wrong != 0 {
                        let i = wrong.trailing_zeros() as usize;
                        let value = if unquantized >> i & 1 == 1 {
                            f64::from(h[i])
                        } else {
                            f64::from(x[i]) * unit
                        };
                        report.see(at + g * GROUP + i, value);
                    }
                });
                report
            },
            Report::join,
        );
        accumulate(sum, report.sum);
        range_fault(&mut self.fault, chunk, pieces, report);
        Ok(())
    }

    fn subtract_quantized(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        x: Ints,
        h: Reals,
        sum: Words,
    ) -> Result<()> {
        let pieces =
            Pieces::new(chunk, self.arenas().quantize("subtract_quantized", chunk, h, x, sum)?);
        let x = get_mut(&mut self.ints, x, "subtract_quantized")?;
        let h = get(&self.reals, h, "subtract_quantized")?;
        let sum = get_mut(&mut self.words, sum, "subtract_quantized")?;
        let (x, with_sum, scale) = (Shared::new(x), !sum.is_empty(), f32x8::splat(grid.scale()));
        let total = self.team.reduce(
            pieces.count(),
            0,
            |piece| {
                let (sample, start, len) = pieces.locate(piece);
                let at = sample * pieces.per + start;
                let first = chunk.first.wrapping_mul(pieces.per).wrapping_add(at);
                let mut total = 0_u64;
                // SAFETY: pieces are disjoint.
                groups2(unsafe { x.part(at, len) }, &h[at..at + len], |g, x, h| {
                    for p in 0..PARTS {
                        set_part(x, p, int_part(x, p) - quantize(part(h, p), scale).0);
                    }
                    if with_sum {
                        let (left, first) = (len - g * GROUP, first.wrapping_add(g * GROUP));
                        total = total.wrapping_add(group_sum(x, left, first));
                    }
                });
                total
            },
            u64::wrapping_add,
        );
        accumulate(sum, total);
        Ok(())
    }

    fn step(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        gamma: Gamma,
        x: Ints,
        cur: Reals,
        h: Reals,
        side: Words,
        sum: Words,
    ) -> Result<()> {
        let (per, m) = self.arenas().step("step", chunk, gamma, x, [cur, h], (side, true), sum)?;
        let pieces = Pieces::new(chunk, per);
        let x = get_mut(&mut self.ints, x, "step")?;
        let cur = get(&self.reals, cur, "step")?;
        let h = get(&self.reals, h, "step")?;
        let [side, sum] = split(&mut self.words, [side, sum], "step")?;
        let planes = Planes { m: m as usize, stride: pieces.per.div_ceil(GROUP) };
        let (with_side, with_sum) = (!side.is_empty(), !sum.is_empty());
        let (x, side) = (Shared::new(x), Shared::new(side));
        let (scale, unit) = (f32x8::splat(grid.scale()), grid.unit::<f64>());
        let report = self.team.reduce(
            pieces.count(),
            Report::NONE,
            |piece| {
                let (sample, start, len) = pieces.locate(piece);
                let at = sample * pieces.per + start;
                let first = chunk.first.wrapping_mul(pieces.per).wrapping_add(at);
                let s = Sample::new(chunk, gamma.float(), sample);
                // SAFETY: pieces are disjoint.
                let x = unsafe { x.part(at, len) };
                let (cur, h) = (&cur[at..at + len], &h[at..at + len]);
                let keep = |plane, group, word| {
                    if with_side {
                        // SAFETY: pieces are whole groups of a sample, so each word belongs to one
                        // piece.
                        unsafe {
                            side.part(planes.words(sample, plane, start) + group, 1)[0] = word
                        };
                    }
                };
                let report = if m == 1 {
                    step_piece::<true>(&s, 1, scale, unit, x, cur, h, first, keep, with_sum)
                } else {
                    step_piece::<false>(&s, m, scale, unit, x, cur, h, first, keep, with_sum)
                };
                Report { bad: report.bad.map(|(i, v)| (at + i, v)), ..report }
            },
            Report::join,
        );
        accumulate(sum, report.sum);
        range_fault(&mut self.fault, chunk, pieces, report);
        Ok(())
    }

    fn inverse(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        gamma: Gamma,
        x: Ints,
        cur: Reals,
        h: Reals,
        side: Words,
        sum: Words,
    ) -> Result<()> {
        let (per, m) =
            self.arenas().step("inverse", chunk, gamma, x, [cur, h], (side, false), sum)?;
        let pieces = Pieces::new(chunk, per);
        let x = get_mut(&mut self.ints, x, "inverse")?;
        let cur = get(&self.reals, cur, "inverse")?;
        let h = get(&self.reals, h, "inverse")?;
        let [side, sum] = split(&mut self.words, [side, sum], "inverse")?;
        let planes = Planes { m: m as usize, stride: pieces.per.div_ceil(GROUP) };
        let (x, side, with_sum) = (Shared::new(x), &*side, !sum.is_empty());
        let scale = f32x8::splat(grid.scale());
        let total = self.team.reduce(
            pieces.count(),
            0,
            |piece| {
                let (sample, start, len) = pieces.locate(piece);
                let at = sample * pieces.per + start;
                let first = chunk.first.wrapping_mul(pieces.per).wrapping_add(at);
                let s = Sample::new(chunk, gamma.float(), sample);
                // SAFETY: pieces are disjoint.
                let x = unsafe { x.part(at, len) };
                let (cur, h) = (&cur[at..at + len], &h[at..at + len]);
                let word = |plane, group| side[planes.words(sample, plane, start) + group];
                if m == 1 {
                    inverse_piece::<true>(&s, 1, scale, x, cur, h, first, word, with_sum)
                } else {
                    inverse_piece::<false>(&s, m, scale, x, cur, h, first, word, with_sum)
                }
            },
            u64::wrapping_add,
        );
        accumulate(sum, total);
        Ok(())
    }

    fn blend(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        x: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()> {
        let pieces = Pieces::new(chunk, self.arenas().blend("blend", chunk, x, cur, h)?);
        let tensors = split(&mut self.reals, [x, cur, h], "blend")?;
        let without_x = gamma.magnitude() == 0.0;
        let report = reals3(&self.team, chunk, gamma, pieces, tensors, |s, x, cur, h| {
            crate::simd::map3(x, cur, h, |x, cur, h| {
                let mixed = s.mix(cur, h);
                if without_x { mixed } else { s.gamma * x + mixed }
            });
            first_wild(x)
        });
        range_fault(&mut self.fault, chunk, pieces, report);
        Ok(())
    }

    fn unblend(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        x: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()> {
        let pieces = Pieces::new(chunk, self.arenas().blend("unblend", chunk, x, cur, h)?);
        let tensors = split(&mut self.reals, [x, cur, h], "unblend")?;
        reals3(&self.team, chunk, gamma, pieces, tensors, |s, x, cur, h| {
            crate::simd::map3(x, cur, h, |x, cur, h| (x - s.mix(cur, h)) / s.gamma);
            None
        });
        Ok(())
    }

    fn combine(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        next: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()> {
        let pieces = Pieces::new(chunk, self.arenas().blend("combine", chunk, next, cur, h)?);
        let tensors = split(&mut self.reals, [next, cur, h], "combine")?;
        let report = reals3(&self.team, chunk, gamma, pieces, tensors, |s, next, cur, h| {
            let (g, len) = (s.gamma.to_array()[0], next.len().min(cur.len()).min(h.len()));
            let mut any = false;
            for i in 0..len {
                (next[i], cur[i], h[i]) = bdia_core::update::combine(g, next[i], cur[i]);
                any |= wild(cur[i]) | wild(h[i]);
            }
            let first = if any { (0..len).find(|&i| wild(h[i]) || wild(cur[i])) } else { None };
            first.map(|i| (i, f64::from(if wild(h[i]) { h[i] } else { cur[i] })))
        });
        gradient_fault(&mut self.fault, chunk, pieces, report);
        Ok(())
    }

    fn check_gradient(&mut self, chunk: &Chunk, g: Reals) -> Result<()> {
        let pieces = Pieces::new(chunk, self.arenas().check_gradient(chunk, g)?);
        let g = get(&self.reals, g, "check_gradient")?;
        let report = checked(&self.team, pieces, |at, len| first_wild(&g[at..at + len]));
        gradient_fault(&mut self.fault, chunk, pieces, report);
        Ok(())
    }

    fn check_input(&mut self, chunk: &Chunk, grid: Grid, x: Ints, y: Reals) -> Result<()> {
        let pieces = Pieces::new(chunk, self.arenas().check_input(chunk, x, y)?);
        let x = get(&self.ints, x, "check_input")?;
        let y = get(&self.reals, y, "check_input")?;
        let unit = grid.unit::<f32>();
        let report = checked(&self.team, pieces, |at, len| {
            let (x, y) = (&x[at..at + len], &y[at..at + len]);
            let differs = |i: usize| (x[i] as f32 * unit).to_bits() != y[i].to_bits();
            first_bad(len, differs).map(|i| (i, f64::from(y[i])))
        });
        let site = chunk.site;
        fault_of(&mut self.fault, chunk, pieces, report, |sample, _| Fault::Input { site, sample });
        Ok(())
    }

    fn compare(&mut self, a: Words, b: Words, activation: usize, block: usize) -> Result<()> {
        self.arenas().compare(a, b)?;
        if self.words(a)? != self.words(b)? {
            self.fault.get_or_insert(Fault::Checksum { activation, block });
        }
        Ok(())
    }

    fn count_differences(&mut self, a: Ints, b: Ints, count: Words) -> Result<()> {
        self.arenas().count_differences(a, b, count)?;
        let (a, b) =
            (get(&self.ints, a, "count_differences")?, get(&self.ints, b, "count_differences")?);
        let count = get_mut(&mut self.words, count, "count_differences")?;
        let differing = self.team.reduce(
            a.len().div_ceil(BLOCK),
            0,
            |i| {
                let part = i * BLOCK..a.len().min((i + 1) * BLOCK);
                a[part.clone()].iter().zip(&b[part]).filter(|(a, b)| a != b).count() as u64
            },
            u64::wrapping_add,
        );
        accumulate(count, differing);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_groups_are_those_of_core() {
        let x: [i32; GROUP] = core::array::from_fn(|i| (i as i32 - 9).wrapping_mul(0x0765_4321));
        for first in [0, 1, 12_345, u32::MAX as usize - 5, usize::MAX - 7] {
            for left in [0, 1, 31, 32, 33, 1000] {
                let expected = (0..GROUP.min(left)).fold(0_u64, |sum, i| {
                    sum.wrapping_add(bdia_core::update::checksum(x[i], first.wrapping_add(i)))
                });
                assert_eq!(group_sum(&x, left, first), expected, "{first} {left}");
            }
        }
    }
}
