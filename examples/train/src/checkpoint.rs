//! Checkpoints: everything that the continuation of a run needs, in one file that is whole or not
//! there.
//!
//! ```text
//! "BDIACKPT"  version u32  header length u32  header (JSON)  tensors (f32 or u32, little endian)
//! xxh3-64 of all before
//! ```
//! Tensors are what the program gives: the parameters and then the optimizer's state, in the order
//! of the model's tensors; of moments in few bits the words.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use bdia_core::backend::Backend;
use bdia_models::files::{FileError, disk, write_atomic};
use bdia_models::named::Saved;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

const MAGIC: &[u8; 8] = b"BDIACKPT";
const VERSION: u32 = 2;
const HEADER_LIMIT: u32 = 1 << 26;
/// Values that are copied at a time.
const PIECE: usize = 1 << 14;

/// What a checkpoint says about its run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Steps that are done.
    pub step: u32,
    /// Samples processed together inside a block: part of what is computed, so it is used again.
    pub chunk: usize,
    /// Rows of logits at a time, where the head has such a choice.
    pub head_rows: usize,
    /// Tokens at a time in what treats each token alone ([`bdia_core::plan::Choice`]).
    #[serde(default)]
    pub token_chunk: Option<usize>,
    /// The program and the processor that computed.
    pub identity: String,
    /// Ranks that computed; their chunks are those of a part of the batch.
    #[serde(default = "one")]
    pub ranks: usize,
    /// Number of values of each tensor that follows.
    pub lens: Vec<usize>,
    /// Digest of the data.
    pub data: u64,
    /// Validation so far: step and loss (or accuracy, where the program measures that).
    pub validation: Vec<(u32, f64)>,
    /// Steps that the run was to have.
    pub steps: u32,
    /// The settings of the run on which numbers depend, but for its length.
    pub settings: Map<String, Value>,
    /// The `config.json` of the run.
    pub config: Map<String, Value>,
    /// xxh3-64 of the lines of `metrics.jsonl` up to this step, without what depends on the clock.
    pub metrics: u64,
    /// The line of the last step, whose validation was cut short and is made when the run goes on.
    #[serde(default)]
    pub waiting: Option<Value>,
}

const fn one() -> usize {
    1
}

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The content is not what was written.
    #[error("{}: {what}; remove it and resume from the checkpoint before it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Another version of the program wrote it.
    #[error(
        "{}: a checkpoint of format {found}, this program reads format {VERSION}; go on with the \
         version of the program that wrote it{}",
        path.display(),
        if *found == 1 { " (0.1.0)" } else { "" }
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It belongs to another model.
    #[error("{}: the checkpoint is of another model ({what})", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// There is none.
    #[error(
        "{}: no usable checkpoint; put a good step-*.ckpt there, or start a new run{tried}",
        dir.display()
    )]
    None {
        /// The directory.
        dir: PathBuf,
        /// What was found to be wrong with those that are there.
        tried: String,
    },
    /// The training has gone astray; the earlier checkpoints stay.
    #[error(
        "a parameter or an optimizer moment is not finite after step {step}: nothing is saved; \
         start again with a lower \
         --lr, or with --clip"
    )]
    NotFinite {
        /// Steps that are done.
        step: u32,
    },
    /// The backend refused.
    #[error(transparent)]
    Core(#[from] bdia_core::Error),
}

fn file_name(step: u32) -> String {
    format!("step-{step:08}.ckpt")
}

/// The checkpoints of a directory, newest first.
pub fn list(dir: &Path) -> Vec<(u32, PathBuf)> {
    let mut all: Vec<_> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            let name = e.file_name();
            let step = name.to_str()?.strip_prefix("step-")?.strip_suffix(".ckpt")?.parse().ok()?;
            Some((step, e.path()))
        })
        .collect();
    all.sort_by_key(|(step, _)| core::cmp::Reverse(*step));
    all
}

/// Writes a checkpoint atomically, then removes all but the last `keep`.
///
/// # Errors
/// [`CheckpointError`]; the earlier checkpoints are then untouched.
pub fn save<B: Backend<Real = f32>>(
    dir: &Path,
    be: &B,
    tensors: &[Saved],
    mut header: Header,
    keep: usize,
) -> Result<PathBuf, CheckpointError> {
    header.lens = tensors.iter().map(|t| t.len()).collect();
    let path = dir.join(file_name(header.step));
    let json = serde_json::to_vec(&header)
        .map_err(|e| damaged(&path, format!("the header cannot be written: {e}")))?;
    write_atomic::<CheckpointError>(&path, |out| {
        let io = |e| FileError::io(&path, "write it", e);
        let mut hash = Xxh3::new();
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            out.write_all(bytes).map_err(io)
        };
        put(MAGIC)?;
        put(&VERSION.to_le_bytes())?;
        put(&(json.len() as u32).to_le_bytes())?;
        put(&json)?;
        let (mut bits, mut bytes) = (vec![0; PIECE], Vec::with_capacity(4 * PIECE));
        for t in tensors {
            for at in (0..t.len()).step_by(PIECE) {
                let bits = &mut bits[..PIECE.min(t.len() - at)];
                t.get(be, at, bits)?;
                if t.is_real() && bits.iter().any(|b| !f32::from_bits(*b).is_finite()) {
                    return Err(CheckpointError::NotFinite { step: header.step });
                }
                bytes.clear();
                bytes.extend(bits.iter().flat_map(|b| b.to_le_bytes()));
                put(&bytes)?;
            }
        }
        let digest = hash.digest();
        out.write_all(&digest.to_le_bytes()).map_err(io)?;
        Ok(())
    })?;
    // Newer ones than this were found to be damaged: they would only push good ones out. One that
    // cannot be removed only takes room.
    let all = list(dir);
    let newer = all.iter().take_while(|(step, _)| *step > header.step).count();
    for (_, old) in all.iter().take(newer).chain(all.iter().skip(newer + keep.max(1))) {
        let _ = disk::remove_file(old);
    }
    Ok(path)
}

