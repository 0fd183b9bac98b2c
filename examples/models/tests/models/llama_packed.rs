//! Models whose matrices stay as a file has them, in few bits: copied and mapped, beside the same
//! values in 32 bits.

use std::path::Path;

use crate::common::{ADAMW, Memory, bdia, bits, verified};
use bdia_core::layers::{Gradients, LoraShape, Store};
use bdia_core::network::Step;
use bdia_core::plan::Choice;
use bdia_core::{Error, Layout, Packing, Reference, Sign};
use bdia_cpu::Cpu;
use bdia_models::files::testing::TempDir;
use bdia_models::language::{Family as _, files, frozen};
use bdia_models::llama::config::LlamaConfig;
use bdia_models::llama::gguf::{GgufModel, Storage, open, write};
use bdia_models::llama::model::{Dims, Llama, Setup};
use bdia_models::named::{Adapters, Frozen};
use bdia_models::packing::{WRITTEN, pack};
use bdia_models::weights::{Source, WeightsError};
use serde_json::{Value, json};

const SHAPE: LoraShape = LoraShape { rank: 3, alpha: 6.0 };
const CONTEXT: usize = 12;

/// A model with more tokens than the head unpacks at a time.
fn config(changes: &Value) -> LlamaConfig {
    let mut map = json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96,
        "vocab_size": 1100, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "initializer_range": 0.2, "tie_word_embeddings": true});
    map.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    LlamaConfig::from_json(map.to_string().as_bytes()).unwrap()
}

/// A file with a model of random values.
fn drawn(config: &LlamaConfig, dir: &Path, storage: Storage) -> (Dims, GgufModel) {
    let setup = Setup::inference(config.dims, CONTEXT, 1);
    type Be<'a> = Reference<'a, f32>;
    let choice = Choice::new(1, 1);
    let (model, layout) = Llama::layout::<Be<'_>>(&setup, choice).unwrap();
    let mut memory = Memory::<f32>::new(&layout);
    let mut be = memory.backend(&layout);
    model.initialize(&mut be, 7).unwrap();
    let path = dir.join("model.gguf");
    let tokenizer =
        [("tokenizer.ggml.model".into(), bdia_models::gguf::Value::Text("none".into()))];
    write(&path, &be, config, &model, &tokenizer, storage).unwrap();
    let (read, file) = open(&path).unwrap();
    (read.dims, file)
}

fn setup(dims: Dims, frozen: Frozen, threads: usize) -> Setup {
    Setup {
        mode: verified(bdia(14, Sign::Shared)),
        batch: 2,
        gradients: Gradients::Fused(ADAMW),
        adapters: Some(Adapters { shape: SHAPE, frozen }),
        ..Setup::inference(dims, CONTEXT, threads)
    }
}

/// The digest of the weights, the losses of some steps and the adapters after them.
fn trained(source: &dyn Source, setup: &Setup) -> (String, Vec<u64>, Vec<u32>) {
    let choice = Choice::new(1, 5);
    let (mut model, layout) = Llama::layout::<Cpu>(setup, choice).unwrap();
    let mut be = Cpu::new(&layout, setup.threads).unwrap();
    let digest = files::read(source, &mut be, &model).unwrap();
    model.initialize_adapters(&mut be, 1).unwrap();
    let mut losses = Vec::new();
    for step in 0..4 {
        let step = Step { step, seed: 1, lr: 1e-2, weight_decay: 0.0, clip: 0.0 };
        let outcome = model.train(&mut be, &step, |_, x, y| {
            for (i, (x, y)) in x.iter_mut().zip(y).enumerate() {
                *x = (i * i % 1100) as i32;
                *y = if i % 5 == 0 { -1 } else { (i * 7 % 1100) as i32 };
            }
            Ok::<(), Error>(())
        });
        let outcome = outcome.unwrap();
        assert_eq!(outcome.rebuilt.mismatches, 0);
        losses.push(outcome.loss.to_bits());
    }
    let mut adapters = Vec::new();
    for t in model.trained() {
        adapters.extend(bits(be.reals(t.values).unwrap()));
    }
    (digest, losses, adapters)
}

