//! A GPT-2 assembled from parts and trained with exact reversible backpropagation. The whole
//! program is this file, to be read from top to bottom: data, network, training, text.
//!
//! `bdia-lm` is the program for data and pretrained models of your own.

use std::path::Path;
use std::process::ExitCode;

use bdia_core::arena::{Category, Layout};
use bdia_core::backend::Backend;
use bdia_core::layers::{BlockShape, PreNorm};
use bdia_core::network::{self, Lm, LmShape, Network, Outcome, Step, Training};
use bdia_core::plan::Choice;
use bdia_cpu::Cpu;
use bdia_models::bpe::END;
use bdia_models::gpt2::{config::Gpt2Config, files};
use bdia_models::language::Config as _;
use bdia_models::named::{self, Named, Saved};
use bdia_models::{plan::Plan, sample::Sampler};
use bdia_train::alloc::Counting;
use bdia_train::cli::{Flags, RunFlags, StepArgs, count, given, or_exit};
use bdia_train::licences::Text;
use bdia_train::trainer::{self, Settings, Task, Validation, When};
use bdia_train::{Failure, machine, ranks, run};
use clap::{CommandFactory, FromArgMatches, Parser};
use serde::{Deserialize, Serialize};

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
    #[arg(long, default_value_t = 6, value_parser = count(1000), help_heading = "Model")]
    layers: u64,
    /// Attention heads
    #[arg(long, default_value_t = 4, value_parser = count(1 << 10), help_heading = "Model")]
    heads: u64,
    /// Width: values of a token
    #[arg(long, default_value_t = 32, value_parser = count(1 << 20), help_heading = "Model")]
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
    let own = [("out", "runs/gpt2"), ("batch", "4"), ("lr", "8e-3"), ("steps", "2200")];
    let command = (own.into_iter().chain([("eval_interval", "200"), ("sample", "120")]))
        .fold(Args::command(), |c, (flag, value)| c.mut_arg(flag, |a| a.default_value(value)));
    let matches = command.get_matches();
    let mut args = or_exit(Args::from_arg_matches(&matches));
    args.run.given = given(&matches);
    run::program(|| train(&args))
}

type Done<T = ()> = Result<T, Failure>;

/// The architecture, and how it is trained.
#[derive(Debug, Clone, Copy)]
struct Architecture {
    block: BlockShape,
    layers: usize,
    blocks_per_step: usize,
    ends: LmShape,
    training: Training,
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
        let kept = t.gradients.of_steps(a.blocks_per_step);
        let blocks = PreNorm::layout(&a.block, a.layers, None, t.freeze, kept, l)?;
        let blocks = blocks.step_over(a.blocks_per_step)?;
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

fn train(args: &Args) -> Done {
    ranks::alone("the steps of bdia-gpt2")?;
    let (mut args, from) = run::begin(args)?;
    args.run.check().map_err(Failure::Other)?;
    let text = Text::licences(args.vocab as usize)?;
    args.run.count_passes(text.samples(args.context as usize))?;
    let (run, tokens, layers) = (&args.run, args.context as usize, args.layers as usize);
    let block = BlockShape {
        attention_dropout: run.dropout,
        residual_dropout: run.dropout,
        ..BlockShape::gpt2(tokens, args.width as usize, args.heads as usize, layers)
    };
    let ends = LmShape {
        vocab: text.vocabulary.size(),
        positions: tokens,
        eps: block.eps,
        tied: true,
        dropout: run.dropout,
    };
    let (mode, threads) =
        (machine::mode(&run.mode, layers, run.verify)?, machine::threads(&run.machine));
    let gradients = machine::gradients(&run.optim, run.accumulate);
    let training = Training {
        micro_batches: run.accumulate as usize,
        threads,
        ..Training::new(mode, run.batch as usize, gradients)
    };
    let library = machine::library(&run.machine, threads);
    let blocks_per_step = run.mode.blocks_per_step as usize;
    let a = Architecture { block, layers, blocks_per_step, ends, training, library };

    let (mut net, planned) = trainer::plan::<Net>(run, from.as_ref(), (mode, layers), |mode| {
        Architecture { training: Training { mode, ..training }, ..a }
    })?;
    net.0.head.smoothing = run.smoothing;
    let settings =
        Settings::of_steps(run, "bdia-gpt2", concat!("bdia-gpt2 ", env!("CARGO_PKG_VERSION")));
    let mut config = Gpt2Config::new([ends.vocab, tokens, block.width, block.heads, layers]);
    config.set_dropout(run.dropout);
    config.eos_token_id = Some(END.into());
    config.bdia = Some(run.mode.training()?);
    config.check()?;
    let task = Learner { args: args.clone(), config, net, text, staging: Default::default() };
    trainer::train(args, settings, planned, task, from, None).map(|_| ())
}

struct Learner {
    args: Args,
    config: Gpt2Config,
    net: Net,
    text: Text,
    /// Tokens and targets of a batch.
    staging: [Vec<i32>; 2],
}

impl Task for Learner {
    fn describe(&self) -> String {
        let (a, [n, _], text) = (&self.args, self.parameters(), &self.text);
        let (layers, width, context) = (a.layers, a.width, a.context);
        format!("{n} parameters, {layers} blocks, width {width}, context {context}; {text}")
    }

