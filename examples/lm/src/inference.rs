//! `eval` and `generate`: what does not train.

use core::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bdia_core::backend::Backend;
use bdia_core::layers::Gradients;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::update::{FloatGamma, Gamma, Policy, Sign};
use bdia_core::{Error, Grid, Layout};
use bdia_models::for_family;
use bdia_models::inference::Inference;
use bdia_models::input;
use bdia_models::language::adapter::Adapter;
use bdia_models::language::decode::{Decoder, Decoding, How, Sizes};
use bdia_models::language::model::{LanguageModel, Setup};
use bdia_models::language::{Config, Family, files};
use bdia_models::named::Adapters;
use bdia_models::pretrained::{self, Pretrained};
use bdia_models::sample::Sampler;
use bdia_models::search::Length;
use bdia_models::tokenizer::Tokenizer;
use bdia_train::Failure;
use bdia_train::cli::{self, BackendKind, MachineArgs};
use bdia_train::directory::{Claim, Directory};
use bdia_train::machine::{self, Work, for_kind};
use bdia_train::report::{self};
use bdia_train::run;
use serde::Deserialize;
use serde_json::json;

use crate::cli::{
    EvalArgs, GenerateArgs, MergeArgs, PairArgs, SpecialTokens, TaskKind, context_of,
};
use crate::data::{Corpus, DataError, Part, TokenType, start_token};
use crate::hub;
use crate::pairs::{Examples, begun};
use crate::train::{self, Texts, end_tokens};

/// What a network that is not trained has besides its parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Adapters.
    pub adapters: Option<Adapters>,
    /// Blocks that the stack steps over at once.
    pub blocks_per_step: usize,
    /// Whether samples may have several texts.
    pub packed: bool,
}

/// Nothing.
const PLAIN: Shape = Shape { adapters: None, blocks_per_step: 1, packed: false };

/// A model laid out for inference: a stack in mode `bdia` of one chunk, which both float and grid
/// can use.
pub(crate) fn lay_out<C: Config>(
    config: &C,
    machine: &MachineArgs,
    context: usize,
    batch: usize,
    choice: Option<Choice>,
    frac_bits: u32,
    shape: Shape,
) -> Result<(LanguageModel<C::Dims>, Layout), Failure> {
    let threads = machine::threads(machine);
    let setup = Setup {
        dims: config.dims(),
        batch,
        accumulate: 1,
        context,
        mode: Mode::Bdia {
            grid: Grid::new(frac_bits)?,
            gamma: Policy::fixed(Gamma::new(1, Sign::Plus)?),
            verify: false,
        },
        gradients: Gradients::None,
        blocks_per_step: shape.blocks_per_step,
        adapters: shape.adapters,
        packed: shape.packed,
        smoothing: 0.0,
        threads,
        library: machine::library(machine, threads),
    };
    let (_, model, layout) = machine::lay_out(&setup, machine.backend, 1, machine.memory, choice)?;
    Ok((model, layout))
}

pub(crate) fn inference(kind: cli::Inference, gamma: f64) -> Result<Inference, Failure> {
    Ok(match kind {
        cli::Inference::Float => Inference::Float(FloatGamma::new(gamma, Sign::Plus)?),
        cli::Inference::Quantized if gamma == 0.0 => Inference::Quantized(None),
        cli::Inference::Quantized => Inference::constant(Gamma::from_value(gamma, Sign::Plus)?),
    })
}

fn frac_bits<C: Config>(config: &C, asked: Option<u32>) -> u32 {
    asked.or(config.training().map(|b| b.frac_bits)).unwrap_or(14)
}

/// What the flags of a run say of its data, whether it is one of `train` or of `finetune`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct RunData {
    data: Option<PathBuf>,
    validation: Option<PathBuf>,
    task: Option<TaskKind>,
    #[serde(flatten)]
    pub pairs: PairArgs,
    token_type: Option<TokenType>,
    /// What `<|endoftext|>` within a text is.
    pub special_tokens: Option<SpecialTokens>,
    /// Tokens of a sample.
    context: Option<usize>,
}

