//! Filling in the middle: the special tokens with which tokenizers frame a gap in a text.

use super::tokenizer::Tokenizer;

/// Special tokens that frame a gap: before what precedes it, before what follows it, and before what fills it.
pub(super) struct Infill {
    tokens: [&'static str; 3],
    /// What ends a filling beside the model's own ends, where the tokenizer has it: the next file of a repository, or padding.
    ends: &'static [&'static str],
}

const INFILLS: &[Infill] = &[
    // Qwen's coders, CodeGemma.
    Infill {
        tokens: ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        ends: &["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"],
    },
    // StarCoder, Granite.
    Infill { tokens: ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], ends: &["<fim_pad>", "<reponame>", "<file_sep>"] },
    // DeepSeek's coders.
    Infill { tokens: ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], ends: &[] },
];

impl Infill {
    /// That which a tokenizer has all the tokens of.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<&'static Self> {
        INFILLS.iter().find(|infill| infill.tokens.iter().all(|token| tokenizer.id(token).is_some()))
    }

    pub(super) fn end_ids(&self, tokenizer: &Tokenizer) -> impl Iterator<Item = u32> {
        self.ends.iter().filter_map(|token| tokenizer.id(token))
    }

    /// The prompt whose reply stands between two texts.
    pub(super) fn prompt(&self, prefix: &str, suffix: &str) -> String {
        let [before, after, here] = self.tokens;
        format!("{before}{prefix}{after}{suffix}{here}")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        Error, Text,
        model::tests::{bundled, changed},
    };

    #[test]
    fn a_gap_is_framed_in_the_tokenizers_own_way() {
        let text = Text::open(&bundled()).unwrap();
        assert!(!text.infills() && matches!(text.infill("a", "b"), Err(Error::Infill)));
        let json = fs::read_to_string(bundled().join("tokenizer.json")).unwrap();
        for Infill { tokens, ends } in INFILLS {
            // In the places of ordinary tokens, which nobody misses here.
            let mut tokenizer: Value = serde_json::from_str(&json).unwrap();
            let names: Vec<&str> = tokens.iter().chain(ends.iter()).copied().collect();
            let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
            let longest: Vec<String> =
                vocab.iter().filter(|(token, _)| token.len() > 9).take(names.len()).map(|(token, _)| token.clone()).collect();
            let ids: Vec<Value> = longest.iter().map(|token| vocab.remove(token).unwrap()).collect();
            let merges = tokenizer["model"]["merges"].as_array_mut().unwrap();
            merges.retain(|merge| {
                let whole = merge.as_array().map(|pair| pair.iter().filter_map(Value::as_str).collect::<String>());
                let whole = whole.unwrap_or_else(|| merge.as_str().unwrap().replacen(' ', "", 1));
                !longest.iter().any(|token| whole.contains(token.as_str()))
            });
            for (name, id) in names.iter().zip(&ids) {
                tokenizer["model"]["vocab"].as_object_mut().unwrap().insert((*name).into(), id.clone());
                let added = json!({ "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
                tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
            }
            let text = Text::open(changed(&[("tokenizer.json", Some(&tokenizer.to_string()))]).path()).unwrap();
            assert!(text.infills(), "{tokens:?}");
            let prompt = text.encode_raw(&text.infill("x", "y").unwrap()).unwrap();
            let id = |at: usize| u32::try_from(ids[at].as_u64().unwrap()).unwrap();
            assert_eq!((prompt.len(), prompt[0], prompt[2], prompt[4]), (5, id(0), id(1), id(2)), "{tokens:?}");
            assert!((3..names.len()).all(|at| text.end_ids().contains(&id(at))), "{ends:?}");
        }
    }
}
