//! Data files as people have them: plain or packed with gzip, text with a byte order mark or
//! without.
//!
//! Whether a file is packed is told by its first bytes, never by its name. What comes out is
//! bounded like what goes in.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::{GzDecoder, MultiGzDecoder};

use crate::files::{FileError, read_limited};

/// A data file that cannot be used, whatever is in it.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not what its first bytes say.
    #[error("{}: it begins like a gzip file, but cannot be unpacked: {what}", path.display())]
    Gzip {
        /// The file.
        path: PathBuf,
        /// What the library says.
        what: String,
    },
    /// Unpacked, it is larger than any such file.
    #[error("{}: more than {limit} bytes when unpacked; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most that is read.
        limit: u64,
    },
    /// It is not text.
    #[error(
        "{}, line {line}: not valid UTF-8; convert the file, for example with iconv (byte {at} \
         does not fit{hint})",
        path.display()
    )]
    Encoding {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The first byte that is wrong.
        at: usize,
        /// What the file may be.
        hint: &'static str,
    },
}

/// The content of a file, unpacked; at most `limit` bytes of it.
///
/// # Errors
/// [`InputError`]
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>, InputError> {
    unpack(path, read_limited(path, limit)?, limit)
}

/// Unpacks what begins like a gzip file. The path is for errors.
///
/// # Errors
/// [`InputError::Gzip`], [`InputError::TooLarge`]
pub fn unpack(path: &Path, bytes: Vec<u8>, limit: u64) -> Result<Vec<u8>, InputError> {
    if !is_gzip(&bytes) {
        return Ok(bytes);
    }
    let mut plain = Vec::new();
    MultiGzDecoder::new(bytes.as_slice())
        .take(limit.saturating_add(1))
        .read_to_end(&mut plain)
        .map_err(|e| InputError::Gzip { path: path.into(), what: e.to_string() })?;
    if plain.len() as u64 > limit {
        return Err(InputError::TooLarge { path: path.into(), limit });
    }
    Ok(plain)
}

/// Whether a file that begins with these bytes is packed with gzip: two bytes may be the first of
/// anything, so its whole header has to be there and valid.
pub fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0x1f, 0x8b]) && GzDecoder::new(bytes).header().is_some()
}

/// What a file has, unpacked, and read piece by piece: for formats that say how much there must be.
pub struct Pieces<'a> {
    path: &'a Path,
    from: Box<dyn Read + 'a>,
}

impl<'a> Pieces<'a> {
    /// Of an open file, packed or plain. The path is for errors.
    ///
    /// # Errors
    /// [`FileError::Io`]
    pub fn new(path: &'a Path, from: impl Read + 'a) -> Result<Self, FileError> {
        let mut from = BufReader::new(from);
        let head = from.fill_buf().map_err(|e| FileError::io(path, "read it", e))?;
        let from: Box<dyn Read + 'a> =
            if is_gzip(head) { Box::new(MultiGzDecoder::new(from)) } else { Box::new(from) };
        Ok(Self { path, from })
    }

    /// The next bytes: `most` of them, fewer where the file ends.
    ///
    /// # Errors
    /// [`FileError::Io`], for what cannot be unpacked too.
    pub fn next(&mut self, most: u64) -> Result<Vec<u8>, FileError> {
        let mut bytes = Vec::new();
        let read = self.from.by_ref().take(most).read_to_end(&mut bytes);
        read.map_err(|e| FileError::io(self.path, "read it", e))?;
        Ok(bytes)
    }
}

/// Bytes as text, without a byte order mark. The path is for errors.
///
/// # Errors
/// [`InputError::Encoding`]
pub fn text(path: &Path, bytes: Vec<u8>) -> Result<String, InputError> {
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let (bytes, at) = (e.as_bytes(), e.utf8_error().valid_up_to());
        let wide = bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]);
        InputError::Encoding {
            path: path.into(),
            line: 1 + bytes[..at].iter().filter(|&&b| b == b'\n').count(),
            at,
            hint: if wide { "; it begins like UTF-16" } else { "" },
        }
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// The text of a file of at most `limit` bytes, packed or not.
///
/// # Errors
/// [`InputError`]
pub fn read_text(path: &Path, limit: u64) -> Result<String, InputError> {
    text(path, read(path, limit)?)
}

/// The ending that says what a file is, in lower case: `csv` of `A.CSV` and of `a.csv.gz`.
pub fn ending(path: &Path) -> String {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.rsplit_once('.').map(|(_, ending)| ending.to_owned()).unwrap_or_default()
}

/// The line, from 1, on which a row of a table begins. A reader of tables says where it began to
/// look for it, at `byte` of the text and on `line`: there may be empty lines before it.
pub fn line_of_row(text: &str, byte: u64, line: u64) -> u64 {
    let from = usize::try_from(byte).unwrap_or(usize::MAX).min(text.len());
    let rest = &text.as_bytes()[from..];
    let empty = rest.iter().take_while(|b| matches!(b, b'\r' | b'\n'));
    line + empty.filter(|&&b| b == b'\n').count() as u64
}

