//! Images with labels: the digits that are built in, and files of the user.
//!
//! | found in the directory | read as |
//! |---|---|
//! | `data_batch_*.bin`, `test_batch.bin` | CIFAR-10, records of 1 + 3072 bytes |
//! | `train.bin`, `test.bin` | CIFAR-100, records of 2 + 3072 bytes, fine labels |
//! | `train-images-idx3-ubyte`, …, or with a dot, as on Kaggle | MNIST and relatives |
//! | folders of folders | a class a folder, PNG and JPEG, in subfolders too |
//!
//! Files of records may be packed with gzip. Above class folders there may be folders for
//! training, validation and testing (`train`, `Training`, `seg_train`, `val`, `valid`,
//! `validation`, `test`, `test_set`, …). Where the data has no folder for either of the last two, a
//! fifth of each class is held out; one of the last two alone is for evaluation only. What is no
//! picture, and what systems leave behind (`Thumbs.db`, `desktop.ini`, `__MACOSX`, names that begin
//! with a dot), is passed over and counted.

use core::fmt::Write as _;
use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use bdia_core::rng::{Draw, Stream};
use bdia_models::files::FileError;
use bdia_models::input::{self, InputError, Pieces, list};
use bdia_train::Failure;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder};
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
    /// For evaluations on the way and the choice of the best weights, where the data has a part for
    /// that beside the one to test on.
    pub validation: Option<Images>,
    /// Held out.
    pub test: Images,
    /// Names of the classes, in the order of the labels.
    pub classes: Vec<String>,
    /// Whether the files have numbers as labels, and names of classes only beside them, if at all.
    pub numbered: bool,
    /// What was noticed: what was passed over, what is missing.
    pub notes: Vec<String>,
}

/// Why data cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The directory could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file could not be read or unpacked.
    #[error(transparent)]
    Input(#[from] InputError),
    /// Classes that the model does not have.
    #[error(
        "{data}: classes that the model in {} does not have: {}; the model's are {}, the data's \
         {}. Give the folders the model's names, or train a model for these classes",
        model.display(), list(unknown), list(expected), list(found)
    )]
    Classes {
        /// The data.
        data: String,
        /// The model's directory.
        model: PathBuf,
        /// Those that it does not have.
        unknown: Vec<String>,
        /// The model's classes.
        expected: Vec<String>,
        /// The data's classes.
        found: Vec<String>,
    },
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

