//! What the conformance suite's sizes do not reach: several tiles and blocks, every width of heads,
//! sums in parts, the longest paths of the optimizers. Against the reference backend in `f32`,
//! operation by operation.
#![allow(clippy::unwrap_used)]

use bdia_core::backend::{
    Attention, Columns, CrossEntropy, Gate, Gelu, Mask, Order, Product, RmsNorm, Rotary,
};
use bdia_core::optim::{Rule, Sizes, Update};
use bdia_core::rng::{Draw, Stream};
use bdia_core::{
    Backend, Category, Chunk, Fault, Gamma, Grid, Ints, Layout, NnOps, OptimOps, Reals, Reference,
    Result, Sign, Site, State, Storage, UpdateOps, Words,
};
use bdia_cuda::{Cuda, Options, Precision};

/// Memory with random contents, the same on both sides.
struct World {
    precision: Precision,
    /// How many times the tolerance an output of a single value may be off: where it is a sum of
    /// terms that cancel.
    cancelling: f32,
    layout: Layout,
    reals: Vec<f32>,
    ints: Vec<i32>,
}

impl World {
    fn new() -> Self {
        Self::with(Precision::F32)
    }

    fn with(precision: Precision) -> Self {
        Self { precision, cancelling: 1.0, layout: Layout::new(4), reals: vec![], ints: vec![] }
    }

    fn reals(&mut self, len: usize) -> Reals {
        let h = self.layout.reals(Category::Workspace, len);
        let s = Stream::new(7, 0, 0, 0, 0, Draw::Data);
        self.reals.resize(h.start(), f32::NAN);
        self.reals.extend((h.start()..h.start() + len).map(|i| s.normal(i as u32) as f32));
        h
    }

    fn ints(&mut self, values: &[i32]) -> Ints {
        let h = self.layout.ints(Category::Workspace, values.len());
        self.ints.resize(h.start(), 0);
        self.ints.extend(values);
        h
    }

    /// Runs an operation on both sides, on the device twice; compares what `outputs` names, up to
    /// `tolerance` of the largest magnitude, and that nothing else changed. Integers and words must
    /// be the reference's.
    fn compare(
        &mut self,
        what: &str,
        tolerance: f32,
        outputs: &[Reals],
        op: impl Fn(&mut dyn Both) -> Result<()>,
    ) {
        let (ints, reals, words) = self.layout.arenas();
        self.reals.resize(reals, f32::NAN);
        self.ints.resize(ints, 0);
        let (mut expected, mut their_ints, mut their_words) =
            (self.reals.clone(), self.ints.clone(), vec![0; words]);
        let mut reference =
            Reference::new(&self.layout, &mut their_ints, &mut expected, &mut their_words)
                .map_err(|e| e.to_string())
                .unwrap();
        op(&mut reference).unwrap();
        let fault = reference.take_fault().unwrap();
        let mut found: Vec<Vec<f32>> = vec![];
        for _ in 0..2 {
            let options = Options { precision: self.precision, ..Options::default() };
            let mut cuda = Cuda::new(&self.layout, options).map_err(|e| e.to_string()).unwrap();
            cuda.write_reals(Reals::new(0, reals), &self.reals).unwrap();
            cuda.write_ints(Ints::new(0, ints), &self.ints).unwrap();
            op(&mut cuda).unwrap();
            assert_eq!(format!("{:?}", cuda.take_fault().unwrap()), format!("{fault:?}"), "{what}");
            let (mut all, mut all_ints, mut all_words) =
                (vec![0.0; reals], vec![0; ints], vec![0; words]);
            cuda.read_reals(Reals::new(0, reals), &mut all).unwrap();
            cuda.read_ints(Ints::new(0, ints), &mut all_ints).unwrap();
            cuda.read_words(Words::new(0, words), &mut all_words).unwrap();
            assert!(all_ints == their_ints, "{what}: integers differ");
            assert!(all_words == their_words, "{what}: words differ");
            found.push(all);
        }
        for i in 0..reals {
            assert_eq!(
                found[0][i].to_bits(),
                found[1][i].to_bits(),
                "{what}: value {i} is not repeated"
            );
            let inside = outputs.iter().any(|h| h.range().contains(&i));
            let same = self.reals[i].to_bits() == found[0][i].to_bits();
            assert!(inside || same, "{what}: value {i} outside the outputs changed");
        }
        for h in outputs {
            let largest = expected[h.range()]
                .iter()
                .map(|x| x.abs())
                .filter(|x| x.is_finite())
                .fold(0.0, f32::max);
            assert!(largest > 0.0, "{what}: nothing was computed");
            let tolerance = if h.len() == 1 { tolerance * self.cancelling } else { tolerance };
            for i in h.range() {
                let (e, f) = (expected[i], found[0][i]);
                let close =
                    e == f || (e.is_nan() && f.is_nan()) || (e - f).abs() <= tolerance * largest;
                assert!(
                    close,
                    "{what}: value {} is {f:e}, reference {e:e}, largest {largest:e}",
                    i - h.start()
                );
            }
        }
    }
}

