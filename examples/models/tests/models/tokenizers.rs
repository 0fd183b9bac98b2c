//! Tokenizers and chat templates against transformers and tokenizers
//! (`tests/torch/tokenizer_files.py`): tiny ones of every kind, and those of real models, which
//! `BDIA_SMOLLM2` and `BDIA_GEMMA3` name.

use core::time::Duration;
use std::path::{Path, PathBuf};
use std::time::Instant;

use bdia_models::chat::{ChatError, ChatTemplate, Message};
use bdia_models::files::testing::TempDir;
use bdia_models::gguf::Gguf;
use bdia_models::tokenizer::{EOT, EOT_TEXT, SpecialTokens, Tokenizer, TokenizerError};
use serde::Deserialize;
use serde_json::{Value, json};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizers").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data(name)).unwrap()).unwrap()
}

fn of<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

fn open(kind: &str) -> Tokenizer {
    Tokenizer::open(&data(kind)).unwrap().unwrap()
}

fn gguf(kind: &str) -> Tokenizer {
    Tokenizer::of_gguf(&Gguf::open(&data(&format!("{kind}.gguf"))).unwrap()).unwrap()
}

const KINDS: [&str; 10] =
    ["gpt2", "smollm", "llama3", "qwen2", "tekken", "gpt4o", "llama2", "mistral", "gemma", "added"];

