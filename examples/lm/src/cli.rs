//! The command line.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::PathBuf;

use bdia_models::config::ConfigError;
use bdia_models::gpt2::config::Gpt2Config;
use bdia_models::language::{Config as _, Family};
use bdia_models::llama::config::{self as llama, LlamaConfig};
use bdia_models::pretrained::AnyConfig;
use bdia_models::tokenizer::{self, Tokenizer};
use bdia_train::Failure;
use bdia_train::cli::*;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::data::{MOST_VOCAB, Order, TokenType};
use crate::pairs::{Format, Kind, LossOn, PairColumns, Reading};
use crate::recipe;

/// The architecture: a named size, and single dimensions in place of its own.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Size of the model
    #[arg(long, value_name = "SIZE", default_value = "mini")]
    pub config: Preset,
    /// Blocks, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(65_000))]
    pub layers: Option<u64>,
    /// Attention heads, in place of the size's; of a Llama, each has its own keys and values then
    #[arg(long, value_name = "N", value_parser = count(1 << 20))]
    pub heads: Option<u64>,
    /// Width, in place of the size's
    #[arg(long, value_name = "N", value_parser = count(1 << 20))]
    pub width: Option<u64>,
    /// Tokens of a sample [default: the positions of the size or of the loaded model; 128 for mini]
    #[arg(long, value_name = "N", value_parser = count(1 << 24))]
    pub context: Option<u64>,
    /// Size of the vocabulary, for token files that are not GPT-2's [default: the tokenizer's]
    #[arg(long, value_name = "N", value_parser = count(MOST_VOCAB))]
    pub vocab: Option<u64>,
}

impl ModelArgs {
    /// The configuration of a fresh model of `vocab` tokens, unless the flags say otherwise. The
    /// positions of the smallest sizes are the context; the others have their own, or the context
    /// where that is longer.
    ///
    /// # Errors
    /// [`ConfigError`] where the dimensions do not fit together.
    pub fn fresh(&self, dropout: f64, vocab: usize) -> Result<AnyConfig, ConfigError> {
        let to = |v: u64| usize::try_from(v).unwrap_or(usize::MAX);
        let or = |given: Option<u64>, own: usize| given.map_or(own, to);
        let vocab = or(self.vocab, vocab);
        let positions = |own: usize| match self.context.map(to) {
            Some(context) if self.config.is_mini() => context,
            Some(context) => own.max(context),
            None => own,
        };
        if let Some(size) = self.config.gpt2() {
            let mut c = Gpt2Config::preset(size);
            c.n_layer = or(self.layers, c.n_layer);
            c.n_head = or(self.heads, c.n_head);
            c.n_embd = or(self.width, c.n_embd);
            c.n_positions = positions(c.n_positions);
            c.set_vocab(vocab);
            c.set_dropout(dropout);
            c.check()?;
            return Ok(AnyConfig::Gpt2(c));
        }
        let size = self.config.llama().unwrap_or(llama::Size::Mini);
        let [width, heads, shared, layers, own] = size.sizes();
        let (width, layers) = (or(self.width, width), or(self.layers, layers));
        let (heads, shared) = self.heads.map_or((heads, shared), |h| (to(h), to(h)));
        let inner = llama::inner(width);
        let mut c = LlamaConfig::new([vocab, positions(own), width, heads, shared, inner, layers])?;
        c.set_dropout(dropout);
        Ok(AnyConfig::Llama(c))
    }
}

/// What special tokens within a text are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpecialTokens {
    /// One token each; <|endoftext|> ends a document, wherever it stands.
    #[default]
    Parse,
    /// Text like any other; on a line of its own it still separates the documents of a text file.
    Text,
}

impl From<SpecialTokens> for tokenizer::SpecialTokens {
    fn from(special: SpecialTokens) -> Self {
        match special {
            SpecialTokens::Parse => Self::Parse,
            SpecialTokens::Text => Self::Text,
        }
    }
}

/// How texts become tokens: by the tokenizer of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Data")]
pub struct TextArgs {
    /// What special tokens such as <|endoftext|> within a text are
    #[arg(long, value_name = "WHAT", default_value = "parse")]
    // Runs of version 0.1 do not say it; what they read otherwise has another digest.
    #[serde(default)]
    pub special_tokens: SpecialTokens,
}

impl TextArgs {
    /// A tokenizer with these settings.
    pub fn of(self, tokenizer: Tokenizer) -> Tokenizer {
        tokenizer.with_special_tokens(self.special_tokens.into())
    }
}

/// How texts become tokens for a model that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
#[command(next_help_heading = "Data")]
pub struct ModelTextArgs {
    /// What special tokens such as <|endoftext|> within a text are [default: what they are in the
    /// model's run, else parse]
    #[arg(long, value_name = "WHAT")]
    pub special_tokens: Option<SpecialTokens>,
}

impl ModelTextArgs {
    /// A tokenizer with these settings; `of_run` is what the model's run says, if there is one.
    pub fn of(self, tokenizer: Tokenizer, of_run: Option<SpecialTokens>) -> Tokenizer {
        let special_tokens = self.special_tokens.or(of_run).unwrap_or(SpecialTokens::Parse);
        TextArgs { special_tokens }.of(tokenizer)
    }
}

