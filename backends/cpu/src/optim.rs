//! [`OptimOps`]: one pass over memory per update; two more for SET-Adam's sums, and for Adafactor's
//! of a matrix three more over its gradient.

use core::ops::Range;

use bdia_core::codes::{self, PER_WORD, SIGNED, UNSIGNED};
use bdia_core::optim::{Rule, Update};
use bdia_core::{Exchange, Fault, OptimOps, Reals, Result, Site, State};
use wide::f32x8;

use crate::memory::{Shared, split};
use crate::simd::{LANES, load_part};
use crate::{BLOCK, Cpu, Team};

/// Partial sums of one tensor: a fixed number, whatever its length, so that they fit the stack.
const PARTIALS: usize = 256;

/// Combines `f(part)` of a slice cut into [`PARTIALS`] parts, in their order.
fn partials<R: Copy + Send>(
    team: &Team,
    x: &[f32],
    none: R,
    f: impl Fn(&[f32]) -> R + Sync,
    join: fn(R, R) -> R,
) -> R {
    // Small tensors in few parts.
    partials_of(team, x.len(), 1024, none, |part| f(&x[part]), join)
}

/// Combines `f(part)` of `0..n` cut into [`PARTIALS`] parts of at least `least`, in their order.
fn partials_of<R: Copy + Send>(
    team: &Team,
    n: usize,
    least: usize,
    none: R,
    f: impl Fn(Range<usize>) -> R + Sync,
    join: fn(R, R) -> R,
) -> R {
    let mut results = [none; PARTIALS];
    let size = n.div_ceil(PARTIALS).max(least);
    let shared = Shared::new(&mut results);
    team.each(n.div_ceil(size), |_, i| {
        let result = f(i * size..n.min((i + 1) * size));
        // SAFETY: each part has a result of its own.
        unsafe { shared.part(i, 1)[0] = result };
    });
    results.into_iter().fold(none, join)
}

/// `Σ g(x)` in `f64`, eight partial sums.
fn sum_wide(x: &[f32], g: impl Fn(f32) -> f64) -> f64 {
    let (body, tail) = x.as_chunks::<LANES>();
    let mut acc = [0.0_f64; LANES];
    for a in body {
        for i in 0..LANES {
            acc[i] += g(a[i]);
        }
    }
    tail.iter().fold(acc.iter().sum(), |sum, &x| sum + g(x))
}

/// `1 − β^t`.
fn correction(beta: f64, t: u32) -> f64 {
    1.0 - libm::pow(beta, f64::from(t))
}

/// Four tensors of the same length, or empty ones, block by block.
struct Tensors<'a> {
    p: Shared<'a, f32>,
    g: &'a [f32],
    m: Shared<'a, f32>,
    v: Shared<'a, f32>,
}

impl Tensors<'_> {
    /// `f(p, g, m, v)` over lanes; the results replace `p`, `m` and `v`. Empty state reads as 0 and
    /// stays empty.
    fn each(&self, team: &Team, f: impl Fn([f32x8; 4]) -> [f32x8; 3] + Sync) {
        let len = self.p.len();
        team.each(len.div_ceil(BLOCK), |_, b| {
            let (at, n) = (b * BLOCK, BLOCK.min(len - b * BLOCK));
            let states = |s: &Shared<f32>| if s.len() == 0 { (0, 0) } else { (at, n) };
            let ((m_at, m_n), (v_at, v_n)) = (states(&self.m), states(&self.v));
            // SAFETY: blocks are disjoint, and the tensors come from disjoint handles.
            let (p, m, v) =
                unsafe { (self.p.part(at, n), self.m.part(m_at, m_n), self.v.part(v_at, v_n)) };
            block(p, &self.g[at..at + n], m, v, &f);
        });
    }
}

