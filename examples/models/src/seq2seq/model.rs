//! The encoder-decoder transformer (Vaswani et al., 2017; pre-norm, learned positions) assembled
//! from the layers and the stack of `bdia-core`: where every buffer is, and one optimizer step.
//!
//! # One step, traced
//! `n` samples; `S` source and `T` target positions, both with the mark of the end; width `d`; `K`
//! and `L` blocks.
//!
//! ```text
//! encoder.embed, forward   X_0 … X_K on the grid, K-1 planes of side bits; two are kept
//! output.forward           memory = norm(x_K), [n, S, d]; its gradient = 0
//! decoder.train            embed, forward, turn (head and loss), backward, embed_vjp: every block
//!                          reads the memory, and adds to its gradient; updated as it is finished
//! output.vjp               x_K again from X_K; ∂L/∂x_K from the memory's gradient
//! encoder.backward         all K blocks are recomputed, rebuilt and updated, down to X_0
//! encoder.embed_vjp        then tables, positions and norms are updated
//! ```
//!
//! # Memory
//! | what | size |
//! |---|---|
//! | encoder: `X_K`, `X_{K−1}`, side bits | `2·n·S·d` integers, `(K−1)·n·S·d` bits |
//! | decoder: `X_{L−1}`, `X_{L−2}`, side bits | `2·n·T·d` integers, `(L−2)·n·T·d` bits |
//! | memory and its gradient | `2·n·S·d` reals |
//! | `G` pair and workspace of one chunk | once: the decoder is done before the encoder goes back |
//!
//! Nothing grows with the number of blocks but side bits and checksums. Batches have other `n`, `S`
//! and `T` from step to step: a [`Part`] lays the same arenas out for one [`Shape`], behind the
//! parameters, and the plan covers the largest of them. Translating ([`super::decode`]) uses the
//! same memory.

use bdia_core::Real;
use bdia_core::arena::{Category, Ints, Layout, Reals, product};
use bdia_core::backend::{Backend, Gelu, Mask};
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::{
    BlockShape, Decoder, EncoderOutput, Gradients, Init, LmHead, Norm, Parameter, Params, PreNorm,
    Room, Scheme, Tensor, TokenEmbedding,
};
use bdia_core::network::{
    self, Group, Loaded, Micro, Network, Outcome, Owner, Rebuilt, Step, exchanged, sum,
};
use bdia_core::stack::{
    Config as StackConfig, Context, LastStep, Mode, Pass, Stack, Tail, Workspace,
};

use super::vocab::{BEGIN, END, PAD};
use crate::inference::{Inference, at_head};
use crate::named::{self, Adapters, Named, Saved};

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
    /// How both stacks keep activations.
    pub mode: Mode,
    /// How gradients are kept, and the optimizer.
    pub gradients: Gradients,
    /// Blocks that each stack steps over at once ([`Residual::step_over`]).
    ///
    /// [`Residual::step_over`]: bdia_core::layers::Residual::step_over
    pub blocks_per_step: usize,
    /// Adapters of self-attention, where those are trained.
    pub adapters: Option<Adapters>,
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

/// Parameter tensors outside the blocks: tables (2), positions (2), norms of encoder (2) and
/// decoder (2).
const ENDS: usize = 8;

/// What the last activations of encoder and decoder are for.
const TAILS: [Tail; 2] = [Tail::Output, Tail::Head];

