//! Residual blocks, composed of branches.
//!
//! ```text
//! m_0 = x        y_i = branch_i(m_i)        m_{i+1} = m_i + y_i        h(x) = Σ y_i
//! ```
//! so that `x + h(x)` is what an ordinary pre-norm block computes: `h(x) = f(x) + g(x + f(x))` of
//! attention `f` and MLP `g`, with cross-attention between them in a decoder. The vector-Jacobian
//! product follows for any branches, from the last one down:
//!
//! ```text
//! a = 0        a += J_iᵀ·(gh + a)   for i = n-1 … 1        gx += a + J_0ᵀ·(gh + a)
//! ```

use super::{
    AttentionShape, CrossAttention, Freeze, Gradients, LoraShape, Matrix, Mlp, MlpShape, Params,
    Room, Scheme, SelfAttention, Tensor, Tensors, Updater,
};
use crate::arena::{Ints, Layout, Reals, product};
use crate::backend::{Backend, Chunk, Columns, Gelu, Mask, NnOps};
use crate::error::{Error, Result, Site, ok};
use crate::real::Real;
use crate::rng::Draw;
use crate::stack::{Blocks, Call, Needs};

/// Cuts handles one after another from a longer one.
pub(super) struct Cut(pub(super) Reals);

impl Cut {
    pub(super) fn take(&mut self, len: usize) -> Reals {
        let part = self.0.sub(0, len);
        self.0 = self.0.sub(len, self.0.len());
        part
    }
}

/// Keys and values of the tokens so far, in one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cached<'a> {
    /// `[samples, keys, 2 w]` for keys, and values, of width `w`.
    pub of: Reals,
    /// Most tokens of a sample.
    pub keys: usize,
    /// The place of the token that is added, from 0, for every sample.
    pub positions: &'a [usize],
    /// Tokens including that one, for every sample.
    pub lens: Ints,
    /// `positions` on the backend, for blocks that turn by them.
    pub places: Ints,
    /// The first token that each sample's new one sees in blocks with a sliding window.
    pub starts: Ints,
    /// Keys and values of the context, where the block reads one.
    pub context: Option<CachedContext>,
}

/// Keys and values of a context in one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachedContext {
    /// `[samples / beams, positions, 2 d]`.
    pub keys_values: Reals,
    /// Samples one after the other that share a context.
    pub beams: usize,
}

/// Where a branch is called: the block's parameters, and memory of its own.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// The call of the block; its frame is not the branch's.
    pub call: &'a Call,
    /// Memory that stays from `forward` to `vjp`.
    pub frame: Reals,
    /// Memory for this call only.
    pub scratch: Reals,
    pub(super) params: &'a Params,
}

impl At<'_> {
    /// Samples of the call.
    pub const fn samples(&self) -> usize {
        self.call.chunk.samples
    }

    /// Values of one of the block's tensors.
    pub const fn value(&self, t: &Tensor) -> Reals {
        self.params.value(self.call.block, t)
    }

    /// Its gradient; empty where it is frozen.
    pub const fn slope(&self, t: &Tensor) -> Reals {
        self.params.gradient(self.call.block, t)
    }

    /// One of the block's matrices ([`Params::matrix`]).
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn matrix<B: NnOps>(&self, be: &mut B, t: &Tensor) -> Result<Matrix> {
        self.params.matrix(be, self.call.block, t)
    }

    /// Dropout of `x` in place, in training. It is its own vector-Jacobian product.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn dropout<B: NnOps>(&self, be: &mut B, draw: Draw, p: f64, x: Reals) -> Result<()> {
        if self.call.train && p > 0.0 { be.dropout(&self.call.chunk, draw, p, x) } else { Ok(()) }
    }

    /// The place of `x` after dropout: `copy`, or that of `x` itself where nothing is dropped.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn dropped<B: NnOps>(
        &self,
        be: &mut B,
        draw: Draw,
        p: f64,
        x: Reals,
        copy: Reals,
    ) -> Result<Reals> {
        if !self.call.train || p == 0.0 {
            return Ok(x);
        }
        be.copy_reals(x, copy)?;
        be.dropout(&self.call.chunk, draw, p, copy)?;
        Ok(copy)
    }
}

