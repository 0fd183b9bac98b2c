//! The report: runs every configuration in a process of its own, asserts its results, and only then
//! looks at its time.

mod cuda;

use core::time::Duration;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use bdia_core::plan::Rows;
use bdia_cpu::{Cpu, Products};
use bdia_train::cli::{BackendKind, Mode, PrecisionKind};
use bdia_train::report::bytes;
use clap::{Args, ValueEnum};

use crate::Failure;
use crate::count::{stages, total};
use crate::engine::status;
use crate::job::{Job, Model, Record, median};
use crate::kernels::{Bench, GPT2, Kernel, Shapes, VIT, Work};
use crate::page::{self, Line, Section, Table};
use crate::peers::{Peer, Python, output};
use crate::roof::{Roof, copy, product};

/// `bdia-bench report`
#[derive(Debug, Clone, Args)]
pub struct ReportArgs {
    /// Small models and few steps: under two minutes
    #[arg(long)]
    pub quick: bool,
    /// Run PyTorch as well, in turn with ours, and print ratios
    #[arg(long)]
    pub peers: bool,
    /// The Python that has PyTorch and transformers (`bench/peers/make-venv`)
    #[arg(long, default_value = "target/peers-venv/bin/python")]
    pub python: PathBuf,
    /// Threads [default: all]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Times that both sides are run, with --peers [default: 3; quick: 2]
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Only this part [default: the processor, and a CUDA device where there is one]
    #[arg(long)]
    pub only: Option<Only>,
    /// Only these models (may be given several times) [default: those of each part]
    #[arg(long)]
    pub model: Vec<Model>,
    /// Only these precisions on a CUDA device (may be given several times) [default: all]
    #[arg(long)]
    pub precision: Vec<PrecisionKind>,
    /// Number of the CUDA device
    #[arg(long, default_value_t = 0)]
    pub device: u64,
    /// Where to write [default: bench/reports/MACHINE-DATE]
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// What a report can be about alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Only {
    /// The processor.
    Cpu,
    /// A CUDA device.
    Cuda,
}

/// A promise and what was found.
struct Target {
    what: &'static str,
    target: String,
    found: String,
    met: bool,
}

/// A row of [`page::bars`].
type Bar = (String, f64, String, bool);

struct Report {
    args: ReportArgs,
    threads: usize,
    /// The best that was seen in the whole run.
    roof: Roof,
    /// The best product rate just before and just after the last run: the machine's speed may
    /// change within a report.
    near: f64,
    records: Vec<Record>,
    kernels: Vec<Vec<String>>,
    checks: Table,
    wrong: bool,
    targets: Vec<Target>,
    sections: Vec<Section>,
}

/// Writes the report.
///
/// # Errors
/// Files that cannot be written. A configuration that fails is a row of the report; results that
/// are wrong are an error after the report is written.
pub fn report(args: &ReportArgs) -> Result<(), Failure> {
    let clock = std::time::Instant::now();
    let threads = args
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, core::num::NonZero::get));
    say(&format!("measuring the machine with {threads} thread(s)"));
    let roof = Roof::measure(threads, if args.quick { 0.5 } else { 3.0 })?;
    let mut r = Report {
        args: args.clone(),
        threads,
        roof,
        near: roof.flops,
        records: Vec::new(),
        kernels: Vec::new(),
        checks: Table::new(&["configuration", "assertion", "result"]),
        wrong: false,
        targets: Vec::new(),
        sections: Vec::new(),
    };
    // What is measured is on disk before the next part begins: these are long.
    if args.only != Some(Only::Cuda) {
        if args.peers {
            r.peers()?;
            r.write(clock.elapsed())?;
        }
        r.steps()?;
        r.write(clock.elapsed())?;
        r.scaling()?;
        r.write(clock.elapsed())?;
        r.kernels()?;
        r.write(clock.elapsed())?;
    }
    if args.only != Some(Only::Cpu) {
        r.cuda(clock)?;
    }
    r.operations();
    let dir = r.write(clock.elapsed())?;
    say(&format!("written to {}", dir.display()));
    if r.wrong {
        return Err(Failure::Other(format!(
            "results were wrong: see WRONG in {}",
            dir.join("report.md").display()
        )));
    }
    Ok(())
}

fn say(text: &str) {
    eprintln!("{text}");
}

/// `numerator / denominator`, 0 where there is nothing to divide by.
fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// The largest relative difference of two lists of losses; infinite where they cannot be compared.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    if a.is_empty() || b.is_empty() {
        return f64::INFINITY;
    }
    a.iter()
        .zip(b)
        .map(
            |(a, b)| {
                if a.is_finite() && b.is_finite() { (a - b).abs() / b.abs() } else { f64::INFINITY }
            },
        )
        .fold(0.0, f64::max)
}

