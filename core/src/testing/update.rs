//! [`Storage`](crate::Storage) and [`UpdateOps`]: every bit against the reference.

use num_traits::{Float, Zero};

use super::{Bench, Failure, INTS, OUTSIDE, Operand, PIECE, Value, chunk, noise, random, setup};
use crate::arena::{Category, Ints, Layout, Reals, Words};
use crate::backend::{Chunk, Storage, UpdateOps};
use crate::error::{Fault, Site};
use crate::real::Real;
use crate::update::{FloatGamma, Gamma, Grid, LIMIT, Sign, checksum, combine};

/// Values of a sample: below, at and above a word of side bits, and vectors with and without a
/// rest.
const PER: [usize; 6] = [1, 31, 32, 33, 40, 96];

/// What the values of a case are like.
#[derive(Clone, Copy, PartialEq)]
enum Values {
    /// A few units of the grid, half of them exactly between two.
    Ties,
    /// Near the middle of the range, where an `f32` has fewer bits than the grid: a fused
    /// multiply-add shows.
    Large,
    /// At the limits and beyond, NaN, infinity.
    Limits,
}

impl Values {
    const ALL: [Self; 3] = [Self::Ties, Self::Large, Self::Limits];

    const fn name(self) -> &'static str {
        match self {
            Self::Ties => "small values and ties",
            Self::Large => "large values",
            Self::Limits => "values at the limits and beyond",
        }
    }

    const fn frac_bits(self) -> u32 {
        match self {
            Self::Ties => 9,
            Self::Large | Self::Limits => 14,
        }
    }

    /// An activation on the grid.
    fn int(self, seed: u64, i: usize) -> i32 {
        let w = random(seed, i);
        match self {
            Self::Ties => w as i32 % 64,
            Self::Large => w as i32 % LIMIT,
            Self::Limits => match w % 8 {
                0 => LIMIT,
                1 => -LIMIT,
                2 => LIMIT - 1,
                3 => 1 - LIMIT,
                4 if i % 16 == 9 => i32::MAX,
                5 if i % 16 == 11 => i32::MIN,
                _ => (w >> 3) as i32 % 8,
            },
        }
    }

    /// An activation, or a block's output, in float.
    fn real(self, seed: u64, i: usize) -> f64 {
        let w = random(seed, i);
        match self {
            Self::Ties if w.is_multiple_of(2) => f64::from(w as i32 % 64) / 1024.0,
            Self::Ties => noise(seed, i),
            Self::Large => 16384.0 * noise(seed, i),
            Self::Limits => match w % 64 {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                3 => 65536.0,
                4 => -65536.0,
                5 => 65540.0,
                6 => 3e38,
                7 => -1e9,
                _ => f64::from(w as i32 % 1024) / 32768.0,
            },
        }
    }
}

/// Runs the operations of [`Storage`](crate::Storage) and [`UpdateOps`] against the reference;
/// `new` builds a backend for a layout.
///
/// # Errors
/// The first difference.
pub fn update_ops<B: UpdateOps>(mut new: impl FnMut(&Layout) -> B) -> Result<(), Failure> {
    let mut bench = Bench::new(&mut new, 0);
    storage(&mut bench)?;
    status(&mut bench)?;
    collisions(&mut bench)?;
    for values in Values::ALL {
        for per in PER {
            for n in 0..=3 {
                quantization(&mut bench, values, n, per)?;
                for m in [1, 2, 3, 8] {
                    for sign in [Sign::Random, Sign::Shared, Sign::Plus, Sign::Minus] {
                        steps(&mut bench, values, m, sign, n, per)?;
                    }
                }
                if values != Values::Limits {
                    floats(&mut bench, values, n, per)?;
                }
            }
        }
    }
    range_faults(&mut bench)?;
    gradient_faults(&mut bench)?;
    input_faults(&mut bench)?;
    comparisons(&mut bench)?;
    refusals(&mut bench)?;
    drop(bench);
    large(&mut new)
}

