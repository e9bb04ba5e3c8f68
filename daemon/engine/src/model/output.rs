//! A reply on its way: tokens in, content, reasoning and tool calls out; and which tokens may come next, where the request says what the
//! reply must look like. A [`Reply`] is made before the request is accepted (`text.rs`), the engine follows it token by token.

mod calls;
mod formats;
mod grammar;
mod parse;
mod rules;
mod stops;
#[cfg(test)]
mod tests;
mod tokens;

use std::{collections::VecDeque, fmt, sync::Arc};

pub(crate) use formats::{Dialect, THINK};
use grammar::Guide;
pub(crate) use grammar::{Compiler, Grammar, Mask};
use parse::{Begun, Parser};
pub(crate) use parse::{Schemas, Thinking};
use stops::Stops;
use tokens::Tokens;

use super::text::{Decoder, Text};
use crate::{Channel, Error, Finish, Part, TokenLogprob};

/// How a reply is to be read and what it may be; by default any text, all of it content.
#[derive(Clone, Default)]
pub struct Reply {
    pub(super) dialect: Dialect,
    pub(super) thinking: Thinking,
    /// Of the tools that may be called; empty: marks of calls are content.
    pub(super) schemas: Schemas,
    /// End after the first call.
    pub(super) single: bool,
    pub(super) rules: Rules,
    /// Tokens of reasoning at most, and those that close it then, each time that it begins.
    pub(super) budget: Option<(usize, VecDeque<Vec<u32>>)>,
}

/// What holds a reply to a form.
#[derive(Clone, Default)]
pub(super) enum Rules {
    #[default]
    None,
    /// All of it, once thinking has ended.
    Whole(Grammar),
    /// Each call, from its mark on.
    Calls(Grammar),
}

impl Reply {
    /// Its form is laxer than the one that was asked for: somebody did not insist on what no grammar can enforce.
    pub fn relaxed(&self) -> bool {
        matches!(&self.rules, Rules::Whole(grammar) if grammar.relaxed)
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("dialect", &self.dialect).field("thinking", &self.thinking).finish_non_exhaustive()
    }
}

/// What one token adds.
#[derive(Debug, Default)]
pub(crate) struct Added {
    pub(crate) parts: Vec<Part>,
    /// What the token itself is part of; `None`: a call.
    pub(crate) channel: Option<Channel>,
    pub(crate) finish: Option<Finish>,
    /// Of the tokens that the content is made of, once it is said.
    pub(crate) logprobs: Vec<TokenLogprob>,
}

/// Reads one reply.
pub(crate) struct Output {
    decoder: Decoder,
    parser: Parser,
    stops: Stops,
    tokens: Tokens,
    /// Whether there is nothing to look for in the text.
    plain: bool,
    single: bool,
    rules: Rules,
    guide: Option<Guide>,
    mask: Mask,
    reasoning_tokens: usize,
    budget: Option<(usize, VecDeque<Vec<u32>>)>,
    /// What closes the reasoning, the last token first, once its budget is spent.
    closing: Vec<u32>,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output").field("parser", &self.parser).field("guided", &self.guide.is_some()).finish_non_exhaustive()
    }
}

impl Output {
    pub(crate) fn new(reply: Reply, stops: Vec<String>) -> Self {
        let Reply { dialect, thinking, schemas, single, rules, budget } = reply;
        let plain = !dialect.harmony() && schemas.is_empty() && thinking == Thinking::No;
        let parser = Parser::new(dialect, schemas, thinking);
        let guide = match &rules {
            Rules::Whole(grammar) if !parser.reasons() => Some(grammar.begin()),
            _ => None,
        };
        let decoder = Decoder::default();
        Self {
            decoder,
            parser,
            stops: Stops::new(stops),
            tokens: Tokens::default(),
            plain,
            single,
            rules,
            guide,
            mask: Mask::new(),
            reasoning_tokens: 0,
            budget,
            closing: Vec::new(),
        }
    }

    /// Whether not every token may come next.
    pub(crate) fn guided(&self) -> bool {
        self.guide.is_some()
    }

    /// What [`Output::mask`] says of one token, for less.
    pub(crate) fn allows(&mut self, text: &Text, token: u32) -> Result<bool, Error> {
        let Some(guide) = &mut self.guide else { return Ok(true) };
        Ok(text.think_id() == Some(token) && self.parser.may_think() || guide.allows(token)?)
    }

    /// The tokens that may come next; `None`: all.
    pub(crate) fn mask(&mut self, text: &Text) -> Result<Option<&Mask>, Error> {
        let Some(guide) = &mut self.guide else { return Ok(None) };
        self.mask = guide.mask()?;
        if let Some(think) = text.think_id().filter(|_| self.parser.may_think()) {
            self.mask.allow_token(think);
        }
        Ok(Some(&self.mask))
    }

    pub(crate) fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    /// The next token where the model has no choice: its budget for reasoning is spent. Not between the bytes of a character.
    pub(crate) fn forced(&mut self) -> Option<u32> {
        if let Some((most, closings)) = &mut self.budget
            && self.closing.is_empty()
            && self.reasoning_tokens >= *most
            && self.parser.reasons()
            && self.decoder.held().is_empty()
            && let Some(closing) = closings.pop_front()
        {
            self.closing = closing.into_iter().rev().collect();
        }
        self.closing.pop()
    }

