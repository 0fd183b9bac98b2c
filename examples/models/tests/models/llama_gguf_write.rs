//! GGUF files that are written: read again, with bits that the package `gguf` gives
//! (`tests/torch/llama_gguf_write.py`), and files that cannot be. `BDIA_GGUF_OUT` names a directory
//! that keeps them, with the logits of the models, so that the program can let others read them.

use core::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::common::{Memory, bits, state};
use bdia_core::layers::{LoraShape, RotaryScaling};
use bdia_core::plan::Choice;
use bdia_core::{Layout, Packing, Reference, Storage as _};
use bdia_cpu::Cpu;
use bdia_models::files::faults::{Fault, arm, disarm};
use bdia_models::files::testing::TempDir;
use bdia_models::gguf::{self, Gguf, NewTensor, Number, Value, WriteError};
use bdia_models::inference::Inference;
use bdia_models::language::decode::{Decoder, Decoding, How, Sizes};
use bdia_models::language::files;
use bdia_models::llama::config::LlamaConfig;
use bdia_models::llama::gguf::{Storage, open, write};
use bdia_models::llama::gguf_tokenizer::tokenizer_metadata;
use bdia_models::llama::model::{Dims, Llama, Setup};
use bdia_models::named::Adapters;
use bdia_models::search::Length;
use bdia_models::tokenizer::Tokenizer;
use half::f16;
use serde_json::{Value as Json, json};

const CASES: [&str; 9] = [
    "llama",
    "llama_biases",
    "llama_scaled",
    "llama_linear",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma3",
];

const STORAGES: [(Storage, &str); 3] =
    [(Storage::F32, "f32"), (Storage::F16, "f16"), (Storage::Q8_0, "q8_0")];

type Be<'a> = Reference<'a, f32>;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/llama").join(name)
}

/// Where files are written: the directory that keeps them, or one that does not.
fn out(temporary: &TempDir) -> PathBuf {
    std::env::var_os("BDIA_GGUF_OUT").map_or(temporary.path().into(), PathBuf::from)
}

/// The configuration of a directory, with other values of some fields.
fn config(name: &str, changes: &Json) -> LlamaConfig {
    let mut map = LlamaConfig::read_dir(&data(name)).unwrap().file;
    map.extend(changes.as_object().unwrap().clone());
    LlamaConfig::from_json(Json::Object(map).to_string().as_bytes()).unwrap()
}

/// The dimensions, with the deviation of another's initial values, which no file says.
fn sized(c: &LlamaConfig, like: &LlamaConfig) -> Dims {
    Dims { sigma: like.dims.sigma, ..c.dims }
}

/// What llama.cpp does not have of some models, and the nearest that it has.
fn without(name: &str) -> Option<(Option<Json>, &'static str)> {
    let nearest = match name {
        "mistral" => Some(json!({"sliding_window": null})),
        "smollm3" => Some(json!({"no_rope_layers": [1, 1, 1, 0]})),
        _ => None,
    };
    match name {
        "mistral" => Some((nearest, "the sliding window")),
        "smollm3" => Some((nearest, "blocks without positions")),
        // Its heads are wider than it.
        "qwen2" => Some((nearest, "the width of all heads")),
        _ => None,
    }
}

