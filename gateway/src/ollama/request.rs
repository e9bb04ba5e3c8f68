//! `/api/chat` and `/api/generate`, the requests: JSON → [`v1::GenerateRequest`]. Pure.

use flash_proto::v1::{self, generate_request::Prompt};
use serde_json::Value;

use crate::{
    ask::{
        self, MESSAGES_MAX, Variables,
        tools::{self, TOOLS_MAX, Tools, Wanted},
        turns,
    },
    error::{Code, Failure},
    json::{Node, Object},
};

/// What is to be done: a request that says nothing only loads the model, or unloads it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Task {
    Generate,
    Load,
    Unload,
}

/// One request, read and checked; `generate.model` is still what the client wrote.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) generate: v1::GenerateRequest,
    pub(crate) task: Task,
    pub(crate) stream: bool,
    pub(crate) unknown: Vec<String>,
}

pub(crate) fn chat(body: &Value) -> Result<Request, Failure> {
    let mut unknown = Vec::new();
    let mut top = Node::root(body).object()?;
    let mut messages = Vec::new();
    if let Some(list) = top.get("messages") {
        for node in list.array(MESSAGES_MAX)? {
            messages.push(message(&node, &mut unknown)?);
        }
    }
    turns::name_results(&mut messages);
    let mut tools = Tools::default();
    if let Some(list) = top.get("tools") {
        for node in list.array(TOOLS_MAX)? {
            tools.function(node.object()?.require("function")?.object()?, "parameters", &mut unknown)?;
        }
    }
    let tool_choice = tools.choice(Wanted::default(), false, None)?;
    let empty = messages.is_empty();
    let chat = v1::Chat { messages, template_kwargs_json: thinking(&mut top)?, tools: tools.list, tool_choice, ..Default::default() };
    settings(top, Prompt::Chat(chat), empty, unknown)
}

pub(crate) fn generate(body: &Value) -> Result<Request, Failure> {
    let unknown = Vec::new();
    let mut top = Node::root(body).object()?;
    let text = top.read("prompt", |node| node.text())?.unwrap_or_default();
    let system = top.read("system", |node| node.text())?.filter(|text| !text.is_empty());
    let suffix = top.read("suffix", |node| node.text())?.filter(|text| !text.is_empty());
    for key in ["template", "context"] {
        if let Some(node) = top.get(key)
            && node.value.as_str() != Some("")
            && node.value.as_array().is_none_or(|context| !context.is_empty())
        {
            return Err(node.refuse(Code::UnsupportedValue, "is not supported; send messages to /api/chat"));
        }
    }
    refuse_images(&mut top)?;
    let variables = thinking(&mut top)?;
    let prompt = if top.read("raw", |node| node.flag())?.unwrap_or(false) {
        Prompt::Text(text.to_owned())
    } else if let Some(suffix) = suffix {
        Prompt::Infill(v1::Infill { prefix: text.to_owned(), suffix: suffix.to_owned() })
    } else {
        let said = |role: &str, content: &str| v1::Message { role: role.into(), content: content.into(), ..Default::default() };
        let messages = system.map(|text| said("system", text)).into_iter().chain([said("user", text)]).collect();
        Prompt::Chat(v1::Chat { messages, template_kwargs_json: variables, ..Default::default() })
    };
    settings(top, prompt, text.is_empty() && suffix.is_none(), unknown)
}

/// What both have in common.
fn settings(mut top: Object<'_>, prompt: Prompt, empty: bool, mut unknown: Vec<String>) -> Result<Request, Failure> {
    let mut generate = v1::GenerateRequest {
        model: top.read("model", |node| node.text())?.unwrap_or_default().to_owned(),
        prompt: Some(prompt),
        keep_alive: ask::keep_alive(&mut top)?,
        format: top.read("format", format)?.flatten(),
        sampling: Some(v1::Sampling::default()),
        ..Default::default()
    };
    if let Some(node) = top.get("options") {
        options(node.object()?, &mut generate)?;
    }
    let stream = top.read("stream", |node| node.flag())?.unwrap_or(true);
    top.ignore(&["truncate", "shift", "logprobs", "top_logprobs"]);
    top.finish(&mut unknown);
    let unload = generate.keep_alive.as_ref().is_some_and(|time| time.trim_end_matches(char::is_alphabetic) == "0");
    let task = match (empty, unload) {
        (false, _) => Task::Generate,
        (true, false) => Task::Load,
        (true, true) => Task::Unload,
    };
    Ok(Request { generate, task, stream, unknown })
}

