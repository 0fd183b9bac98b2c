//! A GPT-2 assembled from parts and trained with exact reversible backpropagation. The whole
//! program is this file, to be read from top to bottom: data, network, training, text.
//!
//! `bdia-lm` is the program for data and pretrained models of your own.

use core::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use bdia_core::arena::{Category, Layout, Reals};
use bdia_core::backend::Backend;
use bdia_core::layers::{BlockShape, PreNorm};
use bdia_core::network::{self, Lm, LmShape, Network, Outcome, Step, Training};
use bdia_core::plan::Choice;
use bdia_core::rng::{Draw, Stream};
use bdia_cpu::Cpu;
use bdia_models::bpe::{Bpe, END};
use bdia_models::gpt2::config::{Gpt2Config, Size};
use bdia_models::gpt2::decode::{Decoder, Decoding, How, Sizes};
use bdia_models::gpt2::files;
use bdia_models::gpt2::model::{Gpt2, Setup};
use bdia_models::inference::Inference;
use bdia_models::named::{self, Named};
use bdia_models::plan::Plan;
use bdia_models::sample::Sampler;
use bdia_train::alloc::Counting;
use bdia_train::cli::{Flags, RunFlags, StepArgs, count, given, or_exit};
use bdia_train::error::Failure;
use bdia_train::licences::Licences;
use bdia_train::trainer::{self, Planned, Settings, Task, Validation, When, fixed_choice};
use bdia_train::{machine, ranks, run};
use clap::{CommandFactory, FromArgMatches, Parser};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Trains a GPT-2 on the built-in licence texts, with exact reversible backpropagation.
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "bdia-gpt2", version, allow_negative_numbers = true)]
struct Args {
    /// Pieces of the vocabulary, which is learned first
    #[arg(long, default_value_t = 2000, value_parser = count(1 << 16), help_heading = "Model")]
    vocab: u64,
    /// Blocks
    #[arg(long, default_value_t = 12, value_parser = count(1000), help_heading = "Model")]
    layers: u64,
    /// Attention heads
    #[arg(long, default_value_t = 4, value_parser = count(1 << 10), help_heading = "Model")]
    heads: u64,
    /// Width: values of a token
    #[arg(long, default_value_t = 64, value_parser = count(1 << 20), help_heading = "Model")]
    width: u64,
    /// Tokens of a sample
    #[arg(long, default_value_t = 256, value_parser = count(1 << 20), help_heading = "Model")]
    context: u64,
    /// How it is trained.
    #[command(flatten)]
    #[serde(flatten)]
    run: StepArgs,
}

impl Flags for Args {
    fn run(&mut self) -> RunFlags<'_> {
        self.run.run()
    }
}

fn main() -> ExitCode {
    let defaults = [("out", "runs/gpt2"), ("steps", "600"), ("batch", "4"), ("lr", "4e-3")];
    let command = defaults
        .into_iter()
        .fold(Args::command(), |c, (flag, value)| c.mut_arg(flag, |a| a.default_value(value)));
    let matches = command.get_matches();
    let mut args = or_exit(Args::from_arg_matches(&matches));
    args.run.given = given(&matches);
    run::program(|| train(&args))
}

/// The architecture, and how it is trained.
#[derive(Debug, Clone, Copy)]
struct Architecture {
    block: BlockShape,
    layers: usize,
    ends: LmShape,
    training: Training,
    /// Bytes that libraries allocate for themselves.
    library: usize,
}

/// Token and position embedding, blocks of attention and MLP, norm and logits.
struct Net(Lm);

impl Plan for Net {
    type Setup = Architecture;

    fn lay_out<B: Backend>(a: &Architecture, choice: Choice) -> bdia_core::Result<(Self, Layout)> {
        let (mut layout, t) =
            (Layout::new(size_of::<B::Real>()), Training { choice, ..a.training });
        let l = &mut layout;
        let blocks = PreNorm::layout(&a.block, a.layers, None, t.freeze, t.gradients, l)?;
        let lm = Lm::layout::<B>(&a.ends, blocks, &t, l)?;
        l.outside(Category::Library, a.library);
        // Tokens and targets on the host.
        l.outside(Category::Head, 2 * size_of::<i32>() * t.batch * a.block.tokens);
        Ok((Self(lm), layout))
    }

    fn sizes(a: &Architecture) -> [usize; 2] {
        [a.training.batch, a.block.tokens]
    }

    fn exchanged(&self) -> usize {
        network::exchanged(|each| Network::<Cpu>::groups(&self.0, each))
    }
}

