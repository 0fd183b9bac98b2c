//! The conformance suite: what every backend must pass (feature `testing`).
//!
//! Each operation runs on the backend and on the scalar [`Reference`] of the same real type, over
//! memory full of garbage; then the whole arenas are compared, operands and everything around them.
//!
//! * [`UpdateOps`](crate::UpdateOps): every bit equal.
//! * [`NnOps`](crate::NnOps) and [`OptimOps`](crate::OptimOps): equal up to rounding (see
//!   [`Failure`]), and each call repeated with other garbage in what it only writes gives the same
//!   bits.
//! * Mistakes in handles and sizes are refused and change nothing; faults name the right place.
//!
//! ```
//! use bdia_core::{Layout, Reference, testing};
//!
//! testing::all(|layout: &Layout| {
//!     let (i, r, w) = layout.arenas();
//!     let (i, r, w) = (vec![0; i].leak(), vec![0.0_f32; r].leak(), vec![0; w].leak());
//!     Reference::new(layout, i, r, w).unwrap()
//! })
//! .unwrap();
//! ```
//!
//! The suite allocates nothing and needs about 200 KB of stack. Handles start at arbitrary places
//! (a chunk's part of a tensor does, too), and some sizes are large enough that a backend with
//! threads uses them.

// A failure ends the suite, and there is no allocator to box it.
#![allow(clippy::result_large_err)]

use core::fmt;

use num_traits::{Float, Zero};

use crate::arena::{Category, Ints, Layout, Reals, Words};
use crate::backend::{Backend, Chunk, Columns, Storage};
use crate::error::{Error, Fault, Result as OpResult, Site};
use crate::real::Real;
use crate::reference::Reference;
use crate::rng::philox;

/// Runs a call on the oracle and twice on the backend, and compares. The second argument of the
/// call is the scratch.
macro_rules! both {
    ($bench:ident, [$($operand:expr),* $(,)?], |$b:ident, $s:ident| $call:expr) => {{
        let operands: &[$crate::testing::Operand] = &[$($operand),*];
        let expected = {
            let mut oracle = $bench.oracle()?;
            let $s = $crate::testing::ORACLE_SCRATCH;
            let _ = $s;
            let outcome = {
                let $b = &mut oracle;
                $call
            };
            (outcome, oracle.take_fault())
        };
        for round in 0..2 {
            $bench.upload(round, operands)?;
            let $s = $bench.scratch;
            let _ = $s;
            let outcome = {
                let $b = &mut $bench.backend;
                $call
            };
            $bench.check(round, operands, outcome, expected)?;
        }
    }};
    ($bench:ident, [$($operand:expr),* $(,)?], |$b:ident| $call:expr) => {
        both!($bench, [$($operand),*], |$b, scratch| $call)
    };
}

/// Runs a call on the backend that it must refuse, changing nothing.
macro_rules! refused {
    ($bench:ident, $what:literal, |$b:ident| $call:expr) => {{
        $bench.case = $what;
        $bench.upload(0, &[])?;
        let outcome = {
            let $b = &mut $bench.backend;
            $call
        };
        $bench.refused(outcome)?;
    }};
}

mod nn;
mod optim;
#[cfg(test)]
mod tests;
mod update;

pub use nn::nn_ops;
pub use optim::optim_ops;
pub use update::update_ops;

/// Most threads that a backend under test uses: the suite asks for attention scratch with this
/// number.
pub const THREADS: usize = 64;

/// Runs all suites.
///
/// # Errors
/// The first difference.
pub fn all<B: Backend>(mut new: impl FnMut(&Layout) -> B) -> Result<(), Failure> {
    update_ops(&mut new)?;
    nn_ops(&mut new)?;
    optim_ops(&mut new)
}

/// One side of a difference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// An integer.
    Int(i32),
    /// A word.
    Word(u32),
    /// A real number.
    Real(f64),
    /// The deferred status.
    Fault(Option<Fault>),
    /// What an operation returned.
    Outcome(OpResult<()>),
    /// Anything that is an error.
    SomeError,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(x) => write!(f, "{x}"),
            Self::Word(x) => write!(f, "{x:#010x}"),
            Self::Real(x) => write!(f, "{x:e}"),
            Self::Fault(None) => f.write_str("no fault"),
            Self::Fault(Some(fault)) => write!(f, "the fault \"{fault}\""),
            Self::Outcome(Ok(())) => f.write_str("success"),
            Self::Outcome(Err(error)) => write!(f, "the error \"{error}\""),
            Self::SomeError => f.write_str("an error"),
        }
    }
}