/// All texts, of the file and of the directory.
#[test]
fn tokens_are_those_of_hugging_face() {
    let expected = json("expected.json");
    let texts: Vec<String> = of(&expected["texts"]);
    let mut wrong = Vec::new();
    for kind in KINDS {
        let of_kind = &expected["kinds"][kind];
        let mut all = vec![(open(kind), "directory")];
        if of_kind["gguf"] == true {
            all.push((gguf(kind), "GGUF"));
        }
        for (t, from) in all {
            assert_eq!(t.vocab(), of::<usize>(&of_kind["vocab"]), "{kind}");
            assert_eq!(t.bos(), of::<Option<u32>>(&of_kind["bos"]), "{kind} {from}");
            assert_eq!(t.eos(), of::<Option<u32>>(&of_kind["eos"]), "{kind} {from}");
            for (special, way) in [(SpecialTokens::Parse, "parse"), (SpecialTokens::Text, "text")] {
                let t = t.clone().with_special_tokens(special);
                let all: Vec<Vec<u32>> = of(&of_kind[way]);
                for (text, ids) in texts.iter().zip(&all) {
                    if t.encode(text) != *ids {
                        wrong.push(format!(
                            "{kind} {from} {way} {text:?}: {:?}, expected {ids:?}",
                            t.encode(text)
                        ));
                    }
                }
                let texts: Vec<&str> = texts.iter().map(|t| &**t).collect();
                assert_eq!(t.encode_all(&texts).len(), all.len());
            }
            let ids: Vec<Vec<u32>> = of(&of_kind["parse"]);
            let decoded: Vec<String> = of(&of_kind["decoded"]);
            for (ids, text) in ids.iter().zip(decoded) {
                // Added tokens that are normalized are written as they are, not normalized.
                let text = if kind == "added" { text.replace("hello", "Hello") } else { text };
                let text = if kind == "added" { text.replace("<r>", "<R>") } else { text };
                if t.decode(ids) != text {
                    wrong.push(format!(
                        "{kind} {from} {ids:?}: {:?}, expected {text:?}",
                        t.decode(ids)
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn texts_come_back_from_their_tokens() {
    let texts: Vec<String> = of(&json("expected.json")["texts"]);
    for kind in KINDS {
        let t = open(kind);
        for special in [SpecialTokens::Parse, SpecialTokens::Text] {
            let t = t.clone().with_special_tokens(special);
            for text in &texts {
                let found = t.decode(&t.encode(text));
                match kind {
                    // Lower case, a space before, whitespace that belongs to tokens.
                    "added" => {}
                    "qwen2" if text.contains('\u{301}') => assert!(found.starts_with('é')),
                    // These are put in by the tokenizer, or stand for spaces.
                    "llama2" | "mistral" | "gemma" if text.contains('▁') => {}
                    "mistral" if special == SpecialTokens::Parse && text.contains("<s>") => {}
                    // It takes a space from the start, whether it has put it there or not.
                    "llama2" if text.starts_with(' ') => {
                        assert_eq!(found, text[1..], "{kind}");
                    }
                    _ => assert_eq!(found, *text, "{kind} {special:?}"),
                }
            }
        }
    }
}

#[test]
fn what_the_files_say_of_special_tokens() {
    let adds = KINDS.map(|kind| open(kind).adds_bos());
    assert_eq!(adds, [false, false, true, false, false, false, false, true, false, false]);
    assert!(gguf("llama2").adds_bos() && gguf("llama3").adds_bos() && !gguf("gpt2").adds_bos());
    let t = open("qwen2");
    let end = t.token("<|im_end|>").unwrap();
    assert_eq!(t.eos(), Some(end));
    assert!(t.is_special(end) && !t.is_special(t.token("<tool>").unwrap()));
    assert_eq!((t.token("Ġ"), t.token("nothing like it")), (Some(t.encode(" ")[0]), None));
    assert_eq!(t.decode(&[end, u32::MAX]), "<|im_end|>\u{fffd}");
    // What does not decide the tokens is not part of the digest.
    let digests: Vec<String> = KINDS.map(|kind| open(kind).digest()).into();
    for (kind, digest) in KINDS.iter().zip(&digests) {
        assert_eq!(digests.iter().filter(|d| *d == digest).count(), 1, "{kind}");
        if ["gpt2", "smollm", "llama3", "qwen2", "tekken", "gpt4o", "llama2"].contains(kind) {
            assert_eq!(gguf(kind).digest(), *digest, "{kind}");
        }
    }
    let gpt2 = Tokenizer::gpt2();
    assert_eq!((gpt2.bos(), gpt2.eos(), gpt2.adds_bos()), (Some(EOT), Some(EOT), false));
    assert_eq!((gpt2.token(EOT_TEXT), gpt2.token("Ġworld")), (Some(EOT), Some(995)));
    assert!(gpt2.is_special(EOT) && gpt2.chat().is_none() && gpt2.vocab() == EOT as usize + 1);
}

/// Files that are written are read as the same tokenizer, and those of a directory are unchanged.
#[test]
fn files_are_carried_along() {
    let text = "Hello <|im_end|> <s> 日本 ▁ 123";
    for kind in KINDS {
        let dir = TempDir::new();
        let t = open(kind);
        t.write_hf_files(dir.path(), 64).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let (a, b) = (dir.path().join(name), data(kind).join(name));
            assert_eq!(std::fs::read(a).unwrap(), std::fs::read(b).unwrap(), "{kind}");
        }
        let again = Tokenizer::open(dir.path()).unwrap().unwrap();
        assert_eq!(again.digest(), t.digest());
        if kind == "added" || kind == "mistral" {
            continue;
        }
        let (dir, t) = (TempDir::new(), gguf(kind));
        t.write_hf_files(dir.path(), 64).unwrap();
        let again = Tokenizer::open(dir.path()).unwrap().unwrap();
        assert_eq!(again.digest(), t.digest());
        assert_eq!((again.bos(), again.eos()), (t.bos(), t.eos()));
        assert_eq!(again.adds_bos(), t.adds_bos(), "{kind}");
        assert_eq!(again.encode(text), t.encode(text));
        let source = |t: &Tokenizer| t.chat().map(|c| c.source().to_string());
        assert_eq!(source(&again), source(&t));
    }
}

#[test]
fn transformers_reads_what_we_write() {
    let Some(python) = std::env::var_os("BDIA_PYTHON") else {
        println!("skipped: BDIA_PYTHON names no Python with transformers (tests/torch/README.md)");
        return;
    };
    let dir = TempDir::new();
    let write = |t: Tokenizer, name: String| {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        t.write_hf_files(&path, 64).unwrap();
    };
    for kind in KINDS {
        write(open(kind), kind.into());
        if data(&format!("{kind}.gguf")).exists() {
            write(gguf(kind), format!("{kind}-gguf"));
        }
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/torch/tokenizer_files.py");
    let mut command = std::process::Command::new(python);
    let output = command.arg("-B").arg(script).arg("check").arg(dir.path()).output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    assert!(output.status.success(), "{text}");
}

/// GPT-2's two files, alone and among others, are GPT-2's tokenizer.
#[test]
fn gpt2_is_known_by_its_files() {
    let (dir, gpt2) = (TempDir::new(), Tokenizer::gpt2());
    assert!(Tokenizer::open(dir.path()).unwrap().is_none());
    gpt2.write_hf_files(dir.path(), 1024).unwrap();
    let t = Tokenizer::open(dir.path()).unwrap().unwrap();
    assert_eq!(t.digest(), gpt2.digest());
    assert_eq!((t.bos(), t.eos(), t.vocab()), (Some(EOT), Some(EOT), EOT as usize + 1));
    let text = "Hello, world! <|endoftext|>  123 日本\n\n";
    for special in [SpecialTokens::Parse, SpecialTokens::Text] {
        let [t, gpt2] = [&t, &gpt2].map(|t| t.clone().with_special_tokens(special));
        assert_eq!(t.encode(text), gpt2.encode(text));
    }
    let other = TempDir::new();
    t.write_hf_files(other.path(), 0).unwrap();
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        let [a, b] = [&dir, &other].map(|dir| std::fs::read(dir.path().join(name)).unwrap());
        assert_eq!(a, b);
    }
    // Another vocabulary in such files.
    let tokens = json!({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3});
    dir.file("vocab.json", tokens.to_string().as_bytes());
    dir.file("merges.txt", b"#version: 0.2\na b\n");
    let t = Tokenizer::open(dir.path()).unwrap().unwrap();
    assert_eq!(
        t.clone().with_special_tokens(SpecialTokens::Parse).encode("ab<|endoftext|>a"),
        [2, 3, 0]
    );
    assert_eq!(t.vocab(), 4);
    std::fs::remove_file(dir.path().join("merges.txt")).unwrap();
    let error = Tokenizer::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("without merges.txt"), "{error}");
}

/// The tokens of a text as a whole are those of its words.
#[test]
fn pieces_change_no_token() {
    let texts: Vec<String> = of(&json("expected.json")["texts"]);
    let text = texts.concat().repeat(40);
    for kind in KINDS {
        let t = open(kind);
        // A tokenizer of Hugging Face's own, which cuts nothing.
        let own = tokenizers::Tokenizer::from_file(data(kind).join("tokenizer.json")).unwrap();
        let parse = t.clone().with_special_tokens(SpecialTokens::Parse);
        let expected = own.encode_fast(text.as_str(), false).unwrap();
        assert!(parse.encode(&text) == expected.get_ids(), "{kind}");
    }
}

/// What makes tokenizers slow, or makes them fail.
#[test]
fn a_megabyte_without_a_border_takes_seconds() {
    let n = 1_000_000;
    let stream = bdia_core::rng::Stream::new(6, 0, 0, 0, 0, bdia_core::rng::Draw::Data);
    let random = |of: &[u8]| -> String {
        (0..n).map(|i| char::from(of[stream.below(i, of.len() as u32) as usize])).collect()
    };
    let texts = [
        "e".repeat(n as usize),
        random(b"ACGT"),
        random(b"0123456789"),
        " ".repeat(n as usize),
        " ".repeat(n as usize) + "x",
        "\n".repeat(n as usize),
        " \n".repeat(n as usize / 2) + "x",
        "日".repeat(n as usize / 3),
        "'".repeat(n as usize),
        "e\u{301}".repeat(n as usize / 3),
        "<".repeat(n as usize),
        "<|im_end|>".repeat(n as usize / 10),
        "  <mask>".repeat(n as usize / 8),
        "\0".repeat(n as usize),
    ];
    let start = Instant::now();
    for kind in KINDS {
        let t = open(kind).with_special_tokens(SpecialTokens::Parse);
        for text in &texts {
            let began = Instant::now();
            let tokens = t.encode(text);
            if !["added", "llama2", "qwen2"].contains(&kind) {
                assert!(t.decode(&tokens) == *text, "{kind} {:?}", &text[..9]);
            }
            let (took, text) = (began.elapsed(), text.chars().take(9).collect::<String>());
            assert!(took < Duration::from_secs(10), "{kind} {text:?}: {took:?}");
        }
    }
    println!("{:?} for {} MB", start.elapsed(), KINDS.len() * texts.len());
}

#[test]
fn files_that_are_none_are_refused() {
    let good = json("gpt2/tokenizer.json");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut json = good.clone();
        change(&mut json);
        Tokenizer::from_json(json.to_string().as_bytes())
    };
    assert!(with(&|_| {}).is_ok());
    type Change<'a> = &'a dyn Fn(&mut Value);
    let cases: [(&str, Change<'_>); 18] = [
        ("BPE", &|j| j["model"] = json!({"type": "Unigram", "vocab": [["a", 0.0]]})),
        ("merges", &|j| j["model"] = json!({"type": "BPE", "vocab": {}})),
        ("same number 5", &|j| j["model"]["vocab"]["!"] = json!(5)),
        ("expected one below", &|j| j["model"]["vocab"]["!"] = json!(5000)),
        ("expected one below", &|j| j["model"]["vocab"]["!"] = json!(u64::MAX)),
        ("invalid value", &|j| j["model"]["vocab"]["!"] = json!(-1)),
        ("not in the vocabulary", &|j| j["model"]["merges"][0] = json!(["zzz", "a"])),
        ("not in the vocabulary", &|j| j["model"]["merges"][0] = json!("~ ~")),
        ("expected two tokens", &|j| j["model"]["merges"][0] = json!("a b c")),
        ("unk_token", &|j| j["model"]["unk_token"] = json!("nothing")),
        ("dropout", &|j| j["model"]["dropout"] = json!(0.5)),
        ("end_of_word_suffix", &|j| j["model"]["end_of_word_suffix"] = json!("</w>")),
        ("has number 7, expected 0", &|j| j["added_tokens"][0]["id"] = json!(7)),
        ("expected 600", &|j| {
            j["added_tokens"][0]["content"] = json!("<new>");
            j["added_tokens"][0]["id"] = json!(601);
        }),
        ("Precompiled", &|j| j["normalizer"] = json!({"type": "Precompiled"})),
        ("BertPreTokenizer", &|j| j["pre_tokenizer"] = json!({"type": "BertPreTokenizer"})),
        ("CTC", &|j| j["decoder"] = json!({"type": "CTC"})),
        ("look-around", &|j| {
            let pattern = json!({"Regex": "(?<=a)b"});
            let split = json!({"type": "Split", "pattern": pattern, "behavior": "Isolated"});
            j["pre_tokenizer"] = split;
        }),
    ];
    for (what, change) in cases {
        let error = with(change).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
    for bytes in [&b""[..], b"{", b"[]", b"{}", b"\xff", b"null"] {
        assert!(matches!(Tokenizer::from_json(bytes), Err(TokenizerError::Foreign { .. })));
    }
    let twice = good.to_string().replacen("\"!\":1", "\"!\":1,\"!\":1", 1);
    assert!(Tokenizer::from_json(twice.as_bytes()).is_err());
    let dir = TempDir::new();
    dir.file("tokenizer.model", b"");
    let error = Tokenizer::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.model") && error.contains("save_pretrained"), "{error}");
    dir.file("tokenizer.json", good.to_string().as_bytes());
    dir.file("tokenizer_config.json", b"{\"eos_token\": \"<nothing>\"}");
    let error = Tokenizer::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("eos_token \"<nothing>\" is no token"), "{error}");
    let file = std::fs::File::create(dir.path().join("tokenizer.json")).unwrap();
    file.set_len((1 << 26) + 1).unwrap();
    assert!(matches!(Tokenizer::open(dir.path()), Err(TokenizerError::File(_))));
}

#[test]
fn metadata_that_is_none_is_refused() {
    use bdia_models::gguf::Value as V;
    let good = Gguf::open(&data("gpt2.gguf")).unwrap();
    let with = |key: &str, value: Option<V>| {
        let mut file = good.clone();
        match value {
            Some(value) => file.metadata.insert(format!("tokenizer.ggml.{key}"), value),
            None => file.metadata.remove(&format!("tokenizer.ggml.{key}")),
        };
        Tokenizer::of_gguf(&file).unwrap_err().to_string()
    };
    let text = |text: &str| Some(V::Text(text.into()));
    for (what, error) in [
        ("\"wpm\", expected \"gpt2\" or \"llama\"", with("model", text("wpm"))),
        ("\"exotic\", expected one of default", with("pre", text("exotic"))),
        ("no \"tokenizer.ggml.tokens\"", with("tokens", None)),
        ("no \"tokenizer.ggml.merges\"", with("merges", None)),
        (
            "one for each token",
            with("token_type", Some(V::Numbers(bdia_models::gguf::Number::I32, vec![1.0]))),
        ),
        ("expected one below 600", with("eos_token_id", Some(V::Unsigned(600)))),
        ("nor \"tokenizer.ggml.scores\"", {
            let mut file = good.clone();
            file.metadata.insert("tokenizer.ggml.model".into(), V::Text("llama".into()));
            file.metadata.remove("tokenizer.ggml.merges");
            Tokenizer::of_gguf(&file).unwrap_err().to_string()
        }),
    ] {
        assert!(error.contains(what) && error.contains("gpt2.gguf"), "{what}: {error}");
    }
}

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: usize,
    prompt: bool,
    text: Option<String>,
    #[serde(default)]
    tokens: Vec<u32>,
    #[serde(default)]
    learned: Vec<u8>,
}

/// The tokenizer of conversations with another template.
fn with_template(source: &str) -> Tokenizer {
    let dir = TempDir::new();
    dir.file("tokenizer.json", &std::fs::read(data("smollm/tokenizer.json")).unwrap());
    dir.file("chat_template.jinja", source.as_bytes());
    let config = json!({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"});
    dir.file("tokenizer_config.json", config.to_string().as_bytes());
    Tokenizer::open(dir.path()).unwrap().unwrap()
}

#[test]
fn conversations_are_written_as_by_hugging_face() {
    let all = json("chat.json");
    let conversations: Vec<Vec<Message>> = of(&all["conversations"]);
    let cases: Vec<Case> = of(&all["cases"]);
    let mut wrong = Vec::new();
    for case in &cases {
        let template = all["templates"][&case.template].as_str().unwrap();
        let messages = &conversations[case.messages];
        let chat =
            ChatTemplate::parse(template, Some("<|endoftext|>"), Some("<|im_end|>")).unwrap();
        let found = chat.render(messages, case.prompt);
        let name = format!("{} {} {}", case.template, case.messages, case.prompt);
        match (&case.text, found) {
            (Some(text), Ok(found)) if found == *text => {}
            (None, Err(ChatError::Render(what))) => assert!(what.contains("take turns"), "{what}"),
            (text, found) => wrong.push(format!("{name}: {found:?}\nexpected {text:?}")),
        }
        if !case.tokens.is_empty() {
            let (tokens, learned) = with_template(template).encode_chat(messages).unwrap();
            assert_eq!(tokens, case.tokens, "{name}");
            let learned: Vec<u8> = learned.into_iter().map(u8::from).collect();
            if learned != case.learned {
                wrong.push(format!("{name}: {learned:?}\nexpected {:?}", case.learned));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Answers and the tokens that end them.
#[test]
fn answers_are_learned() {
    let all = json("chat.json");
    let conversations: Vec<Vec<Message>> = of(&all["conversations"]);
    for name in ["chatml", "headers", "inst", "turns", "python"] {
        let t = with_template(all["templates"][name].as_str().unwrap());
        for (n, messages) in conversations.iter().enumerate() {
            let (tokens, learned) = match t.encode_chat(messages) {
                Ok(both) => both,
                Err(e) => {
                    // An answer to nothing: turns in a wrong order, or another start.
                    assert_eq!(n, 8, "{name}: {e}");
                    continue;
                }
            };
            let text = t.chat().unwrap().render(messages, false).unwrap();
            let parse = t.clone().with_special_tokens(SpecialTokens::Parse);
            assert_eq!(tokens, parse.encode(&text));
            let mut runs: Vec<Vec<u32>> = vec![Vec::new()];
            for (token, learned) in tokens.iter().zip(&learned) {
                match learned {
                    true => runs.last_mut().unwrap().push(*token),
                    false if runs.last().unwrap().is_empty() => {}
                    false => runs.push(Vec::new()),
                }
            }
            runs.retain(|run| !run.is_empty());
            let said: Vec<&Message> = messages.iter().filter(|m| m.role == "assistant").collect();
            assert_eq!(runs.len(), said.len(), "{name} {n}");
            for (run, message) in runs.iter().zip(said) {
                let text = t.decode(run);
                let content = message.content.trim();
                let content = if name == "python" {
                    content.split("</think>").last().unwrap().trim()
                } else {
                    content
                };
                // A line break may be part of the token before the answer.
                assert!(text.contains(content), "{name} {n}: {text:?} of {content:?}");
                let end = match name {
                    "headers" => "<|eot|>",
                    "turns" => "<end>\n",
                    _ => "<|im_end|>",
                };
                assert!(text.ends_with(end), "{name} {n}: {text:?}");
            }
        }
    }
    let t = with_template(all["templates"]["rewriting"].as_str().unwrap());
    let error = t.encode_chat(&conversations[3]).unwrap_err();
    assert!(matches!(error, ChatError::NotAppended { message: 1 }), "{error}");
    assert!(matches!(open("gpt2").encode_chat(&conversations[0]), Err(ChatError::None)));
}

#[test]
fn templates_that_are_none_are_refused() {
    let parse = |text: &str| ChatTemplate::parse(text, None, None);
    for text in ["{% if %}", "{{", "{% for m in messages %}", "{% unheard_of %}"] {
        assert!(matches!(parse(text), Err(ChatError::Template(_))), "{text}");
    }
    let render = |text: &str| {
        let message = Message { role: "user".into(), content: "x".into() };
        parse(text).unwrap().render(&[message], false)
    };
    for text in [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}\
         {% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{{ 'a' * 999 }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages.nothing.nothing }}",
        "{{ none | tojson(indent='x') }}",
        "{{ ''.split()[::-1] }}",
        "{{ [][::-1] }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ] {
        assert!(matches!(render(text), Err(ChatError::Render(_))), "{text}: {:?}", render(text));
    }
    // A tokenizer can be used for all else.
    let t = with_template("{% if %}");
    assert!(!t.encode("x").is_empty());
    assert!(matches!(t.encode_chat(&[]), Err(ChatError::Template(_))));
    assert_eq!(render("{{ strftime_now('%%') }}{{ messages[0]['content'] }}").unwrap(), "%x");
    let json = "{{ {'a': [1, 2.5, none, true], 'b': 'é<'} | tojson }}";
    assert_eq!(render(json).unwrap(), "{\"a\": [1, 2.5, null, true], \"b\": \"é<\"}");
    assert_eq!(
        render("{{ {'a': [1]} | tojson(indent=2) }}").unwrap(),
        "{\n  \"a\": [\n    1\n  ]\n}"
    );
}

/// A file that a variable of the environment names, or why the test is skipped.
fn real(variable: &str) -> Option<Gguf> {
    let path = std::env::var_os(variable);
    match path.filter(|path| Path::new(path).is_file()) {
        Some(path) => Some(Gguf::open(Path::new(&path)).unwrap()),
        None => {
            println!("skipped: {variable} names no GGUF file");
            None
        }
    }
}

/// Texts of several kinds, if they are there.
fn real_texts() -> Option<Vec<String>> {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let data = std::env::var_os("BDIA_DATA").map_or(shared, PathBuf::from);
    let read = |name: &str| std::fs::read_to_string(data.join(name)).ok();
    let all: Option<Vec<String>> =
        ["text/gum_web.txt", "text/rust_blog.txt", "text/wikitext2_valid.txt", FRENCH]
            .into_iter()
            .map(read)
            .collect();
    if all.is_none() {
        println!("skipped: {} has no texts; BDIA_DATA names the directory", data.display());
    }
    all
}

const FRENCH: &str = "enfr/eng_-french.csv";

/// Digest of the tokens of all texts, as `tokenizer_files.py real` prints it.
fn digest(t: &Tokenizer, texts: &[String]) -> String {
    let texts: Vec<&str> = texts.iter().map(|t| &**t).collect();
    let start = Instant::now();
    let tokens = t.encode_all(&texts).concat();
    println!("{} tokens in {:?}", tokens.len(), start.elapsed());
    let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    format!("{} {:016x}", tokens.len(), xxhash_rust::xxh3::xxh3_64(&bytes))
}

#[test]
fn smollm2_has_the_tokens_of_transformers() {
    let (Some(file), Some(texts)) = (real("BDIA_SMOLLM2"), real_texts()) else { return };
    let t = Tokenizer::of_gguf(&file).unwrap().with_special_tokens(SpecialTokens::Parse);
    assert_eq!(digest(&t, &texts), SMOLLM2);
    assert_eq!((t.bos(), t.eos(), t.adds_bos(), t.vocab()), (Some(1), Some(2), false, 49_152));
    let mut text = String::new();
    let conversations: Vec<Vec<Message>> = of(&json("chat.json")["conversations"]);
    for messages in &conversations {
        for prompt in [false, true] {
            text += &t.chat().unwrap().render(messages, prompt).unwrap();
        }
    }
    // What apply_chat_template writes.
    let digest = xxhash_rust::xxh3::xxh3_64(text.as_bytes());
    assert_eq!((text.len(), digest), (3726, 0xbc81_a4ff_29e7_3025));
    let hi = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let (tokens, learned) = t.encode_chat(&[hi("user", "Hi"), hi("assistant", "Hello!")]).unwrap();
    let text: Vec<u32> = (tokens.iter().zip(&learned)).filter(|t| *t.1).map(|t| *t.0).collect();
    assert_eq!(t.decode(&text), "Hello!<|im_end|>");
    assert!(t.decode(&tokens).starts_with("<|im_start|>system\nYou are a helpful AI"));
}

#[test]
fn gemma3_has_the_tokens_of_transformers() {
    let (Some(file), Some(texts)) = (real("BDIA_GEMMA3"), real_texts()) else { return };
    let t = Tokenizer::of_gguf(&file).unwrap().with_special_tokens(SpecialTokens::Parse);
    assert_eq!(digest(&t, &texts), GEMMA3);
    assert_eq!((t.bos(), t.eos(), t.adds_bos(), t.vocab()), (Some(2), Some(1), true, 262_144));
    for text in &texts {
        assert!(t.decode(&t.encode(text)) == *text);
    }
}

const SMOLLM2: &str = "3728748 6df977f20a91c193";
const GEMMA3: &str = "3336397 96a493fb1d667a19";
