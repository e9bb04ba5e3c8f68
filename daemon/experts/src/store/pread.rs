//! Buffered positional reads of one file. No mapping (a file cut short would be a SIGBUS instead of an error) and no
//! state between reads. Whoever opens a checkpoint makes one per file for its `Source`.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use rustix::fs::{Mode, OFlags};

use super::{
    os,
    storage::{Read, Storage},
};

#[derive(Debug)]
pub struct Pread {
    file: File,
    name: String,
    len: u64,
}

impl Pread {
    /// Refuses everything but a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        let len = regular(path, &file)?;
        os::expect_jumps(&file)?;
        Ok(Self { file, name: path.display().to_string(), len })
    }
}

pub(super) fn open(path: &Path) -> io::Result<File> {
    // NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for regular files.
    Ok(File::from(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?))
}

/// Its length, if it is a regular file.
pub(super) fn regular(path: &Path, file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    match metadata.is_file() {
        true => Ok(metadata.len()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a regular file", path.display()))),
    }
}

impl Storage for Pread {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
        reads.iter_mut().try_for_each(|read| self.file.read_exact_at(read.into, read.offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_whole_or_fail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bytes");
        std::fs::write(&path, [0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        let storage = Pread::open(&path).unwrap();
        assert_eq!((storage.len(), storage.name()), (8, path.to_str().unwrap()));
        let check = |offsets: [u64; 2], expected: Result<[u8; 6], io::ErrorKind>| {
            let mut bytes = [0; 6];
            let (a, b) = bytes.split_at_mut(3);
            let read = storage.read(&mut [Read { offset: offsets[0], into: a }, Read { offset: offsets[1], into: b }]);
            assert_eq!(read.map(|()| bytes).map_err(|e| e.kind()), expected);
        };
        check([5, 0], Ok([5, 6, 7, 0, 1, 2]));
        check([0, 6], Err(io::ErrorKind::UnexpectedEof));
        check([8, 0], Err(io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Pread::open(dir.path()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Pread::open(&dir.path().join("absent")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(Pread::open(Path::new("/dev/zero")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