    /// One more token, which does not end the turn.
    pub(crate) fn push(&mut self, text: &Text, token: u32, logprob: Option<TokenLogprob>) -> Result<Added, Error> {
        let thinks = text.think_id() == Some(token) && self.parser.may_think();
        let mut guided = false;
        if let Some(guide) = self.guide.as_mut().filter(|_| !thinks) {
            guide.take(token)?;
            guided = true;
        }
        if thinks {
            self.guide = None;
        }
        let piece = self.decoder.push(text, token, !self.plain);
        let listed = logprob.filter(|_| !piece.is_empty() || !self.decoder.held().is_empty());
        if let Some(logprob) = listed {
            let at = self.parser.pushed();
            // A token within a character is of the byte that comes next.
            self.tokens.push(at..at + piece.len().max(1), logprob);
        }
        let mut added = Added { channel: Some(Channel::Content), ..Added::default() };
        if self.plain {
            self.parser.pass(&piece);
            self.say([Part::Content(piece)], &mut added);
        } else {
            let before = self.channel();
            self.parse(&piece, &mut added)?;
            added.channel = join(before, self.channel());
            self.reasoning_tokens += usize::from(added.channel == Some(Channel::Reasoning));
        }
        let ended = guided && self.guide.as_ref().is_some_and(Guide::ended);
        if ended || !self.parser.in_call() {
            let whole = matches!(self.rules, Rules::Whole(_));
            if ended && whole && added.finish.is_none() {
                self.end(&mut added, Finish::Stop(None));
            }
            self.guide.take_if(|_| !whole);
        }
        if self.single && self.parser.complete() > 0 && added.finish.is_none() {
            self.end(&mut added, Finish::Stop(None));
        }
        Ok(added)
    }

    /// Feeds the parser; grammars begin where it says so.
    fn parse(&mut self, piece: &str, added: &mut Added) -> Result<(), Error> {
        let Self { parser, rules, guide, decoder, .. } = self;
        let mut strayed = false;
        let mut found = Vec::new();
        let whole = matches!(rules, Rules::Whole(_));
        parser.push(piece, &mut found, &mut |begun, rest| {
            let grammar = match (begun, &*rules) {
                (Begun::Call, Rules::Calls(grammar)) | (Begun::Content, Rules::Whole(grammar)) if guide.is_none() => grammar,
                _ => return whole && guide.is_some(),
            };
            let mut next = grammar.begin();
            // Space behind the marks of thinking is no part of the content.
            let rest = if begun == Begun::Content { rest.trim_start() } else { rest };
            let follows = next.take_bytes(&[rest.as_bytes(), decoder.held()].concat());
            strayed |= !follows && whole;
            *guide = follows.then_some(next);
            follows
        });
        if strayed {
            return Err(Error::Internal("one token ends the reasoning and begins what the format does not allow".into()));
        }
        self.say(found, added);
        Ok(())
    }

    /// Looks for stop strings in the content among `parts`.
    fn say(&mut self, parts: impl IntoIterator<Item = Part>, added: &mut Added) {
        self.parser.places().for_each(|place| self.tokens.content(place));
        for part in parts {
            let Part::Content(text) = part else {
                // No stop string goes on across this.
                self.release(added);
                added.parts.push(part);
                continue;
            };
            let (said, stop) = self.stops.push(&text);
            self.said(said, added);
            if stop.is_some() {
                added.finish = Some(Finish::Stop(stop));
                return;
            }
        }
        self.tokens.forget(self.parser.told());
    }

    fn release(&mut self, added: &mut Added) {
        let held = self.stops.release();
        self.said(held, added);
    }

    fn said(&mut self, text: String, added: &mut Added) {
        if !text.is_empty() {
            self.tokens.said(text.len(), &mut added.logprobs);
            added.parts.push(Part::Content(text));
        }
    }

    /// Releases what was held back. A stop string completed by the last bytes still counts.
    pub(crate) fn end(&mut self, added: &mut Added, finish: Finish) {
        let cut = finish == Finish::Length;
        let (broken, content) = (!self.decoder.held().is_empty(), self.channel() == Some(Channel::Content));
        let rest = self.decoder.finish();
        // Cut within a character: what is missing would have been one.
        let rest = if cut { String::new() } else { rest };
        let mut found = Vec::new();
        if self.plain {
            self.parser.pass(&rest);
            found.push(Part::Content(rest));
        } else {
            self.parser.push(&rest, &mut found, &mut |_, _| false);
            self.parser.finish(cut, &mut found);
        }
        self.say(found, added);
        if added.finish.is_some() {
            return;
        }
        self.release(added);
        if cut && broken && content {
            let at = self.parser.pushed();
            self.tokens.content(at..at + 1);
            self.tokens.said(1, &mut added.logprobs);
        }
        added.finish = Some(match finish {
            Finish::Stop(None) if self.parser.complete() > 0 => Finish::ToolCalls,
            finish => finish,
        });
    }

    fn channel(&self) -> Option<Channel> {
        match &self.parser {
            parser if parser.in_call() => None,
            parser if parser.reasons() => Some(Channel::Reasoning),
            _ => Some(Channel::Content),
        }
    }
}

/// A mark belongs to what it opens or closes.
fn join(before: Option<Channel>, after: Option<Channel>) -> Option<Channel> {
    match (before?, after?) {
        (Channel::Content, Channel::Content) => Some(Channel::Content),
        _ => Some(Channel::Reasoning),
    }
}

impl Reply {
    pub(super) fn new(dialect: Dialect, thinking: Thinking) -> Self {
        Self { dialect, thinking, schemas: Arc::default(), single: false, rules: Rules::None, budget: None }
    }
}