    fn digest(&self) -> Done<u64> {
        Ok(self.text.digest())
    }

    fn start<B: Backend<Real = f32>>(&mut self, be: &mut B, resumed: bool) -> Done {
        if !resumed {
            let threads = machine::threads(&self.args.run.machine);
            named::initialize(be, &files::tensors(&self.net.0), self.args.run.seed, threads)?;
        }
        Ok(())
    }

    fn record(&self, out: &Path) -> Done {
        self.text.write(out)?;
        Ok(self.config.write_dir(out)?)
    }

    fn parameters(&self) -> [usize; 2] {
        [files::tensors(&self.net.0).iter().map(Named::len).sum(); 2]
    }

    fn saved(&self) -> Vec<Saved> {
        named::saved(&files::tensors(&self.net.0))
    }

    fn prepare(&mut self) {
        let rows = self.net.0.input.tokens.len();
        self.staging = [vec![0; rows], vec![0; rows]];
    }

    fn step<B: Backend<Real = f32>>(&mut self, be: &mut B, step: &Step) -> Done<Outcome> {
        let (context, batch) = (self.args.context as usize, self.args.run.batch as usize);
        let (text, [tokens, targets]) = (&self.text, &mut self.staging);
        network::step(&mut self.net.0, be, step, |lm, be, index| {
            text.batch(step, index * batch, context, tokens, targets);
            Ok(lm.load(be, index, tokens, targets)?)
        })
    }

    fn validate<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        _: When,
    ) -> Done<Option<Validation>> {
        let (lm, context) = (&mut self.net.0, self.args.context as usize);
        self.text
            .validate(context, |tokens, targets| Ok(lm.evaluate(be, tokens, targets)?))
            .map(Some)
    }

    fn save<B: Backend<Real = f32>>(&self, be: &B, path: &Path) -> Done {
        Ok(named::write(path, &files::tensors(&self.net.0), be, str::to_owned)?)
    }

    fn write<B: Backend<Real = f32>>(&self, be: &B, out: &Path) -> Done<&'static str> {
        files::save_tensors(out, be, &files::tensors(&self.net.0))?;
        Ok("model.safetensors, config.json, tokenizer.json, train.bin, validation.bin")
    }

    fn tell<B: Backend<Real = f32>>(&mut self, _: &mut B, out: &Path) -> Done<String> {
        let (vocabulary, tokens) = (&self.text.vocabulary, self.args.run.sample as usize);
        let sampler = Sampler { temperature: 0.5, top_k: 40, top_p: 1.0 };
        let start: Vec<i32> = vocabulary.encode("Permission")?.into_iter().map(i32::from).collect();
        // The file is read as that of any other GPT-2.
        let cpu = |l: &Layout| Ok::<_, Failure>(Cpu::new(l, 1)?);
        let found =
            files::of_directory(out, &[&[END.into()], &*start].concat(), tokens, sampler, cpu)?;
        let all: Vec<u32> = start.into_iter().map(|t| t as u32).chain(found).collect();
        let text = vocabulary.decode(&all)?.replace('\n', "\n  ");
        Ok(if tokens > 0 { format!("\nA sample:\n  {text}\n") } else { String::new() })
    }
}

#[cfg(test)]
mod tests;
