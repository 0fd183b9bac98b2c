//! Logits, loss, gradients and decoded tokens of tiny models of Llama's family against those that
//! transformers and PEFT give (`tests/torch/llama_hf.py`), in f64 on both sides.

use core::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::common::{Memory, SGD, STANDARD, STILL, State, checkpoint, difference, state};
use bdia_core::layers::{Gradients, LoraShape};
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::update::{Gamma, Grid, Policy, Sign};
use bdia_core::{Error, Layout, Reference};
use bdia_models::inference::Inference;
use bdia_models::language::decode::{Decoder, Decoding, How, Sizes};
use bdia_models::llama::config::LlamaConfig;
use bdia_models::llama::model::{Llama, Setup};
use bdia_models::named::Adapters;
use bdia_models::search::Length;

const CASES: [&str; 9] = [
    "llama",
    "llama_biases",
    "llama_scaled",
    "llama_linear",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma3",
];
/// Two f64 programs that sum some hundred terms in different orders; the rest is margin.
const TOLERANCE: f64 = 1e-10;
/// Below this a gradient of these models is noise.
const LEAST: f64 = 1e-3;

fn dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/llama").join(name)
}

/// What the program computed, with the model's weights as `param.NAME`.
fn case(name: &str) -> (State, LlamaConfig) {
    let mut s = state(&format!("llama/{name}/state.safetensors"));
    let weights = state(&format!("llama/{name}/model.safetensors"));
    s.reals.extend(weights.reals.into_iter().map(|(name, v)| (format!("param.{name}"), v)));
    (s, LlamaConfig::read_dir(&dir(name)).unwrap())
}

fn setup(config: &LlamaConfig, mode: Mode) -> Setup {
    let gradients = Gradients::Full(SGD);
    Setup { batch: 2, mode, gradients, ..Setup::inference(config.dims, 12, 1) }
}

fn lay_out(setup: &Setup, chunk: usize, head_rows: usize) -> (Llama, Layout) {
    Llama::layout::<Reference<'_, f64>>(setup, Choice::new(chunk, head_rows)).unwrap()
}

fn fill(s: &State) -> impl FnMut(usize, &mut [i32], &mut [i32]) -> Result<(), Error> + '_ {
    |_, x, y| {
        x.copy_from_slice(&s.ints["tokens"]);
        y.copy_from_slice(&s.ints["targets"]);
        Ok(())
    }
}

#[test]
fn logits_loss_and_every_gradient() {
    for name in CASES {
        let (s, config) = case(name);
        for (mode, chunk, head_rows, blocks_per_step, token_chunk) in [
            (STANDARD, 2, 24, 1, None),
            (STANDARD, 1, 5, 3, Some(5)),
            (checkpoint(1), 2, 7, 2, Some(8)),
            (checkpoint(3), 1, 24, 1, None),
        ] {
            let setup = Setup { blocks_per_step, ..setup(&config, mode) };
            let choice = Choice { token_chunk, ..Choice::new(chunk, head_rows) };
            let (mut model, layout) = Llama::layout::<Reference<'_, f64>>(&setup, choice).unwrap();
            let mut memory = Memory::<f64>::new(&layout);
            let mut be = memory.backend(&layout);
            model.fill_tables(&mut be).unwrap();
            let tensors = model.tensors();
            s.load(&mut be, &tensors);
            let vocab = config.dims.vocab;
            for (i, sample) in s.ints["tokens"].chunks(12).enumerate() {
                let ours = model.logits(&mut be, sample, 0..12, Inference::STANDARD).unwrap();
                let d =
                    difference(&ours, &s.reals["logits"][i * 12 * vocab..][..12 * vocab], LEAST);
                assert!(d < TOLERANCE, "{name}: logits of sample {i} differ by {d:e}");
            }
            let loss = model.train(&mut be, &STILL, fill(&s)).unwrap().loss;
            assert!((loss - s.reals["loss"][0]).abs() < TOLERANCE, "{name}: loss {loss}");
            for (t, theirs) in tensors.iter().zip(s.of("grad", &tensors)) {
                let d = difference(be.reals(t.gradient).unwrap(), &theirs, LEAST);
                assert!(d < TOLERANCE, "{name}: gradient of {} differs by {d:e}", t.name);
            }
        }
    }
}

/// Every rebuilt activation has the bits of the original, whatever γ is, and a small γ gives nearly
/// the gradients of the standard network.
#[test]
fn reversible_training_is_exact() {
    for name in CASES {
        let (s, config) = case(name);
        let mut distances = Vec::new();
        for (m, sign, blocks_per_step, token_chunk) in [
            (1, Sign::Random, 1, None),
            (4, Sign::Shared, 2, Some(7)),
            (8, Sign::Shared, 1, Some(1)),
            (2, Sign::Minus, 3, None),
        ] {
            let gamma = Policy::fixed(Gamma::new(m, sign).unwrap());
            let mode = Mode::Bdia { grid: Grid::new(20).unwrap(), gamma, verify: true };
            let setup = Setup { blocks_per_step, ..setup(&config, mode) };
            let choice = Choice { token_chunk, ..Choice::new(1, 24) };
            let (mut model, layout) = Llama::layout::<Reference<'_, f64>>(&setup, choice).unwrap();
            let mut memory = Memory::<f64>::new(&layout);
            let mut be = memory.backend(&layout);
            model.fill_tables(&mut be).unwrap();
            s.load(&mut be, &model.tensors());
            let outcome = model.train(&mut be, &STILL, fill(&s)).unwrap();
            assert_eq!(outcome.rebuilt.mismatches, 0, "{name}");
            distances.push((outcome.loss - s.reals["loss"][0]).abs());
        }
        assert!(distances[2] < 0.02 && distances[2] < distances[0], "{name}: {distances:?}");
    }
}

