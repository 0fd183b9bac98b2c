//! Matrix products over packed panels: each operand is copied once into the order in which the micro-kernel reads it.
//!
//! The shorter side of `C` is packed for all threads, then pieces of the longer side are packed and multiplied by one
//! thread each. So nothing is packed twice, and pieces may be narrow. How everything is cut depends on the shape alone,
//! and an element of `C` is a sum over `DEPTH` inner terms at a time, in their order: the bits are the same for any
//! number of threads.

use wide::f32x8;

use super::matmul::{View, cut};
use crate::Team;
use crate::memory::Shared;
use crate::simd::LANES;

/// Rows of the micro-kernel's tile.
const MR: usize = 6;
/// Columns of the micro-kernel's tile: with `MR` rows 12 registers of sums, 2 of `B` and 1 of `A`.
const NR: usize = 2 * LANES;
/// Inner terms of a panel: one of `B` is 16 KiB, half of an L1 cache.
const DEPTH: usize = 256;
/// Inner terms without a jump, and how many terms ahead `A` is asked for.
const UNROLL: usize = 4;
const AHEAD: usize = 32;
/// Rows (a multiple of `MR`) and columns (of `NR`) that are multiplied panel by panel before the next: 147 KiB and
/// 196 KiB, which an L2 cache of 512 KiB holds.
const ROWS: usize = 144;
const COLS: usize = 192;
/// Most rows or columns of a piece; smaller ones are halves and quarters.
const PIECE: usize = 192;
/// Pieces that are wanted, for many threads to have some.
const PIECES: usize = 16;
/// Most of the shorter side that is packed at a time.
const SHORT: usize = 2048;
/// Values of the shorter side that are packed at a time, for all threads: 4 MiB.
const SHARED: usize = 1 << 20;
/// Panels that a thread packs at a time.
const PANELS: usize = 8;

/// Values of packing memory: what is packed for all, and one piece for each thread.
pub(crate) fn scratch(threads: usize) -> usize {
    SHARED + threads * PIECE * DEPTH
}

/// Copies rows (or columns) `0 .. len` of a matrix, `depth` inner terms each, into panels of `W`: `out[panel][term][W]`.
/// The last panel is filled up with zeros.
///
/// # Safety
/// The matrix has these values, and nothing writes them meanwhile.
unsafe fn pack<const W: usize>(
    start: *const f32,
    step: usize,
    inner: usize,
    len: usize,
    depth: usize,
    out: &mut [f32],
) {
    let (panels, _) = out.as_chunks_mut::<W>();
    for (p, panel) in panels.chunks_mut(depth.max(1)).enumerate() {
        let from = start.wrapping_add(p * W * step);
        let width = W.min(len.saturating_sub(p * W));
        // SAFETY: `at(i, k)` below is within the matrix, as the caller promises.
        let at = |i: usize, k: usize| unsafe { *from.add(i * step + k * inner) };
        if width < W {
            for (k, line) in panel.iter_mut().enumerate() {
                *line = core::array::from_fn(|i| if i < width { at(i, k) } else { 0.0 });
            }
        } else if step == 1 {
            for (k, line) in panel.iter_mut().enumerate() {
                // SAFETY: as above; the values lie side by side.
                *line = unsafe { *from.add(k * inner).cast() };
            }
        } else if inner == 1 {
            // Eight terms of up to eight rows are turned at a time.
            let whole = panel.len() / LANES * LANES;
            let flat = panel.as_flattened_mut();
            for k in (0..whole).step_by(LANES) {
                for first in (0..W).step_by(LANES) {
                    let n = LANES.min(W - first);
                    // SAFETY: as above.
                    let row = |i: usize| f32x8::new(unsafe { *from.add((first + i) * step + k).cast() });
                    let block = f32x8::transpose(core::array::from_fn(|i| if i < n { row(i) } else { f32x8::ZERO }));
                    for (t, values) in block.iter().enumerate() {
                        let to = &mut flat[(k + t) * W + first..];
                        // What lies behind a line that is narrower than a register is written by a later store.
                        match to.first_chunk_mut() {
                            Some(to) => *to = values.to_array(),
                            None => to[..n].copy_from_slice(&values.to_array()[..n]),
                        }
                    }
                }
            }
            for (k, line) in panel.iter_mut().enumerate().skip(whole) {
                *line = core::array::from_fn(|i| at(i, k));
            }
        } else {
            for (k, line) in panel.iter_mut().enumerate() {
                *line = core::array::from_fn(|i| at(i, k));
            }
        }
    }
}

