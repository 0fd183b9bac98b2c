//! Exact reversible training for [candle](https://docs.rs/candle-core): blocks stay ordinary candle
//! modules, and the [`VarMap`](candle_nn::VarMap), the optimizer and the training loop stay the
//! user's.
//!
//! ```
//! use bdia_candle::{Options, Reversible};
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_nn::{AdamW, Module, Optimizer, VarBuilder, VarMap, linear};
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let blocks = (0..8).map(|k| {
//!     let a = linear(6, 12, vb.pp(format!("h.{k}.a")))?;
//!     let b = linear(12, 6, vb.pp(format!("h.{k}.b")))?;
//!     // Any module, here a closure. It gives h(x).
//!     Ok(move |x: &Tensor| b.forward(&a.forward(x)?.gelu()?))
//! });
//! let mut stack = Reversible::new(blocks.collect::<Result<Vec<_>>>()?, Options::default())?;
//! let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-2)?;
//!
//! let x = Tensor::randn(0f32, 1., (32, 6), &Device::Cpu)?;
//! let target = Tensor::zeros((32, 6), DType::F32, &Device::Cpu)?;
//! for _ in 0..3 {
//!     // Instead of the loop over blocks:
//!     let (y, tape) = stack.forward(&x)?;
//!     let loss = candle_nn::loss::mse(&y, &target)?;
//!     // Instead of loss.backward():
//!     let grads = tape.backward(&loss)?;
//!     optimizer.step(&grads)?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What happens
//! candle computes `h_k` and, with its own autograd on one block and a few samples at a time, its
//! vector-Jacobian product; [`bdia_core::stack::Reversible`] keeps two integer activation tensors
//! and one bit per value and block, and rebuilds the rest. Below the tape candle's graph ends,
//! above it the graph is candle's own.
//!
//! # Guarantee
//! Rebuilt activations equal the originals in every bit, or the backward pass is an error. A block
//! must repeat itself: candle's operations on the CPU do; what is random must be replayed, as
//! [`Dropout`] is. Parameters are never touched here, so they are as before whenever an error comes
//! back.
//!
//! # Limits
//! `f32` tensors on the CPU; the first dimension is the sample. candle's fused
//! [`candle_nn::LayerNorm`], [`candle_nn::ops::softmax_last_dim`] and the like have no gradient
//! (with candle alone neither): a block through which no gradient reaches its input is reported
//! ([`Error::Cut`]), see [`model::norm`] for what to use.

#[path = "../../train/src/alloc.rs"]
pub mod alloc;
mod dropout;
pub mod model;
pub mod run;

use core::fmt;

use bdia_core::backend::Chunk;
use bdia_core::stack::{self, Blocks, Call, Config, Input, Needs, Pass, Tail};
use bdia_core::{Category, Fault, Grid, Layout, Reals, Site, Storage};
pub use bdia_core::{Gamma, Policy, Sign};
use bdia_cpu::{Cpu, CpuError};
use candle_core::backprop::GradStore;
use candle_core::{DType, ModuleT, Storage as CandleStorage, Tensor, Var};

pub use dropout::Dropout;

/// How a stack is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Fractional bits `l` of the grid that activations live on; values may be up to `2^(30-l)` in
    /// magnitude.
    pub frac_bits: u32,
    /// γ by step: its magnitude, and where its signs come from ([`Sign::Shared`] leaves a
    /// pretrained network nearest to what it was).
    pub gamma: Policy,
    /// Samples that a block sees at a time: memory against the speed of larger products.
    pub chunk: usize,
    /// Key of signs and dropout.
    pub seed: u64,
    /// The step that the next forward pass counts as: where a resumed run goes on.
    pub step: u32,
    /// Threads of the update (0: as many as there are cores). candle's own threads are candle's.
    pub threads: usize,
    /// Keep all activations besides, to count values that differ after rebuilding
    /// ([`Reversible::mismatches`]).
    pub verify: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            frac_bits: 14,
            gamma: Policy::PAPER,
            chunk: 16,
            seed: 0,
            step: 0,
            threads: 0,
            verify: false,
        }
    }
}

