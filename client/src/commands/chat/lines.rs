//! Lines typed by a person: rustyline on a thread of its own, so that signals are heard meanwhile, with the history file
//! and completion of commands. It knows no meaning of a line beyond `"""`.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use flash_proto::socket;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use rustyline::{
    CompletionType, Config, Context, Editor, Helper, completion::Completer, error::ReadlineError, highlight::Highlighter, hint::Hinter,
    history::FileHistory, validate::Validator,
};

use super::slash;
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
        editor.set_helper(Some(Typing { is_empty: Arc::clone(&is_empty) }));
        let history = (keep_history && terminal.is_some()).then(socket::home).and_then(Result::ok).map(|home| home.join("history"));
        if let Some(path) = &history {
            // A chat without history is still a chat.
            let _ = path.parent().map(|home| fs::DirBuilder::new().recursive(true).mode(0o700).create(home));
            let _ = editor.load_history(path);
        }
        Ok(Self { editor: Some(editor), history, is_empty, terminal })
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

    /// Undoes raw mode when the reading thread is left behind.
    pub(super) fn restore_terminal(&self) {
        if let Some(terminal) = &self.terminal {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, terminal);
        }
    }
}

fn broken(error: &ReadlineError) -> Failure {
    Failure::new(exit::INTERNAL, "input", format!("cannot read the terminal: {error}"))
}

/// Completes commands, and knows whether the line is empty: rustyline tells of a Ctrl-C, not of the line it ended.
struct Typing {
    is_empty: Arc<AtomicBool>,
}

impl Completer for Typing {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..pos];
        let names = slash::COMMANDS.iter().filter(|(name, ..)| typed.starts_with('/') && name.starts_with(typed));
        Ok((0, names.map(|(name, argument, _)| if argument.is_empty() { (*name).into() } else { format!("{name} ") }).collect()))
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
