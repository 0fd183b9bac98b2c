//! [`NnOps`] against the reference, up to rounding.

use super::{Bench, Failure, OUTSIDE, Operand, THREADS, WORDS, chunk, noise, random};
use crate::arena::{Ints, Layout, Reals, Words};
use crate::backend::{
    Attention, Columns, CrossEntropy, Gate, Gelu, Mask, NnOps, Order, Product, RmsNorm, Rotary,
    Storage,
};
use crate::packing::{Packed, Packing};
use crate::real::Real;
use crate::rng::{Draw, drop_threshold, keep};

/// Runs [`NnOps`] against the reference; `new` builds a backend for a layout.
///
/// # Errors
/// The first difference.
pub fn nn_ops<B: NnOps>(mut new: impl FnMut(&Layout) -> B) -> Result<(), Failure> {
    let scratch = ATTENTIONS
        .iter()
        .map(|a| B::attention_scratch(&a.with(Ints::EMPTY), a.samples, THREADS))
        .max();
    let mut bench = Bench::new(&mut new, scratch.unwrap_or(0));
    for size in [
        [1, 1, 1],
        [2, 3, 5],
        [7, 9, 4],
        [1, 40, 17],
        [33, 1, 8],
        [17, 33, 19],
        [16, 16, 16],
        [24, 32, 32],
    ] {
        products(&mut bench, size)?;
    }
    for size in [[0, 3, 2], [3, 0, 2], [3, 2, 0], [0, 0, 0]] {
        products(&mut bench, size)?;
    }
    for [rows, width] in [[0, 4], [1, 1], [1, 7], [5, 1], [4, 33], [3, 64], [19, 16], [2, 270]] {
        rows_and_norms(&mut bench, rows, width)?;
    }
    for n in [0, 1, 8, 33, 200] {
        activations(&mut bench, n)?;
    }
    for size in [[0, 1], [1, 0], [1, 1], [2, 2], [5, 1]] {
        packings(&mut bench, size)?;
    }
    for [rows, groups, width] in [
        [0, 1, 4],
        [1, 1, 1],
        [5, 1, 1],
        [1, 3, 7],
        [4, 2, 33],
        [3, 1, 64],
        [19, 2, 16],
        [2, 1, 270],
    ] {
        rms_norms(&mut bench, rows, groups, width)?;
    }
    for size in
        [[0, 3, 1, 2], [1, 0, 1, 2], [1, 1, 1, 2], [2, 5, 3, 6], [3, 9, 2, 16], [2, 9, 1, 66]]
    {
        rotations(&mut bench, size)?;
    }
    for [rows, width] in [[0, 3], [1, 1], [3, 0], [4, 5], [2, 33]] {
        columns(&mut bench, rows, width)?;
    }
    for a in &ATTENTIONS {
        attention(&mut bench, a)?;
    }
    for [n, per] in [[0, 0], [1, 1], [2, 5], [3, 64], [3, 67]] {
        dropout(&mut bench, n, per)?;
    }
    for size in [[0, 0, 4, 3], [1, 1, 1, 1], [2, 5, 7, 9], [3, 8, 20, 16], [2, 6, 3, 33]] {
        embedding(&mut bench, size)?;
    }
    for size in [[0, 5, 1, 0], [1, 1, 1, 0], [4, 3, 2, 1], [9, 50, 4, 3], [6, 257, 3, 6]] {
        losses(&mut bench, size)?;
    }
    refusals(&mut bench)?;
    drop(bench);
    large(new)
}

/// Every order of the operands, with and without bias and accumulation.
fn products<B: NnOps>(
    bench: &mut Bench<B>,
    [rows, cols, inner]: [usize; 3],
) -> Result<(), Failure> {
    for (a_order, b_order, case) in [
        (Order::Plain, Order::Plain, "A·B"),
        (Order::Plain, Order::Transposed, "A·Bᵀ"),
        (Order::Transposed, Order::Plain, "Aᵀ·B"),
        (Order::Transposed, Order::Transposed, "Aᵀ·Bᵀ"),
    ] {
        for accumulate in [false, true] {
            for with_bias in [false, true] {
                bench.begin(
                    "matmul",
                    case,
                    [rows, cols, inner, accumulate as usize * 2 + with_bias as usize],
                );
                let p = Product { rows, cols, inner, a: a_order, b: b_order, accumulate };
                let (a, b) = (bench.reals(rows * inner), bench.reals(inner * cols));
                let bias = if with_bias { Some(bench.reals(cols)) } else { None };
                if accumulate {
                    let c = bench.reals(rows * cols);
                    both!(bench, [Operand::sum("c", c, inner)], |on| on.matmul(&p, a, b, bias, c));
                } else {
                    let c = bench.garbage(rows * cols);
                    both!(bench, [Operand::set("c", c, inner)], |on| on.matmul(&p, a, b, bias, c));
                }
            }
        }
    }
    Ok(())
}

fn rows_and_norms<B: NnOps>(
    bench: &mut Bench<B>,
    rows: usize,
    width: usize,
) -> Result<(), Failure> {
    bench.begin("sum_rows", "", [rows, width, 0, 0]);
    let (x, sum) = (bench.reals(rows * width), bench.reals(width));
    both!(bench, [Operand::sum("sum", sum, rows)], |on| on.sum_rows(x, sum));

    // A mean far from zero, too: the variance must not be a difference of large sums.
    for (case, mean, eps) in
        [("mean near 0", 0.0, 1e-5), ("mean 30", 30.0, 1e-5), ("eps 0.1", 0.0, 0.1)]
    {
        bench.begin("layer_norm", case, [rows, width, 0, 0]);
        let seed = bench.cases;
        // A row of one value (or equal ones) has variance 0 and rstd = 1/√eps.
        let x = bench.reals_of(rows * width, |i| mean + 2.0 * noise(seed, i));
        let (weight, bias) = (bench.reals(width), bench.reals(width));
        let (y, stats) = (bench.garbage(rows * width), bench.garbage(2 * rows));
        // Subtracting the mean scales the rounding of x up.
        let terms = if mean == 0.0 { width } else { 30 * width.max(16) };
        both!(bench, [Operand::set("y", y, terms), Operand::set("stats", stats, terms)], |on| {
            on.layer_norm(eps, weight, bias, x, y, stats)
        });

        bench.op = "layer_norm_vjp";
        bench.before.reals = bench.oracle.reals;
        bench.next[1] = y.start();
        let (dx, dweight, dbias) =
            (bench.reals(rows * width), bench.reals(width), bench.reals(width));
        let dy = bench.reals(rows * width);
        // The statistics move behind what overwrote y.
        let moved = bench.garbage(2 * rows);
        let m = &mut bench.before.reals;
        for i in 0..2 * rows {
            m[moved.start() + i] = bench.oracle.reals[stats.start() + i];
        }
        let all = terms + rows;
        both!(
            bench,
            [
                Operand::sum("dx", dx, all),
                Operand::sum("dweight", dweight, all),
                Operand::sum("dbias", dbias, rows)
            ],
            |on| on.layer_norm_vjp(weight, x, moved, dy, dx, dweight, dbias)
        );
        both!(bench, [Operand::sum("dx", dx, all)], |on| {
            on.layer_norm_vjp(weight, x, moved, dy, dx, Reals::EMPTY, Reals::EMPTY)
        });
    }
    Ok(())
}

