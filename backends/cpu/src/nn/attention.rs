//! Attention in tiles of queries: of a head, 64 rows of scores exist at a time, in the scratch of
//! one thread.
//!
//! # The idea
//! ```text
//! forward, for each sample, head and tile of 64 queries:      a piece of work, one thread
//!   K, V = those that the tile's queries see of their head    [keys, head_dim]
//!   S = Q[tile]·Kᵀ                                            [64, keys], in the thread's scratch
//!   for each row s of S:
//!     p = exp(scale·s − max), lse = max + ln Σp, p /= Σp      lse is kept, S and P are not
//!   O[tile] = P·V
//!
//! backward, for each sample and head of keys and values:      a piece of work, one thread
//!   dK = dV = 0
//!   for each head of queries that reads them, and each tile of 64 queries:
//!     S = Q[tile]·Kᵀ, dP = dO[tile]·Vᵀ                        two tiles of scores
//!     for each row: p = exp(scale·s − lse)                    neither maximum nor sum again
//!                   ds = scale·p∘(dp − δ)                     δ = dO·O of the row = Σ p∘dp
//!     dV += Pᵀ·dO[tile], dQ[tile] = dS·K, dK += dSᵀ·Q[tile]
//! ```
//!
//! The products are small ones ([`product`]): the thread packs both operands into its own memory.
//!
//! # What the code adds
//! 1. Masks. A tile multiplies only the keys from the first to the last one that a query of it sees
//!    ([`Keys::of_tile`]), so a causal tile ends at its last query, padding ends a sample's keys
//!    earlier, and a sliding window or a packed text begins them later. A row's weights outside
//!    what its query sees are 0. The one key that a query of [`Mask::Others`] does not see gets the
//!    score −∞. A query that sees nothing has output 0, gradient 0 and lse −∞.
//! 2. Dropout: `p` becomes `p∘f`, and `dp` becomes `f∘dp`, with `f` = 0 or 1/(1−rate), drawn again
//!    on the way back.
//! 3. The learned temperature τ: scale = e^τ, and dτ = Σ q·dq, since the scores are linear in e^τ.
//!
//! Backward, a piece is a whole head of keys and values with all heads of queries that read it, in
//! their order, so that no sum of `dK` or `dV` crosses threads: the bits are the same for any
//! number of them.

use core::ops::Range;

use bdia_core::backend::{Attention, Columns, Mask};
use bdia_core::{Chunk, Reals, Result};
use wide::f32x8;

use super::dropout::Dropout;
use super::matmul::{own_scratch, product};
use super::view::View;
use crate::memory::{Shared, get};
use crate::simd::{LANES, exp, fold_sum, fold_sum2, load_part, map, max_of};
use crate::{Cpu, actual_threads};

/// Queries of a tile.
const TILE: usize = 64;

/// From one row of scores to the next: whole cache lines. A tile's queries see no more keys than a
/// window for the first one, and one more for each of the others.
fn row_stride(a: &Attention) -> usize {
    let keys = match a.mask {
        Mask::Sliding(n) => a.keys.min(n.saturating_add(TILE - 1)),
        _ => a.keys,
    };
    keys.checked_next_multiple_of(16).unwrap_or(usize::MAX)
}

/// Scratch of one thread: two tiles of scores.
fn slot_len(a: &Attention) -> usize {
    row_stride(a).saturating_mul(2 * TILE.min(a.queries))
}

pub(super) fn scratch(a: &Attention, threads: usize) -> usize {
    slot_len(a).saturating_mul(actual_threads(threads))
}

/// A matrix of which heads are columns.
#[derive(Clone, Copy)]
struct Heads {
    /// First value in the arena.
    start: usize,
    stride: usize,
    rows: usize,
    head_dim: usize,
}

impl Heads {
    fn new(c: Columns, rows: usize, head_dim: usize) -> Self {
        Self { start: c.of.start() + c.at, stride: c.stride, rows, head_dim }
    }

