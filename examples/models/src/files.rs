//! Reading within limits and writing atomically.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("{}: cannot {what}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the operating system says.
        source: io::Error,
    },
    /// The file is larger than such a file can sensibly be.
    #[error("{}: {found} bytes, expected at most {limit}; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The largest size that is read.
        limit: u64,
    },
}

impl FileError {
    /// An error of the operating system about `path`.
    pub fn io(path: &Path, what: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), what, source }
    }
}

/// The whole of a file of at most `limit` bytes.
///
/// # Errors
/// [`FileError`]
pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let file = File::open(path).map_err(|e| FileError::io(path, "open it", e))?;
    let found = file.metadata().map_err(|e| FileError::io(path, "read its size", e))?.len();
    if found > limit {
        return Err(FileError::TooLarge { path: path.to_path_buf(), found, limit });
    }
    let mut bytes = Vec::new();
    // The file may grow, and a device or pipe has no size: the limit holds for what is read.
    file.take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|e| FileError::io(path, "read it", e))?;
    if bytes.len() as u64 > limit {
        return Err(FileError::TooLarge {
            path: path.to_path_buf(),
            found: bytes.len() as u64,
            limit,
        });
    }
    Ok(bytes)
}

/// Writes a file so that `path` has either its old content or all of the new one, whenever the
/// process or the machine stops: a temporary file beside it, `fsync`, rename, `fsync` of the
/// directory. The temporary name is random and exclusive, and a link at `path` is replaced, not
/// followed.
///
/// # Errors
/// [`FileError`], or what `write` returns; the temporary file is removed and `path` is untouched
/// then.
pub fn write_atomic<E: From<FileError>>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<Temporary>) -> Result<(), E>,
) -> Result<(), E> {
    let failed = |what| move |e| FileError::io(path, what, e);
    let tmp = Temporary::beside(path).map_err(failed("create a temporary file for it"))?;
    let mut out = BufWriter::with_capacity(1 << 18, tmp);
    write(&mut out)?;
    let tmp = out.into_inner().map_err(|e| FileError::io(path, "write it", e.into_error()))?;
    tmp.replace(path).map_err(failed("replace it"))?;
    Ok(disk::sync_directory(directory_of(path)).map_err(failed("write its directory to disk"))?)
}

/// The directory that a path is in.
pub fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A file that is not there yet under its name; it goes when this is dropped.
#[derive(Debug)]
pub struct Temporary(NamedTempFile);

impl Temporary {
    fn beside(path: &Path) -> io::Result<Self> {
        disk::point()?;
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(".");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&name).suffix(Self::SUFFIX);
        // What the file has in the end: anybody may read what the umask lets them read.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        builder.tempfile_in(directory_of(path)).map(Self)
    }

    /// How the names of these files end. They begin with a dot.
    pub const SUFFIX: &'static str = ".tmp";

    /// Puts it on disk and then in the place of `path`.
    fn replace(self, path: &Path) -> io::Result<()> {
        disk::point()?;
        self.0.as_file().sync_all()?;
        if disk::rename_point()? {
            self.0.persist(path).map_err(|e| e.error)?;
        }
        Ok(())
    }
}

impl Write for Temporary {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = disk::write_point(bytes.len())?;
        self.0.write(&bytes[..n])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// [`write_atomic`] of bytes that are at hand.
///
/// # Errors
/// [`FileError`]
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_atomic(path, |out| out.write_all(bytes).map_err(|e| FileError::io(path, "write it", e)))
}

/// Every other call that changes what is on disk, so that tests can let the n-th one fail.
pub mod disk {
    use std::fs::{self, File};
    use std::io;
    use std::path::Path;

    #[cfg(any(test, feature = "testing"))]
    pub(super) use super::faults::{point, rename_point, write_point};
    #[cfg(not(any(test, feature = "testing")))]
    pub(super) use none::{point, rename_point, write_point};

    #[cfg(not(any(test, feature = "testing")))]
    mod none {
        pub fn point() -> std::io::Result<()> {
            Ok(())
        }
        pub fn rename_point() -> std::io::Result<bool> {
            Ok(true)
        }
        pub fn write_point(len: usize) -> std::io::Result<usize> {
            Ok(len)
        }
    }

