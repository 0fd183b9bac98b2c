//! Attention branches: pre-norm self-attention, and cross-attention to a context.

use super::block::{At, Branch, Cached, Cut};
use super::lora::{Lora, LoraShape};
use super::{Freeze, Home, Init, Params, Room, Scheme, Tensor, linear, linear_vjp};
use crate::arena::{Ints, Reals};
use crate::backend::{Attention, Backend, Chunk, Columns, Mask, Order, Product};
use crate::error::{Error, Result};
use crate::rng::Draw;
use crate::stack::{Context, Needs};

/// Tensors of self-attention without adapters.
const OWN: usize = 7;

/// Dimensions and constants of an attention branch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Tokens `T` of a sample.
    pub tokens: usize,
    /// Width `d`.
    pub width: usize,
    /// Heads; they divide the width.
    pub heads: usize,
    /// `ε` of the norm.
    pub eps: f64,
    /// Which keys a query sees, in self-attention.
    pub mask: Mask,
    /// Dropout of attention probabilities.
    pub dropout: f64,
    /// Dropout of the branch's output.
    pub residual_dropout: f64,
    /// Whether queries, keys and values of self-attention have a bias.
    pub qkv_bias: bool,
    /// Whether the scores' factor is learned (`e^τ`, one `τ` a block) in place of `1/√head_dim`.
    pub temperature: bool,
    /// How matrices begin.
    pub init: Scheme,
}

impl AttentionShape {
    const fn head_dim(&self) -> usize {
        match self.width.checked_div(self.heads) {
            Some(n) => n,
            None => 0,
        }
    }

    /// Attention over `keys` positions, without padding, dropout and temperature.
    const fn over(&self, queries: usize, keys: usize, mask: Mask) -> Attention {
        Attention {
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.head_dim(),
            queries,
            keys,
            mask,
            key_lens: Ints::EMPTY,
            starts: Ints::EMPTY,
            dropout: 0.0,
            draw: Draw::AttentionDropout,
            temperature: Reals::EMPTY,
            temperature_grad: Reals::EMPTY,
        }
    }
}

/// `f(x) = dropout(c_proj(attention(c_attn(ln_1(x)))))`, with adapters of `c_attn` where there are
/// some.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelfAttention {
    shape: AttentionShape,
    /// Norm, `c_attn`, `c_proj` (weight and bias each), temperature; then the adapters'.
    tensors: [Tensor; OWN + Lora::TENSORS],
    lora: Option<Lora>,
    /// Padding: the number of tokens of every sample of the batch; empty where all are full.
    pub key_lens: Ints,
}

impl SelfAttention {
    /// The branch; its tensors take their places in `room`.
    ///
    /// # Errors
    /// [`Error::Setting`] for adapters that do not fit.
    pub const fn new(
        shape: AttentionShape,
        lora: Option<LoraShape>,
        freeze: Freeze,
        room: Room,
    ) -> Result<(Self, Room)> {
        let (d, init) = (shape.width, shape.init);
        let temperature = Init::Temperature { head_dim: shape.head_dim() };
        let mut own = [
            Tensor::vector("ln_1.weight", d, Init::Ones),
            Tensor::vector("ln_1.bias", d, Init::Zeros),
            Tensor::matrix("attn.c_attn.weight", d, 3 * d, init.matrix(d)),
            Tensor::vector("attn.c_attn.bias", 3 * d, Init::Zeros).when(shape.qkv_bias),
            Tensor::matrix("attn.c_proj.weight", d, d, init.projection(d)),
            Tensor::vector("attn.c_proj.bias", d, Init::Zeros),
            Tensor::vector("attn.temperature", 1, temperature).when(shape.temperature),
        ];
        let mut room = room.place(&mut own, freeze);
        let (mut adapters, mut adapter) = ([own[0].when(false); Lora::TENSORS], None);
        if let Some(lora) = lora {
            let lora = match Lora::new(lora, d) {
                Ok(lora) => lora,
                Err(error) => return Err(error),
            };
            adapters = lora.tensors();
            room = room.place(&mut adapters, Freeze::Nothing);
            adapter = Some(lora);
        }
        let [a, b, c, e, f, g, h] = own;
        let tensors = [a, b, c, e, f, g, h, adapters[0], adapters[1]];
        Ok((Self { shape, tensors, lora: adapter, key_lens: Ints::EMPTY }, room))
    }

