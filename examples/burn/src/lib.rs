//! Exact reversible training for [burn](https://docs.rs/burn): modules, optimizer and training loop
//! stay the user's.
//!
//! ```
//! use bdia_burn::{Options, Residual, Reversible};
//! use burn::backend::{Autodiff, NdArray};
//! use burn::module::Module;
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::{AdamConfig, Optimizer};
//! use burn::tensor::{Distribution, Tensor, activation::gelu, backend::Backend};
//!
//! #[derive(Module, Debug)]
//! struct Block<B: Backend> { a: Linear<B>, b: Linear<B> }
//!
//! impl<B: Backend> Residual<B, 2> for Block<B> {
//!     // h(x), not x + h(x)
//!     fn residual(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
//!         self.b.forward(gelu(self.a.forward(x)))
//!     }
//! }
//!
//! #[derive(Module, Debug)]
//! struct Model<B: Backend> { blocks: Vec<Block<B>>, head: Linear<B> }
//!
//! type B = Autodiff<NdArray>;
//! let device = Default::default();
//! let linear = |i, o| LinearConfig::new(i, o).init(&device);
//! let block = |_| Block { a: linear(6, 12), b: linear(12, 6) };
//! let mut model = Model::<B> { blocks: (0..8).map(block).collect(), head: linear(6, 1) };
//! let mut optimizer = AdamConfig::new().init();
//! let mut stack = Reversible::new(Options::default());
//!
//! let x = Tensor::<B, 2>::random([32, 6], Distribution::Default, &device);
//! for _ in 0..3 {
//!     // Instead of the loop over blocks:
//!     let (y, tape) = stack.forward(&model.blocks, x.clone())?;
//!     let loss = model.head.forward(y).powi_scalar(2).mean();
//!     // Instead of GradientsParams::from_grads:
//!     let grads = tape.backward(loss, &model)?;
//!     model = optimizer.step(1e-2, model, grads);
//! }
//! # Ok::<(), bdia_burn::Error>(())
//! ```
//!
//! # Guarantee
//! Rebuilt activations equal the originals in every bit, or the backward pass is an error and there
//! are no gradients. A block must repeat itself. burn's random numbers are repeated by seeding its
//! backend before every call of a block ([`Backend::seed`]) from seed, step, block and first
//! sample: [`burn::nn::Dropout`] in a block works as it is, as long as no other thread draws from
//! the same backend meanwhile (if one does, that is the error). Other draws of the program, of
//! which there may be many between the passes, follow from the last seed then.
//!
//! # Limits
//! `f32` and a backend whose operations give the same bits again; values travel through this
//! computer's memory, chunk by chunk. The first dimension is the sample.

pub mod model;

use core::fmt;

use bdia_core::backend::Chunk;
use bdia_core::rng::philox;
use bdia_core::stack::{self, Blocks, Call, Config, Input, Needs, Pass, Tail};
use bdia_core::{Fault, Grid, Layout, Reals, Site, Storage};
pub use bdia_core::{Gamma, Policy, Sign};
use bdia_cpu::{Cpu, CpuError};
use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DataError, Tensor, TensorData};

/// A residual block: `h(x)` in the shape of `x`, without the skip connection.
pub trait Residual<B: Backend, const D: usize> {
    /// `h(x)`.
    fn residual(&self, x: Tensor<B, D>) -> Tensor<B, D>;
}

/// How a stack is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Fractional bits `l` of the grid that activations live on; values may be up to `2^(30-l)` in
    /// magnitude.
    pub frac_bits: u32,
    /// γ by step: its magnitude, and where its signs come from ([`Sign::Shared`] leaves a
    /// pretrained network nearest to what it was).
    pub gamma: Policy,
    /// Samples that a block sees at a time.
    pub chunk: usize,
    /// Key of signs and dropout.
    pub seed: u64,
    /// The step that the next forward pass counts as.
    pub step: u32,
    /// Keep all activations besides, to count values that differ after rebuilding
    /// ([`Reversible::mismatches`]).
    pub verify: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { frac_bits: 14, gamma: Policy::PAPER, chunk: 16, seed: 0, step: 0, verify: false }
    }
}

