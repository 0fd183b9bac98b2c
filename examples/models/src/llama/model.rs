//! What makes a language model one of Llama's family.

use bdia_core::Reals;
use bdia_core::arena::{Ints, Layout};
use bdia_core::backend::{Attention, Backend, Columns, Gate};
use bdia_core::error::{Error, Result};
use bdia_core::layers::{
    BlockSet, GatedMlp, Gradients, GroupedAttention, Init, LlamaBlocks, LlamaShape, Norm,
    Parameter, RotaryAngles, RotaryScaling, Scheme, Tensor,
};
use bdia_core::stack::Call;

use crate::language::{self, ENDS, Family};
use crate::named::Adapters;

/// One of Llama's family, laid out in the arenas of a backend.
pub type Llama = language::model::LanguageModel<Dims>;

/// How it is trained.
pub type Setup = language::model::Setup<Dims>;

/// The architecture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Size of the vocabulary.
    pub vocab: usize,
    /// The longest context.
    pub positions: usize,
    /// Width `d`.
    pub width: usize,
    /// Blocks `K`.
    pub layers: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Hidden width of the MLP.
    pub inner: usize,
    /// `ε` of the norms.
    pub eps: f64,
    /// Added to the norms' weights: 0, or 1 (Gemma).
    pub norm_offset: f64,
    /// Function of the MLP's gate.
    pub gate: Gate,
    /// Biases: of queries, keys and values; of the output of attention; of the MLP.
    pub biases: [bool; 3],
    /// Whether queries and keys are normalized, head by head.
    pub head_norms: bool,
    /// Whether the branches end with a norm (Gemma).
    pub post_norms: bool,
    /// How many tokens a query sees in the blocks of `sliding`.
    pub window: Option<usize>,
    /// Blocks with a window.
    pub sliding: BlockSet,
    /// Blocks without positions (SmolLM3).
    pub unrotated: BlockSet,
    /// Angles of the positions in blocks that see everything, and in those with a window.
    pub angles: [RotaryAngles; 2],
    /// Whether the embedding is multiplied by `√d` (Gemma).
    pub scaled_embedding: bool,
    /// The head's matrix is the embedding.
    pub tied: bool,
    /// Dropout of attention probabilities.
    pub dropout: f64,
    /// Deviation of matrices at the start.
    pub sigma: f64,
}

impl Dims {
    /// A Llama of these sizes (vocabulary, positions, width, heads, heads of keys and values, inner
    /// width, layers) with a tied head and no dropout.
    pub fn plain([vocab, positions, width, heads, kv_heads, inner, layers]: [usize; 7]) -> Self {
        let head_dim = width.checked_div(heads).unwrap_or(0);
        let angles = RotaryAngles { head_dim, theta: 10_000.0, scaling: RotaryScaling::None };
        Self {
            vocab,
            positions,
            width,
            layers,
            heads,
            kv_heads,
            head_dim,
            inner,
            eps: 1e-5,
            norm_offset: 0.0,
            gate: Gate::Silu,
            biases: [false; 3],
            head_norms: false,
            post_norms: false,
            window: None,
            sliding: BlockSet::NONE,
            unrotated: BlockSet::NONE,
            angles: [angles; 2],
            scaled_embedding: false,
            tied: true,
            dropout: 0.0,
            sigma: 0.02,
        }
    }

    /// The shape of a block for samples of `tokens` tokens.
    pub fn block(&self, tokens: usize) -> LlamaShape {
        LlamaShape {
            tokens,
            width: self.width,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            inner: self.inner,
            eps: self.eps,
            norm_offset: self.norm_offset,
            gate: self.gate,
            qkv_bias: self.biases[0],
            output_bias: self.biases[1],
            mlp_bias: self.biases[2],
            head_norms: self.head_norms,
            post_norms: self.post_norms,
            window: self.window,
            sliding: self.sliding,
            unrotated: self.unrotated,
            attention_dropout: self.dropout,
            init: Scheme::Normal(self.sigma),
        }
    }
}

