//! Runs a job in this process and measures time and memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Instant;

use bdia_core::arena::{Category, Ints, Layout, Reals, Words};
use bdia_core::backend::Backend;
use bdia_core::layers::Gradients;
use bdia_core::network::{Outcome, Step};
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::{Error, Reference, stack};
use bdia_cpu::Cpu;
use bdia_cuda::Cuda;
use bdia_models::gpt2::model::Gpt2;
use bdia_models::language::model::{LanguageModel, Setup};
use bdia_models::language::{Config, Family, files as language_files};
use bdia_models::llama::config::LlamaConfig;
use bdia_models::llama::model::Llama;
use bdia_models::named::Named;
use bdia_models::plan::Plan;
use bdia_models::vit::files as vit_files;
use bdia_models::vit::model as vit;
use bdia_models::weights::FILE;
use bdia_train::alloc::Counting;
use bdia_train::cli::{BackendKind, GammaSign, Mode, ModeArgs};
use bdia_train::machine;

use crate::Failure;
use crate::job::{Architecture, Job, Part, Record, median};

/// Settings that the peers have as well.
const LR: f64 = 3e-4;
const WEIGHT_DECAY: f64 = 0.1;
const RULE: Rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
const FRAC_BITS: u32 = 14;
const GAMMA: f64 = 0.5;

/// Runs a job.
///
/// # Errors
/// Whatever the model's library reports: among it a plan that is larger than the machine's memory.
pub fn run(job: &Job) -> Result<Record, Failure> {
    job.machine().check().map_err(bdia_train::Failure::Other)?;
    let gradients = Gradients::Fused(RULE);
    match job.model.architecture(job) {
        Architecture::Gpt2(config) => {
            measure::<Gpt2>(job, &language(job, config.dims(), job.batch(), gradients)?)
        }
        Architecture::Llama(dims) => {
            measure::<Llama>(job, &language(job, *dims, job.batch(), gradients)?)
        }
        Architecture::Vit(dims) => {
            measure::<vit::Vit>(job, &vit(job, dims, job.batch(), gradients)?)
        }
    }
}

fn measure<N: Measured>(job: &Job, setup: &N::Setup) -> Result<Record, Failure> {
    let (choice, model, layout) = machine::lay_out::<N>(setup, job.backend, 1, None, None)?;
    let layout = &layout;
    let base = status("VmRSS");
    match job.backend {
        BackendKind::Cpu => {
            let mut be = machine::cpu(&job.machine(), layout, job.threads)?;
            let (mut record, scratch, model) =
                train(job, &mut be, model, choice, layout, base, None)?;
            record.parts = parts(&be, &model, layout, scratch as u64)?;
            Ok(record)
        }
        BackendKind::Cuda => {
            let mut be = machine::cuda(&job.machine(), layout)?;
            let mut record =
                train(job, &mut be, model, choice, layout, base, Some(Cuda::take_times))?.0;
            let times = be.times().map_err(bdia_train::Failure::from)?;
            record.seconds_on_device = times.seconds;
            record.times =
                times.by_name.into_iter().map(|t| (t.name, t.calls, t.seconds)).collect();
            let (plan, measured) = (layout.total() as u64, be.taken_bytes() as u64);
            record.parts = vec![Part { name: "memory of the device".into(), plan, measured }];
            Ok(record)
        }
        BackendKind::Reference => {
            let (ints, reals, words) = layout.arenas();
            let (mut ints, mut reals, mut words) =
                (vec![0; ints], vec![0.0_f32; reals], vec![0; words]);
            let mut be = Reference::new(layout, &mut ints, &mut reals, &mut words)?;
            Ok(train(job, &mut be, model, choice, layout, base, None)?.0)
        }
    }
}

/// Writes the job's initial parameters as a safetensors file, for both sides to start from.
///
/// # Errors
/// Files that cannot be written.
pub fn init(job: &Job, dir: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(dir).map_err(|error| Failure::File { path: dir.into(), error })?;
    match job.model.architecture(job) {
        Architecture::Gpt2(config) => init_language(job, &*config, dir),
        Architecture::Llama(d) => {
            let sizes = [d.vocab, d.positions, d.width, d.heads, d.kv_heads, d.inner, d.layers];
            let mut config = LlamaConfig::new(sizes).map_err(bdia_train::Failure::from)?;
            config.set_dropout(job.dropout);
            init_language(job, &config, dir)
        }
        Architecture::Vit(dims) => {
            let (be, model) = initialized::<vit::Vit>(job, &vit(job, dims, 1, Gradients::None)?)?;
            Ok(vit_files::save_weights(&dir.join(FILE), &be, &model)?)
        }
    }
}

