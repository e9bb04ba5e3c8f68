//! Lines typed by a person: rustyline on a thread of its own, so that signals are heard meanwhile, with the history file
//! and completion of commands and what they take. Alt-Enter and a paste put newlines into a line; otherwise it knows no meaning of one.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use flash_proto::socket;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use rustyline::{
    Cmd, CompletionType, Config, Context, Editor, EventHandler, Helper, KeyCode, KeyEvent, Modifiers, completion::Completer,
    error::ReadlineError, highlight::Highlighter, hint::Hinter, history::FileHistory, validate::Validator,
};

use super::{conversation, saved, slash};
use crate::failure::{Failure, exit};

/// What the person did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
    Text(String),
    /// Ctrl-C; true if nothing had been typed.
    Interrupt(bool),
    End,
}

pub(super) struct Lines {
    /// Away while a thread reads.
    editor: Option<Editor<Typing, FileHistory>>,
    history: Option<PathBuf>,
    is_empty: Arc<AtomicBool>,
    /// Names of models, for Tab.
    pub(super) models: Arc<Mutex<Vec<String>>>,
    /// As the shell left it; `None` off a terminal.
    terminal: Option<Termios>,
}

impl Lines {
    /// With the history that earlier chats left, unless the user wants none.
    pub(super) fn open(keep_history: bool) -> Result<Self, Failure> {
        let terminal = tcgetattr(std::io::stdin()).ok();
        let config = Config::builder().completion_type(CompletionType::List).auto_add_history(false).build();
        let mut editor = Editor::with_config(config).map_err(|error| broken(&error))?;
        let is_empty = Arc::new(AtomicBool::new(true));
        let models = Arc::new(Mutex::new(Vec::new()));
        editor.set_helper(Some(Typing { is_empty: Arc::clone(&is_empty), models: Arc::clone(&models) }));
        for code in [KeyCode::Enter, KeyCode::Char('\r'), KeyCode::Char('\n')] {
            editor.bind_sequence(KeyEvent(code, Modifiers::ALT), EventHandler::Simple(Cmd::Newline));
        }
        let history = (keep_history && terminal.is_some()).then(socket::home).and_then(Result::ok).map(|home| home.join("history"));
        if let Some(path) = &history {
            // A chat without history is still a chat.
            let _ = path.parent().map(|home| fs::DirBuilder::new().recursive(true).mode(0o700).create(home));
            let _ = editor.load_history(path);
        }
        Ok(Self { editor: Some(editor), history, is_empty, models, terminal })
    }

    pub(super) fn at_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// The next line. The future may be dropped, once: the thread is then left to the end of the process.
    pub(super) async fn read(&mut self, prompt: &'static str) -> Result<Line, Failure> {
        let mut editor = self.editor.take().ok_or_else(|| Failure::new(exit::INTERNAL, "input", "the line editor is gone"))?;
        self.is_empty.store(true, Relaxed);
        let reading = tokio::task::spawn_blocking(move || {
            let line = editor.readline(prompt);
            (editor, line)
        });
        let (editor, line) = reading.await.map_err(|error| Failure::new(exit::INTERNAL, "input", error.to_string()))?;
        self.editor = Some(editor);
        match line {
            Ok(line) => {
                self.remember(&line);
                Ok(Line::Text(line))
            }
            Err(ReadlineError::Interrupted) => Ok(Line::Interrupt(self.is_empty.load(Relaxed))),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(error) => Err(broken(&error)),
        }
    }

    /// At once, so that a killed chat loses nothing. rustyline makes the file 0600.
    fn remember(&mut self, line: &str) {
        if let (Some(editor), Some(path)) = (&mut self.editor, &self.history)
            && !line.trim().is_empty()
            && editor.add_history_entry(line).unwrap_or(false)
        {
            let _ = editor.append_history(path);
        }
    }
}

/// Undoes raw mode when the reading thread is left behind, and when something panics.
impl Drop for Lines {
    fn drop(&mut self) {
        if let Some(terminal) = &self.terminal {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, terminal);
        }
    }
}

