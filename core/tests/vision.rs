//! The layers of a vision transformer, assembled and differentiated: patches, locality
//! self-attention, class head.
#![allow(clippy::unwrap_used)]

mod common;

use bdia_core::arena::{Ints, Layout, Reals};
use bdia_core::backend::{Gelu, Mask};
use bdia_core::layers::{
    BlockShape, ClassHead, Freeze, Gradients, Mixup, Parameter, Params, PatchEmbedding, Patches,
    PreNorm, Room, Scheme, Tensor, Tensors,
};
use bdia_core::optim::Rule;
use bdia_core::stack::{Config, Mode, Pass, Stack, Tail};
use bdia_core::{
    Category, FloatGamma, Gamma, Grid, Policy, Real, Reference, Result, Sign, Storage,
};
use common::noise;

const BATCH: usize = 3;
const WIDTH: usize = 6;
const CLASSES: usize = 4;
const BLOCKS: usize = 3;

const STANDARD: Mode = Mode::Standard { grid: None };

fn bdia() -> Mode {
    let gamma = Policy::fixed(Gamma::new(1, Sign::Random).unwrap());
    Mode::Bdia { grid: Grid::new(14).unwrap(), gamma, verify: true }
}

/// Which of the two vision transformers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Shifted patches with a norm, locality self-attention, no bias in q, k, v.
    Small,
    /// Plain patches and attention.
    Plain,
}

struct Model {
    stack: Stack,
    blocks: PreNorm,
    input: PatchEmbedding,
    head: ClassHead,
    ends: Params,
    outside: [Tensor; 10],
    patches: Patches,
}

impl Model {
    fn trained(&self) -> Vec<Parameter> {
        common::trained(&[(&self.blocks.params, &self.blocks), (&self.ends, &self.outside)])
    }

    fn tensor(&self, name: &str) -> Option<Tensor> {
        let mut found = None;
        self.blocks
            .each(&mut |t| {
                if t.name == name {
                    found = Some(*t);
                }
                Ok(())
            })
            .unwrap();
        found
    }
}

fn model<R: Real>(kind: Kind, mode: Mode, mixup: bool) -> (Model, Layout) {
    frozen::<R>(kind, mode, mixup, Freeze::Nothing)
}

fn frozen<R: Real>(kind: Kind, mode: Mode, mixup: bool, freeze: Freeze) -> (Model, Layout) {
    let mut l = Layout::new(R::BYTES);
    let small = kind == Kind::Small;
    let patches = Patches { channels: 2, height: 4, width: 6, patch: 2, shifted: small };
    let tokens = patches.count() + 1;
    let shape = BlockShape {
        tokens,
        width: WIDTH,
        heads: 2,
        inner: 5,
        eps: 1e-5,
        gelu: Gelu::Exact,
        mask: if small { Mask::Others } else { Mask::Full },
        attention_dropout: 0.2,
        residual_dropout: 0.1,
        hidden_dropout: 0.3,
        qkv_bias: !small,
        temperature: small,
        init: Scheme::InverseRoot,
    };
    // Plain descent without momentum: the gradients stay in full buffers.
    let gradients = Gradients::Full(Rule::Sgd { momentum: 0.0 });
    let blocks = PreNorm::layout(&shape, BLOCKS, None, freeze, gradients, &mut l).unwrap();
    let values = patches.values();
    let [a, b, c, d, e, f] = PatchEmbedding::tensors(&patches, WIDTH);
    let [g, h, i, j] = ClassHead::tensors(WIDTH, CLASSES);
    let mut outside = [a, b, c, d, e, f, g, h, i, j];
    let room = Room::NONE.place(&mut outside, freeze);
    let ends = Params::layout(1, room, freeze, gradients, &mut l).unwrap();
    let [norm, norm_bias, weight, bias, class, positions, last, last_bias, out, out_bias] =
        outside.map(|t| ends.parameter(0, &t));
    let chunk = 2;
    let config = Config {
        id: 0,
        batch: BATCH,
        per_sample: tokens * WIDTH,
        blocks: BLOCKS,
        chunk,
        tail: Tail::Head,
        needs: blocks.needs::<Reference<'_, R>>(chunk, 1),
        ends_scratch: PatchEmbedding::scratch(values, patches.count(), WIDTH, chunk)
            .max(ClassHead::scratch(WIDTH, CLASSES, chunk)),
    };
    let stack = Stack::layout(&config, &mode, &mut l).unwrap();
    let input = PatchEmbedding {
        width: WIDTH,
        count: patches.count(),
        patches: l.reals(Category::Head, BATCH * patches.count() * values),
        eps: 1e-5,
        norm: [norm, norm_bias],
        weight,
        bias,
        class,
        positions,
        dropout: 0.1,
    };
    let mut two = || (l.ints(Category::Head, BATCH), l.reals(Category::Head, BATCH));
    let ((labels, losses), (others, other_losses)) = (two(), two());
    let head = ClassHead {
        width: WIDTH,
        per_sample: tokens,
        eps: 1e-5,
        norm: [last, last_bias],
        weight: out,
        bias: out_bias,
        labels,
        losses,
        scale: 1.0 / BATCH as f64,
        smoothing: 0.1,
        mixup: mixup.then_some(Mixup { share: 0.3, labels: others, losses: other_losses }),
    };
    (Model { stack, blocks, input, head, ends, outside, patches }, l)
}

