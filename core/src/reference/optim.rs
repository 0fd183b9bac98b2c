//! [`OptimOps`] of the reference backend.

use core::slice::from_mut;

use super::{Reference, split};
use crate::arena::Reals;
use crate::backend::{Exchange, OptimOps, State};
use crate::codes::{self, BLOCK, PER_WORD, SIGNED, UNSIGNED};
use crate::error::{Fault, Result, Site};
use crate::optim::{Rule, Update};
use crate::real::Real;

impl<R: Real> Exchange for Reference<'_, R> {}

impl<R: Real> OptimOps for Reference<'_, R> {
    /// Also raises [`Fault::Gradient`] where the sum itself leaves the range of the real type: no
    /// norm, no clipping.
    fn sum_squares(&mut self, site: Site, g: Reals, out: Reals) -> Result<()> {
        self.arenas().sum_squares(g, out)?;
        let [g, out] = split(self.reals, [g.range(), out.range()], "sum_squares")?;
        let mut sum = 0.0;
        for g in g.iter() {
            sum += g.wide() * g.wide();
        }
        out[0] = R::of(sum);
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
        let [p, g, m, v] =
            split(self.reals, [p.range(), g.range(), m.range(), v.range()], "update")?;
        let codes = split(self.words, state.codes.map(|h| h.range()), "update")?;
        if self.fault.is_some() {
            return Ok(());
        }
        // θ ← θ − η·decay·θ
        let shrink = R::of(u.lr * u.decay);
        for p in p.iter_mut() {
            *p -= shrink * *p;
        }
        let scale = R::of(u.scale);
        match u.rule {
            Rule::Sgd { momentum } => sgd(momentum, u.lr, scale, p, g, m),
            Rule::AdamW { beta1, beta2, eps } => {
                moments(beta1, beta2, scale, g, m, v);
                adam_w(u.lr / correction(beta1, u.t), correction(beta2, u.t), eps, p, m, v);
            }
            Rule::SetAdam { beta1, beta2, eps } => {
                moments(beta1, beta2, scale, g, m, v);
                set_adam(u.lr / correction(beta1, u.t), correction(beta2, u.t), eps, p, m, v);
            }
            Rule::AdamW8bit { beta1, beta2, eps } => {
                let (rate, correction) = (u.lr / correction(beta1, u.t), correction(beta2, u.t));
                let moments =
                    |g: &[R], m: &mut [R], v: &mut [R]| moments(beta1, beta2, scale, g, m, v);
                let step = |p: &mut [R], m: &[R], v: &[R]| adam_w(rate, correction, eps, p, m, v);
                if codes[0].is_empty() {
                    moments(g, m, v);
                    step(p, m, v);
                } else {
                    adam_w_8bit(moments, step, p, g, [m, v], codes);
                }
            }
            Rule::Adafactor { decay, eps, threshold } => {
                let take = libm::pow(f64::from(u.t), -decay);
                let rule = Adafactor { lr: u.lr, take, eps, threshold, scale };
                let [rows, cols] = shape;
                if rows > 1 && cols > 1 {
                    rule.matrix(cols, p, g, m, v)
                } else {
                    rule.vector(p, g, m)
                }
            }
        }
        Ok(())
    }
}

/// `1 − β^t`.
fn correction(beta: f64, t: u32) -> f64 {
    1.0 - libm::pow(beta, f64::from(t))
}

/// `m ← μ·m + g`, `θ ← θ − η·m`; without a buffer `θ ← θ − η·g`.
fn sgd<R: Real>(momentum: f64, lr: f64, scale: R, p: &mut [R], g: &[R], m: &mut [R]) {
    let (momentum, lr) = (R::of(momentum), R::of(lr));
    for i in 0..p.len() {
        let mut step = scale * g[i];
        if let Some(m) = m.get_mut(i) {
            *m = momentum * *m + step;
            step = *m;
        }
        p[i] -= lr * step;
    }
}

