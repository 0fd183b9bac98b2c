//! Interrupted runs of the program end with the same bits as uninterrupted ones.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod program;

use core::time::Duration;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use program::{
    Dir, bad, checkpoints, content, copy, good, metrics, resume, run, signal, spawn, train,
    wait_for,
};

const FLAGS: &str = "--steps 60 --checkpoint-interval 7";

/// A small generator for moments.
struct Moments(u64);

impl Moments {
    fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn lines(dir: &Path) -> usize {
    std::fs::read(dir.join("metrics.jsonl"))
        .map_or(0, |b| b.iter().filter(|&&b| b == b'\n').count())
}

/// Trains with `kills` kills at random moments, each time going on where possible, and then to the
/// end; gives the number of processes that a kill ended.
fn train_killed(data: &Path, out: &Path, flags: &str, kills: u32, seed: u64) -> u32 {
    let mut moments = Moments(seed);
    let mut killed = 0;
    for i in 0..200 {
        let repeated = program::with_small(flags).join(" ");
        let mut command = match (out.join("run.json").exists(), i % 2) {
            // It was killed before it had written anything.
            (false, _) => train(data, out, flags),
            (_, 0) => resume(out, ""),
            _ => {
                let mut c = resume(out, &repeated);
                c.arg("--data").arg(data);
                c
            }
        };
        let mut child = spawn(&mut command);
        if killed < kills {
            match moments.below(5) {
                // Anywhere, the start of the program too.
                0 => std::thread::sleep(Duration::from_micros(moments.below(60_000))),
                // While a checkpoint is written.
                1 | 2 => {
                    let after = lines(out) + moments.below(5) as usize;
                    wait_for(&mut child, || {
                        lines(out) >= after
                            && content_names(out).iter().any(|n| n.starts_with(".step-"))
                    });
                }
                // After some steps.
                _ => {
                    let after = checkpointed(out) + 1 + moments.below(8) as usize;
                    wait_for(&mut child, || lines(out) >= after);
                    std::thread::sleep(Duration::from_micros(moments.below(3_000)));
                }
            }
            child.kill().unwrap();
        }
        let ended = child.wait_with_output().unwrap();
        if ended.status.signal() == Some(9) {
            killed += 1;
            continue;
        }
        let said = program::Said::from(ended);
        assert_eq!(said.code, Some(0), "{}", said.err);
        return killed;
    }
    panic!("the run did not end");
}

fn content_names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .collect()
}

fn checkpointed(dir: &Path) -> usize {
    let names = checkpoints(dir);
    names.last().map_or(0, |n| n["step-".len()..n.len() - ".ckpt".len()].parse().unwrap())
}

/// The same parameters, optimizer state, losses and validation losses, bit for bit.
fn same(a: &Path, b: &Path, steps: usize) {
    let last = format!("step-{steps:08}.ckpt");
    let names = [last.as_str(), "model.safetensors", "best.safetensors", "config.json", "loss.svg"];
    for name in names {
        let (a, b) = (std::fs::read(a.join(name)).unwrap(), std::fs::read(b.join(name)).unwrap());
        assert!(a == b, "{name} differs");
    }
    let (a, b_metrics) = (metrics(a), metrics(b));
    assert_eq!(a, b_metrics);
    assert_eq!(a.len(), steps);
    assert!(a.iter().zip(1..).all(|(m, step)| m["step"] == step));
    assert!(a.iter().any(|m| m.get("val_loss").is_some()));
    let left: Vec<_> = content(b).into_keys().filter(|n| n.ends_with(".tmp")).collect();
    assert!(left.is_empty(), "left over: {left:?}");
    assert!(checkpoints(b).len() <= 2);
}

/// A whole run, and a copy of it without its last checkpoint.
fn cut_short(dir: &Dir) -> (PathBuf, PathBuf) {
    let (whole, out) = (dir.at("whole"), dir.at("out"));
    good(&mut train(&dir.tokens(), &whole, FLAGS));
    copy(&whole, &out);
    std::fs::remove_file(out.join("step-00000060.ckpt")).unwrap();
    (whole, out)
}

