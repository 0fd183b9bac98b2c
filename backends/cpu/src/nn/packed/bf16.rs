//! Operands as bf16, two terms in a word: their packing, and the micro-kernel of AVX512-BF16.
//!
//! A panel of 32 rows of `A` is `[terms / 32][row][16 words]`, one of 32 columns of `B` is `[terms
//! / 32][16 words][column]`: what AMX wants as tiles, and what every other kernel can read as well.
//! Values are rounded to the nearest bf16, ties to even, while they are packed; NaN stays NaN, and
//! what is too small for a normal number becomes 0.

use core::arch::x86_64::{
    __m512, __m512bh, __m512i, __mmask16, _mm512_add_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
    _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_permutexvar_epi16,
    _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4,
    _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64,
};

use super::{Kernel, Left, Place, prefetch};
use crate::nn::view::View;

/// Rows or columns of a panel.
pub(super) const SIDE: usize = 32;
/// Values of a register, and words of a row's terms that lie together.
pub(super) const WIDE: usize = 16;
/// Terms of those words.
pub(super) const TERMS: usize = 2 * WIDE;
/// How many terms ahead values are asked for while they are packed.
const AHEAD: usize = 4 * TERMS;

/// The micro-kernel of AVX512-BF16: 8 × 32 at a time, 16 registers of sums. Only where the
/// processor has it.
pub(in crate::nn) struct Avx512Bf16;

impl Kernel for Avx512Bf16 {
    const TILE: [usize; 2] = [SIDE, SIDE];
    const UNIT: [usize; 2] = [TERMS, WIDE];
    const DEPTH: usize = 768;
    const PIECE: usize = 384;
    const BLOCK: [usize; 2] = [96, 192];

    unsafe fn pack_rows(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: whoever chose this kernel has seen what it needs; the rest is the caller's
        // promise.
        unsafe { pack::<true>(from.start, [from.row, from.col], len, terms, out) }
    }

    unsafe fn pack_cols(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { pack::<false>(from.start, [from.col, from.row], len, terms, out) }
    }

    unsafe fn tile(a: Left<'_>, b: &[f32], c: Place) {
        let a = a.panel();
        // SAFETY: as above.
        unsafe { tile(a, b, c) }
    }
}

/// A block of a panel: 32 rows (or columns) of `TERMS` terms.
const BLOCK: usize = SIDE * WIDE;

/// Copies `len` rows (or columns, without `ROWS`), `step` apart, of `terms` terms, `inner` apart,
/// into panels.
///
/// # Safety
/// AVX-512F, BW and BF16; the matrix has these values, and nothing writes them meanwhile; one of
/// the steps is 1.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn pack<const ROWS: bool>(
    start: *const f32,
    [step, inner]: [usize; 2],
    len: usize,
    terms: usize,
    out: &mut [f32],
) {
    debug_assert!(step == 1 || inner == 1);
    let panel = SIDE * WIDE * terms.div_ceil(TERMS);
    for (p, out) in out.chunks_mut(panel.max(1)).enumerate() {
        for (n, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let k = n * TERMS;
            for half in [0, WIDE] {
                let first = p * SIDE + half;
                let (rows, present) = (len.saturating_sub(first).min(WIDE), (terms - k).min(TERMS));
                let from = start.wrapping_add(first * step + k * inner);
                // SAFETY: the caller's promise; what is not present is masked.
                let lines = unsafe {
                    if inner == 1 {
                        of_rows(from, step, rows, present)
                    } else {
                        of_terms(from, inner, rows, present)
                    }
                };
                // Now a line is a row's words, or a word of all rows.
                let lines = if (inner == 1) == ROWS { lines } else { transpose(lines) };
                for (i, line) in lines.into_iter().enumerate() {
                    let at = if ROWS { (half + i) * WIDE } else { i * SIDE + half };
                    // SAFETY: 16 words of the block's 512.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(at).cast(), line) };
                }
            }
        }
    }
}

/// The first `n` of 16 lanes.
pub(super) fn first(n: usize) -> __mmask16 {
    ((1_u32 << n.min(WIDE)) - 1) as u16
}

/// Sixteen rows whose terms lie side by side: the words of each.
///
/// # Safety
/// As for [`pack`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn of_rows(from: *const f32, step: usize, rows: usize, terms: usize) -> [__m512i; WIDE] {
    let (low, high) = (first(terms), first(terms.saturating_sub(WIDE)));
    core::array::from_fn(|i| {
        let at = from.wrapping_add(i * step);
        prefetch(at.wrapping_add(AHEAD));
        prefetch(at.wrapping_add(AHEAD + WIDE));
        let (low, high) = if i < rows { (low, high) } else { (0, 0) };
        // SAFETY: only what is there is loaded.
        let (low, high) = unsafe {
            (_mm512_maskz_loadu_ps(low, at), _mm512_maskz_loadu_ps(high, at.wrapping_add(WIDE)))
        };
        bits(_mm512_cvtne2ps_pbh(high, low))
    })
}

