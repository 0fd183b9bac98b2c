//! `train`: from flags to a run directory. The loop is [`finetune`](crate::finetune)'s, too: what
//! differs is a [`Task`].
//!
//! ```text
//! config.json, model.safetensors   the model, in Hugging Face's layout; tokenizer files beside it
//! run.json                         the flags of the run
//! metrics.jsonl, loss.svg          one object per step; the curves
//! step-*.ckpt                      the last two checkpoints
//! ```

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use bdia_core::backend::Backend;
use bdia_core::plan::Choice;
use bdia_core::rng::{Draw, Stream};
use bdia_core::{Gamma, Layout, Sign};
use bdia_models::files::FileError;
use bdia_models::gpt2::config::Gpt2Config;
use bdia_models::gpt2::files::{load_weights, save_weights};
use bdia_models::gpt2::model::{Adapters, Dims, Gpt2, Inference, Named, Outcome, Setup, Step};
use bdia_models::sample::Sampler;
use bdia_models::tokenizer::{EOT, Tokenizer, VOCAB};
use bdia_ranks::Ranks;
use bdia_train::Failure;
use bdia_train::alloc::{Counting, peak_rss_bytes};
use bdia_train::checkpoint::{self, Header};
use bdia_train::cli::{BackendKind, Mode, name_of};
use bdia_train::machine::{self, Work};
use bdia_train::report::{self, Metrics};
use bdia_train::{ranks, run};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::{RunArgs, TrainArgs};
use crate::data::{Batches, Corpus, Order, Part};
use crate::metric::{Metric, loss_svg};

/// Validation tokens of the curve, and of the measurement at the end; `eval` has no such limit.
const CURVE_TOKENS: usize = 8192;
const FINAL_TOKENS: usize = 1 << 16;

/// Whether blocks are updated as soon as they are finished.
pub const fn fused(clip: f64, accumulate: u64) -> bool {
    clip == 0.0 && accumulate == 1
}

/// What a run learns, from where it starts and what it leaves behind: all that its loop does not
/// know.
pub trait Task {
    /// The subcommand, for what is said about resuming.
    const COMMAND: &'static str;

    /// Number and origin of the training and validation data, for messages.
    fn describe(&self) -> String;

    /// Identifies the training data of a run.
    ///
    /// # Errors
    /// Data that cannot be read.
    fn digest(&self) -> Result<u64, Failure>;

    /// Writes the parameters that the run starts from. A run that goes on reads what is trained
    /// from its checkpoint afterwards.
    ///
    /// # Errors
    /// Weights that cannot be used.
    fn start<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        model: &Gpt2,
        resumed: bool,
    ) -> Result<(), Failure>;

    /// Writes the flags of a run that begins, and what else belongs to it.
    ///
    /// # Errors
    /// Files that cannot be written.
    fn record(&self, out: &Path) -> Result<(), Failure>;

    /// Fills a micro-batch: samples `first`, `first + 1`, … of step `step`.
    ///
    /// # Errors
    /// Data that cannot be read any more.
    fn fill(
        &mut self,
        step: u32,
        first: u32,
        tokens: &mut [i32],
        targets: &mut [i32],
    ) -> Result<(), Failure>;

    /// Mean loss over about `tokens` tokens of the validation data and the number of its targets;
    /// `None` without any.
    ///
    /// # Errors
    /// Data that cannot be read, values that are not finite.
    fn validate<B: Backend<Real = f32>>(
        &self,
        be: &mut B,
        model: &mut Gpt2,
        tokens: usize,
    ) -> Result<Option<(f64, usize)>, Failure>;

    /// Writes the result of a finished run; returns the names of the files.
    ///
    /// # Errors
    /// Files that cannot be written.
    fn finish<B: Backend<Real = f32>>(
        &self,
        be: &B,
        model: &Gpt2,
        out: &Path,
    ) -> Result<&'static str, Failure>;

    /// A few lines that the model writes, where its tokens are text.
    ///
    /// # Errors
    /// Values that are not finite.
    fn sample<B: Backend<Real = f32>>(
        &self,
        be: &mut B,
        model: &mut Gpt2,
    ) -> Result<Option<String>, Failure>;
}