/// Where flags are read from, besides.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Run")]
pub struct RecipeArgs {
    /// Flags as a TOML file: names without dashes and their values; those of the command line win
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub recipe: Option<PathBuf>,
}

/// Flags of `train`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct TrainArgs {
    /// Plain UTF-8 text, or a .bin or .npy file of tokens; also as .gz [default: the licence texts
    /// of SPDX, which are built in]
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub data: Option<PathBuf>,
    /// Numbers of a token file, little-endian; any name is then that of a token file [default: what
    /// its header says, else u16]
    #[arg(long, value_name = "TYPE", help_heading = "Data", requires = "data")]
    pub token_type: Option<TokenType>,
    /// How texts become tokens.
    #[command(flatten)]
    #[serde(flatten)]
    pub text: TextArgs,
    /// Which pieces of the text make up a batch
    #[arg(long, default_value = "shuffled", help_heading = "Data")]
    pub order: Order,
    /// Start from a pretrained model: a directory in Hugging Face's layout, a GGUF file, or a name
    /// on Hugging Face
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL", help_heading = "Model")]
    #[arg(conflicts_with_all = ["config", "layers", "heads", "width", "vocab"])]
    pub weights: Option<PathBuf>,
    /// Tokenizer of a model from scratch: a directory with tokenizer.json, or with vocab.json and
    /// merges.txt [default: GPT-2's]
    #[arg(long, value_name = "DIR", help_heading = "Model", conflicts_with = "weights")]
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    /// The architecture.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelArgs,
    /// How it is trained.
    #[command(flatten)]
    #[serde(flatten)]
    pub run: StepArgs,
    /// A recipe.
    #[command(flatten)]
    #[serde(skip)]
    pub recipe: RecipeArgs,
}

impl Flags for TrainArgs {
    const INPUTS: &'static [&'static str] = &["data", "weights", "tokenizer"];

    fn run(&mut self) -> RunFlags<'_> {
        let (weights, tokenizer) = (on_disk(&mut self.weights), &mut self.tokenizer);
        self.run.flags(self.data.iter_mut().chain(weights).chain(tokenizer).collect())
    }
}

/// A model that lies on the disk; the name of one on Hugging Face is no path.
fn on_disk(model: &mut Option<PathBuf>) -> Option<&mut PathBuf> {
    model.as_mut().filter(|path| path.exists())
}

/// What the fine-tuning data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// The E2E challenge: CSV with the columns mr and ref.
    E2e,
    /// Prompts and completions: CSV, TSV or JSONL; also as .gz.
    Pairs,
    /// Conversations: JSONL with a list `messages` of `role` and `content`; also as .gz.
    Chat,
    /// Plain UTF-8 text, or a .bin or .npy file of tokens; also as .gz.
    Text,
}

/// How pairs are read.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Data")]
pub struct PairArgs {
    /// Column of the prompts, of --task pairs [default: prompt]
    #[arg(long, value_name = "NAME")]
    pub prompt_column: Option<String>,
    /// Column of the completions, of --task pairs [default: completion]
    #[arg(long, value_name = "NAME")]
    pub completion_column: Option<String>,
    /// Which tokens of an example are learned [default: completion; of conversations, the
    /// assistant's]
    #[arg(long, value_name = "WHICH")]
    pub loss_on: Option<LossOn>,
    /// What becomes of prompts and completions [default: chat where the model has a template of
    /// conversations]
    #[arg(long, value_name = "FORMAT")]
    #[serde(default)]
    pub format: Option<Format>,
}

/// The tokens of a sample that were asked for, of a model with so many positions.
///
/// # Errors
/// More than the model has.
pub fn context_of(asked: Option<u64>, positions: usize) -> Result<Option<usize>, Failure> {
    match asked {
        Some(n) if n > positions as u64 => Err(Failure::Other(format!(
            "--context {n}: expected at most {positions}, the positions of the model"
        ))),
        asked => Ok(asked.map(|n| n as usize)),
    }
}

/// Refuses packed samples of a family that does not know them.
///
/// # Errors
/// A family that does not.
pub fn check_pack<F: Family>(pack: bool) -> Result<(), Failure> {
    if pack && !F::PACKS {
        return Err(Failure::Other(
            "--pack: expected a model of Llama's family, found a GPT-2; leave the flag out".into(),
        ));
    }
    Ok(())
}

impl PairArgs {
    /// How the examples of a task are read, for a model that has a template of conversations or
    /// none; `None` for text.
    pub fn reading(&self, task: TaskKind, has_template: bool) -> Option<Reading> {
        let or =
            |given: &Option<String>, default: &str| given.clone().unwrap_or_else(|| default.into());
        let kind = match task {
            TaskKind::E2e => Kind::Pairs(PairColumns::e2e()),
            TaskKind::Pairs => Kind::Pairs(PairColumns {
                prompt: or(&self.prompt_column, "prompt"),
                completion: or(&self.completion_column, "completion"),
            }),
            TaskKind::Chat => Kind::Messages,
            TaskKind::Text => return None,
        };
        let own = if has_template { Format::Chat } else { Format::Plain };
        Some(Reading {
            format: if kind == Kind::Messages { Format::Chat } else { self.format.unwrap_or(own) },
            kind,
            loss_on: self.loss_on.unwrap_or(LossOn::Completion),
        })
    }

