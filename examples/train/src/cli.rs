//! Flags that every training program has, their checks, and what a resumed run may change.

use core::fmt;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bdia_core::Packing;
use bdia_core::layers::{LoraShape, Store};
use bdia_core::optim::{Decay, Rule, Schedule};
use bdia_core::{FloatGamma, Gamma, Grid, Policy, Sign};
use bdia_models::config::{self, Training};
use bdia_models::gpt2::config as gpt2;
use bdia_models::llama::config as llama;
use bdia_models::named::{Adapters, Frozen};
use bdia_models::weights::WeightsError;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, ValueEnum};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::calibrate::Calibration;
use crate::directory;
use crate::error::Failure;

/// How activations are kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Two activations and one bit per value and block; the rest is rebuilt exactly.
    Bdia,
    /// Everything is stored.
    Standard,
    /// The input of every n-th block is stored, the rest recomputed.
    Checkpoint,
    /// The same update without the grid, for any gamma; everything is stored.
    BdiaFloat,
}

impl From<Mode> for config::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Bdia => Self::Bdia,
            Mode::Standard => Self::Standard,
            Mode::Checkpoint => Self::Checkpoint,
            Mode::BdiaFloat => Self::BdiaFloat,
        }
    }
}

/// The sign of γ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GammaSign {
    /// Drawn for every sample and block.
    Random,
    /// Drawn for every sample, the same for all blocks; a last block before a head has no gamma.
    Shared,
    /// Always plus.
    Plus,
    /// Always minus.
    Minus,
}

impl From<GammaSign> for Sign {
    fn from(sign: GammaSign) -> Self {
        match sign {
            GammaSign::Random => Self::Random,
            GammaSign::Shared => Self::Shared,
            GammaSign::Plus => Self::Plus,
            GammaSign::Minus => Self::Minus,
        }
    }
}

impl From<GammaSign> for config::GammaSign {
    fn from(sign: GammaSign) -> Self {
        match sign {
            GammaSign::Random => Self::Random,
            GammaSign::Shared => Self::Shared,
            GammaSign::Plus => Self::Plus,
            GammaSign::Minus => Self::Minus,
        }
    }
}

/// The named sizes of language models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Preset {
    /// GPT-2 of 6 layers, 4 heads, width 128, context 128: trains in minutes on two cores.
    #[value(name = "mini")]
    #[serde(rename = "Mini")]
    Mini,
    /// GPT-2 of 12 layers, 12 heads, width 768 (124M parameters).
    #[value(name = "gpt2")]
    #[serde(rename = "Gpt2")]
    Gpt2,
    /// GPT-2 of 24 layers, 16 heads, width 1024 (355M).
    #[value(name = "gpt2-medium")]
    #[serde(rename = "Medium")]
    Gpt2Medium,
    /// GPT-2 of 36 layers, 20 heads, width 1280 (774M).
    #[value(name = "gpt2-large")]
    #[serde(rename = "Large")]
    Gpt2Large,
    /// GPT-2 of 48 layers, 25 heads, width 1600 (1.5B).
    #[value(name = "gpt2-xl")]
    #[serde(rename = "Xl")]
    Gpt2Xl,
    /// Llama of 8 layers, 4 heads, 2 of keys and values, width 128, context 128: trains in minutes
    /// on two cores.
    #[value(name = "llama-mini")]
    LlamaMini,
    /// Llama of the shape of SmolLM2-135M: 30 layers, 9 heads, 3 of keys and values, width 576.
    #[value(name = "llama-135m")]
    Llama135m,
}

impl Preset {
    /// GPT-2's size, where it is one.
    pub const fn gpt2(self) -> Option<gpt2::Size> {
        match self {
            Self::Mini => Some(gpt2::Size::Mini),
            Self::Gpt2 => Some(gpt2::Size::Gpt2),
            Self::Gpt2Medium => Some(gpt2::Size::Medium),
            Self::Gpt2Large => Some(gpt2::Size::Large),
            Self::Gpt2Xl => Some(gpt2::Size::Xl),
            Self::LlamaMini | Self::Llama135m => None,
        }
    }

    /// Llama's size, where it is one.
    pub const fn llama(self) -> Option<llama::Size> {
        match self {
            Self::LlamaMini => Some(llama::Size::Mini),
            Self::Llama135m => Some(llama::Size::Of135m),
            _ => None,
        }
    }

    /// Whether its positions are the context that is asked for.
    pub const fn is_mini(self) -> bool {
        matches!(self, Self::Mini | Self::LlamaMini)
    }
}

/// The optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    Adamw,
    /// AdamW whose moments are stored in 8 bits (arXiv 2110.02861).
    Adamw8bit,
    /// A second moment by rows and columns, no first one (arXiv 1804.04235); without --beta1 and
    /// --beta2.
    Adafactor,
    /// Adam with a suppressed range of step sizes (arXiv 2302.01029).
    SetAdam,
    /// Gradient descent; beta1 is its momentum.
    Sgd,
}

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Stays.
    Constant,
    /// Falls to the minimum along half a cosine.
    Cosine,
    /// Falls to the minimum along a line.
    Linear,
    /// Falls with the root of the number of steps, as the first transformer's did.
    Noam,
}

/// The backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// Scalar code that is easy to read.
    Reference,
    /// SIMD and threads.
    Cpu,
    /// A CUDA device.
    Cuda,
}

/// The precision of matrix products. Sums, and everything else, are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrecisionKind {
    /// f32 throughout.
    #[default]
    F32,
    /// Factors with 10 bits of fraction, sums in f32; on a CUDA device.
    Tf32,
    /// Factors as bf16, sums and master weights in f32; on the CPU or a CUDA device.
    Bf16,
}

/// The arithmetic of the residual stream without training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Inference {
    /// Plain float: the standard transformer.
    Float,
    /// Residuals rounded to the grid, as in the paper.
    Quantized,
}

