//! `train` and `plan`: from flags to a run directory.
//!
//! ```text
//! config.json, model.safetensors       the model after the last epoch, under PyTorch's names
//! tokenizer.json                       its vocabulary (or tokenizer.{source,target}.json)
//! best.safetensors                     the weights of the evaluation with the lowest loss
//! held-out.{source,reference,translation}.txt   what was translated at the end, line by line
//! run.json                             the flags of the run
//! metrics.jsonl, loss.svg, bleu.svg    one object per step; the curves
//! step-*.ckpt                          the last two checkpoints
//! ```

use core::fmt::Write as _;
use std::path::Path;

use bdia_core::Layout;
use bdia_core::backend::Backend;
use bdia_core::network::{Outcome, Step};
use bdia_core::plan::{Choice, fit};
use bdia_models::files::write_bytes;
use bdia_models::inference::Inference;
use bdia_models::named::{Named, Saved};
use bdia_models::seq2seq::config::TranslationConfig;
use bdia_models::seq2seq::decode::{Search, Sizes};
use bdia_models::seq2seq::files::{load_weights, save_weights};
use bdia_models::seq2seq::model::{Setup, Shape, Tokens, Translator};
use bdia_models::seq2seq::vocab::{Vocabularies, Vocabulary};
use bdia_models::weights;
use bdia_train::cli::{BackendKind, Flags as _, MethodArgs};
use bdia_train::machine::{self, for_kind};
use bdia_train::trainer::{
    self, Picture, Planned, Settings, Summary, Task, Validation, Verify, When,
};
use bdia_train::{Failure, ranks, report, run};

use crate::batch::{Batch, Batches, chunk_of};
use crate::cli::{Embeddings, Size, TrainArgs};
use crate::data::Dataset;
use crate::translate::{Encoded, Sentence, TOGETHER, dataset, digest, loss, score, translations};

/// The pairs that the flags name, their vocabulary, the model for them.
#[derive(Debug)]
struct Prepared {
    /// Ranks that share the batches to learn from.
    ranks: usize,
    data: Dataset,
    vocabularies: Vocabularies,
    train: Encoded,
    held: Encoded,
    batches: Batches,
    held_batches: Batches,
    config: TranslationConfig,
}

impl Prepared {
    /// A line about the pairs that are left out, if there are any.
    fn too_long(&self) -> String {
        match self.train.too_long + self.held.too_long {
            0 => String::new(),
            n => format!("\n{n} pairs of more than {} tokens are left out", self.config.positions),
        }
    }
}

/// `vocabulary`: a directory that has one; otherwise one is trained.
fn prepare(args: &TrainArgs, vocabulary: Option<&Path>, ranks: usize) -> Result<Prepared, Failure> {
    let data = dataset(args)?;
    let shared = args.embeddings == Embeddings::Shared;
    let vocabularies = match vocabulary {
        Some(dir) => Vocabularies::read(dir, shared)?,
        None => {
            let sources = || data.train.iter().map(|p| p.source.as_str());
            let targets = || data.train.iter().map(|p| p.target.as_str());
            let size = args.vocab as usize;
            if shared {
                Vocabularies {
                    source: Vocabulary::train(sources().chain(targets()), size)?,
                    separate: None,
                }
            } else {
                let separate = Some(Vocabulary::train(targets(), size)?);
                Vocabularies { source: Vocabulary::train(sources(), size)?, separate }
            }
        }
    };
    let longest = args.longest as usize;
    let train = Encoded::new(&data.train, &vocabularies, longest)?;
    let held = Encoded::new(&data.held, &vocabularies, longest)?;
    if train.tokens.is_empty() || held.tokens.is_empty() {
        return Err(Failure::Other(format!(
            "{}: every pair on one side of the split has more than {longest} tokens; use a \
             larger --longest",
            data.name
        )));
    }
    let size = args.config.unwrap_or(if args.data.is_empty() { Size::Mini } else { Size::Base });
    let [layers, heads, width, mlp] = match size {
        Size::Mini => [3, 4, 128, 256],
        Size::Small => [3, 4, 256, 1024],
        Size::Base => [6, 8, 512, 2048],
    };
    let or = |asked: Option<u64>, default: usize| asked.map_or(default, |n| n as usize);
    let layers = or(args.layers, layers);
    let config = TranslationConfig {
        vocab: vocabularies.sizes(),
        shared,
        positions: longest,
        width: or(args.width, width),
        encoder_layers: layers,
        decoder_layers: or(args.decoder_layers, layers),
        heads: or(args.heads, heads),
        mlp: or(args.mlp, mlp),
        dropout: args.dropout,
        bdia: args.run.mode.training()?,
    };
    let tokens = args.batch_tokens as usize;
    let batches = Batches::new(&train.tokens, tokens, longest);
    // Every rank evaluates all of them, in the memory that its part of a batch takes.
    let held_batches = Batches::new(&held.tokens, tokens.div_ceil(ranks), longest);
    Ok(Prepared { ranks, data, vocabularies, train, held, batches, held_batches, config })
}

