//! `finetune`: a pretrained model, a task, and all of it or adapters that are trained. The run is
//! [`train`]'s.
//!
//! ```text
//! method full    config.json, model.safetensors and tokenizer files, as `train` leaves them
//! method lora    adapter_config.json, adapter_model.safetensors, in PEFT's layout
//! ```

use std::path::{Path, PathBuf};

use bdia_core::backend::Backend;
use bdia_core::{Gamma, Sign};
use bdia_models::gpt2::adapter;
use bdia_models::gpt2::config::Gpt2Config;
use bdia_models::gpt2::files::{load_base, save_weights};
use bdia_models::gpt2::model::{Gpt2, Inference};
use bdia_models::tokenizer::{EOT, Tokenizer, VOCAB};
use bdia_models::weights::WeightsError;
use bdia_train::Failure;
use bdia_train::report;
use bdia_train::{ranks, run};
use xxhash_rust::xxh3::Xxh3;

use crate::cli::{FinetuneArgs, MethodKind, RunArgs};
use crate::data::{Batches, Corpus, DataError, Order, Part};
use crate::hub;
use crate::pairs::Examples;
use crate::train::{self, Summary, Task};

/// What is learned.
enum Source {
    Text { train: Part, validation: Part, batches: Batches },
    Pairs { train: Examples, validation: Option<Examples> },
}

/// A model that is fine-tuned.
struct Pretrained {
    args: FinetuneArgs,
    /// Where its configuration is, and the weights that a run needs.
    weights: PathBuf,
    config: Gpt2Config,
    context: usize,
    source: Source,
    tokenizer: Tokenizer,
    /// Digest of the weights, once they are read.
    base: Option<String>,
}

/// Fine-tunes. The summary is `None` where Ctrl-C stopped the run.
///
/// # Errors
/// [`Failure`]; what was saved before stays good.
pub fn finetune(args: &FinetuneArgs) -> Result<Option<Summary>, Failure> {
    let (mut args, from) = run::begin(args)?;
    let joined = ranks::join(&args.run.machine)?;
    let full = args.method.method == MethodKind::Full;
    let weights = match (&args.weights, &args.model, &args.run.resume) {
        // All that it trains is in its checkpoints.
        (_, _, Some(dir)) if full => dir.clone(),
        (Some(dir), ..) => dir.clone(),
        (None, Some(name), _) => hub::locate(name)?,
        (None, None, _) => {
            return Err(Failure::Other("expected --weights or --model, found neither".into()));
        }
    };
    let mut config = Gpt2Config::read_dir(&weights)?;
    // Dropout is a choice of the training; the file's is what somebody else chose.
    config.set_dropout(args.run.dropout);
    config.bdia = Some(args.run.mode.training()?);
    let tokenizer = Tokenizer::new();
    let (source, context) = open(&mut args, &config, &tokenizer)?;
    let (dims, run, adapters) = (config.dims(), args.run.clone(), args.method.adapters());
    let task = Pretrained { args, weights, config, context, source, tokenizer, base: None };
    train::work(run, dims, context, adapters, task, from, joined)
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
                        "{name} data: {cut} example(s) cut to {context} tokens, {dropped} dropped, whose prompt has no room"
                    );
                }
            }
            let samples = train.len() as f64;
            (Source::Pairs { train, validation }, context, samples)
        }
        None => {
            let context = asked.unwrap_or(config.n_positions);
            let (train, validation) = match &args.validation {
                Some(path) => {
                    let whole = |path: &Path| Corpus::whole(path, tokenizer, config.vocab_size);
                    let train = whole(&data)?;
                    if train.len() <= context as u64 {
                        let (source_name, tokens) = (data.display().to_string(), train.len());
                        return Err(DataError::Short { source_name, tokens, context }.into());
                    }
                    (train, whole(path)?)
                }
                None => {
                    let corpus = Corpus::open(Some(&data), tokenizer, config.vocab_size, context)?;
                    (corpus.train, corpus.validation)
                }
            };
            let samples = train.len() as f64 / context as f64;
            let batches = train::batches(&args.run, Order::Shuffled, context);
            (Source::Text { train, validation, batches }, context, samples)
        }
    };
    if let Some(epochs) = args.epochs {
        let steps = (epochs * samples / per_step(&args.run) as f64).ceil().max(1.0);
        if steps >= f64::from(u32::MAX) {
            return Err(Failure::Other(format!(
                "--epochs {epochs} are {steps} steps, expected less than {}",
                u32::MAX
            )));
        }
        args.run.steps = steps as u64;
    }
    Ok((source, context))
}

/// Samples of a step.
const fn per_step(args: &RunArgs) -> u64 {
    args.batch * args.accumulate
}

impl Task for Pretrained {
    const COMMAND: &'static str = "finetune";

    fn describe(&self) -> String {
        let name = self.args.data.as_deref().unwrap_or(Path::new("")).display();
        match &self.source {
            Source::Text { train, validation, .. } => {
                format!(
                    "{} training and {} validation tokens of {name}",
                    train.len(),
                    validation.len()
                )
            }
            Source::Pairs { train, validation } => format!(
                "{} training and {} validation examples of {name}, {} tokens of them to be learned, {:.2} passes",
                train.len(),
                validation.as_ref().map_or(0, Examples::len),
                train.targets(),
                (self.args.run.steps * per_step(&self.args.run)) as f64 / train.len() as f64,
            ),
        }
    }

