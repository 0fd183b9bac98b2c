//! The reversible stack: `K` residual blocks, trained in one of four modes over the same block
//! code.
//!
//! One training step, from top to bottom ([`Stack::train`]):
//!
//! ```text
//! embed      X_0 = Q(input)
//! forward    X_1 … X_{K-1}, side bits; X_{k+1} overwrites X_{k-1}
//! turn       chunk by chunk: last block → x_K → head forward and backward → VJP of the last block
//! backward   k = K-2 … 0: recompute h_k once, for the inverse (X_{k-1} over X_{k+1}) and for the VJP; block done
//! embed_vjp  from G_0
//! ```
//!
//! The other modes run the same loop over *segments* of blocks whose intermediates are kept:
//! `checkpoint` keeps the input of every `n`-th block and recomputes a segment before its VJPs;
//! `standard` is one segment of all blocks, and so is `bdia-float`, with γ.
//!
//! # Guarantee
//! In mode [`Mode::Bdia`] every rebuilt `X_k` equals the original in every bit, provided that
//! [`Blocks::residual`] gives the same bits for the same input and chunk in both passes. A 64-bit
//! checksum per `X_k` detects it when that is not so, before the block's parameters are updated
//! ([`Fault::Checksum`](crate::Fault)).

use crate::arena::{Category, Ints, Layout, Reals, Words, product};
use crate::backend::{Chunk, Storage, UpdateOps};
use crate::error::{Error, Result, Site, ok};
use crate::real::Real;
use crate::update::{Gamma, Grid, Sign};

/// How a stack is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Exact reversible training on the grid: two `X` tensors and side bits.
    Bdia,
    /// Every intermediate is stored.
    Standard,
    /// The input of every `every`-th block is stored, the rest recomputed.
    Checkpoint {
        /// Blocks in a segment.
        every: usize,
    },
    /// The BDIA update without a grid; everything is stored.
    BdiaFloat,
}

/// What the stack's last activation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// A head follows at once; `X_K` is not kept.
    Head,
    /// `x_K` is the result (an encoder, a part of a foreign model). Reversible: `X_K` is kept
    /// together with `X_{K-1}`, and all blocks are recomputed. Other modes keep `x_K`; `checkpoint`
    /// then recomputes the last segment as well.
    Output,
}

/// What a block needs per sample, in reals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Kept between [`Blocks::residual`] and [`Blocks::vjp`].
    pub frame: usize,
    /// Free for use within one call.
    pub scratch: usize,
    /// The same, but once and not per sample.
    pub fixed: usize,
}

/// The shape and the mode of a stack.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    /// Which stack of the model: a counter word of the generator.
    pub id: u8,
    /// Samples `B` of a (micro-)batch.
    pub batch: usize,
    /// Values of one sample, `T·d`.
    pub per_sample: usize,
    /// Blocks `K`.
    pub blocks: usize,
    /// Samples processed together inside a block.
    pub chunk: usize,
    /// How it is trained.
    pub mode: Mode,
    /// The grid: required in mode `bdia`, refused in `bdia-float`, a choice in the others (there γ
    /// = 0).
    pub grid: Option<Grid>,
    /// γ of the BDIA modes.
    pub gamma: Gamma,
    /// Keep the originals and count differing elements (mode `bdia`), or measure the error of
    /// rebuilding (`bdia-float`).
    pub verify: bool,
    /// What `X_K` is for.
    pub tail: Tail,
    /// What the blocks need.
    pub needs: Needs,
    /// Scratch that head and input need, in reals; shared with the blocks' scratch.
    pub ends_scratch: usize,
}

/// A second input of every block, whole batch: the encoder's output in a decoder. Its gradient adds
/// up over blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The values, sample by sample.
    pub value: Reals,
    /// Their gradient.
    pub grad: Reals,
}

/// One call of a block on one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The samples, and the place of random numbers.
    pub chunk: Chunk,
    /// Index `k` of the block.
    pub block: usize,
    /// The input `x_k`, `samples · per_sample` values. Not to be changed.
    pub x: Reals,
    /// Memory that stays from `residual` to `vjp` of the same [`Chunk::frame`].
    pub frame: Reals,
    /// Memory for this call only; its content on entry is arbitrary.
    pub scratch: Reals,
    /// The chunk's part of the context.
    pub context: Option<Context>,
    /// Training (dropout is on) or inference.
    pub train: bool,
    /// Whether `vjp` of this frame follows. The result must be the same bits either way.
    pub keep: bool,
}

/// The residual blocks of a stack; all of them behind one value, told apart by [`Call::block`].
///
/// Implement it for blocks of your own: the stack asks nothing else of them. Blocks that keep their
/// own intermediates (an autograd graph) can key them by [`Chunk::frame`] and leave [`Needs`] at
/// zero.
pub trait Blocks<B: Storage> {
    /// `h = h_k(x)`. The same bits for the same call, whatever `keep` says.
    ///
    /// # Errors
    /// Whatever the backend reports; it stops the step.
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()>;

    /// Adds `J_{h_k}(x)ᵀ·gh` to `gx` and the parameters' parts to their gradients; `gh` may be
    /// overwritten.
    ///
    /// # Errors
    /// Whatever the backend reports; it stops the step.
    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()>;

    /// All chunks of block `k` are through and its checksum has been compared: its gradient is
    /// complete, nothing reads its parameters again in this step. An optimizer outside
    /// [`crate::OptimOps`] asks [`Storage::peek_fault`] first and changes nothing while a fault is
    /// set.
    ///
    /// # Errors
    /// Whatever the backend reports; it stops the step.
    fn done(&mut self, be: &mut B, block: usize) -> Result<()> {
        let _ = (be, block);
        Ok(())
    }
}

