//! What a GGUF file says of a tokenizer, from Hugging Face's `tokenizer.json`.
//!
//! llama.cpp has tokenizers of its own, each with its name. Two kinds of Hugging Face's are known
//! to be among them, and everything else is refused, because it would cut texts in other places:
//!
//! - BPE of bytes, with words cut as GPT-2, SmolLM 2, Llama 3 or Qwen 2 do it: `gpt2`, with one of
//!   [`CUTS`];
//! - BPE of characters, with bytes for those that it does not have (Llama 2, Mistral, Gemma):
//!   `llama`. It comes from SentencePiece, whose merges are all pairs that make a token, in the
//!   order of the tokens; their scores are that order again.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value as Json};

use crate::gguf::{Number, Value, WriteError};
use crate::tokenizer::gguf::LLAMA3;
use crate::tokenizer::open::{QWEN2, template};

/// Types of tokens.
const NORMAL: f64 = 1.0;
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;
pub(super) const UNUSED: f64 = 5.0;
const BYTE: f64 = 6.0;

/// The most tokens that are listed: more than any vocabulary.
const MOST: u64 = 1 << 22;

/// llama.cpp's names of how words are cut, as far as they are recognized.
pub const CUTS: [&str; 4] = ["gpt-2", "smollm", "llama-bpe", "qwen2"];

fn unfit(what: &str, expected: &str, found: impl ToString) -> WriteError {
    WriteError::unfit(what, expected, found.to_string().chars().take(120).collect::<String>())
}

/// The entries `tokenizer.*` of a GGUF file, from the texts of a `tokenizer.json` and of the
/// `tokenizer_config.json` beside it, which says which tokens begin and end a text, and has the
/// template of chats.
///
/// # Errors
/// Files that are no such JSON, and tokenizers that llama.cpp does not have.
pub fn tokenizer_metadata(
    json: &[u8],
    config_json: Option<&[u8]>,
) -> Result<Vec<(String, Value)>, WriteError> {
    let parse = |name: &str, bytes: &[u8]| -> Result<Json, WriteError> {
        serde_json::from_slice(bytes).map_err(|e| unfit(name, "JSON", e))
    };
    let json = parse("tokenizer.json", json)?;
    let config = config_json.map(|b| parse("tokenizer_config.json", b)).transpose()?;
    let model = json.get("model").and_then(Json::as_object);
    let model = model.ok_or_else(|| unfit("tokenizer.json", "a field model", "none"))?;
    let kind = model.get("type").and_then(Json::as_str).unwrap_or("BPE");
    if kind != "BPE" {
        return Err(unfit("the model of tokenizer.json", "BPE", kind));
    }
    for name in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model.get(name).and_then(Json::as_str).is_some_and(|text| !text.is_empty()) {
            return Err(unfit(name, "nothing", "a text"));
        }
    }
    let tokens = Tokens::read(&json, model)?;
    let merges = merges(model)?;
    let flag = |name: &str| model.get(name).and_then(Json::as_bool).unwrap_or(false);

    let mut all = Vec::new();
    let mut put = |key: &str, value: Value| all.push((format!("tokenizer.ggml.{key}"), value));
    let texts = Value::Texts(tokens.list.iter().map(|t| t.0.clone()).collect());
    let mut types: Vec<f64> = tokens.list.iter().map(|t| t.1).collect();
    let unknown = model.get("unk_token").and_then(Json::as_str).and_then(|t| tokens.id(t));
    if flag("byte_fallback") {
        let scores = scores(&tokens, &merges)?;
        for ((text, _), kind) in tokens.list.iter().zip(&mut types) {
            if *kind == NORMAL && is_byte(text) {
                *kind = BYTE;
            }
        }
        if let Some(kind) = unknown.and_then(|id| types.get_mut(id)) {
            *kind = UNKNOWN;
        }
        put("model", Value::Text("llama".into()));
        put("pre", Value::Text("default".into()));
        put("tokens", texts);
        put("scores", Value::Numbers(Number::F32, scores));
        put("token_type", Value::Numbers(Number::I32, types));
        put("add_space_prefix", Value::Bool(prefix(&json)?));
    } else {
        let cut = cut(&json, flag("ignore_merges"))?;
        let joined = merges.iter().map(|[a, b]| format!("{a} {b}")).collect();
        put("model", Value::Text("gpt2".into()));
        put("pre", Value::Text(cut.into()));
        put("tokens", texts);
        put("token_type", Value::Numbers(Number::I32, types));
        put("merges", Value::Texts(joined));
        put("add_space_prefix", Value::Bool(false));
    }

    let config = config.as_ref().and_then(Json::as_object);
    let named = |name: &str| {
        let token = config?.get(name)?;
        let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
        tokens.id(text)
    };
    for (key, name, other) in [
        ("bos_token_id", "bos_token", None),
        ("eos_token_id", "eos_token", None),
        ("unknown_token_id", "unk_token", unknown),
        ("padding_token_id", "pad_token", None),
    ] {
        if let Some(id) = named(name).or(other) {
            put(key, Value::Unsigned(id as u64));
        }
    }
    let [first, last] = around(&json);
    let said = |name: &str| config.and_then(|c| c.get(name)).and_then(Json::as_bool);
    put("add_bos_token", Value::Bool(said("add_bos_token").unwrap_or(first)));
    put("add_eos_token", Value::Bool(said("add_eos_token").unwrap_or(last)));
    if let Some(template) = config.and_then(|c| c.get("chat_template")).and_then(template) {
        all.push(("tokenizer.chat_template".into(), Value::Text(template.into())));
    }
    Ok(all)
}

