//! A chat and its place on disk: opened, written after every change, named, left for another.

use std::{
    io::{self, IsTerminal},
    time::SystemTime,
};

use tokio::signal::unix::Signal;

use super::{
    Chat,
    saved::{Folder, Saved, Session},
    turns_text,
};
use crate::{args::ChatArgs, failure::Failure, render, term};

/// Where this chat is kept, and what it goes on with. A person's chats are kept unless they say otherwise; a script's only where it names them.
pub(super) fn open(args: &ChatArgs) -> Result<(Option<Session>, Option<Saved>), Failure> {
    match &args.session {
        Some(name) => Folder::open()?.named(name).map(|(session, saved)| (Some(session), saved)),
        None if args.resume => Folder::open()?.latest().map(|(session, saved)| (Some(session), Some(saved))),
        None if io::stdin().is_terminal() && !args.no_history => Ok((Some(Folder::open()?.unnamed()), None)),
        None => Ok((None, None)),
    }
}

pub(super) fn list() -> Result<(), Failure> {
    let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs());
    let now = seconds(SystemTime::now());
    let names = Folder::open()?.names();
    if names.is_empty() {
        return term::println("no conversation is kept");
    }
    let rows: Vec<_> = names.into_iter().map(|(name, time)| [name, render::ago(seconds(time), now)]).collect();
    term::println(&render::table(["NAME", "LAST USED"], &rows, term::Paint::stdout()))
}

impl Chat<'_> {
    /// What the command line said already stands.
    pub(super) fn take_over(&mut self, saved: Saved) {
        self.generation = std::mem::take(&mut self.generation).or(saved.generation);
        if self.thinking.think.is_none() && !self.thinking.no_think {
            (self.thinking.think, self.thinking.no_think) = (saved.thinking.think, saved.thinking.no_think);
        }
        let system = self.talk.system.take().or(saved.talk.system.clone());
        self.talk = saved.talk;
        self.talk.system = system;
    }

    /// One line: which conversation, how long, what was said last.
    pub(super) fn where_it_stands(&self) -> String {
        let name = self.session.as_ref().and_then(Session::name).unwrap_or("this conversation");
        let turns = turns_text(self.talk.turns.len());
        let unsent = self.talk.unsent.as_deref();
        let last = unsent.or_else(|| self.talk.turns.last().map(|turn| turn.user.as_str()));
        let last = last.and_then(|text| text.lines().next()).map(|line| line.chars().take(60).collect::<String>());
        let last = last.map(|line| format!(", the last: {line}")).unwrap_or_default();
        let hint = if unsent.is_some() { " (not answered; /retry sends it)" } else { "" };
        format!("{name}: {turns}{last}{hint}")
    }

    /// The conversation is forgotten here; one that was given a name stays as it is, and what is said next is another one.
    /// Says so, to be added to what is told.
    pub(super) fn part(&mut self) -> String {
        let Some(name) = self.session.as_ref().and_then(Session::given_name).map(str::to_owned) else { return String::new() };
        self.session = Folder::open().ok().map(|folder| folder.unnamed());
        format!("; {name} stays as it was")
    }

    /// Writes the conversation where it is kept. A disk that is full costs the memory of a chat, not the chat.
    pub(super) fn keep(&mut self) {
        let saved = Saved::new(&self.model, &self.generation, &self.thinking, &self.talk);
        let Some(session) = &mut self.session else { return };
        if session.name().is_none() && self.talk.is_empty() {
            return;
        }
        let before = session.name().map(str::to_owned);
        match session.write(&saved) {
            Ok(()) => {
                let now = session.name().map(str::to_owned);
                if before.is_some() && before != now {
                    let (before, now) = (before.unwrap_or_default(), now.unwrap_or_default());
                    term::note(&term::Paint::stderr().dim(&format!("another chat has gone on with {before}; this one is {now} now")));
                }
            }
            Err(failure) => {
                self.session = None;
                term::note(&format!("warning: {}; from now on this conversation is not kept", failure.message));
            }
        }
    }

    pub(super) fn save(&mut self, name: Option<&str>) -> Result<(), Failure> {
        if self.session.is_none() {
            self.session = Some(Folder::open()?.unnamed());
        }
        let saved = Saved::new(&self.model, &self.generation, &self.thinking, &self.talk);
        let Some(session) = &mut self.session else { return Ok(()) };
        match name {
            Some(name) if session.name() != Some(name) => session.rename(name, &saved)?,
            _ => session.write(&saved)?,
        }
        let name = session.name().unwrap_or_default().to_owned();
        self.tell(&format!("kept as {name}; `flashctl chat --session {name}` goes on with it"))
    }

    /// Goes on with another conversation; this one stays where it is kept.
    pub(super) async fn load(&mut self, name: &str, interrupt: &mut Signal) -> Result<(), Failure> {
        let (session, saved) = Folder::open()?.named(name)?;
        let Some(saved) = saved else { return self.tell(&format!("there is no conversation {name}; /load alone lists them")) };
        if saved.model != self.model {
            self.reload(saved.model.clone(), self.settings.clone(), interrupt).await?;
            if self.model != saved.model {
                return Ok(());
            }
        }
        (self.generation, self.thinking.think, self.thinking.no_think) = (saved.generation, saved.thinking.think, saved.thinking.no_think);
        (self.talk, self.session, self.last) = (saved.talk, Some(session), None);
        self.files.clear();
        self.tell(&self.where_it_stands())
    }
}
