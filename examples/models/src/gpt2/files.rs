//! Parameters under Hugging Face's names of a GPT-2.

use std::path::Path;

use bdia_core::backend::Backend;
use xxhash_rust::xxh3::Xxh3;

use super::config::Gpt2Config;
use super::model::Gpt2;
use crate::files::FileError;
use crate::weights::{self, Sink, Weights, WeightsError};

/// The name in a file: with `transformer.`, except `lm_head.weight`.
fn full_name(name: &str) -> String {
    if name == "lm_head.weight" { name.to_string() } else { format!("transformer.{name}") }
}

/// [`weights::write()`] under the names of the files.
///
/// # Errors
/// [`WeightsError`], and what `values` returns; an existing file is untouched then.
pub fn write<E: From<WeightsError> + From<FileError>>(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    values: impl FnMut(usize, &mut Sink<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let named: Vec<_> =
        tensors.iter().map(|(name, shape)| (full_name(name), shape.clone())).collect();
    weights::write(path, &named, values)
}

/// Reads a model's weights, whatever their names' prefix, type and number of files.
///
/// # Errors
/// Files that cannot be read, and every tensor that is missing, unexpected or of another shape.
pub fn load_weights<B: Backend<Real = f32>>(
    dir: &Path,
    config: &Gpt2Config,
    be: &mut B,
    model: &Gpt2,
) -> Result<(), WeightsError> {
    load_base(dir, config, be, model).map(drop)
}

/// The same, with a digest of what was read: the names and the values in f32, so that it does not
/// depend on files, their type or how the model stores them.
///
/// # Errors
/// As [`load_weights`], and a value that does not fit the 16 bits in which the model stores it.
pub fn load_base<B: Backend<Real = f32>>(
    dir: &Path,
    config: &Gpt2Config,
    be: &mut B,
    model: &Gpt2,
) -> Result<String, WeightsError> {
    let weights = Weights::read_dir(dir)?;
    weights.check(&config.tensors())?;
    let (mut hash, mut bytes) = (Xxh3::new(), Vec::new());
    for t in model.tensors() {
        hash.update(t.name.as_bytes());
        weights.stream::<WeightsError>(&t.name, |at, values| {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            hash.update(&bytes);
            if let Some(&value) = values.iter().find(|v| !t.holds(**v)) {
                return Err(WeightsError::Narrow { name: t.name.clone(), value });
            }
            Ok(t.put(be, at, values)?)
        })?;
    }
    Ok(format!("xxh3:{:016x}", hash.digest()))
}

/// Writes `model.safetensors`.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save_weights<B: Backend<Real = f32>>(
    dir: &Path,
    be: &B,
    model: &Gpt2,
) -> Result<(), WeightsError> {
    let named = model.tensors();
    let shapes: Vec<_> = named.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
    let mut piece = vec![0.0; 1 << 14];
    write::<WeightsError>(&dir.join(weights::FILE), &shapes, |i, sink| {
        let values = named[i].values;
        for at in (0..values.len()).step_by(1 << 14) {
            let piece = &mut piece[..(1 << 14).min(values.len() - at)];
            be.read_reals(values.sub(at, piece.len()), piece)?;
            sink.put(piece)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempDir;
    use crate::weights::FILE;

    #[test]
    fn names_have_their_prefix_in_files_only() {
        let dir = TempDir::new();
        let path = dir.path().join(FILE);
        let tensors =
            vec![("ln_f.bias".to_string(), vec![1]), ("lm_head.weight".into(), vec![1, 2])];
        let size = |i: usize| tensors[i].1.iter().product();
        write(&path, &tensors, |i, sink| sink.put(&vec![0.5; size(i)])).unwrap();
        Weights::read_dir(dir.path()).unwrap().check(&tensors).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert!(
            header.info("transformer.ln_f.bias").is_some()
                && header.info("lm_head.weight").is_some()
        );
    }

    #[test]
    fn the_tensors_are_those_of_the_configuration() {
        for name in ["hf_tied", "hf_untied", "hf_f16", "hf_bf16", "hf_sharded"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gpt2").join(name);
            Weights::read_dir(&dir)
                .unwrap()
                .check(&Gpt2Config::read_dir(&dir).unwrap().tensors())
                .unwrap();
        }
    }
}
