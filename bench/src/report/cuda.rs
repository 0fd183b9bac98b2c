//! The part of the report about a CUDA device: a set of rows for every precision, and every kernel.

use core::time::Duration;
use std::time::Instant;

use bdia_core::NnOps;
use bdia_cuda::Cuda;
use bdia_train::cli::{BackendKind, Mode, PrecisionKind};
use bdia_train::report::bytes;

use super::{Report, Target, apart, kernel_cells, ratio, say, spawn, title};
use crate::Failure;
use crate::count::{stages, total};
use crate::job::{Job, Model, Record, median};
use crate::kernels::{Bench, GPT2, Shapes, TINY, VIT, Work};
use crate::page::{self, Section, Table};
use crate::peers::{Peer, Python};
use crate::roof::DeviceRoof;

const PRECISIONS: [PrecisionKind; 3] =
    [PrecisionKind::F32, PrecisionKind::Tf32, PrecisionKind::Bf16];

/// A precision, and the device's limits with it.
type Roofed = (PrecisionKind, DeviceRoof);

const fn peer_precision(precision: PrecisionKind) -> &'static str {
    match precision {
        PrecisionKind::F32 => "f32",
        PrecisionKind::Tf32 => "tf32",
        PrecisionKind::Bf16 => "bf16",
    }
}

