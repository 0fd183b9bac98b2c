//! The pre-norm transformer block as a residual: `h(x) = f(x) + g(x + f(x))`, `f` attention, `g`
//! MLP.

use super::{Lora, LoraShape, Params, Tensor, Updater, linear, linear_vjp, place};
use crate::arena::{Category, Ints, Layout, Reals, Words, product};
use crate::backend::{Attention, Backend, Columns, Gelu, Half, Mask};
use crate::error::{Error, Result, Site, ok};
use crate::optim::Rule;
use crate::rng::Draw;
use crate::stack::{Blocks, Call, Needs};

/// Dimensions and constants of a block.
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
    /// Dropout of both branches' outputs.
    pub residual_dropout: f64,
    /// Dropout between the two layers of the MLP.
    pub hidden_dropout: f64,
    /// Whether `c_attn`, which gives q, k and v, has a bias.
    pub qkv_bias: bool,
    /// Whether the scores' factor is learned (`e^τ`, one `τ` a block) in place of `1/√head_dim`.
    pub temperature: bool,
}

/// Most parameter tensors of a block; those that a block does not have are empty.
pub const BLOCK_TENSORS: usize = 13;

const LN_1_W: usize = 0;
const LN_1_B: usize = 1;
const C_ATTN_W: usize = 2;
const C_ATTN_B: usize = 3;
const ATTN_PROJ_W: usize = 4;
const ATTN_PROJ_B: usize = 5;
const LN_2_W: usize = 6;
const LN_2_B: usize = 7;
const C_FC_W: usize = 8;
const C_FC_B: usize = 9;
const MLP_PROJ_W: usize = 10;
const MLP_PROJ_B: usize = 11;
const TEMPERATURE: usize = 12;

impl BlockShape {
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
        ok!(product(
            "frame",
            &[self.tokens, 16, larger(self.width, larger(self.inner, self.heads))]
        ));
        Ok(())
    }

    /// The parameter tensors of a block (empty ones for what it does not have) and the length of
    /// its group.
    pub const fn tensors(&self) -> ([Tensor; BLOCK_TENSORS], usize) {
        const fn t(name: &'static str, rows: usize, cols: usize, matrix: bool) -> Tensor {
            Tensor { name, rows, cols, matrix, offset: 0 }
        }
        let (d, i) = (self.width, self.inner);
        let mut tensors = [
            t("ln_1.weight", 1, d, false),
            t("ln_1.bias", 1, d, false),
            t("attn.c_attn.weight", d, 3 * d, true),
            t("attn.c_attn.bias", if self.qkv_bias { 1 } else { 0 }, 3 * d, false),
            t("attn.c_proj.weight", d, d, true),
            t("attn.c_proj.bias", 1, d, false),
            t("ln_2.weight", 1, d, false),
            t("ln_2.bias", 1, d, false),
            t("mlp.c_fc.weight", d, i, true),
            t("mlp.c_fc.bias", 1, i, false),
            t("mlp.c_proj.weight", i, d, true),
            t("mlp.c_proj.bias", 1, d, false),
            t("attn.temperature", if self.temperature { 1 } else { 0 }, 1, false),
        ];
        let len = place(&mut tensors);
        (tensors, len)
    }

    /// The attention of a block, without its temperature.
    pub const fn attention(&self) -> Attention {
        Attention {
            heads: self.heads,
            head_dim: match self.width.checked_div(self.heads) {
                Some(n) => n,
                None => 0,
            },
            queries: self.tokens,
            keys: self.tokens,
            mask: self.mask,
            key_lens: Ints::EMPTY,
            dropout: self.attention_dropout,
            temperature: Reals::EMPTY,
            temperature_grad: Reals::EMPTY,
        }
    }

    /// What a block needs of its stack, for chunks of `chunk` samples.
    pub fn needs<B: Backend>(&self, chunk: usize, threads: usize) -> Needs {
        self.needs_with(B::attention_scratch(&self.attention(), chunk, threads))
    }

    /// The same for constant plans, where the backend's
    /// [`attention_scratch`](crate::NnOps::attention_scratch) is given.
    pub const fn needs_with(&self, attention_scratch: usize) -> Needs {
        let (t, d, i) = (self.tokens, self.width, self.inner);
        Needs {
            // ln_1, qkv, attention, x + f, ln_2: 7 d; c_fc before and after GELU: 2 i; statistics
            // of both norms; lse.
            frame: t.saturating_mul(
                (d.saturating_mul(7))
                    .saturating_add(i.saturating_mul(2))
                    .saturating_add(self.heads)
                    .saturating_add(4),
            ),
            // Backward: dmid and d; and dact, whose place dqkv and dattn take afterwards.
            scratch: t
                .saturating_mul(d.saturating_mul(2).saturating_add(larger(i, d.saturating_mul(4)))),
            fixed: attention_scratch,
        }
    }
}

