//! Reads past the page cache: what suits the device goes straight into the slot, the rest through aligned memory of the
//! thread. One request at a time; several loader threads keep the disk busy. `store::open` makes it.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use super::{
    os::{self, ALIGN},
    pread::regular,
    span::{Piece, pieces, scatter, straight, with_bounce},
    storage::{Io, Read, Storage},
};

/// Memory of a thread for reads that are not straight, and the longest of them.
const BOUNCE: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    name: String,
    len: u64,
}

impl Direct {
    /// `Unsupported` if the file system has no direct I/O; some say so at the first read only, so that is tried.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = os::open_direct(path)?;
        let len = regular(path, &file)?;
        let probe = with_bounce(BOUNCE, |bounce| file.read_at(&mut bounce[..ALIGN], 0));
        probe.map_err(os::unsupported)?;
        Ok(Self { file, name: path.display().to_string(), len })
    }

    /// Reads at least the first `needed` bytes of `into`.
    fn fill(&self, into: &mut [u8], offset: u64, needed: usize) -> io::Result<()> {
        let mut got = 0;
        while got < needed {
            match self.file.read_at(&mut into[got..], offset + got as u64) {
                // The device reads whole blocks, so a part of one is the file's end.
                Ok(read) if read == 0 || got + read < needed && !read.is_multiple_of(ALIGN) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(read) => got += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Storage for Direct {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn kind(&self) -> Io {
        Io::Direct
    }

    fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
        for read in reads.iter_mut().filter(|read| straight(read)) {
            let needed = read.into.len();
            self.fill(read.into, read.offset, needed)?;
        }
        let pieces = pieces(reads, BOUNCE);
        if pieces.is_empty() {
            return Ok(());
        }
        with_bounce(BOUNCE, |bounce| {
            pieces.into_iter().try_for_each(|Piece { offset, len, needed }| {
                self.fill(&mut bounce[..len], offset, needed)?;
                scatter(offset, &bounce[..needed], reads);
                Ok(())
            })
        })
    }
}