/// The first difference that a suite met.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Failure {
    /// The operation.
    pub op: &'static str,
    /// The case.
    pub case: &'static str,
    /// The sizes of the case, in the order of the operation's shapes.
    pub sizes: [usize; 4],
    /// Which operand, or what else differs.
    pub what: &'static str,
    /// Index within it.
    pub index: usize,
    /// What the reference has.
    pub expected: Value,
    /// What the backend has.
    pub found: Value,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, case, sizes: [a, b, c, d], what, index, expected, found } = self;
        write!(
            f,
            "{op}, case \"{case}\" with sizes {a}, {b}, {c}, {d}: {what}[{index}]: expected \
             {expected}, found {found}"
        )
    }
}

impl core::error::Error for Failure {}

const INTS: usize = 640;
const REALS: usize = 3584;
const WORDS: usize = 256;
/// Values that cross from the backend at once where no copy of the whole is kept.
const PIECE: usize = 256;

/// The oracle's scratch: the end of the arena, which no case uses.
const ORACLE_SCRATCH: Reals = Reals::new(REALS - 96, 96);

struct Memory<R> {
    ints: [i32; INTS],
    reals: [R; REALS],
    words: [u32; WORDS],
}

impl<R: Real> Memory<R> {
    fn new() -> Self {
        Self { ints: [0; INTS], reals: [R::zero(); REALS], words: [0; WORDS] }
    }
}

/// A tensor of reals that an operation writes.
#[derive(Clone, Copy)]
struct Operand {
    name: &'static str,
    of: Reals,
    /// Columns `at .. at + width` of rows of `stride`.
    stride: usize,
    at: usize,
    width: usize,
    /// Terms of the sums behind an element; 0 asks for equal bits.
    terms: usize,
    /// Its old content is not read.
    fresh: bool,
    /// Magnitude of the terms of those sums, where the result may be smaller.
    floor: f64,
}

impl Operand {
    /// Written only.
    fn set(name: &'static str, of: Reals, terms: usize) -> Self {
        Self { name, of, stride: of.len(), at: 0, width: of.len(), terms, fresh: true, floor: 1.0 }
    }

    /// Read and written.
    fn sum(name: &'static str, of: Reals, terms: usize) -> Self {
        Self { fresh: false, ..Self::set(name, of, terms) }
    }

    /// Columns that are written only.
    fn columns(name: &'static str, c: Columns, width: usize, terms: usize) -> Self {
        Self { stride: c.stride, at: c.at, width, ..Self::set(name, c.of, terms) }
    }

    /// Compared relative to its own magnitude, however small.
    fn tight(self) -> Self {
        Self { floor: 0.0, ..self }
    }

    /// Row and column of an index of the arena that belongs to this operand.
    fn contains(&self, index: usize) -> bool {
        let Some(i) = index.checked_sub(self.of.start()).filter(|&i| i < self.of.len()) else {
            return false;
        };
        let column = i.checked_rem(self.stride).unwrap_or(0);
        column >= self.at && column < self.at + self.width
    }

    /// How far two backends may differ.
    ///
    /// A sum of `n` terms of magnitude up to `M`, added in any order, with or without fused
    /// multiply-add, is off by at most about `n·ε·(sum of magnitudes)`; for terms of mixed signs
    /// far less. `4·ε·max(n, 16)·(M + floor)` leaves room for a few such sums after each other and
    /// for exponentials that are good to a few units in the last place, and lies orders of
    /// magnitude below what a wrong formula, element or sign gives (inputs are of order one).
    fn tolerance<R: Real>(&self, magnitude: f64) -> f64 {
        4.0 * R::epsilon().wide() * self.terms.max(16) as f64 * (magnitude + self.floor)
    }
}

/// Equal bits; one NaN is as good as another.
fn same_bits<R: Real>(a: R, b: R) -> bool {
    a.wide().to_bits() == b.wide().to_bits() || (a.is_nan() && b.is_nan())
}

