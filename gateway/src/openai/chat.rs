//! `/v1/chat/completions`, the request: JSON → [`v1::GenerateRequest`]. Pure; the reply is in `chunks.rs`.

use flash_proto::v1::{self, generate_request::Prompt, tool_choice::Mode};
use serde_json::Value;

use crate::{
    ask::{
        self, MESSAGES_MAX, Variables,
        tools::{self, Names, TOOLS_MAX, Tools, Wanted},
        turns,
    },
    error::{Code, Failure},
    json::{Node, Object},
};

/// One request, read and checked; `generate.model` is still what the client wrote.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) generate: v1::GenerateRequest,
    /// Choices wanted.
    pub(crate) n: u32,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) names: Names,
    /// Calls are told in the form before `tool_calls`.
    pub(crate) legacy: bool,
    /// Fields that were ignored because nobody knows them.
    pub(crate) unknown: Vec<String>,
}

pub(crate) fn read(body: &Value) -> Result<Request, Failure> {
    let mut unknown = Vec::new();
    let mut top = Node::root(body).object()?;
    let model = top.read("model", |node| node.text())?.unwrap_or_default().to_owned();
    refuse_audio(&mut top)?;
    let (tools, tool_choice, legacy) = offered(&mut top, &mut unknown)?;
    let forced = tool_choice.as_ref().is_some_and(|choice| choice.mode() == Mode::Required);
    // A call that must come leaves no room for another form.
    let format = top.read("response_format", |node| ask::format(&node, &mut unknown))?.flatten().filter(|_| !forced);
    let chat = v1::Chat { tools: tools.list, tool_choice, ..conversation(&mut top, &mut unknown)? };
    let stream = top.read("stream", |node| node.flag())?.unwrap_or(false);
    let include_usage = top.read("stream_options", |node| stream_options(&node, &mut unknown))?.unwrap_or(false);
    let new_max = top.read("max_completion_tokens", ask::tokens)?;
    let old_max = top.read("max_tokens", ask::tokens)?;
    let generate = v1::GenerateRequest {
        model,
        prompt: Some(Prompt::Chat(chat)),
        sampling: Some(ask::sampling(&mut top)?),
        stop: top.read("stop", ask::stops)?.unwrap_or_default(),
        max_tokens: new_max.or(old_max),
        top_logprobs: top_logprobs(&mut top)?,
        // As vLLM and llama.cpp spell it: benchmarks ask for so many tokens and no fewer.
        ignore_eos: top.read("ignore_eos", |node| node.flag())?.unwrap_or(false),
        keep_alive: ask::keep_alive(&mut top)?,
        format,
        ..Default::default()
    };
    let n = top.read("n", |node| node.int(1..=4).map(ask::clamped))?.unwrap_or(1);
    top.ignore(&["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"]);
    top.ignore(&["prediction", "verbosity", "web_search_options"]);
    top.finish(&mut unknown);
    Ok(Request { generate, n, stream, include_usage, names: tools.names, legacy, unknown })
}

fn refuse_audio(top: &mut Object<'_>) -> Result<(), Failure> {
    let audio = |node: &Node<'_>| Err(node.refuse(Code::UnsupportedModality, "the model answers in text only"));
    if let Some(node) = top.get("modalities") {
        for kind in node.array(8)? {
            if kind.text()? != "text" {
                return audio(&kind);
            }
        }
    }
    top.get("audio").map_or(Ok(()), |node| audio(&node))
}

/// Tools, which of them may be called, and whether the client speaks of functions.
fn offered(top: &mut Object<'_>, unknown: &mut Vec<String>) -> Result<(Tools, Option<v1::ToolChoice>, bool), Failure> {
    let mut tools = Tools::default();
    if let Some(list) = top.get("tools") {
        for node in list.array(TOOLS_MAX)? {
            tool(&node, &mut tools, unknown)?;
        }
    }
    let functions = top.get("functions");
    let legacy = tools.list.is_empty() && functions.is_some();
    if let Some(list) = functions {
        for node in list.array(TOOLS_MAX)?.filter(|_| legacy) {
            tools.function(node.object()?, "parameters", unknown)?;
        }
    }
    let single = top.read("parallel_tool_calls", |node| node.flag())? == Some(false) || legacy;
    let (choice, call) = (top.get("tool_choice"), top.get("function_call"));
    let node = choice.or(call.filter(|_| legacy));
    let wanted = match &node {
        None => Wanted::default(),
        Some(node) if legacy && node.value.get("name").is_some() => Wanted::one(node.object()?.require("name")?.text()?),
        Some(node) => Wanted::openai(node)?,
    };
    let choice = tools.choice(wanted, single, node.as_ref())?;
    Ok((tools, choice, legacy))
}

