//! Tokens to train on: the built-in licence texts, plain text, or token files; and the batches made
//! of them.
//!
//! A token file is recognised by its name, `*.bin`. llm.c's begins with a header of 256
//! little-endian `i32` (magic 20240520, version 1, number of tokens); nanoGPT's has none. Both hold
//! `u16` tokens, little-endian. Anything else is UTF-8 text, whose documents are separated by a
//! line `<|endoftext|>`.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bdia_core::rng::{Draw, Stream};
use bdia_models::files::{FileError, read_limited};
use bdia_models::tokenizer::{EOT, EOT_TEXT, Tokenizer};
use bdia_train::Failure;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Why there is nothing to train on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file has no bytes.
    #[error("{}: the file is empty; expected text, or tokens in a .bin file", .0.display())]
    Empty(PathBuf),
    /// A text that is none.
    #[error(
        "{}: not UTF-8 text (byte {at} does not fit); expected plain text, or a token file whose \
         name ends in .bin",
        path.display()
    )]
    NotText {
        /// The file.
        path: PathBuf,
        /// The first byte that is wrong.
        at: usize,
    },
    /// An odd number of bytes.
    #[error(
        "{}: {bytes} bytes, expected an even number (u16 tokens); the file is cut off or not a \
         token file", path.display()
    )]
    Odd {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A header that is not complete or not supported.
    #[error("{}: llm.c token file: {what}: expected {expected}, found {found}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The entry.
        what: &'static str,
        /// What is possible.
        expected: String,
        /// What came.
        found: String,
    },
    /// A token that the model does not have.
    #[error(
        "{source_name}: token {token} at position {position} is outside the vocabulary of \
         {vocab}; use the vocabulary the \
         tokens were made with (--vocab), or other data"
    )]
    Token {
        /// Where the tokens come from.
        source_name: String,
        /// The token.
        token: u32,
        /// Its index in the stream.
        position: u64,
        /// Tokens that the model has.
        vocab: usize,
    },
    /// Too few tokens.
    #[error(
        "{source_name}: {tokens} tokens to train on, expected at least {} (one context and the \
         token after it); use a \
         smaller --context or more data", context + 1
    )]
    Short {
        /// Where the tokens come from.
        source_name: String,
        /// How many there are.
        tokens: u64,
        /// Tokens of a sample.
        context: usize,
    },
    /// Buffers of a batch that do not belong together.
    #[error(
        "a batch of {tokens} tokens and {targets} targets: expected the same whole number of \
         samples of {context}"
    )]
    Shape {
        /// Tokens.
        tokens: usize,
        /// Targets.
        targets: usize,
        /// Tokens of a sample.
        context: usize,
    },
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Self::Program(Box::new(error))
    }
}

/// Which pieces of the training text make up a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// From random places.
    Shuffled,
    /// One after the other; sample n of the run is tokens n·T … n·T+T, from the start again after
    /// the end.
    Sequential,
}

/// Text files are tokenized in memory; larger ones should be made into token files once.
const MOST_TEXT: u64 = 4 << 30;
/// llm.c's header.
const HEADER_BYTES: u64 = 1024;
const MAGIC: u32 = 20_240_520;
const MAGIC_U32: u32 = 20_240_801;

/// Where the tokens of a [`Part`] are.
#[derive(Debug, Clone)]
enum Store {
    Memory(Arc<Vec<u16>>),
    /// Token files stay on disk: they may be larger than the memory.
    File {
        file: Arc<Mutex<File>>,
        path: Arc<PathBuf>,
        offset: u64,
    },
}

/// A stream of tokens.
#[derive(Debug, Clone)]
pub struct Part {
    store: Store,
    start: u64,
    len: u64,
}

/// How batches are made of a [`Part`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batches {
    /// From where samples come.
    pub order: Order,
    /// The run's seed.
    pub seed: u64,
    /// Samples of an optimizer step, all micro-batches together.
    pub per_step: u64,
    /// Tokens of a sample, `T`.
    pub context: usize,
}