/// What a run ended with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Training loss of the last step, nats a token.
    pub loss: Option<f64>,
    /// Validation loss at the end, where there is validation data.
    pub val_loss: Option<f64>,
    /// The lowest on the curve.
    pub best_val_loss: Option<f64>,
    /// Rebuilt values that differed, with `--verify` in mode bdia.
    pub verify_mismatches: Option<u64>,
    /// Largest error of rebuilding, with `--verify` without a grid.
    pub rebuild_error: Option<f64>,
    /// Speed of training, if a step was made.
    pub tokens_per_s: Option<f64>,
    /// Parameters that are trained.
    pub trained_parameters: usize,
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
    pub out: PathBuf,
}

/// Everything that is known before memory is allocated.
struct Run<'a, T> {
    args: RunArgs,
    task: T,
    choice: Choice,
    layout: Layout,
    model: Gpt2,
    /// Plans of the same training in the other modes.
    others: Vec<(String, Layout)>,
    /// The checkpoint to go on from.
    from: Option<(PathBuf, Header)>,
    summary: &'a mut Option<Summary>,
}

/// Learning from a text.
struct FromText {
    args: TrainArgs,
    config: Gpt2Config,
    corpus: Corpus,
    tokenizer: Tokenizer,
    batches: Batches,
}

/// Trains. The summary is `None` where Ctrl-C stopped the run.
///
/// # Errors
/// [`Failure`]; what was saved before stays good.
pub fn train(args: &TrainArgs) -> Result<Option<Summary>, Failure> {
    let (args, from) = run::begin(args)?;
    let joined = ranks::join(&args.run.machine)?;
    let tokenizer = Tokenizer::new();
    let mut config = match (&args.weights, &args.run.resume) {
        (_, Some(dir)) => Gpt2Config::read_dir(dir)?,
        (Some(dir), None) => {
            let mut config = Gpt2Config::read_dir(dir)?;
            // Dropout is a choice of the training; the file's is what somebody else chose.
            config.set_dropout(args.run.dropout);
            config
        }
        (None, None) => args.model.gpt2(args.run.dropout)?,
    };
    config.bdia = Some(args.run.mode.training()?);
    let context = args.model.context.map_or(config.n_positions, |c| c as usize);
    let corpus = Corpus::open(args.data.as_deref(), &tokenizer, config.vocab_size, context)?;
    let batches = batches(&args.run, args.order, context);
    let dims = config.dims();
    let run = args.run.clone();
    work(
        run,
        dims,
        context,
        None,
        FromText { args, config, corpus, tokenizer, batches },
        from,
        joined,
    )
}

/// How a run's batches are made of a text.
pub fn batches(args: &RunArgs, order: Order, context: usize) -> Batches {
    Batches { order, seed: args.seed, per_step: args.batch * args.accumulate, context }
}

/// Plans a run, makes a backend for it and does it. The summary is `None` where Ctrl-C stopped it.
///
/// # Errors
/// [`Failure`]; what was saved before stays good.
pub fn work(
    args: RunArgs,
    dims: Dims,
    context: usize,
    adapters: Option<Adapters>,
    task: impl Task,
    from: Option<(PathBuf, Header)>,
    mut joined: Option<Ranks>,
) -> Result<Option<Summary>, Failure> {
    let (rank, count) = ranks::place(joined.as_ref());
    if let Some((path, header)) = &from
        && u64::from(header.step) > args.steps
    {
        let what = format!("it is of step {}, the run has {} steps", header.step, args.steps);
        return Err(Failure::Run { path: path.clone(), what });
    }
    let threads = machine::threads(&args.machine);
    let setup = Setup {
        dims,
        batch: ranks::part(args.batch as usize, count)?,
        accumulate: args.accumulate as usize,
        context,
        mode: machine::stack_mode(&args.mode, dims.layers),
        grid: machine::grid(&args.mode)?,
        gamma: args.mode.gamma()?,
        rule: Some(args.optim.rule()),
        adapters,
        fused: fused(args.optim.clip, args.accumulate),
        verify: args.verify,
        threads,
        library: machine::library(&args.machine, threads),
    };
    args.optim.schedule(args.steps as u32).check()?;
    let kind = args.machine.backend;
    let fixed = match &from {
        Some((path, h)) if h.ranks == count => {
            let choice = Choice { chunk: h.chunk, head_rows: h.head_rows };
            let fits = (1..=setup.batch).contains(&h.chunk)
                && (1..=h.chunk * context).contains(&h.head_rows);
            if !fits {
                let what = format!(
                    "chunks of {} samples and {} rows do not fit this run",
                    h.chunk, h.head_rows
                );
                return Err(Failure::Run { path: path.clone(), what });
            }
            Some(choice)
        }
        _ => None,
    };
    let (choice, model, layout) =
        machine::lay_out::<Gpt2>(&setup, kind, count, args.machine.memory, fixed)?;
    if let Some(joined) = &mut joined {
        joined.reserve(&model.exchanged());
    }
    // The table is told by the first rank alone.
    let others =
        if rank == 0 { other_plans(&setup, kind, choice, args.mode.mode)? } else { Vec::new() };
    let place = args.machine.clone();
    let mut summary = None;
    let run = Run {
        args,
        task,
        choice,
        layout: layout.clone(),
        model,
        others,
        from,
        summary: &mut summary,
    };
    machine::run_on(&place, threads, &layout, joined, run)?;
    Ok(summary)
}

