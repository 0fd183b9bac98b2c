//! Small helpers over `wide`: whole slices in lanes, sums in a fixed order, and the functions that
//! the layers need.

use wide::{f32x8, i32x8};

/// Values handled at once.
pub(crate) const LANES: usize = 8;

/// Lanes of one register.
const PER_REGISTER: usize =
    if cfg!(any(target_feature = "avx", target_feature = "avx512f")) { 8 } else { 4 };

/// What [`bdia_core::backend::Identity::lanes`] says.
pub(crate) const fn lanes() -> usize {
    PER_REGISTER
}

/// The lanes of up to eight values, the rest filled up.
#[inline]
pub(crate) fn load_part(src: &[f32], fill: f32) -> f32x8 {
    let mut a = [fill; LANES];
    a[..src.len()].copy_from_slice(src);
    f32x8::new(a)
}

/// The sum of the lanes, always in the same order.
#[inline]
pub(crate) fn sum(v: f32x8) -> f32 {
    let a = v.to_array();
    ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
}

/// The largest lane.
#[inline]
pub(crate) fn largest(v: f32x8) -> f32 {
    v.to_array().into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// `y[i] = f(x[i])` in place.
#[inline]
pub(crate) fn map(x: &mut [f32], f: impl Fn(f32x8) -> f32x8) {
    let (body, tail) = x.as_chunks_mut::<LANES>();
    for a in body {
        *a = f(f32x8::new(*a)).to_array();
    }
    let n = tail.len();
    if n > 0 {
        let r = f(load_part(tail, 0.0)).to_array();
        tail.copy_from_slice(&r[..n]);
    }
}

/// `x[i] = f(x[i], y[i])`; equal lengths.
#[inline]
pub(crate) fn map2(x: &mut [f32], y: &[f32], f: impl Fn(f32x8, f32x8) -> f32x8) {
    let ((body, tail), (other, rest)) = (x.as_chunks_mut::<LANES>(), y.as_chunks::<LANES>());
    for (a, b) in body.iter_mut().zip(other) {
        *a = f(f32x8::new(*a), f32x8::new(*b)).to_array();
    }
    let n = tail.len();
    if n > 0 {
        let r = f(load_part(tail, 0.0), load_part(rest, 0.0)).to_array();
        tail.copy_from_slice(&r[..n]);
    }
}

/// `x[i] = f(x[i], y[i], z[i])`; equal lengths.
#[inline]
pub(crate) fn map3(x: &mut [f32], y: &[f32], z: &[f32], f: impl Fn(f32x8, f32x8, f32x8) -> f32x8) {
    let ((body, tail), (other, rest), (third, last)) =
        (x.as_chunks_mut::<LANES>(), y.as_chunks::<LANES>(), z.as_chunks::<LANES>());
    for ((a, b), c) in body.iter_mut().zip(other).zip(third) {
        *a = f(f32x8::new(*a), f32x8::new(*b), f32x8::new(*c)).to_array();
    }
    let n = tail.len();
    if n > 0 {
        let r = f(load_part(tail, 0.0), load_part(rest, 0.0), load_part(last, 0.0)).to_array();
        tail.copy_from_slice(&r[..n]);
    }
}

/// `x[i], y[i] = f(x[i], y[i], z[i], w[i])`; equal lengths.
#[inline]
pub(crate) fn map_both(
    [x, y]: [&mut [f32]; 2],
    [z, w]: [&[f32]; 2],
    f: impl Fn([f32x8; 4]) -> [f32x8; 2],
) {
    let ((xs, x_tail), (ys, y_tail)) = (x.as_chunks_mut::<LANES>(), y.as_chunks_mut::<LANES>());
    let ((zs, z_tail), (ws, w_tail)) = (z.as_chunks::<LANES>(), w.as_chunks::<LANES>());
    for (((x, y), z), w) in xs.iter_mut().zip(ys).zip(zs).zip(ws) {
        [*x, *y] = f([*x, *y, *z, *w].map(f32x8::new)).map(f32x8::to_array);
    }
    let n = x_tail.len();
    if n > 0 {
        let [x, y] = f([&*x_tail, y_tail, z_tail, w_tail].map(|part| load_part(part, 0.0)));
        x_tail.copy_from_slice(&x.to_array()[..n]);
        y_tail.copy_from_slice(&y.to_array()[..n]);
    }
}

/// `Σ f(x[i])` with four accumulators; `f(0)` must be 0, or the length a multiple of 8.
#[inline]
pub(crate) fn fold_sum(x: &[f32], f: impl Fn(f32x8) -> f32x8) -> f32 {
    let (body, tail) = x.as_chunks::<LANES>();
    let mut acc = [f32x8::ZERO; 4];
    let (fours, rest) = body.as_chunks::<4>();
    for four in fours {
        for (acc, a) in acc.iter_mut().zip(four) {
            *acc += f(f32x8::new(*a));
        }
    }
    for a in rest {
        acc[0] += f(f32x8::new(*a));
    }
    let mut last = [0.0; LANES];
    if !tail.is_empty() {
        last = f(load_part(tail, 0.0)).to_array();
        last[tail.len()..].fill(0.0);
    }
    sum((acc[0] + acc[1]) + (acc[2] + acc[3]) + f32x8::new(last))
}

/// `Σ f(x[i], y[i])`; equal lengths.
#[inline]
pub(crate) fn fold_sum2(x: &[f32], y: &[f32], f: impl Fn(f32x8, f32x8) -> f32x8) -> f32 {
    let ((body, tail), (other, rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let mut acc = [f32x8::ZERO; 4];
    for (i, (a, b)) in body.iter().zip(other).enumerate() {
        acc[i % 4] += f(f32x8::new(*a), f32x8::new(*b));
    }
    let mut last = [0.0; LANES];
    if !tail.is_empty() {
        last = f(load_part(tail, 0.0), load_part(rest, 0.0)).to_array();
        last[tail.len()..].fill(0.0);
    }
    sum((acc[0] + acc[1]) + (acc[2] + acc[3]) + f32x8::new(last))
}

/// The largest value; −∞ of none. NaN is passed over.
#[inline]
pub(crate) fn max_of(x: &[f32]) -> f32 {
    let (body, tail) = x.as_chunks::<LANES>();
    let mut acc = [f32x8::splat(f32::NEG_INFINITY); 4];
    for (i, a) in body.iter().enumerate() {
        acc[i % 4] = acc[i % 4].max(f32x8::new(*a));
    }
    let last = load_part(tail, f32::NEG_INFINITY);
    largest(acc[0].max(acc[1]).max(acc[2].max(acc[3])).max(last))
}

/// `2^n` for whole `n` from −126 to 127.
#[inline]
fn power_of_two(n: f32x8) -> f32x8 {
    let bits: i32x8 = (n.fast_trunc_int() + i32x8::splat(127)) << 23;
    f32x8::new(bits.to_array().map(|b| f32::from_bits(b as u32)))
}

/// `e^x`, within 2 units in the last place; 0 below −87.3, ∞ above 88.3, NaN of NaN.
///
/// Range reduction by multiples of `ln 2` in two parts and a polynomial of degree 6 (coefficients:
/// Cephes, `expf`).
#[inline]
pub(crate) fn exp(x: f32x8) -> f32x8 {
    let s = f32x8::splat;
    let (low, high) = (s(-87.33654), s(88.37626));
    let c = x.fast_max(low).fast_min(high);
    let n = (c * s(core::f32::consts::LOG2_E)).round_ties_even();
    let r = n.mul_add(s(-0.693_359_4), c);
    let r = n.mul_add(s(2.121_944_4e-4), r);
    let p = s(1.987_569_1e-4)
        .mul_add(r, s(1.398_199_9e-3))
        .mul_add(r, s(8.333_452e-3))
        .mul_add(r, s(4.166_579_6e-2))
        .mul_add(r, s(1.666_666_5e-1))
        .mul_add(r, s(0.5));
    let y = p.mul_add(r * r, r) + f32x8::ONE;
    let y = y * power_of_two(n);
    let y = x.simd_lt(low).select(f32x8::ZERO, y);
    let y = x.simd_gt(high).select(s(f32::INFINITY), y);
    x.is_nan().select(x, y)
}

/// Gauss error function, within 2 units in the last place.
///
/// Two polynomials, the outer one in an exponential (minimax coefficients by N. Juffa).
#[inline]
pub(crate) fn erf(x: f32x8) -> f32x8 {
    let s = f32x8::splat;
    let (t, q) = (x.abs(), x * x);
    // Far out the result is 1, and the polynomial must not overflow.
    let u = t.fast_min(s(4.5));
    let v = u * u;
    let r = s(-1.728_534_7e-5).mul_add(u, s(3.831_971_3e-4));
    let w = s(-3.883_964_4e-3).mul_add(u, s(2.425_462_2e-2));
    let r = r.mul_add(v, w);
    let r = r.mul_add(u, s(-1.067_778_8e-1));
    let r = r.mul_add(u, s(-6.348_467e-1));
    let r = r.mul_add(u, s(-1.287_175_1e-1));
    let r = r.mul_add(u, -u);
    let outer = f32x8::ONE - exp(r);
    let outer = x.simd_lt(f32x8::ZERO).select(-outer, outer);
    let r = s(-5.967_617e-4)
        .mul_add(q, s(4.991_194_2e-3))
        .mul_add(q, s(-2.676_813_5e-2))
        .mul_add(q, s(1.128_199_25e-1))
        .mul_add(q, s(-3.761_253_4e-1))
        .mul_add(q, s(1.283_791_7e-1));
    let inner = r.mul_add(x, x);
    // A NaN is not greater, so it takes the inner branch and stays.
    t.simd_gt(s(0.927_734_4)).select(outer, inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate() {
        let mut worst = 0.0_f64;
        for i in 0..2_000_000 {
            let x = -87.3 + 175.6 * (i as f32 / 2_000_000.0);
            let (y, e) = (f64::from(exp(f32x8::splat(x)).to_array()[0]), libm::exp(f64::from(x)));
            worst = worst.max((y - e).abs() / e);
        }
        // Two units in the last place of f32.
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        let special = exp(f32x8::new([
            0.0,
            -0.0,
            f32::NEG_INFINITY,
            f32::INFINITY,
            f32::NAN,
            -1e9,
            1e9,
            1.0,
        ]))
        .to_array();
        assert_eq!(special[..4], [1.0, 1.0, 0.0, f32::INFINITY]);
        assert!(special[4].is_nan());
        assert_eq!(special[5..7], [0.0, f32::INFINITY]);
    }

    #[test]
    fn erf_is_accurate() {
        let mut worst = 0.0_f64;
        for i in 0..1_000_000 {
            let x = -6.0 + 12.0 * (i as f32 / 1_000_000.0);
            let (y, e) = (f64::from(erf(f32x8::splat(x)).to_array()[0]), libm::erf(f64::from(x)));
            worst = worst.max((y - e).abs() / e.abs().max(1e-3));
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(erf(f32x8::splat(1e30)).to_array()[0], 1.0);
        assert_eq!(erf(f32x8::splat(f32::NEG_INFINITY)).to_array()[0], -1.0);
        assert!(erf(f32x8::splat(f32::NAN)).to_array()[0].is_nan());
    }

    #[test]
    fn slices_of_every_length() {
        for n in 0..70 {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let expected = x.iter().sum::<f32>();
            assert_eq!(fold_sum(&x, |v| v), expected);
            assert_eq!(fold_sum(&x, |v| v + f32x8::ONE), expected + n as f32);
            assert_eq!(fold_sum2(&x, &x, |a, _| a), expected);
            assert_eq!(max_of(&x), if n == 0 { f32::NEG_INFINITY } else { n as f32 - 1.0 });
            let mut y = x.clone();
            map2(&mut y, &x, |a, b| a + b);
            assert!(y.iter().zip(&x).all(|(y, x)| *y == 2.0 * x));
            let mut z = x.clone();
            map_both([&mut y, &mut z], [&x, &x], |[a, b, c, d]| [a + b, c * d]);
            assert!(y.iter().zip(&x).all(|(y, x)| *y == 3.0 * x));
            assert!(z.iter().zip(&x).all(|(z, x)| *z == x * x));
        }
    }
}
