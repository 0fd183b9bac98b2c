//! Products of every kind against exact ones in `f64`: the shapes of the models, and random odd
//! ones.

mod common;

use bdia_core::backend::{Order, Product};
use bdia_core::rng::{Draw, Stream};
use bdia_core::{Fault, NnOps, Reals};
use bdia_cpu::{Cpu, Precision, Products};
use common::{Op, World};
use half::bf16;

const ORDERS: [(Order, Order); 4] = [
    (Order::Plain, Order::Plain),
    (Order::Transposed, Order::Plain),
    (Order::Plain, Order::Transposed),
    (Order::Transposed, Order::Transposed),
];

fn available() -> impl Iterator<Item = Products> {
    Products::ALL.into_iter().filter(|p| p.is_available())
}

/// Where value `[row, col]` of a dense operand `[rows, cols]` is.
fn at(order: Order, [rows, cols]: [usize; 2], row: usize, col: usize) -> usize {
    match order {
        Order::Plain => row * cols + col,
        Order::Transposed => col * rows + row,
    }
}

/// Checks some values of `C`, all of them where there are few, against the sums of the rounded
/// factors.
///
/// With `n` terms, `S = Σ|a·b|` and unit roundoff `u = 2⁻²⁴`: a sum in `f32` in any order is off by
/// at most `n·u·S` to first order, twice that where the last bit is cut instead of rounded; what it
/// is added to is rounded once with it. Against the factors before they were rounded, by 2⁻⁸ of the
/// rounded values at most, `(2·2⁻⁸ + 2⁻¹⁶)·S` comes on top.
fn check(
    products: Products,
    p: &Product,
    world: &World,
    after: &World,
    [a, b, bias, c]: [Reals; 4],
    what: &str,
) {
    let round = |x: f32| match products.precision() {
        Precision::Bf16 => f64::from(bf16::from_f32(x).to_f32()),
        _ => f64::from(x),
    };
    let count = p.rows * p.cols;
    let random = Stream::new(77, 0, 0, 0, 0, Draw::Data);
    for n in 0..count.min(3000) {
        let i = if count <= 3000 { n } else { random.word(n as u32) as usize % count };
        let (row, col) = (i / p.cols, i % p.cols);
        let [mut rounded, mut exact, mut size] = [0.0_f64; 3];
        for k in 0..p.inner {
            let x = world.reals[a.start() + at(p.a, [p.rows, p.inner], row, k)];
            let y = world.reals[b.start() + at(p.b, [p.inner, p.cols], k, col)];
            rounded += round(x) * round(y);
            exact += f64::from(x) * f64::from(y);
            size += (round(x) * round(y)).abs();
        }
        let before = if p.accumulate { f64::from(world.reals[c.start() + i]) } else { 0.0 };
        let offset = if bias.is_empty() { 0.0 } else { f64::from(world.reals[bias.start() + col]) };
        let start = before + offset;
        let value = f64::from(after.reals[c.start() + i]);
        let u = 2.0_f64.powi(-24);
        let bound = 2.0 * u * (p.inner as f64 + 4.0) * (size + before.abs() + offset.abs());
        let (near, far) = ((value - start - rounded).abs(), (value - start - exact).abs());
        assert!(
            near <= bound,
            "{what}: value [{row}, {col}] is {value:e}, {near:e} off; {bound:e} is allowed"
        );
        let rounding = if products.precision() == Precision::F32 {
            0.0
        } else {
            2.0_f64.powi(-7) + 2.0_f64.powi(-16)
        };
        let bound = bound + rounding * size;
        assert!(
            far <= bound,
            "{what}: value [{row}, {col}] is {value:e}, {far:e} from the exact one"
        );
    }
}

/// One shape with all kinds of products; `C` is garbage where it is not added to.
fn case(
    [rows, cols, inner]: [usize; 3],
    [a_order, b_order]: [Order; 2],
    accumulate: bool,
    with_bias: bool,
    seed: u64,
) {
    let p = Product { rows, cols, inner, a: a_order, b: b_order, accumulate };
    let lens = [rows * inner, inner * cols, if with_bias { cols } else { 0 }, rows * cols];
    let mut end = 0;
    let [a, b, bias, c] = lens.map(|n| {
        end += n;
        Reals::new(end - n, n)
    });
    let mut world = World::new(seed, 0, end, 0);
    if !accumulate {
        world.reals[c.range()].fill(f32::NAN);
    }
    let op: Op = &|x| x.matmul(&p, a, b, with_bias.then_some(bias), c);
    for products in available() {
        let what = format!("{products:?}, {p:?}, bias {with_bias}");
        let after = world.threads_agree_with(products, &what, op);
        assert_eq!((after.result, after.fault), (Ok(()), None), "{what}");
        check(products, &p, &world, &after.world, [a, b, bias, c], &what);
    }
}

