//! `flashctl completions`: the shell's side of Tab, generated from the arguments.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::{args::Cli, failure::Failure, term};

pub(crate) fn run(shell: Shell) -> Result<(), Failure> {
    // clap_complete panics when it cannot write; a String always can be.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "flashctl", &mut script);
    term::print(&String::from_utf8_lossy(&script))
}
