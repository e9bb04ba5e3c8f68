//! A reply's text, as it comes, into content, reasoning and tool calls. Holds back only what may be the beginning of a mark, the
//! space before one, and calls that nobody has promised to be well-formed. Knows no tokens and no grammars: `output.rs` feeds it.

use std::{ops::Range, sync::Arc};

use serde_json::{Map, Value};

use super::{
    calls::{self, Call, Read, Scan},
    formats::{Calls, Dialect, Style, THINK},
};
use crate::{CallPart, Part};

/// What may be called, and how arguments are typed: name → schema.
pub(crate) type Schemas = Arc<Map<String, Value>>;

/// A place where a grammar may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    /// Reasoning has ended.
    Content,
    /// A call's mark has been read.
    Call,
}

/// Hears where a grammar may begin and what has been read beyond that place, in Harmony with the called function's name on a line before. Says whether the text from there on keeps to one, so that a
/// call's arguments can be passed on before its end.
pub(crate) type Watch<'a> = &'a mut dyn FnMut(Begun, &str) -> bool;

#[derive(Clone, Debug)]
pub(crate) struct Parser {
    dialect: Dialect,
    schemas: Schemas,
    mode: Mode,
    held: String,
    /// Bytes of text so far.
    pushed: usize,
    /// Where in the text the content was that has been told.
    places: Vec<Range<usize>>,
    /// Space is dropped until something else comes.
    skips: bool,
    /// Calls that have begun.
    calls: u32,
    /// Harmony: what the last message with a text was, unless a call has come since, …
    spoke: Option<Mode>,
    /// … and whether this one is the same, so that a line's end goes between them.
    joins: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Mode {
    /// Nothing but space has come: thinking may begin.
    Start,
    Reasoning,
    Content,
    /// A call that is read when it is whole; `scanned` of what is held has been looked at.
    Call {
        scanned: usize,
    },
    /// A call whose name is on its way.
    Name,
    /// A call whose arguments are passed on.
    Arguments(Scan),
    /// Behind the arguments.
    Tail,
    /// Harmony: before a message.
    Header,
    /// Harmony: a call to that function, read when it is whole, or passed on.
    To {
        name: String,
        passes: bool,
    },
}

impl Parser {
    /// `thinking`: the prompt has opened the reasoning already.
    pub(crate) fn new(dialect: Dialect, schemas: Schemas, thinking: Thinking) -> Self {
        let mode = match thinking {
            _ if dialect.harmony() => Mode::Header,
            Thinking::Begun => Mode::Reasoning,
            Thinking::Possible if dialect.thinks => Mode::Start,
            _ => Mode::Content,
        };
        Self {
            dialect,
            schemas,
            skips: mode == Mode::Reasoning,
            mode,
            held: String::new(),
            pushed: 0,
            places: Vec::new(),
            calls: 0,
            spoke: None,
            joins: false,
        }
    }

    /// Thinking may begin, and nothing else has.
    pub(crate) fn may_think(&self) -> bool {
        self.mode == Mode::Start && self.held.is_empty()
    }

    pub(crate) fn reasons(&self) -> bool {
        self.mode == Mode::Reasoning
    }

    /// Inside of what is neither content nor reasoning.
    pub(crate) fn in_call(&self) -> bool {
        !matches!(self.mode, Mode::Start | Mode::Reasoning | Mode::Content)
    }

    /// Calls that are whole.
    pub(crate) fn complete(&self) -> u32 {
        self.calls - u32::from(self.in_arguments())
    }

    fn in_arguments(&self) -> bool {
        matches!(self.mode, Mode::Arguments(_) | Mode::To { passes: true, .. })
    }

    pub(crate) fn push(&mut self, text: &str, out: &mut Vec<Part>, watch: Watch) {
        self.pushed += text.len();
        self.held.push_str(text);
        while self.step(out, watch) {}
    }

    pub(crate) fn pushed(&self) -> usize {
        self.pushed
    }

    /// Where in the text what is held back begins. A call that turns out to be none is content from its mark on.
    pub(crate) fn told(&self) -> usize {
        let mark = if matches!(self.mode, Mode::Call { .. }) { self.calls_format().map_or(0, |calls| calls.open.len()) } else { 0 };
        self.pushed - self.held.len() - mark
    }

    /// Where the content was that has been told since the last time.
    pub(crate) fn places(&mut self) -> std::vec::Drain<'_, Range<usize>> {
        self.places.drain(..)
    }

