//! What a typed line means: text for the model, or a command of the chat. Pure; chat.rs carries it out.

/// Name, argument, what it does: /help, Tab and the parser all read this.
pub(super) const COMMANDS: &[(&str, &str, &str)] = &[
    ("/help", "", "this list (also /?)"),
    ("/clear", "", "forget the conversation"),
    ("/reset", "", "forget the conversation, the system prompt and what /set, /think and /format have changed"),
    ("/drop", "[N]", "forget the oldest turn, or the N oldest"),
    ("/undo", "", "forget the last turn"),
    ("/retry", "", "answer the last message again"),
    ("/edit", "", "change the last message in $EDITOR and send it anew; a new one if there is none"),
    ("/file", "PATH", "add a file to the next message"),
    ("/copy", "", "put the last answer on the clipboard"),
    ("/system", "[TEXT]", "set the system prompt, or remove it"),
    ("/set", "[PARAM VALUE]", "set temperature, top_k, max_tokens, expert_cache …; `default` unsets; alone lists them"),
    ("/think", "[HOW]", "on, off, or an effort: low, medium, high; show or hide what is thought"),
    ("/format", "[json|FILE|off]", "hold answers to JSON, or to a schema in a file"),
    ("/show", "[WHAT]", "info, params, system or template; alone all but the template"),
    ("/stats", "", "what the daemon is doing, and what the last answer cost"),
    ("/model", "[NAME]", "go on with another model; alone says which it is"),
    ("/models", "", "what is installed"),
    ("/save", "[NAME]", "keep the conversation, under a name"),
    ("/load", "[NAME]", "go on with another conversation; alone lists them"),
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
    Edit,
    File(String),
    Copy,
    /// `None` asks.
    Think(Option<String>),
    Format(Option<String>),
    Save(Option<String>),
    Load(Option<String>),
    System(Option<String>),
    Set(Option<(String, String)>),
    Show(Show),
    Stats,
    Model(Option<String>),
    Models,
    Exit,
    /// What is wrong with the line.
    Wrong(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Show {
    All,
    Info,
    Params,
    System,
    Template,
}

/// What /show takes.
pub(super) const SHOWN: [(&str, Show); 4] =
    [("info", Show::Info), ("params", Show::Params), ("system", Show::System), ("template", Show::Template)];
/// What /think takes.
pub(super) const THINKING: [&str; 7] = ["on", "off", "low", "medium", "high", "show", "hide"];

pub(super) fn parse(line: &str) -> Input {
    let trimmed = line.trim();
    if let Some(rest) = trimmed.strip_prefix(QUOTES) {
        return match rest.strip_suffix(QUOTES) {
            Some(whole) => say(whole),
            None => Input::Open(rest.into()),
        };
    }
    // What was pasted or typed as several lines is no command, even if it begins as one.
    if trimmed.contains('\n') {
        return say(line);
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
        "/edit" => Input::Edit,
        "/copy" => Input::Copy,
        "/file" => text().map_or_else(|| Input::Wrong("/file takes the path of a file".into()), Input::File),
        "/think" if rest.is_empty() || THINKING.contains(&rest) => Input::Think(text()),
        "/think" => Input::Wrong(format!("/think takes one of {}, not `{rest}`", THINKING.join(", "))),
        "/format" => Input::Format(text()),
        "/save" => Input::Save(text()),
        "/load" => Input::Load(text()),
        "/system" => Input::System(text()),
        "/set" => match rest.split_once(char::is_whitespace) {
            Some((param, value)) => Input::Set(Some((param.into(), value.trim().into()))),
            None if rest.is_empty() => Input::Set(None),
            None => Input::Wrong(format!("/set {rest} takes a value; `default` unsets it")),
        },
        "/show" if rest.is_empty() => Input::Show(Show::All),
        "/show" => match SHOWN.iter().find(|(name, _)| *name == rest) {
            Some((_, what)) => Input::Show(*what),
            None => Input::Wrong(format!("/show takes one of {}, not `{rest}`", SHOWN.map(|(name, _)| name).join(", "))),
        },
        "/stats" => Input::Stats,
        "/model" => Input::Model(text()),
        "/models" => Input::Models,
        "/exit" => Input::Exit,
        _ => Input::Wrong(format!("{typed} is not a command; /help lists them, and // at the start sends a line that begins with /")),
    }
}

pub(super) fn help() -> String {
    let lines: Vec<String> = COMMANDS.iter().map(|(name, argument, what)| format!("  {:24}{what}", format!("{name} {argument}"))).collect();
    let keys = "\n  \"\"\"                     begins and ends a message of several lines\n  Alt-Enter               begins another line of the message\n  Ctrl-C                  stops an answer; what came of it is kept";
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
        check("/model a/b", Input::Model(Some("a/b".into())));
        check("/model", Input::Model(None));
        check("/show", Input::Show(Show::All));
        check("/show template", Input::Show(Show::Template));
        check("/think off", Input::Think(Some("off".into())));
        check("/file a b.txt", Input::File("a b.txt".into()));
        check("/save", Input::Save(None));
        check("// a comment\nint x;", Input::Say("// a comment\nint x;".into()));
        check("/etc/fstab\n/etc/passwd", Input::Say("/etc/fstab\n/etc/passwd".into()));
        check("\"\"\"one line\"\"\"", Input::Say("one line".into()));
        check("\"\"\"first", Input::Open("first".into()));
        check("\"\"\"", Input::Open(String::new()));
        for wrong in ["/drop 0", "/drop x", "/set temperature", "/file", "/show x", "/think x", "/nonsense", "/etc/fstab says no", "/"] {
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