/// How the flags train a model.
fn setup(args: &TrainArgs, config: &TranslationConfig) -> Result<Setup, Failure> {
    let threads = machine::threads(&args.run.machine);
    let layers = config.encoder_layers.max(config.decoder_layers);
    Ok(Setup {
        dims: config.dims(),
        mode: machine::mode(&args.run.mode, layers, args.run.verify)?,
        gradients: machine::gradients(&args.run.optim, args.run.accumulate),
        blocks_per_step: args.run.mode.blocks_per_step as usize,
        adapters: args.method.adapters()?,
        smoothing: args.smoothing,
        head_rows: machine::rows(args.run.machine.backend).head,
        threads,
        library: machine::library(&args.run.machine, threads),
    })
}

/// The shapes of all batches, and the longest of them.
fn shapes(p: &Prepared, chunk: usize) -> (Vec<Shape>, usize) {
    let longest = p.config.positions;
    let part = |s: Shape| Shape { samples: s.samples.div_ceil(p.ranks), ..s };
    let own = p.batches.shapes(chunk, longest).map(part);
    let all: Vec<_> = own.chain(p.held_batches.shapes(chunk, longest)).collect();
    let most = all.iter().map(|s| s.source).max().unwrap_or(1);
    (all, most)
}

/// A model and how much is done at a time.
#[derive(Debug)]
struct Laid {
    choice: Choice,
    sizes: Sizes,
    model: Translator,
    layout: Layout,
}

/// Lays a model out within a budget, or with the choice of a saved run. Evaluations translate as
/// many sentences at a time as fit into the memory that training takes.
fn lay_out(
    setup: &Setup,
    p: &Prepared,
    (kind, beams): (BackendKind, usize),
    budget: Option<u64>,
    fixed: Option<Choice>,
) -> Result<Laid, Failure> {
    let (all, most) = shapes(p, 1);
    let samples = all.iter().map(|s| s.samples).max().unwrap_or(1);
    let sizes_of = |sentences| Sizes { sentences, beams, longest: setup.dims.longest };
    let make = |choice: Choice| {
        // The choice counts samples of the longest sentences that are there; batches count those
        // that there may be.
        let chunk = (choice.chunk.saturating_mul(most) / setup.dims.longest).max(1);
        let setup = Setup { head_rows: choice.head_rows, ..*setup };
        let shapes = shapes(p, chunk).0;
        let sizes;
        let fits = |training: &Layout,
                    sentences: usize,
                    one: &dyn Fn(&Sizes) -> bdia_core::Result<Layout>| {
            let halves =
                core::iter::successors(Some(sentences), |n| (*n > 1).then(|| n.div_ceil(2)));
            for n in halves {
                if n == 1 || one(&sizes_of(n))?.total() <= training.total() {
                    return Ok::<_, bdia_core::Error>(sizes_of(n));
                }
            }
            Ok(sizes_of(1))
        };
        let (model, mut layout) = for_kind!(kind, B => {
            let (model, training) = Translator::layout::<B>(&setup, &shapes, |_| Ok(Vec::new()))?;
            let one = |s: &Sizes| model.decoding_layout::<B>(s);
            sizes = fits(&training, TOGETHER, &one)?;
            Translator::layout::<B>(&setup, &shapes, |_| Ok(vec![one(&sizes)?]))
        })?;
        ranks::plan(&mut layout, model.exchanged(), p.ranks);
        Ok(((chunk, sizes, model), layout))
    };
    let (choice, (chunk, sizes, model), layout) = match fixed {
        Some(choice) => {
            // What was saved already counts the longest that there may be.
            let chunk = choice.chunk.saturating_mul(setup.dims.longest).div_ceil(most);
            fit(None, core::iter::once(Choice { chunk, ..choice }), make)?
        }
        None => fit(machine::budget(budget), machine::rows(kind).choices(samples, most), make)?,
    };
    Ok(Laid { choice: Choice { chunk, ..choice }, sizes, model, layout })
}

