//! What a plan needs to know of every network.

use bdia_core::Layout;
use bdia_core::backend::Backend;
use bdia_core::error::Result;
use bdia_core::plan::Choice;

/// A network that is laid out for a backend, with a choice of how much is done at a time.
pub trait Network: Sized {
    /// Its architecture and how it is trained.
    type Setup;

    /// Lays it out.
    ///
    /// # Errors
    /// A typed error for dimensions or settings that do not fit together.
    fn lay_out<B: Backend>(setup: &Self::Setup, choice: Choice) -> Result<(Self, Layout)>;

    /// Samples of a batch and rows of a sample, of which the choice takes some at a time.
    fn sizes(setup: &Self::Setup) -> [usize; 2];

    /// Lengths of the groups of gradients that are on their way between ranks at the same time.
    fn exchanged(&self) -> Vec<usize>;
}
