//! [`OptimOps`] against the reference, up to rounding.

use num_traits::{Float, Zero};

use super::{Bench, Failure, OUTSIDE, Operand, Value, noise, random};
use crate::arena::{Layout, Reals, Words};
use crate::backend::{OptimOps, State, Storage};
use crate::codes::{self, BLOCK, PER_WORD, SIGNED, UNSIGNED, ZERO};
use crate::error::{Fault, Site};
use crate::optim::{Rule, Sizes, Update};
use crate::real::Real;

const SIZES: [usize; 7] = [0, 1, 2, 7, 33, 256, 600];

/// Matrices, for the rule that minds.
const SHAPES: [[usize; 2]; 7] = [[2, 2], [3, 11], [24, 25], [2, 300], [300, 2], [7, 1], [31, 17]];

const RULES: [(&str, Rule); 8] = [
    // Of tensors that are too small for codes.
    ("8-bit AdamW", Rule::AdamW8bit { beta1: 0.9, beta2: 0.95, eps: 1e-8 }),
    ("Adafactor", Rule::ADAFACTOR),
    ("SGD", Rule::Sgd { momentum: 0.0 }),
    ("SGD with momentum", Rule::Sgd { momentum: 0.9 }),
    ("AdamW", Rule::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 }),
    ("AdamW without epsilon", Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 0.0 }),
    ("SET-Adam", Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 1e-18 }),
    ("SET-Adam without epsilon", Rule::SetAdam { beta1: 0.9, beta2: 0.999, eps: 0.0 }),
];

/// Runs [`OptimOps`] against the reference; `new` builds a backend for a layout.
///
/// # Errors
/// The first difference.
pub fn optim_ops<B: OptimOps>(mut new: impl FnMut(&Layout) -> B) -> Result<(), Failure> {
    let mut bench = Bench::new(&mut new, 0);
    for n in SIZES {
        squares(&mut bench, n)?;
        for rule in RULES {
            updates(&mut bench, rule, [1, n])?;
        }
    }
    for shape in SHAPES {
        updates(&mut bench, ("Adafactor", Rule::ADAFACTOR), shape)?;
    }
    faults(&mut bench)?;
    refusals(&mut bench)?;
    drop(bench);
    large(&mut new)?;
    let mut bench = Bench::with_words(new, CODED_REALS, CODED_WORDS);
    CODED.into_iter().try_for_each(|n| coded(&mut bench, n))
}

fn squares<B: OptimOps>(bench: &mut Bench<B>, n: usize) -> Result<(), Failure> {
    for (case, magnitude) in
        [("order one", 1.0), ("squares below the normal numbers", 1e-21), ("large", 1e15)]
    {
        bench.begin("sum_squares", case, [n, 0, 0, 0]);
        let seed = bench.cases;
        let (g, out) = (bench.reals_of(n, |i| magnitude * noise(seed, i)), bench.garbage(1));
        // In f64 or as exact as that: no term is lost, so the result is good to a few roundings of
        // the type itself.
        both!(bench, [Operand::set("out", out, 1).tight()], |on| on.sum_squares(
            Site::Block(3),
            g,
            out
        ));
    }
    Ok(())
}

