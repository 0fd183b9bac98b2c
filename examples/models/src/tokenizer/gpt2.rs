//! GPT-2's byte-pair encoding (`r50k_base`), and its files in Hugging Face's layout.

use std::collections::HashMap;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tiktoken_rs::{CoreBPE, r50k_base_singleton};

use super::SpecialTokens;
use crate::files::{FileError, write_bytes};

/// The end-of-text token, `<|endoftext|>`.
pub const EOT: u32 = 50_256;
/// Tokens of the vocabulary, the end-of-text token included.
pub const VOCAB: usize = 50_257;
/// How the end-of-text token is written.
pub const EOT_TEXT: &str = "<|endoftext|>";

/// Text is encoded in pieces of about this many bytes, each on any thread.
const PIECE: usize = 1 << 16;

/// What [`Engine`](super::engine::Engine) has for these tokens, merges and words.
pub(super) const DIGEST: u64 = 0x28bd_0990_1aaa_ad42;

/// The encoding.
#[derive(Clone, Copy)]
pub(super) struct Gpt2(&'static CoreBPE);

impl core::fmt::Debug for Gpt2 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Gpt2(r50k_base)")
    }
}

impl Gpt2 {
    /// Built at its first use.
    pub fn new() -> Self {
        Self(r50k_base_singleton())
    }

    /// The token that is written like this.
    pub fn token(self, text: &str) -> Option<u32> {
        if text == EOT_TEXT {
            return Some(EOT);
        }
        let characters = byte_characters();
        let byte = |c| characters.iter().position(|known| *known == c).map(|b| b as u8);
        let bytes: Option<Vec<u8>> = text.chars().map(byte).collect();
        let bytes = bytes?;
        (0..EOT).find(|&token| self.decode_bytes(&[token]) == bytes)
    }

    /// Encodes many texts on all threads of the current pool.
    pub fn encode_all(self, texts: &[&str], special: SpecialTokens) -> Vec<Vec<u32>> {
        // The end-of-text token is a piece without text.
        let mut pieces: Vec<(usize, Option<&str>)> = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            let parts = match special {
                SpecialTokens::Parse => text.split(EOT_TEXT).collect(),
                SpecialTokens::Text => vec![*text],
            };
            for (n, part) in parts.into_iter().enumerate() {
                pieces.extend((n > 0).then_some((i, None)));
                pieces.extend(cut(part).into_iter().map(|piece| (i, Some(piece))));
            }
        }
        let encode = |piece: Option<&str>| piece.map(|piece| self.0.encode_ordinary(piece));
        let encoded: Vec<Vec<u32>> =
            pieces.par_iter().map(|(_, piece)| encode(*piece).unwrap_or(vec![EOT])).collect();
        let mut all = vec![Vec::new(); texts.len()];
        for ((i, _), tokens) in pieces.iter().zip(encoded) {
            all[*i].extend(tokens);
        }
        all
    }

    /// The bytes of tokens; those of `�` for a token outside the vocabulary.
    pub fn decode_bytes(self, tokens: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for token in tokens {
            match self.0.decode_bytes(core::slice::from_ref(token)) {
                Ok(b) => bytes.extend(b),
                Err(_) => bytes.extend("\u{fffd}".as_bytes()),
            }
        }
        bytes
    }

    /// `vocab.json`: every token as text by [`byte_characters`], with its number.
    pub fn vocab_json(self) -> String {
        let characters = byte_characters();
        let mut map = Map::new();
        for token in 0..EOT {
            map.insert(spell(&self.decode_bytes(&[token]), &characters), json!(token));
        }
        map.insert(EOT_TEXT.into(), json!(EOT));
        Value::Object(map).to_string()
    }

    /// `merges.txt`: which two tokens make up each longer one, in the order in which they were
    /// learned.
    ///
    /// The token of rank `r` was made of the two parts that the merges before `r` leave of it.
    pub fn merges_txt(self) -> String {
        let characters = byte_characters();
        let tokens: Vec<Vec<u8>> = (0..EOT).map(|t| self.decode_bytes(&[t])).collect();
        let ranks: HashMap<&[u8], usize> =
            tokens.iter().enumerate().map(|(r, t)| (t.as_slice(), r)).collect();
        let lines: Vec<String> = (tokens.par_iter().enumerate())
            .filter(|(_, token)| token.len() > 1)
            .map(|(rank, token)| {
                let ends = merge(token, rank, &ranks);
                let mut start = 0;
                let mut line = String::new();
                for end in ends {
                    if start > 0 {
                        line.push(' ');
                    }
                    line.push_str(&spell(&token[start..end], &characters));
                    start = end;
                }
                line.push('\n');
                line
            })
            .collect();
        format!("#version: 0.2\n{}", lines.concat())
    }

    /// Writes the files by which Hugging Face's `AutoTokenizer` knows the directory as GPT-2's:
    /// `vocab.json`, `merges.txt`, `tokenizer_config.json`, `special_tokens_map.json`. `positions`
    /// is the longest context.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn write_hf_files(self, dir: &Path, positions: usize) -> Result<(), FileError> {
        let special = json!({"bos_token": EOT_TEXT, "eos_token": EOT_TEXT, "unk_token": EOT_TEXT});
        let config = json!({
            "add_prefix_space": false,
            "bos_token": EOT_TEXT,
            "eos_token": EOT_TEXT,
            "unk_token": EOT_TEXT,
            "model_max_length": positions,
            "tokenizer_class": "GPT2Tokenizer",
        });
        write_bytes(&dir.join("vocab.json"), self.vocab_json().as_bytes())?;
        write_bytes(&dir.join("merges.txt"), self.merges_txt().as_bytes())?;
        write_bytes(&dir.join("tokenizer_config.json"), format!("{config:#}\n").as_bytes())?;
        write_bytes(&dir.join("special_tokens_map.json"), format!("{special:#}\n").as_bytes())
    }
}