/// What comes before the stack.
pub trait Input<B: Storage> {
    /// Sets `x`, the chunk's input of block 0.
    ///
    /// # Errors
    /// Whatever the backend reports; it stops the step.
    fn forward(
        &mut self,
        be: &mut B,
        chunk: &Chunk,
        train: bool,
        x: Reals,
        scratch: Reals,
    ) -> Result<()>;

    /// Takes the gradient with respect to `x`, which may be overwritten.
    ///
    /// # Errors
    /// Whatever the backend reports; it stops the step.
    fn vjp(&mut self, be: &mut B, chunk: &Chunk, gx: Reals, scratch: Reals) -> Result<()>;
}

/// What comes after the stack, down to the loss.
pub trait Head<B: Storage> {
    /// Loss of the chunk's `x_K` and its gradient: sets `gx`. `x` may be overwritten.
    ///
    /// # Errors
    /// Whatever the backend reports; it stops the step.
    fn forward_backward(
        &mut self,
        be: &mut B,
        chunk: &Chunk,
        x: Reals,
        gx: Reals,
        scratch: Reals,
    ) -> Result<()>;
}

/// Where a pass stands in a run: the counter words of its random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Key of the generator.
    pub seed: u64,
    /// Optimizer step.
    pub step: u32,
    /// Index in the global batch of this (micro-)batch's first sample.
    pub global: u32,
}

/// What stacks that run one after the other share, such as an encoder and its decoder: the memory
/// of one chunk, and the gradients `G`, whose content is over when a stack's backward pass is. (The
/// intermediates that modes other than `bdia` and `checkpoint 1` store are each stack's own.)
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Workspace {
    g: [Reals; 2],
    inputs: Reals,
    frames: Reals,
    h: Reals,
    top: Reals,
    top_ints: Ints,
    scratch: Reals,
}

impl Workspace {
    /// Lays out what each of the stacks with these configurations needs.
    ///
    /// # Errors
    /// As [`Stack::layout`].
    pub const fn layout(configs: &[Config], layout: &mut Layout) -> Result<Self> {
        let mut most =
            Sizes { samples: 0, whole: 0, part: 0, inputs: 0, frame: 0, frames: 0, scratch: 0 };
        let (mut pair, mut ints, mut i) = (0, 0, 0);
        while i < configs.len() {
            let (config, s) = (&configs[i], ok!(Sizes::of(&configs[i])));
            most.whole = larger(most.whole, s.whole);
            most.part = larger(most.part, s.part);
            most.scratch = larger(most.scratch, s.scratch);
            if !config.stores_frames() {
                most.inputs = larger(most.inputs, s.inputs);
                most.frames = larger(most.frames, s.frames);
            }
            if config.has_pair() {
                pair = larger(pair, s.whole);
            }
            if matches!(config.mode, Mode::Bdia) {
                ints = larger(ints, s.part);
            }
            i += 1;
        }
        let l = layout;
        Ok(Self {
            g: [
                l.reals(Category::ActivationGradients, most.whole),
                l.reals(Category::ActivationGradients, pair),
            ],
            inputs: l.reals(Category::Workspace, most.inputs),
            frames: l.reals(Category::Workspace, most.frames),
            h: l.reals(Category::Workspace, most.part),
            top: l.reals(Category::Workspace, most.part),
            top_ints: l.ints(Category::Workspace, ints),
            scratch: l.reals(Category::Workspace, most.scratch),
        })
    }
}

impl Config {
    /// Whether γ leads from one activation to the one after next, which takes two gradients.
    const fn has_pair(&self) -> bool {
        matches!(self.mode, Mode::Bdia | Mode::BdiaFloat)
    }

    /// Blocks in a segment (segmented modes).
    const fn segment(&self) -> usize {
        match self.mode {
            Mode::Checkpoint { every } => smaller(every, self.blocks),
            _ => self.blocks,
        }
    }

    /// Number of segments.
    const fn segments(&self) -> usize {
        self.blocks.div_ceil(self.segment())
    }

    /// Whether a single segment waits from the forward to the backward pass with all its
    /// intermediates, because something else runs in between.
    const fn waits(&self) -> bool {
        matches!(self.tail, Tail::Output)
            && !matches!(self.mode, Mode::Bdia)
            && self.segments() == 1
    }

    /// Whether all chunks of a block use one frame.
    const fn one_frame(&self) -> bool {
        matches!(self.mode, Mode::Bdia) || (self.segment() == 1 && !self.waits())
    }

    /// Whether intermediates are stored rather than recomputed.
    const fn stores_frames(&self) -> bool {
        self.waits() || !matches!(self.mode, Mode::Bdia | Mode::Checkpoint { every: 1 })
    }
}

/// Numbers of values of a stack's buffers.
struct Sizes {
    /// Samples of a chunk.
    samples: usize,
    /// Activations of a batch, and of a chunk.
    whole: usize,
    part: usize,
    /// All inputs of blocks that are there at a time.
    inputs: usize,
    /// One frame, and all.
    frame: usize,
    frames: usize,
    scratch: usize,
}

