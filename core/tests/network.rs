//! The optimizer step: what it refuses, what it leaves alone when numbers go wrong, and that it
//! computes the same however a batch is cut.
#![allow(clippy::unwrap_used)]

use bdia_core::backend::{Backend, Chunk};
use bdia_core::layers::{
    BlockShape, Freeze, Gradients, LmHead, LoraShape, Mlp, PreNorm, SelfAttention, Tensors,
    TokenEmbedding,
};
use bdia_core::network::{
    self, Chain, Group, Lm, LmShape, Loaded, Loss, Micro, Network, Outcome, Rebuilt, Step, Training,
};
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::rng::philox;
use bdia_core::stack::{Head, Mode, Pass};
use bdia_core::{
    Category, Error, Fault, FloatGamma, Grid, Layout, Policy, Real, Reals, Reference, Result, Sign,
    Site, Storage,
};

const BATCH: usize = 4;
const TOKENS: usize = 5;
const VOCAB: usize = 7;
const BLOCKS: usize = 4;

const BDIA: Mode = Mode::Bdia { grid: Grid::DEFAULT, gamma: Policy::PAPER, verify: true };

fn modes() -> [Mode; 5] {
    let gamma = FloatGamma::new(0.3, Sign::Random).unwrap();
    [
        BDIA,
        Mode::Standard { grid: None },
        Mode::Standard { grid: Some(Grid::DEFAULT) },
        Mode::Checkpoint { every: 2, grid: None },
        Mode::BdiaFloat { gamma, verify: true },
    ]
}

fn training(mode: Mode, gradients: Gradients, micro_batches: usize) -> Training {
    let choice = Choice::new(2, 3);
    let batch = BATCH / micro_batches;
    Training { micro_batches, choice, ..Training::new(mode, batch, gradients) }
}

fn lay_out<R: Real>(t: &Training, lora: Option<LoraShape>) -> (Lm, Layout) {
    lay_out_steps::<R>(t, lora, 1)
}

/// The stack steps over `n` blocks at once.
fn lay_out_steps<R: Real>(t: &Training, lora: Option<LoraShape>, n: usize) -> (Lm, Layout) {
    lay_out_width::<R>(t, lora, n, 8)
}

fn lay_out_width<R: Real>(
    t: &Training,
    lora: Option<LoraShape>,
    n: usize,
    width: usize,
) -> (Lm, Layout) {
    let block = BlockShape {
        attention_dropout: 0.1,
        residual_dropout: 0.2,
        ..BlockShape::gpt2(TOKENS, width, 2, BLOCKS)
    };
    let shape = LmShape { vocab: VOCAB, positions: TOKENS, eps: 1e-5, tied: true, dropout: 0.1 };
    let mut layout = Layout::new(R::BYTES);
    let kept = t.gradients.of_steps(n);
    let blocks = PreNorm::layout(&block, BLOCKS, lora, t.freeze, kept, &mut layout).unwrap();
    let blocks = blocks.step_over(n).unwrap();
    let lm = Lm::layout::<Reference<'_, R>>(&shape, blocks, t, &mut layout).unwrap();
    (lm, layout.checked().unwrap())
}

/// Arenas full of garbage.
struct Memory<R>(Layout, Vec<i32>, Vec<R>, Vec<u32>);

impl<R: Real> Memory<R> {
    fn new(layout: Layout) -> Self {
        let (i, r, w) = layout.arenas();
        Self(layout, vec![i32::MIN; i], vec![R::nan(); r], vec![0xA5A5_A5A5; w])
    }

    fn backend(&mut self) -> Reference<'_, R> {
        Reference::new(&self.0, &mut self.1, &mut self.2, &mut self.3).unwrap()
    }
}

/// Token `t` of sample `i` of the whole batch of step `step`, and whether its target is masked:
/// none of the first sample, one of three of the others.
fn token(step: u32, i: usize, t: usize) -> (i32, bool) {
    let word = philox(9, [step, i as u32, t as u32, 0])[0] as usize;
    ((word % VOCAB) as i32, i > 0 && word.is_multiple_of(3))
}

/// The micro-batch `index` of a step.
fn load<R: Real>(lm: &Lm, be: &mut Reference<'_, R>, step: u32, index: usize) -> Result<Loaded> {
    let batch = lm.stack.config().batch;
    let all = |shift: usize, masked: bool| -> Vec<i32> {
        let place = |n: usize| (index * batch + n / TOKENS, n % TOKENS + shift);
        (0..batch * TOKENS)
            .map(place)
            .map(|(i, t)| match token(step, i, t) {
                (_, true) if masked => -1,
                (token, _) => token,
            })
            .collect()
    };
    lm.load(be, index, &all(0, false), &all(1, true))
}

