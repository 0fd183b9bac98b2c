//! `finetune`: a pretrained model, a task, and all of it or adapters that are trained. The run is
//! [`train`](crate::train)'s.
//!
//! ```text
//! method full    config.json, model.safetensors and tokenizer files, as `train` leaves them
//! method lora    adapter_config.json, adapter_model.safetensors, in PEFT's layout
//! ```

use std::path::Path;

use bdia_models::gpt2::config::Gpt2Config;
use bdia_models::tokenizer::Tokenizer;
use bdia_train::cli::{Flags as _, MethodKind};
use bdia_train::trainer::Summary;
use bdia_train::{Failure, ranks, report, run};

use crate::calibrate;
use crate::cli::FinetuneArgs;
use crate::data::{Corpus, DataError, Order};
use crate::hub;
use crate::pairs::Examples;
use crate::train::{Asked, Lesson, Source, Start, batches};

/// Fine-tunes.
///
/// # Errors
/// [`Failure`]; what was saved before stays good.
pub fn finetune(args: &FinetuneArgs) -> Result<Summary, Failure> {
    let (mut args, from) = run::begin(args)?;
    let joined = ranks::join(&args.run.machine)?;
    let full = args.method.method == MethodKind::Full;
    let weights = match (&args.weights, &args.model, &from) {
        // All that it trains is in its checkpoints.
        (_, _, Some(_)) if full => args.run.out.clone(),
        (Some(dir), ..) => dir.clone(),
        (None, Some(name), _) => hub::locate(name)?,
        (None, None, _) => {
            return Err(Failure::Other("expected --weights or --model, found neither".into()));
        }
    };
    args.method.check_start(Some(&weights), &args.clone().run())?;
    let mut config = Gpt2Config::read_dir(&weights)?;
    // Dropout is a choice of the training; the file's is what somebody else chose.
    config.set_dropout(args.run.dropout);
    let tokenizer = args.text.tokenizer();
    let (source, context) = open(&mut args, &config, &tokenizer)?;
    if from.is_none() {
        let how = (context, args.method.adapters());
        calibrate::measure(&mut args.run, &source, &config, &weights, how)?;
    }
    config.bdia = Some(args.run.mode.training()?);
    let lesson = Lesson {
        run: args.run.clone(),
        context,
        adapters: args.method.adapters(),
        config,
        source,
        name: args.data.as_deref().unwrap_or(Path::new("")).display().to_string(),
        tokenizer,
        start: Start::Weights(weights),
        asked: Asked::Finetune(Box::new(args.clone())),
    };
    lesson.learn(args, "bdia-lm finetune", from, joined)
}

/// The data, the tokens of a sample, and the number of steps where passes were asked for.
fn open(
    args: &mut FinetuneArgs,
    config: &Gpt2Config,
    tokenizer: &Tokenizer,
) -> Result<(Source, usize), Failure> {
    let Some(data) = args.data.clone() else {
        return Err(Failure::Other("expected --data, found nothing".into()));
    };
    let asked = args.context.map(|c| c as usize);
    let (source, context, samples) = match args.pairs.columns(args.task) {
        Some(columns) => {
            let loss_on = args.pairs.loss_on();
            let examples =
                |path: &Path| Examples::open(path, &columns, loss_on, tokenizer, config.vocab_size);
            let mut train = examples(&data)?;
            let mut validation = args.validation.as_deref().map(examples).transpose()?;
            let context = asked.unwrap_or_else(|| train.longest().min(config.n_positions));
            for examples in core::iter::once(&mut train).chain(&mut validation) {
                examples.fit(context)?;
            }
            for (name, examples) in
                [("training", Some(&train)), ("validation", validation.as_ref())]
            {
                if let Some((cut, dropped)) =
                    examples.map(Examples::truncated).filter(|&t| t != (0, 0))
                {
                    report::note!(
                        "{name} data: {cut} example(s) cut to {context} tokens, {dropped} \
                         dropped, whose prompt has no room"
                    );
                }
            }
            let samples = train.len() as f64;
            (Source::Pairs { train, validation }, context, samples)
        }
        None => {
            let context = asked.unwrap_or(config.n_positions);
            let (token_type, vocab) = (args.token_type, config.vocab_size);
            let told = |note: Option<String>| note.iter().for_each(|n| report::note!("{n}"));
            let (train, validation) = match &args.validation {
                Some(path) => {
                    let whole = |path: &Path| {
                        let (part, note) = Corpus::whole(path, token_type, tokenizer, vocab)?;
                        told(note);
                        Ok::<_, DataError>(part)
                    };
                    let train = whole(&data)?;
                    if train.len() <= context as u64 {
                        let (source_name, tokens) = (data.display().to_string(), train.len());
                        return Err(DataError::Short { source_name, tokens, context }.into());
                    }
                    (train, whole(path)?)
                }
                None => {
                    let corpus = Corpus::open(Some(&data), token_type, tokenizer, vocab, context)?;
                    told(corpus.note);
                    (corpus.train, corpus.validation)
                }
            };
            let samples = train.len() as f64 / context as f64;
            let batches = batches(&args.run, Order::Shuffled, context);
            (Source::Text { train, validation, batches }, context, samples)
        }
    };
    args.run.count_passes(samples)?;
    Ok((source, context))
}
