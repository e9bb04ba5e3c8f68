//! What a reply may be, as a grammar, and which tokens may come next: llguidance behind three types. A [`Compiler`] is made once for a
//! tokenizer, a [`Grammar`] once for a request, before it is accepted; a [`Guide`] follows one reply.

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use super::{
    formats::{Calls, Dialect, Style},
    rules::{self, Form, Part, inline, plainer, typed},
};
use crate::{
    Error, Format, Tool,
    model::{chat::ToolChoice, limits::on_deep_stack},
};

/// Longer tokens do not fit into a trie, and no grammar misses them.
const TOKEN_BYTES_MAX: usize = 512;
/// Remainders that all `multipleOf`s of a grammar may have together: a fifth of a second. llguidance makes a state for each when it
/// compiles, and its limits do not count them: a million took 8 to 12 seconds and 500 MB and more.
const REMAINDERS_MAX: u128 = 20_000;
/// What a parser may keep open at a time; a property that may come next takes four.
const ITEMS_MAX: usize = 25_000;
/// Grammars that are kept for the next request: an agent's turns all have the same tools.
const KEPT: usize = 8;

/// The field that asks for a form of the reply.
const FORMAT: &str = "response_format";

/// Compiles grammars for one tokenizer.
pub(crate) struct Compiler {
    factory: ParserFactory,
    kept: Mutex<Vec<(String, Matcher)>>,
}

/// A compiled grammar at its beginning.
#[derive(Clone)]
pub(crate) struct Grammar {
    matcher: Matcher,
    /// The request's field that it comes from.
    param: &'static str,
    /// Laxer than what was asked for, by somebody who does not insist.
    pub(crate) relaxed: bool,
}

/// A grammar that follows a reply.
pub(crate) struct Guide(Grammar);

/// Which tokens may come next.
pub(crate) type Mask = SimpleVob;

