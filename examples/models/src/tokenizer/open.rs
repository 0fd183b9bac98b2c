//! The files of a model's directory that make up its tokenizer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::added::AddedToken;
use super::engine::{Engine, Named, merge_of_line};
use super::gpt2::{self, Gpt2};
use super::pipeline::GPT2;
use super::{Inner, Kind, TokenizerError};
use crate::chat::ChatTemplate;
use crate::files::{FileError, read_limited};

/// The file that has all of a tokenizer.
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const GENERATION: &str = "generation_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const TEMPLATE_JSON: &str = "chat_template.json";
const VOCAB: &str = "vocab.json";
const MERGES: &str = "merges.txt";
const ADDED: &str = "added_tokens.json";
/// SentencePiece's own file.
const SENTENCEPIECE: &str = "tokenizer.model";

/// The largest file that is read: Gemma's `tokenizer.json` has 33 MB.
const LIMIT: u64 = 1 << 26;
/// The largest of the other ones.
const SMALL: u64 = 1 << 24;

/// The expression of Qwen's words.
pub(crate) const QWEN2: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}\
     | ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

type Said<T> = Result<T, String>;

/// A file, if it is there.
fn read(dir: &Path, name: &str, limit: u64) -> Result<Option<Vec<u8>>, FileError> {
    match read_limited(&dir.join(name), limit) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(FileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// What the files beside the vocabulary say.
#[derive(Default)]
struct Beside {
    config: Value,
    map: Value,
    generation: Value,
    /// `added_tokens.json`.
    added: Value,
    template: Option<String>,
}

/// A token in a configuration: its text, or an object that has it.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn special(content: &str) -> AddedToken {
    AddedToken {
        id: 0,
        content: content.into(),
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
        special: true,
    }
}

/// A template of chats, or of several the default one.
pub(crate) fn template(found: &Value) -> Option<&str> {
    let named = |t: &&Value| t.get("name").and_then(Value::as_str) == Some("default");
    match found {
        Value::Array(all) => all.iter().find(named)?.get("template")?.as_str(),
        one => one.as_str(),
    }
}

impl Beside {
    /// The text of `bos_token` or the like.
    fn token(&self, name: &str) -> Option<&str> {
        let of = |value: &'_ Value| value.get(name).is_some();
        let value = if of(&self.config) { &self.config } else { &self.map };
        token_text(value.get(name)?)
    }

    /// Tokens that these files name.
    fn named(&self) -> Said<Vec<Named>> {
        let mut all = BTreeMap::new();
        let decoder = self.config.get("added_tokens_decoder").and_then(Value::as_object);
        for (id, token) in decoder.into_iter().flatten() {
            let wrong = |what: &str| format!("\"added_tokens_decoder\" has {id:?}: {what}");
            let number: u32 = id.parse().map_err(|_| wrong("expected a number"))?;
            let mut token: AddedToken =
                serde_json::from_value(token.clone()).map_err(|e| wrong(&e.to_string()))?;
            token.id = number;
            all.insert(number, token);
        }
        for (text, id) in self.added.as_object().into_iter().flatten() {
            let wrong = || format!("{ADDED} has {id}, expected a number");
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong)?;
            all.entry(id).or_insert(AddedToken { id, special: false, ..special(text) });
        }
        let mut all: Vec<Named> = all.into_values().map(|token| (token, true)).collect();
        for name in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"] {
            all.extend(self.token(name).map(|text| (special(text), false)));
        }
        for name in ["additional_special_tokens", "extra_special_tokens"] {
            let list = self.config.get(name).or_else(|| self.map.get(name));
            let list = list.and_then(Value::as_array);
            let texts = list.into_iter().flatten().filter_map(token_text);
            all.extend(texts.map(|text| (special(text), false)));
        }
        Ok(all)
    }

    /// The chat template: of its own file, or of the configuration.
    fn template(&self) -> Option<&str> {
        if let Some(text) = &self.template {
            return Some(text);
        }
        template(self.config.get("chat_template")?)
    }

    fn inner(&self, kind: Kind, files: Vec<(&'static str, Vec<u8>)>) -> Said<Inner> {
        let token = |text: &str| match &kind {
            Kind::Gpt2(gpt2) => gpt2.token(text),
            Kind::Engine(engine) => engine.token(text),
        };
        let vocab = match &kind {
            Kind::Gpt2(_) => gpt2::VOCAB,
            Kind::Engine(engine) => engine.vocab(),
        };
        let first = match &kind {
            Kind::Gpt2(_) => None,
            Kind::Engine(engine) => engine.first,
        };
        let named = |name: &str, number: &str| -> Said<Option<u32>> {
            if let Some(text) = self.token(name) {
                let shown: String = text.chars().take(40).collect();
                let found = token(text);
                return found.map(Some).ok_or_else(|| format!("{name} {shown:?} is no token"));
            }
            let found = self.generation.get(number).and_then(|value| match value {
                Value::Array(all) => all.first()?.as_u64(),
                other => other.as_u64(),
            });
            Ok(found.filter(|&id| id < vocab as u64).map(|id| id as u32))
        };
        let bos = named("bos_token", "bos_token_id")?.or(first);
        let eos = named("eos_token", "eos_token_id")?;
        let adds = self.config.get("add_bos_token").and_then(Value::as_bool);
        let adds_bos = bos.is_some() && adds.unwrap_or(first.is_some() && first == bos);
        let text_of = |name, id: Option<u32>| {
            let of_engine = || match (&kind, id?) {
                (Kind::Gpt2(_), _) => None,
                (Kind::Engine(engine), id) => engine.text(id),
            };
            self.token(name).or_else(of_engine)
        };
        let chat = self.template().map(|template| {
            let names = [
                ("bos_token", text_of("bos_token", bos)),
                ("eos_token", text_of("eos_token", eos)),
            ];
            ChatTemplate::kept(template, names[0].1, names[1].1)
        });
        Ok(Inner { kind, bos, eos, adds_bos, chat, files })
    }
}

