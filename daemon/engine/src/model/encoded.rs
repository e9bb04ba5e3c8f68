//! Long texts that were encoded of late, and their ids: an agent counts what it then sends, choices share a prompt, and a chat's sizes
//! are asked for again and again.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use sha2::{Digest, Sha256};

/// Shorter texts are encoded in no time.
const BYTES_MIN: usize = 1 << 10;
/// Ids of all texts together: 1 MB.
const IDS_MAX: usize = 1 << 18;

type Key = [u8; 32];

/// The oldest goes first.
#[derive(Debug, Default)]
pub(super) struct Encoded(Mutex<VecDeque<(Key, Vec<u32>)>>);

impl Encoded {
    /// The ids of `text`, by `encode` if they are not known; what differs in `wrap` has others.
    pub(super) fn get<E>(&self, text: &str, wrap: bool, encode: impl FnOnce() -> Result<Vec<u32>, E>) -> Result<Vec<u32>, E> {
        if text.len() < BYTES_MIN {
            return encode();
        }
        // Not one that can be made to collide: nobody may be given another one's prompt.
        let key: Key = Sha256::new().chain_update([wrap.into()]).chain_update(text).finalize().into();
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut known = lock();
            if let Some(found) = known.iter().position(|(other, _)| *other == key).and_then(|at| known.remove(at)) {
                known.push_back(found.clone());
                return Ok(found.1);
            }
        }
        let ids = encode()?;
        let mut known = lock();
        known.retain(|(other, _)| *other != key);
        known.push_back((key, ids.clone()));
        let mut sum: usize = known.iter().map(|(_, ids)| ids.len()).sum();
        while sum > IDS_MAX
            && let Some((_, oldest)) = known.pop_front()
        {
            sum -= oldest.len();
        }
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_encoded_once_until_they_make_room() {
        let encoded = Encoded::default();
        let ids = |text: &str, wrap, count: usize| {
            let mut asked = false;
            let ids = encoded.get::<()>(text, wrap, || {
                asked = true;
                Ok(vec![7; count])
            });
            (ids.expect("no error").len(), asked)
        };
        let long = |word: &str| word.repeat(BYTES_MIN);
        assert_eq!([ids("a", false, 1), ids("a", false, 2)], [(1, true), (2, true)]);
        assert_eq!([ids(&long("a"), false, 1), ids(&long("a"), false, 2), ids(&long("a"), true, 3)], [(1, true), (1, false), (3, true)]);
        assert_eq!(encoded.get(&long("b"), false, || Err("no")), Err("no"));
        // The one that was asked for last stays.
        let half = IDS_MAX / 2;
        assert_eq!(
            [ids(&long("b"), false, half), ids(&long("a"), false, 0), ids(&long("c"), false, half)],
            [(half, true), (1, false), (half, true)]
        );
        assert_eq!([ids(&long("a"), false, 0), ids(&long("b"), false, 5)], [(1, false), (5, true)]);
        // More than all the room is kept by nobody.
        assert_eq!([ids(&long("d"), false, IDS_MAX + 1), ids(&long("d"), false, 1)], [(IDS_MAX + 1, true), (1, true)]);
    }
}
