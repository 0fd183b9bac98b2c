//! Digests: what must be the same on the device and on the host, in 64 bits each.

/// Folds words into a digest, in order (FNV-1a over words).
pub fn fold(digest: u64, words: impl Iterator<Item = u32>) -> u64 {
    words.fold(digest ^ 0xCBF2_9CE4_8422_2325, |d, w| {
        (d ^ u64::from(w)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// Digests over all steps of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digests {
    /// `X_{K-1}` and `X_{K-2}` at the turning point of every step.
    pub activations: u64,
    /// Side bits of every step.
    pub side_bits: u64,
    /// `x_k` of every block as the backward pass rebuilt it, in every step.
    pub rebuilt: u64,
    /// Losses of every step.
    pub losses: u64,
    /// Parameters at the end.
    pub parameters: u64,
}

impl Digests {
    /// Of nothing.
    pub const NONE: Self =
        Self { activations: 0, side_bits: 0, rebuilt: 0, losses: 0, parameters: 0 };
}