fn settings(step: u32) -> Step {
    Step { step, seed: 3, lr: 0.01, weight_decay: 0.1, clip: 0.0 }
}

fn one_step<R: Real>(lm: &mut Lm, be: &mut Reference<'_, R>, step: &Step) -> Result<Outcome> {
    network::step(lm, be, step, |lm, be, index| load(lm, be, step.step, index))
}

/// Bits of everything that a run continues from: parameters and optimizer state.
fn state<R: Real>(lm: &Lm, be: &Reference<'_, R>) -> Vec<u64> {
    let mut bits = Vec::new();
    let reals = |bits: &mut Vec<u64>, h: Reals| {
        bits.extend(be.reals(h).unwrap().iter().map(|x| x.wide().to_bits()));
    };
    Network::<Reference<'_, R>>::groups(lm, &mut |group| {
        for k in 0..group.params.groups() {
            group.tensors.each(&mut |t| {
                reals(&mut bits, group.params.value(k, t));
                let state = group.params.state(k, t, group.tensors);
                state.reals.into_iter().for_each(|h| reals(&mut bits, h));
                for codes in state.codes {
                    bits.extend(be.words(codes).unwrap().iter().map(|&x| u64::from(x)));
                }
                Ok(())
            })?;
        }
        Ok(())
    })
    .unwrap();
    bits
}

/// All gradients, with [`Gradients::Full`].
fn gradients<R: Real>(lm: &Lm, be: &Reference<'_, R>) -> Vec<f64> {
    let mut all = Vec::new();
    Network::<Reference<'_, R>>::groups(lm, &mut |group| {
        for k in 0..group.params.groups() {
            group.tensors.each(&mut |t| {
                let gradient = be.reals(group.params.gradient(k, t))?;
                all.extend(gradient.iter().map(|x| x.wide()));
                Ok(())
            })?;
        }
        Ok(())
    })
    .unwrap();
    all
}

#[test]
fn a_language_model_learns_in_every_mode() {
    for mode in modes() {
        for gradients in [
            Gradients::Fused(Rule::ADAM_W),
            Gradients::Full(Rule::SET_ADAM),
            Gradients::Fused(Rule::ADAFACTOR),
        ] {
            let (mut lm, layout) = lay_out::<f32>(&training(mode, gradients, 1), None);
            let mut memory = Memory::<f32>::new(layout);
            let mut be = memory.backend();
            lm.initialize(&mut be, 1).unwrap();
            let mut losses = Vec::new();
            for number in 0..60 {
                let step = Step { step: number, ..settings(0) };
                // The same batch again and again.
                let outcome =
                    network::step(&mut lm, &mut be, &step, |lm, be, index| load(lm, be, 0, index))
                        .unwrap();
                assert_eq!((outcome.items, outcome.rebuilt.mismatches), (BATCH * TOKENS, 0));
                assert!(outcome.targets < BATCH * TOKENS && outcome.grad_norm > 0.0);
                losses.push(outcome.loss);
            }
            let first = (VOCAB as f64).ln();
            assert!((losses[0] - first).abs() < 0.1, "{mode:?}: {} {first}", losses[0]);
            assert!(losses[59] < 0.8 * losses[0], "{mode:?} {gradients:?}: {losses:?}");
        }
    }
}

/// Blocks that update themselves, and the same after the pass: not one bit differs.
#[test]
fn fused_updates_are_the_same_updates() {
    for mode in modes() {
        let mut seen = Vec::new();
        for gradients in [Gradients::Fused(Rule::ADAM_W), Gradients::Full(Rule::ADAM_W)] {
            let (mut lm, layout) = lay_out::<f32>(&training(mode, gradients, 1), None);
            let mut memory = Memory::<f32>::new(layout);
            let mut be = memory.backend();
            lm.initialize(&mut be, 1).unwrap();
            let outcomes: Vec<_> =
                (0..3).map(|n| one_step(&mut lm, &mut be, &settings(n)).unwrap()).collect();
            seen.push((state(&lm, &be), outcomes));
        }
        assert!(seen[0] == seen[1], "{mode:?}");
    }
}

