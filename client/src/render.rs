//! Numbers, tables and figures for people: pure, from plain values and protobuf messages to text. Knows no terminal beyond
//! [`Paint`]; the machine-readable twin is json.rs.

use std::fmt::Write;

use flash_proto::v1::{Belady, Cache, Experts, LoadResponse, Memory, Prefix, Pressure, Snapshot, loaded_model, pressure};

use crate::{reply::Reply, term::Paint};

/// "5.3 MB": three digits or so, powers of 1000 as disks and models are sold.
pub(crate) fn bytes(count: u64) -> String {
    scaled(count as f64, 1000.0, &[" B", " kB", " MB", " GB", " TB", " PB"])
}

/// "24.5M", "30.5B".
pub(crate) fn count(count: u64) -> String {
    scaled(count as f64, 1000.0, &["", "k", "M", "B", "T"])
}

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // 999.95 would print as 1000.0.
    while value >= step * 0.999_5 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    match unit {
        0 => format!("{value:.0}{}", units[0]),
        _ => format!("{value:.1}{}", units[unit]),
    }
}

/// Of a share in 0..=1: "25%", "87.3%".
pub(crate) fn percent(share: f64) -> String {
    let text = format!("{:.1}", share * 100.0);
    format!("{}%", text.strip_suffix(".0").unwrap_or(&text))
}

/// `None` when nothing has happened yet.
pub(crate) fn ratio(part: u64, rest: u64) -> Option<f64> {
    let whole = part + rest;
    (whole > 0).then(|| part as f64 / whole as f64)
}

pub(crate) fn milliseconds(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.0} ms") } else { seconds(ms / 1000.0) }
}

/// "0.8 s", "3m 12s", "2h 5m", "4d 1h".
pub(crate) fn seconds(s: f64) -> String {
    let whole = s.max(0.0) as u64;
    match whole {
        0..60 => format!("{:.1} s", s.max(0.0)),
        60..3600 => format!("{}m {}s", whole / 60, whole % 60),
        3600..86400 => format!("{}h {}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d {}h", whole / 86400, whole % 86400 / 3600),
    }
}

/// A word that a shell reads as exactly this text.
pub(crate) fn shell_word(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// How long ago, in one unit: "5 minutes ago".
pub(crate) fn ago(then: u64, now: u64) -> String {
    let s = now.saturating_sub(then);
    let (number, unit) = match s {
        0..60 => return "just now".into(),
        60..3600 => (s / 60, "minute"),
        3600..86400 => (s / 3600, "hour"),
        86400..2_592_000 => (s / 86400, "day"),
        2_592_000..31_536_000 => (s / 2_592_000, "month"),
        _ => (s / 31_536_000, "year"),
    };
    format!("{number} {unit}{} ago", if number == 1 { "" } else { "s" })
}

/// Columns as wide as their widest cell, two spaces apart, the header bold.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]], paint: Paint) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).chain([header[column].len()]).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let padded: Vec<String> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut text = paint.bold(&line(header));
    for row in rows {
        text += "\n";
        text += &line(std::array::from_fn(|column| row[column].as_str()));
    }
    text
}

/// "25% = 16 of 64 slots/layer" as far as the numbers are known.
pub(crate) fn cache_size(cache: &Cache, experts: Option<u32>) -> String {
    match experts.filter(|&experts| experts > 0) {
        Some(experts) => {
            let share = f64::from(cache.slots_per_layer) / f64::from(experts);
            format!("{} = {} of {experts} slots/layer", percent(share), cache.slots_per_layer)
        }
        None => format!("{} slots/layer", cache.slots_per_layer),
    }
}

/// The first token belongs to the prefill.
pub(crate) fn decode_tok_s(tokens: u32, decode_ms: f64) -> Option<f64> {
    (tokens > 1 && decode_ms > 0.0).then(|| f64::from(tokens - 1) / decode_ms * 1000.0)
}