    /// Dimensions and constants.
    pub const fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// Rank and factor of the adapters.
    pub const fn lora(&self) -> Option<&LoraShape> {
        match &self.lora {
            Some(lora) => Some(lora.shape()),
            None => None,
        }
    }

    /// The tensors, then the adapters'.
    pub const fn tensors(&self) -> &[Tensor] {
        match self.lora {
            Some(_) => &self.tensors,
            None => self.tensors.split_at(OWN).0,
        }
    }

    /// The same for samples of another length.
    #[must_use]
    pub const fn with_tokens(mut self, tokens: usize) -> Self {
        self.shape.tokens = tokens;
        self
    }

    /// The attention itself, without padding and temperature.
    pub const fn attention(&self) -> Attention {
        let s = &self.shape;
        Attention { dropout: s.dropout, ..s.over(s.tokens, s.tokens, s.mask) }
    }

    /// Attention of one query over a cache of `keys` positions, of which `lens` are in use.
    pub const fn cached_attention(&self, keys: usize, lens: Ints) -> Attention {
        Attention { key_lens: lens, ..self.shape.over(1, keys, Mask::Full) }
    }

    /// What the branch needs where the backend's
    /// [`attention_scratch`](crate::NnOps::attention_scratch) is `attention`.
    pub const fn needs_with(&self, attention: usize) -> Needs {
        let (t, d) = (self.shape.tokens, self.shape.width);
        let (rows, whole) = match &self.lora {
            Some(lora) => (lora.rows(), lora.whole()),
            None => (0, 0),
        };
        let adapters = t.saturating_mul(rows);
        let slope = self.frozen_temperature() as usize;
        Needs {
            // ln_1, qkv, attention: 5 d; statistics of the norm; lse; the adapters' input; a place
            // for the gradient of a temperature that is not trained.
            frame: t
                .saturating_mul(d.saturating_mul(5).saturating_add(self.shape.heads + 2))
                .saturating_add(adapters)
                .saturating_add(slope),
            // Backward: d, dqkv and dattn.
            scratch: t.saturating_mul(d).saturating_mul(5).saturating_add(adapters),
            fixed: attention.saturating_add(2 * whole),
        }
    }

    fn frame(&self, at: &At<'_>) -> SelfFrame {
        let (n, d) = (at.samples(), self.shape.width);
        let rows = n * self.shape.tokens;
        let mut cut = Cut(at.frame);
        SelfFrame {
            ln_1: cut.take(rows * d),
            qkv: cut.take(rows * 3 * d),
            attn: cut.take(rows * d),
            lse: cut.take(rows * self.shape.heads),
            stats: cut.take(2 * rows),
            lora: cut.take(rows * self.lora.map_or(0, |l| l.rows())),
            slope: cut.take(usize::from(self.frozen_temperature())),
        }
    }

    const fn frozen_temperature(&self) -> bool {
        let temperature = &self.tensors[6];
        !temperature.is_empty() && !matches!(temperature.home, Home::Trained)
    }

    fn columns(&self, of: Reals) -> [Columns; 3] {
        let d = self.shape.width;
        [0, 1, 2].map(|i| Columns { of, stride: 3 * d, at: i * d })
    }

    fn attention_of(&self, at: &At<'_>) -> Attention {
        let chunk = &at.call.chunk;
        Attention {
            key_lens: self.key_lens.sub(chunk.first, chunk.samples),
            dropout: if at.call.train { self.shape.dropout } else { 0.0 },
            temperature: at.value(&self.tensors[6]),
            // Without training there is no gradient, and the handle is empty.
            temperature_grad: if self.frozen_temperature() {
                self.frame(at).slope
            } else {
                at.slope(&self.tensors[6])
            },
            ..self.attention()
        }
    }

