//! The layers of a vision transformer, assembled and differentiated: patches, locality
//! self-attention, class head.
#![allow(clippy::unwrap_used)]

use bdia_core::arena::{Ints, Layout, Reals};
use bdia_core::backend::{Gelu, Mask};
use bdia_core::layers::{
    BlockShape, ClassHead, Mixup, Params, PatchEmbedding, Patches, Tensor, TransformerBlocks, place,
};
use bdia_core::optim::Rule;
use bdia_core::rng::philox;
use bdia_core::stack::{Config, Mode, Pass, Stack, Tail};
use bdia_core::{Category, Gamma, Grid, Real, Reference, Result, Sign, Storage};

const BATCH: usize = 3;
const WIDTH: usize = 6;
const CLASSES: usize = 4;
const BLOCKS: usize = 3;

/// A number in -1 … 1.
fn noise(a: u32, i: usize) -> f64 {
    f64::from(philox(5, [a, i as u32, 0, 0])[0] as i32) / f64::from(1_u32 << 31)
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
    blocks: TransformerBlocks,
    input: PatchEmbedding,
    head: ClassHead,
    ends: Params,
    patches: Patches,
}

fn model<R: Real>(kind: Kind, mode: Mode, mixup: bool) -> (Model, Layout) {
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
    };
    // Plain descent without momentum: the gradients stay in full buffers.
    let rule = Some(Rule::Sgd { momentum: 0.0 });
    let blocks = TransformerBlocks::layout(shape, BLOCKS, rule, false, &mut l).unwrap();
    let values = patches.values();
    let t = |name, rows, cols| Tensor { name, rows, cols, matrix: rows > 1, offset: 0 };
    let norm = if small { 1 } else { 0 };
    let mut tensors = [
        t("norm", norm, values),
        t("norm bias", norm, values),
        t("weight", values, WIDTH),
        t("bias", 1, WIDTH),
        t("class", 1, WIDTH),
        t("positions", tokens, WIDTH),
        t("head norm", 1, WIDTH),
        t("head norm bias", 1, WIDTH),
        t("head", WIDTH, CLASSES),
        t("head bias", 1, CLASSES),
    ];
    let len = place(&mut tensors);
    let ends = Params::layout(&mut l, 1, len, tensors.len(), rule, true).unwrap();
    let (params, grads) = (ends.group(0), ends.gradient(0));
    let chunk = 2;
    let config = Config {
        id: 0,
        batch: BATCH,
        per_sample: tokens * WIDTH,
        blocks: BLOCKS,
        chunk,
        mode,
        grid: (mode == Mode::Bdia).then(|| Grid::new(14).unwrap()),
        gamma: Gamma::new(0.5, Sign::Random).unwrap(),
        verify: true,
        tail: Tail::Head,
        needs: shape.needs::<Reference<'_, R>>(chunk, 1),
        ends_scratch: PatchEmbedding::scratch(values, patches.count(), WIDTH, chunk)
            .max(ClassHead::scratch(WIDTH, CLASSES, chunk)),
    };
    let stack = Stack::layout(config, &mut l).unwrap();
    let input = PatchEmbedding {
        width: WIDTH,
        count: patches.count(),
        patches: l.reals(Category::Head, BATCH * patches.count() * values),
        eps: 1e-5,
        norm: [tensors[0].of(params), tensors[1].of(params)],
        dnorm: [tensors[0].of(grads), tensors[1].of(grads)],
        weight: tensors[2],
        bias: tensors[3],
        class: tensors[4],
        positions: tensors[5],
        params,
        grads,
        dropout: 0.1,
    };
    let mut two = || (l.ints(Category::Head, BATCH), l.reals(Category::Head, BATCH));
    let ((labels, losses), (others, other_losses)) = (two(), two());
    let head = ClassHead {
        width: WIDTH,
        per_sample: tokens,
        eps: 1e-5,
        norm: tensors[6],
        norm_bias: tensors[7],
        weight: tensors[8],
        bias: tensors[9],
        params,
        grads,
        labels,
        losses,
        scale: 1.0 / BATCH as f64,
        smoothing: 0.1,
        mixup: mixup.then_some(Mixup { share: 0.3, labels: others, losses: other_losses }),
    };
    (Model { stack, blocks, input, head, ends, patches }, l)
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

