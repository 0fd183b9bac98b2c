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
fn pairs() {
    all("pairs", targets::pairs);
}

#[test]
fn configs() {
    all("translation_config", targets::translation_config);
}