/// The plans of the modes that are not used, for the table.
fn other_plans(
    setup: &Setup,
    p: &Prepared,
    kind: BackendKind,
    choice: Choice,
) -> Result<Vec<(String, Layout)>, Failure> {
    let plan = |(name, mode)| {
        let other = Setup { mode, blocks_per_step: 1, ..*setup };
        Ok((name, lay_out(&other, p, (kind, 1), None, Some(choice))?.layout))
    };
    let layers = setup.dims.layers[0].max(setup.dims.layers[1]);
    machine::other_modes(&setup.mode, layers)?.into_iter().map(plan).collect()
}

/// What is learned: the pairs, and the network.
struct Training {
    args: TrainArgs,
    prepared: Prepared,
    choice: Choice,
    sizes: Sizes,
    model: Translator,
    per_epoch: u32,
    /// The batches of the epoch.
    order: Vec<Batch>,
    /// The sentences that are translated on the way.
    some: Vec<Sentence>,
    /// The sentences that are translated at the end, and their translations.
    end: (Vec<Sentence>, Vec<String>),
}

/// Trains.
///
/// # Errors
/// [`Failure`]; what was saved before stays good.
pub fn train(args: &TrainArgs) -> Result<Summary, Failure> {
    let (args, from) = run::begin(args)?;
    args.method.check_start(args.weights.as_deref(), &args.clone().run())?;
    let mut joined = ranks::join(&args.run.machine)?;
    let (rank, count) = ranks::place(joined.as_ref());
    let vocabulary = if from.is_some() { Some(args.run.out.clone()) } else { args.weights.clone() };
    let prepared = prepare(&args, vocabulary.as_deref(), count)?;
    let setup = setup(&args, &prepared.config)?;
    let per_epoch = prepared.batches.per_epoch().div_ceil(args.run.accumulate as usize) as u32;
    let steps = trainer::steps(per_epoch, args.run.epochs, args.run.steps)?;
    let fits = |c: Choice| c.chunk > 0 && c.head_rows > 0;
    let fixed = trainer::fixed_choice(from.as_ref(), steps, count, fits)?;
    let (kind, beams) = (args.run.machine.backend, args.beams as usize);
    let Laid { choice, sizes, model, layout } =
        lay_out(&setup, &prepared, (kind, beams), args.run.machine.memory, fixed)?;
    if let Some(joined) = &mut joined {
        joined.reserve(&[model.exchanged()]);
    }
    // The table is told by the first rank alone.
    let others = if rank == 0 { other_plans(&setup, &prepared, kind, choice)? } else { Vec::new() };
    let every = |epochs: u64| (epochs as u32).saturating_mul(per_epoch);
    let settings = Settings {
        command: "bdia-translate train",
        program: concat!("bdia-translate ", env!("CARGO_PKG_VERSION")),
        steps,
        epoch: Some(per_epoch),
        seed: args.run.seed,
        optim: args.run.optim.clone(),
        eval_every: every(args.run.eval_interval),
        save_every: every(args.run.checkpoint_interval),
        mode: trainer::mode_name(args.run.mode.mode),
        verify: Verify::of(args.run.verify, args.run.mode.mode),
        items: ["tokens", "tokens"],
        pictures: &[Picture {
            file: "bleu.svg",
            title: "Translations of validation sentences",
            y: "0 to 100",
            scores: &[("bleu", "BLEU", 1.0), ("exact", "exactly right (%)", 100.0)],
        }],
    };
    let some = prepared.held.sentences(args.translate as usize);
    let task = Training {
        args: args.clone(),
        prepared,
        choice,
        sizes,
        model,
        per_epoch,
        order: Vec::new(),
        some,
        end: Default::default(),
    };
    trainer::train(args, settings, Planned { choice, layout, others }, task, from, joined)
}

