//! Prompts and what is to be written after them: files of pairs and of conversations, and batches
//! in which only completions have targets.
//!
//! | file | read as |
//! |---|---|
//! | `.csv` | a header, commas, quotes; quoted fields may have line breaks (E2E: `mr,ref`) |
//! | `.tsv` | a header, tabs, no quotes |
//! | `.jsonl` | one object with two strings a line; of conversations, with a list `messages` |
//! | `.safetensors` | the tokens of examples, as `prepare` has written them; they stay on disk |
//!
//! A file may be packed with gzip (`.csv.gz`), which its content tells. Empty lines and pairs
//! without a completion are skipped; the latter are counted.
//!
//! An example in the format `plain` is `prompt \n completion`, begun by the token that the model
//! expects at a text's start, if there is one, and ended by the one that ends texts. Prompt and
//! completion become tokens separately, so that a model that is given `prompt \n` goes on from the
//! tokens it was trained on. In the format `chat` an example is what the model's own template makes
//! of a conversation, and the assistant's turns are learned.
//!
//! Samples have one length: short examples are padded at their end, where causal attention does not
//! see the padding, and padding has no target. With packing, a sample has several examples, as many
//! as there is room for; none of them sees another, and positions begin anew with each.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use bdia_core::rng::{Draw, Stream};
use bdia_models::chat::{ChatError, ChatTemplate, Message};
use bdia_models::files::{FileError, write_bytes};
use bdia_models::input::{self, InputError, list};
use bdia_models::language::{Config, Family as _};
use bdia_models::tokenizer::{SpecialTokens, Tokenizer};
use bdia_train::{Failure, report};
use clap::ValueEnum;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata};
use serde::{Deserialize, Serialize};
use serde_json::json;
use xxhash_rust::xxh3::Xxh3;

use crate::data::{DataError, Part, TokenType};
use crate::train::Texts;

/// Which tokens of a pair are learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// Those of the completion, and the end of the text; the assistant's of a conversation.
    Completion,
    /// Those of the prompt as well.
    All,
}

/// What becomes of prompts and completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The prompt, a line break, the completion.
    Plain,
    /// A conversation, as the model's own template writes it.
    Chat,
}

/// What stands between a prompt and its completion.
pub const SEPARATOR: &str = "\n";

/// The most bytes of pairs that are read.
const LIMIT: u64 = 4 << 30;

/// A file of pairs that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PairsError {
    /// The file could not be read or unpacked, or is no text.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A name that says nothing about the content.
    #[error(
        "{}: expected a file whose name ends in .csv, .tsv or .jsonl, or one of them and .gz, or \
         in .safetensors",
        .0.display()
    )]
    Kind(PathBuf),
    /// A column is missing.
    #[error("{}: no column \"{expected}\"; the columns are {}", path.display(), list(found))]
    Column {
        /// The file.
        path: PathBuf,
        /// The column that was asked for.
        expected: String,
        /// Those that are there.
        found: Vec<String>,
    },
    /// A column is there twice.
    #[error("{}: the column \"{column}\" comes twice", path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
    },
    /// A row that is not one of the table, or a line that is not an object.
    #[error("{}, line {line}: {what}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong.
        what: String,
    },
    /// There are no pairs.
    #[error("{}: no pairs{why}", path.display())]
    None {
        /// The file.
        path: PathBuf,
        /// What became of them.
        why: String,
    },
    /// A conversation that cannot be written as the model's template has it.
    #[error("{}, example {example}: {error}", path.display())]
    Chat {
        /// The file.
        path: PathBuf,
        /// Which one, from 1.
        example: usize,
        /// What the template says.
        error: ChatError,
    },
    /// Tokens that cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A file of `prepare` that is damaged, or for other ways to read examples.
    #[error("{}: {what}", path.display())]
    Prepared {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A token that the model does not have.
    #[error("{}: token {token} is outside the model's vocabulary of {vocab}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// The token.
        token: u32,
        /// Tokens that the model has.
        vocab: usize,
    },
}

impl From<PairsError> for Failure {
    fn from(error: PairsError) -> Self {
        Self::Program(Box::new(error))
    }
}

/// A prompt and what is to be written after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The prompt, without white space at its ends.
    pub prompt: String,
    /// The completion, without white space at its ends.
    pub completion: String,
}

/// What an example of a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A prompt and a completion, in columns of these names.
    Pairs(PairColumns),
    /// A conversation: the list `messages` of objects with `role` and `content`.
    Messages,
}

/// How a file of examples is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// What an example is.
    pub kind: Kind,
    /// What becomes of pairs.
    pub format: Format,
    /// Which tokens are learned.
    pub loss_on: LossOn,
}

impl Reading {
    /// What tokens depend on besides texts and vocabulary: flags, for messages and comparison, and
    /// a digest of what becomes of two short examples, which template, first and last token decide.
    fn about(&self, (tokenizer, end): (&Tokenizer, Option<u32>)) -> [String; 2] {
        let value = |v: Option<clap::builder::PossibleValue>| {
            v.map_or_else(String::new, |v| v.get_name().to_owned())
        };
        let [format, loss_on] =
            [self.format.to_possible_value(), self.loss_on.to_possible_value()].map(value);
        let special = match tokenizer.special_tokens() {
            SpecialTokens::Parse => "parse",
            SpecialTokens::Text => "text",
        };
        let mut hash = Xxh3::new();
        let mut add = |token: u32| hash.update(&token.to_le_bytes());
        if self.format == Format::Chat {
            let turns = [message(USER, "a b"), message(ASSISTANT, "c"), message(USER, "d")];
            for messages in [&turns[..2], &[&turns[2..], &turns[1..2]].concat()] {
                let (tokens, learned) = tokenizer.encode_chat(messages).unwrap_or_default();
                tokens.into_iter().for_each(&mut add);
                learned.into_iter().for_each(|l| add(u32::from(l)));
            }
        } else {
            begun(tokenizer, tokenizer.encode("a b")).into_iter().chain(end).for_each(&mut add);
        }
        let flags = format!("--format {format} --loss-on {loss_on} --special-tokens {special}");
        [flags, format!("{:016x}", hash.digest())]
    }
}

/// Names of the columns of a file of pairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairColumns {
    /// That of prompts.
    pub prompt: String,
    /// That of completions.
    pub completion: String,
}

