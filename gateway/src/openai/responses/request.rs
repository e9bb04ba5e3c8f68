//! `/v1/responses`, the request: JSON → [`v1::GenerateRequest`], and what the response repeats of it. Pure but for the
//! conversation of an earlier response, which the caller looks up.

use std::sync::Arc;

use flash_proto::v1::{self, generate_request::Prompt, tool_choice::Mode};
use serde_json::{Value, json};

use super::store::Stored;

use crate::{
    ask::{
        self, MESSAGES_MAX, Variables,
        tools::{self, Names, TOOLS_MAX, Tools, Wanted, wire_name},
        turns::{self, Turns, join},
    },
    error::{Code, Failure},
    json::{Node, Object},
    openai::chat::content,
};

/// What clients name in `include` to be told log-probabilities.
const LOGPROBS: &str = "message.output_text.logprobs";

/// One request, read and checked; `generate.model` is still what the client wrote.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) generate: v1::GenerateRequest,
    pub(crate) stream: bool,
    /// Rather lose the oldest messages than be refused for the length.
    pub(crate) truncates: bool,
    /// The conversation without instructions, if the response is to be kept.
    pub(crate) kept: Option<Vec<v1::Message>>,
    pub(crate) echo: Echo,
    pub(crate) names: Names,
    pub(crate) unknown: Vec<String>,
}

/// What the response repeats of the request, as the client wrote it.
#[derive(Debug)]
pub(crate) struct Echo {
    pub(crate) instructions: Value,
    pub(crate) max_output_tokens: Value,
    pub(crate) parallel_tool_calls: Value,
    pub(crate) previous_response_id: Value,
    pub(crate) reasoning: Value,
    pub(crate) temperature: Value,
    pub(crate) text: Value,
    pub(crate) tool_choice: Value,
    pub(crate) tools: Value,
    pub(crate) top_logprobs: Value,
    pub(crate) top_p: Value,
    pub(crate) truncation: Value,
    pub(crate) user: Value,
    pub(crate) metadata: Value,
}

impl Echo {
    fn of(body: &Value) -> Self {
        let or = |key: &str, default: Value| body.get(key).filter(|value| !value.is_null()).cloned().unwrap_or(default);
        let of_reasoning = |key: &str| Some(&body["reasoning"][key]).filter(|value| !value.is_null()).cloned();
        let summary = of_reasoning("summary").or_else(|| of_reasoning("generate_summary"));
        let mut text = or("text", json!({}));
        if text.get("format").is_none_or(Value::is_null) {
            text["format"] = json!({"type": "text"});
        }
        Self {
            instructions: or("instructions", Value::Null),
            max_output_tokens: or("max_output_tokens", Value::Null),
            parallel_tool_calls: or("parallel_tool_calls", true.into()),
            previous_response_id: or("previous_response_id", Value::Null),
            reasoning: json!({"effort": of_reasoning("effort"), "summary": summary}),
            temperature: or("temperature", json!(1.0)),
            text,
            tool_choice: or("tool_choice", "auto".into()),
            tools: or("tools", json!([])),
            top_logprobs: or("top_logprobs", json!(0)),
            top_p: or("top_p", json!(1.0)),
            truncation: or("truncation", "disabled".into()),
            user: or("user", Value::Null),
            metadata: or("metadata", json!({})),
        }
    }
}

/// Finds a response that is kept, by its id.
pub(crate) type Earlier<'a> = &'a dyn Fn(&str) -> Option<Arc<Stored>>;