fn same_bits(a: &[f64], b: &[f64]) -> bool {
    !a.is_empty() && !b.is_empty() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Runs a job in a process of its own: its peak is its own.
fn spawn(job: &Job) -> Result<Record, Failure> {
    let program = std::env::current_exe()
        .map_err(|error| Failure::File { path: "this program".into(), error })?;
    let mut command = Command::new(program);
    command.arg("run").args(job.flags());
    output(command)
}

/// A kernel's name, time, rate, roof and share of it; `worst` becomes the update kernel with the
/// smallest share so far.
fn kernel_cells<B>(
    kernel: &Kernel<B>,
    seconds: f64,
    flops: f64,
    bandwidth: f64,
    worst: &mut Option<(f64, String)>,
) -> [String; 5] {
    let (work, roof, unit) = match kernel.work {
        Work::Bytes(n) => (n, bandwidth, "GB/s"),
        Work::Operations(n) => (n, flops, "GFLOP/s"),
    };
    let share = ratio(work / seconds, roof);
    let update = ["quantize", "step", "inverse"].iter().any(|n| kernel.name.starts_with(n));
    if update && worst.as_ref().is_none_or(|w| share < w.0) {
        *worst = Some((share, kernel.name.clone()));
    }
    [
        kernel.name.clone(),
        format!("{:.4} ms", seconds * 1e3),
        format!("{:.1} {unit}", work / seconds / 1e9),
        format!("{:.1} {unit}", roof / 1e9),
        format!("{:.0} %", share * 100.0),
    ]
}

/// What a job is called in tables.
fn title(job: &Job) -> String {
    let layers = job.layers.map_or(String::new(), |k| format!(" K={k}"));
    let dropout =
        if job.dropout > 0.0 { format!(" dropout {}", job.dropout) } else { String::new() };
    let on = match job.backend {
        BackendKind::Cuda => format!(" cuda {}", bdia_train::cli::name_of(&job.precision)),
        BackendKind::Cpu if job.precision != PrecisionKind::F32 => {
            format!(" {}", bdia_train::cli::name_of(&job.precision))
        }
        _ => String::new(),
    };
    format!(
        "{}{layers}{on} {} B={} T={}{dropout}",
        job.model.name(),
        job.mode_name(),
        job.batch(),
        job.tokens()
    )
}

impl Report {
    fn check(&mut self, what: &str, assertion: &str, result: Result<(), String>) -> bool {
        let good = result.is_ok();
        let text = match result {
            Ok(()) => "ok".into(),
            Err(found) => {
                self.wrong = true;
                say(&format!("WRONG: {what}: {assertion}: {found}"));
                format!("WRONG: {found}")
            }
        };
        self.checks.row([what.into(), assertion.into(), text]);
        good
    }

    /// Those of a part's models that were asked for.
    fn chosen(&self, models: &[Model]) -> Vec<Model> {
        let asked = &self.args.model;
        models.iter().copied().filter(|m| asked.is_empty() || asked.contains(m)).collect()
    }

    fn job(&self, model: Model, mode: Mode) -> Job {
        let steps = match model {
            _ if self.args.quick => 3,
            Model::Gpt2 => 4,
            Model::Gpt2Medium | Model::Llama135m => 3,
            _ => 6,
        };
        Job { threads: self.threads, steps, ..Job::new(model, mode) }
    }

    /// A job's record, if it ran and nothing speaks against its result.
    fn asserted(&mut self, job: &Job) -> Result<Option<Record>, Failure> {
        let name = title(job);
        say(&name);
        let span = if self.args.quick { 0.1 } else { 0.5 };
        // The processor's rate says nothing about a device.
        let near = |threads| {
            if job.backend == BackendKind::Cuda { Ok(0.0) } else { product(threads, span) }
        };
        let before = near(self.threads)?;
        let record = match spawn(job) {
            Ok(record) => record,
            Err(error) => {
                self.checks.row([name, "runs".into(), format!("did not run: {error}")]);
                return Ok(None);
            }
        };
        self.near = before.max(near(self.threads)?);
        self.roof.flops = self.roof.flops.max(self.near);
        let finite = record.losses.iter().all(|l| l.is_finite());
        if !finite {
            self.check(&name, "losses are finite", Err(format!("{:?}", record.losses)));
            return Ok(None);
        }
        self.records.push(record.clone());
        if job.mode == Mode::Bdia && job.backend != BackendKind::Reference {
            let steps = if job.model == Model::Gpt2Medium { 1 } else { 2.min(job.steps) };
            let result = match spawn(&Job { verify: true, steps, warmup: 0, ..job.clone() }) {
                Err(Failure::Other(text)) if text.contains("plan needs") => {
                    let note = "not kept: all activations do not fit; checksums only".into();
                    self.checks.row([name, "all activations kept".into(), note]);
                    return Ok(Some(record));
                }
                Err(error) => Err(error.to_string()),
                Ok(v) if v.mismatches != Some(0) => {
                    Err(format!("{:?} values differ", v.mismatches))
                }
                Ok(v) if !same_bits(&v.losses, &record.losses) => {
                    Err(format!("{:?} and {:?}", v.losses, record.losses))
                }
                Ok(_) => Ok(()),
            };
            if !self.check(
                &name,
                "no mismatch with all activations kept, same losses in every bit",
                result,
            ) {
                return Ok(None);
            }
        }
        Ok(Some(record))
    }

    /// A cut-down model on this backend and on the scalar one.
    fn like_reference(&mut self, job: &Job) {
        let context = job.tokens().min(8);
        let every = job.checkpoint_every.or((job.mode == Mode::Checkpoint).then_some(2));
        let small = Job {
            layers: Some(3),
            vocab: Some(job.model.architecture(job).vocab().min(512)),
            batch: Some(2),
            context: Some(context),
            steps: 2,
            checkpoint_every: every,
            verify: true,
            ..job.clone()
        };
        let plain = Job {
            backend: BackendKind::Reference,
            device: 0,
            precision: PrecisionKind::F32,
            ..small.clone()
        };
        // Two orders of summation in f32; the second loss has seen gradients and an update. Factors
        // with 10 or 7 bits of fraction are 2^3 and 2^6 times as coarse as that allows for in one
        // product; sums average most of it out.
        let (limit, assertion) = match job.precision {
            PrecisionKind::F32 => (2e-4, "losses of the scalar reference, to 2e-4"),
            PrecisionKind::Tf32 => (2e-3, "losses of the scalar reference, to 2e-3"),
            PrecisionKind::Bf16 => (1e-2, "losses of the scalar reference, to 1e-2"),
        };
        let result = match (spawn(&small), spawn(&plain)) {
            (Ok(a), Ok(b)) => match apart(&a.losses, &b.losses) {
                d if d < limit => Ok(()),
                d => Err(format!("{d:.1e} apart: {:?} and {:?}", a.losses, b.losses)),
            },
            (Err(e), _) | (_, Err(e)) => Err(e.to_string()),
        };
        self.check(&title(&small), assertion, result);
    }

    /// Recomputing computes the same function as storing.
    fn like_standard(&mut self, job: &Job, record: &Record, standard: Option<&[f64]>) -> bool {
        let (Mode::Checkpoint, Some(standard)) = (job.mode, standard) else { return true };
        let d = apart(&record.losses, standard);
        let result = if d < 1e-5 { Ok(()) } else { Err(format!("{d:.1e} apart")) };
        self.check(&title(job), "losses of mode standard, to 1e-5", result)
    }

    /// Modes × backends × models.
    fn steps(&mut self) -> Result<(), Failure> {
        let models: &[Model] = if self.args.quick {
            &[Model::Tiny, Model::LlamaTiny, Model::VitSmall]
        } else {
            &[Model::Gpt2, Model::Gpt2Medium, Model::Llama135m, Model::VitSmall, Model::Mini]
        };
        // With peers this model has its rows there: it takes minutes.
        let models = self
            .chosen(models)
            .into_iter()
            .filter(|&m| !(self.args.peers && m == Model::Gpt2Medium));
        let models: Vec<Model> = models.collect();
        let mut table = Table::new(&[
            "model",
            "mode",
            "backend",
            "B×T",
            "s/step",
            "spread",
            "items/s",
            "GFLOP/step",
            "share of peak",
            "peak memory",
            "side bits",
        ]);
        let mut memory = Table::new(&["model", "mode", "part", "plan", "found"]);
        let (mut charts, mut memory_charts) = (Vec::new(), Vec::new());
        for model in models {
            let k = model.architecture(&Job::new(model, Mode::Bdia)).layers();
            let dropout = if model == Model::VitSmall { 0.1 } else { 0.0 };
            let mut jobs: Vec<Job> =
                [Mode::Bdia, Mode::Standard, Mode::BdiaFloat].map(|m| self.job(model, m)).into();
            // Segments: single blocks, as PyTorch does, and the root of the number of blocks, which
            // needs least memory.
            for every in [1, bdia_train::machine::checkpoint_every(None, k) as u64] {
                jobs.push(Job {
                    checkpoint_every: Some(every),
                    ..self.job(model, Mode::Checkpoint)
                });
            }
            // As fast as it is meant to be only where instructions multiply bf16.
            if bf16_products() {
                jobs.push(Job { precision: PrecisionKind::Bf16, ..self.job(model, Mode::Bdia) });
            }
            if model == Model::Gpt2Medium {
                jobs.retain(|j| j.mode != Mode::BdiaFloat && j.checkpoint_every != Some(1));
            }
            if self.args.quick && model == Model::VitSmall {
                jobs.iter_mut().for_each(|j| j.batch = Some(8));
            }
            let reference = Job {
                backend: BackendKind::Reference,
                steps: 2,
                ..self.job(Model::Tiny, Mode::Bdia)
            };
            if matches!(model, Model::Mini | Model::Tiny) {
                jobs.push(reference);
            }
            if model == Model::Mini {
                jobs.push(Job { steps: 20, ..self.job(Model::Tiny, Mode::Bdia) });
            }
            let (mut speed, mut memories): (Vec<Bar>, Vec<_>) = (Vec::new(), Vec::new());
            let mut found: Vec<(Job, Record, f64)> = Vec::new();
            for mut job in jobs {
                job.dropout = dropout;
                if job.backend == BackendKind::Cpu && job.model == model {
                    self.like_reference(&job);
                }
                let Some(record) = self.asserted(&job)? else { continue };
                let standard = found
                    .iter()
                    .find(|f| f.0.mode == Mode::Standard)
                    .map(|f| f.1.losses.as_slice());
                if !self.like_standard(&job, &record, standard) {
                    continue;
                }
                let operations = total(&stages(&job));
                let (low, high) = record.spread();
                let seconds = record.seconds_per_step();
                let full = job.backend == BackendKind::Cpu && job.precision == PrecisionKind::F32;
                let share = if full { operations / seconds / self.near } else { 0.0 };
                table.row([
                    job.model.name().into(),
                    record.mode.clone(),
                    record.backend.clone(),
                    format!("{}×{}", record.batch, record.context),
                    format!("{seconds:.3}"),
                    format!("{low:.3}–{high:.3}"),
                    format!("{:.1} {}", record.items_per_s, record.unit),
                    format!("{:.1}", operations / 1e9),
                    if share > 0.0 { format!("{:.1} %", share * 100.0) } else { "–".into() },
                    bytes(record.peak_rss),
                    bytes(record.planned("side bits and checksums")),
                ]);
                if job.model == model && job.backend == BackendKind::Cpu && !full {
                    let rate = format!("{:.1}/s", record.items_per_s);
                    speed.push((
                        format!("{}, bf16", record.mode),
                        record.items_per_s,
                        rate,
                        job.mode == Mode::Bdia,
                    ));
                }
                if job.model == model && full {
                    for p in &record.parts {
                        memory.row([
                            model.name().into(),
                            record.mode.clone(),
                            p.name.clone(),
                            bytes(p.plan),
                            bytes(p.measured),
                        ]);
                    }
                    let rest = record
                        .peak_rss
                        .saturating_sub(record.parts.iter().map(|p| p.measured).sum());
                    memory.row([
                        model.name().into(),
                        record.mode.clone(),
                        "process: code, threads, allocator".into(),
                        bytes(record.base_rss),
                        bytes(rest),
                    ]);
                    memory.row([
                        model.name().into(),
                        record.mode.clone(),
                        "all, against the process' peak".into(),
                        bytes(record.plan.iter().map(|p| p.1).sum::<u64>() + record.base_rss),
                        bytes(record.peak_rss),
                    ]);
                    speed.push((
                        record.mode.clone(),
                        record.items_per_s,
                        format!("{:.1}/s, {:.0} %", record.items_per_s, share * 100.0),
                        job.mode == Mode::Bdia,
                    ));
                    let values = record.plan.iter().map(|p| p.1 as f64).collect();
                    memories.push((
                        record.mode.clone(),
                        values,
                        bytes(record.plan.iter().map(|p| p.1).sum()),
                    ));
                }
                found.push((job, record, share));
            }
            if let Some((_, record, _)) = found.first() {
                let name =
                    format!("{}, B = {}, T = {}", model.name(), record.batch, record.context);
                charts.push(page::bars(
                    &format!("{name}: {} per second, share of peak", model.unit()),
                    &speed,
                ));
                let parts: Vec<String> = record.plan.iter().map(|p| p.0.clone()).collect();
                memory_charts.push(page::stacked(&format!("{name}: plan"), &parts, &memories));
            }
            self.mode_targets(model, &found);
        }
        let text = format!(
            "Median of the steps after the first. Share of peak: all floating-point operations of \
             the step (counted below) per second, over the rate of an f32 matrix product with {} \
             thread(s), the better of two that were measured just before and just after the \
             configuration (the best of the whole run: {:.1} GFLOP/s). Peak memory: VmHWM of the \
             process.",
            self.threads,
            self.roof.flops / 1e9,
        );
        self.sections.push(Section { title: "Training steps".into(), text, table, charts });
        let text = "Plan: what the layout says before anything is allocated. Found: pages of each \
                    part that are in memory after the last step (/proc/self/pagemap); for the \
                    libraries the peak of the allocator within the steps."
            .into();
        self.sections.push(Section {
            title: "Memory: plan and found".into(),
            text,
            table: memory,
            charts: memory_charts,
        });
        Ok(())
    }

    fn mode_targets(&mut self, model: Model, found: &[(Job, Record, f64)]) {
        let of = |mode| found.iter().find(|f| f.0.mode == mode && f.0.model == model);
        let (Some((job, bdia, share)), Some((plain_job, plain, _))) =
            (of(Mode::Bdia), of(Mode::Standard))
        else {
            return;
        };
        let operations = total(&stages(job));
        let counted = ratio(operations, total(&stages(plain_job)));
        let measured = ratio(bdia.seconds_per_step(), plain.seconds_per_step());
        let gpt2 = model == Model::Gpt2;
        let (a, b) = match model {
            Model::Gpt2 => {
                ("gpt2: share of the product peak, bdia", "gpt2: time of bdia / standard")
            }
            Model::Gpt2Medium => (
                "gpt2-medium: share of the product peak, bdia",
                "gpt2-medium: time of bdia / standard",
            ),
            Model::VitSmall => {
                ("vit-small: share of the product peak, bdia", "vit-small: time of bdia / standard")
            }
            Model::Mini | Model::Tiny | Model::Llama135m | Model::LlamaTiny => return,
        };
        let goal =
            |met: bool, what, target: String, found: String| Target { what, target, found, met };
        self.targets.push(goal(
            *share >= 0.85,
            a,
            "≥ 85 %".into(),
            format!("{:.1} %", share * 100.0),
        ));
        let limit = counted * 1.03;
        self.targets.push(goal(
            measured <= limit,
            b,
            format!("≤ {limit:.3} (counted {counted:.3} + 3 %)"),
            format!("{measured:.3}"),
        ));
        if model == Model::Gpt2Medium && !gpt2 {
            let met = bdia.peak_rss <= 4_700_000_000;
            self.targets.push(goal(
                met,
                "gpt2-medium: peak memory",
                "≤ 4.7 GB".into(),
                bytes(bdia.peak_rss),
            ));
        }
    }

    /// Threads, depth, batch, context, dropout.
    fn scaling(&mut self) -> Result<(), Failure> {
        let quick = self.args.quick;
        let base = if quick { Model::Tiny } else { Model::Gpt2 };
        let batch = if quick { 4 } else { 1 };
        let steps = |job: Job| Job { steps: 3, ..job };
        let job = steps(Job { batch: Some(batch), ..self.job(base, Mode::Bdia) });
        let mut table = Table::new(&[
            "varied",
            "value",
            "s/step",
            "items/s",
            "plan",
            "workspace",
            "X and G",
            "side bits",
            "peak memory",
        ]);
        let mut charts = Vec::new();
        let row = |varied: &str, value: String, r: &Record| {
            vec![
                varied.into(),
                value,
                format!("{:.4}", r.seconds_per_step()),
                format!("{:.1}", r.items_per_s),
                bytes(r.plan.iter().map(|p| p.1).sum()),
                bytes(r.planned("block workspace")),
                bytes(r.planned("activations (X)") + r.planned("activation gradients (G)")),
                bytes(r.planned("side bits and checksums")),
                bytes(r.peak_rss),
            ]
        };

        // Threads: all powers of two, and all there are.
        let mut counts: Vec<usize> =
            (0..).map(|i| 1 << i).take_while(|&n| n < self.threads).collect();
        counts.push(self.threads);
        let mut points: Vec<(f64, f64)> = Vec::new();
        let mut losses: Vec<Vec<f64>> = Vec::new();
        for n in counts {
            let Some(r) = self.asserted(&Job { threads: n, ..job.clone() })? else { continue };
            table.rows.push(row("threads", n.to_string(), &r));
            points.push((n as f64, r.items_per_s));
            losses.push(r.losses);
        }
        if let [first, rest @ ..] = &losses[..]
            && !rest.is_empty()
        {
            let result = if rest.iter().all(|l| same_bits(l, first)) {
                Ok(())
            } else {
                Err(format!("{losses:?}"))
            };
            self.check(&title(&job), "same losses in every bit for any number of threads", result);
        }
        charts.push(page::lines("Threads", "threads", "items/s", &[(base.name().into(), points)]));

        let (mut time, mut side) = (Vec::new(), Vec::new());
        let mut other = Vec::new();
        for k in [6, 12, 24, 48] {
            let Some(r) = self.asserted(&Job { layers: Some(k), ..job.clone() })? else { continue };
            table.rows.push(row("depth K", k.to_string(), &r));
            time.push((k as f64, r.seconds_per_step()));
            side.push((k as f64, r.planned("side bits and checksums") as f64));
            let tied_to_parameters =
                ["parameters", "gradients", "optimizer state", "side bits and checksums"];
            other.push(
                r.plan
                    .iter()
                    .filter(|p| !tied_to_parameters.contains(&p.0.as_str()))
                    .map(|p| p.1)
                    .sum::<u64>(),
            );
        }
        if other.len() == 4 {
            self.targets.push(Target {
                what: "memory at K = 6, 12, 24, 48, without parameters and their state",
                target: "differs by side bits only".into(),
                found: format!(
                    "{} at all depths, side bits {}",
                    bytes(other[0]),
                    side.iter().map(|s| bytes(s.1 as u64)).collect::<Vec<_>>().join(", ")
                ),
                met: other.windows(2).all(|w| w[0] == w[1]),
            });
            let off = off_line(&time);
            self.targets.push(Target {
                what: "time linear in K",
                target: "within 5 % of a line".into(),
                found: format!("{:.1} % off at most", off * 100.0),
                met: off <= 0.05,
            });
        }
        charts.push(page::lines("Depth", "blocks", "s/step", &[(base.name().into(), time)]));

        // Context: a narrow model, so that attention shows.
        let longest = if quick { 512 } else { 4096 };
        let narrow = if quick { Model::Tiny } else { Model::Mini };
        let mut workspace: Vec<(f64, f64)> = Vec::new();
        let mut time: Vec<(f64, f64)> = Vec::new();
        for t in (7..).map(|i| 1_usize << i).take_while(|&t| t <= longest) {
            let job = Job { context: Some(t), batch: Some(1), ..self.job(narrow, Mode::Bdia) };
            let Some(r) = self.asserted(&job)? else { continue };
            table.rows.push(row("context T", t.to_string(), &r));
            workspace.push((t as f64, r.planned("block workspace") as f64 / 1e6));
            time.push((t as f64, r.seconds_per_step()));
        }
        if workspace.len() > 2 {
            let off = off_line(&workspace);
            self.targets.push(Target {
                what: "workspace linear in T",
                target: "within 5 % of a line".into(),
                found: format!("{:.1} % off at most, T = 128 to {longest}", off * 100.0),
                met: off <= 0.05,
            });
        }
        let name = format!("{}, one sample", narrow.name());
        charts.push(page::lines(
            "Context",
            "tokens",
            "workspace, MB",
            &[(name.clone(), workspace)],
        ));
        charts.push(page::lines("Context", "tokens", "s/step", &[(name, time)]));

        let mut series: Vec<Line> = Vec::new();
        for mode in [Mode::Bdia, Mode::Standard] {
            let mut points = Vec::new();
            for b in [1, 2, 4, 8] {
                let Some(r) =
                    self.asserted(&steps(Job { batch: Some(b), ..self.job(base, mode) }))?
                else {
                    continue;
                };
                table.rows.push(row(&format!("batch B, {}", r.mode), b.to_string(), &r));
                points.push((b as f64, r.plan.iter().map(|p| p.1).sum::<u64>() as f64 / 1e6));
            }
            series.push((if mode == Mode::Bdia { "bdia" } else { "standard" }.into(), points));
        }
        charts.push(page::lines(
            &format!("Batch, {}", base.name()),
            "samples",
            "plan, MB",
            &series,
        ));

        let mut seconds = Vec::new();
        for p in [0.0, 0.1] {
            let job = Job { dropout: p, ..self.job(base, Mode::Bdia) };
            let Some(r) = self.asserted(&job)? else { continue };
            table.rows.push(row("dropout", p.to_string(), &r));
            seconds.push(r.seconds_per_step());
        }
        if let [without, with] = seconds[..] {
            let cost = ratio(with, without) - 1.0;
            self.targets.push(Target {
                what: "dropout 0.1 costs",
                target: "≤ 5 %".into(),
                found: format!("{:.1} %", cost * 100.0),
                met: cost <= 0.05,
            });
        }

        // Chunks: what the planner turns, for the record.
        let choices = Rows::CACHED.choices(4, 256).count();
        let text = format!(
            "{} in mode bdia unless a row says otherwise, B = {batch}. Context is varied on {}. \
             The planner has {choices} choices of chunks for B = 4, T = 256; without a budget it \
             takes the fastest.",
            base.name(),
            narrow.name()
        );
        self.sections.push(Section { title: "Scaling".into(), text, table, charts });
        Ok(())
    }

    /// The promise about the slowest of the update kernels, as [`kernel_cells`] found it.
    fn update_target(&mut self, what: &'static str, worst: Option<(f64, String)>) {
        if let Some((share, name)) = worst {
            self.targets.push(Target {
                what,
                target: "≥ 80 %".into(),
                found: format!("{:.0} % ({name})", share * 100.0),
                met: share >= 0.80,
            });
        }
    }

    /// Every kernel beside its roof.
    fn kernels(&mut self) -> Result<(), Failure> {
        self.roof.bandwidth =
            self.roof.bandwidth.max(copy(self.threads, if self.args.quick { 0.2 } else { 2.0 }));
        let mut table = Table::new(&["shapes", "kernel", "time", "rate", "roof", "share"]);
        let span = Duration::from_millis(if self.args.quick { 40 } else { 400 });
        let shapes: &[Shapes] = &[GPT2, VIT];
        let mut worst = None;
        let (flops, bandwidth) = (self.roof.flops, self.roof.bandwidth);
        for s in shapes {
            say(&format!("kernels at the shapes of {}", s.model));
            let mut bench = Bench::<Cpu>::new(s, Bench::<Cpu>::full(), self.threads)?;
            let mut be =
                Cpu::new(&bench.layout, self.threads).map_err(bdia_train::Failure::from)?;
            for i in 0..bench.kernels.len() {
                bench.fill(&mut be)?;
                let kernel = &mut bench.kernels[i];
                let seconds = kernel.seconds(&mut be, span)?;
                let cells = kernel_cells(kernel, seconds, flops, bandwidth, &mut worst);
                table.row(core::iter::once(s.model.to_string()).chain(cells));
            }
        }
        self.update_target("update kernels over the copy's bandwidth", worst);
        self.kernels.clone_from(&table.rows);
        let text = "Bytes that one call must read and write, or operations of its products, per \
                    second. Block kernels work on one chunk, which caches may hold: they can \
                    exceed the bandwidth of memory. `cargo bench -p bdia-bench` has them with \
                    confidence intervals."
            .into();
        self.sections.push(Section { title: "Kernels".into(), text, table, charts: Vec::new() });
        Ok(())
    }

    /// Both sides in turn.
    fn peers(&mut self) -> Result<(), Failure> {
        let python = Python::new(self.args.python.clone());
        let quick = self.args.quick;
        let all_rounds = self.args.rounds.unwrap_or(if quick { 2 } else { 3 });
        let all: &[Peer] = &[
            Peer::STORE_ALL,
            Peer::CHECKPOINTING,
            Peer::BF16,
            Peer::BF16_CHECKPOINTING,
            Peer::BDIA,
        ];
        let models: &[(Model, &[Peer])] = if quick {
            &[(Model::Tiny, all), (Model::VitSmall, &[Peer::STORE_ALL, Peer::BDIA])]
        } else {
            &[
                (Model::Gpt2, all),
                (Model::Gpt2Medium, &[Peer::STORE_ALL, Peer::CHECKPOINTING]),
                (Model::VitSmall, all),
            ]
        };
        let mut table = Table::new(&[
            "model",
            "engine",
            "items/s",
            "ours / it",
            "spread",
            "peak memory",
            "ours / it",
            "above parameters and state",
            "ours / it",
        ]);
        if !bf16_products() {
            let why = "not run: this processor has no bf16 products (AMX, AVX512-BF16), without \
                       them a step takes minutes";
            self.checks.row([Peer::BF16.name(), "runs".into(), why.into()]);
        }
        let mut charts = Vec::new();
        let dir = std::env::temp_dir().join(format!("bdia-bench-{}", std::process::id()));
        for &(model, peers) in
            models.iter().filter(|(m, _)| !self.chosen(&[*m]).is_empty()).collect::<Vec<_>>()
        {
            let peers: Vec<Peer> = peers
                .iter()
                .copied()
                .filter(|p| bf16_products() || p.precision != "bf16")
                .collect();
            let mut job = self.job(model, Mode::Bdia);
            if quick && model == Model::VitSmall {
                job.batch = Some(8);
            }
            self.parity(&python, &job, &dir)?;
            // Its memory is what counts, and a round takes minutes.
            let rounds = if model == Model::Gpt2Medium { 1 } else { all_rounds };
            if model == Model::VitSmall {
                job.dropout = 0.1;
            }
            // (name, records of all rounds); ours first, f32 before bf16.
            let mut own = vec![job.clone(), Job { mode: Mode::Standard, ..job.clone() }];
            if bf16_products() {
                own.push(Job { precision: PrecisionKind::Bf16, ..job.clone() });
            }
            let mut engines: Vec<(String, Vec<Record>)> = ["bdia", "bdia, standard", "bdia, bf16"]
                .iter()
                .map(|&name| (name.into(), Vec::new()))
                .collect();
            engines.truncate(own.len());
            engines.extend(peers.iter().map(|p| (p.name(), Vec::new())));
            for round in 0..rounds {
                say(&format!("{} beside PyTorch, round {} of {rounds}", model.name(), round + 1));
                for i in 0..engines.len() {
                    // Those that no target is about run once: a round takes minutes.
                    let once: &[Peer] = match model {
                        Model::VitSmall => {
                            &[Peer::BF16, Peer::BF16_CHECKPOINTING, Peer::CHECKPOINTING]
                        }
                        _ => &[Peer::BDIA],
                    };
                    let peer = i.checked_sub(own.len()).map(|i| peers[i]);
                    if round > 0 && peer.is_some_and(|p| once.contains(&p)) {
                        continue;
                    }
                    let record = match peer {
                        None => spawn(&own[i]),
                        Some(peer) => python.run(&job, peer),
                    };
                    match record {
                        Ok(record) => {
                            self.records.push(record.clone());
                            engines[i].1.push(record);
                        }
                        Err(error) => {
                            let name = format!("{} {}", model.name(), engines[i].0);
                            self.checks.row([name, "runs".into(), format!("did not run: {error}")]);
                        }
                    }
                }
            }
            // Each precision beside the same one of ours.
            let ours_of = |name: &str| {
                let bf16 = name.contains("bf16");
                engines
                    .iter()
                    .find(|e| bf16 == e.0.contains("bf16"))
                    .map_or(Vec::new(), |e| e.1.clone())
            };
            let ours = ours_of("");
            if let (Model::Gpt2Medium, Some(r)) = (model, ours.first()) {
                self.targets.push(Target {
                    what: "gpt2-medium: peak memory",
                    target: "≤ 4.7 GB".into(),
                    found: bytes(r.peak_rss),
                    met: r.peak_rss <= 4_700_000_000,
                });
            }
            let (mut speed, mut memory) = (Vec::new(), Vec::new());
            for (name, records) in engines.iter().filter(|e| !e.1.is_empty()) {
                let ours = ours_of(name);
                let rates: Vec<f64> = records.iter().map(|r| r.items_per_s).collect();
                let ratios: Vec<f64> = ours
                    .iter()
                    .zip(records)
                    .map(|(a, b)| ratio(a.items_per_s, b.items_per_s))
                    .collect();
                let of = |f: &dyn Fn(&Record) -> f64, rs: &[Record]| {
                    median(&rs.iter().map(f).collect::<Vec<_>>())
                };
                let peak = |r: &Record| r.peak_rss as f64;
                let (rate, faster) = (median(&rates), median(&ratios));
                let (low, high) =
                    ratios.iter().fold((f64::MAX, 0.0_f64), |(a, b), &x| (a.min(x), b.max(x)));
                let (mine, theirs) = (of(&peak, &ours), of(&peak, records));
                let (my_activations, their_activations) =
                    (of(&activations, &ours), of(&activations, records));
                table.row([
                    model.name().into(),
                    name.clone(),
                    format!("{rate:.1} {}", model.unit()),
                    format!("{faster:.2}"),
                    format!("{low:.2}–{high:.2}"),
                    bytes(theirs as u64),
                    format!("{:.2}", ratio(mine, theirs)),
                    bytes(their_activations as u64),
                    format!("{:.2}", ratio(my_activations, their_activations)),
                ]);
                let is_ours = !name.starts_with("PyTorch");
                let label = name.replace("PyTorch ", "PT ").replace(" autocast", "");
                speed.push((label.clone(), rate, format!("{rate:.1}/s"), is_ours));
                memory.push((label, theirs, bytes(theirs as u64), is_ours));
                self.peer_targets(
                    model,
                    name,
                    faster,
                    ratio(mine, theirs),
                    ratio(my_activations, their_activations),
                );
            }
            let name = format!("{}, B = {}, T = {}", model.name(), job.batch(), job.tokens());
            charts.push(page::bars(&format!("{name}: {} per second", model.unit()), &speed));
            charts.push(page::bars(&format!("{name}: peak memory of the process"), &memory));
        }
        let _ = std::fs::remove_dir_all(&dir);
        let text = format!(
            "Both sides run in turn, {all_rounds} round(s) (gpt2-medium, and what no target is \
             about: one), each in a process of its own with {} thread(s); ratios are to ours of \
             the same precision in the same round: the median, and the lowest and highest. Above \
             parameters and state: peak less the process after its imports, parameters, gradients \
             and optimizer state. AdamW (fused in PyTorch) on both sides, the same data.",
            self.threads
        );
        self.sections.push(Section { title: "Beside PyTorch".into(), text, table, charts });
        Ok(())
    }

    /// The losses of both engines from the same parameters.
    fn parity(&mut self, python: &Python, job: &Job, dir: &Path) -> Result<(), Failure> {
        let steps = 3;
        let job = Job { weights: Some(dir.into()), steps, warmup: 0, ..job.clone() };
        crate::engine::init(&job, dir)?;
        for (mode, peer) in [(Mode::Standard, Peer::STORE_ALL), (Mode::Bdia, Peer::BDIA)] {
            let job = Job { mode, ..job.clone() };
            let result = match (spawn(&job), python.run(&job, peer)) {
                (Ok(a), Ok(b)) if b.parameters != a.parameters => {
                    Err(format!("{} and {} parameters", a.parameters, b.parameters))
                }
                (Ok(a), Ok(b)) => match apart(&a.losses, &b.losses) {
                    // f32 on both sides, sums in another order; each step's update amplifies what
                    // the one before left.
                    d if d < 5e-4 => Ok(()),
                    d => Err(format!("{d:.1e} apart: {:?} and {:?}", a.losses, b.losses)),
                },
                (Err(e), _) | (_, Err(e)) => Err(e.to_string()),
            };
            self.check(
                &title(&job),
                &format!(
                    "losses of {steps} steps from one file as {} has them, to 5e-4",
                    peer.name()
                ),
                result,
            );
        }
        let job = Job { batch: Some(2), steps: 2, verify: true, weights: None, ..job };
        let result = match python.run(&job, Peer::BDIA) {
            Ok(r) if r.mismatches == Some(0) => Ok(()),
            Ok(r) => Err(format!("{:?} values differ", r.mismatches)),
            Err(e) => Err(e.to_string()),
        };
        self.check(&title(&job), "PyTorch BDIA rebuilds its own activations exactly", result);
        Ok(())
    }

    fn peer_targets(
        &mut self,
        model: Model,
        peer: &str,
        faster: f64,
        memory: f64,
        activations: f64,
    ) {
        let mut put = |what, target: &str, found: f64, met| {
            self.targets.push(Target {
                what,
                target: target.into(),
                found: format!("{found:.2}"),
                met,
            });
        };
        match (model, peer) {
            (Model::Gpt2, "PyTorch store-all") => {
                put("gpt2: tokens/s over PyTorch", "≥ 1.35", faster, faster >= 1.35);
                put("gpt2: peak memory over PyTorch", "≤ 0.40", memory, memory <= 0.40);
            }
            (Model::Gpt2, "PyTorch checkpointing") => {
                put(
                    "gpt2: tokens/s over PyTorch with checkpointing",
                    "≥ 1.45",
                    faster,
                    faster >= 1.45,
                );
            }
            (Model::Gpt2, "PyTorch store-all, bf16 autocast") => {
                put("gpt2, bf16: tokens/s over PyTorch", "≥ 1.0", faster, faster >= 1.0);
            }
            (Model::Gpt2, "PyTorch checkpointing, bf16 autocast") => {
                put(
                    "gpt2, bf16: tokens/s over PyTorch with checkpointing",
                    "≥ 1.15",
                    faster,
                    faster >= 1.15,
                );
            }
            (Model::VitSmall, "PyTorch store-all") => {
                put("vit: images/s over PyTorch", "≥ 1.2", faster, faster >= 1.2);
                put(
                    "vit: activation memory over PyTorch",
                    "≤ 0.08",
                    activations,
                    activations <= 0.08,
                );
            }
            (Model::VitSmall, "PyTorch bdia") => {
                put("vit: images/s over a PyTorch BDIA", "≥ 1.7", faster, faster >= 1.7);
            }
            _ => {}
        }
    }

    /// The count behind the shares.
    fn operations(&mut self) {
        let mut table =
            Table::new(&["model", "stage", "products, GFLOP", "other, GFLOP", "bdia / standard"]);
        let models =
            [Model::Gpt2, Model::Gpt2Medium, Model::Llama135m, Model::VitSmall, Model::Mini];
        for model in models {
            let job = Job {
                dropout: if model == Model::VitSmall { 0.1 } else { 0.0 },
                ..Job::new(model, Mode::Bdia)
            };
            let list = stages(&job);
            for s in &list {
                table.row([
                    model.name().into(),
                    s.name.into(),
                    format!("{:.2}", s.products / 1e9),
                    format!("{:.3}", s.other / 1e9),
                    String::new(),
                ]);
            }
            let standard = total(&stages(&Job { mode: Mode::Standard, ..job.clone() }));
            table.row([
                model.name().into(),
                format!("all, B = {}, T = {}", job.batch(), job.tokens()),
                format!("{:.2}", list.iter().map(|s| s.products).sum::<f64>() / 1e9),
                format!("{:.3}", list.iter().map(|s| s.other).sum::<f64>() / 1e9),
                format!("{:.3}", ratio(total(&list), standard)),
            ]);
        }
        let text = "Every floating-point operation that a step in mode bdia must do. A \
                    multiply-add is two operations; a root, `exp`, `tanh` or `erf` is one; integer \
                    work, random numbers and copies are none. The formulas are in \
                    `bench/src/count.rs`."
            .into();
        self.sections.push(Section {
            title: "Operations of a step".into(),
            text,
            table,
            charts: Vec::new(),
        });
    }

    /// Everything that is there, in the order of the page.
    fn all_sections(&self) -> Vec<Section> {
        let mut sections = Vec::new();
        if !self.targets.is_empty() {
            let mut table = Table::new(&["promise", "target", "found", ""]);
            for t in &self.targets {
                let met = if t.met { "met" } else { "missed" };
                table.row([t.what.into(), t.target.clone(), t.found.clone(), met.into()]);
            }
            let text =
                "Ratios are of the same run; what this run did not measure is not listed.".into();
            sections.push(Section { title: "Targets".into(), text, table, charts: Vec::new() });
        }
        sections.extend(self.sections.iter().cloned());
        sections.push(Section {
            title: "What was asserted before a time counted".into(),
            text: "Losses of the timed run equal those of a run that keeps all activations, bit \
                   for bit, and that run finds no value that was rebuilt differently. A cut-down \
                   model (3 blocks of the same width, 2 samples of 8 tokens or 2 images, at most \
                   512 words) gives the losses of the scalar reference backend."
                .into(),
            table: self.checks.clone(),
            charts: Vec::new(),
        });
        sections
    }

    fn write(&self, took: Duration) -> Result<PathBuf, Failure> {
        let (machine, date) = (machine(), date(SystemTime::now()));
        let slug =
            format!("{}-{date}{}", slug(&machine), if self.args.quick { "-quick" } else { "" });
        let dir =
            self.args.out.clone().unwrap_or_else(|| {
                Path::new(env!("CARGO_MANIFEST_DIR")).join("reports").join(slug)
            });
        std::fs::create_dir_all(&dir)
            .map_err(|error| Failure::File { path: dir.clone(), error })?;
        let line = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        let mut versions: Vec<&str> = self.records.iter().map(|r| r.version.as_str()).collect();
        versions.sort_unstable();
        versions.dedup();
        let intro = [
            format!(
                "`cargo run --release -p bdia-bench -- {line}`, {date}, {:.0} s.",
                took.as_secs_f64()
            ),
            format!(
                "{machine}; {} thread(s); {} of memory. Limits measured in this run: {:.1} GFLOP/s \
                 in f32 matrix products, {:.1} GB/s read and written by a copy.",
                self.threads,
                bytes(memory_total()),
                self.roof.flops / 1e9,
                self.roof.bandwidth / 1e9
            ),
            format!(
                "{}; {}; commit {}.",
                versions.join("; "),
                tool("rustc", &["--version"]),
                commit()
            ),
        ];
        let title = "bdia: speed and memory";
        let put = |name: &str, text: String| {
            let path = dir.join(name);
            std::fs::write(&path, text).map_err(|error| Failure::File { path, error })
        };
        let sections = self.all_sections();
        put("report.md", page::markdown(title, &intro, &sections))?;
        put("report.html", page::html(title, &intro, &sections))?;
        put("runs.csv", csv(&self.records))?;
        let mut kernels = "shapes,kernel,time,rate,roof,share\n".to_string();
        self.kernels.iter().for_each(|k| {
            kernels += &format!("{}\n", k.iter().map(|c| quoted(c)).collect::<Vec<_>>().join(","))
        });
        put("kernels.csv", kernels)?;
        Ok(dir)
    }
}

/// What a run needs above the process, parameters, gradients and optimizer state.
fn activations(r: &Record) -> f64 {
    let fixed = if r.plan.is_empty() {
        // PyTorch: parameters, gradients and two moments, all f32 under autocast as well.
        16 * r.parameters
    } else {
        r.planned("parameters") + r.planned("gradients") + r.planned("optimizer state")
    };
    r.peak_rss.saturating_sub(r.base_rss + fixed) as f64
}

/// Whether autocast has products to cast for.
fn bf16_products() -> bool {
    [Products::Amx, Products::Avx512Bf16].iter().any(|p| p.is_available())
}

/// How far points are from the line through the first and the last, relative to the line.
fn off_line(points: &[(f64, f64)]) -> f64 {
    let (Some(a), Some(b)) = (points.first(), points.last()) else { return 0.0 };
    let slope = ratio(b.1 - a.1, b.0 - a.0);
    points.iter().map(|p| (p.1 / (a.1 + slope * (p.0 - a.0)) - 1.0).abs()).fold(0.0, f64::max)
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.into()
    }
}

