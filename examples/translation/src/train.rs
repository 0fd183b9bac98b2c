//! `train` and `plan`: from flags to a run directory.
//!
//! ```text
//! config.json, model.safetensors       the model after the last epoch, under PyTorch's names
//! tokenizer.json                       its vocabulary (or tokenizer.source.json and tokenizer.target.json)
//! best.safetensors                     the weights of the evaluation with the lowest loss
//! held-out.{source,reference,translation}.txt   what was translated at the end, line by line
//! run.json                             the flags of the run
//! metrics.jsonl, loss.svg, bleu.svg    one object per step; the curves
//! step-*.ckpt                          the last two checkpoints
//! ```

use core::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use bdia_core::backend::Backend;
use bdia_core::plan::{Choice, fit};
use bdia_core::{Gamma, Grid, Layout, Sign, stack};
use bdia_models::files::{FileError, write_bytes};
use bdia_models::seq2seq::config::TranslationConfig;
use bdia_models::seq2seq::decode::{Search, Sizes};
use bdia_models::seq2seq::files::{load_weights, save_weights};
use bdia_models::seq2seq::model::{Inference, Setup, Shape, Step, Tokens, Translator};
use bdia_models::seq2seq::vocab::{Vocabularies, Vocabulary};
use bdia_models::weights;
use bdia_train::alloc::{Counting, peak_rss_bytes};
use bdia_train::checkpoint::{self, Header};
use bdia_train::cli::{BackendKind, Mode, name_of};
use bdia_train::machine::{self, Work, for_kind};
use bdia_train::report::{self, Chart, Metrics, Record, Series};
use bdia_train::{Failure, ranks, run};
use serde::{Deserialize, Serialize};

use crate::batch::{Batches, chunk_of};
use crate::cli::{Embeddings, Size, TrainArgs};
use crate::data::Dataset;
use crate::translate::{Encoded, Sentence, TOGETHER, dataset, digest, loss, score, translations};

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Steps done, from 1.
    pub step: u64,
    /// Training loss of the step, with label smoothing.
    pub loss: f64,
    /// Its learning rate.
    pub lr: f64,
    /// Norm of its gradient.
    pub grad_norm: f64,
    /// Speed: tokens of both sides, without padding.
    pub tokens_per_s: f64,
    /// Held-out loss without smoothing, where measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
    /// BLEU of some held-out sentences, where measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bleu: Option<f64>,
    /// Share of them that are exactly right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact: Option<f64>,
}

impl Record for Metric {
    fn step(&self) -> u64 {
        self.step
    }
}

/// What a run ended with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Held-out loss after the last epoch, nats a token.
    pub val_loss: f64,
    /// The lowest of all evaluations.
    pub best_val_loss: f64,
    /// BLEU of all held-out sentences.
    pub bleu: f64,
    /// chrF of them.
    pub chrf: f64,
    /// Share of them whose translation is exactly right.
    pub exact: f64,
    /// How many they are.
    pub sentences: usize,
    /// Mean training loss of the last epoch's steps.
    pub loss: f64,
    /// Rebuilt values of both stacks that differed, with `--verify` in mode bdia.
    pub verify_mismatches: Option<u64>,
    /// Largest error of rebuilding, with `--verify` without a grid.
    pub rebuild_error: Option<f64>,
    /// Speed of training.
    pub tokens_per_s: f64,
    /// Pairs to learn from.
    pub pairs: usize,
    /// Pairs that were too long.
    pub too_long: usize,
    /// Parameters.
    pub parameters: usize,
    /// Bytes of the plan.
    pub plan_bytes: usize,
    /// Bytes of activations, their gradients, side bits and workspace.
    pub activation_bytes: usize,
    /// Measured peak of what the plan covers.
    pub peak_bytes: usize,
    /// Peak of the whole process.
    pub peak_rss_bytes: Option<u64>,
    /// Optimizer steps.
    pub steps: u32,
    /// The directory.
    pub out: std::path::PathBuf,
}

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
    /// A number that changes with the pairs and with the vocabulary.
    fn digest(&self) -> Result<u64, Failure> {
        digest(&self.data, &self.vocabularies)
    }

    fn tell_too_long(&self) {
        let too_long = self.train.too_long + self.held.too_long;
        if too_long > 0 {
            report::note!(
                "{too_long} pairs of more than {} tokens are left out",
                self.config.positions
            );
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
            "{}: every pair on one side of the split has more than {longest} tokens; use a larger --longest",
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
        bdia: args.mode.training()?,
    };
    let tokens = args.batch_tokens as usize;
    let batches = Batches::new(&train.tokens, tokens, longest);
    // Every rank evaluates all of them, in the memory that its part of a batch takes.
    let held_batches = Batches::new(&held.tokens, tokens.div_ceil(ranks), longest);
    Ok(Prepared { ranks, data, vocabularies, train, held, batches, held_batches, config })
}

