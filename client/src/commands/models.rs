//! `flashctl models`: what is installed, how large it is, and whether it would fit this machine.

use std::time::{SystemTime, UNIX_EPOCH};

use flash_proto::v1::{ListRequest, Model, Snapshot, StatsRequest};
use serde_json::json;

use crate::{
    args::Global,
    connect::connect,
    failure::Failure,
    json, render,
    term::{self, Paint},
};

pub(crate) async fn run(global: &Global) -> Result<(), Failure> {
    let daemon = connect(global).await?;
    let list = daemon.models().list(ListRequest {}).await.map_err(|status| daemon.failure(&status, "listing models"))?.into_inner();
    let stats = daemon.admin().stats(StatsRequest {}).await.map_err(|status| daemon.failure(&status, "listing models"))?.into_inner();
    let room = room(&stats, global);
    if global.json {
        let models: Vec<_> = list.models.iter().map(|model| json::model(model, fits(model, room))).collect();
        let default = (!list.default_model.is_empty()).then_some(&list.default_model);
        return term::print_json(&json!({"models": models, "default_model": default}));
    }
    let paint = Paint::stdout();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let (good, bad): (Vec<&Model>, Vec<&Model>) = list.models.iter().partition(|model| model.problem.is_empty());
    let rows: Vec<_> = good.iter().map(|model| row(model, room, now)).collect();
    term::println(&render::table(["NAME", "ARCH", "PARAMS(ACTIVE)", "QUANT", "SIZE", "CTX", "FITS", "MODIFIED"], &rows, paint))?;
    for model in bad {
        term::println(&paint.dim(&format!("{}  cannot be served: {}", model.id, model.problem)))?;
    }
    if list.models.is_empty() {
        term::note("hint: put a checkpoint into $FLASH_HOME/models, or name its path: flashctl run /path/to/checkpoint");
    } else if !global.quiet && !list.default_model.is_empty() {
        term::note(&Paint::stderr().dim(&format!("`local` is {}", list.default_model)));
    }
    Ok(())
}

/// What a model may take: the cap, else half of the machine, which is what the daemon's `auto` gives the experts.
pub(super) fn room(stats: &Snapshot, global: &Global) -> Option<u64> {
    let here = || if global.gateway.is_none() { total_memory() } else { None };
    stats.memory.and_then(|memory| memory.cap_bytes).or_else(|| here().map(|total| total / 2))
}

fn row(model: &Model, room: Option<u64>, now: u64) -> [String; 8] {
    [
        model.id.clone(),
        model.arch.clone(),
        format!("{} ({})", render::count(model.params), render::count(model.active_params)),
        if model.packed { format!("{} · packed", model.quantization) } else { model.quantization.clone() },
        render::bytes(model.disk_bytes),
        model.context_length.to_string(),
        fits(model, room).into(),
        render::ago(model.modified, now),
    ]
}

/// "ram": whole; "stream": all but the experts, and the experts of one token; "no": not even that.
pub(super) fn fits(model: &Model, room: Option<u64>) -> &'static str {
    let working_set = u64::from(model.top_k) * u64::from(model.layers) * model.expert_bytes;
    match room {
        _ if !model.problem.is_empty() => "no",
        None => "?",
        Some(room) if model.size_bytes <= room => "ram",
        Some(room) if model.trunk_bytes.saturating_add(working_set) <= room => "stream",
        Some(_) => "no",
    }
}

#[cfg(target_os = "linux")]
fn total_memory() -> Option<u64> {
    let info = rustix::system::sysinfo();
    // The field is `unsigned long`, which is 32 bits wide on some machines.
    #[allow(clippy::useless_conversion, reason = "needed where the field is 32 bits wide")]
    Some(u64::from(info.totalram) * u64::from(info.mem_unit))
}

#[cfg(not(target_os = "linux"))]
fn total_memory() -> Option<u64> {
    let output = std::process::Command::new("/usr/sbin/sysctl").args(["-n", "hw.memsize"]).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_fits_whole_streamed_or_not() {
        // 10 of trunk, 90 of experts, a working set of 2 × 3 × 5 = 30.
        let model = Model { size_bytes: 100, trunk_bytes: 10, expert_bytes: 5, top_k: 2, layers: 3, ..Model::default() };
        let check = |room, expected| assert_eq!(fits(&model, room), expected, "{room:?}");
        check(Some(100), "ram");
        check(Some(99), "stream");
        check(Some(40), "stream");
        check(Some(39), "no");
        check(None, "?");
        assert_eq!(fits(&Model { problem: "truncated".into(), ..model }, Some(100)), "no");
        assert!(total_memory().is_some_and(|bytes| bytes > 1 << 20));
    }
}
