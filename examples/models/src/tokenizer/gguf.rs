//! The tokenizer in the metadata of a GGUF file, as the `tokenizer.json` that it was made from.
//!
//! The files name a byte-level encoding's pre-tokenizer (`tokenizer.ggml.pre`) and have its merges.
//! Those of SentencePiece's kind have a score for each token; a merge is of two tokens that make up
//! a third one, and the better that one's score, the earlier it is done. Gemma's scores are not
//! those: there the order of the tokens counts.

use std::collections::HashMap;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::Inner;
use super::added::AddedToken;
use super::open::{self, Model};
use super::pipeline::GPT2;
use crate::gguf::{self, Gguf};

type Said<T> = Result<T, String>;

/// The expression of Llama 3's words.
pub(crate) const LLAMA3: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+\
     |\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const TEKKEN: &str = "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*\
     [\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+\
     [\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+\
     |\\s+(?!\\S)|\\s+";
const GPT4O: &str = "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*\
     [\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?\
     [\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*\
     (?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+\
     |\\s+(?!\\S)|\\s+";

/// A pre-tokenizer, and what its models have besides.
struct Pre {
    names: &'static [&'static str],
    pattern: &'static str,
    /// Digits are words of their own, before the pattern is applied.
    digits: bool,
    nfc: bool,
    /// Words that are tokens are these.
    whole_words: bool,
    adds_bos: bool,
}

const PLAIN: Pre = Pre {
    names: &["default", "gpt-2", "gpt2"],
    pattern: GPT2,
    digits: false,
    nfc: false,
    whole_words: false,
    adds_bos: false,
};

static PRES: [Pre; 6] = [
    PLAIN,
    Pre { names: &["smollm"], digits: true, ..PLAIN },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3"],
        pattern: LLAMA3,
        whole_words: true,
        adds_bos: true,
        ..PLAIN
    },
    Pre { names: &["qwen2", "deepseek-r1-qwen"], pattern: open::QWEN2, nfc: true, ..PLAIN },
    Pre { names: &["tekken"], pattern: TEKKEN, whole_words: true, ..PLAIN },
    Pre { names: &["gpt-4o"], pattern: GPT4O, ..PLAIN },
];

/// The longest token of which merges are sought: their number is that of its places.
const LONGEST: usize = 256;

/// Tokens in their order, as an object.
struct Vocab<'a>(&'a [String]);

impl Serialize for Vocab<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(Some(self.0.len()))?;
        for (id, token) in self.0.iter().enumerate() {
            map.serialize_entry(token, &id)?;
        }
        map.end()
    }
}

fn texts<'a>(file: &'a Gguf, key: &str) -> Said<Option<&'a [String]>> {
    match file.metadata.get(key) {
        None => Ok(None),
        Some(gguf::Value::Texts(all)) => Ok(Some(all)),
        // A list without an element has no type that can be told.
        Some(gguf::Value::Numbers(_, all)) if all.is_empty() => Ok(None),
        Some(_) => Err(format!("{key:?} is no list of texts")),
    }
}

fn numbers<'a>(file: &'a Gguf, key: &str, n: usize) -> Said<Option<&'a [f64]>> {
    match file.metadata.get(key) {
        None => Ok(None),
        Some(gguf::Value::Numbers(_, all)) if all.len() == n => Ok(Some(all)),
        Some(gguf::Value::Numbers(_, all)) => {
            Err(format!("{key:?} has {} values, expected {n}, one for each token", all.len()))
        }
        Some(_) => Err(format!("{key:?} is no list of numbers")),
    }
}

fn flag(file: &Gguf, key: &str) -> Option<bool> {
    match file.metadata.get(key)? {
        gguf::Value::Bool(b) => Some(*b),
        gguf::Value::Unsigned(n) => Some(*n != 0),
        _ => None,
    }
}

