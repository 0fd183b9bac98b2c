//! Compiles the kernels to PTX for the oldest supported architecture, which every later one takes:
//! `cargo run -p bdia-cuda --example ptx -- backends/cuda/prebuilt/kernels.ptx`. Needs NVRTC, no
//! device.

use bdia_cuda::compile::{Image, compile};

fn main() -> Result<(), Box<dyn core::error::Error>> {
    let Some(file) = std::env::args_os().nth(1) else { return Err("where to? Name a file".into()) };
    let mut ptx = compile(75, Image::Ptx)?;
    while ptx.last() == Some(&0) {
        ptx.pop();
    }
    if let Some(dir) = std::path::Path::new(&file).parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(&file, ptx)?;
    Ok(())
}
