//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use bdia_train::cli::*;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::data::Columns;

/// The named sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Size {
    /// 3 + 3 blocks, 4 heads, width 128, MLP 256: learns number words in two minutes.
    Mini,
    /// 3 + 3 blocks, 4 heads, width 256, MLP 1024.
    Small,
    /// The transformer's base: 6 + 6 blocks, 8 heads, width 512, MLP 2048.
    Base,
}

/// Vocabularies and tables of embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Embeddings {
    /// One vocabulary of both languages, one table for source, target and logits.
    Shared,
    /// A vocabulary and a table for each; logits share the target's.
    Separate,
}

/// Flags of `train`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct TrainArgs {
    /// Pairs: a CSV of two columns with header, a TSV, or two files of aligned lines; plain or .gz
    /// [default: number words]
    #[arg(long, value_name = "FILE", num_args = 1..=2, help_heading = "Data")]
    pub data: Vec<PathBuf>,
    /// Columns of source and target in a CSV or TSV: by place, such as 2,3, or by the names in its
    /// header, such as src,tgt [default: 1,2]
    #[arg(long, value_name = "SOURCE,TARGET", help_heading = "Data")]
    pub columns: Option<Columns>,
    /// Pairs to hold out, in files as for --data [default: a part of --data, by source sentence]
    #[arg(long, value_name = "FILE", num_args = 1..=2, help_heading = "Data")]
    pub held_out: Vec<PathBuf>,
    /// Learn from so many pairs only [default: all of --data, 20000 number words]
    #[arg(long, value_name = "N", value_parser = count(1 << 32), help_heading = "Data")]
    pub pairs: Option<u64>,
    /// Hold out so many source sentences, of --held-out use so many [default: 1000, or a twentieth;
    /// all of --held-out]
    #[arg(long, value_name = "N", value_parser = count(1 << 32), help_heading = "Data")]
    pub held: Option<u64>,
    /// Entries of a vocabulary, at most
    #[arg(long, value_name = "N", default_value_t = 8000)]
    #[arg(value_parser = vocabulary, help_heading = "Data")]
    pub vocab: u64,
    /// Vocabularies and tables of embeddings
    #[arg(long, default_value = "shared", help_heading = "Data")]
    pub embeddings: Embeddings,
    /// Tokens of the longest sentence, with its end; longer pairs are left out and counted
    #[arg(long, value_name = "N", default_value_t = 64)]
    #[arg(value_parser = longest, help_heading = "Data")]
    pub longest: u64,
    /// Size of the model [default: base; mini for number words]
    #[arg(long, value_name = "SIZE", help_heading = "Model")]
    pub config: Option<Size>,
    /// Blocks of the encoder, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000), help_heading = "Model")]
    pub layers: Option<u64>,
    /// Blocks of the decoder [default: as many as the encoder's]
    #[arg(long, value_name = "N", value_parser = count(65_000), help_heading = "Model")]
    pub decoder_layers: Option<u64>,
    /// Attention heads, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000), help_heading = "Model")]
    pub heads: Option<u64>,
    /// Width, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000), help_heading = "Model")]
    pub width: Option<u64>,
    /// Hidden width of the MLPs, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000), help_heading = "Model")]
    pub mlp: Option<u64>,
    /// Start from a run's weights and vocabulary; the flags have to describe it
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub weights: Option<PathBuf>,
    /// Dropout of embeddings, attention, residuals, and inside the MLPs
    #[arg(long, value_name = "P", default_value_t = 0.1)]
    #[arg(value_parser = below_one, help_heading = "Regularization")]
    pub dropout: f64,
    /// Label smoothing
    #[arg(long, value_name = "E", default_value_t = 0.1)]
    #[arg(value_parser = below_one, help_heading = "Regularization")]
    pub smoothing: f64,
    /// Positions of a batch on each side, padding counted
    #[arg(long, value_name = "N", default_value_t = 1024)]
    #[arg(value_parser = count(1 << 24), help_heading = "Run")]
    pub batch_tokens: u64,
    /// Held-out sentences that are translated (greedily) in an evaluation; at the end all are
    #[arg(long, value_name = "N", default_value_t = 200)]
    #[arg(value_parser = count_or_zero(1 << 32), help_heading = "Run")]
    pub translate: u64,
    /// Hypotheses of the search at the end; 1 is greedy
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = count(64), help_heading = "Run")]
    pub beams: u64,
    /// What is trained.
    #[command(flatten)]
    #[serde(flatten)]
    pub method: MethodArgs,
    /// Mode, optimizer, run, machine.
    #[command(flatten)]
    #[serde(flatten)]
    pub run: EpochArgs,
}

fn check_columns(columns: Option<&Columns>, files: &[&Vec<PathBuf>]) -> Result<(), String> {
    if columns.is_some() && !files.iter().any(|f| f.len() == 1) {
        return Err("--columns is for a CSV or TSV; aligned files have none".into());
    }
    Ok(())
}

