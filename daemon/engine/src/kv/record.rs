//! A KV block as a file: written to a name of its own and put in place whole. The bytes, little-endian
//! but for the numbers of the layers themselves (they are this machine's, which the key says):
//!
//! ```text
//! 0   magic "FLASHKV1"            8
//! 8   key of the block            32
//! 40  layers n                    8
//! 48  n × (bytes, XXH3-64)        16 each
//!     XXH3-64 of all of the above 8
//!     the layers' bytes, one after the other
//! ```
//!
//! Who reads knows the key and the layers' sizes, so there is one right header for the bytes behind it; anything else is not a block that we wrote.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, SystemTime},
};

use twox_hash::XxHash3_64;

use super::disk::Key;

const MAGIC: &[u8; 8] = b"FLASHKV1";
/// Bytes before the layers' own, with none.
const HEADER: usize = 56;

/// What stands before the layers' bytes.
fn header(key: &Key, layers: impl Iterator<Item = (u64, u64)>) -> Vec<u8> {
    let mut header = [MAGIC, &key[..], &[0; 8]].concat();
    let mut count = 0u64;
    for (bytes, checksum) in layers {
        header.extend(bytes.to_le_bytes());
        header.extend(checksum.to_le_bytes());
        count += 1;
    }
    header[40..48].copy_from_slice(&count.to_le_bytes());
    let checksum = XxHash3_64::oneshot(&header);
    header.extend(checksum.to_le_bytes());
    header
}

/// Bytes of a block's file.
pub(super) fn size(layers: &[usize]) -> u64 {
    (HEADER + 16 * layers.len() + layers.iter().sum::<usize>()) as u64
}

/// A reader sees the whole file or none. `used` is when the block was last wanted, microseconds since 1970.
pub(super) fn write(path: &Path, key: &Key, used: u64, layers: &[usize], payload: &[u8]) -> io::Result<()> {
    let header = header(key, parts(layers, payload));
    // One at a time is written, so one name will do.
    let part = path.with_file_name(PART);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        file.write_all(&header)?;
        file.write_all(payload)?;
        file.set_modified(time(used))?;
        fs::rename(&part, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

/// Name of a file that is not whole yet.
pub(super) const PART: &str = "block.part";

/// The layers' bytes, one after the other; an error is about a file that is not what was written, or none.
pub(super) fn read(path: &Path, key: &Key, layers: &[usize]) -> io::Result<Vec<u8>> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()));
    let mut file = File::open(path)?;
    if file.metadata()?.len() != size(layers) {
        return Err(wrong("it is not as long as a block of this model"));
    }
    let mut head = vec![0; HEADER + 16 * layers.len()];
    file.read_exact(&mut head)?;
    let mut payload = vec![0; layers.iter().sum()];
    file.read_exact(&mut payload)?;
    if header(key, parts(layers, &payload)) != head {
        return Err(wrong("it is not what was written for this block"));
    }
    Ok(payload)
}

/// Sizes and checksums.
fn parts<'a>(layers: &'a [usize], mut payload: &'a [u8]) -> impl Iterator<Item = (u64, u64)> {
    layers.iter().map(move |bytes| {
        let part;
        (part, payload) = payload.split_at(*bytes);
        (part.len() as u64, XxHash3_64::oneshot(part))
    })
}

/// Notes when a block was last wanted, for the next daemon.
pub(super) fn touch(path: &Path, used: u64) {
    if let Ok(file) = File::open(path) {
        let _ = file.set_modified(time(used));
    }
}

fn time(used: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(used)
}
