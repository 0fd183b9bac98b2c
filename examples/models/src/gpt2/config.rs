//! `config.json` in Hugging Face's GPT-2 layout.

use std::path::Path;

use bdia_core::backend::Gelu;
use serde_json::{Value, json};

use super::model::Dims;
use crate::config::{ConfigError, FILE, LIMIT, Training, count, field};
use crate::files::read_limited;
use crate::language;
use crate::tokenizer::{EOT, VOCAB};

/// The GELU of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// The tanh approximation, `gelu_new`: GPT-2's own.
    GeluNew,
    /// The exact one, `gelu`.
    Gelu,
}

/// The named sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// 6 layers, 4 heads, width 128, context 128: trains in minutes on two cores.
    Mini,
    /// 12 layers, 12 heads, width 768 (124M parameters).
    Gpt2,
    /// 24 layers, 16 heads, width 1024 (355M).
    Medium,
    /// 36 layers, 20 heads, width 1280 (774M).
    Large,
    /// 48 layers, 25 heads, width 1600 (1.5B).
    Xl,
}

/// A GPT-2's architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpt2Config {
    /// Tokens.
    pub vocab_size: usize,
    /// Learned positions.
    pub n_positions: usize,
    /// Width.
    pub n_embd: usize,
    /// Blocks.
    pub n_layer: usize,
    /// Attention heads.
    pub n_head: usize,
    /// Width of the MLP's inner layer; `None` for four times the width.
    pub n_inner: Option<usize>,
    /// The GELU.
    pub activation_function: Activation,
    /// ε of the layer norms.
    pub layer_norm_epsilon: f64,
    /// Dropout of the residual branches.
    pub resid_pdrop: f64,
    /// Dropout of the embedding.
    pub embd_pdrop: f64,
    /// Dropout of attention probabilities.
    pub attn_pdrop: f64,
    /// The head uses the embedding's matrix.
    pub tie_word_embeddings: bool,
    /// The token at a document's start, if there is one.
    pub bos_token_id: Option<u32>,
    /// The token at a document's end, if there is one.
    pub eos_token_id: Option<u32>,
    /// How it was trained, if by this program.
    pub bdia: Option<Training>,
}

/// Block indices have 16 bits in the random numbers' counter.
const MOST_LAYERS: usize = 65_000;
const MOST: usize = 1 << 31;

impl Gpt2Config {
    /// A named size with GPT-2's vocabulary, no dropout, and a tied head.
    pub fn preset(size: Size) -> Self {
        let (n_layer, n_head, n_embd, n_positions) = match size {
            Size::Mini => (6, 4, 128, 128),
            Size::Gpt2 => (12, 12, 768, 1024),
            Size::Medium => (24, 16, 1024, 1024),
            Size::Large => (36, 20, 1280, 1024),
            Size::Xl => (48, 25, 1600, 1024),
        };
        let eot = Some(EOT);
        Self {
            vocab_size: VOCAB,
            n_positions,
            n_embd,
            n_layer,
            n_head,
            n_inner: None,
            activation_function: Activation::GeluNew,
            layer_norm_epsilon: 1e-5,
            resid_pdrop: 0.0,
            embd_pdrop: 0.0,
            attn_pdrop: 0.0,
            tie_word_embeddings: true,
            bos_token_id: eot,
            eos_token_id: eot,
            bdia: None,
        }
    }

    /// A model of these sizes (vocabulary, positions, width, heads, layers), for the rest as
    /// GPT-2.
    pub fn new([vocab, positions, width, heads, layers]: [usize; 5]) -> Self {
        let mut config = Self::preset(Size::Gpt2);
        (config.n_positions, config.n_embd) = (positions, width);
        (config.n_head, config.n_layer) = (heads, layers);
        config.set_vocab(vocab);
        config
    }

    /// Another vocabulary; the end-of-text token goes where it does not contain it.
    pub fn set_vocab(&mut self, vocab: usize) {
        self.vocab_size = vocab;
        for id in [&mut self.bos_token_id, &mut self.eos_token_id] {
            *id = id.filter(|&t| (t as usize) < vocab);
        }
    }

    /// Width of the MLP's inner layer.
    pub fn inner(&self) -> usize {
        self.n_inner.unwrap_or(self.n_embd.saturating_mul(4))
    }

    /// What the network is laid out from.
    pub fn dims(&self) -> Dims {
        Dims {
            vocab: self.vocab_size,
            positions: self.n_positions,
            width: self.n_embd,
            layers: self.n_layer,
            heads: self.n_head,
            inner: self.inner(),
            eps: self.layer_norm_epsilon,
            gelu: match self.activation_function {
                Activation::GeluNew => Gelu::Tanh,
                Activation::Gelu => Gelu::Exact,
            },
            tied: self.tie_word_embeddings,
            dropout: [self.embd_pdrop, self.attn_pdrop, self.resid_pdrop],
        }
    }

