//! Layers and optimizers: the values of the reference backend up to rounding, the same bits for any
//! number of threads.

mod common;

use bdia_core::backend::{
    Attention, Columns, CrossEntropy, Gate, Gelu, Mask, Order, Product, RmsNorm, Rotary,
};
use bdia_core::optim::{Rule, Update};
use bdia_core::rng::Draw;
use bdia_core::{Error, Fault, Ints, NnOps, Reals, Site, State, Words};
use bdia_cpu::{Cpu, Precision, Products};
use common::{World, chunk, is_handle};

/// Both backends sum in `f32`, in different orders: they differ by a few roundings of partial sums
/// that are as large as the result, growing with the root of the number of terms (at most 2,000
/// here, so 50·2^-24 with room).
const TOLERANCE: f32 = 3e-6;

/// Hands out places in the reals one after the other.
struct Bump(usize);

impl Bump {
    fn take(&mut self, n: usize) -> Reals {
        self.0 += n;
        Reals::new(self.0 - n, n)
    }
}

#[test]
fn matrix_products() {
    let shapes = [
        (0, 5, 3),
        (5, 0, 3),
        (4, 3, 0),
        (1, 1, 1),
        (1, 40, 70),
        (40, 1, 70),
        (1, 700, 1500),
        (3, 5, 2),
        (7, 9, 1),
        (17, 33, 65),
        (64, 64, 64),
        (130, 100, 513),
        (520, 390, 20),
        (70, 800, 1100),
        (600, 50, 33),
        (145, 193, 300),
        // Pieces and panels that end within a tile of every kernel.
        (33, 1000, 1025),
        // The shorter side in two parts, and in one whose inner terms are packed in two.
        (2100, 2070, 2),
        (610, 600, 1800),
    ];
    for (rows, cols, inner) in shapes {
        for (a_order, b_order) in [
            (Order::Plain, Order::Plain),
            (Order::Transposed, Order::Plain),
            (Order::Plain, Order::Transposed),
            (Order::Transposed, Order::Transposed),
        ] {
            if rows * cols * inner > 100_000_000 && a_order == b_order {
                continue; // the reference takes seconds for each
            }
            let mut at = Bump(0);
            let (a, b, c, bias) =
                (at.take(rows * inner), at.take(inner * cols), at.take(rows * cols), at.take(cols));
            let mut world = World::new(1, 0, at.0, 0);
            for (accumulate, with_bias) in
                [(false, false), (true, false), (false, true), (true, true)]
            {
                if !accumulate {
                    // Not read.
                    world.reals[c.range()].fill(f32::NAN);
                } else {
                    world.reals[c.range()].fill(0.25);
                }
                let p = Product { rows, cols, inner, a: a_order, b: b_order, accumulate };
                let what = format!("{p:?}, bias {with_bias}");
                let op: common::Op = &|x| x.matmul(&p, a, b, with_bias.then_some(bias), c);
                let reference = world.reference(op);
                for products in Products::ALL
                    .into_iter()
                    .filter(|p| p.is_available() && p.precision() == Precision::F32)
                {
                    let _ = world.close_to(
                        &reference,
                        products,
                        &format!("{what}, {products:?}"),
                        TOLERANCE,
                        op,
                    );
                }
            }
        }
    }
}

#[test]
fn rows_and_norms() {
    for (rows, width) in [(0, 8), (1, 1), (3, 5), (70, 64), (200, 100), (129, 768), (5, 1000)] {
        let mut at = Bump(0);
        let n = rows * width;
        let [x, y, dy, dx] = [0; 4].map(|_| at.take(n));
        let [w, b, dw, db] = [0; 4].map(|_| at.take(width));
        let stats = at.take(2 * rows);
        let world = World::new(2, 0, at.0, 0);
        let what = format!("{rows}×{width}");
        let _ = world.close(&format!("sum_rows {what}"), TOLERANCE, &|c| c.sum_rows(x, w));
        let _ = world.exact(&format!("add {what}"), &|c| c.add(x, y));
        // A width of 1 has no variance: rstd is 1/√eps, and what it multiplies is 0.
        let after = world.close(&format!("layer_norm {what}"), TOLERANCE, &|c| {
            c.layer_norm(1e-5, w, b, x, y, stats)
        });
        let _ = after.world.close(&format!("layer_norm_vjp {what}"), TOLERANCE, &|c| {
            c.layer_norm_vjp(w, x, stats, dy, dx, dw, db)
        });
    }
}

