//! From flags to a plan and a backend.

use std::path::Path;

use bdia_core::backend::{Backend, Identity};
use bdia_core::layers::Gradients;
use bdia_core::plan::{Choice, Rows, fit};
use bdia_core::stack::Mode as StackMode;
use bdia_core::update::{Gamma, Policy, Sign};
use bdia_core::{Category, Error, Grid, Layout, NnOps, Reference, Storage};
use bdia_cpu::Cpu;
use bdia_cuda::{Cuda, Options, Precision};
use bdia_models::plan::Plan;
use bdia_ranks::Ranks;
#[cfg(feature = "mpi")]
use bdia_ranks::Replica;

use crate::alloc::Counting;
use crate::cli::{BackendKind, MachineArgs, Mode, ModeArgs, OptimArgs, PrecisionKind};
use crate::error::Failure;
use crate::ranks;
use crate::report::MemoryTable;

/// An expression for backends of a kind, in which `$B` is their type.
#[macro_export]
macro_rules! for_kind {
    ($kind:expr, $B:ident => $body:expr) => {
        match $kind {
            $crate::cli::BackendKind::Reference => {
                type $B = $crate::machine::Scalar;
                $body
            }
            $crate::cli::BackendKind::Cpu => {
                type $B = $crate::machine::Simd;
                $body
            }
            $crate::cli::BackendKind::Cuda => {
                type $B = $crate::machine::Device;
                $body
            }
        }
    };
}
pub use for_kind;

/// The backend of [`BackendKind::Reference`].
pub type Scalar = Reference<'static, f32>;
/// That of [`BackendKind::Cpu`].
pub type Simd = Cpu;
/// That of [`BackendKind::Cuda`].
pub type Device = Cuda;

/// Lays a network out within a budget, or as it was by a run within its own (`fixed`), with what
/// `ranks` ranks need to add up gradients.
///
/// # Errors
/// What does not fit together, or into the budget.
pub fn lay_out<N: Plan>(
    setup: &N::Setup,
    kind: BackendKind,
    ranks: usize,
    budget: Option<u64>,
    fixed: Option<Choice>,
) -> Result<(Choice, N, Layout), Error> {
    let make = |choice| {
        let (network, mut layout) = for_kind!(kind, B => N::lay_out::<B>(setup, choice))?;
        ranks::plan(&mut layout, network.exchanged(), ranks);
        Ok((network, layout))
    };
    match fixed {
        Some(choice) => fit(None, core::iter::once(choice), make),
        None => {
            let [samples, rows_of_one] = N::sizes(setup);
            fit(self::budget(budget), rows(kind).choices(samples, rows_of_one), make)
        }
    }
}

/// A budget in bytes that can be addressed.
pub fn budget(bytes: Option<u64>) -> Option<usize> {
    bytes.map(|b| usize::try_from(b).unwrap_or(usize::MAX))
}

/// Blocks between stored activations: as asked for, or the square root of `K`, where memory is
/// smallest.
pub fn checkpoint_every(asked: Option<u64>, layers: usize) -> usize {
    asked.map_or_else(
        || (layers as f64).sqrt().round().max(1.0) as usize,
        |n| usize::try_from(n).unwrap_or(usize::MAX),
    )
}

/// How a stack of `layers` blocks is trained.
///
/// # Errors
/// A γ or a grid that does not exist.
pub fn mode(args: &ModeArgs, layers: usize, verify: bool) -> Result<StackMode, Error> {
    let grid = || Grid::new(args.frac_bits);
    let quantized = || args.quantize.then(grid).transpose();
    Ok(match args.mode {
        Mode::Bdia => StackMode::Bdia { grid: grid()?, gamma: args.policy()?, verify },
        Mode::Standard => StackMode::Standard { grid: quantized()? },
        Mode::Checkpoint => StackMode::Checkpoint {
            every: checkpoint_every(args.checkpoint_every, layers),
            grid: quantized()?,
        },
        Mode::BdiaFloat => StackMode::BdiaFloat { gamma: args.float_gamma()?, verify },
    })
}

