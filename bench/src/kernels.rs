//! Every kernel of a backend with the work that one call does: for `cargo bench` and for the
//! report.

use core::time::Duration;
use std::time::Instant;

use bdia_core::arena::{Category, Ints, Layout, Reals};
use bdia_core::backend::{
    Attention, Backend, Chunk, Columns, CrossEntropy, Gelu, Mask, Order, Product,
};
use bdia_core::error::{Error, Result, Site};
use bdia_core::optim::{Rule, Sizes, Update};
use bdia_core::rng::Draw;
use bdia_core::{Gamma, Grid, Sign, State};

use crate::job::median;

/// What limits a kernel, and how much of it one call needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// Bytes that must be read and written once.
    Bytes(f64),
    /// Floating-point operations of its products.
    Operations(f64),
}

/// One call of a kernel.
type Call<B> = Box<dyn FnMut(&mut B) -> Result<()>>;

/// A kernel at one shape.
pub struct Kernel<B> {
    /// Its name: operation and shape.
    pub name: String,
    /// What one call does.
    pub work: Work,
    /// The call.
    pub call: Call<B>,
}

impl<B: Backend<Real = f32>> Kernel<B> {
    /// Median seconds of a call, from calls for about `span`. Where calls are only queued, so many
    /// of them are waited for together that the wait does not count.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn seconds(&mut self, be: &mut B, span: Duration) -> Result<f64> {
        // The first call may load what the others find.
        (self.call)(be)?;
        let mut run = |n: u32| {
            let clock = Instant::now();
            for _ in 0..n {
                (self.call)(be)?;
            }
            be.peek_fault()?;
            Ok::<f64, Error>(clock.elapsed().as_secs_f64() / f64::from(n))
        };
        run(1)?;
        let together = (1e-3 / run(1)?).clamp(1.0, 100.0) as u32;
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < span || times.len() < 3 {
            times.push(run(together)?);
        }
        Ok(median(&times))
    }
}

/// The shapes of a model's kernels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shapes {
    /// Name of the model.
    pub model: &'static str,
    /// Samples of a chunk.
    pub samples: usize,
    /// Tokens.
    pub tokens: usize,
    /// Width.
    pub width: usize,
    /// Heads.
    pub heads: usize,
    /// Inner width.
    pub inner: usize,
    /// Vocabulary.
    pub vocab: usize,
    /// Rows of logits at a time.
    pub head_rows: usize,
    /// Which GELU.
    pub gelu: Gelu,
    /// Which keys a query sees.
    pub mask: Mask,
}

/// GPT-2 124M, two samples of 256 tokens in a chunk.
pub const GPT2: Shapes = Shapes {
    model: "gpt2",
    samples: 2,
    tokens: 256,
    width: 768,
    heads: 12,
    inner: 3072,
    vocab: 50257,
    head_rows: 192,
    gelu: Gelu::Tanh,
    mask: Mask::Causal,
};

/// The paper's ViT, eight images in a chunk.
pub const VIT: Shapes = Shapes {
    model: "vit_small",
    samples: 8,
    tokens: 65,
    width: 512,
    heads: 8,
    inner: 512,
    vocab: 10,
    head_rows: 8,
    gelu: Gelu::Exact,
    mask: Mask::Full,
};

/// Shapes that a test runs in no time.
pub const TINY: Shapes = Shapes {
    model: "tiny",
    samples: 2,
    tokens: 8,
    width: 32,
    heads: 2,
    inner: 64,
    vocab: 50,
    head_rows: 8,
    gelu: Gelu::Tanh,
    mask: Mask::Causal,
};

/// Values of the update kernels' tensors: 16 MB each, more than a cache holds.
const STREAMED: usize = 1 << 22;

/// The kernels of a backend at a model's shapes, the memory that they use, and how to fill it.
pub struct Bench<B> {
    /// Where the operands are.
    pub layout: Layout,
    /// The kernels, in the order of a step.
    pub kernels: Vec<Kernel<B>>,
    reals: Reals,
    weights: Reals,
    ints: Ints,
}

