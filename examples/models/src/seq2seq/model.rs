//! The encoder-decoder transformer (Vaswani et al., 2017; pre-norm, learned positions) assembled
//! from the layers and the stack of `bdia-core`: where every buffer is, and one optimizer step.
//!
//! # One step, traced
//! `n` samples; `S` source and `T` target positions, both with the mark of the end; width `d`; `K`
//! and `L` blocks.
//!
//! ```text
//! encoder.embed, forward   X_0 … X_K on the grid, K−1 planes of side bits; X_K and X_{K−1} are kept
//! output.forward           memory = norm(x_K), [n, S, d]; its gradient = 0
//! decoder.train            embed, forward, turn (head and loss), backward, embed_vjp: every block reads the memory, and adds
//!                          to its gradient; updated as it is finished
//! output.vjp               x_K again from X_K; ∂L/∂x_K from the memory's gradient
//! encoder.backward         all K blocks are recomputed and rebuilt, down to X_0; updated as they are finished
//! encoder.embed_vjp        then tables, positions and norms are updated
//! ```
//!
//! # Memory
//! | what | size |
//! |---|---|
//! | encoder: `X_K`, `X_{K−1}`, side bits | `2·n·S·d` integers, `(K−1)·n·S·d` bits |
//! | decoder: `X_{L−1}`, `X_{L−2}`, side bits | `2·n·T·d` integers, `(L−2)·n·T·d` bits |
//! | memory and its gradient | `2·n·S·d` reals |
//! | `G` pair and workspace of one chunk | once: the decoder is over when the encoder's backward pass begins |
//!
//! Nothing grows with the number of blocks but side bits and checksums. Batches have other `n`, `S`
//! and `T` from step to step: a [`Part`] lays the same arenas out for one [`Shape`], behind the
//! parameters, and the plan covers the largest of them. Translating ([`super::decode`]) uses the
//! same memory.

use bdia_core::arena::{Category, Ints, Layout, Reals, product};
use bdia_core::backend::{Backend, Chunk, Gelu, Mask};
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::{
    BlockShape, DecoderBlocks, EncoderOutput, LmHead, Params, Tensor, TokenEmbedding,
    TransformerBlocks, Updater, place,
};
use bdia_core::optim::{Rule, clip_scale};
use bdia_core::rng::{Draw, Stream};
use bdia_core::stack::{Config as StackConfig, Context, Mode, Pass, Stack, Tail, Workspace};
use bdia_core::update::{Gamma, Grid};
use bdia_core::{Real, Sign};

use super::vocab::{BEGIN, END, PAD};

/// The architecture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Entries of the source's and of the target's vocabulary.
    pub vocab: [usize; 2],
    /// One table for source, target and logits; otherwise the source has a table of its own.
    pub shared: bool,
    /// Most positions of a sentence, with the mark of its end.
    pub longest: usize,
    /// Width `d`.
    pub width: usize,
    /// Blocks of encoder and decoder.
    pub layers: [usize; 2],
    /// Attention heads.
    pub heads: usize,
    /// Hidden width of the MLPs.
    pub inner: usize,
    /// `ε` of the norms.
    pub eps: f64,
    /// Dropout: of the embeddings, of attention probabilities, of the branches' outputs, inside the
    /// MLPs.
    pub dropout: [f64; 4],
}

/// How it is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Setup {
    /// The architecture.
    pub dims: Dims,
    /// Mode of both stacks.
    pub mode: Mode,
    /// The grid, if the mode has one.
    pub grid: Option<Grid>,
    /// γ.
    pub gamma: Gamma,
    /// The optimizer; `None` for inference.
    pub rule: Option<Rule>,
    /// Update blocks as they are finished. Without it the gradient can be clipped.
    pub fused: bool,
    /// Keep originals and count differences.
    pub verify: bool,
    /// Label smoothing.
    pub smoothing: f64,
    /// Rows of logits at a time.
    pub head_rows: usize,
    /// Threads of the backend.
    pub threads: usize,
    /// Bytes that the libraries below the backend allocate for themselves, at most.
    pub library: usize,
}

/// Sizes of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    /// Samples.
    pub samples: usize,
    /// Positions of the source, `S`.
    pub source: usize,
    /// Positions of the target, `T`.
    pub target: usize,
    /// Samples processed together inside a block.
    pub chunk: usize,
}

/// A sentence and its translation as tokens, without begin and end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// The sentence.
    pub source: Vec<i32>,
    /// Its translation.
    pub target: Vec<i32>,
}