impl Part {
    /// Tokens in memory.
    pub fn from_tokens(tokens: Vec<u16>) -> Self {
        let len = tokens.len() as u64;
        Self { store: Store::Memory(Arc::new(tokens)), start: 0, len }
    }

    /// Number of tokens.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A piece of it, cut to what there is.
    pub fn slice(&self, start: u64, len: u64) -> Self {
        let start = start.min(self.len);
        Self {
            store: self.store.clone(),
            start: self.start + start,
            len: len.min(self.len - start),
        }
    }

    /// Copies the tokens from index `from` on, starting over at the end. Nothing is allocated.
    ///
    /// # Errors
    /// [`DataError`] if the file cannot be read any more, or there is no token at all.
    pub fn copy(&self, from: u64, out: &mut [i32]) -> Result<(), DataError> {
        if self.len == 0 {
            return Err(DataError::Short {
                source_name: "data".into(),
                tokens: 0,
                context: out.len(),
            });
        }
        let (mut at, mut out) = (from % self.len, out);
        while !out.is_empty() {
            let n = out.len().min(usize::try_from(self.len - at).unwrap_or(usize::MAX));
            let (now, rest) = out.split_at_mut(n);
            self.copy_straight(self.start + at, now)?;
            (at, out) = (0, rest);
        }
        Ok(())
    }

    fn copy_straight(&self, at: u64, out: &mut [i32]) -> Result<(), DataError> {
        match &self.store {
            Store::Memory(tokens) => {
                // In range by construction: `start + len` never exceeds the vector.
                for (o, t) in out.iter_mut().zip(&tokens[at as usize..]) {
                    *o = i32::from(*t);
                }
            }
            Store::File { file, path, offset } => {
                let failed = |e| FileError::io(path, "read its tokens", e);
                // A poisoned lock only means that another thread stopped; the position is set anew
                // here.
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(offset + 2 * at)).map_err(failed)?;
                let mut bytes = [0_u8; 4096];
                for piece in out.chunks_mut(bytes.len() / 2) {
                    let bytes = &mut bytes[..2 * piece.len()];
                    file.read_exact(bytes).map_err(failed)?;
                    for (o, b) in piece.iter_mut().zip(bytes.as_chunks::<2>().0) {
                        *o = i32::from(u16::from_le_bytes(*b));
                    }
                }
            }
        }
        Ok(())
    }

    /// One window: tokens `from … from + T`, and the same one further as targets, starting over at
    /// the end.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn window(
        &self,
        from: u64,
        tokens: &mut [i32],
        targets: &mut [i32],
    ) -> Result<(), DataError> {
        self.copy(from, tokens)?;
        let n = tokens.len();
        if targets.len() != n || n == 0 {
            return Err(DataError::Shape { tokens: n, targets: targets.len(), context: n });
        }
        targets[..n - 1].copy_from_slice(&tokens[1..]);
        self.copy(from % self.len + n as u64, &mut targets[n - 1..])
    }

    /// Starts of the windows of `T` tokens that follow each other without overlap; each has all its
    /// targets.
    pub fn windows(&self, context: usize) -> impl ExactSizeIterator<Item = u64> + use<> {
        let context = context.max(1);
        let n = self.len.saturating_sub(1) / context as u64;
        (0..usize::try_from(n).unwrap_or(usize::MAX)).map(move |i| i as u64 * context as u64)
    }

    /// Where sample `index` of optimizer step `step` starts.
    pub fn sample_start(&self, batches: &Batches, step: u32, index: u32) -> u64 {
        let context = batches.context as u64;
        match batches.order {
            Order::Shuffled => {
                let words = Stream::new(batches.seed, step, index, 0, 0, Draw::Data).quad(0);
                let word = u64::from(words[0]) << 32 | u64::from(words[1]);
                // Every start with a full window and its last target.
                let starts = self.len.saturating_sub(context).max(1);
                ((u128::from(word) * u128::from(starts)) >> 64) as u64
            }
            Order::Sequential => {
                let n = u128::from(step) * u128::from(batches.per_step) + u128::from(index);
                (n * u128::from(context) % u128::from(self.len.max(1))) as u64
            }
        }
    }

    /// Fills a micro-batch: samples `first`, `first + 1`, … of optimizer step `step`, as many as
    /// the buffers hold. A sample depends on seed, step and its index only.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn batch(
        &self,
        batches: &Batches,
        step: u32,
        first: u32,
        tokens: &mut [i32],
        targets: &mut [i32],
    ) -> Result<(), DataError> {
        let context = batches.context;
        if context == 0 || tokens.len() != targets.len() || !tokens.len().is_multiple_of(context) {
            return Err(DataError::Shape { tokens: tokens.len(), targets: targets.len(), context });
        }
        for (i, (x, y)) in
            tokens.chunks_exact_mut(context).zip(targets.chunks_exact_mut(context)).enumerate()
        {
            self.window(self.sample_start(batches, step, first.wrapping_add(i as u32)), x, y)?;
        }
        Ok(())
    }

    /// Whether every token is in the vocabulary.
    fn check(&self, source_name: &str, vocab: usize) -> Result<(), DataError> {
        let mut buffer = [0_i32; 2048];
        let mut at = 0;
        while at < self.len {
            let n = buffer.len().min(usize::try_from(self.len - at).unwrap_or(usize::MAX));
            self.copy_straight(self.start + at, &mut buffer[..n])?;
            if let Some(i) = buffer[..n].iter().position(|&t| t as usize >= vocab) {
                return Err(DataError::Token {
                    source_name: source_name.into(),
                    token: buffer[i] as u32,
                    position: at + i as u64,
                    vocab,
                });
            }
            at += n as u64;
        }
        Ok(())
    }
}