/// What a directory is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Training,
    Evaluation,
}

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
            validation: None,
            test,
            classes: numbers(10),
            numbered: true,
            notes: Vec::new(),
        })
    }

    /// Reads a directory to train on, whatever of the kinds above it holds. Pictures are scaled to
    /// `side` rows and columns.
    ///
    /// # Errors
    /// [`DataError`], also where the only folder is for validation or testing.
    pub fn open(dir: &Path, side: usize) -> Result<Self, DataError> {
        Self::read(dir, side, Purpose::Training)
    }

    /// Reads a directory to evaluate what it holds out: all of class folders whose folder is for
    /// validation or testing and has no other beside it, which leaves nothing to train on.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn open_to_evaluate(dir: &Path, side: usize) -> Result<Self, DataError> {
        Self::read(dir, side, Purpose::Evaluation)
    }

    fn read(dir: &Path, side: usize, purpose: Purpose) -> Result<Self, DataError> {
        let mut passed = PassedOver::default();
        // Whoever trains on a directory may call it as they like.
        let mut held_out =
            purpose == Purpose::Evaluation && Part::of(dir).is_some_and(Part::is_held_out);
        let mut place = Listing::of(dir, &mut passed)?;
        let mut data = records(&place)?;
        // What an archive was unpacked to may be in one folder more, or two.
        for _ in 0..2 {
            let inner = if data.is_none() { place.only_folder(&mut passed)? } else { None };
            let Some(inner) = inner else { break };
            place = inner;
            held_out = Part::of(&place.dir).map_or(held_out, Part::is_held_out);
            data = records(&place)?;
        }
        let alone = held_out.then_some(purpose);
        data.map_or_else(|| folders(&place, side, alone, &mut passed), Ok)?
            .checked(dir, purpose, passed)
    }

    /// What every kind of data must fulfil.
    fn checked(
        mut self,
        dir: &Path,
        purpose: Purpose,
        passed: PassedOver,
    ) -> Result<Self, DataError> {
        self.name = format!("{} ({})", dir.display(), self.name);
        self.notes.extend(passed.note());
        for (part, images) in [("training", &self.train), ("held-out", &self.test)] {
            if images.is_empty() && (purpose == Purpose::Training || part == "held-out") {
                return Err(format(dir, format!("there are no {part} images")));
            }
        }
        if self.train.shape != self.test.shape {
            let (a, b) = (self.train.shape, self.test.shape);
            return Err(format(
                dir,
                format!("training images are {a:?}, held-out ones {b:?}; expected one size"),
            ));
        }
        Ok(self)
    }

    /// The images that evaluations on the way measure.
    pub fn held_out(&self) -> &Images {
        self.validation.as_ref().unwrap_or(&self.test)
    }

    /// Numbers the labels as a model does, by the names of the classes; the data may have fewer
    /// classes than the model. `model` is for errors.
    ///
    /// Files with numbers as labels and without names are taken by number, if there are as many
    /// classes: so a model that was trained with CIFAR's names can be evaluated without them.
    ///
    /// # Errors
    /// [`DataError::Classes`]
    pub fn with_classes(mut self, model: &Path, classes: &[String]) -> Result<Self, DataError> {
        let plain = |names: &[String]| names.iter().enumerate().all(|(i, n)| *n == i.to_string());
        let place = |name| classes.iter().position(|c| c == name);
        let mut to: Vec<_> = self.classes.iter().map(place).collect();
        let by_number = self.numbered
            && to.contains(&None)
            && (plain(&self.classes) || plain(classes))
            && self.classes.len() == classes.len();
        if by_number {
            to = (0..classes.len()).map(Some).collect();
            self.notes.push(format!(
                "{}: one of data and model has no names of classes; they are taken by number",
                self.name
            ));
        }
        if to.contains(&None) {
            let all = self.classes.iter().zip(&to);
            let unknown = all.filter(|(_, to)| to.is_none()).map(|(name, _)| name.clone());
            return Err(DataError::Classes {
                unknown: unknown.collect(),
                data: self.name,
                model: model.into(),
                expected: classes.to_vec(),
                found: self.classes,
            });
        }
        let held = self.validation.iter_mut().chain([&mut self.test]);
        for label in held.chain([&mut self.train]).flat_map(|images| &mut images.labels) {
            // Every label is the place of a class.
            *label = to[usize::from(*label)].unwrap_or_default() as u16;
        }
        self.classes = classes.to_vec();
        Ok(self)
    }

    /// Identifies the training data of a run.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        for images in [&self.train, &self.test].into_iter().chain(&self.validation) {
            hash.update(&images.pixels);
            images.labels.iter().for_each(|l| hash.update(&l.to_le_bytes()));
        }
        hash.digest()
    }
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|c| c.to_string()).collect()
}

/// The names in a file beside CIFAR's records; numbers without it.
fn class_names(place: &Listing, file: &str, count: usize) -> Result<Vec<String>, DataError> {
    let Some(path) = place.get(file) else { return Ok(numbers(count)) };
    let text = input::read_text(path, 1 << 16)?;
    let names: Vec<String> =
        text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
    if names.len() == count {
        Ok(names)
    } else {
        Err(format(path, format!("{} names of classes, expected {count}", names.len())))
    }
}

