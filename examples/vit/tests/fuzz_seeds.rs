//! The fuzz targets' functions over the committed seeds and mutations of them.
//! `examples/fuzz/README.md` says how to search further.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::Path;

use bdia_train::mutations;

fn all(name: &str, target: fn(&[u8])) {
    mutations::all(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name), target);
}

#[test]
fn idx() {
    all("idx", targets::idx);
}

#[test]
fn cifar() {
    all("cifar", targets::cifar);
}

#[test]
fn picture() {
    all("picture", targets::picture);
}

#[test]
fn config() {
    all("config", targets::config);
}
