//! What makes a language model a GPT-2.

use bdia_core::arena::{Ints, Layout};
use bdia_core::backend::{Attention, Backend, Columns, Gelu, Mask};
use bdia_core::error::Result;
use bdia_core::layers::{
    BlockShape, Gradients, LmHead, LoraShape, Mlp, Norm, Parameter, PreNorm, Scheme, SelfAttention,
    Tensor, TokenEmbedding,
};
use bdia_core::stack::Call;

use crate::language::{self, ENDS, Family};
use crate::named::Adapters;

/// A GPT-2 laid out in the arenas of a backend.
pub type Gpt2 = language::model::LanguageModel<Dims>;

/// How it is trained.
pub type Setup = language::model::Setup<Dims>;

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

impl Family for Dims {
    type Branches = (SelfAttention, Mlp);

    fn vocab(&self) -> usize {
        self.vocab
    }

    fn positions(&self) -> usize {
        self.positions
    }

    fn width(&self) -> usize {
        self.width
    }

    fn layers(&self) -> usize {
        self.layers
    }

    fn kv_width(&self) -> usize {
        self.width
    }

    fn tied(&self) -> bool {
        self.tied
    }

    fn embedding_dropout(&self) -> f64 {
        self.dropout[0]
    }

    fn undropped(self) -> Self {
        Self { dropout: [0.0; 3], ..self }
    }

    fn blocks(
        &self,
        tokens: usize,
        adapters: Option<Adapters>,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<PreNorm> {
        let (lora, freeze) = Adapters::of_blocks(adapters);
        PreNorm::layout(&self.block(tokens), self.layers, lora, freeze, gradients, layout)
    }

    fn ends(&self) -> [Tensor; ENDS] {
        let [wte, wpe] = TokenEmbedding::tensors(self.vocab, self.positions, self.width, 0.02);
        let [norm, norm_bias, lm_head] = LmHead::tensors(self.vocab, self.width, self.tied);
        [wte, wpe, norm, norm_bias, lm_head]
    }

    fn norm(&self, [weight, bias]: [Parameter; 2]) -> Norm {
        Norm::Layer { eps: self.eps, weight, bias }
    }

    fn with_tokens(blocks: &PreNorm, tokens: usize) -> PreNorm {
        blocks.with_tokens(tokens)
    }

    fn keys_values<B: Backend>(blocks: &PreNorm, call: &Call) -> [Columns; 2] {
        let keys = blocks.keys_values::<B>(call);
        [keys, Columns { at: keys.at + blocks.width(), ..keys }]
    }

    fn cached_attention(blocks: &PreNorm, keys: usize, lens: Ints) -> Attention {
        blocks.branches.0.cached_attention(keys, lens)
    }

    /// Hugging Face's, without `transformer.`.
    fn name(&self, block: Option<usize>, tensor: &Tensor) -> String {
        match block {
            Some(k) => format!("h.{k}.{}", tensor.name),
            None => tensor.name.into(),
        }
    }

    /// With `transformer.`, except the head's own matrix.
    fn full_name(name: &str) -> String {
        if name == "lm_head.weight" { name.into() } else { format!("transformer.{name}") }
    }

    const TRANSPOSED: bool = false;

    const TARGETS: &'static [&'static str] = &["c_attn"];

    /// PEFT has one adapter for all of `c_attn`: the first half of its ranks is for queries, in the
    /// first third of its rows, the other for values, in the last.
    fn peft_up(shape: &LoraShape, outputs: usize, ours: &[f32]) -> Vec<f32> {
        let (r, d) = (shape.rank, outputs / 3);
        let mut all = vec![0.0; outputs * 2 * r];
        for (j, row) in all.chunks_exact_mut(2 * r).enumerate() {
            let from = match j / d {
                0 => 0..r,
                1 => 0..0,
                _ => r..2 * r,
            };
            for q in from {
                row[q] = ours[q * d + j % d];
            }
        }
        all
    }

    /// Two adapters of rank `r` and factor `α/r` are one of rank `2r` and factor `2α/2r`.
    fn peft_shape(shape: &LoraShape) -> LoraShape {
        LoraShape { rank: 2 * shape.rank, alpha: 2.0 * shape.alpha }
    }
}
