//! What is run ([`Job`]) and what came out of it ([`Record`]): flags in, one line of JSON out, for
//! our engine and for peers alike.

use std::path::PathBuf;

use bdia_core::layers::Patches;
use bdia_models::gpt2::config::Gpt2Config;
use bdia_models::gpt2::config::Size;
use bdia_models::language::Config as _;
use bdia_models::llama::config as llama;
use bdia_models::llama::model::Dims as LlamaDims;
use bdia_models::vit::model::Dims;
use bdia_train::cli::{BackendKind, MachineArgs, Mode, PrecisionKind};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// A model, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Model {
    /// GPT-2, 124M parameters.
    #[value(name = "gpt2")]
    #[serde(rename = "gpt2")]
    Gpt2,
    /// GPT-2, 355M parameters.
    #[value(name = "gpt2-medium")]
    #[serde(rename = "gpt2-medium")]
    Gpt2Medium,
    /// 6 blocks of width 128 with GPT-2's vocabulary.
    Mini,
    /// 3 blocks of width 64 and 512 tokens: runs in milliseconds, also on the reference backend.
    Tiny,
    /// A Llama of SmolLM2-135M's shape: 30 blocks of width 576, 9 heads, 3 of keys and values,
    /// 49152 tokens.
    #[value(name = "llama-135m")]
    #[serde(rename = "llama-135m")]
    Llama135m,
    /// A Llama of 3 blocks of width 64, 4 heads, 2 of keys and values, and 512 tokens.
    LlamaTiny,
    /// The paper's ViT for images of 32×32 and 10 classes: 6 blocks of width 512, 8 heads, MLP 512,
    /// 65 tokens. An image is one sample.
    VitSmall,
}

/// What a job trains.
#[derive(Debug, Clone, PartialEq)]
pub enum Architecture {
    /// A GPT-2.
    Gpt2(Box<Gpt2Config>),
    /// A Llama.
    Llama(Box<LlamaDims>),
    /// A vision transformer.
    Vit(Dims),
}

impl Architecture {
    /// Blocks.
    pub fn layers(&self) -> usize {
        match self {
            Self::Gpt2(c) => c.n_layer,
            Self::Llama(d) => d.layers,
            Self::Vit(d) => d.layers,
        }
    }

    /// Words, or classes.
    pub fn vocab(&self) -> usize {
        match self {
            Self::Gpt2(c) => c.vocab_size,
            Self::Llama(d) => d.vocab,
            Self::Vit(d) => d.classes,
        }
    }
}

impl Model {
    /// The architecture; dropout as asked for.
    pub fn architecture(self, job: &Job) -> Architecture {
        let mut c = match self {
            Self::Gpt2 => Gpt2Config::preset(Size::Gpt2),
            Self::Gpt2Medium => Gpt2Config::preset(Size::Medium),
            Self::Mini => Gpt2Config::preset(Size::Mini),
            Self::Tiny => Gpt2Config {
                n_layer: 3,
                n_embd: 64,
                n_positions: 64,
                ..Gpt2Config::preset(Size::Mini)
            },
            Self::Llama135m => return Self::llama(job, llama::Size::Of135m.sizes(), 49_152),
            Self::LlamaTiny => return Self::llama(job, [64, 4, 2, 3, 64], 512),
            Self::VitSmall => {
                return Architecture::Vit(Dims {
                    patches: Patches {
                        channels: 3,
                        height: 32,
                        width: 32,
                        patch: 4,
                        shifted: true,
                    },
                    classes: job.vocab.unwrap_or(10),
                    width: 512,
                    layers: job.layers.unwrap_or(6),
                    heads: 8,
                    inner: 512,
                    eps: 1e-5,
                    locality: true,
                    dropout: [job.dropout; 4],
                    two_streams: false,
                });
            }
        };
        if self == Self::Tiny {
            c.set_vocab(512);
        }
        if let Some(vocab) = job.vocab {
            c.set_vocab(vocab);
        }
        c.set_dropout(job.dropout);
        c.n_layer = job.layers.unwrap_or(c.n_layer);
        c.n_positions = c.n_positions.max(job.context(c.n_positions));
        Architecture::Gpt2(Box::new(c))
    }

    /// A Llama of this width, heads, heads of keys and values, layers and positions.
    fn llama(
        job: &Job,
        [width, heads, kv_heads, layers, positions]: [usize; 5],
        vocab: usize,
    ) -> Architecture {
        let positions = positions.max(job.context(positions));
        let (vocab, layers) = (job.vocab.unwrap_or(vocab), job.layers.unwrap_or(layers));
        let inner = llama::inner(width);
        let sizes = [vocab, positions, width, heads, kv_heads, inner, layers];
        Architecture::Llama(Box::new(LlamaDims { dropout: job.dropout, ..LlamaDims::plain(sizes) }))
    }

