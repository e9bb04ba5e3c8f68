//! `/v1/completions`, both directions and pure: raw text or token ids in, no chat template, text out.

use flash_proto::v1::{self, done::Finish, generate_event::Event, generate_request::Prompt};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::types::{Head, Usage, finite, usage};
use crate::{
    ask,
    error::{Code, Failure},
    json::Node,
    reply::{Collected, Piece},
    sse,
};

const PROMPTS_MAX: usize = 8;
const MAX_TOKENS: u32 = 16;

/// One request, read and checked; the requests' model is still what the client wrote.
#[derive(Debug)]
pub(crate) struct Request {
    /// The choices of the first prompt, then those of the next.
    pub(crate) requests: Vec<v1::GenerateRequest>,
    pub(crate) stream: bool,
    pub(crate) style: Style,
    pub(crate) unknown: Vec<String>,
}

/// What the request says about its reply.
#[derive(Debug)]
pub(crate) struct Style {
    pub(crate) head: Head,
    /// Choices per prompt.
    n: usize,
    /// The prompts, if they are to be repeated; of token ids nothing: their text comes with their log-probabilities.
    echo: Option<Vec<String>>,
    /// The prompt alone was asked for: the one token that is generated with it is left out.
    prompt_only: bool,
    include_usage: bool,
    logprobs: bool,
}

pub(crate) fn read(body: &Value, head: impl FnOnce(&str) -> Head) -> Result<Request, Failure> {
    let mut unknown = Vec::new();
    let mut top = Node::root(body).object()?;
    let model = top.read("model", |node| node.text())?.unwrap_or_default().to_owned();
    let suffix = top.get("suffix").map(|node| Ok::<_, Failure>((node.text()?, node))).transpose()?.filter(|(text, _)| !text.is_empty());
    let prompt_node = top.require("prompt")?;
    let mut prompts = prompts(&prompt_node)?;
    let n = top.read("n", |node| node.int(1..=4).map(ask::clamped))?.unwrap_or(1);
    if let Some(node) = top.get("best_of")
        && node.int(1..=20)? != i64::from(n)
    {
        return Err(node.refuse(Code::UnsupportedValue, "must be equal to 'n': all choices are sent"));
    }
    let top_logprobs = top.read("logprobs", |node| node.int(0..=5).map(ask::clamped))?;
    let mut echo = None;
    if let Some(node) = top.get("echo")
        && node.flag()?
    {
        let text = |prompt: &Prompt| if let Prompt::Text(text) = prompt { text.clone() } else { String::new() };
        echo = Some(prompts.iter().map(text).collect::<Vec<_>>());
    }
    let max_tokens = top.get("max_tokens");
    let prompt_only = echo.is_some() && max_tokens.as_ref().is_some_and(|node| node.value.as_u64() == Some(0));
    let max_tokens = if prompt_only { Some(1) } else { max_tokens.map(ask::tokens).transpose()? };
    if let Some((suffix, node)) = suffix {
        for prompt in &mut prompts {
            *prompt = match std::mem::replace(prompt, Prompt::Text(String::new())) {
                Prompt::Text(prefix) => Prompt::Infill(v1::Infill { prefix, suffix: suffix.to_owned() }),
                _ => return Err(node.refuse(Code::UnsupportedValue, "goes with a text, not with token ids")),
            };
        }
    }
    // The texts of ids come with their log-probabilities, wanted or not.
    let ids = prompts.iter().any(|prompt| matches!(prompt, Prompt::Tokens(_)));
    let told = top_logprobs.or((echo.is_some() && ids).then_some(0));
    let options = top.read("stream_options", |node| super::chat::stream_options(&node, &mut unknown))?;
    let generate = v1::GenerateRequest {
        sampling: Some(ask::sampling(&mut top)?),
        stop: top.read("stop", ask::stops)?.unwrap_or_default(),
        max_tokens: Some(max_tokens.unwrap_or(MAX_TOKENS)),
        top_logprobs: told,
        prompt_logprobs: echo.is_some() && told.is_some(),
        // As vLLM and llama.cpp spell it: benchmarks ask for so many tokens and no fewer.
        ignore_eos: top.read("ignore_eos", |node| node.flag())?.unwrap_or(false),
        keep_alive: ask::keep_alive(&mut top)?,
        model,
        ..Default::default()
    };
    let stream = top.read("stream", |node| node.flag())?.unwrap_or(false);
    top.ignore(&["user"]);
    top.finish(&mut unknown);
    let style = Style {
        head: head(&generate.model),
        n: n as usize,
        echo,
        prompt_only,
        include_usage: options.unwrap_or(false),
        logprobs: top_logprobs.is_some(),
    };
    let of_prompt = |prompt| ask::choices(v1::GenerateRequest { prompt: Some(prompt), ..generate.clone() }, n);
    let requests = prompts.into_iter().flat_map(of_prompt).collect();
    Ok(Request { requests, stream, style, unknown })
}