/// What can go wrong.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A setting that is not possible, no blocks, or an empty batch.
    Setting(bdia_core::Error),
    /// The numbers went wrong: a value out of range in the forward pass, or a block that does not
    /// repeat itself.
    Fault(Fault),
    /// The update's memory or threads could not be had.
    Machine(CpuError),
    /// The backend's floating-point type is not `f32`.
    Type(DataError),
    /// A block gave a tensor of another shape than its input.
    Residual {
        /// Which block.
        block: usize,
    },
    /// No gradient reaches the input of a block.
    Cut {
        /// Which block.
        block: usize,
    },
    /// The loss does not depend on the output of the stack.
    Unused,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setting(e) => e.fmt(f),
            Self::Fault(e) => e.fmt(f),
            Self::Machine(e) => e.fmt(f),
            Self::Type(e) => write!(f, "expected a backend of f32: {e:?}"),
            Self::Residual { block } => {
                write!(f, "block {block}: a residual has the shape of its input")
            }
            Self::Cut { block } => write!(f, "block {block}: no gradient reaches its input"),
            Self::Unused => f.write_str("the loss does not depend on the output of the stack"),
        }
    }
}

impl core::error::Error for Error {}

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

impl From<DataError> for Error {
    fn from(e: DataError) -> Self {
        Self::Type(e)
    }
}

type Result<T> = core::result::Result<T, Error>;

/// The memory and the counter of a reversible stack. burn's optimizers take and return the model,
/// so the blocks stay in it and come with every call.
#[derive(Debug)]
pub struct Reversible {
    options: Options,
    laid: Option<Laid>,
    mismatches: u64,
}

/// The memory for one shape of input and number of blocks.
#[derive(Debug)]
struct Laid {
    dims: Vec<usize>,
    stack: stack::Reversible,
    cpu: Cpu,
}

impl Reversible {
    /// A stack without memory yet.
    pub fn new(options: Options) -> Self {
        Self { options, laid: None, mismatches: 0 }
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

    /// The forward pass of training: `x_K`, a leaf of burn's graph, and the tape that leads from
    /// its gradient back to `x` and its graph. Dropping the tape abandons the pass.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::Residual`], [`Error::Fault`] for a value out of range,
    /// [`Error::Machine`], [`Error::Type`].
    pub fn forward<'a, B, M, const D: usize>(
        &'a mut self,
        blocks: &'a [M],
        x: Tensor<B, D>,
    ) -> Result<(Tensor<B, D>, Tape<'a, B, M, D>)>
    where
        B: AutodiffBackend,
        M: AutodiffModule<B> + Residual<B, D>,
    {
        let (dims, device) = (x.dims(), x.device());
        let same = |l: &Laid| l.dims == dims && l.stack.config().blocks == blocks.len();
        let laid = match self.laid.take().filter(same) {
            Some(laid) => laid,
            None => {
                let (stack, layout) = lay_out(&self.options, blocks.len(), &dims)?;
                Laid { dims: dims.to_vec(), stack, cpu: Cpu::new(&layout, 0)? }
            }
        };
        let Laid { stack, cpu, .. } = self.laid.insert(laid);

        // burn draws a parameter when it is first used; within a block that would come before its
        // dropout, once.
        blocks.iter().for_each(|block| block.visit(&mut Drawn));
        let pass = Pass { seed: self.options.seed, step: self.options.step, global: 0 };
        self.options.step = self.options.step.wrapping_add(1);
        cpu.clear_fault()?; // What an abandoned pass left.
        let data = x.to_data();
        stack.embed(
            cpu,
            &mut Whole { x: data.as_slice()?, per: dims[1..].iter().product() },
            &pass,
        )?;
        drop(data);
        let mut modules = Modules::new(blocks, dims, &device, None);
        let done = stack.forward(cpu, &mut modules, &pass);
        modules.check(done)?;
        fault(cpu)?;
        let y = stack.output(cpu)?;
        let y = tensor(cpu.reals(y)?, dims, &device).require_grad();
        Ok((
            y.clone(),
            Tape { laid: self.laid.as_mut(), mismatches: &mut self.mismatches, blocks, x, y, pass },
        ))
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

fn tensor<B: Backend, const D: usize>(
    values: &[f32],
    dims: [usize; D],
    device: &B::Device,
) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(values.to_vec(), dims), device)
}

/// `root.backward()`, also where nothing below is tracked (burn panics there).
fn backpropagate<B: AutodiffBackend>(root: Tensor<B, 1>) -> B::Gradients {
    let tracked = Tensor::<B, 1>::zeros([1], &root.device()).require_grad();
    (root + tracked).backward()
}

/// The way back of one forward pass.
#[derive(Debug)]
#[must_use = "without its backward pass no block is trained"]
pub struct Tape<'a, B: AutodiffBackend, M, const D: usize> {
    laid: Option<&'a mut Laid>,
    mismatches: &'a mut u64,
    blocks: &'a [M],
    x: Tensor<B, D>,
    y: Tensor<B, D>,
    pass: Pass,
}

