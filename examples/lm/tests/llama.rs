//! The program with models of Llama's family: from scratch, tuned, as conversations, as files; and
//! with SmolLM2's real weights where `BDIA_SMOLLM2` names its GGUF file.
#![allow(clippy::unwrap_used)]

mod program;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use program::{Dir, bad, content, copy, good, program, run, tokens_below, train, tune};

/// A committed file of the tests of `bdia-models`.
fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/data").join(name)
}

/// A small model with a tokenizer that has a template of conversations.
fn talker(dir: &Dir) -> PathBuf {
    let (lines, out) =
        (dir.file("lines.txt", "to be, or not to be\n".repeat(300).as_bytes()), dir.at("talker"));
    let tokenizer = dir.at("tokenizer");
    copy(&data("tokenizers/llama3"), &tokenizer);
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}\
                    {% if add_generation_prompt %}assistant: {% endif %}";
    std::fs::write(tokenizer.join("chat_template.jinja"), template).unwrap();
    let mut c = program();
    c.args(["train", "--config", "llama-mini", "--layers", "2", "--width", "32", "--heads", "2"]);
    c.args(["--context", "64", "--batch", "2", "--steps", "3", "--threads", "1", "--sample", "8"]);
    let said =
        good(c.arg("--tokenizer").arg(tokenizer).arg("--data").arg(lines).arg("--out").arg(&out));
    assert!(said.out.contains("A sample:"), "{}", said.out);
    out
}

fn with_model(what: &str, model: &Path, flags: &str) -> std::process::Command {
    let mut c = program();
    c.arg(what).arg("--model").arg(model).args(flags.split_whitespace());
    c
}

/// The same weights after an interruption, and from either kind of file the same loss.
#[test]
fn from_scratch_and_as_files() {
    let dir = Dir::new();
    let (tokens, whole, parts) = (dir.tokens(), dir.at("whole"), dir.at("parts"));
    let flags = "--config llama-mini --steps 6 --checkpoint-interval 3 --verify --json \
                 --schedule constant --warmup 0";
    let said = good(&mut train(&tokens, &whole, flags));
    assert_eq!(said.json()["verify_mismatches"], 0);
    good(&mut train(&tokens, &parts, &flags.replace("--steps 6", "--steps 3")));
    good(program().args(["--resume"]).arg(&parts).args(["--steps", "6"]));
    let weights = |at: &Path| content(at)["model.safetensors"].clone();
    assert!(weights(&whole) == weights(&parts));

    let loss = |model: &Path| {
        let mut c = with_model("eval", model, "--context 16 --threads 1 --json --data");
        good(c.arg(&tokens)).json()["loss"].as_f64().unwrap()
    };
    let gguf = dir.at("model.gguf");
    let export = |model: &Path, out: &Path, flags: &str| {
        let mut c = with_model("export", model, flags);
        c.arg("--out").arg(out);
        c
    };
    good(&mut export(&whole, &gguf, ""));
    assert_eq!(loss(&gguf), loss(&whole));
    bad(&mut export(&whole, &gguf, ""), &["is there already", "--replace"]);
    good(&mut export(&whole, &gguf, "--type f16 --replace"));
    assert!((loss(&gguf) - loss(&whole)).abs() < 1e-3);
    let back = dir.at("back");
    good(&mut export(&gguf, &back, ""));
    assert_eq!(loss(&back), loss(&gguf));
    bad(&mut export(&whole, &dir.at("x"), "--type f16"), &["belongs to GGUF files"]);
    bad(&mut export(&program::model("hf_tied"), &dir.at("x.gguf"), ""), &["Llama's family only"]);
    bad(&mut with_model("eval", &tokens, ""), &["config.json", "GGUF"]);
}

/// Adapters of every linear layer: used beside the model or merged, it is one model.
#[test]
fn adapters() {
    let dir = Dir::new();
    for name in ["llama_biases", "gemma3", "qwen3"] {
        let (base, lora) = (data("llama").join(name), dir.at(&format!("{name}-lora")));
        let tokens = tokens_below(&dir, 31);
        let flags = ["--method", "lora", "--verify", "--json"];
        let said = good(tune(&tokens, &base, &lora).args(flags));
        assert_eq!(said.json()["verify_mismatches"], 0, "{name}");
        let merged = dir.at(&format!("{name}-merged"));
        let mut c = with_model("merge", &base, "--adapter");
        good(c.arg(&lora).arg("--out").arg(&merged));
        let loss = |model: &Path, adapter: Option<&Path>| {
            let mut c = with_model("eval", model, "--context 15 --threads 1 --json --data");
            c.arg(&tokens);
            if let Some(adapter) = adapter {
                c.arg("--adapter").arg(adapter);
            }
            good(&mut c).json()["loss"].as_f64().unwrap()
        };
        assert_eq!(loss(&merged, None), loss(&base, Some(&lora)), "{name}");
        assert_ne!(loss(&merged, None), loss(&base, None), "{name}");
    }
}

