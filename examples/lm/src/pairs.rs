//! Prompts and what is to be written after them: files of pairs, and batches in which only
//! completions have targets.
//!
//! | file | read as |
//! |---|---|
//! | `.csv` | a header, commas, quotes; quoted fields may have line breaks (E2E: `mr,ref`) |
//! | `.tsv` | a header, tabs, no quotes |
//! | `.jsonl` | one object with two strings a line |
//!
//! A file may be packed with gzip (`.csv.gz`), which its content tells. Empty lines and pairs
//! without a completion are skipped; the latter are counted.
//!
//! An example is `prompt \n completion <|endoftext|>`; prompt and completion become tokens
//! separately, so that a model that is given `prompt \n` goes on from the tokens it was trained on.
//! Samples have one length: short examples are padded at their end, where causal attention does not
//! see the padding, and padding has no target. Several examples are not packed into one sample,
//! because attention would see from one into the next.

use std::path::{Path, PathBuf};

use bdia_core::rng::{Draw, Stream};
use bdia_models::input::{self, InputError, list};
use bdia_models::tokenizer::{EOT, Tokenizer};
use bdia_train::{Failure, report};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::DataError;

/// Which tokens of a pair are learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// Those of the completion, and the end of the text.
    Completion,
    /// Those of the prompt as well.
    All,
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
        "{}: expected a file whose name ends in .csv, .tsv or .jsonl, or one of them and .gz",
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
    /// A token that the model does not have.
    #[error(
        "{}: token {token} is outside the vocabulary of {vocab}: the model does not have GPT-2's",
        path.display()
    )]
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

/// The tokens after which a completion is generated.
pub fn prompt_tokens(tokenizer: &Tokenizer, prompt: &str) -> Vec<u32> {
    tokenizer.encode(&format!("{prompt}{SEPARATOR}"))
}

/// One example's place in the tokens of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Example {
    start: usize,
    /// Tokens, with the end of the document.
    len: usize,
    /// Tokens of the prompt and the separator.
    prompt: usize,
}

/// Tokens of pairs, and batches made of them.
#[derive(Debug, Clone)]
pub struct Examples {
    tokens: Vec<u16>,
    examples: Vec<Example>,
    loss_on: LossOn,
    path: PathBuf,
    /// Examples that were longer than a sample.
    cut: usize,
    /// Examples whose prompt alone was.
    dropped: usize,
    /// The order of one pass over them, and the seed and pass it belongs to.
    order: Vec<u32>,
    pass: Option<(u64, u64)>,
}

impl Examples {
    /// The tokens of the pairs of a file.
    ///
    /// # Errors
    /// [`PairsError`]
    pub fn open(
        path: &Path,
        columns: &PairColumns,
        loss_on: LossOn,
        tokenizer: &Tokenizer,
        vocab: usize,
    ) -> Result<Self, PairsError> {
        let pairs = read(path, columns)?;
        let prompts: Vec<String> =
            pairs.iter().map(|p| format!("{}{SEPARATOR}", p.prompt)).collect();
        let prompts = tokenizer.encode_all(&prompts.iter().map(String::as_str).collect::<Vec<_>>());
        let completions =
            tokenizer.encode_all(&pairs.iter().map(|p| p.completion.as_str()).collect::<Vec<_>>());
        let (mut tokens, mut examples) = (Vec::new(), Vec::with_capacity(pairs.len()));
        for (prompt, completion) in prompts.iter().zip(&completions) {
            let start = tokens.len();
            for &token in prompt.iter().chain(completion).chain(&[EOT]) {
                match u16::try_from(token) {
                    Ok(t) if (token as usize) < vocab => tokens.push(t),
                    _ => return Err(PairsError::Token { path: path.into(), token, vocab }),
                }
            }
            examples.push(Example { start, len: tokens.len() - start, prompt: prompt.len() });
        }
        let (cut, dropped, order, pass) = (0, 0, Vec::new(), None);
        Ok(Self { tokens, examples, loss_on, path: path.into(), cut, dropped, order, pass })
    }

    /// Tokens of a sample that has room for every example.
    pub fn longest(&self) -> usize {
        self.examples.iter().map(|e| e.len - 1).max().unwrap_or(1)
    }

