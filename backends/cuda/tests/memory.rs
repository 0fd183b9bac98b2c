//! Memory of the device. A program of its own, with one test, because others on the device would
//! show in the numbers.
#![allow(clippy::unwrap_used)]

use bdia_core::{Category, Layout};
use bdia_cuda::{Cuda, CudaError, Options, Precision};

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn memory() {
    too_much_memory_is_an_error();
    the_plan_is_what_is_allocated();
}

/// More than the device has: the plan stands beside what is free, and nothing stays allocated.
fn too_much_memory_is_an_error() {
    let small = Layout::new(4);
    let before = Cuda::new(&small, Options::default()).and_then(|c| c.device_memory()).unwrap().0;
    let mut layout = Layout::new(4);
    let _ = layout.reals(Category::Parameters, 1 << 42);
    let refused = Cuda::new(&layout, Options::default()).map(|_| ());
    let Err(CudaError::Memory { plan, free, total }) = refused else { panic!("{refused:?}") };
    assert!(plan >= 4 << 42 && free <= total && total < plan);
    assert_eq!(
        Cuda::new(&small, Options::default()).and_then(|c| c.device_memory()).unwrap().0,
        before
    );
    let far = Cuda::new(&small, Options { device: 99, ..Options::default() }).map(|_| ());
    assert!(matches!(far, Err(CudaError::Device { asked: 99, found }) if found < 99), "{far:?}");
}

/// What the driver says is gone is what the plan says: arenas and library scratch, rounded up to a
/// page.
///
/// The page is all that the two can differ by: everything is one allocation, and a driver gives
/// memory to a process in pages of 2 MiB, of which `cuMemGetInfo` counts whole ones.
fn the_plan_is_what_is_allocated() {
    const PAGE: usize = 2 << 20;
    const HANDLES: usize = 128 << 20;
    for (precision, ints) in [(Precision::F32, 3 << 20), (Precision::Bf16, 77)] {
        let options = Options { precision, ..Options::default() };
        let mut layout = Layout::new(4);
        layout.outside(Category::Library, Cuda::library_bytes(precision));
        let first = Cuda::new(&layout, options).unwrap();
        let free = first.device_memory().unwrap().0;
        let _ = layout.reals(Category::Parameters, 5 << 20);
        let _ = layout.ints(Category::Activations, ints);
        let _ = layout.words(Category::SideBits, 1 << 20);
        let second = Cuda::new(&layout, options).unwrap();
        assert_eq!(second.allocated_bytes(), layout.total(), "the plan, to the byte");
        assert_eq!(
            second.taken_bytes(),
            layout.total().next_multiple_of(PAGE),
            "the driver's count, to the page"
        );
        // The whole backend: on top of it there is what the driver and cuBLAS keep for a handle, 66
        // MiB on an H100.
        let handles = free - second.device_memory().unwrap().0 - second.taken_bytes();
        assert!(handles <= HANDLES, "{handles}");
    }
}
