//! What the tests of assembled networks share.
#![allow(dead_code)]

use bdia_core::Real;
use bdia_core::layers::{Parameter, Params, Tensors};
use bdia_core::rng::philox;

/// A number in -1 … 1.
pub fn noise(a: u32, i: usize) -> f64 {
    f64::from(philox(5, [a, i as u32, 0, 0])[0] as i32) / f64::from(1_u32 << 31)
}

/// Every tensor that is trained, with its gradient.
pub fn trained(groups: &[(&Params, &dyn Tensors)]) -> Vec<Parameter> {
    let mut list = Vec::new();
    for (params, tensors) in groups {
        for k in 0..params.groups() {
            let each = tensors.each(&mut |t| {
                list.push(params.parameter(k, t));
                Ok(())
            });
            assert_eq!(each, Ok(()));
        }
    }
    list.retain(|p| !p.grad.is_empty());
    list
}

/// An arena of `len` reals with random parameters.
pub fn random_parameters<R: Real>(of: &[Parameter], len: usize) -> Vec<R> {
    let mut arena = vec![R::zero(); len];
    for i in of.iter().flat_map(|p| p.value.range()) {
        arena[i] = R::of(0.6 * noise(1, i));
    }
    arena
}

/// Compares every gradient in `after` with the central difference of `loss`; returns how many are
/// not 0.
pub fn compare_gradients(
    of: &[Parameter],
    arena: &mut [f64],
    after: &[f64],
    mut loss: impl FnMut(&[f64]) -> f64,
) -> usize {
    let (e, mut seen) = (3e-6, 0);
    for p in of {
        for (at, g) in p.value.range().zip(p.grad.range()) {
            let x = arena[at];
            arena[at] = x + e;
            let plus = loss(arena);
            arena[at] = x - e;
            let minus = loss(arena);
            arena[at] = x;
            let (slope, g) = ((plus - minus) / (2.0 * e), after[g]);
            seen += usize::from(slope != 0.0);
            // Central differences are off by e² times the third derivative, and by rounding, about
            // 1e-16 / e.
            assert!((slope - g).abs() < 1e-8 * (1.0 + slope.abs()), "at {at}: {slope} {g}");
        }
    }
    seen
}