    /// Place of a row of one head of one sample. (It wraps only where there is no row.)
    fn at(self, sample: usize, head: usize, row: usize) -> usize {
        self.start.wrapping_add((sample * self.rows + row) * self.stride + head * self.head_dim)
    }
}

/// Factor of the scores: `e^τ`, or `1/√head_dim`.
fn score_scale(cpu: &Cpu, a: &Attention) -> Result<f32> {
    Ok(match cpu.reals(a.temperature)?.first() {
        Some(&tau) => libm::expf(tau),
        None => (1.0 / libm::sqrt(a.head_dim.max(1) as f64)) as f32,
    })
}

/// Dropout element of a query's weight of `key`; wraps as the generator's counter does.
fn element(a: &Attention, head: usize, query: usize, key: usize) -> u32 {
    (head as u32)
        .wrapping_mul(a.queries as u32)
        .wrapping_add(query as u32)
        .wrapping_mul(a.keys as u32)
        .wrapping_add(key as u32)
}

/// The keys of a sample, and which of them its queries see.
struct Keys<'a> {
    a: &'a Attention,
    /// Those that are not padding.
    present: usize,
    /// First key that each query sees; empty where the sample is not packed.
    starts: &'a [i32],
}

impl<'a> Keys<'a> {
    fn new(a: &'a Attention, lens: &[i32], starts: &'a [i32], sample: usize) -> Self {
        let present =
            lens.get(sample).map_or(a.keys, |&n| usize::try_from(n).unwrap_or(0).min(a.keys));
        let own = sample * a.queries..(sample + 1) * a.queries;
        Self { a, present, starts: starts.get(own).unwrap_or(&[]) }
    }

    /// The keys among which are those that query `q` sees. None where it sees none.
    fn seen_by(&self, q: usize) -> Range<usize> {
        let start = self.starts.get(q).map_or(0, |&at| usize::try_from(at).unwrap_or(0));
        let (first, end) = self.a.visible(q, self.present, start);
        let nothing = end - first == 1 && self.a.hides(q, first);
        first..if nothing { first } else { end }
    }

    /// The place within the keys of [`seen_by`](Self::seen_by) of the one that query `q` does not
    /// see.
    fn hole(&self, q: usize, seen: &Range<usize>) -> Option<usize> {
        (seen.contains(&q) && self.a.hides(q, q)).then(|| q - seen.start)
    }

    /// The keys from the first to the last one that one of these queries sees.
    fn of_tile(&self, queries: Range<usize>) -> Range<usize> {
        let all = queries.map(|q| self.seen_by(q)).filter(|seen| !seen.is_empty());
        all.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
    }
}

