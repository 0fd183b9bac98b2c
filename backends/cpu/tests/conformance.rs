//! The suite of [`bdia_core::testing`].

use bdia_core::{Layout, Storage};
use bdia_cpu::Cpu;

#[test]
fn conformance() {
    for threads in [1, 2, 3] {
        bdia_core::testing::all(|layout: &Layout| Cpu::new(layout, threads).unwrap()).unwrap();
    }
}

/// `.ci/variants` builds this test for several processors and says which width it expects: a build
/// that silently fell back to another one fails here.
#[test]
fn the_lanes_that_were_asked_for() {
    let lanes = Cpu::new(&Layout::new(4), 1).unwrap().identity().lanes;
    match std::env::var("BDIA_LANES") {
        Ok(asked) => assert_eq!(asked, lanes.to_string()),
        Err(_) => println!("skipped: BDIA_LANES is not set; this build has {lanes} lanes"),
    }
}
