//! Training on the digits, with this crate and with candle alone, and what either needs.

use bdia_core::rng::{Draw, Stream};
use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap, loss::cross_entropy};

use crate::alloc::Counting;
use crate::model::{Block, Config, Digits, Ends, initialize};
use crate::{Error, Options, Reversible};

/// One training run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Run {
    /// Sizes of the model.
    pub model: Config,
    /// Images of a step.
    pub batch: usize,
    /// Steps.
    pub steps: usize,
    /// Learning rate at the start; it falls to 0 on a line.
    pub lr: f64,
    /// Reversibly, or `None` for candle alone.
    pub reversible: Option<Options>,
    /// Of parameters and of the order of images.
    pub seed: u64,
    /// Leaves the test images alone: every fifth training image is kept for the accuracy instead.
    /// For choosing settings.
    pub validate: bool,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Outcome {
    /// Loss of the last step.
    pub loss: f64,
    /// Part of the images kept for it that the trained network names rightly, as a plain
    /// transformer.
    pub accuracy: f64,
    /// Parameters.
    pub parameters: usize,
    /// Rebuilt values that differed from the originals, over all steps (with [`Options::verify`]).
    pub mismatches: u64,
    /// Values that were rebuilt, over all steps.
    pub rebuilt: u64,
    /// The most bytes that were allocated at one time during the steps, less what was there before
    /// the model. 0 unless the program installs [`Counting`].
    pub peak: usize,
}

/// Trains, then tests. `watch` gets step and loss.
///
/// # Errors
/// Those of [`Reversible`] and candle.
pub fn train(run: &Run, mut watch: impl FnMut(usize, f64)) -> Result<Outcome, Error> {
    let (mut training, mut test) = Digits::load();
    if run.validate {
        (training, test) = training.split();
    }
    let before = Counting::current();

    // From here on it is a candle program like any other.
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let ends = Ends::new(&run.model, vb.clone())?;
    let blocks = (0..run.model.blocks)
        .map(|k| Block::new(&run.model, vb.pp(format!("h.{k}"))))
        .collect::<Result<_, _>>()?;
    initialize(&vars, run.seed)?;
    let mut optimizer = AdamW::new_lr(vars.all_vars(), run.lr)?;
    let mut stack = Reversible::new(blocks, run.reversible.unwrap_or_default())?;

    let mut outcome = Outcome {
        parameters: vars.all_vars().iter().map(|v| v.elem_count()).sum(),
        ..Outcome::default()
    };
    let mut order: Vec<usize> = (0..training.len()).collect();
    Counting::reset_peak();
    for step in 0..run.steps {
        let from = step * run.batch % training.len();
        if from < run.batch {
            shuffle(&mut order, run.seed, step);
        }
        let rows: Vec<usize> = (from..from + run.batch).map(|i| order[i % order.len()]).collect();
        let (images, classes) = training.batch(&rows)?;
        optimizer.set_learning_rate(run.lr * (1.0 - step as f64 / run.steps as f64));

        let x = ends.embed(&images)?;
        let loss;
        if run.reversible.is_some() {
            let (y, tape) = stack.forward(&x)?;
            loss = cross_entropy(&ends.logits(&y)?, &classes)?;
            let grads = tape.backward(&loss)?;
            optimizer.step(&grads)?;
            outcome.mismatches += stack.mismatches();
            outcome.rebuilt += ((run.model.blocks - 1) * x.elem_count()) as u64;
        } else {
            let y = stack.standard(&x, true)?;
            loss = cross_entropy(&ends.logits(&y)?, &classes)?;
            let grads = loss.backward()?;
            optimizer.step(&grads)?;
        }
        outcome.loss = f64::from(loss.to_scalar::<f32>()?);
        watch(step + 1, outcome.loss);
    }
    outcome.peak = Counting::peak().saturating_sub(before);
    outcome.accuracy =
        test.accuracy(|x: &Tensor| ends.logits(&stack.standard(&ends.embed(x)?, false)?))?;
    Ok(outcome)
}

/// Fisher and Yates, with numbers of this step.
fn shuffle(order: &mut [usize], seed: u64, step: usize) {
    let stream = Stream::new(seed, step as u32, 0, 0, 0, Draw::Data);
    for i in (1..order.len()).rev() {
        order.swap(i, stream.below(i as u32, i as u32 + 1) as usize);
    }
}
