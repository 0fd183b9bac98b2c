//! Runs of the program itself, in directories of their own.
#![allow(dead_code, clippy::unwrap_used)]

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use serde_json::Value;

/// A directory that is removed at the end of its test.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("bdia-lm-program-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.at(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// 4000 tokens below 64 with a pattern to learn.
    pub fn tokens(&self) -> PathBuf {
        let mut x = 7_u32;
        let mut next = |i: u32| {
            x = x.wrapping_mul(1_103_515_245).wrapping_add(12_345) & 0x7fff_ffff;
            ((i * 7 + (x >> 16) % 5) % 64) as u16
        };
        self.file("tokens.bin", &(0..4000).flat_map(|i| next(i).to_le_bytes()).collect::<Vec<_>>())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub const SMALL: &str = "--vocab 64 --layers 3 --heads 2 --width 16 --context 16 --batch 4 \
                         --eval-interval 20 --threads 2";

/// The program, with signals as a terminal leaves them: where a shell has started the tests in the
/// background, SIGINT is ignored, and would be in here.
pub fn program() -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_bdia-lm"));
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        let as_usual = || {
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1] {
                // SAFETY: the call is allowed between fork and exec.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
            Ok(())
        };
        // SAFETY: the closure neither allocates nor takes a lock.
        unsafe { c.pre_exec(as_usual) };
    }
    c
}

/// `train` of the small model on the tokens; `flags` are separated by spaces and win.
pub fn train(data: &Path, out: &Path, flags: &str) -> Command {
    let mut c = program();
    c.arg("train").arg("--data").arg(data);
    c.args(with_small(flags)).arg("--out").arg(out);
    c
}

/// The flags of the small model that are not among `flags`, and these.
pub fn with_small(flags: &str) -> Vec<&str> {
    let flags: Vec<_> = flags.split_whitespace().collect();
    let small: Vec<_> = SMALL.split_whitespace().collect();
    let others = small.chunks(2).filter(|pair| !flags.contains(&pair[0])).flatten();
    others.copied().chain(flags.iter().copied()).collect()
}

/// A committed model of `bdia-models`.
pub fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/data/gpt2").join(name)
}

/// 3000 tokens of a small vocabulary, with a pattern to learn.
pub fn tokens_below(dir: &Dir, vocab: u16) -> PathBuf {
    dir.file(
        "tokens.bin",
        &(0..3000_u16).flat_map(|i| (i * 7 % 31 % vocab).to_le_bytes()).collect::<Vec<_>>(),
    )
}

/// `finetune` on tokens, six steps.
pub fn tune(tokens: &Path, weights: &Path, out: &Path) -> Command {
    let mut c = program();
    c.args([
        "finetune",
        "--task",
        "text",
        "--steps",
        "6",
        "--batch",
        "2",
        "--context",
        "15",
        "--threads",
        "1",
    ]);
    c.args(["--eval-interval", "3", "--checkpoint-interval", "2", "--data"]).arg(tokens);
    c.arg("--weights").arg(weights).arg("--out").arg(out);
    c
}

/// `train --resume`, with these flags.
pub fn resume(dir: &Path, flags: &str) -> Command {
    let mut c = program();
    c.args(["train", "--resume"]).arg(dir).args(flags.split_whitespace());
    c
}

pub fn spawn(c: &mut Command) -> Child {
    c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// What an ended program said.
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(o: Output) -> Self {
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        let said = Self { code: o.status.code(), out: text(&o.stdout), err: text(&o.stderr) };
        assert!(!said.err.contains("panicked"), "{}", said.err);
        said
    }
}

impl Said {
    /// The object on the last line.
    pub fn json(&self) -> Value {
        serde_json::from_str(self.out.lines().last().unwrap()).unwrap()
    }
}

pub fn run(c: &mut Command) -> Said {
    c.stdin(Stdio::null()).output().unwrap().into()
}

pub fn good(c: &mut Command) -> Said {
    let said = run(c);
    assert_eq!(said.code, Some(0), "{c:?}\n{}", said.err);
    said
}

/// The run fails as it should: exit code 1 and a last sentence with all of `words`.
pub fn bad(c: &mut Command, words: &[&str]) -> Said {
    let said = run(c);
    assert_eq!(said.code, Some(1), "{c:?}\n{}\n{}", said.out, said.err);
    let at = said.err.find("error: ").unwrap_or_else(|| panic!("{c:?}: no sentence: {}", said.err));
    for word in words {
        assert!(said.err[at..].contains(word), "{c:?}\nexpected {word:?} in: {}", &said.err[at..]);
    }
    said
}

/// Names and contents of a directory's files.
pub fn content(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect()
}

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for (name, bytes) in content(from) {
        std::fs::write(to.join(name), bytes).unwrap();
    }
}

/// `metrics.jsonl` without what depends on the clock.
pub fn metrics(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|l| {
            let mut v: Value = serde_json::from_str(l).unwrap();
            v.as_object_mut().unwrap().remove("items_per_s").unwrap();
            v
        })
        .collect()
}

/// Names of the checkpoints, oldest first.
pub fn checkpoints(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|e| e.file_name().into_string().ok());
    let mut all: Vec<_> = names.filter(|n| n.ends_with(".ckpt")).collect();
    all.sort();
    all
}

/// Waits for something that the run does, or for its end.
pub fn wait_for(child: &mut Child, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() && child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(600), "the run hangs");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Sends a signal by its name.
pub fn signal(child: &Child, name: &str) {
    let kill = format!("kill -{name} {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
}
