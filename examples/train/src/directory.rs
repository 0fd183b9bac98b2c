//! The directory of a run: who owns it, and what may be written where.
//!
//! A run locks its directory (`run.lock`) while it lives. A new run takes a directory that is not
//! there yet, or is empty; what is in another one is never touched without `--replace`, and then
//! the new run is made beside it and takes its place once there is something to show.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use bdia_models::files::{FileError, Temporary, directory_of, disk};

use crate::report;

/// The file that is locked.
const LOCK: &str = "run.lock";
/// Numbers that are tried for a directory that nobody has named.
const NUMBERS: u32 = 10_000;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another process has it.
    #[error(
        "{}: another process works in this directory; wait until it has ended, or name another \
         directory with --out",
        path.display()
    )]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// Something is there that would be overwritten.
    #[error(
        "{}: there is {found} already, expected a new or empty directory; name another one with \
         --out{ways}",
        path.display()
    )]
    Taken {
        /// The directory.
        path: PathBuf,
        /// What is in it.
        found: String,
        /// What else can be done.
        ways: &'static str,
    },
}

/// What a new run is told about its directory.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// The directory.
    pub out: &'a Path,
    /// Whether somebody has named it: otherwise the next number that is free is taken.
    pub named: bool,
    /// Whether the run or model in it may be replaced.
    pub replace: bool,
}

/// A directory that belongs to this process while this lives.
#[derive(Debug)]
pub struct Directory {
    /// Where the files are.
    path: PathBuf,
    /// What it takes the place of once there is something to show, with that one's lock.
    replaces: Option<(PathBuf, Option<File>)>,
    /// Locked.
    _lock: Option<File>,
}

impl Directory {
    /// Whether a new run may have this directory, as far as that is known beforehand.
    ///
    /// # Errors
    /// [`DirectoryError`]
    pub fn check(claim: &Claim<'_>) -> Result<(), DirectoryError> {
        let out = match (claim.named, claim.replace) {
            (true, _) => claim.out.to_path_buf(),
            (false, true) => numbered(claim.out, last(claim.out, Path::is_dir).max(1)),
            (false, false) => return Ok(()),
        };
        if !out.exists() {
            return Ok(());
        }
        match content(&out)? {
            Some(found) if !(claim.replace && found.is_ours) => Err(taken(&out, &found)),
            _ => Ok(()),
        }
    }

    /// The directory of a run that begins, or of a model that is written.
    ///
    /// # Errors
    /// [`DirectoryError`]; nothing has been written then.
    pub fn claim(claim: &Claim<'_>) -> Result<Self, DirectoryError> {
        if claim.named {
            return Self::named(claim);
        }
        let last = last(claim.out, Path::is_dir);
        if claim.replace {
            return Self::named(&Claim { out: &numbered(claim.out, last.max(1)), ..*claim });
        }
        for n in last + 1..NUMBERS {
            match Self::named(&Claim { out: &numbered(claim.out, n), ..*claim }) {
                Err(DirectoryError::Taken { .. } | DirectoryError::Locked { .. }) => {}
                done => return done,
            }
        }
        Self::named(claim)
    }