    /// Every tensor of the model with its shape, in the order in which Hugging Face has them,
    /// without the prefix `transformer.`. `Conv1D` weights are `[in, out]`.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, f) = (self.n_embd, self.inner());
        let mut all = vec![
            ("wte.weight".to_string(), vec![self.vocab_size, d]),
            ("wpe.weight".into(), vec![self.n_positions, d]),
        ];
        for k in 0..self.n_layer {
            let mut put =
                |name: &str, shape: &[usize]| all.push((format!("h.{k}.{name}"), shape.to_vec()));
            put("ln_1.weight", &[d]);
            put("ln_1.bias", &[d]);
            put("attn.c_attn.weight", &[d, 3 * d]);
            put("attn.c_attn.bias", &[3 * d]);
            put("attn.c_proj.weight", &[d, d]);
            put("attn.c_proj.bias", &[d]);
            put("ln_2.weight", &[d]);
            put("ln_2.bias", &[d]);
            put("mlp.c_fc.weight", &[d, f]);
            put("mlp.c_fc.bias", &[f]);
            put("mlp.c_proj.weight", &[f, d]);
            put("mlp.c_proj.bias", &[d]);
        }
        all.push(("ln_f.weight".into(), vec![d]));
        all.push(("ln_f.bias".into(), vec![d]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".into(), vec![self.vocab_size, d]));
        }
        all
    }

    /// Numbers of the model, where that fits.
    pub fn parameters(&self) -> Option<usize> {
        let (d, f) = (self.n_embd, self.inner());
        // 4d² + 4d of attention, 2df + f + d of the MLP, 4d of the norms.
        let attention = d.checked_mul(d)?.checked_mul(4)?.checked_add(d.checked_mul(4)?)?;
        let mlp = d.checked_mul(f)?.checked_mul(2)?.checked_add(f)?.checked_add(d)?;
        let block = attention.checked_add(mlp)?.checked_add(d.checked_mul(4)?)?;
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        let rows =
            self.vocab_size.checked_mul(heads)?.checked_add(self.n_positions)?.checked_add(2)?;
        block.checked_mul(self.n_layer)?.checked_add(rows.checked_mul(d)?)
    }

