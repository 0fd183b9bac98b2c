//! `--gamma auto`: the γ that a pretrained language model bears, measured before the run is
//! planned.

use std::path::Path;

use bdia_core::backend::Backend;
use bdia_models::inference::Inference;
use bdia_models::language::model::LanguageModel;
use bdia_models::language::{Config, Family};
use bdia_models::named::Adapters;
use bdia_models::pretrained;
use bdia_train::Failure;
use bdia_train::calibrate::{self, Batch, Pretrained, TARGETS};
use bdia_train::cli::{MethodArgs, StepArgs};

use crate::inference;
use crate::train::Source;

/// Samples at a time.
const AT_ONCE: usize = 4;

/// Tokens and targets of some samples, a batch after the other.
struct Samples {
    context: usize,
    tokens: Vec<i32>,
    targets: Vec<i32>,
}

impl Samples {
    /// Samples of the training data at equal distances, with enough targets if there are as many.
    fn of(source: &Source, context: usize) -> Result<Self, Failure> {
        let mut all = Self { context, tokens: Vec::new(), targets: Vec::new() };
        match source {
            Source::Text { train, .. } => {
                let starts: Vec<_> = train.windows(context).collect();
                let n = TARGETS.div_ceil(context).min(starts.len());
                for i in 0..n {
                    let (tokens, targets) = all.next();
                    train.window(starts[i * starts.len() / n], tokens, targets)?;
                }
            }
            Source::Pairs { train, .. } => {
                // About as many as have enough targets, by the mean of all.
                let n = train.len();
                let mean = (train.targets() / n.max(1) as u64).max(1);
                let count = TARGETS.div_ceil(mean as usize).next_multiple_of(AT_ONCE).min(n);
                for i in 0..count {
                    let (tokens, targets) = all.next();
                    let example = (i as u128 * n as u128 / count as u128) as usize;
                    train.sample(example, tokens, targets, &mut []);
                }
            }
        }
        Ok(all)
    }

    fn next(&mut self) -> (&mut [i32], &mut [i32]) {
        let at = self.tokens.len();
        self.tokens.resize(at + self.context, 0);
        self.targets.resize(at + self.context, 0);
        (&mut self.tokens[at..], &mut self.targets[at..])
    }
}

/// Measures γ where the flags leave that to us, and puts it into the flags.
///
/// # Errors
/// As [`calibrate::measure`].
pub fn measure<C: Config>(
    run: &mut StepArgs,
    source: &Source,
    config: &C,
    weights: &Path,
    (context, adapters): (usize, Option<Adapters>),
) -> Result<(), Failure> {
    if !calibrate::is_wanted(&run.mode)? {
        return Ok(());
    }
    let samples = Samples::of(source, context)?;
    let at_once = AT_ONCE.min(samples.tokens.len() / context).max(1);
    let place = run.machine.clone();
    let network = (adapters, run.mode.blocks_per_step as usize);
    calibrate::measure(&mut run.mode, &run.given, &place, |frac_bits| {
        let (model, layout) =
            inference::lay_out(config, &place, context, at_once, None, frac_bits, network)?;
        Ok((Measured { weights, samples: &samples, model }, layout))
    })
}

struct Measured<'a, F: Family> {
    weights: &'a Path,
    samples: &'a Samples,
    model: LanguageModel<F>,
}

impl<F: Family> Measured<'_, F> {
    /// Tokens of a batch.
    fn of_batch(&self) -> usize {
        self.model.stack.config().chunk * self.samples.context
    }
}

impl<F: Family> Pretrained for Measured<'_, F> {
    fn load<B: Backend<Real = f32>>(&mut self, be: &mut B) -> Result<(), Failure> {
        pretrained::load(self.weights, be, &self.model).map_err(MethodArgs::unreadable)?;
        if self.model.setup().adapters.is_some() {
            // They begin as nothing.
            self.model.initialize_adapters(be, 0)?;
        }
        Ok(())
    }

    fn losses<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        inference: Inference,
    ) -> Result<Vec<Batch>, Failure> {
        let (n, all) = (self.of_batch(), self.samples);
        let batches = all.tokens.chunks(n).zip(all.targets.chunks(n)).enumerate();
        batches
            .map(|(i, (tokens, targets))| {
                let inference = inference.of_samples((i * n / all.context) as u32);
                Ok(self.model.evaluate(be, tokens, targets, inference)?)
            })
            .collect()
    }

    fn largest<B: Backend<Real = f32>>(&mut self, be: &mut B) -> Result<f64, Failure> {
        let mut largest = 0.0_f64;
        for tokens in self.samples.tokens.chunks(self.of_batch()) {
            largest = largest.max(self.model.largest(be, tokens)?);
        }
        Ok(largest)
    }
}
