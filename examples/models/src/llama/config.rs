//! `config.json` in Hugging Face's layout of Llama, Mistral, Qwen 2 and 3, SmolLM3 and Gemma 3.

use std::path::Path;

use bdia_core::backend::{Gate, Gelu};
use bdia_core::layers::{BlockSet, RotaryAngles, RotaryScaling};
use serde_json::{Map, Value, json};

use super::model::Dims;
use crate::config::{ConfigError, FILE, LIMIT, Training, count, field};
use crate::files::read_limited;
use crate::language;

/// The named sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// 8 layers, 4 heads, 2 of keys and values, width 128, context 128: trains in minutes on two
    /// cores.
    Mini,
    /// SmolLM2-135M's: 30 layers, 9 heads, 3 of keys and values, width 576.
    Of135m,
}

impl Size {
    /// Width, heads, heads of keys and values, layers, positions.
    pub const fn sizes(self) -> [usize; 5] {
        match self {
            Self::Mini => [128, 4, 2, 8, 128],
            Self::Of135m => [576, 9, 3, 30, 8192],
        }
    }
}

/// The usual inner width of an MLP: 8/3 of the width, up to the next multiple of 64.
pub const fn inner(width: usize) -> usize {
    width.saturating_mul(8).div_ceil(3).next_multiple_of(64)
}

/// The members of the family, by the `model_type` of their files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3.
    Qwen3,
    /// SmolLM3.
    SmolLm3,
    /// Gemma 3, its language model.
    Gemma3,
}

impl Kind {
    /// Kind and `model_type`.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Llama, "llama"),
        (Self::Mistral, "mistral"),
        (Self::Qwen2, "qwen2"),
        (Self::Qwen3, "qwen3"),
        (Self::SmolLm3, "smollm3"),
        (Self::Gemma3, "gemma3_text"),
    ];

    /// The `model_type`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }

    /// That of a `model_type`.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(kind, _)| *kind)
    }
}

/// A configuration: the dimensions, and what the file says besides.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Which member of the family.
    pub kind: Kind,
    /// What the network is laid out from.
    pub dims: Dims,
    /// The token at a text's start, if there is one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// How it was trained, if by these programs.
    pub bdia: Option<Training>,
    /// The file as it was read, whose other fields stay as they are.
    pub file: Map<String, Value>,
}

const MOST: usize = 1 << 31;
/// Block indices have 16 bits in the random numbers' counter.
const MOST_LAYERS: usize = 65_000;

/// A file being read.
struct Reader<'a> {
    map: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn size(&self, name: &'static str, default: Option<usize>) -> Result<usize, ConfigError> {
        let most = if name == "num_hidden_layers" { MOST_LAYERS } else { MOST };
        let expected = format!("a whole number from 1 to {most}");
        field(self.map, name, &expected, default, |v| count(v, most))
    }

    /// A size that may be absent or `null`.
    fn optional(&self, name: &'static str) -> Result<Option<usize>, ConfigError> {
        field(self.map, name, "a whole number above 0, or null", Some(None), |v| match v {
            Value::Null => Some(None),
            v => count(v, MOST).map(Some),
        })
    }

    fn number(&self, name: &'static str, default: f64) -> Result<f64, ConfigError> {
        let fits = |v: &Value| v.as_f64().filter(|x| *x > 0.0 && x.is_finite());
        field(self.map, name, "a number above 0", Some(default), fits)
    }

    fn flag(&self, name: &'static str, default: bool) -> Result<bool, ConfigError> {
        field(self.map, name, "true or false", Some(default), Value::as_bool)
    }

    /// What would change the result and is not implemented must not be passed over.
    fn only(
        &self,
        name: &'static str,
        expected: &str,
        fits: impl Fn(&Value) -> bool,
    ) -> Result<(), ConfigError> {
        field(self.map, name, expected, Some(()), |v| fits(v).then_some(()))
    }
}