    fn check(&self, task: TaskKind, token_type: Option<TokenType>) -> Result<(), String> {
        if task != TaskKind::Text && token_type.is_some() {
            return Err("--token-type belongs to --task text; leave it out".into());
        }
        if task != TaskKind::Pairs
            && (self.prompt_column.is_some() || self.completion_column.is_some())
        {
            return Err(
                "--prompt-column and --completion-column belong to --task pairs; leave them out"
                    .into(),
            );
        }
        if matches!(task, TaskKind::Text | TaskKind::Chat) && self.format.is_some() {
            return Err("--format belongs to --task e2e and pairs; leave it out".into());
        }
        if task == TaskKind::Text && self.loss_on.is_some() {
            return Err(
                "--loss-on belongs to tasks of pairs; in text every token is learned".into()
            );
        }
        Ok(())
    }
}

/// Flags of `finetune`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct FinetuneArgs {
    /// What the data is
    #[arg(long, default_value = "e2e", help_heading = "Data")]
    pub task: TaskKind,
    /// What to train on; what `prepare` has written, too
    #[arg(long, value_name = "FILE", help_heading = "Data", required_unless_present = "resume")]
    pub data: Option<PathBuf>,
    /// What to validate on, of the same kind [default: none; of text, a part of --data]
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub validation: Option<PathBuf>,
    /// How pairs are read.
    #[command(flatten)]
    #[serde(flatten)]
    pub pairs: PairArgs,
    /// Numbers of a token file, little-endian; any name is then that of a token file [default: what
    /// its header says, else u16]
    #[arg(long, value_name = "TYPE", help_heading = "Data", requires = "data")]
    pub token_type: Option<TokenType>,
    /// How texts become tokens.
    #[command(flatten)]
    #[serde(flatten)]
    pub text: TextArgs,
    /// The model to start from: a directory in Hugging Face's layout, a GGUF file, or its name on
    /// Hugging Face, such as HuggingFaceTB/SmolLM2-135M-Instruct
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL", help_heading = "Model")]
    #[arg(required_unless_present = "resume")]
    pub weights: Option<PathBuf>,
    /// Tokens of a sample [default: of examples, the longest, with --pack at least 512; of text,
    /// the model's positions; at most those]
    #[arg(long, value_name = "N", value_parser = count(1 << 24), help_heading = "Model")]
    pub context: Option<u64>,
    /// Several examples in a sample, as many as there is room for; none sees another (Llama's
    /// family)
    #[arg(long, help_heading = "Data")]
    #[serde(default)]
    pub pack: bool,
    /// What is trained.
    #[command(flatten)]
    #[serde(flatten)]
    pub method: MethodArgs,
    /// How it is trained.
    #[command(flatten)]
    #[serde(flatten)]
    pub run: StepArgs,
    /// A recipe.
    #[command(flatten)]
    #[serde(skip)]
    pub recipe: RecipeArgs,
    /// Digest of the weights that the run started from.
    #[arg(skip)]
    #[serde(default)]
    pub base: Option<String>,
}

impl Flags for FinetuneArgs {
    const INPUTS: &'static [&'static str] = &["data", "validation", "weights"];

    fn run(&mut self) -> RunFlags<'_> {
        let (data, weights) = (&mut self.data, on_disk(&mut self.weights));
        self.run.flags(data.iter_mut().chain(&mut self.validation).chain(weights).collect())
    }

    fn forget(&mut self) {
        self.base = None;
    }
}

impl FinetuneArgs {
    /// What single flags cannot show to be wrong.
    fn check(&self) -> Result<(), String> {
        // A run that goes on has its own task and method, beside which the flags are compared.
        if self.run.resume.is_none() {
            self.pairs.check(self.task, self.token_type)?;
            self.method.check()?;
            if self.pack && self.task == TaskKind::Text {
                return Err("--pack belongs to tasks of examples; text has no room to fill".into());
            }
        }
        self.run.check()
    }
}