fn train(args: &Args) -> Result<(), Failure> {
    ranks::alone("the steps of bdia-gpt2")?;
    let (args, from) = run::begin(args)?;
    args.run.check().map_err(Failure::Other)?;

    // The validation texts are of other families of licences than the training texts.
    let licences = Licences::spdx();
    let [learned, unseen] = [&licences.train, &licences.validation]
        .map(|part| part.iter().map(|t| t.1).collect::<Vec<_>>());
    let vocabulary = Bpe::train(&learned, args.vocab as usize)?;

    let (run, tokens, layers) = (&args.run, args.context as usize, args.layers as usize);
    let block = BlockShape {
        attention_dropout: run.dropout,
        residual_dropout: run.dropout,
        ..BlockShape::gpt2(tokens, args.width as usize, args.heads as usize, layers)
    };
    let ends = LmShape {
        vocab: vocabulary.size(),
        positions: tokens,
        eps: block.eps,
        tied: true,
        dropout: run.dropout,
    };
    let threads = machine::threads(&run.machine);
    let training = Training {
        micro_batches: run.accumulate as usize,
        threads,
        ..Training::new(
            machine::mode(&run.mode, layers, run.verify)?,
            run.batch as usize,
            machine::gradients(&run.optim, run.accumulate),
        )
    };
    let library = machine::library(&run.machine, threads);
    let a = Architecture { block, layers, ends, training, library };

    let (kind, budget) = (run.machine.backend, run.machine.memory);
    let fits = |c: Choice| (1..=training.batch).contains(&c.chunk) && c.head_rows > 0;
    let fixed = fixed_choice(from.as_ref(), run.steps as u32, 1, fits)?;
    let (choice, net, layout) = machine::lay_out::<Net>(&a, kind, 1, budget, fixed)?;
    let plan = |(name, mode)| {
        let other = Architecture { training: Training { mode, ..training }, ..a };
        Ok((name, machine::lay_out::<Net>(&other, kind, 1, None, Some(choice))?.2))
    };
    let others = machine::other_modes(&training.mode, layers)?.into_iter().map(plan);
    let others = others.collect::<Result<_, Failure>>()?;
    let settings =
        Settings::of_steps(run, "bdia-gpt2", concat!("bdia-gpt2 ", env!("CARGO_PKG_VERSION")));
    let task = Learner {
        config: config(&args, vocabulary.size())?,
        net,
        learned: vocabulary.encode_documents(&learned)?,
        unseen: vocabulary.encode_documents(&unseen)?,
        bytes: unseen.iter().map(|t| t.len()).sum(),
        vocabulary,
        staging: [Vec::new(), Vec::new()],
        args: args.clone(),
    };
    trainer::train(args, settings, Planned { choice, layout, others }, task, from, None).map(|_| ())
}

/// The model as its file says it, for whoever reads it.
fn config(args: &Args, vocab: usize) -> Result<Gpt2Config, Failure> {
    let mut config = Gpt2Config::preset(Size::Mini);
    (config.n_layer, config.n_head) = (args.layers as usize, args.heads as usize);
    (config.n_embd, config.n_positions) = (args.width as usize, args.context as usize);
    config.set_vocab(vocab);
    config.set_dropout(args.run.dropout);
    config.bdia = Some(args.run.mode.training()?);
    config.check()?;
    Ok(config)
}

struct Learner {
    args: Args,
    config: Gpt2Config,
    net: Net,
    /// Tokens to learn, tokens to measure on, and the bytes that those stand for.
    learned: Vec<u16>,
    unseen: Vec<u16>,
    bytes: usize,
    vocabulary: Bpe,
    /// Tokens and targets of a batch.
    staging: [Vec<i32>; 2],
}

impl Task for Learner {
    fn describe(&self) -> String {
        let (a, [parameters, _]) = (&self.args, self.parameters());
        format!(
            "{parameters} parameters, {} blocks, width {}, context {}, batch {}; {} training and \
             {} validation tokens of licence texts",
            a.layers,
            a.width,
            a.context,
            a.run.batch,
            self.learned.len(),
            self.unseen.len()
        )
    }

    fn digest(&self) -> Result<u64, Failure> {
        let bytes: Vec<u8> = self.learned.iter().flat_map(|t| t.to_le_bytes()).collect();
        Ok(xxh3_64(&bytes))
    }

    fn start<B: Backend<Real = f32>>(&mut self, be: &mut B, resumed: bool) -> Result<(), Failure> {
        if !resumed {
            let threads = machine::threads(&self.args.run.machine);
            named::initialize(be, &files::tensors(&self.net.0), self.args.run.seed, threads)?;
        }
        Ok(())
    }