/// θ and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`.
fn angles(
    head_dim: usize,
    theta: f64,
    scaling: Option<&Value>,
) -> Result<RotaryAngles, ConfigError> {
    let none = RotaryAngles { head_dim, theta, scaling: RotaryScaling::None };
    let map = match scaling {
        None | Some(Value::Null) => return Ok(none),
        Some(Value::Object(map)) => map,
        Some(other) => {
            return Err(ConfigError::Field {
                field: "rope_scaling",
                expected: "an object or null".into(),
                found: other.to_string().chars().take(60).collect(),
            });
        }
    };
    let reader = Reader { map };
    let theta = reader.number("rope_theta", theta)?;
    let name = if map.contains_key("rope_type") { "rope_type" } else { "type" };
    let kind =
        field(map, name, "a text", Some(None), |v| v.as_str().map(|kind| Some(kind.to_string())))?;
    if kind.is_none() && map.contains_key("factor") {
        let (expected, found) = ("the kind of the scaling".into(), "nothing".into());
        return Err(ConfigError::Field { field: "rope_type", expected, found });
    }
    let required = |name: &'static str| {
        let fits = |v: &Value| v.as_f64().filter(|x| *x > 0.0 && x.is_finite());
        field(map, name, "a number above 0", None, fits)
    };
    let scaling = match kind.as_deref() {
        None | Some("default") => RotaryScaling::None,
        Some("linear") => RotaryScaling::Linear(required("factor")?),
        Some("llama3") => RotaryScaling::Llama3 {
            factor: required("factor")?,
            low: required("low_freq_factor")?,
            high: required("high_freq_factor")?,
            original: required("original_max_position_embeddings")?,
        },
        Some(other) => {
            return Err(ConfigError::Field {
                field: "rope_type",
                expected: "\"default\", \"linear\" or \"llama3\"".into(),
                found: other.chars().take(60).collect(),
            });
        }
    };
    Ok(RotaryAngles { head_dim, theta, scaling })
}

