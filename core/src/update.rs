//! The reversible update of one activation: grid, γ, side bits, step, inverse, gradient, checksum.
//!
//! Everything exact in this crate is in this file, element by element, in plain scalar code.
//! Backends repeat it over tensors and must give the same bits (the suite in `bdia_core::testing`
//! compares them).
//!
//! ```text
//! step      X_{k+1} = σ·(X_{k-1} + s_{k-1}) / 2^m + Q((1-γ)·x_k + (1+γ)·h_k(x_k)),   γ = σ·2^-m
//! inverse   X_{k-1} = σ·2^m·(X_{k+1} − Q((1-γ)·x_k + (1+γ)·h_k(x_k))) − s_{k-1}
//! gradient  G_k += (1-γ)·G_{k+1} + J_{h_k}(x_k)ᵀ·(1+γ)·G_{k+1},    G_{k-1} += γ·G_{k+1}
//! ```
//!
//! with `x = 2^-l·X` and `Q(y) = round_ties_even(y·2^l)` (BDIA paper, section 4; integers instead
//! of floats on a grid are this crate's choice). [`s`](crate::update::shift) makes the division
//! exact, and is kept as `m` bits.
//!
//! ```
//! use bdia_core::update::{Gamma, Grid, Sign};
//!
//! // l = 2 (a grid of quarters), γ = +1/2. X_{k-1} = 7 is odd, so s = 1 and (7 + 1) / 2 = 4.
//! let (grid, gamma) = (Grid::new(2)?, Gamma::new(1, Sign::Plus)?);
//! // Q(0.5·1.25 + 1.5·0.5) = Q(1.375) = 6 (5.5, ties to even)
//! let (x_cur, h) = (1.25_f32, 0.5_f32);
//! let q = grid.quantize(gamma.mix(1, x_cur, h)).unwrap();
//! assert_eq!(q, 6);
//! let (x_next, side) = gamma.step(1, 7, q, 0);
//! assert_eq!((x_next, side), (10, 1));
//! assert_eq!(gamma.inverse(1, x_next, q, side, 0), 7);     // and the odd 7 is back
//! # Ok::<(), bdia_core::Error>(())
//! ```

use crate::error::{Error, Result, ok};
use crate::real::Real;
use crate::rng::{Draw, Stream};

/// Largest magnitude of a stored activation and of a quantized update: no sum of the step can then
/// overflow `i32`.
pub const LIMIT: i32 = 1 << 30;

/// The grid `2^-l` that activations live on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    frac_bits: u32,
}

impl Grid {
    /// The finest grid: its range is still ±2^6.
    pub const MAX_FRAC_BITS: u32 = 24;

    /// `l = 14`, with a range of ±2^16: the one to begin with.
    pub const DEFAULT: Self = Self { frac_bits: 14 };

    /// A grid with `l = frac_bits` fractional bits; values may then be up to `2^(30-l)` in
    /// magnitude.
    ///
    /// # Errors
    /// [`Error::Setting`] for more than [`Grid::MAX_FRAC_BITS`].
    pub const fn new(frac_bits: u32) -> Result<Self> {
        if frac_bits > Self::MAX_FRAC_BITS {
            return Err(Error::setting("frac_bits", frac_bits as f64, "0 to 24"));
        }
        Ok(Self { frac_bits })
    }

    /// `l`.
    pub const fn frac_bits(self) -> u32 {
        self.frac_bits
    }

    /// `2^l`, exactly.
    #[inline]
    pub fn scale<R: Real>(self) -> R {
        R::from_i32(1 << self.frac_bits)
    }

    /// `2^-l`, exactly.
    #[inline]
    pub fn unit<R: Real>(self) -> R {
        R::one() / self.scale()
    }

    /// `Q(y) = round_ties_even(y·2^l)`, or `None` when it is not finite or beyond [`LIMIT`].
    #[inline]
    pub fn quantize<R: Real>(self, y: R) -> Option<i32> {
        let q = (y * self.scale()).rint();
        // Tested on the float, before conversion; a NaN fails both comparisons.
        (q.abs() <= R::from_i32(LIMIT)).then(|| q.to_i32_exact())
    }

