//! The program on a CUDA device, and what it says where there is none.
//!
//! Ignored unless asked for, because they need a device; `.ci/cuda` runs them on the emulated one.
#![allow(clippy::unwrap_used)]

mod program;

use program::{Dir, bad, good, program, train};

/// The program itself, and what it says of memory: the peak is the plan.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn the_program_trains() {
    let dir = Dir::new();
    let (data, out) = (dir.tokens(), dir.at("run"));
    let flags = "--steps 4 --checkpoint-interval 2 --backend cuda --verify --json";
    let said = good(&mut train(&data, &out, flags));
    let last = said.json();
    assert_eq!(last["verify_mismatches"], 0, "{last}");
    let tight = good(&mut train(
        &data,
        &dir.at("other"),
        "--steps 2 --backend cuda --precision bf16 --dropout 0.1",
    ));
    assert!(tight.err.contains("cuda-bf16"), "{}", tight.err);
}

/// Heads as wide as Gemma 3's, in both precisions.
#[test]
#[ignore = "needs a CUDA device, or the emulated one of .ci/cuda"]
fn wide_heads() {
    let dir = Dir::new();
    let data = dir.tokens();
    let shape = "--config llama-mini --vocab 64 --layers 2 --heads 2 --width 512 --context 16";
    let loss = |backend: &str| {
        let mut c = program();
        c.arg("train").args(shape.split(' ')).args("--batch 2 --steps 2 --sample 0".split(' '));
        c.args("--dropout 0.1 --verify --json".split(' ')).args(backend.split(' '));
        c.arg("--data").arg(&data).arg("--out").arg(dir.at(&backend.replace(' ', "")));
        let last = good(&mut c).json();
        assert_eq!(last["verify_mismatches"], 0, "{last}");
        last["loss"].as_f64().unwrap()
    };
    let expected = loss("--backend cpu --threads 1");
    for (precision, tolerance) in [("f32", 1e-4), ("bf16", 1e-2)] {
        let found = loss(&format!("--backend cuda --precision {precision}"));
        assert!(
            (found - expected).abs() < tolerance * expected,
            "{precision}: {found}, {expected}"
        );
    }
}

/// Without a driver, or without that device, the program says so and ends with 1.
#[test]
fn a_missing_device_is_named() {
    let dir = Dir::new();
    let said = bad(
        &mut train(&dir.tokens(), &dir.at("run"), "--steps 1 --backend cuda --device 1000"),
        &[],
    );
    let missing = said.err.contains("is not on this machine: looked for lib");
    let absent = said.err.contains("device 1000 was asked for");
    assert!(missing || absent, "{}", said.err);
    let run = dir.at("run");
    bad(
        &mut train(&dir.tokens(), &run, "--steps 1 --precision tf32"),
        &["--precision tf32", "--backend cuda"],
    );
}

/// A directory of the dynamic loader with some libraries of the emulated device, and no others.
fn libraries(dir: &Dir, names: &[&str]) -> std::path::PathBuf {
    let path = std::env::var("LD_LIBRARY_PATH").unwrap();
    let chosen = dir.at("lib");
    std::fs::create_dir_all(&chosen).unwrap();
    for name in names {
        let found =
            path.split(':').map(|p| std::path::Path::new(p).join(name)).find(|p| p.exists());
        std::os::unix::fs::symlink(found.unwrap(), chosen.join(name)).unwrap();
    }
    chosen
}

/// Which library is missing, and where it was looked for.
#[test]
#[ignore = "needs the emulated device of .ci/cuda"]
fn emulated_missing_libraries_are_named() {
    for (there, missing) in [
        (&[][..], "the CUDA driver (libcuda"),
        (&["libcuda.so"][..], "cuBLASLt (libcublasLt"),
        (&["libcuda.so", "libcublasLt.so"][..], "NVRTC (libnvrtc"),
    ] {
        let dir = Dir::new();
        let lib = libraries(&dir, there);
        let mut command = train(&dir.tokens(), &dir.at("run"), "--steps 1 --backend cuda");
        let said = bad(command.env("LD_LIBRARY_PATH", &lib).env_remove("BDIA_CUDA_CACHE"), &[]);
        for part in [
            missing,
            "looked for lib",
            &format!("in LD_LIBRARY_PATH ({})", lib.display()),
            "--backend cpu",
        ] {
            assert!(said.err.contains(part), "{part}: {}", said.err);
        }
    }
}

/// A device with little memory: the plan stands beside what is free; a device that is not there:
/// how many are.
#[test]
#[ignore = "needs the emulated device of .ci/cuda"]
fn emulated_limits_are_told() {
    let dir = Dir::new();
    let (data, out) = (dir.tokens(), dir.at("run"));
    let mut command = train(&data, &out, "--steps 1 --backend cuda");
    let said = bad(command.env("BDIA_EMULATED_MEMORY", "20000000"), &[]);
    assert!(
        said.err.contains("the plan needs ") && said.err.contains("has 20000000 free of 20000000"),
        "{}",
        said.err
    );
    let said = bad(&mut train(&data, &out, "--steps 1 --backend cuda --device 7"), &[]);
    assert!(
        said.err.contains("device 7 was asked for, the driver finds 1: numbers 0 to 0"),
        "{}",
        said.err
    );
}