impl LlamaConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        let what = "not valid JSON, expected Hugging Face's config.json";
        let map: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| ConfigError::Json { what, error })?;
        let names: Vec<_> = Kind::ALL.iter().map(|(_, name)| format!("{name:?}")).collect();
        let kind =
            field(&map, "model_type", &names.join(", "), None, |v| v.as_str().and_then(Kind::of))?;
        let r = Reader { map: &map };
        let (gemma, qwen) = (kind == Kind::Gemma3, matches!(kind, Kind::Qwen2 | Kind::Qwen3));

        let (width, heads) = (r.size("hidden_size", None)?, r.size("num_attention_heads", None)?);
        let layers = r.size("num_hidden_layers", None)?;
        let default = match kind {
            Kind::Qwen3 => 128,
            Kind::Gemma3 => 256,
            _ => width / heads,
        };
        let head_dim = match r.optional("head_dim")? {
            Some(n) => n,
            None => default,
        };
        let kv_heads = r.size("num_key_value_heads", Some(heads))?;
        let theta = match kind {
            Kind::Gemma3 => 1e6,
            Kind::SmolLm3 => 2e6,
            _ => 1e4,
        };
        let theta = r.number("rope_theta", theta)?;

        // Lists that say of every block whether it is of one kind.
        let list = |name, expected: &str, of: &dyn Fn(&Value) -> Option<bool>| {
            let expected = format!("{expected} of each of the {layers} blocks, or null");
            field(&map, name, &expected, Some(None), |v| match v {
                Value::Null => Some(None),
                Value::Array(all) if all.len() == layers => {
                    all.iter().map(of).collect::<Option<Vec<_>>>().map(Some)
                }
                _ => None,
            })
        };
        let types =
            list("layer_types", "\"full_attention\" or \"sliding_attention\"", &|v| match v
                .as_str()?
            {
                "full_attention" => Some(false),
                "sliding_attention" => Some(true),
                _ => None,
            })?;
        let positions = list("no_rope_layers", "0 or 1", &|v| match v.as_u64()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        })?;
        let mut unrotated = BlockSet::NONE;
        if kind == Kind::SmolLm3 {
            for k in 0..layers {
                // The list says where positions are.
                let without = match &positions {
                    Some(list) => !list[k],
                    None => (k + 1).is_multiple_of(r.size("no_rope_layer_interval", Some(4))?),
                };
                if without {
                    let with = unrotated.with(k);
                    unrotated = with.map_err(|e| ConfigError::Values(e.to_string()))?;
                }
            }
        }

        // Which blocks have a window.
        let window = match r.optional("sliding_window")? {
            // Hugging Face's default.
            None if !map.contains_key("sliding_window") && kind != Kind::SmolLm3 => Some(4096),
            window => window,
        };
        let uses = match kind {
            Kind::Mistral | Kind::Gemma3 => true,
            Kind::Llama => false,
            _ => r.flag("use_sliding_window", false)?,
        };
        let window = window.filter(|_| uses);
        let mut sliding = BlockSet::NONE;
        if window.is_some() {
            for k in 0..layers {
                let slides = match &types {
                    Some(types) => types[k],
                    None if kind == Kind::SmolLm3 => unrotated.has(k),
                    None if gemma => {
                        let every = r.size("sliding_window_pattern", Some(6))?;
                        !(k + 1).is_multiple_of(every)
                    }
                    None if qwen => k >= r.size("max_window_layers", Some(28))?,
                    None => true,
                };
                if slides {
                    sliding = sliding.with(k).map_err(|e| ConfigError::Values(e.to_string()))?;
                }
            }
        }
        let parameters = map.get("rope_parameters").filter(|v| !v.is_null());
        let scaling = parameters.or_else(|| map.get("rope_scaling"));
        let of = |name| scaling.and_then(|s| s.get(name));
        let full = angles(head_dim, theta, of("full_attention").or(scaling))?;
        let local = r.number("rope_local_base_freq", 1e4)?;
        let local = match of("sliding_attention") {
            _ if !gemma => full,
            Some(own) => angles(head_dim, local, Some(own))?,
            None => angles(head_dim, local, None)?,
        };

        let activation = if gemma { "hidden_activation" } else { "hidden_act" };
        let gate = field(
            &map,
            activation,
            "\"silu\", \"gelu\" or \"gelu_pytorch_tanh\"",
            Some(if gemma { Gate::Gelu(Gelu::Tanh) } else { Gate::Silu }),
            |v| match v.as_str()? {
                "silu" => Some(Gate::Silu),
                "gelu_pytorch_tanh" => Some(Gate::Gelu(Gelu::Tanh)),
                "gelu" => Some(Gate::Gelu(Gelu::Exact)),
                _ => None,
            },
        )?;
        let attention_bias = r.flag("attention_bias", false)?;
        let biases = match kind {
            Kind::Llama => [attention_bias, attention_bias, r.flag("mlp_bias", false)?],
            Kind::Mistral => [false; 3],
            Kind::Qwen2 => [true, false, false],
            Kind::Qwen3 | Kind::Gemma3 => [attention_bias, attention_bias, false],
            Kind::SmolLm3 => [attention_bias, attention_bias, r.flag("mlp_bias", false)?],
        };
        for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
            r.only(name, "null, the only value that is implemented", Value::is_null)?;
        }
        for name in ["use_bidirectional_attention", "use_bidirectional_attn"] {
            r.only(name, "false, the only value that is implemented", |v| {
                v.is_null() || v == &json!(false)
            })?;
        }
        let expected = format!("the width of a head, {head_dim}: nothing else is implemented");
        r.only("query_pre_attn_scalar", &expected, |v| {
            v.is_null() || v.as_f64() == Some(head_dim as f64)
        })?;

        let vocab = r.size("vocab_size", None)?;
        let tokens = |name| -> Result<Vec<u32>, ConfigError> {
            let fits = |v: &Value| -> Option<Vec<u64>> {
                match v {
                    Value::Null => Some(Vec::new()),
                    Value::Array(all) => all.iter().map(Value::as_u64).collect(),
                    v => v.as_u64().map(|t| vec![t]),
                }
            };
            let all = field(&map, name, "a token, tokens or null", Some(Vec::new()), fits)?;
            Ok(all.into_iter().filter(|t| *t < vocab as u64).map(|t| t as u32).collect())
        };
        let bdia = field(&map, "bdia", "what these programs write there", Some(None), |v| {
            Some(serde_json::from_value(v.clone()).ok())
        })?;
        let config = Self {
            kind,
            dims: Dims {
                vocab,
                positions: r.size("max_position_embeddings", Some(2048))?,
                width,
                layers,
                heads,
                kv_heads,
                head_dim,
                inner: r.size("intermediate_size", None)?,
                eps: r.number("rms_norm_eps", 1e-6)?,
                norm_offset: if gemma { 1.0 } else { 0.0 },
                gate,
                biases,
                head_norms: matches!(kind, Kind::Qwen3 | Kind::Gemma3),
                post_norms: gemma,
                window,
                sliding,
                unrotated,
                angles: [full, local],
                scaled_embedding: gemma,
                tied: r
                    .flag("tie_word_embeddings", matches!(kind, Kind::Gemma3 | Kind::SmolLm3))?,
                dropout: field(
                    &map,
                    "attention_dropout",
                    "a number from 0 to below 1",
                    Some(0.0),
                    |v| v.as_f64().filter(|p| (0.0..1.0).contains(p)),
                )?,
                sigma: r.number("initializer_range", 0.02)?,
            },
            bos_token_id: tokens("bos_token_id")?.first().copied(),
            eos_token_ids: tokens("eos_token_id")?,
            bdia,
            file: map.clone(),
        };
        config.check()?;
        Ok(config)
    }

    /// A Llama of these sizes (vocabulary, positions, width, heads, heads of keys and values, inner
    /// width, layers) with a tied head.
    ///
    /// # Errors
    /// [`ConfigError`] where they do not fit together.
    pub fn new(sizes: [usize; 7]) -> Result<Self, ConfigError> {
        let d = Dims::plain(sizes);
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": d.vocab,
            "max_position_embeddings": d.positions,
            "hidden_size": d.width,
            "num_attention_heads": d.heads,
            "num_key_value_heads": d.kv_heads,
            "intermediate_size": d.inner,
            "num_hidden_layers": d.layers,
            "hidden_act": "silu",
            "rms_norm_eps": d.eps,
            "rope_theta": d.angles[0].theta,
            "tie_word_embeddings": d.tied,
        });
        Self::from_json(config.to_string().as_bytes())
    }

    /// Further tokens that end a text; those outside the vocabulary are none.
    pub fn add_ends(&mut self, ends: impl IntoIterator<Item = u32>) {
        let before = self.eos_token_ids.len();
        for end in ends.into_iter().filter(|end| (*end as usize) < self.dims.vocab) {
            if !self.eos_token_ids.contains(&end) {
                self.eos_token_ids.push(end);
            }
        }
        if self.eos_token_ids.len() > before {
            let one_or_all = match self.eos_token_ids.as_slice() {
                [one] => json!(one),
                all => json!(all),
            };
            self.file.insert("eos_token_id".into(), one_or_all);
        }
    }

    /// The token that begins a text.
    pub fn set_start(&mut self, start: Option<u32>) {
        self.bos_token_id = start.filter(|t| (*t as usize) < self.dims.vocab);
        self.file.insert("bos_token_id".into(), json!(self.bos_token_id));
    }

    /// The head gets a matrix of its own.
    pub fn untie(&mut self) {
        self.dims.tied = false;
        self.file.insert("tie_word_embeddings".into(), json!(false));
    }

    /// Whether the dimensions fit together.
    fn check(&self) -> Result<(), ConfigError> {
        let d = &self.dims;
        d.block(1).check().map_err(|e| ConfigError::Values(e.to_string()))?;
        // Parameters, gradients and two moments in f32, and room for the rest.
        let block =
            [d.width, d.heads, d.head_dim, 4].iter().try_fold(1_usize, |n, x| n.checked_mul(*x));
        let mlp = [d.width, d.inner, 3].iter().try_fold(1_usize, |n, x| n.checked_mul(*x));
        let all = block.zip(mlp).and_then(|(a, b)| a.checked_add(b)?.checked_mul(d.layers));
        let ends = d.vocab.checked_mul(d.width).and_then(|n| n.checked_mul(2));
        let fits = all
            .zip(ends)
            .and_then(|(a, b)| a.checked_add(b)?.checked_mul(32))
            .is_some_and(|bytes| isize::try_from(bytes).is_ok());
        if fits {
            return Ok(());
        }
        Err(ConfigError::TooLarge {
            vocab: d.vocab,
            positions: d.positions,
            width: d.width,
            layers: d.layers,
        })
    }

    /// Reads `config.json` of a directory.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn read_dir(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        Self::from_json(&read_limited(&path, LIMIT)?).map_err(|e| e.of(path))
    }
}