/// Flags of `eval`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct EvalArgs {
    /// The model: a run's directory, one in Hugging Face's layout, a GGUF file, or a name on
    /// Hugging Face; without this flag, the last run without --out
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL")]
    #[arg(default_value = "runs/lm")]
    pub weights: PathBuf,
    /// Adapters of the model: a directory that `finetune --method lora` or PEFT wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// What --data is [default: text]
    #[arg(long, requires = "data")]
    pub task: Option<TaskKind>,
    /// Data of --task, all of it [default: what the run validated on; without a run, a part of the
    /// licence texts]
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// How pairs are read.
    #[command(flatten)]
    pub pairs: PairArgs,
    /// Numbers of a token file, little-endian; any name is then that of a token file [default: what
    /// its header says, else u16]
    #[arg(long, value_name = "TYPE", requires = "data")]
    pub token_type: Option<TokenType>,
    /// How texts become tokens.
    #[command(flatten)]
    pub text: ModelTextArgs,
    /// Tokens of a window [default: of text, the context the model was trained with, or its
    /// positions; of pairs, the longest example, at most the positions]
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
    /// The model: a run's directory, one in Hugging Face's layout, a GGUF file, or a name on
    /// Hugging Face; without this flag, the last run without --out
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL")]
    #[arg(default_value = "runs/lm")]
    pub weights: PathBuf,
    /// Adapters of the model: a directory that `finetune --method lora` or PEFT wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Text to go on from [default: the start of a document]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub prompt: String,
    /// Texts to go on from, one in each line of a UTF-8 file; prints what follows each, line breaks
    /// as spaces
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// Prompts at a time, fewer where memory is short
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count(1 << 20))]
    #[arg(requires = "prompts")]
    pub batch: u64,
    /// Tokens to generate, unless the text ends before
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = count(1 << 20))]
    pub tokens: u64,
    /// Search for the most likely text with this many hypotheses in place of drawing it; 1 takes
    /// the most likely token
    #[arg(long, value_name = "N", value_parser = count(1 << 10))]
    #[arg(conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    pub beams: Option<u64>,
    /// Exponent of the length by which log-probabilities are divided; more favours longer texts
    /// [default: 1]
    #[arg(long, value_name = "A", allow_negative_numbers = true, value_parser = finite)]
    #[arg(requires = "beams")]
    pub length_penalty: Option<f64>,
    /// No N tokens in a row occur twice, prompt included; 0 for no such rule
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = count_or_zero(1 << 20))]
    pub no_repeat_ngram: u64,
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
    /// A constant gamma from -1 to 1 in place of its mean, 0
    #[arg(long, allow_negative_numbers = true, value_parser = signed_gamma)]
    pub gamma: Option<f64>,
    /// The last line of standard output is one JSON object
    #[arg(long)]
    pub json: bool,
    /// How prompts become tokens.
    #[command(flatten)]
    pub text: ModelTextArgs,
    /// Threads, memory, backend.
    #[command(flatten)]
    pub machine: MachineArgs,
}

impl GenerateArgs {
    /// What single flags cannot show to be wrong.
    fn check(&self) -> Result<(), String> {
        let penalized = self.length_penalty.is_some_and(|a| a != 0.0);
        if penalized && self.beams == Some(1) {
            return Err(
                "--length-penalty compares the hypotheses of --beams 2 or more; leave one of \
                 them out"
                    .into(),
            );
        }
        if self.temperature == 0.0 && (self.top_k != 40 || self.top_p != 1.0) {
            return Err(
                "--temperature 0 takes the most likely token, --top-k and --top-p draw among \
                 several"
                    .into(),
            );
        }
        Ok(())
    }
}

/// Flags of `chat`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ChatArgs {
    /// The model: a run's directory, one in Hugging Face's layout, a GGUF file, or a name on
    /// Hugging Face; without this flag, the last run without --out
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL")]
    #[arg(default_value = "runs/lm")]
    pub weights: PathBuf,
    /// Adapters of the model: a directory that `finetune --method lora` or PEFT wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// One message in place of a conversation: the answer is written, and that is all
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = count(1 << 20))]
    pub tokens: u64,
    /// Tokens of the conversation that the model sees [default: 2048, at most its positions]
    #[arg(long, value_name = "N", value_parser = count(1 << 24))]
    pub context: Option<u64>,
    /// Logits are divided by it; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.7, value_parser = not_negative)]
    pub temperature: f64,
    /// Choose among the k most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 40, value_parser = count_or_zero(1 << 20))]
    pub top_k: u64,
    /// Choose among the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = probability)]
    pub top_p: f64,
    /// The answers follow from it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = seed)]
    pub seed: u64,
    /// Threads, memory, backend.
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// How texts are written that are scored: by beam search, with the settings of the E2E challenge's
/// fine-tuned GPT-2.
#[derive(Debug, Clone, Copy, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Decoding")]
pub struct DecodingArgs {
    /// Hypotheses; 1 takes the most likely token
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = count(1 << 10))]
    pub beams: u64,
    /// Exponent of the length by which log-probabilities are divided; more favours longer texts
    #[arg(long, value_name = "A", default_value_t = 0.9, allow_negative_numbers = true)]
    #[arg(value_parser = finite)]
    pub length_penalty: f64,
    /// No N tokens in a row occur twice, prompt included; 0 for no such rule
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = count_or_zero(1 << 20))]
    pub no_repeat_ngram: u64,
    /// Tokens of a text, unless it ends before
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count(1 << 20))]
    pub tokens: u64,
    /// Prompts that are scored, taken at equal distances [default: all]
    #[arg(long, value_name = "N", value_parser = count(1 << 32))]
    pub prompts: Option<u64>,
    /// Prompts at a time, fewer where memory is short
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count(1 << 20))]
    pub prompts_at_once: u64,
}

