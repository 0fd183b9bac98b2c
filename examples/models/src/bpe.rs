//! A vocabulary that is made for the texts at hand: byte-level byte-pair encoding (Sennrich et al.,
//! 2016), as GPT-2 has it, but of a few thousand pieces and trained in seconds.
//!
//! Byte level: every text can be encoded, whatever its characters, and decoding gives it back. The
//! file is `tokenizer.json` in the layout of Hugging Face's `tokenizers`.

use std::path::{Path, PathBuf};

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper, Tokenizer, Trainer};

use crate::files::{FileError, read_limited, write_bytes};

/// Stands before every document, so that generation can begin with it.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Its number: special pieces come first.
pub const END: u16 = 0;

/// The end of text and the 256 bytes.
const FEWEST: usize = 257;
/// Tokens are `u16`.
const MOST: usize = 1 << 16;
/// The largest file that is read; a vocabulary of 65,536 pieces has about 4 MB.
const MOST_BYTES: u64 = 1 << 26;

/// Why there is no vocabulary, or no tokens.
#[derive(Debug, thiserror::Error)]
pub enum BpeError {
    /// A size that no vocabulary can have.
    #[error(
        "a vocabulary of {0} pieces: expected from {FEWEST} (the bytes and the end of text) to \
         {MOST}"
    )]
    Size(usize),
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file that is not such a vocabulary.
    #[error("{}: not a vocabulary of this program: {what}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A token that is not in the vocabulary.
    #[error("token {token} is outside the vocabulary, which has {size} pieces")]
    Token {
        /// The token.
        token: u32,
        /// Pieces of the vocabulary.
        size: usize,
    },
    /// What the library reports.
    #[error("the vocabulary: {what}: {error}")]
    Library {
        /// What was tried.
        what: &'static str,
        /// Its words.
        error: tokenizers::Error,
    },
}

/// Only this many bytes of a longer run of letters, digits or other characters are counted for a
/// vocabulary: every merge goes through all of a run, so that a megabyte would take many minutes.
const LONGEST_RUN: usize = 1024;

/// A trainer that sees of every word its first [`LONGEST_RUN`] bytes.
pub(crate) struct Bounded(pub TrainerWrapper);

impl Trainer for Bounded {
    type Model = ModelWrapper;

    fn should_show_progress(&self) -> bool {
        self.0.should_show_progress()
    }

    fn train(&self, model: &mut ModelWrapper) -> tokenizers::Result<Vec<AddedToken>> {
        self.0.train(model)
    }

    fn feed<I, S, F>(&mut self, iterator: I, process: F) -> tokenizers::Result<()>
    where
        I: Iterator<Item = S> + Send,
        S: AsRef<str> + Send,
        F: Fn(&str) -> tokenizers::Result<Vec<String>> + Sync,
    {
        self.0.feed(iterator, |text| {
            let mut words = process(text)?;
            for word in &mut words {
                // A character for each byte.
                if let Some((end, _)) = word.char_indices().nth(LONGEST_RUN) {
                    word.truncate(end);
                }
            }
            Ok(words)
        })
    }
}

fn failed(what: &'static str) -> impl Fn(tokenizers::Error) -> BpeError {
    move |error| BpeError::Library { what, error }
}

/// A byte-pair encoding.
#[derive(Debug, Clone)]
pub struct Bpe(Tokenizer);

impl Bpe {
    /// Learns a vocabulary of at most `size` pieces; of few texts it is smaller. The same texts
    /// give the same vocabulary.
    ///
    /// # Errors
    /// [`BpeError::Size`], or what the library reports.
    pub fn train(texts: &[&str], size: usize) -> Result<Self, BpeError> {
        if !(FEWEST..=MOST).contains(&size) {
            return Err(BpeError::Size(size));
        }
        let mut tokenizer = Tokenizer::new(BPE::default());
        // GPT-2's settings: no space before the text, its pattern of words.
        let level = ByteLevel::new(false, true, true);
        tokenizer.with_pre_tokenizer(Some(level)).with_decoder(Some(level));
        let trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build();
        tokenizer
            .train(&mut Bounded(TrainerWrapper::BpeTrainer(trainer)), texts.iter())
            .map_err(failed("cannot be trained"))?;
        Ok(Self::set(tokenizer))
    }

    /// What looks like the end of text within a text is text.
    fn set(mut tokenizer: Tokenizer) -> Self {
        tokenizer.set_encode_special_tokens(true);
        Self(tokenizer)
    }

