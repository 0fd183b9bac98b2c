//! The attention branch of Llama's family: root-mean-square norms, rotary positions, keys and
//! values that several heads of queries share.

use super::block::{At, Branch, Cached, Cut};
use super::gated::LlamaShape;
use super::linear::{Linear, Names, names};
use super::norm::rows_of;
use super::{Freeze, Init, LoraShape, Room, Tensor};
use crate::arena::{Ints, Reals};
use crate::backend::{Attention, Backend, Chunk, Columns, Mask, RmsNorm, Rotary};
use crate::error::{Error, Result};
use crate::real::Real;
use crate::rng::Draw;
use crate::stack::Needs;

/// The linear layers, in their order: queries, keys, values, output.
const LINEARS: [Names; 4] =
    [names!("attn_q"), names!("attn_k"), names!("attn_v"), names!("attn_output")];
/// Norms, and weight and bias of every layer.
const OWN: usize = 4 + 2 * LINEARS.len();

/// `f(x) = norm'(o(attention(rotate(norm_q(q(n))), rotate(norm_k(k(n))), v(n))))` with `n =
/// norm(x)`; the norms of queries and keys and the last one are there where the family has them.
///
/// Names are those of GGUF files.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupedAttention {
    shape: LlamaShape,
    lora: Option<LoraShape>,
    /// Norms (input, output, queries, keys), the layers, their adapters.
    tensors: [Tensor; OWN + 2 * LINEARS.len()],
    /// Angles of the positions: `[positions, head_dim]` of blocks that see everything, and of those
    /// with a window.
    pub tables: [Reals; 2],
    /// `[B, T]`: the position of every token; empty where it is its place in the sample.
    pub positions: Ints,
    /// `[B, T]`: where the text of every token begins ([`Attention::starts`]); empty where a sample
    /// is one text.
    pub starts: Ints,
}

impl GroupedAttention {
    /// The branch; its tensors take their places in `room`.
    pub const fn new(
        shape: LlamaShape,
        lora: Option<LoraShape>,
        freeze: Freeze,
        room: Room,
    ) -> (Self, Room) {
        let (s, d) = (&shape, shape.width);
        let start = if s.norm_offset == 0.0 { Init::Ones } else { Init::Zeros };
        let nothing = Tensor::vector("", 0, Init::Zeros);
        let mut tensors = [nothing; OWN + 2 * LINEARS.len()];
        tensors[0] = Tensor::vector("attn_norm.weight", d, start);
        tensors[1] = Tensor::vector("post_attention_norm.weight", d, start).when(s.post_norms);
        tensors[2] = Tensor::vector("attn_q_norm.weight", s.head_dim, start).when(s.head_norms);
        tensors[3] = Tensor::vector("attn_k_norm.weight", s.head_dim, start).when(s.head_norms);
        let mut i = 0;
        while i < LINEARS.len() {
            let (inputs, outputs) = shape.attention_layer(i);
            let bias = if i < 3 { s.qkv_bias } else { s.output_bias };
            let init = if i < 3 { s.init.matrix(outputs) } else { s.init.projection(outputs) };
            let own = LINEARS[i].own(inputs, outputs, bias, init);
            let adapter = LINEARS[i].adapter(inputs, outputs, lora);
            (tensors[4 + 2 * i], tensors[5 + 2 * i]) = (own[0], own[1]);
            (tensors[OWN + 2 * i], tensors[OWN + 1 + 2 * i]) = (adapter[0], adapter[1]);
            i += 1;
        }
        let (own, adapters) = tensors.split_at_mut(OWN);
        let room = room.place(own, freeze).place(adapters, Freeze::Nothing);
        let branch = Self {
            shape,
            lora,
            tensors,
            tables: [Reals::EMPTY; 2],
            positions: Ints::EMPTY,
            starts: Ints::EMPTY,
        };
        (branch, room)
    }

    /// Dimensions and constants.
    pub const fn shape(&self) -> &LlamaShape {
        &self.shape
    }

    /// The tensors; those that the family does not have are empty.
    pub const fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The same for samples of another length.
    #[must_use]
    pub const fn with_tokens(mut self, tokens: usize) -> Self {
        self.shape.tokens = tokens;
        self
    }

    const fn rank(&self) -> usize {
        match self.lora {
            Some(lora) => lora.rank,
            None => 0,
        }
    }

