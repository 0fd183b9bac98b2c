//! Fine-tuning by the program: runs that go on, adapters that cannot be used, pairs.
#![allow(clippy::unwrap_used)]

mod program;

use std::path::Path;
use std::process::Command;

use bdia_models::language::adapter;
use program::{Dir, bad, content, copy, good, metrics, model as data, program, tokens_below, tune};

#[test]
fn runs_go_on_with_the_same_bits() {
    let dir = Dir::new();
    let tokens = tokens_below(&dir, 61);
    for method in ["full", "lora"] {
        let (whole, part) = (dir.at(&format!("{method}-whole")), dir.at(&format!("{method}-part")));
        let base = dir.at(&format!("{method}-base"));
        copy(&data("hf_tied"), &base);
        good(tune(&tokens, &base, &whole).args(["--method", method, "--lr", "1e-2"]));
        copy(&whole, &part);
        std::fs::remove_file(part.join("step-00000006.ckpt")).unwrap();
        let files: &[&str] = if method == "full" {
            &["model.safetensors"]
        } else {
            &[adapter::FILE, adapter::CONFIG]
        };
        files.iter().for_each(|f| std::fs::remove_file(part.join(f)).unwrap());
        if method == "full" {
            // Its weights are in the checkpoint.
            std::fs::remove_dir_all(base).unwrap();
        }
        good(program().args(["finetune", "--resume"]).arg(&part));
        assert_eq!(metrics(&whole), metrics(&part), "{method}");
        for file in files.iter().copied().chain(["step-00000006.ckpt"]) {
            assert_eq!(
                std::fs::read(whole.join(file)).unwrap(),
                std::fs::read(part.join(file)).unwrap(),
                "{file}"
            );
        }
        bad(
            program().args(["finetune", "--lr", "3", "--resume"]).arg(&part),
            &["--lr is 3.0, the run has 0.01"],
        );
        // A run of the other subcommand is none of this one.
        bad(program().args(["train", "--resume"]).arg(&part), &["not the flags of a run"]);
    }
    // Without --data it is the part of the run's data that was set aside.
    let own = |c: &mut Command| good(c.args(["--threads", "1", "--json"])).json()["loss"].as_f64();
    for (whole, weights) in [("full-whole", dir.at("full-whole")), ("lora-whole", data("hf_tied"))]
    {
        let mut c = program();
        c.arg("eval").arg("--weights").arg(weights);
        if whole == "lora-whole" {
            c.arg("--adapter").arg(dir.at(whole));
        }
        let expected = metrics(&dir.at(whole)).last().unwrap()["val_loss"].as_f64().unwrap();
        let found = own(&mut c).unwrap();
        assert!((found - expected).abs() < 1e-5, "{whole}: {found} {expected}");
    }
    // All that `eval` and `merge` do with the adapters is one thing.
    let (lora, merged) = (dir.at("lora-whole"), dir.at("merged"));
    let tied = data("hf_tied");
    let merge = || {
        let mut c = program();
        c.arg("merge")
            .arg("--weights")
            .arg(&tied)
            .arg("--adapter")
            .arg(&lora)
            .arg("--out")
            .arg(&merged);
        c
    };
    good(&mut merge());
    let eval = |weights: &Path, adapter: Option<&Path>| {
        let mut c = program();
        c.args(["eval", "--context", "15", "--threads", "1", "--json", "--data"])
            .arg(&tokens)
            .arg("--weights")
            .arg(weights);
        adapter.map(|a| c.arg("--adapter").arg(a));
        good(&mut c).json()["loss"].as_f64().unwrap()
    };
    assert_eq!(eval(&merged, None), eval(&tied, Some(&lora)));
    assert!(eval(&merged, None) < eval(&tied, None));
    // Nothing is overwritten.
    let before = content(&merged);
    bad(&mut merge(), &["there is a model (config.json) already"]);
    assert_eq!(content(&merged), before);
    // Adapters of another model: by their digest, or by their shapes.
    let wrong = |weights: &Path, adapter: &Path, words: &[&str]| {
        let mut c = program();
        c.args(["eval", "--context", "15", "--threads", "1", "--data"])
            .arg(&tokens)
            .arg("--weights")
            .arg(weights);
        bad(c.arg("--adapter").arg(adapter), words);
    };
    wrong(&merged, &lora, &["belong to another model", "xxh3:"]);
    let other = dir.at("other");
    let mut train = program();
    train.args(
        "train --layers 2 --heads 2 --width 16 --context 16 --vocab 61 --steps 1 --batch 1 \
         --threads 1"
            .split(' '),
    );
    good(train.arg("--data").arg(&tokens).arg("--out").arg(&other));
    wrong(
        &other,
        &lora,
        &["unexpected: base_model.model.transformer.h.2", "has shape [8, 24], expected [8, 16]"],
    );
}

