//! Blocks of Llama's family, and their MLP branch: `g(x) = norm'(down(act(gate(n))·up(n)))` with
//! `n = norm(x)`.

use super::block::{At, Branch, Branches, Cut, Residual, larger};
use super::grouped::GroupedAttention;
use super::linear::{Linear, Names, names};
use super::norm::rows_of;
use super::rotary::BlockSet;
use super::{Freeze, Gradients, Init, LoraShape, Params, Room, Scheme, Tensor};
use crate::arena::{Layout, Reals, product};
use crate::backend::{Backend, Columns, Gate, RmsNorm};
use crate::error::{Error, Result, ok};
use crate::real::Real;
use crate::stack::{Call, Needs};

/// The linear layers, in their order.
const LINEARS: [Names; 3] = [names!("ffn_gate"), names!("ffn_up"), names!("ffn_down")];
/// Norms, and weight and bias of every layer.
const OWN: usize = 2 + 2 * LINEARS.len();

/// Dimensions and constants of a block of Llama's family.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LlamaShape {
    /// Tokens `T` of a sample.
    pub tokens: usize,
    /// Width `d`.
    pub width: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values: a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head: even. Heads need not add up to the width.
    pub head_dim: usize,
    /// Hidden width of the MLP.
    pub inner: usize,
    /// `ε` of the norms.
    pub eps: f64,
    /// Added to the norms' weights: 0, or 1 (Gemma).
    pub norm_offset: f64,
    /// Function of the MLP's gate.
    pub gate: Gate,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether the output of attention has one.
    pub output_bias: bool,
    /// Whether the layers of the MLP have one.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalized, head by head.
    pub head_norms: bool,
    /// Whether the branches end with a norm.
    pub post_norms: bool,
    /// How many tokens a query sees in the blocks of `sliding`.
    pub window: Option<usize>,
    /// Blocks with a window.
    pub sliding: BlockSet,
    /// Blocks without positions.
    pub unrotated: BlockSet,
    /// Dropout of attention probabilities.
    pub attention_dropout: f64,
    /// How matrices begin.
    pub init: Scheme,
}

impl LlamaShape {
    /// Width of all heads of queries.
    pub const fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all heads of keys, and of values.
    pub const fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The wider of all heads of queries and a row: a place that has one after the other.
    pub(super) const fn room(&self) -> usize {
        larger(self.q_width(), self.width)
    }

    /// Inputs and outputs of attention's layers: queries, keys, values, output.
    pub(super) const fn attention_layer(&self, i: usize) -> (usize, usize) {
        match i {
            0 => (self.width, self.q_width()),
            1 | 2 => (self.width, self.kv_width()),
            _ => (self.q_width(), self.width),
        }
    }

    /// Inputs and outputs of the MLP's layers: gate, up, down.
    const fn mlp_layer(&self, i: usize) -> (usize, usize) {
        if i < 2 { (self.width, self.inner) } else { (self.inner, self.width) }
    }

    /// The norm of rows of the residual stream.
    pub(super) const fn norm(&self) -> RmsNorm {
        RmsNorm { groups: 1, width: self.width, eps: self.eps, offset: self.norm_offset }
    }