    /// `qkv = c_attn(ln_1(x))`, with adapters where there are any.
    fn c_attn<B: Backend>(
        &self,
        be: &mut B,
        at: &At<'_>,
        x: Reals,
        frame: &SelfFrame,
    ) -> Result<()> {
        let [ln_w, ln_b, w, b, ..] = &self.tensors;
        let rows = at.samples() * self.shape.tokens;
        let (weight, bias) = (at.value(ln_w), at.value(ln_b));
        be.layer_norm(self.shape.eps, weight, bias, x, frame.ln_1, frame.stats)?;
        let m = at.matrix(be, w)?;
        linear(be, rows, m, at.value(b), frame.ln_1, frame.qkv)?;
        match &self.lora {
            Some(lora) => {
                lora.forward(be, at, self.adapters(), rows, frame.ln_1, frame.lora, frame.qkv)
            }
            None => Ok(()),
        }
    }

    const fn adapters(&self) -> [&Tensor; Lora::TENSORS] {
        [&self.tensors[OWN], &self.tensors[OWN + 1]]
    }

    /// Where a call's residual has left keys and values: columns `at .. at + 2 d` of a row for each
    /// token.
    pub(super) fn keys_values(&self, at: &At<'_>) -> Columns {
        let [_, keys, _] = self.columns(self.frame(at).qkv);
        keys
    }
}

/// The intermediates of self-attention in one call, for `rows = samples · T` rows.
struct SelfFrame {
    /// `[rows, d]`.
    ln_1: Reals,
    /// `[rows, 3 d]`.
    qkv: Reals,
    /// `[rows, d]`.
    attn: Reals,
    /// `[samples, heads, T]`.
    lse: Reals,
    /// `[rows, 2]`, mean and rstd.
    stats: Reals,
    /// `[rows, 2r]` of adapters.
    lora: Reals,
    /// Takes the gradient of a temperature that is not trained; nothing reads it.
    slope: Reals,
}

impl<B: Backend> Branch<B> for SelfAttention {
    fn needs(&self, chunk: usize, threads: usize) -> Needs {
        self.needs_with(B::attention_scratch(&self.attention(), chunk, threads))
    }

    fn forward(&self, be: &mut B, at: &At<'_>, x: Reals, y: Reals) -> Result<()> {
        let frame = self.frame(at);
        self.c_attn(be, at, x, &frame)?;
        let ([q, k, v], a) = (self.columns(frame.qkv), self.attention_of(at));
        be.attention(&at.call.chunk, &a, q, k, v, frame.attn, frame.lse, at.scratch)?;
        let m = at.matrix(be, &self.tensors[4])?;
        let rows = at.samples() * self.shape.tokens;
        linear(be, rows, m, at.value(&self.tensors[5]), frame.attn, y)?;
        at.dropout(be, Draw::AttentionResidualDropout, self.shape.residual_dropout, y)
    }

    fn vjp(&self, be: &mut B, at: &At<'_>, x: Reals, gy: Reals, gx: Reals) -> Result<()> {
        let (frame, d) = (self.frame(at), self.shape.width);
        let rows = at.samples() * self.shape.tokens;
        let [ln_w, ln_b, w, b, proj_w, proj_b, ..] = &self.tensors;
        let mut scratch = Cut(at.scratch);
        let dln = scratch.take(rows * d);
        let dqkv = scratch.take(rows * 3 * d);
        // Once the attention is through, its gradient and its scratch make room for the adapters'.
        let rest = scratch.0;
        let dattn = scratch.take(rows * d);
        let draw = Draw::AttentionResidualDropout;
        let gy = at.dropped(be, draw, self.shape.residual_dropout, gy, dln)?;
        let m = at.matrix(be, proj_w)?;
        linear_vjp(be, rows, m, (at.slope(proj_w), at.slope(proj_b)), frame.attn, gy, dattn)?;
        let ([q, k, v], [dq, dk, dv]) = (self.columns(frame.qkv), self.columns(dqkv));
        let (a, c) = (self.attention_of(at), &at.call.chunk);
        be.attention_vjp(c, &a, q, k, v, frame.attn, frame.lse, dattn, dq, dk, dv, scratch.0)?;
        let m = at.matrix(be, w)?;
        linear_vjp(be, rows, m, (at.slope(w), at.slope(b)), frame.ln_1, dqkv, dln)?;
        if let Some(lora) = &self.lora {
            lora.vjp(be, at, self.adapters(), rows, frame.ln_1, frame.lora, dqkv, dln, rest)?;
        }
        let (weight, slopes) = (at.value(ln_w), [at.slope(ln_w), at.slope(ln_b)]);
        be.layer_norm_vjp(weight, x, frame.stats, dln, gx, slopes[0], slopes[1])
    }

