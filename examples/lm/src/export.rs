//! `export`: a model in another format: a GGUF file, or a directory in Hugging Face's layout.

use std::path::Path;

use bdia_core::backend::Backend;
use bdia_models::files::read_limited;
use bdia_models::gguf::{Gguf, Value};
use bdia_models::llama::config::LlamaConfig;
use bdia_models::llama::gguf::{self, Storage};
use bdia_models::llama::gguf_tokenizer::tokenizer_metadata;
use bdia_models::llama::model::Llama;
use bdia_models::pretrained::{AnyConfig, Pretrained};
use bdia_train::Failure;
use bdia_train::machine::{self, Work};
use bdia_train::report;

use crate::cli::{ExportArgs, StorageKind};
use crate::hub;
use crate::inference::{self, load};

/// The largest files of a tokenizer that are read.
const LIMIT: u64 = 64 << 20;

/// Writes a model, with adapters merged into it where there are some.
///
/// # Errors
/// [`Failure`], among them a place that is taken, and a model that the format does not have.
pub fn export(args: &ExportArgs) -> Result<(), Failure> {
    let opened = hub::open(&args.weights)?;
    let is_gguf = args.out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if !is_gguf {
        if args.storage != StorageKind::F32 {
            return Err(Failure::Other(
                "--type belongs to GGUF files, whose names end in .gguf; a directory has f32"
                    .into(),
            ));
        }
        let (out, replace) = (args.out.as_path(), args.replace);
        return inference::write_model(&opened, args.adapter.as_deref(), out, replace);
    }
    if args.out.exists() && !args.replace {
        return Err(Failure::Other(format!(
            "{}: is there already; name another file, or replace it with --replace",
            args.out.display()
        )));
    }
    match &opened.config {
        AnyConfig::Llama(config) => {
            let tokenizer = tokenizer(&opened)?;
            let (model, layout) = inference::lay_out_plain(config)?;
            let (path, tokenizer) = (opened.path.as_path(), tokenizer.as_slice());
            let work = ToGguf { args, path, config, model, tokenizer };
            machine::run(&inference::one_thread(), 1, &layout, work)
        }
        AnyConfig::Gpt2(_) => Err(Failure::Other(format!(
            "{}: a GPT-2; GGUF files are written of Llama's family only",
            opened.path.display()
        ))),
    }
}

/// What a GGUF file says of the tokenizer.
fn tokenizer(opened: &Pretrained) -> Result<Vec<(String, Value)>, Failure> {
    let path = &opened.path;
    if path.is_file() {
        return Ok(Gguf::open(path)?.tokenizer());
    }
    let read = |name: &str| {
        let path = path.join(name);
        path.exists().then(|| read_limited(&path, LIMIT)).transpose()
    };
    let Some(json) = read("tokenizer.json")? else {
        report::note!(
            "{}: no tokenizer.json, so the file has no tokenizer: these programs read it with \
             token files only, llama.cpp does not",
            path.display()
        );
        return Ok(Vec::new());
    };
    let config = read("tokenizer_config.json")?;
    let mut all = tokenizer_metadata(&json, config.as_deref())?;
    let key = "tokenizer.chat_template";
    // The one that is used here, whichever of the files has it.
    if let Some(chat) = opened.tokenizer.as_ref().and_then(|t| t.chat()) {
        all.retain(|(name, _)| name != key);
        all.push((key.into(), Value::Text(chat.source().into())));
    }
    Ok(all)
}

struct ToGguf<'a> {
    args: &'a ExportArgs,
    path: &'a Path,
    config: &'a LlamaConfig,
    model: Llama,
    tokenizer: &'a [(String, Value)],
}

impl Work for ToGguf<'_> {
    fn on<B: Backend<Real = f32>>(self, be: &mut B, _: usize) -> Result<(), Failure> {
        load(self.path, self.args.adapter.as_deref(), be, &self.model)?;
        let storage = match self.args.storage {
            StorageKind::F32 => Storage::F32,
            StorageKind::F16 => Storage::F16,
            StorageKind::Q8_0 => Storage::Q8_0,
        };
        gguf::write(&self.args.out, be, self.config, &self.model, self.tokenizer, storage)?;
        report::tell!("{}: the model as a GGUF file", self.args.out.display());
        Ok(())
    }
}