    fn named(claim: &Claim<'_>) -> Result<Self, DirectoryError> {
        let out = claim.out;
        disk::create_dir_all(directory_of(out))
            .map_err(|e| FileError::io(out, "create the directory that it is in", e))?;
        match disk::create_dir(out) {
            Ok(()) => return Ok(Self { path: out.into(), replaces: None, _lock: lock(out)? }),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(FileError::io(out, "create the directory", e).into()),
        }
        let Some(found) = content(out)? else {
            let lock = lock(out)?;
            // Another process may have been faster, and be through already.
            return match content(out)? {
                None => {
                    sweep(out);
                    Ok(Self { path: out.into(), replaces: None, _lock: lock })
                }
                Some(found) => Err(taken(out, &found)),
            };
        };
        if !claim.replace || !found.is_ours {
            return Err(taken(out, &found));
        }
        // A link to a directory stays, and what it leads to is replaced.
        let out = out.canonicalize().map_err(|e| FileError::io(out, "find it", e))?;
        let old = lock(&out)?;
        let name = format!("{}.new-", hidden(&out));
        sweep_beside(&out, &name);
        let failed = |e| FileError::io(&out, "create a directory beside it", e);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&name);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let beside = builder.tempdir_in(directory_of(&out)).map_err(failed)?.keep();
        let _lock = lock(&beside)?;
        Ok(Self { path: beside, replaces: Some((out, old)), _lock })
    }

    /// That of a run that goes on.
    ///
    /// # Errors
    /// [`DirectoryError`]
    pub fn of_run(dir: &Path) -> Result<Self, DirectoryError> {
        let _lock = lock(dir)?;
        sweep(dir);
        Ok(Self { path: dir.into(), replaces: None, _lock })
    }

    /// Where files are written now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// There is something to show: what is to be replaced goes.
    ///
    /// # Errors
    /// [`FileError`]; the old one is there then, under its name or, on systems that cannot exchange
    /// two directories, as `.NAME.new-….old` beside it.
    pub fn show(&mut self) -> Result<(), FileError> {
        let Some((place, _)) = &self.replaces else { return Ok(()) };
        let (place, beside) = (place.clone(), self.path.clone());
        let failed = |e| FileError::io(&place, "replace it", e);
        match disk::exchange(&beside, &place) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput) => {
                // Not in one step, but whatever happens both are there, under some name.
                let old = place.with_file_name(format!("{}.old", hidden(&beside)));
                disk::rename(&place, &old).map_err(failed)?;
                if let Err(e) = disk::rename(&beside, &place) {
                    disk::rename(&old, &place).map_err(failed)?;
                    return Err(failed(e));
                }
                disk::rename(&old, &beside).map_err(failed)?;
            }
            Err(e) => return Err(failed(e)),
        }
        disk::sync_directory(directory_of(&place)).map_err(failed)?;
        self.path = place;
        self.replaces = None;
        // It only takes room.
        let _ = disk::remove_dir_all(&beside);
        Ok(())
    }
}

impl Drop for Directory {
    /// What never had anything to show goes.
    fn drop(&mut self) {
        if self.replaces.is_some() {
            let _ = disk::remove_dir_all(&self.path);
        }
    }
}

/// The last of the numbered directories that runs without `--out` have made and that has a model,
/// or the name itself.
pub fn newest(out: &Path) -> PathBuf {
    let files = ["model.safetensors", "adapter_model.safetensors"];
    let has_model = |dir: &Path| files.iter().any(|file| dir.join(file).exists());
    numbered(out, last(out, has_model).max(1))
}

/// The last number whose directory is one that is looked for; 0 where there is none.
fn last(out: &Path, is_one: impl Fn(&Path) -> bool) -> u32 {
    (1..NUMBERS).rev().find(|&n| is_one(&numbered(out, n))).unwrap_or(0)
}

fn numbered(out: &Path, n: u32) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    if n > 1 {
        name.push(format!("-{n}"));
    }
    out.with_file_name(name)
}

/// What a directory holds.
struct Content {
    what: &'static str,
    /// One of its files.
    example: String,
    /// Whether `--replace` may replace it: the directory of a run or a model and of nothing else.
    is_ours: bool,
    /// What else is in it.
    foreign: Option<String>,
}

fn content(dir: &Path) -> Result<Option<Content>, FileError> {
    if dir.exists() && !dir.is_dir() {
        let error = ErrorKind::AlreadyExists.into();
        return Err(FileError::io(dir, "create the directory: it is a file", error));
    }
    let failed = |e| FileError::io(dir, "read the directory", e);
    let (mut names, mut foreign) = (Vec::new(), None);
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().map_err(failed)?.is_dir() || !is_known(&name) {
            foreign = Some(name.clone());
        }
        names.push(name);
    }
    // A killed process may have left these behind before it wrote anything.
    names.retain(|n| n != LOCK && !(n.starts_with('.') && n.ends_with(Temporary::SUFFIX)));
    names.sort();
    let has = |name: &str| names.iter().any(|n| n == name);
    let (run, model) = (has("run.json"), has("config.json") || has("adapter_config.json"));
    let what = match (run, model) {
        (true, _) => "a run",
        (_, true) => "a model",
        _ => "something else",
    };
    let is_ours = (run || model) && foreign.is_none();
    // What says the most of it.
    let marks = ["run.json", "config.json", "adapter_config.json"];
    let mark = marks.into_iter().find(|mark| has(mark)).map(String::from);
    let example = mark.or_else(|| names.first().cloned());
    Ok(example.map(|example| Content { what, example, is_ours, foreign }))
}

