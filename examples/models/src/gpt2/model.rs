//! GPT-2 assembled from the layers and the stack of `bdia-core`: where every buffer is, and one
//! optimizer step.

use bdia_core::Real;
use bdia_core::arena::{Category, Ints, Layout, Reals, Words, product};
use bdia_core::backend::{Backend, Chunk, Gelu, Half, Mask};
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::{
    BlockShape, LmHead, LoraShape, Params, Tensor, TokenEmbedding, TransformerBlocks, Updater,
};
use bdia_core::optim::{Rule, clip_scale};
use bdia_core::plan::Choice;
use bdia_core::rng::{Draw, Stream};
use bdia_core::stack::{Config as StackConfig, Mode, Pass, Stack, Tail};
use bdia_core::update::{Gamma, Grid};

use crate::network::Network;

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

/// What is trained in place of the model's own parameters, which stay as they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adapters {
    /// Rank and factor of the adapters of queries and values.
    pub shape: LoraShape,
    /// Storage of the blocks' matrices, where it is 16 bits; embeddings, norms and biases always
    /// are reals.
    pub half: Option<Half>,
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
    /// Mode of the stack.
    pub mode: Mode,
    /// The grid, if the mode has one.
    pub grid: Option<Grid>,
    /// γ.
    pub gamma: Gamma,
    /// The optimizer; `None` for inference.
    pub rule: Option<Rule>,
    /// Adapters, where those are trained.
    pub adapters: Option<Adapters>,
    /// Update blocks as they are finished. Without it gradients add up over micro-batches and can
    /// be clipped.
    pub fused: bool,
    /// Keep originals and count differences.
    pub verify: bool,
    /// Threads of the backend.
    pub threads: usize,
    /// Bytes that the libraries below the backend allocate for themselves, at most.
    pub library: usize,
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
    /// Mean loss over the unmasked targets.
    pub loss: f64,
    /// Norm of the whole gradient, before clipping.
    pub grad_norm: f64,
    /// Elements in which rebuilt activations differed (with `verify`).
    pub mismatches: u64,
    /// Largest error of rebuilding (mode `bdia-float` with `verify`).
    pub rebuild_error: f64,
}

/// Most parameter tensors outside the blocks: `wte`, `wpe`, `ln_f.weight`, `ln_f.bias`, `lm_head`.
const ENDS: usize = 5;

/// A GPT-2 laid out in the arenas of a backend.
#[derive(Debug, Clone)]
pub struct Gpt2 {
    setup: Setup,
    /// The layout of what stays: parameters, gradients, optimizer state. Decoding has a layout of
    /// its own behind it.
    pub(super) base: Layout,
    /// The reversible stack.
    pub stack: Stack,
    /// The blocks.
    pub blocks: TransformerBlocks,
    /// Embedding.
    pub input: TokenEmbedding,
    /// Final norm, logits and loss.
    pub head: LmHead,
    ends: Params,
    end_tensors: [Tensor; ENDS],
    tokens: Ints,
    targets: Ints,
    /// One for each target of each micro-batch.
    losses: Reals,
    /// Tokens and targets of a batch on the host.
    staging: [Vec<i32>; 2],
}

/// A parameter tensor by its Hugging Face name (without `transformer.`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The name.
    pub name: String,
    /// The shape: one or two dimensions.
    pub shape: Vec<usize>,
    /// The values; empty where they are stored in 16 bits.
    pub values: Reals,
    /// The values that are stored in 16 bits.
    pub narrow: Option<(Half, Words)>,
    /// Their gradient; with fused updates the buffer that all blocks use.
    pub gradient: Reals,
    /// The optimizer's state.
    pub state: [Reals; 2],
}

impl Named {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a finite value stays finite as the tensor is stored.
    pub fn holds(&self, x: f32) -> bool {
        self.narrow.is_none_or(|(half, _)| half.value(rounded(half, x)).is_finite())
    }

    /// Writes values from index `at` on, an even one, as the tensor is stored: rounded to nearest
    /// where that is in 16 bits (see [`holds`](Self::holds)).
    ///
    /// # Errors
    /// Those of the backend.
    pub fn put<B: Backend>(&self, be: &mut B, at: usize, values: &[B::Real]) -> Result<()> {
        let Some((half, words)) = self.narrow else {
            return be.write_reals(self.values.sub(at, values.len()), values);
        };
        let bits = |x: B::Real| rounded(half, x.wide() as f32);
        let mut piece = [0; 256];
        for (i, values) in values.chunks(2 * piece.len()).enumerate() {
            let piece = &mut piece[..values.len().div_ceil(2)];
            for (word, pair) in piece.iter_mut().zip(values.chunks(2)) {
                *word = bits(pair[0]) | pair.get(1).map_or(0, |&x| bits(x) << 16);
            }
            be.write_words(words.sub(at / 2 + i * 256, piece.len()), piece)?;
        }
        Ok(())
    }
}

