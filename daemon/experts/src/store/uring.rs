//! Reads past the page cache by io_uring: all requests of a batch are with the disk at once, so that one thread keeps it
//! busy. A ring belongs to the thread that reads. Where the kernel or a sandbox refuses rings, opening is an error that
//! `auto` passes over. Linux only.

use std::{
    cell::RefCell,
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
};

use io_uring::{IoUring, opcode, types::Fd};

use super::{
    os::{self, ALIGN},
    pread::regular,
    span::{Piece, pieces, scatter, straight, with_bounce},
    storage::{Io, Read, Storage},
};

/// Requests in flight at most.
const ENTRIES: usize = 64;
/// Longer reads are cut, so that a single record is several requests.
const PIECE: usize = 512 << 10;
/// Memory of a thread for reads that are not straight.
const BOUNCE: usize = 4 << 20;

thread_local! {
    static RING: RefCell<Option<IoUring>> = const { RefCell::new(None) };
}

#[derive(Debug)]
pub(super) struct Uring {
    file: File,
    name: String,
    len: u64,
}

/// Memory to be filled from the file.
struct Request {
    offset: u64,
    into: *mut u8,
    len: usize,
    needed: usize,
    got: usize,
}

impl Uring {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = os::open_direct(path)?;
        let len = regular(path, &file)?;
        let probe = with_bounce(BOUNCE, |bounce| file.read_at(&mut bounce[..ALIGN], 0));
        probe.map_err(os::unsupported)?;
        let opened = Self { file, name: path.display().to_string(), len };
        opened.with_ring(|_| Ok(()))?;
        Ok(opened)
    }

    /// This thread's ring; one that failed is not used again, because requests may still be queued in it.
    fn with_ring<T>(&self, act: impl FnOnce(&mut IoUring) -> io::Result<T>) -> io::Result<T> {
        RING.with_borrow_mut(|slot| {
            let ring = match slot {
                Some(ring) => ring,
                None => slot.insert(IoUring::new(ENTRIES as u32)?),
            };
            let result = act(ring);
            if result.is_err() {
                *slot = None;
            }
            result
        })
    }

    /// Reads all of these; returns when the kernel has let go of every request's memory, whatever became of them.
    ///
    /// # Safety
    /// Every request's memory is writable for its length, and nobody else uses it meanwhile.
    unsafe fn run(&self, ring: &mut IoUring, requests: &mut [Request]) -> io::Result<()> {
        let mut failed = None;
        for wave in requests.chunks_mut(ENTRIES) {
            let mut flying = 0;
            let mut ready: Vec<usize> = (0..wave.len()).collect();
            while flying > 0 || !ready.is_empty() {
                for index in ready.drain(..) {
                    // SAFETY: the caller's promise for the memory; the loop ends only when nothing flies.
                    unsafe { self.push(ring, &wave[index], index) };
                    flying += 1;
                }
                if let Err(error) = ring.submit_and_wait(1)
                    && error.kind() != io::ErrorKind::Interrupted
                {
                    // What the kernel has not taken never will be; the rest must come back first.
                    let queued = ring.submission().len();
                    failed.get_or_insert(error);
                    if flying == queued {
                        return failed.map_or(Ok(()), Err);
                    }
                    std::thread::yield_now();
                }
                for entry in ring.completion() {
                    flying -= 1;
                    let index = entry.user_data() as usize;
                    match wave[index].completed(entry.result()) {
                        Ok(true) => {}
                        Ok(false) if failed.is_none() => ready.push(index),
                        Ok(false) => {}
                        Err(error) => _ = failed.get_or_insert(error),
                    }
                }
            }
            if failed.is_some() {
                break;
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Queues what a request still lacks.
    ///
    /// # Safety
    /// The request's memory is the kernel's until the completion.
    unsafe fn push(&self, ring: &mut IoUring, request: &Request, index: usize) {
        // SAFETY: got ≤ len, so the pointer stays in the request's memory.
        let into = unsafe { request.into.add(request.got) };
        let read = opcode::Read::new(Fd(self.file.as_raw_fd()), into, (request.len - request.got) as u32);
        let entry = read.offset(request.offset + request.got as u64).build().user_data(index as u64);
        // SAFETY: the file is open and the memory valid until the completion: the caller's promise.
        unsafe { ring.submission().push(&entry) }.expect("a wave has no more requests than the ring has entries");
    }
}

impl Request {
    /// Takes a completion's result: true when the request is whole.
    fn completed(&mut self, result: i32) -> io::Result<bool> {
        let Ok(read) = usize::try_from(result) else {
            let error = io::Error::from_raw_os_error(-result);
            return match error.kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Ok(false),
                _ => Err(error),
            };
        };
        self.got += read;
        match self.got >= self.needed {
            true => Ok(true),
            // As for direct reads: a part of a block is the file's end.
            false if read == 0 || !read.is_multiple_of(ALIGN) => Err(io::ErrorKind::UnexpectedEof.into()),
            false => Ok(false),
        }
    }
}

impl Storage for Uring {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn kind(&self) -> Io {
        Io::Uring
    }

    fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
        let mut requests = Vec::new();
        for read in reads.iter_mut().filter(|read| straight(read)) {
            for (number, part) in read.into.chunks_mut(PIECE).enumerate() {
                let offset = read.offset + (number * PIECE) as u64;
                requests.push(Request { offset, into: part.as_mut_ptr(), len: part.len(), needed: part.len(), got: 0 });
            }
        }
        let pieces = pieces(reads, PIECE);
        with_bounce(BOUNCE, |bounce| {
            // The first wave carries the straight reads as well; mostly it is the only one.
            for wave in pieces.chunks(BOUNCE / PIECE).chain(pieces.is_empty().then_some(&[][..])) {
                for (Piece { offset, len, needed }, part) in wave.iter().zip(bounce.chunks_mut(PIECE)) {
                    requests.push(Request { offset: *offset, into: part.as_mut_ptr(), len: *len, needed: *needed, got: 0 });
                }
                // SAFETY: parts of the callers' memory and of the thread's, no two of them overlapping, all borrowed
                // mutably here; `run` comes back when the kernel is done with them.
                self.with_ring(|ring| unsafe { self.run(ring, &mut requests) })?;
                requests.clear();
                for (piece, part) in wave.iter().zip(bounce.chunks(PIECE)) {
                    scatter(piece.offset, &part[..piece.needed], reads);
                }
            }
            Ok(())
        })
    }
}