    fn record(&self, out: &Path) -> Result<(), Failure> {
        self.vocabulary.write(&out.join("tokenizer.json"))?;
        Ok(self.config.write_dir(out)?)
    }

    fn parameters(&self) -> [usize; 2] {
        [files::tensors(&self.net.0).iter().map(Named::len).sum(); 2]
    }

    fn saved(&self) -> Vec<Reals> {
        named::saved(&files::tensors(&self.net.0))
    }

    fn prepare(&mut self) {
        let rows = self.net.0.input.tokens.len();
        self.staging = [vec![0; rows], vec![0; rows]];
    }

    /// Samples begin anywhere in the text: where follows from seed, step and sample.
    fn step<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        step: &Step,
    ) -> Result<Outcome, Failure> {
        let (context, batch) = (self.args.context as usize, self.args.run.batch as usize);
        let (text, [tokens, targets]) = (&self.learned, &mut self.staging);
        network::step(&mut self.net.0, be, step, |lm, be, index| {
            let samples = tokens.chunks_mut(context).zip(targets.chunks_mut(context));
            for (i, (tokens, targets)) in samples.enumerate() {
                let sample = (index * batch + i) as u32;
                let word = Stream::new(step.seed, step.step, sample, 0, 0, Draw::Data).quad(0)[0];
                let at = word as usize % text.len().saturating_sub(context).max(1);
                fill(&text[at..], tokens, targets);
            }
            Ok(lm.load(be, index, tokens, targets)?)
        })
    }

    fn validate<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        _: When,
    ) -> Result<Option<Validation>, Failure> {
        let (lm, context) = (&mut self.net.0, self.args.context as usize);
        let (mut tokens, mut targets) = (vec![0; context], vec![0; context]);
        let (mut nats, mut count) = (0.0, 0);
        for at in (0..self.unseen.len()).step_by(context) {
            fill(&self.unseen[at..], &mut tokens, &mut targets);
            nats += lm.evaluate(be, &tokens, &targets)?;
            count += targets.iter().filter(|t| **t >= 0).count();
        }
        let (loss, bits) =
            (nats / count as f64, nats / core::f64::consts::LN_2 / self.bytes as f64);
        let text = format!("loss {loss:.4}, {bits:.3} bits per byte, over {count} tokens");
        Ok(Some(Validation { loss, text, ..Validation::default() }))
    }

    fn save<B: Backend<Real = f32>>(&self, be: &B, path: &Path) -> Result<(), Failure> {
        Ok(named::write(path, &files::tensors(&self.net.0), be, str::to_owned)?)
    }

    fn finish<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        out: &Path,
        _: Option<&Validation>,
    ) -> Result<(String, &'static str), Failure> {
        files::save_tensors(out, be, &files::tensors(&self.net.0))?;
        Ok((self.sample(out)?, "model.safetensors, config.json, tokenizer.json"))
    }
}

/// Tokens, and as targets those that follow; behind the end of the text there are none.
fn fill(text: &[u16], tokens: &mut [i32], targets: &mut [i32]) {
    for (i, (token, target)) in tokens.iter_mut().zip(targets).enumerate() {
        *token = text.get(i).map_or(0, |&t| i32::from(t));
        *target = text.get(i + 1).map_or(-1, |&t| i32::from(t));
    }
}

impl Learner {
    /// What the model writes: read from its file as any GPT-2, and decoded with a cache.
    fn sample(&self, out: &Path) -> Result<String, Failure> {
        let (context, tokens) = (self.args.context as usize, self.args.run.sample as usize);
        let setup = Setup::inference(self.config.dims(), context, 1);
        let (model, _) = Gpt2::layout::<Cpu>(&setup, Choice { chunk: 1, head_rows: 1 })?;
        let sizes = Sizes { prompts: 1, beams: 1, context };
        let (decoder, layout) = Decoder::layout::<Cpu>(&model, &sizes)?;
        let mut be = Cpu::new(&layout, 1)?;
        files::load_weights(out, &mut be, &model)?;
        let decoding = Decoding {
            how: How::Sample(Sampler { temperature: 0.8, top_k: 40, top_p: 1.0 }, 1),
            tokens,
            end: Some(END.into()),
            no_repeat: 0,
            inference: Inference::STANDARD,
        };
        let go_on = |_, _| ControlFlow::Continue(());
        let text = decoder.decode(&mut be, &[vec![END.into()]], &decoding, go_on)?;
        let text: Vec<u32> = text.into_iter().flatten().map(|t| t as u32).collect();
        let text = self.vocabulary.decode(&text)?;
        Ok(format!("\nA sample:\n  {}\n", text.trim().replace('\n', "\n  ")))
    }
}

#[cfg(test)]
mod tests;