/// The same for rules whose state depends on the shapes of tensors, some of which have 4,096
/// values, with blocks that are finished together as well.
#[test]
fn fused_updates_of_every_state() {
    for (rule, n) in [(Rule::ADAM_W_8BIT, 1), (Rule::ADAM_W_8BIT, 3), (Rule::ADAFACTOR, 3)] {
        let mut seen = Vec::new();
        for gradients in [Gradients::Fused(rule), Gradients::Full(rule)] {
            let training = training(BDIA, gradients, 1);
            let (mut lm, layout) = lay_out_width::<f32>(&training, None, n, 32);
            let [state_bytes, values] =
                [Category::Optimizer, Category::Parameters].map(|c| layout.bytes(c));
            assert!(state_bytes < 3 * values / 2, "{state_bytes} {values}");
            let mut memory = Memory::<f32>::new(layout);
            let mut be = memory.backend();
            lm.initialize(&mut be, 1).unwrap();
            let outcomes: Vec<_> =
                (0..3).map(|n| one_step(&mut lm, &mut be, &settings(n)).unwrap()).collect();
            seen.push((state(&lm, &be), outcomes));
        }
        assert!(seen[0] == seen[1], "{rule:?}, {n} blocks");
    }
}

/// However many blocks a step has, it is the same network with the same dropout: the gradients
/// differ by rounding. Rebuilt activations are exact, blocks that update themselves are updated to
/// the same bits, and side bits are stored once for a step.
#[test]
fn steps_over_several_blocks() {
    let sgd = Gradients::Full(Rule::Sgd { momentum: 0.0 });
    let mut gradient: Option<Vec<f64>> = None;
    let mut side_bits = Vec::new();
    for n in 1..=BLOCKS + 1 {
        let standard = training(Mode::Standard { grid: None }, sgd, 1);
        let (mut lm, layout) = lay_out_steps::<f64>(&standard, None, n);
        let mut memory = Memory::<f64>::new(layout);
        let mut be = memory.backend();
        lm.initialize(&mut be, 1).unwrap();
        one_step(&mut lm, &mut be, &settings(2)).unwrap();
        let found = gradients(&lm, &be);
        let expected = gradient.get_or_insert_with(|| found.clone());
        let distance = found.iter().zip(&*expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(distance < 1e-14, "steps of {n} blocks: {distance:e}");

        for mode in modes() {
            let mut seen = Vec::new();
            for kept in [Gradients::Fused(Rule::ADAM_W), Gradients::Full(Rule::ADAM_W)] {
                let (mut lm, layout) = lay_out_steps::<f32>(&training(mode, kept, 1), None, n);
                if mode == BDIA && kept.fused() {
                    side_bits.push(layout.bytes(Category::SideBits));
                }
                let mut memory = Memory::<f32>::new(layout);
                let mut be = memory.backend();
                lm.initialize(&mut be, 1).unwrap();
                let outcomes: Vec<_> =
                    (0..3).map(|i| one_step(&mut lm, &mut be, &settings(i)).unwrap()).collect();
                assert!(outcomes.iter().all(|o| o.rebuilt.mismatches == 0), "{mode:?} {n}");
                seen.push((state(&lm, &be), outcomes));
            }
            assert!(seen[0] == seen[1], "{mode:?}, steps of {n} blocks");
        }
    }
    // Four steps, two, two, one and one. The last two steps of a stack store no side bits.
    let [four, two, also_two, one, also_one] = side_bits[..] else { panic!("{side_bits:?}") };
    assert!(four > two && two == also_two && two >= one && one == also_one, "{side_bits:?}");

    let block = BlockShape::gpt2(TOKENS, 8, 2, BLOCKS);
    for (kept, n) in [(sgd, 0), (Gradients::Fused(Rule::ADAM_W), 2)] {
        let mut layout = Layout::new(4);
        let blocks =
            PreNorm::layout(&block, BLOCKS, None, Freeze::Nothing, kept, &mut layout).unwrap();
        let error = blocks.step_over(n).unwrap_err();
        assert!(matches!(error, Error::Setting { what: "blocks of a step", .. }), "{error}");
    }
}

/// A batch at once, in two micro-batches and in four: the same loss, and the same gradients up to
/// the order of their sums, with masks that differ from sample to sample, dropout and random signs.
#[test]
fn micro_batches_add_up_to_the_batch() {
    for mode in modes() {
        let mut first: Option<(Outcome, Vec<f64>)> = None;
        for micro_batches in [1, 2, 4] {
            let rule = Gradients::Full(Rule::Sgd { momentum: 0.0 });
            let (mut lm, layout) = lay_out::<f64>(&training(mode, rule, micro_batches), None);
            let mut memory = Memory::<f64>::new(layout);
            let mut be = memory.backend();
            lm.initialize(&mut be, 1).unwrap();
            let mut asked = Vec::new();
            let step = settings(2);
            let found = network::step(&mut lm, &mut be, &step, |lm, be, index| {
                asked.push(index);
                load(lm, be, 2, index)
            });
            let found = (found.unwrap(), gradients(&lm, &be));
            let twice: Vec<_> = (0..micro_batches).chain(0..micro_batches).collect();
            assert_eq!(asked, if micro_batches == 1 { vec![0] } else { twice });
            let (outcome, gradients) = first.get_or_insert_with(|| found.clone());
            assert_eq!(
                (outcome.loss.to_bits(), outcome.targets, outcome.items),
                (found.0.loss.to_bits(), found.0.targets, found.0.items),
                "{mode:?}, {micro_batches} micro-batches"
            );
            let largest = gradients.iter().fold(0.0_f64, |m, g| m.max(g.abs()));
            for (a, b) in gradients.iter().zip(&found.1) {
                // Sums of some dozens of terms in another order.
                assert!((a - b).abs() < 1e-13 * largest, "{mode:?} {micro_batches}: {a} {b}");
            }
            assert!((outcome.grad_norm - found.0.grad_norm).abs() < 1e-13 * outcome.grad_norm);
        }
    }
}

/// The norm is that of the whole gradient, and a gradient that is clipped has the length asked for.
#[test]
fn clipping_shortens_the_gradient() {
    let rule = Gradients::Full(Rule::Sgd { momentum: 0.0 });
    let (mut lm, layout) = lay_out::<f64>(&training(BDIA, rule, 1), None);
    let mut memory = Memory::<f64>::new(layout);
    let mut be = memory.backend();
    let mut run = |clip: f64| {
        lm.initialize(&mut be, 1).unwrap();
        let before = state(&lm, &be);
        let step = Step { lr: 1.0, weight_decay: 0.0, clip, ..settings(0) };
        let outcome = one_step(&mut lm, &mut be, &step).unwrap();
        let moved: Vec<f64> = before
            .iter()
            .zip(state(&lm, &be))
            .map(|(&a, b)| f64::from_bits(a) - f64::from_bits(b))
            .collect();
        let norm = gradients(&lm, &be).iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!((norm - outcome.grad_norm).abs() < 1e-12 * norm);
        (outcome.grad_norm, moved)
    };
    let (norm, whole) = run(0.0);
    let (again, half) = run(norm / 2.0);
    let (_, far) = run(2.0 * norm);
    assert_eq!(norm.to_bits(), again.to_bits());
    assert!(whole == far);
    assert!(whole.iter().zip(&half).all(|(a, b)| (0.5 * a - b).abs() < 1e-12 * norm));
}

#[test]
fn steps_that_cannot_be_made_are_refused() {
    let cases = [
        (Gradients::None, 1, settings(0), "optimizer"),
        (Gradients::Fused(Rule::ADAM_W), 1, Step { clip: 1.0, ..settings(0) }, "clip"),
        (Gradients::Full(Rule::ADAM_W), 1, Step { clip: f64::NAN, ..settings(0) }, "clip"),
        (Gradients::Full(Rule::ADAM_W), 1, Step { clip: -1.0, ..settings(0) }, "clip"),
        (Gradients::Fused(Rule::ADAM_W), 2, settings(0), "micro-batches"),
        (Gradients::Full(Rule::ADAM_W), 0, settings(0), "micro-batches"),
        (Gradients::Fused(Rule::ADAM_W), 1, Step { lr: f64::NAN, ..settings(0) }, "lr"),
        (Gradients::Full(Rule::ADAM_W), 1, Step { lr: f64::INFINITY, ..settings(0) }, "lr"),
    ];
    for (kept, micro_batches, step, name) in cases {
        let (mut lm, layout) = lay_out::<f32>(&training(BDIA, kept, 1), None);
        let mut memory = Memory::<f32>::new(layout);
        let mut be = memory.backend();
        lm.initialize(&mut be, 1).unwrap();
        let before = state(&lm, &be);
        lm.micro_batches = micro_batches;
        let error = one_step(&mut lm, &mut be, &step).unwrap_err();
        let named = matches!(error, Error::Setting { what, .. } if what == name);
        assert!(named, "{name}: {error}");
        assert!(state(&lm, &be) == before, "{name}");
    }
    // In words, without a "NaN".
    let (mut lm, layout) = lay_out::<f32>(&training(BDIA, Gradients::None, 1), None);
    let mut memory = Memory::<f32>::new(layout);
    let error = one_step(&mut lm, &mut memory.backend(), &settings(0)).unwrap_err();
    assert_eq!(error.to_string(), "optimizer is missing; possible: one, to train");
}

/// A language model whose author has forgotten something.
struct Forgetful {
    lm: Lm,
    forgets: Forgets,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Forgets {
    Nothing,
    TheEnds,
    TheBlocks,
    ATensor,
    TheOptimizer,
}

impl<B: Backend> Network<B> for Forgetful {
    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        let mut number = 0;
        Network::<B>::groups(&self.lm, &mut |group| {
            number += 1;
            match (self.forgets, number) {
                (Forgets::TheBlocks, 1) | (Forgets::TheEnds, 2) => Ok(()),
                (Forgets::ATensor, 2) => {
                    let tensors = self.lm.outside.first_chunk::<3>().unwrap();
                    each(&Group { tensors, ..*group })
                }
                _ => each(group),
            }
        })
    }

    fn trained(&self) -> usize {
        self.lm.trained
    }

    fn pass(&mut self, be: &mut B, pass: &Pass, micro: &Micro) -> Result<()> {
        if self.forgets != Forgets::TheOptimizer {
            return self.lm.pass(be, pass, micro);
        }
        let Lm { stack, blocks, input, head, .. } = &mut self.lm;
        stack.train(be, blocks, input, head, pass)
    }

    fn micro_batches(&self) -> usize {
        Network::<B>::micro_batches(&self.lm)
    }

    fn loss(&self, be: &B) -> Result<f64> {
        Network::<B>::loss(&self.lm, be)
    }

    fn rebuilt(&self, be: &B) -> Result<Rebuilt> {
        self.lm.rebuilt(be)
    }
}

#[test]
fn what_a_network_forgets_is_an_error() {
    let run = |forgets, kept| {
        let (lm, layout) = lay_out::<f32>(&training(BDIA, kept, 1), None);
        let mut memory = Memory::<f32>::new(layout);
        let mut be = memory.backend();
        lm.initialize(&mut be, 1).unwrap();
        let before = state(&lm, &be);
        let mut net = Forgetful { lm, forgets };
        let load =
            |net: &mut Forgetful, be: &mut Reference<'_, f32>, index| load(&net.lm, be, 0, index);
        let outcome = network::step(&mut net, &mut be, &settings(0), load);
        assert_eq!(state(&net.lm, &be) == before, outcome.is_err(), "{forgets:?}");
        outcome.map(|_| ())
    };
    for kept in [Gradients::Fused(Rule::ADAM_W), Gradients::Full(Rule::ADAM_W)] {
        assert_eq!(run(Forgets::Nothing, kept), Ok(()));
        for (forgets, name) in [
            (Forgets::TheBlocks, "values in the network's groups"),
            (Forgets::TheEnds, "values in the network's groups"),
            (Forgets::ATensor, "values in a group's tensors"),
        ] {
            let error = run(forgets, kept).unwrap_err();
            assert!(matches!(error, Error::Shape { what, .. } if what == name), "{error}");
        }
    }
    let error = run(Forgets::TheOptimizer, Gradients::Fused(Rule::ADAM_W)).unwrap_err();
    assert!(matches!(error, Error::Setting { what: "optimizer of the step", .. }), "{error}");
}

/// What [`Poisoned`] does to the gradient or to a parameter.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Poison {
    Nothing,
    Gradient(f64),
}

