//! Standard output and error: checked writes, colour only where it is wanted, one line that redraws itself. Knows no
//! commands. Data goes to stdout and its errors matter; notes go to stderr and theirs do not.

use std::{
    env,
    io::{self, ErrorKind, IsTerminal, Write},
    time::Duration,
};

use crate::failure::{Failure, exit};

/// Writes and flushes. A reader that went away ends the program quietly.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => Failure::silent(0),
        _ => Failure::new(exit::CANNOT_CREATE, "output", format!("cannot write the output: {error}")).hint("is the disk full?"),
    })
}

pub(crate) fn println(text: &str) -> Result<(), Failure> {
    print(&format!("{text}\n"))
}

pub(crate) fn print_json(value: &serde_json::Value) -> Result<(), Failure> {
    println(&value.to_string())
}

/// A line for the person at the terminal; nobody is told if it cannot be shown.
pub(crate) fn note(text: &str) {
    note_part(&format!("{text}\n"));
}

/// As [`note`], within a line.
pub(crate) fn note_part(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

fn is_dumb() -> bool {
    env::var_os("TERM").is_some_and(|term| term == "dumb")
}

/// How to dress text for one of the two streams.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint {
    on: bool,
}

impl Paint {
    pub(crate) fn stdout() -> Self {
        Self::of(io::stdout().is_terminal())
    }

    pub(crate) fn stderr() -> Self {
        Self::of(io::stderr().is_terminal())
    }

    /// No escapes at all, for text that is compared or piped.
    #[cfg(test)]
    pub(crate) fn plain() -> Self {
        Self { on: false }
    }

    fn of(terminal: bool) -> Self {
        Self { on: terminal && !is_dumb() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.on && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }

    /// What clap has dressed itself.
    pub(crate) fn styled(self, text: &clap::builder::StyledStr) -> String {
        if self.on { text.ansi().to_string() } else { text.to_string() }
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub(crate) fn good(self, text: &str) -> String {
        self.wrap("32", text)
    }

    pub(crate) fn bad(self, text: &str) -> String {
        self.wrap("31", text)
    }
}

/// One line of progress on stderr that overwrites itself and leaves nothing behind. Silent off a terminal.
#[derive(Debug)]
pub(crate) struct StatusLine {
    visible: bool,
    drawn: bool,
    turn: usize,
}

impl StatusLine {
    pub(crate) const PERIOD: Duration = Duration::from_millis(100);

    pub(crate) fn new(quiet: bool) -> Self {
        Self { visible: !quiet && io::stderr().is_terminal() && !is_dumb(), drawn: false, turn: 0 }
    }

    pub(crate) fn is_visible(&self) -> bool {
        self.visible
    }

    pub(crate) fn show(&mut self, text: &str) {
        if self.visible {
            let wheel = ['⠋', '⠙', '⠹', '⠸', '⠼', '⠴', '⠦', '⠧', '⠇', '⠏'];
            self.turn = (self.turn + 1) % wheel.len();
            self.drawn = true;
            note_part(&format!("\r\x1b[K{} {}", wheel[self.turn], Paint::stderr().dim(text)));
        }
    }

    pub(crate) fn clear(&mut self) {
        if std::mem::take(&mut self.drawn) {
            note_part("\r\x1b[K");
        }
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The terminal's second screen, for a display that redraws; leaving it brings back what was there.
#[derive(Debug)]
pub(crate) struct Screen {}

impl Screen {
    pub(crate) fn enter() -> Result<Self, Failure> {
        print("\x1b[?1049h\x1b[?25l\x1b[?7l")?;
        Ok(Self {})
    }

    /// As many lines as fit, from the top; long ones are cut by the terminal, which does not wrap here.
    pub(crate) fn draw(&self, text: &str) -> Result<(), Failure> {
        let height =
            rustix::termios::tcgetwinsize(io::stdout()).ok().map(|size| usize::from(size.ws_row)).filter(|rows| *rows > 1).unwrap_or(24);
        let lines: Vec<String> = text.lines().take(height - 1).map(|line| format!("{line}\x1b[K\r\n")).collect();
        print(&format!("\x1b[H{}\x1b[J", lines.concat()))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = print("\x1b[?7h\x1b[?25h\x1b[?1049l");
    }
}