/// That of the run that trained the adapters, else of the one that trained the model; nothing where
/// neither directory is that of a run.
pub(crate) fn run_data(weights: &Path, adapter: Option<&Path>) -> Result<RunData, Failure> {
    let mut places = adapter.into_iter().chain([weights]);
    let of_run = places.find(|dir| dir.join("run.json").exists());
    of_run.map_or_else(|| Ok(RunData::default()), run::saved)
}

/// A model's weights, with adapters merged into them where there are some.
pub(crate) fn load<B: Backend<Real = f32>, F: Family>(
    path: &Path,
    adapter: Option<&Path>,
    be: &mut B,
    model: &LanguageModel<F>,
) -> Result<(), Failure> {
    // Whether they fit is known before the weights are read.
    let adapter = adapter.map(|dir| Adapter::open(dir, model)).transpose()?;
    let digest = pretrained::load(path, be, model)?;
    Ok(adapter.map_or(Ok(()), |a| a.merge(be, model, &digest))?)
}

/// A model and its adapters as one model.
///
/// # Errors
/// [`Failure`], among them a directory that has a model already.
pub fn merge(args: &MergeArgs) -> Result<(), Failure> {
    let opened = hub::open(&args.weights)?;
    write_model(&opened, Some(&args.adapter), &args.out, args.replace)
}

/// The CPU, for work that is mostly copying.
pub(crate) fn one_thread() -> MachineArgs {
    MachineArgs { threads: Some(1), ..MachineArgs::on(BackendKind::Cpu) }
}

/// A model that is only read and written.
pub(crate) fn lay_out_plain<C: Config>(
    config: &C,
) -> Result<(LanguageModel<C::Dims>, Layout), Failure> {
    let one = Some(Choice::new(1, 1));
    lay_out(config, &one_thread(), 1, 1, one, frac_bits(config, None), PLAIN)
}

/// Writes a model, with adapters merged into it where there are some, as a directory in Hugging
/// Face's layout.
pub(crate) fn write_model(
    opened: &Pretrained,
    adapter: Option<&Path>,
    out: &Path,
    replace: bool,
) -> Result<(), Failure> {
    Directory::check(&Claim { out, named: true, replace })?;
    for_family!(&opened.config, config => {
        let (model, layout) = lay_out_plain(config)?;
        let work = Writing { opened, adapter, out, replace, config, model };
        machine::run(&one_thread(), 1, &layout, work)
    })
}

struct Writing<'a, C: Config> {
    opened: &'a Pretrained,
    adapter: Option<&'a Path>,
    out: &'a Path,
    replace: bool,
    config: &'a C,
    model: LanguageModel<C::Dims>,
}

impl<C: Config> Work for Writing<'_, C> {
    fn on<B: Backend<Real = f32>>(self, be: &mut B, _: usize) -> Result<(), Failure> {
        let (opened, out) = (self.opened, self.out);
        load(&opened.path, self.adapter, be, &self.model)?;
        let mut directory = Directory::claim(&Claim { out, named: true, replace: self.replace })?;
        let dir = directory.path();
        self.config.write_dir(dir)?;
        files::save(dir, be, &self.model)?;
        Texts { tokenizer: opened.tokenizer.clone(), implied: opened.implied }
            .write(dir, self.config)?;
        directory.show()?;
        let what = if self.adapter.is_some() { "the model with its adapters" } else { "the model" };
        report::tell!("{}: {what}", out.display());
        Ok(())
    }
}

/// Loss and perplexity of all of `--data`, or of what the run validated on. Text is measured over
/// sequential windows.
///
/// # Errors
/// [`Failure`]
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let opened = hub::open(&args.weights)?;
    for_family!(opened.config, config => {
        eval_on(args, &opened.path, &config, opened.tokenizer, opened.implied)
    })
}

