//! `/v1/messages`, the request: JSON → [`v1::GenerateRequest`]. Pure. Content that clients write now as text and now as
//! blocks becomes the same text, so that a conversation keeps its prefix.

use std::collections::HashSet;

use flash_proto::v1::{self, generate_request::Prompt, tool_choice::Mode};
use serde_json::{Value, json};

use crate::{
    ask::{
        self, MESSAGES_MAX, Variables,
        tools::{TOOLS_MAX, Tools, Wanted},
        turns::{self, Turns, join},
    },
    error::{Code, Failure},
    json::{Node, Object},
};

/// What Anthropic's API requires and some clients leave out.
const MAX_TOKENS: u32 = 4096;
const IMAGE: &str = "[image omitted]";
const FAILED: &str = "[the tool failed]\n";

/// One request, read and checked; `generate.model` is still what the client wrote.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) generate: v1::GenerateRequest,
    pub(crate) stream: bool,
    /// Whether the client wants to see thinking blocks.
    pub(crate) thinking: bool,
    /// The prompt is only to be read, for later requests: the token that is generated with it is left out.
    pub(crate) prompt_only: bool,
    pub(crate) unknown: Vec<String>,
}

/// A conversation of which only the length is asked.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) model: String,
    pub(crate) chat: v1::Chat,
    pub(crate) unknown: Vec<String>,
}

pub(crate) fn read(body: &Value) -> Result<Request, Failure> {
    let mut unknown = Vec::new();
    let mut top = Node::root(body).object()?;
    let model = model(&mut top)?;
    let Said { chat, format, thinking } = said(&mut top, &mut unknown)?;
    let sampling = v1::Sampling {
        temperature: top.read("temperature", ask::temperature)?,
        top_p: top.read("top_p", ask::top_p)?,
        top_k: top.read("top_k", ask::top_k)?,
        min_p: top.read("min_p", ask::min_p)?,
        seed: top.read("seed", ask::seed)?,
        ..Default::default()
    };
    let prompt_only = body["max_tokens"].as_u64() == Some(0);
    let max_tokens = top.get("max_tokens").filter(|_| !prompt_only).map(ask::tokens).transpose()?;
    let generate = v1::GenerateRequest {
        model,
        prompt: Some(Prompt::Chat(chat)),
        sampling: Some(sampling),
        stop: top.read("stop_sequences", ask::stops)?.unwrap_or_default(),
        max_tokens: Some(if prompt_only { 1 } else { max_tokens.unwrap_or(MAX_TOKENS) }),
        keep_alive: ask::keep_alive(&mut top)?,
        format,
        cache_prompt: prompt_only || marked(body),
        ..Default::default()
    };
    let stream = top.read("stream", |node| node.flag())?.unwrap_or(false);
    top.finish(&mut unknown);
    Ok(Request { generate, stream, thinking, prompt_only, unknown })
}

pub(crate) fn counted(body: &Value) -> Result<Counted, Failure> {
    let mut unknown = Vec::new();
    let mut top = Node::root(body).object()?;
    let model = model(&mut top)?;
    let chat = said(&mut top, &mut unknown)?.chat;
    top.ignore(&["max_tokens", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "stop_sequences", "keep_alive", "ttl"]);
    top.finish(&mut unknown);
    Ok(Counted { model, chat, unknown })
}

/// Whether the client has marked the end of the prompt as one to be kept: on the request, or on the last block.
fn marked(body: &Value) -> bool {
    fn last(list: &Value) -> &Value {
        list.as_array().and_then(|list| list.last()).unwrap_or(&Value::Null)
    }
    let message = last(&body["messages"]);
    [body, message, last(&message["content"])].into_iter().any(|value| !value["cache_control"].is_null())
}

fn model(top: &mut Object<'_>) -> Result<String, Failure> {
    Ok(top.read("model", |node| node.text())?.unwrap_or_default().to_owned())
}

/// What the prompt is made of, and what says how the reply looks.
struct Said {
    chat: v1::Chat,
    format: Option<v1::Format>,
    thinking: bool,
}