/// Tokens by number, with their types.
struct Tokens {
    list: Vec<(String, f64)>,
    /// By the texts of `tokenizer.json`.
    ids: BTreeMap<String, usize>,
}

impl Tokens {
    fn id(&self, text: &str) -> Option<usize> {
        self.ids.get(text).copied()
    }

    fn read(json: &Json, model: &Map<String, Json>) -> Result<Self, WriteError> {
        let expected = "tokens with numbers of their own";
        let wrong = |found: String| unfit("the vocabulary of tokenizer.json", expected, found);
        let vocab = model.get("vocab").and_then(Json::as_object);
        let vocab = vocab.ok_or_else(|| wrong("nothing".into()))?;
        let mut found: BTreeMap<usize, (String, f64)> = BTreeMap::new();
        let mut ids = BTreeMap::new();
        let id = |n: Option<&Json>| {
            let id = n.and_then(Json::as_u64).filter(|n| *n < MOST);
            id.map(|n| n as usize)
        };
        for (text, n) in vocab {
            let n = id(Some(n)).ok_or_else(|| wrong(format!("{text:?}: {n}")))?;
            ids.insert(text.clone(), n);
            if let Some((other, _)) = found.insert(n, (text.clone(), NORMAL)) {
                return Err(wrong(format!("{n} for {other:?} and {text:?}")));
            }
        }
        let bytes = model.get("byte_fallback").and_then(Json::as_bool).unwrap_or(false);
        let added = json.get("added_tokens").and_then(Json::as_array);
        for token in added.into_iter().flatten() {
            let text = token.get("content").and_then(Json::as_str);
            let (Some(text), Some(n)) = (text, id(token.get("id"))) else {
                return Err(wrong(format!("the added {token}")));
            };
            if found.get(&n).is_some_and(|(other, _)| other != text) {
                return Err(wrong(format!("{n} for {text:?} and another")));
            }
            if ids.insert(text.into(), n).is_some_and(|other| other != n) {
                return Err(wrong(format!("two for {text:?}")));
            }
            let special = token.get("special").and_then(Json::as_bool).unwrap_or(false);
            if special || looks_special(text) {
                found.insert(n, (text.into(), CONTROL));
            } else {
                // What stands for a space in the vocabulary is one in what a user has defined.
                let text = if bytes { text.replace('▁', " ") } else { text.into() };
                found.insert(n, (text, USER_DEFINED));
            }
        }
        let len = found.keys().next_back().map_or(0, |n| n + 1);
        // Gaps are filled, so that one large number must not take memory.
        if len > 2 * found.len() + 1024 {
            return Err(wrong(format!("{} tokens up to number {len}", found.len())));
        }
        let token = |n: usize| found.remove(&n).unwrap_or((format!("[PAD{n}]"), UNUSED));
        Ok(Self { list: (0..len).map(token).collect(), ids })
    }
}

