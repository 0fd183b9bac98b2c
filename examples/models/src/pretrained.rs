//! A language model as its owner has it: a directory in Hugging Face's layout, or a GGUF file.
//!
//! `config.json`, or the metadata of the file, decides the family; the tokenizer is the model's
//! own.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use bdia_core::Packing;
use bdia_core::backend::Backend;
use serde_json::{Map, Value};

use crate::config::{ConfigError, FILE, LIMIT};
use crate::files::read_limited;
use crate::gguf;
use crate::gpt2::config::Gpt2Config;
use crate::language::model::LanguageModel;
use crate::language::{Config as _, Family, files};
use crate::llama::config::{Kind, LlamaConfig};
use crate::llama::gguf as llama_gguf;
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::weights::{Source, Weights, WeightsError};

/// A configuration of any family.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a program has one")]
pub enum AnyConfig {
    /// GPT-2.
    Gpt2(Gpt2Config),
    /// Llama and its relatives.
    Llama(LlamaConfig),
}

/// Does the same for a configuration of any family: `for_family!(config, c => …)`.
#[macro_export]
macro_rules! for_family {
    ($config:expr, $c:ident => $body:expr) => {
        match $config {
            $crate::pretrained::AnyConfig::Gpt2($c) => $body,
            $crate::pretrained::AnyConfig::Llama($c) => $body,
        }
    };
}

/// A model that is not trained from scratch.
#[derive(Debug, Clone)]
pub struct Pretrained {
    /// Its directory or file.
    pub path: PathBuf,
    /// Its configuration.
    pub config: AnyConfig,
    /// Its tokenizer; none where it brings none along.
    pub tokenizer: Option<Tokenizer>,
    /// Whether the tokenizer is the one that such a model has without any file of one.
    pub implied: bool,
    /// What was noticed.
    pub note: Option<String>,
}

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum PretrainedError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Its tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A file that has no model.
    #[error(
        "{}: expected a directory in Hugging Face's layout (config.json, *.safetensors) or a GGUF \
         file, found another file",
        .0.display()
    )]
    Neither(PathBuf),
    /// A tokenizer with tokens that the model does not have.
    #[error(
        "{}: the tokenizer has {found} tokens, the model only {expected}; put the model's own \
         tokenizer there",
        path.display()
    )]
    Vocabulary {
        /// The model.
        path: PathBuf,
        /// Size of the model's vocabulary.
        expected: usize,
        /// The tokenizer's.
        found: usize,
    },
}

impl AnyConfig {
    /// Reads the text of a `config.json`; a file without `model_type` is taken for GPT-2's.
    ///
    /// # Errors
    /// [`ConfigError`]; of an unknown family it names the known ones.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        let what = "not valid JSON, expected Hugging Face's config.json";
        let map: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| ConfigError::Json { what, error })?;
        match map.get("model_type").and_then(Value::as_str) {
            None | Some("gpt2") => Gpt2Config::from_json(bytes).map(Self::Gpt2),
            Some(name) if Kind::of(name).is_some() => {
                LlamaConfig::from_json(bytes).map(Self::Llama)
            }
            Some(other) => {
                let known: Vec<_> = Kind::ALL.iter().map(|(_, name)| format!("{name:?}")).collect();
                Err(ConfigError::Field {
                    field: "model_type",
                    expected: format!("\"gpt2\", {}", known.join(", ")),
                    found: other.chars().take(60).collect(),
                })
            }
        }
    }

    /// Reads `config.json` of a directory.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn read_dir(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        Self::from_json(&read_limited(&path, LIMIT)?).map_err(|e| e.of(path))
    }

    /// Size of the vocabulary.
    pub fn vocab(&self) -> usize {
        for_family!(self, c => c.dims().vocab())
    }

    /// The longest context.
    pub fn positions(&self) -> usize {
        for_family!(self, c => c.dims().positions())
    }
}