/// The arenas behind the parameters, laid out for batches of one shape.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    shape: Shape,
    stacks: [Stack; 2],
    encoder: PreNorm,
    decoder: Decoder,
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
    pub(super) encoder: PreNorm,
    /// Blocks of the decoder.
    pub(super) decoder: Decoder,
    ends: Params,
    outside: [Tensor; ENDS],
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
            return Err(Error::setting(
                "longest sentence",
                d.longest as f64,
                "2 positions or more",
            ));
        }
        if d.shared && d.vocab[0] != d.vocab[1] {
            return Err(Error::setting(
                "vocabulary",
                d.vocab[1] as f64,
                "one for both languages, to share a table",
            ));
        }
        if d.vocab.iter().any(|&v| v <= END as usize) {
            return Err(Error::setting(
                "vocabulary",
                d.vocab[0].min(d.vocab[1]) as f64,
                "4 entries or more",
            ));
        }
        if !(0.0..1.0).contains(&d.dropout[0]) {
            return Err(Error::setting(
                "embedding dropout",
                d.dropout[0],
                "0 up to, not including, 1",
            ));
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
            init: Scheme::Glorot,
        };
        product("parameters", &[d.vocab[0].max(d.vocab[1]).max(d.longest), d.width])?;
        let ((lora, freeze), n) = (Adapters::of_blocks(setup.adapters), setup.blocks_per_step);
        let gradients = setup.gradients.of_steps(n);
        let of = [shape(Mask::Full), shape(Mask::Causal)];
        let encoder = PreNorm::layout(&of[0], d.layers[0], lora, freeze, gradients, l)?;
        let encoder = encoder.step_over(n)?;
        let (longest, layers) = (d.longest, d.layers[1]);
        let decoder = Decoder::layout_frozen(&of[1], longest, layers, lora, freeze, gradients, l)?;
        let decoder = decoder.step_over(n)?;
        let (mut outside, freeze) = (outside(d), Adapters::of_ends(setup.adapters));
        let room = Room::NONE.place(&mut outside, freeze);
        let ends = Params::layout(1, room, freeze, gradients.full(), l)?;
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
            outside,
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
                blocks: if id == 0 { encoder.steps() } else { decoder.steps() },
                chunk,
                tail,
                needs,
                ends_scratch,
            })
        };
        let needs = [encoder.needs::<B>(chunk, s.threads), decoder.needs::<B>(chunk, s.threads)];
        let at_head = LmHead::scratch(d.width, shape.target, chunk);
        let configs = [
            (config(0, shape.source, needs[0], TAILS[0], 0)?, s.mode),
            (config(1, shape.target, needs[1], TAILS[1], at_head)?, s.mode),
        ];
        let workspace = Workspace::layout(&configs, l)?;
        let mut stacks = [
            Stack::layout_in(&configs[0].0, &s.mode, &workspace, l)?,
            Stack::layout_in(&configs[1].0, &s.mode, &workspace, l)?,
        ];
        let lens = [0; 2].map(|_| l.ints(Category::Head, shape.samples));
        encoder.branches.0.key_lens = lens[0];
        (decoder.branches.0.key_lens, decoder.branches.1.context_lens) = (lens[1], lens[0]);
        let inputs = [self.embedding(0, shape, l), self.embedding(1, shape, l)];
        let rows = product("memory", &[shape.samples, shape.source])?;
        let mut memory = |per: usize| {
            Ok::<_, Error>(l.reals(Category::Activations, product("memory", &[rows, per])?))
        };
        let context = Context { value: memory(d.width)?, grad: memory(d.width)? };
        let output = EncoderOutput { stats: memory(2)?, ..self.output(context) };
        stacks[1].set_context(context);
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
        TokenEmbedding {
            width: self.setup.dims.width,
            per_sample,
            tokens: l.ints(Category::Head, shape.samples.saturating_mul(per_sample)),
            packed: None,
            wte: self.table(side),
            wpe: self.end(2 + side),
            scale: 1.0,
            dropout: self.setup.dims.dropout[0],
        }
    }

    /// Tensor `i` outside the blocks.
    fn end(&self, i: usize) -> Parameter {
        self.ends.parameter(0, &self.outside[i])
    }

    fn table(&self, side: usize) -> Parameter {
        let own = side == 1 && !self.setup.dims.shared;
        self.end(usize::from(own))
    }

    /// The norm behind the encoder.
    pub(crate) fn output(&self, context: Context) -> EncoderOutput {
        let norm = [self.end(4), self.end(5)];
        EncoderOutput { eps: self.setup.dims.eps, norm, context, stats: Reals::EMPTY }
    }

    /// The head, without room for logits and losses.
    pub(crate) fn head(&self) -> LmHead {
        let d = &self.setup.dims;
        LmHead {
            width: d.width,
            per_sample: 1,
            vocab: d.vocab[1],
            norm: Norm::Layer { eps: d.eps, weight: self.end(6), bias: self.end(7) },
            weight: self.table(1),
            packed: None,
            targets: Ints::EMPTY,
            losses: Reals::EMPTY,
            micro_batch: 0,
            logits: Reals::EMPTY,
            scale: 1.0,
            smoothing: 0.0,
        }
    }

    /// The setup.
    pub const fn setup(&self) -> &Setup {
        &self.setup
    }

    /// All parameter tensors, in the order of the file: tables and positions, encoder, its norm,
    /// decoder, its norm; adapters in their blocks.
    pub(super) fn all(&self) -> Vec<Named> {
        let end = |range: core::ops::Range<usize>| {
            let tensors = self.outside[range].iter().filter(|t| !t.is_empty());
            tensors.map(|t| Named::new(t.name.into(), &self.ends, 0, t, &self.outside))
        };
        let encoder = (0..self.setup.dims.layers[0]).flat_map(|k| {
            named::of_block(&self.encoder, k).into_iter().map(move |(params, k, t)| {
                let name = format!("encoder.layers.{k}.{}", encoder_name(t.name));
                Named::new(name, params, k, &t, &self.encoder).transposed()
            })
        });
        let decoder = (0..self.setup.dims.layers[1]).flat_map(|k| {
            let mut list: Vec<_> = (named::of_block(&self.decoder, k).into_iter())
                .map(|(params, k, t)| {
                    let name = format!("decoder.layers.{k}.{}", decoder_name(t.name));
                    Named::new(name, params, k, &t, &self.decoder).transposed()
                })
                .collect();
            // Parts of one tensor have to meet: weights of cross-attention before its biases.
            let cross = list.iter().position(|t| t.tensor.name == "cross.q.bias");
            if let Some(at) = cross {
                list.swap(at, at + 1);
            }
            list
        });
        end(0..4).chain(encoder).chain(end(4..6)).chain(decoder).chain(end(6..8)).collect()
    }

    /// All tensors of the model, in the order of the file; adapters are not among them. Names are
    /// those of `torch.nn.Transformer(norm_first=True, activation="gelu")` for blocks and norms.
    pub fn tensors(&self) -> Vec<Named> {
        self.all().into_iter().filter(|t| !t.is_adapter()).collect()
    }

    /// The tensors that are trained: all, or the adapters.
    pub fn trained(&self) -> Vec<Named> {
        self.all().into_iter().filter(Named::is_trained).collect()
    }

    /// All tensors of a checkpoint, in order: the parameters, then the optimizer's state.
    pub fn saved(&self) -> Vec<Saved> {
        named::saved(&self.trained())
    }

    /// What becomes of the last step of encoder and decoder, in mode `bdia`.
    pub fn last_steps(&self) -> [Option<LastStep>; 2] {
        let last = |i: usize, steps| self.setup.mode.last_step(TAILS[i], steps);
        [last(0, self.encoder.steps()), last(1, self.decoder.steps())]
    }

    /// Number of the model's parameters, without adapters.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(Named::len).sum()
    }

    /// Length of the longest group of gradients that is on its way between ranks at a time.
    pub fn exchanged(&self) -> usize {
        let groups = |each: &mut dyn FnMut(&Group<'_>) -> Result<()>| self.groups(each);
        exchanged(groups)
    }

    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        let of = Owner::Blocks;
        each(&Group { params: &self.encoder.params, tensors: &self.encoder, of })?;
        each(&Group { params: &self.decoder.params, tensors: &self.decoder, of })?;
        let of = Owner::Ends(Site::Embedding);
        each(&Group { params: &self.ends, tensors: &self.outside, of })
    }

    /// Initial values: linear layers by Glorot, each of q, k, v and so on for itself; tables and
    /// positions: normal, σ = `d^-½`; biases 0, norms 1; optimizer state 0.
    ///
    /// # Errors
    /// Those of writing.
    pub fn initialize<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        named::initialize(be, &self.all(), seed, self.setup.threads)
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

    /// One optimizer step on some batches, whose gradients add up, with `chunk` samples at a time
    /// inside a block. Of several ranks each computes its part of every batch; the outcome is that
    /// of all.
    ///
    /// # Errors
    /// Those of [`network::step`].
    pub fn train<B: Backend>(
        &mut self,
        be: &mut B,
        step: &Step,
        batches: &[(&[&Tokens], usize)],
    ) -> Result<Outcome> {
        let (rank, ranks) = (be.rank(), be.ranks());
        let mut before = 0;
        let mut net =
            Training { model: self, part: None, micro_batches: batches.len(), losses: 0.0 };
        network::step(&mut net, be, step, |net, be, i| {
            let (batch, chunk) = batches[i];
            before = if i == 0 { 0 } else { before };
            let (begin, end) = (rank * batch.len() / ranks, (rank + 1) * batch.len() / ranks);
            // As long as the whole batch: places in random streams do not depend on the ranks.
            let samples = (end - begin).max(1);
            let shape = Shape { samples, ..Self::shape_of(batch, chunk) };
            let part = net.model.part::<B>(&shape)?.0;
            // Of a small batch: what this rank computes does not count.
            let counts = end > begin;
            let own = if counts { &batch[begin..end] } else { &batch[..1] };
            let loaded = net.load(be, &part, own, (before + begin) as u32, counts)?;
            before += batch.len();
            net.part = Some(part);
            Ok(loaded)
        })
    }

    /// One optimizer step with a part of one's own, whose gradients and losses can be looked at
    /// afterwards.
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
        let mut net = Training { model: self, part: Some(*part), micro_batches: 1, losses: 0.0 };
        let outcome = network::step(&mut net, be, step, |net, be, _| {
            let part = net.part()?;
            net.load(be, &part, batch, 0, true)
        });
        if let Some(used) = net.part {
            *part = used;
        }
        outcome
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
            let ([encoder, decoder], [source, target]) = (&part.stacks, &mut part.inputs);
            let x = inference.run(be, encoder, &mut part.encoder, source, samples)?;
            let context = part.output.context.value.sub(0, x.len());
            let stats = part.output.stats.sub(0, 2 * x.len() / self.setup.dims.width);
            part.output.normalize(be, x, context, stats)?;
            let x = inference.run(be, decoder, &mut part.decoder, target, samples)?;
            each(be, &part, first, x)?;
            part.head.loss(be, &at_head(1, samples), x, part.scratch())?;
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

