//! Runs of the program itself: training, exact resuming, evaluation, translation, the experiment in
//! small.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use bdia_models::files::testing::TempDir;
use bdia_train::testing::{self, json, metrics, repeat_the_end, same_files};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_bdia-translate");

const SMALL: &str = "--pairs 200 --held 40 --vocab 300 --layers 2 --decoder-layers 3 --width 16 \
                     --heads 2 --mlp 24 --longest 48 --batch-tokens 400 --translate 10 --threads 2";

fn command(arguments: &str) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_bdia-translate"));
    c.args(arguments.split_whitespace());
    c
}

fn run(out: &Path, arguments: &str) -> Output {
    testing::run(PROGRAM, out, arguments)
}

fn good(out: &Path, arguments: &str) -> String {
    testing::good(PROGRAM, out, arguments)
}

/// Standard output, standard error and success of `translate` with these lines.
fn translated(dir: &Path, flags: &str, lines: &[u8]) -> (String, String, bool) {
    let mut child = command(&format!("translate {flags}"))
        .arg("--weights")
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines).unwrap();
    let o = child.wait_with_output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
    (text(o.stdout), text(o.stderr), o.status.success())
}

#[test]
fn training_is_exact_and_resumes_exactly() {
    let dir = TempDir::new();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let flags = format!("train {SMALL} --epochs 4 --checkpoint-interval 1");
    let whole = json(&good(&a, &format!("{flags} --verify --json")));
    assert_eq!(whole["verify_mismatches"], 0);
    assert!(
        whole["peak_bytes"].as_u64() <= whole["plan_bytes"].as_u64().map(|p| p + (1 << 16)),
        "{whole}"
    );
    for file in [
        "config.json",
        "model.safetensors",
        "best.safetensors",
        "tokenizer.json",
        "run.json",
        "loss.svg",
        "bleu.svg",
        "held-out.source.txt",
        "held-out.reference.txt",
        "held-out.translation.txt",
    ] {
        assert!(a.join(file).is_file(), "{file}");
    }
    // The last epoch again, from the checkpoint before it.
    good(&b, &flags);
    let steps = whole["steps"].as_u64().unwrap();
    let told = repeat_the_end(&mut command("train --resume"), &b, steps);
    assert!(told.contains(&format!("goes on after step {}", steps / 4 * 3)), "{told}");
    let files =
        ["model.safetensors", "best.safetensors", "tokenizer.json", "held-out.translation.txt"];
    same_files(&a, &b, &files);
    assert_eq!(metrics(&a, "items_per_s"), metrics(&b, "items_per_s"));

    // Another vocabulary of the same size is not the run's.
    let c = dir.path().join("c");
    good(&c, &format!("train {} --epochs 1", SMALL.replace("--pairs 200", "--pairs 150")));
    let own = std::fs::read(b.join("tokenizer.json")).unwrap();
    std::fs::copy(c.join("tokenizer.json"), b.join("tokenizer.json")).unwrap();
    for command in [&mut command("--resume"), &mut command("eval --weights")] {
        let o = command.arg(&b).output().unwrap();
        let told = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(o.status.code() == Some(1) && told.contains("vocabulary"), "{told}");
    }
    std::fs::write(b.join("tokenizer.json"), own).unwrap();

    // Other settings are refused, by name.
    let o = command("--resume").arg(&b).args(["--lr", "0.5"]).output().unwrap();
    assert_eq!(o.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&o.stderr).contains("--lr is 0.5, the run has 0.002"));

    // What was saved is what is evaluated; the grid is fine enough to change little.
    let evaluated = |flags: &str| {
        let o = command(&format!("eval --json {flags} --weights")).arg(&a).output().unwrap();
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        json(&String::from_utf8(o.stdout).unwrap())
    };
    let float = evaluated("");
    for what in ["bleu", "chrf", "exact"] {
        assert_eq!(float[what], whole[what], "{what}");
    }
    let near =
        |a: &Value, b: &Value, by: f64| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < by;
    // Chunks of another size, and rounding to 2^-14.
    assert!(near(&float["loss"], &whole["val_loss"], 1e-5));
    assert!(near(&evaluated("--inference quantized")["loss"], &whole["val_loss"], 1e-2));
    assert!(evaluated("--beams 3")["bleu"].as_f64().is_some());

    answers_before_the_end(&a);
    // Lines, empty ones too, in their order; the search batches them and changes none.
    let sources = std::fs::read_to_string(a.join("held-out.source.txt")).unwrap();
    let expected = std::fs::read_to_string(a.join("held-out.translation.txt")).unwrap();
    let (out, err, ok) = translated(&a, "", sources.as_bytes());
    assert!(ok && out == expected, "{err}");
    let (out, _, ok) = translated(&a, "--beams 2 --inference quantized", b"one\n\ntwo hundred");
    assert!(ok && out.lines().count() == 3 && out.lines().nth(1) == Some(""), "{out:?}");
    let first = out.lines().next().unwrap().to_string() + "\n";
    // Lines that cannot be translated are told, and the others keep their places.
    let flags = "--beams 2 --inference quantized";
    let (out, err, ok) = translated(&a, flags, b"two \xff\none\n");
    assert!(!ok && out == format!("\n{first}"), "{err}");
    assert!(err.contains("line 1: not valid UTF-8") && err.contains("1 of 2 lines"), "{err}");
    let long = "one ".repeat(200);
    let run = "x".repeat(1 << 20);
    let lines = format!("one\n{long}\n{run}\n{run}{run}\n\none\n");
    let (out, err, ok) = translated(&a, flags, lines.as_bytes());
    assert!(!ok && out == format!("{first}\n\n\n\n{first}"), "{err}");
    for part in [
        "line 2: ",
        "line 3: ",
        "expected less than 48",
        "line 4: more than 1048576 bytes",
        "error: 3 of 6 lines",
    ] {
        assert!(err.contains(part), "{err}");
    }
}