fn total(setup: &Setup) -> Layout {
    Llama::layout::<Cpu>(setup, Choice::new(1, 5)).unwrap().1
}

/// Copied or mapped, with any number of threads: not a bit differs from the same values in 32 bits
/// and in the same order. Rows of queries and keys lie in the order of neighbours in the first.
#[test]
fn matrices_stay_as_the_file_has_them() {
    for (changes, storage) in [
        (json!({}), Storage::Q8_0),
        (json!({"tie_word_embeddings": false}), Storage::F16),
        (json!({"model_type": "qwen3", "head_dim": 16}), Storage::Q8_0),
        (json!({"model_type": "gemma3_text", "head_dim": 16}), Storage::F32),
    ] {
        let (config, dir) = (config(&changes), TempDir::new());
        let (dims, file) = drawn(&config, dir.path(), storage);
        let wide = setup(dims, frozen::packed(&dims, Packing::F32).unwrap(), 1);
        let expected = trained(&file, &wide);
        let losses: Vec<_> = expected.1.iter().map(|x| f64::from_bits(*x)).collect();
        assert!(losses[3] < losses[0] - 0.1, "{changes}: nothing is learned: {losses:?}");
        for mapped in [false, true] {
            for threads in [1, 3] {
                let narrow = setup(dims, frozen::as_stored(&dims, &file, mapped).unwrap(), threads);
                assert!(trained(&file, &narrow) == expected, "{changes} {mapped} {threads}");
            }
        }
        // In 32 bits as layers have it, products round in another order.
        let plain = trained(&file, &setup(dims, Frozen::default(), 1));
        let near = |(a, b): (&u64, &u64)| (f64::from_bits(*a) - f64::from_bits(*b)).abs() < 1e-3;
        assert!(plain.1.iter().zip(&expected.1).all(near), "{changes}");
        assert_eq!(plain.0, expected.0);
    }
}

/// What is mapped is not allocated, and what is copied takes what the file takes.
#[test]
fn memory_is_that_of_the_file() {
    let (config, dir) = (config(&json!({})), TempDir::new());
    let (dims, file) = drawn(&config, dir.path(), Storage::Q8_0);
    let of = |frozen| total(&setup(dims, frozen, 1));
    let plain = of(Frozen::default());
    let copied = of(frozen::as_stored(&dims, &file, false).unwrap());
    let mapped = of(frozen::as_stored(&dims, &file, true).unwrap());
    let bytes = 4 * mapped.mapped_words();
    assert_eq!((copied.total(), copied.mapped_words()), (mapped.total() + bytes, 0));
    // All matrices, 34 bytes for 32 values, and what fills lines up.
    let kv = dims.kv_width();
    let values = 1100 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * kv + 3 * 64 * 96);
    assert!((0..=64 * 22).contains(&(bytes as i64 - (values / 32 * 34) as i64)), "{bytes}");
    assert!(mapped.total() + 4 * values < plain.total() + (1 << 20));
}

