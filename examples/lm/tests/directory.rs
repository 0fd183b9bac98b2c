//! Who may write into the directory of a run, what is bound to it, and how a run ends.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod program;

use std::path::Path;
use std::process::{Command, Stdio};

use program::{
    Dir, Said, bad, checkpoints, content, copy, good, metrics, model, program, resume, signal,
    spawn, tokens_below, train, tune, wait_for,
};
use serde_json::{Value, json};

fn length(dir: &Path) -> u64 {
    dir.join("metrics.jsonl").metadata().map_or(0, |m| m.len())
}

fn eval(dir: &Path, data: &Path) -> Value {
    let mut c = program();
    c.args(["eval", "--context", "16", "--json", "--weights"]).arg(dir).arg("--data").arg(data);
    good(&mut c).json()
}

#[test]
fn nothing_is_replaced_unasked() {
    let dir = Dir::new();
    let data = dir.tokens();
    let [run, model_dir, foreign] = ["run", "model", "foreign"].map(|name| dir.at(name));
    good(&mut train(&data, &run, "--steps 6"));
    copy(&model("hf_tied"), &model_dir);
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.tex"), "all of it").unwrap();

    for (out, words) in [
        (&run, &["a run", "--resume", "--replace"][..]),
        (&model_dir, &["a model", "--replace"]),
        (&foreign, &["thesis.tex", "--out"]),
    ] {
        let before = content(out);
        bad(&mut train(&data, out, "--steps 2"), words);
        assert!(before == content(out));
    }
    let before = content(&foreign);
    bad(&mut train(&data, &foreign, "--steps 2 --replace"), &["thesis.tex"]);
    assert!(before == content(&foreign));

    // A model that is its own start.
    let tokens = tokens_below(&dir, 61);
    let before = content(&model_dir);
    bad(&mut tune(&tokens, &model_dir, &model_dir), &["a model", "--replace"]);
    assert!(before == content(&model_dir));
    good(tune(&tokens, &model_dir, &model_dir).arg("--replace"));
    assert!(before["model.safetensors"] != content(&model_dir)["model.safetensors"]);
    assert!(model_dir.join("run.json").exists());

    // A run that fails before it has something to show leaves the old one.
    let before = content(&run);
    let flags = "--steps 20 --warmup 0 --schedule constant --lr 1e6 --replace";
    bad(&mut train(&data, &run, flags), &["step"]);
    assert!(before == content(&run));
    let beside = std::fs::read_dir(dir.at("")).unwrap().flatten();
    assert!(beside.into_iter().all(|e| !e.file_name().to_string_lossy().contains(".new-")));
    good(&mut train(&data, &run, "--steps 4 --replace"));
    assert_eq!(checkpoints(&run), ["step-00000004.ckpt"]);
    assert_eq!(metrics(&run).len(), 4);
}

#[test]
fn the_same_command_twice() {
    let dir = Dir::new();
    let data = dir.tokens();
    let at = |command: &str| {
        let mut c = program();
        c.current_dir(dir.at("")).args(command.split_whitespace());
        c
    };
    for n in ["runs/lm", "runs/lm-2", "runs/lm-3"] {
        let flags = format!("train {} --steps 2 --json --data", program::SMALL);
        let said = good(at(&flags).arg(&data)).json();
        assert_eq!(said["out"], n);
        assert!(dir.at(n).join("model.safetensors").exists());
    }
    std::fs::remove_file(dir.at("runs/lm/model.safetensors")).unwrap();
    // The last one is what the other commands mean.
    good(at("eval --context 16 --data").arg(&data));
}

#[test]
fn two_processes_want_the_same_directory() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    let mut child = spawn(&mut train(&data, &out, "--steps 100000 --checkpoint-interval 50"));
    wait_for(&mut child, || !checkpoints(&out).is_empty());
    bad(&mut resume(&out, ""), &["another process"]);
    bad(&mut train(&data, &out, "--steps 2 --replace"), &["another process"]);
    signal(&child, "TERM");
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.code, Some(3), "{}", said.err);
}

