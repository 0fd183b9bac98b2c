//! Parameters under PyTorch's names.

use std::path::Path;

use bdia_core::backend::Backend;

use super::model::Translator;
use crate::named;
use crate::weights::{Weights, WeightsError};

/// Reads a model's weights from a safetensors file.
///
/// # Errors
/// Files that cannot be read, and every tensor that is missing, unexpected or of another shape.
pub fn load_weights<B: Backend<Real = f32>>(
    path: &Path,
    be: &mut B,
    model: &Translator,
) -> Result<(), WeightsError> {
    let weights = Weights::read_files(vec![path.to_path_buf()])?;
    named::read(&weights, &model.tensors(), be, |_, _| {})
}

/// Writes a model's weights as safetensors, under PyTorch's names, with its adapters merged.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save_weights<B: Backend<Real = f32>>(
    path: &Path,
    be: &B,
    model: &Translator,
) -> Result<(), WeightsError> {
    named::write_merged(path, model.all(), model.setup().adapters, be)
}
