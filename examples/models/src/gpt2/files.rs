//! Parameters under Hugging Face's names of a GPT-2, over [`bdia_train::weights`].

use std::path::Path;

pub use bdia_train::weights::*;

use crate::files::FileError;

/// The name in a file: with `transformer.`, except `lm_head.weight`.
fn full_name(name: &str) -> String {
    if name == "lm_head.weight" { name.to_string() } else { format!("transformer.{name}") }
}

/// [`bdia_train::weights::write()`] under the names of the files.
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
    bdia_train::weights::write(path, &named, values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Gpt2Config;
    use crate::files::testing::TempDir;

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
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
            Weights::read_dir(&dir)
                .unwrap()
                .check(&Gpt2Config::read_dir(&dir).unwrap().tensors())
                .unwrap();
        }
    }
}