impl PairColumns {
    /// Those of the E2E challenge: the meaning representation and a reference.
    pub fn e2e() -> Self {
        Self { prompt: "mr".into(), completion: "ref".into() }
    }
}

/// The pairs of a file, and how many had nothing to learn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pairs {
    /// Those with a completion.
    pub pairs: Vec<Pair>,
    /// Lines of those without, from 1.
    pub skipped: Vec<u64>,
}

impl Pairs {
    fn push(&mut self, line: u64, prompt: &str, completion: &str) {
        let [prompt, completion] = [prompt, completion].map(|s| s.trim().to_string());
        if completion.is_empty() {
            self.skipped.push(line);
        } else {
            self.pairs.push(Pair { prompt, completion });
        }
    }
}

/// All pairs of a file; tells how many were skipped.
///
/// # Errors
/// [`PairsError`] names file and line.
pub fn read(path: &Path, columns: &PairColumns) -> Result<Vec<Pair>, PairsError> {
    let Pairs { pairs, skipped } = parse(path, input::read(path, LIMIT)?, columns)?;
    if let Some(first) = skipped.first() {
        report::note!(
            "{}: {} pair(s) without a completion are skipped, the first in line {first}",
            path.display(),
            skipped.len()
        );
    }
    Ok(pairs)
}

/// All pairs of a file with these bytes, packed or plain; its name says what it is.
///
/// # Errors
/// [`PairsError`] names file and line.
pub fn parse(path: &Path, bytes: Vec<u8>, columns: &PairColumns) -> Result<Pairs, PairsError> {
    let text = input::text(path, input::unpack(path, bytes, LIMIT)?)?;
    let pairs = match input::ending(path).as_str() {
        "csv" => table(path, &text, columns, b',')?,
        "tsv" => table(path, &text, columns, b'\t')?,
        "jsonl" => lines(path, &text, columns)?,
        _ => return Err(PairsError::Kind(path.into())),
    };
    if pairs.pairs.is_empty() {
        let why = match pairs.skipped.len() {
            0 => String::new(),
            n => format!(": the {n} that are there have no completion"),
        };
        Err(PairsError::None { path: path.into(), why })
    } else {
        Ok(pairs)
    }
}

fn table(
    path: &Path,
    text: &str,
    columns: &PairColumns,
    delimiter: u8,
) -> Result<Pairs, PairsError> {
    let quotes = delimiter == b',';
    if quotes && let Some(line) = input::open_quote(text) {
        let what = "the quote that opens here is never closed".into();
        return Err(PairsError::Row { path: path.into(), line, what });
    }
    let mut reader =
        csv::ReaderBuilder::new().delimiter(delimiter).quoting(quotes).from_reader(text.as_bytes());
    let line_of = |p: &csv::Position| input::line_of_row(text, p.byte(), p.line());
    let failed = |e: csv::Error| {
        let line = e.position().map_or(1, line_of);
        let what = match e.kind() {
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                format!("{len} column(s), expected {expected_len} as in the header")
            }
            _ => e.to_string(),
        };
        PairsError::Row { path: path.into(), line, what }
    };
    let header: Vec<String> =
        reader.headers().map_err(failed)?.iter().map(|h| h.trim().to_string()).collect();
    let place = |name: &String| {
        let mut places = header.iter().enumerate().filter(|(_, h)| *h == name).map(|(i, _)| i);
        match (places.next(), places.next()) {
            (Some(i), None) => Ok(i),
            (None, _) => Err(PairsError::Column {
                path: path.into(),
                expected: name.clone(),
                found: header.clone(),
            }),
            _ => Err(PairsError::Twice { path: path.into(), column: name.clone() }),
        }
    };
    let (prompt, completion) = (place(&columns.prompt)?, place(&columns.completion)?);
    let mut pairs = Pairs::default();
    for record in reader.records() {
        let record = record.map_err(failed)?;
        let line = record.position().map_or(0, line_of);
        pairs.push(line, &record[prompt], &record[completion]);
    }
    Ok(pairs)
}

fn lines(path: &Path, text: &str, columns: &PairColumns) -> Result<Pairs, PairsError> {
    let mut pairs = Pairs::default();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let number = i as u64 + 1;
        let wrong = |what: String| PairsError::Row { path: path.into(), line: number, what };
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(line).map_err(|e| wrong(format!("not a JSON object: {e}")))?;
        let of = |name: &String| match object.get(name) {
            Some(serde_json::Value::String(s)) => Ok(s),
            Some(_) => Err(wrong(format!("\"{name}\" is not a string"))),
            None => {
                let found = object.keys().cloned().collect::<Vec<_>>();
                Err(wrong(format!("no \"{name}\"; the names are {}", list(&found))))
            }
        };
        pairs.push(number, of(&columns.prompt)?, of(&columns.completion)?);
    }
    Ok(pairs)
}

/// The conversations of a file of JSON objects with a list `messages`.
///
/// # Errors
/// [`PairsError`] names file and line.
pub fn conversations(path: &Path) -> Result<Vec<Vec<Message>>, PairsError> {
    parse_conversations(path, input::read(path, LIMIT)?)
}

/// The conversations of a file with these bytes, packed or plain.
///
/// # Errors
/// [`PairsError`] names file and line.
pub fn parse_conversations(path: &Path, bytes: Vec<u8>) -> Result<Vec<Vec<Message>>, PairsError> {
    #[derive(Deserialize)]
    struct Line {
        messages: Vec<Message>,
        /// Would be a part of the conversation.
        #[serde(default)]
        tools: serde_json::Value,
    }
    if input::ending(path) != "jsonl" {
        return Err(PairsError::Kind(path.into()));
    }
    let text = input::text(path, input::unpack(path, bytes, LIMIT)?)?;
    let mut all = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let wrong = |what: String| PairsError::Row { path: path.into(), line: i as u64 + 1, what };
        let Line { messages, tools } = serde_json::from_str(line).map_err(|e| {
            wrong(format!(
                "expected an object with a list \"messages\" of objects with the strings \
                 \"role\" and \"content\": {e}"
            ))
        })?;
        if !tools.is_null() {
            return Err(wrong("\"tools\" are not implemented; leave them out".into()));
        }
        if !messages.iter().any(Message::is_learned) {
            let what = "no message whose role is \"assistant\": there is nothing to learn";
            return Err(wrong(what.into()));
        }
        all.push(messages);
    }
    if all.is_empty() {
        return Err(PairsError::None { path: path.into(), why: String::new() });
    }
    Ok(all)
}