    /// `x = 2^-l·X`: a pure function of `X`, rounded where the significand of `R` is too short.
    #[inline]
    pub fn dequantize<R: Real>(self, x: i32) -> R {
        R::from_i32(x) * self.unit()
    }
}

/// Where the sign of γ comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// Drawn per sample and per block (the paper's training).
    Random,
    /// Drawn per sample, the same for all blocks of a stack.
    Shared,
    /// Always `+`.
    Plus,
    /// Always `−`.
    Minus,
}

impl Sign {
    /// The block whose stream a drawn sign of block `block` comes from. Shared ones come from that
    /// of block 0, whose step has no γ.
    pub const fn drawn_at(self, block: u16) -> u16 {
        match self {
            Self::Shared => 0,
            _ => block,
        }
    }
}

/// γ on the grid: `σ·2^-m`, whose step has an exact inverse. Any other γ, of a network without a
/// grid, is a [`FloatGamma`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gamma {
    planes: u32,
    sign: Sign,
}

impl Gamma {
    /// Most bit planes that are stored per block.
    pub const MAX_PLANES: u32 = 8;

    /// `|γ| = 2^-m` with `m = planes` bits a value and block.
    ///
    /// # Errors
    /// [`Error::Setting`] for no plane or more than [`MAX_PLANES`](Self::MAX_PLANES).
    pub const fn new(planes: u32, sign: Sign) -> Result<Self> {
        if planes >= 1 && planes <= Self::MAX_PLANES {
            Ok(Self { planes, sign })
        } else {
            Err(Error::setting("bit planes of gamma", planes as f64, "1 to 8"))
        }
    }

    /// The γ whose magnitude is `value`: 0.5, 0.25 … 2^-8. A negative value turns a fixed sign.
    ///
    /// # Errors
    /// [`Error::Setting`] for a magnitude that is not one of `2^-1 … 2^-8`.
    pub const fn from_value(value: f64, sign: Sign) -> Result<Self> {
        let gamma = ok!(FloatGamma::new(value, sign));
        let mut planes = 1;
        while planes <= Self::MAX_PLANES {
            if gamma.magnitude * (1_u32 << planes) as f64 == 1.0 {
                return Self::new(planes, gamma.sign);
            }
            planes += 1;
        }
        Err(Error::setting(
            "gamma",
            value,
            "0.5, 0.25, 0.125 … 2^-8 on the grid; any up to 1 in mode bdia-float",
        ))
    }

    /// `m`: bits that are stored for every value and block.
    pub const fn planes(self) -> u32 {
        self.planes
    }

    /// Where the sign comes from.
    pub const fn sign(self) -> Sign {
        self.sign
    }

    /// The same number, without the promise of an inverse.
    pub const fn float(self) -> FloatGamma {
        FloatGamma { magnitude: 1.0 / (1_u32 << self.planes) as f64, sign: self.sign }
    }

    /// As [`FloatGamma::sigma`].
    #[inline]
    pub fn sigma(self, seed: u64, step: u32, sample: u32, stack: u8, block: u16) -> i32 {
        self.float().sigma(seed, step, sample, stack, block)
    }

    /// As [`FloatGamma::value`].
    #[inline]
    pub fn value<R: Real>(self, sigma: i32) -> R {
        self.float().value(sigma)
    }

    /// As [`FloatGamma::mix`].
    #[inline]
    pub fn mix<R: Real>(self, sigma: i32, x: R, h: R) -> R {
        self.float().mix(sigma, x, h)
    }

    /// The step of one element: `X_{k+1}` and the side information of `X_{k-1}` (its low `m` bits).
    ///
    /// `index` is the element's index within its sample, `t·d + c`. With `|x_prev|` and `|q|`
    /// within [`LIMIT`] nothing overflows; the caller tests the result against [`LIMIT`].
    #[inline]
    pub fn step(self, sigma: i32, x_prev: i32, q: i32, index: usize) -> (i32, u32) {
        let r = x_prev as u32 & ((1 << self.planes) - 1);
        (advance(self.planes, sigma, x_prev, q, r, index), r)
    }

    /// The inverse of [`step`](Self::step): `X_{k-1}` from `X_{k+1}`, the same `q` and the side
    /// information. Exact over all of `i32` (it wraps where the step wrapped).
    #[inline]
    pub fn inverse(self, sigma: i32, x_next: i32, q: i32, side: u32, index: usize) -> i32 {
        retreat(self.planes, sigma, x_next, q, side, index)
    }
}