#[inline]
fn block(
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    f: impl Fn([f32x8; 4]) -> [f32x8; 3],
) {
    let take = |s: &[f32], i: usize| {
        let rest = s.get(i..).unwrap_or(&[]);
        match rest.first_chunk::<LANES>() {
            Some(a) => f32x8::new(*a),
            None => load_part(rest, 0.0),
        }
    };
    let put = |s: &mut [f32], i: usize, x: f32x8| {
        let rest = s.get_mut(i..).unwrap_or(&mut []);
        match rest.first_chunk_mut::<LANES>() {
            Some(a) => *a = x.to_array(),
            None => {
                let n = rest.len();
                rest.copy_from_slice(&x.to_array()[..n]);
            }
        }
    };
    for i in (0..p.len()).step_by(LANES) {
        let [np, nm, nv] = f([take(p, i), take(g, i), take(m, i), take(v, i)]);
        put(p, i, np);
        put(m, i, nm);
        put(v, i, nv);
    }
}

impl Exchange for Cpu {}

/// Bits of a number that are not in the number of its cell: all but the exponent and 6 bits of the
/// fraction.
const CELL_SHIFT: u32 = 23 - 6;
/// The first cell: magnitudes below it have the code of 0.
const FIRST_CELL: u32 = 1e-7_f32.to_bits() >> CELL_SHIFT;
/// The last one begins at 1, the largest magnitude.
const CELLS: usize = (1.0_f32.to_bits() >> CELL_SHIFT) as usize - FIRST_CELL as usize + 1;

/// Finds the nearest code of a magnitude with a look at its first bits: a cell of numbers that
/// share these has at most two boundaries between codes.
struct Cells {
    /// The code of a cell's least number.
    lowest: [u8; CELLS],
    /// What lies between a code and the one above it.
    bounds: [f32; 256],
}

static FIRST: Cells = Cells::new(&SIGNED, codes::ZERO);
static SECOND: Cells = Cells::new(&UNSIGNED, 0);

impl Cells {
    const fn new(table: &[f32; 256], zero: u8) -> Self {
        let (mut lowest, mut bounds) = ([0; CELLS], [f32::INFINITY; 256]);
        let mut code = 0;
        while code < 255 {
            bounds[code] = codes::between(table, code);
            code += 1;
        }
        let (mut cell, mut code) = (0, zero);
        while cell < CELLS {
            let least = f32::from_bits((FIRST_CELL + cell as u32) << CELL_SHIFT);
            // Below the first cell there is more to look at, and no boundary.
            while cell > 0 && bounds[code as usize] < least {
                code += 1;
            }
            lowest[cell] = code;
            cell += 1;
        }
        Self { lowest, bounds }
    }

    /// The code for a magnitude of 0 to 1, past every boundary that `is_below` it.
    #[inline]
    fn code(&self, magnitude: f32, is_below: impl Fn(f32) -> bool) -> u8 {
        let cell = (magnitude.to_bits() >> CELL_SHIFT).saturating_sub(FIRST_CELL) as usize;
        let code = self.lowest[cell.min(CELLS - 1)];
        let code = code + u8::from(is_below(self.bounds[usize::from(code)]));
        code + u8::from(is_below(self.bounds[usize::from(code)]))
    }
}

/// [`codes::first`] of a value from -1 to 1.
#[inline]
fn first_code(x: f32) -> u8 {
    let magnitude = x.abs();
    if x < 0.0 {
        // The mirror image, with ties to the lower code as well; −1 itself has none.
        let code = FIRST.code(magnitude, |bound| bound <= magnitude).min(2 * codes::ZERO);
        codes::keep_sign(2 * codes::ZERO - code, x)
    } else {
        FIRST.code(magnitude, |bound| bound < magnitude)
    }
}

/// [`codes::second`] of a value from 0 to 1.
#[inline]
fn second_code(x: f32) -> u8 {
    SECOND.code(x, |bound| bound < x).max(u8::from(x > 0.0))
}

