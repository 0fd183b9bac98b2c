//! `finetune`: a pretrained model, a task, and all of it or adapters that are trained. The run is
//! [`train`](crate::train)'s.
//!
//! ```text
//! method full    config.json, model.safetensors and tokenizer files, as `train` leaves them
//! method lora    adapter_config.json, adapter_model.safetensors, in PEFT's layout
//! ```

use std::path::{Path, PathBuf};

use bdia_models::for_family;
use bdia_models::language::{Config, Family, frozen};
use bdia_models::named::{Adapters, Frozen};
use bdia_models::pretrained;
use bdia_train::checkpoint::Header;
use bdia_train::cli::{BackendKind, Flags as _, FrozenKind, MachineArgs, MethodArgs, MethodKind};
use bdia_train::trainer::Summary;
use bdia_train::{Failure, ranks, report, run};

use crate::calibrate;
use crate::cli::{FinetuneArgs, check_pack, context_of};
use crate::data::{Corpus, DataError, Order};
use crate::hub;
use crate::pairs::Examples;
use crate::train::{Asked, Lesson, Source, Start, Texts, batches};

/// Tokens of a sample with several examples, unless the flags say otherwise.
const PACKED: usize = 512;

/// Fine-tunes.
///
/// # Errors
/// [`Failure`]; what was saved before stays good.
pub fn finetune(args: &FinetuneArgs) -> Result<Summary, Failure> {
    let (args, from) = run::begin(args)?;
    let joined = ranks::join(&args.run.machine)?;
    let full = args.method.method == MethodKind::Full;
    let opened = match (&args.weights, &from) {
        // All that it trains is in its checkpoints.
        (_, Some(_)) if full => pretrained::open_config(&args.run.out)?,
        (Some(model), _) => hub::open(model)?,
        (None, _) => return Err(Failure::Other("expected --model, found nothing".into())),
    };
    args.method.check_start(Some(&opened.path), &args.clone().run())?;
    let tokenizer = opened.tokenizer.map(|t| args.text.of(t));
    let texts = Texts { tokenizer, implied: opened.implied };
    for_family!(opened.config, config => {
        finetune_on(args, from, joined, config, opened.path, texts)
    })
}

fn finetune_on<C: Config>(
    mut args: FinetuneArgs,
    from: Option<(PathBuf, Header)>,
    mut joined: Option<bdia_ranks::Ranks>,
    mut config: C,
    weights: PathBuf,
    texts: Texts,
) -> Result<Summary, Failure> {
    check_pack::<C::Dims>(args.pack)?;
    // Dropout is a choice of the training; the file's is what somebody else chose.
    config.set_dropout(args.run.dropout);
    let (source, context) = open(&mut args, &config, &texts)?;
    if from.is_none() {
        let kind = storage(&args.method, &config, &weights)?;
        args.method.frozen_dtype = kind;
    }
    let adapters = adapters(&args.method, &args.run.machine, &config, Some(&weights))?;
    if from.is_none() {
        let how = (context, adapters);
        calibrate::measure(&mut args.run, joined.as_mut(), &source, &config, &weights, how)?;
    }
    config.set_training(args.run.mode.training()?);
    let lesson = Lesson {
        run: args.run.clone(),
        context,
        adapters,
        packed: args.pack,
        config,
        source,
        name: args.data.as_deref().unwrap_or(Path::new("")).display().to_string(),
        texts,
        start: Start::Weights(weights),
        asked: Asked::Finetune(Box::new(args.clone())),
    };
    lesson.learn(args, "bdia-lm finetune", from, joined)
}

/// How matrices that are not trained are stored: as the flags say, else as a file has them, where
/// that is in few bits.
pub(crate) fn storage<C: Config>(
    method: &MethodArgs,
    config: &C,
    weights: &Path,
) -> Result<Option<FrozenKind>, Failure> {
    if method.lora().is_none() || method.frozen_dtype.is_some() {
        return Ok(method.frozen_dtype);
    }
    let is_narrow = weights.is_file() && pretrained::is_narrow(weights, &config.dims())?;
    Ok(Some(if is_narrow { FrozenKind::File } else { FrozenKind::F32 }))
}

/// Adapters, where those are trained, and how the model that they are for is stored.
pub(crate) fn adapters<C: Config>(
    method: &MethodArgs,
    machine: &MachineArgs,
    config: &C,
    weights: Option<&Path>,
) -> Result<Option<Adapters>, Failure> {
    let Some(shape) = method.lora() else { return Ok(None) };
    let (dims, kind) = (config.dims(), method.frozen_dtype.unwrap_or(FrozenKind::F32));
    let frozen = match (kind, kind.packing(), weights) {
        (FrozenKind::File, _, Some(path)) => {
            // A device has no part in the memory of files.
            let mapped = machine.backend == BackendKind::Cpu;
            frozen::as_stored(&dims, &*pretrained::source(path, &dims)?, mapped)?
        }
        (FrozenKind::File, _, None) => {
            let text = "--frozen-dtype file: expected --model, whose file it is, found nothing";
            return Err(Failure::Other(text.into()));
        }
        (_, Some(packing), _) => frozen::packed(&dims, packing)?,
        _ => Frozen::default(),
    };
    Ok(Some(Adapters { shape, frozen }))
}

/// The data, the tokens of a sample, and the number of steps where passes were asked for.
fn open<C: Config>(
    args: &mut FinetuneArgs,
    config: &C,
    texts: &Texts,
) -> Result<(Source, usize), Failure> {
    let (vocab, positions) = (config.dims().vocab(), config.dims().positions());
    let tokenizer = texts.tokenizer.as_ref();
    let Some(data) = args.data.clone() else {
        return Err(Failure::Other("expected --data, found nothing".into()));
    };
    let asked = context_of(args.context, positions)?;
    let has_template = tokenizer.is_some_and(|t| t.chat().is_some());
    let (source, context, samples) = match args.pairs.reading(args.task, has_template) {
        Some(reading) => {
            let examples = |path: &Path| Examples::of(path, &reading, texts, config);
            let mut train = examples(&data)?;
            let mut validation = args.validation.as_deref().map(examples).transpose()?;
            let context = asked.unwrap_or_else(|| {
                // Room for several, where they are packed.
                let longest = train.longest();
                if args.pack { longest.max(PACKED) } else { longest }.min(positions)
            });
            train.fit(context, args.pack)?;
            if let Some(examples) = &mut validation {
                examples.fit(context, false)?;
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
            (Source::Pairs { train, validation: validation.map(Box::new) }, context, samples)
        }
        None => {
            let context = asked.unwrap_or(positions);
            let token_type = args.token_type;
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
