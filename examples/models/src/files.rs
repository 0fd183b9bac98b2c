//! Reading within limits and writing atomically.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

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
/// directory.
///
/// # Errors
/// [`FileError`], or what `write` returns; the temporary file is removed and `path` is untouched
/// then.
pub fn write_atomic<E: From<FileError>>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
) -> Result<(), E> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".tmp");
    let tmp = path.with_file_name(name);
    let result = (|| {
        let file = File::create(&tmp).map_err(|e| FileError::io(&tmp, "create it", e))?;
        let mut out = BufWriter::with_capacity(1 << 18, file);
        write(&mut out)?;
        out.flush().map_err(|e| FileError::io(&tmp, "write it", e))?;
        out.get_ref().sync_all().map_err(|e| FileError::io(&tmp, "write it to disk", e))?;
        drop(out);
        fs::rename(&tmp, path).map_err(|e| FileError::io(path, "replace it", e))?;
        sync_directory(path)?;
        Ok(())
    })();
    if result.is_err() {
        // Best effort: the error above is the one that matters.
        let _ = fs::remove_file(&tmp);
    }
    result
}

/// [`write_atomic`] of bytes that are at hand.
///
/// # Errors
/// [`FileError`]
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_atomic(path, |out| out.write_all(bytes).map_err(|e| FileError::io(path, "write it", e)))
}

/// A rename is durable only once the directory is on disk.
fn sync_directory(path: &Path) -> Result<(), FileError> {
    #[cfg(unix)]
    {
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir)
            .and_then(|d| d.sync_all())
            .map_err(|e| FileError::io(dir, "write the directory to disk", e))?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
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
