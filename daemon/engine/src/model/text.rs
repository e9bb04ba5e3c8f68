//! The text side of a model: tokenizer, chat template, end-of-turn tokens, sampling defaults. Usable from any thread; no
//! weights. The engine decodes with it, the daemon renders and encodes with it.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    arch::Arch,
    chat::{Chat, Choice, Format, Tool},
    encoded::Encoded,
    files,
    infill::Infill,
    output::{Compiler, Dialect, Reply, Rules, THINK, Thinking},
    template::Template,
    tokenizer::{Tokenizer, Utf8},
};
use crate::{Error, Sampling};

/// Real ones stay below 40 KiB.
const TEMPLATE_MAX: u64 = 256 << 10;
/// Without a generation_config.json.
const TEMPERATURE: f32 = 0.7;

/// Tokenizer, chat template and defaults of one model.
pub struct Text {
    tokenizer: Tokenizer,
    encoded: Encoded,
    template: Option<Template>,
    /// Where a model has one of its own for chats with tools.
    tool_template: Option<Template>,
    dialect: Dialect,
    /// Special tokens that the dialect gives a meaning, and their texts.
    marks: HashMap<u32, &'static str>,
    think_id: Option<u32>,
    /// Made for the first request that needs one: it takes some megabytes.
    compiler: OnceLock<Compiler>,
    end_ids: Vec<u32>,
    sampling: Sampling,
    /// As the model's files have it; empty if they have none.
    template_source: String,
    infill: Option<&'static Infill>,
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Text").field("template", &self.template).field("dialect", &self.dialect).finish_non_exhaustive()
    }
}

/// Whether a checkpoint can be given tools, and whether it thinks, by its template alone; one that cannot be read does neither.
pub(super) fn abilities(dir: &Path) -> (bool, bool) {
    let path = dir.join("tokenizer_config.json");
    let config: Option<TokenizerConfig> = files::json_if_any(&path, files::JSON_MAX).unwrap_or_default();
    let sources = config.unwrap_or_default().templates(dir, path).unwrap_or_default();
    let Some((_, source)) = sources.last() else { return (false, false) };
    let dialect = Dialect::of(source);
    let shown = || Template::new(source, serde_json::Map::new()).is_ok_and(|template| template.shows_tools());
    (dialect.calls.is_some() && shown(), dialect.thinks || dialect.harmony())
}

impl Text {
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let (arch, _) = Arch::read(dir)?;
        let tokenizer = Tokenizer::open(&dir.join("tokenizer.json"), arch.vocab)?;
        let config_path = dir.join("tokenizer_config.json");
        let config: TokenizerConfig = files::json_if_any(&config_path, files::JSON_MAX)?.unwrap_or_default();
        let special = config.special_tokens();

        let generation_path = dir.join("generation_config.json");
        let generation: GenerationConfig = files::json_if_any(&generation_path, files::JSON_MAX)?.unwrap_or_default();
        let sampling = generation.sampling().map_err(|reason| Error::File { path: generation_path, reason })?;
        let of_model: Ends = files::json(&dir.join("config.json"), files::JSON_MAX)?;
        let mut end_ids = generation.ends.ids().or(of_model.ids()).unwrap_or_default();
        end_ids.extend(special.get("eos_token").and_then(Value::as_str).and_then(|token| tokenizer.id(token)));
        let infill = Infill::of(&tokenizer);
        end_ids.extend(infill.into_iter().flat_map(|infill| infill.end_ids(&tokenizer)));
        end_ids.sort_unstable();
        end_ids.dedup();