/// Whether a path is that of a file with a model, not of a directory.
fn is_file(path: &Path) -> bool {
    path.is_file() || path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// Opens a model: all but its weights is read.
///
/// # Errors
/// [`PretrainedError`]
pub fn open(path: &Path) -> Result<Pretrained, PretrainedError> {
    if is_file(path) {
        let mut magic = [0; gguf::MAGIC.len()];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
        if path.is_file() && (read.is_err() || magic != gguf::MAGIC) {
            return Err(PretrainedError::Neither(path.into()));
        }
        let (config, model) = llama_gguf::open(path)?;
        let header = model.header();
        let has_tokens = header.metadata.contains_key("tokenizer.ggml.tokens");
        let tokenizer = has_tokens.then(|| Tokenizer::of_gguf(header)).transpose()?;
        let count = |key: &str| header.count(key).and_then(|n| u32::try_from(n).ok());
        let keys = ["eot", "eom"].map(|name| format!("tokenizer.ggml.{name}_token_id"));
        let ends = keys.iter().filter_map(|key| count(key)).collect();
        let config = AnyConfig::Llama(config);
        let mut opened =
            Pretrained { path: path.into(), config, tokenizer, implied: false, note: None };
        opened.check(ends)?;
        return Ok(opened);
    }
    let mut opened = open_config(path)?;
    let (tied, embedding) = for_family!(&opened.config, c => {
        let d = c.dims();
        let [embedding, ..] = d.ends();
        (d.tied(), d.name(None, &embedding))
    });
    if tied && !Weights::read_dir(path)?.is_tied(&embedding)? {
        opened.note = Some(format!(
            "{}: lm_head.weight differs from {embedding}: they are not tied, whatever config.json \
             says",
            path.display()
        ));
        match &mut opened.config {
            AnyConfig::Gpt2(c) => c.tie_word_embeddings = false,
            AnyConfig::Llama(c) => c.untie(),
        }
    }
    Ok(opened)
}

/// Opens the directory of a model that may have no weights yet.
///
/// # Errors
/// [`PretrainedError`]
pub fn open_config(dir: &Path) -> Result<Pretrained, PretrainedError> {
    let config = AnyConfig::read_dir(dir)?;
    let own = Tokenizer::open(dir)?;
    let mut opened =
        Pretrained { path: dir.into(), config, tokenizer: own, implied: false, note: None };
    opened.check(generation_ends(dir)?)?;
    // Directories of GPT-2 without files of a tokenizer mean its own.
    if opened.tokenizer.is_none() && matches!(opened.config, AnyConfig::Gpt2(_)) {
        (opened.tokenizer, opened.implied) = (Some(Tokenizer::gpt2()), true);
    }
    Ok(opened)
}

/// The tokens that end a text, as `generation_config.json` has them.
fn generation_ends(dir: &Path) -> Result<Vec<u32>, PretrainedError> {
    let path = dir.join("generation_config.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let bytes = read_limited(&path, LIMIT).map_err(ConfigError::from)?;
    let what = "not valid JSON, expected Hugging Face's generation_config.json";
    let map: Map<String, Value> = serde_json::from_slice(&bytes)
        .map_err(|error| ConfigError::Json { what, error }.of(&path))?;
    let token = |v: &Value| v.as_u64().and_then(|t| u32::try_from(t).ok());
    Ok(match map.get("eos_token_id") {
        Some(Value::Array(all)) => all.iter().filter_map(token).collect(),
        one => one.and_then(token).into_iter().collect(),
    })
}

impl Pretrained {
    /// Checks the tokenizer against the vocabulary, and tells the configuration of all `ends` of a
    /// text that its neighbours name.
    fn check(&mut self, ends: Vec<u32>) -> Result<(), PretrainedError> {
        let expected = self.config.vocab();
        if let Some(t) = self.tokenizer.as_ref().filter(|t| !fits(t, expected)) {
            let (path, found) = (self.path.clone(), t.vocab());
            return Err(PretrainedError::Vocabulary { path, expected, found });
        }
        if let AnyConfig::Llama(config) = &mut self.config {
            let own = self.tokenizer.as_ref().and_then(Tokenizer::eos);
            config.add_ends(own.into_iter().chain(ends));
        }
        Ok(())
    }
}

/// Whether a model of `vocab` tokens has those of a tokenizer. Special tokens beyond the end are
/// never shown to it: Gemma's tokenizer has one for images, which its models of text have not.
pub fn fits(tokenizer: &Tokenizer, vocab: usize) -> bool {
    let beyond = vocab..tokenizer.vocab();
    beyond.len() <= 256 && beyond.into_iter().all(|t| tokenizer.is_special(t as u32))
}

/// Reads a model's weights, wherever they are; gives a digest of what was read ([`files::load`]).
///
/// # Errors
/// As [`files::load`].
pub fn load<B: Backend<Real = f32>, F: Family>(
    path: &Path,
    be: &mut B,
    model: &LanguageModel<F>,
) -> Result<String, WeightsError> {
    files::read(&*source(path, &model.setup().dims)?, be, model)
}

/// A model's weights, wherever they are.
///
/// # Errors
/// Files that cannot be read, or are none of weights.
pub fn source<F: Family>(path: &Path, dims: &F) -> Result<Box<dyn Source>, WeightsError> {
    if !is_file(path) {
        return Ok(Box::new(files::open(path, dims)?));
    }
    let opened = llama_gguf::open(path)
        .map_err(|e| WeightsError::Gguf { path: path.into(), what: e.to_string() })?;
    Ok(Box::new(opened.1))
}

/// Whether a model's file has its matrices in fewer bits than 32.
///
/// # Errors
/// As [`source`].
pub fn is_narrow<F: Family>(path: &Path, dims: &F) -> Result<bool, WeightsError> {
    let weights = source(path, dims)?;
    let [embedding, ..] = dims.ends();
    let extent = weights.extent(&dims.name(None, &embedding));
    Ok(extent.is_some_and(|extent| extent.packing != Packing::F32))
}
