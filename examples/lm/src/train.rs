//! `train`, and what it has in common with [`finetune`](crate::finetune): a [`Learner`], the task
//! of [`bdia_train::trainer`] in which a language model learns from text or from pairs.

use std::path::{Path, PathBuf};

use bdia_core::Layout;
use bdia_core::backend::Backend;
use bdia_core::network::{Outcome, Step};
use bdia_core::plan::Choice;
use bdia_models::for_family;
use bdia_models::inference::Inference;
use bdia_models::language::decode::{Decoder, Decoding, How, Sizes};
use bdia_models::language::model::{LanguageModel, Setup};
use bdia_models::language::{Config, Family, adapter, files};
use bdia_models::named::{self, Adapters, Named, Saved};
use bdia_models::pretrained;
use bdia_models::sample::Sampler;
use bdia_models::tokenizer::Tokenizer;
use bdia_train::checkpoint::Header;
use bdia_train::machine::{self, for_kind};
use bdia_train::trainer::{self, Planned, Settings, Summary, Task, Validation, When, fixed_choice};
use bdia_train::{Failure, ranks, report, run};
use xxhash_rust::xxh3::Xxh3;

use crate::calibrate;
use crate::cli::{FinetuneArgs, TrainArgs, context_of};
use crate::data::{Batches, Corpus, DataError, Order, Part, start_token};
use crate::hub;
use crate::pairs::Examples;
use bdia_train::cli::{MethodArgs, StepArgs};

/// Validation tokens of the curve, and of the measurement at the end; `eval` has no such limit.
const CURVE_TOKENS: usize = 8192;
const FINAL_TOKENS: usize = 1 << 16;

/// Program and version, part of the identity of a run.
pub const PROGRAM: &str = concat!("bdia-lm ", env!("CARGO_PKG_VERSION"));

/// What is learned.
pub enum Source {
    /// Running text.
    Text {
        /// To learn from.
        train: Part,
        /// To measure on.
        validation: Part,
        /// How batches are made of it.
        batches: Batches,
    },
    /// Prompts and completions.
    Pairs {
        /// To learn from.
        train: Examples,
        /// To measure on.
        validation: Option<Box<Examples>>,
    },
}

/// Where a run's parameters come from.
pub enum Start {
    /// Drawn.
    Fresh,
    /// Read from a directory. With adapters, which are drawn, that is where the rest comes from
    /// when the run goes on, too.
    Weights(PathBuf),
}

/// The flags of a run, to write them.
pub enum Asked {
    /// `train`.
    Train(Box<TrainArgs>),
    /// `finetune`.
    Finetune(Box<FinetuneArgs>),
}

/// The tokenizer of a model.
#[derive(Clone)]
pub struct Texts {
    /// It, where the model has one.
    pub tokenizer: Option<Tokenizer>,
    /// Whether the model has it without any file.
    pub implied: bool,
}

impl Texts {
    /// Writes the files of the tokenizer into the directory of a model.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write<C: Config>(&self, out: &Path, config: &C) -> Result<(), Failure> {
        let d = config.dims();
        match self.tokenizer.as_ref().filter(|t| pretrained::fits(t, d.vocab())) {
            Some(t) => Ok(t.write_hf_files(out, d.positions())?),
            None => Ok(()),
        }
    }
}

/// The tokens that end a text of a model.
pub fn end_tokens<C: Config>(config: &C, tokenizer: &Tokenizer) -> Vec<i32> {
    let mut ends = config.ends();
    ends.extend(tokenizer.eos().filter(|eos| !ends.contains(eos)));
    ends.into_iter().map(|t| t as i32).collect()
}

/// A language model that learns.
pub struct Learner<C: Config> {
    run: StepArgs,
    model: LanguageModel<C::Dims>,
    config: C,
    source: Source,
    /// What the source is called.
    name: String,
    texts: Texts,
    start: Start,
    asked: Asked,
    /// Digest of the weights that were read.
    base: Option<String>,
    /// Decodes the sample, where there is one.
    sample: Option<Decoder<C::Dims>>,
}