/// Parts of a matrix, with columns of nobody around them; enough rows for several pieces, and for
/// several partial sums of the weight's gradient.
#[test]
fn rms_norms() {
    for (rows, groups, width) in
        [(0, 1, 8), (1, 1, 1), (3, 2, 5), (70, 1, 64), (40, 3, 100), (129, 1, 768), (200, 4, 64)]
    {
        for offset in [0.0, 1.0] {
            let (mut at, all) = (Bump(0), groups * width);
            let [x, y, dy, dx] = [2, 0, 1, 3].map(|n| Columns {
                of: at.take(rows * (all + n + 2)),
                stride: all + n + 2,
                at: n,
            });
            let (w, dw, stats) = (at.take(width), at.take(width), at.take(rows * groups));
            let world = World::new(10, 0, at.0, 0);
            let norm = RmsNorm { groups, width, eps: 1e-5, offset };
            let what = format!("{rows}×{groups}×{width}");
            let after = world.close(&format!("rms_norm {what}"), TOLERANCE, &|c| {
                c.rms_norm(&norm, w, x, y, stats)
            });
            for dw in [dw, Reals::EMPTY] {
                let _ = after.world.close(&format!("rms_norm_vjp {what}"), TOLERANCE, &|c| {
                    c.rms_norm_vjp(&norm, w, x, stats, dy, dx, dw)
                });
            }
        }
    }
}

#[test]
fn rotations() {
    for (samples, tokens, heads, head_dim) in
        [(0, 3, 1, 2), (2, 0, 1, 2), (1, 1, 1, 2), (2, 7, 3, 10), (3, 100, 4, 64)]
    {
        let (mut at, known, stride) = (Bump(0), tokens + 2, heads * head_dim + 3);
        let (table, x) = (at.take(known * head_dim), at.take(samples * tokens * stride));
        let own = Ints::new(0, samples * tokens);
        let mut world = World::new(12, own.len(), at.0, 0);
        for p in &mut world.ints {
            *p = p.rem_euclid(known as i32);
        }
        let (x, c) = (Columns { of: x, stride, at: 2 }, chunk(samples));
        for back in [false, true] {
            let rotary = Rotary { heads, head_dim, tokens, back };
            for positions in [Ints::EMPTY, own] {
                let op: common::Op = &|b| b.rotate(&c, &rotary, table, positions, x);
                assert_eq!(world.close("rotate", TOLERANCE, op).fault, None);
            }
            let short: common::Op = &|b| b.rotate(&c, &rotary, table.sub(0, 0), Ints::EMPTY, x);
            let after = world.close("rotate without positions", TOLERANCE, short);
            let first = Fault::Position { sample: 5, value: 0, positions: 0 };
            assert_eq!(after.fault, (!own.is_empty()).then_some(first));
            assert_eq!(after.world.reals, world.reals);
            let mut bad = world.clone();
            for (p, value) in bad.ints.iter_mut().rev().zip([known as i32, -7]) {
                *p = value;
            }
            let op: common::Op = &|b| b.rotate(&c, &rotary, table, own, x);
            let fault = bad.close("rotate to nowhere", TOLERANCE, op).fault;
            let value = if own.len() > 1 { -7 } else { known as i32 };
            let first = Fault::Position { sample: 4 + samples, value, positions: known };
            assert_eq!(fault, (!own.is_empty()).then_some(first));
        }
    }
}