/// Tokens that are meant to be special where a file forgets to say it, by llama.cpp's converter.
fn looks_special(text: &str) -> bool {
    matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || text.starts_with("<|") && text.ends_with("|>")
        || text.starts_with("<｜") && text.ends_with("｜>")
        || text.starts_with("<unused") && text.ends_with('>')
}

/// Whether it stands for a byte: `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
}

fn merges(model: &Map<String, Json>) -> Result<Vec<[String; 2]>, WriteError> {
    let all = model.get("merges").and_then(Json::as_array).map_or(&[][..], Vec::as_slice);
    let pair = |merge: &Json| -> Option<[String; 2]> {
        let (a, b) = match merge {
            Json::String(text) => text.split_once(' ')?,
            Json::Array(two) if two.len() == 2 => (two[0].as_str()?, two[1].as_str()?),
            _ => return None,
        };
        Some([a.into(), b.into()])
    };
    let read = |merge| pair(merge).ok_or_else(|| unfit("a merge", "two tokens", merge));
    all.iter().map(read).collect()
}

/// The scores by which SentencePiece merges in the order of these merges.
fn scores(tokens: &Tokens, merges: &[[String; 2]]) -> Result<Vec<f64>, WriteError> {
    let mut scores: Vec<Option<f64>> = vec![None; tokens.list.len()];
    let (mut last, mut rank) = (None, 0.0);
    for [a, b] in merges {
        let made = format!("{a}{b}");
        let id = tokens.id(&made);
        let id = id.ok_or_else(|| unfit("a merge", "one that makes a token", &made))?;
        if last == Some(id) {
            continue;
        }
        // A score has one place for all merges that make the token.
        if scores[id].is_some() {
            let expected = "the order of SentencePiece: merges that make the same token follow \
                            one another";
            return Err(unfit("the merges of tokenizer.json", expected, format!("{made:?} twice")));
        }
        scores[id] = Some(-rank);
        rank += 1.0;
        last = Some(id);
    }
    // SentencePiece merges whatever makes a token; Hugging Face's tokenizers only what is listed.
    let listed: BTreeSet<[&str; 2]> = merges.iter().map(|[a, b]| [a.as_str(), b]).collect();
    let normal = |text: &str| {
        tokens.id(text).is_some_and(|id| tokens.list[id].1 == NORMAL) && !is_byte(text)
    };
    for text in tokens.ids.keys().filter(|text| normal(text)) {
        for (at, _) in text.char_indices().skip(1) {
            let (a, b) = text.split_at(at);
            if normal(a) && normal(b) && !listed.contains(&[a, b]) {
                let expected = "all pairs that make a token, as in those of SentencePiece";
                return Err(unfit(
                    "the merges of tokenizer.json",
                    expected,
                    format!("no {a:?} {b:?}"),
                ));
            }
        }
    }
    // What no merge makes is never looked up.
    let rest = tokens.list.iter().map(|(_, kind)| if *kind == NORMAL { -rank } else { 0.0 });
    Ok(scores.into_iter().zip(rest).map(|(score, rest)| score.unwrap_or(rest)).collect())
}

/// The parts of a normalizer, pre-tokenizer or post-processor, one after the other.
fn parts<'a>(json: &'a Json, name: &str, list: &str) -> Vec<&'a Json> {
    match json.get(name) {
        None | Some(Json::Null) => Vec::new(),
        Some(one) if kind(one) == "Sequence" => {
            one.get(list).and_then(Json::as_array).into_iter().flatten().collect()
        }
        Some(one) => vec![one],
    }
}