#[test]
fn killed_at_any_moment() {
    let dir = Dir::new();
    let data = dir.tokens();
    let whole = dir.at("whole");
    good(&mut train(&data, &whole, FLAGS));
    let mut killed = 0;
    for seed in 0..3 {
        let out = dir.at(&format!("killed-{seed}"));
        killed += train_killed(&data, &out, FLAGS, 4, seed);
        same(&whole, &out, 60);
    }
    // A checkpoint is written most of the time.
    let every = FLAGS.replace("interval 7", "interval 1");
    let whole = dir.at("whole-1");
    good(&mut train(&data, &whole, &every));
    for seed in 3..5 {
        let out = dir.at(&format!("killed-{seed}"));
        killed += train_killed(&data, &out, &every, 8, seed);
        same(&whole, &out, 60);
    }
    assert!(killed >= 12, "only {killed} kills met a running process");
}

#[test]
fn killed_in_every_mode() {
    let dir = Dir::new();
    let data = dir.tokens();
    for (i, flags) in [
        "--dropout 0.1",
        "--mode standard",
        "--mode standard --quantize --order sequential",
        "--mode checkpoint --dropout 0.1",
        "--mode bdia-float --gamma 0.3",
        "--accumulate 2 --clip 1",
        "--optimizer set-adam --gamma 0.25 --schedule linear",
        // Some tensors have the 4,096 values from which on moments are codes.
        "--optimizer adamw8bit --width 32",
        "--optimizer adafactor",
    ]
    .into_iter()
    .enumerate()
    {
        let flags = format!("--steps 30 --checkpoint-interval 4 {flags}");
        let (whole, out) = (dir.at(&format!("whole-{i}")), dir.at(&format!("killed-{i}")));
        good(&mut train(&data, &whole, &flags));
        train_killed(&data, &out, &flags, 3, 100 + i as u64);
        same(&whole, &out, 30);
    }
}

#[test]
fn other_threads_and_checkpoint_interval_change_no_bit() {
    let dir = Dir::new();
    let (whole, out) = cut_short(&dir);
    // What a kill in the middle of a write leaves behind.
    std::fs::write(out.join(".step-00000057.ckpt.1a2b3c.tmp"), b"BDIACKPT").unwrap();
    good(&mut resume(&out, "--threads 1 --checkpoint-interval 3 --verify"));
    same(&whole, &out, 60);
}

#[test]
fn contradicting_flags_are_named_and_nothing_changes() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    good(&mut train(&data, &out, FLAGS));
    let before = content(&out);
    let said = bad(
        &mut resume(&out, "--lr 0.5 --steps 59 --batch 4"),
        &["--lr is 0.5", "--steps is 59", "has 60"],
    );
    assert!(!said.err.contains("--batch"));
    let other = dir.file("other.bin", &[1, 0].repeat(3000));
    bad(resume(&out, "").arg("--data").arg(&other), &["step-00000060.ckpt", "the data"]);
    assert!(before == content(&out));

    // The same name, other tokens.
    std::fs::write(&data, [1, 0].repeat(4000)).unwrap();
    bad(&mut resume(&out, ""), &["step-00000060.ckpt", "the data"]);
    assert!(before == content(&out));
}

#[test]
fn a_finished_run_resumed_changes_nothing() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    let first = good(train(&data, &out, FLAGS).arg("--json")).json();
    let before = content(&out);
    let again = good(&mut resume(&out, "--json")).json();
    assert!(before == content(&out));
    assert_eq!((&first["loss"], &first["val_loss"]), (&again["loss"], &again["val_loss"]));
}

#[test]
fn interrupted_by_ctrl_c() {
    let dir = Dir::new();
    let data = dir.tokens();
    let flags = "--steps 250 --checkpoint-interval 100";
    let (whole, out) = (dir.at("whole"), dir.at("out"));
    good(&mut train(&data, &whole, flags));
    let mut child = spawn(&mut train(&data, &out, flags));
    wait_for(&mut child, || lines(&out) >= 3);
    signal(&child, "INT");
    let said = program::Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.code, Some(3), "{}", said.err);
    let done = checkpointed(&out);
    assert!((3..250).contains(&done));
    assert_eq!(lines(&out), done);
    let sentence = format!(
        "stopped after step {done} of 250; to go on:  bdia-lm train --resume {}",
        out.display()
    );
    assert!(said.err.contains(&sentence), "{}", said.err);
    // What was stopped can be used as it is.
    good(
        program::program()
            .args(["eval", "--context", "16", "--weights"])
            .arg(&out)
            .arg("--data")
            .arg(&data),
    );
    good(&mut resume(&out, ""));
    same(&whole, &out, 250);
}