    /// Whether the dimensions fit together.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn check(&self) -> Result<(), ConfigError> {
        for (name, value, most) in [
            ("vocab_size", self.vocab_size, MOST),
            ("n_positions", self.n_positions, MOST),
            ("n_embd", self.n_embd, MOST),
            ("n_layer", self.n_layer, MOST_LAYERS),
            ("n_head", self.n_head, MOST),
            ("n_inner", self.inner(), MOST),
        ] {
            if !(1..=most).contains(&value) {
                let expected = format!("a whole number from 1 to {most}");
                return Err(ConfigError::Field { field: name, expected, found: value.to_string() });
            }
        }
        if !self.n_embd.is_multiple_of(self.n_head) {
            let expected = format!("a divisor of n_embd, which is {}", self.n_embd);
            return Err(ConfigError::Field {
                field: "n_head",
                expected,
                found: self.n_head.to_string(),
            });
        }
        // Parameters, gradients and two moments in f32, and room for the rest.
        let fits = self
            .parameters()
            .and_then(|p| p.checked_mul(32))
            .is_some_and(|b| isize::try_from(b).is_ok());
        if fits {
            Ok(())
        } else {
            Err(ConfigError::TooLarge {
                vocab: self.vocab_size,
                positions: self.n_positions,
                width: self.n_embd,
                layers: self.n_layer,
            })
        }
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| {
            let what = "not valid JSON, expected Hugging Face's config.json of a GPT-2";
            ConfigError::Json { what, error }
        })?;
        let Value::Object(map) = value else {
            let found = value.to_string().chars().take(60).collect();
            return Err(ConfigError::Field {
                field: "config.json",
                expected: "a JSON object".into(),
                found,
            });
        };
        let model = field(&map, "model_type", "\"gpt2\"", Some("gpt2".to_string()), |v| {
            v.as_str().map(str::to_owned)
        })?;
        if model != "gpt2" {
            let found = model.chars().take(60).collect();
            return Err(ConfigError::Field {
                field: "model_type",
                expected: "\"gpt2\"".into(),
                found,
            });
        }
        // What would change the result and is not implemented must not be passed over.
        for (name, only) in [
            ("scale_attn_weights", true),
            ("scale_attn_by_inverse_layer_idx", false),
            ("add_cross_attention", false),
        ] {
            let expected = format!("{only}, the only value that is implemented");
            field(&map, name, &expected, Some(()), |v| (v.as_bool() == Some(only)).then_some(()))?;
        }
        let size = |name, most| {
            field(&map, name, &format!("a whole number from 1 to {most}"), None, |v| count(v, most))
        };
        let part = |name| {
            let fits = |v: &Value| v.as_f64().filter(|p| (0.0..1.0).contains(p));
            field(&map, name, "a number from 0 to below 1", Some(0.1), fits)
        };
        let vocab_size = size("vocab_size", MOST)?;
        // Ids outside the vocabulary are Hugging Face's defaults beside a small vocabulary: the
        // model has no such token.
        let token = |name| {
            field(&map, name, "a whole number or null", Some(None), |v| match v {
                Value::Null => Some(None),
                Value::Array(several) => several.first().and_then(Value::as_u64).map(Some),
                v => v.as_u64().map(Some),
            })
            .map(|id| id.and_then(|t| u32::try_from(t).ok()).filter(|&t| (t as usize) < vocab_size))
        };
        let config = Self {
            vocab_size,
            n_positions: size("n_positions", MOST)?,
            n_embd: size("n_embd", MOST)?,
            n_layer: size("n_layer", MOST_LAYERS)?,
            n_head: size("n_head", MOST)?,
            n_inner: field(&map, "n_inner", "a whole number above 0, or null", Some(None), |v| {
                match v {
                    Value::Null => Some(None),
                    v => count(v, MOST).map(Some),
                }
            })?,
            activation_function: field(
                &map,
                "activation_function",
                "\"gelu_new\" or \"gelu\"",
                Some(Activation::GeluNew),
                |v| match v.as_str()? {
                    "gelu_new" | "gelu_pytorch_tanh" => Some(Activation::GeluNew),
                    "gelu" => Some(Activation::Gelu),
                    _ => None,
                },
            )?,
            layer_norm_epsilon: field(
                &map,
                "layer_norm_epsilon",
                "a number above 0 and below 1",
                Some(1e-5),
                |v| v.as_f64().filter(|e| *e > 0.0 && *e < 1.0),
            )?,
            resid_pdrop: part("resid_pdrop")?,
            embd_pdrop: part("embd_pdrop")?,
            attn_pdrop: part("attn_pdrop")?,
            tie_word_embeddings: field(
                &map,
                "tie_word_embeddings",
                "true or false",
                Some(true),
                Value::as_bool,
            )?,
            bos_token_id: token("bos_token_id")?,
            eos_token_id: token("eos_token_id")?,
            bdia: field(
                &map,
                "bdia",
                "what this program writes there, or nothing",
                Some(None),
                |v| {
                    let bdia: Training = serde_json::from_value(v.clone()).ok()?;
                    let fits = (0.0..=1.0).contains(&bdia.gamma)
                        && bdia.frac_bits <= bdia_core::Grid::MAX_FRAC_BITS
                        && bdia.planes.is_none_or(|m| m <= bdia_core::Gamma::MAX_PLANES);
                    fits.then_some(Some(bdia))
                },
            )?,
        };
        config.check()?;
        Ok(config)
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

impl language::Config for Gpt2Config {
    type Dims = Dims;

    fn dims(&self) -> Dims {
        self.dims()
    }

    fn ends(&self) -> Vec<u32> {
        self.eos_token_id.into_iter().collect()
    }

    fn training(&self) -> Option<Training> {
        self.bdia
    }

    fn set_training(&mut self, training: Training) {
        self.bdia = Some(training);
    }

    fn set_dropout(&mut self, p: f64) {
        (self.resid_pdrop, self.embd_pdrop, self.attn_pdrop) = (p, p, p);
    }

