//! GGUF files (versions 2 and 3): metadata, and tensors that are stored in blocks of few bits.
//!
//! A file is a header (magic, version, two counts), the metadata (key, type, value), the tensors'
//! names, shapes, types and places, and their data, each at a multiple of the alignment. All
//! numbers are little-endian. Headers come from outside and are trusted in nothing; data is read
//! and written a piece at a time. What is written is of version 3, with values of 16 or 32 bits or
//! `Q8_0`, which is quantized as ggml's reference implementation does.
//!
//! The formats of the blocks are those of [`bdia_core::packing`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bdia_core::Packing;

use crate::files::{FileError, Temporary, write_atomic};
use crate::packing::{self, Extent};
use crate::weights::{Pieces, WeightsError};

/// The first bytes of a file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Most entries of the metadata, tensors, and dimensions of one.
const MOST_ENTRIES: u64 = 1 << 20;
const MOST_DIMENSIONS: u32 = 4;
/// The longest list of the metadata: more than any vocabulary.
const MOST_VALUES: u64 = 1 << 22;
/// The longest key or name.
const MOST_NAME: u64 = 1 << 16;
/// The longest name of a tensor that ggml holds.
const MOST_TENSOR_NAME: usize = 63;
/// Where data begins, in files that say nothing else.
const ALIGNMENT: u64 = 32;
/// Values that are converted at a time: whole blocks of every kind.
const PIECE: usize = 4096;

/// Numbers of packings in files.
const NUMBERS: [(Packing, u32); 11] = [
    (Packing::F32, 0),
    (Packing::F16, 1),
    (Packing::Bf16, 30),
    (Packing::Q4_0, 2),
    (Packing::Q4_1, 3),
    (Packing::Q5_0, 6),
    (Packing::Q5_1, 7),
    (Packing::Q8_0, 8),
    (Packing::Q4_K, 12),
    (Packing::Q5_K, 13),
    (Packing::Q6_K, 14),
];

/// The type of the elements of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Number {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl Number {
    /// Number in files.
    const ALL: [(Self, u32); 11] = [
        (Self::U8, 0),
        (Self::I8, 1),
        (Self::U16, 2),
        (Self::I16, 3),
        (Self::U32, 4),
        (Self::I32, 5),
        (Self::F32, 6),
        (Self::Bool, 7),
        (Self::U64, 10),
        (Self::I64, 11),
        (Self::F64, 12),
    ];

    fn of(number: u32) -> Option<Self> {
        Self::ALL.iter().find(|n| n.1 == number).map(|n| n.0)
    }

    fn code(self) -> u32 {
        Self::ALL.iter().find(|n| n.0 == self).map_or(0, |n| n.1)
    }

    /// Appends a number; false where the type does not have it.
    fn pack(self, x: f64, out: &mut Vec<u8>) -> bool {
        // A cast that changes nothing.
        macro_rules! exact {
            ($t:ty) => {{
                out.extend((x as $t).to_le_bytes());
                (x as $t) as f64 == x
            }};
        }
        match self {
            Self::U8 => exact!(u8),
            Self::I8 => exact!(i8),
            Self::U16 => exact!(u16),
            Self::I16 => exact!(i16),
            Self::U32 => exact!(u32),
            Self::I32 => exact!(i32),
            Self::U64 => exact!(u64),
            Self::I64 => exact!(i64),
            Self::Bool => {
                out.push(u8::from(x != 0.0));
                x == 0.0 || x == 1.0
            }
            Self::F32 => {
                out.extend((x as f32).to_le_bytes());
                true
            }
            Self::F64 => {
                out.extend(x.to_le_bytes());
                true
            }
        }
    }
}

/// A value of the metadata. Single numbers are written in the first of `u32` and `u64`, `i32` and
/// `i64`, `f32` and `f64` that has them. Lists keep their type; whole numbers in them are exact up
/// to 2⁵³.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number that is not negative.
    Unsigned(u64),
    /// A negative one.
    Signed(i64),
    /// Any other number.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Numbers or truth values.
    Numbers(Number, Vec<f64>),
}

