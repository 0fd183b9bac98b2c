//! The part of the report about a CUDA device: a set of rows for every precision, and every kernel.

use core::time::Duration;

use bdia_cuda::Cuda;
use bdia_gpt2::cli::{BackendKind, Mode, PrecisionKind};
use bdia_gpt2::report::bytes;

use super::{Report, Target, kernel_cells, ratio, say, spawn};
use crate::Failure;
use crate::count::{stages, total};
use crate::job::{Job, Model, Record, median};
use crate::kernels::{Bench, GPT2, Shapes, TINY, VIT, Work};
use crate::page::{self, Section, Table};
use crate::peers::{Peer, Python};
use crate::roof::DeviceRoof;

const PRECISIONS: [PrecisionKind; 3] = [PrecisionKind::F32, PrecisionKind::Tf32, PrecisionKind::Bf16];

const fn peer_precision(precision: PrecisionKind) -> &'static str {
    match precision {
        PrecisionKind::F32 => "f32",
        PrecisionKind::Tf32 => "tf32",
        PrecisionKind::Bf16 => "bf16",
    }
}

impl Report {
    /// Training steps and kernels on a CUDA device. Where there is none, a line says what was missing.
    pub(super) fn cuda(&mut self) -> Result<(), Failure> {
        say("measuring the CUDA device");
        let seconds = if self.args.quick { 0.2 } else { 2.0 };
        let mut roofs = Vec::new();
        for precision in PRECISIONS {
            match DeviceRoof::measure(self.args.device, precision, seconds) {
                Ok(roof) => roofs.push(roof),
                Err(error) if roofs.is_empty() => {
                    say(&format!("CUDA: not run: {error}"));
                    self.checks.row(["CUDA device".into(), "is there".into(), format!("not run: {error}")]);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        if self.args.peers {
            self.cuda_peers(&roofs)?;
        }
        self.cuda_steps(&roofs)?;
        self.cuda_kernels(&roofs)
    }

    /// PyTorch on the same device, in turn with ours.
    fn cuda_peers(&mut self, roofs: &[DeviceRoof]) -> Result<(), Failure> {
        let python = Python::new(self.args.python.clone());
        let quick = self.args.quick;
        let rounds = self.args.rounds.unwrap_or(if quick { 1 } else { 3 });
        let models: &[Model] = if quick { &[Model::Tiny] } else { &[Model::Gpt2, Model::Gpt2Medium, Model::VitSmall] };
        let mut table =
            Table::new(&["model", "precision", "engine", "items/s", "ours / it", "memory on the device", "ours / it"]);
        for (&model, precision) in models.iter().flat_map(|m| PRECISIONS.map(|p| (m, p))) {
            let name = bdia_gpt2::cli::name_of(&precision);
            let job = self.cuda_job(model, Mode::Bdia, precision);
            let peers = ["store-all", "checkpointing"].map(|mode| Peer { mode, precision: peer_precision(precision) });
            let mut runs: [Vec<Record>; 3] = Default::default();
            for round in 0..rounds {
                say(&format!(
                    "{} in {name} beside PyTorch on the device, round {} of {rounds}",
                    model.name(),
                    round + 1
                ));
                for (i, records) in runs.iter_mut().enumerate() {
                    let record = if i == 0 { spawn(&job) } else { python.run(&job, peers[i - 1]) };
                    match record {
                        Ok(record) => records.push(record),
                        Err(error) => {
                            let engine = if i == 0 { "bdia".into() } else { peers[i - 1].name() };
                            let what = format!("{} {engine} on the device", model.name());
                            self.checks.row([what, "runs".into(), format!("did not run: {error}")]);
                        }
                    }
                }
            }
            let rate = |records: &[Record]| median(&records.iter().map(|r| r.items_per_s).collect::<Vec<_>>());
            let memory = |records: &[Record]| {
                records.iter().filter_map(|r| r.parts.first()).map(|p| p.measured).max().unwrap_or(0)
            };
            let [ours, store_all, checkpointing] = &runs;
            for (i, records) in runs.iter().enumerate().filter(|(_, records)| !records.is_empty()) {
                table.row([
                    model.name().into(),
                    name.clone(),
                    if i == 0 { "bdia".into() } else { peers[i - 1].name() },
                    format!("{:.1} {}", rate(records), model.unit()),
                    format!("{:.2}", ratio(rate(ours), rate(records))),
                    bytes(memory(records)),
                    format!("{:.2}", ratio(memory(ours) as f64, memory(records) as f64)),
                ]);
            }
            let about = matches!(model, Model::Gpt2 | Model::Gpt2Medium) && precision == PrecisionKind::Bf16;
            if about && runs.iter().all(|r| !r.is_empty()) {
                let faster = ratio(rate(ours), rate(checkpointing));
                let smaller = ratio(memory(ours) as f64, memory(store_all) as f64);
                for (what, target, found, met) in [
                    ("CUDA, bf16: tokens/s over PyTorch with checkpointing", "≥ 1.0", faster, faster >= 1.0),
                    ("CUDA, bf16: memory over PyTorch store-all", "≤ 0.5", smaller, smaller <= 0.5),
                ] {
                    let found = format!("{found:.2} ({})", model.name());
                    self.targets.push(Target { what, target: target.into(), found, met });
                }
            }
        }
        let text = format!(
            "{}; {rounds} round(s) in turn, medians. Ours: the driver's count of free memory, without the context. PyTorch: the \
             most that its allocator had given out, which leaves out what it keeps in reserve.",
            roofs.first().map_or("", |r| r.name.as_str()),
        );
        self.sections.push(Section {
            title: "Beside PyTorch on a CUDA device".into(),
            text,
            table,
            charts: Vec::new(),
        });
        Ok(())
    }

    fn cuda_job(&self, model: Model, mode: Mode, precision: PrecisionKind) -> Job {
        let mut job = Job { backend: BackendKind::Cuda, device: self.args.device, precision, ..self.job(model, mode) };
        if matches!(model, Model::Gpt2 | Model::Gpt2Medium) {
            // What the targets on a GPU are about.
            (job.batch, job.context, job.steps) = (Some(8), Some(1024), 10);
        }
        job
    }

    fn cuda_steps(&mut self, roofs: &[DeviceRoof]) -> Result<(), Failure> {
        let models: &[Model] =
            if self.args.quick { &[Model::Tiny] } else { &[Model::Gpt2, Model::Gpt2Medium, Model::VitSmall] };
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
        for &model in models {
            let k = model.architecture(&Job::new(model, Mode::Bdia)).layers();
            let mut bars = Vec::new();
            for (precision, roof) in PRECISIONS.into_iter().zip(roofs) {
                let mut jobs: Vec<Job> =
                    [Mode::Bdia, Mode::Standard].map(|m| self.cuda_job(model, m, precision)).into();
                for every in [1, bdia_gpt2::machine::checkpoint_every(None, k) as u64] {
                    let job = self.cuda_job(model, Mode::Checkpoint, precision);
                    jobs.push(Job { checkpoint_every: Some(every), ..job });
                }
                let mut standard = None;
                for job in jobs {
                    if job.mode == Mode::Bdia {
                        self.like_reference(&job);
                    }
                    let Some(record) = self.asserted(&job)? else { continue };
                    if !self.like_standard(&job, &record, standard.as_deref()) {
                        continue;
                    }
                    if job.mode == Mode::Standard {
                        standard = Some(record.losses.clone());
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
            if !bars.is_empty() {
                charts.push(page::bars(&format!("{}: {} per second", model.name(), model.unit()), &bars));
            }
        }
        let limits: Vec<String> = PRECISIONS
            .iter()
            .zip(roofs)
            .map(|(p, r)| format!("{} {:.1} GFLOP/s", bdia_gpt2::cli::name_of(p), r.flops / 1e9))
            .collect();
        let text = format!(
            "{}; median of the steps after the first. Share of peak: all floating-point operations of the step per second, over \
             the best rate of the backend's own square product with the same precision, measured on this device in this run ({}; \
             with bf16 it includes the rounding of its factors). Plan and found: bytes on the device, by the plan and by the \
             driver's count of free memory, without the context.",
            roofs.first().map_or("", |r| r.name.as_str()),
            limits.join(", "),
        );
        self.sections.push(Section { title: "Training steps on a CUDA device".into(), text, table, charts });
        Ok(())
    }

    fn cuda_kernels(&mut self, roofs: &[DeviceRoof]) -> Result<(), Failure> {
        let mut table = Table::new(&["shapes", "precision", "kernel", "time", "rate", "roof", "share"]);
        let quick = self.args.quick;
        let span = Duration::from_millis(if quick { 5 } else { 200 });
        let (shapes, streamed): (&[Shapes], usize) =
            if quick { (&[TINY], 1 << 14) } else { (&[GPT2, VIT], 16 * Bench::<Cuda>::full()) };
        let mut worst = None;
        for s in shapes {
            for (precision, roof) in PRECISIONS.into_iter().zip(roofs) {
                let name = bdia_gpt2::cli::name_of(&precision);
                say(&format!("kernels on the CUDA device at the shapes of {}, {name}", s.model));
                let mut bench = Bench::<Cuda>::new(s, streamed, 1)?;
                let job = Job {
                    precision,
                    device: self.args.device,
                    backend: BackendKind::Cuda,
                    ..Job::new(Model::Tiny, Mode::Bdia)
                };
                let mut be = bdia_gpt2::machine::cuda(&job.machine(), &bench.layout)?;
                for i in 0..bench.kernels.len() {
                    // The precision is one of products: the rest is measured once.
                    let of_bytes = matches!(bench.kernels[i].work, Work::Bytes(_));
                    if of_bytes && precision != PrecisionKind::F32 {
                        continue;
                    }
                    bench.fill(&mut be)?;
                    let seconds = bench.kernels[i].seconds(&mut be, span)?;
                    let kernel = &bench.kernels[i];
                    let cells = kernel_cells(kernel, seconds, roof.flops, roof.bandwidth, &mut worst);
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
        let text = "Calls are queued one after another and waited for together. A product's roof is the device's best square product \
                    with the same precision; the bandwidth that of its own copy."
            .into();
        self.sections.push(Section { title: "Kernels on a CUDA device".into(), text, table, charts: Vec::new() });
        Ok(())
    }
}