/// A head of one's own in a [`Chain`]: that of a language model, with gradients that go wrong.
struct Poisoned {
    head: LmHead,
    poison: Poison,
}

impl<B: Backend> Head<B> for Poisoned {
    fn forward_backward(
        &mut self,
        be: &mut B,
        chunk: &Chunk,
        x: Reals,
        gx: Reals,
        scratch: Reals,
    ) -> Result<()> {
        self.head.forward_backward(be, chunk, x, gx, scratch)?;
        match self.poison {
            Poison::Gradient(value) if chunk.first > 0 => {
                be.write_reals(gx.sub(3, 1), &[B::Real::of(value)])
            }
            _ => Ok(()),
        }
    }
}

impl<B: Backend> Loss<B> for Poisoned {
    fn begin(&mut self, micro: &Micro) {
        Loss::<B>::begin(&mut self.head, micro);
    }

    fn loss(&self, be: &B, micro_batches: usize) -> Result<f64> {
        Loss::<B>::loss(&self.head, be, micro_batches)
    }
}

/// Whether a step ended with a gradient of the second chunk's first sample from there.
fn gave<T>(error: &Result<T>, from: Site) -> bool {
    matches!(
        error,
        Err(Error::Fault(Fault::ActivationGradient { site, sample: 2, .. })) if *site == from
    )
}

