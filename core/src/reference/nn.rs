//! [`NnOps`] of the reference backend: one plain function per operation, sums in a fixed order.

use core::ops::Range;

use super::{Reference, split};
use crate::arena::{Ints, Reals};
use crate::backend::{
    Attention, Chunk, Columns, CrossEntropy, Gate, Gelu, NnOps, Order, Product, RmsNorm, Rotary,
};
use crate::error::{Error, Fault, Result};
use crate::packing::{Packed, Packing};
use crate::real::Real;
use crate::rng::{Draw, Stream, drop_threshold, keep};

/// `1/(1-p)` and the threshold of the words that drop.
fn dropout_of<R: Real>(p: f64) -> (R, u32) {
    (R::of(1.0 / (1.0 - p)), drop_threshold(p))
}

/// The factors 0 or `1/(1-p)` of the elements of one stream; the four words of a counter are drawn
/// once.
struct Factors<R> {
    stream: Stream,
    threshold: u32,
    kept: R,
    quad: u32,
    words: [u32; 4],
}

impl<R: Real> Factors<R> {
    fn new(stream: Stream, (kept, threshold): (R, u32)) -> Self {
        let words = if threshold == 0 { [0; 4] } else { stream.quad(0) };
        Self { stream, threshold, kept, quad: 0, words }
    }

    fn factor(&mut self, element: u32) -> R {
        if self.threshold == 0 {
            return self.kept;
        }
        if element / 4 != self.quad {
            self.quad = element / 4;
            self.words = self.stream.quad(self.quad);
        }
        if keep(self.words[element as usize % 4], self.threshold) { self.kept } else { R::zero() }
    }
}

/// `Σ a·b`: eight partial sums over the elements `i mod 8`, added in order, then the rest.
fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    let mut part = [R::zero(); 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let (a_rest, b_rest) = (a8.remainder(), b8.remainder());
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            part[i] += a[i] * b[i];
        }
    }
    let mut sum = R::zero();
    for p in part {
        sum += p;
    }
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        sum += a * b;
    }
    sum
}

/// Row `row` of a packed matrix. Not inlined: every layer would have room for a block on the stack,
/// which is small on a microcontroller.
#[inline(never)]
fn unpack_row<R: Real>(x: &Packed, words: &[u32], row: usize, y: &mut [R]) -> Result<()> {
    let (bytes, values) = (x.packing.bytes(), x.packing.values());
    let first = x.stored(row) * x.packing.row_bytes(x.cols)?;
    let (mut block, mut wide) = ([0; Packing::LARGEST], [0.0; 256]);
    for (b, y) in y.chunks_mut(values).enumerate() {
        for (at, byte) in (first + b * bytes..).zip(&mut block[..bytes]) {
            *byte = (words[at / 4] >> (8 * (at % 4))) as u8;
        }
        x.packing.unpack(&block[..bytes], &mut wide[..values]);
        for (y, wide) in y.iter_mut().zip(wide) {
            *y = R::of(f64::from(wide));
        }
    }
    Ok(())
}

/// `y += factor·x`.
fn add_scaled<R: Real>(y: &mut [R], factor: R, x: &[R]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// `0.5·x·(1 + tanh(u))`, `u = √(2/π)·(x + 0.044715·x³)`, or `x·Φ(x) = 0.5·x·(1 + erf(x/√2))`.
fn gelu<R: Real>(kind: Gelu, x: R) -> R {
    let half = R::of(0.5);
    let t = match kind {
        Gelu::Tanh => tanh_argument(x).hyperbolic_tangent(),
        Gelu::Exact => (x * R::of(core::f64::consts::FRAC_1_SQRT_2)).error_function(),
    };
    half * x * (R::one() + t)
}

/// `√(2/π)`.
const ROOT_2_OVER_PI: f64 = core::f64::consts::FRAC_2_SQRT_PI * core::f64::consts::FRAC_1_SQRT_2;

fn tanh_argument<R: Real>(x: R) -> R {
    R::of(ROOT_2_OVER_PI) * (x + R::of(0.044_715) * x * x * x)
}

/// Of `0.5·x·(1 + tanh(u))`: `0.5·(1 + tanh(u)) + 0.5·x·(1 − tanh²(u))·u'`, `u' = √(2/π)·(1 +
/// 3·0.044715·x²)`. Of `x·Φ(x)`: `Φ(x) + x·exp(−x²/2)/√(2π)`.
fn gelu_derivative<R: Real>(kind: Gelu, x: R) -> R {
    let (one, half) = (R::one(), R::of(0.5));
    match kind {
        Gelu::Tanh => {
            let t = tanh_argument(x).hyperbolic_tangent();
            let slope = one - t * t;
            // Far out the slope is 0 and u' may be infinite; their product is 0.
            let inner = if slope == R::zero() {
                slope
            } else {
                slope * R::of(ROOT_2_OVER_PI) * (one + R::of(3.0 * 0.044_715) * x * x)
            };
            half * (one + t) + half * x * inner
        }
        Gelu::Exact => {
            let cdf = half * (one + (x * R::of(core::f64::consts::FRAC_1_SQRT_2)).error_function());
            let density = (-half * x * x).exponential() * R::of(0.5 * ROOT_2_OVER_PI);
            cdf + x * density
        }
    }
}

/// `x·σ(x)` with `σ(x) = 1/(1 + exp(−x))`, or a GELU; and the derivative, `σ(x)·(1 + x·(1 −
/// σ(x)))`.
fn gate<R: Real>(act: Gate, x: R) -> (R, R) {
    match act {
        Gate::Silu => {
            let one = R::one();
            let s = one / (one + (-x).exponential());
            // Far out σ is 0 or 1 and x may be infinite: the value is 0 or x, the slope σ.
            if s == R::zero() || s == one {
                return (if s == one { x } else { s }, s);
            }
            (x * s, s + x * s * (one - s))
        }
        Gate::Gelu(kind) => (gelu(kind, x), gelu_derivative(kind, x)),
    }
}

/// Where row 0 of a head starts and how far its rows are apart.
#[derive(Clone, Copy)]
struct Head {
    start: usize,
    stride: usize,
}

impl Head {
    fn row(self, row: usize, width: usize) -> Range<usize> {
        let start = self.start + row * self.stride;
        start..start + width
    }
}

/// First dropout element of a query's row of weights; wraps as the generator's counter does.
fn first_element(a: &Attention, head: usize, q: usize) -> u32 {
    (head as u32).wrapping_mul(a.queries as u32).wrapping_add(q as u32).wrapping_mul(a.keys as u32)
}

impl<R: Real> Reference<'_, R> {
    /// Factor of the scores: `e^τ`, or `1/√head_dim`.
    fn score_scale(&self, a: &Attention) -> Result<R> {
        Ok(match self.reals(a.temperature)?.first() {
            Some(tau) => tau.exponential(),
            None => R::of(1.0 / libm::sqrt(a.head_dim.max(1) as f64)),
        })
    }

    /// Keys of sample `i` that are not padding.
    fn present(&self, a: &Attention, i: usize) -> usize {
        let len = self.ints.get(a.key_lens.range()).and_then(|lens| lens.get(i));
        len.map_or(a.keys, |&len| usize::try_from(len).unwrap_or(0).min(a.keys))
    }

    /// First key that query `q` of sample `i` may see: that of its text in a packed sample.
    fn start(&self, a: &Attention, i: usize, q: usize) -> usize {
        let starts = self.ints.get(a.starts.range()).unwrap_or(&[]);
        starts.get(i * a.queries + q).map_or(0, |&at| usize::try_from(at).unwrap_or(0))
    }
}

