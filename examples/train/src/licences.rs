//! The licence texts of SPDX, which the crate `spdx` embeds, as text to train on and text to
//! validate on.
//!
//! Many licences are near-copies of others: `BSD-3-Clause` has twenty variants, and every
//! `CC-BY` comes in versions and national editions. Were the texts dealt out one by one, almost
//! every validation text would have a twin among the training texts, and the validation loss would
//! measure memory. So they are dealt out by *family*:
//!
//! 1. A text is the set of its shingles, its sequences of 8 words.
//! 2. Two texts are related if their sets overlap, `|A ∩ B| ≥ |A ∪ B| / 10`.
//! 3. A family is what is connected by such pairs (union-find).
//! 4. Of the families, in the order of their size, every tenth is for validation. Its longest
//!    text stands for it, so that no near-copy is measured twice; the others are in neither part.
//!
//! Texts that are not in English are left out: there are too few of them to learn their languages
//! from.

use core::fmt;
use std::collections::BTreeMap;
use std::path::Path;

use bdia_core::network::Step;
use bdia_core::rng::{Draw, Stream};
use bdia_models::bpe::Bpe;
use bdia_models::files::write_bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::Failure;
use crate::run;
use crate::trainer::Validation;

/// Words of a shingle.
const SHINGLE: usize = 8;
/// One shingle in so many makes two texts relatives.
const RELATED: u32 = 10;
/// One family in so many is for validation.
const EVERY: usize = 10;

/// The two parts. No validation text is of the family of a training text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Licences<'a> {
    /// To train on, by name.
    pub train: Vec<(&'a str, &'a str)>,
    /// To validate on, by name: one text of each family.
    pub validation: Vec<(&'a str, &'a str)>,
}

impl Licences<'static> {
    /// The texts of the crate `spdx`.
    pub fn spdx() -> Self {
        Self::split(spdx::text::LICENSE_TEXTS)
    }
}

impl<'a> Licences<'a> {
    /// Splits named texts by family. The same texts give the same split, whatever their order.
    pub fn split(texts: &[(&'a str, &'a str)]) -> Self {
        // Several names may have one text: it is taken once, under the first of them.
        let unique: BTreeMap<&str, &str> =
            texts.iter().rev().map(|&(name, text)| (text, name)).collect();
        let mut texts: Vec<(&str, &str)> = (unique.into_iter())
            .filter(|(text, _)| is_english(text))
            .map(|(text, name)| (name, text))
            .collect();
        texts.sort_unstable();

        let mut families = families(&texts);
        let bytes = |family: &[usize]| family.iter().map(|&i| texts[i].1.len()).sum::<usize>();
        // Stable: families of one size stay in the order of their first names.
        families.sort_by_key(|family| core::cmp::Reverse(bytes(family)));
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for (n, family) in families.iter().enumerate() {
            if n % EVERY == EVERY - 1 {
                validation.extend(family.iter().map(|&i| texts[i]).max_by_key(|(_, t)| t.len()));
            } else {
                train.extend(family.iter().map(|&i| texts[i]));
            }
        }
        train.sort_unstable();
        validation.sort_unstable();
        Self { train, validation }
    }
}

/// The licence texts as tokens of a vocabulary that is learned from them.
#[derive(Debug, Clone)]
pub struct Text {
    /// The vocabulary.
    pub vocabulary: Bpe,
    train: Vec<u16>,
    validation: Vec<u16>,
    /// Bytes of the validation texts.
    bytes: usize,
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (train, validation) = (self.train.len(), self.validation.len());
        write!(f, "{train} training and {validation} validation tokens of licence texts")
    }
}

impl Text {
    /// Learns a vocabulary of `pieces` from the training texts of [`Licences::spdx`].
    ///
    /// # Errors
    /// [`Failure::Bpe`] for a size that no vocabulary can have.
    pub fn licences(pieces: usize) -> Result<Self, Failure> {
        let licences = Licences::spdx();
        let texts = |part: &[(&'static str, &'static str)]| -> Vec<&str> {
            part.iter().map(|t| t.1).collect()
        };
        let (train, validation) = (texts(&licences.train), texts(&licences.validation));
        let vocabulary = Bpe::train(&train, pieces)?;
        Ok(Self {
            train: vocabulary.encode_documents(&train)?,
            validation: vocabulary.encode_documents(&validation)?,
            bytes: validation.iter().map(|t| t.len()).sum(),
            vocabulary,
        })
    }