    /// Layer `i` of [`LINEARS`].
    const fn linear(&self, i: usize) -> Linear<'_> {
        Linear {
            weight: &self.tensors[4 + 2 * i],
            bias: &self.tensors[5 + 2 * i],
            adapter: [&self.tensors[OWN + 2 * i], &self.tensors[OWN + 1 + 2 * i]],
            scale: match self.lora {
                Some(lora) => lora.scale(),
                None => 0.0,
            },
        }
    }

    /// The attention of a block that sees everything, without packing.
    pub const fn attention(&self) -> Attention {
        let s = &self.shape;
        Attention {
            heads: s.heads,
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            queries: s.tokens,
            keys: s.tokens,
            mask: Mask::Causal,
            key_lens: Ints::EMPTY,
            starts: Ints::EMPTY,
            dropout: s.attention_dropout,
            draw: Draw::AttentionDropout,
            temperature: Reals::EMPTY,
            temperature_grad: Reals::EMPTY,
        }
    }

    /// Attention of one query over a cache of `keys` positions, of which `lens` are in use.
    pub const fn cached_attention(&self, keys: usize, lens: Ints) -> Attention {
        let all = self.attention();
        Attention { queries: 1, keys, mask: Mask::Full, key_lens: lens, dropout: 0.0, ..all }
    }

    fn attention_of(&self, at: &At<'_>) -> Attention {
        let (chunk, t) = (&at.call.chunk, self.shape.tokens);
        let all = self.attention();
        Attention {
            mask: match self.shape.window {
                Some(n) if self.shape.sliding.has(at.call.block) => Mask::Sliding(n),
                _ => Mask::Causal,
            },
            starts: self.starts.sub(chunk.first * t, chunk.samples * t),
            dropout: if at.call.train { all.dropout } else { 0.0 },
            ..all
        }
    }

    fn frame(&self, at: &At<'_>) -> Frame {
        let (s, rows) = (&self.shape, at.samples() * self.shape.tokens);
        let (q, kv, r) = (s.q_width(), s.kv_width(), self.rank());
        let (raw, post) = (usize::from(s.head_norms), usize::from(s.post_norms));
        let mut cut = Cut(at.frame);
        let mut take = |values: usize| cut.take(rows * values);
        let (q_room, attn_room) = (take(s.room()), take(s.room()));
        Frame {
            q: q_room.sub(0, rows * q),
            k: take(kv),
            v: take(kv),
            attn: attn_room.sub(0, rows * q),
            lse: take(s.heads),
            stats: take(1),
            u: [take(r), take(r), take(r), take(r)],
            raw: [take(raw * q), take(raw * kv)],
            raw_stats: [take(raw * s.heads), take(raw * s.kv_heads)],
            out: take(post * s.width),
            out_stats: take(post),
            used: [q_room, attn_room].map(|of| of.sub(0, rows * s.width)),
        }
    }

    /// The norm of the queries' heads, or of the keys'.
    const fn head_norm(&self, keys: bool) -> RmsNorm {
        let s = &self.shape;
        let groups = if keys { s.kv_heads } else { s.heads };
        RmsNorm { groups, width: s.head_dim, eps: s.eps, offset: s.norm_offset }
    }

    /// Turns queries and keys, or turns them back, in blocks that have positions.
    fn rotate<B: Backend>(
        &self,
        be: &mut B,
        at: &At<'_>,
        positions: Ints,
        [q, k]: [Reals; 2],
        back: bool,
    ) -> Result<()> {
        let (s, block) = (&self.shape, at.call.block);
        if s.unrotated.has(block) {
            return Ok(());
        }
        let table = self.tables[usize::from(s.window.is_some() && s.sliding.has(block))];
        for (x, heads, width) in [(q, s.heads, s.q_width()), (k, s.kv_heads, s.kv_width())] {
            let rotary = Rotary { heads, head_dim: s.head_dim, tokens: s.tokens, back };
            be.rotate(&at.call.chunk, &rotary, table, positions, rows_of(x, width))?;
        }
        Ok(())
    }

    /// Queries, keys and values of `rows` rows, normalized and turned.
    fn project<B: Backend>(
        &self,
        be: &mut B,
        at: &At<'_>,
        positions: Ints,
        x: Reals,
        frame: &Frame,
    ) -> Result<()> {
        let (s, rows) = (&self.shape, at.samples() * self.shape.tokens);
        let mut scratch = Cut(at.scratch);
        let normal = scratch.take(rows * s.width);
        s.normalize(be, at, &self.tensors[0], x, normal, frame.stats)?;
        let [raw_q, raw_k] = frame.raw;
        let places =
            if s.head_norms { [raw_q, raw_k, frame.v] } else { [frame.q, frame.k, frame.v] };
        for (i, place) in places.into_iter().enumerate() {
            let to = (place, frame.u[i]);
            self.linear(i).forward(be, at, rows, normal, to, scratch.0)?;
        }
        if s.head_norms {
            for (i, (to, width)) in
                [(frame.q, s.q_width()), (frame.k, s.kv_width())].into_iter().enumerate()
            {
                let (norm, weight) = (self.head_norm(i == 1), at.value(&self.tensors[2 + i]));
                let (from, to) = (rows_of(frame.raw[i], width), rows_of(to, width));
                be.rms_norm(&norm, weight, from, to, frame.raw_stats[i])?;
            }
        }
        self.rotate(be, at, positions, [frame.q, frame.k], false)
    }

    /// `y = norm'(o(attn))`.
    fn output<B: Backend>(&self, be: &mut B, at: &At<'_>, frame: &Frame, y: Reals) -> Result<()> {
        let (s, rows) = (&self.shape, at.samples() * self.shape.tokens);
        let to = if s.post_norms { frame.out } else { y };
        let to = (to, frame.u[3]);
        self.linear(3).forward(be, at, rows, frame.attn, to, at.scratch)?;
        if s.post_norms {
            let (norm, weight) = (s.norm(), at.value(&self.tensors[1]));
            let d = s.width;
            be.rms_norm(&norm, weight, rows_of(frame.out, d), rows_of(y, d), frame.out_stats)?;
        }
        Ok(())
    }

    /// Where a call's residual has left keys and values, `[rows, kv_width]` each.
    pub(super) fn keys_values(&self, at: &At<'_>) -> [Columns; 2] {
        let frame = self.frame(at);
        [frame.k, frame.v].map(|of| rows_of(of, self.shape.kv_width()))
    }

    fn positions_of(&self, chunk: &Chunk) -> Ints {
        let t = self.shape.tokens;
        self.positions.sub(chunk.first * t, chunk.samples * t)
    }
}