/// The sums of one tile of `C` over one panel of each operand.
#[inline(always)]
fn kernel(a: &[[f32; MR]], b: &[[f32; NR]]) -> [[f32x8; 2]; MR] {
    let mut sums = [[f32x8::ZERO; 2]; MR];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<UNROLL>(), b.as_chunks::<UNROLL>());
    for (a, b) in a.iter().zip(b) {
        // `B` stays in the L1 cache from tile to tile, `A` comes from the L2 cache.
        prefetch(a.as_ptr().wrapping_add(AHEAD));
        for (a, b) in a.iter().zip(b) {
            add(&mut sums, a, b);
        }
    }
    for (a, b) in a_rest.iter().zip(b_rest) {
        add(&mut sums, a, b);
    }
    sums
}

/// One inner term of a tile.
#[inline(always)]
fn add(sums: &mut [[f32x8; 2]; MR], a: &[f32; MR], b: &[f32; NR]) {
    let [b0, b1] = halves(b);
    for (sums, &a) in sums.iter_mut().zip(a) {
        let x = f32x8::splat(a);
        sums[0] = x.mul_add(b0, sums[0]);
        sums[1] = x.mul_add(b1, sums[1]);
    }
}

/// Asks for the cache line at an address, which need not be one of ours.
#[inline(always)]
fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; the address is not accessed.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[inline(always)]
fn halves(line: &[f32; NR]) -> [f32x8; 2] {
    let [a, b] = line.as_chunks::<LANES>().0 else { return [f32x8::ZERO; 2] };
    [f32x8::new(*a), f32x8::new(*b)]
}

/// What is added to a panel's sums before they become `C`.
#[derive(Clone, Copy)]
struct Arrival<'a> {
    /// `C` itself.
    add: bool,
    /// The bias of all columns.
    bias: Option<&'a [f32]>,
}

/// `C`, its rows `stride` apart.
#[derive(Clone, Copy)]
struct Target<'a> {
    values: &'a Shared<'a, f32>,
    stride: usize,
    rows: usize,
    cols: usize,
}

/// One tile of `C` from row `row` and column `col` on.
///
/// # Safety
/// Nothing else accesses the tile.
#[inline(never)]
unsafe fn tile(a: &[[f32; MR]], b: &[[f32; NR]], c: Target, row: usize, col: usize, arrival: Arrival) {
    let (rows, cols) = (MR.min(c.rows - row), NR.min(c.cols - col));
    for r in 0..rows {
        // `C` is needed when the sums are there, and neither cache has it.
        prefetch(c.values.pointer().wrapping_add((row + r) * c.stride + col));
        prefetch(c.values.pointer().wrapping_add((row + r) * c.stride + col + cols - 1));
    }
    let sums = kernel(a, b);
    if cols == NR {
        for (r, sums) in sums.iter().enumerate().take(rows) {
            // SAFETY: the tile is within `C`, and nothing else accesses it.
            let line = unsafe { c.values.part((row + r) * c.stride + col, NR) };
            let (parts, _) = line.as_chunks_mut::<LANES>();
            for (half, (part, &sum)) in parts.iter_mut().zip(sums).enumerate() {
                let mut value = if arrival.add { f32x8::new(*part) + sum } else { sum };
                if let Some(bias) = arrival.bias.and_then(|b| b[col + half * LANES..].first_chunk()) {
                    value += f32x8::new(*bias);
                }
                *part = value.to_array();
            }
        }
        return;
    }
    for (r, sums) in sums.iter().enumerate().take(rows) {
        // SAFETY: as above.
        let line = unsafe { c.values.part((row + r) * c.stride + col, cols) };
        let sums = sums.map(f32x8::to_array);
        for (i, (c, sum)) in line.iter_mut().zip(sums.as_flattened()).enumerate() {
            let value = if arrival.add { *c + sum } else { *sum };
            *c = arrival.bias.map_or(value, |bias| value + bias[col + i]);
        }
    }
}

/// The rectangle of `C` from row `at[0]` and column `at[1]` on, over one panel of each operand; `a` and `b` begin with
/// the panels of that row and that column.
///
/// # Safety
/// Nothing else accesses the rectangle.
unsafe fn rectangle(
    [a, b]: [&[f32]; 2],
    depth: usize,
    c: Target,
    at: [usize; 2],
    [rows, cols]: [usize; 2],
    arrival: Arrival,
) {
    let ((a, _), (b, _)) = (a.as_chunks::<MR>(), b.as_chunks::<NR>());
    for rows_from in (0..rows).step_by(ROWS) {
        for cols_from in (0..cols).step_by(COLS) {
            for col in (cols_from..cols.min(cols_from + COLS)).step_by(NR) {
                let b = &b[col / NR * depth..][..depth];
                for row in (rows_from..rows.min(rows_from + ROWS)).step_by(MR) {
                    let a = &a[row / MR * depth..][..depth];
                    // SAFETY: the caller's promise.
                    unsafe { tile(a, b, c, at[0] + row, at[1] + col, arrival) };
                }
            }
        }
    }
}

