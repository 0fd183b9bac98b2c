//! [`OptimOps`] of the reference backend.

use super::{Reference, split};
use crate::arena::Reals;
use crate::backend::{Exchange, OptimOps};
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

    fn update(&mut self, u: &Update, p: Reals, g: Reals, m: Reals, v: Reals) -> Result<()> {
        self.arenas().update(u, p, g, m, v)?;
        let [p, g, m, v] =
            split(self.reals, [p.range(), g.range(), m.range(), v.range()], "update")?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Layout;
    use crate::backend::Storage;

    fn run<const N: usize>(
        u: &Update,
        p: [f64; N],
        g: [f64; N],
        m: [f64; N],
        v: [f64; N],
    ) -> [[f64; N]; 3] {
        let mut reals = [p, g, m, v].concat();
        let mut host = Reference::new(&Layout::new(8), &mut [], &mut reals, &mut []).unwrap();
        let states = u.rule.states();
        let part = |k: usize| if k < 2 + states { Reals::new(k * N, N) } else { Reals::EMPTY };
        host.update(u, part(0), part(1), part(2), part(3)).unwrap();
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
