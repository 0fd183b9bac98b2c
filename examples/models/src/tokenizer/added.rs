//! Tokens that are found in a text before anything else is done with it.

use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};
use serde::{Deserialize, Serialize};

use super::pipeline::Normalizer;

/// The most bytes that the texts of added tokens have together, and the most of them.
const MOST_BYTES: usize = 1 << 21;
const MOST: usize = 1 << 16;

/// An added token, as `tokenizer.json` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AddedToken {
    #[serde(default)]
    pub id: u32,
    pub content: String,
    #[serde(default)]
    pub single_word: bool,
    #[serde(default)]
    pub lstrip: bool,
    #[serde(default)]
    pub rstrip: bool,
    #[serde(default)]
    pub normalized: bool,
    #[serde(default)]
    pub special: bool,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Added {
    /// In the order of their numbers.
    pub tokens: Vec<AddedToken>,
    /// Those that are found in the text as it is, and in the normalized one; with the places of
    /// their tokens.
    raw: Option<(AhoCorasick, Vec<usize>)>,
    normalized: Option<(AhoCorasick, Vec<usize>)>,
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// An added token.
    Token(u32),
    /// Text from a byte on to another.
    Text(usize, usize),
}

impl Added {
    pub fn new(mut tokens: Vec<AddedToken>, normalizers: &[Normalizer]) -> Result<Self, String> {
        tokens.sort_by_key(|token| token.id);
        let bytes: usize = tokens.iter().map(|token| token.content.len()).sum();
        if tokens.len() > MOST || bytes > MOST_BYTES {
            return Err(format!(
                "{} added tokens of {bytes} bytes together, expected at most {MOST} of \
                 {MOST_BYTES}",
                tokens.len()
            ));
        }
        let find = |normalized: bool| {
            let all: Vec<usize> = (0..tokens.len())
                .filter(|&n| tokens[n].normalized == normalized && !tokens[n].content.is_empty())
                .collect();
            if all.is_empty() {
                return Ok(None);
            }
            let text = |&n: &usize| {
                let content = &tokens[n].content;
                if normalized {
                    Normalizer::all(normalizers, content).into_owned()
                } else {
                    content.clone()
                }
            };
            let texts: Vec<String> = all.iter().map(text).collect();
            if texts.iter().map(String::len).sum::<usize>() > 4 * MOST_BYTES {
                return Err("normalized, the added tokens are too long".to_string());
            }
            AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .kind(Some(AhoCorasickKind::ContiguousNFA))
                .build(texts)
                .map(|found| Some((found, all)))
                .map_err(|e| format!("added tokens: {e}"))
        };
        let (raw, with) = (find(false)?, find(true)?);
        Ok(Self { tokens, raw, normalized: with })
    }

    /// The parts of a text as it is, or of a normalized one; special tokens only where asked for.
    pub fn parts(&self, text: &str, normalized: bool, special: bool, put: &mut dyn FnMut(Part)) {
        let found = if normalized { &self.normalized } else { &self.raw };
        let Some((search, which)) = found else {
            if !text.is_empty() {
                put(Part::Text(0, text.len()));
            }
            return;
        };
        let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let mut done = 0;
        for found in search.find_iter(text) {
            let token = &self.tokens[which[found.pattern().as_usize()]];
            let (mut start, mut end) = (found.start(), found.end());
            if token.special && !special || start == end {
                continue;
            }
            let (before, after) = (&text[..start], &text[end..]);
            if token.single_word && (word(before.chars().next_back()) || word(after.chars().next()))
            {
                continue;
            }
            if token.lstrip {
                start = text[done.min(start)..start].trim_end().len() + done.min(start);
            }
            if token.rstrip {
                end = text.len() - after.trim_start().len();
            }
            if start < done {
                // Whitespace before it that the last one took; or it lies within that.
                start = done;
            }
            if done < start {
                put(Part::Text(done, start));
            }
            put(Part::Token(token.id));
            done = end.max(done);
        }
        if done < text.len() {
            put(Part::Text(done, text.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, content: &str) -> AddedToken {
        AddedToken {
            id,
            content: content.into(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: false,
        }
    }

    fn parts(added: &Added, text: &str, special: bool) -> Vec<Result<u32, String>> {
        let mut all = Vec::new();
        added.parts(text, false, special, &mut |part| {
            all.push(match part {
                Part::Token(t) => Ok(t),
                Part::Text(a, b) => Err(text[a..b].into()),
            });
        });
        all
    }

    #[test]
    fn tokens_take_the_whitespace_that_they_ask_for() {
        let mut all = [token(1, "<a>"), token(2, "<b>"), token(3, "end"), token(4, "<ab>")];
        (all[0].lstrip, all[1].rstrip, all[2].single_word) = (true, true, true);
        all[3].special = true;
        let added = Added::new(all.to_vec(), &[]).unwrap();
        let text = |s: &str| Err(s.to_string());
        assert_eq!(parts(&added, "x  <a> y", true), [text("x"), Ok(1), text(" y")]);
        assert_eq!(parts(&added, "x <b>  <a> y", true), [text("x "), Ok(2), Ok(1), text(" y")]);
        assert_eq!(parts(&added, "bend end", true), [text("bend "), Ok(3)]);
        assert_eq!(parts(&added, "<ab>", true), [Ok(4)]);
        assert_eq!(parts(&added, "<ab>", false), [text("<ab>")]);
        assert!(parts(&added, "", true).is_empty());
    }
}