/// Whether a run or a model has a file of this name.
fn is_known(name: &str) -> bool {
    const NAMES: [&str; 16] = [
        LOCK,
        "run.json",
        "result.json",
        "metrics.jsonl",
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "model.safetensors.index.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "train.bin",
        "validation.bin",
        "README.md",
    ];
    let of_model = name.starts_with("tokenizer") && name.ends_with(".json")
        || name.starts_with("held-out.") && name.ends_with(".txt");
    let ends = [".safetensors", ".ckpt", ".svg"].iter().any(|end| name.ends_with(end));
    let unfinished = name.starts_with('.') && name.ends_with(Temporary::SUFFIX);
    NAMES.contains(&name) || of_model || ends || unfinished
}

fn taken(dir: &Path, found: &Content) -> DirectoryError {
    let ways = match (found.is_ours, found.what) {
        (true, "a run") => ", go on with the run by --resume, or replace it by --replace",
        (true, _) => ", or replace it by --replace",
        _ => "",
    };
    let found = match &found.foreign {
        Some(other) if found.what != "something else" => {
            format!("{} beside other files ({other})", found.what)
        }
        _ => format!("{} ({})", found.what, found.example),
    };
    DirectoryError::Taken { path: dir.into(), found, ways }
}

fn hidden(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    format!("{}{name}", if name.starts_with('.') { "" } else { "." })
}

fn lock(dir: &Path) -> Result<Option<File>, DirectoryError> {
    let path = dir.join(LOCK);
    let failed = |e| FileError::io(&path, "open it", e);
    if std::fs::symlink_metadata(&path).is_ok_and(|m| !m.is_file()) {
        let what = std::io::Error::other("expected a file, found something else");
        return Err(failed(what).into());
    }
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(DirectoryError::Locked { path: dir.into() }),
        Err(TryLockError::Error(e)) => {
            report::note!(
                "warning: {}: this file system cannot lock ({e}); start no second run there",
                dir.display()
            );
            Ok(None)
        }
    }
}

/// Removes what a killed process left of files that it did not finish.
fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(|n| n.starts_with('.') && n.ends_with(Temporary::SUFFIX)) {
            // It only takes room.
            let _ = disk::remove_file(&entry.path());
        }
    }
}

