//! Translation with exact reversible training: see `bdia-translate --help` and the README beside
//! this.

use std::process::ExitCode;

use bdia_train::alloc::Counting;
use bdia_train::run::program;
use bdia_translate::cli::{Cli, Command};
use bdia_translate::{experiment, train, translate};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    program(|| match Cli::parse().command {
        Command::Train(args) => train::train(&args).map(|_| ()),
        Command::Eval(args) => translate::eval(&args),
        Command::Translate(args) => translate::translate(&args),
        Command::Plan(args) => train::plan(&args),
        Command::Experiment(args) => experiment::run(&args),
    })
}
