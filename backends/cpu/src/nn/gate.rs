//! The functions of a gated MLP's gate, and products with their values and slopes.

use bdia_core::backend::{Gate, Gelu};
use wide::f32x8;

use super::gelu;
use crate::memory::Shared;
use crate::simd::{exp, map_both, map3};
use crate::{BLOCK, Team};

/// `x·σ(x)` with `σ(x) = 1/(1 + exp(−x))`, and its derivative, `σ(x) + x·σ(x)·(1 − σ(x))`.
#[inline]
fn silu(x: f32x8) -> [f32x8; 2] {
    let s = f32x8::splat;
    // Beyond −100 the sigmoid is 0, beyond 100 its complement. What they are multiplied by stays
    // finite, so that the product is 0 too. A NaN passes.
    let low = x.simd_lt(s(-100.0)).select(s(-100.0), x);
    let e = exp(-low);
    let sigmoid = f32x8::ONE / (f32x8::ONE + e);
    let complement = e.fast_min(s(f32::MAX)) * sigmoid;
    let slope = (low.fast_min(s(100.0)) * sigmoid).mul_add(complement, sigmoid);
    [low * sigmoid, slope]
}

/// `y = act(gate)·up`.
pub(super) fn product(team: &Team, act: Gate, gate: &[f32], up: &[f32], y: &mut [f32]) {
    match act {
        Gate::Silu => blocks(team, gate, up, y, |x| silu(x)[0]),
        Gate::Gelu(Gelu::Tanh) => blocks(team, gate, up, y, |x| gelu::value(Gelu::Tanh, x)),
        Gate::Gelu(Gelu::Exact) => blocks(team, gate, up, y, |x| gelu::value(Gelu::Exact, x)),
    }
}

/// `dgate = d·up·act'(gate)`, and `d` becomes `d·act(gate)`.
pub(super) fn gradients(
    team: &Team,
    act: Gate,
    gate: &[f32],
    up: &[f32],
    d: &mut [f32],
    dgate: &mut [f32],
) {
    let both = |kind, x| [gelu::value(kind, x), gelu::derivative(kind, x)];
    match act {
        Gate::Silu => blocks_vjp(team, [gate, up], d, dgate, silu),
        Gate::Gelu(Gelu::Tanh) => {
            blocks_vjp(team, [gate, up], d, dgate, |x| both(Gelu::Tanh, x));
        }
        Gate::Gelu(Gelu::Exact) => {
            blocks_vjp(team, [gate, up], d, dgate, |x| both(Gelu::Exact, x));
        }
    }
}

/// [`product`] with the values of the gate's function.
fn blocks(
    team: &Team,
    gate: &[f32],
    up: &[f32],
    y: &mut [f32],
    value: impl Fn(f32x8) -> f32x8 + Sync,
) {
    let y = Shared::new(y);
    team.each(y.len().div_ceil(BLOCK), |_, b| {
        let part = b * BLOCK..y.len().min((b + 1) * BLOCK);
        // SAFETY: blocks are disjoint.
        let y = unsafe { y.part(part.start, part.len()) };
        map3(y, &gate[part.clone()], &up[part], |_, g, u| value(g) * u);
    });
}

/// [`gradients`] with the values and slopes of the gate's function.
fn blocks_vjp(
    team: &Team,
    [gate, up]: [&[f32]; 2],
    d: &mut [f32],
    dgate: &mut [f32],
    both: impl Fn(f32x8) -> [f32x8; 2] + Sync,
) {
    let (d, dgate) = (Shared::new(d), Shared::new(dgate));
    team.each(d.len().div_ceil(BLOCK), |_, b| {
        let part = b * BLOCK..d.len().min((b + 1) * BLOCK);
        // SAFETY: blocks are disjoint.
        let outputs = unsafe { [&d, &dgate].map(|x| x.part(part.start, part.len())) };
        map_both(outputs, [&gate[part.clone()], &up[part]], |[d, _, g, u]| {
            let [value, slope] = both(g);
            [d * value, d * u * slope]
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_is_accurate() {
        for i in 0..400_000 {
            let x = -100.0 + 200.0 * (i as f32 / 400_000.0);
            let found = silu(f32x8::splat(x)).map(|v| f64::from(v.to_array()[0]));
            let x = f64::from(x);
            let sigmoid = 1.0 / (1.0 + libm::exp(-x));
            let (value, turn) = (x * sigmoid, x * sigmoid * (1.0 - sigmoid));
            for (found, expected, terms) in
                [(found[0], value, value.abs()), (found[1], sigmoid + turn, sigmoid + turn.abs())]
            {
                // A few roundings of the terms; below −87 the exponential ends.
                let error = (found - expected).abs();
                assert!(error < 5e-7 * terms + 1e-36, "{x}: {found:e}, {expected:e}");
            }
        }
        for x in [1e20, f32::MAX, f32::INFINITY, 101.0] {
            let found = |x| silu(f32x8::splat(x)).map(|v| v.to_array()[0]);
            assert_eq!(found(x), [x, 1.0], "the identity");
            assert_eq!(found(-x), [0.0, 0.0], "nothing");
        }
        assert!(silu(f32x8::splat(f32::NAN)).iter().all(|v| v.to_array()[0].is_nan()));
    }
}
