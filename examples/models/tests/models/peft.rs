//! Adapters of every kind that PEFT's `LoraConfig` describes, merged, against the logits that PEFT
//! gives in f64 (`tests/torch/peft_matrix.py`); configurations that are refused.

use std::path::{Path, PathBuf};

use crate::common::{difference, state};
use bdia_core::plan::Choice;
use bdia_cpu::Cpu;
use bdia_models::files::testing::TempDir;
use bdia_models::for_family;
use bdia_models::inference::Inference;
use bdia_models::language::Config as _;
use bdia_models::language::adapter::{self, Adapter};
use bdia_models::language::model::{LanguageModel, Setup};
use bdia_models::pretrained::{AnyConfig, load};
use serde_json::{Map, Value, json};

const CASES: [(&str, &str); 12] = [
    ("gpt2_full_names", "gpt2/hf_untied"),
    ("gpt2_regex", "gpt2/hf_untied"),
    ("gpt2_projections", "gpt2/hf_untied"),
    ("gpt2_linear", "gpt2/hf_untied"),
    ("gpt2_head", "gpt2/hf_untied"),
    ("gpt2_blocks", "gpt2/hf_untied"),
    ("llama_linear", "llama/llama_biases"),
    ("llama_patterns", "llama/llama_biases"),
    ("llama_excluded", "llama/llama_biases"),
    ("llama_one_block", "llama/llama_biases"),
    ("llama_regex_excluded", "llama/llama"),
    ("llama_head", "llama/llama"),
];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Logits of a model with an adapter.
fn logits(base: &str, adapter: &Path, tokens: &[i32]) -> Result<Vec<f64>, String> {
    let dir = data(base);
    for_family!(AnyConfig::read_dir(&dir).unwrap(), config => {
        let setup = Setup::inference(config.dims(), tokens.len(), 1);
        let choice = Choice::new(1, tokens.len());
        let (mut model, layout) = LanguageModel::layout::<Cpu>(&setup, choice).unwrap();
        let mut be = Cpu::new(&layout, 1).unwrap();
        let opened = Adapter::open(adapter, &model).map_err(|e| e.to_string())?;
        let digest = load(&dir, &mut be, &model).unwrap();
        opened.merge(&mut be, &model, &digest).map_err(|e| e.to_string())?;
        let all = 0..tokens.len();
        let found = model.logits(&mut be, tokens, all, Inference::STANDARD).unwrap();
        Ok(found.into_iter().map(f64::from).collect())
    })
}

#[test]
fn every_kind_of_target() {
    let s = state("peft/logits.safetensors");
    for (name, base) in CASES {
        let tokens = &s.ints[&format!("{name}.tokens")];
        let ours = logits(base, &data("peft").join(name), tokens).unwrap();
        let d = difference(&ours, &s.reals[&format!("{name}.logits")], 1e-3);
        // f32 against f64 through a few blocks.
        assert!(d < 5e-6, "{name}: {d:e}");
        // The adapter does something.
        let (_, other) = CASES.iter().find(|(_, other)| *other != base).unwrap();
        assert!(logits(other, &data("peft").join(name), &[1]).is_err(), "{name} fits {other}");
    }
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let tokens = [1, 2, 3];
    let from = data("peft/llama_linear");
    let read = |change: &dyn Fn(&mut Map<String, Value>)| {
        let dir = TempDir::new();
        let path = dir.path().join(adapter::CONFIG);
        let mut map = serde_json::from_slice(&std::fs::read(from.join(adapter::CONFIG)).unwrap());
        change(map.as_mut().unwrap());
        std::fs::write(&path, json!(map.unwrap()).to_string()).unwrap();
        std::fs::copy(from.join(adapter::FILE), dir.path().join(adapter::FILE)).unwrap();
        logits("llama/llama_biases", dir.path(), &tokens)
    };
    let put = |field: &str, value: Value| {
        read(&|map| {
            map.insert(field.into(), value.clone());
        })
    };
    let plain = read(&|_| ()).unwrap();
    for (field, value, expected) in [
        ("peft_type", json!("LOHA"), "expected \"LORA\", found \"LOHA\""),
        ("bias", json!("all"), "expected \"none\""),
        ("init_lora_weights", json!("pissa"), "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", json!("olora"), "adapters of the model's own weights"),
        ("use_dora", json!(true), "use_dora: expected nothing"),
        ("use_rslora", json!("yes"), "true or false"),
        ("modules_to_save", json!(["lm_head"]), "modules_to_save: expected nothing"),
        ("trainable_token_indices", json!([1]), "trainable_token_indices: expected nothing"),
        ("a_field_of_the_future", json!({"x": 1}), "a_field_of_the_future: expected nothing"),
        ("target_modules", json!(["proj"]), "which are down_proj, gate_proj"),
        ("target_modules", json!(["q_proj"]), "unexpected: base_model.model.model.layers.0"),
        ("target_modules", json!("("), "a regular expression, found ("),
        ("r", json!(4), "has shape [3, 16], expected [4, 16]"),
        ("r", json!(0), "a whole number from 1 to 1048576"),
        ("lora_alpha", json!("x"), "lora_alpha: expected a number"),
        ("alpha_pattern", json!([1]), "values by the names of layers"),
        ("layers_to_transform", json!("1"), "numbers of blocks"),
    ] {
        let error = put(field, value.clone()).unwrap_err();
        assert!(error.contains(expected), "{field} {value}: {error}");
    }
    for (field, value) in [
        ("init_lora_weights", json!("gaussian")),
        ("a_field_of_the_future", json!(false)),
        ("another", Value::Null),
        ("lora_dropout", json!(0.5)),
        (
            "target_modules",
            json!([
                "q_proj",
                "k_proj",
                "v_proj",
                "self_attn.o_proj",
                "gate_proj",
                "up_proj",
                "model.layers.0.mlp.down_proj",
                "layers.1.mlp.down_proj",
                "2.mlp.down_proj",
                "3.mlp.down_proj"
            ]),
        ),
    ] {
        assert_eq!(put(field, value).unwrap(), plain, "{field}");
    }
    assert_ne!(put("lora_alpha", json!(6)).unwrap(), plain);
}
