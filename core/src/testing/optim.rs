//! [`OptimOps`] against the reference, up to rounding.

use num_traits::Float;

use super::{Bench, Failure, OUTSIDE, Operand, Value, noise};
use crate::arena::{Layout, Reals};
use crate::backend::{OptimOps, Storage};
use crate::error::{Fault, Site};
use crate::optim::{Rule, Update};
use crate::real::Real;

const SIZES: [usize; 7] = [0, 1, 2, 7, 33, 256, 600];

const RULES: [(&str, Rule); 6] = [
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
            updates(&mut bench, rule, n)?;
        }
    }
    faults(&mut bench)?;
    refusals(&mut bench)?;
    drop(bench);
    large(new)
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
    n: usize,
) -> Result<(), Failure> {
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
        let (states, seed) = (rule.states(), bench.cases);
        let u = Update { rule, t, lr: 0.03, decay, scale };
        let p = bench.reals(n);
        // Magnitudes differ within the tensor; some gradients are 0.
        let of = |i: usize| magnitude * noise(seed, i) * if i % 5 == 4 { 0.0 } else { 1.0 };
        let g = bench.reals_of(n, of);
        let first = t == 1;
        let m = bench.reals_of(if states > 0 { n } else { 0 }, |i| {
            if first { 0.0 } else { 0.1 * of(i + 1) }
        });
        let v = bench.reals_of(if states > 1 { n } else { 0 }, |i| {
            if first { 0.0 } else { of(i + 1) * of(i + 1) }
        });
        both!(
            bench,
            [
                Operand::sum("p", p, 16),
                Operand::sum("m", m, 16).tight(),
                Operand::sum("v", v, 16).tight()
            ],
            |on| on.update(&u, p, g, m, v)
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
            |on| on.update(&u, p, g, m, v)
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
        let states = rule.states();
        let (m, v) = (
            bench.reals(if states > 0 { 50 } else { 0 }),
            bench.reals(if states > 1 { 50 } else { 0 }),
        );
        let u = Update { rule, t: 1, lr: 0.1, decay: 0.1, scale: 1.0 };
        bench.pending = Some(Fault::Gradient { site: Site::Head });
        // No operand is named, so any change fails.
        both!(bench, [], |on| on.update(&u, p, g, m, v));
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
        let m = if rule.states() > 0 { m } else { no };
        let v = if rule.states() > 1 { v } else { no };
        let wrong =
            |h: Reals| if h.is_empty() { Reals::new(p.start() + 2, 1) } else { h.sub(0, n - 1) };
        bench.op = name;
        refused!(bench, "gradient too short", |on| on.update(&u, p, wrong(g), m, v));
        refused!(bench, "m of a wrong length", |on| on.update(&u, p, g, wrong(m), v));
        refused!(bench, "v of a wrong length", |on| on.update(&u, p, g, m, wrong(v)));
        refused!(bench, "p outside", |on| on.update(&u, far, g, m, v));
        refused!(bench, "p is g", |on| on.update(&u, p, p, m, v));
        refused!(bench, "update number 0", |on| on.update(&Update { t: 0, ..u }, p, g, m, v));
    }
    let bad = Rule::AdamW { beta1: 0.9, beta2: 1.0, eps: 1e-8 };
    let u = Update { rule: bad, t: 1, lr: 0.1, decay: 0.0, scale: 1.0 };
    bench.op = "update";
    refused!(bench, "beta2 = 1", |on| on.update(&u, p, g, m, v));
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
        bench.begin("update", name, [n, 0, 0, 0]);
        for copy in [0, 4] {
            bench.write_large(tensor(copy), p)?;
            bench.write_large(tensor(copy + 1), g)?;
            bench.write_large(tensor(copy + 2), |_| 0.0)?;
            bench.write_large(tensor(copy + 3), |_| 0.0)?;
            let m = if rule.states() > 0 { tensor(copy + 2) } else { Reals::EMPTY };
            let v = if rule.states() > 1 { tensor(copy + 3) } else { Reals::EMPTY };
            let u = Update { rule, t: 1, lr: 0.01, decay: 0.0, scale: 1.0 };
            let outcome = bench.backend.update(&u, tensor(copy), tensor(copy + 1), m, v);
            bench.done("outcome", outcome)?;
        }
        for k in 0..4 {
            bench.same_large("repeated", tensor(k), tensor(k + 4))?;
        }
        // The first step: m/(1-β1) = g and v/(1-β2) = g².
        let (mut sum, mut squares, mut least) = (0.0, 0.0, f64::INFINITY);
        for i in 0..n {
            let v = g(i) * g(i);
            (sum, squares, least) = (sum + v, squares + v * v, least.min(v));
        }
        let ratio = sum * sum / (n as f64 * squares);
        let step = |i: usize| match rule {
            Rule::Sgd { .. } => g(i),
            Rule::AdamW { eps, .. } => g(i) / (g(i).abs() + eps),
            Rule::SetAdam { eps, .. } => {
                let w = |v: f64| libm::sqrt(v * ratio + eps);
                g(i) / (w(g(i) * g(i)) - 0.5 * w(least))
            }
        };
        bench.check_large("p", tensor(0), 64.0 * epsilon, |i| p(i) - 0.01 * step(i))?;
    }
    Ok(())
}