fn storage<B: UpdateOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    for n in [0, 1, 7, 32, 100] {
        bench.begin("storage", "fill and copy", [n, 0, 0, 0]);
        let (a, b, w) = (bench.reals(n), bench.garbage(n), bench.words(n));
        let (x, y) = (bench.ints(n, |i| i as i32 - 3), bench.ints(n, |_| 0));
        both!(bench, [Operand::set("dst", b, 0)], |on| on.copy_reals(a, b));
        both!(bench, [], |on| on.copy_ints(x, y));
        both!(bench, [], |on| on.fill_words(w, 0xDEAD_BEEF));
        both!(bench, [Operand::set("dst", b, 0)], |on| on.fill_reals(b, B::Real::of(0.1)));
    }
    bench.begin("storage", "", [8, 0, 0, 0]);
    let (a, w, x) = (bench.reals(8), bench.words(8), bench.ints(8, |_| 1));
    refused!(bench, "copy_reals onto itself", |on| on.copy_reals(a, a));
    refused!(bench, "copy_reals, overlapping", |on| on.copy_reals(a.sub(0, 4), a.sub(2, 4)));
    refused!(bench, "copy_reals, lengths", |on| on.copy_reals(a.sub(0, 2), a.sub(4, 3)));
    refused!(bench, "copy_reals, outside", |on| on.copy_reals(Reals::new(OUTSIDE, 8), a));
    refused!(bench, "copy_ints, overlapping", |on| on.copy_ints(x.sub(0, 4), x.sub(2, 4)));
    refused!(bench, "copy_ints, lengths", |on| on.copy_ints(x.sub(0, 2), x.sub(4, 3)));
    refused!(bench, "copy_ints, outside", |on| on.copy_ints(x, Ints::new(OUTSIDE, 8)));
    refused!(bench, "fill_reals, outside", |on| on
        .fill_reals(Reals::new(OUTSIDE, 8), B::Real::of(1.0)));
    refused!(bench, "fill_words, outside", |on| on.fill_words(Words::new(OUTSIDE, 8), 1));
    refused!(bench, "write_reals, lengths", |on| on.write_reals(a, &[B::Real::of(1.0); 7]));
    refused!(bench, "write_ints, lengths", |on| on.write_ints(x, &[1; 7]));
    refused!(bench, "write_words, lengths", |on| on.write_words(w, &[1; 7]));
    refused!(bench, "write_ints, outside", |on| on.write_ints(Ints::new(OUTSIDE, 1), &[1]));
    refused!(bench, "read_reals, lengths", |on| on.read_reals(a, &mut [B::Real::of(1.0); 9]));
    refused!(bench, "read_ints, lengths", |on| on.read_ints(x, &mut [1; 9]));
    refused!(bench, "read_words, lengths", |on| on.read_words(w, &mut [1; 9]));
    refused!(bench, "read_words, outside", |on| on.read_words(Words::new(OUTSIDE, 1), &mut [1]));
    Ok(())
}

/// The first fault stays.
fn status<B: UpdateOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    bench.begin("raise", "the first fault stays", [1, 0, 0, 0]);
    let first = Fault::Gradient { site: Site::Head };
    bench.backend.raise(first);
    bench.backend.raise(Fault::Checksum { activation: 1, block: 1 });
    bench.status(Some(first))?;
    let (y, x) = (bench.reals_of(1, |_| f64::NAN), bench.ints(1, |_| 0));
    let grid = setup("grid", Grid::new(4))?;
    bench.pending = Some(Fault::Checksum { activation: 3, block: 4 });
    both!(bench, [], |on| on.quantize(&chunk(1), grid, y, x, Words::EMPTY));
    Ok(())
}

fn quantization<B: UpdateOps>(
    bench: &mut Bench<B>,
    values: Values,
    n: usize,
    per: usize,
) -> Result<(), Failure> {
    let (chunk, len) = (chunk(n), n * per);
    let grid = setup("grid", Grid::new(values.frac_bits()))?;

    bench.begin("quantize", values.name(), [n, per, 0, 0]);
    let seed = bench.cases;
    let (y, x) = (bench.reals_of(len, |i| values.real(seed, i)), bench.ints(len, |_| 7));
    let sum = bench.words(2);
    both!(bench, [], |on| on.quantize(&chunk, grid, y, x, sum));
    both!(bench, [], |on| on.quantize(&chunk, grid, y, x, Words::EMPTY));

    bench.begin("dequantize", values.name(), [n, per, 0, 0]);
    let (y, x) = (bench.garbage(len), bench.ints(len, |i| values.int(seed, i)));
    both!(bench, [Operand::set("y", y, 0)], |on| on.dequantize(grid, x, y));

    bench.begin("add_quantized", values.name(), [n, per, 0, 0]);
    let (h, x) =
        (bench.reals_of(len, |i| values.real(seed, i)), bench.ints(len, |i| values.int(seed, i)));
    let sum = bench.words(2);
    both!(bench, [], |on| on.add_quantized(&chunk, grid, x, h, sum));
    let original = bench.before.ints;
    both!(bench, [], |on| on.add_quantized(&chunk, grid, x, h, Words::EMPTY));

    bench.op = "subtract_quantized";
    bench.go_on();
    both!(bench, [], |on| on.subtract_quantized(&chunk, grid, x, h, sum));
    for i in 0..INTS {
        let (expected, found) = (original[i], bench.found.ints[i]);
        if expected != found {
            return Err(bench.failure(
                "X after adding and subtracting",
                i,
                Value::Int(expected),
                Value::Int(found),
            ));
        }
    }

    bench.begin("subtract_quantized", values.name(), [n, per, 0, 0]);
    let (h, x) = (
        bench.reals_of(len, |i| values.real(seed, i)),
        bench.ints(len, |i| values.int(seed ^ 1 << 50, i)),
    );
    both!(bench, [], |on| on.subtract_quantized(&chunk, grid, x, h, Words::EMPTY));
    Ok(())
}

