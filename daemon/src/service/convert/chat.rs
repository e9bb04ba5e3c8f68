//! Chats, tools and formats of the wire as the engine's, checked; and pieces of replies on their way back. Part of `convert.rs`.

use std::collections::{HashSet, VecDeque};

use flash_engine::{CallPart, Channel, Chat, Choice, Format, Message, Parameters, Part, Text, TokenLogprob, Tool, ToolCall, ToolChoice};
use flash_proto::v1;
use serde_json::{Map, Value};

use super::{bad, event};
use crate::Error;

/// Of a schema or a grammar.
const FORMAT_BYTES_MAX: usize = 256 << 10;
const TOOLS_MAX: usize = 512;
const NAME_BYTES_MAX: usize = 128;

pub(super) fn chat(chat: v1::Chat) -> Result<Chat, Error> {
    if chat.messages.is_empty() {
        return Err(bad("messages", "is empty; at least one message is needed"));
    }
    let kwargs = match chat.template_kwargs_json.as_str() {
        "" => Map::new(),
        text => serde_json::from_str(text).map_err(|error| bad("chat_template_kwargs", format!("is not a JSON object: {error}")))?,
    };
    let messages = chat.messages.into_iter().map(message).collect::<Result<_, _>>()?;
    if chat.tools.len() > TOOLS_MAX {
        return Err(bad("tools", format!("has {} tools; at most {TOOLS_MAX} are allowed", chat.tools.len())));
    }
    let tools = chat.tools.into_iter().map(tool).collect::<Result<Vec<_>, _>>()?;
    let mut names = HashSet::new();
    if let Some(twice) = tools.iter().find(|tool| !names.insert(tool.name.as_str())) {
        return Err(bad("tools", format!("has `{}` twice; give each tool a name of its own", twice.name)));
    }
    let choice = chat.tool_choice.map_or_else(ToolChoice::default, |choice| ToolChoice {
        mode: match choice.mode() {
            v1::tool_choice::Mode::Auto => Choice::Auto,
            v1::tool_choice::Mode::None => Choice::None,
            v1::tool_choice::Mode::Required => Choice::Required,
        },
        single: choice.single,
        names: choice.names,
    });
    if let Some(unknown) = choice.names.iter().find(|name| !names.contains(name.as_str())) {
        return Err(bad("tool_choice", format!("names `{unknown}`, which is not among the tools")));
    }
    Ok(Chat { messages, kwargs, continue_final: chat.continue_final_message, tools, choice })
}

fn message(message: v1::Message) -> Result<Message, Error> {
    let call = |call: v1::ToolCall| {
        let arguments = match call.arguments_json.trim() {
            "" => Map::new(),
            text => serde_json::from_str(text)
                .map_err(|error| bad("messages", format!("the arguments of a call of `{}` are not a JSON object: {error}", call.name)))?,
        };
        Ok(ToolCall { id: call.id, name: call.name, arguments })
    };
    Ok(Message {
        role: message.role,
        content: message.content,
        name: message.name,
        reasoning: message.reasoning,
        tool_calls: message.tool_calls.into_iter().map(call).collect::<Result<_, Error>>()?,
        tool_call_id: message.tool_call_id,
    })
}

fn tool(tool: v1::Tool) -> Result<Tool, Error> {
    let name = tool.name;
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.:/-".contains(c);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
        return Err(bad("tools", format!("`{name}` is no tool's name: 1 to {NAME_BYTES_MAX} letters, digits and _ . : / - are allowed")));
    }
    let parameters = match (tool.input, tool.parameters_json.as_str()) {
        (Some(input), _) => Parameters::Text(format("tools", input)?),
        (None, "") => Parameters::Schema(Map::new()),
        (None, text) => {
            within("tools", text)?;
            let schema = serde_json::from_str(text);
            Parameters::Schema(schema.map_err(|error| bad("tools", format!("the parameters of `{name}` are not a JSON object: {error}")))?)
        }
    };
    Ok(Tool { name, description: tool.description, parameters, strict: tool.strict, hidden: tool.hidden })
}

/// `None`: anything.
pub(super) fn format(param: &'static str, format: v1::Format) -> Result<Option<Format>, Error> {
    use v1::format::Kind as K;
    Ok(Some(match format.kind {
        None | Some(K::JsonObject(false)) => return Ok(None),
        Some(K::JsonObject(true)) => Format::JsonObject,
        Some(K::JsonSchema(text)) => {
            within(param, &text)?;
            let schema: Value = serde_json::from_str(&text).map_err(|error| bad(param, format!("the schema is not JSON: {error}")))?;
            if !schema.is_object() && !schema.is_boolean() {
                return Err(bad(param, "the schema is neither an object nor a boolean"));
            }
            Format::JsonSchema { schema, strict: format.strict }
        }
        Some(K::Lark(text)) => within(param, &text).map(|()| Format::Lark(text))?,
        Some(K::Regex(text)) => within(param, &text).map(|()| Format::Regex(text))?,
    }))
}

fn within(param: &'static str, text: &str) -> Result<(), Error> {
    match text.len() <= FORMAT_BYTES_MAX {
        true => Ok(()),
        false => Err(bad(param, format!("a schema or grammar has {} bytes; at most {FORMAT_BYTES_MAX} are allowed", text.len()))),
    }
}

fn logprob(found: TokenLogprob, side: &Text) -> v1::TokenLogprob {
    let bytes = |id| side.token_bytes(id).to_vec();
    let alternative = |(id, logprob)| v1::Alternative { id, token: bytes(id), logprob };
    v1::TokenLogprob { id: found.id, token: bytes(found.id), logprob: found.logprob, top: found.top.into_iter().map(alternative).collect() }
}

