//! `prepare`: data as tokens, so that later runs read no text and keep no tokens in memory.

use bdia_models::files::write_bytes;
use bdia_models::for_family;
use bdia_models::language::{Config, Family as _};
use bdia_train::{Failure, report};

use crate::cli::PrepareArgs;
use crate::data::Corpus;
use crate::hub;
use crate::pairs::Examples;
use crate::train::Texts;

/// Writes the tokens of a file.
///
/// # Errors
/// [`Failure`], among them a place that is taken.
pub fn prepare(args: &PrepareArgs) -> Result<(), Failure> {
    let opened = hub::open(&args.weights)?;
    let tokenizer = opened.tokenizer.map(|t| args.text.of(t));
    let texts = Texts { tokenizer, implied: opened.implied };
    for_family!(opened.config, config => prepare_for(args, &config, &texts))
}

fn prepare_for<C: Config>(args: &PrepareArgs, config: &C, texts: &Texts) -> Result<(), Failure> {
    let (path, tokenizer) = (&args.data, texts.tokenizer.as_ref());
    let reading = args.pairs.reading(args.task, tokenizer.is_some_and(|t| t.chat().is_some()));
    let kind = if reading.is_some() { "safetensors" } else { "npy" };
    if args.out.extension().is_none_or(|e| !e.eq_ignore_ascii_case(kind)) {
        return Err(Failure::Other(format!(
            "--out {}: expected a file whose name ends in .{kind} for this task",
            args.out.display()
        )));
    }
    if args.out.exists() && !args.replace {
        return Err(Failure::Other(format!(
            "{}: is there already; name another file, or replace it with --replace",
            args.out.display()
        )));
    }
    if let Some(reading) = reading {
        // Without a tokenizer there are no examples.
        let examples = Examples::of(path, &reading, texts, config)?;
        examples.write(&args.out, &reading, texts, config)?;
        report::tell!(
            "{}: {} examples, {} tokens, the longest example has {}",
            args.out.display(),
            examples.examples(),
            examples.tokens(),
            examples.longest() + 1
        );
    } else {
        let (text, note) = Corpus::whole(path, None, tokenizer, config.dims().vocab())?;
        note.iter().for_each(|n| report::note!("{n}"));
        write_bytes(&args.out, &text.to_npy()?)?;
        report::tell!("{}: {} tokens", args.out.display(), text.len());
    }
    Ok(())
}