fn eval_on<C: Config>(
    args: &EvalArgs,
    path: &Path,
    config: &C,
    tokenizer: Option<Tokenizer>,
    implied: bool,
) -> Result<(), Failure> {
    struct Eval<'a, F: Family> {
        args: &'a EvalArgs,
        path: &'a Path,
        model: LanguageModel<F>,
        part: Data,
        name: String,
    }
    /// What is evaluated.
    enum Data {
        Text(Part),
        Pairs(Examples),
    }
    impl<F: Family> Work for Eval<'_, F> {
        fn on<B: Backend<Real = f32>>(mut self, be: &mut B, _: usize) -> Result<(), Failure> {
            load(self.path, self.args.adapter.as_deref(), be, &self.model)?;
            let inference = inference(self.args.inference, self.args.gamma.unwrap_or(0.0))?;
            let (model, all) = (&mut self.model, usize::MAX);
            let (found, tokens) = match &self.part {
                Data::Text(part) => (train::evaluate(be, model, part, all, inference)?, part.len()),
                Data::Pairs(pairs) => {
                    (train::evaluate_pairs(be, model, pairs, all, inference)?, pairs.targets())
                }
            };
            let Some((loss, tokens)) = found else {
                return Err(Failure::Other(format!(
                    "{}: {tokens} tokens to evaluate, expected more than a context of {}; use a \
                     smaller --context",
                    self.name,
                    self.model.setup().context
                )));
            };
            report::tell!(
                "loss {loss:.4}, perplexity {:.2}, over {tokens} tokens of {}",
                loss.exp(),
                self.name
            );
            if self.args.json {
                report::tell!(
                    "{}",
                    json!({"loss": loss, "perplexity": loss.exp(), "tokens": tokens})
                );
            }
            Ok(())
        }
    }
    let mut run = run_data(path, args.adapter.as_deref())?;
    let tokenizer = tokenizer.map(|t| args.text.of(t, run.special_tokens));
    let texts = Texts { tokenizer, implied };
    let (vocab, positions) = (config.dims().vocab(), config.dims().positions());
    let asked = context_of(args.context, positions)?;
    let context = asked.or(run.context).unwrap_or(positions);
    // Other data than the run's is read as the flags say.
    if let Some(data) = args.data.clone() {
        run = RunData {
            validation: Some(data),
            task: args.task,
            pairs: PairArgs {
                format: args.pairs.format.or(run.pairs.format),
                ..args.pairs.clone()
            },
            token_type: args.token_type,
            ..RunData::default()
        };
    }
    let has_template = texts.tokenizer.as_ref().is_some_and(|t| t.chat().is_some());
    let reading = run.pairs.reading(run.task.unwrap_or(TaskKind::Text), has_template);
    let tokenizer = texts.tokenizer.as_ref();
    let (part, name, context, windows) = match (&run.validation, reading) {
        (Some(path), Some(reading)) => {
            let mut pairs = Examples::of(path, &reading, &texts, config)?;
            let context = asked.or(run.context);
            let context = context.unwrap_or_else(|| pairs.longest().min(positions));
            pairs.fit(context, false)?;
            let (cut, dropped) = pairs.truncated();
            if cut + dropped > 0 {
                report::note!(
                    "{cut} example(s) cut to {context} tokens, {dropped} dropped, whose prompt \
                     has no room"
                );
            }
            let windows = pairs.len();
            (Data::Pairs(pairs), path.display().to_string(), context, windows)
        }
        (Some(path), None) => {
            let (part, note) = Corpus::whole(path, run.token_type, tokenizer, vocab)?;
            note.iter().for_each(|note| report::note!("{note}"));
            let windows = part.windows(context).len().max(1);
            (Data::Text(part), path.display().to_string(), context, windows)
        }
        (None, Some(_)) => {
            let what = "the run had no data to validate on; name some with --task and --data";
            return Err(Failure::Other(format!("{}: {what}", args.weights.display())));
        }
        (None, None) => {
            let data = run.data.as_deref();
            let corpus = Corpus::open(data, run.token_type, tokenizer, vocab, context)?;
            let windows = corpus.validation.windows(context).len().max(1);
            (
                Data::Text(corpus.validation),
                format!("{} (validation part)", corpus.name),
                context,
                windows,
            )
        }
    };
    let batch = (args.batch as usize).min(windows);
    let (model, layout) = lay_out(
        config,
        &args.machine,
        context,
        batch,
        None,
        frac_bits(config, args.frac_bits),
        PLAIN,
    )?;
    let threads = machine::threads(&args.machine);
    machine::run(&args.machine, threads, &layout, Eval { args, path, model, part, name })
}