/// The roles of a pair in a conversation.
const USER: &str = "user";
/// The role whose messages are learned.
const ASSISTANT: &str = "assistant";

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

/// The tokens after which a completion is generated.
///
/// # Errors
/// Those of the model's template.
pub fn prompt_tokens(
    tokenizer: &Tokenizer,
    format: Format,
    prompt: &str,
) -> Result<Vec<u32>, ChatError> {
    match format {
        Format::Plain => Ok(begun(tokenizer, tokenizer.encode(&format!("{prompt}{SEPARATOR}")))),
        Format::Chat => {
            let template = tokenizer.chat().ok_or(ChatError::None)?;
            chat_prompt(tokenizer, template, &[message(USER, prompt)])
        }
    }
}

/// A conversation as tokens, up to where the assistant begins to write.
///
/// # Errors
/// Those of the model's template.
pub fn chat_prompt(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<Vec<u32>, ChatError> {
    let text = template.render(messages, true)?;
    Ok(tokenizer.clone().with_special_tokens(SpecialTokens::Parse).encode(&text))
}

/// With the token that the model expects at a text's start.
pub fn begun(tokenizer: &Tokenizer, mut tokens: Vec<u32>) -> Vec<u32> {
    if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos()) {
        tokens.insert(0, bos);
    }
    tokens
}

/// One example's place in the tokens of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Example {
    start: usize,
    /// Tokens, with the end of the document.
    len: usize,
    /// Tokens before the first that is learned.
    prompt: usize,
}

/// Examples that are encoded at a time: what that takes is little beside the tokens of all.
const AT_ONCE: usize = 1024;

/// Marks a token that is learned.
const LEARNED: u32 = 1 << 31;

/// What a safetensors file of `prepare` says that it is.
const PREPARED: &str = "bdia-lm examples 1";
/// The longest header of one.
const HEADER: u64 = 1 << 16;

/// Tokens of examples, and batches made of them.
#[derive(Debug, Clone)]
pub struct Examples {
    /// With [`LEARNED`].
    tokens: Part,
    examples: Vec<Example>,
    path: PathBuf,
    /// Examples that were longer than a sample.
    cut: usize,
    /// Examples that have nothing to learn within a sample.
    dropped: usize,
    /// Tokens that are learned in one pass.
    targets: u64,
    /// The samples: ranges of `packed`.
    samples: Vec<(u32, u32)>,
    /// The examples of the samples, one sample after the other.
    packed: Vec<u32>,
    /// The order of one pass over the samples, and the seed and pass it belongs to.
    order: Vec<u32>,
    pass: Option<(u64, u64)>,
}

impl Examples {
    /// The examples of a file for a model.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where it has no tokenizer, [`PairsError`].
    pub fn of<C: Config>(
        path: &Path,
        reading: &Reading,
        texts: &Texts,
        config: &C,
    ) -> Result<Self, Failure> {
        let Some(tokenizer) = &texts.tokenizer else {
            let source_name = path.display().to_string();
            return Err(DataError::Tokenizer { source_name }.into());
        };
        let vocab = config.dims().vocab();
        let end = Self::end(tokenizer, config);
        if let Some(prepared) = Self::prepared(path, reading, (tokenizer, end), vocab)? {
            return Ok(prepared);
        }
        Ok(Self::open(path, reading, (tokenizer, end), vocab)?)
    }

    /// The token that ends a text of a model.
    fn end<C: Config>(tokenizer: &Tokenizer, config: &C) -> Option<u32> {
        tokenizer.eos().or_else(|| config.ends().first().copied())
    }

    fn new(tokens: Part, examples: Vec<Example>, path: &Path) -> Self {
        Self {
            tokens,
            examples,
            path: path.into(),
            cut: 0,
            dropped: 0,
            targets: 0,
            samples: Vec::new(),
            packed: Vec::new(),
            order: Vec::new(),
            pass: None,
        }
    }

    /// Writes the tokens of all examples of a model for later runs ([`to_file`](Self::to_file)).
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write<C: Config>(
        &self,
        path: &Path,
        reading: &Reading,
        texts: &Texts,
        config: &C,
    ) -> Result<(), Failure> {
        let Some(tokenizer) = &texts.tokenizer else {
            let source_name = self.path.display().to_string();
            return Err(DataError::Tokenizer { source_name }.into());
        };
        Ok(self.to_file(path, reading, (tokenizer, Self::end(tokenizer, config)))?)
    }

