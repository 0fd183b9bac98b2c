//! The program: plans, refusals, jobs, memory; the same text on every machine.

use core::fmt::{self, Write};

use bdia_core::Error;
use bdia_core::arena::Category;
use heapless::Vec;

use crate::digest::Digests;
use crate::jobs::{ARENA, Arena, BUDGET, JOBS, RAM, REFUSED, TEST, TUNE};
use crate::model::{BATCH, BLOCKS, Be, CHUNK, Job, Model, TOKENS};
use crate::train::{Score, Session, plan};

/// The machine below the program: a console, and what it can measure.
pub trait Platform: Write {
    /// Instructions executed so far, if they can be counted.
    fn instructions(&mut self) -> Option<u64>;
    /// Memory in use and at its peak, if it can be measured.
    fn memory(&mut self) -> Option<Used>;
}

/// Measured memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Static variables, the arenas among them.
    pub statics: usize,
    /// The deepest that the stack has been.
    pub stack: usize,
    /// What is reserved for the stack.
    pub stack_limit: usize,
    /// Code, constants, data sets, weights.
    pub flash: usize,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Request<'a> {
    /// Only the job of this name.
    pub job: Option<&'a str>,
    /// Only so many steps of each job, without evaluation.
    pub steps: Option<u32>,
}

impl<'a> Request<'a> {
    /// From words: `[JOB] [--steps N]`.
    ///
    /// # Errors
    /// A sentence that names the word and what is possible.
    pub fn parse(mut words: impl Iterator<Item = &'a str>) -> Result<Self, Stop> {
        let mut request = Self::default();
        while let Some(word) = words.next() {
            if word == "--steps" {
                let steps = words.next().and_then(|n| n.parse().ok());
                request.steps = Some(steps.ok_or(Stop::Usage("--steps needs a number"))?);
            } else if JOBS.iter().chain(&REFUSED).any(|job| job.name == word) {
                request.job = Some(word);
            } else {
                return Err(Stop::Usage(
                    "possible: a job (full, adamw, bias, head, standard, checkpoint, \
                     standard-micro, \
                     checkpoint-micro) and --steps N",
                ));
            }
        }
        Ok(request)
    }
}

/// Why the program ended early.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Stop {
    /// The core said so.
    Core(Error),
    /// The console failed.
    Console,
    /// A word that is not understood.
    Usage(&'static str),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Core(error)
    }
}

impl From<fmt::Error> for Stop {
    fn from(_: fmt::Error) -> Self {
        Self::Console
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Core(error) => error.fmt(f),
            Self::Console => f.write_str("the console failed"),
            Self::Usage(text) => f.write_str(text),
        }
    }
}

/// Bytes in KiB with one decimal.
struct Kib(usize);

impl fmt::Display for Kib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = (self.0 * 10 + 512) / 1024;
        write!(f, "{:>8}.{}", tenths / 10, tenths % 10)
    }
}

/// One point of a job's curve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Epoch {
    /// Mean loss over the epoch's steps; NaN before the first.
    pub loss: f64,
    /// On the test samples, afterwards.
    pub test: Score,
}

/// A job's course.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outcome {
    /// Before the first epoch, and after each.
    pub epochs: Vec<Epoch, 64>,
    /// Digests over the whole job.
    pub digests: Digests,
}

/// Plans of all jobs, category by category.
fn table(out: &mut impl Write) -> Result<(), Stop> {
    write!(out, "\nplans in KiB{:14}", "")?;
    for job in JOBS.iter().chain(&REFUSED) {
        write!(out, "{:>17}", job.name)?;
    }
    for category in Category::ALL {
        let mut any = 0;
        for job in JOBS.iter().chain(&REFUSED) {
            any += Model::plan(job)?.layout.bytes(category);
        }
        if any == 0 {
            continue;
        }
        write!(out, "\n{category:26}")?;
        for job in JOBS.iter().chain(&REFUSED) {
            write!(out, "{:7}{}", "", Kib(Model::plan(job)?.layout.bytes(category)))?;
        }
    }
    write!(out, "\n{:26}", "total")?;
    for job in JOBS.iter().chain(&REFUSED) {
        write!(out, "{:7}{}", "", Kib(Model::plan(job)?.layout.total()))?;
    }
    writeln!(out)?;
    Ok(())
}

