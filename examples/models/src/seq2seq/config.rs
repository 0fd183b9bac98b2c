//! `config.json` of a translation model: what it is and how it was trained.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::model::Dims;
use crate::config::{ConfigError, FILE, LIMIT, Training};
use crate::files::{read_limited, write_bytes};

/// A model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TranslationConfig {
    /// Entries of the source's and the target's vocabulary.
    pub vocab: [usize; 2],
    /// One vocabulary and one table for both languages.
    pub shared: bool,
    /// Most positions of a sentence, with its end.
    pub positions: usize,
    /// Width.
    pub width: usize,
    /// Blocks of the encoder.
    pub encoder_layers: usize,
    /// Blocks of the decoder.
    pub decoder_layers: usize,
    /// Heads.
    pub heads: usize,
    /// Hidden width of the MLPs.
    pub mlp: usize,
    /// Dropout in training, all four places.
    pub dropout: f64,
    /// How it was trained.
    pub bdia: Training,
}

/// Most blocks, heads, positions and so on: what fits the random numbers' counter, and more than
/// anybody has.
const MOST: usize = 65_000;
/// Most entries of a vocabulary.
const MOST_ENTRIES: usize = 1 << 24;

impl TranslationConfig {
    /// The architecture.
    pub fn dims(&self) -> Dims {
        Dims {
            vocab: self.vocab,
            shared: self.shared,
            longest: self.positions,
            width: self.width,
            layers: [self.encoder_layers, self.decoder_layers],
            heads: self.heads,
            inner: self.mlp,
            eps: 1e-5,
            dropout: [self.dropout; 4],
        }
    }

    /// Reads the file of a directory.
    ///
    /// # Errors
    /// [`ConfigError`] for a file that is absent or not such a file.
    pub fn read_dir(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        Self::from_json(&path, &read_limited(&path, LIMIT)?)
    }

    /// What the file's bytes describe.
    ///
    /// # Errors
    /// [`ConfigError`] for bytes that are no such file's.
    pub fn from_json(path: &Path, bytes: &[u8]) -> Result<Self, ConfigError> {
        let wrong = |what: String| ConfigError::Values(what).of(path);
        let c: Self = serde_json::from_slice(bytes).map_err(|error| {
            let what = "not the config.json of a translation model of this program";
            ConfigError::Json { what, error }.of(path)
        })?;
        let sizes = [c.positions, c.width, c.encoder_layers, c.decoder_layers, c.heads, c.mlp];
        if sizes.iter().any(|&n| n == 0 || n > MOST)
            || c.vocab.iter().any(|&n| n == 0 || n > MOST_ENTRIES)
        {
            return Err(wrong(format!(
                "a dimension is 0, above {MOST}, or a vocabulary above {MOST_ENTRIES}"
            )));
        }
        if c.positions < 2 || !c.width.is_multiple_of(c.heads) || c.bdia.frac_bits > 24 {
            return Err(wrong(format!(
                "{} positions (expected 2 or more), width {} with {} heads (expected a multiple), \
                 frac_bits {} (expected 24 or less)",
                c.positions, c.width, c.heads, c.bdia.frac_bits
            )));
        }
        if !(0.0..1.0).contains(&c.dropout) {
            return Err(wrong(format!(
                "dropout is {}, expected 0 up to, not including, 1",
                c.dropout
            )));
        }
        Ok(c)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn write_dir(&self, dir: &Path) -> Result<(), ConfigError> {
        let json = serde_json::to_string_pretty(self)
            .map_err(|error| ConfigError::Json { what: "it cannot be written", error })?;
        Ok(write_bytes(&dir.join(FILE), json.as_bytes())?)
    }
}
