//! What can go wrong, as values.
//!
//! [`Error`] is a mistake in how something was asked for: it is returned at once and nothing has
//! changed. [`Fault`] is a mistake in the numbers that a step met: kernels record the first one in
//! the backend's deferred status, updates do nothing while it is set, and the host reads it once
//! per step.

use core::fmt;

/// The result of everything that can fail in this crate.
pub type Result<T> = core::result::Result<T, Error>;

/// `?` for constant functions.
macro_rules! ok {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(error) => return Err(error),
        }
    };
}
pub(crate) use ok;

/// A request that cannot be carried out, or a step that stopped.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A handle reaches outside its arena or belongs to another layout, or two handles of one
    /// operation overlap.
    Handle(&'static str),
    /// Two sizes that must agree do not.
    Shape {
        /// The quantity that is wrong.
        what: &'static str,
        /// The size that is needed.
        expected: usize,
        /// The size that was given.
        found: usize,
    },
    /// A setting outside what it may be.
    Setting {
        /// Its name.
        what: &'static str,
        /// What was given.
        found: Found,
        /// What is accepted.
        possible: &'static str,
    },
    /// A size whose byte count does not fit the address space.
    TooLarge(&'static str),
    /// The step does not fit the memory budget, whatever is chosen.
    Budget {
        /// The budget in bytes.
        budget: usize,
        /// The smallest plan in bytes.
        minimum: usize,
    },
    /// The system refused memory.
    Memory {
        /// How much was asked for.
        bytes: usize,
    },
    /// The numbers of a step went wrong; parameters are as [`Fault`] says.
    Fault(Fault),
    /// The device below a backend failed.
    Device(&'static str),
    /// A block, an input or a head of another framework failed. This type is plain data, so the
    /// adapter keeps that framework's own error (an exception, a status) and hands it to its caller
    /// once the pass has returned.
    Foreign(Site),
    /// One of several machines that train together stopped all of them.
    Rank {
        /// Its number, from 0.
        rank: usize,
        /// Why.
        why: Halt,
    },
}

/// What was given as a setting.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Found {
    /// A number.
    Number(f64),
    /// Something else, in words.
    Words(&'static str),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(x) => x.fmt(f),
            Self::Words(words) => f.write_str(words),
        }
    }
}

/// What an [`Error`] is about. An adapter to another language or framework chooses its own error by
/// this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A handle, a size or a setting that does not fit: a mistake of the caller.
    Argument,
    /// Not enough memory, or more than can be addressed.
    Memory,
    /// The numbers of a step went wrong.
    Numbers,
    /// A checksum differs, or an input is not what a block was given: memory was changed, or a
    /// block does not repeat itself or writes into its input.
    Mismatch,
    /// The device below a backend failed.
    Device,
    /// A block, an input or a head of another framework failed.
    Foreign,
    /// Another machine stopped this one.
    Rank,
}

impl Error {
    /// A setting that is a number.
    pub const fn setting(what: &'static str, found: f64, possible: &'static str) -> Self {
        Self::Setting { what, found: Found::Number(found), possible }
    }

    /// A setting that is not a number; `found` reads on after "is".
    pub const fn unfit(what: &'static str, found: &'static str, possible: &'static str) -> Self {
        Self::Setting { what, found: Found::Words(found), possible }
    }

    /// What the error is about.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Handle(_) | Self::Shape { .. } | Self::Setting { .. } => ErrorKind::Argument,
            Self::TooLarge(_) | Self::Budget { .. } | Self::Memory { .. } => ErrorKind::Memory,
            Self::Fault(Fault::Checksum { .. } | Fault::Input { .. }) => ErrorKind::Mismatch,
            Self::Fault(_) => ErrorKind::Numbers,
            Self::Device(_) => ErrorKind::Device,
            Self::Foreign(_) => ErrorKind::Foreign,
            Self::Rank { .. } => ErrorKind::Rank,
        }
    }
}

/// Why one of several machines ([`Exchange`](crate::backend::Exchange)) stopped all of them.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Halt {
    /// Its numbers went wrong.
    Fault(Fault),
    /// It did not answer within so many seconds.
    Silent(u64),
    /// It can no longer be reached.
    Gone,
    /// It does something else: other flags, other data, another program.
    Astray,
    /// Its parameters or its optimizer state are not those of the others.
    Differs,
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => fault.fmt(f),
            Self::Silent(seconds) => {
                write!(
                    f,
                    "no answer for {seconds} seconds: it died, hangs, or is slower than the others \
                     by more than that"
                )
            }
            Self::Gone => f.write_str("it can no longer be reached"),
            Self::Astray => f.write_str(
                "it does something else than the others; all need the same program, flags, \
                     data and files",
            ),
            Self::Differs => f.write_str(
                "its parameters or its optimizer state differ from the others': memory was \
                 changed, or its processor computes other bits; go back to the last checkpoint",
            ),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Handle(what) => {
                write!(
                    f,
                    "{what}: the handle is outside its arena, belongs to another layout, or \
                     overlaps another operand"
                )
            }
            Self::Shape { what, expected, found } => {
                write!(f, "{what}: expected {expected}, found {found}")
            }
            Self::Setting { what, found, possible } => {
                write!(f, "{what} is {found}; possible: {possible}")
            }
            Self::TooLarge(what) => {
                write!(f, "{what}: the size in bytes does not fit this machine's address space")
            }
            Self::Budget { budget, minimum } => {
                write!(
                    f,
                    "the step does not fit into {budget} bytes; the smallest plan needs {minimum}"
                )
            }
            Self::Memory { bytes } => write!(
                f,
                "the operating system refused {bytes} bytes of memory; choose a smaller memory \
                 budget, batch or model"
            ),
            Self::Fault(fault) => fault.fmt(f),
            Self::Device(what) => write!(f, "device: {what}"),
            Self::Foreign(site) => write!(f, "{site} failed; its own error says why"),
            Self::Rank { rank, why } => write!(f, "rank {rank}: {why}"),
        }
    }
}

