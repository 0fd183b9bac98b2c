//! `bdia-bench`: one measured run, the parameters that both engines start from, or the report.

use std::path::PathBuf;
use std::process::ExitCode;

use bdia_bench::job::Job;
use bdia_bench::report::{ReportArgs, report};
use bdia_bench::scaling::{ScalingArgs, scaling};
use bdia_bench::{Failure, engine};
use bdia_train::alloc::Counting;
use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Speed and memory of bdia, beside PyTorch.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure everything and write the report
    Report(ReportArgs),
    /// One configuration in this process: one line of JSON
    Run(Job),
    /// How steps scale to several machines, by a model of the exchange of gradients
    Scaling(ScalingArgs),
    /// Write initial parameters in Hugging Face's layout
    Init {
        /// The model and its seed
        #[command(flatten)]
        job: Job,
        /// Where to
        #[arg(long)]
        out: PathBuf,
    },
}

fn main() -> ExitCode {
    // Before anything that a wide register might be used for.
    if let Err(error) = bdia_cpu::require_cpu() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    let result = match Cli::parse().command {
        Command::Report(args) => report(&args),
        Command::Run(job) => engine::run(&job).and_then(|record| {
            let line = serde_json::to_string(&record).map_err(|e| Failure::Other(e.to_string()))?;
            println!("{line}");
            Ok(())
        }),
        Command::Scaling(args) => scaling(&args),
        Command::Init { job, out } => engine::init(&job, &out),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
