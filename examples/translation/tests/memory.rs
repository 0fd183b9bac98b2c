//! The plan is the measured peak, and a step allocates nothing of its own. The allocator counts the
//! whole process, so this is a program without a test harness: its threads are this one and those
//! of a backend that is made here.
#![allow(clippy::unwrap_used)]

use bdia_core::layers::Gradients;
use bdia_core::network::Step;
use bdia_core::optim::Rule;
use bdia_core::stack::Mode;
use bdia_core::{Category, FloatGamma, Gamma, Grid, Layout, Policy, Reference, Sign};
use bdia_cpu::Cpu;
use bdia_models::inference::Inference;
use bdia_models::seq2seq::decode::{Search, Sizes};
use bdia_models::seq2seq::model::{Dims, Setup, Shape, Tokens, Translator};
use bdia_train::alloc::{Counting, threads};
use bdia_translate::batch::{Batches, chunk_of};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn bdia() -> Mode {
    let gamma = Policy::fixed(Gamma::new(1, Sign::Random).unwrap());
    Mode::Bdia { grid: Grid::new(14).unwrap(), gamma, verify: false }
}

fn setup(mode: Mode, layers: [usize; 2], fused: bool, width: usize) -> Setup {
    let rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
    Setup {
        dims: Dims {
            vocab: [40, 40],
            shared: true,
            longest: 20,
            width,
            layers,
            heads: 2,
            inner: 2 * width,
            eps: 1e-5,
            dropout: [0.1; 4],
        },
        mode,
        gradients: if fused { Gradients::Fused(rule) } else { Gradients::Full(rule) },
        blocks_per_step: 1,
        adapters: None,
        smoothing: 0.1,
        head_rows: 7,
        threads: 2,
        library: 0,
    }
}

/// Sentences of 1 to 19 tokens.
fn pairs() -> Vec<Tokens> {
    let row = |n: usize| (0..n).map(|i| 3 + (i % 37) as i32).collect();
    (0..60).map(|i| Tokens { source: row(1 + i * 7 % 19), target: row(1 + i * 5 % 19) }).collect()
}

fn main() {
    assert_eq!(threads().unwrap_or(1), 1, "other threads would be counted");
    // What the first thread of a process leaves for good.
    std::thread::spawn(|| ()).join().unwrap();
    let pairs = pairs();
    let batches = Batches::new(&pairs, 60, 20);
    let modes = [
        bdia(),
        Mode::Standard { grid: None },
        Mode::Checkpoint { every: 2, grid: None },
        Mode::Checkpoint { every: 1, grid: None },
        Mode::BdiaFloat { gamma: FloatGamma::new(0.5, Sign::Random).unwrap(), verify: false },
    ];
    let step = |step| Step { step, seed: 1, lr: 1e-3, weight_decay: 0.1, clip: 0.0 };
    let order: Vec<(Vec<&Tokens>, usize)> = (batches.epoch(1, 0).into_iter())
        .map(|b| (b.members.iter().map(|&i| &pairs[i as usize]).collect(), b.longest))
        .collect();
    for mode in modes {
        for (layers, chunk, fused) in [([1, 1], 1, true), ([3, 2], 1, false), ([2, 5], 2, true)] {
            // The reference backend has no library below it: everything is the plan's, to the byte.
            let s = setup(mode, layers, fused, 8);
            let shapes: Vec<Shape> = batches.shapes(chunk, 20).collect();
            let (mut model, layout) =
                Translator::layout::<Reference<'_, f32>>(&s, &shapes, |_| Ok(Vec::new())).unwrap();
            let before = Counting::current();
            let (i, r, w) = layout.arenas();
            let (mut i, mut r, mut w) = (vec![0; i], vec![f32::NAN; r], vec![0; w]);
            let mut be = Reference::new(&layout, &mut i, &mut r, &mut w).unwrap();
            model.initialize(&mut be, 1).unwrap();
            model.prepare(&shapes);
            assert_eq!(
                Counting::current() - before,
                layout.total(),
                "{mode:?} {layers:?} {chunk} {fused}"
            );
            Counting::reset_peak();
            let count = Counting::count();
            for (n, (batch, longest)) in order.iter().enumerate() {
                let batch = (batch.as_slice(), chunk_of(chunk, 20, *longest));
                model.train(&mut be, &step(n as u32), &[batch]).unwrap();
            }
            assert_eq!(Counting::count(), count, "no allocation within a step: {mode:?}");
            assert_eq!(
                Counting::peak() - before,
                layout.total(),
                "{mode:?} {layers:?} {chunk} {fused}"
            );
        }
    }

    // The CPU backend: arenas as planned, and what its libraries take within their bound;
    // translating takes no more. The threads are there before and stay until the end, so that
    // neither their start nor their end is counted.
    let team = Cpu::new(&Layout::new(size_of::<f32>()), 2).unwrap();
    for mode in modes {
        let s = Setup { library: Cpu::library_bytes(2), ..setup(mode, [3, 3], true, 64) };
        let shapes: Vec<Shape> = batches.shapes(2, 20).collect();
        let sizes = Sizes { sentences: 2, beams: 2, longest: 20 };
        let (mut model, layout) =
            Translator::layout::<Cpu>(&s, &shapes, |m| Ok(vec![m.decoding_layout::<Cpu>(&sizes)?]))
                .unwrap();
        let before = Counting::current();
        let mut be = team.sibling(&layout).unwrap();
        model.initialize(&mut be, 1).unwrap();
        model.prepare(&shapes);
        Counting::reset_peak();
        for (n, (batch, longest)) in order.iter().enumerate() {
            let batch = (batch.as_slice(), chunk_of(2, 20, *longest));
            model.train(&mut be, &step(n as u32), &[batch]).unwrap();
        }
        let search = Search { beams: 2, alpha: 0.6, inference: Inference::STANDARD };
        let some: Vec<_> = pairs.iter().take(2).map(|p| p.source.as_slice()).collect();
        assert_eq!(model.translate(&mut be, &some, &sizes, &search).unwrap().len(), 2);
        let own = layout.total() - layout.bytes(Category::Library);
        let peak = Counting::peak() - before;
        // The queue through which work enters the threads grows by a small block now and then.
        assert!(
            (own..=layout.total() + (16 << 10)).contains(&peak),
            "{mode:?}: peak {peak}, plan {}",
            layout.total()
        );
    }

    // Depth costs side bits: everything else is equal at 6 + 6 and 48 + 48 blocks, apart from what
    // belongs to parameters.
    let plan = |n| -> Layout {
        let shapes: Vec<Shape> = batches.shapes(1, 20).collect();
        Translator::layout::<Cpu>(&setup(bdia(), [n, n], true, 8), &shapes, |_| Ok(Vec::new()))
            .unwrap()
            .1
    };
    let (a, b) = (plan(6), plan(48));
    for c in
        [Category::Activations, Category::ActivationGradients, Category::Workspace, Category::Head]
    {
        assert_eq!(a.bytes(c), b.bytes(c), "{c}");
    }
    assert!(b.bytes(Category::SideBits) > a.bytes(Category::SideBits));
}