type Unlucky = Chain<TokenEmbedding, (SelfAttention, Mlp), Poisoned, 5>;

/// Parameters and optimizer state are as before the step when its numbers go wrong, and the next
/// step is as good as ever.
#[test]
fn a_step_whose_numbers_go_wrong_changes_nothing() {
    for mode in modes() {
        for kept in [Gradients::Fused(Rule::ADAM_W), Gradients::Full(Rule::ADAM_W)] {
            let (lm, layout) = lay_out::<f32>(&training(mode, kept, 1), None);
            let Lm { stack, blocks, input, head, ends, outside, trained, micro_batches } = lm;
            let head = Poisoned { head, poison: Poison::Nothing };
            let mut net =
                Unlucky { stack, blocks, input, head, ends, outside, trained, micro_batches };
            let mut memory = Memory::<f32>::new(layout);
            let mut be = memory.backend();
            net.initialize(&mut be, 1).unwrap();
            let batch = |net: &mut Unlucky, be: &mut Reference<'_, f32>, _| {
                net.input.tokens = lm.input.tokens;
                load(&lm, be, 0, 0)
            };
            network::step(&mut net, &mut be, &settings(0), batch).unwrap();
            let before = state(&lm, &be);

            // A token and a target that do not exist.
            let wrong = |place, value: i32| {
                move |_: &mut Unlucky, be: &mut Reference<'_, f32>, _| {
                    let loaded = load(&lm, be, 0, 0)?;
                    be.write_ints(place, &[value])?;
                    Ok::<_, Error>(loaded)
                }
            };
            for place in [lm.input.tokens.sub(7, 1), lm.head.targets.sub(7, 1)] {
                let error = network::step(&mut net, &mut be, &settings(1), wrong(place, 7));
                let fault = Fault::Token { sample: 1, value: 7, vocab: VOCAB };
                assert_eq!(error, Err(Error::Fault(fault)), "{mode:?} {kept:?}");
                assert!(state(&lm, &be) == before, "{mode:?} {kept:?}");
            }

            // A gradient of the head that is not a number: met where it enters the stack.
            for value in [f64::NAN, f64::INFINITY] {
                net.head.poison = Poison::Gradient(value);
                let error = network::step(&mut net, &mut be, &settings(1), batch);
                assert!(gave(&error, Site::Head), "{mode:?}: {error:?}");
                assert!(state(&lm, &be) == before, "{mode:?} {value}");
            }
            net.head.poison = Poison::Nothing;

            // An embedding beyond every range.
            let mut row = [0.0; 8];
            let place = net.input.wpe.value.sub(0, 8);
            be.read_reals(place, &mut row).unwrap();
            be.write_reals(place, &[f32::INFINITY; 8]).unwrap();
            let broken = state(&lm, &be);
            let error = network::step(&mut net, &mut be, &settings(1), batch).unwrap_err();
            assert!(matches!(error, Error::Fault(_)), "{mode:?}: {error}");
            assert!(state(&lm, &be) == broken, "{mode:?} {kept:?}");
            be.write_reals(place, &row).unwrap();

            // Nothing of it is left behind.
            network::step(&mut net, &mut be, &settings(1), batch).unwrap();
            let found = state(&lm, &be);
            let (mut twin, layout) = lay_out::<f32>(&training(mode, kept, 1), None);
            let mut memory = Memory::<f32>::new(layout);
            let mut be = memory.backend();
            twin.initialize(&mut be, 1).unwrap();
            for number in 0..2 {
                let step = settings(number);
                network::step(&mut twin, &mut be, &step, |lm, be, _| load(lm, be, 0, 0)).unwrap();
            }
            assert!(found == state(&twin, &be), "{mode:?} {kept:?}");
        }
    }
}

