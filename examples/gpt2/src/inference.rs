//! `eval`, `generate` and `plan`: everything that does not train.

use std::path::Path;

use bdia_core::backend::Backend;
use bdia_core::plan::Choice;
use bdia_core::{Category, Gamma, Grid, Layout, Sign, stack};
use bdia_train::ranks;
use serde_json::json;

use crate::cli::{self, EvalArgs, GenerateArgs, MachineArgs, PlanArgs};
use crate::config::Gpt2Config;
use crate::data::{Corpus, Part};
use crate::error::Failure;
use crate::machine::{self, Work};
use crate::model::{Gpt2, Inference, Setup};
use crate::report;
use crate::sample::Sampler;
use crate::tokenizer::{EOT, Tokenizer, VOCAB};
use crate::train;

/// A model laid out for inference: a stack in mode `bdia` of one chunk, which both float and grid can use.
fn lay_out(
    config: &Gpt2Config,
    machine: &MachineArgs,
    context: usize,
    batch: usize,
    choice: Option<Choice>,
    frac_bits: u32,
) -> Result<(Gpt2, Layout), Failure> {
    let threads = machine::threads(machine);
    let setup = Setup {
        dims: machine::dims(config),
        batch,
        accumulate: 1,
        context,
        mode: stack::Mode::Bdia,
        grid: Some(Grid::new(frac_bits)?),
        gamma: Gamma::new(0.5, Sign::Plus)?,
        rule: None,
        fused: true,
        verify: false,
        threads,
        library: machine::library(machine, threads),
    };
    let (_, model, layout) = machine::lay_out(&setup, machine.backend, machine.memory, choice)?;
    Ok((model, layout))
}

fn inference(kind: cli::Inference, gamma: f64) -> Result<Inference, Failure> {
    let gamma = Gamma::new(gamma, Sign::Plus)?;
    Ok(match kind {
        cli::Inference::Float => Inference::Float(gamma),
        cli::Inference::Quantized => Inference::Quantized(gamma),
    })
}

fn frac_bits(config: &Gpt2Config, asked: Option<u32>) -> u32 {
    asked.or(config.bdia.map(|b| b.frac_bits)).unwrap_or(14)
}

/// How a model was trained, if the directory is that of a run.
fn run_of(dir: &Path) -> Option<cli::TrainArgs> {
    let bytes = crate::files::read_limited(&dir.join("run.json"), 1 << 20).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The context that it was trained with.
fn trained_context(dir: &Path) -> Option<usize> {
    run_of(dir)?.model.context.map(|c| c as usize)
}

/// Loss and perplexity over sequential windows: of all of `--data`, or of the validation part of what the run was trained
/// with.
///
/// # Errors
/// [`Failure`]
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    struct Eval<'a> {
        args: &'a EvalArgs,
        config: Gpt2Config,
        model: Gpt2,
        part: Part,
        name: String,
    }
    impl Work for Eval<'_> {
        fn on<B: Backend<Real = f32>>(mut self, be: &mut B, _: usize) -> Result<(), Failure> {
            machine::load_weights(&self.args.weights, &self.config, be, &self.model)?;
            let inference = inference(self.args.inference, self.args.gamma.unwrap_or(0.0))?;
            let part = &self.part;
            let Some((loss, tokens)) = train::evaluate(be, &mut self.model, part, usize::MAX, inference)? else {
                return Err(Failure::Other(format!(
                    "{}: {} tokens to evaluate, expected more than a context of {}; use a smaller --context",
                    self.name,
                    part.len(),
                    self.model.setup().context
                )));
            };
            report::tell!("loss {loss:.4}, perplexity {:.2}, over {tokens} tokens of {}", loss.exp(), self.name);
            if self.args.json {
                report::tell!("{}", json!({"loss": loss, "perplexity": loss.exp(), "tokens": tokens}));
            }
            Ok(())
        }
    }
    let config = Gpt2Config::read_dir(&args.weights)?;
    let context =
        args.context.map(|c| c as usize).or_else(|| trained_context(&args.weights)).unwrap_or(config.n_positions);
    let tokenizer = Tokenizer::new();
    let (part, name) = match &args.data {
        Some(path) => (Corpus::whole(path, &tokenizer, config.vocab_size)?, path.display().to_string()),
        None => {
            let trained = run_of(&args.weights).and_then(|r| r.data);
            let corpus = Corpus::open(trained.as_deref(), &tokenizer, config.vocab_size, context)?;
            (corpus.validation, format!("{} (validation part)", corpus.name))
        }
    };
    let windows = part.windows(context).len().max(1);
    let batch = (args.batch as usize).min(windows);
    let (model, layout) = lay_out(&config, &args.machine, context, batch, None, frac_bits(&config, args.frac_bits))?;
    let threads = machine::threads(&args.machine);
    machine::run(&args.machine, threads, &layout, Eval { args, config, model, part, name })
}

