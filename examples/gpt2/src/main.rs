//! GPT-2 trained with exact reversible backpropagation: see `bdia-gpt2 --help` and the repository's README.

use std::process::ExitCode;

use bdia_gpt2::alloc::Counting;
use bdia_gpt2::cli::{Cli, Command};
use bdia_gpt2::{finetune, inference, train};
use bdia_train::run::program;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    program(|| match Cli::parse().command {
        Command::Train(args) => train::train(&args),
        Command::Finetune(args) => finetune::finetune(&args),
        Command::Merge(args) => inference::merge(&args),
        Command::Eval(args) => inference::eval(&args),
        Command::Generate(args) => inference::generate(&args),
        Command::Plan(args) => inference::plan(&args),
    })
}
