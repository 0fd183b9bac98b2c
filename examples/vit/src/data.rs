//! Images with labels: the digits that are built in, and files of the user.
//!
//! | found in the directory | read as |
//! |---|---|
//! | `data_batch_*.bin`, `test_batch.bin` | CIFAR-10, records of 1 + 3072 bytes |
//! | `train.bin`, `test.bin` | CIFAR-100, records of 2 + 3072 bytes, fine labels |
//! | `train-images-idx3-ubyte`, …, plain or `.gz` | MNIST and relatives |
//! | folders of folders | a class a folder, PNG and JPEG; `train` and `test` or `val` above |

use std::fs::File;
use std::io::{Read, Take};
use std::path::{Path, PathBuf};

use bdia_core::rng::{Draw, Stream};
use bdia_models::files::{FileError, read_limited};
use bdia_train::Failure;
use xxhash_rust::xxh3::Xxh3;

/// Images of one size, as bytes `[n, C, height, width]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Images {
    /// `[C, height, width]`.
    pub shape: [usize; 3],
    /// The pixels.
    pub pixels: Vec<u8>,
    /// The labels.
    pub labels: Vec<u16>,
}

impl Images {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Bytes of one image.
    fn size(&self) -> usize {
        self.shape.iter().product()
    }

    /// The pixels of one image.
    pub fn image(&self, i: usize) -> &[u8] {
        &self.pixels[i * self.size()..(i + 1) * self.size()]
    }

    fn push(&mut self, pixels: &[u8], label: u16) {
        self.pixels.extend_from_slice(pixels);
        self.labels.push(label);
    }

    /// The images of these indices.
    fn pick(&self, indices: &[usize]) -> Self {
        let mut out = Self { shape: self.shape, ..Self::default() };
        for &i in indices {
            out.push(self.image(i), self.labels[i]);
        }
        out
    }

    /// The first `n` images of an order in which classes take turns, so that a part has as much of
    /// each.
    #[must_use]
    pub fn subset(&self, n: usize) -> Self {
        let mut turn = vec![0_usize; 1 << 16];
        let mut order: Vec<_> = (0..self.len())
            .map(|i| {
                let label = self.labels[i];
                turn[usize::from(label)] += 1;
                (turn[usize::from(label)], label, i)
            })
            .collect();
        order.sort_unstable();
        self.pick(&order.iter().take(n).map(|o| o.2).collect::<Vec<_>>())
    }

    /// Splits a fifth of each class off, by a fixed seed: (the rest, the fifth).
    fn split(&self) -> (Self, Self) {
        let s = Stream::new(0, 0, 0, 0, 0, Draw::Data);
        let mut order: Vec<_> =
            (0..self.len()).map(|i| (self.labels[i], s.word(i as u32), i)).collect();
        order.sort_unstable();
        let (mut rest, mut fifth) = (Vec::new(), Vec::new());
        for class in order.chunk_by(|a, b| a.0 == b.0) {
            let held = class.len() / 5;
            fifth.extend(class[..held].iter().map(|o| o.2));
            rest.extend(class[held..].iter().map(|o| o.2));
        }
        rest.sort_unstable();
        fifth.sort_unstable();
        (self.pick(&rest), self.pick(&fifth))
    }

    /// Mean and standard deviation of each channel; a channel without variation has deviation 1.
    pub fn statistics(&self) -> (Vec<f64>, Vec<f64>) {
        let [c, h, w] = self.shape;
        let per = (h * w * self.len()).max(1) as f64;
        (0..c)
            .map(|channel| {
                let (mut sum, mut squares) = (0_u64, 0_u64);
                for i in 0..self.len() {
                    for &p in &self.image(i)[channel * h * w..(channel + 1) * h * w] {
                        sum += u64::from(p);
                        squares += u64::from(p) * u64::from(p);
                    }
                }
                let mean = sum as f64 / per;
                let std = (squares as f64 / per - mean * mean).max(0.0).sqrt();
                (mean, if std > 0.0 { std } else { 1.0 })
            })
            .unzip()
    }
}

/// Training and held-out images.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Where they come from.
    pub name: String,
    /// For training.
    pub train: Images,
    /// Held out.
    pub test: Images,
    /// Names of the classes.
    pub classes: Vec<String>,
}

