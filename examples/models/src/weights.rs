//! Parameters as safetensors: `model.safetensors`, in one file or in shards, as Hugging Face has
//! them.
//!
//! A safetensors file is the length of its header (`u64`, little-endian), the header (JSON: name →
//! dtype, shape, range of bytes), and the data. Headers come from outside and are trusted in
//! nothing; data is read a piece at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bdia_core::Packing;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

use crate::files::{FileError, Temporary, read_limited, write_atomic};
use crate::packing::Extent;

/// The file of an unsharded model.
pub const FILE: &str = "model.safetensors";
/// The index of a sharded one.
pub const INDEX: &str = "model.safetensors.index.json";

/// The weights as older files have them.
const PICKLE: &str = "pytorch_model.bin";

/// The matrix of a language model's logits.
const HEAD: &str = "lm_head.weight";

/// The note by which a file knows the configuration that it was written with.
const NOTE: &str = "bdia_config";
/// The largest configuration that is looked at.
const MOST_CONFIG: u64 = 1 << 24;

/// The largest header that is read, as in the safetensors library.
const MOST_HEADER: u64 = 100_000_000;
/// Values converted at a time.
const PIECE: usize = 4096;

/// Why parameters cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no model in the directory.
    #[error(
        "{}: found neither {FILE} nor {INDEX}; expected a directory in Hugging Face's layout{}",
        .0.display(),
        if .0.join(PICKLE).exists() || .0.join(format!("{PICKLE}.index.json")).exists() {
            ". Pickled weights may run code and are not read; convert them with transformers: \
             AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        } else {
            ""
        }
    )]
    Absent(PathBuf),
    /// The header is not one.
    #[error("{}: not a safetensors file: {what}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The header of a GGUF file is not one.
    #[error("{}: not a GGUF file that can be read: {what}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The index of the shards is not usable.
    #[error("{}: {what}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The configuration beside the weights is not the one that they were written with.
    #[error(
        "{}: config.json beside it is not the one that it was written with: {}; put that one back",
        path.display(),
        .differs.join("; ")
    )]
    Configuration {
        /// The weights.
        path: PathBuf,
        /// What differs, by name.
        differs: Vec<String>,
    },
    /// The tensors are not those of the model.
    #[error("the weights do not fit the configuration: {}", .0.join("; "))]
    Mismatch(Vec<String>),
    /// A tensor that is not there was asked for.
    #[error("tensor {0} is not in the file")]
    Unknown(String),
    /// A type that weights do not have.
    #[error("tensor {name} has dtype {dtype}, expected F32, F16 or BF16")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A weight that is NaN or infinite.
    #[error(
        "{}, tensor {name}: element {at} is {value}, expected a finite number; the file is \
         damaged or its training diverged",
        path.display()
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The element.
        at: usize,
        /// Its value.
        value: f32,
    },
    /// A value that the model, which stores the tensor in few bits, cannot hold.
    #[error("tensor {name}: {value} does not fit the few bits in which it is to be stored")]
    Narrow {
        /// The tensor.
        name: String,
        /// The value.
        value: f32,
    },
    /// A tensor that is stored otherwise than was planned.
    #[error("tensor {name}: expected {expected}, found {found}")]
    Stored {
        /// The tensor.
        name: String,
        /// What would do.
        expected: String,
        /// How it is stored.
        found: String,
    },
    /// The backend refused.
    #[error(transparent)]
    Core(#[from] bdia_core::Error),
    /// More or fewer values than the tensor has.
    #[error("tensor {name}: expected {expected} values, found {found}")]
    Count {
        /// The tensor.
        name: String,
        /// By its shape.
        expected: usize,
        /// What came.
        found: usize,
    },
}

/// What takes a tensor's values in pieces: the index of the first element, and the elements.
pub type Pieces<'a> = dyn FnMut(usize, &[f32]) -> Result<(), WeightsError> + 'a;

/// Where the parameters of a model come from: files of one format or another.
pub trait Source {
    /// Whether these are the tensors of a model, by name and shape.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] names everything that is missing, unexpected or different.
    fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<(), WeightsError>;

    /// Where a tensor of finite values lies as it is; none where its values are changed first.
    fn extent(&self, name: &str) -> Option<Extent> {
        let _ = name;
        None
    }