/// Packed matrices: rows in order and in heads of neighbours, some of them and looked up.
fn packings<B: NnOps>(bench: &mut Bench<B>, [blocks, heads]: [usize; 2]) -> Result<(), Failure> {
    for packing in Packing::ALL {
        let (rows, cols) = (4 * heads, blocks * packing.values());
        // Refused, and so told, where it is no size.
        let len = Packed::words_of(packing, rows, cols).unwrap_or(0);
        if len > WORDS - 16 {
            // Several of the large blocks have no room.
            continue;
        }
        for neighbours in [0, 4] {
            let begin = |bench: &mut Bench<B>, op| {
                bench.begin(op, packing.name(), [rows, cols, neighbours, 0]);
                // Any bits at all; small, special and ordinary values of 16 bits among them.
                let words = bench.words(len);
                let special = [0x0001_8001, 0x7C00_FC00, 0x7E01_03FF, 0x3C00_0400];
                for (at, word) in special.into_iter().enumerate() {
                    bench.set_words(words.sub(at, 1), &[word][..words.sub(at, 1).len()]);
                }
                Packed { packing, words, rows, cols, neighbours }
            };
            for (first, n) in [(0, rows), (rows.min(1), rows.saturating_sub(2)), (rows, 0)] {
                let x = begin(bench, "unpack");
                let y = bench.garbage(n * cols);
                both!(bench, [Operand::set("y", y, 0)], |on| on.unpack(&x, first, y));
            }
            for bad in [None, Some(-1), Some(rows as i32)] {
                let x = begin(bench, "unpack_rows");
                let list = bench.ints(4, |i| match bad {
                    // A second one must not win.
                    Some(bad) if i > 1 => [bad, i32::MAX][i - 2],
                    None if rows == 0 => -7,
                    _ => (i * 5 % rows.max(1)) as i32,
                });
                let y = bench.garbage(4 * cols);
                let part = chunk(2);
                both!(bench, [Operand::set("y", y, 0)], |on| on.unpack_rows(&part, &x, list, y));
            }
        }
    }
    Ok(())
}

fn activations<B: NnOps>(bench: &mut Bench<B>, n: usize) -> Result<(), Failure> {
    bench.begin("add", "", [n, 0, 0, 0]);
    let (x, y) = (bench.reals(n), bench.reals(n));
    both!(bench, [Operand::sum("x", x, 1)], |on| on.add(x, y));
    for (act, case) in
        [(Gate::Silu, "silu"), (Gate::Gelu(Gelu::Tanh), "tanh"), (Gate::Gelu(Gelu::Exact), "exact")]
    {
        for range in [1.0, 12.0, 300.0] {
            bench.begin("gated", case, [n, range as usize, 0, 0]);
            let seed = bench.cases;
            let gate = bench.reals_of(n, |i| if i == 7 { 0.0 } else { range * noise(seed, i) });
            let (up, y) = (bench.reals(n), bench.garbage(n));
            both!(bench, [Operand::set("y", y, 1)], |on| on.gated(act, gate, up, y));
            bench.op = "gated_vjp";
            let (d, dgate) = (bench.reals(n), bench.garbage(n));
            both!(bench, [Operand::sum("d", d, 1), Operand::set("dgate", dgate, 1)], |on| {
                on.gated_vjp(act, gate, up, d, dgate)
            });
        }
    }
    for (kind, case) in [(Gelu::Tanh, "tanh"), (Gelu::Exact, "exact")] {
        for range in [1.0, 12.0, 300.0] {
            bench.begin("gelu", case, [n, range as usize, 0, 0]);
            let seed = bench.cases;
            let x = bench.reals_of(n, |i| if i == 7 { 0.0 } else { range * noise(seed, i) });
            let y = bench.garbage(n);
            both!(bench, [Operand::set("y", y, 1)], |on| on.gelu(kind, x, y));
            bench.op = "gelu_vjp";
            let d = bench.reals(n);
            both!(bench, [Operand::sum("d", d, 1)], |on| on.gelu_vjp(kind, x, d));
        }
    }
    Ok(())
}

fn columns<B: NnOps>(bench: &mut Bench<B>, rows: usize, width: usize) -> Result<(), Failure> {
    for [from, to] in [[0, 0], [0, 2], [3, 1]] {
        bench.begin("add_columns", "", [rows, width, from, to]);
        let (wide, narrow) = (width + 4, width + from + 1);
        let (x, y) = (bench.reals(rows * narrow), bench.reals(rows * wide));
        let (from, to) =
            (Columns { of: x, stride: narrow, at: from }, Columns { of: y, stride: wide, at: to });
        let operand = Operand { fresh: false, ..Operand::columns("to", to, width, 1) };
        both!(bench, [operand], |on| on.add_columns(width, -1.5, from, to));
    }
    Ok(())
}

fn rms_norms<B: NnOps>(
    bench: &mut Bench<B>,
    rows: usize,
    groups: usize,
    width: usize,
) -> Result<(), Failure> {
    for (case, size, eps, offset) in [
        ("values near 1", 2.0, 1e-5, 0.0),
        ("large values", 3e4, 1e-6, 1.0),
        ("eps 0.1", 1.0, 0.1, 0.0),
    ] {
        bench.begin("rms_norm", case, [rows, groups, width, 0]);
        let (seed, all) = (bench.cases, groups * width);
        let norm = RmsNorm { groups, width, eps, offset };
        let columns = |of, beside, at| Columns { of, stride: all + beside, at };
        let x = columns(bench.reals_of(rows * (all + 3), |i| size * noise(seed, i)), 3, 2);
        let weight = bench.reals(width);
        let y = columns(bench.garbage(rows * (all + 1)), 1, 1);
        let stats = bench.garbage(rows * groups);
        both!(
            bench,
            [Operand::columns("y", y, all, width), Operand::set("stats", stats, width)],
            |on| on.rms_norm(&norm, weight, x, y, stats)
        );

        bench.op = "rms_norm_vjp";
        for i in stats.range() {
            bench.before.reals[i] = bench.oracle.reals[i];
        }
        let dy = columns(bench.reals(rows * (all + 2)), 2, 0);
        let dx = columns(bench.reals(rows * (all + 4)), 4, 1);
        let dweight = bench.reals(width);
        let terms = width + rows * groups;
        let added = Operand { fresh: false, ..Operand::columns("dx", dx, all, width) };
        both!(bench, [added, Operand::sum("dweight", dweight, terms)], |on| {
            on.rms_norm_vjp(&norm, weight, x, stats, dy, dx, dweight)
        });
        let added = Operand { fresh: false, ..Operand::columns("dx", dx, all, width) };
        both!(bench, [added], |on| {
            on.rms_norm_vjp(&norm, weight, x, stats, dy, dx, Reals::EMPTY)
        });
    }
    Ok(())
}