/// `Ord::max` for constant functions.
pub(super) const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

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
    /// `[samples, keys, 2 d]`.
    pub of: Reals,
    /// Most tokens of a sample.
    pub keys: usize,
    /// The place of the token that is added, from 0, for every sample.
    pub positions: &'a [usize],
    /// Tokens with that one, for every sample.
    pub lens: Ints,
}

/// Frozen matrices in 16 bits; each is widened into one place when it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Narrow {
    /// How they are stored.
    pub half: Half,
    /// Words of a block.
    group: usize,
    /// Matrices, block after block.
    values: Words,
    /// Room for the largest of them.
    wide: Reals,
}

impl Narrow {
    /// The words of matrix `t` of block `k`: `ceil(n/2)` for `n` values.
    pub const fn of(&self, k: usize, t: &Tensor) -> Words {
        self.values.sub(k * self.group + t.offset / 2, (t.rows * t.cols).div_ceil(2))
    }
}

/// The intermediates of one call, for `rows = samples · T` rows.
struct Frame {
    /// `[rows, 2]`, mean and rstd.
    ln_1_stats: Reals,
    /// `[rows, d]`.
    ln_1: Reals,
    /// `[rows, 3 d]`.
    qkv: Reals,
    /// `[rows, d]`.
    attn: Reals,
    /// `[samples, heads, T]`.
    lse: Reals,
    /// `x + f(x)`, `[rows, d]`.
    mid: Reals,
    /// `[rows, 2]`.
    ln_2_stats: Reals,
    /// `[rows, d]`.
    ln_2: Reals,
    /// `[rows, inner]`, before GELU.
    c_fc: Reals,
    /// `[rows, inner]`, after GELU.
    act: Reals,
    /// `[rows, 2r]` of adapters.
    lora: Reals,
}

/// `K` transformer blocks with their parameters: a user of [`crate::stack::Stack`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TransformerBlocks {
    shape: BlockShape,
    tensors: [Tensor; BLOCK_TENSORS],
    /// Parameters, one group a block.
    pub params: Params,
    /// The optimizer of the running step.
    pub updater: Updater,
    /// Where the gradients of the block being worked on go, tensor by tensor, instead of into
    /// `params`; empty for a matrix or bias that is frozen. (Both tensors of a norm have a
    /// gradient.)
    pub gradients: Option<[Reals; BLOCK_TENSORS]>,
    /// Padding: the number of tokens of every sample of the batch; empty where all are full.
    pub key_lens: Ints,
    /// Frozen matrices that are stored in 16 bits; `params` has the rest.
    pub narrow: Option<Narrow>,
    /// Adapters, which are trained in place of `params`.
    pub lora: Option<Lora>,
    /// Whether a block that is done is [finished](Params::finished): its gradient has all that the
    /// step adds to it. Not so in the micro-batches of a step before the last.
    pub finishes: bool,
}

impl TransformerBlocks {
    /// Lays out parameters, gradients and optimizer state of `blocks` blocks; `rule` is `None` for
    /// inference only.
    ///
    /// # Errors
    /// Those of [`BlockShape::check`] and [`Rule::check`].
    pub const fn layout(
        shape: BlockShape,
        blocks: usize,
        rule: Option<Rule>,
        fused: bool,
        layout: &mut Layout,
    ) -> Result<Self> {
        ok!(shape.check());
        let (tensors, len) = shape.tensors();
        let params = ok!(Params::layout(layout, blocks, len, BLOCK_TENSORS, rule, fused));
        Self::new(shape, tensors, params, None, rule, fused)
    }

