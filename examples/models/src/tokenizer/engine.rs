//! A tokenizer as `tokenizer.json` describes it: byte-pair encoding with what stands before and
//! after it in the models of Llama's family and their like.

use core::fmt::Write as _;
use std::collections::{HashMap, HashSet};

use rayon::prelude::*;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;
use xxhash_rust::xxh3::Xxh3;

use super::added::{Added, AddedToken, Part};
use super::bpe::{Bpe, Settings, Work};
use super::byte_characters;
use super::pipeline::{Normalizer, Words};

/// The most tokens of a vocabulary.
const MOST_TOKENS: usize = 1 << 22;
/// Words are encoded in groups of this many, each on any thread, and in batches of this many bytes.
const GROUP: usize = 1 << 13;
const BATCH: usize = 1 << 22;

type Said<T> = Result<T, String>;

/// Texts and numbers of a vocabulary, as a file has them: also twice.
#[derive(Debug, Default)]
struct Vocab(Vec<(String, u64)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Vocab;

            fn expecting(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str("an object of tokens and their numbers")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Vocab, M::Error> {
                let mut all = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    all.push(entry);
                }
                Ok(Vocab(all))
            }
        }
        input.deserialize_map(Read)
    }
}

/// Merges, as pairs or as texts with a space between the two.
#[derive(Debug, Default)]
struct Merges(Vec<(String, String)>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

/// The two sides of a merge that is written as a line.
pub(super) fn merge_of_line(line: &str) -> Said<(String, String)> {
    let mut parts = line.split(' ');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(a), Some(b), None) if !a.is_empty() && !b.is_empty() => Ok((a.into(), b.into())),
        _ => {
            let shown: String = line.chars().take(60).collect();
            Err(format!("merge {shown:?}, expected two tokens with a space between them"))
        }
    }
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Merges;

            fn expecting(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str("a list of pairs of tokens")
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Merges, S::Error> {
                let mut all = Vec::new();
                while let Some(merge) = seq.next_element()? {
                    all.push(match merge {
                        Merge::Pair(a, b) => (a, b),
                        Merge::Line(line) => {
                            merge_of_line(&line).map_err(serde::de::Error::custom)?
                        }
                    });
                }
                Ok(Merges(all))
            }
        }
        input.deserialize_seq(Read)
    }
}

/// `tokenizer.json`.
#[derive(Deserialize)]
struct File<'a> {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(borrow)]
    model: &'a RawValue,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type", default)]
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    dropout: Option<f64>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: Option<bool>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
    vocab: Vocab,
    merges: Merges,
}

/// How tokens become text.
#[derive(Debug, Default)]
struct Decoder {
    /// Tokens are bytes, written by [`byte_characters`].
    byte_level: bool,
    /// What is replaced in a token.
    replace: Vec<(String, String)>,
    /// Whether `<0x0A>` is a byte.
    byte_fallback: bool,
    /// How often a character is taken from the start of a text.
    strip: Option<(char, usize)>,
}

impl Decoder {
    fn read(value: &Value) -> Said<Self> {
        let mut decoder = Self::default();
        decoder.step(value)?;
        Ok(decoder)
    }