/// The data of a directory of records: CIFAR's files, or IDX.
fn records(place: &Listing) -> Result<Option<Dataset>, DataError> {
    let has = |name: &str| place.get(name).is_some();
    let with = |name: &str, train, test, classes, notes| Dataset {
        name: name.into(),
        train,
        validation: None,
        test,
        classes,
        numbered: true,
        notes,
    };
    let number = |name: &str| -> Option<u32> {
        name.strip_prefix("data_batch_")?.strip_suffix(".bin")?.parse().ok()
    };
    let batches: BTreeSet<u32> = place.files.iter().filter_map(|(name, _)| number(name)).collect();
    let name = |batch: u32| format!("data_batch_{batch}.bin");
    let there: Vec<_> = batches.iter().copied().map(name).collect();
    let missing: Vec<_> = (1..=5).filter(|batch| !batches.contains(batch)).map(name).collect();
    if !there.is_empty() || has("test_batch.bin") {
        let train = place.all(&there, "test_batch.bin")?;
        let test = place.all(&["test_batch.bin".into()], "data_batch_1.bin")?;
        // The rest is good data with right labels: less of it is no reason to stop.
        let notes = if missing.is_empty() || there.is_empty() {
            Vec::new()
        } else {
            vec![format!(
                "{}: {} missing; training goes on with {}",
                place.dir.display(),
                list(&missing),
                list(&there)
            )]
        };
        let classes = class_names(place, "batches.meta.txt", 10)?;
        return Ok(Some(with(
            "CIFAR-10",
            cifar(&train, 1, 10)?,
            cifar(&test, 1, 10)?,
            classes,
            notes,
        )));
    }
    if has("train.bin") || has("test.bin") {
        let train = place.all(&["train.bin".into()], "test.bin")?;
        let test = place.all(&["test.bin".into()], "train.bin")?;
        let classes = class_names(place, "fine_label_names.txt", 100)?;
        let (train, test) = (cifar(&train, 2, 100)?, cifar(&test, 2, 100)?);
        return Ok(Some(with("CIFAR-100", train, test, classes, Vec::new())));
    }
    if has("data_batch_1") || (has("train") && has("meta")) {
        let what = "CIFAR's files for Python; expected the binary version, whose files end in .bin";
        return Err(format(&place.dir, what));
    }
    let Some(images) = place.idx(&["train-images"], "idx3")? else { return Ok(None) };
    let need = |parts: &[&str], kind: &str| {
        place.idx(parts, kind)?.ok_or_else(|| {
            let what = format!("there is no file {}-{kind}-ubyte beside it", parts[0]);
            format(&images, what)
        })
    };
    let train = idx(&images, &need(&["train-labels"], "idx1")?)?;
    let test = idx(
        &need(&["t10k-images", "test-images"], "idx3")?,
        &need(&["t10k-labels", "test-labels"], "idx1")?,
    )?;
    let most = train.labels.iter().chain(&test.labels).max().copied().unwrap_or(0);
    Ok(Some(with("IDX", train, test, numbers(usize::from(most) + 1), Vec::new())))
}