/// The plans of the modes that are not used, for the table: with this run's chunks.
fn other_plans(
    setup: &Setup,
    kind: BackendKind,
    choice: Choice,
    used: Mode,
) -> Result<Vec<(String, Layout)>, Failure> {
    use bdia_core::stack::Mode as M;
    let every = machine::checkpoint_every(None, setup.dims.layers);
    let mut plans = Vec::new();
    for (name, mode) in [
        ("bdia".to_string(), M::Bdia),
        ("standard".to_string(), M::Standard),
        (format!("checkpoint {every}"), M::Checkpoint { every }),
    ] {
        let same = matches!(
            (used, mode),
            (Mode::Bdia, M::Bdia)
                | (Mode::Standard, M::Standard)
                | (Mode::Checkpoint, M::Checkpoint { .. })
        );
        if same {
            continue;
        }
        let grid = if mode == M::Bdia { Some(bdia_core::Grid::new(14)?) } else { None };
        let gamma = Gamma::new(0.5, Sign::Random)?;
        let other = Setup { mode, grid, gamma, verify: false, ..*setup };
        plans.push((name, machine::lay_out::<Gpt2>(&other, kind, 1, None, Some(choice))?.2));
    }
    Ok(plans)
}

impl Task for FromText {
    const COMMAND: &'static str = "train";

    fn describe(&self) -> String {
        let (train, validation) = (self.corpus.train.len(), self.corpus.validation.len());
        format!("{train} training and {validation} validation tokens of {}", self.corpus.name)
    }

    fn digest(&self) -> Result<u64, Failure> {
        digest(&self.corpus.train)
    }

    fn start<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        model: &Gpt2,
        resumed: bool,
    ) -> Result<(), Failure> {
        match &self.args.weights {
            _ if resumed => Ok(()),
            Some(dir) => Ok(load_weights(dir, &self.config, be, model)?),
            None => Ok(model.initialize(be, self.args.run.seed)?),
        }
    }

    fn record(&self, out: &Path) -> Result<(), Failure> {
        self.config.write_dir(out)?;
        run::save(out, &self.args)
    }

    fn fill(
        &mut self,
        step: u32,
        first: u32,
        tokens: &mut [i32],
        targets: &mut [i32],
    ) -> Result<(), Failure> {
        Ok(self.corpus.train.batch(&self.batches, step, first, tokens, targets)?)
    }

    fn validate<B: Backend<Real = f32>>(
        &self,
        be: &mut B,
        model: &mut Gpt2,
        tokens: usize,
    ) -> Result<Option<(f64, usize)>, Failure> {
        let windows = (tokens / self.batches.context).max(1);
        evaluate(
            be,
            model,
            &self.corpus.validation,
            windows,
            Inference::Float(Gamma::new(0.0, Sign::Plus)?),
        )
    }

    fn finish<B: Backend<Real = f32>>(
        &self,
        be: &B,
        model: &Gpt2,
        out: &Path,
    ) -> Result<&'static str, Failure> {
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
        Ok(Some(continuation(be, model, &self.tokenizer, &[EOT as i32])?))
    }
}

