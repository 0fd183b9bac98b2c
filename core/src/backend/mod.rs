//! What a backend offers, in layers: [`Storage`], [`UpdateOps`], [`NnOps`], [`OptimOps`],
//! [`Exchange`]; [`Backend`] is all of them.
//!
//! A framework that has blocks of its own needs the first two. Every operation takes handles into
//! the backend's arenas ([`crate::arena`]), so no buffer is borrowed across a call and nothing is
//! allocated.
//!
//! # Writing a backend
//! * **Same bits from recomputation.** An operation gives the same bits for the same inputs and
//!   shapes, always: reduction orders are fixed, sums use no atomics, and the number of threads
//!   changes nothing.
//! * **Same bits on all backends** for [`UpdateOps`]: IEEE add, subtract, multiply and integer
//!   operations in the order of [`crate::update`], no fused multiply-add, ties to even. The other
//!   layers may differ by rounding.
//! * **Deferred status.** A kernel that meets a bad value calls [`Storage::raise`] (or sets the
//!   flag on its device) and carries on; the first fault stays, by order of operations and then by
//!   index. While a fault is set, [`OptimOps::update`] does nothing.
//! * **Handles are checked.** A handle outside its arena, operands that overlap where the
//!   documentation does not allow it, or a wrong length give an [`Error`], never a panic. Empty
//!   operands are fine.
//! * Run `bdia_core::testing` (feature `testing`) against it.

mod ops;

pub use ops::{NnOps, OptimOps, Storage, UpdateOps, Wrapper};

use crate::arena::{Ints, Reals, Words};
use crate::error::{Error, Result, Site};
use crate::rng::Draw;
use crate::update::FloatGamma;

/// What computed: it is recorded with a run, because a resumed run repeats its bits only on the
/// same identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Name of the backend.
    pub name: &'static str,
    /// Values in one vector register.
    pub lanes: usize,
    /// Whether products and sums of the neural-network operations are fused.
    pub fused: bool,
}

/// The part of a batch that an operation works on, and the place that its random numbers come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Key of the generator.
    pub seed: u64,
    /// Optimizer step: a counter word of the generator.
    pub step: u32,
    /// Which stack of the model (encoder 0, decoder 1).
    pub stack: u8,
    /// Which part of the stack; its block index is a counter word.
    pub site: Site,
    /// Index of the first sample in the (micro-)batch.
    pub first: usize,
    /// Number of samples.
    pub samples: usize,
    /// Index of the first sample in the global batch: a counter word.
    pub global: u32,
    /// Which frame holds the block's intermediates; blocks that keep their own state use it as a
    /// key.
    pub frame: usize,
}

impl Chunk {
    /// The block index, 0 outside blocks.
    pub const fn block(&self) -> u16 {
        match self.site {
            Site::Block(k) => k as u16,
            _ => 0,
        }
    }

    /// The random stream of sample `i` of this chunk.
    pub const fn stream(&self, i: usize, draw: Draw) -> crate::rng::Stream {
        crate::rng::Stream::new(
            self.seed,
            self.step,
            self.global.wrapping_add(i as u32),
            self.stack,
            self.block(),
            draw,
        )
    }

    /// The `n`-th stream (0 to 127) of sample `i` that a block of another framework may draw from,
    /// for its dropout: the same numbers when the block is recomputed, and none that this crate
    /// draws ([`Draw`] stays below 128).
    pub const fn own_stream(&self, i: usize, n: u8) -> crate::rng::Stream {
        let mut stream = self.stream(i, Draw::Sign);
        stream.place |= 0x80 | (n & 0x7F) as u32;
        stream
    }

    /// `σ` of sample `i` of this chunk.
    pub fn sigma(&self, gamma: impl Into<FloatGamma>, i: usize) -> i32 {
        gamma.into().sigma(
            self.seed,
            self.step,
            self.global.wrapping_add(i as u32),
            self.stack,
            self.block(),
        )
    }
}

/// What the optimizer keeps of one parameter tensor, in the lengths that its rule has for it
/// ([`Rule::state`](crate::optim::Rule::state)). All of it is 0 before the first update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct State {
    /// Moments; the largest magnitudes of their blocks; means of rows and of columns.
    pub reals: [Reals; 2],
    /// First and second moments as [codes](crate::codes).
    pub codes: [Words; 2],
}

