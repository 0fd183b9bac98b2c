//! Compiles `train.c` against the header and the libraries, runs it plainly, under valgrind and
//! under sanitizers.
//!
//! A C compiler is needed. valgrind may be missing on a developer's machine: then that test says so
//! and passes, unless `BDIA_NEED_VALGRIND` is set, as CI does.

#![allow(clippy::unwrap_used, reason = "only tests are built of this")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command; its output if it succeeds.
fn run(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text =
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command:?}\n{text}");
    text
}

/// The folder with the libraries: `cargo test` builds them for itself under names of its own, so
/// they are built here.
fn libraries() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
        run(Command::new(env!("CARGO"))
            .current_dir(root())
            .args(["build", "--release", "--lib", "--target-dir"])
            .arg(target));
        target.join("release")
    })
}

/// Compiles the program into `name`; `link` says with which library.
fn compile(name: &str, flags: &[&str], link: &[&str]) -> PathBuf {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    run(Command::new(cc)
        .current_dir(libraries())
        .args([
            "-std=c11",
            "-O1",
            "-g",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-ffp-contract=off",
        ])
        .args(flags)
        .arg("-I")
        .arg(root().join("include"))
        .arg("-o")
        .arg(&program)
        .arg(root().join("tests/train.c"))
        .args(link)
        .args(["-lpthread", "-ldl", "-lm"]));
    program
}

fn all_good(text: &str) {
    assert!(!text.contains("FAIL"), "{text}");
    let checks = text.lines().filter(|l| l.starts_with("ok  ")).count();
    assert!(checks > 170, "only {checks} checks ran\n{text}");
}

#[test]
fn the_static_library_trains() {
    all_good(&run(&mut Command::new(compile("train-static", &[], &["libbdia.a"]))));
}

#[test]
fn the_dynamic_library_trains() {
    let program = compile("train-dynamic", &[], &["-L.", "-lbdia"]);
    all_good(&run(Command::new(program).env("LD_LIBRARY_PATH", libraries())));
}

/// No memory error, no leak.
#[test]
fn clean_under_valgrind() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        assert!(std::env::var_os("BDIA_NEED_VALGRIND").is_none(), "valgrind is not installed");
        eprintln!("not run: valgrind is not installed");
        return;
    }
    let program = compile("train-valgrind", &[], &["libbdia.a"]);
    let text = run(Command::new("valgrind")
        .args([
            "-q",
            "--error-exitcode=9",
            "--leak-check=full",
            "--show-leak-kinds=definite,indirect",
            "--errors-for-leak-kinds=definite,indirect",
        ])
        .arg(program));
    all_good(&text);
}

/// Of the C side: our arrays are as long as the header says, and nothing is undefined.
#[test]
fn clean_under_sanitizers() {
    let program = compile(
        "train-sanitized",
        &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        &["libbdia.a"],
    );
    // A request for more memory than there is must fail, not end the program.
    all_good(&run(Command::new(program).env("ASAN_OPTIONS", "allocator_may_return_null=1")));
}

/// The header alone, in C99 and in C++.
#[test]
fn the_header_stands_alone() {
    let header = root().join("include/bdia.h");
    for (language, standard) in [("c", "-std=c99"), ("c++", "-std=c++11")] {
        run(Command::new("cc")
            .args([
                "-x",
                language,
                standard,
                "-Wall",
                "-Wextra",
                "-Wpedantic",
                "-Werror",
                "-fsyntax-only",
            ])
            .arg(&header));
    }
}