/// What the model writes after a prompt: up to 60 tokens, the same ones every time.
///
/// # Errors
/// Values that are not finite.
pub fn continuation<B: Backend<Real = f32>>(
    be: &mut B,
    model: &mut Gpt2,
    tokenizer: &Tokenizer,
    prompt: &[i32],
) -> Result<String, Failure> {
    let sampler = Sampler { temperature: 0.8, top_k: 40, top_p: 1.0 };
    let tokens = generate(
        be,
        model,
        prompt,
        60,
        &sampler,
        1,
        Inference::Float(Gamma::new(0.0, Sign::Plus)?),
    )?;
    let tokens: Vec<u32> = tokens.into_iter().map(|t| t as u32).filter(|&t| t != EOT).collect();
    Ok(tokenizer.decode(&tokens))
}

impl<T: Task> Work for Run<'_, T> {
    fn on<B: Backend<Real = f32>>(mut self, be: &mut B, arenas: usize) -> Result<(), Failure> {
        let out = self.args.out.clone();
        // Files are the first rank's.
        let (first_rank, ranks) = (be.rank() == 0, be.ranks());
        if first_rank {
            std::fs::create_dir_all(&out)
                .map_err(|e| FileError::io(&out, "create the directory", e))?;
        }
        let identity = machine::identity(be, concat!("bdia-lm ", env!("CARGO_PKG_VERSION")));
        let digest = self.task.digest()?;
        let mut first = 0;
        let mut validation = Vec::new();
        match &self.from {
            Some((path, header)) => {
                if header.data != digest {
                    return Err(Failure::Run {
                        path: path.clone(),
                        what: "the training data is not the same".into(),
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
                self.task.start(be, &self.model, true)?;
                checkpoint::load(path, be, &self.model.saved())?;
                first = header.step;
                validation.clone_from(&header.validation);
            }
            None => {
                self.task.start(be, &self.model, false)?;
                if first_rank {
                    run::replace(&out)?;
                    self.task.record(&out)?;
                }
            }
        }
        let saved = self.model.saved();
        ranks::begin(be, &self.args, (digest, first), &saved)?;
        let log = out.join("metrics.jsonl");
        let mut metrics = None;
        if first_rank {
            checkpoint::sweep(&out);
            metrics = Some(Metrics::<Metric>::resume(&log, u64::from(first))?);
        }
        let before = if first_rank { Metrics::<Metric>::read(&log)? } else { Vec::new() };
        let mut curve: Vec<_> = before.iter().map(|m| (m.step, m.loss)).collect();

        self.announce(first, &identity);
        run::catch_interrupt();
        let steps = self.args.steps as u32;
        let bar = run::progress(steps, first);
        let schedule = self.args.optim.schedule(steps);
        let tokens_per_step =
            (self.args.batch * self.args.accumulate) as f64 * self.model.setup().context as f64;
        let (mut seconds, mut mismatches, mut worst) = (0.0, 0_u64, 0.0_f64);
        // A finished run has no step left: what it ended with is still what there is to tell.
        let loss = before.last().map_or(f64::NAN, |m| m.loss);
        let mut last = Outcome { loss, grad_norm: f64::NAN, mismatches: 0, rebuild_error: 0.0 };
        let before_staging = Counting::current();
        self.model.prepare();
        // Measured, not planned: what the backend and the staging buffers took from the allocator.
        let own = arenas + Counting::current().saturating_sub(before_staging);
        let mut peak = own;

        for step in first..steps {
            let clock = Instant::now();
            let plan = Step {
                step,
                seed: self.args.seed,
                lr: schedule.at(step),
                weight_decay: self.args.optim.weight_decay,
                clip: self.args.optim.clip,
            };
            let (task, batch) = (&mut self.task, self.args.batch as u32);
            let part = be.rank() as u32 * (batch / ranks as u32);
            let others = Counting::current().saturating_sub(own);
            Counting::reset_peak();
            let outcome: Result<Outcome, Failure> =
                self.model.train(be, &plan, |i, tokens, targets| {
                    task.fill(step, i as u32 * batch + part, tokens, targets)
                });
            last = match outcome {
                Ok(outcome) => outcome,
                Err(Failure::Core(error)) => {
                    bar.abandon();
                    return Err(Failure::Step { step, error, kept: run::kept(&out) });
                }
                Err(other) => return Err(other),
            };
            peak = peak.max(Counting::peak().saturating_sub(others));
            let took = clock.elapsed().as_secs_f64();
            seconds += took;
            mismatches += last.mismatches;
            worst = worst.max(last.rebuild_error);

            let done = step + 1;
            let interval = self.args.eval_interval as u32;
            let val = if done == steps || (interval > 0 && done % interval == 0) {
                self.task.validate(be, &mut self.model, CURVE_TOKENS)?.map(|(loss, _)| loss)
            } else {
                None
            };
            if let Some(loss) = val {
                validation.push((done, loss));
                bar.println(format!(
                    "step {done:>6}  loss {:.4}  validation loss {loss:.4}",
                    last.loss
                ));
                if !std::io::stderr().is_terminal() {
                    report::note!(
                        "step {done:>6}  loss {:.4}  validation loss {loss:.4}",
                        last.loss
                    );
                }
            }
            curve.push((u64::from(done), last.loss));
            if let Some(metrics) = &mut metrics {
                metrics.push(&Metric {
                    step: u64::from(done),
                    loss: last.loss,
                    lr: plan.lr,
                    grad_norm: Some(last.grad_norm),
                    tokens_per_s: tokens_per_step / took,
                    val_loss: val,
                })?;
            }
            let shown = validation.last().map_or(String::new(), |(_, v)| format!("val {v:.3} "));
            let speed = tokens_per_step * f64::from(done - first) / seconds;
            bar.set_message(format!("loss {:.3} {shown}{speed:.0} tok/s", last.loss));
            bar.inc(1);

            let stop = ranks::any(be, run::interrupted())?;
            let every = self.args.checkpoint_interval as u32;
            let save = done == steps || stop || (every > 0 && done % every == 0);
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
                    chunk: self.choice.chunk,
                    head_rows: self.choice.head_rows,
                    identity: identity.clone(),
                    ranks,
                    lens: Vec::new(),
                    data: digest,
                    validation: validation.clone(),
                };
                // The losses up to a checkpoint are as safe as it is.
                metrics.sync()?;
                checkpoint::save(&out, be, &saved, header)?;
            }
            if stop && done < steps {
                bar.abandon();
                report::tell!(
                    "stopped after step {done} of {steps}; to go on:  bdia-lm {} --resume {}",
                    T::COMMAND,
                    out.display()
                );
                return Ok(());
            }
        }
        bar.finish_and_clear();

        let whole = self.task.validate(be, &mut self.model, FINAL_TOKENS)?;
        if !first_rank {
            return Ok(());
        }
        let files = self.task.finish(be, &self.model, &out)?;
        let points: Vec<_> = validation.iter().map(|&(s, l)| (u64::from(s), l)).collect();
        loss_svg(&out.join("loss.svg"), &curve, &points)?;
        self.summary(be, (last, whole), mismatches, worst, peak, files)?;

        use bdia_core::Category as C;
        let number = |x: f64| x.is_finite().then_some(x);
        let bytes = |c| self.layout.bytes(c);
        let summary = Summary {
            loss: number(last.loss),
            val_loss: whole.map(|(loss, _)| loss),
            best_val_loss: validation.iter().map(|&(_, loss)| loss).reduce(f64::min),
            verify_mismatches: (self.args.verify && self.args.mode.mode == Mode::Bdia)
                .then_some(mismatches),
            rebuild_error: (self.args.verify && self.args.mode.mode == Mode::BdiaFloat)
                .then_some(worst),
            tokens_per_s: number(tokens_per_step * f64::from(steps - first) / seconds),
            trained_parameters: self.model.trained().iter().map(Named::len).sum(),
            plan_bytes: self.layout.total(),
            activation_bytes: bytes(C::Activations)
                + bytes(C::ActivationGradients)
                + bytes(C::SideBits)
                + bytes(C::Workspace),
            peak_bytes: peak,
            peak_rss_bytes: peak_rss_bytes(),
            steps,
            out,
        };
        if self.args.json {
            report::tell!("{}", json!(summary));
        }
        *self.summary = Some(summary);
        Ok(())
    }
}