/// What an answer cost, in two lines.
pub(crate) fn summary(reply: &Reply, load: &LoadResponse) -> String {
    let mut text = String::new();
    if let Some(accepted) = &reply.accepted {
        text += &accepted.model;
    }
    let Some(done) = &reply.done else { return text };
    let (usage, timing) = (done.usage.unwrap_or_default(), done.timing.unwrap_or_default());
    let _ = write!(text, " · {} prompt + {} new tokens", usage.prompt_tokens, usage.completion_tokens);
    if let Some(rate) = decode_tok_s(usage.completion_tokens, timing.decode_ms) {
        let _ = write!(text, " · {rate:.1} tok/s");
    }
    let _ = write!(text, " · first token {}", milliseconds(timing.ttft_ms));
    if let Some(cache) = &load.cache {
        let _ = write!(text, "\nexpert cache {}", cache_size(cache, load.model.as_ref().map(|model| model.experts)));
        if let Some(hits) = ratio(timing.expert_hits, timing.expert_misses) {
            let _ = write!(text, " · {} hits", percent(hits));
        }
        let _ = write!(text, " · {} from SSD", bytes(timing.ssd_bytes));
    }
    if !done.price.is_empty() {
        let _ = write!(text, "\n{}", done.price);
    }
    text
}

/// Everything the daemon tells about itself.
pub(crate) fn snapshot(snapshot: &Snapshot, paint: Paint) -> String {
    let mut rows: Vec<(&str, String)> = Vec::new();
    match &snapshot.model {
        // While a benchmark runs, the figures are its own to tell.
        Some(model) if model.state() == loaded_model::State::Benchmark => rows.push(("model", format!("{} · {}", model.id, state(model)))),
        Some(model) => {
            let context = format!("{} of {} tokens in use", model.context_used, model.context_length);
            rows.push(("model", format!("{} · {} · {} · {} threads · {context}", model.id, state(model), model.kernels, model.threads)));
        }
        None => rows.push(("model", "none loaded".into())),
    }
    rows.push(("up", seconds(snapshot.uptime_s)));
    if let Some(r) = &snapshot.requests {
        let ended = format!("{} finished · {} cancelled · {} failed · {} refused", r.finished, r.cancelled, r.failed, r.refused);
        rows.push(("requests", format!("{} running · {} waiting · {ended}", r.running, r.waiting)));
        rows.push(("tokens", format!("{} read · {} written", r.prompt_tokens, r.completion_tokens)));
    }
    if let Some(s) = &snapshot.speed {
        let rate = |value: Option<f64>| value.map_or("–".into(), |value| format!("{value:.1} tok/s"));
        let time = |value: Option<f64>| value.map_or("–".into(), milliseconds);
        let first = format!("first token p50 {} · p95 {}", time(s.ttft_ms_p50), time(s.ttft_ms_p95));
        rows.push(("speed", format!("decode {} · prefill {} · {first}", rate(s.decode_tok_s), rate(s.prefill_tok_s))));
    }
    if let Some(experts) = &snapshot.experts {
        expert_rows(experts, &mut rows);
    }
    if let Some(prefix) = &snapshot.prefix {
        prefix_rows(prefix, &mut rows);
    }
    if let Some(memory) = &snapshot.memory {
        rows.push(("memory", memory_text(memory)));
    }
    if let Some(pressure) = &snapshot.pressure {
        pressure_rows(pressure, paint, &mut rows);
    }
    let lines: Vec<String> = rows.iter().map(|(name, text)| format!("{}  {text}", paint.bold(&format!("{name:9}")))).collect();
    lines.join("\n")
}

pub(crate) fn state(model: &flash_proto::v1::LoadedModel) -> String {
    match model.state() {
        loaded_model::State::Loading => format!("loading {}", percent(model.progress)),
        loaded_model::State::Ready => "ready".into(),
        loaded_model::State::Busy => "busy".into(),
        loaded_model::State::Benchmark => "benchmark".into(),
    }
}

