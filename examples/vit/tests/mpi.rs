//! The program under `mpirun`: 1, 2 and 4 ranks agree, and a run goes on with another number. Needs
//! feature `mpi` and an MPI.
#![cfg(feature = "mpi")]
#![allow(clippy::unwrap_used)]

use std::path::Path;

use bdia_models::files::testing::TempDir;
use bdia_train::testing::{close, json, metrics, mpirun};

/// Augmentation, mixed images, dropped blocks, dropout: everything that is drawn, by the sample's
/// place in the batch. Small steps, which amplify the rounding of gradients little.
const SMALL: &str = "--train-subset 80 --test-subset 40 --layers 3 --width 16 --heads 2 --mlp 16 \
                     --batch 16 --threads 1 --augment crop-flip --dropout 0.1 --mixup 0.2 \
                     --lr 2e-4";

fn good(ranks: usize, out: &Path, arguments: &str) -> String {
    let mut c = mpirun(ranks);
    let o = c
        .arg(env!("CARGO_BIN_EXE_bdia-vit"))
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
    for (name, extra) in
        [("fused", "--drop-path 0.1"), ("clipped", "--clip 0.5"), ("revvit", "--network revvit")]
    {
        let at = |ranks: usize| dir.path().join(format!("{name}{ranks}"));
        let of = |ranks: usize| {
            let flags = format!(
                "train {SMALL} --epochs 2 --checkpoint-interval 1 {extra} --verify --json --out"
            );
            let said = good(ranks, &at(ranks), &flags);
            assert!(json(&said)["verify_mismatches"].as_u64().is_none_or(|n| n == 0), "{said}");
            metrics(&at(ranks), "items_per_s")
        };
        let one = of(1);
        // Losses of ten steps, whose gradients are summed up in another order.
        close(&one, &of(2), 1e-4);
        close(&one, &of(4), 1e-4);
        std::fs::remove_file(at(4).join("step-00000010.ckpt")).unwrap();
        good(2, &at(4), "train --resume");
        close(&one, &metrics(&at(4), "items_per_s"), 1e-4);
    }
}
