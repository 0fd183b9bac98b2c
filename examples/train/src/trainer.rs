//! The run of every program: from a plan to a run directory.
//!
//! ```text
//! config.json, model.safetensors   the model, as its task writes it
//! best.safetensors                 the weights of the best evaluation
//! run.json                         the flags of the run
//! metrics.jsonl, *.svg             one object a step; the curves
//! step-*.ckpt                      the last checkpoints
//! run.lock                         locked while the run lives
//! ```
//! A program brings a [`Task`]: its data, its network, what is measured and written. Everything
//! else of a run is here, once: resuming, progress, evaluations, checkpoints, stopping, ranks, the
//! table of memory and the summary.

use core::fmt::Write as _;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use bdia_core::backend::Backend;
use bdia_core::network::{Outcome, Step};
use bdia_core::plan::Choice;
use bdia_core::stack::Mode as StackMode;
use bdia_core::{Category, Layout};
use bdia_models::named::Saved;
use bdia_models::plan::Plan;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::alloc::{Counting, peak_rss_bytes};
use crate::checkpoint::{self, Header};
use crate::cli::{
    Flags, LENGTHS, MethodArgs, MethodKind, Mode, OptimArgs, SavingArgs, StepArgs, name_of,
};
use crate::directory::Directory;
use crate::error::Failure;
use crate::machine::{self, Work};
use crate::report::{self, Chart, Metrics, Record, Series};
use crate::{ranks, run};

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Steps done, from 1.
    pub step: u64,
    /// Training loss of the step.
    pub loss: f64,
    /// Its learning rate.
    pub lr: f64,
    /// Norm of its gradient.
    pub grad_norm: f64,
    /// Speed, in what the program counts: tokens or images.
    pub items_per_s: f64,
    /// Validation loss, where measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
    /// Other scores of the validation, by name.
    #[serde(default, flatten)]
    pub scores: BTreeMap<String, f64>,
}

impl Record for Metric {
    fn step(&self) -> u64 {
        self.step
    }

    fn timeless(&self) -> Self {
        Self { items_per_s: 0.0, ..self.clone() }
    }
}

/// What a run ended with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Training loss: the mean of the last epoch's steps, or that of the last step where nothing
    /// is counted in epochs.
    pub loss: Option<f64>,
    /// Validation loss at the end, where there is validation data.
    pub val_loss: Option<f64>,
    /// The lowest on the curve.
    pub best_val_loss: Option<f64>,
    /// Other scores at the end, by name, and the best ones on the curve as `best_NAME`.
    #[serde(default, flatten)]
    pub scores: BTreeMap<String, f64>,
    /// Rebuilt values that differed, with `--verify` in mode bdia.
    pub verify_mismatches: Option<u64>,
    /// Largest error of rebuilding, with `--verify` without a grid.
    pub rebuild_error: Option<f64>,
    /// Speed of training, if a step was made.
    pub items_per_s: Option<f64>,
    /// What is counted: `tokens` or `images`.
    pub items: String,
    /// Parameters of the model.
    pub parameters: usize,
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
    /// Optimizer steps that were made.
    pub steps: u32,
    /// Whether the run was stopped and can go on.
    pub stopped: bool,
    /// The directory.
    pub out: PathBuf,
}

impl Summary {
    /// A score by its name; NaN where it was not measured.
    pub fn score(&self, name: &str) -> f64 {
        self.scores.get(name).copied().unwrap_or(f64::NAN)
    }
}

/// A measurement on the validation data.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Validation {
    /// Mean loss.
    pub loss: f64,
    /// Other scores by name; more is better.
    pub scores: BTreeMap<String, f64>,
    /// What is said of it, after "validation".
    pub text: String,
}

/// When something is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// On the way: as fast as makes sense.
    Curve,
    /// At the end: thoroughly.
    End,
}

/// A picture of scores over steps or epochs.
#[derive(Debug, Clone, Copy)]
pub struct Picture {
    /// The file.
    pub file: &'static str,
    /// Above it.
    pub title: &'static str,
    /// Name of the vertical axis.
    pub y: &'static str,
    /// Scores by their name in the metrics, the name that is shown, and a factor.
    pub scores: &'static [(&'static str, &'static str, f64)],
}

/// What a run learns, from where it starts and what it leaves behind: all that its loop does not
/// know.
pub trait Task {
    /// What [`digest`](Self::digest) identifies, for messages.
    const DATA: &'static str = "the data";
    /// Whether a better validation has a higher key.
    const HIGHER: bool = false;

