//! GGUF files against the package `gguf` (`tests/torch/llama_gguf.py`): blocks bit for bit, whole
//! models against those in Hugging Face's layout, and files that are not what they say.

use std::path::{Path, PathBuf};

use crate::common::{Memory, difference, state};
use bdia_core::plan::Choice;
use bdia_core::{Packing, Reference};
use bdia_models::gguf::{self, Value};
use bdia_models::inference::Inference;
use bdia_models::language::files::{load, read};
use bdia_models::llama::config::LlamaConfig;
use bdia_models::llama::gguf::open;
use bdia_models::llama::model::{Llama, Setup};
use bdia_models::weights::WeightsError;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/llama").join(name)
}

#[test]
fn blocks_of_every_kind_have_the_bits_of_ggml() {
    let s = state("llama/blocks.safetensors");
    for kind in [
        Packing::F32,
        Packing::F16,
        Packing::Bf16,
        Packing::Q4_0,
        Packing::Q4_1,
        Packing::Q5_0,
        Packing::Q5_1,
        Packing::Q8_0,
        Packing::Q4_K,
        Packing::Q5_K,
        Packing::Q6_K,
    ] {
        let bytes = &s.ints[&format!("{}.bytes", kind.name())];
        let bytes: Vec<u8> = bytes.iter().map(|&b| b as u8).collect();
        let expected = &s.reals[&format!("{}.values", kind.name())];
        let mut found = vec![f32::NAN; expected.len()];
        assert_eq!(bytes.len() / kind.bytes() * kind.values(), found.len());
        kind.unpack(&bytes, &mut found);
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let expected = *expected as f32;
            assert_eq!(found.to_bits(), expected.to_bits(), "{kind:?} {i}: {found} {expected}");
        }
    }
}

/// Logits of the first sample, from a directory or from a file.
fn logits(name: &str, from_file: bool) -> Vec<f64> {
    let s = state(&format!("llama/{name}/state.safetensors"));
    let of_dir = LlamaConfig::read_dir(&data(name)).unwrap();
    let (config, file) = open(&data(&format!("{name}.gguf"))).unwrap();
    let mut dims = config.dims;
    if name == "gemma3" {
        // What the file cannot say: which blocks slide, and how their positions turn.
        (dims.sliding, dims.angles) = (of_dir.dims.sliding, of_dir.dims.angles);
    }
    dims.sigma = of_dir.dims.sigma;
    assert_eq!(dims, of_dir.dims);
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(1), &[2][..]));
    let setup = Setup::inference(dims, 12, 1);
    let choice = Choice::new(1, 12);
    let (mut model, layout) = Llama::layout::<Reference<'_, f32>>(&setup, choice).unwrap();
    let mut memory = Memory::<f32>::new(&layout);
    let mut be = memory.backend(&layout);
    if from_file {
        read(&file, &mut be, &model).unwrap();
    } else {
        load(&data(name), &mut be, &model).unwrap();
    }
    let tokens = &s.ints["tokens"][..12];
    let found = model.logits(&mut be, tokens, 0..12, Inference::STANDARD).unwrap();
    let found: Vec<f64> = found.into_iter().map(f64::from).collect();
    let expected = &s.reals["logits"][..found.len()];
    // f32 against f64.
    assert!(difference(&found, expected, 1e-3) < 1e-5);
    found
}

#[test]
fn models_are_the_same_wherever_they_come_from() {
    assert_eq!(logits("llama_biases", true), logits("llama_biases", false));
    // 1 + w is rounded in the file.
    let (file, dir) = (logits("gemma3", true), logits("gemma3", false));
    assert!(difference(&file, &dir, 1e-3) < 1e-5);
}

#[test]
fn what_is_not_a_file_of_gguf_is_refused() {
    let path = Path::new("model.gguf");
    let whole = std::fs::read(data("llama_biases.gguf")).unwrap();
    let read = |bytes: &[u8]| gguf::read_header(path, bytes, bytes.len() as u64);
    let good = read(&whole).unwrap();
    assert_eq!(good.metadata["llama.block_count"], Value::Unsigned(4));
    // Cut anywhere: data or header is missing.
    for len in (0..whole.len()).step_by(7) {
        let error = read(&whole[..len]).unwrap_err();
        assert!(matches!(error, WeightsError::Gguf { .. }), "{len}: {error}");
    }
    // A length that the content does not have.
    for len in [0, 4, 100, whole.len() as u64 / 2, u64::MAX] {
        let _ = gguf::read_header(path, &whole[..], len);
    }
    // Any byte of the header turned: an error or a header, never a panic or a lot of memory.
    let header = whole.len().min(6000);
    for at in 0..header {
        for bit in [0, 7] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            let _ = read(&bytes);
        }
    }
    for (what, change) in [
        ("begin", (0, b"GGUX".to_vec())),
        ("version 4", (4, 4_u32.to_le_bytes().to_vec())),
        ("version 50331648", (4, 3_u32.to_be_bytes().to_vec())),
        ("tensors", (8, u64::MAX.to_le_bytes().to_vec())),
        ("entries", (16, (1_u64 << 40).to_le_bytes().to_vec())),
    ] {
        let mut bytes = whole.clone();
        bytes[change.0..change.0 + change.1.len()].copy_from_slice(&change.1);
        let error = read(&bytes).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
    assert!(open(&data("llama/config.json")).is_err());
}