impl Sizes {
    const fn of(config: &Config) -> Result<Self> {
        let b = ok!(positive("batch", config.batch));
        let p = ok!(positive("values of a sample", config.per_sample));
        ok!(positive("blocks", config.blocks));
        if let Mode::Checkpoint { every } = config.mode {
            ok!(positive("checkpoint-every", every));
        }
        let samples = smaller(ok!(positive("chunk", config.chunk)), b);
        let part = ok!(product("activations of a chunk", &[samples, p]));
        let count = if config.one_frame() {
            1
        } else {
            ok!(product("frames", &[config.segment(), b.div_ceil(samples)]))
        };
        let frame = ok!(product("frame", &[samples, config.needs.frame]));
        let Some(scratch) = ok!(product("scratch", &[samples, config.needs.scratch]))
            .checked_add(config.needs.fixed)
        else {
            return Err(Error::TooLarge("scratch"));
        };
        Ok(Self {
            samples,
            whole: ok!(product("activations", &[b, p])),
            part,
            inputs: ok!(product("inputs of blocks", &[count, part])),
            frame,
            frames: ok!(product("frames", &[count, frame])),
            scratch: larger(scratch, config.ends_scratch),
        })
    }
}

/// A stack of blocks laid out in the arenas of a backend. It holds handles only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stack {
    config: Config,
    /// Reversible: `X_k` in `x[k % 2]`. Segmented on the grid: `x[0]` is one chunk's running state.
    x: [Ints; 2],
    /// `G_k` in `g[k % 2]`; one tensor where γ = 0.
    g: [Reals; 2],
    side: Words,
    sums: Words,
    originals: Ints,
    differing: Words,
    /// Segmented: the inputs of segments.
    saved_ints: Ints,
    saved_reals: Reals,
    /// Segmented, with an output: `x_K`.
    output: Reals,
    /// `x_k` of every frame.
    inputs: Reals,
    frames: Reals,
    /// One chunk: `h_k`, then the gradient that the block's VJP is applied to.
    h: Reals,
    /// One chunk: `x_K`.
    top: Reals,
    top_ints: Ints,
    scratch: Reals,
    /// `bdia-float` with `verify`: a frame and an input besides.
    spare: [Reals; 2],
    rebuild_error: f64,
    /// The second input of all blocks.
    pub context: Option<Context>,
}

const ZERO_GAMMA: f64 = 0.0;

const fn positive(what: &'static str, n: usize) -> Result<usize> {
    if n == 0 { Err(Error::Setting { what, found: 0.0, possible: "1 or more" }) } else { Ok(n) }
}

const fn smaller(a: usize, b: usize) -> usize {
    if a < b { a } else { b }
}

const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

impl Stack {
    /// Lays the stack out.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::Shape`] for a configuration that does not fit together,
    /// [`Error::TooLarge`] for sizes beyond the address space.
    pub const fn layout(config: Config, layout: &mut Layout) -> Result<Self> {
        let workspace = ok!(Workspace::layout(&[config], layout));
        Self::layout_in(config, &workspace, layout)
    }

    /// Lays the stack out around a workspace that was made for this configuration and others.
    ///
    /// # Errors
    /// As [`layout`](Self::layout).
    pub const fn layout_in(
        mut config: Config,
        workspace: &Workspace,
        layout: &mut Layout,
    ) -> Result<Self> {
        let s = ok!(Sizes::of(&config));
        let k = config.blocks;
        if k > 1 << 16 {
            return Err(Error::Setting {
                what: "blocks",
                found: k as f64,
                possible: "up to 65536",
            });
        }
        config.chunk = s.samples;
        let reversible = matches!(config.mode, Mode::Bdia);
        let mut planes = 0;
        match config.mode {
            Mode::Bdia => {
                planes = ok!(config.gamma.planes());
                if config.grid.is_none() {
                    return Err(Error::Setting {
                        what: "grid",
                        found: f64::NAN,
                        possible: "a grid in mode bdia",
                    });
                }
            }
            Mode::BdiaFloat if config.grid.is_some() => {
                return Err(Error::Setting {
                    what: "grid",
                    found: f64::NAN,
                    possible: "no grid in mode bdia-float",
                });
            }
            Mode::Checkpoint { .. } | Mode::Standard | Mode::BdiaFloat => {}
        }

        let stored = Self::stored_planes(&config);
        let side_words = ok!(product(
            "side bits",
            &[config.batch, config.per_sample.div_ceil(32), planes as usize, stored]
        ));
        let segments = config.segments();
        let saved = if reversible { 0 } else { ok!(product("saved inputs", &[s.whole, segments])) };
        let float_verify = config.verify && matches!(config.mode, Mode::BdiaFloat);
        let has_grid = config.grid.is_some();
        let output = matches!(config.tail, Tail::Output) && !reversible;

        let (l, w) = (layout, workspace);
        let (x_kind, int_state) = if reversible {
            (Category::Activations, s.whole)
        } else {
            (Category::Workspace, s.part)
        };
        let (inputs, frames) = if config.stores_frames() {
            (l.reals(Category::Activations, s.inputs), l.reals(Category::Activations, s.frames))
        } else {
            (w.inputs.sub(0, s.inputs), w.frames.sub(0, s.frames))
        };
        Ok(Self {
            x: [
                l.ints(x_kind, if has_grid { int_state } else { 0 }),
                l.ints(x_kind, if reversible { s.whole } else { 0 }),
            ],
            g: [w.g[0].sub(0, s.whole), w.g[1].sub(0, if config.has_pair() { s.whole } else { 0 })],
            side: l.words(Category::SideBits, side_words),
            sums: l.words(Category::SideBits, if reversible { 2 * (k + 2) } else { 0 }),
            originals: l.ints(
                Category::Verify,
                if config.verify && reversible {
                    ok!(product("originals", &[s.whole, stored]))
                } else {
                    0
                },
            ),
            differing: l.words(Category::Verify, if config.verify && reversible { 2 } else { 0 }),
            saved_ints: l.ints(Category::Activations, if has_grid { saved } else { 0 }),
            saved_reals: l
                .reals(Category::Activations, if !has_grid && segments > 1 { saved } else { 0 }),
            output: l.reals(Category::Activations, if output { s.whole } else { 0 }),
            inputs,
            frames,
            h: w.h.sub(0, s.part),
            top: w.top.sub(0, s.part),
            top_ints: w.top_ints.sub(0, if reversible { s.part } else { 0 }),
            scratch: w.scratch.sub(0, s.scratch),
            spare: [
                l.reals(Category::Verify, if float_verify { s.part } else { 0 }),
                l.reals(Category::Verify, if float_verify { s.frame } else { 0 }),
            ],
            rebuild_error: 0.0,
            context: None,
            config,
        })
    }