fn said(top: &mut Object<'_>, unknown: &mut Vec<String>) -> Result<Said, Failure> {
    if let Some(node) = top.get("thread") {
        thread(&node)?;
    }
    let Offered { mut tools, deferred, mut hosted } = top.read("tools", |node| offered(&node, unknown))?.unwrap_or_default();
    let mut turns = Turns::default();
    if let Some(text) = top.read("system", |node| system(&node, unknown))?.filter(|text| !text.is_empty()) {
        turns.say("system", text);
    }
    let mut conversation = Conversation { turns, deferred: &deferred, wanted: HashSet::new(), unknown };
    conversation.read(&top.require("messages")?)?;
    let Conversation { turns: Turns { mut messages }, wanted: mut told, .. } = conversation;
    let choice = top.get("tool_choice");
    let (mut wanted, single) = choice.as_ref().map(tool_choice).transpose()?.unwrap_or_default();
    // What only Anthropic's servers run is left out, and so is the wish for it.
    hosted.retain(|name| tools.list.iter().chain(&deferred).all(|tool| tool.name != *name));
    let nothing_else = wanted.names.is_empty() && tools.list.is_empty() && deferred.is_empty() && !hosted.is_empty();
    if wanted.mode == Mode::Required && (nothing_else || wanted.names.iter().any(|name| hosted.contains(name))) {
        wanted = Wanted::mode(Mode::Auto);
    }
    told.extend(messages.iter().flat_map(|message| &message.tool_calls).map(|call| call.name.clone()));
    told.extend(wanted.names.iter().cloned());
    // Callable without being shown: the prompt before the conversation stays as it was.
    let known = deferred.iter().filter(|tool| told.contains(&tool.name));
    tools.list.extend(known.map(|tool| v1::Tool { hidden: true, ..tool.clone() }));
    let forced = wanted.mode == Mode::Required;
    let tool_choice = tools.choice(wanted, single, choice.as_ref())?;
    turns::name_results(&mut messages);
    let last = messages.last();
    let continue_final_message =
        last.is_some_and(|last| last.role == "assistant" && last.tool_calls.is_empty() && !last.content.is_empty());
    let mut variables = Variables::default();
    let mut format = top.read("output_format", |node| ask::format(&node, unknown))?.flatten();
    if let Some(node) = top.get("output_config") {
        let mut config = node.object()?;
        config.read("effort", |node| variables.effort(&node))?;
        format = config.read("format", |node| ask::format(&node, unknown))?.flatten().or(format);
        config.finish(unknown);
    }
    let thinking = top.read("thinking", |node| thinking(&node, &mut variables, unknown))?;
    // Who does not ask for thinking does not expect it to use up the tokens.
    let thinking = thinking.unwrap_or_else(|| {
        variables.thinking(false);
        false
    });
    variables.given(top)?;
    top.ignore(&["metadata", "context_management", "safeguards", "service_tier", "container", "mcp_servers", "cache_control"]);
    top.ignore(&["inference_geo", "speed", "betas", "user_profile_id", "diagnostics"]);
    let chat = v1::Chat { messages, template_kwargs_json: variables.json(), continue_final_message, tools: tools.list, tool_choice };
    Ok(Said { chat, format: format.filter(|_| !forced), thinking })
}

/// The SDKs' tool runners have the server keep a conversation, and send all of it once they hear that it is not kept.
fn thread(node: &Node<'_>) -> Result<(), Failure> {
    match node.object()?.require("type")?.text()? {
        "continue" => {
            let message = "Conversations are not kept here; send all of its messages.";
            Err(Failure::at(Code::ThreadNotFound, format!("{}.previous_message_id", node.path), message))
        }
        _ => Ok(()),
    }
}

/// Whether thinking is shown.
fn thinking(node: &Node<'_>, variables: &mut Variables, unknown: &mut Vec<String>) -> Result<bool, Failure> {
    let mut thinking = node.object()?;
    let kind = thinking.require("type")?;
    let on = match kind.text()? {
        "disabled" => false,
        // Newer ways to think are ways to think: clients repeat what is refused.
        _ => true,
    };
    variables.thinking(on);
    thinking.read("budget_tokens", |node| if on { variables.budget(&node) } else { Ok(()) })?;
    let omitted = thinking.read("display", |node| node.text())? == Some("omitted");
    thinking.finish(unknown);
    Ok(on && !omitted)
}

