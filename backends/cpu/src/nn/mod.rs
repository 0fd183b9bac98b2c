//! [`NnOps`]: the operations of transformer layers.

mod attention;
mod dropout;
mod gate;
mod gelu;
pub(crate) mod matmul;
mod packed;
mod view;

use bdia_core::backend::{Attention, Columns, CrossEntropy, Gate, Gelu, Product, RmsNorm, Rotary};
use bdia_core::rng::Draw;
use bdia_core::{Chunk, Fault, Ints, NnOps, Packed, Reals, Result};
use wide::f32x8;

use self::dropout::Dropout;
use self::view::View;
use crate::memory::{Arena, Reserved, Shared, get, packed_bytes, split};
use crate::simd::{exp, fold_sum, fold_sum2, map, map_both, map2, map3, max_of};
use crate::update::Pieces;
use crate::{BLOCK, Cpu, Products, Team};

/// Columns that one piece of a sum over rows takes: four cache lines.
const COLUMNS: usize = 64;
/// Rows that are summed before their sum is added to the total: rounding grows with the root of
/// each.
const ROWS: usize = 64;

/// Rows of one piece of row-wise work.
fn rows_per_piece(width: usize) -> usize {
    (BLOCK / 2 / width.max(1)).max(1)
}

/// `f(x, y)` over blocks of two tensors of the same length.
fn blocks2(team: &Team, x: &mut [f32], y: &[f32], f: impl Fn(&mut [f32], &[f32]) + Sync) {
    let x = Shared::new(x);
    team.each(y.len().div_ceil(BLOCK), |_, b| {
        let y = &y[b * BLOCK..y.len().min((b + 1) * BLOCK)];
        // SAFETY: blocks are disjoint.
        f(unsafe { x.part(b * BLOCK, y.len()) }, y);
    });
}

/// The first of some rows, `each` at a time, for which `f` is false.
fn first_refused(
    team: &Team,
    rows: usize,
    each: usize,
    f: impl Fn(usize) -> bool + Sync,
) -> Option<usize> {
    let first = team.reduce(
        rows.div_ceil(each),
        usize::MAX,
        |piece| {
            let mut bad = usize::MAX;
            for row in piece * each..rows.min((piece + 1) * each) {
                if !f(row) {
                    bad = bad.min(row);
                }
            }
            bad
        },
        usize::min,
    );
    (first != usize::MAX).then_some(first)
}

/// `totals[n][c] += Σ_r f(r, values of row r from column `from` on)[n][c]`, `COLUMNS` columns at a
/// time, the rows in order. `f` adds a row to the partial sums.
fn column_sums<const N: usize>(
    team: &Team,
    rows: usize,
    totals: [&mut [f32]; N],
    f: impl Fn(usize, usize, &mut [[f32; COLUMNS]; N], usize) + Sync,
) {
    let cols = totals[0].len();
    let totals = totals.map(Shared::new);
    team.each(cols.div_ceil(COLUMNS), |_, b| {
        let from = b * COLUMNS;
        let n = COLUMNS.min(cols - from);
        for start in (0..rows).step_by(ROWS) {
            let mut part = [[0.0; COLUMNS]; N];
            for r in start..rows.min(start + ROWS) {
                f(r, from, &mut part, n);
            }
            for (total, part) in totals.iter().zip(&part) {
                // SAFETY: columns are disjoint.
                let total = unsafe { total.part(from, n) };
                total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
            }
        }
    });
}

impl Cpu {
    /// The memory for packed operands, when the first product comes. `gemm` ends the program when
    /// it gets no memory, so whether there is some is asked before, with room for what allocators
    /// add to it.
    fn make_packing(&mut self) -> Result<()> {
        if self.packing.is_empty() {
            let packing = Arena::new(matmul::scratch(self.team.threads))?;
            if self.products == Products::Gemm {
                const MORE: usize = 256 << 10;
                drop(Reserved::new(self.team.threads * (matmul::thread_bytes() + MORE))?);
            }
            self.packing = packing;
        }
        Ok(())
    }
}