#[test]
fn a_cache_and_greedy_decoding() {
    for name in CASES {
        let (s, config) = case(name);
        let (model, _) = lay_out(&Setup::inference(config.dims, 32, 1), 1, 1);
        let sizes = Sizes { prompts: 2, beams: 1, context: 32 };
        let (decoder, layout) = Decoder::layout::<Reference<'_, f64>>(&model, &sizes).unwrap();
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        model.fill_tables(&mut be).unwrap();
        s.load(&mut be, &model.tensors());
        let decoding = Decoding {
            how: How::Search(Length::Power(1.0)),
            tokens: 16,
            ends: Vec::new(),
            no_repeat: 0,
            inference: Inference::STANDARD,
        };
        let expected: Vec<_> = s.ints["generated"].chunks(21).collect();
        let prompts: Vec<_> = expected.iter().map(|all| all[..5].to_vec()).collect();
        let found =
            decoder.decode(&mut be, &prompts, &decoding, |_| ControlFlow::Continue(())).unwrap();
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found, &expected[5..], "{name}");
        }
    }
}

/// One adapter for every linear layer, on frozen weights.
#[test]
fn adapters_of_all_layers() {
    let adapters = Adapters::new(LoraShape { rank: 3, alpha: 5.0 });
    for name in ["llama_biases", "gemma3"] {
        let (s, config) = case(name);
        let setup = Setup { adapters: Some(adapters), ..setup(&config, STANDARD) };
        let (mut model, layout) = lay_out(&setup, 2, 24);
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        model.fill_tables(&mut be).unwrap();
        s.load(&mut be, &model.tensors());
        let trained = model.trained();
        assert_eq!(trained.len(), 4 * 7 * 2);
        for (t, values) in trained.iter().zip(s.of("adapter", &trained)) {
            bdia_core::Storage::write_reals(&mut be, t.values, &values).unwrap();
        }
        let loss = model.train(&mut be, &STILL, fill(&s)).unwrap().loss;
        assert!((loss - s.reals["lora.loss"][0]).abs() < TOLERANCE, "{name}: loss {loss}");
        for (t, theirs) in trained.iter().zip(s.of("slope", &trained)) {
            let d = difference(be.reals(t.gradient).unwrap(), &theirs, LEAST);
            assert!(d < TOLERANCE, "{name}: gradient of {} differs by {d:e}", t.name);
        }
    }
}

/// Several texts in a sample give the loss and the gradients of as many samples, whatever their
/// windows and positions are, and are rebuilt to the bit.
#[test]
fn packed_texts_are_separate_samples() {
    // Texts: place in the packed samples, length.
    const TEXTS: [(usize, usize); 6] = [(0, 5), (5, 1), (6, 6), (12, 7), (19, 4), (23, 1)];
    for name in CASES {
        let (s, config) = case(name);
        let (tokens, targets) = (&s.ints["tokens"], &s.ints["targets"]);
        let run = |packed: bool, mode| {
            let batch = if packed { 2 } else { TEXTS.len() };
            let setup = Setup { batch, packed, ..setup(&config, mode) };
            let (mut model, layout) = lay_out(&setup, 2, 24);
            let mut memory = Memory::<f64>::new(&layout);
            let mut be = memory.backend(&layout);
            model.fill_tables(&mut be).unwrap();
            s.load(&mut be, &model.tensors());
            let outcome = model
                .train_packed(&mut be, &STILL, |_, [x, y, starts]| {
                    x.fill(0);
                    y.fill(-1);
                    for (i, (at, len)) in TEXTS.into_iter().enumerate() {
                        let to = if packed { at } else { 12 * i };
                        x[to..to + len].copy_from_slice(&tokens[at..at + len]);
                        y[to..to + len].copy_from_slice(&targets[at..at + len]);
                        if packed {
                            starts[to..to + len].fill((at % 12) as i32);
                        }
                    }
                    Ok::<_, Error>(())
                })
                .unwrap();
            let gradients: Vec<_> = (model.tensors().iter())
                .map(|t| (t.name.clone(), be.reals(t.gradient).unwrap().to_vec()))
                .collect();
            (outcome, gradients)
        };
        for mode in [STANDARD, checkpoint(2)] {
            let ((one, separate), (other, packed)) = (run(false, mode), run(true, mode));
            assert!((one.loss - other.loss).abs() < TOLERANCE, "{name}");
            for ((name_of, a), (_, b)) in separate.iter().zip(&packed) {
                let d = difference(b, a, LEAST);
                assert!(d < TOLERANCE, "{name}: gradient of {name_of} differs by {d:e}");
            }
        }
        let gamma = Policy::fixed(Gamma::new(2, Sign::Random).unwrap());
        let mode = Mode::Bdia { grid: Grid::new(20).unwrap(), gamma, verify: true };
        assert_eq!(run(true, mode).0.rebuilt.mismatches, 0, "{name}");
    }
}