/// Parameters of both groups, random.
fn parameters<R: Real>(m: &Model, len: usize) -> Vec<R> {
    let mut p = vec![R::zero(); len];
    for h in [m.blocks.params.values, m.ends.values] {
        for i in h.range() {
            p[i] = R::of(0.6 * noise(1, i));
        }
    }
    p
}

#[test]
fn every_gradient_against_finite_differences() {
    for (kind, mode, mixup) in [
        (Kind::Small, Mode::Standard, true),
        (Kind::Small, Mode::BdiaFloat, false),
        (Kind::Plain, Mode::Standard, false),
    ] {
        let (mut m, l) = model::<f64>(kind, mode, mixup);
        let mut p = parameters::<f64>(&m, l.arenas().1);
        let (_, after, _) = run(&mut m, &l, &p).unwrap();
        let e = 1e-5;
        let mut seen = 0;
        for (values, gradients) in
            [(m.blocks.params.values, m.blocks.params.gradients), (m.ends.values, m.ends.gradients)]
        {
            for (at, g) in values.range().zip(gradients.range()) {
                let x = p[at];
                p[at] = x + e;
                let plus = run(&mut m, &l, &p).unwrap().0;
                p[at] = x - e;
                let minus = run(&mut m, &l, &p).unwrap().0;
                p[at] = x;
                let slope = (plus - minus) / (2.0 * e);
                seen += usize::from(slope != 0.0);
                // Central differences are off by e² times the third derivative, and by rounding,
                // about 1e-16 / e.
                assert!(
                    (slope - after[g]).abs() < 1e-8 * (1.0 + slope.abs()),
                    "{kind:?} {mode:?} at {at}: {slope} {}",
                    after[g]
                );
            }
        }
        // Nearly everything has a gradient; alignment and dropped values have none.
        assert!(seen > 900, "{seen}");
    }
}

/// The temperature is one of them, and there is none where the factor is fixed.
#[test]
fn temperatures_have_a_gradient() {
    let (mut m, l) = model::<f64>(Kind::Small, Mode::Standard, false);
    let p = parameters::<f64>(&m, l.arenas().1);
    let (_, after, _) = run(&mut m, &l, &p).unwrap();
    let tau = m.blocks.tensors().iter().find(|t| t.name == "attn.temperature").unwrap();
    for k in 0..BLOCKS {
        assert!(after[tau.of(m.blocks.params.gradient(k)).start()] != 0.0);
    }
    assert!(m.blocks.tensors().iter().any(|t| t.name == "attn.c_attn.bias" && t.is_empty()));
    let (plain, _) = model::<f64>(Kind::Plain, Mode::Standard, false);
    assert!(plain.blocks.tensors().iter().any(|t| t.name == "attn.temperature" && t.is_empty()));
}

#[test]
fn rebuilt_activations_are_exact() {
    for kind in [Kind::Small, Kind::Plain] {
        let (mut m, l) = model::<f32>(kind, Mode::Bdia, false);
        let p = parameters::<f32>(&m, l.arenas().1);
        let (loss, _, mismatches) = run(&mut m, &l, &p).unwrap();
        assert!(loss.is_finite() && mismatches == 0);
    }
}

#[test]
fn a_label_that_does_not_exist_is_named() {
    let (mut m, l) = model::<f32>(Kind::Small, Mode::Bdia, false);
    let (i, r, w) = l.arenas();
    let (mut i, mut r, mut w) = (vec![0; i], vec![0.0_f32; r], vec![0; w]);
    let mut be = Reference::new(&l, &mut i, &mut r, &mut w).unwrap();
    be.write_ints(Ints::new(m.head.labels.start(), BATCH), &[0, 9, 0]).unwrap();
    let pass = Pass { seed: 3, step: 4, global: 0 };
    m.stack.train(&mut be, &mut m.blocks, &mut m.input, &mut m.head, &pass).unwrap();
    let fault = be.take_fault().unwrap().unwrap().to_string();
    assert!(fault.contains("sample 1") && fault.contains('9') && fault.contains('4'), "{fault}");
}