impl Value {
    /// A number that is stored as `f32`.
    pub fn single(x: f64) -> Self {
        Self::Float(decimal(x as f32))
    }

    /// Appends it with its type; false where it cannot be written.
    fn pack(&self, out: &mut Vec<u8>) -> bool {
        let code = |out: &mut Vec<u8>, code: u32| out.extend(code.to_le_bytes());
        let text = |out: &mut Vec<u8>, text: &str| {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        };
        let number = |out: &mut Vec<u8>, number: Number| code(out, number.code());
        match self {
            Self::Unsigned(n) => match u32::try_from(*n) {
                Ok(n) => {
                    number(out, Number::U32);
                    out.extend(n.to_le_bytes());
                }
                Err(_) => {
                    number(out, Number::U64);
                    out.extend(n.to_le_bytes());
                }
            },
            Self::Signed(n) => match i32::try_from(*n) {
                Ok(n) => {
                    number(out, Number::I32);
                    out.extend(n.to_le_bytes());
                }
                Err(_) => {
                    number(out, Number::I64);
                    out.extend(n.to_le_bytes());
                }
            },
            Self::Float(x) => {
                let single = decimal(*x as f32).to_bits() == x.to_bits();
                let kind = if single { Number::F32 } else { Number::F64 };
                number(out, kind);
                return kind.pack(*x, out);
            }
            Self::Bool(b) => {
                number(out, Number::Bool);
                out.push(u8::from(*b));
            }
            Self::Text(t) => {
                code(out, 8);
                text(out, t);
            }
            Self::Texts(all) => {
                code(out, 9);
                code(out, 8);
                out.extend((all.len() as u64).to_le_bytes());
                all.iter().for_each(|t| text(out, t));
                return all.len() as u64 <= MOST_VALUES;
            }
            Self::Numbers(kind, all) => {
                code(out, 9);
                number(out, *kind);
                out.extend((all.len() as u64).to_le_bytes());
                return all.iter().all(|x| kind.pack(*x, out)) && all.len() as u64 <= MOST_VALUES;
            }
        }
        true
    }
}

/// Where a tensor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its shape, the last dimension the one that lies together.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub kind: Packing,
    /// First byte in the file.
    offset: u64,
}

impl Tensor {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The header of a file.
#[derive(Debug, Clone)]
pub struct Gguf {
    path: PathBuf,
    /// The metadata.
    pub metadata: BTreeMap<String, Value>,
    /// The tensors.
    pub tensors: BTreeMap<String, Tensor>,
}

/// A header being read.
struct Reader<R> {
    input: R,
    /// Bytes that are left in the file.
    left: u64,
}

type Said<T> = Result<T, String>;

/// The shortest number whose nearest `f32` is `x`: 1e-5 is meant to be 1e-5.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| x.into())
}