pub(crate) fn read(body: &Value, earlier: Earlier<'_>) -> Result<Request, Failure> {
    let mut unknown = Vec::new();
    let mut top = Node::root(body).object()?;
    let model = top.read("model", |node| node.text())?.unwrap_or_default().to_owned();
    refuse_unbuilt(&mut top)?;
    let tools = top.read("tools", |node| offered(&node, &mut unknown))?.unwrap_or_default();
    let single = top.read("parallel_tool_calls", |node| node.flag())? == Some(false);
    let choice = top.get("tool_choice");
    let wanted = choice.as_ref().map(Wanted::openai).transpose()?.unwrap_or_default();
    let forced = wanted.mode == Mode::Required;
    let tool_choice = tools.choice(wanted, single, choice.as_ref())?;
    let messages = match top.read("previous_response_id", |node| node.text())? {
        None | Some("") => Vec::new(),
        Some(id) => earlier(id).map(|stored| stored.messages()).ok_or_else(|| {
            let message = "The previous response is not kept here (any more); send the whole conversation as input.";
            Failure::at(Code::PreviousResponseNotFound, "previous_response_id", message)
        })?,
    };
    let mut messages = input(&mut top, Turns { messages }, earlier, &mut unknown)?;
    turns::name_results(&mut messages);
    let kept = top.read("store", |node| node.flag())?.unwrap_or(true).then(|| messages.clone());
    if let Some(text) = top.read("instructions", |node| content(&node, &mut unknown))?.filter(|text| !text.is_empty()) {
        messages.insert(0, v1::Message { role: "system".into(), content: text, ..Default::default() });
    }
    let mut variables = Variables::default();
    if let Some(node) = top.get("reasoning") {
        let mut reasoning = node.object()?;
        reasoning.read("effort", |node| variables.effort(&node))?;
        reasoning.read("max_tokens", |node| variables.budget(&node))?;
        reasoning.ignore(&["summary", "generate_summary", "context"]);
        reasoning.finish(&mut unknown);
    }
    variables.given(&mut top)?;
    let chat = v1::Chat { messages, template_kwargs_json: variables.json(), tools: tools.list, tool_choice, ..Default::default() };
    let format = top.read("text", |node| text(&node, &mut unknown))?.flatten().filter(|_| !forced);
    let generate = v1::GenerateRequest {
        model,
        prompt: Some(Prompt::Chat(chat)),
        sampling: Some(ask::sampling(&mut top)?),
        max_tokens: top.read("max_output_tokens", ask::tokens)?,
        top_logprobs: top
            .read("top_logprobs", |node| node.int(0..=20).map(ask::clamped))?
            .filter(|count| *count > 0)
            .or(body["include"].as_array().is_some_and(|include| include.contains(&LOGPROBS.into())).then_some(0)),
        keep_alive: ask::keep_alive(&mut top)?,
        format,
        ..Default::default()
    };
    let stream = top.read("stream", |node| node.flag())?.unwrap_or(false);
    let truncates = top.read("truncation", |node| node.text())? == Some("auto");
    top.ignore(&[
        "user",
        "metadata",
        "include",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "client_metadata",
        "service_tier",
    ]);
    top.ignore(&["safety_identifier", "stream_options", "max_tool_calls"]);
    top.finish(&mut unknown);
    Ok(Request { generate, stream, truncates, kept, echo: Echo::of(body), names: tools.names, unknown })
}

/// State that OpenAI keeps for its clients, and work without one.
fn refuse_unbuilt(top: &mut Object<'_>) -> Result<(), Failure> {
    if let Some(node) = top.get("background")
        && node.flag()?
    {
        return Err(node.refuse(Code::UnsupportedValue, "responses are not made in the background here"));
    }
    for key in ["conversation", "prompt"] {
        if let Some(node) = top.get(key) {
            return Err(node.refuse(Code::UnsupportedValue, "nothing of this kind is kept here; send the whole conversation as input"));
        }
    }
    Ok(())
}