/// Both backends without the type.
trait Both: UpdateOps + NnOps<Real = f32> + OptimOps {}
impl<T: Backend<Real = f32>> Both for T {}

fn chunk(samples: usize) -> Chunk {
    Chunk {
        seed: 5,
        step: 2,
        stack: 0,
        site: Site::Block(1),
        first: 3,
        samples,
        global: 9,
        frame: 0,
    }
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn attention() {
    every_attention(Precision::F32, 2e-5);
}

/// On tensor cores. The inputs are values of bf16, so that loading them rounds nothing. What is
/// left is the rounding of the weights and of their gradients to 8 bits before they are multiplied,
/// at most 2^-9 of each, and so of every sum of terms that do not cancel; where they do, the
/// largest result is smaller than their magnitudes: 2^-7 of it is allowed for.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn attention_in_bf16() {
    every_attention(Precision::Bf16, 8e-3);
}

/// Values of bf16 throughout, so that factors are not rounded: what is left is the order of sums in
/// f32. Odd sizes, which are computed apart; factors that stay in their room from one product to
/// the next, and some that are written in between.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn products_in_bf16() {
    for (rows, cols, inner) in
        [(64, 96, 32), (33, 50, 17), (1, 1, 1), (7, 13, 8), (16, 9, 40), (130, 257, 65)]
    {
        for turned in 0..4 {
            let [a_order, b_order] = [turned & 1, turned >> 1]
                .map(|t| if t == 1 { Order::Transposed } else { Order::Plain });
            let mut w = World::with(Precision::Bf16);
            let (a, b, bias) = (w.reals(rows * inner), w.reals(inner * cols), w.reals(cols));
            let [c, d, e] = [0; 3].map(|_| w.reals(rows * cols));
            for x in &mut w.reals {
                *x = f32::from_bits(x.to_bits().wrapping_add(0x8000) & 0xFFFF_0000);
            }
            let p = Product { rows, cols, inner, a: a_order, b: b_order, accumulate: false };
            let more = Product { accumulate: true, ..p };
            let what = format!("{rows}×{cols}×{inner}, {a_order:?}, {b_order:?}");
            w.compare(&what, 2e-6, &[c, d, e, b], |on| {
                on.matmul(&p, a, b, Some(bias), c)?;
                on.matmul(&more, a, b, None, d)?;
                on.fill_reals(b.sub(0, inner * cols / 2), -1.5)?;
                on.matmul(&more, a, b, Some(bias), e)
            });
        }
    }
}

/// A case of attention, of every width of heads.
#[derive(Clone, Copy)]
struct Case {
    mask: Mask,
    heads: usize,
    /// Heads of queries that read one head of keys and values.
    group: usize,
    queries: usize,
    keys: usize,
    dropout: f64,
    padded: bool,
    tau: bool,
    /// Tokens of the texts that samples are packed of, or 0.
    packed: usize,
}

const PLAIN: Case = Case {
    mask: Mask::Full,
    heads: 1,
    group: 1,
    queries: 70,
    keys: 70,
    dropout: 0.0,
    padded: false,
    tau: false,
    packed: 0,
};