impl<R: Read> Reader<R> {
    fn bytes<const N: usize>(&mut self) -> Said<[u8; N]> {
        let mut bytes = [0; N];
        self.left = self.left.checked_sub(N as u64).ok_or("it ends within its header")?;
        self.input.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Said<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Said<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn text(&mut self, most: u64) -> Said<String> {
        let len = self.u64()?;
        if len > most.min(self.left) {
            return Err(format!("a text of {len} bytes in its header"));
        }
        self.left -= len;
        let mut bytes = Vec::new();
        let read =
            (&mut self.input).take(len).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if read as u64 != len {
            return Err("it ends within its header".into());
        }
        String::from_utf8(bytes).map_err(|_| "a text that is not UTF-8 in its header".into())
    }

    fn number(&mut self, kind: u32) -> Said<Value> {
        let unsigned = |n: u64| Value::Unsigned(n);
        let signed = |n: i64| u64::try_from(n).map_or(Value::Signed(n), Value::Unsigned);
        Ok(match kind {
            0 => unsigned(u8::from_le_bytes(self.bytes()?).into()),
            1 => signed(i8::from_le_bytes(self.bytes()?).into()),
            2 => unsigned(u16::from_le_bytes(self.bytes()?).into()),
            3 => signed(i16::from_le_bytes(self.bytes()?).into()),
            4 => unsigned(u32::from_le_bytes(self.bytes()?).into()),
            5 => signed(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Float(decimal(f32::from_le_bytes(self.bytes()?))),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            10 => unsigned(u64::from_le_bytes(self.bytes()?)),
            11 => signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => return Err(format!("metadata of type {other}, which does not exist")),
        })
    }

    fn value(&mut self) -> Said<Value> {
        match self.u32()? {
            8 => Ok(Value::Text(self.text(u64::MAX)?)),
            9 => {
                let (kind, n) = (self.u32()?, self.u64()?);
                // Every element takes a byte at least.
                if n > self.left.min(MOST_VALUES) {
                    return Err(format!("a list of {n} values in its header"));
                }
                if kind == 8 {
                    let all: Said<Vec<_>> = (0..n).map(|_| self.text(u64::MAX)).collect();
                    return Ok(Value::Texts(all?));
                }
                let Some(of) = Number::of(kind) else {
                    return Err(format!("a list of type {kind}, which lists do not have"));
                };
                let number = |value| match value {
                    Value::Unsigned(n) => n as f64,
                    Value::Signed(n) => n as f64,
                    Value::Float(x) => x,
                    Value::Bool(b) => f64::from(u8::from(b)),
                    Value::Text(_) | Value::Texts(_) | Value::Numbers(..) => 0.0,
                };
                let all: Said<Vec<_>> = (0..n).map(|_| self.number(kind).map(number)).collect();
                Ok(Value::Numbers(of, all?))
            }
            kind => self.number(kind),
        }
    }

    fn tensor(&mut self) -> Said<(String, Vec<u64>, Packing, u64)> {
        let name = self.text(MOST_NAME)?;
        let n = self.u32()?;
        if n > MOST_DIMENSIONS {
            return Err(format!("tensor {name:?} has {n} dimensions"));
        }
        let mut shape: Vec<_> = (0..n).map(|_| self.u64()).collect::<Said<_>>()?;
        // The first dimension is the one that lies together.
        shape.reverse();
        let number = self.u32()?;
        let kind = NUMBERS.iter().find(|known| known.1 == number);
        let kind = kind.map(|known| known.0).ok_or_else(|| {
            let known: Vec<_> = NUMBERS.iter().map(|known| known.0.name()).collect();
            format!("tensor {name:?} has type {number}, expected one of {}", known.join(", "))
        })?;
        Ok((name, shape, kind, self.u64()?))
    }
}

/// Reads a header of a file of `len` bytes.
///
/// # Errors
/// [`WeightsError::Gguf`] says what is wrong with it.
pub fn read_header(path: &Path, input: impl Read, len: u64) -> Result<Gguf, WeightsError> {
    header(path, Reader { input, left: len }, len)
        .map_err(|what| WeightsError::Gguf { path: path.into(), what })
}

fn header<R: Read>(path: &Path, mut r: Reader<R>, len: u64) -> Said<Gguf> {
    if r.bytes::<4>()? != MAGIC {
        return Err("it does not begin with \"GGUF\"".into());
    }
    let version = r.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("version {version}, expected 2 or 3 (little-endian)"));
    }
    let (count, entries) = (r.u64()?, r.u64()?);
    if count > MOST_ENTRIES || entries > MOST_ENTRIES {
        return Err(format!("{count} tensors and {entries} entries of metadata"));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..entries {
        let key = r.text(MOST_NAME)?;
        let value = r.value().map_err(|what| format!("{key:?}: {what}"))?;
        if metadata.contains_key(&key) {
            return Err(format!("{key:?} comes twice"));
        }
        metadata.insert(key, value);
    }
    let found: Vec<_> = (0..count).map(|_| r.tensor()).collect::<Said<_>>()?;
    let alignment = match metadata.get("general.alignment") {
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
        Some(other) => {
            return Err(format!("general.alignment is {other:?}, expected a power of 2"));
        }
        None => ALIGNMENT,
    };
    let start = (len - r.left).next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (name, shape, kind, offset) in found {
        let wrong = |what: &str| format!("tensor {name:?} of {} {shape:?}: {what}", kind.name());
        let values = shape.iter().try_fold(1_u64, |n, d| n.checked_mul(*d));
        let values = values.ok_or_else(|| wrong("too large"))?;
        if !shape.last().unwrap_or(&1).is_multiple_of(kind.values() as u64) {
            return Err(wrong("rows that do not consist of whole blocks"));
        }
        let end = (values / kind.values() as u64)
            .checked_mul(kind.bytes() as u64)
            .and_then(|bytes| start.checked_add(offset)?.checked_add(bytes));
        if !offset.is_multiple_of(alignment) || end.is_none_or(|end| end > len) {
            return Err(wrong(&format!(
                "data at {offset} beyond the end of the file, or in no place"
            )));
        }
        let shape: Option<Vec<usize>> = shape.iter().map(|d| usize::try_from(*d).ok()).collect();
        let shape = shape.filter(|_| usize::try_from(values).is_ok());
        let shape = shape.ok_or_else(|| format!("tensor {name:?} is too large"))?;
        if tensors.contains_key(&name) {
            return Err(format!("tensor {name:?} comes twice"));
        }
        tensors.insert(name, Tensor { shape, kind, offset: start + offset });
    }
    Ok(Gguf { path: path.into(), metadata, tensors })
}

impl Gguf {
    /// Where a tensor lies.
    pub fn extent(&self, name: &str) -> Option<Extent> {
        let tensor = self.tensors.get(name)?;
        let path = self.path.clone();
        Some(Extent { packing: tensor.kind, neighbours: 0, path, offset: tensor.offset })
    }

