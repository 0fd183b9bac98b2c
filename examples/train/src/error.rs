//! What ends a program with exit code 1.

use std::path::PathBuf;

use bdia_models::bpe::BpeError;
use bdia_models::config::ConfigError;
use bdia_models::files::FileError;
use bdia_models::language::adapter::AdapterError;
use bdia_models::language::decode::DecodeError;
use bdia_models::pretrained::PretrainedError;
use bdia_models::sample::SampleError;
use bdia_models::seq2seq::vocab::VocabularyError;
use bdia_models::weights::WeightsError;

use crate::calibrate::Calibration;
use crate::checkpoint::CheckpointError;
use crate::cli::Contradiction;
use crate::directory::DirectoryError;
use crate::report::ReportError;

/// Everything that can go wrong. Programs put their own typed errors into [`Failure::Program`].
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Failure {
    #[error("{0}")]
    Core(#[from] bdia_core::Error),
    #[error("{0}")]
    Cpu(#[from] bdia_cpu::CpuError),
    #[error("{0}")]
    Cuda(#[from] bdia_cuda::CudaError),
    #[error("{0}")]
    File(#[from] FileError),
    #[error("{0}")]
    Weights(#[from] WeightsError),
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("{0}")]
    Gguf(#[from] bdia_models::gguf::WriteError),
    #[error("{0}")]
    Pretrained(#[from] PretrainedError),
    #[error("{0}")]
    Adapter(#[from] AdapterError),
    #[error("{0}")]
    Bpe(#[from] BpeError),
    #[error("{0}")]
    Vocabulary(#[from] VocabularyError),
    #[error("{0}")]
    Decode(#[from] DecodeError),
    #[error("{0}")]
    Sample(#[from] SampleError),
    #[error("{0}")]
    Checkpoint(#[from] CheckpointError),
    #[error("{0}")]
    Report(#[from] ReportError),
    #[error("{0}")]
    Contradiction(#[from] Contradiction),
    #[error("{0}")]
    Directory(#[from] DirectoryError),
    #[error("standard output cannot be written: {0}")]
    Output(&'static std::io::Error),
    #[error(
        "no gamma costs this network little enough; train it with --mode standard or checkpoint, \
             or name a --gamma\n{0}"
    )]
    Calibration(Box<Calibration>),
    #[error("interrupted")]
    Interrupted,
    #[error(
        "stopped after step {step} of {steps}; to go on:  {command} --resume {}",
        out.display()
    )]
    Stopped { step: u32, steps: u32, command: &'static str, out: PathBuf },
    #[error("stopped; the same command goes on from here")]
    StudyStopped,
    #[error(
        "{}: the run needs {needed} bytes for its checkpoints and models, {free} are free; use \
         --out on another disk, or --keep-checkpoints 1",
        path.display()
    )]
    DiskFull { path: PathBuf, needed: u64, free: u64 },
    #[error("{}: {what}", path.display())]
    Run { path: PathBuf, what: String },
    #[error(
        "the plan needs {plan} bytes, this machine has {available} left; use --memory, a smaller \
         batch, input or model, \
         or look at `plan` with the same flags"
    )]
    TooBig { plan: u64, available: u64 },
    #[error("step {step}: {error}{kept}")]
    Step { step: u32, error: bdia_core::Error, kept: String },
    #[error("{0}")]
    Program(Box<dyn core::error::Error + Send + Sync>),
    #[error("{0}")]
    Other(String),
}