/// GPT-2's, where it is that, or what the files describe.
fn kind(engine: Engine) -> Kind {
    if engine.digest == gpt2::DIGEST {
        Kind::Gpt2(Gpt2::new())
    } else {
        Kind::Engine(Box::new(engine))
    }
}

/// A `tokenizer.json`, with `tokenizer_config.json` where there is one.
pub(super) fn of_json(json: Vec<u8>, config: Vec<u8>) -> Said<Inner> {
    let mut beside = Beside::default();
    if !config.is_empty() {
        beside.config = serde_json::from_slice(&config).map_err(|e| e.to_string())?;
    }
    let kind = kind(Engine::read(&json, &beside.named()?)?);
    let mut files = vec![(TOKENIZER, json)];
    if !config.is_empty() {
        files.push((CONFIG, config));
    }
    beside.inner(kind, files)
}

/// What a directory has.
pub(super) fn open(dir: &Path) -> Result<Option<Inner>, TokenizerError> {
    let foreign = |name: &str| {
        let path: PathBuf = dir.join(name);
        move |what: String| TokenizerError::Foreign { path, what }
    };
    let mut files: Vec<(&'static str, Vec<u8>)> = Vec::new();
    for name in [TOKENIZER, VOCAB, MERGES] {
        if let Some(bytes) = read(dir, name, LIMIT)? {
            files.push((name, bytes));
        }
    }
    let has = |name: &str| files.iter().position(|file| file.0 == name);
    let (json, vocab, merges) = (has(TOKENIZER), has(VOCAB), has(MERGES));
    if json.is_none() && (vocab.is_none() || merges.is_none()) {
        // One of the two alone is no tokenizer, but somebody means it to be one.
        for (found, name, other) in [(vocab, VOCAB, MERGES), (merges, MERGES, VOCAB)] {
            if found.is_some() {
                return Err(foreign(name)(format!(
                    "a tokenizer without {other}: expected both, or {TOKENIZER}"
                )));
            }
        }
        if dir.join(SENTENCEPIECE).exists() {
            return Err(foreign(SENTENCEPIECE)(format!(
                "SentencePiece's own file is not read, expected {TOKENIZER} beside it: \
                 AutoTokenizer.from_pretrained(…).save_pretrained(…) writes one"
            )));
        }
        return Ok(None);
    }
    let mut beside = Beside::default();
    for name in [CONFIG, MAP, GENERATION, TEMPLATE_JSON, ADDED] {
        if name == ADDED && json.is_some() {
            continue;
        }
        let Some(bytes) = read(dir, name, SMALL)? else { continue };
        let value: Value = serde_json::from_slice(&bytes)
            .map_err(|e| foreign(name)(format!("not valid JSON: {e}")))?;
        if !value.is_object() {
            return Err(foreign(name)("expected an object".into()));
        }
        match name {
            CONFIG => beside.config = value,
            MAP => beside.map = value,
            // It belongs to the model and is written with that.
            GENERATION => {
                beside.generation = value;
                continue;
            }
            ADDED => beside.added = value,
            _ => {
                let text = value.get("chat_template").and_then(Value::as_str);
                beside.template = text.map(Into::into);
            }
        }
        files.push((name, bytes));
    }
    if let Some(bytes) = read(dir, TEMPLATE, SMALL)? {
        let text = String::from_utf8(bytes.clone());
        let text = text.map_err(|_| foreign(TEMPLATE)("not UTF-8".into()))?;
        beside.template = Some(text);
        files.push((TEMPLATE, bytes));
    }
    let named = beside.named().map_err(foreign(CONFIG))?;
    let (engine, name) = match json {
        Some(at) => (Engine::read(&files[at].1, &named), TOKENIZER),
        None => {
            let file = |name: &str| files.iter().find(|file| file.0 == name).map(|file| &*file.1);
            let [vocab, merges] = [VOCAB, MERGES].map(|name| file(name).unwrap_or_default());
            let class = beside.config.get("tokenizer_class").and_then(Value::as_str);
            let json = of_vocab_and_merges(vocab, merges, class);
            (json.and_then(|json| Engine::read(&json, &named)), VOCAB)
        }
    };
    let engine = engine.map_err(foreign(name))?;
    if json.is_some() {
        // What transformers would not look at.
        files.retain(|file| file.0 != VOCAB && file.0 != MERGES);
    }
    Ok(Some(beside.inner(kind(engine), files).map_err(foreign(CONFIG))?))
}

/// The `tokenizer.json` of a byte-level encoding in GPT-2's two files.
fn of_vocab_and_merges(vocab: &[u8], merges: &[u8], class: Option<&str>) -> Said<Vec<u8>> {
    let qwen = match class.map(|class| class.trim_end_matches("Fast")) {
        None | Some("GPT2Tokenizer") => false,
        Some("Qwen2Tokenizer") => true,
        Some(other) => {
            let shown: String = other.chars().take(40).collect();
            return Err(format!(
                "\"tokenizer_class\" is {shown:?}; without {TOKENIZER}, expected GPT2Tokenizer or \
                 Qwen2Tokenizer"
            ));
        }
    };
    let vocab: &RawValue =
        serde_json::from_slice(vocab).map_err(|e| format!("not valid JSON: {e}"))?;
    let merges = core::str::from_utf8(merges).map_err(|_| format!("{MERGES} is not UTF-8"))?;
    let merges: Said<Vec<_>> = (merges.lines())
        .filter(|line| !line.starts_with("#version") && !line.is_empty())
        .map(|line| merge_of_line(line).map_err(|e| format!("{MERGES}: {e}")))
        .collect();
    let pattern = if qwen { QWEN2 } else { GPT2 };
    let pattern = Pattern { pattern, digits: false, nfc: qwen };
    Ok(byte_level(&vocab, &merges?, pattern, false, &[], Value::Null)?.into_bytes())
}

/// How the words of a byte-level encoding are found.
#[derive(Clone, Copy)]
pub(super) struct Pattern {
    pub pattern: &'static str,
    /// Digits are words of their own, before the pattern is applied.
    pub digits: bool,
    pub nfc: bool,
}

/// The `tokenizer.json` of a byte-level encoding.
pub(super) fn byte_level(
    vocab: &impl serde::Serialize,
    merges: &[(String, String)],
    Pattern { pattern, digits, nfc }: Pattern,
    whole_words: bool,
    added: &[AddedToken],
    post_processor: Value,
) -> Said<String> {
    let level = |regex: bool| {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
            "use_regex": regex})
    };
    let words = match pattern {
        GPT2 if digits => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, level(true)]}),
        GPT2 => level(true),
        pattern => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": false},
            level(false)]}),
    };
    let normalizer = if nfc { json!({"type": "NFC"}) } else { Value::Null };
    let model = Model {
        kind: "BPE",
        dropout: None,
        unk_token: None,
        continuing_subword_prefix: None,
        end_of_word_suffix: None,
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: whole_words,
        vocab,
        merges,
    };
    let parts = [normalizer, words, post_processor, level(true)];
    written(added, parts, &model)
}