impl Tokens {
    /// Positions that it takes: the longer side with its end.
    pub fn positions(&self) -> usize {
        self.source.len().max(self.target.len()) + 1
    }
}

/// What an optimizer step needs to know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Number of the step, from 0.
    pub step: u32,
    /// Seed of the run.
    pub seed: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 for no clipping. Needs full gradients.
    pub clip: f64,
}

/// What an optimizer step gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Mean loss of the target's tokens, smoothed.
    pub loss: f64,
    /// Tokens of source and target, with their ends.
    pub tokens: usize,
    /// Norm of the whole gradient, before clipping.
    pub grad_norm: f64,
    /// Elements in which rebuilt activations of both stacks differed (with `verify`).
    pub mismatches: u64,
    /// Largest error of rebuilding (with `verify`, without a grid).
    pub rebuild_error: f64,
}

/// Which network is run at inference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Inference {
    /// In float: the standard transformer.
    Float,
    /// Residuals rounded to the grid, which the setup has to have.
    Quantized(Grid),
}

/// Parameter tensors outside the blocks.
const ENDS: usize = 8;

/// A part of a tensor of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The values.
    pub values: Reals,
    /// Their gradient; with fused updates the buffer that all blocks use.
    pub gradient: Reals,
    /// The optimizer's state.
    pub state: [Reals; 2],
    /// Rows and columns here, where the file has the transpose.
    pub transposed: Option<[usize; 2]>,
}

/// A parameter tensor by its name in files: those of `torch.nn.Transformer(norm_first=True,
/// activation="gelu")` for blocks and norms. Its pieces lie there one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The name.
    pub name: String,
    /// The shape in a file; linear layers are `[out, in]` there and `[in, out]` here.
    pub shape: Vec<usize>,
    /// The pieces.
    pub pieces: Vec<Piece>,
}

/// The arenas behind the parameters, laid out for batches of one shape.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    shape: Shape,
    stacks: [Stack; 2],
    encoder: TransformerBlocks,
    decoder: DecoderBlocks,
    inputs: [TokenEmbedding; 2],
    output: EncoderOutput,
    /// Norm, logits, loss.
    pub head: LmHead,
    /// Positions in use, of every sample: source, target.
    lens: [Ints; 2],
}

/// An encoder-decoder transformer laid out in the arenas of a backend.
#[derive(Debug, Clone)]
pub struct Translator {
    pub(super) setup: Setup,
    /// The parameters' layout, behind which parts begin.
    pub(super) base: Layout,
    /// Blocks of the encoder, of no particular length.
    pub(super) encoder: TransformerBlocks,
    /// Blocks of the decoder.
    pub(super) decoder: DecoderBlocks,
    ends: Params,
    end_tensors: [Tensor; ENDS],
    staging: Vec<i32>,
}

impl Translator {
    /// Lays a model out, with memory for batches of these shapes and for what `more` lays out
    /// besides them.
    ///
    /// # Errors
    /// A typed error for dimensions or settings that do not fit together.
    pub fn layout<B: Backend>(
        setup: &Setup,
        shapes: &[Shape],
        more: impl FnOnce(&Self) -> Result<Vec<Layout>>,
    ) -> Result<(Self, Layout)> {
        let (d, mut layout) = (&setup.dims, Layout::new(B::Real::BYTES));
        let l = &mut layout;
        if d.longest < 2 {
            return Err(setting("longest sentence", d.longest as f64, "2 positions or more"));
        }
        if d.shared && d.vocab[0] != d.vocab[1] {
            return Err(setting(
                "vocabulary",
                d.vocab[1] as f64,
                "one for both languages, to share a table",
            ));
        }
        if d.vocab.iter().any(|&v| v <= END as usize) {
            return Err(setting(
                "vocabulary",
                d.vocab[0].min(d.vocab[1]) as f64,
                "4 entries or more",
            ));
        }
        if !(0.0..1.0).contains(&d.dropout[0]) {
            return Err(setting("embedding dropout", d.dropout[0], "0 up to, not including, 1"));
        }
        let shape = |mask| BlockShape {
            tokens: d.longest,
            width: d.width,
            heads: d.heads,
            inner: d.inner,
            eps: d.eps,
            gelu: Gelu::Exact,
            mask,
            attention_dropout: d.dropout[1],
            residual_dropout: d.dropout[2],
            hidden_dropout: d.dropout[3],
            qkv_bias: true,
            temperature: false,
        };
        shape(Mask::Full).check()?;
        product("parameters", &[d.vocab[0].max(d.vocab[1]).max(d.longest), d.width])?;
        let encoder =
            TransformerBlocks::layout(shape(Mask::Full), d.layers[0], setup.rule, setup.fused, l)?;
        let decoder = DecoderBlocks::layout(
            shape(Mask::Causal),
            d.longest,
            d.layers[1],
            setup.rule,
            setup.fused,
            l,
        )?;
        let (end_tensors, len) = end_tensors(d);
        let ends = Params::layout(l, 1, len, ENDS, setup.rule, true)?;
        // The staging buffer on the host: the tokens of a batch.
        let longest = shapes
            .iter()
            .map(|s| s.samples.saturating_mul(s.source.max(s.target)))
            .max()
            .unwrap_or(0);
        l.outside(Category::Head, product("tokens", &[longest, size_of::<i32>()])?);
        l.outside(Category::Library, setup.library);
        let model = Self {
            setup: *setup,
            base: layout,
            encoder,
            decoder,
            ends,
            end_tensors,
            staging: Vec::with_capacity(0),
        };
        let mut all = more(&model)?;
        for shape in shapes {
            all.push(model.part::<B>(shape)?.1.checked()?);
        }
        // The largest first, so that only what its arenas lack is added.
        all.sort_by_key(|l| core::cmp::Reverse(l.total()));
        let mut all = all.into_iter();
        let mut plan = all.next().unwrap_or_else(|| model.base.clone());
        all.for_each(|l| plan.cover(&l));
        Ok((model, plan))
    }

