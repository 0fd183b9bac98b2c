//! Data sets and linker script. The UCI digits come with a crate; nothing is downloaded.
//!
//! The digits are split into three parts. The network is pretrained on the first; the other two are
//! seen through a new sensor (the shift of domain): one to fine-tune with, one to test. A sample is
//! 64 pixels from 0 to 16 and a label.

use std::{env, fs, path::PathBuf};

const PRETRAIN: usize = 1200;
const TUNE: usize = 320;
const SIDE: usize = 8;

/// The new sensor: its picture is a negative, and it is mounted one pixel off.
fn new_sensor(image: &[u8; SIDE * SIDE]) -> [u8; SIDE * SIDE] {
    let at =
        |row: usize, col: usize| if row < SIDE && col < SIDE { image[row * SIDE + col] } else { 0 };
    core::array::from_fn(|i| {
        let (row, col) = (i / SIDE, (i % SIDE).wrapping_sub(1));
        16 - at(row, col)
    })
}

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let digits = smartcore::dataset::digits::load_dataset();
    assert_eq!(digits.data.len(), digits.num_samples * SIDE * SIDE, "the digits are 8x8");
    let mut parts = [Vec::new(), Vec::new(), Vec::new()];
    for i in 0..digits.num_samples {
        // 577 and 1797 have no common divisor: every sample once, in mixed order.
        let from = i * 577 % digits.num_samples;
        let pixels = &digits.data[from * SIDE * SIDE..(from + 1) * SIDE * SIDE];
        let mut image = [0; SIDE * SIDE];
        for (to, &pixel) in image.iter_mut().zip(pixels) {
            *to = pixel as u8;
        }
        let part = usize::from(i >= PRETRAIN) + usize::from(i >= PRETRAIN + TUNE);
        parts[part].extend(if part == 0 { image } else { new_sensor(&image) });
        parts[part].push(digits.target[from] as u8);
    }
    for (name, part) in ["pretrain", "tune", "test"].iter().zip(parts) {
        fs::write(out.join(name), part).expect("OUT_DIR can be written");
    }

    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=memory.x");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        fs::copy("memory.x", out.join("memory.x")).expect("memory.x can be copied to OUT_DIR");
        println!("cargo::rustc-link-search={}", out.display());
        println!("cargo::rustc-link-arg-bins=-Tlink.x");
    }
}