fn same_fault(a: Option<Fault>, b: Option<Fault>) -> bool {
    let nan = |x: f64, y: f64| x == y || (x.is_nan() && y.is_nan());
    match (a, b) {
        (
            Some(Fault::Range { site, sample, value }),
            Some(Fault::Range { site: site_b, sample: sample_b, value: value_b }),
        ) => site == site_b && sample == sample_b && nan(value, value_b),
        (
            Some(Fault::ActivationGradient { site, sample, value }),
            Some(Fault::ActivationGradient { site: site_b, sample: sample_b, value: value_b }),
        ) => site == site_b && sample == sample_b && nan(value, value_b),
        (
            Some(Fault::Loss { sample, value }),
            Some(Fault::Loss { sample: sample_b, value: value_b }),
        ) => sample == sample_b && nan(value, value_b),
        (a, b) => a == b,
    }
}

/// A repeatable number in `[-1, 1)`.
fn noise(seed: u64, i: usize) -> f64 {
    f64::from(philox(seed, [i as u32, 0, 0, 0])[0] as i32) / 2_147_483_648.0
}

/// A repeatable word.
fn random(seed: u64, i: usize) -> u32 {
    philox(seed, [i as u32, 1, 0, 0])[0]
}

/// A chunk of `n` samples that does not start at 0 of anything.
fn chunk(n: usize) -> Chunk {
    Chunk {
        seed: 11,
        step: 3,
        stack: 1,
        site: Site::Block(2),
        first: 5,
        samples: n,
        global: 77,
        frame: 0,
    }
}

/// A backend, the oracle's memory, and the case at hand.
struct Bench<B: Storage> {
    backend: B,
    scratch: Reals,
    /// Words of which the host keeps no copy.
    more_words: Words,
    op: &'static str,
    case: &'static str,
    sizes: [usize; 4],
    cases: u64,
    next: [usize; 3],
    pending: Option<Fault>,
    before: Memory<B::Real>,
    oracle: Memory<B::Real>,
    found: Memory<B::Real>,
}

impl<B: Storage> Bench<B> {
    /// A backend with `scratch` values more than the host keeps a copy of.
    fn new(new: impl FnMut(&Layout) -> B, scratch: usize) -> Self {
        Self::with_words(new, scratch, 0)
    }

    /// As [`new`](Self::new), with `words` words more as well.
    fn with_words(mut new: impl FnMut(&Layout) -> B, scratch: usize, words: usize) -> Self {
        let mut layout = Layout::new(B::Real::BYTES);
        let _ = layout.ints(Category::Activations, INTS);
        let _ = layout.reals(Category::Workspace, REALS);
        let scratch = layout.reals(Category::Library, scratch);
        let _ = layout.words(Category::SideBits, WORDS);
        let more_words = layout.words(Category::Optimizer, words);
        Self {
            backend: new(&layout),
            scratch,
            more_words,
            op: "",
            case: "",
            sizes: [0; 4],
            cases: 0,
            next: [0; 3],
            pending: None,
            before: Memory::new(),
            oracle: Memory::new(),
            found: Memory::new(),
        }
    }

    /// A new case: all memory becomes garbage, and handles start anew.
    fn begin(&mut self, op: &'static str, case: &'static str, sizes: [usize; 4]) {
        (self.op, self.case, self.sizes, self.pending) = (op, case, sizes, None);
        self.cases += 1;
        // Every other case at odd places.
        self.next = [(self.cases % 2) as usize; 3];
        let seed = self.cases;
        for (i, x) in self.before.ints.iter_mut().enumerate() {
            *x = random(seed, i) as i32;
        }
        for (i, x) in self.before.words.iter_mut().enumerate() {
            *x = random(seed ^ 1 << 40, i);
        }
        for (i, x) in self.before.reals.iter_mut().enumerate() {
            *x = if i % 3 == 0 { B::Real::nan() } else { B::Real::of(3e7 * noise(seed, i)) };
        }
    }

    fn claim(&mut self, arena: usize, len: usize) -> usize {
        let start = self.next[arena];
        // Sixteen values (or, in odd cases, seventeen) and a gap between two operands.
        self.next[arena] = if self.cases.is_multiple_of(2) {
            (start + len + 1).next_multiple_of(16)
        } else {
            start + len + 3
        };
        start
    }