/// Sixteen rows that lie side by side: word by word of all rows.
///
/// # Safety
/// As for [`pack`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn of_terms(from: *const f32, inner: usize, rows: usize, terms: usize) -> [__m512i; WIDE] {
    // Values of even terms come first, then those of odd ones; a word has one of each.
    const TURN: [u16; 32] = {
        let mut turn = [0; 32];
        let mut i = 0;
        while i < 32 {
            turn[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        turn
    };
    // SAFETY: 64 bytes of a constant.
    let turn = unsafe { _mm512_loadu_si512(TURN.as_ptr().cast()) };
    core::array::from_fn(|i| {
        let [even, odd] = [2 * i, 2 * i + 1].map(|k| {
            let at = from.wrapping_add(k * inner);
            prefetch(at.wrapping_add(TERMS * inner));
            // SAFETY: only what is there is loaded.
            unsafe { _mm512_maskz_loadu_ps(if k < terms { first(rows) } else { 0 }, at) }
        });
        _mm512_permutexvar_epi16(turn, bits(_mm512_cvtne2ps_pbh(odd, even)))
    })
}

fn bits(x: __m512bh) -> __m512i {
    // SAFETY: 512 bits either way.
    unsafe { core::mem::transmute(x) }
}

fn halves(x: __m512i) -> __m512bh {
    // SAFETY: 512 bits either way.
    unsafe { core::mem::transmute(x) }
}

/// Turns 16 × 16 words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(x: [__m512i; WIDE]) -> [__m512i; WIDE] {
    let mut t = [_mm512_setzero_si512(); WIDE];
    for i in (0..WIDE).step_by(2) {
        t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    // Now pairs of rows in every 128 bits; then fours, in the order of columns 0 to 3 of each 128
    // bits.
    let mut u = [_mm512_setzero_si512(); WIDE];
    for i in (0..WIDE).step_by(4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // `u[4·g + c]` has rows 4g … 4g+3 of columns c, c+4, c+8, c+12.
    let mut out = x;
    for c in 0..4 {
        let (a, b) = (
            _mm512_shuffle_i32x4(u[c], u[4 + c], 0x88),
            _mm512_shuffle_i32x4(u[c], u[4 + c], 0xDD),
        );
        let (d, e) = (
            _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88),
            _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xDD),
        );
        out[c] = _mm512_shuffle_i32x4(a, d, 0x88);
        out[8 + c] = _mm512_shuffle_i32x4(a, d, 0xDD);
        out[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
        out[12 + c] = _mm512_shuffle_i32x4(b, e, 0xDD);
    }
    out
}

/// Rows of a tile that are summed at a time.
const ROWS: usize = 8;

/// One tile, eight rows at a time.
///
/// # Safety
/// AVX-512F and BF16, and as for [`Kernel::tile`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile(a: &[f32], b: &[f32], c: Place) {
    c.prefetch(0);
    let ((a, _), (b, _)) = (a.as_chunks::<BLOCK>(), b.as_chunks::<BLOCK>());
    let masks = [first(c.size[1]), first(c.size[1].saturating_sub(WIDE))];
    for from in (0..c.size[0]).step_by(ROWS) {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        for (a, b) in a.iter().zip(b) {
            for k in 0..WIDE {
                // SAFETY: 16 words twice of a line of `B`.
                let b = [0, WIDE]
                    .map(|i| unsafe { _mm512_loadu_si512(b.as_ptr().add(k * SIDE + i).cast()) });
                for (r, sums) in sums.iter_mut().enumerate() {
                    let pair = halves(_mm512_set1_epi32(a[(from + r) * WIDE + k].to_bits() as i32));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = _mm512_dpbf16_ps(*sum, pair, halves(b));
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            if from + r < c.size[0] {
                for (i, sum) in sums.into_iter().enumerate() {
                    // SAFETY: the masks end with the tile, which is within `C`, and with the bias.
                    unsafe {
                        let at = c.start.wrapping_add((from + r) * c.stride + i * WIDE);
                        let sum: __m512 = start(&c, masks[i], at, i, sum);
                        _mm512_mask_storeu_ps(at, masks[i], sum);
                    }
                }
            }
        }
    }
}

/// `sum` and what `C` begins with there: `C` itself, the bias.
///
/// # Safety
/// AVX-512F; the mask ends with `C` and with the bias.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn start(
    c: &Place,
    mask: __mmask16,
    at: *const f32,
    part: usize,
    mut sum: __m512,
) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        if c.add {
            sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sum);
        }
        if let Some(bias) = c.bias {
            sum = _mm512_add_ps(
                sum,
                _mm512_maskz_loadu_ps(mask, bias.as_ptr().wrapping_add(part * WIDE)),
            );
        }
    }
    sum
}
