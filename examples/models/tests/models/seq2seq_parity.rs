//! Logits, loss and every gradient against PyTorch's own `torch.nn.Transformer`
//! (`torch/translation_f64.py`), in f64.

use crate::common::{Memory, SGD, STANDARD, STILL, State, bdia, bdia_float, verified};
use bdia_core::layers::Gradients;
use bdia_core::network::Step;
use bdia_core::stack::Mode;
use bdia_core::{Reference, Sign};
use bdia_models::inference::Inference;
use bdia_models::seq2seq::decode::{Search, Sizes};
use bdia_models::seq2seq::model::{Dims, Setup, Tokens, Translator};

/// A state file and its sentences.
fn state(name: &str) -> (State, Vec<Tokens>) {
    let s = crate::common::state(&format!("seq2seq/{name}_f64.safetensors"));
    let rows = |key: &str| -> Vec<Vec<i32>> {
        s.meta[key]
            .split(';')
            .map(|row| row.split(' ').map(|t| t.parse().unwrap()).collect())
            .collect()
    };
    let pairs = rows("sources").into_iter().zip(rows("targets"));
    let pairs = pairs.map(|(source, target)| Tokens { source, target }).collect();
    (s, pairs)
}

fn setup(s: &State, mode: Mode) -> Setup {
    let vocab = [s.size("source_vocab"), s.size("target_vocab")];
    Setup {
        dims: Dims {
            vocab,
            shared: vocab[0] == vocab[1],
            longest: s.size("longest"),
            width: s.size("width"),
            layers: [s.size("encoder_layers"), s.size("decoder_layers")],
            heads: s.size("heads"),
            inner: s.size("mlp"),
            eps: 1e-5,
            dropout: [0.0; 4],
        },
        mode,
        // The learning rate is 0, so that the parameters stay; gradients are kept in full
        // buffers.
        gradients: Gradients::Full(SGD),
        blocks_per_step: 1,
        adapters: None,
        smoothing: s.number("smoothing"),
        head_rows: 5,
        threads: 1,
        library: 0,
    }
}

const STEP: Step = Step { seed: 1, ..STILL };

/// Both add in f64, in different orders: a few hundred roundings of 1e-16.
fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-11 * (1.0 + b.abs())
}

#[test]
fn logits_loss_and_all_gradients_are_those_of_pytorch() {
    for name in ["shared", "separate"] {
        for chunk in [1, 3, 4] {
            let (s, pairs) = state(name);
            let batch: Vec<_> = pairs.iter().collect();
            let shape = Translator::shape_of(&batch, chunk);
            let (mut model, layout) =
                Translator::layout::<Reference<'_, f64>>(&setup(&s, STANDARD), &[shape], |_| {
                    Ok(Vec::new())
                })
                .unwrap();
            let mut memory = Memory::<f64>::new(&layout);
            let mut be = memory.backend(&layout);
            let tensors = model.tensors();
            s.load(&mut be, &tensors);

            let (vocab, width) = (s.size("target_vocab"), s.size("width"));
            let mut seen = 0;
            model
                .evaluate(&mut be, &batch, chunk, Inference::STANDARD, |be, part, first, x| {
                    let rows = x.len() / width;
                    for row in 0..rows {
                        let (sample, position) = (first + row / shape.target, row % shape.target);
                        if position > batch[sample].target.len() {
                            continue;
                        }
                        let logits =
                            part.head.logits(be, x.sub(row * width, width), part.scratch())?;
                        let at = (sample * shape.target + position) * vocab;
                        for (i, (&a, &b)) in
                            be.reals(logits)?.iter().zip(&s.reals["logits"][at..]).enumerate()
                        {
                            assert!(
                                close(a, b),
                                "{name}: sample {sample}, position {position}, logit {i}: {a} {b}"
                            );
                            seen += 1;
                        }
                    }
                    Ok(())
                })
                .unwrap();
            assert_eq!(seen, vocab * batch.iter().map(|t| t.target.len() + 1).sum::<usize>());

            let outcome = model.train(&mut be, &STEP, &[(&batch, chunk)]).unwrap();
            assert!(
                close(outcome.loss, s.reals["loss"][0]),
                "{name}: {} {}",
                outcome.loss,
                s.reals["loss"][0]
            );
            for (t, expected) in tensors.iter().zip(s.of("grad", &tensors)) {
                let found = be.reals(t.gradient).unwrap();
                for (i, (&a, &b)) in found.iter().zip(&expected).enumerate() {
                    assert!(close(a, b), "{name}: gradient of {}[{i}]: {a} {b}", t.name);
                }
            }
        }
    }
}