/// The nearest value of 16 bits.
fn rounded(half: Half, x: f32) -> u32 {
    u32::from(match half {
        Half::Bf16 => half::bf16::from_f32(x).to_bits(),
        Half::F16 => half::f16::from_f32(x).to_bits(),
    })
}

/// A tensor of group `k` that is stored as reals.
fn named(name: String, params: &Params, k: usize, t: &Tensor) -> Named {
    Named {
        name,
        shape: if t.matrix { vec![t.rows, t.cols] } else { vec![t.cols] },
        values: t.of(params.group(k)),
        narrow: None,
        gradient: t.of(params.gradient(k)),
        state: params.state(k, t),
    }
}

impl Network for Gpt2 {
    type Setup = Setup;

    fn lay_out<B: Backend>(setup: &Setup, choice: Choice) -> Result<(Self, Layout)> {
        Self::layout::<B>(setup, choice)
    }

    fn sizes(setup: &Setup) -> [usize; 2] {
        [setup.batch, setup.context]
    }

    fn exchanged(&self) -> Vec<usize> {
        self.exchanged().into()
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
        let positive =
            |what, n: usize| if n == 0 { Err(setting(what, 0.0, "1 or more")) } else { Ok(n) };
        positive("vocabulary", d.vocab)?;
        positive("context", setup.context)?;
        if setup.context > d.positions {
            return Err(Error::Shape {
                what: "context (longest)",
                expected: d.positions,
                found: setup.context,
            });
        }
        if !(0.0..1.0).contains(&d.dropout[0]) {
            return Err(setting("embedding dropout", d.dropout[0], "0 up to, not including, 1"));
        }
        let shape = BlockShape {
            tokens: setup.context,
            width: d.width,
            heads: d.heads,
            inner: d.inner,
            eps: d.eps,
            gelu: d.gelu,
            mask: Mask::Causal,
            attention_dropout: d.dropout[1],
            residual_dropout: d.dropout[2],
            hidden_dropout: 0.0,
            qkv_bias: true,
            temperature: false,
        };
        shape.check()?;
        product("parameters", &[d.vocab.max(d.positions), d.width])?;

        let (end_tensors, len) = end_tensors(d);
        let count = if d.tied { ENDS - 1 } else { ENDS };
        let (blocks, ends) = match setup.adapters {
            Some(Adapters { shape: lora, half }) => (
                TransformerBlocks::layout_frozen(
                    shape,
                    d.layers,
                    half,
                    lora,
                    setup.rule,
                    setup.fused,
                    l,
                )?,
                Params::layout_frozen(l, 1, len)?,
            ),
            None => (
                TransformerBlocks::layout(shape, d.layers, setup.rule, setup.fused, l)?,
                Params::layout(l, 1, len, count, setup.rule, true)?,
            ),
        };
        l.outside(Category::Library, setup.library);
        let base = l.clone();

        let rows = product("tokens of a batch", &[setup.batch, setup.context])?;
        let tokens = l.ints(Category::Head, rows);
        let targets = l.ints(Category::Head, rows);
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
            mode: setup.mode,
            grid: setup.grid,
            gamma: setup.gamma,
            verify: setup.verify,
            tail: Tail::Head,
            needs: blocks.needs::<B>(chunk, setup.threads),
            ends_scratch: LmHead::scratch(d.width, setup.context, chunk),
        };
        let stack = Stack::layout(config, l)?;

