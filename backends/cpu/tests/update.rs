//! [`UpdateOps`](bdia_core::UpdateOps): the bits of the reference backend, for any number of
//! threads.

mod common;

use bdia_core::{Error, Fault, FloatGamma, Gamma, Grid, Ints, Reals, Sign, Words};
use common::{World, chunk, is_handle};

/// Samples and values of each: one element, tails of every kind, more than a block.
const SHAPES: [(usize, usize); 11] = [
    (0, 0),
    (1, 0),
    (1, 1),
    (3, 1),
    (2, 7),
    (1, 31),
    (2, 32),
    (3, 33),
    (2, 100),
    (2, 16_384),
    (2, 40_001),
];

#[allow(clippy::unwrap_used, reason = "only tests call this")]
fn gammas() -> Vec<Gamma> {
    let mut all = vec![];
    for m in [1, 2, 3, 8] {
        for sign in [Sign::Random, Sign::Plus, Sign::Minus] {
            all.push(Gamma::new(m, sign).unwrap());
        }
    }
    all
}

/// `x` at the start of the integers; `cur`, `h`, `y` in the reals; side bits, then a sum, in the
/// words.
struct Places {
    x: Ints,
    cur: Reals,
    h: Reals,
    side: Words,
    sum: Words,
    world: World,
}

fn places(samples: usize, per: usize, planes: usize, seed: u64) -> Places {
    let n = samples * per;
    let words = samples * planes * per.div_ceil(32);
    Places {
        x: Ints::new(0, n),
        cur: Reals::new(0, n),
        h: Reals::new(n, n),
        side: Words::new(2, words),
        sum: Words::new(0, 2),
        world: World::new(seed, n, 3 * n, words + 2),
    }
}

#[test]
fn step_and_inverse() {
    for (samples, per) in SHAPES {
        for gamma in gammas() {
            let planes = gamma.planes() as usize;
            let p = places(samples, per, planes, 1);
            let (c, grid) = (chunk(samples), Grid::new(14).unwrap());
            let what = format!("{samples}×{per}, γ {gamma:?}");
            let after = p.world.exact(&format!("step {what}"), &|b| {
                b.step(&c, grid, gamma, p.x, p.cur, p.h, p.side, p.sum)
            });
            let _ = p.world.exact(&format!("step without side bits {what}"), &|b| {
                b.step(&c, grid, gamma, p.x, p.cur, p.h, Words::EMPTY, Words::EMPTY)
            });
            let back = after.world.exact(&format!("inverse {what}"), &|b| {
                b.inverse(&c, grid, gamma, p.x, p.cur, p.h, p.side, Words::EMPTY)
            });
            assert_eq!(back.world.ints, p.world.ints, "the step is undone");
            let _ = after.world.exact(&format!("inverse with sum {what}"), &|b| {
                b.inverse(&c, grid, gamma, p.x, p.cur, p.h, p.side, p.sum)
            });
        }
    }
}

#[test]
fn values_at_the_limits_and_wild_ones() {
    let wild = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        65_536.0,
        -65_536.0,
        65_537.0,
        1e30,
        -0.0,
        3e-5,
        f32::MIN_POSITIVE,
    ];
    for (samples, per) in [(1, 1), (2, 33), (3, 20_000)] {
        for at in [0, 1, samples * per / 2, samples * per - 1] {
            for (n, &value) in wild.iter().enumerate() {
                let mut p = places(samples, per, 3, n as u64);
                let n = samples * per;
                p.world.reals[n + at % n] = value;
                p.world.reals[(at + 5) % n] = -value;
                for (i, x) in p.world.ints.iter_mut().enumerate().take(50) {
                    *x = if i % 2 == 0 { 1 << 30 } else { -(1 << 30) };
                }
                let c = chunk(samples);
                for (l, gamma) in [(14, 0.5), (0, 0.5), (24, 0.125)] {
                    let (grid, gamma) =
                        (Grid::new(l).unwrap(), Gamma::from_value(gamma, Sign::Random).unwrap());
                    let m = gamma.planes() as usize;
                    let side = Words::new(2, samples * m * per.div_ceil(32));
                    let step = p
                        .world
                        .exact("step", &|b| b.step(&c, grid, gamma, p.x, p.cur, p.h, side, p.sum));
                    let back = step.world.exact("inverse", &|b| {
                        b.inverse(&c, grid, gamma, p.x, p.cur, p.h, side, Words::EMPTY)
                    });
                    assert_eq!(back.world.ints, p.world.ints);
                    let _ = step.world.exact("inverse with sum", &|b| {
                        b.inverse(&c, grid, gamma, p.x, p.cur, p.h, side, p.sum)
                    });
                    let _ = p.world.exact("quantize", &|b| b.quantize(&c, grid, p.h, p.x, p.sum));
                    let _ = p
                        .world
                        .exact("add_quantized", &|b| b.add_quantized(&c, grid, p.x, p.h, p.sum));
                    let _ = p.world.exact("subtract_quantized", &|b| {
                        b.subtract_quantized(&c, grid, p.x, p.h, p.sum)
                    });
                    let _ = p.world.exact("dequantize", &|b| b.dequantize(grid, p.x, p.cur));
                    let x = Reals::new(2 * n, n);
                    let _ = p.world.exact("blend", &|b| b.blend(&c, gamma.float(), x, p.cur, p.h));
                    let _ =
                        p.world.exact("unblend", &|b| b.unblend(&c, gamma.float(), x, p.cur, p.h));
                    let _ =
                        p.world.exact("combine", &|b| b.combine(&c, gamma.float(), x, p.cur, p.h));
                }
            }
        }
    }
}

