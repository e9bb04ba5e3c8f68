//! A long job of the daemon, followed to its end: progress as a bar at a terminal, as a line for every tenth elsewhere, as
//! objects with --json. Dropping it cancels the job. Used by `convert`, `verify`, `bench` and `bench synth`.

use std::time::Instant;

use flash_proto::v1::{JobDone, JobEvent, JobProgress, job_event::Event};
use serde_json::json;
use tonic::{Response, Status, Streaming};

use crate::{
    args::Global,
    connect::Daemon,
    failure::Failure,
    render,
    term::{self, StatusLine},
};

const BAR: usize = 24;

/// Reads the stream up to its Done; `doing` completes "the daemon went away while it was …".
pub(crate) async fn follow(
    daemon: &Daemon,
    stream: Result<Response<Streaming<JobEvent>>, Status>,
    doing: &str,
    global: &Global,
) -> Result<JobDone, Failure> {
    let failed = |status| daemon.failure(&status, doing);
    let mut stream = stream.map_err(failed)?.into_inner();
    let mut meter = Meter::new(global);
    loop {
        match stream.message().await.map_err(failed)?.map(|event| event.event) {
            Some(Some(Event::Progress(progress))) => meter.show(&progress)?,
            Some(Some(Event::Done(done))) => return Ok(done),
            // An event of a newer daemon.
            Some(None) => {}
            None => return Err(daemon.went_away(doing)),
        }
    }
}

/// Shows how far a job is.
pub(crate) struct Meter {
    line: StatusLine,
    json: bool,
    quiet: bool,
    stage: String,
    since: Instant,
    /// Of the stage, in tenths: what was printed last.
    tenth: Option<u64>,
}

impl Meter {
    pub(crate) fn new(global: &Global) -> Self {
        let quiet = global.quiet;
        Self {
            line: StatusLine::new(quiet || global.json),
            json: global.json,
            quiet,
            stage: String::new(),
            since: Instant::now(),
            tenth: None,
        }
    }

    pub(crate) fn show(&mut self, progress: &JobProgress) -> Result<(), Failure> {
        if self.stage != progress.stage {
            self.stage.clone_from(&progress.stage);
            (self.since, self.tenth) = (Instant::now(), None);
        }
        if self.json && !self.quiet {
            return term::print_json(
                &json!({"event": "progress", "stage": progress.stage, "done": progress.done, "total": progress.total}),
            );
        }
        let elapsed_s = self.since.elapsed().as_secs_f64();
        if self.line.is_visible() {
            self.line.show(&bar(progress, elapsed_s));
        } else if !self.quiet {
            let tenth = (progress.done * 10).checked_div(progress.total).unwrap_or(0);
            if self.tenth.replace(tenth) != Some(tenth) {
                term::note(&plain(progress));
            }
        }
        Ok(())
    }

    /// Takes the bar away, so that something else can be printed.
    pub(crate) fn clear(&mut self) {
        self.line.clear();
    }
}

fn share(progress: &JobProgress) -> f64 {
    if progress.total == 0 { 0.0 } else { (progress.done as f64 / progress.total as f64).min(1.0) }
}

fn plain(progress: &JobProgress) -> String {
    match progress.total {
        0 => progress.stage.clone(),
        total => format!("{} {:.0}% of {}", progress.stage, share(progress) * 100.0, render::bytes(total)),
    }
}

fn bar(progress: &JobProgress, elapsed_s: f64) -> String {
    if progress.total == 0 {
        return progress.stage.clone();
    }
    let share = share(progress);
    let full = (share * BAR as f64) as usize;
    let bar = format!("{}{}", "█".repeat(full), "░".repeat(BAR - full));
    let mut text = format!("{} {bar} {:3.0}% of {}", progress.stage, share * 100.0, render::bytes(progress.total));
    // The first moments say nothing about the rest.
    if elapsed_s > 1.0 && progress.done > 0 {
        let rate = progress.done as f64 / elapsed_s;
        let left = progress.total.saturating_sub(progress.done) as f64 / rate;
        text += &format!(" · {}/s · {} left", render::bytes(rate as u64), render::seconds(left));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_drawn_and_told() {
        let at = |done, total| JobProgress { stage: "packing".into(), done, total };
        let check = |progress: JobProgress, seconds, drawn: &str, told: &str| {
            assert_eq!((bar(&progress, seconds).as_str(), plain(&progress).as_str()), (drawn, told));
        };
        check(at(0, 0), 9.0, "packing", "packing");
        check(at(0, 4000), 9.0, "packing ░░░░░░░░░░░░░░░░░░░░░░░░   0% of 4.0 kB", "packing 0% of 4.0 kB");
        check(at(1000, 4000), 0.5, "packing ██████░░░░░░░░░░░░░░░░░░  25% of 4.0 kB", "packing 25% of 4.0 kB");
        check(at(1000, 4000), 2.0, "packing ██████░░░░░░░░░░░░░░░░░░  25% of 4.0 kB · 500 B/s · 6.0 s left", "packing 25% of 4.0 kB");
        check(at(5000, 4000), 0.0, "packing ████████████████████████ 100% of 4.0 kB", "packing 100% of 4.0 kB");
    }
}