const CASES: [Case; 12] = [
    Case { heads: 2, ..PLAIN },
    Case { mask: Mask::Causal, heads: 2, queries: 100, keys: 100, ..PLAIN },
    Case { mask: Mask::Causal, queries: 67, keys: 67, dropout: 0.2, padded: true, ..PLAIN },
    Case { mask: Mask::Others, queries: 65, keys: 65, dropout: 0.1, tau: true, ..PLAIN },
    Case { queries: 33, keys: 90, padded: true, tau: true, ..PLAIN },
    // Several blocks, some with tiles that need no mask; one sample has no keys but padding.
    Case { mask: Mask::Causal, queries: 200, keys: 200, padded: true, ..PLAIN },
    Case { mask: Mask::Others, queries: 200, keys: 200, padded: true, tau: true, ..PLAIN },
    Case { queries: 150, keys: 200, dropout: 0.1, padded: true, tau: true, ..PLAIN },
    // Several heads of queries for a head of keys: with fewer keys than queries, and of more than
    // one of these; windows that begin and end within tiles; texts that do, one of them longer than
    // a tile.
    Case { heads: 4, group: 2, queries: 90, keys: 40, dropout: 0.2, tau: true, ..PLAIN },
    Case { mask: Mask::Sliding(37), heads: 2, group: 2, queries: 300, keys: 300, ..PLAIN },
    Case { mask: Mask::Causal, queries: 300, keys: 300, padded: true, packed: 141, ..PLAIN },
    Case {
        mask: Mask::Sliding(90),
        heads: 3,
        group: 3,
        queries: 200,
        keys: 200,
        dropout: 0.1,
        packed: 61,
        ..PLAIN
    },
];

fn every_attention(precision: Precision, tolerance: f32) {
    for head_dim in [32, 40, 64, 100, 128, 160, 192, 256] {
        for case in CASES {
            let Case { mask, heads, group, queries, keys, dropout, padded, tau, packed } = case;
            // Wide heads take long on an emulated device, and have the same kernels in both
            // precisions: the larger shapes with the widest of them alone.
            let widest = head_dim == 256;
            if head_dim > 128 && !widest && (queries > 100 || precision == Precision::Bf16)
                || widest && queries > 100 && group < 3
            {
                continue;
            }
            let (n, width, kv_width) = (2, heads * head_dim, heads / group * head_dim);
            let mut w = World::with(precision);
            let key_lens = if padded {
                w.ints(&[keys as i32 - 5, if keys == 200 { 0 } else { 40 }])
            } else {
                Ints::EMPTY
            };
            // The second sample begins in the middle of a text.
            let start = |i: usize| {
                let (sample, t) = (i / queries, i % queries);
                (t - ((t + 20 * sample) % packed).min(t)) as i32
            };
            let starts: Vec<i32> =
                (0..if packed > 0 { n * queries } else { 0 }).map(start).collect();
            let starts = w.ints(&starts);
            let [temperature, temperature_grad] = [0; 2].map(|_| w.reals(usize::from(tau)));
            if tau {
                // About 1/√head_dim, so that scores are of order one.
                w.reals[temperature.start()] = -0.5 * (head_dim as f32).ln();
            }
            let a = Attention {
                draw: Draw::AttentionDropout,
                heads,
                kv_heads: heads / group,
                head_dim,
                queries,
                keys,
                mask,
                key_lens,
                starts,
                dropout,
                temperature,
                temperature_grad,
            };
            let stride = 2 * kv_width + 3;
            let (q, kv) = (w.reals(n * queries * width), w.reals(n * keys * stride));
            let (dq, dkv) = (w.reals(n * queries * width), w.reals(n * keys * stride));
            let (out, lse) = (w.reals(n * queries * width), w.reals(n * queries * heads));
            let (dout, scratch) = (
                w.reals(n * queries * width),
                w.reals(Cuda::attention_scratch(&a, n, 1).max(keys)),
            );
            if precision == Precision::Bf16 {
                // The temperature's gradient, Σ s·ds: the ds of a row add up to 0, so nearly all of
                // it cancels.
                w.cancelling = 16.0;
                for x in &mut w.reals {
                    *x = f32::from_bits(x.to_bits().wrapping_add(0x8000) & 0xFFFF_0000);
                }
            }
            let [qs, dqs] = [q, dq].map(|of| Columns { of, stride: width, at: 0 });
            let [k, dk] = [kv, dkv].map(|of| Columns { of, stride, at: 1 });
            let [v, dv] = [kv, dkv].map(|of| Columns { of, stride, at: kv_width + 2 });
            let chunk = chunk(n);
            let what = format!(
                "{mask:?}, heads of {head_dim}, {heads} / {group}, {queries} × {keys}, dropout \
                 {dropout}, padded {padded}, texts of {packed}, {precision:?}"
            );
            let mut outputs = vec![out, dq, dkv, lse, scratch];
            if tau {
                outputs.push(temperature_grad);
            }
            // The scratch differs and is nobody's: it is set to the same afterwards.
            w.compare(&what, tolerance, &outputs, |on| {
                on.attention(&chunk, &a, qs, k, v, out, lse, scratch)?;
                on.attention_vjp(&chunk, &a, qs, k, v, out, lse, dout, dqs, dk, dv, scratch)?;
                let ones = vec![1.0; scratch.len()];
                on.write_reals(scratch, &ones)
            });
        }
    }
}

