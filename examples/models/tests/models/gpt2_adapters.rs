//! Fine-tuning against transformers and PEFT (`tests/torch/finetune.py`), adapters as files, 16-bit
//! storage.

use core::ops::ControlFlow;
use std::path::PathBuf;

use crate::common::{
    Memory, SGD, STANDARD, State, bdia, bdia_float, checkpoint, data, float, lay_out, small, state,
    verified,
};
use bdia_core::layers::{Gradients, LoraShape};
use bdia_core::network::Step;
use bdia_core::optim::Rule;
use bdia_core::plan::{Choice, fit};
use bdia_core::stack::Mode;
use bdia_core::{Error, NnOps, Packed, Packing, Reals, Reference, Sign, Storage};
use bdia_cpu::Cpu;
use bdia_models::files::testing::TempDir;
use bdia_models::gpt2::config::{Gpt2Config, Size};
use bdia_models::gpt2::model::{Gpt2, Setup};
use bdia_models::inference::Inference;
use bdia_models::language::adapter::{self, Adapter};
use bdia_models::language::decode::{Decoder, Decoding, How, Sizes};
use bdia_models::language::files::load;
use bdia_models::language::frozen;
use bdia_models::named::{Adapters, Frozen, Named};
use bdia_models::search::Length;
use bdia_models::weights::Weights;

const STEP: Step = Step { step: 0, seed: 3, lr: 0.0, weight_decay: 0.0, clip: 0.0 };
const SHAPE: LoraShape = LoraShape { rank: 4, alpha: 32.0 };
const ADAMW: Rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

/// Samples of the fixture: tokens and, shifted by one, targets.
fn batch(s: &State) -> (Vec<i32>, Vec<i32>) {
    let samples = s.ints["input_ids"].chunks(16).zip(s.ints["labels"].chunks(16));
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    for (ids, labels) in samples {
        tokens.extend(&ids[..15]);
        targets.extend(labels[1..].iter().map(|&l| if l < 0 { -1 } else { l }));
    }
    (tokens, targets)
}

/// Tokens of a sample of the fixture that are not padding: at the others transformers computes
/// something else.
fn length(s: &State, i: usize) -> usize {
    let labels = &s.ints["labels"][i * 16..][..16];
    labels.iter().rposition(|&l| l >= 0).map_or(0, |last| last + 1).min(15)
}

fn setup(mode: Mode, adapters: Option<Adapters>) -> Setup {
    let dims = Gpt2Config::read_dir(&data("hf_tied")).unwrap().dims();
    Setup { gradients: Gradients::Full(SGD), adapters, ..crate::common::setup(dims, 3, 15, mode) }
}

/// Matrices in few bits.
fn stored(packing: Option<Packing>) -> Frozen {
    let dims = Gpt2Config::read_dir(&data("hf_tied")).unwrap().dims();
    packing.map_or(Frozen::default(), |p| frozen::packed(&dims, p).unwrap())
}

/// Mode `bdia`.
fn reversible() -> Mode {
    bdia(14, Sign::Random)
}

fn load_values(model: &Gpt2, be: &mut Reference<'_, f64>) {
    let weights = Weights::read_dir(&data("hf_tied")).unwrap();
    for t in model.tensors() {
        let mut values = vec![0.0; t.len()];
        weights.read(&t.name, &mut values).unwrap();
        be.write_reals(t.values, &values.into_iter().map(f64::from).collect::<Vec<_>>()).unwrap();
    }
}

/// The parts of PEFT's `[3d, 2r]` that ours has, as `[2r, d]`.
fn parts(theirs: &[f64], r: usize, d: usize) -> Vec<f64> {
    (0..2 * r)
        .flat_map(|q| (0..d).map(move |j| theirs[(if q < r { j } else { 2 * d + j }) * 2 * r + q]))
        .collect()
}

/// PEFT's adapter in our tensors.
fn load_adapter(model: &Gpt2) -> Vec<(Reals, Vec<f64>)> {
    let weights = Weights::read_files(vec![data("peft_qv").join(adapter::FILE)]).unwrap();
    (model.trained().iter())
        .map(|t| {
            let name = format!("base_model.model.transformer.{}.weight", t.name);
            let mut values = vec![0.0_f32; weights.get(&name).unwrap().len()];
            weights.read(&name, &mut values).unwrap();
            let values: Vec<f64> = values.into_iter().map(f64::from).collect();
            (t.values, if t.name.ends_with("lora_B") { parts(&values, 4, 24) } else { values })
        })
        .collect()
}

