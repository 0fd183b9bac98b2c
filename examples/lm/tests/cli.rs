//! The program's command line: what it refuses, and with which words; and what it leaves behind
//! when all is well.
#![allow(clippy::unwrap_used)]

mod program;

use std::path::Path;
use std::process::Command;

use program::{Dir, bad, content, copy, good, metrics, program, train};
use serde_json::Value;

const FLAGS: &str = "--steps 3 --checkpoint-interval 2";
/// The same over a run that is there already.
const REPLACING: &str = "--steps 3 --checkpoint-interval 2 --replace";

/// `eval` or `generate` of a directory.
fn other(what: &str, weights: &Path, flags: &str) -> Command {
    let mut c = program();
    c.arg(what).arg("--weights").arg(weights).args(flags.split_whitespace());
    c
}

/// `train --weights`.
fn tune(data: &Path, out: &Path, weights: &Path) -> Command {
    let mut c = program();
    c.args(["train", "--steps", "2", "--batch", "4", "--threads", "2", "--data"]).arg(data);
    c.arg("--weights").arg(weights).arg("--out").arg(out);
    c
}

fn numbers(json: &Value, keys: &[&str]) {
    for key in keys {
        assert!(json[key].is_number(), "{key} in {json}");
    }
}

#[test]
fn unusable_data() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    good(&mut train(&data, &out, FLAGS));
    let before = content(&out);
    let tokens = std::fs::read(&data).unwrap();
    let header = |count: i32| {
        let mut h =
            [20_240_520, 1, count].iter().flat_map(|v: &i32| v.to_le_bytes()).collect::<Vec<_>>();
        h.resize(1024, 0);
        h.extend(&tokens);
        h
    };
    let mut large = tokens.clone();
    large[4001] = 9;
    let wide: Vec<u8> = tokens.as_chunks::<2>().0.iter().flat_map(|t| [t[0], t[1], 0, 0]).collect();
    let cases: [(&str, Vec<u8>, &[&str]); 10] = [
        ("wide.bin", wide, &["parts of u32 numbers", "Use --token-type u32,"]),
        ("empty.bin", vec![], &["empty"]),
        ("empty.txt", vec![], &["empty"]),
        ("binary.txt", vec![0xff, 0xfe, 0, 1], &["not valid UTF-8", "byte 0", "UTF-16"]),
        ("short.txt", b"a few words".to_vec(), &["expected at least 17", "--context"]),
        ("short.bin", tokens[..30].to_vec(), &["expected at least 17", "--context"]),
        ("odd.bin", tokens[..4001].to_vec(), &["4001 bytes", "even"]),
        ("outside.bin", large, &["position 2000", "vocabulary of 64", "--vocab"]),
        ("truncated.bin", header(5000), &["expected 5000", "found 4000"]),
        ("cut.bin", header(4000)[..500].to_vec(), &["header of 1024 bytes"]),
    ];
    for (name, bytes, words) in cases {
        let file = dir.file(name, &bytes);
        let said = bad(&mut train(&file, &out, REPLACING), words);
        assert!(said.err.contains(name), "{}", said.err);
    }
    bad(&mut train(&dir.at("missing.bin"), &out, REPLACING), &["missing.bin", "cannot open"]);
    bad(&mut train(&dir.at("missing.txt"), &out, REPLACING), &["missing.txt", "cannot open"]);
    bad(&mut train(&out, &out, REPLACING), &["cannot"]);
    assert!(before == content(&out));
}