    /// Lays out `blocks` blocks whose own parameters are frozen, their matrices in 16 bits where
    /// `half` is given, and adapters that are trained by `rule`.
    ///
    /// # Errors
    /// Those of [`BlockShape::check`], [`Rule::check`] and [`Lora::layout`]; [`Error::Setting`]
    /// with a learned temperature, which has no frozen form.
    pub const fn layout_frozen(
        shape: BlockShape,
        blocks: usize,
        half: Option<Half>,
        lora: LoraShape,
        rule: Option<Rule>,
        fused: bool,
        layout: &mut Layout,
    ) -> Result<Self> {
        ok!(shape.check());
        if shape.temperature {
            return Err(Error::setting("temperature", 1.0, "none in frozen blocks"));
        }
        let (mut tensors, mut len) = shape.tensors();
        let mut narrow = None;
        if let Some(half) = half {
            // Matrices have their places among the 16-bit values, all others among the reals.
            let (mut at, mut largest, mut i) = ([0_usize; 2], 0, 0);
            while i < tensors.len() {
                let t = &mut tensors[i];
                let place = t.matrix as usize;
                t.offset = at[place];
                let n = t.rows * t.cols;
                at[place] += n.div_ceil(2 * Layout::ALIGN) * 2 * Layout::ALIGN;
                if t.matrix {
                    largest = larger(largest, n);
                }
                i += 1;
            }
            len = at[0];
            let group = at[1] / 2;
            let values =
                layout.words(Category::Frozen, ok!(product("frozen matrices", &[blocks, group])));
            narrow = Some(Narrow {
                half,
                group,
                values,
                wide: layout.reals(Category::Workspace, largest),
            });
        }
        let params = ok!(Params::layout_frozen(layout, blocks, len));
        let mut new = ok!(Self::new(shape, tensors, params, narrow, rule, fused));
        new.lora = Some(ok!(Lora::layout(lora, shape.width, blocks, rule, fused, layout)));
        Ok(new)
    }

    const fn new(
        shape: BlockShape,
        tensors: [Tensor; BLOCK_TENSORS],
        params: Params,
        narrow: Option<Narrow>,
        rule: Option<Rule>,
        fused: bool,
    ) -> Result<Self> {
        let rule = match rule {
            Some(rule) => rule,
            None => Rule::Sgd { momentum: 0.0 },
        };
        ok!(rule.check());
        let updater = Updater { rule, weight_decay: 0.0, lr: 0.0, t: 1, scale: 1.0, fused };
        Ok(Self {
            shape,
            tensors,
            params,
            updater,
            gradients: None,
            key_lens: Ints::EMPTY,
            narrow,
            lora: None,
            finishes: true,
        })
    }

    /// What a block needs of its stack, for chunks of `chunk` samples: that of its shape, and of
    /// its adapters.
    pub fn needs<B: Backend>(&self, chunk: usize, threads: usize) -> Needs {
        let mut needs = self.shape.needs::<B>(chunk, threads);
        if let Some(lora) = &self.lora {
            let per_sample = self.shape.tokens.saturating_mul(lora.rows());
            needs.frame = needs.frame.saturating_add(per_sample);
            needs.scratch = needs.scratch.saturating_add(per_sample);
            needs.fixed = needs.fixed.saturating_add(2 * lora.whole());
        }
        needs
    }

    /// What is trained: the adapters where there are any, else the blocks' own parameters.
    pub fn trained(&self) -> (&Params, &[Tensor]) {
        match &self.lora {
            Some(lora) => (&lora.params, lora.tensors()),
            None => (&self.params, &self.tensors),
        }
    }

    /// The same blocks, with the same parameters, for samples of another length.
    #[must_use]
    pub const fn with_tokens(mut self, tokens: usize) -> Self {
        self.shape.tokens = tokens;
        self
    }

    /// Where `x + f(x)` is in a call's frame.
    pub(super) fn mid(&self, call: &Call) -> Reals {
        self.frame(call).mid
    }

    /// The shape of a block.
    pub const fn shape(&self) -> &BlockShape {
        &self.shape
    }

    /// The tensors of a block; one that it does not have is empty.
    pub const fn tensors(&self) -> &[Tensor; BLOCK_TENSORS] {
        &self.tensors
    }

    fn frame(&self, call: &Call) -> Frame {
        let (n, rows) = (call.chunk.samples, call.chunk.samples * self.shape.tokens);
        let (d, i) = (self.shape.width, self.shape.inner);
        let mut cut = Cut(call.frame);
        Frame {
            ln_1: cut.take(rows * d),
            qkv: cut.take(rows * 3 * d),
            attn: cut.take(rows * d),
            mid: cut.take(rows * d),
            ln_2: cut.take(rows * d),
            c_fc: cut.take(rows * i),
            act: cut.take(rows * i),
            lse: cut.take(n * self.shape.heads * self.shape.tokens),
            ln_1_stats: cut.take(2 * rows),
            ln_2_stats: cut.take(2 * rows),
            lora: cut.take(rows * self.lora.map_or(0, |l| l.rows())),
        }
    }