#[test]
fn gated() {
    for act in [Gate::Silu, Gate::Gelu(Gelu::Tanh), Gate::Gelu(Gelu::Exact)] {
        for n in [0, 1, 7, 8, 100, 40_000] {
            let mut at = Bump(0);
            let [gate, up, y, d, dgate] = [0; 5].map(|_| at.take(n));
            let mut world = World::new(13, 0, at.0, 0);
            for (i, x) in world.reals[..n].iter_mut().enumerate() {
                *x *= [1.0, 4.0, 0.01, 10.0, 100.0][i % 5];
            }
            let _ = world.close("gated", TOLERANCE, &|c| c.gated(act, gate, up, y));
            let _ = world.close("gated_vjp", TOLERANCE, &|c| c.gated_vjp(act, gate, up, d, dgate));
        }
        let wild = [1e20, -1e20, f32::MAX, f32::MIN, 0.0, -0.0, 60.0, -200.0, f32::NAN];
        let mut world = World::new(13, 0, 45, 0);
        world.reals.fill(1.0);
        world.reals[..9].copy_from_slice(&wild);
        let [gate, up, y, d, dgate] = [0, 9, 18, 27, 36].map(|at| Reals::new(at, 9));
        let after = world.cpu(1, &|c| {
            c.gated(act, gate, up, y)?;
            c.gated_vjp(act, gate, up, d, dgate)
        });
        let got = |h: Reals, i: usize| after.world.reals[h.start() + i];
        for (i, &x) in wild[..8].iter().enumerate() {
            assert_eq!((got(y, i), got(d, i)), (x.max(0.0), x.max(0.0)), "{act:?} of {x:e}");
            let slope = if x == 0.0 { 0.5 } else { f32::from(u8::from(x > 0.0)) };
            assert!((got(dgate, i) - slope).abs() < 1e-30, "{act:?} at {x:e}");
        }
        assert!([y, d, dgate].into_iter().all(|h| got(h, 8).is_nan()));
    }
}

#[test]
fn gelu() {
    for kind in [Gelu::Tanh, Gelu::Exact] {
        for n in [0, 1, 7, 8, 100, 40_000] {
            let (x, y) = (Reals::new(0, n), Reals::new(n, n));
            let mut world = World::new(3, 0, 2 * n, 0);
            for (i, x) in world.reals[..n].iter_mut().enumerate() {
                *x *= [1.0, 4.0, 0.01, 10.0][i % 4];
            }
            let _ = world.close("gelu", TOLERANCE, &|c| c.gelu(kind, x, y));
            let _ = world.close("gelu_vjp", TOLERANCE, &|c| c.gelu_vjp(kind, x, y));
        }
        let wild = [1e20, -1e20, f32::MAX, f32::MIN, 0.0, -0.0, 30.0, -30.0, f32::NAN];
        let mut world = World::new(3, 0, 18, 0);
        world.reals[..9].copy_from_slice(&wild);
        let (x, y) = (Reals::new(0, 9), Reals::new(9, 9));
        let after = world.cpu(1, &|c| c.gelu(kind, x, y));
        for (i, (&x, &y)) in
            after.world.reals[..8].iter().zip(&after.world.reals[9..17]).enumerate()
        {
            assert_eq!(y, if x > 0.0 { x } else { 0.0 }, "{kind:?} of value {i}, {x:e}");
        }
        assert!(after.world.reals[17].is_nan());
        world.reals[9..].fill(1.0);
        let after = world.cpu(1, &|c| c.gelu_vjp(kind, x, y));
        for (&x, &d) in after.world.reals[..8].iter().zip(&after.world.reals[9..17]) {
            let expected = if x > 0.0 {
                1.0
            } else if x == 0.0 {
                0.5
            } else {
                0.0_f32
            };
            assert!((d - expected).abs() < 1e-30, "{kind:?} at {x:e}: {d:e}");
        }
        assert!(after.world.reals[17].is_nan());
    }
}

fn attention_case(a: Attention, samples: usize, lens: &[i32], together: bool) {
    packed_case(a, samples, lens, &[], together);
}

