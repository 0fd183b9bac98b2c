//! Every floating-point operation that a training step must do, stage by stage.
//!
//! One addition, multiplication, comparison of floats, division, root, `exp`, `tanh`, `erf` or
//! rounding is **one** operation (so a multiply-add is two, and a transcendental function, which
//! takes the processor many, is one: the count is a lower bound of the work). Integer work (side
//! bits, checksums, Philox) and copies are not counted. Causal attention counts only the pairs that
//! a query sees (a token of the ViT sees all others). Attention's backward pass counts the scores a
//! second time, because nothing of size `T²` may be kept. `R` rows (samples · tokens), width `d`,
//! inner width `i`, vocabulary `V`, `K` blocks, `P` parameters, `pairs` of query and key over all
//! samples, and heads of width `w`. Of a Llama, whose queries have width `q = H·w` and whose keys
//! and values have width `c`, the products of a block have `2dq + 2dc + 3di` weights in place of
//! `4d² + 2di`:
//!
//! ```text
//! block, forward       products  2R(4d² + 2di) + 4·pairs·H·w
//!                      other     norms 2·7Rd, biases R(5d+i) (ViT R(2d+i)), GELU 9Ri (exact 5),
//!                                softmax 5·pairs·H + Rd, sums 2Rd
//! block, backward      products  4R(4d² + 2di) + 10·pairs·H·w
//!                      other     norms 2·14Rd, biases as forward, GELU 16Ri (exact 11),
//!                                softmax 6·pairs·H + 2Rd, sums 2Rd
//! head, both           products  6RdV                 (of the ViT R = B)
//!                      other     norm 21Rd, cross-entropy 6RV
//! embedding, both      other     3Rd
//! patches, both        products  6BNvd                (N of v values a sample)
//!                      other     21BNv + 3Rd
//! update of X          other     6Rd a block, forward (K) and inverse (K-1):
//!                                (1-γ)x + (1+γ)h, scale, round, and x from X
//! its gradient         other     4Rd a block
//! AdamW, gradient norm other     16P
//! dropout              other     1 a value, in each pass
//!
//! Llama instead of     norms: 4 and 10 a value (7 and 14), gate and SiLU 5 and 12 an inner value
//!                      (GELU), no biases; rotary positions 3R(q+c) in each pass
//! ```

use bdia_core::backend::Gelu;
use bdia_train::cli::Mode;

use crate::job::{Architecture, Job};

/// Operations of one stage of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// Its name.
    pub name: &'static str,
    /// Inside matrix products.
    pub products: f64,
    /// All others.
    pub other: f64,
}

/// What the count depends on.
struct Shape {
    width: usize,
    inner: usize,
    vocab: usize,
    layers: usize,
    heads: usize,
    head_dim: usize,
    /// Weights of a block's products.
    weights: usize,
    /// Pairs of query and key, of one sample and head.
    pairs: f64,
    /// Operations of a norm for a value, forward and backward.
    norm: [f64; 2],
    /// Operations of the MLP's function for an inner value, forward and backward.
    act: [f64; 2],
    /// Biases of a block, and values that are rotated, for a row.
    each: [usize; 2],
    /// Dropout: of the embedding, of attention probabilities, of the branches' outputs, inside the
    /// MLP.
    dropout: [f64; 4],
    /// Patches of an image and values of a patch; none of text.
    patches: Option<[usize; 2]>,
    parameters: f64,
}