/// γ without a grid: any magnitude from 0 to 1. Such a step has no exact inverse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FloatGamma {
    magnitude: f64,
    sign: Sign,
}

impl From<Gamma> for FloatGamma {
    fn from(gamma: Gamma) -> Self {
        gamma.float()
    }
}

impl FloatGamma {
    /// `x_{k+1} = x_k + h_k(x_k)`: the standard transformer.
    pub const ZERO: Self = Self { magnitude: 0.0, sign: Sign::Plus };

    /// γ of a magnitude between 0 and 1. A negative value means that magnitude with a fixed sign
    /// turned.
    ///
    /// # Errors
    /// [`Error::Setting`] for a magnitude above 1 or NaN.
    pub const fn new(value: f64, sign: Sign) -> Result<Self> {
        let magnitude = if value < 0.0 { -value } else { value };
        if magnitude <= 1.0 {
            let sign = match (value < 0.0, sign) {
                (true, Sign::Plus) => Sign::Minus,
                (true, Sign::Minus) => Sign::Plus,
                (_, sign) => sign,
            };
            Ok(Self { magnitude, sign })
        } else {
            Err(Error::setting("gamma", value, "-1 to 1"))
        }
    }

    /// `|γ|`.
    pub const fn magnitude(self) -> f64 {
        self.magnitude
    }

    /// Where the sign comes from.
    pub const fn sign(self) -> Sign {
        self.sign
    }

    /// The sign `σ` of one sample and block: +1 or −1.
    #[inline]
    pub fn sigma(self, seed: u64, step: u32, sample: u32, stack: u8, block: u16) -> i32 {
        match self.sign {
            Sign::Plus => 1,
            Sign::Minus => -1,
            Sign::Random | Sign::Shared => {
                let block = self.sign.drawn_at(block);
                let stream = Stream::new(seed, step, sample, stack, block, Draw::Sign);
                1 - 2 * (stream.word(0) & 1) as i32
            }
        }
    }

    /// The signed γ.
    #[inline]
    pub fn value<R: Real>(self, sigma: i32) -> R {
        R::of(self.magnitude) * R::from_i32(sigma)
    }

    /// `(1-γ)·x + (1+γ)·h`: two products and one sum, never fused.
    #[inline]
    pub fn mix<R: Real>(self, sigma: i32, x: R, h: R) -> R {
        let gamma = self.value::<R>(sigma);
        (R::one() - gamma) * x + (R::one() + gamma) * h
    }
}

/// Which γ the steps of a run have: its magnitude by optimizer step, and where its signs come from.
/// Signs are replayed from their place; the rest belongs to the run.
///
/// Three schemes of signs: the paper's, drawn per sample and block ([`Sign::Random`]); one per
/// sample for all blocks ([`Sign::Shared`]); a constant. With shared signs the last step before a
/// head is plain, since nothing inverts it. Here is one, with `K = 3`, `m = 2`, and a sample whose
/// sign is `−` (`γ = −1/4`):
///
/// ```text
/// X_0 = Q(input)
/// X_1 = X_0 + Q(h_0)                             plain, in every scheme
/// X_2 = −(X_0 + s_0)/4 + Q(5/4·x_1 + 3/4·h_1)    two bits of every value of X_0 are kept
/// X_3 = X_2 + Q(h_2)                             plain: a head follows
/// G_2 = G_3 + J_2ᵀ·G_3                           G_1 begins with 0
/// G_1 = 5/4·G_2 + J_1ᵀ·3/4·G_2                   G_0 begins with −1/4·G_2
/// G_0 = −1/4·G_2 + G_1 + J_0ᵀ·G_1
/// ```
///
/// The other two schemes, and a stack whose output leaves it ([`Tail::Output`]), have γ in the last
/// step as well.
///
/// [`Tail::Output`]: crate::stack::Tail::Output
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// In their order; the last one is repeated up to the end.
    stages: [Stage; Policy::MAX_STAGES],
    sign: Sign,
}

/// `m` from an optimizer step on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stage {
    from: u32,
    planes: u32,
}

