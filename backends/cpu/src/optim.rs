//! [`OptimOps`]: one pass over memory per update, two more for SET-Adam's sums.

use bdia_core::optim::{Rule, Update};
use bdia_core::{Exchange, Fault, OptimOps, Reals, Result, Site};
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
    let mut results = [none; PARTIALS];
    // Small tensors in few parts.
    let size = x.len().div_ceil(PARTIALS).max(1024);
    let shared = Shared::new(&mut results);
    team.each(x.len().div_ceil(size), |_, i| {
        let part = &x[i * size..x.len().min((i + 1) * size)];
        // SAFETY: each part has a result of its own.
        unsafe { shared.part(i, 1)[0] = f(part) };
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

    fn update(&mut self, u: &Update, p: Reals, g: Reals, m: Reals, v: Reals) -> Result<()> {
        self.arenas().update(u, p, g, m, v)?;
        let [p, g, m, v] = split(&mut self.reals, [p, g, m, v], "update")?;
        if self.fault.is_some() {
            return Ok(());
        }
        let (team, s) = (&self.team, f32x8::splat);
        let (shrink, scale) = (s((u.lr * u.decay) as f32), s(u.scale as f32));
        let zero = f32x8::ZERO;
        let t = Tensors { p: Shared::new(p), g, m: Shared::new(m), v: Shared::new(v) };
        // m ← β1·m + (1-β1)·g,  v ← β2·v + (1-β2)·g²
        let moments = |beta1: f64, beta2: f64| {
            let (keep1, take1) = (s(beta1 as f32), s((1.0 - beta1) as f32));
            let (keep2, take2) = (s(beta2 as f32), s((1.0 - beta2) as f32));
            move |g: f32x8, m: f32x8, v: f32x8| (keep1 * m + take1 * g, keep2 * v + take2 * (g * g))
        };
        match u.rule {
            Rule::Sgd { momentum } => {
                let (momentum, lr) = (s(momentum as f32), s(u.lr as f32));
                t.each(team, |[p, g, m, v]| {
                    let m = momentum * m + g * scale;
                    [p - shrink * p - lr * m, m, v]
                });
            }
            Rule::AdamW { beta1, beta2, eps } => {
                let moments = moments(beta1, beta2);
                let (rate, eps) = (s((u.lr / correction(beta1, u.t)) as f32), s(eps as f32));
                let inverse = s((1.0 / correction(beta2, u.t)) as f32);
                t.each(team, |[p, g, m, v]| {
                    let (m, v) = moments(g * scale, m, v);
                    let denominator = (v * inverse).sqrt() + eps;
                    // A zero denominator (no gradient yet and ε = 0) moves nothing.
                    let step = denominator.simd_gt(zero).select(rate * m / denominator, zero);
                    [p - shrink * p - step, m, v]
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
