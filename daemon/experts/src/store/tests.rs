//! Every way of reading against the file's bytes: aligned and odd offsets, lengths and memory, the file's tail, what lies
//! beyond it, and files that get shorter.

use super::*;
use proptest::prelude::*;
use std::path::PathBuf;
use tempfile::TempDir;

/// Not a multiple of anything: two pieces of every kind of bounce, and a tail.
const LEN: usize = (9 << 20) + 12_345;

fn byte(at: usize) -> u8 {
    (at ^ (at >> 8).wrapping_mul(113) ^ (at >> 16).wrapping_mul(71)) as u8
}

fn file(len: usize) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("experts");
    std::fs::write(&path, (0..len).map(byte).collect::<Vec<_>>()).unwrap();
    (dir, path)
}

/// In each way that this system has; buffered reads are had everywhere.
fn each_kind(path: &Path) -> Vec<Box<dyn Storage>> {
    let opened = Io::ALL.map(|(name, io)| (name, io, open(path, io)));
    let kinds: Vec<_> = opened
        .into_iter()
        .filter_map(|(name, io, storage)| match storage {
            Ok(storage) => {
                assert!(storage.kind() == io || io == Io::Auto, "{name}");
                Some(storage)
            }
            Err(error) => {
                assert!(matches!(io, Io::Direct | Io::Uring), "{name}: {error}");
                None
            }
        })
        .collect();
    assert!(kinds.len() >= 3);
    kinds
}

/// Reads (offset, length, distance of the memory from an aligned address) in one batch.
fn read(storage: &dyn Storage, wanted: &[(u64, usize, usize)]) -> io::Result<Vec<Vec<u8>>> {
    let mut memory: Vec<Vec<u8>> = wanted.iter().map(|&(_, len, _)| vec![0xEE; len + 2 * 4096]).collect();
    let places: Vec<usize> =
        memory.iter().zip(wanted).map(|(bytes, &(_, _, shift))| bytes.as_ptr().addr().wrapping_neg() % 4096 + shift).collect();
    let mut reads: Vec<_> = memory
        .iter_mut()
        .zip(wanted)
        .zip(&places)
        .map(|((bytes, &(offset, len, _)), &at)| Read { offset, into: &mut bytes[at..at + len] })
        .collect();
    storage.read(&mut reads)?;
    let parts = memory.iter().zip(wanted).zip(&places).map(|((bytes, &(_, len, _)), &at)| bytes[at..at + len].to_vec());
    Ok(parts.collect())
}

fn check(storage: &dyn Storage, wanted: &[(u64, usize, usize)]) {
    let got = read(storage, wanted).unwrap_or_else(|error| panic!("{:?} {wanted:?}: {error}", storage.kind()));
    for (bytes, &(offset, len, _)) in got.iter().zip(wanted) {
        let right = bytes.iter().zip(offset as usize..).all(|(got, at)| *got == byte(at));
        assert!(bytes.len() == len && right, "{:?}: {len} bytes at {offset} of {wanted:?}", storage.kind());
    }
}

#[test]
fn every_kind_reads_the_same_bytes() {
    let (_dir, path) = file(LEN);
    for storage in each_kind(&path) {
        let storage = &*storage;
        assert_eq!((storage.len(), storage.name()), (LEN as u64, path.to_str().unwrap()));
        check(storage, &[]);
        check(storage, &[(0, 4096, 0)]);
        check(storage, &[(8192, 3 << 20, 0)]); // straight, in several requests
        check(storage, &[(8192, 8192, 1)]); // the memory is odd
        check(storage, &[(8193, 8192, 0)]); // the offset is odd
        check(storage, &[(8192, 8191, 0)]); // the length is odd
        check(storage, &[(3, 9 << 20, 5)]); // more than any bounce holds
        check(storage, &[(LEN as u64 - 1, 1, 0)]);
        check(storage, &[(LEN as u64 - 5000, 5000, 64)]);
        check(storage, &[(70_000, 100, 3), (4096, 4096, 0), (100, 5000, 64), (70_050, 300, 9), (LEN as u64 - 7, 7, 1), (5, 0, 0)]);
        let many: Vec<_> = (0..200).map(|i| (i * 40_009 % (8 << 20), 100 + i as usize * 31, i as usize % 70)).collect();
        check(storage, &many);
    }
}

#[test]
fn what_is_not_there_is_the_files_end() {
    for len in [LEN, 3 * 4096] {
        let (_dir, path) = file(len);
        for storage in each_kind(&path) {
            let len = len as u64;
            for wanted in [(len, 1, 0), (len - 1, 2, 0), (len - len % 4096 - 4096, 3 * 4096, 0), (len + 100_000, 4096, 0), (len - 9, 10, 7)]
            {
                let error = read(&*storage, &[(0, 4096, 0), wanted]).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{:?} {wanted:?}", storage.kind());
            }
            check(&*storage, &[(17, 4096, 0)]);
        }
    }
}

#[test]
fn a_file_that_gets_shorter_is_an_error() {
    let (_dir, path) = file(100_000);
    for storage in each_kind(&path) {
        std::fs::write(&path, (0..100_000).map(byte).collect::<Vec<_>>()).unwrap();
        check(&*storage, &[(60_000, 30_000, 0)]);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(70_000).unwrap();
        let error = read(&*storage, &[(60_000, 30_000, 0)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{:?}", storage.kind());
        check(&*storage, &[(60_000, 10_000, 0)]);
    }
}

#[test]
fn a_trial_measures_what_there_is() {
    let (_dir, path) = file(1 << 20);
    let spans: Vec<_> = (0..15).map(|i| vec![(i * 65_536, 32_768), (i * 65_536 + 40_001, 7)]).collect();
    let Measured { best, tried } = measure(&path, &spans, 2);
    assert_eq!(tried.len(), 4);
    assert!(tried.iter().all(|(_, result)| result.as_ref().is_err() || result.as_ref().is_ok_and(|speed| *speed > 0.0)), "{tried:?}");
    assert!(best != Io::Mmap && best != Io::Auto && tried.iter().any(|(io, result)| *io == best && result.is_ok()), "{best} {tried:?}");
    let nothing = measure(&path.with_extension("absent"), &spans, 2);
    assert!(nothing.tried.iter().all(|(_, result)| result.is_err()));
}

#[test]
fn ways_of_reading_have_names() {
    for (name, io) in Io::ALL {
        assert_eq!((name.parse(), io.to_string()), (Ok(io), name.to_owned()));
    }
    let error = "fast".parse::<Io>().unwrap_err();
    assert_eq!(error, "`fast` is not one of auto, direct, buffered, uring, mmap");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_batch_reads_the_same_bytes(wanted in proptest::collection::vec((0u64..300_000, 0usize..60_000, 0usize..4096), 1..12)) {
        let (_dir, path) = file(360_000);
        for storage in each_kind(&path) {
            check(&*storage, &wanted);
        }
    }
}
