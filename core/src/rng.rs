//! The counter-based generator: every random number is a pure function of where it is used.
//!
//! Philox 4×32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key
//! is the seed, the counter names the place, so nothing random is stored, recomputation replays it,
//! and no result depends on threads, chunks, micro-batches or on how a batch is split over
//! machines.

const MUL: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox on four counter words.
#[inline]
pub fn philox(key: u64, counter: [u32; 4]) -> [u32; 4] {
    let mut k = [key as u32, (key >> 32) as u32];
    let mut c = counter;
    let mut round = 0;
    while round < 10 {
        let p0 = u64::from(MUL[0]) * u64::from(c[0]);
        let p1 = u64::from(MUL[1]) * u64::from(c[2]);
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        round += 1;
    }
    c
}

/// What a random number is for. The discriminants are part of every run's result: never renumber.
/// 128 and above belong to blocks of other frameworks
/// ([`Chunk::own_stream`](crate::backend::Chunk::own_stream)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Draw {
    /// The sign of γ.
    Sign = 0,
    /// Dropout of the embedding.
    EmbeddingDropout = 1,
    /// Dropout of attention probabilities.
    AttentionDropout = 2,
    /// Dropout of the attention branch's output.
    AttentionResidualDropout = 3,
    /// Dropout of the MLP branch's output.
    MlpResidualDropout = 4,
    /// Initial parameters.
    Init = 5,
    /// Which piece of the data comes next.
    Data = 6,
    /// Sampling of generated text.
    Sample = 7,
    /// Dropout between the two layers of the MLP.
    MlpHiddenDropout = 8,
    /// Whole residuals that are dropped (stochastic depth).
    StochasticDepth = 9,
    /// How training data is changed: crops, flips, mixtures.
    Augmentation = 10,
    /// Dropout of probabilities in cross-attention.
    CrossAttentionDropout = 11,
    /// Dropout of the cross-attention branch's output.
    CrossAttentionResidualDropout = 12,
}

/// The place of a random number, up to the element: key and the first three counter words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// The key.
    pub seed: u64,
    /// Optimizer step.
    pub step: u32,
    /// Index of the sample in the global batch.
    pub sample: u32,
    /// `stack` (8 bits), `block` (16 bits) and [`Draw`] (8 bits).
    pub place: u32,
}

impl Stream {
    /// The stream of one sample at one place of a model.
    #[inline]
    pub const fn new(seed: u64, step: u32, sample: u32, stack: u8, block: u16, draw: Draw) -> Self {
        Self { seed, step, sample, place: (stack as u32) << 24 | (block as u32) << 8 | draw as u32 }
    }

    /// The four words of elements `4·quad … 4·quad + 3`.
    #[inline]
    pub fn quad(&self, quad: u32) -> [u32; 4] {
        philox(self.seed, [self.step, self.sample, self.place, quad])
    }

    /// The word of one element.
    #[inline]
    pub fn word(&self, element: u32) -> u32 {
        self.quad(element / 4)[element as usize % 4]
    }

    /// A number in `[0, 1)` with 32 random bits.
    #[inline]
    pub fn uniform(&self, element: u32) -> f64 {
        f64::from(self.word(element)) * (1.0 / 4_294_967_296.0)
    }

    /// A standard normal number (Box and Muller, from the two halves of the element's own words).
    pub fn normal(&self, element: u32) -> f64 {
        let w = self.quad(element / 2);
        let i = (element % 2) as usize * 2;
        let u = (f64::from(w[i]) + 1.0) * (1.0 / 4_294_967_296.0);
        let v = f64::from(w[i + 1]) * (core::f64::consts::TAU / 4_294_967_296.0);
        libm::sqrt(-2.0 * libm::log(u)) * libm::cos(v)
    }

    /// A whole number below `n` (by multiplication; the bias is below `n / 2^32`).
    #[inline]
    pub fn below(&self, element: u32, n: u32) -> u32 {
        ((u64::from(self.word(element)) * u64::from(n)) >> 32) as u32
    }
}

/// The threshold of [`keep`]: an element is dropped when its word is below it.
#[inline]
pub fn drop_threshold(p: f64) -> u32 {
    // p is in [0, 1); the product is below 2^32 and the conversion saturates.
    (p * 4_294_967_296.0) as u32
}

/// Whether dropout keeps an element: its word against [`drop_threshold`].
#[inline]
pub fn keep(word: u32, threshold: u32) -> bool {
    word >= threshold
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors of Philox publish with Random123 (`kat_vectors`).
    #[test]
    fn known_answers() {
        assert_eq!(philox(0, [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox(u64::MAX, [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(0x299f_31d0_a409_3822, [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn moments() {
        let s = Stream::new(7, 1, 2, 0, 3, Draw::Init);
        let n = 20_000;
        let (mut mean, mut var) = (0.0, 0.0);
        for i in 0..n {
            let x = s.normal(i);
            mean += x;
            var += x * x;
        }
        // Five standard errors of the mean and of the variance of 20,000 normal numbers.
        assert!((mean / f64::from(n)).abs() < 5.0 / libm::sqrt(f64::from(n)));
        assert!((var / f64::from(n) - 1.0).abs() < 5.0 * libm::sqrt(2.0 / f64::from(n)));
        let dropped = (0..n).filter(|&i| !keep(s.word(i), drop_threshold(0.1))).count() as f64;
        assert!((dropped / f64::from(n) - 0.1).abs() < 5.0 * libm::sqrt(0.09 / f64::from(n)));
    }
}
