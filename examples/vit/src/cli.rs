//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use bdia_train::cli::*;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

/// The named sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Size {
    /// 6 blocks, 4 heads, width 64, MLP 128: learns digits in a minute.
    Mini,
    /// The paper's: 6 blocks, 8 heads, width 512, MLP 512 (9,622,512 parameters for CIFAR-10).
    Small,
}

/// The residual network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// One stream: the vision transformer, trained in any mode.
    Vit,
    /// Two reversible streams over the same branches (RevViT); float, its own backward pass.
    Revvit,
}

/// What training changes of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AugmentKind {
    /// Nothing.
    None,
    /// A window of the padded image.
    Crop,
    /// A window, and every second image mirrored.
    CropFlip,
}

/// Flags of `train`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct TrainArgs {
    /// Directory of CIFAR-10 or CIFAR-100 (binary), IDX files (MNIST), or class folders, alone or
    /// in folders for training, validation and testing [default: the UCI digits, which are built
    /// in]
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    pub data: Option<PathBuf>,
    /// Train on so many images only, as many of each class
    #[arg(long, value_name = "N", value_parser = count(1 << 32), help_heading = "Data")]
    pub train_subset: Option<u64>,
    /// Hold out so many images only, of validation and test images each
    #[arg(long, value_name = "N", value_parser = count(1 << 32), help_heading = "Data")]
    pub test_subset: Option<u64>,
    /// Rows and columns that pictures of class folders are scaled to
    #[arg(long, value_name = "N", default_value_t = 32)]
    #[arg(value_parser = count(4096), help_heading = "Data")]
    pub image_size: u64,
    /// What training changes of images [default: none below 16 rows, else crop-flip for colour
    /// images, crop for others]
    #[arg(long, help_heading = "Data")]
    pub augment: Option<AugmentKind>,
    /// Pixels of padding before a window is cut [default: 4, or 1 below 16 rows]
    #[arg(long, value_name = "N", value_parser = count_or_zero(1024), help_heading = "Data")]
    pub padding: Option<u64>,
    /// Mix pairs of images, with shares from Beta(A, A); 0 for none
    #[arg(long, value_name = "A", default_value_t = 0.0)]
    #[arg(value_parser = up_to_one, help_heading = "Data")]
    pub mixup: f64,
    /// Size of the model [default: mini below 16 rows, else small]
    #[arg(long, value_name = "SIZE", help_heading = "Model")]
    pub config: Option<Size>,
    /// Rows and columns of a patch [default: 4, or 2 below 16 rows]
    #[arg(long, value_name = "N", value_parser = count(4096), help_heading = "Model")]
    pub patch: Option<u64>,
    /// Blocks, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000), help_heading = "Model")]
    pub layers: Option<u64>,
    /// Attention heads, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000), help_heading = "Model")]
    pub heads: Option<u64>,
    /// Width, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000), help_heading = "Model")]
    pub width: Option<u64>,
    /// Hidden width of the MLP, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000), help_heading = "Model")]
    pub mlp: Option<u64>,
    /// Plain patches and attention, as in ViT and DeiT, in place of the ones for small data sets
    #[arg(long, help_heading = "Model")]
    pub plain: bool,
    /// The residual network
    #[arg(long, default_value = "vit", help_heading = "Model")]
    pub network: Network,
    /// Start from a run's or a DeiT-like model's model.safetensors; the flags have to describe it,
    /// and a run's weights keep their classes
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub weights: Option<PathBuf>,
    /// Dropout of embedding, attention, residuals, and inside the MLP
    #[arg(long, value_name = "P", default_value_t = 0.1)]
    #[arg(value_parser = below_one, help_heading = "Regularization")]
    pub dropout: f64,
    /// Stochastic depth: probability of dropping the last block, less in proportion below it
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    #[arg(value_parser = below_one, help_heading = "Regularization")]
    pub drop_path: f64,
    /// Label smoothing
    #[arg(long, value_name = "E", default_value_t = 0.0)]
    #[arg(value_parser = below_one, help_heading = "Regularization")]
    pub smoothing: f64,
    /// Images of a micro-batch, of all ranks together
    #[arg(long, value_name = "N", default_value_t = 32)]
    #[arg(value_parser = count(1 << 20), help_heading = "Run")]
    pub batch: u64,
    /// What is trained.
    #[command(flatten)]
    #[serde(flatten)]
    pub method: MethodArgs,
    /// Mode, optimizer, run, machine.
    #[command(flatten)]
    #[serde(flatten)]
    pub run: EpochArgs,
}

fn up_to_one(s: &str) -> Result<f64, String> {
    real(s, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))
}

impl Flags for TrainArgs {
    const INPUTS: &'static [&'static str] = &["data", "weights"];

    fn run(&mut self) -> RunFlags<'_> {
        let inputs = self.data.iter_mut().chain(&mut self.weights);
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
        if self.network == Network::Revvit && self.method.method == MethodKind::Lora {
            return Err("--method lora belongs to --network vit; leave one of them out".into());
        }
        if self.network == Network::Revvit
            && (self.run.given.contains("mode") || self.run.mode.quantize)
        {
            return Err(
                "--mode and --quantize belong to --network vit; revvit has a backward pass \
                        of its own"
                    .into(),
            );
        }
        if self.network == Network::Revvit && self.drop_path > 0.0 {
            return Err("--drop-path belongs to --network vit; leave it out".into());
        }
        Ok(())
    }
}

