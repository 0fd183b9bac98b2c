//! On a CUDA device. These tests need one, so they are ignored unless asked for; `.ci/cuda` runs
//! them on the emulated device.
#![allow(clippy::unwrap_used)]

mod common;

use bdia_core::Layout;
use bdia_cuda::{Cuda, Options};
use common::{Operands, SHAPES, assert_close, reference, refuses};

fn device(layout: &Layout) -> Cuda {
    Cuda::new(layout, Options::default()).map_err(|e| e.to_string()).unwrap()
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn the_device_agrees_with_the_reference_and_repeats_its_bits() {
    for shape in SHAPES {
        let mut layout = Layout::new(4);
        let operands = Operands::new(&mut layout, shape);
        let mut be = device(&layout);
        let found = operands.run(&mut be);
        assert_close(&found, &reference(&layout, &operands));
        assert_eq!(operands.run(&mut be), found, "{shape:?}");
    }
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn the_device_refuses_what_does_not_fit() {
    refuses(|layout| Box::new(device(layout)));
}