    /// The batch and the context that it is measured with, unless a job says otherwise.
    pub const fn usual(self) -> (usize, usize) {
        match self {
            Self::Gpt2 | Self::Gpt2Medium | Self::Llama135m => (4, 256),
            Self::Mini => (8, 128),
            Self::Tiny | Self::LlamaTiny => (4, 32),
            Self::VitSmall => (128, 65),
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2",
            Self::Gpt2Medium => "gpt2-medium",
            Self::Mini => "mini",
            Self::Tiny => "tiny",
            Self::Llama135m => "llama-135m",
            Self::LlamaTiny => "llama-tiny",
            Self::VitSmall => "vit-small",
        }
    }

    /// What its speed counts.
    pub const fn unit(self) -> &'static str {
        if matches!(self, Self::VitSmall) { "images" } else { "tokens" }
    }
}

/// One run of our engine: the flags of `bdia-bench run`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Job {
    /// The model
    #[arg(long, value_enum, default_value = "gpt2")]
    pub model: Model,
    /// How activations are kept
    #[arg(long, value_enum, default_value = "bdia")]
    pub mode: Mode,
    /// Blocks between stored activations (mode checkpoint) [default: the square root of the number
    /// of blocks]
    #[arg(long)]
    pub checkpoint_every: Option<u64>,
    /// Backend
    #[arg(long, value_enum, default_value = "cpu")]
    pub backend: BackendKind,
    /// Number of the CUDA device
    #[arg(long, default_value_t = 0)]
    pub device: u64,
    /// Precision of matrix products
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: PrecisionKind,
    /// Samples [default: the model's]
    #[arg(long)]
    pub batch: Option<usize>,
    /// Tokens of a sample; of an image always 65 [default: the model's]
    #[arg(long)]
    pub context: Option<usize>,
    /// Blocks, in place of the model's
    #[arg(long)]
    pub layers: Option<usize>,
    /// Vocabulary, or classes, in place of the model's
    #[arg(long)]
    pub vocab: Option<usize>,
    /// Threads
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Optimizer steps
    #[arg(long, default_value_t = 5)]
    pub steps: usize,
    /// Steps at the start that do not count in the rate
    #[arg(long, default_value_t = 1)]
    pub warmup: usize,
    /// Dropout at all places of the architecture
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
    /// Seed of parameters, data and signs
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Start from the parameters in this directory (`bdia-bench init`)
    #[arg(long)]
    pub weights: Option<PathBuf>,
    /// Keep all activations as well, and count values that were rebuilt differently
    #[arg(long)]
    pub verify: bool,
}

impl Job {
    /// A job with the model's usual size.
    pub fn new(model: Model, mode: Mode) -> Self {
        Self {
            model,
            mode,
            checkpoint_every: None,
            backend: BackendKind::Cpu,
            device: 0,
            precision: PrecisionKind::F32,
            batch: None,
            context: None,
            layers: None,
            vocab: None,
            threads: 2,
            steps: 5,
            warmup: 1,
            dropout: 0.0,
            seed: 1,
            weights: None,
            verify: false,
        }
    }

    /// The machine that the job asks for.
    pub const fn machine(&self) -> MachineArgs {
        MachineArgs {
            device: self.device,
            precision: self.precision,
            ..MachineArgs::on(self.backend)
        }
    }

    /// Samples.
    pub fn batch(&self) -> usize {
        self.batch.unwrap_or(self.model.usual().0)
    }

    fn context(&self, positions: usize) -> usize {
        let given = self.context.filter(|_| self.model != Model::VitSmall);
        given.unwrap_or(self.model.usual().1.min(positions))
    }

    /// Tokens of a sample.
    pub fn tokens(&self) -> usize {
        self.context(usize::MAX)
    }

    /// Tokens or images of a step.
    pub fn items(&self) -> usize {
        self.batch() * if self.model.unit() == "images" { 1 } else { self.tokens() }
    }

    /// Blocks of a segment in mode checkpoint.
    pub fn every(&self) -> usize {
        bdia_train::machine::checkpoint_every(
            self.checkpoint_every,
            self.model.architecture(self).layers(),
        )
    }

    /// The mode, with its segment length.
    pub fn mode_name(&self) -> String {
        match self.mode {
            Mode::Bdia => "bdia".into(),
            Mode::Standard => "standard".into(),
            Mode::Checkpoint => format!("checkpoint {}", self.every()),
            Mode::BdiaFloat => "bdia-float".into(),
        }
    }

    /// The same as flags.
    pub fn flags(&self) -> Vec<String> {
        let name = |v: Option<clap::builder::PossibleValue>| {
            v.map_or(String::new(), |v| v.get_name().to_string())
        };
        let mut flags = Vec::new();
        let mut put = |flag: &str, value: String| flags.extend([format!("--{flag}"), value]);
        put("model", name(self.model.to_possible_value()));
        put("mode", name(self.mode.to_possible_value()));
        put("backend", name(self.backend.to_possible_value()));
        put("device", self.device.to_string());
        put("precision", name(self.precision.to_possible_value()));
        put("batch", self.batch().to_string());
        put("context", self.tokens().to_string());
        put("threads", self.threads.to_string());
        put("steps", self.steps.to_string());
        put("warmup", self.warmup.to_string());
        put("dropout", self.dropout.to_string());
        put("seed", self.seed.to_string());
        if let Some(every) = self.checkpoint_every {
            put("checkpoint-every", every.to_string());
        }
        if let Some(layers) = self.layers {
            put("layers", layers.to_string());
        }
        if let Some(vocab) = self.vocab {
            put("vocab", vocab.to_string());
        }
        if let Some(dir) = &self.weights {
            put("weights", dir.display().to_string());
        }
        if self.verify {
            flags.push("--verify".into());
        }
        flags
    }
}