        let sources = config.templates(dir, config_path)?;
        let template_source = sources.first().map(|(_, source)| source.clone()).unwrap_or_default();
        let dialect = sources.last().map_or_else(Dialect::default, |(_, source)| Dialect::of(source));
        let mut templates = sources
            .into_iter()
            .map(|(path, source)| Template::new(&source, special.clone()).map_err(|reason| Error::File { path, reason }));
        let (template, tool_template) = (templates.next().transpose()?, templates.next().transpose()?);
        let marks = dialect.marks().filter_map(|mark| Some((tokenizer.id(mark)?, mark))).collect();
        let think_id = tokenizer.id(THINK.0).filter(|_| dialect.thinks);
        Ok(Self {
            tokenizer,
            encoded: Encoded::default(),
            template,
            tool_template,
            dialect,
            marks,
            think_id,
            compiler: OnceLock::new(),
            end_ids,
            sampling,
            template_source,
            infill,
        })
    }

    /// Token ids of a rendered chat: special tokens written in it are recognised and none is added, as transformers does
    /// after a chat template.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encoded.get(text, false, || self.tokenizer.encode(text, false))
    }

    /// As [`Text::encode`], with what the tokenizer puts around a text that no template has framed (a begin-of-text token).
    pub fn encode_raw(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encoded.get(text, true, || self.tokenizer.encode(text, true))
    }

    /// The prompt whose reply stands between two texts.
    pub fn infill(&self, prefix: &str, suffix: &str) -> Result<String, Error> {
        self.infill.map(|infill| infill.prompt(prefix, suffix)).ok_or(Error::Infill)
    }

    /// It has tokens that frame a gap.
    pub fn infills(&self) -> bool {
        self.infill.is_some()
    }

    /// The chat template as the model's files have it; empty if they have none.
    pub fn template_source(&self) -> &str {
        &self.template_source
    }

    /// The chat template applied; the generation prompt is added unless the last message is to be continued.
    pub fn render(&self, chat: &Chat) -> Result<String, Error> {
        let bad = |reason: String| Error::Template { reason };
        let template = self.tool_template.as_ref().filter(|_| !chat.tools.is_empty()).or(self.template.as_ref());
        let template = template.ok_or_else(|| bad("this model has none; send a prompt without roles instead".into()))?;
        if chat.calls() && !template.shows_tools() {
            let reason = "this model's chat template does not show them; use a model that can call tools, or leave them out";
            return Err(Error::NoTools { reason });
        }
        if chat.calls() && self.dialect.calls.is_none() {
            return Err(Error::NoTools { reason: "this model has a way of calling them that is not known here; leave them out" });
        }
        template.render(chat).map_err(bad)
    }

    /// How many tokens `chat` has if its tools are added as JSON, for a model whose template shows none.
    pub fn tokens_with_tools(&self, chat: &Chat) -> Result<usize, Error> {
        let tools: Vec<_> = chat.tools.iter().filter(|tool| !tool.hidden).map(Tool::to_json).collect();
        let plain = self.render(&Chat { tools: Vec::new(), ..chat.clone() })?;
        Ok(self.encode(&plain)?.len() + self.encode(&Value::Array(tools).to_string())?.len())
    }

    /// How the reply to `prompt`, which is `chat` rendered, is to be read, and what holds it to a form. Grammars are compiled here: CPU work.
    pub fn reply(&self, chat: &Chat, prompt: &str, format: Option<&Format>) -> Result<Reply, Error> {
        let mut reply = Reply::new(self.dialect, self.thinking(chat, prompt));
        if let Some(budget) = chat.kwargs.get("thinking_budget").and_then(Value::as_u64) {
            let closings = self.dialect.closings(chat.calls()).iter().map(|closing| self.encode(closing));
            reply.budget = Some((usize::try_from(budget).unwrap_or(usize::MAX), closings.collect::<Result<_, _>>()?));
        }
        let tools: Vec<_> = chat.callable().filter(|_| chat.calls()).collect();
        if let (Choice::Required, true) = (chat.choice.mode, tools.is_empty()) {
            return Err(Error::Tools { reason: "a call is required, and there is no tool that may be called".into() });
        }
        let Some(calls) = self.dialect.calls.filter(|_| !tools.is_empty()) else {
            if let Some(format) = format {
                reply.rules = Rules::Whole(self.compiler()?.format(format, self.dialect, None)?);
            }
            return Ok(reply);
        };
        reply.schemas = std::sync::Arc::new(tools.iter().map(|tool| (tool.name.clone(), tool.schema())).collect());
        reply.single = chat.choice.single;
        let compiler = self.compiler()?;
        reply.rules = match (chat.choice.mode, format) {
            (Choice::Required, Some(_)) => {
                return Err(Error::Tools { reason: "a call is required, so no format can be: choose one of them".into() });
            }
            (Choice::Required, None) => Rules::Whole(compiler.only_calls(calls, &tools, &chat.choice)?),
            (_, Some(format)) => Rules::Whole(compiler.format(format, self.dialect, Some((calls, &tools, &chat.choice)))?),
            (_, None) => Rules::Calls(compiler.one_call(calls, &tools)?),
        };
        Ok(reply)
    }

    /// The form of a reply to a prompt without roles.
    pub fn raw_reply(&self, format: Option<&Format>) -> Result<Reply, Error> {
        let Some(format) = format else { return Ok(Reply::default()) };
        let rules = Rules::Whole(self.compiler()?.format(format, Dialect::default(), None)?);
        Ok(Reply { rules, ..Reply::default() })
    }

    fn thinking(&self, chat: &Chat, prompt: &str) -> Thinking {
        if !self.dialect.thinks {
            return Thinking::No;
        }
        let begun = |text: &str| text.rfind(THINK.0) > text.rfind(THINK.1);
        let prompt = prompt.trim_end();
        match chat.messages.last().filter(|_| chat.continue_final) {
            Some(last) if begun(&last.content) => Thinking::Begun,
            Some(last) if !last.content.is_empty() => Thinking::No,
            _ if prompt.ends_with(THINK.0) => Thinking::Begun,
            _ if prompt.ends_with(THINK.1) => Thinking::No,
            _ => Thinking::Possible,
        }
    }

    fn compiler(&self) -> Result<&Compiler, Error> {
        if let Some(compiler) = self.compiler.get() {
            return Ok(compiler);
        }
        let compiler = Compiler::new(self.tokenizer.len(), |id| self.meaning(id), &self.end_ids)?;
        Ok(self.compiler.get_or_init(|| compiler))
    }

    /// As [`Text::token_bytes`], with the text of special tokens that mark reasoning and calls.
    fn meaning(&self, id: u32) -> &[u8] {
        match self.token_bytes(id) {
            [] => self.marks.get(&id).map_or(&[], |mark| mark.as_bytes()),
            bytes => bytes,
        }
    }

    /// The token that begins thinking.
    pub(crate) fn think_id(&self) -> Option<u32> {
        self.think_id
    }

    /// The raw bytes one token stands for (byte-level BPE undone); empty for special tokens.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.tokenizer.token_bytes(id)
    }

    /// Ids that end a turn: generation_config.json's eos_token_id, else config.json's, plus the tokenizer's eos.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// generation_config.json's sampling; else temperature 0.7.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Ids the tokenizer knows lie below it.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.len()
    }
}