/// How the flags train a model.
fn setup(args: &TrainArgs, config: &TranslationConfig) -> Result<Setup, Failure> {
    let threads = machine::threads(&args.machine);
    Ok(Setup {
        dims: config.dims(),
        mode: machine::stack_mode(&args.mode, config.encoder_layers.max(config.decoder_layers)),
        grid: machine::grid(&args.mode)?,
        gamma: args.mode.gamma()?,
        rule: Some(args.optim.rule()),
        fused: args.optim.clip == 0.0,
        verify: args.verify,
        smoothing: args.smoothing,
        head_rows: machine::rows(args.machine.backend).head,
        threads,
        library: machine::library(&args.machine, threads),
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
        ranks::plan(&mut layout, &model.exchanged(), p.ranks);
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
    use stack::Mode as M;
    let every = machine::checkpoint_every(None, setup.dims.layers[0].max(setup.dims.layers[1]));
    let mut plans = Vec::new();
    for (name, mode) in [
        ("bdia".to_string(), M::Bdia),
        ("standard".into(), M::Standard),
        (format!("checkpoint {every}"), M::Checkpoint { every }),
    ] {
        if mode == setup.mode {
            continue;
        }
        let grid = if mode == M::Bdia { Some(Grid::new(14)?) } else { None };
        let other =
            Setup { mode, grid, gamma: Gamma::new(0.5, Sign::Random)?, verify: false, ..*setup };
        plans.push((name, lay_out(&other, p, (kind, 1), None, Some(choice))?.layout));
    }
    Ok(plans)
}

/// Everything that is known before memory is allocated.
struct Run<'a> {
    args: TrainArgs,
    prepared: Prepared,
    laid: Laid,
    others: Vec<(String, Layout)>,
    /// The checkpoint to go on from.
    from: Option<(std::path::PathBuf, Header)>,
    /// Where the summary goes; none if Ctrl-C stopped the run.
    summary: &'a mut Option<Summary>,
}

/// Trains. The summary is `None` where Ctrl-C stopped the run.
///
/// # Errors
/// [`Failure`]; what was saved before stays good.
pub fn train(args: &TrainArgs) -> Result<Option<Summary>, Failure> {
    let (args, from) = run::begin(args)?;
    let mut joined = ranks::join(&args.machine)?;
    let (rank, count) = ranks::place(joined.as_ref());
    let vocabulary = if from.is_some() { Some(args.out.clone()) } else { args.weights.clone() };
    let prepared = prepare(&args, vocabulary.as_deref(), count)?;
    let setup = setup(&args, &prepared.config)?;
    let steps = steps(&args, &prepared)?;
    args.optim.schedule(steps).check()?;
    let fixed = match &from {
        Some((path, h)) => {
            if h.step > steps || h.chunk == 0 || h.head_rows == 0 {
                let what = format!(
                    "step {} and chunks of {} sentences do not fit this run",
                    h.step, h.chunk
                );
                return Err(Failure::Run { path: path.clone(), what });
            }
            (h.ranks == count).then_some(Choice { chunk: h.chunk, head_rows: h.head_rows })
        }
        None => None,
    };
    let (kind, beams) = (args.machine.backend, args.beams as usize);
    let laid = lay_out(&setup, &prepared, (kind, beams), args.machine.memory, fixed)?;
    if let Some(joined) = &mut joined {
        joined.reserve(&laid.model.exchanged());
    }
    // The table is told by the first rank alone.
    let others =
        if rank == 0 { other_plans(&setup, &prepared, kind, laid.choice)? } else { Vec::new() };
    let mut summary = None;
    let layout = laid.layout.clone();
    let place = args.machine.clone();
    let work = Run { args, prepared, laid, others, from, summary: &mut summary };
    machine::run_on(&place, setup.threads, &layout, joined, work)?;
    Ok(summary)
}

fn steps(args: &TrainArgs, p: &Prepared) -> Result<u32, Failure> {
    (p.batches.per_epoch() as u64)
        .checked_mul(args.epochs)
        .and_then(|n| u32::try_from(n).ok())
        .filter(|&n| n < u32::MAX)
        .ok_or_else(|| Failure::Other("more steps than can be counted; use fewer --epochs".into()))
}

impl Work for Run<'_> {
    fn on<B: Backend<Real = f32>>(mut self, be: &mut B, arenas: usize) -> Result<(), Failure> {
        let out = self.args.out.clone();
        // Files are the first rank's.
        let (first_rank, ranks) = (be.rank() == 0, be.ranks());
        if first_rank {
            std::fs::create_dir_all(&out)
                .map_err(|e| FileError::io(&out, "create the directory", e))?;
        }
        let identity = machine::identity(be, concat!("bdia-translate ", env!("CARGO_PKG_VERSION")));
        let digest = self.prepared.digest()?;
        let (mut first, mut validation) = (0, Vec::new());
        match &self.from {
            Some((path, header)) => {
                if header.data != digest {
                    return Err(Failure::Run {
                        path: path.clone(),
                        what: "the pairs or the vocabulary are not the same".into(),
                    });
                }
                if header.identity != identity {
                    report::note!(
                        "warning: the run was computed by \"{}\", this is \"{identity}\": it goes on, with other rounding",
                        header.identity
                    );
                }
                if header.ranks != ranks {
                    report::note!(
                        "warning: the run was computed by {} rank(s), these are {ranks}: it goes on, with other rounding",
                        header.ranks
                    );
                }
                checkpoint::load(path, be, &self.laid.model.saved())?;
                first = header.step;
                validation.clone_from(&header.validation);
            }
            None => {
                self.laid.model.initialize(be, self.args.seed)?;
                if let Some(dir) = &self.args.weights {
                    load_weights(&dir.join(weights::FILE), be, &self.laid.model)?;
                }
                if first_rank {
                    run::replace(&out)?;
                    self.prepared.config.write_dir(&out)?;
                    self.prepared.vocabularies.write(&out)?;
                    run::save(&out, &self.args)?;
                }
            }
        }
        let saved = self.laid.model.saved();
        ranks::begin(be, &self.args, (digest, first), &saved)?;
        let log = out.join("metrics.jsonl");
        let (mut metrics, mut curve) = (None, Vec::new());
        if first_rank {
            checkpoint::sweep(&out);
            metrics = Some(Metrics::<Metric>::resume(&log, u64::from(first))?);
            curve = Metrics::<Metric>::read(&log)?;
        }

        let per_epoch = self.prepared.batches.per_epoch() as u32;
        let steps = steps(&self.args, &self.prepared)?;
        self.announce(first, steps, &identity);
        run::catch_interrupt();
        let bar = run::progress(steps, first);
        let schedule = self.args.optim.schedule(steps);
        let longest = self.prepared.config.positions;
        let some = self.prepared.held.sentences(self.args.translate as usize);
        let mut order = self.prepared.batches.epoch(self.args.seed, first / per_epoch);
        let (mut seconds, mut tokens, mut mismatches, mut worst) = (0.0, 0, 0_u64, 0.0_f64);
        let mut best = validation.iter().map(|v: &(u32, f64)| v.1).fold(f64::INFINITY, f64::min);
        let before_staging = Counting::current();
        self.laid.model.prepare(&shapes(&self.prepared, 1).0);
        let own = arenas + Counting::current().saturating_sub(before_staging);
        let mut peak = own;

        for step in first..steps {
            let clock = Instant::now();
            let (epoch, within) = (step / per_epoch, step % per_epoch);
            if within == 0 {
                order = self.prepared.batches.epoch(self.args.seed, epoch);
            }
            let plan = Step {
                step,
                seed: self.args.seed,
                lr: schedule.at(step),
                weight_decay: self.args.optim.weight_decay,
                clip: self.args.optim.clip,
            };
            let batch = &order[within as usize];
            let pairs: Vec<&Tokens> =
                batch.members.iter().map(|&i| &self.prepared.train.tokens[i as usize]).collect();
            let chunk = chunk_of(self.laid.choice.chunk, longest, batch.longest);
            let others = Counting::current().saturating_sub(own);
            Counting::reset_peak();
            let outcome = match self.laid.model.train(be, &plan, &pairs, chunk) {
                Ok(outcome) => outcome,
                Err(error) => {
                    bar.abandon();
                    return Err(Failure::Step { step, error, kept: run::kept(&out) });
                }
            };
            peak = peak.max(Counting::peak().saturating_sub(others));
            let took = clock.elapsed().as_secs_f64();
            seconds += took;
            tokens += outcome.tokens;
            mismatches += outcome.mismatches;
            worst = worst.max(outcome.rebuild_error);

            let done = step + 1;
            let epoch_done = done % per_epoch == 0;
            let epochs = done / per_epoch;
            let every = self.args.eval_interval as u32;
            let mut metric = Metric {
                step: u64::from(done),
                loss: outcome.loss,
                lr: plan.lr,
                grad_norm: outcome.grad_norm,
                tokens_per_s: outcome.tokens as f64 / took,
                val_loss: None,
                bleu: None,
                exact: None,
            };
            if done == steps || (epoch_done && every > 0 && epochs.is_multiple_of(every)) {
                let loss = self.held_loss(be)?;
                metric.val_loss = Some(loss);
                validation.push((done, loss));
                if loss < best {
                    best = loss;
                    if first_rank {
                        save_weights(&out.join("best.safetensors"), be, &self.laid.model)?;
                    }
                }
                let mut text = format!(
                    "epoch {epochs:>4}  loss {:.4}  held out: loss {loss:.4}",
                    outcome.loss
                );
                if !some.is_empty() {
                    let s = score(&some, &self.translate(be, &some, 1)?);
                    (metric.bleu, metric.exact) = (Some(s.bleu), Some(s.exact));
                    let _ = write!(
                        text,
                        ", BLEU {:.2}, exactly right {:.1} %",
                        s.bleu,
                        100.0 * s.exact
                    );
                }
                if std::io::stderr().is_terminal() {
                    bar.println(text);
                } else {
                    report::note!("{text}");
                }
            }
            curve.push(metric);
            if let Some(metrics) = &mut metrics {
                metrics.push(&metric)?;
            }
            let shown =
                validation.last().map_or(String::new(), |(_, v)| format!("held out {v:.3} "));
            bar.set_message(format!(
                "loss {:.3} {shown}{:.0} tokens/s",
                outcome.loss,
                tokens as f64 / seconds
            ));
            bar.inc(1);

            let stop = ranks::any(be, run::interrupted())?;
            let every = self.args.checkpoint_interval as u32;
            let save =
                done == steps || stop || (epoch_done && every > 0 && epochs.is_multiple_of(every));
            if save || u64::from(done).is_multiple_of(self.args.machine.compare_interval) {
                ranks::same(be, &saved).map_err(|error| Failure::Step {
                    step,
                    error,
                    kept: run::kept(&out),
                })?;
            }
            if let Some(metrics) = metrics.as_ref().filter(|_| save) {
                let header = Header {
                    step: done,
                    chunk: self.laid.choice.chunk,
                    head_rows: self.laid.choice.head_rows,
                    identity: identity.clone(),
                    ranks,
                    lens: Vec::new(),
                    data: digest,
                    validation: validation.clone(),
                };
                metrics.sync()?;
                checkpoint::save(&out, be, &saved, header)?;
            }
            if stop && done < steps {
                bar.abandon();
                report::tell!(
                    "stopped after step {done} of {steps}; to go on:  bdia-translate train --resume {}",
                    out.display()
                );
                return Ok(());
            }
        }
        bar.finish_and_clear();
        if !first_rank {
            return Ok(());
        }

        self.prepared.config.write_dir(&out)?;
        save_weights(&out.join(weights::FILE), be, &self.laid.model)?;
        draw(&out, &curve, per_epoch)?;
        let val_loss = self.held_loss(be)?;
        let all = self.prepared.held.sentences(usize::MAX);
        let found = self.translate(be, &all, self.args.beams as usize)?;
        write_lines(&out, "source", all.iter().map(|s| s.source.as_str()))?;
        write_lines(
            &out,
            "reference",
            all.iter().filter_map(|s| s.references.first()).map(String::as_str),
        )?;
        write_lines(&out, "translation", found.iter().map(String::as_str))?;
        let scores = score(&all, &found);
        let last: Vec<f64> = curve.iter().rev().take(per_epoch as usize).map(|m| m.loss).collect();
        let bytes = |c| self.laid.layout.bytes(c);
        use bdia_core::Category as C;
        let summary = Summary {
            val_loss,
            best_val_loss: best.min(val_loss),
            bleu: scores.bleu,
            chrf: scores.chrf,
            exact: scores.exact,
            sentences: all.len(),
            loss: last.iter().sum::<f64>() / last.len().max(1) as f64,
            verify_mismatches: (self.args.verify && self.args.mode.mode == Mode::Bdia)
                .then_some(mismatches),
            rebuild_error: (self.args.verify && self.args.mode.mode == Mode::BdiaFloat)
                .then_some(worst),
            tokens_per_s: if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 },
            pairs: self.prepared.train.tokens.len(),
            too_long: self.prepared.train.too_long + self.prepared.held.too_long,
            parameters: self.laid.model.parameters(),
            plan_bytes: self.laid.layout.total(),
            activation_bytes: bytes(C::Activations)
                + bytes(C::ActivationGradients)
                + bytes(C::SideBits)
                + bytes(C::Workspace),
            peak_bytes: peak,
            peak_rss_bytes: peak_rss_bytes(),
            steps,
            out: out.clone(),
        };
        self.tell(&summary, &all, &found);
        *self.summary = Some(summary);
        Ok(())
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

/// `loss.svg` and `bleu.svg`, over epochs.
fn draw(out: &Path, curve: &[Metric], per_epoch: u32) -> Result<(), Failure> {
    let epoch = |m: &Metric| m.step as f64 / f64::from(per_epoch);
    let points = |f: &dyn Fn(&Metric) -> Option<f64>| {
        curve.iter().filter_map(|m| Some((epoch(m), f(m)?))).collect()
    };
    let train = Series {
        name: "training, smoothed",
        points: points(&|m| Some(m.loss)),
        ..Series::default()
    };
    let held = Series {
        name: "held out",
        points: points(&|m| m.val_loss),
        marks: true,
        ..Series::default()
    };
    let chart = Chart {
        title: "Training and held-out loss",
        x: "epoch",
        y: "loss (nats)",
        series: &[train, held],
    };
    report::svg(&out.join("loss.svg"), &chart)?;
    let bleu =
        Series { name: "BLEU", points: points(&|m| m.bleu), marks: true, ..Series::default() };
    let right = points(&|m| m.exact.map(|e| 100.0 * e));
    let right =
        Series { name: "exactly right (%)", points: right, marks: true, ..Series::default() };
    let chart =
        Chart { title: "Held-out translations", x: "epoch", y: "0 to 100", series: &[bleu, right] };
    Ok(report::svg(&out.join("bleu.svg"), &chart)?)
}

impl Run<'_> {
    fn held_loss<B: Backend>(&mut self, be: &mut B) -> Result<f64, Failure> {
        let (p, at_once) =
            (&self.prepared, (self.laid.choice.chunk, self.prepared.config.positions));
        let (tokens, batches) = (&p.held.tokens, &p.held_batches);
        Ok(loss(be, &mut self.laid.model, tokens, batches, at_once, Inference::Float)?.0)
    }

    fn translate<B: Backend>(
        &self,
        be: &mut B,
        of: &[Sentence],
        beams: usize,
    ) -> Result<Vec<String>, Failure> {
        let sources: Vec<_> = of.iter().map(|s| s.tokens.as_slice()).collect();
        let search = Search { beams, alpha: 0.6, inference: Inference::Float };
        let sizes = Sizes { beams, ..self.laid.sizes };
        translations(
            be,
            &self.laid.model,
            self.prepared.vocabularies.target(),
            &sources,
            &sizes,
            &search,
        )
    }

    fn announce(&self, first: u32, steps: u32, identity: &str) {
        let (p, c, s) = (&self.prepared, &self.prepared.config, self.laid.model.setup());
        report::note!(
            "{} parameters, {} + {} blocks, width {}, vocabulary {}, mode {}; {} pairs to learn from, {} held out, of {}",
            self.laid.model.parameters(),
            c.encoder_layers,
            c.decoder_layers,
            c.width,
            if c.shared {
                c.vocab[0].to_string()
            } else {
                format!("{} and {}", c.vocab[0], c.vocab[1])
            },
            name_of(&self.args.mode.mode),
            p.train.tokens.len(),
            p.held.tokens.len(),
            p.data.name,
        );
        p.tell_too_long();
        report::note!(
            "{identity}, {} thread(s); plan {}, batches of {} tokens, chunks of {} sentence(s) of {}",
            s.threads,
            report::bytes(self.laid.layout.total() as u64),
            self.args.batch_tokens,
            self.laid.choice.chunk,
            c.positions
        );
        if first > 0 {
            report::note!("goes on after step {first} of {steps}");
        }
    }

    fn tell(&self, s: &Summary, all: &[Sentence], found: &[String]) {
        let mut text = String::new();
        for (sentence, translation) in all.iter().zip(found).take(3) {
            let right = if sentence.references.contains(translation) {
                "right"
            } else {
                "not a known translation"
            };
            // Writing to a string does not fail.
            let _ = writeln!(text, "  {}\n    {translation}  ({right})", sentence.source);
        }
        let _ = writeln!(
            text,
            "\nheld out: loss {:.4}, {} sentences: BLEU {:.2}, chrF {:.2}, exactly right {:.2} %; training loss {:.4}",
            s.val_loss,
            s.sentences,
            s.bleu,
            s.chrf,
            100.0 * s.exact,
            s.loss
        );
        if let Some(n) = s.verify_mismatches {
            let _ = writeln!(text, "verified: {n} rebuilt values differ from the originals");
        }
        if let Some(e) = s.rebuild_error {
            let _ = writeln!(text, "rebuilding without a grid: largest error {e:.3e}");
        }
        let plans: Vec<_> =
            core::iter::once((name_of(&self.args.mode.mode), self.laid.layout.clone()))
                .chain(self.others.clone())
                .collect();
        let _ = writeln!(text, "\n{}", machine::memory_table(&plans, Some(s.peak_bytes as u64)));
        let _ = writeln!(
            text,
            "peak of the whole process, with data and vocabulary: {}\n\nfiles in {}: model.safetensors, best.safetensors, \
             config.json, tokenizer*.json, held-out.*.txt, metrics.jsonl, loss.svg, bleu.svg, step-*.ckpt",
            s.peak_rss_bytes.map_or("unknown".into(), report::bytes),
            s.out.display()
        );
        // Nobody is left to tell if the terminal is gone.
        let _ = std::io::stdout().lock().write_all(text.as_bytes());
        if self.args.json
            && let Ok(json) = serde_json::to_string(s)
        {
            report::tell!("{json}");
        }
    }
}