    fn next(&self, be: &mut B, at: &At<'_>, cached: &Cached<'_>, x: Reals, y: Reals) -> Result<()> {
        let (one, rows) = (self.with_tokens(1), at.samples());
        let (frame, d, keys) = (one.frame(at), self.shape.width, cached.keys);
        one.c_attn(be, at, x, &frame)?;
        if cached.positions.len() != rows {
            let (what, found) = ("cache: positions", cached.positions.len());
            return Err(Error::Shape { what, expected: rows, found });
        }
        for (row, &position) in cached.positions.iter().enumerate() {
            if position >= keys {
                let possible = "less than the keys that the cache holds";
                return Err(Error::setting("cache: position", position as f64, possible));
            }
            let place = (row * keys + position) * 2 * d;
            let own = frame.qkv.sub(row * 3 * d + d, 2 * d);
            be.copy_reals(own, cached.of.sub(place, 2 * d))?;
        }
        let [q, ..] = self.columns(frame.qkv);
        let [k, v] = [0, d].map(|at| Columns { of: cached.of, stride: 2 * d, at });
        let temperature = at.value(&self.tensors[6]);
        let a = Attention { temperature, ..self.cached_attention(keys, cached.lens) };
        be.attention(&at.call.chunk, &a, q, k, v, frame.attn, frame.lse, at.scratch)?;
        let m = at.matrix(be, &self.tensors[4])?;
        linear(be, rows, m, at.value(&self.tensors[5]), frame.attn, y)
    }
}

/// `c(x) = dropout(c_proj(attention(q(ln_cross(x)), k and v(memory))))`.
///
/// `memory` is the [`Context`] of the stack; its gradient adds up over blocks. Its keys and values
/// are computed anew in every block and pass: nothing of it is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossAttention {
    shape: AttentionShape,
    /// Norm, `q`, `kv`, `c_proj`: weight and bias each.
    tensors: [Tensor; 8],
    /// Positions `S` of a sample's context.
    keys: usize,
    /// Padding of the context: its number of positions in every sample of the batch; empty where
    /// all are there.
    pub context_lens: Ints,
}

impl CrossAttention {
    /// The branch over a context of `keys` positions a sample; its tensors take their places in
    /// `room`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a context of no position.
    pub const fn new(
        shape: AttentionShape,
        keys: usize,
        freeze: Freeze,
        room: Room,
    ) -> Result<(Self, Room)> {
        if keys == 0 {
            return Err(Error::setting("positions of the context", 0.0, "1 or more"));
        }
        let (d, init) = (shape.width, shape.init);
        let mut tensors = [
            Tensor::vector("ln_cross.weight", d, Init::Ones),
            Tensor::vector("ln_cross.bias", d, Init::Zeros),
            Tensor::matrix("cross.q.weight", d, d, init.matrix(d)),
            Tensor::vector("cross.q.bias", d, Init::Zeros),
            Tensor::matrix("cross.kv.weight", d, 2 * d, init.matrix(d)),
            Tensor::vector("cross.kv.bias", 2 * d, Init::Zeros),
            Tensor::matrix("cross.c_proj.weight", d, d, init.projection(d)),
            Tensor::vector("cross.c_proj.bias", d, Init::Zeros),
        ];
        let room = room.place(&mut tensors, freeze);
        Ok((Self { shape, tensors, keys, context_lens: Ints::EMPTY }, room))
    }

    /// The tensors.
    pub const fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The same for samples of `tokens` tokens and a context of `keys` positions.
    #[must_use]
    pub const fn with_tokens(mut self, tokens: usize, keys: usize) -> Self {
        (self.shape.tokens, self.keys) = (tokens, keys);
        self
    }