/// Trains.
///
/// # Errors
/// [`Failure`]; what was saved before stays good.
pub fn train(args: &TrainArgs) -> Result<Summary, Failure> {
    let (args, from) = run::begin(args)?;
    let joined = ranks::join(&args.run.machine)?;
    let opened = match (&args.weights, &from) {
        (_, Some(_)) => pretrained::open_config(&args.run.out)?,
        (Some(model), None) => hub::open(model)?,
        (None, None) => fresh(&args)?,
    };
    let weights = args.weights.as_ref().map(|_| opened.path.clone());
    let tokenizer = opened.tokenizer.map(|t| args.text.of(t));
    let texts = Texts { tokenizer, implied: opened.implied };
    for_family!(opened.config, config => train_on(args, from, joined, config, weights, texts))
}

/// A model that is drawn.
fn fresh(args: &TrainArgs) -> Result<pretrained::Pretrained, Failure> {
    let tokenizer = match &args.tokenizer {
        None => Tokenizer::gpt2(),
        Some(dir) => {
            Tokenizer::open(dir).map_err(pretrained::PretrainedError::from)?.ok_or_else(|| {
                Failure::Other(format!(
                    "--tokenizer {}: expected tokenizer.json, or vocab.json and merges.txt, found \
                     neither",
                    dir.display()
                ))
            })?
        }
    };
    let mut config = args.model.fresh(args.run.dropout, tokenizer.vocab())?;
    if let pretrained::AnyConfig::Llama(config) = &mut config {
        config.set_start(tokenizer.bos());
        config.add_ends(tokenizer.eos());
    }
    let gpt2 = matches!(config, pretrained::AnyConfig::Gpt2(_));
    Ok(pretrained::Pretrained {
        path: args.run.out.clone(),
        config,
        tokenizer: Some(tokenizer),
        implied: gpt2 && args.tokenizer.is_none(),
        note: None,
    })
}

fn train_on<C: Config>(
    mut args: TrainArgs,
    from: Option<(PathBuf, Header)>,
    mut joined: Option<bdia_ranks::Ranks>,
    mut config: C,
    weights: Option<PathBuf>,
    texts: Texts,
) -> Result<Summary, Failure> {
    if weights.is_some() && from.is_none() {
        // Dropout is a choice of the training; the file's is what somebody else chose.
        config.set_dropout(args.run.dropout);
    }
    let dims = config.dims();
    let positions = dims.positions();
    let context = context_of(args.model.context, positions)?.unwrap_or(positions);
    let (data, tokenizer) = (args.data.as_deref(), texts.tokenizer.as_ref());
    let corpus = Corpus::open(data, args.token_type, tokenizer, dims.vocab(), context)?;
    corpus.note.iter().for_each(|note| report::note!("{note}"));
    args.run.count_passes(corpus.train.len() as f64 / context as f64)?;
    let batches = batches(&args.run, args.order, context);
    let name = corpus.name.to_string();
    let (train, validation) = (corpus.train, corpus.validation);
    let source = Source::Text { train, validation, batches };
    if let (Some(weights), None) = (&weights, &from) {
        let how = (context, None);
        calibrate::measure(&mut args.run, joined.as_mut(), &source, &config, weights, how)?;
    }
    config.set_training(args.run.mode.training()?);
    let lesson = Lesson {
        run: args.run.clone(),
        context,
        adapters: None,
        packed: false,
        config,
        source,
        name,
        texts,
        start: weights.map_or(Start::Fresh, Start::Weights),
        asked: Asked::Train(Box::new(args.clone())),
    };
    lesson.learn(args, "bdia-lm train", from, joined)
}

/// How a run's batches are made of a text.
pub fn batches(args: &StepArgs, order: Order, context: usize) -> Batches {
    Batches { order, seed: args.seed, per_step: args.batch * args.accumulate, context }
}