/// The stages of a step of a job.
pub fn stages(job: &Job) -> Vec<Stage> {
    let t = job.tokens() as f64;
    let shape = match job.model.architecture(job) {
        Architecture::Gpt2(config) => {
            let d = config.dims();
            let [input, attention, residual] = d.dropout;
            Shape {
                width: d.width,
                inner: d.inner,
                vocab: d.vocab,
                layers: d.layers,
                heads: d.heads,
                head_dim: d.width / d.heads,
                weights: 4 * d.width * d.width + 2 * d.width * d.inner,
                pairs: t * (t + 1.0) / 2.0,
                norm: LAYER_NORM,
                act: gelu(d.gelu),
                each: [5 * d.width + d.inner, 0],
                dropout: [input, attention, residual, 0.0],
                patches: None,
                parameters: config.parameters().unwrap_or(0) as f64,
            }
        }
        Architecture::Llama(d) => {
            let (q, kv) = (d.heads * d.head_dim, d.kv_heads * d.head_dim);
            let weights = 2 * d.width * (q + kv) + 3 * d.width * d.inner;
            Shape {
                width: d.width,
                inner: d.inner,
                vocab: d.vocab,
                layers: d.layers,
                heads: d.heads,
                head_dim: d.head_dim,
                weights,
                pairs: t * (t + 1.0) / 2.0,
                // Squares and their sum, the root, the weight; backward dout·w·x and its sum, both
                // terms of dx, and dw.
                norm: [4.0, 10.0],
                // exp, addition, division, two products; backward the logistic function again.
                act: [5.0, 12.0],
                each: [0, q + kv],
                dropout: [0.0, d.dropout, 0.0, 0.0],
                patches: None,
                parameters: (d.vocab * d.width + d.layers * (weights + 2 * d.width) + d.width)
                    as f64,
            }
        }
        Architecture::Vit(d) => {
            let values = d.patches.values();
            let block = 4 * d.width * d.width + 2 * d.width * d.inner + 6 * d.width + d.inner + 1;
            let input = values * (2 + d.width) + d.width + (job.tokens() + 1) * d.width;
            Shape {
                width: d.width,
                inner: d.inner,
                vocab: d.classes,
                layers: d.layers,
                heads: d.heads,
                head_dim: d.width / d.heads,
                weights: 4 * d.width * d.width + 2 * d.width * d.inner,
                pairs: t * (t - 1.0),
                norm: LAYER_NORM,
                act: gelu(Gelu::Exact),
                each: [2 * d.width + d.inner, 0],
                dropout: d.dropout,
                patches: Some([d.patches.count(), values]),
                parameters: (input
                    + d.layers * block
                    + 2 * d.width
                    + d.width * d.classes
                    + d.classes) as f64,
            }
        }
    };
    count(&shape, job.mode, job.every(), job.batch(), job.tokens())
}

/// Of LayerNorm.
const LAYER_NORM: [f64; 2] = [7.0, 14.0];

const fn gelu(kind: Gelu) -> [f64; 2] {
    match kind {
        Gelu::Tanh => [9.0, 16.0],
        Gelu::Exact => [5.0, 11.0],
    }
}

fn count(c: &Shape, mode: Mode, every: usize, batch: usize, tokens: usize) -> Vec<Stage> {
    let [d, i, v, k, heads] = [c.width, c.inner, c.vocab, c.layers, c.heads].map(|n| n as f64);
    let (samples, t) = (batch as f64, tokens as f64);
    let r = samples * t;
    let pairs = samples * heads * c.pairs;
    let (w, [norm, norm_vjp], [act, act_vjp]) = (c.head_dim as f64, c.norm, c.act);
    let on = |p: f64| f64::from(u8::from(p > 0.0));
    let [at_input, attention, residual, hidden] = c.dropout.map(on);
    let linear = 2.0 * r * c.weights as f64;
    let dropped = attention * pairs + residual * 2.0 * r * d + hidden * r * i;
    let [biases, rotated] = c.each.map(|n| r * n as f64);
    let rows = biases + 3.0 * rotated;
    let forward = Stage {
        name: "blocks, forward",
        products: linear + 4.0 * pairs * w,
        other: 2.0 * norm * r * d
            + rows
            + act * r * i
            + 5.0 * pairs
            + r * d
            + 2.0 * r * d
            + dropped,
    };
    let backward = Stage {
        name: "blocks, backward",
        products: 2.0 * linear + 10.0 * pairs * w,
        other: 2.0 * norm_vjp * r * d
            + rows
            + act_vjp * r * i
            + 6.0 * pairs
            + 2.0 * r * d
            + 2.0 * r * d
            + dropped,
    };
    let patches = c.patches.map_or(0.0, |[n, values]| samples * (n * values) as f64);
    // Text: every row goes through the head; an image: its class token.
    let head_rows = if c.patches.is_some() { samples } else { r };
    let times = |s: Stage, n: f64| Stage { products: s.products * n, other: s.other * n, ..s };
    let again = match mode {
        Mode::Bdia => k - 1.0,
        Mode::Standard | Mode::BdiaFloat => 0.0,
        // The last segment is not recomputed.
        Mode::Checkpoint => {
            let every = every.clamp(1, c.layers);
            (c.layers - (c.layers - (c.layers.div_ceil(every) - 1) * every)) as f64
        }
    };
    let (update, gradient) = match mode {
        Mode::Bdia => (6.0 * r * d * (2.0 * k - 1.0), 4.0 * r * d * k),
        Mode::BdiaFloat => (4.0 * r * d * k, 4.0 * r * d * k),
        Mode::Standard | Mode::Checkpoint => (r * d * k, 0.0),
    };
    vec![
        Stage {
            name: "embedding",
            products: 6.0 * patches * d,
            other: 21.0 * patches + 3.0 * r * d + 2.0 * at_input * r * d,
        },
        times(forward, k),
        Stage { name: "blocks, recomputed", ..times(forward, again) },
        times(backward, k),
        Stage {
            name: "head and loss",
            products: 6.0 * head_rows * d * v,
            other: head_rows * ((norm + norm_vjp) * d + 6.0 * v),
        },
        Stage { name: "update of X, inverse, G", products: 0.0, other: update + gradient },
        Stage { name: "AdamW", products: 0.0, other: 16.0 * c.parameters },
    ]
}

