//! The program under `mpirun`: 1, 2 and 4 ranks agree, a run goes on with another number of ranks,
//! a rank that dies or hangs ends the others, and ranks that were started differently are refused.
//! Needs feature `mpi` and an MPI.
#![cfg(all(feature = "mpi", target_os = "linux"))]
#![allow(clippy::unwrap_used)]

mod program;

use core::time::Duration;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Instant;

use bdia_train::testing::{close, mpirun};
use program::{Dir, Said, checkpoints, copy, good, metrics, run, spawn};

const SMALL: &str =
    "--vocab 64 --layers 3 --heads 2 --width 16 --context 16 --batch 8 --dropout 0.1 --threads 1";
/// Seconds in which everything here is over.
const PATIENCE: Duration = Duration::from_secs(60);

fn train(ranks: usize, data: &Path, out: &Path, flags: &str) -> Command {
    let mut c = mpirun(ranks);
    c.arg(env!("CARGO_BIN_EXE_bdia-lm")).arg("train").arg("--data").arg(data);
    c.args(SMALL.split(' ')).args(flags.split_whitespace()).arg("--out").arg(out);
    c
}

fn resume(ranks: usize, dir: &Path, flags: &str) -> Command {
    let mut c = mpirun(ranks);
    c.arg(env!("CARGO_BIN_EXE_bdia-lm"))
        .args(["train", "--resume"])
        .arg(dir)
        .args(flags.split_whitespace());
    c
}

fn equal(a: &Path, b: &Path, step: u32) {
    for name in [format!("step-{step:08}.ckpt"), "model.safetensors".into()] {
        assert!(
            std::fs::read(a.join(&name)).unwrap() == std::fs::read(b.join(&name)).unwrap(),
            "{name} differs"
        );
    }
    assert_eq!(metrics(a), metrics(b));
}

/// The process of a rank, among the children of `mpirun`.
fn process(mpirun: &Child, rank: usize) -> Option<libc::pid_t> {
    let children =
        std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", mpirun.id())).ok()?;
    let wanted = [format!("OMPI_COMM_WORLD_RANK={rank}"), format!("PMI_RANK={rank}")];
    let of = |pid: &str| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&b| b == 0).any(|v| wanted.iter().any(|w| w.as_bytes() == v))
    };
    children.split_whitespace().find(|pid| of(pid))?.parse().ok()
}