impl Policy {
    /// Most stages of a schedule.
    pub const MAX_STAGES: usize = 8;

    /// `γ = ±1/2`, the sign drawn per sample and block: that of the BDIA paper.
    pub const PAPER: Self = Self::fixed(Gamma { planes: 1, sign: Sign::Random });

    /// One magnitude for all steps.
    pub const fn fixed(gamma: Gamma) -> Self {
        let stage = Stage { from: 0, planes: gamma.planes };
        Self { stages: [stage; Self::MAX_STAGES], sign: gamma.sign }
    }

    /// `m` by optimizer step: each of `stages` is the step from which on it holds, and `m`. The
    /// steps are those of the run as it was begun; the last stage holds for all that come after.
    ///
    /// # Errors
    /// [`Error::Setting`] for no stage or more than [`MAX_STAGES`](Self::MAX_STAGES), a first one
    /// that is not from step 0, steps that do not ascend, and an `m` that [`Gamma::new`] refuses.
    pub const fn scheduled(stages: &[(u32, u32)], sign: Sign) -> Result<Self> {
        if stages.is_empty() || stages.len() > Self::MAX_STAGES {
            return Err(Error::setting("stages of gamma", stages.len() as f64, "1 to 8"));
        }
        let mut policy = Self::fixed(ok!(Gamma::new(stages[0].1, sign)));
        let (last, mut i) = (stages.len() - 1, 0);
        while i < Self::MAX_STAGES {
            let (from, planes) = stages[if i < last { i } else { last }];
            let ascends = i > last || if i == 0 { from == 0 } else { from > stages[i - 1].0 };
            if !ascends {
                let possible = "0 for the first one, and later than the one before for the others";
                return Err(Error::setting(
                    "first step of a stage of gamma",
                    from as f64,
                    possible,
                ));
            }
            policy.stages[i] = Stage { from, planes: ok!(Gamma::new(planes, sign)).planes };
            i += 1;
        }
        Ok(policy)
    }

    /// γ of optimizer step `step`, in all blocks that have one.
    #[inline]
    pub const fn at(&self, step: u32) -> Gamma {
        let mut planes = self.stages[0].planes;
        let mut i = 1;
        while i < Self::MAX_STAGES {
            if self.stages[i].from <= step {
                planes = self.stages[i].planes;
            }
            i += 1;
        }
        Gamma { planes, sign: self.sign }
    }

    /// Most bits that any step stores of a value and block: what is planned.
    pub const fn planes(&self) -> u32 {
        let (mut most, mut i) = (0, 0);
        while i < Self::MAX_STAGES {
            if self.stages[i].planes > most {
                most = self.stages[i].planes;
            }
            i += 1;
        }
        most
    }

    /// Whether the last step before a head is plain, `X_K = X_{K-1} + Q(h_{K-1})`.
    pub const fn ends_plain(&self) -> bool {
        matches!(self.sign, Sign::Shared)
    }
}

/// `s`, the shift that makes `X + s` a multiple of `2^m`, from the low bits `r` of `X`.
///
/// `m = 1`: `s = r`. `m ≥ 2`: the nearest multiple; at the tie `r = 2^(m-1)` down for elements with
/// an even index and up for the others, so that its mean is zero (rounding half to even would need
/// one more bit to invert).
#[inline]
pub fn shift(m: u32, r: u32, index: usize) -> i32 {
    if m == 1 {
        return r as i32;
    }
    let half = 1 << (m - 1);
    let down = r < half || (r == half && index.is_multiple_of(2));
    if down { -(r as i32) } else { (1 << m) - r as i32 }
}

/// `σ·(X_{k-1} + s) / 2^m + q` with the side information `r` of `X_{k-1}`.
#[inline]
pub fn advance(m: u32, sigma: i32, x_prev: i32, q: i32, r: u32, index: usize) -> i32 {
    (x_prev.wrapping_add(shift(m, r, index)) >> m).wrapping_mul(sigma).wrapping_add(q)
}

/// `σ·2^m·(X_{k+1} − q) − s`.
#[inline]
pub fn retreat(m: u32, sigma: i32, x_next: i32, q: i32, r: u32, index: usize) -> i32 {
    (x_next.wrapping_sub(q).wrapping_mul(sigma) << m).wrapping_sub(shift(m, r, index))
}