/// The tokenizer of a file.
pub(super) fn inner(file: &Gguf) -> Said<Inner> {
    let model = file.text("tokenizer.ggml.model").unwrap_or("nothing");
    let tokens = texts(file, "tokenizer.ggml.tokens")?.ok_or("no \"tokenizer.ggml.tokens\"")?;
    let types = numbers(file, "tokenizer.ggml.token_type", tokens.len())?;
    let id = |name: &str| -> Said<Option<&str>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = file.count(&key) else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| tokens.get(id));
        let n = tokens.len();
        token.map(|t| Some(&**t)).ok_or_else(|| format!("{key:?} is {id}, expected one below {n}"))
    };
    let (bos, eos, unknown) = (id("bos")?, id("eos")?, id("unknown")?);
    let adds = |default: bool| {
        flag(file, "tokenizer.ggml.add_bos_token").unwrap_or(default) && bos.is_some()
    };
    let first = |default: bool| match (bos, file.count("tokenizer.ggml.bos_token_id")) {
        (Some(token), Some(id)) if adds(default) => begins_with(token, id),
        _ => Value::Null,
    };
    let (json, adds_bos) = match model {
        "gpt2" => {
            let pre = pre(file)?;
            (byte_level(file, pre, tokens, types, first(pre.adds_bos))?, adds(pre.adds_bos))
        }
        "llama" => (sentencepiece(file, tokens, types, unknown, first(true))?, adds(true)),
        other => {
            let other: String = other.chars().take(40).collect();
            return Err(format!(
                "\"tokenizer.ggml.model\" is {other:?}, expected \"gpt2\" or \"llama\""
            ));
        }
    };
    let mut config = Map::new();
    config.insert("add_bos_token".into(), json!(adds_bos));
    config.insert("add_prefix_space".into(), json!(false));
    let pad = id("padding")?;
    for (name, text) in
        [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown), ("pad_token", pad)]
    {
        // As in other files, what is absent is null.
        config.insert(name.into(), json!(text));
    }
    if let Some(template) = file.text("tokenizer.chat_template") {
        config.insert("chat_template".into(), json!(template));
    }
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    config.insert(
        "model_max_length".into(),
        json!(
            file.text("general.architecture")
                .and_then(|name| file.count(&format!("{name}.context_length")))
                .unwrap_or(1 << 20)
        ),
    );
    // It takes everything from tokenizer.json.
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    let config = format!("{:#}\n", Value::Object(config));
    open::of_json(json.into_bytes(), config.into_bytes())
}

/// Control tokens, which are special, and tokens that users defined.
fn added(tokens: &[String], types: Option<&[f64]>) -> Vec<AddedToken> {
    const CONTROL: f64 = 3.0;
    const USER_DEFINED: f64 = 4.0;
    let all = tokens.iter().zip(0_u32..).zip(types.into_iter().flatten());
    all.filter(|(token, kind)| [CONTROL, USER_DEFINED].contains(kind) && !token.0.is_empty())
        .map(|((content, id), kind)| AddedToken {
            id,
            content: content.clone(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: *kind == CONTROL,
        })
        .collect()
}

/// A post-processor that puts a token before a text.
fn begins_with(token: &str, id: u64) -> Value {
    let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let [a, b] =
        [("A", 0), ("B", 1)].map(|(id, kind)| json!({"Sequence": {"id": id, "type_id": kind}}));
    let known = json!({"id": token, "ids": [id], "tokens": [token]});
    json!({"type": "TemplateProcessing", "single": [special, a], "pair": [special, a, special, b],
        "special_tokens": {token: known}})
}

fn pre(file: &Gguf) -> Said<&'static Pre> {
    let name = file.text("tokenizer.ggml.pre").unwrap_or("default");
    PRES.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
        let known: Vec<_> = PRES.iter().flat_map(|pre| pre.names).copied().collect();
        let name: String = name.chars().take(40).collect();
        format!("\"tokenizer.ggml.pre\" is {name:?}, expected one of {}", known.join(", "))
    })
}

fn byte_level(
    file: &Gguf,
    pre: &Pre,
    tokens: &[String],
    types: Option<&[f64]>,
    post_processor: Value,
) -> Said<String> {
    let merges = texts(file, "tokenizer.ggml.merges")?.ok_or("no \"tokenizer.ggml.merges\"")?;
    let merges: Said<Vec<_>> =
        merges.iter().map(|line| super::engine::merge_of_line(line)).collect();
    open::byte_level(
        &Vocab(tokens),
        &merges?,
        open::Pattern { pattern: pre.pattern, digits: pre.digits, nfc: pre.nfc },
        pre.whole_words,
        &added(tokens, types),
        post_processor,
    )
}