    /// Reads a tensor in pieces.
    ///
    /// # Errors
    /// [`WeightsError`], also for a value that is not finite, and what `put` returns.
    fn stream(&self, name: &str, put: &mut Pieces<'_>) -> Result<(), WeightsError>;

    /// Reads a whole tensor.
    ///
    /// # Errors
    /// [`WeightsError`], also for a buffer of another size.
    fn read(&self, name: &str, out: &mut [f32]) -> Result<(), WeightsError> {
        let mut found = 0;
        self.stream(name, &mut |at, values| {
            if let Some(place) = out.get_mut(at..at + values.len()) {
                place.copy_from_slice(values);
            }
            found += values.len();
            Ok(())
        })?;
        let (name, expected) = (name.to_string(), found);
        if found == out.len() {
            Ok(())
        } else {
            Err(WeightsError::Count { name, expected, found: out.len() })
        }
    }
}

impl Source for Weights {
    fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<(), WeightsError> {
        Self::check(self, expected)
    }

    fn extent(&self, name: &str) -> Option<Extent> {
        let tensor = self.tensors.get(name)?;
        let packing = match tensor.dtype.as_str() {
            "F32" => Packing::F32,
            "F16" => Packing::F16,
            "BF16" => Packing::Bf16,
            _ => return None,
        };
        let path = self.files[tensor.file].clone();
        Some(Extent { packing, neighbours: 0, path, offset: tensor.offset })
    }

    fn stream(&self, name: &str, put: &mut Pieces<'_>) -> Result<(), WeightsError> {
        Self::stream(self, name, put)
    }
}

/// Where a tensor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its type, as the file has it.
    pub dtype: String,
    /// The first byte in the file.
    offset: u64,
    file: usize,
}

impl Tensor {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The tensors of a model, by name without `transformer.`; the data stays in the files.
#[derive(Debug, Clone)]
pub struct Weights {
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Tensor>,
}

/// A tensor in a header.
#[derive(Debug, Clone, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// A header's tensors, and its notes; unlike in a map, a name that comes twice is seen.
struct Entries(Vec<(String, Entry)>, BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Entries;

            fn expecting(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let (mut all, mut names, mut notes) =
                    (Vec::new(), BTreeSet::new(), BTreeMap::new());
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!(
                            "the name {} comes twice",
                            short(&name)
                        )));
                    }
                    if name == "__metadata__" {
                        notes = map.next_value()?;
                    } else {
                        all.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(all, notes))
            }
        }
        deserializer.deserialize_map(All)
    }
}

/// Names from outside may have any length.
fn short(name: &str) -> String {
    if name.chars().count() <= 100 {
        name.to_string()
    } else {
        name.chars().take(100).chain("…".chars()).collect()
    }
}

/// Bytes of an element, by the names of the safetensors format.
fn element_bytes(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" => 1,
        "U16" | "I16" | "F16" | "BF16" => 2,
        "U32" | "I32" | "F32" => 4,
        "U64" | "I64" | "F64" => 8,
        _ => return None,
    })
}

/// Reads and checks the header of a safetensors file of `len` bytes.
///
/// # Errors
/// [`WeightsError::Header`], and errors of reading.
pub fn read_header(
    path: &Path,
    reader: &mut impl Read,
    len: u64,
    file: usize,
) -> Result<Vec<(String, Tensor)>, WeightsError> {
    let wrong = |what: String| WeightsError::Header { path: path.into(), what };
    let (Entries(entries, _), size) = entries(path, reader, len)?;
    let data = len - 8 - size;
    let mut ranges = Vec::with_capacity(entries.len());
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, Entry { dtype, shape, data_offsets: [begin, end] }) in entries {
        let shown = short(&name);
        if begin > end || end > data {
            return Err(wrong(format!(
                "tensor {shown} lies at bytes {begin} to {end} of the data, which has {data}; the \
                 file is cut off or damaged"
            )));
        }
        let unit = element_bytes(&dtype).ok_or_else(|| {
            wrong(format!("tensor {shown} has the unknown dtype {}", short(&dtype)))
        })?;
        let bytes = shape.iter().try_fold(unit, |n, &d| n.checked_mul(d));
        if bytes != Some(end - begin) {
            let bytes = bytes
                .map_or("more bytes than can be counted".to_string(), |b| format!("{b} bytes"));
            let shape = short(&format!("{shape:?}"));
            return Err(wrong(format!(
                "tensor {shown} of shape {shape} and dtype {dtype} has {bytes}, found {}",
                end - begin
            )));
        }
        let sizes: Result<Vec<usize>, _> = shape.iter().map(|&d| usize::try_from(d)).collect();
        let shape =
            sizes.map_err(|_| wrong(format!("tensor {shown} is too large for this machine")))?;
        ranges.push((begin, end, tensors.len()));
        tensors.push((name, Tensor { shape, dtype, offset: 8 + size + begin, file }));
    }
    // The format has neither overlaps nor holes.
    ranges.sort_unstable();
    let mut at = 0;
    for (begin, end, i) in ranges {
        if begin != at {
            let what =
                if begin < at { "overlaps another tensor" } else { "leaves a hole before it" };
            let name = short(&tensors[i].0);
            return Err(wrong(format!(
                "tensor {name} begins at byte {begin} of the data, expected {at}: it {what}"
            )));
        }
        at = end;
    }
    if at != data {
        return Err(wrong(format!(
            "the tensors end at byte {at} of the data, which has {data}: something is appended"
        )));
    }
    Ok(tensors)
}

