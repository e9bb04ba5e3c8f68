//! `flashctl stats`: the daemon's figures, once or again and again.

use std::io::{self, IsTerminal};

use flash_proto::v1::{StatsRequest, WatchStatsRequest};

use crate::{
    args::{Global, StatsArgs},
    connect::connect,
    failure::{Failure, exit},
    json, render,
    term::{self, Paint, Screen},
};

pub(crate) async fn run(args: StatsArgs, global: &Global) -> Result<(), Failure> {
    let interval_ms = args.watch.map(interval_ms).transpose()?;
    let daemon = connect(global).await?;
    let failed = |status| daemon.failure(&status, "being watched");
    let paint = Paint::stdout();
    let Some(interval_ms) = interval_ms else {
        let snapshot = daemon.admin().stats(StatsRequest {}).await.map_err(failed)?.into_inner();
        return match global.json {
            true => term::print_json(&json::snapshot(&snapshot)),
            false => term::println(&render::snapshot(&snapshot, paint)),
        };
    };
    let screen = if io::stdout().is_terminal() && !global.json { Some(Screen::enter()?) } else { None };
    let mut stream = daemon.admin().watch_stats(WatchStatsRequest { interval_ms }).await.map_err(failed)?.into_inner();
    while let Some(snapshot) = stream.message().await.map_err(failed)? {
        match &screen {
            Some(screen) => {
                let hint = paint.dim(&format!("every {} · Ctrl-C ends", render::milliseconds(f64::from(interval_ms))));
                screen.draw(&format!("{}\n\n{hint}", render::snapshot(&snapshot, paint)))?;
            }
            None => term::print_json(&json::snapshot(&snapshot))?,
        }
    }
    Err(daemon.went_away("being watched"))
}

fn interval_ms(seconds: f64) -> Result<u32, Failure> {
    match (0.1..=86400.0).contains(&seconds) {
        true => Ok((seconds * 1000.0) as u32),
        false => Err(Failure::new(exit::USAGE, "usage", format!("--watch takes 0.1 to 86400 seconds, not {seconds}"))),
    }
}
