//! The pre-norm transformer block as a residual: `h(x) = f(x) + g(x + f(x))`, `f` attention, `g` MLP.

use super::{Params, Tensor, Updater, linear, linear_vjp, place};
use crate::arena::{Ints, Layout, Reals, product};
use crate::backend::{Attention, Backend, Columns, Gelu, Mask};
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
}

/// Number of parameter tensors of a block.
pub const BLOCK_TENSORS: usize = 12;

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

impl BlockShape {
    /// Checks the dimensions.
    ///
    /// # Errors
    /// [`Error::Setting`] names the first that is wrong; [`Error::TooLarge`] for sizes beyond the address space.
    pub const fn check(&self) -> Result<()> {
        let sizes = [("tokens", self.tokens), ("width", self.width), ("heads", self.heads), ("MLP width", self.inner)];
        let mut i = 0;
        while i < sizes.len() {
            if sizes[i].1 == 0 {
                return Err(Error::Setting { what: sizes[i].0, found: 0.0, possible: "1 or more" });
            }
            i += 1;
        }
        if !self.width.is_multiple_of(self.heads) {
            return Err(Error::Setting { what: "heads", found: self.heads as f64, possible: "a divisor of the width" });
        }
        let dropouts = [("attention dropout", self.attention_dropout), ("residual dropout", self.residual_dropout)];
        let mut i = 0;
        while i < dropouts.len() {
            let (what, p) = dropouts[i];
            if !(p >= 0.0 && p < 1.0) {
                return Err(Error::Setting { what, found: p, possible: "0 up to, not including, 1" });
            }
            i += 1;
        }
        ok!(product("block", &[self.width, 4, self.width]));
        ok!(product("block", &[self.width, 3, self.inner]));
        ok!(product("frame", &[self.tokens, 16, larger(self.width, larger(self.inner, self.heads))]));
        Ok(())
    }

    /// The parameter tensors of a block and the length of its group.
    pub const fn tensors(&self) -> ([Tensor; BLOCK_TENSORS], usize) {
        const fn t(name: &'static str, rows: usize, cols: usize, matrix: bool) -> Tensor {
            Tensor { name, rows, cols, matrix, offset: 0 }
        }
        let (d, i) = (self.width, self.inner);
        let mut tensors = [
            t("ln_1.weight", 1, d, false),
            t("ln_1.bias", 1, d, false),
            t("attn.c_attn.weight", d, 3 * d, true),
            t("attn.c_attn.bias", 1, 3 * d, false),
            t("attn.c_proj.weight", d, d, true),
            t("attn.c_proj.bias", 1, d, false),
            t("ln_2.weight", 1, d, false),
            t("ln_2.bias", 1, d, false),
            t("mlp.c_fc.weight", d, i, true),
            t("mlp.c_fc.bias", 1, i, false),
            t("mlp.c_proj.weight", i, d, true),
            t("mlp.c_proj.bias", 1, d, false),
        ];
        let len = place(&mut tensors);
        (tensors, len)
    }

    /// The attention of a block.
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
        }
    }

    /// What a block needs of its stack, for chunks of `chunk` samples.
    pub fn needs<B: Backend>(&self, chunk: usize, threads: usize) -> Needs {
        self.needs_with(B::attention_scratch(&self.attention(), chunk, threads))
    }

    /// The same for constant plans, where the backend's [`attention_scratch`](crate::NnOps::attention_scratch) is given.
    pub const fn needs_with(&self, attention_scratch: usize) -> Needs {
        let (t, d, i) = (self.tokens, self.width, self.inner);
        Needs {
            // ln_1, qkv, attention, x + f, ln_2: 7 d; c_fc before and after GELU: 2 i; statistics of both norms; lse.
            frame: t.saturating_mul(
                (d.saturating_mul(7)).saturating_add(i.saturating_mul(2)).saturating_add(self.heads).saturating_add(4),
            ),
            // Backward: one of d and du; and dact, whose place dqkv and datt take afterwards.
            scratch: t.saturating_mul(d.saturating_mul(2).saturating_add(larger(i, d.saturating_mul(4)))),
            fixed: attention_scratch,
        }
    }
}

/// `Ord::max` for constant functions.
const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

/// Cuts handles one after another from a longer one.
struct Cut(Reals);

impl Cut {
    fn take(&mut self, len: usize) -> Reals {
        let part = self.0.sub(0, len);
        self.0 = self.0.sub(len, self.0.len());
        part
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
    /// Where the gradients of the block being worked on go, tensor by tensor, instead of into `params`; empty for a
    /// matrix or bias that is frozen. (Both tensors of a norm have a gradient.)
    pub gradients: Option<[Reals; BLOCK_TENSORS]>,
    /// Padding: the number of tokens of every sample of the batch; empty where all are full.
    pub key_lens: Ints,
}

impl TransformerBlocks {
    /// Lays out parameters, gradients and optimizer state of `blocks` blocks; `rule` is `None` for inference only.
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
        let rule = match rule {
            Some(rule) => rule,
            None => Rule::Sgd { momentum: 0.0 },
        };
        ok!(rule.check());
        let updater = Updater { rule, weight_decay: 0.0, lr: 0.0, t: 1, scale: 1.0, fused };
        Ok(Self { shape, tensors, params, updater, gradients: None, key_lens: Ints::EMPTY })
    }

    /// The shape of a block.
    pub const fn shape(&self) -> &BlockShape {
        &self.shape
    }

