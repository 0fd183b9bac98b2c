//! Byte-pair encoding of one word after the other, by the merges of a file.
//!
//! A word is cut into characters; of all neighbours that a merge joins, those of the lowest rank
//! are joined first, the leftmost of them at first, until no merge applies. Short words are
//! searched anew for every merge; long ones have a heap, so that a megabyte without a border takes
//! n log n steps.

use core::cmp::Reverse;
use core::hash::{BuildHasherDefault, Hasher};
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::byte_characters;

/// The longest word that is searched for every merge.
const SHORT: usize = 48;

/// What a file says of its byte-pair encoding.
#[derive(Debug, Default)]
pub(super) struct Settings {
    /// Words are bytes, written by [`byte_characters`].
    pub byte_level: bool,
    /// What stands for a character that no token has.
    pub unknown: Option<u32>,
    /// Whether neighbours of these are one.
    pub fuse_unknown: bool,
    /// Whether such a character is written by tokens of its bytes.
    pub byte_fallback: bool,
    /// Whether a word that is a token is that token, whatever the merges.
    pub whole_words: bool,
}

/// Pairs of tokens are numbers that a file chose: mixing their bits is enough.
#[derive(Default)]
pub(super) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u64(b.into()));
    }

    fn write_u64(&mut self, n: u64) {
        let x = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = x ^ x >> 29;
    }
}

/// Rank and result by the two tokens.
type Merges = HashMap<u64, (u32, u32), BuildHasherDefault<Mix>>;

/// An encoding.
#[derive(Debug)]
pub(super) struct Bpe {
    pub settings: Settings,
    /// Tokens by their text.
    pub vocab: HashMap<String, u32>,
    /// In the order of their ranks.
    merges: Merges,
    /// Tokens of one character.
    characters: HashMap<char, u32>,
    /// Those of the bytes, where words are bytes.
    bytes: [Option<u32>; 256],
    /// Those that stand for bytes of unknown characters.
    fallback: [Option<u32>; 256],
    /// Characters that some merge joins; none where words must stay whole.
    joined: Option<HashSet<(char, char)>>,
}

const fn pair(a: u32, b: u32) -> u64 {
    (a as u64) << 32 | b as u64
}

impl Bpe {
    /// An encoding of a vocabulary and merges, the first of them the first to be applied.
    ///
    /// # Errors
    /// A merge of what is not in the vocabulary, as text.
    pub fn new(
        vocab: HashMap<String, u32>,
        merges: &[(String, String)],
        settings: Settings,
    ) -> Result<Self, String> {
        let id = |text: &str, n: usize| {
            vocab.get(text).copied().ok_or_else(|| {
                let (a, b) = &merges[n];
                let shown = |s: &str| s.chars().take(40).collect::<String>();
                format!(
                    "merge {n} of {:?} and {:?}: {:?} is not in the vocabulary",
                    shown(a),
                    shown(b),
                    shown(text)
                )
            })
        };
        let mut table = Merges::default();
        table.reserve(merges.len());
        let mut joined = HashSet::new();
        let mut both = String::new();
        for (n, (a, b)) in merges.iter().enumerate() {
            both.clear();
            both.push_str(a);
            both.push_str(b);
            let rank = u32::try_from(n).map_err(|_| "too many merges".to_string())?;
            table.insert(pair(id(a, n)?, id(b, n)?), (rank, id(&both, n)?));
            joined.extend(a.chars().next_back().zip(b.chars().next()));
        }
        let one = |text: &str| {
            let mut all = text.chars();
            all.next().filter(|_| all.next().is_none())
        };
        let characters: HashMap<char, u32> =
            vocab.iter().filter_map(|(text, &id)| Some((one(text)?, id))).collect();
        let bytes = byte_characters().map(|c| characters.get(&c).copied());
        let fallback = core::array::from_fn(|b| vocab.get(&format!("<0x{b:02X}>")).copied());
        let joined = (!settings.byte_level && !settings.whole_words).then_some(joined);
        Ok(Self { settings, vocab, merges: table, characters, bytes, fallback, joined })
    }