/// Lays a model out, lets it be loaded, and does something with it.
fn with<T>(
    config: &LlamaConfig,
    load: impl FnOnce(&mut Be<'_>, &Llama),
    then: impl FnOnce(&mut Be<'_>, &mut Llama) -> T,
) -> T {
    let setup = Setup::inference(config.dims, 12.min(config.dims.positions), 1);
    let choice = Choice::new(1, 12);
    let (mut model, layout) = Llama::layout::<Be<'_>>(&setup, choice).unwrap();
    let mut memory = Memory::<f32>::new(&layout);
    let mut be = memory.backend(&layout);
    load(&mut be, &model);
    then(&mut be, &mut model)
}

fn of_dir(name: &str) -> impl FnOnce(&mut Be<'_>, &Llama) + '_ {
    move |be, model| {
        files::load(&data(name), be, model).unwrap();
    }
}

fn of_file(path: &Path) -> impl FnOnce(&mut Be<'_>, &Llama) + '_ {
    move |be, model| {
        files::read(&open(path).unwrap().1, be, model).unwrap();
    }
}

/// All values, by the name and the number of dimensions of their tensor.
fn values(be: &mut Be<'_>, model: &mut Llama) -> Vec<(String, usize, Vec<f32>)> {
    let tensors = model.tensors().into_iter();
    let all = tensors.map(|t| {
        let mut all = vec![f32::NAN; t.len()];
        be.read_reals(t.values, &mut all).unwrap();
        (t.name, t.shape.len(), all)
    });
    all.collect()
}

const TOKENS: [i32; 12] = [1, 5, 30, 7, 7, 2, 19, 11, 0, 23, 4, 16];

/// A file that llama.cpp loads without a tokenizer.
fn none() -> Vec<(String, Value)> {
    vec![("tokenizer.ggml.model".into(), Value::Text("none".into()))]
}

/// A model in every storage: read again, it has the values of its storage, and gives the same file
/// again.
fn round_trip(name: &str, c: &LlamaConfig, load: &dyn Fn(&mut Be<'_>, &Llama)) {
    let temporary = TempDir::new();
    let dir = out(&temporary);
    for (storage, suffix) in STORAGES {
        let path = dir.join(format!("{name}.{suffix}.gguf"));
        let expected = with(c, load, |be, model| {
            write(&path, be, c, model, &none(), storage).unwrap();
            let logits = model.logits(be, &TOKENS, 0..12, Inference::STANDARD).unwrap();
            let logits = json!({"tokens": TOKENS, "logits": logits});
            std::fs::write(dir.join(format!("{name}.json")), logits.to_string()).unwrap();
            values(be, model)
        });
        let (again, file) = open(&path).unwrap();
        assert_eq!(sized(&again, c), c.dims, "{name}");
        assert_eq!(again.bos_token_id, c.bos_token_id, "{name}");
        assert_eq!(again.eos_token_ids, c.eos_token_ids, "{name}");
        assert_eq!(again.bdia, c.bdia, "{name}");
        let second = temporary.path().join("second.gguf");
        let found = with(c, of_file(&path), |be, model| {
            let entries = file.header().tokenizer();
            write(&second, be, c, model, &entries, storage).unwrap();
            values(be, model)
        });
        for ((name, shape, expected), (_, _, found)) in expected.iter().zip(&found) {
            let stored = |x: &f32| match (*shape, name.ends_with("norm.weight")) {
                // 1 + w is rounded in the file.
                (1, true) if c.dims.norm_offset != 0.0 => (x + 1.0) - 1.0,
                (1, _) => *x,
                _ if storage != Storage::F32 => f16::from_f32(*x).to_f32(),
                _ => *x,
            };
            let expected: Vec<_> = expected.iter().map(stored).collect();
            // Blocks are compared with those of the package.
            if storage != Storage::Q8_0 || *shape == 1 || !c.dims.width.is_multiple_of(32) {
                assert_eq!(bits(&expected), bits(found), "{name}");
            }
        }
        let third = temporary.path().join("third.gguf");
        with(c, of_file(&second), |be, model| {
            let entries = Gguf::open(&second).unwrap().tokenizer();
            write(&third, be, c, model, &entries, storage).unwrap();
        });
        let [first, second, third] = [&path, &second, &third].map(|p| std::fs::read(p).unwrap());
        assert!(second == third, "{name}");
        // 1 + w of what was 1 + w is the same but for w near −1.
        assert!(first == second || c.dims.norm_offset != 0.0, "{name}");
    }
}

#[test]
fn models_are_read_as_they_were_written() {
    for name in CASES {
        let mut c = config(name, &json!({}));
        if let Some((changes, what)) = without(name) {
            let dir = TempDir::new();
            let path = dir.path().join("refused.gguf");
            let found = with(&c, of_dir(name), |be, model| {
                write(&path, be, &c, model, &none(), Storage::F32)
            });
            let error = found.unwrap_err().to_string();
            assert!(error.contains(what) && !path.exists(), "{name}: {error}");
            let Some(changes) = changes else { continue };
            c = config(name, &changes);
        }
        round_trip(name, &c, &|be, model| of_dir(name)(be, model));
    }
}

/// Models of shapes that every program reads, some with rows of whole blocks.
#[test]
fn wide_models_are_read_as_they_were_written() {
    let training = json!({"gamma": 0.5, "gamma_sign": "random", "frac_bits": 12, "mode": "bdia"});
    for (name, changes) in [
        ("wide", json!({"tie_word_embeddings": true, "bdia": training})),
        ("wide_qwen2", json!({"model_type": "qwen2", "bos_token_id": 3})),
        ("wide_qwen3", json!({"model_type": "qwen3", "head_dim": 128, "eos_token_id": [4, 5]})),
        (
            "wide_gemma3",
            json!({"model_type": "gemma3_text", "head_dim": 256, "num_hidden_layers": 7,
                "sliding_window": 4, "tie_word_embeddings": true}),
        ),
    ] {
        let mut c = wide(&changes);
        // A file has one last token.
        c.eos_token_ids.truncate(1);
        round_trip(name, &c, &drawn);
    }
}

fn new(name: &str, shape: &[usize], kind: Packing) -> NewTensor {
    NewTensor { name: name.into(), shape: shape.into(), kind }
}

#[test]
fn blocks_have_the_bits_of_ggml() {
    let s = state("llama/q8_0.safetensors");
    let values: Vec<f32> = s.reals["values"].iter().map(|x| *x as f32).collect();
    let dir = TempDir::new();
    let path = dir.path().join("a.gguf");
    let packings = [(Packing::Q8_0, "bytes", 1.0), (Packing::Q4_0, "bytes_q4_0", 16.0)];
    let pieces = [1, 7, 32, 100, values.len()];
    for ((packing, key, divisor), piece) in
        packings.into_iter().flat_map(|p| pieces.map(|n| (p, n)))
    {
        let bytes: Vec<u8> = s.ints[key].iter().map(|b| *b as u8).collect();
        let values: Vec<f32> = values.iter().map(|x| x / divisor).collect();
        let tensors = [new("x", &[values.len() / 32, 32], packing)];
        gguf::write(&path, &[], &tensors, |_, sink| {
            values.chunks(piece).try_for_each(|piece| sink.put(piece))
        })
        .unwrap();
        let file = std::fs::read(&path).unwrap();
        let from = file.len() - bytes.len().next_multiple_of(32);
        let blocks =
            |bytes: &[u8]| bytes.chunks(packing.bytes()).map(Vec::from).collect::<Vec<_>>();
        for (i, (found, expected)) in blocks(&file[from..]).iter().zip(blocks(&bytes)).enumerate() {
            // Whatever the numbers are, they mean 0 where their factor is.
            if packing == Packing::Q8_0 || expected[..2] != [0, 0] {
                assert_eq!(*found, expected, "{} block {i}", packing.name());
            }
        }
    }
}

/// Of a model with rows of whole blocks.
fn wide(changes: &Json) -> LlamaConfig {
    let mut map = json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 96,
        "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "initializer_range": 0.2, "tie_word_embeddings": false});
    map.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    LlamaConfig::from_json(map.to_string().as_bytes()).unwrap()
}

fn drawn(be: &mut Be<'_>, model: &Llama) {
    model.initialize(be, 7).unwrap();
    for (n, t) in model.tensors().into_iter().enumerate().filter(|(_, t)| t.shape.len() == 1) {
        let start =
            if t.name.contains("bias") || model.setup().dims.norm_offset != 0.0 { 0 } else { 1 };
        let value = |i: usize| start as f32 + 0.3 * ((7 * i + n) as f32).sin();
        be.write_reals(t.values, &(0..t.len()).map(value).collect::<Vec<_>>()).unwrap();
    }
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01B3))
}

#[test]
fn a_model_in_blocks() {
    let (dir, c) = (TempDir::new(), wide(&json!({"tie_word_embeddings": true})));
    let [f32s, blocks] = [Storage::F32, Storage::Q8_0].map(|storage| {
        let path = dir.path().join(format!("{storage:?}.gguf"));
        with(&c, drawn, |be, model| write(&path, be, &c, model, &none(), storage)).unwrap();
        path
    });
    let (again, file) = open(&blocks).unwrap();
    assert_eq!(sized(&again, &c), c.dims);
    let kinds: Vec<_> = file.header().tensors.values().map(|t| t.kind).collect();
    assert!(kinds.contains(&Packing::Q8_0) && !kinds.contains(&Packing::F16));
    // What the package makes of the tensors in 32 bits.
    let s = state("llama/q8_0.safetensors");
    let expected = s.ints["digest"].iter().rev().fold(0, |d, i| d << 32 | u64::from(*i as u32));
    let bytes = std::fs::read(&blocks).unwrap();
    let first = file.header().tensors["token_embd.weight"].len() / 32 * 34;
    let all: usize = (file.header().tensors.values())
        .map(|t| (t.len() / t.kind.values() * t.kind.bytes()).next_multiple_of(32))
        .sum();
    assert!(first < all);
    assert_eq!(digest(&bytes[bytes.len() - all..]), expected);
    let [exact, near] = [&f32s, &blocks].map(|path| with(&c, of_file(path), values));
    for ((name, _, exact), (_, _, near)) in exact.iter().zip(&near) {
        let largest = exact.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        for (a, b) in exact.iter().zip(near) {
            assert!((a - b).abs() <= largest / 127.0 * 0.57, "{name}: {a} {b}");
        }
    }
}

#[test]
fn what_cannot_be_written_is_refused() {
    let dir = TempDir::new();
    let path = dir.file("a.gguf", b"old");
    let try_one = |tensors: &[NewTensor], metadata: &[(&str, Value)], values: &[f32]| {
        let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        let error = gguf::write(&path, &metadata, tensors, |_, sink| sink.put(values)).unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        error.to_string()
    };
    let x = |shape: &[usize], kind| [new("x", shape, kind)];
    let long = "x".repeat(64);
    for (tensors, values, expected) in [
        (
            x(&[2], Packing::F16),
            vec![1.0, 65520.0],
            "tensor x: element 1 is 65520, expected a number up to 65504",
        ),
        (x(&[2], Packing::F16), vec![-1e9, 1.0], "element 0 is -1000000000"),
        (x(&[2], Packing::Bf16), vec![1.0, f32::MAX], "element 1"),
        (x(&[2], Packing::F32), vec![1.0, f32::INFINITY], "element 1 is inf"),
        (
            x(&[1, 32], Packing::Q8_0),
            [vec![1.0; 9], vec![1e7], vec![2.0; 22]].concat(),
            "element 9 is 10000000",
        ),
        (
            x(&[1, 32], Packing::Q8_0),
            [vec![9.0; 9], vec![f32::NAN], vec![2.0; 22]].concat(),
            "element 9 is NaN",
        ),
        (x(&[2, 16], Packing::Q8_0), vec![1.0; 32], "rows of whole blocks of 32"),
        (
            x(&[1, 256], Packing::Q6_K),
            vec![1.0; 256],
            "expected F32, F16, BF16, Q8_0 or Q4_0, found Q6_K",
        ),
        (x(&[3], Packing::F32), vec![1.0; 2], "expected 3 values, found 2"),
        (x(&[3], Packing::F32), vec![1.0; 4], "expected 3 values, found 4"),
        (x(&[1, 32], Packing::Q8_0), vec![1.0; 31], "expected 32 values, found 31"),
        (x(&[1, 1, 1, 1, 1], Packing::F32), vec![1.0], "at most 4 dimensions"),
        (x(&[usize::MAX, 8], Packing::F32), vec![1.0], "a size that can be counted"),
        ([new(&long, &[1], Packing::F32)], vec![1.0], "a name of at most 63 bytes"),
    ] {
        let error = try_one(&tensors, &[], &values);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let twice = [new("x", &[1], Packing::F32), new("x", &[1], Packing::F32)];
    assert!(try_one(&twice, &[], &[1.0]).contains("one of that name"));
    let one = x(&[1], Packing::F32);
    for (metadata, expected) in [
        (vec![("a", Value::Bool(true)), ("a", Value::Bool(true))], "one entry"),
        (vec![("general.alignment", Value::Unsigned(64))], "expected 32"),
        (vec![("a", Value::Numbers(Number::U8, vec![256.0]))], "numbers of its type"),
        (vec![("a", Value::Numbers(Number::I32, vec![0.5]))], "numbers of its type"),
        (vec![("a", Value::Numbers(Number::Bool, vec![2.0]))], "numbers of its type"),
    ] {
        let error = try_one(&one, &metadata, &[1.0]);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // Models: the error of a value has the tensor's name.
    let c = wide(&json!({}));
    let large = |be: &mut Be<'_>, model: &Llama| {
        drawn(be, model);
        let t = model.tensors().into_iter().find(|t| t.name.ends_with("1.mlp.up_proj.weight"));
        be.fill_reals(t.unwrap().values, 1e5).unwrap();
    };
    let error = with(&c, large, |be, model| write(&path, be, &c, model, &[], Storage::F16));
    let error = error.unwrap_err();
    assert!(matches!(&error, WriteError::Range { name, .. } if name == "blk.1.ffn_up.weight"));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let shape = LoraShape { rank: 2, alpha: 2.0 };
    let adapters = Some(Adapters::new(shape));
    let setup = Setup { adapters, ..Setup::inference(c.dims, 12, 1) };
    let (model, layout) = Llama::layout::<Be<'_>>(&setup, Choice::new(1, 12)).unwrap();
    let mut memory = Memory::<f32>::new(&layout);
    let found = write(&path, &memory.backend(&layout), &c, &model, &none(), Storage::F32);
    assert!(found.unwrap_err().to_string().contains("merge them"));
    let other = wide(&json!({"rms_norm_eps": 1e-6}));
    let many = vec![("tokenizer.ggml.tokens".into(), Value::Texts(vec![String::new(); 41]))];
    let foreign = vec![("llama.block_count".into(), Value::Unsigned(3))];
    for (config, entries, expected) in [
        (&other, &none(), "that of the configuration"),
        (&c, &many, "at most the model's 40, found 41"),
        (&c, &foreign, "tokenizer.… or general.name, found llama.block_count"),
    ] {
        let error = with(&c, drawn, |be, model| {
            write(&path, be, config, model, entries, Storage::F32).unwrap_err().to_string()
        });
        assert!(error.contains(expected), "{error}");
    }
    for (changes, expected) in [
        (json!({"hidden_act": "gelu"}), "the function of the gate"),
        (
            json!({"model_type": "qwen3", "head_dim": 16, "attention_bias": true}),
            "biases of queries",
        ),
        (
            json!({"model_type": "qwen3", "head_dim": 16, "rope_scaling": {"rope_type": "llama3",
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}}),
            "the scaling of positions",
        ),
        (
            json!({"model_type": "gemma3_text", "head_dim": 16, "layer_types":
            ["full_attention", "sliding_attention"]}),
            "the blocks with a window",
        ),
    ] {
        let c = wide(&changes);
        let error = with(&c, drawn, |be, model| {
            write(&path, be, &c, model, &none(), Storage::F32).unwrap_err().to_string()
        });
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn small_and_empty_tensors_and_every_value() {
    let dir = TempDir::new();
    let path = dir.path().join("a.gguf");
    let tensors = [
        new("empty", &[0], Packing::F32),
        new("rows", &[0, 32], Packing::Q8_0),
        new("columns", &[3, 0], Packing::F16),
        new("one", &[1], Packing::F16),
        new("scalar", &[], Packing::F32),
        new("long", &[9, 1111], Packing::Bf16),
    ];
    let metadata: Vec<_> = [
        Value::Unsigned(7),
        Value::Unsigned(u64::MAX),
        Value::Signed(-7),
        Value::Signed(i64::MIN),
        Value::Float(1e-5),
        Value::Float(0.1 + 1e-17 + 0.2),
        Value::Float(1e300),
        Value::Bool(true),
        Value::Text("ä\0\n".into()),
        Value::Texts(vec![String::new(), "Ġ t".into()]),
        Value::Texts(vec![]),
        Value::Numbers(Number::I32, vec![3.0, -1.0, 6.0]),
        Value::Numbers(Number::F32, vec![0.0, -0.5, 3.4028235e38]),
        Value::Numbers(Number::F64, vec![0.1]),
        Value::Numbers(Number::Bool, vec![0.0, 1.0]),
        Value::Numbers(Number::U8, vec![255.0]),
        Value::Numbers(Number::I64, vec![]),
    ]
    .into_iter()
    .enumerate()
    .map(|(i, value)| (format!("k{i:02}"), value))
    .collect();
    let value = |i: usize| (i % 251) as f32 - 125.0;
    let put = |tensors: &[NewTensor], path: &Path, metadata: &[(String, Value)]| {
        gguf::write(path, metadata, tensors, |i, sink| {
            let n: usize = tensors[i].shape.iter().product();
            sink.put(&(0..n).map(value).collect::<Vec<_>>())
        })
        .unwrap();
    };
    put(&tensors, &path, &metadata);
    let file = Gguf::open(&path).unwrap();
    let found: Vec<_> = file.metadata.clone().into_iter().collect();
    assert_eq!(found, metadata);
    for t in &tensors {
        let found = &file.tensors[&t.name];
        assert_eq!((&found.shape, found.kind), (&t.shape, t.kind));
        let mut next = 0;
        file.stream(&t.name, &mut |at, values| {
            assert!(values.iter().enumerate().all(|(i, x)| *x == value(at + i)));
            next = at + values.len();
            Ok(())
        })
        .unwrap();
        assert_eq!(next, found.len());
    }
    assert!(file.tensors["empty"].is_empty() && file.tensors["scalar"].len() == 1);
    // From what was read, the same file.
    let second = dir.path().join("b.gguf");
    put(&tensors, &second, &found);
    assert!(std::fs::read(&path).unwrap() == std::fs::read(&second).unwrap());
    // Nothing at all.
    put(&[], &path, &[]);
    let file = Gguf::open(&path).unwrap();
    assert!(file.metadata.is_empty() && file.tensors.is_empty());
}

#[test]
fn a_disk_that_fails_leaves_the_old_file_or_the_new() {
    let c = config("llama", &json!({}));
    with(&c, of_dir("llama"), |be, model| {
        for fault in [Fault::Refused, Fault::Short, Fault::Stopped, Fault::Lost] {
            for n in 0.. {
                let dir = TempDir::new();
                let path = dir.file("a.gguf", b"old");
                arm(fault, n);
                let done = write(&path, be, &c, model, &none(), Storage::F32);
                let happened = disarm();
                let old = std::fs::read(&path).unwrap() == b"old";
                assert!(old || open(&path).is_ok(), "{fault:?} {n}");
                assert!(done.is_err() || fault == Fault::Lost || !old);
                if !happened {
                    assert!(n > 3 && done.is_ok());
                    break;
                }
            }
        }
    });
}

/// Copies a file, with other divisors of its angles and without what these programs note.
fn with_divisors(from: &Path, to: &Path, divisors: &[f32]) {
    let file = Gguf::open(from).unwrap();
    let entries = file.metadata.iter().filter(|(key, _)| !key.starts_with("bdia."));
    let metadata: Vec<_> = entries.map(|(key, value)| (key.clone(), value.clone())).collect();
    let mut tensors: Vec<_> =
        file.tensors.iter().map(|(name, t)| new(name, &t.shape, t.kind)).collect();
    let freqs = tensors.iter_mut().find(|t| t.name == "rope_freqs.weight").unwrap();
    freqs.shape = vec![divisors.len()];
    gguf::write(to, &metadata, &tensors.clone(), |i, sink| match tensors[i].name.as_str() {
        "rope_freqs.weight" => sink.put(divisors),
        name => {
            let mut all = Vec::new();
            file.stream(name, &mut |_, values| {
                all.extend_from_slice(values);
                Ok(())
            })?;
            sink.put(&all)
        }
    })
    .unwrap();
}

#[test]
fn the_scaling_of_llama_3_is_recognized() {
    let (s, dir) = (state("llama/q8_0.safetensors"), TempDir::new());
    for (factor, theirs) in [(8.0, "divisors.8"), (32.0, "divisors.32")] {
        let c = wide(&json!({"num_attention_heads": 2, "head_dim": 64, "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}));
        let path = dir.path().join("a.gguf");
        with(&c, drawn, |be, model| write(&path, be, &c, model, &none(), Storage::F32)).unwrap();
        assert_eq!(sized(&open(&path).unwrap().0, &c), c.dims);
        // Those of llama.cpp's converter.
        let theirs: Vec<f32> = s.reals[theirs].iter().map(|x| *x as f32).collect();
        let file = Gguf::open(&path).unwrap();
        file.stream("rope_freqs.weight", &mut |_, ours| {
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() <= 4.0 * f32::EPSILON * b, "{a} {b}");
            }
            assert_eq!(ours.len(), theirs.len());
            Ok(())
        })
        .unwrap();
        let other = dir.path().join("b.gguf");
        with_divisors(&path, &other, &theirs);
        let (again, _) = open(&other).unwrap();
        let scaling = RotaryScaling::Llama3 { factor, low: 1.0, high: 4.0, original: 8192.0 };
        assert_eq!(again.dims.angles[0].scaling, scaling);
        assert_eq!(sized(&again, &c), c.dims);
        let [a, b] = [&path, &other].map(|path| {
            with(&c, of_file(path), |be, model| {
                model.logits(be, &TOKENS, 0..12, Inference::STANDARD).unwrap()
            })
        });
        assert_eq!(bits(&a), bits(&b));
        // Others are not guessed at.
        let mut wrong = theirs.clone();
        wrong[20] *= 1.001;
        for wrong in [&wrong[..], &theirs[1..], &[]] {
            with_divisors(&path, &other, wrong);
            let error = open(&other).unwrap_err().to_string();
            assert!(error.contains("rope_freqs.weight"), "{error}");
        }
    }
}

/// The tokenizer of bytes with some merges.
fn of_bytes(changes: &[(&str, Json)]) -> Vec<u8> {
    let mut all = json!({
        "added_tokens": [
            {"id": 6, "content": "<|endoftext|>", "special": true},
            {"id": 8, "content": "<think>", "special": false}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>"}},
                {"Sequence": {"id": "A"}}]}]},
        "model": {"type": "BPE", "unk_token": null, "vocab": {"a": 0, "b": 1, "c": 2, "Ġ": 3,
            "ab": 4, "Ġab": 5}, "merges": ["a b", ["Ġ", "ab"]]}});
    for (at, value) in changes {
        *all.pointer_mut(at).unwrap() = value.clone();
    }
    all.to_string().into_bytes()
}

fn entry(entries: &[(String, Value)], key: &str) -> Option<Value> {
    entries.iter().find(|(k, _)| k == &format!("tokenizer.{key}")).map(|(_, v)| v.clone())
}

#[test]
fn tokenizers_of_bytes() {
    let config = json!({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"},
        "pad_token": null, "chat_template": [{"name": "tools", "template": "x"},
            {"name": "default", "template": "{{ messages }}"}]})
    .to_string();
    let found = tokenizer_metadata(&of_bytes(&[]), Some(config.as_bytes())).unwrap();
    let text = |t: &str| Some(Value::Text(t.into()));
    let texts = |t: &[&str]| Some(Value::Texts(t.iter().map(ToString::to_string).collect()));
    assert_eq!(entry(&found, "ggml.model"), text("gpt2"));
    assert_eq!(entry(&found, "ggml.pre"), text("gpt-2"));
    let tokens = ["a", "b", "c", "Ġ", "ab", "Ġab", "<|endoftext|>", "[PAD7]", "<think>"];
    assert_eq!(entry(&found, "ggml.tokens"), texts(&tokens));
    let types = vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 5.0, 4.0];
    assert_eq!(entry(&found, "ggml.token_type"), Some(Value::Numbers(Number::I32, types)));
    assert_eq!(entry(&found, "ggml.merges"), texts(&["a b", "Ġ ab"]));
    assert_eq!(entry(&found, "ggml.bos_token_id"), Some(Value::Unsigned(6)));
    assert_eq!(entry(&found, "ggml.eos_token_id"), Some(Value::Unsigned(6)));
    assert_eq!(entry(&found, "ggml.padding_token_id"), None);
    assert_eq!(entry(&found, "ggml.add_bos_token"), Some(Value::Bool(true)));
    assert_eq!(entry(&found, "ggml.add_eos_token"), Some(Value::Bool(false)));
    assert_eq!(entry(&found, "chat_template"), text("{{ messages }}"));

    let digits = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false}]});
    let llama = |numbers: &str| {
        let regex = [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
            numbers,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ]
        .concat();
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})
    };
    let cut = |changes: &[(&str, Json)]| {
        tokenizer_metadata(&of_bytes(changes), None).map(|all| entry(&all, "ggml.pre").unwrap())
    };
    let ignore = json!({"type": "BPE", "ignore_merges": true, "vocab": {"a": 0}, "merges": []});
    let pre = "/pre_tokenizer";
    assert_eq!(cut(&[(pre, digits.clone())]).ok(), text("smollm"));
    assert_eq!(
        cut(&[(pre, llama(r"\p{N}{1,3}")), ("/model", ignore.clone())]).ok(),
        text("llama-bpe")
    );
    let nfc = json!({"type": "NFC"});
    assert_eq!(cut(&[(pre, llama(r"\p{N}")), ("/normalizer", nfc.clone())]).ok(), text("qwen2"));
    for (changes, expected) in [
        (vec![(pre, llama(r"\p{N}{1,2}"))], "how tokenizer.json cuts words"),
        (vec![(pre, json!({"type": "Whitespace"}))], "how tokenizer.json cuts words"),
        (vec![(pre, json!({"type": "ByteLevel"}))], "how tokenizer.json cuts words"),
        (vec![(pre, Json::Null)], "how tokenizer.json cuts words"),
        (vec![(pre, llama(r"\p{N}{1,3}"))], "ignore_merges"),
        (vec![("/model", ignore)], "ignore_merges"),
        (vec![("/normalizer", nfc)], "the normalizer"),
        (vec![("/model/type", json!("Unigram"))], "expected BPE, found Unigram"),
        (vec![("/model/vocab/a", json!(1))], "numbers of their own"),
        (vec![("/model/vocab/a", json!(4_000_000))], "up to number 4000001"),
        (vec![("/model/vocab/a", json!(-1))], "numbers of their own"),
        (vec![("/added_tokens/0/id", json!(2))], "numbers of their own"),
        (vec![("/model/merges/0", json!("ab"))], "a merge"),
        (vec![("/model", json!(7))], "a field model"),
    ] {
        let error = cut(&changes).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    assert!(tokenizer_metadata(b"{", None).is_err());
    assert!(tokenizer_metadata(&of_bytes(&[]), Some(b"[")).is_err());
}

