//! The conformance suite of `bdia_core::testing` on a device.
//!
//! These tests need one, so they are ignored unless asked for: `cargo test -p bdia-cuda --
//! --ignored` where there is a GPU; `.ci/cuda` runs them on the emulated device.
#![allow(clippy::unwrap_used)]

use bdia_core::Layout;
use bdia_core::testing;
use bdia_cuda::{Cuda, Options};

fn device(layout: &Layout) -> Cuda {
    Cuda::new(layout, Options::default()).map_err(|e| e.to_string()).unwrap()
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn update_operations() {
    testing::update_ops(device).map_err(|f| f.to_string()).unwrap();
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn network_operations() {
    testing::nn_ops(device).map_err(|f| f.to_string()).unwrap();
}

#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn optimizers() {
    testing::optim_ops(device).map_err(|f| f.to_string()).unwrap();
}
