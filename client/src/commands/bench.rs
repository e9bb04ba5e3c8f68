//! `flashctl bench`: has the daemon measure a model and prints a row per cache size, beside what memory and disk allow;
//! `bench synth` has it write a model to measure. The measuring and the arithmetic are the engine's.

use std::path::absolute;

use flash_proto::v1::{
    BenchEvent, BenchMachine, BenchProgress, BenchRequest, BenchRow, BenchStage, BenchVariant, JobProgress, SynthRequest,
    bench_event::Event,
};
use serde_json::{Value, json};

use super::trace;
use crate::{
    args::{BenchArgs, BenchCommand, Global, SynthArgs},
    connect::connect,
    failure::{Failure, exit},
    job::{self, Meter},
    load, render,
    term::{self, Paint},
};

pub(crate) async fn run(args: BenchArgs, global: &Global) -> Result<(), Failure> {
    if let Some(BenchCommand::Synth(args)) = args.synth {
        return synth(args, global).await;
    }
    let profile = args.profile;
    let request = request(args)?;
    let daemon = connect(global).await?;
    let failed = |status| daemon.failure(&status, "measuring");
    let mut stream = daemon.admin().bench(request).await.map_err(failed)?.into_inner();
    let mut meter = Meter::new(global);
    let mut report = Report { paint: Paint::stdout(), profile, machines: Vec::new(), variant: None };
    while let Some(BenchEvent { event }) = stream.message().await.map_err(failed)? {
        match event {
            // Runs, where the meter shows bytes.
            Some(Event::Progress(BenchProgress { stage, done, total })) if total > 0 && !global.json => {
                meter.show(&JobProgress { stage: format!("{stage}, run {} of {total}", done + 1), done: 0, total: 0 })?;
            }
            Some(Event::Progress(BenchProgress { stage, done, total })) => meter.show(&JobProgress { stage, done, total })?,
            Some(Event::Machine(machine)) if global.json => term::print_json(&machine_json(&machine))?,
            Some(Event::Row(row)) if global.json => term::print_json(&row_json(&row))?,
            Some(Event::Machine(machine)) => report.measured(machine),
            Some(Event::Row(row)) => {
                meter.clear();
                term::println(&report.row(row))?;
            }
            // An event of a newer daemon.
            None => {}
        }
    }
    meter.clear();
    if report.machines.is_empty() || global.json { Ok(()) } else { term::println(&footer(&report.machines, report.paint)) }
}

fn request(args: BenchArgs) -> Result<BenchRequest, Failure> {
    let routing = args.routing.map(|routing| match routing.strip_prefix("trace:") {
        Some(file) => trace::readable(file.into()).map(|path| path.display().to_string()),
        None => Err(Failure::new(exit::USAGE, "usage", format!("--routing takes trace:FILE, not {routing}"))),
    });
    Ok(BenchRequest {
        model: load::model_name(&args.model),
        cache: args.cache,
        prompt: args.prompt,
        generate: args.generate,
        no_cache: args.no_cache,
        routing: routing.transpose()?.unwrap_or_default(),
        variants: variants(&args.io, &args.policy, &args.lookahead),
        repeat: args.repeat,
        seed: args.seed,
    })
}

/// Every combination; a setting that is not named is the daemon's.
fn variants(io: &[String], policy: &[String], lookahead: &[String]) -> Vec<BenchVariant> {
    fn or_daemons(list: &[String]) -> Vec<String> {
        if list.is_empty() { vec![String::new()] } else { list.to_vec() }
    }
    let mut all = Vec::new();
    for io in or_daemons(io) {
        for policy in or_daemons(policy) {
            all.extend(or_daemons(lookahead).into_iter().map(|lookahead| BenchVariant {
                io: io.clone(),
                policy: policy.clone(),
                lookahead,
            }));
        }
    }
    all
}

async fn synth(args: SynthArgs, global: &Global) -> Result<(), Failure> {
    let out = args.out.map(|path| absolute(&path).unwrap_or(path).display().to_string());
    let daemon = connect(global).await?;
    let request = SynthRequest {
        shape: args.shape,
        path: out.unwrap_or_default(),
        layers: args.layers,
        context: args.context,
        seed: args.seed,
        routing: args.routing,
    };
    let done = job::follow(&daemon, daemon.models().synth(request).await, "writing the model", global).await?;
    if global.json {
        let (records, bytes, seconds) = (done.records, done.bytes, done.seconds);
        let value = json!({"event": "done", "name": done.model, "path": done.path, "records": records, "bytes": bytes, "seconds": seconds});
        return term::print_json(&value);
    }
    let (bytes, seconds) = (render::bytes(done.bytes), render::seconds(done.seconds));
    term::println(&format!("wrote {}: {} experts, {bytes}, in {seconds} to {}", done.model, done.records, done.path))
}

