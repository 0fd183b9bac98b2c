//! `train`, `eval` and `plan`: from flags to a run directory.
//!
//! ```text
//! config.json, model.safetensors       the model after the last epoch, under timm's names
//! best.safetensors                     the weights of the best epoch
//! run.json                             the flags of the run
//! metrics.jsonl, loss.svg, accuracy.svg one object per step; the curves
//! step-*.ckpt                          the last two checkpoints
//! ```

use core::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use bdia_core::backend::Backend;
use bdia_core::plan::Choice;
use bdia_core::rng::{Draw, Stream};
use bdia_core::{Gamma, Grid, Layout, Sign, stack};
use bdia_models::files::FileError;
use bdia_models::vit::config::VitConfig;
use bdia_models::vit::files::{load_weights, save_weights};
use bdia_models::vit::model::{Inference, Outcome, Setup, Step, Vit};
use bdia_models::weights;
use bdia_train::alloc::{Counting, peak_rss_bytes};
use bdia_train::checkpoint::{self, Header};
use bdia_train::cli::{self, BackendKind, MachineArgs, Mode, name_of};
use bdia_train::machine::{self, Work};
use bdia_train::report::{self, Chart, Metrics, Record, Series};
use bdia_train::{Failure, ranks, run};
use serde::{Deserialize, Serialize};

use crate::augment::{Augment, apply};
use crate::cli::{AugmentKind, EvalArgs, Network, Size, TrainArgs};
use crate::data::{Dataset, Images};

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Steps done, from 1.
    pub step: u64,
    /// Training loss of the step.
    pub loss: f64,
    /// Its learning rate.
    pub lr: f64,
    /// Norm of its gradient.
    pub grad_norm: f64,
    /// Speed.
    pub images_per_s: f64,
    /// Held-out loss, where measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
    /// Held-out accuracy, where measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

impl Record for Metric {
    fn step(&self) -> u64 {
        self.step
    }
}

/// What a run ended with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Held-out accuracy after the last epoch, 0 to 1.
    pub accuracy: f64,
    /// The best epoch's.
    pub best_accuracy: f64,
    /// Held-out loss after the last epoch.
    pub val_loss: f64,
    /// Mean training loss of the last epoch's steps.
    pub loss: f64,
    /// Rebuilt values that differed, with `--verify` in mode bdia.
    pub verify_mismatches: Option<u64>,
    /// Largest error of rebuilding, with `--verify` without a grid.
    pub rebuild_error: Option<f64>,
    /// Speed of training.
    pub images_per_s: f64,
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

/// The images that the flags name, the model for them, and how training changes them.
///
/// # Errors
/// Files that cannot be used, dimensions that do not fit together.
pub fn prepare(args: &TrainArgs) -> Result<(Dataset, VitConfig, Augment), Failure> {
    let mut data = match &args.data {
        Some(dir) => Dataset::open(dir, args.image_size as usize)?,
        None => Dataset::digits()?,
    };
    if let Some(n) = args.train_subset {
        data.train = data.train.subset(n as usize);
    }
    if let Some(n) = args.test_subset {
        data.test = data.test.subset(n as usize);
    }
    let [channels, rows, _] = data.train.shape;
    let little = rows < 16;
    let size = args.config.unwrap_or(if little { Size::Mini } else { Size::Small });
    let [layers, heads, width, mlp] = match size {
        Size::Mini => [6, 4, 64, 128],
        Size::Small => [6, 8, 512, 512],
    };
    let or = |asked: Option<u64>, default: usize| asked.map_or(default, |n| n as usize);
    let (mean, std) = data.train.statistics();
    let config = VitConfig {
        image: data.train.shape,
        patch: or(args.patch, if little { 2 } else { 4 }),
        shifted: !args.plain,
        locality: !args.plain,
        two_streams: args.network == Network::Revvit,
        width: or(args.width, width),
        layers: or(args.layers, layers),
        heads: or(args.heads, heads),
        mlp: or(args.mlp, mlp),
        dropout: args.dropout,
        classes: data.classes.clone(),
        mean,
        std,
        bdia: args.mode.training()?,
    };
    let kind = args.augment.unwrap_or(match channels {
        // Eight pixels across: a crop loses more than it teaches.
        _ if little => AugmentKind::None,
        3 => AugmentKind::CropFlip,
        _ => AugmentKind::Crop,
    });
    let padding = args.padding.map_or(if little { 1 } else { 4 }, |p| p as u32);
    let augment = Augment {
        padding: if kind == AugmentKind::None { 0 } else { padding },
        flip: kind == AugmentKind::CropFlip,
        mixup: args.mixup,
    };
    Ok((data, config, augment))
}