/// The head's part of the matrix of `c`, for sample `i` with `rows` rows a sample. (It wraps only
/// where there is no row.)
fn head_of(a: &Attention, c: Columns, i: usize, rows: usize, head: usize) -> Head {
    let start = c.of.start() + i * rows * c.stride;
    Head { start: start.wrapping_add(c.at + head * a.head_dim), stride: c.stride }
}

impl<R: Real> NnOps for Reference<'_, R> {
    fn matmul(
        &mut self,
        p: &Product,
        a: Reals,
        b: Reals,
        bias: Option<Reals>,
        c: Reals,
    ) -> Result<()> {
        self.arenas().matmul(p, a, b, bias, c)?;
        let places = [a.range(), b.range(), bias.unwrap_or(Reals::EMPTY).range(), c.range()];
        let [a, b, offset, c] = split(self.reals, places, "matmul")?;
        if c.is_empty() {
            return Ok(());
        }
        for i in 0..p.rows {
            // c[i, ..] = bias[..] + Σ_k a[i, k]·b[k, ..]
            let c = &mut c[i * p.cols..(i + 1) * p.cols];
            if !p.accumulate {
                c.fill(R::zero());
            }
            if bias.is_some() {
                add_scaled(c, R::one(), offset);
            }
            match (p.a, p.b) {
                (Order::Plain, Order::Transposed) => {
                    let a = &a[i * p.inner..(i + 1) * p.inner];
                    for (j, c) in c.iter_mut().enumerate() {
                        *c += dot(a, &b[j * p.inner..(j + 1) * p.inner]);
                    }
                }
                (Order::Transposed, Order::Transposed) => {
                    for (j, c) in c.iter_mut().enumerate() {
                        let mut sum = R::zero();
                        for k in 0..p.inner {
                            sum += a[k * p.rows + i] * b[j * p.inner + k];
                        }
                        *c += sum;
                    }
                }
                (order, Order::Plain) => {
                    for k in 0..p.inner {
                        let factor = if order == Order::Plain {
                            a[i * p.inner + k]
                        } else {
                            a[k * p.rows + i]
                        };
                        add_scaled(c, factor, &b[k * p.cols..(k + 1) * p.cols]);
                    }
                }
            }
        }
        Ok(())
    }

    fn sum_rows(&mut self, x: Reals, sum: Reals) -> Result<()> {
        let cols = sum.len();
        let rows = self.arenas().sum_rows(x, sum)?;
        let [x, sum] = split(self.reals, [x.range(), sum.range()], "sum_rows")?;
        for r in 0..rows {
            add_scaled(sum, R::one(), &x[r * cols..(r + 1) * cols]);
        }
        Ok(())
    }

    fn add(&mut self, x: Reals, y: Reals) -> Result<()> {
        self.arenas().pair("add", x, y)?;
        let [x, y] = split(self.reals, [x.range(), y.range()], "add")?;
        add_scaled(x, R::one(), y);
        Ok(())
    }

    fn unpack(&mut self, x: &Packed, first: usize, y: Reals) -> Result<()> {
        let rows = self.arenas().unpack(x, first, y)?;
        let words = self.words.get(x.words.range()).ok_or(Error::Handle("unpack"))?;
        let [y] = split(self.reals, [y.range()], "unpack")?;
        for row in 0..rows {
            unpack_row(x, words, first + row, &mut y[row * x.cols..][..x.cols])?;
        }
        Ok(())
    }

    fn unpack_rows(&mut self, chunk: &Chunk, x: &Packed, rows: Ints, y: Reals) -> Result<()> {
        let length = self.arenas().unpack_rows(chunk, x, rows, y)?;
        let rows = self.ints.get(rows.range()).ok_or(Error::Handle("unpack_rows"))?;
        let words = self.words.get(x.words.range()).ok_or(Error::Handle("unpack_rows"))?;
        let [y] = split(self.reals, [y.range()], "unpack_rows")?;
        for (i, &row) in rows.iter().enumerate() {
            let y = &mut y[i * x.cols..][..x.cols];
            if let Some(row) = usize::try_from(row).ok().filter(|&row| row < x.rows) {
                unpack_row(x, words, row, y)?;
                continue;
            }
            y.fill(R::zero());
            self.fault.get_or_insert(Fault::Token {
                sample: chunk.first.wrapping_add(i / length),
                value: row,
                vocab: x.rows,
            });
        }
        Ok(())
    }

    fn add_columns(&mut self, width: usize, scale: f64, from: Columns, to: Columns) -> Result<()> {
        let rows = self.arenas().add_columns(width, from, to)?;
        let [x, y] = split(self.reals, [from.of.range(), to.of.range()], "add_columns")?;
        for r in 0..rows {
            let (x, y) = (
                &x[r * from.stride + from.at..][..width],
                &mut y[r * to.stride + to.at..][..width],
            );
            add_scaled(y, R::of(scale), x);
        }
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
        let places = [weight, bias, x, y, stats].map(Reals::range);
        let [weight, bias, x, y, stats] = split(self.reals, places, "layer_norm")?;
        for r in 0..rows {
            let (x, y) = (&x[r * width..(r + 1) * width], &mut y[r * width..(r + 1) * width]);
            let (mut sum, mut squares) = (0.0, 0.0);
            for x in x {
                sum += x.wide();
            }
            let mean = sum / width as f64;
            for x in x {
                squares += (x.wide() - mean) * (x.wide() - mean);
            }
            let (mean, rstd) = (R::of(mean), R::of(1.0 / libm::sqrt(squares / width as f64 + eps)));
            (stats[2 * r], stats[2 * r + 1]) = (mean, rstd);
            for c in 0..width {
                // y = (x − mean)·rstd·weight + bias
                y[c] = (x[c] - mean) * rstd * weight[c] + bias[c];
            }
        }
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
        let places = [weight, x, stats, dy, dx, dweight, dbias].map(Reals::range);
        let [weight, x, stats, dy, dx, dweight, dbias] =
            split(self.reals, places, "layer_norm_vjp")?;
        for r in 0..rows {
            let (mean, rstd) = (stats[2 * r], stats[2 * r + 1]);
            let row = r * width..(r + 1) * width;
            let (x, dy, dx) = (&x[row.clone()], &dy[row.clone()], &mut dx[row]);
            // y = x̂·weight + bias with x̂ = (x − mean)·rstd. With g = dy·weight:
            // dx += rstd·(g − mean(g) − x̂·mean(g·x̂)),  dweight += dy·x̂,  dbias += dy
            let (mut sum_g, mut sum_gx) = (0.0, 0.0);
            for c in 0..width {
                let (normal, g) = ((x[c] - mean) * rstd, dy[c] * weight[c]);
                sum_g += g.wide();
                sum_gx += g.wide() * normal.wide();
            }
            let (mean_g, mean_gx) = (R::of(sum_g / width as f64), R::of(sum_gx / width as f64));
            for c in 0..width {
                let (normal, g) = ((x[c] - mean) * rstd, dy[c] * weight[c]);
                dx[c] += rstd * (g - mean_g - normal * mean_gx);
                if !dweight.is_empty() {
                    dweight[c] += dy[c] * normal;
                    dbias[c] += dy[c];
                }
            }
        }
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
        let places = [weight, x.of, y.of, stats].map(Reals::range);
        let [weight, xs, ys, stats] = split(self.reals, places, "rms_norm")?;
        let (width, offset) = (norm.width, R::of(norm.offset));
        for r in 0..rows {
            for g in 0..norm.groups {
                let x = &xs[r * x.stride + x.at + g * width..][..width];
                let y = &mut ys[r * y.stride + y.at + g * width..][..width];
                let squares = x.iter().map(|x| x.wide() * x.wide()).sum::<f64>();
                let rstd = R::of(1.0 / libm::sqrt(squares / width as f64 + norm.eps));
                stats[r * norm.groups + g] = rstd;
                for c in 0..width {
                    y[c] = x[c] * rstd * (offset + weight[c]);
                }
            }
        }
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
        let places = [weight, x.of, stats, dy.of, dx.of, dweight].map(Reals::range);
        let [weight, xs, stats, dys, dxs, dweight] = split(self.reals, places, "rms_norm_vjp")?;
        let (width, offset) = (norm.width, R::of(norm.offset));
        for r in 0..rows {
            for g in 0..norm.groups {
                let x = &xs[r * x.stride + x.at + g * width..][..width];
                let dy = &dys[r * dy.stride + dy.at + g * width..][..width];
                let dx = &mut dxs[r * dx.stride + dx.at + g * width..][..width];
                let rstd = stats[r * norm.groups + g];
                // y = x̂·(offset + weight) with x̂ = x·rstd. With g = dy·(offset + weight):
                // dx += rstd·(g − x̂·mean(g·x̂)),  dweight += dy·x̂
                let mut sum = 0.0;
                for c in 0..width {
                    sum += (dy[c] * (offset + weight[c])).wide() * (x[c] * rstd).wide();
                }
                let mean = R::of(sum / width as f64);
                for c in 0..width {
                    let normal = x[c] * rstd;
                    dx[c] += rstd * (dy[c] * (offset + weight[c]) - normal * mean);
                    if !dweight.is_empty() {
                        dweight[c] += dy[c] * normal;
                    }
                }
            }
        }
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
        let known = self.arenas().rotate(chunk, rotary, table, positions, x)?;
        let (tokens, width, half) = (rotary.tokens, rotary.head_dim, rotary.head_dim / 2);
        let positions = self.ints.get(positions.range()).ok_or(Error::Handle("rotate"))?;
        let [table, xs] = split(self.reals, [table.range(), x.of.range()], "rotate")?;
        for r in 0..chunk.samples * tokens {
            let position = positions.get(r).map_or((r % tokens) as i64, |&p| p.into());
            let Some(p) = usize::try_from(position).ok().filter(|&p| p < known) else {
                let (sample, value) = (chunk.first + r / tokens, position as i32);
                self.fault.get_or_insert(Fault::Position { sample, value, positions: known });
                continue;
            };
            let (cos, sin) = table[p * width..(p + 1) * width].split_at(half);
            for head in 0..rotary.heads {
                let (a, b) = xs[r * x.stride + x.at + head * width..][..width].split_at_mut(half);
                for i in 0..half {
                    // (a, b) ← (a·cos − b·sin, b·cos + a·sin)
                    let sin = if rotary.back { -sin[i] } else { sin[i] };
                    let (x, y) = (a[i], b[i]);
                    (a[i], b[i]) = (x * cos[i] - y * sin, y * cos[i] + x * sin);
                }
            }
        }
        Ok(())
    }

    fn gated(&mut self, act: Gate, gate: Reals, up: Reals, y: Reals) -> Result<()> {
        self.arenas().gated("gated", [gate, up, y])?;
        let [g, u, y] = split(self.reals, [gate, up, y].map(Reals::range), "gated")?;
        for i in 0..y.len() {
            y[i] = self::gate(act, g[i]).0 * u[i];
        }
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
        let places = [gate, up, d, dgate].map(Reals::range);
        let [g, u, d, dg] = split(self.reals, places, "gated_vjp")?;
        for i in 0..d.len() {
            let (value, slope) = self::gate(act, g[i]);
            dg[i] = d[i] * u[i] * slope;
            d[i] *= value;
        }
        Ok(())
    }

    fn gelu(&mut self, kind: Gelu, x: Reals, y: Reals) -> Result<()> {
        self.arenas().pair("gelu", x, y)?;
        let [x, y] = split(self.reals, [x.range(), y.range()], "gelu")?;
        for (y, &x) in y.iter_mut().zip(x.iter()) {
            *y = gelu(kind, x);
        }
        Ok(())
    }

    fn gelu_vjp(&mut self, kind: Gelu, x: Reals, d: Reals) -> Result<()> {
        self.arenas().pair("gelu_vjp", x, d)?;
        let [x, d] = split(self.reals, [x.range(), d.range()], "gelu_vjp")?;
        for (d, &x) in d.iter_mut().zip(x.iter()) {
            *d *= gelu_derivative(kind, x);
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
        let scratch = scratch.sub(0, a.keys);
        self.arenas().attention(chunk, a, [q, k, v], out, lse, (scratch, a.keys))?;
        if chunk.samples * a.queries == 0 {
            return Ok(());
        }
        let dropout = dropout_of(a.dropout);
        let (out_at, lse_at, scratch_at) = (out.range(), lse.range(), scratch.range());
        let width = a.head_dim;
        let scale = self.score_scale(a)?;

        for i in 0..chunk.samples {
            let present = self.present(a, i);
            let mut factors = Factors::new(chunk.stream(i, a.draw), dropout);
            for head in 0..a.heads {
                let kv = a.kv_head(head);
                let (qs, ks) = (head_of(a, q, i, a.queries, head), head_of(a, k, i, a.keys, kv));
                let vs = head_of(a, v, i, a.keys, kv);
                for row in 0..a.queries {
                    let (first, seen) = a.visible(row, present, self.start(a, i, row));
                    // s_k = q·k/√head_dim, p_k = exp(s_k − max)/sum, out = Σ p_k·factor_k·v_k, lse
                    // = max + ln(sum)
                    let mut max = R::neg_infinity();
                    for key in first..seen {
                        if a.hides(row, key) {
                            self.reals[scratch_at.start + key] = R::neg_infinity();
                            continue;
                        }
                        let s = scale
                            * dot(&self.reals[qs.row(row, width)], &self.reals[ks.row(key, width)]);
                        self.reals[scratch_at.start + key] = s;
                        // A NaN stays one: it is the largest, and every exponential below then is
                        // NaN.
                        if s > max || s.is_nan() {
                            max = s;
                        }
                    }
                    let mut sum = R::zero();
                    for key in (first..seen).filter(|&key| !a.hides(row, key)) {
                        let p = &mut self.reals[scratch_at.start + key];
                        *p = (*p - max).exponential();
                        sum += *p;
                    }
                    let start = out_at.start + ((i * a.queries + row) * a.heads + head) * width;
                    self.reals[start..start + width].fill(R::zero());
                    let element = first_element(a, head, row);
                    for key in (first..seen).filter(|&key| !a.hides(row, key)) {
                        let factor = factors.factor(element.wrapping_add(key as u32));
                        let p = self.reals[scratch_at.start + key] / sum * factor;
                        let [o, v] = split(
                            self.reals,
                            [start..start + width, vs.row(key, width)],
                            "attention: out",
                        )?;
                        add_scaled(o, p, v);
                    }
                    self.reals[lse_at.start + (i * a.heads + head) * a.queries + row] =
                        if sum == R::zero() { R::neg_infinity() } else { max + sum.logarithm() };
                }
            }
        }
        Ok(())
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
        let scratch = scratch.sub(0, a.keys);
        self.arenas().attention_vjp(
            chunk,
            a,
            [q, k, v],
            [out, lse, dout],
            [dq, dk, dv],
            (scratch, a.keys),
        )?;
        if a.heads * a.head_dim == 0 || chunk.samples * (a.queries + a.keys) == 0 {
            return Ok(());
        }
        let dropout = dropout_of(a.dropout);
        let (out_at, lse_at, dout_at) = (out.start(), lse.start(), dout.start());
        let width = a.head_dim;
        let scale = self.score_scale(a)?;

        for i in 0..chunk.samples {
            let present = self.present(a, i);
            let mut factors = Factors::new(chunk.stream(i, a.draw), dropout);
            for head in 0..a.heads {
                let (qs, dqs) =
                    (head_of(a, q, i, a.queries, head), head_of(a, dq, i, a.queries, head));
                let kv = a.kv_head(head);
                let (ks, dks) = (head_of(a, k, i, a.keys, kv), head_of(a, dk, i, a.keys, kv));
                let (vs, dvs) = (head_of(a, v, i, a.keys, kv), head_of(a, dv, i, a.keys, kv));
                // The first head of queries that reads these keys and values.
                if head == 0 || a.kv_head(head - 1) != kv {
                    for key in 0..a.keys {
                        self.reals[dks.row(key, width)].fill(R::zero());
                        self.reals[dvs.row(key, width)].fill(R::zero());
                    }
                }
                for row in 0..a.queries {
                    self.reals[dqs.row(row, width)].fill(R::zero());
                    let start = ((i * a.queries + row) * a.heads + head) * width;
                    let dout = dout_at + start..dout_at + start + width;
                    let lse = self.reals[lse_at + (i * a.heads + head) * a.queries + row];
                    // out = Σ p_k·factor_k·v_k: dv_k += p_k·factor_k·dout, dp_k =
                    // factor_k·(dout·v_k) p = softmax(s): ds_k = p_k·(dp_k − Σ_j p_j·dp_j), and
                    // that sum is dout·out s_k = scale·(q·k_k): dq += scale·ds_k·k_k, dk_k +=
                    // scale·ds_k·q
                    let delta = dot(
                        &self.reals[dout.clone()],
                        &self.reals[out_at + start..out_at + start + width],
                    );
                    let element = first_element(a, head, row);
                    let (first, seen) = a.visible(row, present, self.start(a, i, row));
                    for key in (first..seen).filter(|&key| !a.hides(row, key)) {
                        let s = scale
                            * dot(&self.reals[qs.row(row, width)], &self.reals[ks.row(key, width)]);
                        let p = (s - lse).exponential();
                        let factor = factors.factor(element.wrapping_add(key as u32));
                        let dp = factor
                            * dot(&self.reals[dout.clone()], &self.reals[vs.row(key, width)]);
                        let ds = scale * (p * (dp - delta));
                        let [dv, dout] = split(
                            self.reals,
                            [dvs.row(key, width), dout.clone()],
                            "attention_vjp",
                        )?;
                        add_scaled(dv, p * factor, dout);
                        let [dq, k] = split(
                            self.reals,
                            [dqs.row(row, width), ks.row(key, width)],
                            "attention_vjp",
                        )?;
                        add_scaled(dq, ds, k);
                        let [dk, q] = split(
                            self.reals,
                            [dks.row(key, width), qs.row(row, width)],
                            "attention_vjp",
                        )?;
                        add_scaled(dk, ds, q);
                    }
                }
            }
        }
        for at in a.temperature_grad.range() {
            // s_k = e^τ·(q·k_k): dτ = Σ ds_k·s_k = Σ q·(Σ_k e^τ·ds_k·k_k) = Σ q·dq
            let mut sum = 0.0;
            for i in 0..chunk.samples {
                for head in 0..a.heads {
                    let (qs, dqs) =
                        (head_of(a, q, i, a.queries, head), head_of(a, dq, i, a.queries, head));
                    for row in 0..a.queries {
                        sum +=
                            dot(&self.reals[qs.row(row, width)], &self.reals[dqs.row(row, width)])
                                .wide();
                    }
                }
            }
            self.reals[at] += R::of(sum);
        }
        Ok(())
    }

    /// One row of scores.
    fn attention_scratch(a: &Attention, _samples: usize, _threads: usize) -> usize {
        a.keys
    }

    fn dropout(&mut self, chunk: &Chunk, draw: Draw, p: f64, x: Reals) -> Result<()> {
        let per = self.arenas().dropout(chunk, p, x)?;
        let dropout = dropout_of::<R>(p);
        let x = self.reals_mut(x)?;
        if dropout.1 == 0 || x.is_empty() {
            return Ok(());
        }
        for i in 0..chunk.samples {
            let mut factors = Factors::new(chunk.stream(i, draw), dropout);
            for (e, x) in x[i * per..(i + 1) * per].iter_mut().enumerate() {
                let factor = factors.factor(e as u32);
                // Not a product: a dropped infinity is 0 too.
                *x = if factor == R::zero() { factor } else { *x * factor };
            }
        }
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
        let tokens = self.ints.get(tokens.range()).ok_or(Error::Handle("embed"))?;
        let places = [table, positions, x].map(Reals::range);
        let [table, positions, x] = split(self.reals, places, "embed")?;
        if width == 0 {
            return Ok(());
        }
        for (row, &token) in tokens.iter().enumerate() {
            // x[i, t] = table[tokens[i, t]] + positions[t]
            let (i, t) = (row / length, row % length);
            let x = &mut x[row * width..(row + 1) * width];
            match positions.get(t * width..(t + 1) * width) {
                Some(position) => x.copy_from_slice(position),
                None => x.fill(R::zero()),
            }
            match usize::try_from(token).ok().filter(|&token| token < vocab) {
                Some(token) => add_scaled(x, R::one(), &table[token * width..(token + 1) * width]),
                None => {
                    self.fault.get_or_insert(Fault::Token {
                        sample: chunk.first.wrapping_add(i),
                        value: token,
                        vocab,
                    });
                }
            }
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
        let tokens = self.ints.get(tokens.range()).ok_or(Error::Handle("embed_vjp"))?;
        let places = [dtable, dpositions, dx].map(Reals::range);
        let [dtable, dpositions, dx] = split(self.reals, places, "embed_vjp")?;
        if width == 0 {
            return Ok(());
        }
        for (row, &token) in tokens.iter().enumerate() {
            // x[i, t] = table[tokens[i, t]] + positions[t]: dtable[tokens[i, t]] += dx[i, t],
            // dpositions[t] += dx[i, t]
            let t = row % length;
            let dx = &dx[row * width..(row + 1) * width];
            if let Some(position) = dpositions.get_mut(t * width..(t + 1) * width) {
                add_scaled(position, R::one(), dx);
            }
            if let Some(token) = usize::try_from(token).ok().filter(|&token| token < vocab) {
                add_scaled(&mut dtable[token * width..(token + 1) * width], R::one(), dx);
            }
        }
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
        self.arenas().cross_entropy(ce, logits, targets, losses)?;
        let targets = self.ints.get(targets.range()).ok_or(Error::Handle("cross_entropy"))?;
        let [logits, losses] =
            split(self.reals, [logits.range(), losses.range()], "cross_entropy")?;
        let scale = R::of(ce.scale);
        // ε/vocab and 1-ε
        let (smooth, hard) =
            (R::of(ce.smoothing / ce.vocab.max(1) as f64), R::of(1.0 - ce.smoothing));
        for (row, &target) in targets.iter().enumerate() {
            let x = &mut logits[row * ce.vocab..(row + 1) * ce.vocab];
            let sample = chunk
                .first
                .wrapping_add(ce.row.wrapping_add(row).checked_div(ce.tokens).unwrap_or_default());
            let Some(index) = usize::try_from(target).ok().filter(|&index| index < ce.vocab) else {
                x.fill(R::zero());
                losses[row] = R::zero();
                if target >= 0 {
                    self.fault.get_or_insert(Fault::Token {
                        sample,
                        value: target,
                        vocab: ce.vocab,
                    });
                }
                continue;
            };
            // loss = max + ln Σ exp(x − max) − Σ t·x, dx = (exp(x − max)/Σ − t)·scale, t =
            // (1-ε)·onehot + ε/vocab
            let mut max = R::neg_infinity();
            for &x in x.iter() {
                if x > max || x.is_nan() {
                    max = x;
                }
            }
            let mut expected = hard * (x[index] - max);
            let mut sum = R::zero();
            for x in x.iter_mut() {
                // Without smoothing an infinite logit elsewhere has no part in the loss.
                if smooth > R::zero() {
                    expected += smooth * (*x - max);
                }
                *x = (*x - max).exponential();
                sum += *x;
            }
            let loss = sum.logarithm() - expected;
            losses[row] = loss;
            if !loss.is_finite() {
                self.fault.get_or_insert(Fault::Loss { sample, value: loss.wide() });
            }
            for (c, x) in x.iter_mut().enumerate() {
                let t = if c == index { smooth + hard } else { smooth };
                *x = (*x / sum - t) * scale;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::arena::Layout;
    use crate::backend::{Mask, Storage};
    use crate::error::Site;
    use crate::rng::philox;

    type Host<'a> = Reference<'a, f64>;

    fn noise(i: usize) -> f64 {
        f64::from(philox(3, [i as u32, 0, 0, 0])[0] as i32) / 2_147_483_648.0
    }

    fn chunk(samples: usize) -> Chunk {
        Chunk {
            seed: 5,
            step: 2,
            stack: 0,
            site: Site::Block(1),
            first: 0,
            samples,
            global: 9,
            frame: 0,
        }
    }

    /// Memory in which every real is random.
    struct Memory {
        ints: Vec<i32>,
        reals: Vec<f64>,
    }

    impl Memory {
        fn new() -> Self {
            Self { ints: Vec::new(), reals: Vec::new() }
        }

        fn reals(&mut self, len: usize) -> Reals {
            let start = self.reals.len();
            self.reals.extend((start..start + len).map(noise));
            Reals::new(start, len)
        }

        fn ints(&mut self, values: &[i32]) -> Ints {
            let start = self.ints.len();
            self.ints.extend(values);
            Ints::new(start, values.len())
        }

        fn run(&self, op: impl Fn(&mut Host<'_>) -> Result<()>) -> Vec<f64> {
            let (mut ints, mut reals) = (self.ints.clone(), self.reals.clone());
            let mut host = Reference::new(&Layout::new(8), &mut ints, &mut reals, &mut []).unwrap();
            op(&mut host).unwrap();
            assert_eq!(host.take_fault(), Ok(None));
            reals
        }

        /// Compares the gradients that `backward` leaves (or adds) with central differences of `Σ
        /// weight·out` after `forward`. The gradient of each input `x` is at `d`; `adds` says that
        /// it is added to what was there.
        fn check(
            &mut self,
            inputs: &[(Reals, Reals)],
            adds: bool,
            (out, weight): (Reals, Reals),
            forward: impl Fn(&mut Host<'_>) -> Result<()>,
            backward: impl Fn(&mut Host<'_>) -> Result<()>,
        ) {
            let weights: Vec<f64> = self.reals[weight.range()].to_vec();
            let after = self.run(|host| forward(host).and_then(|()| backward(host)));
            let loss = |m: &Self| -> f64 {
                let reals = m.run(&forward);
                reals[out.range()].iter().zip(&weights).map(|(x, w)| x * w).sum()
            };
            let e = 1e-5;
            for (n, &(x, d)) in inputs.iter().enumerate() {
                for i in 0..x.len() {
                    let (at, value) = (x.start() + i, self.reals[x.start() + i]);
                    self.reals[at] = value + e;
                    let plus = loss(self);
                    self.reals[at] = value - e;
                    let minus = loss(self);
                    self.reals[at] = value;
                    let before = if adds { self.reals[d.start() + i] } else { 0.0 };
                    let (expected, found) =
                        ((plus - minus) / (2.0 * e), after[d.start() + i] - before);
                    // Central differences are off by e² times the third derivative and by rounding,
                    // about 1e-16 / e.
                    let tolerance = 1e-8 * (1.0 + expected.abs());
                    assert!(
                        (expected - found).abs() < tolerance,
                        "input {n}[{i}]: expected {expected}, found {found}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_in_all_orders() {
        for [rows, cols, inner] in [[1, 1, 1], [3, 5, 2], [4, 3, 17], [2, 1, 9], [2, 3, 0]] {
            for n in 0..16 {
                let order =
                    |bit: usize| if n >> bit & 1 == 0 { Order::Plain } else { Order::Transposed };
                let p = Product {
                    rows,
                    cols,
                    inner,
                    a: order(0),
                    b: order(1),
                    accumulate: n >> 2 & 1 == 1,
                };
                let mut m = Memory::new();
                let (a, b, c) =
                    (m.reals(rows * inner), m.reals(inner * cols), m.reals(rows * cols));
                let bias = if n >> 3 == 1 { Some(m.reals(cols)) } else { None };
                let after = m.run(|host| host.matmul(&p, a, b, bias, c));
                for i in 0..rows {
                    for j in 0..cols {
                        let at = c.start() + i * cols + j;
                        let mut sum = if p.accumulate { m.reals[at] } else { 0.0 };
                        sum += bias.map_or(0.0, |bias| m.reals[bias.start() + j]);
                        for k in 0..inner {
                            let left =
                                if p.a == Order::Plain { i * inner + k } else { k * rows + i };
                            let right =
                                if p.b == Order::Plain { k * cols + j } else { j * inner + k };
                            sum += m.reals[a.start() + left] * m.reals[b.start() + right];
                        }
                        assert!((after[at] - sum).abs() < 1e-14);
                    }
                }
            }
        }
    }

    /// The gradients of a linear layer are products and a sum of rows.
    #[test]
    fn linear_gradient() {
        let (rows, cols, inner) = (3, 4, 5);
        let mut m = Memory::new();
        let (x, w, bias) = (m.reals(rows * inner), m.reals(inner * cols), m.reals(cols));
        let (y, dy) = (m.reals(rows * cols), m.reals(rows * cols));
        let (dx, dw, dbias) = (m.reals(rows * inner), m.reals(inner * cols), m.reals(cols));
        let (plain, turned) = (Order::Plain, Order::Transposed);
        m.check(
            &[(x, dx), (w, dw), (bias, dbias)],
            true,
            (y, dy),
            |host| {
                let p = Product { rows, cols, inner, a: plain, b: plain, accumulate: false };
                host.matmul(&p, x, w, Some(bias), y)
            },
            |host| {
                let p = Product {
                    rows,
                    cols: inner,
                    inner: cols,
                    a: plain,
                    b: turned,
                    accumulate: true,
                };
                host.matmul(&p, dy, w, None, dx)?;
                let p = Product {
                    rows: inner,
                    cols,
                    inner: rows,
                    a: turned,
                    b: plain,
                    accumulate: true,
                };
                host.matmul(&p, x, dy, None, dw)?;
                host.sum_rows(dy, dbias)
            },
        );
    }

    #[test]
    fn layer_norm_gradient() {
        for [rows, width] in [[1, 2], [3, 5], [2, 8]] {
            let mut m = Memory::new();
            let (x, weight, bias) = (m.reals(rows * width), m.reals(width), m.reals(width));
            let (y, dy, stats) = (m.reals(rows * width), m.reals(rows * width), m.reals(2 * rows));
            let (dx, dweight, dbias) = (m.reals(rows * width), m.reals(width), m.reals(width));
            m.check(
                &[(x, dx), (weight, dweight), (bias, dbias)],
                true,
                (y, dy),
                |host| host.layer_norm(1e-2, weight, bias, x, y, stats),
                |host| host.layer_norm_vjp(weight, x, stats, dy, dx, dweight, dbias),
            );
        }
    }

    #[test]
    fn rms_norm_gradient() {
        for ([rows, groups, width], offset) in [([1, 1, 2], 0.0), ([3, 2, 5], 1.0)] {
            let mut m = Memory::new();
            let stride = groups * width + 2;
            let [x, y, dy, dx] = [0; 4].map(|_| m.reals(rows * stride));
            let (weight, dweight, stats) = (m.reals(width), m.reals(width), m.reals(rows * groups));
            // The columns of nobody keep what they hold: they have no part in the sum.
            for i in (0..rows * stride).filter(|i| !(1..=groups * width).contains(&(i % stride))) {
                m.reals[dy.start() + i] = 0.0;
            }
            let norm = RmsNorm { groups, width, eps: 1e-2, offset };
            let [xs, ys, dys, dxs] = [x, y, dy, dx].map(|of| Columns { of, stride, at: 1 });
            m.check(
                &[(x, dx), (weight, dweight)],
                true,
                (y, dy),
                |host| host.rms_norm(&norm, weight, xs, ys, stats),
                |host| host.rms_norm_vjp(&norm, weight, xs, stats, dys, dxs, dweight),
            );
        }
    }

    #[test]
    fn gated_gradient() {
        for act in [Gate::Silu, Gate::Gelu(Gelu::Tanh), Gate::Gelu(Gelu::Exact)] {
            let mut m = Memory::new();
            let [gate, up, y, d, dgate] = [0; 5].map(|_| m.reals(40));
            for i in gate.range() {
                m.reals[i] *= 5.0;
            }
            m.check(
                &[(gate, dgate), (up, d)],
                false,
                (y, d),
                |host| host.gated(act, gate, up, y),
                |host| host.gated_vjp(act, gate, up, d, dgate),
            );
        }
        for x in [-1e20_f32, 1e20, -3e38, 3e38, -120.0, 120.0, f32::NEG_INFINITY, f32::INFINITY] {
            let expected = (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 });
            assert_eq!(gate(Gate::Silu, x), expected, "far out it is the identity or 0");
        }
    }

    /// Turning by the angles of a position is a complex product, and turning back undoes it.
    #[test]
    fn rotation() {
        let mut m = Memory::new();
        let (samples, tokens, heads, head_dim, known) = (2, 3, 2, 4, 5);
        let stride = heads * head_dim + 1;
        let (table, x) = (m.reals(known * head_dim), m.reals(samples * tokens * stride));
        let angle = |position: usize, i: usize| position as f64 * [1.0, 0.01][i];
        for (at, i) in table.range().enumerate() {
            let (position, c) = (at / head_dim, at % head_dim);
            let a = angle(position, c % 2);
            m.reals[i] = if c < 2 { libm::cos(a) } else { libm::sin(a) };
        }
        let own = m.ints(&[0, 1, 0, 4, 3, 2]);
        let xs = Columns { of: x, stride, at: 1 };
        let turn = Rotary { heads, head_dim, tokens, back: false };
        for positions in [Ints::EMPTY, own] {
            let after = m.run(|host| host.rotate(&chunk(samples), &turn, table, positions, xs));
            for row in 0..samples * tokens {
                let p = positions.range().nth(row).map_or(row % tokens, |i| m.ints[i] as usize);
                for head in 0..heads {
                    for i in 0..2 {
                        let at = x.start() + row * stride + 1 + head * head_dim + i;
                        let (re, im) = (m.reals[at], m.reals[at + 2]);
                        let (cos, sin) = (libm::cos(angle(p, i)), libm::sin(angle(p, i)));
                        assert!((after[at] - (re * cos - im * sin)).abs() < 1e-15);
                        assert!((after[at + 2] - (re * sin + im * cos)).abs() < 1e-15);
                    }
                }
            }
            let back = m.run(|host| {
                host.rotate(&chunk(samples), &turn, table, positions, xs)?;
                let back = Rotary { back: true, ..turn };
                host.rotate(&chunk(samples), &back, table, positions, xs)
            });
            assert!(m.reals.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-15));
        }
    }

    #[test]
    fn gelu_gradient() {
        for kind in [Gelu::Tanh, Gelu::Exact] {
            let mut m = Memory::new();
            let (x, y, d) = (m.reals(40), m.reals(40), m.reals(40));
            for i in x.range() {
                m.reals[i] *= 5.0;
            }
            m.check(
                &[(x, d)],
                false,
                (y, d),
                |host| host.gelu(kind, x, y),
                |host| host.gelu_vjp(kind, x, d),
            );
        }
        for x in [-1e20_f32, 1e20, -3e38, 3e38, -40.0, 40.0] {
            let (y, slope) = (gelu(Gelu::Tanh, x), gelu_derivative(Gelu::Tanh, x));
            assert_eq!(
                (y, slope),
                (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
                "far out it is the identity or 0"
            );
        }
    }

    #[test]
    fn attention_gradient() {
        let lens: [Option<[i32; 2]>; 3] = [None, Some([3, 4]), Some([0, 2])];
        for (mask, queries, keys, tau, heads, kv_heads) in [
            (Mask::Full, 3, 4, false, 2, 2),
            (Mask::Causal, 4, 4, false, 2, 2),
            (Mask::Full, 5, 4, true, 2, 2),
            (Mask::Causal, 1, 1, false, 2, 2),
            (Mask::Others, 4, 4, true, 2, 2),
            (Mask::Others, 4, 4, false, 2, 1),
            (Mask::Causal, 4, 4, false, 6, 2),
            (Mask::Sliding(2), 4, 4, false, 2, 1),
            (Mask::Sliding(1), 4, 4, false, 2, 2),
        ] {
            for lens in lens {
                for dropout in [0.0, 0.4] {
                    let (n, head_dim) = (2, 3);
                    let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
                    let stride = 2 * kv_width + 1;
                    let mut m = Memory::new();
                    let key_lens = lens.map_or(Ints::EMPTY, |lens| m.ints(&lens));
                    // Two texts in the first sample, three in the second.
                    let packed = kv_heads == 2 && queries == 4;
                    let starts =
                        if packed { m.ints(&[0, 0, 0, 3, 0, 1, 1, 3]) } else { Ints::EMPTY };
                    let [temperature, temperature_grad] = [0; 2].map(|_| m.reals(usize::from(tau)));
                    let a = Attention {
                        draw: Draw::AttentionDropout,
                        heads,
                        kv_heads,
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
                    // The gradient of the temperature is added; from 0 on it is the gradient
                    // itself.
                    for i in temperature_grad.range() {
                        m.reals[i] = 0.0;
                    }
                    // q alone; k and v are columns of one matrix.
                    let (q, kv) = (m.reals(n * queries * width), m.reals(n * keys * stride));
                    let (out, lse) = (m.reals(n * queries * width), m.reals(n * queries * heads));
                    let (dq, dkv) = (m.reals(n * queries * width), m.reals(n * keys * stride));
                    let (dout, scratch) = (m.reals(n * queries * width), m.reals(keys));
                    // The columns of nobody keep what they hold; 0 is the gradient that differences
                    // give them.
                    for i in dkv.range() {
                        m.reals[i] = 0.0;
                    }
                    let [qs, dqs] = [q, dq].map(|of| Columns { of, stride: width, at: 0 });
                    let [k, dk] = [kv, dkv].map(|of| Columns { of, stride, at: 1 });
                    let [v, dv] = [kv, dkv].map(|of| Columns { of, stride, at: 1 + kv_width });
                    let chunk = chunk(n);
                    m.check(
                        &[(q, dq), (kv, dkv), (temperature, temperature_grad)],
                        false,
                        (out, dout),
                        |host| host.attention(&chunk, &a, qs, k, v, out, lse, scratch),
                        |host| {
                            host.attention_vjp(
                                &chunk, &a, qs, k, v, out, lse, dout, dqs, dk, dv, scratch,
                            )
                        },
                    );
                }
            }
        }
    }

    #[test]
    fn attention_of_one_head_by_hand() {
        // Equal scores: the mean of the visible values; lse = ln(number of keys) + score.
        let mut m = Memory::new();
        let key_lens = m.ints(&[2, 0]);
        let (q, k, v) = (m.reals(4), m.reals(6), m.reals(6));
        let (out, lse, scratch) = (m.reals(4), m.reals(4), m.reals(3));
        for i in q.range() {
            m.reals[i] = 0.0;
        }
        let a = Attention {
            draw: Draw::AttentionDropout,
            heads: 1,
            kv_heads: 1,
            starts: Ints::EMPTY,
            head_dim: 1,
            queries: 2,
            keys: 3,
            mask: Mask::Full,
            key_lens,
            dropout: 0.0,
            temperature: Reals::EMPTY,
            temperature_grad: Reals::EMPTY,
        };
        let [q, k, vs] = [q, k, v].map(|of| Columns { of, stride: 1, at: 0 });
        let after = m.run(|host| host.attention(&chunk(2), &a, q, k, vs, out, lse, scratch));
        let mean = (m.reals[v.start()] + m.reals[v.start() + 1]) / 2.0;
        assert!(
            (after[out.start()] - mean).abs() < 1e-15
                && (after[lse.start()] - 2.0_f64.ln()).abs() < 1e-15
        );
        assert_eq!(after[out.start() + 2..out.start() + 4], [0.0; 2], "no key is visible");
        assert_eq!(after[lse.start() + 2..lse.start() + 4], [f64::NEG_INFINITY; 2]);
    }

    /// With one key hidden of two, the other one's value is what comes out; alone, a query sees
    /// nothing.
    #[test]
    fn a_query_that_does_not_see_itself() {
        let mut m = Memory::new();
        let key_lens = m.ints(&[2, 1]);
        let (q, k, v) = (m.reals(4), m.reals(4), m.reals(4));
        let (out, lse, scratch) = (m.reals(4), m.reals(4), m.reals(2));
        let tau = m.reals(1);
        m.reals[tau.start()] = 0.5;
        let a = Attention {
            draw: Draw::AttentionDropout,
            heads: 1,
            kv_heads: 1,
            starts: Ints::EMPTY,
            head_dim: 1,
            queries: 2,
            keys: 2,
            mask: Mask::Others,
            key_lens,
            dropout: 0.0,
            temperature: tau,
            temperature_grad: Reals::EMPTY,
        };
        let [qs, ks, vs] = [q, k, v].map(|of| Columns { of, stride: 1, at: 0 });
        let after = m.run(|host| host.attention(&chunk(2), &a, qs, ks, vs, out, lse, scratch));
        let (q, k, v) = (&m.reals[q.range()], &m.reals[k.range()], &m.reals[v.range()]);
        let (out, lse) = (&after[out.range()], &after[lse.range()]);
        // Sample 0: each sees the other. Sample 1 has one key, which query 0 must not see.
        assert_eq!(out, [v[1], v[0], 0.0, v[2]]);
        assert_eq!(lse[2], f64::NEG_INFINITY);
        for (lse, score) in [(lse[0], q[0] * k[1]), (lse[1], q[1] * k[0]), (lse[3], q[3] * k[2])] {
            assert!((lse - 0.5_f64.exp() * score).abs() < 1e-15);
        }
    }

    /// Dropped weights do not change the softmax's denominator, and over many elements the mean
    /// stays.
    #[test]
    fn dropout_keeps_the_mean() {
        let mut m = Memory::new();
        let x = m.reals(40_000);
        m.reals.fill(1.0);
        let after = m.run(|host| host.dropout(&chunk(4), Draw::EmbeddingDropout, 0.25, x));
        let kept = after.iter().filter(|&&x| x == 1.0 / 0.75).count();
        assert_eq!(kept + after.iter().filter(|&&x| x == 0.0).count(), 40_000);
        // Five standard deviations of 40,000 draws.
        assert!((kept as f64 - 30_000.0).abs() < 5.0 * 7500.0_f64.sqrt());
    }

    #[test]
    fn dropout_gradient() {
        let mut m = Memory::new();
        let (x, y, d) = (m.reals(34), m.reals(34), m.reals(34));
        let drop =
            |host: &mut Host<'_>, h| host.dropout(&chunk(2), Draw::MlpResidualDropout, 0.5, h);
        m.check(
            &[(x, d)],
            false,
            (y, d),
            |host| host.copy_reals(x, y).and_then(|()| drop(host, y)),
            |host| drop(host, d),
        );
    }

    #[test]
    fn embed_gradient() {
        let (n, length, vocab, width) = (2, 3, 5, 4);
        let mut m = Memory::new();
        let tokens = m.ints(&[4, 0, 4, 2, 2, 1]);
        let (table, positions) = (m.reals(vocab * width), m.reals((length + 1) * width));
        let (x, dx) = (m.reals(n * length * width), m.reals(n * length * width));
        let (dtable, dpositions) = (m.reals(vocab * width), m.reals((length + 1) * width));
        m.check(
            &[(table, dtable), (positions, dpositions)],
            true,
            (x, dx),
            |host| host.embed(&chunk(n), tokens, table, positions, width, x),
            |host| host.embed_vjp(&chunk(n), tokens, dx, width, dtable, dpositions),
        );
    }

    #[test]
    fn cross_entropy_gradient() {
        for smoothing in [0.0, 0.1, 1.0] {
            cross_entropy_gradient_of(smoothing);
        }
    }

    fn cross_entropy_gradient_of(smoothing: f64) {
        let (rows, vocab) = (5, 6);
        let ce = CrossEntropy { vocab, tokens: 5, row: 0, scale: 0.3, smoothing };
        let mut m = Memory::new();
        let targets = m.ints(&[5, -1, 0, 3, -100]);
        let (logits, losses, scale) = (m.reals(rows * vocab), m.reals(rows), m.reals(rows));
        for i in logits.range() {
            m.reals[i] *= 4.0;
        }
        for i in scale.range() {
            m.reals[i] = ce.scale;
        }
        // The gradient takes the place of the logits.
        m.check(
            &[(logits, logits)],
            false,
            (losses, scale),
            |host| host.cross_entropy(&chunk(1), &ce, logits, targets, losses),
            |_| Ok(()),
        );
        let after = m.run(|host| host.cross_entropy(&chunk(1), &ce, logits, targets, losses));
        let row = &m.reals[logits.range()][2 * vocab..3 * vocab];
        let mean = row.iter().sum::<f64>() / vocab as f64;
        let loss = row.iter().map(|x| x.exp()).sum::<f64>().ln()
            - (1.0 - smoothing) * row[0]
            - smoothing * mean;
        assert!((after[losses.start() + 2] - loss).abs() < 1e-14);
        assert_eq!((after[losses.start() + 1], after[losses.start() + 4]), (0.0, 0.0));
    }
}