impl NnOps for Cpu {
    fn matmul(
        &mut self,
        p: &Product,
        a: Reals,
        b: Reals,
        bias: Option<Reals>,
        c: Reals,
    ) -> Result<()> {
        self.arenas().matmul(p, a, b, bias, c)?;
        self.make_packing()?;
        let [a, b, offset, c] =
            split(&mut self.reals, [a, b, bias.unwrap_or(Reals::EMPTY), c], "matmul")?;
        if c.is_empty() {
            return Ok(());
        }
        let offset: Option<&[f32]> = bias.map(|_| &*offset);
        let (a, b) = (View::dense(a, p.a, p.rows, p.inner), View::dense(b, p.b, p.inner, p.cols));
        let shape = [p.rows, p.cols, p.inner];
        matmul::matmul(
            &self.team,
            self.products,
            shape,
            a,
            b,
            offset,
            c,
            p.accumulate,
            &mut self.packing,
        );
        Ok(())
    }

    fn sum_rows(&mut self, x: Reals, sum: Reals) -> Result<()> {
        let cols = sum.len();
        let rows = self.arenas().sum_rows(x, sum)?;
        let [x, sum] = split(&mut self.reals, [x, sum], "sum_rows")?;
        let x = &*x;
        column_sums(&self.team, rows, [sum], |r, from, [part], n| {
            let row = &x[r * cols + from..][..n];
            match row.first_chunk::<COLUMNS>() {
                Some(row) => part.iter_mut().zip(row).for_each(|(p, x)| *p += x),
                None => part.iter_mut().zip(row).for_each(|(p, x)| *p += x),
            }
        });
        Ok(())
    }

    fn add(&mut self, x: Reals, y: Reals) -> Result<()> {
        self.arenas().pair("add", x, y)?;
        let [x, y] = split(&mut self.reals, [x, y], "add")?;
        blocks2(&self.team, x, y, |x, y| map2(x, y, |x, y| x + y));
        Ok(())
    }

    fn unpack(&mut self, x: &Packed, first: usize, y: Reals) -> Result<()> {
        let rows = self.arenas().unpack(x, first, y)?;
        let row_bytes = x.packing.row_bytes(x.cols)?;
        let bytes = packed_bytes(&self.words, &self.mapped, x.words)?;
        let [y] = split(&mut self.reals, [y], "unpack")?;
        let (y, each) = (Shared::new(y), rows_per_piece(x.cols));
        self.team.each(rows.div_ceil(each), |_, piece| {
            for row in piece * each..rows.min((piece + 1) * each) {
                let blocks = &bytes[x.stored(first + row) * row_bytes..][..row_bytes];
                // SAFETY: rows are disjoint.
                x.packing.unpack(blocks, unsafe { y.part(row * x.cols, x.cols) });
            }
        });
        Ok(())
    }

    fn unpack_rows(&mut self, chunk: &Chunk, x: &Packed, rows: Ints, y: Reals) -> Result<()> {
        let length = self.arenas().unpack_rows(chunk, x, rows, y)?;
        let row_bytes = x.packing.row_bytes(x.cols)?;
        let rows = get(&self.ints, rows, "unpack_rows")?;
        let bytes = packed_bytes(&self.words, &self.mapped, x.words)?;
        let [y] = split(&mut self.reals, [y], "unpack_rows")?;
        let (y, each) = (Shared::new(y), rows_per_piece(x.cols));
        let bad = first_refused(&self.team, rows.len(), each, |i| {
            // SAFETY: rows are disjoint.
            let y = unsafe { y.part(i * x.cols, x.cols) };
            let row = known(rows[i], x.rows);
            match row {
                Some(row) => {
                    let blocks = &bytes[x.stored(row) * row_bytes..][..row_bytes];
                    x.packing.unpack(blocks, y);
                }
                None => y.fill(0.0),
            }
            row.is_some()
        });
        if let Some(bad) = bad {
            let sample = chunk.first.wrapping_add(bad / length);
            let value = rows[bad];
            self.fault.get_or_insert(Fault::Token { sample, value, vocab: x.rows });
        }
        Ok(())
    }