    /// Reads a file's header.
    ///
    /// # Errors
    /// [`WeightsError`]
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let file = File::open(path).map_err(|e| FileError::io(path, "open it", e))?;
        let len = file.metadata().map_err(|e| FileError::io(path, "read its size", e))?.len();
        read_header(path, BufReader::new(file), len)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A whole number of the metadata.
    pub fn count(&self, key: &str) -> Option<u64> {
        match self.metadata.get(key) {
            Some(Value::Unsigned(n)) => Some(*n),
            _ => None,
        }
    }

    /// A number of the metadata.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key) {
            Some(Value::Unsigned(n)) => Some(*n as f64),
            Some(Value::Signed(n)) => Some(*n as f64),
            Some(Value::Float(x)) => Some(*x),
            _ => None,
        }
    }

    /// A text of the metadata.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// What the file says of the model's tokenizer, to be carried over into another file.
    pub fn tokenizer(&self) -> Vec<(String, Value)> {
        let entries = self.metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."));
        entries.map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Reads a tensor in pieces.
    ///
    /// # Errors
    /// [`WeightsError`], also for a value that is not finite, and what `put` returns.
    pub fn stream(&self, name: &str, put: &mut Pieces<'_>) -> Result<(), WeightsError> {
        let tensor = self.tensors.get(name).ok_or_else(|| WeightsError::Unknown(name.into()))?;
        let failed = |e| WeightsError::from(FileError::io(&self.path, "read its weights", e));
        let mut file = File::open(&self.path).map_err(failed)?;
        file.seek(SeekFrom::Start(tensor.offset)).map_err(failed)?;
        let (per, unit) = (tensor.kind.values(), tensor.kind.bytes());
        let mut bytes = vec![0; PIECE / per * unit];
        let (mut values, mut at) = (vec![0.0; PIECE], 0);
        while at < tensor.len() {
            let n = PIECE.min(tensor.len() - at);
            let (bytes, values) = (&mut bytes[..n / per * unit], &mut values[..n]);
            file.read_exact(bytes).map_err(failed)?;
            tensor.kind.unpack(bytes, values);
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                let (path, name, at) = (self.path.clone(), name.into(), at + i);
                return Err(WeightsError::NotFinite { path, name, at, value: values[i] });
            }
            put(at, values)?;
            at += n;
        }
        Ok(())
    }
}

