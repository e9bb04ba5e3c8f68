//! What a typed line means: text for the model, or a command of the chat. Pure; chat.rs carries it out.

/// Name, argument, what it does: /help, Tab and the parser all read this.
pub(super) const COMMANDS: &[(&str, &str, &str)] = &[
    ("/help", "", "this list (also /?)"),
    ("/clear", "", "forget the conversation"),
    ("/reset", "", "forget the conversation, the system prompt and what was /set"),
    ("/drop", "[N]", "forget the oldest turn, or the N oldest"),
    ("/undo", "", "forget the last turn"),
    ("/retry", "", "answer the last message again"),
    ("/system", "[TEXT]", "set the system prompt, or remove it"),
    ("/set", "[PARAM VALUE]", "set temperature, top_k, max_tokens, expert_cache …; `default` unsets; alone lists them"),
    ("/show", "", "the model, the settings and the system prompt"),
    ("/stats", "", "what the daemon is doing, and what the last answer cost"),
    ("/model", "NAME", "go on with another model"),
    ("/models", "", "what is installed"),
    ("/exit", "", "leave (also /bye, /quit, Ctrl-D)"),
];

const OTHER_NAMES: &[(&str, &str)] = &[("/?", "/help"), ("/bye", "/exit"), ("/quit", "/exit")];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Input {
    Nothing,
    Say(String),
    /// `"""` was opened and this is what follows it so far.
    Open(String),
    Help,
    Clear,
    Reset,
    Drop(usize),
    Undo,
    Retry,
    System(Option<String>),
    Set(Option<(String, String)>),
    Show,
    Stats,
    Model(String),
    Models,
    Exit,
    /// What is wrong with the line.
    Wrong(String),
}

pub(super) fn parse(line: &str) -> Input {
    let trimmed = line.trim();
    if let Some(rest) = trimmed.strip_prefix(QUOTES) {
        return match rest.strip_suffix(QUOTES) {
            Some(whole) => say(whole),
            None => Input::Open(rest.into()),
        };
    }
    // A second slash makes the first one text.
    if let Some(text) = trimmed.strip_prefix("//") {
        return Input::Say(format!("/{text}"));
    }
    // A pasted path or a line of several words that begins with one, such as "/etc/fstab says …", is not a command either,
    // but sending it by mistake cannot be undone; the message says how to mean it.
    if trimmed.starts_with('/') { command(trimmed) } else { say(line) }
}

/// Begins and ends a message of several lines.
pub(super) const QUOTES: &str = "\"\"\"";

pub(super) fn say(text: &str) -> Input {
    if text.trim().is_empty() { Input::Nothing } else { Input::Say(text.into()) }
}

fn command(line: &str) -> Input {
    let (typed, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    let name = OTHER_NAMES.iter().find(|(other, _)| *other == typed).map_or(typed, |(_, name)| name);
    let text = || (!rest.is_empty()).then(|| rest.to_owned());
    match name {
        "/help" => Input::Help,
        "/clear" => Input::Clear,
        "/reset" => Input::Reset,
        "/drop" => match rest.parse() {
            Ok(turns) if turns > 0 => Input::Drop(turns),
            _ if rest.is_empty() => Input::Drop(1),
            _ => Input::Wrong(format!("/drop takes how many of the oldest turns to forget, not `{rest}`")),
        },
        "/undo" => Input::Undo,
        "/retry" => Input::Retry,
        "/system" => Input::System(text()),
        "/set" => match rest.split_once(char::is_whitespace) {
            Some((param, value)) => Input::Set(Some((param.into(), value.trim().into()))),
            None if rest.is_empty() => Input::Set(None),
            None => Input::Wrong(format!("/set {rest} takes a value; `default` unsets it")),
        },
        "/show" => Input::Show,
        "/stats" => Input::Stats,
        "/model" => text().map_or_else(|| Input::Wrong("/model takes a name; /models lists them".into()), Input::Model),
        "/models" => Input::Models,
        "/exit" => Input::Exit,
        _ => Input::Wrong(format!("{typed} is not a command; /help lists them, and // at the start sends a line that begins with /")),
    }
}

pub(super) fn help() -> String {
    let lines: Vec<String> = COMMANDS.iter().map(|(name, argument, what)| format!("  {:24}{what}", format!("{name} {argument}"))).collect();
    let keys = "\n  \"\"\"                     begins and ends a message of several lines\n  Ctrl-C                  stops an answer; what came of it is kept";
    lines.join("\n") + keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let check = |line: &str, expected: Input| assert_eq!(parse(line), expected, "{line}");
        check("", Input::Nothing);
        check("  \t", Input::Nothing);
        check("Hello /there", Input::Say("Hello /there".into()));
        check("//etc/fstab", Input::Say("/etc/fstab".into()));
        check("/?", Input::Help);
        check(" /bye ", Input::Exit);
        check("/system", Input::System(None));
        check("/system  Be brief. ", Input::System(Some("Be brief.".into())));
        check("/set temperature 0.5", Input::Set(Some(("temperature".into(), "0.5".into()))));
        check("/set stop a b", Input::Set(Some(("stop".into(), "a b".into()))));
        check("/set", Input::Set(None));
        check("/drop", Input::Drop(1));
        check("/drop 3", Input::Drop(3));
        check("/model a/b", Input::Model("a/b".into()));
        check("\"\"\"one line\"\"\"", Input::Say("one line".into()));
        check("\"\"\"first", Input::Open("first".into()));
        check("\"\"\"", Input::Open(String::new()));
        for wrong in ["/drop 0", "/drop x", "/set temperature", "/model", "/nonsense", "/etc/fstab says no", "/"] {
            assert!(matches!(parse(wrong), Input::Wrong(_)), "{wrong}");
        }
    }

    #[test]
    fn every_listed_command_is_one() {
        for (name, ..) in COMMANDS {
            let unknown = matches!(parse(name), Input::Wrong(why) if why.contains("not a command"));
            assert!(!unknown, "{name}");
        }
    }
}
