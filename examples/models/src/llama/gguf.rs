//! Models of Llama's family in GGUF files: their configuration, and their tensors under Hugging
//! Face's names.
//!
//! The files of Llama, Mistral and SmolLM3 have the rows of queries and keys in another order, for
//! rotations of neighbours in place of halves; Gemma's have 1 added to the weights of norms. Both
//! are undone, so that a model is the same wherever it comes from, and done where one is written.
//!
//! The scaling of Llama 3.1 is in a file as the divisor of every angle ([`FREQUENCIES`]). A model
//! has its constants: those with which the published models were made are recognized, and those
//! that [`write()`] notes beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bdia_core::Packing;
use bdia_core::backend::{Backend, Gate, Gelu};
use bdia_core::layers::{RotaryAngles, RotaryScaling};
use serde_json::{Map, Value, json};

use super::config::{Kind, LlamaConfig};
use super::model::{Dims, Llama};
use crate::config::ConfigError;
use crate::gguf::{self, Gguf, NewTensor, Number, Sink, WriteError};
use crate::language::Family;
use crate::named::Named;
use crate::packing::Extent;
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

/// The tensor with the divisors of the angles.
pub const FREQUENCIES: &str = "rope_freqs.weight";
/// The entry with the constants that they come from: factor, low, high, original context. Other
/// programs pass over it.
const SCALING: &str = "bdia.llama3_scaling";
/// The entry that says how a model was trained, if by these programs.
const TRAINING: &str = "bdia.training";
/// Those of Llama 3.1 and of Llama 3.2.
const SCALINGS: [[f64; 4]; 2] = [[8.0, 1.0, 4.0, 8192.0], [32.0, 1.0, 4.0, 8192.0]];
/// By which blocks without a window repeat, where a file of Gemma's does not say it.
const PERIOD: usize = 6;
/// By which blocks without positions repeat, which no file says.
const UNROTATED: usize = 4;

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
    if let Some(text) = file.text(TRAINING) {
        put("bdia", serde_json::from_str(text).ok());
    }
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
            put("rope_local_base_freq", number("rope.freq_base_swa"));
            match file.metadata.get(&key("attention.sliding_window_pattern")) {
                None => {}
                Some(gguf::Value::Unsigned(n)) => put("sliding_window_pattern", Some(json!(n))),
                Some(gguf::Value::Numbers(_, of_blocks)) => {
                    let name = |slides: &f64| if *slides == 0.0 { "full" } else { "sliding" };
                    let names: Vec<_> =
                        of_blocks.iter().map(|s| format!("{}_attention", name(s))).collect();
                    put("layer_types", Some(json!(names)));
                }
                Some(other) => {
                    let found = format!("{other:?}").chars().take(60).collect::<String>();
                    return Err(absent("attention.sliding_window_pattern", &found));
                }
            }
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
    if has(FREQUENCIES) {
        if kind != Kind::Llama || factor.is_some() {
            let found = "it, which is implemented for \"llama\" without another scaling";
            return Err(ConfigError::Field {
                field: "rope_freqs.weight",
                expected: "nothing".into(),
                found: found.into(),
            });
        }
        let [factor, low, high, original] = scaling(file, &map)?;
        map.insert(
            "rope_scaling".into(),
            json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                "high_freq_factor": high, "original_max_position_embeddings": original}),
        );
    }
    let text = Value::Object(map).to_string();
    LlamaConfig::from_json(text.as_bytes())
}

