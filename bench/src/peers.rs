//! PyTorch, run with the flags of a job.

use std::path::{Path, PathBuf};
use std::process::Command;

use bdia_core::backend::Gelu;
use bdia_train::cli::BackendKind;

use crate::Failure;
use crate::job::{Architecture, Job, Record};

/// How a peer trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its `--mode`.
    pub mode: &'static str,
    /// Its `--precision`.
    pub precision: &'static str,
}

impl Peer {
    /// Everything is stored, f32.
    pub const STORE_ALL: Self = Self { mode: "store-all", precision: "f32" };
    /// The input of every block is stored.
    pub const CHECKPOINTING: Self = Self { mode: "checkpointing", precision: "f32" };
    /// Everything is stored, bf16 autocast.
    pub const BF16: Self = Self { mode: "store-all", precision: "bf16" };
    /// The input of every block is stored, bf16 autocast.
    pub const BF16_CHECKPOINTING: Self = Self { mode: "checkpointing", precision: "bf16" };
    /// BDIA in PyTorch.
    pub const BDIA: Self = Self { mode: "bdia", precision: "f32" };

    /// Its name in tables.
    pub fn name(self) -> String {
        let precision = match self.precision {
            "f32" => "",
            "bf16" => ", bf16 autocast",
            other => return format!("PyTorch {}, {other}", self.mode),
        };
        format!("PyTorch {}{precision}", self.mode)
    }
}

/// A Python with PyTorch, and where the programs are.
#[derive(Debug, Clone)]
pub struct Python {
    /// The interpreter.
    pub python: PathBuf,
    /// The folder of the programs.
    pub programs: PathBuf,
}

impl Python {
    /// The programs of this repository.
    pub fn new(python: PathBuf) -> Self {
        Self { python, programs: Path::new(env!("CARGO_MANIFEST_DIR")).join("peers") }
    }

    /// The same model with a job's dimensions, data and settings: the GPT-2 of transformers, or the
    /// paper's ViT.
    ///
    /// # Errors
    /// A model that no program has; a program that cannot be started, fails, or prints something
    /// else.
    pub fn run(&self, job: &Job, peer: Peer) -> Result<Record, Failure> {
        let config = match job.model.architecture(job) {
            Architecture::Vit(_) => return output(self.command("vit_small.py", job, peer)),
            Architecture::Gpt2(config) => config,
            Architecture::Llama(_) => {
                return Err(Failure::Other(format!(
                    "{}: expected a GPT-2 or the paper's ViT, the models of bench/peers",
                    job.model.name()
                )));
            }
        };
        let d = config.dims();
        let mut command = self.command("gpt2.py", job, peer);
        command.args(["--model", job.model.name(), "--context", &job.tokens().to_string()]);
        for (flag, n) in [
            ("layers", d.layers),
            ("heads", d.heads),
            ("width", d.width),
            ("positions", d.positions),
            ("vocab", d.vocab),
            ("inner", d.inner),
        ] {
            command.args([format!("--{flag}"), n.to_string()]);
        }
        command.args(["--gelu", if d.gelu == Gelu::Tanh { "tanh" } else { "exact" }]);
        output(command)
    }

    fn command(&self, program: &str, job: &Job, peer: Peer) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(self.programs.join(program)).args([
            "--mode",
            peer.mode,
            "--precision",
            peer.precision,
        ]);
        if job.backend == BackendKind::Cuda {
            command.args(["--device", &format!("cuda:{}", job.device)]);
        }
        for (flag, value) in [
            ("batch", job.batch().to_string()),
            ("threads", job.threads.to_string()),
            ("steps", job.steps.to_string()),
            ("warmup", job.warmup.to_string()),
            ("dropout", job.dropout.to_string()),
            ("seed", job.seed.to_string()),
        ] {
            command.args([format!("--{flag}"), value]);
        }
        if let Some(dir) = &job.weights {
            command.arg("--weights").arg(dir.join(bdia_models::weights::FILE));
        }
        if job.verify {
            command.arg("--verify");
        }
        command
    }
}

/// The record that a program prints as its last line.
///
/// # Errors
/// A program that cannot be started, fails, or prints something else.
pub fn output(mut command: Command) -> Result<Record, Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let out =
        command.output().map_err(|error| Failure::File { path: program.clone().into(), error })?;
    let errors = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        let last = errors.trim().lines().last().unwrap_or("no message");
        return Err(Failure::Other(format!("{program}: {last} ({})", out.status)));
    }
    let text = String::from_utf8_lossy(&out.stdout);
    let line = text.trim().lines().last().unwrap_or_default();
    serde_json::from_str(line).map_err(|e| {
        Failure::Other(format!(
            "{program}: expected one line of JSON, found {e} in: {}",
            line.chars().take(200).collect::<String>()
        ))
    })
}