/// The step, its inverse (which must give the old bits back), and the inverse of anything at all.
fn steps<B: UpdateOps>(
    bench: &mut Bench<B>,
    values: Values,
    m: u32,
    sign: Sign,
    n: usize,
    per: usize,
) -> Result<(), Failure> {
    let (chunk, len) = (chunk(n), n * per);
    let grid = setup("grid", Grid::new(values.frac_bits()))?;
    let gamma = setup("gamma", Gamma::new(m, sign))?;

    bench.begin("step", values.name(), [n, per, m as usize, 0]);
    let seed = bench.cases;
    let x = bench.ints(len, |i| values.int(seed, i));
    let cur =
        bench.reals_of(len, |i| if i % 3 == 0 { 0.5 } else { values.real(seed ^ 1 << 50, i) });
    let h = bench.reals_of(len, |i| if i % 4 == 0 { 0.0 } else { values.real(seed ^ 1 << 51, i) });
    let (side, sum) = (bench.words(n * m as usize * per.div_ceil(32)), bench.words(2));
    let original = bench.before.ints;
    both!(bench, [], |on| on.step(&chunk, grid, gamma, x, cur, h, Words::EMPTY, Words::EMPTY));
    both!(bench, [], |on| on.step(&chunk, grid, gamma, x, cur, h, side, sum));

    bench.op = "inverse";
    bench.go_on();
    both!(bench, [], |on| on.inverse(&chunk, grid, gamma, x, cur, h, side, sum));
    for i in 0..INTS {
        let (expected, found) = (original[i], bench.found.ints[i]);
        if expected != found {
            return Err(bench.failure(
                "X_{k-1} after step and inverse",
                i,
                Value::Int(expected),
                Value::Int(found),
            ));
        }
    }

    bench.begin("inverse", "any words as side bits", [n, per, m as usize, 0]);
    let x = bench.ints(len, |i| values.int(seed, i));
    let cur = bench.reals_of(len, |i| values.real(seed ^ 1 << 50, i));
    let h = bench.reals_of(len, |i| values.real(seed ^ 1 << 51, i));
    let side = bench.words(n * m as usize * per.div_ceil(32));
    both!(bench, [], |on| on.inverse(&chunk, grid, gamma, x, cur, h, side, Words::EMPTY));
    Ok(())
}

/// The update without a grid, and the gradient.
fn floats<B: UpdateOps>(
    bench: &mut Bench<B>,
    values: Values,
    n: usize,
    per: usize,
) -> Result<(), Failure> {
    let (chunk, len) = (chunk(n), n * per);
    for magnitude in [0.0, 0.25, 0.5, 0.6, 1.0] {
        for sign in [Sign::Random, Sign::Shared, Sign::Minus] {
            let gamma = setup("gamma", FloatGamma::new(magnitude, sign))?;
            bench.begin("blend", values.name(), [n, per, 0, 0]);
            let seed = bench.cases;
            let real = |part: u64| move |i: usize| values.real(seed ^ part << 50, i);
            // With γ = 0 the old content is not read: garbage.
            let x =
                if magnitude == 0.0 { bench.garbage(len) } else { bench.reals_of(len, real(0)) };
            let (cur, h) = (bench.reals_of(len, real(1)), bench.reals_of(len, real(2)));
            both!(bench, [Operand::sum("x", x, 0)], |on| on.blend(&chunk, gamma, x, cur, h));
            if magnitude != 0.0 {
                bench.op = "unblend";
                both!(bench, [Operand::sum("x", x, 0)], |on| on.unblend(&chunk, gamma, x, cur, h));
            }

            bench.begin("combine", values.name(), [n, per, 0, 0]);
            let (next, cur) = (bench.reals_of(len, real(3)), bench.reals_of(len, real(4)));
            let h = bench.garbage(len);
            let operands = [
                Operand::sum("next", next, 0),
                Operand::sum("cur", cur, 0),
                Operand::set("h", h, 0),
            ];
            let [a, b, c] = operands;
            both!(bench, [a, b, c], |on| on.combine(&chunk, gamma, next, cur, h));
        }
    }
    Ok(())
}

/// The fault names site, sample and value of the first bad element; it is stored as 0 (or wraps).
fn range_faults<B: UpdateOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    let (n, per) = (3, 37);
    let (grid, gamma) =
        (setup("grid", Grid::new(14))?, setup("gamma", Gamma::new(1, Sign::Random))?);
    for site in [Site::Embedding, Site::Block(4), Site::Head] {
        let chunk = Chunk { site, ..chunk(n) };
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 65537.0, -65537.0, 1e20] {
            for at in [0, 36, 37, 74, 110] {
                // A second one, in a later sample or the same, must not win; nor an earlier one in
                // memory order.
                let value = |i: usize| {
                    if i == at || i == at + 5 { bad * (1.0 + (i - at) as f64) } else { 0.25 }
                };
                bench.begin("quantize", "range fault", [n, per, at, 0]);
                let (y, x, sum) =
                    (bench.reals_of(n * per, value), bench.ints(n * per, |_| 9), bench.words(2));
                both!(bench, [], |on| on.quantize(&chunk, grid, y, x, sum));
                bench.op = "add_quantized";
                both!(bench, [], |on| on.add_quantized(&chunk, grid, x, y, sum));
                bench.op = "subtract_quantized raises nothing";
                both!(bench, [], |on| on.subtract_quantized(&chunk, grid, x, y, sum));
                bench.op = "step";
                let cur = bench.reals(n * per);
                let side = bench.words(n * per.div_ceil(32));
                both!(bench, [], |on| on.step(&chunk, grid, gamma, x, cur, y, side, sum));
                bench.op = "inverse raises nothing";
                both!(bench, [], |on| on.inverse(&chunk, grid, gamma, x, cur, y, side, sum));
                if !bad.is_finite() {
                    bench.op = "blend";
                    let x = bench.reals(n * per);
                    both!(bench, [Operand::sum("x", x, 0)], |on| on.blend(
                        &chunk,
                        gamma.float(),
                        x,
                        cur,
                        y
                    ));
                }
            }
        }
        // The sum leaves the range, not the quantized value.
        for at in [0, 73, 110] {
            bench.begin("add_quantized", "the sum leaves the range", [n, per, at, 0]);
            let x = bench.ints(n * per, |i| if i == at { LIMIT - 1 } else { -5 });
            let h = bench.reals_of(n * per, |i| if i == at { 3.0 / 16384.0 } else { 0.5 });
            let sum = bench.words(2);
            both!(bench, [], |on| on.add_quantized(&chunk, grid, x, h, sum));
            bench.begin("step", "the sum leaves the range", [n, per, at, 0]);
            let x = bench.ints(n * per, |i| if i >= at { LIMIT } else { -5 });
            let cur = bench.reals_of(n * per, |_| 0.0);
            let h = bench.reals_of(n * per, |i| if i >= at { 43000.0 } else { 0.5 });
            let plus = setup("gamma", Gamma::new(1, Sign::Plus))?;
            both!(bench, [], |on| on.step(
                &chunk,
                grid,
                plus,
                x,
                cur,
                h,
                Words::EMPTY,
                Words::EMPTY
            ));
        }
    }
    Ok(())
}