/// A branch of a residual block.
pub trait Branch<B: Backend> {
    /// What it needs for chunks of `chunk` samples. [`Needs::frame`] does not depend on these.
    fn needs(&self, chunk: usize, threads: usize) -> Needs;

    /// Sets `y`. Intermediates go to the frame.
    ///
    /// # Errors
    /// Any error of the backend.
    fn forward(&self, be: &mut B, at: &At<'_>, x: Reals, y: Reals) -> Result<()>;

    /// *Adds* `Jᵀ·gy` to `gx`, and to the gradients of its parameters. `gy` stays as it is.
    ///
    /// # Errors
    /// Any error of the backend.
    fn vjp(&self, be: &mut B, at: &At<'_>, x: Reals, gy: Reals, gx: Reals) -> Result<()>;

    /// Whether a row of `x` gives the same row of `y` wherever it stands and whatever the others
    /// are: such a branch can run over some rows at a time ([`Residual::in_token_chunks`]).
    fn by_token(&self) -> bool {
        false
    }

    /// Fills the frame as [`forward`](Self::forward) does. `spare` has the shape of `x`; nobody
    /// reads what is left there.
    ///
    /// # Errors
    /// Any error of the backend.
    fn again(&self, be: &mut B, at: &At<'_>, x: Reals, spare: Reals) -> Result<()> {
        self.forward(be, at, x, spare)
    }

    /// [`forward`](Self::forward) for one more token of each sample, at inference: `x` and `y` are
    /// `[samples, d]`. What looks at other tokens finds them in `cached`, and adds this one.
    ///
    /// # Errors
    /// Any error of the backend.
    fn next(&self, be: &mut B, at: &At<'_>, cached: &Cached<'_>, x: Reals, y: Reals) -> Result<()> {
        let _ = cached;
        self.forward(be, at, x, y)
    }
}

/// The branches of a block, from the first to the last.
pub trait Branches {
    /// How many there are.
    const COUNT: usize;

    /// Branch `i`.
    fn branch<B: Backend>(&self, i: usize) -> &dyn Branch<B>;

    /// The tensors of branch `i`.
    fn tensors(&self, i: usize) -> &[Tensor];
}

/// Attention and MLP.
impl Branches for (SelfAttention, Mlp) {
    const COUNT: usize = 2;

    fn branch<B: Backend>(&self, i: usize) -> &dyn Branch<B> {
        if i == 0 { &self.0 } else { &self.1 }
    }

    fn tensors(&self, i: usize) -> &[Tensor] {
        if i == 0 { self.0.tensors() } else { self.1.tensors() }
    }
}

/// Attention, cross-attention and MLP.
impl Branches for (SelfAttention, CrossAttention, Mlp) {
    const COUNT: usize = 3;

    fn branch<B: Backend>(&self, i: usize) -> &dyn Branch<B> {
        match i {
            0 => &self.0,
            1 => &self.1,
            _ => &self.2,
        }
    }

    fn tensors(&self, i: usize) -> &[Tensor] {
        match i {
            0 => self.0.tensors(),
            1 => self.1.tensors(),
            _ => self.2.tensors(),
        }
    }
}

/// Dimensions and constants of a pre-norm transformer block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockShape {
    /// Tokens `T` of a sample.
    pub tokens: usize,
    /// Width `d`.
    pub width: usize,
    /// Heads; they divide the width.
    pub heads: usize,
    /// Hidden width of the MLP.
    pub inner: usize,
    /// `ε` of the norms.
    pub eps: f64,
    /// Which GELU.
    pub gelu: Gelu,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Dropout of attention probabilities.
    pub attention_dropout: f64,
    /// Dropout of the branches' outputs.
    pub residual_dropout: f64,
    /// Dropout between the two layers of the MLP.
    pub hidden_dropout: f64,
    /// Whether `c_attn`, which gives q, k and v, has a bias.
    pub qkv_bias: bool,
    /// Whether the scores' factor is learned (`e^τ`, one `τ` a block) in place of `1/√head_dim`.
    pub temperature: bool,
    /// How matrices begin.
    pub init: Scheme,
}

impl BlockShape {
    /// A block of a GPT-2 of `blocks` blocks, without dropout.
    pub fn gpt2(tokens: usize, width: usize, heads: usize, blocks: usize) -> Self {
        Self {
            tokens,
            width,
            heads,
            inner: width.saturating_mul(4),
            eps: 1e-5,
            gelu: Gelu::Tanh,
            mask: Mask::Causal,
            attention_dropout: 0.0,
            residual_dropout: 0.0,
            hidden_dropout: 0.0,
            qkv_bias: true,
            temperature: false,
            init: Scheme::gpt2(blocks),
        }
    }

