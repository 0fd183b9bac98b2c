//! Logits, loss and every gradient against an independent PyTorch implementation
//! (`torch/vit_f64.py`), in f64; the parameter count of the paper's network; the inverse of the
//! two-stream one.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::PathBuf;

use bdia_core::backend::Backend;
use bdia_core::layers::Patches;
use bdia_core::optim::Rule;
use bdia_core::stack::Mode;
use bdia_core::{Error, Gamma, Grid, Layout, Real, Reference, Sign, Storage};
use bdia_models::vit::files;
use bdia_models::vit::model::{Dims, Inference, Named, Setup, Step, Vit};
use bdia_models::weights::{self, WeightsError};
use safetensors::{Dtype, SafeTensors};

struct State {
    reals: HashMap<String, Vec<f64>>,
    labels: Vec<i32>,
    meta: HashMap<String, String>,
}

fn state(name: &str) -> State {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/vit")
        .join(format!("{name}_f64.safetensors"));
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let (mut reals, mut labels) = (HashMap::new(), Vec::new());
    for (name, t) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        match t.dtype() {
            Dtype::F64 => {
                reals.insert(
                    name,
                    t.data().chunks(8).map(|c| f64::from_le_bytes(c.try_into().unwrap())).collect(),
                );
            }
            _ => {
                labels =
                    t.data().chunks(4).map(|c| i32::from_le_bytes(c.try_into().unwrap())).collect()
            }
        }
    }
    State { reals, labels, meta: header.metadata().clone().unwrap() }
}

impl State {
    fn size(&self, key: &str) -> usize {
        self.meta[key].parse().unwrap()
    }

    fn setup(&self) -> Setup {
        let small = self.meta["small"] == "true";
        let side = self.size("side");
        Setup {
            dims: Dims {
                patches: Patches {
                    channels: self.size("channels"),
                    height: side,
                    width: side,
                    patch: self.size("patch"),
                    shifted: small,
                },
                classes: self.size("classes"),
                width: self.size("width"),
                layers: self.size("layers"),
                heads: self.size("heads"),
                inner: self.size("mlp"),
                eps: 1e-5,
                locality: small,
                dropout: [0.0; 4],
                two_streams: self.meta["two_streams"] == "true",
            },
            batch: self.size("batch"),
            chunk: 3,
            mode: Mode::Standard,
            grid: None,
            gamma: Gamma::new(0.5, Sign::Random).unwrap(),
            // The learning rate is 0, so that the parameters stay; gradients are kept in full
            // buffers.
            rule: Some(Rule::Sgd { momentum: 0.0 }),
            fused: false,
            verify: true,
            drop_path: 0.0,
            smoothing: self.meta["smoothing"].parse().unwrap(),
            mixup: false,
            threads: 1,
            library: 0,
        }
    }
}

struct Memory<R>(Vec<i32>, Vec<R>, Vec<u32>);

impl<R: Real> Memory<R> {
    fn new(layout: &Layout) -> Self {
        let (i, r, w) = layout.arenas();
        Self(vec![-7; i], vec![R::nan(); r], vec![0xDEAD_BEEF; w])
    }

    fn backend(&mut self, layout: &Layout) -> Reference<'_, R> {
        Reference::new(layout, &mut self.0, &mut self.1, &mut self.2).unwrap()
    }
}

/// A tensor of the file as the model holds it.
fn ours(t: &Named, file: &[f64]) -> Vec<f64> {
    let Some([rows, cols]) = t.transposed else { return file.to_vec() };
    (0..rows * cols).map(|at| file[at % cols * rows + at / cols]).collect()
}

fn write<B: Backend>(be: &mut B, model: &Vit, s: &State) {
    for t in model.tensors() {
        let values: Vec<_> = ours(&t, &s.reals[&format!("param.{}", t.name)])
            .iter()
            .map(|&x| B::Real::of(x))
            .collect();
        be.write_reals(t.values, &values).unwrap();
        for state in t.state {
            be.fill_reals(state, B::Real::of(0.0)).unwrap();
        }
    }
}

const STEP: Step = Step { step: 0, seed: 1, lr: 0.0, weight_decay: 0.0, clip: 0.0, share: 1.0 };

fn image(s: &State) -> impl FnMut(usize, &mut [f64]) -> Result<[i32; 2], Error> + '_ {
    |i, out| {
        out.copy_from_slice(&s.reals["images"][i * out.len()..(i + 1) * out.len()]);
        Ok([s.labels[i]; 2])
    }
}

#[test]
fn logits_loss_and_all_gradients_are_those_of_pytorch() {
    for name in ["small", "plain", "revvit"] {
        let s = state(name);
        let (mut model, layout) = Vit::layout::<Reference<'_, f64>>(&s.setup()).unwrap();
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        let expected = s.reals.keys().filter(|n| n.starts_with("param.")).count();
        assert_eq!(model.tensors().len(), expected, "{name}: the tensors");
        write(&mut be, &model, &s);
        // Both add in f64, in different orders: a few hundred roundings of 1e-16.
        let close = |a: f64, b: f64| (a - b).abs() < 1e-11 * (1.0 + b.abs());
        let classes = s.size("classes");
        for (first, n) in [(0, 3), (3, 1)] {
            let mut at = image(&s);
            let standard = Inference::standard().unwrap();
            let (logits, _) =
                model.evaluate(&mut be, n, standard, |i, out| at(first + i, out)).unwrap();
            for (i, (&a, &b)) in
                logits.iter().zip(&s.reals["logits"][first * classes..]).enumerate()
            {
                assert!(close(a, b), "{name} logit {i}: {a} {b}");
            }
        }
        let outcome = model.train(&mut be, &STEP, image(&s)).unwrap();
        assert!(
            close(outcome.loss, s.reals["loss"][0]),
            "{name}: {} {}",
            outcome.loss,
            s.reals["loss"][0]
        );
        for t in model.tensors() {
            let expected = ours(&t, &s.reals[&format!("grad.{}", t.name)]);
            let found = be.reals(t.gradient).unwrap();
            for (i, (&a, &b)) in found.iter().zip(&expected).enumerate() {
                assert!(close(a, b), "{name}: gradient of {}[{i}]: {a} {b}", t.name);
            }
        }
        if name == "revvit" {
            // Three blocks of order one in f64, up and down again.
            assert!(
                outcome.rebuild_error > 0.0 && outcome.rebuild_error < 1e-13,
                "{}",
                outcome.rebuild_error
            );
        }
    }
}