/// A text, token ids, or several of one of them.
fn prompts(node: &Node<'_>) -> Result<Vec<Prompt>, Failure> {
    let ids = |node: &Node<'_>| {
        let ids: Result<Vec<_>, _> = node.array(usize::MAX)?.map(|id| id.int(0..=u32::MAX.into()).map(ask::clamped)).collect();
        match ids? {
            ids if ids.is_empty() => Err(node.refuse(Code::InvalidValue, "must have at least one token")),
            ids => Ok(Prompt::Tokens(v1::TokenIds { ids })),
        }
    };
    match node.value {
        Value::String(text) => Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(items) if items.is_empty() => Err(node.refuse(Code::InvalidValue, "must have at least one element")),
        Value::Array(items) if items[0].is_number() => Ok(vec![ids(node)?]),
        Value::Array(_) => {
            let one = |node: Node<'_>| if node.value.is_array() { ids(&node) } else { Ok(Prompt::Text(node.text()?.to_owned())) };
            node.array(PROMPTS_MAX)?.map(one).collect()
        }
        _ => Err(node.refuse(Code::InvalidValue, "must be a string, token ids, or an array of them")),
    }
}

#[derive(Debug, Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    head: &'a Head,
    object: &'static str,
    choices: Vec<Value>,
    /// `Some(None)` is a null: promised for the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

impl Style {
    fn echoed(&self, choice: usize) -> &str {
        self.echo.as_ref().map_or("", |texts| &texts[choice / self.n])
    }

    fn choice(&self, index: usize, text: &str, logprobs: Option<Value>, finish: Option<Finish>) -> Value {
        let finish = finish.map(|finish| if finish == Finish::Length { "length" } else { "stop" });
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
    }

    fn body(&self, choices: Vec<Value>, usage: Option<Option<Usage>>) -> impl Serialize + '_ {
        Body { head: &self.head, object: "text_completion", choices, usage }
    }

    fn usage(&self, mut all: Vec<v1::Usage>) -> Usage {
        if self.prompt_only {
            all.iter_mut().for_each(|usage| usage.completion_tokens = 0);
        }
        usage(&all.chunks(self.n).collect::<Vec<_>>())
    }

    /// What a choice begins with: the prompt as it was sent, or as its tokens read.
    fn beginning(&self, choice: usize, tokens: &[v1::TokenLogprob]) -> String {
        match self.echoed(choice) {
            "" => String::from_utf8_lossy(&tokens.iter().flat_map(|token| token.token.iter().copied()).collect::<Vec<_>>()).into_owned(),
            text => text.to_owned(),
        }
    }

    /// What was collected → one completion.
    pub(crate) fn completion(&mut self, replies: &[Collected]) -> impl Serialize + '_ {
        if let Some(first) = replies.first() {
            self.head.system_fingerprint.clone_from(&first.accepted.fingerprint);
        }
        let choice = |(index, reply): (usize, &Collected)| {
            let texts = reply.pieces.iter().map(|piece| match piece {
                // A raw prompt has no channels and no tools.
                Piece::Reasoning(text) | Piece::Content { text, .. } => text.as_str(),
                Piece::Call { .. } => "",
            });
            let mut text = self.beginning(index, &reply.prompt);
            let mut tokens = reply.prompt.clone();
            if self.prompt_only {
                let logprobs = self.logprobs.then(|| legacy(&tokens, &mut Offset::default()));
                return self.choice(index, &text, logprobs, Some(Finish::Length));
            }
            text.extend(texts);
            tokens.extend(reply.logprobs());
            let logprobs = self.logprobs.then(|| legacy(&tokens, &mut Offset::default()));
            self.choice(index, &text, logprobs, Some(reply.finish()))
        };
        let choices = replies.iter().enumerate().map(choice).collect();
        let usages = replies.iter().map(Collected::usage).collect();
        self.body(choices, Some(Some(self.usage(usages))))
    }
}

