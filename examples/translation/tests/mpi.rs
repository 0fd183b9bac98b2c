//! The program under `mpirun`: 1, 2 and 4 ranks agree, and a run goes on with another number. Needs
//! feature `mpi` and an MPI.
#![cfg(feature = "mpi")]
#![allow(clippy::unwrap_used)]

use std::path::Path;

use bdia_models::files::testing::TempDir;
use bdia_train::testing::{close, json, metrics, mpirun};

/// Buckets end with batches of fewer sentences than ranks.
const SMALL: &str = "--pairs 200 --held 40 --vocab 300 --layers 2 --decoder-layers 3 --width 16 \
                     --heads 2 --mlp 24 --longest 48 --batch-tokens 400 --translate 0 \
                     --threads 1 --dropout 0.1";

fn good(ranks: usize, out: &Path, arguments: &str) -> String {
    let mut c = mpirun(ranks);
    let o = c
        .arg(env!("CARGO_BIN_EXE_bdia-translate"))
        .args(arguments.split_whitespace())
        .arg(out)
        .output()
        .unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).unwrap()
}

#[test]
fn ranks_agree_and_a_run_goes_on_with_others() {
    let dir = TempDir::new();
    for (name, extra) in [
        ("fused", ""),
        ("clipped", "--clip 0.5"),
        ("separate", "--embeddings separate --mode standard"),
    ] {
        let at = |ranks: usize| dir.path().join(format!("{name}{ranks}"));
        let of = |ranks: usize| {
            let verify = if extra.contains("standard") { "" } else { "--verify" };
            let flags = format!(
                "train {SMALL} --epochs 2 --checkpoint-interval 1 {extra} {verify} --json --out"
            );
            let said = good(ranks, &at(ranks), &flags);
            assert!(json(&said)["verify_mismatches"].as_u64().is_none_or(|n| n == 0), "{said}");
            metrics(&at(ranks), "items_per_s")
        };
        let one = of(1);
        // Losses of some tens of steps, whose gradients are summed up in another order.
        close(&one, &of(2), 1e-3);
        close(&one, &of(4), 1e-3);
        let last = format!("step-{:08}.ckpt", one.len());
        std::fs::remove_file(at(4).join(last)).unwrap();
        good(2, &at(4), "train --resume");
        close(&one, &metrics(&at(4), "items_per_s"), 1e-3);
    }
}