    fn add_columns(&mut self, width: usize, scale: f64, from: Columns, to: Columns) -> Result<()> {
        let rows = self.arenas().add_columns(width, from, to)?;
        let [x, y] = split(&mut self.reals, [from.of, to.of], "add_columns")?;
        let (x, y, factor, each) =
            (&*x, Shared::new(y), f32x8::splat(scale as f32), rows_per_piece(width));
        self.team.each(rows.div_ceil(each), |_, piece| {
            for r in piece * each..rows.min((piece + 1) * each) {
                // SAFETY: rows are disjoint.
                let y = unsafe { y.part(r * to.stride + to.at, width) };
                map2(y, &x[r * from.stride + from.at..][..width], |y, x| x.mul_add(factor, y));
            }
        });
        Ok(())
    }

    fn layer_norm(
        &mut self,
        eps: f64,
        weight: Reals,
        bias: Reals,
        x: Reals,
        y: Reals,
        stats: Reals,
    ) -> Result<()> {
        let width = weight.len();
        let rows = self.arenas().layer_norm(weight, bias, x, y, stats)?;
        let [weight, bias, x, y, stats] =
            split(&mut self.reals, [weight, bias, x, y, stats], "layer_norm")?;
        let (weight, bias, x) = (&*weight, &*bias, &*x);
        let (y, stats, each) = (Shared::new(y), Shared::new(stats), rows_per_piece(width));
        self.team.each(rows.div_ceil(each), |_, piece| {
            for r in piece * each..rows.min((piece + 1) * each) {
                let x = &x[r * width..(r + 1) * width];
                // SAFETY: rows are disjoint.
                let (y, stats) = unsafe { (y.part(r * width, width), stats.part(2 * r, 2)) };
                let mean = fold_sum(x, |x| x) / width as f32;
                let m = f32x8::splat(mean);
                let squares = fold_sum(x, |x| (x - m) * (x - m));
                let rstd = (1.0 / libm::sqrt(f64::from(squares) / width as f64 + eps)) as f32;
                (stats[0], stats[1]) = (mean, rstd);
                // y = (x − mean)·rstd·weight + bias
                let s = f32x8::splat(rstd);
                map2(y, x, |_, x| (x - m) * s);
                map3(y, weight, bias, |y, w, b| y.mul_add(w, b));
            }
        });
        Ok(())
    }

    fn layer_norm_vjp(
        &mut self,
        weight: Reals,
        x: Reals,
        stats: Reals,
        dy: Reals,
        dx: Reals,
        dweight: Reals,
        dbias: Reals,
    ) -> Result<()> {
        let width = weight.len();
        let rows = self.arenas().layer_norm_vjp(weight, x, stats, dy, dx, dweight, dbias)?;
        let [weight, x, stats, dy, dx, dweight, dbias] =
            split(&mut self.reals, [weight, x, stats, dy, dx, dweight, dbias], "layer_norm_vjp")?;
        let (weight, x, stats, dy) = (&*weight, &*x, &*stats, &*dy);
        let (dx, each) = (Shared::new(dx), rows_per_piece(width));
        self.team.each(rows.div_ceil(each), |_, piece| {
            for r in piece * each..rows.min((piece + 1) * each) {
                let row = r * width..(r + 1) * width;
                let (x, dy) = (&x[row.clone()], &dy[row]);
                let (mean, rstd) = (f32x8::splat(stats[2 * r]), f32x8::splat(stats[2 * r + 1]));
                // SAFETY: rows are disjoint.
                let dx = unsafe { dx.part(r * width, width) };
                vjp_row(weight, x, dy, dx, mean, rstd);
            }
        });
        // dweight += Σ dy·x̂, dbias += Σ dy, with x̂ = (x − mean)·rstd
        column_sums(&self.team, rows, [dweight, dbias], |r, from, [w, b], n| {
            let at = r * width + from;
            let (x, dy, mean, rstd) =
                (&x[at..at + n], &dy[at..at + n], stats[2 * r], stats[2 * r + 1]);
            let (w, b) = (&mut w[..n], &mut b[..n]);
            for c in 0..n {
                w[c] += dy[c] * ((x[c] - mean) * rstd);
                b[c] += dy[c];
            }
        });
        Ok(())
    }

