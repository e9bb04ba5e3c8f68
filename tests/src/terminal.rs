//! A program at a terminal of its own: what is typed, what is seen. Its session has the terminal as its own, so Ctrl-C is a signal where the
//! program leaves it to the terminal. Used by the tests of chats.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::process::CommandExt,
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use anyhow::{Context, Result};
use rustix::{
    fs::{Mode, OFlags},
    process::{Signal, kill_process_group},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcgetpgrp, tcsetwinsize},
};

use crate::daemon::{Process, wait_until};

pub const CTRL_C: &str = "\u{3}";
pub const CTRL_D: &str = "\u{4}";

/// A command with a terminal, and everything it wrote there.
#[derive(Debug)]
pub struct Terminal {
    pub process: Process,
    keyboard: File,
    screen: Arc<Mutex<String>>,
    /// Up to here the screen has been looked at.
    seen: usize,
}

impl Terminal {
    pub fn start(command: &Command) -> Result<Self> {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&controller)?;
        unlockpt(&controller)?;
        let name = ptsname(&controller, Vec::new())?;
        let size = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&controller, size)?;
        let terminal = File::from(rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?);
        // Taking a terminal takes a call between fork and exec, which this program makes for us.
        let mut session = Command::new("setsid");
        session.args(["--ctty", "--wait"]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => session.env(name, value),
                None => session.env_remove(name),
            };
        }
        session.env("TERM", "xterm").process_group(0);
        session.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
        let child = session.spawn()?;
        // Its handles on the terminal go with it, so that the end of the child is the end of the screen.
        drop(session);
        let keyboard = File::from(controller);
        let screen = Arc::new(Mutex::new(String::new()));
        let (mut reader, shared) = (keyboard.try_clone()?, Arc::clone(&screen));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // An error is the end: the last handle of the other side is closed.
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                shared.lock().expect("no panic").push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Ok(Self { process: Process::adopt(child, "".into()), keyboard, screen, seen: 0 })
    }

    pub fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.keyboard.write_all(keys.as_bytes())?)
    }

    /// Waits for `text` after what was waited for last.
    pub fn expect(&mut self, text: &str) -> Result<()> {
        let (screen, seen) = (Arc::clone(&self.screen), self.seen);
        let found = move || screen.lock().expect("no panic")[seen..].find(text).map(|at| seen + at + text.len());
        wait_until(text, || found().is_some()).with_context(|| self.screen())?;
        self.seen = found().context("still there")?;
        Ok(())
    }

    /// All that was written.
    pub fn screen(&self) -> String {
        self.screen.lock().expect("no panic").clone()
    }

    /// To what runs at the terminal; its exit code, if it ended with one.
    pub fn end_by(&mut self, signal: Signal) -> Result<Option<i32>> {
        kill_process_group(tcgetpgrp(&self.keyboard)?, signal)?;
        self.process.code()
    }

    /// It hands over whole lines, as a shell expects.
    pub fn is_cooked(&self) -> Result<bool> {
        Ok(tcgetattr(&self.keyboard)?.local_modes.contains(LocalModes::ICANON | LocalModes::ECHO))
    }
}
