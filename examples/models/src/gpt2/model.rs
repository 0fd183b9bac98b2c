//! GPT-2 as a network: where every buffer is, and what one pass does.

use bdia_core::Real;
use bdia_core::arena::{Category, Ints, Layout, Reals, product};
use bdia_core::backend::{Backend, Gelu, Mask};
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::{
    BlockShape, Gradients, LmHead, Norm, Params, PreNorm, Room, Scheme, Tensor, TokenEmbedding,
};
use bdia_core::network::{
    self, Group, Loaded, Loss, Micro, Network, Outcome, Owner, Rebuilt, Step, exchanged, sum,
};
use bdia_core::plan::Choice;
use bdia_core::stack::{Config as StackConfig, Mode, Pass, Stack, Tail};
use bdia_core::update::FloatGamma;

use crate::inference::{Inference, Probe, at_head};
use crate::named::{self, Adapters, Named};
use crate::plan::Plan;

/// The architecture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Learned positions; the longest context.
    pub positions: usize,
    /// Width `d`.
    pub width: usize,
    /// Blocks `K`.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Hidden width of the MLP.
    pub inner: usize,
    /// `ε` of the norms.
    pub eps: f64,
    /// Which GELU.
    pub gelu: Gelu,
    /// The head's matrix is the embedding.
    pub tied: bool,
    /// Dropout of the embedding, of attention probabilities, of the residual branches.
    pub dropout: [f64; 3],
}

impl Dims {
    /// The shape of a block for samples of `tokens` tokens.
    pub fn block(&self, tokens: usize) -> BlockShape {
        BlockShape {
            tokens,
            width: self.width,
            heads: self.heads,
            inner: self.inner,
            eps: self.eps,
            gelu: self.gelu,
            mask: Mask::Causal,
            attention_dropout: self.dropout[1],
            residual_dropout: self.dropout[2],
            hidden_dropout: 0.0,
            qkv_bias: true,
            temperature: false,
            // Residual projections begin smaller, the more there are.
            init: Scheme::Gpt2 { projections: 0.02 / (2.0 * self.layers as f64).sqrt() },
        }
    }
}

/// How it is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Setup {
    /// The architecture.
    pub dims: Dims,
    /// Samples of a micro-batch.
    pub batch: usize,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Tokens of a sample.
    pub context: usize,
    /// How activations are kept.
    pub mode: Mode,
    /// How gradients are kept, and the optimizer.
    pub gradients: Gradients,
    /// Adapters, where those are trained.
    pub adapters: Option<Adapters>,
    /// Label smoothing.
    pub smoothing: f64,
    /// Threads of the backend.
    pub threads: usize,
    /// Bytes that the libraries below the backend allocate for themselves, at most.
    pub library: usize,
}

impl Setup {
    /// One that is not trained: of one sample of `context` tokens, without dropout.
    pub fn inference(dims: Dims, context: usize, threads: usize) -> Self {
        Self {
            dims: Dims { dropout: [0.0; 3], ..dims },
            batch: 1,
            accumulate: 1,
            context,
            mode: Mode::Standard { grid: None },
            gradients: Gradients::None,
            adapters: None,
            smoothing: 0.0,
            threads,
            library: 0,
        }
    }
}

/// Parameter tensors outside the blocks: embedding (2), norm (2), `lm_head`.
const ENDS: usize = 5;

/// A GPT-2 laid out in the arenas of a backend.
#[derive(Debug, Clone)]
pub struct Gpt2 {
    setup: Setup,
    /// The layout of what stays: parameters, gradients, optimizer state. Decoding has a layout of
    /// its own behind it.
    pub(crate) base: Layout,
    /// The stack.
    pub stack: Stack,
    /// The blocks.
    pub blocks: PreNorm,
    /// Embedding.
    pub input: TokenEmbedding,
    /// Final norm, logits and loss.
    pub head: LmHead,
    ends: Params,
    outside: [Tensor; ENDS],
    /// Tokens and targets of a batch on the host.
    staging: [Vec<i32>; 2],
}

impl Plan for Gpt2 {
    type Setup = Setup;

