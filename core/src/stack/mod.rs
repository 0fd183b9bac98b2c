//! The reversible stack: `K` residual blocks, trained in one of four modes over the same block
//! code.
//!
//! One training step, from top to bottom ([`Stack::train`]):
//!
//! ```text
//! embed      X_0 = Q(input)
//! forward    X_1 … X_{K-1}, side bits; X_{k+1} overwrites X_{k-1}
//! turn       chunk by chunk: last block → x_K → head forward and backward → VJP of the last block
//! backward   k = K-2 … 0: recompute h_k once, for the inverse (X_{k-1} over X_{k+1}) and the VJP;
//!            block done
//! embed_vjp  from G_0
//! ```
//!
//! That is [`Reversible`]. [`Segmented`] runs the modes that store activations: its steps have the
//! same names, over *segments* of blocks whose intermediates are kept. [`Stack`] is one of the two,
//! chosen at run time by its [`Mode`].
//!
//! # Guarantee
//! Every `X_k` that [`Reversible`] rebuilds equals the original in every bit, provided that
//! [`Blocks::residual`] gives the same bits for the same input and chunk in both passes. A 64-bit
//! checksum per `X_k` detects it when that is not so, before the block's parameters are updated
//! ([`Fault::Checksum`](crate::Fault)).
//!
//! In every mode, a gradient of activations that is not finite is noticed before the block that it
//! came from is done, whoever gave it: the head, the caller of [`Stack::output`], or a block
//! ([`Fault::ActivationGradient`](crate::Fault)).

mod blocks;
mod reversible;
mod segments;
mod workspace;

pub use blocks::{Blocks, Call, Context, Head, Input, Needs};
pub use reversible::Reversible;
pub use segments::{Segmented, largest_difference};
pub use workspace::Workspace;

use core::fmt;

use crate::arena::{Layout, Reals};
use crate::backend::{Storage, UpdateOps};
use crate::error::{Error, Result, ok};
use crate::update::{FloatGamma, Grid, Policy};

/// How a stack is trained, with the settings that this takes and no others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mode {
    /// Exact reversible training: two `X` tensors and side bits.
    Bdia {
        /// Where activations live.
        grid: Grid,
        /// γ of every optimizer step, and which blocks have one.
        gamma: Policy,
        /// Keep the originals and count differing elements.
        verify: bool,
    },
    /// Every intermediate is stored.
    Standard {
        /// Round residuals to a grid as mode `bdia` does, with γ = 0.
        grid: Option<Grid>,
    },
    /// The input of every `every`-th block is stored, the rest recomputed.
    Checkpoint {
        /// Blocks in a segment.
        every: usize,
        /// As in [`Standard`](Self::Standard).
        grid: Option<Grid>,
    },
    /// The BDIA update without a grid; everything is stored.
    BdiaFloat {
        /// γ, on the grid or not.
        gamma: FloatGamma,
        /// Rebuild the activations as mode `bdia` would, and measure the error.
        verify: bool,
    },
}

impl Mode {
    /// Mode `bdia` with this mode's grid, or the default one: the only mode that can run inference
    /// both in float and on the grid.
    #[must_use]
    pub const fn on_grid(&self) -> Self {
        let grid = match self {
            Self::Bdia { grid, .. }
            | Self::Standard { grid: Some(grid) }
            | Self::Checkpoint { grid: Some(grid), .. } => *grid,
            _ => Grid::DEFAULT,
        };
        Self::Bdia { grid, gamma: Policy::PAPER, verify: false }
    }

    /// What becomes of the last of `blocks` steps, in mode `bdia`.
    pub const fn last_step(&self, tail: Tail, blocks: usize) -> Option<LastStep> {
        match self {
            Self::Bdia { gamma, .. } => Some(LastStep::of(gamma, tail, blocks)),
            _ => None,
        }
    }
}

/// The last step of a stack in mode `bdia`, which prints as a line of its plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastStep {
    /// `X_K = X_{K-1} + Q(h_{K-1}(x_{K-1}))`.
    Plain,
    /// With γ, whose perturbation the head sees; side bits of `K−2` steps are kept.
    Perturbed,
    /// With γ, since the output leaves the stack: `X_K` and `X_{K-1}` and the side bits of `K−1`
    /// steps are kept, and the last block is recomputed. (The other choice, to keep `X_{K-1}` and
    /// `X_{K-2}`, would take one forward pass of that block more and one set of side bits less.)
    Inverted,
}