#[test]
fn tokenizers_of_characters() {
    let all = |merges: Json, normalizer: Json, pre: Json| {
        json!({
            "added_tokens": [{"id": 0, "content": "<unk>", "special": true},
                {"id": 1, "content": "<s>", "special": true},
                {"id": 9, "content": "▁▁", "special": false}],
            "normalizer": normalizer,
            "pre_tokenizer": pre,
            "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true,
                "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6,
                    "▁ab": 7, "▁a": 8}, "merges": merges}})
        .to_string()
        .into_bytes()
    };
    let merges = json!(["▁ a", "a b", "▁ ab", "▁a b"]);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let llama = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, replace]});
    let found = tokenizer_metadata(&all(merges.clone(), llama.clone(), Json::Null), None).unwrap();
    assert_eq!(entry(&found, "ggml.model"), Some(Value::Text("llama".into())));
    let types = vec![2.0, 3.0, 6.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0];
    assert_eq!(entry(&found, "ggml.token_type"), Some(Value::Numbers(Number::I32, types)));
    let scores = vec![0.0, 0.0, -3.0, -3.0, -3.0, -3.0, -1.0, -2.0, 0.0, 0.0];
    assert_eq!(entry(&found, "ggml.scores"), Some(Value::Numbers(Number::F32, scores)));
    let Some(Value::Texts(tokens)) = entry(&found, "ggml.tokens") else { panic!() };
    assert_eq!(tokens[9], "  ");
    assert_eq!(entry(&found, "ggml.add_space_prefix"), Some(Value::Bool(true)));
    assert_eq!(entry(&found, "ggml.unknown_token_id"), Some(Value::Unsigned(0)));

    let split = json!({"type": "Split", "pattern": {"String": " "},
        "behavior": "MergedWithPrevious", "invert": false});
    let meta = |scheme: &str| {
        json!({"type": "Metaspace", "replacement": "▁",
        "prepend_scheme": scheme, "split": false})
    };
    for (normalizer, pre, before) in [
        (replace.clone(), split, Some(false)),
        (Json::Null, meta("first"), Some(true)),
        (Json::Null, meta("never"), Some(false)),
        (Json::Null, Json::Null, None),
        (json!({"type": "NFKC"}), Json::Null, None),
        (replace, json!({"type": "Whitespace"}), None),
    ] {
        let found = tokenizer_metadata(&all(merges.clone(), normalizer, pre), None);
        let before = before.map(Value::Bool);
        assert_eq!(found.ok().and_then(|f| entry(&f, "ggml.add_space_prefix")), before);
    }
    // A pair is missing.
    let few = json!(["▁ a", "a b", "▁ ab"]);
    let error = tokenizer_metadata(&all(few, llama.clone(), Json::Null), None).unwrap_err();
    assert!(error.to_string().contains("found no \"▁a\" \"b\""), "{error}");
    // In an order that scores do not have.
    let merges = json!(["▁ ab", "a b", "▁a b"]);
    let error = tokenizer_metadata(&all(merges, llama, Json::Null), None).unwrap_err().to_string();
    assert!(error.contains("the order of SentencePiece"), "{error}");
}