/// Adapters of a trained network: all else stays, the result is an ordinary network, and a run goes
/// on exactly.
#[test]
fn adapters_are_trained_on_frozen_weights() {
    let dir = TempDir::new();
    let [base, a, b] = ["base", "a", "b"].map(|name| dir.path().join(name));
    good(&base, &format!("train {SMALL} --epochs 1"));
    let small = SMALL.replace("--vocab 300 ", "");
    let flags = format!(
        "train {small} --epochs 2 --checkpoint-interval 1 --method lora --frozen-dtype f16 \
         --weights {}",
        base.display()
    );
    let whole = json(&good(&a, &format!("{flags} --verify --json")));
    assert_eq!(whole["verify_mismatches"], 0);
    // Five blocks, two adapters of rank 4 each, A and B.
    assert_eq!(whole["trained_parameters"], 5 * 2 * 2 * 4 * 16);
    let float = command("eval --json --weights").arg(&a).output().unwrap();
    let float = json(&String::from_utf8(float.stdout).unwrap());
    let (x, y) = (float["loss"].as_f64().unwrap(), whole["val_loss"].as_f64().unwrap());
    assert!((x - y).abs() < 1e-5 * y, "{x} {y}");
    let read = |dir: &Path| {
        bdia_models::weights::Weights::read_files(vec![dir.join("model.safetensors")]).unwrap()
    };
    let (before, after) = (read(&base), read(&a));
    for (name, tensor) in before.tensors() {
        let mut values = [vec![0.0; tensor.len()], vec![0.0; tensor.len()]];
        before.read(name, &mut values[0]).unwrap();
        after.read(name, &mut values[1]).unwrap();
        let [before, after] = values;
        if name.ends_with("self_attn.in_proj_weight") {
            assert!(before != after, "{name}");
        } else if name.contains("layers.") && tensor.shape.len() == 2 {
            // Stored with 11 significant bits, or to 2^-25 below the smallest normal number.
            let near = |(x, y): (&f32, &f32)| (x - y).abs() <= (x.abs() / 2048.0).max(3e-8);
            assert!(before.iter().zip(&after).all(near), "{name}");
        } else {
            assert!(before == after, "{name}");
        }
    }
    good(&b, &flags);
    let steps = whole["steps"].as_u64().unwrap();
    repeat_the_end(&mut command("train --resume"), &b, steps);
    same_files(&a, &b, &["model.safetensors", "best.safetensors"]);
}

