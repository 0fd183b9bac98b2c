//! The fuzz targets' functions over the committed seeds and mutations of them.
//! `examples/fuzz/README.md` says how to search further.
#![allow(clippy::unwrap_used)]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::{Path, PathBuf};

use bdia_train::mutations;

fn dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name)
}

fn all(name: &str, target: fn(&[u8])) {
    mutations::all(&dir(name), target);
}

#[test]
fn weights() {
    all("weights", targets::weights);
}

#[test]
fn gguf() {
    all("gguf", targets::gguf);
}

#[test]
fn tokenizer() {
    all("tokenizer", targets::tokenizer_files);
}

#[test]
fn chat() {
    all("chat", targets::chat);
}

#[test]
fn llama_config() {
    all("llama_config", targets::llama_config);
}

#[test]
fn prepared() {
    all("prepared", targets::prepared);
}

#[test]
fn index() {
    all("index", targets::index);
}

#[test]
fn config() {
    all("config", targets::config);
}

#[test]
fn checkpoint() {
    all("checkpoint", targets::checkpoint);
}

#[test]
fn tokens() {
    all("tokens", targets::tokens);
}

#[test]
fn packed() {
    all("packed", targets::packed);
}

#[test]
fn pairs() {
    all("pairs", targets::pairs);
}

#[test]
fn text() {
    all("text", targets::text);
}

/// Seeds that are meant to be good are: otherwise the search would begin at the door.
#[test]
fn good_seeds_are_accepted() {
    let seed = |target, name: &str| {
        mutations::seeds(&dir(target)).into_iter().find(|s| s.0 == name).unwrap().1
    };
    let path = Path::new("seed");
    let bytes = seed("weights", "f32_f16_bf16");
    assert_eq!(
        bdia_models::weights::read_header(path, &mut &bytes[..], bytes.len() as u64, 0)
            .unwrap()
            .len(),
        4
    );
    let bytes = seed("gguf", "blocks");
    let header = bdia_models::gguf::read_header(path, &bytes[..], bytes.len() as u64).unwrap();
    assert_eq!((header.tensors.len(), header.count("x.u64")), (5, Some(7)));
    for name in ["byte_level", "split", "metaspace", "pieces"] {
        bdia_models::tokenizer::Tokenizer::from_json(&seed("tokenizer", name)).unwrap();
    }
    for name in ["byte_level_file", "pieces_file"] {
        let bytes = seed("tokenizer", name);
        let header = bdia_models::gguf::read_header(path, &bytes[..], bytes.len() as u64).unwrap();
        bdia_models::tokenizer::Tokenizer::of_gguf(&header).unwrap();
    }
    for name in ["chatml", "headers", "inst", "marked", "python"] {
        let text = String::from_utf8(seed("chat", name)).unwrap();
        bdia_models::chat::ChatTemplate::parse(&text, None, None).unwrap();
    }
    for name in ["llama_scaled", "gemma3", "qwen2", "smollm3", "old"] {
        let bytes = seed("llama_config", name);
        bdia_models::llama::config::LlamaConfig::from_json(&bytes).unwrap();
    }
    assert!(bdia_models::weights::read_index(path, &seed("index", "shards")).is_ok());
    for name in ["hugging_face", "small", "ours"] {
        bdia_models::gpt2::config::Gpt2Config::from_json(&seed("config", name)).unwrap();
    }
    assert!(targets::accepted(&seed("checkpoint", "good")));
    for (name, offset) in [("plain", 0), ("llm_c", 1024)] {
        let bytes = seed("tokens", name);
        let layout = bdia_lm::data::token_layout(path, &bytes, bytes.len() as u64, None).unwrap();
        assert_eq!((layout.offset, layout.tokens), (offset, 24));
    }
    let bytes = seed("tokens", "numpy");
    let layout = bdia_lm::data::token_layout(path, &bytes, bytes.len() as u64, None).unwrap();
    assert_eq!((layout.offset, layout.tokens, layout.token_type.bytes()), (128, 24, 4));
    let bytes = bdia_models::input::unpack(path, seed("packed", "members"), 1 << 16).unwrap();
    assert_eq!(bdia_models::input::text(path, bytes).unwrap(), "one\ntwo\n");
    let columns = bdia_lm::pairs::PairColumns { prompt: "q".into(), completion: "a".into() };
    for (name, pairs) in [("csv", 2), ("tsv", 1), ("jsonl", 2)] {
        let path = Path::new("seed").with_extension(name);
        assert_eq!(
            bdia_lm::pairs::parse(&path, seed("pairs", name), &columns).unwrap().pairs.len(),
            pairs
        );
    }
}