/// What a header says beside its tensors: names and values that whoever wrote the file chose.
///
/// # Errors
/// [`WeightsError::Header`], and errors of reading.
pub fn notes(path: &Path) -> Result<BTreeMap<String, String>, WeightsError> {
    let mut file = File::open(path).map_err(|e| FileError::io(path, "open it", e))?;
    let len = file.metadata().map_err(|e| FileError::io(path, "read its size", e))?.len();
    Ok(entries(path, &mut file, len)?.0.1)
}

/// The header of a safetensors file of `len` bytes, and its size.
fn entries(path: &Path, reader: &mut impl Read, len: u64) -> Result<(Entries, u64), WeightsError> {
    let wrong = |what: String| WeightsError::Header { path: path.into(), what };
    let failed = |e: io::Error| FileError::io(path, "read its header", e);
    if len < 8 {
        return Err(wrong(format!(
            "{len} bytes, expected at least 8; the file is cut off or empty"
        )));
    }
    let mut size = [0_u8; 8];
    reader.read_exact(&mut size).map_err(failed)?;
    let size = u64::from_le_bytes(size);
    if size > len - 8 || size > MOST_HEADER {
        let most = MOST_HEADER.min(len - 8);
        return Err(wrong(format!(
            "the header claims {size} bytes, expected at most {most}; the file is cut off or \
             foreign"
        )));
    }
    // The claim is not trusted with memory: what is there is read, up to it.
    let mut header = Vec::new();
    reader.take(size).read_to_end(&mut header).map_err(failed)?;
    // JSON is UTF-8 also where its content is skipped, which the parser alone does not check.
    let header = core::str::from_utf8(&header)
        .map_err(|e| wrong(format!("the header is not UTF-8: {e}")))?;
    let entries = serde_json::from_str(header).map_err(|e| wrong(format!("the header: {e}")))?;
    Ok((entries, size))
}