/// Where the activations of training live and how many are kept.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Reversibility")]
pub struct ModeArgs {
    /// How activations are kept for the backward pass
    #[arg(long, default_value = "bdia")]
    pub mode: Mode,
    /// Blocks between stored activations, in mode checkpoint [default: the square root of the
    /// layers]
    #[arg(long, value_name = "N", value_parser = count(65_000))]
    pub checkpoint_every: Option<u64>,
    /// Round to the grid in modes standard and checkpoint too
    #[arg(long)]
    pub quantize: bool,
    /// Magnitude of gamma: 0.5, 0.25 … 2^-8 (from 0 to 1 in mode bdia-float), or by optimizer step,
    /// such as 0.0625,1000:0.25; paper is 0.5 with the sign drawn for every sample and block; auto
    /// measures which one a pretrained network bears
    #[arg(long, default_value = "0.5", value_parser = gamma)]
    pub gamma: GammaArg,
    /// Sign of gamma
    #[arg(long, default_value = "random")]
    pub gamma_sign: GammaSign,
    /// The grid is 2^-l: its l
    #[arg(long, value_name = "L", default_value_t = 14, value_parser = frac_bits)]
    pub frac_bits: u32,
    /// Blocks of a step, in mode bdia: side bits are kept once for all of them, and their
    /// intermediates exist together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(65_000))]
    #[serde(default = "one")]
    pub blocks_per_step: u64,
    /// How gamma was measured, where it was.
    #[arg(skip)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
}

impl ModeArgs {
    /// The sign, which belongs to the paper's scheme where that was asked for.
    pub fn sign(&self) -> Sign {
        match self.gamma {
            GammaArg::Paper => Sign::Random,
            _ => self.gamma_sign.into(),
        }
    }

    /// Takes the γ and the grid that were measured.
    pub fn take(&mut self, found: Calibration) {
        self.gamma = found.gamma().into();
        self.frac_bits = found.frac_bits;
        self.calibration = Some(found);
    }

    /// γ of mode `bdia`.
    ///
    /// # Errors
    /// A γ that has no exact inverse, stages that do not follow each other, one that has not been
    /// measured yet.
    pub fn policy(&self) -> bdia_core::Result<Policy> {
        let stages = match &self.gamma {
            GammaArg::Auto => return Err(unmeasured()),
            GammaArg::Paper => return Ok(Policy::PAPER),
            GammaArg::Stages(stages) => stages,
        };
        let planes = |value| Gamma::from_value(value, self.sign()).map(Gamma::planes);
        let stages: Vec<_> = (stages.iter())
            .map(|&(from, value)| Ok((from, planes(value)?)))
            .collect::<bdia_core::Result<_>>()?;
        Policy::scheduled(&stages, self.sign())
    }

    /// γ of mode `bdia-float`.
    ///
    /// # Errors
    /// A γ above 1, or one that changes.
    pub fn float_gamma(&self) -> bdia_core::Result<FloatGamma> {
        match self.gamma.magnitudes()[..] {
            [magnitude] => FloatGamma::new(magnitude, self.sign()),
            [] => Err(bdia_core::Error::unfit("gamma", "auto, which is for mode bdia", "a number")),
            _ => {
                Err(bdia_core::Error::unfit("gamma", "a schedule", "one value, in mode bdia-float"))
            }
        }
    }

    /// What single flags cannot show to be wrong of γ. One that is to be measured is not wrong.
    ///
    /// # Errors
    /// A γ that has no exact inverse, in mode bdia.
    pub fn check_gamma(&self) -> bdia_core::Result<()> {
        match (self.mode, &self.gamma) {
            (Mode::Bdia, GammaArg::Auto) => Ok(()),
            (Mode::Bdia, _) => self.policy().map(|_| ()),
            (Mode::BdiaFloat, _) => self.float_gamma().map(|_| ()),
            _ => Ok(()),
        }
    }

    /// What `config.json` says about the training.
    ///
    /// # Errors
    /// As [`policy`](Self::policy) and [`float_gamma`](Self::float_gamma).
    pub fn training(&self) -> bdia_core::Result<Training> {
        let planes = match self.mode {
            Mode::Bdia => self.policy()?.planes(),
            Mode::BdiaFloat => self.float_gamma().map(|_| 0)?,
            _ => 0,
        };
        let gamma_sign = match self.gamma {
            GammaArg::Paper => GammaSign::Random,
            _ => self.gamma_sign,
        };
        Ok(Training {
            // That of the end: what the network was last trained with.
            gamma: self.gamma.magnitudes().last().copied().unwrap_or(0.0),
            gamma_sign: gamma_sign.into(),
            frac_bits: self.frac_bits,
            mode: self.mode.into(),
            planes: Some(planes),
        })
    }
}

const fn one() -> u64 {
    1
}

const fn unmeasured() -> bdia_core::Error {
    bdia_core::Error::unfit(
        "gamma",
        "auto, without a pretrained network on which this run could measure it",
        "a number",
    )
}

/// The magnitude of γ.
#[derive(Debug, Clone, PartialEq)]
pub enum GammaArg {
    /// To be measured on a pretrained network.
    Auto,
    /// The paper's scheme.
    Paper,
    /// An optimizer step and the magnitude from then on, the first from step 0.
    Stages(Vec<(u32, f64)>),
}

impl From<f64> for GammaArg {
    fn from(magnitude: f64) -> Self {
        Self::Stages(vec![(0, magnitude)])
    }
}

impl GammaArg {
    /// The magnitudes in their order; none where they have not been measured yet.
    pub fn magnitudes(&self) -> Vec<f64> {
        match self {
            Self::Auto => Vec::new(),
            Self::Paper => vec![0.5],
            Self::Stages(stages) => stages.iter().map(|s| s.1).collect(),
        }
    }
}

impl fmt::Display for GammaArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stages = match self {
            Self::Auto => return f.write_str("auto"),
            Self::Paper => return f.write_str("paper"),
            Self::Stages(stages) => stages,
        };
        for (i, (from, magnitude)) in stages.iter().enumerate() {
            if i > 0 {
                write!(f, ",{from}:")?;
            }
            write!(f, "{magnitude}")?;
        }
        Ok(())
    }
}