/// A run before its plan.
pub struct Lesson<C> {
    /// Flags that every run has.
    pub run: StepArgs,
    /// Tokens of a sample.
    pub context: usize,
    /// Adapters, where those are trained.
    pub adapters: Option<Adapters>,
    /// Whether samples have several texts.
    pub packed: bool,
    /// The model.
    pub config: C,
    /// The data.
    pub source: Source,
    /// What it is called.
    pub name: String,
    /// The model's tokenizer.
    pub texts: Texts,
    /// Where parameters come from.
    pub start: Start,
    /// All flags.
    pub asked: Asked,
}

impl<C: Config> Lesson<C> {
    /// Plans the run and does it.
    ///
    /// # Errors
    /// [`Failure`]; what was saved before stays good.
    pub fn learn<A: bdia_train::cli::Flags>(
        self,
        args: A,
        command: &'static str,
        from: Option<(PathBuf, Header)>,
        mut joined: Option<bdia_ranks::Ranks>,
    ) -> Result<Summary, Failure> {
        let (rank, count) = ranks::place(joined.as_ref());
        let (run, context, kind) = (&self.run, self.context, self.run.machine.backend);
        let dims = self.config.dims();
        let threads = machine::threads(&run.machine);
        let setup = Setup {
            dims,
            batch: ranks::part(run.batch as usize, count)?,
            accumulate: run.accumulate as usize,
            context,
            mode: machine::mode(&run.mode, dims.layers(), run.verify)?,
            gradients: machine::gradients(&run.optim, run.accumulate),
            blocks_per_step: run.mode.blocks_per_step as usize,
            adapters: self.adapters,
            packed: self.packed,
            smoothing: run.smoothing,
            threads,
            library: machine::library(&run.machine, threads),
        };
        let fits = |c: Choice| c.fits(setup.batch, context);
        let fixed = fixed_choice(from.as_ref(), run.steps as u32, count, fits)?;
        let (choice, model, layout) = machine::lay_out::<LanguageModel<C::Dims>>(
            &setup,
            kind,
            count,
            run.machine.memory,
            fixed,
        )?;
        if let Some(joined) = &mut joined {
            joined.reserve(&[bdia_models::plan::Plan::exchanged(&model)]);
        }
        // The table is told by the first rank alone.
        let mut others = Vec::new();
        if rank == 0 {
            for (name, mode) in machine::other_modes(&setup.mode, dims.layers())? {
                let other = Setup { mode, blocks_per_step: 1, ..setup };
                let plan = machine::lay_out::<LanguageModel<C::Dims>>(
                    &other,
                    kind,
                    1,
                    None,
                    Some(choice),
                )?
                .2;
                others.push((name, plan));
            }
        }
        let sample = self.sampler(&model, &layout)?;
        let settings = Settings::of_steps(run, command, PROGRAM);
        let Self { run, config, source, name, texts, start, asked, .. } = self;
        let base = None;
        let task = Learner { run, model, config, source, name, texts, start, asked, base, sample };
        trainer::train(args, settings, Planned { choice, layout, others }, task, from, joined)
    }

    /// A decoder for the sample at the end, of the longest context for which training leaves room.
    fn sampler(
        &self,
        model: &LanguageModel<C::Dims>,
        plan: &Layout,
    ) -> Result<Option<Decoder<C::Dims>>, Failure> {
        let vocab = self.config.dims().vocab();
        let shown = self.texts.tokenizer.as_ref().filter(|t| pretrained::fits(t, vocab));
        if self.run.sample == 0 || shown.is_none() {
            return Ok(None);
        }
        let mut sizes = Sizes { prompts: 1, beams: 1, context: self.context };
        while sizes.context > 0 {
            let (decoder, layout) =
                for_kind!(self.run.machine.backend, B => Decoder::layout::<B>(model, &sizes))?;
            if plan.holds(&layout) {
                return Ok(Some(decoder));
            }
            sizes.context /= 2;
        }
        Ok(None)
    }
}

impl<C: Config> Learner<C> {
    /// Samples of a step.
    const fn per_step(&self) -> u64 {
        self.run.batch * self.run.accumulate
    }