/// Why data cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file has another size than its records.
    #[error(
        "{}: {found} bytes, expected a multiple of {record} (whole records); the file is cut off \
         or of another kind",
        path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// Bytes of a record.
        record: usize,
    },
    /// A label that no class has.
    #[error("{}: record {record} has label {found}, expected 0 to {most}", path.display())]
    Label {
        /// The file.
        path: PathBuf,
        /// Index of the record.
        record: usize,
        /// The label.
        found: u32,
        /// The largest that is possible.
        most: u32,
    },
    /// The file is not what its name says.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Self::Program(Box::new(error))
    }
}

fn format(path: &Path, what: impl Into<String>) -> DataError {
    DataError::Format { path: path.into(), what: what.into() }
}

/// The largest file of records.
const LIMIT: u64 = 1 << 32;
/// The largest compressed image, and the largest picture in pixels on a side and in bytes.
const IMAGE_LIMIT: u64 = 1 << 26;
const IMAGE_SIDE: u32 = 1 << 14;
const IMAGE_BYTES: u64 = 1 << 28;
const MOST_CLASSES: usize = 65_000;

impl Dataset {
    /// The UCI digits (8×8, 1,797 of them), a fifth of each class held out.
    ///
    /// # Errors
    /// [`DataError::Format`] if the library has other data than it had.
    pub fn digits() -> Result<Self, DataError> {
        let all = smartcore::dataset::digits::load_dataset();
        let wrong = || {
            format(Path::new("smartcore's digits"), "not 1,797 images of 64 values from 0 to 16")
        };
        let mut images = Images { shape: [1, 8, 8], ..Images::default() };
        if all.data.len() != 64 * all.target.len() || all.target.len() != 1797 {
            return Err(wrong());
        }
        for (pixels, &label) in all.data.chunks_exact(64).zip(&all.target) {
            if !(0.0..10.0).contains(&label) || pixels.iter().any(|p| !(0.0..=16.0).contains(p)) {
                return Err(wrong());
            }
            images
                .push(&pixels.iter().map(|&p| (p * 15.0) as u8).collect::<Vec<_>>(), label as u16);
        }
        let (train, test) = images.split();
        Ok(Self {
            name: "the UCI digits".into(),
            train,
            test,
            classes: (0..10).map(|c| c.to_string()).collect(),
        })
    }

    /// Reads a directory, whatever of the kinds above it holds. Pictures are scaled to `side` rows
    /// and columns.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn open(dir: &Path, side: usize) -> Result<Self, DataError> {
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .map_err(|e| FileError::io(dir, "read the directory", e))?
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        names.sort();
        let has = |n: &str| names.iter().any(|name| name == n);
        let mut data = if has("test_batch.bin") {
            let batches =
                names.iter().filter(|n| n.starts_with("data_batch_") && n.ends_with(".bin"));
            let train = cifar(&batches.map(|n| dir.join(n)).collect::<Vec<_>>(), 1, 10)?;
            let test = cifar(&[dir.join("test_batch.bin")], 1, 10)?;
            Self {
                name: "CIFAR-10".into(),
                train,
                test,
                classes: class_names(&dir.join("batches.meta.txt"), 10),
            }
        } else if has("train.bin") && has("test.bin") {
            let train = cifar(&[dir.join("train.bin")], 2, 100)?;
            let test = cifar(&[dir.join("test.bin")], 2, 100)?;
            Self {
                name: "CIFAR-100".into(),
                train,
                test,
                classes: class_names(&dir.join("fine_label_names.txt"), 100),
            }
        } else if let Some(file) =
            names.iter().find(|n| n.starts_with("train-images") && n.contains("idx3"))
        {
            let gz = if file.ends_with(".gz") { ".gz" } else { "" };
            let part = |p: &str| {
                idx(
                    &dir.join(format!("{p}-images-idx3-ubyte{gz}")),
                    &dir.join(format!("{p}-labels-idx1-ubyte{gz}")),
                )
            };
            let (train, test) = (part("train")?, part("t10k")?);
            let most = train.labels.iter().chain(&test.labels).max().copied().unwrap_or(0);
            Self {
                name: "IDX".into(),
                train,
                test,
                classes: (0..=most).map(|c| c.to_string()).collect(),
            }
        } else {
            folders(dir, side)?
        };
        data.name = format!("{} ({})", dir.display(), data.name);
        for (part, images) in [("training", &data.train), ("held-out", &data.test)] {
            if images.is_empty() {
                return Err(format(dir, format!("there are no {part} images")));
            }
        }
        if data.train.shape != data.test.shape {
            let (a, b) = (data.train.shape, data.test.shape);
            return Err(format(
                dir,
                format!("training images are {a:?}, held-out ones {b:?}; expected one size"),
            ));
        }
        Ok(data)
    }

    /// Identifies the training data of a run.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        for images in [&self.train, &self.test] {
            hash.update(&images.pixels);
            images.labels.iter().for_each(|l| hash.update(&l.to_le_bytes()));
        }
        hash.digest()
    }
}

