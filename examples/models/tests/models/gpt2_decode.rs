//! Decoding with a cache: the tokens of transformers' `generate` (`torch/gpt2_generate.py`), and
//! those of the whole forward pass for every token.

use core::ops::ControlFlow;

use crate::common::{Memory, bdia, data, float, quantized};
use bdia_core::backend::Backend;
use bdia_core::plan::Choice;
use bdia_core::rng::{Draw, Stream};
use bdia_core::{Error, Gamma, Layout, Real, Reference, Sign, Storage};
use bdia_cpu::Cpu;
use bdia_models::gpt2::config::Gpt2Config;
use bdia_models::gpt2::model::{Dims, Gpt2, Setup};
use bdia_models::inference::Inference;
use bdia_models::language::decode::{DecodeError, Decoder, Decoding, How, Progress, Sizes};
use bdia_models::sample::Sampler;
use bdia_models::search::Length;
use bdia_models::weights::Weights;
use serde_json::Value;

const MODEL: &str = "hf_generate";

fn setup(context: usize, threads: usize) -> Setup {
    let dims = Gpt2Config::read_dir(&data(MODEL)).unwrap().dims();
    Setup { threads, ..crate::common::setup(dims, 1, context, bdia(14, Sign::Plus)) }
}

/// The model and its decoder over the same arenas.
fn lay_out<B: Backend>(
    context: usize,
    threads: usize,
    sizes: &Sizes,
) -> (Gpt2, Decoder<Dims>, Layout) {
    let (model, mut layout) =
        Gpt2::layout::<B>(&setup(context, threads), Choice::new(1, 3)).unwrap();
    let (decoder, own) = Decoder::layout::<B>(&model, sizes).unwrap();
    layout.cover(&own);
    (model, decoder, layout)
}

fn load<B: Backend>(be: &mut B, model: &Gpt2) {
    let weights = Weights::read_dir(&data(MODEL)).unwrap();
    for t in model.tensors() {
        let mut values = vec![0.0; t.values.len()];
        weights.read(&t.name, &mut values).unwrap();
        be.write_reals(
            t.values,
            &values.iter().map(|&x| B::Real::of(x.into())).collect::<Vec<_>>(),
        )
        .unwrap();
    }
}

fn greedy(tokens: usize, inference: Inference) -> Decoding {
    Decoding {
        how: How::Search(Length::Power(1.0)),
        tokens,
        ends: Vec::new(),
        no_repeat: 0,
        inference,
    }
}

fn tokens(of: &Value) -> Vec<Vec<i32>> {
    serde_json::from_value(of.clone()).unwrap()
}

/// A setting of `generate`, and what follows each prompt.
struct Case {
    beams: usize,
    decoding: Decoding,
    follow: Vec<Vec<i32>>,
}

/// Prompts, and all settings.
fn fixture() -> (Vec<Vec<i32>>, Vec<Case>) {
    let file: Value =
        serde_json::from_slice(&std::fs::read(data(MODEL).join("generate.json")).unwrap()).unwrap();
    let cases = file["cases"].as_array().unwrap().iter().map(|c| {
        let decoding = Decoding {
            how: How::Search(Length::Power(c["length_penalty"].as_f64().unwrap())),
            tokens: file["tokens"].as_u64().unwrap() as usize,
            ends: vec![file["end"].as_i64().unwrap() as i32],
            no_repeat: c["no_repeat"].as_u64().unwrap() as usize,
            inference: float(0.0),
        };
        Case {
            beams: c["beams"].as_u64().unwrap() as usize,
            decoding,
            follow: tokens(&c["follow"]),
        }
    });
    (tokens(&file["prompts"]), cases.collect())
}

fn check<B: Backend>(
    be: &mut B,
    decoder: &Decoder<Dims>,
    prompts: &[Vec<i32>],
    d: &Decoding,
    expected: &[Vec<i32>],
) {
    let found = decoder.decode(be, prompts, d, |_| ControlFlow::Continue(())).unwrap();
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found, expected, "prompt {i}, {d:?}");
    }
    assert_eq!(found.len(), prompts.len());
}

/// Greedy and beam search, prompts of different lengths together or not, more of them than there is
/// room for.
#[test]
fn tokens_are_those_of_transformers() {
    let (prompts, cases) = fixture();
    assert!(cases.len() > 50);
    for (i, Case { beams, decoding: d, follow: expected }) in cases.iter().enumerate() {
        let sizes = Sizes::of(&prompts, [4, 1, 6][i % 3], *beams, d.tokens, 48);
        assert_eq!(sizes.context, 40);
        let (model, decoder, layout) = lay_out::<Cpu>(1, 2, &sizes);
        let mut be = Cpu::new(&layout, 2).unwrap();
        load(&mut be, &model);
        check(&mut be, &decoder, &prompts, d, expected);
        if i % 7 == 0 {
            let (model, decoder, layout) = lay_out::<Reference<'_, f64>>(1, 1, &sizes);
            let mut memory = Memory::<f64>::new(&layout);
            let mut be = memory.backend(&layout);
            load(&mut be, &model);
            check(&mut be, &decoder, &prompts, d, expected);
        }
    }
}

/// 30 tokens without a cache: the end of the text goes through the model for each of them.
fn whole<B: Backend>(
    be: &mut B,
    model: &mut Gpt2,
    prompt: &[i32],
    sampler: &Sampler,
    inference: Inference,
) -> Vec<i32> {
    let (mut all, mut order) = (prompt.to_vec(), Vec::new());
    let stream = Stream::new(5, 0, 0, 0, 0, Draw::Sample);
    for _ in 0..30 {
        let window = &all[all.len().saturating_sub(model.setup().context)..];
        let last = window.len() - 1;
        let logits = model.logits(be, window, last..last + 1, inference).unwrap();
        let logits: Vec<f32> = logits.iter().map(|x| x.wide() as f32).collect();
        all.push(sampler.choose(&logits, &stream, all.len() as u32, &mut order).unwrap() as i32);
    }
    all.split_off(prompt.len())
}

