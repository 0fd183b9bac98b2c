//! Tokens to train on: the built-in licence texts, plain text, or token files; and the batches made
//! of them.
//!
//! A token file is recognised by its name, `*.bin` or `*.npy`, or by being asked for with a type
//! of its numbers. All numbers are little-endian.
//!
//! | header | numbers |
//! |---|---|
//! | llm.c's: 256 `i32`: magic 20240520, version 1, number of tokens | `u16` |
//! | llm.c's for Llama 3: magic 20240801, version 7 | `u32` |
//! | NumPy's, of an array with one dimension | as it says |
//! | none, as nanoGPT has it | as asked for, else `u16`; what looks wider is refused |
//!
//! Anything else is UTF-8 text, whose documents are separated by `<|endoftext|>`: by every one, or
//! by lines that have nothing else ([`SpecialTokens`]). Files packed with gzip are unpacked in
//! memory; plain token files stay on disk.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bdia_core::rng::{Draw, Stream};
use bdia_models::files::FileError;
use bdia_models::input::{self, InputError};
use bdia_models::tokenizer::{EOT_TEXT, SpecialTokens, Tokenizer};
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
    /// The file could not be unpacked, or is no text.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A part of a token at the end.
    #[error(
        "{}: {bytes} bytes, expected {} ({token_type} tokens); the file is cut off, not a token \
         file, or of another --token-type",
        path.display(),
        if *token_type == TokenType::U16 { "an even number".into() }
        else { format!("a multiple of {}", token_type.bytes()) }
    )]
    Odd {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// What its numbers are taken for.
        token_type: TokenType,
    },
    /// Numbers that are wider than they are taken for.
    #[error(
        "{}: read as u16, its numbers look like parts of {found} numbers, whose upper parts are 0 \
         or nearly so; expected u16 tokens. Use --token-type {found}, or --token-type u16 if the \
         file is right as it is",
        path.display()
    )]
    Wide {
        /// The file.
        path: PathBuf,
        /// What they look like.
        found: TokenType,
    },
    /// A header that is not complete or not supported.
    #[error("{}: token file: {what}: expected {expected}, found {found}", path.display())]
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
         {vocab}; use the vocabulary the tokens were made with (--vocab), the type of their \
         numbers (--token-type), or other data"
    )]
    Token {
        /// Where the tokens come from.
        source_name: String,
        /// The token.
        token: i64,
        /// Its index in the stream.
        position: u64,
        /// Tokens that the model has.
        vocab: usize,
    },
    /// Text for a model without a tokenizer.
    #[error(
        "{source_name}: text, but the model has no tokenizer: expected tokenizer.json, or \
         vocab.json and merges.txt, in its directory; put them there, or use token files (.bin, \
         .npy)"
    )]
    Tokenizer {
        /// Where the text comes from.
        source_name: String,
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

/// The numbers of a token file, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenType {
    /// 2 bytes: nanoGPT's and llm.c's.
    U16,
    /// 4 bytes.
    U32,
    /// 4 bytes with a sign.
    I32,
    /// 8 bytes with a sign: what NumPy and PyTorch make unasked.
    I64,
}

impl TokenType {
    /// Bytes of a token.
    pub const fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    /// The token in the first bytes; they are there.
    fn token(self, b: &[u8]) -> i64 {
        match (self, b) {
            (Self::U16, &[a, b, ..]) => u16::from_le_bytes([a, b]).into(),
            (Self::U32, &[a, b, c, d, ..]) => u32::from_le_bytes([a, b, c, d]).into(),
            (Self::I32, &[a, b, c, d, ..]) => i32::from_le_bytes([a, b, c, d]).into(),
            (Self::I64, &[a, b, c, d, e, f, g, h, ..]) => {
                i64::from_le_bytes([a, b, c, d, e, f, g, h])
            }
            _ => -1,
        }
    }
}

impl core::fmt::Display for TokenType {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::I64 => "i64",
        })
    }
}