fn packed_case(a: Attention, samples: usize, lens: &[i32], starts: &[i32], together: bool) {
    let (queries, keys) = (samples * a.queries, samples * a.keys);
    let (width, kv_width) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
    let mut at = Bump(0);
    let (q, k, v, dq, dk, dv);
    if together {
        // All three in one matrix, as c_attn leaves them, with columns of nobody at the end.
        let stride = width + 2 * kv_width + 2;
        let (of, d) = (at.take(queries * stride), at.take(queries * stride));
        let places = [0, width, width + kv_width];
        [q, k, v] = places.map(|at| Columns { of, stride, at });
        [dq, dk, dv] = places.map(|at| Columns { of: d, stride, at });
    } else {
        let mut columns = |rows: usize, width: usize| Columns {
            of: at.take(rows * (width + 3)),
            stride: width + 3,
            at: 1,
        };
        (q, k, v) = (columns(queries, width), columns(keys, kv_width), columns(keys, kv_width));
        (dq, dk, dv) = (columns(queries, width), columns(keys, kv_width), columns(keys, kv_width));
    }
    let (out, dout, lse) =
        (at.take(queries * width), at.take(queries * width), at.take(queries * a.heads));
    let [temperature, temperature_grad] = [0; 2].map(|_| at.take(a.temperature.len()));
    let starts_at = Ints::new(lens.len(), starts.len());
    let a = Attention { temperature, temperature_grad, starts: starts_at, ..a };
    let scratch = at.take(Cpu::attention_scratch(&a, samples, 3).max(a.keys));
    let mut world = World::new(4, 0, at.0, 0);
    world.ints = [lens, starts].concat();
    let c = chunk(samples);
    let what = format!("{a:?}, {samples} samples");
    // What is left in the scratch is nobody's business, but compared: cleared at the end of each.
    let forward: common::Op = &|b| {
        b.fill_reals(scratch, f32::NAN)?;
        b.attention(&c, &a, q, k, v, out, lse, scratch)?;
        b.fill_reals(scratch, 0.0)
    };
    let backward: common::Op = &|b| {
        b.fill_reals(scratch, f32::NAN)?;
        b.attention_vjp(&c, &a, q, k, v, out, lse, dout, dq, dk, dv, scratch)?;
        b.fill_reals(scratch, 0.0)
    };
    let reference = world.reference(forward);
    let gradient = reference.world.reference(backward);
    for products in Products::ALL.into_iter().filter(|p| p.is_available()) {
        // Scores of normal values are as large as 30 with 64 values a head, and rounded factors
        // move them by up to 2⁻⁷ of that at worst, weights by as much in relative terms; what is
        // seen is a tenth of it.
        let tolerance = if products.precision() == Precision::F32 { TOLERANCE } else { 0.02 };
        // The temperature's gradient is a sum of thousands of terms that cancel: its rounding is as
        // large as itself.
        if products.precision() != Precision::F32 && !a.temperature.is_empty() {
            continue;
        }
        let what = format!("{what}, {products:?}");
        let _ =
            world.close_to(&reference, products, &format!("attention {what}"), tolerance, forward);
        let before = &reference.world;
        let _ = before.close_to(
            &gradient,
            products,
            &format!("attention_vjp {what}"),
            3.0 * tolerance,
            backward,
        );
    }
}

#[test]
fn attention() {
    let base = Attention {
        draw: Draw::AttentionDropout,
        heads: 2,
        kv_heads: 2,
        starts: Ints::EMPTY,
        head_dim: 8,
        queries: 5,
        keys: 5,
        mask: Mask::Causal,
        key_lens: Ints::EMPTY,
        dropout: 0.0,
        temperature: Reals::EMPTY,
        temperature_grad: Reals::EMPTY,
    };
    for dropout in [0.0, 0.3] {
        let a = Attention { dropout, ..base };
        attention_case(a, 2, &[], true);
        attention_case(Attention { mask: Mask::Full, ..a }, 3, &[], true);
        attention_case(
            Attention { queries: 1, keys: 1, heads: 1, kv_heads: 1, head_dim: 1, ..a },
            1,
            &[],
            true,
        );
        attention_case(
            Attention { queries: 150, keys: 150, heads: 3, kv_heads: 3, head_dim: 20, ..a },
            2,
            &[],
            true,
        );
        attention_case(Attention { queries: 64, keys: 64, head_dim: 64, ..a }, 1, &[], false);
        let padded =
            Attention { mask: Mask::Full, key_lens: Ints::new(0, 3), queries: 70, keys: 33, ..a };
        attention_case(padded, 3, &[33, 0, 7], false);
        let padded = Attention { key_lens: Ints::new(0, 3), queries: 80, keys: 80, ..a };
        attention_case(padded, 3, &[99, -5, 66], true);
        attention_case(Attention { queries: 0, keys: 0, ..a }, 2, &[], true);
        attention_case(Attention { mask: Mask::Full, keys: 0, ..a }, 2, &[], false);
        attention_case(Attention { mask: Mask::Full, queries: 0, ..a }, 2, &[], false);
        attention_case(a, 0, &[], true);
        let others = Attention { mask: Mask::Others, ..a };
        attention_case(others, 2, &[], true);
        attention_case(Attention { queries: 1, keys: 1, ..others }, 2, &[], true);
        attention_case(Attention { queries: 65, keys: 65, head_dim: 16, ..others }, 3, &[], true);
        let padded = Attention { key_lens: Ints::new(0, 3), queries: 80, keys: 80, ..others };
        attention_case(padded, 3, &[80, 1, 66], true);
        // Its place is found with those of the other operands.
        let tau = Reals::new(usize::MAX, 1);
        attention_case(
            Attention { queries: 65, keys: 65, temperature: tau, ..others },
            3,
            &[],
            true,
        );
        attention_case(
            Attention { mask: Mask::Full, queries: 7, keys: 3, temperature: tau, ..a },
            2,
            &[],
            false,
        );
    }
}