fn class_names(path: &Path, count: usize) -> Vec<String> {
    let text = read_limited(path, 1 << 16)
        .ok()
        .and_then(|b| String::from_utf8(b).ok())
        .unwrap_or_default();
    let names: Vec<String> =
        text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
    if names.len() == count { names } else { (0..count).map(|c| c.to_string()).collect() }
}

fn cifar(paths: &[PathBuf], labels: usize, classes: u16) -> Result<Images, DataError> {
    let mut images = Images { shape: [3, 32, 32], ..Images::default() };
    for path in paths {
        cifar_records(path, &read_limited(path, LIMIT)?, labels, classes, &mut images)?;
    }
    Ok(images)
}

/// Appends the records of one of CIFAR's binary files: `labels` bytes, of which the last counts,
/// and 3·32·32 pixels, channel by channel. The path is for errors.
///
/// # Errors
/// [`DataError::Size`], [`DataError::Label`]
pub fn cifar_records(
    path: &Path,
    bytes: &[u8],
    labels: usize,
    classes: u16,
    images: &mut Images,
) -> Result<(), DataError> {
    let record = labels + 3072;
    if bytes.is_empty() || !bytes.len().is_multiple_of(record) {
        return Err(DataError::Size { path: path.into(), found: bytes.len() as u64, record });
    }
    for (i, r) in bytes.chunks_exact(record).enumerate() {
        let label = u16::from(r[labels - 1]);
        if label >= classes {
            let (found, most) = (u32::from(label), u32::from(classes) - 1);
            return Err(DataError::Label { path: path.into(), record: i, found, most });
        }
        images.push(&r[labels..], label);
    }
    Ok(())
}

/// Reads a file of IDX.
fn idx_file(path: &Path, magic: u32, dims: usize) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let file = File::open(path).map_err(|e| FileError::io(path, "open it", e))?;
    idx_values(path, file, magic, dims)
}

/// Sizes and values of an IDX file, unpacked where its name ends in `.gz`; its header says how long
/// the rest must be.
///
/// # Errors
/// [`DataError::Format`]
pub fn idx_values(
    path: &Path,
    file: impl Read,
    magic: u32,
    dims: usize,
) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let (mut plain, mut packed);
    let reader: &mut dyn Read = if path.extension().is_some_and(|e| e == "gz") {
        packed = flate2::read::GzDecoder::new(file);
        &mut packed
    } else {
        plain = file;
        &mut plain
    };
    let mut header = vec![0; 4 + 4 * dims];
    let cut = |e: std::io::Error| format(path, format!("it ends too early or is damaged: {e}"));
    reader.read_exact(&mut header).map_err(cut)?;
    let words: Vec<u32> =
        header.as_chunks::<4>().0.iter().map(|b| u32::from_be_bytes(*b)).collect();
    if words[0] != magic {
        return Err(format(
            path,
            format!(
                "it begins with {:#010x}, expected {magic:#010x} (unsigned bytes of IDX)",
                words[0]
            ),
        ));
    }
    let sizes: Vec<usize> = words[1..].iter().map(|&w| w as usize).collect();
    let len = sizes.iter().try_fold(1_u64, |n, &s| n.checked_mul(s as u64)).filter(|&n| n <= LIMIT);
    let Some(len) = len else {
        return Err(format(path, format!("it claims {sizes:?} values, more than {LIMIT}")));
    };
    // The claim is not trusted with memory: what is there is read, up to it and one more.
    let mut bytes = Vec::new();
    let mut rest: Take<_> = reader.take(len + 1);
    rest.read_to_end(&mut bytes).map_err(cut)?;
    if bytes.len() as u64 != len {
        let more = if bytes.len() as u64 > len { "more" } else { "only" };
        return Err(format(
            path,
            format!("its header promises {len} values, found {more}: {}", bytes.len()),
        ));
    }
    Ok((sizes, bytes))
}

