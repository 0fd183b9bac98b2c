//! Models of Llama's family in GGUF files: their configuration, and their tensors under Hugging
//! Face's names.
//!
//! The files of Llama, Mistral and SmolLM3 have the rows of queries and keys in another order, for
//! rotations of neighbours in place of halves; Gemma's have 1 added to the weights of norms. Both
//! are undone, so that a model is the same wherever it comes from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::{Kind, LlamaConfig};
use super::model::Dims;
use crate::config::ConfigError;
use crate::gguf::{self, Gguf};
use crate::language::Family;
use crate::weights::{Pieces, Source, WeightsError};

/// A file with a model.
#[derive(Debug)]
pub struct GgufModel {
    file: Gguf,
    dims: Dims,
    /// Names of the model and of the file.
    names: BTreeMap<String, String>,
    /// Whether rows of queries and keys are for rotations of neighbours.
    neighbours: bool,
}

/// Architectures of files, and the `model_type` of each.
const ARCHITECTURES: [(&str, Kind); 6] = [
    ("llama", Kind::Llama),
    ("mistral3", Kind::Mistral),
    ("qwen2", Kind::Qwen2),
    ("qwen3", Kind::Qwen3),
    ("smollm3", Kind::SmolLm3),
    ("gemma3", Kind::Gemma3),
];

/// Reads a file's header: the model's configuration, and where its tensors are.
///
/// # Errors
/// A file that is none of GGUF, of another architecture, or with metadata that cannot be used.
pub fn open(path: &Path) -> Result<(LlamaConfig, GgufModel), ConfigError> {
    let file = Gguf::open(path).map_err(|e| ConfigError::Values(e.to_string()))?;
    let config = config(&file).map_err(|e| e.of(path))?;
    let model = GgufModel::new(file, &config);
    Ok((config, model))
}

fn absent(field: &'static str, found: &str) -> ConfigError {
    let expected = "the metadata of a language model".into();
    ConfigError::Field { field, expected, found: found.into() }
}

/// The configuration as Hugging Face would have it.
fn config(file: &Gguf) -> Result<LlamaConfig, ConfigError> {
    let name = file.text("general.architecture").unwrap_or("nothing");
    let Some(&(architecture, kind)) = ARCHITECTURES.iter().find(|(known, _)| *known == name) else {
        let known: Vec<_> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        return Err(ConfigError::Field {
            field: "general.architecture",
            expected: known.join(", "),
            found: name.chars().take(60).collect(),
        });
    };
    let key = |name: &str| format!("{architecture}.{name}");
    let mut map = Map::new();
    map.insert("model_type".into(), json!(kind.name()));
    let mut put = |field: &str, value: Option<Value>| {
        if let Some(value) = value {
            map.insert(field.into(), value);
        }
    };
    let count = |name: &str| file.count(&key(name)).map(|n| json!(n));
    let number = |name: &str| file.number(&key(name)).map(|x| json!(x));
    put("num_hidden_layers", count("block_count"));
    put("hidden_size", count("embedding_length"));
    put("intermediate_size", count("feed_forward_length"));
    put("num_attention_heads", count("attention.head_count"));
    put("num_key_value_heads", count("attention.head_count_kv"));
    put("max_position_embeddings", count("context_length"));
    let eps = number("attention.layer_norm_rms_epsilon");
    put("rms_norm_eps", Some(eps.ok_or_else(|| absent("layer_norm_rms_epsilon", "nothing"))?));
    put("rope_theta", number("rope.freq_base"));
    put("head_dim", count("attention.key_length"));
    let rows = |tensor: &str| file.tensors.get(tensor).and_then(|t| t.shape.first().copied());
    let vocab = rows("token_embd.weight").ok_or_else(|| absent("token_embd.weight", "nothing"))?;
    put("vocab_size", Some(json!(vocab)));
    put("tie_word_embeddings", Some(json!(rows("output.weight").is_none())));
    put("bos_token_id", file.count("tokenizer.ggml.bos_token_id").map(|n| json!(n)));
    put("eos_token_id", file.count("tokenizer.ggml.eos_token_id").map(|n| json!(n)));
    let has = |tensor: &str| file.tensors.contains_key(tensor);
    put("attention_bias", Some(json!(has("blk.0.attn_output.bias"))));
    put("mlp_bias", Some(json!(has("blk.0.ffn_gate.bias"))));
    let window = count("attention.sliding_window");
    put("use_sliding_window", Some(json!(false)));
    match kind {
        Kind::Gemma3 => {
            put("sliding_window", window);
            // The file of the 27B does not say that its scores have another factor.
            if file.count(&key("block_count")) == Some(62) {
                let found = "62, which has another factor of the scores than 1/√head_dim";
                return Err(absent("gemma3.block_count", found));
            }
        }
        Kind::Mistral => put("sliding_window", Some(window.unwrap_or(Value::Null))),
        _ => {}
    }
    // What would change the result and is not implemented must not be passed over.
    for name in ["attention.scale", "attention.temperature_scale", "rope.scale_linear"] {
        if let Some(found) = file.number(&key(name)) {
            return Err(ConfigError::Field {
                field: "metadata",
                expected: format!("no {name}, which is not implemented"),
                found: found.to_string(),
            });
        }
    }
    let turned = file.count(&key("rope.dimension_count"));
    let head = file.count(&key("attention.key_length"));
    if turned.zip(head).is_some_and(|(turned, head)| turned != head) {
        return Err(ConfigError::Field {
            field: "rope.dimension_count",
            expected: "the width of a head".into(),
            found: turned.unwrap_or(0).to_string(),
        });
    }
    let factor = file.number(&key("rope.scaling.factor"));
    match (file.text(&key("rope.scaling.type")), factor) {
        (Some("none"), _) | (None, None) => {}
        (Some("linear") | None, _) => {
            put("rope_scaling", Some(json!({"rope_type": "linear", "factor": factor})));
        }
        (Some(other), _) => {
            return Err(ConfigError::Field {
                field: "rope.scaling.type",
                expected: "\"none\" or \"linear\"".into(),
                found: other.chars().take(60).collect(),
            });
        }
    }
    if has("rope_freqs.weight") {
        // Llama 3.1's scaling, already computed.
        let found = "scaled frequencies (rope_freqs.weight), which are not implemented for GGUF";
        return Err(absent("rope_freqs.weight", found));
    }
    let text = Value::Object(map).to_string();
    LlamaConfig::from_json(text.as_bytes())
}