fn init_language<C: Config>(job: &Job, config: &C, dir: &Path) -> Result<(), Failure> {
    let setup = language(job, config.dims(), 1, Gradients::None)?;
    let (be, model) = initialized::<LanguageModel<C::Dims>>(job, &setup)?;
    config.write_dir(dir).map_err(bdia_train::Failure::from)?;
    Ok(language_files::save(dir, &be, &model)?)
}

fn initialized<N: Measured>(job: &Job, setup: &N::Setup) -> Result<(Cpu, N), Failure> {
    let (_, model, layout) = machine::lay_out::<N>(setup, BackendKind::Cpu, 1, None, None)?;
    let mut be = Cpu::new(&layout, job.threads).map_err(bdia_train::Failure::from)?;
    model.initialize(&mut be, &Job { weights: None, ..job.clone() })?;
    Ok((be, model))
}

/// How the job's stack is trained.
fn mode(job: &Job, layers: usize) -> Result<stack::Mode, Error> {
    let args = ModeArgs {
        mode: job.mode,
        checkpoint_every: job.checkpoint_every,
        quantize: false,
        gamma: GAMMA.into(),
        gamma_sign: GammaSign::Random,
        frac_bits: FRAC_BITS,
        blocks_per_step: 1,
        calibration: None,
    };
    machine::mode(&args, layers, job.verify)
}

fn language<F: Family>(
    job: &Job,
    dims: F,
    batch: usize,
    gradients: Gradients,
) -> Result<Setup<F>, Error> {
    Ok(Setup {
        dims,
        batch,
        accumulate: 1,
        context: job.tokens(),
        mode: mode(job, dims.layers())?,
        gradients,
        blocks_per_step: 1,
        adapters: None,
        packed: false,
        smoothing: 0.0,
        threads: job.threads,
        library: machine::library(&job.machine(), job.threads),
    })
}

fn vit(
    job: &Job,
    dims: vit::Dims,
    batch: usize,
    gradients: Gradients,
) -> Result<vit::Setup, Error> {
    Ok(vit::Setup {
        dims,
        batch,
        accumulate: 1,
        chunk: 1,
        mode: mode(job, dims.layers)?,
        gradients,
        blocks_per_step: 1,
        adapters: None,
        drop_path: 0.0,
        smoothing: 0.0,
        mixup: false,
        threads: job.threads,
        library: machine::library(&job.machine(), job.threads),
    })
}

/// A model that is measured. Every step sees the same batch: then the losses show whether gradients
/// and updates agree.
trait Measured: Plan {
    /// The job's parameters: those of its file, or new ones.
    fn initialize<B: Backend<Real = f32>>(&self, be: &mut B, job: &Job) -> Result<(), Failure>;

    /// Makes what a step needs on the host, so that it allocates nothing.
    fn prepare(&mut self);

    fn step<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        job: &Job,
        step: &Step,
    ) -> Result<Outcome, Error>;

    fn tensors(&self) -> Vec<Named>;
}

impl<F: Family> Measured for LanguageModel<F> {
    fn initialize<B: Backend<Real = f32>>(&self, be: &mut B, job: &Job) -> Result<(), Failure> {
        match &job.weights {
            Some(dir) => language_files::load(dir, be, self).map(drop)?,
            None => self.initialize(be, job.seed)?,
        }
        Ok(())
    }

    fn prepare(&mut self) {
        self.prepare();
    }

    fn step<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        job: &Job,
        step: &Step,
    ) -> Result<Outcome, Error> {
        let (context, vocab) = (job.tokens(), self.setup().dims.vocab() as u64);
        let token =
            |i: usize, t: usize| (number(job.seed, (i * (context + 1) + t) as u64) % vocab) as i32;
        self.train(be, step, |_, tokens, targets| {
            let samples = tokens.chunks_mut(context).zip(targets.chunks_mut(context));
            for (i, (sample, next)) in samples.enumerate() {
                for t in 0..context {
                    (sample[t], next[t]) = (token(i, t), token(i, t + 1));
                }
            }
            Ok(())
        })
    }

    fn tensors(&self) -> Vec<Named> {
        self.tensors()
    }
}

impl Measured for vit::Vit {
    fn initialize<B: Backend<Real = f32>>(&self, be: &mut B, job: &Job) -> Result<(), Failure> {
        match &job.weights {
            Some(dir) => vit_files::load_weights(&dir.join(FILE), be, self)?,
            None => self.initialize(be, job.seed)?,
        }
        Ok(())
    }

    fn prepare(&mut self) {
        self.prepare();
    }