/// The constants of the scaling whose divisors a file has; `map` has the rest of the
/// configuration.
fn scaling(file: &Gguf, map: &Map<String, Value>) -> Result<[f64; 4], ConfigError> {
    let number = |name: &str| map.get(name).and_then(Value::as_f64);
    let width = number("head_dim").or_else(|| {
        Some(number("hidden_size")? / number("num_attention_heads").filter(|n| *n > 0.0)?)
    });
    let (width, theta) = (width.unwrap_or(0.0) as usize, number("rope_theta").unwrap_or(1e4));
    let wrong = |expected: String, found: String| ConfigError::Field {
        field: "rope_freqs.weight",
        expected,
        found,
    };
    let tensor = file.tensors.get(FREQUENCIES);
    let len = tensor.map_or(0, gguf::Tensor::len);
    if len != width / 2 || len > RotaryAngles::MOST / 2 {
        return Err(wrong(format!("{} divisors of angles", width / 2), len.to_string()));
    }
    let mut found = vec![0.0; len];
    file.stream(FREQUENCIES, &mut |at, values| {
        found[at..at + values.len()].copy_from_slice(values);
        Ok(())
    })
    .map_err(|e| ConfigError::Values(e.to_string()))?;
    let noted = match file.metadata.get(SCALING) {
        Some(gguf::Value::Numbers(_, all)) => <[f64; 4]>::try_from(all.as_slice()).ok(),
        _ => None,
    };
    let sensible = |s: &[f64; 4]| s.iter().all(|x| *x > 0.0 && x.is_finite()) && s[1] < s[2];
    let is = |s: &[f64; 4]| {
        // Those of llama.cpp's converter are rounded to f32 in every step.
        let near = |(a, b): (&f32, f32)| (a - b).abs() <= 8.0 * f32::EPSILON * b;
        found.iter().zip(divisors(width, theta, *s)).all(near)
    };
    let mut known = noted.into_iter().filter(sensible).chain(SCALINGS);
    known.find(is).ok_or_else(|| {
        let expected = "the divisors of Llama 3.1 (factor 8) or 3.2 (factor 32), original context \
                        8192"
            .into();
        let largest = found.iter().fold(0.0_f32, |most, x| most.max(*x));
        wrong(expected, format!("others, up to {largest}"))
    })
}

/// By what the scaling of Llama 3.1 divides each angle, in the steps of llama.cpp's converter.
fn divisors(
    width: usize,
    theta: f64,
    [factor, low, high, original]: [f64; 4],
) -> impl Iterator<Item = f32> {
    (0..width / 2).map(move |i| {
        let power = theta.powf(f64::from((2 * i) as f32 / width as f32)) as f32;
        let frequency = 1.0 / power;
        let wave = (2.0 * core::f64::consts::PI) as f32 / frequency;
        if f64::from(wave) < original / high {
            1.0
        } else if f64::from(wave) > original / low {
            factor as f32
        } else {
            let part = (original as f32 / wave - low as f32) / (high - low) as f32;
            1.0 / ((1.0 - part) / factor as f32 + part)
        }
    })
}

impl GgufModel {
    fn new(file: Gguf, config: &LlamaConfig) -> Self {
        let dims = config.dims;
        let names =
            file.tensors.keys().filter_map(|name| Some((hugging_face(&dims, name)?, name.clone())));
        let names = names.collect();
        let neighbours = has_neighbours(config.kind);
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
        // The configuration has what that tensor says.
        let known = |name: &str| own.contains(name) || name == FREQUENCIES;
        let strange = self.file.tensors.keys().filter(|name| !known(name));
        wrong.extend(strange.map(|name| format!("unexpected: {name}")));
        if wrong.is_empty() { Ok(()) } else { Err(WeightsError::Mismatch(wrong)) }
    }

    fn extent(&self, name: &str) -> Option<Extent> {
        let own = self.names.get(name)?;
        let mut extent = self.file.extent(own)?;
        if let Some(heads) = self.turned(own) {
            extent.neighbours = self.file.tensors.get(own)?.shape.first()?.checked_div(heads)?;
        }
        Some(extent)
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

/// How a model's matrices are stored; vectors stay `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the format's own names")]
pub enum Storage {
    /// 32 bits: the values themselves.
    F32,
    /// 16 bits, rounded to nearest.
    F16,
    /// Blocks of 32 values of 8 bits. Matrices whose rows are no multiple of 32 are stored as
    /// [`F16`](Self::F16), as llama.cpp's converter does it.
    Q8_0,
}

impl Storage {
    fn kind(self, shape: &[usize]) -> Packing {
        match self {
            _ if shape.len() < 2 => Packing::F32,
            Self::F32 => Packing::F32,
            Self::Q8_0 if shape.last().is_some_and(|n| n.is_multiple_of(32)) => Packing::Q8_0,
            Self::F16 | Self::Q8_0 => Packing::F16,
        }
    }

    /// ggml's number of a file that is mostly stored so.
    fn file_type(self) -> u64 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
        }
    }
}

