//! The header of one safetensors file: names, types, shapes and byte ranges, all checked. Payload bytes are not touched
//! here; `weights.rs` calls this once per shard.

use std::{fmt, fs::File, os::unix::fs::FileExt, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

use super::weights::Span;
use crate::Error;

/// The format's own limit is 100 MB; real headers of the largest models stay below 20 MB.
const HEADER_MAX: u64 = 100 << 20;
const RANK_MAX: usize = 8;

/// Element types; those that no kernel reads are only measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
    U32,
    Other { bits: u64 },
}

/// One tensor of a header, its span absolute in the file.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) span: Span,
}

#[derive(Deserialize)]
struct Raw {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The header's entries in file order, duplicates kept so that they can be refused.
struct Entries(Vec<(String, Raw)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Header;
        impl<'de> Visitor<'de> for Header {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let raw = map.next_value().map_err(|error| serde::de::Error::custom(format!("tensor `{name}`: {error}")))?;
                        entries.push((name, raw));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Header)
    }
}

/// Reads and checks the header of `file`, which is `len` bytes long and number `index` of its checkpoint.
pub(super) fn header(path: &Path, file: &File, len: u64, index: u32) -> Result<Vec<(String, Tensor)>, Error> {
    let bad = |reason: String| Error::File { path: path.into(), reason };
    let read = |buffer: &mut [u8], offset| file.read_exact_at(buffer, offset).map_err(|source| Error::Read { path: path.into(), source });
    if len < 8 {
        return Err(bad(format!("is {len} bytes long, too short for a safetensors file")));
    }
    let mut size = [0; 8];
    read(&mut size, 0)?;
    let size = u64::from_le_bytes(size);
    if size > HEADER_MAX || size > len - 8 {
        return Err(bad(format!("the header claims {size} bytes; the file has {} and the limit is {HEADER_MAX}", len - 8)));
    }
    let mut json = vec![0; size as usize];
    read(&mut json, 8)?;
    let json = std::str::from_utf8(&json).map_err(|error| bad(format!("the header is not UTF-8: {error}")))?;
    let Entries(entries) = serde_json::from_str(json).map_err(|error| bad(format!("the header is malformed: {error}")))?;

    let data = 8 + size;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, raw) in entries {
        let tensor = check(raw, data, len, index).map_err(|reason| Error::Tensor { path: path.into(), tensor: name.clone(), reason })?;
        tensors.push((name, tensor));
    }
    refuse_overlaps(path, &tensors)?;
    Ok(tensors)
}

fn check(raw: Raw, data: u64, len: u64, file: u32) -> Result<Tensor, String> {
    let dtype = Dtype::named(&raw.dtype).ok_or_else(|| format!("unknown dtype `{}`", raw.dtype))?;
    if raw.shape.len() > RANK_MAX {
        return Err(format!("{} dimensions, the limit is {RANK_MAX}", raw.shape.len()));
    }
    let bits = raw.shape.iter().try_fold(dtype.bits(), |bits, &dim| bits.checked_mul(dim as u64));
    let [begin, end] = raw.data_offsets;
    if begin > end || end > len - data {
        return Err(format!("bytes {begin} to {end} are outside the file's {} data bytes; is the file truncated?", len - data));
    }
    if bits != (end - begin).checked_mul(8) {
        return Err(format!("shape {:?} of {} does not fill {} bytes", raw.shape, raw.dtype, end - begin));
    }
    Ok(Tensor { dtype, shape: raw.shape, span: Span { file, offset: data + begin, len: end - begin } })
}

/// Two tensors with one name or with common bytes make a file whose meaning depends on its reader.
fn refuse_overlaps(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), Error> {
    let clash = |tensor: &str, reason: String| Err(Error::Tensor { path: path.into(), tensor: tensor.into(), reason });
    let mut order: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.span)).collect();
    order.sort_unstable_by_key(|(name, _)| *name);
    if let Some(pair) = order.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return clash(pair[0].0, "is described twice".into());
    }
    order.retain(|(_, span)| span.len > 0);
    order.sort_unstable_by_key(|(_, span)| span.offset);
    match order.windows(2).find(|pair| pair[0].1.offset + pair[0].1.len > pair[1].1.offset) {
        Some(pair) => clash(pair[1].0, format!("overlaps tensor `{}`", pair[0].0)),
        None => Ok(()),
    }
}

impl Dtype {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "U32" => Self::U32,
            "F4" => Self::Other { bits: 4 },
            "F6_E2M3" | "F6_E3M2" => Self::Other { bits: 6 },
            "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => Self::Other { bits: 8 },
            "U16" | "I16" => Self::Other { bits: 16 },
            "I32" => Self::Other { bits: 32 },
            "U64" | "I64" | "F64" | "C64" => Self::Other { bits: 64 },
            _ => return None,
        })
    }

    fn bits(self) -> u64 {
        match self {
            Self::F32 | Self::U32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::Other { bits } => bits,
        }
    }
}
