//! The command line.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::PathBuf;

pub use bdia_train::cli::*;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, Gpt2Config};

/// Which pieces of the training text make up a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// From random places.
    Shuffled,
    /// One after the other; sample n of the run is tokens n·T … n·T+T, from the start again after the end.
    Sequential,
}

/// The named sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Size {
    /// 6 layers, 4 heads, width 128, context 128: trains in minutes on two cores.
    #[value(name = "mini")]
    Mini,
    /// 12 layers, 12 heads, width 768 (124M parameters).
    #[value(name = "gpt2")]
    Gpt2,
    /// 24 layers, 16 heads, width 1024 (355M).
    #[value(name = "gpt2-medium")]
    Medium,
    /// 36 layers, 20 heads, width 1280 (774M).
    #[value(name = "gpt2-large")]
    Large,
    /// 48 layers, 25 heads, width 1600 (1.5B).
    #[value(name = "gpt2-xl")]
    Xl,
}

/// The architecture: a named size, and single dimensions in place of its own.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Size of the model
    #[arg(long, value_name = "SIZE", default_value = "mini")]
    pub config: Size,
    /// Blocks, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000))]
    pub layers: Option<u64>,
    /// Attention heads, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(1 << 20))]
    pub heads: Option<u64>,
    /// Width, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(1 << 20))]
    pub width: Option<u64>,
    /// Tokens of a sample [default: the positions of the size or of the loaded model; 128 for mini]
    #[arg(long, value_name = "N", value_parser = count(1 << 24))]
    pub context: Option<u64>,
    /// Size of the vocabulary, for token files that are not GPT-2's [default: 50257]
    #[arg(long, value_name = "N", value_parser = count(1 << 16))]
    pub vocab: Option<u64>,
}

impl ModelArgs {
    /// The configuration of a fresh model. The positions of `mini` are the context; the other sizes have their own 1024,
    /// or the context where that is longer.
    ///
    /// # Errors
    /// [`ConfigError`] where the dimensions do not fit together.
    pub fn gpt2(&self, dropout: f64) -> Result<Gpt2Config, ConfigError> {
        let mut c = Gpt2Config::preset(self.config);
        let to = |v: u64| usize::try_from(v).unwrap_or(usize::MAX);
        c.n_layer = self.layers.map_or(c.n_layer, to);
        c.n_head = self.heads.map_or(c.n_head, to);
        c.n_embd = self.width.map_or(c.n_embd, to);
        if let Some(context) = self.context.map(to) {
            c.n_positions = if self.config == Size::Mini { context } else { c.n_positions.max(context) };
        }
        if let Some(vocab) = self.vocab.map(to) {
            c.set_vocab(vocab);
        }
        c.set_dropout(dropout);
        c.check()?;
        Ok(c)
    }
}

/// Flags of `train`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct TrainArgs {
    /// Plain UTF-8 text, or a .bin file of tokens [default: the licence texts of SPDX, which are built in]
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub data: Option<PathBuf>,
    /// Which pieces of the text make up a batch
    #[arg(long, default_value = "shuffled", help_heading = "Data")]
    pub order: Order,
    /// Start from a model in Hugging Face's layout (config.json and model.safetensors)
    #[arg(long, value_name = "DIR", help_heading = "Model", conflicts_with_all = ["config", "layers", "heads", "width", "vocab"])]
    pub weights: Option<PathBuf>,
    /// The architecture.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelArgs,
    /// Dropout of embeddings, attention and residuals
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = below_one, help_heading = "Model")]
    pub dropout: f64,
    /// How activations are kept.
    #[command(flatten)]
    #[serde(flatten)]
    pub mode: ModeArgs,
    /// The optimizer.
    #[command(flatten)]
    #[serde(flatten)]
    pub optim: OptimArgs,
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 130, value_parser = count(u64::from(u32::MAX) - 1), help_heading = "Run")]
    pub steps: u64,
    /// Samples of a micro-batch, of all ranks together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count(1 << 20), help_heading = "Run")]
    pub batch: u64,
    /// Micro-batches of a step. More than one needs full gradient buffers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1 << 10), help_heading = "Run")]
    pub accumulate: u64,
    /// Everything random follows from it
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Run", value_parser = seed)]
    pub seed: u64,
    /// Steps between validations; 0 for one at the end
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = count_or_zero(u64::from(u32::MAX)), help_heading = "Run")]
    pub eval_interval: u64,
    /// Steps between checkpoints; 0 for one at the end
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = count_or_zero(u64::from(u32::MAX)), help_heading = "Run")]
    pub checkpoint_interval: u64,
    /// Continue the run in this directory with its own settings
    #[arg(long, value_name = "DIR", help_heading = "Run", conflicts_with_all = ["out"])]
    pub resume: Option<PathBuf>,
    /// Keep every activation as well and count the rebuilt values that differ
    #[arg(long, help_heading = "Run")]
    pub verify: bool,
    /// Directory of the run's files
    #[arg(long, value_name = "DIR", default_value = "runs/gpt2", help_heading = "Run")]
    pub out: PathBuf,
    /// The last line of standard output is one JSON object
    #[arg(long, help_heading = "Run")]
    pub json: bool,
    /// Threads, memory, backend.
    #[command(flatten)]
    #[serde(flatten)]
    pub machine: MachineArgs,
    /// Names (as in `weight_decay`) of the flags that the user gave.
    #[arg(skip)]
    #[serde(skip)]
    pub given: BTreeSet<String>,
}