/// Flags of `eval`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct EvalArgs {
    /// The directory of a run; without this flag, the last
    /// run without --out
    #[arg(long, value_name = "DIR", default_value = "runs/vit")]
    pub weights: PathBuf,
    /// Images to evaluate: the held-out ones of this directory, or all of a folder for validation
    /// or testing; their classes are found among the model's by name [default: those of the run]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// The best epoch's weights in place of the last one's
    #[arg(long)]
    pub best: bool,
    /// Arithmetic of the residual stream
    #[arg(long, default_value = "float")]
    pub inference: Inference,
    /// A constant gamma from -1 to 1 in place of its mean, 0
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0, value_parser = signed_gamma)]
    pub gamma: f64,
    /// The last line of standard output is one JSON object
    #[arg(long)]
    pub json: bool,
    /// Threads, memory, backend.
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// The experiments of the paper, and two that its readers asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Experiment {
    /// ViT, RevViT, BDIA-ViT: accuracy, memory, time.
    Accuracy,
    /// Magnitudes of gamma in training.
    Gamma,
    /// Accuracy against a constant gamma at inference.
    Robustness,
    /// Error of rebuilding against depth.
    Reconstruction,
    /// Accuracy and room on the grid against its fineness.
    Precision,
    /// Quantized against float inference of the same weights.
    Inference,
    /// BDIA beside dropout, stochastic depth and weight decay.
    Regularizers,
}

/// Flags of `experiment`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ExperimentArgs {
    /// Which experiment
    pub name: Experiment,
    /// Seeds: 1 to N
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count(1000))]
    pub seeds: u64,
    /// Directory of all experiments; runs that are finished there are not repeated
    #[arg(long, value_name = "DIR", default_value = "runs/experiments")]
    pub dir: PathBuf,
    /// Settings of all runs: flags of `train`
    #[command(flatten)]
    pub train: TrainArgs,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Command {
    /// Train a vision transformer (also what runs without a subcommand)
    Train(Box<TrainArgs>),
    /// Accuracy of a trained model
    Eval(EvalArgs),
    /// The memory that training would take, without training
    Plan(Box<TrainArgs>),
    /// Many runs and what they show: a table, a picture
    Experiment(Box<ExperimentArgs>),
}

/// The command line, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Cli {
    /// What to do.
    pub command: Command,
}

/// Vision transformers with exact reversible training: train, evaluate, plan memory, experiment.
///
/// Without a subcommand it trains, and the flags of `train` apply.
#[derive(Debug, Parser)]
#[command(
    name = "bdia-vit",
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

/// The defaults that differ from those of text: the paper's optimizer, no weight decay.
fn defaults(command: clap::Command) -> clap::Command {
    let mut command = command;
    for (flag, value) in [
        ("optimizer", "set-adam"),
        ("lr", "0.002"),
        ("weight_decay", "0"),
        ("warmup", "50"),
        ("epochs", "30"),
        ("checkpoint_interval", "10"),
        ("out", "runs/vit"),
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
                newest(sub, &mut eval.weights);
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
        Cli::try_parse_from(core::iter::once("bdia-vit").chain(arguments.split_whitespace()))
            .map(|c| c.command)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn clap_finds_no_mistake_in_the_definition() {
        Raw::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_vision() {
        for arguments in ["", "train"] {
            let Command::Train(t) = read(arguments).unwrap() else { panic!("{arguments}") };
            assert_eq!(
                (t.run.optim.optimizer, t.run.optim.weight_decay, t.run.optim.eps()),
                (Optimizer::SetAdam, 0.0, 1e-18)
            );
            assert!(t.run.given.is_empty() && t.run.mode.mode == Mode::Bdia);
        }
        let Command::Experiment(e) = read("experiment gamma --epochs 2 --seeds 1").unwrap() else {
            panic!()
        };
        assert_eq!(
            (e.name, e.train.run.epochs, e.train.run.optim.lr),
            (Experiment::Gamma, 2, 2e-3)
        );
    }

    #[test]
    fn wrong_values_are_explained() {
        for (arguments, expected) in [
            ("--network revvit --mode bdia", "--network vit"),
            ("--network revvit --drop-path 0.1", "--drop-path"),
            ("--gamma 0.3", "--gamma: gamma is 0.3"),
            ("--mixup 2", "from 0 to 1, found 2"),
            ("--smoothing 1", "below 1"),
            ("--epochs 0", "from 1 to"),
            ("experiment nothing", "robustness"),
            ("experiment", "NAME"),
        ] {
            let message = read(arguments).unwrap_err();
            assert!(message.contains(expected), "{arguments}: {message}");
        }
    }
}