/// In parts, as [`routing`](super::routing).
pub(in crate::service) fn prompt(logprobs: Vec<TokenLogprob>, side: &Text) -> VecDeque<v1::GenerateEvent> {
    let part = |found: &[TokenLogprob]| {
        let tokens = found.iter().map(|found| logprob(found.clone(), side)).collect();
        event(v1::generate_event::Event::Prompt(v1::PromptLogprobs { tokens }))
    };
    logprobs.chunks(256).map(part).collect()
}

/// One message for each part; log-probabilities go with the first content.
pub(in crate::service) fn token(
    parts: Vec<Part>,
    logprobs: Vec<TokenLogprob>,
    channel: Channel,
    side: &Text,
) -> VecDeque<v1::GenerateEvent> {
    use v1::generate_event::Event as E;
    let mut logprobs: Vec<_> = logprobs.into_iter().map(|found| logprob(found, side)).collect();
    let of = |channel| match channel {
        Channel::Content => v1::text::Channel::Content,
        Channel::Reasoning => v1::text::Channel::Reasoning,
    };
    let mut events = VecDeque::with_capacity(parts.len() + 1);
    for part in parts {
        let (text, said) = match part {
            Part::Content(text) => (text, Channel::Content),
            Part::Reasoning(text) => (text, Channel::Reasoning),
            Part::Call(CallPart { index, name, arguments }) => {
                events.push_back(event(E::ToolCall(v1::ToolCallPart { index, name, arguments })));
                continue;
            }
        };
        let logprobs = if said == Channel::Content { std::mem::take(&mut logprobs) } else { Vec::new() };
        events.push_back(event(E::Text(v1::Text { text, logprobs, channel: of(said).into() })));
    }
    let channel = if logprobs.is_empty() { channel } else { Channel::Content };
    if events.is_empty() || !logprobs.is_empty() {
        events.push_back(event(E::Text(v1::Text { text: String::new(), logprobs, channel: of(channel).into() })));
    }
    events
}

#[cfg(test)]
mod tests {
    use flash_proto::code;

    use super::*;
    use crate::service::convert::status;

    fn with(change: impl FnOnce(&mut v1::Chat)) -> Result<Chat, Error> {
        let message = v1::Message { role: "user".into(), content: "x".into(), ..v1::Message::default() };
        let mut request = v1::Chat { messages: vec![message], tools: vec![named("f")], ..v1::Chat::default() };
        change(&mut request);
        chat(request)
    }

    fn named(name: &str) -> v1::Tool {
        v1::Tool { name: name.into(), ..v1::Tool::default() }
    }

    #[test]
    fn tools_and_calls_are_checked() {
        let check = |param: &str, says: &str, change: fn(&mut v1::Chat)| {
            let status = status(&with(change).expect_err(says));
            assert_eq!((code::of(&status), code::param(&status)), (Some(code::INVALID_VALUE), Some(param)));
            assert!(status.message().contains(says), "{status}");
        };
        check("tools", "is no tool's name", |chat| chat.tools = vec![named("a b")]);
        check("tools", "is no tool's name", |chat| chat.tools = vec![named("")]);
        check("tools", "`f` twice", |chat| chat.tools.push(named("f")));
        check("tools", "at most 512", |chat| chat.tools = (0..513).map(|i| named(&format!("f{i}"))).collect());
        check("tools", "the parameters of `f` are not a JSON object", |chat| chat.tools[0].parameters_json = "[1]".into());
        check("tools", "at most 262144", |chat| chat.tools[0].parameters_json = " ".repeat(300_000));
        check("tool_choice", "names `g`", |chat| {
            chat.tool_choice = Some(v1::ToolChoice { names: vec!["g".into()], ..v1::ToolChoice::default() });
        });
        check("messages", "a call of `f`", |chat| {
            chat.messages[0].tool_calls = vec![v1::ToolCall { name: "f".into(), arguments_json: "{".into(), ..v1::ToolCall::default() }];
        });
        let chat = with(|chat| {
            chat.tools[0].parameters_json = r#"{"type":"object","b":1,"a":2}"#.into();
            chat.tool_choice = Some(v1::ToolChoice { mode: 2, names: vec!["f".into()], single: true });
            chat.messages[0].tool_calls = vec![v1::ToolCall::default()];
        });
        let chat = chat.expect("a good chat");
        let Parameters::Schema(schema) = &chat.tools[0].parameters else { panic!("a schema") };
        assert_eq!(schema.keys().collect::<Vec<_>>(), ["type", "b", "a"]);
        assert_eq!(chat.choice, ToolChoice { mode: Choice::Required, names: vec!["f".into()], single: true });
        assert_eq!(chat.messages[0].tool_calls[0].arguments, Map::new());
    }

    #[test]
    fn formats_are_read_or_refused() {
        use v1::format::Kind as K;
        let read = |kind| format("response_format", v1::Format { kind, strict: true });
        assert_eq!(read(None).expect("none"), None);
        assert_eq!(read(Some(K::JsonObject(true))).expect("an object"), Some(Format::JsonObject));
        assert_eq!(
            read(Some(K::JsonSchema("true".into()))).expect("any"),
            Some(Format::JsonSchema { schema: Value::Bool(true), strict: true })
        );
        assert_eq!(read(Some(K::Regex("a+".into()))).expect("a pattern"), Some(Format::Regex("a+".into())));
        for wrong in ["", "[]", "{", "5"] {
            assert!(read(Some(K::JsonSchema(wrong.into()))).is_err(), "{wrong}");
        }
        assert!(read(Some(K::Lark("x".repeat(300_000)))).is_err());
    }
}