/// Writes a model as a GGUF file that llama.cpp reads: metadata, tokenizer, and tensors under
/// ggml's names; rows of queries and keys of Llama, Mistral and SmolLM3 in the order of neighbours,
/// Gemma's norms plus 1.
///
/// `tokenizer` are entries whose keys begin with `tokenizer.`, from the file that the model came
/// from ([`Gguf::tokenizer`]) or from a `tokenizer.json`
/// ([`tokenizer_metadata`](super::gguf_tokenizer::tokenizer_metadata)), and `general.name`, if
/// wanted. They are written as they are, but for two things: where the model has more tokens than
/// they have, unused ones are added, and where they name no first or last token of a text, those
/// of the configuration are (of several last ones, the first). Without a tokenizer llama.cpp
/// cannot load the file; these programs can.
///
/// Mistral's files are those of Llama, as llama.cpp has it, and are read again as such.
///
/// # Errors
/// What llama.cpp would not compute as this model does is refused: windows other than Gemma's,
/// functions of the gate, biases and blocks without positions that it does not have. So are
/// adapters, which must be merged before, tokenizers with more tokens than the model, and values
/// that do not fit their storage. An existing file is untouched then.
pub fn write<B: Backend<Real = f32>>(
    path: &Path,
    be: &B,
    config: &LlamaConfig,
    model: &Llama,
    tokenizer: &[(String, gguf::Value)],
    storage: Storage,
) -> Result<(), WriteError> {
    let d = &config.dims;
    let of_model = Dims { sigma: d.sigma, ..model.setup().dims }.undropped();
    if of_model != d.undropped() {
        return Err(WriteError::unfit("the model", "that of the configuration", "another"));
    }
    if model.setup().adapters.is_some() {
        let found = "adapters, which the file would not have: merge them";
        return Err(WriteError::unfit("the model", "one without adapters", found));
    }
    let metadata = metadata(config, tokenizer, storage)?;
    let tensors = model.tensors();
    let mut new = Vec::with_capacity(tensors.len() + 1);
    for t in &tensors {
        let kind = storage.kind(&t.shape);
        new.push(NewTensor { name: ggml(t), shape: t.shape.clone(), kind });
    }
    let mut divisors: Vec<f32> = Vec::new();
    if let RotaryScaling::Llama3 { factor, low, high, original } = d.angles[0].scaling {
        let constants = [factor, low, high, original];
        divisors = self::divisors(d.head_dim, d.angles[0].theta, constants).collect();
        let (name, shape) = (FREQUENCIES.into(), vec![divisors.len()]);
        new.push(NewTensor { name, shape, kind: Packing::F32 });
    }
    gguf::write(path, &metadata, &new, |i, sink| match tensors.get(i) {
        Some(t) => put(d, config.kind, t, be, sink),
        None => sink.put(&divisors),
    })
}

/// ggml's name of a tensor.
fn ggml(t: &Named) -> String {
    let block = t.name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
    match block {
        Some(k) => format!("blk.{k}.{}", t.tensor.name),
        None => t.tensor.name.into(),
    }
}

/// Values that are copied at a time.
const PIECE: usize = 1 << 14;

/// Writes the values of a tensor as a file has them.
fn put<B: Backend<Real = f32>>(
    d: &Dims,
    kind: Kind,
    t: &Named,
    be: &B,
    sink: &mut Sink<'_>,
) -> Result<(), WriteError> {
    let heads = match t.tensor.name.split('.').next() {
        _ if !has_neighbours(kind) => None,
        Some("attn_q") => Some(d.heads),
        Some("attn_k") => Some(d.kv_heads),
        _ => None,
    };
    if !t.transposed && heads.is_none() {
        let norm = d.norm_offset != 0.0 && t.tensor.name.ends_with("norm.weight");
        let mut piece = vec![0.0; PIECE.min(t.len())];
        for at in (0..t.len()).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min(t.len() - at)];
            t.get(be, at, piece)?;
            if norm {
                piece.iter_mut().for_each(|x| *x += d.norm_offset as f32);
            }
            sink.put(piece)?;
        }
        return Ok(());
    }
    let mut ours = vec![0.0; t.len()];
    t.get(be, 0, &mut ours)?;
    let rows = t.shape.first().copied().unwrap_or(1);
    let cols = t.len() / rows.max(1);
    let dim = rows / heads.unwrap_or(1).max(1);
    let mut row = vec![0.0; cols];
    for at in 0..rows {
        // Row 2 i + j of a head is row j·(dim/2) + i of ours, for i below dim/2 and j = 0, 1.
        let r = at % dim.max(1);
        let from = if heads.is_some() { at - r + r % 2 * (dim / 2) + r / 2 } else { at };
        for (c, x) in row.iter_mut().enumerate() {
            *x = ours[if t.transposed { c * rows + from } else { from * cols + c }];
        }
        sink.put(&row)?;
    }
    Ok(())
}

