//! The pre-norm decoder block as a residual: self-attention `f`, cross-attention `c` and MLP `g`,
//! composed:
//!
//! ```text
//! a = x + f(x)          f: dropout(c_proj(attention(c_attn(ln_1(x)))))
//! b = a + c(a, memory)  c: dropout(c_proj(attention(q(ln_cross(a)), k and v(memory))))
//! h = f(x) + c(a, memory) + g(b)
//! ```
//!
//! `memory` is the encoder's output, the [`Context`](crate::stack::Context) of the stack; its
//! gradient adds up over blocks. Its keys and values are computed anew in every block and pass:
//! nothing of it is kept.

use super::block::{Cut, larger};
use super::{Cached, Params, Tensor, TransformerBlocks, linear, linear_vjp, place};
use crate::arena::{Ints, Layout, Reals};
use crate::backend::{Attention, Backend, Chunk, Columns, Mask, Order, Product};
use crate::error::{Error, Result, Site, ok};
use crate::layers::BlockShape;
use crate::optim::Rule;
use crate::rng::Draw;
use crate::stack::{Blocks, Call, Context, Needs, Stack};

/// Parameter tensors of a block's cross-attention.
pub const CROSS_TENSORS: usize = 8;

const LN_W: usize = 0;
const LN_B: usize = 1;
const Q_W: usize = 2;
const Q_B: usize = 3;
const KV_W: usize = 4;
const KV_B: usize = 5;
const PROJ_W: usize = 6;
const PROJ_B: usize = 7;

/// The intermediates of cross-attention in one call, for `rows` rows and `keys` rows of the
/// context.
struct Frame {
    /// `b = a + c(a)`, `[rows, d]`.
    mid: Reals,
    /// `[rows, d]`.
    ln: Reals,
    /// `[rows, 2]`, mean and rstd.
    stats: Reals,
    /// `[rows, d]`.
    q: Reals,
    /// `[keys, 2 d]`.
    kv: Reals,
    /// `[rows, d]`.
    attn: Reals,
    /// `[samples, heads, T]`.
    lse: Reals,
}

/// `K` decoder blocks with their parameters: a user of [`crate::stack::Stack`] with a context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecoderBlocks {
    /// Self-attention and MLP.
    pub own: TransformerBlocks,
    /// Parameters of cross-attention, one group a block.
    pub cross: Params,
    tensors: [Tensor; CROSS_TENSORS],
    /// Positions `S` of a sample's context.
    pub keys: usize,
    /// Padding of the context: its number of positions in every sample of the batch; empty where
    /// all are there.
    pub context_lens: Ints,
}

impl DecoderBlocks {
    /// Lays out parameters, gradients and optimizer state of `blocks` blocks over a context of
    /// `keys` positions a sample; `rule` is `None` for inference only. Cross-attention has the
    /// heads and the dropout of self-attention.
    ///
    /// # Errors
    /// As [`TransformerBlocks::layout`]; [`Error::Setting`] for a context of no position.
    pub const fn layout(
        shape: BlockShape,
        keys: usize,
        blocks: usize,
        rule: Option<Rule>,
        fused: bool,
        layout: &mut Layout,
    ) -> Result<Self> {
        if keys == 0 {
            return Err(Error::setting("positions of the context", 0.0, "1 or more"));
        }
        let own = ok!(TransformerBlocks::layout(shape, blocks, rule, fused, layout));
        let (tensors, len) = Self::cross_tensors(&shape);
        let cross = ok!(Params::layout(layout, blocks, len, CROSS_TENSORS, rule, fused));
        Ok(Self { own, cross, tensors, keys, context_lens: Ints::EMPTY })
    }

    const fn cross_tensors(shape: &BlockShape) -> ([Tensor; CROSS_TENSORS], usize) {
        const fn t(name: &'static str, rows: usize, cols: usize, matrix: bool) -> Tensor {
            Tensor { name, rows, cols, matrix, offset: 0 }
        }
        let d = shape.width;
        let mut tensors = [
            t("ln_cross.weight", 1, d, false),
            t("ln_cross.bias", 1, d, false),
            t("cross.q.weight", d, d, true),
            t("cross.q.bias", 1, d, false),
            t("cross.kv.weight", d, 2 * d, true),
            t("cross.kv.bias", 1, 2 * d, false),
            t("cross.c_proj.weight", d, d, true),
            t("cross.c_proj.bias", 1, d, false),
        ];
        let len = place(&mut tensors);
        (tensors, len)
    }

    /// The same blocks, with the same parameters, for samples of `tokens` tokens and a context of
    /// `keys` positions.
    #[must_use]
    pub const fn with_tokens(mut self, tokens: usize, keys: usize) -> Self {
        self.own = self.own.with_tokens(tokens);
        self.keys = keys;
        self
    }

