//! On the processor: the reference's formulas by finite differences, then the CPU backend beside it.
#![allow(clippy::unwrap_used)]

mod common;

use bdia_core::{Layout, Reference, Storage};
use bdia_cpu::Cpu;
use bdia_outside::RmsNorm;
use common::{EPS, Operands, SHAPES, assert_close, reference, refuses};

/// In f64, where central differences with steps of 1e-6 are right to about 1e-9.
#[test]
fn the_reference_differentiates_what_it_computes() {
    let [rows, width] = [3, 5];
    let mut layout = Layout::new(8);
    let at = Operands::new(&mut layout, [rows, width]);
    let mut reals = vec![0.0_f64; layout.arenas().1];
    for (i, x) in reals.iter_mut().enumerate() {
        *x = (i as f64 * 0.7).sin() + 0.1;
    }
    let mut be = Reference::new(&layout, &mut [], &mut reals, &mut []).unwrap();
    for h in [at.dx, at.dw] {
        be.fill_reals(h, 0.0).unwrap();
    }
    // Σ dy·y
    let loss = |be: &mut Reference<'_, f64>| {
        be.rms_norm(EPS, at.w, at.x, at.y, at.rstd).unwrap();
        let (y, dy) = (be.reals(at.y).unwrap(), be.reals(at.dy).unwrap());
        y.iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>()
    };
    loss(&mut be);
    be.rms_norm_vjp(at.w, at.x, at.rstd, at.dy, at.dx, at.dw).unwrap();
    for (value, gradient) in [(at.x, at.dx), (at.w, at.dw)] {
        let expected = be.reals(gradient).unwrap().to_vec();
        for (i, expected) in expected.into_iter().enumerate() {
            let old = be.reals(value).unwrap()[i];
            let [more, less] = [1e-6, -1e-6].map(|step| {
                be.reals_mut(value).unwrap()[i] = old + step;
                loss(&mut be)
            });
            be.reals_mut(value).unwrap()[i] = old;
            let found = (more - less) / 2e-6;
            assert!((found - expected).abs() < 1e-7, "{found} {expected}");
        }
    }
}

#[test]
fn the_cpu_agrees_with_the_reference() {
    for shape in SHAPES {
        let mut layout = Layout::new(4);
        let operands = Operands::new(&mut layout, shape);
        let found = operands.run(&mut Cpu::new(&layout, 2).unwrap());
        assert_close(&found, &reference(&layout, &operands));
    }
}

#[test]
fn the_same_bits_for_any_number_of_threads() {
    for shape in SHAPES {
        let mut layout = Layout::new(4);
        let operands = Operands::new(&mut layout, shape);
        let bits = |threads| {
            let found = operands.run(&mut Cpu::new(&layout, threads).unwrap());
            found.map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        assert_eq!(bits(1), bits(3), "{shape:?}");
    }
}

#[test]
fn the_cpu_refuses_what_does_not_fit() {
    refuses(|layout| Box::new(Cpu::new(layout, 2).unwrap()));
}
