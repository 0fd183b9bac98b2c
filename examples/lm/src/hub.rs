//! Models by their names on Hugging Face: from its cache on this machine, or downloaded into it
//! (feature `hub`).

use std::path::{Path, PathBuf};

use bdia_models::pretrained::{self, Pretrained};
use bdia_train::{Failure, report};

/// A model that is not there.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The program was built without downloads.
    #[error(
        "--model {model}: this program was built without downloads from Hugging Face (cargo build \
         --features hub), and no such directory exists. Put the files of \
         https://huggingface.co/{model} (config.json, tokenizer.json, *.safetensors) into a \
         directory and name it with --model"
    )]
    Without {
        /// The name.
        model: String,
    },
    /// Neither in the cache nor to be had.
    #[error(
        "--model {model}: {file} is not in the cache ({}) and cannot be downloaded: {why}. \
         Without a network, put the files of https://huggingface.co/{model} (config.json, \
         tokenizer.json, *.safetensors) into a directory and name it with --model",
        cache.display()
    )]
    Absent {
        /// The name.
        model: String,
        /// The file.
        file: String,
        /// Where it was looked for.
        cache: PathBuf,
        /// What the library says.
        why: String,
    },
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Program(Box::new(error))
    }
}

/// Opens a model: a directory, a GGUF file, or a name on Hugging Face. Tells what was noticed.
///
/// # Errors
/// [`Failure`]; of a name that is not there it says which files to put where.
pub fn open(model: &Path) -> Result<Pretrained, Failure> {
    let opened = pretrained::open(&place(model)?)?;
    opened.note.iter().for_each(|note| report::note!("{note}"));
    Ok(opened)
}

/// Opens a model whose weights are not needed.
///
/// # Errors
/// As [`open`].
pub fn open_config(model: &Path) -> Result<Pretrained, Failure> {
    let place = place(model)?;
    Ok(if place.is_dir() { pretrained::open_config(&place) } else { pretrained::open(&place) }?)
}

/// Where a model lies.
fn place(model: &Path) -> Result<PathBuf, Failure> {
    Ok(match model.to_str().filter(|name| is_name(name) && !model.exists()) {
        Some(name) => locate(name)?,
        None => model.into(),
    })
}

/// Whether it may be a name on Hugging Face: `owner/model`.
fn is_name(text: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let is_file = text.ends_with(".gguf") || text.ends_with(".safetensors");
    // Where runs lie, and a model is looked for that nobody has named.
    !is_file
        && !text.starts_with("runs/")
        && text.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

/// What says something of a model's texts.
#[cfg(feature = "hub")]
const BESIDE: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

#[cfg(not(feature = "hub"))]
fn locate(model: &str) -> Result<PathBuf, HubError> {
    Err(HubError::Without { model: model.into() })
}

/// The directory that has a model's files.
#[cfg(feature = "hub")]
fn locate(model: &str) -> Result<PathBuf, HubError> {
    use bdia_models::weights::{FILE, INDEX, read_index};
    use hf_hub::Cache;
    use hf_hub::api::sync::ApiBuilder;

    let cache = Cache::from_env();
    let get = |file: &str| {
        let absent = |why: String| {
            let (cache, file) = (cache.path().clone(), file.to_string());
            HubError::Absent { model: model.into(), file, cache, why }
        };
        match cache.model(model.into()).get(file) {
            Some(path) => Ok(path),
            None => ApiBuilder::from_env()
                .build()
                .and_then(|api| api.model(model.into()).get(file))
                .map_err(|e| absent(e.to_string())),
        }
    };
    let config = get("config.json")?;
    // Of a large model there are parts and their index.
    if let Err(absent) = get(FILE) {
        let Ok(index) = get(INDEX) else { return Err(absent) };
        let bytes = std::fs::read(&index).unwrap_or_default();
        let parts = read_index(&index, &bytes).unwrap_or_default();
        let parts: std::collections::BTreeSet<_> = parts.into_values().collect();
        parts.iter().try_for_each(|part| get(part).map(drop))?;
    }
    // Which of them there are depends on the model.
    for file in BESIDE {
        let _ = get(file);
    }
    Ok(config.parent().map(PathBuf::from).unwrap_or_default())
}