/// The intermediates of one call, for `rows = samples · T` rows.
struct Frame {
    /// `[rows, heads·head_dim]`, ready for attention.
    q: Reals,
    /// `[rows, kv_heads·head_dim]`, ready for attention.
    k: Reals,
    /// `[rows, kv_heads·head_dim]`.
    v: Reals,
    /// `[rows, heads·head_dim]`.
    attn: Reals,
    /// `[samples, heads, T]`.
    lse: Reals,
    /// `[rows]`.
    stats: Reals,
    /// `[rows, r]` of the layers' adapters.
    u: [Reals; 4],
    /// Queries and keys before their norms.
    raw: [Reals; 2],
    /// `[rows, heads]` and `[rows, kv_heads]`.
    raw_stats: [Reals; 2],
    /// `[rows, d]`: the output before its norm.
    out: Reals,
    /// `[rows]`.
    out_stats: Reals,
    /// `[rows, d]`: the places of `q` and `attn`, once nothing reads these any more.
    used: [Reals; 2],
}

impl<B: Backend> Branch<B> for GroupedAttention {
    fn needs(&self, chunk: usize, threads: usize) -> Needs {
        let s = &self.shape;
        let (q, kv, r) = (s.q_width(), s.kv_width(), self.rank());
        let raw = if s.head_norms { q + kv + s.heads + s.kv_heads } else { 0 };
        let post = if s.post_norms { s.width + 1 } else { 0 };
        let kept = 2 * s.room() + 2 * kv + s.heads + 1 + 4 * r + raw + post;
        // Backward: the gradients of q, or of the output before its norm; of attention, k and v;
        // of keys before their norm; adapters. Forward: n, adapters.
        let apart = if s.head_norms { kv } else { 0 };
        let back = s.room() + q + 2 * kv + apart + 2 * r;
        Needs {
            frame: s.tokens.saturating_mul(kept),
            scratch: s.tokens.saturating_mul(back),
            fixed: B::attention_scratch(&self.attention(), chunk, threads),
        }
    }

    fn forward(&self, be: &mut B, at: &At<'_>, x: Reals, y: Reals) -> Result<()> {
        let (s, frame, chunk) = (&self.shape, self.frame(at), &at.call.chunk);
        self.project(be, at, self.positions_of(chunk), x, &frame)?;
        let (q, a) = (rows_of(frame.q, s.q_width()), self.attention_of(at));
        let [k, v] = [frame.k, frame.v].map(|of| rows_of(of, s.kv_width()));
        be.attention(chunk, &a, q, k, v, frame.attn, frame.lse, at.scratch)?;
        self.output(be, at, &frame, y)
    }