/// The model of a `tokenizer.json`.
#[derive(serde::Serialize)]
pub(super) struct Model<'a, V: serde::Serialize> {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub dropout: Option<f32>,
    pub unk_token: Option<&'a str>,
    pub continuing_subword_prefix: Option<&'a str>,
    pub end_of_word_suffix: Option<&'a str>,
    pub fuse_unk: bool,
    pub byte_fallback: bool,
    pub ignore_merges: bool,
    pub vocab: &'a V,
    pub merges: &'a [(String, String)],
}

/// A `tokenizer.json`.
pub(super) fn written<V: serde::Serialize>(
    added_tokens: &[AddedToken],
    [normalizer, pre_tokenizer, post_processor, decoder]: [Value; 4],
    model: &Model<'_, V>,
) -> Said<String> {
    #[derive(serde::Serialize)]
    struct File<'a, V: serde::Serialize> {
        version: &'static str,
        truncation: Option<u8>,
        padding: Option<u8>,
        added_tokens: &'a [AddedToken],
        normalizer: Value,
        pre_tokenizer: Value,
        post_processor: Value,
        decoder: Value,
        model: &'a Model<'a, V>,
    }
    serde_json::to_string(&File {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens,
        normalizer,
        pre_tokenizer,
        post_processor,
        decoder,
        model,
    })
    .map_err(|e| e.to_string())
}
