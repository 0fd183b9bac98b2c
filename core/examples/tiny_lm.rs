//! The smallest language model: it learns the bytes of a text, with exact reversible training.
//!
//! `cargo run --release --example tiny_lm`

use bdia_core::layers::{BlockShape, Freeze, Gradients, PreNorm};
use bdia_core::network::{self, Lm, LmShape, Step, Training};
use bdia_core::{Grid, Layout, Policy, Reference, optim::Rule, stack::Mode};

const BATCH: usize = 8;
const TOKENS: usize = 32;

fn main() -> Result<(), Box<dyn core::error::Error>> {
    let text: Vec<i32> = std::fs::read("README.md")?.into_iter().map(i32::from).collect();

    // The network: a GPT-2 of four blocks, 32 wide, with 4 heads, over the 256 bytes.
    let block = BlockShape::gpt2(TOKENS, 32, 4, 4);
    let shape = LmShape { vocab: 256, positions: TOKENS, eps: 1e-5, tied: true, dropout: 0.0 };

    // Its training: activations are rebuilt, and a block is updated once its gradient is there.
    let mode = Mode::Bdia { grid: Grid::DEFAULT, gamma: Policy::PAPER, verify: false };
    let training = Training::new(mode, BATCH, Gradients::Fused(Rule::ADAM_W));

    // Its memory, planned before any of it is allocated.
    let mut plan = Layout::new(size_of::<f32>());
    let blocks = PreNorm::layout(&block, 4, None, Freeze::Nothing, training.gradients, &mut plan)?;
    let mut lm = Lm::layout::<Reference<'_, f32>>(&shape, blocks, &training, &mut plan)?;
    let (i, r, w) = plan.arenas();
    let (mut ints, mut reals, mut words) = (vec![0; i], vec![0.0; r], vec![0; w]);
    let mut backend = Reference::new(&plan, &mut ints, &mut reals, &mut words)?;

    lm.initialize(&mut backend, 1)?;
    for step in 0..200 {
        // Every sample is followed by the next one in the text; a target is the byte that follows.
        let (at, len) = (step as usize * 1009 % (text.len() - BATCH * TOKENS), BATCH * TOKENS);
        let step = Step { step, seed: 1, lr: 3e-3, weight_decay: 0.0, clip: 0.0 };
        let outcome = network::step(&mut lm, &mut backend, &step, |lm, backend, index| {
            lm.load(backend, index, &text[at..at + len], &text[at + 1..=at + len])
        })?;
        println!("step {}: loss {:.3}", step.step, outcome.loss);
    }
    Ok(())
}
