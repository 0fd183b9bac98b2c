//! A small vision transformer over [`bdia_core`]'s layers, and its plan: every buffer has its place
//! before the program runs, since [`Model::plan`] is `const`.
//!
//! ```text
//! image 8×8 → 16 patches of 2×2 → x_0 = [0; patches·W] + positions   (row 0: the class token)
//! x_0 → K transformer blocks → x_K → row 0 → norm → logits of 10 digits → cross-entropy
//! ```

use bdia_core::Reference;
use bdia_core::arena::{Category, Layout, Reals};
use bdia_core::backend::{Chunk, Gelu, Mask, NnOps, Order, Product, Storage};
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::{
    BlockShape, ClassHead, Freeze, Gradients, Home, Init, Matrix, Parameter, Params, PreNorm, Room,
    Scheme, Tensor, Tensors, linear_vjp,
};
use bdia_core::network::{Group, Micro, Network, Owner, Rebuilt, sum};
use bdia_core::optim::Rule;
use bdia_core::stack::{Blocks, Call, Config, Head, Input, Mode, Pass, Stack, Tail};
use bdia_core::update::{FloatGamma, Gamma, Grid, Policy, Sign};

use crate::data::{Samples, Weights};
use crate::digest::{Digests, fold};

/// Rows and columns of an image.
pub const SIDE: usize = 8;
/// Values of an image.
pub const PIXELS: usize = SIDE * SIDE;
/// Rows and columns of a patch.
const PATCH: usize = 2;
/// Patches of an image.
const PATCHES: usize = PIXELS / (PATCH * PATCH);
/// Tokens `T`: the class token and the patches.
pub const TOKENS: usize = PATCHES + 1;
/// Digits.
pub const CLASSES: usize = 10;
/// Blocks `K`.
pub const BLOCKS: usize = 6;
/// Samples of an optimizer step.
pub const BATCH: usize = 8;
/// Samples processed together inside a block.
pub const CHUNK: usize = 1;
/// Exact reversible training on a grid of 14 fractional bits, with γ = ±½.
pub const BDIA: Mode = match (Grid::new(14), Gamma::new(1, Sign::Random)) {
    (Ok(grid), Ok(gamma)) => Mode::Bdia { grid, gamma: Policy::fixed(gamma), verify: false },
    _ => panic!("there is such a grid, and such a γ"),
};

/// The backend: scalar loops over static memory.
pub type Be<'a> = Reference<'a, f32>;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trained {
    /// Everything, in all blocks; the weights are copied to RAM.
    All,
    /// Biases, norms, positions and the head. Frozen matrices stay in flash; RAM holds those of one
    /// block at a time.
    Vectors,
    /// The head. No backward pass through the blocks, whose weights stay in flash.
    Head,
}

/// A training job, as a value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Job {
    /// Its name on the command line.
    pub name: &'static str,
    /// Width `d`.
    pub width: usize,
    /// Heads.
    pub heads: usize,
    /// Hidden width of the MLP.
    pub inner: usize,
    /// What is trained.
    pub trained: Trained,
    /// How the stack is trained.
    pub mode: Mode,
    /// Samples that go through the network at a time; fewer than [`BATCH`]: gradients are
    /// accumulated, which takes a gradient buffer for every block.
    pub micro_batch: usize,
    /// The optimizer.
    pub rule: Rule,
    /// Its learning rate at the start; it falls to 0 over the job.
    pub lr: f64,
    /// Passes over the samples.
    pub epochs: u32,
    /// The pretrained network; `None`: random values.
    pub weights: Option<Weights>,
}

impl Job {
    const fn shape(&self) -> BlockShape {
        BlockShape {
            tokens: TOKENS,
            width: self.width,
            heads: self.heads,
            inner: self.inner,
            eps: 1e-5,
            gelu: Gelu::Tanh,
            mask: Mask::Full,
            attention_dropout: 0.0,
            residual_dropout: 0.0,
            hidden_dropout: 0.0,
            qkv_bias: true,
            temperature: false,
            init: Scheme::InverseRoot,
        }
    }

    /// How the blocks keep gradients: those of one block at a time, or of all where they add up
    /// over micro-batches.
    const fn gradients(&self) -> Gradients {
        match self.trained {
            Trained::Head => Gradients::None,
            _ if self.micro_batch == BATCH => Gradients::Fused(self.rule),
            _ => Gradients::Full(self.rule),
        }
    }
}

