//! Values in few bits: those that can be written, and files whose blocks are used where they lie.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use bdia_core::backend::Backend;
use bdia_core::{Packed, Packing};
use half::{bf16, f16};
use memmap2::Mmap;

use crate::files::FileError;
use crate::weights::WeightsError;

/// Packings that can be written.
pub const WRITTEN: [Packing; 5] =
    [Packing::F32, Packing::F16, Packing::Bf16, Packing::Q8_0, Packing::Q4_0];

/// The largest magnitude that a packing holds, where it can be written.
pub fn largest(packing: Packing) -> f32 {
    match packing {
        Packing::F16 => f16::MAX.to_f32(),
        Packing::Bf16 => bf16::MAX.to_f32(),
        Packing::Q8_0 => 127.0 * f16::MAX.to_f32(),
        Packing::Q4_0 => 8.0 * f16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// Appends a block with these values, rounded as ggml's reference implementation does it, of a
/// packing that can be written; false where one of them has no finite counterpart.
pub fn pack(packing: Packing, values: &[f32], out: &mut Vec<u8>) -> bool {
    if !values.iter().all(|x| x.is_finite()) {
        return false;
    }
    // Where 1/d overflows, d itself is 0 in 16 bits.
    let inverse = |d: f32| Some(1.0 / d).filter(|x| x.is_finite()).unwrap_or(0.0);
    match packing {
        Packing::F16 => values.iter().all(|x| {
            let half = f16::from_f32(*x);
            out.extend(half.to_le_bytes());
            half.is_finite()
        }),
        Packing::Bf16 => values.iter().all(|x| {
            let half = bf16::from_f32(*x);
            out.extend(half.to_le_bytes());
            half.is_finite()
        }),
        Packing::Q8_0 => {
            let d = values.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0;
            let (inverse, scale) = (inverse(d), f16::from_f32(d));
            out.extend(scale.to_le_bytes());
            out.extend(values.iter().map(|x| (x * inverse).round() as i8 as u8));
            scale.is_finite()
        }
        Packing::Q4_0 => {
            // The largest magnitude becomes −8, the only number without an opposite.
            let most = values.iter().fold(0.0_f32, |m, x| if x.abs() > m.abs() { *x } else { m });
            let d = most / -8.0;
            let (inverse, scale) = (inverse(d), f16::from_f32(d));
            out.extend(scale.to_le_bytes());
            let four = |x: f32| ((x * inverse + 8.5) as i8 as u8).min(15);
            let (low, high) = values.split_at(values.len() / 2);
            out.extend(low.iter().zip(high).map(|(low, high)| four(*low) | four(*high) << 4));
            scale.is_finite()
        }
        _ => {
            out.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            packing == Packing::F32
        }
    }
}

/// Where a file has a tensor in a packing that backends know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// The packing.
    pub packing: Packing,
    /// [`Packed::neighbours`]
    pub neighbours: usize,
    /// The file.
    pub path: PathBuf,
    /// The first byte.
    pub offset: u64,
}

impl Extent {
    /// Whether a matrix of a network is stored just so.
    pub fn is_stored_as(&self, x: &Packed) -> bool {
        (self.packing, self.neighbours) == (x.packing, x.neighbours)
    }

    /// Gives the matrix these bytes: where the file has them if it is mapped, else a copy.
    ///
    /// # Errors
    /// A file that cannot be read; what the backend reports.
    pub fn store<B: Backend>(&self, be: &mut B, x: &Packed) -> Result<(), WeightsError> {
        let bytes = x.packing.row_bytes(x.cols)? * x.rows;
        if x.words.is_mapped() {
            let file = mapped(&self.path)?;
            let from = usize::try_from(self.offset).ok();
            let range = from.and_then(|from| Some(from..from.checked_add(bytes)?));
            let found = range.and_then(|range| file.get(range)).ok_or_else(|| {
                FileError::io(
                    &self.path,
                    "read its weights",
                    std::io::ErrorKind::UnexpectedEof.into(),
                )
            })?;
            return Ok(be.attach(x.words, found)?);
        }
        let failed = |e| FileError::io(&self.path, "read its weights", e);
        let mut file = File::open(&self.path).map_err(failed)?;
        file.seek(SeekFrom::Start(self.offset)).map_err(failed)?;
        let (mut piece, mut words) = (vec![0; 1 << 16], Vec::new());
        for at in (0..bytes).step_by(piece.len()) {
            let piece = &mut piece[..(1 << 16).min(bytes - at)];
            file.read_exact(piece).map_err(failed)?;
            to_words(piece, &mut words);
            be.write_words(x.words.sub(at / 4, words.len()), &words)?;
        }
        Ok(())
    }
}

/// Bytes as words, the last one filled up with zeros.
pub(crate) fn to_words(bytes: &[u8], words: &mut Vec<u32>) {
    words.clear();
    words.extend(bytes.chunks(4).map(|four| {
        let mut word = [0; 4];
        word[..four.len()].copy_from_slice(four);
        u32::from_le_bytes(word)
    }));
}

/// A file's contents, in memory that is backed by it. A file is mapped once, and stays so until the
/// program ends, so that any number of networks can use it.
///
/// # Errors
/// A file that cannot be opened or mapped.
fn mapped(path: &Path) -> Result<&'static [u8], FileError> {
    type Files = BTreeMap<(PathBuf, u64, Option<SystemTime>), &'static [u8]>;
    static FILES: Mutex<Files> = Mutex::new(BTreeMap::new());
    let failed = |e| FileError::io(path, "map it into memory", e);
    let file = File::open(path).map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    let place = path.canonicalize().map_err(failed)?;
    let key = (place, about.len(), about.modified().ok());
    let mut files = FILES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(found) = files.get(&key) {
        return Ok(found);
    }
    // SAFETY: the mapping is read only. As with every program that maps its model, whoever changes
    // or truncates the file while it is in use changes what is computed, or ends the program.
    let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
    let found: &'static [u8] = Box::leak(Box::new(map));
    files.insert(key, found);
    Ok(found)
}