/// Gradients that are not finite, or leave the range of the real type in the step's gradient: the
/// fault names site, sample and value of the first one.
fn gradient_faults<B: UpdateOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    let (n, per) = (3, 37);
    for site in [Site::Head, Site::Block(4)] {
        let chunk = Chunk { site, ..chunk(n) };
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for at in [0, 36, 37, 110] {
                // A second one, of another kind, must not win.
                let value = move |i: usize| match i {
                    _ if i == at => bad,
                    _ if i == at + 5 => -bad,
                    _ => 0.25,
                };
                bench.begin("check_gradient", "gradient fault", [n, per, at, 0]);
                let g = bench.reals_of(n * per, value);
                both!(bench, [], |on| on.check_gradient(&chunk, g));
                for magnitude in [0.0, 0.5, 1.0] {
                    let gamma = setup("gamma", FloatGamma::new(magnitude, Sign::Minus))?;
                    for wild in 0..2 {
                        bench.begin("combine", "gradient fault", [n, per, at, wild]);
                        let finite = bench.reals(n * per);
                        let wild_one = bench.reals_of(n * per, value);
                        let h = bench.garbage(n * per);
                        let (next, cur) =
                            if wild == 0 { (wild_one, finite) } else { (finite, wild_one) };
                        let operands = [
                            Operand::sum("next", next, 0),
                            Operand::sum("cur", cur, 0),
                            Operand::set("h", h, 0),
                        ];
                        let [a, b, c] = operands;
                        both!(bench, [a, b, c], |on| on.combine(&chunk, gamma, next, cur, h));
                    }
                }
            }
        }
        bench.begin("check_gradient", "large and small, but finite", [n, per, 0, 0]);
        let extreme = [B::Real::max_value(), B::Real::min_value(), B::Real::min_positive_value()];
        let g = bench.reals_of(n * per, |i| extreme[i % 3].wide());
        both!(bench, [], |on| on.check_gradient(&chunk, g));
        // (1+γ)·G leaves the range, G itself does not.
        bench.begin("combine", "an overflow", [n, per, 0, 0]);
        let gamma = setup("gamma", FloatGamma::new(0.5, Sign::Random))?;
        let largest = B::Real::max_value().wide();
        let next = bench.reals_of(n * per, |i| if i > 40 { -0.75 * largest } else { 1.0 });
        let (cur, h) = (bench.reals(n * per), bench.garbage(n * per));
        let operands =
            [Operand::sum("next", next, 0), Operand::sum("cur", cur, 0), Operand::set("h", h, 0)];
        let [a, b, c] = operands;
        both!(bench, [a, b, c], |on| on.combine(&chunk, gamma, next, cur, h));
    }
    Ok(())
}

/// An input that is not what a block was given: any bit, and nothing else.
fn input_faults<B: UpdateOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    let (n, per, chunk) = (3, 37, chunk(3));
    for values in [Values::Ties, Values::Large] {
        let grid = setup("grid", Grid::new(values.frac_bits()))?;
        for at in [None, Some(0), Some(36), Some(37), Some(110)] {
            // The smallest change there is; at 0, a sign of zero.
            let int = |i: usize| if i == 0 { 0 } else { values.int(9, i) | 1 };
            let real = |i: usize| {
                let y = grid.dequantize::<B::Real>(int(i));
                match at {
                    Some(0) if i == 0 => -0.0,
                    Some(at) if i == at || i == at + 5 => (y + y * B::Real::epsilon()).wide(),
                    _ => y.wide(),
                }
            };
            bench.begin("check_input", values.name(), [n, per, at.unwrap_or(999), 0]);
            let (x, y) = (bench.ints(n * per, int), bench.reals_of(n * per, real));
            both!(bench, [], |on| on.check_input(&chunk, grid, x, y));
        }
    }
    Ok(())
}