impl State {
    /// No state.
    pub const EMPTY: Self = Self { reals: [Reals::EMPTY; 2], codes: [Words::EMPTY; 2] };

    /// Moments as reals.
    pub const fn of(m: Reals, v: Reals) -> Self {
        Self { reals: [m, v], ..Self::EMPTY }
    }

    /// Sets all of it to 0.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn clear<B: Storage>(&self, be: &mut B) -> Result<()> {
        self.reals.into_iter().try_for_each(|h| be.fill_reals(h, crate::real::Real::of(0.0)))?;
        self.codes.into_iter().try_for_each(|h| be.fill_words(h, 0))
    }
}

/// How a matrix lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Row after row, as it is used.
    Plain,
    /// Row after row of its transpose.
    Transposed,
}

impl Order {
    /// That of the transpose.
    #[must_use]
    pub const fn transposed(self) -> Self {
        match self {
            Self::Plain => Self::Transposed,
            Self::Transposed => Self::Plain,
        }
    }
}

/// A matrix product `C[rows, cols] = A[rows, inner] · B[inner, cols]`; all matrices are dense and
/// row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Rows of `A` and `C`.
    pub rows: usize,
    /// Columns of `B` and `C`.
    pub cols: usize,
    /// Columns of `A`, rows of `B`.
    pub inner: usize,
    /// `Transposed`: `A` is stored as `[inner, rows]`.
    pub a: Order,
    /// `Transposed`: `B` is stored as `[cols, inner]`.
    pub b: Order,
    /// `C += A·B` instead of `C = A·B`, which does not read `C`.
    pub accumulate: bool,
}

/// Columns `at .. at + heads·head_dim` of a row-major matrix with `stride` columns: one of q, k, v
/// inside the output of `c_attn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// The matrix.
    pub of: Reals,
    /// Its number of columns.
    pub stride: usize,
    /// First column.
    pub at: usize,
}

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// All of its sample.
    Full,
    /// Those at its own position and before (as many queries as keys).
    Causal,
    /// All of its sample but the one at its own position (as many queries as keys): locality
    /// self-attention.
    Others,
    /// That many, at least 1: the one at its own position and those just before it (as many queries
    /// as keys). A sliding window.
    Sliding(usize),
}

/// Multi-head scaled dot-product attention, `softmax(q·kᵀ/√head_dim)·v` per sample and head, or
/// with a learned factor of the scores, `softmax(e^τ·q·kᵀ)·v`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Number of heads of queries.
    pub heads: usize,
    /// Heads of keys and values, a divisor of `heads`: head `i` of the queries reads head
    /// `i·kv_heads/heads` of these (grouped-query attention, arXiv 2305.13245).
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Queries of one sample.
    pub queries: usize,
    /// Keys of one sample.
    pub keys: usize,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Padding: sample `i` of the chunk has `key_lens[i]` keys, the rest are not seen. Empty: all
    /// are there. A query that sees no key gives 0.
    pub key_lens: Ints,
    /// Packing of several texts into a sample: query `t` of sample `i` of the chunk sees no key
    /// before `starts[i·queries + t]`. Empty: no sample is packed.
    pub starts: Ints,
    /// Probability of dropping an attention weight; element `(head·queries + q)·keys + k` of
    /// [`draw`](Self::draw).
    pub dropout: f64,
    /// Which numbers decide what is dropped.
    pub draw: Draw,
    /// `τ`, one value: scores are `e^τ·q·k`. Empty: they are `q·k/√head_dim`.
    pub temperature: Reals,
    /// Gradient of `τ`, to which [`NnOps::attention_vjp`] *adds* `Σ dq·q`. As long as
    /// `temperature`.
    pub temperature_grad: Reals,
}

impl Attention {
    /// The head of keys and values that a head of queries reads.
    pub const fn kv_head(&self, head: usize) -> usize {
        match (head * self.kv_heads).checked_div(self.heads) {
            Some(i) => i,
            None => 0,
        }
    }