/// Removes what killed runs that were to replace `out` left beside it.
fn sweep_beside(out: &Path, prefix: &str) {
    for entry in std::fs::read_dir(directory_of(out)).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|n| n.starts_with(prefix) && !n.ends_with(".old"))
            && matches!(lock(&entry.path()), Ok(Some(_)))
        {
            let _ = disk::remove_dir_all(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_models::files::faults::{Fault, arm, disarm};
    use bdia_models::files::testing::TempDir;
    use bdia_models::files::write_bytes;

    fn new(out: &Path, named: bool, replace: bool) -> Result<Directory, DirectoryError> {
        Directory::claim(&Claim { out, named, replace })
    }

    fn read(path: PathBuf) -> String {
        String::from_utf8(std::fs::read(path).unwrap()).unwrap()
    }

    /// A directory with a run of this name.
    fn run(dir: &Path, name: &str) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("run.json"), name).unwrap();
    }

    #[test]
    fn what_is_there_is_not_touched() {
        let dir = TempDir::new();
        for (file, way) in [
            ("run.json", "--resume"),
            ("config.json", "--replace"),
            ("adapter_config.json", "--replace"),
            ("letter.txt", "--out"),
        ] {
            let out = dir.path().join(format!("of-{file}"));
            std::fs::create_dir(&out).unwrap();
            std::fs::write(out.join(file), "old").unwrap();
            let told = new(&out, true, false).unwrap_err().to_string();
            assert!(told.contains(way) && told.contains(file), "{told}");
            assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
        }
        // What is no run and no model is not replaced either, nor what is more than that.
        assert!(new(&dir.path().join("of-letter.txt"), true, true).is_err());
        let out = dir.path().join("of-run.json");
        for name in ["photos", "notes.txt"] {
            let path = out.join(name);
            if name == "photos" {
                std::fs::create_dir(&path).unwrap();
            } else {
                std::fs::write(&path, "mine").unwrap();
            }
            let told = new(&out, true, true).unwrap_err().to_string();
            assert!(told.contains(name), "{told}");
            let _ = std::fs::remove_dir(&path);
        }
        // An empty one is as good as none, also where a killed process has just begun to write.
        let out = dir.path().join("begun");
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join(".run.json.a1B2c3.tmp"), "{").unwrap();
        drop(new(&out, true, false).unwrap());
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1, "the lock alone");
        let out = dir.path().join("of-run.json");
        assert!(new(&out.join("run.json"), true, false).is_err());
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = TempDir::new();
        let out = dir.path().join("deep/run");
        let first = new(&out, true, false).unwrap();
        assert!(matches!(new(&out, true, false), Err(DirectoryError::Locked { .. })));
        run(&out, "first");
        for replace in [false, true] {
            assert!(new(&out, true, replace).is_err());
        }
        assert!(matches!(Directory::of_run(&out), Err(DirectoryError::Locked { .. })));
        drop(first);
        let second = Directory::of_run(&out).unwrap();
        assert_eq!(read(out.join("run.json")), "first");
        assert!(matches!(new(&out, true, true), Err(DirectoryError::Locked { .. })));
        drop(second);
        new(&out, true, true).unwrap();
    }

    #[test]
    fn a_name_that_nobody_chose_takes_the_next_number() {
        let dir = TempDir::new();
        let out = dir.path().join("run");
        let mut all = Vec::new();
        for expected in ["run", "run-2", "run-3"] {
            let claimed = new(&out, false, false).unwrap();
            assert_eq!(claimed.path(), dir.path().join(expected));
            run(claimed.path(), expected);
            std::fs::write(claimed.path().join("model.safetensors"), "").unwrap();
            assert_eq!(newest(&out), claimed.path());
            all.push(claimed);
        }
        // Numbers only rise, and a run that has no model yet is not what others mean.
        all.remove(0);
        std::fs::remove_dir_all(&out).unwrap();
        assert_eq!(new(&out, false, false).unwrap().path(), dir.path().join("run-4"));
        assert_eq!(newest(&out), dir.path().join("run-3"));
        assert!(matches!(new(&out, false, true), Ok(d) if d.path() == dir.path().join("run-4")));
    }

    #[test]
    fn a_replacement_shows_itself_at_once_or_never() {
        let dir = TempDir::new();
        let out = dir.path().join("run");
        run(&out, "old");
        std::fs::write(out.join("step-00000001.ckpt"), "").unwrap();
        let fails = new(&out, true, true).unwrap();
        write_bytes(&fails.path().join("run.json"), b"new").unwrap();
        assert_ne!(fails.path(), out);
        drop(fails);
        assert_eq!(read(out.join("run.json")), "old");

        // One that was killed: nobody holds its lock.
        run(&dir.path().join(".run.new-killed"), "killed");
        let mut works = new(&out, true, true).unwrap();
        write_bytes(&works.path().join("run.json"), b"new").unwrap();
        works.show().unwrap();
        works.show().unwrap();
        assert_eq!(works.path(), out.canonicalize().unwrap());
        assert!(Directory::of_run(&out).is_err(), "it is still locked");
        drop(works);
        assert_eq!(read(out.join("run.json")), "new");
        assert!(!out.join("step-00000001.ckpt").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn every_fault_leaves_a_whole_directory() {
        for fault in [Fault::Refused, Fault::Short, Fault::Stopped, Fault::Lost] {
            for n in 0.. {
                let dir = TempDir::new();
                let out = dir.path().join("run");
                run(&out, "old");
                arm(fault, n);
                let done = new(&out, true, true).and_then(|mut d| {
                    write_bytes(&d.path().join("run.json"), b"new")?;
                    Ok(d.show()?)
                });
                let happened = disarm();
                let found = read(out.join("run.json"));
                let expected: &[&str] =
                    if done.is_ok() && fault != Fault::Lost { &["new"] } else { &["old", "new"] };
                assert!(expected.contains(&found.as_str()), "{fault:?} {n}: {found}");
                if !happened {
                    assert!(n > 8);
                    break;
                }
                // And the way is free.
                new(&out, true, true).unwrap();
            }
        }
    }
}