    fn prompt(&self) -> Result<Vec<i32>, DataError> {
        let start = self.texts.tokenizer.as_ref().and_then(start_token).unwrap_or(0);
        match &self.source {
            Source::Text { .. } => Ok(vec![start as i32]),
            Source::Pairs { train, validation } => validation.as_deref().unwrap_or(train).prompt(0),
        }
    }

    /// What the model writes at the end: the same tokens every time.
    fn sample<B: Backend<Real = f32>>(&self, be: &mut B) -> Result<String, Failure> {
        // Where there is a decoder, there is a tokenizer.
        let (Some(decoder), Some(tokenizer)) = (&self.sample, &self.texts.tokenizer) else {
            return Ok(String::new());
        };
        let sampler = Sampler { temperature: 0.8, top_k: 40, top_p: 1.0 };
        let decoding = Decoding {
            how: How::Sample(sampler, 1),
            tokens: self.run.sample as usize,
            ends: end_tokens(&self.config, tokenizer),
            no_repeat: 0,
            inference: Inference::STANDARD,
        };
        let prompt = self.prompt()?;
        let found = decoder.decode(be, core::slice::from_ref(&prompt), &decoding, |_| {
            core::ops::ControlFlow::Continue(())
        })?;
        let tokens: Vec<u32> = (prompt.into_iter().chain(found.into_iter().flatten()))
            .map(|t| t as u32)
            .filter(|&t| !tokenizer.is_special(t))
            .collect();
        let text = tokenizer.decode(&tokens);
        Ok(format!("\nA sample:\n  {}\n", text.trim().replace('\n', "\n  ")))
    }
}

impl<C: Config> Task for Learner<C> {
    fn describe(&self) -> String {
        let s = self.model.setup();
        let [parameters, trained] = self.parameters();
        let adapters = trainer::adapters(s.adapters.is_some(), trained);
        let times = if self.run.accumulate > 1 {
            format!(" x {}", self.run.accumulate)
        } else {
            String::new()
        };
        let data = match &self.source {
            Source::Text { train, validation, .. } => {
                format!("{} training and {} validation tokens", train.len(), validation.len())
            }
            Source::Pairs { train, validation } => format!(
                "{} training{} and {} validation examples, {} tokens to be learned, {:.2} passes",
                train.examples(),
                if train.is_packed() {
                    format!(" (packed into {} samples)", train.len())
                } else {
                    String::new()
                },
                validation.as_deref().map_or(0, Examples::examples),
                train.targets(),
                (self.run.steps * self.per_step()) as f64 / train.len() as f64,
            ),
        };
        format!(
            "{parameters} parameters{adapters}, {} blocks, width {}, context {}, batch {}{times}; \
             {data} of {}",
            s.dims.layers(),
            s.dims.width(),
            s.context,
            self.run.batch,
            self.name
        )
    }

    fn digest(&self) -> Result<u64, Failure> {
        let mut hash = Xxh3::new();
        match &self.source {
            Source::Text { train, validation, .. } => {
                digest(train, &mut hash)?;
                digest(validation, &mut hash)?;
            }
            Source::Pairs { train, validation } => {
                for examples in [Some(train), validation.as_deref()].into_iter().flatten() {
                    examples.digest(&mut hash)?;
                }
            }
        }
        Ok(hash.digest())
    }

    fn start<B: Backend<Real = f32>>(&mut self, be: &mut B, resumed: bool) -> Result<(), Failure> {
        let adapters = self.model.setup().adapters.is_some();
        if resumed && !adapters {
            // The parameters are those of the checkpoint.
            return Ok(self.model.fill_tables(be)?);
        }
        let Start::Weights(dir) = &self.start else {
            return Ok(self.model.initialize(be, self.run.seed)?);
        };
        let found = pretrained::load(dir, be, &self.model).map_err(MethodArgs::unreadable)?;
        if let Asked::Finetune(args) = &self.asked
            && let Some(expected) = args.base.as_ref().filter(|e| **e != found)
        {
            return Err(Failure::Other(format!(
                "the run began with weights with digest {expected}, these have {found}: its \
                 adapters do not belong to them; put the weights back, or start a new run with \
                 --out"
            )));
        }
        self.base = Some(found);
        if adapters {
            return Ok(self.model.initialize_adapters(be, self.run.seed)?);
        }
        Ok(self.model.trained().iter().try_for_each(|t| t.state.clear(be))?)
    }

