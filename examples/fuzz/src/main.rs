//! The fuzz targets of all programs behind libFuzzer. `BDIA_FUZZ` names one; the README says how
//! this is built.
#![no_main]

use std::sync::OnceLock;

#[path = "../../lm/fuzz/targets.rs"]
mod lm;
#[path = "../../translation/fuzz/targets.rs"]
mod translation;
#[path = "../../vit/fuzz/targets.rs"]
mod vit;

type Target = fn(&[u8]);

/// By the folder of their seeds.
const TARGETS: [(&str, Target); 19] = [
    ("lm/chat", lm::chat),
    ("lm/checkpoint", lm::checkpoint),
    ("lm/config", lm::config),
    ("lm/gguf", lm::gguf),
    ("lm/index", lm::index),
    ("lm/llama_config", lm::llama_config),
    ("lm/packed", lm::packed),
    ("lm/pairs", lm::pairs),
    ("lm/prepared", lm::prepared),
    ("lm/text", lm::text),
    ("lm/tokenizer", lm::tokenizer_files),
    ("lm/tokens", lm::tokens),
    ("lm/weights", lm::weights),
    ("translation/pairs", translation::pairs),
    ("translation/translation_config", translation::translation_config),
    ("vit/cifar", vit::cifar),
    ("vit/config", vit::config),
    ("vit/idx", vit::idx),
    ("vit/picture", vit::picture),
];

static CHOSEN: OnceLock<Target> = OnceLock::new();

fn choose() {
    let name = std::env::var("BDIA_FUZZ").unwrap_or_default();
    let Some(&(_, target)) = TARGETS.iter().find(|t| t.0 == name) else {
        eprintln!("BDIA_FUZZ is {name:?}; possible: {}", TARGETS.map(|t| t.0).join(", "));
        std::process::exit(2);
    };
    CHOSEN.get_or_init(|| target);
}

libfuzzer_sys::fuzz_target!(init: choose(), |data: &[u8]| {
    if let Some(target) = CHOSEN.get() {
        target(data);
    }
});