    fn ints(&mut self, len: usize, value: impl Fn(usize) -> i32) -> Ints {
        let h = Ints::new(self.claim(0, len), len);
        self.set_ints(h, value);
        h
    }

    fn set_ints(&mut self, h: Ints, value: impl Fn(usize) -> i32) {
        for (i, x) in self.before.ints.get_mut(h.range()).unwrap_or_default().iter_mut().enumerate()
        {
            *x = value(i);
        }
    }

    /// Reals of order one.
    fn reals(&mut self, len: usize) -> Reals {
        let seed = self.cases << 8 | self.next[1] as u64;
        self.reals_of(len, |i| 2.0 * noise(seed, i))
    }

    fn reals_of(&mut self, len: usize, value: impl Fn(usize) -> f64) -> Reals {
        let h = self.garbage(len);
        self.set_reals(h, value);
        h
    }

    /// Reals that hold garbage.
    fn garbage(&mut self, len: usize) -> Reals {
        Reals::new(self.claim(1, len), len)
    }

    fn set_reals(&mut self, h: Reals, value: impl Fn(usize) -> f64) {
        for (i, x) in
            self.before.reals.get_mut(h.range()).unwrap_or_default().iter_mut().enumerate()
        {
            *x = B::Real::of(value(i));
        }
    }

    /// Words that hold garbage.
    fn words(&mut self, len: usize) -> Words {
        Words::new(self.claim(2, len), len)
    }

    fn set_words(&mut self, h: Words, value: &[u32]) {
        if let Some(words) =
            self.before.words.get_mut(h.range()).filter(|words| words.len() == value.len())
        {
            words.copy_from_slice(value);
        }
    }

