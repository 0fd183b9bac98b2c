//! What a stack is made of: the traits that blocks, inputs and heads implement.

use crate::arena::Reals;
use crate::backend::{Chunk, Storage};
#[cfg(doc)]
use crate::error::Fault;
use crate::error::Result;

/// What a block needs per sample, in reals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Kept between [`Blocks::residual`] and [`Blocks::vjp`].
    pub frame: usize,
    /// Free for use within one call.
    pub scratch: usize,
    /// Free for use within one call, but once and not per sample.
    pub fixed: usize,
}

impl Needs {
    /// Nothing.
    pub const NONE: Self = Self { frame: 0, scratch: 0, fixed: 0 };
}

/// A second input of every block, whole batch: the encoder's output in a decoder. Its gradient adds
/// up over blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The values, sample by sample.
    pub value: Reals,
    /// Their gradient.
    pub grad: Reals,
}

/// One call of a block on one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The samples, and the place of random numbers.
    pub chunk: Chunk,
    /// Index `k` of the block.
    pub block: usize,
    /// The input `x_k`, `samples · per_sample` values. Not to be changed: in modes with a grid,
    /// where `x_k` comes from integers, a residual that does is found ([`Fault::Input`]).
    pub x: Reals,
    /// Memory that stays from `residual` to `vjp` of the same [`Chunk::frame`].
    pub frame: Reals,
    /// Memory for this call only; its content on entry is arbitrary.
    pub scratch: Reals,
    /// The chunk's part of the context.
    pub context: Option<Context>,
    /// Training (dropout is on) or inference.
    pub train: bool,
    /// Whether `vjp` of this frame follows. The result must be the same bits either way.
    pub keep: bool,
}

/// The residual blocks of a stack; all of them behind one value, told apart by [`Call::block`].
///
/// Implement it for blocks of your own: the stack asks nothing else of them. Blocks that keep their
/// own intermediates (an autograd graph) can key them by [`Chunk::frame`] and leave [`Needs`] at
/// zero.
pub trait Blocks<B: Storage> {
    /// `h = h_k(x)`. The same bits for the same call, whatever `keep` says.
    ///
    /// # Errors
    /// Any error of the backend or the block; it stops the step.
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()>;

    /// Adds `J_{h_k}(x)ᵀ·gh` to `gx` and the parameters' parts to their gradients; `gh` may be
    /// overwritten.
    ///
    /// # Errors
    /// Any error of the backend or the block; it stops the step.
    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()>;

    /// All chunks of block `k` are through, its checksum has been compared, and the gradients of
    /// activations around it have been tested; what failed is in the status. Its gradient is
    /// complete, and nothing reads its parameters again in this step. An optimizer outside
    /// [`crate::OptimOps`] asks [`Storage::peek_fault`] first and changes nothing while a fault is
    /// set.
    ///
    /// # Errors
    /// Any error of the backend or the block; it stops the step.
    fn done(&mut self, be: &mut B, block: usize) -> Result<()> {
        let _ = (be, block);
        Ok(())
    }
}

/// What comes before the stack.
pub trait Input<B: Storage> {
    /// Sets `x`, the chunk's input of block 0.
    ///
    /// # Errors
    /// Any error of the backend or the input; it stops the step.
    fn forward(
        &mut self,
        be: &mut B,
        chunk: &Chunk,
        train: bool,
        x: Reals,
        scratch: Reals,
    ) -> Result<()>;

    /// Takes the gradient with respect to `x`, which may be overwritten.
    ///
    /// # Errors
    /// Any error of the backend or the input; it stops the step.
    fn vjp(&mut self, be: &mut B, chunk: &Chunk, gx: Reals, scratch: Reals) -> Result<()>;
}

/// What comes after the stack, down to the loss.
pub trait Head<B: Storage> {
    /// Loss of the chunk's `x_K` and its gradient: sets `gx`. `x` may be overwritten.
    ///
    /// # Errors
    /// Any error of the backend or the head; it stops the step.
    fn forward_backward(
        &mut self,
        be: &mut B,
        chunk: &Chunk,
        x: Reals,
        gx: Reals,
        scratch: Reals,
    ) -> Result<()>;
}
