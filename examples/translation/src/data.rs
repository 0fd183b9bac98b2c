//! Pairs of sentences: files of the user, or the number words that are built in; the split by
//! source sentence.
//!
//! | files | read as |
//! |---|---|
//! | one, ending in `.csv` | two columns with a header, commas, quotes (Kaggle's table) |
//! | one, ending otherwise | lines `source TAB target`, further columns ignored (manythings.org) |
//! | either, with [`Columns`] | those two, by place or by their names in the header |
//! | one of that kind whose first line is numbered | `number TAB source TAB number TAB target` |
//! | two | aligned lines: the n-th of one is the translation of the n-th of the other |
//!
//! Each may be packed with gzip, which its first bytes tell. Text is UTF-8. White space at both
//! ends of a sentence and a byte order mark are removed. Empty lines, and pairs that lack a side,
//! are skipped and counted. The header of a file with tabs is noticed by what stands in it: names
//! of languages and the like, or a word above a column of numbers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bdia_models::files::FileError;
use bdia_models::input::{self, InputError, list};
use bdia_train::{Failure, report};
use serde::{Deserialize, Serialize};
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
    /// The file could not be read or unpacked, or is no text.
    #[error(transparent)]
    Input(InputError),
    /// It has more text than is read.
    #[error(
        "{}: more than 1 GiB when unpacked, the most that is read; use a part of it", .0.display()
    )]
    TooLarge(PathBuf),
    /// A line has other columns.
    #[error("{}, line {line}: {found} column(s), expected {expected}", path.display())]
    Columns {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// How many it has.
        found: usize,
        /// How many it should have.
        expected: String,
    },
    /// Columns that were asked for are not two of those that are there.
    #[error("{}: {what}; the columns are {}", path.display(), list(found))]
    Column {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// The first row.
        found: Vec<String>,
    },
    /// A column of sentences has none.
    #[error(
        "{}: a column that was to have sentences has only numbers; name the two of {columns} \
         columns that have them, for example --columns 2,3", path.display()
    )]
    Numbers {
        /// The file.
        path: PathBuf,
        /// Columns of its first row.
        columns: usize,
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
        line: u64,
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

impl From<InputError> for DataError {
    fn from(error: InputError) -> Self {
        match error {
            InputError::TooLarge { path, .. }
            | InputError::File(FileError::TooLarge { path, .. }) => Self::TooLarge(path),
            other => Self::Input(other),
        }
    }
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Self::Program(Box::new(error))
    }
}

/// The most bytes of text that are read: sentences and their tokens take several times as much
/// memory.
const LIMIT: u64 = 1 << 30;

/// A column of a file with several.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Column {
    /// Its place, from 0.
    Place(usize),
    /// Its name in the header.
    Name(String),
}

impl core::fmt::Display for Column {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Place(place) => write!(f, "{}", place + 1),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Which two columns of a file have the source and the target: `2,3` by place, from 1, or
/// `src,tgt` by the names in the header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Columns([Column; 2]);

impl core::str::FromStr for Columns {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || format!("expected two different columns such as 2,3 or src,tgt, found {s}");
        let column = |text: &str| match (text.trim(), text.trim().parse::<usize>()) {
            ("", _) | (_, Ok(0)) => Err(wrong()),
            (_, Ok(place)) => Ok(Column::Place(place - 1)),
            (name, Err(_)) => Ok(Column::Name(name.into())),
        };
        match s.split_once(',').filter(|(_, b)| !b.contains(',')) {
            Some((a, b)) => {
                let both = [column(a)?, column(b)?];
                if both[0] == both[1] { Err(wrong()) } else { Ok(Self(both)) }
            }
            None => Err(wrong()),
        }
    }
}

impl TryFrom<String> for Columns {
    type Error = String;

    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<Columns> for String {
    fn from(columns: Columns) -> Self {
        columns.0.map(|column| column.to_string()).join(",")
    }
}

impl Columns {
    fn named(&self) -> bool {
        self.0.iter().any(|c| matches!(c, Column::Name(_)))
    }

    /// Their places in the rows under this first row.
    fn places(&self, path: &Path, first: &[&str]) -> Result<[usize; 2], DataError> {
        let wrong = |what: String| {
            let found = first.iter().map(|c| c.trim().to_string()).collect();
            DataError::Column { path: path.into(), what, found }
        };
        let all = String::from(self.clone());
        let place = |column: &Column| {
            let mut places = (0..first.len()).filter(|&at| match column {
                Column::Place(place) => at == *place,
                Column::Name(name) => first[at].trim() == name,
            });
            match (places.next(), places.next()) {
                (Some(place), None) => Ok(place),
                (None, _) => Err(wrong(format!("expected the columns {all}"))),
                _ => Err(wrong(format!("several columns are called {column}; give its place"))),
            }
        };
        let [source, target] = [place(&self.0[0])?, place(&self.0[1])?];
        if source == target {
            return Err(wrong(format!("expected two different columns, {all} is one")));
        }
        Ok([source, target])
    }
}

/// The pairs of a file or of two, and what was noticed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pairs {
    /// Those that have both sides.
    pub pairs: Vec<Pair>,
    /// How many lines or rows lack a side or both, and the first of them, from 1.
    pub skipped: Option<(usize, u64)>,
    /// The first row of a file with tabs, where it was taken for a header.
    pub header: Option<String>,
}