fn updates<B: OptimOps>(
    bench: &mut Bench<B>,
    (name, rule): (&'static str, Rule),
    shape: [usize; 2],
) -> Result<(), Failure> {
    let n = shape[0] * shape[1];
    // Number of the update, gradient magnitude, whether all gradients are 0, decay, scale.
    for (t, magnitude, decay, scale) in [
        (1, 1.0, 0.0, 1.0),
        (1, 1.0, 0.5, 0.25),
        (2, 1e-3, 0.1, 1.0),
        (1, 0.0, 0.1, 1.0),
        (3, 1e-12, 0.0, 1.0),
        (100_000, 10.0, 0.0, 0.01),
    ] {
        bench.begin(
            "update",
            name,
            [n, t as usize, (magnitude == 0.0) as usize, (decay != 0.0) as usize],
        );
        let (sizes, seed) = (rule.state(shape[0], shape[1]), bench.cases);
        let u = Update { rule, t, lr: 0.03, decay, scale };
        let p = bench.reals(n);
        // Magnitudes differ within the tensor; some gradients are 0.
        let of = |i: usize| magnitude * noise(seed, i) * if i % 5 == 4 { 0.0 } else { 1.0 };
        let g = bench.reals_of(n, of);
        let first = t == 1;
        let squares = matches!(rule, Rule::Adafactor { .. });
        let m = bench.reals_of(sizes.reals[0], |i| match (first, squares) {
            (true, _) => 0.0,
            (false, true) => of(i + 2) * of(i + 2),
            (false, false) => 0.1 * of(i + 1),
        });
        let v = bench.reals_of(sizes.reals[1], |i| if first { 0.0 } else { of(i + 1) * of(i + 1) });
        let state = &State::of(m, v);
        both!(
            bench,
            [
                Operand::sum("p", p, 16),
                Operand::sum("m", m, 16).tight(),
                Operand::sum("v", v, 16).tight()
            ],
            |on| on.update(&u, shape, p, g, state)
        );
        // A second update on top of the first, with the state that it left.
        bench.go_on();
        let u = Update { t: t + 1, ..u };
        both!(
            bench,
            [
                Operand::sum("p", p, 16),
                Operand::sum("m", m, 16).tight(),
                Operand::sum("v", v, 16).tight()
            ],
            |on| on.update(&u, shape, p, g, state)
        );
        if bench.found.reals[p.range()].iter().any(|p| p.is_nan()) {
            return Err(bench.failure("p is NaN", 0, Value::Real(0.0), Value::Real(f64::NAN)));
        }
    }
    Ok(())
}

/// A gradient that is not finite is a fault; no update happens while one is set.
fn faults<B: OptimOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    for site in [Site::Embedding, Site::Block(7), Site::Head] {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for at in [0, 13, 99] {
                bench.begin("sum_squares", "a gradient that is not finite", [100, at, 0, 0]);
                let g = bench.reals_of(100, |i| if i == at { bad } else { 0.5 });
                let out = bench.garbage(1);
                both!(bench, [Operand::set("out", out, 1)], |on| on.sum_squares(site, g, out));
                bench.pending = Some(Fault::Loss { sample: 1, value: 2.0 });
                both!(bench, [Operand::set("out", out, 1)], |on| on.sum_squares(site, g, out));
            }
        }
    }
    for (name, rule) in RULES {
        bench.begin("update", name, [50, 0, 0, 0]);
        let (p, g) = (bench.reals(50), bench.reals(50));
        let [m, v] = rule.state(5, 10).reals.map(|n| bench.reals(n));
        let u = Update { rule, t: 1, lr: 0.1, decay: 0.1, scale: 1.0 };
        bench.pending = Some(Fault::Gradient { site: Site::Head });
        // No operand is named, so any change fails.
        both!(bench, [], |on| on.update(&u, [5, 10], p, g, &State::of(m, v)));
    }
    Ok(())
}

fn refusals<B: OptimOps>(bench: &mut Bench<B>) -> Result<(), Failure> {
    let n = 20;
    bench.begin("sum_squares", "", [n, 0, 0, 0]);
    let (p, g, m, v) = (bench.reals(n), bench.reals(n), bench.reals(n), bench.reals(n));
    let (far, no) = (Reals::new(OUTSIDE, n), Reals::EMPTY);
    refused!(bench, "two results", |on| on.sum_squares(Site::Head, g, m.sub(0, 2)));
    refused!(bench, "no result", |on| on.sum_squares(Site::Head, g, no));
    refused!(bench, "the result lies in the gradient", |on| on.sum_squares(
        Site::Head,
        g,
        g.sub(3, 1)
    ));
    refused!(bench, "outside", |on| on.sum_squares(Site::Head, far, m.sub(0, 1)));
    bench.op = "update";
    for (name, rule) in RULES {
        let u = Update { rule, t: 1, lr: 0.1, decay: 0.0, scale: 1.0 };
        let shape = [4, 5];
        let Sizes { reals: [first, second], .. } = rule.state(4, 5);
        let (m, v) = (m.sub(0, first), v.sub(0, second));
        let wrong = |h: Reals| {
            if h.is_empty() { Reals::new(p.start() + 2, 1) } else { h.sub(0, h.len() - 1) }
        };
        let state = &State::of(m, v);
        bench.op = name;
        refused!(bench, "another shape", |on| on.update(&u, [4, 6], p, g, state));
        refused!(bench, "gradient too short", |on| on.update(&u, shape, p, wrong(g), state));
        let bad = &State::of(wrong(m), v);
        refused!(bench, "m of a wrong length", |on| on.update(&u, shape, p, g, bad));
        let bad = &State::of(m, wrong(v));
        refused!(bench, "v of a wrong length", |on| on.update(&u, shape, p, g, bad));
        let bad = &State { codes: [Words::new(0, 1), Words::EMPTY], ..*state };
        refused!(bench, "codes that it has not", |on| on.update(&u, shape, p, g, bad));
        refused!(bench, "p outside", |on| on.update(&u, shape, far, g, state));
        refused!(bench, "p is g", |on| on.update(&u, shape, p, p, state));
        let bad = Update { t: 0, ..u };
        refused!(bench, "update number 0", |on| on.update(&bad, shape, p, g, state));
    }
    let state = &State::of(m, v);
    let bad = Rule::AdamW { beta1: 0.9, beta2: 1.0, eps: 1e-8 };
    let u = Update { rule: bad, t: 1, lr: 0.1, decay: 0.0, scale: 1.0 };
    bench.op = "update";
    refused!(bench, "beta2 = 1", |on| on.update(&u, [1, n], p, g, state));
    let u = Update { rule: Rule::ADAM_W, ..u };
    let shape = [usize::MAX, usize::MAX];
    refused!(bench, "beyond the address space", |on| on.update(&u, shape, p, g, state));
    Ok(())
}