/// How the flags train a model.
fn setup(args: &TrainArgs, config: &VitConfig, ranks: usize) -> Result<Setup, Failure> {
    let threads = machine::threads(&args.machine);
    Ok(Setup {
        dims: config.dims(),
        batch: ranks::part(args.batch as usize, ranks)?,
        chunk: 1,
        mode: machine::stack_mode(&args.mode, config.layers),
        grid: machine::grid(&args.mode)?,
        gamma: args.mode.gamma()?,
        rule: Some(args.optim.rule()),
        fused: args.optim.clip == 0.0,
        verify: args.verify,
        drop_path: args.drop_path,
        smoothing: args.smoothing,
        mixup: args.mixup > 0.0,
        threads,
        library: machine::library(&args.machine, threads),
    })
}

/// The chunk of a run; the head has no such choice.
const fn fixed(chunk: usize) -> Option<Choice> {
    Some(Choice { chunk, head_rows: 1 })
}

/// The plans of the modes that are not used, for the table: with this run's chunks.
fn other_plans(
    setup: &Setup,
    kind: BackendKind,
    chunk: usize,
) -> Result<Vec<(String, Layout)>, Failure> {
    use stack::Mode as M;
    let mut plans = Vec::new();
    let every = machine::checkpoint_every(None, setup.dims.layers);
    for (name, mode, two_streams) in [
        ("bdia".to_string(), M::Bdia, false),
        ("standard".into(), M::Standard, false),
        (format!("checkpoint {every}"), M::Checkpoint { every }, false),
        ("revvit".into(), M::Standard, true),
    ] {
        let used =
            if setup.dims.two_streams { two_streams } else { !two_streams && mode == setup.mode };
        if used {
            continue;
        }
        let grid = if mode == M::Bdia { Some(Grid::new(14)?) } else { None };
        let mut other = Setup { mode, grid, verify: false, drop_path: 0.0, ..*setup };
        other.gamma = Gamma::new(0.5, Sign::Random)?;
        other.dims.two_streams = two_streams;
        plans.push((name, machine::lay_out::<Vit>(&other, kind, 1, None, fixed(chunk))?.2));
    }
    Ok(plans)
}

fn mode_name(args: &TrainArgs) -> String {
    if args.network == Network::Revvit { "revvit".into() } else { name_of(&args.mode.mode) }
}

/// Everything that is known before memory is allocated.
struct Run<'a> {
    args: TrainArgs,
    config: VitConfig,
    data: Dataset,
    augment: Augment,
    choice: Choice,
    layout: Layout,
    model: Vit,
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
    let (data, config, augment) = prepare(&args)?;
    let setup = setup(&args, &config, count)?;
    let steps = steps(&args, &data)?;
    args.optim.schedule(steps).check()?;
    let chosen = match &from {
        Some((path, h)) => {
            let same = h.ranks == count;
            if h.step > steps || (same && !(1..=setup.batch).contains(&h.chunk)) {
                let what =
                    format!("step {} and chunks of {} images do not fit this run", h.step, h.chunk);
                return Err(Failure::Run { path: path.clone(), what });
            }
            fixed(h.chunk).filter(|_| same)
        }
        None => None,
    };
    let kind = args.machine.backend;
    let (choice, model, layout) =
        machine::lay_out::<Vit>(&setup, kind, count, args.machine.memory, chosen)?;
    if let Some(joined) = &mut joined {
        joined.reserve(&model.exchanged());
    }
    // The table is told by the first rank alone.
    let others = if rank == 0 { other_plans(&setup, kind, choice.chunk)? } else { Vec::new() };
    let (mut summary, place) = (None, args.machine.clone());
    let work = Run {
        args,
        config,
        data,
        augment,
        choice,
        layout: layout.clone(),
        model,
        others,
        from,
        summary: &mut summary,
    };
    machine::run_on(&place, setup.threads, &layout, joined, work)?;
    Ok(summary)
}

