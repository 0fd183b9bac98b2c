//! The plan is the measured peak, and a step allocates nothing of its own. The allocator counts the
//! whole process, so this is a program without a test harness: its threads are this one and those
//! of a backend that is made here.
#![allow(clippy::unwrap_used)]

// The allocator of the programs, without their crate, which depends on this one.
#[allow(dead_code)]
#[path = "../../train/src/alloc.rs"]
mod alloc;
mod common;

use alloc::{Counting, threads};

use bdia_core::backend::Half;
use bdia_core::layers::LoraShape;
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Category, Error, Layout};
use bdia_cpu::Cpu;
use bdia_models::gpt2::model::{Adapters, Dims, Gpt2, Inference, Named, Setup, Step};
use common::{Memory, grid, small};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn setup(mode: Mode, layers: usize, fused: bool, dims: Dims) -> Setup {
    Setup {
        dims: Dims { layers, ..dims },
        batch: 3,
        accumulate: 1,
        context: 8,
        mode,
        grid: if mode == Mode::BdiaFloat { None } else { grid() },
        gamma: bdia_core::Gamma::new(0.5, bdia_core::Sign::Random).unwrap(),
        rule: Some(Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 }),
        adapters: None,
        fused,
        verify: false,
        threads: 2,
        library: Cpu::library_bytes(2),
    }
}

fn step(i: u32) -> Step {
    Step { step: i, seed: 1, lr: 1e-3, weight_decay: 0.1, clip: 0.0 }
}

fn fill(_: usize, tokens: &mut [i32], targets: &mut [i32]) -> Result<(), Error> {
    for (i, (x, y)) in tokens.iter_mut().zip(targets).enumerate() {
        (*x, *y) = ((i * 7 % 19) as i32, (i * 5 % 19) as i32);
    }
    Ok(())
}

fn main() {
    assert_eq!(threads().unwrap_or(1), 1, "other threads would be counted");
    let modes = [
        Mode::Bdia,
        Mode::Standard,
        Mode::Checkpoint { every: 2 },
        Mode::Checkpoint { every: 1 },
        Mode::BdiaFloat,
    ];
    for mode in modes {
        for (layers, chunk) in [(1, 1), (2, 2), (5, 3), (12, 2)] {
            for fused in [true, false] {
                // The reference backend has no threads and no library below it: everything is the
                // plan's, to the byte.
                let s = Setup { library: 0, threads: 1, ..setup(mode, layers, fused, small()) };
                let choice = Choice { chunk, head_rows: 7 };
                let (mut model, layout) =
                    Gpt2::layout::<bdia_core::Reference<'_, f32>>(&s, choice).unwrap();
                let before = Counting::current();
                let mut memory = Memory::<f32>::new(&layout);
                let mut be = memory.backend(&layout);
                model.initialize(&mut be, 1).unwrap();
                model.prepare();
                assert_eq!(
                    Counting::current() - before,
                    layout.total(),
                    "{mode:?} {layers} {chunk} {fused}"
                );
                Counting::reset_peak();
                let count = Counting::count();
                for i in 0..3 {
                    model.train(&mut be, &step(i), fill).unwrap();
                }
                assert_eq!(Counting::count(), count, "no allocation within a step: {mode:?}");
                assert_eq!(
                    Counting::peak() - before,
                    layout.total(),
                    "{mode:?} {layers} {chunk} {fused}"
                );
            }
        }
    }

    // Adapters beside frozen parameters, in 32 and in 16 bits.
    for half in [None, Some(Half::Bf16)] {
        let adapters = Some(Adapters { shape: LoraShape { rank: 3, alpha: 6.0 }, half });
        for (mode, fused) in modes.into_iter().zip([true, false, true, false, true]) {
            let s = Setup { library: 0, threads: 1, adapters, ..setup(mode, 5, fused, small()) };
            let choice = Choice { chunk: 2, head_rows: 7 };
            let (mut model, layout) =
                Gpt2::layout::<bdia_core::Reference<'_, f32>>(&s, choice).unwrap();
            let before = Counting::current();
            let mut memory = Memory::<f32>::new(&layout);
            let mut be = memory.backend(&layout);
            // Any base model will do.
            for t in model.tensors() {
                t.put(&mut be, 0, &vec![0.125; t.len()]).unwrap();
            }
            model.initialize_adapters(&mut be, 1).unwrap();
            model.prepare();
            assert_eq!(Counting::current() - before, layout.total(), "{mode:?}, {half:?}");
            Counting::reset_peak();
            let count = Counting::count();
            for i in 0..3 {
                model.train(&mut be, &step(i), fill).unwrap();
            }
            assert_eq!(Counting::count(), count, "no allocation within a step: {mode:?}, {half:?}");
            assert_eq!(Counting::peak() - before, layout.total(), "{mode:?}, {half:?}");
            let frozen: usize = layout.bytes(Category::Frozen);
            let bytes = |t: &Named| t.len() * if t.narrow.is_some() { 2 } else { 4 };
            let named = model.tensors();
            // Every tensor may be padded by up to 62 bytes.
            let least: usize = named.iter().map(bytes).sum();
            assert!(
                (least..=least + 62 * named.len()).contains(&frozen),
                "{half:?}: {frozen}, at least {least}"
            );
        }
    }

    // The CPU backend: arenas as planned, and what `gemm` takes for itself within its bound. The
    // threads are there before and stay until the end, so that neither their start nor their end is
    // counted.
    let team = Cpu::new(&Layout::new(size_of::<f32>()), 2).unwrap();
    let wide = Dims { vocab: 300, width: 96, heads: 4, inner: 384, ..small() };
    for mode in modes {
        let s = setup(mode, 4, true, wide);
        let (mut model, layout) =
            Gpt2::layout::<Cpu>(&s, Choice { chunk: 2, head_rows: 16 }).unwrap();
        let before = Counting::current();
        let mut be = team.sibling(&layout).unwrap();
        model.initialize(&mut be, 1).unwrap();
        model.prepare();
        Counting::reset_peak();
        for i in 0..3 {
            model.train(&mut be, &step(i), fill).unwrap();
        }
        let own = layout.total() - layout.bytes(Category::Library);
        let peak = Counting::peak() - before;
        // The queue through which work enters the threads grows by a small block now and then.
        assert!(
            (own..=layout.total() + (16 << 10)).contains(&peak),
            "{mode:?}: peak {peak}, plan {}",
            layout.total()
        );
        let _ = model.evaluate(&mut be, &[1; 16], &[2; 16], Inference::Float(s.gamma)).unwrap();
    }

    // Depth costs side bits: everything else is equal at 6 and 48 blocks, apart from what belongs
    // to parameters.
    let plan = |layers| -> Layout {
        Gpt2::layout::<Cpu>(
            &setup(Mode::Bdia, layers, true, small()),
            Choice { chunk: 1, head_rows: 8 },
        )
        .unwrap()
        .1
    };
    let (a, b) = (plan(6), plan(48));
    for c in
        [Category::Activations, Category::ActivationGradients, Category::Workspace, Category::Head]
    {
        assert_eq!(a.bytes(c), b.bytes(c), "{c}");
    }
}
