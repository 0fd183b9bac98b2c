//! Rotary positions: which angles a position has, and in which blocks.

use crate::arena::Reals;
use crate::backend::Storage;
use crate::error::{Error, Result};
use crate::real::Real;

/// Some of the blocks of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSet([u64; 4]);

impl BlockSet {
    /// Most blocks that can be told apart.
    pub const MAX: usize = 256;

    /// None.
    pub const NONE: Self = Self([0; 4]);

    /// All.
    pub const ALL: Self = Self([u64::MAX; 4]);

    /// With block `k` as well.
    ///
    /// # Errors
    /// [`Error::Setting`] for one that is not below [`MAX`](Self::MAX).
    pub fn with(mut self, k: usize) -> Result<Self> {
        match self.0.get_mut(k / 64) {
            Some(word) => *word |= 1 << (k % 64),
            None => {
                let possible = "less than 256 where blocks differ";
                return Err(Error::setting("index of a block", k as f64, possible));
            }
        }
        Ok(self)
    }

    /// Whether block `k` is one of them.
    pub const fn has(&self, k: usize) -> bool {
        k < Self::MAX && self.0[k / 64] >> (k % 64) & 1 == 1
    }
}

/// How the angles of positions are scaled, for contexts that are longer than those of the
/// pretraining.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RotaryScaling {
    /// They are not.
    None,
    /// All are divided by a factor: positions are interpolated (arXiv 2306.15595).
    Linear(f64),
    /// Llama 3.1's: angles with wavelengths above `original/low` are divided by `factor`, those
    /// below `original/high` stay, and between the two it is interpolated.
    Llama3 {
        /// The divisor of slow angles.
        factor: f64,
        /// Wavelengths of the slow ones, in parts of the original context.
        low: f64,
        /// Those of the fast ones.
        high: f64,
        /// The context of the pretraining.
        original: f64,
    },
}

/// Which angles positions have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RotaryAngles {
    /// Width of a head: twice the number of angles.
    pub head_dim: usize,
    /// `θ`: angle `i` of position `p` is `p·θ^(−2i/head_dim)`.
    pub theta: f64,
    /// How that is scaled.
    pub scaling: RotaryScaling,
}

impl RotaryAngles {
    /// The widest head.
    pub const MOST: usize = 1024;

    /// Angle `i` of position 1, rounded to `f32` as the implementations do that networks are
    /// pretrained with.
    fn frequency(&self, i: usize) -> f32 {
        let plain = libm::pow(self.theta, -2.0 * i as f64 / self.head_dim.max(1) as f64);
        let scaled = match self.scaling {
            RotaryScaling::None => plain,
            RotaryScaling::Linear(factor) => plain / factor,
            RotaryScaling::Llama3 { factor, low, high, original } => {
                let turns = original * plain / (2.0 * core::f64::consts::PI);
                if turns < low {
                    plain / factor
                } else if turns > high {
                    plain
                } else {
                    let part = (turns - low) / (high - low);
                    (1.0 - part) * plain / factor + part * plain
                }
            }
        };
        scaled as f32
    }

    /// Writes the table that [`NnOps::rotate`](crate::NnOps::rotate) reads: `[positions,
    /// head_dim]`.
    ///
    /// # Errors
    /// [`Error::Setting`] for constants that are out of range; any error of the backend.
    pub fn fill<B: Storage>(&self, be: &mut B, table: Reals) -> Result<()> {
        for (what, x) in self.constants() {
            if !(x > 0.0 && x < f64::INFINITY) {
                return Err(Error::setting(what, x, "a finite number above 0"));
            }
        }
        if let RotaryScaling::Llama3 { low, high, .. } = self.scaling
            && low >= high
        {
            let possible = "more than the low ones";
            return Err(Error::setting("high frequencies of rotary positions", high, possible));
        }
        let (width, mut piece) = (self.head_dim, [B::Real::of(0.0); 64]);
        let (half, mut frequencies) = (width / 2, [0.0; Self::MOST / 2]);
        if width == 0 || !width.is_multiple_of(2) || width > Self::MOST {
            let possible = "an even number up to 1024";
            return Err(Error::setting("width of a rotated head", width as f64, possible));
        }
        for (i, frequency) in frequencies[..half].iter_mut().enumerate() {
            *frequency = self.frequency(i);
        }
        for at in (0..table.len()).step_by(piece.len()) {
            let piece = &mut piece[..64.min(table.len() - at)];
            for (n, value) in piece.iter_mut().enumerate() {
                let (position, c) = ((at + n) / width, (at + n) % width);
                // The product is rounded to f32, too.
                let angle = f64::from(position as f32 * frequencies[c % half]);
                *value = B::Real::of(if c < half { libm::cos(angle) } else { libm::sin(angle) });
            }
            be.write_reals(table.sub(at, piece.len()), piece)?;
        }
        Ok(())
    }

    fn constants(&self) -> [(&'static str, f64); 5] {
        let [factor, low, high, original] = match self.scaling {
            RotaryScaling::None => [1.0; 4],
            RotaryScaling::Linear(factor) => [factor, 1.0, 1.0, 1.0],
            RotaryScaling::Llama3 { factor, low, high, original } => [factor, low, high, original],
        };
        [
            ("theta of rotary positions", self.theta),
            ("factor of rotary positions", factor),
            ("low frequencies of rotary positions", low),
            ("high frequencies of rotary positions", high),
            ("original context of rotary positions", original),
        ]
    }
}