/// A tensor whose moments are codes, `codes::BLOCK` values with their largest magnitudes at a time.
struct Coded<'a> {
    p: Shared<'a, f32>,
    g: &'a [f32],
    most: [Shared<'a, f32>; 2],
    codes: [Shared<'a, u32>; 2],
}

impl Coded<'_> {
    /// `moments([g, m, v])` are the new moments, `step(p, m, v)` the new parameter.
    fn each(
        &self,
        team: &Team,
        moments: impl Fn([f32x8; 3]) -> (f32x8, f32x8) + Sync,
        step: impl Fn(f32x8, f32x8, f32x8) -> f32x8 + Sync,
    ) {
        let len = self.p.len();
        team.each(len.div_ceil(BLOCK), |_, b| {
            for at in (b * BLOCK..len.min((b + 1) * BLOCK)).step_by(codes::BLOCK) {
                let n = codes::BLOCK.min(len - at);
                let (block, word, words) = (at / codes::BLOCK, at / PER_WORD, n.div_ceil(PER_WORD));
                // SAFETY: blocks are disjoint and of whole words, and the tensors come from
                // disjoint handles.
                let (p, most, codes) = unsafe {
                    (
                        self.p.part(at, n),
                        [self.most[0].part(block, 1), self.most[1].part(block, 1)],
                        [self.codes[0].part(word, words), self.codes[1].part(word, words)],
                    )
                };
                coded_block(p, &self.g[at..at + n], most, codes, &moments, &step);
            }
        });
    }
}

#[inline]
fn coded_block(
    p: &mut [f32],
    g: &[f32],
    most: [&mut [f32]; 2],
    codes: [&mut [u32]; 2],
    moments: impl Fn([f32x8; 3]) -> (f32x8, f32x8),
    step: impl Fn(f32x8, f32x8, f32x8) -> f32x8,
) {
    let ([most_m, most_v], [first, second]) = (most, codes);
    let (mut m, mut v) = ([f32x8::ZERO; codes::BLOCK / LANES], [f32x8::ZERO; codes::BLOCK / LANES]);
    let (old_m, old_v) = (f32x8::splat(most_m[0]), f32x8::splat(most_v[0]));
    let (mut new_m, mut new_v) = (f32x8::ZERO, f32x8::ZERO);
    for (i, g) in g.chunks(LANES).enumerate() {
        // What is beyond the end stays 0.
        let values = |table: &[f32; 256], words: &[u32]| {
            let mut values = [0.0; LANES];
            for (j, value) in values[..g.len()].iter_mut().enumerate() {
                let word = words[(i * LANES + j) / PER_WORD];
                *value = table[(word >> (8 * (j % PER_WORD)) & 0xFF) as usize];
            }
            f32x8::new(values)
        };
        let (old_m, old_v) = (values(&SIGNED, first) * old_m, values(&UNSIGNED, second) * old_v);
        (m[i], v[i]) = moments([load_part(g, 0.0), old_m, old_v]);
        (new_m, new_v) = (new_m.max(m[i].abs()), new_v.max(v[i]));
    }
    let largest = |x: f32x8| x.to_array().into_iter().fold(0.0, f32::max);
    (most_m[0], most_v[0]) = (largest(new_m), largest(new_v));
    let part = |x: f32x8, most: f32| {
        if most > 0.0 { (x / f32x8::splat(most)).to_array() } else { [0.0; LANES] }
    };
    for (i, p) in p.chunks_mut(LANES).enumerate() {
        let n = p.len();
        p.copy_from_slice(&step(load_part(p, 0.0), m[i], v[i]).to_array()[..n]);
        let (m, v) = (part(m[i], most_m[0]), part(v[i], most_v[0]));
        for (k, from) in (0..n).step_by(PER_WORD).enumerate() {
            let (mut a, mut b) = (0, 0);
            for j in from..n.min(from + PER_WORD) {
                a |= u32::from(first_code(m[j])) << (8 * (j - from));
                b |= u32::from(second_code(v[j])) << (8 * (j - from));
            }
            let word = i * LANES / PER_WORD + k;
            (first[word], second[word]) = (a, b);
        }
    }
}

/// One update by Adafactor, as the reference backend has it.
struct Adafactor {
    lr: f64,
    shrink: f32,
    scale: f32,
    take: f64,
    eps: f64,
    threshold: f64,
}

/// Columns whose sums one thread takes at a time.
const STRIP: usize = 128;

