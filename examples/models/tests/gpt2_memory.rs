//! The plan is the measured peak, and a step allocates nothing of its own. The allocator counts the
//! whole process, so this is a program without a test harness: its threads are this one and those
//! of a backend that is made here.
#![allow(clippy::unwrap_used)]

// The allocator of the programs, without their crate, which depends on this one.
#[allow(dead_code, unused_imports)]
#[path = "../../train/src/alloc.rs"]
mod alloc;
mod common;

use alloc::{Counting, threads};

use bdia_core::layers::{Gradients, LoraShape};
use bdia_core::network::Step;
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Category, Error, Layout, Packing, Sign};
use bdia_cpu::Cpu;
use bdia_models::gpt2::model::{Dims, Gpt2, Setup};
use bdia_models::language::frozen;
use bdia_models::named::{Adapters, Frozen, Named};
use common::{Memory, bdia, bdia_float, float, grid, lay_out, small};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ADAMW: Rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

/// On one thread, with nothing but what the plan says.
fn setup(mode: Mode, layers: usize, gradients: Gradients, dims: Dims) -> Setup {
    Setup { gradients, ..common::setup(Dims { layers, ..dims }, 3, 8, mode) }
}

/// The same on two threads of the CPU.
fn on_cpu(mode: Mode, layers: usize, dims: Dims) -> Setup {
    let library = Cpu::library_bytes(2);
    Setup { threads: 2, library, ..setup(mode, layers, Gradients::Fused(ADAMW), dims) }
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
    let grid = Some(grid());
    let modes = [
        bdia(14, Sign::Random),
        Mode::Standard { grid },
        Mode::Checkpoint { every: 2, grid },
        Mode::Checkpoint { every: 1, grid },
        bdia_float(Sign::Random),
    ];
    let (fused, full) = (Gradients::Fused(ADAMW), Gradients::Full(ADAMW));
    let (coded, factored) = (Gradients::Fused(Rule::ADAM_W_8BIT), Gradients::Full(Rule::ADAFACTOR));
    for mode in modes {
        for (layers, chunk) in [(1, 1), (2, 2), (5, 3), (12, 2)] {
            for gradients in [fused, full, coded, factored] {
                // The reference backend has no threads and no library below it: everything is the
                // plan's, to the byte.
                // 12 × 352 values have codes.
                let inner = if gradients == coded { 352 } else { small().inner };
                let s = setup(mode, layers, gradients, Dims { inner, ..small() });
                let (mut model, layout) = lay_out::<f32>(&s, chunk, 7);
                let before = Counting::current();
                let mut memory = Memory::<f32>::new(&layout);
                let mut be = memory.backend(&layout);
                model.initialize(&mut be, 1).unwrap();
                model.prepare();
                assert_eq!(
                    Counting::current() - before,
                    layout.total(),
                    "{mode:?} {layers} {chunk} {gradients:?}"
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
                    "{mode:?} {layers} {chunk} {gradients:?}"
                );
            }
        }
    }

    // Adapters beside frozen parameters, in 32 and in 16 bits.
    for half in [None, Some(Packing::Bf16)] {
        let frozen = half.map_or(Frozen::default(), |p| frozen::packed(&small(), p).unwrap());
        let adapters = Some(Adapters { shape: LoraShape { rank: 3, alpha: 6.0 }, frozen });
        for (mode, gradients) in modes.into_iter().zip([fused, full, fused, full, fused]) {
            let s = Setup { adapters, ..setup(mode, 5, gradients, small()) };
            let (mut model, layout) = lay_out::<f32>(&s, 2, 7);
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
            let bytes = |t: &Named| t.len() * if t.packed.is_some() { 2 } else { 4 };
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
        let s = on_cpu(mode, 4, wide);
        let (mut model, layout) = Gpt2::layout::<Cpu>(&s, Choice::new(2, 16)).unwrap();
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
        let _ = model.evaluate(&mut be, &[1; 16], &[2; 16], float(0.5)).unwrap();
    }

    // Depth costs side bits: everything else is equal at 6 and 48 blocks, apart from what belongs
    // to parameters.
    let plan = |layers| -> Layout {
        let s = on_cpu(bdia(14, Sign::Random), layers, small());
        Gpt2::layout::<Cpu>(&s, Choice::new(1, 8)).unwrap().1
    };
    let (a, b) = (plan(6), plan(48));
    for c in
        [Category::Activations, Category::ActivationGradients, Category::Workspace, Category::Head]
    {
        assert_eq!(a.bytes(c), b.bytes(c), "{c}");
    }
}
