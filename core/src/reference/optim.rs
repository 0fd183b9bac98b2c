//! [`OptimOps`] of the reference backend.

use super::{Reference, same, split};
use crate::arena::Reals;
use crate::backend::OptimOps;
use crate::error::{Error, Fault, Result, Site};
use crate::optim::{Rule, Update};
use crate::real::Real;

impl<R: Real> OptimOps for Reference<'_, R> {
    /// Also raises [`Fault::Gradient`] where the sum itself leaves the range of the real type: no norm, no clipping.
    fn sum_squares(&mut self, site: Site, g: Reals, out: Reals) -> Result<()> {
        same("sum_squares: out", 1, out.len())?;
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
        check(u)?;
        let states = u.rule.states();
        same("update: gradient", p.len(), g.len())?;
        same("update: first moment", if states > 0 { p.len() } else { 0 }, m.len())?;
        same("update: second moment", if states > 1 { p.len() } else { 0 }, v.len())?;
        let [p, g, m, v] = split(self.reals, [p.range(), g.range(), m.range(), v.range()], "update")?;
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

/// Refuses constants that would turn every parameter into NaN.
fn check(u: &Update) -> Result<()> {
    u.rule.check()?;
    if u.t == 0 {
        return Err(Error::Setting { what: "number of the update", found: 0.0, possible: "1 and up" });
    }
    for (what, found) in [("lr", u.lr), ("weight decay", u.decay), ("gradient scale", u.scale)] {
        if !found.is_finite() {
            return Err(Error::Setting { what, found, possible: "a finite number" });
        }
    }
    Ok(())
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
    let (keep1, take1, keep2, take2) = (R::of(beta1), R::of(1.0 - beta1), R::of(beta2), R::of(1.0 - beta2));
    for i in 0..g.len() {
        let g = scale * g[i];
        m[i] = keep1 * m[i] + take1 * g;
        v[i] = keep2 * v[i] + take2 * (g * g);
    }
}

/// `θ ← θ − rate·m/(√(v/correction) + ε)`, `rate = η/(1-β1^t)`, `correction = 1-β2^t`. A zero denominator (no gradient
/// yet and ε = 0) moves nothing.
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
/// The sums are those of `u = v/max v`, whose squares do not underflow. Where all of `v` is 0 nothing moves.
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
