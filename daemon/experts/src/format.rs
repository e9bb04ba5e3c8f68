//! The expert store's bytes, as FORMAT.md describes them: header and index, encoded and decoded over byte slices, every
//! field checked. No file is opened here; `build.rs` writes and reads them.

use twox_hash::XxHash3_64;

use crate::Error;

/// Length of the header; also the least alignment of records.
pub(crate) const HEADER: usize = 4096;
pub(crate) const ALIGNS: [u32; 2] = [4096, 16384];
const MAGIC: [u8; 8] = *b"flashexp";
const VERSION: u32 = 1;
const ENTRY: usize = 32;
/// Where the header's own checksum lies.
const SEAL: usize = HEADER - 8;
const RECORDS_MAX: u64 = 1 << 20;
const PAYLOAD_MAX: u32 = 1 << 30;
const META_MAX: u64 = 64 << 20;

/// XXH3-64 of everything. twox-hash looks for AVX2 when it runs; xxhash-rust would have to be compiled for it, and takes
/// twice the time for a record that is in the cache (23 against 46 GB/s on a Zen 3 core; equal from memory).
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// Consecutive bytes and what they must hash to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) checksum: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) align: u32,
    pub(crate) layers: u32,
    pub(crate) experts: u32,
    /// Of the file.
    pub(crate) len: u64,
    pub(crate) index: Part,
    pub(crate) meta: Part,
}

/// One expert of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub offset: u64,
    pub payload: u32,
    pub checksum: u64,
}

/// What is wrong with which field; the caller knows the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bad {
    field: &'static str,
    reason: String,
}

impl Bad {
    pub(crate) fn of(field: &'static str, reason: impl Into<String>) -> Self {
        Self { field, reason: reason.into() }
    }

    pub(crate) fn in_file(self, file: &str) -> Error {
        Error::Store { file: file.into(), field: self.field, reason: self.reason }
    }
}

impl Header {
    /// The header of a file with these records and so much meta; no checksums yet, and where each record lies.
    pub(crate) fn plan(records: &[Vec<u32>], align: u32, meta_len: u64) -> Result<(Self, Vec<u64>), Bad> {
        let (layers, experts) = (records.len() as u64, records.first().map_or(0, Vec::len) as u64);
        check_counts(layers, experts)?;
        check_align(align)?;
        let mut offsets = Vec::with_capacity((layers * experts) as usize);
        let mut end = u64::from(align);
        for list in records {
            if list.len() as u64 != experts {
                return Err(Bad::of("experts", format!("{} in one layer and {experts} in the first", list.len())));
            }
            for payload in list {
                check_payload(*payload)?;
                offsets.push(end);
                end = record_end(end, *payload, align);
            }
        }
        let index = Part { offset: end, len: layers * experts * ENTRY as u64, checksum: 0 };
        let meta = Part { offset: index.offset + index.len, len: meta_len, checksum: 0 };
        check_meta(meta_len)?;
        Ok((Self { align, layers: layers as u32, experts: experts as u32, len: meta.offset + meta.len, index, meta }, offsets))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let Self { align, layers, experts, len, index, meta } = *self;
        let mut bytes = MAGIC.to_vec();
        [VERSION, align, layers, experts].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
        let parts = [len, index.offset, index.len, index.checksum, meta.offset, meta.len, meta.checksum];
        parts.iter().for_each(|field| bytes.extend(field.to_le_bytes()));
        bytes.resize(SEAL, 0);
        bytes.extend(checksum(&bytes).to_le_bytes());
        bytes
    }

    /// `file_len` is the file's true length.
    pub(crate) fn decode(bytes: &[u8], file_len: u64) -> Result<Self, Bad> {
        let Some(bytes) = bytes.get(..HEADER) else {
            return Err(Bad::of("header", format!("the file has {file_len} bytes, fewer than the {HEADER} of a header")));
        };
        if bytes[..8] != MAGIC {
            return Err(Bad::of("magic", "is not `flashexp`: this is no expert store"));
        }
        if u32_at(bytes, 8) != VERSION {
            return Err(Bad::of("version", format!("is {}; this program reads version {VERSION}", u32_at(bytes, 8))));
        }
        if checksum(&bytes[..SEAL]) != u64_at(bytes, SEAL) {
            return Err(Bad::of("header checksum", "does not match the header"));
        }
        let part = |at: usize| Part { offset: u64_at(bytes, at), len: u64_at(bytes, at + 8), checksum: u64_at(bytes, at + 16) };
        let header = Self {
            align: u32_at(bytes, 12),
            layers: u32_at(bytes, 16),
            experts: u32_at(bytes, 20),
            len: u64_at(bytes, 24),
            index: part(32),
            meta: part(56),
        };
        if bytes[80..SEAL].iter().any(|byte| *byte != 0) {
            return Err(Bad::of("reserved", "is not zero"));
        }
        header.check(file_len)?;
        Ok(header)
    }