/// Flags of `score`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ScoreArgs {
    /// The model: a run's directory, one in Hugging Face's layout, a GGUF file, or a name on
    /// Hugging Face
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL")]
    pub weights: PathBuf,
    /// Adapters of the model: a directory that `finetune --method lora` or PEFT wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// What the data is
    #[arg(long, default_value = "e2e")]
    pub task: TaskKind,
    /// Prompts and references; equal prompts are one with several references
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// How pairs are read.
    #[command(flatten)]
    pub pairs: PairArgs,
    /// How texts become tokens.
    #[command(flatten)]
    pub text: ModelTextArgs,
    /// How texts are written.
    #[command(flatten)]
    pub decoding: DecodingArgs,
    /// Write the texts here, one a line
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Arithmetic of the residual stream
    #[arg(long, default_value = "float")]
    pub inference: Inference,
    /// A constant gamma from -1 to 1 in place of its mean, 0
    #[arg(long, allow_negative_numbers = true, value_parser = signed_gamma)]
    pub gamma: Option<f64>,
    /// The last line of standard output is one JSON object
    #[arg(long)]
    pub json: bool,
    /// Threads, memory, backend.
    #[command(flatten)]
    pub machine: MachineArgs,
}

impl ScoreArgs {
    fn check(&self) -> Result<(), String> {
        if self.pairs.loss_on.is_some() {
            return Err(
                "--loss-on says what is learned, and score learns nothing; leave it out".into()
            );
        }
        self.pairs.check(self.task, None)
    }
}

/// The experiments.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Experiment {
    /// All parameters and adapters, with BDIA and without: validation loss, scores, memory, time
    Finetune(Box<FinetuneStudyArgs>),
    /// From scratch on little text: BDIA, the standard transformer, more dropout
    SmallData(Box<SmallDataArgs>),
}

/// Flags of `experiment finetune`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct FinetuneStudyArgs {
    /// Seeds: 1 to N
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count(1000))]
    pub seeds: u64,
    /// Learning rate of the adapters, whose steps are smaller
    #[arg(long, value_name = "X", default_value_t = 2e-3, value_parser = positive)]
    pub lora_lr: f64,
    /// Directory of the experiment; runs that are finished there are not repeated
    #[arg(long, value_name = "DIR", default_value = "runs/finetune-experiment")]
    pub dir: PathBuf,
    /// How texts are written.
    #[command(flatten)]
    pub decoding: DecodingArgs,
    /// Settings of all runs: flags of `finetune`
    #[command(flatten)]
    pub finetune: FinetuneArgs,
}

/// Flags of `experiment small-data`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct SmallDataArgs {
    /// Seeds: 1 to N
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count(1000))]
    pub seeds: u64,
    /// Dropout of the baseline with more of it
    #[arg(long, value_name = "P", default_value_t = 0.2, value_parser = below_one)]
    pub more_dropout: f64,
    /// Directory of the experiment; runs that are finished there are not repeated
    #[arg(long, value_name = "DIR", default_value = "runs/small-data-experiment")]
    pub dir: PathBuf,
    /// Settings of all runs: flags of `train`
    #[command(flatten)]
    pub train: TrainArgs,
}

/// Flags of `merge`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct MergeArgs {
    /// The model that the adapters were trained on: a directory in Hugging Face's layout, a GGUF
    /// file, or a name on Hugging Face
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL")]
    pub weights: PathBuf,
    /// Its adapters: a directory that `finetune --method lora` or PEFT wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Directory of the new model
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace the model that is in --out
    #[arg(long)]
    pub replace: bool,
}

/// How the matrices of a GGUF file are stored; vectors are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StorageKind {
    /// 32 bits.
    #[value(name = "f32")]
    F32,
    /// 16 bits, rounded to nearest.
    #[value(name = "f16")]
    F16,
    /// Blocks of 32 values of 8 bits.
    #[value(name = "q8_0")]
    Q8_0,
}

/// Flags of `export`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ExportArgs {
    /// The model: a run's directory, one in Hugging Face's layout, a GGUF file, or a name on
    /// Hugging Face
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL")]
    pub weights: PathBuf,
    /// Adapters that are merged into it: a directory that `finetune --method lora` or PEFT wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Where it goes: a GGUF file, whose name ends in .gguf, for llama.cpp and its like, or a
    /// directory in Hugging Face's layout
    #[arg(long, value_name = "PLACE")]
    pub out: PathBuf,
    /// How the matrices of a GGUF file are stored
    #[arg(long = "type", value_name = "TYPE", default_value = "f32")]
    pub storage: StorageKind,
    /// Replace what is in --out
    #[arg(long)]
    pub replace: bool,
}

/// Flags of `prepare`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct PrepareArgs {
    /// The model whose tokenizer and template are used: a directory in Hugging Face's layout, a
    /// GGUF file, or a name on Hugging Face
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL")]
    pub weights: PathBuf,
    /// What the data is
    #[arg(long, default_value = "e2e")]
    pub task: TaskKind,
    /// The data
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Where the tokens go, for --data of `finetune` and `eval`: a .safetensors file, of --task
    /// text an .npy file
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Replace --out
    #[arg(long)]
    pub replace: bool,
    /// How pairs are read.
    #[command(flatten)]
    pub pairs: PairArgs,
    /// How texts become tokens.
    #[command(flatten)]
    pub text: TextArgs,
}

