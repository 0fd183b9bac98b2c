//! The micro-kernel for AVX-512: 8 × 48, 24 registers of sums, 3 of `B`, and `A` straight from
//! memory.

use core::arch::x86_64::{
    __m512, __mmask16, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
};

use super::{Kernel, Left, Place, pack, prefetch};
use crate::nn::view::View;

/// Rows of the tile.
const MR: usize = 8;
/// Values of a register.
const WIDE: usize = 16;
/// Columns of the tile.
const NR: usize = 3 * WIDE;
/// Inner terms without a jump, and how many terms ahead `A` is asked for.
const UNROLL: usize = 4;
const AHEAD: usize = 64;

/// See the module. Only where the processor has AVX-512F.
pub(in crate::nn) struct Avx512;

impl Kernel for Avx512 {
    const TILE: [usize; 2] = [MR, NR];
    /// A panel of `B` is 96 KiB and comes from the L2 cache, three registers for 24 of products.
    const DEPTH: usize = 512;
    const PIECE: usize = 384;
    /// 192 KiB and 384 KiB, which an L2 cache of 1 MiB holds.
    const BLOCK: [usize; 2] = [96, 192];

    unsafe fn pack_rows(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { pack::<MR>(from.start, from.row, from.col, len, terms, out) }
    }

    unsafe fn pack_cols(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { pack::<NR>(from.start, from.col, from.row, len, terms, out) }
    }

    const IN_PLACE: bool = true;

    unsafe fn tile(a: Left<'_>, b: &[f32], c: Place) {
        // The last panel of `B` is multiplied as far as `C` reaches.
        // SAFETY: whoever chose this kernel has seen AVX-512F; the rest is the caller's promise.
        unsafe {
            match (a, c.size[1].div_ceil(WIDE)) {
                (Left::Panel(a), 1) => registers::<1>(a, b, c),
                (Left::Panel(a), 2) => registers::<2>(a, b, c),
                (Left::Panel(a), _) => registers::<3>(a, b, c),
                (Left::InPlace(start, stride), 1) => in_place::<1>(start, stride, b, c),
                (Left::InPlace(start, stride), 2) => in_place::<2>(start, stride, b, c),
                (Left::InPlace(start, stride), _) => in_place::<3>(start, stride, b, c),
            }
        }
    }
}

/// A tile whose columns take `N` registers.
///
/// # Safety
/// AVX-512F, and as for [`Kernel::tile`].
#[target_feature(enable = "avx512f")]
unsafe fn registers<const N: usize>(a: &[f32], b: &[f32], c: Place) {
    c.prefetch(0);
    let ((a, _), (b, _)) = (a.as_chunks::<MR>(), b.as_chunks::<NR>());
    let mut sums = [[_mm512_setzero_ps(); N]; MR];
    let mut add = |a: &[f32; MR], b: &[f32; NR]| {
        prefetch(a.as_ptr().wrapping_add(AHEAD * MR));
        // SAFETY: `N` registers lie within the `NR` values of a line.
        let b: [__m512; N] =
            core::array::from_fn(|i| unsafe { _mm512_loadu_ps(b.as_ptr().add(i * WIDE)) });
        for (sums, &a) in sums.iter_mut().zip(a) {
            for (sum, &b) in sums.iter_mut().zip(&b) {
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(a), b, *sum);
            }
        }
    };
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<UNROLL>(), b.as_chunks::<UNROLL>());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        if i < c.ahead.len {
            prefetch(c.ahead.start.wrapping_add(i * c.ahead.stride));
        }
        a.iter().zip(b).for_each(|(a, b)| add(a, b));
    }
    a_rest.iter().zip(b_rest).for_each(|(a, b)| add(a, b));
    // SAFETY: the caller's promise.
    unsafe { store(&sums, c) }
}

/// The same with rows of `A` where they are.
///
/// # Safety
/// As for [`registers`].
#[target_feature(enable = "avx512f")]
unsafe fn in_place<const N: usize>(start: *const f32, stride: usize, b: &[f32], c: Place) {
    c.prefetch(0);
    let (b, _) = b.as_chunks::<NR>();
    // The last row stands for those that are not there.
    let rows: [*const f32; MR] =
        core::array::from_fn(|r| start.wrapping_add(r.min(c.size[0] - 1) * stride));
    let mut sums = [[_mm512_setzero_ps(); N]; MR];
    let mut add = |k: usize, b: &[f32; NR]| {
        // SAFETY: `N` registers lie within the `NR` values of a line.
        let b: [__m512; N] =
            core::array::from_fn(|i| unsafe { _mm512_loadu_ps(b.as_ptr().add(i * WIDE)) });
        for (sums, row) in sums.iter_mut().zip(rows) {
            // SAFETY: rows have as many terms as the panel.
            let a = _mm512_set1_ps(unsafe { *row.add(k) });
            for (sum, &b) in sums.iter_mut().zip(&b) {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
    };
    let (whole, rest) = b.as_chunks::<UNROLL>();
    for (i, b) in whole.iter().enumerate() {
        if i < c.ahead.len {
            prefetch(c.ahead.start.wrapping_add(i * c.ahead.stride));
        }
        b.iter().enumerate().for_each(|(k, b)| add(UNROLL * i + k, b));
    }
    rest.iter().enumerate().for_each(|(k, b)| add(UNROLL * whole.len() + k, b));
    // SAFETY: the caller's promise.
    unsafe { store(&sums, c) }
}

/// Writes the sums of a tile.
///
/// # Safety
/// As for [`registers`].
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store<const N: usize>(sums: &[[__m512; N]; MR], c: Place) {
    let last: __mmask16 = u16::MAX >> (N * WIDE - c.size[1]);
    let mask = |i: usize| if i + 1 == N { last } else { u16::MAX };
    let offset: [__m512; N] = core::array::from_fn(|i| match c.bias {
        // SAFETY: the mask ends with the bias.
        Some(bias) => unsafe { _mm512_maskz_loadu_ps(mask(i), bias.as_ptr().add(i * WIDE)) },
        None => _mm512_setzero_ps(),
    });
    for (r, sums) in sums.iter().enumerate() {
        if r < c.size[0] {
            for (i, &sum) in sums.iter().enumerate() {
                // SAFETY: the mask ends with the tile, which is within `C`, and nothing else
                // accesses it.
                unsafe {
                    let at = c.start.add(r * c.stride + i * WIDE);
                    let mut value = sum;
                    if c.add {
                        value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask(i), at), value);
                    }
                    if c.bias.is_some() {
                        value = _mm512_add_ps(value, offset[i]);
                    }
                    _mm512_mask_storeu_ps(at, mask(i), value);
                }
            }
        }
    }
}