    pub(crate) fn check(&self, file_len: u64) -> Result<(), Bad> {
        let Self { align, layers, experts, len, index, meta } = *self;
        check_align(align)?;
        check_counts(layers.into(), experts.into())?;
        check_meta(meta.len)?;
        let want = |field, got: u64, expected: Option<u64>| match expected == Some(got) {
            true => Ok(()),
            false => Err(Bad::of(field, format!("is {got}, expected {}", expected.unwrap_or(u64::MAX)))),
        };
        if len != file_len {
            return Err(Bad::of("length", format!("is {len}, but the file has {file_len} bytes")));
        }
        want("index length", index.len, Some(u64::from(layers) * u64::from(experts) * ENTRY as u64))?;
        want("meta offset", meta.offset, index.offset.checked_add(index.len))?;
        want("length", len, meta.offset.checked_add(meta.len))
    }

    /// `bytes` are the index part; an entry per expert, layer by layer.
    pub(crate) fn decode_index(&self, bytes: &[u8]) -> Result<Vec<Entry>, Bad> {
        if bytes.len() as u64 != self.index.len || checksum(bytes) != self.index.checksum {
            return Err(Bad::of("index checksum", "does not match the index"));
        }
        let mut end = u64::from(self.align);
        let mut entries = Vec::with_capacity(bytes.len() / ENTRY);
        for bytes in bytes.chunks_exact(ENTRY) {
            let at = || format!("layer {} expert {}", entries.len() / self.experts as usize, entries.len() % self.experts as usize);
            let entry = Entry { offset: u64_at(bytes, 0), payload: u32_at(bytes, 8), checksum: u64_at(bytes, 16) };
            if entry.offset != end {
                return Err(Bad::of("record offset", format!("is {}, expected {end} ({})", entry.offset, at())));
            }
            check_payload(entry.payload).map_err(|bad| Bad::of(bad.field, format!("{} ({})", bad.reason, at())))?;
            if bytes[12..16] != [0; 4] || bytes[24..] != [0; 8] {
                return Err(Bad::of("record flags", format!("are not zero ({})", at())));
            }
            end = record_end(end, entry.payload, self.align);
            if end > self.index.offset {
                return Err(Bad::of("record payload", format!("reaches to {end}, into the index ({})", at())));
            }
            entries.push(entry);
        }
        match end == self.index.offset {
            true => Ok(entries),
            false => Err(Bad::of("index offset", format!("is {}, but the records end at {end}", self.index.offset))),
        }
    }
}

pub(crate) fn encode_index(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len() * ENTRY);
    for entry in entries {
        bytes.extend(entry.offset.to_le_bytes());
        bytes.extend(entry.payload.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(entry.checksum.to_le_bytes());
        bytes.extend([0; 8]);
    }
    bytes
}

/// `end` is below 2⁵¹ for the most and the largest records, so nothing overflows.
fn record_end(offset: u64, payload: u32, align: u32) -> u64 {
    offset + u64::from(payload.next_multiple_of(align))
}

fn check_align(align: u32) -> Result<(), Bad> {
    match ALIGNS.contains(&align) {
        true => Ok(()),
        false => Err(Bad::of("align", format!("is {align}, expected one of {ALIGNS:?}"))),
    }
}

fn check_counts(layers: u64, experts: u64) -> Result<(), Bad> {
    for (field, count) in [("layers", layers), ("experts", experts)] {
        if !(1..=u64::from(u16::MAX)).contains(&count) {
            return Err(Bad::of(field, format!("is {count}, expected 1 to 65535")));
        }
    }
    match layers * experts <= RECORDS_MAX {
        true => Ok(()),
        false => Err(Bad::of("experts", format!("{layers} layers of {experts} are more than {RECORDS_MAX} records"))),
    }
}

fn check_payload(payload: u32) -> Result<(), Bad> {
    match (1..=PAYLOAD_MAX).contains(&payload) {
        true => Ok(()),
        false => Err(Bad::of("record payload", format!("is {payload}, expected 1 to {PAYLOAD_MAX}"))),
    }
}

fn check_meta(len: u64) -> Result<(), Bad> {
    match len <= META_MAX {
        true => Ok(()),
        false => Err(Bad::of("meta length", format!("is {len}, the limit is {META_MAX}"))),
    }
}

