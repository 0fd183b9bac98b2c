//! Pairs of sentences: files of the user, or the number words that are built in; the split by
//! source sentence.
//!
//! | files | read as |
//! |---|---|
//! | one, ending in `.csv` | two columns with a header, commas, quotes (Kaggle's table) |
//! | one, ending otherwise | lines `source TAB target`, further columns ignored (manythings.org) |
//! | one of that kind whose first line is numbered | `number TAB source TAB number TAB target` |
//! | two | aligned lines: the n-th of one is the translation of the n-th of the other |
//!
//! Each may be packed with gzip, which its first bytes tell. Text is UTF-8. White space at both
//! ends of a sentence and a byte order mark are removed; a pair that lacks a side is an error that
//! names its line.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use bdia_models::files::{FileError, read_limited};
use bdia_train::Failure;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::numbers;

/// A sentence and its translation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The sentence.
    pub source: String,
    /// Its translation.
    pub target: String,
}

/// A file of pairs that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not what its first bytes say.
    #[error("{}: it begins like a gzip file, but cannot be unpacked: {what}", path.display())]
    Gzip {
        /// The file.
        path: PathBuf,
        /// What the library says.
        what: String,
    },
    /// Unpacked, it is larger than any such file.
    #[error("{}: more than {limit} bytes when unpacked; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most that is read.
        limit: u64,
    },
    /// A line is not text.
    #[error(
        "{}, line {line}: not valid UTF-8; convert the file, for example with iconv",
        path.display()
    )]
    Encoding {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// A line has other columns.
    #[error("{}, line {line}: {found} column(s), expected {expected}", path.display())]
    Columns {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// How many it has.
        found: usize,
        /// How many it should have.
        expected: &'static str,
    },
    /// A language is missing.
    #[error(
        "{}, line {line}: the {side} sentence is empty; remove the pair or complete it",
        path.display()
    )]
    Empty {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Which side.
        side: &'static str,
    },
    /// Two files are not aligned.
    #[error(
        "{}, line {line}: the file ends here or before, but {} goes on; expected as many \
         lines in both",
        short.display(), long.display()
    )]
    Aligned {
        /// The shorter file.
        short: PathBuf,
        /// The longer file.
        long: PathBuf,
        /// The first line that only one has, from 1.
        line: usize,
    },
    /// A quote is not closed, or something like it.
    #[error("{}, line {line}: {what}", path.display())]
    Csv {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What the library says.
        what: String,
    },
    /// There are too few.
    #[error("{name}: {found} {what}, expected {expected} or more")]
    Few {
        /// What was read.
        name: String,
        /// How many pairs.
        found: usize,
        /// Of what.
        what: &'static str,
        /// The least.
        expected: usize,
    },
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Self::Program(Box::new(error))
    }
}

/// The most bytes of text that are read: more than any parallel corpus of one pair of languages.
const LIMIT: u64 = 1 << 34;

/// The bytes of a file, unpacked.
fn unpacked(path: &Path, packed: Vec<u8>) -> Result<Vec<u8>, DataError> {
    if !packed.starts_with(&[0x1f, 0x8b]) {
        return Ok(packed);
    }
    let mut plain = Vec::new();
    flate2::read::MultiGzDecoder::new(packed.as_slice())
        .take(LIMIT + 1)
        .read_to_end(&mut plain)
        .map_err(|e| DataError::Gzip { path: path.into(), what: e.to_string() })?;
    if plain.len() as u64 > LIMIT {
        return Err(DataError::TooLarge { path: path.into(), limit: LIMIT });
    }
    Ok(plain)
}