    /// Writes what another program needs to learn from the same: `tokenizer.json`, and the tokens
    /// of both parts as 16-bit numbers without a header, `train.bin` and `validation.bin`.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), Failure> {
        self.vocabulary.write(&dir.join("tokenizer.json"))?;
        write_bytes(&dir.join("train.bin"), &bytes(&self.train))?;
        Ok(write_bytes(&dir.join("validation.bin"), &bytes(&self.validation))?)
    }

    /// Identifies the tokens.
    pub fn digest(&self) -> u64 {
        xxh3_64(&[bytes(&self.train), bytes(&self.validation)].concat())
    }

    /// Samples of `context` tokens in the training text.
    pub fn samples(&self, context: usize) -> f64 {
        self.train.len() as f64 / context as f64
    }

    /// Samples `first`, `first + 1`, … of a step, as many of `context` tokens as the buffers hold.
    /// A sample begins anywhere in the training text: where follows from seed, step and its number.
    pub fn batch(
        &self,
        step: &Step,
        first: usize,
        context: usize,
        tokens: &mut [i32],
        targets: &mut [i32],
    ) {
        let starts = self.train.len().saturating_sub(context).max(1);
        let samples = tokens.chunks_mut(context.max(1)).zip(targets.chunks_mut(context.max(1)));
        for (i, (tokens, targets)) in samples.enumerate() {
            let sample = (first + i) as u32;
            let word = Stream::new(step.seed, step.step, sample, 0, 0, Draw::Data).quad(0)[0];
            fill(&self.train[word as usize % starts..], tokens, targets);
        }
    }

    /// Measures on the validation texts, in windows of `context` tokens; `loss` gives the sum of
    /// the losses of one.
    ///
    /// # Errors
    /// Those of `loss`.
    pub fn validate(
        &self,
        context: usize,
        mut loss: impl FnMut(&[i32], &[i32]) -> Result<f64, Failure>,
    ) -> Result<Validation, Failure> {
        let (mut tokens, mut targets) = (vec![0; context], vec![0; context]);
        let (mut nats, mut count) = (0.0, 0);
        for from in (0..self.validation.len()).step_by(context.max(1)) {
            run::go_on()?;
            fill(&self.validation[from..], &mut tokens, &mut targets);
            nats += loss(&tokens, &targets)?;
            count += targets.iter().filter(|t| **t >= 0).count();
        }
        let loss = nats / count as f64;
        let bits = nats / core::f64::consts::LN_2 / self.bytes as f64;
        let text = format!("loss {loss:.4} ({bits:.3} bits per byte) over {count} tokens");
        Ok(Validation { loss, text, ..Validation::default() })
    }
}

fn bytes(tokens: &[u16]) -> Vec<u8> {
    tokens.iter().flat_map(|t| t.to_le_bytes()).collect()
}

/// Tokens of a text, and as targets those that follow; behind its end there are none.
fn fill(text: &[u16], tokens: &mut [i32], targets: &mut [i32]) {
    for (i, (token, target)) in tokens.iter_mut().zip(targets).enumerate() {
        *token = text.get(i).map_or(0, |&t| i32::from(t));
        *target = text.get(i + 1).map_or(-1, |&t| i32::from(t));
    }
}

/// Whether a text is in English: at least 3 % of its words are the most common ones.
fn is_english(text: &str) -> bool {
    let (mut all, mut common) = (0, 0);
    for word in words(text) {
        all += 1;
        common += usize::from(["the", "of", "and", "or", "to"].contains(&word.as_str()));
    }
    common * 100 >= all * 3 && all > 0
}

fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase)
}