    /// The oracle over a copy of the memory.
    fn oracle(&mut self) -> Result<Reference<'_, B::Real>, Failure> {
        self.oracle.ints = self.before.ints;
        self.oracle.reals = self.before.reals;
        self.oracle.words = self.before.words;
        let failure = self.failure("oracle", 0, Value::Outcome(Ok(())), Value::SomeError);
        let m = &mut self.oracle;
        let mut oracle =
            Reference::new(&Layout::new(B::Real::BYTES), &mut m.ints, &mut m.reals, &mut m.words)
                .map_err(|_| failure)?;
        if let Some(fault) = self.pending {
            oracle.raise(fault);
        }
        Ok(oracle)
    }

    /// Takes the backend's memory after the last call as the memory before the next.
    fn go_on(&mut self) {
        self.before.ints = self.found.ints;
        self.before.reals = self.found.reals;
        self.before.words = self.found.words;
    }

    fn failure(&self, what: &'static str, index: usize, expected: Value, found: Value) -> Failure {
        Failure { op: self.op, case: self.case, sizes: self.sizes, what, index, expected, found }
    }

    fn done(&self, what: &'static str, outcome: OpResult<()>) -> Result<(), Failure> {
        match outcome {
            Ok(()) => Ok(()),
            error => Err(self.failure(what, 0, Value::Outcome(Ok(())), Value::Outcome(error))),
        }
    }

    /// Fills the backend's memory; in the second round with other garbage where the operation only
    /// writes.
    fn upload(&mut self, round: usize, operands: &[Operand]) -> Result<(), Failure> {
        let m = &self.before;
        let outcome = self
            .backend
            .write_ints(Ints::new(0, INTS), &m.ints)
            .and(self.backend.write_reals(Reals::new(0, REALS), &m.reals))
            .and(self.backend.write_words(Words::new(0, WORDS), &m.words))
            .and(
                self.backend
                    .fill_reals(self.scratch, B::Real::of(if round == 0 { f64::NAN } else { 3.0 })),
            );
        self.done("write", outcome)?;
        if round > 0 {
            for o in operands.iter().filter(|o| o.fresh && o.stride > 0) {
                for row in 0..o.of.len() / o.stride {
                    let outcome = self
                        .backend
                        .fill_reals(o.of.sub(row * o.stride + o.at, o.width), B::Real::of(-3.25));
                    self.done("fill_reals", outcome)?;
                }
            }
        }
        if let Some(fault) = self.pending {
            self.backend.raise(fault);
        }
        Ok(())
    }

    /// The status must be this one, and cleared by reading.
    fn status(&mut self, expected: Option<Fault>) -> Result<(), Failure> {
        for (what, expected) in [("status", expected), ("status after it was taken", None)] {
            let found = match self.backend.take_fault() {
                Ok(found) => found,
                Err(error) => {
                    return Err(self.failure(
                        what,
                        0,
                        Value::Fault(expected),
                        Value::Outcome(Err(error)),
                    ));
                }
            };
            if !same_fault(expected, found) {
                return Err(self.failure(what, 0, Value::Fault(expected), Value::Fault(found)));
            }
        }
        Ok(())
    }

    fn check(
        &mut self,
        round: usize,
        operands: &[Operand],
        outcome: OpResult<()>,
        expected: (OpResult<()>, OpResult<Option<Fault>>),
    ) -> Result<(), Failure> {
        self.done("oracle", expected.0)?;
        self.done("outcome", outcome)?;
        self.status(expected.1.unwrap_or_default())?;
        if round > 0 {
            return self.unchanged("repeated", false);
        }
        let m = &mut self.found;
        let outcome = self
            .backend
            .read_ints(Ints::new(0, INTS), &mut m.ints)
            .and(self.backend.read_reals(Reals::new(0, REALS), &mut m.reals))
            .and(self.backend.read_words(Words::new(0, WORDS), &mut m.words));
        self.done("read", outcome)?;
        for i in 0..INTS {
            let (expected, found) = (self.oracle.ints[i], self.found.ints[i]);
            if expected != found {
                return Err(self.failure(
                    "integer arena",
                    i,
                    Value::Int(expected),
                    Value::Int(found),
                ));
            }
        }
        for i in 0..WORDS {
            let (expected, found) = (self.oracle.words[i], self.found.words[i]);
            if expected != found {
                return Err(self.failure(
                    "word arena",
                    i,
                    Value::Word(expected),
                    Value::Word(found),
                ));
            }
        }
        for o in operands {
            self.check_operand(o)?;
        }
        for i in 0..REALS {
            let (expected, found) = (self.before.reals[i], self.found.reals[i]);
            if !same_bits(expected, found) && !operands.iter().any(|o| o.contains(i)) {
                let (expected, found) = (Value::Real(expected.wide()), Value::Real(found.wide()));
                return Err(self.failure("real arena, outside the operands", i, expected, found));
            }
        }
        Ok(())
    }

    fn check_operand(&self, o: &Operand) -> Result<(), Failure> {
        let mut magnitude = 0.0_f64;
        for i in o.of.range().filter(|&i| o.contains(i)) {
            let x = self.oracle.reals[i].wide().abs();
            magnitude = if x.is_finite() { magnitude.max(x) } else { magnitude };
        }
        let tolerance = o.tolerance::<B::Real>(magnitude);
        for i in o.of.range().filter(|&i| o.contains(i)) {
            let (expected, found) = (self.oracle.reals[i], self.found.reals[i]);
            let close = o.terms > 0 && (found.wide() - expected.wide()).abs() <= tolerance;
            if !same_bits(expected, found) && !close {
                let (expected, found) = (Value::Real(expected.wide()), Value::Real(found.wide()));
                return Err(self.failure(o.name, i - o.of.start(), expected, found));
            }
        }
        Ok(())
    }

    /// The backend's memory still is what it was after the last call, or before it.
    fn unchanged(&self, what: &'static str, before: bool) -> Result<(), Failure> {
        let m = if before { &self.before } else { &self.found };
        let (mut ints, mut reals, mut words) = ([0; PIECE], [B::Real::zero(); PIECE], [0; PIECE]);
        for start in (0..REALS).step_by(PIECE) {
            let len = PIECE.min(REALS - start);
            self.done(
                "read_reals",
                self.backend.read_reals(Reals::new(start, len), &mut reals[..len]),
            )?;
            for (i, (&e, &f)) in m.reals[start..start + len].iter().zip(&reals).enumerate() {
                if !same_bits(e, f) {
                    return Err(self.failure(
                        what,
                        start + i,
                        Value::Real(e.wide()),
                        Value::Real(f.wide()),
                    ));
                }
            }
        }
        for start in (0..INTS).step_by(PIECE) {
            let len = PIECE.min(INTS - start);
            self.done(
                "read_ints",
                self.backend.read_ints(Ints::new(start, len), &mut ints[..len]),
            )?;
            for (i, (&e, &f)) in m.ints[start..start + len].iter().zip(&ints).enumerate() {
                if e != f {
                    return Err(self.failure(what, start + i, Value::Int(e), Value::Int(f)));
                }
            }
        }
        for start in (0..WORDS).step_by(PIECE) {
            let len = PIECE.min(WORDS - start);
            self.done(
                "read_words",
                self.backend.read_words(Words::new(start, len), &mut words[..len]),
            )?;
            for (i, (&e, &f)) in m.words[start..start + len].iter().zip(&words).enumerate() {
                if e != f {
                    return Err(self.failure(what, start + i, Value::Word(e), Value::Word(f)));
                }
            }
        }
        Ok(())
    }

    fn refused(&mut self, outcome: OpResult<()>) -> Result<(), Failure> {
        if outcome.is_ok() {
            return Err(self.failure("outcome", 0, Value::SomeError, Value::Outcome(outcome)));
        }
        self.status(None)?;
        self.unchanged("changed although refused", true)
    }

    /// Writes a large tensor piece by piece.
    fn write_large(&mut self, h: Reals, value: impl Fn(usize) -> f64) -> Result<(), Failure> {
        let mut piece = [B::Real::zero(); PIECE];
        for start in (0..h.len()).step_by(PIECE) {
            let part = h.sub(start, PIECE);
            for (i, x) in piece.iter_mut().enumerate() {
                *x = B::Real::of(value(start + i));
            }
            let outcome = self.backend.write_reals(part, &piece[..part.len()]);
            self.done("write_reals", outcome)?;
        }
        Ok(())
    }

    /// Reads a large tensor piece by piece and compares each element with `value(i)`; a tolerance
    /// of 0 asks for equality.
    fn check_large(
        &self,
        name: &'static str,
        h: Reals,
        tolerance: f64,
        value: impl Fn(usize) -> f64,
    ) -> Result<(), Failure> {
        let mut piece = [B::Real::zero(); PIECE];
        for start in (0..h.len()).step_by(PIECE) {
            let part = h.sub(start, PIECE);
            self.done("read_reals", self.backend.read_reals(part, &mut piece[..part.len()]))?;
            for (i, found) in piece[..part.len()].iter().enumerate() {
                let (expected, found) = (value(start + i), found.wide());
                let close = (expected - found).abs() <= tolerance;
                if !close {
                    return Err(self.failure(
                        name,
                        start + i,
                        Value::Real(expected),
                        Value::Real(found),
                    ));
                }
            }
        }
        Ok(())
    }
}