impl Flags for TrainArgs {
    fn run(&mut self) -> RunFlags<'_> {
        RunFlags {
            seed: &mut self.seed,
            checkpoint_interval: &mut self.checkpoint_interval,
            resume: &mut self.resume,
            verify: &mut self.verify,
            out: &mut self.out,
            json: &mut self.json,
            mode: &mut self.mode,
            machine: &mut self.machine,
            given: &mut self.given,
            inputs: self.data.iter_mut().chain(&mut self.weights).collect(),
        }
    }
}

impl TrainArgs {
    /// What single flags cannot show to be wrong.
    fn check(&self) -> Result<(), String> {
        check_mode(&self.mode, self.verify)?;
        self.optim.check()
    }
}

/// Flags of `eval`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct EvalArgs {
    /// The model: a run's directory, or one in Hugging Face's layout
    #[arg(long, value_name = "DIR", default_value = "runs/gpt2")]
    pub weights: PathBuf,
    /// Plain UTF-8 text, or a .bin file of tokens, all of it [default: the validation part of the run's data]
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Tokens of a window [default: the context the model was trained with, or its positions]
    #[arg(long, value_name = "N", value_parser = count(1 << 24))]
    pub context: Option<u64>,
    /// Windows at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count(1 << 20))]
    pub batch: u64,
    /// Arithmetic of the residual stream
    #[arg(long, default_value = "float")]
    pub inference: Inference,
    /// A constant gamma from -1 to 1 in place of its mean, 0
    #[arg(long, allow_negative_numbers = true, value_parser = signed_gamma)]
    pub gamma: Option<f64>,
    /// The grid of quantized inference is 2^-l [default: the model's, else 14]
    #[arg(long, value_name = "L", value_parser = frac_bits)]
    pub frac_bits: Option<u32>,
    /// The last line of standard output is one JSON object
    #[arg(long)]
    pub json: bool,
    /// Threads, memory, backend.
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// Flags of `generate`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct GenerateArgs {
    /// The model: a run's directory, or one in Hugging Face's layout
    #[arg(long, value_name = "DIR", default_value = "runs/gpt2")]
    pub weights: PathBuf,
    /// Text to go on from [default: the start of a document]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub prompt: String,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = count(1 << 20))]
    pub tokens: u64,
    /// Logits are divided by it; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.8, value_parser = not_negative)]
    pub temperature: f64,
    /// Choose among the k most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 40, value_parser = count_or_zero(1 << 20))]
    pub top_k: u64,
    /// Choose among the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability)]
    pub top_p: f64,
    /// The text follows from it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = seed)]
    pub seed: u64,
    /// Arithmetic of the residual stream
    #[arg(long, default_value = "float")]
    pub inference: Inference,
    /// The last line of standard output is one JSON object
    #[arg(long)]
    pub json: bool,
    /// Threads, memory, backend.
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// Flags of `plan`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct PlanArgs {
    /// The architecture.
    #[command(flatten)]
    pub model: ModelArgs,
    /// How activations are kept.
    #[command(flatten)]
    pub mode: ModeArgs,
    /// The optimizer.
    #[command(flatten)]
    pub optim: OptimArgs,
    /// Dropout of embeddings, attention and residuals
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = below_one, help_heading = "Model")]
    pub dropout: f64,
    /// Samples of a micro-batch
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count(1 << 20))]
    pub batch: u64,
    /// Micro-batches of a step. More than one needs full gradient buffers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1 << 10))]
    pub accumulate: u64,
    /// Ranks that share a micro-batch
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1 << 20))]
    pub ranks: u64,
    /// With the copies of --verify
    #[arg(long)]
    pub verify: bool,
    /// The last line of standard output is one JSON object
    #[arg(long)]
    pub json: bool,
    /// Threads, memory, backend.
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Command {
    /// Train a GPT-2 (also what runs without a subcommand)
    Train(Box<TrainArgs>),
    /// Loss and perplexity of a model
    Eval(EvalArgs),
    /// Text from a model
    Generate(GenerateArgs),
    /// The memory that training would take, without training
    Plan(PlanArgs),
}

