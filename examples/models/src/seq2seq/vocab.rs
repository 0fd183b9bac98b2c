//! Subwords: a byte-level BPE vocabulary (Sennrich et al., 2016) trained on the pairs, in the
//! format of Hugging Face's `tokenizers`.
//!
//! Byte level: every text has tokens, whatever its characters, and tokens give the text back.
//! Entries 0 to 2 are padding, begin and end of a sentence.

use std::path::{Path, PathBuf};

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper, Tokenizer};
use xxhash_rust::xxh3::Xxh3;

use crate::bpe::Bounded;
use crate::files::{FileError, read_limited, write_bytes};

/// Fills the rest of a row; never looked at.
pub const PAD: i32 = 0;
/// What the decoder is given before the first word.
pub const BEGIN: i32 = 1;
/// Ends every sentence.
pub const END: i32 = 2;

const SPECIAL: [&str; 3] = ["<pad>", "<s>", "</s>"];

/// A vocabulary of one or of both languages.
#[derive(Debug, Clone)]
pub struct Vocabulary(Tokenizer);

/// Why a vocabulary cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VocabularyError {
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is not the vocabulary of a run.
    #[error("{}: {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The library of tokenizers refused.
    #[error("the vocabulary: {what}: {why}")]
    Library {
        /// What was tried.
        what: &'static str,
        /// What the library says.
        why: String,
    },
}

fn failed(what: &'static str, why: impl ToString) -> VocabularyError {
    VocabularyError::Library { what, why: why.to_string() }
}

impl Vocabulary {
    /// Trains a vocabulary of at most `size` entries. The same texts give the same vocabulary. Of a
    /// run of letters, digits or other characters the first 1024 bytes count.
    ///
    /// # Errors
    /// What the library reports.
    pub fn train<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        size: usize,
    ) -> Result<Self, VocabularyError> {
        let mut tokenizer = Tokenizer::new(BPE::default());
        // A space before the first word, so that words are the same anywhere.
        let level = ByteLevel::new(true, true, true);
        tokenizer.with_pre_tokenizer(Some(level)).with_decoder(Some(level));
        let trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(SPECIAL.iter().map(|s| AddedToken::from(*s, true)).collect())
            .build();
        let mut trainer = Bounded(TrainerWrapper::BpeTrainer(trainer));
        tokenizer.train(&mut trainer, texts).map_err(|e| failed("cannot be trained", e))?;
        Self::checked(tokenizer).map_err(|why| failed("cannot be trained", why))
    }

    fn checked(mut tokenizer: Tokenizer) -> Result<Self, String> {
        // What looks like a special entry in a text is text; a sentence is neither cut nor filled
        // up.
        tokenizer.set_encode_special_tokens(true);
        tokenizer.with_truncation(None).map_err(|e| e.to_string())?.with_padding(None);
        for (id, token) in SPECIAL.iter().enumerate() {
            let found = tokenizer.token_to_id(token);
            if found != Some(id as u32) {
                return Err(format!("entry {id} is expected to be {token}, which is {found:?}"));
            }
        }
        let ModelWrapper::BPE(bpe) = tokenizer.get_model() else {
            return Err("expected a BPE model".into());
        };
        if bpe.dropout.is_some() {
            return Err("the model drops merges at random; expected one without dropout".into());
        }
        if !matches!(tokenizer.get_pre_tokenizer(), Some(PreTokenizerWrapper::ByteLevel(_)))
            || !matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
        {
            return Err("expected pre-tokenizer and decoder to be ByteLevel".into());
        }
        let entries = tokenizer.get_vocab(true);
        if let Some((token, id)) = entries.iter().find(|(_, id)| **id as usize >= entries.len()) {
            return Err(format!(
                "entry {token:?} has number {id}, but there are {} entries",
                entries.len()
            ));
        }
        Ok(Self(tokenizer))
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// A file that is absent or not the vocabulary of a run.
    pub fn read(path: &Path) -> Result<Self, VocabularyError> {
        let bytes = read_limited(path, 1 << 28)?;
        let wrong = |what: String| VocabularyError::Content { path: path.into(), what };
        let tokenizer =
            Tokenizer::from_bytes(bytes).map_err(|e| wrong(format!("not a tokenizer: {e}")))?;
        Self::checked(tokenizer).map_err(wrong)
    }

    /// Writes it.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), VocabularyError> {
        let json = self.0.to_string(true).map_err(|e| failed("cannot be written", e))?;
        Ok(write_bytes(path, json.as_bytes())?)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.0.get_vocab_size(true)
    }

    /// Never: the special entries are there.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The tokens of a text, without begin and end.
    ///
    /// # Errors
    /// What the library reports.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>, VocabularyError> {
        let encoding = self.0.encode_fast(text, false).map_err(|e| failed("cannot encode", e))?;
        Ok(encoding.get_ids().iter().map(|&id| id as i32).collect())
    }

    /// The text of some tokens; special ones are left out.
    ///
    /// # Errors
    /// What the library reports.
    pub fn decode(&self, tokens: &[i32]) -> Result<String, VocabularyError> {
        let ids: Vec<u32> = tokens.iter().map(|&t| t as u32).collect();
        let text = self.0.decode(&ids, true).map_err(|e| failed("cannot decode", e))?;
        Ok(text.trim().replace(['\n', '\r'], " "))
    }
}