fn broken(error: &ReadlineError) -> Failure {
    Failure::new(exit::INTERNAL, "input", format!("cannot read the terminal: {error}"))
}

/// Completes commands and what they take, and knows whether the line is empty: rustyline tells of a Ctrl-C, not of the line it ended.
struct Typing {
    is_empty: Arc<AtomicBool>,
    models: Arc<Mutex<Vec<String>>>,
}

impl Completer for Typing {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..pos];
        let Some((command, _)) = typed.split_once(' ') else {
            let names = slash::COMMANDS.iter().filter(|(name, ..)| typed.starts_with('/') && name.starts_with(typed));
            return Ok((
                0,
                names.map(|(name, argument, _)| if argument.is_empty() { (*name).into() } else { format!("{name} ") }).collect(),
            ));
        };
        let start = typed.len() - typed[command.len()..].trim_start().len();
        let begun = &typed[start..];
        let starts = |names: Vec<String>| names.into_iter().filter(|name| name.starts_with(begun)).collect::<Vec<_>>();
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let found = match command {
            "/model" => starts(self.models.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            "/load" => {
                starts(saved::Folder::open().map(|folder| folder.names().into_iter().map(|(name, _)| name).collect()).unwrap_or_default())
            }
            "/set" => starts(conversation::PARAMETERS.map(|name| format!("{name} ")).into()),
            "/show" => starts(own(&slash::SHOWN.map(|(name, _)| name))),
            "/think" => starts(own(&slash::THINKING)),
            "/format" => starts(own(&["json", "off"])).into_iter().chain(paths(begun)).collect(),
            "/file" => paths(begun),
            _ => Vec::new(),
        };
        Ok((start, found))
    }
}

/// Files and folders whose path begins like that.
fn paths(begun: &str) -> Vec<String> {
    let (folder, name) = begun.rsplit_once('/').map_or(("", begun), |(folder, name)| (&begun[..=folder.len()], name));
    let place = if folder.is_empty() { PathBuf::from(".") } else { expanded(folder) };
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    let mut found: Vec<String> = entries
        .filter_map(|entry| {
            let found = entry.file_name().into_string().ok().filter(|found| found.starts_with(name))?;
            let hidden = found.starts_with('.') && !name.starts_with('.');
            let end = if entry.path().is_dir() { "/" } else { "" };
            (!hidden).then(|| format!("{folder}{found}{end}"))
        })
        .collect();
    found.sort();
    found
}

/// `~/` is the user's home, as a shell has it.
pub(super) fn expanded(path: &str) -> PathBuf {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => Path::new(path).into(),
    }
}

impl Hinter for Typing {
    type Hint = String;

    fn hint(&self, line: &str, _: usize, _: &Context<'_>) -> Option<String> {
        self.is_empty.store(line.is_empty(), Relaxed);
        None
    }
}

impl Highlighter for Typing {}
impl Validator for Typing {}
impl Helper for Typing {}

#[cfg(test)]
mod tests {
    use rustyline::history::DefaultHistory;

    use super::*;

    #[test]
    fn tab_knows_commands_and_what_they_take() {
        let models = Arc::new(Mutex::new(vec!["tiny".into(), "big".into()]));
        let typing = Typing { is_empty: Arc::default(), models };
        let history = DefaultHistory::new();
        let check = |line: &str, start: usize, expected: &[&str]| {
            let (at, found) = typing.complete(line, line.len(), &Context::new(&history)).expect("no error");
            assert_eq!((at, found.iter().map(String::as_str).collect::<Vec<_>>().as_slice()), (start, expected), "{line}");
        };
        check("/mod", 0, &["/model ", "/models"]);
        check("hello /mod", 6, &[]);
        check("/model t", 7, &["tiny"]);
        check("/model ", 7, &["tiny", "big"]);
        check("/set temp", 5, &["temperature "]);
        check("/show  te", 7, &["template"]);
        check("/think lo", 7, &["low"]);
        check("/undo x", 6, &[]);
        check("/file Cargo", 6, &["Cargo.toml"]);
        check("/file ./sr", 6, &["./src/"]);
        check("/format o", 8, &["off"]);
    }
}