    fn rms_norm(
        &mut self,
        norm: &RmsNorm,
        weight: Reals,
        x: Columns,
        y: Columns,
        stats: Reals,
    ) -> Result<()> {
        let rows = self.arenas().rms_norm(norm, weight, x, y, stats)?;
        let &RmsNorm { groups, width, eps, offset } = norm;
        let [weight, xs, ys, stats] =
            split(&mut self.reals, [weight, x.of, y.of, stats], "rms_norm")?;
        let (weight, xs, ys, stats) = (&*weight, &*xs, Shared::new(ys), Shared::new(stats));
        let (each, offset) = (rows_per_piece(groups * width), f32x8::splat(offset as f32));
        self.team.each(rows.div_ceil(each), |_, piece| {
            for r in piece * each..rows.min((piece + 1) * each) {
                for g in 0..groups {
                    let x = &xs[r * x.stride + x.at + g * width..][..width];
                    // SAFETY: rows, and groups in them, are disjoint.
                    let (y, rstd) = unsafe {
                        let y = ys.part(r * y.stride + y.at + g * width, width);
                        (y, &mut stats.part(r * groups + g, 1)[0])
                    };
                    let squares = fold_sum(x, |x| x * x);
                    *rstd = (1.0 / libm::sqrt(f64::from(squares) / width as f64 + eps)) as f32;
                    // y = x·rstd·(offset + weight)
                    let s = f32x8::splat(*rstd);
                    map3(y, x, weight, |_, x, w| x * s * (offset + w));
                }
            }
        });
        Ok(())
    }

    fn rms_norm_vjp(
        &mut self,
        norm: &RmsNorm,
        weight: Reals,
        x: Columns,
        stats: Reals,
        dy: Columns,
        dx: Columns,
        dweight: Reals,
    ) -> Result<()> {
        let rows = self.arenas().rms_norm_vjp(norm, weight, [x, dy, dx], stats, dweight)?;
        let &RmsNorm { groups, width, .. } = norm;
        let [weight, xs, stats, dys, dxs, dweight] =
            split(&mut self.reals, [weight, x.of, stats, dy.of, dx.of, dweight], "rms_norm_vjp")?;
        let (weight, xs, stats, dys) = (&*weight, &*xs, &*stats, &*dys);
        let (dxs, each) = (Shared::new(dxs), rows_per_piece(groups * width));
        let (offset, places) = (f32x8::splat(norm.offset as f32), [x, dy, dx]);
        // Where a group of a row begins.
        let at = |r: usize, g: usize| places.map(|c| r * c.stride + c.at + g * width);
        self.team.each(rows.div_ceil(each), |_, piece| {
            for r in piece * each..rows.min((piece + 1) * each) {
                for g in 0..groups {
                    let [x, dy, dx] = at(r, g);
                    let rstd = f32x8::splat(stats[r * groups + g]);
                    // SAFETY: rows, and groups in them, are disjoint.
                    let dx = unsafe { dxs.part(dx, width) };
                    rms_vjp_row(weight, offset, &xs[x..][..width], &dys[dy..][..width], dx, rstd);
                }
            }
        });
        // dweight += Σ dy·x̂ with x̂ = x·rstd, the groups of a row one after the other.
        column_sums(&self.team, rows * groups, [dweight], |part, from, [w], n| {
            let [x, dy, _] = at(part / groups, part % groups);
            let (x, dy, rstd) = (&xs[x + from..][..n], &dys[dy + from..][..n], stats[part]);
            let w = &mut w[..n];
            for c in 0..n {
                w[c] += dy[c] * (x[c] * rstd);
            }
        });
        Ok(())
    }

