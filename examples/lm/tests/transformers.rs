//! What the program leaves behind is read by transformers and PEFT, which compute the same logits.
#![allow(clippy::unwrap_used)]

mod program;
#[path = "../../models/tests/common/transformers.rs"]
mod transformers;

use program::{Dir, good, model, program, tokens_below, tune};
use transformers::agrees;

/// The directory of a run, with GPT-2's vocabulary and the tokenizer's files.
#[test]
fn transformers_reads_the_directory_of_a_run() {
    let dir = Dir::new();
    let out = dir.at("run");
    let flags = "--steps 2 --batch 1 --context 32 --eval-interval 0 --threads 1 --out";
    good(program().args(flags.split(' ')).arg(&out));
    assert!(out.join("vocab.json").exists() && out.join("merges.txt").exists());
    agrees(&out, None, 32);
}

#[test]
fn peft_reads_the_adapters_of_a_run() {
    let dir = Dir::new();
    let (tokens, out) = (tokens_below(&dir, 61), dir.at("run"));
    good(tune(&tokens, &model("hf_tied"), &out).args(["--method", "lora", "--lr", "1e-2"]));
    agrees(&out, Some(&model("hf_tied")), 15);
}