/// Files that were changed by hand, or come from another run, are refused by name.
#[test]
fn a_checkpoint_belongs_to_its_run() {
    let dir = Dir::new();
    let data = dir.tokens();
    let (run, other) = (dir.at("run"), dir.at("other"));
    good(&mut train(&data, &run, "--steps 10 --checkpoint-interval 5"));
    good(&mut train(&data, &other, "--steps 10 --checkpoint-interval 5 --seed 2 --heads 4"));
    std::fs::remove_file(run.join("step-00000010.ckpt")).unwrap();
    for (file, key, value) in [
        ("run.json", "seed", json!(7)),
        ("run.json", "lr", json!(0.25)),
        ("run.json", "gamma", json!(0.25)),
        ("run.json", "batch", json!(2)),
        ("config.json", "n_head", json!(1)),
        ("config.json", "layer_norm_epsilon", json!(1e-3)),
    ] {
        let broken = dir.at("broken");
        copy(&run, &broken);
        let mut all: Value =
            serde_json::from_slice(&std::fs::read(broken.join(file)).unwrap()).unwrap();
        assert!(all.get(key).is_some(), "{key}");
        all[key] = value;
        std::fs::write(broken.join(file), all.to_string()).unwrap();
        let before = content(&broken);
        bad(&mut resume(&broken, ""), &[key, file, "step-00000005.ckpt"]);
        assert!(before == content(&broken));
        if file == "config.json" {
            let mut c = program();
            c.args(["eval", "--context", "16", "--weights"]).arg(&broken);
            bad(c.arg("--data").arg(&data), &["model.safetensors", key]);
        }
    }
    for (file, word) in [
        ("run.json", "seed"),
        ("config.json", "n_head"),
        ("metrics.jsonl", "metrics.jsonl"),
        ("step-00000005.ckpt", "seed"),
    ] {
        let mixed = dir.at("mixed");
        copy(&run, &mixed);
        std::fs::copy(other.join(file), mixed.join(file)).unwrap();
        bad(&mut resume(&mixed, ""), &[word]);
    }
    let mixed = dir.at("mixed-model");
    copy(&run, &mixed);
    std::fs::copy(other.join("model.safetensors"), mixed.join("model.safetensors")).unwrap();
    let mut c = program();
    c.args(["eval", "--context", "16", "--weights"]).arg(&mixed).arg("--data").arg(&data);
    bad(&mut c, &["n_head", "4"]);

    // Another version's.
    let old = dir.at("old");
    copy(&run, &old);
    let path = old.join("step-00000005.ckpt");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8] = 1;
    std::fs::write(&path, bytes).unwrap();
    bad(&mut resume(&old, ""), &["format 1", "format 2", "0.1.0"]);
}

#[test]
fn data_may_move_and_runs_may_become_longer() {
    let dir = Dir::new();
    let data = dir.tokens();
    let (short, long) = (dir.at("short"), dir.at("long"));
    let flags = "--checkpoint-interval 10 --schedule constant --warmup 0";
    good(&mut train(&data, &long, &format!("{flags} --steps 40")));
    good(&mut train(&data, &short, &format!("{flags} --steps 20")));
    let moved = dir.at("moved.bin");
    std::fs::rename(&data, &moved).unwrap();
    bad(&mut resume(&short, "--steps 40"), &["tokens.bin"]);
    good(resume(&short, "--steps 40").arg("--data").arg(&moved));
    let [a, b] = [&short, &long].map(|d| std::fs::read(d.join("model.safetensors")).unwrap());
    assert!(a == b);
    assert_eq!(metrics(&short), metrics(&long));
    // It is a run of 40 steps now, wherever it is.
    bad(&mut resume(&short, "--steps 30"), &["--steps is 30, the run has 40"]);
    good(&mut resume(&short, ""));
}

#[test]
fn passes_over_the_data() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    let done = good(train(&data, &out, "--epochs 0.5").arg("--json")).json();
    // 3,600 training tokens, 16 a sample, 4 samples a step.
    assert_eq!(done["steps"], metrics(&out).len());
    let steps = done["steps"].as_u64().unwrap();
    assert!((28..=32).contains(&steps), "{steps}");
    let longer = good(&mut resume(&out, "--epochs 1 --json")).json();
    assert!(longer["steps"].as_u64().unwrap() >= 2 * steps - 1);
    bad(&mut resume(&out, "--epochs 0.25"), &["--epochs is 0.25"]);
    let other = dir.at("other");
    bad(&mut train(&data, &other, "--epochs 1 --steps 2"), &["cannot be used with"]);
}

#[test]
fn stopping_is_an_outcome() {
    let dir = Dir::new();
    let data = dir.tokens();
    let whole = dir.at("whole");
    // Most of the time is spent in validations.
    let flags = "--steps 200 --checkpoint-interval 0 --eval-interval 1";
    good(&mut train(&data, &whole, flags));
    let mut stops = 0;
    // How many stops meet a process before it is done is the machine's business.
    for n in 0..100 {
        let out = dir.at(&format!("run-{n}"));
        stops += stopped_until_done(&data, &out, flags, stops);
        assert_eq!(metrics(&whole), metrics(&out));
        let last = "step-00000200.ckpt";
        for file in [last, "model.safetensors", "best.safetensors", "loss.svg"] {
            let [a, b] = [&whole, &out].map(|d| std::fs::read(d.join(file)).unwrap());
            assert!(a == b, "{file}");
        }
        if stops > 4 {
            return;
        }
    }
    panic!("only {stops} stops met a running process");
}