    fn step<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        job: &Job,
        step: &Step,
    ) -> Result<Outcome, Error> {
        let (batch, classes) = (job.batch(), self.setup().dims.classes as u64);
        self.train(be, step, 1.0, |_, i, pixels| {
            let first = batch + i * pixels.len();
            for (at, pixel) in pixels.iter_mut().enumerate() {
                // The upper 24 bits, from -1 to 1.
                let bits = number(job.seed, (first + at) as u64) >> 40;
                *pixel = bits as f64 / f64::from(1 << 23) - 1.0;
            }
            Ok([(number(job.seed, i as u64) % classes) as i32; 2])
        })
    }

    fn tensors(&self) -> Vec<Named> {
        self.tensors()
    }
}

/// Well-mixed 64-bit numbers, as `bench/peers/peer.py` makes them.
fn number(seed: u64, i: u64) -> u64 {
    let mut z = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(seed);
    for _ in 0..2 {
        z = (z ^ z >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    }
    z ^ z >> 32
}

/// Trains; also gives what the allocator gave during the steps at most, without what was there
/// before, and the model. Where `take_times` is given, it is called before a further step, which is
/// not measured.
fn train<B: Backend<Real = f32>, N: Measured>(
    job: &Job,
    be: &mut B,
    mut model: N,
    choice: Choice,
    layout: &Layout,
    base_rss: u64,
    take_times: Option<fn(&mut B)>,
) -> Result<(Record, usize, N), Failure> {
    model.initialize(be, job)?;
    model.prepare();
    let step = |step| Step { step, seed: job.seed, lr: LR, weight_decay: WEIGHT_DECAY, clip: 0.0 };
    let (mut seconds, mut losses, mut mismatches) = (Vec::new(), Vec::new(), 0);
    seconds.reserve_exact(job.steps);
    losses.reserve_exact(job.steps);
    let before = Counting::current();
    Counting::reset_peak();
    for i in 0..job.steps as u32 {
        let clock = Instant::now();
        let outcome = model.step(be, job, &step(i))?;
        seconds.push(clock.elapsed().as_secs_f64());
        losses.push(outcome.loss);
        mismatches += outcome.rebuilt.mismatches;
    }
    let scratch = Counting::peak().saturating_sub(before);
    if let Some(take_times) = take_times {
        take_times(be);
        model.step(be, job, &step(job.steps as u32))?;
    }
    let counted = median(&seconds[job.warmup.min(seconds.len().saturating_sub(1))..]);
    let record = Record {
        engine: "bdia".into(),
        backend: be.identity().name.into(),
        model: job.model.name().into(),
        mode: job.mode_name(),
        precision: machine::precision(&job.machine()).name().into(),
        batch: job.batch(),
        context: job.tokens(),
        layers: job.layers,
        unit: job.model.unit().into(),
        threads: job.threads,
        dropout: job.dropout,
        warmup: job.warmup,
        seconds,
        items_per_s: if counted > 0.0 { job.items() as f64 / counted } else { 0.0 },
        peak_rss: status("VmHWM"),
        base_rss,
        parameters: model.tensors().iter().map(|t| t.len() as u64).sum(),
        losses,
        mismatches: (job.verify && job.mode == Mode::Bdia).then_some(mismatches),
        version: machine::identity(be, concat!("bdia-bench ", env!("CARGO_PKG_VERSION"))),
        choice: Some((choice.chunk, choice.head_rows)),
        plan: Category::ALL.map(|c| (c.to_string(), layout.bytes(c) as u64)).into(),
        parts: Vec::new(),
        times: Vec::new(),
        seconds_on_device: 0.0,
    };
    Ok((record, scratch, model))
}

/// Plan beside the pages that are there, by what can be told apart from outside.
fn parts<N: Measured>(
    be: &Cpu,
    model: &N,
    layout: &Layout,
    scratch: u64,
) -> Result<Vec<Part>, Failure> {
    let bytes = |c| layout.bytes(c) as u64;
    let (ints, reals, words) = layout.arenas();
    let mut pages = Pages::open()?;
    let [mut parameters, mut gradients, mut optimizer] = [0; 3];
    let mut seen = BTreeSet::new();
    for t in model.tensors() {
        parameters += pages.resident(be.reals(t.values)?)?;
        // The blocks share one buffer, tensor by tensor; every place counts once.
        if seen.insert(t.gradient.start()) {
            gradients += pages.resident(be.reals(t.gradient)?)?;
        }
        // AdamW has no codes, which would be among the words.
        for state in t.state.reals {
            optimizer += pages.resident(be.reals(state)?)?;
        }
    }
    let all = pages.resident(be.reals(Reals::new(0, reals))?)?;
    let known =
        bytes(Category::Parameters) + bytes(Category::Gradients) + bytes(Category::Optimizer);
    let part = |name: &str, plan, measured| Part { name: name.into(), plan, measured };
    Ok(vec![
        part("parameters", bytes(Category::Parameters), parameters),
        part("gradients", bytes(Category::Gradients), gradients),
        part("optimizer state", bytes(Category::Optimizer), optimizer),
        part(
            "integers: X, tokens, targets",
            ints as u64 * 4,
            pages.resident(be.ints(Ints::new(0, ints))?)?,
        ),
        part(
            "words: side bits, checksums",
            words as u64 * 4,
            pages.resident(be.words(Words::new(0, words))?)?,
        ),
        part(
            "floats: activations, G, workspace, head",
            reals as u64 * 4 - known,
            all.saturating_sub(parameters + gradients + optimizer),
        ),
        part("allocated by libraries in a step", bytes(Category::Library), scratch),
    ])
}

/// Which pages of this process are in memory.
struct Pages(File);

impl Pages {
    const SIZE: usize = 4096;

    fn open() -> Result<Self, Failure> {
        let path = "/proc/self/pagemap";
        File::open(path).map(Self).map_err(|error| Failure::File { path: path.into(), error })
    }

    /// Bytes of a slice that are in memory.
    fn resident<T>(&mut self, values: &[T]) -> Result<u64, Failure> {
        if values.is_empty() {
            return Ok(0);
        }
        let start = values.as_ptr().addr();
        let end = start + size_of_val(values);
        let (first, last) = (start / Self::SIZE, (end - 1) / Self::SIZE);
        let mut entries = vec![0_u8; (last - first + 1) * 8];
        let read = self
            .0
            .seek(SeekFrom::Start(first as u64 * 8))
            .and_then(|_| self.0.read_exact(&mut entries));
        read.map_err(|error| Failure::File { path: "/proc/self/pagemap".into(), error })?;
        let mut sum = 0;
        for (i, entry) in entries.chunks_exact(8).enumerate() {
            // Bit 63: the page is present.
            if entry[7] & 0x80 != 0 {
                let page = (first + i) * Self::SIZE;
                sum += ((page + Self::SIZE).min(end) - page.max(start)) as u64;
            }
        }
        Ok(sum)
    }
}

/// A size of `/proc/self/status` in bytes, 0 where there is none. (`getrusage` would count the
/// parent's memory too.)
pub fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Model;

    /// The first numbers of `bench/peers/peer.py` with seed 1.
    #[test]
    fn the_peers_have_the_same_data() {
        assert_eq!([0, 1, 2].map(|i| number(1, i)), KNOWN);
    }
    const KNOWN: [u64; 3] = [7551226805739869723, 14887079200376242419, 8211738988503663301];

    #[test]
    fn modes_agree_with_the_reference_backend() {
        let modes = [Mode::Bdia, Mode::Standard, Mode::Checkpoint, Mode::BdiaFloat];
        let models = [Model::Tiny, Model::LlamaTiny];
        for (model, mode) in models.into_iter().flat_map(|model| modes.map(|mode| (model, mode))) {
            let job = Job { verify: true, steps: 3, dropout: 0.1, ..Job::new(model, mode) };
            let ours = run(&job).unwrap();
            let reference = run(&Job { backend: BackendKind::Reference, ..job }).unwrap();
            assert_eq!(ours.mismatches.unwrap_or(0), 0);
            for (a, b) in ours.losses.iter().zip(&reference.losses) {
                assert!((a - b).abs() < 1e-4 * b, "{model:?}, {mode:?}: {a} {b}");
            }
            // The arenas; norms and padding between tensors are in one part of the plan and in
            // another of what is found.
            let arenas = &ours.parts[..6];
            let (plan, found) =
                arenas.iter().fold((0, 0), |(p, f), part| (p + part.plan, f + part.measured));
            assert!(0 < found && found <= plan, "{arenas:?}");
        }
    }

    /// A model that was written trains as the one that was not, and has the parameters that are
    /// counted.
    #[test]
    fn runs_start_from_files() {
        for model in [Model::Tiny, Model::LlamaTiny] {
            let dir = bdia_models::files::testing::TempDir::new();
            let job = Job { steps: 2, ..Job::new(model, Mode::Bdia) };
            init(&job, dir.path()).unwrap();
            let fresh = run(&job).unwrap();
            let read = run(&Job { weights: Some(dir.path().into()), ..job.clone() }).unwrap();
            assert_eq!(read.losses, fresh.losses, "{model:?}");
            let counted = crate::count::stages(&job).pop().unwrap().other / 16.0;
            assert_eq!(counted, fresh.parameters as f64, "{model:?}");
        }
    }
}