/// How words begin where a space has this character.
const SPACE: char = '\u{2581}';

fn sentencepiece(
    file: &Gguf,
    tokens: &[String],
    types: Option<&[f64]>,
    unknown: Option<&str>,
    post_processor: Value,
) -> Said<String> {
    let gemma = file.text("general.architecture").is_some_and(|name| name.starts_with("gemma"));
    // Gemma's files have runs of spaces as such, where its tokenizer.json has ▁ in their place.
    let spaces = |token: &str| token.len() > 1 && token.bytes().all(|b| b == b' ');
    let spelled = |token: &String| match gemma && spaces(token) {
        true => token.replace(' ', "\u{2581}"),
        false => token.clone(),
    };
    let tokens: Vec<String> = tokens.iter().map(spelled).collect();
    let added = added(&tokens, types);
    let merges = match texts(file, "tokenizer.ggml.merges")? {
        Some(merges) => {
            let all: Said<Vec<_>> =
                merges.iter().map(|line| super::engine::merge_of_line(line)).collect();
            all?
        }
        None => {
            let scores = numbers(file, "tokenizer.ggml.scores", tokens.len())?;
            let score = |id: usize| match scores {
                _ if gemma => Ok(-(id as f64)),
                Some(scores) => Ok(scores[id]),
                None => Err("neither \"tokenizer.ggml.merges\" nor \"tokenizer.ggml.scores\""),
            };
            let scores: Result<Vec<f64>, &str> = (0..tokens.len()).map(score).collect();
            merges_of(&tokens, &scores?)
        }
    };
    let bytes = (0..=255_u8).all(|b| tokens.contains(&format!("<0x{b:02X}>")));
    let prefix = !gemma && flag(file, "tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let space = SPACE.to_string();
    let replace = |from: &str, to: &str| {
        let pattern = json!({"String": from});
        json!({"type": "Replace", "pattern": pattern, "content": to})
    };
    let (normalizer, words) = if prefix {
        let words = json!({"type": "Metaspace", "replacement": space, "prepend_scheme": "first",
            "split": false});
        (Value::Null, words)
    } else {
        (replace(" ", &space), Value::Null)
    };
    let mut decoders = vec![replace(&space, " ")];
    decoders.push(json!({"type": "ByteFallback"}));
    decoders.push(json!({"type": "Fuse"}));
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let model = Model {
        kind: "BPE",
        dropout: None,
        unk_token: unknown,
        continuing_subword_prefix: None,
        end_of_word_suffix: None,
        fuse_unk: true,
        byte_fallback: bytes,
        ignore_merges: false,
        vocab: &Vocab(&tokens),
        merges: &merges,
    };
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    open::written(&added, [normalizer, words, post_processor, decoder], &model)
}

/// The merges of a vocabulary: every two tokens that make up a third, the better ones first.
fn merges_of(tokens: &[String], scores: &[f64]) -> Vec<(String, String)> {
    let ids: HashMap<&str, usize> = tokens.iter().map(|t| &**t).zip(0..).collect();
    // Score, lengths in characters of both sides, and both.
    let mut all: Vec<(f64, usize, usize, usize, usize)> = Vec::new();
    for (token, &score) in tokens.iter().zip(scores) {
        let length = token.chars().count();
        if length > LONGEST {
            continue;
        }
        let first = all.len();
        for (n, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (a, b) = token.split_at(at);
            if let (Some(&a), Some(&b)) = (ids.get(a), ids.get(b)) {
                all.push((score, n, length - n, a, b));
            }
        }
        all[first..].sort_by_key(|merge| (merge.3, merge.4));
    }
    // Equal ones stay in their order.
    all.sort_by(|x, y| y.0.total_cmp(&x.0).then((y.1, y.2).cmp(&(x.1, x.2))));
    all.into_iter().map(|(_, _, _, a, b)| (tokens[a].clone(), tokens[b].clone())).collect()
}