impl core::error::Error for Error {}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Where in a model a fault was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// The embedding, which is `X_0`.
    Embedding,
    /// Residual block `k`: its output, or its gradient.
    Block(usize),
    /// What comes after the blocks: final norm, logits and loss, or whoever took the output.
    Head,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::Block(k) => write!(f, "block {k}"),
            Self::Head => f.write_str("head"),
        }
    }
}

/// The first thing that went wrong in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// A value is not finite or leaves the range of the grid. No parameter was updated.
    Range {
        /// The block (or the embedding) that produced it.
        site: Site,
        /// Index of the sample in the batch.
        sample: usize,
        /// The value, in units of the activations.
        value: f64,
    },
    /// A rebuilt activation differs from the original: memory was changed, or a block does not
    /// repeat itself. Blocks above this one may have been updated; this one and those below were
    /// not.
    Checksum {
        /// Index `k` of the `X_k` that differs.
        activation: usize,
        /// The block whose recomputation rebuilt it.
        block: usize,
    },
    /// A block wrote into its input, which it may only read. In the forward pass, and in the last
    /// block, no parameter was updated yet; further down, blocks above may have been.
    Input {
        /// The block.
        site: Site,
        /// Index of the sample in the batch.
        sample: usize,
    },
    /// A gradient of parameters is not finite. Blocks above this site may have been updated; this
    /// one and those below were not.
    Gradient {
        /// Where the gradient belongs.
        site: Site,
    },
    /// A gradient of activations is not finite. Blocks above this site may have been updated; this
    /// one and those below were not.
    ActivationGradient {
        /// What gave it: the head `G_K`, a block its part of `G_k`, or before that the factor
        /// `1 ± γ` of a gradient that was already huge.
        site: Site,
        /// Index of the sample in the batch.
        sample: usize,
        /// The gradient.
        value: f64,
    },
    /// The loss of a sample is not finite. No parameter was updated.
    Loss {
        /// Index of the sample in the batch.
        sample: usize,
        /// The loss.
        value: f64,
    },
    /// A token or target lies outside the vocabulary. No parameter was updated.
    Token {
        /// Index of the sample in the batch.
        sample: usize,
        /// The token.
        value: i32,
        /// The size of the vocabulary.
        vocab: usize,
    },
    /// A token's position lies outside the table of rotary positions. No parameter was updated.
    Position {
        /// Index of the sample in the batch.
        sample: usize,
        /// The position.
        value: i32,
        /// The positions of the table.
        positions: usize,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Range { site, sample, value } => write!(
                f,
                "{site}, sample {sample}: the value {value:e} is not finite or outside the range \
                 of the grid; no parameter was updated (a lower learning rate, clipping, or fewer \
                 fractional bits help)"
            ),
            Self::Checksum { activation, block } => write!(
                f,
                "rebuilding with block {block} gave another X_{activation} than the forward pass: \
                 memory was changed, or the block does not repeat itself; blocks above may have \
                 been updated, go back to the last checkpoint"
            ),
            Self::Input { site, sample } => write!(
                f,
                "{site}, sample {sample}: the block changed its input, which it may only read; \
                 let it work on a copy, and go back to the last checkpoint"
            ),
            Self::Gradient { site } => write!(
                f,
                "{site}: the gradient is not finite; blocks above may have been updated, go back \
                 to the last checkpoint"
            ),
            Self::ActivationGradient { site, sample, value } => write!(
                f,
                "{site}, sample {sample}: the gradient of an activation is {value:e}; blocks above \
                 may have been updated, go back to the last checkpoint (a lower learning rate or a \
                 smaller loss scale help)"
            ),
            Self::Loss { sample, value } => {
                write!(f, "head, sample {sample}: the loss is {value}; no parameter was updated")
            }
            Self::Token { sample, value, vocab } => {
                write!(
                    f,
                    "sample {sample}: token {value} is outside the vocabulary of {vocab}; no \
                     parameter was updated"
                )
            }
            Self::Position { sample, value, positions } => {
                write!(
                    f,
                    "sample {sample}: position {value} is outside the table of {positions} rotary \
                     positions; no parameter was updated"
                )
            }
        }
    }
}

impl core::error::Error for Fault {}