fn idx(images: &Path, labels: &Path) -> Result<Images, DataError> {
    let (sizes, pixels) = idx_file(images, 0x0803, 3)?;
    let (count, label) = idx_file(labels, 0x0801, 1)?;
    if count[0] != sizes[0] {
        return Err(format(labels, format!("{} labels for {} images", count[0], sizes[0])));
    }
    if sizes[1] == 0 || sizes[2] == 0 {
        return Err(format(images, format!("images of {} × {} pixels", sizes[1], sizes[2])));
    }
    Ok(Images {
        shape: [1, sizes[1], sizes[2]],
        pixels,
        labels: label.into_iter().map(u16::from).collect(),
    })
}

/// The entries of a directory in the order of their names.
fn entries(dir: &Path, folders: bool) -> Result<Vec<PathBuf>, DataError> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(|e| FileError::io(dir, "read the directory", e))?
        .flatten()
        .map(|e| e.path())
        .filter(|p| {
            p.is_dir() == folders
                && !p.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'))
        })
        .collect();
    all.sort();
    Ok(all)
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn folders(dir: &Path, side: usize) -> Result<Dataset, DataError> {
    let train = dir.join("train");
    let test = ["test", "val"].map(|n| dir.join(n)).into_iter().find(|p| p.is_dir());
    let (train_dir, test_dir) = match test {
        Some(test) if train.is_dir() => (train, Some(test)),
        _ => (dir.to_path_buf(), None),
    };
    let classes: Vec<String> = entries(&train_dir, true)?.iter().map(|p| name_of(p)).collect();
    if classes.len() < 2 || classes.len() > MOST_CLASSES {
        let what = format!(
            "{} class folders, expected 2 to {MOST_CLASSES}, each with PNG or JPEG files (or \
             CIFAR's .bin files, or IDX files)",
            classes.len()
        );
        return Err(format(&train_dir, what));
    }
    let read = |dir: &Path| {
        let mut images = Images { shape: [3, side, side], ..Images::default() };
        for (label, class) in classes.iter().enumerate() {
            let folder = dir.join(class);
            let files = entries(&folder, false)?;
            if files.is_empty() {
                return Err(format(
                    &folder,
                    "the folder of a class is empty, expected PNG or JPEG files",
                ));
            }
            for file in files {
                images.push(&picture(&file, side)?, label as u16);
            }
        }
        Ok(images)
    };
    let all = read(&train_dir)?;
    let (train, test) = match test_dir {
        Some(dir) => {
            for folder in entries(&dir, true)? {
                if !classes.contains(&name_of(&folder)) {
                    return Err(format(
                        &folder,
                        "there is no such class among the training folders",
                    ));
                }
            }
            (all, read(&dir)?)
        }
        None => all.split(),
    };
    Ok(Dataset { name: "folders".into(), train, test, classes })
}

fn picture(path: &Path, side: usize) -> Result<Vec<u8>, DataError> {
    decode(path, &read_limited(path, IMAGE_LIMIT)?, side)
}

/// A PNG or JPEG as `[3, side, side]`. The path is for errors.
///
/// # Errors
/// [`DataError::Format`], for one that claims to be huge too.
pub fn decode(path: &Path, bytes: &[u8], side: usize) -> Result<Vec<u8>, DataError> {
    let wrong = |e: &dyn core::fmt::Display| format(path, format!("not a usable PNG or JPEG: {e}"));
    let mut reader = image::ImageReader::new(std::io::Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| wrong(&e))?;
    let mut limits = image::Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(IMAGE_SIDE), Some(IMAGE_SIDE));
    limits.max_alloc = Some(IMAGE_BYTES);
    reader.limits(limits);
    let picture = reader.decode().map_err(|e| wrong(&e))?;
    let n = u32::try_from(side).map_err(|e| wrong(&e))?;
    let picture = picture.resize_exact(n, n, image::imageops::FilterType::Triangle).to_rgb8();
    let mut out = vec![0; 3 * side * side];
    for (i, pixel) in picture.pixels().enumerate() {
        for c in 0..3 {
            out[c * side * side + i] = pixel.0[c];
        }
    }
    Ok(out)
}