    /// More text that is content, whatever it is.
    pub(crate) fn pass(&mut self, text: &str) {
        self.places.extend((!text.is_empty()).then(|| self.pushed..self.pushed + text.len()));
        self.pushed += text.len();
    }

    /// [`say`] of what begins at that place.
    fn tell(&mut self, at: usize, part: Part, out: &mut Vec<Part>) {
        if let Part::Content(text) = &part {
            self.places.extend((!text.is_empty()).then(|| at..at + text.len()));
        }
        say(out, part);
    }

    /// What is held back is whatever it is. `cut`: the reply was ended in the middle.
    pub(crate) fn finish(&mut self, cut: bool, out: &mut Vec<Part>) {
        let at = self.told();
        let mut held = std::mem::take(&mut self.held);
        if cut {
            held.truncate(self.before_mark(&held));
        }
        match std::mem::replace(&mut self.mode, Mode::Content) {
            Mode::Reasoning => say(out, Part::Reasoning(held)),
            Mode::Start | Mode::Content => self.tell(at, Part::Content(held), out),
            Mode::Call { .. } => {
                let read = if cut { None } else { self.read(&held).ok().flatten() };
                match read {
                    Some((name, arguments)) => self.call(out, name, &arguments),
                    None => {
                        let open = self.calls_format().map_or("", |calls| calls.open);
                        self.tell(at, Part::Content(open.to_owned() + &held), out);
                    }
                }
            }
            // Cut: what is missing is all that a caller need know.
            Mode::Name | Mode::Tail => {}
            mode @ Mode::Arguments(_) => {
                say(out, Part::Call(CallPart { index: self.calls - 1, name: String::new(), arguments: held }));
                self.mode = mode;
            }
            Mode::Header if calls::is_header(&held) => {}
            Mode::Header => self.tell(at, Part::Content(held), out),
            Mode::To { name, passes: false } => self.to(out, name, at, &held),
            mode @ Mode::To { .. } => {
                say(out, Part::Call(CallPart { index: self.calls - 1, name: String::new(), arguments: held }));
                // Its mark is a token that ends the turn.
                self.mode = if cut { mode } else { Mode::Content };
            }
        }
    }

    /// How much of a text is before the mark whose beginning ends it. Of less than three characters may come anything.
    fn before_mark(&self, held: &str) -> usize {
        let marks = match self.mode {
            Mode::Start => &[THINK.0][..],
            Mode::Reasoning | Mode::Content | Mode::To { .. } if self.dialect.harmony() => &Self::ENDS,
            Mode::Reasoning => &[THINK.1],
            Mode::Content => self.calls_format().map_or(&[][..], |calls| std::slice::from_ref(&calls.open)),
            _ => &[],
        };
        match find(held, marks) {
            Err(at) if held.len() - at > 2 && self.dialect.harmony() => at,
            Err(at) if held.len() - at > 2 => held[..at].trim_end().len(),
            _ => held.len(),
        }
    }

