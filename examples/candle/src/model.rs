//! A transformer for 8×8 images written as a candle user writes it: nothing here knows of
//! reversible training, except that a block gives its residual and uses the [`Dropout`] that can be
//! replayed.

use bdia_core::rng::{Draw, Stream};
use candle_core::{D, DType, Device, IndexOp, Module, ModuleT, Result, Tensor};
use candle_nn::{Linear, VarBuilder, VarMap, linear, linear_no_bias, ops};

use crate::Dropout;

/// Sizes of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    /// Blocks `K`.
    pub blocks: usize,
    /// Width `d`.
    pub width: usize,
    /// Heads, a divisor of the width.
    pub heads: usize,
    /// Width of the MLP.
    pub hidden: usize,
    /// Probability of dropout on both branches of a block.
    pub dropout: f32,
}

/// Tokens of an image: patches of 2×2 pixels.
pub const TOKENS: usize = 16;

/// Layer normalization with a gradient: [`candle_nn::LayerNorm`] takes a fused path without one for
/// contiguous inputs.
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    bias: Tensor,
}

/// A [`Norm`] over `width` values.
///
/// # Errors
/// candle's.
pub fn norm(width: usize, vb: VarBuilder) -> Result<Norm> {
    let weight = vb.get_with_hints(width, "weight", candle_nn::Init::Const(1.0))?;
    let bias = vb.get_with_hints(width, "bias", candle_nn::Init::Const(0.0))?;
    Ok(Norm { weight, bias })
}

impl Module for Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm_slow(x, &self.weight, &self.bias, 1e-5)
    }
}

/// Self-attention of all tokens.
#[derive(Debug, Clone)]
struct Attention {
    qkv: Linear,
    out: Linear,
    heads: usize,
}

impl Module for Attention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        // [3, b, heads, t, d / heads]
        let qkv = self
            .qkv
            .forward(x)?
            .reshape((b, t, 3, self.heads, d / self.heads))?
            .permute((2, 0, 3, 1, 4))?;
        let part = |i| qkv.i(i)?.contiguous();
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scores = (q.matmul(&k.t()?)? * (self.heads as f64 / d as f64).sqrt())?;
        let y = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        self.out.forward(&y.transpose(1, 2)?.reshape((b, t, d))?)
    }
}

/// A pre-norm transformer block, as a residual: `h(x) = f(x) + g(x + f(x))` with `f` attention and
/// `g` the MLP.
#[derive(Debug, Clone)]
pub struct Block {
    ln_1: Norm,
    attn: Attention,
    ln_2: Norm,
    c_fc: Linear,
    c_proj: Linear,
    dropout: Dropout,
}

impl Block {
    /// A block of a model.
    ///
    /// # Errors
    /// candle's.
    pub fn new(c: &Config, vb: VarBuilder) -> Result<Self> {
        let d = c.width;
        Ok(Self {
            ln_1: norm(d, vb.pp("ln_1"))?,
            attn: Attention {
                qkv: linear(d, 3 * d, vb.pp("attn.c_attn"))?,
                out: linear(d, d, vb.pp("attn.c_proj"))?,
                heads: c.heads,
            },
            ln_2: norm(d, vb.pp("ln_2"))?,
            c_fc: linear(d, c.hidden, vb.pp("mlp.c_fc"))?,
            c_proj: linear(c.hidden, d, vb.pp("mlp.c_proj"))?,
            dropout: Dropout::new(c.dropout),
        })
    }
}

impl ModuleT for Block {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let f = self.dropout.forward(&self.attn.forward(&self.ln_1.forward(x)?)?, train)?;
        let g = self.c_fc.forward(&self.ln_2.forward(&(x + &f)?)?)?.gelu()?;
        f + self.dropout.forward(&self.c_proj.forward(&g)?, train)?
    }
}

/// What comes before and after the blocks.
#[derive(Debug, Clone)]
pub struct Ends {
    patch: Linear,
    positions: Tensor,
    ln_f: Norm,
    head: Linear,
}