/// The texts to go on from.
fn prompts(args: &GenerateArgs) -> Result<Vec<String>, Failure> {
    let Some(path) = &args.prompts else { return Ok(vec![args.prompt.clone()]) };
    let wrong = |what: String| Failure::Other(format!("{}: {what}", path.display()));
    let text = input::read_text(path, 1 << 30).map_err(DataError::from)?;
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    if lines.is_empty() {
        Err(wrong("empty, expected one prompt in each line".into()))
    } else {
        Ok(lines)
    }
}

/// Tells of prompts that are longer than the model's context: it sees only their ends.
pub(crate) fn tell_long(prompts: &[Vec<i32>], context: usize) {
    let mut long = prompts.iter().map(Vec::len).enumerate().filter(|&(_, n)| n > context);
    if let Some((first, tokens)) = long.next() {
        report::note!(
            "{} of {} prompt(s) have more tokens than the context, which is {context}: the model \
             sees only the last {context} of each; prompt {} has {tokens}",
            1 + long.count(),
            prompts.len(),
            first + 1
        );
    }
}

/// A model and its decoder, and their plan.
pub(crate) type Laid<F> = (LanguageModel<F>, Decoder<F>, Layout);

/// Lays a model out for decoding: fewer prompts at a time where the budget, or what the machine
/// has, is less.
pub(crate) fn lay_out_decoder<C: Config>(
    config: &C,
    machine: &MachineArgs,
    mut sizes: Sizes,
) -> Result<Laid<C::Dims>, Failure> {
    let one = Some(Choice::new(1, 1));
    // Tables of angles end where the model's samples do.
    let turns = config.dims().angles().iter().any(Option::is_some);
    let context = if turns { sizes.context } else { 1 };
    let (model, own) = lay_out(config, machine, context, 1, one, frac_bits(config, None), PLAIN)?;
    let available =
        (machine.backend != BackendKind::Cuda).then(machine::available_memory).flatten();
    let budget = machine.memory.or(available);
    loop {
        let (decoder, mut layout) =
            for_kind!(machine.backend, B => Decoder::layout::<B>(&model, &sizes))?;
        match budget {
            Some(budget) if layout.total() as u64 > budget && sizes.prompts > 1 => {
                sizes.prompts = sizes.prompts.div_ceil(2);
            }
            Some(budget) if layout.total() as u64 > budget => {
                let budget = usize::try_from(budget).unwrap_or(usize::MAX);
                return Err(Error::Budget { budget, minimum: layout.total() }.into());
            }
            _ => {
                layout.cover(&own);
                return Ok((model, decoder, layout));
            }
        }
    }
}

