//! Runs of a program in its tests.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Runs a program with arguments that are separated by spaces; its directory is `out`.
///
/// # Panics
/// Where it cannot be started.
pub fn run(program: &str, out: &Path, arguments: &str) -> Output {
    let to = if arguments.contains("experiment") { "--dir" } else { "--out" };
    let mut command = Command::new(program);
    command
        .args(arguments.split_whitespace())
        .arg(to)
        .arg(out)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Standard output of a run that succeeds.
///
/// # Panics
/// Where it does not.
pub fn good(program: &str, out: &Path, arguments: &str) -> String {
    let o = run(program, out, arguments);
    assert!(o.status.success(), "{arguments}\n{}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).unwrap()
}

/// The object in the last line.
///
/// # Panics
/// Where there is none.
pub fn json(text: &str) -> Value {
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

/// `metrics.jsonl` without `clock`, the value that depends on the time.
///
/// # Panics
/// Where the file is not that of a run.
pub fn metrics(dir: &Path, clock: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let line = |l: &str| {
        let mut v: Value = serde_json::from_str(l).unwrap();
        v.as_object_mut().unwrap().remove(clock).unwrap();
        v
    };
    text.lines().map(line).collect()
}

/// Files of two runs are the same in every byte.
///
/// # Panics
/// Where they are not.
pub fn same_files(a: &Path, b: &Path, files: &[&str]) {
    for file in files {
        let [a, b] = [a, b].map(|dir| std::fs::read(dir.join(file)).unwrap());
        assert!(a == b, "{file}");
    }
}

/// Lets a run that has ended go on once more from the checkpoint before its last, after step
/// `last`; `command` resumes a run.
///
/// # Panics
/// Where it does not.
pub fn repeat_the_end(command: &mut Command, run: &Path, last: u64) -> String {
    std::fs::remove_file(run.join(format!("step-{last:08}.ckpt"))).unwrap();
    std::fs::remove_file(run.join("model.safetensors")).unwrap();
    let o = command.arg(run).output().unwrap();
    let told = String::from_utf8(o.stderr).unwrap();
    assert!(o.status.success(), "{told}");
    told
}

/// The launcher of `ranks` ranks, to which the program and its arguments are added: `BDIA_MPIRUN`
/// with its flags, or Open MPI's, which may run as root and on few cores.
///
/// # Panics
/// Where `BDIA_MPIRUN` is empty.
pub fn mpirun(ranks: usize) -> Command {
    let line =
        std::env::var("BDIA_MPIRUN").unwrap_or("mpirun --allow-run-as-root --oversubscribe".into());
    let mut words = line.split_whitespace();
    let mut c = Command::new(words.next().unwrap());
    c.args(words).args(["-np", &ranks.to_string()]);
    c
}

/// All numbers of two runs' metrics are the same up to `tolerance`, in parts of the number.
///
/// # Panics
/// Where they are not.
pub fn close(a: &[Value], b: &[Value], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        for (key, x) in a.as_object().unwrap() {
            let (x, y) = (x.as_f64().unwrap(), b[key].as_f64().unwrap());
            assert!((x - y).abs() <= tolerance * x.abs(), "{key}: {a} {b}");
        }
    }
}