/// The caller has seen that `bytes` is long enough.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> (Header, Vec<u8>) {
        let (mut header, offsets) = Header::plan(&[vec![5000, 1], vec![4096, 70]], 4096, 10).unwrap();
        assert_eq!(offsets, [4096, 12288, 16384, 20480]);
        assert_eq!((header.index.offset, header.meta.offset, header.len), (24576, 24576 + 128, 24576 + 138));
        let payloads = [5000, 1, 4096, 70];
        let entries: Vec<_> =
            offsets.iter().zip(payloads).map(|(&offset, payload)| Entry { offset, payload, checksum: offset * 7 }).collect();
        let index = encode_index(&entries);
        header.index.checksum = checksum(&index);
        assert_eq!(header.decode_index(&index).unwrap(), entries);
        (header, index)
    }

    /// As a forger would: the checksum fits.
    fn sealed(mut bytes: Vec<u8>, at: usize, field: &[u8]) -> Vec<u8> {
        bytes[at..at + field.len()].copy_from_slice(field);
        let seal = checksum(&bytes[..SEAL]).to_le_bytes();
        bytes[SEAL..].copy_from_slice(&seal);
        bytes
    }

    #[test]
    fn a_header_comes_back_as_it_went() {
        let (header, _) = sample();
        let bytes = header.encode();
        assert_eq!((bytes.len(), &bytes[..16]), (HEADER, &b"flashexp\x01\0\0\0\0\x10\0\0"[..]));
        assert_eq!(Header::decode(&bytes, header.len).unwrap(), header);
    }

    #[test]
    fn every_wrong_field_of_a_header_is_named() {
        let (header, _) = sample();
        let check = |at: usize, field: &[u8], name: &str| {
            let bad = Header::decode(&sealed(header.encode(), at, field), header.len).unwrap_err();
            assert_eq!(bad.field, name, "{bad:?}");
        };
        check(0, b"F", "magic");
        check(8, &[2], "version");
        check(12, &8192u32.to_le_bytes(), "align");
        check(16, &0u32.to_le_bytes(), "layers");
        check(16, &65536u32.to_le_bytes(), "layers");
        check(20, &0u32.to_le_bytes(), "experts");
        check(20, &u32::MAX.to_le_bytes(), "experts");
        check(16, &[0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0], "experts");
        check(24, &1u64.to_le_bytes(), "length");
        check(32, &u64::MAX.to_le_bytes(), "meta offset");
        check(40, &u64::MAX.to_le_bytes(), "index length");
        check(56, &0u64.to_le_bytes(), "meta offset");
        check(64, &u64::MAX.to_le_bytes(), "meta length");
        check(64, &11u64.to_le_bytes(), "length");
        check(80, &[1], "reserved");
        check(SEAL - 1, &[1], "reserved");
        let mut torn = header.encode();
        torn[20] ^= 1;
        assert_eq!(Header::decode(&torn, header.len).unwrap_err().field, "header checksum");
        assert_eq!(Header::decode(&torn[..4095], 4095).unwrap_err().field, "header");
        assert_eq!(Header::decode(&header.encode(), header.len - 1).unwrap_err().field, "length");
    }

    #[test]
    fn every_wrong_field_of_an_index_is_named() {
        let (header, index) = sample();
        let check = |at: usize, field: &[u8], name: &str, place: &str| {
            let (mut header, mut index) = (header.clone(), index.clone());
            index[at..at + field.len()].copy_from_slice(field);
            header.index.checksum = checksum(&index);
            let bad = header.decode_index(&index).unwrap_err();
            assert_eq!((bad.field, bad.reason.contains(place)), (name, true), "{bad:?}");
        };
        check(0, &u64::MAX.to_le_bytes(), "record offset", "layer 0 expert 0");
        check(64, &8192u64.to_le_bytes(), "record offset", "layer 1 expert 0");
        check(40, &[0, 0, 0, 0], "record payload", "layer 0 expert 1");
        check(104, &u32::MAX.to_le_bytes(), "record payload", "layer 1 expert 1");
        check(104, &5000u32.to_le_bytes(), "record payload", "into the index");
        check(44, &[1], "record flags", "layer 0 expert 1");
        check(127, &[1], "record flags", "layer 1 expert 1");
        assert_eq!(header.decode_index(&index[..96]).unwrap_err().field, "index checksum");
        let short = Header { index: Part { offset: header.index.offset + 4096, ..header.index }, ..header };
        assert_eq!(short.decode_index(&index).unwrap_err().field, "index offset");
    }

    #[test]
    fn impossible_plans_are_refused() {
        let check = |records: &[Vec<u32>], align: u32, meta: u64, field: &str| {
            assert_eq!(Header::plan(records, align, meta).unwrap_err().field, field);
        };
        check(&[], 4096, 0, "layers");
        check(&[vec![]], 4096, 0, "experts");
        check(&[vec![1], vec![1, 1]], 4096, 0, "experts");
        check(&[vec![0]], 4096, 0, "record payload");
        check(&[vec![u32::MAX]], 4096, 0, "record payload");
        check(&[vec![1]], 512, 0, "align");
        check(&[vec![1]], 4096, META_MAX + 1, "meta length");
    }

    proptest! {
        /// Whatever a file says, reading it ends with a value or an error, and what it makes is bounded by the file's length.
        #[test]
        fn hostile_bytes_are_errors(at in 0..SEAL, bytes in proptest::collection::vec(any::<u8>(), 1..24), entry in 0usize..128, len in any::<u64>()) {
            let (header, mut index) = sample();
            let mut field = bytes.clone();
            field.truncate(SEAL - at);
            let forged = sealed(header.encode(), at, &field);
            prop_assert!(Header::decode(&forged, len).is_err() || len == header.len);
            let Ok(mut forged) = Header::decode(&forged, header.len) else { return Ok(()) };
            let end = (entry + bytes.len()).min(index.len());
            index[entry..end].copy_from_slice(&bytes[..end - entry]);
            forged.index.checksum = checksum(&index);
            if let Ok(entries) = forged.decode_index(&index) {
                prop_assert!(entries.iter().all(|entry| entry.offset + u64::from(entry.payload) <= forged.len));
            }
        }
    }
}