fn expert_rows(experts: &Experts, rows: &mut Vec<(&'static str, String)>) {
    let hits = ratio(experts.hits, experts.misses).map_or("–".into(), percent);
    let counted = format!("{} hits · {} misses · {} joined · {} evicted", experts.hits, experts.misses, experts.joined, experts.evictions);
    rows.push(("experts", format!("{hits} found in the cache · {counted}")));
    let rate =
        if experts.read_s > 0.0 { format!(" at {}/s", bytes((experts.bytes_read as f64 / experts.read_s) as u64)) } else { String::new() };
    let mut read = format!("{}{rate} in {} loads · waited {}", bytes(experts.bytes_read), experts.loads, seconds(experts.wait_s));
    if !experts.io.is_empty() {
        let _ = write!(read, " · {} I/O", experts.io);
    }
    if experts.load_errors > 0 {
        let _ =
            write!(read, " · {} failed, {} by checksum, {} records bad", experts.load_errors, experts.checksum_errors, experts.bad_records);
    }
    rows.push(("read", read));
    if !experts.policy.is_empty() {
        rows.push(("policy", policy_text(experts)));
    }
    if let Some(ahead) = &experts.prefetch {
        let counted = format!("{} loaded ahead · {} useful · {} wasted · {} late", ahead.issued, ahead.useful, ahead.wasted, ahead.late);
        rows.push(("lookahead", format!("{} · {counted}", ahead.mode)));
    }
    if let Some(cache) = &experts.cache {
        let slots = match cache.slots_wanted == cache.slots_per_layer {
            true => format!("{} slots/layer", cache.slots_per_layer),
            false => format!("{} slots/layer (going to {})", cache.slots_per_layer, cache.slots_wanted),
        };
        let size = format!("{} of {} resident", bytes(cache.resident_bytes), bytes(cache.budget_bytes));
        rows.push(("cache", format!("{slots} · {size} · a token's working set is {}", bytes(cache.working_set_bytes))));
    }
    for (line, layers) in experts.layers.chunks(8).enumerate() {
        let cells = layers.iter().map(|layer| match ratio(layer.hits, layer.misses) {
            Some(share) => format!("{:>3} {} {:>3.0}%", layer.layer, bar(share), share * 100.0),
            None => format!("{:>3}     –", layer.layer),
        });
        rows.push((if line == 0 { "layers" } else { "" }, cells.collect::<Vec<_>>().join(" ")));
    }
}

fn prefix_rows(prefix: &Prefix, rows: &mut Vec<(&'static str, String)>) {
    let hits = ratio(prefix.hits, prefix.misses).map_or("–".into(), percent);
    let reused = format!("{} tokens from memory, {} from disk", prefix.memory_tokens, prefix.disk_tokens);
    let idle = format!("{} of {} idle", bytes(prefix.idle_bytes), bytes(prefix.budget_bytes));
    let kept = format!("{} tokens kept in {} · {idle} · {} blocks evicted", prefix.tokens, bytes(prefix.bytes), prefix.evicted);
    rows.push(("prefixes", format!("{hits} of requests found theirs · {reused} · {kept}")));
    if let Some(disk) = &prefix.disk {
        let size = format!("{} of {} in {} files", bytes(disk.bytes), bytes(disk.budget_bytes), disk.files);
        let written = format!("{} of {} written today", bytes(disk.written_today_bytes), bytes(disk.daily_bytes));
        let mut text = format!("{size} · {written} · {} blocks read, {} written", disk.read, disk.written);
        for (count, what) in [(disk.bad, "bad files"), (disk.failed_writes, "writes failed"), (disk.over_budget, "left out")] {
            if count > 0 {
                let _ = write!(text, " · {count} {what}");
            }
        }
        rows.push(("on disk", text));
    } else if !prefix.disk_error.is_empty() {
        rows.push(("on disk", format!("no: {}", prefix.disk_error)));
    }
}

fn policy_text(experts: &Experts) -> String {
    let mut text = experts.policy.clone();
    if let Some(Belady { tokens, policy, belady }) = experts.belady {
        let _ = match (belady - policy) * 100.0 {
            points @ 0.05.. => write!(text, " · {points:.1} points below Belady over the last {} tokens", grouped(tokens)),
            _ => write!(text, " · as good as Belady over the last {} tokens", grouped(tokens)),
        };
    }
    if experts.warm_loads > 0 {
        let _ = write!(text, " · {} experts read back from the last run", grouped(u32::try_from(experts.warm_loads).unwrap_or(u32::MAX)));
    }
    text
}

/// "1,024".
fn grouped(count: u32) -> String {
    match count {
        0..1000 => count.to_string(),
        _ => format!("{},{:03}", grouped(count / 1000), count % 1000),
    }
}

/// One cell of eight heights.
fn bar(share: f64) -> char {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    BARS[((share.clamp(0.0, 1.0) * 8.0) as usize).min(7)]
}

fn memory_text(memory: &Memory) -> String {
    let known = memory.trunk_bytes + memory.slab_bytes + memory.kv_bytes + memory.scratch_bytes;
    let parts =
        [("trunk", memory.trunk_bytes), ("expert slab", memory.slab_bytes), ("KV", memory.kv_bytes), ("scratch", memory.scratch_bytes)];
    let parts = parts.map(|(name, size)| format!("{} {name}", bytes(size))).join(" + ");
    let rest = bytes(memory.process_bytes.saturating_sub(known));
    let cap = memory.cap_bytes.map_or("no cap".into(), |cap| format!("cap {}", bytes(cap)));
    let mlx = memory.mlx.map_or(String::new(), |mlx| {
        format!(" · MLX {}, at most {}; {} results waited for", bytes(mlx.active_bytes), bytes(mlx.peak_bytes), mlx.host_syncs)
    });
    format!("{} = {parts} + {rest} other · {} KV reserved · {cap}{mlx}", bytes(memory.process_bytes), bytes(memory.kv_reserved_bytes))
}

fn pressure_rows(pressure: &Pressure, paint: Paint, rows: &mut Vec<(&'static str, String)>) {
    let level = match pressure.level() {
        pressure::Level::Normal => paint.good("normal"),
        pressure::Level::Warn => paint.bold("warn"),
        pressure::Level::Critical => paint.bad("critical"),
    };
    let budget = pressure.budget_bytes.map(|budget| format!("experts may have {}", bytes(budget)));
    let readings = pressure.readings.iter().map(|reading| format!("{} {}", reading.name, reading.value));
    rows.push(("pressure", [level].into_iter().chain(budget).chain(readings).collect::<Vec<_>>().join(" · ")));
    for (line, decision) in pressure.decisions.iter().rev().take(5).rev().enumerate() {
        rows.push((if line == 0 { "decided" } else { "" }, format!("at {}: {}", seconds(decision.at_s), decision.what)));
    }
}

#[cfg(test)]
mod tests {
    use flash_proto::v1::{Accepted, Decision, Done, LayerHits, LoadedModel, Model, Prefetch, Reading, Timing, Usage};

    use super::*;

    #[test]
    fn quantities_are_short() {
        let check = |actual: String, expected: &str| assert_eq!(actual, expected);
        check(bytes(0), "0 B");
        check(bytes(999), "999 B");
        check(bytes(5_300_000), "5.3 MB");
        check(bytes(999_960), "1.0 MB");
        check(bytes(u64::MAX), "18446.7 PB");
        check(count(24_500_000), "24.5M");
        check(count(30_532_000_000), "30.5B");
        check(percent(0.25), "25%");
        check(percent(0.8734), "87.3%");
        check(percent(1.0), "100%");
        check(milliseconds(120.4), "120 ms");
        check(milliseconds(2500.0), "2.5 s");
        check(seconds(192.7), "3m 12s");
        check(seconds(7500.0), "2h 5m");
        check(seconds(-1.0), "0.0 s");
        check(ago(100, 130), "just now");
        check(ago(0, 3600), "1 hour ago");
        check(ago(0, 86400 * 3), "3 days ago");
        check(ago(200, 100), "just now");
        assert_eq!(ratio(0, 0), None);
        assert_eq!(ratio(1, 3), Some(0.25));
        check(shell_word("it's $x"), r"'it'\''s $x'");
        check(grouped(999), "999");
        check(grouped(1_234_005), "1,234,005");
        assert_eq!([bar(0.0), bar(0.5), bar(1.0), bar(9.0)], ['▁', '▅', '█', '█']);
    }

    #[test]
    fn a_table_lines_up() {
        let rows = [["a".into(), "1".into()], ["long name".into(), "22".into()]];
        assert_eq!(table(["NAME", "N"], &rows, Paint::plain()), "NAME       N\na          1\nlong name  22");
    }

    #[test]
    fn an_answer_is_summed_up() {
        let load = LoadResponse {
            model: Some(Model { experts: 64, ..Model::default() }),
            cache: Some(Cache { slots_per_layer: 16, ..Cache::default() }),
            ..LoadResponse::default()
        };
        let usage = Usage { prompt_tokens: 22, completion_tokens: 101, ..Usage::default() };
        let timing =
            Timing { ttft_ms: 120.0, decode_ms: 1000.0, expert_hits: 3, expert_misses: 1, ssd_bytes: 1_234_000, ..Timing::default() };
        let reply = Reply {
            accepted: Some(Accepted { model: "tiny".into(), ..Accepted::default() }),
            done: Some(Done { usage: Some(usage), timing: Some(timing), ..Done::default() }),
            ..Reply::default()
        };
        let expected = "tiny · 22 prompt + 101 new tokens · 100.0 tok/s · first token 120 ms\nexpert cache 25% = 16 of 64 slots/layer · 75% hits · 1.2 MB from SSD";
        assert_eq!(summary(&reply, &load), expected);
    }

    #[test]
    fn a_snapshot_says_all_of_it() {
        let experts = Experts {
            cache: Some(Cache { slots_per_layer: 16, slots_wanted: 12, budget_bytes: 10_000_000, ..Cache::default() }),
            hits: 3,
            misses: 1,
            policy: "lfru".into(),
            io: "direct".into(),
            prefetch: Some(Prefetch { mode: "auto".into(), issued: 5, useful: 3, wasted: 1, late: 1 }),
            belady: Some(Belady { tokens: 1024, policy: 0.5, belady: 0.623 }),
            warm_loads: 7,
            layers: vec![LayerHits { layer: 0, hits: 1, misses: 1, resident: 16 }, LayerHits { layer: 1, ..LayerHits::default() }],
            ..Experts::default()
        };
        let pressure = Pressure {
            level: pressure::Level::Warn.into(),
            readings: vec![Reading { name: "MemAvailable".into(), value: "3.1 GB".into() }],
            decisions: vec![Decision { at_s: 12.3, what: "16 → 12 slots".into() }],
            ..Pressure::default()
        };
        let model = LoadedModel { id: "tiny".into(), state: loaded_model::State::Loading.into(), progress: 0.42, ..LoadedModel::default() };
        let text = super::snapshot(
            &Snapshot {
                model: Some(model),
                experts: Some(experts),
                pressure: Some(pressure),
                memory: Some(Memory::default()),
                ..Snapshot::default()
            },
            Paint::plain(),
        );
        for part in [
            "tiny · loading 42%",
            "75% found",
            "lfru · 12.3 points below Belady over the last 1,024 tokens · 7 experts read back",
            "auto · 5 loaded ahead · 3 useful · 1 wasted · 1 late",
            "direct I/O",
            "going to 12",
            "  0 ▅  50%   1     –",
            "warn · MemAvailable 3.1 GB",
            "at 12.3 s: 16 → 12",
            "no cap",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
