//! The most common network: an input, one stack of blocks, a head.

use super::{Group, Loaded, Micro, Network, Owner, Rebuilt, sum};
use crate::arena::{Category, Layout, product};
use crate::backend::{Backend, Chunk};
use crate::error::{Error, Result, Site};
use crate::layers::{
    Branches, Freeze, Gradients, LmHead, Mlp, Norm, Params, Residual, Room, SelfAttention, Tensor,
    TokenEmbedding,
};
use crate::plan::Choice;
use crate::stack::{Config, Head, Input, Mode, Pass, Stack, Tail};
use crate::update::FloatGamma;

/// A head that a [`Chain`] ends with: it is told the scale of its gradient, and keeps the losses of
/// every micro-batch until the step is over.
pub trait Loss<B: Backend>: Head<B> {
    /// Prepares a pass: the gradient of its loss is scaled by [`Micro::scale`].
    fn begin(&mut self, micro: &Micro);

    /// The sum of the losses of the step's micro-batches.
    ///
    /// # Errors
    /// Any error of the backend.
    fn loss(&self, be: &B, micro_batches: usize) -> Result<f64>;
}

impl<B: Backend> Loss<B> for LmHead {
    fn begin(&mut self, micro: &Micro) {
        (self.scale, self.micro_batch) = (micro.scale, micro.index);
    }

    fn loss(&self, be: &B, micro_batches: usize) -> Result<f64> {
        sum(be, self.losses.sub(0, micro_batches.saturating_mul(self.targets.len())))
    }
}

/// An input, a stack of blocks and a head, with the parameters of all three: a [`Network`].
///
/// [`Lm`] is a language model that is laid out for you. For an input or a head of your own fill in
/// the fields; what they train belongs to `ends`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chain<I, P, H, const N: usize> {
    /// The stack.
    pub stack: Stack,
    /// Its blocks, with their parameters.
    pub blocks: Residual<P>,
    /// What comes before the stack.
    pub input: I,
    /// What comes after it.
    pub head: H,
    /// The parameters of input and head, in one group.
    pub ends: Params,
    /// Their tensors.
    pub outside: [Tensor; N],
    /// [`Layout::trained`], once everything is laid out.
    pub trained: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
}

/// A language model: token and position embedding, blocks of attention and MLP, and a head over the
/// vocabulary. With blocks of [`BlockShape::gpt2`](crate::layers::BlockShape::gpt2) it is a GPT-2.
pub type Lm = Chain<TokenEmbedding, (SelfAttention, Mlp), LmHead, 5>;

/// What a language model is apart from its blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LmShape {
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Learned positions: the longest sample.
    pub positions: usize,
    /// `ε` of the final norm.
    pub eps: f64,
    /// Whether the head's matrix is the embedding.
    pub tied: bool,
    /// Dropout of the embedding.
    pub dropout: f64,
}

/// How a network is trained, as far as memory depends on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Training {
    /// Mode of the stack.
    pub mode: Mode,
    /// Samples of a micro-batch.
    pub batch: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// How much is done at a time.
    pub choice: Choice,
    /// Threads of the backend.
    pub threads: usize,
    /// What is not trained of input and head.
    pub freeze: Freeze,
    /// How gradients are kept.
    pub gradients: Gradients,
}

impl Training {
    /// Everything is trained, in one micro-batch of `batch` samples, by one thread, and as little
    /// is done at a time as possible. Change the fields that should be different.
    pub const fn new(mode: Mode, batch: usize, gradients: Gradients) -> Self {
        let (choice, freeze) = (Choice::new(1, 8), Freeze::Nothing);
        Self { mode, batch, micro_batches: 1, choice, threads: 1, freeze, gradients }
    }
}