/// What Llama's family has: fewer heads of keys than of queries, windows, several texts in one
/// sample.
#[test]
fn grouped_sliding_and_packed_attention() {
    for dropout in [0.0, 0.3] {
        let a = Attention {
            draw: Draw::AttentionDropout,
            heads: 6,
            kv_heads: 2,
            starts: Ints::EMPTY,
            head_dim: 8,
            queries: 150,
            keys: 150,
            mask: Mask::Causal,
            key_lens: Ints::EMPTY,
            dropout,
            temperature: Reals::EMPTY,
            temperature_grad: Reals::EMPTY,
        };
        let (lens, tau) = (Ints::new(0, 2), Reals::new(usize::MAX, 1));
        attention_case(a, 2, &[], true);
        attention_case(Attention { kv_heads: 1, mask: Mask::Full, keys: 33, ..a }, 2, &[], false);
        attention_case(Attention { mask: Mask::Others, temperature: tau, ..a }, 1, &[], true);
        for n in [1, 20, 64, 100, 149, usize::MAX] {
            attention_case(Attention { mask: Mask::Sliding(n), ..a }, 1, &[], true);
        }
        let window = Attention { mask: Mask::Sliding(40), key_lens: lens, kv_heads: 3, ..a };
        attention_case(Attention { temperature: tau, ..window }, 2, &[90, 150], false);
        // Texts of 37 tokens and of 80, which begin elsewhere in every sample.
        let starts = |of: i32| -> Vec<i32> {
            let start = |i: i32| (0..150).map(move |t| (t - (t + 9 * i) % of).max(0));
            (0..2).flat_map(start).collect()
        };
        for of in [37, 80] {
            packed_case(a, 2, &[], &starts(of), true);
            packed_case(window, 2, &[150, 100], &starts(of), true);
        }
        // Nothing says that texts are in order, or that a query sees anything; below 0 is 0.
        let mut wild = starts(37);
        wild[..70].fill(i32::MAX);
        (wild[75], wild[140], wild[160]) = (-5, i32::MIN, 150);
        packed_case(a, 2, &[], &wild, false);
        packed_case(Attention { mask: Mask::Others, ..a }, 2, &[], &wild, false);
    }
}

