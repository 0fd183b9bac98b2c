//! bf16 where no instruction multiplies it, or FMA is as fast: the kernels of f32 over rounded
//! operands.

use core::marker::PhantomData;

use super::{Kernel, Left, Place};
use crate::nn::view::View;

/// A kernel whose operands are rounded to the nearest bf16, ties to even, when they are packed. NaN
/// stays NaN.
pub(in crate::nn) struct Rounded<K>(PhantomData<K>);

impl<K: Kernel> Kernel for Rounded<K> {
    const TILE: [usize; 2] = K::TILE;
    const UNIT: [usize; 2] = K::UNIT;
    const DEPTH: usize = K::DEPTH;
    const PIECE: usize = K::PIECE;
    const BLOCK: [usize; 2] = K::BLOCK;

    unsafe fn begin() {
        // SAFETY: the caller's promise, here and below.
        unsafe { K::begin() }
    }

    unsafe fn end() {
        // SAFETY: as above.
        unsafe { K::end() }
    }

    unsafe fn pack_rows(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { K::pack_rows(from, len, terms, out) }
        out.iter_mut().for_each(|x| *x = round(*x));
    }

    unsafe fn pack_cols(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { K::pack_cols(from, len, terms, out) }
        out.iter_mut().for_each(|x| *x = round(*x));
    }

    unsafe fn tile(a: Left<'_>, b: &[f32], c: Place) {
        // SAFETY: as above.
        unsafe { K::tile(a, b, c) }
    }
}

/// The nearest bf16, as `f32`.
#[inline(always)]
fn round(x: f32) -> f32 {
    let bits = x.to_bits();
    // Half of the last place that stays, less one where that place is even.
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000;
    if x.is_nan() { x } else { f32::from_bits(nearest) }
}

#[cfg(test)]
mod tests {
    use super::round;

    #[test]
    fn rounding_is_that_of_half() {
        for i in 0..=u32::MAX >> 8 {
            let x = f32::from_bits(i.wrapping_mul(0x9E37_79B1));
            let (ours, theirs) = (round(x), half::bf16::from_f32(x).to_f32());
            assert!(
                ours == theirs || (ours.is_nan() && theirs.is_nan()),
                "{x:e}: {ours:e}, {theirs:e}"
            );
        }
    }
}