fn vocabulary(s: &str) -> Result<u64, String> {
    // Every byte, and the three marks.
    whole(s, 259, 1 << 24)
}

fn longest(s: &str) -> Result<u64, String> {
    whole(s, 2, 65_000)
}

impl Flags for TrainArgs {
    const INPUTS: &'static [&'static str] = &["data", "held_out", "weights"];

    fn run(&mut self) -> RunFlags<'_> {
        let inputs = self.data.iter_mut().chain(&mut self.held_out).chain(&mut self.weights);
        self.run.flags(inputs.collect())
    }
}

impl TrainArgs {
    /// What single flags cannot show to be wrong.
    ///
    /// # Errors
    /// A sentence.
    pub fn check(&self) -> Result<(), String> {
        self.run.check()?;
        self.method.check()?;
        if self.data.is_empty() && !self.held_out.is_empty() {
            return Err("--held-out belongs to --data; number words are split by themselves".into());
        }
        check_columns(self.columns.as_ref(), &[&self.data, &self.held_out])?;
        if self.weights.is_some() && self.run.given.contains("vocab") {
            return Err("--weights comes with its vocabulary; leave --vocab out".into());
        }
        if self.batch_tokens < self.longest {
            let (batch, longest) = (self.batch_tokens, self.longest);
            return Err(format!(
                "--batch-tokens is {batch}, expected at least --longest, which is {longest}"
            ));
        }
        Ok(())
    }
}

/// How a trained model translates.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct SearchArgs {
    /// The directory of a run; without this flag, the last
    /// run without --out
    #[arg(long, value_name = "DIR", default_value = "runs/translation")]
    pub weights: PathBuf,
    /// The best evaluation's weights in place of the last ones
    #[arg(long)]
    pub best: bool,
    /// Hypotheses of the search; 1 is greedy
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(64))]
    pub beams: u64,
    /// Exponent of the length by which hypotheses are compared
    #[arg(long, default_value_t = 0.6, value_parser = not_negative)]
    pub alpha: f64,
    /// Arithmetic of the residual stream
    #[arg(long, default_value = "float")]
    pub inference: Inference,
    /// Threads, memory, backend.
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// Flags of `eval`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct EvalArgs {
    /// Pairs to evaluate, in files as for `train` [default: those that the run held out]
    #[arg(long, value_name = "FILE", num_args = 1..=2)]
    pub data: Vec<PathBuf>,
    /// Columns of source and target in a CSV or TSV: by place, such as 2,3, or by the names in its
    /// header, such as src,tgt [default: 1,2]
    #[arg(long, value_name = "SOURCE,TARGET", requires = "data")]
    pub columns: Option<Columns>,
    /// Write the translations to this file, one a line
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The last line of standard output is one JSON object
    #[arg(long)]
    pub json: bool,
    /// The search.
    #[command(flatten)]
    pub search: SearchArgs,
}

/// Flags of `translate`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct TranslateArgs {
    /// The search.
    #[command(flatten)]
    pub search: SearchArgs,
}

/// Flags of `experiment`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ExperimentArgs {
    /// Seeds: 1 to N
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count(1000))]
    pub seeds: u64,
    /// Dropout of the baseline with more of it
    #[arg(long, value_name = "P", default_value_t = 0.3, value_parser = below_one)]
    pub more_dropout: f64,
    /// Train the standard transformer on the grid as well
    #[arg(long)]
    pub grid: bool,
    /// Directory of the experiment; runs that are finished there are not repeated
    #[arg(long, value_name = "DIR", default_value = "runs/translation-experiment")]
    pub dir: PathBuf,
    /// Settings of all runs: flags of `train`
    #[command(flatten)]
    pub train: TrainArgs,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Command {
    /// Train a translation model (also what runs without a subcommand)
    Train(Box<TrainArgs>),
    /// Loss, BLEU and chrF of a trained model
    Eval(EvalArgs),
    /// Translate the lines of standard input
    Translate(TranslateArgs),
    /// The memory that training would take, without training
    Plan(Box<TrainArgs>),
    /// BDIA, the standard transformer and more dropout: losses, BLEU, a table, pictures
    Experiment(Box<ExperimentArgs>),
}

/// The command line, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Cli {
    /// What to do.
    pub command: Command,
}

/// Translation with exact reversible training: train, evaluate, translate, plan memory, experiment.
///
/// Without a subcommand it trains, and the flags of `train` apply.
#[derive(Debug, Parser)]
#[command(
    name = "bdia-translate",
    version,
    args_conflicts_with_subcommands = true,
    allow_negative_numbers = true
)]
struct Raw {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: TrainArgs,
}

/// The defaults that differ from those of text.
fn defaults(command: clap::Command) -> clap::Command {
    let mut command = command;
    for (flag, value) in [
        ("lr", "0.002"),
        ("weight_decay", "0.01"),
        ("warmup", "200"),
        ("beta2", "0.98"),
        ("out", "runs/translation"),
    ] {
        command = command.mut_arg(flag, |a| a.default_value(value));
    }
    command
}