const THREADS: usize = 2;

fn setup(config: &LlamaConfig, context: usize) -> (Llama, Layout) {
    let setup = Setup::inference(config.dims, context, THREADS);
    let setup = Setup { library: Cpu::library_bytes(THREADS), ..setup };
    Llama::layout::<Cpu>(&setup, Choice::new(1, 32)).unwrap()
}

#[test]
fn tokens_that_a_tokenizer_does_not_have_are_unused() {
    let (dir, c) = (TempDir::new(), wide(&json!({"bos_token_id": 1, "eos_token_id": [2, 3]})));
    let path = dir.path().join("a.gguf");
    let tokens: Vec<_> = (0..38).map(|i| format!("t{i}")).collect();
    let entries = [
        ("general.name", Value::Text("A".into())),
        ("tokenizer.ggml.bos_token_id", Value::Unsigned(7)),
        ("tokenizer.ggml.scores", Value::Numbers(Number::F32, vec![-1.0; 38])),
        ("tokenizer.ggml.token_type", Value::Numbers(Number::I32, vec![1.0; 38])),
        ("tokenizer.ggml.tokens", Value::Texts(tokens.clone())),
    ]
    .map(|(key, value)| (key.to_string(), value));
    with(&c, drawn, |be, model| write(&path, be, &c, model, &entries, Storage::F16)).unwrap();
    let (again, file) = open(&path).unwrap();
    assert_eq!((again.bos_token_id, again.eos_token_ids), (Some(7), vec![2]));
    assert_eq!(file.header().text("general.name"), Some("A"));
    let found = file.header().tokenizer();
    let filled = tokens.into_iter().chain(["[PAD38]".into(), "[PAD39]".into()]).collect();
    assert_eq!(entry(&found, "ggml.tokens"), Some(Value::Texts(filled)));
    let types = [vec![1.0; 38], vec![5.0; 2]].concat();
    assert_eq!(entry(&found, "ggml.token_type"), Some(Value::Numbers(Number::I32, types)));
    let scores = [vec![-1.0; 38], vec![0.0; 2]].concat();
    assert_eq!(entry(&found, "ggml.scores"), Some(Value::Numbers(Number::F32, scores)));
}