    /// `n` of a branch, which is cheaper to compute again than to keep.
    pub(super) fn normalize<B: Backend>(
        &self,
        be: &mut B,
        at: &At<'_>,
        weight: &Tensor,
        x: Reals,
        normal: Reals,
        stats: Reals,
    ) -> Result<()> {
        let [x, normal] = [x, normal].map(|of| rows_of(of, self.width));
        be.rms_norm(&self.norm(), at.value(weight), x, normal, stats)
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
            ("heads of keys", self.kv_heads),
            ("width of a head", self.head_dim),
            ("MLP width", self.inner),
        ];
        let mut i = 0;
        while i < sizes.len() {
            if sizes[i].1 == 0 {
                return Err(Error::setting(sizes[i].0, 0.0, "1 or more"));
            }
            i += 1;
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let possible = "a divisor of the heads of queries";
            return Err(Error::setting("heads of keys", self.kv_heads as f64, possible));
        }
        if !self.head_dim.is_multiple_of(2) {
            let found = self.head_dim as f64;
            return Err(Error::setting("width of a head", found, "an even number"));
        }
        if let Some(0) = self.window {
            return Err(Error::setting("sliding window", 0.0, "1 or more"));
        }
        let p = self.attention_dropout;
        if !(p >= 0.0 && p < 1.0) {
            return Err(Error::setting("attention dropout", p, "0 up to, not including, 1"));
        }
        let q = ok!(product("heads", &[self.heads, self.head_dim]));
        ok!(product("block", &[self.width, 4, q]));
        ok!(product("block", &[self.width, 3, self.inner]));
        let widest = if q > self.inner { q } else { self.inner };
        let widest = if widest > self.width { widest } else { self.width };
        ok!(product("frame", &[self.tokens, 16, widest]));
        Ok(())
    }
}

/// The MLP branch. Names are those of GGUF files.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatedMlp {
    shape: LlamaShape,
    lora: Option<LoraShape>,
    /// Norms (input, output), the layers, their adapters.
    tensors: [Tensor; OWN + 2 * LINEARS.len()],
}

impl GatedMlp {
    /// The branch; its tensors take their places in `room`.
    pub const fn new(
        shape: LlamaShape,
        lora: Option<LoraShape>,
        freeze: Freeze,
        room: Room,
    ) -> (Self, Room) {
        let (s, d) = (&shape, shape.width);
        let start = if s.norm_offset == 0.0 { Init::Ones } else { Init::Zeros };
        let mut tensors = [Tensor::vector("", 0, Init::Zeros); OWN + 2 * LINEARS.len()];
        tensors[0] = Tensor::vector("ffn_norm.weight", d, start);
        tensors[1] = Tensor::vector("post_ffw_norm.weight", d, start).when(s.post_norms);
        let mut i = 0;
        while i < LINEARS.len() {
            let (inputs, outputs) = shape.mlp_layer(i);
            let init = if i < 2 { s.init.matrix(outputs) } else { s.init.projection(outputs) };
            let own = LINEARS[i].own(inputs, outputs, s.mlp_bias, init);
            let adapter = LINEARS[i].adapter(inputs, outputs, lora);
            (tensors[2 + 2 * i], tensors[3 + 2 * i]) = (own[0], own[1]);
            (tensors[OWN + 2 * i], tensors[OWN + 1 + 2 * i]) = (adapter[0], adapter[1]);
            i += 1;
        }
        let (own, adapters) = tensors.split_at_mut(OWN);
        let room = room.place(own, freeze).place(adapters, Freeze::Nothing);
        (Self { shape, lora, tensors }, room)
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
            weight: &self.tensors[2 + 2 * i],
            bias: &self.tensors[3 + 2 * i],
            adapter: [&self.tensors[OWN + 2 * i], &self.tensors[OWN + 1 + 2 * i]],
            scale: match self.lora {
                Some(lora) => lora.scale(),
                None => 0.0,
            },
        }
    }

    /// `act(gate(n))·up(n)` into the first values of the scratch, and what leads there into the
    /// frame.
    fn hidden<B: Backend>(&self, be: &mut B, at: &At<'_>, x: Reals) -> Result<()> {
        let s = &self.shape;
        let (d, rows) = (s.width, x.len().checked_div(s.width).unwrap_or(0));
        let (frame, mut scratch) = (self.frame(at, rows), Cut(at.scratch));
        // Nothing reads n any more when the product comes.
        let (normal, act) = (at.scratch.sub(0, rows * d), at.scratch.sub(0, rows * s.inner));
        let _ = scratch.take(rows * larger(d, s.inner));
        s.normalize(be, at, &self.tensors[0], x, normal, frame.stats)?;
        for (i, place) in [frame.gate, frame.up].into_iter().enumerate() {
            let to = (place, frame.u[i]);
            self.linear(i).forward(be, at, rows, normal, to, scratch.0)?;
        }
        be.gated(s.gate, frame.gate, frame.up, act)
    }

    fn frame(&self, at: &At<'_>, rows: usize) -> Frame {
        let (s, r, post) = (&self.shape, self.rank(), usize::from(self.shape.post_norms));
        let mut cut = Cut(at.frame);
        let mut take = |values: usize| cut.take(rows * values);
        let hidden = larger(s.inner, s.width);
        let [gate, up] = [take(hidden), take(hidden)];
        Frame {
            gate: gate.sub(0, rows * s.inner),
            up: up.sub(0, rows * s.inner),
            stats: take(1),
            u: [take(r), take(r), take(r)],
            out: take(post * s.width),
            out_stats: take(post),
            used: [gate, up].map(|of| of.sub(0, rows * s.width)),
        }
    }
}

