//! Speed and memory of `bdia`, measured, asserted, and set beside what the machine and PyTorch can
//! do.
//!
//! In the order in which data flows: [`job`] says what is run and with what result; [`engine`] runs
//! it in a process of its own; [`peers`] runs PyTorch with the same flags; [`count`] counts the
//! operations of a step, [`roof`] measures what the machine can do, [`kernels`] has every kernel of
//! a backend with its work; [`report`] puts all of it together, and [`page`] draws it. [`scaling`]
//! estimates steps on many machines.

pub mod count;
pub mod engine;
pub mod job;
pub mod kernels;
pub mod page;
pub mod peers;
pub mod report;
pub mod roof;
pub mod scaling;

/// What ends the program with exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A training step or a file of the model's library.
    #[error("{0}")]
    Model(#[from] bdia_train::Failure),
    /// A file of this program.
    #[error("{}: {error}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

impl From<bdia_models::weights::WeightsError> for Failure {
    fn from(e: bdia_models::weights::WeightsError) -> Self {
        Self::Model(e.into())
    }
}

impl From<bdia_core::Error> for Failure {
    fn from(e: bdia_core::Error) -> Self {
        Self::Model(e.into())
    }
}
