//! Language models trained with exact reversible backpropagation: see `bdia-lm --help` and the
//! README beside it.

use std::process::ExitCode;

use bdia_lm::cli::{Cli, Command, Experiment};
use bdia_lm::{chat, experiment, export, finetune, inference, plan, prepare, score, train};
use bdia_train::alloc::Counting;
use bdia_train::run::program;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    program(|| match Cli::parse().command {
        Command::Train(args) => train::train(&args).map(|_| ()),
        Command::Finetune(args) => finetune::finetune(&args).map(|_| ()),
        Command::Prepare(args) => prepare::prepare(&args),
        Command::Merge(args) => inference::merge(&args),
        Command::Export(args) => export::export(&args),
        Command::Eval(args) => inference::eval(&args),
        Command::Generate(args) => inference::generate(&args),
        Command::Chat(args) => chat::chat(&args),
        Command::Score(args) => score::score(&args),
        Command::Experiment { experiment: Experiment::Finetune(args) } => {
            experiment::finetune(&args)
        }
        Command::Experiment { experiment: Experiment::SmallData(args) } => {
            experiment::small_data(&args)
        }
        Command::Plan(args) => plan::plan(&args),
    })
}