/// What follows each prompt, with a bar that shows how far it is; Ctrl-C ends all texts.
pub(crate) fn decode<B: Backend<Real = f32>, F: Family>(
    be: &mut B,
    decoder: &Decoder<F>,
    prompts: &[Vec<i32>],
    decoding: &Decoding,
) -> Result<Vec<Vec<i32>>, Failure> {
    run::catch_signals();
    let bar = run::bar("prompt", prompts.len() as u64, 0);
    let found = decoder.decode(be, prompts, decoding, |progress| {
        bar.set_position(progress.finished as u64);
        bar.set_message(format!("{} tokens", progress.taken));
        if run::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    bar.finish_and_clear();
    Ok(found)
}

/// Text from a model.
///
/// # Errors
/// [`Failure`]
pub fn generate(args: &GenerateArgs) -> Result<(), Failure> {
    let opened = hub::open(&args.weights)?;
    let run = run_data(&opened.path, args.adapter.as_deref())?;
    let tokenizer = args.text.of(shown(&opened)?, run.special_tokens);
    for_family!(opened.config, config => {
        generate_on(args, &opened.path, &config, tokenizer, run.context)
    })
}

/// The tokenizer of a model whose tokens are to be shown as text.
pub(crate) fn shown(opened: &Pretrained) -> Result<Tokenizer, Failure> {
    let (found, path) = (opened.config.vocab(), opened.path.display());
    match &opened.tokenizer {
        Some(t) if pretrained::fits(t, found) => Ok(t.clone()),
        Some(t) => Err(Failure::Other(format!(
            "{path}: the vocabulary has {found} tokens, expected at least the {} of its \
             tokenizer: they cannot be shown as text",
            t.vocab()
        ))),
        None => Err(Failure::Other(format!(
            "{path}: the model has no tokenizer: expected tokenizer.json, or vocab.json and \
             merges.txt, in its directory"
        ))),
    }
}

fn generate_on<C: Config>(
    args: &GenerateArgs,
    path: &Path,
    config: &C,
    tokenizer: Tokenizer,
    context: Option<usize>,
) -> Result<(), Failure> {
    struct Generate<'a, F: Family> {
        args: &'a GenerateArgs,
        path: &'a Path,
        model: LanguageModel<F>,
        decoder: Decoder<F>,
        tokenizer: Tokenizer,
        texts: Vec<String>,
        prompts: Vec<Vec<i32>>,
        decoding: Decoding,
    }
    impl<F: Family> Work for Generate<'_, F> {
        fn on<B: Backend<Real = f32>>(self, be: &mut B, _: usize) -> Result<(), Failure> {
            let args = self.args;
            load(self.path, args.adapter.as_deref(), be, &self.model)?;
            let found = decode(be, &self.decoder, &self.prompts, &self.decoding)?;
            let mut all = Vec::new();
            for (prompt, tokens) in self.texts.iter().zip(found) {
                let tokens: Vec<u32> = tokens.into_iter().map(|t| t as u32).collect();
                // What goes on keeps the space before it.
                let text = self.tokenizer.decode_bytes(&tokens);
                let text = String::from_utf8_lossy(&text).into_owned();
                match args.prompts {
                    None => report::tell!("{prompt}{text}"),
                    Some(_) => {
                        report::tell!("{}", text.split_whitespace().collect::<Vec<_>>().join(" "))
                    }
                }
                all.push(json!({"prompt": prompt, "text": text, "tokens": tokens}));
            }
            if args.json {
                let json =
                    if args.prompts.is_some() { json!({"texts": all}) } else { all.swap_remove(0) };
                report::tell!("{json}");
            }
            // What there is has been told.
            run::go_on()
        }
    }
    let texts = prompts(args)?;
    let lines: Vec<_> = texts.iter().map(String::as_str).collect();
    let mut prompts: Vec<Vec<i32>> = (tokenizer.encode_all(&lines).into_iter())
        .map(|tokens| begun(&tokenizer, tokens).into_iter().map(|t| t as i32).collect())
        .collect();
    // An empty prompt is the start of a document.
    let start = start_token(&tokenizer).unwrap_or(0) as i32;
    prompts.iter_mut().filter(|p| p.is_empty()).for_each(|p| p.push(start));
    let decoding = Decoding {
        how: match args.beams {
            Some(_) => How::Search(Length::Power(args.length_penalty.unwrap_or(1.0))),
            None => {
                let (temperature, top_k, top_p) =
                    (args.temperature, args.top_k as usize, args.top_p);
                How::Sample(Sampler { temperature, top_k, top_p }, args.seed)
            }
        },
        tokens: args.tokens as usize,
        ends: end_tokens(config, &tokenizer),
        no_repeat: args.no_repeat_ngram as usize,
        inference: inference(args.inference, args.gamma.unwrap_or(0.0))?,
    };
    let positions = config.dims().positions();
    let context = context.unwrap_or(positions).min(positions);
    tell_long(&prompts, context);
    let beams = args.beams.unwrap_or(1) as usize;
    let sizes = Sizes::of(&prompts, args.batch as usize, beams, decoding.tokens, context);
    let (model, decoder, layout) = lay_out_decoder(config, &args.machine, sizes)?;
    let threads = machine::threads(&args.machine);
    let work = Generate { args, path, model, decoder, tokenizer, texts, prompts, decoding };
    machine::run(&args.machine, threads, &layout, work)
}
