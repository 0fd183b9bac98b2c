//! γ as a policy: measured on a pretrained network, by step, with signs of every kind.
#![allow(clippy::unwrap_used)]

mod program;

use std::path::Path;

use program::{Dir, bad, content, good, metrics, program, resume, train};
use serde_json::Value;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn tune(data: &Path, weights: &Path, out: &Path, flags: &str) -> std::process::Command {
    let mut c = program();
    c.args("finetune --task text --batch 4 --context 16 --threads 2 --sample 0".split(' '));
    c.arg("--data").arg(data).arg("--weights").arg(weights);
    c.args(flags.split_whitespace()).arg("--out").arg(out);
    c
}

/// A network that was trained without γ, and how much less it knows with one.
#[test]
fn gamma_is_measured_on_a_pretrained_network() {
    let dir = Dir::new();
    let data = dir.tokens();
    let (base, tuned) = (dir.at("base"), dir.at("tuned"));
    good(&mut train(&data, &base, "--mode standard --steps 400 --lr 3e-3 --layers 4"));

    let flags = "--steps 6 --checkpoint-interval 3 --verify --json";
    let said = good(&mut tune(&data, &base, &tuned, flags));
    assert_eq!(said.json()["verify_mismatches"], 0);
    let run = json(&tuned.join("run.json"));
    let found = &run["calibration"];
    let rows = found["rows"].as_array().unwrap();
    let chosen = rows.last().unwrap();
    let planes = chosen["planes"].as_u64().unwrap();
    assert!((1..=8).contains(&planes) && found["targets"].as_u64().unwrap() >= 3584, "{found}");
    assert_eq!(run["gamma"], 0.5_f64.powi(planes as i32));
    assert_eq!(run["frac_bits"], found["frac_bits"]);
    // The penalty falls with the number of bits, and only the last one is small enough.
    let penalty =
        |row: &Value| row["mean"].as_f64().unwrap().abs() + 2.0 * row["error"].as_f64().unwrap();
    assert!(rows[1..].windows(2).all(|w| penalty(&w[0]) > penalty(&w[1])), "{found}");
    assert!(rows[1..rows.len() - 1].iter().all(|row| penalty(row) > 0.02), "{found}");
    assert!(penalty(chosen) <= 0.02 && penalty(&rows[0]) < 1e-3, "{found}");
    assert!(planes > 1, "the test shows nothing: {found}");
    let config = json(&tuned.join("config.json"));
    assert_eq!(config["bdia"]["planes"], planes);
    assert_eq!(config["bdia"]["gamma_sign"], "shared");
    for words in ["penalty in nats", "the grid alone", &format!("m = {planes}, 1/{}", 1 << planes)]
    {
        assert!(said.err.contains(words), "{words}: {}", said.err);
    }
    // It is not measured again, and ends with the same bits.
    let again = dir.at("again");
    good(&mut tune(&data, &base, &again, flags));
    std::fs::remove_file(again.join("step-00000006.ckpt")).unwrap();
    let mut c = program();
    let said = good(c.args(["finetune", "--resume"]).arg(&again));
    assert!(!said.err.contains("penalty"), "{}", said.err);
    assert!(content(&again)["model.safetensors"] == content(&tuned)["model.safetensors"]);
    assert_eq!(metrics(&again), metrics(&tuned));

    // One half, which was asked for, is told to be too much.
    let said = good(&mut tune(&data, &base, &dir.at("half"), "--steps 2 --gamma 0.5"));
    assert!(said.err.contains("warning: this gamma perturbs"), "{}", said.err);
    let said = good(&mut tune(&data, &base, &dir.at("standard"), "--steps 2 --mode standard"));
    assert!(!said.err.contains("gamma"), "{}", said.err);
    // What was asked for stays, also where the network bears it.
    let used = dir.at("used");
    good(&mut train(&data, &used, "--steps 100 --lr 3e-3 --layers 4"));
    for (i, gamma) in ["paper", "0.5,4:0.25"].into_iter().enumerate() {
        let out = dir.at(&format!("asked-{i}"));
        good(&mut tune(&data, &used, &out, &format!("--steps 2 --gamma {gamma}")));
        let run = json(&out.join("run.json"));
        assert_eq!((run["gamma"].as_str(), &run["calibration"]), (Some(gamma), &Value::Null));
    }
    // The flag that it was started with is no contradiction.
    let mut c = program();
    good(c.args(["finetune", "--gamma", "auto", "--resume"]).arg(&again));
    // A network that has no weights yet bears everything.
    bad(&mut train(&data, &dir.at("fresh"), "--gamma auto"), &["gamma", "auto", "pretrained"]);
}

#[test]
fn every_policy_is_exact_and_goes_on() {
    let dir = Dir::new();
    let data = dir.tokens();
    for (i, (flags, planes)) in [
        ("--gamma 0.0625 --gamma-sign shared", 4),
        ("--gamma 0.25,5:0.125,8:0.5 --gamma-sign shared", 3),
        ("--gamma 0.25,5:0.125,8:0.5", 3),
        ("--gamma paper --gamma-sign shared", 1),
        ("--gamma 0.25 --gamma-sign minus", 2),
        ("--gamma 0.25 --gamma-sign shared --blocks-per-step 2", 2),
        ("--gamma paper --blocks-per-step 3 --clip 1", 1),
    ]
    .into_iter()
    .enumerate()
    {
        let (whole, part) = (dir.at(&format!("whole-{i}")), dir.at(&format!("part-{i}")));
        let flags = format!("--steps 12 --checkpoint-interval 4 --verify --json {flags}");
        let told = good(&mut train(&data, &whole, &flags)).json();
        assert_eq!(told["verify_mismatches"], 0, "{flags}");
        assert_eq!(json(&whole.join("config.json"))["bdia"]["planes"], planes, "{flags}");
        assert!(told["peak_bytes"].as_u64() <= told["plan_bytes"].as_u64(), "{flags}");
        good(&mut train(&data, &part, &flags));
        std::fs::remove_file(part.join("step-00000012.ckpt")).unwrap();
        good(&mut resume(&part, ""));
        assert!(content(&whole)["model.safetensors"] == content(&part)["model.safetensors"]);
    }
    for (flags, word) in [
        ("--gamma 0.3", "2^-8"),
        ("--gamma 0.5,4:0.3", "2^-8"),
        ("--gamma 0.5,4:0.25,4:0.5", "later"),
        ("--gamma 0.5,0.25", "STEP:MAGNITUDE"),
        ("--mode bdia-float --gamma 0.5,4:0.25", "schedule"),
    ] {
        bad(&mut train(&data, &dir.at("bad"), flags), &["gamma", word]);
    }
    let flags = "--mode standard --blocks-per-step 2";
    bad(&mut train(&data, &dir.at("bad"), flags), &["--blocks-per-step", "--mode bdia"]);
    let mut plan = program();
    let said = good(plan.args("plan --config mini --gamma-sign shared".split(' ')));
    assert!(said.out.contains("gamma 1/16 (m = 4)"), "{}", said.out);
    assert!(said.out.contains("the last step is plain"), "{}", said.out);
    let said = good(program().args("plan --config mini".split(' ')));
    assert!(said.out.contains("the last step has gamma, and no side bits"), "{}", said.out);
    let said = good(program().args("plan --config mini --mode standard".split(' ')));
    assert!(!said.out.contains("the last step"), "{}", said.out);
}