/// The vocabularies of source and target: one file, or two.
#[derive(Debug, Clone)]
pub struct Vocabularies {
    /// That of the source.
    pub source: Vocabulary,
    /// That of the target, if it is another.
    pub separate: Option<Vocabulary>,
}

impl Vocabularies {
    fn files(dir: &Path) -> [PathBuf; 3] {
        ["tokenizer.json", "tokenizer.source.json", "tokenizer.target.json"].map(|f| dir.join(f))
    }

    /// Reads the vocabularies of a run.
    ///
    /// # Errors
    /// As [`Vocabulary::read`].
    pub fn read(dir: &Path, shared: bool) -> Result<Self, VocabularyError> {
        let [both, source, target] = Self::files(dir);
        Ok(if shared {
            Self { source: Vocabulary::read(&both)?, separate: None }
        } else {
            Self { source: Vocabulary::read(&source)?, separate: Some(Vocabulary::read(&target)?) }
        })
    }

    /// Writes them.
    ///
    /// # Errors
    /// As [`Vocabulary::write`].
    pub fn write(&self, dir: &Path) -> Result<(), VocabularyError> {
        let [both, source, target] = Self::files(dir);
        match &self.separate {
            None => self.source.write(&both),
            Some(separate) => {
                self.source.write(&source)?;
                separate.write(&target)
            }
        }
    }

    /// A number that changes with every entry, merge and setting.
    ///
    /// # Errors
    /// What the library reports.
    pub fn digest(&self) -> Result<u64, VocabularyError> {
        let mut hash = Xxh3::new();
        for v in core::iter::once(&self.source).chain(&self.separate) {
            hash.update(
                v.0.to_string(false).map_err(|e| failed("cannot be written", e))?.as_bytes(),
            );
        }
        Ok(hash.digest())
    }

    /// That of the target.
    pub fn target(&self) -> &Vocabulary {
        self.separate.as_ref().unwrap_or(&self.source)
    }

    /// Numbers of entries: of the source, of the target.
    pub fn sizes(&self) -> [usize; 2] {
        [self.source.len(), self.target().len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn training_repeats_and_text_comes_back() {
        let texts = [
            "vingt et un",
            "quatre-vingts",
            "deux cent un",
            "œuvre naïve",
            "twenty-one",
            "vingt-deux",
        ]
        .repeat(9);
        let a = Vocabulary::train(texts.iter().copied(), 400).unwrap();
        let b = Vocabulary::train(texts.iter().copied(), 400).unwrap();
        assert_eq!(a.0.to_string(false).unwrap(), b.0.to_string(false).unwrap());
        assert!(a.len() > 259 && a.len() <= 400);
        for text in ["vingt et un", "quatre-vingts", "never seen — 字 🌍!", "a  b", "x </s> y"]
        {
            let tokens = a.encode(text).unwrap();
            assert!(
                tokens.iter().all(|&t| t > END && (t as usize) < a.len()),
                "{text}: {tokens:?}"
            );
            assert_eq!(a.decode(&tokens).unwrap(), text);
        }
        // Runs of any length: they do not stop training or encoding.
        let stream = bdia_core::rng::Stream::new(7, 0, 0, 0, 0, bdia_core::rng::Draw::Data);
        let runs = ["ACGT", "^", "0123456789", " ", "\u{5b57}"].map(|of| -> String {
            let of: Vec<char> = of.chars().collect();
            (0..1 << 20).map(|i| of[stream.below(i, of.len() as u32) as usize]).collect()
        });
        let all = texts.iter().copied().chain(runs.iter().map(String::as_str));
        let with_runs = Vocabulary::train(all, 4000).unwrap();
        for run in &runs {
            let tokens = with_runs.encode(run).unwrap();
            assert_eq!(with_runs.decode(&tokens).unwrap(), run.trim());
        }
        assert!(a.encode("vingt et un").unwrap().len() <= 4);
        assert_eq!(a.decode(&[BEGIN, END, PAD]).unwrap(), "");
    }
}