/// Every mode and option trains; storing and recomputing give the same bits, and so do more
/// threads.
#[test]
fn baselines() {
    let dir = TempDir::new();
    let (mut losses, mut plan) = (Vec::new(), 0);
    for (i, flags) in [
        "--mode standard",
        "--mode standard --quantize",
        "--mode checkpoint",
        "--mode checkpoint --checkpoint-every 1",
        "--mode bdia-float --gamma 0.6 --verify",
        "--gamma 0.25 --verify",
        "--embeddings separate --verify",
        "--clip 1 --optimizer set-adam --schedule noam",
        "--accumulate 3 --verify",
        "--steps 5 --verify",
        "--gamma 0.25,3:0.125 --gamma-sign shared --blocks-per-step 2 --verify",
    ]
    .iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let epochs = if flags.starts_with("--steps") { "" } else { "--epochs 1" };
        let v = json(&good(&out, &format!("train {SMALL} {epochs} {flags} --json")));
        assert!(v["val_loss"].as_f64().unwrap().is_finite(), "{flags}");
        assert!(v["verify_mismatches"].is_null() || v["verify_mismatches"] == 0, "{flags}");
        if let Some(e) = v["rebuild_error"].as_f64() {
            assert!(e > 0.0 && e < 1e-2, "{flags}: {e}");
        }
        if flags.starts_with("--steps") {
            assert_eq!((v["steps"].as_u64(), metrics(&out, "items_per_s").len()), (Some(5), 5));
        }
        losses.push(v["val_loss"].as_f64().unwrap().to_bits());
        if i == 5 {
            plan = v["plan_bytes"].as_u64().unwrap();
        }
    }
    // Within less memory the same is added in smaller chunks.
    let budget = plan - 600_000;
    let flags = format!("train {SMALL} --epochs 1 --gamma 0.25 --verify --memory {budget} --json");
    let v = json(&good(&dir.path().join("budget"), &flags));
    assert!(v["plan_bytes"].as_u64().unwrap() <= budget && v["verify_mismatches"] == 0, "{v}");
    assert!((v["val_loss"].as_f64().unwrap() - f64::from_bits(losses[5])).abs() < 1e-3, "{v}");
    assert_eq!([losses[0]; 2], [losses[2], losses[3]]);
    let one = SMALL.replace("--threads 2", "--threads 1");
    let v = json(&good(
        &dir.path().join("one"),
        &format!("train {one} --epochs 1 --mode standard --json"),
    ));
    assert_eq!(v["val_loss"].as_f64().unwrap().to_bits(), losses[0]);
    assert!(dir.path().join("6/tokenizer.target.json").is_file());
    // From a run's weights and vocabulary: it begins where that ended.
    let first = dir.path().join("0");
    let v = json(&good(
        &dir.path().join("more"),
        &format!(
            "train {} --epochs 1 --lr 0 --weight-decay 0 --mode standard --json --weights {}",
            SMALL.replace("--vocab 300", ""),
            first.display()
        ),
    ));
    assert_eq!(v["val_loss"].as_f64().unwrap().to_bits(), losses[0]);
}

/// The encoder's output leaves its stack, a head follows the decoder's.
#[test]
fn the_plan_names_the_choice_for_the_last_step() {
    for (flags, decoder) in [
        ("", "the last step has gamma, and no side bits"),
        ("--gamma-sign shared", "the last step is plain"),
    ] {
        let out = command(&format!("plan {SMALL} {flags}")).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let encoder = "encoder: the output leaves the stack: the last step has gamma, side bits";
        assert!(text.contains(encoder), "{text}");
        assert!(text.contains(&format!("decoder: {decoder}")), "{text}");
    }
    let out = command(&format!("plan {SMALL} --mode standard")).output().unwrap();
    assert!(!String::from_utf8(out.stdout).unwrap().contains("last step"));
}