/// What can go wrong.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// candle's own error, from a block or from a tensor operation here.
    Candle(candle_core::Error),
    /// A setting that is not possible, or a batch that does not fit together.
    Setting(bdia_core::Error),
    /// The numbers went wrong: a value out of range in the forward pass, or a block that does not
    /// repeat itself.
    Fault(Fault),
    /// The update's memory or threads could not be had.
    Machine(CpuError),
    /// The input is not an `f32` tensor in this computer's memory with at least two dimensions.
    Input {
        /// Its type.
        dtype: DType,
        /// Its shape.
        dims: Vec<usize>,
    },
    /// A block gave a tensor of another shape than its input.
    Residual {
        /// Which block.
        block: usize,
        /// The shape of its input.
        expected: Vec<usize>,
        /// The shape of its result.
        found: Vec<usize>,
    },
    /// No gradient reaches the input of a block: an operation in it has no backward pass in candle.
    Cut {
        /// Which block.
        block: usize,
    },
    /// The loss does not depend on the output of the stack, or an operation on the way has no
    /// backward pass.
    Unused,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Candle(e) => e.fmt(f),
            Self::Setting(e) => e.fmt(f),
            Self::Fault(e) => e.fmt(f),
            Self::Machine(e) => e.fmt(f),
            Self::Input { dtype, dims } => write!(
                f,
                "the input of the stack is a {dtype:?} tensor of shape {dims:?}; expected F32 on \
                 the CPU, \
                 [samples, values of a sample …], none of them 0"
            ),
            Self::Residual { block, expected, found } => {
                write!(
                    f,
                    "block {block} made {found:?} from {expected:?}; a residual has the shape of \
                     its input"
                )
            }
            Self::Cut { block } => write!(
                f,
                "block {block}: no gradient reaches its input; an operation in it has no backward \
                 pass in candle (its \
                 fused layer norm, rms norm and softmax_last_dim: use layer_norm_slow, \
                 rms_norm_slow, softmax)"
            ),
            Self::Unused => f.write_str(
                "no gradient reaches the output of the stack: the loss does not depend on it, or \
                 an operation on the \
                 way has no backward pass in candle (fused layer norm, rms norm, softmax_last_dim)",
            ),
        }
    }
}

impl core::error::Error for Error {}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Self::Candle(e)
    }
}

impl From<bdia_core::Error> for Error {
    fn from(e: bdia_core::Error) -> Self {
        Self::Setting(e)
    }
}

impl From<CpuError> for Error {
    fn from(e: CpuError) -> Self {
        Self::Machine(e)
    }
}

/// So that `?` also works in functions that return candle's error.
impl From<Error> for candle_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Candle(e) => e,
            e => Self::wrap(e),
        }
    }
}

type Result<T> = core::result::Result<T, Error>;

/// Makes a residual of a module that returns `x + h(x)`, as many transformer blocks do.
#[derive(Debug, Clone)]
pub struct WithSkip<M>(pub M);

impl<M: ModuleT> ModuleT for WithSkip<M> {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        self.0.forward_t(x, train)? - x
    }
}

/// A stack of residual blocks: each module gives `h(x)`, in the shape of `x` and without the skip
/// connection (one that adds `x` itself is wrapped in [`WithSkip`]).
#[derive(Debug)]
pub struct Reversible<M> {
    blocks: Vec<M>,
    options: Options,
    laid: Option<Laid>,
    mismatches: u64,
}

/// The memory for one shape of input.
#[derive(Debug)]
struct Laid {
    dims: Vec<usize>,
    stack: stack::Reversible,
    layout: Layout,
    cpu: Cpu,
}

impl<M: ModuleT> Reversible<M> {
    /// A stack of blocks.
    ///
    /// # Errors
    /// [`Error::Setting`] for options that are not possible, or no blocks.
    pub fn new(blocks: Vec<M>, options: Options) -> Result<Self> {
        lay_out(&options, blocks.len(), &[1, 1])?;
        Ok(Self { blocks, options, laid: None, mismatches: 0 })
    }

    /// The blocks.
    pub fn blocks(&self) -> &[M] {
        &self.blocks
    }

    /// The step that the next forward pass counts as.
    pub fn step(&self) -> u32 {
        self.options.step
    }

    /// Values that differed from the originals after rebuilding, in the last backward pass (with
    /// [`Options::verify`]).
    pub fn mismatches(&self) -> u64 {
        self.mismatches
    }

    /// Bytes that the stack holds for the last shape of input, by category; candle's own memory is
    /// not in it. As the output leaves the stack, the last step has gamma and side bits like the
    /// others, and is inverted.
    pub fn memory(&self) -> impl Iterator<Item = (Category, usize)> {
        Category::ALL.into_iter().filter_map(|c| self.laid.as_ref().map(|l| (c, l.layout.bytes(c))))
    }

    /// The plain residual network `x_{k+1} = x_k + h_k(x_k)` by candle alone: what the trained
    /// network is, for evaluation and export, and with `train` what training without this crate
    /// would be.
    ///
    /// # Errors
    /// candle's.
    pub fn standard(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        self.blocks.iter().try_fold(x.clone(), |x, block| &x + block.forward_t(&x, train)?)
    }

