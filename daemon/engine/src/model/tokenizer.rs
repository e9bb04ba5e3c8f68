//! tokenizer.json: text to ids, ids to bytes, and bytes to text without ever splitting a character. No chat template and no
//! notion of a turn: `text.rs`, its caller, has those.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{DecoderWrapper, ModelWrapper, PostProcessorWrapper, TokenizerImpl};

use super::{
    files,
    pattern::{self, Normalize, PreTokenize},
};
use crate::Error;

const FILE_MAX: u64 = 256 << 20;

type Pipeline = TokenizerImpl<ModelWrapper, Normalize, PreTokenize, PostProcessorWrapper, DecoderWrapper>;

#[derive(Debug)]
pub(super) struct Tokenizer {
    pipeline: Pipeline,
    /// The bytes of all tokens, and where each one's end.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    /// SentencePiece writes a text's first word with a space that the text does not have.
    leading_space: bool,
}

impl Tokenizer {
    /// `vocab`: ids of the model; a tokenizer that makes others does not belong to it.
    pub(super) fn open(path: &Path, vocab: usize) -> Result<Self, Error> {
        let bad = |reason: String| Error::File { path: path.into(), reason };
        let json = files::text(path, FILE_MAX)?;
        let mut pipeline: Pipeline = caught(|| serde_json::from_str(&json).map_err(|error| error.to_string())).map_err(bad)?;
        // transformers sets both for each call, whatever the file says.
        pipeline.with_padding(None);
        pipeline.with_truncation(None).map_err(|error| bad(error.to_string()))?;

        let decoder: DecoderJson = serde_json::from_str(&json).map_err(|error| bad(error.to_string()))?;
        let spelling = Spelling::of(&decoder.decoder, &decoder.pre_tokenizer);
        let mut tokens: Vec<(u32, String)> = pipeline.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        tokens.sort_unstable();
        let last = tokens.last().map_or(0, |(id, _)| *id) as usize;
        if last >= vocab {
            return Err(bad(format!("has token id {last}, and the model's vocabulary ends at {}", vocab - 1)));
        }
        let special = pipeline.get_added_tokens_decoder();
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(last + 1));
        for (id, token) in tokens {
            // Ids nobody uses are empty tokens; of two names for one id the first counts.
            ends.resize(ends.len().max(id as usize), bytes.len() as u32);
            if ends.len() == id as usize {
                if !special.get(&id).is_some_and(|token| token.special) {
                    bytes.extend(spelling.bytes(&token));
                }
                ends.push(u32::try_from(bytes.len()).map_err(|_| bad("its tokens take more than 4 GiB".into()))?);
            }
        }
        Ok(Self { pipeline, bytes, ends, leading_space: spelling.leading_space() })
    }

    /// `wrap`: add what the post-processor puts around a text, such as a begin-of-text token.
    pub(super) fn encode(&self, text: &str, wrap: bool) -> Result<Vec<u32>, Error> {
        let encode =
            || self.pipeline.encode_fast(text, wrap).map(|encoding| encoding.get_ids().to_vec()).map_err(|error| error.to_string());
        let ids = pattern::watched(text.len(), || caught(encode)).and_then(|result| result);
        ids.map_err(|reason| Error::Tokenizer { reason })
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.pipeline.token_to_id(token)
    }

    /// Empty for special tokens and for ids that are no token.
    pub(super) fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let begin = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[begin as usize..end as usize]
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn leading_space(&self) -> bool {
        self.leading_space
    }
}

/// A panic inside the tokenizers crate as an error: a bad file must not take a thread down.
fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("the tokenizers library panicked: {}", text.unwrap_or("no message")))
    })
}

#[derive(Deserialize)]
struct DecoderJson {
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    pre_tokenizer: Value,
}

/// How a vocabulary writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's: each byte is a printable character.
    ByteLevel,
    /// SentencePiece's: ▁ is a space, `<0x0A>` a byte.
    Sentence { leading_space: bool },
}

