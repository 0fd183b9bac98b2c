//! Runs a job in this process and measures time and memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::time::Instant;

use bdia_core::arena::{Category, Ints, Layout, Reals, Words};
use bdia_core::backend::Backend;
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::{Error, Gamma, Grid, Reference, Sign, stack};
use bdia_cpu::Cpu;
use bdia_gpt2::alloc::Counting;
use bdia_gpt2::cli::{BackendKind, Mode};
use bdia_gpt2::config::Gpt2Config;
use bdia_gpt2::machine;
use bdia_gpt2::model::{Gpt2, Setup, Step};

use crate::Failure;
use crate::job::{Job, Part, Record, median};

/// Settings that the peers have as well.
const LR: f64 = 3e-4;
const WEIGHT_DECAY: f64 = 0.1;
const RULE: Rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
const FRAC_BITS: u32 = 14;

/// Runs a job. Every model of the report comes through here; one that is not a GPT-2 (the ViT of `examples/vit`) is
/// dispatched here, by [`crate::job::Model`].
///
/// # Errors
/// Whatever the model's library reports: among it a plan that is larger than the machine's memory.
pub fn run(job: &Job) -> Result<Record, Failure> {
    let config = job.model.config(job);
    job.machine().check().map_err(bdia_gpt2::error::Failure::Other)?;
    let setup = setup(job, &config)?;
    let (choice, model, layout) = machine::lay_out(&setup, job.backend, None, None)?;
    let base = status("VmRSS");
    match job.backend {
        BackendKind::Cpu => {
            let mut be = Cpu::new(&layout, job.threads).map_err(bdia_gpt2::error::Failure::from)?;
            let (mut record, scratch, model) = train(job, &config, &mut be, model, choice, &layout, base)?;
            record.parts = parts(&be, &model, &layout, scratch as u64)?;
            Ok(record)
        }
        BackendKind::Cuda => {
            let mut be = machine::cuda(&job.machine(), &layout)?;
            let mut record = train(job, &config, &mut be, model, choice, &layout, base)?.0;
            let (plan, measured) = (layout.total() as u64, be.allocated_bytes() as u64);
            record.parts = vec![Part { name: "memory of the device".into(), plan, measured }];
            Ok(record)
        }
        BackendKind::Reference => {
            let (ints, reals, words) = layout.arenas();
            let (mut ints, mut reals, mut words) = (vec![0; ints], vec![0.0_f32; reals], vec![0; words]);
            let mut be = Reference::new(&layout, &mut ints, &mut reals, &mut words)?;
            Ok(train(job, &config, &mut be, model, choice, &layout, base)?.0)
        }
    }
}

/// Writes the job's initial parameters in Hugging Face's layout, for both sides to start from.
///
/// # Errors
/// Files that cannot be written.
pub fn init(job: &Job, dir: &std::path::Path) -> Result<(), Failure> {
    let config = job.model.config(job);
    let setup = Setup { rule: None, batch: 1, ..setup(job, &config)? };
    let (_, model, layout) = machine::lay_out(&setup, BackendKind::Cpu, None, None)?;
    let mut be = Cpu::new(&layout, job.threads).map_err(bdia_gpt2::error::Failure::from)?;
    model.initialize(&mut be, job.seed)?;
    std::fs::create_dir_all(dir).map_err(|error| Failure::File { path: dir.into(), error })?;
    config.write_dir(dir).map_err(bdia_gpt2::error::Failure::from)?;
    Ok(machine::save_weights(dir, &be, &model)?)
}

fn setup(job: &Job, config: &Gpt2Config) -> Result<Setup, Failure> {
    let mode = match job.mode {
        Mode::Bdia => stack::Mode::Bdia,
        Mode::Standard => stack::Mode::Standard,
        Mode::Checkpoint => stack::Mode::Checkpoint { every: job.every() },
        Mode::BdiaFloat => stack::Mode::BdiaFloat,
    };
    Ok(Setup {
        dims: machine::dims(config),
        batch: job.batch(),
        context: job.tokens(),
        mode,
        grid: if job.mode == Mode::Bdia { Some(Grid::new(FRAC_BITS)?) } else { None },
        gamma: Gamma::new(0.5, Sign::Random)?,
        rule: Some(RULE),
        fused: true,
        verify: job.verify,
        threads: job.threads,
        library: machine::library(&job.machine(), job.threads),
    })
}