/// `m ← β1·m + (1-β1)·g`, `v ← β2·v + (1-β2)·g²`.
fn moments<R: Real>(beta1: f64, beta2: f64, scale: R, g: &[R], m: &mut [R], v: &mut [R]) {
    let (keep1, take1, keep2, take2) =
        (R::of(beta1), R::of(1.0 - beta1), R::of(beta2), R::of(1.0 - beta2));
    for i in 0..g.len() {
        let g = scale * g[i];
        m[i] = keep1 * m[i] + take1 * g;
        v[i] = keep2 * v[i] + take2 * (g * g);
    }
}

/// `θ ← θ − rate·m/(√(v/correction) + ε)`, `rate = η/(1-β1^t)`, `correction = 1-β2^t`. A zero
/// denominator (no gradient yet and ε = 0) moves nothing.
fn adam_w<R: Real>(rate: f64, correction: f64, eps: f64, p: &mut [R], m: &[R], v: &[R]) {
    let (rate, inverse, eps) = (R::of(rate), R::of(1.0 / correction), R::of(eps));
    for i in 0..p.len() {
        let denominator = (v[i] * inverse).root() + eps;
        if denominator > R::zero() {
            p[i] -= rate * m[i] / denominator;
        }
    }
}

/// SET-Adam (arXiv 2302.01029, algorithm 1):
/// ```text
/// ṽ = v·(Σv)²/(n·Σv²),  w = √(ṽ/correction + ε),  w̃ = w − ½·min(w),  θ ← θ − rate·m/w̃
/// ```
/// The sums are those of `u = v/max v`, whose squares do not underflow. Where all of `v` is 0
/// nothing moves.
fn set_adam<R: Real>(rate: f64, correction: f64, eps: f64, p: &mut [R], m: &[R], v: &[R]) {
    let mut max = R::zero();
    for &v in v {
        max = max.max(v);
    }
    if max == R::zero() {
        return;
    }
    let (mut sum, mut squares) = (0.0, 0.0);
    for &v in v {
        let u = (v / max).wide();
        sum += u;
        squares += u * u;
    }
    let scale = R::of(sum * sum / (v.len() as f64 * squares) / correction);
    let (rate, eps) = (R::of(rate), R::of(eps));
    let w = |v: R| (v * scale + eps).root();
    let mut min = R::infinity();
    for &v in v {
        min = min.min(w(v));
    }
    let half = R::of(0.5) * min;
    for i in 0..p.len() {
        let denominator = w(v[i]) - half;
        if denominator > R::zero() {
            p[i] -= rate * m[i] / denominator;
        }
    }
}

/// AdamW over moments in 8 bits, block by block; `moments(g, m, v)` and `step(p, m, v)` are those
/// of AdamW. Moments are computed twice, for the largest magnitude and then for their codes, so
/// that a block needs no room of its own.
// Not part of the frame of every update: a microcontroller has little stack.
#[inline(never)]
fn adam_w_8bit<R: Real>(
    moments: impl Fn(&[R], &mut [R], &mut [R]),
    step: impl Fn(&mut [R], &[R], &[R]),
    p: &mut [R],
    g: &[R],
    [largest_m, largest_v]: [&mut [R]; 2],
    [first, second]: [&mut [u32]; 2],
) {
    let value = |table: &[f32; 256], largest: R, codes: u32, i: usize| {
        R::of(table[(codes >> (8 * i) & 0xFF) as usize].into()) * largest
    };
    for (block, (p, g)) in p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).enumerate() {
        let words = block * BLOCK / PER_WORD;
        let (first, second) = (&mut first[words..], &mut second[words..]);
        let old = [largest_m[block], largest_v[block]];
        let moments = |g: R, codes: [u32; 2], i: usize| {
            let mut m = value(&SIGNED, old[0], codes[0], i);
            let mut v = value(&UNSIGNED, old[1], codes[1], i);
            moments(&[g], from_mut(&mut m), from_mut(&mut v));
            [m, v]
        };
        let mut most = [R::zero(); 2];
        for (i, g) in g.iter().enumerate() {
            let word = i / PER_WORD;
            let new = moments(*g, [first[word], second[word]], i % PER_WORD);
            most = [0, 1].map(|k| most[k].max(new[k].abs()));
        }
        (largest_m[block], largest_v[block]) = (most[0], most[1]);
        let part = |x: R, most: R| if most > R::zero() { (x / most).wide() as f32 } else { 0.0 };
        for (word, (p, g)) in p.chunks_mut(PER_WORD).zip(g.chunks(PER_WORD)).enumerate() {
            let (old, mut new) = ([first[word], second[word]], [0; 2]);
            for (i, (p, g)) in p.iter_mut().zip(g).enumerate() {
                let [m, v] = moments(*g, old, i);
                step(from_mut(p), &[m], &[v]);
                new[0] |= u32::from(codes::first(part(m, most[0]))) << (8 * i);
                new[1] |= u32::from(codes::second(part(v, most[1]))) << (8 * i);
            }
            (first[word], second[word]) = (new[0], new[1]);
        }
    }
}

