//! The network that is run without training.

use bdia_core::arena::Reals;
use bdia_core::backend::{Backend, Chunk};
use bdia_core::error::{Result, Site};
use bdia_core::stack::{Blocks, Input, Stack};
use bdia_core::update::{FloatGamma, Gamma};

/// Which network is run at inference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Inference {
    /// In float, with a constant γ; with [`FloatGamma::ZERO`] it is the standard transformer.
    Float(FloatGamma),
    /// On the grid (of a stack in mode `bdia`): `X_{k+1} = X_k + Q(h_k(x_k))`, or with a constant
    /// γ.
    Quantized(Option<Gamma>),
}

impl Inference {
    /// The standard transformer.
    pub const STANDARD: Self = Self::Float(FloatGamma::ZERO);

    /// A stack's result for some samples: the place of `x_K`.
    ///
    /// # Errors
    /// Those of [`Stack::infer`] and [`Stack::infer_quantized`].
    pub fn run<B: Backend>(
        self,
        be: &mut B,
        stack: &Stack,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        samples: usize,
    ) -> Result<Reals> {
        match self {
            Self::Float(gamma) => stack.infer(be, blocks, input, samples, gamma),
            Self::Quantized(gamma) => stack.infer_quantized(be, blocks, input, samples, gamma),
        }
    }
}

/// The head's chunk in an evaluation of some samples.
pub(crate) const fn at_head(stack: u8, samples: usize) -> Chunk {
    Chunk { seed: 0, step: 0, stack, site: Site::Head, first: 0, samples, global: 0, frame: 0 }
}