/// One group of tensors outside the blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part<const N: usize> {
    params: Params,
    tensors: [Tensor; N],
}

impl<const N: usize> Part<N> {
    /// The group is trained by `rule`, or frozen. Not inlined, as the blocks' plan: in one function
    /// they would have places on the stack of their own.
    #[inline(never)]
    const fn plan(
        mut tensors: [Tensor; N],
        rule: Option<Rule>,
        layout: &mut Layout,
    ) -> Result<Self> {
        let (freeze, gradients) = match rule {
            Some(rule) => (Freeze::Nothing, Gradients::Full(rule)),
            None => (Freeze::All(None), Gradients::None),
        };
        let room = Room::NONE.place(&mut tensors, freeze);
        match Params::layout(1, room, freeze, gradients, layout) {
            Ok(params) => Ok(Self { params, tensors }),
            Err(error) => Err(error),
        }
    }

    const fn parameter(&self, i: usize) -> Parameter {
        self.params.parameter(0, &self.tensors[i])
    }

    const fn group(&self, site: Site) -> Group<'_> {
        Group { params: &self.params, tensors: &self.tensors, of: Owner::Ends(site) }
    }
}

/// `x_0` from images: linear patch embedding, class token, positions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Patches {
    width: usize,
    /// `[4, d]`.
    weight: Parameter,
    /// `[T, d]`; row 0 is the class token, the others are also the bias of the patches.
    positions: Parameter,
    /// The images.
    samples: Samples,
    /// Which of them the (micro-)batch consists of.
    batch: [usize; BATCH],
}

impl Patches {
    /// Reals of scratch.
    const SCRATCH: usize = PIXELS;

    const fn tensors(width: usize) -> [Tensor; 2] {
        let normal = Init::Normal(0.1);
        [
            Tensor::matrix("patches.weight", PATCH * PATCH, width, Init::InverseRoot),
            Tensor { matrix: false, ..Tensor::matrix("positions", TOKENS, width, normal) },
        ]
    }

    /// The image of sample `i` of the chunk as rows of patches `[16, 4]`, from −1 to 1.
    fn patches(&self, be: &mut Be<'_>, chunk: &Chunk, i: usize, scratch: Reals) -> Result<Reals> {
        let at = chunk.first.saturating_add(i);
        let sample =
            self.batch.get(at).ok_or(Error::Shape { what: "batch", expected: BATCH, found: at })?;
        let (image, _) = self.samples.get(*sample)?;
        let mut rows = [0.0; PIXELS];
        for (n, value) in rows.iter_mut().enumerate() {
            let (patch, within) = (n / (PATCH * PATCH), n % (PATCH * PATCH));
            let row = patch / (SIDE / PATCH) * PATCH + within / PATCH;
            let col = patch % (SIDE / PATCH) * PATCH + within % PATCH;
            *value = f32::from(image[row * SIDE + col]) / 8.0 - 1.0;
        }
        let patches = scratch.sub(0, PIXELS);
        be.write_reals(patches, &rows)?;
        Ok(patches)
    }

    /// Class token and patches of sample `i` in a chunk's tensor.
    const fn rows(&self, x: Reals, i: usize) -> (Reals, Reals) {
        let sample = x.sub(i * TOKENS * self.width, TOKENS * self.width);
        (sample.sub(0, self.width), sample.sub(self.width, PATCHES * self.width))
    }
}

impl<'a> Input<Be<'a>> for Patches {
    fn forward(
        &mut self,
        be: &mut Be<'a>,
        chunk: &Chunk,
        _: bool,
        x: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (rows, cols, inner) = (PATCHES, self.width, PATCH * PATCH);
        let p = Product { rows, cols, inner, a: Order::Plain, b: Order::Plain, accumulate: false };
        for i in 0..chunk.samples {
            let patches = self.patches(be, chunk, i, scratch)?;
            let (class, rest) = self.rows(x, i);
            be.fill_reals(class, 0.0)?;
            be.matmul(&p, patches, self.weight.value, None, rest)?;
            be.add(x.sub(i * TOKENS * self.width, TOKENS * self.width), self.positions.value)?;
        }
        Ok(())
    }