    /// What the plan and the network are said to be: the first lines of a run.
    fn describe(&self) -> String;

    /// Identifies the data of a run.
    ///
    /// # Errors
    /// Data that cannot be read.
    fn digest(&self) -> Result<u64, Failure>;

    /// Writes the parameters that the run starts from. A run that goes on reads what is trained
    /// from its checkpoint afterwards.
    ///
    /// # Errors
    /// Weights that cannot be used.
    fn start<B: Backend<Real = f32>>(&mut self, be: &mut B, resumed: bool) -> Result<(), Failure>;

    /// Writes the files that belong to a run that begins. Its flags are there already; a task that
    /// has found out something that belongs to them writes them anew.
    ///
    /// # Errors
    /// Files that cannot be written.
    fn record(&self, out: &Path) -> Result<(), Failure>;

    /// Parameters of the model, and of those the ones that are trained.
    fn parameters(&self) -> [usize; 2];

    /// All tensors of a checkpoint, in order.
    fn saved(&self) -> Vec<Saved>;

    /// Makes the buffers on the host that the plan counts.
    fn prepare(&mut self);

    /// Chooses the data of the next step, in memory that the plan does not count.
    fn choose(&mut self, _step: u32) {}

    /// One optimizer step.
    ///
    /// # Errors
    /// [`Failure::Core`] for what the step itself refuses; data that cannot be read any more.
    fn step<B: Backend<Real = f32>>(&mut self, be: &mut B, step: &Step)
    -> Result<Outcome, Failure>;

    /// Measures the model on validation data; `None` without any.
    ///
    /// # Errors
    /// Data that cannot be read, values that are not finite; [`Failure::Interrupted`] from
    /// [`run::go_on`].
    fn validate<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        when: When,
    ) -> Result<Option<Validation>, Failure>;

    /// What validations are compared by: the loss, unless a task knows better.
    fn key(&self, v: &Validation) -> f64 {
        v.loss
    }

    /// Writes the weights as they are to a file.
    ///
    /// # Errors
    /// A file that cannot be written.
    fn save<B: Backend<Real = f32>>(&self, be: &B, path: &Path) -> Result<(), Failure>;

    /// Writes the model as it is, with all that belongs to it; returns the names of the files.
    ///
    /// # Errors
    /// Files that cannot be written.
    fn write<B: Backend<Real = f32>>(&self, be: &B, out: &Path) -> Result<&'static str, Failure>;

    /// What is told of a finished run, whose model has been written, before the losses. May write
    /// more.
    ///
    /// # Errors
    /// Files that cannot be written.
    fn tell<B: Backend<Real = f32>>(&mut self, be: &mut B, out: &Path) -> Result<String, Failure>;
}

/// The settings of a run that its loop needs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How the run is resumed: `bdia-vit train`.
    pub command: &'static str,
    /// Program and version, part of the identity.
    pub program: &'static str,
    /// Optimizer steps.
    pub steps: u32,
    /// Steps of an epoch, where the run counts in epochs.
    pub epoch: Option<u32>,
    /// Seed of the run.
    pub seed: u64,
    /// The optimizer.
    pub optim: OptimArgs,
    /// Steps between evaluations; 0 for one at the end.
    pub eval_every: u32,
    /// Steps between checkpoints; 0 for one at the end.
    pub save_every: u32,
    /// The mode, as it is shown.
    pub mode: String,
    /// What `--verify` tells: differing values, or an error of rebuilding.
    pub verify: Verify,
    /// What is counted: `tokens` or `images`, and the same in short.
    pub items: [&'static str; 2],
    /// The scores' pictures, beside that of the losses.
    pub pictures: &'static [Picture],
}

impl Settings {
    /// Those of a run that counts steps, of `program` and its version, resumed by `command`.
    pub fn of_steps(args: &StepArgs, command: &'static str, program: &'static str) -> Self {
        Self {
            command,
            program,
            steps: args.steps as u32,
            epoch: None,
            seed: args.seed,
            optim: args.optim.clone(),
            eval_every: args.eval_interval as u32,
            save_every: args.checkpoint_interval as u32,
            mode: mode_name(args.mode.mode),
            verify: Verify::of(args.verify, args.mode.mode),
            items: ["tokens", "tok"],
            pictures: &[],
        }
    }
}

/// What `--verify` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Nothing: it was not asked for.
    No,
    /// How many rebuilt values differ from the originals.
    Mismatches,
    /// How large the error of rebuilding without a grid is.
    Error,
}