    /// The arenas for one shape: how they are used, and how much of them.
    ///
    /// # Errors
    /// As [`layout`](Self::layout).
    pub fn part<B: Backend>(&self, shape: &Shape) -> Result<(Part, Layout)> {
        let (s, d, mut layout) = (&self.setup, &self.setup.dims, self.base.clone());
        let l = &mut layout;
        for (what, n) in [("source positions", shape.source), ("target positions", shape.target)] {
            if n > d.longest {
                return Err(Error::Shape { what, expected: d.longest, found: n });
            }
        }
        let chunk = shape.chunk.clamp(1, shape.samples.max(1));
        let mut encoder = self.encoder.with_tokens(shape.source);
        let mut decoder = self.decoder.with_tokens(shape.target, shape.source);
        let config = |id: u8, tokens, needs, tail, ends_scratch| {
            Ok::<_, Error>(StackConfig {
                id,
                batch: shape.samples,
                per_sample: product("activations", &[tokens, d.width])?,
                blocks: d.layers[usize::from(id)],
                chunk,
                mode: s.mode,
                grid: s.grid,
                gamma: s.gamma,
                verify: s.verify,
                tail,
                needs,
                ends_scratch,
            })
        };
        let configs = [
            config(0, shape.source, encoder.shape().needs::<B>(chunk, s.threads), Tail::Output, 0)?,
            config(
                1,
                shape.target,
                decoder.needs::<B>(chunk, s.threads),
                Tail::Head,
                LmHead::scratch(d.width, shape.target, chunk),
            )?,
        ];
        let workspace = Workspace::layout(&configs, l)?;
        let mut stacks = [
            Stack::layout_in(configs[0], &workspace, l)?,
            Stack::layout_in(configs[1], &workspace, l)?,
        ];
        let lens = [0; 2].map(|_| l.ints(Category::Head, shape.samples));
        (encoder.key_lens, decoder.own.key_lens, decoder.context_lens) =
            (lens[0], lens[1], lens[0]);
        let inputs = [self.embedding(0, shape, l), self.embedding(1, shape, l)];
        let rows = product("memory", &[shape.samples, shape.source])?;
        let mut memory = |per: usize| {
            Ok::<_, Error>(l.reals(Category::Activations, product("memory", &[rows, per])?))
        };
        let context = Context { value: memory(d.width)?, grad: memory(d.width)? };
        let output = EncoderOutput { stats: memory(2)?, ..self.output(context) };
        stacks[1].context = Some(context);
        let targets = product("targets", &[shape.samples, shape.target])?;
        let head = LmHead {
            per_sample: shape.target,
            targets: l.ints(Category::Head, targets),
            losses: l.reals(Category::Head, targets),
            logits: l.reals(
                Category::Head,
                product(
                    "logits",
                    &[s.head_rows.clamp(1, (chunk * shape.target).max(1)), d.vocab[1]],
                )?,
            ),
            smoothing: s.smoothing,
            ..self.head()
        };
        let shape = Shape { chunk, ..*shape };
        Ok((Part { shape, stacks, encoder, decoder, inputs, output, head, lens }, layout))
    }