/// A window as wide as the sample, and a text that begins with it, change no bits; nor do heads of
/// keys that are read by several heads of queries, on the way forward.
#[test]
fn attention_in_other_words() {
    let a = Attention {
        draw: Draw::AttentionDropout,
        heads: 4,
        kv_heads: 4,
        starts: Ints::EMPTY,
        head_dim: 16,
        queries: 100,
        keys: 100,
        mask: Mask::Causal,
        key_lens: Ints::EMPTY,
        dropout: 0.2,
        temperature: Reals::EMPTY,
        temperature_grad: Reals::EMPTY,
    };
    let (mut at, stride) = (Bump(0), 3 * 64);
    let (of, d) = (at.take(100 * stride), at.take(100 * stride));
    let (out, dout, lse) = (at.take(6400), at.take(6400), at.take(400));
    let scratch = at.take(Cpu::attention_scratch(&a, 1, 3));
    let mut world = World::new(14, 100, at.0, 0);
    world.ints.fill(0);
    // Heads 0 and 1 of the keys are the same, and heads 2 and 3; so are those of the values.
    for row in world.reals[of.range()].chunks_exact_mut(stride) {
        for head in [64, 96, 128, 160] {
            row.copy_within(head..head + 16, head + 16);
        }
    }
    let [q, k, v] = [0, 64, 128].map(|at| Columns { of, stride, at });
    let [dq, dk, dv] = [0, 64, 128].map(|at| Columns { of: d, stride, at });
    let both = |a: Attention| {
        world.cpu(2, &|b| {
            b.attention(&chunk(1), &a, q, k, v, out, lse, scratch)?;
            b.attention_vjp(&chunk(1), &a, q, k, v, out, lse, dout, dq, dk, dv, scratch)?;
            b.fill_reals(scratch, 0.0)
        })
    };
    let causal = both(a);
    both(Attention { mask: Mask::Sliding(100), ..a }).same_bits(&causal, "a wide window");
    both(Attention { starts: Ints::new(0, 100), ..a }).same_bits(&causal, "one text");

    // Now the two heads that differ lie side by side.
    let mut grouped = world.clone();
    for row in grouped.reals[of.range()].chunks_exact_mut(stride) {
        for first in [64, 128] {
            row.copy_within(first + 32..first + 48, first + 16);
        }
    }
    let op = |kv_heads: usize| {
        let a = Attention { kv_heads, ..a };
        move |b: &mut dyn bdia_core::Backend<Real = f32>| {
            b.attention(&chunk(1), &a, q, k, v, out, lse, scratch)
        }
    };
    let (all, two) = (world.cpu(2, &op(4)), grouped.cpu(2, &op(2)));
    for h in [out, lse] {
        assert_eq!(all.world.reals[h.range()], two.world.reals[h.range()]);
    }
}