/// On the grid the same gradients come out up to its fineness, and every rebuilt activation is
/// exact.
#[test]
fn reversible_training_gives_the_gradients_of_its_own_forward_pass() {
    let s = state("small");
    let mut losses = Vec::new();
    for (mode, grid) in [(Mode::Bdia, true), (Mode::BdiaFloat, false)] {
        let grid = grid.then(|| Grid::new(20).unwrap());
        let setup = Setup { mode, grid, ..s.setup() };
        let (mut model, layout) = Vit::layout::<Reference<'_, f64>>(&setup).unwrap();
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        write(&mut be, &model, &s);
        let outcome = model.train(&mut be, &STEP, image(&s)).unwrap();
        assert_eq!(outcome.mismatches, 0);
        let all: Vec<f64> =
            model.tensors().iter().flat_map(|t| be.reals(t.gradient).unwrap().to_vec()).collect();
        losses.push((outcome.loss, all));
    }
    let (a, b) = (&losses[0], &losses[1]);
    // Rounding to 2^-20 at every block, with slopes of order one.
    assert!((a.0 - b.0).abs() < 1e-4, "{} {}", a.0, b.0);
    assert!(a.1.iter().zip(&b.1).all(|(x, y)| (x - y).abs() < 1e-4 * (1.0 + y.abs())));
}

/// Files of DeiT hold the patches' matrix as the kernel of a convolution, `[d, C, y, x]`.
#[test]
fn a_convolutions_kernel_is_read_as_patches() {
    let s = state("plain");
    let (model, layout) = Vit::layout::<Reference<'_, f32>>(&s.setup()).unwrap();
    let (c, p) = (s.size("channels"), s.size("patch"));
    assert!(c > 1 && p > 1, "otherwise the order does not show");
    let named = model.tensors();
    let (mut shapes, mut stored) = (Vec::new(), Vec::new());
    for t in &named {
        let file: Vec<f32> =
            s.reals[&format!("param.{}", t.name)].iter().map(|&x| x as f32).collect();
        if t.name == "patch_embed.proj.weight" {
            let d = t.shape[0];
            let at = |o: usize, c_: usize, y: usize, x: usize| {
                file[o * c * p * p + (y * p + x) * c + c_]
            };
            let mut kernel = Vec::new();
            for (o, c_, y, x) in
                (0..d * c * p * p).map(|i| (i / (c * p * p), i / (p * p) % c, i / p % p, i % p))
            {
                kernel.push(at(o, c_, y, x));
            }
            shapes.push((t.name.clone(), vec![d, c, p, p]));
            stored.push(kernel);
        } else {
            shapes.push((t.name.clone(), t.shape.clone()));
            stored.push(file);
        }
    }
    let dir = bdia_models::files::testing::TempDir::new();
    let path = dir.path().join("model.safetensors");
    weights::write::<WeightsError>(&path, &shapes, |i, sink| sink.put(&stored[i])).unwrap();
    let mut memory = Memory::<f32>::new(&layout);
    let mut be = memory.backend(&layout);
    files::load_weights(&path, &mut be, &model).unwrap();
    for t in &named {
        let expected = ours(t, &s.reals[&format!("param.{}", t.name)]);
        let mut found = vec![0.0_f32; t.values.len()];
        be.read_reals(t.values, &mut found).unwrap();
        assert!(
            found.iter().zip(&expected).all(|(a, &b)| a.to_bits() == (b as f32).to_bits()),
            "{}",
            t.name
        );
    }
}

#[test]
fn the_papers_network_has_its_number_of_parameters() {
    let patches = Patches { channels: 3, height: 32, width: 32, patch: 4, shifted: true };
    let s = state("small");
    let dims = Dims {
        patches,
        classes: 10,
        width: 512,
        layers: 6,
        heads: 8,
        inner: 512,
        ..s.setup().dims
    };
    let (model, _) = Vit::layout::<Reference<'_, f32>>(&Setup { dims, ..s.setup() }).unwrap();
    assert_eq!(model.parameters(), 9_622_512);
}

/// Stochastic depth: dropped for whole samples, replayed by recomputation, and nothing at
/// inference.
#[test]
fn stochastic_depth_is_replayed() {
    let s = state("small");
    let setup =
        Setup { mode: Mode::Bdia, grid: Some(Grid::new(14).unwrap()), drop_path: 0.7, ..s.setup() };
    let (mut model, layout) = Vit::layout::<Reference<'_, f32>>(&setup).unwrap();
    let mut memory = Memory::<f32>::new(&layout);
    let mut be = memory.backend(&layout);
    write(&mut be, &model, &s);
    let mut losses = Vec::new();
    for step in 0..4 {
        let outcome = model.train(&mut be, &Step { step, ..STEP }, image(&s)).unwrap();
        assert_eq!(outcome.mismatches, 0);
        losses.push(outcome.loss.to_bits());
    }
    losses.dedup();
    assert!(losses.len() > 1, "steps drop different blocks");
}
