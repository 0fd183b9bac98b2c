//! A small vision transformer over [`bdia_core`]'s layers, and its plan: every buffer has its place
//! before the program runs, since [`Model::plan`] is `const`.
//!
//! ```text
//! image 8×8 → 16 patches of 2×2 → x_0 = [0; patches·W] + positions      (row 0 of the positions is the class token)
//! x_0 → K transformer blocks → x_K → row 0 → norm → logits of 10 digits → cross-entropy
//! ```

use bdia_core::arena::{Category, Layout, Reals};
use bdia_core::backend::{Chunk, CrossEntropy, Gelu, Mask, NnOps, Order, Product, Storage};
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::{
    BLOCK_TENSORS, BlockShape, Params, Tensor, TransformerBlocks, linear, linear_vjp, place,
};
use bdia_core::optim::Rule;
use bdia_core::stack::{Blocks, Call, Config, Head, Input, Mode, Stack, Tail};
use bdia_core::update::{Gamma, Grid, Sign};
use bdia_core::{Ints, Reference};

use crate::data::{Samples, Weights};
use crate::digest::fold;

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
/// Fractional bits `l` of the grid.
pub const FRAC_BITS: u32 = 14;

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
        }
    }
}

const fn tensor(name: &'static str, rows: usize, cols: usize, matrix: bool) -> Tensor {
    Tensor { name, rows, cols, matrix, offset: 0 }
}

/// Which tensors of a block are vectors.
const VECTORS: [usize; 8] = [0, 1, 3, 5, 6, 7, 9, 11];

/// One group of tensors outside the blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part<const N: usize> {
    /// Values, gradients and state.
    pub params: Params,
    /// The tensors.
    pub tensors: [Tensor; N],
}

impl<const N: usize> Part<N> {
    const fn plan(
        mut tensors: [Tensor; N],
        groups: usize,
        rule: Option<Rule>,
        layout: &mut Layout,
    ) -> Result<Self> {
        let len = place(&mut tensors);
        match Params::layout(layout, groups, len, N, rule, true) {
            Ok(params) => Ok(Self { params, tensors }),
            Err(error) => Err(error),
        }
    }

    const fn value(&self, i: usize) -> Reals {
        self.tensors[i].of(self.params.group(0))
    }

    const fn gradient(&self, i: usize) -> Reals {
        self.tensors[i].of(self.params.gradient(0))
    }

    fn weight(&self, i: usize) -> (Reals, Tensor) {
        (self.params.group(0), self.tensors[i])
    }
}

/// `x_0` from images: linear patch embedding, class token, positions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Patches {
    width: usize,
    /// `[4, d]`.
    pub weight: Part<1>,
    /// `[T, d]`; row 0 is the class token, the others are also the bias of the patches.
    pub positions: Part<1>,
    /// The images.
    pub samples: Samples,
    /// Which of them the batch consists of.
    pub batch: [usize; BATCH],
}

impl Patches {
    /// Reals of scratch.
    const SCRATCH: usize = PIXELS;

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
            be.matmul(&p, patches, self.weight.value(0), None, rest)?;
            be.add(x.sub(i * TOKENS * self.width, TOKENS * self.width), self.positions.value(0))?;
        }
        Ok(())
    }

    fn vjp(&mut self, be: &mut Be<'a>, chunk: &Chunk, gx: Reals, scratch: Reals) -> Result<()> {
        for i in 0..chunk.samples {
            let (_, rest) = self.rows(gx, i);
            if !self.weight.params.gradients.is_empty() {
                let patches = self.patches(be, chunk, i, scratch)?;
                let grads = (self.weight.gradient(0), Reals::EMPTY);
                linear_vjp(be, PATCHES, self.weight.weight(0), grads, patches, rest, Reals::EMPTY)?;
            }
            if !self.positions.params.gradients.is_empty() {
                be.add(
                    self.positions.gradient(0),
                    gx.sub(i * TOKENS * self.width, TOKENS * self.width),
                )?;
            }
        }
        Ok(())
    }
}

/// From `x_K` to the loss, by the class token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassHead {
    width: usize,
    /// Norm weight and bias `[d]`, weight `[d, 10]`, bias `[10]`.
    pub part: Part<4>,
    /// `[B]`.
    pub targets: Ints,
    /// `[B]`: the loss of every sample.
    pub losses: Reals,
}

impl ClassHead {
    const EPS: f64 = 1e-5;

    /// Reals of scratch: norm, its gradient, statistics, logits.
    const fn scratch(width: usize) -> usize {
        2 * width + 2 + CLASSES
    }

    /// Logits of the class token `x[d]`: their place, the normalized token's, and that of the
    /// statistics.
    pub fn logits(
        &self,
        be: &mut Be<'_>,
        x: Reals,
        scratch: Reals,
    ) -> Result<(Reals, Reals, Reals)> {
        let (y, stats) = (scratch.sub(0, self.width), scratch.sub(2 * self.width, 2));
        let logits = scratch.sub(2 * self.width + 2, CLASSES);
        be.layer_norm(Self::EPS, self.part.value(0), self.part.value(1), x, y, stats)?;
        linear(be, 1, self.part.weight(2), self.part.value(3), y, logits)?;
        Ok((logits, y, stats))
    }