impl LastStep {
    const fn of(gamma: &Policy, tail: Tail, blocks: usize) -> Self {
        match tail {
            // The first step is plain as well.
            _ if blocks <= 1 => Self::Plain,
            Tail::Output => Self::Inverted,
            Tail::Head if gamma.ends_plain() => Self::Plain,
            Tail::Head => Self::Perturbed,
        }
    }
}

impl fmt::Display for LastStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "the last step is plain, without gamma",
            Self::Perturbed => "the last step has gamma, and no side bits: nothing inverts it",
            Self::Inverted => {
                "the output leaves the stack: the last step has gamma, side bits, and is inverted"
            }
        })
    }
}

/// What the stack's last activation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// A head follows at once; `X_K` is not kept.
    Head,
    /// `x_K` is the result (an encoder, a part of a foreign model). Reversible: `X_K` is kept
    /// together with `X_{K-1}`, and all blocks are recomputed. Other modes keep `x_K`; `checkpoint`
    /// then recomputes the last segment as well.
    Output,
}

impl Tail {
    fn expect_head(self) -> Result<()> {
        match self {
            Self::Head => Ok(()),
            Self::Output => Err(Error::unfit("tail", "an output", "a head, to turn at")),
        }
    }

    fn expect_output(self) -> Result<()> {
        match self {
            Self::Output => Ok(()),
            Self::Head => Err(Error::unfit("tail", "a head", "an output, to read it")),
        }
    }
}

/// The sizes of a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Which stack of the model: a counter word of the generator.
    pub id: u8,
    /// Samples `B` of a (micro-)batch.
    pub batch: usize,
    /// Values of one sample, `T·d`.
    pub per_sample: usize,
    /// Blocks `K`.
    pub blocks: usize,
    /// Samples processed together inside a block.
    pub chunk: usize,
    /// What `X_K` is for.
    pub tail: Tail,
    /// What the blocks need.
    pub needs: Needs,
    /// Scratch that head and input need, in reals; shared with the blocks' scratch.
    pub ends_scratch: usize,
}

/// Where a pass stands in a run: the counter words of its random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Key of the generator.
    pub seed: u64,
    /// Optimizer step.
    pub step: u32,
    /// Index in the global batch of this (micro-)batch's first sample.
    pub global: u32,
}

impl Pass {
    /// At inference nothing is drawn.
    const INFERENCE: Self = Self { seed: 0, step: 0, global: 0 };
}

/// A stack in any mode, laid out in the arenas of a backend. It holds handles only.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(clippy::large_enum_variant)]
pub enum Stack {
    /// Mode `bdia`.
    Reversible(Reversible),
    /// The other modes.
    Segmented(Segmented),
}

/// The same call on either machine.
macro_rules! either {
    ($stack:expr, $machine:ident => $call:expr) => {
        match $stack {
            Stack::Reversible($machine) => $call,
            Stack::Segmented($machine) => $call,
        }
    };
}

impl Stack {
    /// Lays the stack out.
    ///
    /// # Errors
    /// [`Error::Setting`] for a size of 0 or too many blocks, [`Error::TooLarge`] for sizes beyond
    /// the address space.
    pub const fn layout(config: &Config, mode: &Mode, layout: &mut Layout) -> Result<Self> {
        let workspace = ok!(Workspace::layout(&[(*config, *mode)], layout));
        Self::layout_in(config, mode, &workspace, layout)
    }

    /// Lays the stack out around a workspace that was made for it and others.
    ///
    /// # Errors
    /// As [`layout`](Self::layout).
    pub const fn layout_in(
        config: &Config,
        mode: &Mode,
        workspace: &Workspace,
        layout: &mut Layout,
    ) -> Result<Self> {
        let (w, l) = (workspace, layout);
        Ok(match *mode {
            Mode::Bdia { grid, gamma, verify } => {
                Self::Reversible(ok!(Reversible::layout_in(config, grid, gamma, verify, w, l)))
            }
            _ => Self::Segmented(ok!(Segmented::layout_in(config, mode, w, l))),
        })
    }

    /// The sizes, with the chunk that is used.
    pub const fn config(&self) -> &Config {
        either!(self, s => s.config())
    }