/// Tensors that are long enough for threads.
fn large<B: OptimOps>(new: impl FnMut(&Layout) -> B) -> Result<(), Failure> {
    let n = 70_001;
    let mut bench = Bench::new(new, 8 * n + 1);
    let s = bench.scratch;
    let tensor = |k: usize| s.sub(k * n, n);
    let out = s.sub(8 * n, 1);
    bench.begin("sum_squares", "large", [n, 0, 0, 0]);
    bench.write_large(tensor(0), |i| noise(1, i))?;
    let outcome = bench.backend.sum_squares(Site::Head, tensor(0), out);
    bench.done("outcome", outcome)?;
    let typed = |seed: u64| move |i: usize| B::Real::of(noise(seed, i)).wide();
    let (g, p) = (typed(1), typed(2));
    let total = (0..n).fold(0.0, |sum, i| sum + g(i) * g(i));
    let epsilon = B::Real::epsilon().wide();
    // Sums of 70,001 positive terms in f64, in any order, and one rounding to the type.
    bench.check_large("out", out, total * (2.0 * epsilon + n as f64 * f64::EPSILON), |_| total)?;

    for (name, rule) in RULES {
        // Of as many values 8-bit AdamW has codes.
        let shape = match rule {
            Rule::AdamW8bit { .. } => continue,
            Rule::Adafactor { .. } => MATRIX,
            _ => [1, n],
        };
        let n = shape[0] * shape[1];
        bench.begin("update", name, [n, 0, 0, 0]);
        let Sizes { reals: [first, second], .. } = rule.state(shape[0], shape[1]);
        let part = |k: usize| tensor(k).sub(0, n);
        for copy in [0, 4] {
            bench.write_large(part(copy), p)?;
            bench.write_large(part(copy + 1), g)?;
            bench.write_large(part(copy + 2), |_| 0.0)?;
            bench.write_large(part(copy + 3), |_| 0.0)?;
            let state = State::of(tensor(copy + 2).sub(0, first), tensor(copy + 3).sub(0, second));
            let u = Update { rule, t: 1, lr: 0.01, decay: 0.0, scale: 1.0 };
            let outcome = bench.backend.update(&u, shape, part(copy), part(copy + 1), &state);
            bench.done("outcome", outcome)?;
        }
        for k in 0..4 {
            bench.same_large("repeated", part(k), part(k + 4))?;
        }
        // The first step: m/(1-β1) = g and v/(1-β2) = g²; means of rows and columns.
        let (mut sum, mut squares, mut least) = (0.0, 0.0, f64::INFINITY);
        let (mut rows, mut cols) = ([0.0; MATRIX[0]], [0.0; MATRIX[1]]);
        for i in 0..n {
            let v = g(i) * g(i);
            (sum, squares, least) = (sum + v, squares + v * v, least.min(v));
            rows[i / MATRIX[1] % MATRIX[0]] += v / MATRIX[1] as f64;
            cols[i % MATRIX[1]] += v / MATRIX[0] as f64;
        }
        let ratio = sum * sum / (n as f64 * squares);
        let mean = sum / n as f64;
        let factored =
            |i: usize| g(i) / libm::sqrt(rows[i / MATRIX[1]] * cols[i % MATRIX[1]] / mean);
        let rms = match rule {
            Rule::Adafactor { .. } => {
                libm::sqrt((0..n).map(|i| factored(i) * factored(i)).sum::<f64>() / n as f64)
            }
            _ => 1.0,
        };
        let step = |i: usize| match rule {
            Rule::Sgd { .. } => g(i),
            Rule::AdamW { eps, .. } | Rule::AdamW8bit { eps, .. } => g(i) / (g(i).abs() + eps),
            Rule::SetAdam { eps, .. } => {
                let w = |v: f64| libm::sqrt(v * ratio + eps);
                g(i) / (w(g(i) * g(i)) - 0.5 * w(least))
            }
            Rule::Adafactor { .. } => factored(i) / rms.max(1.0),
        };
        bench.check_large("p", part(0), 64.0 * epsilon, |i| p(i) - 0.01 * step(i))?;
    }
    Ok(())
}

