//! Conversations on disk: a JSON file each in `$FLASH_HOME/sessions`, written whole whenever something was said, so that a chat goes on where a
//! crash left it. Knows nothing of models; chat.rs says when.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use flash_proto::socket;
use serde::{Deserialize, Serialize};

use super::conversation::Conversation;
use crate::{
    args::{Generation, Thinking},
    failure::{Failure, exit},
    files,
};

/// Far more than any context holds.
const BYTES_MAX: u64 = 16 << 20;
/// How many conversations without a name are kept; those used least recently go.
const UNNAMED_MAX: usize = 100;
/// What they are called, with a number.
const UNNAMED: &str = "chat";

/// All that a chat needs to go on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    flash_session: u32,
    pub(super) model: String,
    #[serde(default)]
    pub(super) generation: Generation,
    #[serde(default)]
    pub(super) thinking: Thinking,
    #[serde(flatten)]
    pub(super) talk: Conversation,
}

impl Saved {
    pub(super) fn new(model: &str, generation: &Generation, thinking: &Thinking, talk: &Conversation) -> Self {
        let (generation, thinking, talk) = (generation.clone(), thinking.clone(), talk.clone());
        Self { flash_session: 1, model: model.into(), generation, thinking, talk }
    }
}

/// Where sessions are.
#[derive(Clone, Debug)]
pub(super) struct Folder(PathBuf);

/// One conversation's place.
#[derive(Debug)]
pub(super) struct Session {
    folder: Folder,
    /// Absent until there is something to keep.
    name: Option<String>,
    /// The file as this chat read or wrote it last: another means that another chat did.
    stamp: Option<Stamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    modified: (i64, i64),
    length: u64,
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        Some(Self { inode: meta.ino(), modified: (meta.mtime(), meta.mtime_nsec()), length: meta.len() })
    }
}

impl Folder {
    pub(super) fn open() -> Result<Self, Failure> {
        let home = socket::home().map_err(|error| Failure::new(exit::CONFIG, "config", error.to_string()))?;
        Ok(Self(home.join("sessions")))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.json"))
    }

    /// Every session, the one used last first.
    pub(super) fn names(&self) -> Vec<(String, SystemTime)> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?.strip_suffix(".json")?.to_owned();
                let meta = entry.metadata().ok()?;
                // An empty one has just been claimed, and is about to be written.
                (!name.starts_with('.') && meta.len() > 0).then_some((name, meta.modified().ok()?))
            })
            .collect();
        // Files written within one tick of the clock: the higher number is the later one.
        names.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| (b.0.len(), &b.0).cmp(&(a.0.len(), &a.0))));
        names
    }

    /// A place for a conversation that nobody has named.
    pub(super) fn unnamed(&self) -> Session {
        Session { folder: self.clone(), name: None, stamp: None }
    }

    /// The session of that name, with what it holds if there is one already.
    pub(super) fn named(&self, name: &str) -> Result<(Session, Option<Saved>), Failure> {
        valid(name)?;
        let path = self.path(name);
        // Before it is read: what is written in between is another chat's.
        let stamp = Stamp::of(&path);
        let saved = if stamp.is_some() { Some(read(&path)?) } else { None };
        Ok((Session { folder: self.clone(), name: Some(name.into()), stamp }, saved))
    }

    /// The session used last.
    pub(super) fn latest(&self) -> Result<(Session, Saved), Failure> {
        if let Some((name, _)) = self.names().first()
            && let (session, Some(saved)) = self.named(name)?
        {
            return Ok((session, saved));
        }
        let message = format!("there is no conversation to continue in {}", self.0.display());
        Err(Failure::new(exit::NO_INPUT, "no_session", message).hint("`flashctl chat` begins one"))
    }

    /// A file of a new name, which nobody else gets: `base-2`, or the number after the highest one.
    fn claim(&self, base: &str) -> Result<String, Failure> {
        let cannot = |path: &Path, error: std::io::Error| {
            Failure::new(exit::CANNOT_CREATE, "file", format!("cannot create {}: {error}", path.display()))
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(|error| cannot(&self.0, error))?;
        let number = |name: &str| name.strip_prefix(base)?.strip_prefix('-')?.parse::<u32>().ok();
        let first = if base == UNNAMED { 1 } else { 2 };
        let mut next = self.names().iter().filter_map(|(name, _)| number(name)).max().map_or(first, |highest| highest.saturating_add(1));
        loop {
            let name = format!("{base}-{next}");
            let path = self.path(&name);
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(_) => return Ok(name),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => next = next.saturating_add(1),
                Err(error) => return Err(cannot(&path, error)),
            }
        }
    }

    fn prune(&self) {
        let old = self.names().into_iter().filter(|(name, _)| is_unnamed(name)).skip(UNNAMED_MAX);
        for (name, _) in old {
            let _ = fs::remove_file(self.path(&name));
        }
    }
}