/// Sampling and limits; the rest is about how Ollama runs a model.
fn options(mut options: Object<'_>, generate: &mut v1::GenerateRequest) -> Result<(), Failure> {
    // Ollama takes any number and makes do with the nearest that it can use.
    let within = |low: f32, high: f32| move |node: Node<'_>| node.float("must be a number", f64::is_finite).map(|x| x.clamp(low, high));
    let penalty = within(-2.0, 2.0);
    let window = options.read("repeat_last_n", |node| node.int(-1..=u32::MAX.into()))?;
    generate.sampling = Some(v1::Sampling {
        temperature: options.read("temperature", within(0.0, 2.0))?,
        top_k: options.read("top_k", ask::top_k)?,
        top_p: options.read("top_p", within(f32::MIN_POSITIVE, 1.0))?,
        min_p: options.read("min_p", within(0.0, 1.0 - f32::EPSILON))?,
        // A window of nothing is how Ollama says off; -1 is everything, which is 0 to the daemon.
        repetition_penalty: options.read("repeat_penalty", within(0.0, 2.0))?.filter(|penalty| window != Some(0) && *penalty > 0.0),
        repetition_window: window.map(|tokens| ask::clamped(tokens.max(0))),
        frequency_penalty: options.read("frequency_penalty", penalty)?,
        presence_penalty: options.read("presence_penalty", penalty)?,
        seed: options.read("seed", ask::seed)?,
        ..Default::default()
    });
    generate.stop = options.read("stop", ask::stops)?.unwrap_or_default();
    // Nothing and less is as much as fits.
    let tokens = options.read("num_predict", |node| node.int(i64::MIN..=i64::MAX))?;
    generate.max_tokens = tokens.filter(|tokens| *tokens > 0).map(ask::clamped);
    Ok(())
}

fn message(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<v1::Message, Failure> {
    let mut object = node.object()?;
    let role = object.require("role")?;
    if !matches!(role.text()?, "system" | "user" | "assistant" | "tool") {
        return Err(role.refuse(Code::InvalidValue, "must be 'system', 'user', 'assistant' or 'tool'"));
    }
    refuse_images(&mut object)?;
    let mut tool_calls = Vec::new();
    if let Some(list) = object.get("tool_calls") {
        for node in list.array(TOOLS_MAX)? {
            let mut call = node.object()?;
            let id = call.read("id", |node| node.text())?.unwrap_or_default().to_owned();
            let mut function = call.require("function")?.object()?;
            let name = function.require("name")?.text()?.to_owned();
            let arguments_json = match function.get("arguments") {
                None => tools::arguments(""),
                Some(node) if node.value.is_object() => node.value.to_string(),
                Some(node) => tools::arguments(node.text()?),
            };
            tool_calls.push(v1::ToolCall { id, name, arguments_json });
        }
    }
    let text = |object: &mut Object<'_>, key| object.read(key, |node| node.text().map(str::to_owned));
    let message = v1::Message {
        role: role.text()?.to_owned(),
        content: text(&mut object, "content")?.unwrap_or_default(),
        name: text(&mut object, "tool_name")?.or(text(&mut object, "name")?),
        reasoning: text(&mut object, "thinking")?.filter(|text| !text.is_empty()),
        tool_calls,
        tool_call_id: text(&mut object, "tool_call_id")?,
    };
    object.finish(unknown);
    Ok(message)
}

fn refuse_images(object: &mut Object<'_>) -> Result<(), Failure> {
    match object.get("images") {
        Some(node) if node.value.as_array().is_none_or(|images| !images.is_empty()) => Err(ask::text_only(&node)),
        _ => Ok(()),
    }
}

/// `"json"` or a schema.
fn format(node: Node<'_>) -> Result<Option<v1::Format>, Failure> {
    match node.value.as_str() {
        Some("") => Ok(None),
        Some("json") => Ok(Some(ask::json_object())),
        Some(_) => Err(node.refuse(Code::InvalidValue, "must be 'json' or a JSON schema")),
        None => Ok(Some(ask::json_schema(ask::schema(node)?, false))),
    }
}

fn thinking(top: &mut Object<'_>) -> Result<String, Failure> {
    let mut variables = Variables::default();
    match top.get("think") {
        None => {}
        Some(node) if node.value.is_boolean() => variables.thinking(node.flag()?),
        Some(node) => variables.effort(&node)?,
    }
    Ok(variables.json())
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