    /// Embedding of the source (0) or the target (1).
    pub(super) fn embedding(&self, side: usize, shape: &Shape, l: &mut Layout) -> TokenEmbedding {
        let per_sample = [shape.source, shape.target][side];
        let (p, g) = (self.ends.group(0), self.ends.gradient(0));
        let (table, positions) = (self.table(side), &self.end_tensors[2 + side]);
        TokenEmbedding {
            width: self.setup.dims.width,
            per_sample,
            tokens: l.ints(Category::Head, shape.samples.saturating_mul(per_sample)),
            wte: table.of(p),
            wpe: positions.of(p),
            dwte: table.of(g),
            dwpe: positions.of(g),
            dropout: self.setup.dims.dropout[0],
        }
    }

    fn table(&self, side: usize) -> &Tensor {
        let own = side == 1 && !self.setup.dims.shared;
        &self.end_tensors[usize::from(own)]
    }

    /// The norm behind the encoder.
    pub(super) fn output(&self, context: Context) -> EncoderOutput {
        let pair = |group: Reals| [self.end_tensors[4].of(group), self.end_tensors[5].of(group)];
        EncoderOutput {
            eps: self.setup.dims.eps,
            norm: pair(self.ends.group(0)),
            grads: pair(self.ends.gradient(0)),
            context,
            stats: Reals::EMPTY,
        }
    }

    /// The head, without room for logits and losses.
    pub(super) fn head(&self) -> LmHead {
        let (d, p, g) = (&self.setup.dims, self.ends.group(0), self.ends.gradient(0));
        let [norm, norm_bias, table] = [&self.end_tensors[6], &self.end_tensors[7], self.table(1)];
        LmHead {
            width: d.width,
            per_sample: 1,
            vocab: d.vocab[1],
            eps: d.eps,
            norm: norm.of(p),
            norm_bias: norm_bias.of(p),
            weight: table.of(p),
            grads: [norm.of(g), norm_bias.of(g), table.of(g)],
            targets: Ints::EMPTY,
            losses: Reals::EMPTY,
            logits: Reals::EMPTY,
            scale: 1.0,
            smoothing: 0.0,
        }
    }

    /// The setup.
    pub const fn setup(&self) -> &Setup {
        &self.setup
    }

    /// All parameter tensors, in the order of the file.
    pub fn tensors(&self) -> Vec<Named> {
        let mut list: Vec<Named> = Vec::new();
        let mut push = |prefix: &str,
                        params: &Params,
                        group: usize,
                        tensors: &[Tensor],
                        name_of: fn(&str) -> &str| {
            for t in tensors.iter().filter(|t| !t.is_empty()) {
                let linear = t.matrix
                    && !t.name.ends_with("positions")
                    && !t.name.ends_with("embedding.weight");
                let (rows, cols) = if linear { (t.cols, t.rows) } else { (t.rows, t.cols) };
                let piece = Piece {
                    values: t.of(params.group(group)),
                    gradient: t.of(params.gradient(group)),
                    state: params.state(group, t),
                    transposed: linear.then_some([t.rows, t.cols]),
                };
                let name = format!("{prefix}{}", name_of(t.name));
                match list.last_mut().filter(|last| last.name == name) {
                    // Queries, keys and values of cross-attention are one tensor in the file.
                    Some(last) => {
                        last.shape[0] += if t.matrix { rows } else { cols };
                        last.pieces.push(piece);
                    }
                    None => {
                        let shape = if t.matrix { vec![rows, cols] } else { vec![cols] };
                        list.push(Named { name, shape, pieces: vec![piece] });
                    }
                }
            }
        };
        let same: fn(&str) -> &str = |name| name;
        push("", &self.ends, 0, &self.end_tensors[..4], same);
        for k in 0..self.setup.dims.layers[0] {
            push(
                &format!("encoder.layers.{k}."),
                &self.encoder.params,
                k,
                self.encoder.tensors(),
                encoder_name,
            );
        }
        push("", &self.ends, 0, &self.end_tensors[4..6], same);
        let own = self.decoder.own.tensors();
        // Pieces of one tensor have to meet: those of cross-attention by name, not by place.
        let c = self.decoder.tensors();
        let cross = [c[0], c[1], c[2], c[4], c[3], c[5], c[6], c[7]];
        for k in 0..self.setup.dims.layers[1] {
            let prefix = format!("decoder.layers.{k}.");
            push(&prefix, &self.decoder.own.params, k, own, decoder_name);
            push(&prefix, &self.decoder.cross, k, &cross, decoder_name);
        }
        push("", &self.ends, 0, &self.end_tensors[6..], same);
        list
    }