    fn rotate(
        &mut self,
        chunk: &Chunk,
        rotary: &Rotary,
        table: Reals,
        positions: Ints,
        x: Columns,
    ) -> Result<()> {
        let most = self.arenas().rotate(chunk, rotary, table, positions, x)?;
        let &Rotary { heads, head_dim, tokens, back } = rotary;
        let positions = get(&self.ints, positions, "rotate: positions")?;
        let [table, xs] = split(&mut self.reals, [table, x.of], "rotate")?;
        let (table, xs, rows) = (&*table, Shared::new(xs), chunk.samples * tokens);
        let (each, side) =
            (rows_per_piece(heads * head_dim), f32x8::splat(if back { -1.0 } else { 1.0 }));
        // A place beyond the numbers of a position is beyond every table.
        let position = |row: usize| match positions.get(row) {
            Some(&own) => own,
            None => i32::try_from(row % tokens).unwrap_or(i32::MAX),
        };
        let bad = first_refused(&self.team, rows, each, |row| {
            let Some(p) = known(position(row), most) else { return false };
            let (cos, sin) = table[p * head_dim..][..head_dim].split_at(head_dim / 2);
            for head in 0..heads {
                // SAFETY: rows, and heads in them, are disjoint.
                let head = unsafe { xs.part(row * x.stride + x.at + head * head_dim, head_dim) };
                let (a, b) = head.split_at_mut(head_dim / 2);
                // (a, b) ← (a·cos − b·sin, b·cos + a·sin)
                map_both([a, b], [cos, sin], |[a, b, cos, sin]| {
                    let sin = sin * side;
                    [a.mul_add(cos, -(b * sin)), b.mul_add(cos, a * sin)]
                });
            }
            true
        });
        if let Some(bad) = bad {
            let sample = chunk.first.wrapping_add(bad / tokens);
            let (value, positions) = (position(bad), most);
            self.fault.get_or_insert(Fault::Position { sample, value, positions });
        }
        Ok(())
    }

    fn gated(&mut self, act: Gate, gate: Reals, up: Reals, y: Reals) -> Result<()> {
        self.arenas().gated("gated", [gate, up, y])?;
        let [gate, up, y] = split(&mut self.reals, [gate, up, y], "gated")?;
        gate::product(&self.team, act, gate, up, y);
        Ok(())
    }

    fn gated_vjp(
        &mut self,
        act: Gate,
        gate: Reals,
        up: Reals,
        d: Reals,
        dgate: Reals,
    ) -> Result<()> {
        self.arenas().gated("gated_vjp", [gate, up, d, dgate])?;
        let [gate, up, d, dgate] = split(&mut self.reals, [gate, up, d, dgate], "gated_vjp")?;
        gate::gradients(&self.team, act, gate, up, d, dgate);
        Ok(())
    }

    fn gelu(&mut self, kind: Gelu, x: Reals, y: Reals) -> Result<()> {
        self.arenas().pair("gelu", x, y)?;
        let [x, y] = split(&mut self.reals, [x, y], "gelu")?;
        match kind {
            Gelu::Tanh => {
                blocks2(&self.team, y, x, |y, x| map2(y, x, |_, x| gelu::value(Gelu::Tanh, x)))
            }
            Gelu::Exact => {
                blocks2(&self.team, y, x, |y, x| map2(y, x, |_, x| gelu::value(Gelu::Exact, x)))
            }
        }
        Ok(())
    }

