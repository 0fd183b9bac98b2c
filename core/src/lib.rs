//! Exact bit-level reversible transformer training.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod arena;
pub mod backend;
pub mod error;
pub mod layers;
pub mod optim;
pub mod plan;
pub mod real;
pub mod reference;
pub mod rng;
pub mod stack;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod update;

pub use arena::{Category, Ints, Layout, Reals, Words};
pub use backend::{Backend, Chunk, NnOps, OptimOps, Storage, UpdateOps};
pub use error::{Error, Fault, Result, Site};
pub use real::Real;
pub use reference::Reference;
pub use update::{Gamma, Grid, Sign};