    /// The forward pass of training: `x_K`, a leaf of candle's graph, and the tape that leads from
    /// its gradient back to `x` and its graph. Dropping the tape abandons the pass.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Residual`], [`Error::Fault`] for a value out of range,
    /// [`Error::Machine`] when memory for a new shape is missing; candle's.
    pub fn forward(&mut self, x: &Tensor) -> Result<(Tensor, Tape<'_, M>)> {
        if x.dtype() != DType::F32 || !x.device().is_cpu() || x.rank() < 2 || x.elem_count() == 0 {
            return Err(Error::Input { dtype: x.dtype(), dims: x.dims().to_vec() });
        }
        if self.laid.as_ref().is_none_or(|l| l.dims != x.dims()) {
            self.laid = None; // The old memory goes before the new one comes.
            let (stack, layout) = lay_out(&self.options, self.blocks.len(), x.dims())?;
            let cpu = Cpu::new(&layout, self.options.threads)?;
            self.laid = Some(Laid { dims: x.dims().to_vec(), stack, layout, cpu });
        }
        let Some(Laid { dims, stack, cpu, .. }) = &mut self.laid else { return Err(Error::Unused) };

        let pass = Pass { seed: self.options.seed, step: self.options.step, global: 0 };
        self.options.step = self.options.step.wrapping_add(1);
        cpu.clear_fault()?; // What an abandoned pass left.
        stack.embed(
            cpu,
            &mut Whole { x: &x.contiguous()?, per: dims[1..].iter().product() },
            &pass,
        )?;
        let mut modules =
            Modules { blocks: &self.blocks, dims, graph: None, grads: None, failed: None };
        let done = stack.forward(cpu, &mut modules, &pass);
        modules.check(done)?;
        fault(cpu)?;
        let y = stack.output(cpu)?;
        let y = Var::from_slice(cpu.reals(y)?, x.dims(), x.device())?;
        Ok((y.as_tensor().clone(), Tape { stack: self, x: x.clone(), y, pass }))
    }
}

fn lay_out(
    options: &Options,
    blocks: usize,
    dims: &[usize],
) -> Result<(stack::Reversible, Layout)> {
    let config = Config {
        id: 0,
        batch: dims[0],
        per_sample: dims[1..].iter().product(),
        blocks,
        chunk: options.chunk,
        tail: Tail::Output,
        needs: Needs::default(),
        ends_scratch: 0,
    };
    let grid = Grid::new(options.frac_bits)?;
    let mut layout = Layout::new(size_of::<f32>());
    let stack =
        stack::Reversible::layout(&config, grid, options.gamma, options.verify, &mut layout)?;
    Ok((stack, layout.checked()?))
}

fn fault(cpu: &mut Cpu) -> Result<()> {
    cpu.take_fault()?.map_or(Ok(()), |fault| Err(Error::Fault(fault)))
}

/// The way back of one forward pass.
#[derive(Debug)]
#[must_use = "without its backward pass no block is trained"]
pub struct Tape<'a, M> {
    stack: &'a mut Reversible<M>,
    x: Tensor,
    y: Var,
    pass: Pass,
}

impl<M: ModuleT> Tape<'_, M> {
    /// The gradients of a loss: `loss.backward()` for everything above the stack, its blocks, and
    /// all below.
    ///
    /// # Errors
    /// [`Error::Fault`] when a block did not repeat itself, [`Error::Cut`], [`Error::Unused`];
    /// candle's.
    pub fn backward(self, loss: &Tensor) -> Result<GradStore> {
        let mut grads = loss.backward()?;
        self.backward_into(&mut grads)?;
        Ok(grads)
    }

    /// The same where a model has several stacks: from the gradients of what is above. Call it from
    /// the last stack to the first.
    ///
    /// # Errors
    /// As [`backward`](Self::backward). The gradients are then incomplete.
    pub fn backward_into(self, grads: &mut GradStore) -> Result<()> {
        let Self { stack: Reversible { blocks, laid, mismatches, .. }, x, y, pass } = self;
        let Some(Laid { dims, stack, cpu, .. }) = laid else { return Err(Error::Unused) };
        let g = grads.remove(&y).ok_or(Error::Unused)?;
        let place = stack.gradient(blocks.len());
        with_slice(&g, |g| cpu.write_reals(place, g))??;
        drop(g);

        let mut modules = Modules { blocks, dims, graph: None, grads: Some(grads), failed: None };
        let done = stack.backward(cpu, &mut modules, &pass);
        modules.check(done)?;
        fault(cpu)?;
        *mismatches = stack.mismatches(cpu)?;

        // From G_0 on it is candle's graph again: the gradient of Σ x·G_0 is that of the loss.
        let g = Tensor::from_slice(cpu.reals(stack.gradient(0))?, x.shape(), x.device())?;
        collect(&(x * g)?.sum_all()?, grads, None)?;
        Ok(())
    }
}

