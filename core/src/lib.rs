//! Exact bit-level reversible transformer training (BDIA) without std, without an allocator,
//! without unsafe code.
//!
//! A transformer is trained while only **two integer activation tensors and one bit per activation
//! and block** are kept. The backward pass rebuilds every earlier activation from them, bit for
//! bit, and the trained network *is* a standard transformer at inference. The method is that of
//! Zhang, Lewis and Kleijn, "On Exact Bit-level Reversible Transformers Without Changing
//! Architecture" (ICML 2025).
//!
//! # The update
//! Activations live on the grid `2^-l` and are stored as `i32`: `x_k = 2^-l·X_k`, `Q(y) =
//! round_ties_even(y·2^l)`. Block `k` computes a residual `h_k(x)`; σ is drawn per sample and per
//! block, and `γ = σ·2^-m` (`m = 1`: ±0.5).
//!
//! ```text
//! X_0     = Q(embedding)
//! X_1     = X_0 + Q(h_0(x_0))
//! X_{k+1} = σ·(X_{k-1} + s_{k-1}) / 2^m + Q((1-γ)·x_k + (1+γ)·h_k(x_k))          k = 1 … K-1
//! X_{k-1} = σ·2^m·(X_{k+1} − Q((1-γ)·x_k + (1+γ)·h_k(x_k))) − s_{k-1}            the inverse
//! ```
//!
//! `s` is what makes the division exact; with `m = 1` it is the parity of `X_{k-1}`, one bit. With
//! `G_k = ∂L/∂x_k` and a straight-through `Q`:
//!
//! ```text
//! G_k     += (1-γ)·G_{k+1} + J_{h_k}(x_k)ᵀ·(1+γ)·G_{k+1}
//! G_{k-1} += γ·G_{k+1}
//! ```
//!
//! The average over the sign is `x_{k+1} = x_k + h_k(x_k)`: an ordinary transformer, which is what
//! inference computes. [`update`] has all of it, element by element, with its tests and a worked
//! example with numbers.
//!
//! # Why integers
//! Exactness is then a property of arithmetic: integer sums have no rounding, parity is a bit test,
//! overflow can be tested for. The kernel input `x_k` is a pure function of `X_k`, so the inverse
//! subtracts exactly what the step added, *if* `h_k` is recomputed to the same bits. That is the
//! one thing a block must promise ([`stack::Blocks`]); a checksum per activation detects when the
//! promise is broken.
//!
//! # One example
//! ```
//! use bdia_core::update::{Gamma, Grid, Sign};
//!
//! let (grid, gamma) = (Grid::DEFAULT, Gamma::new(1, Sign::Random)?);
//! let h = |x: f32| 0.1 * x + 0.25; // some block
//! let mut x = [1.0_f32, 1.35].map(|x| grid.quantize(x).unwrap()); // X_0 and X_1
//! let (start, mut bits) = (x, Vec::new());
//!
//! // Forward: X_{k+1} over X_{k-1}, one bit each.
//! for k in 1..50_u16 {
//!     let sigma = gamma.sigma(7, 0, 0, 0, k);
//!     let [old, cur] = x;
//!     let y = grid.dequantize(cur);
//!     let q = grid.quantize(gamma.mix(sigma, y, h(y))).unwrap();
//!     let (next, s) = gamma.step(sigma, old, q, 0);
//!     bits.push(s);
//!     x = [cur, next];
//! }
//! // Backward: everything comes back.
//! for k in (1..50_u16).rev() {
//!     let sigma = gamma.sigma(7, 0, 0, 0, k);
//!     let [cur, next] = x;
//!     let y = grid.dequantize(cur);
//!     let q = grid.quantize(gamma.mix(sigma, y, h(y))).unwrap();
//!     x = [gamma.inverse(sigma, next, q, bits.pop().unwrap(), 0), cur];
//! }
//! assert_eq!(x, start);
//! # Ok::<(), bdia_core::Error>(())
//! ```
//!
//! # The layers of this crate, from the bottom up
//! | module | what it guarantees |
//! |---|---|
//! | [`update`] | every step has an exact inverse; within [`update::LIMIT`] nothing overflows |
//! | [`rng`] | a random number is a function of its place: independent of chunks and threads |
//! | [`arena`] | memory is handles; what is handed out is counted, so the plan is what is used |
//! | [`backend`] | traits in layers; update operations give the same bits on every backend |
//! | [`check`] | what is refused before anything is touched, for all backends |
//! | [`mod@reference`] | the scalar backend over memory that the caller supplies |
//! | [`stack`] | rebuilt activations are exact or the step stops; four modes over one block code |
//! | [`layers`] | transformer layers with hand-written vector-Jacobian products |
//! | [`network`] | one optimizer step for every network; nothing is forgotten in silence |
//! | [`packing`] | frozen matrices in few bits have the same values on every backend |
//! | [`optim`], [`plan`] | optimizers and schedules as values; fitting a step into a budget |
//! | `testing` | (feature) the conformance suite that a backend runs |
//!
//! The smallest language model that is trained with this crate is the first page of the [`guide`].
//! Framework authors need [`Storage`], [`UpdateOps`], [`stack::Stack`] and an implementation of
//! [`stack::Blocks`] over blocks of their own: the guide's second part, "BDIA in your framework",
//! is a whole program. Nothing here panics on input: requests that cannot be carried out give an
//! [`Error`], numbers that go wrong a [`Fault`].
//!
//! # Features
//! `testing` (off by default) adds the conformance suite, and nothing else.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod arena;
pub mod backend;
pub mod check;
pub mod codes;
pub mod error;
#[doc = include_str!("guide.md")]
pub mod guide {}
pub mod layers;
pub mod network;
pub mod optim;
pub mod packing;
pub mod plan;
pub mod real;
pub mod reference;
pub mod rng;
pub mod stack;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod update;

pub use arena::{Category, Ints, Layout, LayoutId, Reals, Words};
pub use backend::{Backend, Chunk, Exchange, NnOps, OptimOps, State, Storage, UpdateOps, Wrapper};
pub use error::{Error, ErrorKind, Fault, Found, Halt, Result, Site};
pub use packing::{Packed, Packing};
pub use real::Real;
pub use reference::Reference;
pub use update::{FloatGamma, Gamma, Grid, Policy, Sign};
