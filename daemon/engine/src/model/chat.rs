//! A conversation as callers give it and as chat templates see it: messages, tools, what may be called. `text.rs` renders it;
//! nothing here reads a reply.

use serde_json::{Map, Value, json};

/// One chat message.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    pub role: String,
    pub content: String,
    pub name: Option<String>,
    /// What the assistant thought before its content.
    pub reasoning: Option<String>,
    /// What the assistant called after its content.
    pub tool_calls: Vec<ToolCall>,
    /// Which call a tool's result answers.
    pub tool_call_id: Option<String>,
}

/// A call of an earlier turn.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    pub id: String,
    pub name: String,
    pub arguments: Map<String, Value>,
}

/// Something the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    pub name: String,
    pub description: String,
    pub parameters: Parameters,
    /// Enforce the schema to the letter or refuse it.
    pub strict: bool,
    /// May be called, but the template is not shown it: the conversation tells of it.
    pub hidden: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Parameters {
    /// Of the arguments object, keys in the order in which templates show them.
    Schema(Map<String, Value>),
    /// Free text, of this form if one is given; a call's arguments are `{"input": text}`.
    Text(Option<Format>),
}

/// What a text must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// Any JSON object.
    JsonObject,
    JsonSchema {
        schema: Value,
        /// Refuse what cannot be enforced, instead of leaving it out.
        strict: bool,
    },
    Lark(String),
    Regex(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The model decides.
    #[default]
    Auto,
    /// Tools are shown and none is called.
    None,
    Required,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolChoice {
    pub mode: Choice,
    /// Only these may be called; empty: all.
    pub names: Vec<String>,
    /// End after the first call.
    pub single: bool,
}

/// What a chat template renders.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    pub messages: Vec<Message>,
    /// Extra variables of the template.
    pub kwargs: Map<String, Value>,
    /// The last message is the beginning of the reply.
    pub continue_final: bool,
    pub tools: Vec<Tool>,
    pub choice: ToolChoice,
}

impl Chat {
    /// Messages and nothing else.
    pub fn of(messages: Vec<Message>) -> Self {
        Self { messages, ..Self::default() }
    }

    /// Whether a call in the reply is one.
    pub(super) fn calls(&self) -> bool {
        !self.tools.is_empty() && self.choice.mode != Choice::None
    }

    /// The tools that may be called.
    pub(super) fn callable(&self) -> impl Iterator<Item = &Tool> {
        let named = |tool: &&Tool| self.choice.names.is_empty() || self.choice.names.contains(&tool.name);
        self.tools.iter().filter(named)
    }
}

impl Message {
    /// The keys of transformers.
    pub(super) fn to_json(&self) -> Value {
        let mut message = json!({"role": self.role, "content": self.content});
        if let Some(name) = &self.name {
            message["name"] = json!(name);
        }
        if let Some(reasoning) = &self.reasoning {
            message["reasoning_content"] = json!(reasoning);
        }
        if !self.tool_calls.is_empty() {
            let call =
                |call: &ToolCall| json!({"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}});
            message["tool_calls"] = self.tool_calls.iter().map(call).collect();
        }
        if let Some(id) = &self.tool_call_id {
            message["tool_call_id"] = json!(id);
        }
        message
    }
}

impl Tool {
    /// The function that templates are shown.
    pub(super) fn to_json(&self) -> Value {
        json!({"type": "function", "function": {"name": self.name, "description": self.description, "parameters": self.schema()}})
    }

    /// Of the arguments, whatever the tool takes.
    pub(super) fn schema(&self) -> Value {
        let input = match &self.parameters {
            Parameters::Schema(schema) if schema.is_empty() => return json!({"type": "object", "properties": {}}),
            Parameters::Schema(schema) => return Value::Object(schema.clone()),
            Parameters::Text(Some(Format::Lark(grammar))) => {
                json!({"type": "string", "description": format!("Text that follows this Lark grammar:\n{grammar}")})
            }
            Parameters::Text(Some(Format::Regex(pattern))) => json!({"type": "string", "pattern": format!("^(?:{pattern})$")}),
            Parameters::Text(_) => json!({"type": "string"}),
        };
        json!({"type": "object", "properties": {"input": input}, "required": ["input"], "additionalProperties": false})
    }
}

/// The same conversation for templates that refuse it as it is, step by step; each is tried in turn. What stays in the list stays in
/// its place, so that the beginning of a conversation renders the same in its next turn.
pub(super) fn relaxed(messages: &[Message]) -> impl Iterator<Item = Vec<Message>> {
    let reminded = reminders(messages);
    let merged = merge(&reminded);
    let folded = fold_system(&merged);
    [reminded, merged, folded].into_iter()
}

/// System messages in the middle become the user's.
fn reminders(messages: &[Message]) -> Vec<Message> {
    let convert = |(index, message): (usize, &Message)| match message.role.as_str() {
        "system" if index > 0 => Message { role: "user".into(), content: reminder(&message.content), ..message.clone() },
        _ => message.clone(),
    };
    messages.iter().enumerate().map(convert).collect()
}

fn reminder(text: &str) -> String {
    format!("<system-reminder>\n{text}\n</system-reminder>")
}

/// Neighbours of one role become one message; results of tools stay apart, and calls end a message.
fn merge(messages: &[Message]) -> Vec<Message> {
    let mut merged: Vec<Message> = Vec::with_capacity(messages.len());
    for message in messages {
        match merged.last_mut() {
            Some(last)
                if last.role == message.role && message.role != "tool" && last.tool_calls.is_empty() && last.name == message.name =>
            {
                last.content = joined(&last.content, &message.content);
                last.reasoning = match (last.reasoning.take(), &message.reasoning) {
                    (Some(before), Some(after)) => Some(joined(&before, after)),
                    (before, after) => before.or_else(|| after.clone()),
                };
                last.tool_calls = message.tool_calls.clone();
            }
            _ => merged.push(message.clone()),
        }
    }
    merged
}

fn joined(before: &str, after: &str) -> String {
    [before, after].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n\n")
}

/// For templates without a system role.
fn fold_system(messages: &[Message]) -> Vec<Message> {
    match messages {
        [system, user, rest @ ..] if system.role == "system" && user.role == "user" => {
            let content = format!("{}\n\n{}", reminder(&system.content), user.content);
            [&[Message { content, ..user.clone() }], rest].concat()
        }
        [system, rest @ ..] if system.role == "system" => {
            [&[Message { role: "user".into(), content: reminder(&system.content), ..system.clone() }], rest].concat()
        }
        _ => messages.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_messages_keep_all_that_was_thought() {
        let said = |content: &str, reasoning: Option<&str>| Message {
            role: "assistant".into(),
            content: content.into(),
            reasoning: reasoning.map(Into::into),
            ..Message::default()
        };
        let merged = merge(&[said("a", Some("first")), said("", None), said("b", Some("second"))]);
        assert_eq!(merged, [said("a\n\nb", Some("first\n\nsecond"))]);
    }
}