impl Serialize for GammaArg {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Stages(stages) if stages.len() == 1 => to.serialize_f64(stages[0].1),
            other => to.collect_str(other),
        }
    }
}

impl<'de> Deserialize<'de> for GammaArg {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            One(f64),
            Text(String),
        }
        match Raw::deserialize(from)? {
            Raw::One(magnitude) => Ok(magnitude.into()),
            Raw::Text(text) => gamma(&text).map_err(serde::de::Error::custom),
        }
    }
}

/// The optimizer and its settings.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Optimizer")]
pub struct OptimArgs {
    /// Optimizer
    #[arg(long, default_value = "adamw")]
    pub optimizer: Optimizer,
    /// Learning rate after the warm-up
    #[arg(long, default_value_t = 1e-3, value_parser = not_negative)]
    pub lr: f64,
    /// Decay of the first moment; momentum of sgd
    #[arg(long, default_value_t = 0.9, value_parser = below_one)]
    pub beta1: f64,
    /// Decay of the second moment
    #[arg(long, default_value_t = 0.999, value_parser = below_one)]
    pub beta2: f64,
    /// Keeps denominators from zero [default: 1e-8; set-adam: 1e-18; adafactor: 1e-30]
    #[arg(long, value_parser = positive)]
    pub eps: Option<f64>,
    /// Weight decay of tensors with two or more dimensions
    #[arg(long, default_value_t = 0.1, value_parser = not_negative)]
    pub weight_decay: f64,
    /// Learning rate after the warm-up: how it moves
    #[arg(long, default_value = "cosine")]
    pub schedule: ScheduleKind,
    /// Steps in which the learning rate rises from 0
    #[arg(long, value_name = "STEPS", default_value_t = 20)]
    #[arg(value_parser = count_or_zero(u64::from(u32::MAX)))]
    pub warmup: u64,
    /// Learning rate at the end of schedules cosine and linear [default: a tenth of --lr]
    #[arg(long, value_parser = not_negative)]
    pub min_lr: Option<f64>,
    /// Largest norm of the gradient; 0 for none. Any other value needs full gradient buffers
    #[arg(long, value_name = "NORM", default_value_t = 0.0, value_parser = not_negative)]
    pub clip: f64,
}

impl OptimArgs {
    /// `ε`, with the optimizer's own default.
    pub fn eps(&self) -> f64 {
        self.eps.unwrap_or(match self.optimizer {
            Optimizer::SetAdam => 1e-18,
            Optimizer::Adafactor => 1e-30,
            _ => 1e-8,
        })
    }

    /// The optimizer as the core has it.
    pub fn rule(&self) -> Rule {
        let (beta1, beta2, eps) = (self.beta1, self.beta2, self.eps());
        match self.optimizer {
            Optimizer::Adamw => Rule::AdamW { beta1, beta2, eps },
            Optimizer::SetAdam => Rule::SetAdam { beta1, beta2, eps },
            Optimizer::Adamw8bit => Rule::AdamW8bit { beta1, beta2, eps },
            Optimizer::Adafactor => Rule::Adafactor { decay: 0.8, eps, threshold: 1.0 },
            Optimizer::Sgd => Rule::Sgd { momentum: beta1 },
        }
    }

    /// The schedule of a run of `steps` steps.
    pub fn schedule(&self, steps: u32) -> Schedule {
        Schedule {
            lr: self.lr,
            min_lr: self.min_lr(),
            warmup: self.warmup as u32,
            steps,
            decay: match self.schedule {
                ScheduleKind::Constant => Decay::Constant,
                ScheduleKind::Cosine => Decay::Cosine,
                ScheduleKind::Linear => Decay::Linear,
                ScheduleKind::Noam => Decay::Noam,
            },
        }
    }

    /// What single flags cannot show to be wrong.
    ///
    /// # Errors
    /// A sentence.
    pub fn check(&self) -> Result<(), String> {
        let falls_to_it = matches!(self.schedule, ScheduleKind::Cosine | ScheduleKind::Linear);
        if falls_to_it && self.min_lr() > self.lr {
            return Err(format!(
                "--min-lr is {}, expected at most --lr, which is {}",
                self.min_lr(),
                self.lr
            ));
        }
        Ok(())
    }

    /// The last learning rate.
    pub fn min_lr(&self) -> f64 {
        self.min_lr.unwrap_or(self.lr / 10.0)
    }
}

/// Where the computation happens.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = count(bdia_cpu::Cpu::MAX_THREADS as u64))]
    pub threads: Option<u64>,
    /// Memory that the plan may use, such as 2GB, 512MiB or bytes [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = memory)]
    pub memory: Option<u64>,
    /// Backend
    #[arg(long, default_value = "cpu")]
    pub backend: BackendKind,
    /// Number of the CUDA device
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = count_or_zero(1024))]
    #[serde(default)]
    pub device: u64,
    /// Matrix products
    #[arg(long, default_value = "f32")]
    #[serde(default)]
    pub precision: PrecisionKind,
    /// Of several ranks (mpirun): seconds to wait for another one, which must be able to write a
    /// checkpoint meanwhile
    #[arg(long, value_name = "SECONDS", default_value_t = RANK_TIMEOUT)]
    #[arg(value_parser = count(86_400))]
    #[serde(default = "rank_timeout")]
    pub rank_timeout: u64,
    /// Of several ranks: steps between comparisons of their parameters and optimizer states; each
    /// checkpoint has one too
    #[arg(long, value_name = "N", default_value_t = COMPARE_INTERVAL)]
    #[arg(value_parser = count(u64::from(u32::MAX)))]
    #[serde(default = "compare_interval")]
    pub compare_interval: u64,
}

const RANK_TIMEOUT: u64 = 120;
const COMPARE_INTERVAL: u64 = 100;

const fn rank_timeout() -> u64 {
    RANK_TIMEOUT
}

const fn compare_interval() -> u64 {
    COMPARE_INTERVAL
}

impl MachineArgs {
    /// The defaults, on a backend.
    pub const fn on(backend: BackendKind) -> Self {
        Self {
            threads: None,
            memory: None,
            backend,
            device: 0,
            precision: PrecisionKind::F32,
            rank_timeout: RANK_TIMEOUT,
            compare_interval: COMPARE_INTERVAL,
        }
    }