/// Change number `n` of `x`, three rows of [`ROW`] values: what an error that has a structure does.
fn change(n: usize, x: &mut [i32; 3 * ROW]) {
    let (kind, n) = (n % 8, n / 8);
    let (at, d) = (n % (ROW - 1), 1 + (n / (ROW - 1)) as i32);
    let mut add = |differences: &[(usize, i32)]| {
        differences.iter().for_each(|&(i, d)| x[i] = x[i].wrapping_add(d));
    };
    match kind {
        0 => add(&[(at, d), (at + 1, -2 * d), (at + 2, d)]),
        1 => add(&[(at, d), (at + 1, -d), (at + ROW, -d), (at + ROW + 1, d)]),
        2 => add(&[(at, d << 8), (at + 16, d << 8)]),
        3 => add(&[(ROW, n as i32 + 1)]),
        4 => [at, at + ROW, at + 2 * ROW].into_iter().for_each(|i| x[i] ^= 1 << (7 + d)),
        5 => x.swap(at, at + d as usize * ROW / 2),
        6 => x[at..at + 4 + d as usize].rotate_left(1),
        _ => x[at..at + 5 + d as usize].reverse(),
    }
}

/// Values of a row in [`change`].
const ROW: usize = 65;

/// Tensors that differ from each other in patterns have different checksums, and parts of these
/// sums agree as often as those of random numbers do.
fn collisions<B: UpdateOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    const BITS: u32 = 12;
    let mut sums = [0_u64; 1024];
    let grid = setup("grid", Grid::new(9))?;
    bench.begin("add_quantized", "patterns of changes", [1, 3 * ROW, 0, 0]);
    let (x, h) = (bench.ints(3 * ROW, |_| 0), bench.reals_of(3 * ROW, |_| 0.0));
    let sum = bench.words(2);
    bench.upload(0, &[])?;
    for (n, found) in sums.iter_mut().enumerate() {
        let mut values = core::array::from_fn(|i| Values::Large.int(6, i) >> 12);
        change(n, &mut values);
        let mut words = [0; 2];
        let outcome = bench
            .backend
            .write_ints(x, &values)
            .and(bench.backend.fill_words(sum, 0))
            .and(bench.backend.add_quantized(&chunk(1), grid, x, h, sum))
            .and(bench.backend.read_words(sum, &mut words));
        bench.done("outcome", outcome)?;
        *found = u64::from(words[1]) << 32 | u64::from(words[0]);
    }
    sums.sort_unstable();
    if let Some(i) = sums.windows(2).position(|pair| pair[0] == pair[1]) {
        return Err(bench.failure("equal checksums", i, Value::SomeError, Value::Outcome(Ok(()))));
    }
    for shift in [0, 13, 26, 39, 52] {
        let mut cut = sums.map(|sum| sum >> shift & ((1 << BITS) - 1));
        cut.sort_unstable();
        let pairs = |run: &[u64]| run.len() * (run.len() - 1) / 2;
        let equal: usize = cut.chunk_by(|a, b| a == b).map(pairs).sum();
        // Of 1024·1023/2 pairs of random sums 128 agree in 12 bits, with a deviation of 11.
        if !(60..=196).contains(&equal) {
            let (expected, found) = (Value::Word(128), Value::Word(equal as u32));
            return Err(bench.failure("pairs that agree", shift as usize, expected, found));
        }
    }
    Ok(())
}

fn comparisons<B: UpdateOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    for (case, b) in [
        ("equal", [1, 2]),
        ("low word", [0, 2]),
        ("high word", [1, 0x8000_0002]),
        ("swapped", [2, 1]),
    ] {
        bench.begin("compare", case, [0; 4]);
        let (a_words, b_words) = (bench.words(2), bench.words(2));
        bench.set_words(a_words, &[1, 2]);
        bench.set_words(b_words, &b);
        both!(bench, [], |on| on.compare(a_words, b_words, 6, 7));
    }
    for n in [0, 1, 8, 33, 250] {
        for every in [1, 3, 1000] {
            bench.begin("count_differences", "a carry into the high word", [n, every, 0, 0]);
            let a = bench.ints(n, |i| i as i32 - 8);
            let b = bench.ints(n, |i| if i % every == 0 { i32::MIN } else { i as i32 - 8 });
            let count = bench.words(2);
            bench.set_words(count, &[u32::MAX, 3]);
            both!(bench, [], |on| on.count_differences(a, b, count));
        }
    }
    Ok(())
}