    /// The keys among which are those that query `q` sees, in a sample with `present` keys; it sees
    /// none before `start`. It sees all of them that it does not [hide](Self::hides).
    pub const fn visible(&self, q: usize, present: usize, start: usize) -> (usize, usize) {
        let (first, end) = match self.mask {
            Mask::Full | Mask::Others => (0, present),
            Mask::Causal => (0, q + 1),
            Mask::Sliding(n) => ((q + 1).saturating_sub(n), q + 1),
        };
        let end = if end < present { end } else { present };
        let first = if first > start { first } else { start };
        (if first < end { first } else { end }, end)
    }

    /// Whether query `q` does not see `key`, one of the visible ones.
    pub const fn hides(&self, q: usize, key: usize) -> bool {
        matches!(self.mask, Mask::Others) && q == key
    }
}

/// Root-mean-square normalization (arXiv 1910.07467) of `groups` parts, one after the other, of
/// every row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmsNorm {
    /// Parts of a row: 1, or the heads of queries or keys.
    pub groups: usize,
    /// Values of a part.
    pub width: usize,
    /// `ε`, added to the mean of the squares.
    pub eps: f64,
    /// Added to the weight: 0, or 1 where weights are stored as differences from 1 (Gemma).
    pub offset: f64,
}

/// Rotary position embedding (arXiv 2104.09864): values `i` and `i + head_dim/2` of a head are the
/// two coordinates of a point that is turned by the `i`-th angle of its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotary {
    /// Heads, side by side.
    pub heads: usize,
    /// Width of one head: even.
    pub head_dim: usize,
    /// Rows of one sample.
    pub tokens: usize,
    /// Turns back: the inverse, and the vector-Jacobian product.
    pub back: bool,
}

/// The function of a gated MLP's gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `x·sigmoid(x)`: SwiGLU.
    Silu,
    /// GeGLU.
    Gelu(Gelu),
}

/// Which GELU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`: `gelu_new` of GPT-2.
    Tanh,
    /// `0.5·x·(1 + erf(x/√2))`: ViT.
    Exact,
}

/// The loss of some rows of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropy {
    /// Columns of the logits.
    pub vocab: usize,
    /// Rows of one sample, to name the sample in a fault.
    pub tokens: usize,
    /// Index within the chunk of the first row.
    pub row: usize,
    /// Factor of the gradient, `1 / number of unmasked targets` of the whole optimizer step.
    pub scale: f64,
    /// Label smoothing `ε`, from 0 to 1: the target distribution is `(1-ε)·onehot + ε/vocab`.
    pub smoothing: f64,
}

/// Machines that train one model together ("ranks"), each with its part of every batch. A backend
/// for one machine keeps the default methods.
///
/// All ranks make the same calls in the same order. What a rank gets is the same, bit for bit, on
/// every rank, and does not depend on which of them was first.
///
/// A fault of one rank travels with its gradients: when the sums come back, every rank has it, and
/// no [`update`](OptimOps::update) after that does anything. From then on [`Storage::take_fault`]
/// gives [`Error::Rank`] on all of them, which names the rank that met it; a fault that all have
/// met, in a sum, stays what it is.
pub trait Exchange: Storage {
    /// Number of this rank, from 0.
    fn rank(&self) -> usize {
        0
    }

    /// How many there are.
    fn ranks(&self) -> usize {
        1
    }

    /// Sends gradients and collects sums. The values of `own` are taken, to be added up over all
    /// ranks while the caller goes on. `sum` is set to the sums of the earliest values that were
    /// taken and have not been collected yet; it is as long as they are. Both may be the same
    /// buffer, whose values are taken first; either may be empty.
    ///
    /// # Errors
    /// [`Error::Setting`] where there is no other rank; [`Error::Rank`] for one that does not
    /// answer.
    fn exchange(&mut self, own: Reals, sum: Reals) -> Result<()> {
        let _ = (own, sum);
        Err(Error::setting("ranks", 1.0, "2 or more, to exchange gradients"))
    }

    /// Calls `each` with the numbers of every rank, in the order of ranks. All sums of
    /// [`exchange`](Self::exchange) have been collected before.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn gather(&mut self, own: [f64; 4], each: &mut dyn FnMut([f64; 4])) -> Result<()> {
        each(own);
        Ok(())
    }
}

/// All operations: what the layers of this crate and whole models need.
pub trait Backend: UpdateOps + NnOps + OptimOps + Exchange {}

impl<T: UpdateOps + NnOps + OptimOps + Exchange> Backend for T {}
