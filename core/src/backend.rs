//! What a backend offers, in layers: [`Storage`], [`UpdateOps`], [`NnOps`], [`OptimOps`],
//! [`Exchange`]; [`Backend`] is all of them.
//!
//! A framework that has blocks of its own needs the first two. Every operation takes handles into
//! the backend's arenas ([`crate::arena`]), so no buffer is borrowed across a call and nothing is
//! allocated.
//!
//! # For those who write a backend
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

use crate::arena::{Ints, Reals, Words};
use crate::error::{Error, Fault, Result, Site};
use crate::optim::Update;
use crate::plan::Rows;
use crate::real::Real;
use crate::rng::Draw;
use crate::update::{Gamma, Grid};

/// Who computed: recorded with a run, because a resumed run repeats its bits only on the same
/// identity.
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
    /// Which stack of the model (encoder 0, decoder 1). With the highest bit: a stack's
    /// cross-attention, for its draws.
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
    pub fn sigma(&self, gamma: Gamma, i: usize) -> i32 {
        gamma.sigma(
            self.seed,
            self.step,
            self.global.wrapping_add(i as u32),
            self.stack,
            self.block(),
        )
    }
}

/// Memory and the deferred status.
pub trait Storage {
    /// The floating-point type.
    type Real: Real;

    /// Who computes.
    fn identity(&self) -> Identity;

    /// Copies values to the host.
    ///
    /// # Errors
    /// As all operations of the traits here: a handle outside its arena, a wrong length,
    /// overlapping operands.
    fn read_reals(&self, src: Reals, dst: &mut [Self::Real]) -> Result<()>;
    /// Copies values from the host.
    fn write_reals(&mut self, dst: Reals, src: &[Self::Real]) -> Result<()>;
    /// Copies values to the host.
    fn read_ints(&self, src: Ints, dst: &mut [i32]) -> Result<()>;
    /// Copies values from the host.
    fn write_ints(&mut self, dst: Ints, src: &[i32]) -> Result<()>;
    /// Copies values to the host.
    fn read_words(&self, src: Words, dst: &mut [u32]) -> Result<()>;
    /// Copies values from the host.
    fn write_words(&mut self, dst: Words, src: &[u32]) -> Result<()>;

    /// Sets all values.
    fn fill_reals(&mut self, dst: Reals, value: Self::Real) -> Result<()>;
    /// Sets all values.
    fn fill_words(&mut self, dst: Words, value: u32) -> Result<()>;
    /// Copies; the operands are the same length and disjoint.
    fn copy_reals(&mut self, src: Reals, dst: Reals) -> Result<()>;
    /// Copies; the operands are the same length and disjoint.
    fn copy_ints(&mut self, src: Ints, dst: Ints) -> Result<()>;

    /// Records a fault, unless one is set.
    fn raise(&mut self, fault: Fault);
    /// Reads the status and clears it. On a device this waits for all work before it.
    fn take_fault(&mut self) -> Result<Option<Fault>>;

    /// Clears the status, whatever it was: what an abandoned step left is not the next one's. A
    /// device need not wait for it.
    fn clear_fault(&mut self) -> Result<()> {
        self.take_fault().map(|_| ())
    }

    /// Reads the status and leaves it: what a foreign optimizer asks before it changes parameters.
    fn peek_fault(&mut self) -> Result<Option<Fault>> {
        let fault = self.take_fault()?;
        if let Some(fault) = fault {
            self.raise(fault);
        }
        Ok(fault)
    }
}

/// The reversible update and what belongs to it. Same bits on every backend.
///
/// Shapes: a chunk has `n = chunk.samples` samples of `p` values each; `x`, `h`, … hold `n·p`
/// values. `side` holds `n·m·ceil(p/32)` words, sample by sample and plane by plane (the lowest
/// first), element `i` in bit `i % 32` of word `i / 32`; unused bits are 0. `sum` is two words to
/// which the checksum ([`crate::update::checksum`], index `chunk.first·p + i`) is *added*; an empty
/// `sum` asks for none.
pub trait UpdateOps: Storage {
    /// `X = Q(y)`; a value out of range raises [`Fault::Range`] and is stored as 0.
    fn quantize(&mut self, chunk: &Chunk, grid: Grid, y: Reals, x: Ints, sum: Words) -> Result<()>;

