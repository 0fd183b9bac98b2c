//! The network that is run without training.

use bdia_core::arena::Reals;
use bdia_core::backend::{Backend, Chunk};
use bdia_core::error::{Result, Site};
use bdia_core::real::Real;
use bdia_core::stack::{Blocks, Call, Input, Pass, Stack};
use bdia_core::update::{FloatGamma, Gamma, Policy};

/// Which network is run at inference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Inference {
    /// In float, with a constant γ; with [`FloatGamma::ZERO`] it is the standard transformer.
    Float(FloatGamma),
    /// On the grid (of a stack in mode `bdia`): `X_{k+1} = X_k + Q(h_k(x_k))`, or with the γ of a
    /// pass.
    Quantized(Option<(Policy, Pass)>),
}

impl Inference {
    /// The standard transformer.
    pub const STANDARD: Self = Self::Float(FloatGamma::ZERO);

    /// On the grid with the same γ in every block.
    pub const fn constant(gamma: Gamma) -> Self {
        Self::Quantized(Some((Policy::fixed(gamma), Pass { seed: 0, step: 0, global: 0 })))
    }

    /// The same for samples whose numbers in the global batch begin with `first`.
    #[must_use]
    pub const fn of_samples(self, first: u32) -> Self {
        match self {
            Self::Quantized(Some((policy, pass))) => {
                Self::Quantized(Some((policy, Pass { global: first, ..pass })))
            }
            other => other,
        }
    }

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

/// Blocks that tell how large activations, residuals and their sums get: what a grid must hold.
#[derive(Debug)]
pub struct Probe<'a, T> {
    /// The blocks.
    pub blocks: &'a mut T,
    /// The largest magnitude so far.
    pub largest: f64,
}

impl<B: Backend, T: Blocks<B>> Blocks<B> for Probe<'_, T> {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        self.blocks.residual(be, call, h)?;
        let mut host = [call.x, h].map(|values| vec![B::Real::of(0.0); values.len()]);
        be.read_reals(call.x, &mut host[0])?;
        be.read_reals(h, &mut host[1])?;
        for (x, h) in host[0].iter().zip(&host[1]) {
            let (x, h) = (x.wide(), h.wide());
            // The next activation, and what is rounded where |γ| is at most ½.
            for y in [x, h, x + h, 1.5 * x + 0.5 * h, 0.5 * x + 1.5 * h] {
                self.largest = self.largest.max(y.abs());
            }
        }
        Ok(())
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        self.blocks.vjp(be, call, gh, gx)
    }
}

/// The head's chunk in an evaluation of some samples.
pub(crate) const fn at_head(stack: u8, samples: usize) -> Chunk {
    Chunk { seed: 0, step: 0, stack, site: Site::Head, first: 0, samples, global: 0, frame: 0 }
}