/// Several words of side bits a warp and several turns of it, samples that end within a word,
/// operands at odd places; bit for bit, faults too.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn updates() {
    for (samples, per, m) in [(5, 10_007, 1_u32), (2, 31, 2), (3, 4100, 3), (700, 97, 1)] {
        let (mut w, n) = (World::new(), samples * per);
        let s = Stream::new(8, 0, 0, 0, 0, Draw::Data);
        let values: Vec<i32> = (0..n + 1).map(|i| s.word(i as u32) as i32 >> 4).collect();
        let (x, other) = (w.ints(&values).sub(1, n), w.ints(&values).sub(0, n));
        let [cur, h, y] = [0; 3].map(|_| w.reals(n + 3).sub(3, n));
        let side = w.layout.words(Category::SideBits, samples * m as usize * per.div_ceil(32));
        let sum = w.layout.words(Category::SideBits, 3).sub(1, 2);
        let (chunk, grid) = (chunk(samples), Grid::new(14).unwrap());
        let gamma = Gamma::new(m, Sign::Random).unwrap();
        let what = |op: &str| format!("{op} of {samples} × {per}, m = {m}");
        w.compare(&what("quantize"), 0.0, &[], |on| on.quantize(&chunk, grid, y, x, sum));
        w.compare(&what("dequantize"), 0.0, &[y], |on| on.dequantize(grid, x, y));
        w.compare(&what("add_quantized"), 0.0, &[], |on| on.add_quantized(&chunk, grid, x, h, sum));
        w.compare(&what("subtract_quantized"), 0.0, &[], |on| {
            on.subtract_quantized(&chunk, grid, x, h, sum)
        });
        w.compare(&what("step"), 0.0, &[], |on| on.step(&chunk, grid, gamma, x, cur, h, side, sum));
        w.compare(&what("step without side bits"), 0.0, &[], |on| {
            on.step(&chunk, grid, gamma, x, cur, h, Words::EMPTY, Words::EMPTY)
        });
        w.compare(&what("inverse"), 0.0, &[], |on| {
            on.step(&chunk, grid, gamma, x, cur, h, side, Words::EMPTY)?;
            on.inverse(&chunk, grid, gamma, x, cur, h, side, sum)
        });
        w.compare(&what("blend"), 0.0, &[y], |on| on.blend(&chunk, gamma.float(), y, cur, h));
        w.compare(&what("unblend"), 0.0, &[y], |on| on.unblend(&chunk, gamma.float(), y, cur, h));
        w.compare(&what("combine"), 0.0, &[y, cur, h], |on| {
            on.combine(&chunk, gamma.float(), y, cur, h)
        });
        w.compare(&what("count_differences"), 0.0, &[], |on| on.count_differences(x, other, sum));
        // The first of several is told.
        for (at, value) in
            [(n - 1, f32::NAN), (n / 2 + 1, 1e9), (n / 2, f32::INFINITY), (n - 3, -1e30)]
        {
            w.reals[h.start() + at] = value;
        }
        w.compare(&what("step with faults"), 0.0, &[], |on| {
            on.step(&chunk, grid, gamma, x, cur, h, side, sum)
        });
        w.compare(&what("add_quantized with faults"), 0.0, &[], |on| {
            on.add_quantized(&chunk, grid, x, h, sum)
        });
        w.compare(&what("blend with faults"), 0.0, &[y], |on| {
            on.blend(&chunk, gamma.float(), y, cur, h)
        });
    }
}

