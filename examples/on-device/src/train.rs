//! Fine-tuning and evaluation: what runs on the device, and on the host bit for bit the same.

use core::fmt;

use bdia_core::arena::Layout;
use bdia_core::backend::{Chunk, Exchange, OptimOps, Storage};
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::Updater;
use bdia_core::optim::{Decay, Schedule};
use bdia_core::plan::{Choice, fit};
use bdia_core::rng::{Draw, Stream};
use bdia_core::stack::{Head, Pass};
use bdia_core::update::{Gamma, Sign};
use bdia_core::{Real, Reals};

use crate::data::Samples;
use crate::digest::{Digests, fold};
use crate::model::{BATCH, BLOCKS, Be, CHUNK, Job, Model, Part, Trained};

/// Key of all random numbers.
pub const SEED: u64 = 2025;

/// The plan of a job, if it fits into `budget` bytes.
///
/// # Errors
/// [`Error::Budget`] says what is available and what is needed; the other errors of a plan.
pub fn plan(job: &Job, budget: usize) -> Result<Model> {
    // Chunks are as small as they can be: there is nothing to choose.
    let only = Choice { chunk: CHUNK, head_rows: 1 };
    let make = |_| {
        let model = Model::plan(job)?;
        let layout = model.layout.clone();
        Ok((model, layout))
    };
    fit(Some(budget), core::iter::once(only), make).map(|(_, model, _)| model)
}

/// Loss and accuracy over a set of samples.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    /// Mean loss.
    pub loss: f64,
    /// Samples whose most probable class is the right one.
    pub right: usize,
    /// All samples.
    pub samples: usize,
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_mille = (self.right * 2000 + self.samples) / (self.samples * 2).max(1);
        write!(f, "accuracy {:>2}.{} %, loss {:.4}", per_mille / 10, per_mille % 10, self.loss)
    }
}

/// A running job.
#[derive(Debug)]
pub struct Session<'j> {
    job: &'j Job,
    model: Model,
    tune: Samples,
    step: u32,
    /// What has been computed so far.
    pub digests: Digests,
}

impl<'j> Session<'j> {
    /// Loads the pretrained network, or draws a random one.
    ///
    /// # Errors
    /// [`Error::Shape`] for weights of another network or fewer samples than a batch.
    pub fn new(job: &'j Job, model: Model, be: &mut Be<'_>, tune: Samples) -> Result<Self> {
        if tune.len() < BATCH {
            return Err(Error::Shape {
                what: "samples to train with",
                expected: BATCH,
                found: tune.len(),
            });
        }
        let mut end = 0;
        model.load(|tensor, values, at| {
            end = at + values.len();
            match job.weights {
                Some(weights) => weights.read(be, at, values),
                None => draw(be, tensor.name, tensor.rows, values, at),
            }
        })?;
        match job.weights {
            Some(weights) if weights.0.len() != 2 * end => Err(Error::Shape {
                what: "pretrained weights",
                expected: end,
                found: weights.0.len() / 2,
            }),
            _ => Ok(Self { job, model, tune, step: 0, digests: Digests::default() }),
        }
    }

    /// The plan.
    pub const fn layout(&self) -> &Layout {
        &self.model.layout
    }

    /// The network.
    pub const fn model(&self) -> &Model {
        &self.model
    }

    /// Steps of one epoch.
    pub const fn steps(&self) -> u32 {
        (self.tune.len() / BATCH) as u32
    }

    /// The sample at place `i` of an epoch: a permutation that needs no memory, `i ↦ a·i + b mod
    /// n`.
    fn sample(&self, epoch: u32, i: usize) -> usize {
        let n = self.tune.len();
        let stream = Stream::new(SEED, epoch, 0, 0, 0, Draw::Data);
        let (mut a, b) =
            (1 + stream.below(0, n as u32 - 1) as usize, stream.below(1, n as u32) as usize);
        while gcd(a, n) != 1 {
            a += 1;
        }
        (a * i + b) % n
    }

    /// One optimizer step; returns the mean loss of its batch.
    ///
    /// # Errors
    /// [`Error::Fault`] when the numbers went wrong; parameters are then as the fault says.
    pub fn step(&mut self, be: &mut Be<'_>) -> Result<f64> {
        let (epoch, within) = (self.step / self.steps(), (self.step % self.steps()) as usize);
        let mut targets = [0; BATCH];
        for (i, target) in targets.iter_mut().enumerate() {
            let sample = self.sample(epoch, within * BATCH + i);
            self.model.patches.batch[i] = sample;
            *target = i32::from(self.tune.get(sample)?.1);
        }
        self.model.patches.samples = self.tune;
        be.write_ints(self.model.head.targets, &targets)?;

        let steps = self.steps() * self.job.epochs;
        let schedule = Schedule {
            lr: self.job.lr,
            min_lr: 0.0,
            warmup: steps / 20,
            steps,
            decay: Decay::Linear,
        };
        let updater = &mut self.model.trunk.blocks.updater;
        *updater = Updater {
            rule: self.job.rule,
            lr: schedule.at(self.step),
            t: self.step + 1,
            ..*updater
        };
        updater.fused = true;
        let updater = *updater;

        if self.job.trained == Trained::Head {
            self.head_only(be)?
        } else {
            self.all_blocks(be)?
        }
        finish(be, &updater, Site::Embedding, &self.model.patches.weight)?;
        finish(be, &updater, Site::Embedding, &self.model.patches.positions)?;
        finish(be, &updater, Site::Head, &self.model.head.part)?;
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        self.step += 1;

        let losses = be.reals(self.model.head.losses)?;
        self.digests.losses = fold(self.digests.losses, losses.iter().map(|l| l.to_bits()));
        Ok(losses.iter().map(|&l| f64::from(l)).sum::<f64>() / BATCH as f64)
    }