/// The memory for scores is as long as a window, not as the sample.
#[test]
fn a_window_needs_little_memory() {
    let of = |mask, keys| {
        let a = Attention {
            draw: Draw::AttentionDropout,
            heads: 1,
            kv_heads: 1,
            starts: Ints::EMPTY,
            head_dim: 4,
            queries: keys,
            keys,
            mask,
            key_lens: Ints::EMPTY,
            dropout: 0.0,
            temperature: Reals::EMPTY,
            temperature_grad: Reals::EMPTY,
        };
        Cpu::attention_scratch(&a, 1, 1)
    };
    assert_eq!(of(Mask::Sliding(512), 4096), of(Mask::Sliding(512), 1 << 20));
    assert!(of(Mask::Sliding(512), 4096) < of(Mask::Causal, 640));
    assert_eq!(of(Mask::Sliding(usize::MAX), 4096), of(Mask::Causal, 4096));
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let a = Attention {
        draw: Draw::AttentionDropout,
        heads: 2,
        kv_heads: 2,
        starts: Ints::EMPTY,
        head_dim: 4,
        queries: 3,
        keys: 3,
        mask: Mask::Causal,
        key_lens: Ints::EMPTY,
        dropout: 0.0,
        temperature: Reals::EMPTY,
        temperature_grad: Reals::EMPTY,
    };
    let need = Cpu::attention_scratch(&a, 1, 2);
    let world = World::new(1, 4, 1000 + need, 0);
    let of = Reals::new(0, 72);
    let [q, k, v] = [0, 8, 16].map(|at| Columns { of, stride: 24, at });
    let (out, lse, scratch) = (Reals::new(100, 24), Reals::new(200, 6), Reals::new(300, need));
    let try_it = |a: Attention, q: Columns, out: Reals, scratch: Reals| {
        world.cpu(2, &|b| b.attention(&chunk(1), &a, q, k, v, out, lse, scratch)).result
    };
    assert_eq!(try_it(a, q, out, scratch), Ok(()));
    assert!(is_handle(&try_it(a, q, Reals::new(60, 24), scratch)));
    assert!(is_handle(&try_it(a, q, out, Reals::new(190, need))));
    assert!(matches!(try_it(a, q, out, Reals::new(300, need - 1)), Err(Error::Shape { .. })));
    assert!(matches!(try_it(a, Columns { at: 20, ..q }, out, scratch), Err(Error::Shape { .. })));
    assert!(matches!(
        try_it(Attention { keys: 2, ..a }, q, out, scratch),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(
        try_it(Attention { dropout: 1.0, ..a }, q, out, scratch),
        Err(Error::Setting { .. })
    ));
    assert!(matches!(
        try_it(Attention { key_lens: Ints::new(0, 2), ..a }, q, out, scratch),
        Err(Error::Shape { .. })
    ));
    let dq = Columns { of: Reals::new(400, 72), stride: 24, at: 0 };
    let (dout, dv) = (Reals::new(500, 24), Columns { at: 16, ..dq });
    for (dk_at, fits) in [(8, true), (4, false)] {
        let dk = Columns { at: dk_at, ..dq };
        let scratch = Reals::new(600, need);
        let r = world
            .cpu(2, &|b| {
                b.attention_vjp(&chunk(1), &a, q, k, v, out, lse, dout, dq, dk, dv, scratch)
            })
            .result;
        assert_eq!(r.is_ok(), fits, "{r:?}");
    }
}

#[test]
fn dropout() {
    for (samples, per) in [(1, 1), (3, 7), (2, 33), (2, 20_003)] {
        let mut world = World::new(5, 0, samples * per, 0);
        world.reals[0] = f32::INFINITY;
        for p in [0.0, 0.1, 0.9] {
            let x = Reals::new(0, samples * per);
            let _ = world
                .exact("dropout", &|b| b.dropout(&chunk(samples), Draw::EmbeddingDropout, p, x));
        }
    }
}

#[test]
fn embedding() {
    for (samples, length, width, vocab) in
        [(2, 3, 5, 7), (3, 100, 130, 50), (1, 1, 1, 1), (2, 0, 4, 5)]
    {
        let mut at = Bump(0);
        let (table, positions) = (at.take(vocab * width), at.take((length + 2) * width));
        let x = at.take(samples * length * width);
        let tokens = Ints::new(0, samples * length);
        let mut world = World::new(6, tokens.len(), at.0, 0);
        for t in &mut world.ints {
            *t = t.rem_euclid(vocab as i32);
        }
        let c = chunk(samples);
        let _ = world.exact("embed", &|b| b.embed(&c, tokens, table, positions, width, x));
        let _ = world.exact("embed_vjp", &|b| b.embed_vjp(&c, tokens, x, width, table, positions));
        let none = Reals::EMPTY;
        let _ = world.exact("embed alone", &|b| b.embed(&c, tokens, table, none, width, x));
        let _ = world.exact("embed_vjp alone", &|b| b.embed_vjp(&c, tokens, x, width, table, none));
        if let Some(t) = world.ints.last_mut() {
            *t = vocab as i32;
            world.ints[tokens.len() / 2] = -1;
            let after = world.exact("embed", &|b| b.embed(&c, tokens, table, positions, width, x));
            assert!(matches!(after.fault, Some(Fault::Token { .. })));
            let _ =
                world.exact("embed_vjp", &|b| b.embed_vjp(&c, tokens, x, width, table, positions));
        }
    }
}

#[test]
fn cross_entropy() {
    for (rows, vocab) in [(0, 5), (1, 1), (3, 5), (20, 1000), (300, 77)] {
        let (logits, losses) = (Reals::new(0, rows * vocab), Reals::new(rows * vocab, rows));
        let targets = Ints::new(0, rows);
        let mut world = World::new(7, rows, rows * (vocab + 1), 0);
        world.reals.iter_mut().for_each(|x| *x *= 5.0);
        for (i, t) in world.ints.iter_mut().enumerate() {
            *t = if i % 5 == 4 { -1 } else { t.rem_euclid(vocab as i32) };
        }
        let ce = CrossEntropy {
            vocab,
            tokens: 7,
            row: 3,
            scale: 0.01,
            smoothing: if rows == 300 { 0.2 } else { 0.0 },
        };
        let op: common::Op = &|b| b.cross_entropy(&chunk(2), &ce, logits, targets, losses);
        let after = world.close(&format!("cross_entropy {rows}×{vocab}"), TOLERANCE, op);
        assert_eq!(after.fault, None);
        if rows == 20 {
            let mut bad = world.clone();
            bad.ints[6] = 1000;
            assert_eq!(
                bad.close("token", TOLERANCE, op).fault,
                Some(Fault::Token { sample: 6, value: 1000, vocab })
            );
            let mut bad = world.clone();
            bad.reals[13 * vocab + 5] = f32::NAN;
            assert!(matches!(
                bad.close("loss", TOLERANCE, op).fault,
                Some(Fault::Loss { sample: 7, .. })
            ));
        }
    }
}

#[test]
fn optimizers() {
    let rules = [
        Rule::Sgd { momentum: 0.0 },
        Rule::Sgd { momentum: 0.9 },
        Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
        Rule::AdamW { beta1: 0.0, beta2: 0.0, eps: 0.0 },
        Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 1e-18 },
        Rule::ADAFACTOR,
    ];
    for shape in [[1, 0], [1, 1], [1, 2], [3, 3], [100, 1], [1, 50_001], [130, 300], [3, 20_001]] {
        let n = shape[0] * shape[1];
        for rule in rules {
            for zero in [false, true] {
                let mut at = Bump(0);
                let (p, g) = (at.take(n), at.take(n));
                let [m, v] = rule.state(shape[0], shape[1]).reals.map(|n| at.take(n));
                let out = at.take(1);
                let mut world = World::new(8, 0, at.0, 0);
                world.reals[v.range()].iter_mut().for_each(|v| *v = *v * *v);
                if rule == Rule::ADAFACTOR {
                    world.reals[m.range()].iter_mut().for_each(|m| *m = *m * *m);
                }
                if zero {
                    world.reals[g.range()].fill(0.0);
                    world.reals[m.range()].fill(0.0);
                    world.reals[v.range()].fill(0.0);
                }
                for t in [1, 7] {
                    let u = Update { rule, t, lr: 1e-2, decay: 0.1, scale: 0.5 };
                    let what = format!("{u:?}, {n} values");
                    // A denominator near 0 magnifies roundings of the moments.
                    let state = State::of(m, v);
                    let _ = world
                        .close(&what, 10.0 * TOLERANCE, &|b| b.update(&u, shape, p, g, &state));
                }
                let _ =
                    world.close("sum_squares", TOLERANCE, &|b| b.sum_squares(Site::Head, g, out));
            }
        }
    }
}