impl Task for Training {
    const DATA: &'static str = "the data, its vocabulary, or the model whose adapters are trained,";

    fn describe(&self) -> String {
        let (p, c) = (&self.prepared, &self.prepared.config);
        let (adapters, [parameters, trained]) =
            (self.model.setup().adapters.is_some(), self.parameters());
        format!(
            "{parameters} parameters{}, {} + {} blocks, width {}, vocabulary {}, {} \
             thread(s); {} pairs to learn from, {} held out, of {}{}",
            trainer::adapters(adapters, trained),
            c.encoder_layers,
            c.decoder_layers,
            c.width,
            if c.shared {
                c.vocab[0].to_string()
            } else {
                format!("{} and {}", c.vocab[0], c.vocab[1])
            },
            self.model.setup().threads,
            p.train.tokens.len(),
            p.held.tokens.len(),
            p.data.name,
            p.too_long(),
        )
    }

    fn digest(&self) -> Result<u64, Failure> {
        let data = digest(&self.prepared.data, &self.prepared.vocabularies)?;
        trainer::digest(data, &self.args.method, self.args.weights.as_deref())
    }

    fn start<B: Backend<Real = f32>>(&mut self, be: &mut B, resumed: bool) -> Result<(), Failure> {
        // What is frozen is in no checkpoint.
        if resumed && self.model.setup().adapters.is_none() {
            return Ok(());
        }
        self.model.initialize(be, self.args.run.seed)?;
        if let Some(dir) = &self.args.weights {
            load_weights(&dir.join(weights::FILE), be, &self.model)
                .map_err(MethodArgs::unreadable)?;
        }
        Ok(())
    }

    fn record(&self, out: &Path) -> Result<(), Failure> {
        self.prepared.config.write_dir(out)?;
        Ok(self.prepared.vocabularies.write(out)?)
    }

    fn parameters(&self) -> [usize; 2] {
        [self.model.parameters(), self.model.trained().iter().map(Named::len).sum()]
    }

    fn saved(&self) -> Vec<Saved> {
        self.model.saved()
    }

    fn prepare(&mut self) {
        self.model.prepare(&shapes(&self.prepared, 1).0);
    }

    fn choose(&mut self, step: u32) {
        if self.order.is_empty() || step.is_multiple_of(self.per_epoch) {
            let epoch = step / self.per_epoch;
            self.order = self.prepared.batches.epoch(self.args.run.seed, epoch);
        }
    }