impl language::Config for LlamaConfig {
    type Dims = Dims;

    fn dims(&self) -> Dims {
        self.dims
    }

    fn ends(&self) -> Vec<u32> {
        self.eos_token_ids.clone()
    }

    fn training(&self) -> Option<Training> {
        self.bdia
    }

    fn set_training(&mut self, training: Training) {
        self.bdia = Some(training);
    }

    fn set_dropout(&mut self, p: f64) {
        self.dims.dropout = p;
    }

    /// The file as it was read, with how the model was trained.
    fn to_json(&self) -> String {
        let mut map = self.file.clone();
        map.insert("model_type".into(), json!(self.kind.name()));
        map.insert("attention_dropout".into(), json!(self.dims.dropout));
        // Weights are written in f32, whatever they were read in.
        map.remove("torch_dtype");
        map.insert("dtype".into(), json!("float32"));
        if let Some(bdia) = &self.bdia {
            map.insert("bdia".into(), json!(bdia));
        }
        format!("{:#}\n", Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written for a plain Llama is read as one.
    #[test]
    fn plain_sizes() {
        let [width, heads, kv_heads, layers, positions] = Size::Of135m.sizes();
        let sizes = [49_152, positions, width, heads, kv_heads, inner(width), layers];
        assert_eq!(LlamaConfig::new(sizes).unwrap().dims, Dims::plain(sizes));
        // SmolLM2-135M's.
        assert_eq!(inner(width), 1536);
        assert!(LlamaConfig::new([64, 8, 16, 0, 0, 32, 1]).is_err());
    }
}