fn offered(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<Tools, Failure> {
    let mut tools = Tools::default();
    for node in node.array(TOOLS_MAX)? {
        let mut object = node.object()?;
        if object.require("type")?.text()? != "namespace" {
            tool(&node, &mut tools, unknown)?;
            continue;
        }
        let start = tools.list.len();
        for inner in object.require("tools")?.array(TOOLS_MAX)? {
            tool(&inner, &mut tools, unknown)?;
        }
        let name = object.require("name")?;
        tools.enclose(start, tools::name(&name)?);
        if let Some(long) = tools.list[start..].iter().find(|tool| tool.name.len() > 128) {
            let what = format_args!("makes a name of more than 128 characters: {}", long.name);
            return Err(name.refuse(Code::InvalidValue, what));
        }
        object.ignore(&["description", "type"]);
        object.finish(unknown);
    }
    Ok(tools)
}

/// A function or a custom tool; those that OpenAI's servers run are left out.
fn tool(node: &Node<'_>, tools: &mut Tools, unknown: &mut Vec<String>) -> Result<(), Failure> {
    let mut object = node.object()?;
    match object.require("type")?.text()? {
        "function" => tools.function(object, "parameters", unknown),
        "custom" => tools.custom(object, unknown),
        kind => {
            tracing::debug!(kind, "left out a tool of a type that is not offered here");
            Ok(())
        }
    }
}

fn text(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<Option<v1::Format>, Failure> {
    let mut text = node.object()?;
    let format = text.read("format", |node| ask::format(&node, unknown))?.flatten();
    text.ignore(&["verbosity"]);
    text.finish(unknown);
    Ok(format)
}

fn input(top: &mut Object<'_>, mut turns: Turns, earlier: Earlier<'_>, unknown: &mut Vec<String>) -> Result<Vec<v1::Message>, Failure> {
    match top.get("input") {
        None => {}
        Some(node) if node.value.is_array() => {
            for node in node.array(MESSAGES_MAX)? {
                match referred(&node)? {
                    None => item(&node, &mut turns, unknown)?,
                    Some(id) => {
                        let found = id.split('_').nth(1).and_then(|of| earlier(&format!("resp_{of}"))?.item(id));
                        let gone = "names an item that is not kept here (any more); with 'store': false clients send the items themselves";
                        let found = found.ok_or_else(|| node.refuse(Code::InvalidValue, gone))?;
                        item(&Node { value: &found, path: node.path }, &mut turns, unknown)?;
                    }
                }
            }
        }
        Some(node) if node.value.is_string() => turns.say("user", node.text()?.to_owned()),
        Some(node) => return Err(node.refuse(Code::InvalidValue, "must be a string or an array of items")),
    }
    // Clients warm up with nothing; templates want someone to have spoken.
    if turns.messages.iter().all(|message| message.role == "system") {
        turns.say("user", String::new());
    }
    Ok(turns.messages)
}

/// The id of an item that stands for one said before.
fn referred<'a>(node: &Node<'a>) -> Result<Option<&'a str>, Failure> {
    let mut item = node.object()?;
    let (kind, id) = (item.read("type", |node| node.text())?, item.read("id", |node| node.text())?);
    let nothing_else = kind.is_none() && item.get("role").is_none();
    Ok(id.filter(|_| kind == Some("item_reference") || nothing_else))
}

fn item(node: &Node<'_>, turns: &mut Turns, unknown: &mut Vec<String>) -> Result<(), Failure> {
    let mut item = node.object()?;
    let kind = item.read("type", |node| node.text())?.unwrap_or("message");
    match kind {
        "message" => {
            let role = item.require("role")?;
            let content = content(&item.require("content")?, unknown)?;
            match role.text()? {
                "assistant" => turns.content(&content),
                "developer" | "system" => turns.say("system", content),
                "user" => turns.say("user", content),
                _ => return Err(role.refuse(Code::InvalidValue, "must be 'user', 'assistant', 'system' or 'developer'")),
            }
        }
        "function_call" | "custom_tool_call" => {
            let id = item.read("call_id", |node| node.text())?.unwrap_or_default();
            let name = item.require("name")?.text()?;
            let namespace = item.read("namespace", |node| node.text())?;
            let arguments = match kind {
                "function_call" => tools::arguments(item.read("arguments", |node| node.text())?.unwrap_or_default()),
                _ => tools::input(item.read("input", |node| node.text())?.unwrap_or_default()),
            };
            turns.call(id, wire_name(namespace, name), arguments);
        }
        "function_call_output" | "custom_tool_call_output" => {
            let id = item.read("call_id", |node| node.text())?.unwrap_or_default();
            let output = item.get("output").map_or_else(|| Ok(String::new()), |node| output(&node))?;
            turns.result(id, output);
        }
        "reasoning" => {
            let texts = |list: &Value| {
                list.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join("\n")
            };
            let (content, summary) = (texts(&node.value["content"]), texts(&node.value["summary"]));
            let said = if content.is_empty() { summary } else { content };
            if !said.is_empty() {
                turns.reasoning(&said);
            }
        }
        _ => tracing::debug!(kind, "left out an item of a type that means nothing here"),
    }
    Ok(())
}

/// What a tool gave back: text, parts, or whatever it is as JSON.
fn output(node: &Node<'_>) -> Result<String, Failure> {
    if let Some(text) = node.value.as_str() {
        return Ok(text.to_owned());
    }
    if !node.value.is_array() {
        return Ok(node.value.to_string());
    }
    let mut joined = String::new();
    for part in node.array(usize::MAX)? {
        let mut object = part.object()?;
        let kind = object.require("type")?.text()?;
        match object.get("text") {
            Some(text) => join(&mut joined, text.text()?),
            None if kind.contains("image") => join(&mut joined, "[image omitted]"),
            None => join(&mut joined, "[file omitted]"),
        }
    }
    Ok(joined)
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