impl Compiler {
    /// `bytes`: what a token stands for, nothing where it stands for no text.
    pub(crate) fn new<'a>(vocab: usize, bytes: impl Fn(u32) -> &'a [u8], ends: &[u32]) -> Result<Self, Error> {
        let fits = |bytes: &'a [u8]| if bytes.len() <= TOKEN_BYTES_MAX { bytes.to_vec() } else { Vec::new() };
        let words: Vec<Vec<u8>> = (0..vocab as u32).map(|id| fits(bytes(id))).collect();
        let ends: Vec<u32> = ends.iter().copied().filter(|id| (*id as usize) < vocab).collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab as u32, ends.first().copied().unwrap_or(INVALID_TOKEN)), &words);
        let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) };
        let env: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| Error::Internal(format!("no grammar can be made for this tokenizer: {error}")))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.verbose_errors = false;
        limits.max_items_in_row = ITEMS_MAX;
        Ok(Self { factory, kept: Mutex::default() })
    }

    /// Compiles a Lark grammar, or takes it from the last few; the error is one line. What llguidance learns while it follows a reply stays
    /// with the request: a copy that is kept would grow without end.
    fn lark(&self, lark: &str, param: &'static str) -> Result<Grammar, String> {
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = kept.iter().position(|(known, _)| known == lark) {
                let found = kept.remove(at);
                let copy = found.1.deep_clone();
                kept.push(found);
                return Ok(Grammar { matcher: copy, param, relaxed: false });
            }
        }
        let matcher = self.compiled(lark.to_owned())?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push((lark.to_owned(), matcher.deep_clone()));
        Ok(Grammar { matcher, param, relaxed: false })
    }

    /// Some compile and cannot be followed: a schema that is nothing but itself, an object of too many properties. So it is tried out.
    fn compiled(&self, lark: String) -> Result<Matcher, String> {
        if rules::remainders(&lark) > REMAINDERS_MAX {
            return Err(format!("multipleOf: numbers of more than {REMAINDERS_MAX} remainders take too long (decimals count as digits)"));
        }
        on_deep_stack("grammar", || {
            let parser = self.factory.create_parser(TopLevelGrammar::from_lark(lark)).map_err(|error| one_line(&error.to_string()))?;
            let matcher = Matcher::new(Ok(parser));
            try_out(&mut matcher.deep_clone()).map_err(|error| one_line(&error))?;
            Ok(matcher)
        })
    }

    /// A grammar for all of a reply's content: the format, or calls where they may take its place.
    pub(crate) fn format(
        &self,
        format: &Format,
        dialect: Dialect,
        calls: Option<(&'static Calls, &[&Tool], &ToolChoice)>,
    ) -> Result<Grammar, Error> {
        let (before, thought) = if dialect.harmony() { ("thought? \"<|channel|>final<|message|>\" ", rules::THOUGHT) } else { ("", "") };
        let whole = |written: String| match calls {
            None => self.lark(&format!("start: {before}format\nformat: {written}\n{thought}"), FORMAT).map_err(refused),
            Some((style, tools, choice)) => self.with_tools(FORMAT, &|form| {
                let thinking = if dialect.harmony() { "thought? " } else { "" };
                let calls = rules::calls(style, tools, choice, form)?;
                Ok(format!("start: {before}format | {thinking}calls\nformat: {written}\n{calls}{thought}"))
            }),
        };
        match format {
            Format::JsonObject => whole(inline(&json!({"type": "object"}), false)),
            Format::JsonSchema { schema, strict } => whole(inline(schema, false)).or_else(|error| {
                let laxer = laxer(schema).into_iter().filter(|_| !strict && typed(schema));
                let found = laxer.filter_map(|form| whole(form).ok()).next().ok_or(error)?;
                Ok(Grammar { relaxed: true, ..found })
            }),
            Format::Regex(pattern) => whole(format!("/{}/", llguidance::regex_to_lark(pattern, ""))),
            Format::Lark(grammar) if calls.is_none() && !dialect.harmony() => self.lark(grammar, FORMAT).map_err(refused),
            Format::Lark(grammar) => whole(format!("%lark {{\n{grammar}\n}}")),
        }
    }

    /// A grammar for a reply that is calls and nothing else.
    pub(crate) fn only_calls(&self, calls: &'static Calls, tools: &[&Tool], choice: &ToolChoice) -> Result<Grammar, Error> {
        self.with_tools("tools", &|form| {
            let rules = rules::calls(calls, tools, choice, form)?;
            Ok(match calls.style {
                Style::Harmony => format!("start: thought? calls\n{rules}{}", rules::THOUGHT),
                _ => format!("start: calls\n{rules}"),
            })
        })
    }

    /// A grammar for what stands between a call's mark and the end of its own mark; in Harmony, where the mark is a message's head that
    /// names the tool, for that name on a line and the message.
    pub(crate) fn one_call(&self, calls: &'static Calls, tools: &[&Tool]) -> Result<Grammar, Error> {
        if calls.style == Style::Harmony {
            return self.with_tools("tools", &|form| rules::named(tools, form));
        }
        self.with_tools("tools", &|form| Ok(format!("start: body\n{}", rules::bodies(calls, tools, form)?)))
    }

    /// At first as if every schema could be enforced; one by one only if that fails; and if all together are too much, without what is
    /// dear where nobody insists. `param` is to blame for the rest.
    fn with_tools(&self, param: &'static str, make: &dyn Fn(Form) -> Result<String, Error>) -> Result<Grammar, Error> {
        let quick = make(&|tool, part| {
            Ok(Some(match part {
                Part::Json(schema) => inline(schema, !tool.strict),
                Part::Text(rules) => rules.to_owned(),
            }))
        })?;
        if let Ok(grammar) = self.lark(&quick, param) {
            return Ok(grammar);
        }
        if let Ok(grammar) = self.lark(&make(&|tool, part| self.enforceable(tool, part, false))?, param) {
            return Ok(grammar);
        }
        self.lark(&make(&|tool, part| self.enforceable(tool, part, true))?, param).map_err(|reason| Error::Schema { param, reason })
    }

    /// The strictest form that compiles; a `plain` one where the tool leaves the choice.
    fn enforceable(&self, tool: &Tool, part: Part, plain: bool) -> Result<Option<String>, Error> {
        let compiles = |grammar: String| self.compiled(grammar).map(drop);
        let refuse = |reason| Error::Schema { param: "tools", reason: format!("{}: {reason}", tool.name) };
        let schema = match part {
            Part::Json(schema) => schema,
            Part::Text(rules) => {
                return match compiles(format!("start: text\n{rules}")) {
                    Ok(()) => Ok(Some(rules.to_owned())),
                    Err(reason) if tool.strict => Err(refuse(reason)),
                    Err(_) => Ok(None),
                };
            }
        };
        let compiles = |form: &str| compiles(format!("start: {form}\n"));
        if tool.strict {
            let form = inline(schema, false);
            return compiles(&form).map(|()| Some(form)).map_err(refuse);
        }
        let forms = laxer(schema);
        let last = forms.len() - 1;
        let found = forms.into_iter().enumerate().skip(usize::from(plain)).find(|(index, form)| *index == last || compiles(form).is_ok());
        Ok(found.map(|(_, form)| form))
    }
}