    fn lay_out<B: Backend>(setup: &Setup, choice: Choice) -> Result<(Self, Layout)> {
        Self::layout::<B>(setup, choice)
    }

    fn sizes(setup: &Setup) -> [usize; 2] {
        [setup.batch, setup.context]
    }

    fn exchanged(&self) -> usize {
        exchanged(|each| self.groups(each))
    }
}

impl Gpt2 {
    /// Lays a model out.
    ///
    /// # Errors
    /// A typed error for dimensions or settings that do not fit together.
    pub fn layout<B: Backend>(setup: &Setup, choice: Choice) -> Result<(Self, Layout)> {
        let (d, mut layout) = (&setup.dims, Layout::new(B::Real::BYTES));
        let l = &mut layout;
        for (what, n) in [("vocabulary", d.vocab), ("context", setup.context)] {
            if n == 0 {
                return Err(Error::setting(what, 0.0, "1 or more"));
            }
        }
        if setup.context > d.positions {
            let (what, expected) = ("context (longest)", d.positions);
            return Err(Error::Shape { what, expected, found: setup.context });
        }
        if !(0.0..1.0).contains(&d.dropout[0]) {
            let possible = "0 up to, not including, 1";
            return Err(Error::setting("embedding dropout", d.dropout[0], possible));
        }
        product("parameters", &[d.vocab.max(d.positions), d.width])?;

        let (lora, freeze) = Adapters::of_blocks(setup.adapters);
        let shape = d.block(setup.context);
        let blocks = PreNorm::layout(&shape, d.layers, lora, freeze, setup.gradients, l)?;
        let freeze = Adapters::of_ends(setup.adapters);
        let mut tensors = Self::outside(d);
        let there = if d.tied { ENDS - 1 } else { ENDS };
        let room = Room::NONE.place(&mut tensors[..there], freeze);
        let ends = Params::layout(1, room, freeze, setup.gradients.full(), l)?;
        l.outside(Category::Library, setup.library);
        let base = l.clone();

        let rows = product("tokens of a batch", &[setup.batch, setup.context])?;
        let (tokens, targets) = (l.ints(Category::Head, rows), l.ints(Category::Head, rows));
        // The staging buffers on the host.
        l.outside(Category::Head, product("tokens of a batch", &[rows, 2, size_of::<i32>()])?);
        let losses = l.reals(Category::Head, product("losses", &[rows, setup.accumulate])?);
        let logits = l.reals(Category::Head, product("logits", &[choice.head_rows, d.vocab])?);

        let chunk = choice.chunk.min(setup.batch);
        let config = StackConfig {
            id: 0,
            batch: setup.batch,
            per_sample: product("activations", &[setup.context, d.width])?,
            blocks: d.layers,
            chunk,
            tail: Tail::Head,
            needs: blocks.needs::<B>(chunk, setup.threads),
            ends_scratch: LmHead::scratch(d.width, setup.context, chunk),
        };
        let stack = Stack::layout(&config, &setup.mode, l)?;

        let [wte, wpe, norm, norm_bias, lm_head] = tensors.map(|t| ends.parameter(0, &t));
        let input = TokenEmbedding {
            width: d.width,
            per_sample: setup.context,
            tokens,
            wte,
            wpe,
            scale: 1.0,
            dropout: d.dropout[0],
        };
        let head = LmHead {
            width: d.width,
            per_sample: setup.context,
            vocab: d.vocab,
            norm: Norm::Layer { eps: d.eps, weight: norm, bias: norm_bias },
            weight: if d.tied { wte } else { lm_head },
            targets,
            losses,
            micro_batch: 0,
            logits,
            scale: 1.0,
            smoothing: setup.smoothing,
        };
        let model = Self {
            setup: *setup,
            base,
            stack,
            blocks,
            input,
            head,
            ends,
            outside: tensors,
            staging: [Vec::new(), Vec::new()],
        };
        Ok((model, layout))
    }

