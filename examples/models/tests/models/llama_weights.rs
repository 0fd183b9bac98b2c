//! Real weights: SmolLM2-135M-Instruct and Gemma 3 270M in their GGUF files, against transformers
//! (`tests/torch/real_weights.py` says where the files come from). `BDIA_SMOLLM2` and `BDIA_GEMMA3`
//! name them.

use core::ops::ControlFlow;

use crate::common::{ADAMW, State, state};
use bdia_core::layers::{Gradients, LoraShape};
use bdia_core::network::Step;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::update::{Gamma, Grid, Policy, Sign};
use bdia_core::{Error, Layout};
use bdia_cpu::Cpu;
use bdia_models::inference::Inference;
use bdia_models::language::decode::{Decoder, Decoding, How, Sizes};
use bdia_models::language::files::read;
use bdia_models::language::frozen;
use bdia_models::llama::gguf::{GgufModel, open};
use bdia_models::llama::model::{Dims, Llama, Setup};
use bdia_models::named::Adapters;
use bdia_models::search::Length;

const THREADS: usize = 2;

/// A model: the variable that names its file, what transformers computes, and `l` of a grid that
/// holds its activations.
struct Real {
    variable: &'static str,
    expected: &'static str,
    frac_bits: u32,
}

const SMOLLM2: Real =
    Real { variable: "BDIA_SMOLLM2", expected: "llama/smollm2.safetensors", frac_bits: 12 };
const GEMMA3: Real =
    Real { variable: "BDIA_GEMMA3", expected: "llama/gemma3_270m.safetensors", frac_bits: 10 };

impl Real {
    /// The dimensions and the file, where there is one, and what is expected.
    fn open(&self) -> Option<(Dims, GgufModel, State)> {
        let Some(path) = std::env::var_os(self.variable) else {
            eprintln!("skipped: {} does not name the model's GGUF file", self.variable);
            return None;
        };
        let (config, file) = open(path.as_ref()).unwrap();
        Some((config.dims, file, state(self.expected)))
    }
}

fn setup(dims: Dims, context: usize) -> Setup {
    Setup { library: Cpu::library_bytes(THREADS), ..Setup::inference(dims, context, THREADS) }
}

fn lay_out(setup: &Setup) -> (Llama, Layout) {
    Llama::layout::<Cpu>(setup, Choice::new(1, 32)).unwrap()
}

#[test]
fn smollm2_computes_what_transformers_does() {
    computes_what_transformers_does(&SMOLLM2);
}

#[test]
fn gemma3_computes_what_transformers_does() {
    computes_what_transformers_does(&GEMMA3);
}

/// Loss, logits and greedy tokens.
fn computes_what_transformers_does(real: &Real) {
    let Some((dims, file, s)) = real.open() else { return };
    let tokens = &s.ints["tokens"];
    let (mut model, layout) = lay_out(&setup(dims, tokens.len()));
    let mut be = Cpu::new(&layout, THREADS).unwrap();
    read(&file, &mut be, &model).unwrap();
    let last = tokens.len() - 1;
    let found = model.logits(&mut be, tokens, last..last + 1, Inference::STANDARD).unwrap();
    let found: Vec<f64> = found.into_iter().step_by(16).map(f64::from).collect();
    let distance = crate::common::difference(&found, &s.reals["logits"], 1.0);
    // f32 against f64, through all blocks.
    assert!(distance < 2e-4, "{distance:e}");
    let mut targets = tokens[1..].to_vec();
    targets.push(-1);
    let (loss, n) = model.evaluate(&mut be, tokens, &targets, Inference::STANDARD).unwrap();
    let loss = loss / n as f64;
    assert!((loss - s.reals["loss"][0]).abs() < 1e-4, "{loss}");

    let (model, _) = lay_out(&setup(dims, 64));
    let sizes = Sizes { prompts: 1, beams: 1, context: 64 };
    let (decoder, layout) = Decoder::layout::<Cpu>(&model, &sizes).unwrap();
    let mut be = Cpu::new(&layout, THREADS).unwrap();
    read(&file, &mut be, &model).unwrap();
    let decoding = Decoding {
        how: How::Search(Length::Power(1.0)),
        tokens: 24,
        ends: Vec::new(),
        no_repeat: 0,
        inference: Inference::STANDARD,
    };
    let prompts = [s.ints["prompt"].clone()];
    let found =
        decoder.decode(&mut be, &prompts, &decoding, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(found[0], s.ints["greedy"][prompts[0].len()..]);
}

#[test]
fn smollm2_is_trained_exactly() {
    training_is_exact(&SMOLLM2);
}

#[test]
fn gemma3_is_trained_exactly() {
    training_is_exact(&GEMMA3);
}

/// Steps of training on the text: every rebuilt value is exact, and a small γ begins where the
/// network is.
fn training_is_exact(real: &Real) {
    let Some((dims, file, s)) = real.open() else { return };
    let tokens = &s.ints["tokens"];
    let lora = Adapters::new(LoraShape { rank: 4, alpha: 8.0 });
    let in_the_file = Adapters { frozen: frozen::as_stored(&dims, &file, true).unwrap(), ..lora };
    for (m, sign, blocks_per_step, adapters, near) in [
        (1, Sign::Random, 1, Some(lora), false),
        (4, Sign::Shared, 2, Some(lora), true),
        (4, Sign::Shared, 2, Some(in_the_file), true),
        (5, Sign::Shared, 1, None, true),
    ] {
        let gamma = Policy::fixed(Gamma::new(m, sign).unwrap());
        let mode = Mode::Bdia { grid: Grid::new(real.frac_bits).unwrap(), gamma, verify: true };
        let gradients = Gradients::Fused(ADAMW);
        let setup =
            Setup { mode, gradients, blocks_per_step, adapters, ..setup(dims, tokens.len()) };
        let (mut model, layout) = lay_out(&setup);
        let mut be = Cpu::new(&layout, THREADS).unwrap();
        read(&file, &mut be, &model).unwrap();
        if adapters.is_some() {
            model.initialize_adapters(&mut be, 1).unwrap();
        }
        let mut losses = Vec::new();
        for step in 0..3 {
            let step = Step { step, seed: 1, lr: 1e-4, weight_decay: 0.0, clip: 0.0 };
            let outcome = model.train(&mut be, &step, |_, x, y| {
                x.copy_from_slice(tokens);
                y[..tokens.len() - 1].copy_from_slice(&tokens[1..]);
                y[tokens.len() - 1] = -1;
                Ok::<(), Error>(())
            });
            let outcome = outcome.unwrap();
            assert_eq!(outcome.rebuilt.mismatches, 0, "m = {m}");
            losses.push(outcome.loss);
        }
        println!("m = {m}, {blocks_per_step} blocks a step: {losses:?}");
        assert_eq!((losses[0] - s.reals["loss"][0]).abs() < 0.1, near, "{losses:?}");
        // With m = 1 it has lost what it knew, and three steps do not bring it back.
        assert!(!near || losses[2] < losses[0], "{losses:?}");
    }
}
