//! Serves [`flash_tests::scripted`]'s model for clients that are run by hand or by `.ci/run`: `scripted FOLDER` writes it below that folder,
//! says where it listens, and ends at SIGINT or SIGTERM. Not part of what is installed.

use std::path::PathBuf;

use anyhow::{Context, Result};
use flash_tests::scripted::serve;
use flashd::Signals;

#[tokio::main]
async fn main() -> Result<()> {
    let home = std::env::args_os().nth(1).map(PathBuf::from).context("usage: scripted FOLDER")?;
    std::fs::create_dir_all(&home)?;
    let home = home.canonicalize()?;
    let mut signals = Signals::new()?;
    let stop = async {
        signals.next().await;
    };
    serve(&home, |socket| println!("listening on {}", socket.display()), stop).await
}