impl Verify {
    /// Of a mode.
    pub const fn of(asked: bool, mode: Mode) -> Self {
        match mode {
            Mode::Bdia if asked => Self::Mismatches,
            Mode::BdiaFloat if asked => Self::Error,
            _ => Self::No,
        }
    }
}

/// A network with its plan.
#[derive(Debug, Clone)]
pub struct Planned {
    /// How much is done at a time.
    pub choice: Choice,
    /// The plan.
    pub layout: Layout,
    /// Plans of the same training in the other modes.
    pub others: Vec<(String, Layout)>,
}

/// Lays a network of one process out within its budget, or as it was before (`from`), and in the
/// modes that the table compares with the one that is used, the first of the pair; the second is
/// the number of blocks. `setup` is the network in a mode.
///
/// # Errors
/// What does not fit together, or into the budget.
pub fn plan<N: Plan>(
    run: &StepArgs,
    from: Option<&(PathBuf, Header)>,
    (used, layers): (StackMode, usize),
    setup: impl Fn(StackMode) -> N::Setup,
) -> Result<(N, Planned), Failure> {
    let (kind, budget) = (run.machine.backend, run.machine.memory);
    let used_setup = setup(used);
    let [samples, rows] = N::sizes(&used_setup);
    let fixed = fixed_choice(from, run.steps as u32, 1, |c| c.fits(samples, rows))?;
    let (choice, network, layout) = machine::lay_out::<N>(&used_setup, kind, 1, budget, fixed)?;
    let others = (machine::other_modes(&used, layers)?.into_iter())
        .map(|(name, mode)| {
            Ok((name, machine::lay_out::<N>(&setup(mode), kind, 1, None, Some(choice))?.2))
        })
        .collect::<Result<_, Failure>>()?;
    Ok((network, Planned { choice, layout, others }))
}

/// Optimizer steps of a run: as many as asked for, or those of some epochs.
///
/// # Errors
/// More than can be counted.
pub fn steps(per_epoch: u32, epochs: u64, asked: Option<u64>) -> Result<u32, Failure> {
    (asked.or_else(|| u64::from(per_epoch).checked_mul(epochs)))
        .and_then(|n| u32::try_from(n).ok())
        .filter(|&n| n < u32::MAX)
        .ok_or_else(|| Failure::Other("more steps than can be counted; use fewer --epochs".into()))
}

/// Refuses a checkpoint that does not fit the run: too many steps, or a choice of chunks that is
/// none. `fits` tells whether it is one.
///
/// # Errors
/// [`Failure::Run`] names the checkpoint.
pub fn fixed_choice(
    from: Option<&(PathBuf, Header)>,
    steps: u32,
    ranks: usize,
    fits: impl Fn(Choice) -> bool,
) -> Result<Option<Choice>, Failure> {
    let Some((path, h)) = from else { return Ok(None) };
    let wrong = |what| Err(Failure::Run { path: path.clone(), what });
    if h.step > steps {
        return wrong(format!("it is of step {}, the run has {steps} steps", h.step));
    }
    if h.ranks != ranks {
        return Ok(None);
    }
    let choice = Choice { token_chunk: h.token_chunk, ..Choice::new(h.chunk, h.head_rows) };
    if !fits(choice) {
        let tokens = h.token_chunk.map_or_else(String::new, |n| format!(", {n} tokens"));
        let what = format!(
            "chunks of {} samples{tokens} and {} rows do not fit this run",
            h.chunk, h.head_rows
        );
        return wrong(what);
    }
    Ok(Some(choice))
}

/// Makes a backend for a plan and does the run on it.
///
/// # Errors
/// [`Failure`], among them [`Failure::Stopped`]; what was saved before stays good.
pub fn train<A: Flags>(
    mut args: A,
    settings: Settings,
    planned: Planned,
    task: impl Task,
    from: Option<(PathBuf, Header)>,
    joined: Option<bdia_ranks::Ranks>,
) -> Result<Summary, Failure> {
    settings.optim.schedule(settings.steps).check()?;
    let (place, out) = (args.run().machine.clone(), args.run().out.clone());
    let (json, saving) = (*args.run().json, args.run().saving.clone());
    let (threads, layout, command) =
        (machine::threads(&place), planned.layout.clone(), settings.command);
    let (mut ended, steps) = (None, settings.steps);
    let run = Run {
        args,
        settings,
        planned,
        task,
        from,
        out,
        directory: None,
        config: Map::new(),
        json,
        saving,
        ended: &mut ended,
    };
    machine::run_on(&place, threads, &layout, joined, run)?;
    let summary = ended.ok_or(Failure::Interrupted)?;
    if summary.stopped {
        let (step, out) = (summary.steps, summary.out);
        return Err(Failure::Stopped { step, steps, command, out });
    }
    // The files are whole; nobody may have seen what was told.
    report::lost().map_or(Ok(summary), |e| Err(Failure::Output(e)))
}