    fn gelu_vjp(&mut self, kind: Gelu, x: Reals, d: Reals) -> Result<()> {
        self.arenas().pair("gelu_vjp", x, d)?;
        let [x, d] = split(&mut self.reals, [x, d], "gelu_vjp")?;
        match kind {
            Gelu::Tanh => blocks2(&self.team, d, x, |d, x| {
                map2(d, x, |d, x| d * gelu::derivative(Gelu::Tanh, x))
            }),
            Gelu::Exact => blocks2(&self.team, d, x, |d, x| {
                map2(d, x, |d, x| d * gelu::derivative(Gelu::Exact, x))
            }),
        }
        Ok(())
    }

    fn attention(
        &mut self,
        chunk: &Chunk,
        a: &Attention,
        q: Columns,
        k: Columns,
        v: Columns,
        out: Reals,
        lse: Reals,
        scratch: Reals,
    ) -> Result<()> {
        attention::forward(self, chunk, a, [q, k, v], out, lse, scratch)
    }

    fn attention_vjp(
        &mut self,
        chunk: &Chunk,
        a: &Attention,
        q: Columns,
        k: Columns,
        v: Columns,
        out: Reals,
        lse: Reals,
        dout: Reals,
        dq: Columns,
        dk: Columns,
        dv: Columns,
        scratch: Reals,
    ) -> Result<()> {
        attention::backward(self, chunk, a, [q, k, v], out, lse, dout, [dq, dk, dv], scratch)
    }

    /// Two tiles of 64 rows of scores for each thread.
    fn attention_scratch(a: &Attention, _samples: usize, threads: usize) -> usize {
        attention::scratch(a, threads)
    }

    fn dropout(&mut self, chunk: &Chunk, draw: Draw, p: f64, x: Reals) -> Result<()> {
        let (pieces, dropout) =
            (Pieces::new(chunk, self.arenas().dropout(chunk, p, x)?), Dropout::new(p));
        let [x] = split(&mut self.reals, [x], "dropout")?;
        if dropout.is_none() {
            return Ok(());
        }
        let x = Shared::new(x);
        self.team.each(pieces.count(), |_, piece| {
            let (sample, start, len) = pieces.locate(piece);
            // SAFETY: pieces are disjoint.
            let x = unsafe { x.part(sample * pieces.per + start, len) };
            dropout.each(&chunk.stream(sample, draw), start as u32, len, |at, factors| {
                for (x, &f) in x[at..at + factors.len()].iter_mut().zip(factors) {
                    // Not only a product: a dropped infinity is 0 too.
                    *x = if f == 0.0 { 0.0 } else { *x * f };
                }
            });
        });
        Ok(())
    }

    fn embed(
        &mut self,
        chunk: &Chunk,
        tokens: Ints,
        table: Reals,
        positions: Reals,
        width: usize,
        x: Reals,
    ) -> Result<()> {
        let (length, vocab) =
            self.arenas().embed("embed", chunk, tokens, [x, table, positions], width)?;
        let tokens = get(&self.ints, tokens, "embed: tokens")?;
        let [table, positions, x] = split(&mut self.reals, [table, positions, x], "embed")?;
        if width == 0 {
            return Ok(());
        }
        let (table, positions, x, each) =
            (&*table, &*positions, Shared::new(x), rows_per_piece(width));
        let bad = first_refused(&self.team, tokens.len(), each, |row| {
            // SAFETY: rows are disjoint.
            let x = unsafe { x.part(row * width, width) };
            if positions.is_empty() {
                x.fill(0.0);
            } else {
                x.copy_from_slice(&positions[row % length * width..][..width]);
            }
            let token = known(tokens[row], vocab);
            if let Some(token) = token {
                map2(x, &table[token * width..][..width], |x, y| x + y);
            }
            token.is_some()
        });
        if let Some(bad) = bad {
            let sample = chunk.first.wrapping_add(bad / length);
            self.fault.get_or_insert(Fault::Token { sample, value: tokens[bad], vocab });
        }
        Ok(())
    }

