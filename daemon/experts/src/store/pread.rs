//! Buffered positional reads of one file. No mapping (a file cut short would be a SIGBUS instead of an error) and no
//! state between reads. Whoever opens a checkpoint makes one per file for its `Source`.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use rustix::fs::{Mode, OFlags};

use super::storage::{Read, Storage};

#[derive(Debug)]
pub struct Pread {
    file: File,
    name: String,
    len: u64,
}

impl Pread {
    /// Refuses everything but a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        // NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for regular files.
        let file = File::from(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a regular file", path.display())));
        }
        // Routing jumps about: read-ahead would spend the disk on experts nobody asked for.
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
        Ok(Self { file, name: path.display().to_string(), len: metadata.len() })
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