/// Everything that is known before memory is allocated.
struct Run<'a, A, T> {
    args: A,
    settings: Settings,
    planned: Planned,
    task: T,
    /// The checkpoint to go on from.
    from: Option<(PathBuf, Header)>,
    out: PathBuf,
    /// Of the first rank, once the run has begun.
    directory: Option<Directory>,
    /// Its `config.json`.
    config: Map<String, Value>,
    json: bool,
    saving: SavingArgs,
    /// Where the summary goes.
    ended: &'a mut Option<Summary>,
}

/// What has come of the steps so far.
#[derive(Default)]
struct Progress {
    /// Steps that are done.
    step: u32,
    /// The last step, where its validation was cut short.
    waiting: Option<Metric>,
    /// Steps and keys of the validations.
    validation: Vec<(u32, f64)>,
    curve: Vec<Metric>,
    seconds: f64,
    items: usize,
    mismatches: u64,
    worst: f64,
    peak: usize,
}

impl<A: Flags, T: Task> Work for Run<'_, A, T> {
    fn on<B: Backend<Real = f32>>(mut self, be: &mut B, arenas: usize) -> Result<(), Failure> {
        // Files are the first rank's.
        let first_rank = be.rank() == 0;
        let identity = machine::identity(be, self.settings.program);
        let digest = self.task.digest()?;
        let mut so_far = self.begin(be, &identity, digest)?;
        let (first, saved) = (so_far.step, self.task.saved());
        ranks::begin(be, &self.args, (digest, first), &saved)?;
        let mut metrics = None;
        if first_rank {
            let log = self.out.join("metrics.jsonl");
            // A step that waits for its validation is not there yet.
            let last = u64::from(first) - u64::from(so_far.waiting.is_some());
            if let Some((path, header)) = &self.from
                && header.metrics != Metrics::<Metric>::digest_of(&log, last)?
            {
                let what = "metrics.jsonl beside it is not the one that the run wrote; put the \
                            files of the run back"
                    .into();
                return Err(Failure::Run { path: path.clone(), what });
            }
            self.check_room(&saved)?;
            let (resumed, curve) = Metrics::<Metric>::resume(&log, last)?;
            so_far.curve = curve;
            metrics = Some(resumed);
        }

        self.announce(first, &identity);
        run::catch_signals();
        let steps = self.settings.steps;
        let bar = run::progress(steps, first);
        let before_staging = Counting::current();
        self.task.prepare();
        // Measured, not planned: what the backend and the staging buffers took.
        let own = arenas + Counting::current().saturating_sub(before_staging);
        so_far.peak = own;
        let mut last_save = Instant::now();

        loop {
            let mut metric = match so_far.waiting.take() {
                Some(metric) => metric,
                None if so_far.step < steps && !self.is_stale(&so_far.validation) => {
                    self.step(be, own, &mut so_far).inspect_err(|_| bar.abandon())?
                }
                None => break,
            };
            let done = so_far.step;
            let due = |every: u32| every > 0 && done % every == 0;
            let mut cut = false;
            if done == steps || due(self.settings.eval_every) {
                let found = self.validate(be, When::Curve)?;
                cut = found.is_none();
                if let Some(Some(v)) = &found {
                    self.evaluated(be, v, &mut metric, &mut so_far)?;
                    let text = format!("{}  validation {}", self.place(done, metric.loss), v.text);
                    if std::io::stderr().is_terminal() {
                        bar.println(text);
                    } else {
                        report::note!("{text}");
                    }
                }
            }
            if cut {
                so_far.waiting = Some(metric);
            } else {
                if let Some(metrics) = &mut metrics {
                    metrics.push(&metric)?;
                }
                bar.set_message(format!(
                    "loss {:.3} {}{:.0} {}/s",
                    metric.loss,
                    so_far.validation.last().map_or(String::new(), |(_, v)| format!("val {v:.3} ")),
                    so_far.items as f64 / so_far.seconds,
                    self.settings.items[1],
                ));
                so_far.curve.push(metric);
                bar.set_position(done.into());
            }

            let minutes = self.saving.checkpoint_minutes;
            let late = minutes > 0.0 && last_save.elapsed().as_secs_f64() >= 60.0 * minutes;
            let [stop, asked] =
                ranks::any(be, [cut || run::interrupted(), late || run::asked_to_save()])?;
            let ends = done == steps || self.is_stale(&so_far.validation);
            let save = ends || stop || asked || due(self.settings.save_every);
            let compare = self.args.run().machine.compare_interval;
            if save || u64::from(done).is_multiple_of(compare) {
                ranks::same(be, &saved).map_err(|error| self.failed(done - 1, error))?;
            }
            if let Some(metrics) = metrics.as_ref().filter(|_| save) {
                let header = self.header(be, &identity, digest, &so_far, metrics.digest())?;
                // The losses up to a checkpoint are as safe as it is.
                metrics.sync()?;
                let keep = self.saving.keep_checkpoints as usize;
                checkpoint::save(&self.out, be, &saved, header, keep)?;
                self.show()?;
            }
            if save {
                last_save = Instant::now();
            }
            if stop && (cut || !ends) {
                bar.abandon();
                return self.stopped(be, first, &so_far);
            }
        }
        bar.finish_and_clear();
        match self.validate(be, When::End)? {
            Some(whole) => self.end(be, first, &so_far, whole.as_ref()),
            None => self.stopped(be, first, &so_far),
        }
    }
}