/// One line a run, with every step's seconds and loss.
fn csv(records: &[Record]) -> String {
    let mut out = "engine,backend,model,layers,mode,precision,batch,context,threads,dropout,\
                   unit,items_per_s,seconds_per_step,peak_rss,base_rss,parameters,planned,\
                   side_bits,mismatches,seconds,losses,version\n"
        .to_string();
    for r in records {
        let list =
            |values: &[f64]| values.iter().map(|v| format!("{v:.9}")).collect::<Vec<_>>().join(" ");
        let cells = [
            r.engine.clone(),
            r.backend.clone(),
            r.model.clone(),
            r.layers.map_or(String::new(), |k| k.to_string()),
            r.mode.clone(),
            r.precision.clone(),
            r.batch.to_string(),
            r.context.to_string(),
            r.threads.to_string(),
            r.dropout.to_string(),
            r.unit.clone(),
            format!("{:.3}", r.items_per_s),
            format!("{:.6}", r.seconds_per_step()),
            r.peak_rss.to_string(),
            r.base_rss.to_string(),
            r.parameters.to_string(),
            r.plan.iter().map(|p| p.1).sum::<u64>().to_string(),
            r.planned("side bits and checksums").to_string(),
            r.mismatches.map_or(String::new(), |m| m.to_string()),
            list(&r.seconds),
            list(&r.losses),
            r.version.clone(),
        ];
        out += &cells.iter().map(|c| quoted(c)).collect::<Vec<_>>().join(",");
        out.push('\n');
    }
    out
}