    /// All tensors of a checkpoint, in order: the parameters, then the optimizer's state.
    pub fn saved(&self) -> Vec<Reals> {
        let pieces: Vec<_> = self.tensors().into_iter().flat_map(|t| t.pieces).collect();
        let states = pieces.iter().flat_map(|p| p.state).filter(|s| !s.is_empty());
        pieces.iter().map(|p| p.values).chain(states).collect()
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().flat_map(|t| &t.pieces).map(|p| p.values.len()).sum()
    }

    /// Lengths of the groups of gradients that are on their way between ranks at the same time: the
    /// two of a decoder's block, the first also for an encoder's, and for as much of the rest as is
    /// worth a message.
    pub fn exchanged(&self) -> [usize; 2] {
        let [own, cross] = [self.decoder.own.params.group_len(), self.decoder.cross.group_len()];
        let rest = self.ends.group_len().min(1 << 18);
        [own.max(self.encoder.params.group_len()).max(rest), cross]
    }

    /// Linear layers: uniform in ±√(6 / (inputs + outputs)) (Glorot), each of q, k, v and so on for
    /// itself; tables and positions: normal, σ = `d^-½`; biases 0, norms 1; optimizer state 0.
    ///
    /// # Errors
    /// Those of writing.
    pub fn initialize<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        let width = self.setup.dims.width;
        let mut row_of = Vec::new();
        let named = self.tensors();
        let pieces = named.iter().flat_map(|t| t.pieces.iter().map(move |p| (t, p)));
        for (i, (t, p)) in pieces.enumerate() {
            for state in p.state {
                be.fill_reals(state, B::Real::of(0.0))?;
            }
            let stream = |row: usize| Stream::new(seed, i as u32, row as u32, 0, 0, Draw::Init);
            match p.transposed {
                Some([rows, cols]) => {
                    // q, k and v are three layers side by side.
                    let outputs = if cols.is_multiple_of(width) && t.name.contains("attn") {
                        width
                    } else {
                        cols
                    };
                    let bound = (6.0 / (rows + outputs) as f64).sqrt();
                    for row in 0..rows {
                        let s = stream(row);
                        row_of.clear();
                        row_of.extend(
                            (0..cols as u32)
                                .map(|e| B::Real::of(bound * (2.0 * s.uniform(e) - 1.0))),
                        );
                        be.write_reals(p.values.sub(row * cols, cols), &row_of)?;
                    }
                }
                None if t.shape.len() == 2 => {
                    let sigma = 1.0 / (width as f64).sqrt();
                    for row in 0..p.values.len() / width {
                        let s = stream(row);
                        row_of.clear();
                        row_of.extend((0..width as u32).map(|e| B::Real::of(sigma * s.normal(e))));
                        be.write_reals(p.values.sub(row * width, width), &row_of)?;
                    }
                }
                None => be.fill_reals(
                    p.values,
                    B::Real::of(f64::from(u8::from(t.name.ends_with("weight")))),
                )?,
            }
        }
        Ok(())
    }

    /// Makes the staging buffer for batches of these shapes, so that a step allocates nothing that
    /// grows.
    pub fn prepare(&mut self, shapes: &[Shape]) {
        let most = shapes.iter().map(|s| s.samples * s.source.max(s.target)).max().unwrap_or(0);
        self.staging.reserve_exact(most);
    }

    /// The shape of a batch, with `chunk` samples at a time inside a block.
    pub fn shape_of(batch: &[&Tokens], chunk: usize) -> Shape {
        let longest =
            |side: fn(&Tokens) -> usize| batch.iter().map(|t| side(t) + 1).max().unwrap_or(1);
        Shape {
            samples: batch.len(),
            source: longest(|t| t.source.len()),
            target: longest(|t| t.target.len()),
            chunk,
        }
    }

    /// Writes a batch: sources and their ends; targets behind a mark of the beginning, and before
    /// one of the end.
    fn put<B: Backend>(&mut self, be: &mut B, part: &Part, batch: &[&Tokens]) -> Result<usize> {
        let Shape { source, target, .. } = part.shape;
        let staging = &mut self.staging;
        let mut write = |be: &mut B,
                         to: Ints,
                         width: usize,
                         fill: i32,
                         row: &dyn Fn(&Tokens, &mut Vec<i32>)| {
            staging.clear();
            for (i, t) in batch.iter().enumerate() {
                row(t, staging);
                staging.resize((i + 1) * width, fill);
            }
            be.write_ints(to.sub(0, staging.len()), staging)
        };
        write(be, part.inputs[0].tokens, source, PAD, &|t, row| {
            row.extend_from_slice(&t.source);
            row.push(END);
        })?;
        write(be, part.inputs[1].tokens, target, PAD, &|t, row| {
            row.push(BEGIN);
            row.extend_from_slice(&t.target);
        })?;
        write(be, part.head.targets, target, -1, &|t, row| {
            row.extend_from_slice(&t.target);
            row.push(END);
        })?;
        write(be, part.lens[0], 1, 0, &|t, row| row.push(t.source.len() as i32 + 1))?;
        write(be, part.lens[1], 1, 0, &|t, row| row.push(t.target.len() as i32 + 1))?;
        Ok(batch.iter().map(|t| t.target.len() + 1).sum())
    }

    /// One optimizer step on a batch, with `chunk` samples at a time inside a block. Of several
    /// ranks each computes its part of the batch; the outcome is that of all.
    ///
    /// # Errors
    /// [`Error::Fault`] when the numbers went wrong; parameters are then as the fault says.
    pub fn train<B: Backend>(
        &mut self,
        be: &mut B,
        step: &Step,
        batch: &[&Tokens],
        chunk: usize,
    ) -> Result<Outcome> {
        let (rank, ranks, n) = (be.rank(), be.ranks(), batch.len());
        let first = rank * n / ranks;
        let own = &batch[first..(rank + 1) * n / ranks];
        // As long as the whole batch: places in random streams do not depend on who computes.
        let shape = Shape { samples: own.len().max(1), ..Self::shape_of(batch, chunk) };
        let mut part = self.part::<B>(&shape)?.0;
        if own.is_empty() {
            // A small batch: what this rank computes does not count.
            return self.train_samples(be, &mut part, step, &batch[..1], (0, false));
        }
        self.train_samples(be, &mut part, step, own, (first, true))
    }

    /// The same with a part of one's own, whose gradients and losses can be looked at afterwards.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn train_part<B: Backend>(
        &mut self,
        be: &mut B,
        part: &mut Part,
        step: &Step,
        batch: &[&Tokens],
    ) -> Result<Outcome> {
        self.train_samples(be, part, step, batch, (0, true))
    }

    /// A step on this rank's samples: the index of the first in the whole batch, and whether they
    /// count.
    fn train_samples<B: Backend>(
        &mut self,
        be: &mut B,
        part: &mut Part,
        step: &Step,
        batch: &[&Tokens],
        (first, counts): (usize, bool),
    ) -> Result<Outcome> {
        let Some(rule) = self.setup.rule else {
            return Err(setting("optimizer", f64::NAN, "one, to train"));
        };
        let fused = self.setup.fused;
        if fused && step.clip > 0.0 {
            return Err(setting("clip", step.clip, "0, or full gradient buffers (fused = false)"));
        }
        // A fault that an abandoned step left behind is not this one's.
        be.clear_fault()?;
        let updater = Updater {
            rule,
            weight_decay: step.weight_decay,
            lr: step.lr,
            t: step.step + 1,
            scale: 1.0,
            fused,
        };
        (part.encoder.updater, part.decoder.own.updater) = (updater, updater);
        for params in
            [&self.encoder.params, &self.decoder.own.params, &self.decoder.cross, &self.ends]
        {
            params.zero_gradients(be)?;
        }
        let mut own = [self.put(be, part, batch)? as f64, 0.0, 0.0, 0.0];
        own[1] = own[0] + batch.iter().map(|t| t.source.len() + 1).sum::<usize>() as f64;
        if !counts {
            let masked = vec![-1; part.head.targets.len()];
            be.write_ints(part.head.targets, &masked)?;
            own = [0.0; 4];
        }
        let (mut targets, mut tokens) = (0.0_f64, 0.0);
        be.gather(own, &mut |[n, all, ..]| (targets, tokens) = (targets + n, tokens + all))?;
        part.head.scale = 1.0 / targets.max(1.0);

        let pass = Pass { seed: step.seed, step: step.step, global: first as u32 };
        let ([encoder, decoder], [source, target]) = (&mut part.stacks, &mut part.inputs);
        encoder.embed(be, source, &pass)?;
        encoder.forward(be, &mut part.encoder, &pass)?;
        part.output.forward(be, encoder)?;
        decoder.train(be, &mut part.decoder, target, &mut part.head, &pass)?;
        // In the order in which blocks send them.
        self.decoder.cross.settle(be, &updater, Site::Block(0), self.decoder.tensors())?;
        self.decoder.own.params.settle(be, &updater, Site::Block(0), self.decoder.own.tensors())?;
        part.output.vjp(be, encoder)?;
        encoder.backward(be, &mut part.encoder, &pass)?;
        encoder.embed_vjp(be, source, &pass)?;
        self.encoder.params.settle(be, &updater, Site::Block(0), self.encoder.tensors())?;

        let mismatches = encoder.mismatches(be)? + decoder.mismatches(be)?;
        let rebuild_error = encoder.rebuild_error().max(decoder.rebuild_error());
        let (loss, grad_norm) = self.update(be, part.head.losses, &updater, step.clip)?;
        let mut outcome = Outcome {
            loss: 0.0,
            tokens: tokens as usize,
            grad_norm,
            mismatches: 0,
            rebuild_error: 0.0,
        };
        be.gather([loss, mismatches as f64, rebuild_error, 0.0], &mut |[
            loss,
            mismatches,
            error,
            _,
        ]| {
            outcome.loss += loss;
            outcome.mismatches += mismatches as u64;
            outcome.rebuild_error = outcome.rebuild_error.max(error);
        })?;
        outcome.loss /= targets.max(1.0);
        Ok(outcome)
    }

    /// Updates what the stacks left: the ends, and with full gradient buffers everything. The sum
    /// of the losses and the norm of the gradients.
    fn update<B: Backend>(
        &self,
        be: &mut B,
        losses: Reals,
        updater: &Updater,
        clip: f64,
    ) -> Result<(f64, f64)> {
        let groups: [(&Params, usize, &[Tensor]); 3] = [
            (&self.encoder.params, self.setup.dims.layers[0], self.encoder.tensors()),
            (&self.decoder.own.params, self.setup.dims.layers[1], self.decoder.own.tensors()),
            (&self.decoder.cross, self.setup.dims.layers[1], self.decoder.tensors()),
        ];
        let all = || {
            groups
                .into_iter()
                .filter(|_| !updater.fused)
                .flat_map(|(p, n, t)| (0..n).map(move |k| (p, k, t)))
        };
        let [piece, _] = self.exchanged();
        self.ends.sum_over_ranks(be, piece)?;
        for (params, k, tensors) in all() {
            params.measure(be, Site::Block(k), k, tensors)?;
        }
        self.ends.measure(be, Site::Embedding, 0, &self.end_tensors)?;
        // What was measured cannot go wrong in the update, so the host waits once: for the norm
        // that clipping needs, or when the step is done.
        let early = if updater.fused { None } else { Some(self.result(be, losses)?) };
        let updater =
            Updater { scale: early.map_or(1.0, |(_, norm)| clip_scale(norm, clip)), ..*updater };
        for (params, k, tensors) in all() {
            params.update(be, &updater, k, tensors)?;
        }
        self.ends.update(be, &updater, 0, &self.end_tensors)?;
        early.map_or_else(|| self.result(be, losses), Ok)
    }

    /// What a step reads: the sum of its losses and the norm of its gradients.
    fn result<B: Backend>(&self, be: &mut B, losses: Reals) -> Result<(f64, f64)> {
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        let mut squares = 0.0;
        for params in
            [&self.encoder.params, &self.decoder.own.params, &self.decoder.cross, &self.ends]
        {
            squares += sum(be, params.norms)?;
        }
        Ok((sum(be, losses)?, squares.sqrt()))
    }

    /// The sum of the losses of a batch, without smoothing, and the number of tokens that it is of.
    /// `each` sees the result of every chunk: its first sample, and the head's input `[samples, T,
    /// d]`.
    ///
    /// # Errors
    /// [`Error::Fault`] for values that are not finite or tokens that do not exist; what `each`
    /// returns.
    pub fn evaluate<B: Backend>(
        &mut self,
        be: &mut B,
        batch: &[&Tokens],
        chunk: usize,
        inference: Inference,
        mut each: impl FnMut(&mut B, &Part, usize, Reals) -> Result<()>,
    ) -> Result<(f64, usize)> {
        be.clear_fault()?;
        let shape = Self::shape_of(batch, chunk);
        let mut part = self.part::<B>(&shape)?.0;
        let (mut loss, mut tokens) = (0.0, 0);
        for first in (0..batch.len()).step_by(part.shape.chunk) {
            let samples = part.shape.chunk.min(batch.len() - first);
            tokens += self.put(be, &part, &batch[first..first + samples])?;
            let [encoder, decoder] = &part.stacks;
            let x = infer(be, encoder, &mut part.encoder, &mut part.inputs[0], samples, inference)?;
            let context = part.output.context.value.sub(0, x.len());
            part.output.normalize(
                be,
                x,
                context,
                part.output.stats.sub(0, 2 * x.len() / self.setup.dims.width),
            )?;
            let x = infer(be, decoder, &mut part.decoder, &mut part.inputs[1], samples, inference)?;
            each(be, &part, first, x)?;
            let chunk = Chunk {
                seed: 0,
                step: 0,
                stack: 1,
                site: Site::Head,
                first: 0,
                samples,
                global: 0,
                frame: 0,
            };
            part.head.loss(be, &chunk, x, decoder.scratch())?;
            loss += sum(be, part.head.losses.sub(0, samples * part.shape.target))?;
        }
        match be.take_fault()? {
            Some(fault) => Err(fault.into()),
            None => Ok((loss, tokens)),
        }
    }
}