    /// The tensors of a block's cross-attention.
    pub const fn tensors(&self) -> &[Tensor; CROSS_TENSORS] {
        &self.tensors
    }

    /// Cross-attention of a block: `queries` rows of a sample over the context, without padding and
    /// dropout.
    pub const fn attention(&self, queries: usize) -> Attention {
        Attention {
            mask: Mask::Full,
            queries,
            keys: self.keys,
            dropout: 0.0,
            ..self.own.shape().attention()
        }
    }

    /// What a block needs of its stack, for chunks of `chunk` samples.
    pub fn needs<B: Backend>(&self, chunk: usize, threads: usize) -> Needs {
        let shape = self.own.shape();
        let (own, t, d) = (shape.needs::<B>(chunk, threads), shape.tokens, shape.width);
        let keys = self.keys.saturating_mul(d);
        Needs {
            // mid, ln, q, attention: 4 d; statistics; lse; keys and values.
            frame: (own.frame)
                .saturating_add(t.saturating_mul(
                    d.saturating_mul(4).saturating_add(shape.heads).saturating_add(2),
                ))
                .saturating_add(keys.saturating_mul(2)),
            // Backward: ga, gc, dln, dq and dattn; dkv.
            scratch: larger(
                own.scratch,
                t.saturating_mul(d).saturating_mul(5).saturating_add(keys.saturating_mul(2)),
            ),
            fixed: larger(own.fixed, B::attention_scratch(&self.attention(t), chunk, threads)),
        }
    }

    /// The call as self-attention and MLP see it, whose frame is the first part of the frame, and
    /// what is left.
    fn parts(&self, call: &Call) -> (Call, Frame) {
        let s = self.own.shape();
        let (n, d) = (call.chunk.samples, s.width);
        let (rows, keys) = (n * s.tokens, n * self.keys);
        // The fixed scratch does not count here.
        let own = s.needs_with(0).frame * n;
        let mut cut = Cut(call.frame.sub(own, call.frame.len()));
        let frame = Frame {
            mid: cut.take(rows * d),
            ln: cut.take(rows * d),
            q: cut.take(rows * d),
            attn: cut.take(rows * d),
            kv: cut.take(2 * keys * d),
            lse: cut.take(n * s.heads * s.tokens),
            stats: cut.take(2 * rows),
        };
        (Call { frame: call.frame.sub(0, own), ..*call }, frame)
    }

    /// Parameter tensor `i` of the cross-attention of block `k`.
    fn value(&self, k: usize, i: usize) -> Reals {
        self.tensors[i].of(self.cross.group(k))
    }

    fn weight(&self, k: usize, i: usize) -> (Reals, Tensor) {
        (self.cross.group(k), self.tensors[i])
    }

    /// Cross-attention draws as a stack of its own: its dropout is not that of self-attention.
    fn at(chunk: &Chunk) -> Chunk {
        Chunk { stack: chunk.stack | 0x80, ..*chunk }
    }

    fn attention_of(&self, call: &Call) -> Attention {
        let key_lens = self.context_lens.sub(call.chunk.first, call.chunk.samples);
        let s = self.own.shape();
        let dropout = if call.train { s.attention_dropout } else { 0.0 };
        Attention { key_lens, dropout, ..self.attention(s.tokens) }
    }

    fn columns(&self, q: Reals, kv: Reals) -> [Columns; 3] {
        let d = self.own.shape().width;
        [
            Columns { of: q, stride: d, at: 0 },
            Columns { of: kv, stride: 2 * d, at: 0 },
            Columns { of: kv, stride: 2 * d, at: d },
        ]
    }