impl Grammar {
    pub(crate) fn begin(&self) -> Guide {
        Guide(self.clone())
    }

    fn too_complex(&self, error: impl std::fmt::Display) -> Error {
        let reason = format!("the grammar cannot be followed any further: {}", one_line(&error.to_string()));
        Error::Schema { param: self.param, reason }
    }
}

impl Guide {
    pub(crate) fn mask(&mut self) -> Result<Mask, Error> {
        self.0.matcher.compute_mask().map_err(|error| self.0.too_complex(error))
    }

    /// Whether the mask has this token.
    pub(crate) fn allows(&mut self, token: u32) -> Result<bool, Error> {
        let env = self.0.matcher.tok_env().map_err(|error| self.0.too_complex(error))?;
        let trie = env.tok_trie();
        // One that stands for no text changes nothing, and would never end.
        let says = (token as usize) < trie.vocab_size() && (!trie.token(token).is_empty() || trie.eos_tokens().contains(&token));
        Ok(says && self.0.matcher.validate_tokens(&[token]).map_err(|error| self.0.too_complex(error))? == 1)
    }

    pub(crate) fn take(&mut self, token: u32) -> Result<(), Error> {
        self.0.matcher.consume_token(token).map_err(|error| self.0.too_complex(error))
    }

    /// Takes bytes that no mask has seen; whether they keep to the grammar.
    pub(crate) fn take_bytes(&mut self, bytes: &[u8]) -> bool {
        take_bytes(&mut self.0.matcher, bytes)
    }

    /// Complete, and nothing may follow.
    pub(crate) fn ended(&self) -> bool {
        self.0.matcher.is_stopped()
    }
}

fn take_bytes(matcher: &mut Matcher, bytes: &[u8]) -> bool {
    let Ok(env) = matcher.tok_env() else { return false };
    let tokens = env.tok_trie().greedy_tokenize(bytes);
    matcher.try_consume_tokens(&tokens).is_ok_and(|taken| taken == tokens.len()) && env.tok_trie().decode(&tokens) == bytes
}

/// The masks of a reply's beginning: of its first token, and of the first one that is a choice within an object.
fn try_out(matcher: &mut Matcher) -> Result<(), String> {
    let mask = |matcher: &mut Matcher| matcher.compute_mask().map(drop).map_err(|error| error.to_string());
    mask(matcher)?;
    let forced = matcher.compute_ff_bytes();
    if take_bytes(matcher, &forced) && take_bytes(matcher, b"{") && !matcher.is_stopped() {
        mask(matcher)?;
    }
    Ok(())
}

/// What may be enforced in a schema's place if nobody insists on it: all of it that llguidance knows, what it can follow more often, and
/// last its type.
fn laxer(schema: &Value) -> [String; 3] {
    let anything = if schema["type"] == "object" { json!({"type": "object"}) } else { json!({}) };
    [schema, &plainer(schema), &anything].map(|schema| inline(schema, true))
}

/// A format, with or without tools beside it.
fn refused(reason: String) -> Error {
    Error::Schema { param: FORMAT, reason }
}

/// Its first line, without the place in a grammar that the caller may not have written; of a pattern, it and what is wrong with it.
fn one_line(error: &str) -> String {
    let mut lines = error.lines();
    let line = lines.next().unwrap_or_default();
    let line = line.strip_prefix("at ").and_then(|line| line.split_once("): ")).map_or(line, |(_, reason)| reason);
    match (lines.next(), lines.find_map(|line| line.strip_prefix("error: "))) {
        (Some(pattern), Some(reason)) if line.ends_with(':') => format!("{line} {}: {reason}", pattern.trim()),
        _ => line.to_owned(),
    }
}