/// One pass; the mean loss and all reals afterwards.
fn run<R: Real>(m: &mut Model, l: &Layout, parameters: &[R]) -> Result<(f64, Vec<R>, u64)> {
    let (i, r, w) = l.arenas();
    let (mut i, mut r, mut w) = (vec![0; i], vec![R::zero(); r], vec![0; w]);
    r[..parameters.len()].copy_from_slice(parameters);
    let losses = {
        let mut be = Reference::new(l, &mut i, &mut r, &mut w)?;
        // Gradients lie behind the parameters, and start at 0.
        m.blocks.params.zero_gradients(&mut be)?;
        m.ends.zero_gradients(&mut be)?;
        let p = &m.patches;
        let (pixels, cut) = (p.channels * p.height * p.width, p.count() * p.values());
        let mut patches = vec![R::zero(); cut];
        for sample in 0..BATCH {
            let image: Vec<R> =
                (0..pixels).map(|at| R::of(noise(9, sample * pixels + at))).collect();
            p.cut(&image, &mut patches)?;
            be.write_reals(m.input.patches.sub(sample * cut, cut), &patches)?;
        }
        be.write_ints(m.head.labels, &[1, 3, 0])?;
        if let Some(mix) = m.head.mixup {
            be.write_ints(mix.labels, &[0, 3, 2])?;
        }
        let pass = Pass { seed: 3, step: 4, global: 0 };
        m.stack.train(&mut be, &mut m.blocks, &mut m.input, &mut m.head, &pass)?;
        assert_eq!(be.take_fault()?, None);
        let sum =
            |h: Reals| be.reals(h).unwrap().iter().map(|x| x.wide()).sum::<f64>() / BATCH as f64;
        let share = m.head.mixup.map_or(1.0, |m| m.share);
        let loss = share * sum(m.head.losses)
            + m.head.mixup.map_or(0.0, |m| (1.0 - m.share) * sum(m.losses));
        (loss, m.stack.mismatches(&be)?)
    };
    Ok((losses.0, r, losses.1))
}

#[test]
fn every_gradient_against_finite_differences() {
    let bdia_float =
        Mode::BdiaFloat { gamma: FloatGamma::new(0.5, Sign::Random).unwrap(), verify: true };
    for (kind, mode, mixup) in [
        (Kind::Small, STANDARD, true),
        (Kind::Small, bdia_float, false),
        (Kind::Plain, STANDARD, false),
    ] {
        let (mut m, l) = model::<f64>(kind, mode, mixup);
        let trained = m.trained();
        let mut p = common::random_parameters::<f64>(&trained, l.arenas().1);
        let (_, after, _) = run(&mut m, &l, &p).unwrap();
        let loss = |p: &[f64]| run(&mut m, &l, p).unwrap().0;
        let seen = common::compare_gradients(&trained, &mut p, &after, loss);
        // Nearly everything has a gradient; dropped values have none.
        assert!(seen > 900, "{kind:?} {mode:?}: {seen}");
    }
}