/// Where in the text the next token begins, in characters.
#[derive(Clone, Debug, Default)]
struct Offset {
    characters: usize,
    /// The beginning of a character.
    held: Vec<u8>,
}

impl Offset {
    /// Where the token begins: for a part of a character, where the character does.
    fn of(&mut self, token: &[u8]) -> usize {
        let before = self.characters;
        self.held.extend_from_slice(token);
        let begun = self.held.utf8_chunks().last().map_or(&[][..], |chunk| chunk.invalid());
        let held = if std::str::from_utf8(begun).is_err_and(|error| error.error_len().is_none()) { begun.to_vec() } else { Vec::new() };
        let whole = &self.held[..self.held.len() - held.len()];
        self.characters += String::from_utf8_lossy(whole).chars().count();
        self.held = held;
        before
    }
}

/// The form from before chat; `offset` goes on from what came before.
fn legacy(tokens: &[v1::TokenLogprob], offset: &mut Offset) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    // Nothing comes before a prompt's first token.
    let known = |token: &v1::TokenLogprob| !token.logprob.is_nan();
    let top = |token: &v1::TokenLogprob| -> Option<Map<String, Value>> {
        let others = token.top.iter().map(|other| (text(&other.token), finite(other.logprob).into()));
        let chosen = (text(&token.token), finite(token.logprob).into());
        known(token).then(|| others.chain([chosen]).collect())
    };
    let offsets: Vec<_> = tokens.iter().map(|token| offset.of(&token.token)).collect();
    json!({
        "tokens": tokens.iter().map(|token| text(&token.token)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| known(token).then(|| finite(token.logprob))).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

/// Events → the text of a stream.
#[derive(Debug)]
pub(crate) struct Chunks {
    style: Style,
    /// How far the text is, and how it went, of every choice.
    choices: Vec<(Offset, Option<v1::Usage>)>,
}

impl Chunks {
    pub(crate) fn new(style: Style, choices: usize) -> Self {
        Self { style, choices: vec![(Offset::default(), None); choices] }
    }

    pub(crate) fn event(&mut self, choice: usize, event: &Event, out: &mut String) {
        let style = &self.style;
        let said = match event {
            Event::Accepted(accepted) => {
                self.style.head.system_fingerprint.clone_from(&accepted.fingerprint);
                let echoed = self.style.echoed(choice);
                (!echoed.is_empty()).then(|| self.style.choice(choice, echoed, None, None))
            }
            Event::Prompt(prompt) => {
                let logprobs = style.logprobs.then(|| legacy(&prompt.tokens, &mut self.choices[choice].0));
                let text = if style.echoed(choice).is_empty() { style.beginning(choice, &prompt.tokens) } else { String::new() };
                (style.logprobs || !text.is_empty()).then(|| style.choice(choice, &text, logprobs, None))
            }
            Event::Text(_) if style.prompt_only => None,
            Event::Text(text) => (!text.text.is_empty() || !text.logprobs.is_empty()).then(|| {
                let logprobs = style.logprobs.then(|| legacy(&text.logprobs, &mut self.choices[choice].0));
                style.choice(choice, &text.text, logprobs, None)
            }),
            Event::Done(done) => {
                self.choices[choice].1 = Some(done.usage.unwrap_or_default());
                let finish = if style.prompt_only { Finish::Length } else { done.finish() };
                Some(style.choice(choice, "", None, Some(finish)))
            }
            _ => None,
        };
        if let Some(said) = said {
            sse::data(&self.style.body(vec![said], self.style.include_usage.then_some(None)), out);
        }
        let usages: Vec<_> = self.choices.iter().filter_map(|(_, usage)| *usage).collect();
        if matches!(event, Event::Done(_)) && usages.len() == self.choices.len() {
            if self.style.include_usage {
                sse::data(&self.style.body(Vec::new(), Some(Some(self.style.usage(usages)))), out);
            }
            out.push_str(sse::DONE);
        }
    }
}

#[cfg(test)]
#[path = "completions_tests.rs"]
mod tests;
