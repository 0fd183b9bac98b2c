//! The suite of [`bdia_core::testing`].

use bdia_core::Layout;
use bdia_cpu::Cpu;

#[test]
fn conformance() {
    for threads in [1, 2, 3] {
        bdia_core::testing::all(|layout: &Layout| Cpu::new(layout, threads).unwrap()).unwrap();
    }
}
