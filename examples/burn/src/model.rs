//! A transformer of burn's own modules for the measurements and tests. Nothing here knows of
//! reversible training, except that a block gives its residual.

use burn::module::Module;
use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};
use burn::nn::{Dropout, DropoutConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::{Tensor, activation::gelu, backend::Backend};

use crate::Residual;

/// A pre-norm transformer block: `h(x) = f(x) + g(x + f(x))` with `f` attention and `g` the MLP.
#[derive(Module, Debug)]
pub struct Block<B: Backend> {
    ln_1: LayerNorm<B>,
    attn: MultiHeadAttention<B>,
    ln_2: LayerNorm<B>,
    c_fc: Linear<B>,
    c_proj: Linear<B>,
    dropout: Dropout,
}

impl<B: Backend> Residual<B, 3> for Block<B> {
    fn residual(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let f = self.attn.forward(MhaInput::self_attn(self.ln_1.forward(x.clone()))).context;
        let f = self.dropout.forward(f);
        let g = self.c_proj.forward(gelu(self.c_fc.forward(self.ln_2.forward(x + f.clone()))));
        f + self.dropout.forward(g)
    }
}

/// Blocks between an embedding and a head.
#[derive(Module, Debug)]
pub struct Model<B: Backend> {
    /// From the features of a token to the width.
    pub embed: Linear<B>,
    /// The blocks.
    pub blocks: Vec<Block<B>>,
    ln_f: LayerNorm<B>,
    head: Linear<B>,
}

impl<B: Backend> Model<B> {
    /// `blocks` blocks of four heads for tokens of 4 features, with an MLP of twice the width, and
    /// 10 outputs.
    pub fn new(blocks: usize, width: usize, dropout: f64, device: &B::Device) -> Self {
        let norm = || LayerNormConfig::new(width).init(device);
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let block = |_| Block {
            ln_1: norm(),
            attn: MultiHeadAttentionConfig::new(width, 4).with_dropout(dropout).init(device),
            ln_2: norm(),
            c_fc: linear(width, 2 * width),
            c_proj: linear(2 * width, width),
            dropout: DropoutConfig::new(dropout).init(),
        };
        Self {
            embed: linear(4, width),
            blocks: (0..blocks).map(block).collect(),
            ln_f: norm(),
            head: linear(width, 10),
        }
    }

    /// The mean squared difference of the head's outputs `[samples, 10]` for `x_K` from a target.
    pub fn loss(&self, x: Tensor<B, 3>, target: Tensor<B, 2>) -> Tensor<B, 1> {
        let mean = self.ln_f.forward(x).mean_dim(1).squeeze_dim::<2>(1);
        (self.head.forward(mean) - target).powi_scalar(2).mean()
    }

    /// The plain residual network `x_{k+1} = x_k + h_k(x_k)`, by burn alone.
    pub fn standard(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.blocks.iter().fold(x, |x, block| x.clone() + block.residual(x))
    }
}