    /// A rename is durable only once the directory is on disk.
    ///
    /// # Errors
    /// The operating system's, as all here.
    pub fn sync_directory(dir: &Path) -> io::Result<()> {
        point()?;
        #[cfg(unix)]
        File::open(dir)?.sync_all()?;
        #[cfg(not(unix))]
        let _ = dir;
        Ok(())
    }

    /// Makes a directory that is not there yet.
    ///
    /// # Errors
    /// Also where it is there.
    pub fn create_dir(dir: &Path) -> io::Result<()> {
        point()?;
        fs::create_dir(dir)
    }

    /// Makes a directory and those that it is in, where they are missing.
    ///
    /// # Errors
    /// See [`sync_directory`].
    pub fn create_dir_all(dir: &Path) -> io::Result<()> {
        point()?;
        fs::create_dir_all(dir)
    }

    /// Two directories take each other's place; nobody sees a moment in which one is missing.
    ///
    /// # Errors
    /// Also where the system or the file system cannot do that.
    pub fn exchange(one: &Path, other: &Path) -> io::Result<()> {
        if !rename_point()? {
            return Ok(());
        }
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?;
            Ok(())
        }
        #[cfg(not(target_os = "linux"))]
        Err(io::Error::new(io::ErrorKind::Unsupported, format!("{one:?}, {other:?}")))
    }

    /// Renames.
    ///
    /// # Errors
    /// See [`sync_directory`].
    pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
        if rename_point()? { fs::rename(from, to) } else { Ok(()) }
    }

    /// Removes a file.
    ///
    /// # Errors
    /// See [`sync_directory`].
    pub fn remove_file(path: &Path) -> io::Result<()> {
        point()?;
        fs::remove_file(path)
    }

    /// Removes a directory with all that is in it.
    ///
    /// # Errors
    /// See [`sync_directory`].
    pub fn remove_dir_all(dir: &Path) -> io::Result<()> {
        point()?;
        fs::remove_dir_all(dir)
    }

    /// Writes at the end of a file that was opened for that.
    ///
    /// # Errors
    /// See [`sync_directory`].
    pub fn append(file: &mut File, bytes: &[u8]) -> io::Result<()> {
        use std::io::Write as _;
        let n = write_point(bytes.len())?;
        file.write_all(&bytes[..n])?;
        if n < bytes.len() {
            point()?;
            file.write_all(&bytes[n..])?;
        }
        Ok(())
    }
}

/// Disks that fail, for tests: of the calls that change what is on disk, one goes wrong.
#[cfg(any(test, feature = "testing"))]
#[allow(missing_docs)]
pub mod faults {
    use core::cell::Cell;
    use std::io;

    /// What goes wrong.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Fault {
        /// The call is refused: the disk is full. Later calls work.
        Refused,
        /// The same, and a write has written half before.
        Short,
        /// The machine stops before the call: it and all later ones are refused.
        Stopped,
        /// The call, a rename, claims to have worked and has not; then the machine stops.
        Lost,
    }

    thread_local! {
        static NEXT: Cell<Option<(Fault, u32)>> = const { Cell::new(None) };
        static HALTED: Cell<bool> = const { Cell::new(false) };
    }

    /// The `n`-th call from now on this thread, from 0, goes wrong.
    pub fn arm(fault: Fault, n: u32) {
        HALTED.set(false);
        NEXT.set(Some((fault, n)));
    }

    /// Disks work again; whether a fault had happened.
    pub fn disarm() -> bool {
        HALTED.set(false);
        NEXT.take().is_none()
    }

    fn next() -> io::Result<Option<Fault>> {
        if HALTED.get() {
            return Err(refusal());
        }
        match NEXT.get() {
            Some((fault, 0)) => {
                NEXT.set(None);
                HALTED.set(matches!(fault, Fault::Stopped | Fault::Lost));
                Ok(Some(fault))
            }
            Some((fault, n)) => {
                NEXT.set(Some((fault, n - 1)));
                Ok(None)
            }
            None => Ok(None),
        }
    }

    fn refusal() -> io::Error {
        io::Error::new(io::ErrorKind::StorageFull, "a fault of the test: no space left")
    }

    pub fn point() -> io::Result<()> {
        next()?.map_or(Ok(()), |_| Err(refusal()))
    }

    /// Whether the rename is done.
    pub fn rename_point() -> io::Result<bool> {
        match next()? {
            None => Ok(true),
            Some(Fault::Lost) => Ok(false),
            Some(_) => Err(refusal()),
        }
    }

    /// How many of `len` bytes are written; the rest is refused.
    pub fn write_point(len: usize) -> io::Result<usize> {
        match next()? {
            None => Ok(len),
            Some(Fault::Short) if len > 1 => {
                NEXT.set(Some((Fault::Refused, 0)));
                Ok(len / 2)
            }
            Some(_) => Err(refusal()),
        }
    }
}