/// Flags of `plan`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct PlanArgs {
    /// A pretrained model: a directory in Hugging Face's layout, a GGUF file, or a name on Hugging
    /// Face
    #[arg(long = "model", visible_alias = "weights", value_name = "MODEL", help_heading = "Model")]
    #[arg(conflicts_with_all = ["config", "layers", "heads", "width", "vocab"])]
    pub weights: Option<PathBuf>,
    /// The architecture.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What is trained.
    #[command(flatten)]
    pub method: MethodArgs,
    /// How activations are kept.
    #[command(flatten)]
    pub mode: ModeArgs,
    /// The optimizer.
    #[command(flatten)]
    pub optim: OptimArgs,
    /// Dropout of embeddings, attention and residuals
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = below_one)]
    #[arg(help_heading = "Model")]
    pub dropout: f64,
    /// Samples of a micro-batch
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count(1 << 20))]
    pub batch: u64,
    /// Micro-batches of a step. More than one needs full gradient buffers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1 << 10))]
    pub accumulate: u64,
    /// With the places of several examples in a sample (Llama's family)
    #[arg(long)]
    pub pack: bool,
    /// Ranks that share a micro-batch
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1 << 20))]
    pub ranks: u64,
    /// With the copies of --verify
    #[arg(long)]
    pub verify: bool,
    /// A picture of what fits into --memory: bytes over the tokens of a sample
    #[arg(long, value_name = "FILE", requires = "memory")]
    pub svg: Option<PathBuf>,
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
    /// Train a language model (also what runs without a subcommand)
    Train(Box<TrainArgs>),
    /// Go on training a pretrained model on a task: all of it, or low-rank adapters
    Finetune(Box<FinetuneArgs>),
    /// Data as tokens of a model, which later runs read piece by piece
    Prepare(PrepareArgs),
    /// A model and its adapters as one model
    Merge(MergeArgs),
    /// A model in another format: GGUF, or Hugging Face's
    Export(ExportArgs),
    /// Loss and perplexity of a model
    Eval(EvalArgs),
    /// Text from a model
    Generate(GenerateArgs),
    /// A conversation with a model that has a template for it
    Chat(ChatArgs),
    /// Texts from the prompts of a file and their scores: BLEU, NIST, METEOR, ROUGE-L, CIDEr
    Score(Box<ScoreArgs>),
    /// Many runs and what they show: tables and pictures
    Experiment {
        /// Which one.
        #[command(subcommand)]
        experiment: Experiment,
    },
    /// The memory that training would take, without training
    Plan(Box<PlanArgs>),
}

/// The command line, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Cli {
    /// What to do.
    pub command: Command,
}

/// Language models with exact reversible training: train, fine-tune, evaluate, generate, chat, plan
/// memory.
///
/// Without a subcommand it trains, and the flags of `train` apply.
#[derive(Debug, Parser)]
#[command(
    name = "bdia-lm",
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

/// Fine-tuning has gentler defaults of what training has too.
fn finetune_defaults(command: clap::Command) -> clap::Command {
    let defaults = [
        ("lr", "0.0002"),
        ("weight_decay", "0.01"),
        ("schedule", "linear"),
        ("steps", "1000"),
        ("out", "runs/finetune"),
        ("gamma", "auto"),
        ("gamma_sign", "shared"),
    ];
    defaults
        .into_iter()
        .fold(command, |c, (flag, value)| c.mut_arg(flag, |a| a.default_value(value)))
}