fn tool(node: &Node<'_>, tools: &mut Tools, unknown: &mut Vec<String>) -> Result<(), Failure> {
    let mut object = node.object()?;
    let kind = object.read("type", |node| node.text())?.unwrap_or("function");
    match kind {
        "function" => tools.function(object.require("function")?.object()?, "parameters", unknown)?,
        "custom" => tools.custom(object.require("custom")?.object()?, unknown)?,
        _ => {
            tracing::debug!(kind, "left out a tool of a type that is not offered here");
            return Ok(());
        }
    }
    object.ignore(&["cache_control", "strict"]);
    object.finish(unknown);
    Ok(())
}

fn conversation(top: &mut Object<'_>, unknown: &mut Vec<String>) -> Result<v1::Chat, Failure> {
    let list = top.require("messages")?;
    let mut messages = Vec::new();
    let mut prefix = false;
    for node in list.array(MESSAGES_MAX)? {
        let (message, is_prefix) = message(&node, unknown)?;
        messages.push(message);
        prefix = is_prefix;
    }
    let Some(last) = messages.last() else {
        return Err(list.refuse(Code::InvalidValue, "must have at least one element"));
    };
    // A turn of nothing is no turn, and no beginning of a reply.
    let empty = last.role == "assistant" && last.content.is_empty() && last.reasoning.is_none() && last.tool_calls.is_empty();
    let of_assistant = last.role == "assistant";
    let continue_final_message = match top.get("continue_final_message") {
        Some(node) if node.flag()? && !of_assistant => {
            return Err(node.refuse(Code::InvalidValue, "the last message is not the assistant's"));
        }
        Some(node) => node.flag()? && !empty,
        None => prefix && of_assistant && !empty,
    };
    if empty && messages.len() > 1 {
        messages.pop();
    }
    turns::name_results(&mut messages);
    Ok(v1::Chat { messages, template_kwargs_json: variables(top)?, continue_final_message, ..v1::Chat::default() })
}

