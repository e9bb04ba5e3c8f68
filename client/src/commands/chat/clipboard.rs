//! The clipboard: through the desktop's own program where there is one, else through the terminal (OSC 52), which reaches it over ssh, too.

use std::{
    env,
    io::{self, IsTerminal},
    process::Stdio,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use tokio::io::AsyncWriteExt;

use crate::{
    connect,
    failure::{Failure, exit},
    term,
};

/// Terminals ignore more.
const TERMINAL_BYTES: usize = 74_994;

/// Says what was done.
pub(super) async fn copy(text: &str) -> Result<&'static str, Failure> {
    let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    let programs: [(&str, &[&str], bool); 4] = [
        ("pbcopy", &[], cfg!(target_os = "macos")),
        ("wl-copy", &[], set("WAYLAND_DISPLAY")),
        ("xclip", &["-selection", "clipboard"], set("DISPLAY")),
        ("xsel", &["--clipboard", "--input"], set("DISPLAY")),
    ];
    for (program, args, _) in programs.iter().filter(|(_, _, usable)| *usable) {
        if let Some(path) = connect::on_path(program)
            && pipe(&path, args, text).await.is_ok()
        {
            return Ok("the answer is on the clipboard");
        }
    }
    if !io::stdout().is_terminal() || text.len() > TERMINAL_BYTES {
        let failure = Failure::new(exit::UNAVAILABLE, "clipboard", "there is no clipboard that this answer could be put on");
        return Err(failure.hint("wl-copy, xclip or pbcopy reach one, and so do most terminals for short texts"));
    }
    term::print(&format!("\x1b]52;c;{}\x07", STANDARD.encode(text)))?;
    Ok("the answer was handed to the terminal, for its clipboard")
}

async fn pipe(program: &std::path::Path, args: &[&str], text: &str) -> io::Result<()> {
    let mut command = tokio::process::Command::new(program);
    let mut child = command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).await?;
    }
    if child.wait().await?.success() { Ok(()) } else { Err(io::Error::other("it failed")) }
}