/// Turns generated ids into text, a whole character at a time.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    utf8: Utf8,
    /// Something has been decoded: the leading space of SentencePiece is behind us.
    begun: bool,
}

impl Decoder {
    /// `marks`: special tokens that mark reasoning and calls are text.
    pub(crate) fn push(&mut self, text: &Text, id: u32, marks: bool) -> String {
        let mut bytes = if marks { text.meaning(id) } else { text.token_bytes(id) };
        if !self.begun && !bytes.is_empty() {
            self.begun = true;
            if text.tokenizer.leading_space() {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
        }
        self.utf8.push(bytes)
    }

    /// The beginning of a character.
    pub(crate) fn held(&self) -> &[u8] {
        self.utf8.held()
    }

    /// What is left of an unfinished character.
    pub(crate) fn finish(&mut self) -> String {
        self.utf8.finish()
    }
}

#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<ChatTemplate>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ChatTemplate {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

impl TokenizerConfig {
    /// The variables a template finds its special tokens in; a token is a string or an object with its content.
    fn special_tokens(&self) -> Map<String, Value> {
        let content = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(Value::from);
        let names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
        let one = |name: &&str| Some((name.to_string(), content(self.rest.get(*name)?)?));
        let mut special: Map<_, _> = names.iter().filter_map(one).collect();
        if let Some(Value::Array(more)) = self.rest.get("additional_special_tokens") {
            special.insert("additional_special_tokens".into(), more.iter().filter_map(content).collect());
        }
        special
    }

