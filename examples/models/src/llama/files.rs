//! Parameters under Hugging Face's names.

use std::path::Path;

use bdia_core::backend::Backend;

use super::model::Llama;
use crate::language::files;
use crate::weights::{Source, WeightsError};

/// Reads a model's weights and fills the tables that its blocks need; gives a digest of what was
/// read ([`files::load`]).
///
/// # Errors
/// As [`files::load`].
pub fn load_weights<B: Backend<Real = f32>>(
    dir: &Path,
    be: &mut B,
    model: &Llama,
) -> Result<String, WeightsError> {
    files::load(dir, be, model)
}

/// As [`load_weights`], from any source.
///
/// # Errors
/// As [`load_weights`].
pub fn read_weights<B: Backend<Real = f32>>(
    weights: &dyn Source,
    be: &mut B,
    model: &Llama,
) -> Result<String, WeightsError> {
    files::read(weights, be, model)
}
