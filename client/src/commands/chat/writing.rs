//! How a message comes to be and what its answer must be like: /edit, /file, /think, /format, /copy.

use std::{ffi::OsString, path::Path};

use flash_proto::socket;
use tokio::signal::unix::Signal;

use super::{Chat, clipboard, lines};
use crate::{
    commands::run,
    failure::{Failure, exit},
    files, render,
    term::{self, Paint},
};

impl Chat<'_> {
    /// The last message in an editor; what comes back is sent instead of it. Nothing changes if it comes back as it was, or empty.
    pub(super) async fn edit_last(&mut self, interrupt: &mut Signal) -> Result<(), Failure> {
        let last = self.talk.unsent.clone().or_else(|| self.talk.turns.last().map(|turn| turn.user.clone()));
        let text = edited(last.as_deref().unwrap_or_default()).await?;
        // Ctrl-C within the editor was meant for it.
        while was_interrupted(interrupt) {}
        if text.trim().is_empty() || last.as_deref().is_some_and(|last| last.trim_end() == text.trim_end()) {
            return self.tell("nothing was changed");
        }
        self.talk.undo();
        term::note(&Paint::stderr().dim(text.trim_end()));
        self.say(text.trim_end().to_owned(), interrupt).await
    }

    pub(super) fn attach(&mut self, path: &str) -> Result<(), Failure> {
        let text = run::read_file(&lines::expanded(path))?;
        let size = render::bytes(text.len() as u64);
        self.files.push(text);
        self.tell(&format!("{path} ({size}) goes with the next message"))
    }

    pub(super) fn think(&mut self, how: Option<&str>) -> Result<(), Failure> {
        let thinking = &mut self.thinking;
        match how {
            Some("on") => (thinking.think, thinking.no_think) = (Some(String::new()), false),
            Some("off") => (thinking.think, thinking.no_think) = (None, true),
            Some("show") => thinking.hide_thinking = false,
            Some("hide") => thinking.hide_thinking = true,
            Some(effort) => (thinking.think, thinking.no_think) = (Some(effort.into()), false),
            None => {}
        }
        let what = match (&thinking.think, thinking.no_think) {
            (_, true) => "off",
            (Some(effort), _) if effort.is_empty() => "on",
            (Some(effort), _) => effort,
            (None, _) => "as the model has it",
        };
        let shown = if thinking.hide_thinking { ", not shown" } else { "" };
        let text = format!("thinking: {what}{shown}");
        self.keep();
        self.tell(&text)
    }

    pub(super) fn hold(&mut self, what: Option<&str>) -> Result<(), Failure> {
        match what {
            Some("off") => self.format = None,
            Some("json") => self.format = Some(run::format(Path::new("json"))?),
            Some(path) => self.format = Some(run::format(&lines::expanded(path))?),
            None => {}
        }
        self.tell(match &self.format {
            None => "answers may be anything",
            Some(format) if matches!(format.kind, Some(flash_proto::v1::format::Kind::JsonObject(_))) => "answers are JSON objects",
            Some(_) => "answers keep to the schema",
        })
    }

    pub(super) async fn copy(&self) -> Result<(), Failure> {
        match self.talk.turns.last() {
            Some(turn) => self.tell(clipboard::copy(&turn.assistant).await?),
            None => self.tell("there is no answer to copy"),
        }
    }
}

/// True if an interrupt was waiting.
fn was_interrupted(interrupt: &mut Signal) -> bool {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    matches!(interrupt.poll_recv(&mut context), std::task::Poll::Ready(Some(())))
}

/// `text` after the user's editor has had it.
async fn edited(text: &str) -> Result<String, Failure> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR")).unwrap_or_else(|| OsString::from("vi"));
    let home = socket::home().map_err(|error| Failure::new(exit::CONFIG, "config", error.to_string()))?;
    let path = std::path::absolute(home.join(format!("message-{}.md", std::process::id()))).unwrap_or_default();
    files::write_private(&path, text.as_bytes())?;
    // The variable is a command line, as git reads it.
    let mut command = tokio::process::Command::new("sh");
    let mut line = editor.clone();
    line.push(" \"$0\"");
    command.arg("-c").arg(line).arg(&path);
    let status = command.status().await;
    let text = run::read_file(&path);
    let _ = std::fs::remove_file(&path);
    let failed = |how: String| {
        let message = format!("the editor `{}` {how}", editor.to_string_lossy());
        Failure::new(exit::GENERIC, "editor", message).hint("VISUAL or EDITOR names another one")
    };
    match status {
        Ok(status) if status.success() => text,
        Ok(status) => Err(failed(format!("ended with {status}"))),
        Err(error) => Err(failed(format!("did not start: {error}"))),
    }
}
