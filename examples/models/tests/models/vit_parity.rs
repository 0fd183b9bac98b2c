//! Logits, loss and every gradient against an independent PyTorch implementation
//! (`torch/vit_f64.py`), in f64; the parameter count of the paper's network; the inverse of the
//! two-stream one.

use crate::common::{Memory, SGD, STANDARD, STILL, State, bdia, bdia_float, verified};
use bdia_core::layers::{Gradients, Patches};
use bdia_core::network::Step;
use bdia_core::{Error, Reference, Sign, Storage};
use bdia_models::inference::Inference;
use bdia_models::vit::files;
use bdia_models::vit::model::{Dims, Setup, Vit};
use bdia_models::weights::{self, WeightsError};

fn state(name: &str) -> State {
    crate::common::state(&format!("vit/{name}_f64.safetensors"))
}

fn setup(s: &State) -> Setup {
    let (small, side) = (s.is("small"), s.size("side"));
    let two_streams = s.is("two_streams");
    Setup {
        dims: Dims {
            patches: Patches {
                channels: s.size("channels"),
                height: side,
                width: side,
                patch: s.size("patch"),
                shifted: small,
            },
            classes: s.size("classes"),
            width: s.size("width"),
            layers: s.size("layers"),
            heads: s.size("heads"),
            inner: s.size("mlp"),
            eps: 1e-5,
            locality: small,
            dropout: [0.0; 4],
            two_streams,
        },
        batch: s.size("batch"),
        accumulate: 1,
        chunk: 3,
        // The network with two streams takes from it whether it verifies.
        mode: if two_streams { verified(bdia_float(Sign::Random)) } else { STANDARD },
        // The learning rate is 0, so that the parameters stay; gradients are kept in full
        // buffers.
        gradients: Gradients::Full(SGD),
        blocks_per_step: 1,
        adapters: None,
        drop_path: 0.0,
        smoothing: s.number("smoothing"),
        mixup: false,
        threads: 1,
        library: 0,
    }
}

const STEP: Step = Step { seed: 1, ..STILL };

fn image(s: &State, i: usize, out: &mut [f64]) -> Result<[i32; 2], Error> {
    out.copy_from_slice(&s.reals["images"][i * out.len()..(i + 1) * out.len()]);
    Ok([s.ints["labels"][i]; 2])
}

#[test]
fn logits_loss_and_all_gradients_are_those_of_pytorch() {
    for name in ["small", "plain", "revvit"] {
        let s = state(name);
        let (mut model, layout) = Vit::layout::<Reference<'_, f64>>(&setup(&s)).unwrap();
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        let tensors = model.tensors();
        s.load(&mut be, &tensors);
        // Both add in f64, in different orders: a few hundred roundings of 1e-16.
        let close = |a: f64, b: f64| (a - b).abs() < 1e-11 * (1.0 + b.abs());
        let classes = s.size("classes");
        for (first, n) in [(0, 3), (3, 1)] {
            let image = |i, out: &mut [f64]| image(&s, first + i, out);
            let (logits, _) = model.evaluate(&mut be, n, Inference::STANDARD, image).unwrap();
            for (i, (&a, &b)) in
                logits.iter().zip(&s.reals["logits"][first * classes..]).enumerate()
            {
                assert!(close(a, b), "{name} logit {i}: {a} {b}");
            }
        }
        let outcome = model.train(&mut be, &STEP, 1.0, |_, i, out| image(&s, i, out)).unwrap();
        assert!(
            close(outcome.loss, s.reals["loss"][0]),
            "{name}: {} {}",
            outcome.loss,
            s.reals["loss"][0]
        );
        for (t, expected) in tensors.iter().zip(s.of("grad", &tensors)) {
            let found = be.reals(t.gradient).unwrap();
            for (i, (&a, &b)) in found.iter().zip(&expected).enumerate() {
                assert!(close(a, b), "{name}: gradient of {}[{i}]: {a} {b}", t.name);
            }
        }
        if name == "revvit" {
            // Three blocks of order one in f64, up and down again.
            let error = outcome.rebuilt.error;
            assert!(error > 0.0 && error < 1e-13, "{error}");
        }
    }
}