    fn calls_format(&self) -> Option<&'static Calls> {
        self.dialect.calls.filter(|_| !self.schemas.is_empty())
    }

    /// One mark further; false if more must come first.
    fn step(&mut self, out: &mut Vec<Part>, watch: Watch) -> bool {
        if self.skips {
            let space = self.held.len() - self.held.trim_start().len();
            self.held.drain(..space);
            self.skips = self.held.is_empty();
        }
        match &mut self.mode {
            Mode::Start => {
                let text = self.held.trim_start();
                let space = self.held.len() - text.len();
                if text.starts_with(THINK.0) {
                    self.held.drain(..space + THINK.0.len());
                    (self.mode, self.skips) = (Mode::Reasoning, true);
                    return true;
                }
                if THINK.0.starts_with(text) {
                    return false;
                }
                self.mode = Mode::Content;
                true
            }
            Mode::Reasoning if self.dialect.harmony() => self.message(out, Part::Reasoning),
            Mode::Reasoning => {
                let found = self.until(&[THINK.1], out, Part::Reasoning);
                if found.is_some() {
                    (self.mode, self.skips) = (Mode::Content, true);
                    watch(Begun::Content, &self.held);
                }
                found.is_some()
            }
            Mode::Content if self.dialect.harmony() => self.message(out, Part::Content),
            Mode::Content => {
                let Some(calls) = self.calls_format() else {
                    let (at, held) = (self.told(), std::mem::take(&mut self.held));
                    self.tell(at, Part::Content(held), out);
                    return false;
                };
                let found = self.until(&[calls.open], out, Part::Content);
                if found.is_some() {
                    let kept = watch(Begun::Call, &self.held);
                    self.mode = if kept && calls.style == Style::Json { Mode::Name } else { Mode::Call { scanned: 0 } };
                }
                found.is_some()
            }
            Mode::Call { scanned } => {
                let close = self.dialect.calls.map_or("", |calls| calls.close);
                let Some(at) = self.held[*scanned..].find(close).map(|at| *scanned + at) else {
                    *scanned = floor(&self.held, self.held.len().saturating_sub(close.len()));
                    return false;
                };
                let (place, body) = (self.told(), self.held[..at].to_owned());
                let read = self.read(&body);
                (self.mode, self.skips) = (Mode::Content, read.is_ok());
                match read {
                    Ok(Some((name, arguments))) => self.call(out, name, &arguments),
                    // The mark is part of a text inside the call.
                    Ok(None) => {
                        (self.mode, self.skips) = (Mode::Call { scanned: at + close.len() }, false);
                        return true;
                    }
                    Err(()) => {
                        let calls = self.calls_format().expect("a call has begun");
                        self.tell(place, Part::Content(format!("{}{body}{}", calls.open, calls.close)), out);
                    }
                }
                self.held.drain(..at + close.len());
                true
            }
            Mode::Name => {
                let Some((name, rest)) = calls::head(&self.held) else { return false };
                let (name, read) = (name.to_owned(), self.held.len() - rest.len());
                self.held.drain(..read);
                say(out, Part::Call(CallPart { index: self.calls, name, arguments: String::new() }));
                self.calls += 1;
                self.mode = Mode::Arguments(Scan::default());
                true
            }
            Mode::Arguments(scan) => {
                let end = scan.end(&self.held);
                let arguments: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
                say(out, Part::Call(CallPart { index: self.calls - 1, name: String::new(), arguments }));
                if end.is_some() {
                    self.mode = Mode::Tail;
                }
                end.is_some()
            }
            Mode::Tail => {
                let close = self.dialect.calls.map_or("", |calls| calls.close);
                let Some(at) = self.held.find(close) else { return false };
                self.held.drain(..at + close.len());
                (self.mode, self.skips) = (Mode::Content, true);
                true
            }
            Mode::Header => self.header(out, watch),
            Mode::To { passes: true, .. } => {
                let found = self.body();
                let arguments: String = self.held.drain(..found.map_or_else(|keep| keep, |(at, _)| at)).collect();
                say(out, Part::Call(CallPart { index: self.calls - 1, name: String::new(), arguments }));
                self.next_message(found.ok().map(|(_, mark)| mark))
            }
            Mode::To { name, passes: false } => {
                let name = name.clone();
                let Ok((at, mark)) = self.body() else { return false };
                let place = self.told();
                let body: String = self.held.drain(..at).collect();
                self.to(out, name, place, &body);
                self.next_message(Some(mark))
            }
        }
    }

    /// Says what lies before the next of `marks`, and takes both away. Space before a mark belongs to it.
    fn until(&mut self, marks: &[&'static str], out: &mut Vec<Part>, part: fn(String) -> Part) -> Option<&'static str> {
        let found = find(&self.held, marks);
        let end = found.map_or_else(|keep| keep, |(at, _)| at);
        let end = self.held[..end].trim_end().len();
        self.tell(self.told(), part(self.held[..end].to_owned()), out);
        let (at, mark) = match found {
            Ok(found) => found,
            Err(_) => {
                self.held.drain(..end);
                return None;
            }
        };
        self.held.drain(..at + mark.len());
        Some(mark)
    }

    /// A call's text.
    fn read(&self, body: &str) -> Read<Call> {
        let read = match self.calls_format().map(|calls| calls.style) {
            Some(Style::Xml) => calls::xml(body, &self.schemas),
            _ => calls::json(body),
        };
        match read {
            Ok(Some((name, _))) if !self.schemas.contains_key(&name) => Err(()),
            read => read,
        }
    }

    fn call(&mut self, out: &mut Vec<Part>, name: String, arguments: &Map<String, Value>) {
        let arguments = serde_json::to_string(arguments).expect("a map of JSON values has a text");
        say(out, Part::Call(CallPart { index: self.calls, name, arguments }));
        self.calls += 1;
    }

    // ---- Harmony ----

    const ENDS: [&'static str; 5] = ["<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>"];

    /// Where the message's text ends, or how much of it is certain.
    fn body(&self) -> Result<(usize, &'static str), usize> {
        find(&self.held, &Self::ENDS)
    }

    fn message(&mut self, out: &mut Vec<Part>, part: fn(String) -> Part) -> bool {
        let (found, at) = (self.body(), self.told());
        let text: String = self.held.drain(..found.map_or_else(|keep| keep, |(at, _)| at)).collect();
        if !text.is_empty() {
            if std::mem::take(&mut self.joins) {
                self.tell(at - 1, part("\n".into()), out); // in place of the mark's last byte
            }
            self.spoke = Some(self.mode.clone());
        }
        self.tell(at, part(text), out);
        self.next_message(found.ok().map(|(_, mark)| mark))
    }

    fn next_message(&mut self, mark: Option<&'static str>) -> bool {
        let Some(mark) = mark else { return false };
        // These two belong to the next header.
        if !matches!(mark, "<|start|>" | "<|channel|>") {
            self.held.drain(..mark.len());
        }
        self.mode = Mode::Header;
        true
    }

    fn header(&mut self, out: &mut Vec<Part>, watch: Watch) -> bool {
        if !calls::is_header(&self.held) {
            self.mode = Mode::Content;
            return true;
        }
        let Some(at) = self.held.find("<|message|>") else { return false };
        let header: String = self.held.drain(..at + "<|message|>".len()).collect();
        self.mode = match calls::recipient(&header) {
            Some(name) if !self.schemas.is_empty() => {
                let passes = watch(Begun::Call, &format!("{name}\n{}", self.held)) && self.schemas.contains_key(name);
                if passes {
                    say(out, Part::Call(CallPart { index: self.calls, name: name.into(), arguments: String::new() }));
                    self.calls += 1;
                }
                Mode::To { name: name.into(), passes }
            }
            _ if header.contains("<|channel|>analysis") => Mode::Reasoning,
            _ => {
                watch(Begun::Content, &self.held);
                Mode::Content
            }
        };
        self.joins = self.spoke.as_ref() == Some(&self.mode);
        if matches!(self.mode, Mode::To { .. }) {
            self.spoke = None;
        }
        true
    }

    /// A whole message to a function; its text begins at that place.
    fn to(&mut self, out: &mut Vec<Part>, name: String, at: usize, body: &str) {
        match calls::object(body) {
            Ok(Some(arguments)) if self.schemas.contains_key(&name) => self.call(out, name, &arguments),
            _ => self.tell(at, Part::Content(body.to_owned()), out),
        }
    }
}

/// Whether the prompt has left room for thinking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Thinking {
    #[default]
    No,
    Possible,
    Begun,
}

/// The first of `marks` in `text`; else how much of the text is before anything that may become one.
fn find(text: &str, marks: &[&'static str]) -> Result<(usize, &'static str), usize> {
    if let Some(found) = marks.iter().filter_map(|mark| Some((text.find(mark)?, *mark))).min() {
        return Ok(found);
    }
    let longest = marks.iter().map(|mark| mark.len()).max().unwrap_or(0);
    let from = floor(text, text.len().saturating_sub(longest));
    let begins = |at: &usize| marks.iter().any(|mark| mark.starts_with(&text[*at..]));
    Err(text[from..].char_indices().map(|(at, _)| from + at).find(begins).unwrap_or(text.len()))
}

/// The character boundary at or before `at`.
fn floor(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// Adds to the last part if it is of the same kind.
fn say(out: &mut Vec<Part>, part: Part) {
    match (out.last_mut(), part) {
        (_, Part::Content(text) | Part::Reasoning(text)) if text.is_empty() => {}
        (_, Part::Call(CallPart { name, arguments, .. })) if name.is_empty() && arguments.is_empty() => {}
        (Some(Part::Content(last)), Part::Content(text)) | (Some(Part::Reasoning(last)), Part::Reasoning(text)) => last.push_str(&text),
        (Some(Part::Call(last)), Part::Call(part)) if last.index == part.index => last.arguments.push_str(&part.arguments),
        (_, part) => out.push(part),
    }
}