    fn vjp(&mut self, be: &mut Be<'a>, chunk: &Chunk, gx: Reals, scratch: Reals) -> Result<()> {
        let Parameter { value: values, grad } = self.weight;
        let weight =
            Matrix { values, inputs: PATCH * PATCH, outputs: self.width, order: Order::Plain };
        for i in 0..chunk.samples {
            if !grad.is_empty() {
                let (patches, (_, rest)) = (self.patches(be, chunk, i, scratch)?, self.rows(gx, i));
                let grads = (grad, Reals::EMPTY);
                linear_vjp(be, PATCHES, weight, grads, patches, rest, Reals::EMPTY)?;
            }
            if !self.positions.grad.is_empty() {
                let sample = gx.sub(i * TOKENS * self.width, TOKENS * self.width);
                be.add(self.positions.grad, sample)?;
            }
        }
        Ok(())
    }
}

/// The transformer blocks. What is frozen lies in flash and is in RAM one block at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trunk {
    /// The blocks.
    pub blocks: PreNorm,
    /// Frozen weights in flash and index of their first value.
    flash: Option<(Weights, usize)>,
    /// Whose frozen weights are in RAM.
    loaded: Option<usize>,
    /// Digest of the inputs of all blocks as the backward pass sees them.
    rebuilt: u64,
}

impl Trunk {
    #[inline(never)]
    const fn plan(job: &Job, layout: &mut Layout) -> Result<Self> {
        let freeze = match job.trained {
            Trained::All => Freeze::Nothing,
            Trained::Vectors => Freeze::Matrices,
            Trained::Head => Freeze::All(None),
        };
        let flash = match job.weights {
            Some(weights) if !matches!(job.trained, Trained::All) => {
                Some((weights, (PATCH * PATCH + TOKENS) * job.width))
            }
            _ => None,
        };
        let (shape, gradients) = (job.shape(), job.gradients());
        let resident = if flash.is_some() { 1 } else { BLOCKS };
        match PreNorm::layout_paged(&shape, BLOCKS, resident, None, freeze, gradients, layout) {
            Ok(blocks) => Ok(Self { blocks, flash, loaded: None, rebuilt: 0 }),
            Err(error) => Err(error),
        }
    }

    /// Brings the frozen weights of block `k` to RAM, if they are not there.
    fn page(&mut self, be: &mut Be<'_>, k: usize) -> Result<()> {
        let Some((weights, first)) = self.flash.filter(|_| self.loaded != Some(k)) else {
            return Ok(());
        };
        let (blocks, mut len) = (&self.blocks, 0);
        blocks.each(&mut |t| {
            len += t.len();
            Ok(())
        })?;
        let mut at = first + k * len;
        blocks.each(&mut |t| {
            let from = at;
            at += t.len();
            match t.home {
                Home::Trained => Ok(()),
                _ => weights.read(be, from, blocks.params.value(k, t)),
            }
        })?;
        self.loaded = Some(k);
        Ok(())
    }
}

impl<'a> Blocks<Be<'a>> for Trunk {
    fn residual(&mut self, be: &mut Be<'a>, call: &Call, h: Reals) -> Result<()> {
        if call.keep {
            self.rebuilt = fold(self.rebuilt, be.reals(call.x)?.iter().map(|x| x.to_bits()));
        }
        self.page(be, call.block)?;
        self.blocks.residual(be, call, h)
    }

    fn vjp(&mut self, be: &mut Be<'a>, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        self.page(be, call.block)?;
        self.blocks.vjp(be, call, gh, gx)
    }

    fn done(&mut self, be: &mut Be<'a>, k: usize) -> Result<()> {
        self.blocks.done(be, k)
    }
}

/// The whole network with its plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Bytes by category, lengths of the arenas.
    pub layout: Layout,
    /// Digests of the passes so far.
    pub digests: Digests,
    trained: Trained,
    micro_batch: usize,
    stack: Stack,
    trunk: Trunk,
    patches: Patches,
    head: ClassHead,
    /// Parameters outside the blocks: those of the patches, of the positions, and of the head.
    weight: Part<1>,
    positions: Part<1>,
    top: Part<4>,
    /// `[B]`: the loss of every sample of a step.
    losses: Reals,
}

/// `?` for constant functions.
macro_rules! ok {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(error) => return Err(error),
        }
    };
}