/// A network with adapters computes what the network computes whose matrices they were added to,
/// of which PyTorch says that it is right.
#[test]
fn adapters_have_the_gradients_of_the_merged_network() {
    for name in ["shared", "separate"] {
        let (s, pairs) = state(name);
        let batch: Vec<_> = pairs.iter().collect();
        let shape = Translator::shape_of(&batch, 3);
        let lay_out = |setup: &Setup| {
            let none = |_: &Translator| Ok(Vec::new());
            Translator::layout::<Reference<'_, f64>>(setup, &[shape], none).unwrap()
        };
        let plain = setup(&s, STANDARD);
        let (mut model, layout) =
            lay_out(&Setup { adapters: Some(crate::common::ADAPTERS), ..plain });
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        s.load(&mut be, &model.tensors());
        let trained = model.trained();
        assert!(trained.iter().all(|t| t.is_adapter()));
        let adapters = crate::common::set_adapters(&mut be, &trained);
        assert_eq!(adapters.len(), 2 * plain.dims.layers.iter().sum::<usize>());
        let outcome = model.train(&mut be, &STEP, &[(&batch, 3)]).unwrap();

        let (mut whole, layout) = lay_out(&plain);
        let mut memory = Memory::<f64>::new(&layout);
        let mut merged = memory.backend(&layout);
        let tensors = whole.tensors();
        s.load(&mut merged, &tensors);
        crate::common::add_adapters(&mut merged, &tensors, &adapters);
        let expected = whole.train(&mut merged, &STEP, &[(&batch, 3)]).unwrap();
        assert!(close(outcome.loss, expected.loss), "{name}: {outcome:?} {expected:?}");
        let all = crate::common::gradients_of_adapters(&merged, &tensors, &adapters);
        assert_eq!(all.len(), trained.len());
        for (t, expected) in trained.iter().zip(all) {
            let found = be.reals(t.gradient).unwrap();
            assert_eq!(found.len(), expected.len());
            for (i, (&a, &b)) in found.iter().zip(&expected).enumerate() {
                assert!(close(a, b), "{name}: gradient of {}[{i}]: {a} {b}", t.name);
            }
        }
    }
}

/// On the grid the same gradients come out up to its fineness, and every rebuilt activation of both
/// stacks is exact.
#[test]
fn reversible_training_gives_the_gradients_of_its_own_forward_pass() {
    let (s, pairs) = state("shared");
    let batch: Vec<_> = pairs.iter().collect();
    let mut all = Vec::new();
    for mode in [bdia(20, Sign::Random), bdia_float(Sign::Random)] {
        let shape = Translator::shape_of(&batch, 3);
        let (mut model, layout) =
            Translator::layout::<Reference<'_, f64>>(&setup(&s, verified(mode)), &[shape], |_| {
                Ok(Vec::new())
            })
            .unwrap();
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        s.load(&mut be, &model.tensors());
        let outcome = model.train(&mut be, &STEP, &[(&batch, 3)]).unwrap();
        assert_eq!(outcome.rebuilt.mismatches, 0);
        let grads: Vec<f64> =
            model.tensors().iter().flat_map(|t| be.reals(t.gradient).unwrap().to_vec()).collect();
        all.push((outcome.loss, grads));
    }
    // Rounding to 2^-20 at every block, with slopes of order one.
    assert!((all[0].0 - all[1].0).abs() < 1e-4, "{} {}", all[0].0, all[1].0);
    assert!(all[0].1.iter().zip(&all[1].1).all(|(x, y)| (x - y).abs() < 1e-4 * (1.0 + y.abs())));
}