/// A message and whether it asks to be continued.
fn message(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<(v1::Message, bool), Failure> {
    let mut object = node.object()?;
    let role = object.require("role")?;
    let role = match role.text()? {
        "developer" => "system",
        "function" => "tool",
        known @ ("system" | "user" | "assistant" | "tool") => known,
        _ => return Err(role.refuse(Code::InvalidValue, "must be 'system', 'developer', 'user', 'assistant' or 'tool'")),
    };
    let refusal = object.read("refusal", |node| node.text())?;
    let content = match role {
        "assistant" => object.read("content", |node| content(&node, unknown))?.unwrap_or_else(|| refusal.unwrap_or_default().to_owned()),
        "tool" => object.read("content", |node| content(&node, unknown))?.unwrap_or_default(),
        _ => content(&object.require("content")?, unknown)?,
    };
    let name = object.read("name", |node| node.text())?.map(str::to_owned);
    let prefix = object.read("prefix", |node| node.flag())?.unwrap_or(false);
    let reasoning = match object.read("reasoning_content", |node| node.text())? {
        None => object.read("reasoning", |node| node.text())?,
        found => found,
    };
    let mut tool_calls = match object.get("tool_calls") {
        Some(node) => node.array(TOOLS_MAX)?.map(|call| tool_call(&call, unknown)).collect::<Result<Vec<_>, _>>()?,
        None => Vec::new(),
    };
    if let Some(node) = object.get("function_call").filter(|_| tool_calls.is_empty()) {
        tool_calls.push(function_call(node.object()?, String::new(), unknown)?);
    }
    let tool_call_id = object.read("tool_call_id", |node| node.text())?.map(str::to_owned);
    object.ignore(&["reasoning", "reasoning_details", "annotations", "audio", "cache_control", "id"]);
    object.finish(unknown);
    let reasoning = reasoning.filter(|text| !text.is_empty()).map(str::to_owned);
    Ok((v1::Message { role: role.to_owned(), content, name, reasoning, tool_calls, tool_call_id }, prefix))
}

fn tool_call(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<v1::ToolCall, Failure> {
    let mut object = node.object()?;
    let id = object.read("id", |node| node.text())?.unwrap_or_default().to_owned();
    object.ignore(&["type", "index", "extra_content"]);
    let call = match object.get("custom") {
        Some(custom) => {
            let mut custom = custom.object()?;
            let name = custom.require("name")?.text()?.to_owned();
            let input = custom.read("input", |node| node.text())?.unwrap_or_default();
            custom.finish(unknown);
            v1::ToolCall { id, name, arguments_json: tools::input(input) }
        }
        None => function_call(object.require("function")?.object()?, id, unknown)?,
    };
    object.finish(unknown);
    Ok(call)
}

/// Arguments are JSON as text; some clients send the object itself.
fn function_call(mut object: Object<'_>, id: String, unknown: &mut Vec<String>) -> Result<v1::ToolCall, Failure> {
    let name = object.require("name")?.text()?.to_owned();
    let arguments_json = match object.get("arguments") {
        None => tools::arguments(""),
        Some(node) if node.value.is_object() => node.value.to_string(),
        Some(node) => tools::arguments(node.text()?),
    };
    object.finish(unknown);
    Ok(v1::ToolCall { id, name, arguments_json })
}

/// Text, or parts whose texts follow each other.
pub(crate) fn content(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<String, Failure> {
    if let Some(text) = node.value.as_str() {
        return Ok(text.to_owned());
    }
    if !node.value.is_array() {
        return Err(node.refuse(Code::InvalidValue, "must be a string or an array of parts"));
    }
    let mut joined = String::new();
    for part in node.array(usize::MAX)? {
        let mut object = part.object()?;
        let kind = object.require("type")?;
        let text = match kind.text()? {
            "text" | "input_text" | "output_text" => object.require("text")?.text()?,
            "refusal" => object.require("refusal")?.text()?,
            // Thoughts as other servers write them among an assistant's parts.
            "thinking" | "reasoning" | "reasoning_text" => continue,
            "image_url" | "input_image" | "image" | "input_audio" | "audio" | "video_url" | "file" | "input_file" | "document" => {
                return Err(ask::text_only(&part));
            }
            _ => return Err(kind.refuse(Code::InvalidValue, "must be 'text', 'input_text' or 'refusal'")),
        };
        object.ignore(&["cache_control", "annotations"]);
        object.finish(unknown);
        joined.push_str(text);
    }
    Ok(joined)
}

/// The explicit ones win over what the others imply.
fn variables(top: &mut Object<'_>) -> Result<String, Failure> {
    let mut variables = Variables::default();
    if let Some(node) = top.get("reasoning") {
        let mut reasoning = node.object()?;
        reasoning.read("enabled", |node| node.flag())?.into_iter().for_each(|on| variables.thinking(on));
        reasoning.read("effort", |node| variables.effort(&node))?;
        reasoning.read("max_tokens", |node| variables.budget(&node))?;
    }
    top.read("reasoning_effort", |node| variables.effort(&node))?;
    top.read("thinking_budget", |node| variables.budget(&node))?;
    variables.given(top)?;
    Ok(variables.json())
}

pub(super) fn stream_options(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<bool, Failure> {
    let mut options = node.object()?;
    let include_usage = options.read("include_usage", |node| node.flag())?.unwrap_or(false);
    options.ignore(&["include_obfuscation"]);
    options.finish(unknown);
    Ok(include_usage)
}

fn top_logprobs(top: &mut Object<'_>) -> Result<Option<u32>, Failure> {
    let wanted = top.read("logprobs", |node| node.flag())?.unwrap_or(false);
    match top.get("top_logprobs") {
        Some(node) => {
            let count = node.int(0..=20)?;
            if !wanted && count > 0 {
                return Err(node.refuse(Code::InvalidValue, "needs 'logprobs' to be true"));
            }
            Ok(wanted.then(|| ask::clamped(count)))
        }
        None => Ok(wanted.then_some(0)),
    }
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