/// Steps of an epoch: whole batches only.
fn steps_per_epoch(args: &TrainArgs, data: &Dataset) -> Result<u32, Failure> {
    let n = data.train.len() / args.batch as usize;
    if n == 0 {
        let what = format!(
            "{} training images, expected at least a batch of {}",
            data.train.len(),
            args.batch
        );
        return Err(Failure::Other(format!("{}: {what}; use a smaller --batch", data.name)));
    }
    u32::try_from(n).map_err(|_| {
        Failure::Other(format!("{}: more images than steps can be counted", data.name))
    })
}

fn steps(args: &TrainArgs, data: &Dataset) -> Result<u32, Failure> {
    u64::from(steps_per_epoch(args, data)?)
        .checked_mul(args.epochs)
        .and_then(|n| u32::try_from(n).ok())
        .filter(|&n| n < u32::MAX)
        .ok_or_else(|| Failure::Other("more steps than can be counted; use fewer --epochs".into()))
}

/// The order of an epoch's images: a permutation by Fisher and Yates.
pub fn order(seed: u64, epoch: u32, n: usize) -> Vec<u32> {
    let s = Stream::new(seed, epoch, 0, 0, 0, Draw::Data);
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        order.swap(i, s.below(i as u32, i as u32 + 1) as usize);
    }
    order
}

/// Pixels of an image as the network sees them: mean 0 and deviation 1 by channel.
fn normalized(config: &VitConfig, image: &[u8], out: &mut [f64]) {
    let per = image.len() / config.image[0].max(1);
    for ((image, out), (mean, std)) in
        image.chunks(per).zip(out.chunks_mut(per)).zip(config.mean.iter().zip(&config.std))
    {
        for (&p, out) in image.iter().zip(out) {
            *out = (f64::from(p) - mean) / std;
        }
    }
}

/// Accuracy, mean loss, and how often images of class `row` were taken for class `column`.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// 0 to 1.
    pub accuracy: f64,
    /// Nats.
    pub loss: f64,
    /// `[classes][classes]`.
    pub confusion: Vec<Vec<u32>>,
}

/// Evaluates all images.
///
/// # Errors
/// [`Failure`]
pub fn evaluate<B: Backend>(
    be: &mut B,
    model: &mut Vit,
    config: &VitConfig,
    images: &Images,
    inference: Inference,
) -> Result<Evaluation, Failure> {
    let (classes, at_once) = (config.classes.len(), model.chunk());
    let mut confusion = vec![vec![0; classes]; classes];
    let (mut loss, mut right) = (0.0, 0);
    for first in (0..images.len()).step_by(at_once) {
        let n = at_once.min(images.len() - first);
        let (logits, sum) = model.evaluate::<B, Failure>(be, n, inference, |i, out| {
            normalized(config, images.image(first + i), out);
            Ok([i32::from(images.labels[first + i]); 2])
        })?;
        loss += sum;
        for (i, row) in logits.chunks_exact(classes).enumerate() {
            // The first of the largest.
            let best = (0..classes).fold(0, |best, c| if row[c] > row[best] { c } else { best });
            let label = usize::from(images.labels[first + i]);
            right += usize::from(best == label);
            confusion[label][best] += 1;
        }
    }
    let n = images.len().max(1) as f64;
    Ok(Evaluation { accuracy: right as f64 / n, loss: loss / n, confusion })
}

