//! Models by their names on Hugging Face: from its cache on this machine, or downloaded into it
//! (feature `hub`).

use std::path::PathBuf;

use bdia_train::Failure;

/// A model that is not there.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The program was built without downloads.
    #[error(
        "--model {model}: this program was built without downloads from Hugging Face (cargo build \
         --features hub). Or put \
         config.json and model.safetensors of https://huggingface.co/{model} into a directory and \
         name it with --weights"
    )]
    Without {
        /// The name.
        model: String,
    },
    /// Neither in the cache nor to be had.
    #[error(
        "--model {model}: {file} is not in the cache ({}) and cannot be downloaded: {why}. \
         Without a network, put config.json \
         and model.safetensors of https://huggingface.co/{model} into a directory and name it \
         with --weights",
        cache.display()
    )]
    Absent {
        /// The name.
        model: String,
        /// The file.
        file: &'static str,
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

/// The directory that has a model's `config.json` and `model.safetensors`.
///
/// # Errors
/// [`HubError`] says which files to put where.
#[cfg(not(feature = "hub"))]
pub fn locate(model: &str) -> Result<PathBuf, HubError> {
    Err(HubError::Without { model: model.into() })
}

/// The directory that has a model's `config.json` and `model.safetensors`.
///
/// # Errors
/// [`HubError`] says which files to put where.
#[cfg(feature = "hub")]
pub fn locate(model: &str) -> Result<PathBuf, HubError> {
    use hf_hub::Cache;
    use hf_hub::api::sync::ApiBuilder;

    let cache = Cache::from_env();
    let mut dir = PathBuf::new();
    for file in ["config.json", bdia_models::weights::FILE] {
        let absent = |why: String| {
            let cache = cache.path().clone();
            HubError::Absent { model: model.into(), file, cache, why }
        };
        let path = match cache.model(model.into()).get(file) {
            Some(path) => path,
            None => ApiBuilder::from_env()
                .build()
                .and_then(|api| api.model(model.into()).get(file))
                .map_err(|e| absent(e.to_string()))?,
        };
        dir = path.parent().map(PathBuf::from).unwrap_or_default();
    }
    Ok(dir)
}