/// What is frozen of patches, blocks and head has no gradient, and the others keep theirs.
#[test]
fn frozen_parts_have_no_gradient() {
    let (mut all, l) = model::<f64>(Kind::Plain, STANDARD, false);
    let arena = common::random_parameters::<f64>(&all.trained(), l.arenas().1);
    let (loss, after, _) = run(&mut all, &l, &arena).unwrap();
    for freeze in [Freeze::Matrices, Freeze::All(None)] {
        let (mut m, l) = frozen::<f64>(Kind::Plain, STANDARD, false, freeze);
        // The same values in other places.
        let mut p = vec![0.0; l.arenas().1];
        let mut pairs = Vec::new();
        let mut place = |a: (&Params, &Tensor), b: (&Params, &Tensor), k: usize| {
            let (from, to) = (a.0.parameter(k, a.1), b.0.parameter(k, b.1));
            p[to.value.range()].copy_from_slice(&arena[from.value.range()]);
            assert_eq!(to.grad.is_empty(), a.1.matrix || freeze == Freeze::All(None));
            if !to.grad.is_empty() {
                pairs.push((from.grad, to.grad));
            }
        };
        for (a, b) in all.outside.iter().zip(&m.outside).filter(|(a, _)| !a.is_empty()) {
            place((&all.ends, a), (&m.ends, b), 0);
        }
        let list = |blocks: &PreNorm| {
            let mut tensors = Vec::new();
            blocks.each(&mut |t| {
                tensors.push(*t);
                Ok(())
            })?;
            tensors.retain(|t| !t.is_empty());
            Result::Ok(tensors)
        };
        for (a, b) in list(&all.blocks).unwrap().iter().zip(&list(&m.blocks).unwrap()) {
            for k in 0..BLOCKS {
                place((&all.blocks.params, a), (&m.blocks.params, b), k);
            }
        }
        let (found, reals, _) = run(&mut m, &l, &p).unwrap();
        assert_eq!(found.to_bits(), loss.to_bits());
        for (a, b) in pairs {
            assert!(after[a.range()] == reals[b.range()]);
        }
    }
}

/// The temperature is one of them, and there is none where the factor is fixed.
#[test]
fn temperatures_have_a_gradient() {
    let (mut m, l) = model::<f64>(Kind::Small, STANDARD, false);
    let p = common::random_parameters::<f64>(&m.trained(), l.arenas().1);
    let (_, after, _) = run(&mut m, &l, &p).unwrap();
    let tau = m.tensor("attn.temperature").unwrap();
    for k in 0..BLOCKS {
        assert!(after[m.blocks.params.gradient(k, &tau).start()] != 0.0);
    }
    assert!(m.tensor("attn.c_attn.bias").unwrap().is_empty());
    let (plain, _) = model::<f64>(Kind::Plain, STANDARD, false);
    assert!(plain.tensor("attn.temperature").unwrap().is_empty());
}

#[test]
fn rebuilt_activations_are_exact() {
    for kind in [Kind::Small, Kind::Plain] {
        let (mut m, l) = model::<f32>(kind, bdia(), false);
        let p = common::random_parameters::<f32>(&m.trained(), l.arenas().1);
        let (loss, _, mismatches) = run(&mut m, &l, &p).unwrap();
        assert!(loss.is_finite() && mismatches == 0);
    }
}

#[test]
fn a_label_that_does_not_exist_is_named() {
    let (mut m, l) = model::<f32>(Kind::Small, bdia(), false);
    let (i, r, w) = l.arenas();
    let (mut i, mut r, mut w) = (vec![0; i], vec![0.0_f32; r], vec![0; w]);
    let mut be = Reference::new(&l, &mut i, &mut r, &mut w).unwrap();
    be.write_ints(Ints::new(m.head.labels.start(), BATCH), &[0, 9, 0]).unwrap();
    let pass = Pass { seed: 3, step: 4, global: 0 };
    m.stack.train(&mut be, &mut m.blocks, &mut m.input, &mut m.head, &pass).unwrap();
    let fault = be.take_fault().unwrap().unwrap().to_string();
    assert!(fault.contains("sample 1") && fault.contains('9') && fault.contains('4'), "{fault}");
}
