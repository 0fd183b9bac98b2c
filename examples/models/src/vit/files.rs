//! Parameters under timm's names.

use std::path::Path;

use bdia_core::backend::Backend;

use super::model::Vit;
use crate::named;
use crate::weights::{Weights, WeightsError};

/// Reads a model's weights from a safetensors file.
///
/// # Errors
/// Files that cannot be read, and every tensor that is missing, unexpected or of another shape.
pub fn load_weights<B: Backend<Real = f32>>(
    path: &Path,
    be: &mut B,
    model: &Vit,
) -> Result<(), WeightsError> {
    let weights = Weights::read_files(vec![path.to_path_buf()])?;
    let (p, mut tensors) = (model.setup().dims.patches, model.tensors());
    // DeiT's files hold the patches' matrix as the kernel of a convolution.
    let kernel = weights.get(PATCHES).is_some_and(|w| w.shape.len() == 4);
    if !kernel {
        return named::read(&weights, &tensors, be, |_, _| {});
    }
    for t in tensors.iter_mut().filter(|t| t.name == PATCHES) {
        t.shape = vec![t.tensor.cols, p.channels, p.patch, p.patch];
        t.transposed = false;
    }
    named::read(&weights, &tensors, be, |_, _| {})?;
    for t in tensors.iter().filter(|t| t.name == PATCHES) {
        // Row of a patch's values: (y, x, channel) here, (channel, y, x) in a kernel.
        let (rows, cols) = (t.tensor.rows, t.tensor.cols);
        let mut file = vec![0.0; t.len()];
        weights.read(&t.name, &mut file)?;
        let from = |row: usize| row % p.channels * p.patch * p.patch + row / p.channels;
        let ours: Vec<f32> =
            (0..rows * cols).map(|at| file[at % cols * rows + from(at / cols)]).collect();
        be.write_reals(t.values, &ours)?;
    }
    Ok(())
}

const PATCHES: &str = "patch_embed.proj.weight";

/// Writes a model's weights as safetensors, under timm's names, with its adapters merged.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save_weights<B: Backend<Real = f32>>(
    path: &Path,
    be: &B,
    model: &Vit,
) -> Result<(), WeightsError> {
    named::write_merged(path, model.all(), model.setup().adapters, be)
}
