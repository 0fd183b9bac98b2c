//! `config.json` of a vision transformer: what a model is, and how its images are prepared.

use std::path::Path;

use bdia_core::layers::Patches;
use bdia_train::Failure;
use bdia_train::cli::{GammaSign, Mode};
use bdia_train::files::{read_limited, write_bytes};
use serde::{Deserialize, Serialize};

use crate::model::Dims;

/// How a model was trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bdia {
    /// `|γ|`.
    pub gamma: f64,
    /// Where its sign came from.
    pub gamma_sign: GammaSign,
    /// `l` of the grid `2^-l`.
    pub frac_bits: u32,
    /// How activations were kept.
    pub mode: Mode,
}

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
    pub bdia: Bdia,
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

    /// Reads the file of a directory.
    ///
    /// # Errors
    /// [`Failure`] for a file that is absent or not such a file.
    pub fn read_dir(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join("config.json");
        Self::from_json(&path, &read_limited(&path, 1 << 20)?)
    }

    /// Reads the text of a file, whose path is for errors.
    ///
    /// # Errors
    /// [`Failure::Run`]
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self, Failure> {
        let wrong = |what: String| Failure::Run { path: path.into(), what };
        let config: Self = serde_json::from_slice(text).map_err(|e| {
            wrong(format!("not the config.json of a vision transformer of this program: {e}"))
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
    /// [`Failure`]
    pub fn write_dir(&self, dir: &Path) -> Result<(), Failure> {
        let json = serde_json::to_string_pretty(self).map_err(|e| Failure::Other(e.to_string()))?;
        Ok(write_bytes(&dir.join("config.json"), json.as_bytes())?)
    }
}