fn cifar(paths: &[PathBuf], labels: usize, classes: u16) -> Result<Images, DataError> {
    let mut images = Images { shape: [3, 32, 32], ..Images::default() };
    for path in paths {
        cifar_records(path, &input::read(path, LIMIT)?, labels, classes, &mut images)?;
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

/// Sizes and values of an IDX file, packed or plain; its header says how many there must be, and no
/// more are read. The path is for errors.
///
/// # Errors
/// [`DataError::Format`], [`DataError::File`]
pub fn idx_values(
    path: &Path,
    file: impl Read,
    magic: u32,
    dims: usize,
) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let mut pieces = Pieces::new(path, file)?;
    let head = 4 + 4 * dims;
    let header = pieces.next(head as u64)?;
    if header.len() < head {
        return Err(format(path, format!("{} bytes, expected a header of {head}", header.len())));
    }
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
    let values = pieces.next(len + 1)?;
    if values.len() as u64 != len {
        let found = match values.len() as u64 {
            n if n > len => "more".into(),
            n => format!("only: {n}"),
        };
        return Err(format(path, format!("its header promises {len} values, found {found}")));
    }
    Ok((sizes, values))
}

fn idx(images: &Path, labels: &Path) -> Result<Images, DataError> {
    let open = |path| File::open(path).map_err(|e| FileError::io(path, "open it", e));
    let (sizes, pixels) = idx_values(images, open(images)?, 0x0803, 3)?;
    let (count, label) = idx_values(labels, open(labels)?, 0x0801, 1)?;
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

fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What is in a directory and is no data.
#[derive(Debug, Default)]
struct PassedOver {
    count: usize,
    names: BTreeSet<String>,
}

impl PassedOver {
    fn add(&mut self, path: &Path) {
        self.count += 1;
        if self.names.len() < 5 {
            self.names.insert(name_of(path));
        }
    }

    fn extend(&mut self, other: Self) {
        self.count += other.count;
        self.names.extend(other.names);
    }

    fn note(&self) -> Option<String> {
        let names: Vec<String> = self.names.iter().take(5).cloned().collect();
        (self.count > 0).then(|| {
            let (count, names) = (self.count, list(&names));
            format!("passed over {count} file(s) or folder(s) that are not data: {names}")
        })
    }
}

/// Whether an operating system or a program has left it behind.
fn left_behind(name: &str) -> bool {
    const NAMES: [&str; 7] = [
        "__macosx",
        "thumbs.db",
        "desktop.ini",
        "system volume information",
        "lost+found",
        "$recycle.bin",
        "@eadir",
    ];
    name.starts_with('.') || NAMES.contains(&name.to_lowercase().as_str())
}

/// A directory without what was left behind in it.
#[derive(Debug)]
struct Listing {
    dir: PathBuf,
    /// With their names in lower case, without `.gz`, in the order of their own names.
    files: Vec<(String, PathBuf)>,
    folders: Vec<PathBuf>,
}

impl Listing {
    fn of(dir: &Path, passed: &mut PassedOver) -> Result<Self, DataError> {
        let failed = |e| FileError::io(dir, "read the directory", e);
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(failed)? {
            entries.push(entry.map_err(failed)?.path());
        }
        entries.sort();
        let mut listing = Self { dir: dir.into(), files: Vec::new(), folders: Vec::new() };
        for path in entries {
            let name = name_of(&path);
            if left_behind(&name) {
                passed.add(&path);
            } else if path.is_dir() {
                listing.folders.push(path);
            } else {
                let name = name.to_lowercase();
                let name = name.strip_suffix(".gz").unwrap_or(&name).to_owned();
                listing.files.push((name, path));
            }
        }
        Ok(listing)
    }

    /// What is in the one folder that there is, where that has folders or records itself.
    fn only_folder(&self, passed: &mut PassedOver) -> Result<Option<Self>, DataError> {
        let [folder] = self.folders.as_slice() else { return Ok(None) };
        let mut own = PassedOver::default();
        let inner = Self::of(folder, &mut own)?;
        // CIFAR's files for Python too, so that it can be said that they are not read.
        let record = |n: &str| {
            n.ends_with(".bin") || n.contains("idx") || n.starts_with("data_batch_") || n == "meta"
        };
        let records = inner.files.iter().any(|(n, _)| record(n));
        if inner.folders.is_empty() && !records {
            return Ok(None);
        }
        passed.extend(own);
        self.files.iter().for_each(|(_, path)| passed.add(path));
        Ok(Some(inner))
    }

    /// Whether folders of these classes may be in it: where there is one folder only, of another
    /// name and without folders, its pictures may be of any class (`test/test`, `val/images`).
    fn has_classes(&self, classes: &[String]) -> Result<bool, DataError> {
        match self.folders.as_slice() {
            [] => Ok(false),
            [one] if !classes.contains(&name_of(one)) => {
                Ok(!Self::of(one, &mut PassedOver::default())?.folders.is_empty())
            }
            _ => Ok(true),
        }
    }

    fn get(&self, name: &str) -> Option<&PathBuf> {
        self.files.iter().find(|(n, _)| n == name).map(|(_, path)| path)
    }

    /// The paths of these files; `beside` is one that is there.
    fn all(&self, names: &[String], beside: &str) -> Result<Vec<PathBuf>, DataError> {
        let one = |name: &String| {
            self.get(name).cloned().ok_or_else(|| {
                format(&self.dir, format!("{beside} is there, {name} is not; put it beside that"))
            })
        };
        names.iter().map(one).collect()
    }

    /// The IDX file whose name has one of `parts` and `kind` in it, plain where it is there packed
    /// too. Kaggle writes a dot for a hyphen, and puts files into folders of their own names.
    fn idx(&self, parts: &[&str], kind: &str) -> Result<Option<PathBuf>, DataError> {
        let fits = |name: &str| parts.iter().any(|p| name.contains(p)) && name.contains(kind);
        let mut found: Vec<_> = self.files.iter().filter(|(n, _)| fits(n)).cloned().collect();
        if found.is_empty() {
            for folder in self.folders.iter().filter(|f| fits(&name_of(f))) {
                let inner = Self::of(folder, &mut PassedOver::default())?.files;
                found.extend(inner.into_iter().filter(|(n, _)| fits(n)));
            }
        }
        // Of one name the plain file is the one with the shorter path.
        found.sort_by_key(|(name, path)| (name.clone(), path.as_os_str().len()));
        found.dedup_by(|later, first| later.0 == first.0);
        match found.as_slice() {
            [_, _, ..] => {
                let names: Vec<String> = found.iter().map(|(_, path)| name_of(path)).collect();
                let what = format!("expected one file of {}, found {}", parts[0], list(&names));
                Err(format(&self.dir, what))
            }
            _ => Ok(found.pop().map(|(_, path)| path)),
        }
    }
}

/// What a folder above class folders is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Train,
    Validation,
    Test,
}

impl Part {
    /// By its name: `train`, `Training`, `seg_train`, `training_set`, `val_images`, ….
    fn of(folder: &Path) -> Option<Self> {
        let name = name_of(folder).to_lowercase();
        let words = name.split(|c: char| !c.is_alphanumeric());
        let words = words.map(|w| w.strip_suffix("set").unwrap_or(w));
        let fillers = ["", "seg", "data", "images", "imgs"];
        let mut parts = words.filter(|w| !fillers.contains(w)).map(|w| match w {
            "train" | "training" => Some(Self::Train),
            "val" | "valid" | "validation" | "dev" => Some(Self::Validation),
            "test" | "testing" => Some(Self::Test),
            _ => None,
        });
        parts.next().flatten().filter(|_| parts.next().is_none())
    }

    fn is_held_out(self) -> bool {
        self != Self::Train
    }
}

/// The folder of a part, with its class folders in it.
fn part(
    folders: &[PathBuf],
    part: Part,
    passed: &mut PassedOver,
) -> Result<Option<Listing>, DataError> {
    let all: Vec<&PathBuf> = folders.iter().filter(|f| Part::of(f) == Some(part)).collect();
    match all.as_slice() {
        [] => Ok(None),
        [one] => {
            let mut place = Listing::of(one, passed)?;
            // `seg_train/seg_train` and the like.
            if let Some(inner) = place.only_folder(passed)? {
                place = inner;
            }
            Ok(Some(place))
        }
        [a, b, ..] => {
            Err(format(a, format!("{} is for the same; expected one of the two", b.display())))
        }
    }
}

/// Class folders, or folders for parts with those in them. `alone` is what they are read for where
/// the folder that they are in is for validation or testing.
fn folders(
    place: &Listing,
    side: usize,
    alone: Option<Purpose>,
    passed: &mut PassedOver,
) -> Result<Dataset, DataError> {
    let mut notes = Vec::new();
    let mut parts = [None, None];
    let mut train_place = None;
    if place.folders.iter().any(|f| Part::of(f) == Some(Part::Train)) {
        for (to, which) in parts.iter_mut().zip([Part::Validation, Part::Test]) {
            *to = part(&place.folders, which, passed)?;
        }
        if parts.iter().any(Option::is_some) {
            train_place = part(&place.folders, Part::Train, passed)?;
            let others = place.folders.iter().filter(|f| Part::of(f).is_none());
            others.chain(place.files.iter().map(|f| &f.1)).for_each(|path| passed.add(path));
        }
    }
    let alone = alone.filter(|_| train_place.is_none());
    if alone == Some(Purpose::Training) {
        let what = "by its name it is for validation or testing, and no folder for training is \
                    beside it; expected one, or another name";
        return Err(format(&place.dir, what));
    }
    let train_place = train_place.as_ref().unwrap_or(place);
    // Folders of parts must not be taken for classes.
    for folder in train_place.folders.iter().filter(|f| Part::of(f).is_some()) {
        if !Listing::of(folder, &mut PassedOver::default())?.folders.is_empty() {
            let what = "it has folders in it, so it is no class; expected a folder for training \
                        beside one for validation or testing, or class folders alone";
            return Err(format(folder, what));
        }
    }
    let classes: Vec<String> = train_place.folders.iter().map(|p| name_of(p)).collect();
    for to in &mut parts {
        let labelled = to.as_ref().map_or(Ok(true), |p| p.has_classes(&classes))?;
        if let Some(unlabelled) = to.take_if(|_| !labelled) {
            notes.push(format!(
                "{}: no folders of the training classes, so its pictures have no labels: not used",
                unlabelled.dir.display()
            ));
        }
    }
    if classes.len() < 2 || classes.len() > MOST_CLASSES {
        let archive = |(n, _): &&(String, PathBuf)| {
            [".zip", ".tar", ".tgz", ".7z"].iter().any(|e| n.ends_with(e))
        };
        let mut what = format!(
            "{} class folders, expected 2 to {MOST_CLASSES}, each with PNG or JPEG files (or \
             CIFAR's .bin files, or IDX files)",
            classes.len()
        );
        if let Some((_, archive)) = place.files.iter().find(archive) {
            let _ = write!(what, "; unpack {}", archive.display());
        }
        return Err(format(&train_place.dir, what));
    }
    let mut read = |from: &Listing| {
        from.files.iter().for_each(|(_, path)| passed.add(path));
        let mut images = Images { shape: [3, side, side], ..Images::default() };
        for folder in &from.folders {
            let Some(label) = classes.iter().position(|c| *c == name_of(folder)) else {
                let what = "there is no such class among the training folders";
                return Err(format(folder, what));
            };
            let mut files = Vec::new();
            pictures(folder, &mut HashSet::new(), passed, &mut files)?;
            if files.is_empty() {
                let what = "the folder of a class is empty, expected PNG or JPEG files";
                return Err(format(folder, what));
            }
            for file in files {
                images.push(&decode(&file, &input::read(&file, IMAGE_LIMIT)?, side)?, label as u16);
            }
        }
        Ok(images)
    };
    let all = read(train_place)?;
    let [validation, test] = parts;
    let validation = validation.as_ref().map(&mut read).transpose()?;
    let test = test.as_ref().map(&mut read).transpose()?;
    let (train, validation, test) = match (validation, test) {
        (validation, Some(test)) => (all, validation, test),
        (Some(validation), None) => (all, None, validation),
        (None, None) if alone.is_some() => {
            notes.push(format!(
                "{}: by its name it is for validation or testing: all of it is held out",
                place.dir.display()
            ));
            (all.pick(&[]), None, all)
        }
        (None, None) => {
            let (rest, fifth) = all.split();
            (rest, None, fifth)
        }
    };
    let name = "folders".into();
    Ok(Dataset { name, train, validation, test, classes, numbered: false, notes })
}

/// The pictures in the folder of a class and in its subfolders, in the order of their names.
fn pictures(
    folder: &Path,
    seen: &mut HashSet<PathBuf>,
    passed: &mut PassedOver,
    to: &mut Vec<PathBuf>,
) -> Result<(), DataError> {
    // A link may lead back.
    let place = folder.canonicalize().map_err(|e| FileError::io(folder, "find it", e))?;
    if !seen.insert(place) {
        return Ok(());
    }
    let listing = Listing::of(folder, passed)?;
    for path in listing.files.into_iter().map(|f| f.1) {
        match input::ending(&path).as_str() {
            "png" | "jpg" | "jpeg" | "jpe" | "jfif" => to.push(path),
            "webp" | "bmp" | "gif" | "tif" | "tiff" | "heic" | "heif" | "avif" => {
                let what = "a picture of a kind that is not read; convert it to PNG or JPEG";
                return Err(format(&path, what));
            }
            _ => passed.add(&path),
        }
    }
    listing.folders.iter().try_for_each(|inner| pictures(inner, seen, passed, to))
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
    let mut decoder = reader.into_decoder().map_err(|e| wrong(&e))?;
    if decoder.total_bytes() > IMAGE_BYTES {
        let found = decoder.total_bytes();
        return Err(wrong(&format!("{found} bytes of pixels, expected at most {IMAGE_BYTES}")));
    }
    // A camera that is held upright writes rows that lie on their side, and says so.
    let upright = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(|e| wrong(&e))?;
    picture.apply_orientation(upright);
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