/// The index of a sharded model.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Reads the text of an index: which file has each tensor.
///
/// # Errors
/// [`WeightsError::Index`]
pub fn read_index(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, String>, WeightsError> {
    let wrong = |what: String| WeightsError::Index { path: path.into(), what };
    let Index { weight_map } =
        serde_json::from_slice(bytes).map_err(|e| wrong(format!("not an index of shards: {e}")))?;
    for file in weight_map.values() {
        // A name from outside must not lead out of the directory.
        let plain = !file.is_empty()
            && file != "."
            && file != ".."
            && !file.contains(['/', '\\', '\0', ':']);
        if !plain {
            return Err(wrong(format!(
                "{:?} is not the name of a file in this directory",
                short(file)
            )));
        }
    }
    if weight_map.is_empty() {
        return Err(wrong("the index names no tensor".into()));
    }
    Ok(weight_map)
}

impl Weights {
    /// Reads the headers of a model's files: `model.safetensors`, or the shards that the index
    /// beside it names.
    ///
    /// # Errors
    /// [`WeightsError`]
    pub fn read_dir(dir: &Path) -> Result<Self, WeightsError> {
        let single = dir.join(FILE);
        if single.exists() {
            return Self::read_files(vec![single]);
        }
        let index = dir.join(INDEX);
        if !index.exists() {
            return Err(WeightsError::Absent(dir.into()));
        }
        let map = read_index(&index, &read_limited(&index, MOST_HEADER)?)?;
        let names: BTreeSet<&String> = map.values().collect();
        let weights = Self::read_files(names.iter().map(|n| dir.join(n)).collect())?;
        let lost: Vec<_> = (map.iter())
            .filter(|(name, file)| {
                let plain = plain_name(name);
                !is_buffer(plain)
                    && weights
                        .tensors
                        .get(plain)
                        .is_none_or(|t| !weights.files[t.file].ends_with(file.as_str()))
            })
            .map(|(name, file)| format!("{} is not in {file}", short(name)))
            .collect();
        if lost.is_empty() {
            Ok(weights)
        } else {
            Err(WeightsError::Index {
                path: index,
                what: format!("the shards are not those of the index: {}", list(lost)),
            })
        }
    }

    /// Reads the headers of these files.
    ///
    /// # Errors
    /// [`WeightsError`]
    pub fn read_files(files: Vec<PathBuf>) -> Result<Self, WeightsError> {
        let mut tensors = BTreeMap::new();
        for (i, path) in files.iter().enumerate() {
            let mut file = File::open(path).map_err(|e| FileError::io(path, "open it", e))?;
            let len = file.metadata().map_err(|e| FileError::io(path, "read its size", e))?.len();
            let tensors_of_file = read_header(path, &mut file, len, i)?;
            check_configuration(path, &notes(path)?)?;
            for (name, tensor) in tensors_of_file {
                let plain = plain_name(&name);
                if !is_buffer(plain) && tensors.insert(plain.to_string(), tensor).is_some() {
                    let what = format!(
                        "tensor {} comes twice (with and without transformer., or in two files)",
                        short(plain)
                    );
                    return Err(WeightsError::Header { path: path.clone(), what });
                }
            }
        }
        Ok(Self { files, tensors })
    }

    /// The tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(n, t)| (n.as_str(), t))
    }

    /// One tensor.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Of a model whose head is its embedding: where the file has the head alone, it is known under
    /// the embedding's name, too.
    pub fn tie(&mut self, embedding: &str) {
        if !self.tensors.contains_key(embedding)
            && let Some(head) = self.tensors.get(HEAD).cloned()
        {
            self.tensors.insert(embedding.into(), head);
        }
    }

    /// Whether the head may be the embedding: they are not tied where the file has both and they
    /// differ, whatever a configuration says.
    ///
    /// # Errors
    /// Those of reading.
    pub fn is_tied(&self, embedding: &str) -> Result<bool, WeightsError> {
        let (Some(a), Some(b)) = (self.tensors.get(embedding), self.tensors.get(HEAD)) else {
            return Ok(true);
        };
        let digest = |name: &str| {
            let mut hash = Xxh3::new();
            self.stream(name, |_, values: &[f32]| {
                values.iter().for_each(|v| hash.update(&v.to_bits().to_le_bytes()));
                Ok::<_, WeightsError>(())
            })?;
            Ok::<_, WeightsError>(hash.digest128())
        };
        Ok(a.shape == b.shape && digest(embedding)? == digest(HEAD)?)
    }

    /// Whether these are the tensors of a model. A head that the model ties to the embedding may be
    /// there in addition.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] names everything that is missing, unexpected, or of another shape
    /// or type.
    pub fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<(), WeightsError> {
        let mut wrong = Vec::new();
        let names: BTreeSet<&str> = expected.iter().map(|e| e.0.as_str()).collect();
        let missing: Vec<_> = names
            .iter()
            .filter(|n| !self.tensors.contains_key(**n))
            .map(|n| n.to_string())
            .collect();
        if !missing.is_empty() {
            wrong.push(format!("missing: {}", list(missing)));
        }
        let unexpected: Vec<_> = (self.tensors.keys())
            .filter(|n| !names.contains(n.as_str()) && *n != HEAD)
            .map(|n| short(n))
            .collect();
        if !unexpected.is_empty() {
            wrong.push(format!("unexpected: {}", list(unexpected)));
        }
        for (name, shape) in expected {
            if let Some(t) = self.tensors.get(name) {
                if t.shape != *shape {
                    wrong.push(format!("{name} has shape {:?}, expected {shape:?}", t.shape));
                }
                if !matches!(t.dtype.as_str(), "F32" | "F16" | "BF16") {
                    wrong.push(format!("{name} has dtype {}, expected F32, F16 or BF16", t.dtype));
                }
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(WeightsError::Mismatch(wrong)) }
    }

    /// Reads a tensor in pieces: `put` gets the index of the first element, and the elements.
    ///
    /// # Errors
    /// [`WeightsError`], also for a value that is not finite, and what `put` returns.
    pub fn stream<E: From<WeightsError>>(
        &self,
        name: &str,
        mut put: impl FnMut(usize, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let tensor = self.tensors.get(name).ok_or_else(|| WeightsError::Unknown(name.into()))?;
        let unit = match tensor.dtype.as_str() {
            "F32" => 4,
            "F16" | "BF16" => 2,
            other => {
                return Err(WeightsError::Dtype { name: name.into(), dtype: other.into() }.into());
            }
        };
        let path = &self.files[tensor.file];
        let failed = |e| WeightsError::from(FileError::io(path, "read its weights", e));
        let mut file = File::open(path).map_err(failed)?;
        file.seek(SeekFrom::Start(tensor.offset)).map_err(failed)?;
        let mut bytes = [0_u8; 4 * PIECE];
        let mut values = [0_f32; PIECE];
        let (mut at, len) = (0, tensor.len());
        while at < len {
            let n = PIECE.min(len - at);
            file.read_exact(&mut bytes[..n * unit]).map_err(failed)?;
            let halves = bytes.as_chunks::<2>().0;
            match tensor.dtype.as_str() {
                "F32" => {
                    for (v, b) in values[..n].iter_mut().zip(bytes.as_chunks::<4>().0) {
                        *v = f32::from_le_bytes(*b);
                    }
                }
                "F16" => {
                    for (v, b) in values[..n].iter_mut().zip(halves) {
                        *v = half::f16::from_le_bytes(*b).to_f32();
                    }
                }
                _ => {
                    for (v, b) in values[..n].iter_mut().zip(halves) {
                        *v = half::bf16::from_le_bytes(*b).to_f32();
                    }
                }
            }
            if let Some(i) = values[..n].iter().position(|v| !v.is_finite()) {
                let (path, name, at) = (path.clone(), name.into(), at + i);
                return Err(WeightsError::NotFinite { path, name, at, value: values[i] }.into());
            }
            put(at, &values[..n])?;
            at += n;
        }
        Ok(())
    }

    /// Reads a whole tensor.
    ///
    /// # Errors
    /// [`WeightsError`], also for a buffer of another size.
    pub fn read(&self, name: &str, out: &mut [f32]) -> Result<(), WeightsError> {
        let expected = self.tensors.get(name).map_or(0, Tensor::len);
        if self.tensors.contains_key(name) && expected != out.len() {
            return Err(WeightsError::Count { name: name.into(), expected, found: out.len() });
        }
        self.stream(name, |at, values| {
            out[at..at + values.len()].copy_from_slice(values);
            Ok(())
        })
    }
}

fn plain_name(name: &str) -> &str {
    let mut plain = name;
    // What PyTorch's wrappers put before the names: data parallelism, compilation.
    while let Some(rest) = ["module.", "_orig_mod."].iter().find_map(|p| plain.strip_prefix(p)) {
        plain = rest;
    }
    plain.strip_prefix("transformer.").unwrap_or(plain)
}

/// The causal masks that old files hold beside the parameters: `h.N.attn.bias` and
/// `h.N.attn.masked_bias`.
fn is_buffer(name: &str) -> bool {
    let mut parts = name.split('.');
    let block =
        parts.next() == Some("h") && parts.next().is_some_and(|n| n.parse::<usize>().is_ok());
    block
        && parts.next() == Some("attn")
        && matches!(parts.next(), Some("bias" | "masked_bias"))
        && parts.next().is_none()
}

/// Names in a message: the first few, and how many more.
fn list(names: Vec<String>) -> String {
    const MOST: usize = 40;
    let more = names.len().saturating_sub(MOST);
    let mut text = names.into_iter().take(MOST).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// Takes the values of one tensor, in any number of pieces.
pub struct Sink<'a> {
    out: &'a mut BufWriter<Temporary>,
    path: &'a Path,
    count: usize,
}

impl core::fmt::Debug for Sink<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Sink").field("path", &self.path).field("count", &self.count).finish()
    }
}