/// Whether rows of queries and keys are in the order of neighbours.
fn has_neighbours(kind: Kind) -> bool {
    matches!(kind, Kind::Llama | Kind::Mistral | Kind::SmolLm3)
}

/// What a file says of a model, under the keys of llama.cpp's converter.
fn metadata(
    config: &LlamaConfig,
    tokenizer: &[(String, gguf::Value)],
    storage: Storage,
) -> Result<Vec<(String, gguf::Value)>, WriteError> {
    use gguf::Value::{Numbers, Text, Unsigned};
    let single = gguf::Value::single;
    let d = &config.dims;
    let architecture = check(config)?;
    let mut all = vec![("general.architecture".to_string(), Text(architecture.into()))];
    let mut put = |key: &str, value: gguf::Value| all.push((key.into(), value));
    put("general.type", Text("model".into()));
    if !tokenizer.iter().any(|(key, _)| key == "general.name") {
        let name = config.file.get("_name_or_path").and_then(Value::as_str);
        let name = name.and_then(|n| n.rsplit(['/', '\\']).next()).filter(|n| !n.is_empty());
        put("general.name", Text(name.unwrap_or(config.kind.name()).into()));
    }
    put("general.file_type", Unsigned(storage.file_type()));
    put("general.quantization_version", Unsigned(2));
    if let Some(text) = config.bdia.and_then(|bdia| serde_json::to_string(&bdia).ok()) {
        put(TRAINING, Text(text));
    }
    let mut put = |key: &str, value| put(&format!("{architecture}.{key}"), value);
    let count = |n: usize| Unsigned(n as u64);
    put("block_count", count(d.layers));
    put("context_length", count(d.positions));
    put("embedding_length", count(d.width));
    put("feed_forward_length", count(d.inner));
    put("attention.head_count", count(d.heads));
    put("attention.head_count_kv", count(d.kv_heads));
    put("attention.key_length", count(d.head_dim));
    put("attention.value_length", count(d.head_dim));
    put("attention.layer_norm_rms_epsilon", single(d.eps));
    put("vocab_size", count(d.vocab));
    put("rope.dimension_count", count(d.head_dim));
    put("rope.freq_base", single(d.angles[0].theta));
    if let Some(window) = d.window {
        put("rope.freq_base_swa", single(d.angles[1].theta));
        put("attention.sliding_window", count(window));
        if let Some(period) = period(d).filter(|n| *n != PERIOD) {
            put("attention.sliding_window_pattern", count(period));
        }
    }
    if let RotaryScaling::Linear(factor) = d.angles[0].scaling {
        put("rope.scaling.type", Text("linear".into()));
        put("rope.scaling.factor", single(factor));
    }
    if let RotaryScaling::Llama3 { factor, low, high, original } = d.angles[0].scaling {
        let constants = vec![factor, low, high, original];
        all.push((SCALING.into(), Numbers(Number::F64, constants)));
    }
    let own = all.len();
    for (key, value) in tokenizer {
        if !key.starts_with("tokenizer.") && key != "general.name" {
            let expected = "tokenizer.… or general.name";
            return Err(WriteError::unfit("the keys of the tokenizer's entries", expected, key));
        }
        all.push((key.clone(), filled(d.vocab, key, value)?));
    }
    let last = config.eos_token_ids.first().copied();
    for (key, token) in [
        ("tokenizer.ggml.bos_token_id", config.bos_token_id),
        ("tokenizer.ggml.eos_token_id", last),
    ] {
        if let Some(token) = token.filter(|_| !tokenizer.iter().any(|(own, _)| own == key)) {
            all.push((key.into(), Unsigned(token.into())));
        }
    }
    // The order in which they are read again, so that the same file comes of them.
    all[own..].sort_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}