/// Cuts text where the encoding of the parts is the parts of the encoding: between two matches of
/// the pre-tokenizer's pattern, where neither its look-ahead nor its `$` can see the difference.
/// That is so
/// - before whitespace that follows something else: no match goes on from there into whitespace;
/// - before the last character of a run of whitespace: what precedes it is one match, with the rest
///   of the text or without. Long runs must be cut there, because the pattern's backtracking over
///   them overflows.
fn cut(text: &str) -> Vec<&str> {
    const LONG_RUN: usize = 1024;
    let mut all = Vec::with_capacity(text.len() / PIECE + 1);
    let (mut start, mut run, mut last) = (0, 0, 0);
    for (i, c) in text.char_indices() {
        let cut = if c.is_whitespace() {
            let cut = (run == 0 && i - start >= PIECE).then_some(i);
            (run, last) = (run + 1, i);
            cut
        } else {
            let cut = (run >= LONG_RUN).then_some(last);
            run = 0;
            cut
        };
        if let Some(cut) = cut {
            all.push(&text[start..cut]);
            start = cut;
        }
    }
    if start < text.len() {
        all.push(&text[start..]);
    }
    all
}

/// The ends of the parts that remain of `token` when only merges of ranks below `below` are
/// applied, lowest first.
fn merge(token: &[u8], below: usize, ranks: &HashMap<&[u8], usize>) -> Vec<usize> {
    let mut ends: Vec<usize> = (1..=token.len()).collect();
    loop {
        let start = |i: usize| if i == 0 { 0 } else { ends[i - 1] };
        let best = (0..ends.len().saturating_sub(1))
            .filter_map(|i| ranks.get(&token[start(i)..ends[i + 1]]).map(|&rank| (rank, i)))
            .filter(|&(rank, _)| rank < below)
            .min();
        match best {
            Some((_, i)) => ends.remove(i),
            None => return ends,
        };
    }
}

/// GPT-2's characters for bytes: the printable ones of Latin-1 for themselves, the rest from U+0100
/// on.
pub fn byte_characters() -> [char; 256] {
    let mut next = 0x100_u32;
    core::array::from_fn(|byte| {
        let byte = byte as u8;
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            return char::from(byte);
        }
        let c = char::from_u32(next).unwrap_or(char::REPLACEMENT_CHARACTER);
        next += 1;
        c
    })
}