/// Bytes of one part of a run's memory: as planned and as found in the process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// What it is.
    pub name: String,
    /// By the plan.
    pub plan: u64,
    /// Pages that are there after the last step, or what the allocator counted at its peak.
    pub measured: u64,
}

/// What a run gives, one line of JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// `bdia` or the name of the peer.
    pub engine: String,
    /// Backend of our engine.
    #[serde(default)]
    pub backend: String,
    /// Name of the model.
    pub model: String,
    /// Mode of the engine.
    pub mode: String,
    /// `f32`, or `bf16` for autocast.
    pub precision: String,
    /// Samples.
    pub batch: usize,
    /// Tokens of a sample.
    pub context: usize,
    /// Blocks, where they are not the model's.
    #[serde(default)]
    pub layers: Option<usize>,
    /// `tokens` or `images`.
    pub unit: String,
    /// Threads.
    pub threads: usize,
    /// Dropout.
    pub dropout: f64,
    /// Steps at the start that do not count.
    pub warmup: usize,
    /// Seconds of every step.
    pub seconds: Vec<f64>,
    /// Items per second: by the median of the steps that count.
    pub items_per_s: f64,
    /// Most physical memory of the process, bytes.
    pub peak_rss: u64,
    /// Physical memory before the model was made, bytes.
    pub base_rss: u64,
    /// Number of parameters.
    pub parameters: u64,
    /// Loss of every step.
    pub losses: Vec<f64>,
    /// Values that were rebuilt differently, where they were counted.
    pub mismatches: Option<u64>,
    /// Version of the engine.
    pub version: String,
    /// Samples of a chunk and rows of logits that the plan chose.
    #[serde(default)]
    pub choice: Option<(usize, usize)>,
    /// The plan, category by category.
    #[serde(default)]
    pub plan: Vec<(String, u64)>,
    /// Plan beside what was found.
    #[serde(default)]
    pub parts: Vec<Part>,
    /// On a CUDA device: kernels, products and copies of one more step, how many of each, and their
    /// seconds.
    #[serde(default)]
    pub times: Vec<(String, usize, f64)>,
    /// That step from its first kernel to the end of its last.
    #[serde(default)]
    pub seconds_on_device: f64,
}

impl Record {
    /// Median seconds of the steps that count.
    pub fn seconds_per_step(&self) -> f64 {
        median(&self.seconds[self.warmup.min(self.seconds.len().saturating_sub(1))..])
    }

    /// The fastest and the slowest of the steps that count, seconds.
    pub fn spread(&self) -> (f64, f64) {
        let counted = &self.seconds[self.warmup.min(self.seconds.len().saturating_sub(1))..];
        counted.iter().fold((f64::MAX, 0.0_f64), |(a, b), &s| (a.min(s), b.max(s)))
    }

    /// Bytes of a category of the plan.
    pub fn planned(&self, category: &str) -> u64 {
        self.plan.iter().filter(|(name, _)| name == category).map(|(_, bytes)| bytes).sum()
    }
}

/// The middle value, 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    if n == 0 { 0.0 } else { f64::midpoint(sorted[(n - 1) / 2], sorted[n / 2]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        job: Job,
    }

    #[test]
    fn flags_say_the_same_job() {
        let mut job = Job::new(Model::VitSmall, Mode::Checkpoint);
        (job.layers, job.verify, job.dropout, job.weights) =
            (Some(3), true, 0.1, Some("a b".into()));
        (job.checkpoint_every, job.batch, job.context) = (Some(2), Some(7), Some(65));
        job.vocab = Some(11);
        (job.backend, job.device, job.precision) = (BackendKind::Cuda, 1, PrecisionKind::Bf16);
        let line = core::iter::once("run".to_string()).chain(job.flags());
        assert_eq!(Line::parse_from(line).job, job);
    }

    /// Names on the command line, in records and in tables are the same.
    #[test]
    fn names_of_models() {
        for &model in Model::value_variants() {
            let name = model.to_possible_value().map(|v| v.get_name().to_string());
            assert_eq!(name.as_deref(), Some(model.name()));
            assert_eq!(serde_json::to_value(model).unwrap(), model.name());
        }
    }

    #[test]
    fn medians() {
        assert_eq!(
            (median(&[]), median(&[3.0]), median(&[4.0, 1.0, 2.0]), median(&[1.0, 2.0])),
            (0.0, 3.0, 2.0, 1.5)
        );
    }
}