    fn digest(&self) -> Result<u64, Failure> {
        match &self.source {
            Source::Text { train, .. } => train::digest(train),
            Source::Pairs { train, .. } => {
                let (mut hash, (tokens, cuts)) = (Xxh3::new(), train.content());
                tokens.iter().for_each(|t| hash.update(&t.to_le_bytes()));
                cuts.flatten().for_each(|n| hash.update(&n.to_le_bytes()));
                Ok(hash.digest())
            }
        }
    }

    fn start<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        model: &Gpt2,
        resumed: bool,
    ) -> Result<(), Failure> {
        let lora = self.args.method.method == MethodKind::Lora;
        if resumed && !lora {
            return Ok(());
        }
        let found =
            load_base(&self.weights, &self.config, be, model).map_err(|error| match error {
                WeightsError::Narrow { .. } => {
                    Failure::Other(format!("{error}; use another --frozen-dtype"))
                }
                other => other.into(),
            })?;
        if let Some(expected) = self.args.base.clone().filter(|e| *e != found) {
            return Err(Failure::Other(format!(
                "the run began with weights with digest {expected}, these have {found}: its adapters do not belong to \
                 them; put the weights back, or start a new run with --out"
            )));
        }
        self.base = Some(found);
        if lora {
            return Ok(model.initialize_adapters(be, self.args.run.seed)?);
        }
        for state in model.trained().iter().flat_map(|t| t.state) {
            be.fill_reals(state, 0.0)?;
        }
        Ok(())
    }

    fn record(&self, out: &Path) -> Result<(), Failure> {
        if self.args.method.method == MethodKind::Full {
            self.config.write_dir(out)?;
        }
        run::save(out, &FinetuneArgs { base: self.base.clone(), ..self.args.clone() })
    }

    fn fill(
        &mut self,
        step: u32,
        first: u32,
        tokens: &mut [i32],
        targets: &mut [i32],
    ) -> Result<(), Failure> {
        let run = &self.args.run;
        match &mut self.source {
            Source::Text { train, batches, .. } => {
                train.batch(batches, step, first, tokens, targets)?
            }
            Source::Pairs { train, .. } => {
                let first = u64::from(step) * per_step(run) + u64::from(first);
                train.batch(run.seed, first, self.context, tokens, targets)?;
            }
        }
        Ok(())
    }

    fn validate<B: Backend<Real = f32>>(
        &self,
        be: &mut B,
        model: &mut Gpt2,
        tokens: usize,
    ) -> Result<Option<(f64, usize)>, Failure> {
        let (samples, inference) =
            ((tokens / self.context).max(1), Inference::Float(Gamma::new(0.0, Sign::Plus)?));
        match &self.source {
            Source::Text { validation, .. } => {
                train::evaluate(be, model, validation, samples, inference)
            }
            Source::Pairs { validation: Some(examples), .. } => {
                evaluate(be, model, examples, samples, inference)
            }
            Source::Pairs { validation: None, .. } => Ok(None),
        }
    }

    fn finish<B: Backend<Real = f32>>(
        &self,
        be: &B,
        model: &Gpt2,
        out: &Path,
    ) -> Result<&'static str, Failure> {
        if let Some(digest) = self.base.as_deref().filter(|_| model.setup().adapters.is_some()) {
            let base =
                self.args.model.clone().unwrap_or_else(|| self.weights.display().to_string());
            adapter::save(out, be, model, &base, digest)?;
            return Ok("adapter_model.safetensors, adapter_config.json");
        }
        self.config.write_dir(out)?;
        save_weights(out, be, model)?;
        if self.config.vocab_size == VOCAB {
            self.tokenizer.write_hf_files(out, self.config.n_positions)?;
        }
        Ok("model.safetensors, config.json")
    }

    fn sample<B: Backend<Real = f32>>(
        &self,
        be: &mut B,
        model: &mut Gpt2,
    ) -> Result<Option<String>, Failure> {
        if self.config.vocab_size != VOCAB {
            return Ok(None);
        }
        let prompt = match &self.source {
            Source::Text { .. } => vec![EOT as i32],
            Source::Pairs { train, validation } => validation.as_ref().unwrap_or(train).prompt(0),
        };
        let text = train::continuation(be, model, &self.tokenizer, &prompt)?;
        let prompt: Vec<u32> = prompt.into_iter().map(|t| t as u32).filter(|&t| t != EOT).collect();
        Ok(Some(format!("{}{text}", self.tokenizer.decode(&prompt))))
    }
}

/// Mean loss over the targets of at most `samples` examples, taken at equal distances, and the
/// number of the targets.
///
/// # Errors
/// [`Failure`]
pub fn evaluate<B: Backend<Real = f32>>(
    be: &mut B,
    model: &mut Gpt2,
    examples: &Examples,
    samples: usize,
    inference: Inference,
) -> Result<Option<(f64, usize)>, Failure> {
    let (context, at_once) = (model.setup().context, model.stack.config().chunk);
    let (mut tokens, mut targets) = (vec![0; at_once * context], vec![0; at_once * context]);
    let n = samples.min(examples.len());
    let (mut sum, mut count) = (0.0, 0);
    for first in (0..n).step_by(at_once) {
        if run::interrupted() {
            break;
        }
        let here = at_once.min(n - first);
        for i in 0..here {
            let range = i * context..(i + 1) * context;
            let example = ((first + i) as u128 * examples.len() as u128 / n as u128) as usize;
            examples.sample(example, &mut tokens[range.clone()], &mut targets[range]);
        }
        let (loss, m) =
            model.evaluate(be, &tokens[..here * context], &targets[..here * context], inference)?;
        sum += loss;
        count += m;
    }
    Ok((count > 0).then(|| (sum / count as f64, count)))
}