/// All operations of a step.
pub fn total(stages: &[Stage]) -> f64 {
    stages.iter().map(|s| s.products + s.other).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Model;

    fn of(model: Model, mode: Mode, every: u64) -> f64 {
        total(&stages(&Job { checkpoint_every: Some(every), ..Job::new(model, mode) }))
    }

    /// What BDIA costs by the count: the forward pass of K−1 of K blocks.
    #[test]
    fn bdia_over_standard() {
        for (model, ratio) in
            [(Model::Gpt2, 1.21), (Model::Gpt2Medium, 1.28), (Model::VitSmall, 1.27)]
        {
            let found = of(model, Mode::Bdia, 1) / of(model, Mode::Standard, 1);
            assert!((found - ratio).abs() < 0.015, "{model:?}: {found}");
        }
    }

    /// 6·P·R of the usual rule of thumb, less the position table and the token table's first use,
    /// plus attention.
    #[test]
    fn products_are_six_per_parameter_and_token() {
        let products: f64 =
            stages(&Job::new(Model::Gpt2, Mode::Standard)).iter().map(|s| s.products).sum();
        let weights = (12.0 * 12.0 * 768.0 * 768.0) + 50257.0 * 768.0;
        assert!((products / (6.0 * 1024.0 * weights) - 1.0).abs() < 0.03);
    }

    #[test]
    fn parameters_of_the_vit() {
        let update = stages(&Job::new(Model::VitSmall, Mode::Bdia)).pop().unwrap();
        assert_eq!(update.other / 16.0, 9_622_512.0);
    }

    /// SmolLM2-135M's number, and its products by the rule of thumb, without attention: every
    /// weight but the norms' meets every token.
    #[test]
    fn parameters_of_the_llama() {
        let job = Job::new(Model::Llama135m, Mode::Bdia);
        let update = stages(&job).pop().unwrap();
        assert_eq!(update.other / 16.0, 134_515_008.0);
        let products: f64 =
            stages(&Job { mode: Mode::Standard, ..job }).iter().map(|s| s.products).sum();
        assert!((products / (6.0 * 1024.0 * 134_515_008.0) - 1.0).abs() < 0.06);
    }

    #[test]
    fn segments_of_a_checkpointed_stack() {
        let bare = of(Model::Gpt2, Mode::Standard, 1);
        let one = (of(Model::Gpt2, Mode::Checkpoint, 1) - bare) / 11.0;
        // 12 blocks in segments of 5, 5 and 2: ten are recomputed.
        assert!(((of(Model::Gpt2, Mode::Checkpoint, 5) - bare) / one - 10.0).abs() < 1e-9);
        assert_eq!(of(Model::Gpt2, Mode::Checkpoint, 12), bare);
    }
}