#[test]
fn damaged_checkpoints() {
    let dir = Dir::new();
    let data = dir.tokens();
    let whole = dir.at("whole");
    good(&mut train(&data, &whole, FLAGS));
    let (older, newest) = ("step-00000056.ckpt", "step-00000060.ckpt");
    let bytes = std::fs::read(whole.join(newest)).unwrap();
    let flipped = |at: usize| {
        let mut b = bytes.clone();
        b[at] ^= 1;
        b
    };
    for (i, damaged) in [
        flipped(0),
        flipped(9),
        flipped(13),
        flipped(40),
        flipped(bytes.len() / 2),
        flipped(bytes.len() - 1),
        bytes[..bytes.len() - 100].to_vec(),
        bytes[..12].to_vec(),
        Vec::new(),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.at(&format!("damaged-{i}"));
        copy(&whole, &out);
        std::fs::write(out.join(newest), damaged).unwrap();
        let said = good(&mut resume(&out, ""));
        let warned = said.err.lines().any(|l| l.starts_with("warning: ") && l.contains(newest));
        assert!(warned && said.err.contains("goes on after step 56"), "{i}: {}", said.err);
        same(&whole, &out, 60);
    }
    let out = dir.at("both");
    copy(&whole, &out);
    std::fs::write(out.join(newest), flipped(5000)).unwrap();
    std::fs::write(out.join(older), b"BDIACKPT").unwrap();
    let before = content(&out);
    bad(&mut resume(&out, ""), &["no usable checkpoint", newest, older]);
    assert!(before == content(&out));
}

/// Two good checkpoints are kept, whatever else is there.
#[test]
fn a_damaged_checkpoint_does_not_push_out_a_good_one() {
    let dir = Dir::new();
    let (whole, out) = cut_short(&dir);
    std::fs::write(out.join("step-00000099.ckpt"), b"BDIACKPT").unwrap();
    let said = good(&mut resume(&out, "--checkpoint-interval 1"));
    assert!(said.err.contains("step-00000099.ckpt"));
    assert_eq!(checkpoints(&out), ["step-00000059.ckpt", "step-00000060.ckpt"]);
    same(&whole, &out, 60);
}

/// A file as the program writes it, with another header.
fn with_header(bytes: &[u8], change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let n = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[16..16 + n]).unwrap();
    change(&mut header);
    let json = serde_json::to_vec(&header).unwrap();
    let mut all = bytes[..12].to_vec();
    all.extend((json.len() as u32).to_le_bytes());
    all.extend(json);
    all.extend(&bytes[16 + n..bytes.len() - 8]);
    let digest = xxhash_rust::xxh3::xxh3_64(&all);
    all.extend(digest.to_le_bytes());
    all
}

#[test]
fn other_headers() {
    let dir = Dir::new();
    let (whole, out) = cut_short(&dir);
    let path = out.join("step-00000056.ckpt");
    let bytes = std::fs::read(&path).unwrap();

    // Another build: it goes on, and here the bits are the same still.
    std::fs::write(&path, with_header(&bytes, |h| h["identity"] = "another build".into())).unwrap();
    let said = good(&mut resume(&out, ""));
    assert!(
        said.err.contains("warning: the run was computed by \"another build\""),
        "{}",
        said.err
    );
    same(&whole, &out, 60);

    // Headers that no run has written.
    std::fs::remove_file(out.join("step-00000060.ckpt")).unwrap();
    for change in [
        (|h| h["step"] = 61.into()) as fn(&mut serde_json::Value),
        |h| h["chunk"] = 0.into(),
        |h| h["chunk"] = 1_000_000_000_000_u64.into(),
        |h| h["head_rows"] = 0.into(),
        |h| h["head_rows"] = u64::MAX.into(),
        |h| h["lens"] = serde_json::json!([33_610]),
        |h| h["lens"] = serde_json::json!([u64::MAX, 1]),
        |h| h["data"] = 1.into(),
        |h| h["metrics"] = 1.into(),
        |h| h["settings"]["lr"] = 0.5.into(),
        |h| h["config"]["n_head"] = 4.into(),
        |h| h["waiting"] = "a step".into(),
    ] {
        std::fs::write(&path, with_header(&bytes, change)).unwrap();
        let before = content(&out);
        bad(&mut resume(&out, ""), &[]);
        assert!(before == content(&out));
    }
}

/// The limit on a file's size stands for a disk that is full.
#[test]
fn a_checkpoint_that_cannot_be_written_leaves_the_last_one() {
    let dir = Dir::new();
    let (whole, out) = cut_short(&dir);
    let inner = resume(&out, "--checkpoint-interval 1");
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "sh"])
        .arg(inner.get_program())
        .args(inner.get_args());
    bad(&mut limited, &["step-00000057.ckpt", "cannot write it"]);
    assert_eq!(checkpoints(&out), ["step-00000056.ckpt"]);
    good(&mut resume(&out, ""));
    same(&whole, &out, 60);
}

