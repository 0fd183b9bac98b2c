//! GGUF files (versions 2 and 3): metadata, and tensors that are stored in blocks of few bits.
//!
//! A file is a header (magic, version, two counts), the metadata (key, type, value), the tensors'
//! names, shapes, types and places, and their data, each at a multiple of the alignment. All
//! numbers are little-endian. Headers come from outside and are trusted in nothing; data is read a
//! piece at a time.
//!
//! The formats of the blocks are those of ggml's reference implementation:
//!
//! | type | values | bytes | value |
//! |---|---|---|---|
//! | `Q4_0`, `Q5_0`, `Q8_0` | 32 | 18, 22, 34 | `d·q`, `q` from −8, −16, −127 |
//! | `Q4_1`, `Q5_1` | 32 | 20, 24 | `d·q + m` |
//! | `Q4_K`, `Q5_K` | 256 | 144, 176 | `(d·s)·q − e·t`, `s`, `t` of 6 bits for each 32 values |
//! | `Q6_K` | 256 | 210 | `(d·s)·q`, `s` of 8 bits for each 16 values, `q` from −32 |

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use crate::files::FileError;
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
/// Values that are converted at a time: whole blocks of every kind.
const PIECE: usize = 4096;

/// How the values of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the format's own names")]
pub enum Kind {
    /// 32 bits.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of an `f32`.
    Bf16,
    /// See the [module](self).
    Q4_0,
    /// See the [module](self).
    Q4_1,
    /// See the [module](self).
    Q5_0,
    /// See the [module](self).
    Q5_1,
    /// See the [module](self).
    Q8_0,
    /// See the [module](self).
    Q4_K,
    /// See the [module](self).
    Q5_K,
    /// See the [module](self).
    Q6_K,
}

impl Kind {
    /// Number in files, name, values of a block, bytes of a block.
    const ALL: [(Self, u32, &'static str, usize, usize); 11] = [
        (Self::F32, 0, "F32", 1, 4),
        (Self::F16, 1, "F16", 1, 2),
        (Self::Bf16, 30, "BF16", 1, 2),
        (Self::Q4_0, 2, "Q4_0", 32, 18),
        (Self::Q4_1, 3, "Q4_1", 32, 20),
        (Self::Q5_0, 6, "Q5_0", 32, 22),
        (Self::Q5_1, 7, "Q5_1", 32, 24),
        (Self::Q8_0, 8, "Q8_0", 32, 34),
        (Self::Q4_K, 12, "Q4_K", 256, 144),
        (Self::Q5_K, 13, "Q5_K", 256, 176),
        (Self::Q6_K, 14, "Q6_K", 256, 210),
    ];

    fn of(number: u32) -> Option<Self> {
        Self::ALL.iter().find(|k| k.1 == number).map(|k| k.0)
    }

    fn entry(self) -> (usize, usize) {
        // Every kind is in the list.
        Self::ALL.iter().find(|k| k.0 == self).map_or((1, 4), |k| (k.3, k.4))
    }

    /// The name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|k| k.0 == self).map_or("", |k| k.2)
    }

    /// Values of a block.
    pub fn values(self) -> usize {
        self.entry().0
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        self.entry().1
    }