/// Name of the processor and number of its cores.
fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find(|l| l.starts_with("model name"))
        .and_then(|l| l.split_once(':'))
        .map_or(std::env::consts::ARCH, |p| p.1.trim());
    let cores = std::thread::available_parallelism().map_or(1, core::num::NonZero::get);
    format!("{name}, {cores} core(s)")
}

fn slug(text: &str) -> String {
    let mut out = String::new();
    for c in text.replace(" core(s)", "core").chars() {
        let c = if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        if c != '-' || !(out.is_empty() || out.ends_with('-')) {
            out.push(c);
        }
    }
    out.trim_end_matches('-').to_string()
}

fn memory_total() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("MemTotal:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
        .map_or_else(|| status("VmHWM"), |kib| kib * 1024)
}

/// What a program prints in one line.
fn tool(name: &str, args: &[&str]) -> String {
    let out = Command::new(name).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    out.ok().map_or_else(
        || format!("{name} unknown"),
        |o| String::from_utf8_lossy(&o.stdout).trim().to_string(),
    )
}

fn commit() -> String {
    let changed = if tool("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty() {
        ""
    } else {
        " with changes"
    };
    format!("{}{changed}", tool("git", &["rev-parse", "--short=12", "HEAD"]))
}

/// The day, UTC, as `YYYY-MM-DD`: years of 365 days with leap days counted from 1970.
fn date(now: SystemTime) -> String {
    let mut days = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs() / 86_400);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let months = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= months[month] {
        days -= months[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02}", month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days() {
        let on = |s: u64| date(SystemTime::UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!((on(0).as_str(), on(951_782_400).as_str()), ("1970-01-01", "2000-02-29"));
        assert_eq!(
            (on(1_709_251_199).as_str(), on(1_709_251_200).as_str()),
            ("2024-02-29", "2024-03-01")
        );
        assert_eq!(on(1_798_761_599), "2026-12-31");
    }

    #[test]
    fn lines_and_losses() {
        assert_eq!(off_line(&[(1.0, 3.0), (2.0, 5.0), (4.0, 9.0)]), 0.0);
        assert!((off_line(&[(1.0, 1.0), (2.0, 3.0), (3.0, 3.0)]) - 0.5).abs() < 1e-12);
        assert!(
            same_bits(&[1.0], &[1.0, 2.0]) && !same_bits(&[], &[]) && !same_bits(&[0.0], &[-0.0])
        );
        assert!(apart(&[f64::NAN], &[1.0]).is_infinite() && apart(&[], &[1.0]).is_infinite());
        assert_eq!(apart(&[1.0, 2.0], &[1.0, 1.0]), 1.0);
    }

    #[test]
    fn names_of_folders_and_cells() {
        assert_eq!(slug("AMD EPYC, 2 core(s)"), "amd-epyc-2core");
        assert_eq!((quoted("a"), quoted("a,\"b\"")), ("a".into(), "\"a,\"\"b\"\"\"".into()));
    }
}