    fn embed_vjp(
        &mut self,
        chunk: &Chunk,
        tokens: Ints,
        dx: Reals,
        width: usize,
        dtable: Reals,
        dpositions: Reals,
    ) -> Result<()> {
        let (length, vocab) =
            self.arenas().embed("embed_vjp", chunk, tokens, [dx, dtable, dpositions], width)?;
        let tokens = get(&self.ints, tokens, "embed_vjp: tokens")?;
        let [dtable, dpositions, dx] =
            split(&mut self.reals, [dtable, dpositions, dx], "embed_vjp")?;
        let (dx, dtable, dpositions) = (&*dx, Shared::new(dtable), Shared::new(dpositions));
        // A piece takes some columns of all tokens, so that each sum is in the order of the tokens.
        self.team.each(width.div_ceil(COLUMNS), |_, b| {
            let from = b * COLUMNS;
            let n = COLUMNS.min(width - from);
            for (row, &token) in tokens.iter().enumerate() {
                let dx = &dx[row * width + from..][..n];
                if dpositions.len() > 0 {
                    // SAFETY: columns are disjoint.
                    let position = unsafe { dpositions.part(row % length * width + from, n) };
                    map2(position, dx, |a, b| a + b);
                }
                if let Some(token) = known(token, vocab) {
                    // SAFETY: as above.
                    let entry = unsafe { dtable.part(token * width + from, n) };
                    map2(entry, dx, |a, b| a + b);
                }
            }
        });
        Ok(())
    }

    fn cross_entropy(
        &mut self,
        chunk: &Chunk,
        ce: &CrossEntropy,
        logits: Reals,
        targets: Ints,
        losses: Reals,
    ) -> Result<()> {
        let rows = targets.len();
        self.arenas().cross_entropy(ce, logits, targets, losses)?;
        let targets = get(&self.ints, targets, "cross_entropy: targets")?;
        let [logits, losses] = split(&mut self.reals, [logits, losses], "cross_entropy")?;
        let (scale, vocab, each) = (ce.scale as f32, ce.vocab, rows_per_piece(ce.vocab));
        let targets_of = [ce.smoothing / vocab.max(1) as f64, 1.0 - ce.smoothing].map(|t| t as f32);
        let shared = (Shared::new(logits), Shared::new(losses));
        let bad = self.team.reduce(
            rows.div_ceil(each),
            usize::MAX,
            |piece| {
                let mut bad = usize::MAX;
                for row in piece * each..rows.min((piece + 1) * each) {
                    // SAFETY: rows are disjoint.
                    let (x, loss) = unsafe {
                        (shared.0.part(row * vocab, vocab), &mut shared.1.part(row, 1)[0])
                    };
                    match known(targets[row], vocab) {
                        Some(target) => {
                            *loss = cross_entropy_row(x, target, targets_of, scale);
                            if !loss.is_finite() {
                                bad = bad.min(row);
                            }
                        }
                        None => {
                            x.fill(0.0);
                            *loss = 0.0;
                            if targets[row] >= 0 {
                                bad = bad.min(row);
                            }
                        }
                    }
                }
                bad
            },
            usize::min,
        );
        if bad != usize::MAX {
            let sample = chunk
                .first
                .wrapping_add(ce.row.wrapping_add(bad).checked_div(ce.tokens).unwrap_or_default());
            // SAFETY: all pieces are done.
            let loss = unsafe { shared.1.part(bad, 1)[0] };
            self.fault.get_or_insert(match known(targets[bad], vocab) {
                Some(_) => Fault::Loss { sample, value: f64::from(loss) },
                None => Fault::Token { sample, value: targets[bad], vocab },
            });
        }
        Ok(())
    }
}

