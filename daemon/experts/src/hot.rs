//! What a cache has learned, as bytes to keep between runs: the uses of every expert and which experts are in memory.
//! Little-endian, versioned, checksummed; anything else is refused, and the cache starts cold. No files here: flashd writes and
//! reads them.
//!
//! ```text
//! 0   "flashhot"          8   version u32 (1)      12  layers u32       16  experts u32
//! 20  layers × { tick u64, experts × { resident u8, count u32, last u64, frequency f64 } }
//! end XXH3-64 of all before
//! ```

use crate::{
    Error,
    cache::Use,
    format::checksum,
    key::{ExpertId, ExpertKey, LayerId, Tick},
};

const MAGIC: &[u8; 8] = b"flashhot";
/// Another half-life of LFRU is another version: frequencies are in units of it.
const VERSION: u32 = 1;
const HEADER: usize = 20;
const ENTRY: usize = 21;

/// The state of a cache's knowledge: [`crate::Experts::hot`] makes it, [`crate::Experts::warm`] takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Hot {
    pub(crate) experts: usize,
    pub(crate) layers: Vec<HotLayer>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HotLayer {
    pub(crate) tick: Tick,
    /// Of each expert, and whether it is in memory.
    pub(crate) uses: Vec<(Use, bool)>,
}

impl Hot {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.layers.len() * (8 + self.experts * ENTRY) + 8);
        bytes.extend_from_slice(MAGIC);
        [VERSION, self.layers.len() as u32, self.experts as u32].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
        for HotLayer { tick, uses } in &self.layers {
            bytes.extend(tick.0.to_le_bytes());
            for (seen, resident) in uses {
                bytes.push(u8::from(*resident));
                bytes.extend(seen.count.to_le_bytes());
                bytes.extend(seen.last.0.to_le_bytes());
                bytes.extend(seen.frequency.to_le_bytes());
            }
        }
        let seal = checksum(&bytes);
        bytes.extend(seal.to_le_bytes());
        bytes
    }

    /// Refuses what [`Hot::to_bytes`] did not write.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let bad = |reason: String| Error::Hot(reason);
        let short = || bad(format!("{} bytes are too few", bytes.len()));
        let (body, seal) = bytes.split_last_chunk::<8>().ok_or_else(short)?;
        let mut rest = Bytes(body);
        let magic = rest.next::<8>().ok_or_else(short)?;
        let mut field = || rest.next().map(u32::from_le_bytes).ok_or_else(short);
        let (version, layers, experts) = (field()?, field()? as usize, field()? as usize);
        if magic != *MAGIC || version != VERSION {
            return Err(bad(format!("version {version} of {:?}, not {VERSION} of \"flashhot\"", String::from_utf8_lossy(&magic))));
        }
        let expected = experts.checked_mul(ENTRY).and_then(|len| len.checked_add(8)?.checked_mul(layers)?.checked_add(HEADER));
        if expected != Some(body.len()) || layers > usize::from(u16::MAX) || experts > usize::from(u16::MAX) {
            return Err(bad(format!("{} bytes for {layers} layers of {experts} experts", bytes.len())));
        }
        if u64::from_le_bytes(*seal) != checksum(body) {
            return Err(bad("its checksum is wrong".into()));
        }
        let layers = (0..layers).map(|_| rest.layer(experts)).collect::<Option<_>>();
        Ok(Self { experts, layers: layers.ok_or_else(|| bad("its figures contradict each other".into()))? })
    }

    /// What was in memory, the dearest of each layer last, and layers taking turns.
    pub(crate) fn resident(&self) -> Vec<ExpertKey> {
        let mut ranked = Vec::new();
        for (layer, HotLayer { uses, .. }) in (0u16..).map(LayerId).zip(&self.layers) {
            let mut experts: Vec<_> = (0u16..).map(ExpertId).zip(uses).filter(|(_, (_, resident))| *resident).collect();
            experts.sort_by(|(_, (a, _)), (_, (b, _))| b.frequency.total_cmp(&a.frequency));
            ranked.extend(experts.into_iter().enumerate().map(|(rank, (expert, _))| (rank, ExpertKey { layer, expert })));
        }
        ranked.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
        ranked.into_iter().map(|(_, key)| key).collect()
    }
}