    /// What single flags cannot show to be wrong.
    ///
    /// # Errors
    /// A sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.backend != BackendKind::Cuda && self.device != 0 {
            return Err("--device is for a CUDA device: add --backend cuda, or leave it out".into());
        }
        match (self.backend, self.precision) {
            (BackendKind::Cuda, _)
            | (_, PrecisionKind::F32)
            | (BackendKind::Cpu, PrecisionKind::Bf16) => Ok(()),
            (BackendKind::Cpu, PrecisionKind::Tf32) => Err(
                "--precision tf32 is for a CUDA device: add --backend cuda, or ask for f32 or bf16"
                    .into(),
            ),
            (BackendKind::Reference, _) => {
                Err("--backend reference computes in f32: leave --precision out".into())
            }
        }
    }
}

/// A resumed run was asked for something else than it was started with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the run cannot be resumed with other settings: {}; leave these flags out, or start a new run \
     with --out",
    .0.join("; ")
)]
pub struct Contradiction(pub Vec<String>);

/// Which of the flags that were given differ between a new command line and a saved run, except
/// those that may (`free`).
///
/// # Errors
/// [`Contradiction`] names them, with both values.
fn contradictions<T: Serialize>(
    given: &BTreeSet<String>,
    new: &T,
    saved: &T,
    free: &[&str],
) -> Result<(), Contradiction> {
    let (new, old) = (settings(new), settings(saved));
    let wrong: Vec<_> = (given.iter())
        .filter(|name| !free.contains(&name.as_str()) && new.get(*name) != old.get(*name))
        .map(|name| {
            let (new, old) = (shown(new.get(name)), shown(old.get(name)));
            format!("--{} is {new}, the run has {old}", name.replace('_', "-"))
        })
        .collect();
    if wrong.is_empty() { Ok(()) } else { Err(Contradiction(wrong)) }
}

/// A value of a setting, as a message shows it.
pub fn shown(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "nothing".to_string(),
        Some(Value::String(s)) => s.clone(),
        Some(other) => other.to_string(),
    }
}

fn settings<T: Serialize>(args: &T) -> Map<String, Value> {
    match serde_json::to_value(args) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// The name of a value of a flag, as it is typed.
pub fn name_of<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// What single flags of the mode cannot show to be wrong.
///
/// # Errors
/// A sentence.
pub fn check_mode(mode: &ModeArgs, verify: bool) -> Result<(), String> {
    mode.check_gamma().map_err(|e| format!("--gamma: {e}"))?;
    if mode.quantize && mode.mode == Mode::BdiaFloat {
        return Err(
            "--quantize contradicts --mode bdia-float, which has no grid; mode bdia always has it"
                .into(),
        );
    }
    if mode.checkpoint_every.is_some() && mode.mode != Mode::Checkpoint {
        return Err(
            "--checkpoint-every belongs to --mode checkpoint; add that or leave it out".into()
        );
    }
    if mode.blocks_per_step > 1 && mode.mode != Mode::Bdia {
        return Err("--blocks-per-step belongs to --mode bdia; add that or leave it out".into());
    }
    if verify && matches!(mode.mode, Mode::Standard | Mode::Checkpoint) {
        return Err(
            "--verify belongs to modes bdia and bdia-float; the others rebuild nothing that could \
             differ"
                .into(),
        );
    }
    Ok(())
}

/// The flags of a run that every program has, wherever they stand among its own.
#[derive(Debug)]
pub struct RunFlags<'a> {
    /// `--seed`
    pub seed: &'a mut u64,
    /// `--checkpoint-interval`
    pub checkpoint_interval: &'a mut u64,
    /// `--resume`
    pub resume: &'a mut Option<PathBuf>,
    /// `--verify`
    pub verify: &'a mut bool,
    /// `--out`
    pub out: &'a mut PathBuf,
    /// `--json`
    pub json: &'a mut bool,
    /// What a run keeps.
    pub saving: &'a mut SavingArgs,
    /// The number of steps, where it follows from a number of passes.
    pub derived: Option<&'a mut u64>,
    /// How activations are kept.
    pub mode: &'a mut ModeArgs,
    /// Threads, memory, backend.
    pub machine: &'a mut MachineArgs,
    /// Names of the flags that the user gave.
    pub given: &'a mut BTreeSet<String>,
    /// Files and directories that the run reads.
    pub inputs: Vec<&'a mut PathBuf>,
}

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MethodKind {
    /// Every parameter.
    #[default]
    Full,
    /// Low-rank adapters of self-attention's queries and values, and of a classifier its head; all
    /// else stays as it is.
    Lora,
}

/// How the parameters of a model that stays as it is are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrozenKind {
    /// 32 bits.
    F32,
    /// Matrices of the blocks, and a language model's embedding and head, in 16 bits, with the
    /// exponents of f32.
    Bf16,
    /// The same matrices in 16 bits, with three more bits of fraction.
    F16,
    /// The same in 8 bits, 32 values with one factor (language models only).
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// The same in 4 bits, 32 values with one factor (language models only).
    #[value(name = "q4_0")]
    #[serde(rename = "q4_0")]
    Q4_0,
    /// The same as the model's file has them, mapped into memory (language models only).
    File,
}

impl FrozenKind {
    /// In what matrices are converted; none for those that stay as they are, in reals or in a file.
    pub const fn packing(self) -> Option<Packing> {
        match self {
            Self::F32 | Self::File => None,
            Self::Bf16 => Some(Packing::Bf16),
            Self::F16 => Some(Packing::F16),
            Self::Q8_0 => Some(Packing::Q8_0),
            Self::Q4_0 => Some(Packing::Q4_0),
        }
    }
}

