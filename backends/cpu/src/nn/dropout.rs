//! Dropout masks: 64 elements, 16 counters, at a time.

use bdia_core::rng::{Stream, drop_threshold};
use wide::bytemuck::cast;
use wide::{f32x8, u32x8};

/// Elements that are drawn at once.
pub(crate) const AT_ONCE: usize = 64;

/// The factor of kept elements and the threshold of the words that drop.
#[derive(Clone, Copy)]
pub(crate) struct Dropout {
    pub(crate) kept: f32,
    pub(crate) threshold: u32,
}

impl Dropout {
    pub(crate) fn new(p: f64) -> Self {
        Self { kept: (1.0 / (1.0 - p)) as f32, threshold: drop_threshold(p) }
    }

    /// Whether nothing is dropped.
    pub(crate) fn is_none(self) -> bool {
        self.threshold == 0
    }

    /// The factors of 64 elements from the counter `quad` on.
    #[inline(always)]
    fn factors(self, stream: &Stream, quad: u32) -> [f32; AT_ONCE] {
        let (kept, threshold) = (u32x8::splat(self.kept.to_bits()), u32x8::splat(self.threshold));
        let mut registers = [f32x8::ZERO; 8];
        let (a, b) = (words(stream, quad), words(stream, quad.wrapping_add(8)));
        for (register, &word) in registers.iter_mut().zip(a.iter().chain(&b)) {
            // 0 is all bits off, so the factor's bits are masked.
            *register = cast(kept & !word.simd_lt(threshold));
        }
        // Lane `i` of the eight registers: the four elements of counter `i`, and those of counter
        // `8 + i`.
        let counters = f32x8::transpose(registers);
        let mut out = [0.0; AT_ONCE];
        let (first, second) = out.split_at_mut(AT_ONCE / 2);
        for ((x, y), both) in
            first.chunks_exact_mut(4).zip(second.chunks_exact_mut(4)).zip(counters)
        {
            let (low, high) = both.as_array().split_at(4);
            x.copy_from_slice(low);
            y.copy_from_slice(high);
        }
        out
    }

    /// Runs `f(values, factors)` over a slice whose first value is `element` of the stream, in
    /// pieces of at most [`AT_ONCE`].
    pub(crate) fn each(
        self,
        stream: &Stream,
        element: u32,
        len: usize,
        mut f: impl FnMut(usize, &[f32]),
    ) {
        let skip = (element % 4) as usize;
        let (mut done, mut quad, mut from) = (0, element / 4, skip);
        while done < len {
            let factors = self.factors(stream, quad);
            let n = (AT_ONCE - from).min(len - done);
            f(done, &factors[from..from + n]);
            done += n;
            from = 0;
            // The element number wraps at 2^32, so the counter at 2^30.
            quad = quad.wrapping_add(AT_ONCE as u32 / 4) & 0x3FFF_FFFF;
        }
    }
}

/// The words of eight counters from `quad` on, one lane a counter: Philox 4×32-10.
#[inline(always)]
fn words(stream: &Stream, quad: u32) -> [u32x8; 4] {
    const MUL: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut key = [stream.seed as u32, (stream.seed >> 32) as u32];
    let s = u32x8::splat;
    let quads = (u32x8::new([0, 1, 2, 3, 4, 5, 6, 7]) + s(quad)) & s(0x3FFF_FFFF);
    let mut c = [s(stream.step), s(stream.sample), s(stream.place), quads];
    for _ in 0..10 {
        let (low0, high0) = s(MUL[0]).mul_keep_low_high(c[0]);
        let (low1, high1) = s(MUL[1]).mul_keep_low_high(c[2]);
        c = [high1 ^ c[1] ^ s(key[0]), low1, high0 ^ c[3] ^ s(key[1]), low0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_core::rng::Draw;

    #[test]
    fn lanes_give_the_words_of_core() {
        let s = Stream::new(0x1234_5678_9abc_def0, 3, 5, 1, 7, Draw::AttentionDropout);
        for (j, words) in words(&s, 11).iter().enumerate() {
            for (i, &w) in words.to_array().iter().enumerate() {
                assert_eq!(w, s.word(44 + 4 * i as u32 + j as u32));
            }
        }
        let d = Dropout::new(0.3);
        for first in [0, 1, 2, 3, 29, u32::MAX - 20] {
            let mut seen = 0;
            d.each(&s, first, 75, |at, factors| {
                for (i, &f) in factors.iter().enumerate() {
                    let word = s.word(first.wrapping_add((at + i) as u32));
                    assert_eq!(f != 0.0, word >= d.threshold);
                    seen += 1;
                }
            });
            assert_eq!(seen, 75);
        }
    }
}