fn rotations<B: NnOps>(
    bench: &mut Bench<B>,
    [n, tokens, heads, head_dim]: [usize; 4],
) -> Result<(), Failure> {
    // Positions of their own lie in a longer table; a wrong one is met by the others.
    for (case, bad) in [
        ("by place", None),
        ("by position", None),
        ("a negative position", Some(-1)),
        ("a position too large", Some(tokens as i32 + 3)),
    ] {
        for back in [false, true] {
            bench.begin("rotate", case, [n, tokens, heads, head_dim]);
            let (seed, chunk, known) = (bench.cases, chunk(n), tokens + 3);
            let own = if case == "by place" { 0 } else { n * tokens };
            let wrong = n * tokens * 2 / 3;
            let positions = bench.ints(own, |i| match bad {
                Some(bad) if i == wrong => bad,
                // A second one must not win.
                Some(_) if i == wrong + 1 => i32::MAX,
                _ => (random(seed, i) as usize % known) as i32,
            });
            let table = bench.reals(known * head_dim);
            let stride = heads * head_dim + 3;
            let x = Columns { of: bench.reals(n * tokens * stride), stride, at: 2 };
            let rotary = Rotary { heads, head_dim, tokens, back };
            let turned = Operand { fresh: false, ..Operand::columns("x", x, heads * head_dim, 2) };
            both!(bench, [turned], |on| on.rotate(&chunk, &rotary, table, positions, x));
        }
    }
    Ok(())
}

/// A case of attention.
struct Case {
    name: &'static str,
    samples: usize,
    heads: usize,
    /// Heads of queries that read one head of keys and values.
    group: usize,
    head_dim: usize,
    queries: usize,
    keys: usize,
    mask: Mask,
    dropout: f64,
    /// Lengths of the samples, or none.
    lens: Option<[i32; 3]>,
    /// Tokens of the texts that samples are packed of, or 0; they begin elsewhere in every sample.
    packed: usize,
    /// q, k and v are columns of one matrix.
    together: bool,
    /// The scores' factor is learned.
    temperature: bool,
}

impl Case {
    const fn with(&self, key_lens: Ints) -> Attention {
        let Self { heads, group, head_dim, queries, keys, mask, dropout, .. } = *self;
        let (temperature, temperature_grad) = (Reals::EMPTY, Reals::EMPTY);
        Attention {
            heads,
            kv_heads: heads / group,
            head_dim,
            queries,
            keys,
            mask,
            key_lens,
            starts: Ints::EMPTY,
            dropout,
            draw: Draw::AttentionDropout,
            temperature,
            temperature_grad,
        }
    }
}

const PLAIN: Case = Case {
    name: "full",
    samples: 2,
    heads: 3,
    group: 1,
    head_dim: 5,
    queries: 7,
    keys: 7,
    mask: Mask::Full,
    dropout: 0.0,
    lens: None,
    packed: 0,
    together: true,
    temperature: false,
};

const ATTENTIONS: [Case; 32] = [
    PLAIN,
    Case { name: "causal", mask: Mask::Causal, ..PLAIN },
    Case {
        name: "causal, 16 tokens",
        mask: Mask::Causal,
        queries: 16,
        keys: 16,
        heads: 1,
        head_dim: 8,
        ..PLAIN
    },
    Case {
        name: "causal, many tokens",
        mask: Mask::Causal,
        queries: 70,
        keys: 70,
        heads: 1,
        head_dim: 3,
        samples: 1,
        ..PLAIN
    },
    Case { name: "one token", mask: Mask::Causal, queries: 1, keys: 1, ..PLAIN },
    Case {
        name: "one element",
        mask: Mask::Full,
        queries: 1,
        keys: 1,
        heads: 1,
        head_dim: 1,
        samples: 1,
        ..PLAIN
    },
    Case { name: "cross", queries: 4, keys: 9, together: false, ..PLAIN },
    Case { name: "cross, more queries than keys", queries: 11, keys: 2, together: false, ..PLAIN },
    Case { name: "padding", lens: Some([3, 7, 0]), ..PLAIN },
    Case {
        name: "padding, a sample without keys",
        lens: Some([0, 1, 0]),
        queries: 4,
        keys: 6,
        together: false,
        ..PLAIN
    },
    Case {
        name: "causal with padding",
        mask: Mask::Causal,
        lens: Some([2, 5, 6]),
        samples: 3,
        heads: 2,
        head_dim: 4,
        queries: 6,
        keys: 6,
        ..PLAIN
    },
    Case { name: "dropout", dropout: 0.3, ..PLAIN },
    Case {
        name: "causal with dropout and padding",
        mask: Mask::Causal,
        dropout: 0.6,
        lens: Some([4, 7, 0]),
        ..PLAIN
    },
    Case { name: "no samples", samples: 0, ..PLAIN },
    Case { name: "others", mask: Mask::Others, ..PLAIN },
    Case { name: "others, one token", mask: Mask::Others, queries: 1, keys: 1, ..PLAIN },
    Case {
        name: "others, many tokens",
        mask: Mask::Others,
        queries: 66,
        keys: 66,
        heads: 1,
        head_dim: 3,
        samples: 1,
        ..PLAIN
    },
    Case { name: "temperature", temperature: true, ..PLAIN },
    Case {
        name: "others with temperature and dropout",
        mask: Mask::Others,
        temperature: true,
        dropout: 0.3,
        ..PLAIN
    },
    Case {
        name: "others with padding",
        mask: Mask::Others,
        lens: Some([2, 1, 0]),
        samples: 3,
        heads: 2,
        head_dim: 4,
        queries: 6,
        keys: 6,
        temperature: true,
        ..PLAIN
    },
    Case { name: "grouped", heads: 6, group: 3, together: false, ..PLAIN },
    Case { name: "grouped, one head of keys", mask: Mask::Causal, group: 3, ..PLAIN },
    Case {
        name: "grouped with dropout and padding",
        mask: Mask::Causal,
        heads: 4,
        group: 2,
        dropout: 0.3,
        lens: Some([4, 7, 0]),
        temperature: true,
        ..PLAIN
    },
    Case { name: "sliding", mask: Mask::Sliding(3), ..PLAIN },
    Case { name: "sliding, the token alone", mask: Mask::Sliding(1), ..PLAIN },
    Case { name: "sliding, wider than the sample", mask: Mask::Sliding(1000), ..PLAIN },
    Case {
        name: "sliding, many tokens",
        mask: Mask::Sliding(20),
        queries: 90,
        keys: 90,
        heads: 2,
        group: 2,
        head_dim: 2,
        samples: 1,
        dropout: 0.2,
        ..PLAIN
    },
    Case { name: "packed", mask: Mask::Causal, packed: 3, ..PLAIN },
    Case {
        name: "heads of 160",
        mask: Mask::Causal,
        queries: 2,
        keys: 2,
        heads: 1,
        head_dim: 160,
        samples: 1,
        ..PLAIN
    },
    Case {
        name: "heads of 192, with temperature",
        queries: 1,
        keys: 2,
        heads: 1,
        head_dim: 192,
        samples: 1,
        together: false,
        temperature: true,
        ..PLAIN
    },
    Case {
        name: "heads of 256",
        queries: 1,
        keys: 2,
        heads: 1,
        head_dim: 256,
        samples: 1,
        together: false,
        ..PLAIN
    },
    Case {
        name: "packed, many tokens, sliding with padding",
        mask: Mask::Sliding(30),
        queries: 90,
        keys: 90,
        heads: 2,
        group: 2,
        head_dim: 2,
        samples: 1,
        lens: Some([80, 0, 0]),
        packed: 41,
        ..PLAIN
    },
];