/// Name, unit, width: 99 characters with a space between.
const COLUMNS: [(&str, &str, usize); 16] = [
    ("cache", "", 6),
    ("slots", "", 5),
    ("state", "", 5),
    ("prompt", "tok/s", 6),
    ("TTFT", "s", 6),
    ("decode", "tok/s", 6),
    ("hits", "%", 5),
    ("disk", "MB/tok", 6),
    ("disk", "GB/s", 5),
    ("overlap", "tok/s", 7),
    ("of", "%", 4),
    ("serial", "tok/s", 6),
    ("of", "%", 4),
    ("ahead", "%", 5),
    ("used", "", 4),
    ("lost", "", 4),
];

/// The table as its rows come.
struct Report {
    paint: Paint,
    /// Say where the time went.
    profile: bool,
    /// The latest of each kind of I/O.
    machines: Vec<BenchMachine>,
    /// Of the rows printed last.
    variant: Option<BenchVariant>,
}

impl Report {
    fn measured(&mut self, machine: BenchMachine) {
        self.machines.retain(|other| other.io != machine.io);
        self.machines.push(machine);
    }

    /// With the header before the first one, and the settings where they change.
    fn row(&mut self, row: BenchRow) -> String {
        let mut text = String::new();
        if self.variant.is_none() {
            text += &self.paint.bold(&format!(
                "{}\n{}\n",
                line(COLUMNS.map(|column| column.0.into())),
                line(COLUMNS.map(|column| column.1.into()))
            ));
        }
        if self.variant != row.variant {
            let variant = row.variant.clone().unwrap_or_default();
            let settings = format!("io {}, policy {}, lookahead {}\n", variant.io, variant.policy, variant.lookahead);
            text += &self.paint.dim(&settings);
            self.variant = Some(variant);
        }
        text += &line(cells(&row));
        if self.profile && !row.stages.is_empty() {
            text += &self.paint.dim(&stages(&row));
        }
        text
    }
}

fn line(cells: [String; COLUMNS.len()]) -> String {
    let padded: Vec<String> = cells
        .iter()
        .zip(COLUMNS)
        .enumerate()
        .map(|(at, (cell, (.., width)))| match at {
            0 | 2 => format!("{cell:width$}"),
            _ => format!("{cell:>width$}"),
        })
        .collect();
    padded.join(" ").trim_end().into()
}

fn cells(row: &BenchRow) -> [String; COLUMNS.len()] {
    let figure = |value: Option<f64>, unit: f64| value.map_or("–".into(), |value| digits(value / unit));
    let percent = |share: Option<f64>| share.map_or("–".into(), |share| format!("{:.0}", share * 100.0));
    let ahead = row.lookahead_recall.is_some() || row.prefetch_useful + row.prefetch_wasted > 0;
    let counted = |count: u64| if ahead { render::count(count) } else { "–".into() };
    [
        row.cache.clone(),
        if row.slots == 0 { "–".into() } else { row.slots.to_string() },
        row.state.clone(),
        figure(row.prefill_tok_s, 1.0),
        figure(row.ttft_s, 1.0),
        figure(row.decode_tok_s, 1.0),
        row.hit_rate.map_or("–".into(), |rate| format!("{:.1}", rate * 100.0)),
        figure(row.disk_bytes_per_token, 1e6),
        figure(row.disk_bytes_s, 1e9),
        figure(row.overlapped_tok_s, 1.0),
        percent(row.of_overlapped),
        figure(row.serial_tok_s, 1.0),
        percent(row.of_serial),
        percent(row.lookahead_recall),
        counted(row.prefetch_useful),
        counted(row.prefetch_wasted),
    ]
}

/// Below its row, each stage's share of a mean token.
fn stages(row: &BenchRow) -> String {
    let total: f64 = row.stages.iter().map(|stage| stage.seconds).sum();
    let share = |stage: &BenchStage| format!("{} {:.1}%", stage.name, stage.seconds / total * 100.0);
    let lines = row.stages.chunks(4).map(|stages| stages.iter().map(share).collect::<Vec<_>>().join(", "));
    format!("\n       {} ms: {}", digits(total * 1e3), lines.collect::<Vec<_>>().join(",\n       "))
}