    fn attention(&self, call: &Call) -> Attention {
        let key_lens = self.key_lens.sub(call.chunk.first, call.chunk.samples);
        let dropout = if call.train { self.shape.attention_dropout } else { 0.0 };
        // Without training there is no gradient, and the handle is empty.
        let (temperature, temperature_grad) =
            (self.value(call, TEMPERATURE), self.slope(call, TEMPERATURE));
        Attention { key_lens, dropout, temperature, temperature_grad, ..self.shape.attention() }
    }

    fn qkv(&self, of: Reals) -> [Columns; 3] {
        let d = self.shape.width;
        [0, 1, 2].map(|i| Columns { of, stride: 3 * d, at: i * d })
    }

    /// Matrix `i` of the call's block: its group and its place. One that is stored in 16 bits is
    /// there until the next one is asked for.
    fn matrix<B: Backend>(&self, be: &mut B, call: &Call, i: usize) -> Result<(Reals, Tensor)> {
        let t = self.tensors[i];
        let Some(narrow) = &self.narrow else { return Ok((self.params.group(call.block), t)) };
        let wide = narrow.wide.sub(0, t.rows * t.cols);
        be.widen(narrow.half, narrow.of(call.block, &t), wide)?;
        Ok((wide, Tensor { offset: 0, ..t }))
    }

    /// Tensor `i` of the call's block, and its gradient.
    fn value(&self, call: &Call, i: usize) -> Reals {
        self.tensors[i].of(self.params.group(call.block))
    }

    fn slope(&self, call: &Call, i: usize) -> Reals {
        match &self.gradients {
            Some(gradients) => gradients[i],
            None => self.tensors[i].of(self.params.gradient(call.block)),
        }
    }

    /// Rows of a call, and whether the branches' outputs are dropped.
    fn rows(&self, call: &Call) -> (usize, bool) {
        (call.chunk.samples * self.shape.tokens, call.train && self.shape.residual_dropout > 0.0)
    }

