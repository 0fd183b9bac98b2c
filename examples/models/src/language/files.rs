//! Weights in files, whatever the family.

use std::path::Path;

use bdia_core::backend::Backend;
use xxhash_rust::xxh3::Xxh3;

use super::Family;
use super::model::LanguageModel;
use crate::named;
use crate::weights::{self, Source, Weights, WeightsError};

/// Reads a model's weights, whatever their names' prefix, type and number of files. The result is a
/// digest of what was read: the names and the values in f32, so that it does not depend on files,
/// their type or how the model stores them.
///
/// # Errors
/// Files that cannot be read, every tensor that is missing, unexpected or of another shape, and a
/// value that does not fit the few bits in which the model stores it.
pub fn load<B: Backend<Real = f32>, F: Family>(
    dir: &Path,
    be: &mut B,
    model: &LanguageModel<F>,
) -> Result<String, WeightsError> {
    read(&open(dir, &model.setup().dims)?, be, model)
}

/// The weights of a model in a directory.
///
/// # Errors
/// Files that cannot be read, or are none of weights.
pub fn open<F: Family>(dir: &Path, dims: &F) -> Result<Weights, WeightsError> {
    let mut weights = Weights::read_dir(dir)?;
    if dims.tied() {
        let [embedding, ..] = dims.ends();
        weights.tie(&dims.name(None, &embedding));
    }
    Ok(weights)
}

/// As [`load`], from any source.
///
/// # Errors
/// As [`load`].
pub fn read<B: Backend<Real = f32>, F: Family>(
    weights: &dyn Source,
    be: &mut B,
    model: &LanguageModel<F>,
) -> Result<String, WeightsError> {
    model.fill_tables(be)?;
    let (mut hash, mut bytes, mut last) = (Xxh3::new(), Vec::new(), String::new());
    named::read(weights, &model.tensors(), be, |name, values| {
        if last != name {
            hash.update(name.as_bytes());
            last = name.into();
        }
        bytes.clear();
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        hash.update(&bytes);
    })?;
    Ok(format!("xxh3:{:016x}", hash.digest()))
}

/// Writes `model.safetensors` into a directory.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save<B: Backend<Real = f32>, F: Family>(
    dir: &Path,
    be: &B,
    model: &LanguageModel<F>,
) -> Result<(), WeightsError> {
    named::write(&dir.join(weights::FILE), &model.tensors(), be, F::full_name)
}