/// Training and validation tokens.
#[derive(Debug, Clone)]
pub struct Corpus {
    /// To train on: at least one context and a token.
    pub train: Part,
    /// To validate on; it has no window if there is too little data.
    pub validation: Part,
    /// What it is, for messages.
    pub name: String,
}

impl Corpus {
    /// The built-in licence texts, or a file.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn open(
        data: Option<&Path>,
        tokenizer: &Tokenizer,
        vocab: usize,
        context: usize,
    ) -> Result<Self, DataError> {
        let corpus = match data {
            None => Self::licences(tokenizer),
            Some(path) if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("bin")) => {
                Self::token_file(path, context)?
            }
            Some(path) => Self::text_file(path, tokenizer, context)?,
        };
        if corpus.train.len() <= context as u64 {
            return Err(DataError::Short {
                source_name: corpus.name,
                tokens: corpus.train.len(),
                context,
            });
        }
        corpus.train.check(&corpus.name, vocab)?;
        corpus.validation.check(&format!("{} (validation part)", corpus.name), vocab)?;
        Ok(corpus)
    }

    /// All tokens of a file, nothing set aside: what `eval` measures.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn whole(path: &Path, tokenizer: &Tokenizer, vocab: usize) -> Result<Part, DataError> {
        let part = if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("bin")) {
            open_tokens(path)?
        } else {
            let bytes = read_limited(path, MOST_TEXT)?;
            if bytes.is_empty() {
                return Err(DataError::Empty(path.into()));
            }
            let text = core::str::from_utf8(&bytes)
                .map_err(|e| DataError::NotText { path: path.into(), at: e.valid_up_to() })?;
            let documents = documents(text);
            Self::join(&documents, &tokenizer.encode_all(&documents))
        };
        part.check(&path.display().to_string(), vocab)?;
        Ok(part)
    }

    /// Documents one after the other; a single one without the end-of-text token before it.
    fn join(documents: &[&str], encoded: &[Vec<u32>]) -> Part {
        let mut all = Vec::new();
        for tokens in encoded {
            if documents.len() > 1 {
                document(&mut all, tokens);
            } else {
                all.extend(tokens.iter().map(|&t| t as u16));
            }
        }
        Part::from_tokens(all)
    }

    /// The licence texts that the crate `spdx` embeds. About a tenth of them, chosen by a hash of
    /// the name, are for validation. A text that several licences share is taken once, so that none
    /// is in both parts.
    pub fn licences(tokenizer: &Tokenizer) -> Self {
        let mut seen = HashSet::new();
        let texts: Vec<(&str, &str)> = spdx::text::LICENSE_TEXTS
            .iter()
            .copied()
            .filter(|(_, text)| seen.insert(*text))
            .collect();
        let bodies: Vec<&str> = texts.iter().map(|t| t.1).collect();
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for ((name, _), tokens) in texts.iter().zip(tokenizer.encode_all(&bodies)) {
            document(
                if name_hash(name).is_multiple_of(10) { &mut validation } else { &mut train },
                &tokens,
            );
        }
        let name = "licence texts of SPDX".into();
        Self { train: Part::from_tokens(train), validation: Part::from_tokens(validation), name }
    }

    fn text_file(path: &Path, tokenizer: &Tokenizer, context: usize) -> Result<Self, DataError> {
        let bytes = read_limited(path, MOST_TEXT)?;
        if bytes.is_empty() {
            return Err(DataError::Empty(path.into()));
        }
        let text = core::str::from_utf8(&bytes)
            .map_err(|e| DataError::NotText { path: path.into(), at: e.valid_up_to() })?;
        let documents = documents(text);
        let encoded = tokenizer.encode_all(&documents);
        let name = path.display().to_string();
        if documents.len() < 10 {
            // Too few to give whole ones away.
            return Ok(Self::split(Self::join(&documents, &encoded), context, name));
        }
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for (i, tokens) in encoded.iter().enumerate() {
            document(if i % 10 == 9 { &mut validation } else { &mut train }, tokens);
        }
        Ok(Self {
            train: Part::from_tokens(train),
            validation: Part::from_tokens(validation),
            name,
        })
    }

    fn token_file(path: &Path, context: usize) -> Result<Self, DataError> {
        let all = open_tokens(path)?;
        let name = path.display().to_string();
        // nanoGPT and llm.c write the two parts as two files, `…train….bin` and `…val….bin`.
        let file_name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(at) = file_name.rfind("train") {
            let sibling =
                path.with_file_name(format!("{}val{}", &file_name[..at], &file_name[at + 5..]));
            if sibling.is_file() {
                let name = format!("{name} and {}", sibling.display());
                return Ok(Self { train: all, validation: open_tokens(&sibling)?, name });
            }
        }
        Ok(Self::split(all, context, name))
    }

    /// The last tenth for validation, and at least one window of it if that leaves one to train on.
    fn split(all: Part, context: usize, name: String) -> Self {
        let window = context as u64 + 1;
        let tenth = all.len() / 10;
        let validation = if tenth >= window {
            tenth
        } else if all.len() / 2 >= window {
            window
        } else {
            0
        };
        let train = all.len() - validation;
        Self { train: all.slice(0, train), validation: all.slice(train, validation), name }
    }
}