/// A gradient that is met midway where blocks update themselves stops what is below it.
#[test]
fn a_gradient_that_is_not_finite_stops_fused_updates() {
    let kept = Gradients::Fused(Rule::ADAM_W);
    let (lm, layout) = lay_out::<f32>(&training(BDIA, kept, 1), None);
    let Lm { stack, blocks, input, head, ends, outside, trained, micro_batches } = lm;
    let head = Poisoned { head, poison: Poison::Gradient(f64::NAN) };
    let mut net = Unlucky { stack, blocks, input, head, ends, outside, trained, micro_batches };
    let mut memory = Memory::<f32>::new(layout);
    let mut be = memory.backend();
    net.initialize(&mut be, 1).unwrap();
    let before = state(&lm, &be);
    let error = network::step(&mut net, &mut be, &settings(0), |_, be, _| load(&lm, be, 0, 0));
    assert!(gave(&error, Site::Head), "{error:?}");
    // It was met before anything was updated.
    assert!(state(&lm, &be) == before);
}

/// A pass that nobody prepared does not use the learning rate of the step before.
#[test]
fn blocks_do_not_update_themselves_twice() {
    let (mut lm, layout) = lay_out::<f32>(&training(BDIA, Gradients::Fused(Rule::ADAM_W), 1), None);
    let mut memory = Memory::<f32>::new(layout);
    let mut be = memory.backend();
    lm.initialize(&mut be, 1).unwrap();
    one_step(&mut lm, &mut be, &settings(0)).unwrap();
    let before = state(&lm, &be);
    load(&lm, &mut be, 1, 0).unwrap();
    let Lm { stack, blocks, input, head, .. } = &mut lm;
    let pass = Pass { seed: 3, step: 1, global: 0 };
    let error = stack.train(&mut be, blocks, input, head, &pass).unwrap_err();
    assert!(matches!(error, Error::Setting { what: "optimizer of the step", .. }), "{error}");
    assert!(state(&lm, &be) == before);
}