fn spell(bytes: &[u8], characters: &[char; 256]) -> String {
    bytes.iter().map(|&b| characters[usize::from(b)]).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Tokenizer;
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn known_encodings() {
        let t = Tokenizer::gpt2();
        assert_eq!(t.encode("Hello, world!"), [15496, 11, 995, 0]);
        assert_eq!(t.decode(&[15496, 11, 995, 0]), "Hello, world!");
        assert_eq!(t.encode(""), [0_u32; 0]);
        assert_eq!(t.decode(&[EOT]), EOT_TEXT);
        assert!(t.encode(EOT_TEXT).len() > 1);
        let t = t.with_special_tokens(SpecialTokens::Parse);
        assert_eq!(
            t.encode("Hello<|endoftext|>, world!<|endoftext|>"),
            [15496, EOT, 11, 995, 0, EOT]
        );
        assert_eq!(t.encode_all(&["", EOT_TEXT, "!"]), [vec![], vec![EOT], vec![0]]);
    }

    /// Long runs without a space have the tokens that the merges give, one after the other.
    #[test]
    fn long_runs_are_merged_like_short_ones() {
        let t = Tokenizer::gpt2();
        let tokens: Vec<Vec<u8>> = (0..EOT).map(|t| Tokenizer::gpt2().decode_bytes(&[t])).collect();
        let ranks: HashMap<&[u8], usize> =
            tokens.iter().enumerate().map(|(r, t)| (t.as_slice(), r)).collect();
        let stream = bdia_core::rng::Stream::new(6, 0, 0, 0, 0, bdia_core::rng::Draw::Data);
        let run = |n: u32, of: &[u8]| -> String {
            (0..n).map(|i| char::from(of[stream.below(i, of.len() as u32) as usize])).collect()
        };
        for (of, len) in [
            (&b"ACGT"[..], 1_000_000),
            (b"^", 1_000_000),
            (b"0123456789", 1_000_000),
            (b"aeiounst", 9),
        ] {
            let short = run(2000, of);
            let ends = merge(short.as_bytes(), usize::MAX, &ranks);
            let mut start = 0;
            let expected: Vec<u32> = (ends.into_iter())
                .map(|end| {
                    let token = ranks[&short.as_bytes()[core::mem::replace(&mut start, end)..end]];
                    token as u32
                })
                .collect();
            assert_eq!(t.encode(&short), expected);
            let long = run(len, of);
            assert_eq!(t.decode(&t.encode(&long)), long);
        }
    }

    #[test]
    fn fragments_and_foreign_tokens_do_not_fail() {
        let t = Tokenizer::gpt2();
        let snowman = t.encode("☃");
        assert!(snowman.len() > 1);
        assert_eq!(t.decode(&snowman), "☃");
        assert!(t.decode(&snowman[..1]).contains('\u{fffd}'));
        assert_eq!(t.decode(&[50_257, u32::MAX]), "\u{fffd}\u{fffd}");
    }

    /// Text with every kind of border, longer than several pieces, as a whole and in pieces.
    #[test]
    fn pieces_change_no_token() {
        let t = Tokenizer::gpt2();
        let some = [
            "don't", " a", "  b", "\n\nxyz", "42", " ,.!", "\t \n", "\u{a0}", "é", "\u{2003}",
            "日本", "'ll", "\r\n",
        ];
        let stream = bdia_core::rng::Stream::new(5, 0, 0, 0, 0, bdia_core::rng::Draw::Data);
        let words = |n| {
            (0..n).map(|i| some[stream.below(i, some.len() as u32) as usize]).collect::<String>()
        };
        let long = ["x", &" ".repeat(3000), "y", &"\n".repeat(1025), ".", &"\u{2003}".repeat(1024)]
            .concat();
        let text = [words(80_000), long.clone(), words(500), long].concat();
        assert!(cut(&text).len() > 2);
        assert_eq!(cut(&text).concat(), text);
        assert_eq!(t.encode(&text), Gpt2::new().0.encode_ordinary(&text));
    }

    /// Texts that make careless tokenizers slow or make them fail.
    #[test]
    fn hostile_texts() {
        let t = Tokenizer::gpt2();
        let n = 300_000;
        for text in [
            " ".repeat(n),
            "a".repeat(n),
            "\n".repeat(n) + "x",
            " \u{a0}".repeat(n / 2),
            "'".repeat(n),
            "\0".repeat(n),
        ] {
            let tokens = t.encode(&text);
            assert_eq!(t.decode(&tokens), text);
        }
    }

    #[test]
    fn hugging_face_files_equal_the_published_ones() {
        let data = std::env::var_os("BDIA_DATA")
            .map_or_else(
                || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"),
                PathBuf::from,
            )
            .join("gpt2_bpe");
        let t = Gpt2::new();
        let (vocab, merges) = (t.vocab_json(), t.merges_txt());
        assert_eq!(merges.lines().count(), 50_001);
        assert!(merges.starts_with("#version: 0.2\nĠ t\nĠ a\nh e\n"));
        assert!(merges.lines().skip(1).all(|l| l.split(' ').count() == 2));
        let (Ok(published_vocab), Ok(published_merges)) = (
            std::fs::read_to_string(data.join("encoder.json")),
            std::fs::read_to_string(data.join("vocab.bpe")),
        ) else {
            println!(
                "skipped: {} has no encoder.json and vocab.bpe; BDIA_DATA names the data directory",
                data.display()
            );
            return;
        };
        let read = |s: &str| serde_json::from_str::<HashMap<String, u32>>(s).unwrap();
        assert_eq!(read(&vocab), read(&published_vocab));
        assert_eq!(merges, published_merges);
    }
}