    const fn outside(d: &Dims) -> [Tensor; ENDS] {
        let [wte, wpe] = TokenEmbedding::tensors(d.vocab, d.positions, d.width, 0.02);
        let [norm, norm_bias, lm_head] = LmHead::tensors(d.vocab, d.width, d.tied);
        [wte, wpe, norm, norm_bias, lm_head]
    }

    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        let (params, tensors) = (&self.blocks.params, &self.blocks);
        each(&Group { params, tensors, of: Owner::Blocks })?;
        let of = Owner::Ends(Site::Embedding);
        each(&Group { params: &self.ends, tensors: &self.ends(), of })
    }

    /// The setup.
    pub const fn setup(&self) -> &Setup {
        &self.setup
    }

    fn ends(&self) -> &[Tensor] {
        &self.outside[..if self.setup.dims.tied { ENDS - 1 } else { ENDS }]
    }

    /// All tensors, in the order of the file: embedding, blocks, norm, logits.
    fn all(&self) -> Vec<Named> {
        let d = &self.setup.dims;
        let (first, last) = self.ends().split_at(2);
        let end = |t: &Tensor| Named::new(t.name.into(), &self.ends, 0, t);
        let blocks = (0..d.layers).flat_map(|k| {
            named::of_block(&self.blocks, k)
                .into_iter()
                .map(|(params, k, t)| Named::new(format!("h.{k}.{}", t.name), params, k, &t))
        });
        first.iter().map(end).chain(blocks).chain(last.iter().map(end)).collect()
    }

    /// All tensors of the model, in the order of the file; adapters are not among them. Names are
    /// Hugging Face's, without `transformer.`.
    pub fn tensors(&self) -> Vec<Named> {
        self.all().into_iter().filter(|t| !t.is_adapter()).collect()
    }

    /// The tensors that are trained: all, or the adapters (`h.N.attn.c_attn.lora_A` and `lora_B`,
    /// `[2r, d]` both).
    pub fn trained(&self) -> Vec<Named> {
        self.all().into_iter().filter(Named::is_trained).collect()
    }

    /// All tensors of a checkpoint, in order: what is trained, then the optimizer's state.
    pub fn saved(&self) -> Vec<Reals> {
        named::saved(&self.trained())
    }

    /// Number of the model's parameters, without adapters.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(Named::len).sum()
    }

    /// Adapters as PEFT begins them: `A` uniform from -1/√d to 1/√d, `B` 0, so that the model is
    /// unchanged; optimizer state 0.
    ///
    /// # Errors
    /// Those of writing.
    pub fn initialize_adapters<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        named::initialize(be, &self.trained(), seed, self.setup.threads)
    }

    /// GPT-2's initial values; optimizer state 0.
    ///
    /// # Errors
    /// Those of writing.
    pub fn initialize<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        named::initialize(be, &self.tensors(), seed, self.setup.threads)
    }

    /// One optimizer step. `fill` writes tokens and targets of micro-batch `i` (`[batch, context]`
    /// each) and may do so twice for one batch; of several ranks, this one's part of it. The
    /// outcome is that of all ranks.
    ///
    /// # Errors
    /// Those of [`network::step`]; what `fill` returns.
    pub fn train<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        step: &Step,
        mut fill: impl FnMut(usize, &mut [i32], &mut [i32]) -> core::result::Result<(), E>,
    ) -> core::result::Result<Outcome, E> {
        self.prepare();
        let (rank, ranks) = (be.rank(), be.ranks());
        network::step(self, be, step, |net, be, i| {
            let [tokens, targets] = &mut net.staging;
            fill(i, tokens, targets)?;
            be.write_ints(net.input.tokens, tokens)?;
            be.write_ints(net.head.targets, targets)?;
            Ok(Loaded {
                first: ((i * ranks + rank) * net.setup.batch) as u32,
                targets: targets.iter().filter(|&&t| t >= 0).count(),
                items: tokens.len(),
            })
        })
    }

    /// Makes the staging buffers, so that a step allocates nothing.
    pub fn prepare(&mut self) {
        let rows = self.setup.batch * self.setup.context;
        for buffer in &mut self.staging {
            buffer.resize(rows, 0);
            buffer.shrink_to_fit();
        }
    }

    /// Sum of losses and number of targets of some samples (at most a chunk, [`Stack::config`]) of
    /// `context` tokens.
    ///
    /// # Errors
    /// [`Error::Fault`] for values that are not finite or tokens outside the vocabulary.
    pub fn evaluate<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        targets: &[i32],
        inference: Inference,
    ) -> Result<(f64, usize)> {
        be.clear_fault()?;
        let samples = tokens.len() / self.setup.context;
        let n = samples * self.setup.context;
        be.write_ints(self.head.targets.sub(0, n), targets)?;
        let x = self.run(be, tokens, samples, inference)?;
        self.head.loss(be, &at_head(0, samples), x, self.stack.scratch())?;
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        let loss = sum(be, self.head.losses.sub(0, n))?;
        Ok((loss, targets.iter().filter(|&&t| t >= 0).count()))
    }

    /// Largest magnitude among activations and residuals of the standard transformer on some
    /// samples (at most a chunk): what the grid must hold.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn largest<B: Backend>(&mut self, be: &mut B, tokens: &[i32]) -> Result<f64> {
        be.write_ints(self.input.tokens.sub(0, tokens.len()), tokens)?;
        let mut probe = Probe { blocks: &mut self.blocks, largest: 0.0 };
        let samples = tokens.len() / self.setup.context;
        self.stack.infer(be, &mut probe, &mut self.input, samples, FloatGamma::ZERO)?;
        Ok(probe.largest)
    }

    fn run<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        samples: usize,
        inference: Inference,
    ) -> Result<Reals> {
        be.write_ints(self.input.tokens.sub(0, tokens.len()), tokens)?;
        inference.run(be, &self.stack, &mut self.blocks, &mut self.input, samples)
    }

    /// Logits of the tokens at `positions` of one sample; `tokens` may be shorter than the context.
    ///
    /// # Errors
    /// [`Error::Fault`] for values that are not finite or tokens outside the vocabulary.
    pub fn logits<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        positions: core::ops::Range<usize>,
        inference: Inference,
    ) -> Result<Vec<B::Real>> {
        let expected = self.setup.context;
        if tokens.is_empty() || tokens.len() > expected || positions.end > tokens.len() {
            let (what, found) = ("tokens (at most)", tokens.len());
            return Err(Error::Shape { what, expected, found });
        }
        // Attention is causal: what follows the last token changes nothing before it.
        let mut padded = tokens.to_vec();
        padded.resize(self.setup.context, 0);
        let (d, vocab) = (self.setup.dims.width, self.setup.dims.vocab);
        let x = self.run(be, &padded, 1, inference)?;
        let at_once = (self.head.logits.len() / vocab).max(1);
        let mut all = vec![B::Real::of(0.0); positions.len() * vocab];
        for (i, out) in all.chunks_mut(at_once * vocab).enumerate() {
            let (first, rows) = (positions.start + i * at_once, out.len() / vocab);
            let x = x.sub(first * d, rows * d);
            let logits = self.head.logits(be, x, self.stack.scratch())?;
            be.read_reals(logits, out)?;
        }
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        Ok(all)
    }

    /// The places of a batch's tokens.
    pub const fn tokens(&self) -> Ints {
        self.input.tokens
    }
}

impl<B: Backend> Network<B> for Gpt2 {
    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        self.groups(each)
    }

    fn trained(&self) -> usize {
        self.base.trained()
    }

    fn micro_batches(&self) -> usize {
        self.setup.accumulate
    }

    fn pass(&mut self, be: &mut B, pass: &Pass, micro: &Micro) -> Result<()> {
        Loss::<B>::begin(&mut self.head, micro);
        self.blocks.begin(micro.updater, micro.last);
        self.stack.train(be, &mut self.blocks, &mut self.input, &mut self.head, pass)
    }

    fn loss(&self, be: &B) -> Result<f64> {
        Loss::<B>::loss(&self.head, be, self.setup.accumulate)
    }

    fn rebuilt(&self, be: &B) -> Result<Rebuilt> {
        Rebuilt::of(be, &self.stack)
    }
}
