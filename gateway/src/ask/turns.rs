//! Conversations as templates want them: what an assistant thought, said and called is one message, and a tool's result knows
//! its tool's name. What else a template insists on is the daemon's to find out.

use flash_proto::v1;

/// Builds messages from the smaller pieces that Anthropic's and the Responses API send.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    pub(crate) messages: Vec<v1::Message>,
}

impl Turns {
    pub(crate) fn say(&mut self, role: &str, content: String) {
        self.messages.push(v1::Message { role: role.to_owned(), content, ..Default::default() });
    }

    pub(crate) fn result(&mut self, id: &str, content: String) {
        self.messages.push(v1::Message { role: "tool".into(), content, tool_call_id: Some(id.to_owned()), ..Default::default() });
    }

    pub(crate) fn reasoning(&mut self, text: &str) {
        let message = self.assistant(|last| last.content.is_empty() && last.tool_calls.is_empty());
        join(message.reasoning.get_or_insert_default(), text);
    }

    pub(crate) fn content(&mut self, text: &str) {
        join(&mut self.assistant(|last| last.tool_calls.is_empty()).content, text);
    }

    pub(crate) fn call(&mut self, id: &str, name: String, arguments_json: String) {
        self.assistant(|_| true).tool_calls.push(v1::ToolCall { id: id.to_owned(), name, arguments_json });
    }

    /// The assistant's last message if what comes next belongs into it, else a new one.
    fn assistant(&mut self, fits: impl Fn(&v1::Message) -> bool) -> &mut v1::Message {
        if !self.messages.last().is_some_and(|last| last.role == "assistant" && fits(last)) {
            self.say("assistant", String::new());
        }
        self.messages.last_mut().expect("there is one now")
    }
}

pub(crate) fn join(text: &mut String, more: &str) {
    if !text.is_empty() && !more.is_empty() {
        text.push('\n');
    }
    text.push_str(more);
}

/// Gives results of tools the name of the call that they answer, where the client left it out.
pub(crate) fn name_results(messages: &mut [v1::Message]) {
    for at in 0..messages.len() {
        let (before, rest) = messages.split_at_mut(at);
        let message = &mut rest[0];
        if message.role != "tool" || message.name.is_some() {
            continue;
        }
        let Some(id) = message.tool_call_id.as_deref().filter(|id| !id.is_empty()) else { continue };
        let call = before.iter().rev().flat_map(|message| message.tool_calls.iter().rev()).find(|call| call.id == id);
        message.name = call.map(|call| call.name.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(messages: &[v1::Message]) -> Vec<(&str, &str)> {
        messages.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect()
    }

    #[test]
    fn pieces_become_messages() {
        let mut turns = Turns::default();
        turns.say("user", "u".into());
        turns.reasoning("r");
        turns.content("a");
        turns.content("b");
        turns.call("1", "f".into(), "{}".into());
        turns.call("2", "g".into(), "{}".into());
        turns.result("2", "two".into());
        turns.result("9", "?".into());
        turns.content("c");
        turns.call("3", "f".into(), "{}".into());
        turns.content("d");
        turns.reasoning("s");
        let mut messages = turns.messages;
        name_results(&mut messages);
        let wanted = [
            ("user", "u"),
            ("assistant", "a\nb"),
            ("tool", "two"),
            ("tool", "?"),
            ("assistant", "c"),
            ("assistant", "d"),
            ("assistant", ""),
        ];
        assert_eq!(said(&messages), wanted);
        assert_eq!((messages[1].reasoning.as_deref(), messages[1].tool_calls.len()), (Some("r"), 2));
        assert_eq!((messages[2].name.as_deref(), messages[3].name.as_deref()), (Some("g"), None));
        assert_eq!(messages[6].reasoning.as_deref(), Some("s"));
    }
}