/// Bytes of a checkpoint of these tensors, its header apart.
pub fn bytes(tensors: &[Saved]) -> u64 {
    tensors.iter().map(|t| 4 * t.len() as u64).sum()
}

/// Digest of a whole file.
///
/// # Errors
/// A file that cannot be read.
pub fn digest_of(path: &Path) -> Result<u64, FileError> {
    let mut file = File::open(path).map_err(|e| FileError::io(path, "open it", e))?;
    let (mut hash, mut piece) = (Xxh3::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece).map_err(|e| FileError::io(path, "read it", e))? {
            0 => return Ok(hash.digest()),
            n => hash.update(&piece[..n]),
        }
    }
}

fn damaged(path: &Path, what: impl Into<String>) -> CheckpointError {
    CheckpointError::Damaged { path: path.to_path_buf(), what: what.into() }
}

/// A reader that hashes what it reads.
struct Hashing<R> {
    inner: R,
    hash: Xxh3,
}

impl<R: Read> Hashing<R> {
    fn take(&mut self, path: &Path, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        self.inner.read_exact(bytes).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => damaged(path, "the file ends too early"),
            _ => FileError::io(path, "read it", e).into(),
        })?;
        self.hash.update(bytes);
        Ok(())
    }
}

fn open(path: &Path) -> Result<(Hashing<BufReader<File>>, Header), CheckpointError> {
    let file = File::open(path).map_err(|e| FileError::io(path, "open it", e))?;
    let size = file.metadata().map_err(|e| FileError::io(path, "read its size", e))?.len();
    let mut r = Hashing { inner: BufReader::new(file), hash: Xxh3::new() };
    let mut start = [0; 16];
    r.take(path, &mut start)?;
    if &start[..8] != MAGIC {
        return Err(damaged(path, "it does not begin with BDIACKPT"));
    }
    let word =
        |at: usize| u32::from_le_bytes([start[at], start[at + 1], start[at + 2], start[at + 3]]);
    if word(8) != VERSION {
        return Err(CheckpointError::Version { path: path.to_path_buf(), found: word(8) });
    }
    if word(12) > HEADER_LIMIT {
        return Err(damaged(
            path,
            format!("its header claims {} bytes, expected at most {HEADER_LIMIT}", word(12)),
        ));
    }
    let mut json = vec![0; word(12) as usize];
    r.take(path, &mut json)?;
    let header: Header =
        serde_json::from_slice(&json).map_err(|e| damaged(path, format!("its header: {e}")))?;
    let values = header.lens.iter().try_fold(0_u64, |sum, &n| sum.checked_add(n as u64));
    let expected =
        values.and_then(|v| v.checked_mul(4)).and_then(|b| b.checked_add(24 + u64::from(word(12))));
    if expected != Some(size) {
        return Err(damaged(path, format!("{size} bytes do not fit its header")));
    }
    Ok((r, header))
}

/// Reads the header and checks every byte.
///
/// # Errors
/// [`CheckpointError`]
pub fn check(path: &Path) -> Result<Header, CheckpointError> {
    let (mut r, header) = open(path)?;
    let mut left = header.lens.iter().sum::<usize>() * 4;
    let mut bytes = vec![0; 4 * PIECE];
    while left > 0 {
        let n = left.min(bytes.len());
        r.take(path, &mut bytes[..n])?;
        left -= n;
    }
    let digest = r.hash.digest();
    let mut stored = [0; 8];
    r.take(path, &mut stored)?;
    if u64::from_le_bytes(stored) != digest {
        return Err(damaged(path, "its checksum differs"));
    }
    Ok(header)
}

/// The newest checkpoint of a directory that is good, with warnings about those that are not;
/// nothing where there is none at all.
///
/// # Errors
/// [`CheckpointError::None`] where there are some, and none is good.
pub fn newest(dir: &Path) -> Result<Option<(PathBuf, Header, Vec<String>)>, CheckpointError> {
    let (mut warnings, all) = (Vec::new(), list(dir));
    if all.is_empty() {
        return Ok(None);
    }
    for (_, path) in all {
        match check(&path) {
            Ok(header) => return Ok(Some((path, header, warnings))),
            Err(e) => warnings.push(e.to_string()),
        }
    }
    let tried = warnings.iter().map(|w| format!("\n  {w}")).collect();
    Err(CheckpointError::None { dir: dir.to_path_buf(), tried })
}