    /// Sets the loss of sample `chunk.first + i`; its logits become their gradient.
    pub fn loss(&self, be: &mut Be<'_>, chunk: &Chunk, i: usize, logits: Reals) -> Result<()> {
        let at = chunk.first.saturating_add(i);
        let ce = CrossEntropy {
            vocab: CLASSES,
            tokens: 1,
            row: i,
            scale: 1.0 / BATCH as f64,
            smoothing: 0.0,
        };
        be.cross_entropy(chunk, &ce, logits, self.targets.sub(at, 1), self.losses.sub(at, 1))
    }
}

impl<'a> Head<Be<'a>> for ClassHead {
    fn forward_backward(
        &mut self,
        be: &mut Be<'a>,
        chunk: &Chunk,
        x: Reals,
        gx: Reals,
        scratch: Reals,
    ) -> Result<()> {
        be.fill_reals(gx, 0.0)?;
        let dy = scratch.sub(self.width, self.width);
        for i in 0..chunk.samples {
            let at = i * TOKENS * self.width;
            let (class, gclass) = (x.sub(at, self.width), gx.sub(at, self.width));
            let (logits, y, stats) = self.logits(be, class, scratch)?;
            self.loss(be, chunk, i, logits)?;
            let (p, g) = (&self.part, |i| self.part.gradient(i));
            linear_vjp(be, 1, p.weight(2), (g(2), g(3)), y, logits, dy)?;
            be.layer_norm_vjp(p.value(0), class, stats, dy, gclass, g(0), g(1))?;
        }
        Ok(())
    }
}

/// The transformer blocks: all in RAM, or one at a time from flash.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trunk {
    /// The blocks; a single one where weights stay in flash.
    pub blocks: TransformerBlocks,
    /// Vectors of all blocks, where only they are trained.
    pub vectors: Option<Part<8>>,
    /// Frozen weights in flash and index of their first value.
    flash: Option<(Weights, usize)>,
    /// Which block is in RAM.
    loaded: Option<usize>,
    /// Digest of the inputs of all blocks as the backward pass sees them.
    pub rebuilt: u64,
}

impl Trunk {
    const fn plan(job: &Job, layout: &mut Layout) -> Result<Self> {
        let all = matches!(job.trained, Trained::All);
        let (groups, rule) = if all { (BLOCKS, Some(job.rule)) } else { (1, None) };
        let fused = job.micro_batch == BATCH;
        let mut blocks = match TransformerBlocks::layout(job.shape(), groups, rule, fused, layout) {
            Ok(blocks) => blocks,
            Err(error) => return Err(error),
        };
        let mut vectors = None;
        if matches!(job.trained, Trained::Vectors) {
            let mut tensors = [tensor("", 0, 0, false); VECTORS.len()];
            let mut i = 0;
            while i < tensors.len() {
                tensors[i] = blocks.tensors()[VECTORS[i]];
                i += 1;
            }
            let part = match Part::plan(tensors, BLOCKS, Some(job.rule), layout) {
                Ok(part) => part,
                Err(error) => return Err(error),
            };
            let mut gradients = [Reals::EMPTY; BLOCK_TENSORS];
            let mut i = 0;
            while i < VECTORS.len() {
                gradients[VECTORS[i]] = part.gradient(i);
                i += 1;
            }
            blocks.gradients = Some(gradients);
            vectors = Some(part);
        }
        let flash = match job.weights {
            Some(weights) if !all => Some((weights, (PATCH * PATCH + TOKENS) * job.width)),
            _ => None,
        };
        Ok(Self { blocks, vectors, flash, loaded: None, rebuilt: 0 })
    }

    /// Number of values of a block in flash.
    fn flash_len(&self) -> usize {
        self.blocks.tensors().iter().map(|t| t.rows * t.cols).sum()
    }

    /// Brings block `k` to RAM, if it is not there.
    fn page(&mut self, be: &mut Be<'_>, k: usize) -> Result<()> {
        let Some((weights, mut at)) = self.flash.filter(|_| self.loaded != Some(k)) else {
            return Ok(());
        };
        at += k * self.flash_len();
        for t in self.blocks.tensors() {
            let to = t.of(self.blocks.params.group(0));
            if t.matrix || self.vectors.is_none() {
                weights.read(be, at, to)?;
            }
            at += to.len();
        }
        if let Some(part) = &self.vectors {
            for (t, i) in part.tensors.iter().zip(VECTORS) {
                let to = self.blocks.tensors()[i].of(self.blocks.params.group(0));
                be.copy_reals(t.of(part.params.group(k)), to)?;
            }
        }
        self.loaded = Some(k);
        Ok(())
    }

    /// The call as the blocks in RAM know it.
    fn in_ram(&self, call: &Call) -> Call {
        Call { block: if self.flash.is_some() { 0 } else { call.block }, ..*call }
    }
}