impl<B, M, const D: usize> Tape<'_, B, M, D>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + Residual<B, D>,
{
    /// The gradients of a loss for all parameters of a model, of which the blocks are a part: what
    /// `GradientsParams::from_grads(loss.backward(), &model)` is without this crate.
    ///
    /// # Errors
    /// [`Error::Fault`] when a block did not repeat itself, [`Error::Cut`], [`Error::Unused`],
    /// [`Error::Type`].
    pub fn backward<N: AutodiffModule<B>>(
        self,
        loss: Tensor<B, 1>,
        model: &N,
    ) -> Result<GradientsParams> {
        let Self { laid, mismatches, blocks, x, y, pass } = self;
        let Some(Laid { stack, cpu, .. }) = laid else { return Err(Error::Unused) };
        let (dims, device) = (x.dims(), x.device());
        let mut above = backpropagate(loss);
        let g = y.grad_remove(&mut above).ok_or(Error::Unused)?;
        cpu.write_reals(stack.gradient(blocks.len()), g.into_data().as_slice()?)?;
        let mut grads = GradientsParams::from_module(&mut above, model);
        drop((above, y));

        let mut modules = Modules::new(blocks, dims, &device, Some(&mut grads));
        let done = stack.backward(cpu, &mut modules, &pass);
        modules.check(done)?;
        fault(cpu)?;
        *mismatches = stack.mismatches(cpu)?;

        // From G_0 on it is burn's graph again: the gradient of Σ x·G_0 is that of the loss.
        let g = tensor(cpu.reals(stack.gradient(0))?, dims, &device);
        let mut below = backpropagate((x * g).sum());
        Add { sum: &mut grads, part: GradientsParams::from_module(&mut below, model) }.over(model);
        Ok(grads)
    }
}

/// Uses every parameter once, forward and back: burn keeps the graphs of blocks with parameters
/// that have not been in a backward pass yet until one has.
struct Drawn;

impl<B: AutodiffBackend> ModuleVisitor<B> for Drawn {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        drop(backpropagate(param.val().sum()));
    }
}

/// Adds gradients to gradients, parameter by parameter.
struct Add<'a> {
    sum: &'a mut GradientsParams,
    part: GradientsParams,
}

impl Add<'_> {
    fn over<B: AutodiffBackend, M: AutodiffModule<B>>(mut self, module: &M) {
        module.visit(&mut self);
    }
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Add<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Some(part) = self.part.remove::<B::InnerBackend, D>(param.id) else { return };
        let sum = match self.sum.remove::<B::InnerBackend, D>(param.id) {
            Some(sum) => sum + part,
            None => part,
        };
        self.sum.register(param.id, sum);
    }
}

/// The stack's input: the values of the whole batch.
struct Whole<'a> {
    x: &'a [f32],
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
        cpu.write_reals(x, &self.x[from..from + chunk.samples * self.per])
    }

    fn vjp(&mut self, _: &mut Cpu, _: &Chunk, _: Reals, _: Reals) -> bdia_core::Result<()> {
        Ok(()) // G_0 is read as a whole.
    }
}