impl Family for Dims {
    type Branches = (GroupedAttention, GatedMlp);

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
        self.kv_heads.saturating_mul(self.head_dim)
    }

    fn tied(&self) -> bool {
        self.tied
    }

    fn undropped(self) -> Self {
        Self { dropout: 0.0, ..self }
    }

    fn embedding_scale(&self) -> f64 {
        if self.scaled_embedding { (self.width as f64).sqrt() } else { 1.0 }
    }

    fn window(&self) -> Option<usize> {
        self.window
    }

    fn check(&self) -> Result<()> {
        for angles in &self.angles {
            if angles.head_dim != self.head_dim {
                let (what, expected) = ("rotary positions: width of a head", self.head_dim);
                return Err(Error::Shape { what, expected, found: angles.head_dim });
            }
        }
        Ok(())
    }

    fn blocks(
        &self,
        tokens: usize,
        adapters: Option<Adapters>,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<LlamaBlocks> {
        let (lora, freeze) = Adapters::of_blocks(adapters);
        LlamaBlocks::layout(&self.block(tokens), self.layers, lora, freeze, gradients, layout)
    }

    fn ends(&self) -> [Tensor; ENDS] {
        let (d, normal) = (self.width, Init::Normal(self.sigma));
        let start = if self.norm_offset == 0.0 { Init::Ones } else { Init::Zeros };
        let nothing = Tensor::vector("", 0, Init::Zeros);
        [
            Tensor::matrix("token_embd.weight", self.vocab, d, normal),
            nothing,
            Tensor::vector("output_norm.weight", d, start),
            nothing,
            Tensor::matrix("output.weight", self.vocab, d, normal).when(!self.tied),
        ]
    }

    fn norm(&self, [weight, _]: [Parameter; 2]) -> Norm {
        Norm::Rms { eps: self.eps, offset: self.norm_offset, weight }
    }

    fn angles(&self) -> [Option<RotaryAngles>; 2] {
        let [all, sliding] = self.angles;
        [Some(all), self.window.map(|_| sliding)]
    }

    fn set_tables(blocks: &mut LlamaBlocks, tables: [Reals; 2]) {
        blocks.branches.0.tables = tables;
    }

    const PACKS: bool = true;

    fn set_places(blocks: &mut LlamaBlocks, [positions, starts]: [Ints; 2]) {
        (blocks.branches.0.positions, blocks.branches.0.starts) = (positions, starts);
    }

    fn with_tokens(blocks: &LlamaBlocks, tokens: usize) -> LlamaBlocks {
        blocks.with_tokens(tokens)
    }

    fn keys_values<B: Backend>(blocks: &LlamaBlocks, call: &Call) -> [Columns; 2] {
        blocks.keys_values::<B>(call)
    }

    fn cached_attention(blocks: &LlamaBlocks, keys: usize, lens: Ints) -> Attention {
        blocks.branches.0.cached_attention(keys, lens)
    }

    /// Hugging Face's.
    fn name(&self, block: Option<usize>, tensor: &Tensor) -> String {
        let Some(k) = block else {
            return match tensor.name {
                "token_embd.weight" => "model.embed_tokens.weight",
                "output_norm.weight" => "model.norm.weight",
                _ => "lm_head.weight",
            }
            .into();
        };
        let (part, kind) = tensor.name.split_once('.').unwrap_or((tensor.name, ""));
        let part = match part {
            "attn_norm" => "input_layernorm",
            "attn_q" => "self_attn.q_proj",
            "attn_k" => "self_attn.k_proj",
            "attn_v" => "self_attn.v_proj",
            "attn_output" => "self_attn.o_proj",
            "attn_q_norm" => "self_attn.q_norm",
            "attn_k_norm" => "self_attn.k_norm",
            "post_attention_norm" => "post_attention_layernorm",
            // One name for two things.
            "ffn_norm" if self.post_norms => "pre_feedforward_layernorm",
            "ffn_norm" => "post_attention_layernorm",
            "ffn_gate" => "mlp.gate_proj",
            "ffn_up" => "mlp.up_proj",
            "ffn_down" => "mlp.down_proj",
            "post_ffw_norm" => "post_feedforward_layernorm",
            other => other,
        };
        format!("model.layers.{k}.{part}.{kind}")
    }

    const TRANSPOSED: bool = true;

    const TARGETS: &'static [&'static str] =
        &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
}
