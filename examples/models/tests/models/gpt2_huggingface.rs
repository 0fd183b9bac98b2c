//! Models in Hugging Face's layout: logits, loss and gradients against those of transformers
//! (`tests/torch`), in f32 on the CPU backend; our files read back by us and by transformers; and a
//! trained model that others published.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::common::transformers::{agrees, logits};
use crate::common::{Memory, SGD, STANDARD, STILL, bdia, data, state};
use bdia_core::layers::Gradients;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Error, Layout, Sign, Storage};
use bdia_cpu::Cpu;
use bdia_models::files::testing::TempDir;
use bdia_models::gpt2::config::Gpt2Config;
use bdia_models::gpt2::model::{Gpt2, Setup};
use bdia_models::language::Config as _;
use bdia_models::language::files::{load, save};
use bdia_models::weights::{self, Weights, WeightsError};

/// A setup for inference, on one thread.
fn setup(config: &Gpt2Config, batch: usize, context: usize, mode: Mode) -> Setup {
    let library = Cpu::library_bytes(1);
    Setup { library, ..crate::common::setup(config.dims(), batch, context, mode) }
}

fn lay_out(setup: &Setup, choice: Choice) -> (Gpt2, Layout) {
    Gpt2::layout::<Cpu>(setup, choice).unwrap()
}

/// Largest difference over the largest magnitude.
fn difference(ours: &[f64], theirs: &[f64]) -> f64 {
    crate::common::difference(ours, theirs, 0.0)
}

#[test]
fn logits_are_those_of_transformers() {
    for name in ["hf_tied", "hf_untied", "hf_f16", "hf_bf16", "hf_sharded"] {
        let config = Gpt2Config::read_dir(&data(name)).unwrap();
        let s = state(&format!("gpt2/{name}/state.safetensors"));
        for (mode, head_rows) in [(STANDARD, 16), (bdia(14, Sign::Plus), 5)] {
            let choice = Choice::new(1, head_rows);
            let (mut model, layout) = lay_out(&setup(&config, 1, 16, mode), choice);
            let mut be = Cpu::new(&layout, 1).unwrap();
            load(&data(name), &mut be, &model).unwrap();
            let d =
                difference(&logits(&mut be, &mut model, &s.ints["tokens"], 16), &s.reals["logits"]);
            println!("{name}, {mode:?}: logits differ by {d:.1e} of the largest");
            assert!(d < 1e-4, "{name}, {mode:?}: logits differ by {d:e}");
        }
    }
}

#[test]
fn loss_and_gradients_are_those_of_transformers() {
    for name in ["hf_tied", "hf_untied"] {
        let config = Gpt2Config::read_dir(&data(name)).unwrap();
        let s = state(&format!("gpt2/{name}/state.safetensors"));
        let setup = Setup { gradients: Gradients::Full(SGD), ..setup(&config, 2, 16, STANDARD) };
        let (mut model, layout) = lay_out(&setup, Choice::new(2, 32));
        let mut be = Cpu::new(&layout, 1).unwrap();
        load(&data(name), &mut be, &model).unwrap();
        let outcome = model
            .train(&mut be, &STILL, |_, x, y| {
                x.copy_from_slice(&s.ints["tokens"]);
                y.copy_from_slice(&s.ints["targets"]);
                Ok::<(), Error>(())
            })
            .unwrap();
        let d = difference(&[outcome.loss], &s.reals["loss"]);
        println!("{name}: loss {} differs by {d:.1e}", outcome.loss);
        assert!(d < 1e-4, "{name}: loss {}, theirs {}", outcome.loss, s.reals["loss"][0]);
        let mut most = (0.0, String::new());
        let tensors = model.tensors();
        for t in &tensors {
            let mut ours = vec![0.0_f32; t.gradient.len()];
            be.read_reals(t.gradient, &mut ours).unwrap();
            let ours: Vec<f64> = ours.iter().map(|&x| x.into()).collect();
            let full = if t.name == "lm_head.weight" {
                t.name.clone()
            } else {
                format!("transformer.{}", t.name)
            };
            let theirs = &s.reals[&format!("grad.{full}")];
            // The key part of c_attn.bias is 0 in exact arithmetic, and is measured by the whole
            // tensor.
            let d = difference(&ours, theirs);
            assert!(d < 1e-4, "{name}: gradient of {} differs by {d:e}", t.name);
            if d > most.0 {
                most = (d, t.name.clone());
            }
        }
        assert_eq!(s.reals.keys().filter(|k| k.starts_with("grad.")).count(), tensors.len());
        println!(
            "{name}: gradients differ by at most {:.1e} of a tensor's largest ({})",
            most.0, most.1
        );
    }
}