/// Nothing is summed here: the reference's bits.
#[test]
fn moments_in_8_bits() {
    let rule = Rule::ADAM_W_8BIT;
    for n in [4096, 4097, 4351, 50_001] {
        let mut at = Bump(0);
        let (p, g, sizes) = (at.take(n), at.take(n), rule.state(1, n));
        let reals = sizes.reals.map(|n| at.take(n));
        let words = sizes.codes[0];
        let state = State { reals, codes: [Words::new(0, words), Words::new(words, words)] };
        let mut world = World::new(8, 0, at.0, 2 * words);
        for most in reals {
            world.reals[most.range()].iter_mut().for_each(|x| *x = x.abs());
        }
        for (t, decay) in [(1, 0.0), (7, 0.1)] {
            let u = Update { rule, t, lr: 1e-2, decay, scale: 0.5 };
            let op: common::Op = &|b| b.update(&u, [1, n], p, g, &state);
            let _ = world.exact(&format!("{t}, {n} values"), op);
        }
    }
}

#[test]
fn bad_gradients_stop_updates() {
    let mut world = World::new(9, 0, 201, 0);
    world.reals[150] = f32::NEG_INFINITY;
    let (p, g, out) = (Reals::new(0, 100), Reals::new(100, 100), Reals::new(200, 1));
    let u = Update { rule: Rule::Sgd { momentum: 0.0 }, t: 1, lr: 0.1, decay: 0.0, scale: 1.0 };
    let after = world.exact("update", &|b| {
        b.sum_squares(Site::Block(4), g, out)?;
        b.update(&u, [1, 100], p, g, &State::EMPTY)
    });
    assert_eq!(after.fault, Some(Fault::Gradient { site: Site::Block(4) }));
    assert_eq!(after.world.reals[..100], world.reals[..100]);
}

#[test]
fn half_precision() {
    use half::{bf16, f16};
    let mut layout = bdia_core::Layout::new(4);
    let x = layout.reals(bdia_core::Category::Parameters, 2);
    let mut cpu = Cpu::new(&layout, 1).unwrap();
    cpu.write_f16(x, &[f16::from_f32(1.5), f16::MAX]).unwrap();
    assert_eq!(cpu.reals(x).unwrap(), [1.5, 65_504.0]);
    cpu.write_bf16(x, &[bf16::from_f32(-0.125), bf16::ONE]).unwrap();
    assert_eq!(cpu.reals(x).unwrap(), [-0.125, 1.0]);
    assert!(cpu.write_f16(x, &[f16::ONE]).is_err());
    assert!(Cpu::library_bytes(4) < 64 << 20);
}