fn tool_choice(node: &Node<'_>) -> Result<(Wanted, bool), Failure> {
    let mut choice = node.object()?;
    let kind = choice.require("type")?;
    let wanted = match kind.text()? {
        "auto" => Wanted::mode(Mode::Auto),
        "any" => Wanted::mode(Mode::Required),
        "none" => Wanted::mode(Mode::None),
        "tool" => Wanted::one(choice.require("name")?.text()?),
        _ => return Err(kind.refuse(Code::InvalidValue, "must be 'auto', 'any', 'tool' or 'none'")),
    };
    Ok((wanted, choice.read("disable_parallel_tool_use", |node| node.flag())?.unwrap_or(false)))
}

#[derive(Debug, Default)]
struct Offered {
    tools: Tools,
    /// Those that are offered once the conversation has told of them.
    deferred: Vec<v1::Tool>,
    /// Names of those that are left out.
    hosted: Vec<String>,
}

fn offered(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<Offered, Failure> {
    let (mut tools, mut deferred, mut hosted) = (Tools::default(), Tools::default(), Vec::new());
    for node in node.array(TOOLS_MAX)? {
        let mut object = node.object()?;
        let kind = object.read("type", |node| node.text())?.unwrap_or("custom");
        if kind != "custom" {
            tracing::debug!(kind, "left out a tool that Anthropic's servers run");
            hosted.extend(object.read("name", |node| node.text())?.map(str::to_owned));
            continue;
        }
        let later = object.read("defer_loading", |node| node.flag())?.unwrap_or(false);
        if later { &mut deferred } else { &mut tools }.function(object, "input_schema", unknown)?;
    }
    Ok(Offered { tools, deferred: deferred.list, hosted })
}

/// Without the blocks that Claude Code's billing puts first: they differ in every conversation.
fn system(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<String, Failure> {
    const HEADER: &str = "x-anthropic-";
    if let Some(text) = node.value.as_str() {
        let rest = text.split_once('\n').map_or("", |(_, rest)| rest);
        return Ok(if text.starts_with(HEADER) { rest } else { text }.to_owned());
    }
    if !node.value.is_array() {
        return Err(node.refuse(Code::InvalidValue, "must be a string or an array of text blocks"));
    }
    let mut joined = String::new();
    for node in node.array(MESSAGES_MAX)? {
        let text = text_block(&node, unknown)?;
        if !text.starts_with(HEADER) {
            join(&mut joined, text);
        }
    }
    Ok(joined)
}

fn text_block<'a>(node: &Node<'a>, unknown: &mut Vec<String>) -> Result<&'a str, Failure> {
    let mut block = node.object()?;
    let text = block.require("text")?.text()?;
    block.ignore(&["type", "cache_control", "citations"]);
    block.finish(unknown);
    Ok(text)
}

/// The messages being read.
struct Conversation<'a> {
    turns: Turns,
    deferred: &'a [v1::Tool],
    /// Names of deferred tools that the conversation tells of.
    wanted: HashSet<String>,
    unknown: &'a mut Vec<String>,
}