fn refusals<B: UpdateOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    let (n, per, m) = (2, 40, 2);
    let (ok, grid) = (chunk(n), setup("grid", Grid::new(9))?);
    let gamma = setup("gamma", Gamma::new(2, Sign::Random))?;
    bench.begin("refusals", "", [n, per, m, 0]);
    let x = bench.ints(n * per, |i| i as i32);
    let (a, b, c) = (bench.reals(n * per), bench.reals(n * per), bench.reals(n * per));
    let (side, sum) = (bench.words(n * m * 2), bench.words(2));
    let (no, far) = (Words::EMPTY, Reals::new(OUTSIDE, n * per));
    let far_ints = Ints::new(OUTSIDE, n * per);
    let odd = chunk(3);
    let none = chunk(0);

    let mut other = Layout::new(4);
    let foreign = other.reals(Category::Workspace, n * per);
    let foreign_ints = other.ints(Category::Workspace, n * per);
    bench.op = "quantize";
    refused!(bench, "x outside", |on| on.quantize(&ok, grid, a, far_ints, no));
    refused!(bench, "y outside", |on| on.quantize(&ok, grid, far, x, no));
    refused!(bench, "x of another layout", |on| on.quantize(&ok, grid, a, foreign_ints, no));
    refused!(bench, "y of another layout", |on| on.quantize(&ok, grid, foreign, x, no));
    refused!(bench, "lengths", |on| on.quantize(&ok, grid, a.sub(0, n * per - 2), x, no));
    refused!(bench, "samples that do not divide the length", |on| on
        .quantize(&odd, grid, a, x, no));
    refused!(bench, "no samples", |on| on.quantize(&none, grid, a, x, no));
    bench.op = "dequantize";
    refused!(bench, "x outside", |on| on.dequantize(grid, far_ints, a));
    refused!(bench, "y outside", |on| on.dequantize(grid, x, far));
    refused!(bench, "lengths", |on| on.dequantize(grid, x, a.sub(0, 3)));
    bench.op = "add_quantized";
    refused!(bench, "x outside", |on| on.add_quantized(&ok, grid, far_ints, a, no));
    refused!(bench, "h outside", |on| on.add_quantized(&ok, grid, x, far, no));
    refused!(bench, "lengths", |on| on.add_quantized(&ok, grid, x, a.sub(0, 2), no));
    refused!(bench, "samples that do not divide the length", |on| on
        .add_quantized(&odd, grid, x, a, no));
    bench.op = "subtract_quantized";
    refused!(bench, "x outside", |on| on.subtract_quantized(&ok, grid, far_ints, a, no));
    refused!(bench, "h outside", |on| on.subtract_quantized(&ok, grid, x, far, no));
    refused!(bench, "lengths", |on| on.subtract_quantized(&ok, grid, x, a.sub(0, 2), no));
    refused!(bench, "samples that do not divide the length", |on| on
        .subtract_quantized(&odd, grid, x, a, no));
    bench.op = "step";
    refused!(bench, "x outside", |on| on.step(&ok, grid, gamma, far_ints, a, b, side, sum));
    refused!(bench, "cur outside", |on| on.step(&ok, grid, gamma, x, far, b, side, sum));
    refused!(bench, "h outside", |on| on.step(&ok, grid, gamma, x, a, far, side, sum));
    refused!(bench, "side outside", |on| on.step(
        &ok,
        grid,
        gamma,
        x,
        a,
        b,
        Words::new(OUTSIDE, n * m * 2),
        sum
    ));
    refused!(bench, "sum outside", |on| on.step(
        &ok,
        grid,
        gamma,
        x,
        a,
        b,
        side,
        Words::new(OUTSIDE, 2)
    ));
    refused!(bench, "side and sum overlap", |on| on.step(
        &ok,
        grid,
        gamma,
        x,
        a,
        b,
        side,
        side.sub(1, 2)
    ));
    refused!(bench, "side too short", |on| on.step(&ok, grid, gamma, x, a, b, side.sub(0, 7), sum));
    refused!(bench, "cur too short", |on| on.step(&ok, grid, gamma, x, a.sub(0, 7), b, side, sum));
    refused!(bench, "h too short", |on| on.step(&ok, grid, gamma, x, a, b.sub(0, 7), side, sum));
    refused!(bench, "samples that do not divide the length", |on| on
        .step(&odd, grid, gamma, x, a, b, side, sum));
    bench.op = "inverse";
    refused!(bench, "x outside", |on| on.inverse(&ok, grid, gamma, far_ints, a, b, side, sum));
    refused!(bench, "cur outside", |on| on.inverse(&ok, grid, gamma, x, far, b, side, sum));
    refused!(bench, "h outside", |on| on.inverse(&ok, grid, gamma, x, a, far, side, sum));
    refused!(bench, "side and sum overlap", |on| on.inverse(
        &ok,
        grid,
        gamma,
        x,
        a,
        b,
        side,
        side.sub(1, 2)
    ));
    refused!(bench, "no side bits", |on| on.inverse(&ok, grid, gamma, x, a, b, no, sum));
    refused!(bench, "side too long", |on| on.inverse(
        &ok,
        grid,
        gamma,
        x,
        a,
        b,
        Words::new(side.start(), 9),
        no
    ));
    bench.op = "blend";
    refused!(bench, "x outside", |on| on.blend(&ok, gamma.float(), far, a, b));
    refused!(bench, "h outside", |on| on.blend(&ok, gamma.float(), a, b, far));
    refused!(bench, "x is h", |on| on.blend(&ok, gamma.float(), a, b, a));
    refused!(bench, "lengths", |on| on.blend(&ok, gamma.float(), a, b, c.sub(0, 4)));
    refused!(bench, "samples that do not divide the length", |on| on.blend(
        &odd,
        gamma.float(),
        a,
        b,
        c
    ));
    bench.op = "unblend";
    refused!(bench, "x is cur", |on| on.unblend(&ok, gamma.float(), a, a, b));
    refused!(bench, "lengths", |on| on.unblend(&ok, gamma.float(), a, b.sub(0, 2), c));
    bench.op = "combine";
    refused!(bench, "next is cur", |on| on.combine(&ok, gamma.float(), a, a, b));
    refused!(bench, "cur overlaps h", |on| on.combine(
        &ok,
        gamma.float(),
        a.sub(0, 40),
        b.sub(0, 40),
        b.sub(20, 40)
    ));
    refused!(bench, "h outside", |on| on.combine(&ok, gamma.float(), a, b, far));
    refused!(bench, "lengths", |on| on.combine(&ok, gamma.float(), a, b, c.sub(0, 2)));
    bench.op = "check_gradient";
    refused!(bench, "outside", |on| on.check_gradient(&ok, far));
    refused!(bench, "of another layout", |on| on.check_gradient(&ok, foreign));
    refused!(bench, "samples that do not divide the length", |on| on.check_gradient(&odd, a));
    bench.op = "check_input";
    refused!(bench, "x outside", |on| on.check_input(&ok, grid, far_ints, a));
    refused!(bench, "y of another layout", |on| on.check_input(&ok, grid, x, foreign));
    refused!(bench, "lengths", |on| on.check_input(&ok, grid, x, a.sub(0, 2)));
    refused!(bench, "samples that do not divide the length", |on| on.check_input(&odd, grid, x, a));
    bench.op = "compare";
    refused!(bench, "outside", |on| on.compare(sum, Words::new(OUTSIDE, 2), 0, 0));
    bench.op = "count_differences";
    refused!(bench, "outside", |on| on.count_differences(x, far_ints, sum));
    refused!(bench, "lengths", |on| on.count_differences(x, x.sub(0, 3), sum));
    refused!(bench, "count outside", |on| on.count_differences(x, x, Words::new(OUTSIDE, 2)));
    Ok(())
}