/// The text of a file's bytes, or the first line that is none.
fn text(path: &Path, bytes: Vec<u8>) -> Result<String, DataError> {
    let mut text = String::from_utf8(unpacked(path, bytes)?).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        DataError::Encoding {
            path: path.into(),
            line: 1 + good.iter().filter(|&&b| b == b'\n').count(),
        }
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// A pair of two sentences that are there.
fn pair(path: [&Path; 2], line: usize, source: &str, target: &str) -> Result<Pair, DataError> {
    let [source, target] = [source, target].map(str::trim);
    for (text, path, side) in [(source, path[0], "source"), (target, path[1], "target")] {
        if text.is_empty() {
            return Err(DataError::Empty { path: path.into(), line, side });
        }
    }
    // Translations are printed line by line.
    let one_line = |s: &str| {
        s.split(['\n', '\r']).map(str::trim).filter(|s| !s.is_empty()).collect::<Vec<_>>().join(" ")
    };
    Ok(Pair { source: one_line(source), target: one_line(target) })
}

/// All pairs of one or two files.
///
/// # Errors
/// [`DataError`] names file and line.
pub fn read(files: &[PathBuf]) -> Result<Vec<Pair>, DataError> {
    match files {
        [source, target] => {
            aligned([source, target], [read_limited(source, LIMIT)?, read_limited(target, LIMIT)?])
        }
        [one] => one_file(one, read_limited(one, LIMIT)?),
        _ => Ok(Vec::new()),
    }
}

/// The pairs of a file with these bytes; its name says whether it is a table or has tabs.
///
/// # Errors
/// [`DataError`] names file and line.
pub fn one_file(path: &Path, bytes: Vec<u8>) -> Result<Vec<Pair>, DataError> {
    let name = path.to_string_lossy().to_lowercase();
    let text = text(path, bytes)?;
    if name.strip_suffix(".gz").unwrap_or(&name).ends_with(".csv") {
        table(path, &text)
    } else {
        tabs(path, &text)
    }
}

fn table(path: &Path, text: &str) -> Result<Vec<Pair>, DataError> {
    check_rows(path, text)?;
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let expected = "2: a table of two columns with a header";
    let columns =
        |line: usize, found: usize| DataError::Columns { path: path.into(), line, found, expected };
    let failed = |e: csv::Error| {
        let line = e.position().map_or(0, csv::Position::line);
        DataError::Csv { path: path.into(), line, what: e.to_string() }
    };
    let head = reader.headers().map_err(failed)?.len();
    if head != 2 {
        return Err(columns(1, head));
    }
    let mut pairs = Vec::new();
    for record in reader.records() {
        let record = record.map_err(failed)?;
        let line = record.position().map_or(0, |p| p.line() as usize);
        match (record.get(0), record.get(1), record.len()) {
            (Some(source), Some(target), 2) => pairs.push(pair([path; 2], line, source, target)?),
            (.., found) => return Err(columns(line, found)),
        }
    }
    Ok(pairs)
}

/// Rows that the library passes over: empty ones, and all that follow a quote that is never closed.
fn check_rows(path: &Path, text: &str) -> Result<(), DataError> {
    let (mut line, mut opened, mut quoted, mut in_field, mut in_row) = (1, 1, false, false, false);
    let mut bytes = text.bytes().peekable();
    while let Some(b) = bytes.next() {
        match b {
            b'"' if quoted && bytes.peek() == Some(&b'"') => drop(bytes.next()),
            b'"' if quoted => quoted = false,
            b'"' if !in_field => (quoted, opened) = (true, line),
            b'\n' if !quoted && !in_row => {
                return Err(DataError::Empty { path: path.into(), line, side: "source" });
            }
            _ => {}
        }
        // A quote means something only where a field begins.
        in_field = quoted || !matches!(b, b',' | b'\n' | b'\r');
        in_row = quoted || (b != b'\n' && (in_row || b != b'\r'));
        line += usize::from(b == b'\n');
    }
    if quoted {
        let what = "the quote that opens here is never closed".into();
        return Err(DataError::Csv { path: path.into(), line: opened as u64, what });
    }
    Ok(())
}

fn tabs(path: &Path, text: &str) -> Result<Vec<Pair>, DataError> {
    let columns = |line: &str| line.split('\t').map(str::to_owned).collect::<Vec<_>>();
    let id = |text: &String| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let numbered =
        text.lines().next().map(columns).is_some_and(|c| c.len() >= 4 && id(&c[0]) && id(&c[2]));
    let (source, target, expected) = if numbered {
        (1, 3, "4: a number, source, a number, target")
    } else {
        (0, 1, "2 or more, with tabs between them")
    };
    (text.lines().enumerate())
        .map(|(i, line)| {
            let c = columns(line);
            match (c.get(source), c.get(target)) {
                (Some(source), Some(target)) if !numbered || (id(&c[0]) && id(&c[2])) => {
                    pair([path; 2], i + 1, source, target)
                }
                _ => Err(DataError::Columns {
                    path: path.into(),
                    line: i + 1,
                    found: c.len(),
                    expected,
                }),
            }
        })
        .collect()
}

/// The pairs of two files with these bytes, line by line.
///
/// # Errors
/// [`DataError`] names file and line.
pub fn aligned([source, target]: [&Path; 2], bytes: [Vec<u8>; 2]) -> Result<Vec<Pair>, DataError> {
    let [sources, targets] = bytes;
    let (sources, targets) = (text(source, sources)?, text(target, targets)?);
    let (mut s, mut t) = (sources.lines(), targets.lines());
    let mut pairs = Vec::new();
    loop {
        let line = pairs.len() + 1;
        let (short, long) = match (s.next(), t.next()) {
            (None, None) => return Ok(pairs),
            (Some(a), Some(b)) => {
                pairs.push(pair([source, target], line, a, b)?);
                continue;
            }
            (None, Some(_)) => (source, target),
            (Some(_), None) => (target, source),
        };
        return Err(DataError::Aligned { short: short.into(), long: long.into(), line });
    }
}

/// Pairs to learn from, and pairs that are held out: no source sentence is in both.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// What it is.
    pub name: String,
    /// To learn from.
    pub train: Vec<Pair>,
    /// Held out.
    pub held: Vec<Pair>,
}