impl Session {
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Unless nobody named it.
    pub(super) fn given_name(&self) -> Option<&str> {
        self.name().filter(|name| !is_unnamed(name))
    }

    /// Writes the conversation. If another chat has gone on with it meanwhile this one takes a new name.
    pub(super) fn write(&mut self, saved: &Saved) -> Result<(), Failure> {
        let text = serde_json::to_vec(saved).map_err(|error| Failure::new(exit::INTERNAL, "session", error.to_string()))?;
        if text.len() as u64 > BYTES_MAX {
            let message = format!("the conversation is larger than {} MiB", BYTES_MAX >> 20);
            return Err(Failure::new(exit::BAD_DATA, "too_large", message));
        }
        let taken = |name: &String| {
            let now = Stamp::of(&self.folder.path(name));
            now.is_some() && now != self.stamp
        };
        let (name, is_new) = match self.name.clone() {
            Some(name) if !taken(&name) => (name, false),
            other => (self.folder.claim(other.as_deref().filter(|name| !is_unnamed(name)).unwrap_or(UNNAMED))?, true),
        };
        let path = self.folder.path(&name);
        let written = files::write_private(&path, &text);
        if is_new {
            if written.is_err() {
                // Empty, it is no conversation and would keep its name from others.
                let _ = fs::remove_file(&path);
            }
            self.folder.prune();
        }
        written?;
        (self.name, self.stamp) = (Some(name), Stamp::of(&path));
        Ok(())
    }

    /// Goes on under another name; what had none is renamed, what had one stays as it is.
    pub(super) fn rename(&mut self, name: &str, saved: &Saved) -> Result<(), Failure> {
        let (mut renamed, existing) = self.folder.named(name)?;
        if existing.is_some() {
            let message = format!("there is a conversation {name} already");
            return Err(Failure::new(exit::BAD_DATA, "session", message).hint("choose another name, or /load it"));
        }
        renamed.write(saved)?;
        if let Some(old) = self.name.as_deref().filter(|old| is_unnamed(old)) {
            let _ = fs::remove_file(self.folder.path(old));
        }
        *self = renamed;
        Ok(())
    }
}

fn is_unnamed(name: &str) -> bool {
    name.strip_prefix(UNNAMED).and_then(|rest| rest.strip_prefix('-')).is_some_and(|number| number.parse::<u32>().is_ok())
}

fn valid(name: &str) -> Result<(), Failure> {
    let good = (1..=64).contains(&name.len()) && !name.starts_with(['.', '-']);
    if good && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        return Ok(());
    }
    Err(Failure::new(exit::BAD_DATA, "session", format!("`{name}` is no name for a conversation: letters, digits, -, _ and ., at most 64")))
}