/// Identifies a text that is trained on.
///
/// # Errors
/// A file that cannot be read.
pub fn digest(part: &Part) -> Result<u64, Failure> {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
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
    Ok(hash.digest())
}

impl<T: Task> Run<'_, T> {
    fn announce(&self, first: u32, identity: &str) {
        let s = self.model.setup();
        report::note!(
            "{} parameters{}, {} blocks, width {}, context {}, batch {}{}, mode {}; {}",
            self.model.parameters(),
            if s.adapters.is_some() {
                format!(
                    ", {} in adapters",
                    self.model.trained().iter().map(Named::len).sum::<usize>()
                )
            } else {
                String::new()
            },
            s.dims.layers,
            s.dims.width,
            s.context,
            self.args.batch,
            if self.args.accumulate > 1 {
                format!(" x {}", self.args.accumulate)
            } else {
                String::new()
            },
            self.mode_name(),
            self.task.describe(),
        );
        report::note!(
            "{identity}, {} thread(s); plan {}, chunks of {} sample(s)",
            s.threads,
            report::bytes(self.layout.total() as u64),
            self.choice.chunk
        );
        if first > 0 {
            report::note!("goes on after step {first} of {}", self.args.steps);
        }
    }

    fn summary<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        (last, whole): (Outcome, Option<(f64, usize)>),
        mismatches: u64,
        worst: f64,
        peak: usize,
        files: &str,
    ) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        let mut text = String::new();
        if let Some(written) = self.task.sample(be, &mut self.model)? {
            text = format!("\nA sample:\n  {}\n", written.trim().replace('\n', "\n  "));
        }
        let validation = match whole {
            Some((loss, tokens)) => {
                format!(
                    ", validation loss {loss:.4} (perplexity {:.2}) over {tokens} tokens",
                    loss.exp()
                )
            }
            None => String::new(),
        };
        text += &format!("\nloss {:.4}{validation}\n", last.loss);
        if self.args.verify && self.args.mode.mode == Mode::Bdia {
            text += &format!("verified: {mismatches} rebuilt values differ from the originals\n");
        }
        if self.args.verify && self.args.mode.mode == Mode::BdiaFloat {
            text += &format!("rebuilding without a grid: largest error {worst:.3e}\n");
        }
        let plans: Vec<_> = core::iter::once((self.mode_name(), self.layout.clone()))
            .chain(self.others.clone())
            .collect();
        text += &format!("\n{}", machine::memory_table(&plans, Some(peak as u64)));
        text += &format!(
            "peak of the whole process, with data and tokenizer: {}\n\nfiles in {}: {files}, metrics.jsonl, loss.svg, \
             step-*.ckpt\n",
            peak_rss_bytes().map_or("unknown".into(), report::bytes),
            self.args.out.display()
        );
        // Nobody is left to tell if the terminal is gone.
        let _ = out.write_all(text.as_bytes());
        Ok(())
    }

    fn mode_name(&self) -> String {
        name_of(&self.args.mode.mode)
    }
}