/// The command line, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Cli {
    /// What to do.
    pub command: Command,
}

/// GPT-2 with exact reversible training: train, evaluate, generate, plan memory.
///
/// Without a subcommand it trains, and the flags of `train` apply.
#[derive(Debug, Parser)]
#[command(name = "bdia-gpt2", version, args_conflicts_with_subcommands = true, allow_negative_numbers = true)]
struct Raw {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: TrainArgs,
}

impl Cli {
    /// Reads and checks arguments; the first is the program's name.
    ///
    /// # Errors
    /// What clap says; that includes a request for help or the version.
    pub fn try_parse_from(
        arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, clap::Error> {
        // Every subcommand takes `-3` as a value, so that the value's own check can say what is wrong with it.
        let mut command = Raw::command().mut_subcommands(|s| s.allow_negative_numbers(true));
        let matches = command.try_get_matches_from_mut(arguments)?;
        let raw = Raw::from_arg_matches(&matches)?;
        let sub = matches.subcommand().map(|(_, m)| m);
        let mut parsed = raw.command.unwrap_or_else(|| Command::Train(Box::new(raw.train)));
        let checked = match &mut parsed {
            Command::Train(train) => {
                train.given = given(sub.unwrap_or(&matches));
                train.check()
            }
            Command::Plan(plan) => check_mode(&plan.mode, plan.verify),
            Command::Eval(_) | Command::Generate(_) => Ok(()),
        };
        checked.map_err(|message| command.error(ErrorKind::ValueValidation, message))?;
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
        Cli::try_parse_from(core::iter::once("bdia-gpt2").chain(arguments.split_whitespace()))
            .map(|c| c.command)
            .map_err(|e| e.to_string())
    }

    fn train(arguments: &str) -> TrainArgs {
        match read(arguments).unwrap() {
            Command::Train(t) => *t,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn clap_finds_no_mistake_in_the_definition() {
        Raw::command().debug_assert();
    }

    #[test]
    fn train_is_what_runs_without_a_subcommand() {
        assert_eq!(train(""), train("train"));
        assert_eq!(train("--steps 10"), train("train --steps 10"));
        let t = train("--steps 10 --weight-decay 0.2 --verify");
        assert_eq!((t.steps, t.optim.weight_decay, t.optim.lr, t.optim.min_lr()), (10, 0.2, 1e-3, 1e-4));
        assert_eq!(t.given.iter().map(String::as_str).collect::<Vec<_>>(), ["steps", "verify", "weight_decay"]);
        assert_eq!((t.mode.mode, t.mode.gamma, t.mode.frac_bits), (Mode::Bdia, 0.5, 14));
        assert!(train("").given.is_empty());
        assert!(matches!(read("plan --config gpt2-xl --memory 2GB").unwrap(), Command::Plan(_)));
        assert!(matches!(read("eval --inference quantized --gamma -0.5").unwrap(), Command::Eval(_)));
        assert!(matches!(read("generate --prompt Hello --top-k 0").unwrap(), Command::Generate(_)));
    }

    #[test]
    fn help_shows_everything_with_defaults() {
        for request in ["--help", "train --help"] {
            let help = Cli::try_parse_from(format!("bdia-gpt2 {request}").split(' ')).unwrap_err();
            assert!(!help.use_stderr());
            let help = help.to_string();
            let flags = "data weights config layers heads width context vocab mode checkpoint-every quantize gamma \
                 gamma-sign frac-bits optimizer lr beta1 beta2 eps weight-decay schedule warmup min-lr clip steps batch \
                 accumulate dropout seed threads memory eval-interval order backend verify out json resume \
                 checkpoint-interval";
            for flag in flags.split_whitespace() {
                assert!(help.contains(&format!("--{flag}")), "{request}: {flag}");
            }
            for default in ["[default: 130]", "[default: 0.001]", "[default: bdia]", "[default: runs/gpt2]"] {
                assert!(help.contains(default), "{request}: {default}");
            }
        }
        let help = Cli::try_parse_from(["bdia-gpt2", "-h"]).unwrap_err().to_string();
        assert!(["eval", "generate", "plan"].iter().all(|c| help.contains(c)));
    }

    #[test]
    fn wrong_values_are_explained() {
        for (arguments, expected) in [
            ("--lr NaN", "expected a number of 0 or more, found NaN"),
            ("--lr -1", "expected a number of 0 or more, found -1"),
            ("--lr inf", "found inf"),
            ("train --lr 1e99", "found 1e99"),
            ("--batch 0", "expected a whole number from 1 to 1048576, found 0"),
            ("--batch -8", "found -8"),
            ("train --steps -1", "found -1"),
            ("--steps 1.5", "found 1.5"),
            ("--steps 99999999999999999999", "found 99999999999999999999"),
            ("--gamma 0", "--gamma: gamma is 0"),
            ("--gamma 0.3", "--gamma: gamma is 0.3"),
            ("--gamma NaN", "found NaN"),
            ("--gamma -0.5", "--gamma-sign has the sign"),
            ("plan --gamma 0.3", "--gamma: gamma is 0.3"),
            ("--frac-bits 99", "from 0 to 24"),
            ("--dropout 1", "below 1"),
            ("--beta2 1", "below 1"),
            ("--min-lr 1", "expected at most --lr"),
            ("--memory 2XB", "expected a size such as 2GB"),
            ("--memory 0", "expected a size such as 2GB"),
            ("--memory 1e9999", "expected a size such as 2GB"),
            ("--threads 0", "from 1 to 1024"),
            ("--mode bdia-float --quantize", "contradicts"),
            ("--checkpoint-every 2", "--mode checkpoint"),
            ("--mode standard --verify", "rebuild nothing"),
            ("--config gpt3", "gpt2-medium"),
            ("--mode fast", "bdia-float"),
            ("--nonsense", "--nonsense"),
            ("--weights a --layers 3", "cannot be used with"),
            ("generate --top-p 0", "at most 1"),
            ("generate --temperature -1", "found -1"),
            ("eval --gamma 2", "from -1 to 1"),
            ("--steps 10 eval", "eval"),
        ] {
            let message = read(arguments).unwrap_err();
            assert!(message.contains(expected), "{arguments}: {message}");
        }
        assert_eq!(train("--mode bdia-float --gamma 0.3").mode.gamma, 0.3);
        assert_eq!(train("--mode bdia-float --gamma 0").mode.gamma, 0.0);
    }

    #[test]
    fn dimensions() {
        let c = train("--layers 3 --heads 2 --width 48 --context 32 --vocab 61 --dropout 0.1").model.gpt2(0.1).unwrap();
        assert_eq!((c.n_layer, c.n_head, c.n_embd, c.n_positions, c.vocab_size), (3, 2, 48, 32, 61));
        assert_eq!((c.eos_token_id, c.resid_pdrop), (None, 0.1));
        let error = train("--heads 5 --width 48").model.gpt2(0.0).unwrap_err().to_string();
        assert!(error.contains("n_head"), "{error}");
        assert_eq!(train("--config gpt2 --context 256").model.gpt2(0.0).unwrap().n_positions, 1024);
    }

    #[test]
    fn resumed_runs_keep_their_settings() {
        let saved = train("--lr 0.002 --layers 3 --threads 1 --mode checkpoint --memory 1GB");
        let json = serde_json::to_string(&saved).unwrap();
        let saved: TrainArgs = serde_json::from_str(&json).unwrap();
        let run = train("--resume runs/a --threads 2 --device 3 --lr 2e-3 --json").resumed(&saved).unwrap();
        assert_eq!((run.optim.lr, run.model.layers, run.machine.threads), (0.002, Some(3), Some(2)));
        assert_eq!(run.machine.device, 3);
        assert_eq!((run.mode.mode, run.out, run.json), (Mode::Checkpoint, PathBuf::from("runs/a"), true));
        let error = train("--resume runs/a --lr 0.1 --mode bdia --heads 2").resumed(&saved).unwrap_err();
        assert_eq!(error.0.len(), 3);
        let error = error.to_string();
        assert!(error.contains("--lr is 0.1, the run has 0.002"), "{error}");
        assert!(error.contains("--heads is 2, the run has nothing"), "{error}");
    }
}