/// Why a GGUF file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The file could not be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// More or fewer values than a tensor has.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The backend refused.
    #[error(transparent)]
    Core(#[from] bdia_core::Error),
    /// What such a file, or the program that it is for, cannot have.
    #[error("{what}: expected {expected}, found {found}")]
    Unfit {
        /// What.
        what: String,
        /// What is possible.
        expected: String,
        /// What came.
        found: String,
    },
    /// A value that the tensor cannot hold as it is to be stored.
    #[error(
        "tensor {name}: element {at} is {value}, expected a number up to {}, the largest of {}",
        packing::largest(*kind),
        kind.name()
    )]
    Range {
        /// The tensor.
        name: String,
        /// The element; of a block, the largest.
        at: usize,
        /// Its value.
        value: f32,
        /// How it is to be stored.
        kind: Packing,
    },
}

impl WriteError {
    pub(crate) fn unfit(what: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Unfit { what: what.into(), expected: expected.into(), found: found.into() }
    }
}

/// A tensor that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTensor {
    /// The name.
    pub name: String,
    /// The shape, the last dimension the one that lies together.
    pub shape: Vec<usize>,
    /// How its values are stored: one that [can be written](packing::WRITTEN).
    pub kind: Packing,
}

/// Takes the values of one tensor, in any number of pieces.
pub struct Sink<'a> {
    out: &'a mut BufWriter<Temporary>,
    path: &'a Path,
    tensor: &'a NewTensor,
    /// Values that do not fill a block yet.
    rest: Vec<f32>,
    bytes: Vec<u8>,
    count: usize,
}

impl core::fmt::Debug for Sink<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Sink").field("tensor", self.tensor).field("count", &self.count).finish()
    }
}

impl Sink<'_> {
    /// The next values.
    ///
    /// # Errors
    /// A value that is not finite, or not as it is stored; a file that cannot be written.
    pub fn put(&mut self, mut values: &[f32]) -> Result<(), WriteError> {
        let per = self.tensor.kind.values();
        while !values.is_empty() {
            if self.rest.is_empty() && values.len() >= per {
                let (whole, after) = values.split_at(values.len().min(PIECE) / per * per);
                values = after;
                self.pack(whole)?;
            } else {
                let (some, after) = values.split_at(values.len().min(per - self.rest.len()));
                values = after;
                self.rest.extend(some);
                if self.rest.len() == per {
                    let whole = core::mem::take(&mut self.rest);
                    self.pack(&whole)?;
                }
            }
        }
        Ok(())
    }

    /// Writes whole blocks.
    fn pack(&mut self, values: &[f32]) -> Result<(), WriteError> {
        let kind = self.tensor.kind;
        self.bytes.clear();
        for block in values.chunks_exact(kind.values()) {
            if !packing::pack(kind, block, &mut self.bytes) {
                let wrong = |x: &f32| if x.is_finite() { x.abs() } else { f32::INFINITY };
                let largest =
                    |a: &(usize, &f32), b: &(usize, &f32)| wrong(a.1).total_cmp(&wrong(b.1));
                let (i, &value) = block.iter().enumerate().max_by(largest).unwrap_or((0, &0.0));
                let (name, at) = (self.tensor.name.clone(), self.count + i);
                return Err(WriteError::Range { name, at, value, kind });
            }
            self.count += block.len();
        }
        let failed = |e| FileError::io(self.path, "write its weights", e);
        Ok(self.out.write_all(&self.bytes).map_err(failed)?)
    }
}