fn kind(part: &Json) -> &str {
    part.get("type").and_then(Json::as_str).unwrap_or("")
}

fn is(part: &Json, name: &str, default: bool) -> bool {
    part.get(name).and_then(Json::as_bool).unwrap_or(default)
}

/// llama.cpp's name of how words are cut.
fn cut(json: &Json, ignore_merges: bool) -> Result<&'static str, WriteError> {
    let parts_of = parts(json, "pre_tokenizer", "pretokenizers");
    let what = "how tokenizer.json cuts words";
    let expected = format!("that of one of {}", CUTS.join(", "));
    let shown = || json.get("pre_tokenizer").map_or("nothing".into(), Json::to_string);
    let bytes = |part: &Json, regex: bool| {
        kind(part) == "ByteLevel"
            && !is(part, "add_prefix_space", true)
            && is(part, "use_regex", true) == regex
    };
    let split = |part: &Json, regex: &str| {
        kind(part) == "Split"
            && part.pointer("/pattern/Regex").and_then(Json::as_str) == Some(regex)
            && part.get("behavior").and_then(Json::as_str) == Some("Isolated")
            && !is(part, "invert", false)
    };
    let digits = |part: &Json| kind(part) == "Digits" && is(part, "individual_digits", false);
    let found = match parts_of.as_slice() {
        [b] if bytes(b, true) => "gpt-2",
        [d, b] if digits(d) && bytes(b, true) => "smollm",
        [s, b] if split(s, LLAMA3) && bytes(b, false) => "llama-bpe",
        [s, b] if split(s, QWEN2) && bytes(b, false) => "qwen2",
        _ => return Err(unfit(what, &expected, shown())),
    };
    for part in parts(json, "normalizer", "normalizers") {
        // llama.cpp leaves it out for Qwen, too.
        if found != "qwen2" || kind(part) != "NFC" {
            return Err(unfit("the normalizer of tokenizer.json", "none", part));
        }
    }
    if ignore_merges != (found == "llama-bpe") {
        let expected = format!("{} for {found}", found == "llama-bpe");
        return Err(unfit("ignore_merges of tokenizer.json", &expected, ignore_merges));
    }
    Ok(found)
}

/// Whether a space is put before a text, of a tokenizer that comes from SentencePiece.
fn prefix(json: &Json) -> Result<bool, WriteError> {
    let text = |part: &Json, at: &str| part.pointer(at).and_then(Json::as_str) == Some(" ");
    let mark = |part: &Json, at: &str| part.get(at).and_then(Json::as_str) == Some("▁");
    let (mut before, mut replaced) = (false, false);
    for part in parts(json, "normalizer", "normalizers") {
        match kind(part) {
            "Prepend" if mark(part, "prepend") => before = true,
            "Replace" if text(part, "/pattern/String") && mark(part, "content") => replaced = true,
            _ => return Err(unfit("the normalizer", "▁ before a text and for a space", part)),
        }
    }
    for part in parts(json, "pre_tokenizer", "pretokenizers") {
        let scheme = part.get("prepend_scheme").and_then(Json::as_str);
        match kind(part) {
            // With ▁ for all spaces there is nothing left to cut.
            "Split" if replaced && text(part, "/pattern/String") => {}
            "Metaspace" if mark(part, "replacement") && !is(part, "split", true) => {
                replaced = true;
                before |= scheme.map_or(is(part, "add_prefix_space", true), |s| s != "never");
            }
            _ => return Err(unfit("how tokenizer.json cuts words", "not at all", part)),
        }
    }
    if replaced {
        return Ok(before);
    }
    Err(unfit("the normalizer", "▁ for a space", "nothing"))
}

/// Whether a token is put before and after a text.
fn around(json: &Json) -> [bool; 2] {
    let special = |part: Option<&Json>| part.is_some_and(|p| p.get("SpecialToken").is_some());
    let mut found = [false; 2];
    for part in parts(json, "post_processor", "processors") {
        if let Some(single) = part.get("single").and_then(Json::as_array) {
            found = [special(single.first()), special(single.last())];
        }
    }
    found
}