/// One update by Adafactor (arXiv 1804.04235, algorithms 4 and 5 without a first moment, as
/// transformers' `Adafactor` with a learning rate from outside). With `β = 1 − take`, `take =
/// t^-decay`, and means over rows and columns of a matrix:
/// ```text
/// r ← β·r + take·mean_j (g² + ε)     c ← β·c + take·mean_i (g² + ε)
/// u = g / √(r·c / mean r)            θ ← θ − η·u / max(1, rms(u)/threshold)
/// ```
struct Adafactor<R> {
    lr: f64,
    take: f64,
    eps: f64,
    threshold: f64,
    scale: R,
}

impl<R: Real> Adafactor<R> {
    fn square(&self, g: R) -> f64 {
        let g = (self.scale * g).wide();
        g * g
    }

    /// A second moment after `mean` squares.
    fn moved(&self, old: R, mean: f64) -> R {
        R::of(1.0 - self.take) * old + R::of(self.take) * R::of(mean + self.eps)
    }

    /// The factor of `n` steps whose squares have this sum.
    fn rate(&self, squares: f64, n: usize) -> R {
        R::of(self.lr / (libm::sqrt(squares / n as f64) / self.threshold).max(1.0))
    }

    // As above.
    #[inline(never)]
    fn vector(&self, p: &mut [R], g: &[R], v: &mut [R]) {
        let mut squares = 0.0;
        for (g, v) in g.iter().zip(v.iter_mut()) {
            *v = self.moved(*v, self.square(*g));
            let step = (self.scale * *g / v.root()).wide();
            squares += step * step;
        }
        let rate = self.rate(squares, p.len());
        for i in 0..p.len() {
            p[i] -= rate * (self.scale * g[i] / v[i].root());
        }
    }