/// The largest vocabulary that can be asked for.
pub const MOST_VOCAB: u64 = 1 << 24;
/// Text files are tokenized in memory; larger ones should be made into token files once.
const MOST_TEXT: u64 = 4 << 30;
/// The beginning of a token file: its header, or enough numbers to see how wide they are.
const HEAD: u64 = 8192;
/// llm.c's header.
const HEADER_BYTES: u64 = 1024;
const MAGIC: u32 = 20_240_520;
const MAGIC_U32: u32 = 20_240_801;

/// Where the tokens of a [`Part`] are.
#[derive(Debug, Clone)]
enum Store {
    Memory(Arc<Vec<u32>>),
    /// Token files stay on disk: they may be larger than the memory.
    File {
        file: Arc<Mutex<File>>,
        path: Arc<PathBuf>,
        offset: u64,
        token_type: TokenType,
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
    pub fn from_tokens(tokens: Vec<u32>) -> Self {
        let len = tokens.len() as u64;
        Self { store: Store::Memory(Arc::new(tokens)), start: 0, len }
    }

    /// Tokens in a file, from a byte on, which is opened and has so many.
    pub(crate) fn of_file(
        file: File,
        path: &Path,
        offset: u64,
        len: u64,
        token_type: TokenType,
    ) -> Self {
        let (file, path) = (Arc::new(Mutex::new(file)), Arc::new(path.into()));
        Self { store: Store::File { file, path, offset, token_type }, start: 0, len }
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
        let mut all = out.iter_mut();
        let n = all.len();
        self.each(at, n, |token| {
            // What does not fit is outside of every vocabulary; files are checked when opened.
            all.next().map(|o| *o = i32::try_from(token).unwrap_or(-1)).is_some()
        })
    }

    /// Hands over `n` tokens from `at` on, as they are stored, while it is told to go on.
    pub(crate) fn each(
        &self,
        at: u64,
        n: usize,
        mut to: impl FnMut(i64) -> bool,
    ) -> Result<(), DataError> {
        match &self.store {
            Store::Memory(tokens) => {
                // In range by construction: `start + len` never exceeds the vector.
                let _ = tokens[at as usize..].iter().take(n).all(|&t| to(t.into()));
            }
            Store::File { file, path, offset, token_type } => {
                let failed = |e| FileError::io(path, "read its tokens", e);
                // A poisoned lock only means that another thread stopped; the position is set anew
                // here.
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                let width = token_type.bytes();
                file.seek(SeekFrom::Start(offset + width as u64 * at)).map_err(failed)?;
                let mut bytes = [0_u8; 4096];
                let mut left = n * width;
                while left > 0 {
                    let bytes = &mut bytes[..left.min(4096)];
                    file.read_exact(bytes).map_err(failed)?;
                    if !bytes.chunks_exact(width).all(|b| to(token_type.token(b))) {
                        break;
                    }
                    left -= bytes.len();
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

    /// All tokens as a NumPy file of one array, in two bytes each where that is enough.
    ///
    /// # Errors
    /// Tokens that cannot be read.
    pub fn to_npy(&self) -> Result<Vec<u8>, DataError> {
        let all = |to: &mut dyn FnMut(i64) -> bool| {
            self.each(self.start, usize::try_from(self.len).unwrap_or(usize::MAX), to)
        };
        let mut small = true;
        all(&mut |token| {
            small = token < 1 << 16;
            small
        })?;
        let header = format!(
            "{{'descr': '<u{}', 'fortran_order': False, 'shape': ({},), }}",
            if small { 2 } else { 4 },
            self.len
        );
        // Magic, version and length are ten bytes; all of it is a multiple of 64, the last a line
        // break.
        let len = (10 + header.len() + 1).next_multiple_of(64) - 10;
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend_from_slice(&(len as u16).to_le_bytes());
        bytes.extend_from_slice(format!("{header:<0$}\n", len - 1).as_bytes());
        all(&mut |token| {
            let token = (token as u32).to_le_bytes();
            bytes.extend_from_slice(if small { &token[..2] } else { &token });
            true
        })?;
        Ok(bytes)
    }

    /// Whether every token is in the vocabulary.
    fn check(&self, source_name: &str, vocab: usize) -> Result<(), DataError> {
        let (mut position, mut foreign) = (0, None);
        self.each(self.start, usize::try_from(self.len).unwrap_or(usize::MAX), |token| {
            foreign = (!(0..vocab as i64).contains(&token)).then_some(token);
            position += u64::from(foreign.is_none());
            foreign.is_none()
        })?;
        let source_name = source_name.into();
        foreign
            .map_or(Ok(()), |token| Err(DataError::Token { source_name, token, position, vocab }))
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
    /// What was noticed.
    pub note: Option<String>,
}

impl Corpus {
    /// The built-in licence texts, or a file; one of tokens has numbers of `token_type`.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn open(
        data: Option<&Path>,
        token_type: Option<TokenType>,
        tokenizer: Option<&Tokenizer>,
        vocab: usize,
        context: usize,
    ) -> Result<Self, DataError> {
        let corpus = match data {
            None => Self::licences(needed(tokenizer, "the licence texts")?),
            Some(path) if has_tokens(path, token_type) => {
                Self::token_file(path, token_type, vocab, context)?
            }
            Some(path) => {
                Self::text_file(path, needed(tokenizer, &path.display().to_string())?, context)?
            }
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

    /// All tokens of a file, nothing set aside: what `eval` measures. Beside them what was noticed.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn whole(
        path: &Path,
        token_type: Option<TokenType>,
        tokenizer: Option<&Tokenizer>,
        vocab: usize,
    ) -> Result<(Part, Option<String>), DataError> {
        let (part, note) = if has_tokens(path, token_type) {
            (open_tokens(path, token_type, vocab)?, None)
        } else {
            let tokenizer = needed(tokenizer, &path.display().to_string())?;
            let text = read_text(path)?;
            let (documents, note) = documents(path, &text, tokenizer.special_tokens());
            (Self::join(&documents, tokenizer), note)
        };
        part.check(&path.display().to_string(), vocab)?;
        Ok((part, note))
    }

    /// Documents one after the other; a single one without a start token, unless the model expects
    /// one at every text's start.
    fn join(documents: &[&str], tokenizer: &Tokenizer) -> Part {
        let begins = documents.len() > 1 || tokenizer.adds_bos();
        let start = start_token(tokenizer).filter(|_| begins);
        let mut all = Vec::new();
        for tokens in tokenizer.encode_all(documents) {
            document(&mut all, start, &tokens);
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
            let part =
                if name_hash(name).is_multiple_of(10) { &mut validation } else { &mut train };
            document(part, start_token(tokenizer), &tokens);
        }
        let name = "licence texts of SPDX".into();
        let (train, validation) = (Part::from_tokens(train), Part::from_tokens(validation));
        Self { train, validation, name, note: None }
    }

    fn text_file(path: &Path, tokenizer: &Tokenizer, context: usize) -> Result<Self, DataError> {
        let text = read_text(path)?;
        let (documents, note) = documents(path, &text, tokenizer.special_tokens());
        let name = path.display().to_string();
        if documents.len() < 10 {
            // Too few to give whole ones away.
            let split = Self::split(Self::join(&documents, tokenizer), context, name);
            return Ok(Self { note, ..split });
        }
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for (i, tokens) in tokenizer.encode_all(&documents).iter().enumerate() {
            let part = if i % 10 == 9 { &mut validation } else { &mut train };
            document(part, start_token(tokenizer), tokens);
        }
        let (train, validation) = (Part::from_tokens(train), Part::from_tokens(validation));
        Ok(Self { train, validation, name, note })
    }

    fn token_file(
        path: &Path,
        token_type: Option<TokenType>,
        vocab: usize,
        context: usize,
    ) -> Result<Self, DataError> {
        let all = open_tokens(path, token_type, vocab)?;
        let name = path.display().to_string();
        // nanoGPT and llm.c write the two parts as two files, `…train….bin` and `…val….bin`.
        let file_name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(at) = file_name.rfind("train") {
            let sibling =
                path.with_file_name(format!("{}val{}", &file_name[..at], &file_name[at + 5..]));
            if sibling.is_file() {
                let name = format!("{name} and {}", sibling.display());
                let validation = open_tokens(&sibling, token_type, vocab)?;
                return Ok(Self { train: all, validation, name, note: None });
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
        let (train, validation) = (all.slice(0, train), all.slice(train, validation));
        Self { train, validation, name, note: None }
    }
}

fn has_tokens(path: &Path, token_type: Option<TokenType>) -> bool {
    token_type.is_some() || ["bin", "npy"].contains(&input::ending(path).as_str())
}

/// The text of a file that has some.
fn read_text(path: &Path) -> Result<String, DataError> {
    let text = input::read_text(path, MOST_TEXT)?;
    if text.is_empty() { Err(DataError::Empty(path.into())) } else { Ok(text) }
}

/// The token that every document begins with, and from which text without a prompt is written: the
/// one that the model expects at a text's start, else the one that ends documents.
pub fn start_token(tokenizer: &Tokenizer) -> Option<u32> {
    let own = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    own.or_else(|| tokenizer.token(EOT_TEXT)).or(tokenizer.eos()).or(tokenizer.bos())
}

fn document(to: &mut Vec<u32>, start: Option<u32>, tokens: &[u32]) {
    to.extend(start);
    to.extend(tokens);
}

/// The tokenizer that a text needs.
fn needed<'a>(
    tokenizer: Option<&'a Tokenizer>,
    source_name: &str,
) -> Result<&'a Tokenizer, DataError> {
    tokenizer.ok_or_else(|| DataError::Tokenizer { source_name: source_name.into() })
}

/// FNV-1a: the same on every machine and in every version.
fn name_hash(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// The documents of a text that are not empty, and a note where they end inside lines.
fn documents<'a>(
    path: &Path,
    text: &'a str,
    special: SpecialTokens,
) -> (Vec<&'a str>, Option<String>) {
    let (mut all, mut start, mut inside) = (Vec::new(), 0, 0);
    for (at, _) in text.match_indices(EOT_TEXT) {
        let after = &text[at + EOT_TEXT.len()..];
        // The rest of its line, with the line's end, where that is white space. No more is looked
        // at: a line may have very many of them.
        let blank = match after.find(|c: char| c == '\n' || !c.is_whitespace()) {
            None => Some(after.len()),
            Some(end) => after[end..].starts_with('\n').then_some(end + 1),
        };
        let own_line = blank.is_some() && (at == 0 || text[..at].ends_with('\n'));
        if special == SpecialTokens::Text && !own_line {
            continue;
        }
        inside += usize::from(!own_line);
        all.push(&text[start..at]);
        start = at + EOT_TEXT.len() + blank.unwrap_or(0);
    }
    all.push(&text[start..]);
    all.retain(|d| !d.trim().is_empty());
    let note = (inside > 0).then(|| {
        format!(
            "{}: {inside} {EOT_TEXT} inside lines end documents; with --special-tokens text they \
             are text",
            path.display()
        )
    });
    (all, note)
}

/// Where the tokens of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenLayout {
    /// Bytes before the first.
    pub offset: u64,
    /// How many there are.
    pub tokens: u64,
    /// Their numbers.
    pub token_type: TokenType,
}

/// Where the tokens are in a file of `len` bytes that starts with `head` (8 KiB of it, or all).
/// `asked` is what its numbers are said to be.
///
/// # Errors
/// [`DataError`]
pub fn token_layout(
    path: &Path,
    head: &[u8],
    len: u64,
    asked: Option<TokenType>,
) -> Result<TokenLayout, DataError> {
    if len == 0 {
        return Err(DataError::Empty(path.into()));
    }
    let wrong = |what, expected: String, found: String| DataError::Header {
        path: path.into(),
        what,
        expected,
        found,
    };
    let entry = |i: usize| head.as_chunks::<4>().0.get(i).map(|b| u32::from_le_bytes(*b));
    let (offset, declared, token_type) = match entry(0) {
        Some(magic @ (MAGIC | MAGIC_U32)) => {
            let (version, token_type, whose) = match magic {
                MAGIC => (1, TokenType::U16, ""),
                _ => (7, TokenType::U32, " (tokens of Llama 3)"),
            };
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
            let (found, count) = (entry(1).ok_or_else(cut)?, entry(2).ok_or_else(cut)?);
            if found != version {
                return Err(wrong("version", format!("{version}{whose}"), found.to_string()));
            }
            (HEADER_BYTES, Some((u64::from(count), whose)), Some(token_type))
        }
        _ if head.starts_with(NUMPY) => {
            let (offset, count, token_type) = numpy_header(head, &wrong)?;
            (offset, Some((count, "")), Some(token_type))
        }
        _ if input::ending(path) == "npy" => {
            let found = head.iter().take(NUMPY.len()).map(|b| format!("{b:02x}")).collect();
            return Err(wrong("begin", "NumPy's header".into(), found));
        }
        _ => (0, None, None),
    };
    if let (Some(said), Some(asked)) = (token_type, asked.filter(|&a| Some(a) != token_type)) {
        let expected = format!("{said}, as the header says");
        return Err(wrong("type", expected, format!("{asked} as --token-type")));
    }
    if let Some(found) = wider(head, len).filter(|_| token_type.or(asked).is_none()) {
        return Err(DataError::Wide { path: path.into(), found });
    }
    let token_type = token_type.or(asked).unwrap_or(TokenType::U16);
    let (bytes, width) = (len.saturating_sub(offset), token_type.bytes() as u64);
    if !bytes.is_multiple_of(width) {
        return Err(DataError::Odd { path: path.into(), bytes: len, token_type });
    }
    let tokens = bytes / width;
    match declared {
        Some((n, whose)) if n != tokens => {
            let found = format!("{tokens} in the file, which is cut off or has something appended");
            Err(wrong("number of tokens", format!("{n}, as the header says{whose}"), found))
        }
        _ if tokens == 0 => Err(DataError::Empty(path.into())),
        _ => Ok(TokenLayout { offset, tokens, token_type }),
    }
}

const NUMPY: &[u8] = b"\x93NUMPY";

/// Bytes, number of tokens and type of a file that begins with the header of NumPy's format (a
/// dictionary in Python's syntax, after the magic, two bytes of version and the length).
fn numpy_header(
    head: &[u8],
    wrong: &dyn Fn(&'static str, String, String) -> DataError,
) -> Result<(u64, u64, TokenType), DataError> {
    let cut = || wrong("header", "a header of NumPy in 8 KiB".into(), "something else".into());
    let (start, size) = match *head.get(NUMPY.len()..12).ok_or_else(cut)? {
        [1, _, a, b, ..] => (10, u16::from_le_bytes([a, b]).into()),
        [2 | 3, _, a, b, c, d] => (12, u32::from_le_bytes([a, b, c, d]) as usize),
        _ => return Err(cut()),
    };
    let end = start + size;
    let text = head.get(start..end).and_then(|b| core::str::from_utf8(b).ok()).ok_or_else(cut)?;
    let value =
        |key: &str| text.split_once(key).map(|(_, rest)| rest.trim_start_matches([':', ' ']));
    let descr = value("'descr'").and_then(|v| v.split([',', '}']).next()).ok_or_else(cut)?.trim();
    let token_type = match descr.trim_matches('\'') {
        "<u2" => TokenType::U16,
        "<u4" => TokenType::U32,
        "<i4" => TokenType::I32,
        "<i8" => TokenType::I64,
        _ => {
            let expected = "'<u2', '<u4', '<i4' or '<i8'".into();
            return Err(wrong("type", expected, descr.chars().take(60).collect()));
        }
    };
    let shape = value("'shape'").and_then(|v| v.split_inclusive(')').next()).ok_or_else(cut)?;
    let count = shape.strip_prefix('(').and_then(|s| s.strip_suffix(",)")).map(str::parse);
    match count {
        Some(Ok(count)) => Ok((end as u64, count, token_type)),
        _ => Err(wrong("shape", "one dimension".into(), shape.chars().take(60).collect())),
    }
}

/// What the numbers of a file are that is read as `u16` and has zeros, or nearly, in the places of
/// high halves. Small numbers there tell something only beside large ones, and of many.
fn wider(head: &[u8], len: u64) -> Option<TokenType> {
    let words: Vec<u16> = head.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
    [TokenType::I64, TokenType::U32].into_iter().find(|token_type| {
        let groups = words.chunks_exact(token_type.bytes() / 2);
        let most = |at: usize| groups.clone().map(|g| g[at]).max().unwrap_or(0);
        let rest_is_zero = groups.clone().all(|g| g[2..].iter().all(|&w| w == 0));
        let (low, high) = (most(0), most(1));
        let small = high <= 15 && low >= 256 && groups.len() >= 64;
        len.is_multiple_of(token_type.bytes() as u64)
            && groups.len() >= 8
            && rest_is_zero
            && low > 0
            && (high == 0 || small)
    })
}

/// The tokens of a file; `vocab`, the model's, is for errors.
fn open_tokens(path: &Path, asked: Option<TokenType>, vocab: usize) -> Result<Part, DataError> {
    let failed = |e: io::Error| FileError::io(path, "read it", e);
    let mut file = File::open(path).map_err(|e| FileError::io(path, "open it", e))?;
    let len = file.metadata().map_err(failed)?.len();
    let mut head = Vec::new();
    (&mut file).take(HEAD).read_to_end(&mut head).map_err(failed)?;
    if input::is_gzip(&head) {
        return unpacked_tokens(path, &input::read(path, MOST_TEXT)?, asked, vocab);
    }
    let TokenLayout { offset, tokens, token_type } = token_layout(path, &head, len, asked)?;
    let (file, path) = (Arc::new(Mutex::new(file)), Arc::new(path.into()));
    Ok(Part { store: Store::File { file, path, offset, token_type }, start: 0, len: tokens })
}

/// The tokens of a file that was packed; its path and `vocab` are for errors.
fn unpacked_tokens(
    path: &Path,
    bytes: &[u8],
    asked: Option<TokenType>,
    vocab: usize,
) -> Result<Part, DataError> {
    let head = &bytes[..bytes.len().min(HEAD as usize)];
    let layout = token_layout(path, head, bytes.len() as u64, asked)?;
    let all = bytes[layout.offset as usize..].chunks_exact(layout.token_type.bytes());
    let tokens: Result<_, _> = (all.map(|b| layout.token_type.token(b)).enumerate())
        .map(|(i, token)| {
            u32::try_from(token).map_err(|_| DataError::Token {
                source_name: path.display().to_string(),
                token,
                position: i as u64,
                vocab,
            })
        })
        .collect();
    tokens.map(Part::from_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_models::files::testing::TempDir;
    use bdia_models::tokenizer::EOT;

    fn bytes(tokens: impl IntoIterator<Item = u16>) -> Vec<u8> {
        tokens.into_iter().flat_map(u16::to_le_bytes).collect()
    }

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut gz, bytes).unwrap();
        gz.finish().unwrap()
    }

    fn with_header(magic: u32, version: u32, count: u32, tokens: &[u8]) -> Vec<u8> {
        let mut head: Vec<u8> =
            [magic, version, count].into_iter().flat_map(u32::to_le_bytes).collect();
        head.resize(1024, 0);
        head.extend(tokens);
        head
    }

    fn open(path: &Path, context: usize) -> Result<Corpus, DataError> {
        Corpus::open(Some(path), None, Some(&Tokenizer::gpt2()), 50_257, context)
    }

    fn all(part: &Part) -> Vec<i32> {
        let mut out = vec![0; part.len() as usize];
        part.copy(0, &mut out).unwrap();
        out
    }

    #[test]
    fn licences_are_split_by_licence() {
        let start = std::time::Instant::now();
        let t = Tokenizer::gpt2();
        let built = start.elapsed();
        let c = Corpus::open(None, None, Some(&t), 50_257, 128).unwrap();
        let (train, val) = (c.train.len(), c.validation.len());
        println!("{train} + {val} tokens, tokenizer {built:?}, all {:?}", start.elapsed());
        assert!(train > 500_000);
        let share = val as f64 / (train + val) as f64;
        assert!((0.05..0.15).contains(&share), "{share}");
        let mut first = [0; 1];
        c.validation.copy(0, &mut first).unwrap();
        assert_eq!(first, [EOT as i32]);
        assert!(matches!(
            Corpus::open(None, None, Some(&t), 50_256, 128),
            Err(DataError::Token { token: 50_256, position: 0, .. })
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
        // Tokens that begin like a packed file.
        for first in [[0x8b1f, 9], [0x8b1f, 0x2008], [0x8b1f, 0x0808]] {
            let path = dir.file("magic.bin", &bytes(first.into_iter().chain([257; 100])));
            assert_eq!(
                Corpus::whole(&path, None, Some(&Tokenizer::gpt2()), 50_257).unwrap().0.len(),
                102
            );
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
        let t = Tokenizer::gpt2();
        let text = "All work and no play.\n".repeat(100);
        let one = open(&dir.file("one.txt", text.as_bytes()), 16).unwrap();
        let expected: Vec<i32> = t.encode(&text).iter().map(|&t| t as i32).collect();
        assert_eq!([all(&one.train), all(&one.validation)].concat(), expected);
        assert_eq!(one.validation.len(), expected.len() as u64 / 10);

        let few = "first\n<|endoftext|>\nsecond <|endoftext|> inside\r\n<|endoftext|>\r\n \n\
                   <|endoftext|>";
        let (found, note) = documents(Path::new("few.txt"), few, SpecialTokens::Text);
        assert_eq!(found, ["first\n", "second <|endoftext|> inside\r\n"]);
        assert_eq!(note, None);
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
    fn ends_of_text_inside_lines() {
        let path = Path::new("a.txt");
        let text = "one<|endoftext|>\ntwo<|endoftext|>three\n<|endoftext|> \r\n\n<|endoftext|>four";
        let (found, note) = documents(path, text, SpecialTokens::Parse);
        assert_eq!(found, ["one", "two", "three\n", "four"]);
        let note = note.unwrap();
        assert!(note.contains("a.txt: 3 <|endoftext|>") && note.contains("--special-tokens text"));
        // Where they have lines of their own both readings are one.
        let lines = "a\n<|endoftext|>\nb\r\n<|endoftext|>\r\n\nc\n";
        let both = [SpecialTokens::Parse, SpecialTokens::Text].map(|s| documents(path, lines, s));
        assert_eq!(both[0], both[1]);
        assert_eq!(both[0], (vec!["a\n", "b\r\n", "\nc\n"], None));
        // A line of very many is read once: to the end of the line from each it took minutes.
        let long = "a<|endoftext|>".repeat(1 << 19);
        assert_eq!(documents(path, &long, SpecialTokens::Parse).0.len(), 1 << 19);
        assert_eq!(documents(path, &long, SpecialTokens::Text).0, [long.as_str()]);

        let dir = TempDir::new();
        let path = dir.file("b.txt", "\u{feff}one<|endoftext|>two".as_bytes());
        let t = Tokenizer::gpt2().with_special_tokens(SpecialTokens::Parse);
        let (part, _) = Corpus::whole(&path, None, Some(&t), 50_257).unwrap();
        let expected = [&[EOT][..], &t.encode("one"), &[EOT], &t.encode("two")].concat();
        assert_eq!(all(&part), expected.iter().map(|&t| t as i32).collect::<Vec<_>>());
    }

    #[test]
    fn tokens_of_every_width() {
        let dir = TempDir::new();
        let tokens: Vec<i64> = (0..1000).map(|i| i * 7 % 500 + 20).collect();
        let wide = |width: usize| -> Vec<u8> {
            tokens.iter().flat_map(|t| t.to_le_bytes()[..width].to_vec()).collect()
        };
        let open = |path: &Path, token_type| {
            Corpus::open(Some(path), token_type, Some(&Tokenizer::gpt2()), 50_257, 16)
        };
        let npy = |descr: &str, shape: &str, content: &[u8]| {
            let mut head =
                format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
            while !(head.len() + 11).is_multiple_of(64) {
                head.push(' ');
            }
            let mut out = b"\x93NUMPY\x01\0".to_vec();
            out.extend((head.len() as u16 + 1).to_le_bytes());
            [&out, head.as_bytes(), b"\n", content].concat()
        };
        for (width, token_type, descr) in [
            (2, TokenType::U16, "<u2"),
            (4, TokenType::U32, "<u4"),
            (4, TokenType::I32, "<i4"),
            (8, TokenType::I64, "<i8"),
        ] {
            // Asked for, whatever the name; NumPy's header; packed.
            let bytes = wide(width);
            let array = npy(descr, "(1000,)", &bytes);
            for (path, asked) in [
                (dir.file("a.tokens", &bytes), Some(token_type)),
                (dir.file("a.npy", &array), None),
                (dir.file("a.npy.gz", &packed(&array)), None),
            ] {
                let c = open(&path, asked).unwrap();
                let found = [all(&c.train), all(&c.validation)].concat();
                assert!(found.iter().zip(&tokens).all(|(a, b)| i64::from(*a) == *b), "{path:?}");
                assert_eq!(found.len(), 1000);
            }
            // Wider numbers than asked for are noticed, of few tokens too.
            let looks = if token_type == TokenType::I32 { TokenType::U32 } else { token_type };
            for n in [10, 1000] {
                let path = dir.file("a.bin", &bytes[..n * width]);
                match Corpus::whole(&path, None, Some(&Tokenizer::gpt2()), 50_257) {
                    Ok((part, _)) => assert_eq!((part.len(), width), (n as u64, 2)),
                    Err(e) => {
                        let way_out = format!("Use --token-type {looks},");
                        assert!(width > 2 && e.to_string().contains(&way_out), "{e}");
                    }
                }
            }
        }
        // What was asked for is right, even if it looks wrong.
        let path = dir.file("b.bin", &wide(4));
        assert_eq!(open(&path, Some(TokenType::U16)).unwrap().train.len(), 1800);
        // Small numbers of 2 bytes are nothing else, even if every second is very small.
        let small: Vec<u8> =
            (0..500_u16).flat_map(|i| [i % 20, i % 3]).flat_map(u16::to_le_bytes).collect();
        assert_eq!(open(&dir.file("c.bin", &small), None).unwrap().train.len(), 900);
        // A vocabulary of more than 16 bits has high halves that are not 0.
        let large: Vec<u8> = (0..500_u32).flat_map(|i| (i * 301).to_le_bytes()).collect();
        let e = open(&dir.file("c.bin", &large), None).unwrap_err();
        assert!(matches!(e, DataError::Wide { found: TokenType::U32, .. }), "{e}");
        let e = open(&dir.file("c.bin", &large), Some(TokenType::U32)).unwrap_err();
        assert!(matches!(e, DataError::Token { token: 50_267, position: 167, .. }), "{e}");
        // Where the file is packed too, the vocabulary is the model's.
        let beyond = packed(&[1_u32, 70_000].map(u32::to_le_bytes).concat().repeat(20));
        let e = open(&dir.file("c.bin.gz", &beyond), Some(TokenType::U32)).unwrap_err();
        let found = matches!(e, DataError::Token { token: 70_000, position: 1, vocab: 50_257, .. });
        assert!(found, "{e}");
        let llama = with_header(MAGIC_U32, 7, 1000, &wide(4));
        assert_eq!(open(&dir.file("d.bin", &llama), None).unwrap().train.len(), 900);
        for (name, content, asked, message) in [
            ("e.bin", llama, Some(TokenType::U16), "expected u32, as the header says, found u16"),
            ("e.bin", wide(4)[..3999].to_vec(), Some(TokenType::I32), "expected a multiple of 4"),
            ("e.npy", npy(">u2", "(1000,)", &wide(2)), None, "found '>u2'"),
            ("e.npy", npy("<u2", "(10, 100)", &wide(2)), None, "one dimension, found (10, 100)"),
            ("e.npy", npy("<u2", "(1001,)", &wide(2)), None, "expected 1001, as the header says"),
            ("e.npy", b"\x93NUMPY\x01\0\xff\xff{".to_vec(), None, "header"),
            ("e.npy", b"no array".to_vec(), None, "expected NumPy's header"),
            ("e.bin", wide(8)[..7996].to_vec(), Some(TokenType::I64), "a multiple of 8"),
        ] {
            let error = open(&dir.file(name, &content), asked).unwrap_err().to_string();
            assert!(error.contains(message), "{name}: {error}");
        }
        let minus = [1_i64, 2, -100].map(i64::to_le_bytes).concat().repeat(20);
        let error = open(&dir.file("f.bin", &minus), Some(TokenType::I64)).unwrap_err();
        assert!(error.to_string().contains("token -100 at position 2"), "{error}");
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