impl Cli {
    /// Reads and checks arguments; the first is the program's name.
    ///
    /// # Errors
    /// What clap says; that includes a request for help or the version.
    pub fn try_parse_from(
        arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, clap::Error> {
        let mut command = defaults(Raw::command())
            .mut_subcommands(|s| s.allow_negative_numbers(true))
            .mut_subcommand("train", defaults)
            .mut_subcommand("plan", defaults)
            .mut_subcommand("experiment", defaults);
        let matches = command.try_get_matches_from_mut(arguments)?;
        let raw = Raw::from_arg_matches(&matches)?;
        let sub = matches.subcommand().map(|(_, m)| m);
        let mut parsed = raw.command.unwrap_or_else(|| Command::Train(Box::new(raw.train)));
        let flags = match &mut parsed {
            Command::Train(train) | Command::Plan(train) => Some(&mut **train),
            Command::Experiment(e) => Some(&mut e.train),
            Command::Eval(eval) => {
                check_columns(eval.columns.as_ref(), &[&eval.data])
                    .map_err(|message| command.error(ErrorKind::ValueValidation, message))?;
                newest(sub, &mut eval.search.weights);
                None
            }
            Command::Translate(translate) => {
                newest(sub, &mut translate.search.weights);
                None
            }
        };
        if let Some(flags) = flags {
            flags.run.given = given(sub.unwrap_or(&matches));
            flags.check().map_err(|message| command.error(ErrorKind::ValueValidation, message))?;
        }
        Ok(Self { command: parsed })
    }

    /// Reads the process's arguments, or ends the process ([`or_exit`]).
    pub fn parse() -> Self {
        or_exit(Self::try_parse_from(std::env::args_os()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &str) -> Result<Command, String> {
        Cli::try_parse_from(core::iter::once("bdia-translate").chain(arguments.split_whitespace()))
            .map(|c| c.command)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn clap_finds_no_mistake_in_the_definition() {
        Raw::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_translation() {
        for arguments in ["", "train"] {
            let Command::Train(t) = read(arguments).unwrap() else { panic!("{arguments}") };
            assert_eq!(
                (t.run.optim.optimizer, t.run.optim.beta2, t.smoothing),
                (Optimizer::Adamw, 0.98, 0.1)
            );
            assert!(t.run.given.is_empty() && t.data.is_empty() && t.run.mode.mode == Mode::Bdia);
        }
        let Command::Experiment(e) = read("experiment --epochs 2 --seeds 1").unwrap() else {
            panic!()
        };
        assert_eq!((e.train.run.epochs, e.seeds, e.train.run.optim.warmup), (2, 1, 200));
        let Command::Train(t) =
            read("--data a.en a.fr --schedule noam --optimizer set-adam").unwrap()
        else {
            panic!()
        };
        assert_eq!((t.data.len(), t.run.optim.schedule), (2, ScheduleKind::Noam));
    }

    /// What changes no number is not compared, and neither is the way to a file.
    #[test]
    fn runs_are_compared_by_what_they_compute() {
        let of = |arguments: &str| {
            let Command::Train(t) = read(arguments).unwrap() else { panic!() };
            t.comparable()
        };
        let a = of("--data Cargo.toml src/cli.rs --threads 1 --out a --verify");
        assert_eq!(
            a,
            of("--data src/../Cargo.toml ./src/cli.rs --device 2 --json --checkpoint-interval 9")
        );
        assert_ne!(a, of("--data Cargo.toml src/lib.rs"));
        assert_ne!(a, of("--data Cargo.toml src/cli.rs --lr 0.5"));
    }

    #[test]
    fn wrong_values_are_explained() {
        for (arguments, expected) in [
            ("--vocab 100", "expected a whole number from 259"),
            ("--longest 1", "expected a whole number from 2"),
            ("--batch-tokens 32", "expected at least --longest"),
            ("--held-out x", "belongs to --data"),
            ("--gamma 0.3", "gamma"),
            ("--dropout 1", "expected a number from 0 to below 1"),
            ("translate --beams 0", "expected a whole number from 1"),
            ("--schedule never", "noam"),
            ("--data a --columns 2", "two different columns such as 2,3"),
            ("--data a --columns 0,1", "found 0,1"),
            ("--data a --columns 2,02", "found 2,02"),
            ("--data a --columns src,src", "found src,src"),
            ("--data a --columns 1,2,3", "found 1,2,3"),
            ("--data a.en a.fr --columns 1,2", "is for a CSV or TSV; aligned files have none"),
            ("eval --data a.en a.fr --columns 1,2", "aligned files have none"),
            ("eval --columns 1,2", "--data"),
        ] {
            let text = read(arguments).unwrap_err();
            assert!(text.contains(expected), "{arguments}: {text}");
        }
    }
}