impl Cli {
    /// Reads and checks arguments; the first is the program's name.
    ///
    /// # Errors
    /// What clap says; that includes a request for help or the version.
    pub fn try_parse_from(
        arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, clap::Error> {
        // Every subcommand takes `-3` as a value, so that the value's own check can say what is
        // wrong with it.
        let mut command = Raw::command()
            .mut_subcommands(|s| s.allow_negative_numbers(true))
            .mut_subcommand("finetune", finetune_defaults)
            .mut_subcommand("experiment", |s| {
                s.mut_subcommands(|s| s.allow_negative_numbers(true))
                    .mut_subcommand("finetune", finetune_defaults)
            });
        let arguments = arguments.into_iter().map(Into::into).collect();
        let arguments = recipe::expand(arguments)
            .map_err(|message| command.error(ErrorKind::ValueValidation, message))?;
        let matches = command.try_get_matches_from_mut(arguments)?;
        let raw = Raw::from_arg_matches(&matches)?;
        let sub = matches.subcommand().map(|(_, m)| m);
        let mut parsed = raw.command.unwrap_or_else(|| Command::Train(Box::new(raw.train)));
        let checked = match &mut parsed {
            Command::Train(train) => {
                train.run.given = given(sub.unwrap_or(&matches));
                train.run.check()
            }
            Command::Finetune(finetune) => {
                finetune.run.given = given(sub.unwrap_or(&matches));
                finetune.check()
            }
            Command::Plan(plan) => {
                plan.method.check().and_then(|()| check_mode(&plan.mode, plan.verify))
            }
            Command::Eval(eval) => {
                newest(sub, &mut eval.weights);
                eval.pairs.check(eval.task.unwrap_or(TaskKind::Text), eval.token_type)
            }
            Command::Generate(generate) => {
                newest(sub, &mut generate.weights);
                generate.check()
            }
            Command::Chat(chat) => {
                newest(sub, &mut chat.weights);
                Ok(())
            }
            Command::Score(score) => score.check(),
            Command::Prepare(prepare) => prepare.pairs.check(prepare.task, None),
            Command::Experiment { experiment } => {
                let own =
                    sub.and_then(|m| m.subcommand()).map_or_else(BTreeSet::new, |(_, m)| given(m));
                match experiment {
                    Experiment::Finetune(study) => {
                        study.finetune.run.given = own;
                        study.finetune.check()
                    }
                    Experiment::SmallData(study) => {
                        study.train.run.given = own;
                        study.train.run.check()
                    }
                }
            }
            Command::Merge(_) | Command::Export(_) => Ok(()),
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
        Cli::try_parse_from(core::iter::once("bdia-lm").chain(arguments.split_whitespace()))
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
        assert_eq!(
            (t.run.steps, t.run.optim.weight_decay, t.run.optim.lr, t.run.optim.min_lr()),
            (10, 0.2, 1e-3, 1e-4)
        );
        assert_eq!(
            t.run.given.iter().map(String::as_str).collect::<Vec<_>>(),
            ["steps", "verify", "weight_decay"]
        );
        assert_eq!(
            (t.run.mode.mode, t.run.mode.gamma.clone(), t.run.mode.frac_bits),
            (Mode::Bdia, 0.5.into(), 14)
        );
        assert!(train("").run.given.is_empty());
        assert!(matches!(read("plan --config gpt2-xl --memory 2GB").unwrap(), Command::Plan(_)));
        assert!(matches!(
            read("eval --inference quantized --gamma -0.5").unwrap(),
            Command::Eval(_)
        ));
        assert!(matches!(read("generate --prompt Hello --top-k 0").unwrap(), Command::Generate(_)));
    }

    #[test]
    fn help_shows_everything_with_defaults() {
        for request in ["--help", "train --help"] {
            let help = Cli::try_parse_from(format!("bdia-lm {request}").split(' ')).unwrap_err();
            assert!(!help.use_stderr());
            let help = help.to_string();
            let flags = "data token-type special-tokens weights config layers heads width context \
                 vocab mode \
                 checkpoint-every quantize gamma gamma-sign frac-bits optimizer lr beta1 beta2 \
                 eps weight-decay schedule warmup \
                 min-lr clip steps batch \
                 accumulate dropout seed threads memory eval-interval order backend verify out \
                 json resume \
                 checkpoint-interval";
            for flag in flags.split_whitespace() {
                assert!(help.contains(&format!("--{flag}")), "{request}: {flag}");
            }
            for default in
                ["[default: 130]", "[default: 0.001]", "[default: bdia]", "[default: runs/lm]"]
            {
                assert!(help.contains(default), "{request}: {default}");
            }
        }
        let help = Cli::try_parse_from(["bdia-lm", "-h"]).unwrap_err().to_string();
        assert!(["finetune", "merge", "eval", "generate", "plan"].iter().all(|c| help.contains(c)));
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
            ("generate --beams 4 --temperature 1", "cannot be used with"),
            ("generate --seed 1 --beams 4", "cannot be used with"),
            ("generate --beams 0", "from 1 to 1024"),
            ("generate --length-penalty 0.9", "--beams"),
            ("generate --beams 1 --length-penalty 0.9", "--beams 2 or more"),
            ("generate --beams 4 --length-penalty NaN", "found NaN"),
            ("generate --temperature 0 --top-k 3", "--temperature 0"),
            ("generate --no-repeat-ngram -1", "found -1"),
            ("generate --prompt a --prompts b", "cannot be used with"),
            ("generate --batch 2", "--prompts"),
            ("eval --gamma 2", "from -1 to 1"),
            ("--steps 10 eval", "eval"),
            ("finetune --weights a", "--data"),
            ("finetune --data a", "--model"),
            ("finetune --data a --weights b --model c", "cannot be used multiple times"),
            ("finetune --data a --weights b --lora-alpha 3", "belong to --method lora"),
            ("finetune --data a --weights b --lora-alpha 0", "a number above 0"),
            ("finetune --data a --weights b --lora-rank 0", "from 1 to 65536"),
            ("finetune --data a --weights b --prompt-column x", "belong to --task pairs"),
            (
                "finetune --data a --weights b --task text --loss-on all",
                "belongs to tasks of pairs",
            ),
            ("finetune --data a --weights b --epochs 1 --steps 1", "cannot be used with"),
            ("finetune --data a --weights b --epochs 0", "a number above 0"),
            ("finetune --data a --weights b --gamma 0.3", "--gamma: gamma is 0.3"),
            ("plan --frozen-dtype f16", "belong to --method lora"),
            ("eval --task e2e", "--data"),
            ("eval --task e2e --data a --token-type u32", "belongs to --task text"),
            ("--token-type u24", "i64"),
            ("--token-type u32", "--data"),
            ("generate --special-tokens no", "parse"),
            ("eval --prompt-column x", "belong to --task pairs"),
            ("merge --weights a --adapter b", "--out"),
        ] {
            let message = read(arguments).unwrap_err();
            assert!(message.contains(expected), "{arguments}: {message}");
        }
        assert_eq!(train("--mode bdia-float --gamma 0.3").run.mode.gamma, 0.3.into());
        assert_eq!(train("--mode bdia-float --gamma 0").run.mode.gamma, 0.0.into());
    }

    fn finetune(arguments: &str) -> FinetuneArgs {
        match read(&format!("finetune {arguments}")).unwrap() {
            Command::Finetune(f) => *f,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn fine_tuning_has_defaults_of_its_own() {
        let f = finetune("--data a.csv --weights b --batch 2");
        assert_eq!(
            (f.task, f.method.method, f.method.lora()),
            (TaskKind::E2e, MethodKind::Full, None)
        );
        assert_eq!((f.run.optim.lr, f.run.optim.weight_decay, f.run.steps), (2e-4, 0.01, 1000));
        assert_eq!(
            (f.run.optim.schedule, f.run.out),
            (ScheduleKind::Linear, PathBuf::from("runs/finetune"))
        );
        assert_eq!(
            f.run.given.iter().map(String::as_str).collect::<Vec<_>>(),
            ["batch", "data", "weights"]
        );
        // Those of `train` stay.
        assert_eq!((train("").run.optim.lr, train("train").run.steps), (1e-3, 130));
        let f =
            finetune("--data a --model x/y --method lora --frozen-dtype f16 --lr 1 --epochs 2.5");
        let shape = f.method.lora().unwrap();
        assert_eq!((shape.rank, shape.alpha, shape.scale()), (4, 32.0, 8.0));
        assert_eq!(
            (f.method.frozen_dtype, f.run.optim.lr, f.run.epochs),
            (Some(FrozenKind::F16), 1.0, Some(2.5))
        );
        let columns = |flags: &str| {
            let f = finetune(&format!("--data a --weights b {flags}"));
            f.pairs.reading(f.task, false).map(|r| match r.kind {
                Kind::Pairs(c) => [c.prompt, c.completion],
                Kind::Messages => panic!(),
            })
        };
        let own = |a: &str, b: &str| Some([a.to_string(), b.to_string()]);
        assert_eq!(columns(""), own("mr", "ref"));
        assert_eq!(columns("--task pairs"), own("prompt", "completion"));
        assert_eq!(columns("--task pairs --prompt-column q --completion-column a"), own("q", "a"));
        assert_eq!(columns("--task text"), None);
        // A saved run goes on with what it was started with.
        let saved = finetune("--data a --weights b --method lora --lora-rank 2 --task pairs");
        let saved: FinetuneArgs =
            serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap();
        let run = finetune("--resume runs/a --threads 1 --json").resumed(&saved).unwrap();
        assert_eq!(
            (run.method.lora_rank, run.task, run.run.json),
            (Some(2), TaskKind::Pairs, true)
        );
        let error =
            finetune("--resume runs/a --lora-rank 3").resumed(&saved).unwrap_err().to_string();
        assert!(error.contains("--lora-rank is 3, the run has 2"), "{error}");
        assert!(matches!(
            read("plan --method lora --frozen-dtype bf16").unwrap(),
            Command::Plan(_)
        ));
    }

    #[test]
    fn dimensions() {
        let c = train("--layers 3 --heads 2 --width 48 --context 32 --vocab 61 --dropout 0.1")
            .model
            .fresh(0.1, 50_257)
            .unwrap();
        let AnyConfig::Gpt2(c) = c else { panic!() };
        assert_eq!(
            (c.n_layer, c.n_head, c.n_embd, c.n_positions, c.vocab_size),
            (3, 2, 48, 32, 61)
        );
        assert_eq!((c.eos_token_id, c.resid_pdrop), (None, 0.1));
        let error = train("--heads 5 --width 48").model.fresh(0.0, 50_257).unwrap_err().to_string();
        assert!(error.contains("n_head"), "{error}");
        let positions = |flags: &str| train(flags).model.fresh(0.0, 50_257).unwrap().positions();
        assert_eq!(positions("--config gpt2 --context 256"), 1024);
        assert_eq!(positions("--config llama-mini --context 64"), 64);
        assert_eq!(positions("--config llama-135m"), 8192);
    }

    #[test]
    fn resumed_runs_keep_their_settings() {
        let saved = train("--lr 0.002 --layers 3 --threads 1 --mode checkpoint --memory 1GB");
        let json = serde_json::to_string(&saved).unwrap();
        let saved: TrainArgs = serde_json::from_str(&json).unwrap();
        let run = train("--resume runs/a --threads 2 --device 3 --lr 2e-3 --json")
            .resumed(&saved)
            .unwrap();
        assert_eq!(
            (run.run.optim.lr, run.model.layers, run.run.machine.threads),
            (0.002, Some(3), Some(2))
        );
        assert_eq!(run.run.machine.device, 3);
        assert_eq!(
            (run.run.mode.mode, run.run.out, run.run.json),
            (Mode::Checkpoint, PathBuf::from("runs/a"), true)
        );
        let error =
            train("--resume runs/a --lr 0.1 --mode bdia --heads 2").resumed(&saved).unwrap_err();
        let error = error.to_string();
        assert_eq!(error.matches(", the run has").count(), 3, "{error}");
        assert!(error.contains("--lr is 0.1, the run has 0.002"), "{error}");
        assert!(error.contains("--heads is 2, the run has nothing"), "{error}");
    }
}
