//! From flags to a laid-out model and a backend.

use std::path::Path;

use bdia_core::backend::{Backend, Gelu, Identity};
use bdia_core::plan::{Choice, fit};
use bdia_core::stack;
use bdia_core::{Category, Error, Grid, Layout, Reference, Storage};
use bdia_cpu::Cpu;

use crate::alloc::Counting;
use crate::cli::{BackendKind, MachineArgs, Mode, ModeArgs};
use crate::config::{Activation, Bdia, Gpt2Config};
use crate::error::Failure;
use crate::model::{Dims, Gpt2, Setup};
use crate::report::MemoryTable;
use crate::weights::{self, Weights};

/// The architecture of a configuration.
pub fn dims(c: &Gpt2Config) -> Dims {
    Dims {
        vocab: c.vocab_size,
        positions: c.n_positions,
        width: c.n_embd,
        layers: c.n_layer,
        heads: c.n_head,
        inner: c.inner(),
        eps: c.layer_norm_epsilon,
        gelu: match c.activation_function {
            Activation::GeluNew => Gelu::Tanh,
            Activation::Gelu => Gelu::Exact,
        },
        tied: c.tie_word_embeddings,
        dropout: [c.embd_pdrop, c.attn_pdrop, c.resid_pdrop],
    }
}

/// Blocks between stored activations: as asked for, or the square root of `K`, where memory is smallest.
pub fn checkpoint_every(asked: Option<u64>, layers: usize) -> usize {
    asked.map_or_else(|| (layers as f64).sqrt().round().max(1.0) as usize, |n| usize::try_from(n).unwrap_or(usize::MAX))
}

/// The mode of the stack.
pub fn stack_mode(args: &ModeArgs, layers: usize) -> stack::Mode {
    match args.mode {
        Mode::Bdia => stack::Mode::Bdia,
        Mode::Standard => stack::Mode::Standard,
        Mode::Checkpoint => stack::Mode::Checkpoint { every: checkpoint_every(args.checkpoint_every, layers) },
        Mode::BdiaFloat => stack::Mode::BdiaFloat,
    }
}

/// The grid, where the mode has one.
///
/// # Errors
/// A grid that is too fine.
pub fn grid(args: &ModeArgs) -> Result<Option<Grid>, Error> {
    let has = args.mode == Mode::Bdia || (args.quantize && args.mode != Mode::BdiaFloat);
    has.then(|| Grid::new(args.frac_bits)).transpose()
}

/// What `config.json` says about the training.
pub fn record(args: &ModeArgs) -> Result<Bdia, Error> {
    Ok(Bdia {
        gamma: args.gamma,
        gamma_sign: args.gamma_sign,
        frac_bits: args.frac_bits,
        mode: args.mode,
        planes: if args.mode == Mode::Bdia { args.gamma()?.planes()? } else { 0 },
    })
}

/// Threads of a run.
pub fn threads(args: &MachineArgs) -> usize {
    match args.backend {
        BackendKind::Reference => 1,
        BackendKind::Cpu => args
            .threads
            .map_or_else(|| std::thread::available_parallelism().map_or(1, core::num::NonZero::get), |n| n as usize),
    }
}

/// Library scratch of a backend.
pub fn library(kind: BackendKind, threads: usize) -> usize {
    match kind {
        BackendKind::Reference => 0,
        BackendKind::Cpu => Cpu::library_bytes(threads),
    }
}

/// Lays a model out within a budget.
///
/// # Errors
/// What does not fit together, or into the budget.
pub fn lay_out(
    setup: &Setup,
    kind: BackendKind,
    budget: Option<u64>,
    fixed: Option<Choice>,
) -> Result<(Choice, Gpt2, Layout), Error> {
    let budget = budget.map(|b| usize::try_from(b).unwrap_or(usize::MAX));
    let make = |choice| match kind {
        BackendKind::Reference => Gpt2::layout::<Reference<'_, f32>>(setup, choice),
        BackendKind::Cpu => Gpt2::layout::<Cpu>(setup, choice),
    };
    match fixed {
        // A choice that was made before, by a run within its budget.
        Some(choice) => fit(None, core::iter::once(choice), make),
        None => fit(budget, Choice::all(setup.batch, setup.context), make),
    }
}

