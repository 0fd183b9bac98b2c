//! `--precision`: a run keeps it.
#![allow(clippy::unwrap_used)]

mod program;

use program::{Dir, bad, good, resume, train};

#[test]
fn a_run_keeps_its_precision() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    let said = good(&mut train(&data, &out, "--steps 2 --precision bf16 --verify"));
    assert!(said.err.contains("cpu-bf16"), "the program says how it multiplies: {}", said.err);
    bad(&mut resume(&out, "--precision f32"), &["--precision is f32, the run has bf16"]);
    good(&mut resume(&out, ""));
    bad(&mut train(&data, &dir.at("a"), "--precision tf32"), &["tf32", "--backend cuda"]);
    bad(&mut train(&data, &dir.at("b"), "--precision bf16 --backend reference"), &["--precision"]);
    bad(&mut train(&data, &dir.at("c"), "--device 1"), &["--device", "--backend cuda"]);
}