/// The search with a cache finds what a search without one finds: every prefix through the whole
/// decoder, again and again.
#[test]
fn the_cache_changes_no_translation() {
    let (s, pairs) = state("separate");
    let sizes = Sizes { sentences: 4, beams: 3, longest: s.size("longest") };
    let one = |t: &Tokens| Translator::shape_of(&[t], 1);
    let shapes = [one(&Tokens { source: vec![3; 6], target: vec![3; 6] })];
    let (mut model, layout) =
        Translator::layout::<Reference<'_, f64>>(&setup(&s, STANDARD), &shapes, |m| {
            Ok(vec![m.decoding_layout::<Reference<'_, f64>>(&sizes)?])
        })
        .unwrap();
    let mut memory = Memory::<f64>::new(&layout);
    let mut be = memory.backend(&layout);
    s.load(&mut be, &model.tensors());
    let sources: Vec<_> = pairs.iter().map(|p| p.source.as_slice()).collect();
    let (vocab, width) = (s.size("target_vocab"), s.size("width"));

    // Log-probabilities of what follows a prefix, through the whole decoder.
    let mut next = |be: &mut Reference<'_, f64>, source: &[i32], prefix: &[i32]| -> Vec<f64> {
        let pair = Tokens { source: source.to_vec(), target: prefix.to_vec() };
        let mut out = Vec::new();
        model
            .evaluate(be, &[&pair], 1, Inference::STANDARD, |be, part, _, x| {
                let last = x.sub(x.len() - width, width);
                let logits = part.head.logits(be, last, part.scratch())?;
                out = be.reals(logits)?.to_vec();
                Ok(())
            })
            .unwrap();
        let sum: f64 = out.iter().map(|x| x.exp()).sum();
        out.iter().map(|x| x - sum.ln()).collect()
    };
    let mut expected = Vec::new();
    for beams in [1, 3] {
        for source in &sources {
            // (tokens, score); an end is no token.
            let (mut live, mut done) = (vec![(Vec::new(), 0.0)], Vec::new());
            for position in 0..sizes.longest {
                let mut all: Vec<(Vec<i32>, f64)> = Vec::new();
                for (tokens, score) in &live {
                    for (token, p) in (0..vocab as i32).zip(next(&mut be, source, tokens)) {
                        if token > 1 {
                            let mut longer: Vec<i32> = tokens.clone();
                            longer.push(token);
                            all.push((longer, score + p));
                        }
                    }
                }
                all.sort_by(|a, b| b.1.total_cmp(&a.1));
                live.clear();
                for (rank, (mut tokens, score)) in all.into_iter().take(2 * beams).enumerate() {
                    if tokens.last() == Some(&2) {
                        tokens.pop();
                        if rank < beams {
                            done.push((tokens, score));
                        }
                    } else if live.len() < beams {
                        live.push((tokens, score));
                    }
                }
                if done.len() >= beams || position + 1 == sizes.longest.min(2 * source.len() + 16) {
                    break;
                }
            }
            let value =
                |h: &(Vec<i32>, f64)| h.1 / ((5.0 + h.0.len() as f64 + 1.0) / 6.0).powf(0.6);
            let from = if done.is_empty() { live } else { done };
            let best = from.iter().max_by(|a, b| value(a).total_cmp(&value(b))).unwrap();
            expected.push(best.0.clone());
        }
    }
    let mut found = Vec::new();
    for beams in [1, 3] {
        let search = Search { beams, alpha: 0.6, inference: Inference::STANDARD };
        found.extend(
            model.translate(&mut be, &sources, &Sizes { beams, ..sizes }, &search).unwrap(),
        );
    }
    assert_eq!(found, expected);
    // Too many, too long.
    let search = Search { beams: 3, alpha: 0.6, inference: Inference::STANDARD };
    let long = [3; 7];
    let error = model.translate(&mut be, &[&long], &sizes, &search).unwrap_err().to_string();
    assert!(error.contains("positions of a sentence"), "{error}");
}
