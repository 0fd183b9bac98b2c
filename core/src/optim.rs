//! Optimizers, learning-rate schedules and clipping, as values that a backend's
//! [`update`](crate::OptimOps::update) carries out tensor by tensor.

use crate::codes;
use crate::error::{Error, Result, ok};

/// The rule of an optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Stochastic gradient descent: `m ← μ·m + g`, `θ ← θ − η·m`; without momentum (`μ = 0`) no
    /// state.
    Sgd {
        /// `μ`.
        momentum: f64,
    },
    /// AdamW (arXiv 1711.05101): decoupled weight decay.
    AdamW {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
    },
    /// SET-Adam (arXiv 2302.01029): the second moments of a tensor are scaled down and translated
    /// towards each other.
    SetAdam {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added below the root.
        eps: f64,
    },
    /// AdamW whose moments are stored in [8 bits](codes) (Dettmers et al. 2022, arXiv 2110.02861),
    /// but for tensors of fewer than [`codes::LEAST`] values. The step is taken from the new
    /// moments before they become codes, as in bitsandbytes.
    ///
    /// Unlike there a second moment that is not 0 does not become 0 ([`codes::second`]), or nothing
    /// but `eps` would bound the step of a value whose first moment stays.
    AdamW8bit {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
    },
    /// Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) with a learning rate from outside and
    /// no first moment: the second moment of a matrix is kept as the means of its rows and of its
    /// columns. What has one row or one column keeps every value, which is the same.
    Adafactor {
        /// The second moments decay by `1 − t^-decay`.
        decay: f64,
        /// Added to the square of a gradient.
        eps: f64,
        /// A step whose root mean square is larger, in units of the learning rate, is scaled down
        /// to it.
        threshold: f64,
    },
}

/// How much state the optimizer keeps of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sizes {
    /// Reals: moments; the largest magnitudes of blocks; means of rows and of columns.
    pub reals: [usize; 2],
    /// Words of [codes].
    pub codes: [usize; 2],
}

impl Rule {
    /// AdamW with its authors' constants: β = (0.9, 0.999), ε = 1e-8.
    pub const ADAM_W: Self = Self::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    /// SET-Adam with the constants of the BDIA paper: β = (0.9, 0.999), ε = 1e-18.
    pub const SET_ADAM: Self = Self::SetAdam { beta1: 0.9, beta2: 0.999, eps: 1e-18 };

    /// 8-bit AdamW with the constants of [`ADAM_W`](Self::ADAM_W).
    pub const ADAM_W_8BIT: Self = Self::AdamW8bit { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    /// Adafactor with its authors' constants: decay 0.8, ε = 1e-30, threshold 1.
    pub const ADAFACTOR: Self = Self::Adafactor { decay: 0.8, eps: 1e-30, threshold: 1.0 };

    /// The state that the rule keeps of a tensor `[rows, cols]`.
    pub const fn state(&self, rows: usize, cols: usize) -> Sizes {
        // Sizes that overflow are caught where the values themselves are laid out.
        let n = rows.wrapping_mul(cols);
        let mut sizes = Sizes { reals: [0; 2], codes: [0; 2] };
        match self {
            Self::Sgd { momentum } if *momentum == 0.0 => {}
            Self::Sgd { .. } => sizes.reals[0] = n,
            Self::AdamW8bit { .. } if n >= codes::LEAST => {
                sizes.reals = [n.div_ceil(codes::BLOCK); 2];
                sizes.codes = [n.div_ceil(codes::PER_WORD); 2];
            }
            Self::AdamW { .. } | Self::SetAdam { .. } | Self::AdamW8bit { .. } => {
                sizes.reals = [n; 2];
            }
            Self::Adafactor { .. } if rows > 1 && cols > 1 => sizes.reals = [rows, cols],
            Self::Adafactor { .. } => sizes.reals[0] = n,
        }
        sizes
    }

    /// Checks the constants.
    ///
    /// # Errors
    /// [`Error::Setting`] names the first one that is NaN or out of range.
    pub const fn check(&self) -> Result<()> {
        match *self {
            Self::Sgd { momentum } => {
                within("momentum", momentum, 0.0, 1.0, "0 up to, not including, 1")
            }
            Self::AdamW { beta1, beta2, eps }
            | Self::SetAdam { beta1, beta2, eps }
            | Self::AdamW8bit { beta1, beta2, eps } => {
                ok!(within("beta1", beta1, 0.0, 1.0, "0 up to, not including, 1"));
                ok!(within("beta2", beta2, 0.0, 1.0, "0 up to, not including, 1"));
                within("eps", eps, 0.0, f64::INFINITY, "a finite number, not negative")
            }
            Self::Adafactor { decay, eps, threshold } => {
                ok!(within("decay", decay, 0.0, f64::INFINITY, "a finite number, not negative"));
                // Roots of it are divided by, in f32.
                ok!(within("eps", eps, 1e-36, f64::INFINITY, "1e-36 or more"));
                within("threshold", threshold, 1e-36, f64::INFINITY, "1e-36 or more")
            }
        }
    }
}

const fn within(
    what: &'static str,
    x: f64,
    low: f64,
    below: f64,
    possible: &'static str,
) -> Result<()> {
    if x >= low && x < below { Ok(()) } else { Err(Error::setting(what, x, possible)) }
}

/// One update of one tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// The rule.
    pub rule: Rule,
    /// Number of this update, from 1: the `t` of bias correction.
    pub t: u32,
    /// Learning rate `η`.
    pub lr: f64,
    /// Decoupled weight decay: `θ ← θ − η·decay·θ` before the rule. 0 for tensors of one dimension.
    pub decay: f64,
    /// Factor of the gradient: that of clipping, else 1.
    pub scale: f64,
}

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// Not at all.
    Constant,
    /// Half a cosine from the peak to the minimum.
    Cosine,
    /// A straight line from the peak to the minimum.
    Linear,
    /// With the root of the number of steps, without an end (Vaswani et al., 2017, equation 3,
    /// there called after Noam Shazeer): `lr·√(warmup / (step + 1))`.
    Noam,
}