    /// Checks the dimensions.
    ///
    /// # Errors
    /// [`Error::Setting`] names the first that is wrong; [`Error::TooLarge`] for sizes beyond the
    /// address space.
    pub const fn check(&self) -> Result<()> {
        let sizes = [
            ("tokens", self.tokens),
            ("width", self.width),
            ("heads", self.heads),
            ("MLP width", self.inner),
        ];
        let mut i = 0;
        while i < sizes.len() {
            if sizes[i].1 == 0 {
                return Err(Error::setting(sizes[i].0, 0.0, "1 or more"));
            }
            i += 1;
        }
        if !self.width.is_multiple_of(self.heads) {
            return Err(Error::setting("heads", self.heads as f64, "a divisor of the width"));
        }
        let dropouts = [
            ("attention dropout", self.attention_dropout),
            ("residual dropout", self.residual_dropout),
            ("hidden dropout", self.hidden_dropout),
        ];
        let mut i = 0;
        while i < dropouts.len() {
            let (what, p) = dropouts[i];
            if !(p >= 0.0 && p < 1.0) {
                return Err(Error::setting(what, p, "0 up to, not including, 1"));
            }
            i += 1;
        }
        ok!(product("block", &[self.width, 4, self.width]));
        ok!(product("block", &[self.width, 3, self.inner]));
        let widest = larger(self.width, larger(self.inner, self.heads));
        ok!(product("frame", &[self.tokens, 16, widest]));
        Ok(())
    }

    const fn attention(&self) -> AttentionShape {
        AttentionShape {
            tokens: self.tokens,
            width: self.width,
            heads: self.heads,
            eps: self.eps,
            mask: self.mask,
            dropout: self.attention_dropout,
            residual_dropout: self.residual_dropout,
            qkv_bias: self.qkv_bias,
            temperature: self.temperature,
            init: self.init,
        }
    }

    const fn mlp(&self) -> MlpShape {
        MlpShape {
            tokens: self.tokens,
            width: self.width,
            inner: self.inner,
            eps: self.eps,
            gelu: self.gelu,
            hidden_dropout: self.hidden_dropout,
            residual_dropout: self.residual_dropout,
            init: self.init,
        }
    }
}

pub(super) const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

/// `K` blocks of the same branches with their parameters, one group a block: what a
/// [`Stack`](crate::stack::Stack) runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Residual<P> {
    tokens: usize,
    width: usize,
    /// The branches, with what belongs to a batch (padding).
    pub branches: P,
    /// Parameters.
    pub params: Params,
    /// Rows that branches by token take at a time.
    token_chunk: Option<usize>,
    /// The optimizer of the running step.
    updater: Option<Updater>,
    /// Whether a block that is done is [finished](Params::finished): its gradient has all that the
    /// step adds to it. Not so in the micro-batches of a step before the last.
    finishes: bool,
}

/// Blocks of attention and MLP.
pub type PreNorm = Residual<(SelfAttention, Mlp)>;

/// Blocks of attention, cross-attention and MLP.
pub type Decoder = Residual<(SelfAttention, CrossAttention, Mlp)>;

