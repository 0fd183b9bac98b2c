//! Parameters under timm's names.

use std::path::Path;

use bdia_core::backend::Backend;

use super::model::Vit;
use crate::weights::{self, Weights, WeightsError};

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
    let named = model.tensors();
    let p = model.setup().dims.patches;
    let expected: Vec<_> = (named.iter())
        .map(|t| {
            // DeiT's files hold the patches' matrix as the kernel of a convolution.
            let conv = t.name == "patch_embed.proj.weight"
                && weights.get(&t.name).is_some_and(|w| w.shape.len() == 4);
            let shape =
                if conv { vec![t.shape[0], p.channels, p.patch, p.patch] } else { t.shape.clone() };
            (t.name.clone(), shape)
        })
        .collect();
    weights.check(&expected)?;
    for (t, (_, shape)) in named.iter().zip(&expected) {
        let mut file = vec![0.0; t.values.len()];
        weights.read(&t.name, &mut file)?;
        if let Some([rows, cols]) = t.transposed {
            let kernel = shape.len() == 4;
            let mut ours = vec![0.0; file.len()];
            for row in 0..rows {
                // Row of a patch's values: (y, x, channel) here, (channel, y, x) in a kernel.
                let from = if kernel {
                    row % p.channels * p.patch * p.patch + row / p.channels
                } else {
                    row
                };
                for col in 0..cols {
                    ours[row * cols + col] = file[col * rows + from];
                }
            }
            file = ours;
        }
        be.write_reals(t.values, &file)?;
    }
    Ok(())
}

/// Writes a model's weights as safetensors, under timm's names.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save_weights<B: Backend<Real = f32>>(
    path: &Path,
    be: &B,
    model: &Vit,
) -> Result<(), WeightsError> {
    let named = model.tensors();
    let shapes: Vec<_> = named.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
    weights::write::<WeightsError>(path, &shapes, |i, sink| {
        let t = &named[i];
        let mut ours = vec![0.0; t.values.len()];
        be.read_reals(t.values, &mut ours)?;
        if let Some([rows, cols]) = t.transposed {
            ours = (0..rows * cols).map(|at| ours[at % rows * cols + at / rows]).collect();
        }
        sink.put(&ours)
    })
}