/// The most likely tokens and drawn ones, in every network, also beyond the context. Logits are not
/// compared: attention over a cache adds in another order.
#[test]
fn the_cache_changes_no_token() {
    const CONTEXT: usize = 24;
    let (prompts, _) = fixture();
    let samplers = [Sampler::GREEDY, Sampler { temperature: 1.5, top_k: 0, top_p: 0.95 }];
    let sizes = Sizes::of(&prompts, 1, 1, 30, CONTEXT);
    assert_eq!(sizes.context, CONTEXT);
    let (mut model, decoder, layout) = lay_out::<Cpu>(CONTEXT, 1, &sizes);
    let mut be = Cpu::new(&layout, 1).unwrap();
    load(&mut be, &model);
    for inference in [float(0.0), float(-0.3), quantized(0.0), quantized(0.5)] {
        for sampler in samplers {
            for prompt in prompts.iter().chain([&prompts.concat()]) {
                let expected = whole(&mut be, &mut model, prompt, &sampler, inference);
                let d = Decoding { how: How::Sample(sampler, 5), ..greedy(30, inference) };
                check(
                    &mut be,
                    &decoder,
                    core::slice::from_ref(prompt),
                    &d,
                    core::slice::from_ref(&expected),
                );
                if sampler == Sampler::GREEDY {
                    check(
                        &mut be,
                        &decoder,
                        core::slice::from_ref(prompt),
                        &greedy(30, inference),
                        &[expected],
                    );
                }
            }
        }
    }
}

/// A text is the same whatever is decoded beside it; with several beams beyond the context too.
#[test]
fn prompts_do_not_meet() {
    let (prompts, _) = fixture();
    for (beams, how) in [
        (1, How::Sample(Sampler { temperature: 1.0, top_k: 20, top_p: 1.0 }, 3)),
        (3, How::Search(Length::Power(0.9))),
    ] {
        let d = Decoding { how, no_repeat: 3, ends: vec![60], ..greedy(15, quantized(0.0)) };
        let all: Vec<_> = [6, 2]
            .map(|together| {
                let (model, decoder, layout) =
                    lay_out::<Cpu>(1, 2, &Sizes::of(&prompts, together, beams, 15, 16));
                let mut be = Cpu::new(&layout, 2).unwrap();
                load(&mut be, &model);
                let mut heard = (0, 0);
                let found = decoder
                    .decode(
                        &mut be,
                        &prompts,
                        &d,
                        |Progress { finished, taken: tokens, .. }| {
                            assert!(finished >= heard.0 && tokens > heard.1);
                            heard = (finished, tokens);
                            ControlFlow::Continue(())
                        },
                    )
                    .unwrap();
                assert_eq!(heard.0, prompts.len());
                assert!(heard.1 >= found.iter().map(Vec::len).sum());
                found
            })
            .into();
        assert_eq!(all[0], all[1], "{how:?}");
        for (prompt, text) in prompts.iter().zip(&all[0]) {
            let whole = [prompt.as_slice(), text].concat();
            for at in prompt.len()..whole.len() {
                let repeated =
                    (0..at.saturating_sub(2)).any(|i| whole[i..i + 3] == whole[at - 2..=at]);
                assert!(at < 2 || !repeated, "{whole:?}");
            }
        }
    }
}

#[test]
fn what_cannot_be_decoded() {
    let sizes = Sizes { prompts: 2, beams: 2, context: 20 };
    let (model, decoder, layout) = lay_out::<Cpu>(1, 1, &sizes);
    let mut be = Cpu::new(&layout, 1).unwrap();
    load(&mut be, &model);
    let d = greedy(3, float(0.0));
    let mut refused = |prompts: &[Vec<i32>], d: &Decoding| -> String {
        decoder.decode(&mut be, prompts, d, |_| ControlFlow::Continue(())).unwrap_err().to_string()
    };
    assert!(refused(&[vec![1], vec![]], &d).contains("tokens of a prompt"));
    assert!(refused(&[vec![1, 61]], &d).contains("vocabulary"), "{}", refused(&[vec![1, 61]], &d));
    let drawn = Decoding { how: How::Sample(Sampler::GREEDY, 1), ..d.clone() };
    assert!(refused(&[vec![1]], &drawn).contains("beams of a sample"));
    // On the grid there is no such network.
    assert!(Gamma::from_value(0.3, Sign::Plus).unwrap_err().to_string().contains("0.3"));
    assert!(decoder.decode(&mut be, &[], &d, |_| ControlFlow::Continue(())).unwrap().is_empty());
    assert_eq!(
        decoder
            .decode(&mut be, &[vec![1]], &greedy(0, float(0.0)), |_| ControlFlow::Continue(()))
            .unwrap(),
        [Vec::<i32>::new()]
    );
    let bias = model.tensors().into_iter().find(|t| t.name == "ln_f.bias").unwrap();
    be.fill_reals(bias.values.sub(0, 1), f32::NAN).unwrap();
    assert!(matches!(
        decoder.decode(&mut be, &[vec![1]], &d, |_| ControlFlow::Continue(())),
        Err(DecodeError::Sample(_) | DecodeError::Core(_))
    ));
    for sizes in
        [Sizes { prompts: 0, ..sizes }, Sizes { beams: 0, ..sizes }, Sizes { context: 49, ..sizes }]
    {
        assert!(matches!(
            Decoder::layout::<Cpu>(&model, &sizes),
            Err(Error::Setting { .. } | Error::Shape { .. })
        ));
    }
}