fn read(path: &Path) -> Result<Saved, Failure> {
    let bad = |why: String| {
        Failure::new(exit::BAD_DATA, "session", format!("{} is no conversation of flashctl's: {why}", path.display()))
            .hint("delete it, or move it away")
    };
    let length = fs::metadata(path).map_or(0, |meta| meta.len());
    if length > BYTES_MAX {
        return Err(bad(format!("it is larger than {} MiB", BYTES_MAX >> 20)));
    }
    let text = fs::read(path).map_err(|error| bad(error.to_string()))?;
    let saved: Saved = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    if saved.flash_session != 1 {
        return Err(bad(format!("version {} is of another flashctl", saved.flash_session)));
    }
    Ok(saved)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::{super::conversation::Turn, *};

    fn saved(text: &str) -> Saved {
        let turns = vec![Turn { user: text.into(), assistant: "a\n\"b\"".into() }];
        let talk = Conversation { system: Some("s".into()), turns, unsent: Some("u".into()) };
        Saved::new("m", &Generation { temperature: Some(0.5), ..Generation::default() }, &Thinking::default(), &talk)
    }

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let folder = Folder(dir.path().join("sessions"));
        (dir, folder)
    }

    fn said(folder: &Folder, name: &str) -> String {
        folder.named(name).expect("a session").1.expect("it exists").talk.turns[0].user.clone()
    }

    #[test]
    fn what_is_kept_comes_back() {
        let (_dir, folder) = folder();
        assert_eq!(folder.latest().expect_err("nothing yet").exit, 66);
        let mut session = folder.unnamed();
        session.write(&saved("one")).expect("written");
        session.write(&saved("two")).expect("written again");
        assert_eq!(session.name(), Some("chat-1"));
        let (_, again) = folder.latest().expect("there is one");
        assert_eq!((again.model.as_str(), again.talk.turns.len(), again.talk.unsent.as_deref()), ("m", 1, Some("u")));
        assert_eq!((again.generation.temperature, again.talk.turns[0].user.as_str()), (Some(0.5), "two"));
        let mode = fs::metadata(folder.path("chat-1")).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_cannot_be_written_takes_no_name() {
        let (_dir, folder) = folder();
        // Where the draft would be.
        fs::create_dir_all(folder.0.join(format!(".chat-1.json.{}", std::process::id()))).expect("a folder in the way");
        assert_eq!(folder.unnamed().write(&saved("one")).expect_err("no draft").code, "file");
        assert!(folder.named("chat-1").expect("a free name").1.is_none());
    }

    #[test]
    fn two_chats_never_overwrite_each_other() {
        let (_dir, folder) = folder();
        let (mut one, mut two) = (folder.named("a").expect("new").0, folder.named("a").expect("new").0);
        one.write(&saved("one")).expect("written");
        two.write(&saved("two")).expect("written");
        assert_eq!((one.name(), two.name()), (Some("a"), Some("a-2")));
        one.write(&saved("one more")).expect("written");
        assert_eq!((said(&folder, "a"), said(&folder, "a-2")), ("one more".into(), "two".into()));
        fs::remove_file(folder.path("a")).expect("deleted");
        one.write(&saved("still here")).expect("written");
        assert_eq!((one.name(), said(&folder, "a")), (Some("a"), "still here".into()));
    }

    #[test]
    fn a_name_may_come_later() {
        let (_dir, folder) = folder();
        let mut session = folder.unnamed();
        session.write(&saved("one")).expect("written");
        session.rename("pip", &saved("one")).expect("a free name");
        assert!(session.rename("pip", &saved("x")).is_err(), "it is there");
        session.rename("pip.v2", &saved("two")).expect("a free name");
        let names: Vec<_> = folder.names().into_iter().map(|(name, _)| name).collect();
        assert_eq!((names.len(), said(&folder, "pip"), said(&folder, "pip.v2")), (2, "one".into(), "two".into()));
        for bad in ["", ".", "a/b", "../x", "-c", "a b", &"x".repeat(65)] {
            assert_eq!(folder.named(bad).expect_err("no name").exit, 64, "{bad}");
        }
    }

    #[test]
    fn the_oldest_unnamed_ones_go() {
        let (_dir, folder) = folder();
        folder.named("mine").expect("new").0.write(&saved("x")).expect("written");
        for number in 0..UNNAMED_MAX + 3 {
            folder.unnamed().write(&saved(&number.to_string())).expect("written");
        }
        let names: Vec<_> = folder.names().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), UNNAMED_MAX + 1);
        assert!(
            names.contains(&"mine".into()) && names.contains(&format!("chat-{}", UNNAMED_MAX + 3)) && !names.contains(&"chat-1".into())
        );
    }

    #[test]
    fn a_bad_file_is_named() {
        let (_dir, folder) = folder();
        fs::create_dir_all(&folder.0).expect("a folder");
        for (text, why) in [("{", "EOF"), ("{\"flash_session\":2,\"model\":\"m\",\"turns\":[]}", "version 2"), ("", "EOF")] {
            fs::write(folder.path("bad"), text).expect("written");
            let failure = folder.named("bad").expect_err("bad");
            assert!(failure.message.contains("bad.json") && failure.message.contains(why), "{failure:?}");
        }
    }
}
