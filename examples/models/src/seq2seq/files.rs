//! Parameters under PyTorch's names.

use std::path::Path;

use bdia_core::backend::Backend;

use super::model::Translator;
use crate::weights::{self, Weights, WeightsError};

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
    let named = model.tensors();
    weights.check(&named.iter().map(|t| (t.name.clone(), t.shape.clone())).collect::<Vec<_>>())?;
    for t in &named {
        let mut file = vec![0.0; t.shape.iter().product()];
        weights.read(&t.name, &mut file)?;
        let mut rest = file.as_slice();
        for p in &t.pieces {
            let (piece, after) = rest.split_at(p.values.len());
            rest = after;
            match p.transposed {
                None => be.write_reals(p.values, piece)?,
                Some([rows, cols]) => {
                    let ours: Vec<f32> =
                        (0..rows * cols).map(|at| piece[at % cols * rows + at / cols]).collect();
                    be.write_reals(p.values, &ours)?;
                }
            }
        }
    }
    Ok(())
}

/// Writes a model's weights as safetensors, under PyTorch's names.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save_weights<B: Backend<Real = f32>>(
    path: &Path,
    be: &B,
    model: &Translator,
) -> Result<(), WeightsError> {
    let named = model.tensors();
    let shapes: Vec<_> = named.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
    weights::write::<WeightsError>(path, &shapes, |i, sink| {
        for p in &named[i].pieces {
            let mut ours = vec![0.0; p.values.len()];
            be.read_reals(p.values, &mut ours)?;
            if let Some([rows, cols]) = p.transposed {
                ours = (0..rows * cols).map(|at| ours[at % rows * cols + at / rows]).collect();
            }
            sink.put(&ours)?;
        }
        Ok(())
    })
}