impl PreNorm {
    /// Lays out parameters, gradients and optimizer state of `blocks` blocks. `freeze` says what of
    /// them stays as it is; the adapters of `lora` are trained in any case.
    ///
    /// # Errors
    /// As [`BlockShape::check`], [`SelfAttention::new`] and [`Params::layout`].
    pub const fn layout(
        shape: &BlockShape,
        blocks: usize,
        lora: Option<LoraShape>,
        freeze: Freeze,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<Self> {
        Self::layout_paged(shape, blocks, blocks, lora, freeze, gradients, layout)
    }

    /// As [`layout`](Self::layout), with the frozen values of only `resident` blocks in memory
    /// ([`Params::layout_paged`]).
    ///
    /// # Errors
    /// As [`layout`](Self::layout).
    pub const fn layout_paged(
        shape: &BlockShape,
        blocks: usize,
        resident: usize,
        lora: Option<LoraShape>,
        freeze: Freeze,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<Self> {
        ok!(shape.check());
        let (attention, room) =
            ok!(SelfAttention::new(shape.attention(), lora, freeze, Room::NONE));
        let (mlp, room) = Mlp::new(shape.mlp(), freeze, room);
        let params = ok!(Params::layout_paged(blocks, resident, room, freeze, gradients, layout));
        Ok(Self::new((attention, mlp), params, shape.tokens, shape.width))
    }

    /// What a block needs where the backend's
    /// [`attention_scratch`](crate::NnOps::attention_scratch) is `attention`: for plans that the
    /// compiler computes.
    pub const fn needs_with(&self, attention: usize) -> Needs {
        let row = self.tokens.saturating_mul(self.width);
        let first = compose(Needs::NONE, self.branches.0.needs_with(attention), row, 0, 2);
        compose(first, self.branches.1.needs(), row, 1, 2)
    }

    /// The same blocks, with the same parameters, for samples of another length.
    #[must_use]
    pub const fn with_tokens(mut self, tokens: usize) -> Self {
        self.tokens = tokens;
        self.branches = (self.branches.0.with_tokens(tokens), self.branches.1.with_tokens(tokens));
        self
    }
}

impl Decoder {
    /// Lays out parameters, gradients and optimizer state of `blocks` blocks over a context of
    /// `keys` positions a sample. Cross-attention has the heads and the dropout of self-attention.
    ///
    /// # Errors
    /// As [`PreNorm::layout`]; [`Error::Setting`] for a context of no position.
    pub const fn layout(
        shape: &BlockShape,
        keys: usize,
        blocks: usize,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<Self> {
        Self::layout_frozen(shape, keys, blocks, None, Freeze::Nothing, gradients, layout)
    }

    /// As [`layout`](Self::layout), where `freeze` says what stays as it is; the adapters of
    /// `lora`, in self-attention, are trained in any case.
    ///
    /// # Errors
    /// As [`layout`](Self::layout).
    pub const fn layout_frozen(
        shape: &BlockShape,
        keys: usize,
        blocks: usize,
        lora: Option<LoraShape>,
        freeze: Freeze,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<Self> {
        ok!(shape.check());
        let (own, room) = ok!(SelfAttention::new(shape.attention(), lora, freeze, Room::NONE));
        let (cross, room) = ok!(CrossAttention::new(shape.attention(), keys, freeze, room));
        let (mlp, room) = Mlp::new(shape.mlp(), freeze, room);
        let params = ok!(Params::layout(blocks, room, freeze, gradients, layout));
        Ok(Self::new((own, cross, mlp), params, shape.tokens, shape.width))
    }

    /// The same blocks, with the same parameters, for samples of `tokens` tokens and a context of
    /// `keys` positions.
    #[must_use]
    pub const fn with_tokens(mut self, tokens: usize, keys: usize) -> Self {
        let (own, cross, mlp) = self.branches;
        self.tokens = tokens;
        self.branches =
            (own.with_tokens(tokens), cross.with_tokens(tokens, keys), mlp.with_tokens(tokens));
        self
    }

    /// Keys and values of some rows of the context in block `k`: `[rows, 2 d]`.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn context_keys_values<B: Backend>(
        &self,
        be: &mut B,
        k: usize,
        context: Reals,
        kv: Reals,
    ) -> Result<()> {
        self.branches.1.keys_values(be, &self.params, k, context, kv)
    }
}

/// What the branches up to the `i`-th of `count` need together: `before` for those before it, and
/// `own`. A sample of the residual stream has `row` values.
const fn compose(before: Needs, own: Needs, row: usize, i: usize, count: usize) -> Needs {
    // m_i is kept for every branch but the first, whose input is x.
    let middle = if i > 0 { row } else { 0 };
    // A branch between the first and the last works on a copy of its gradient.
    let copy = if i > 0 && i + 1 < count { row } else { 0 };
    // `a` is there while any but the first works, and in the forward pass the output of one.
    let scratch = if i > 0 { own.scratch.saturating_add(row) } else { larger(own.scratch, row) };
    let scratch = scratch.saturating_add(copy);
    Needs {
        frame: before.frame.saturating_add(own.frame).saturating_add(middle),
        scratch: larger(before.scratch, scratch),
        fixed: larger(before.fixed, own.fixed),
    }
}

impl<P: Branches> Residual<P> {
    /// Blocks of these branches over samples of `tokens` rows of `width` values. `params` are laid
    /// out with the [`Room`] that the branches' tensors have taken.
    pub const fn new(branches: P, params: Params, tokens: usize, width: usize) -> Self {
        Self { tokens, width, branches, params, token_chunk: None, updater: None, finishes: true }
    }

    /// Tokens of a sample.
    pub const fn tokens(&self) -> usize {
        self.tokens
    }

    /// Width of the residual stream.
    pub const fn width(&self) -> usize {
        self.width
    }

    /// The same blocks, of which the stack steps over `n` at once: to it, `n` neighbours are one
    /// block, `h(x)` the sum of what they add. The last step has what is left.
    ///
    /// An exact step then costs its side bits once for `n` blocks, and γ perturbs a pretrained
    /// network no more than with steps of one block. The price is room for the intermediates of
    /// `n` blocks, a chunk at a time, and with fused updates for the gradients of `n` blocks
    /// ([`Gradients::Together`]). Faults of activations and of their gradients name the step, those
    /// of parameters the block.
    ///
    /// # Errors
    /// [`Error::Setting`] for another number than has gradients at a time, and for several blocks
    /// of which one is in memory at a time ([`Params::layout_paged`]).
    pub fn step_over(mut self, n: usize) -> Result<Self> {
        self.params = self.params.finished_by(n)?;
        Ok(self)
    }

    /// The same blocks, where what treats each token alone ([`Branch::by_token`]: MLPs without
    /// dropout) takes `tokens` of them at a time. Its intermediates are then computed again in the
    /// backward pass, so that memory has room for those of so many tokens only, however long the
    /// samples are. Gradients are summed in another order. `None`, or as many tokens as a sample
    /// has: all at once.
    #[must_use]
    pub const fn in_token_chunks(mut self, tokens: Option<usize>) -> Self {
        self.token_chunk = tokens;
        self
    }

    /// Tokens at a time, as [`in_token_chunks`](Self::in_token_chunks) was told.
    pub const fn token_chunk(&self) -> Option<usize> {
        self.token_chunk
    }

    /// Steps of the stack: as many as blocks, unless it [steps over](Self::step_over) several.
    pub const fn steps(&self) -> usize {
        self.params.groups().div_ceil(self.params.together())
    }

    /// Prepares a pass: sets the optimizer of the step, and whether this is the step's last pass.
    /// It holds for one step: blocks that update themselves refuse to do so a second time.
    pub const fn begin(&mut self, updater: Updater, last: bool) {
        (self.updater, self.finishes) = (Some(updater), last);
    }

    /// What a block needs of its stack, for chunks of `chunk` samples.
    pub fn needs<B: Backend>(&self, chunk: usize, threads: usize) -> Needs {
        let row = self.tokens.saturating_mul(self.width);
        let count = P::COUNT * self.params.together().min(self.params.groups().max(1));
        (0..count).fold(Needs::NONE, |before, b| {
            compose(before, self.own::<B>(b, chunk, threads), row, b, count)
        })
    }

    /// Rows that branch `i` of a step takes at a time, where these are fewer than a sample has.
    fn rows_at_a_time<B: Backend>(&self, i: usize) -> Option<usize> {
        let rows = self.token_chunk.filter(|&n| n > 0 && n < self.tokens)?;
        self.branches.branch::<B>(i % P::COUNT).by_token().then_some(rows)
    }

    /// What branch `i` of a step needs. One that takes some rows at a time has its frame among
    /// what is free, and beside it the output that it computes again.
    fn own<B: Backend>(&self, i: usize, chunk: usize, threads: usize) -> Needs {
        let all = self.branches.branch::<B>(i % P::COUNT).needs(chunk, threads);
        let Some(rows) = self.rows_at_a_time::<B>(i) else { return all };
        let of = |sample: usize| sample.div_ceil(self.tokens).saturating_mul(rows);
        let some = of(all.frame).saturating_add(of(all.scratch));
        let fixed = all.fixed.saturating_add(some).saturating_add(self.width.saturating_mul(rows));
        Needs { frame: 0, scratch: 0, fixed }
    }

    /// Calls branch `i` of a step with some rows after the others, or with all: with where it is
    /// called, the first value of these rows, how many they are, and a place for as many more.
    fn each_rows<B: Backend>(
        &self,
        i: usize,
        at: &At<'_>,
        len: usize,
        mut run: impl FnMut(&dyn Branch<B>, &At<'_>, [usize; 2], Reals) -> Result<()>,
    ) -> Result<()> {
        let branch = self.branches.branch::<B>(i % P::COUNT);
        let Some(rows) = self.rows_at_a_time::<B>(i) else {
            return run(branch, at, [0, len], Reals::EMPTY);
        };
        let frame = branch.needs(0, 1).frame.div_ceil(self.tokens);
        let step = rows.saturating_mul(self.width).max(1);
        for from in (0..len).step_by(step) {
            let n = step.min(len - from);
            let mut cut = Cut(at.scratch);
            let (frame, spare) = (cut.take(frame * (n / self.width.max(1))), cut.take(n));
            run(branch, &At { frame, scratch: cut.0, ..*at }, [from, n], spare)?;
        }
        Ok(())
    }

    /// Branch `i` of a step: `y = branch(x)`.
    fn forward<B: Backend>(
        &self,
        be: &mut B,
        i: usize,
        at: &At<'_>,
        x: Reals,
        y: Reals,
    ) -> Result<()> {
        self.each_rows(i, at, x.len(), |branch, at, [from, n], _| {
            branch.forward(be, at, x.sub(from, n), y.sub(from, n))
        })
    }

    /// The vector-Jacobian product of branch `i` of a step, whose [`forward`](Self::forward) has
    /// been.
    fn backward<B: Backend>(
        &self,
        be: &mut B,
        i: usize,
        at: &At<'_>,
        x: Reals,
        [gy, gx]: [Reals; 2],
    ) -> Result<()> {
        self.each_rows(i, at, x.len(), |branch, at, [from, n], spare| {
            let [x, gy, gx] = [x, gy, gx].map(|of| of.sub(from, n));
            if !spare.is_empty() {
                branch.again(be, at, x, spare)?;
            }
            branch.vjp(be, at, x, gy, gx)
        })
    }

    /// Branches of a step.
    fn count(&self, call: &Call) -> usize {
        let (n, first) = (self.params.together(), call.block * self.params.together());
        P::COUNT * n.min(self.params.groups().saturating_sub(first))
    }

    /// The call of the block that has the `b`-th branch of a step.
    const fn inner(&self, call: &Call, b: usize) -> Call {
        let block = call.block * self.params.together() + b / P::COUNT;
        Call { block, chunk: Chunk { site: Site::Block(block), ..call.chunk }, ..*call }
    }

    const fn at<'a>(&'a self, call: &'a Call, frame: Reals, scratch: Reals) -> At<'a> {
        At { call, frame, scratch, params: &self.params }
    }

    /// The frame of branch `i` of a step, and the place of `m_i` before it.
    fn frames<B: Backend>(&self, call: &Call, i: usize) -> (Reals, Reals) {
        let (n, row) = (call.chunk.samples, self.tokens * self.width);
        let mut cut = Cut(call.frame);
        let mut middle = Reals::EMPTY;
        for j in 0..=i {
            if j > 0 {
                middle = cut.take(n * row);
            }
            // Frames do not depend on the backend's scratch.
            let frame = cut.take(n * self.own::<B>(j, 0, 1).frame);
            if j == i {
                return (frame, middle);
            }
        }
        (Reals::EMPTY, middle)
    }

    /// Where the first branch is called.
    pub(super) fn first_at<'a, B: Backend>(&'a self, call: &'a Call) -> At<'a> {
        self.at(call, self.frames::<B>(call, 0).0, call.scratch)
    }

    /// Branch `i` alone, for residual networks of another shape: `y = branch(x)`, both `[rows, d]`.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn branch<B: Backend>(
        &self,
        be: &mut B,
        i: usize,
        call: &Call,
        x: Reals,
        y: Reals,
    ) -> Result<()> {
        let at = self.at(call, self.frames::<B>(call, i).0, call.scratch);
        self.forward(be, i, &at, x, y)
    }

    /// The vector-Jacobian product of branch `i` alone ([`Branch::vjp`]), with the frame that
    /// [`branch`](Self::branch) left.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn branch_vjp<B: Backend>(
        &self,
        be: &mut B,
        i: usize,
        call: &Call,
        x: Reals,
        gy: Reals,
        gx: Reals,
    ) -> Result<()> {
        let at = self.at(call, self.frames::<B>(call, i).0, call.scratch);
        self.backward(be, i, &at, x, [gy, gx])
    }

    /// `h(x)`, where `run` computes branch `i` of the step.
    fn sum<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        h: Reals,
        run: impl Fn(&mut B, usize, &At<'_>, Reals, Reals) -> Result<()>,
    ) -> Result<()> {
        const { assert!(P::COUNT > 0, "a residual block has at least one branch") };
        let (mut m, mut rest) = (call.x, Cut(call.scratch));
        let out = rest.take(h.len());
        for i in 0..self.count(call) {
            let (frame, middle) = self.frames::<B>(call, i);
            let (y, scratch) = if i == 0 { (h, call.scratch) } else { (out, rest.0) };
            if i > 0 {
                let before = if i == 1 { h } else { out };
                be.copy_reals(m, middle)?;
                be.add(middle, before)?;
                m = middle;
            }
            let inner = self.inner(call, i);
            run(be, i, &self.at(&inner, frame, scratch), m, y)?;
            if i > 0 {
                be.add(h, out)?;
            }
        }
        Ok(())
    }

    /// The residual of one more token of each sample, at inference, in a call of blocks for one
    /// token: `h = h_k(x)` for `[samples, d]`.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn next<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        cached: &Cached<'_>,
        h: Reals,
    ) -> Result<()> {
        self.sum(be, call, h, |be, i, at, x, y| {
            self.branches.branch(i % P::COUNT).next(be, at, cached, x, y)
        })
    }
}

impl PreNorm {
    /// Where a call's residual has left keys and values: columns `at .. at + 2 d` of a row for each
    /// token.
    pub fn keys_values<B: Backend>(&self, call: &Call) -> Columns {
        self.branches.0.keys_values(&self.first_at::<B>(call))
    }
}

impl<P: Branches> Tensors for Residual<P> {
    fn each(&self, f: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        (0..P::COUNT).flat_map(|i| self.branches.tensors(i)).try_for_each(f)
    }
}

impl<B: Backend, P: Branches> Blocks<B> for Residual<P> {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        self.sum(be, call, h, |be, i, at, x, y| self.forward(be, i, at, x, y))
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        let mut scratch = Cut(call.scratch);
        let a = scratch.take(gh.len());
        be.fill_reals(a, B::Real::of(0.0))?;
        let count = self.count(call);
        for i in (1..count).rev() {
            let (frame, m) = self.frames::<B>(call, i);
            let mut rest = Cut(scratch.0);
            let gy = if i + 1 == count {
                gh
            } else {
                let copy = rest.take(gh.len());
                be.copy_reals(gh, copy)?;
                be.add(copy, a)?;
                copy
            };
            let inner = self.inner(call, i);
            let at = self.at(&inner, frame, rest.0);
            self.backward(be, i, &at, m, [gy, a])?;
        }
        be.add(gx, a)?;
        be.add(gh, a)?;
        let inner = self.inner(call, 0);
        // `a` is read.
        let at = self.at(&inner, self.frames::<B>(call, 0).0, call.scratch);
        self.backward(be, 0, &at, call.x, [gh, gx])
    }

    fn done(&mut self, be: &mut B, step: usize) -> Result<()> {
        if !self.finishes {
            return Ok(());
        }
        let u = self.updater.as_ref();
        self.params.finished(be, u, step, self)?;
        if step > 0 {
            return Ok(());
        }
        self.params.settle(be, u, self)?;
        // The next step has a learning rate of its own.
        self.updater = None;
        Ok(())
    }
}