/// The modes that a table compares with the one that is used, with their names: the paper's γ,
/// storing everything, and checkpoints at equal distances.
///
/// # Errors
/// None: the grid and γ exist.
pub fn other_modes(used: &StackMode, layers: usize) -> Result<Vec<(String, StackMode)>, Error> {
    let gamma = Policy::fixed(Gamma::new(1, Sign::Random)?);
    let every = checkpoint_every(None, layers);
    let mut all = vec![
        ("bdia".to_string(), StackMode::Bdia { grid: Grid::new(14)?, gamma, verify: false }),
        ("standard".into(), StackMode::Standard { grid: None }),
        (format!("checkpoint {every}"), StackMode::Checkpoint { every, grid: None }),
    ];
    all.retain(|(_, m)| core::mem::discriminant(m) != core::mem::discriminant(used));
    Ok(all)
}

/// How gradients are kept: all where they are clipped or add up over micro-batches.
pub fn gradients(optim: &OptimArgs, accumulate: u64) -> Gradients {
    if optim.clip == 0.0 && accumulate == 1 {
        Gradients::Fused(optim.rule())
    } else {
        Gradients::Full(optim.rule())
    }
}

/// Threads of a run.
pub fn threads(args: &MachineArgs) -> usize {
    match args.backend {
        BackendKind::Reference | BackendKind::Cuda => 1,
        BackendKind::Cpu => args.threads.map_or_else(
            || {
                let there = std::thread::available_parallelism();
                there.map_or(1, core::num::NonZero::get).min(Cpu::MAX_THREADS)
            },
            |n| n as usize,
        ),
    }
}

/// Library scratch of a backend.
pub fn library(args: &MachineArgs, threads: usize) -> usize {
    match args.backend {
        BackendKind::Reference => 0,
        BackendKind::Cpu => Cpu::library_bytes(threads),
        BackendKind::Cuda => Cuda::library_bytes(precision(args)),
    }
}

/// The sizes that a backend is fastest with.
pub fn rows(kind: BackendKind) -> Rows {
    match kind {
        BackendKind::Reference => Reference::<f32>::rows(),
        BackendKind::Cpu => Cpu::rows(),
        BackendKind::Cuda => Cuda::rows(),
    }
}

/// How a CUDA device multiplies.
pub const fn precision(args: &MachineArgs) -> Precision {
    match args.precision {
        PrecisionKind::F32 => Precision::F32,
        PrecisionKind::Tf32 => Precision::Tf32,
        PrecisionKind::Bf16 => Precision::Bf16,
    }
}

/// The processor's backend that flags ask for, with the arenas of a layout.
///
/// # Errors
/// Not enough memory, or threads that cannot be started.
pub fn cpu(args: &MachineArgs, layout: &Layout, threads: usize) -> Result<Cpu, Failure> {
    let precision = match args.precision {
        PrecisionKind::Bf16 => bdia_cpu::Precision::Bf16,
        // TF32 is refused before.
        PrecisionKind::F32 | PrecisionKind::Tf32 => bdia_cpu::Precision::F32,
    };
    Ok(Cpu::with_precision(layout, threads, precision)?)
}

/// The CUDA device that flags ask for, with the arenas of a layout.
///
/// # Errors
/// [`Failure::Cuda`] says which library, device or memory is missing.
pub fn cuda(args: &MachineArgs, layout: &Layout) -> Result<Cuda, Failure> {
    let device = ranks::device(args);
    Ok(Cuda::new(layout, Options { device, precision: precision(args) })?)
}

/// The memory table of some plans, and of the measured peak where there is one (of the first plan's
/// memory).
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
    if plans.iter().any(|p| p.1.mapped_words() > 0) {
        row("mapped from files", None, &|l| 4 * l.mapped_words() as u64);
    }
    table
}

/// Memory that the operating system can still give, where it says so.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string(Path::new("/proc/meminfo")).ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Something to do on a backend of any kind.
pub trait Work {
    /// Does it; `arenas` is what the allocator counted for the backend, or what a device has for
    /// it.
    ///
    /// # Errors
    /// Whatever goes wrong.
    fn on<B: Backend<Real = f32>>(self, be: &mut B, arenas: usize) -> Result<(), Failure>;
}