    fn step(&mut self, value: &Value) -> Said<()> {
        if value.is_null() {
            return Ok(());
        }
        let get = |name: &str| value.get(name).and_then(Value::as_str);
        match get("type").ok_or("a decoder without \"type\"")? {
            "Sequence" => {
                let steps = value.get("decoders").and_then(Value::as_array);
                let steps = steps.ok_or("a sequence without \"decoders\"")?;
                return steps.iter().try_for_each(|step| self.step(step));
            }
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Replace" => {
                let pattern = value.get("pattern").and_then(|p| p.get("String"));
                let pattern = pattern.and_then(Value::as_str).filter(|p| !p.is_empty());
                // Nothing grows.
                let fits = |content: &&str| content.len() <= pattern.map_or(0, str::len);
                let (Some(pattern), Some(content)) = (pattern, get("content").filter(fits)) else {
                    return Err(
                        "decoder Replace, expected a text and what replaces it, not longer".into(),
                    );
                };
                if self.replace.len() == 16 {
                    return Err("more than 16 replacements in the decoder".into());
                }
                self.replace.push((pattern.into(), content.into()));
            }
            "Strip" => {
                let n = |name| value.get(name).and_then(Value::as_u64).unwrap_or(0);
                let content = get("content").and_then(|c| c.chars().next());
                let content = content.ok_or("decoder Strip without \"content\"")?;
                if n("stop") > 0 {
                    return Err("decoder Strip with \"stop\", expected 0".into());
                }
                self.strip = Some((content, n("start").min(1 << 16) as usize));
            }
            "Metaspace" => {
                let replacement = get("replacement").unwrap_or("\u{2581}");
                if replacement.is_empty() {
                    return Err("decoder Metaspace with an empty \"replacement\"".into());
                }
                self.replace.push((replacement.into(), " ".into()));
                let never = get("prepend_scheme") == Some("never")
                    || value.get("add_prefix_space") == Some(&Value::Bool(false));
                self.strip = (!never).then_some((' ', 1));
            }
            other => {
                return Err(format!(
                    "decoder {other:?}, expected Sequence, ByteLevel, ByteFallback, Fuse, \
                     Replace, Strip or Metaspace"
                ));
            }
        }
        Ok(())
    }

    /// The bytes of a token.
    fn bytes(&self, text: &str, added: bool, values: &HashMap<char, u8>, out: &mut Vec<u8>) {
        let start = out.len();
        if self.byte_level {
            // An added token is written as it is.
            if !added {
                for c in text.chars() {
                    match values.get(&c) {
                        Some(&b) => out.push(b),
                        None => {
                            out.truncate(start);
                            break;
                        }
                    }
                }
            }
            if out.len() == start {
                out.extend_from_slice(text.as_bytes());
            }
            return;
        }
        if self.byte_fallback && text.len() == 6 {
            let hex = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
            if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                out.push(byte);
                return;
            }
        }
        let mut text = std::borrow::Cow::Borrowed(text);
        for (from, to) in &self.replace {
            if text.contains(from.as_str()) {
                text = text.replace(from, to).into();
            }
        }
        out.extend_from_slice(text.as_bytes());
    }
}

/// A tokenizer.
#[derive(Debug)]
pub(super) struct Engine {
    normalizers: Vec<Normalizer>,
    words: Words,
    bpe: Bpe,
    pub added: Added,
    decoder: Decoder,
    /// The bytes of all tokens one after the other, and where each ends.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    special: HashSet<u32>,
    /// The token with which its post-processor begins a text.
    pub first: Option<u32>,
    pub digest: u64,
}

/// A token that another file than `tokenizer.json` names, and whether it has its number from there:
/// without one it is added only where the vocabulary has it.
pub(super) type Named = (AddedToken, bool);

/// The token with which a post-processor begins a text.
fn first_token(value: &Value) -> Option<&str> {
    match value.get("type")?.as_str()? {
        "Sequence" => value.get("processors")?.as_array()?.iter().find_map(first_token),
        "TemplateProcessing" => {
            value.get("single")?.as_array()?.first()?.get("SpecialToken")?.get("id")?.as_str()
        }
        _ => None,
    }
}

/// The start of a text that may be long.
fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