/// A directory of its own for one test, removed at its end.
#[cfg(any(test, feature = "testing"))]
#[allow(clippy::unwrap_used, missing_docs)]
pub mod testing {
    use core::sync::atomic::{AtomicU32, Ordering};
    use std::path::{Path, PathBuf};

    #[derive(Debug)]
    pub struct TempDir(PathBuf);

    impl Default for TempDir {
        fn default() -> Self {
            Self::new()
        }
    }

    impl TempDir {
        pub fn new() -> Self {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let n = COUNT.fetch_add(1, Ordering::Relaxed);
            let dir = std::env::temp_dir().join(format!("bdia-test-{}-{n}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        }

        pub fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::TempDir;
    use super::*;
    use std::fs;

    #[test]
    fn a_failed_write_leaves_the_old_content() {
        let dir = TempDir::new();
        let path = dir.file("a", b"old");
        let failed = write_atomic(&path, |out| {
            out.write_all(b"half of the n").unwrap();
            Err(FileError::io(&path, "write it", io::Error::other("disk full")))
        });
        assert!(failed.unwrap_err().to_string().contains("disk full"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        write_bytes(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn every_fault_of_the_disk_leaves_the_old_content_or_the_new() {
        use super::faults::{Fault, arm, disarm};
        for fault in [Fault::Refused, Fault::Short, Fault::Stopped, Fault::Lost] {
            for n in 0.. {
                let dir = TempDir::new();
                let path = dir.file("a", b"old");
                arm(fault, n);
                let done = write_bytes(&path, b"the new");
                let happened = disarm();
                let found = fs::read(&path).unwrap();
                assert!(found == b"old" || found == b"the new", "{fault:?} {n}");
                // Only a directory that cannot be synced leaves the question open.
                assert!(done.is_err() || fault == Fault::Lost || found == b"the new");
                if !happened {
                    assert!(n > 3 && done.is_ok());
                    break;
                }
                write_bytes(&path, b"the new").unwrap();
                assert_eq!(fs::read(&path).unwrap(), b"the new");
            }
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_are_not_followed() {
        let dir = TempDir::new();
        let (other, path) = (dir.file("other", b"other"), dir.path().join("a"));
        std::os::unix::fs::symlink(&other, &path).unwrap();
        // A name that the old version would have used.
        std::os::unix::fs::symlink(&other, dir.path().join("a.tmp")).unwrap();
        write_bytes(&path, b"new").unwrap();
        assert_eq!(fs::read(&other).unwrap(), b"other");
        assert!(!fs::symlink_metadata(&path).unwrap().is_symlink());
    }

    #[test]
    fn limits_and_absent_files() {
        let dir = TempDir::new();
        let path = dir.file("a", b"12345");
        assert_eq!(read_limited(&path, 5).unwrap(), b"12345");
        assert!(matches!(
            read_limited(&path, 4),
            Err(FileError::TooLarge { found: 5, limit: 4, .. })
        ));
        assert!(matches!(read_limited(&dir.path().join("b"), 4), Err(FileError::Io { .. })));
        assert!(read_limited(dir.path(), 1 << 20).is_err());
        assert!(write_bytes(&dir.path().join("no/such"), b"").is_err());
    }
}
