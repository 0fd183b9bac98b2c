//! The list of operations, and what is made of it: the traits of a backend, and [`Wrapper`].

use super::{
    Attention, Chunk, Columns, CrossEntropy, Gate, Gelu, Identity, Product, RmsNorm, Rotary, State,
};
use crate::arena::{Ints, Reals, Words};
use crate::error::{Error, Fault, Result, Site};
use crate::optim::Update;
use crate::packing::Packed;
use crate::plan::Rows;
use crate::real::Real;
use crate::rng::Draw;
use crate::update::{FloatGamma, Gamma, Grid};

/// Makes from one list: the traits; [`Wrapper`], whose default for every operation forwards it; and
/// the traits' implementations for every wrapper. What a trait has besides operations, or with a
/// default of its own, stands under `as they are`.
macro_rules! operations {
    ($(
        $(#[$about:meta])*
        trait $trait:ident $(: $super:ident)? {
            as they are { $($given:tt)* }
            reads { $(
                $(#[$read_doc:meta])*
                fn $read:ident(&self $(, $read_arg:ident: $read_type:ty)* $(,)?) $(-> $got:ty)?;
            )* }
            changes { $(
                $(#[$op_doc:meta])*
                fn $op:ident(&mut self $(, $arg:ident: $type:ty)* $(,)?) $(-> $back:ty)?;
            )* }
        }
    )*) => {
        $(
            $(#[$about])*
            pub trait $trait $(: $super)? {
                $($given)*
                $(
                    $(#[$read_doc])*
                    fn $read(&self $(, $read_arg: $read_type)*) $(-> $got)?;
                )*
                $(
                    $(#[$op_doc])*
                    fn $op(&mut self $(, $arg: $type)*) $(-> $back)?;
                )*
            }
        )*

        /// A backend around another one: a tracer, a fault injector, one of several machines.
        ///
        /// Every operation goes to [`inner`](Self::inner) unless the wrapper has its own, and the
        /// wrapper is a backend by that alone (with an [`Exchange`](super::Exchange) of its own).
        pub trait Wrapper: Sized {
            /// The type of the backend inside.
            type Inner: UpdateOps + NnOps + OptimOps;

            /// The backend inside.
            fn inner(&self) -> &Self::Inner;

            /// The backend inside, mutably.
            fn inner_mut(&mut self) -> &mut Self::Inner;

            /// [`Storage::clear_fault`]
            ///
            /// # Errors
            /// Any error of the backend inside.
            fn clear_fault(&mut self) -> Result<()> {
                self.inner_mut().clear_fault()
            }

            /// [`Storage::peek_fault`]
            ///
            /// # Errors
            /// Any error of the backend inside.
            fn peek_fault(&mut self) -> Result<Option<Fault>> {
                self.inner_mut().peek_fault()
            }

            /// [`Storage::attach`]
            ///
            /// # Errors
            /// Any error of the backend inside.
            fn attach(&mut self, at: Words, bytes: &'static [u8]) -> Result<()> {
                self.inner_mut().attach(at, bytes)
            }

            $(
                $(
                    #[doc = concat!("[`", stringify!($trait), "::", stringify!($read), "`]")]
                    #[allow(clippy::missing_errors_doc)]
                    fn $read(&self $(, $read_arg: $read_type)*) $(-> $got)? {
                        self.inner().$read($($read_arg),*)
                    }
                )*
                $(
                    #[doc = concat!("[`", stringify!($trait), "::", stringify!($op), "`]")]
                    #[allow(clippy::missing_errors_doc)]
                    fn $op(&mut self $(, $arg: $type)*) $(-> $back)? {
                        self.inner_mut().$op($($arg),*)
                    }
                )*
            )*
        }

        $(
            operations! { @forward $trait
                { $(fn $read(&self $(, $read_arg: $read_type)*) $(-> $got)?;)* }
                { $(fn $op(&mut self $(, $arg: $type)*) $(-> $back)?;)* }
            }
        )*
    };
    (@forward $trait:ident
        { $(fn $read:ident(&self $(, $read_arg:ident: $read_type:ty)*) $(-> $got:ty)?;)* }
        { $(fn $op:ident(&mut self $(, $arg:ident: $type:ty)*) $(-> $back:ty)?;)* }
    ) => {
        impl<W: Wrapper> $trait for W {
            operations! { @own $trait }
            $(
                fn $read(&self $(, $read_arg: $read_type)*) $(-> $got)? {
                    Wrapper::$read(self $(, $read_arg)*)
                }
            )*
            $(
                fn $op(&mut self $(, $arg: $type)*) $(-> $back)? {
                    Wrapper::$op(self $(, $arg)*)
                }
            )*
        }
    };
    (@own Storage) => {
        type Real = <W::Inner as Storage>::Real;

        fn clear_fault(&mut self) -> Result<()> {
            Wrapper::clear_fault(self)
        }

        fn peek_fault(&mut self) -> Result<Option<Fault>> {
            Wrapper::peek_fault(self)
        }

        fn attach(&mut self, at: Words, bytes: &'static [u8]) -> Result<()> {
            Wrapper::attach(self, at, bytes)
        }
    };
    (@own NnOps) => {
        fn attention_scratch(a: &Attention, samples: usize, threads: usize) -> usize {
            W::Inner::attention_scratch(a, samples, threads)
        }

        fn rows() -> Rows {
            W::Inner::rows()
        }
    };
    (@own $other:ident) => {};
}

operations! {
    /// Memory and the deferred status.
    trait Storage {
        as they are {
            /// The floating-point type.
            type Real: Real;

            /// Clears the status, whatever it was, so that what an abandoned step left behind does
            /// not stop the next one. A device need not wait for this.
            fn clear_fault(&mut self) -> Result<()> {
                self.take_fault().map(|_| ())
            }

            /// Reads the status without clearing it. A foreign optimizer asks this before it
            /// changes parameters.
            fn peek_fault(&mut self) -> Result<Option<Fault>> {
                let fault = self.take_fault()?;
                if let Some(fault) = fault {
                    self.raise(fault);
                }
                Ok(fault)
            }

            /// Says where mapped words ([`Layout::mapped`](crate::Layout::mapped)) are: `bytes`
            /// has all of `at`, from its first byte on (aligned to 4), little-endian. A static on
            /// a device, a file that is mapped until the program ends.
            ///
            /// # Errors
            /// [`Error::Setting`] by default: a backend whose memory is elsewhere copies instead.
            /// [`Error::Handle`] for words that are not mapped, [`Error::Shape`] for another
            /// length.
            fn attach(&mut self, at: Words, bytes: &'static [u8]) -> Result<()> {
                let _ = (at, bytes);
                let possible = "copied ones: this backend reads no memory but its own";
                Err(Error::unfit("packed matrices", "mapped ones", possible))
            }
        }
        reads {
            /// Which backend this is.
            fn identity(&self) -> Identity;

            /// Copies values to the host.
            ///
            /// # Errors
            /// As all operations of these traits: for a handle outside its arena or of another
            /// layout, a wrong length, operands that overlap.
            fn read_reals(&self, src: Reals, dst: &mut [<Self as Storage>::Real]) -> Result<()>;

            /// Copies values to the host.
            fn read_ints(&self, src: Ints, dst: &mut [i32]) -> Result<()>;

            /// Copies values to the host.
            fn read_words(&self, src: Words, dst: &mut [u32]) -> Result<()>;
        }
        changes {
            /// Copies values from the host.
            fn write_reals(&mut self, dst: Reals, src: &[<Self as Storage>::Real]) -> Result<()>;

            /// Copies values from the host.
            fn write_ints(&mut self, dst: Ints, src: &[i32]) -> Result<()>;

            /// Copies values from the host.
            fn write_words(&mut self, dst: Words, src: &[u32]) -> Result<()>;

            /// Sets all values.
            fn fill_reals(&mut self, dst: Reals, value: <Self as Storage>::Real) -> Result<()>;

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
        }
    }

    /// The reversible update and what belongs to it. Same bits on every backend.
    ///
    /// Shapes: a chunk has `n = chunk.samples` samples of `p` values each; `x`, `h`, … hold `n·p`
    /// values. `side` holds `n·m·ceil(p/32)` words, sample by sample and plane by plane (the lowest
    /// first), element `i` in bit `i % 32` of word `i / 32`; unused bits are 0. `sum` is two words
    /// to which the checksum ([`crate::update::checksum`], index `chunk.first·p + i`) is *added*;
    /// an empty `sum` asks for none.
    trait UpdateOps: Storage {
        as they are {}
        reads {}
        changes {
            /// `X = Q(y)`; a value out of range raises [`Fault::Range`] and is stored as 0.
            fn quantize(
                &mut self,
                chunk: &Chunk,
                grid: Grid,
                y: Reals,
                x: Ints,
                sum: Words,
            ) -> Result<()>;

            /// `y = 2^-l·X`.
            fn dequantize(&mut self, grid: Grid, x: Ints, y: Reals) -> Result<()>;

            /// `X += Q(h)`: block 0 of the reversible stack, and every block of the quantized
            /// standard one. A quantized `h` out of range counts as 0, a sum out of range is kept
            /// as it is (wrapped); both raise [`Fault::Range`].
            fn add_quantized(
                &mut self,
                chunk: &Chunk,
                grid: Grid,
                x: Ints,
                h: Reals,
                sum: Words,
            ) -> Result<()>;

            /// `X -= Q(h)`, the inverse of [`add_quantized`](Self::add_quantized): wraps. A
            /// quantized `h` out of range counts as 0 and raises nothing.
            fn subtract_quantized(
                &mut self,
                chunk: &Chunk,
                grid: Grid,
                x: Ints,
                h: Reals,
                sum: Words,
            ) -> Result<()>;

            /// The step ([`Gamma::step`]) in place: `x` holds `X_{k-1}` and becomes `X_{k+1}`;
            /// `cur` is `x_k`, `h` is `h_k(x_k)`. Writes the side bits of `X_{k-1}` unless `side`
            /// is empty, adds the checksum of `X_{k+1}`. Faults as in
            /// [`add_quantized`](Self::add_quantized).
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

            /// The inverse ([`Gamma::inverse`]) in place: `x` holds `X_{k+1}` and becomes
            /// `X_{k-1}`, whose checksum is added. A quantized value out of range counts as 0, as
            /// in the step, and raises nothing.
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

            /// The step without a grid, in place: `x ← γ·x + ((1-γ)·cur + (1+γ)·h)`. With `|γ| = 0`
            /// the old content of `x` is not read and `x = cur + h`. A result that is not finite
            /// raises [`Fault::Range`].
            fn blend(
                &mut self,
                chunk: &Chunk,
                gamma: FloatGamma,
                x: Reals,
                cur: Reals,
                h: Reals,
            ) -> Result<()>;

            /// The inverse of [`blend`](Self::blend) up to rounding: `x ← (x − ((1-γ)·cur +
            /// (1+γ)·h)) / γ`.
            fn unblend(
                &mut self,
                chunk: &Chunk,
                gamma: FloatGamma,
                x: Reals,
                cur: Reals,
                h: Reals,
            ) -> Result<()>;

            /// The gradient of the step ([`crate::update::combine`]): `next` holds `G_{k+1}` and
            /// becomes `γ·G_{k+1}`, the first part of `G_{k-1}`; `cur += (1-γ)·G_{k+1}`; `h =
            /// (1+γ)·G_{k+1}`. A new value of `h`, then of `cur`, that is not finite raises
            /// [`Fault::ActivationGradient`].
            fn combine(
                &mut self,
                chunk: &Chunk,
                gamma: FloatGamma,
                next: Reals,
                cur: Reals,
                h: Reals,
            ) -> Result<()>;

            /// Raises [`Fault::ActivationGradient`] where a value is not finite. Changes nothing.
            fn check_gradient(&mut self, chunk: &Chunk, g: Reals) -> Result<()>;

            /// Raises [`Fault::Input`] where `y` is not `2^-l·X` in every bit. Changes nothing.
            fn check_input(&mut self, chunk: &Chunk, grid: Grid, x: Ints, y: Reals) -> Result<()>;

            /// Raises [`Fault::Checksum`] when the two sums differ.
            fn compare(
                &mut self,
                a: Words,
                b: Words,
                activation: usize,
                block: usize,
            ) -> Result<()>;

            /// Adds the number of differing elements to the 64-bit counter `count` (two words).
            fn count_differences(&mut self, a: Ints, b: Ints, count: Words) -> Result<()>;
        }
    }

    /// Operations of transformer layers. All matrices are row-major; `rows` is samples · tokens of
    /// a chunk.
    trait NnOps: Storage {
        as they are {
            /// Scratch values that [`attention`](Self::attention) and its product need: linear in
            /// the number of tokens, nothing of size `samples·heads·tokens²`. It is asked before a
            /// backend exists, so that plans need no memory.
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
        }
        reads {}
        changes {
            /// [`Product`], plus `bias[cols]` in every row where one is given. The operands are
            /// disjoint.
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

            /// The rows of `x` from `first` on, in order, as many as `y` has room for. The same
            /// bits on all backends.
            fn unpack(&mut self, x: &Packed, first: usize, y: Reals) -> Result<()>;

            /// `y[i] = x[rows[i]]`, whole rows: the embedding of tokens, of which every sample has
            /// as many. One that `x` does not have raises [`Fault::Token`] and gives a row of
            /// zeros. The same bits on all backends.
            fn unpack_rows(&mut self, chunk: &Chunk, x: &Packed, rows: Ints, y: Reals)
                -> Result<()>;

            /// `to[r, c] += scale·from[r, c]` for `width` columns of two matrices with the same
            /// number of rows, in different memory.
            fn add_columns(
                &mut self,
                width: usize,
                scale: f64,
                from: Columns,
                to: Columns,
            ) -> Result<()>;

            /// Layer normalization of rows of `weight.len()` values: `y = (x − mean)·rstd·weight +
            /// bias`, with `rstd = 1/√(variance + eps)`. `stats[2·rows]` keeps `mean, rstd` of each
            /// row.
            fn layer_norm(
                &mut self,
                eps: f64,
                weight: Reals,
                bias: Reals,
                x: Reals,
                y: Reals,
                stats: Reals,
            ) -> Result<()>;

            /// Its vector-Jacobian product: *adds* to `dx`, `dweight` and `dbias`; the last two are
            /// left out where both are empty.
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

            /// [`RmsNorm`]: `y = x·rstd·(offset + weight)` with `rstd = 1/√(mean(x²) + eps)`;
            /// `weight[width]`. `x` and `y` begin at their columns and lie in different memory;
            /// `stats[rows·groups]` keeps `rstd`.
            fn rms_norm(
                &mut self,
                norm: &RmsNorm,
                weight: Reals,
                x: Columns,
                y: Columns,
                stats: Reals,
            ) -> Result<()>;

            /// Its vector-Jacobian product: *adds* to `dx` and to `dweight`, which is left out
            /// where it is empty.
            fn rms_norm_vjp(
                &mut self,
                norm: &RmsNorm,
                weight: Reals,
                x: Columns,
                stats: Reals,
                dy: Columns,
                dx: Columns,
                dweight: Reals,
            ) -> Result<()>;

            /// [`Rotary`] in place, from a row's column on. `table` has the `head_dim/2` cosines of
            /// a position's angles and then their sines, position after position;
            /// `positions[samples·tokens]` has the position of every row, and where it is empty a
            /// row's position is its place in the sample. One that the table does not have raises
            /// [`Fault::Position`], and its row stays as it is.
            fn rotate(
                &mut self,
                chunk: &Chunk,
                rotary: &Rotary,
                table: Reals,
                positions: Ints,
                x: Columns,
            ) -> Result<()>;

            /// `y = act(gate)·up`.
            fn gated(&mut self, act: Gate, gate: Reals, up: Reals, y: Reals) -> Result<()>;

            /// Its vector-Jacobian product: `d` holds `dy` and becomes `dup = dy·act(gate)`;
            /// `dgate = dy·up·act'(gate)`.
            fn gated_vjp(
                &mut self,
                act: Gate,
                gate: Reals,
                up: Reals,
                d: Reals,
                dgate: Reals,
            ) -> Result<()>;

            /// `y = gelu(x)`.
            fn gelu(&mut self, kind: Gelu, x: Reals, y: Reals) -> Result<()>;

            /// `d ← d·gelu'(x)`.
            fn gelu_vjp(&mut self, kind: Gelu, x: Reals, d: Reals) -> Result<()>;

            /// Attention. `q` has `samples·queries` rows of `heads·head_dim` columns, `k` and `v`
            /// `samples·keys` rows of `kv_heads·head_dim`; `out` is
            /// `[samples·queries, heads·head_dim]`; `lse[samples, heads, queries]` keeps the
            /// logarithm of each softmax's denominator (−∞ where a query sees no key). `scratch`
            /// holds [`attention_scratch`](Self::attention_scratch) values.
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

            /// Its vector-Jacobian product: *sets* `dq`, `dk`, `dv`, which lie in matrices as `q`,
            /// `k`, `v` do (the three may be columns of one matrix; the columns do not overlap).
            /// *Adds* to the temperature's gradient.
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

            /// Inverted dropout in place: elements of sample `i` whose word ([`Chunk::stream`],
            /// element index within the sample) is below the threshold become 0, the others are
            /// multiplied by `1/(1-p)`. Its own vector-Jacobian product.
            fn dropout(&mut self, chunk: &Chunk, draw: Draw, p: f64, x: Reals) -> Result<()>;

            /// `x[i, t] = table[tokens[i, t]] + positions[t]`; `table[vocab, width]`, `positions[≥
            /// T, width]` or empty, `tokens[n, T]`, `x[n, T, width]`. A token outside the
            /// vocabulary raises [`Fault::Token`] and counts as a row of zeros.
            fn embed(
                &mut self,
                chunk: &Chunk,
                tokens: Ints,
                table: Reals,
                positions: Reals,
                width: usize,
                x: Reals,
            ) -> Result<()>;

            /// Its vector-Jacobian product: adds to `dtable` and `dpositions`, which is left out
            /// where it is empty.
            fn embed_vjp(
                &mut self,
                chunk: &Chunk,
                tokens: Ints,
                dx: Reals,
                width: usize,
                dtable: Reals,
                dpositions: Reals,
            ) -> Result<()>;

            /// Softmax cross-entropy in place: `logits[rows, vocab]` become `(softmax − t)·scale`,
            /// and `losses[rows] = −Σ t·log softmax`, where `t` is `onehot(target)`, smoothed as
            /// asked for. Rows whose target is negative are masked: gradient and loss are 0. A loss
            /// that is not finite raises [`Fault::Loss`]; a target beyond the vocabulary raises
            /// [`Fault::Token`].
            fn cross_entropy(
                &mut self,
                chunk: &Chunk,
                ce: &CrossEntropy,
                logits: Reals,
                targets: Ints,
                losses: Reals,
            ) -> Result<()>;
        }
    }

    /// Operations of optimizers, one parameter tensor at a time.
    trait OptimOps: Storage {
        as they are {}
        reads {}
        changes {
            /// `out[1] = Σ g²` (in `f64` or as exact as that, in a fixed order). A gradient that is
            /// not finite raises [`Fault::Gradient`].
            fn sum_squares(&mut self, site: Site, g: Reals, out: Reals) -> Result<()>;

            /// One update of the tensor `p[rows, cols]`, a vector with one row, from its gradient
            /// `g` and its state, which the rule has the lengths of. Does nothing while a fault is
            /// set.
            fn update(
                &mut self,
                u: &Update,
                shape: [usize; 2],
                p: Reals,
                g: Reals,
                state: &State,
            ) -> Result<()>;
        }
    }
}