/// Text from a model.
///
/// # Errors
/// [`Failure`]
pub fn generate(args: &GenerateArgs) -> Result<(), Failure> {
    struct Generate<'a> {
        args: &'a GenerateArgs,
        config: Gpt2Config,
        model: Gpt2,
    }
    impl Work for Generate<'_> {
        fn on<B: Backend<Real = f32>>(mut self, be: &mut B, _: usize) -> Result<(), Failure> {
            let args = self.args;
            machine::load_weights(&args.weights, &self.config, be, &self.model)?;
            let tokenizer = Tokenizer::new();
            let mut prompt: Vec<i32> = tokenizer.encode(&args.prompt).into_iter().map(|t| t as i32).collect();
            if prompt.is_empty() {
                prompt.push(EOT as i32);
            }
            let sampler = Sampler { temperature: args.temperature, top_k: args.top_k as usize, top_p: args.top_p };
            let inference = inference(args.inference, 0.0)?;
            let tokens =
                train::generate(be, &mut self.model, &prompt, args.tokens as usize, &sampler, args.seed, inference)?;
            let tokens: Vec<u32> = tokens.into_iter().map(|t| t as u32).filter(|&t| t != EOT).collect();
            let text = tokenizer.decode(&tokens);
            report::tell!("{}{text}", args.prompt);
            if args.json {
                report::tell!("{}", json!({"prompt": args.prompt, "text": text, "tokens": tokens}));
            }
            Ok(())
        }
    }
    let config = Gpt2Config::read_dir(&args.weights)?;
    if config.vocab_size != VOCAB {
        return Err(Failure::Other(format!(
            "{}: the vocabulary has {} tokens, expected GPT-2's {VOCAB}: its tokens cannot be shown as text",
            args.weights.display(),
            config.vocab_size
        )));
    }
    let context = trained_context(&args.weights).unwrap_or(config.n_positions);
    let one = Some(Choice { chunk: 1, head_rows: 1 });
    let (model, layout) = lay_out(&config, &args.machine, context, 1, one, frac_bits(&config, None))?;
    let threads = machine::threads(&args.machine);
    machine::run(&args.machine, threads, &layout, Generate { args, config, model })
}

/// The memory table, without training.
///
/// # Errors
/// [`Failure`], among them a budget that cannot be met, with the smallest plan.
pub fn plan(args: &PlanArgs) -> Result<(), Failure> {
    let config = args.model.gpt2(args.dropout)?;
    let context = args.model.context.map_or(config.n_positions, |c| c as usize);
    let threads = machine::threads(&args.machine);
    let kind = args.machine.backend;
    let (layers, ranks) = (config.n_layer, args.ranks as usize);
    let setup = Setup {
        dims: machine::dims(&config),
        batch: ranks::part(args.batch as usize, ranks)?,
        accumulate: args.accumulate as usize,
        context,
        mode: machine::stack_mode(&args.mode, layers),
        grid: machine::grid(&args.mode)?,
        gamma: args.mode.gamma()?,
        rule: Some(args.optim.rule()),
        fused: train::fused(args.optim.clip, args.accumulate),
        verify: args.verify,
        threads,
        library: machine::library(&args.machine, threads),
    };
    let (choice, model, layout) = machine::lay_out_for(ranks, &setup, kind, args.machine.memory, None)?;
    report::tell!(
        "{} parameters, {layers} blocks, width {}, {} sample(s) of {context} tokens{}, {}",
        model.parameters(),
        config.n_embd,
        args.batch,
        if ranks > 1 { format!(" on {ranks} ranks, of which this is one") } else { String::new() },
        if setup.fused { "updates as blocks are finished" } else { "full gradient buffers" },
    );
    let name = |mode: &stack::Mode| match mode {
        stack::Mode::Bdia => "bdia".to_string(),
        stack::Mode::Standard => "standard".to_string(),
        stack::Mode::BdiaFloat => "bdia-float".to_string(),
        stack::Mode::Checkpoint { every } => format!("checkpoint {every}"),
    };
    let mut columns = vec![(format!("{} *", name(&setup.mode)), layout.clone())];
    let every = machine::checkpoint_every(None, layers);
    for mode in [
        stack::Mode::Bdia,
        stack::Mode::Standard,
        stack::Mode::Checkpoint { every },
        stack::Mode::Checkpoint { every: 1 },
    ] {
        if mode == setup.mode || columns.iter().any(|c: &(String, Layout)| c.0 == name(&mode)) {
            continue;
        }
        let grid = if mode == stack::Mode::Bdia { Some(Grid::new(args.mode.frac_bits)?) } else { None };
        let gamma = Gamma::new(0.5, Sign::Random)?;
        let other = Setup { mode, grid, gamma, verify: false, ..setup };
        columns.push((name(&mode), machine::lay_out_for(ranks, &other, kind, None, Some(choice))?.2));
    }
    report::tell!("{}", machine::memory_table(&columns, None).to_string().trim_end());
    report::tell!(
        "* chunks of {} sample(s) inside a block, {} rows of logits at a time",
        choice.chunk,
        choice.head_rows
    );
    if let Some(budget) = args.machine.memory {
        report::tell!("  fits into {}", report::bytes(budget));
    }
    if args.json {
        let categories: serde_json::Map<_, _> =
            Category::ALL.iter().map(|&c| (c.to_string(), json!(layout.bytes(c)))).collect();
        report::tell!(
            "{}",
            json!({
                "plan_bytes": layout.total(),
                "parameters": model.parameters(),
                "chunk": choice.chunk,
                "head_rows": choice.head_rows,
                "fused": setup.fused,
                "bytes": categories,
            })
        );
    }
    Ok(())
}
