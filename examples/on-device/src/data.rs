//! What lies in flash: samples and pretrained weights.

use bdia_core::Reals;
use bdia_core::error::{Error, Result};
use half::f16;

use crate::model::{Be, PIXELS};

/// Labelled images, one after another: [`PIXELS`] bytes from 0 to 16, then the label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Samples(pub &'static [u8]);

impl Samples {
    const BYTES: usize = PIXELS + 1;

    /// How many.
    pub const fn len(self) -> usize {
        self.0.len() / Self::BYTES
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Pixels, row by row, and label of sample `i`.
    ///
    /// # Errors
    /// [`Error::Shape`] beyond the last one.
    pub fn get(self, i: usize) -> Result<(&'static [u8; PIXELS], u8)> {
        i.checked_mul(Self::BYTES)
            .and_then(|at| self.0.get(at..)?.split_first_chunk::<PIXELS>())
            .and_then(|(image, rest)| Some((image, *rest.first()?)))
            .ok_or(Error::Shape { what: "index of a sample", expected: self.len(), found: i })
    }
}

/// The pretrained network: `f16` values, low byte first, tensor after tensor in the order of
/// [`Model::load`](crate::model::Model::load).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weights(pub &'static [u8]);

impl Weights {
    /// Values `at .. at + dst.len()` as `f32`, which is exact.
    ///
    /// # Errors
    /// [`Error::Shape`] where there are not so many.
    pub fn read(self, be: &mut Be<'_>, at: usize, dst: Reals) -> Result<()> {
        let found = self.0.len() / 2;
        let end = at.saturating_add(dst.len());
        let values = self.0.get(at.saturating_mul(2)..end.saturating_mul(2));
        let values =
            values.ok_or(Error::Shape { what: "pretrained weights", expected: end, found })?;
        for (to, from) in be.reals_mut(dst)?.iter_mut().zip(values.as_chunks::<2>().0) {
            *to = f16::from_le_bytes(*from).to_f32();
        }
        Ok(())
    }
}