impl Pairs {
    /// Takes a pair if both sentences are there.
    fn push(&mut self, line: u64, source: &str, target: &str) {
        // Translations are printed line by line.
        let [source, target] = [source, target].map(|s| {
            let lines = s.split(['\n', '\r']).map(str::trim).filter(|s| !s.is_empty());
            lines.collect::<Vec<_>>().join(" ")
        });
        if source.is_empty() || target.is_empty() {
            self.skip(line);
        } else {
            self.pairs.push(Pair { source, target });
        }
    }

    fn skip(&mut self, line: u64) {
        let (count, first) = self.skipped.unwrap_or((0, line));
        self.skipped = Some((count + 1, first.min(line)));
    }
}

/// All pairs of one or two files; tells what was noticed.
///
/// # Errors
/// [`DataError`] names file and line.
pub fn read(files: &[PathBuf], columns: Option<&Columns>) -> Result<Vec<Pair>, DataError> {
    let bytes = |path: &PathBuf| input::read(path, LIMIT);
    let (path, found) = match files {
        [source, target] => (source, aligned([source, target], [bytes(source)?, bytes(target)?])?),
        [one] => (one, one_file(one, bytes(one)?, columns)?),
        _ => return Ok(Vec::new()),
    };
    let name = path.display();
    if let Some(header) = found.header {
        report::note!("{name}: line 1 is taken for a header: {header}");
    }
    if let Some((count, first)) = found.skipped {
        report::note!(
            "{name}: {count} line(s) without a source or a target are skipped, the first is line \
             {first}"
        );
    }
    Ok(found.pairs)
}

/// The pairs of a file with these bytes, packed or plain; its name says whether it is a table or
/// has tabs.
///
/// # Errors
/// [`DataError`] names file and line.
pub fn one_file(
    path: &Path,
    bytes: Vec<u8>,
    columns: Option<&Columns>,
) -> Result<Pairs, DataError> {
    let text = input::text(path, input::unpack(path, bytes, LIMIT)?)?;
    if input::ending(path) == "csv" {
        table(path, &text, columns)
    } else {
        tabs(path, &text, columns)
    }
}

fn table(path: &Path, text: &str, columns: Option<&Columns>) -> Result<Pairs, DataError> {
    if let Some(line) = input::open_quote(text) {
        let what = "the quote that opens here is never closed".into();
        return Err(DataError::Csv { path: path.into(), line, what });
    }
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let wrong = |line: u64, found: usize, expected: String| DataError::Columns {
        path: path.into(),
        line,
        found,
        expected,
    };
    let failed = |e: csv::Error| {
        let line = e.position().map_or(0, csv::Position::line);
        DataError::Csv { path: path.into(), line, what: e.to_string() }
    };
    let head = reader.headers().map_err(failed)?.clone();
    let expected = match columns {
        None => "2: a table of two columns with a header, or any and --columns".to_string(),
        Some(_) => format!("{}, as in the header", head.len()),
    };
    let [source, target] = match columns {
        Some(columns) => columns.places(path, &head.iter().collect::<Vec<_>>())?,
        None if head.len() == 2 => [0, 1],
        None => return Err(wrong(1, head.len(), expected)),
    };
    let mut pairs = Pairs::default();
    for record in reader.records() {
        let record = record.map_err(failed)?;
        let (from, line) = record.position().map_or((0, 0), |p| {
            let at = usize::try_from(p.byte()).unwrap_or(usize::MAX).min(text.len());
            // The library ends a row at `\r`: a `\n` after that is of the same line.
            let rest_of_row = text[..at].ends_with('\r') && text[at..].starts_with('\n');
            let line = input::line_of_row(text, p.byte(), p.line());
            (p.line() + u64::from(rest_of_row), line)
        });
        // The library passes over empty lines.
        (from..line).for_each(|line| pairs.skip(line));
        match (record.get(source), record.get(target)) {
            (Some(source), Some(target)) if record.len() == head.len() => {
                pairs.push(line, source, target);
            }
            _ => return Err(wrong(line, record.len(), expected)),
        }
    }
    Ok(pairs)
}