    /// What becomes of the last step, in mode `bdia`.
    pub const fn last_step(&self) -> Option<LastStep> {
        match self {
            Self::Reversible(s) => Some(s.last_step()),
            Self::Segmented(_) => None,
        }
    }

    /// Gives all blocks a second input.
    pub const fn set_context(&mut self, context: Context) {
        either!(self, s => s.set_context(context));
    }

    /// `G_k` of the whole batch, while the backward pass is at block `k` or `k - 1`.
    pub const fn gradient(&self, k: usize) -> Reals {
        either!(self, s => s.gradient(k))
    }

    /// Scratch shared by blocks, head and input; free between calls.
    pub const fn scratch(&self) -> Reals {
        either!(self, s => s.scratch())
    }

    /// As [`Reversible::mismatches`]; 0 in modes that rebuild nothing.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn mismatches<B: Storage>(&self, be: &B) -> Result<u64> {
        match self {
            Self::Reversible(s) => s.mismatches(be),
            Self::Segmented(_) => Ok(0),
        }
    }

    /// As [`Segmented::rebuild_error`]; 0 in mode `bdia`.
    pub const fn rebuild_error(&self) -> f64 {
        match self {
            Self::Reversible(_) => 0.0,
            Self::Segmented(s) => s.rebuild_error(),
        }
    }

    /// As [`Reversible::train`].
    ///
    /// # Errors
    /// As [`Reversible::train`].
    pub fn train<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        head: &mut impl Head<B>,
        pass: &Pass,
    ) -> Result<()> {
        either!(self, s => s.train(be, blocks, input, head, pass))
    }

    /// As [`Reversible::embed`].
    ///
    /// # Errors
    /// As [`Reversible::embed`].
    pub fn embed<B: UpdateOps>(
        &mut self,
        be: &mut B,
        input: &mut impl Input<B>,
        pass: &Pass,
    ) -> Result<()> {
        either!(self, s => s.embed(be, input, pass))
    }

    /// As [`Reversible::forward`].
    ///
    /// # Errors
    /// As [`Reversible::forward`].
    pub fn forward<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
    ) -> Result<()> {
        either!(self, s => s.forward(be, blocks, pass))
    }

    /// As [`Reversible::output`].
    ///
    /// # Errors
    /// As [`Reversible::output`].
    pub fn output<B: UpdateOps>(&self, be: &mut B) -> Result<Reals> {
        either!(self, s => s.output(be))
    }

    /// As [`Reversible::turn`].
    ///
    /// # Errors
    /// As [`Reversible::turn`].
    pub fn turn<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        head: &mut impl Head<B>,
        pass: &Pass,
    ) -> Result<()> {
        either!(self, s => s.turn(be, blocks, head, pass))
    }

    /// As [`Reversible::backward`].
    ///
    /// # Errors
    /// As [`Reversible::backward`].
    pub fn backward<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
    ) -> Result<()> {
        either!(self, s => s.backward(be, blocks, pass))
    }

    /// As [`Reversible::embed_vjp`].
    ///
    /// # Errors
    /// As [`Reversible::embed_vjp`].
    pub fn embed_vjp<B: UpdateOps>(
        &mut self,
        be: &mut B,
        input: &mut impl Input<B>,
        pass: &Pass,
    ) -> Result<()> {
        either!(self, s => s.embed_vjp(be, input, pass))
    }

    /// As [`Reversible::infer`].
    ///
    /// # Errors
    /// As [`Reversible::infer`].
    pub fn infer<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        samples: usize,
        gamma: FloatGamma,
    ) -> Result<Reals> {
        either!(self, s => s.infer(be, blocks, input, samples, gamma))
    }

    /// As [`Reversible::infer_quantized`].
    ///
    /// # Errors
    /// As [`Reversible::infer_quantized`]; [`Error::Setting`] in the other modes, which have no
    /// integers to compute with.
    pub fn infer_quantized<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        samples: usize,
        gamma: Option<(Policy, Pass)>,
    ) -> Result<Reals> {
        match self {
            Self::Reversible(s) => s.infer_quantized(be, blocks, input, samples, gamma),
            Self::Segmented(_) => {
                Err(Error::unfit("mode", "one that stores activations", "bdia, which has a grid"))
            }
        }
    }
}