/// `C (+)= A·B (+ bias)` for dense `c`, over the threads; `memory` holds [`scratch`] values.
pub(super) fn product(
    team: &Team,
    [rows, cols, inner]: [usize; 3],
    a: View,
    b: View,
    bias: Option<&[f32]>,
    c: &mut [f32],
    accumulate: bool,
    memory: &mut [f32],
) {
    if inner == 0 {
        for row in c.chunks_mut(cols) {
            if !accumulate {
                row.fill(0.0);
            }
            row.iter_mut().zip(bias.unwrap_or(&[])).for_each(|(c, bias)| *c += bias);
        }
        return;
    }
    let (shared, slots) = memory.split_at_mut(SHARED);
    let (shared, slots) = (Shared::new(shared), Shared::new(slots));
    let c = &Shared::new(c);
    let target = Target { values: c, stride: cols, rows, cols };
    // The longer side is cut into pieces, of which each thread packs its own.
    let by_rows = rows > cols;
    let (short, long) = if by_rows { (cols, rows) } else { (rows, cols) };
    let (short_unit, long_unit) = if by_rows { (NR, MR) } else { (MR, NR) };
    let mut piece = PIECE;
    while long.div_ceil(piece) < PIECES && piece > 48 {
        piece /= 2;
    }
    let short_step = cut(short, SHORT, 48);
    let depth = cut(inner, DEPTH, 1);
    let steps = inner.div_ceil(depth);
    let pack_rows = |from: usize, len: usize, k: usize, n: usize, out: &mut [f32]| {
        // SAFETY: a panel's rows are rows of the operand, which the caller checked.
        unsafe { pack::<MR>(a.at(from, k).start, a.row, a.col, len, n, out) }
    };
    let pack_cols = |from: usize, len: usize, k: usize, n: usize, out: &mut [f32]| {
        // SAFETY: as above, for columns.
        unsafe { pack::<NR>(b.at(k, from).start, b.col, b.row, len, n, out) }
    };
    for from in (0..short).step_by(short_step) {
        let len = short_step.min(short - from);
        let padded = len.next_multiple_of(short_unit);
        let panels = padded / short_unit;
        let at_once = (SHARED / (padded * depth)).max(1);
        for first in (0..steps).step_by(at_once) {
            let now = at_once.min(steps - first);
            // Where step `s` is: from `k` on, `n` inner terms.
            let step = |s: usize| (s * depth, depth.min(inner - s * depth));
            let groups = panels.div_ceil(PANELS);
            team.each(now * groups, |_, i| {
                let (s, panel) = (i / groups, i % groups * PANELS);
                let (k, n) = step(first + s);
                let (at, width) = (panel * short_unit, PANELS.min(panels - panel) * short_unit);
                // SAFETY: panels are disjoint.
                let out = unsafe { shared.part(s * depth * padded + at * n, width * n) };
                let len = width.min(len - at);
                if by_rows { pack_cols(from + at, len, k, n, out) } else { pack_rows(from + at, len, k, n, out) }
            });
            team.each(long.div_ceil(piece), |slot, i| {
                let at = i * piece;
                let width = piece.min(long - at);
                for s in 0..now {
                    let (k, n) = step(first + s);
                    // SAFETY: the slot is this thread's while the piece runs; what is shared is only read now.
                    let (own, all) = unsafe {
                        let own = slots.part(slot * PIECE * DEPTH, width.next_multiple_of(long_unit) * n);
                        (own, shared.view(s * depth * padded, padded * n))
                    };
                    if by_rows {
                        pack_rows(at, width, k, n, own)
                    } else {
                        pack_cols(at, width, k, n, own)
                    }
                    let start = first + s == 0;
                    let arrival = Arrival { add: accumulate || !start, bias: bias.filter(|_| start) };
                    // SAFETY: pieces are disjoint rectangles of `C`.
                    unsafe {
                        if by_rows {
                            rectangle([own, all], n, target, [at, from], [width, len], arrival);
                        } else {
                            rectangle([all, own], n, target, [from, at], [len, width], arrival);
                        }
                    }
                }
            });
        }
    }
}
