//! How models write what is not content, as tables; which one a model speaks is told by its chat template. `parse.rs` reads them,
//! `grammar.rs` writes them.

/// Marks around what a model thinks.
pub(crate) const THINK: (&str, &str) = ("<think>", "</think>");

/// How a model writes tool calls.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Calls {
    pub(crate) style: Style,
    /// Before a call.
    pub(crate) open: &'static str,
    /// After it.
    pub(crate) close: &'static str,
    /// All of these stand in the template …
    has: &'static [&'static str],
    /// … and none of these.
    lacks: &'static [&'static str],
    /// What else the model marks; special tokens among all these marks are read as text.
    marks: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// `{"name": …, "arguments": {…}}`: Hermes, Qwen.
    Json,
    /// `<function=…><parameter=…>…</parameter></function>`: Qwen3-Coder.
    Xml,
    /// gpt-oss: every message has a header with a channel, and a call is a message to a function. Its reasoning is a channel as well.
    Harmony,
}

static CALLS: [Calls; 3] = [
    Calls {
        style: Style::Harmony,
        open: "<|message|>",
        close: "<|call|>",
        has: &["<|channel|>", "<|message|>"],
        lacks: &[],
        marks: &["<|start|>", "<|end|>", "<|channel|>", "<|constrain|>", "<|return|>"],
    },
    Calls { style: Style::Xml, open: "<tool_call>", close: "</tool_call>", has: &["<tool_call>", "<function="], lacks: &[], marks: &[] },
    Calls {
        style: Style::Json,
        open: "<tool_call>",
        close: "</tool_call>",
        has: &["<tool_call>"],
        lacks: &["<arg_key>", "<tool_sep>"],
        marks: &[],
    },
];

/// What a model's replies are made of.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Dialect {
    /// It may think between [`THINK`]'s marks.
    pub(crate) thinks: bool,
    pub(crate) calls: Option<&'static Calls>,
}

impl Dialect {
    pub(crate) fn of(template: &str) -> Self {
        let speaks = |calls: &&Calls| {
            calls.has.iter().all(|mark| template.contains(mark)) && !calls.lacks.iter().any(|mark| template.contains(mark))
        };
        Self { thinks: template.contains(THINK.1), calls: CALLS.iter().find(speaks) }
    }

    pub(crate) fn harmony(&self) -> bool {
        self.calls.is_some_and(|calls| calls.style == Style::Harmony)
    }

    /// What ends the reasoning when its budget is spent, and what does if it begins once more. In Harmony, a model that has tools may
    /// choose what comes next.
    pub(crate) fn closings(&self, calls: bool) -> &'static [&'static str] {
        const MESSAGE: &str = "<|end|><|start|>assistant";
        const ANSWER: &str = "<|end|><|start|>assistant<|channel|>final<|message|>";
        match self.harmony() {
            true if calls => &[MESSAGE, ANSWER],
            true => &[ANSWER],
            false if self.thinks => &["\n</think>"],
            false => &[],
        }
    }

    pub(crate) fn marks(self) -> impl Iterator<Item = &'static str> {
        let think = [THINK.0, THINK.1].into_iter().filter(move |_| self.thinks);
        let calls = self.calls.into_iter().flat_map(|calls| [calls.open, calls.close].into_iter().chain(calls.marks.iter().copied()));
        think.chain(calls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_tell_the_dialect() {
        let check = |template: &str, thinks: bool, style: Option<Style>| {
            let dialect = Dialect::of(template);
            assert_eq!((dialect.thinks, dialect.calls.map(|calls| calls.style)), (thinks, style), "{template}");
        };
        check("{{ messages }}", false, None);
        check("<tool_call>{{ tool_call | tojson }}</tool_call>", false, Some(Style::Json));
        check("{% if '</think>' in content %}<tool_call>", true, Some(Style::Json));
        check("<tool_call>\n<function=' + name + '>", false, Some(Style::Xml));
        check("<|start|>assistant<|channel|>analysis<|message|>", false, Some(Style::Harmony));
        check("<tool_call>' + name + '<arg_key>", false, None);
        let marks: Vec<_> = Dialect::of("</think><tool_call>").marks().collect();
        assert_eq!(marks, ["<think>", "</think>", "<tool_call>", "</tool_call>"]);
    }
}
