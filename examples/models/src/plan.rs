//! What a plan needs to know of every network.

use bdia_core::Layout;
use bdia_core::backend::Backend;
use bdia_core::error::Result;
use bdia_core::plan::Choice;

/// A network that is laid out for a backend, with a choice of how much is done at a time.
pub trait Plan: Sized {
    /// Its architecture and how it is trained.
    type Setup;

    /// Lays it out.
    ///
    /// # Errors
    /// A typed error for dimensions or settings that do not fit together.
    fn lay_out<B: Backend>(setup: &Self::Setup, choice: Choice) -> Result<(Self, Layout)>;

    /// Samples of a batch and rows of a sample, of which the choice takes some at a time.
    fn sizes(setup: &Self::Setup) -> [usize; 2];

    /// Length of the longest group of gradients that is on its way between ranks at a time
    /// ([`bdia_core::network::exchanged`]).
    fn exchanged(&self) -> usize;
}
