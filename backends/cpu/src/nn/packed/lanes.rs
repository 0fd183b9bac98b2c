//! The micro-kernel in lanes of `wide`: 6 × 16 for the 16 registers of AVX2 (or the 32 of NEON).

use wide::f32x8;

use super::{Kernel, Left, Place, pack, prefetch};
use crate::nn::view::View;
use crate::simd::LANES;

/// Rows of the tile.
const MR: usize = 6;
/// Columns of the tile: with `MR` rows 12 registers of sums, 2 of `B` and 1 of `A`.
const NR: usize = 2 * LANES;
/// Inner terms without a jump, and how many terms ahead `A` is asked for.
const UNROLL: usize = 4;
const AHEAD: usize = 32;

/// See the module.
pub(in crate::nn) struct Lanes;

impl Kernel for Lanes {
    const TILE: [usize; 2] = [MR, NR];
    /// A panel of `B` is 16 KiB, half of an L1 cache.
    const DEPTH: usize = 256;
    const PIECE: usize = 192;
    /// 147 KiB and 196 KiB, which an L2 cache of 512 KiB holds.
    const BLOCK: [usize; 2] = [144, 192];

    unsafe fn pack_rows(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { pack::<MR>(from.start, from.row, from.col, len, terms, out) }
    }

    unsafe fn pack_cols(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { pack::<NR>(from.start, from.col, from.row, len, terms, out) }
    }

    #[inline(never)]
    unsafe fn tile(a: Left<'_>, b: &[f32], c: Place) {
        let a = a.panel();
        let [rows, cols] = c.size;
        c.prefetch(0);
        let ((a, _), (b, _)) = (a.as_chunks(), b.as_chunks());
        let sums = sums(a, b);
        if cols == NR {
            for (r, sums) in sums.iter().enumerate().take(rows) {
                // SAFETY: the tile is within `C`, and nothing else accesses it.
                let line =
                    unsafe { core::slice::from_raw_parts_mut(c.start.add(r * c.stride), NR) };
                let (parts, _) = line.as_chunks_mut::<LANES>();
                for (half, (part, &sum)) in parts.iter_mut().zip(sums).enumerate() {
                    let mut value = if c.add { f32x8::new(*part) + sum } else { sum };
                    if let Some(bias) = c.bias.and_then(|b| b[half * LANES..].first_chunk()) {
                        value += f32x8::new(*bias);
                    }
                    *part = value.to_array();
                }
            }
            return;
        }
        for (r, sums) in sums.iter().enumerate().take(rows) {
            // SAFETY: as above.
            let line = unsafe { core::slice::from_raw_parts_mut(c.start.add(r * c.stride), cols) };
            let sums = sums.map(f32x8::to_array);
            for (i, (x, sum)) in line.iter_mut().zip(sums.as_flattened()).enumerate() {
                let value = if c.add { *x + sum } else { *sum };
                *x = c.bias.map_or(value, |bias| value + bias[i]);
            }
        }
    }
}

/// The sums of one tile of `C` over one panel of each operand.
#[inline(always)]
fn sums(a: &[[f32; MR]], b: &[[f32; NR]]) -> [[f32x8; 2]; MR] {
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

#[inline(always)]
fn halves(line: &[f32; NR]) -> [f32x8; 2] {
    let [a, b] = line.as_chunks::<LANES>().0 else { return [f32x8::ZERO; 2] };
    [f32x8::new(*a), f32x8::new(*b)]
}