pub(super) fn forward(
    cpu: &mut Cpu,
    chunk: &Chunk,
    a: &Attention,
    [q, k, v]: [Columns; 3],
    out: Reals,
    lse: Reals,
    scratch: Reals,
) -> Result<()> {
    let needed = self::scratch(a, cpu.team.threads);
    let scratch = scratch.sub(0, needed);
    cpu.arenas().attention(chunk, a, [q, k, v], out, lse, (scratch, needed))?;
    let (dropout, scale) = (Dropout::new(a.dropout), score_scale(cpu, a)?);
    let width = a.heads * a.head_dim;
    if chunk.samples * a.queries == 0 || a.heads == 0 {
        return Ok(());
    }
    let hd = a.head_dim;
    let (q, k, v) =
        (Heads::new(q, a.queries, hd), Heads::new(k, a.keys, hd), Heads::new(v, a.keys, hd));
    let (stride, slot_len) = (row_stride(a), slot_len(a));
    let tiles = a.queries.div_ceil(TILE);
    cpu.make_packing()?;
    let lens = get(&cpu.ints, a.key_lens, "attention: key_lens")?;
    let starts = get(&cpu.ints, a.starts, "attention: starts")?;
    let (reals, packing, products) =
        (Shared::new(&mut cpu.reals), Shared::new(&mut cpu.packing), cpu.products);
    cpu.team.each(chunk.samples * a.heads * tiles, |slot, piece| {
        let (i, head, row) =
            (piece / tiles / a.heads, piece / tiles % a.heads, piece % tiles * TILE);
        let rows = TILE.min(a.queries - row);
        let (all, kv) = (Keys::new(a, lens, starts, i), a.kv_head(head));
        // No query of the tile sees another key.
        let tile_keys = all.of_tile(row..row + rows);
        let (first, keys) = (tile_keys.start, tile_keys.len());
        let view = |at: usize, row, col| View {
            start: reals.pointer().wrapping_add(at).cast_const(),
            row,
            col,
        };
        // SAFETY: the slot is this thread's while the piece runs; `lse` is cut by piece.
        let (scores, lse, memory) = unsafe {
            let at = lse.start() + (i * a.heads + head) * a.queries + row;
            let scores = reals.part(scratch.start() + slot * slot_len, slot_len);
            (scores, reals.part(at, rows), own_scratch(&packing, slot))
        };
        let tile = scores.as_mut_ptr();
        // S = Q·Kᵀ
        // SAFETY: the operands were checked, and the tile is this thread's.
        unsafe {
            product(
                products,
                [rows, keys, hd],
                view(q.at(i, head, row), q.stride, 1),
                view(k.at(i, kv, first), 1, k.stride),
                tile,
                stride,
                false,
                memory,
            );
        }
        let stream = chunk.stream(i, a.draw);
        for r in 0..rows {
            let seen = all.seen_by(row + r);
            // SAFETY: `scores` is borrowed again, after the product is done with it.
            let line = unsafe { core::slice::from_raw_parts_mut(tile.add(r * stride), keys) };
            let weights = only(line, &seen, first);
            if weights.is_empty() {
                lse[r] = f32::NEG_INFINITY;
                continue;
            }
            if let Some(hole) = all.hole(row + r, &seen) {
                weights[hole] = f32::NEG_INFINITY;
            }
            // p = exp(s − max)/sum, lse = max + ln(sum)
            let max = max_of(weights) * scale;
            map(weights, |s| exp(s.mul_add(f32x8::splat(scale), f32x8::splat(-max))));
            let sum = fold_sum(weights, |p| p);
            lse[r] = max + libm::logf(sum);
            let inverse = f32x8::splat(1.0 / sum);
            map(weights, |p| p * inverse);
            if !dropout.is_none() {
                let from = element(a, head, row + r, seen.start);
                dropout.each(&stream, from, seen.len(), |at, factors| {
                    weights[at..at + factors.len()]
                        .iter_mut()
                        .zip(factors)
                        .for_each(|(p, f)| *p *= f);
                });
            }
        }
        // O = P·V
        let o =
            reals.pointer().wrapping_add(out.start() + (i * a.queries + row) * width + head * hd);
        // SAFETY: as above; these rows and columns of `out` belong to this piece.
        unsafe {
            product(
                products,
                [rows, hd, keys],
                View { start: tile, row: stride, col: 1 },
                view(v.at(i, kv, first), v.stride, 1),
                o,
                width,
                false,
                memory,
            );
        }
    });
    Ok(())
}

