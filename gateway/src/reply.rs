//! What a generation said, gathered from its events in order: the whole reply where nothing is streamed, and beside a
//! stream for the dialects that repeat everything at its end. Knows no dialect.

use std::borrow::Cow;

use flash_proto::v1::{self, generate_event::Event, text::Channel};

/// A stretch of one kind.
#[derive(Debug, PartialEq)]
pub(crate) enum Piece {
    Reasoning(String),
    Content { text: String, logprobs: Vec<v1::TokenLogprob> },
    Call { name: String, arguments: String },
}

/// Between two contents that were apart, where a dialect has one text for both: the space that the model wrote there belongs to the call's marks.
const SEAM: &str = "\n";

/// Where [`SEAM`] belongs in a stream.
#[derive(Debug, Default)]
pub(crate) struct Seams {
    said: bool,
    apart: bool,
}

impl Seams {
    /// What comes before the event's text.
    pub(crate) fn before(&mut self, event: &Event) -> &'static str {
        match event {
            Event::Text(text) if text.text.is_empty() => "",
            Event::Text(text) if text.channel() == Channel::Content => {
                self.said = true;
                if std::mem::take(&mut self.apart) { SEAM } else { "" }
            }
            Event::Text(_) | Event::ToolCall(_) => {
                self.apart = self.said;
                ""
            }
            _ => "",
        }
    }
}

/// A text behind its seam; copied only if there is one.
pub(crate) fn behind<'a>(seam: &str, text: &'a str) -> Cow<'a, str> {
    if seam.is_empty() { text.into() } else { format!("{seam}{text}").into() }
}

#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) accepted: v1::Accepted,
    /// Log-probabilities of the prompt, if they were asked for.
    pub(crate) prompt: Vec<v1::TokenLogprob>,
    pub(crate) pieces: Vec<Piece>,
    /// The last event, once it came.
    pub(crate) done: Option<v1::Done>,
    /// Calls begun.
    calls: u32,
}

impl Collected {
    /// Whether `event` began a new piece.
    pub(crate) fn add(&mut self, event: &Event) -> bool {
        let before = self.pieces.len();
        match event {
            Event::Accepted(accepted) => self.accepted.clone_from(accepted),
            Event::Text(text) if text.text.is_empty() && (text.logprobs.is_empty() || text.channel() == Channel::Reasoning) => {}
            Event::Text(text) => self.text(text),
            Event::ToolCall(part) => self.call(part),
            Event::Done(done) => self.done = Some(done.clone()),
            Event::Prompt(prompt) => self.prompt.extend_from_slice(&prompt.tokens),
            Event::Progress(_) | Event::Failed(_) | Event::Routing(_) => {}
        }
        self.pieces.len() > before
    }

    fn text(&mut self, more: &v1::Text) {
        match (self.pieces.last_mut(), more.channel()) {
            (Some(Piece::Reasoning(text)), Channel::Reasoning) => text.push_str(&more.text),
            (Some(Piece::Content { text, logprobs }), Channel::Content) => {
                text.push_str(&more.text);
                logprobs.extend_from_slice(&more.logprobs);
            }
            (_, Channel::Reasoning) => self.pieces.push(Piece::Reasoning(more.text.clone())),
            (_, Channel::Content) => self.pieces.push(Piece::Content { text: more.text.clone(), logprobs: more.logprobs.clone() }),
        }
    }

    fn call(&mut self, part: &v1::ToolCallPart) {
        match self.pieces.last_mut() {
            Some(Piece::Call { arguments, .. }) if part.index < self.calls => arguments.push_str(&part.arguments),
            _ => {
                self.calls = part.index + 1;
                self.pieces.push(Piece::Call { name: part.name.clone(), arguments: part.arguments.clone() });
            }
        }
    }

    pub(crate) fn reasoning(&self) -> String {
        self.pieces.iter().map(|piece| if let Piece::Reasoning(text) = piece { text.as_str() } else { "" }).collect()
    }

    /// What was said before and after a call, as one text.
    pub(crate) fn content(&self) -> String {
        let texts = self.pieces.iter().filter_map(|piece| match piece {
            Piece::Content { text, .. } if !text.is_empty() => Some(text.as_str()),
            _ => None,
        });
        texts.collect::<Vec<_>>().join(SEAM)
    }

    pub(crate) fn logprobs(&self) -> Vec<v1::TokenLogprob> {
        let of = |piece: &Piece| if let Piece::Content { logprobs, .. } = piece { logprobs.clone() } else { Vec::new() };
        self.pieces.iter().flat_map(of).collect()
    }

    /// Names and arguments.
    pub(crate) fn calls(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Call { name, arguments } => Some((name.as_str(), arguments.as_str())),
            Piece::Reasoning(_) | Piece::Content { .. } => None,
        })
    }

    pub(crate) fn finish(&self) -> v1::done::Finish {
        self.done.as_ref().map_or(v1::done::Finish::Stop, v1::Done::finish)
    }

    pub(crate) fn usage(&self) -> v1::Usage {
        self.done.as_ref().and_then(|done| done.usage).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_their_order() {
        let text =
            |text: &str, channel: Channel| Event::Text(v1::Text { text: text.into(), channel: channel.into(), logprobs: Vec::new() });
        let call = |index, name: &str, arguments: &str| {
            Event::ToolCall(v1::ToolCallPart { index, name: name.into(), arguments: arguments.into() })
        };
        let mut collected = Collected::default();
        let mut begun = Vec::new();
        let mut seams = Seams::default();
        let mut streamed = String::new();
        for event in [
            text("hm", Channel::Reasoning),
            text("", Channel::Content),
            text("m", Channel::Reasoning),
            text("Yes", Channel::Content),
            call(0, "f", ""),
            call(0, "", "{}"),
            call(1, "f", "{"),
            call(1, "", "}"),
            text("", Channel::Content),
            text("Now", Channel::Content),
            text(".", Channel::Content),
        ] {
            streamed.push_str(seams.before(&event));
            if let Event::Text(text) = &event
                && text.channel() == Channel::Content
            {
                streamed.push_str(&text.text);
            }
            begun.push(collected.add(&event));
        }
        assert_eq!(begun, [true, false, false, true, true, false, true, false, false, true, false]);
        assert_eq!((collected.reasoning().as_str(), collected.content().as_str()), ("hmm", "Yes\nNow."));
        assert_eq!(streamed, collected.content());
        assert_eq!(collected.calls().collect::<Vec<_>>(), [("f", "{}"), ("f", "{}")]);
    }
}