    /// Forward and backward pass through the reversible stack; its stages are those of
    /// `Stack::train`.
    fn all_blocks(&mut self, be: &mut Be<'_>) -> Result<()> {
        let Model { stack, trunk, patches, head, .. } = &mut self.model;
        let pass = Pass { seed: SEED, step: self.step, global: 0 };
        stack.embed(be, patches, &pass)?;
        stack.forward(be, trunk, &pass)?;
        for k in [BLOCKS - 1, BLOCKS - 2] {
            let x = be.ints(stack.activation(k))?;
            self.digests.activations = fold(self.digests.activations, x.iter().map(|&x| x as u32));
        }
        let side = be.words(stack.side_bits())?;
        self.digests.side_bits = fold(self.digests.side_bits, side.iter().copied());
        trunk.rebuilt = self.digests.rebuilt;
        stack.turn(be, trunk, head, &pass)?;
        stack.backward(be, trunk, &pass)?;
        self.digests.rebuilt = trunk.rebuilt;
        stack.embed_vjp(be, patches, &pass)
    }

    /// Inference, and the head's gradient.
    fn head_only(&mut self, be: &mut Be<'_>) -> Result<()> {
        for i in 0..BATCH {
            let (x, chunk) = self.infer(be, i)?;
            let Model { stack, head, .. } = &mut self.model;
            head.forward_backward(be, &chunk, x, stack.gradient(BLOCKS), stack.scratch())?;
        }
        Ok(())
    }

    /// `x_K` of sample `i` of the batch, by the standard transformer that the network is at
    /// inference.
    fn infer(&mut self, be: &mut Be<'_>, i: usize) -> Result<(Reals, Chunk)> {
        let Model { stack, trunk, patches, .. } = &mut self.model;
        let batch = patches.batch;
        patches.batch[0] = batch[i];
        let x = stack.infer(be, trunk, patches, 1, Gamma::new(0.0, Sign::Plus)?);
        patches.batch = batch;
        let chunk = Chunk {
            seed: SEED,
            step: self.step,
            stack: 0,
            site: Site::Head,
            first: i,
            samples: 1,
            global: i as u32,
            frame: 0,
        };
        Ok((x?, chunk))
    }

    /// Loss and accuracy over `samples`, one at a time.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn evaluate(&mut self, be: &mut Be<'_>, samples: Samples) -> Result<Score> {
        let mut score = Score { samples: samples.len(), ..Score::default() };
        self.model.patches.samples = samples;
        for sample in 0..samples.len() {
            let label = samples.get(sample)?.1;
            self.model.patches.batch[0] = sample;
            be.write_ints(self.model.head.targets.sub(0, 1), &[i32::from(label)])?;
            let (x, chunk) = self.infer(be, 0)?;
            let Model { stack, head, .. } = &self.model;
            let class_token = x.sub(0, self.job.width);
            let (logits, ..) = head.logits(be, class_token, stack.scratch())?;
            let mut best = (0, f32::NEG_INFINITY);
            for (class, &logit) in be.reals(logits)?.iter().enumerate() {
                if logit > best.1 {
                    best = (class, logit);
                }
            }
            score.right += usize::from(best.0 == usize::from(label));
            head.loss(be, &chunk, 0, logits)?;
            score.loss += f64::from(be.reals(head.losses.sub(0, 1))?.iter().sum::<f32>());
        }
        score.loss /= samples.len().max(1) as f64;
        match be.take_fault()? {
            Some(fault) => Err(fault.into()),
            None => Ok(score),
        }
    }

    /// Digests, with that of the parameters in RAM.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn digests(&self, be: &Be<'_>) -> Result<Digests> {
        let mut digests = self.digests;
        self.model.load(|_, values, _| {
            digests.parameters =
                fold(digests.parameters, be.reals(values)?.iter().map(|p| p.to_bits()));
            Ok(())
        })?;
        Ok(digests)
    }
}

fn finish<const N: usize>(
    be: &mut (impl OptimOps + Exchange),
    updater: &Updater,
    site: Site,
    part: &Part<N>,
) -> Result<()> {
    part.params.finished(be, updater, site, 0, &part.tensors)
}

/// Initial values: norms are 1, biases 0, matrices normal with the deviation `1/√rows`.
fn draw(be: &mut Be<'_>, name: &str, rows: usize, values: Reals, at: usize) -> Result<()> {
    let stream = Stream::new(SEED, 0, 0, 0, 0, Draw::Init);
    let deviation = match name {
        "positions" => 0.1,
        _ => 1.0 / Real::root(rows as f64),
    };
    for (i, value) in be.reals_mut(values)?.iter_mut().enumerate() {
        *value = if name.starts_with("ln_") {
            if name.ends_with("weight") { 1.0 } else { 0.0 }
        } else if name.ends_with("bias") {
            0.0
        } else {
            (deviation * stream.normal((at + i) as u32)) as f32
        };
    }
    Ok(())
}

const fn gcd(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