/// Three digits that mean something.
fn digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// What the bounds come from, measured anew for every size of cache: the latest figures.
fn footer(machines: &[BenchMachine], paint: Paint) -> String {
    let mut lines = vec![String::new()];
    if let Some(machine) = machines.last() {
        lines.push(format!("memory {:.1} GB/s, summed by {} threads ({})", machine.memory_bytes_s / 1e9, machine.threads, machine.kernels));
    }
    lines.extend(machines.iter().map(|machine| {
        let (speed, record) = (machine.disk_bytes_s / 1e9, render::bytes(machine.record_bytes));
        format!("disk   {speed:.2} GB/s in reads of {record} at random places, {} readers, {} I/O", machine.readers, machine.io)
    }));
    lines.push("overlap: memory and disk work at the same time; serial: one after the other. of: share of that bound reached".into());
    lines.push("ahead: recall of the lookahead; used, lost: experts it loaded that were needed or evicted unused".into());
    lines.extend(machines.iter().flat_map(|machine| &machine.notes).map(|note| format!("not measured: {note}")));
    paint.dim(&lines.join("\n"))
}

fn machine_json(machine: &BenchMachine) -> Value {
    json!({
        "event": "machine", "memory_bytes_s": machine.memory_bytes_s, "threads": machine.threads, "disk_bytes_s": machine.disk_bytes_s,
        "record_bytes": machine.record_bytes, "readers": machine.readers, "io": machine.io, "kernels": machine.kernels,
        "notes": machine.notes,
    })
}

fn row_json(row: &BenchRow) -> Value {
    let variant = row.variant.clone().unwrap_or_default();
    json!({
        "event": "row", "cache": row.cache, "slots": row.slots, "state": row.state, "io": variant.io, "policy": variant.policy,
        "lookahead": variant.lookahead, "prompt_tokens": row.prompt_tokens, "prefill_tok_s": row.prefill_tok_s, "ttft_s": row.ttft_s,
        "prefill_disk_bytes": row.prefill_disk_bytes,
        "decode_tokens": row.decode_tokens, "decode_tok_s": row.decode_tok_s, "decode_mean_tok_s": row.decode_mean_tok_s,
        "hit_rate": row.hit_rate, "disk_bytes_per_token": row.disk_bytes_per_token, "disk_bytes_s": row.disk_bytes_s,
        "wait_share": row.wait_share, "memory_bound_tok_s": row.memory_bound_tok_s, "io_bound_tok_s": row.io_bound_tok_s,
        "overlapped_tok_s": row.overlapped_tok_s, "serial_tok_s": row.serial_tok_s, "of_overlapped": row.of_overlapped,
        "of_serial": row.of_serial, "lookahead_recall": row.lookahead_recall, "prefetch_useful": row.prefetch_useful,
        "prefetch_wasted": row.prefetch_wasted,
        "stages_s": row.stages.iter().map(|stage| (stage.name.clone(), stage.seconds.into())).collect::<serde_json::Map<_, Value>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> BenchRow {
        BenchRow {
            cache: "25%".into(),
            slots: 32,
            state: "cold".into(),
            variant: Some(BenchVariant { io: "direct".into(), policy: "lfru".into(), lookahead: "on".into() }),
            prefill_tok_s: Some(123.4),
            ttft_s: Some(4.149),
            decode_tok_s: Some(2.345),
            hit_rate: Some(0.625),
            disk_bytes_per_token: Some(382.1e6),
            disk_bytes_s: Some(1.71e9),
            overlapped_tok_s: Some(4.45),
            of_overlapped: Some(0.527),
            serial_tok_s: Some(3.71),
            of_serial: Some(0.632),
            lookahead_recall: Some(0.812),
            prefetch_useful: 81_234,
            prefetch_wasted: 912,
            ..BenchRow::default()
        }
    }

    #[test]
    fn a_table_fits_a_terminal() {
        let mut report = Report { paint: Paint::plain(), profile: false, machines: Vec::new(), variant: None };
        let first = report.row(row());
        let none = report.row(BenchRow { cache: "none".into(), state: "warm".into(), variant: row().variant, ..BenchRow::default() });
        let expected = "\
cache  slots state prompt   TTFT decode  hits   disk  disk overlap   of serial   of ahead used lost
                    tok/s      s  tok/s     % MB/tok  GB/s   tok/s    %  tok/s    %     %
io direct, policy lfru, lookahead on
25%       32 cold     123   4.15   2.35  62.5    382  1.71    4.45   53   3.71   63    81 81.2k  912
none       – warm       –      –      –     –      –     –       –    –      –    –     –    –    –";
        assert_eq!(format!("{first}\n{none}"), expected);
        assert!(expected.lines().all(|line| line.chars().count() <= 100));
    }

    #[test]
    fn settings_multiply() {
        let list = |text: &str| text.split(',').filter(|part| !part.is_empty()).map(String::from).collect::<Vec<_>>();
        let check = |io: &str, policy: &str, expected: &str| {
            let found: Vec<String> =
                variants(&list(io), &list(policy), &[]).iter().map(|v| format!("{}/{}/{}", v.io, v.policy, v.lookahead)).collect();
            assert_eq!(found.join(" "), expected);
        };
        check("", "", "//");
        check("direct", "lru,lfru", "direct/lru/ direct/lfru/");
    }
}