    /// `y = 2^-l·X`.
    fn dequantize(&mut self, grid: Grid, x: Ints, y: Reals) -> Result<()>;

    /// `X += Q(h)`: block 0 of the reversible stack, and every block of the quantized standard one.
    /// A quantized `h` out of range counts as 0, a sum out of range is kept as it is (wrapped);
    /// both raise [`Fault::Range`].
    fn add_quantized(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        x: Ints,
        h: Reals,
        sum: Words,
    ) -> Result<()>;

    /// `X -= Q(h)`, the inverse of [`add_quantized`](Self::add_quantized): wraps. A quantized `h`
    /// out of range counts as 0 and raises nothing.
    fn subtract_quantized(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        x: Ints,
        h: Reals,
        sum: Words,
    ) -> Result<()>;

    /// The step ([`Gamma::step`]) in place: `x` holds `X_{k-1}` and becomes `X_{k+1}`; `cur` is
    /// `x_k`, `h` is `h_k(x_k)`. Writes the side bits of `X_{k-1}` unless `side` is empty, adds the
    /// checksum of `X_{k+1}`. Faults as in [`add_quantized`](Self::add_quantized).
    fn step(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        gamma: Gamma,
        x: Ints,
        cur: Reals,
        h: Reals,
        side: Words,
        sum: Words,
    ) -> Result<()>;

    /// The inverse ([`Gamma::inverse`]) in place: `x` holds `X_{k+1}` and becomes `X_{k-1}`, whose
    /// checksum is added. A quantized value out of range counts as 0, as in the step, and raises
    /// nothing.
    fn inverse(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        gamma: Gamma,
        x: Ints,
        cur: Reals,
        h: Reals,
        side: Words,
        sum: Words,
    ) -> Result<()>;

    /// The step without a grid, in place: `x ← γ·x + ((1-γ)·cur + (1+γ)·h)`. With `|γ| = 0` the old
    /// content of `x` is not read and `x = cur + h`. A result that is not finite raises
    /// [`Fault::Range`].
    fn blend(&mut self, chunk: &Chunk, gamma: Gamma, x: Reals, cur: Reals, h: Reals) -> Result<()>;

    /// The inverse of [`blend`](Self::blend) up to rounding: `x ← (x − ((1-γ)·cur + (1+γ)·h)) / γ`.
    fn unblend(
        &mut self,
        chunk: &Chunk,
        gamma: Gamma,
        x: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()>;

    /// The gradient of the step ([`crate::update::combine`]): `next` holds `G_{k+1}` and becomes
    /// `γ·G_{k+1}`, the first part of `G_{k-1}`; `cur += (1-γ)·G_{k+1}`; `h = (1+γ)·G_{k+1}`.
    fn combine(
        &mut self,
        chunk: &Chunk,
        gamma: Gamma,
        next: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()>;

    /// Raises [`Fault::Checksum`] when the two sums differ.
    fn compare(&mut self, a: Words, b: Words, activation: usize, block: usize) -> Result<()>;

    /// Adds the number of differing elements to the 64-bit counter `count` (two words).
    fn count_differences(&mut self, a: Ints, b: Ints, count: Words) -> Result<()>;
}

/// How a matrix lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Row after row, as it is used.
    Plain,
    /// Row after row of its transpose.
    Transposed,
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

/// How values are stored in 16 bits: two in a word, the first one in its low half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// The upper half of an `f32`.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl Half {
    /// The value of the lower 16 bits of `bits`. Exact.
    #[inline]
    pub fn value(self, bits: u32) -> f32 {
        match self {
            Self::Bf16 => f32::from_bits(bits << 16),
            Self::F16 => {
                let (sign, exponent, rest) =
                    ((bits & 0x8000) << 16, bits & 0x7C00, (bits & 0x7FFF) << 13);
                // The exponents' biases are 112 apart; a product sets small values right too, which
                // have no leading 1.
                let finite = f32::from_bits(rest) * f32::from_bits((127 + 112) << 23);
                let special = rest | 0x7F80_0000;
                f32::from_bits(sign | if exponent == 0x7C00 { special } else { finite.to_bits() })
            }
        }
    }
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
}

/// Multi-head scaled dot-product attention, `softmax(q·kᵀ/√head_dim)·v` per sample and head, or
/// with a learned factor of the scores, `softmax(e^τ·q·kᵀ)·v`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Number of heads.
    pub heads: usize,
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
    /// Probability of dropping an attention weight; element `(head·queries + q)·keys + k` of
    /// [`Draw::AttentionDropout`].
    pub dropout: f64,
    /// `τ`, one value: scores are `e^τ·q·k`. Empty: they are `q·k/√head_dim`.
    pub temperature: Reals,
    /// Gradient of `τ`, to which [`NnOps::attention_vjp`] *adds* `Σ dq·q`. As long as
    /// `temperature`.
    pub temperature_grad: Reals,
}

