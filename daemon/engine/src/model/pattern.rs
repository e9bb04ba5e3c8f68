//! The regular expressions of a tokenizer.json, run under a watch. The tokenizers crate takes a pattern that hits its
//! backtracking limit for one that matches no more, which silently yields other tokens; here it is an error that names the
//! pattern, and so is a text that keeps a pattern busy past a deadline. Not a tokenizer: `tokenizer.rs` plugs these
//! normalizers and pre-tokenizers into the crate's own pipeline and leaves all others as they are.

use std::{cell::RefCell, time::Duration};

use fancy_regex::{Regex, RegexBuilder};
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::Value;
use tokenizers::{
    NormalizedString, Normalizer, NormalizerWrapper, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, SplitDelimiterBehavior,
    pattern::{Invert, Pattern},
};

use super::limits::Deadline;

/// Steps of one match; the Qwen and Llama patterns need about ten.
const BACKTRACK_LIMIT: usize = 1_000_000;
/// Pathological patterns fail in well under this.
const DEADLINE: Duration = Duration::from_millis(800);
/// Ordinary patterns run at 5 MB/s and more, so that a long text is no reason to fail.
const DEADLINE_PER_MIB: Duration = Duration::from_secs(1);

struct Watch {
    until: Deadline,
    bytes: usize,
    failure: Option<String>,
}

thread_local! {
    /// Patterns are called deep inside the tokenizers crate, which drops a normalizer's error: the first one is kept here.
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

/// Runs `encode` over a text of `bytes` bytes; the error is that of the first pattern that gave up.
pub(super) fn watched<T>(bytes: usize, encode: impl FnOnce() -> T) -> Result<T, String> {
    let until = Deadline::after(DEADLINE + DEADLINE_PER_MIB * (bytes >> 20) as u32);
    WATCH.set(Some(Watch { until, bytes, failure: None }));
    let result = encode();
    match WATCH.take().and_then(|watch| watch.failure) {
        Some(failure) => Err(failure),
        None => Ok(result),
    }
}

/// A compiled pattern that reports what stops it.
#[derive(Debug)]
pub(super) struct Watched(Regex);

impl Watched {
    fn new(pattern: &str) -> Result<Self, String> {
        let regex = RegexBuilder::new(pattern).backtrack_limit(BACKTRACK_LIMIT).build();
        regex.map(Self).map_err(|error| format!("pattern `{pattern}`: {error}"))
    }

    fn give_up(&self, watch: &mut Option<Watch>, reason: &str) -> tokenizers::Error {
        let failure = format!("pattern `{}` {reason}", self.0.as_str());
        if let Some(watch) = watch {
            watch.failure.get_or_insert_with(|| failure.clone());
        }
        failure.into()
    }
}

impl Pattern for &Watched {
    fn find_matches(&self, inside: &str) -> tokenizers::Result<Vec<(tokenizers::Offsets, bool)>> {
        if inside.is_empty() {
            return Ok(vec![((0, 0), false)]);
        }
        let mut splits = Vec::new();
        let mut end = 0;
        for found in self.0.find_iter(inside) {
            let found = WATCH.with_borrow_mut(|watch| {
                let found =
                    found.map_err(|error| self.give_up(watch, &format!("cannot split a text of {} bytes: {error}", inside.len())))?;
                match watch {
                    Some(Watch { failure: Some(failure), .. }) => Err(failure.clone().into()),
                    Some(Watch { until, bytes, .. }) if until.passed() => {
                        let reason = format!("takes too long on a text of {bytes} bytes");
                        Err(self.give_up(watch, &reason))
                    }
                    _ => Ok(found),
                }
            })?;
            if end < found.start() {
                splits.push(((end, found.start()), false));
            }
            splits.push(((found.start(), found.end()), true));
            end = found.end();
        }
        if end < inside.len() {
            splits.push(((end, inside.len()), false));
        }
        Ok(splits)
    }
}

/// A normalizer whose `Replace` patterns are watched.
#[derive(Debug)]
pub(super) enum Normalize {
    Replace { pattern: Watched, content: String },
    Sequence(Vec<Self>),
    Other(Box<NormalizerWrapper>),
}

/// A pre-tokenizer whose `Split` patterns are watched.
#[derive(Debug)]
pub(super) enum PreTokenize {
    Split { pattern: Watched, behavior: SplitDelimiterBehavior, invert: bool },
    Sequence(Vec<Self>),
    Other(Box<PreTokenizerWrapper>),
}

impl Normalize {
    fn from_json(value: Value) -> Result<Self, String> {
        if let Some(parts) = value.get("normalizers").and_then(Value::as_array) {
            return parts.iter().cloned().map(Self::from_json).collect::<Result<_, _>>().map(Self::Sequence);
        }
        match regex_of(&value)? {
            Some(pattern) => Ok(Self::Replace { pattern, content: field(&value, "content")? }),
            None => serde_json::from_value(value).map(Self::Other).map_err(|error| error.to_string()),
        }
    }
}

impl PreTokenize {
    fn from_json(value: Value) -> Result<Self, String> {
        if let Some(parts) = value.get("pretokenizers").and_then(Value::as_array) {
            return parts.iter().cloned().map(Self::from_json).collect::<Result<_, _>>().map(Self::Sequence);
        }
        match regex_of(&value)? {
            Some(pattern) => Ok(Self::Split { pattern, behavior: field(&value, "behavior")?, invert: field(&value, "invert")? }),
            None => serde_json::from_value(value).map(Self::Other).map_err(|error| error.to_string()),
        }
    }
}

/// `{"pattern": {"Regex": …}}`; a `String` pattern is literal and stays with the crate.
fn regex_of(value: &Value) -> Result<Option<Watched>, String> {
    value.pointer("/pattern/Regex").and_then(Value::as_str).map(Watched::new).transpose()
}

fn field<T: serde::de::DeserializeOwned>(value: &Value, name: &str) -> Result<T, String> {
    let found = value.get(name).cloned().unwrap_or_default();
    serde_json::from_value(found).map_err(|error| format!("{name}: {error}"))
}

impl<'de> Deserialize<'de> for Normalize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_json(Value::deserialize(deserializer)?).map_err(|error| D::Error::custom(format!("normalizer: {error}")))
    }
}

impl<'de> Deserialize<'de> for PreTokenize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_json(Value::deserialize(deserializer)?).map_err(|error| D::Error::custom(format!("pre_tokenizer: {error}")))
    }
}

impl Normalizer for Normalize {
    fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        match self {
            Self::Replace { pattern, content } => text.replace(pattern, content),
            Self::Sequence(parts) => parts.iter().try_for_each(|part| part.normalize(text)),
            Self::Other(other) => other.normalize(text),
        }
    }
}

impl PreTokenizer for PreTokenize {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        match self {
            Self::Split { pattern, behavior, invert: true } => text.split(|_, part| part.split(Invert(pattern), *behavior)),
            Self::Split { pattern, behavior, invert: false } => text.split(|_, part| part.split(pattern, *behavior)),
            Self::Sequence(parts) => parts.iter().try_for_each(|part| part.pre_tokenize(text)),
            Self::Other(other) => other.pre_tokenize(text),
        }
    }
}