/// Below 1e-3 a gradient of this model is noise.
fn difference(ours: &[f64], theirs: &[f64]) -> f64 {
    crate::common::difference(ours, theirs, 1e-3)
}

fn fill<'a>(
    (tokens, targets): &'a (Vec<i32>, Vec<i32>),
) -> impl FnMut(usize, &mut [i32], &mut [i32]) -> Result<(), Error> + 'a {
    move |_, x, y| {
        x.copy_from_slice(tokens);
        y.copy_from_slice(targets);
        Ok(())
    }
}

/// All parameters: the loss to the rounding of `f64`, gradients to that of the `f32` in which they
/// are stored.
#[test]
fn a_masked_step_is_that_of_transformers() {
    let s = state("gpt2/finetune.safetensors");
    let batch = batch(&s);
    let (mut model, layout) = lay_out::<f64>(&setup(STANDARD, None), 2, 7);
    let mut memory = Memory::new(&layout);
    let mut be = memory.backend(&layout);
    load_values(&model, &mut be);
    let outcome = model.train(&mut be, &STEP, fill(&batch)).unwrap();
    assert!((outcome.loss - s.reals["full.loss"][0]).abs() < 1e-12, "{}", outcome.loss);
    for t in model.tensors() {
        let d =
            difference(be.reals(t.gradient).unwrap(), &s.reals[&format!("full.grad.{}", t.name)]);
        assert!(d < 1e-7, "{}: {d:e}", t.name);
    }
}

#[test]
fn a_masked_step_with_adapters_is_that_of_peft() {
    let s = state("gpt2/finetune.safetensors");
    let batch = batch(&s);
    let adapters = Some(Adapters::new(SHAPE));
    for (mode, chunk) in [(STANDARD, 3), (checkpoint(2), 2), (checkpoint(1), 1)] {
        let mut setup = setup(mode, adapters);
        let (mut model, layout) = lay_out::<f64>(&setup, chunk, 7);
        let mut memory = Memory::new(&layout);
        let mut be = memory.backend(&layout);
        load_values(&model, &mut be);
        for (place, values) in load_adapter(&model) {
            be.write_reals(place, &values).unwrap();
        }
        for (i, tokens) in batch.0.chunks(15).enumerate() {
            let n = length(&s, i);
            let ours = model.logits(&mut be, tokens, 0..n, float(0.0)).unwrap();
            let d = difference(&ours, &s.reals["lora.logits"][i * 16 * 61..][..n * 61]);
            assert!(d < 1e-12, "{mode:?}: logits of sample {i}: {d:e}");
        }
        let outcome = model.train(&mut be, &STEP, fill(&batch)).unwrap();
        assert!(
            (outcome.loss - s.reals["lora.loss"][0]).abs() < 1e-12,
            "{mode:?}: {}",
            outcome.loss
        );
        for t in model.trained() {
            let theirs = &s.reals[&format!("lora.grad.{}", t.name)];
            let theirs =
                if t.name.ends_with("lora_B") { parts(theirs, 4, 24) } else { theirs.clone() };
            let d = difference(be.reals(t.gradient).unwrap(), &theirs);
            assert!(d < 1e-11, "{mode:?}, {}: {d:e}", t.name);
        }

        for gradients in [Gradients::Fused(ADAMW), Gradients::Full(ADAMW)] {
            setup.gradients = gradients;
            let (mut model, layout) = lay_out::<f64>(&setup, chunk, 7);
            let mut memory = Memory::new(&layout);
            let mut be = memory.backend(&layout);
            load_values(&model, &mut be);
            model.initialize_adapters(&mut be, 1).unwrap();
            for (place, values) in load_adapter(&model) {
                be.write_reals(place, &values).unwrap();
            }
            for (i, theirs) in s.reals["lora.losses"].iter().enumerate() {
                let (lr, weight_decay) = (s.number("lr"), s.number("weight_decay"));
                let step = Step { step: i as u32, lr, weight_decay, ..STEP };
                let ours = model.train(&mut be, &step, fill(&batch)).unwrap().loss;
                assert!(
                    (ours - theirs).abs() < 1e-10,
                    "{mode:?}, {gradients:?}: loss {i} is {ours}, theirs {theirs}"
                );
            }
        }
    }
}