impl Part {
    /// Scratch, free between calls.
    pub const fn scratch(&self) -> Reals {
        self.stacks[1].scratch()
    }
}

/// A stack's result for some samples.
pub(super) fn infer<B: Backend>(
    be: &mut B,
    stack: &Stack,
    blocks: &mut impl bdia_core::stack::Blocks<B>,
    input: &mut TokenEmbedding,
    samples: usize,
    inference: Inference,
) -> Result<Reals> {
    // The tokens of a whole batch are taken in pieces of `samples`, which come first.
    let zero = Gamma::new(0.0, Sign::Plus)?;
    match inference {
        Inference::Float => stack.infer(be, blocks, input, samples, zero),
        Inference::Quantized(_) => stack.infer_quantized(be, blocks, input, samples, zero),
    }
}

/// The sum of some values, from the first to the last in `f64`, piece by piece through the stack.
pub(super) fn sum<B: Backend>(be: &B, values: Reals) -> Result<f64> {
    let (mut total, mut piece) = (0.0, [B::Real::of(0.0); 256]);
    for at in (0..values.len()).step_by(piece.len()) {
        let piece = &mut piece[..256.min(values.len() - at)];
        be.read_reals(values.sub(at, piece.len()), piece)?;
        total = piece.iter().fold(total, |t, x| t + x.wide());
    }
    Ok(total)
}