impl<B: Storage> Bench<B> {
    /// Two large tensors must have the same bits.
    fn same_large(&self, name: &'static str, a: Reals, b: Reals) -> Result<(), Failure> {
        let mut pieces = [[B::Real::zero(); PIECE]; 2];
        for start in (0..a.len()).step_by(PIECE) {
            let len = a.sub(start, PIECE).len();
            for (piece, h) in pieces.iter_mut().zip([a, b]) {
                self.done(
                    "read_reals",
                    self.backend.read_reals(h.sub(start, len), &mut piece[..len]),
                )?;
            }
            for i in 0..len {
                let (first, second) = (pieces[0][i], pieces[1][i]);
                if !same_bits(first, second) {
                    let (first, second) = (Value::Real(first.wide()), Value::Real(second.wide()));
                    return Err(self.failure(name, start + i, first, second));
                }
            }
        }
        Ok(())
    }
}

/// A handle that no arena is long enough for.
const OUTSIDE: usize = usize::MAX / 4;

/// What stands for an error of a suite that cannot set up its own case.
fn setup<T>(op: &'static str, made: OpResult<T>) -> Result<T, Failure> {
    made.map_err(|error: Error| Failure {
        op,
        case: "setting up",
        sizes: [0; 4],
        what: "outcome",
        index: 0,
        expected: Value::Outcome(Ok(())),
        found: Value::Outcome(Err(error)),
    })
}
