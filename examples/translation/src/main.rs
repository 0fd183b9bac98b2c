//! Translation with exact reversible training: see `bdia-translate --help` and the README beside this.

use std::io::Write;
use std::process::ExitCode;

use bdia_train::alloc::Counting;
use bdia_translate::cli::{Cli, Command};
use bdia_translate::{experiment, train, translate};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    // Before anything that a wide register might be used for.
    if let Err(error) = bdia_cpu::require_cpu() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    let result = match Cli::parse().command {
        Command::Train(args) => train::train(&args).map(|_| ()),
        Command::Eval(args) => translate::eval(&args),
        Command::Translate(args) => translate::translate(&args),
        Command::Plan(args) => train::plan(&args),
        Command::Experiment(args) => experiment::run(&args),
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