/// Sends a signal to a rank as soon as `steps` steps are done, and waits for the end.
fn strike(
    mut child: Child,
    out: &Path,
    rank: usize,
    signal: i32,
    steps: usize,
) -> (Said, Duration) {
    let start = Instant::now();
    let lines = || {
        std::fs::read(out.join("metrics.jsonl"))
            .map_or(0, |b| b.iter().filter(|&&b| b == b'\n').count())
    };
    while lines() < steps {
        assert!(
            child.try_wait().unwrap().is_none() && start.elapsed() < PATIENCE,
            "the run does not get so far"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = process(&child, rank).unwrap();
    // SAFETY: a signal to a process that this test started.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    let struck = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(struck.elapsed() < PATIENCE, "the others hang");
        std::thread::sleep(Duration::from_millis(10));
    }
    let after = struck.elapsed();
    (child.wait_with_output().unwrap().into(), after)
}

#[test]
fn ranks_agree() {
    let dir = Dir::new();
    let data = dir.tokens();
    let flags = "--steps 8 --eval-interval 4 --checkpoint-interval 4 --verify --json";
    for extra in ["", "--clip 0.5 --accumulate 2"] {
        let of = |ranks: usize| {
            let out = dir.at(&format!("{ranks}{}", extra.len()));
            let said = good(&mut train(ranks, &data, &out, &format!("{flags} {extra}")));
            assert_eq!(said.json()["verify_mismatches"], 0);
            // One rank alone speaks.
            assert_eq!(said.out.matches("validation loss").count(), 1, "{}", said.out);
            assert_eq!(said.err.matches("goes on").count(), 0, "{}", said.err);
            metrics(&out)
        };
        let one = of(1);
        // Losses of eight steps, whose gradients are summed up in another order.
        close(&one, &of(2), 1e-4);
        close(&one, &of(4), 1e-4);
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let dir = Dir::new();
    let (data, whole) = (dir.tokens(), dir.at("whole"));
    good(&mut train(2, &data, &whole, "--steps 12 --checkpoint-interval 5"));
    let half = dir.at("half");
    copy(&whole, &half);
    std::fs::remove_file(half.join("step-00000012.ckpt")).unwrap();
    assert_eq!(checkpoints(&half), ["step-00000010.ckpt"]);
    for ranks in [1, 2, 4] {
        let out = dir.at(&format!("on{ranks}"));
        copy(&half, &out);
        let said = good(&mut resume(ranks, &out, ""));
        assert_eq!(said.err.contains("was computed by 2 rank(s)"), ranks != 2, "{}", said.err);
        if ranks == 2 {
            equal(&whole, &out, 12);
        } else {
            close(&metrics(&whole), &metrics(&out), 1e-4);
        }
    }
}

/// A killed rank ends the job at once, and what was saved goes on to the same bits.
#[test]
fn a_killed_rank_ends_the_job() {
    let dir = Dir::new();
    let (data, whole) = (dir.tokens(), dir.at("whole"));
    let flags = "--steps 400 --eval-interval 0 --checkpoint-interval 20";
    good(&mut train(2, &data, &whole, flags));
    for rank in [0, 1] {
        let out = dir.at(&format!("killed{rank}"));
        let child = spawn(&mut train(2, &data, &out, flags));
        let (said, after) = strike(child, &out, rank, libc::SIGKILL, 30);
        assert!(said.code != Some(0), "{}", said.err);
        assert!(after < Duration::from_secs(20), "it took {after:?}");
        assert!(said.err.contains(&format!("rank {rank}")), "{}", said.err);
        good(&mut resume(2, &out, ""));
        equal(&whole, &out, 400);
    }
}

/// A rank that hangs is named after the time limit, which ends the job; the run goes on from its
/// checkpoint.
#[test]
fn a_rank_that_hangs_is_named() {
    let dir = Dir::new();
    let (data, out) = (dir.tokens(), dir.at("hung"));
    let flags = "--steps 100000 --eval-interval 0 --checkpoint-interval 20 --rank-timeout 2";
    let child = spawn(&mut train(4, &data, &out, flags));
    let (said, after) = strike(child, &out, 2, libc::SIGSTOP, 30);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(after > Duration::from_secs(1) && after < Duration::from_secs(20), "it took {after:?}");
    assert!(said.err.contains("rank 2: no answer for 2 seconds"), "{}", said.err);
    let before = metrics(&out).len();
    let child = spawn(&mut resume(4, &out, "--rank-timeout 3"));
    // It is the flag of this command that counts.
    let (said, _) = strike(child, &out, 1, libc::SIGSTOP, before + 5);
    assert!(said.err.contains("rank 1: no answer for 3 seconds"), "{}", said.err);
}

/// Other settings on one rank are found before the first step.
#[test]
fn ranks_that_do_something_else_are_refused() {
    let dir = Dir::new();
    let (data, out) = (dir.tokens(), dir.at("astray"));
    let mut c = train(1, &data, &out, "--steps 5 --lr 0.01");
    c.args([":", "-np", "1", env!("CARGO_BIN_EXE_bdia-lm"), "train", "--data"]).arg(&data);
    c.args(SMALL.split(' ')).args(["--steps", "5", "--lr", "0.02", "--out"]).arg(&out);
    let said = run(&mut c);
    assert!(
        said.code == Some(1) && said.err.contains("rank 1: it does something else"),
        "{}",
        said.err
    );
    assert!(checkpoints(&out).is_empty());
    let said = run(&mut train(3, &data, &dir.at("uneven"), "--steps 5"));
    assert!(
        said.code == Some(1) && said.err.contains("--batch 8 cannot be split evenly over 3 ranks"),
        "{}",
        said.err
    );
}

/// γ is measured once, by rank 0; every rank trains with it, or ends with its error.
#[test]
fn ranks_take_the_gamma_that_rank_0_has_measured() {
    let dir = Dir::new();
    let (data, base) = (dir.tokens(), dir.at("base"));
    let flags = "--mode standard --steps 150 --lr 3e-3 --eval-interval 0 --json";
    good(&mut train(1, &data, &base, flags));
    let tune = |ranks: usize, name: &str, flags: &str| {
        let mut c = mpirun(ranks);
        c.arg(env!("CARGO_BIN_EXE_bdia-lm")).args(["finetune", "--task", "text", "--data"]);
        c.arg(&data).arg("--weights").arg(&base).args("--batch 4 --context 16".split(' '));
        c.args(["--threads", "1", "--steps", "4"]).args(flags.split_whitespace());
        c.arg("--out").arg(dir.at(name));
        c
    };
    let of = |ranks: usize| {
        let name = format!("tuned{ranks}");
        let said = good(&mut tune(ranks, &name, "--verify --json"));
        assert_eq!(said.json()["verify_mismatches"], 0);
        assert_eq!(said.err.matches("penalty in nats").count(), 1, "{}", said.err);
        let run: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.at(&name).join("run.json")).unwrap())
                .unwrap();
        assert!(!run["calibration"].is_null(), "{run}");
        (
            [&run["calibration"], &run["gamma"], &run["frac_bits"]].map(Clone::clone),
            metrics(&dir.at(&name)),
        )
    };
    let (one, two) = (of(1), of(2));
    assert_eq!(one.0, two.0);
    close(&one.1, &two.1, 1e-4);
    // Rank 0 alone lays the network out to measure it.
    let said = run(&mut tune(2, "none", "--memory 1000"));
    let told = said.err.matches("1000 bytes").count();
    assert!(said.code == Some(1) && told >= 1, "{}", said.err);
}