impl Adafactor {
    fn square(&self, g: f32) -> f64 {
        let g = f64::from(self.scale * g);
        g * g
    }

    /// A second moment after `mean` squares.
    fn moved(&self, old: f32, mean: f64) -> f32 {
        (1.0 - self.take) as f32 * old + self.take as f32 * (mean + self.eps) as f32
    }

    /// The factor of `n` steps whose squares have this sum.
    fn rate(&self, squares: f64, n: usize) -> f32 {
        (self.lr / ((squares / n as f64).sqrt() / self.threshold).max(1.0)) as f32
    }

    fn vector(&self, team: &Team, p: &mut [f32], g: &[f32], v: &mut [f32]) {
        let (n, moments) = (p.len(), Shared::new(v));
        let step = |g: f32, v: f32| self.scale * g / v.sqrt();
        let squares = |part: Range<usize>| {
            // SAFETY: parts are disjoint.
            let v = unsafe { moments.part(part.start, part.len()) };
            for (g, v) in g[part.clone()].iter().zip(v.iter_mut()) {
                *v = self.moved(*v, self.square(*g));
            }
            sum_pairs(&g[part], v, |g, v| f64::from(step(g, v)).powi(2))
        };
        let squares = partials_of(team, n, 1024, 0.0, squares, |a, b| a + b);
        let (rate, p) = (self.rate(squares, n), Shared::new(p));
        team.each(n.div_ceil(BLOCK), |_, b| {
            let (at, n) = (b * BLOCK, BLOCK.min(n - b * BLOCK));
            // SAFETY: blocks are disjoint, and the passes come one after the other.
            let (p, v) = unsafe { (p.part(at, n), moments.view(at, n)) };
            for i in 0..n {
                p[i] = p[i] - self.shrink * p[i] - rate * step(g[at + i], v[i]);
            }
        });
    }

    fn matrix(
        &self,
        team: &Team,
        cols: usize,
        p: &mut [f32],
        g: &[f32],
        row: &mut [f32],
        col: &mut [f32],
    ) {
        let (rows, least) = (row.len(), BLOCK.div_ceil(cols));
        let line = |i: usize| &g[i * cols..(i + 1) * cols];
        let all = Shared::new(row);
        team.each(rows.div_ceil(least), |_, part| {
            let (first, n) = (part * least, least.min(rows - part * least));
            // SAFETY: parts are disjoint.
            for (i, row) in unsafe { all.part(first, n) }.iter_mut().enumerate() {
                let sum = sum_wide(line(first + i), |g| self.square(g));
                *row = self.moved(*row, sum / cols as f64);
            }
        });
        // Row after row for each column: no sum depends on how many threads there are.
        let all = Shared::new(col);
        team.each(cols.div_ceil(STRIP), |_, strip| {
            let (at, n) = (strip * STRIP, STRIP.min(cols - strip * STRIP));
            let mut sums = [0.0; STRIP];
            for i in 0..rows {
                for (sum, g) in sums.iter_mut().zip(&line(i)[at..at + n]) {
                    *sum += self.square(*g);
                }
            }
            // SAFETY: strips are disjoint.
            for (col, sum) in unsafe { all.part(at, n) }.iter_mut().zip(sums) {
                *col = self.moved(*col, sum / rows as f64);
            }
        });
        let mean = (row.iter().map(|r| f64::from(*r)).sum::<f64>() / rows as f64) as f32;
        let (row, col) = (&*row, &*col);
        let inverse = |i: usize| 1.0 / (row[i] / mean).sqrt();
        let step = |inverse: f32, g: f32, col: f32| self.scale * g * (inverse * (1.0 / col.sqrt()));
        let squares = |part: Range<usize>| {
            part.map(|i| {
                let inverse = inverse(i);
                sum_pairs(line(i), col, |g, col| f64::from(step(inverse, g, col)).powi(2))
            })
            .sum()
        };
        let squares = partials_of(team, rows, least, 0.0, squares, |a, b| a + b);
        let (rate, p) = (self.rate(squares, p.len()), Shared::new(p));
        team.each(rows.div_ceil(least), |_, part| {
            for i in part * least..rows.min((part + 1) * least) {
                // SAFETY: rows are disjoint.
                let (p, inverse) = (unsafe { p.part(i * cols, cols) }, inverse(i));
                for ((p, g), col) in p.iter_mut().zip(line(i)).zip(col) {
                    *p = *p - self.shrink * *p - rate * step(inverse, *g, *col);
                }
            }
        });
    }
}