fn percent(x: f64) -> String {
    format!("{:.2} %", 100.0 * x)
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
        let identity = machine::identity(be, concat!("bdia-vit ", env!("CARGO_PKG_VERSION")));
        let digest = self.data.digest();
        let (mut first, mut validation) = (0, Vec::new());
        match &self.from {
            Some((path, header)) => {
                if header.data != digest {
                    return Err(Failure::Run {
                        path: path.clone(),
                        what: "the images are not the same".into(),
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
                checkpoint::load(path, be, &self.model.saved())?;
                first = header.step;
                validation.clone_from(&header.validation);
            }
            None => {
                self.model.initialize(be, self.args.seed)?;
                if let Some(dir) = &self.args.weights {
                    load_weights(&dir.join(weights::FILE), be, &self.model)?;
                }
                if first_rank {
                    run::replace(&out)?;
                    self.config.write_dir(&out)?;
                    run::save(&out, &self.args)?;
                }
            }
        }
        let saved = self.model.saved();
        ranks::begin(be, &self.args, (digest, first), &saved)?;
        let log = out.join("metrics.jsonl");
        let (mut metrics, mut curve) = (None, Vec::new());
        if first_rank {
            checkpoint::sweep(&out);
            metrics = Some(Metrics::<Metric>::resume(&log, u64::from(first))?);
            curve = Metrics::<Metric>::read(&log)?;
        }

        let per_epoch = steps_per_epoch(&self.args, &self.data)?;
        let steps = steps(&self.args, &self.data)?;
        self.announce(first, steps, &identity);
        run::catch_interrupt();
        let bar = run::progress(steps, first);
        let schedule = self.args.optim.schedule(steps);
        let batch = self.args.batch as usize;
        let part = be.rank() * (batch / ranks);
        let pixels = self.data.train.shape.iter().product();
        let [mut one, mut two, mut raw] = [0; 3].map(|_| vec![0.0; pixels]);
        let mut images = order(self.args.seed, first / per_epoch, self.data.train.len());
        let (mut seconds, mut mismatches, mut worst) = (0.0, 0_u64, 0.0_f64);
        let mut best = validation.iter().map(|v: &(u32, f64)| v.1).fold(0.0, f64::max);
        let before_staging = Counting::current();
        self.model.prepare();
        let own = arenas + Counting::current().saturating_sub(before_staging);
        let mut peak = own;

        for step in first..steps {
            let clock = Instant::now();
            let (epoch, within) = (step / per_epoch, step % per_epoch);
            if within == 0 {
                images = order(self.args.seed, epoch, self.data.train.len());
            }
            let (seed, augment) = (self.args.seed, self.augment);
            let share = augment.share(seed, step);
            let plan = Step {
                step,
                seed,
                lr: schedule.at(step),
                weight_decay: self.args.optim.weight_decay,
                clip: self.args.optim.clip,
                share,
            };
            let others = Counting::current().saturating_sub(own);
            Counting::reset_peak();
            let (config, train) = (&self.config, &self.data.train);
            let load = |i: usize, raw: &mut Vec<f64>, to: &mut [f64]| {
                let at = images[within as usize * batch + i] as usize;
                normalized(config, train.image(at), raw);
                apply(augment.change(seed, step, i as u32), train.shape, raw, to);
                i32::from(train.labels[at])
            };
            let outcome: Result<Outcome, Failure> = self.model.train(be, &plan, |i, pixels| {
                let i = part + i;
                let label = load(i, &mut raw, &mut one);
                if augment.mixup <= 0.0 {
                    pixels.copy_from_slice(&one);
                    return Ok([label; 2]);
                }
                let other = load(batch - 1 - i, &mut raw, &mut two);
                for ((p, a), b) in pixels.iter_mut().zip(&one).zip(&two) {
                    *p = share * a + (1.0 - share) * b;
                }
                Ok([label, other])
            });
            let outcome = match outcome {
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
                images_per_s: batch as f64 / took,
                val_loss: None,
                accuracy: None,
            };
            if done == steps || (epoch_done && every > 0 && epochs % every == 0) {
                let e = evaluate(
                    be,
                    &mut self.model,
                    &self.config,
                    &self.data.test,
                    Inference::standard()?,
                )?;
                (metric.val_loss, metric.accuracy) = (Some(e.loss), Some(e.accuracy));
                validation.push((done, e.accuracy));
                if e.accuracy > best {
                    best = e.accuracy;
                    if first_rank {
                        save_weights(&out.join("best.safetensors"), be, &self.model)?;
                    }
                }
                let text = format!(
                    "epoch {epochs:>4}  loss {:.4}  held out: loss {:.4}, {}",
                    outcome.loss,
                    e.loss,
                    percent(e.accuracy)
                );
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
                validation.last().map_or(String::new(), |(_, v)| format!("{} ", percent(*v)));
            let speed = (batch * (done - first) as usize) as f64 / seconds;
            bar.set_message(format!("loss {:.3} {shown}{speed:.0} img/s", outcome.loss));
            bar.inc(1);

            let stop = ranks::any(be, run::interrupted())?;
            let every = self.args.checkpoint_interval as u32;
            let save = done == steps || stop || (epoch_done && every > 0 && epochs % every == 0);
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
                    head_rows: 1,
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
                    "stopped after step {done} of {steps}; to go on:  bdia-vit train --resume {}",
                    out.display()
                );
                return Ok(());
            }
        }
        bar.finish_and_clear();
        if !first_rank {
            return Ok(());
        }

        self.config.write_dir(&out)?;
        save_weights(&out.join(weights::FILE), be, &self.model)?;
        draw(&out, &curve, per_epoch)?;
        let whole =
            evaluate(be, &mut self.model, &self.config, &self.data.test, Inference::standard()?)?;
        let last: Vec<f64> = curve.iter().rev().take(per_epoch as usize).map(|m| m.loss).collect();
        let float = self.args.mode.mode == Mode::BdiaFloat || self.config.two_streams;
        let exact = self.args.mode.mode == Mode::Bdia && !self.config.two_streams;
        let bytes = |c| self.layout.bytes(c);
        use bdia_core::Category as C;
        let summary = Summary {
            accuracy: whole.accuracy,
            best_accuracy: best.max(whole.accuracy),
            val_loss: whole.loss,
            loss: last.iter().sum::<f64>() / last.len().max(1) as f64,
            verify_mismatches: (self.args.verify && exact).then_some(mismatches),
            rebuild_error: (self.args.verify && float).then_some(worst),
            images_per_s: if seconds > 0.0 {
                (batch * (steps - first) as usize) as f64 / seconds
            } else {
                0.0
            },
            parameters: self.model.parameters(),
            plan_bytes: self.layout.total(),
            activation_bytes: bytes(C::Activations)
                + bytes(C::ActivationGradients)
                + bytes(C::SideBits)
                + bytes(C::Workspace),
            peak_bytes: peak,
            peak_rss_bytes: peak_rss_bytes(),
            steps,
            out: out.clone(),
        };
        self.tell(&summary, &whole);
        *self.summary = Some(summary);
        Ok(())
    }
}

/// `loss.svg` and `accuracy.svg`, over epochs.
fn draw(out: &Path, curve: &[Metric], per_epoch: u32) -> Result<(), Failure> {
    let epoch = |m: &Metric| m.step as f64 / f64::from(per_epoch);
    let points = |f: &dyn Fn(&Metric) -> Option<f64>| {
        curve.iter().filter_map(|m| Some((epoch(m), f(m)?))).collect()
    };
    let train = Series { name: "training", points: points(&|m| Some(m.loss)), ..Series::default() };
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
    let points = points(&|m| m.accuracy.map(|a| 100.0 * a));
    let accuracy = Series { name: "held out", points, marks: true, ..Series::default() };
    let chart =
        Chart { title: "Held-out accuracy", x: "epoch", y: "accuracy (%)", series: &[accuracy] };
    Ok(report::svg(&out.join("accuracy.svg"), &chart)?)
}

impl Run<'_> {
    fn announce(&self, first: u32, steps: u32, identity: &str) {
        let (c, s) = (&self.config, self.model.setup());
        report::note!(
            "{} parameters, {} blocks, width {}, {} patches, batch {}, mode {}; {} training and {} held-out images of {}",
            self.model.parameters(),
            c.layers,
            c.width,
            s.dims.patches.count(),
            self.args.batch,
            mode_name(&self.args),
            self.data.train.len(),
            self.data.test.len(),
            self.data.name,
        );
        report::note!(
            "{identity}, {} thread(s); plan {}, chunks of {} image(s)",
            s.threads,
            report::bytes(self.layout.total() as u64),
            self.choice.chunk
        );
        if first > 0 {
            report::note!("goes on after step {first} of {steps}");
        }
    }

    fn tell(&self, s: &Summary, whole: &Evaluation) {
        let mut text = String::new();
        if self.config.classes.len() <= 20 {
            text += &confusion_table(&self.config.classes, &whole.confusion);
        }
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "\nheld-out accuracy {} (best epoch {}), loss {:.4}; training loss {:.4}",
            percent(s.accuracy),
            percent(s.best_accuracy),
            s.val_loss,
            s.loss
        );
        if let Some(n) = s.verify_mismatches {
            let _ = writeln!(text, "verified: {n} rebuilt values differ from the originals");
        }
        if let Some(e) = s.rebuild_error {
            let _ = writeln!(text, "rebuilding without a grid: largest error {e:.3e}");
        }
        let plans: Vec<_> = core::iter::once((mode_name(&self.args), self.layout.clone()))
            .chain(self.others.clone())
            .collect();
        let _ = writeln!(text, "\n{}", machine::memory_table(&plans, Some(s.peak_bytes as u64)));
        let _ = writeln!(
            text,
            "peak of the whole process, with data: {}\n\nfiles in {}: model.safetensors, best.safetensors, config.json, \
             metrics.jsonl, loss.svg, accuracy.svg, step-*.ckpt",
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

/// How often images of the class of a row were taken for the class of a column.
fn confusion_table(classes: &[String], confusion: &[Vec<u32>]) -> String {
    let width = classes.iter().map(|c| c.chars().count()).max().unwrap_or(1).clamp(4, 12);
    let short = |c: &str| c.chars().take(width).collect::<String>();
    let mut text = format!("\nconfusion (rows: the class, columns: the answer)\n{:width$}", "");
    for c in classes {
        text += &format!(" {:>width$}", short(c));
    }
    for (c, row) in classes.iter().zip(confusion) {
        text += &format!("\n{:>width$}", short(c));
        for n in row {
            text += &format!(" {n:>width$}");
        }
    }
    text + "\n"
}

/// Does something with the weights of a run and its held-out images, or others.
fn with_model(
    dir: &Path,
    data: Option<&Path>,
    best: bool,
    machine_args: &MachineArgs,
    frac_bits: Option<u32>,
    task: impl Task,
) -> Result<(), Failure> {
    struct Eval<T> {
        path: std::path::PathBuf,
        config: VitConfig,
        images: Images,
        model: Vit,
        task: T,
    }
    impl<T: Task> Work for Eval<T> {
        fn on<B: Backend<Real = f32>>(mut self, be: &mut B, _: usize) -> Result<(), Failure> {
            load_weights(&self.path, be, &self.model)?;
            self.task.on(be, &mut self.model, &self.config, &self.images)
        }
    }

    let config = VitConfig::read_dir(dir)?;
    let mut args: TrainArgs = run::saved(dir)?;
    if let Some(data) = data {
        (args.data, args.test_subset) = (Some(data.into()), None);
    }
    let images = prepare(&args)?.0.test;
    if images.shape != config.image {
        let what = format!("images of {:?}, the model is for {:?}", images.shape, config.image);
        return Err(Failure::Other(format!("{}: {what}", data.unwrap_or(dir).display())));
    }
    let threads = machine::threads(machine_args);
    let batch = 64.min(images.len()).max(1);
    let setup = Setup {
        dims: config.dims(),
        batch,
        chunk: batch,
        mode: stack::Mode::Bdia,
        grid: Some(Grid::new(frac_bits.unwrap_or(config.bdia.frac_bits))?),
        gamma: Gamma::new(0.5, Sign::Plus)?,
        rule: None,
        fused: true,
        verify: false,
        drop_path: 0.0,
        smoothing: 0.0,
        mixup: false,
        threads,
        library: machine::library(machine_args, threads),
    };
    let (_, model, layout) =
        machine::lay_out(&setup, machine_args.backend, 1, machine_args.memory, None)?;
    let path = dir.join(if best { "best.safetensors" } else { weights::FILE });
    machine::run(machine_args, threads, &layout, Eval { path, config, images, model, task })
}

/// What is done with a trained model.
trait Task {
    fn on<B: Backend<Real = f32>>(
        self,
        be: &mut B,
        model: &mut Vit,
        config: &VitConfig,
        images: &Images,
    ) -> Result<(), Failure>;
}

/// Evaluates the weights of a run on its held-out images, or on others.
///
/// # Errors
/// [`Failure`]
pub fn evaluation(
    dir: &Path,
    data: Option<&Path>,
    best: bool,
    inferences: &[Inference],
    machine_args: &MachineArgs,
    frac_bits: Option<u32>,
) -> Result<Vec<Evaluation>, Failure> {
    struct All<'a>(&'a [Inference], &'a mut Vec<Evaluation>);
    impl Task for All<'_> {
        fn on<B: Backend<Real = f32>>(
            self,
            be: &mut B,
            model: &mut Vit,
            config: &VitConfig,
            images: &Images,
        ) -> Result<(), Failure> {
            for &inference in self.0 {
                self.1.push(evaluate(be, model, config, images, inference)?);
            }
            Ok(())
        }
    }
    let mut out = Vec::new();
    with_model(dir, data, best, machine_args, frac_bits, All(inferences, &mut out))?;
    Ok(out)
}

/// Largest magnitude that activations and residuals of the first held-out images of a run reach
/// ([`Vit::largest`]).
///
/// # Errors
/// [`Failure`]
pub fn largest_activation(dir: &Path, machine_args: &MachineArgs) -> Result<f64, Failure> {
    struct Largest<'a>(&'a mut f64);
    impl Task for Largest<'_> {
        fn on<B: Backend<Real = f32>>(
            self,
            be: &mut B,
            model: &mut Vit,
            config: &VitConfig,
            images: &Images,
        ) -> Result<(), Failure> {
            let n = model.chunk().min(images.len());
            *self.0 = model.largest::<B, Failure>(be, n, |i, out| {
                normalized(config, images.image(i), out);
                Ok([i32::from(images.labels[i]); 2])
            })?;
            Ok(())
        }
    }
    let mut largest = 0.0;
    with_model(dir, None, false, machine_args, None, Largest(&mut largest))?;
    Ok(largest)
}

