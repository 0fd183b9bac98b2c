//! Parameters under Hugging Face's names of a GPT-2.

use std::path::Path;

use bdia_core::backend::Backend;
use bdia_core::layers::Tensor;
use xxhash_rust::xxh3::Xxh3;

use super::model::Gpt2;
use crate::named::{self, Named};
use crate::weights::{self, Weights, WeightsError};
use bdia_core::network::Lm;

/// The name in a file: with `transformer.`, except `lm_head.weight`.
fn full_name(name: &str) -> String {
    if name == "lm_head.weight" { name.to_string() } else { format!("transformer.{name}") }
}

/// Reads a model's weights, whatever their names' prefix, type and number of files. The result is a
/// digest of what was read: the names and the values in f32, so that it does not depend on files,
/// their type or how the model stores them.
///
/// # Errors
/// Files that cannot be read, every tensor that is missing, unexpected or of another shape, and a
/// value that does not fit the 16 bits in which the model stores it.
pub fn load_weights<B: Backend<Real = f32>>(
    dir: &Path,
    be: &mut B,
    model: &Gpt2,
) -> Result<String, WeightsError> {
    let weights = Weights::read_dir(dir)?;
    let (mut hash, mut bytes, mut last) = (Xxh3::new(), Vec::new(), String::new());
    named::read(&weights, &model.tensors(), be, |name, values| {
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

/// Writes `model.safetensors`.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save_weights<B: Backend<Real = f32>>(
    dir: &Path,
    be: &B,
    model: &Gpt2,
) -> Result<(), WeightsError> {
    save_tensors(dir, be, &model.tensors())
}

/// The tensors of a language model of the core, in the order and under the names of GPT-2's file.
pub fn tensors(lm: &Lm) -> Vec<Named> {
    let (first, last) = lm.outside.split_at(2);
    let end = |t: &Tensor| Named::new(t.name.into(), &lm.ends, 0, t);
    let blocks = (0..lm.blocks.params.groups()).flat_map(|k| {
        let name = move |t: &Tensor| format!("h.{k}.{}", t.name);
        let tensors = named::of_block(&lm.blocks, k).into_iter();
        tensors.map(move |(params, k, t)| Named::new(name(&t), params, k, &t))
    });
    let all = first.iter().map(end).chain(blocks).chain(last.iter().map(end));
    all.filter(|t| !t.is_empty()).collect()
}

/// Writes `model.safetensors` with the tensors of [`tensors`].
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save_tensors<B: Backend<Real = f32>>(
    dir: &Path,
    be: &B,
    tensors: &[Named],
) -> Result<(), WeightsError> {
    named::write(&dir.join(weights::FILE), tensors, be, full_name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempDir;
    use crate::gpt2::config::Gpt2Config;
    use crate::weights::FILE;

    #[test]
    fn names_have_their_prefix_in_files_only() {
        let dir = TempDir::new();
        let path = dir.path().join(FILE);
        let tensors =
            vec![("ln_f.bias".to_string(), vec![1]), ("lm_head.weight".into(), vec![1, 2])];
        let size = |i: usize| tensors[i].1.iter().product();
        let named: Vec<_> =
            tensors.iter().map(|(name, shape)| (full_name(name), shape.clone())).collect();
        weights::write(&path, &named, |i, sink| sink.put(&vec![0.5; size(i)])).unwrap();
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
