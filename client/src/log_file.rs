//! `$FLASH_HOME/log/flashd.log`, where a daemon that flashctl starts writes: opened for it, and read back from the end.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use flash_proto::socket;

/// At a start, a log longer than this becomes `flashd.log.1`.
const ROTATE_BYTES: u64 = 16 << 20;
/// More than anyone wants to see of the end of a log.
const TAIL_BYTES: u64 = 1 << 20;

pub(crate) fn path() -> Result<PathBuf, socket::Error> {
    Ok(socket::home()?.join("log/flashd.log"))
}

/// For appending, readable by its owner only; with its length now.
pub(crate) fn open(path: &Path) -> io::Result<(File, u64)> {
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    if fs::metadata(path).is_ok_and(|found| found.len() > ROTATE_BYTES) {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

/// The last `lines` lines written at or after byte `from`, and where the next ones begin.
pub(crate) fn tail(path: &Path, from: u64, lines: usize) -> io::Result<(String, u64)> {
    let mut file = File::open(path)?;
    let end = file.metadata()?.len();
    let start = from.min(end).max(end.saturating_sub(TAIL_BYTES));
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(end - start).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let skipped = text.lines().count().saturating_sub(lines);
    Ok((text.split_inclusive('\n').skip(skipped).collect(), end))
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn the_end_of_a_log_is_read_back() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("log/flashd.log");
        let (mut file, at) = open(&path).expect("a new log");
        assert_eq!(at, 0);
        assert_eq!(fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o600);
        file.write_all(b"one\ntwo\nthree").expect("written");
        let check = |from, lines, expected: &str| assert_eq!(tail(&path, from, lines).expect("read"), (expected.into(), 13));
        check(0, 10, "one\ntwo\nthree");
        check(0, 2, "two\nthree");
        check(4, 9, "two\nthree");
        check(99, 9, "");
        assert_eq!(open(&path).expect("the same log").1, 13);
    }
}
