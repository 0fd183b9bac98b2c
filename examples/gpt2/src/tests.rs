//! The composition is the GPT-2 of `bdia-models`, bit for bit.
#![allow(clippy::unwrap_used)]

use bdia_core::layers::Gradients;
use bdia_core::optim::Rule;
use bdia_core::rng::philox;
use bdia_core::stack::Mode;
use bdia_core::{Error, Grid, Policy};
use bdia_models::gpt2::model::{Gpt2, Setup};

use super::*;

const VOCAB: usize = 50;
const CONTEXT: usize = 8;
const BATCH: usize = 3;

/// Tokens and targets of a micro-batch.
fn batch(step: u32, index: usize) -> [Vec<i32>; 2] {
    let draw = |n: usize, key: u64| -> i32 {
        (philox(key, [step, index as u32, n as u32, 0])[0] as usize % VOCAB) as i32
    };
    [5, 6].map(|key| (0..BATCH * CONTEXT).map(|n| draw(n, key)).collect())
}

/// All values with the optimizer's state.
fn bits(be: &Cpu, tensors: &[Named]) -> Vec<u32> {
    let mut all = Vec::new();
    for place in named::saved(tensors) {
        let mut bits = vec![0; place.len()];
        place.get(be, 0, &mut bits).unwrap();
        all.extend(bits);
    }
    all
}

#[test]
fn the_composition_is_the_models_gpt2() {
    let grid = Grid::DEFAULT;
    let modes = [
        Mode::Bdia { grid, gamma: Policy::PAPER, verify: false },
        Mode::Standard { grid: None },
        Mode::Checkpoint { every: 2, grid: Some(grid) },
    ];
    let kept = [(Gradients::Fused(Rule::ADAM_W), 1), (Gradients::Full(Rule::ADAM_W), 2)];
    for (mode, (gradients, micro_batches)) in modes.into_iter().flat_map(|m| kept.map(|k| (m, k))) {
        let mut config = Gpt2Config::new([VOCAB, CONTEXT, 16, 2, 3]);
        config.set_dropout(0.1);
        let block = BlockShape {
            attention_dropout: 0.1,
            residual_dropout: 0.1,
            ..BlockShape::gpt2(CONTEXT, 16, 2, 3)
        };
        let (eps, tied, dropout) = (block.eps, true, 0.1);
        let ends = LmShape { vocab: VOCAB, positions: CONTEXT, eps, tied, dropout };
        let training = Training { micro_batches, ..Training::new(mode, BATCH, gradients) };
        let a = Architecture { block, layers: 3, blocks_per_step: 1, ends, training, library: 0 };
        let choice = Choice::new(2, 5);

        let (mut net, layout) = Net::lay_out::<Cpu>(&a, choice).unwrap();
        let mut ours = Cpu::new(&layout, 1).unwrap();
        named::initialize(&mut ours, &files::tensors(&net.0), 3, 1).unwrap();

        let setup = Setup {
            batch: BATCH,
            accumulate: micro_batches,
            mode,
            gradients,
            ..Setup::inference(config.dims(), CONTEXT, 1)
        };
        let setup = Setup { dims: config.dims(), ..setup };
        let (mut model, planned) = Gpt2::layout::<Cpu>(&setup, choice).unwrap();
        let mut theirs = Cpu::new(&planned, 1).unwrap();
        model.initialize(&mut theirs, 3).unwrap();
        assert_eq!(layout.total(), planned.total(), "{mode:?}");

        let start = bits(&ours, &files::tensors(&net.0));
        for step in 0..3 {
            let step = Step { step, seed: 3, lr: 0.01, weight_decay: 0.1, clip: 0.0 };
            let a = network::step(&mut net.0, &mut ours, &step, |lm, be, index| {
                let [tokens, targets] = batch(step.step, index);
                lm.load(be, index, &tokens, &targets)
            });
            let b = model.train(&mut theirs, &step, |index, tokens, targets| {
                let [from_tokens, from_targets] = batch(step.step, index);
                tokens.copy_from_slice(&from_tokens);
                targets.copy_from_slice(&from_targets);
                Ok::<_, Error>(())
            });
            assert_eq!(a.unwrap().loss.to_bits(), b.unwrap().loss.to_bits(), "{mode:?}");
        }
        let names = |tensors: Vec<Named>| -> Vec<_> {
            tensors.into_iter().map(|t| (t.name, t.shape)).collect()
        };
        assert_eq!(names(files::tensors(&net.0)), names(model.tensors()));
        let end = bits(&ours, &files::tensors(&net.0));
        assert!(end == bits(&theirs, &model.tensors()), "{mode:?}");
        assert!(end != start);
    }
}