impl<P: Branches> Chain<TokenEmbedding, P, LmHead, 5> {
    /// Lays a language model out around its blocks.
    ///
    /// # Errors
    /// [`Error::Setting`] for a size of 0, a sample longer than the positions, or a dropout outside
    /// its range; [`Error::TooLarge`]; those of [`Params::layout`] and [`Stack::layout`].
    pub fn layout<B: Backend>(
        shape: &LmShape,
        blocks: Residual<P>,
        training: &Training,
        layout: &mut Layout,
    ) -> Result<Self> {
        let (l, t) = (layout, training);
        let (vocab, width, tokens) = (shape.vocab, blocks.width(), blocks.tokens());
        for (what, n) in [
            ("vocabulary", vocab),
            ("micro-batches", t.micro_batches),
            ("rows of logits", t.choice.head_rows),
        ] {
            if n == 0 {
                return Err(Error::setting(what, 0.0, "1 or more"));
            }
        }
        if tokens > shape.positions {
            let possible = "at most the learned positions";
            return Err(Error::setting("tokens of a sample", tokens as f64, possible));
        }
        crate::check::dropout_rate(shape.dropout)?;
        product("embedding", &[vocab.max(shape.positions), width])?;

        let [wte, wpe] = TokenEmbedding::tensors(vocab, shape.positions, width, 0.02);
        let [norm, norm_bias, lm_head] = LmHead::tensors(vocab, width, shape.tied);
        let mut outside = [wte, wpe, norm, norm_bias, lm_head];
        // What is frozen here stays in full precision: it is used where it lies.
        let freeze = if let Freeze::All(_) = t.freeze { Freeze::All(None) } else { t.freeze };
        let room = Room::NONE.place(&mut outside, freeze);
        let ends = Params::layout(1, room, freeze, t.gradients, l)?;
        let [wte, wpe, norm, norm_bias, lm_head] = outside.map(|t| ends.parameter(0, &t));

        let rows = product("tokens of a batch", &[t.batch, tokens])?;
        let losses = product("losses", &[t.micro_batches, rows])?;
        let logits = product("logits", &[t.choice.head_rows, vocab])?;
        let input = TokenEmbedding {
            width,
            per_sample: tokens,
            tokens: l.ints(Category::Head, rows),
            wte,
            packed: None,
            wpe,
            scale: 1.0,
            dropout: shape.dropout,
        };
        let head = LmHead {
            width,
            per_sample: tokens,
            vocab,
            norm: Norm::Layer { eps: shape.eps, weight: norm, bias: norm_bias },
            weight: if shape.tied { wte } else { lm_head },
            packed: None,
            targets: l.ints(Category::Head, rows),
            losses: l.reals(Category::Head, losses),
            micro_batch: 0,
            logits: l.reals(Category::Head, logits),
            scale: 0.0,
            smoothing: 0.0,
        };
        let chunk = t.choice.chunk.min(t.batch);
        let config = Config {
            id: 0,
            batch: t.batch,
            per_sample: product("activations", &[tokens, width])?,
            blocks: blocks.steps(),
            chunk,
            tail: Tail::Head,
            needs: blocks.needs::<B>(chunk, t.threads),
            ends_scratch: LmHead::scratch(width, tokens, chunk),
        };
        let stack = Stack::layout(&config, &t.mode, l)?;
        let (trained, micro_batches) = (l.trained(), t.micro_batches);
        Ok(Self { stack, blocks, input, head, ends, outside, trained, micro_batches })
    }

    /// Writes micro-batch `index` of this rank: tokens and targets, `[batch, tokens]` each. A
    /// negative target is masked.
    ///
    /// # Errors
    /// [`Error::Shape`] for other lengths; any error of the backend.
    pub fn load<B: Backend>(
        &self,
        be: &mut B,
        index: usize,
        tokens: &[i32],
        targets: &[i32],
    ) -> Result<Loaded> {
        be.write_ints(self.input.tokens, tokens)?;
        be.write_ints(self.head.targets, targets)?;
        let first = (index * be.ranks() + be.rank()) * self.stack.config().batch;
        let unmasked = targets.iter().filter(|&&t| t >= 0).count();
        Ok(Loaded { first: first as u32, targets: unmasked, items: tokens.len() })
    }
}

impl<P: Branches> Chain<TokenEmbedding, P, LmHead, 5> {
    /// The sum of the losses of some samples, at most a chunk ([`Stack::config`]) of them, in the
    /// standard transformer. Tokens and targets are those of [`load`](Self::load).
    ///
    /// # Errors
    /// [`Error::Shape`] for other lengths; [`Error::Fault`] for tokens outside the vocabulary and
    /// values that are not finite; any error of the backend.
    pub fn evaluate<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        targets: &[i32],
    ) -> Result<f64> {
        be.clear_fault()?;
        let (n, samples) = (tokens.len(), tokens.len() / self.input.per_sample.max(1));
        be.write_ints(self.input.tokens.sub(0, n), tokens)?;
        be.write_ints(self.head.targets.sub(0, n), targets)?;
        let (blocks, input) = (&mut self.blocks, &mut self.input);
        let x = self.stack.infer(be, blocks, input, samples, FloatGamma::ZERO)?;
        let chunk = Chunk {
            seed: 0,
            step: 0,
            stack: 0,
            site: Site::Head,
            first: 0,
            samples,
            global: 0,
            frame: 0,
        };
        LmHead::loss(&self.head, be, &chunk, x, self.stack.scratch())?;
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        sum(be, self.head.losses.sub(0, n))
    }
}

impl<I, P: Branches, H, const N: usize> Chain<I, P, H, N> {
    /// Draws the initial values of all parameters and clears the optimizer's state.
    ///
    /// # Errors
    /// As [`Params::initialize`].
    pub fn initialize<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        let mut index = 0;
        self.ends.initialize(be, seed, &mut index, &self.outside)?;
        self.blocks.params.initialize(be, seed, &mut index, &self.blocks)
    }
}

impl<B, I, P, H, const N: usize> Network<B> for Chain<I, P, H, N>
where
    B: Backend,
    I: Input<B>,
    P: Branches,
    H: Loss<B>,
{
    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        let (blocks, ends) = (&self.blocks, Owner::Ends(Site::Embedding));
        each(&Group { params: &blocks.params, tensors: blocks, of: Owner::Blocks })?;
        each(&Group { params: &self.ends, tensors: &self.outside, of: ends })
    }

    fn trained(&self) -> usize {
        self.trained
    }

    fn pass(&mut self, be: &mut B, pass: &Pass, micro: &Micro) -> Result<()> {
        self.head.begin(micro);
        self.blocks.begin(micro.updater, micro.last);
        self.stack.train(be, &mut self.blocks, &mut self.input, &mut self.head, pass)
    }

    fn micro_batches(&self) -> usize {
        self.micro_batches
    }

    fn loss(&self, be: &B) -> Result<f64> {
        self.head.loss(be, self.micro_batches)
    }

    fn rebuilt(&self, be: &B) -> Result<Rebuilt> {
        Rebuilt::of(be, &self.stack)
    }
}