    const fn stored_planes(config: &Config) -> usize {
        if !matches!(config.mode, Mode::Bdia) {
            return 0;
        }
        match config.tail {
            Tail::Head => config.blocks.saturating_sub(2),
            Tail::Output => config.blocks - 1,
        }
    }

    /// The configuration, with the chunk that is used.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// `G_k` of the whole batch, while the backward pass is at block `k` or `k - 1`.
    pub const fn gradient(&self, k: usize) -> Reals {
        if self.g[1].is_empty() { self.g[0] } else { self.g[k % 2] }
    }

    /// `X_k` of the whole batch, while it is one of the two that are kept (mode `bdia`).
    pub const fn activation(&self, k: usize) -> Ints {
        self.x[k % 2]
    }

    /// Scratch shared by blocks, head and input; free between calls.
    pub const fn scratch(&self) -> Reals {
        self.scratch
    }

    /// All stored side bits.
    pub const fn side_bits(&self) -> Words {
        self.side
    }

    /// Number of elements in which rebuilt activations differed from the originals, since the last
    /// [`train`](Self::train) began (`verify` in mode `bdia`).
    ///
    /// # Errors
    /// Those of reading.
    pub fn mismatches<B: Storage>(&self, be: &B) -> Result<u64> {
        let mut words = [0; 2];
        if self.differing.is_empty() {
            return Ok(0);
        }
        be.read_words(self.differing, &mut words)?;
        Ok(u64::from(words[1]) << 32 | u64::from(words[0]))
    }

    /// Largest difference between rebuilt and original activations of the last step (`verify` in
    /// mode `bdia-float`).
    pub const fn rebuild_error(&self) -> f64 {
        self.rebuild_error
    }