impl<'a> Blocks<Be<'a>> for Trunk {
    fn residual(&mut self, be: &mut Be<'a>, call: &Call, h: Reals) -> Result<()> {
        if call.keep {
            self.rebuilt = fold(self.rebuilt, be.reals(call.x)?.iter().map(|x| x.to_bits()));
        }
        self.page(be, call.block)?;
        let call = self.in_ram(call);
        self.blocks.residual(be, &call, h)
    }

    fn vjp(&mut self, be: &mut Be<'a>, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        let call = self.in_ram(call);
        self.blocks.vjp(be, &call, gh, gx)
    }

    fn done(&mut self, be: &mut Be<'a>, k: usize) -> Result<()> {
        if let Some(part) = &self.vectors {
            self.loaded = None;
            return part.params.finished(
                be,
                &self.blocks.updater,
                Site::Block(k),
                k,
                &part.tensors,
            );
        }
        self.blocks.done(be, k)
    }
}

/// The whole network with its plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Bytes by category, lengths of the arenas.
    pub layout: Layout,
    /// The reversible stack.
    pub stack: Stack,
    /// Its blocks.
    pub trunk: Trunk,
    /// Its input.
    pub patches: Patches,
    /// Its head.
    pub head: ClassHead,
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
        let (d, mut layout) = (job.width, Layout::new(size_of::<f32>()));
        let l = &mut layout;
        let trunk = ok!(Trunk::plan(job, l));
        let all = if matches!(job.trained, Trained::All) { Some(job.rule) } else { None };
        let not_head = if matches!(job.trained, Trained::Head) { None } else { Some(job.rule) };
        let patches = Patches {
            width: d,
            weight: ok!(Part::plan([tensor("patches.weight", PATCH * PATCH, d, true)], 1, all, l)),
            positions: ok!(Part::plan([tensor("positions", TOKENS, d, false)], 1, not_head, l)),
            samples: Samples(&[]),
            batch: [0; BATCH],
        };
        let tensors = [
            tensor("ln_f.weight", 1, d, false),
            tensor("ln_f.bias", 1, d, false),
            tensor("head.weight", d, CLASSES, true),
            tensor("head.bias", 1, CLASSES, false),
        ];
        let head = ClassHead {
            width: d,
            part: ok!(Part::plan(tensors, 1, Some(job.rule), l)),
            targets: l.ints(Category::Head, BATCH),
            losses: l.reals(Category::Head, BATCH),
        };
        let (at_input, at_head) = (Patches::SCRATCH, ClassHead::scratch(d));
        // Where only the head is trained, nothing but one sample's inference goes through the
        // stack.
        let batch = if matches!(job.trained, Trained::Head) { CHUNK } else { job.micro_batch };
        let reversible = matches!(job.mode, Mode::Bdia);
        let config = Config {
            id: 0,
            batch,
            per_sample: TOKENS * d,
            blocks: BLOCKS,
            chunk: CHUNK,
            mode: job.mode,
            grid: if reversible { Some(ok!(Grid::new(FRAC_BITS))) } else { None },
            gamma: ok!(Gamma::new(0.5, Sign::Random)),
            verify: false,
            tail: Tail::Head,
            // The reference backend's attention needs one row of scores.
            needs: job.shape().needs_with(TOKENS),
            ends_scratch: if at_input > at_head { at_input } else { at_head },
        };
        let stack = ok!(Stack::layout(config, l));
        Ok(Self { layout: ok!(layout.checked()), stack, trunk, patches, head })
    }

    /// Every tensor that is in RAM, in the order that they have in flash; `fill` gets its handle
    /// and its place there.
    ///
    /// # Errors
    /// Those of `fill`.
    pub fn load(&self, mut fill: impl FnMut(&Tensor, Reals, usize) -> Result<()>) -> Result<()> {
        let mut at = 0;
        let mut next = |t: &Tensor, group: Option<Reals>| {
            let (from, len) = (at, t.rows * t.cols);
            at += len;
            // A tensor that these blocks do not have.
            if len == 0 {
                return Ok(());
            }
            group.map_or(Ok(()), |group| fill(t, t.of(group), from))
        };
        next(&self.patches.weight.tensors[0], Some(self.patches.weight.params.group(0)))?;
        next(&self.patches.positions.tensors[0], Some(self.patches.positions.params.group(0)))?;
        for k in 0..BLOCKS {
            for (i, t) in self.trunk.blocks.tensors().iter().enumerate() {
                match (&self.trunk.vectors, self.trunk.flash) {
                    (Some(part), _) => {
                        let vector = VECTORS.iter().position(|&v| v == i).map(|v| part.tensors[v]);
                        next(vector.as_ref().unwrap_or(t), vector.map(|_| part.params.group(k)))?;
                    }
                    (None, Some(_)) => next(t, None)?,
                    (None, None) => next(t, Some(self.trunk.blocks.params.group(k)))?,
                }
            }
        }
        for t in &self.head.part.tensors {
            next(t, Some(self.head.part.params.group(0)))?;
        }
        Ok(())
    }
}