/// Every document begins with the end-of-text token: what generation without a prompt starts from.
fn document(to: &mut Vec<u16>, tokens: &[u32]) {
    to.push(EOT as u16);
    // r50k has 50257 tokens: all fit.
    to.extend(tokens.iter().map(|&t| t as u16));
}

/// FNV-1a: the same on every machine and in every version.
fn name_hash(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// The documents of a text that are not empty.
fn documents(text: &str) -> Vec<&str> {
    let (mut all, mut start, mut at) = (Vec::new(), 0, 0);
    for line in text.split_inclusive('\n') {
        if line.trim_end() == EOT_TEXT {
            all.push(&text[start..at]);
            start = at + line.len();
        }
        at += line.len();
    }
    all.push(&text[start..]);
    all.retain(|d| !d.trim().is_empty());
    all
}

/// The tokens' offset and number in a token file of `len` bytes that starts with `head` (its first
/// kibibyte, or all).
///
/// # Errors
/// [`DataError`]
pub fn token_layout(path: &Path, head: &[u8], len: u64) -> Result<(u64, u64), DataError> {
    if len == 0 {
        return Err(DataError::Empty(path.into()));
    }
    let entry = |i: usize| head.as_chunks::<4>().0.get(i).map(|b| u32::from_le_bytes(*b));
    let wrong = |what, expected: String, found: String| DataError::Header {
        path: path.into(),
        what,
        expected,
        found,
    };
    let (offset, declared) = match entry(0) {
        Some(MAGIC_U32) => {
            let expected = format!("{MAGIC} (u16 tokens of GPT-2)");
            return Err(wrong(
                "magic number",
                expected,
                format!("{MAGIC_U32} (u32 tokens of Llama 3)"),
            ));
        }
        Some(MAGIC) => {
            let cut = || {
                wrong(
                    "size",
                    format!("a header of {HEADER_BYTES} bytes"),
                    format!("{len} bytes in all"),
                )
            };
            if len < HEADER_BYTES {
                return Err(cut());
            }
            let (version, count) = (entry(1).ok_or_else(cut)?, entry(2).ok_or_else(cut)?);
            if version != 1 {
                return Err(wrong("version", "1".into(), version.to_string()));
            }
            (HEADER_BYTES, Some(u64::from(count)))
        }
        _ => (0, None),
    };
    let bytes = len - offset;
    if !bytes.is_multiple_of(2) {
        return Err(DataError::Odd { path: path.into(), bytes: len });
    }
    match declared {
        Some(n) if n != bytes / 2 => {
            let found =
                format!("{} in the file, which is cut off or has something appended", bytes / 2);
            Err(wrong("number of tokens", format!("{n}, as the header says"), found))
        }
        _ if bytes == 0 => Err(DataError::Empty(path.into())),
        _ => Ok((offset, bytes / 2)),
    }
}

fn open_tokens(path: &Path) -> Result<Part, DataError> {
    let failed = |e: io::Error| FileError::io(path, "read it", e);
    let mut file = File::open(path).map_err(|e| FileError::io(path, "open it", e))?;
    let len = file.metadata().map_err(failed)?.len();
    let mut head = Vec::new();
    (&mut file).take(HEADER_BYTES).read_to_end(&mut head).map_err(failed)?;
    let (offset, tokens) = token_layout(path, &head, len)?;
    let store =
        Store::File { file: Arc::new(Mutex::new(file)), path: Arc::new(path.into()), offset };
    Ok(Part { store, start: 0, len: tokens })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_models::files::testing::TempDir;

    fn bytes(tokens: impl IntoIterator<Item = u16>) -> Vec<u8> {
        tokens.into_iter().flat_map(u16::to_le_bytes).collect()
    }

    fn with_header(magic: u32, version: u32, count: u32, tokens: &[u8]) -> Vec<u8> {
        let mut head: Vec<u8> =
            [magic, version, count].into_iter().flat_map(u32::to_le_bytes).collect();
        head.resize(1024, 0);
        head.extend(tokens);
        head
    }

    fn open(path: &Path, context: usize) -> Result<Corpus, DataError> {
        Corpus::open(Some(path), &Tokenizer::new(), 50_257, context)
    }

    fn all(part: &Part) -> Vec<i32> {
        let mut out = vec![0; part.len() as usize];
        part.copy(0, &mut out).unwrap();
        out
    }

    #[test]
    fn licences_are_split_by_licence() {
        let start = std::time::Instant::now();
        let t = Tokenizer::new();
        let built = start.elapsed();
        let c = Corpus::open(None, &t, 50_257, 128).unwrap();
        let (train, val) = (c.train.len(), c.validation.len());
        println!("{train} + {val} tokens, tokenizer {built:?}, all {:?}", start.elapsed());
        assert!(train > 500_000);
        let share = val as f64 / (train + val) as f64;
        assert!((0.05..0.15).contains(&share), "{share}");
        let mut first = [0; 1];
        c.validation.copy(0, &mut first).unwrap();
        assert_eq!(first, [EOT as i32]);
        assert!(matches!(
            Corpus::open(None, &t, 50_256, 128),
            Err(DataError::Token { token: EOT, position: 0, .. })
        ));
    }

    #[test]
    fn token_files_with_and_without_header() {
        let dir = TempDir::new();
        let tokens = bytes(0..1000);
        let plain = open(&dir.file("plain.bin", &tokens), 16).unwrap();
        let header =
            open(&dir.file("header.bin", &with_header(MAGIC, 1, 1000, &tokens)), 16).unwrap();
        for c in [plain, header] {
            assert_eq!(all(&c.train), (0..900).collect::<Vec<_>>());
            assert_eq!(all(&c.validation), (900..1000).collect::<Vec<_>>());
            assert_eq!(c.validation.windows(16).collect::<Vec<_>>(), [0, 16, 32, 48, 64, 80]);
        }
        let train = dir.file("x_train_0.bin", &tokens);
        assert_eq!(open(&train, 16).unwrap().train.len(), 900);
        dir.file("x_val_0.bin", &bytes(0..40));
        let c = open(&train, 16).unwrap();
        assert_eq!((c.train.len(), c.validation.len()), (1000, 40));
    }

    #[test]
    fn unusable_token_files() {
        let dir = TempDir::new();
        let ten = bytes(0..10);
        let mut odd = ten.clone();
        odd.push(0);
        for (name, content, message) in [
            ("empty.bin", Vec::new(), "the file is empty"),
            ("odd.bin", odd, "21 bytes, expected an even number"),
            ("short.bin", bytes(0..16), "16 tokens to train on, expected at least 17"),
            (
                "count.bin",
                with_header(MAGIC, 1, 11, &ten),
                "expected 11, as the header says, found 10",
            ),
            ("huge.bin", with_header(MAGIC, 1, u32::MAX, &ten), "expected 4294967295"),
            ("version.bin", with_header(MAGIC, 2, 10, &ten), "version: expected 1, found 2"),
            ("llama.bin", with_header(MAGIC_U32, 7, 10, &ten), "Llama 3"),
            ("cut.bin", with_header(MAGIC, 1, 10, &ten)[..500].to_vec(), "a header of 1024 bytes"),
            ("nothing.bin", with_header(MAGIC, 1, 0, &[]), "the file is empty"),
            ("vocab.bin", bytes((0..100).chain([60_000])), "token 60000 at position"),
        ] {
            let error = open(&dir.file(name, &content), 16).unwrap_err().to_string();
            assert!(error.contains(message), "{name}: {error}");
        }
        assert!(
            open(&dir.path().join("missing.bin"), 16)
                .unwrap_err()
                .to_string()
                .contains("missing.bin")
        );
        assert!(open(dir.path(), 16).is_err());
    }

    #[test]
    fn a_file_cut_off_during_training_is_an_error() {
        let dir = TempDir::new();
        let path = dir.file("a.bin", &bytes(0..1000));
        let c = open(&path, 16).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let (mut x, mut y) = ([0; 16], [0; 16]);
        assert!(c.train.window(400, &mut x, &mut y).is_err());
    }

    #[test]
    fn plain_text() {
        let dir = TempDir::new();
        let t = Tokenizer::new();
        let text = "All work and no play.\n".repeat(100);
        let one = open(&dir.file("one.txt", text.as_bytes()), 16).unwrap();
        let expected: Vec<i32> = t.encode(&text).iter().map(|&t| t as i32).collect();
        assert_eq!([all(&one.train), all(&one.validation)].concat(), expected);
        assert_eq!(one.validation.len(), expected.len() as u64 / 10);

        let few = "first\n<|endoftext|>\nsecond <|endoftext|> inside\r\n<|endoftext|>\r\n \n\
                   <|endoftext|>";
        assert_eq!(documents(few), ["first\n", "second <|endoftext|> inside\r\n"]);
        let c = open(&dir.file("few.txt", few.as_bytes()), 4).unwrap();
        let tokens = [all(&c.train), all(&c.validation)].concat();
        assert_eq!(tokens.iter().filter(|&&t| t == EOT as i32).count(), 2);

        let many: String =
            (0..20).map(|i| format!("document number {i}\n<|endoftext|>\n")).collect();
        let c = open(&dir.file("many.txt", many.as_bytes()), 16).unwrap();
        let val: Vec<u32> = all(&c.validation).iter().map(|&t| t as u32).collect();
        let expected = "<|endoftext|>document number 9\n<|endoftext|>document number 19\n";
        assert_eq!(t.decode(&val), expected);
    }

    #[test]
    fn unusable_texts() {
        let dir = TempDir::new();
        for (name, content, message) in [
            ("empty.txt", &b""[..], "the file is empty"),
            ("binary.txt", b"abc\xff\xfe\0", "byte 3 does not fit"),
            ("short.txt", b"a few words", "expected at least 17"),
            ("blank.txt", b"\n<|endoftext|>\n\n", "0 tokens to train on"),
        ] {
            let error = open(&dir.file(name, content), 16).unwrap_err().to_string();
            assert!(error.contains(message), "{name}: {error}");
        }
    }

    #[test]
    fn sequential_batches_follow_each_other_and_start_over() {
        let part = Part::from_tokens((0..23).collect());
        let b = Batches { order: Order::Sequential, seed: 1, per_step: 4, context: 5 };
        let (mut x, mut y) = ([0; 10], [0; 10]);
        for (step, first) in [(0, 0), (0, 2), (1, 0), (7, 2), (u32::MAX - 1, 2)] {
            part.batch(&b, step, first, &mut x, &mut y).unwrap();
            for i in 0..2 {
                for j in 0..5 {
                    let n = u64::from(step) * 4 + u64::from(first) + i as u64;
                    let at = n * 5 + j as u64;
                    assert_eq!(x[i * 5 + j], (at % 23) as i32);
                    assert_eq!(y[i * 5 + j], ((at + 1) % 23) as i32);
                }
            }
        }
    }

    #[test]
    fn shuffled_batches_depend_on_seed_step_and_sample_only() {
        let part = Part::from_tokens((0..1000).collect());
        let b = Batches { order: Order::Shuffled, seed: 1, per_step: 8, context: 4 };
        let (mut x, mut y) = ([0; 32], [0; 32]);
        part.batch(&b, 3, 0, &mut x, &mut y).unwrap();
        let (mut x2, mut y2) = ([0; 8], [0; 8]);
        part.batch(&b, 3, 4, &mut x2, &mut y2).unwrap();
        assert_eq!((&x[16..24], &y[16..24]), (&x2[..], &y2[..]));
        assert!(x.iter().zip(y).all(|(x, y)| x + 1 == y), "no window crosses the end");
        part.batch(&Batches { seed: 2, ..b }, 3, 4, &mut x2, &mut y2).unwrap();
        assert_ne!(&x[16..24], &x2[..]);
        // The shortest possible stream has one window.
        let part = Part::from_tokens((0..5).collect());
        assert!((0..50).all(|i| part.sample_start(&b, i, i) == 0));
        assert!((0..50).all(|i| Part::from_tokens(vec![0; 6]).sample_start(&b, i, 0) < 2));
    }

    #[test]
    fn wrong_buffers_are_refused() {
        let part = Part::from_tokens((0..100).collect());
        let b = Batches { order: Order::Shuffled, seed: 1, per_step: 8, context: 4 };
        assert!(part.batch(&b, 0, 0, &mut [0; 6], &mut [0; 6]).is_err());
        assert!(part.batch(&b, 0, 0, &mut [0; 8], &mut [0; 4]).is_err());
        assert!(part.batch(&Batches { context: 0, ..b }, 0, 0, &mut [], &mut []).is_err());
        assert!(Part::from_tokens(Vec::new()).copy(0, &mut [0; 2]).is_err());
        assert_eq!(Part::from_tokens(Vec::new()).windows(0).len(), 0);
    }
}