/// Which GELU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`: `gelu_new` of GPT-2.
    Tanh,
    /// `0.5·x·(1 + erf(x/√2))`: ViT.
    Exact,
}

/// Rows of logits that a loss is taken of.
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

/// Operations of transformer layers. All matrices are row-major; `rows` is samples · tokens of a
/// chunk.
pub trait NnOps: Storage {
    /// [`Product`], plus `bias[cols]` in every row where one is given. The operands are disjoint.
    fn matmul(
        &mut self,
        p: &Product,
        a: Reals,
        b: Reals,
        bias: Option<Reals>,
        c: Reals,
    ) -> Result<()>;

    /// `sum[cols] += Σ_rows x[rows, cols]`.
    fn sum_rows(&mut self, x: Reals, sum: Reals) -> Result<()>;

    /// `x += y`.
    fn add(&mut self, x: Reals, y: Reals) -> Result<()>;

    /// The `n` values of `y` from the `ceil(n/2)` words of `x` ([`Half`]). The same bits on all
    /// backends.
    fn widen(&mut self, half: Half, x: Words, y: Reals) -> Result<()>;

    /// `to[r, c] += scale·from[r, c]` for `width` columns of two matrices with the same number of
    /// rows, in different memory.
    fn add_columns(&mut self, width: usize, scale: f64, from: Columns, to: Columns) -> Result<()>;

    /// Layer normalization of rows of `weight.len()` values: `y = (x − mean)·rstd·weight + bias`,
    /// with `rstd = 1/√(variance + eps)`. `stats[2·rows]` keeps `mean, rstd` of each row.
    fn layer_norm(
        &mut self,
        eps: f64,
        weight: Reals,
        bias: Reals,
        x: Reals,
        y: Reals,
        stats: Reals,
    ) -> Result<()>;

    /// Its vector-Jacobian product: *adds* to `dx`, `dweight` and `dbias`; the last two are left
    /// out where both are empty.
    fn layer_norm_vjp(
        &mut self,
        weight: Reals,
        x: Reals,
        stats: Reals,
        dy: Reals,
        dx: Reals,
        dweight: Reals,
        dbias: Reals,
    ) -> Result<()>;

    /// `y = gelu(x)`.
    fn gelu(&mut self, kind: Gelu, x: Reals, y: Reals) -> Result<()>;

    /// `d ← d·gelu'(x)`.
    fn gelu_vjp(&mut self, kind: Gelu, x: Reals, d: Reals) -> Result<()>;

    /// Attention. `q` has `samples·queries` rows, `k` and `v` `samples·keys`; `out` is
    /// `[samples·queries, heads·head_dim]`; `lse[samples, heads, queries]` keeps the logarithm of
    /// each softmax's denominator (−∞ where a query sees no key). `scratch` holds
    /// [`attention_scratch`](Self::attention_scratch) values.
    fn attention(
        &mut self,
        chunk: &Chunk,
        a: &Attention,
        q: Columns,
        k: Columns,
        v: Columns,
        out: Reals,
        lse: Reals,
        scratch: Reals,
    ) -> Result<()>;

    /// Its vector-Jacobian product: *sets* `dq`, `dk`, `dv`, which lie in matrices as `q`, `k`, `v`
    /// do (the three may be columns of one matrix; the columns do not overlap). *Adds* to the
    /// temperature's gradient.
    fn attention_vjp(
        &mut self,
        chunk: &Chunk,
        a: &Attention,
        q: Columns,
        k: Columns,
        v: Columns,
        out: Reals,
        lse: Reals,
        dout: Reals,
        dq: Columns,
        dk: Columns,
        dv: Columns,
        scratch: Reals,
    ) -> Result<()>;