#[test]
fn the_experiment_in_small() {
    let dir = TempDir::new();
    let flags = format!("{SMALL} --epochs 2 --seeds 2 --grid");
    good(dir.path(), &format!("experiment {flags}"));
    for file in
        ["regularizers.csv", "regularizers-runs.csv", "regularizers.svg", "regularizers-bleu.svg"]
    {
        assert!(dir.path().join(file).is_file(), "{file}");
    }
    let csv = std::fs::read_to_string(dir.path().join("regularizers-runs.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 4 * 2, "{csv}");
    // Nothing is run twice: a second call says the same.
    let o = run(dir.path(), &format!("experiment {flags}"));
    assert!(o.status.success() && !String::from_utf8_lossy(&o.stderr).contains("with seed"));
    assert_eq!(csv, std::fs::read_to_string(dir.path().join("regularizers-runs.csv")).unwrap());
    let o = run(dir.path(), &format!("experiment {flags} --seed 3"));
    assert!(o.status.code() == Some(1) && String::from_utf8_lossy(&o.stderr).contains("--seed"));
    let o = run(dir.path(), &format!("experiment {flags} --lr 0.5"));
    assert_eq!(o.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&o.stderr).contains("other flags"));
}

/// Whoever writes a line gets its translation without closing the pipe.
fn answers_before_the_end(dir: &Path) {
    let mut child = command("translate --weights")
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut to, mut from) =
        (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    for _ in 0..2 {
        to.write_all(b"twenty-one\n").unwrap();
        let mut answer = String::new();
        from.read_line(&mut answer).unwrap();
        assert!(answer.ends_with('\n'));
    }
    drop(to);
    assert!(child.wait().unwrap().success());
}

#[test]
fn files_of_the_user_are_learned_from() {
    let dir = TempDir::new();
    let rows: String =
        (0..120).map(|i| format!("\"I have {i} cats, {}.\",J'ai {i} chats.\n", i % 7)).collect();
    let file = dir.file("pairs.csv", format!("English,French\n{rows}").as_bytes());
    let long = "word ".repeat(80);
    let held =
        dir.file("held.tsv", format!("I have 1 dog.\tJ'ai 1 chien.\n{long}\tmot\n").as_bytes());
    let small = SMALL.replace("--pairs 200 --held 40", "");
    let flags = format!(
        "train {small} --epochs 1 --data {} --held-out {} --json",
        file.display(),
        held.display()
    );
    let o = run(&dir.path().join("run"), &flags);
    let told = String::from_utf8_lossy(&o.stderr).into_owned();
    assert!(o.status.success(), "{told}");
    assert!(told.contains("1 pairs of more than 48 tokens are left out"), "{told}");
    assert!(told.contains("120 pairs to learn from, 1 held out"), "{told}");
    let v = json(&String::from_utf8(o.stdout).unwrap());
    assert!(v["bleu"].as_f64().is_some() && v["best_chrf"].as_f64().is_some(), "{v}");
    let sources = std::fs::read_to_string(dir.path().join("run/held-out.source.txt")).unwrap();
    assert_eq!(sources, "I have 1 dog.\n");
}

/// Columns are part of a run: its own evaluation reads them again.
#[test]
fn columns_of_a_file() {
    let dir = TempDir::new();
    let rows: String =
        (0..120).map(|i| format!("{i}\tI have {i} cats.\tJ'ai {i} chats.\n")).collect();
    let file = dir.file("pairs.tsv", format!("id\tsrc\ttgt\n{rows}121\tno\t\n\n").as_bytes());
    let small = SMALL.replace("--pairs 200 --held 40", "--held 9");
    let flags = format!("train {small} --epochs 1 --data {}", file.display());
    let out = dir.path().join("run");
    let o = run(&out, &flags);
    let told = String::from_utf8_lossy(&o.stderr).into_owned();
    assert!(o.status.code() == Some(1) && told.contains("--columns 2,3"), "{told}");
    let o = run(&out, &format!("{flags} --columns src,tgt"));
    let told = String::from_utf8_lossy(&o.stderr).into_owned();
    assert!(o.status.success(), "{told}");
    for part in [
        "111 pairs to learn from, 9 held out",
        "line 1 is taken for a header: \"id\", \"src\", \"tgt\"",
        "2 line(s) without a source or a target are skipped",
    ] {
        assert!(told.contains(part), "{told}");
    }
    let o = command("eval --weights").arg(&out).output().unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let o = command("eval --columns 2,3 --weights").arg(&out).arg("--data").arg(&file).output();
    assert!(String::from_utf8_lossy(&o.unwrap().stdout).contains("120 sentences"));
}

#[test]
fn mistakes_are_told_with_exit_code_1() {
    let dir = TempDir::new();
    let bad = dir.file("bad.tsv", b"one\tun\ntwo\n");
    for (flags, expected) in [
        ("train --data /nowhere/at/all", "/nowhere/at/all"),
        (&format!("train --data {}", bad.display()), "bad.tsv, line 2"),
        ("train --heads 5", "heads"),
        ("train --memory 1kB", "does not fit"),
        ("train --pairs 50 --held 1 --longest 2 --batch-tokens 50", "use a larger --longest"),
        ("eval --weights /nowhere", "/nowhere"),
    ] {
        let o = if flags.starts_with("eval") {
            command(flags).output().unwrap()
        } else {
            run(&dir.path().join("x"), flags)
        };
        let text = String::from_utf8_lossy(&o.stderr).into_owned();
        assert_eq!(o.status.code(), Some(1), "{flags}: {text}");
        assert!(text.contains(expected) && !text.contains("panicked"), "{flags}: {text}");
    }
}
