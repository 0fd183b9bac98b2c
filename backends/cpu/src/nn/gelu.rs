//! Both forms of GELU and their derivatives in lanes.

use bdia_core::backend::Gelu;
use wide::f32x8;

use crate::simd::{erf, exp};

/// `√(2/π)`.
const ROOT_2_OVER_PI: f32 = 0.797_884_6;
/// `1/√2`.
const ROOT_HALF: f32 = core::f32::consts::FRAC_1_SQRT_2;

/// `0.5·x·(1 + tanh(u)) = x/(1 + exp(−2u))`, `u = √(2/π)·(x + 0.044715·x³)`; `x·Φ(x)`.
#[inline]
pub(super) fn value(kind: Gelu, x: f32x8) -> f32x8 {
    match kind {
        Gelu::Tanh => x / (f32x8::ONE + exp(minus_2u(x))),
        Gelu::Exact => x * phi(x),
    }
}

/// Its derivative. Beyond ±12 it is 0 or 1, so what is computed of `x` stays in range.
#[inline]
pub(super) fn derivative(kind: Gelu, x: f32x8) -> f32x8 {
    let s = f32x8::splat;
    let c = x.fast_max(s(-12.0)).fast_min(s(12.0));
    let d = match kind {
        Gelu::Tanh => {
            // With the sigmoid σ = 1/(1 + e): σ + x·σ·(1−σ)·2u', and 1 − σ = e·σ.
            let e = exp(minus_2u(c).fast_min(s(87.0)));
            let sigmoid = f32x8::ONE / (f32x8::ONE + e);
            let slope =
                (c * c).mul_add(s(2.0 * ROOT_2_OVER_PI * 3.0 * 0.044_715), s(2.0 * ROOT_2_OVER_PI));
            (c * sigmoid * (e * sigmoid)).mul_add(slope, sigmoid)
        }
        Gelu::Exact => {
            // Φ(x) + x·exp(−x²/2)/√(2π)
            let density = exp(c * c * s(-0.5)) * s(0.5 * ROOT_2_OVER_PI);
            c.mul_add(density, phi(c))
        }
    };
    // A NaN stays one.
    x.simd_eq(x).select(d, x)
}

#[inline]
fn minus_2u(x: f32x8) -> f32x8 {
    let s = f32x8::splat;
    let inner = (x * x).mul_add(s(-2.0 * ROOT_2_OVER_PI * 0.044_715), s(-2.0 * ROOT_2_OVER_PI));
    x * inner
}

#[inline]
fn phi(x: f32x8) -> f32x8 {
    let s = f32x8::splat;
    s(0.5) * (f32x8::ONE + erf(x * s(ROOT_HALF)))
}