/// The intermediates of one call, for `rows` rows.
struct Frame {
    /// `[rows, inner]`.
    gate: Reals,
    /// `[rows, inner]`.
    up: Reals,
    /// `[rows]`.
    stats: Reals,
    /// `[rows, r]` of the layers' adapters.
    u: [Reals; 3],
    /// `[rows, d]`: the output before its norm.
    out: Reals,
    /// `[rows]`.
    out_stats: Reals,
    /// `[rows, d]`: the places of `gate` and `up`, once nothing reads these any more.
    used: [Reals; 2],
}

impl<B: Backend> Branch<B> for GatedMlp {
    fn needs(&self, _: usize, _: usize) -> Needs {
        let (s, r) = (&self.shape, self.rank());
        let post = if s.post_norms { s.width + 1 } else { 0 };
        let hidden = larger(s.inner, s.width);
        let kept = 2 * hidden + 1 + 3 * r + post;
        // Backward: the product of gate and up, and its gradient; that of the output before its
        // norm; adapters. Forward: n, then the product.
        let out = if s.post_norms { s.width } else { 0 };
        let back = larger(2 * s.inner + out, hidden) + 2 * r;
        Needs {
            frame: s.tokens.saturating_mul(kept),
            scratch: s.tokens.saturating_mul(back),
            fixed: 0,
        }
    }

    fn by_token(&self) -> bool {
        true
    }

    fn forward(&self, be: &mut B, at: &At<'_>, x: Reals, y: Reals) -> Result<()> {
        self.hidden(be, at, x)?;
        let s = &self.shape;
        let (d, rows) = (s.width, x.len().checked_div(s.width).unwrap_or(0));
        let (frame, mut scratch) = (self.frame(at, rows), Cut(at.scratch));
        let act = scratch.take(rows * s.inner);
        let to = (if s.post_norms { frame.out } else { y }, frame.u[2]);
        self.linear(2).forward(be, at, rows, act, to, scratch.0)?;
        if s.post_norms {
            let (norm, weight) = (s.norm(), at.value(&self.tensors[1]));
            be.rms_norm(&norm, weight, rows_of(frame.out, d), rows_of(y, d), frame.out_stats)?;
        }
        Ok(())
    }

    fn again(&self, be: &mut B, at: &At<'_>, x: Reals, spare: Reals) -> Result<()> {
        let s = &self.shape;
        if s.post_norms {
            return self.forward(be, at, x, spare);
        }
        self.hidden(be, at, x)?;
        let rows = x.len().checked_div(s.width).unwrap_or(0);
        let (frame, mut scratch) = (self.frame(at, rows), Cut(at.scratch));
        let act = scratch.take(rows * s.inner);
        self.linear(2).inside(be, at, rows, act, frame.u[2], scratch.0)
    }

