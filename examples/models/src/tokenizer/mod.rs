//! The tokenizer of a model: GPT-2's, which is built in, or what the model's directory or GGUF file
//! brings along.
//!
//! A directory has `tokenizer.json`, or `vocab.json` and `merges.txt`. Byte-pair encodings are
//! implemented, byte-level ones (GPT-2, Llama 3, Qwen, SmolLM) and those of SentencePiece's kind
//! with byte fallback (Llama 2, Mistral, Gemma); anything else is refused by name. Tokens are those
//! that Hugging Face's `tokenizers` gives, and every text takes time in proportion to its length,
//! or n log n for a word of n characters, whatever it consists of.
//!
//! All threads of the current pool work on a text. Words are the same as without: the text is cut
//! into words first, which are encoded one by one. Without a pre-tokenizer a whole text is one
//! word; it is cut between characters of which no merge joins the first to the second.

mod added;
mod bpe;
mod engine;
pub(crate) mod gguf;
mod gpt2;
pub(crate) mod open;
mod pipeline;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

use crate::chat::ChatTemplate;
use crate::files::{FileError, write_bytes};
use engine::Engine;
use gpt2::Gpt2;
pub use gpt2::{EOT, EOT_TEXT, VOCAB, byte_characters};

/// What special tokens within a text are, such as `<|endoftext|>` or `<|im_end|>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// These tokens, as Hugging Face's tokenizers have it.
    Parse,
    /// Text like any other.
    Text,
}

/// Why there is no tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file that cannot be used.
    #[error("{}: {what}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, or not implemented.
        what: String,
    },
}

/// What gives the tokens.
#[derive(Debug)]
enum Kind {
    Gpt2(Gpt2),
    Engine(Box<Engine>),
}

#[derive(Debug)]
struct Inner {
    kind: Kind,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
    chat: Option<ChatTemplate>,
    /// Name and content of the files that [`Tokenizer::write_hf_files`] writes; none for GPT-2's
    /// that is built in.
    files: Vec<(&'static str, Vec<u8>)>,
}

/// A tokenizer. Clones share what it is made of.
///
/// A run of letters, digits, or other characters that nothing interrupts is merged as a whole, in
/// n log n steps for n bytes: a megabyte of DNA gets the tokens that the encoding defines.
#[derive(Clone)]
pub struct Tokenizer {
    special: SpecialTokens,
    inner: Arc<Inner>,
}

impl core::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Tokenizer({} tokens, {})", self.vocab(), self.digest())
    }
}

impl Tokenizer {
    /// GPT-2's tokenizer (`r50k_base`), built at its first use. `<|endoftext|>` is text like any
    /// other.
    pub fn gpt2() -> Self {
        static INNER: OnceLock<Arc<Inner>> = OnceLock::new();
        let inner = INNER.get_or_init(|| {
            let (kind, eot) = (Kind::Gpt2(Gpt2::new()), Some(EOT));
            let (adds_bos, chat, files) = (false, None, Vec::new());
            Arc::new(Inner { kind, bos: eot, eos: eot, adds_bos, chat, files })
        });
        Self { special: SpecialTokens::Text, inner: inner.clone() }
    }

    fn of(inner: Inner) -> Self {
        Self { special: SpecialTokens::Text, inner: Arc::new(inner) }
    }

    /// Reads the tokenizer of a model's directory: `tokenizer.json`, or `vocab.json` and
    /// `merges.txt`, with what `tokenizer_config.json`, `special_tokens_map.json`,
    /// `generation_config.json` and `chat_template.jinja` say besides. None where the directory has
    /// no tokenizer. Special tokens in texts are text.
    ///
    /// # Errors
    /// [`TokenizerError`]
    pub fn open(dir: &Path) -> Result<Option<Self>, TokenizerError> {
        Ok(open::open(dir)?.map(Self::of))
    }

    /// The tokenizer in the metadata of a GGUF file. Special tokens in texts are text.
    ///
    /// # Errors
    /// [`TokenizerError`]
    pub fn of_gguf(file: &crate::gguf::Gguf) -> Result<Self, TokenizerError> {
        gguf::inner(file)
            .map(Self::of)
            .map_err(|what| TokenizerError::Foreign { path: file.path().into(), what })
    }