/// A translator in a step.
struct Training<'a> {
    model: &'a mut Translator,
    part: Option<Part>,
    micro_batches: usize,
    /// Of the micro-batches before the last.
    losses: f64,
}

impl Training<'_> {
    fn part(&self) -> Result<Part> {
        self.part.ok_or(Error::unfit("batch", "missing", "one, to train on"))
    }

    /// Writes a batch whose first sample has this index in the step.
    fn load<B: Backend>(
        &mut self,
        be: &mut B,
        part: &Part,
        batch: &[&Tokens],
        first: u32,
        counts: bool,
    ) -> Result<Loaded> {
        let targets = self.model.put(be, part, batch)?;
        let sources: usize = batch.iter().map(|t| t.source.len() + 1).sum();
        if !counts {
            let masked = vec![-1; part.head.targets.len()];
            be.write_ints(part.head.targets, &masked)?;
            return Ok(Loaded { first, targets: 0, items: 0 });
        }
        Ok(Loaded { first, targets, items: targets + sources })
    }
}

impl<B: Backend> Network<B> for Training<'_> {
    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        self.model.groups(each)
    }

    fn trained(&self) -> usize {
        self.model.base.trained()
    }

    fn micro_batches(&self) -> usize {
        self.micro_batches
    }

    fn pass(&mut self, be: &mut B, pass: &Pass, micro: &Micro) -> Result<()> {
        let mut part = self.part()?;
        part.head.scale = micro.scale;
        part.encoder.begin(micro.updater, micro.last);
        part.decoder.begin(micro.updater, micro.last);
        let ([encoder, decoder], [source, target]) = (&mut part.stacks, &mut part.inputs);
        encoder.embed(be, source, pass)?;
        encoder.forward(be, &mut part.encoder, pass)?;
        part.output.forward(be, encoder)?;
        decoder.train(be, &mut part.decoder, target, &mut part.head, pass)?;
        part.output.vjp(be, encoder)?;
        encoder.backward(be, &mut part.encoder, pass)?;
        encoder.embed_vjp(be, source, pass)?;
        if micro.index == 0 {
            self.losses = 0.0;
        }
        if !micro.last {
            // The next one has another shape, and its memory here.
            self.losses += sum(be, part.head.losses)?;
        }
        self.part = Some(part);
        Ok(())
    }

    fn loss(&self, be: &B) -> Result<f64> {
        Ok(self.losses + sum(be, self.part()?.head.losses)?)
    }

    fn rebuilt(&self, be: &B) -> Result<Rebuilt> {
        let [encoder, decoder] = self.part()?.stacks;
        Ok(Rebuilt::of(be, &encoder)?.and(Rebuilt::of(be, &decoder)?))
    }
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

/// The tensors outside the blocks.
fn outside(d: &Dims) -> [Tensor; ENDS] {
    let sigma = Init::Normal(1.0 / (d.width as f64).sqrt());
    let table = |name, rows| Tensor::matrix(name, rows, d.width, sigma);
    let first = if d.shared { "embedding.weight" } else { "source_embedding.weight" };
    let [norm, norm_bias] = EncoderOutput::tensors(d.width);
    [
        table(first, d.vocab[0]),
        table("target_embedding.weight", d.vocab[1]).when(!d.shared),
        table("source_positions", d.longest),
        table("target_positions", d.longest),
        norm,
        norm_bias,
        Tensor::vector("decoder.norm.weight", d.width, Init::Ones),
        Tensor::vector("decoder.norm.bias", d.width, Init::Zeros),
    ]
}