/// Writes a file, atomically: `values` is called once for each tensor, in order, and puts its
/// values into the sink. Memory is needed for a piece of a tensor, and for the header.
///
/// # Errors
/// Metadata and tensors that such a file cannot have, and what `values` returns; an existing file
/// is untouched then.
pub fn write(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[NewTensor],
    mut values: impl FnMut(usize, &mut Sink<'_>) -> Result<(), WriteError>,
) -> Result<(), WriteError> {
    let header = new_header(metadata, tensors)?;
    let to_alignment = |n: u64| (n.next_multiple_of(ALIGNMENT) - n) as usize;
    let zeros = [0; ALIGNMENT as usize];
    write_atomic(path, |out| {
        let failed = |e| FileError::io(path, "write its header", e);
        out.write_all(&header).map_err(failed)?;
        out.write_all(&zeros[..to_alignment(header.len() as u64)]).map_err(failed)?;
        for (i, tensor) in tensors.iter().enumerate() {
            let (rest, bytes) = (Vec::new(), Vec::new());
            let mut sink = Sink { out, path, tensor, rest, bytes, count: 0 };
            values(i, &mut sink)?;
            let (name, found) = (tensor.name.clone(), sink.count + sink.rest.len());
            let expected = tensor.shape.iter().product();
            if found != expected {
                return Err(WeightsError::Count { name, expected, found }.into());
            }
            let bytes = (expected / tensor.kind.values() * tensor.kind.bytes()) as u64;
            let failed = |e| FileError::io(path, "write its weights", e);
            out.write_all(&zeros[..to_alignment(bytes)]).map_err(failed)?;
        }
        Ok(())
    })
}

/// A header, without what fills it up to the alignment.
fn new_header(metadata: &[(String, Value)], tensors: &[NewTensor]) -> Result<Vec<u8>, WriteError> {
    for (what, n) in [("entries of metadata", metadata.len()), ("tensors", tensors.len())] {
        if n as u64 > MOST_ENTRIES {
            return Err(WriteError::unfit(what, format!("at most {MOST_ENTRIES}"), n.to_string()));
        }
    }
    let mut out = MAGIC.to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let mut names = BTreeSet::new();
    for (key, value) in metadata {
        if !names.insert(key) {
            return Err(WriteError::unfit(key, "one entry", "two"));
        }
        if key.len() as u64 >= MOST_NAME {
            return Err(WriteError::unfit(
                "a key",
                format!("less than {MOST_NAME} bytes"),
                key.len().to_string(),
            ));
        }
        if key == "general.alignment" && *value != Value::Unsigned(ALIGNMENT) {
            return Err(WriteError::unfit(key, ALIGNMENT.to_string(), format!("{value:?}")));
        }
        text(&mut out, key);
        if !value.pack(&mut out) {
            let expected = format!("numbers of its type, and at most {MOST_VALUES}");
            return Err(WriteError::unfit(key, expected, "others"));
        }
    }
    let (mut names, mut at) = (BTreeSet::new(), 0_u64);
    for NewTensor { name, shape, kind } in tensors {
        let what = format!("tensor {name}");
        let unfit = |expected: &str, found: String| WriteError::unfit(&what, expected, found);
        if !names.insert(name) {
            return Err(unfit("one of that name", "two".into()));
        }
        if name.len() > MOST_TENSOR_NAME {
            let expected = format!("a name of at most {MOST_TENSOR_NAME} bytes");
            return Err(unfit(&expected, name.len().to_string()));
        }
        if shape.len() > MOST_DIMENSIONS as usize {
            let expected = format!("at most {MOST_DIMENSIONS} dimensions");
            return Err(unfit(&expected, shape.len().to_string()));
        }
        if !packing::WRITTEN.contains(kind) {
            return Err(unfit("F32, F16, BF16, Q8_0 or Q4_0", kind.name().into()));
        }
        if !shape.last().unwrap_or(&1).is_multiple_of(kind.values()) {
            let expected = format!("rows of whole blocks of {} values", kind.values());
            return Err(unfit(&expected, format!("{shape:?}")));
        }
        let values = shape.iter().try_fold(1_u64, |n, d| n.checked_mul(*d as u64));
        let bytes =
            values.and_then(|n| (n / kind.values() as u64).checked_mul(kind.bytes() as u64));
        // Up to what a file can have, so that nothing below overflows.
        let end = bytes.and_then(|n| at.checked_add(n)).filter(|end| *end < i64::MAX as u64);
        let end = end.ok_or_else(|| unfit("a size that can be counted", format!("{shape:?}")))?;
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        out.extend(shape.iter().rev().flat_map(|d| (*d as u64).to_le_bytes()));
        let number = NUMBERS.iter().find(|known| known.0 == *kind).map_or(0, |known| known.1);
        out.extend(number.to_le_bytes());
        out.extend(at.to_le_bytes());
        at = end.next_multiple_of(ALIGNMENT);
    }
    Ok(out)
}
