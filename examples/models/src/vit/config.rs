//! `config.json` of a vision transformer: what a model is, and how its images are prepared.

use std::path::Path;

use bdia_core::layers::Patches;
use serde::{Deserialize, Serialize};

use super::model::Dims;
use crate::config::{ConfigError, FILE, LIMIT, Training};
use crate::files::{read_limited, write_bytes};

/// A model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VitConfig {
    /// `C`, rows, columns.
    pub image: [usize; 3],
    /// Rows and columns of a patch.
    pub patch: usize,
    /// Shifted patch tokenization.
    pub shifted: bool,
    /// Locality self-attention.
    pub locality: bool,
    /// Two-stream reversible network.
    pub two_streams: bool,
    /// Width.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Hidden width of the MLP.
    pub mlp: usize,
    /// Dropout in training, all four places.
    pub dropout: f64,
    /// Names of the classes, in the order of their labels.
    pub classes: Vec<String>,
    /// Mean of each channel, in units of pixel values.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel.
    pub std: Vec<f64>,
    /// How it was trained.
    pub bdia: Training,
}

/// Most blocks, heads, classes and so on: what fits the random numbers' counter, and more than
/// anybody has.
const MOST: usize = 65_000;

impl VitConfig {
    /// The architecture.
    pub fn dims(&self) -> Dims {
        let [channels, height, width] = self.image;
        Dims {
            patches: Patches { channels, height, width, patch: self.patch, shifted: self.shifted },
            classes: self.classes.len(),
            width: self.width,
            layers: self.layers,
            heads: self.heads,
            inner: self.mlp,
            eps: 1e-5,
            locality: self.locality,
            dropout: [self.dropout; 4],
            two_streams: self.two_streams,
        }
    }

    /// Whether a directory has such a file, rather than none or that of another program.
    pub fn is_in(dir: &Path) -> bool {
        let read = read_limited(&dir.join(FILE), LIMIT).ok();
        let json = read.and_then(|b| serde_json::from_slice::<serde_json::Value>(&b).ok());
        json.is_some_and(|json| json.get("classes").is_some())
    }

    /// Reads the file of a directory.
    ///
    /// # Errors
    /// [`ConfigError`] for a file that is absent or not such a file.
    pub fn read_dir(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        Self::from_json(&path, &read_limited(&path, LIMIT)?)
    }

    /// Reads the text of a file, whose path is for errors.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self, ConfigError> {
        let wrong = |what: String| ConfigError::Values(what).of(path);
        let config: Self = serde_json::from_slice(text).map_err(|error| {
            let what = "not the config.json of a vision transformer of this program";
            ConfigError::Json { what, error }.of(path)
        })?;
        let sizes = [
            config.patch,
            config.width,
            config.layers,
            config.heads,
            config.mlp,
            config.classes.len(),
        ];
        if config.image.iter().chain(&sizes).any(|&n| n == 0 || n > MOST) {
            return Err(wrong(format!("a dimension is 0 or above {MOST}")));
        }
        let channels = config.image[0];
        let good = |v: &[f64]| v.len() == channels && v.iter().all(|x| x.is_finite());
        if !good(&config.mean) || !good(&config.std) || config.std.iter().any(|s| *s <= 0.0) {
            return Err(wrong(format!(
                "mean and std: expected {channels} finite numbers each, std above 0"
            )));
        }
        if !(0.0..1.0).contains(&config.dropout) {
            return Err(wrong(format!(
                "dropout is {}, expected 0 up to, not including, 1",
                config.dropout
            )));
        }
        Ok(config)
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
