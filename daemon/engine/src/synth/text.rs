//! The text side of a synthetic model: a byte-level tokenizer of 256 bytes, three special tokens and made-up words, and a
//! ChatML template. What it generates is noise; it is there so that the model can be talked to like any other.

use serde_json::{Map, Value, json};

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Ids with a text. Those above are no token and decode to nothing, so that the file stays small.
const WORDS_END: usize = 4096;
pub(super) const END_ID: usize = 256 + 2;

const TEMPLATE: &str = "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

pub(super) fn tokenizer(vocab: usize) -> Value {
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(index, content)| {
            json!({
                "id": 256 + index, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let mut tokens: Map<String, Value> = byte_characters().zip(0u32..).map(|(character, id)| (character.to_string(), id.into())).collect();
    // An added token keeps its id only if the vocabulary has it too.
    tokens.extend(SPECIAL.into_iter().zip(256u32..).map(|(token, id)| (token.into(), id.into())));
    for id in END_ID + 1..vocab.min(WORDS_END) {
        tokens.insert(word(id), id.into());
    }
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": tokens, "merges": [],
        },
    })
}

pub(super) fn tokenizer_config() -> Value {
    json!({ "chat_template": TEMPLATE, "eos_token": SPECIAL[2], "pad_token": SPECIAL[0] })
}

/// Syllables for the id's digits, after a space as byte-level vocabularies write it.
fn word(mut id: usize) -> String {
    const SYLLABLES: [&str; 16] = ["ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "zi"];
    let mut word = String::from("Ġ");
    while id > 0 {
        word.push_str(SYLLABLES[id % SYLLABLES.len()]);
        id /= SYLLABLES.len();
    }
    word
}

/// How byte-level vocabularies write the bytes 0 to 255: printable ones as they are, the others from U+0100 on.
fn byte_characters() -> impl Iterator<Item = char> {
    let mut next = 0x100;
    (0u8..=255).map(move |byte| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("below the surrogates")
        }
    })
}