        let (p, g) = (ends.group(0), ends.gradient(0));
        let [wte, wpe, norm, norm_bias, lm_head] = end_tensors;
        let output = if d.tied { wte } else { lm_head };
        let input = TokenEmbedding {
            width: d.width,
            per_sample: setup.context,
            tokens,
            wte: wte.of(p),
            wpe: wpe.of(p),
            dwte: wte.of(g),
            dwpe: wpe.of(g),
            dropout: d.dropout[0],
        };
        let head = LmHead {
            width: d.width,
            per_sample: setup.context,
            vocab: d.vocab,
            eps: d.eps,
            norm: norm.of(p),
            norm_bias: norm_bias.of(p),
            weight: output.of(p),
            grads: [norm.of(g), norm_bias.of(g), output.of(g)],
            targets,
            losses: losses.sub(0, rows),
            logits,
            scale: 1.0,
            smoothing: 0.0,
        };
        let model = Self {
            setup: *setup,
            base,
            stack,
            blocks,
            input,
            head,
            ends,
            end_tensors,
            tokens,
            targets,
            losses,
            staging: [Vec::new(), Vec::new()],
        };
        Ok((model, layout))
    }

    /// The setup.
    pub const fn setup(&self) -> &Setup {
        &self.setup
    }

    fn ends(&self) -> &[Tensor] {
        &self.end_tensors[..if self.setup.dims.tied { ENDS - 1 } else { ENDS }]
    }

    fn trained_ends(&self) -> &[Tensor] {
        if self.setup.adapters.is_some() { &[] } else { self.ends() }
    }

    /// All tensors of the model, in the order of the file; adapters are not among them.
    pub fn tensors(&self) -> Vec<Named> {
        let mut list = Vec::new();
        let mut push = |prefix: &str, params: &Params, group: usize, tensors: &[Tensor]| {
            for t in tensors.iter().filter(|t| !t.is_empty()) {
                let narrow = self.blocks.narrow.filter(|_| t.matrix && !prefix.is_empty());
                list.push(Named {
                    narrow: narrow.map(|n| (n.half, n.of(group, t))),
                    values: if narrow.is_some() { Reals::EMPTY } else { t.of(params.group(group)) },
                    ..named(format!("{prefix}{}", t.name), params, group, t)
                });
            }
        };
        push("", &self.ends, 0, &self.ends()[..2]);
        for k in 0..self.setup.dims.layers {
            push(&format!("h.{k}."), &self.blocks.params, k, self.blocks.tensors());
        }
        push("", &self.ends, 0, &self.ends()[2..]);
        list
    }

    /// The tensors that are trained: all, or the adapters (`h.N.attn.c_attn.lora_A` and `lora_B`,
    /// `[2r, d]` both).
    pub fn trained(&self) -> Vec<Named> {
        let Some(lora) = &self.blocks.lora else { return self.tensors() };
        (0..self.setup.dims.layers)
            .flat_map(|k| {
                lora.tensors().iter().map(move |t| {
                    named(format!("h.{k}.attn.c_attn.{}", t.name), &lora.params, k, t)
                })
            })
            .collect()
    }

    /// All tensors of a checkpoint, in order: what is trained, then the optimizer's state.
    pub fn saved(&self) -> Vec<Reals> {
        let named = self.trained();
        let states = named.iter().flat_map(|t| t.state).filter(|s| !s.is_empty());
        named.iter().map(|t| t.values).chain(states).collect()
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
        let bound = 1.0 / (self.setup.dims.width as f64).sqrt();
        for (i, t) in self.trained().iter().enumerate() {
            for state in t.state {
                be.fill_reals(state, B::Real::of(0.0))?;
            }
            let s = Stream::new(seed, i as u32, 0, 1, 0, Draw::Init);
            let uniform = |e: usize| f64::from(s.word(e as u32)) / f64::from(1_u32 << 31) - 1.0;
            let start =
                |e: usize| if t.name.ends_with("lora_A") { bound * uniform(e) } else { 0.0 };
            let values: Vec<_> = (0..t.values.len()).map(|e| B::Real::of(start(e))).collect();
            be.write_reals(t.values, &values)?;
        }
        Ok(())
    }

    /// Lengths of the groups of gradients that are on their way between ranks at the same time: one
    /// block, or as much of the embedding as is worth a message.
    pub fn exchanged(&self) -> [usize; 1] {
        [self.blocks.trained().0.group_len().max(self.ends.group_len().min(1 << 18))]
    }

    /// GPT-2's initialization: normal with σ = 0.02, residual projections σ = 0.02/√(2K), biases 0,
    /// norms 1; optimizer state 0.
    ///
    /// # Errors
    /// Those of writing.
    pub fn initialize<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        let projections = 0.02 / (2.0 * self.setup.dims.layers as f64).sqrt();
        let mut piece = Vec::new();
        for (i, t) in self.tensors().iter().enumerate() {
            for state in t.state {
                be.fill_reals(state, B::Real::of(0.0))?;
            }
            if t.shape.len() == 1 {
                let one = t.name.ends_with("weight");
                be.fill_reals(t.values, B::Real::of(f64::from(u8::from(one))))?;
                continue;
            }
            let sigma = if t.name.ends_with("c_proj.weight") { projections } else { 0.02 };
            // The tensor's index in the file is its place in the random stream; rows are samples of
            // it, so threads share them out.
            let (rows, cols, threads) = (t.shape[0], t.shape[1], self.setup.threads.max(1));
            let share = (1_usize << 14).div_ceil(cols.max(1)).next_multiple_of(2);
            let draw = |first: usize, values: &mut [B::Real]| {
                for (row, line) in values.chunks_mut(cols).enumerate() {
                    let s = Stream::new(seed, i as u32, (first + row) as u32, 0, 0, Draw::Init);
                    line.iter_mut()
                        .zip(0..)
                        .for_each(|(x, e)| *x = B::Real::of(sigma * s.normal(e)));
                }
            };
            for first in (0..rows).step_by(share * threads) {
                piece.resize((share * threads).min(rows - first) * cols, B::Real::of(0.0));
                if threads == 1 {
                    draw(first, &mut piece);
                } else {
                    std::thread::scope(|scope| {
                        for (part, values) in piece.chunks_mut((share * cols).max(1)).enumerate() {
                            let draw = &draw;
                            scope.spawn(move || draw(first + part * share, values));
                        }
                    });
                }
                t.put(be, first * cols, &piece)?;
            }
        }
        Ok(())
    }

    /// One optimizer step. `fill` writes tokens and targets of micro-batch `i` (`[batch, context]`
    /// each) and may do so twice for one batch; of several ranks, this one's part of it. The
    /// outcome is that of all ranks.
    ///
    /// # Errors
    /// [`Error::Fault`] when the numbers went wrong; parameters are then as the fault says. What
    /// `fill` returns.
    pub fn train<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        step: &Step,
        mut fill: impl FnMut(usize, &mut [i32], &mut [i32]) -> core::result::Result<(), E>,
    ) -> core::result::Result<Outcome, E> {
        let Some(rule) = self.setup.rule else {
            return Err(setting("optimizer", f64::NAN, "one, to train").into());
        };
        self.prepare();
        // A fault that an abandoned step left behind is not this one's.
        be.clear_fault()?;
        let micro_batches = self.setup.accumulate;
        if self.setup.fused && (micro_batches != 1 || step.clip > 0.0) {
            return Err(setting(
                "accumulate or clip",
                f64::NAN,
                "full gradient buffers (fused = false)",
            )
            .into());
        }
        let fused = self.setup.fused;
        let updater = Updater {
            rule,
            weight_decay: step.weight_decay,
            lr: step.lr,
            t: step.step + 1,
            scale: 1.0,
            fused,
        };
        self.blocks.updater = updater;
        self.blocks.trained().0.zero_gradients(be)?;
        self.ends.zero_gradients(be)?;

        // The loss is the mean over the unmasked targets of the whole step, so they are counted
        // first.
        let mut unmasked = 0_usize;
        for i in 0..micro_batches {
            let [tokens, targets] = &mut self.staging;
            fill(i, tokens, targets)?;
            unmasked += targets.iter().filter(|&&t| t >= 0).count();
        }
        let (rank, ranks) = (be.rank(), be.ranks());
        let own = [unmasked as f64, 0.0, 0.0, 0.0];
        let mut unmasked = 0.0_f64;
        be.gather(own, &mut |[n, ..]| unmasked += n)?;
        self.head.scale = 1.0 / unmasked.max(1.0);

        let (mut mismatches, mut rebuild_error) = (0, 0.0_f64);
        for i in 0..micro_batches {
            let [tokens, targets] = &mut self.staging;
            if micro_batches > 1 {
                fill(i, tokens, targets)?;
            }
            be.write_ints(self.tokens, tokens)?;
            be.write_ints(self.targets, targets)?;
            // Each micro-batch has its own, so that nothing waits to read them.
            self.head.losses = self.losses.sub(i * self.tokens.len(), self.tokens.len());
            let first = (i * ranks + rank) * self.setup.batch;
            let pass = Pass { seed: step.seed, step: step.step, global: first as u32 };
            self.blocks.finishes = i + 1 == micro_batches;
            self.stack.train(be, &mut self.blocks, &mut self.input, &mut self.head, &pass)?;
            mismatches += self.stack.mismatches(be)?;
            rebuild_error = rebuild_error.max(self.stack.rebuild_error());
        }

        let [piece] = self.exchanged();
        let (params, tensors) = self.blocks.trained();
        params.settle(be, &updater, Site::Block(0), tensors)?;
        if !fused {
            for k in 0..self.setup.dims.layers {
                params.measure(be, Site::Block(k), k, tensors)?;
            }
        }
        self.ends.sum_over_ranks(be, piece)?;
        self.ends.measure(be, Site::Embedding, 0, self.trained_ends())?;
        // What was measured cannot go wrong in the update, so the host waits once: for the norm
        // that clipping needs, or when the step is done.
        let early = if fused { None } else { Some(self.result(be)?) };
        let updater = Updater {
            scale: early.map_or(1.0, |(_, norm)| clip_scale(norm, step.clip)),
            ..updater
        };
        if !fused {
            for k in 0..self.setup.dims.layers {
                params.update(be, &updater, k, tensors)?;
            }
        }
        self.ends.update(be, &updater, 0, self.trained_ends())?;
        let (loss, grad_norm) = early.map_or_else(|| self.result(be), Ok)?;
        let mut outcome = Outcome { loss: 0.0, grad_norm, mismatches: 0, rebuild_error: 0.0 };
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
        outcome.loss /= unmasked.max(1.0);
        Ok(outcome)
    }

    /// What a step reads: the sum of its losses and the norm of its gradients.
    fn result<B: Backend>(&self, be: &mut B) -> Result<(f64, f64)> {
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        let (mut loss, rows) = (0.0, self.tokens.len());
        for i in 0..self.setup.accumulate {
            loss += sum(be, self.losses.sub(i * rows, rows))?;
        }
        Ok((loss, (sum(be, self.blocks.trained().0.norms)? + sum(be, self.ends.norms)?).sqrt()))
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
        be.write_ints(self.targets.sub(0, n), targets)?;
        let x = self.run(be, tokens, samples, inference)?;
        let chunk = evaluation_chunk(samples);
        self.head.loss(be, &chunk, x, self.stack.scratch())?;
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        Ok((sum(be, self.head.losses.sub(0, n))?, targets.iter().filter(|&&t| t >= 0).count()))
    }

    fn run<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        samples: usize,
        inference: Inference,
    ) -> Result<Reals> {
        be.write_ints(self.tokens.sub(0, tokens.len()), tokens)?;
        let (blocks, input) = (&mut self.blocks, &mut self.input);
        match inference {
            Inference::Float(gamma) => self.stack.infer(be, blocks, input, samples, gamma),
            Inference::Quantized(gamma) => {
                self.stack.infer_quantized(be, blocks, input, samples, gamma)
            }
        }
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
        if tokens.is_empty() || tokens.len() > self.setup.context || positions.end > tokens.len() {
            return Err(Error::Shape {
                what: "tokens (at most)",
                expected: self.setup.context,
                found: tokens.len(),
            });
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
            let logits = self.head.logits(be, x.sub(first * d, rows * d), self.stack.scratch())?;
            be.read_reals(logits, out)?;
        }
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        Ok(all)
    }
}

