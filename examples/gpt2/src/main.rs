//! GPT-2 trained with exact reversible backpropagation: see `bdia-gpt2 --help` and the repository's README.

use std::io::Write;
use std::process::ExitCode;

use bdia_gpt2::alloc::Counting;
use bdia_gpt2::cli::{self, Command};
use bdia_gpt2::{inference, train};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    // Before anything that a wide register might be used for.
    if let Err(error) = bdia_cpu::require_cpu() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    let result = match cli::parse().command {
        Command::Train(args) => train::train(&args),
        Command::Eval(args) => inference::eval(&args),
        Command::Generate(args) => inference::generate(&args),
        Command::Plan(args) => inference::plan(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where nobody can read it, the exit code is still there.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}