impl Sink<'_> {
    /// The next values.
    ///
    /// # Errors
    /// [`WeightsError::File`]
    pub fn put(&mut self, values: &[f32]) -> Result<(), WeightsError> {
        for v in values {
            self.out
                .write_all(&v.to_le_bytes())
                .map_err(|e| FileError::io(self.path, "write its weights", e))?;
        }
        self.count += values.len();
        Ok(())
    }
}

/// What says what a model is in the `config.json` beside a file of weights: all but how it was
/// trained. Nothing where there is none.
fn configuration(weights: &Path) -> Option<Map<String, Value>> {
    let path = weights.with_file_name("config.json");
    let bytes = read_limited(&path, MOST_CONFIG).ok()?;
    let mut all: Map<String, Value> = serde_json::from_slice(&bytes).ok()?;
    all.retain(|key, _| key != "bdia" && !key.ends_with("_pdrop") && key != "dropout");
    Some(all)
}

/// Refuses weights beside another configuration than the one that they were written with. Files
/// that were not written here know nothing of that.
fn check_configuration(path: &Path, notes: &BTreeMap<String, String>) -> Result<(), WeightsError> {
    let then = notes.get(NOTE).and_then(|n| serde_json::from_str::<Map<String, Value>>(n).ok());
    let (Some(then), Some(now)) = (then, configuration(path)) else { return Ok(()) };
    let keys: BTreeSet<_> = now.keys().chain(then.keys()).collect();
    let shown = |v: Option<&Value>| v.map_or("not there".into(), ToString::to_string);
    let differs: Vec<_> = (keys.into_iter().filter(|key| now.get(*key) != then.get(*key)))
        .map(|key| {
            let (now, then) = (shown(now.get(key)), shown(then.get(key)));
            format!("{} is {}, it was {}", short(key), short(&now), short(&then))
        })
        .collect();
    if differs.is_empty() {
        return Ok(());
    }
    Err(WeightsError::Configuration { path: path.into(), differs })
}