/// With `g = dy·weight`: `dx += rstd·(g − mean(g) − x̂·mean(g·x̂))`.
#[inline]
fn vjp_row(weight: &[f32], x: &[f32], dy: &[f32], dx: &mut [f32], mean: f32x8, rstd: f32x8) {
    let width = weight.len() as f32;
    // Three operands: dy·weight goes through a small buffer, so that two-operand sums serve.
    const PART: usize = 256;
    let mut buffer = [0.0; PART];
    let (mut sum_g, mut sum_gx) = (0.0, 0.0);
    for ((x, dy), weight) in x.chunks(PART).zip(dy.chunks(PART)).zip(weight.chunks(PART)) {
        let g = &mut buffer[..x.len()];
        g.copy_from_slice(dy);
        map2(g, weight, |g, w| g * w);
        sum_g += fold_sum(g, |g| g);
        sum_gx += fold_sum2(g, x, |g, x| g * ((x - mean) * rstd));
    }
    let (mean_g, mean_gx) = (f32x8::splat(sum_g / width), f32x8::splat(sum_gx / width));
    for (((x, dy), weight), dx) in
        x.chunks(PART).zip(dy.chunks(PART)).zip(weight.chunks(PART)).zip(dx.chunks_mut(PART))
    {
        let g = &mut buffer[..x.len()];
        g.copy_from_slice(dy);
        map2(g, weight, |g, w| g * w);
        map3(dx, g, x, |dx, g, x| rstd.mul_add(g - mean_g - (x - mean) * rstd * mean_gx, dx));
    }
}

/// With `g = dy·(offset + weight)` and `x̂ = x·rstd`: `dx += rstd·(g − x̂·mean(g·x̂))`.
#[inline]
fn rms_vjp_row(weight: &[f32], offset: f32x8, x: &[f32], dy: &[f32], dx: &mut [f32], rstd: f32x8) {
    // As in `vjp_row`.
    const PART: usize = 256;
    let mut buffer = [0.0; PART];
    let mut sum = 0.0;
    for ((x, dy), weight) in x.chunks(PART).zip(dy.chunks(PART)).zip(weight.chunks(PART)) {
        let g = &mut buffer[..x.len()];
        map3(g, dy, weight, |_, dy, w| dy * (offset + w));
        sum += fold_sum2(g, x, |g, x| g * (x * rstd));
    }
    let mean = f32x8::splat(sum / weight.len() as f32);
    for (((x, dy), weight), dx) in
        x.chunks(PART).zip(dy.chunks(PART)).zip(weight.chunks(PART)).zip(dx.chunks_mut(PART))
    {
        let g = &mut buffer[..x.len()];
        map3(g, dy, weight, |_, dy, w| dy * (offset + w));
        map3(dx, g, x, |dx, g, x| rstd.mul_add(g - x * rstd * mean, dx));
    }
}

/// The loss of one row, which becomes its gradient; the target distribution is `smooth` everywhere,
/// and `hard` more at the target.
#[inline]
fn cross_entropy_row(x: &mut [f32], target: usize, [smooth, hard]: [f32; 2], scale: f32) -> f32 {
    // loss = ln Σ exp(x − max) − Σ t·(x − max),  dx = (exp(x − max)/Σ − t)·scale
    let max = max_of(x);
    let m = f32x8::splat(max);
    let mut expected = hard * (x[target] - max);
    if smooth > 0.0 {
        // Without smoothing an infinite logit elsewhere has no part in the loss.
        expected += smooth * fold_sum(x, |x| x - m);
    }
    map(x, |x| exp(x - m));
    let sum = fold_sum(x, |x| x);
    let inverse = f32x8::splat(1.0 / sum);
    let s = f32x8::splat(scale);
    let hot = (x[target] * (1.0 / sum) - (smooth + hard)) * scale;
    let t = f32x8::splat(smooth);
    map(x, |x| (x * inverse - t) * s);
    x[target] = hot;
    libm::logf(sum) - expected
}

/// A token that is in the vocabulary.
fn known(token: i32, vocab: usize) -> Option<usize> {
    usize::try_from(token).ok().filter(|&token| token < vocab)
}
