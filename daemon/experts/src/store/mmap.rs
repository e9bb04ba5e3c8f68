//! Bytes copied out of a mapping: page faults do the reading. Only to compare with, never chosen by `auto`: a fault is small
//! and waits alone, and a file that somebody shortens between the check and the copy ends the process by SIGBUS, which no
//! error can stand for. `store::open` makes it when asked by name.

use std::{fs::File, io, path::Path};

use memmap2::{Advice, Mmap};

use super::{
    pread::{open, regular},
    storage::{Io, Read, Storage},
};

#[derive(Debug)]
pub(super) struct Mapped {
    map: Mmap,
    file: File,
    name: String,
}

impl Mapped {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        regular(path, &file)?;
        // SAFETY: the mapping is read by copies alone, each after a look at the file's length. Somebody may still write to
        // the file meanwhile; bytes are plain numbers to us whatever they are, and no reference to them is kept.
        let map = unsafe { Mmap::map(&file)? };
        map.advise(Advice::Random)?;
        Ok(Self { map, file, name: path.display().to_string() })
    }
}

impl Storage for Mapped {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.map.len() as u64
    }

    fn kind(&self) -> Io {
        Io::Mmap
    }

    fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
        for read in reads {
            let end = read.offset.checked_add(read.into.len() as u64).filter(|end| *end <= self.len());
            let (Some(end), len) = (end, self.file.metadata()?.len()) else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            if end > len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            read.into.copy_from_slice(&self.map[read.offset as usize..end as usize]);
        }
        Ok(())
    }
}
