//! `--gamma auto`: the γ that a pretrained language model bears, measured before the run is
//! planned.

use std::path::Path;

use bdia_core::backend::Backend;
use bdia_models::inference::Inference;
use bdia_models::language::model::LanguageModel;
use bdia_models::language::{Config, Family};
use bdia_models::named::Adapters;
use bdia_models::pretrained;
use bdia_train::calibrate::{self, Batch, Pretrained, TARGETS};
use bdia_train::cli::{MethodArgs, StepArgs};
use bdia_train::{Failure, ranks};

use crate::inference::{self, Shape};
use crate::train::Source;

/// Samples at a time.
const AT_ONCE: usize = 4;

/// Tokens and targets of some samples, a batch after the other.
struct Samples {
    context: usize,
    tokens: Vec<i32>,
    targets: Vec<i32>,
    /// Where the texts of packed samples begin; empty otherwise.
    starts: Vec<i32>,
}

impl Samples {
    /// Samples of the training data at equal distances, with enough targets if there are as many.
    /// Examples are packed where the network allows that: less of what is computed is padding then.
    fn of(source: &Source, context: usize, packs: bool) -> Result<Self, Failure> {
        let [tokens, targets, starts] = [const { Vec::new() }; 3];
        let mut all = Self { context, tokens, targets, starts };
        match source {
            Source::Text { train, .. } => {
                let starts: Vec<_> = train.windows(context).collect();
                let n = TARGETS.div_ceil(context).min(starts.len());
                for i in 0..n {
                    let (tokens, targets, _) = all.next(false);
                    train.window(starts[i * starts.len() / n], tokens, targets)?;
                }
            }
            Source::Pairs { train, .. } => {
                let mut train = train.clone();
                train.fit(context, packs)?;
                let packed = train.is_packed();
                // About as many as have enough targets, by the mean of all.
                let n = train.len();
                let mean = (train.targets() / n.max(1) as u64).max(1);
                let count = TARGETS.div_ceil(mean as usize).next_multiple_of(AT_ONCE).min(n);
                for i in 0..count {
                    let (tokens, targets, starts) = all.next(packed);
                    let example = (i as u128 * n as u128 / count as u128) as usize;
                    train.sample(example, tokens, targets, starts)?;
                }
            }
        }
        Ok(all)
    }

    fn next(&mut self, packed: bool) -> (&mut [i32], &mut [i32], &mut [i32]) {
        let at = self.tokens.len();
        self.tokens.resize(at + self.context, 0);
        self.targets.resize(at + self.context, 0);
        let starts = if packed { at } else { 0 };
        self.starts.resize(if packed { at + self.context } else { 0 }, 0);
        (&mut self.tokens[at..], &mut self.targets[at..], &mut self.starts[starts..])
    }

    /// Tokens, targets and starts of batches of `n` tokens.
    fn batches(&self, n: usize) -> impl Iterator<Item = (&[i32], &[i32], &[i32])> {
        let starts = self.starts.chunks(n).chain(core::iter::repeat(&[][..]));
        self.tokens.chunks(n).zip(self.targets.chunks(n)).zip(starts).map(|((x, y), s)| (x, y, s))
    }
}

/// Measures γ where the flags leave that to us, and puts it into the flags. Of several ranks the
/// first measures.
///
/// # Errors
/// As [`calibrate::measure`].
pub fn measure<C: Config>(
    run: &mut StepArgs,
    joined: Option<&mut ranks::Ranks>,
    source: &Source,
    config: &C,
    weights: &Path,
    (context, adapters): (usize, Option<Adapters>),
) -> Result<(), Failure> {
    if !calibrate::is_wanted(&run.mode)? {
        return Ok(());
    }
    let found = ranks::of_first(joined, || {
        let samples = Samples::of(source, context, <C::Dims as Family>::PACKS)?;
        let at_once = AT_ONCE.min(samples.tokens.len() / context).max(1);
        let (place, blocks_per_step) = (&run.machine, run.mode.blocks_per_step as usize);
        let shape = Shape { adapters, blocks_per_step, packed: !samples.starts.is_empty() };
        calibrate::measure(&run.mode, &run.given, place, |frac_bits| {
            let (model, layout) =
                inference::lay_out(config, place, context, at_once, None, frac_bits, shape)?;
            Ok((Measured { weights, samples: &samples, model }, layout))
        })
    })?;
    if let Some(found) = found {
        run.mode.take(found);
    }
    Ok(())
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
        (all.batches(n).enumerate())
            .map(|(i, (tokens, targets, starts))| {
                let inference = inference.of_samples((i * n / all.context) as u32);
                Ok(self.model.evaluate_packed(be, tokens, targets, starts, inference)?)
            })
            .collect()
    }

    fn largest<B: Backend<Real = f32>>(&mut self, be: &mut B) -> Result<f64, Failure> {
        let mut largest = 0.0_f64;
        for (tokens, _, starts) in self.samples.batches(self.of_batch()) {
            largest = largest.max(self.model.largest(be, tokens, starts)?);
        }
        Ok(largest)
    }
}