/// What is trained, and how the rest is stored.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Method")]
pub struct MethodArgs {
    /// What is trained
    #[arg(long, default_value = "full")]
    #[serde(default)]
    pub method: MethodKind,
    /// Rank of the adapters: those of queries and values, in Llama's family of every linear layer
    /// [default: 4]
    #[arg(long, value_name = "R", value_parser = count(1 << 16))]
    pub lora_rank: Option<u64>,
    /// Adapters are multiplied by alpha/rank [default: 32]
    #[arg(long, value_name = "A", value_parser = positive)]
    pub lora_alpha: Option<f64>,
    /// How the parameters that are not trained are stored [default: file for a GGUF file that has
    /// them in fewer bits than f32, else f32]
    #[arg(long, value_name = "TYPE")]
    pub frozen_dtype: Option<FrozenKind>,
}

impl MethodArgs {
    /// Rank and factor of adapters, where those are trained.
    pub fn lora(&self) -> Option<LoraShape> {
        (self.method == MethodKind::Lora).then(|| LoraShape {
            rank: self.lora_rank.unwrap_or(4) as usize,
            alpha: self.lora_alpha.unwrap_or(32.0),
        })
    }

    /// Adapters of blocks whose matrices are in 32 or 16 bits.
    ///
    /// # Errors
    /// A sentence for other storage, which language models have.
    pub fn adapters(&self) -> Result<Option<Adapters>, Failure> {
        let kind = self.frozen_dtype.unwrap_or(FrozenKind::F32);
        if !matches!(kind, FrozenKind::F32 | FrozenKind::Bf16 | FrozenKind::F16) {
            return Err(Failure::Other(
                "--frozen-dtype: expected f32, bf16 or f16, found one that language models have"
                    .into(),
            ));
        }
        let frozen = Frozen { blocks: kind.packing().map(Store::Alike), ends: None };
        Ok(self.lora().map(|shape| Adapters { shape, frozen }))
    }

    /// Checks that adapters have a network to start from, which the run, where its directory is
    /// known, does not overwrite.
    ///
    /// # Errors
    /// A sentence.
    pub fn check_start(&self, weights: Option<&Path>, run: &RunFlags<'_>) -> Result<(), Failure> {
        let is_known = run.given.contains("out") || run.saving.replace || run.resume.is_some();
        let out = run.out.as_path();
        if self.method != MethodKind::Lora {
            return Ok(());
        }
        let Some(weights) = weights else {
            return Err(Failure::Other(
                "--method lora needs --weights (or --model), the network that its adapters are \
                 for; add that, or leave --method out"
                    .into(),
            ));
        };
        let place = |dir: &Path| dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        if is_known && place(weights) == place(out) {
            return Err(Failure::Other(format!(
                "--out is {}, as --weights is: the network that the adapters are for would be \
                 overwritten; name another directory",
                out.display()
            )));
        }
        Ok(())
    }

    /// The error of weights that a network cannot be read from.
    pub fn unreadable(error: WeightsError) -> Failure {
        match error {
            WeightsError::Narrow { .. } => {
                Failure::Other(format!("{error}; use another --frozen-dtype"))
            }
            other => other.into(),
        }
    }

    /// What single flags cannot show to be wrong.
    ///
    /// # Errors
    /// A sentence.
    pub fn check(&self) -> Result<(), String> {
        let lora =
            self.lora_rank.is_some() || self.lora_alpha.is_some() || self.frozen_dtype.is_some();
        if self.method == MethodKind::Full && lora {
            return Err(
                "--lora-rank, --lora-alpha and --frozen-dtype belong to --method lora; add that \
                 or leave them out"
                    .into(),
            );
        }
        Ok(())
    }
}

/// What a run keeps, and whether it may end early.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Run")]
pub struct SavingArgs {
    /// Minutes between checkpoints, beside those of --checkpoint-interval; 0 for none
    #[arg(long, value_name = "N", default_value_t = MINUTES, value_parser = not_negative)]
    #[serde(default = "minutes")]
    pub checkpoint_minutes: f64,
    /// Checkpoints that are kept: the last ones
    #[arg(long, value_name = "N", default_value_t = KEPT, value_parser = count(1 << 20))]
    #[serde(default = "kept")]
    pub keep_checkpoints: u64,
    /// Evaluations in a row without a better one after which the run ends; 0 for no such end
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = count_or_zero(1 << 20))]
    #[serde(default)]
    pub patience: u64,
    /// Replace the run or the model that is in --out, once the new run has something to show
    #[arg(long, conflicts_with = "resume")]
    #[serde(skip)]
    pub replace: bool,
}

const MINUTES: f64 = 10.0;
const KEPT: u64 = 2;

const fn minutes() -> f64 {
    MINUTES
}

const fn kept() -> u64 {
    KEPT
}

/// The flags of a run over data that it sees again and again, whose intervals are epochs.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Run")]
pub struct EpochArgs {
    /// How activations are kept.
    #[command(flatten)]
    #[serde(flatten)]
    pub mode: ModeArgs,
    /// The optimizer.
    #[command(flatten)]
    #[serde(flatten)]
    pub optim: OptimArgs,
    /// Passes over the training data
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = count(1 << 20))]
    pub epochs: u64,
    /// Optimizer steps, in place of --epochs
    #[arg(long, value_name = "N", value_parser = count(u64::from(u32::MAX) - 1))]
    #[arg(conflicts_with = "epochs")]
    pub steps: Option<u64>,
    /// Micro-batches of a step. More than one needs full gradient buffers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1 << 10))]
    pub accumulate: u64,
    /// Everything random follows from it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = seed)]
    pub seed: u64,
    /// Epochs between evaluations; 0 for one at the end
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count_or_zero(1 << 20))]
    pub eval_interval: u64,
    /// Epochs between checkpoints; 0 for one at the end
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = count_or_zero(1 << 20))]
    pub checkpoint_interval: u64,
    /// Continue the run in this directory with its own settings
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out"])]
    pub resume: Option<PathBuf>,
    /// Keep every activation as well and count the rebuilt values that differ
    #[arg(long)]
    pub verify: bool,
    /// Directory of the run's files; without this flag the next number is appended to the default
    #[arg(long, value_name = "DIR", default_value = "runs/latest")]
    pub out: PathBuf,
    /// The last line of standard output is one JSON object
    #[arg(long)]
    pub json: bool,
    /// What the run keeps.
    #[command(flatten)]
    #[serde(flatten)]
    pub saving: SavingArgs,
    /// Threads, memory, backend.
    #[command(flatten)]
    #[serde(flatten)]
    pub machine: MachineArgs,
    /// Names (as in `weight_decay`) of the flags that the user gave.
    #[arg(skip)]
    #[serde(skip)]
    pub given: BTreeSet<String>,
}

