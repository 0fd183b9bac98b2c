//! The operation on some backend, from the same random operands everywhere.
#![allow(clippy::unwrap_used)]

use bdia_core::rng::{Draw, Stream};
use bdia_core::{Category, Layout, Reals, Reference, Storage};
use bdia_outside::RmsNorm;

/// Rows and width: one element, less and more than a register, odd ones, several parts and blocks.
pub const SHAPES: [[usize; 2]; 8] =
    [[1, 1], [1, 7], [3, 8], [5, 33], [9, 100], [70, 301], [300, 64], [2, 5000]];
pub const EPS: f32 = 1e-5;

/// The operands in a layout.
#[derive(Clone, Copy)]
pub struct Operands {
    pub w: Reals,
    pub x: Reals,
    pub y: Reals,
    pub rstd: Reals,
    pub dy: Reals,
    pub dx: Reals,
    pub dw: Reals,
}

impl Operands {
    pub fn new(layout: &mut Layout, [rows, width]: [usize; 2]) -> Self {
        let mut reals = |n| layout.reals(Category::Workspace, n);
        Self {
            w: reals(width),
            x: reals(rows * width),
            y: reals(rows * width),
            rstd: reals(rows),
            dy: reals(rows * width),
            dx: reals(rows * width),
            dw: reals(width),
        }
    }

    /// Random values in the inputs, and in what is added to.
    pub fn fill(&self, be: &mut impl Storage<Real = f32>) {
        for (n, h) in [self.w, self.x, self.dy, self.dx, self.dw].into_iter().enumerate() {
            let stream = Stream::new(5, n as u32, 0, 0, 0, Draw::Data);
            let values: Vec<_> = (0..h.len()).map(|i| stream.normal(i as u32) as f32).collect();
            be.write_reals(h, &values).unwrap();
        }
    }

    /// Runs both operations and gives `y`, `rstd`, `dx` and `dw`.
    pub fn run(&self, be: &mut impl RmsNorm<Real = f32>) -> [Vec<f32>; 4] {
        self.fill(be);
        be.rms_norm(EPS, self.w, self.x, self.y, self.rstd).unwrap();
        be.rms_norm_vjp(self.w, self.x, self.rstd, self.dy, self.dx, self.dw).unwrap();
        [self.y, self.rstd, self.dx, self.dw].map(|h| {
            let mut values = vec![0.0; h.len()];
            be.read_reals(h, &mut values).unwrap();
            values
        })
    }
}

/// The same on the reference backend.
pub fn reference(layout: &Layout, operands: &Operands) -> [Vec<f32>; 4] {
    let (ints, reals, words) = layout.arenas();
    let (mut ints, mut reals, mut words) = (vec![0; ints], vec![0.0_f32; reals], vec![0; words]);
    operands.run(&mut Reference::new(layout, &mut ints, &mut reals, &mut words).unwrap())
}

/// Sums of up to 5,000 terms in f32 and an order of their own, beside sums in f64: an error of some
/// units in the last place of the largest term times the root of their number.
pub fn assert_close(found: &[Vec<f32>; 4], expected: &[Vec<f32>; 4]) {
    const TOLERANCE: f32 = 2e-5;
    for (name, (found, expected)) in
        ["y", "rstd", "dx", "dw"].iter().zip(found.iter().zip(expected))
    {
        let largest = expected.iter().fold(1.0_f32, |m, x| m.max(x.abs()));
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() <= TOLERANCE * largest, "{name}: {a} {b}");
        }
    }
}

/// Handles and sizes that no backend takes.
pub fn refuses(make: impl Fn(&Layout) -> Box<dyn RmsNorm<Real = f32>>) {
    let mut layout = Layout::new(4);
    let good = Operands::new(&mut layout, [3, 8]);
    let foreign = Operands::new(&mut Layout::new(4), [3, 8]);
    let outside = Reals::new(layout.arenas().1, 24);
    let mut be = make(&layout);
    let Operands { w, x, y, rstd, dy, dx, dw } = good;
    be.rms_norm(EPS, w, x, y, rstd).unwrap();
    for (w, x, y, rstd) in [
        (w.sub(0, 7), x, y, rstd),
        (w, x.sub(0, 23), y, rstd),
        (w, x, y, rstd.sub(0, 2)),
        (w.sub(0, 0), x.sub(0, 0), y.sub(0, 0), rstd),
        (w, outside, y, rstd),
        (w, x, outside, rstd),
        (w, foreign.x, y, rstd),
        (w, x, foreign.y, rstd),
        (w, x, x, rstd),
        (w, x, y, y.sub(0, 3)),
    ] {
        assert!(be.rms_norm(EPS, w, x, y, rstd).is_err());
    }
    be.rms_norm_vjp(w, x, rstd, dy, dx, dw).unwrap();
    for (dx, dw) in [(foreign.dx, dw), (dx, foreign.dw), (dy, dw), (dx, w), (outside, dw)] {
        assert!(be.rms_norm_vjp(w, x, rstd, dy, dx, dw).is_err());
    }
    // No rows, no width: nothing to do.
    let none = Reals::EMPTY;
    be.rms_norm(EPS, w, none, none, none).unwrap();
    be.rms_norm(EPS, none, none, none, none).unwrap();
    be.rms_norm_vjp(w, none, none, none, none, dw).unwrap();
}