/// Tensors that are long enough for threads: step, inverse, gradient and quantization, element by
/// element against [`crate::update`].
fn large<B: UpdateOps>(new: impl FnMut(&Layout) -> B) -> Result<(), Failure> {
    let (n, per, m) = (5_usize, 20_011_usize, 2_u32);
    let (len, stride) = (n * per, per.div_ceil(32));
    let mut layout = Layout::new(B::Real::BYTES);
    let x = layout.ints(Category::Activations, len);
    let (cur, h) = (layout.reals(Category::Workspace, len), layout.reals(Category::Workspace, len));
    let next = layout.reals(Category::Workspace, len);
    let side = layout.words(Category::SideBits, n * m as usize * stride);
    let sum = layout.words(Category::SideBits, 2);
    let mut bench = Large { backend: { new }(&layout), op: "step", sizes: [n, per, m as usize, 0] };

    let (chunk, grid) = (chunk(n), setup("grid", Grid::new(14))?);
    let gamma = setup("gamma", Gamma::new(2, Sign::Random))?;
    let (int, real) = (
        |i: usize| Values::Large.int(1, i),
        |part: u64| move |i: usize| Values::Large.real(part, i),
    );
    let of = |x: f64| B::Real::of(x);
    bench.write_ints(x, int)?;
    for (tensor, part) in [(cur, 2), (h, 3), (next, 4)] {
        bench.write_reals(tensor, real(part))?;
    }
    let cleared = bench.backend.fill_words(sum, 0).and(bench.backend.fill_words(side, 0xFFFF_FFFF));
    bench.done(cleared)?;
    let outcome = bench.backend.step(&chunk, grid, gamma, x, cur, h, side, sum);
    bench.done(outcome)?;
    let stepped = |i: usize| {
        let sigma = chunk.sigma(gamma, i / per);
        let q = grid.quantize(gamma.mix(sigma, of(real(2)(i)), of(real(3)(i)))).unwrap_or(0);
        gamma.step(sigma, int(i), q, i % per).0
    };
    bench.check_ints("x", x, stepped)?;
    bench.check_words("side", side, |w| {
        let (s, plane, word) = (w / stride / m as usize, w / stride % m as usize, w % stride);
        (0..32)
            .filter(|bit| word * 32 + bit < per)
            .fold(0, |all, bit| all | (int(s * per + word * 32 + bit) as u32 >> plane & 1) << bit)
    })?;
    bench.check_sum(sum, &chunk, per, stepped)?;

    bench.op = "inverse";
    let cleared = bench.backend.fill_words(sum, 0);
    bench.done(cleared)?;
    let outcome = bench.backend.inverse(&chunk, grid, gamma, x, cur, h, side, sum);
    bench.done(outcome)?;
    bench.check_ints("x", x, int)?;
    bench.check_sum(sum, &chunk, per, int)?;

    bench.op = "combine";
    let outcome = bench.backend.combine(&chunk, gamma.float(), next, cur, h);
    bench.done(outcome)?;
    let combined = |i: usize| {
        let g = gamma.value::<B::Real>(chunk.sigma(gamma, i / per));
        combine(g, of(real(4)(i)), of(real(2)(i)))
    };
    bench.check_reals("next", next, |i| combined(i).0)?;
    bench.check_reals("cur", cur, |i| combined(i).1)?;
    bench.check_reals("h", h, |i| combined(i).2)?;

    // Far from the first value of its sample, and a second one in the next.
    let wild = move |i: usize| i == 3 * per + 17_001 || i == 4 * per;
    let (site, sample) = (chunk.site, chunk.first + 3);
    let bad = Fault::ActivationGradient { site, sample, value: f64::INFINITY };
    bench.op = "check_gradient";
    bench.write_reals(h, |i| if wild(i) { f64::INFINITY } else { real(5)(i) })?;
    let outcome = bench.backend.check_gradient(&chunk, h);
    bench.done(outcome)?;
    bench.check_fault(bad)?;
    bench.op = "combine";
    bench.write_reals(next, |i| if wild(i) { f64::INFINITY } else { real(4)(i) })?;
    bench.write_reals(cur, real(2))?;
    let outcome = bench.backend.combine(&chunk, gamma.float(), next, cur, h);
    bench.done(outcome)?;
    bench.check_fault(bad)?;
    bench.op = "check_input";
    bench.write_ints(x, |i| int(i) | 1)?;
    let given = |i: usize| grid.dequantize::<B::Real>(int(i) | 1).wide();
    bench.write_reals(h, |i| if wild(i) { 2.0 * given(i) } else { given(i) })?;
    let outcome = bench.backend.check_input(&chunk, grid, x, h);
    bench.done(outcome)?;
    bench.check_fault(Fault::Input { site, sample })?;

    bench.op = "quantize";
    bench.write_reals(h, |i| if i == 3 * per + 7 || i == 4 * per { 1e9 } else { real(5)(i) })?;
    let outcome =
        bench.backend.fill_words(sum, 0).and(bench.backend.quantize(&chunk, grid, h, x, sum));
    bench.done(outcome)?;
    let quantized = |i: usize| {
        let y = if i == 3 * per + 7 || i == 4 * per { 1e9 } else { real(5)(i) };
        grid.quantize(of(y)).unwrap_or(0)
    };
    bench.check_ints("x", x, quantized)?;
    bench.check_sum(sum, &chunk, per, quantized)?;
    bench.check_fault(Fault::Range { site, sample, value: 1e9 })
}