/// A matrix that is large enough for threads.
const MATRIX: [usize; 2] = [227, 308];

/// Lengths of tensors with codes: whole blocks and words, and what is left over.
const CODED: [usize; 6] = [4096, 4097, 4099, 4350, 4353, 20_481];

/// Values, and words of codes, from one operand to the next: more than any has, with some before
/// and behind that no update may touch.
const REALS_APART: usize = 20_500;
const WORDS_APART: usize = 5_200;
const CODED_REALS: usize = 8 * REALS_APART;
const CODED_WORDS: usize = 4 * WORDS_APART;
const AROUND: usize = 3;

/// A tensor of `n` values with its gradient and codes; of two copies.
#[derive(Clone, Copy)]
struct Tensor {
    p: Reals,
    g: Reals,
    state: State,
}

impl Tensor {
    fn new<B: OptimOps>(bench: &Bench<B>, rule: &Rule, n: usize, copy: usize) -> Self {
        let Sizes { reals: [blocks, _], codes: [words, _] } = rule.state(1, n);
        let real =
            |k: usize, len: usize| bench.scratch.sub((4 * copy + k) * REALS_APART + AROUND, len);
        let word = |k: usize| bench.more_words.sub((2 * copy + k) * WORDS_APART + AROUND, words);
        let state = State { reals: [real(2, blocks), real(3, blocks)], codes: [word(0), word(1)] };
        Self { p: real(0, n), g: real(1, n), state }
    }

    fn update<B: OptimOps>(&self, bench: &mut Bench<B>, u: &Update) -> Result<(), Failure> {
        let outcome = bench.backend.update(u, [1, self.p.len()], self.p, self.g, &self.state);
        bench.done("outcome", outcome)
    }

    /// Block `block` as it is now.
    fn read<B: OptimOps>(&self, bench: &Bench<B>, block: usize) -> Result<Block<B::Real>, Failure> {
        let (zero, be) = (B::Real::zero(), &bench.backend);
        let mut found = Block { p: [zero; BLOCK], most: [zero; 2], words: [[0; WORDS]; 2] };
        let p = self.p.sub(block * BLOCK, BLOCK);
        let mut outcome = be.read_reals(p, &mut found.p[..p.len()]);
        for k in 0..2 {
            let most = core::slice::from_mut(&mut found.most[k]);
            let words = self.state.codes[k].sub(block * WORDS, WORDS);
            outcome = outcome
                .and(be.read_reals(self.state.reals[k].sub(block, 1), most))
                .and(be.read_words(words, &mut found.words[k][..words.len()]));
        }
        bench.done("read", outcome).map(|()| found)
    }
}

/// Words of a block's codes.
const WORDS: usize = BLOCK / PER_WORD;

struct Block<R> {
    p: [R; BLOCK],
    most: [R; 2],
    words: [[u32; WORDS]; 2],
}

impl<R: Real> Block<R> {
    fn code(&self, k: usize, i: usize) -> usize {
        (self.words[k][i / PER_WORD] >> (8 * (i % PER_WORD)) & 0xFF) as usize
    }

    /// Old moment `k` of value `i`.
    fn moment(&self, k: usize, i: usize) -> R {
        let table = if k == 0 { &SIGNED } else { &UNSIGNED };
        R::of(table[self.code(k, i)].into()) * self.most[k]
    }
}