/// A tokenizer's entry for a model of `vocab` tokens: lists with an element for each token get
/// elements for tokens that are not used.
fn filled(vocab: usize, key: &str, value: &gguf::Value) -> Result<gguf::Value, WriteError> {
    let key = key.strip_prefix("tokenizer.ggml.").unwrap_or("");
    let mut value = value.clone();
    let found = match (key, &mut value) {
        ("tokens", gguf::Value::Texts(all)) => {
            let found = all.len();
            all.extend((found..vocab).map(|i| format!("[PAD{i}]")));
            found
        }
        ("token_type", gguf::Value::Numbers(_, all)) => {
            let found = all.len();
            all.resize(vocab.max(found), super::gguf_tokenizer::UNUSED);
            found
        }
        ("scores", gguf::Value::Numbers(_, all)) => {
            let found = all.len();
            all.resize(vocab.max(found), 0.0);
            found
        }
        _ => vocab,
    };
    if found > vocab {
        let expected = format!("at most the model's {vocab}");
        return Err(WriteError::unfit("tokens of the tokenizer", expected, found.to_string()));
    }
    Ok(value)
}

/// By which blocks without a window repeat; none where they do not.
fn period(d: &Dims) -> Option<usize> {
    // Without any, the period is longer than the model.
    let first = (0..d.layers).find(|k| !d.sliding.has(*k)).unwrap_or(d.layers.max(PERIOD - 1));
    let period = first + 1;
    (0..d.layers).all(|k| d.sliding.has(k) != (k + 1).is_multiple_of(period)).then_some(period)
}

/// The name of the architecture, where llama.cpp computes what the model computes.
fn check(config: &LlamaConfig) -> Result<&'static str, WriteError> {
    let (d, kind) = (&config.dims, config.kind);
    let architecture = match kind {
        Kind::Mistral => "llama",
        kind => ARCHITECTURES.iter().find(|(_, k)| *k == kind).map_or("llama", |(name, _)| name),
    };
    let gemma = kind == Kind::Gemma3;
    let unfit = |what: &str, expected: &str, found: String| {
        Err(WriteError::unfit(what, format!("{expected} in a file of {architecture}"), found))
    };
    if kind == Kind::Qwen2 && d.heads * d.head_dim != d.width {
        let expected = format!("the model's, {},", d.width);
        return unfit("the width of all heads", &expected, (d.heads * d.head_dim).to_string());
    }
    if let Some(window) = d.window.filter(|_| !gemma) {
        let expected = "none (for texts up to the window the model is the same without it: \
                        sliding_window null, max_position_embeddings no more than that)";
        return unfit("the sliding window", expected, window.to_string());
    }
    if d.window.is_some() && period(d).is_none() {
        let expected = "one block without a window after every n with it";
        return unfit("the blocks with a window", expected, "another order".into());
    }
    let gate = if gemma { Gate::Gelu(Gelu::Tanh) } else { Gate::Silu };
    if d.gate != gate {
        return unfit("the function of the gate", &format!("{gate:?}"), format!("{:?}", d.gate));
    }
    let biases = match kind {
        Kind::Llama | Kind::Mistral => [true; 3],
        Kind::Qwen2 => [true, false, false],
        Kind::Qwen3 | Kind::SmolLm3 | Kind::Gemma3 => [false; 3],
    };
    let names = ["queries, keys and values", "the output of attention", "the MLP"];
    for ((has, may), name) in d.biases.iter().zip(biases).zip(names) {
        if *has && !may {
            return unfit(&format!("biases of {name}"), "none", "some".into());
        }
    }
    let unrotated = |k: usize| kind == Kind::SmolLm3 && (k + 1).is_multiple_of(UNROTATED);
    if let Some(k) = (0..d.layers).find(|k| d.unrotated.has(*k) != unrotated(*k)) {
        let expected = "every fourth of SmolLM3's and no other";
        return unfit("blocks without positions", expected, format!("another at block {k}"));
    }
    let scaled = matches!(d.angles[0].scaling, RotaryScaling::Llama3 { .. });
    if scaled && architecture != "llama" {
        return unfit("the scaling of positions", "none or \"linear\"", "\"llama3\"".into());
    }
    if d.window.is_some() && d.angles[1].scaling != RotaryScaling::None {
        let found = format!("{:?}", d.angles[1].scaling);
        return unfit("the scaling of positions in blocks with a window", "none", found);
    }
    if gemma && d.layers == 62 && d.width != d.heads * d.head_dim {
        let expected = "less than 62, with which scores have another factor";
        return unfit("the number of blocks", expected, "62".into());
    }
    Ok(architecture)
}
