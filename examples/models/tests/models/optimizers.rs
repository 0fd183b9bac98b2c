//! Steps of 8-bit AdamW and of Adafactor against an independent program
//! (`tests/torch/optimizers.py`), in f64 on both sides.

use crate::common::state;
use bdia_core::backend::OptimOps;
use bdia_core::codes::{SIGNED, UNSIGNED};
use bdia_core::optim::{Rule, Sizes, Update};
use bdia_core::{Layout, Reals, Reference, State, Storage, Words};

#[test]
fn adam_w_8bit() {
    let s = state("optimizers/adamw8bit.safetensors");
    // They multiply in f32 there: two roundings, of which ours are one.
    for (ours, theirs) in [(&SIGNED, &s.reals["map1"]), (&UNSIGNED, &s.reals["map2"])] {
        for (a, b) in ours.iter().zip(theirs) {
            assert!((f64::from(*a) - b).abs() <= 2.0 * f64::from(f32::EPSILON) * b.abs());
        }
    }
    let (n, steps) = (s.reals["p"].len(), s.size("steps"));
    let number = |key| s.number(key);
    let rule = Rule::AdamW8bit { beta1: number("beta1"), beta2: number("beta2"), eps: 1e-8 };
    let Sizes { reals: [blocks, _], codes: [words, _] } = rule.state(1, n);
    let (mut reals, mut codes) = (vec![0.0_f64; 2 * n + 2 * blocks], vec![0; 2 * words]);
    let mut be = Reference::new(&Layout::new(8), &mut [], &mut reals, &mut codes).unwrap();
    let (p, g) = (Reals::new(0, n), Reals::new(n, n));
    let state = State {
        reals: [0, 1].map(|k| Reals::new(2 * n + k * blocks, blocks)),
        codes: [0, 1].map(|k| Words::new(k * words, words)),
    };
    for step in 0..steps {
        be.write_reals(g, &s.reals["g"][step * n..(step + 1) * n]).unwrap();
        let u = Update { rule, t: step as u32 + 1, lr: number("lr"), decay: 0.0, scale: 1.0 };
        be.update(&u, [1, n], p, g, &state).unwrap();
    }
    // No moment comes so near to the middle between two codes that the tables could decide.
    assert!(number("tie_distance") > 10.0 * f64::from(f32::EPSILON));
    for (k, name) in [(0, "c1"), (1, "c2")] {
        let words = be.words(state.codes[k]).unwrap();
        let found = words.iter().flat_map(|w| w.to_le_bytes()).map(i32::from);
        assert!(found.take(n).eq(s.ints[name].iter().copied()), "{name}");
        let theirs = &s.reals[["absmax1", "absmax2"][k]];
        for (a, b) in be.reals(state.reals[k]).unwrap().iter().zip(theirs) {
            assert!((a - b).abs() < 1e-6 * b, "{a:e} {b:e}");
        }
    }
    // Steps are 1e-3 or so; the tables differ in the seventh digit.
    for (a, b) in be.reals(p).unwrap().iter().zip(&s.reals["p"]) {
        assert!((a - b).abs() < 1e-9, "{a:e} {b:e}");
    }
}

/// What has one row or one column keeps every value here, and factors there: it is the same.
#[test]
fn adafactor() {
    let s = state("optimizers/adafactor.safetensors");
    for (name, shape) in
        [("matrix", [6, 10]), ("vector", [1, 17]), ("row", [1, 9]), ("column", [9, 1])]
    {
        let of = |what: &str| &s.reals[&format!("{name}.{what}")];
        let n = shape[0] * shape[1];
        let [first, second] = Rule::ADAFACTOR.state(shape[0], shape[1]).reals;
        let mut reals = [of("start").as_slice(), &vec![0.0; n + first + second]].concat();
        let mut be = Reference::new(&Layout::new(8), &mut [], &mut reals, &mut []).unwrap();
        let (p, g) = (Reals::new(0, n), Reals::new(n, n));
        let state = State::of(Reals::new(2 * n, first), Reals::new(2 * n + first, second));
        for step in 0..s.size("steps") {
            let now = step * n..(step + 1) * n;
            be.write_reals(g, &of("g")[now.clone()]).unwrap();
            let (lr, decay) = (s.number("lr"), s.number("weight_decay"));
            let u = Update { rule: Rule::ADAFACTOR, t: step as u32 + 1, lr, decay, scale: 1.0 };
            be.update(&u, shape, p, g, &state).unwrap();
            for (a, b) in be.reals(p).unwrap().iter().zip(&of("p")[now]) {
                assert!((a - b).abs() < 1e-13, "{name}, step {step}: {a:e} {b:e}");
            }
        }
        let kept: &[&str] = match name {
            "matrix" => &["rows", "cols"],
            "vector" => &["full"],
            _ => &[],
        };
        for (what, h) in kept.iter().zip(state.reals) {
            for (a, b) in be.reals(h).unwrap().iter().zip(of(what)) {
                assert!((a - b).abs() < 1e-13 * b, "{name}: {a:e} {b:e}");
            }
        }
    }
}