/// With γ, too: the adapters' gradients follow from that of the weight to which they are added,
/// `dA = s·B·dWᵀ` and `dB = s·A·dW`, in a model in which they are merged.
#[test]
fn gradients_in_every_mode_follow_from_those_of_the_merged_weight() {
    let batch = batch(&state("gpt2/finetune.safetensors"));
    let (d, r, s) = (24, 4, SHAPE.scale());
    for mode in [reversible(), bdia_float(Sign::Random), STANDARD] {
        let adapters = Some(Adapters::new(SHAPE));
        let (mut model, layout) = lay_out::<f64>(&setup(mode, adapters), 2, 7);
        let (mut whole, whole_layout) = lay_out::<f64>(&setup(mode, None), 2, 7);
        let (mut memory, mut whole_memory) = (Memory::new(&layout), Memory::new(&whole_layout));
        let (mut be, mut on) = (memory.backend(&layout), whole_memory.backend(&whole_layout));
        load_values(&model, &mut be);
        load_values(&whole, &mut on);
        let loaded = load_adapter(&model);
        // Column of c_attn that part q of the adapters belongs to.
        let column = |q: usize, j: usize| if q < r { j } else { 2 * d + j };
        let named = whole.tensors();
        let weights: Vec<_> = named.iter().filter(|t| t.name.ends_with("c_attn.weight")).collect();
        for (pair, t) in loaded.chunks(2).zip(&weights) {
            let mut w = on.reals(t.values).unwrap().to_vec();
            let (a, b) = (&pair[0].1, &pair[1].1);
            for q in 0..2 * r {
                for i in 0..d {
                    for j in 0..d {
                        w[i * 3 * d + column(q, j)] += s * a[q * d + i] * b[q * d + j];
                    }
                }
            }
            on.write_reals(t.values, &w).unwrap();
            be.write_reals(pair[0].0, a).unwrap();
            be.write_reals(pair[1].0, b).unwrap();
        }
        let ours = model.train(&mut be, &STEP, fill(&batch)).unwrap();
        let merged = whole.train(&mut on, &STEP, fill(&batch)).unwrap();
        assert!(
            (ours.loss - merged.loss).abs() < 1e-12,
            "{mode:?}: {} and {}",
            ours.loss,
            merged.loss
        );
        let trained = model.trained();
        for (k, t) in weights.iter().enumerate() {
            let dw = on.reals(t.gradient).unwrap();
            let (a, b) = (&loaded[2 * k].1, &loaded[2 * k + 1].1);
            let (mut da, mut db) = (vec![0.0; 2 * r * d], vec![0.0; 2 * r * d]);
            for q in 0..2 * r {
                for i in 0..d {
                    for j in 0..d {
                        let slope = s * dw[i * 3 * d + column(q, j)];
                        da[q * d + i] += slope * b[q * d + j];
                        db[q * d + j] += slope * a[q * d + i];
                    }
                }
            }
            for (named, expected) in [(&trained[2 * k], da), (&trained[2 * k + 1], db)] {
                let e = difference(be.reals(named.gradient).unwrap(), &expected);
                assert!(e < 1e-10, "{mode:?}, {}: {e:e}", named.name);
            }
        }
    }
}

fn on_cpu(setup: &Setup, chunk: usize) -> (Gpt2, Cpu) {
    let (model, layout) = Gpt2::layout::<Cpu>(setup, Choice::new(chunk, 7)).unwrap();
    (model, Cpu::new(&layout, setup.threads).unwrap())
}

fn bits(be: &Cpu, tensors: &[Named]) -> Vec<u32> {
    tensors.iter().flat_map(|t| be.reals(t.values).unwrap()).map(|x| x.to_bits()).collect()
}

/// Loss of six steps and the adapters after them, from a model's directory.
fn trained(dir: &str, setup: &Setup, chunk: usize) -> (Vec<u64>, Vec<u32>, u64) {
    let batch = batch(&state("gpt2/finetune.safetensors"));
    let (mut model, mut be) = on_cpu(setup, chunk);
    load(&data(dir), &mut be, &model).unwrap();
    model.initialize_adapters(&mut be, 1).unwrap();
    let (mut losses, mut mismatches) = (Vec::new(), 0);
    for i in 0..6 {
        let outcome =
            model.train(&mut be, &Step { step: i, lr: 1e-2, ..STEP }, fill(&batch)).unwrap();
        losses.push(outcome.loss.to_bits());
        mismatches += outcome.rebuilt.mismatches;
    }
    (losses, bits(&be, &model.trained()), mismatches)
}