impl Spelling {
    fn of(decoder: &Value, pre_tokenizer: &Value) -> Self {
        let parts = |value: &Value, list: &str| match value.get(list).and_then(Value::as_array) {
            Some(parts) => parts.clone(),
            None => vec![value.clone()],
        };
        let is = |part: &Value, kind: &str| part.get("type").and_then(Value::as_str) == Some(kind);
        let decoders = parts(decoder, "decoders");
        if decoders.iter().chain(&parts(pre_tokenizer, "pretokenizers")).any(|part| is(part, "ByteLevel")) {
            return Self::ByteLevel;
        }
        let strips = |part: &Value| is(part, "Strip") && part.get("start").and_then(Value::as_u64) > Some(0);
        let drops = |part: &Value| is(part, "Metaspace") && part.get("prepend_scheme").and_then(Value::as_str) != Some("never");
        Self::Sentence { leading_space: decoders.iter().any(|part| strips(part) || drops(part)) }
    }

    fn bytes(self, token: &str) -> Vec<u8> {
        let byte =
            |text: &str| text.strip_prefix("<0x")?.strip_suffix('>').filter(|hex| hex.len() == 2).map(|hex| u8::from_str_radix(hex, 16));
        match self {
            // A character that stands for no byte marks an added token, which is written as it is.
            Self::ByteLevel => token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.into()),
            Self::Sentence { .. } => match byte(token) {
                Some(Ok(byte)) => vec![byte],
                _ => token.replace('▁', " ").into_bytes(),
            },
        }
    }

    fn leading_space(self) -> bool {
        self == Self::Sentence { leading_space: true }
    }
}

/// GPT-2 writes printable bytes as themselves and the other 68, in order, as the characters from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        code @ 0..=0xff => Some(code as u8).filter(|byte| printable(*byte)),
        code => (0..=u8::MAX).filter(|byte| !printable(*byte)).nth((code - 0x100) as usize),
    }
}

/// Text from bytes that arrive in pieces: a character is held back until it is whole. All pieces together are what
/// `String::from_utf8_lossy` makes of all bytes.
#[derive(Debug, Default)]
pub(crate) struct Utf8 {
    held: Vec<u8>,
}

impl Utf8 {
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend(bytes);
        let mut text = String::new();
        let mut rest = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            rest += chunk.valid().len();
            let invalid = chunk.invalid();
            // An invalid end may be the beginning of a character.
            if rest + invalid.len() == self.held.len() && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none()) {
                break;
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                rest += invalid.len();
            }
        }
        self.held.drain(..rest);
        text
    }

    pub(crate) fn held(&self) -> &[u8] {
        &self.held
    }

    /// What is still held back is no character any more.
    pub(crate) fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_byte_has_a_gpt2_character() {
        let mut bytes: Vec<u8> = (0..=0x143).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(['Ġ', 'Ċ', 'Ń', 'ń', '!'].map(byte_of), [Some(b' '), Some(b'\n'), Some(0xad), None, Some(b'!')]);
    }

    #[test]
    fn spellings_are_undone() {
        let check = |spelling: Spelling, token: &str, expected: &[u8]| assert_eq!(spelling.bytes(token), expected, "{token}");
        let sentence = Spelling::Sentence { leading_space: true };
        check(Spelling::ByteLevel, "ĠHi", b" Hi");
        check(Spelling::ByteLevel, "<think>", b"<think>");
        check(Spelling::ByteLevel, "a b", b"a b");
        check(Spelling::ByteLevel, "ðŁ", &[0xf0, 0x9f]);
        check(sentence, "▁Hi", b" Hi");
        check(sentence, "<0x0A>", b"\n");
        check(sentence, "<0xZZ>", b"<0xZZ>");
        check(sentence, "Ġ", "Ġ".as_bytes());
    }

    #[test]
    fn characters_are_held_back_until_they_are_whole() {
        let mut utf8 = Utf8::default();
        let smile = "🙂".as_bytes();
        let pieces: Vec<String> =
            [b"a", &smile[..1], &smile[1..3], &smile[3..], b"\xff", b"\xe2", b"\xe2\x82"].map(|bytes| utf8.push(bytes)).into();
        assert_eq!(pieces, ["a", "", "", "🙂", "\u{fffd}", "", "\u{fffd}"]);
        assert_eq!((utf8.finish().as_str(), utf8.finish().as_str()), ("\u{fffd}", ""));
    }

    proptest! {
        #[test]
        fn pieces_make_the_whole(pieces in prop::collection::vec(prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select("aé€🙂".as_bytes().to_vec())], 0..6), 0..12)) {
            let mut utf8 = Utf8::default();
            let mut text: String = pieces.iter().map(|piece| utf8.push(piece)).collect();
            text += &utf8.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&pieces.concat()).into_owned());
        }
    }
}