#[test]
fn tensors_that_do_not_fit_are_all_named() {
    let untied = Weights::read_dir(&data("hf_untied")).unwrap();
    let config = Gpt2Config::read_dir(&data("hf_untied")).unwrap();
    // Another width: every tensor has another shape. Another depth: those of the last block are
    // missing, or too many.
    let wider = Gpt2Config { n_embd: 48, ..config.clone() };
    let error = untied.check(&wider.tensors()).unwrap_err().to_string();
    for (name, shape) in wider.tensors() {
        let found = &untied.get(&name).unwrap().shape;
        let message = format!("{name} has shape {found:?}, expected {shape:?}");
        assert!(found != &shape && error.contains(&message), "{message}: {error}");
    }
    let block: Vec<String> =
        config.tensors().into_iter().map(|t| t.0).filter(|n| n.starts_with("h.2.")).collect();
    let deeper = untied
        .check(&Gpt2Config { n_layer: 4, ..config.clone() }.tensors())
        .unwrap_err()
        .to_string();
    let shallower =
        untied.check(&Gpt2Config { n_layer: 2, ..config }.tensors()).unwrap_err().to_string();
    assert!(deeper.contains("missing: h.3.") && shallower.contains("unexpected: h.2."));
    for name in block {
        assert!(
            deeper.contains(&name.replace("h.2.", "h.3.")) && shallower.contains(&name),
            "{name}"
        );
    }
    // An untied model from the file of a tied one.
    let tied = Gpt2Config::read_dir(&data("hf_tied")).unwrap();
    let untied = Gpt2Config { tie_word_embeddings: false, ..tied };
    let (model, layout) = lay_out(&setup(&untied, 1, 16, STANDARD), Choice::new(1, 16));
    let mut be = Cpu::new(&layout, 1).unwrap();
    let error = load(&data("hf_tied"), &mut be, &model).unwrap_err().to_string();
    assert!(error.contains("missing: lm_head.weight"), "{error}");
}

/// Loads a committed model and writes it as a run does.
fn save_again(name: &str, dir: &Path) -> Vec<f32> {
    let config = Gpt2Config::read_dir(&data(name)).unwrap();
    let (model, layout) = lay_out(&setup(&config, 1, 16, STANDARD), Choice::new(1, 16));
    let mut be = Cpu::new(&layout, 1).unwrap();
    load(&data(name), &mut be, &model).unwrap();
    save(dir, &be, &model).unwrap();
    config.write_dir(dir).unwrap();
    read(&be, &model)
}

fn read(be: &Cpu, model: &Gpt2) -> Vec<f32> {
    let mut all = Vec::new();
    for t in model.tensors() {
        let mut values = vec![0.0; t.values.len()];
        be.read_reals(t.values, &mut values).unwrap();
        all.extend(values);
    }
    all
}

#[test]
fn what_we_save_is_read_back_the_same() {
    for name in ["hf_tied", "hf_untied", "hf_f16", "hf_bf16", "hf_sharded"] {
        let dir = TempDir::new();
        let saved = save_again(name, dir.path());
        let config = Gpt2Config::read_dir(dir.path()).unwrap();
        assert_eq!(config, Gpt2Config::read_dir(&data(name)).unwrap());
        let (model, layout) = lay_out(&setup(&config, 1, 16, STANDARD), Choice::new(1, 16));
        let mut be = Cpu::new(&layout, 1).unwrap();
        load(dir.path(), &mut be, &model).unwrap();
        let again = read(&be, &model);
        assert!(saved.iter().map(|x| x.to_bits()).eq(again.iter().map(|x| x.to_bits())), "{name}");
    }
}

#[test]
fn transformers_reads_what_we_save() {
    for name in ["hf_tied", "hf_untied"] {
        let dir = TempDir::new();
        save_again(name, dir.path());
        if !agrees(dir.path(), None, 16) {
            return;
        }
    }
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        b'=' => None,
        _ => panic!("{c} is no digit of base64"),
    };
    let (mut out, mut bits, mut n) = (Vec::new(), 0_u32, 0);
    for d in text.bytes().filter_map(digit) {
        (bits, n) = ((bits << 6 | u32::from(d)) & 0xffff, n + 6);
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
        }
    }
    out
}

/// The tensors of a JSON file with f32 values in base64.
fn tensors(path: &Path) -> HashMap<String, Vec<f32>> {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let values = |t: &serde_json::Value| -> Option<Vec<f32>> {
        let bytes = base64(t["data"].as_str()?);
        Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    };
    json.as_object()
        .unwrap()
        .iter()
        .filter_map(|(name, t)| Some((name.clone(), values(t)?)))
        .collect()
}