pub(super) fn backward(
    cpu: &mut Cpu,
    chunk: &Chunk,
    a: &Attention,
    [q, k, v]: [Columns; 3],
    out: Reals,
    lse: Reals,
    dout: Reals,
    [dq, dk, dv]: [Columns; 3],
    scratch: Reals,
) -> Result<()> {
    let needed = self::scratch(a, cpu.team.threads);
    let scratch = scratch.sub(0, needed);
    cpu.arenas().attention_vjp(
        chunk,
        a,
        [q, k, v],
        [out, lse, dout],
        [dq, dk, dv],
        (scratch, needed),
    )?;
    let (dropout, scale) = (Dropout::new(a.dropout), score_scale(cpu, a)?);
    let width = a.heads * a.head_dim;
    if width == 0 || chunk.samples * (a.queries + a.keys) == 0 {
        return Ok(());
    }
    let hd = a.head_dim;
    let (q, dq) = (Heads::new(q, a.queries, hd), Heads::new(dq, a.queries, hd));
    let (k, dk) = (Heads::new(k, a.keys, hd), Heads::new(dk, a.keys, hd));
    let (v, dv) = (Heads::new(v, a.keys, hd), Heads::new(dv, a.keys, hd));
    let (stride, slot_len) = (row_stride(a), slot_len(a));
    cpu.make_packing()?;
    let lens = get(&cpu.ints, a.key_lens, "attention: key_lens")?;
    let starts = get(&cpu.ints, a.starts, "attention: starts")?;
    let (reals, packing, products) =
        (Shared::new(&mut cpu.reals), Shared::new(&mut cpu.packing), cpu.products);
    // One piece is a whole head of keys and values, so that no sum of dk and dv crosses pieces.
    let group = a.heads / a.kv_heads;
    cpu.team.each(chunk.samples * a.kv_heads, |slot, piece| {
        let (i, kv) = (piece / a.kv_heads, piece % a.kv_heads);
        let heads = kv * group..(kv + 1) * group;
        let all = Keys::new(a, lens, starts, i);
        let stream = chunk.stream(i, a.draw);
        // SAFETY: the slot is this thread's while the piece runs.
        let memory = unsafe { own_scratch(&packing, slot) };
        let pointer = |at: usize| reals.pointer().wrapping_add(at);
        let view = |at: usize, row, col| View { start: pointer(at).cast_const(), row, col };
        for key in 0..a.keys {
            for d in [dk, dv] {
                // SAFETY: these columns belong to this piece.
                unsafe { reals.part(d.at(i, kv, key), hd) }.fill(0.0);
            }
        }
        let tiles = (0..a.queries).step_by(TILE);
        for (head, row) in heads.flat_map(|head| tiles.clone().map(move |row| (head, row))) {
            let rows = TILE.min(a.queries - row);
            let tile_keys = all.of_tile(row..row + rows);
            let (first, keys) = (tile_keys.start, tile_keys.len());
            let o_at = (i * a.queries + row) * width + head * hd;
            let d_out = view(dout.start() + o_at, width, 1);
            let p_tile = pointer(scratch.start() + slot * slot_len);
            let ds_tile = p_tile.wrapping_add(stride * rows);
            // S = Q·Kᵀ, dP = dO·Vᵀ
            // SAFETY: the operands were checked, and the slot is this thread's while the piece
            // runs.
            unsafe {
                product(
                    products,
                    [rows, keys, hd],
                    view(q.at(i, head, row), q.stride, 1),
                    view(k.at(i, kv, first), 1, k.stride),
                    p_tile,
                    stride,
                    false,
                    memory,
                );
                product(
                    products,
                    [rows, keys, hd],
                    d_out,
                    view(v.at(i, kv, first), 1, v.stride),
                    ds_tile,
                    stride,
                    false,
                    memory,
                );
            }
            for r in 0..rows {
                // SAFETY: lines of the slot, and inputs that nothing writes.
                let (p, ds, o, d, lse) = unsafe {
                    let from =
                        |at: usize| core::slice::from_raw_parts(pointer(at).cast_const(), hd);
                    let at = o_at + r * width;
                    (
                        core::slice::from_raw_parts_mut(p_tile.add(r * stride), keys),
                        core::slice::from_raw_parts_mut(ds_tile.add(r * stride), keys),
                        from(out.start() + at),
                        from(dout.start() + at),
                        *pointer(lse.start() + (i * a.heads + head) * a.queries + row + r),
                    )
                };
                let seen = all.seen_by(row + r);
                let (p, ds) = (only(p, &seen, first), only(ds, &seen, first));
                // dS = P∘(D∘dP − Σ P∘D∘dP), and that sum is dO·O
                let delta = fold_sum2(o, d, |a, b| a * b);
                if dropout.is_none() {
                    weights(p, ds, None, scale, lse, delta);
                } else {
                    let from = element(a, head, row + r, seen.start);
                    dropout.each(&stream, from, seen.len(), |at, factors| {
                        let part = at..at + factors.len();
                        weights(
                            &mut p[part.clone()],
                            &mut ds[part],
                            Some(factors),
                            scale,
                            lse,
                            delta,
                        );
                    });
                }
                if let Some(hole) = all.hole(row + r, &seen) {
                    (p[hole], ds[hole]) = (0.0, 0.0);
                }
            }
            // dV += (P∘D)ᵀ·dO, dQ = dS·K, dK += dSᵀ·Q
            // SAFETY: as above; these columns of the outputs belong to this piece.
            unsafe {
                product(
                    products,
                    [keys, hd, rows],
                    View { start: p_tile, row: 1, col: stride },
                    d_out,
                    pointer(dv.at(i, kv, first)),
                    dv.stride,
                    true,
                    memory,
                );
                product(
                    products,
                    [rows, hd, keys],
                    View { start: ds_tile, row: stride, col: 1 },
                    view(k.at(i, kv, first), k.stride, 1),
                    pointer(dq.at(i, head, row)),
                    dq.stride,
                    false,
                    memory,
                );
                product(
                    products,
                    [keys, hd, rows],
                    View { start: ds_tile, row: 1, col: stride },
                    view(q.at(i, head, row), q.stride, 1),
                    pointer(dk.at(i, kv, first)),
                    dk.stride,
                    true,
                    memory,
                );
            }
        }
    });
    for at in a.temperature_grad.range() {
        // s_k = e^τ·(q·k_k): dτ = Σ ds_k·s_k = Σ q·(Σ_k e^τ·ds_k·k_k) = Σ q·dq, in the order of the
        // rows.
        let mut sum = 0.0;
        for i in 0..chunk.samples {
            for row in 0..a.queries {
                let [x, dx] = [q, dq].map(|m| &cpu.reals[m.at(i, 0, row)..][..width]);
                sum += f64::from(fold_sum2(x, dx, |x, dx| x * dx));
            }
        }
        cpu.reals[at] += sum as f32;
    }
    Ok(())
}