    /// Keys and values of some rows of the context, for the cross-attention of block `k`: `[rows, 2
    /// d]`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn keys_values<B: Backend>(
        &self,
        be: &mut B,
        k: usize,
        context: Reals,
        kv: Reals,
    ) -> Result<()> {
        let rows = context.len().checked_div(self.own.shape().width).unwrap_or(0);
        linear(be, rows, self.weight(k, KV_W), self.value(k, KV_B), context, kv)
    }

    /// Norm and queries of some rows, for the cross-attention of block `k`: `ln` and `q` are
    /// `[rows, d]`.
    ///
    /// # Errors
    /// Those of the backend.
    fn queries<B: Backend>(
        &self,
        be: &mut B,
        k: usize,
        x: Reals,
        ln: Reals,
        stats: Reals,
        q: Reals,
    ) -> Result<()> {
        let s = self.own.shape();
        let rows = x.len().checked_div(s.width).unwrap_or(0);
        be.layer_norm(s.eps, self.value(k, LN_W), self.value(k, LN_B), x, ln, stats)?;
        linear(be, rows, self.weight(k, Q_W), self.value(k, Q_B), ln, q)
    }

    /// The last layer of the cross-attention of block `k`.
    ///
    /// # Errors
    /// Those of the backend.
    fn project<B: Backend>(&self, be: &mut B, k: usize, attn: Reals, out: Reals) -> Result<()> {
        let rows = attn.len().checked_div(self.own.shape().width).unwrap_or(0);
        linear(be, rows, self.weight(k, PROJ_W), self.value(k, PROJ_B), attn, out)
    }

    /// `c(x, memory)`.
    fn cross<B: Backend>(&self, be: &mut B, call: &Call, x: Reals, out: Reals) -> Result<()> {
        let (s, context, frame) = (self.own.shape(), context(call)?, self.parts(call).1);
        let (k, chunk) = (call.block, Self::at(&call.chunk));
        self.queries(be, k, x, frame.ln, frame.stats, frame.q)?;
        self.keys_values(be, k, context.value, frame.kv)?;
        let [q, keys, values] = self.columns(frame.q, frame.kv);
        be.attention(
            &chunk,
            &self.attention_of(call),
            q,
            keys,
            values,
            frame.attn,
            frame.lse,
            call.scratch,
        )?;
        self.project(be, k, frame.attn, out)?;
        if call.train && s.residual_dropout > 0.0 {
            be.dropout(&chunk, Draw::AttentionResidualDropout, s.residual_dropout, out)?;
        }
        Ok(())
    }

    /// *Adds* `J_c(x)ᵀ·gout` to `gx` and to the context's gradient; `gout` is overwritten.
    fn cross_vjp<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        x: Reals,
        gout: Reals,
        gx: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let (s, context, frame) = (self.own.shape(), context(call)?, self.parts(call).1);
        let (k, chunk, d) = (call.block, Self::at(&call.chunk), s.width);
        let (rows, keys) = (call.chunk.samples * s.tokens, call.chunk.samples * self.keys);
        let slope = |i: usize| self.tensors[i].of(self.cross.gradient(k));
        let pair = |i: usize| (slope(i), slope(i + 1));
        let mut scratch = Cut(scratch);
        let [dln, dq, dattn] = [0; 3].map(|_| scratch.take(rows * d));
        let dkv = scratch.take(2 * keys * d);
        if call.train && s.residual_dropout > 0.0 {
            be.dropout(&chunk, Draw::AttentionResidualDropout, s.residual_dropout, gout)?;
        }
        linear_vjp(be, rows, self.weight(k, PROJ_W), pair(PROJ_W), frame.attn, gout, dattn)?;
        let ([q, key, value], [dqs, dks, dvs]) =
            (self.columns(frame.q, frame.kv), self.columns(dq, dkv));
        let a = self.attention_of(call);
        be.attention_vjp(
            &chunk, &a, q, key, value, frame.attn, frame.lse, dattn, dqs, dks, dvs, scratch.0,
        )?;
        linear_vjp(be, keys, self.weight(k, KV_W), pair(KV_W), context.value, dkv, Reals::EMPTY)?;
        let p = Product {
            rows: keys,
            cols: d,
            inner: 2 * d,
            a: Order::Plain,
            b: Order::Transposed,
            accumulate: true,
        };
        be.matmul(&p, dkv, self.value(k, KV_W), None, context.grad)?;
        linear_vjp(be, rows, self.weight(k, Q_W), pair(Q_W), frame.ln, dq, dln)?;
        be.layer_norm_vjp(self.value(k, LN_W), x, frame.stats, dln, gx, slope(LN_W), slope(LN_B))
    }
}

impl DecoderBlocks {
    /// The residual of one more token, at inference: `h = h_k(x)` for `[rows, d]`, where the rows
    /// of a sample of the context are `beams` hypotheses one after the other. The blocks are those
    /// [`with_tokens`](Self::with_tokens)`(1, S)`; `call` has `rows` samples; `kv` holds the
    /// context's [`keys_values`](Self::keys_values) in this block, and `context_lens` one length
    /// for each of its samples.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn next<B: Backend>(
        &self,
        be: &mut B,
        call: &Call,
        cached: &Cached<'_>,
        (kv, beams): (Reals, usize),
        h: Reals,
    ) -> Result<()> {
        let (own, frame) = self.parts(call);
        let (k, a) = (call.block, self.own.mid(&own));
        let out = call.scratch.sub(0, h.len());
        self.own.next_attention_branch(be, &own, cached, call.x, h)?;
        be.copy_reals(call.x, a)?;
        be.add(a, h)?;
        self.queries(be, k, a, frame.ln, frame.stats, frame.q)?;
        let [q, keys, values] = self.columns(frame.q, kv);
        // The hypotheses of a sentence are queries over the same keys.
        let samples = call.chunk.samples.checked_div(beams).unwrap_or(0);
        let (chunk, key_lens) =
            (Chunk { samples, ..call.chunk }, self.context_lens.sub(0, samples));
        let attention = Attention { key_lens, ..self.attention(beams) };
        be.attention(&chunk, &attention, q, keys, values, frame.attn, frame.lse, call.scratch)?;
        self.project(be, k, frame.attn, out)?;
        be.add(h, out)?;
        be.copy_reals(a, frame.mid)?;
        be.add(frame.mid, out)?;
        self.own.mlp_branch(be, &own, frame.mid, out)?;
        be.add(h, out)
    }
}