/// Conversations are learned, with and without packing; what was tuned keeps its own tokenizer.
#[test]
fn conversations() {
    let dir = Dir::new();
    let model = talker(&dir);
    let line = |i: usize| {
        format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"say {i}\"}},\
             {{\"role\":\"assistant\",\"content\":\"{}\"}}]}}\n",
            "be ".repeat(1 + i % 5)
        )
    };
    let chats = dir.file("chats.jsonl", (0..40).map(line).collect::<String>().as_bytes());
    let mut losses = Vec::new();
    for flags in ["--pack", ""] {
        let out = dir.at(&format!("tuned{flags}"));
        let mut c = with_model("finetune", &model, "--task chat --batch 2 --threads 1 --steps 4");
        c.args(flags.split_whitespace()).args(["--gamma", "0.125", "--verify", "--json"]);
        let said = good(c.arg("--data").arg(&chats).arg("--out").arg(&out));
        assert_eq!(said.json()["verify_mismatches"], 0);
        assert_eq!(
            said.err.contains("packed into") || said.out.contains("packed into"),
            !flags.is_empty()
        );
        losses.push(said.json()["loss"].as_f64().unwrap());
        for file in ["tokenizer.json", "chat_template.jinja"] {
            assert!(content(&out)[file] == content(&model)[file], "{file}");
        }
        let mut c = with_model("eval", &out, "--task chat --threads 1 --json --data");
        good(c.arg(&chats));
        let mut c = with_model("chat", &out, "--tokens 4 --threads 1 --prompt hello");
        assert!(good(&mut c).out.ends_with('\n'));
    }
    assert!(losses.iter().all(|l| l.is_finite()));
    // A line after the other.
    let mut c = with_model("chat", &model, "--tokens 4 --threads 1");
    c.stdin(std::fs::File::open(dir.file("talk", b"one\ntwo\n\nnot seen\n")).unwrap());
    let said = program::Said::from(c.output().unwrap());
    assert_eq!((said.code, said.out.lines().count() >= 2), (Some(0), true), "{}", said.err);

    // A signal ends it while it waits for a line that does not come.
    #[cfg(unix)]
    for name in ["TERM", "INT"] {
        let mut c = with_model("chat", &model, "--tokens 4 --threads 1");
        c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = c.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"one\n").unwrap();
        let mut answer = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
        program::signal(&child, name);
        program::wait_for(&mut child, || false);
        let said = program::Said::from(child.wait_with_output().unwrap());
        assert_eq!(said.code, Some(1), "{}", said.err);
        assert!(said.err.contains("interrupted"), "{}", said.err);
    }

    // What has no template, or is no conversation.
    bad(
        &mut with_model("chat", &program::model("hf_tied"), "--prompt a"),
        &["expected at least the 50257"],
    );
    let wrong = dir.file("wrong.jsonl", b"{\"prompt\": \"a\"}\n");
    let mut c = with_model("finetune", &model, "--task chat --gamma 0.125 --out");
    bad(c.arg(dir.at("no")).arg("--data").arg(&wrong), &["line 1", "messages"]);
    let mut c = with_model("finetune", &program::model("hf_tied"), "--task pairs --pack --out");
    let pairs = dir.file("p.csv", b"prompt,completion\na,b\n");
    bad(
        c.arg(dir.at("no")).arg("--data").arg(&pairs),
        &["--pack: expected a model of Llama's family"],
    );
}

/// A tokenizer that does not fit, none at all, and a head that is not the embedding.
#[test]
fn models_as_their_owners_wrote_them() {
    let dir = Dir::new();
    let (base, text) = (dir.at("base"), dir.file("t.txt", "a b c\n".repeat(100).as_bytes()));
    copy(&data("llama/llama"), &base);
    let eval = |model: &Path| {
        let mut c = with_model("eval", model, "--context 8 --threads 1 --data");
        c.arg(&text);
        c
    };
    bad(&mut eval(&base), &["no tokenizer", "tokenizer.json"]);
    std::fs::copy(data("tokenizers/llama3/tokenizer.json"), base.join("tokenizer.json")).unwrap();
    bad(&mut eval(&base), &["the model only 31"]);
    bad(&mut with_model("generate", &program::model("hf_tied"), ""), &["vocabulary has 61"]);
    std::fs::remove_file(base.join("tokenizer.json")).unwrap();
    // Only pickled weights.
    std::fs::rename(base.join("model.safetensors"), base.join("pytorch_model.bin")).unwrap();
    let mut c = with_model("plan", &base, "--batch 1");
    assert_eq!(run(&mut c).code, Some(0), "a plan needs no weights");
    let tokens = tokens_below(&dir, 31);
    let mut c = with_model("eval", &base, "--context 8 --threads 1 --data");
    bad(c.arg(&tokens), &["save_pretrained(NEW)"]);
}

/// The real SmolLM2-135M-Instruct: it answers, and nothing is rebuilt wrongly when it is tuned.
#[test]
fn smollm2() {
    let Some(model) = std::env::var_os("BDIA_SMOLLM2").map(PathBuf::from) else {
        println!("skipped: BDIA_SMOLLM2 names no GGUF file of SmolLM2-135M-Instruct");
        return;
    };
    let dir = Dir::new();
    let mut c = with_model("chat", &model, "--temperature 0 --prompt");
    let said = good(c.arg("What is the capital of France?"));
    assert_eq!(said.out, "The capital of France is Paris.\n");
    let rows: String =
        (0..64).map(|i| format!("name[A{i}],The A{i} is a cheap place.\n")).collect();
    let pairs = dir.file("e2e.csv", format!("mr,ref\n{rows}").as_bytes());
    for flags in ["--method lora --pack", "--blocks-per-step 2"] {
        let out = dir.at("out");
        let mut c =
            with_model("finetune", &model, "--batch 2 --steps 2 --sample 0 --verify --json");
        c.args(["--gamma", "0.0625", "--replace", "--context", "128"]).args(flags.split(' '));
        let said = good(c.arg("--data").arg(&pairs).arg("--out").arg(&out));
        assert_eq!(said.json()["verify_mismatches"], 0, "{flags}");
    }
}