/// 8-bit AdamW. What a block becomes is computed here from what the backend had before, so that
/// differences do not add up.
fn coded<B: OptimOps>(bench: &mut Bench<B>, n: usize) -> Result<(), Failure> {
    for (t, magnitude, decay, scale, eps) in [
        (1, 1.0, 0.0, 1.0, 1e-8),
        (1, 1e-3, 0.5, 0.25, 0.0),
        (1, 0.0, 0.1, 1.0, 1e-8),
        (100_000, 1e-12, 0.1, 1.0, 1e-8),
    ] {
        let case = [n, t as usize, (magnitude == 0.0) as usize, (decay != 0.0) as usize];
        bench.begin("update", "8-bit AdamW", case);
        let (seed, rule) = (bench.cases, Rule::AdamW8bit { beta1: 0.9, beta2: 0.95, eps });
        let u = Update { rule, t, lr: 0.03, decay, scale };
        let copies = [0, 1].map(|copy| Tensor::new(bench, &rule, n, copy));
        // Magnitudes differ within a block as well, down to moments that become 0.
        let g = |i: usize| match i % 15 {
            4 | 9 | 14 => 0.0,
            0 | 3 | 6 | 12 => 1e-5 * magnitude * noise(seed, i),
            _ => magnitude * noise(seed, i),
        };
        bench.write_large(bench.scratch, |_| 7.5)?;
        fill(bench, bench.more_words, DIRT)?;
        for copy in &copies {
            bench.write_large(copy.p, |i| 2.0 * noise(seed, i + n))?;
            bench.write_large(copy.g, g)?;
            let cleared = copy.state.clear(&mut bench.backend);
            bench.done("clear", cleared)?;
            // A block whose largest magnitude is 0 is 0, whatever its codes.
            fill(bench, copy.state.codes[0], random(seed, 1) & 0x7F7F_7F7F)?;
        }
        let [a, b] = copies;
        // An update under a fault changes nothing, or the copies differ.
        let fault = Fault::Gradient { site: Site::Head };
        bench.backend.raise(fault);
        a.update(bench, &u)?;
        bench.status(Some(fault))?;
        a.update(bench, &u)?;
        b.update(bench, &u)?;
        bench.same_large("repeated", a.p, b.p)?;
        for k in 0..2 {
            bench.same_large("repeated", a.state.reals[k], b.state.reals[k])?;
            same_words(bench, "repeated", a.state.codes[k], b.state.codes[k])?;
        }
        // A second update of the first copy; the other one has what was there before.
        let u = Update { t: t + 1, ..u };
        a.update(bench, &u)?;
        bench.check_large("g", a.g, 0.0, |i| B::Real::of(g(i)).wide())?;
        for block in 0..n.div_ceil(BLOCK) {
            let (before, after) = (b.read(bench, block)?, a.read(bench, block)?);
            check_block(
                bench,
                &u,
                block * BLOCK,
                BLOCK.min(n - block * BLOCK),
                g,
                &before,
                &after,
            )?;
        }
        around(bench, &copies)?;
    }
    Ok(())
}

/// The update of `len` values from the `at`-th on.
fn check_block<B: OptimOps>(
    bench: &Bench<B>,
    u: &Update,
    at: usize,
    len: usize,
    g: impl Fn(usize) -> f64,
    before: &Block<B::Real>,
    after: &Block<B::Real>,
) -> Result<(), Failure> {
    let Rule::AdamW8bit { beta1, beta2, eps } = u.rule else { return Ok(()) };
    let of = |x: f64| B::Real::of(x);
    let new = |k: usize, i: usize| {
        let g = of(u.scale) * of(g(at + i));
        let (beta, g) = if k == 0 { (beta1, g) } else { (beta2, g * g) };
        (of(beta) * before.moment(k, i) + of(1.0 - beta) * g).wide()
    };
    let epsilon = B::Real::epsilon().wide();
    let same = |what, i: usize, expected: f64, found: f64, magnitude: f64, roundings: f64| {
        let close = (found - expected).abs() <= roundings * epsilon * magnitude;
        let (expected, found) = (Value::Real(expected), Value::Real(found));
        if close { Ok(()) } else { Err(bench.failure(what, at + i, expected, found)) }
    };
    for (k, name) in [(0, "largest m"), (1, "largest v")] {
        let most = (0..len).fold(0.0_f64, |most, i| most.max(new(k, i).abs()));
        same(name, 0, most, after.most[k].wide(), most, 16.0)?;
        for i in 0..len {
            let x = if most > 0.0 { new(k, i) / most } else { 0.0 };
            if !is_code(k, x, after.code(k, i)) {
                let x32 = x as f32;
                let due = if k == 0 { codes::first(x32) } else { codes::second(x32) };
                let (due, found) = (Value::Int(due.into()), Value::Int(after.code(k, i) as i32));
                return Err(bench.failure(["code of m", "code of v"][k], at + i, due, found));
            }
        }
    }
    // The step is that of the moments before they became codes.
    let correction = |beta: f64| 1.0 - libm::pow(beta, f64::from(u.t));
    for i in 0..len {
        let (m, v, old) = (new(0, i), new(1, i), before.p[i].wide());
        let denominator = libm::sqrt(v / correction(beta2)) + eps;
        let rate = u.lr / correction(beta1);
        let step = if denominator > 0.0 { rate * m / denominator } else { 0.0 };
        let expected = old - u.lr * u.decay * old - step;
        same("p", i, expected, after.p[i].wide(), old.abs() + step.abs(), 64.0)?;
    }
    Ok(())
}