/// The memory table of some plans, and of the measured peak where there is one (of the first plan's memory).
pub fn memory_table(plans: &[(String, Layout)], peak: Option<u64>) -> MemoryTable {
    let mut names: Vec<&str> = plans.iter().map(|p| p.0.as_str()).collect();
    if peak.is_some() {
        names.insert(1, "measured peak");
    }
    let mut table = MemoryTable::new(&names);
    let mut row = |name: &str, measured: Option<u64>, bytes: &dyn Fn(&Layout) -> u64| {
        let mut cells: Vec<_> = plans.iter().map(|p| Some(bytes(&p.1))).collect();
        if peak.is_some() {
            cells.insert(1, measured);
        }
        table.row(name, &cells);
    };
    for c in Category::ALL {
        if plans.iter().any(|p| p.1.bytes(c) > 0) {
            row(&c.to_string(), None, &|l| l.bytes(c) as u64);
        }
    }
    row("total", peak, &|l| l.total() as u64);
    table
}

/// Reads a model's weights, whatever their names' prefix, type and number of files.
///
/// # Errors
/// Files that cannot be read, and every tensor that is missing, unexpected or of another shape.
pub fn load_weights<B: Backend<Real = f32>>(
    dir: &Path,
    config: &Gpt2Config,
    be: &mut B,
    model: &Gpt2,
) -> Result<(), Failure> {
    let weights = Weights::read_dir(dir)?;
    weights.check(&config.tensors())?;
    for t in model.tensors() {
        weights.stream::<Failure>(&t.name, |at, values| Ok(be.write_reals(t.values.sub(at, values.len()), values)?))?;
    }
    Ok(())
}

/// Writes `model.safetensors`.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save_weights<B: Backend<Real = f32>>(dir: &Path, be: &B, model: &Gpt2) -> Result<(), Failure> {
    let named = model.tensors();
    let shapes: Vec<_> = named.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
    let mut piece = vec![0.0; 1 << 14];
    weights::write::<Failure>(&dir.join(weights::FILE), &shapes, |i, sink| {
        let values = named[i].values;
        for at in (0..values.len()).step_by(1 << 14) {
            let piece = &mut piece[..(1 << 14).min(values.len() - at)];
            be.read_reals(values.sub(at, piece.len()), piece)?;
            sink.put(piece)?;
        }
        Ok(())
    })
}

/// Memory that the operating system can still give, where it says so.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string(Path::new("/proc/meminfo")).ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Something to do on a backend of either kind.
pub trait Work {
    /// Does it; `arenas` is what the allocator counted for the backend.
    ///
    /// # Errors
    /// Whatever goes wrong.
    fn on<B: Backend<Real = f32>>(self, be: &mut B, arenas: usize) -> Result<(), Failure>;
}

/// Makes a backend for a layout and does the work on it.
///
/// # Errors
/// [`Failure::TooBig`] when the machine has not that much memory; whatever the work returns.
pub fn run(kind: BackendKind, threads: usize, layout: &Layout, work: impl Work) -> Result<(), Failure> {
    if let Some(available) = available_memory()
        && layout.total() as u64 > available
    {
        return Err(Failure::TooBig { plan: layout.total() as u64, available });
    }
    let before = Counting::current();
    match kind {
        BackendKind::Cpu => {
            let mut be = Cpu::new(layout, threads)?;
            let arenas = Counting::current().saturating_sub(before);
            work.on(&mut be, arenas)
        }
        BackendKind::Reference => {
            let (ints, reals, words) = layout.arenas();
            let (mut ints, mut reals, mut words) = (vec![0; ints], vec![0.0_f32; reals], vec![0; words]);
            let arenas = Counting::current().saturating_sub(before);
            work.on(&mut Reference::new(layout, &mut ints, &mut reals, &mut words)?, arenas)
        }
    }
}

/// The build and the processor that compute: a resumed run repeats its bits only where this is the same.
pub fn identity<B: Storage>(be: &B) -> String {
    let Identity { name, lanes, fused } = be.identity();
    let fused = if fused { "fused" } else { "unfused" };
    let processor = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|t| t.lines().find(|l| l.starts_with("model name")).map(|l| l.split(':').skip(1).collect::<String>()))
        .unwrap_or_default();
    format!(
        "bdia-gpt2 {} {} {name} lanes {lanes} {fused}{}{}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
        if processor.is_empty() { "" } else { ", " },
        processor.trim()
    )
}