/// A trained model that nobody here made: minGPT's `gpt-nano`, which sorts six letters, from the
/// data of bbycroft/llm-viz. It multiplies weights `[out, in]`, where Hugging Face's GPT-2 has
/// `[in, out]`; its `model.safetensors` lacks the biases `attn.c_attn.bias`, which are in the JSON
/// file beside it.
#[test]
fn a_published_model_gives_its_stored_logits() {
    let folder = std::env::var_os("BDIA_DATA")
        .map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"),
            PathBuf::from,
        )
        .join("gpt_nano_sort");
    if !folder.join(weights::FILE).is_file() {
        println!(
            "skipped: {} has no {}; BDIA_DATA names the data directory",
            folder.display(),
            weights::FILE
        );
        return;
    }
    let theirs = Weights::read_dir(&folder).unwrap();
    let json = tensors(&folder.join("gpt-nano-sort-model.json"));
    let config = Gpt2Config::from_json(
        br#"{"vocab_size":3,"n_positions":11,"n_embd":48,"n_layer":3,"n_head":3,
            "tie_word_embeddings":false}"#,
    )
    .unwrap();

    // As it is, it does not fit, and the message names every tensor by which that is visible.
    let error = theirs.check(&config.tensors()).unwrap_err();
    let WeightsError::Mismatch(parts) = &error else { panic!("{error}") };
    assert_eq!(
        parts[0],
        "missing: h.0.attn.c_attn.bias, h.1.attn.c_attn.bias, h.2.attn.c_attn.bias"
    );
    // Three in each of three blocks; attn.c_proj is square.
    assert_eq!(parts.len(), 1 + 9, "{error}");
    assert!(
        error.to_string().contains("h.1.mlp.c_fc.weight has shape [192, 48], expected [48, 192]"),
        "{error}"
    );

    let dir = TempDir::new();
    let shapes = config.tensors();
    weights::write::<WeightsError>(&dir.path().join(weights::FILE), &shapes, |i, sink| {
        let (name, shape) = &shapes[i];
        if name.ends_with("c_attn.bias") {
            return sink.put(&json[&format!("transformer.{name}")]);
        }
        let mut values = vec![0.0; shape.iter().product()];
        theirs.read(name, &mut values)?;
        if name.starts_with("h.") && shape.len() == 2 {
            let (rows, cols) = (shape[0], shape[1]);
            values = (0..rows * cols).map(|at| values[at % cols * rows + at / cols]).collect();
        }
        sink.put(&values)
    })
    .unwrap();
    config.write_dir(dir.path()).unwrap();

    // The partial results belong to three sequences of eleven letters: six to sort, and the sorted
    // ones but the last.
    let partials = tensors(&folder.join("gpt-nano-sort-t0-partials.json"));
    let tokens: Vec<i32> = partials["idx"].iter().map(|&x| x as i32).collect();
    assert_eq!(tokens[..11], [0, 0, 2, 1, 0, 1, 0, 0, 0, 0, 0]);
    let stored: Vec<f64> = partials["lm_head"].iter().map(|&x| x.into()).collect();
    let most =
        |ours: &[f64]| ours.iter().zip(&stored).fold(0.0_f64, |a, (x, y)| a.max((x - y).abs()));

    let config = Gpt2Config::read_dir(dir.path()).unwrap();
    let setup = setup(&config, 1, 11, STANDARD);
    // In f64: what is left is the rounding of the stored values, which PyTorch computed in f32.
    let choice = Choice::new(1, 11);
    let (mut model, layout) = crate::common::lay_out::<f64>(&setup, choice.chunk, choice.head_rows);
    let mut memory = Memory::<f64>::new(&layout);
    let mut be = memory.backend(&layout);
    let weights = Weights::read_dir(dir.path()).unwrap();
    for t in model.tensors() {
        let mut values = vec![0.0; t.values.len()];
        weights.read(&t.name, &mut values).unwrap();
        let values: Vec<f64> = values.into_iter().map(f64::from).collect();
        be.write_reals(t.values, &values).unwrap();
    }
    let exact = most(&logits(&mut be, &mut model, &tokens, 11));
    println!("f64: logits differ by {exact:.2e}");
    assert!(exact < 2e-6, "f64: {exact:e}");

    // In f32, which rounds as much as PyTorch's program did.
    let (mut model, layout) = lay_out(&setup, choice);
    let mut be = Cpu::new(&layout, 1).unwrap();
    load(dir.path(), &mut be, &model).unwrap();
    let ours = logits(&mut be, &mut model, &tokens, 11);
    let (absolute, relative) = (most(&ours), difference(&ours, &stored));
    println!("f32: logits differ by {absolute:.2e}, {relative:.2e} of the largest");
    assert!(relative < 2e-6, "f32: {relative:e}");
}