    fn vjp(&self, be: &mut B, at: &At<'_>, x: Reals, gy: Reals, gx: Reals) -> Result<()> {
        let s = &self.shape;
        let (d, rows) = (s.width, x.len().checked_div(s.width).unwrap_or(0));
        let (frame, norm) = (self.frame(at, rows), s.norm());
        let mut scratch = Cut(at.scratch);
        let [act, dact] = [0; 2].map(|_| scratch.take(rows * s.inner));
        let gy = if s.post_norms {
            let dout = scratch.take(rows * d);
            be.fill_reals(dout, B::Real::of(0.0))?;
            let (t, [out, gy, dx]) =
                (&self.tensors[1], [frame.out, gy, dout].map(|of| rows_of(of, d)));
            let slope = at.slope(t);
            be.rms_norm_vjp(&norm, at.value(t), out, frame.out_stats, gy, dx, slope)?;
            dout
        } else {
            gy
        };
        // Cheaper to compute again than to keep.
        be.gated(s.gate, frame.gate, frame.up, act)?;
        let from = (act, frame.u[2]);
        self.linear(2).vjp(be, at, rows, from, gy, (dact, false), scratch.0)?;
        // From here on `dact` is the gradient of up, and `act` that of the gate.
        be.gated_vjp(s.gate, frame.gate, frame.up, dact, act)?;
        let [normal, dn] = frame.used;
        s.normalize(be, at, &self.tensors[0], x, normal, frame.stats)?;
        for (i, dy) in [act, dact].into_iter().enumerate() {
            let from = (normal, frame.u[i]);
            self.linear(i).vjp(be, at, rows, from, dy, (dn, i > 0), scratch.0)?;
        }
        let (t, [x, dn, gx]) = (&self.tensors[0], [x, dn, gx].map(|of| rows_of(of, d)));
        be.rms_norm_vjp(&norm, at.value(t), x, frame.stats, dn, gx, at.slope(t))
    }
}

/// Attention and MLP of Llama's family.
impl Branches for (GroupedAttention, GatedMlp) {
    const COUNT: usize = 2;

    fn branch<B: Backend>(&self, i: usize) -> &dyn Branch<B> {
        if i == 0 { &self.0 } else { &self.1 }
    }

    fn tensors(&self, i: usize) -> &[Tensor] {
        if i == 0 { self.0.tensors() } else { self.1.tensors() }
    }
}

/// Blocks of Llama's family.
pub type LlamaBlocks = Residual<(GroupedAttention, GatedMlp)>;

impl LlamaBlocks {
    /// Lays out parameters, gradients and optimizer state of `blocks` blocks. `freeze` says what of
    /// them stays as it is; the adapters of `lora`, one for every linear layer, are trained in any
    /// case.
    ///
    /// # Errors
    /// As [`LlamaShape::check`] and [`Params::layout`]; [`Error::Setting`] for adapters that do not
    /// fit.
    pub const fn layout(
        shape: &LlamaShape,
        blocks: usize,
        lora: Option<LoraShape>,
        freeze: Freeze,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<Self> {
        ok!(shape.check());
        if let Some(lora) = &lora {
            ok!(lora.check(shape.width));
            ok!(product("adapters", &[lora.rank, 16, shape.width]));
        }
        let (attention, room) = GroupedAttention::new(*shape, lora, freeze, Room::NONE);
        let (mlp, room) = GatedMlp::new(*shape, lora, freeze, room);
        let params = ok!(Params::layout(blocks, room, freeze, gradients, layout));
        Ok(Self::new((attention, mlp), params, shape.tokens, shape.width))
    }

    /// The same blocks, with the same parameters, for samples of another length.
    #[must_use]
    pub const fn with_tokens(self, tokens: usize) -> Self {
        let branches = (self.branches.0.with_tokens(tokens), self.branches.1.with_tokens(tokens));
        Self::new(branches, self.params, tokens, self.width()).in_token_chunks(self.token_chunk())
    }

    /// Where a call's residual has left keys and values: `[rows, kv_width]` each.
    pub fn keys_values<B: Backend>(&self, call: &Call) -> [Columns; 2] {
        self.branches.0.keys_values(&self.first_at::<B>(call))
    }
}