/// Several pieces, the last of them not full, at odd places.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn elementwise() {
    let (mut w, n) = (World::new(), 5003);
    let [x, y, d] = [0; 3].map(|_| w.reals(n + 1).sub(1, n));
    for (i, at) in x.range().enumerate() {
        w.reals[at] *= [1.0, 2.0, 1e-3][i % 3];
    }
    for (at, value) in [(4, 9.0), (5, -40.0), (6, 0.0), (7, 1e20), (8, 1e-30), (9, -1e-30)] {
        w.reals[x.start() + at] = value;
    }
    w.compare("add", 0.0, &[y], |on| on.add(y, x));
    w.reals[x.start() + 7] = -1e20;
    for kind in [Gelu::Tanh, Gelu::Exact] {
        w.compare(&format!("{kind:?}"), 2e-7, &[y, d], |on| {
            on.gelu(kind, x, y)?;
            on.gelu_vjp(kind, x, d)
        });
    }
    let [gate, up, product, dy, dgate] = [x, y, d, w.reals(n), w.reals(n + 1).sub(1, n)];
    for act in [Gate::Silu, Gate::Gelu(Gelu::Tanh), Gate::Gelu(Gelu::Exact)] {
        // Two more products than a GELU has, each rounded.
        w.compare(&format!("{act:?}"), 4e-7, &[product, dy, dgate], |on| {
            on.gated(act, gate, up, product)?;
            on.gated_vjp(act, gate, up, dy, dgate)
        });
    }
    for per in [n, 1001] {
        let (samples, x) = (n / per, x.sub(0, n / per * per));
        w.compare("dropout", 1e-6, &[x], |on| {
            on.dropout(&chunk(samples), Draw::EmbeddingDropout, 0.3, x)
        });
    }
}

/// Sums in parts, several rows a block, many blocks.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn sums_over_rows() {
    for (rows, width) in [(700, 70), (1031, 33), (3, 2000)] {
        let mut w = World::new();
        let (x, y, dy, dx) = (
            w.reals(rows * width),
            w.reals(rows * width),
            w.reals(rows * width),
            w.reals(rows * width),
        );
        let (weight, bias, stats) = (w.reals(width), w.reals(width), w.reals(2 * rows));
        let (dweight, dbias, sum) = (w.reals(width), w.reals(width), w.reals(width));
        w.compare(&format!("{rows} × {width}"), 3e-5, &[y, stats, dx, dweight, dbias, sum], |on| {
            on.layer_norm(1e-5, weight, bias, x, y, stats)?;
            on.layer_norm_vjp(weight, x, stats, dy, dx, dweight, dbias)?;
            on.sum_rows(x, sum)
        });
    }
}