fn tabs(path: &Path, text: &str, columns: Option<&Columns>) -> Result<Pairs, DataError> {
    let rows = || {
        let lines = text.lines().zip(1_u64..).filter(|(line, _)| !line.trim().is_empty());
        lines.map(|(line, number)| (line.split('\t').collect::<Vec<_>>(), number))
    };
    let mut pairs = Pairs::default();
    for (_, number) in text.lines().zip(1..).filter(|(line, _)| line.trim().is_empty()) {
        pairs.skip(number);
    }
    let Some((first, _)) = rows().next() else { return Ok(pairs) };
    let id = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let numbered = columns.is_none() && first.len() >= 4 && id(first[0]) && id(first[2]);
    let ([source, target], expected) = match columns {
        Some(columns) => (columns.places(path, &first)?, "those of --columns"),
        None if numbered => ([1, 3], "4: a number, source, a number, target"),
        None => ([0, 1], "2 or more, with tabs between them"),
    };
    let number = |row: &[&str], at: usize| {
        row.get(at).is_some_and(|field| field.trim().parse::<f64>().is_ok())
    };
    // The columns that have only numbers below the first line.
    let mut numbers: Vec<usize> = match rows().nth(1) {
        Some(_) => (0..first.len()).collect(),
        None => Vec::new(),
    };
    for (row, _) in rows().skip(1) {
        numbers.retain(|&at| number(&row, at));
        if numbers.is_empty() {
            break;
        }
    }
    // Numbers of lines, scores and the like are nothing to translate, if there is something else
    // and they were not asked for.
    let not_meant = columns.is_none() && first.len() > 2;
    if not_meant && [source, target].iter().any(|at| numbers.contains(at)) {
        return Err(DataError::Numbers { path: path.into(), columns: first.len() });
    }
    let names = [source, target].iter().all(|&at| first.get(at).is_some_and(|f| is_name(f)));
    let over_numbers = numbers.iter().any(|&at| !number(&first, at));
    let header = columns.is_some_and(Columns::named) || names || over_numbers;
    if header {
        let names: Vec<String> = first.iter().map(|f| f.trim().to_string()).collect();
        pairs.header = Some(list(&names));
    }
    for (row, line) in rows().skip(usize::from(header)) {
        match (row.get(source), row.get(target)) {
            (Some(source), Some(target)) if !numbered || (id(row[0]) && id(row[2])) => {
                pairs.push(line, source, target);
            }
            _ => {
                let (found, expected) = (row.len(), expected.into());
                return Err(DataError::Columns { path: path.into(), line, found, expected });
            }
        }
    }
    Ok(pairs)
}

/// Whether this is what a column of sentences is called, rather than a sentence.
fn is_name(field: &str) -> bool {
    const NAMES: [&str; 58] = [
        "source",
        "target",
        "src",
        "tgt",
        "trg",
        "sentence",
        "translation",
        "text",
        "input",
        "output",
        "original",
        "english",
        "french",
        "german",
        "spanish",
        "italian",
        "portuguese",
        "dutch",
        "russian",
        "chinese",
        "japanese",
        "korean",
        "arabic",
        "turkish",
        "polish",
        "swedish",
        "czech",
        "ukrainian",
        "hindi",
        "en",
        "fr",
        "de",
        "es",
        "it",
        "pt",
        "nl",
        "ru",
        "zh",
        "ja",
        "ko",
        "ar",
        "tr",
        "pl",
        "sv",
        "cs",
        "uk",
        "hi",
        "eng",
        "fra",
        "deu",
        "spa",
        "ita",
        "por",
        "nld",
        "rus",
        "zho",
        "jpn",
        "kor",
    ];
    NAMES.contains(&field.trim().to_lowercase().as_str())
}

/// The pairs of two files with these bytes, line by line. Empty lines at the end of one do no harm.
///
/// # Errors
/// [`DataError`] names file and line.
pub fn aligned([source, target]: [&Path; 2], bytes: [Vec<u8>; 2]) -> Result<Pairs, DataError> {
    let [sources, targets] = bytes;
    let text = |path, bytes| input::text(path, input::unpack(path, bytes, LIMIT)?);
    let (sources, targets) = (text(source, sources)?, text(target, targets)?);
    let (mut s, mut t) = (sources.lines(), targets.lines());
    let mut pairs = Pairs::default();
    for line in 1.. {
        let (short, long) = match (s.next(), t.next()) {
            (None, None) => break,
            (Some(a), Some(b)) => {
                pairs.push(line, a, b);
                continue;
            }
            (Some(rest), None) | (None, Some(rest)) if rest.trim().is_empty() => continue,
            (None, Some(_)) => (source, target),
            (Some(_), None) => (target, source),
        };
        return Err(DataError::Aligned { short: short.into(), long: long.into(), line });
    }
    Ok(pairs)
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
    /// The columns of a file with several.
    pub columns: Option<&'a Columns>,
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
        let (name, all) = (names.join(", "), read(source.files, source.columns)?);
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
            held = read(source.held_files, source.columns)?;
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