impl<B: Backend<Real = f32>> Bench<B> {
    /// All kernels. `streamed` values for those of the update: [`Bench::full`] or fewer for tests.
    pub fn new(s: &Shapes, streamed: usize, threads: usize) -> Result<Self> {
        let mut l = Layout::new(4);
        let (rows, d, i, v) = (s.samples * s.tokens, s.width, s.inner, s.vocab);
        let widest = (rows * (3 * d).max(i)).max(s.head_rows * v).max(streamed);
        let mut real = |n: usize| l.reals(Category::Workspace, n);
        let [a, b, c, e] = [real(widest), real(widest), real(widest), real(widest)];
        let weight = real((d * (3 * d).max(i)).max(v * d));
        let gradient = real(weight.len());
        let [vector, vector_gradient, stats] =
            [real((3 * d).max(i)), real((3 * d).max(i)), real(2 * rows)];
        let [lse, losses, norm] = [real(rows * s.heads), real(rows), real(1)];
        let attention = Attention {
            heads: s.heads,
            kv_heads: s.heads,
            starts: Ints::EMPTY,
            head_dim: d / s.heads,
            queries: s.tokens,
            keys: s.tokens,
            mask: s.mask,
            key_lens: Ints::EMPTY,
            dropout: 0.0,
            draw: Draw::AttentionDropout,
            temperature: Reals::EMPTY,
            temperature_grad: Reals::EMPTY,
        };
        let scratch = real(B::attention_scratch(&attention, s.samples, threads));
        let reals = Reals::new(0, weight.start());
        let weights = Reals::new(weight.start(), scratch.start() + scratch.len() - weight.start());
        let [x, y] = [(); 2].map(|()| l.ints(Category::Activations, streamed));
        let tokens = l.ints(Category::Head, rows);
        let side = l.words(Category::SideBits, streamed.div_ceil(32));
        let sum = l.words(Category::SideBits, 2);
        let codes = [(); 2].map(|()| l.words(Category::Optimizer, streamed.div_ceil(4)));
        let ints = Ints::new(0, y.start() + y.len());
        let mut bench = Self { layout: l, kernels: Vec::new(), reals, weights, ints };

        // The update: one sample that is as large as the stream.
        let whole = Chunk {
            seed: 1,
            step: 0,
            stack: 0,
            site: Site::Block(1),
            first: 0,
            samples: 1,
            global: 0,
            frame: 0,
        };
        let (grid, gamma) = (Grid::new(14)?, Gamma::new(1, Sign::Random)?);
        let [f, g, h] = [a, b, c].map(|r| r.sub(0, streamed));
        let n = streamed as f64;
        let bytes = |k: f64| Work::Bytes(k * n);
        let mut put = |name: &str, work: Work, call: Call<B>| {
            bench.kernels.push(Kernel { name: name.into(), work, call });
        };
        put(
            "quantize + checksum",
            bytes(8.0),
            Box::new(move |be| be.quantize(&whole, grid, f, x, sum)),
        );
        put("dequantize", bytes(8.0), Box::new(move |be| be.dequantize(grid, x, h)));
        put(
            "add_quantized + checksum",
            bytes(12.0),
            Box::new(move |be| be.add_quantized(&whole, grid, y, g, sum)),
        );
        put(
            "step + side bits + checksum",
            bytes(16.125),
            Box::new(move |be| be.step(&whole, grid, gamma, x, f, g, side, sum)),
        );
        put(
            "inverse + checksum",
            bytes(16.125),
            Box::new(move |be| be.inverse(&whole, grid, gamma, x, f, g, side, sum)),
        );
        put("combine", bytes(20.0), Box::new(move |be| be.combine(&whole, gamma.into(), f, g, h)));
        put("copy_reals", bytes(8.0), Box::new(move |be| be.copy_reals(f, h)));
        put("fill_reals", bytes(4.0), Box::new(move |be| be.fill_reals(h, 0.0)));
        put("add", bytes(12.0), Box::new(move |be| be.add(h, f)));

        // The block, at its chunk.
        let chunk = Chunk { samples: s.samples, ..whole };
        let linear =
            [("c_attn", d, 3 * d), ("attn.c_proj", d, d), ("c_fc", d, i), ("mlp.c_proj", i, d)];
        for (name, from, to) in linear {
            let operations = Work::Operations(2.0 * (rows * from * to) as f64);
            let shape = |r: usize, inner: usize, cols: usize| {
                format!("{name} [{r}×{inner}]·[{inner}×{cols}]")
            };
            let (input, output) = (a.sub(0, rows * from), b.sub(0, rows * to));
            let (w, dw, bias) =
                (weight.sub(0, from * to), gradient.sub(0, from * to), vector.sub(0, to));
            let p = Product {
                rows,
                cols: to,
                inner: from,
                a: Order::Plain,
                b: Order::Plain,
                accumulate: false,
            };
            put(
                &format!("forward {} + bias", shape(rows, from, to)),
                operations,
                Box::new(move |be| be.matmul(&p, input, w, Some(bias), output)),
            );
            let p = Product { rows, cols: from, inner: to, b: Order::Transposed, ..p };
            let back = c.sub(0, rows * from);
            put(
                &format!("input gradient {}", shape(rows, to, from)),
                operations,
                Box::new(move |be| be.matmul(&p, output, w, None, back)),
            );
            let p = Product {
                rows: from,
                cols: to,
                inner: rows,
                a: Order::Transposed,
                b: Order::Plain,
                accumulate: true,
            };
            put(
                &format!("weight gradient {}", shape(from, rows, to)),
                operations,
                Box::new(move |be| be.matmul(&p, input, output, None, dw)),
            );
        }
        let of = |r: Reals, n: usize| r.sub(0, n);
        let (m, values) = ((rows * d) as f64, rows * d);
        let [xs, ys, dys] = [of(a, values), of(b, values), of(c, values)];
        let [w, dw, bias] = [of(vector, d), of(vector_gradient, d), of(gradient, d)];
        put(
            "layer_norm",
            Work::Bytes(8.0 * m),
            Box::new(move |be| be.layer_norm(1e-5, w, bias, xs, ys, stats)),
        );
        let dbias = gradient.sub(d, d);
        put(
            "layer_norm_vjp",
            Work::Bytes(16.0 * m),
            Box::new(move |be| be.layer_norm_vjp(w, xs, stats, dys, ys, dw, dbias)),
        );
        let (pre, post) = (of(a, rows * i), of(b, rows * i));
        let (kind, inner_bytes) = (s.gelu, (rows * i) as f64);
        put("gelu", Work::Bytes(8.0 * inner_bytes), Box::new(move |be| be.gelu(kind, pre, post)));
        put(
            "gelu_vjp",
            Work::Bytes(12.0 * inner_bytes),
            Box::new(move |be| be.gelu_vjp(kind, pre, post)),
        );
        let cols = of(vector_gradient, i);
        put("sum_rows", Work::Bytes(4.0 * inner_bytes), Box::new(move |be| be.sum_rows(pre, cols)));
        put(
            "dropout",
            Work::Bytes(8.0 * m),
            Box::new(move |be| be.dropout(&chunk, Draw::MlpResidualDropout, 0.1, ys)),
        );

        let pairs = match s.mask {
            Mask::Full => s.tokens * s.tokens,
            Mask::Others => s.tokens * (s.tokens - 1),
            Mask::Causal => s.tokens * (s.tokens + 1) / 2,
            Mask::Sliding(n) => (1..=s.tokens).map(|seen| seen.min(n)).sum(),
        };
        let per_head = (s.samples * pairs * d) as f64;
        let (qkv, dqkv) = (of(a, 3 * values), of(b, 3 * values));
        let columns = move |of: Reals| [0, 1, 2].map(|j| Columns { of, stride: 3 * d, at: j * d });
        let (out, dout) = (of(c, values), of(e, values));
        for (name, dropout) in [("", 0.0), (", dropout 0.1", 0.1)] {
            let attention = Attention { dropout, ..attention };
            put(
                &format!("attention{name}"),
                Work::Operations(4.0 * per_head),
                Box::new(move |be| {
                    let [q, k, v] = columns(qkv);
                    be.attention(&chunk, &attention, q, k, v, out, lse, scratch)
                }),
            );
            put(
                &format!("attention_vjp{name}"),
                Work::Operations(10.0 * per_head),
                Box::new(move |be| {
                    let ([q, k, v], [dq, dk, dv]) = (columns(qkv), columns(dqkv));
                    be.attention_vjp(
                        &chunk, &attention, q, k, v, out, lse, dout, dq, dk, dv, scratch,
                    )
                }),
            );
        }

        // The ends.
        let head_rows = s.head_rows.min(rows);
        let (hidden, logits) = (of(a, head_rows * d), of(b, head_rows * v));
        let (table, dtable) = (of(weight, v * d), of(gradient, v * d));
        let operations = Work::Operations(2.0 * (head_rows * d * v) as f64);
        let p = Product {
            rows: head_rows,
            cols: v,
            inner: d,
            a: Order::Plain,
            b: Order::Transposed,
            accumulate: false,
        };
        put(
            &format!("logits [{head_rows}×{d}]·[{d}×{v}]"),
            operations,
            Box::new(move |be| be.matmul(&p, hidden, table, None, logits)),
        );
        let ce = CrossEntropy { vocab: v, tokens: s.tokens, row: 0, scale: 1.0, smoothing: 0.0 };
        put(
            "cross_entropy",
            Work::Bytes(8.0 * (head_rows * v) as f64),
            Box::new(move |be| {
                be.cross_entropy(
                    &chunk,
                    &ce,
                    logits,
                    tokens.sub(0, head_rows),
                    losses.sub(0, head_rows),
                )
            }),
        );
        let p = Product {
            rows: v,
            cols: d,
            inner: head_rows,
            a: Order::Transposed,
            b: Order::Plain,
            accumulate: true,
        };
        put(
            &format!("head weight gradient [{v}×{head_rows}]·[{head_rows}×{d}]"),
            operations,
            Box::new(move |be| be.matmul(&p, logits, hidden, None, dtable)),
        );
        put(
            "embed",
            Work::Bytes(12.0 * m),
            Box::new(move |be| be.embed(&chunk, tokens, table, of(c, values), d, ys)),
        );
        put(
            "embed_vjp",
            Work::Bytes(20.0 * m),
            Box::new(move |be| be.embed_vjp(&chunk, tokens, ys, d, dtable, of(c, values))),
        );

        let [p, m, v] = [a, b, c].map(|r| of(r, streamed));
        let g = of(e, streamed);
        put(
            "sum_squares",
            bytes(4.0),
            Box::new(move |be| be.sum_squares(Site::Embedding, g, norm)),
        );
        for (name, rule, moved) in [
            ("AdamW", Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 }, 28.0),
            ("SET-Adam", Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 1e-18 }, 28.0),
            ("8-bit AdamW", Rule::ADAM_W_8BIT, 16.0),
            // The gradient is read four times: for rows, columns, the size of the step, the step.
            ("Adafactor", Rule::ADAFACTOR, 24.0),
        ] {
            let update = Update { rule, t: 1, lr: 1e-4, decay: 0.1, scale: 1.0 };
            let shape = [64, streamed / 64];
            let Sizes { reals, codes: words } = rule.state(shape[0], shape[1]);
            let state = State {
                reals: [m.sub(0, reals[0]), v.sub(0, reals[1])],
                codes: [codes[0].sub(0, words[0]), codes[1].sub(0, words[1])],
            };
            put(name, bytes(moved), Box::new(move |be| be.update(&update, shape, p, g, &state)));
        }
        Ok(bench)
    }

    /// Values of a tensor that no cache holds.
    pub const fn full() -> usize {
        STREAMED
    }

    /// Small values everywhere, so that no kernel sees a fault, an infinity or a denormal number.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn fill(&self, be: &mut B) -> Result<()> {
        // What is there is doubled until everything is full.
        const PIECE: usize = 1 << 12;
        let (piece, whole): (Vec<f32>, Vec<i32>) =
            (0..PIECE as i32).map(|i| i * 37 % 256).map(|i| (i as f32 / 256.0 + 0.01, i)).unzip();
        let sizes = |len: usize| {
            let doubled = core::iter::successors(Some(PIECE), |at| Some(2 * at))
                .take_while(move |&at| at < len);
            doubled.map(move |at| (at, at.min(len - at)))
        };
        for range in [self.reals, self.weights] {
            be.write_reals(range.sub(0, PIECE), &piece[..PIECE.min(range.len())])?;
            for (at, n) in sizes(range.len()) {
                be.copy_reals(range.sub(0, n), range.sub(at, n))?;
            }
        }
        be.write_ints(self.ints.sub(0, PIECE), &whole[..PIECE.min(self.ints.len())])?;
        for (at, n) in sizes(self.ints.len()) {
            be.copy_ints(self.ints.sub(0, n), self.ints.sub(at, n))?;
        }
        be.take_fault()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_core::Storage;
    use bdia_cpu::Cpu;

    #[test]
    fn every_kernel_runs_without_a_fault() {
        let mut bench = Bench::<Cpu>::new(&TINY, 4096, 2).unwrap();
        let mut be = Cpu::new(&bench.layout, 2).unwrap();
        for i in 0..bench.kernels.len() {
            bench.fill(&mut be).unwrap();
            let kernel = &mut bench.kernels[i];
            (kernel.call)(&mut be).unwrap();
            assert_eq!(be.take_fault().unwrap(), None, "{}", kernel.name);
        }
    }
}