/// What is still to be read.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn next<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (next, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*next)
    }

    fn layer(&mut self, experts: usize) -> Option<HotLayer> {
        let tick = Tick(u64::from_le_bytes(self.next()?));
        let uses = (0..experts).map(|_| self.seen(tick)).collect::<Option<_>>()?;
        // The clock has room for what is still to come.
        (tick.0 <= u64::MAX / 2).then_some(HotLayer { tick, uses })
    }

    fn seen(&mut self, now: Tick) -> Option<(Use, bool)> {
        let [resident] = self.next()?;
        let count = u32::from_le_bytes(self.next()?);
        let last = Tick(u64::from_le_bytes(self.next()?));
        let seen = Use { count, last, frequency: f64::from_le_bytes(self.next()?) };
        (resident <= 1 && seen.plausible(now)).then_some((seen, resident == 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hot() -> Hot {
        let mut seen = [Use::NEVER; 3];
        [5, 9].into_iter().for_each(|tick| seen[1].used(Tick(tick)));
        seen[2].used(Tick(7));
        let layer = |resident: [bool; 3]| HotLayer { tick: Tick(9), uses: seen.into_iter().zip(resident).collect() };
        Hot { experts: 3, layers: vec![layer([false, true, true]), layer([true, true, false])] }
    }

    #[test]
    fn bytes_go_both_ways_and_the_dearest_is_last() {
        let hot = hot();
        assert_eq!(Hot::from_bytes(&hot.to_bytes()).unwrap(), hot);
        let order: Vec<_> = hot.resident().into_iter().map(|key| (key.layer.0, key.expert.0)).collect();
        assert_eq!(order, [(0, 2), (1, 0), (0, 1), (1, 1)]);
    }

    #[test]
    fn what_was_not_written_is_refused() {
        let check = |change: &dyn Fn(&mut Vec<u8>), expected: &str| {
            let mut bytes = hot().to_bytes();
            bytes.truncate(bytes.len() - 8);
            change(&mut bytes);
            let seal = checksum(&bytes);
            bytes.extend(seal.to_le_bytes());
            let error = Hot::from_bytes(&bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} / {expected}");
        };
        check(&|bytes| bytes[0] = b'g', "\"glashhot\"");
        check(&|bytes| bytes[8] = 2, "version 2");
        check(&|bytes| bytes[12] = 3, "3 layers of 3 experts");
        check(&|bytes| bytes[12..20].fill(255), "layers of");
        check(&|bytes| bytes.truncate(16), "too few");
        check(&|bytes| bytes[28] = 2, "contradict"); // resident, perhaps
        check(&|bytes| bytes[28 + ENTRY + 5] = 10, "contradict"); // used in the future
        check(&|bytes| bytes[28 + ENTRY + 13..][..8].copy_from_slice(&f64::NAN.to_le_bytes()), "contradict");
        check(&|bytes| bytes[28 + ENTRY + 13..][..8].copy_from_slice(&1e9f64.to_le_bytes()), "contradict");
        check(&|bytes| bytes[28 + 1] = 1, "contradict"); // used, but never
    }

    proptest! {
        #[test]
        fn no_bytes_bring_it_down(bytes in prop::collection::vec(any::<u8>(), 0..100), at in 0usize..200, with: u8) {
            prop_assert!(Hot::from_bytes(&bytes).is_err());
            let mut changed = hot().to_bytes();
            let at = at % changed.len();
            changed[at] ^= with;
            prop_assert_eq!(Hot::from_bytes(&changed).is_ok(), with == 0);
        }
    }
}
