//! `flashctl trace`: records which experts an answer used, replays such a record. The replaying is the daemon's; the
//! recording is written here, a line per token as it comes.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf, absolute},
};

use flash_proto::v1::{LoadResponse, ReplayRequest, ReplayResponse, Routing, generate_request::Prompt};
use serde_json::json;

use super::{piped_input, run::join_prompt};
use crate::{
    args::{Global, Settings, TraceCommand, TraceRecordArgs, TraceReplayArgs},
    connect::connect,
    failure::{Failure, exit},
    load, render,
    reply::{self, Reply, Said},
    term::{self, Paint},
};

pub(crate) async fn run(command: TraceCommand, global: &Global) -> Result<(), Failure> {
    match command {
        TraceCommand::Record(args) => record(args, global).await,
        TraceCommand::Replay(args) => replay(args, global).await,
    }
}

async fn record(args: TraceRecordArgs, global: &Global) -> Result<(), Failure> {
    let stdin = piped_input().await?;
    let prompt = join_prompt(&args.prompt, &[], stdin.as_deref())
        .ok_or_else(|| Failure::new(exit::USAGE, "usage", "there is no prompt: no arguments, and nothing on standard input"))?;
    let daemon = connect(global).await?;
    let loaded = load::load(&daemon, &args.model, &Settings::default(), global).await?;
    let mut file = Recording::create(&args.out, &loaded)?;
    let prompt = if args.raw { Prompt::Text(prompt) } else { Prompt::Chat(reply::chat(vec![reply::message("user", &prompt)])) };
    let mut request = reply::request(&load::model_name(&args.model), prompt, &args.generation);
    (request.record_routing, request.ignore_eos) = (true, args.ignore_eos);
    let mut sink = |said: Said<'_>| match said {
        Said::Routing(routing) => file.tokens(routing),
        _ => Ok(()),
    };
    reply::receive(&daemon, request, global, &mut Reply::default(), &mut sink).await?;
    file.finish()?;
    let (tokens, path) = (file.tokens, args.out.display().to_string());
    if global.json {
        return term::print_json(&json!({"path": path, "tokens": tokens, "layers": file.layers}));
    }
    term::println(&format!("wrote the routing of {tokens} tokens through {} layers to {path}", file.layers))
}

/// The file while it is being written: whole lines only, so that what an interrupt leaves is a trace.
struct Recording<'a> {
    out: File,
    path: &'a Path,
    loaded: &'a LoadResponse,
    tokens: usize,
    layers: usize,
}

impl<'a> Recording<'a> {
    fn create(path: &'a Path, loaded: &'a LoadResponse) -> Result<Self, Failure> {
        let file = File::create(path).map_err(|error| cannot_write(path, &error))?;
        Ok(Self { out: file, path, loaded, tokens: 0, layers: 0 })
    }

    fn tokens(&mut self, routing: &Routing) -> Result<(), Failure> {
        let (tokens, layers) = (routing.tokens.len(), routing.layers as usize);
        let Some(top_k @ 1..) = routing.ids.len().checked_div(tokens * layers) else { return Ok(()) };
        let mut text = String::new();
        if self.tokens == 0 {
            self.layers = layers;
            let model = self.loaded.model.clone().unwrap_or_default();
            let head = json!({"flash_trace": 1, "model": model.id, "layers": layers, "experts": model.experts, "top_k": top_k});
            text = format!("{head}\n");
        }
        for (token, ids) in routing.tokens.iter().zip(routing.ids.chunks_exact(layers * top_k)) {
            let layers: Vec<&[u32]> = ids.chunks_exact(top_k).collect();
            text += &format!("{}\n", json!({"tok": token, "layers": layers}));
        }
        self.tokens += tokens;
        self.out.write_all(text.as_bytes()).map_err(|error| cannot_write(self.path, &error))
    }

    fn finish(&self) -> Result<(), Failure> {
        self.out.sync_all().map_err(|error| cannot_write(self.path, &error))
    }
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(exit::CANNOT_CREATE, "file", format!("cannot write {}: {error}", path.display()))
}

/// The whole path of a file that the daemon is to read. It would say the same, but from its own folder and after having been started.
pub(super) fn readable(path: PathBuf) -> Result<PathBuf, Failure> {
    let path = absolute(&path).unwrap_or(path);
    match File::open(&path) {
        Ok(_) => Ok(path),
        Err(error) => Err(Failure::new(exit::NO_INPUT, "input", format!("cannot read {}: {error}", path.display()))),
    }
}

async fn replay(args: TraceReplayArgs, global: &Global) -> Result<(), Failure> {
    let path = readable(args.file)?;
    let daemon = connect(global).await?;
    let mut line = term::StatusLine::new(global.quiet);
    line.show("replaying");
    let request = ReplayRequest { path: path.display().to_string(), policies: args.policy, slots: args.slots };
    let answer = daemon.admin().replay(request).await.map_err(|status| daemon.failure(&status, "replaying"))?.into_inner();
    line.clear();
    if global.json {
        let row = |row: &flash_proto::v1::ReplayRow| {
            let rate = render::ratio(row.hits, row.misses);
            json!({"policy": row.policy, "slots": row.slots, "hits": row.hits, "misses": row.misses, "hit_rate": rate, "gap": row.gap})
        };
        return term::print_json(&json!({
            "path": path, "tokens": answer.tokens, "layers": answer.layers, "experts": answer.experts, "top_k": answer.top_k,
            "rows": answer.rows.iter().map(row).collect::<Vec<_>>(),
        }));
    }
    term::println(&table(&answer, Paint::stdout()))
}

fn table(answer: &ReplayResponse, paint: Paint) -> String {
    let rows: Vec<_> = answer
        .rows
        .iter()
        .map(|row| {
            let share = f64::from(row.slots) / f64::from(answer.experts.max(1));
            [
                format!("{} ({})", row.slots, render::percent(share)),
                row.policy.clone(),
                render::ratio(row.hits, row.misses).map_or("–".into(), |rate| format!("{:.1}", rate * 100.0)),
                format!("{:.1}", row.gap * 100.0),
                row.misses.to_string(),
            ]
        })
        .collect();
    let shape = format!("{} tokens, {} layers, top {} of {} experts", answer.tokens, answer.layers, answer.top_k, answer.experts);
    format!("{}\n{}", render::table(["SLOTS/LAYER", "POLICY", "HIT %", "BELOW BELADY", "MISSES"], &rows, paint), paint.dim(&shape))
}

#[cfg(test)]
mod tests {
    use flash_proto::v1::ReplayRow;

    use super::*;

    #[test]
    fn a_replay_is_a_table() {
        let row = |policy: &str, hits, gap| ReplayRow { policy: policy.into(), slots: 16, hits, misses: 1000 - hits, gap };
        let rows = vec![row("lfru", 545, 0.185), row("belady", 730, 0.0)];
        let answer = ReplayResponse { tokens: 125, layers: 8, experts: 64, top_k: 8, rows };
        let expected = "SLOTS/LAYER  POLICY  HIT %  BELOW BELADY  MISSES\n16 (25%)     lfru    54.5   18.5          455\n\
                        16 (25%)     belady  73.0   0.0           270\n125 tokens, 8 layers, top 8 of 64 experts";
        assert_eq!(table(&answer, Paint::plain()), expected);
    }
}