    /// The merges in their order.
    pub fn merges(&self) -> Vec<(u32, u32)> {
        let mut all: Vec<_> = self.merges.iter().map(|(pair, (rank, _))| (*rank, *pair)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, pair)| ((pair >> 32) as u32, pair as u32)).collect()
    }

    /// Whether every text has tokens of its own, so that nothing is ever unknown.
    pub fn complete(&self) -> bool {
        self.settings.byte_level && self.bytes.iter().all(Option::is_some)
    }

    /// Whether the encoding of two texts that meet with these characters is that of the parts: both
    /// characters are tokens, and no merge joins what ends with one to what begins with the other.
    pub fn separate(&self, before: char, after: char) -> bool {
        self.joined.as_ref().is_some_and(|joined| !joined.contains(&(before, after)))
            && self.characters.contains_key(&before)
            && self.characters.contains_key(&after)
    }

    /// Appends the tokens of a word.
    pub fn encode(&self, word: &str, work: &mut Work, out: &mut Vec<u32>) {
        if self.settings.byte_level {
            if self.settings.whole_words {
                work.text.clear();
                work.text.extend(word.bytes().map(|b| work.spelling[usize::from(b)]));
                if let Some(&token) = self.vocab.get(&work.text) {
                    out.push(token);
                    return;
                }
            }
        } else if self.settings.whole_words
            && let Some(&token) = self.vocab.get(word)
        {
            out.push(token);
            return;
        }
        let symbols = &mut work.symbols;
        symbols.clear();
        // One that is not written yet: those that follow may be fused with it.
        let mut unknown = None;
        let mut put = |known: Option<u32>, c: char, symbols: &mut Vec<u32>| {
            if let Some(token) = known {
                symbols.extend(unknown.take());
                symbols.push(token);
                return;
            }
            if self.settings.byte_fallback {
                let mut buffer = [0; 4];
                let bytes = c.encode_utf8(&mut buffer).bytes();
                let tokens: Option<Vec<u32>> =
                    bytes.map(|b| self.fallback[usize::from(b)]).collect();
                if let Some(tokens) = tokens {
                    symbols.extend(tokens);
                    return;
                }
            }
            if let Some(token) = self.settings.unknown {
                if !self.settings.fuse_unknown {
                    symbols.extend(unknown);
                }
                unknown = Some(token);
            }
        };
        if self.settings.byte_level {
            for b in word.bytes() {
                let b = usize::from(b);
                put(self.bytes[b], work.spelling[b], symbols);
            }
        } else {
            for c in word.chars() {
                put(self.characters.get(&c).copied(), c, symbols);
            }
        }
        symbols.extend(unknown);
        if symbols.len() <= SHORT {
            self.merge_short(symbols, &mut work.ranks);
            out.extend_from_slice(symbols);
        } else {
            self.merge_long(symbols, out);
        }
    }

    fn rank(&self, a: u32, b: u32) -> u32 {
        self.merges.get(&pair(a, b)).map_or(u32::MAX, |merge| merge.0)
    }

    fn merge_short(&self, symbols: &mut Vec<u32>, ranks: &mut Vec<u32>) {
        ranks.clear();
        ranks.extend(symbols.windows(2).map(|two| self.rank(two[0], two[1])));
        while let Some((i, _)) =
            ranks.iter().enumerate().filter(|(_, r)| **r != u32::MAX).min_by_key(|(_, r)| **r)
        {
            let Some(&(_, token)) = self.merges.get(&pair(symbols[i], symbols[i + 1])) else {
                return;
            };
            symbols[i] = token;
            symbols.remove(i + 1);
            ranks.remove(i);
            if i > 0 {
                ranks[i - 1] = self.rank(symbols[i - 1], token);
            }
            if i < ranks.len() {
                ranks[i] = self.rank(token, symbols[i + 1]);
            }
        }
    }

    fn merge_long(&self, symbols: &mut [u32], out: &mut Vec<u32>) {
        const NONE: usize = usize::MAX;
        let n = symbols.len();
        let mut next: Vec<usize> = (1..n).chain([NONE]).collect();
        let mut before: Vec<usize> = [NONE].into_iter().chain(0..n - 1).collect();
        let mut gone = vec![false; n];
        let merge = |a: u32, b: u32| self.merges.get(&pair(a, b)).copied();
        // Rank, place, and the two tokens as they were when it was entered.
        let mut heap: BinaryHeap<Reverse<(u32, usize, u64)>> = (symbols.windows(2).enumerate())
            .filter_map(|(i, two)| {
                Some(Reverse((merge(two[0], two[1])?.0, i, pair(two[0], two[1]))))
            })
            .collect();
        while let Some(Reverse((_, i, was))) = heap.pop() {
            let j = next[i];
            if gone[i] || j == NONE || pair(symbols[i], symbols[j]) != was {
                continue;
            }
            let Some((_, token)) = merge(symbols[i], symbols[j]) else { continue };
            symbols[i] = token;
            gone[j] = true;
            next[i] = next[j];
            if next[i] != NONE {
                before[next[i]] = i;
            }
            for (a, b) in [(before[i], i), (i, next[i])] {
                if a != NONE
                    && b != NONE
                    && let Some((rank, _)) = merge(symbols[a], symbols[b])
                {
                    heap.push(Reverse((rank, a, pair(symbols[a], symbols[b]))));
                }
            }
        }
        out.extend((0..n).filter(|&i| !gone[i]).map(|i| symbols[i]));
    }
}

/// What encoding needs besides.
#[derive(Debug)]
pub(super) struct Work {
    spelling: [char; 256],
    text: String,
    symbols: Vec<u32>,
    ranks: Vec<u32>,
}

impl Work {
    pub fn new() -> Self {
        Self {
            spelling: byte_characters(),
            text: String::new(),
            symbols: Vec::new(),
            ranks: Vec::new(),
        }
    }
}