    /// Scratch values that [`attention`](Self::attention) and its product need: linear in the
    /// number of tokens, nothing of size `samples·heads·tokens²`. Asked before a backend exists, so
    /// that plans need no memory.
    fn attention_scratch(a: &Attention, samples: usize, threads: usize) -> usize
    where
        Self: Sized;

    /// The sizes that the backend is fastest with, for plans.
    fn rows() -> Rows
    where
        Self: Sized,
    {
        Rows::CACHED
    }

    /// Inverted dropout in place: elements of sample `i` whose word ([`Chunk::stream`], element
    /// index within the sample) is below the threshold become 0, the others are multiplied by
    /// `1/(1-p)`. Its own vector-Jacobian product.
    fn dropout(&mut self, chunk: &Chunk, draw: Draw, p: f64, x: Reals) -> Result<()>;

    /// `x[i, t] = table[tokens[i, t]] + positions[t]`; `table[vocab, width]`, `positions[≥ T,
    /// width]`, `tokens[n, T]`, `x[n, T, width]`. A token outside the vocabulary raises
    /// [`Fault::Token`] and counts as a row of zeros.
    fn embed(
        &mut self,
        chunk: &Chunk,
        tokens: Ints,
        table: Reals,
        positions: Reals,
        width: usize,
        x: Reals,
    ) -> Result<()>;

    /// Its vector-Jacobian product: adds to `dtable` and `dpositions`.
    fn embed_vjp(
        &mut self,
        chunk: &Chunk,
        tokens: Ints,
        dx: Reals,
        width: usize,
        dtable: Reals,
        dpositions: Reals,
    ) -> Result<()>;

    /// Softmax cross-entropy in place: `logits[rows, vocab]` become `(softmax − t)·scale`, and
    /// `losses[rows] = −Σ t·log softmax`, where `t` is `onehot(target)`, smoothed as asked for.
    /// Rows whose target is negative are masked: gradient and loss are 0. A loss that is not finite
    /// raises [`Fault::Loss`]; a target beyond the vocabulary raises [`Fault::Token`].
    fn cross_entropy(
        &mut self,
        chunk: &Chunk,
        ce: &CrossEntropy,
        logits: Reals,
        targets: Ints,
        losses: Reals,
    ) -> Result<()>;
}

/// Operations of optimizers, one parameter tensor at a time.
pub trait OptimOps: Storage {
    /// `out[1] = Σ g²` (in `f64` or as exact as that, in a fixed order). A gradient that is not
    /// finite raises [`Fault::Gradient`].
    fn sum_squares(&mut self, site: Site, g: Reals, out: Reals) -> Result<()>;

    /// One update of the tensor `p` from its gradient `g` and state `m`, `v` (empty where the rule
    /// needs none). Does nothing while a fault is set.
    fn update(&mut self, u: &Update, p: Reals, g: Reals, m: Reals, v: Reals) -> Result<()>;
}

/// Machines that train one model together ("ranks"), each with its part of every batch. A backend
/// of one machine takes all of it as it is here.
///
/// All ranks make the same calls in the same order. What a rank gets is the same, bit for bit, on
/// every rank, and does not depend on who was first.
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

    /// Sends gradients on their way and fetches others: takes the values of `own`, which are added
    /// up over all ranks while the caller goes on, and sets `sum` to the sums of the earliest
    /// values that were taken and have not come back (it is as long as those). Both may be the same
    /// buffer, whose own values are taken first; either may be empty.
    ///
    /// # Errors
    /// [`Error::Setting`] where there is no other rank; [`Error::Rank`] for one that does not
    /// answer.
    fn exchange(&mut self, own: Reals, sum: Reals) -> Result<()> {
        let _ = (own, sum);
        Err(Error::Setting {
            what: "ranks",
            found: 1.0,
            possible: "2 or more, to exchange gradients",
        })
    }

    /// Gives `each` the numbers of every rank, in the order of ranks. Nothing is on its way
    /// meanwhile ([`exchange`](Self::exchange)).
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn gather(&mut self, own: [f64; 4], each: &mut dyn FnMut([f64; 4])) -> Result<()> {
        each(own);
        Ok(())
    }
}

/// Everything: what the layers of this crate and whole models need.
pub trait Backend: UpdateOps + NnOps + OptimOps + Exchange {}

impl<T: UpdateOps + NnOps + OptimOps + Exchange> Backend for T {}
