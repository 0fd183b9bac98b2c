//! What `mpirun` or Slurm says to a process that it has started as one of several.

use core::sync::atomic::{AtomicUsize, Ordering};

/// Number of this process's rank, once it has joined the others.
static RANK: AtomicUsize = AtomicUsize::new(UNKNOWN);
const UNKNOWN: usize = usize::MAX;

/// Number of this process's rank, from 0: what the launcher says, until it has joined the others.
pub fn rank() -> usize {
    match RANK.load(Ordering::Relaxed) {
        UNKNOWN if started() > Some(1) => {
            told(&["OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"]).map_or(0, |n| n as usize)
        }
        UNKNOWN => 0,
        rank => rank,
    }
}

/// From now on this is the number of this process's rank.
pub(crate) fn joined(rank: usize) {
    RANK.store(rank, Ordering::Relaxed);
}

/// How many processes have been started: by Open MPI, by those that follow MPICH, by Slurm.
pub(crate) fn started() -> Option<u64> {
    told(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
}

/// Number of this process among those of this machine, from 0.
pub(crate) fn local() -> u64 {
    if started() > Some(1) {
        told(&["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"]).unwrap_or(0)
    } else {
        0
    }
}

/// A number in one of these variables.
fn told(names: &[&str]) -> Option<u64> {
    names.iter().find_map(|name| std::env::var(name).ok()?.trim().parse().ok())
}