/// Trains, stopped and resumed up to five times; gives the number of stops.
fn stopped_until_done(data: &Path, out: &Path, flags: &str, before: u64) -> u64 {
    let mut stops = 0;
    loop {
        let written = length(out);
        let mut child = if out.join("run.json").exists() {
            spawn(&mut resume(out, "--json"))
        } else {
            spawn(train(data, out, flags).arg("--json"))
        };
        if stops < 5 {
            // By its own progress, in bytes of metrics.
            let n = before + stops;
            wait_for(&mut child, || length(out) > written + n * 370 % 2000);
            signal(&child, if n.is_multiple_of(2) { "TERM" } else { "INT" });
        }
        let said = Said::from(child.wait_with_output().unwrap());
        if said.code == Some(0) {
            assert_eq!(said.json()["stopped"], false);
            return stops;
        }
        assert_eq!(said.code, Some(3), "{}", said.err);
        stops += 1;
        let told = said.json();
        assert_eq!((&told["stopped"], &told["val_loss"]), (&json!(true), &Value::Null));
        eval(out, data);
    }
}

#[test]
fn a_signal_saves_and_so_does_time() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    let flags = "--steps 100000 --checkpoint-interval 0 --eval-interval 0";
    let mut child = spawn(&mut train(&data, &out, flags));
    wait_for(&mut child, || out.join("metrics.jsonl").metadata().is_ok_and(|m| m.len() > 1000));
    assert!(checkpoints(&out).is_empty());
    signal(&child, "USR1");
    wait_for(&mut child, || !checkpoints(&out).is_empty());
    assert!(child.try_wait().unwrap().is_none(), "it goes on");
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(3));

    let out = dir.at("timed");
    let flags = "--steps 9 --checkpoint-interval 0 --checkpoint-minutes 1e-9 --keep-checkpoints 4";
    good(&mut train(&data, &out, flags));
    let expected: Vec<_> = (6..=9).map(|n| format!("step-{n:08}.ckpt")).collect();
    assert_eq!(checkpoints(&out), expected);
}

#[test]
fn a_run_that_no_longer_gets_better_ends() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    let flags = "--steps 1000 --eval-interval 5 --lr 0 --min-lr 0 --patience 3";
    let done = good(train(&data, &out, flags).arg("--json")).json();
    // The first evaluation is the best, and three more are as good.
    assert_eq!((&done["steps"], &done["stopped"]), (&json!(20), &json!(false)));
    let before = content(&out);
    good(&mut resume(&out, ""));
    assert!(before == content(&out));
}

/// What cannot be told is told by the exit code; what was to be written is whole.
#[cfg(target_os = "linux")]
#[test]
fn standard_output_that_cannot_be_written() {
    let dir = Dir::new();
    let data = dir.tokens();
    let (whole, out) = (dir.at("whole"), dir.at("run"));
    good(&mut train(&data, &whole, "--steps 6"));
    let full = |c: &mut Command| {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let o = c.stdout(full).stdin(Stdio::null()).stderr(Stdio::piped()).output().unwrap();
        let said = Said::from(o);
        assert_eq!(said.code, Some(1), "{c:?}: {}", said.err);
        assert!(said.err.contains("standard output cannot be written"), "{}", said.err);
    };
    full(&mut train(&data, &out, "--steps 6"));
    for file in ["model.safetensors", "step-00000006.ckpt", "loss.svg"] {
        let [a, b] = [&whole, &out].map(|d| std::fs::read(d.join(file)).unwrap());
        assert!(a == b, "{file}");
    }
    let command = |words: &str, dir: &Path| {
        let mut c = program();
        c.args(words.split_whitespace()).arg("--weights").arg(dir);
        c
    };
    full(command("eval --context 16 --json", &out).arg("--data").arg(&data));
    let (text, writer) = (dir.file("text.txt", &b"All rights reserved. ".repeat(200)), dir.at("w"));
    let mut c = program();
    c.args("train --layers 1 --heads 1 --width 4 --context 8 --steps 1 --sample 0".split(' '));
    good(c.arg("--data").arg(text).arg("--out").arg(&writer));
    full(&mut command("generate --prompt a --tokens 4", &writer));
    let mut plan = program();
    full(plan.args("plan --config mini --json".split(' ')));

    // Somebody who has read enough is no error.
    let mut generate = command("generate --prompt a --tokens 4", &writer);
    let mut child = spawn(&mut generate);
    drop(child.stdout.take());
    let said = Said::from(child.wait_with_output().unwrap());
    assert!(said.code == Some(0) && !said.err.contains("error"), "{}", said.err);
}