/// Matrices in 16 bits are the same numbers as in 32, where 16 bits hold them: nothing differs, not
/// even a bit.
#[test]
fn storage_in_16_bits_changes_no_bit() {
    for (dir, half) in [("hf_bf16", Packing::Bf16), ("hf_f16", Packing::F16)] {
        for mode in [verified(reversible()), STANDARD, checkpoint(2), bdia_float(Sign::Random)] {
            let adapters = |half| Some(Adapters { shape: SHAPE, frozen: stored(half) });
            let (fused, full) = (Gradients::Fused(ADAMW), Gradients::Full(ADAMW));
            let of = |half, gradients, threads| {
                let s = Setup { gradients, threads, ..setup(mode, adapters(half)) };
                trained(dir, &s, 2)
            };
            let (losses, adapters, mismatches) = of(None, fused, 1);
            assert!(
                f64::from_bits(losses[5]) < f64::from_bits(losses[0]) - 0.1,
                "{dir}, {mode:?}: nothing is learned"
            );
            assert_eq!(mismatches, 0, "{dir}, {mode:?}");
            for other in
                [of(Some(half), fused, 1), of(Some(half), fused, 3), of(Some(half), full, 1)]
            {
                assert!(other == (losses.clone(), adapters.clone(), 0), "{dir}, {mode:?}");
            }
        }
    }
}

/// Nor does it in decoding, where a token has a place of its own.
#[test]
fn decoding_in_16_bits_changes_no_token() {
    for (dir, half) in [("hf_bf16", Packing::Bf16), ("hf_f16", Packing::F16)] {
        let texts = [None, Some(half)].map(|packing| {
            let adapters = Some(Adapters { shape: SHAPE, frozen: stored(packing) });
            let s = Setup { gradients: Gradients::None, batch: 2, ..setup(STANDARD, adapters) };
            let (model, _) = Gpt2::layout::<Cpu>(&s, Choice::new(2, 4)).unwrap();
            let sizes = Sizes { prompts: 2, beams: 2, context: 12 };
            let (decoder, layout) = Decoder::layout::<Cpu>(&model, &sizes).unwrap();
            let mut be = Cpu::new(&layout, 2).unwrap();
            load(&data(dir), &mut be, &model).unwrap();
            model.initialize_adapters(&mut be, 1).unwrap();
            let decoding = Decoding {
                how: How::Search(Length::Power(1.0)),
                tokens: 8,
                ends: Vec::new(),
                no_repeat: 0,
                inference: Inference::STANDARD,
            };
            let prompts = [vec![1, 2, 3], vec![5]];
            decoder.decode(&mut be, &prompts, &decoding, |_| ControlFlow::Continue(())).unwrap()
        });
        assert_eq!(texts[0], texts[1], "{dir}");
        assert!(texts[0].iter().all(|text| text.len() == 8));
    }
}

/// Weights that are not numbers of 16 bits are rounded to the nearest, and the matrices only; not
/// those of learned positions.
#[test]
fn other_weights_are_rounded() {
    let weights = Weights::read_dir(&data("hf_tied")).unwrap();
    for half in [Packing::Bf16, Packing::F16] {
        let adapters = Adapters { shape: SHAPE, frozen: stored(Some(half)) };
        let (model, mut be) = on_cpu(&setup(reversible(), Some(adapters)), 1);
        load(&data("hf_tied"), &mut be, &model).unwrap();
        let mut narrow = 0;
        for t in model.tensors() {
            let mut values = vec![0.0; t.len()];
            weights.read(&t.name, &mut values).unwrap();
            let Some(Packed { words, .. }) = t.packed else {
                assert_eq!(be.reals(t.values).unwrap(), values, "{}", t.name);
                continue;
            };
            narrow += 1;
            let stored = be.words(words).unwrap();
            for (i, &x) in values.iter().enumerate() {
                let bits = stored[i / 2] >> (16 * (i % 2)) & 0xFFFF;
                let expected = match half {
                    Packing::Bf16 => half::bf16::from_f32(x).to_bits(),
                    _ => half::f16::from_f32(x).to_bits(),
                };
                assert_eq!(bits, u32::from(expected), "{}: {i}", t.name);
            }
        }
        assert_eq!(narrow, 4 * 3 + 1);
    }
}