/// Micro-batches that change between counting and training would have another scale.
#[test]
fn micro_batches_that_change_are_refused() {
    let rule = Gradients::Full(Rule::ADAM_W);
    let (mut lm, layout) = lay_out::<f32>(&training(BDIA, rule, 2), None);
    let mut memory = Memory::<f32>::new(layout);
    let mut be = memory.backend();
    lm.initialize(&mut be, 1).unwrap();
    let before = state(&lm, &be);
    let mut calls = 0;
    let error: Result<_> = network::step(&mut lm, &mut be, &settings(0), |lm, be, index| {
        calls += 1;
        let loaded = load(lm, be, 0, index)?;
        Ok(Loaded { targets: loaded.targets - usize::from(calls == 4), ..loaded })
    });
    let what = "targets of the micro-batches, loaded again";
    assert!(matches!(error, Err(Error::Shape { what: w, .. }) if w == what), "{error:?}");
    assert!(state(&lm, &be) == before);
}

/// What cannot be loaded ends the step with the loader's own error.
#[test]
fn a_loader_has_errors_of_its_own() {
    #[derive(Debug, PartialEq)]
    enum Mine {
        NoMoreData,
        Core(Error),
    }
    impl From<Error> for Mine {
        fn from(error: Error) -> Self {
            Self::Core(error)
        }
    }
    let (mut lm, layout) = lay_out::<f32>(&training(BDIA, Gradients::Fused(Rule::ADAM_W), 1), None);
    let mut memory = Memory::<f32>::new(layout);
    let mut be = memory.backend();
    lm.initialize(&mut be, 1).unwrap();
    let before = state(&lm, &be);
    let found = network::step(&mut lm, &mut be, &settings(0), |_, _, _| Err(Mine::NoMoreData));
    assert_eq!(found, Err(Mine::NoMoreData));
    lm.micro_batches = 2;
    let found = network::step(&mut lm, &mut be, &settings(0), |_, _, _| Err(Mine::NoMoreData));
    lm.micro_batches = 1;
    assert!(matches!(found, Err(Mine::Core(Error::Setting { what: "micro-batches", .. }))));
    let short = network::step(&mut lm, &mut be, &settings(0), |lm, be, index| {
        lm.load(be, index, &[0; 3], &[0; 3]).map_err(Mine::Core)
    });
    assert!(matches!(short, Err(Mine::Core(Error::Shape { .. }))), "{short:?}");
    assert!(state(&lm, &be) == before);
}

