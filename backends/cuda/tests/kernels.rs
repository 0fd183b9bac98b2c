//! Every kernel compiles for every architecture, within the limits of registers and shared memory.
//! No device is needed.
//!
//! NVRTC is, and `ptxas` (its path in `PTXAS`, or on the path), so the tests are ignored unless
//! asked for; `.ci/cuda` installs both.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::process::Command;

use bdia_cuda::compile::{self, Image};

/// Compute capabilities from Turing to Blackwell.
const ALL: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];
/// Shared memory of a block that needs no opting in.
const SHARED: usize = 48 << 10;

/// The numbers in a line of ptxas that stand before `unit`.
fn before(line: &str, unit: &str) -> Option<usize> {
    line.split(unit).next()?.split_whitespace().last()?.parse().ok()
}

#[test]
#[ignore = "needs NVRTC and ptxas: .ci/cuda"]
fn compile_everywhere() {
    let all = compile::listed();
    let supported = compile::supported().map_err(|e| e.to_string()).unwrap();
    let dir = std::env::temp_dir().join(format!("bdia-cuda-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let ptxas = std::env::var("PTXAS").unwrap_or_else(|_| "ptxas".into());
    for arch in ALL {
        assert!(supported.contains(&arch), "NVRTC knows sm_{arch}: {supported:?}");
        let ptx = compile::compile(arch, Image::Ptx).map_err(|e| e.to_string()).unwrap();
        let text = String::from_utf8(ptx).unwrap();
        // Registers that each may have: those of a multiprocessor by the threads that it asks for,
        // of which Turing has no more than 1024.
        let most_threads = if arch == 75 { 1024 } else { 1536 };
        let registers = |k: &compile::Listed| (65536 / k.threads.min(most_threads)).min(255);
        let kernels: BTreeMap<_, _> = all
            .iter()
            .filter(|k| arch >= compile::TENSOR || !k.tensor)
            .map(|k| (k.name.as_str(), registers(k)))
            .collect();
        for k in &all {
            assert_eq!(
                text.contains(&format!(".entry {}(", k.name)),
                kernels.contains_key(k.name.as_str()),
                "{arch} {k:?}"
            );
        }
        // Code is made by ptxas, from which it can be asked what it used; NVRTC has the same
        // assembler inside.
        let (source, object) = (dir.join(format!("{arch}.ptx")), dir.join(format!("{arch}.cubin")));
        std::fs::write(&source, text.trim_end_matches('\0')).unwrap();
        let run = Command::new(&ptxas)
            .args(["-v", &format!("-arch=sm_{arch}"), "-o"])
            .args([&object, &source])
            .output();
        let run = run.unwrap_or_else(|e| panic!("{ptxas}: {e}; PTXAS says where it is"));
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "sm_{arch}: {said}");
        let (mut kernel, mut seen, mut frames, mut most) = (String::new(), 0, 0, (0, 0));
        for line in said.lines() {
            if let Some(rest) = line.split("Compiling entry function '").nth(1) {
                kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            } else if line.contains("spill stores") {
                // Neither spilled registers nor arrays that are indexed at run time: local memory
                // is memory of the device.
                for what in [" bytes stack frame", " bytes spill stores", " bytes spill loads"] {
                    assert_eq!(before(line, what), Some(0), "sm_{arch} {kernel}: {line}");
                }
                frames += 1;
            } else if line.contains("Used ") {
                let (registers, shared) =
                    (before(line, " registers").unwrap(), before(line, " bytes smem").unwrap_or(0));
                assert!(
                    registers <= kernels[kernel.as_str()] && shared <= SHARED,
                    "sm_{arch} {kernel}: {line}"
                );
                (seen, most) = (seen + 1, (most.0.max(registers), most.1.max(shared)));
            }
        }
        assert!(seen == kernels.len() && frames >= seen, "sm_{arch}: {said}");
        println!(
            "sm_{arch}: {seen} kernels, at most {} registers and {} bytes of shared memory",
            most.0, most.1
        );
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// Every file of `kernels/` is in the source that is compiled, and what a file has as kernels is in
/// the list.
#[test]
fn the_source_is_every_file() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let (mut files, mut kernels) = (0, 0);
    for file in std::fs::read_dir(dir).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        assert!(compile::SOURCE.contains(&text));
        (files, kernels) =
            (files + 1, kernels + text.lines().filter(|l| l.starts_with("KERNEL(")).count());
    }
    assert!(files >= 5 && kernels == compile::listed().len(), "{files} files, {kernels} kernels");
}
