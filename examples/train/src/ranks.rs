//! The ranks of a run: `mpirun -np N` starts the program N times, and each of them trains its part
//! of every batch.
//!
//! Rank 0 tells what happens and writes the run's files; the others read the same files, settings
//! and data, which is made sure of before the first step ([`begin`]), and compute. What is measured
//! before that, rank 0 measures for all ([`of_first`]).

use bdia_core::backend::Backend;
use bdia_core::{Category, Error, Exchange, Halt, Layout};
use bdia_models::named::Saved;
pub use bdia_ranks::Ranks;
use bdia_ranks::{buffer_bytes, compare};
use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::Xxh3;

use crate::cli::{Flags, MachineArgs};
use crate::error::Failure;
use crate::launcher::{self, started};

/// Values that are hashed at a time.
const PIECE: usize = 1 << 14;

/// Refuses what several ranks cannot do together.
///
/// # Errors
/// This process is one of several.
pub fn alone(what: &str) -> Result<(), Failure> {
    match started() {
        Some(n) if n > 1 => Err(Failure::Other(format!(
            "{what} are made by one process, not by {n}: start it without mpirun"
        ))),
        _ => Ok(()),
    }
}

/// Number of this process's CUDA device: ranks on one machine take one after the other, from the
/// one that was asked for.
pub fn device(args: &MachineArgs) -> usize {
    usize::try_from(args.device.saturating_add(launcher::local())).unwrap_or(usize::MAX)
}

/// Joins the ranks that `mpirun` started; `None` where this process is the only one.
///
/// # Errors
/// [`Failure`]: a program that was built without MPI is one of several processes, or MPI does not
/// start.
pub fn join(args: &MachineArgs) -> Result<Option<Ranks>, Failure> {
    let Some(processes) = started().filter(|&n| n > 1) else { return Ok(None) };
    let ranks = open(args, processes)?;
    if ranks.ranks() as u64 != processes {
        // Each would train everything, into the same directory.
        let what = "the launcher is another MPI's than the one that the program was built with";
        return Err(Failure::Other(format!(
            "{processes} processes were started, MPI has {}: {what}",
            ranks.ranks()
        )));
    }
    launcher::joined(ranks.rank());
    Ok(Some(ranks))
}

#[cfg(not(feature = "mpi"))]
fn open(_: &MachineArgs, processes: u64) -> Result<Ranks, Failure> {
    Err(Failure::Other(format!(
        "this is one of {processes} processes, and the program was built without MPI: build it \
         with --features mpi, or \
         start it without mpirun"
    )))
}

#[cfg(feature = "mpi")]
fn open(args: &MachineArgs, _: u64) -> Result<Ranks, Failure> {
    let limit = core::time::Duration::from_secs(args.rank_timeout);
    #[cfg(feature = "nccl")]
    if args.backend == crate::cli::BackendKind::Cuda {
        let device = device(args);
        return Ok(Ranks::start(move || bdia_ranks::nccl::Nccl::open(limit, device))?);
    }
    Ok(Ranks::start(move || bdia_ranks::mpi::Mpi::open(limit))?)
}

/// Number of this rank, and of all.
pub fn place(ranks: Option<&Ranks>) -> (usize, usize) {
    ranks.map_or((0, 1), |r| (r.rank(), r.ranks()))
}

/// This rank's part of `batch` samples.
///
/// # Errors
/// A batch that cannot be split evenly.
pub fn part(batch: usize, ranks: usize) -> Result<usize, Failure> {
    if !batch.is_multiple_of(ranks) {
        let what = format!(
            "--batch {batch} cannot be split evenly over {ranks} ranks; use a multiple of {ranks}"
        );
        return Err(Failure::Other(what));
    }
    Ok(batch / ranks)
}

/// Counts the buffers of gradients on their way, for groups of up to `len` values.
pub fn plan(layout: &mut Layout, len: usize, ranks: usize) {
    if ranks > 1 {
        layout.outside(Category::Exchange, buffer_bytes(len, ranks));
    }
}

/// What `work` finds on rank 0, on every rank: it is done there alone, so that all go on with the
/// same answer, and end with the same error.
///
/// # Errors
/// Those of `work`, on the other ranks in words; a rank that does not answer.
pub fn of_first<T: Serialize + DeserializeOwned>(
    joined: Option<&mut Ranks>,
    work: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let Some(ranks) = joined.filter(|ranks| ranks.ranks() > 1) else { return work() };
    let mut own = None;
    let told = ranks.from_first(|| {
        let done = work();
        let told = match &done {
            Ok(found) => Ok(found),
            Err(error) => Err(error.to_string()),
        };
        let (told, done) = match serde_json::to_vec(&told) {
            Ok(told) => (told, done),
            Err(e) => (Vec::new(), Err(Failure::Other(e.to_string()))),
        };
        own = Some(done);
        told
    })?;
    if let Some(done) = own {
        return done;
    }
    serde_json::from_slice::<Result<T, String>>(&told)
        .map_err(|e| Failure::Other(format!("what rank 0 found cannot be read: {e}")))?
        .map_err(Failure::Other)
}

/// Whether any rank says so, of up to four things.
///
/// # Errors
/// A rank that does not answer.
pub fn any<const N: usize>(be: &mut impl Exchange, own: [bool; N]) -> Result<[bool; N], Error> {
    let (mut said, mut any) = ([0.0; 4], [false; N]);
    for (said, own) in said.iter_mut().zip(own) {
        *said = f64::from(u8::from(own));
    }
    be.gather(said, &mut |said| {
        for (any, said) in any.iter_mut().zip(said) {
            *any |= said != 0.0;
        }
    })?;
    Ok(any)
}

/// A run begins or goes on: every rank has the same data, settings, step and tensors.
///
/// # Errors
/// [`Error::Rank`] names the rank that differs.
pub fn begin<B: Backend<Real = f32>, A: Flags>(
    be: &mut B,
    args: &A,
    (data, step): (u64, u32),
    tensors: &[Saved],
) -> Result<(), Failure> {
    if be.ranks() == 1 {
        return Ok(());
    }
    let mut hash = Xxh3::new();
    hash.update(
        &serde_json::to_vec(&args.comparable()).map_err(|e| Failure::Other(e.to_string()))?,
    );
    hash.update(&data.to_le_bytes());
    hash.update(&step.to_le_bytes());
    compare(be, hash.digest(), Halt::Astray)?;
    Ok(same(be, tensors)?)
}

/// The tensors are the same on every rank, in every bit.
///
/// # Errors
/// [`Error::Rank`] names the rank that differs.
pub fn same<B: Backend<Real = f32>>(be: &mut B, tensors: &[Saved]) -> Result<(), Error> {
    if be.ranks() == 1 {
        return Ok(());
    }
    let (mut hash, mut bits) = (Xxh3::new(), vec![0_u32; PIECE]);
    for t in tensors {
        for at in (0..t.len()).step_by(PIECE) {
            let bits = &mut bits[..PIECE.min(t.len() - at)];
            t.get(be, at, bits)?;
            // The bits are compared on the same kind of machine: their order in memory is the same.
            hash.update(bytemuck::cast_slice(bits));
        }
    }
    compare(be, hash.digest(), Halt::Differs)
}