/// What is saved has the tensors that PEFT saved, bit for bit, and the settings that PEFT needs.
#[test]
fn adapters_are_saved_as_peft_saves_them() {
    let dir = TempDir::new();
    let (model, mut be) = on_cpu(&setup(reversible(), Some(Adapters::new(SHAPE))), 1);
    let digest = load(&data("hf_tied"), &mut be, &model).unwrap();
    for (place, values) in load_adapter(&model) {
        be.write_reals(place, &values.iter().map(|&x| x as f32).collect::<Vec<_>>()).unwrap();
    }
    adapter::save(dir.path(), &be, &model, "hf_tied", &digest).unwrap();
    let read = |path: PathBuf| {
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<_> = file
            .tensors()
            .into_iter()
            .map(|(n, t)| (n, t.shape().to_vec(), t.dtype(), t.data().to_vec()))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    // Zeros have a sign, and PEFT's file has some of the other one.
    let plain = |bytes: &[u8]| -> Vec<f32> {
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b) + 0.0).collect()
    };
    let (ours, theirs) =
        (read(dir.path().join(adapter::FILE)), read(data("peft_qv").join(adapter::FILE)));
    assert_eq!(ours.len(), theirs.len());
    for (a, b) in ours.iter().zip(&theirs) {
        assert_eq!((&a.0, &a.1, a.2), (&b.0, &b.1, b.2));
        assert_eq!(plain(&a.3), plain(&b.3), "{}", a.0);
    }
    let json = |path: PathBuf| -> serde_json::Map<String, serde_json::Value> {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let theirs = json(data("peft_qv").join(adapter::CONFIG));
    for (key, value) in json(dir.path().join(adapter::CONFIG)) {
        assert_eq!(theirs[&key], value, "{key}");
    }
}

/// Logits of the model with an adapter merged into it, against PEFT's.
#[test]
fn merged_adapters_compute_what_peft_does() {
    let s = state("gpt2/finetune.safetensors");
    let (tokens, _) = batch(&s);
    for (dir, key) in [("peft_qv", "lora.logits"), ("peft_full", "other.logits")] {
        let (mut model, mut be) = on_cpu(&setup(STANDARD, None), 1);
        let digest = load(&data("hf_tied"), &mut be, &model).unwrap();
        Adapter::open(&data(dir), &model).unwrap().merge(&mut be, &model, &digest).unwrap();
        for (i, tokens) in tokens.chunks(15).enumerate() {
            let n = length(&s, i);
            let ours = model.logits(&mut be, tokens, 0..n, float(0.0)).unwrap();
            let ours: Vec<f64> = ours.iter().map(|&x| x.into()).collect();
            let d = difference(&ours, &s.reals[key][i * 16 * 61..][..n * 61]);
            // f32 against f64 through three blocks.
            assert!(d < 2e-6, "{dir}: logits of sample {i}: {d:e}");
        }
    }
}

/// GPT-2 355M, four samples of 256 tokens, two threads: what the README says about memory.
#[test]
fn plans_of_the_355m_model() {
    let config = Gpt2Config::preset(Size::Medium);
    let plan = |adapters| {
        let setup = Setup {
            dims: config.dims(),
            batch: 4,
            context: 256,
            gradients: Gradients::Fused(ADAMW),
            threads: 2,
            library: Cpu::library_bytes(2),
            ..setup(reversible(), adapters)
        };
        let choices = Cpu::rows().choices(setup.batch, setup.context);
        fit(None, choices, |choice| Gpt2::layout::<Cpu>(&setup, choice)).unwrap().2.total()
    };
    let of = |packing: Option<Packing>| {
        let frozen =
            packing.map_or(Frozen::default(), |p| frozen::packed(&config.dims(), p).unwrap());
        plan(Some(Adapters { shape: SHAPE, frozen }))
    };
    let (full, lora, bf16) = (plan(None), of(None), of(Some(Packing::Bf16)));
    println!("full {full}, adapters {lora}, with bf16 {bf16}");
    assert!(
        full <= 4_700_000_000 && lora <= 1_800_000_000 && bf16 <= 960_000_000,
        "{full} {lora} {bf16}"
    );
}

#[test]
fn settings_that_do_not_fit() {
    let lay = |shape| {
        let adapters = Some(Adapters::new(shape));
        let s = Setup { dims: small(), context: 8, ..setup(reversible(), adapters) };
        Gpt2::layout::<Cpu>(&s, Choice::new(1, 4)).unwrap_err().to_string()
    };
    assert!(lay(LoraShape { rank: 0, ..SHAPE }).contains("LoRA rank"));
    assert!(lay(LoraShape { rank: 13, ..SHAPE }).contains("1 up to the width"));
    assert!(lay(LoraShape { alpha: f64::NAN, ..SHAPE }).contains("LoRA alpha"));
}