impl Report {
    /// Training steps and kernels on a CUDA device. Where there is none, a line says what was
    /// missing.
    pub(super) fn cuda(&mut self, clock: Instant) -> Result<(), Failure> {
        say("measuring the CUDA device");
        let seconds = if self.args.quick { 0.2 } else { 2.0 };
        let mut roofs = Vec::new();
        for precision in PRECISIONS {
            if !(self.args.precision.is_empty() || self.args.precision.contains(&precision)) {
                continue;
            }
            match DeviceRoof::measure(self.args.device, precision, seconds) {
                Ok(roof) => roofs.push((precision, roof)),
                Err(error) if roofs.is_empty() => {
                    say(&format!("CUDA: not run: {error}"));
                    self.checks.row([
                        "CUDA device".into(),
                        "is there".into(),
                        format!("not run: {error}"),
                    ]);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        if self.args.peers {
            self.cuda_peers(&roofs)?;
            self.write(clock.elapsed())?;
        }
        self.cuda_steps(&roofs)?;
        self.write(clock.elapsed())?;
        self.cuda_kernels(&roofs)
    }

    /// PyTorch on the same device, in turn with ours, from the same parameters.
    fn cuda_peers(&mut self, roofs: &[Roofed]) -> Result<(), Failure> {
        let python = Python::new(self.args.python.clone());
        let quick = self.args.quick;
        let rounds = self.args.rounds.unwrap_or(if quick { 1 } else { 3 });
        let models: &[Model] =
            if quick { &[Model::Tiny] } else { &[Model::Gpt2, Model::Gpt2Medium, Model::VitSmall] };
        let mut table = Table::new(&[
            "model",
            "precision",
            "engine",
            "items/s",
            "ours / it",
            "memory on the device",
            "ours / it",
        ]);
        let mut charts = Vec::new();
        let dir = std::env::temp_dir().join(format!("bdia-bench-{}", std::process::id()));
        for model in self.chosen(models) {
            let job = self.cuda_job(model, Mode::Bdia, PrecisionKind::F32);
            crate::engine::init(&job, &dir)?;
            for &(precision, _) in roofs {
                let job = Job { precision, weights: Some(dir.clone()), ..job.clone() };
                self.cuda_peers_of(&python, rounds, &job, &mut table, &mut charts);
            }
        }
        let _ = std::fs::remove_dir_all(&dir);
        let text = format!(
            "{}; {rounds} round(s) in turn, each run in a process of its own, medians. Both sides \
             start from one file and see the same data. Ours: the driver's count of free memory, \
             without the context. PyTorch (eager, the attention of torch.nn.functional, fused \
             AdamW): the most that its allocator had given out, which leaves out what it keeps in \
             reserve.",
            roofs.first().map_or("", |r| r.1.name.as_str()),
        );
        self.sections.push(Section {
            title: "Beside PyTorch on a CUDA device".into(),
            text,
            table,
            charts,
        });
        Ok(())
    }

    /// One model with one precision.
    fn cuda_peers_of(
        &mut self,
        python: &Python,
        rounds: usize,
        job: &Job,
        table: &mut Table,
        charts: &mut Vec<String>,
    ) {
        let (model, name) = (job.model, bdia_train::cli::name_of(&job.precision));
        let peers = ["store-all", "checkpointing"]
            .map(|mode| Peer { mode, precision: peer_precision(job.precision) });
        let own = [job.clone(), Job { mode: Mode::Standard, ..job.clone() }];
        let names = ["bdia".into(), "bdia, standard".into(), peers[0].name(), peers[1].name()];
        let mut runs: [Vec<Record>; 4] = Default::default();
        for round in 0..rounds {
            say(&format!(
                "{} in {name} beside PyTorch on the device, round {} of {rounds}",
                model.name(),
                round + 1
            ));
            for (i, records) in runs.iter_mut().enumerate() {
                let record = if i < 2 { spawn(&own[i]) } else { python.run(job, peers[i - 2]) };
                match record {
                    Ok(record) => {
                        self.records.push(record.clone());
                        records.push(record);
                    }
                    Err(error) => {
                        let what = format!("{} {} on the device", model.name(), names[i]);
                        self.checks.row([what, "runs".into(), format!("did not run: {error}")]);
                    }
                }
            }
        }
        let rate =
            |records: &[Record]| median(&records.iter().map(|r| r.items_per_s).collect::<Vec<_>>());
        let memory = |records: &[Record]| {
            records.iter().filter_map(|r| r.parts.first()).map(|p| p.measured).max().unwrap_or(0)
        };
        let [ours, standard, store_all, checkpointing] = &runs;
        if let (Some(a), Some(b)) = (standard.first(), store_all.first()) {
            // The same network from the same parameters; the second loss has seen gradients and an
            // update. Factors of 10 and of 7 bits are rounded in other places of the two.
            let limit = match job.precision {
                PrecisionKind::F32 => 2e-4,
                PrecisionKind::Tf32 => 1e-3,
                PrecisionKind::Bf16 => 5e-3,
            };
            let first = |r: &Record| r.losses[..r.losses.len().min(2)].to_vec();
            let result = match apart(&first(a), &first(b)) {
                d if d < limit => Ok(()),
                d => Err(format!("{d:.1e} apart: {:?} and {:?}", first(a), first(b))),
            };
            let assertion = format!(
                "the first two losses in mode standard as {} has them, to {limit:.0e}",
                names[2]
            );
            self.check(&title(job), &assertion, result);
        }
        let (mut speed, mut used) = (Vec::new(), Vec::new());
        for (i, records) in runs.iter().enumerate().filter(|(_, records)| !records.is_empty()) {
            table.row([
                model.name().into(),
                name.clone(),
                names[i].clone(),
                format!("{:.1} {}", rate(records), model.unit()),
                format!("{:.2}", ratio(rate(ours), rate(records))),
                bytes(memory(records)),
                format!("{:.2}", ratio(memory(ours) as f64, memory(records) as f64)),
            ]);
            let label = names[i].replace("PyTorch ", "PT ").replace(", bf16 autocast", "");
            speed.push((label.clone(), rate(records), format!("{:.0}/s", rate(records)), i < 2));
            used.push((label, memory(records) as f64, bytes(memory(records)), i < 2));
        }
        let size = format!("{} in {name}, B = {}, T = {}", model.name(), job.batch(), job.tokens());
        charts.push(page::bars(&format!("{size}: {} per second", model.unit()), &speed));
        charts.push(page::bars(&format!("{size}: memory on the device"), &used));
        let about = matches!(model, Model::Gpt2 | Model::Gpt2Medium)
            && job.precision == PrecisionKind::Bf16;
        if about && runs.iter().all(|r| !r.is_empty()) {
            let faster = ratio(rate(ours), rate(checkpointing));
            let smaller = ratio(memory(ours) as f64, memory(store_all) as f64);
            for (what, target, found, met) in [
                (
                    "CUDA, bf16: tokens/s over PyTorch with checkpointing",
                    "≥ 1.0",
                    faster,
                    faster >= 1.0,
                ),
                ("CUDA, bf16: memory over PyTorch store-all", "≤ 0.5", smaller, smaller <= 0.5),
            ] {
                let found = format!("{found:.2} ({})", model.name());
                self.targets.push(Target { what, target: target.into(), found, met });
            }
        }
    }

    fn cuda_job(&self, model: Model, mode: Mode, precision: PrecisionKind) -> Job {
        let mut job = Job {
            backend: BackendKind::Cuda,
            device: self.args.device,
            precision,
            ..self.job(model, mode)
        };
        if matches!(model, Model::Gpt2 | Model::Gpt2Medium | Model::Llama135m) {
            // What the targets on a GPU are about.
            (job.batch, job.context, job.steps) = (Some(8), Some(1024), 10);
        }
        job
    }

    fn cuda_steps(&mut self, roofs: &[Roofed]) -> Result<(), Failure> {
        let models: &[Model] = if self.args.quick {
            &[Model::Tiny, Model::LlamaTiny]
        } else {
            &[Model::Gpt2, Model::Gpt2Medium, Model::Llama135m, Model::VitSmall]
        };
        let mut times = Table::new(&["model", "precision", "kernel", "calls", "time", "share"]);
        let mut table = Table::new(&[
            "model",
            "mode",
            "precision",
            "B×T",
            "s/step",
            "spread",
            "items/s",
            "GFLOP/step",
            "share of peak",
            "plan on the device",
            "found",
        ]);
        let mut charts = Vec::new();
        for model in self.chosen(models) {
            let k = model.architecture(&Job::new(model, Mode::Bdia)).layers();
            let mut bars = Vec::new();
            // Written once: making them takes longer than training on them.
            let dir = std::env::temp_dir().join(format!("bdia-bench-{}", std::process::id()));
            crate::engine::init(&self.cuda_job(model, Mode::Bdia, PrecisionKind::F32), &dir)?;
            for &(precision, ref roof) in roofs {
                let mut jobs: Vec<Job> =
                    [Mode::Bdia, Mode::Standard].map(|m| self.cuda_job(model, m, precision)).into();
                for every in [1, bdia_train::machine::checkpoint_every(None, k) as u64] {
                    let job = self.cuda_job(model, Mode::Checkpoint, precision);
                    jobs.push(Job { checkpoint_every: Some(every), ..job });
                }
                let mut standard = None;
                for job in jobs {
                    if job.mode == Mode::Bdia {
                        self.like_reference(&job);
                    }
                    let job = Job { weights: Some(dir.clone()), ..job };
                    let Some(record) = self.asserted(&job)? else { continue };
                    if !self.like_standard(&job, &record, standard.as_deref()) {
                        continue;
                    }
                    if job.mode == Mode::Standard {
                        standard = Some(record.losses.clone());
                    }
                    if job.mode == Mode::Bdia {
                        time_rows(&record, &mut times);
                    }
                    let operations = total(&stages(&job));
                    let (low, high) = record.spread();
                    let seconds = record.seconds_per_step();
                    let share = ratio(operations / seconds, roof.flops);
                    let memory = record.parts.first().cloned().unwrap_or_default();
                    table.row([
                        model.name().into(),
                        record.mode.clone(),
                        record.precision.clone(),
                        format!("{}×{}", record.batch, record.context),
                        format!("{seconds:.4}"),
                        format!("{low:.4}–{high:.4}"),
                        format!("{:.1} {}", record.items_per_s, record.unit),
                        format!("{:.1}", operations / 1e9),
                        // A rate of this device with this precision, or nothing.
                        if share > 0.0 { format!("{:.1} %", share * 100.0) } else { "–".into() },
                        bytes(memory.plan),
                        bytes(memory.measured),
                    ]);
                    bars.push((
                        format!("{} {}", record.mode, record.precision),
                        record.items_per_s,
                        format!("{:.1}/s", record.items_per_s),
                        job.mode == Mode::Bdia,
                    ));
                }
            }
            let _ = std::fs::remove_dir_all(&dir);
            if !bars.is_empty() {
                charts.push(page::bars(
                    &format!("{}: {} per second", model.name(), model.unit()),
                    &bars,
                ));
            }
        }
        let limits: Vec<String> = roofs
            .iter()
            .map(|(p, r)| format!("{} {:.1} GFLOP/s", bdia_train::cli::name_of(p), r.flops / 1e9))
            .collect();
        let text = format!(
            "{}; median of the steps after the first. Share of peak: all floating-point operations \
             of the step per second, over the best rate of the backend's own square product with \
             the same precision, measured on this device in this run ({}). Plan and found: bytes \
             on the device, by the plan and by the driver's count of free memory, without the \
             context.",
            roofs.first().map_or("", |r| r.1.name.as_str()),
            limits.join(", "),
        );
        self.sections.push(Section {
            title: "Training steps on a CUDA device".into(),
            text,
            table,
            charts,
        });
        let text = "Where the time of one more step in mode bdia goes, by events around each of \
                    its calls; they cost some time of their own. Products have rows, columns and \
                    inner size. \u{201c}All\u{201d} is the device's time from the first call to \
                    the end of the last: what is above the sum is gaps between calls."
            .into();
        let title = "A step on a CUDA device, kernel by kernel".into();
        self.sections.push(Section { title, text, table: times, charts: Vec::new() });
        Ok(())
    }

    fn cuda_kernels(&mut self, roofs: &[Roofed]) -> Result<(), Failure> {
        let mut table =
            Table::new(&["shapes", "precision", "kernel", "time", "rate", "roof", "share"]);
        let quick = self.args.quick;
        let span = Duration::from_millis(if quick { 5 } else { 200 });
        // What a device is given at a time.
        let large = [
            Shapes { samples: 8, tokens: 1024, head_rows: Cuda::rows().head, ..GPT2 },
            Shapes { samples: 128, head_rows: 128, ..VIT },
        ];
        let (shapes, streamed): (&[Shapes], usize) =
            if quick { (&[TINY], 1 << 14) } else { (&large, 16 * Bench::<Cuda>::full()) };
        let mut worst = None;
        for s in shapes {
            for (i, &(precision, ref roof)) in roofs.iter().enumerate() {
                let name = bdia_train::cli::name_of(&precision);
                say(&format!("kernels on the CUDA device at the shapes of {}, {name}", s.model));
                let mut bench = Bench::<Cuda>::new(s, streamed, 1)?;
                let job = Job {
                    precision,
                    device: self.args.device,
                    backend: BackendKind::Cuda,
                    ..Job::new(Model::Tiny, Mode::Bdia)
                };
                let mut be = bdia_train::machine::cuda(&job.machine(), &bench.layout)?;
                let first = i == 0;
                for i in 0..bench.kernels.len() {
                    // The precision is one of products: the rest is measured once.
                    let of_bytes = matches!(bench.kernels[i].work, Work::Bytes(_));
                    if of_bytes && !first {
                        continue;
                    }
                    bench.fill(&mut be)?;
                    let seconds = bench.kernels[i].seconds(&mut be, span)?;
                    let kernel = &bench.kernels[i];
                    let cells =
                        kernel_cells(kernel, seconds, roof.flops, roof.bandwidth, &mut worst);
                    table.row([s.model.to_string(), name.clone()].into_iter().chain(cells));
                }
            }
        }
        if !quick {
            self.update_target("CUDA: update kernels over the copy's bandwidth", worst);
        }
        let of = |r: &Vec<String>| {
            let mut row = vec![format!("{} on {}", r[0], r[1])];
            row.extend(r[2..].iter().cloned());
            row
        };
        self.kernels.extend(table.rows.iter().map(of));
        let text = "Calls are queued one after another and waited for together; with bf16 a \
                    product finds its factors rounded by the call before. A product's roof is the \
                    device's best square product with the same precision; the bandwidth that of \
                    its own copy."
            .into();
        self.sections.push(Section {
            title: "Kernels on a CUDA device".into(),
            text,
            table,
            charts: Vec::new(),
        });
        Ok(())
    }
}

/// The kernels of a step, those first that take most of it.
fn time_rows(record: &Record, table: &mut Table) {
    let sum: f64 = record.times.iter().map(|t| t.2).sum();
    let mut times = record.times.clone();
    times.sort_by(|a, b| b.2.total_cmp(&a.2));
    let (large, small): (Vec<_>, Vec<_>) = times.into_iter().partition(|t| t.2 >= 0.01 * sum);
    let rest = (
        format!("{} others", small.len()),
        small.iter().map(|t| t.1).sum(),
        small.iter().map(|t| t.2).sum(),
    );
    let calls = record.times.iter().map(|t| t.1).sum();
    let all = [rest, ("sum".into(), calls, sum), ("all".into(), calls, record.seconds_on_device)];
    for (name, calls, seconds) in large.into_iter().chain(all) {
        table.row([
            record.model.clone(),
            record.precision.clone(),
            name,
            calls.to_string(),
            format!("{:.3} ms", seconds * 1e3),
            format!("{:.1} %", ratio(100.0 * seconds, sum)),
        ]);
    }
}