    /// The tensors of a block.
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
        }
    }

    fn attention(&self, call: &Call) -> Attention {
        let key_lens = self.key_lens.sub(call.chunk.first, call.chunk.samples);
        let dropout = if call.train { self.shape.attention_dropout } else { 0.0 };
        Attention { key_lens, dropout, ..self.shape.attention() }
    }

    fn qkv(&self, of: Reals) -> [Columns; 3] {
        let d = self.shape.width;
        [0, 1, 2].map(|i| Columns { of, stride: 3 * d, at: i * d })
    }
}

impl<B: Backend> Blocks<B> for TransformerBlocks {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        let (s, frame, chunk) = (&self.shape, self.frame(call), &call.chunk);
        let (rows, drop) = (chunk.samples * s.tokens, call.train && s.residual_dropout > 0.0);
        let p = self.params.group(call.block);
        let w = |i: usize| self.tensors[i].of(p);
        let m = |i: usize| (p, self.tensors[i]);
        let mut scratch = Cut(call.scratch);
        let g = scratch.take(rows * s.width);

        // f = dropout(c_proj(attention(c_attn(ln_1(x)))))
        be.layer_norm(s.eps, w(LN_1_W), w(LN_1_B), call.x, frame.ln_1, frame.ln_1_stats)?;
        linear(be, rows, m(C_ATTN_W), w(C_ATTN_B), frame.ln_1, frame.qkv)?;
        let [q, k, v] = self.qkv(frame.qkv);
        be.attention(chunk, &self.attention(call), q, k, v, frame.attn, frame.lse, scratch.0)?;
        linear(be, rows, m(ATTN_PROJ_W), w(ATTN_PROJ_B), frame.attn, h)?;
        if drop {
            be.dropout(chunk, Draw::AttentionResidualDropout, s.residual_dropout, h)?;
        }
        be.copy_reals(call.x, frame.mid)?;
        be.add(frame.mid, h)?;

        // g = dropout(c_proj(gelu(c_fc(ln_2(x + f)))))
        be.layer_norm(s.eps, w(LN_2_W), w(LN_2_B), frame.mid, frame.ln_2, frame.ln_2_stats)?;
        linear(be, rows, m(C_FC_W), w(C_FC_B), frame.ln_2, frame.c_fc)?;
        be.gelu(s.gelu, frame.c_fc, frame.act)?;
        linear(be, rows, m(MLP_PROJ_W), w(MLP_PROJ_B), frame.act, g)?;
        if drop {
            be.dropout(chunk, Draw::MlpResidualDropout, s.residual_dropout, g)?;
        }

        // h = f + g
        be.add(h, g)
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        let (s, frame, chunk) = (&self.shape, self.frame(call), &call.chunk);
        let (rows, drop) = (chunk.samples * s.tokens, call.train && s.residual_dropout > 0.0);
        let (p, grad) = (self.params.group(call.block), self.params.gradient(call.block));
        let w = |i: usize| self.tensors[i].of(p);
        let m = |i: usize| (p, self.tensors[i]);
        let g = |i: usize| self.gradients.map_or_else(|| self.tensors[i].of(grad), |g| g[i]);
        let pair = |i: usize| (g(i), g(i + 1));
        let mut scratch = Cut(call.scratch);
        let d = scratch.take(rows * s.width);
        let dmid = scratch.take(rows * s.width);
        let mut late = Cut(scratch.take(rows * s.inner.max(4 * s.width)));
        let dact = late.0.sub(0, rows * s.inner);
        let dqkv = late.take(rows * 3 * s.width);
        let dattn = late.take(rows * s.width);

        // g(mid), with dg = gh
        let dg = if drop {
            be.copy_reals(gh, d)?;
            be.dropout(chunk, Draw::MlpResidualDropout, s.residual_dropout, d)?;
            d
        } else {
            gh
        };
        linear_vjp(be, rows, m(MLP_PROJ_W), pair(MLP_PROJ_W), frame.act, dg, dact)?;
        be.gelu_vjp(s.gelu, frame.c_fc, dact)?;
        linear_vjp(be, rows, m(C_FC_W), pair(C_FC_W), frame.ln_2, dact, d)?;
        be.fill_reals(dmid, crate::real::Real::of(0.0))?;
        be.layer_norm_vjp(w(LN_2_W), frame.mid, frame.ln_2_stats, d, dmid, g(LN_2_W), g(LN_2_B))?;

        // mid = x + f: dx += dmid, df = gh + dmid
        be.add(gx, dmid)?;
        be.add(gh, dmid)?;
        if drop {
            be.dropout(chunk, Draw::AttentionResidualDropout, s.residual_dropout, gh)?;
        }
        linear_vjp(be, rows, m(ATTN_PROJ_W), pair(ATTN_PROJ_W), frame.attn, gh, dattn)?;
        let ([q, k, v], [dq, dk, dv]) = (self.qkv(frame.qkv), self.qkv(dqkv));
        let a = self.attention(call);
        be.attention_vjp(chunk, &a, q, k, v, frame.attn, frame.lse, dattn, dq, dk, dv, scratch.0)?;
        linear_vjp(be, rows, m(C_ATTN_W), pair(C_ATTN_W), frame.ln_1, dqkv, d)?;
        be.layer_norm_vjp(w(LN_1_W), call.x, frame.ln_1_stats, d, gx, g(LN_1_W), g(LN_1_B))
    }

    fn done(&mut self, be: &mut B, block: usize) -> Result<()> {
        self.params.finished(be, &self.updater, Site::Block(block), block, &self.tensors)
    }
}