/// burn's modules as the blocks of a stack.
struct Modules<'a, B: AutodiffBackend, M, const D: usize> {
    blocks: &'a [M],
    dims: [usize; D],
    device: &'a B::Device,
    /// Input and residual of the block and chunk whose vector-Jacobian product comes next, with
    /// burn's graph between.
    graph: Option<(Tensor<B, D>, Tensor<B, D>)>,
    grads: Option<&'a mut GradientsParams>,
    failed: Option<Error>,
}

impl<'a, B, M, const D: usize> Modules<'a, B, M, D>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + Residual<B, D>,
{
    fn new(
        blocks: &'a [M],
        dims: [usize; D],
        device: &'a B::Device,
        grads: Option<&'a mut GradientsParams>,
    ) -> Self {
        Self { blocks, dims, device, graph: None, grads, failed: None }
    }

    /// The pass's own error in place of the plain one that stands for it.
    fn check(&mut self, done: bdia_core::Result<()>) -> Result<()> {
        match self.failed.take() {
            Some(e) => Err(e),
            None => Ok(done?),
        }
    }

    fn keep(&mut self, e: Error, site: Site) -> bdia_core::Error {
        self.failed = Some(e);
        bdia_core::Error::Foreign(site)
    }

    fn residual(&mut self, cpu: &mut Cpu, call: &Call, h: Reals) -> Result<()> {
        let mut dims = self.dims;
        dims[0] = call.chunk.samples;
        let x = tensor(cpu.reals(call.x)?, dims, self.device);
        let Chunk { seed, step, global, .. } = call.chunk;
        let [a, b, ..] = philox(seed, [step, global, call.block as u32, 0]);
        B::seed(self.device, u64::from(a) << 32 | u64::from(b));
        let block = &self.blocks[call.block];
        // In both passes with burn's graph: without it burn may take other kernels, and then other
        // bits.
        let x = x.require_grad();
        let y = block.residual(x.clone());
        if y.dims() != dims {
            return Err(Error::Residual { block: call.block });
        }
        cpu.write_reals(h, y.to_data().as_slice()?)?;
        if call.keep {
            self.graph = Some((x, y));
        } else {
            // burn's server keeps what is saved for y, though y is gone, until some backward pass
            // of the same graph.
            drop(y);
            drop(x.sum().backward());
        }
        Ok(())
    }

    fn vjp(&mut self, cpu: &mut Cpu, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        let (Some((x, h)), Some(grads)) = (self.graph.take(), self.grads.as_deref_mut()) else {
            return Err(bdia_core::Error::Foreign(Site::Block(call.block)).into());
        };
        let gh = tensor(cpu.reals(gh)?, h.dims(), self.device);
        let mut found = backpropagate((h * gh).sum());
        let g = x.grad_remove(&mut found).ok_or(Error::Cut { block: call.block })?.into_data();
        let sum = cpu.reals_mut(gx)?;
        sum.iter_mut().zip(g.as_slice::<f32>()?).for_each(|(sum, g)| *sum += g);
        let block = &self.blocks[call.block];
        Add { sum: grads, part: GradientsParams::from_module(&mut found, block) }.over(block);
        Ok(())
    }
}

impl<B, M, const D: usize> Blocks<Cpu> for Modules<'_, B, M, D>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + Residual<B, D>,
{
    fn residual(&mut self, cpu: &mut Cpu, call: &Call, h: Reals) -> bdia_core::Result<()> {
        Modules::residual(self, cpu, call, h).map_err(|e| self.keep(e, Site::Block(call.block)))
    }

    fn vjp(&mut self, cpu: &mut Cpu, call: &Call, gh: Reals, gx: Reals) -> bdia_core::Result<()> {
        Modules::vjp(self, cpu, call, gh, gx).map_err(|e| self.keep(e, Site::Block(call.block)))
    }
}
