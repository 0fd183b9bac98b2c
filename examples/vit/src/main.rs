//! Vision transformers trained with exact reversible backpropagation: see `bdia-vit --help` and the
//! README beside this.

use std::process::ExitCode;

use bdia_train::alloc::Counting;
use bdia_train::run::program;
use bdia_vit::cli::{Cli, Command};
use bdia_vit::{experiment, train};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    program(|| match Cli::parse().command {
        Command::Train(args) => train::train(&args).map(|_| ()),
        Command::Eval(args) => train::eval(&args),
        Command::Plan(args) => train::plan(&args),
        Command::Experiment(args) => experiment::run(&args),
    })
}