/// `plan`.
///
/// # Errors
/// [`Failure`]
pub fn plan(args: &TrainArgs) -> Result<(), Failure> {
    if args.resume.is_some() {
        return Err(Failure::Other(
            "plan lays out a new run; leave --resume out and give the run's flags".into(),
        ));
    }
    let prepared = prepare(args, args.weights.as_deref(), 1)?;
    let setup = setup(args, &prepared.config)?;
    let kind = args.machine.backend;
    let laid = lay_out(&setup, &prepared, (kind, args.beams as usize), args.machine.memory, None)?;
    let mut plans = vec![(name_of(&args.mode.mode), laid.layout.clone())];
    plans.extend(other_plans(&setup, &prepared, kind, laid.choice)?);
    let c = &prepared.config;
    report::tell!(
        "{} parameters; chunks of {} sentence(s) of {} tokens; {} sentences translated at a time\n",
        laid.model.parameters(),
        laid.choice.chunk,
        c.positions,
        laid.sizes.sentences
    );
    prepared.tell_too_long();
    report::tell!("{}", machine::memory_table(&plans, None));
    if args.json {
        let json = serde_json::json!({"parameters": laid.model.parameters(), "plan_bytes": laid.layout.total()});
        report::tell!("{json}");
    }
    Ok(())
}