/// A learning-rate schedule: linear warm-up, then [`Decay`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The peak.
    pub lr: f64,
    /// The rate of the last step.
    pub min_lr: f64,
    /// Steps of warm-up; step 0 has rate `lr / warmup`.
    pub warmup: u32,
    /// Steps of the whole run.
    pub steps: u32,
    /// How the rate moves after the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// Checks the rates.
    ///
    /// # Errors
    /// [`Error::Setting`] for rates that are NaN, infinite or negative.
    pub fn check(&self) -> Result<()> {
        within("lr", self.lr, 0.0, f64::INFINITY, "a finite number, not negative")?;
        within("min-lr", self.min_lr, 0.0, f64::INFINITY, "a finite number, not negative")
    }

    /// The learning rate of step `step` (from 0).
    pub fn at(&self, step: u32) -> f64 {
        if step < self.warmup {
            return self.lr * f64::from(step + 1) / f64::from(self.warmup);
        }
        let span = self.steps.saturating_sub(self.warmup).saturating_sub(1).max(1);
        let done = (f64::from(step - self.warmup) / f64::from(span)).min(1.0);
        match self.decay {
            Decay::Constant => self.lr,
            Decay::Cosine => {
                self.min_lr
                    + (self.lr - self.min_lr)
                        * 0.5
                        * (1.0 + libm::cos(core::f64::consts::PI * done))
            }
            Decay::Linear => self.lr + (self.min_lr - self.lr) * done,
            Decay::Noam => {
                self.lr * libm::sqrt(f64::from(self.warmup.max(1)) / (f64::from(step) + 1.0))
            }
        }
    }
}

/// The factor that brings a gradient of norm `norm` down to `max_norm`; 1 where clipping is off
/// (`max_norm = 0`).
pub fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 && norm > max_norm { max_norm / norm } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules() {
        let s = Schedule { lr: 1.0, min_lr: 0.1, warmup: 4, steps: 15, decay: Decay::Cosine };
        assert_eq!((s.at(0), s.at(3), s.at(4)), (0.25, 1.0, 1.0));
        assert!((s.at(14) - 0.1).abs() < 1e-12 && (s.at(9) - 0.55).abs() < 1e-12);
        let s = Schedule { decay: Decay::Linear, ..s };
        assert!(
            (s.at(9) - 0.55).abs() < 1e-12
                && (s.at(14) - 0.1).abs() < 1e-12
                && (s.at(99) - 0.1).abs() < 1e-12
        );
        let s = Schedule { decay: Decay::Noam, ..s };
        assert_eq!((s.at(3), s.at(15), s.at(399)), (1.0, 0.5, 0.1));
        let s = Schedule { warmup: 0, steps: 1, decay: Decay::Constant, ..s };
        assert_eq!((s.at(0), s.at(7)), (1.0, 1.0));
        assert!(Schedule { lr: f64::NAN, ..s }.check().is_err());
    }

    #[test]
    fn states() {
        let of = |rule: Rule, rows, cols| {
            let Sizes { reals, codes } = rule.state(rows, cols);
            (reals, codes)
        };
        assert_eq!(of(Rule::Sgd { momentum: 0.0 }, 8, 9), ([0, 0], [0, 0]));
        assert_eq!(of(Rule::Sgd { momentum: 0.9 }, 8, 9), ([72, 0], [0, 0]));
        assert_eq!(of(Rule::ADAM_W, 100, 90), ([9000, 9000], [0, 0]));
        assert_eq!(of(Rule::ADAM_W_8BIT, 1, 4095), ([4095, 4095], [0, 0]));
        assert_eq!(of(Rule::ADAM_W_8BIT, 1, 4097), ([17, 17], [1025, 1025]));
        assert_eq!(of(Rule::ADAFACTOR, 8, 9), ([8, 9], [0, 0]));
        assert_eq!(of(Rule::ADAFACTOR, 1, 9), ([9, 0], [0, 0]));
        assert_eq!(of(Rule::ADAFACTOR, 9, 1), ([9, 0], [0, 0]));
        assert_eq!(of(Rule::ADAFACTOR, 0, 9), ([0, 0], [0, 0]));
    }

    #[test]
    fn bad_constants_are_named() {
        let r = Rule::AdamW { beta1: 0.9, beta2: 1.0, eps: 1e-8 };
        assert!(matches!(r.check(), Err(Error::Setting { what: "beta2", .. })));
        let r = Rule::Adafactor { decay: 0.8, eps: 0.0, threshold: 1.0 };
        assert!(matches!(r.check(), Err(Error::Setting { what: "eps", .. })));
        assert_eq!(Rule::ADAFACTOR.check(), Ok(()));
        assert_eq!(clip_scale(10.0, 1.0), 0.1);
        assert_eq!(clip_scale(10.0, 0.0), 1.0);
    }
}