    #[inline(never)]
    fn matrix(&self, cols: usize, p: &mut [R], g: &[R], row: &mut [R], col: &mut [R]) {
        for (row, g) in row.iter_mut().zip(g.chunks(cols)) {
            let sum: f64 = g.iter().map(|g| self.square(*g)).sum();
            *row = self.moved(*row, sum / cols as f64);
        }
        for (j, col) in col.iter_mut().enumerate() {
            let sum: f64 = g.iter().skip(j).step_by(cols).map(|g| self.square(*g)).sum();
            *col = self.moved(*col, sum / row.len() as f64);
        }
        let mean = R::of(row.iter().map(|r| r.wide()).sum::<f64>() / row.len() as f64);
        let inverse = |row: R| R::one() / (row / mean).root();
        let step = |inverse: R, g: R, col: R| self.scale * g * (inverse * (R::one() / col.root()));
        let mut squares = 0.0;
        for (row, g) in row.iter().zip(g.chunks(cols)) {
            let inverse = inverse(*row);
            for (g, col) in g.iter().zip(col.iter()) {
                let step = step(inverse, *g, *col).wide();
                squares += step * step;
            }
        }
        let rate = self.rate(squares, p.len());
        for (row, (p, g)) in row.iter().zip(p.chunks_mut(cols).zip(g.chunks(cols))) {
            let inverse = inverse(*row);
            for ((p, g), col) in p.iter_mut().zip(g).zip(col.iter()) {
                *p -= rate * step(inverse, *g, *col);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::{Layout, Words};
    use crate::backend::Storage;
    use crate::optim::Sizes;

    fn run<const N: usize>(
        u: &Update,
        p: [f64; N],
        g: [f64; N],
        m: [f64; N],
        v: [f64; N],
    ) -> [[f64; N]; 3] {
        let mut reals = [p, g, m, v].concat();
        let mut host = Reference::new(&Layout::new(8), &mut [], &mut reals, &mut []).unwrap();
        let part = |k: usize, n: usize| Reals::new(k * N, n);
        let [first, second] = u.rule.state(1, N).reals;
        let state = State::of(part(2, first), part(3, second));
        host.update(u, [1, N], part(0, N), part(1, N), &state).unwrap();
        [0, 2, 3].map(|k| core::array::from_fn(|i| reals[k * N + i]))
    }

    const U: Update =
        Update { rule: Rule::Sgd { momentum: 0.0 }, t: 1, lr: 0.1, decay: 0.0, scale: 1.0 };

    #[test]
    fn sgd_by_hand() {
        let u = Update { decay: 0.5, scale: 2.0, ..U };
        let [p, ..] = run(&u, [1.0], [3.0], [0.0], [0.0]);
        assert!((p[0] - (1.0 - 0.05 - 0.6)).abs() < 1e-15);
        let u = Update { rule: Rule::Sgd { momentum: 0.9 }, ..U };
        let [p, m, _] = run(&u, [1.0], [3.0], [2.0], [0.0]);
        assert!((m[0] - 4.8).abs() < 1e-15 && (p[0] - 0.52).abs() < 1e-15);
    }

    #[test]
    fn adam_w_by_hand() {
        let rule = Rule::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-3 };
        let u = Update { rule, t: 2, decay: 0.2, ..U };
        let [p, m, v] = run(&u, [1.0], [3.0], [0.5], [0.25]);
        let (first, second) = (0.9 * 0.5 + 0.1 * 3.0, 0.99 * 0.25 + 0.01 * 9.0);
        assert!((m[0] - first).abs() < 1e-15 && (v[0] - second).abs() < 1e-15);
        let step = first / (1.0 - 0.81) / ((second / (1.0 - 0.9801_f64)).sqrt() + 1e-3);
        assert!((p[0] - (0.98 - 0.1 * step)).abs() < 1e-14);
    }

    #[test]
    fn set_adam_by_hand() {
        let rule = Rule::SetAdam { beta1: 0.9, beta2: 0.99, eps: 1e-6 };
        let u = Update { rule, t: 3, ..U };
        let (g, old) = ([1.0, -2.0, 0.5], [0.25, 1.0, 0.04]);
        let [p, m, v] = run(&u, [0.0; 3], g, [0.1; 3], old);
        let sum: f64 = v.iter().sum();
        let squares: f64 = v.iter().map(|v| v * v).sum();
        let w =
            v.map(|v| (v * sum * sum / (3.0 * squares) / (1.0 - 0.99_f64.powi(3)) + 1e-6).sqrt());
        let min = w.into_iter().fold(f64::INFINITY, f64::min);
        for i in 0..3 {
            assert!((v[i] - (0.99 * old[i] + 0.01 * g[i] * g[i])).abs() < 1e-15);
            let step = m[i] / (1.0 - 0.9_f64.powi(3)) / (w[i] - 0.5 * min);
            assert!((p[i] + 0.1 * step).abs() < 1e-13);
        }
    }

    /// One element: `w̃ = ½·w`, so the first step has length 2η; scaling all gradients changes
    /// nothing.
    #[test]
    fn set_adam_of_tiny_and_small() {
        let rule = Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 0.0 };
        let u = Update { rule, ..U };
        for g in [1.0, 1e-60, 1e60] {
            let [p, ..] = run(&u, [0.0], [g], [0.0], [0.0]);
            assert!((p[0] + 0.2).abs() < 1e-12, "{g}: {}", p[0]);
        }
        assert_eq!(
            run(&u, [1.0, 2.0], [0.0; 2], [0.0; 2], [0.0; 2]),
            [[1.0, 2.0], [0.0; 2], [0.0; 2]]
        );
    }

    /// Two blocks, the second of one value: the moments are those of AdamW; what is kept of them is
    /// their nearest code.
    #[test]
    fn adam_w_8bit_by_hand() {
        const N: usize = codes::LEAST + 1;
        let rule = Rule::AdamW8bit { beta1: 0.9, beta2: 0.99, eps: 1e-3 };
        let u = Update { rule, decay: 0.2, ..U };
        let Sizes { reals: [blocks, _], codes: [words, _] } = rule.state(1, N);
        let mut reals = [0.0_f64; 2 * N + 2 * 17];
        let mut words_of = [0; 2 * (N / 4 + 1)];
        reals[..N].fill(1.0);
        (reals[N], reals[N + 1], reals[N + 2], reals[2 * N - 1]) = (3.0, -1.0, -1e-9, 7.0);
        let mut host = Reference::new(&Layout::new(8), &mut [], &mut reals, &mut words_of).unwrap();
        let state = State {
            reals: [Reals::new(2 * N, blocks), Reals::new(2 * N + 17, blocks)],
            codes: [Words::new(0, words), Words::new(words, words)],
        };
        let mut step = |t| {
            host.update(&Update { t, ..u }, [1, N], Reals::new(0, N), Reals::new(N, N), &state)
                .unwrap();
            let [p, a, b] =
                [Reals::new(0, N), state.reals[0], state.reals[1]].map(|h| host.reals(h).unwrap());
            let code = |k: usize, i: usize| {
                (host.words(state.codes[k]).unwrap()[i / 4] >> (8 * (i % 4))) as u8
            };
            let value = |i: usize| {
                let [m, v] = [code(0, i), code(1, i)].map(usize::from);
                [f64::from(SIGNED[m]) * a[i / 256], f64::from(UNSIGNED[v]) * b[i / 256]]
            };
            assert_eq!((code(0, N + 2), code(1, N + 2)), (0, 0), "beyond the end");
            [0, 1, 2, 3, N - 1].map(|i| (p[i], code(0, i), value(i)))
        };
        let found = step(1);
        let mut p = [1.0; 2];
        for (i, g) in [(0, 3.0_f64), (1, -1.0)] {
            p[i] = 0.98 - 0.1 * g / (g.abs() + 1e-3);
            assert!((found[i].0 - p[i]).abs() < 1e-12);
        }
        // Moments that are too small for a code have the least one; no gradient, no moments.
        assert_eq!((found[0].1, found[2].1, found[3].1, found[4].1), (255, 126, 127, 255));
        assert!(found[2].2[1] > 0.0 && found[3].2[1] == 0.0);
        // The first of its block is its largest, so it is exact; ⅓ and ⅑ of it are near their
        // codes.
        assert!((found[0].2[0] - 0.3).abs() < 1e-15 && (found[0].2[1] - 0.09).abs() < 1e-15);
        assert!((found[1].2[0] + 0.1).abs() < 0.3 * 0.45 / 64.0);
        assert!((found[1].2[1] - 0.01).abs() < 0.09 * 0.45 / 128.0);
        let again = step(2);
        for (i, g) in [(0, 3.0_f64), (1, -1.0)] {
            let [m, v] = found[i].2;
            let (m, v) = (0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g);
            let step = m / (1.0 - 0.81) / ((v / (1.0 - 0.9801_f64)).sqrt() + 1e-3);
            assert!((again[i].0 - (0.98 * p[i] - 0.1 * step)).abs() < 1e-12);
        }
    }

    #[test]
    fn adafactor_of_a_vector_by_hand() {
        let rule = Rule::Adafactor { decay: 0.8, eps: 1e-3, threshold: 0.5 };
        let u = Update { rule, t: 3, decay: 0.5, scale: 2.0, ..U };
        let (g, old) = ([0.5, -1.5], [0.04, 4.0]);
        let [p, v, _] = run(&u, [1.0, 2.0], g, old, [0.0; 2]);
        let take = 3.0_f64.powf(-0.8);
        let new = [0, 1].map(|i| (1.0 - take) * old[i] + take * (4.0 * g[i] * g[i] + 1e-3));
        let step = [0, 1].map(|i| 2.0 * g[i] / new[i].sqrt());
        let rms = (0.5 * (step[0] * step[0] + step[1] * step[1])).sqrt();
        assert!(rms > 0.5);
        for i in 0..2 {
            assert!((v[i] - new[i]).abs() < 1e-14);
            let expected = 0.95 * [1.0, 2.0][i] - 0.1 * step[i] / (rms / 0.5);
            assert!((p[i] - expected).abs() < 1e-14);
        }
    }

    /// The first update of a matrix whose squares are a product: the factors are exact, so every
    /// step has length 1.
    #[test]
    fn adafactor_of_a_matrix_by_hand() {
        let mut reals = [0.0_f64; 6 + 6 + 2 + 3];
        for (i, g) in reals[6..12].iter_mut().enumerate() {
            let sign = if i % 2 == 0 { 1.0 } else { -1.0 };
            *g = sign * [1.0, 3.0][i / 3] * [1.0, 2.0, 4.0][i % 3];
        }
        let mut host = Reference::new(&Layout::new(8), &mut [], &mut reals, &mut []).unwrap();
        let u = Update { rule: Rule::ADAFACTOR, ..U };
        let (p, g) = (Reals::new(0, 6), Reals::new(6, 6));
        let state = State::of(Reals::new(12, 2), Reals::new(14, 3));
        host.update(&u, [2, 3], p, g, &state).unwrap();
        for (found, expected) in reals.iter().zip([-0.1, 0.1, -0.1, 0.1, -0.1, 0.1]) {
            assert!((found - expected).abs() < 1e-14);
        }
        for (found, expected) in reals[12..].iter().zip([7.0, 63.0, 5.0, 20.0, 80.0]) {
            assert!((found - expected).abs() < 1e-13);
        }
    }

    #[test]
    fn adafactor_without_gradient_moves_nothing() {
        let u = Update { rule: Rule::ADAFACTOR, ..U };
        let [p, v, _] = run(&u, [1.0, 2.0], [0.0; 2], [0.0; 2], [0.0; 2]);
        assert_eq!((p, v), ([1.0, 2.0], [1e-30; 2]));
    }

    /// A sum that `f32` cannot hold is a fault, not an infinite norm that clipping would turn into
    /// a step of 0.
    #[test]
    fn norms_beyond_the_type_are_faults() {
        let mut reals = [1e25_f32, 1.0, 0.0];
        let mut host = Reference::new(&Layout::new(4), &mut [], &mut reals, &mut []).unwrap();
        host.sum_squares(Site::Block(2), Reals::new(0, 2), Reals::new(2, 1)).unwrap();
        assert_eq!(host.take_fault(), Ok(Some(Fault::Gradient { site: Site::Block(2) })));
    }
}