#[test]
fn shapes_of_the_models() {
    use Order::{Plain, Transposed};
    // Rows of a chunk, and the layers: GPT-2 124M's, ViT's; forward, gradient of the input, of the
    // weight.
    for (rows, layers) in [
        (512, [[768, 2304], [768, 768], [3072, 768]]),
        (260, [[512, 1536], [512, 512], [240, 512]]),
    ] {
        for [inner, cols] in layers {
            case([rows, cols, inner], [Plain, Plain], false, true, 1);
            case([rows, inner, cols], [Plain, Transposed], false, false, 2);
            case([inner, cols, rows], [Transposed, Plain], true, false, 3);
        }
    }
    // The head, with a part of the vocabulary that no tile divides.
    case([192, 5025, 768], [Plain, Transposed], false, false, 4);
    case([192, 768, 5025], [Plain, Plain], false, false, 5);
    case([5025, 768, 192], [Transposed, Plain], true, false, 6);
}

#[test]
fn odd_shapes() {
    let random = Stream::new(5, 0, 0, 0, 0, Draw::Data);
    for n in 0..120_u32 {
        // Small and large ones alike; each end of a tile, panel or piece comes up.
        let len = |i: u32| {
            let word = random.word(4 * n + i);
            1 + (word >> 8) as usize % [3, 20, 70, 130, 900][word as usize % 5]
        };
        let shape = [len(0), len(1), len(2)];
        let flags = random.word(4 * n + 3) as usize;
        let (a, b) = ORDERS[flags % 4];
        case(shape, [a, b], flags & 4 == 0, flags & 8 == 0, u64::from(n));
    }
    for (a, b) in ORDERS {
        // Inner terms in several panels.
        case([37, 50, 3111], [a, b], false, true, 6);
        case([70, 33, 1601], [a, b], true, false, 7);
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let (rows, cols, inner) = (70, 65, 130);
    let p = Product { rows, cols, inner, a: Order::Plain, b: Order::Plain, accumulate: false };
    let (a, b, c) = (
        Reals::new(0, rows * inner),
        Reals::new(9100, inner * cols),
        Reals::new(17_550, rows * cols),
    );
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7F80_0001)] {
        for products in available() {
            let mut world = World::new(3, 0, c.start() + c.len(), 0);
            world.reals[33 * inner + 129] = bad;
            let after = world.cpu_with(products, 2, &|x| x.matmul(&p, a, b, None, c)).world;
            for (i, x) in after.reals[c.range()].iter().enumerate() {
                assert_eq!(x.is_finite(), i / cols != 33, "{products:?}, {bad}: value {i} is {x}");
            }
        }
    }
    // The largest values round to infinity as bf16, and the loss says so.
    let mut layout = bdia_core::Layout::new(4);
    let x = layout.reals(bdia_core::Category::Workspace, 16);
    let targets = layout.ints(bdia_core::Category::Workspace, 1);
    for products in available() {
        let mut cpu = Cpu::with_products(&layout, 1, products).unwrap();
        let [a, b, c, losses] = [0, 1, 2, 3].map(|i| x.sub(i, 1));
        cpu.reals_mut(a).unwrap()[0] = f32::MAX;
        cpu.reals_mut(b).unwrap()[0] = 2.0;
        let p = Product {
            rows: 1,
            cols: 1,
            inner: 1,
            a: Order::Plain,
            b: Order::Plain,
            accumulate: false,
        };
        cpu.matmul(&p, a, b, None, c).unwrap();
        let ce = bdia_core::backend::CrossEntropy {
            vocab: 1,
            tokens: 1,
            row: 0,
            scale: 1.0,
            smoothing: 0.0,
        };
        cpu.cross_entropy(&common::chunk(1), &ce, c, targets, losses).unwrap();
        let fault = bdia_core::Storage::take_fault(&mut cpu).unwrap();
        assert!(matches!(fault, Some(Fault::Loss { .. })), "{products:?}: {fault:?}");
    }
}

/// `BDIA_PRODUCTS` names the kinds that this machine must have, so that a test that skips one for
/// want of an instruction fails.
#[test]
fn the_products_that_were_asked_for() {
    match std::env::var("BDIA_PRODUCTS") {
        Ok(asked) => {
            for name in asked.split(',') {
                assert!(
                    available().any(|p| format!("{p:?}") == name),
                    "{name} is not available here"
                );
            }
        }
        Err(_) => println!(
            "skipped: BDIA_PRODUCTS is not set; there are {:?}",
            available().collect::<Vec<_>>()
        ),
    }
    for precision in [Precision::F32, Precision::Bf16] {
        let best = Products::best(precision);
        assert!(best.is_available() && best.precision() == precision);
    }
}