    /// Attention of `queries` rows of a sample over the context, without padding and dropout.
    pub const fn attention(&self, queries: usize) -> Attention {
        let a = self.shape.over(queries, self.keys, Mask::Full);
        Attention { draw: Draw::CrossAttentionDropout, ..a }
    }

    /// What the branch needs where the backend's
    /// [`attention_scratch`](crate::NnOps::attention_scratch) is `attention`.
    pub const fn needs_with(&self, attention: usize) -> Needs {
        let (t, d) = (self.shape.tokens, self.shape.width);
        let keys = self.keys.saturating_mul(d).saturating_mul(2);
        Needs {
            // ln, q, attention: 3 d; statistics; lse; keys and values.
            frame: t
                .saturating_mul(d.saturating_mul(3).saturating_add(self.shape.heads + 2))
                .saturating_add(keys),
            // Backward: dln, dq and dattn; dkv.
            scratch: t.saturating_mul(d).saturating_mul(3).saturating_add(keys),
            fixed: attention,
        }
    }

    fn frame(&self, at: &At<'_>) -> CrossFrame {
        let (n, d) = (at.samples(), self.shape.width);
        let rows = n * self.shape.tokens;
        let mut cut = Cut(at.frame);
        CrossFrame {
            ln: cut.take(rows * d),
            q: cut.take(rows * d),
            attn: cut.take(rows * d),
            kv: cut.take(2 * n * self.keys * d),
            lse: cut.take(rows * self.shape.heads),
            stats: cut.take(2 * rows),
        }
    }

    fn columns(&self, q: Reals, kv: Reals) -> [Columns; 3] {
        let d = self.shape.width;
        let half = |at| Columns { of: kv, stride: 2 * d, at };
        [Columns { of: q, stride: d, at: 0 }, half(0), half(d)]
    }

    fn attention_of(&self, at: &At<'_>) -> Attention {
        let chunk = &at.call.chunk;
        Attention {
            key_lens: self.context_lens.sub(chunk.first, chunk.samples),
            dropout: if at.call.train { self.shape.dropout } else { 0.0 },
            ..self.attention(self.shape.tokens)
        }
    }

    /// Keys and values of some rows of the context in block `k`: `[rows, 2 d]`.
    pub(super) fn keys_values<B: Backend>(
        &self,
        be: &mut B,
        params: &Params,
        k: usize,
        context: Reals,
        kv: Reals,
    ) -> Result<()> {
        let rows = context.len().checked_div(self.shape.width).unwrap_or(0);
        let m = params.matrix(be, k, &self.tensors[4])?;
        linear(be, rows, m, params.value(k, &self.tensors[5]), context, kv)
    }

    /// Norm and queries of some rows: `ln` and `q` are `[rows, d]`.
    fn queries<B: Backend>(
        &self,
        be: &mut B,
        at: &At<'_>,
        x: Reals,
        frame: &CrossFrame,
    ) -> Result<()> {
        let rows = x.len().checked_div(self.shape.width).unwrap_or(0);
        let [ln_w, ln_b, w, b, ..] = &self.tensors;
        let (weight, bias) = (at.value(ln_w), at.value(ln_b));
        be.layer_norm(self.shape.eps, weight, bias, x, frame.ln, frame.stats)?;
        let m = at.matrix(be, w)?;
        linear(be, rows, m, at.value(b), frame.ln, frame.q)
    }

    fn project<B: Backend>(&self, be: &mut B, at: &At<'_>, attn: Reals, y: Reals) -> Result<()> {
        let rows = attn.len().checked_div(self.shape.width).unwrap_or(0);
        let m = at.matrix(be, &self.tensors[6])?;
        linear(be, rows, m, at.value(&self.tensors[7]), attn, y)
    }
}

/// The intermediates of cross-attention in one call, for `rows` rows and `keys` rows of the
/// context.
struct CrossFrame {
    /// `[rows, d]`.
    ln: Reals,
    /// `[rows, d]`.
    q: Reals,
    /// `[rows, d]`.
    attn: Reals,
    /// `[keys, 2 d]`.
    kv: Reals,
    /// `[samples, heads, T]`.
    lse: Reals,
    /// `[rows, 2]`, mean and rstd.
    stats: Reals,
}

