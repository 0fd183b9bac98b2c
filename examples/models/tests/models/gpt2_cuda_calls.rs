//! What a training step asks of the driver. A program of its own, with one test, because others on
//! the device would show in the numbers; the emulated device counts (`.ci/cuda`).

use crate::common::{ADAMW, STANDARD, bdia, checkpoint, small};
use bdia_core::layers::Gradients;
use bdia_core::network::Step;
use bdia_core::plan::Choice;
use bdia_core::{Error, Sign};
use bdia_cuda::{Cuda, Options};
use bdia_models::gpt2::model::{Dims, Gpt2, Setup};

/// Driver calls of the emulated device so far: kernels, products, uploads from page-locked and from
/// other memory, copies to the host, waits with work before them, waits without. None on a real
/// device, which does not count them.
fn calls() -> Option<[u64; 7]> {
    use core::ffi::{CStr, c_char, c_int, c_void};
    unsafe extern "C" {
        fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
        fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    const NOW_IF_LOADED: c_int = 2 | 4;
    let name = |s: &'static CStr| s.as_ptr();
    // SAFETY: the library is there already; its symbol is a function without parameters that gives
    // the address of seven numbers, which live as long as the library.
    unsafe {
        let library = dlopen(name(c"libcuda.so"), NOW_IF_LOADED);
        let symbol = dlsym(library, name(c"emulator_calls"));
        if library.is_null() || symbol.is_null() {
            return None;
        }
        let calls: extern "C" fn() -> *const [u64; 7] = core::mem::transmute(symbol);
        Some(*calls())
    }
}

/// A step waits once: for the status at its end, or, with clipping or micro-batches, for status and
/// norm before the update. Uploads come from page-locked memory. The emulated device counts.
#[test]
#[ignore = "needs the emulated device of .ci/cuda"]
fn emulated_calls_of_a_step() {
    let reversible = bdia(14, Sign::Random);
    let cases = [
        (STANDARD, 1, 0.0),
        (checkpoint(2), 1, 0.0),
        (reversible, 1, 0.0),
        (reversible, 1, 1.0),
        (reversible, 2, 1.0),
    ];
    for (mode, accumulate, clip) in cases {
        let mut counts = vec![];
        for layers in [3, 4] {
            let gradients =
                if clip == 0.0 { Gradients::Fused(ADAMW) } else { Gradients::Full(ADAMW) };
            let dims = Dims { layers, ..small() };
            let s = Setup { accumulate, gradients, ..crate::common::setup(dims, 4, 9, mode) };
            let (mut model, layout) = Gpt2::layout::<Cuda>(&s, Choice::new(2, 36)).unwrap();
            let mut be = Cuda::new(&layout, Options::default()).map_err(|e| e.to_string()).unwrap();
            model.initialize(&mut be, 3).unwrap();
            let mut before = [0; 7];
            for i in 0..3 {
                let Some(now) = calls() else { panic!("this test is about the emulated device") };
                before = now;
                model
                    .train(
                        &mut be,
                        &Step { step: i, seed: 11, lr: 3e-3, weight_decay: 0.1, clip },
                        |_, x, y| {
                            x.fill(3);
                            y.fill(4);
                            Ok::<(), Error>(())
                        },
                    )
                    .unwrap();
            }
            let after = calls().unwrap();
            let [launches, products, pinned, pageable, downloads, found, _] =
                core::array::from_fn(|i| after[i] - before[i]);
            let (what, micro) =
                (format!("{mode:?} x {accumulate}, clip {clip}"), accumulate as u64);
            assert_eq!(found, 1, "{what}: waits for work");
            assert_eq!(
                (pinned, pageable),
                (if micro == 1 { 2 } else { 4 * micro }, 0),
                "{what}: tokens and targets, from page-locked memory; several are loaded twice"
            );
            // Status, losses, norms of blocks and ends: all but the first when nothing is left to
            // wait for.
            assert_eq!(downloads, 1 + micro + 2, "{what}");
            counts.push(launches + products);
        }
        let each = counts[1] - counts[0];
        let batches = if accumulate == 1 { String::new() } else { format!(" x {accumulate}") };
        println!(
            "{mode:?}{batches}: {} launches a step of 3 blocks in 2 chunks, {each} more for each \
             block",
            counts[0]
        );
        // Forward and backward pass of two chunks of each batch, and the update of 12 tensors.
        assert!((60..=160 * accumulate as u64).contains(&each), "{mode:?}{batches}: {each}");
    }
}