    /// Cuts off what a sample of `context` tokens has no room for; examples that have no target
    /// left are dropped.
    ///
    /// # Errors
    /// [`PairsError::None`] if no example is left.
    pub fn fit(&mut self, context: usize) -> Result<(), PairsError> {
        let (before, all) = (self.examples.len(), self.loss_on == LossOn::All);
        self.examples.retain(|e| all || e.prompt <= context);
        self.dropped = before - self.examples.len();
        self.cut = 0;
        for e in &mut self.examples {
            if e.len > context + 1 {
                e.len = context + 1;
                self.cut += 1;
            }
        }
        if self.examples.is_empty() {
            let why = format!(
                ": every prompt is longer than a sample of {context} tokens; use a larger --context"
            );
            return Err(PairsError::None { path: self.path.clone(), why });
        }
        self.order = (0..self.examples.len() as u32).collect();
        Ok(())
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// Examples that were cut, and those that were dropped.
    pub const fn truncated(&self) -> (usize, usize) {
        (self.cut, self.dropped)
    }

    /// Tokens that are learned in one pass.
    pub fn targets(&self) -> u64 {
        self.examples.iter().map(|e| (e.len - self.first_target(e)) as u64).sum()
    }

    /// All tokens, and how they are cut into examples: what a run's data is known by.
    pub fn content(&self) -> (&[u16], impl Iterator<Item = [u64; 2]>) {
        (
            &self.tokens,
            self.examples
                .iter()
                .map(|e| [e.start as u64, (e.len << 32 | self.first_target(e)) as u64]),
        )
    }

    /// The first token of an example that is a target.
    const fn first_target(&self, e: &Example) -> usize {
        match self.loss_on {
            LossOn::Completion => e.prompt,
            LossOn::All => 1,
        }
    }

    /// The prompt of example `i`, with the separator.
    pub fn prompt(&self, i: usize) -> Vec<i32> {
        let e = self.examples[i];
        self.tokens[e.start..e.start + e.prompt.min(e.len)].iter().map(|&t| i32::from(t)).collect()
    }

    /// Writes example `i` into a sample; targets are negative where there is none.
    pub fn sample(&self, i: usize, tokens: &mut [i32], targets: &mut [i32]) {
        let e = self.examples[i];
        let example = &self.tokens[e.start..e.start + e.len];
        let first = self.first_target(&e);
        tokens.fill(0);
        targets.fill(-1);
        for (at, pair) in example.windows(2).enumerate().take(tokens.len()) {
            tokens[at] = i32::from(pair[0]);
            if at + 1 >= first {
                targets[at] = i32::from(pair[1]);
            }
        }
    }

    /// Fills a micro-batch with the run's samples `first`, `first + 1`, …: every pass over the data
    /// is in an order of its own, which depends on the seed and the pass only. Nothing is
    /// allocated.
    ///
    /// # Errors
    /// [`DataError::Shape`] for buffers that are not whole samples.
    pub fn batch(
        &mut self,
        seed: u64,
        first: u64,
        context: usize,
        tokens: &mut [i32],
        targets: &mut [i32],
    ) -> Result<(), DataError> {
        if context == 0 || tokens.len() != targets.len() || !tokens.len().is_multiple_of(context) {
            return Err(DataError::Shape { tokens: tokens.len(), targets: targets.len(), context });
        }
        let n = self.examples.len() as u64;
        for (i, (x, y)) in
            tokens.chunks_exact_mut(context).zip(targets.chunks_exact_mut(context)).enumerate()
        {
            let at = first + i as u64;
            self.shuffle(seed, at / n);
            self.sample(self.order[(at % n) as usize] as usize, x, y);
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
        Examples::open(&path, &columns(), loss_on, &Tokenizer::new(), 50_257).unwrap()
    }

    #[test]
    fn only_completions_have_targets() {
        let t = Tokenizer::new();
        let of = |text: &str| t.encode(text).into_iter().map(|t| t as i32).collect::<Vec<_>>();
        let mut e = examples(LossOn::Completion);
        assert_eq!(e.longest(), 8);
        e.fit(8).unwrap();
        assert_eq!(e.truncated(), (0, 0));
        let (mut x, mut y) = ([9; 8], [9; 8]);
        e.sample(0, &mut x, &mut y);
        let (prompt, completion) = (of("a b\n"), of("c d e"));
        assert_eq!(prompt_tokens(&t, "a b"), t.encode("a b\n"));
        let whole = [&prompt[..], &completion, &[EOT as i32]].concat();
        assert_eq!((x[..6].to_vec(), &x[6..]), (whole[..6].to_vec(), &[0, 0][..]));
        assert_eq!(y[..2], [-1, -1]);
        assert_eq!((y[2..6].to_vec(), &y[6..]), (whole[3..].to_vec(), &[-1, -1][..]));
        assert_eq!(e.targets(), 4 + 2 + 2);
        let mut all = examples(LossOn::All);
        all.fit(8).unwrap();
        all.sample(0, &mut x, &mut y);
        assert_eq!(y[..6], whole[1..]);
    }

    #[test]
    fn what_has_no_room_is_counted() {
        let mut e = examples(LossOn::Completion);
        e.fit(4).unwrap();
        // The prompts have 3, 2 and 7 tokens.
        assert_eq!((e.len(), e.truncated()), (2, (1, 1)));
        let (mut x, mut y) = ([9; 4], [9; 4]);
        e.sample(0, &mut x, &mut y);
        assert_eq!(y.iter().filter(|&&t| t >= 0).count(), 2);
        assert!(
            examples(LossOn::Completion)
                .fit(1)
                .unwrap_err()
                .to_string()
                .contains("larger --context")
        );
        let mut all = examples(LossOn::All);
        all.fit(1).unwrap();
        assert_eq!((all.len(), all.truncated()), (3, (3, 0)));
    }

    #[test]
    fn every_pass_has_every_example_once() {
        let mut e = examples(LossOn::Completion);
        e.fit(8).unwrap();
        let at = |e: &mut Examples, seed, first: u64| {
            let (mut x, mut y) = ([0; 8], [0; 8]);
            e.batch(seed, first, 8, &mut x, &mut y).unwrap();
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
        e.batch(1, 5, 8, &mut x, &mut y).unwrap();
        assert_eq!((&x[..8], &x[8..]), (&passes[1][2][..], &passes[2][0][..]));
        assert!(e.batch(1, 0, 8, &mut [0; 7], &mut [0; 7]).is_err());
    }

    #[test]
    fn vocabularies_that_are_too_small() {
        let dir = TempDir::new();
        let path = dir.file("x.csv", b"q,a\nhello,world\n");
        let error =
            Examples::open(&path, &columns(), LossOn::All, &Tokenizer::new(), 100).unwrap_err();
        assert!(matches!(error, PairsError::Token { vocab: 100, .. }), "{error}");
    }
}