    /// Writes the tokens of all examples as a safetensors file: `tokens`, with bit 31 where one is
    /// learned; `ends`, the place after each example's last; `prompts`, its tokens before what is
    /// completed.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn to_file(
        &self,
        path: &Path,
        reading: &Reading,
        whose: (&Tokenizer, Option<u32>),
    ) -> Result<(), PairsError> {
        let (examples, tokens) = (self.examples.len(), self.tokens.len());
        let [flags, like] = reading.about(whose);
        let at = [0, 1, 2].map(|i| 8 * i * examples as u64);
        let header = json!({
            "__metadata__": {
                "format": PREPARED,
                "tokenizer": whose.0.digest(),
                "flags": flags,
                "like": like,
            },
            "ends": { "dtype": "U64", "shape": [examples], "data_offsets": [at[0], at[1]] },
            "prompts": { "dtype": "U64", "shape": [examples], "data_offsets": [at[1], at[2]] },
            "tokens": {
                "dtype": "U32",
                "shape": [tokens],
                "data_offsets": [at[2], at[2] + 4 * tokens],
            },
        })
        .to_string();
        // What follows is aligned for its numbers.
        let len = header.len().next_multiple_of(8);
        let mut bytes = (len as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(format!("{header:<len$}").as_bytes());
        let ends = self.examples.iter().map(|e| e.start + e.len);
        for n in ends.chain(self.examples.iter().map(|e| e.prompt)) {
            bytes.extend_from_slice(&(n as u64).to_le_bytes());
        }
        self.tokens.each(0, tokens as usize, |t| {
            bytes.extend_from_slice(&(t as u32).to_le_bytes());
            true
        })?;
        Ok(write_bytes(path, &bytes).map_err(DataError::from)?)
    }

    /// What [`to_file`](Self::to_file) has written; `None` for any other file. The tokens stay on
    /// disk.
    ///
    /// # Errors
    /// [`PairsError::Prepared`] for a file that is damaged, of another tokenizer, or of examples
    /// that were read in another way.
    pub fn prepared(
        path: &Path,
        reading: &Reading,
        whose: (&Tokenizer, Option<u32>),
        vocab: usize,
    ) -> Result<Option<Self>, PairsError> {
        if path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("safetensors")) {
            return Ok(None);
        }
        let wrong = |what: &str| PairsError::Prepared { path: path.into(), what: what.into() };
        let failed = |e| DataError::from(FileError::io(path, "read its tokens", e));
        let mut file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let mut header = [0; 8];
        let read = file.read_exact(&mut header);
        let len = u64::from_le_bytes(header);
        let none = "expected a file that `bdia-lm prepare` has written, found another";
        if read.is_err() || len > HEADER || size < 8 + len {
            return Err(wrong(none));
        }
        let mut header = vec![0; len as usize];
        file.read_exact(&mut header).map_err(failed)?;
        let Ok(header) = serde_json::from_slice::<Metadata>(&header) else {
            return Err(wrong(none));
        };
        let about = |name: &str| {
            header.metadata().as_ref().and_then(|m| m.get(name)).map_or("nothing", String::as_str)
        };
        if about("format") != PREPARED {
            return Err(wrong(none));
        }
        let (found, expected) = (about("tokenizer"), whose.0.digest());
        if found != expected {
            return Err(wrong(&format!(
                "its tokens are of a tokenizer with digest {found}, the model's is {expected}; \
                 prepare the data with this model"
            )));
        }
        let ([flags, like], found) = (reading.about(whose), about("flags"));
        if found != flags {
            return Err(wrong(&format!(
                "it was prepared with {found}, this run asks for {flags}; give both the same flags"
            )));
        }
        if about("like") != like {
            return Err(wrong(
                "it was prepared for a model with another template of conversations, or other \
                 tokens that begin and end a text; prepare the data with this model",
            ));
        }
        let place = |name: &str, dtype: Dtype, width: usize| {
            let info = header.info(name).filter(|i| i.dtype == dtype && i.shape.len() == 1)?;
            let [from, to] = [info.data_offsets.0, info.data_offsets.1].map(|at| at as u64);
            let fits =
                8 + len + to <= size && to.checked_sub(from)? == (info.shape[0] * width) as u64;
            fits.then_some((8 + len + from, info.shape[0]))
        };
        let damaged = "its tokens and examples do not fit together; prepare it again";
        let (Some(ends), Some(prompts), Some(tokens)) = (
            place("ends", Dtype::U64, 8),
            place("prompts", Dtype::U64, 8),
            place("tokens", Dtype::U32, 4),
        ) else {
            return Err(wrong(damaged));
        };
        let mut numbers = |(from, n): (u64, usize)| {
            file.seek(SeekFrom::Start(from)).map_err(failed)?;
            let mut reader = BufReader::new(&mut file);
            let mut next = || {
                let mut bytes = [0; 8];
                reader.read_exact(&mut bytes).map_err(failed)?;
                Ok::<_, DataError>(u64::from_le_bytes(bytes))
            };
            (0..n).map(|_| next()).collect::<Result<Vec<_>, _>>()
        };
        let (ends, prompts) = (numbers(ends)?, numbers(prompts)?);
        let (mut examples, mut start) = (Vec::new(), 0);
        for (&end, &prompt) in ends.iter().zip(&prompts) {
            let len = end.checked_sub(start).filter(|&len| prompt <= len && end <= tokens.1 as u64);
            let Some(len) = len else { return Err(wrong(damaged)) };
            let [start_of, len, prompt] = [start, len, prompt].map(|n| n as usize);
            examples.push(Example { start: start_of, len, prompt });
            start = end;
        }
        if start != tokens.1 as u64 || examples.is_empty() || ends.len() != prompts.len() {
            return Err(wrong(damaged));
        }
        let tokens = Part::of_file(file, path, tokens.0, tokens.1 as u64, TokenType::U32);
        let all = Self::new(tokens, examples, path);
        let mut outside = None;
        all.tokens.each(0, all.tokens.len() as usize, |token| {
            let token = token as u32 & !LEARNED;
            outside = (token as usize >= vocab).then_some(token);
            outside.is_none()
        })?;
        match outside {
            Some(token) => Err(PairsError::Token { path: path.into(), token, vocab }),
            None => Ok(Some(all)),
        }
    }

    /// Hands over an example's tokens, and whether they are learned.
    fn each(&self, e: &Example, mut to: impl FnMut(u32, bool)) -> Result<(), DataError> {
        self.tokens.each(e.start as u64, e.len, |token| {
            // At most 32 bits.
            let token = token as u32;
            to(token & !LEARNED, token & LEARNED != 0);
            true
        })
    }

    /// The tokens of the examples of a file. Texts end with `end` in the format `plain`.
    ///
    /// # Errors
    /// [`PairsError`]
    pub fn open(
        path: &Path,
        reading: &Reading,
        (tokenizer, end): (&Tokenizer, Option<u32>),
        vocab: usize,
    ) -> Result<Self, PairsError> {
        let all = reading.loss_on == LossOn::All;
        let chat = |i: usize, messages: &[Message]| {
            tokenizer.encode_chat(messages).map_err(|error| PairsError::Chat {
                path: path.into(),
                example: i + 1,
                error,
            })
        };
        let (mut tokens, mut examples) = (Vec::new(), Vec::new());
        let mut add = |texts: Vec<(Vec<u32>, Vec<bool>)>| {
            for (text, learned) in texts {
                let start = tokens.len();
                let prompt = learned.iter().position(|l| *l).unwrap_or(text.len());
                for (i, (token, learned)) in text.into_iter().zip(learned).enumerate() {
                    if token as usize >= vocab.min(LEARNED as usize) {
                        return Err(PairsError::Token { path: path.into(), token, vocab });
                    }
                    tokens.push(if learned || (all && i > 0) { token | LEARNED } else { token });
                }
                examples.push(Example { start, len: tokens.len() - start, prompt });
            }
            Ok(())
        };
        match &reading.kind {
            Kind::Messages => {
                for (n, part) in conversations(path)?.chunks(AT_ONCE).enumerate() {
                    let texts = part.par_iter().enumerate();
                    add(texts.map(|(i, m)| chat(n * AT_ONCE + i, m)).collect::<Result<_, _>>()?)?;
                }
            }
            Kind::Pairs(columns) if reading.format == Format::Chat => {
                for (n, part) in read(path, columns)?.chunks(AT_ONCE).enumerate() {
                    let texts = part.par_iter().enumerate().map(|(i, p)| {
                        let messages =
                            [message(USER, &p.prompt), message(ASSISTANT, &p.completion)];
                        chat(n * AT_ONCE + i, &messages)
                    });
                    add(texts.collect::<Result<_, _>>()?)?;
                }
            }
            Kind::Pairs(columns) => {
                let encode = |texts: Vec<&str>| tokenizer.encode_all(&texts);
                for part in read(path, columns)?.chunks(AT_ONCE) {
                    let prompts: Vec<String> =
                        part.iter().map(|p| format!("{}{SEPARATOR}", p.prompt)).collect();
                    let prompts = encode(prompts.iter().map(String::as_str).collect());
                    let completions = encode(part.iter().map(|p| p.completion.as_str()).collect());
                    let texts = prompts.into_iter().zip(completions).map(|(prompt, completion)| {
                        let mut tokens = begun(tokenizer, prompt);
                        let prompt = tokens.len();
                        tokens.extend(completion.into_iter().chain(end));
                        let learned = (0..tokens.len()).map(|i| i >= prompt).collect();
                        (tokens, learned)
                    });
                    add(texts.collect())?;
                }
            }
        }
        Ok(Self::new(Part::from_tokens(tokens), examples, path))
    }

    /// Tokens of a sample that has room for every example.
    pub fn longest(&self) -> usize {
        self.examples.iter().map(|e| e.len.saturating_sub(1)).max().unwrap_or(1).max(1)
    }

    /// Makes samples of `context` tokens: with several examples each where `pack` says so. What
    /// there is no room for is cut off; examples that have no target left are dropped.
    ///
    /// # Errors
    /// [`PairsError::None`] if no example is left.
    pub fn fit(&mut self, context: usize, pack: bool) -> Result<(), PairsError> {
        let before = self.examples.len();
        let (mut kept, mut cut, mut targets) = (Vec::with_capacity(before), 0, 0);
        for e in &self.examples {
            let (whole, e) = (e.len, Example { len: e.len.min(context + 1), ..*e });
            let (mut at, mut learned) = (0_usize, 0_u64);
            self.each(&e, |_, learns| {
                learned += u64::from(learns && at > 0);
                at += 1;
            })?;
            if learned > 0 {
                targets += learned;
                cut += usize::from(e.len < whole);
                kept.push(e);
            }
        }
        self.examples = kept;
        (self.cut, self.dropped, self.targets) = (cut, before - self.examples.len(), targets);
        if self.examples.is_empty() {
            let why = format!(
                ": every prompt is longer than a sample of {context} tokens; use a larger --context"
            );
            return Err(PairsError::None { path: self.path.clone(), why });
        }
        self.pack(context, pack);
        self.order = (0..self.samples.len() as u32).collect();
        self.pass = None;
        Ok(())
    }

    /// The longest example first, each into the fullest sample that has room for it.
    fn pack(&mut self, context: usize, pack: bool) {
        let n = self.examples.len() as u32;
        if !pack {
            self.packed = (0..n).collect();
            self.samples = (0..n).map(|i| (i, i + 1)).collect();
            return;
        }
        let rows = |i: u32| self.examples[i as usize].len - 1;
        let mut by_length: Vec<u32> = (0..n).collect();
        by_length.sort_by_key(|&i| (core::cmp::Reverse(rows(i)), i));
        let mut bins: Vec<Vec<u32>> = Vec::new();
        // Room that is left, and the samples that have so much.
        let mut room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for i in by_length {
            let need = rows(i);
            let best = room.range(need..).next().map(|(&left, _)| left);
            let bin = match best.and_then(|left| Some((left, room.get_mut(&left)?.pop()?))) {
                Some((left, bin)) => {
                    if room.get(&left).is_some_and(Vec::is_empty) {
                        room.remove(&left);
                    }
                    room.entry(left - need).or_default().push(bin);
                    bin
                }
                None => {
                    bins.push(Vec::new());
                    room.entry(context - need).or_default().push(bins.len() - 1);
                    bins.len() - 1
                }
            };
            bins[bin].push(i);
        }
        self.packed.clear();
        self.samples.clear();
        for bin in bins {
            let first = self.packed.len() as u32;
            self.packed.extend(bin);
            self.samples.push((first, self.packed.len() as u32));
        }
    }

    /// Number of samples: of examples, unless several are packed into one.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Number of examples.
    pub fn examples(&self) -> usize {
        self.examples.len()
    }

    /// Tokens of all examples.
    pub fn tokens(&self) -> u64 {
        self.tokens.len()
    }

    /// Whether samples have several examples.
    pub fn is_packed(&self) -> bool {
        self.samples.len() < self.examples.len()
    }

    /// Examples that were cut, and those that were dropped.
    pub const fn truncated(&self) -> (usize, usize) {
        (self.cut, self.dropped)
    }

    /// Tokens that are learned in one pass.
    pub const fn targets(&self) -> u64 {
        self.targets
    }

    /// What a run's data is known by: all tokens, in two bytes each where that is enough, and how
    /// they are cut into examples.
    ///
    /// # Errors
    /// Tokens that cannot be read any more.
    pub fn digest(&self, hash: &mut Xxh3) -> Result<(), DataError> {
        let all = |to: &mut dyn FnMut(u32) -> bool| {
            self.tokens.each(0, self.tokens.len() as usize, |t| to(t as u32 & !LEARNED))
        };
        let mut small = true;
        all(&mut |token| {
            small = token < 1 << 16;
            small
        })?;
        all(&mut |token| {
            match u16::try_from(token) {
                Ok(token) if small => hash.update(&token.to_le_bytes()),
                _ => hash.update(&token.to_le_bytes()),
            }
            true
        })?;
        let (mut parts, mut marks) = (Vec::new(), Vec::new());
        for e in &self.examples {
            marks.clear();
            self.each(e, |_, learned| marks.push(learned))?;
            let first = marks.iter().skip(1).position(|l| *l).map_or(e.len, |at| at + 1);
            let numbers = [e.start as u64, (e.len << 32 | first) as u64];
            numbers.iter().for_each(|n| hash.update(&n.to_le_bytes()));
            // More than one turn.
            if marks.iter().skip(first).any(|l| !l) {
                parts.extend(marks.iter().map(|l| u8::from(*l)));
            }
        }
        hash.update(&parts);
        if self.is_packed() {
            self.packed.iter().for_each(|i| hash.update(&i.to_le_bytes()));
            self.samples.iter().for_each(|s| hash.update(&s.1.to_le_bytes()));
        }
        Ok(())
    }

    /// The first example of sample `i`, up to what is learned.
    ///
    /// # Errors
    /// Tokens that cannot be read any more.
    pub fn prompt(&self, i: usize) -> Result<Vec<i32>, DataError> {
        let e = self.examples[self.packed[self.samples[i].0 as usize] as usize];
        let mut tokens = Vec::new();
        let e = Example { len: e.prompt.min(e.len), ..e };
        self.each(&e, |token, _| tokens.push(token as i32))?;
        Ok(tokens)
    }

    /// Writes sample `i`; targets are negative where there is none. `starts` gets the place at
    /// which every token's example begins, where examples are packed.
    ///
    /// # Errors
    /// Tokens that cannot be read any more.
    pub fn sample(
        &self,
        i: usize,
        tokens: &mut [i32],
        targets: &mut [i32],
        starts: &mut [i32],
    ) -> Result<(), DataError> {
        let (first, end) = self.samples[i];
        tokens.fill(0);
        targets.fill(-1);
        let mut at = 0;
        for &i in &self.packed[first as usize..end as usize] {
            let e = self.examples[i as usize];
            let begin = at;
            let mut before = None;
            self.each(&e, |next, learned| {
                if let Some(token) = before.replace(next as i32)
                    && let (Some(x), Some(y)) = (tokens.get_mut(at), targets.get_mut(at))
                {
                    *x = token;
                    if learned {
                        *y = next as i32;
                    }
                    if let Some(start) = starts.get_mut(at) {
                        *start = begin as i32;
                    }
                    at += 1;
                }
            })?;
        }
        // Padding is a text of its own.
        if let Some(rest) = starts.get_mut(at..) {
            rest.fill(at as i32);
        }
        Ok(())
    }

    /// Fills a micro-batch with the run's samples `first`, `first + 1`, …: every pass over the data
    /// is in an order of its own, which depends on the seed and the pass only. Nothing is
    /// allocated.
    ///
    /// # Errors
    /// [`DataError::Shape`] for buffers that are not whole samples; tokens that cannot be read any
    /// more.
    pub fn batch(
        &mut self,
        seed: u64,
        first: u64,
        context: usize,
        (tokens, targets, starts): (&mut [i32], &mut [i32], &mut [i32]),
    ) -> Result<(), DataError> {
        if context == 0 || tokens.len() != targets.len() || !tokens.len().is_multiple_of(context) {
            return Err(DataError::Shape { tokens: tokens.len(), targets: targets.len(), context });
        }
        let n = self.samples.len() as u64;
        let mut starts = starts.chunks_exact_mut(context);
        for (i, (x, y)) in
            tokens.chunks_exact_mut(context).zip(targets.chunks_exact_mut(context)).enumerate()
        {
            let at = first + i as u64;
            self.shuffle(seed, at / n);
            let starts = starts.next().unwrap_or(&mut []);
            self.sample(self.order[(at % n) as usize] as usize, x, y, starts)?;
        }
        Ok(())
    }

    /// The order of a pass (Fisher and Yates).
    fn shuffle(&mut self, seed: u64, pass: u64) {
        if self.pass == Some((seed, pass)) {
            return;
        }
        self.order.iter_mut().zip(0..).for_each(|(o, i)| *o = i);
        for i in (1..self.order.len()).rev() {
            let words = Stream::new(seed, pass as u32, i as u32, 0, 0, Draw::Data).quad(0);
            let word = u64::from(words[0]) << 32 | u64::from(words[1]);
            self.order.swap(i, ((u128::from(word) * (i as u128 + 1)) >> 64) as usize);
        }
        self.pass = Some((seed, pass));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_models::files::testing::TempDir;
    use bdia_models::tokenizer::EOT;

    fn reading(loss_on: LossOn) -> Reading {
        Reading { kind: Kind::Pairs(columns()), format: Format::Plain, loss_on }
    }

    fn columns() -> PairColumns {
        PairColumns { prompt: "q".into(), completion: "a".into() }
    }

    fn pairs(name: &str, content: &[u8]) -> Result<Vec<(String, String)>, String> {
        let read =
            parse(Path::new(name), content.to_vec(), &columns()).map_err(|e| e.to_string())?;
        Ok(read.pairs.into_iter().map(|p| (p.prompt, p.completion)).collect())
    }

    #[test]
    fn tables_and_lines() {
        let own = |all: &[(&str, &str)]| {
            all.iter().map(|(q, a)| (q.to_string(), a.to_string())).collect::<Vec<_>>()
        };
        let csv = "q,a\r\n\"one, two\",\"first\r\nsecond\"\r\n\r\nthree,\"a \"\"quote\"\" \"\r\n";
        assert_eq!(
            pairs("x.csv", csv.as_bytes()).unwrap(),
            own(&[("one, two", "first\r\nsecond"), ("three", "a \"quote\"")])
        );
        // A byte order mark, other columns, another order, no line break at the end.
        assert_eq!(
            pairs("x.CSV", "\u{feff}n,a,q\n1,yes,no".as_bytes()).unwrap(),
            own(&[("no", "yes")])
        );
        assert_eq!(
            pairs("x.tsv", b"q\ta\nsay \"hi\ta, b\n").unwrap(),
            own(&[("say \"hi", "a, b")])
        );
        let json = "{\"a\": \"x\\ny\", \"q\": \"\", \"n\": 3}\n\n{\"q\":\"p\",\"a\":\"\u{e9}\"}";
        assert_eq!(
            pairs("x.jsonl", json.as_bytes()).unwrap(),
            own(&[("", "x\ny"), ("p", "\u{e9}")])
        );
        // What is packed, and pairs of which there is nothing to learn.
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gz, b"a,q\n1,2\n\n ,3\n4,\n").unwrap();
        let read = parse(Path::new("x.csv.gz"), gz.finish().unwrap(), &columns()).unwrap();
        assert_eq!(read.skipped, [4]);
        assert_eq!(read.pairs.iter().map(|p| &*p.prompt).collect::<Vec<_>>(), ["2", ""]);
    }

    #[test]
    fn unusable_files() {
        for (name, content, message) in [
            ("x.csv", &b"q,b\n1,2\n"[..], "no column \"a\"; the columns are \"q\", \"b\""),
            ("x.csv", b"", "no column \"q\"; the columns are none"),
            ("x.csv", b"q,a,a\n1,2,3\n", "the column \"a\" comes twice"),
            ("x.csv", b"q,a\n1,2\n3\n", "line 3: 1 column(s), expected 2 as in the header"),
            ("x.csv", b"q,a\n1,\n3,\" \"\n", "no pairs: the 2 that are there have no completion"),
            (
                "x.csv",
                b"q,a\n1,2\n3,\"4\n5,6\n",
                "line 3: the quote that opens here is never closed",
            ),
            ("x.csv", b"q,a\n", "no pairs"),
            ("x.csv", b"q,a\n1,2\n\xe9,4\n", "line 3: not valid UTF-8; convert"),
            ("x.csv", b"\xff\xfeq\0,\0a\0", "it begins like UTF-16"),
            ("x.tsv", b"q,a\n1,2\n", "no column \"q\"; the columns are \"q,a\""),
            (
                "x.jsonl",
                b"{\"q\":\"1\",\"a\":\"2\"}\n{\"q\":\"1\"}",
                "line 2: no \"a\"; the names are \"q\"",
            ),
            ("x.jsonl", b"{\"q\":\"1\",\"a\":2}", "line 1: \"a\" is not a string"),
            ("x.jsonl", b"[]", "line 1: not a JSON object"),
            ("x.jsonl", b"{\"q\":\"1\",\"a\":\"\"}", "no pairs: the 1"),
            ("x.jsonl", b"\n \n", "no pairs"),
            ("x.txt", b"q,a\n1,2\n", ".csv, .tsv or .jsonl"),
        ] {
            let error = pairs(name, content).unwrap_err();
            assert!(error.contains(message) && error.contains(name), "{message}: {error}");
        }
    }

    fn examples(loss_on: LossOn) -> Examples {
        let dir = TempDir::new();
        let path = dir.file(
            "x.jsonl",
            b"{\"q\":\"a b\",\"a\":\"c d e\"}\n{\"q\":\"a\",\"a\":\"b\"}\n\
              {\"q\":\"a b c d e f\",\"a\":\"g\"}\n",
        );
        open(&path, loss_on, 50_257).unwrap()
    }

    fn open(path: &Path, loss_on: LossOn, vocab: usize) -> Result<Examples, PairsError> {
        let t = Tokenizer::gpt2();
        Examples::open(path, &reading(loss_on), (&t, Some(EOT)), vocab)
    }

    #[test]
    fn only_completions_have_targets() {
        let t = Tokenizer::gpt2();
        let of = |text: &str| t.encode(text).into_iter().map(|t| t as i32).collect::<Vec<_>>();
        let mut e = examples(LossOn::Completion);
        assert_eq!(e.longest(), 8);
        e.fit(8, false).unwrap();
        assert_eq!(e.truncated(), (0, 0));
        let (mut x, mut y) = ([9; 8], [9; 8]);
        e.sample(0, &mut x, &mut y, &mut []).unwrap();
        let (prompt, completion) = (of("a b\n"), of("c d e"));
        assert_eq!(prompt_tokens(&t, Format::Plain, "a b").unwrap(), t.encode("a b\n"));
        let whole = [&prompt[..], &completion, &[EOT as i32]].concat();
        assert_eq!((x[..6].to_vec(), &x[6..]), (whole[..6].to_vec(), &[0, 0][..]));
        assert_eq!(y[..2], [-1, -1]);
        assert_eq!((y[2..6].to_vec(), &y[6..]), (whole[3..].to_vec(), &[-1, -1][..]));
        assert_eq!(e.targets(), 4 + 2 + 2);
        let mut all = examples(LossOn::All);
        all.fit(8, false).unwrap();
        all.sample(0, &mut x, &mut y, &mut []).unwrap();
        assert_eq!(y[..6], whole[1..]);
    }

    #[test]
    fn prepared_tokens_are_the_tokens() {
        let (dir, t) = (TempDir::new(), Tokenizer::gpt2());
        let path = dir.path().join("x.safetensors");
        let how = reading(LossOn::Completion);
        let mut own = examples(LossOn::Completion);
        own.to_file(&path, &how, (&t, Some(EOT))).unwrap();
        let open = |reading: &Reading, tokenizer: &Tokenizer, vocab| {
            Examples::prepared(&path, reading, (tokenizer, Some(EOT)), vocab)
                .map_err(|e| e.to_string())
        };
        let mut read = open(&how, &t, 50_257).unwrap().unwrap();
        assert_eq!((read.longest(), read.tokens()), (own.longest(), own.tokens()));
        let all = |e: &mut Examples, context, pack| {
            e.fit(context, pack).unwrap();
            let mut hash = Xxh3::new();
            e.digest(&mut hash).unwrap();
            let samples: Vec<_> = (0..e.len())
                .map(|i| {
                    let [mut x, mut y, mut s] = [(); 3].map(|()| vec![7; context]);
                    e.sample(i, &mut x, &mut y, &mut s).unwrap();
                    (x, y, s, e.prompt(i).unwrap())
                })
                .collect();
            (samples, e.truncated(), e.targets(), hash.digest())
        };
        for (context, pack) in [(20, true), (8, false), (4, false)] {
            assert_eq!(all(&mut read, context, pack), all(&mut own, context, pack));
        }
        // What it is not for.
        assert!(open(&how, &t, 100).unwrap_err().contains("vocabulary of 100"));
        let other = reading(LossOn::All);
        let error = open(&other, &t, 50_257).unwrap_err();
        assert!(
            error.contains("--loss-on completion") && error.contains("--loss-on all"),
            "{error}"
        );
        let special = t.clone().with_special_tokens(SpecialTokens::Parse);
        assert!(open(&how, &special, 50_257).unwrap_err().contains("--special-tokens parse"));
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let error = open(&how, &t, 50_257).unwrap_err();
            assert!(error.contains("prepare"), "{len}: {error}");
        }
        let text = String::from_utf8_lossy(&bytes);
        let digest = t.digest();
        let at = text.find(&digest).unwrap();
        let mut foreign = bytes.clone();
        foreign[at..at + 4].copy_from_slice(b"0000");
        std::fs::write(&path, &foreign).unwrap();
        let error = open(&how, &t, 50_257).unwrap_err();
        assert!(error.contains(&digest) && error.contains("prepare the data"), "{error}");
        // Files of other names are read as what they are.
        let other = dir.file("x.csv", b"q,a\n1,2\n");
        assert!(Examples::prepared(&other, &how, (&t, None), 50_257).unwrap().is_none());
        std::fs::write(&path, &bytes).unwrap();
        let error = Examples::prepared(&path, &how, (&t, Some(1)), 50_257).unwrap_err().to_string();
        assert!(error.contains("tokens that begin and end a text"), "{error}");
        // What is completed is known where all is learned, too.
        let (all, of_all) = (examples(LossOn::All), reading(LossOn::All));
        all.to_file(&path, &of_all, (&t, Some(EOT))).unwrap();
        let mut read = open(&of_all, &t, 50_257).unwrap().unwrap();
        read.fit(8, false).unwrap();
        assert_eq!(
            read.prompt(0).unwrap(),
            t.encode("a b\n").iter().map(|t| *t as i32).collect::<Vec<_>>()
        );
    }

    #[test]
    fn what_has_no_room_is_counted() {
        let mut e = examples(LossOn::Completion);
        e.fit(4, false).unwrap();
        // The prompts have 3, 2 and 7 tokens.
        assert_eq!((e.len(), e.truncated()), (2, (1, 1)));
        let (mut x, mut y) = ([9; 4], [9; 4]);
        e.sample(0, &mut x, &mut y, &mut []).unwrap();
        assert_eq!(y.iter().filter(|&&t| t >= 0).count(), 2);
        assert!(
            examples(LossOn::Completion)
                .fit(1, false)
                .unwrap_err()
                .to_string()
                .contains("larger --context")
        );
        let mut all = examples(LossOn::All);
        all.fit(1, false).unwrap();
        assert_eq!((all.len(), all.truncated()), (3, (3, 0)));
    }

    #[test]
    fn every_pass_has_every_example_once() {
        let mut e = examples(LossOn::Completion);
        e.fit(8, false).unwrap();
        let at = |e: &mut Examples, seed, first: u64| {
            let (mut x, mut y) = ([0; 8], [0; 8]);
            e.batch(seed, first, 8, (&mut x, &mut y, &mut [])).unwrap();
            x
        };
        let passes: Vec<Vec<_>> =
            (0..20).map(|p| (0..3).map(|i| at(&mut e, 1, 3 * p + i)).collect()).collect();
        for pass in &passes {
            let mut sorted = pass.clone();
            sorted.sort_unstable();
            let mut first = passes[0].clone();
            first.sort_unstable();
            assert_eq!(sorted, first);
        }
        assert!(passes.iter().any(|p| p != &passes[0]));
        // A batch across the border of two passes, and the same again.
        let (mut x, mut y) = ([0; 16], [0; 16]);
        e.batch(1, 5, 8, (&mut x, &mut y, &mut [])).unwrap();
        assert_eq!((&x[..8], &x[8..]), (&passes[1][2][..], &passes[2][0][..]));
        assert!(e.batch(1, 0, 8, (&mut [0; 7], &mut [0; 7], &mut [])).is_err());
    }

    #[test]
    fn vocabularies_that_are_too_small() {
        let dir = TempDir::new();
        let path = dir.file("x.csv", b"q,a\nhello,world\n");
        let error = open(&path, LossOn::All, 100).unwrap_err();
        assert!(matches!(error, PairsError::Token { vocab: 100, .. }), "{error}");
    }

    /// Every example is in one sample, none is cut, and each begins at its own place.
    #[test]
    fn packed_samples_have_whole_examples() {
        let dir = TempDir::new();
        let lines: String = (0..40)
            .map(|i| format!("{{\"q\":\"q{i}\",\"a\":\"{}\"}}\n", "b ".repeat(1 + i * 7 % 11)))
            .collect();
        let path = dir.file("x.jsonl", lines.as_bytes());
        let (mut one, mut all) = (open(&path, LossOn::Completion, 50_257).unwrap(), Vec::new());
        let mut packed = one.clone();
        let context = one.longest() + 5;
        one.fit(context, false).unwrap();
        packed.fit(context, true).unwrap();
        assert!(packed.is_packed() && packed.len() < 30 && packed.truncated() == (0, 0));
        assert_eq!((packed.examples(), packed.targets()), (40, one.targets()));
        let own = |e: &Examples, i| {
            let [mut x, mut y, mut s] = [(); 3].map(|()| vec![7; context]);
            e.sample(i, &mut x, &mut y, &mut s).unwrap();
            (x, y, s)
        };
        for i in 0..packed.len() {
            let (x, y, starts) = own(&packed, i);
            let mut at = 0;
            while at < context {
                let end = (at..context).find(|&t| starts[t] != at as i32).unwrap_or(context);
                all.push((x[at..end].to_vec(), y[at..end].to_vec()));
                at = end;
            }
        }
        // Padding learns nothing; the rest are the examples, in another order.
        all.retain(|(_, y)| y.iter().any(|&t| t >= 0));
        let mut expected: Vec<_> = (0..one.len())
            .map(|i| {
                let (x, y, starts) = own(&one, i);
                let end = (0..context).find(|&t| starts[t] != 0).unwrap_or(context);
                (x[..end].to_vec(), y[..end].to_vec())
            })
            .collect();
        all.sort();
        expected.sort();
        assert_eq!(all, expected);
    }

    #[test]
    fn conversations_that_cannot_be_used() {
        let read = |text: &str| {
            parse_conversations(Path::new("x.jsonl"), text.as_bytes().to_vec())
                .map_err(|e| e.to_string())
        };
        let good =
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
        assert_eq!(read(&format!("{good}\n\n{good}\n")).unwrap().len(), 2);
        for (text, expected) in [
            ("{}", "line 1: expected an object with a list \"messages\""),
            (r#"{"messages":[{"role":"user"}]}"#, "missing field `content`"),
            (r#"{"messages":[{"role":"user","content":"a"}]}"#, "nothing to learn"),
            ("", "no pairs"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let error = parse_conversations(Path::new("x.csv"), Vec::new()).unwrap_err();
        assert!(matches!(error, PairsError::Kind(_)));
    }
}