/// Mean loss over the first `windows` windows of a part and the number of its targets; `None` if it
/// has no window.
///
/// # Errors
/// [`Failure`]
pub fn evaluate<B: Backend<Real = f32>>(
    be: &mut B,
    model: &mut Gpt2,
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
    while let Some(from) = starts.next().filter(|_| !run::interrupted()) {
        let range = filled * context..(filled + 1) * context;
        part.window(from, &mut tokens[range.clone()], &mut targets[range.clone()])?;
        filled += 1;
        if filled == at_once || starts.peek().is_none() {
            let (loss, n) =
                model.evaluate(be, &tokens[..range.end], &targets[..range.end], inference)?;
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
    Ok((count > 0).then(|| (sum / count as f64, count)))
}

/// Continues `prompt` by `count` tokens, or up to the end of the document. The window slides where
/// the context ends.
///
/// # Errors
/// [`Failure`]
pub fn generate<B: Backend<Real = f32>>(
    be: &mut B,
    model: &mut Gpt2,
    prompt: &[i32],
    count: usize,
    sampler: &Sampler,
    seed: u64,
    inference: Inference,
) -> Result<Vec<i32>, Failure> {
    let (mut all, mut order) = (prompt.to_vec(), Vec::new());
    let stream = Stream::new(seed, 0, 0, 0, 0, Draw::Sample);
    for _ in 0..count {
        let window = &all[all.len().saturating_sub(model.setup().context)..];
        let last = window.len() - 1;
        let logits = model.logits(be, window, last..last + 1, inference)?;
        let token = sampler.choose(&logits, &stream, all.len() as u32, &mut order)?;
        all.push(token as i32);
        if token == EOT {
            break;
        }
    }
    Ok(all.split_off(prompt.len()))
}