impl Engine {
    /// Reads the text of a `tokenizer.json`; other files may name more added tokens.
    ///
    /// # Errors
    /// What is wrong with it, or not implemented.
    pub fn read(json: &[u8], named: &[Named]) -> Said<Self> {
        let mut file: File<'_> = serde_json::from_slice(json)
            .map_err(|e| format!("not a tokenizer.json of Hugging Face's tokenizers: {e}"))?;
        let kind: Kind = serde_json::from_str(file.model.get()).map_err(|e| e.to_string())?;
        if let Some(kind) = kind.kind.filter(|kind| kind != "BPE") {
            return Err(format!(
                "a model of type {:?}, expected \"BPE\", the only one that is implemented",
                shown(&kind)
            ));
        }
        let model: Model = serde_json::from_str(file.model.get())
            .map_err(|e| format!("its model is not a byte-pair encoding: {e}"))?;
        if model.dropout.is_some_and(|p| p != 0.0) {
            return Err("a model with dropout: the same text would get other tokens".into());
        }
        let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
        if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
            return Err(
                "a model with \"continuing_subword_prefix\" or \"end_of_word_suffix\", which is \
                 not implemented"
                    .into(),
            );
        }
        let (vocab, mut texts) = numbered(model.vocab.0)?;
        let merges = model.merges.0;
        let unknown = match &model.unk_token {
            None => None,
            Some(text) => {
                let found = vocab.get(text).copied();
                // It is never needed where bytes stand for everything.
                if found.is_none() && !file.added_tokens.iter().any(|t| t.content == *text) {
                    return Err(format!(
                        "\"unk_token\" {:?} is not in the vocabulary",
                        shown(text)
                    ));
                }
                found
            }
        };
        let normalizers = Normalizer::read(&file.normalizer)?;
        let words = Words::read(&file.pre_tokenizer)?;
        let settings = Settings {
            byte_level: words.byte_level,
            unknown,
            fuse_unknown: model.fuse_unk.unwrap_or(false),
            byte_fallback: model.byte_fallback.unwrap_or(false),
            whole_words: model.ignore_merges.unwrap_or(false),
        };
        let bpe = Bpe::new(vocab, &merges, settings)?;
        drop(merges);
        let known: HashSet<String> = file.added_tokens.iter().map(|t| t.content.clone()).collect();
        for named in named.iter().filter(|named| !known.contains(&named.0.content)) {
            let mut token = named.0.clone();
            let found = bpe.vocab.get(&token.content).copied();
            if !named.1 {
                match found {
                    Some(id) => token.id = id,
                    None => continue,
                }
            }
            if !file.added_tokens.iter().any(|t| t.content == token.content) {
                file.added_tokens.push(token);
            }
        }
        for token in &file.added_tokens {
            let (expected, text) = (bpe.vocab.get(&token.content).copied(), &token.content);
            // What is not in the vocabulary follows it, in the order of the file.
            let expected = expected.map_or(texts.len(), |id| id as usize);
            if token.id as usize != expected {
                return Err(format!(
                    "added token {:?} has number {}, expected {expected}",
                    shown(text),
                    token.id
                ));
            }
            if expected == texts.len() {
                texts.push(text.clone());
            }
        }
        let added = Added::new(file.added_tokens, &normalizers)?;
        if added.tokens.windows(2).any(|two| two[0].id == two[1].id) {
            return Err("an added token comes twice".into());
        }
        let decoder = Decoder::read(&file.decoder)?;
        let first = first_token(&file.post_processor).map(|text| {
            let found = texts.iter().position(|t| t == text);
            found.map(|n| n as u32).ok_or_else(|| {
                format!("its post-processor adds {:?}, which is no token", shown(text))
            })
        });
        let values: HashMap<char, u8> = byte_characters().into_iter().zip(0..=255).collect();
        let of_added: HashSet<u32> = added.tokens.iter().map(|token| token.id).collect();
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(texts.len()));
        for (text, id) in texts.iter().zip(0_u32..) {
            decoder.bytes(text, of_added.contains(&id), &values, &mut bytes);
            ends.push(bytes.len());
        }
        let special = added.tokens.iter().filter(|t| t.special).map(|t| t.id).collect();
        let mut engine = Self {
            normalizers,
            words,
            bpe,
            added,
            decoder,
            bytes,
            ends,
            special,
            first: first.transpose()?,
            digest: 0,
        };
        engine.digest = engine.hash(&texts);
        Ok(engine)
    }

    /// Of all that decides which tokens a text has.
    fn hash(&self, texts: &[String]) -> u64 {
        struct Into<'a>(&'a mut Xxh3);
        impl core::fmt::Write for Into<'_> {
            fn write_str(&mut self, s: &str) -> core::fmt::Result {
                self.0.update(s.as_bytes());
                Ok(())
            }
        }
        let mut hasher = Xxh3::new();
        let length = |hasher: &mut Xxh3, n: usize| hasher.update(&(n as u64).to_le_bytes());
        length(&mut hasher, texts.len());
        for text in texts {
            length(&mut hasher, text.len());
            hasher.update(text.as_bytes());
        }
        for (a, b) in self.bpe.merges() {
            hasher.update(&a.to_le_bytes());
            hasher.update(&b.to_le_bytes());
        }
        // What makes no difference must not make one here.
        let complete = self.bpe.complete();
        let settings = (!complete).then_some(&self.bpe.settings);
        // Writing to a hasher does not fail.
        let _ = write!(
            Into(&mut hasher),
            "{:?} {:?} {} {settings:?}",
            self.normalizers,
            self.words,
            self.bpe.settings.whole_words
        );
        for token in &self.added.tokens {
            let mut token = token.clone();
            token.normalized &= !self.normalizers.is_empty();
            let _ = write!(Into(&mut hasher), "{token:?}");
        }
        hasher.digest()
    }

    /// One more than the largest token.
    pub fn vocab(&self) -> usize {
        self.ends.len()
    }

    /// The number of a token's text.
    pub fn token(&self, text: &str) -> Option<u32> {
        let added = self.added.tokens.iter().find(|token| token.content == text);
        added.map(|token| token.id).or_else(|| self.bpe.vocab.get(text).copied())
    }

    /// How a token is written in files.
    pub fn text(&self, token: u32) -> Option<&str> {
        let added = self.added.tokens.iter().find(|t| t.id == token);
        let of_vocab = || self.bpe.vocab.iter().find(|(_, id)| **id == token);
        added.map(|t| &*t.content).or_else(|| of_vocab().map(|(text, _)| &**text))
    }

    pub fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    pub fn encode(&self, text: &str, special: bool) -> Vec<u32> {
        let mut out = Vec::new();
        self.added.parts(text, false, special, &mut |part| match part {
            Part::Token(token) => out.push(token),
            Part::Text(a, b) => {
                let start = a == 0;
                let text = Normalizer::all(&self.normalizers, &text[a..b]);
                self.added.parts(&text, true, special, &mut |part| match part {
                    Part::Token(token) => out.push(token),
                    Part::Text(a, b) => {
                        let text = self.words.prepared(text[a..b].into(), start && a == 0);
                        self.encode_words(&text, &mut out);
                    }
                });
            }
        });
        out
    }

    fn encode_words(&self, text: &str, out: &mut Vec<u32>) {
        let (mut batch, mut bytes): (Vec<&str>, usize) = (Vec::new(), 0);
        let mut flush = |batch: &mut Vec<&str>| {
            if batch.len() <= GROUP {
                self.encode_group(batch, out);
            } else {
                let groups: Vec<Vec<u32>> = (batch.par_chunks(GROUP))
                    .map(|group| {
                        let mut tokens = Vec::new();
                        self.encode_group(group, &mut tokens);
                        tokens
                    })
                    .collect();
                groups.iter().for_each(|tokens| out.extend_from_slice(tokens));
            }
            batch.clear();
        };
        self.words.of(text, &mut |word| {
            let mut start = 0;
            if word.len() > 1 && !self.bpe.settings.byte_level {
                let mut last = None;
                for (i, c) in word.char_indices() {
                    if last.is_some_and(|last| self.bpe.separate(last, c)) {
                        batch.push(&word[start..i]);
                        start = i;
                    }
                    last = Some(c);
                }
            }
            batch.push(&word[start..]);
            bytes += word.len();
            if bytes >= BATCH {
                flush(&mut batch);
                bytes = 0;
            }
        });
        flush(&mut batch);
    }

    /// Words come again and again: their tokens are looked up in what is written already.
    fn encode_group<'a>(&self, words: &[&'a str], out: &mut Vec<u32>) {
        /// Longer ones hardly come again.
        const LONGEST: usize = 32;
        let mut work = Work::new();
        let mut known: HashMap<&'a str, (usize, usize)> = HashMap::new();
        for &word in words {
            if word.len() > LONGEST {
                self.bpe.encode(word, &mut work, out);
                continue;
            }
            if let Some(&(a, b)) = known.get(word) {
                out.extend_from_within(a..b);
                continue;
            }
            let start = out.len();
            self.bpe.encode(word, &mut work, out);
            known.insert(word, (start, out.len()));
        }
    }

    /// The bytes of a token.
    pub fn bytes(&self, token: u32) -> Option<&[u8]> {
        let n = token as usize;
        let end = *self.ends.get(n)?;
        let start = if n == 0 { 0 } else { self.ends[n - 1] };
        self.bytes.get(start..end)
    }

    /// What a decoder takes from the start of a text.
    pub fn stripped<'a>(&self, text: &'a str) -> &'a str {
        let Some((c, n)) = self.decoder.strip else { return text };
        (0..n).fold(text, |text, _| text.strip_prefix(c).unwrap_or(text))
    }
}

/// A vocabulary whose numbers are each used once, from 0 on; and the texts in their order.
fn numbered(all: Vec<(String, u64)>) -> Said<(HashMap<String, u32>, Vec<String>)> {
    let n = all.len();
    if n > MOST_TOKENS {
        return Err(format!("a vocabulary of {n} tokens, expected at most {MOST_TOKENS}"));
    }
    let mut texts: Vec<Option<String>> = vec![None; n];
    let mut vocab = HashMap::with_capacity(n);
    for (text, id) in all {
        let place = usize::try_from(id).ok().and_then(|id| texts.get_mut(id));
        let place = place.ok_or_else(|| {
            format!("token {:?} has number {id}, expected one below {n}", shown(&text))
        })?;
        if let Some(other) = place {
            return Err(format!(
                "tokens {:?} and {:?} have the same number {id}",
                shown(other),
                shown(&text)
            ));
        }
        *place = Some(text.clone());
        if vocab.insert(text.clone(), id as u32).is_some() {
            return Err(format!("token {:?} comes twice", shown(&text)));
        }
    }
    // As many as there are places, and none twice.
    Ok((vocab, texts.into_iter().flatten().collect()))
}