    /// One forward and backward pass with input and head. The deferred status of the backend says
    /// whether it is good.
    ///
    /// # Errors
    /// Whatever the backend, the blocks or the ends report.
    pub fn train<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        head: &mut impl Head<B>,
        pass: &Pass,
    ) -> Result<()> {
        self.embed(be, input, pass)?;
        self.forward(be, blocks, pass)?;
        self.turn(be, blocks, head, pass)?;
        self.backward(be, blocks, pass)?;
        self.embed_vjp(be, input, pass)
    }

    /// The chunks of the batch: first sample and number of samples.
    fn chunks(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (batch, chunk) = (self.config.batch, self.config.chunk);
        (0..batch.div_ceil(chunk)).map(move |c| (c, c * chunk, chunk.min(batch - c * chunk)))
    }

    fn chunk(&self, pass: &Pass, site: Site, frame: usize, first: usize, samples: usize) -> Chunk {
        Chunk {
            seed: pass.seed,
            step: pass.step,
            stack: self.config.id,
            site,
            first,
            samples,
            global: pass.global.wrapping_add(first as u32),
            frame,
        }
    }

    /// The part of a whole-batch tensor of reals.
    fn of(&self, whole: Reals, chunk: &Chunk) -> Reals {
        whole.sub(chunk.first * self.config.per_sample, chunk.samples * self.config.per_sample)
    }

    fn of_ints(&self, whole: Ints, chunk: &Chunk) -> Ints {
        whole.sub(chunk.first * self.config.per_sample, chunk.samples * self.config.per_sample)
    }

    /// The part of a one-chunk tensor.
    fn part(&self, one: Reals, chunk: &Chunk) -> Reals {
        one.sub(0, chunk.samples * self.config.per_sample)
    }

    fn input_of(&self, chunk: &Chunk) -> Reals {
        let part = self.config.chunk * self.config.per_sample;
        self.part(self.inputs.sub(chunk.frame * part, part), chunk)
    }

    fn frame_of(&self, chunk: &Chunk) -> Reals {
        let frame = self.config.chunk * self.config.needs.frame;
        self.frames.sub(chunk.frame * frame, frame)
    }

    fn side_of(&self, plane: usize, chunk: &Chunk) -> Result<Words> {
        if plane >= Self::stored_planes(&self.config) {
            return Ok(Words::EMPTY);
        }
        let words = self.config.per_sample.div_ceil(32) * self.config.gamma.planes()? as usize;
        Ok(self.side.sub((plane * self.config.batch + chunk.first) * words, chunk.samples * words))
    }

    /// Checksum of `X_k` (two words); index `K + 1` is the one that the backward pass compares
    /// with.
    const fn sum(&self, k: usize) -> Words {
        self.sums.sub(2 * k, 2)
    }

    fn call(&self, chunk: Chunk, block: usize, keep: bool) -> Call {
        let context = self.context.map(|c| {
            let slice = |r: Reals| {
                let per = r.len() / self.config.batch;
                r.sub(chunk.first * per, chunk.samples * per)
            };
            Context { value: slice(c.value), grad: slice(c.grad) }
        });
        let (x, frame) = (self.input_of(&chunk), self.frame_of(&chunk));
        Call { chunk, block, x, frame, scratch: self.scratch, context, train: true, keep }
    }

    /// Frame of block `k` and chunk `c`.
    fn frame_index(&self, k: usize, c: usize) -> usize {
        if self.config.one_frame() {
            return 0;
        }
        (k % self.config.segment()) * self.config.batch.div_ceil(self.config.chunk) + c
    }

    fn step_gamma(&self, k: usize) -> Result<Gamma> {
        if k == 0 || matches!(self.config.mode, Mode::Standard | Mode::Checkpoint { .. }) {
            Gamma::new(ZERO_GAMMA, Sign::Plus)
        } else {
            Ok(self.config.gamma)
        }
    }

    /// `X_0` from the input.
    ///
    /// # Errors
    /// Whatever the backend or the input report.
    pub fn embed<B: UpdateOps>(
        &mut self,
        be: &mut B,
        input: &mut impl Input<B>,
        pass: &Pass,
    ) -> Result<()> {
        if !self.sums.is_empty() {
            be.fill_words(self.sums, 0)?;
        }
        if !self.differing.is_empty() {
            be.fill_words(self.differing, 0)?;
        }
        self.rebuild_error = 0.0;
        let reversible = self.config.mode == Mode::Bdia;
        for (c, first, n) in self.chunks() {
            let chunk = self.chunk(pass, Site::Embedding, self.frame_index(0, c), first, n);
            let x = self.input_of(&chunk);
            match self.config.grid {
                Some(grid) => {
                    input.forward(be, &chunk, true, x, self.scratch)?;
                    let whole = if reversible { self.x[0] } else { self.saved_ints };
                    let sum = if reversible { self.sum(0) } else { Words::EMPTY };
                    be.quantize(&chunk, grid, x, self.of_ints(whole, &chunk), sum)?;
                }
                None if self.saved_reals.is_empty() => {
                    input.forward(be, &chunk, true, x, self.scratch)?
                }
                None => input.forward(
                    be,
                    &chunk,
                    true,
                    self.of(self.saved_reals, &chunk),
                    self.scratch,
                )?,
            }
        }
        Ok(())
    }

    /// The blocks below the last one; all of them with [`Tail::Output`].
    ///
    /// # Errors
    /// Whatever the backend or the blocks report.
    pub fn forward<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
    ) -> Result<()> {
        if self.config.mode != Mode::Bdia {
            let below = self.config.segments() - usize::from(self.config.tail == Tail::Head);
            for s in 0..below {
                for (c, first, n) in self.chunks() {
                    self.run_segment(be, blocks, pass, s, (c, first, n), self.config.waits())?;
                    if !self.spare[0].is_empty() && self.config.waits() {
                        let chunk = self.chunk(pass, Site::Head, 0, first, n);
                        be.copy_reals(self.of(self.output, &chunk), self.part(self.top, &chunk))?;
                        self.measure_rebuilding(be, blocks, pass, (c, first, n))?;
                    }
                }
            }
            return Ok(());
        }
        let Some(grid) = self.config.grid else { return Ok(()) };
        let blocks_here = self.config.blocks - usize::from(self.config.tail == Tail::Head);
        for k in 0..blocks_here {
            if !self.originals.is_empty() && k < Self::stored_planes(&self.config) {
                let whole = self.x[0].len();
                be.copy_ints(self.x[k % 2], self.originals.sub(k * whole, whole))?;
            }
            for (_, first, n) in self.chunks() {
                let chunk = self.chunk(pass, Site::Block(k), 0, first, n);
                let (next, sum) = (self.of_ints(self.x[(k + 1) % 2], &chunk), self.sum(k + 1));
                self.residual(be, blocks, &chunk, k, false)?;
                self.advance(
                    be,
                    &chunk,
                    grid,
                    k,
                    next,
                    self.side_of(k.wrapping_sub(1), &chunk)?,
                    sum,
                )?;
            }
        }
        Ok(())
    }

    /// The result of [`forward`](Self::forward) with [`Tail::Output`]: `x_K` of the whole batch, in
    /// the place of `G_K`. Read it, then put `∂L/∂x_K` over it and call
    /// [`backward`](Self::backward).
    ///
    /// # Errors
    /// [`Error::Setting`] with [`Tail::Head`], whose `x_K` the head alone sees; whatever the
    /// backend reports.
    pub fn output<B: UpdateOps>(&self, be: &mut B) -> Result<Reals> {
        if self.config.tail != Tail::Output {
            return Err(Error::Setting {
                what: "tail",
                found: f64::NAN,
                possible: "an output, to read it",
            });
        }
        let place = self.gradient(self.config.blocks);
        match self.config.grid {
            Some(grid) if self.config.mode == Mode::Bdia => {
                be.dequantize(grid, self.activation(self.config.blocks), place)?;
            }
            _ => be.copy_reals(self.output, place)?,
        }
        Ok(place)
    }

    /// `h_k` of the chunk's `X_k` (mode `bdia`).
    fn residual<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        chunk: &Chunk,
        k: usize,
        keep: bool,
    ) -> Result<()> {
        let call = self.call(*chunk, k, keep);
        if let Some(grid) = self.config.grid {
            be.dequantize(grid, self.of_ints(self.x[k % 2], chunk), call.x)?;
        }
        blocks.residual(be, &call, self.part(self.h, chunk))
    }

    /// `X_{k+1}` of the chunk over `next`, which holds `X_{k-1}`.
    fn advance<B: UpdateOps>(
        &self,
        be: &mut B,
        chunk: &Chunk,
        grid: Grid,
        k: usize,
        next: Ints,
        side: Words,
        sum: Words,
    ) -> Result<()> {
        let h = self.part(self.h, chunk);
        if k == 0 {
            be.copy_ints(self.of_ints(self.x[0], chunk), next)?;
            be.add_quantized(chunk, grid, next, h, sum)
        } else {
            be.step(chunk, grid, self.config.gamma, next, self.input_of(chunk), h, side, sum)
        }
    }

    /// The last block, the head and the way back through the last block, chunk by chunk.
    ///
    /// # Errors
    /// Whatever the backend, the blocks or the head report.
    pub fn turn<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        head: &mut impl Head<B>,
        pass: &Pass,
    ) -> Result<()> {
        if self.config.tail != Tail::Head {
            return Err(Error::Setting {
                what: "tail",
                found: f64::NAN,
                possible: "a head, to turn at",
            });
        }
        let last = self.config.blocks - 1;
        if !self.g[1].is_empty() {
            be.fill_reals(self.g[last % 2], B::Real::of(0.0))?;
        }
        let segments = self.config.segments();
        for (c, first, n) in self.chunks() {
            let chunk = self.chunk(pass, Site::Block(last), self.frame_index(last, c), first, n);
            let top = self.part(self.top, &chunk);
            match (self.config.mode, self.config.grid) {
                (Mode::Bdia, Some(grid)) => {
                    self.residual(be, blocks, &chunk, last, true)?;
                    let next = self.top_ints.sub(0, top.len());
                    if last > 0 {
                        be.copy_ints(self.of_ints(self.x[(last + 1) % 2], &chunk), next)?;
                    }
                    self.advance(be, &chunk, grid, last, next, Words::EMPTY, Words::EMPTY)?;
                    be.dequantize(grid, next, top)?;
                }
                _ => {
                    self.run_segment(be, blocks, pass, segments - 1, (c, first, n), true)?;
                    if !self.spare[0].is_empty() {
                        self.measure_rebuilding(be, blocks, pass, (c, first, n))?;
                    }
                }
            }
            let at_head = Chunk { site: Site::Head, ..chunk };
            head.forward_backward(
                be,
                &at_head,
                top,
                self.of(self.gradient(last + 1), &chunk),
                self.scratch,
            )?;
            self.backpropagate(be, blocks, &chunk, last)?;
        }
        blocks.done(be, last)?;
        if self.config.mode != Mode::Bdia {
            self.rest_of_segment(be, blocks, pass, segments - 1)?;
        }
        Ok(())
    }

    /// `G_k` and `G_{k-1}` of the chunk from `G_{k+1}`; the block's intermediates are in its frame.
    fn backpropagate<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        chunk: &Chunk,
        k: usize,
    ) -> Result<()> {
        let (next, cur) = (self.of(self.gradient(k + 1), chunk), self.of(self.gradient(k), chunk));
        let h = self.part(self.h, chunk);
        if self.g[1].is_empty() {
            be.copy_reals(cur, h)?;
        } else {
            be.combine(chunk, self.step_gamma(k)?, next, cur, h)?;
        }
        blocks.vjp(be, &self.call(*chunk, k, true), h, cur)
    }

    /// From the last two activations and `G_K` back to `G_0`.
    ///
    /// # Errors
    /// Whatever the backend or the blocks report.
    pub fn backward<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
    ) -> Result<()> {
        let k = self.config.blocks;
        let Some(grid) = self.config.grid.filter(|_| self.config.mode == Mode::Bdia) else {
            return self.backward_segments(be, blocks, pass);
        };
        if self.config.tail == Tail::Output {
            be.fill_reals(self.g[(k - 1) % 2], B::Real::of(0.0))?;
        }
        let compared = self.sum(k + 1);
        let above = k - usize::from(self.config.tail == Tail::Head);
        for k in (0..above).rev() {
            be.fill_words(compared, 0)?;
            for (_, first, n) in self.chunks() {
                let chunk = self.chunk(pass, Site::Block(k), 0, first, n);
                self.residual(be, blocks, &chunk, k, true)?;
                let far = self.of_ints(self.x[(k + 1) % 2], &chunk);
                let h = self.part(self.h, &chunk);
                if k == 0 {
                    // X_0 is there already: rebuilding it once more, beside X_1, shows whether
                    // block 0 repeats itself.
                    let again = self.top_ints.sub(0, far.len());
                    be.copy_ints(far, again)?;
                    be.subtract_quantized(&chunk, grid, again, h, compared)?;
                } else {
                    let side = self.side_of(k - 1, &chunk)?;
                    be.inverse(
                        &chunk,
                        grid,
                        self.config.gamma,
                        far,
                        self.input_of(&chunk),
                        h,
                        side,
                        compared,
                    )?;
                }
                self.backpropagate(be, blocks, &chunk, k)?;
            }
            let rebuilt = k.saturating_sub(1);
            be.compare(self.sum(rebuilt), compared, rebuilt, k)?;
            if k > 0 && !self.originals.is_empty() {
                let whole = self.x[0].len();
                be.count_differences(
                    self.x[(k - 1) % 2],
                    self.originals.sub((k - 1) * whole, whole),
                    self.differing,
                )?;
            }
            blocks.done(be, k)?;
        }
        Ok(())
    }

    /// Gives `G_0` to the input.
    ///
    /// # Errors
    /// Whatever the backend or the input report.
    pub fn embed_vjp<B: UpdateOps>(
        &mut self,
        be: &mut B,
        input: &mut impl Input<B>,
        pass: &Pass,
    ) -> Result<()> {
        for (_, first, n) in self.chunks() {
            let chunk = self.chunk(pass, Site::Embedding, 0, first, n);
            input.vjp(be, &chunk, self.of(self.gradient(0), &chunk), self.scratch)?;
        }
        Ok(())
    }

    /// Runs segment `s` on one chunk, from its stored input to the stored input of the next one, or
    /// to `x_K`.
    fn run_segment<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
        s: usize,
        (c, first, n): (usize, usize, usize),
        keep: bool,
    ) -> Result<()> {
        let (segment, k, whole) =
            (self.config.segment(), self.config.blocks, self.config.batch * self.config.per_sample);
        let range = s * segment..((s + 1) * segment).min(k);
        let output = self.config.tail == Tail::Output;
        for j in range.clone() {
            let chunk = self.chunk(pass, Site::Block(j), self.frame_index(j, c), first, n);
            let h = self.part(self.h, &chunk);
            let call = self.call(chunk, j, keep);
            let running = self.x[0].sub(0, n * self.config.per_sample);
            if let Some(grid) = self.config.grid {
                if j == range.start {
                    be.copy_ints(
                        self.of_ints(self.saved_ints.sub(s * whole, whole), &chunk),
                        running,
                    )?;
                }
                be.dequantize(grid, running, call.x)?;
            } else if j == range.start && !self.saved_reals.is_empty() {
                be.copy_reals(self.of(self.saved_reals.sub(s * whole, whole), &chunk), call.x)?;
            }
            blocks.residual(be, &call, h)?;
            let ends = j + 1 == range.end;
            if ends && keep && (j + 1 < k || (output && !self.config.waits())) {
                // A recomputed segment: its result is known, only its frames were wanted.
                return Ok(());
            }
            let last =
                if output { self.of(self.output, &chunk) } else { self.part(self.top, &chunk) };
            if let Some(grid) = self.config.grid {
                be.add_quantized(&chunk, grid, running, h, Words::EMPTY)?;
                if j + 1 == k {
                    be.dequantize(grid, running, last)?;
                } else if ends {
                    be.copy_ints(
                        running,
                        self.of_ints(self.saved_ints.sub((s + 1) * whole, whole), &chunk),
                    )?;
                }
                continue;
            }
            let target = if j + 1 == k {
                last
            } else if ends {
                self.of(self.saved_reals.sub((s + 1) * whole, whole), &chunk)
            } else {
                self.input_of(&Chunk { frame: self.frame_index(j + 1, c), ..chunk })
            };
            let gamma = self.step_gamma(j)?;
            if gamma.magnitude() != 0.0 {
                be.copy_reals(
                    self.input_of(&Chunk { frame: self.frame_index(j - 1, c), ..chunk }),
                    target,
                )?;
            }
            be.blend(&chunk, gamma, target, call.x, h)?;
        }
        Ok(())
    }

    /// The VJPs of a segment below its last block, whose frames are all there.
    fn rest_of_segment<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
        s: usize,
    ) -> Result<()> {
        let (segment, k) = (self.config.segment(), self.config.blocks);
        for j in (s * segment..((s + 1) * segment).min(k) - 1).rev() {
            for (c, first, n) in self.chunks() {
                let chunk = self.chunk(pass, Site::Block(j), self.frame_index(j, c), first, n);
                self.backpropagate(be, blocks, &chunk, j)?;
            }
            blocks.done(be, j)?;
        }
        Ok(())
    }

    fn backward_segments<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
    ) -> Result<()> {
        let (segment, k, waits) = (self.config.segment(), self.config.blocks, self.config.waits());
        let output = self.config.tail == Tail::Output;
        if output && !self.g[1].is_empty() {
            be.fill_reals(self.g[(k - 1) % 2], B::Real::of(0.0))?;
        }
        for s in (0..self.config.segments() - usize::from(!output)).rev() {
            let last = ((s + 1) * segment).min(k) - 1;
            for (c, first, n) in self.chunks() {
                if !waits {
                    self.run_segment(be, blocks, pass, s, (c, first, n), true)?;
                }
                let chunk =
                    self.chunk(pass, Site::Block(last), self.frame_index(last, c), first, n);
                self.backpropagate(be, blocks, &chunk, last)?;
            }
            blocks.done(be, last)?;
            self.rest_of_segment(be, blocks, pass, s)?;
        }
        Ok(())
    }

    /// `bdia-float`: rebuilds the chunk's activations from `x_K` and `x_{K-1}` and keeps the
    /// largest error.
    fn measure_rebuilding<B: UpdateOps>(
        &mut self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        pass: &Pass,
        (c, first, n): (usize, usize, usize),
    ) -> Result<()> {
        let k = self.config.blocks;
        if self.config.gamma.magnitude() == 0.0 {
            return Ok(());
        }
        let stored = |j: usize| {
            self.input_of(&self.chunk(pass, Site::Block(j), self.frame_index(j, c), first, n))
        };
        let probe = self.chunk(pass, Site::Block(0), 0, first, n);
        // `far` holds x_{j+1} and becomes x_{j-1}; `near` holds x_j.
        let (mut far, mut near) = (self.part(self.top, &probe), self.part(self.spare[0], &probe));
        // x_K is needed by the head afterwards: it waits in G, which the head sets.
        let keep = self.of(self.gradient(k), &probe);
        be.copy_reals(far, keep)?;
        be.copy_reals(stored(k - 1), near)?;
        let mut worst = 0.0_f64;
        for j in (1..k).rev() {
            let chunk = self.chunk(pass, Site::Block(j), self.frame_index(j, c), first, n);
            let h = self.part(self.h, &chunk);
            let call = Call { x: near, frame: self.spare[1], ..self.call(chunk, j, false) };
            blocks.residual(be, &call, h)?;
            be.unblend(&chunk, self.config.gamma, far, near, h)?;
            (far, near) = (near, far);
            worst = worst.max(largest_difference(be, near, stored(j - 1))?);
        }
        be.copy_reals(keep, self.part(self.top, &probe))?;
        self.rebuild_error = self.rebuild_error.max(worst);
        Ok(())
    }

    /// Inference over `samples` samples (at most a chunk): from the input to `x_K`, whose place is
    /// returned. With `gamma = 0` it is the standard transformer, `x_{k+1} = x_k + h_k(x_k)`;
    /// dropout is off. Uses the workspace only.
    ///
    /// # Errors
    /// [`Error::Shape`] for more samples than a chunk holds; whatever the backend, the blocks or
    /// the input report.
    pub fn infer<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        samples: usize,
        gamma: Gamma,
    ) -> Result<Reals> {
        if samples > self.config.chunk {
            return Err(Error::Shape {
                what: "samples of inference",
                expected: self.config.chunk,
                found: samples,
            });
        }
        let pass = Pass { seed: 0, step: 0, global: 0 };
        let at = |site| self.chunk(&pass, site, 0, 0, samples);
        let (mut cur, mut other) =
            (self.input_of(&at(Site::Embedding)), self.part(self.top, &at(Site::Embedding)));
        input.forward(be, &at(Site::Embedding), false, cur, self.scratch)?;
        for k in 0..self.config.blocks {
            let chunk = at(Site::Block(k));
            let h = self.part(self.h, &chunk);
            let call = Call { x: cur, train: false, ..self.call(chunk, k, false) };
            blocks.residual(be, &call, h)?;
            let gamma = if k == 0 { Gamma::new(ZERO_GAMMA, Sign::Plus)? } else { gamma };
            be.blend(&chunk, gamma, other, cur, h)?;
            (cur, other) = (other, cur);
        }
        Ok(cur)
    }

    /// Inference on the grid, `X_{k+1} = X_k + Q(h_k(x_k))` as in the paper, or with a constant
    /// dyadic γ. Needs a stack in mode `bdia`, whose `X` pair it uses. The result is the place of
    /// `x_K`.
    ///
    /// # Errors
    /// As [`infer`](Self::infer); [`Error::Setting`] without a grid or for a γ that is neither 0
    /// nor `±2^-m`.
    pub fn infer_quantized<B: UpdateOps>(
        &self,
        be: &mut B,
        blocks: &mut impl Blocks<B>,
        input: &mut impl Input<B>,
        samples: usize,
        gamma: Gamma,
    ) -> Result<Reals> {
        if samples > self.config.chunk {
            return Err(Error::Shape {
                what: "samples of inference",
                expected: self.config.chunk,
                found: samples,
            });
        }
        let Some(grid) = self.config.grid.filter(|_| self.config.mode == Mode::Bdia) else {
            return Err(Error::Setting {
                what: "mode",
                found: f64::NAN,
                possible: "bdia, which has a grid",
            });
        };
        let pass = Pass { seed: 0, step: 0, global: 0 };
        let at = |site| self.chunk(&pass, site, 0, 0, samples);
        let x = self.input_of(&at(Site::Embedding));
        let pair = [0, 1].map(|i| self.x[i].sub(0, x.len()));
        input.forward(be, &at(Site::Embedding), false, x, self.scratch)?;
        be.quantize(&at(Site::Embedding), grid, x, pair[0], Words::EMPTY)?;
        for k in 0..self.config.blocks {
            let chunk = at(Site::Block(k));
            let h = self.part(self.h, &chunk);
            let call = Call { train: false, ..self.call(chunk, k, false) };
            be.dequantize(grid, pair[k % 2], x)?;
            blocks.residual(be, &call, h)?;
            if k == 0 || gamma.magnitude() == 0.0 {
                be.copy_ints(pair[k % 2], pair[(k + 1) % 2])?;
                be.add_quantized(&chunk, grid, pair[(k + 1) % 2], h, Words::EMPTY)?;
            } else {
                be.step(&chunk, grid, gamma, pair[(k + 1) % 2], x, h, Words::EMPTY, Words::EMPTY)?;
            }
        }
        be.dequantize(grid, pair[self.config.blocks % 2], x)?;
        Ok(x)
    }
}

/// Largest `|a − b|`, piece by piece through the host.
fn largest_difference<B: Storage>(be: &B, a: Reals, b: Reals) -> Result<f64> {
    let (mut pa, mut pb) = ([B::Real::of(0.0); 64], [B::Real::of(0.0); 64]);
    let (mut worst, mut at) = (0.0_f64, 0);
    while at < a.len() {
        let n = pa.len().min(a.len() - at);
        be.read_reals(a.sub(at, n), &mut pa[..n])?;
        be.read_reals(b.sub(at, n), &mut pb[..n])?;
        for (x, y) in pa[..n].iter().zip(&pb[..n]) {
            worst = worst.max((x.wide() - y.wide()).abs());
        }
        at += n;
    }
    Ok(worst)
}