    fn to_json(&self) -> String {
        let mut map = json!({
            "activation_function": match self.activation_function {
                Activation::GeluNew => "gelu_new",
                Activation::Gelu => "gelu",
            },
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": self.attn_pdrop,
            "bos_token_id": self.bos_token_id,
            "dtype": "float32",
            "embd_pdrop": self.embd_pdrop,
            "eos_token_id": self.eos_token_id,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "model_type": "gpt2",
            "n_embd": self.n_embd,
            "n_head": self.n_head,
            "n_inner": self.n_inner,
            "n_layer": self.n_layer,
            "n_positions": self.n_positions,
            "resid_pdrop": self.resid_pdrop,
            "scale_attn_weights": true,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        });
        if let (Value::Object(map), Some(bdia)) = (&mut map, &self.bdia) {
            map.insert("bdia".into(), json!(bdia));
        }
        format!("{map:#}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{GammaSign, Mode};
    use crate::files::FileError;
    use crate::files::testing::TempDir;
    use crate::language::Config as _;

    #[test]
    fn sizes_have_the_published_numbers_of_parameters() {
        for (size, parameters) in [
            (Size::Gpt2, 124_439_808),
            (Size::Medium, 354_823_168),
            (Size::Large, 774_030_080),
            (Size::Xl, 1_557_611_200),
        ] {
            let c = Gpt2Config::preset(size);
            c.check().unwrap();
            assert_eq!(c.parameters(), Some(parameters));
            let sum: usize = c.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
            assert_eq!(sum, parameters);
        }
        let untied = Gpt2Config { tie_word_embeddings: false, ..Gpt2Config::preset(Size::Mini) };
        let sum: usize = untied.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        assert_eq!(untied.parameters(), Some(sum));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = TempDir::new();
        let mut c = Gpt2Config::preset(Size::Mini);
        c.set_vocab(61);
        assert_eq!(c.bos_token_id, None);
        c.set_dropout(0.1);
        c.n_inner = Some(100);
        c.activation_function = Activation::Gelu;
        c.bdia = Some(Training {
            gamma: 0.25,
            gamma_sign: GammaSign::Minus,
            frac_bits: 9,
            mode: Mode::BdiaFloat,
            planes: Some(2),
        });
        c.write_dir(dir.path()).unwrap();
        assert_eq!(Gpt2Config::read_dir(dir.path()).unwrap(), c);
    }

    #[test]
    fn hugging_face_files() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gpt2");
        let tied = Gpt2Config::read_dir(&data.join("hf_tied")).unwrap();
        assert_eq!((tied.n_layer, tied.n_head, tied.n_embd, tied.vocab_size), (3, 3, 24, 61));
        assert!(
            tied.tie_word_embeddings && tied.n_inner.is_none() && tied.eos_token_id == Some(60)
        );
        assert!(!Gpt2Config::read_dir(&data.join("hf_untied")).unwrap().tie_word_embeddings);
    }

    #[test]
    fn unusable_files_are_explained() {
        let good: Value = serde_json::from_str(&Gpt2Config::preset(Size::Mini).to_json()).unwrap();
        for (name, value, message) in [
            ("n_embd", json!(0), "n_embd: expected a whole number from 1"),
            ("n_embd", json!(-4), "found -4"),
            ("n_embd", json!(1e300), "n_embd"),
            ("n_embd", json!("128"), "found \"128\""),
            ("n_head", json!(5), "a divisor of n_embd"),
            ("n_layer", json!(1_000_000), "n_layer"),
            ("n_inner", json!(0), "n_inner"),
            ("vocab_size", json!(u64::MAX), "vocab_size"),
            ("vocab_size", Value::Null, "found null"),
            ("activation_function", json!("relu"), "gelu_new"),
            ("layer_norm_epsilon", json!(0.0), "layer_norm_epsilon"),
            ("attn_pdrop", json!(1.5), "attn_pdrop"),
            ("model_type", json!("llama"), "\"gpt2\""),
            ("scale_attn_weights", json!(false), "implemented"),
            ("bos_token_id", json!("a"), "bos_token_id"),
            ("bdia", json!({"gamma": 3}), "bdia"),
        ] {
            let mut bad = good.clone();
            bad[name] = value;
            let error = Gpt2Config::from_json(bad.to_string().as_bytes()).unwrap_err().to_string();
            assert!(error.contains(message), "{name}: {error}");
        }
        let mut huge = good.clone();
        huge["n_embd"] = json!(1_u64 << 29);
        huge["n_layer"] = json!(64_000);
        assert!(matches!(
            Gpt2Config::from_json(huge.to_string().as_bytes()),
            Err(ConfigError::TooLarge { .. })
        ));
        let mut foreign = good;
        foreign["bos_token_id"] = json!(99_999);
        assert_eq!(
            Gpt2Config::from_json(foreign.to_string().as_bytes()).unwrap().bos_token_id,
            None
        );
        for bytes in [&b""[..], b"[1]", b"{", b"\xff\xfe", b"{}", "[".repeat(100_000).as_bytes()] {
            assert!(Gpt2Config::from_json(bytes).is_err());
        }
        let dir = TempDir::new();
        assert!(Gpt2Config::read_dir(dir.path()).unwrap_err().to_string().contains("config.json"));
        dir.file("config.json", &vec![b' '; 2 << 20]);
        assert!(matches!(
            Gpt2Config::read_dir(dir.path()),
            Err(ConfigError::File(FileError::TooLarge { .. }))
        ));
    }
}