    /// Reads what [`write`](Self::write) wrote.
    ///
    /// # Errors
    /// [`BpeError`] of a file that is absent or another kind of tokenizer.
    pub fn read(path: &Path) -> Result<Self, BpeError> {
        let bytes = read_limited(path, MOST_BYTES)?;
        let foreign = |what: String| BpeError::Foreign { path: path.into(), what };
        let tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| foreign(e.to_string()))?;
        let bpe = matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_none());
        let level =
            matches!(tokenizer.get_pre_tokenizer(), Some(PreTokenizerWrapper::ByteLevel(_)))
                && matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        if !bpe || !level || tokenizer.get_normalizer().is_some() {
            return Err(foreign("expected a plain byte-level BPE".into()));
        }
        let pieces = tokenizer.get_vocab(true);
        if pieces.get(END_OF_TEXT) != Some(&u32::from(END)) {
            return Err(foreign(format!("expected {END_OF_TEXT} as piece {END}")));
        }
        if pieces.len() > MOST || pieces.values().any(|&id| id as usize >= pieces.len()) {
            return Err(foreign(format!(
                "expected pieces numbered from 0 to at most {}, found {} of them, up to number {}",
                MOST - 1,
                pieces.len(),
                pieces.values().max().unwrap_or(&0)
            )));
        }
        Ok(Self::set(tokenizer))
    }

    /// Writes `tokenizer.json`.
    ///
    /// # Errors
    /// [`BpeError::File`]
    pub fn write(&self, path: &Path) -> Result<(), BpeError> {
        let json = self.0.to_string(true).map_err(failed("cannot be written"))?;
        Ok(write_bytes(path, json.as_bytes())?)
    }

    /// Number of pieces.
    pub fn size(&self) -> usize {
        self.0.get_vocab_size(true)
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// What the library reports.
    pub fn encode(&self, text: &str) -> Result<Vec<u16>, BpeError> {
        let encoding = self.0.encode_fast(text, false).map_err(failed("cannot encode"))?;
        // All fit: there are at most 65,536 pieces.
        Ok(encoding.get_ids().iter().map(|&id| id as u16).collect())
    }

    /// The tokens of documents one after the other, each with [`END`] before it.
    ///
    /// # Errors
    /// What the library reports.
    pub fn encode_documents(&self, texts: &[&str]) -> Result<Vec<u16>, BpeError> {
        let all =
            self.0.encode_batch_fast(texts.to_vec(), false).map_err(failed("cannot encode"))?;
        let tokens = |e: &tokenizers::Encoding| e.get_ids().iter().map(|&id| id as u16).collect();
        let document = |e| [vec![END], tokens(e)].concat();
        Ok(all.iter().flat_map(document).collect())
    }

    /// The text of tokens, without ends of text. A token may be part of a character: what is not
    /// UTF-8 in the end becomes `�`.
    ///
    /// # Errors
    /// [`BpeError::Token`] of a token that is not in the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, BpeError> {
        let size = self.size();
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= size) {
            return Err(BpeError::Token { token, size });
        }
        self.0.decode(tokens, true).map_err(failed("cannot decode"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempDir;

    const TEXTS: [&str; 3] = [
        "Permission is hereby granted, free of charge, to any person obtaining a copy",
        "THE SOFTWARE IS PROVIDED \"AS IS\", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED",
        "Redistribution and use in source and binary forms, with or without modification",
    ];

    fn vocabulary() -> Bpe {
        Bpe::train(&TEXTS.repeat(9), 400).unwrap()
    }

    #[test]
    fn text_comes_back_from_fewer_tokens() {
        let v = vocabulary();
        assert!((257..=400).contains(&v.size()));
        for text in [TEXTS[0], "", " two  spaces\n\ta tab", "never seen — 字 🌍", END_OF_TEXT]
        {
            let tokens = v.encode(text).unwrap();
            assert!(tokens.iter().all(|&t| t != END && usize::from(t) < v.size()), "{text}");
            let tokens: Vec<u32> = tokens.into_iter().map(u32::from).collect();
            assert_eq!(v.decode(&tokens).unwrap(), text);
        }
        assert!(v.encode(TEXTS[0]).unwrap().len() < TEXTS[0].len() / 3);
    }

    #[test]
    fn documents_begin_with_the_end_of_text() {
        let v = vocabulary();
        let [a, b] = [TEXTS[0], TEXTS[1]].map(|t| v.encode(t).unwrap());
        let both = v.encode_documents(&TEXTS[..2]).unwrap();
        assert_eq!(both, [vec![END], a, vec![END], b].concat());
        assert_eq!(
            v.decode(&both.iter().map(|&t| t.into()).collect::<Vec<_>>()).unwrap(),
            TEXTS[..2].concat()
        );
        assert!(v.encode_documents(&[]).unwrap().is_empty());
    }

    #[test]
    fn training_repeats_and_files_are_read_back() {
        let dir = TempDir::new();
        let (a, b) = (dir.path().join("a.json"), dir.path().join("b.json"));
        vocabulary().write(&a).unwrap();
        vocabulary().write(&b).unwrap();
        assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
        let read = Bpe::read(&a).unwrap();
        assert_eq!(read.encode(TEXTS[2]).unwrap(), vocabulary().encode(TEXTS[2]).unwrap());
        assert!(!read.encode(END_OF_TEXT).unwrap().contains(&END));
    }

    #[test]
    fn what_cannot_be_used_is_explained() {
        assert!(matches!(Bpe::train(&TEXTS, 256), Err(BpeError::Size(256))));
        assert!(matches!(Bpe::train(&TEXTS, 1 << 17), Err(BpeError::Size(_))));
        let v = vocabulary();
        let size = v.size();
        let error = v.decode(&[1, size as u32]).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("token {size} is outside the vocabulary, which has {size} pieces")
        );

        let dir = TempDir::new();
        let path = dir.path().join("tokenizer.json");
        v.write(&path).unwrap();
        let good = std::fs::read_to_string(&path).unwrap();
        for (from, to, message) in [
            (END_OF_TEXT, "<s>", "expected <|endoftext|> as piece 0"),
            ("\"dropout\": null", "\"dropout\": 0.5", "plain byte-level BPE"),
            ("{", "", "not a vocabulary"),
        ] {
            let file = dir.file("bad.json", good.replace(from, to).as_bytes());
            let error = Bpe::read(&file).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("bad.json"), "{error}");
        }
        assert!(matches!(Bpe::read(&dir.path().join("none")), Err(BpeError::File(_))));
    }
}
