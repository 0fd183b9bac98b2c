//! Parts of transformers over the backend traits: each owns its tensors, its memory, its forward
//! pass and its vector-Jacobian product.
//!
//! Names are GPT-2's (`ln_1`, `c_attn`, `c_proj`, `c_fc`, `wte`, `wpe`, `ln_f`). All matrices are
//! row-major; weights are `[in, out]`, so a linear layer is `y = x·W + b`. A residual block is a
//! composition of branches ([`Residual`]); its vector-Jacobian product is written once.

mod attention;
mod block;
mod classifier;
mod embedding;
mod encoder;
mod gated;
mod grouped;
mod head;
mod linear;
mod lora;
mod mlp;
mod norm;
mod params;
mod patches;
mod rotary;

pub use attention::{AttentionShape, CrossAttention, SelfAttention};
pub use block::{
    At, BlockShape, Branch, Branches, Cached, CachedContext, Decoder, PreNorm, Residual,
};
pub use classifier::{ClassHead, Mixup};
pub use embedding::TokenEmbedding;
pub use encoder::EncoderOutput;
pub use gated::{GatedMlp, LlamaBlocks, LlamaShape};
pub use grouped::GroupedAttention;
pub use head::LmHead;
pub use linear::{linear, linear_vjp};
pub use lora::LoraShape;
pub use mlp::{Mlp, MlpShape};
pub use norm::Norm;
pub use params::{
    Freeze, Gradients, Home, Init, Matrix, Parameter, Params, Room, Scheme, Store, Stored, Tensor,
    Tensors, Updater,
};
pub use patches::{PatchEmbedding, Patches};
pub use rotary::{BlockSet, RotaryAngles, RotaryScaling};
