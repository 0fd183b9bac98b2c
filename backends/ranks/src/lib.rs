//! Several machines train one model of `bdia-core` ("ranks"): each works on its part of every
//! batch, and a [`Replica`] of the model on each.
//!
//! ```text
//! block k is finished    its gradient is taken away; a thread adds it up over the ranks (Ranks) …
//! block k-1 is computed  … meanwhile
//! block k-1 is finished  the sum of block k comes back, and block k is updated: the same bits on
//!                        every rank
//! ```
//!
//! # Guarantee
//! Sums are taken in the order of ranks, whatever comes first, and every rank gets the same bits.
//! So replicas that begin equal and are updated by the same kernels stay equal; [`compare`] makes
//! sure, and names the rank that differs. A fault of one rank travels with its gradients and stops
//! all of them before anything is updated (range, loss, tokens) or before the step ends (checksum,
//! gradients). No call waits for another rank longer than its link's limit.
//!
//! What carries the words is a [`Link`]: MPI (feature `mpi`), MPI and NCCL (`nccl`), or [`Local`],
//! the threads of one process.
//!
//! # Features
//! * `mpi` (off by default): the ranks of an MPI job. Building it needs an MPI (Open MPI or MPICH)
//!   and libclang.
//! * `nccl` (off by default): gradients go between CUDA devices by NCCL. It has not yet run on
//!   GPUs.

#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;

mod link;
mod ranks;
mod replica;
mod wire;

pub use link::{Link, Local};
pub use ranks::{Ranks, buffer_bytes};
pub use replica::Replica;

use bdia_core::backend::Exchange;
use bdia_core::{Error, Halt, Result};

/// Makes sure that every rank has the same number: a digest of its parameters (`why` is
/// [`Halt::Differs`]), of its data and settings ([`Halt::Astray`]).
///
/// # Errors
/// [`Error::Rank`] names the first rank that differs from most of them, or from rank 0 where there
/// is no most. It is the same on every rank.
pub fn compare(be: &mut impl Exchange, digest: u64, why: Halt) -> Result<()> {
    let mut all = Vec::with_capacity(be.ranks());
    // 32 bits are exact in f64.
    let own = [f64::from(digest as u32), f64::from((digest >> 32) as u32), 0.0, 0.0];
    be.gather(own, &mut |[low, high, ..]| all.push((low as u64) | (high as u64) << 32))?;
    let votes = |d: u64| all.iter().filter(|&&other| other == d).count();
    let most = all.iter().map(|&d| votes(d)).max().unwrap_or(0);
    let Some(&right) = all.iter().find(|&&d| votes(d) == most) else { return Ok(()) };
    match all.iter().position(|&d| d != right) {
        Some(rank) => Err(Error::Rank { rank, why }),
        None => Ok(()),
    }
}