/// Loads the tensors of a checkpoint that [`check`] found good.
///
/// # Errors
/// [`CheckpointError`]
pub fn load<B: Backend<Real = f32>>(
    path: &Path,
    be: &mut B,
    tensors: &[Saved],
) -> Result<Header, CheckpointError> {
    let (mut r, header) = open(path)?;
    let lens: Vec<_> = tensors.iter().map(|t| t.len()).collect();
    if lens != header.lens {
        let what =
            format!("{} tensors, expected {}, or other sizes", header.lens.len(), lens.len());
        return Err(CheckpointError::Other { path: path.to_path_buf(), what });
    }
    let mut bytes = vec![0; 4 * PIECE];
    let mut bits = Vec::with_capacity(PIECE);
    for t in tensors {
        for at in (0..t.len()).step_by(PIECE) {
            let n = PIECE.min(t.len() - at);
            r.take(path, &mut bytes[..4 * n])?;
            bits.clear();
            bits.extend(
                bytes[..4 * n]
                    .chunks_exact(4)
                    .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            );
            t.put(be, at, &bits)?;
        }
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Metrics;
    use crate::trainer::Metric;
    use bdia_core::backend::Storage;
    use bdia_core::{Category, Layout, Reals, Reference};
    use bdia_models::files::faults::{Fault, arm, disarm};
    use bdia_models::files::testing::TempDir;

    fn header(step: u32, metrics: u64) -> Header {
        Header {
            step,
            chunk: 1,
            head_rows: 1,
            token_chunk: None,
            identity: "a test".into(),
            ranks: 1,
            lens: Vec::new(),
            data: 0,
            validation: Vec::new(),
            steps: step,
            settings: Map::new(),
            config: Map::new(),
            metrics,
            waiting: None,
        }
    }

    fn metric(step: u64) -> Metric {
        serde_json::from_value(serde_json::json!({
            "step": step, "loss": 0.5, "lr": 1.0, "grad_norm": 1.0, "items_per_s": step,
        }))
        .unwrap()
    }

    /// Steps with their metrics and checkpoints, as the trainer makes them; the last one that was
    /// said to be saved.
    fn steps(dir: &Path, be: &mut Reference<'_, f32>, t: Reals, first: u32) -> (u32, bool) {
        let mut saved = first;
        let mut all = || -> Result<(), CheckpointError> {
            let log = dir.join("metrics.jsonl");
            let (mut metrics, _) = Metrics::<Metric>::resume(&log, first.into())?;
            for step in first + 1..=5 {
                be.write_reals(t, &[step as f32; 3])?;
                metrics.push(&metric(step.into()))?;
                metrics.sync()?;
                save(dir, be, &[Saved::Reals(t)], header(step, metrics.digest()), 2)?;
                saved = step;
            }
            Ok(())
        };
        let done = all().is_ok();
        (saved, done)
    }

    #[test]
    fn whatever_the_disk_does_a_good_checkpoint_stays() {
        let mut layout = Layout::new(4);
        let t = layout.reals(Category::Parameters, 3);
        let (mut ints, mut reals, mut words) = ([0; 0], [0.0; 16], [0; 0]);
        let mut be = Reference::new(&layout, &mut ints, &mut reals, &mut words).unwrap();
        for fault in [Fault::Refused, Fault::Short, Fault::Stopped, Fault::Lost] {
            for n in 0.. {
                let dir = TempDir::new();
                arm(fault, n);
                let (saved, done) = steps(dir.path(), &mut be, t, 0);
                let happened = disarm();
                // What was said to be saved is there; only a rename that was lost could take one.
                let found = newest(dir.path()).unwrap();
                let step = found.as_ref().map_or(0, |f| f.1.step);
                let lost = u32::from(fault == Fault::Lost && happened);
                assert!(step + lost >= saved, "{fault:?} {n}: {step} of {saved}");
                if let Some((path, header, warnings)) = found {
                    assert_eq!(warnings, Vec::<String>::new());
                    load(&path, &mut be, &[Saved::Reals(t)]).unwrap();
                    let mut values = [0.0; 3];
                    be.read_reals(t, &mut values).unwrap();
                    assert_eq!(values, [step as f32; 3]);
                    let log = dir.path().join("metrics.jsonl");
                    let digest = Metrics::<Metric>::digest_of(&log, step.into()).unwrap();
                    assert_eq!(digest, header.metrics, "{fault:?} {n}");
                }
                // It goes on from there to the end.
                assert_eq!(steps(dir.path(), &mut be, t, step), (5, true), "{fault:?} {n}");
                let names: Vec<_> = list(dir.path()).into_iter().map(|c| c.0).collect();
                // One that could not be removed only takes room.
                assert_eq!(names[..2], [5, 4], "{fault:?} {n}");
                if !happened {
                    assert!(done && n > 30);
                    break;
                }
            }
        }
    }
}