fn attention<B: NnOps>(bench: &mut Bench<B>, case: &Case) -> Result<(), Failure> {
    let (n, width) = (case.samples, case.heads * case.head_dim);
    let kv_width = width / case.group;
    bench.begin("attention", case.name, [n, case.heads, case.queries, case.keys]);
    let key_lens = match case.lens {
        Some(lens) => bench.ints(n, |i| lens[i % 3]),
        None => Ints::EMPTY,
    };
    // Near ln(1/2), so that scores stay of order one.
    let seed = bench.cases;
    let [temperature, temperature_grad] = [0, 1]
        .map(|i| bench.reals_of(usize::from(case.temperature), |_| 0.3 * noise(seed, i) - 0.7));
    let starts = bench.ints(if case.packed > 0 { n * case.queries } else { 0 }, |i| {
        // Sample i begins in the middle of a text.
        let (sample, t) = (i / case.queries, i % case.queries);
        (t - ((t + sample) % case.packed).min(t)) as i32
    });
    let a = Attention { temperature, temperature_grad, starts, ..case.with(key_lens) };
    let chunk = chunk(n);
    let (q_rows, k_rows) = (n * case.queries, n * case.keys);
    // Columns of one matrix, with one column that is nobody's; or three matrices.
    let columns = |bench: &mut Bench<B>, fill: bool| {
        let mut matrix = |rows: usize, stride: usize| {
            if fill { bench.reals(rows * stride) } else { bench.garbage(rows * stride) }
        };
        if case.together {
            let stride = width + 2 * kv_width + 1;
            let of = matrix(q_rows, stride);
            [0, width, width + kv_width + 1].map(|at| Columns { of, stride, at })
        } else {
            [(q_rows, width, 2), (k_rows, kv_width, 0), (k_rows, kv_width, 1)].map(
                |(rows, width, at)| Columns {
                    of: matrix(rows, width + at),
                    stride: width + at,
                    at,
                },
            )
        }
    };
    let [q, k, v] = columns(bench, true);
    let (out, lse) = (bench.garbage(q_rows * width), bench.garbage(q_rows * case.heads));
    let terms = case.keys + case.head_dim;
    both!(bench, [Operand::set("out", out, terms), Operand::set("lse", lse, terms)], |on, s| {
        on.attention(&chunk, &a, q, k, v, out, lse, s)
    });

    bench.op = "attention_vjp";
    for h in [out, lse] {
        for i in h.range() {
            bench.before.reals[i] = bench.oracle.reals[i];
        }
    }
    let dout = bench.reals(q_rows * width);
    let [dq, dk, dv] = columns(bench, false);
    let terms = 2 * case.group * (terms + case.queries);
    both!(
        bench,
        [
            Operand::columns("dq", dq, width, terms),
            Operand::columns("dk", dk, kv_width, terms),
            Operand::columns("dv", dv, kv_width, terms),
            Operand::sum("temperature_grad", temperature_grad, terms + n * case.queries * width)
        ],
        |on, s| on.attention_vjp(&chunk, &a, q, k, v, out, lse, dout, dq, dk, dv, s)
    );
    Ok(())
}

fn dropout<B: NnOps>(bench: &mut Bench<B>, n: usize, per: usize) -> Result<(), Failure> {
    for draw in [Draw::EmbeddingDropout, Draw::MlpResidualDropout] {
        for (case, p) in [("p = 0", 0.0), ("p = 0.1", 0.1), ("p = 0.75", 0.75)] {
            bench.begin("dropout", case, [n, per, 0, 0]);
            let x = bench.reals(n * per);
            both!(bench, [Operand::sum("x", x, 1)], |on| on.dropout(&chunk(n), draw, p, x));
        }
    }
    Ok(())
}

fn embedding<B: NnOps>(
    bench: &mut Bench<B>,
    [n, length, vocab, width]: [usize; 4],
) -> Result<(), Failure> {
    // Every token of the second case lies inside; the others meet one that is negative or too
    // large.
    for (case, bad) in [
        ("tokens inside", None),
        ("a negative token", Some(-1)),
        ("a token too large", Some(vocab as i32)),
    ] {
        bench.begin("embed", case, [n, length, vocab, width]);
        let (seed, chunk) = (bench.cases, chunk(n));
        let wrong = n * length * 2 / 3;
        let tokens = bench.ints(n * length, |i| match bad {
            Some(bad) if i == wrong => bad,
            // A second one must not win.
            Some(_) if i == wrong + 1 => i32::MAX,
            _ => (random(seed, i) as usize % vocab) as i32,
        });
        let learned = bench.cases.is_multiple_of(2);
        let table = bench.reals(vocab * width);
        let positions = bench.reals(if learned { (length + 1) * width } else { 0 });
        let x = bench.garbage(n * length * width);
        both!(bench, [Operand::set("x", x, 1)], |on| on
            .embed(&chunk, tokens, table, positions, width, x));

        if bad.is_none() {
            bench.op = "embed_vjp";
            bench.set_reals(x, |i| noise(seed, i));
            both!(
                bench,
                [
                    Operand::sum("dtable", table, n * length),
                    Operand::sum("dpositions", positions, n)
                ],
                |on| on.embed_vjp(&chunk, tokens, x, width, table, positions)
            );
        }
    }
    Ok(())
}

fn losses<B: NnOps>(
    bench: &mut Bench<B>,
    [rows, vocab, tokens, row]: [usize; 4],
) -> Result<(), Failure> {
    let chunk = chunk(row + rows);
    let last = rows.saturating_sub(1);
    for case in [
        "all targets",
        "masked targets",
        "smoothed targets",
        "target too large",
        "NaN",
        "target impossible",
        "NaN in a masked row",
    ] {
        let smoothing = if case == "smoothed targets" { 0.1 } else { 0.0 };
        let ce = CrossEntropy { vocab, tokens, row, scale: 0.125, smoothing };
        for spread in [2.0, 60.0] {
            bench.begin("cross_entropy", case, [rows, vocab, tokens, row]);
            let seed = bench.cases;
            let target = |i: usize| match case {
                "masked targets" | "smoothed targets" if i % 4 == 2 => -100,
                "masked targets" if i.is_multiple_of(2) => -100,
                "target too large" if i == last => vocab as i32,
                "NaN in a masked row" if i == last => -1,
                _ => (random(seed, i) as usize % vocab) as i32,
            };
            let targets = bench.ints(rows, target);
            let logits = bench.reals_of(rows * vocab, |i| match case {
                "NaN" | "NaN in a masked row" if i / vocab == last && i % vocab == vocab / 2 => {
                    f64::NAN
                }
                "target impossible"
                    if i / vocab == last && vocab > 1 && i % vocab == target(last) as usize =>
                {
                    f64::NEG_INFINITY
                }
                _ => spread * noise(seed, i),
            });
            let losses = bench.garbage(rows);
            both!(
                bench,
                [Operand::sum("logits", logits, vocab), Operand::set("losses", losses, vocab)],
                |on| on.cross_entropy(&chunk, &ce, logits, targets, losses)
            );
        }
    }
    Ok(())
}

