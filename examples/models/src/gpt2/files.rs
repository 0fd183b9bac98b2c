//! Parameters under Hugging Face's names of a GPT-2, and what a model in a directory writes.

use core::ops::ControlFlow;
use std::path::Path;

use bdia_core::backend::Backend;
use bdia_core::layers::Tensor;
use bdia_core::network::Lm;
use bdia_core::plan::Choice;
use bdia_core::{Error, Layout};

use super::config::Gpt2Config;
use super::model::{Dims, Gpt2, Setup};
use crate::config::ConfigError;
use crate::inference::Inference;
use crate::language::decode::{DecodeError, Decoder, Decoding, How, Sizes};
use crate::language::{Family as _, files};
use crate::named::{self, Named};
use crate::sample::Sampler;
use crate::weights::{self, WeightsError};

/// The tensors of a language model of the core, in the order and under the names of GPT-2's file.
pub fn tensors(lm: &Lm) -> Vec<Named> {
    let (first, last) = lm.outside.split_at(2);
    let end = |t: &Tensor| Named::new(t.name.into(), &lm.ends, 0, t, &lm.outside);
    let blocks = (0..lm.blocks.params.groups()).flat_map(|k| {
        let name = move |t: &Tensor| format!("h.{k}.{}", t.name);
        let tensors = named::of_block(&lm.blocks, k).into_iter();
        tensors.map(move |(params, k, t)| Named::new(name(&t), params, k, &t, &lm.blocks))
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
    named::write(&dir.join(weights::FILE), tensors, be, Dims::full_name)
}

/// What the model in a directory writes after a prompt, drawn token by token. `backend` makes the
/// backend of a layout.
///
/// # Errors
/// Files that are not those of a GPT-2, a backend that cannot be made; as [`Decoder::decode`].
pub fn of_directory<B, E>(
    dir: &Path,
    prompt: &[i32],
    tokens: usize,
    sampler: Sampler,
    backend: impl FnOnce(&Layout) -> Result<B, E>,
) -> Result<Vec<u32>, E>
where
    B: Backend<Real = f32>,
    E: From<Error> + From<DecodeError> + From<WeightsError> + From<ConfigError>,
{
    let config = Gpt2Config::read_dir(dir)?;
    let setup = Setup::inference(config.dims(), config.n_positions, 1);
    let (model, _) = Gpt2::layout::<B>(&setup, Choice::new(1, 1))?;
    let sizes = Sizes { prompts: 1, beams: 1, context: config.n_positions };
    let (decoder, layout) = Decoder::layout::<B>(&model, &sizes)?;
    let mut be = backend(&layout)?;
    files::load(dir, &mut be, &model)?;
    let decoding = Decoding {
        how: How::Sample(sampler, 1),
        tokens,
        ends: config.eos_token_id.map(|t| t as i32).into_iter().collect(),
        no_repeat: 0,
        inference: Inference::STANDARD,
    };
    let found =
        decoder.decode(&mut be, &[prompt.to_vec()], &decoding, |_| ControlFlow::Continue(()))?;
    Ok(found.into_iter().flatten().map(|t| t as u32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempDir;
    use crate::gpt2::config::Gpt2Config;
    use crate::weights::{FILE, Weights};

    #[test]
    fn names_have_their_prefix_in_files_only() {
        let dir = TempDir::new();
        let path = dir.path().join(FILE);
        let tensors =
            vec![("ln_f.bias".to_string(), vec![1]), ("lm_head.weight".into(), vec![1, 2])];
        let size = |i: usize| tensors[i].1.iter().product();
        let named: Vec<_> =
            tensors.iter().map(|(name, shape)| (Dims::full_name(name), shape.clone())).collect();
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