/// Makes a backend for a layout and does the work on it.
///
/// # Errors
/// [`Failure::TooBig`] when the machine has not that much memory; [`Failure::Cuda`] where there is
/// no such device, or not enough memory on it; whatever the work returns.
pub fn run(
    args: &MachineArgs,
    threads: usize,
    layout: &Layout,
    work: impl Work,
) -> Result<(), Failure> {
    args.check().map_err(Failure::Other)?;
    if args.backend != BackendKind::Cuda
        && let Some(available) = available_memory()
        && layout.total() as u64 > available
    {
        return Err(Failure::TooBig { plan: layout.total() as u64, available });
    }
    let before = Counting::current();
    match args.backend {
        BackendKind::Cuda => {
            let mut be = cuda(args, layout)?;
            Counting::add_device(be.allocated_bytes());
            let arenas = Counting::current().saturating_sub(before);
            work.on(&mut be, arenas)
        }
        BackendKind::Cpu => {
            let mut be = cpu(args, layout, threads)?;
            let arenas = Counting::current().saturating_sub(before);
            work.on(&mut be, arenas)
        }
        BackendKind::Reference => {
            let (ints, reals, words) = layout.arenas();
            let (mut ints, mut reals, mut words) =
                (zeroed::<i32>(ints)?, zeroed::<f32>(reals)?, zeroed::<u32>(words)?);
            let arenas = Counting::current().saturating_sub(before);
            work.on(&mut Reference::new(layout, &mut ints, &mut reals, &mut words)?, arenas)
        }
    }
}

/// Memory of an arena, or an error where there is none.
fn zeroed<T: Copy + Default>(len: usize) -> Result<Vec<T>, Error> {
    let mut all = Vec::new();
    all.try_reserve_exact(len)
        .map_err(|_| Error::Memory { bytes: len.saturating_mul(size_of::<T>()) })?;
    all.resize(len, T::default());
    Ok(all)
}

/// The same, on one of several ranks where there are others.
///
/// # Errors
/// As [`run`]; whatever ends all ranks.
pub fn run_on(
    args: &MachineArgs,
    threads: usize,
    layout: &Layout,
    ranks: Option<Ranks>,
    work: impl Work,
) -> Result<(), Failure> {
    match ranks {
        None => run(args, threads, layout, work),
        #[cfg(feature = "mpi")]
        Some(mut ranks) => {
            run(args, threads, layout, OnRanks { ranks: &mut ranks, work })?;
            ranks.close();
            Ok(())
        }
        // Nobody has them, and the program need not be compiled a second time for them.
        #[cfg(not(feature = "mpi"))]
        Some(_) => {
            Err(Failure::Other("several ranks need a program built with --features mpi".into()))
        }
    }
}

/// Something to do on one of several ranks.
#[cfg(feature = "mpi")]
struct OnRanks<'a, W> {
    ranks: &'a mut Ranks,
    work: W,
}

#[cfg(feature = "mpi")]
impl<W: Work> Work for OnRanks<'_, W> {
    fn on<B: Backend<Real = f32>>(self, be: &mut B, arenas: usize) -> Result<(), Failure> {
        self.work.on(&mut Replica::new(be, self.ranks), arenas)
    }
}

/// The build and the processor that compute: a resumed run repeats its bits only where this is the
/// same.
///
/// `program` is its name and version.
pub fn identity<B: Storage>(be: &B, program: &str) -> String {
    let Identity { name, lanes, fused } = be.identity();
    let fused = if fused { "fused" } else { "unfused" };
    let processor = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|t| {
            t.lines()
                .find(|l| l.starts_with("model name"))
                .map(|l| l.split(':').skip(1).collect::<String>())
        })
        .unwrap_or_default();
    format!(
        "{program} {} {name} lanes {lanes} {fused}{}{}",
        std::env::consts::ARCH,
        if processor.is_empty() { "" } else { ", " },
        processor.trim()
    )
}