#[test]
fn unusable_weights() {
    let dir = Dir::new();
    let data = dir.tokens();
    let (out, model) = (dir.at("run"), dir.at("model"));
    good(&mut train(&data, &out, FLAGS));
    copy(&out, &model);
    for name in program::checkpoints(&model) {
        std::fs::remove_file(model.join(name)).unwrap();
    }
    good(&mut tune(&data, &dir.at("tuned"), &model));
    let before = content(&out);
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let weights = std::fs::read(model.join("model.safetensors")).unwrap();
    let with = |key: &str, value: Value| {
        let mut c: Value = serde_json::from_str(&config).unwrap();
        c[key] = value;
        c.to_string().into_bytes()
    };
    let mut nan = weights.clone();
    let at = nan.len() - 40;
    nan[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let mut first = weights.clone();
    let at = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    first[at..at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let mut huge = weights.clone();
    huge[..8].copy_from_slice(&(1_u64 << 62).to_le_bytes());
    let cases: [(&str, Vec<u8>, &[&str]); 12] = [
        ("config.json", b"{".to_vec(), &["config.json"]),
        ("config.json", vec![], &["config.json"]),
        ("config.json", with("model_type", "bert".into()), &["\"llama\"", "found bert"]),
        ("config.json", with("n_head", 3.into()), &["n_head"]),
        ("config.json", with("n_layer", 0.into()), &["n_layer"]),
        ("config.json", with("n_layer", 4.into()), &["n_layer is 4, it was 3"]),
        ("config.json", with("n_embd", 32.into()), &["n_embd is 32, it was 16"]),
        ("config.json", with("vocab_size", (1_u64 << 60).into()), &["vocab"]),
        ("model.safetensors", nan, &["ln_f.bias", "NaN"]),
        ("model.safetensors", first, &["inf", "finite"]),
        ("model.safetensors", huge, &["model.safetensors", "header"]),
        ("model.safetensors", weights[..weights.len() - 9].to_vec(), &["model.safetensors"]),
    ];
    for (i, (name, bytes, words)) in cases.into_iter().enumerate() {
        let broken = dir.at(&format!("broken-{i}"));
        copy(&model, &broken);
        std::fs::write(broken.join(name), bytes).unwrap();
        bad(tune(&data, &out, &broken).arg("--replace"), words);
        let mut eval = other("eval", &broken, "--context 16 --data");
        bad(eval.arg(&data), words);
        assert!(before == content(&out), "case {i}");
    }
    let without = dir.at("without");
    copy(&model, &without);
    std::fs::remove_file(without.join("model.safetensors")).unwrap();
    bad(tune(&data, &out, &without).arg("--replace"), &["safetensors"]);
    bad(tune(&data, &out, &dir.at("missing")).arg("--replace"), &["missing"]);
    assert!(before == content(&out));
}

/// What fits is the plan's own word: the longest sample fits, one token more does not.
#[test]
fn plans_say_what_fits_into_a_budget() {
    let dir = Dir::new();
    let picture = dir.at("fits.svg");
    let flags = "plan --config llama-135m --method lora --batch 1 --context 256 --threads 1 --json";
    let plan = |budget: &str, flags: &str| {
        let mut c = program();
        c.args(flags.split(' ')).args(["--memory", budget]).arg("--svg").arg(&picture);
        c
    };
    let said = good(&mut plan("700MB", flags));
    assert!(std::fs::read_to_string(&picture).unwrap().contains("lora, frozen q4_0"));
    assert!(said.out.contains("700 MB is room for") && said.out.contains("longest T"));
    let json = said.json();
    let fits = json["fits"].as_array().unwrap();
    let of = |name: &str| fits.iter().find(|row| row["way"] == name).unwrap();
    assert_eq!(of("all parameters, adamw")["longest_context"], 0);
    let lora = of("lora, frozen f32");
    assert_eq!(lora["plan_bytes"]["256"], json["plan_bytes"]);
    let longest = lora["longest_context"].as_u64().unwrap();
    assert!(longest < of("lora, frozen q8_0")["longest_context"].as_u64().unwrap());
    let at = |t: u64| flags.replace("--context 256", &format!("--context {t}"));
    good(&mut plan("700MB", &at(longest)));
    // The way out is shown before the error.
    let said = bad(&mut plan("700MB", &at(longest + 1)), &["700000000", "smallest plan needs"]);
    assert!(said.out.contains("the first with room for 256 tokens: all parameters, adafactor"));
    let most = lora["largest_batch"].as_u64().unwrap();
    good(&mut plan("700MB", &flags.replace("--batch 1", &format!("--batch {most}"))));
}

#[test]
fn unusable_flags() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    good(&mut train(&data, &out, FLAGS));
    let before = content(&out);
    let cases: [(&str, &[&str]); 31] = [
        ("--gamma 0", &["--gamma"]),
        ("--gamma 0.3", &["--gamma"]),
        ("--gamma NaN", &["--gamma"]),
        ("--gamma -0.5", &["--gamma"]),
        ("--mode bdia-float --gamma 1.5", &["--gamma"]),
        ("--mode bdia-float --quantize", &["--quantize"]),
        ("--checkpoint-every 2", &["--checkpoint-every", "--mode checkpoint"]),
        ("--frac-bits 99", &["--frac-bits"]),
        ("--lr NaN", &["--lr"]),
        ("--lr inf", &["--lr"]),
        ("--lr -1", &["--lr"]),
        ("--min-lr 1", &["--min-lr"]),
        ("--beta1 1", &["--beta1"]),
        ("--eps 0", &["--eps"]),
        ("--clip -1", &["--clip"]),
        ("--dropout 1", &["--dropout"]),
        ("--dropout NaN", &["--dropout"]),
        ("--accumulate 0", &["--accumulate"]),
        ("--accumulate -2", &["--accumulate"]),
        ("--checkpoint-interval -1", &["--checkpoint-interval"]),
        ("--warmup 99999999999999999999", &["--warmup"]),
        ("--seed x", &["--seed"]),
        ("--optimizer adam", &["adamw"]),
        ("--memory 1MB", &["1000000", "smallest plan needs"]),
        ("--memory 0", &["--memory"]),
        ("--memory much", &["--memory"]),
        ("--nonsense", &["--nonsense"]),
        ("--config gpt2-xl", &["token"]),
        ("--weights x --config mini", &["--config"]),
        ("--resume x", &["--out"]),
        ("--order random", &["shuffled"]),
    ];
    for (flags, words) in cases {
        // The flags of the case replace those of the small model where they have none of their own.
        let flags = format!("{REPLACING} {flags}");
        let mut c = train(&data, &out, &flags);
        if flags.contains("gpt2-xl") {
            c = program();
            c.args([
                "train", "--config", "gpt2-xl", "--batch", "4096", "--mode", "standard", "--data",
            ]);
            c.arg(dir.file("text.bin", &[0; 8192])).arg("--replace").arg("--out").arg(&out);
            bad(&mut c, &["plan needs", "--memory"]);
            continue;
        }
        bad(&mut c, words);
    }
    for (command, words) in [
        ("score --model x --data y --loss-on all", ["--loss-on", "score learns nothing"]),
        ("plan --config mini --pack", ["--pack", "Llama's family"]),
    ] {
        bad(program().args(command.split(' ')), &words);
    }
    let plan = |flags: &str| {
        let said =
            good(program().args(format!("plan --config llama-mini --json{flags}").split(' ')));
        said.json()["plan_bytes"].as_u64().unwrap()
    };
    assert!(plan(" --pack") > plan(""));
    for (flag, value) in [
        ("layers", "0"),
        ("heads", "3"),
        ("heads", "-1"),
        ("width", "0"),
        ("context", "0"),
        ("vocab", "0"),
        ("vocab", "17000000"),
        ("batch", "0"),
        ("batch", "-4"),
        ("steps", "0"),
        ("steps", "-3"),
        ("steps", "1.5"),
        ("threads", "0"),
    ] {
        let mut c = program();
        let small: Vec<_> = program::SMALL.split(' ').collect();
        c.args(["train", "--replace", "--data"]).arg(&data).arg("--out").arg(&out);
        for pair in small.chunks(2).filter(|p| p[0] != format!("--{flag}")) {
            c.args(pair);
        }
        bad(c.args([format!("--{flag}"), value.to_string()]), &[flag.trim_end_matches('s')]);
    }
    assert!(before == content(&out));
}

#[test]
fn unusable_places() {
    let dir = Dir::new();
    let data = dir.tokens();
    let file = dir.file("file", b"mine");
    bad(&mut train(&data, &file, FLAGS), &["file", "cannot create the directory"]);
    bad(&mut train(&data, &file.join("below"), FLAGS), &["below", "cannot create the directory"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    if cfg!(target_os = "linux") {
        bad(
            &mut train(&data, Path::new("/proc/bdia"), FLAGS),
            &["/proc/bdia", "cannot create the directory"],
        );
    }
    let out = dir.at("run");
    std::fs::create_dir_all(out.join("metrics.jsonl")).unwrap();
    bad(&mut train(&data, &out, FLAGS), &["metrics.jsonl"]);
}

#[test]
fn evaluation_and_text_of_what_is_no_model() {
    let dir = Dir::new();
    let data = dir.tokens();
    let (empty, out) = (dir.at("empty"), dir.at("run"));
    std::fs::create_dir(&empty).unwrap();
    good(&mut train(&data, &out, FLAGS));
    for place in [empty, dir.at("missing"), data.clone()] {
        bad(&mut other("eval", &place, ""), &["config.json"]);
        bad(&mut other("generate", &place, ""), &["config.json"]);
    }
    bad(&mut other("generate", &out, ""), &["vocabulary has 64"]);
    bad(other("eval", &out, "--context 17 --data").arg(&data), &["--context 17", "at most 16"]);
    bad(other("eval", &out, "--gamma NaN --data").arg(&data), &["--gamma"]);
    let few = dir.file("few.bin", &std::fs::read(&data).unwrap()[..30]);
    bad(other("eval", &out, "--data").arg(&few), &["15 tokens to evaluate", "--context"]);
    // Without the run's flags the data is the default, whose tokens this vocabulary has not.
    good(&mut other("eval", &out, ""));
    // Nor is a run whose flags cannot be read.
    std::fs::write(out.join("run.json"), "{").unwrap();
    bad(other("eval", &out, "--data").arg(&data), &["run.json", "not the flags of a run"]);
    std::fs::remove_file(out.join("run.json")).unwrap();
    bad(&mut other("eval", &out, ""), &["vocabulary of 64"]);
}

#[test]
fn a_run_and_its_evaluation() {
    let dir = Dir::new();
    let data = dir.tokens();
    let out = dir.at("run");
    let json =
        good(&mut train(&data, &out, "--steps 30 --checkpoint-interval 8 --verify --json")).json();
    numbers(&json, &["loss", "verify_mismatches", "items_per_s", "plan_bytes", "peak_bytes"]);
    if cfg!(target_os = "linux") {
        numbers(&json, &["peak_rss_bytes"]);
    }
    assert_eq!(json["verify_mismatches"], 0);
    assert_eq!(metrics(&out).last().unwrap()["loss"], json["loss"]);
    let files: Vec<_> = content(&out).into_keys().collect();
    let expected = [
        "best.safetensors",
        "config.json",
        "loss.svg",
        "metrics.jsonl",
        "model.safetensors",
        "run.json",
        "run.lock",
        "step-00000024.ckpt",
        "step-00000030.ckpt",
    ];
    assert_eq!(files, expected);
    let before = content(&out);
    let mut losses = Vec::new();
    for flags in [
        "",
        "--context 8",
        "--inference quantized",
        "--gamma 0.5",
        "--gamma -0.5 --inference quantized",
    ] {
        let json = good(other("eval", &out, &format!("{flags} --json --data")).arg(&data)).json();
        numbers(&json, &["loss", "perplexity", "tokens"]);
        let loss = json["loss"].as_f64().unwrap();
        assert!((json["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-9 * loss.exp());
        assert!(loss < 4.5, "{flags}: {loss}");
        losses.push(loss);
    }
    // Without --data it is the validation part that the run measured; with it, every window of the
    // file.
    let own = good(&mut other("eval", &out, "--json")).json();
    assert!((own["loss"].as_f64().unwrap() - json["val_loss"].as_f64().unwrap()).abs() < 1e-9);
    let all = good(other("eval", &out, "--json --data").arg(&data)).json();
    let tokens = std::fs::metadata(&data).unwrap().len() / 2;
    assert_eq!(all["tokens"].as_u64().unwrap(), (tokens - 1) / 16 * 16);
    assert!(own["tokens"].as_u64().unwrap() * 5 < all["tokens"].as_u64().unwrap());
    assert!(losses[2] != losses[0] && (losses[2] - losses[0]).abs() < 1e-2);
    assert!(before == content(&out));
}

#[test]
fn orders_backends_and_budgets() {
    let dir = Dir::new();
    let data = dir.tokens();
    let loss = |name: &str, flags: &str| {
        let json =
            good(&mut train(&data, &dir.at(name), &format!("{FLAGS} --json {flags}"))).json();
        (json["loss"].as_f64().unwrap(), json)
    };
    let (plain, json) = loss("plain", "");
    let (reference, _) = loss("reference", "--backend reference");
    assert!((plain - reference).abs() < 1e-2, "{plain} {reference}");
    let (sequential, _) = loss("sequential", "--order sequential");
    assert!(sequential.is_finite() && sequential != plain);
    let budget = json["plan_bytes"].as_u64().unwrap() - 1000;
    let (small, json) = loss("small", &format!("--memory {budget} --verify"));
    assert!(json["plan_bytes"].as_u64().unwrap() <= budget);
    assert!(json["peak_bytes"].as_u64().unwrap() <= budget);
    assert_eq!(json["verify_mismatches"], 0);
    assert!((plain - small).abs() < 1e-4);
}

/// Prompts of a file together or one by one, greedily in two ways, and with several hypotheses.
#[test]
fn text_from_many_prompts() {
    let dir = Dir::new();
    let out = dir.at("run");
    let small = "--layers 2 --heads 2 --width 8 --context 12 --batch 2 --steps 2 --eval-interval 0";
    let data = dir.file(
        "text.txt",
        "The tavern by the river is cheap and serves fish.\n".repeat(40).as_bytes(),
    );
    let mut c = program();
    good(c.arg("train").args(small.split(' ')).arg("--data").arg(&data).arg("--out").arg(&out));
    let prompts = dir
        .file("prompts.txt", "The tavern\r\n\nA cheap place in the old town serves\n".as_bytes());
    let texts = |flags: &str| {
        let said = good(
            other("generate", &out, &format!("--json --tokens 9 {flags} --prompts")).arg(&prompts),
        );
        // A line for every prompt, and the object.
        assert_eq!(said.out.lines().count(), 4, "{}", said.out);
        let texts = said.json()["texts"].as_array().unwrap().clone();
        assert_eq!(
            texts.iter().map(|t| t["prompt"].as_str().unwrap()).collect::<Vec<_>>(),
            ["The tavern", "", "A cheap place in the old town serves"]
        );
        texts
    };
    let greedy = texts("--beams 1");
    assert_eq!(greedy, texts("--temperature 0 --batch 1"));
    assert_eq!(greedy, texts("--beams 1 --backend reference --batch 2"));
    assert_ne!(greedy, texts("--beams 1 --no-repeat-ngram 1"));
    let drawn = texts("--seed 3");
    assert_eq!(drawn, texts("--seed 3 --batch 2"));
    assert_ne!(drawn, texts("--seed 4"));
    let beams = texts("--beams 4 --length-penalty 0.9 --no-repeat-ngram 2 --inference quantized");
    assert!(beams.iter().all(|t| t["tokens"].as_array().unwrap().len() <= 9));
    // One prompt is the first of many.
    for (flags, all) in [("--beams 1", &greedy), ("--seed 3", &drawn)] {
        let mut c = other("generate", &out, &format!("--json --tokens 9 {flags}"));
        let said = good(c.args(["--prompt", "The tavern"]));
        assert_eq!(said.json(), all[0]);
        assert!(said.out.starts_with("The tavern"));
    }
    for (name, bytes, words) in [
        ("empty", &b""[..], &["empty", "one prompt in each line"][..]),
        ("binary", b"ab\xff", &["binary, line 1", "not valid UTF-8", "byte 2"]),
    ] {
        bad(other("generate", &out, "--prompts").arg(dir.file(name, bytes)), words);
    }
    bad(other("generate", &out, "--prompts").arg(dir.at("missing")), &["missing", "cannot open"]);
    bad(&mut other("generate", &out, "--memory 1000"), &["1000", "smallest plan needs"]);
    bad(&mut other("generate", &out, "--beams 3 --top-k 5"), &["--top-k", "cannot be used with"]);
}

/// The same tokens, however they are stored, make the same run; and what is noticed in a text or of
/// a prompt is told.
#[test]
fn data_as_it_comes() {
    let dir = Dir::new();
    let data = dir.tokens();
    let tokens = std::fs::read(&data).unwrap();
    let wide: Vec<u8> =
        tokens.as_chunks::<2>().0.iter().flat_map(|t| [t[0], t[1], 0, 0, 0, 0, 0, 0]).collect();
    let packed = |bytes: &[u8]| {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gz, bytes).unwrap();
        gz.finish().unwrap()
    };
    let (one, out) = (dir.at("one"), dir.at("out"));
    good(&mut train(&data, &one, FLAGS));
    for (name, bytes, flags) in [
        ("wide.tokens", wide.clone(), "--token-type i64"),
        ("packed.bin.gz", packed(&tokens), ""),
        ("packed.wide", packed(&wide), "--token-type i64"),
    ] {
        good(&mut train(&dir.file(name, &bytes), &out, &format!("{REPLACING} {flags}")));
        assert_eq!(metrics(&one), metrics(&out), "{name}");
        // `eval` reads the validation part as the run did.
        let loss = |of: &Path| good(&mut other("eval", of, "--json")).json();
        assert_eq!(loss(&one), loss(&out), "{name}");
    }

    let text = "One river.<|endoftext|>\nTwo old towns<|endoftext|>and a tavern.\n".repeat(20);
    let text = dir.file("text.txt.gz", &packed(text.as_bytes()));
    let train = |special: &str| {
        let small = "--layers 1 --heads 1 --width 8 --context 8 --batch 2 --steps 1 --sample 0 \
                     --replace";
        let mut c = program();
        c.arg("train").args(small.split(' ')).args(["--special-tokens", special]);
        good(c.arg("--data").arg(&text).arg("--out").arg(&out)).err
    };
    let (as_text, parsed) = (train("text"), train("parse"));
    assert!(parsed.contains("40 <|endoftext|> inside lines") && !as_text.contains("inside lines"));
    // One token, or punctuation, in the prompt too; then it is longer than the context.
    let generate = |special: &str, prompt: &str| {
        let flags = format!("--json --tokens 1 --beams 1 --special-tokens {special} --prompt");
        good(other("generate", &out, &flags).arg(prompt)).err
    };
    let prompt = "<|endoftext|>".repeat(3);
    assert!(!generate("parse", &prompt).contains("context"));
    let told = generate("text", &prompt);
    assert!(told.contains("context, which is 8") && told.contains("prompt 1 has 19"), "{told}");
    // Without the flag it is what it was in the run.
    let mut c = other("generate", &out, "--json --tokens 1 --beams 1 --prompt");
    assert!(!good(c.arg(&prompt)).err.contains("context"));
    train("text");
    assert!(good(&mut c).err.contains("prompt 1 has 19"));
    let pairs =
        dir.file("pairs.csv.gz", &packed(b"prompt,completion\na b c d e f g h i,j\n,\nc,\nd,e\n"));
    let mut c = other("score", &out, "--task pairs --beams 1 --tokens 1 --threads 1 --data");
    let told = good(c.arg(&pairs)).err;
    assert!(told.contains("2 pair(s) without a completion are skipped, the first in line 3"));
    assert!(told.contains("1 of 2 prompt(s)") && told.contains("prompt 1 has 10"), "{told}");
}

/// A new run in the directory of another takes its place as a whole: nothing of the old one is gone
/// on with.
#[test]
fn a_new_run_replaces_an_old_one() {
    let dir = Dir::new();
    let data = dir.tokens();
    let (out, fresh) = (dir.at("run"), dir.at("fresh"));
    good(&mut train(&data, &out, "--steps 30 --seed 2"));
    std::fs::remove_file(out.join("run.json")).unwrap();
    good(&mut train(&data, &out, REPLACING));
    good(&mut train(&data, &fresh, FLAGS));
    assert_eq!(program::checkpoints(&out), program::checkpoints(&fresh));
    assert_eq!(metrics(&out), metrics(&fresh));
}