/// Rows that threads keep and such that are too long for it, in parts and not; sums in parts; heads
/// of several warps' values.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn norms_and_rotations() {
    for (rows, groups, width) in [(700, 1, 70), (130, 5, 33), (3, 1, 2000)] {
        let (mut w, all) = (World::new(), groups * width);
        let [x, y, dy, dx] = [3, 1, 2, 0].map(|at| Columns {
            of: w.reals(rows * (all + at + 1)),
            stride: all + at + 1,
            at,
        });
        let (weight, dweight, stats) = (w.reals(width), w.reals(width), w.reals(rows * groups));
        let norm = RmsNorm { groups, width, eps: 1e-5, offset: 1.0 };
        w.compare(&format!("{rows} × {all}"), 3e-5, &[y.of, stats, dx.of, dweight], |on| {
            on.rms_norm(&norm, weight, x, y, stats)?;
            on.rms_norm_vjp(&norm, weight, x, stats, dy, dx, dweight)
        });
    }
    let (n, tokens, heads, head_dim, known) = (2, 45, 9, 64, 60);
    let mut w = World::new();
    let stride = heads * head_dim + 5;
    let x = Columns { of: w.reals(n * tokens * stride), stride, at: 3 };
    let table = w.reals(known * head_dim);
    let s = Stream::new(3, 0, 0, 0, 0, Draw::Data);
    // All in the table but some, of which the first is told.
    let positions: Vec<i32> = (0..n * tokens)
        .map(|i| if i > 50 && i % 20 == 0 { i as i32 } else { (s.word(i as u32) % 60) as i32 })
        .collect();
    let positions = w.ints(&positions);
    let rotary = Rotary { heads, head_dim, tokens, back: false };
    for positions in [Ints::EMPTY, positions] {
        w.compare("rotate", 1e-6, &[x.of], |on| on.rotate(&chunk(n), &rotary, table, positions, x));
    }
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn embedding_and_loss() {
    let (n, length, vocab, width) = (3, 500, 50, 300);
    let mut w = World::new();
    // Few tokens often, so that their rows are found in several tiles.
    let s = Stream::new(3, 0, 0, 0, 0, Draw::Data);
    let tokens: Vec<i32> = (0..n * length).map(|i| (s.word(i as u32) % 7 * 8) as i32).collect();
    let tokens = w.ints(&tokens);
    let (table, positions) = (w.reals(vocab * width), w.reals(length * width));
    let (x, dtable, dpositions) =
        (w.reals(n * length * width), w.reals(vocab * width), w.reals(length * width));
    let chunk = chunk(n);
    w.compare("embedding", 1e-6, &[x, dtable, dpositions], |on| {
        on.embed_vjp(&chunk, tokens, x, width, dtable, dpositions)?;
        on.embed(&chunk, tokens, table, positions, width, x)
    });
    w.compare("embedding without positions", 1e-6, &[x, dtable], |on| {
        on.embed_vjp(&chunk, tokens, x, width, dtable, Reals::EMPTY)?;
        on.embed(&chunk, tokens, table, Reals::EMPTY, width, x)
    });

    let (rows, vocab) = (9, 5003);
    let mut w = World::new();
    let targets: Vec<i32> = (0..rows)
        .map(|i| if i == 4 { -1 } else { (s.word(i as u32) % vocab as u32) as i32 })
        .collect();
    let targets = w.ints(&targets);
    let (logits, losses) = (w.reals(rows * vocab), w.reals(rows));
    for smoothing in [0.0, 0.1] {
        let ce = CrossEntropy { vocab, tokens: 5, row: 2, scale: 0.25, smoothing };
        w.compare("loss", 2e-6, &[logits, losses], |on| {
            on.cross_entropy(&chunk, &ce, logits, targets, losses)
        });
    }
    // Without smoothing they are left out, where not all are infinite.
    for c in (0..vocab).filter(|&c| c as i32 != w.ints[targets.start()] && c != 4999) {
        w.reals[logits.start() + c] = f32::NEG_INFINITY;
    }
    let ce = CrossEntropy { vocab, tokens: 5, row: 2, scale: 0.25, smoothing: 0.0 };
    w.compare("infinite", 2e-6, &[logits, losses], |on| {
        on.cross_entropy(&chunk, &ce, logits, targets, losses)
    });
    // The first of several wrong rows is told, whatever the order of blocks.
    w.ints[targets.start() + 3..targets.start() + 8].copy_from_slice(&[
        1 << 20,
        5,
        i32::MAX,
        0,
        1 << 21,
    ]);
    w.reals[logits.start() + 5 * vocab + 77] = f32::NAN;
    let ce = CrossEntropy { vocab, tokens: 5, row: 2, scale: 0.25, smoothing: 0.0 };
    w.compare("faults", 2e-6, &[losses, logits], |on| {
        on.cross_entropy(&chunk, &ce, logits, targets, losses)
    });
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn optimizers() {
    let n = 1_200_000;
    let mut w = World::new();
    let (p, g, m, v, out) = (w.reals(n), w.reals(n), w.reals(n), w.reals(n), w.reals(1));
    for i in v.range() {
        w.reals[i] = w.reals[i].abs();
    }
    for rule in [
        Rule::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 },
        Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 1e-18 },
        Rule::Sgd { momentum: 0.9 },
    ] {
        let u = Update { rule, t: 4, lr: 0.01, decay: 0.1, scale: 0.5 };
        let [first, second] = rule.state(1, n).reals;
        let state = State::of(m.sub(0, first), v.sub(0, second));
        w.compare(&format!("{rule:?}"), 1e-6, &[p, m, v, out], |on| {
            // One sum leaves nothing for the next.
            on.sum_squares(Site::Block(0), p, out)?;
            on.sum_squares(Site::Block(0), g, out)?;
            on.update(&u, [1, n], p, g, &state)
        });
    }
    // Of a matrix, and of what has one row.
    for shape in [[1200, 1000], [n, 1]] {
        let rule = Rule::ADAFACTOR;
        let u = Update { rule, t: 4, lr: 0.01, decay: 0.1, scale: 0.5 };
        let [first, second] = rule.state(shape[0], shape[1]).reals;
        let state = State::of(v.sub(0, first), v.sub(first, second));
        w.compare(&format!("{rule:?} {shape:?}"), 1e-6, &[p, v], |on| {
            on.update(&u, shape, p, g, &state)
        });
    }
}