impl Model {
    /// Lays the network out.
    ///
    /// # Errors
    /// [`Error::Setting`] for a job that does not fit together.
    pub const fn plan(job: &Job) -> Result<Self> {
        if !BATCH.is_multiple_of(job.micro_batch) {
            return Err(Error::setting("micro-batch", job.micro_batch as f64, "a divisor of 8"));
        }
        let (d, mut layout) = (job.width, Layout::constant(size_of::<f32>()));
        let l = &mut layout;
        let trunk = ok!(Trunk::plan(job, l));
        let all = if matches!(job.trained, Trained::All) { Some(job.rule) } else { None };
        let not_head = if matches!(job.trained, Trained::Head) { None } else { Some(job.rule) };
        let [weight, positions] = Patches::tensors(d);
        let weight = ok!(Part::plan([weight], all, l));
        let positions = ok!(Part::plan([positions], not_head, l));
        let top = ok!(Part::plan(ClassHead::tensors(d, CLASSES), Some(job.rule), l));
        let patches = Patches {
            width: d,
            weight: weight.parameter(0),
            positions: positions.parameter(0),
            samples: Samples(&[]),
            batch: [0; BATCH],
        };
        let labels = l.ints(Category::Head, BATCH);
        let losses = l.reals(Category::Head, BATCH);
        let head = ClassHead {
            width: d,
            per_sample: TOKENS,
            eps: job.shape().eps,
            norm: [top.parameter(0), top.parameter(1)],
            weight: top.parameter(2),
            bias: top.parameter(3),
            labels,
            losses,
            scale: 1.0,
            smoothing: 0.0,
            mixup: None,
        };
        let (at_input, at_head) = (Patches::SCRATCH, ClassHead::scratch(d, CLASSES, CHUNK));
        // Where only the head is trained, nothing but one sample's inference goes through the
        // stack.
        let batch = if matches!(job.trained, Trained::Head) { CHUNK } else { job.micro_batch };
        let config = Config {
            id: 0,
            batch,
            per_sample: TOKENS * d,
            blocks: BLOCKS,
            chunk: CHUNK,
            tail: Tail::Head,
            // The reference backend's attention needs one row of scores.
            needs: trunk.blocks.needs_with(TOKENS),
            ends_scratch: if at_input > at_head { at_input } else { at_head },
        };
        let stack = ok!(Stack::layout(&config, &job.mode, l));
        Ok(Self {
            layout: ok!(layout.checked()),
            digests: Digests::NONE,
            trained: job.trained,
            micro_batch: job.micro_batch,
            stack,
            trunk,
            patches,
            head,
            weight,
            positions,
            top,
            losses,
        })
    }

    /// Samples that go through the network at a time.
    pub const fn micro_batch(&self) -> usize {
        self.micro_batch
    }

    /// `[B]`: the loss of every sample of the last step.
    pub const fn losses(&self) -> Reals {
        self.losses
    }

    /// Every tensor that is in RAM for the whole job, in the order that they have in flash; `fill`
    /// gets its handle and its place there.
    ///
    /// # Errors
    /// Those of `fill`.
    pub fn load(&self, mut fill: impl FnMut(&Tensor, Reals, usize) -> Result<()>) -> Result<()> {
        let (blocks, paged, mut at) = (&self.trunk.blocks, self.trunk.flash.is_some(), 0);
        let mut next = |t: &Tensor, values: Reals, there: bool| {
            let from = at;
            at += t.len();
            // Some tensors these blocks do not have.
            if there && !t.is_empty() { fill(t, values, from) } else { Ok(()) }
        };
        let [weight] = &self.weight.tensors;
        next(weight, self.weight.parameter(0).value, true)?;
        let [positions] = &self.positions.tensors;
        next(positions, self.positions.parameter(0).value, true)?;
        for k in 0..BLOCKS {
            blocks.each(&mut |t| {
                next(t, blocks.params.value(k, t), !paged || t.home == Home::Trained)
            })?;
        }
        for t in &self.top.tensors {
            next(t, self.top.params.value(0, t), true)?;
        }
        Ok(())
    }

    /// Makes some of `samples` the (micro-)batch.
    ///
    /// # Errors
    /// [`Error::Shape`] for a sample that does not exist, or more than fit.
    pub fn put(&mut self, be: &mut Be<'_>, samples: Samples, batch: &[usize]) -> Result<()> {
        self.patches.samples = samples;
        for (i, &sample) in batch.iter().enumerate() {
            be.write_ints(self.head.labels.sub(i, 1), &[i32::from(samples.get(sample)?.1)])?;
            if let Some(place) = self.patches.batch.get_mut(i) {
                *place = sample;
            }
        }
        Ok(())
    }