/// The part of a tile's row, whose first key is `first`, with the keys that a query sees. The rest
/// becomes 0.
fn only<'a>(line: &'a mut [f32], seen: &Range<usize>, first: usize) -> &'a mut [f32] {
    // The keys of a query that sees nothing are none, anywhere.
    let from = seen.start.saturating_sub(first).min(line.len());
    let (before, rest) = line.split_at_mut(from);
    let (own, beyond) = rest.split_at_mut(seen.len());
    before.fill(0.0);
    beyond.fill(0.0);
    own
}

/// In: scores `p` and gradients `ds` of the dropped weights. Out: the dropped weights, and the
/// gradients of the scaled products `q·k`.
#[inline]
fn weights(
    p: &mut [f32],
    ds: &mut [f32],
    factors: Option<&[f32]>,
    scale: f32,
    lse: f32,
    delta: f32,
) {
    let one = f32x8::ONE;
    let step = |s: f32x8, d: f32x8, f: f32x8| {
        let p = exp(s.mul_add(f32x8::splat(scale), f32x8::splat(-lse)));
        (p * f, p * (d * f - f32x8::splat(delta)) * f32x8::splat(scale))
    };
    let ((ps, p_tail), (dss, ds_tail)) = (p.as_chunks_mut::<LANES>(), ds.as_chunks_mut::<LANES>());
    let (fs, f_tail) = factors.unwrap_or(&[]).as_chunks::<LANES>();
    for (n, (p, d)) in ps.iter_mut().zip(dss).enumerate() {
        let (np, nd) =
            step(f32x8::new(*p), f32x8::new(*d), fs.get(n).map_or(one, |f| f32x8::new(*f)));
        (*p, *d) = (np.to_array(), nd.to_array());
    }
    let n = p_tail.len();
    if n > 0 {
        let f = if factors.is_some() { load_part(f_tail, 0.0) } else { one };
        let (np, nd) = step(load_part(p_tail, 0.0), load_part(ds_tail, 0.0), f);
        p_tail.copy_from_slice(&np.to_array()[..n]);
        ds_tail.copy_from_slice(&nd.to_array()[..n]);
    }
}