impl Conversation<'_> {
    fn read(&mut self, list: &Node<'_>) -> Result<(), Failure> {
        let messages: Vec<_> = list.array(MESSAGES_MAX)?.collect();
        if messages.is_empty() {
            return Err(list.refuse(Code::InvalidValue, "must have at least one element"));
        }
        let last_user = messages.iter().rposition(|node| node.value["role"] == "user");
        for (at, node) in messages.iter().enumerate() {
            let mut message = node.object()?;
            let role = message.require("role")?;
            let content = message.require("content")?;
            match role.text()? {
                "assistant" => self.assistant(&content)?,
                "user" => self.user(&content, last_user == Some(at))?,
                "system" => {
                    let text = system(&content, self.unknown)?;
                    self.turns.say("system", text);
                }
                _ => return Err(role.refuse(Code::InvalidValue, "must be 'user', 'assistant' or 'system'")),
            }
            message.ignore(&["id", "cache_control"]);
            message.finish(self.unknown);
        }
        Ok(())
    }

    fn assistant(&mut self, content: &Node<'_>) -> Result<(), Failure> {
        if let Some(text) = content.value.as_str() {
            self.turns.content(text);
            return Ok(());
        }
        for node in blocks(content)? {
            let mut block = node.object()?;
            match block.require("type")?.text()? {
                "text" => {
                    let text = text_block(&node, self.unknown)?;
                    self.turns.content(text);
                    continue;
                }
                "thinking" => self.turns.reasoning(block.require("thinking")?.text()?),
                "redacted_thinking" => {}
                "tool_use" => {
                    let id = block.read("id", |node| node.text())?.unwrap_or_default();
                    let name = block.require("name")?.text()?.to_owned();
                    let input = block.get("input").map_or_else(|| "{}".to_owned(), |input| input.value.to_string());
                    self.turns.call(id, name, input);
                }
                // What Anthropic's servers did is told as text.
                _ => {
                    let text = self.told(&node)?;
                    self.turns.content(&text);
                    continue;
                }
            }
            block.ignore(&["signature", "data", "cache_control", "caller"]);
            block.finish(self.unknown);
        }
        Ok(())
    }

    /// Texts in between results become messages of their own, in their place.
    fn user(&mut self, content: &Node<'_>, last: bool) -> Result<(), Failure> {
        if let Some(text) = content.value.as_str() {
            self.turns.say("user", text.to_owned());
            return Ok(());
        }
        let before = self.turns.messages.len();
        let mut text = String::new();
        for node in blocks(content)? {
            let mut block = node.object()?;
            if block.require("type")?.text()? != "tool_result" {
                join(&mut text, &self.part(&node, last)?);
                continue;
            }
            if !text.is_empty() {
                self.turns.say("user", std::mem::take(&mut text));
            }
            let id = block.read("tool_use_id", |node| node.text())?.unwrap_or_default();
            let result = match block.get("content") {
                None => String::new(),
                Some(node) => match node.value.as_str() {
                    Some(text) => text.to_owned(),
                    None => self.result(&node)?,
                },
            };
            // Templates know results only; the model is to know that this is none.
            let failed = block.read("is_error", |node| node.flag())?.unwrap_or(false);
            self.turns.result(id, if failed { format!("{FAILED}{result}") } else { result });
            block.ignore(&["cache_control"]);
            block.finish(self.unknown);
        }
        if !text.is_empty() || self.turns.messages.len() == before {
            self.turns.say("user", text);
        }
        Ok(())
    }

    fn result(&mut self, node: &Node<'_>) -> Result<String, Failure> {
        let mut text = String::new();
        for part in blocks(node)? {
            join(&mut text, &self.part(&part, false)?);
        }
        Ok(text)
    }

    /// The text of any block of the user's.
    fn part(&mut self, node: &Node<'_>, last: bool) -> Result<String, Failure> {
        let mut block = node.object()?;
        match block.require("type")?.text()? {
            "text" => text_block(node, self.unknown).map(str::to_owned),
            "image" if last => Err(ask::text_only(node)),
            "image" => Ok(IMAGE.to_owned()),
            "document" => match block.require("source")? {
                source if source.value["type"] == "text" => Ok(source.object()?.require("data")?.text()?.to_owned()),
                source if source.value["type"] == "content" => match source.object()?.require("content")? {
                    content if content.value.is_string() => Ok(content.text()?.to_owned()),
                    content => self.result(&content),
                },
                _ if last => Err(ask::text_only(node)),
                _ => Ok("[document omitted]".to_owned()),
            },
            "tool_reference" => {
                let name = block.require("tool_name")?.text()?;
                self.wanted.insert(name.to_owned());
                Ok(self.deferred.iter().find(|tool| tool.name == name).map_or_else(|| name.to_owned(), definition))
            }
            _ => self.told(node),
        }
    }

    /// A block of another kind as text: what it contains if that is text, else all of it.
    fn told(&mut self, node: &Node<'_>) -> Result<String, Failure> {
        let content = &node.value["content"];
        if let Some(text) = content.as_str() {
            return Ok(text.to_owned());
        }
        let texts: Vec<&str> = content.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str()).collect();
        if !texts.is_empty() {
            return Ok(texts.join("\n"));
        }
        let mut whole = node.value.clone();
        if let Some(whole) = whole.as_object_mut() {
            // Differs from turn to turn.
            whole.shift_remove("cache_control");
        }
        Ok(whole.to_string())
    }
}

fn blocks<'a>(node: &Node<'a>) -> Result<impl Iterator<Item = Node<'a>> + use<'a>, Failure> {
    if !node.value.is_array() {
        return Err(node.refuse(Code::InvalidValue, "must be a string or an array of blocks"));
    }
    node.array(usize::MAX)
}

/// What a search for tools shows of one.
fn definition(tool: &v1::Tool) -> String {
    let parameters: Value = serde_json::from_str(&tool.parameters_json).unwrap_or_else(|_| json!({}));
    json!({"name": tool.name, "description": tool.description, "parameters": parameters}).to_string()
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