    fn vjp(&self, be: &mut B, at: &At<'_>, x: Reals, gy: Reals, gx: Reals) -> Result<()> {
        let (s, frame, chunk) = (&self.shape, self.frame(at), &at.call.chunk);
        let (d, q_width, kv_width) = (s.width, s.q_width(), s.kv_width());
        let rows = at.samples() * s.tokens;
        let mut scratch = Cut(at.scratch);
        let room = scratch.take(rows * s.room());
        let dq = room.sub(0, rows * q_width);
        let [dk, dv] = [0; 2].map(|_| scratch.take(rows * kv_width));
        let dattn = scratch.take(rows * q_width);
        let rest = scratch.0;
        let zero = B::Real::of(0.0);

        let gy = if s.post_norms {
            let (norm, t) = (s.norm(), &self.tensors[1]);
            let dout = room.sub(0, rows * d);
            be.fill_reals(dout, zero)?;
            let [out, gy, dx] = [frame.out, gy, dout].map(|of| rows_of(of, d));
            let slope = at.slope(t);
            be.rms_norm_vjp(&norm, at.value(t), out, frame.out_stats, gy, dx, slope)?;
            dout
        } else {
            gy
        };
        let from = (frame.attn, frame.u[3]);
        self.linear(3).vjp(be, at, rows, from, gy, (dattn, false), rest)?;
        let (a, [q, dqs]) = (self.attention_of(at), [frame.q, dq].map(|of| rows_of(of, q_width)));
        let [k, v, dks, dvs] = [frame.k, frame.v, dk, dv].map(|of| rows_of(of, kv_width));
        let (attn, lse) = (frame.attn, frame.lse);
        be.attention_vjp(chunk, &a, q, k, v, attn, lse, dattn, dqs, dks, dvs, rest)?;
        self.rotate(be, at, self.positions_of(chunk), [dq, dk], true)?;
        let (mut dq, mut dk) = (dq, dk);
        if s.head_norms {
            // Attention's gradient is through; keys have a place of their own.
            let raw = [(dattn, dq, q_width), (scratch.take(rows * kv_width), dk, kv_width)];
            for (i, (to, from, width)) in raw.into_iter().enumerate() {
                let (norm, t) = (self.head_norm(i == 1), &self.tensors[2 + i]);
                be.fill_reals(to, zero)?;
                let [x, dy, dx] = [frame.raw[i], from, to].map(|of| rows_of(of, width));
                let slope = at.slope(t);
                be.rms_norm_vjp(&norm, at.value(t), x, frame.raw_stats[i], dy, dx, slope)?;
            }
            (dq, dk) = (raw[0].0, raw[1].0);
        }
        let [normal, dn] = frame.used;
        s.normalize(be, at, &self.tensors[0], x, normal, frame.stats)?;
        for (i, dy) in [dq, dk, dv].into_iter().enumerate() {
            let from = (normal, frame.u[i]);
            self.linear(i).vjp(be, at, rows, from, dy, (dn, i > 0), scratch.0)?;
        }
        let (norm, t) = (s.norm(), &self.tensors[0]);
        let [x, dn, gx] = [x, dn, gx].map(|of| rows_of(of, d));
        be.rms_norm_vjp(&norm, at.value(t), x, frame.stats, dn, gx, at.slope(t))
    }

    fn next(&self, be: &mut B, at: &At<'_>, cached: &Cached<'_>, x: Reals, y: Reals) -> Result<()> {
        let (one, rows, s) = (self.with_tokens(1), at.samples(), &self.shape);
        let (frame, kv, keys) = (one.frame(at), s.kv_width(), cached.keys);
        one.project(be, at, cached.places, x, &frame)?;
        if cached.positions.len() != rows {
            let (what, found) = ("cache: positions", cached.positions.len());
            return Err(Error::Shape { what, expected: rows, found });
        }
        for (row, &position) in cached.positions.iter().enumerate() {
            if position >= keys {
                let possible = "less than the keys that the cache holds";
                return Err(Error::setting("cache: position", position as f64, possible));
            }
            let place = (row * keys + position) * 2 * kv;
            for (i, own) in [frame.k, frame.v].into_iter().enumerate() {
                be.copy_reals(own.sub(row * kv, kv), cached.of.sub(place + i * kv, kv))?;
            }
        }
        let slides = s.window.is_some() && s.sliding.has(at.call.block);
        let starts = if slides { cached.starts } else { Ints::EMPTY };
        let a = Attention { starts, ..self.cached_attention(keys, cached.lens) };
        let q = rows_of(frame.q, s.q_width());
        let [k, v] = [0, kv].map(|at| Columns { of: cached.of, stride: 2 * kv, at });
        be.attention(&at.call.chunk, &a, q, k, v, frame.attn, frame.lse, at.scratch)?;
        one.output(be, at, &frame, y)
    }
}