/// The hashes of a text's shingles, in order and each once. A shorter text is one shingle.
fn shingles(text: &str) -> Vec<u64> {
    let words: Vec<u64> = words(text).map(|w| fnv(w.bytes())).collect();
    let mut all: Vec<u64> = (words.windows(SHINGLE.min(words.len()).max(1)))
        .map(|w| fnv(w.iter().flat_map(|h| h.to_le_bytes())))
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// FNV-1a: the same on every machine and in every version.
fn fnv(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// The families as lists of indices into `texts`, in the order of their first members.
fn families(texts: &[(&str, &str)]) -> Vec<Vec<usize>> {
    let n = texts.len();
    let sets: Vec<Vec<u64>> = texts.iter().map(|(_, text)| shingles(text)).collect();
    let mut places: Vec<(u64, usize)> =
        sets.iter().enumerate().flat_map(|(i, set)| set.iter().map(move |&s| (s, i))).collect();
    places.sort_unstable();

    // |A ∩ B| of every pair: one for each shingle that both have.
    let mut common = vec![0_u32; n * n];
    for same in places.chunk_by(|a, b| a.0 == b.0) {
        for (k, &(_, b)) in same.iter().enumerate() {
            for &(_, a) in &same[..k] {
                common[a * n + b] += 1;
            }
        }
    }

    // Every text's family is known by its first member so far.
    let mut first: Vec<usize> = (0..n).collect();
    for b in 0..n {
        for a in 0..b {
            let both = common[a * n + b];
            let either = (sets[a].len() + sets[b].len()) as u32 - both;
            if both > 0 && both * RELATED >= either {
                let (x, y) = (first[a].min(first[b]), first[a].max(first[b]));
                first.iter_mut().filter(|f| **f == y).for_each(|f| *f = x);
            }
        }
    }
    let mut families = vec![Vec::new(); n];
    for (i, &f) in first.iter().enumerate() {
        families[f].push(i);
    }
    families.retain(|family| !family.is_empty());
    families
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Words that no other text has, after those of an English sentence.
    fn text(name: &str, words: usize) -> String {
        let own: Vec<String> = (0..words).map(|i| format!("{name}{i}")).collect();
        format!("the and of or to {}", own.join(" "))
    }

    #[test]
    fn relatives_of_relatives_are_a_family() {
        let (a, c) = (text("a", 60), text("c", 60));
        let b = format!("{a} {c}");
        let alone = text("d", 60);
        let texts = [("a", a.as_str()), ("b", &b), ("c", &c), ("d", &alone), ("e", "too short")];
        assert_eq!(families(&texts), [vec![0, 1, 2], vec![3], vec![4]]);
        assert_eq!(families(&[]), Vec::<Vec<usize>>::new());
        assert_eq!(families(&[("empty", ""), ("blank", " \n")]), [vec![0], vec![1]]);
    }

    #[test]
    fn every_tenth_family_is_validated_by_its_longest_text() {
        // Families of two near-copies each, from the largest to the smallest.
        let own: Vec<[(String, String); 2]> = (0..20)
            .map(|i| {
                let body = text(&format!("w{i:02}x"), 100 - i);
                [(format!("{i:02}-a"), body.clone()), (format!("{i:02}-b"), body + " end")]
            })
            .collect();
        let texts: Vec<(&str, &str)> =
            own.iter().flatten().map(|(n, t)| (n.as_str(), t.as_str())).collect();
        let parts = Licences::split(&texts);
        let names: Vec<&str> = parts.validation.iter().map(|t| t.0).collect();
        assert_eq!(names, ["09-b", "19-b"]);
        assert_eq!(parts.train.len(), 36);
        assert!(parts.train.iter().all(|(n, _)| !n.starts_with("09") && !n.starts_with("19")));

        let mut other = texts.clone();
        other.reverse();
        other.push(("zz", texts[0].1));
        other.push(("de", "Die Bedingungen dieser Lizenz gelten ohne jede Ausnahme"));
        assert_eq!(Licences::split(&other), parts);
    }

    #[test]
    fn spdx_is_split_by_family() {
        let parts = Licences::spdx();
        let bytes = |part: &[(&str, &str)]| part.iter().map(|t| t.1.len()).sum::<usize>();
        assert!(bytes(&parts.train) > 3_000_000 && bytes(&parts.validation) > 50_000);
        let train: HashSet<u64> = parts.train.iter().flat_map(|t| shingles(t.1)).collect();
        let own: Vec<u64> = parts.validation.iter().flat_map(|t| shingles(t.1)).collect();
        let seen = own.iter().filter(|s| train.contains(s)).count();
        assert!(seen * 5 < own.len(), "{seen} of {} shingles are in training texts", own.len());
    }
}