/// A real model, where a variable names its file.
fn real(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable);
    if path.is_none() {
        eprintln!("skipped: {variable} does not name the GGUF file of a model");
    }
    path.map(PathBuf::from)
}

/// A real model, written anew in every storage with its tokenizer; its greedy tokens are for others
/// to compare.
fn write_anew(path: &Path, name: &str, prompt: &[i32], end: &[i32]) {
    let (config, file) = open(path).unwrap();
    let entries = file.header().tokenizer();
    let (model, layout) = setup(&config, 64);
    let temporary = TempDir::new();
    let dir = out(&temporary);
    {
        let mut be = Cpu::new(&layout, THREADS).unwrap();
        files::read(&file, &mut be, &model).unwrap();
        for (storage, suffix) in STORAGES {
            let path = dir.join(format!("{name}.{suffix}.gguf"));
            write(&path, &be, &config, &model, &entries, storage).unwrap();
            let (again, file) = open(&path).unwrap();
            assert_eq!(again.dims, config.dims);
            assert_eq!(file.header().tokenizer(), entries);
        }
    }
    for (_, suffix) in STORAGES {
        let path = dir.join(format!("{name}.{suffix}.gguf"));
        let (model, _) = setup(&config, 64);
        let sizes = Sizes { prompts: 1, beams: 1, context: 64 };
        let (decoder, layout) = Decoder::layout::<Cpu>(&model, &sizes).unwrap();
        let mut be = Cpu::new(&layout, THREADS).unwrap();
        files::read(&open(&path).unwrap().1, &mut be, &model).unwrap();
        let decoding = Decoding {
            how: How::Search(Length::Power(1.0)),
            tokens: 24,
            ends: Vec::new(),
            no_repeat: 0,
            inference: Inference::STANDARD,
        };
        let prompts = [prompt.to_vec()];
        let found =
            decoder.decode(&mut be, &prompts, &decoding, |_| ControlFlow::Continue(())).unwrap();
        println!("{name} {suffix}: {:?}", found[0]);
        assert!(found[0].starts_with(end), "{name} {suffix}");
        let tokens = json!({"prompt": prompt, "greedy": found[0]});
        std::fs::write(path.with_extension("json"), tokens.to_string()).unwrap();
    }
}