fn context(call: &Call) -> Result<Context> {
    call.context.ok_or(Error::unfit("context", "missing", "one, for a decoder"))
}

impl<B: Backend> Blocks<B> for DecoderBlocks {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        let (own, frame) = self.parts(call);
        let a = self.own.mid(&own);
        // A branch is done with the scratch when the next one's output goes there.
        let out = call.scratch.sub(0, h.len());
        self.own.attention_branch(be, &own, call.x, h)?;
        be.copy_reals(call.x, a)?;
        be.add(a, h)?;
        self.cross(be, call, a, out)?;
        be.add(h, out)?;
        be.copy_reals(a, frame.mid)?;
        be.add(frame.mid, out)?;
        self.own.mlp_branch(be, &own, frame.mid, out)?;
        be.add(h, out)
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        let (own, frame) = self.parts(call);
        let a = self.own.mid(&own);
        let mut scratch = Cut(call.scratch);
        // With gb = J_gᵀ·gh and ga = gb + J_cᵀ·(gh + gb): dx += ga + J_fᵀ·(gh + ga).
        let ga = scratch.take(gh.len());
        be.fill_reals(ga, crate::real::Real::of(0.0))?;
        self.own.mlp_branch_vjp(be, &own, frame.mid, gh, ga, scratch.0)?;
        let mut rest = Cut(scratch.0);
        let gc = rest.take(gh.len());
        be.copy_reals(gh, gc)?;
        be.add(gc, ga)?;
        self.cross_vjp(be, call, a, gc, ga, rest.0)?;
        be.add(gx, ga)?;
        be.add(gh, ga)?;
        self.own.attention_branch_vjp(be, &own, call.x, gh, gx, scratch.0)
    }

    fn done(&mut self, be: &mut B, block: usize) -> Result<()> {
        let site = Site::Block(block);
        self.cross.finished(be, &self.own.updater, site, block, &self.tensors)?;
        Blocks::<B>::done(&mut self.own, be, block)
    }
}

/// What lies between an encoder and its decoder: `memory = norm(x_K)`, and the way back. Parameters
/// and gradients belong to the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncoderOutput {
    /// `ε` of the norm.
    pub eps: f64,
    /// Weight and bias of the norm, `[d]` each.
    pub norm: [Reals; 2],
    /// Their gradients.
    pub grads: [Reals; 2],
    /// The memory and its gradient, `[B, S, d]` each.
    pub context: Context,
    /// `[B · S, 2]`, mean and rstd.
    pub stats: Reals,
}

impl EncoderOutput {
    /// The memory from the result of the encoder's forward pass; its gradient becomes 0.
    ///
    /// # Errors
    /// Those of the backend and of [`Stack::output`].
    pub fn forward<B: Backend>(&self, be: &mut B, encoder: &Stack) -> Result<()> {
        let x = encoder.output(be)?;
        self.normalize(be, x, self.context.value, self.stats)?;
        be.fill_reals(self.context.grad, crate::real::Real::of(0.0))
    }

    /// The norm alone, of some rows.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn normalize<B: Backend>(
        &self,
        be: &mut B,
        x: Reals,
        y: Reals,
        stats: Reals,
    ) -> Result<()> {
        be.layer_norm(self.eps, self.norm[0], self.norm[1], x, y, stats)
    }

    /// After the decoder's backward pass: the gradient of the encoder's result, where its backward
    /// pass expects it. The memory is over.
    ///
    /// # Errors
    /// Those of the backend and of [`Stack::output`].
    pub fn vjp<B: Backend>(&self, be: &mut B, encoder: &Stack) -> Result<()> {
        let (x, Context { value, grad }) = (encoder.output(be)?, self.context);
        be.fill_reals(value, crate::real::Real::of(0.0))?;
        be.layer_norm_vjp(self.norm[0], x, self.stats, grad, value, self.grads[0], self.grads[1])?;
        be.copy_reals(value, x)
    }
}
