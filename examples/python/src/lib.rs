//! `bdia._core`: a pass through a reversible stack whose blocks Python computes.
//!
//! The stack, the update and all memory that lives as long as a pass are those of `bdia-core` and
//! `bdia-cpu`. Python sees parts of that memory as buffers ([`Region`]), which `torch.frombuffer`
//! makes tensors of: nothing is copied between the two. `bdia/sequence.py` is the only user of this
//! module.
#![allow(missing_docs, reason = "the module that PyO3 makes needs no Rust documentation")]

mod pass;
mod region;

use bdia_core::{Chunk, Gamma, Site};
use pyo3::prelude::*;

use pass::{Pass, refused};

/// Signs σ (1 or -1) of `samples` samples from `first` on, at block `block`.
#[pyfunction]
fn signs(
    seed: u64,
    first: u32,
    samples: usize,
    block: u16,
    sign: &str,
    py: Python<'_>,
) -> PyResult<Vec<i8>> {
    let gamma = Gamma::new(1, pass::sign(py, sign)?).map_err(|e| refused(py, e))?;
    let site = Site::Block(block.into());
    let chunk = Chunk { seed, step: 0, stack: 0, site, first: 0, samples, global: first, frame: 0 };
    Ok((0..samples).map(|i| chunk.sigma(gamma, i) as i8).collect())
}

/// The seed of the generator that block `block` draws its dropout masks from, for the chunk that
/// starts at sample `first`: 63 bits.
#[pyfunction]
fn block_seed(seed: u64, first: u32, block: u16) -> u64 {
    let site = Site::Block(block.into());
    let chunk =
        Chunk { seed, step: 0, stack: 0, site, first: 0, samples: 1, global: first, frame: 0 };
    let w = chunk.own_stream(0, 0).quad(0);
    (u64::from(w[1]) << 32 | u64::from(w[0])) >> 1
}

#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    if let Err(e) = bdia_cpu::require_cpu() {
        return Err(pyo3::exceptions::PyImportError::new_err(e.to_string()));
    }
    m.add("MAX_BLOCKS", 1 << 16)?;
    m.add_class::<Pass>()?;
    m.add_function(wrap_pyfunction!(signs, m)?)?;
    m.add_function(wrap_pyfunction!(block_seed, m)?)
}