/// `eval`.
///
/// # Errors
/// [`Failure`]
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let gamma = Gamma::new(args.gamma, Sign::Plus)?;
    let inference = match args.inference {
        cli::Inference::Float => Inference::Float(gamma),
        cli::Inference::Quantized => Inference::Quantized(gamma),
    };
    let all = evaluation(
        &args.weights,
        args.data.as_deref(),
        args.best,
        &[inference],
        &args.machine,
        None,
    )?;
    let config = VitConfig::read_dir(&args.weights)?;
    for e in all {
        if config.classes.len() <= 20 {
            report::tell!("{}", confusion_table(&config.classes, &e.confusion));
        }
        report::tell!("accuracy {}, loss {:.4}", percent(e.accuracy), e.loss);
        if args.json {
            report::tell!("{}", serde_json::json!({"accuracy": e.accuracy, "loss": e.loss}));
        }
    }
    Ok(())
}

/// `plan`.
///
/// # Errors
/// [`Failure`]
pub fn plan(args: &TrainArgs) -> Result<(), Failure> {
    let (_, config, _) = prepare(args)?;
    let setup = setup(args, &config, 1)?;
    let kind = args.machine.backend;
    let (choice, model, layout) =
        machine::lay_out::<Vit>(&setup, kind, 1, args.machine.memory, None)?;
    let mut plans = vec![(mode_name(args), layout.clone())];
    plans.extend(other_plans(&setup, kind, choice.chunk)?);
    report::tell!("{} parameters; chunks of {} image(s)\n", model.parameters(), choice.chunk);
    report::tell!("{}", machine::memory_table(&plans, None));
    if args.json {
        let json =
            serde_json::json!({"parameters": model.parameters(), "plan_bytes": layout.total()});
        report::tell!("{json}");
    }
    Ok(())
}