/// Well-mixed 64-bit numbers, as `bench/peers/peer.py` makes them.
fn number(seed: u64, i: u64) -> u64 {
    let mut z = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(seed);
    for _ in 0..2 {
        z = (z ^ z >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    }
    z ^ z >> 32
}

/// Trains; also gives what the allocator gave during the steps at most, without what was there before, and the model.
fn train<B: Backend<Real = f32>>(
    job: &Job,
    config: &Gpt2Config,
    be: &mut B,
    mut model: Gpt2,
    choice: Choice,
    layout: &Layout,
    base_rss: u64,
) -> Result<(Record, usize, Gpt2), Failure> {
    match &job.weights {
        Some(dir) => machine::load_weights(dir, config, be, &model)?,
        None => model.initialize(be, job.seed)?,
    }
    model.prepare();
    let (context, vocab) = (job.tokens(), config.vocab_size as u64);
    let (mut seconds, mut losses, mut mismatches) = (Vec::new(), Vec::new(), 0);
    seconds.reserve_exact(job.steps);
    losses.reserve_exact(job.steps);
    let before = Counting::current();
    Counting::reset_peak();
    for step in 0..job.steps as u32 {
        let plan = Step { step, seed: job.seed, lr: LR, weight_decay: WEIGHT_DECAY, clip: 0.0, accumulate: 1 };
        let clock = Instant::now();
        // The same batch in every step: then the losses show whether gradients and updates agree.
        let outcome = model.train(be, &plan, |_, tokens, targets| {
            for (i, (sample, next)) in tokens.chunks_mut(context).zip(targets.chunks_mut(context)).enumerate() {
                let at = |t: usize| (number(job.seed, (i * (context + 1) + t) as u64) % vocab) as i32;
                for t in 0..context {
                    (sample[t], next[t]) = (at(t), at(t + 1));
                }
            }
            Ok::<(), Error>(())
        })?;
        seconds.push(clock.elapsed().as_secs_f64());
        losses.push(outcome.loss);
        mismatches += outcome.mismatches;
    }
    let scratch = Counting::peak().saturating_sub(before);
    let counted = median(&seconds[job.warmup.min(seconds.len().saturating_sub(1))..]);
    let record = Record {
        engine: "bdia".into(),
        backend: be.identity().name.into(),
        model: job.model.name().into(),
        mode: job.mode_name(),
        precision: machine::precision(&job.machine()).name().into(),
        batch: job.batch(),
        context,
        layers: job.layers,
        unit: job.model.unit().into(),
        threads: job.threads,
        dropout: job.dropout,
        warmup: job.warmup,
        seconds,
        items_per_s: if counted > 0.0 { job.items() as f64 / counted } else { 0.0 },
        peak_rss: status("VmHWM"),
        base_rss,
        parameters: model.parameters() as u64,
        losses,
        mismatches: (job.verify && job.mode == Mode::Bdia).then_some(mismatches),
        version: machine::identity(be),
        choice: Some((choice.chunk, choice.head_rows)),
        plan: Category::ALL.map(|c| (c.to_string(), layout.bytes(c) as u64)).into(),
        parts: Vec::new(),
    };
    Ok((record, scratch, model))
}

/// Plan beside the pages that are there, by what can be told apart from outside.
fn parts(be: &Cpu, model: &Gpt2, layout: &Layout, scratch: u64) -> Result<Vec<Part>, Failure> {
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
        for state in t.state {
            optimizer += pages.resident(be.reals(state)?)?;
        }
    }
    let all = pages.resident(be.reals(Reals::new(0, reals))?)?;
    let known = bytes(Category::Parameters) + bytes(Category::Gradients) + bytes(Category::Optimizer);
    let part = |name: &str, plan, measured| Part { name: name.into(), plan, measured };
    Ok(vec![
        part("parameters", bytes(Category::Parameters), parameters),
        part("gradients", bytes(Category::Gradients), gradients),
        part("optimizer state", bytes(Category::Optimizer), optimizer),
        part("integers: X, tokens, targets", ints as u64 * 4, pages.resident(be.ints(Ints::new(0, ints))?)?),
        part("words: side bits, checksums", words as u64 * 4, pages.resident(be.words(Words::new(0, words))?)?),
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
        let read = self.0.seek(SeekFrom::Start(first as u64 * 8)).and_then(|_| self.0.read_exact(&mut entries));
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

/// A size of `/proc/self/status` in bytes, 0 where there is none. (`getrusage` would count the parent's memory too.)
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
        for mode in [Mode::Bdia, Mode::Standard, Mode::Checkpoint] {
            let job = Job { verify: true, steps: 3, dropout: 0.1, ..Job::new(Model::Tiny, mode) };
            let ours = run(&job).unwrap();
            let reference = run(&Job { backend: BackendKind::Reference, ..job }).unwrap();
            assert_eq!(ours.mismatches.unwrap_or(0), 0);
            for (a, b) in ours.losses.iter().zip(&reference.losses) {
                assert!((a - b).abs() < 1e-4 * b, "{mode:?}: {a} {b}");
            }
            // The arenas; norms and padding between tensors are in one part of the plan and in another of what is found.
            let arenas = &ours.parts[..6];
            let (plan, found) = arenas.iter().fold((0, 0), |(p, f), part| (p + part.plan, f + part.measured));
            assert!(0 < found && found <= plan, "{arenas:?}");
        }
    }
}