/// The gradient of the step of one element. Takes `G_{k+1}` and the `G_k` gathered so far; gives
/// `G_{k-1}` (its first contribution), `G_k` without the block's own part, and the gradient
/// `(1+γ)·G_{k+1}` that the block's vector-Jacobian product is applied to.
#[inline]
pub fn combine<R: Real>(gamma: R, g_next: R, g_cur: R) -> (R, R, R) {
    (gamma * g_next, g_cur + (R::one() - gamma) * g_next, (R::one() + gamma) * g_next)
}

/// What the place of an element adds to its state, for every step of its index: `2^64/φ`. Multiples
/// of it lie so far apart that no two elements of a tensor with fewer than 2^31 share a state.
pub const CHECKSUM_STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;

/// The factors of the four rounds that mix a state (the first four primes of xxHash32).
pub const CHECKSUM_FACTORS: [u32; 4] = [0x27D4_EB2F, 0x85EB_CA77, 0xC2B2_AE3D, 0x9E37_79B1];

/// One element's part of the 64-bit checksum of a tensor, which is the sum of the parts modulo
/// `2^64`: parts add up in any order. `index` is the element's index in the whole tensor.
///
/// The part mixes index and value, and is linear in neither. So a set of changes is missed once in
/// about `2^64`, whatever its pattern: the same difference at several places, differences that add
/// up to zero, elements that changed places. (A sum of weighted values misses `+1, −2, +1` at
/// neighbours wherever their weights are evenly spaced.) A change of a single element is never
/// missed.
///
/// ```text
/// s = index·CHECKSUM_STRIDE ⊕ X        64 bits, X in the lower half: another state for every pair
/// four rounds with the factors m:      a Feistel network, so each is invertible
///     (high, low) ← (low, high ⊕ f),   f = the upper ⊕ the lower half of the 64 bits low·m
/// ```
#[inline]
pub fn checksum(x: i32, index: usize) -> u64 {
    let mut s = (index as u64).wrapping_mul(CHECKSUM_STRIDE) ^ u64::from(x as u32);
    for factor in CHECKSUM_FACTORS {
        // One instruction on all processors: 32 times 32 bits.
        let p = u64::from(s as u32) * u64::from(factor);
        s = s.rotate_left(32) ^ u64::from((p ^ p >> 32) as u32);
    }
    s
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;
    use crate::rng::philox;

    /// Every residue, both signs, m = 1 … 8, values at the limits, and beyond them (where the step
    /// wraps).
    #[test]
    fn inverse_is_exact() {
        for m in 1..=8_u32 {
            let gamma = Gamma::new(m, Sign::Random).unwrap();
            assert_eq!(Gamma::from_value(1.0 / f64::from(1 << m), Sign::Random), Ok(gamma));
            for n in 0..20_000_u32 {
                let w = philox(u64::from(m), [n, 0, 0, 0]);
                let (mut x, mut q) = (w[0] as i32, w[1] as i32);
                match n % 4 {
                    0 => (x, q) = (x % (LIMIT + 1), q % (LIMIT + 1)),
                    1 => (x, q) = (x % 64, q % 64),
                    2 => (x, q) = (LIMIT - (w[0] % 4) as i32, -LIMIT + (w[1] % 4) as i32),
                    _ => {}
                }
                let index = w[2] as usize;
                for sigma in [1, -1] {
                    let (next, side) = gamma.step(sigma, x, q, index);
                    assert!(side < 1 << m);
                    assert_eq!(
                        gamma.inverse(sigma, next, q, side, index),
                        x,
                        "m {m} x {x} q {q} sigma {sigma}"
                    );
                    if n % 4 < 3 {
                        let s = i64::from(shift(m, side, index));
                        assert_eq!((i64::from(x) + s) % (1 << m), 0);
                        let wide = i64::from(sigma) * ((i64::from(x) + s) >> m) + i64::from(q);
                        assert_eq!(i64::from(next), wide, "no overflow within the limits");
                    }
                }
            }
        }
    }

    /// The tie of m = 2 goes both ways, and the mean shift over an even and an odd index is zero.
    #[test]
    fn shift_has_mean_zero() {
        for m in 2..=8_u32 {
            let sum: i32 = (0..1_u32 << m).map(|r| shift(m, r, 0) + shift(m, r, 1)).sum();
            assert_eq!(sum, 0, "m {m}");
        }
        assert_eq!((shift(2, 2, 0), shift(2, 2, 1)), (-2, 2));
        assert_eq!((shift(1, 0, 0), shift(1, 1, 0), shift(1, 1, 1)), (0, 1, 1));
    }

    #[test]
    fn quantize_rounds_ties_to_even_and_refuses_what_is_out_of_range() {
        let grid = Grid::new(1).unwrap();
        let all = [
            0.25,
            0.75,
            1.25,
            -0.25,
            -0.75,
            1e9,
            f64::NAN,
            f64::INFINITY,
            f64::from(LIMIT) / 2.0,
            536_870_912.5,
        ];
        let q = all.map(|y| grid.quantize(y));
        assert_eq!(
            q,
            [Some(0), Some(2), Some(2), Some(0), Some(-2), None, None, None, Some(LIMIT), None]
        );
        assert!(Grid::new(25).is_err());
    }

    #[test]
    fn gamma_outside_its_range_is_refused() {
        assert!(FloatGamma::new(f64::NAN, Sign::Plus).is_err());
        assert!(FloatGamma::new(1.5, Sign::Plus).is_err());
        for value in [0.3, 0.0, 1.0, 0.001_953_125, f64::NAN] {
            assert!(Gamma::from_value(value, Sign::Plus).is_err(), "{value}");
        }
        assert!(Gamma::new(0, Sign::Plus).is_err() && Gamma::new(9, Sign::Plus).is_err());
        assert_eq!(Gamma::from_value(-0.5, Sign::Plus), Gamma::new(1, Sign::Minus));
        assert_eq!(Gamma::from_value(-0.5, Sign::Minus), Gamma::new(1, Sign::Plus));
        assert_eq!(Gamma::from_value(-0.25, Sign::Random), Gamma::new(2, Sign::Random));
    }

    /// γ with and without its promise: the same number, the same sign for every place, and back.
    #[test]
    fn gamma_is_the_same_number_in_both_types() {
        for planes in 1..=Gamma::MAX_PLANES {
            for sign in [Sign::Random, Sign::Shared, Sign::Plus, Sign::Minus] {
                let gamma = Gamma::new(planes, sign).unwrap();
                let float = FloatGamma::from(gamma);
                assert_eq!((float, float.sign()), (gamma.float(), sign));
                assert_eq!(float.magnitude(), 1.0 / f64::from(1 << planes));
                assert_eq!(Gamma::from_value(float.magnitude(), sign), Ok(gamma));
                assert_eq!(FloatGamma::new(float.magnitude(), sign), Ok(float));
                for sample in 0..16 {
                    let (a, b) = (gamma.sigma(7, 1, sample, 0, 3), float.sigma(7, 1, sample, 0, 3));
                    let fixed = match sign {
                        Sign::Random | Sign::Shared => b,
                        Sign::Plus => 1,
                        Sign::Minus => -1,
                    };
                    assert_eq!((a, a), (b, fixed));
                    let value: f64 = gamma.value(a);
                    assert_eq!(value, f64::from(a) * float.magnitude());
                    let (x, h) = (1.7_f32, -0.3);
                    assert_eq!(gamma.mix(a, x, h).to_bits(), float.mix(a, x, h).to_bits());
                }
            }
        }
        assert_eq!(FloatGamma::ZERO, FloatGamma::new(0.0, Sign::Plus).unwrap());
        assert_eq!(FloatGamma::new(-0.3, Sign::Plus), FloatGamma::new(0.3, Sign::Minus));
        // A γ of 0 mixes to x + h, whatever its sign.
        assert_eq!(FloatGamma::ZERO.mix(-1, 1.5_f64, 0.25), 1.75);
    }

    #[test]
    fn a_schedule_holds_from_step_to_step() {
        let policy = Policy::scheduled(&[(0, 4), (10, 6), (30, 1)], Sign::Shared).unwrap();
        let m = [0, 9, 10, 29, 30, u32::MAX].map(|step| policy.at(step).planes());
        assert_eq!((m, policy.planes()), ([4, 4, 6, 6, 1, 1], 6));
        assert_eq!(policy.at(5).sign(), Sign::Shared);
        let gamma = Gamma::new(3, Sign::Minus).unwrap();
        assert_eq!(Policy::scheduled(&[(0, 3)], Sign::Minus), Ok(Policy::fixed(gamma)));
        assert_eq!(Policy::fixed(gamma).at(7), gamma);
        let all: Vec<(u32, u32)> = (0..8).map(|i| (i, 1 + i)).collect();
        let eight = Policy::scheduled(&all, Sign::Random).unwrap();
        assert!((0..20).all(|step| eight.at(step).planes() == 1 + step.min(7)));
        let nine: Vec<(u32, u32)> = (0..9).map(|i| (i, 1)).collect();
        for wrong in
            [&[][..], &nine, &[(1, 1)], &[(0, 1), (0, 2)], &[(0, 1), (5, 2), (4, 3)], &[(0, 9)]]
        {
            assert!(Policy::scheduled(wrong, Sign::Random).is_err(), "{wrong:?}");
        }
    }

    /// Shared signs: one per sample and step, as many of one kind as of the other, whatever the
    /// block.
    #[test]
    fn shared_signs_are_those_of_no_other_draw() {
        let [shared, random] = [Sign::Shared, Sign::Random].map(|s| Gamma::new(1, s).unwrap());
        let (mut sum, mut equal) = (0, 0);
        for step in 0..40 {
            for sample in 0..50 {
                let sigma = shared.sigma(7, step, sample, 0, 1);
                assert!((2..20).all(|k| shared.sigma(7, step, sample, 0, k) == sigma));
                sum += sigma;
                // Blocks with γ draw from other streams.
                equal += u32::from(random.sigma(7, step, sample, 0, 1) == sigma);
            }
        }
        // 2,000 fair draws: four standard deviations.
        assert!(sum.abs() < 180 && equal.abs_diff(1000) < 90, "{sum} {equal}");
    }

    /// G of the combined step equals finite differences of `γ·a + (1-γ)·x + (1+γ)·h` (linear, so
    /// exact up to rounding).
    #[test]
    fn gradient_of_the_update() {
        let gamma = -0.25;
        let f = |a: f64, x: f64, h: f64| gamma * a + (1.0 - gamma) * x + (1.0 + gamma) * h;
        let g = 3.0;
        let (ga, gx, gh) = combine(gamma, g, 10.0);
        let e = 1e-3;
        let d = |p: f64, m: f64| g * (p - m) / (2.0 * e);
        assert!((ga - d(f(1.0 + e, 2.0, 3.0), f(1.0 - e, 2.0, 3.0))).abs() < 1e-9);
        assert!((gx - 10.0 - d(f(1.0, 2.0 + e, 3.0), f(1.0, 2.0 - e, 3.0))).abs() < 1e-9);
        assert!((gh - d(f(1.0, 2.0, 3.0 + e), f(1.0, 2.0, 3.0 - e))).abs() < 1e-9);
    }

    #[test]
    fn checksum_sees_every_single_change() {
        for index in [0, 1, 2, 77, 65_535, 1 << 20, usize::MAX] {
            for bit in 0..32 {
                assert_ne!(checksum(0x1234_5678, index), checksum(0x1234_5678 ^ (1 << bit), index));
            }
        }
    }

    /// How many pairs of `sums` agree in `bits` bits from `shift` on, in standard deviations from
    /// what random sums give.
    fn excess(sums: &[u64], shift: u32, bits: u32) -> f64 {
        let mut cut: Vec<u64> = sums.iter().map(|s| s >> shift & ((1 << bits) - 1)).collect();
        cut.sort_unstable();
        let pairs = |n: usize| n as f64 * (n as f64 - 1.0) / 2.0;
        let found: f64 = cut.chunk_by(|a, b| a == b).map(|run| pairs(run.len())).sum();
        let expected = pairs(sums.len()) / (1_u64 << bits) as f64;
        (found - expected) / libm::sqrt(expected)
    }

    /// Structured changes of a tensor with rows of 768: name, and what number `n` sets, as pairs of
    /// an index and a value.
    #[expect(clippy::type_complexity, reason = "a table")]
    fn changes(x: impl Fn(usize) -> i32 + Copy) -> Vec<(&'static str, Vec<Vec<(usize, i32)>>)> {
        const ROW: usize = 768;
        let add = move |i: usize, d: i32| (i, x(i).wrapping_add(d));
        let square =
            move |i, d: i32| vec![add(i, d), add(i + 1, -d), add(i + ROW, -d), add(i + ROW + 1, d)];
        let all = |f: &dyn Fn(usize) -> Vec<(usize, i32)>| (0..1 << 16).map(f).collect();
        vec![
            ("+1", all(&|n| vec![add(n, 1)])),
            ("any value", all(&|n| vec![add(0, n as i32 + 1)])),
            ("+1 -2 +1", all(&|n| vec![add(n, 1), add(n + 1, -2), add(n + 2, 1)])),
            (
                "+d -2d +d",
                all(&|n| {
                    let d = n as i32 + 1;
                    vec![add(0, d), add(1, -2 * d), add(2, d)]
                }),
            ),
            ("2x2 of 3", all(&|n| square(n, 3))),
            ("2x2 of d", all(&|n| square(5, n as i32 + 1))),
            ("+4 -4", all(&|n| vec![add(n, 4), add(n + 8, -4)])),
            ("one bit twice", all(&|n| vec![(n, x(n) ^ 128), (n + ROW, x(n + ROW) ^ 128)])),
            ("signs", all(&|n| (n..n + 3).map(|i| (i, x(i) ^ i32::MIN)).collect())),
            ("scaled", all(&|n| (0..8).map(|i| (i, x(i).wrapping_mul(n as i32 + 2))).collect())),
            ("two swapped", all(&|n| vec![(n, x(n + ROW)), (n + ROW, x(n))])),
            ("shifted", all(&|n| (n..n + 8).map(|i| (i, x(i + 1))).collect())),
            (
                "rotated",
                all(&|n| {
                    let (start, len) = (n / 16 * 4, 2 + n % 16);
                    (0..len).map(|i| (start + i, x(start + (i + 1) % len))).collect()
                }),
            ),
            ("reversed", all(&|n| (0..9).map(|i| (n + i, x(n + 8 - i))).collect())),
        ]
    }

    /// The largest excess over all patterns and windows, and its pattern.
    fn worst(part: impl Fn(i32, usize) -> u64) -> (f64, &'static str) {
        let mut worst = (0.0, "");
        // Values as they are in training, and nearly a constant: differences are all there is.
        for spread in [1 << 17, 4_u32] {
            let x = move |i: usize| (philox(9, [i as u32, 0, 0, 0])[0] % spread) as i32 - 1;
            for (name, mut patterns) in changes(x) {
                // Different ones, and what they do not change left out.
                patterns.iter_mut().for_each(|change| change.retain(|&(i, v)| v != x(i)));
                patterns.sort_unstable();
                patterns.dedup();
                let sum_of = |change: &Vec<(usize, i32)>| {
                    change.iter().fold(0, |sum: u64, &(i, v)| {
                        sum.wrapping_add(part(v, i)).wrapping_sub(part(x(i), i))
                    })
                };
                let sums: Vec<u64> = patterns.iter().map(sum_of).collect();
                for (bits, shifts) in [(16, [0, 8, 16, 24, 32, 48]), (24, [0, 8, 16, 24, 32, 40])] {
                    for shift in shifts {
                        let found = excess(&sums, shift, bits);
                        if f64::abs(found) > worst.0 {
                            worst = (f64::abs(found), name);
                        }
                    }
                }
            }
        }
        worst
    }

    /// Sums cut to 16 and to 24 bits agree as often as random ones, over every pattern; those of
    /// weighted values do not.
    #[test]
    fn checksum_misses_structured_changes_as_rarely_as_random_ones() {
        let (excess, name) = worst(checksum);
        assert!(excess < 6.0, "{name}: {excess} standard deviations");
        let weighted = |x: i32, index: usize| {
            let w = (index as u32).wrapping_mul(0x9E37_79B1);
            u64::from(x as u32) * u64::from((w ^ w >> 15) | 1)
        };
        assert!(worst(weighted).0 > 1000.0);
    }
}