/// Conversion on the way: what is stored are the numbers of the file, rounded as it says
/// (`llama_gguf_write.rs` has them beside ggml's).
#[test]
fn matrices_are_packed_when_they_are_read() {
    let (config, dir) = (config(&json!({})), TempDir::new());
    let (dims, file) = drawn(&config, dir.path(), Storage::F32);
    for packing in WRITTEN {
        let frozen = frozen::packed(&dims, packing).unwrap();
        let (model, layout) =
            Llama::layout::<Cpu>(&setup(dims, frozen, 1), Choice::new(1, 5)).unwrap();
        let mut be = Cpu::new(&layout, 1).unwrap();
        files::read(&file, &mut be, &model).unwrap();
        let mut narrow = 0;
        for t in model.tensors().iter().filter(|t| t.packed.is_some()) {
            let mut expected = vec![0.0; t.len()];
            file.read(&t.name, &mut expected).unwrap();
            for values in expected.chunks_mut(packing.values()) {
                let mut block = Vec::new();
                assert!(pack(packing, values, &mut block));
                packing.unpack(&block, values);
            }
            for n in [t.len(), 1, 100, 64] {
                let (at, mut found) = (t.len() - n, vec![0.0; n]);
                t.get(&be, at, &mut found).unwrap();
                assert_eq!(bits(&found), bits(&expected[at..]), "{} {n}", t.name);
            }
            narrow += 1;
        }
        assert_eq!(narrow, 1 + 3 * 7);
        trained(&file, &setup(dims, frozen, 2));
    }
    // 64 and 96 values are no blocks of 256; what is not written is not converted to.
    assert!(frozen::packed(&dims, Packing::Q6_K).is_err());
    let error = {
        let frozen = frozen::packed(&dims, Packing::Q5_0).unwrap();
        let (model, layout) =
            Llama::layout::<Cpu>(&setup(dims, frozen, 1), Choice::new(1, 5)).unwrap();
        files::read(&file, &mut Cpu::new(&layout, 1).unwrap(), &model).unwrap_err()
    };
    assert!(error.to_string().contains("Q8_0 or Q4_0"), "{error}");
}

/// A file of another type than was planned with is refused.
#[test]
fn other_files_are_refused() {
    let config = config(&json!({}));
    let (one, other) = (TempDir::new(), TempDir::new());
    let (dims, file) = drawn(&config, one.path(), Storage::Q8_0);
    let (_, wide) = drawn(&config, other.path(), Storage::F32);
    for mapped in [false, true] {
        let frozen = frozen::as_stored(&dims, &file, mapped).unwrap();
        let (model, layout) =
            Llama::layout::<Cpu>(&setup(dims, frozen, 1), Choice::new(1, 5)).unwrap();
        let error = files::read(&wide, &mut Cpu::new(&layout, 1).unwrap(), &model).unwrap_err();
        assert!(matches!(error, WeightsError::Stored { .. }), "{error}");
    }
}

/// Blocks that differ, as in files of several kinds.
struct Mixed(GgufModel, &'static str, fn(usize) -> Packing);

impl Source for Mixed {
    fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<(), WeightsError> {
        self.0.check(expected)
    }

    fn stream(
        &self,
        name: &str,
        put: &mut bdia_models::weights::Pieces<'_>,
    ) -> Result<(), WeightsError> {
        self.0.stream(name, put)
    }

    fn extent(&self, name: &str) -> Option<bdia_models::packing::Extent> {
        let mut extent = self.0.extent(name)?;
        if let Some(k) = name.strip_prefix("model.layers.").filter(|rest| rest.ends_with(self.1)) {
            extent.packing = (self.2)(k.split('.').next()?.parse().ok()?);
        }
        Some(extent)
    }
}

#[test]
fn blocks_may_be_stored_in_two_ways() {
    let (config, dir) = (config(&json!({})), TempDir::new());
    let (dims, _) = drawn(&config, dir.path(), Storage::Q8_0);
    let of = |packing| {
        let (_, file) = open(&dir.path().join("model.gguf")).unwrap();
        frozen::as_stored(&dims, &Mixed(file, "mlp.up_proj.weight", packing), false)
    };
    let Ok(Frozen { blocks: Some(Store::Each { matrices, mapped: false }), .. }) =
        of(|k| if k == 1 { Packing::Q4_1 } else { Packing::Q5_0 })
    else {
        panic!()
    };
    let found: Vec<_> = (0..3).map(|k| matrices[5].packing(k)).collect();
    assert_eq!(found, [Packing::Q5_0, Packing::Q4_1, Packing::Q5_0]);
    assert_eq!(matrices[4].packing(1), Packing::Q8_0);
    // Rows of queries, not those of values.
    assert_eq!([0, 2].map(|i| matrices[i].neighbours), [16, 0]);
    let three = of(|k| [Packing::Q4_0, Packing::Q4_1, Packing::Q5_0][k]).unwrap_err();
    assert!(three.to_string().contains("Q4_0 or Q4_1"), "{three}");
}