/// A network with adapters computes what the network computes whose matrices they were added to,
/// of which PyTorch says that it is right; what is frozen has no gradient, the head has one.
#[test]
fn adapters_and_the_head_have_the_gradients_of_the_merged_network() {
    for name in ["small", "plain"] {
        let s = state(name);
        let close = |a: f64, b: f64| (a - b).abs() < 1e-11 * (1.0 + b.abs());
        let with = Setup { adapters: Some(crate::common::ADAPTERS), ..setup(&s) };
        let (mut model, layout) = Vit::layout::<Reference<'_, f64>>(&with).unwrap();
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        s.load(&mut be, &model.tensors());
        let trained = model.trained();
        let adapters = crate::common::set_adapters(&mut be, &trained);
        let outcome = model.train(&mut be, &STEP, 1.0, |_, i, out| image(&s, i, out)).unwrap();

        let (mut whole, layout) = Vit::layout::<Reference<'_, f64>>(&setup(&s)).unwrap();
        let mut memory = Memory::<f64>::new(&layout);
        let mut merged = memory.backend(&layout);
        let tensors = whole.tensors();
        s.load(&mut merged, &tensors);
        crate::common::add_adapters(&mut merged, &tensors, &adapters);
        let expected = whole.train(&mut merged, &STEP, 1.0, |_, i, out| image(&s, i, out)).unwrap();
        assert!(close(outcome.loss, expected.loss), "{name}: {outcome:?} {expected:?}");

        let of_adapters = crate::common::gradients_of_adapters(&merged, &tensors, &adapters);
        let (mut blocks, mut others) = (of_adapters.into_iter(), Vec::new());
        for t in &trained {
            let found = be.reals(t.gradient).unwrap();
            let expected = if t.is_adapter() {
                blocks.next().unwrap()
            } else {
                others.push(t.name.as_str());
                let same = tensors.iter().find(|other| other.name == t.name).unwrap();
                merged.reals(same.gradient).unwrap().to_vec()
            };
            assert_eq!(found.len(), expected.len());
            for (i, (&a, &b)) in found.iter().zip(&expected).enumerate() {
                assert!(close(a, b), "{name}: gradient of {}[{i}]: {a} {b}", t.name);
            }
        }
        assert_eq!(others, ["norm.weight", "norm.bias", "head.weight", "head.bias"]);
        assert!(model.tensors().iter().filter(|t| !t.is_trained()).all(|t| t.gradient.is_empty()));
    }
}

/// On the grid the same gradients come out up to its fineness, and every rebuilt activation is
/// exact.
#[test]
fn reversible_training_gives_the_gradients_of_its_own_forward_pass() {
    let s = state("small");
    let mut losses = Vec::new();
    for mode in [bdia(20, Sign::Random), bdia_float(Sign::Random)] {
        let setup = Setup { mode: verified(mode), ..setup(&s) };
        let (mut model, layout) = Vit::layout::<Reference<'_, f64>>(&setup).unwrap();
        let mut memory = Memory::<f64>::new(&layout);
        let mut be = memory.backend(&layout);
        s.load(&mut be, &model.tensors());
        let outcome = model.train(&mut be, &STEP, 1.0, |_, i, out| image(&s, i, out)).unwrap();
        assert_eq!(outcome.rebuilt.mismatches, 0);
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
    let (model, layout) = Vit::layout::<Reference<'_, f32>>(&setup(&s)).unwrap();
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
    for (t, expected) in named.iter().zip(s.of("param", &named)) {
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
        ..setup(&s).dims
    };
    let (model, _) = Vit::layout::<Reference<'_, f32>>(&Setup { dims, ..setup(&s) }).unwrap();
    assert_eq!(model.parameters(), 9_622_512);
}

/// Stochastic depth: dropped for whole samples, replayed by recomputation, and nothing at
/// inference.
#[test]
fn stochastic_depth_is_replayed() {
    let s = state("small");
    let mode = verified(bdia(14, Sign::Random));
    let setup = Setup { mode, drop_path: 0.7, ..setup(&s) };
    let (mut model, layout) = Vit::layout::<Reference<'_, f32>>(&setup).unwrap();
    let mut memory = Memory::<f32>::new(&layout);
    let mut be = memory.backend(&layout);
    s.load(&mut be, &model.tensors());
    let mut losses = Vec::new();
    for step in 0..4 {
        let step = Step { step, ..STEP };
        let outcome = model.train(&mut be, &step, 1.0, |_, i, out| image(&s, i, out)).unwrap();
        assert_eq!(outcome.rebuilt.mismatches, 0);
        losses.push(outcome.loss.to_bits());
    }
    losses.dedup();
    assert!(losses.len() > 1, "steps drop different blocks");
}