impl GgufModel {
    fn new(file: Gguf, config: &LlamaConfig) -> Self {
        let dims = config.dims;
        let names =
            file.tensors.keys().filter_map(|name| Some((hugging_face(&dims, name)?, name.clone())));
        let names = names.collect();
        let neighbours = matches!(config.kind, Kind::Llama | Kind::Mistral | Kind::SmolLm3);
        Self { file, dims, names, neighbours }
    }

    /// The file's header.
    pub fn header(&self) -> &Gguf {
        &self.file
    }

    /// Heads whose rows are in the order of neighbours, of a tensor of the file.
    fn turned(&self, name: &str) -> Option<usize> {
        let d = &self.dims;
        let part = name.rsplit('.').nth(1).filter(|_| self.neighbours)?;
        match part {
            "attn_q" => Some(d.heads),
            "attn_k" => Some(d.kv_heads),
            _ => None,
        }
    }
}

/// Hugging Face's name of a tensor of a file; none for one that is no parameter.
fn hugging_face(dims: &Dims, name: &str) -> Option<String> {
    use bdia_core::layers::{Init, Tensor};
    let tensor = |name| Tensor::vector(name, 1, Init::Zeros);
    if let Some(rest) = name.strip_prefix("blk.") {
        let (k, part) = rest.split_once('.')?;
        let known = PARTS.iter().find(|known| **known == part)?;
        return Some(dims.name(Some(k.parse().ok()?), &tensor(known)));
    }
    let known = ["token_embd.weight", "output_norm.weight", "output.weight"];
    let known = known.into_iter().find(|known| *known == name)?;
    Some(dims.name(None, &tensor(known)))
}

/// The tensors of a block.
const PARTS: [&str; 20] = [
    "attn_norm.weight",
    "attn_q.weight",
    "attn_q.bias",
    "attn_k.weight",
    "attn_k.bias",
    "attn_v.weight",
    "attn_v.bias",
    "attn_output.weight",
    "attn_output.bias",
    "attn_q_norm.weight",
    "attn_k_norm.weight",
    "post_attention_norm.weight",
    "ffn_norm.weight",
    "ffn_gate.weight",
    "ffn_gate.bias",
    "ffn_up.weight",
    "ffn_up.bias",
    "ffn_down.weight",
    "ffn_down.bias",
    "post_ffw_norm.weight",
];

impl Source for GgufModel {
    fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<(), WeightsError> {
        let mut wrong = Vec::new();
        for (name, shape) in expected {
            let found = self.names.get(name).and_then(|name| self.file.tensors.get(name));
            match found {
                None => wrong.push(format!("missing: {name}")),
                Some(t) if t.shape != *shape => {
                    wrong.push(format!("{name} has shape {:?}, expected {shape:?}", t.shape));
                }
                Some(_) => {}
            }
        }
        let expected: BTreeSet<_> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let own: BTreeSet<_> = (self.names.iter())
            .filter(|(name, _)| expected.contains(name.as_str()))
            .map(|(_, own)| own.as_str())
            .collect();
        let strange = self.file.tensors.keys().filter(|name| !own.contains(name.as_str()));
        wrong.extend(strange.map(|name| format!("unexpected: {name}")));
        if wrong.is_empty() { Ok(()) } else { Err(WeightsError::Mismatch(wrong)) }
    }

    fn stream(&self, name: &str, put: &mut Pieces<'_>) -> Result<(), WeightsError> {
        let own = self.names.get(name).ok_or_else(|| WeightsError::Unknown(name.into()))?;
        if self.dims.norm_offset != 0.0 && own.ends_with("norm.weight") {
            let offset = self.dims.norm_offset as f32;
            return self.file.stream(own, &mut |at, values| {
                let values: Vec<_> = values.iter().map(|x| x - offset).collect();
                put(at, &values)
            });
        }
        let Some(heads) = self.turned(own) else { return self.file.stream(own, put) };
        let tensor = self.file.tensors.get(own);
        let mut all = vec![0.0; tensor.map_or(0, gguf::Tensor::len)];
        self.file.stream(own, &mut |at, values| {
            all[at..at + values.len()].copy_from_slice(values);
            Ok(())
        })?;
        // Row 2 i + j of a head is row j·(head_dim/2) + i, for i below head_dim/2 and j = 0, 1.
        let rows = tensor.map_or(1, |t| t.shape[0]);
        let (cols, dim) = (all.len() / rows.max(1), rows / heads.max(1));
        for row in 0..rows {
            let (head, r) = (row / dim.max(1), row % dim.max(1));
            let half = (dim / 2).max(1);
            let from = head * dim + 2 * (r % half) + r / half;
            put(row * cols, &all[from * cols..(from + 1) * cols])?;
        }
        Ok(())
    }
}
