//! What all configurations (`config.json`) share: how a model was trained, and the error.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::files::FileError;

/// The file of a model's directory.
pub const FILE: &str = "config.json";
/// The largest that is read.
pub const LIMIT: u64 = 1 << 20;

/// How activations were kept in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Two of them and a few bits per value and block; the rest was rebuilt exactly.
    Bdia,
    /// All.
    Standard,
    /// The input of every n-th block; the rest was recomputed.
    Checkpoint,
    /// All, with the update of `Bdia` but no grid.
    BdiaFloat,
}

/// Where the sign of γ came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GammaSign {
    /// Drawn for every sample and block.
    Random,
    /// Drawn for every sample, the same for all blocks.
    Shared,
    /// Always plus.
    Plus,
    /// Always minus.
    Minus,
}

/// How a model was trained: the object `bdia` of the file, which other programs ignore.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// `|γ|`.
    pub gamma: f64,
    /// Where its sign came from.
    pub gamma_sign: GammaSign,
    /// `l` of the grid `2^-l`.
    pub frac_bits: u32,
    /// How activations were kept.
    pub mode: Mode,
    /// `m` of `|γ| = 2^-m`, the bit planes of a block, where that is recorded; 0 where none were
    /// stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub planes: Option<u32>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not JSON, or not that of such a model.
    #[error("{what}: {error}")]
    Json {
        /// What was expected.
        what: &'static str,
        /// What the parser says.
        error: serde_json::Error,
    },
    /// A field is absent or has a value that cannot be used.
    #[error("{field}: expected {expected}, found {found}")]
    Field {
        /// Its name.
        field: &'static str,
        /// What is possible.
        expected: String,
        /// What came.
        found: String,
    },
    /// The model has more parameters than this machine can address.
    #[error(
        "the model is too large for this machine's address space: vocab_size {vocab}, n_positions \
         {positions}, n_embd \
         {width}, n_layer {layers}; make one of them smaller"
    )]
    TooLarge {
        /// Tokens.
        vocab: usize,
        /// Positions.
        positions: usize,
        /// Width.
        width: usize,
        /// Blocks.
        layers: usize,
    },
    /// Values that do not fit together.
    #[error("{0}")]
    Values(String),
    /// The error of a file, with its name.
    #[error("{}: {error}", path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: Box<Self>,
    },
}

impl ConfigError {
    /// The same as an error of a file.
    pub fn of(self, path: impl Into<PathBuf>) -> Self {
        Self::In { path: path.into(), error: Box::new(self) }
    }
}

/// A field that fits or an error that shows it.
pub(crate) fn field<T>(
    map: &Map<String, Value>,
    name: &'static str,
    expected: &str,
    default: Option<T>,
    read: impl FnOnce(&Value) -> Option<T>,
) -> Result<T, ConfigError> {
    let found = match map.get(name) {
        Some(value) => match read(value) {
            Some(fits) => return Ok(fits),
            // Only the start: the value may be anything.
            None => value.to_string().chars().take(60).collect(),
        },
        None => match default {
            Some(default) => return Ok(default),
            None => "nothing".to_string(),
        },
    };
    Err(ConfigError::Field { field: name, expected: expected.to_string(), found })
}

/// A whole number from 1 to `most`.
pub(crate) fn count(value: &Value, most: usize) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=most).contains(n))
}