    fn step<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        step: &Step,
    ) -> Result<Outcome, Failure> {
        let (tokens, longest) = (&self.prepared.train.tokens, self.prepared.config.positions);
        let each = self.args.run.accumulate as usize;
        let first = (step.step % self.per_epoch) as usize * each;
        let batches: Vec<(Vec<&Tokens>, usize)> = (self.order[first..].iter().take(each))
            .map(|b| {
                let pairs = b.members.iter().map(|&i| &tokens[i as usize]).collect();
                (pairs, chunk_of(self.choice.chunk, longest, b.longest))
            })
            .collect();
        let batches: Vec<_> = batches.iter().map(|(pairs, n)| (pairs.as_slice(), *n)).collect();
        Ok(self.model.train(be, step, &batches)?)
    }

    fn validate<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        when: When,
    ) -> Result<Option<Validation>, Failure> {
        let (p, at_once) = (&self.prepared, (self.choice.chunk, self.prepared.config.positions));
        let (tokens, batches) = (&p.held.tokens, &p.held_batches);
        let loss = loss(be, &mut self.model, tokens, batches, at_once, Inference::STANDARD)?.0;
        let mut v = Validation { loss, text: format!("loss {loss:.4}"), ..Validation::default() };
        let all;
        let (sentences, beams) = match when {
            When::Curve => (&self.some, 1),
            When::End => {
                all = p.held.sentences(usize::MAX);
                (&all, self.args.beams as usize)
            }
        };
        if sentences.is_empty() {
            return Ok(Some(v));
        }
        let sources: Vec<_> = sentences.iter().map(|s| s.tokens.as_slice()).collect();
        let search = Search { beams, alpha: 0.6, inference: Inference::STANDARD };
        let sizes = Sizes { beams, ..self.sizes };
        let vocabulary = p.vocabularies.target();
        let found = translations(be, &self.model, vocabulary, &sources, &sizes, &search)?;
        let s = score(sentences, &found);
        v.scores = [("bleu", s.bleu), ("chrf", s.chrf), ("exact", s.exact)]
            .map(|(name, score)| (name.to_string(), score))
            .into();
        // Writing to a string does not fail.
        let _ = write!(
            v.text,
            ", {} sentences: BLEU {:.2}, chrF {:.2}, exactly right {:.2} %",
            sentences.len(),
            s.bleu,
            s.chrf,
            100.0 * s.exact
        );
        if when == When::End {
            self.end = (sentences.clone(), found);
        }
        Ok(Some(v))
    }

    fn save<B: Backend<Real = f32>>(&self, be: &B, path: &Path) -> Result<(), Failure> {
        Ok(save_weights(path, be, &self.model)?)
    }

    fn write<B: Backend<Real = f32>>(&self, be: &B, out: &Path) -> Result<&'static str, Failure> {
        self.prepared.config.write_dir(out)?;
        save_weights(&out.join(weights::FILE), be, &self.model)?;
        Ok("model.safetensors, best.safetensors, config.json, tokenizer*.json, held-out.*.txt")
    }

    fn tell<B: Backend<Real = f32>>(&mut self, _: &mut B, out: &Path) -> Result<String, Failure> {
        let (all, found) = &self.end;
        write_lines(out, "source", all.iter().map(|s| s.source.as_str()))?;
        let references = all.iter().filter_map(|s| s.references.first());
        write_lines(out, "reference", references.map(String::as_str))?;
        write_lines(out, "translation", found.iter().map(String::as_str))?;
        let mut text = String::new();
        for (sentence, translation) in all.iter().zip(found).take(3) {
            let right = if sentence.references.contains(translation) {
                "right"
            } else {
                "not a known translation"
            };
            let _ = writeln!(text, "  {}\n    {translation}  ({right})", sentence.source);
        }
        Ok(text)
    }
}

fn write_lines<'a>(
    out: &Path,
    what: &str,
    lines: impl Iterator<Item = &'a str>,
) -> Result<(), Failure> {
    let mut text = String::new();
    for line in lines {
        text += line;
        text.push('\n');
    }
    Ok(write_bytes(&out.join(format!("held-out.{what}.txt")), text.as_bytes())?)
}

/// `plan`.
///
/// # Errors
/// [`Failure`]
pub fn plan(args: &TrainArgs) -> Result<(), Failure> {
    if args.run.resume.is_some() {
        return Err(Failure::Other(
            "plan lays out a new run; leave --resume out and give the run's flags".into(),
        ));
    }
    let prepared = prepare(args, args.weights.as_deref(), 1)?;
    let setup = setup(args, &prepared.config)?;
    let kind = args.run.machine.backend;
    let laid =
        lay_out(&setup, &prepared, (kind, args.beams as usize), args.run.machine.memory, None)?;
    let mut plans = vec![(trainer::mode_name(args.run.mode.mode), laid.layout.clone())];
    plans.extend(other_plans(&setup, &prepared, kind, laid.choice)?);
    let c = &prepared.config;
    report::tell!(
        "{} parameters; chunks of {} sentence(s) of {} tokens; {} sentences translated at a \
         time{}\n",
        laid.model.parameters(),
        laid.choice.chunk,
        c.positions,
        laid.sizes.sentences,
        prepared.too_long(),
    );
    report::tell!("{}", machine::memory_table(&plans, None));
    for (stack, last) in ["encoder", "decoder"].into_iter().zip(laid.model.last_steps()) {
        if let Some(last) = last {
            report::tell!("{stack}: {last}");
        }
    }
    if args.run.json {
        let json = serde_json::json!({
            "parameters": laid.model.parameters(), "plan_bytes": laid.layout.total(),
        });
        report::tell!("{json}");
    }
    Ok(())
}