/// A backend whose memory passes through the host piece by piece.
struct Large<B> {
    backend: B,
    op: &'static str,
    sizes: [usize; 4],
}

impl<B: UpdateOps> Large<B> {
    /// This fault has been noticed, and no other.
    fn check_fault(&mut self, expected: Fault) -> Result<(), Failure> {
        let (expected, found) = (Some(expected), self.backend.take_fault().unwrap_or_default());
        if found == expected {
            return Ok(());
        }
        Err(self.failure("status", 0, Value::Fault(expected), Value::Fault(found)))
    }

    fn failure(&self, what: &'static str, index: usize, expected: Value, found: Value) -> Failure {
        Failure {
            op: self.op,
            case: "large tensors",
            sizes: self.sizes,
            what,
            index,
            expected,
            found,
        }
    }

    fn done(&self, outcome: crate::Result<()>) -> Result<(), Failure> {
        outcome
            .map_err(|e| self.failure("outcome", 0, Value::Outcome(Ok(())), Value::Outcome(Err(e))))
    }

    fn write_ints(&mut self, h: Ints, value: impl Fn(usize) -> i32) -> Result<(), Failure> {
        for start in (0..h.len()).step_by(PIECE) {
            let piece: [i32; PIECE] = core::array::from_fn(|i| value(start + i));
            let part = h.sub(start, PIECE);
            let outcome = self.backend.write_ints(part, &piece[..part.len()]);
            self.done(outcome)?;
        }
        Ok(())
    }

    fn write_reals(&mut self, h: Reals, value: impl Fn(usize) -> f64) -> Result<(), Failure> {
        for start in (0..h.len()).step_by(PIECE) {
            let piece: [B::Real; PIECE] = core::array::from_fn(|i| B::Real::of(value(start + i)));
            let part = h.sub(start, PIECE);
            let outcome = self.backend.write_reals(part, &piece[..part.len()]);
            self.done(outcome)?;
        }
        Ok(())
    }

    fn check_ints(
        &self,
        name: &'static str,
        h: Ints,
        value: impl Fn(usize) -> i32,
    ) -> Result<(), Failure> {
        let mut piece = [0; PIECE];
        for start in (0..h.len()).step_by(PIECE) {
            let part = h.sub(start, PIECE);
            self.done(self.backend.read_ints(part, &mut piece[..part.len()]))?;
            for (i, &found) in piece[..part.len()].iter().enumerate() {
                let expected = value(start + i);
                if expected != found {
                    return Err(self.failure(
                        name,
                        start + i,
                        Value::Int(expected),
                        Value::Int(found),
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_reals(
        &self,
        name: &'static str,
        h: Reals,
        value: impl Fn(usize) -> B::Real,
    ) -> Result<(), Failure> {
        let mut piece = [B::Real::zero(); PIECE];
        for start in (0..h.len()).step_by(PIECE) {
            let part = h.sub(start, PIECE);
            self.done(self.backend.read_reals(part, &mut piece[..part.len()]))?;
            for (i, found) in piece[..part.len()].iter().enumerate() {
                let (expected, found) = (value(start + i).wide(), found.wide());
                if expected.to_bits() != found.to_bits() {
                    return Err(self.failure(
                        name,
                        start + i,
                        Value::Real(expected),
                        Value::Real(found),
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_words(
        &self,
        name: &'static str,
        h: Words,
        value: impl Fn(usize) -> u32,
    ) -> Result<(), Failure> {
        let mut piece = [0; PIECE];
        for start in (0..h.len()).step_by(PIECE) {
            let part = h.sub(start, PIECE);
            self.done(self.backend.read_words(part, &mut piece[..part.len()]))?;
            for (i, &found) in piece[..part.len()].iter().enumerate() {
                let expected = value(start + i);
                if expected != found {
                    return Err(self.failure(
                        name,
                        start + i,
                        Value::Word(expected),
                        Value::Word(found),
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_sum(
        &self,
        sum: Words,
        chunk: &Chunk,
        per: usize,
        value: impl Fn(usize) -> i32,
    ) -> Result<(), Failure> {
        let total = (0..chunk.samples * per)
            .fold(0_u64, |total, i| total.wrapping_add(checksum(value(i), chunk.first * per + i)));
        self.check_words("checksum", sum, |w| (total >> (32 * w)) as u32)
    }
}