    fn record(&self, out: &Path) -> Result<(), Failure> {
        if self.model.setup().adapters.is_none() {
            self.config.write_dir(out)?;
            if !self.texts.implied {
                self.texts.write(out, &self.config)?;
            }
        }
        match &self.asked {
            Asked::Train(_) => Ok(()),
            Asked::Finetune(args) => {
                run::save(out, &FinetuneArgs { base: self.base.clone(), ..(**args).clone() })
            }
        }
    }

    fn parameters(&self) -> [usize; 2] {
        [self.model.parameters(), self.model.trained().iter().map(Named::len).sum()]
    }

    fn saved(&self) -> Vec<Saved> {
        self.model.saved()
    }

    fn prepare(&mut self) {
        self.model.prepare();
    }

    fn step<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        step: &Step,
    ) -> Result<Outcome, Failure> {
        let (per_step, batch) = (self.per_step(), self.run.batch as u32);
        let part = be.rank() as u32 * (batch / be.ranks() as u32);
        let (seed, context) = (self.run.seed, self.model.setup().context);
        let (model, source) = (&mut self.model, &mut self.source);
        model.train_packed(be, step, |i, [tokens, targets, starts]| {
            let first = i as u32 * batch + part;
            match source {
                Source::Text { train, batches, .. } => {
                    starts.fill(0);
                    train.batch(batches, step.step, first, tokens, targets)?;
                }
                Source::Pairs { train, .. } => {
                    let first = u64::from(step.step) * per_step + u64::from(first);
                    train.batch(seed, first, context, (tokens, targets, starts))?;
                }
            }
            Ok(())
        })
    }

    fn validate<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        when: When,
    ) -> Result<Option<Validation>, Failure> {
        let tokens = if when == When::Curve { CURVE_TOKENS } else { FINAL_TOKENS };
        let samples = (tokens / self.model.setup().context).max(1);
        let model = &mut self.model;
        let found = match &self.source {
            Source::Text { validation, .. } => {
                evaluate(be, model, validation, samples, Inference::STANDARD)?
            }
            Source::Pairs { validation: Some(examples), .. } => {
                evaluate_pairs(be, model, examples, samples, Inference::STANDARD)?
            }
            Source::Pairs { validation: None, .. } => None,
        };
        Ok(found.map(|(loss, tokens)| Validation {
            loss,
            text: format!("loss {loss:.4} (perplexity {:.2}) over {tokens} tokens", loss.exp()),
            ..Validation::default()
        }))
    }

    fn save<B: Backend<Real = f32>>(&self, be: &B, path: &Path) -> Result<(), Failure> {
        Ok(named::write(path, &self.model.trained(), be, str::to_owned)?)
    }

    fn write<B: Backend<Real = f32>>(&self, be: &B, out: &Path) -> Result<&'static str, Failure> {
        if let (Asked::Finetune(args), Some(digest), Some(_)) =
            (&self.asked, self.base.as_deref(), self.model.setup().adapters)
        {
            let dir = match &self.start {
                Start::Weights(dir) => dir.display().to_string(),
                Start::Fresh => String::new(),
            };
            // The name on Hugging Face, where it came from there.
            let named = args.weights.as_ref().filter(|model| !model.exists());
            let base = named.map_or(dir, |model| model.display().to_string());
            adapter::save(out, be, &self.model, &base, digest)?;
            return Ok("adapter_model.safetensors, adapter_config.json");
        }
        self.config.write_dir(out)?;
        files::save(out, be, &self.model)?;
        self.texts.write(out, &self.config)?;
        Ok("model.safetensors, config.json")
    }

    fn tell<B: Backend<Real = f32>>(&mut self, be: &mut B, _: &Path) -> Result<String, Failure> {
        self.sample(be)
    }
}