    /// `qkv = c_attn(ln_1(x))`, with adapters where there are any.
    fn c_attn<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        rows: usize,
        x: Reals,
        frame: &Frame,
    ) -> Result<()> {
        let w = |i| self.value(call, i);
        be.layer_norm(self.shape.eps, w(LN_1_W), w(LN_1_B), x, frame.ln_1, frame.ln_1_stats)?;
        let m = self.matrix(be, call, C_ATTN_W)?;
        linear(be, rows, m, w(C_ATTN_B), frame.ln_1, frame.qkv)?;
        match &self.lora {
            Some(lora) => lora.forward(
                be,
                (call.block, rows),
                frame.ln_1,
                frame.lora,
                frame.qkv,
                call.scratch,
            ),
            None => Ok(()),
        }
    }

    /// `f(x) = dropout(c_proj(attention(c_attn(ln_1(x)))))`: the attention branch alone, for
    /// residual networks of another shape. `x` and `out` are `[rows, d]`; intermediates go to the
    /// frame, beside those of the MLP branch.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn attention_branch<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        x: Reals,
        out: Reals,
    ) -> Result<()> {
        let (s, frame, (rows, drop)) = (&self.shape, self.frame(call), self.rows(call));
        self.c_attn(be, call, rows, x, &frame)?;
        let [q, k, v] = self.qkv(frame.qkv);
        be.attention(
            &call.chunk,
            &self.attention(call),
            q,
            k,
            v,
            frame.attn,
            frame.lse,
            call.scratch,
        )?;
        let m = self.matrix(be, call, ATTN_PROJ_W)?;
        linear(be, rows, m, self.value(call, ATTN_PROJ_B), frame.attn, out)?;
        if drop {
            be.dropout(&call.chunk, Draw::AttentionResidualDropout, s.residual_dropout, out)?;
        }
        Ok(())
    }

    /// The attention branch for one more token of each sample, at inference: `x` and `out` are
    /// `[samples, d]`, in a call of blocks [`with_tokens`](Self::with_tokens)`(1)`. Keys and values
    /// of the tokens before are in `cached`, `[samples, keys, 2 d]`, at positions below the
    /// sample's own, where this token's are put; `lens` says one more.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn next_attention_branch<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        cached: &Cached<'_>,
        x: Reals,
        out: Reals,
    ) -> Result<()> {
        let (s, frame, rows) = (&self.shape, self.frame(call), call.chunk.samples);
        let (d, keys) = (s.width, cached.keys);
        self.c_attn(be, call, rows, x, &frame)?;
        if cached.positions.len() != rows {
            return Err(Error::Shape {
                what: "cache: positions",
                expected: rows,
                found: cached.positions.len(),
            });
        }
        for (row, &position) in cached.positions.iter().enumerate() {
            let place = (row * keys + position) * 2 * d;
            be.copy_reals(frame.qkv.sub(row * 3 * d + d, 2 * d), cached.of.sub(place, 2 * d))?;
        }
        let [q, ..] = self.qkv(frame.qkv);
        let [k, v] = [0, d].map(|at| Columns { of: cached.of, stride: 2 * d, at });
        let (mask, key_lens, temperature) =
            (Mask::Full, cached.lens, self.value(call, TEMPERATURE));
        let a = Attention {
            queries: 1,
            keys,
            mask,
            key_lens,
            dropout: 0.0,
            temperature,
            ..s.attention()
        };
        be.attention(&call.chunk, &a, q, k, v, frame.attn, frame.lse, call.scratch)?;
        let m = self.matrix(be, call, ATTN_PROJ_W)?;
        linear(be, rows, m, self.value(call, ATTN_PROJ_B), frame.attn, out)
    }

    /// The residual `h(x) = f(x) + g(x + f(x))` of one more token of each sample, at inference; as
    /// [`next_attention_branch`](Self::next_attention_branch).
    ///
    /// # Errors
    /// Those of the backend.
    pub fn next<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        cached: &Cached<'_>,
        h: Reals,
    ) -> Result<()> {
        let (mid, g) = (self.mid(call), call.scratch.sub(0, h.len()));
        self.next_attention_branch(be, call, cached, call.x, h)?;
        be.copy_reals(call.x, mid)?;
        be.add(mid, h)?;
        self.mlp_branch(be, call, mid, g)?;
        be.add(h, g)
    }

    /// Where a call's residual has left keys and values: columns `at .. at + 2 d` of a row for each
    /// token.
    pub fn keys_values(&self, call: &Call) -> Columns {
        let [_, keys, _] = self.qkv(self.frame(call).qkv);
        keys
    }

    /// `g(x) = dropout(c_proj(dropout(gelu(c_fc(ln_2(x))))))`: the MLP branch alone.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn mlp_branch<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        x: Reals,
        out: Reals,
    ) -> Result<()> {
        let (s, frame, (rows, drop)) = (&self.shape, self.frame(call), self.rows(call));
        let w = |i| self.value(call, i);
        be.layer_norm(s.eps, w(LN_2_W), w(LN_2_B), x, frame.ln_2, frame.ln_2_stats)?;
        let m = self.matrix(be, call, C_FC_W)?;
        linear(be, rows, m, w(C_FC_B), frame.ln_2, frame.c_fc)?;
        be.gelu(s.gelu, frame.c_fc, frame.act)?;
        if call.train && s.hidden_dropout > 0.0 {
            be.dropout(&call.chunk, Draw::MlpHiddenDropout, s.hidden_dropout, frame.act)?;
        }
        let m = self.matrix(be, call, MLP_PROJ_W)?;
        linear(be, rows, m, w(MLP_PROJ_B), frame.act, out)?;
        if drop {
            be.dropout(&call.chunk, Draw::MlpResidualDropout, s.residual_dropout, out)?;
        }
        Ok(())
    }

    /// The product of [`attention_branch`](Self::attention_branch) with its frame: *adds*
    /// `J_f(x)ᵀ·gout` to `gx`; `gout` is overwritten. `scratch` is free for use.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn attention_branch_vjp<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        x: Reals,
        gout: Reals,
        gx: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (s, frame, (rows, drop)) = (&self.shape, self.frame(call), self.rows(call));
        let (w, g) = (|i| self.value(call, i), |i| self.slope(call, i));
        let pair = |i: usize| (g(i), g(i + 1));
        let mut scratch = Cut(scratch);
        let d = scratch.take(rows * s.width);
        let dqkv = scratch.take(rows * 3 * s.width);
        // Once the attention is through, its gradient and its scratch make room for the adapters'.
        let rest = scratch.0;
        let dattn = scratch.take(rows * s.width);
        if drop {
            be.dropout(&call.chunk, Draw::AttentionResidualDropout, s.residual_dropout, gout)?;
        }
        let m = self.matrix(be, call, ATTN_PROJ_W)?;
        linear_vjp(be, rows, m, pair(ATTN_PROJ_W), frame.attn, gout, dattn)?;
        let ([q, k, v], [dq, dk, dv]) = (self.qkv(frame.qkv), self.qkv(dqkv));
        let a = self.attention(call);
        be.attention_vjp(
            &call.chunk,
            &a,
            q,
            k,
            v,
            frame.attn,
            frame.lse,
            dattn,
            dq,
            dk,
            dv,
            scratch.0,
        )?;
        let m = self.matrix(be, call, C_ATTN_W)?;
        linear_vjp(be, rows, m, pair(C_ATTN_W), frame.ln_1, dqkv, d)?;
        if let Some(lora) = &self.lora {
            lora.backward(be, (call.block, rows), frame.ln_1, frame.lora, dqkv, d, rest)?;
        }
        be.layer_norm_vjp(w(LN_1_W), x, frame.ln_1_stats, d, gx, g(LN_1_W), g(LN_1_B))
    }

    /// The product of [`mlp_branch`](Self::mlp_branch) with its frame: *adds* `J_g(x)ᵀ·gout` to
    /// `gx`; `gout` stays.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn mlp_branch_vjp<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        x: Reals,
        gout: Reals,
        gx: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (s, frame, (rows, drop)) = (&self.shape, self.frame(call), self.rows(call));
        let (w, g) = (|i| self.value(call, i), |i| self.slope(call, i));
        let pair = |i: usize| (g(i), g(i + 1));
        let mut scratch = Cut(scratch);
        let d = scratch.take(rows * s.width);
        let dact = scratch.take(rows * s.inner);
        let dg = if drop {
            be.copy_reals(gout, d)?;
            be.dropout(&call.chunk, Draw::MlpResidualDropout, s.residual_dropout, d)?;
            d
        } else {
            gout
        };
        let m = self.matrix(be, call, MLP_PROJ_W)?;
        linear_vjp(be, rows, m, pair(MLP_PROJ_W), frame.act, dg, dact)?;
        if call.train && s.hidden_dropout > 0.0 {
            be.dropout(&call.chunk, Draw::MlpHiddenDropout, s.hidden_dropout, dact)?;
        }
        be.gelu_vjp(s.gelu, frame.c_fc, dact)?;
        let m = self.matrix(be, call, C_FC_W)?;
        linear_vjp(be, rows, m, pair(C_FC_W), frame.ln_2, dact, d)?;
        be.layer_norm_vjp(w(LN_2_W), x, frame.ln_2_stats, d, gx, g(LN_2_W), g(LN_2_B))
    }
}

impl<B: Backend> Blocks<B> for TransformerBlocks {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        let mid = self.frame(call).mid;
        // The attention branch is done with the scratch when the MLP branch's output goes there.
        let g = call.scratch.sub(0, h.len());
        // h = f(x) + g(x + f(x))
        self.attention_branch(be, call, call.x, h)?;
        be.copy_reals(call.x, mid)?;
        be.add(mid, h)?;
        self.mlp_branch(be, call, mid, g)?;
        be.add(h, g)
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        let mid = self.frame(call).mid;
        let mut scratch = Cut(call.scratch);
        let dmid = scratch.take(gh.len());
        be.fill_reals(dmid, crate::real::Real::of(0.0))?;
        self.mlp_branch_vjp(be, call, mid, gh, dmid, scratch.0)?;
        // mid = x + f: dx += dmid, df = gh + dmid
        be.add(gx, dmid)?;
        be.add(gh, dmid)?;
        self.attention_branch_vjp(be, call, call.x, gh, gx, scratch.0)
    }

    fn done(&mut self, be: &mut B, block: usize) -> Result<()> {
        if !self.finishes {
            return Ok(());
        }
        let (params, tensors) = self.trained();
        params.finished(be, &self.updater, Site::Block(block), block, tensors)
    }
}