/// Whether moment `k`, in parts of the largest, may have this code.
///
/// A backend may fuse products and sums, and then the largest magnitude differs in its last places
/// as well. So close to the middle between two codes it may take the one or the other: both are as
/// near as the nearest, but for some roundings. Where a first moment is all rounding, its sign may
/// differ.
fn is_code(k: usize, x: f64, code: usize) -> bool {
    let (table, rounding) = (if k == 0 { &SIGNED } else { &UNSIGNED }, f64::from(f32::EPSILON));
    let far = |code: usize| (f64::from(table[code]) - x).abs();
    let nearest = usize::from(codes::nearest(table, x as f32));
    let zero = usize::from(ZERO);
    if k == 0 && nearest == zero && x < rounding {
        return code == zero - 1 || (code == zero && x >= -rounding);
    }
    if k == 1 && nearest == 0 {
        return code == usize::from(x > 0.0);
    }
    far(code) <= far(nearest) + 64.0 * rounding * x.abs()
}

/// What lies around the operands is as it was, and the codes beyond the end are 0.
fn around<B: OptimOps>(bench: &Bench<B>, copies: &[Tensor; 2]) -> Result<(), Failure> {
    for Tensor { p, g, state } in copies {
        for h in [*p, *g, state.reals[0], state.reals[1]] {
            let (first, end) = (h.start() - bench.scratch.start(), h.len() + AROUND);
            let rest = bench.scratch.sub(first + h.len(), REALS_APART - end);
            let before = bench.scratch.sub(first - AROUND, AROUND);
            bench.check_large("before an operand", before, 0.0, |_| 7.5)?;
            bench.check_large("behind an operand", rest, 0.0, |_| 7.5)?;
        }
        for h in state.codes {
            let first = h.start() - bench.more_words.start();
            let mut found = [0; 3];
            for (found, at) in
                found.iter_mut().zip([first - 1, first + h.len(), first + h.len() - 1])
            {
                let word = core::slice::from_mut(found);
                let outcome = bench.backend.read_words(bench.more_words.sub(at, 1), word);
                bench.done("read_words", outcome)?;
            }
            let used = 8 * (p.len() % PER_WORD) as u32;
            let beyond = if used == 0 { 0 } else { found[2] >> used };
            for (i, (found, expected)) in
                [(found[0], DIRT), (found[1], DIRT), (beyond, 0)].into_iter().enumerate()
            {
                if found != expected {
                    let (expected, found) = (Value::Word(expected), Value::Word(found));
                    return Err(bench.failure("around the codes", i, expected, found));
                }
            }
        }
    }
    Ok(())
}

/// What is in words that no update may touch.
const DIRT: u32 = 0x0707_0707;

fn fill<B: OptimOps>(bench: &mut Bench<B>, h: Words, value: u32) -> Result<(), Failure> {
    let outcome = bench.backend.fill_words(h, value);
    bench.done("fill_words", outcome)
}

fn same_words<B: OptimOps>(
    bench: &Bench<B>,
    name: &'static str,
    a: Words,
    b: Words,
) -> Result<(), Failure> {
    let mut pieces = [[0; 64]; 2];
    for start in (0..a.len()).step_by(64) {
        let len = a.sub(start, 64).len();
        for (piece, h) in pieces.iter_mut().zip([a, b]) {
            let outcome = bench.backend.read_words(h.sub(start, len), &mut piece[..len]);
            bench.done("read_words", outcome)?;
        }
        for i in 0..len {
            if pieces[0][i] != pieces[1][i] {
                let (first, second) = (Value::Word(pieces[0][i]), Value::Word(pieces[1][i]));
                return Err(bench.failure(name, start + i, first, second));
            }
        }
    }
    Ok(())
}