impl EpochArgs {
    /// Those that every program has, with the files and directories that the run reads.
    pub fn flags<'a>(&'a mut self, inputs: Vec<&'a mut PathBuf>) -> RunFlags<'a> {
        RunFlags {
            seed: &mut self.seed,
            checkpoint_interval: &mut self.checkpoint_interval,
            resume: &mut self.resume,
            verify: &mut self.verify,
            out: &mut self.out,
            json: &mut self.json,
            saving: &mut self.saving,
            derived: None,
            mode: &mut self.mode,
            machine: &mut self.machine,
            given: &mut self.given,
            inputs,
        }
    }

    /// What single flags cannot show to be wrong.
    ///
    /// # Errors
    /// A sentence.
    pub fn check(&self) -> Result<(), String> {
        check_mode(&self.mode, self.verify)?;
        self.optim.check()
    }
}

/// How a model is trained: the flags of a run that counts steps.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct StepArgs {
    /// Dropout of embeddings, attention and residuals
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = below_one)]
    #[arg(help_heading = "Model")]
    pub dropout: f64,
    /// Label smoothing
    #[arg(
        long,
        value_name = "E",
        default_value_t = 0.0,
        value_parser = below_one,
        help_heading = "Model"
    )]
    #[serde(default)]
    pub smoothing: f64,
    /// Tokens of the text that the model writes at the end; 0 for none
    #[arg(
        long,
        value_name = "N",
        default_value_t = 60,
        value_parser = count_or_zero(1 << 20),
        help_heading = "Run"
    )]
    #[serde(default)]
    pub sample: u64,
    /// How activations are kept.
    #[command(flatten)]
    #[serde(flatten)]
    pub mode: ModeArgs,
    /// The optimizer.
    #[command(flatten)]
    #[serde(flatten)]
    pub optim: OptimArgs,
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 130)]
    #[arg(value_parser = count(u64::from(u32::MAX) - 1), help_heading = "Run")]
    pub steps: u64,
    /// Passes over the training data, in place of --steps
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Run")]
    #[arg(conflicts_with = "steps")]
    #[serde(default)]
    pub epochs: Option<f64>,
    /// Samples of a micro-batch, of all ranks together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count(1 << 20))]
    #[arg(help_heading = "Run")]
    pub batch: u64,
    /// Micro-batches of a step. More than one needs full gradient buffers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1 << 10))]
    #[arg(help_heading = "Run")]
    pub accumulate: u64,
    /// Everything random follows from it
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Run", value_parser = seed)]
    pub seed: u64,
    /// Steps between validations; 0 for one at the end
    #[arg(long, value_name = "N", default_value_t = 50)]
    #[arg(value_parser = count_or_zero(u64::from(u32::MAX)), help_heading = "Run")]
    pub eval_interval: u64,
    /// Steps between checkpoints; 0 for one at the end
    #[arg(long, value_name = "N", default_value_t = 100)]
    #[arg(value_parser = count_or_zero(u64::from(u32::MAX)), help_heading = "Run")]
    pub checkpoint_interval: u64,
    /// Continue the run in this directory with its own settings
    #[arg(long, value_name = "DIR", help_heading = "Run", conflicts_with_all = ["out"])]
    pub resume: Option<PathBuf>,
    /// Keep every activation as well and count the rebuilt values that differ
    #[arg(long, help_heading = "Run")]
    pub verify: bool,
    /// Directory of the run's files; without this flag the next number is appended to the default
    #[arg(long, value_name = "DIR", default_value = "runs/lm", help_heading = "Run")]
    pub out: PathBuf,
    /// The last line of standard output is one JSON object
    #[arg(long, help_heading = "Run")]
    pub json: bool,
    /// What the run keeps.
    #[command(flatten)]
    #[serde(flatten)]
    pub saving: SavingArgs,
    /// Threads, memory, backend.
    #[command(flatten)]
    #[serde(flatten)]
    pub machine: MachineArgs,
    /// Names (as in `weight_decay`) of the flags that the user gave.
    #[arg(skip)]
    #[serde(skip)]
    pub given: BTreeSet<String>,
}

impl StepArgs {
    /// Those that every program has; `inputs` are the files that the run reads.
    pub fn flags<'a>(&'a mut self, inputs: Vec<&'a mut PathBuf>) -> RunFlags<'a> {
        RunFlags {
            seed: &mut self.seed,
            checkpoint_interval: &mut self.checkpoint_interval,
            resume: &mut self.resume,
            verify: &mut self.verify,
            out: &mut self.out,
            json: &mut self.json,
            saving: &mut self.saving,
            derived: self.epochs.is_some().then_some(&mut self.steps),
            mode: &mut self.mode,
            machine: &mut self.machine,
            given: &mut self.given,
            inputs,
        }
    }

    /// What single flags cannot show to be wrong.
    ///
    /// # Errors
    /// A sentence.
    pub fn check(&self) -> Result<(), String> {
        check_mode(&self.mode, self.verify)?;
        self.optim.check()
    }
}

impl StepArgs {
    /// Sets the number of steps where passes over so many samples were asked for.
    ///
    /// # Errors
    /// More steps than can be counted.
    pub fn count_passes(&mut self, samples: f64) -> Result<(), Failure> {
        let Some(epochs) = self.epochs else { return Ok(()) };
        let steps = (epochs * samples / (self.batch * self.accumulate) as f64).ceil().max(1.0);
        if steps >= f64::from(u32::MAX) {
            let most = u32::MAX;
            let what = format!("--epochs {epochs} are {steps} steps, expected less than {most}");
            return Err(Failure::Other(what));
        }
        self.steps = steps as u64;
        Ok(())
    }
}