/// The codes too have the reference's bits: nothing is summed, and no product is fused.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn moments_in_8_bits() {
    // More blocks of values than of threads.
    let (n, rule) = (2100 * 256 + 77, Rule::ADAM_W_8BIT);
    let mut w = World::new();
    let Sizes { reals: [blocks, _], codes: [words, _] } = rule.state(1, n);
    let (p, g, m, v) = (w.reals(n), w.reals(n), w.reals(blocks), w.reals(blocks));
    for i in m.start()..v.start() + v.len() {
        w.reals[i] = w.reals[i].abs();
    }
    let codes = [(); 2].map(|()| w.layout.words(Category::Optimizer, words));
    let state = State { reals: [m, v], codes };
    let u = Update { rule, t: 4, lr: 0.01, decay: 0.1, scale: 0.5 };
    w.compare("8-bit AdamW", 0.0, &[p, m, v], |on| on.update(&u, [1, n], p, g, &state));
}

/// A fault that the host raises stays, if it was first, and no update happens meanwhile.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn the_first_fault_stays() {
    let mut layout = Layout::new(4);
    let g = layout.reals(Category::Gradients, 40);
    let out = layout.reals(Category::Gradients, 1);
    let mut cuda = Cuda::new(&layout, Options::default()).unwrap();
    cuda.write_reals(g, &[f32::NAN; 40]).unwrap();
    let own = Fault::Checksum { activation: 4, block: 5 };
    cuda.sum_squares(Site::Head, g, out).unwrap();
    cuda.raise(own);
    assert_eq!(cuda.peek_fault(), Ok(Some(Fault::Gradient { site: Site::Head })));
    assert_eq!(cuda.take_fault(), Ok(Some(Fault::Gradient { site: Site::Head })));
    assert_eq!(cuda.take_fault(), Ok(None));
    cuda.raise(own);
    cuda.sum_squares(Site::Head, g, out).unwrap();
    cuda.raise(Fault::Gradient { site: Site::Embedding });
    assert_eq!(cuda.take_fault(), Ok(Some(own)));
    assert_eq!(cuda.peek_fault(), Ok(None));
}