#[test]
fn adapters_that_are_none() {
    let dir = Dir::new();
    let tokens = tokens_below(&dir, 61);
    let check = |name: &str,
                 change: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>),
                 words: &[&str]| {
        let at = dir.at(name);
        copy(&data("peft_qv"), &at);
        let path = at.join(adapter::CONFIG);
        let mut map = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut map);
        std::fs::write(&path, serde_json::to_vec(&map).unwrap()).unwrap();
        let mut c = program();
        c.args(["eval", "--context", "15", "--threads", "1", "--data"]).arg(&tokens);
        bad(c.arg("--weights").arg(data("hf_tied")).arg("--adapter").arg(&at), words);
    };
    check(
        "type",
        &|m| drop(m.insert("peft_type".into(), "IA3".into())),
        &["peft_type: expected \"LORA\", found \"IA3\""],
    );
    check(
        "modules",
        &|m| drop(m.insert("target_modules".into(), vec!["c_proj"].into())),
        &["missing: base_model.model.transformer.h.0.attn.c_proj"],
    );
    check("rank", &|m| drop(m.insert("r".into(), 0.into())), &["r: expected a whole number"]);
    check(
        "rank2",
        &|m| drop(m.insert("r".into(), 2.into())),
        &["has shape [8, 24], expected [2, 24]"],
    );
    check(
        "alpha",
        &|m| drop(m.remove("lora_alpha")),
        &["lora_alpha: expected a number, found nothing"],
    );
    check(
        "dora",
        &|m| drop(m.insert("use_dora".into(), true.into())),
        &["use_dora: expected nothing"],
    );
    check(
        "saved",
        &|m| drop(m.insert("modules_to_save".into(), vec!["wte"].into())),
        &["modules_to_save"],
    );
    check("bias", &|m| drop(m.insert("bias".into(), "all".into())), &["bias: expected \"none\""]);
    // Not even a file, and a value that is no number.
    let mut c = program();
    c.args(["eval", "--data"]).arg(&tokens).arg("--weights").arg(data("hf_tied"));
    bad(c.arg("--adapter").arg(dir.at("nothing")), &["adapter_config.json"]);
    let at = dir.at("nan");
    copy(&data("peft_qv"), &at);
    let mut bytes = std::fs::read(at.join(adapter::FILE)).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(at.join(adapter::FILE), bytes).unwrap();
    let mut c = program();
    c.args(["eval", "--context", "15", "--data"])
        .arg(&tokens)
        .arg("--weights")
        .arg(data("hf_tied"));
    bad(c.arg("--adapter").arg(&at), &["lora_B", "is NaN"]);
}