/// Identifies a text.
fn digest(part: &Part, hash: &mut Xxh3) -> Result<(), Failure> {
    hash.update(&part.len().to_le_bytes());
    let mut buffer = [0_i32; 4096];
    // All of it, but of a file of many gigabytes only a part of every megabyte.
    let stride = if part.len() <= 1 << 26 { buffer.len() as u64 } else { 1 << 20 };
    let mut from = 0;
    while from < part.len() {
        let n = buffer.len().min(usize::try_from(part.len() - from).unwrap_or(usize::MAX));
        part.copy(from, &mut buffer[..n])?;
        buffer[..n].iter().for_each(|t| hash.update(&t.to_le_bytes()));
        from += stride;
    }
    Ok(())
}

/// Mean loss over the first `windows` windows of a part and the number of its targets; `None` if it
/// has no window.
///
/// # Errors
/// [`Failure`]
pub fn evaluate<B: Backend<Real = f32>, F: Family>(
    be: &mut B,
    model: &mut LanguageModel<F>,
    part: &Part,
    windows: usize,
    inference: Inference,
) -> Result<Option<(f64, usize)>, Failure> {
    let (context, at_once) = (model.setup().context, model.stack.config().chunk);
    let (mut tokens, mut targets) = (vec![0; at_once * context], vec![0; at_once * context]);
    let (mut sum, mut count, mut filled) = (0.0, 0, 0);
    // Of several ranks each takes a part of the windows.
    let mut starts =
        part.windows(context).take(windows).skip(be.rank()).step_by(be.ranks()).peekable();
    // All ranks meet behind the loop, also those that were interrupted.
    while let Some(from) = starts.next().filter(|_| !run::interrupted()) {
        let range = filled * context..(filled + 1) * context;
        part.window(from, &mut tokens[range.clone()], &mut targets[range.clone()])?;
        filled += 1;
        if filled == at_once || starts.peek().is_none() {
            let (tokens, targets) = (&tokens[..range.end], &targets[..range.end]);
            let (loss, n) = model.evaluate(be, tokens, targets, inference)?;
            sum += loss;
            count += n;
            filled = 0;
        }
    }
    let (own, mut sum, mut count) = ([sum, count as f64, 0.0, 0.0], 0.0, 0);
    be.gather(own, &mut |[s, n, ..]| {
        sum += s;
        count += n as usize;
    })?;
    run::go_on()?;
    Ok((count > 0).then(|| (sum / count as f64, count)))
}

/// Mean loss over the targets of at most `samples` examples, taken at equal distances, and the
/// number of the targets.
///
/// # Errors
/// [`Failure`]
pub fn evaluate_pairs<B: Backend<Real = f32>, F: Family>(
    be: &mut B,
    model: &mut LanguageModel<F>,
    examples: &Examples,
    samples: usize,
    inference: Inference,
) -> Result<Option<(f64, usize)>, Failure> {
    let (context, at_once) = (model.setup().context, model.stack.config().chunk);
    let (mut tokens, mut targets) = (vec![0; at_once * context], vec![0; at_once * context]);
    let n = samples.min(examples.len());
    let (mut sum, mut count) = (0.0, 0);
    for first in (0..n).step_by(at_once) {
        run::go_on()?;
        let here = at_once.min(n - first);
        for i in 0..here {
            let range = i * context..(i + 1) * context;
            let example = ((first + i) as u128 * examples.len() as u128 / n as u128) as usize;
            examples.sample(example, &mut tokens[range.clone()], &mut targets[range], &mut [])?;
        }
        let (tokens, targets) = (&tokens[..here * context], &targets[..here * context]);
        let (loss, m) = model.evaluate(be, tokens, targets, inference)?;
        sum += loss;
        count += m;
    }
    Ok((count > 0).then(|| (sum / count as f64, count)))
}