    /// The values of whole blocks, by ggml's formulas in the order of its operations.
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        let (values, bytes) = self.entry();
        for (block, y) in blocks.chunks_exact(bytes).zip(out.chunks_exact_mut(values)) {
            self.block(block, y);
        }
    }

    fn block(self, b: &[u8], y: &mut [f32]) {
        let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        // The fifth bits of 32 values.
        let fifth = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        match self {
            Self::F32 => y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Self::F16 => y[0] = half(0),
            Self::Bf16 => y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Self::Q8_0 => {
                let d = half(0);
                y.iter_mut().zip(&b[2..]).for_each(|(y, q)| *y = f32::from(*q as i8) * d);
            }
            Self::Q4_0 | Self::Q4_1 => {
                let with_m = self == Self::Q4_1;
                let (d, m) = (half(0), if with_m { half(2) } else { 0.0 });
                let qs = &b[if with_m { 4 } else { 2 }..];
                for (j, q) in qs.iter().enumerate() {
                    for (at, q) in [(j, q & 15), (j + 16, q >> 4)] {
                        y[at] =
                            if with_m { d * f32::from(q) + m } else { d * f32::from(q as i8 - 8) };
                    }
                }
            }
            Self::Q5_0 | Self::Q5_1 => {
                let with_m = self == Self::Q5_1;
                let (d, m) = (half(0), if with_m { half(2) } else { 0.0 });
                let at = if with_m { 4 } else { 2 };
                let high = fifth(at);
                for (j, q) in b[at + 4..].iter().enumerate() {
                    for (at, low) in [(j, q & 15), (j + 16, q >> 4)] {
                        let q = low | ((high >> at & 1) << 4) as u8;
                        y[at] =
                            if with_m { d * f32::from(q) + m } else { d * f32::from(q as i8 - 16) };
                    }
                }
            }
            Self::Q4_K | Self::Q5_K => {
                let (d, e) = (half(0), half(2));
                let scales = &b[4..16];
                let (high, qs) =
                    if self == Self::Q5_K { b[16..].split_at(32) } else { (&[][..], &b[16..]) };
                for (part, y) in y.chunks_exact_mut(32).enumerate() {
                    let (s, t) = scale_and_minimum(scales, part);
                    let (s, t) = (d * f32::from(s), e * f32::from(t));
                    let qs = &qs[part / 2 * 32..][..32];
                    for (l, y) in y.iter_mut().enumerate() {
                        let low = if part % 2 == 0 { qs[l] & 15 } else { qs[l] >> 4 };
                        let bit = high.get(l).map_or(0, |h| h >> part & 1);
                        *y = s * f32::from(low | bit << 4) - t;
                    }
                }
            }
            Self::Q6_K => {
                let (low, rest) = b.split_at(128);
                let (high, rest) = rest.split_at(64);
                let d = half(208);
                for (part, y) in y.chunks_exact_mut(32).enumerate() {
                    // Two halves of 128 values; in each, four quarters of 32.
                    let (n, quarter) = (part / 4, part % 4);
                    let low = &low[n * 64 + quarter % 2 * 32..][..32];
                    let high = &high[n * 32..][..32];
                    for (l, y) in y.iter_mut().enumerate() {
                        let four = if quarter < 2 { low[l] & 15 } else { low[l] >> 4 };
                        let q = (four | (high[l] >> (2 * quarter) & 3) << 4) as i8 - 32;
                        let scale = rest[n * 8 + quarter * 2 + l / 16] as i8;
                        *y = d * f32::from(scale) * f32::from(q);
                    }
                }
            }
        }
    }
}

/// Scale and minimum, of 6 bits each, of 32 of a block's 256 values.
fn scale_and_minimum(packed: &[u8], part: usize) -> (u8, u8) {
    if part < 4 {
        return (packed[part] & 63, packed[part + 4] & 63);
    }
    let (both, low, high) = (packed[part + 4], packed[part - 4], packed[part]);
    (both & 15 | low >> 6 << 4, both >> 4 | high >> 6 << 4)
}

/// A value of the metadata.
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
    Numbers(Vec<f64>),
}

/// Where a tensor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its shape, the last dimension the one that lies together.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub kind: Kind,
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
                let number = |value| match value {
                    Value::Unsigned(n) => n as f64,
                    Value::Signed(n) => n as f64,
                    Value::Float(x) => x,
                    Value::Bool(b) => f64::from(u8::from(b)),
                    Value::Text(_) | Value::Texts(_) | Value::Numbers(_) => 0.0,
                };
                let all: Said<Vec<_>> = (0..n).map(|_| self.number(kind).map(number)).collect();
                Ok(Value::Numbers(all?))
            }
            kind => self.number(kind),
        }
    }

    fn tensor(&mut self) -> Said<(String, Vec<u64>, Kind, u64)> {
        let name = self.text(MOST_NAME)?;
        let n = self.u32()?;
        if n > MOST_DIMENSIONS {
            return Err(format!("tensor {name:?} has {n} dimensions"));
        }
        let mut shape: Vec<_> = (0..n).map(|_| self.u64()).collect::<Said<_>>()?;
        // The first dimension is the one that lies together.
        shape.reverse();
        let number = self.u32()?;
        let kind = Kind::of(number).ok_or_else(|| {
            let known: Vec<_> = Kind::ALL.iter().map(|k| k.2).collect();
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
        None => 32,
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
            tensor.kind.dequantize(bytes, values);
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