/// Which network is run at inference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Inference {
    /// In float, with a constant γ; 0 is the standard transformer.
    Float(Gamma),
    /// On the grid (mode `bdia`), with a constant γ.
    Quantized(Gamma),
}

/// The sum of some values, from the first to the last in `f64`, piece by piece through the stack.
fn sum<B: Backend>(be: &B, values: Reals) -> Result<f64> {
    let (mut total, mut piece) = (0.0, [B::Real::of(0.0); 256]);
    for at in (0..values.len()).step_by(piece.len()) {
        let piece = &mut piece[..256.min(values.len() - at)];
        be.read_reals(values.sub(at, piece.len()), piece)?;
        total = piece.iter().fold(total, |t, x| t + x.wide());
    }
    Ok(total)
}

fn evaluation_chunk(samples: usize) -> Chunk {
    Chunk { seed: 0, step: 0, stack: 0, site: Site::Head, first: 0, samples, global: 0, frame: 0 }
}

fn setting(what: &'static str, found: f64, possible: &'static str) -> Error {
    Error::Setting { what, found, possible }
}

/// The tensors outside the blocks, and the length of their group.
fn end_tensors(d: &Dims) -> ([Tensor; ENDS], usize) {
    let t = |name, rows, cols, matrix| Tensor { name, rows, cols, matrix, offset: 0 };
    let mut tensors = [
        t("wte.weight", d.vocab, d.width, true),
        t("wpe.weight", d.positions, d.width, true),
        t("ln_f.weight", 1, d.width, false),
        t("ln_f.bias", 1, d.width, false),
        t("lm_head.weight", if d.tied { 0 } else { d.vocab }, d.width, true),
    ];
    let len = bdia_core::layers::place(&mut tensors);
    (tensors, len)
}