/// Trains one job.
///
/// # Errors
/// [`Error::Budget`] for a plan that does not fit; [`Error::Fault`] when the numbers went wrong.
pub fn run<P: Platform>(
    job: &Job,
    be: &mut Be<'_>,
    model: &mut Model,
    steps: Option<u32>,
    p: &mut P,
) -> Result<Outcome, Stop> {
    let mut outcome = Outcome::default();
    let mut session = Session::new(job, model, be, TUNE)?;
    let record = |loss, test, outcome: &mut Outcome| {
        // A curve that is longer than its place is cut off.
        let _ = outcome.epochs.push(Epoch { loss, test });
    };
    if steps.is_none() {
        let before = session.evaluate(be, TEST)?;
        writeln!(p, "before fine-tuning: {before}")?;
        record(f64::NAN, before, &mut outcome);
    }
    let (mut left, mut epoch) = (steps.unwrap_or(u32::MAX), 0);
    while epoch < job.epochs && left > 0 {
        let (count, mut loss) = (session.steps().min(left), 0.0);
        let start = p.instructions();
        for _ in 0..count {
            loss += session.step(be)? / f64::from(count);
        }
        let end = p.instructions();
        left -= count;
        epoch += 1;
        write!(p, "epoch {epoch:>2}: training loss {loss:.4}")?;
        if let (Some(start), Some(end)) = (start, end) {
            write!(
                p,
                ", {} thousand instructions a step",
                end.saturating_sub(start) / u64::from(count) / 1000
            )?;
        }
        if steps.is_none() {
            let test = session.evaluate(be, TEST)?;
            write!(p, "; test {test}")?;
            record(loss, test, &mut outcome);
        }
        writeln!(p)?;
    }
    outcome.digests = session.digests(be)?;
    let d = &outcome.digests;
    writeln!(
        p,
        "digests {}: activations {:016x}, side bits {:016x}, rebuilt {:016x}, losses {:016x}, \
         parameters {:016x}",
        job.name, d.activations, d.side_bits, d.rebuilt, d.losses, d.parameters
    )?;
    Ok(outcome)
}

/// What is said of the plans that do not fit, of which one may have been asked for.
// Not inlined, as `planned` is not: networks are large values, which would lie side by side on the
// stack.
#[inline(never)]
fn refused<P: Platform>(asked: Option<&str>, p: &mut P) -> Result<(), Stop> {
    for job in &REFUSED {
        match plan(job, BUDGET) {
            Err(error) if asked == Some(job.name) => return Err(error.into()),
            Err(error) => writeln!(p, "{}: {error}", job.name)?,
            Ok(_) => writeln!(p, "{}: fits", job.name)?,
        }
    }
    Ok(())
}

/// A job from its plan to its end.
#[inline(never)]
fn planned<P: Platform>(
    job: &Job,
    memory: &mut Arena<ARENA>,
    steps: Option<u32>,
    p: &mut P,
) -> Result<Outcome, Stop> {
    let mut model = plan(job, BUDGET)?;
    let total = model.layout.total();
    writeln!(
        p,
        "\n{}: width {}, MLP {}, {:?}, {:?}",
        job.name, job.width, job.inner, job.trained, job.rule
    )?;
    let mut be = memory.backend(&model.layout)?;
    let outcome = run(job, &mut be, &mut model, steps, p)?;
    if let Some(used) = p.memory() {
        writeln!(
            p,
            "plan {} bytes; stack so far {} of {} bytes",
            total, used.stack, used.stack_limit
        )?;
    }
    Ok(outcome)
}

/// The whole program; `done` gets what became of each job.
///
/// # Errors
/// Those of [`run`], for a job that was asked for by name; without a name, the plans that do not
/// fit are shown.
pub fn program<P: Platform>(
    request: Request<'_>,
    memory: &mut Arena<ARENA>,
    p: &mut P,
    mut done: impl FnMut(&'static str, Outcome),
) -> Result<(), Stop> {
    writeln!(
        p,
        "{BLOCKS} blocks, {TOKENS} tokens, batches of {BATCH}, chunks of {CHUNK}; {} samples to \
         fine-tune with, {} to test",
        TUNE.len(),
        TEST.len()
    )?;
    table(p)?;
    writeln!(p, "available for a plan: {BUDGET} of {RAM} bytes")?;
    refused(request.job, p)?;
    for job in JOBS.iter().filter(|job| request.job.is_none_or(|name| name == job.name)) {
        done(job.name, planned(job, memory, request.steps, p)?);
    }
    if let Some(used) = p.memory() {
        let arenas = size_of::<Arena<ARENA>>();
        writeln!(p, "\nmeasured, in bytes")?;
        writeln!(p, "arenas: the largest plan                   {arenas:>8}")?;
        writeln!(
            p,
            "other static variables                     {:>8}",
            used.statics.saturating_sub(arenas)
        )?;
        writeln!(
            p,
            "stack, deepest                             {:>8} of {}",
            used.stack, used.stack_limit
        )?;
        writeln!(
            p,
            "RAM, high-water mark                       {:>8} of {RAM}",
            used.statics + used.stack
        )?;
        writeln!(
            p,
            "flash                                      {:>8} of {}",
            used.flash,
            1024 * 1024
        )?;
    }
    Ok(())
}