/// Writes a safetensors file in f32, atomically: `values` is called once for each tensor, in order,
/// and puts its values into the sink.
///
/// # Errors
/// [`WeightsError`], and what `values` returns; an existing file is untouched then.
pub fn write<E: From<WeightsError> + From<FileError>>(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    values: impl FnMut(usize, &mut Sink<'_>) -> Result<(), E>,
) -> Result<(), E> {
    write_noted(path, tensors, &[], values)
}

/// The same with [`notes`] in its header.
///
/// # Errors
/// As [`write()`].
pub fn write_noted<E: From<WeightsError> + From<FileError>>(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    notes: &[(&str, &str)],
    mut values: impl FnMut(usize, &mut Sink<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let header = header(path, tensors, notes)?;
    write_atomic(path, |out| {
        let failed = |e| FileError::io(path, "write its header", e);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(header.as_bytes()).map_err(failed)?;
        for (i, (name, shape)) in tensors.iter().enumerate() {
            let mut sink = Sink { out, path, count: 0 };
            values(i, &mut sink)?;
            let expected = shape.iter().product();
            if sink.count != expected {
                return Err(WeightsError::Count {
                    name: name.clone(),
                    expected,
                    found: sink.count,
                }
                .into());
            }
        }
        Ok(())
    })
}

fn header(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    notes: &[(&str, &str)],
) -> Result<String, WeightsError> {
    #[derive(Serialize)]
    struct Out<'a> {
        dtype: &'a str,
        shape: &'a [usize],
        data_offsets: [u64; 2],
    }
    let wrong = |what: &str| WeightsError::Header { path: path.into(), what: what.into() };
    let mut map = Map::new();
    let config = configuration(path).map(|c| Value::Object(c).to_string());
    let own = [("format", "pt")].into_iter().chain(config.as_deref().map(|c| (NOTE, c)));
    let notes: BTreeMap<_, _> = notes.iter().copied().chain(own).collect();
    map.insert("__metadata__".into(), serde_json::json!(notes));
    let mut at = 0_u64;
    for (name, shape) in tensors {
        let bytes = shape.iter().try_fold(4_u64, |n, &d| n.checked_mul(d as u64));
        let end = bytes
            .and_then(|b| at.checked_add(b))
            .ok_or_else(|| wrong("the tensors have too many bytes to count"))?;
        let out = serde_json::to_value(Out { dtype: "F32", shape, data_offsets: [at, end] });
        if map.insert(name.clone(), out.map_err(|e| wrong(&e.to_string()))?).is_some() {
            return Err(wrong(&format!("tensor {name} would be written twice")));
        }
        at = end;
    }
    let mut header = Value::Object(map).to_string();
    // Data begins at a multiple of 8, so that readers may map it into memory.
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempDir;

    fn committed(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gpt2").join(name)
    }

    fn all(w: &Weights, name: &str) -> Vec<f32> {
        let mut out = vec![0.0; w.get(name).unwrap().len()];
        w.read(name, &mut out).unwrap();
        out
    }

    fn raw(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn hugging_face_models_of_every_kind() {
        for name in ["hf_tied", "hf_untied", "hf_f16", "hf_bf16", "hf_sharded"] {
            let dir = committed(name);
            let w = Weights::read_dir(&dir).unwrap();
            // The same files through the safetensors library.
            for file in &w.files {
                let bytes = std::fs::read(file).unwrap();
                let st = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                for (full, view) in st.tensors() {
                    let ours = all(&w, plain_name(&full));
                    let theirs: Vec<f32> = match view.dtype() {
                        safetensors::Dtype::F32 => view
                            .data()
                            .as_chunks::<4>()
                            .0
                            .iter()
                            .map(|b| f32::from_le_bytes(*b))
                            .collect(),
                        safetensors::Dtype::F16 => view
                            .data()
                            .as_chunks::<2>()
                            .0
                            .iter()
                            .map(|b| half::f16::from_le_bytes(*b).to_f32())
                            .collect(),
                        safetensors::Dtype::BF16 => view
                            .data()
                            .as_chunks::<2>()
                            .0
                            .iter()
                            .map(|b| half::bf16::from_le_bytes(*b).to_f32())
                            .collect(),
                        other => panic!("{other:?}"),
                    };
                    assert_eq!(ours, theirs, "{full}");
                }
            }
        }
    }

    #[test]
    fn what_is_written_is_read_back_by_both() {
        let dir = TempDir::new();
        let path = dir.path().join(FILE);
        let tensors = vec![
            ("wte.weight".to_string(), vec![100, 97]),
            ("ln_f.bias".into(), vec![3]),
            ("head".into(), vec![1, 2]),
        ];
        let value = |i: usize, j: usize| (i * 100_000 + j) as f32 * 0.5;
        write(&path, &tensors, |i, sink| {
            let n = tensors[i].1.iter().product::<usize>();
            for start in (0..n).step_by(1000) {
                sink.put(&(start..n.min(start + 1000)).map(|j| value(i, j)).collect::<Vec<_>>())?;
            }
            Ok::<(), WeightsError>(())
        })
        .unwrap();
        let w = Weights::read_dir(dir.path()).unwrap();
        w.check(&tensors).unwrap();
        for (i, (name, shape)) in tensors.iter().enumerate() {
            let n = shape.iter().product();
            assert_eq!(all(&w, name), (0..n).map(|j| value(i, j)).collect::<Vec<_>>());
        }
        let bytes = std::fs::read(&path).unwrap();
        let (n, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(n % 8, 0);
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        assert_eq!(metadata.info("ln_f.bias").unwrap().shape, [3]);
        let noted = dir.path().join("noted");
        write_noted(&noted, &[], &[("base", "x")], |_, _| Ok::<(), WeightsError>(())).unwrap();
        assert_eq!(
            notes(&noted).unwrap(),
            [("base", "x"), ("format", "pt")].map(|(k, v)| (k.into(), v.into())).into()
        );
        // Too few values: an error, and the old file stays.
        let failed = write(&path, &tensors, |_, sink| sink.put(&[1.0]));
        assert!(matches!(failed, Err(WeightsError::Count { expected: 9700, found: 1, .. })));
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        assert!(matches!(w.read("wte.weight", &mut [0.0; 3]), Err(WeightsError::Count { .. })));
        assert!(matches!(w.read("nothing", &mut [0.0; 3]), Err(WeightsError::Unknown(_))));
    }

    #[test]
    fn mismatches_are_named_together() {
        let dir = committed("hf_untied");
        let there = Weights::read_dir(&dir).unwrap();
        let mut tensors: Vec<_> =
            there.tensors().map(|(n, t)| (n.to_string(), t.shape.clone())).collect();
        tensors.retain(|(n, _)| n != "ln_f.bias" && n != "h.1.ln_1.weight");
        tensors.iter_mut().filter(|t| t.0 == "wte.weight").for_each(|t| t.1 = vec![62, 24]);
        tensors.push(("h.9.ln_1.weight".into(), vec![24]));
        let error = Weights::read_dir(&dir).unwrap().check(&tensors).unwrap_err().to_string();
        for part in [
            "missing: h.9.ln_1.weight",
            "unexpected: h.1.ln_1.weight, ln_f.bias",
            "wte.weight has shape [61, 24], expected [62, 24]",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn hostile_headers() {
        let dir = TempDir::new();
        let one = |r: &str| format!(r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{r}}}}}"#);
        let two = |r: &str, s: &str| {
            let tensor = r#""dtype":"F32","shape":[2],"data_offsets""#;
            format!(r#"{{"a":{{{tensor}:{r}}},"b":{{{tensor}:{s}}}}}"#)
        };
        let mut claims = raw("{}", 0);
        claims[..8].copy_from_slice(&(1_u64 << 62).to_le_bytes());
        let mut cut = raw(&one("[0,8]"), 8);
        cut.truncate(30);
        for (bytes, message) in [
            (Vec::new(), "0 bytes, expected at least 8"),
            (vec![1; 7], "7 bytes"),
            (claims, "claims 4611686018427387904 bytes, expected at most 2"),
            (cut, "claims"),
            (raw("", 0), "the header"),
            (raw("[]", 0), "the header"),
            (raw("\u{fffd}{}", 0), "the header"),
            (raw(&"[".repeat(50_000), 0), "the header"),
            (raw(&one("[0,8]"), 4), "lies at bytes 0 to 8 of the data, which has 4"),
            (raw(&one("[0,8]"), 12), "something is appended"),
            (raw(&one("[8,0]"), 8), "lies at bytes 8 to 0"),
            (raw(&one("[0,18446744073709551615]"), 8), "lies at bytes"),
            (raw(&one("[-1,8]"), 8), "the header"),
            (raw(&one("[0]"), 8), "the header"),
            (raw(&one("[0,4]"), 4), "has 8 bytes, found 4"),
            (raw(&one("[4,12]"), 12), "leaves a hole"),
            (
                raw(&two("[0,8]", "[4,12]"), 12),
                "tensor b begins at byte 4 of the data, expected 8: it overlaps",
            ),
            (raw(&two("[0,8]", "[0,8]"), 8), "overlaps"),
            (raw(&two("[0,8]", "[8,16]").replace("\"b\"", "\"a\""), 16), "the name a comes twice"),
            (
                raw(&two("[0,8]", "[8,16]").replace("\"b\"", "\"transformer.a\""), 16),
                "tensor a comes twice",
            ),
            (
                raw(&one("[0,8]").replace("[2]", "[4294967296,4294967296,4]"), 8),
                "more bytes than can be counted",
            ),
            (raw(&one("[0,8]").replace("F32", "F31"), 8), "unknown dtype F31"),
        ] {
            dir.file(FILE, &bytes);
            let error = Weights::read_dir(dir.path()).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains(FILE), "{message}: {error}");
        }
        // No tensors, or empty ones, are no mistake of the file.
        dir.file(
            FILE,
            &raw(
                r#"{"__metadata__":{"format":"pt"},
                    "a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#,
                0,
            ),
        );
        let w = Weights::read_dir(dir.path()).unwrap();
        assert!(w.get("a").unwrap().is_empty());
        assert!(w.check(&[]).unwrap_err().to_string().contains("unexpected: a"));
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        assert!(matches!(Weights::read_dir(dir.path()), Err(WeightsError::Absent(_))));
    }

    #[test]
    fn values_that_are_not_weights() {
        let dir = TempDir::new();
        let mut bytes = raw(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4);
        bytes.extend(f32::NAN.to_le_bytes());
        dir.file(FILE, &bytes);
        let w = Weights::read_dir(dir.path()).unwrap();
        assert!(matches!(w.read("a", &mut [0.0; 2]), Err(WeightsError::NotFinite { at: 1, .. })));
        dir.file(FILE, &raw(r#"{"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}"#, 8));
        let w = Weights::read_dir(dir.path()).unwrap();
        assert!(w.check(&[("a".into(), vec![2])]).unwrap_err().to_string().contains("dtype I32"));
        assert!(matches!(w.read("a", &mut [0.0; 2]), Err(WeightsError::Dtype { .. })));
        // Masks of old files are passed over, whatever their type.
        dir.file(
            FILE,
            &raw(
                r#"{"transformer.h.0.attn.bias":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
                1,
            ),
        );
        assert_eq!(Weights::read_dir(dir.path()).unwrap().tensors().count(), 0);
    }

    #[test]
    fn hostile_indices() {
        let path = Path::new(INDEX);
        for file in ["../a", "/etc/passwd", "a/b", "", "..", "a\\\\b", "C:a"] {
            let text = format!(r#"{{"weight_map":{{"a":"{file}"}}}}"#);
            let error = read_index(path, text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("is not the name of a file"), "{error}");
        }
        for text in
            ["", "{}", r#"{"weight_map":{}}"#, r#"{"weight_map":[1]}"#, r#"{"weight_map":{"a":1}}"#]
        {
            assert!(read_index(path, text.as_bytes()).is_err());
        }
        let dir = TempDir::new();
        dir.file("s", &raw(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8));
        dir.file(INDEX, br#"{"weight_map":{"transformer.a":"s"}}"#);
        assert_eq!(all(&Weights::read_dir(dir.path()).unwrap(), "a"), [0.0; 2]);
        dir.file(INDEX, br#"{"weight_map":{"a":"s","transformer.b":"s"}}"#);
        assert!(
            Weights::read_dir(dir.path())
                .unwrap_err()
                .to_string()
                .contains("transformer.b is not in s")
        );
        dir.file(INDEX, br#"{"weight_map":{"a":"s","b":"t"}}"#);
        assert!(matches!(Weights::read_dir(dir.path()), Err(WeightsError::File(_))));
    }
}