#[test]
fn weights_that_cannot_be_tuned() {
    let dir = Dir::new();
    let (tokens, out) = (tokens_below(&dir, 61), dir.at("run"));
    good(tune(&tokens, &data("hf_tied"), &out).args(["--method", "lora"]));
    let before = content(&out);
    let refused = |weights: &Path, flags: &[&str], words: &[&str]| {
        bad(tune(&tokens, weights, &out).args(flags).arg("--replace"), words);
        assert_eq!(content(&out), before, "{words:?}: something was overwritten");
    };
    let change = |name: &str, value: f32| {
        let at = dir.at(name);
        copy(&data("hf_tied"), &at);
        let path = at.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        // The file ends with h.2.mlp.c_proj.weight, ln_f and the embeddings; it is enough to find a
        // matrix of a block.
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let start =
            json["transformer.h.1.mlp.c_fc.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
        bytes[8 + header + start..][..4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
        at
    };
    let nan = change("nan", f32::NAN);
    for method in ["full", "lora"] {
        refused(&nan, &["--method", method], &["h.1.mlp.c_fc.weight", "element 0 is NaN"]);
    }
    let large = change("large", 1e5);
    let narrow = ["--method", "lora", "--frozen-dtype", "f16"];
    refused(&large, &narrow, &["h.1.mlp.c_fc.weight: 100000 does not fit", "--frozen-dtype"]);
    good(tune(&tokens, &data("hf_tied"), &dir.at("f16")).args(narrow));
    refused(&dir.at("no/such"), &[], &["config.json"]);
    refused(&data("hf_tied"), &["--lora-rank", "2"], &["belong to --method lora"]);
    refused(
        &data("hf_tied"),
        &["--method", "lora", "--lora-rank", "100"],
        &["LoRA rank is 100", "the width"],
    );
    refused(&data("hf_tied"), &["--loss-on", "all"], &["--loss-on belongs to tasks of pairs"]);
    refused(&data("hf_tied"), &["--prompt-column", "a"], &["belong to --task pairs"]);
    let mut c = program();
    c.args(["finetune", "--replace", "--data"])
        .arg(&tokens)
        .arg("--weights")
        .arg(data("hf_tied"))
        .arg("--out")
        .arg(&out);
    bad(&mut c, &["tokens.bin: expected a file whose name ends in .csv, .tsv or .jsonl"]);
    assert_eq!(content(&out), before);
    // The weights change under a run.
    let moved = dir.at("moved");
    copy(&data("hf_tied"), &moved);
    let second = dir.at("second");
    good(tune(&tokens, &moved, &second).args(["--method", "lora"]));
    copy(&change("moved-on", 0.5), &moved);
    bad(
        program().args(["finetune", "--resume"]).arg(&second),
        &["the run began with weights with digest xxh3:"],
    );
    // By name, without a network or a build for it.
    let mut c = program();
    c.args(["finetune", "--model", "openai-community/gpt2", "--data"])
        .arg(&tokens)
        .env("HF_HOME", dir.at("cache"));
    c.env("HF_ENDPOINT", "http://127.0.0.1:1");
    bad(
        &mut c,
        &["name it with --model", "the files of https://huggingface.co/openai-community/gpt2"],
    );
}

/// Pairs, with GPT-2's vocabulary: they are learned, in all methods, and counted.
#[test]
fn pairs_are_learned() {
    let dir = Dir::new();
    let base = dir.at("base");
    let text = "The inn by the river serves tea. ".repeat(40);
    let mut c = program();
    c.args(
        "train --layers 2 --heads 2 --width 16 --context 32 --steps 2 --batch 2 --threads 2 --data"
            .split(' '),
    );
    good(c.arg(dir.file("text.txt", text.as_bytes())).arg("--out").arg(&base));
    let rows: String = (0..20)
        .map(|i| format!("\"name[Inn {i}], food[tea]\",\"Inn {i}\r\nserves tea.\"\r\n"))
        .collect();
    let csv = dir.file("e2e.csv", format!("mr,ref\r\n{rows}").as_bytes());
    let tune = |out: &Path, flags: &str| {
        let mut c = program();
        c.args("finetune --batch 4 --threads 2 --json --data".split(' '))
            .arg(&csv)
            .arg("--validation")
            .arg(&csv);
        c.arg("--weights").arg(&base).arg("--out").arg(out).args(flags.split_whitespace());
        c
    };
    let mut losses = Vec::new();
    for (name, flags) in
        [("full", "--lr 1e-2"), ("lora", "--method lora --lr 1e-1 --frozen-dtype bf16")]
    {
        let said = good(&mut tune(&dir.at(name), &format!("{flags} --epochs 4")));
        assert!(
            said.err.contains("20 training and 20 validation examples")
                && said.err.contains("4.00 passes")
        );
        let json = said.json();
        assert_eq!(json["steps"], 20);
        assert!(said.out.contains("perplexity"), "{}", said.out);
        losses.push(json["val_loss"].as_f64().unwrap());
        let mut c = program();
        c.args("eval --task e2e --threads 2 --json --data".split(' ')).arg(&csv);
        match name {
            "full" => c.arg("--weights").arg(dir.at(name)),
            _ => c.arg("--weights").arg(&base).arg("--adapter").arg(dir.at(name)),
        };
        let evaluated = good(&mut c).json()["loss"].as_f64().unwrap();
        // The frozen weights were rounded to bf16 in one of them.
        assert!(
            (evaluated - losses[losses.len() - 1]).abs() < 2e-2,
            "{name}: {evaluated} {losses:?}"
        );
        // Without --data it is what the run validated on.
        let mut c = program();
        c.args("eval --threads 2 --json".split(' '));
        match name {
            "full" => c.arg("--weights").arg(dir.at(name)),
            _ => c.arg("--weights").arg(&base).arg("--adapter").arg(dir.at(name)),
        };
        assert_eq!(good(&mut c).json()["loss"].as_f64().unwrap(), evaluated);
    }
    let start = good(
        program()
            .args("eval --task e2e --threads 2 --json --data".split(' '))
            .arg(&csv)
            .arg("--weights")
            .arg(&base),
    );
    let start = start.json()["loss"].as_f64().unwrap();
    assert!(losses[0] < start - 1.0 && losses[1] < start - 0.1, "{start} {losses:?}");

    // Prepared tokens are the same data: the run ends with the same bytes, and goes on with either.
    let tokens = dir.at("tokens.safetensors");
    let prepare = |flags: &str| {
        let mut c = program();
        c.arg("prepare").args(flags.split_whitespace()).arg("--data").arg(&csv);
        c.arg("--model").arg(&base).arg("--out").arg(&tokens);
        c
    };
    let said = good(&mut prepare(""));
    assert!(said.out.contains("20 examples"), "{}", said.out);
    bad(&mut prepare(""), &["tokens.safetensors: is there already", "--replace"]);
    bad(&mut prepare("--task text --replace"), &["ends in .npy"]);
    let mut c = program();
    c.args("finetune --batch 4 --threads 2 --lr 1e-2 --steps 10 --data".split(' ')).arg(&tokens);
    c.arg("--validation").arg(&tokens).arg("--model").arg(&base);
    good(c.arg("--out").arg(dir.at("prepared")));
    let mut c = program();
    c.args(["finetune", "--steps", "20", "--resume"]).arg(dir.at("prepared")).arg("--data");
    good(c.arg(&csv).arg("--validation").arg(&csv));
    good(&mut tune(&dir.at("whole"), "--lr 1e-2 --steps 10"));
    let mut c = program();
    good(c.args(["finetune", "--steps", "20", "--resume"]).arg(dir.at("whole")));
    let weights = |name| std::fs::read(dir.at(name).join("model.safetensors")).unwrap();
    assert!(weights("prepared") == weights("whole"));
    let mut c = program();
    c.args("finetune --steps 1 --loss-on all --data".split(' ')).arg(&tokens);
    bad(
        c.arg("--model").arg(&base).arg("--out").arg(dir.at("none")),
        &["tokens.safetensors", "--loss-on completion", "--loss-on all"],
    );

    let said = good(&mut tune(&dir.at("short"), "--steps 1 --context 16"));
    assert!(said.err.contains("20 example(s) cut to 16 tokens, 0 dropped"), "{}", said.err);
    bad(&mut tune(&dir.at("none"), "--context 4"), &["every prompt is longer"]);
    bad(
        &mut tune(&dir.at("none"), "--task pairs"),
        &["no column \"prompt\"; the columns are \"mr\", \"ref\""],
    );
    bad(&mut tune(&dir.at("none"), "--epochs 4 --steps 3"), &["cannot be used with"]);
    let mut c = program();
    c.args("finetune --steps 1 --threads 2 --data".split(' ')).arg(&csv);
    good(c.arg("--weights").arg(&base).arg("--out").arg(dir.at("blind")));
    let mut c = program();
    bad(c.args(["eval", "--weights"]).arg(dir.at("blind")), &["blind", "no data to validate on"]);
    good(&mut tune(
        &dir.at("pairs"),
        "--task pairs --prompt-column ref --completion-column mr --loss-on all --steps 1",
    ));
    let latin = dir.file("latin.csv", b"mr,ref\nname[Caf\xe9],tea\n");
    bad(
        program().args(["finetune", "--data"]).arg(&latin).arg("--weights").arg(&base),
        &["line 2", "not valid UTF-8"],
    );
    let empty = dir.file("empty.csv", b"mr,ref\nname[c],\n");
    bad(
        program().args(["finetune", "--data"]).arg(&empty).arg("--weights").arg(&base),
        &["empty.csv", "the 1 that are there have no completion"],
    );
}