/// Whoever asks for it, this workspace or a library.
#[cfg(target_os = "linux")]
#[test]
fn memory_that_the_system_refuses_is_told_in_words() {
    let dir = Dir::new();
    let data = dir.tokens();
    let (mut done, mut told) = (0, 0);
    // From less than the program's own pages to more than it asks for.
    for mib in (20..180).step_by(4) {
        let inner = train(&data, &dir.at(&format!("run-{mib}")), "--steps 1 --eval-interval 0");
        let limit = format!("ulimit -v {}; exec \"$@\"", mib << 10);
        let mut limited = Command::new("sh");
        limited.args(["-c", &limit, "sh"]).arg(inner.get_program()).args(inner.get_args());
        let ended = limited.output().unwrap();
        let err = String::from_utf8_lossy(&ended.stderr);
        match ended.status.code() {
            Some(0) => done += 1,
            Some(1) if err.contains("error: ") => told += 1,
            // The loader or the system, before any of the program ran.
            Some(127) => {}
            None if err.is_empty() && ended.status.signal() == Some(11) && mib < 32 => {}
            // The C library ends a process whose new thread has no memory for its thread-local
            // values, without asking anybody.
            None if err.contains("Fatal glibc error") => {}
            other => panic!("{mib} MiB: {other:?} {:?} {err}", ended.status),
        }
    }
    assert!(done > 0 && told > 0, "{done} done, {told} told");
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    struct Mount(PathBuf);
    impl Mount {
        fn size(&self, size: &str, remount: bool) -> bool {
            let options = format!("size={size}{}", if remount { ",remount" } else { "" });
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
                .arg(&self.0)
                .output()
                .is_ok_and(|o| o.status.success())
        }
    }
    impl Drop for Mount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).output();
        }
    }
    let dir = Dir::new();
    let data = dir.tokens();
    let (whole, disk) = (dir.at("whole"), dir.at("disk"));
    std::fs::create_dir(&disk).unwrap();
    let mount = Mount(disk.clone());
    if !mount.size("200k", false) {
        eprintln!("skipped: a full disk needs the right to mount a tmpfs");
        return;
    }
    let flags = "--steps 400 --checkpoint-interval 7";
    good(&mut train(&data, &whole, flags));
    let out = disk.join("run");
    // Known beforehand.
    bad(&mut train(&data, &out, flags), &["the run needs", "are free", "--keep-checkpoints"]);
    assert!(mount.size("8m", true));
    // Somebody else takes what is left while the run is on.
    let mut child = spawn(&mut resume(&out, ""));
    wait_for(&mut child, || checkpointed(&out) > 0);
    signal(&child, "STOP");
    assert!(std::fs::write(disk.join("filler"), vec![1; 16 << 20]).is_err());
    signal(&child, "CONT");
    let said = program::Said::from(child.wait_with_output().unwrap());
    assert!(said.code == Some(1) && said.err.contains("No space left"), "{}", said.err);
    assert!(checkpointed(&out) > 0);
    std::fs::remove_file(disk.join("filler")).unwrap();
    good(&mut resume(&out, ""));
    same(&whole, &out, 400);
}

/// A terminal that goes away does not end a run.
#[test]
fn nobody_listens() {
    let dir = Dir::new();
    let data = dir.tokens();
    let (whole, out) = (dir.at("whole"), dir.at("out"));
    good(&mut train(&data, &whole, FLAGS));
    let mut child = spawn(train(&data, &out, FLAGS).arg("--json"));
    drop((child.stdout.take(), child.stderr.take()));
    // What was to be told has not been told.
    assert_eq!(child.wait().unwrap().code(), Some(1));
    same(&whole, &out, 60);
}

#[test]
fn a_directory_without_a_run() {
    let dir = Dir::new();
    let empty = dir.at("empty");
    std::fs::create_dir(&empty).unwrap();
    bad(&mut resume(&empty, ""), &["run.json"]);
    bad(&mut resume(&dir.at("missing"), ""), &["run.json"]);
    std::fs::write(empty.join("run.json"), b"{").unwrap();
    bad(&mut resume(&empty, ""), &["run.json", "not the flags of a run"]);
    assert_ne!(run(&mut resume(&empty, "--out elsewhere")).code, Some(0));
}