/// Backpropagates and adds the gradients of variables to `grads`. The gradient of `input`, if there
/// is one, is returned.
fn collect(
    root: &Tensor,
    grads: &mut GradStore,
    input: Option<&Var>,
) -> candle_core::Result<Option<Tensor>> {
    let mut found = root.backward()?;
    let input = input.and_then(|x| found.remove(x));
    for var in root.sorted_nodes().into_iter().filter(|t| t.is_variable()) {
        let Some(g) = found.remove(var) else { continue };
        // Detached: otherwise the gradient keeps the block's graph alive.
        let sum = match grads.remove(var) {
            Some(sum) => (sum + g)?.detach(),
            None => g.detach(),
        };
        grads.insert(var, sum);
    }
    Ok(input)
}

/// The values of a tensor in this computer's memory.
fn with_slice<T>(t: &Tensor, f: impl FnOnce(&[f32]) -> T) -> candle_core::Result<T> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        CandleStorage::Cpu(values) => {
            Ok(f(&values.as_slice()?[layout.start_offset()..][..t.elem_count()]))
        }
        _ => candle_core::bail!("expected a tensor on the CPU"),
    }
}

/// The stack's input: a tensor of the whole batch.
struct Whole<'a> {
    x: &'a Tensor,
    per: usize,
}

impl Input<Cpu> for Whole<'_> {
    fn forward(
        &mut self,
        cpu: &mut Cpu,
        chunk: &Chunk,
        _: bool,
        x: Reals,
        _: Reals,
    ) -> bdia_core::Result<()> {
        let from = chunk.first * self.per;
        with_slice(self.x, |values| {
            cpu.write_reals(x, &values[from..from + chunk.samples * self.per])
        })
        .map_err(|_| bdia_core::Error::Foreign(Site::Embedding))?
    }

    fn vjp(&mut self, _: &mut Cpu, _: &Chunk, _: Reals, _: Reals) -> bdia_core::Result<()> {
        Ok(()) // G_0 is read as a whole.
    }
}

/// candle's modules as the blocks of a stack.
struct Modules<'a, M> {
    blocks: &'a [M],
    dims: &'a [usize],
    /// Input and residual of the block and chunk whose vector-Jacobian product comes next, with
    /// candle's graph between.
    graph: Option<(Var, Tensor)>,
    grads: Option<&'a mut GradStore>,
    failed: Option<Error>,
}

impl<M: ModuleT> Modules<'_, M> {
    /// The pass's own error in place of the plain one that stands for it.
    fn check(&mut self, done: bdia_core::Result<()>) -> Result<()> {
        match self.failed.take() {
            Some(e) => Err(e),
            None => Ok(done?),
        }
    }

    fn residual(&mut self, cpu: &mut Cpu, call: &Call, h: Reals) -> Result<()> {
        let mut dims = self.dims.to_vec();
        dims[0] = call.chunk.samples;
        let x = Var::from_slice(cpu.reals(call.x)?, dims, &candle_core::Device::Cpu)?;
        let y = dropout::within(&call.chunk, || self.blocks[call.block].forward_t(&x, true))?;
        if y.dims() != x.dims() {
            let (expected, found) = (x.dims().to_vec(), y.dims().to_vec());
            return Err(Error::Residual { block: call.block, expected, found });
        }
        with_slice(&y, |values| cpu.write_reals(h, values))??;
        self.graph = call.keep.then_some((x, y));
        Ok(())
    }

    fn vjp(&mut self, cpu: &mut Cpu, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        let (Some((x, h)), Some(grads)) = (self.graph.take(), self.grads.as_deref_mut()) else {
            return Err(bdia_core::Error::Foreign(Site::Block(call.block)).into());
        };
        let gh = Tensor::from_slice(cpu.reals(gh)?, h.shape(), h.device())?;
        let g = collect(&(h * gh)?.sum_all()?, grads, Some(&x))?
            .ok_or(Error::Cut { block: call.block })?;
        let gx = cpu.reals_mut(gx)?;
        with_slice(&g, |g| gx.iter_mut().zip(g).for_each(|(sum, g)| *sum += g))?;
        Ok(())
    }
}

impl<M: ModuleT> Blocks<Cpu> for Modules<'_, M> {
    fn residual(&mut self, cpu: &mut Cpu, call: &Call, h: Reals) -> bdia_core::Result<()> {
        Modules::residual(self, cpu, call, h).map_err(|e| self.keep(e, Site::Block(call.block)))
    }

    fn vjp(&mut self, cpu: &mut Cpu, call: &Call, gh: Reals, gx: Reals) -> bdia_core::Result<()> {
        Modules::vjp(self, cpu, call, gh, gx).map_err(|e| self.keep(e, Site::Block(call.block)))
    }
}

impl<M> Modules<'_, M> {
    fn keep(&mut self, e: Error, site: Site) -> bdia_core::Error {
        self.failed = Some(e);
        bdia_core::Error::Foreign(site)
    }
}