impl<A: Flags, T: Task> Run<'_, A, T> {
    /// Parameters and optimizer state of a run that begins or goes on, and what has been done.
    fn begin<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        identity: &str,
        digest: u64,
    ) -> Result<Progress, Failure> {
        let (first_rank, resumed) = (be.rank() == 0, self.args.run().resume.is_some());
        if let Some((path, header)) = &self.from
            && header.data != digest
        {
            let what = format!("{} is not the same", T::DATA);
            return Err(Failure::Run { path: path.clone(), what });
        }
        if resumed && first_rank {
            self.directory = Some(Directory::of_run(&self.out)?);
            self.check_newest()?;
        }
        if let Some((path, header)) = &self.from
            && header.steps > self.settings.steps
        {
            let (then, now) = (header.steps, self.settings.steps);
            let what = format!("it is of a run of {then} steps, these flags are for {now}");
            return Err(Failure::Run { path: path.clone(), what });
        }
        let Some((path, header)) = &self.from else {
            self.task.start(be, false)?;
            if first_rank {
                if !resumed {
                    let directory = Directory::claim(&run::claim(&self.args.run()))?;
                    self.out = directory.path().into();
                    self.directory = Some(directory);
                }
                // First: from then on the run can be begun again by resuming it.
                run::save(&self.out, &self.args)?;
                self.task.record(&self.out)?;
                self.config = run::config(&self.out)?;
            }
            return Ok(Progress::default());
        };
        let warn = |before: String, now: String| {
            report::note!(
                "warning: the run was computed by {before}, this is {now}: it goes on, with other \
                 rounding"
            );
        };
        if header.identity != identity {
            warn(format!("\"{}\"", header.identity), format!("\"{identity}\""));
        }
        if header.ranks != be.ranks() {
            warn(format!("{} rank(s)", header.ranks), format!("{} rank(s)", be.ranks()));
        }
        let waiting = header.waiting.clone().map(serde_json::from_value).transpose();
        let waiting = waiting.map_err(|e| Failure::Run {
            path: path.clone(),
            what: format!("the step that waits in it is none: {e}"),
        })?;
        self.config.clone_from(&header.config);
        self.task.start(be, true)?;
        checkpoint::load(path, be, &self.task.saved())?;
        let moved = |name: &str| A::INPUTS.contains(&name) || LENGTHS.contains(&name);
        if first_rank && self.args.run().given.iter().any(|name| moved(name)) {
            run::save(&self.out, &self.args)?;
        }
        let (step, validation) = (header.step, header.validation.clone());
        Ok(Progress { step, waiting, validation, ..Progress::default() })
    }

    /// Refuses a run that another process has gone on with since its checkpoint was chosen.
    fn check_newest(&self) -> Result<(), Failure> {
        let chosen = self.from.as_ref().map_or(0, |(_, header)| header.step);
        match checkpoint::list(&self.out).into_iter().next() {
            Some((step, path)) if step > chosen && checkpoint::check(&path).is_ok() => {
                let what = "another process has gone on with the run; resume it once more".into();
                Err(Failure::Run { path, what })
            }
            _ => Ok(()),
        }
    }

    /// Refuses a disk that is too small for what the run leaves behind.
    fn check_room(&self, saved: &[Saved]) -> Result<(), Failure> {
        // One checkpoint is written before the oldest goes; the model, and the best one.
        let kept = self.saving.keep_checkpoints.min(self.settings.steps.into()) + 1;
        let [parameters, _] = self.task.parameters();
        let all = checkpoint::bytes(saved).saturating_mul(kept);
        let all = all.saturating_add(8 * parameters as u64);
        // What is there already takes no more room.
        let needed = all.saturating_sub(run::bytes_there(&self.out));
        match run::free_space(&self.out) {
            Some(free) if free < needed => {
                Err(Failure::DiskFull { path: self.out.clone(), needed, free })
            }
            _ => Ok(()),
        }
    }

    /// One optimizer step.
    fn step<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        own: usize,
        so_far: &mut Progress,
    ) -> Result<Metric, Failure> {
        let (clock, step) = (Instant::now(), so_far.step);
        let plan = Step {
            step,
            seed: self.settings.seed,
            lr: self.settings.optim.schedule(self.settings.steps).at(step),
            weight_decay: self.settings.optim.weight_decay,
            clip: self.settings.optim.clip,
        };
        self.task.choose(step);
        let others = Counting::current().saturating_sub(own);
        Counting::reset_peak();
        let outcome = self.task.step(be, &plan).map_err(|error| match error {
            Failure::Core(error) => self.failed(step, error),
            other => other,
        })?;
        so_far.peak = so_far.peak.max(Counting::peak().saturating_sub(others));
        let took = clock.elapsed().as_secs_f64();
        so_far.seconds += took;
        so_far.items += outcome.items;
        so_far.mismatches += outcome.rebuilt.mismatches;
        so_far.worst = so_far.worst.max(outcome.rebuilt.error);
        so_far.step = step + 1;
        Ok(Metric {
            step: u64::from(so_far.step),
            loss: outcome.loss,
            lr: plan.lr,
            grad_norm: outcome.grad_norm,
            items_per_s: outcome.items as f64 / took,
            val_loss: None,
            scores: BTreeMap::new(),
        })
    }

    fn failed(&self, step: u32, error: bdia_core::Error) -> Failure {
        Failure::Step { step, error, kept: run::kept(&self.out) }
    }

    /// A validation; nothing where a signal cut it short, on any rank.
    fn validate<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        when: When,
    ) -> Result<Option<Option<Validation>>, Failure> {
        let (found, cut) = match self.task.validate(be, when) {
            Ok(found) => (found, false),
            Err(Failure::Interrupted) => (None, true),
            Err(other) => return Err(other),
        };
        let [cut] = ranks::any(be, [cut])?;
        Ok((!cut).then_some(found))
    }

    /// Takes a validation into the curve, and keeps the weights of the best.
    fn evaluated<B: Backend<Real = f32>>(
        &self,
        be: &B,
        v: &Validation,
        metric: &mut Metric,
        so_far: &mut Progress,
    ) -> Result<(), Failure> {
        let key = self.task.key(v);
        so_far.validation.push((metric.step as u32, key));
        metric.val_loss = Some(v.loss);
        metric.scores.clone_from(&v.scores);
        if best::<T>(&so_far.validation) == Some(so_far.validation.len() - 1) && be.rank() == 0 {
            self.task.save(be, &self.out.join("best.safetensors"))?;
        }
        Ok(())
    }

    /// Whether the last evaluations were no better than one before them.
    fn is_stale(&self, validation: &[(u32, f64)]) -> bool {
        let since = best::<T>(validation).map_or(0, |at| validation.len() - 1 - at);
        self.saving.patience > 0 && since as u64 >= self.saving.patience
    }

    /// What a checkpoint says about the run.
    fn header<B: Backend<Real = f32>>(
        &self,
        be: &B,
        identity: &str,
        data: u64,
        so_far: &Progress,
        metrics: u64,
    ) -> Result<Header, Failure> {
        let waiting = so_far.waiting.as_ref().map(serde_json::to_value).transpose();
        Ok(Header {
            step: so_far.step,
            chunk: self.planned.choice.chunk,
            head_rows: self.planned.choice.head_rows,
            token_chunk: self.planned.choice.token_chunk,
            identity: identity.into(),
            ranks: be.ranks(),
            lens: Vec::new(),
            data,
            validation: so_far.validation.clone(),
            steps: self.settings.steps,
            settings: self.args.settings(),
            config: self.config.clone(),
            metrics,
            waiting: waiting.map_err(|e| Failure::Other(e.to_string()))?,
        })
    }

    /// There is something to show.
    fn show(&mut self) -> Result<(), Failure> {
        if let Some(directory) = &mut self.directory {
            directory.show()?;
            self.out = directory.path().into();
        }
        Ok(())
    }

    /// The run was saved and ends here; its model is written as it is.
    fn stopped<B: Backend<Real = f32>>(
        self,
        be: &mut B,
        first: u32,
        so_far: &Progress,
    ) -> Result<(), Failure> {
        let mut summary = self.summary(first, so_far, None);
        summary.stopped = true;
        if be.rank() == 0 {
            let files = self.task.write(be, &self.out)?;
            report::tell!("the model as it is, in {}: {files}", self.out.display());
            if self.json {
                self.tell_json(&summary);
            }
        }
        *self.ended = Some(summary);
        Ok(())
    }

    /// Where in the run a step is, with its loss.
    fn place(&self, done: u32, loss: f64) -> String {
        match self.settings.epoch {
            Some(epoch) if done.is_multiple_of(epoch) => {
                format!("epoch {:>4}  loss {loss:.4}", done / epoch)
            }
            _ => format!("step {done:>6}  loss {loss:.4}"),
        }
    }

    fn announce(&self, first: u32, identity: &str) {
        report::note!("{}", self.task.describe());
        let mapped = match 4 * self.planned.layout.mapped_words() as u64 {
            0 => String::new(),
            bytes => format!(" and {} mapped from files", report::bytes(bytes)),
        };
        report::note!(
            "{identity}, mode {}; plan {}{mapped}, chunks of {} sample(s)",
            self.settings.mode,
            report::bytes(self.planned.layout.total() as u64),
            self.planned.choice.chunk
        );
        if first > 0 {
            report::note!("goes on after step {first} of {}", self.settings.steps);
        }
    }

    /// What is written and told when all steps are done.
    fn end<B: Backend<Real = f32>>(
        mut self,
        be: &mut B,
        first: u32,
        so_far: &Progress,
        whole: Option<&Validation>,
    ) -> Result<(), Failure> {
        let summary = self.summary(first, so_far, whole);
        if be.rank() == 0 {
            let out = self.out.clone();
            let files = self.task.write(be, &out)?;
            let before = self.task.tell(be, &out)?;
            let pictures = self.draw(&so_far.curve)?;
            self.tell(&summary, whole, &before, &format!("{files}{pictures}"));
        }
        *self.ended = Some(summary);
        Ok(())
    }

    fn summary(&self, first: u32, so_far: &Progress, whole: Option<&Validation>) -> Summary {
        use Category as C;
        let number = |x: f64| x.is_finite().then_some(x);
        let bytes = |c| self.planned.layout.bytes(c);
        let last = self.settings.epoch.unwrap_or(1) as usize;
        let losses: Vec<f64> = so_far.curve.iter().rev().take(last).map(|m| m.loss).collect();
        let mut scores = whole.map(|v| v.scores.clone()).unwrap_or_default();
        for (name, end) in scores.clone() {
            let mut curve =
                so_far.curve.iter().filter_map(|m| m.scores.get(&name).copied()).peekable();
            // What is measured at the end alone has no best one.
            if curve.peek().is_some() {
                scores.insert(format!("best_{name}"), curve.fold(end, f64::max));
            }
        }
        let curve = so_far.curve.iter().filter_map(|m| m.val_loss);
        let [parameters, trained_parameters] = self.task.parameters();
        let verify = self.settings.verify;
        Summary {
            loss: number(losses.iter().sum::<f64>() / losses.len() as f64),
            val_loss: whole.map(|v| v.loss),
            best_val_loss: curve.reduce(f64::min),
            scores,
            verify_mismatches: (verify == Verify::Mismatches).then_some(so_far.mismatches),
            rebuild_error: (verify == Verify::Error).then_some(so_far.worst),
            items_per_s: (so_far.step > first)
                .then(|| so_far.items as f64 / so_far.seconds)
                .and_then(number),
            items: self.settings.items[0].into(),
            parameters,
            trained_parameters,
            plan_bytes: self.planned.layout.total(),
            activation_bytes: bytes(C::Activations)
                + bytes(C::ActivationGradients)
                + bytes(C::SideBits)
                + bytes(C::Workspace),
            peak_bytes: so_far.peak,
            peak_rss_bytes: peak_rss_bytes(),
            steps: so_far.step,
            stopped: false,
            out: self.out.clone(),
        }
    }

    /// `loss.svg` and the task's pictures; their names.
    fn draw(&self, curve: &[Metric]) -> Result<String, Failure> {
        let (unit, x) = match self.settings.epoch {
            Some(epoch) => (f64::from(epoch), "epoch"),
            None => (1.0, "optimizer step"),
        };
        let points = |f: &dyn Fn(&Metric) -> Option<f64>| {
            curve.iter().filter_map(|m| Some((m.step as f64 / unit, f(m)?))).collect()
        };
        let series = |name, points, marks| Series { name, points, marks, ..Series::default() };
        let train = series("training", points(&|m| Some(m.loss)), false);
        let validation = series("validation", points(&|m| m.val_loss), true);
        let (title, y) = ("Training and validation loss", "loss (nats)");
        let chart = Chart { title, x, y, series: &[train, validation] };
        report::svg(&self.out.join("loss.svg"), &chart)?;
        let mut names = String::from(", loss.svg");
        for p in self.settings.pictures {
            let all: Vec<_> = (p.scores.iter())
                .map(|&(name, shown, factor)| {
                    let points = points(&|m| m.scores.get(name).map(|s| factor * s));
                    series(shown, points, true)
                })
                .collect();
            let chart = Chart { title: p.title, x, y: p.y, series: &all };
            report::svg(&self.out.join(p.file), &chart)?;
            let _ = write!(names, ", {}", p.file);
        }
        Ok(names)
    }

    fn tell(&self, s: &Summary, whole: Option<&Validation>, before: &str, files: &str) {
        let mut text = before.to_string();
        // Writing to a string does not fail.
        let _ = write!(text, "\nloss {:.4}", s.loss.unwrap_or(f64::NAN));
        if let Some(v) = whole {
            let _ = write!(text, ", validation {}", v.text);
        }
        text.push('\n');
        if let Some(n) = s.verify_mismatches {
            let _ = writeln!(text, "verified: {n} rebuilt values differ from the originals");
        }
        if let Some(e) = s.rebuild_error {
            let _ = writeln!(text, "rebuilding without a grid: largest error {e:.3e}");
        }
        let own = (self.settings.mode.clone(), self.planned.layout.clone());
        let plans: Vec<_> =
            core::iter::once(own).chain(self.planned.others.iter().cloned()).collect();
        let _ = writeln!(text, "\n{}", machine::memory_table(&plans, Some(s.peak_bytes as u64)));
        let _ = writeln!(
            text,
            "peak of the whole process, with its data: {}\n\nfiles in {}: {files}, metrics.jsonl, \
             step-*.ckpt",
            s.peak_rss_bytes.map_or("unknown".into(), report::bytes),
            s.out.display()
        );
        report::out(format_args!("{text}"));
        if self.json {
            self.tell_json(s);
        }
    }

    fn tell_json(&self, s: &Summary) {
        // Numbers, names and paths always serialize.
        if let Ok(json) = serde_json::to_string(s) {
            report::tell!("{json}");
        }
    }
}

/// Where the best of some validations is, the first of equals.
fn best<T: Task>(validation: &[(u32, f64)]) -> Option<usize> {
    let better = |a: f64, b: f64| if T::HIGHER { a > b } else { a < b };
    (0..validation.len()).reduce(
        |best, i| {
            if better(validation[i].1, validation[best].1) { i } else { best }
        },
    )
}

/// The name of a mode in the table.
pub fn mode_name(mode: Mode) -> String {
    name_of(&mode)
}

/// How many parameters are trained, where these are not the model's own alone.
pub fn adapters(there: bool, trained: usize) -> String {
    if there { format!(", {trained} trained") } else { String::new() }
}

/// Identifies the data of a run, and the weights that its adapters belong to, which are read again
/// when the run goes on.
///
/// # Errors
/// Weights that cannot be read.
pub fn digest(data: u64, method: &MethodArgs, weights: Option<&Path>) -> Result<u64, Failure> {
    match (method.method, weights) {
        (MethodKind::Lora, Some(dir)) => {
            Ok(data ^ checkpoint::digest_of(&dir.join(bdia_models::weights::FILE))?)
        }
        _ => Ok(data),
    }
}