fn refusals<B: NnOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    bench.begin("refusals", "", [0; 4]);
    let (a, b, c, d) = (bench.reals(120), bench.reals(120), bench.reals(120), bench.reals(120));
    let (e, f, g) = (bench.reals(120), bench.reals(120), bench.reals(120));
    let far = |len: usize| Reals::new(OUTSIDE, len);
    let tokens = bench.ints(6, |_| 0);
    let ok = chunk(2);

    bench.op = "matmul";
    let p =
        Product { rows: 4, cols: 6, inner: 5, a: Order::Plain, b: Order::Plain, accumulate: false };
    let huge = Product { rows: usize::MAX, cols: usize::MAX, inner: usize::MAX, ..p };
    let (x, y, z) = (a.sub(0, 20), b.sub(0, 30), c.sub(0, 24));
    refused!(bench, "a outside", |on| on.matmul(&p, far(20), y, None, z));
    refused!(bench, "b outside", |on| on.matmul(&p, x, far(30), None, z));
    refused!(bench, "c outside", |on| on.matmul(&p, x, y, None, far(24)));
    refused!(bench, "a too short", |on| on.matmul(&p, x.sub(0, 19), y, None, z));
    refused!(bench, "b too short", |on| on.matmul(&p, x, y.sub(0, 29), None, z));
    refused!(bench, "c too short", |on| on.matmul(&p, x, y, None, z.sub(0, 23)));
    refused!(bench, "bias too long", |on| on.matmul(&p, x, y, Some(d.sub(0, 7)), z));
    refused!(bench, "c overlaps a", |on| on.matmul(&p, x, y, None, a.sub(10, 24)));
    refused!(bench, "c overlaps the bias", |on| on.matmul(&p, x, y, Some(z.sub(0, 6)), z));
    refused!(bench, "sizes whose product overflows", |on| on.matmul(&huge, x, y, None, z));
    bench.op = "sum_rows";
    refused!(bench, "width does not divide the length", |on| on.sum_rows(a, b.sub(0, 7)));
    refused!(bench, "sum lies in x", |on| on.sum_rows(a, a.sub(0, 8)));
    refused!(bench, "x outside", |on| on.sum_rows(far(16), a.sub(0, 8)));
    refused!(bench, "no columns", |on| on.sum_rows(a, Reals::EMPTY));
    bench.op = "add";
    refused!(bench, "lengths", |on| on.add(a, b.sub(0, 7)));
    refused!(bench, "x is y", |on| on.add(a, a));
    refused!(bench, "outside", |on| on.add(a, far(120)));
    bench.op = "rms_norm";
    let norm = RmsNorm { groups: 2, width: 5, eps: 1e-5, offset: 0.0 };
    let of = |of: Reals, at| Columns { of, stride: 12, at };
    let (x, y, weight, stats) = (a.sub(0, 48), b.sub(0, 48), c.sub(0, 5), d.sub(0, 8));
    let norm_of = |bench: &mut Bench<B>, what, x, y, weight, stats| {
        bench.case = what;
        bench.upload(0, &[])?;
        let outcome = bench.backend.rms_norm(&norm, weight, x, y, stats);
        bench.refused(outcome)
    };
    for (what, x, y, weight, stats) in [
        ("weight too short", of(x, 2), of(y, 0), c.sub(0, 4), stats),
        ("statistics of half a row", of(x, 2), of(y, 0), weight, d.sub(0, 7)),
        ("x too short", of(a.sub(0, 47), 2), of(y, 0), weight, stats),
        ("columns reach outside", of(x, 3), of(y, 0), weight, stats),
        ("first column overflows", of(x, usize::MAX), of(y, 0), weight, stats),
        ("x is y", of(x, 2), of(x, 2), weight, stats),
        ("y outside", of(x, 2), of(far(48), 0), weight, stats),
        ("statistics in x", of(x, 2), of(y, 0), weight, a.sub(8, 8)),
    ] {
        norm_of(bench, what, x, y, weight, stats)?;
    }
    bench.op = "rms_norm_vjp";
    let (xs, dy, dx) = (of(x, 2), of(y, 0), of(e.sub(0, 48), 1));
    refused!(bench, "dx is dy", |on| on.rms_norm_vjp(
        &norm,
        weight,
        xs,
        stats,
        dy,
        dy,
        f.sub(0, 5)
    ));
    refused!(bench, "dweight too long", |on| on.rms_norm_vjp(
        &norm,
        weight,
        xs,
        stats,
        dy,
        dx,
        f.sub(0, 6)
    ));
    refused!(bench, "dweight is the weight", |on| on
        .rms_norm_vjp(&norm, weight, xs, stats, dy, dx, weight));
    bench.op = "rotate";
    let rotary = Rotary { heads: 2, head_dim: 4, tokens: 2, back: false };
    let odd = Rotary { head_dim: 5, ..rotary };
    let (table, xs, none) = (b.sub(0, 12), of(a.sub(0, 48), 3), Ints::EMPTY);
    refused!(bench, "an odd head", |on| on.rotate(&ok, &odd, b.sub(0, 15), none, xs));
    refused!(bench, "half a position", |on| on.rotate(&ok, &rotary, b.sub(0, 14), none, xs));
    refused!(bench, "one position too many", |on| on.rotate(
        &ok,
        &rotary,
        table,
        tokens.sub(0, 5),
        xs
    ));
    refused!(bench, "columns reach outside", |on| on.rotate(
        &ok,
        &rotary,
        table,
        none,
        Columns { at: 5, ..xs }
    ));
    refused!(bench, "x too long", |on| on.rotate(&ok, &rotary, table, none, of(a.sub(0, 60), 0)));
    refused!(bench, "the table is x", |on| on.rotate(&ok, &rotary, a.sub(0, 12), none, xs));
    refused!(bench, "table outside", |on| on.rotate(&ok, &rotary, far(12), none, xs));
    bench.op = "gated";
    let (gate, act) = (a.sub(0, 9), Gate::Silu);
    refused!(bench, "lengths", |on| on.gated(act, gate, b.sub(0, 8), c.sub(0, 9)));
    refused!(bench, "y is up", |on| on.gated(act, gate, b.sub(0, 9), b.sub(0, 9)));
    refused!(bench, "outside", |on| on.gated(act, far(9), b.sub(0, 9), c.sub(0, 9)));
    let (up, dy) = (b.sub(0, 9), c.sub(0, 9));
    refused!(bench, "dgate too long", |on| on.gated_vjp(act, gate, up, dy, d.sub(0, 10)));
    refused!(bench, "dgate is dup", |on| on.gated_vjp(act, gate, up, dy, dy));
    bench.op = "unpack";
    let words = bench.words(5);
    let x = Packed { packing: Packing::Bf16, words, rows: 2, cols: 5, neighbours: 0 };
    let far_away = Packed { words: Words::new(OUTSIDE, 5), ..x };
    let (short, long) = (Packed { words: words.sub(0, 4), ..x }, Packed { rows: 1, ..x });
    refused!(bench, "too few words", |on| on.unpack(&short, 0, a.sub(0, 10)));
    refused!(bench, "too many words", |on| on.unpack(&long, 0, a.sub(0, 5)));
    refused!(bench, "words outside", |on| on.unpack(&far_away, 0, a.sub(0, 10)));
    refused!(bench, "y outside", |on| on.unpack(&x, 0, far(10)));
    refused!(bench, "no whole rows", |on| on.unpack(&x, 0, a.sub(0, 9)));
    refused!(bench, "rows beyond the last", |on| on.unpack(&x, 1, a.sub(0, 10)));
    refused!(bench, "a row that overflows", |on| on.unpack(&x, usize::MAX, a.sub(0, 10)));
    let odd = Packed { neighbours: 1, ..x };
    refused!(bench, "an odd head", |on| on.unpack(&odd, 0, a.sub(0, 10)));
    let split = Packed { neighbours: 4, ..x };
    refused!(bench, "no whole heads", |on| on.unpack(&split, 0, a.sub(0, 10)));
    let broken = Packed { packing: Packing::Q4_0, ..x };
    refused!(bench, "no whole blocks", |on| on.unpack(&broken, 0, a.sub(0, 10)));
    bench.op = "unpack_rows";
    let two = bench.ints(2, |i| i as i32);
    refused!(bench, "y too short", |on| on.unpack_rows(&ok, &x, two, a.sub(0, 5)));
    refused!(bench, "rows outside", |on| {
        on.unpack_rows(&ok, &x, Ints::new(OUTSIDE, 2), a.sub(0, 10))
    });
    refused!(bench, "y outside", |on| on.unpack_rows(&ok, &x, two, far(10)));
    bench.op = "add_columns";
    let (from, to) = (Columns { of: a, stride: 12, at: 2 }, Columns { of: b, stride: 6, at: 1 });
    let ten = Columns { of: b.sub(0, 60), ..to };
    refused!(bench, "other numbers of rows", |on| on.add_columns(4, 1.0, from, to));
    refused!(bench, "columns beyond the matrix", |on| on.add_columns(6, 1.0, from, ten));
    refused!(bench, "columns that overflow", |on| on.add_columns(usize::MAX, 1.0, from, ten));
    refused!(bench, "no columns", |on| on.add_columns(4, 1.0, Columns { stride: 0, ..from }, ten));
    refused!(bench, "the same memory", |on| on.add_columns(
        4,
        1.0,
        from,
        Columns { of: a.sub(0, 60), ..to }
    ));
    refused!(bench, "outside", |on| on.add_columns(4, 1.0, from, Columns { of: far(60), ..to }));
    bench.op = "layer_norm";
    let (w, bias, stats) = (d.sub(0, 8), e.sub(0, 8), f.sub(0, 30));
    refused!(bench, "stats too short", |on| on.layer_norm(1e-5, w, bias, a, b, f.sub(0, 29)));
    refused!(bench, "bias too short", |on| on.layer_norm(1e-5, w, e.sub(0, 7), a, b, stats));
    refused!(bench, "y too short", |on| on.layer_norm(1e-5, w, bias, a, b.sub(0, 119), stats));
    refused!(bench, "width does not divide the length", |on| on.layer_norm(
        1e-5,
        d.sub(0, 7),
        e.sub(0, 7),
        a,
        b,
        stats
    ));
    refused!(bench, "y is x", |on| on.layer_norm(1e-5, w, bias, a, a, stats));
    refused!(bench, "y outside", |on| on.layer_norm(1e-5, w, bias, a, far(120), stats));
    bench.op = "layer_norm_vjp";
    let (dw, db) = (g.sub(0, 8), g.sub(16, 8));
    refused!(bench, "dweight too short", |on| on.layer_norm_vjp(
        w,
        a,
        stats,
        b,
        c,
        dw.sub(0, 7),
        db
    ));
    refused!(bench, "no dbias", |on| on.layer_norm_vjp(w, a, stats, b, c, dw, Reals::EMPTY));
    refused!(bench, "dbias is dweight", |on| on.layer_norm_vjp(w, a, stats, b, c, dw, dw));
    refused!(bench, "dx is dy", |on| on.layer_norm_vjp(w, a, stats, b, b, dw, db));
    refused!(bench, "dx outside", |on| on.layer_norm_vjp(w, a, stats, b, far(120), dw, db));
    bench.op = "gelu";
    refused!(bench, "lengths", |on| on.gelu(Gelu::Tanh, a, b.sub(0, 3)));
    refused!(bench, "outside", |on| on.gelu(Gelu::Tanh, a, far(120)));
    refused!(bench, "y is x", |on| on.gelu(Gelu::Exact, a, a));
    bench.op = "gelu_vjp";
    refused!(bench, "lengths", |on| on.gelu_vjp(Gelu::Tanh, a, b.sub(0, 3)));
    refused!(bench, "outside", |on| on.gelu_vjp(Gelu::Exact, far(120), b));
    bench.op = "dropout";
    refused!(bench, "samples that do not divide the length", |on| on.dropout(
        &chunk(7),
        Draw::Init,
        0.5,
        a
    ));
    refused!(bench, "p = 1", |on| on.dropout(&ok, Draw::Init, 1.0, a));
    refused!(bench, "p is NaN", |on| on.dropout(&ok, Draw::Init, f64::NAN, a));
    refused!(bench, "outside", |on| on.dropout(&ok, Draw::Init, 0.5, far(4)));
    bench.op = "embed";
    let (table, pos, out) = (a.sub(0, 40), b.sub(0, 12), c.sub(0, 24));
    refused!(bench, "x too short", |on| on.embed(&ok, tokens, table, pos, 4, c.sub(0, 23)));
    refused!(bench, "too few positions", |on| on.embed(&ok, tokens, table, b.sub(0, 11), 4, out));
    refused!(bench, "table with half a row", |on| on.embed(&ok, tokens, a.sub(0, 42), pos, 4, out));
    refused!(bench, "tokens outside", |on| on.embed(
        &ok,
        Ints::new(OUTSIDE, 6),
        table,
        pos,
        4,
        out
    ));
    refused!(bench, "samples that do not divide the tokens", |on| on.embed(
        &chunk(4),
        tokens,
        table,
        pos,
        4,
        out
    ));
    refused!(bench, "x lies in the table", |on| on.embed(&ok, tokens, table, pos, 4, a.sub(8, 24)));
    bench.op = "embed_vjp";
    refused!(bench, "dx too short", |on| on.embed_vjp(&ok, tokens, c.sub(0, 23), 4, table, pos));
    refused!(bench, "dpositions too short", |on| on.embed_vjp(
        &ok,
        tokens,
        out,
        4,
        table,
        b.sub(0, 11)
    ));
    refused!(bench, "dtable outside", |on| on.embed_vjp(&ok, tokens, out, 4, far(40), pos));
    bench.op = "cross_entropy";
    let ce = CrossEntropy { vocab: 20, tokens: 3, row: 0, scale: 1.0, smoothing: 0.0 };
    refused!(bench, "logits too short", |on| on.cross_entropy(
        &ok,
        &ce,
        a.sub(0, 119),
        tokens,
        b.sub(0, 6)
    ));
    for smoothing in [-0.1, 1.5, f64::NAN] {
        let wrong = CrossEntropy { smoothing, ..ce };
        refused!(bench, "smoothing outside 0 to 1", |on| on.cross_entropy(
            &ok,
            &wrong,
            a,
            tokens,
            b.sub(0, 6)
        ));
    }
    refused!(bench, "losses too short", |on| on.cross_entropy(&ok, &ce, a, tokens, b.sub(0, 5)));
    refused!(bench, "losses in the logits", |on| on.cross_entropy(
        &ok,
        &ce,
        a,
        tokens,
        a.sub(0, 6)
    ));
    refused!(bench, "targets outside", |on| on.cross_entropy(
        &ok,
        &ce,
        a,
        Ints::new(OUTSIDE, 6),
        b.sub(0, 6)
    ));
    attention_refusals(bench)
}