/// `Σ f(x, y)` in `f64`, eight partial sums.
fn sum_pairs(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f64) -> f64 {
    let ((x, x_tail), (y, y_tail)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let mut acc = [0.0_f64; LANES];
    for (x, y) in x.iter().zip(y) {
        for i in 0..LANES {
            acc[i] += f(x[i], y[i]);
        }
    }
    x_tail.iter().zip(y_tail).fold(acc.iter().sum(), |sum, (&x, &y)| sum + f(x, y))
}

impl OptimOps for Cpu {
    /// Also raises [`Fault::Gradient`] where the sum itself leaves the range of `f32`: no norm, no
    /// clipping.
    fn sum_squares(&mut self, site: Site, g: Reals, out: Reals) -> Result<()> {
        self.arenas().sum_squares(g, out)?;
        let [g, out] = split(&mut self.reals, [g, out], "sum_squares")?;
        let square = |x: f32| f64::from(x) * f64::from(x);
        let sum = partials(&self.team, g, 0.0, |part| sum_wide(part, square), |a, b| a + b);
        out[0] = sum as f32;
        if !out[0].is_finite() {
            self.fault.get_or_insert(Fault::Gradient { site });
        }
        Ok(())
    }

    fn update(
        &mut self,
        u: &Update,
        shape: [usize; 2],
        p: Reals,
        g: Reals,
        state: &State,
    ) -> Result<()> {
        self.arenas().update(u, shape, p, g, state)?;
        let [m, v] = state.reals;
        let [p, g, m, v] = split(&mut self.reals, [p, g, m, v], "update")?;
        let codes = split(&mut self.words, state.codes, "update")?;
        if self.fault.is_some() {
            return Ok(());
        }
        let (team, s) = (&self.team, f32x8::splat);
        let (shrink, scale) = (s((u.lr * u.decay) as f32), s(u.scale as f32));
        let zero = f32x8::ZERO;
        // m ← β1·m + (1-β1)·g,  v ← β2·v + (1-β2)·g²
        let moments = |beta1: f64, beta2: f64| {
            let (keep1, take1) = (s(beta1 as f32), s((1.0 - beta1) as f32));
            let (keep2, take2) = (s(beta2 as f32), s((1.0 - beta2) as f32));
            move |g: f32x8, m: f32x8, v: f32x8| (keep1 * m + take1 * g, keep2 * v + take2 * (g * g))
        };
        // θ ← θ − rate·m/(√(v/correction) + ε)
        let step = |beta1: f64, beta2: f64, eps: f64| {
            let (rate, eps) = (s((u.lr / correction(beta1, u.t)) as f32), s(eps as f32));
            let inverse = s((1.0 / correction(beta2, u.t)) as f32);
            move |p: f32x8, m: f32x8, v: f32x8| {
                let denominator = (v * inverse).sqrt() + eps;
                // A zero denominator (no gradient yet and ε = 0) moves nothing.
                let step = denominator.simd_gt(zero).select(rate * m / denominator, zero);
                p - shrink * p - step
            }
        };
        if let (Rule::AdamW8bit { beta1, beta2, eps }, false) = (u.rule, codes[0].is_empty()) {
            let [first, second] = codes;
            let t = Coded {
                p: Shared::new(p),
                g,
                most: [Shared::new(m), Shared::new(v)],
                codes: [Shared::new(first), Shared::new(second)],
            };
            let (moments, step) = (moments(beta1, beta2), step(beta1, beta2, eps));
            t.each(team, |[g, m, v]| moments(g * scale, m, v), step);
            return Ok(());
        }
        if let Rule::Adafactor { decay, eps, threshold } = u.rule {
            let take = libm::pow(f64::from(u.t), -decay);
            let rule = Adafactor {
                lr: u.lr,
                shrink: (u.lr * u.decay) as f32,
                scale: u.scale as f32,
                take,
                eps,
                threshold,
            };
            match shape {
                [0 | 1, _] | [_, 0 | 1] => rule.vector(team, p, g, m),
                [_, cols] => rule.matrix(team, cols, p, g, m, v),
            }
            return Ok(());
        }
        let t = Tensors { p: Shared::new(p), g, m: Shared::new(m), v: Shared::new(v) };
        match u.rule {
            Rule::Adafactor { .. } => {}
            Rule::Sgd { momentum } => {
                let (momentum, lr) = (s(momentum as f32), s(u.lr as f32));
                t.each(team, |[p, g, m, v]| {
                    let m = momentum * m + g * scale;
                    [p - shrink * p - lr * m, m, v]
                });
            }
            Rule::AdamW { beta1, beta2, eps } | Rule::AdamW8bit { beta1, beta2, eps } => {
                let (moments, step) = (moments(beta1, beta2), step(beta1, beta2, eps));
                t.each(team, |[p, g, m, v]| {
                    let (m, v) = moments(g * scale, m, v);
                    [step(p, m, v), m, v]
                });
            }
            Rule::SetAdam { beta1, beta2, eps } => {
                let moments = moments(beta1, beta2);
                t.each(team, |[p, g, m, v]| {
                    let (m, v) = moments(g * scale, m, v);
                    [p - shrink * p, m, v]
                });
                let len = t.v.len();
                // SAFETY: the parts of the pass above are gone, and those of the pass below come
                // after `v`'s last use.
                let v = unsafe { t.v.part(0, len) };
                let most = |part: &[f32]| {
                    part.iter().fold((f32::INFINITY, 0.0_f32), |(a, b), &x| (a.min(x), b.max(x)))
                };
                let (low, high) = partials(team, v, (f32::INFINITY, 0.0), most, |a, b| {
                    (a.0.min(b.0), a.1.max(b.1))
                });
                if high == 0.0 {
                    return Ok(());
                }
                // The sums are those of u = v/max v, whose squares do not underflow.
                let sums = |part: &[f32]| {
                    (
                        sum_wide(part, |v| f64::from(v / high)),
                        sum_wide(part, |v| f64::from(v / high) * f64::from(v / high)),
                    )
                };
                let (sum, squares) =
                    partials(team, v, (0.0, 0.0), sums, |a, b| (a.0 + b.0, a.1 + b.1));
                let factor = (sum * sum / (len as f64 * squares) / correction(beta2, u.t)) as f32;
                // w grows with v, so its smallest value is that of the smallest v.
                let half = s(0.5 * (low * factor + eps as f32).sqrt());
                let (rate, factor, eps) =
                    (s((u.lr / correction(beta1, u.t)) as f32), s(factor), s(eps as f32));
                t.each(team, |[p, _, m, v]| {
                    let denominator = (v * factor + eps).sqrt() - half;
                    [p - denominator.simd_gt(zero).select(rate * m / denominator, zero), m, v]
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On both sides of every boundary, and everywhere between.
    #[test]
    fn codes_are_the_nearest() {
        let check = |x: f32| {
            assert_eq!(first_code(x), codes::first(x), "{x:e}");
            assert_eq!(first_code(-x), codes::first(-x), "{:e}", -x);
            assert_eq!(second_code(x), codes::second(x), "{x:e}");
        };
        for table in [&SIGNED, &UNSIGNED] {
            for bound in (0..255).map(|code| codes::between(table, code).abs()) {
                [bound.next_down(), bound, bound.next_up()].into_iter().for_each(check);
            }
        }
        (0..=1.0_f32.to_bits()).step_by(997).map(f32::from_bits).for_each(check);
        [0.0, 1.0, f32::MIN_POSITIVE, 1e-45].into_iter().for_each(check);
    }
}
