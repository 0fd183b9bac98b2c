//! The program as a user starts it.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

fn run(arguments: &str, out: Option<&Path>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bdia-gpt2"));
    command.args(arguments.split_whitespace());
    if let Some(out) = out {
        command.arg("--out").arg(out);
    }
    command.output().unwrap()
}

const SMALL: &str = "--vocab 300 --layers 2 --heads 2 --width 16 --context 16 --batch 2 \
                     --threads 2 --checkpoint-interval 2 --sample 10 --steps 4 --warmup 1";

#[test]
fn trains_and_writes_a_gpt2() {
    let dir = bdia_models::files::testing::TempDir::new();
    let out = dir.path().join("run");
    let done = run(&format!("{SMALL} --verify --json"), Some(&out));
    let stdout = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    for part in ["bits per byte", "A sample:", "checkpoint 1", "measured peak"] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    let summary = stdout.lines().last().unwrap();
    assert!(summary.contains("\"verify_mismatches\":0,"), "{summary}");
    for file in ["model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "loss.svg"]
    {
        assert!(out.join(file).is_file(), "{file}");
    }
    // The tokens that were said to be learned from and measured on, for other programs.
    let told = String::from_utf8(done.stderr).unwrap();
    let tokens = |name: &str| std::fs::metadata(out.join(name)).unwrap().len() / 2;
    let (train, validation) = (tokens("train.bin"), tokens("validation.bin"));
    let expected = format!("{train} training and {validation} validation tokens");
    assert!(told.contains(&expected), "{expected}: {told}");
}

#[test]
fn a_run_that_goes_on_ends_with_the_same_bits() {
    let dir = bdia_models::files::testing::TempDir::new();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    assert!(run(SMALL, Some(&whole)).status.success());
    assert!(run(SMALL, Some(&parts)).status.success());
    std::fs::remove_file(parts.join("model.safetensors")).unwrap();
    std::fs::remove_file(parts.join("step-00000004.ckpt")).unwrap();
    let resumed = run(&format!("--resume {}", parts.display()), None);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    let model = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(model(&whole) == model(&parts));
}

#[test]
fn what_cannot_be_done_is_explained() {
    for (arguments, message) in [
        ("--vocab 100", "100 pieces"),
        ("--width 30 --heads 4", "width"),
        ("--gamma 0.3", "--gamma"),
        ("--resume /nowhere", "/nowhere"),
    ] {
        let dir = bdia_models::files::testing::TempDir::new();
        let out = dir.path().join("run");
        let done = run(arguments, (!arguments.contains("resume")).then_some(out.as_path()));
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(1), "{arguments}");
        assert!(stderr.contains(message), "{arguments}: {stderr}");
    }
}