fn attention_refusals<B: NnOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    let case = Case { samples: 2, heads: 2, head_dim: 2, queries: 3, keys: 3, ..PLAIN };
    bench.begin("attention", "", [2, 2, 3, 3]);
    let (ok, a, n) = (chunk(2), case.with(Ints::EMPTY), 6 * 12);
    let (qkv, dqkv) = (bench.reals(n), bench.reals(n));
    let (out, dout, lse) = (bench.reals(24), bench.reals(24), bench.reals(12));
    let lens = bench.ints(2, |_| 2);
    let column = |of: Reals, at: usize| Columns { of, stride: 12, at };
    let [q, k, v] = [0, 4, 8].map(|at| column(qkv, at));
    let [dq, dk, dv] = [0, 4, 8].map(|at| column(dqkv, at));
    let s = bench.scratch;
    refused!(bench, "columns reach outside the matrix", |on| on.attention(
        &ok,
        &a,
        q,
        k,
        column(qkv, 9),
        out,
        lse,
        s
    ));
    refused!(bench, "first column overflows", |on| on.attention(
        &ok,
        &a,
        q,
        column(qkv, usize::MAX),
        v,
        out,
        lse,
        s
    ));
    refused!(bench, "matrix outside", |on| on.attention(
        &ok,
        &a,
        column(Reals::new(OUTSIDE, n), 0),
        k,
        v,
        out,
        lse,
        s
    ));
    refused!(bench, "matrix too short", |on| on.attention(
        &ok,
        &a,
        column(qkv.sub(0, n - 12), 0),
        k,
        v,
        out,
        lse,
        s
    ));
    refused!(bench, "out too short", |on| on.attention(&ok, &a, q, k, v, out.sub(0, 23), lse, s));
    refused!(bench, "lse too short", |on| on.attention(&ok, &a, q, k, v, out, lse.sub(0, 11), s));
    refused!(bench, "out lies in v", |on| on.attention(&ok, &a, q, k, v, qkv.sub(0, 24), lse, s));
    refused!(bench, "lse lies in out", |on| on.attention(&ok, &a, q, k, v, out, out.sub(0, 12), s));
    let wrong = Attention { key_lens: lens.sub(0, 1), ..a };
    refused!(bench, "one length too few", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    let wrong = Attention { key_lens: Ints::new(OUTSIDE, 2), ..a };
    refused!(bench, "lengths outside", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    let wrong = Attention { starts: lens, ..a };
    refused!(bench, "starts of some queries", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    let wrong = Attention { starts: Ints::new(OUTSIDE, 6), ..a };
    refused!(bench, "starts outside", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    for kv_heads in [0, 3] {
        let wrong = Attention { kv_heads, ..a };
        refused!(bench, "no divisor", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    }
    let wrong = Attention { mask: Mask::Sliding(0), ..a };
    refused!(bench, "an empty window", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    let wrong = Attention { dropout: 1.0, ..a };
    refused!(bench, "dropout of everything", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    let wrong = Attention { heads: usize::MAX, head_dim: usize::MAX, ..a };
    refused!(bench, "sizes whose product overflows", |on| on
        .attention(&ok, &wrong, q, k, v, out, lse, s));
    let fewer = Attention { mask: Mask::Causal, keys: 2, ..a };
    let tau = bench.reals(2);
    let wrong = Attention { mask: Mask::Others, keys: 2, ..a };
    let two = |at| column(qkv.sub(0, 48), at);
    refused!(bench, "causal with fewer keys", |on| on.attention(
        &ok,
        &fewer,
        q,
        two(4),
        two(8),
        out,
        lse,
        s
    ));
    refused!(bench, "others with fewer keys", |on| on.attention(
        &ok,
        &wrong,
        q,
        two(4),
        two(8),
        out,
        lse,
        s
    ));
    let wrong = Attention { temperature: tau, ..a };
    refused!(bench, "two temperatures", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    let wrong = Attention { temperature: Reals::new(OUTSIDE, 1), ..a };
    refused!(bench, "temperature outside", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    let wrong = Attention { temperature: out.sub(3, 1), ..a };
    refused!(bench, "temperature in out", |on| on.attention(&ok, &wrong, q, k, v, out, lse, s));
    bench.op = "attention_vjp";
    refused!(bench, "dk overlaps dv", |on| {
        on.attention_vjp(&ok, &a, q, k, v, out, lse, dout, dq, dk, column(dqkv, 5), s)
    });
    let grouped = Attention { kv_heads: 1, ..a };
    refused!(bench, "dv overlaps a narrower dk", |on| {
        on.attention_vjp(&ok, &grouped, q, k, v, out, lse, dout, dq, dk, column(dqkv, 5), s)
    });
    refused!(bench, "a narrower dk overlaps dq", |on| {
        on.attention_vjp(&ok, &grouped, q, k, v, out, lse, dout, dq, column(dqkv, 3), dv, s)
    });
    let wrong = Attention { temperature: tau.sub(0, 1), ..a };
    refused!(bench, "temperature without gradient", |on| {
        on.attention_vjp(&ok, &wrong, q, k, v, out, lse, dout, dq, dk, dv, s)
    });
    let wrong = Attention { temperature_grad: tau.sub(0, 1), ..wrong };
    refused!(bench, "temperature is its gradient", |on| {
        on.attention_vjp(&ok, &wrong, q, k, v, out, lse, dout, dq, dk, dv, s)
    });
    let wrong = Attention { temperature_grad: dqkv.sub(0, 1), ..wrong };
    refused!(bench, "temperature's gradient in dq", |on| {
        on.attention_vjp(&ok, &wrong, q, k, v, out, lse, dout, dq, dk, dv, s)
    });
    refused!(bench, "dq lies in qkv", |on| on
        .attention_vjp(&ok, &a, q, k, v, out, lse, dout, q, dk, dv, s));
    refused!(bench, "dout too short", |on| {
        on.attention_vjp(&ok, &a, q, k, v, out, lse, dout.sub(0, 23), dq, dk, dv, s)
    });
    refused!(bench, "dv outside", |on| {
        on.attention_vjp(
            &ok,
            &a,
            q,
            k,
            v,
            out,
            lse,
            dout,
            dq,
            dk,
            column(Reals::new(OUTSIDE, n), 8),
            s,
        )
    });
    if B::attention_scratch(&a, 2, THREADS) > 0 {
        refused!(bench, "no scratch", |on| {
            on.attention_vjp(&ok, &a, q, k, v, out, lse, dout, dq, dk, dv, Reals::EMPTY)
        });
    }
    Ok(())
}

/// Operands that are long enough for threads and for every path of a product, against sums in
/// `f64`.
fn large<B: NnOps>(new: impl FnMut(&Layout) -> B) -> Result<(), Failure> {
    let (rows, cols, inner) = (130, 210, 75);
    let mut bench = Bench::new(new, rows * inner + inner * cols + 3 * rows * cols + 3 * cols);
    bench.begin("matmul", "large", [rows, cols, inner, 0]);
    let s = bench.scratch;
    let (a, b) = (s.sub(0, rows * inner), s.sub(rows * inner, inner * cols));
    let c = s.sub(rows * inner + inner * cols, rows * cols);
    let again = Reals::new(c.start() + c.len(), rows * cols);
    let tail = Reals::new(again.start() + again.len(), rows * cols);
    let bias = Reals::new(tail.start() + tail.len(), cols);
    // Sums of 75 products of values up to 1 in magnitude.
    let tolerance = Operand::set("c", c, inner).tolerance::<B::Real>(inner as f64);
    for (a_order, b_order) in [
        (Order::Plain, Order::Plain),
        (Order::Plain, Order::Transposed),
        (Order::Transposed, Order::Plain),
        (Order::Transposed, Order::Transposed),
    ] {
        let p = Product { rows, cols, inner, a: a_order, b: b_order, accumulate: false };
        let at =
            |i: usize, k: usize| if a_order == Order::Plain { i * inner + k } else { k * rows + i };
        let bt =
            |k: usize, j: usize| if b_order == Order::Plain { k * cols + j } else { j * inner + k };
        // Cheap values that the type holds exactly.
        let value = |seed: usize, i: usize| f64::from((i * 7919 + seed) as u32 % 251) / 128.0 - 1.0;
        bench.write_large(a, |i| value(1, i))?;
        bench.write_large(b, |i| value(2, i))?;
        bench.write_large(bias, |i| value(3, i))?;
        bench.write_large(c, |_| f64::NAN)?;
        let outcome = bench.backend.matmul(&p, a, b, Some(bias), c);
        bench.done("outcome", outcome)?;
        let outcome = bench.backend.matmul(&p, a, b, Some(bias), again);
        bench.done("outcome", outcome)?;
        bench.check_large("c", c, tolerance, |n| {
            let (i, j) = (n / cols, n % cols);
            (0..inner).fold(value(3, j), |sum, k| sum + value(1, at(i, k)) * value(2, bt(k, j)))
        })?;
        bench.same_large("c, repeated", c, again)?;
    }

    bench.begin("sum_rows", "large", [rows, cols, 0, 0]);
    bench.write_large(c, |i| noise(1, i))?;
    bench.write_large(bias, |i| noise(2, i))?;
    let outcome = bench.backend.sum_rows(c, bias);
    bench.done("outcome", outcome)?;
    let tolerance = Operand::sum("sum", bias, rows).tolerance::<B::Real>(rows as f64);
    bench.check_large("sum", bias, tolerance, |j| {
        (0..rows).fold(noise(2, j), |sum, i| sum + noise(1, i * cols + j))
    })?;

    // The values as the type holds them.
    let typed = |seed: u64| move |i: usize| B::Real::of(noise(seed, i)).wide();
    let (x, dy) = (typed(1), typed(4));
    let tolerance = Operand::set("y", again, 16).tolerance::<B::Real>(1.0);
    bench.begin("gelu", "large", [c.len(), 0, 0, 0]);
    let outcome = bench.backend.gelu(Gelu::Exact, c, again);
    bench.done("outcome", outcome)?;
    let gelu = |x: f64| 0.5 * x * (1.0 + libm::erf(x * core::f64::consts::FRAC_1_SQRT_2));
    bench.check_large("y", again, tolerance, |i| gelu(x(i)))?;

    bench.begin("dropout", "large", [rows, cols, 0, 0]);
    let (chunk, per) = (chunk(rows / 10), 10 * cols);
    bench.write_large(again, dy)?;
    let outcome = bench.backend.dropout(&chunk, Draw::AttentionResidualDropout, 0.25, again);
    bench.done("outcome", outcome)?;
    bench.check_large("x", again, tolerance, |i| {
        let word = chunk.stream(i / per, Draw::AttentionResidualDropout).word((i % per) as u32);
        if keep(word, drop_threshold(0.25)) { dy(i) / 0.75 } else { 0.0 }
    })?;

    bench.begin("layer_norm", "large", [rows, cols, 0, 0]);
    let (weight, ones) =
        (Reals::new(bias.start() + cols, cols), Reals::new(bias.start() + 2 * cols, cols));
    let stats = a.sub(0, 2 * rows);
    bench.write_large(bias, |_| 0.0)?;
    bench.write_large(weight, |_| 1.0)?;
    let outcome = bench.backend.layer_norm(1e-5, weight, bias, c, again, stats);
    bench.done("outcome", outcome)?;
    let normal = |i: usize| {
        let row = i / cols * cols..(i / cols + 1) * cols;
        let mean = row.clone().map(x).sum::<f64>() / cols as f64;
        let variance = row.map(|k| (x(k) - mean) * (x(k) - mean)).sum::<f64>() / cols as f64;
        (x(i) - mean) / libm::sqrt(variance + 1e-5)
    };
    let tolerance = Operand::set("y", again, cols).tolerance::<B::Real>(1.0);
    bench.check_large("y", again, tolerance, normal)?;

    bench.op = "layer_norm_vjp";
    bench.write_large(again, dy)?;
    bench.write_large(ones, |_| 1.0)?;
    bench.write_large(bias, |_| 1.0)?;
    bench.write_large(tail, |_| 0.0)?;
    let outcome = bench.backend.layer_norm_vjp(weight, c, stats, again, tail, ones, bias);
    bench.done("outcome", outcome)?;
    let tolerance = Operand::sum("dbias", bias, rows).tolerance::<B::Real>(rows as f64);
    bench.check_large("dbias", bias, tolerance, |j| {
        (0..rows).fold(1.0, |sum, i| sum + dy(i * cols + j))
    })?;
    bench.check_large("dweight", ones, tolerance, |j| {
        (0..rows).fold(1.0, |sum, i| sum + dy(i * cols + j) * normal(i * cols + j))
    })
}