    /// Reads the text of a `tokenizer.json` alone.
    ///
    /// # Errors
    /// [`TokenizerError::Foreign`] about a file of this name.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let path = Path::new(open::TOKENIZER);
        open::of_json(json.to_vec(), Vec::new())
            .map(Self::of)
            .map_err(|what| TokenizerError::Foreign { path: path.into(), what })
    }

    /// The same with another meaning of special tokens in texts.
    #[must_use]
    pub fn with_special_tokens(self, special: SpecialTokens) -> Self {
        Self { special, ..self }
    }

    /// What special tokens within a text are.
    pub fn special_tokens(&self) -> SpecialTokens {
        self.special
    }

    /// Encodes text on all threads of the current pool. No token is added at its start or end.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_all(&[text]).pop().unwrap_or_default()
    }

    /// Encodes many texts on all threads of the current pool.
    pub fn encode_all(&self, texts: &[&str]) -> Vec<Vec<u32>> {
        match &self.inner.kind {
            Kind::Gpt2(gpt2) => gpt2.encode_all(texts, self.special),
            Kind::Engine(engine) => {
                let special = self.special == SpecialTokens::Parse;
                texts.par_iter().map(|text| engine.encode(text, special)).collect()
            }
        }
    }

    /// The text of tokens, as the tokenizer's decoder has it: some take away the space that stands
    /// for the start of a text. A token may be part of a character: what is not UTF-8 in the end,
    /// and tokens outside the vocabulary, become `�`. Special tokens are written as their text.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let text = String::from_utf8_lossy(&self.decode_bytes(tokens)).into_owned();
        match &self.inner.kind {
            Kind::Gpt2(_) => text,
            Kind::Engine(engine) => {
                let stripped = engine.stripped(&text);
                if stripped.len() == text.len() { text } else { stripped.into() }
            }
        }
    }

    /// The bytes of tokens, one token after the other, whatever stands before; those of `�` for a
    /// token outside the vocabulary. A continuation has the space here that
    /// [`decode`](Self::decode) may take for the start of a text.
    pub fn decode_bytes(&self, tokens: &[u32]) -> Vec<u8> {
        match &self.inner.kind {
            Kind::Gpt2(gpt2) => gpt2.decode_bytes(tokens),
            Kind::Engine(engine) => {
                let foreign = "\u{fffd}".as_bytes();
                tokens.iter().flat_map(|&t| engine.bytes(t).unwrap_or(foreign)).copied().collect()
            }
        }
    }

    /// One more than the largest token.
    pub fn vocab(&self) -> usize {
        match &self.inner.kind {
            Kind::Gpt2(_) => VOCAB,
            Kind::Engine(engine) => engine.vocab(),
        }
    }

    /// The token that stands before a text, if the files name one.
    pub fn bos(&self) -> Option<u32> {
        self.inner.bos
    }

    /// The token that ends a text, if the files name one.
    pub fn eos(&self) -> Option<u32> {
        self.inner.eos
    }

    /// Whether the model expects [`bos`](Self::bos) before a text. [`encode`](Self::encode) does
    /// not put it there.
    pub fn adds_bos(&self) -> bool {
        self.inner.adds_bos
    }

    /// The token that is written like this, such as `<|im_end|>`.
    pub fn token(&self, text: &str) -> Option<u32> {
        match &self.inner.kind {
            Kind::Gpt2(gpt2) => gpt2.token(text),
            Kind::Engine(engine) => engine.token(text),
        }
    }

    /// Whether a token is special: not text, and subject to
    /// [`with_special_tokens`](Self::with_special_tokens).
    pub fn is_special(&self, token: u32) -> bool {
        match &self.inner.kind {
            Kind::Gpt2(_) => token == EOT,
            Kind::Engine(engine) => engine.is_special(token),
        }
    }

    /// How the model's conversations are written, if the files say so.
    pub fn chat(&self) -> Option<&ChatTemplate> {
        self.inner.chat.as_ref()
    }

    /// Writes the files by which Hugging Face's `AutoTokenizer` reads the same tokenizer: those
    /// that it was read from, unchanged. For GPT-2's that is built in, `positions` is the longest
    /// context.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn write_hf_files(&self, dir: &Path, positions: usize) -> Result<(), FileError> {
        if let (Kind::Gpt2(gpt2), true) = (&self.inner.kind, self.inner.files.is_empty()) {
            return gpt2.write_hf_files(dir, positions);
        }
        let write = |(name, bytes): &(&str, Vec<u8>)| write_bytes(&dir.join(name), bytes);
        self.inner.files.iter().try_for_each(write)
    }

    /// A digest of all that decides which tokens a text has, so that data and models can be bound
    /// to it. Whether special tokens are parsed is not part of it.
    pub fn digest(&self) -> String {
        let digest = match &self.inner.kind {
            Kind::Gpt2(_) => gpt2::DIGEST,
            Kind::Engine(engine) => engine.digest,
        };
        format!("{digest:016x}")
    }
}