impl Flags for StepArgs {
    fn run(&mut self) -> RunFlags<'_> {
        self.flags(Vec::new())
    }
}

/// How long a run is; a run may be made longer.
pub const LENGTHS: [&str; 2] = ["steps", "epochs"];

/// The flags of a program's runs.
pub trait Flags: Clone + PartialEq + Serialize + DeserializeOwned {
    /// Flags that may differ from the saved ones when a run is resumed: they change no number.
    const FREE: [&'static str; 11] = [
        "resume",
        "out",
        "json",
        "threads",
        "device",
        "rank_timeout",
        "compare_interval",
        "checkpoint_interval",
        "checkpoint_minutes",
        "keep_checkpoints",
        "verify",
    ];

    /// Names of the flags that say where data is. It may move: what it is stays the same, which is
    /// known from its digest.
    const INPUTS: &'static [&'static str] = &[];

    /// Those that every program has.
    fn run(&mut self) -> RunFlags<'_>;

    /// Takes out what a run finds out itself and saves with its flags.
    fn forget(&mut self) {}

    /// The settings with which a saved run goes on: the saved ones, and those of
    /// [`FREE`](Self::FREE), [`INPUTS`](Self::INPUTS) and [`LENGTHS`] that were given.
    ///
    /// # Errors
    /// [`Contradiction`] names every other flag that was given with another value, and a length
    /// that is smaller than the saved one.
    fn resumed(&self, saved: &Self) -> Result<Self, Failure> {
        let mut new = self.clone();
        let new = new.run();
        let (given, mut map) = (settings(self), settings(saved));
        let is_given = |name: &str| new.given.contains(name);
        for &name in Self::FREE.iter().chain(Self::INPUTS).filter(|name| is_given(name)) {
            if let Some(value) = given.get(name) {
                map.insert(name.into(), value.clone());
            }
        }
        for name in LENGTHS.into_iter().filter(|name| is_given(name)) {
            let number = |value: Option<&Value>| value.and_then(Value::as_f64);
            if number(given.get(name)) >= number(map.get(name)) {
                map.insert(name.into(), given.get(name).cloned().unwrap_or_default());
                // One of the two says how long the run is.
                let other = if name == "steps" { "epochs" } else { "steps" };
                if map.get(other).is_some_and(|_| is_optional(self, other)) {
                    map.insert(other.into(), Value::Null);
                }
            }
        }
        let mut free: Vec<_> = Self::FREE.iter().chain(Self::INPUTS).copied().collect();
        if new.mode.gamma == GammaArg::Auto && map.get("calibration").is_some_and(|c| !c.is_null())
        {
            // It was asked for, and has been measured.
            free.push("gamma");
        }
        let mut out: Self = serde_json::from_value(Value::Object(map))
            .map_err(|e| Failure::Other(e.to_string()))?;
        contradictions(new.given, self, &out, &free)?;
        let run = out.run();
        *run.json = *new.json;
        if let Some(dir) = new.resume {
            run.out.clone_from(dir);
        }
        run.resume.clone_from(new.resume);
        run.given.clone_from(new.given);
        Ok(out)
    }

    /// The settings without those that change no number: what must be the same for two runs to be
    /// the same.
    #[must_use]
    fn comparable(&self) -> Self {
        let mut a = self.clone();
        a.forget();
        let run = a.run();
        (run.machine.threads, run.machine.device, *run.checkpoint_interval) = (None, 0, 0);
        (run.machine.rank_timeout, run.machine.compare_interval) = (RANK_TIMEOUT, COMPARE_INTERVAL);
        (*run.resume, *run.verify, *run.out, *run.json) = (None, false, PathBuf::new(), false);
        (run.saving.checkpoint_minutes, run.saving.keep_checkpoints) = (MINUTES, KEPT);
        run.saving.replace = false;
        if let Some(steps) = run.derived {
            *steps = 0;
        }
        run.given.clear();
        for path in run.inputs {
            // The same place by another path; what is gone keeps the name that it was given.
            *path = std::fs::canonicalize(&*path).unwrap_or_else(|_| path.clone());
        }
        a
    }

    /// [`comparable`](Self::comparable) as it was asked for, before γ was measured.
    #[must_use]
    fn asked(&self) -> Self {
        let mut a = self.comparable();
        let mode = a.run().mode;
        if mode.gamma == GammaArg::Auto || mode.calibration.is_some() {
            (mode.gamma, mode.frac_bits, mode.calibration) = (GammaArg::Auto, 0, None);
        }
        a
    }

    /// The settings by name on which the numbers of a run depend, beside its data and its length.
    fn settings(&self) -> Map<String, Value> {
        let mut map = settings(&self.comparable());
        let others = [Self::FREE.as_slice(), Self::INPUTS, &LENGTHS].concat();
        map.retain(|name, _| !others.contains(&name.as_str()));
        map
    }
}

/// Whether a flag can be left out.
fn is_optional<T: Serialize + DeserializeOwned>(args: &T, name: &str) -> bool {
    let mut map = settings(args);
    map.insert(name.into(), Value::Null);
    serde_json::from_value::<T>(Value::Object(map)).is_ok()
}

/// What clap read; a wrong argument prints what is wrong and ends the process with code 1, a
/// request for help or the version with code 0.
pub fn or_exit<T>(read: Result<T, clap::Error>) -> T {
    read.unwrap_or_else(|error| {
        // Nobody is left to tell if the terminal is gone.
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()))
    })
}

/// Names (as in `weight_decay`) of the flags that the user gave.
pub fn given(matches: &ArgMatches) -> BTreeSet<String> {
    (matches.ids().map(clap::Id::as_str))
        // Groups have ids too, and no source.
        .filter(|id| {
            matches.try_contains_id(id).is_ok()
                && matches.value_source(id) == Some(ValueSource::CommandLine)
        })
        .filter(|id| !id.chars().any(char::is_uppercase))
        .map(str::to_owned)
        .collect()
}