#[test]
fn smollm2_is_written_with_its_tokenizer() {
    let Some(path) = real("BDIA_SMOLLM2") else { return };
    let s = state("llama/smollm2.safetensors");
    let (prompt, all) = (&s.ints["prompt"], &s.ints["greedy"]);
    // Rounding changes little: the first tokens are those of transformers.
    write_anew(&path, "smollm2", prompt, &all[prompt.len()..][..16]);
}

#[test]
fn gemma_is_written_with_its_tokenizer() {
    let Some(path) = real("BDIA_GEMMA3") else { return };
    // "<bos>The capital of France is"
    write_anew(&path, "real_gemma3", &[2, 818, 5279, 529, 7001, 563], &[]);
}

/// The `tokenizer.json` that Hugging Face makes of Gemma's tokens and their scores gives the file's
/// entries, with the scores' order.
#[test]
fn gemma_has_the_tokenizer_of_its_file() {
    let Some(path) = real("BDIA_GEMMA3") else { return };
    let entries = Gguf::open(&path).unwrap().tokenizer();
    let Some(Value::Texts(tokens)) = entry(&entries, "ggml.tokens") else { panic!() };
    let Some(Value::Numbers(_, types)) = entry(&entries, "ggml.token_type") else { panic!() };
    let Some(Value::Numbers(_, scores)) = entry(&entries, "ggml.scores") else { panic!() };
    let (mut vocab, mut added) = (serde_json::Map::new(), Vec::new());
    for (i, (text, kind)) in tokens.iter().zip(&types).enumerate() {
        let text = if *kind == 4.0 { text.replace(' ', "▁") } else { text.clone() };
        if *kind == 3.0 || *kind == 4.0 {
            added.push(json!({"id": i, "content": text, "special": *kind == 3.0}));
        }
        vocab.insert(text, json!(i));
    }
    let normal = |text: &str| {
        let id = vocab.get(text)?.as_u64().unwrap() as usize;
        (types[id] == 1.0).then_some(id)
    };
    let mut merges = Vec::new();
    for (i, text) in tokens.iter().enumerate().filter(|(i, _)| types[*i] == 1.0) {
        for (at, _) in text.char_indices().skip(1) {
            let (a, b) = text.split_at(at);
            if normal(a).is_some() && normal(b).is_some() {
                merges.push((i, json!([a, b])));
            }
        }
    }
    merges.sort_by(|(i, _), (j, _)| scores[*j].total_cmp(&scores[*i]));
    let merges: Vec<_> = merges.into_iter().map(|(_, merge)| merge).collect();
    let all = json!({"added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "},
            "behavior": "MergedWithPrevious", "invert": false},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true,
            "vocab": vocab, "merges": merges}});
    let config = json!({"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
        "pad_token": "<pad>", "add_bos_token": true, "add_eos_token": false});
    let (all, config) = (all.to_string(), config.to_string());
    let found = tokenizer_metadata(all.as_bytes(), Some(config.as_bytes())).unwrap();
    for (key, value) in &entries {
        // What begins nothing, and what has another scale.
        if key.ends_with("add_sep_token") || key.ends_with("scores") {
            continue;
        }
        let mut value = value.clone();
        if let (true, Value::Numbers(_, types)) = (key.ends_with("token_type"), &mut value) {
            // Its converter takes that for a special token; a tokenizer.json says what is unknown.
            types[3] = 2.0;
        }
        let ours = found.iter().find(|(k, _)| k == key).map(|(_, v)| v);
        assert!(ours == Some(&value), "{key}");
    }
    let Some(Value::Numbers(_, ours)) = entry(&found, "ggml.scores") else { panic!() };
    let made = |i: &usize| types[*i] == 1.0 && tokens[*i].chars().count() > 1;
    let mut order: Vec<_> = (0..tokens.len()).filter(made).collect();
    order.sort_by(|i, j| scores[*j].total_cmp(&scores[*i]));
    assert!(order.windows(2).all(|pair| ours[pair[0]] >= ours[pair[1]]));
    // For others to cut texts by.
    let temporary = TempDir::new();
    let again = by_way_of_json(&path);
    for key in ["ggml.tokens", "ggml.token_type"] {
        assert!(entry(&again, key) == entry(&found, key), "{key}");
    }
    for (name, entries) in [("theirs", &entries), ("ours", &found), ("again", &again)] {
        let mut all = vec![
            ("general.architecture".into(), Value::Text("gemma3".into())),
            ("gemma3.vocab_size".into(), Value::Unsigned(tokens.len() as u64)),
        ];
        all.extend(entries.iter().cloned());
        let path = out(&temporary).join(format!("{name}.vocab.gguf"));
        gguf::write(&path, &all, &[], |_, _| Ok(())).unwrap();
    }
}