    /// `x_K` of sample `i` of the batch, by the standard transformer that the network is at
    /// inference.
    fn infer(&mut self, be: &mut Be<'_>, i: usize) -> Result<Reals> {
        let mut alone = self.patches;
        alone.batch[0] = self.patches.batch[i];
        self.stack.infer(be, &mut self.trunk, &mut alone, 1, FloatGamma::ZERO)
    }

    /// The most probable class of the first sample of the batch, and its loss.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn classify(&mut self, be: &mut Be<'_>) -> Result<(usize, f32)> {
        let (x, chunk) = (self.infer(be, 0)?, at_head(&Pass { seed: 0, step: 0, global: 0 }, 0));
        let logits = self.head.logits(be, &chunk, x, self.stack.scratch())?;
        let mut best = (0, f32::NEG_INFINITY);
        for (class, &logit) in be.reals(logits)?.iter().enumerate() {
            if logit > best.1 {
                best = (class, logit);
            }
        }
        self.head.loss(be, &chunk, logits)?;
        Ok((best.0, be.reals(self.head.losses.sub(0, 1))?.iter().sum()))
    }

    /// Forward and backward pass through the stack; its stages are those of [`Stack::train`].
    fn all_blocks(&mut self, be: &mut Be<'_>, pass: &Pass) -> Result<()> {
        let Self { stack, trunk, patches, head, digests, .. } = self;
        stack.embed(be, patches, pass)?;
        stack.forward(be, trunk, pass)?;
        if let Stack::Reversible(stack) = stack {
            for k in [BLOCKS - 1, BLOCKS - 2] {
                let x = be.ints(stack.activation(k))?;
                digests.activations = fold(digests.activations, x.iter().map(|&x| x as u32));
            }
            let side = be.words(stack.side_bits())?;
            digests.side_bits = fold(digests.side_bits, side.iter().copied());
        }
        stack.turn(be, trunk, head, pass)?;
        stack.backward(be, trunk, pass)?;
        digests.rebuilt = trunk.rebuilt;
        stack.embed_vjp(be, patches, pass)
    }

    /// Inference, and the head's gradient.
    fn head_only(&mut self, be: &mut Be<'_>, pass: &Pass) -> Result<()> {
        for i in 0..self.micro_batch {
            let (x, chunk) = (self.infer(be, i)?, at_head(pass, i));
            let Self { stack, head, .. } = self;
            head.forward_backward(be, &chunk, x, stack.gradient(BLOCKS), stack.scratch())?;
        }
        Ok(())
    }
}

/// Sample `i` of a pass, at the head.
const fn at_head(pass: &Pass, i: usize) -> Chunk {
    Chunk {
        seed: pass.seed,
        step: pass.step,
        stack: 0,
        site: Site::Head,
        first: i,
        samples: 1,
        global: pass.global.wrapping_add(i as u32),
        frame: 0,
    }
}

impl<'a> Network<Be<'a>> for Model {
    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        let blocks = &self.trunk.blocks;
        each(&Group { params: &blocks.params, tensors: blocks, of: Owner::Blocks })?;
        each(&self.weight.group(Site::Embedding))?;
        each(&self.positions.group(Site::Embedding))?;
        each(&self.top.group(Site::Head))
    }

    fn trained(&self) -> usize {
        self.layout.trained()
    }

    fn micro_batches(&self) -> usize {
        BATCH / self.micro_batch
    }

    fn pass(&mut self, be: &mut Be<'a>, pass: &Pass, micro: &Micro) -> Result<()> {
        self.trunk.blocks.begin(micro.updater, micro.last);
        self.head.scale = micro.scale;
        self.head.losses = self.losses.sub(micro.index * self.micro_batch, self.micro_batch);
        match self.trained {
            Trained::Head => self.head_only(be, pass),
            _ => self.all_blocks(be, pass),
        }
    }

    fn loss(&self, be: &Be<'a>) -> Result<f64> {
        sum(be, self.losses)
    }

    fn rebuilt(&self, be: &Be<'a>) -> Result<Rebuilt> {
        Rebuilt::of(be, &self.stack)
    }
}