/// The line, from 1, of a quote of a CSV that is never closed: a reader of tables takes all that
/// follows it for one field.
pub fn open_quote(text: &str) -> Option<u64> {
    let (mut line, mut opened, mut quoted, mut in_field) = (1, 1, false, false);
    let mut bytes = text.bytes().peekable();
    while let Some(b) = bytes.next() {
        match b {
            b'"' if quoted && bytes.peek() == Some(&b'"') => drop(bytes.next()),
            b'"' if quoted => quoted = false,
            b'"' if !in_field => (quoted, opened) = (true, line),
            _ => {}
        }
        // A quote means something only where a field begins.
        in_field = quoted || !matches!(b, b',' | b'\n' | b'\r');
        line += u64::from(b == b'\n');
    }
    quoted.then_some(opened)
}

/// Names in a message: they come from outside, so there may be many and long ones.
pub fn list(names: &[String]) -> String {
    const MOST: usize = 20;
    if names.is_empty() {
        return "none".into();
    }
    let short = |n: &String| format!("\"{}\"", n.chars().take(60).collect::<String>());
    let mut text = names.iter().take(MOST).map(short).collect::<Vec<_>>().join(", ");
    if names.len() > MOST {
        text += &format!(" and {} more", names.len() - MOST);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempDir;
    use std::io::Write;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    #[test]
    fn packed_files_are_known_by_their_content() {
        let dir = TempDir::new();
        // A name says nothing, several members follow each other, and the limit is exact.
        let twice = [packed(b"one "), packed(b"two")].concat();
        for name in ["a.txt", "a.txt.gz"] {
            assert_eq!(read(&dir.file(name, &twice), 64).unwrap(), b"one two");
            assert_eq!(read(&dir.file(name, b"plain"), 64).unwrap(), b"plain");
        }
        let bomb = dir.file("bomb.gz", &packed(&[b'a'; 1 << 16]));
        assert_eq!(read(&bomb, 1 << 16).unwrap().len(), 1 << 16);
        assert!(matches!(read(&bomb, (1 << 16) - 1), Err(InputError::TooLarge { .. })));
        let mut cut = packed(b"some words");
        cut.truncate(12);
        let error = read(&dir.file("cut", &cut), 64).unwrap_err();
        assert!(matches!(&error, InputError::Gzip { .. }) && error.to_string().contains("cut"));
        // The two first bytes alone say nothing: another method, flags that do not exist, a field
        // that does not end.
        for plain in [&b"\x1f\x8b"[..], b"\x1f\x8b\x09\0", b"\x1f\x8b\x08\x20", b"\x1f\x8b\x08\x08"]
        {
            let plain = [plain, &[1; 20]].concat();
            assert!(!is_gzip(&plain));
            assert_eq!(read(&dir.file("tokens", &plain), 64).unwrap(), plain);
        }
    }

    #[test]
    fn pieces_of_packed_and_plain_files() {
        let path = Path::new("a");
        let twice = [packed(b"one "), packed(b"two")].concat();
        for bytes in [&twice[..], b"one two"] {
            let mut pieces = Pieces::new(path, bytes).unwrap();
            assert_eq!(
                [5, 1, 9, 9].map(|n| pieces.next(n).unwrap()),
                [&b"one t"[..], b"w", b"o", b""]
            );
        }
        let error = Pieces::new(path, &twice[..15]).unwrap().next(9).unwrap_err();
        assert!(error.to_string().starts_with("a: cannot read it"), "{error}");
    }

    #[test]
    fn text_has_no_mark_and_names_what_is_wrong() {
        let path = Path::new("a.txt");
        assert_eq!(text(path, "\u{feff}a\u{feff}".into()).unwrap(), "a\u{feff}");
        let error = text(path, b"a\nb\n\xff".to_vec()).unwrap_err();
        assert!(matches!(error, InputError::Encoding { line: 3, at: 4, hint: "", .. }));
        let error = text(path, b"\xff\xfea\0".to_vec()).unwrap_err().to_string();
        assert!(error.contains("UTF-16") && error.contains("a.txt, line 1"), "{error}");
    }

    #[test]
    fn endings() {
        for (name, expected) in
            [("a.CSV", "csv"), ("a.tsv.GZ", "tsv"), ("b.gz", ""), ("none", ""), ("x.tar.gz", "tar")]
        {
            assert_eq!(ending(Path::new(name)), expected, "{name}");
        }
        let text = "a\n\r\n\nb\n";
        assert_eq!([0, 2, 6].map(|byte| line_of_row(text, byte, 2)), [2, 4, 3]);
        let many: Vec<String> = (0..25).map(|i| i.to_string()).collect();
        assert!(list(&many).ends_with("\"19\" and 5 more"));
    }
}