/// The entries of a file, by way of the `tokenizer.json` that this crate makes of them.
fn by_way_of_json(path: &Path) -> Vec<(String, Value)> {
    let dir = TempDir::new();
    let tokenizer = Tokenizer::of_gguf(&Gguf::open(path).unwrap()).unwrap();
    tokenizer.write_hf_files(dir.path(), 2048).unwrap();
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    tokenizer_metadata(&read("tokenizer.json"), Some(&read("tokenizer_config.json"))).unwrap()
}

/// The `tokenizer.json` that SmolLM2 has, put together from its file, gives the file's entries.
#[test]
fn smollm2_has_the_tokenizer_of_its_file() {
    let Some(path) = real("BDIA_SMOLLM2") else { return };
    let entries = Gguf::open(&path).unwrap().tokenizer();
    let texts = |key| match entry(&entries, key) {
        Some(Value::Texts(all)) => all,
        other => panic!("{other:?}"),
    };
    let (tokens, merges) = (texts("ggml.tokens"), texts("ggml.merges"));
    let Some(Value::Numbers(_, types)) = entry(&entries, "ggml.token_type") else { panic!() };
    let vocab: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(i, t)| (t.clone(), json!(i))).collect();
    let added = types.iter().enumerate().filter(|(_, kind)| **kind == 3.0);
    let added: Vec<_> =
        added.map(|(i, _)| json!({"id": i, "content": tokens[i], "special": true})).collect();
    let all = json!({"added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}});
    let Some(Value::Text(template)) = entry(&entries, "chat_template") else { panic!() };
    let config = json!({"bos_token": tokens[1], "eos_token": tokens[2], "unk_token": tokens[0],
        "pad_token": tokens[2], "add_bos_token": false, "chat_template": template});
    let (all, config) = (all.to_string(), config.to_string());
    let mut found = tokenizer_metadata(all.as_bytes(), Some(config.as_bytes())).unwrap();
    // The file does not say what is so anyway.
    found.retain(|(key, _)| key != "tokenizer.ggml.add_eos_token");
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(found == entries);
    let mut found = by_way_of_json(&path);
    found.retain(|(key, _)| key != "tokenizer.ggml.add_eos_token");
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(found == entries);
}
