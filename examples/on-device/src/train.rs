//! Fine-tuning and evaluation: what runs on the device, and on the host bit for bit the same.

use core::fmt;

use bdia_core::Real;
use bdia_core::arena::{Layout, Reals};
use bdia_core::backend::Storage;
use bdia_core::error::{Error, Result};
use bdia_core::layers::{Init, Tensor};
use bdia_core::network::{self, Loaded, Step};
use bdia_core::optim::{Decay, Schedule};
use bdia_core::rng::{Draw, Stream};

use crate::data::Samples;
use crate::digest::{Digests, fold};
use crate::model::{BATCH, Be, Job, Model};

/// Key of all random numbers.
pub const SEED: u64 = 2025;

/// The plan of a job, if it fits into `budget` bytes.
///
/// # Errors
/// [`Error::Budget`] says what is available and what is needed; the other errors of a plan.
pub fn plan(job: &Job, budget: usize) -> Result<Model> {
    // Chunks are as small as they can be: there is nothing to choose.
    let model = Model::plan(job)?;
    match model.layout.total() {
        bytes if bytes <= budget => Ok(model),
        minimum => Err(Error::Budget { budget, minimum }),
    }
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
    model: &'j mut Model,
    tune: Samples,
    step: u32,
}

impl<'j> Session<'j> {
    /// Loads the pretrained network, or draws a random one.
    ///
    /// # Errors
    /// [`Error::Shape`] for weights of another network or fewer samples than a batch.
    pub fn new(job: &'j Job, model: &'j mut Model, be: &mut Be<'_>, tune: Samples) -> Result<Self> {
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
                None => draw(be, tensor, values, at),
            }
        })?;
        match job.weights {
            Some(weights) if weights.0.len() != 2 * end => Err(Error::Shape {
                what: "pretrained weights",
                expected: end,
                found: weights.0.len() / 2,
            }),
            _ => Ok(Self { job, model, tune, step: 0 }),
        }
    }

    /// The plan.
    pub const fn layout(&self) -> &Layout {
        &self.model.layout
    }

    /// The network.
    pub const fn model(&self) -> &Model {
        self.model
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
        let mut batch = [0; BATCH];
        for (i, sample) in batch.iter_mut().enumerate() {
            *sample = self.sample(epoch, within * BATCH + i);
        }
        let steps = self.steps() * self.job.epochs;
        let schedule = Schedule {
            lr: self.job.lr,
            min_lr: 0.0,
            warmup: steps / 20,
            steps,
            decay: Decay::Linear,
        };
        let (step, lr) = (self.step, schedule.at(self.step));
        let step = Step { step, seed: SEED, lr, weight_decay: 0.0, clip: 0.0 };
        let (tune, n) = (self.tune, self.model.micro_batch());
        let outcome = network::step(self.model, be, &step, |model, be, i| -> Result<_> {
            let first = i * n;
            model.put(be, tune, batch.get(first..first + n).unwrap_or_default())?;
            Ok(Loaded { first: first as u32, targets: n, items: n })
        })?;
        self.step += 1;

        let (losses, digests) = (be.reals(self.model.losses())?, &mut self.model.digests);
        digests.losses = fold(digests.losses, losses.iter().map(|l| l.to_bits()));
        Ok(outcome.loss)
    }

    /// Loss and accuracy over `samples`, one at a time.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn evaluate(&mut self, be: &mut Be<'_>, samples: Samples) -> Result<Score> {
        let mut score = Score { samples: samples.len(), ..Score::default() };
        for sample in 0..samples.len() {
            self.model.put(be, samples, &[sample])?;
            let (class, loss) = self.model.classify(be)?;
            score.right += usize::from(class == usize::from(samples.get(sample)?.1));
            score.loss += f64::from(loss);
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
    /// What the backend reports.
    pub fn digests(&self, be: &Be<'_>) -> Result<Digests> {
        let mut digests = self.model.digests;
        self.model.load(|_, values, _| {
            digests.parameters =
                fold(digests.parameters, be.reals(values)?.iter().map(|p| p.to_bits()));
            Ok(())
        })?;
        Ok(digests)
    }
}

/// Initial values: norms are 1, biases 0, matrices normal with the deviation `1/√rows`. Numbers are
/// drawn by the tensor's place in flash.
fn draw(be: &mut Be<'_>, tensor: &Tensor, values: Reals, at: usize) -> Result<()> {
    let stream = Stream::new(SEED, 0, 0, 0, 0, Draw::Init);
    let deviation = match tensor.init {
        Init::Zeros => return be.fill_reals(values, 0.0),
        Init::Ones => return be.fill_reals(values, 1.0),
        Init::Normal(deviation) => deviation,
        _ => 1.0 / Real::root(tensor.rows as f64),
    };
    for (i, value) in be.reals_mut(values)?.iter_mut().enumerate() {
        *value = (deviation * stream.normal((at + i) as u32)) as f32;
    }
    Ok(())
}

const fn gcd(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