/// Where pairs come from and how many are used.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Files; none for number words.
    pub files: &'a [PathBuf],
    /// Files of what is held out; none to split `files`.
    pub held_files: &'a [PathBuf],
    /// The most pairs to learn from.
    pub pairs: Option<usize>,
    /// How many source sentences are held out; with `held_files`, the most that are used of them.
    pub held: Option<usize>,
}

/// Pairs of number words to learn from, if nothing else is said.
pub const NUMBER_PAIRS: usize = 20_000;
/// Source sentences that are held out, if nothing else is said and there are enough.
pub const HELD: usize = 1000;

impl Dataset {
    /// Reads or makes the pairs and splits them: by a hash of the source sentence, so that the same
    /// sentences are held out however many are used, and all translations of a sentence are on the
    /// same side.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn open(source: &Source<'_>) -> Result<Self, DataError> {
        if source.files.is_empty() {
            return Self::numbers(
                source.pairs.unwrap_or(NUMBER_PAIRS),
                source.held.unwrap_or(HELD),
            );
        }
        let names: Vec<_> = source.files.iter().map(|f| f.display().to_string()).collect();
        let (name, all) = (names.join(", "), read(source.files)?);
        let few = |what: &'static str, found: usize, expected| DataError::Few {
            name: name.clone(),
            found,
            what,
            expected,
        };
        if all.len() < 2 {
            return Err(few("pair(s)", all.len(), 2));
        }
        let (mut train, mut held): (Vec<Pair>, Vec<Pair>);
        if source.held_files.is_empty() {
            let key = |p: &Pair| xxh3_64(p.source.as_bytes());
            let mut keys: Vec<_> = all.iter().map(key).collect();
            keys.sort_unstable();
            keys.dedup();
            // A twentieth where there are few.
            let count = source.held.unwrap_or_else(|| HELD.min(keys.len().div_ceil(20)));
            if count >= keys.len() {
                return Err(few("different source sentence(s)", keys.len(), count + 1));
            }
            (held, train) = all.into_iter().partition(|p| count > 0 && key(p) <= keys[count - 1]);
        } else {
            train = all;
            held = read(source.held_files)?;
            let known: std::collections::HashSet<&str> =
                held.iter().map(|p| p.source.as_str()).collect();
            train.retain(|p| !known.contains(p.source.as_str()));
            if let Some(n) = source.held {
                let kept: std::collections::HashSet<String> = references(&held)
                    .iter()
                    .take(n)
                    .map(|(source, _)| (*source).to_string())
                    .collect();
                held.retain(|p| kept.contains(&p.source));
            }
        }
        if let Some(n) = source.pairs {
            // Those with the smallest hashes: a file may be sorted by length.
            let mut keyed: Vec<_> = train
                .iter()
                .enumerate()
                .map(|(i, p)| (xxh3_64(p.source.as_bytes()).rotate_left(32), i))
                .collect();
            keyed.sort_unstable();
            let mut picked: Vec<_> = keyed.into_iter().take(n).map(|(_, i)| i).collect();
            picked.sort_unstable();
            train = picked.into_iter().map(|i| train[i].clone()).collect();
        }
        if train.is_empty() || held.is_empty() {
            return Err(few("pair(s) on one side of the split", 0, 1));
        }
        Ok(Self { name, train, held })
    }

    fn numbers(pairs: usize, held: usize) -> Result<Self, DataError> {
        let name = "number words".to_string();
        let what = ["number(s) to learn from", "number(s) to hold out"];
        for ((expected, found), what) in
            [pairs, held].into_iter().zip(numbers::available()).zip(what)
        {
            if expected > found {
                return Err(DataError::Few { name, found, what, expected });
            }
        }
        let [train, held] = numbers::pairs([pairs, held])
            .map(|all| all.into_iter().map(|[source, target]| Pair { source, target }).collect());
        Ok(Self { name, train, held })
    }

    /// A number that changes with every sentence.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        for pairs in [&self.train, &self.held] {
            hash.update(&(pairs.len() as u64).to_le_bytes());
            for text in pairs.iter().flat_map(|p| [&p.source, &p.target]) {
                hash.update(&(text.len() as u64).to_le_bytes());
                hash.update(text.as_bytes());
            }
        }
        hash.digest()
    }
}

/// The held-out source sentences, each once, with all their translations, in the order of the file.
pub fn references(pairs: &[Pair]) -> Vec<(&str, Vec<&str>)> {
    let mut place: HashMap<&str, usize> = HashMap::new();
    let mut all: Vec<(&str, Vec<&str>)> = Vec::new();
    for p in pairs {
        let at = *place.entry(&p.source).or_insert(all.len());
        if at == all.len() {
            all.push((&p.source, Vec::new()));
        }
        all[at].1.push(&p.target);
    }
    all
}