fn context(at: &At<'_>) -> Result<Context> {
    at.call.context.ok_or(Error::unfit("context", "missing", "one, for cross-attention"))
}

impl<B: Backend> Branch<B> for CrossAttention {
    fn needs(&self, chunk: usize, threads: usize) -> Needs {
        let a = self.attention(self.shape.tokens);
        self.needs_with(B::attention_scratch(&a, chunk, threads))
    }

    fn forward(&self, be: &mut B, at: &At<'_>, x: Reals, y: Reals) -> Result<()> {
        let (context, frame) = (context(at)?, self.frame(at));
        self.queries(be, at, x, &frame)?;
        self.keys_values(be, at.params, at.call.block, context.value, frame.kv)?;
        let ([q, k, v], a) = (self.columns(frame.q, frame.kv), self.attention_of(at));
        be.attention(&at.call.chunk, &a, q, k, v, frame.attn, frame.lse, at.scratch)?;
        self.project(be, at, frame.attn, y)?;
        at.dropout(be, Draw::CrossAttentionResidualDropout, self.shape.residual_dropout, y)
    }

    fn vjp(&self, be: &mut B, at: &At<'_>, x: Reals, gy: Reals, gx: Reals) -> Result<()> {
        let (context, frame, d) = (context(at)?, self.frame(at), self.shape.width);
        let (rows, keys) = (at.samples() * self.shape.tokens, at.samples() * self.keys);
        let [ln_w, ln_b, q_w, q_b, kv_w, kv_b, proj_w, proj_b] = &self.tensors;
        let mut scratch = Cut(at.scratch);
        let [dln, dq, dattn] = [0; 3].map(|_| scratch.take(rows * d));
        let dkv = scratch.take(2 * keys * d);
        let draw = Draw::CrossAttentionResidualDropout;
        let gy = at.dropped(be, draw, self.shape.residual_dropout, gy, dln)?;
        let m = at.matrix(be, proj_w)?;
        linear_vjp(be, rows, m, (at.slope(proj_w), at.slope(proj_b)), frame.attn, gy, dattn)?;
        let ([q, k, v], [dqs, dks, dvs]) = (self.columns(frame.q, frame.kv), self.columns(dq, dkv));
        let (a, c) = (self.attention_of(at), &at.call.chunk);
        be.attention_vjp(c, &a, q, k, v, frame.attn, frame.lse, dattn, dqs, dks, dvs, scratch.0)?;
        let m = at.matrix(be, kv_w)?;
        let slopes = (at.slope(kv_w), at.slope(kv_b));
        linear_vjp(be, keys, m, slopes, context.value, dkv, Reals::EMPTY)?;
        let (a, b) = (Order::Plain, m.order.transposed());
        let p = Product { rows: keys, cols: d, inner: 2 * d, a, b, accumulate: true };
        be.matmul(&p, dkv, m.values, None, context.grad)?;
        let m = at.matrix(be, q_w)?;
        linear_vjp(be, rows, m, (at.slope(q_w), at.slope(q_b)), frame.ln, dq, dln)?;
        let (weight, slopes) = (at.value(ln_w), [at.slope(ln_w), at.slope(ln_b)]);
        be.layer_norm_vjp(weight, x, frame.stats, dln, gx, slopes[0], slopes[1])
    }

    fn next(&self, be: &mut B, at: &At<'_>, cached: &Cached<'_>, x: Reals, y: Reals) -> Result<()> {
        let missing = Error::unfit("keys of the context", "missing", "those of the cache");
        let context = cached.context.as_ref().ok_or(missing)?;
        let frame = self.with_tokens(1, 0).frame(at);
        self.queries(be, at, x, &frame)?;
        let [q, k, v] = self.columns(frame.q, context.keys_values);
        // The hypotheses of a sample are queries over the same keys.
        let samples = at.samples().checked_div(context.beams).unwrap_or(0);
        let chunk = Chunk { samples, ..at.call.chunk };
        let key_lens = self.context_lens.sub(0, samples);
        let a = Attention { key_lens, ..self.attention(context.beams) };
        be.attention(&chunk, &a, q, k, v, frame.attn, frame.lse, at.scratch)?;
        self.project(be, at, frame.attn, y)
    }
}