/// Where the model is when nobody has said it: what a run without `--out` left last.
pub fn newest(matches: Option<&ArgMatches>, weights: &mut PathBuf) {
    if !matches.is_some_and(|m| given(m).contains("weights")) {
        *weights = directory::newest(weights);
    }
}

/// Reads a whole number from 1 to `most`.
pub fn count(most: u64) -> impl Fn(&str) -> Result<u64, String> + Clone + Send + Sync + 'static {
    move |s| whole(s, 1, most)
}

/// Reads a whole number from 0 to `most`.
pub fn count_or_zero(
    most: u64,
) -> impl Fn(&str) -> Result<u64, String> + Clone + Send + Sync + 'static {
    move |s| whole(s, 0, most)
}

/// Reads a whole number from `least` to `most`.
///
/// # Errors
/// A sentence, as for all functions here that read a value.
pub fn whole(s: &str, least: u64, most: u64) -> Result<u64, String> {
    match s.trim().parse::<u64>() {
        Ok(n) if (least..=most).contains(&n) => Ok(n),
        _ => Err(format!("expected a whole number from {least} to {most}, found {s}")),
    }
}

/// Reads a seed.
///
/// # Errors
/// A sentence.
pub fn seed(s: &str) -> Result<u64, String> {
    whole(s, 0, u64::MAX)
}

/// Reads a number that `f32` can hold and that `fits`.
///
/// # Errors
/// A sentence.
pub fn real(s: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    match s.trim().parse::<f64>() {
        // Training is in f32, which must be able to hold it.
        Ok(x) if x.is_finite() && x.abs() <= f64::from(f32::MAX) && fits(x) => Ok(x),
        _ => Err(format!("expected {expected}, found {s}")),
    }
}

/// Reads a number of 0 or more.
///
/// # Errors
/// A sentence.
pub fn not_negative(s: &str) -> Result<f64, String> {
    real(s, "a number of 0 or more", |x| x >= 0.0)
}

/// Reads any number but NaN and infinity.
///
/// # Errors
/// A sentence.
pub fn finite(s: &str) -> Result<f64, String> {
    real(s, "a number", |_| true)
}

/// Reads a number above 0.
///
/// # Errors
/// A sentence.
pub fn positive(s: &str) -> Result<f64, String> {
    real(s, "a number above 0", |x| x > 0.0)
}

/// Reads a number from 0 to below 1.
///
/// # Errors
/// A sentence.
pub fn below_one(s: &str) -> Result<f64, String> {
    real(s, "a number from 0 to below 1", |x| (0.0..1.0).contains(&x))
}

/// Reads a number above 0 and at most 1.
///
/// # Errors
/// A sentence.
pub fn probability(s: &str) -> Result<f64, String> {
    real(s, "a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0)
}

/// Reads the magnitude of γ.
///
/// # Errors
/// A sentence.
pub fn gamma(s: &str) -> Result<GammaArg, String> {
    let one = |s: &str| {
        let expected = "a number from 0 to 1 (--gamma-sign has the sign), such numbers by step \
                        as in 0.0625,1000:0.25, paper or auto";
        real(s, expected, |x| (0.0..=1.0).contains(&x))
    };
    match s.trim() {
        "auto" => return Ok(GammaArg::Auto),
        "paper" => return Ok(GammaArg::Paper),
        _ => {}
    }
    let (first, others) = s.split_once(',').unwrap_or((s, ""));
    let mut stages = vec![(0, one(first)?)];
    for stage in others.split(',').filter(|s| !s.is_empty()) {
        let (from, magnitude) = stage
            .split_once(':')
            .ok_or_else(|| format!("expected STEP:MAGNITUDE after the first, found {stage}"))?;
        stages.push((whole(from, 1, u64::from(u32::MAX))? as u32, one(magnitude)?));
    }
    Ok(GammaArg::Stages(stages))
}

/// Reads a γ with its sign.
///
/// # Errors
/// A sentence.
pub fn signed_gamma(s: &str) -> Result<f64, String> {
    real(s, "a number from -1 to 1", |x| (-1.0..=1.0).contains(&x))
}

/// Reads the `l` of a grid.
///
/// # Errors
/// A sentence.
pub fn frac_bits(s: &str) -> Result<u32, String> {
    whole(s, 0, u64::from(Grid::MAX_FRAC_BITS)).map(|l| l as u32)
}

/// A number of bytes: plain, or with a decimal (kB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB)
/// unit.
///
/// # Errors
/// A sentence.
pub fn memory(s: &str) -> Result<u64, String> {
    let wrong =
        || format!("expected a size such as 2GB, 512MiB, 1.5GiB or a number of bytes, found {s}");
    let text = s.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    let bytes = number.parse::<f64>().map_err(|_| wrong())? * factor;
    // 2^53: every whole number up to it is an f64, and no machine has more.
    if !(1.0..=9_007_199_254_740_992.0).contains(&bytes) {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gammas() {
        for (text, expected) in [
            ("auto", GammaArg::Auto),
            ("paper", GammaArg::Paper),
            ("0.25", 0.25.into()),
            ("0.0625,1000:0.25", GammaArg::Stages(vec![(0, 0.0625), (1000, 0.25)])),
        ] {
            let found = gamma(text).unwrap();
            assert_eq!((found.to_string(), &found), (text.to_string(), &expected));
            let json = serde_json::to_string(&found).unwrap();
            assert_eq!(serde_json::from_str::<GammaArg>(&json).unwrap(), expected, "{json}");
        }
        for text in ["", "-0.5", "much", "0.5,0.25", "0.5,x:0.25", "0.5,0:0.25", "0.5,9:"] {
            assert!(gamma(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_in_bytes() {
        for (s, bytes) in [
            ("2GB", 2_000_000_000),
            ("512MiB", 512 << 20),
            ("1.5 gib", 3 << 29),
            ("4096", 4096),
            ("10kB", 10_000),
            ("1TB", 1_000_000_000_000),
        ] {
            assert_eq!(memory(s), Ok(bytes), "{s}");
        }
        for s in ["", "GB", "-1", "1..5GB", "9999999TB", "∞", "0.1"] {
            assert!(memory(s).is_err(), "{s}");
        }
    }
}