/// Adapters alone are trained: everything else keeps every bit.
#[test]
fn adapters_are_trained_alone() {
    for kept in [Gradients::Fused(Rule::ADAM_W), Gradients::Full(Rule::ADAM_W)] {
        let lora = Some(LoraShape { rank: 2, alpha: 4.0 });
        let t = Training { freeze: Freeze::All(None), ..training(BDIA, kept, 1) };
        let (mut lm, layout) = lay_out::<f32>(&t, lora);
        assert_eq!(lm.ends.trained(), 0);
        let mut memory = Memory::<f32>::new(layout);
        let mut be = memory.backend();
        lm.initialize(&mut be, 1).unwrap();
        let frozen = |lm: &Lm, be: &Reference<'_, f32>| {
            let mut bits = be.reals(lm.input.wte.value).unwrap().to_vec();
            lm.blocks
                .each(&mut |t| {
                    let value = be.reals(lm.blocks.params.value(1, t))?;
                    if lm.blocks.params.gradient(1, t).is_empty() {
                        bits.extend(value);
                    }
                    Ok(())
                })
                .unwrap();
            bits
        };
        let (before, all) = (frozen(&lm, &be), state(&lm, &be));
        let mut losses = Vec::new();
        for number in 0..20 {
            let step = Step { lr: 0.05, ..settings(number) };
            let outcome =
                network::step(&mut lm, &mut be, &step, |lm, be, index| load(lm, be, 0, index));
            losses.push(outcome.unwrap().loss);
        }
        assert!(frozen(&lm, &be) == before && state(&lm, &be) != all);
        assert!(losses[19] < losses[0], "{losses:?}");
    }
}

#[test]
fn language_models_that_do_not_fit_are_refused() {
    let t = training(BDIA, Gradients::None, 1);
    let shape = LmShape { vocab: VOCAB, positions: TOKENS, eps: 1e-5, tied: true, dropout: 0.0 };
    let refused = |shape: LmShape, t: Training, name| {
        let mut layout = Layout::new(4);
        let block = BlockShape::gpt2(TOKENS, 8, 2, BLOCKS);
        let blocks =
            PreNorm::layout(&block, BLOCKS, None, t.freeze, t.gradients, &mut layout).unwrap();
        let error = Lm::layout::<Reference<'_, f32>>(&shape, blocks, &t, &mut layout).unwrap_err();
        assert!(matches!(error, Error::Setting { what, .. } if what == name), "{name}: {error}");
    };
    refused(LmShape { vocab: 0, ..shape }, t, "vocabulary");
    refused(LmShape { positions: TOKENS - 1, ..shape }, t, "tokens of a sample");
    refused(LmShape { dropout: 1.0, ..shape }, t, "dropout");
    refused(shape, Training { micro_batches: 0, ..t }, "micro-batches");
    refused(shape, Training { batch: 0, ..t }, "batch");
    refused(shape, Training { choice: Choice::new(0, 1), ..t }, "chunk");
    refused(shape, Training { choice: Choice::new(1, 0), ..t }, "rows of logits");
}

/// A backend that was made for another layout, and what belongs to no layout.
#[test]
fn handles_of_another_layout_are_refused() {
    let t = training(BDIA, Gradients::Fused(Rule::ADAM_W), 1);
    let (mut lm, layout) = lay_out::<f32>(&t, None);
    let (other, other_layout) = lay_out::<f32>(&t, None);
    assert_eq!(layout, other_layout, "the same was laid out");
    let mut memory = Memory::<f32>::new(layout.clone());
    let mut be = memory.backend();
    assert!(matches!(other.initialize(&mut be, 1), Err(Error::Handle(_))));
    lm.initialize(&mut be, 1).unwrap();
    let before = state(&lm, &be);
    // One handle among many is enough.
    let own = lm.head.losses;
    lm.head.losses = other.head.losses;
    let error = one_step(&mut lm, &mut be, &settings(0)).unwrap_err();
    assert!(matches!(error, Error::Handle("cross_entropy")), "{error}");
    assert!(error.to_string().contains("another layout"), "{error}");
    assert!(state(&lm, &be) == before);
    lm.head.losses = own;
    one_step(&mut lm, &mut be, &settings(0)).unwrap();

    // Parts of a handle belong where the whole does; a layout's clones are the layout itself.
    let foreign = other.ends.parameter(0, &other.outside[0]).value;
    assert!(matches!(be.reals(foreign.sub(1, 2)), Err(Error::Handle(_))));
    let mut clone = layout.clone();
    let behind = clone.reals(Category::Workspace, 1);
    assert_eq!(behind.layout(), layout.id());
    let mut longer = Memory::<f32>::new(clone);
    assert!(longer.backend().reals(behind).is_ok());
    assert!(longer.backend().reals(own).is_ok());
    // Handles made by hand, those of plans that the compiler computes, and empty ones.
    assert!(be.reals(Reals::new(3, 4)).is_ok());
    assert!(be.reals(Layout::constant(4).reals(Category::Workspace, 4)).is_ok());
    assert_eq!(be.reals(foreign.sub(0, 0)), Ok(&[][..]));
}