impl Ends {
    /// The ends of a model of ten classes.
    ///
    /// # Errors
    /// candle's.
    pub fn new(c: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            patch: linear(4, c.width, vb.pp("patch"))?,
            positions: vb.get_with_hints(
                (TOKENS, c.width),
                "positions",
                candle_nn::Init::Randn { mean: 0.0, stdev: 0.1 },
            )?,
            ln_f: norm(c.width, vb.pp("ln_f"))?,
            head: linear_no_bias(c.width, 10, vb.pp("head"))?,
        })
    }

    /// `x_0[b, 16, d]` of images `[b, 64]`.
    ///
    /// # Errors
    /// candle's.
    pub fn embed(&self, images: &Tensor) -> Result<Tensor> {
        let b = images.dim(0)?;
        let patches =
            images.reshape((b, 4, 2, 4, 2))?.permute((0, 1, 3, 2, 4))?.reshape((b, TOKENS, 4))?;
        self.patch.forward(&patches)?.broadcast_add(&self.positions)
    }

    /// Logits `[b, 10]` of `x_K`.
    ///
    /// # Errors
    /// candle's.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.ln_f.forward(x)?.mean(1)?)
    }
}

/// The digits that come with `smartcore`: images scaled to −1 … 1, and their classes.
#[derive(Debug, Clone)]
pub struct Digits {
    images: Vec<f32>,
    classes: Vec<u32>,
}

impl Digits {
    /// Training and test images: every fifth is for the test.
    pub fn load() -> (Self, Self) {
        let all = smartcore::dataset::digits::load_dataset();
        let images = all.data.iter().map(|p| p / 8.0 - 1.0).collect();
        let classes = all.target.iter().map(|&c| c as u32).collect();
        Self { images, classes }.split()
    }

    /// All but every fifth, and every fifth: of the training images, a part to choose settings
    /// with.
    pub fn split(&self) -> (Self, Self) {
        let pick = |fifth: bool| {
            let rows = || (0..self.len()).filter(|i| (i % 5 == 4) == fifth);
            let images = rows().flat_map(|i| &self.images[i * 64..(i + 1) * 64]).copied().collect();
            Self { images, classes: rows().map(|i| self.classes[i]).collect() }
        };
        (pick(false), pick(true))
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// Images `[n, 64]` and classes `[n]` of some rows (a row beyond the last counts from the first
    /// again).
    ///
    /// # Errors
    /// candle's.
    pub fn batch(&self, rows: &[usize]) -> Result<(Tensor, Tensor)> {
        let (mut images, mut classes) = (Vec::new(), Vec::new());
        for row in rows.iter().map(|r| r % self.len()) {
            images.extend_from_slice(&self.images[row * 64..(row + 1) * 64]);
            classes.push(self.classes[row]);
        }
        let n = rows.len();
        Ok((
            Tensor::from_vec(images, (n, 64), &Device::Cpu)?,
            Tensor::from_vec(classes, n, &Device::Cpu)?,
        ))
    }

    /// Part of the images whose class `logits` names.
    ///
    /// # Errors
    /// candle's.
    pub fn accuracy(&self, logits: impl Fn(&Tensor) -> Result<Tensor>) -> Result<f64> {
        let mut right = 0.0;
        for from in (0..self.len()).step_by(128) {
            let rows: Vec<usize> = (from..self.len().min(from + 128)).collect();
            let (x, y) = self.batch(&rows)?;
            let named = logits(&x)?.argmax(D::Minus1)?;
            right += f64::from(named.eq(&y)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(right / self.len() as f64)
    }
}

/// Draws all parameters anew: normal with the deviation `1/√inputs` for matrices, zeros and ones as
/// they are. candle's own initialization cannot be repeated on the CPU.
///
/// # Errors
/// candle's.
pub fn initialize(vars: &VarMap, seed: u64) -> Result<()> {
    let data = vars.data().lock().map_err(candle_core::Error::msg)?;
    let mut named: Vec<_> = data.iter().collect();
    named.sort_by_key(|(name, _)| *name);
    for (i, (name, var)) in named.into_iter().enumerate() {
        let scale = match *var.dims() {
            [_, inputs] if name.ends_with("weight") => 1.0 / (inputs as f64).sqrt(),
            [_, _] => 0.1,
            _ if name.ends_with("bias") => 0.0,
            _ => continue,
        };
        let stream = Stream::new(seed, 0, i as u32, 0, 0, Draw::Init);
        let values: Vec<f32> =
            (0..var.elem_count()).map(|e| (scale * stream.normal(e as u32)) as f32).collect();
        var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
    }
    Ok(())
}