#[test]
fn the_other_operations() {
    for (samples, per) in SHAPES {
        let p = places(samples, per, 1, 5);
        let (c, grid) = (chunk(samples), Grid::new(14).unwrap());
        let x = Reals::new(2 * samples * per, samples * per);
        let what = format!("{samples}×{per}");
        for sum in [p.sum, Words::EMPTY] {
            let _ = p
                .world
                .exact(&format!("quantize {what}"), &|b| b.quantize(&c, grid, p.h, p.x, sum));
            let _ = p.world.exact(&format!("add_quantized {what}"), &|b| {
                b.add_quantized(&c, grid, p.x, p.h, sum)
            });
            let name = format!("subtract_quantized {what}");
            let _ = p.world.exact(&name, &|b| b.subtract_quantized(&c, grid, p.x, p.h, sum));
        }
        let _ = p.world.exact(&format!("dequantize {what}"), &|b| b.dequantize(grid, p.x, p.cur));
        for magnitude in [0.0, 0.5, 0.3, 1.0] {
            for sign in [Sign::Random, Sign::Minus] {
                let gamma = FloatGamma::new(magnitude, sign).unwrap();
                let _ = p.world.exact(&format!("blend {what} {magnitude}"), &|b| {
                    b.blend(&c, gamma, x, p.cur, p.h)
                });
                let _ = p.world.exact(&format!("unblend {what} {magnitude}"), &|b| {
                    b.unblend(&c, gamma, x, p.cur, p.h)
                });
                let _ = p.world.exact(&format!("combine {what} {magnitude}"), &|b| {
                    b.combine(&c, gamma, x, p.cur, p.h)
                });
            }
        }
    }
    let mut world = World::new(3, 200_000, 0, 6);
    for i in (0..100_000).step_by(7) {
        world.ints[100_000 + i] = world.ints[i];
    }
    let (a, b) = (Ints::new(0, 100_000), Ints::new(100_000, 100_000));
    let _ = world.exact("count_differences", &|c| c.count_differences(a, b, Words::new(0, 2)));
    let after = world.exact("compare", &|c| c.compare(Words::new(0, 2), Words::new(2, 2), 4, 3));
    assert_eq!(after.fault, Some(Fault::Checksum { activation: 4, block: 3 }));
}

/// With `|γ| = 0` the old content is not read, so a NaN in it does no harm.
#[test]
fn blend_without_gamma_does_not_read() {
    let mut world = World::new(1, 0, 300, 0);
    world.reals[200..].fill(f32::NAN);
    let gamma = FloatGamma::ZERO;
    let [cur, h, x] = [0, 1, 2].map(|i| Reals::new(i * 100, 100));
    let after = world.exact("blend", &|b| b.blend(&chunk(2), gamma, x, cur, h));
    assert_eq!(after.fault, None);
}

#[test]
fn bad_handles_are_errors() {
    let world = World::new(1, 100, 300, 10);
    let (grid, gamma) = (Grid::new(9).unwrap(), Gamma::new(1, Sign::Plus).unwrap());
    let (c, x, [cur, h, y]) =
        (chunk(2), Ints::new(0, 64), [0, 1, 2].map(|i| Reals::new(i * 64, 64)));
    let (side, sum) = (Words::new(0, 2), Words::new(2, 2));
    let try_it = |op: common::Op| world.cpu(2, op).result;
    assert_eq!(try_it(&|b| b.step(&c, grid, gamma, x, cur, h, side, sum)), Ok(()));
    assert!(is_handle(&try_it(&|b| b.step(&c, grid, gamma, x, cur, h, side, Words::new(1, 2)))));
    assert!(is_handle(&try_it(&|b| b.step(&c, grid, gamma, x, Reals::new(299, 64), h, side, sum))));
    assert!(is_handle(&try_it(&|b| b.step(
        &c,
        grid,
        gamma,
        x,
        Reals::new(usize::MAX, 64),
        h,
        side,
        sum
    ))));
    assert!(is_handle(&try_it(&|b| b.step(&c, grid, gamma, Ints::new(90, 64), cur, h, side, sum))));
    assert!(is_handle(&try_it(&|b| b.blend(&c, gamma.float(), y, cur, Reals::new(100, 64)))));
    assert!(matches!(
        try_it(&|b| b.step(&c, grid, gamma, x, cur, h, Words::new(0, 3), sum)),
        Err(Error::Handle(_) | Error::Shape { .. })
    ));
    assert!(matches!(
        try_it(&|b| b.step(&c, grid, gamma, x, cur, Reals::new(64, 63), side, sum)),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(
        try_it(&|b| b.step(&chunk(3), grid, gamma, x, cur, h, side, sum)),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(
        try_it(&|b| b.quantize(&c, grid, cur, x, Words::new(0, 1))),
        Err(Error::Shape { .. })
    ));
}