    /// The chat template and the file it is from: chat_template.jinja, else this file's string or its template `default`; then that for
    /// chats with tools, where there is one.
    fn templates(self, dir: &Path, path: PathBuf) -> Result<Vec<(PathBuf, String)>, Error> {
        let jinja = dir.join("chat_template.jinja");
        match files::text(&jinja, TEMPLATE_MAX) {
            Ok(source) => return Ok(vec![(jinja, source)]),
            Err(Error::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let sources = match self.chat_template {
            None => Vec::new(),
            Some(ChatTemplate::One(source)) => vec![source],
            Some(ChatTemplate::Named(mut named)) => {
                let mut take =
                    |name: &str| named.iter_mut().find(|named| named.name == name).map(|named| std::mem::take(&mut named.template));
                match take("default") {
                    Some(default) => [Some(default), take("tool_use")].into_iter().flatten().collect(),
                    None => {
                        return Err(Error::File { path, reason: "chat_template has several templates and none is named `default`".into() });
                    }
                }
            }
        };
        match sources.iter().all(|source| source.len() as u64 <= TEMPLATE_MAX) {
            true => Ok(sources.into_iter().map(|source| (path.clone(), source)).collect()),
            false => Err(Error::File { path, reason: format!("chat_template is larger than {TEMPLATE_MAX} bytes") }),
        }
    }
}

#[derive(Default, Deserialize)]
struct Ends {
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "eos_token_id is neither a token id nor a list of them")]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl Ends {
    fn ids(self) -> Option<Vec<u32>> {
        self.eos_token_id.map(|ids| match ids {
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        })
    }
}

#[derive(Default, Deserialize)]
struct GenerationConfig {
    #[serde(flatten)]
    ends: Ends,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    fn sampling(&self) -> Result<Sampling, String> {
        let within = |name: &str, value: Option<f32>, default: f32, wants: &str, good: fn(f32) -> bool| match value {
            Some(value) if !good(value) => Err(format!("{name} is {value}, expected {wants}")),
            value => Ok(value.unwrap_or(default)),
        };
        let off = Sampling::greedy();
        let temperature = within("temperature", self.temperature, TEMPERATURE, "0 or more", |t| t.is_finite() && t >= 0.0)?;
        Ok(Sampling {
            temperature: if self.do_sample == Some(false) { 0.0 } else { temperature },
            top_k: self.top_k.unwrap_or(off.top_k),
            top_p: within("top_p", self.top_p, off.top_p, "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?,
            min_p: within("min_p", self.min_p, off.min_p, "0 to 1", |p| (0.0..=1.0).contains(&p))?,
            repetition_penalty: within("repetition_penalty", self.repetition_penalty, off.repetition_penalty, "above 0", |p| {
                p.is_finite() && p > 0.0
            })?,
            ..off
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::{
        Message,
        model::tests::{bundled, changed},
    };

    fn user(content: &str) -> Chat {
        Chat::of(vec![Message { role: "user".into(), content: content.into(), ..Message::default() }])
    }

    fn refused(files: &[(&str, Option<&str>)], expected: &str) {
        let error = Text::open(changed(files).path()).expect_err(expected).to_string();
        assert!(error.contains(expected), "`{error}` lacks `{expected}`");
    }

    #[test]
    fn golden_prompts_round_trip() {
        let text = Text::open(&bundled()).unwrap();
        let golden: Value = files::json(&bundled().join("golden/bf16_f32.json"), files::JSON_MAX).unwrap();
        for prompt in golden["prompts"].as_array().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(prompt["token_ids"].clone()).unwrap();
            let (rendered, greedy) = (prompt["text"].as_str().unwrap(), prompt["greedy_text"].as_str().unwrap());
            assert_eq!(text.encode(rendered).unwrap(), ids);
            assert_eq!(text.encode_raw(rendered).unwrap(), ids);
            if prompt["kind"] == "chat" {
                assert_eq!(text.render(&user(prompt["prompt"].as_str().unwrap())).unwrap(), rendered);
            }
            let ids: Vec<u32> = serde_json::from_value(prompt["greedy"].clone()).unwrap();
            let mut decoder = Decoder::default();
            let mut decoded: String = ids.iter().map(|id| decoder.push(&text, *id, false)).collect();
            decoded += &decoder.finish();
            let special = |text: &str| {
                ["<|im_start|>", "<|im_end|>", "<|endoftext|>"].iter().fold(text.to_owned(), |text, token| text.replace(token, ""))
            };
            assert_eq!(decoded, special(greedy));
        }
        assert_eq!(text.end_ids(), [8189, 8191]);
        assert_eq!(*text.sampling(), Sampling { temperature: 0.7, top_p: 0.9, top_k: 40, ..Sampling::greedy() });
        assert_eq!((text.vocab_size(), text.token_bytes(8191), text.token_bytes(9999)), (8192, &b""[..], &b""[..]));
    }

    #[test]
    fn any_text_round_trips() {
        let text = Text::open(&bundled()).unwrap();
        for sample in ["", " ", "Grüße, 世界! 🙂\u{200d}\0\n\n\t x", "a<|im_end|", "\u{fffd}", "    deep\r\n", "don't 12345"] {
            let ids = text.encode(sample).unwrap();
            let bytes: Vec<u8> = ids.iter().flat_map(|id| text.token_bytes(*id)).copied().collect();
            assert_eq!(String::from_utf8(bytes).unwrap(), sample);
        }
        assert_eq!(text.encode("<|im_end|>").unwrap(), [8191]);
    }

    #[test]
    fn sampling_and_ends_come_from_the_files() {
        let check = |generation: Option<&str>, ends: &[u32], sampling: Sampling| {
            let dir = changed(&[("generation_config.json", generation)]);
            let text = Text::open(dir.path()).unwrap();
            assert_eq!((text.end_ids(), text.sampling()), (ends, &sampling), "{generation:?}");
        };
        let default = Sampling { temperature: 0.7, ..Sampling::greedy() };
        check(None, &[8189, 8191], default.clone());
        check(Some(r#"{"eos_token_id": 5}"#), &[5, 8191], default.clone());
        check(Some(r#"{"eos_token_id": null, "do_sample": false, "temperature": 0.9}"#), &[8189, 8191], Sampling::greedy());
        check(
            Some(r#"{"temperature": 1, "min_p": 0.1, "repetition_penalty": 1.1}"#),
            &[8189, 8191],
            Sampling { temperature: 1.0, min_p: 0.1, repetition_penalty: 1.1, ..default },
        );
    }

    #[test]
    fn templates_come_from_either_file() {
        let check = |files: &[(&str, Option<&str>)], expected: Result<&str, &str>| {
            let text = Text::open(changed(files).path()).unwrap().render(&user("x"));
            match (text, expected) {
                (Ok(text), Ok(expected)) => assert_eq!(text, expected),
                (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
                (text, expected) => panic!("{text:?}, expected {expected:?}"),
            }
        };
        let named = json!({ "chat_template": [{ "name": "rag", "template": "r" }, { "name": "default", "template": "d{{ eos_token }}" }], "eos_token": { "content": "</s>" } });
        check(&[("chat_template.jinja", Some("j"))], Ok("j"));
        check(&[("chat_template.jinja", None)], Ok("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"));
        check(&[("chat_template.jinja", None), ("tokenizer_config.json", Some(&named.to_string()))], Ok("d</s>"));
        check(&[("chat_template.jinja", None), ("tokenizer_config.json", None)], Err("the chat template failed: this model has none"));
    }

    #[test]
    fn a_template_tells_what_its_model_can_do() {
        let check = |template: &str, expected: (bool, bool)| {
            let dir = changed(&[("chat_template.jinja", Some(template))]);
            assert_eq!(abilities(dir.path()), expected, "{template}");
        };
        check("{{ messages }}", (false, false));
        check("{{ tools }}<tool_call>", (true, false));
        check("<tool_call>", (false, false));
        check("{{ tools }}", (false, false));
        check("{{ tools }}<tool_call></think>", (true, true));
        check("<|channel|><|message|>", (false, true));
        check("{{ tools }}<tool_call>{% for x %}", (false, false));
        let named = json!({ "chat_template": [{ "name": "default", "template": "d" }, { "name": "tool_use", "template": "{{ tools }}<tool_call>" }] });
        let dir = changed(&[("chat_template.jinja", None), ("tokenizer_config.json", Some(&named.to_string()))]);
        assert_eq!(abilities(dir.path()), (true, false));
        let dir = changed(&[("chat_template.jinja", None), ("tokenizer_config.json", None)]);
        assert_eq!(abilities(dir.path()), (false, false));
    }

    #[test]
    fn bad_files_are_refused_by_name() {
        let config: Value = files::json(&bundled().join("config.json"), files::JSON_MAX).unwrap();
        let with = |key: &str, value: Value| {
            let mut config = config.clone();
            config[key] = value;
            config.to_string()
        };
        refused(&[("config.json", None)], "config.json");
        refused(&[("config.json", Some(&with("eos_token_id", json!("x"))))], "config.json: eos_token_id is neither");
        refused(&[("config.json", Some(&with("vocab_size", json!(8000))))], "tokenizer.json: has token id 8191");
        refused(&[("tokenizer.json", None)], "tokenizer.json");
        refused(&[("tokenizer.json", Some("{}"))], "tokenizer.json");
        refused(&[("tokenizer.json", Some("[".repeat(100_000).as_str()))], "tokenizer.json");
        refused(&[("generation_config.json", Some(r#"{"temperature": -1}"#))], "generation_config.json: temperature is -1");
        refused(&[("generation_config.json", Some(r#"{"eos_token_id": -1}"#))], "generation_config.json: eos_token_id is neither");
        refused(&[("generation_config.json", Some("{"))], "generation_config.json");
        refused(&[("tokenizer_config.json", Some(r#"{"chat_template": 5}"#))], "tokenizer_config.json");
        refused(&[("chat_template.jinja", None), ("tokenizer_config.json", Some(r#"{"chat_template": []}"#))], "none is named `default`");
        refused(&[("chat_template.jinja", Some("{% for x %}"))], "chat_template.jinja");
        refused(&[("chat_template.jinja", Some(&" ".repeat(300_000)))], "chat_template.jinja");
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"] {
            let dir = changed(&[(name, None)]);
            fs::write(dir.path().join(name), b"{\"a\": \"\xff\xfe\"}").unwrap();
            let error = Text::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("utf-8"), "{error}");
        }
    }

    /// The pattern is put where the bundled tokenizer has its own; the crate would take the error for the end of the matches.
    #[test]
    fn a_pattern_that_backtracks_without_end_is_an_error() {
        let json = fs::read_to_string(bundled().join("tokenizer.json")).unwrap();
        let mut tokenizer: Value = serde_json::from_str(&json).unwrap();
        let text = |tokenizer: &Value| Text::open(changed(&[("tokenizer.json", Some(&tokenizer.to_string()))]).path());
        let hostile = format!("{}!", "a".repeat(5000));
        let check = |tokenizer: &Value, pattern: &str| {
            let error = text(tokenizer).unwrap().encode(&hostile).unwrap_err().to_string();
            assert!(error.starts_with("the tokenizer failed: pattern") && error.contains(pattern), "{error}");
        };
        for pattern in [r"(a+)+$(?!b)", r"((?:a*)*)\1b", r"^(a+)+$(?!b)|x(?=y)"] {
            tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!(pattern);
            check(&tokenizer, pattern);
        }
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("[");
        assert!(text(&tokenizer).unwrap_err().to_string().contains("pattern `[`"));

        let mut tokenizer: Value = serde_json::from_str(&json).unwrap();
        tokenizer["normalizer"] = json!({ "type": "Sequence", "normalizers": [{ "type": "NFC" }, { "type": "Replace", "pattern": { "Regex": r"(a*)*\1c" }, "content": "" }] });
        check(&tokenizer, r"(a*)*\1c");
        tokenizer["normalizer"]["normalizers"][1]["pattern"]["Regex"] = json!("a{2}");
        assert_eq!(text(&tokenizer).unwrap().encode("baaa").unwrap(), text(&tokenizer).unwrap().encode("ba").unwrap());
    }
}