pub(super) fn setting(what: &'static str, found: f64, possible: &'static str) -> Error {
    Error::Setting { what, found, possible }
}

/// The names that files have for tensors of an encoder's blocks.
fn encoder_name(name: &str) -> &str {
    match name {
        "ln_1.weight" => "norm1.weight",
        "ln_1.bias" => "norm1.bias",
        "attn.c_attn.weight" => "self_attn.in_proj_weight",
        "attn.c_attn.bias" => "self_attn.in_proj_bias",
        "attn.c_proj.weight" => "self_attn.out_proj.weight",
        "attn.c_proj.bias" => "self_attn.out_proj.bias",
        "ln_2.weight" => "norm2.weight",
        "ln_2.bias" => "norm2.bias",
        "mlp.c_fc.weight" => "linear1.weight",
        "mlp.c_fc.bias" => "linear1.bias",
        "mlp.c_proj.weight" => "linear2.weight",
        "mlp.c_proj.bias" => "linear2.bias",
        other => other,
    }
}

/// Those of a decoder's blocks, where cross-attention is in between.
fn decoder_name(name: &str) -> &str {
    match name {
        "ln_2.weight" => "norm3.weight",
        "ln_2.bias" => "norm3.bias",
        "ln_cross.weight" => "norm2.weight",
        "ln_cross.bias" => "norm2.bias",
        "cross.q.weight" | "cross.kv.weight" => "multihead_attn.in_proj_weight",
        "cross.q.bias" | "cross.kv.bias" => "multihead_attn.in_proj_bias",
        "cross.c_proj.weight" => "multihead_attn.out_proj.weight",
        "cross.c_proj.bias" => "multihead_attn.out_proj.bias",
        other => encoder_name(other),
    }
}

/// The tensors outside the blocks, and the length of their group.
fn end_tensors(d: &Dims) -> ([Tensor; ENDS], usize) {
    let t = |name, rows, cols, matrix| Tensor { name, rows, cols, matrix, offset: 0 };
    let first = if d.shared { "embedding.weight" } else { "source_embedding.weight" };
    let mut tensors = [
        t(first, d.vocab[0], d.width, true),
        t("target_embedding.weight", if d.shared { 0 } else { d.vocab[1] }, d.width, true),
        t("source_positions", d.longest, d.width, true),
        t("target_positions", d.longest, d.width, true),
        t("encoder.norm.weight", 1, d.width, false),
        t("encoder.norm.bias", 1, d.width, false),
        t("decoder.norm.weight", 1, d.width, false),
        t("decoder.norm.bias", 1, d.width, false),
    ];
    let len = place(&mut tensors);
    (tensors, len)
}
