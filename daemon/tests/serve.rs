//! The daemon as a library: `flashd::run` on a socket in a temporary directory, with the bundled model, spoken to over
//! gRPC as any client does. Processes, signals and cgroups are elsewhere.

use std::{
    collections::HashMap,
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use flash_proto::{
    code, socket,
    v1::{self, generate_event::Event},
};
use flashd::{Config, Error, RawConfig, Text};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};
use tonic::{Status, Streaming, transport::Channel};

const MODEL: &str = "flash-tiny-moe";
/// Far beyond what any of this takes: a hang fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(120);

type Admin = v1::admin_client::AdminClient<Channel>;
type Models = v1::models_client::ModelsClient<Channel>;
type Generate = v1::generate_client::GenerateClient<Channel>;

struct Daemon {
    channel: Channel,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), Error>>,
    home: tempfile::TempDir,
}

impl Daemon {
    async fn start(flags: RawConfig) -> Self {
        let home = tempfile::tempdir().expect("a temporary directory");
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
        let path = home.path().join("flashd.sock");
        let env: HashMap<&str, OsString> = HashMap::from([
            ("FLASH_HOME", home.path().into()),
            ("FLASH_SOCKET", path.clone().into()),
            ("FLASH_MODELS", models.into()),
            ("FLASH_THREADS", "1".into()),
            ("FLASH_MODEL", MODEL.into()),
        ]);
        let config = Config::resolve(flags, &|name| env.get(name).cloned()).expect("a good configuration");
        let (listener, bound) = socket::bind(&path).expect("a free socket");
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(async move {
            let _bound = bound;
            flashd::run(config, listener, async { drop(stopped.await) }).await
        });
        let channel = socket::connect(&path).await.expect("a daemon that listens");
        Self { channel, stop: Some(stop), running, home }
    }

    async fn generate(&self, request: v1::GenerateRequest) -> Result<Stream, Status> {
        let mut client = Generate::new(self.channel.clone());
        let reply = timeout(PATIENCE, client.generate(request)).await.expect("an answer in time")?;
        Ok(Stream(reply.into_inner()))
    }

    async fn stats(&self) -> v1::Snapshot {
        Admin::new(self.channel.clone()).stats(v1::StatsRequest {}).await.expect("stats").into_inner()
    }

    /// Follows WatchStats until a snapshot is as wanted.
    async fn until(&self, what: &str, wanted: impl Fn(&v1::Snapshot) -> bool) -> v1::Snapshot {
        let request = v1::WatchStatsRequest { interval_ms: 100 };
        let mut stream = Admin::new(self.channel.clone()).watch_stats(request).await.expect("a stream").into_inner();
        let found = async {
            loop {
                let snapshot = stream.message().await.expect("a snapshot").expect("a stream that goes on");
                if wanted(&snapshot) {
                    return snapshot;
                }
            }
        };
        timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
    }

    async fn unload(&self, force: bool) -> bool {
        let request = v1::UnloadRequest { model: String::new(), force };
        Models::new(self.channel.clone()).unload(request).await.expect("an unload").into_inner().was_loaded
    }

    async fn stop(mut self) {
        drop(self.stop.take());
        timeout(PATIENCE, self.running).await.expect("a drain in time").expect("no panic").expect("a clean end");
    }
}

struct Stream(Streaming<v1::GenerateEvent>);

impl Stream {
    async fn next(&mut self) -> Option<Event> {
        let message = timeout(PATIENCE, self.0.message()).await.expect("an event in time").expect("a healthy stream");
        message.map(|message| message.event.expect("an event"))
    }

    /// Reads up to the first text.
    async fn started(mut self) -> Self {
        while let Some(event) = self.next().await {
            if matches!(event, Event::Text(_)) {
                return self;
            }
        }
        panic!("the stream ended without text");
    }

    /// The whole reply.
    async fn finish(mut self) -> (String, Result<v1::Done, v1::Failed>) {
        let mut text = String::new();
        while let Some(event) = self.next().await {
            match event {
                Event::Accepted(accepted) => assert_eq!(accepted.model, MODEL),
                Event::Progress(_) | Event::Prompt(_) | Event::Routing(_) | Event::ToolCall(_) => {}
                Event::Text(part) => text += &part.text,
                Event::Done(done) => {
                    assert_eq!(self.next().await, None, "Done is the last event");
                    return (text, Ok(done));
                }
                Event::Failed(failed) => return (text, Err(failed)),
            }
        }
        panic!("the stream ended without Done: {text}");
    }
}

fn story(max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Text("Once upon a time".into())),
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        ..Default::default()
    }
}

/// Longer than any test waits for.
fn endless() -> v1::GenerateRequest {
    v1::GenerateRequest { max_tokens: None, ..story(1) }
}

fn running(snapshot: &v1::Snapshot) -> u32 {
    snapshot.requests.as_ref().map_or(0, |requests| requests.running)
}

fn waiting(snapshot: &v1::Snapshot) -> u32 {
    snapshot.requests.as_ref().map_or(0, |requests| requests.waiting)
}

#[tokio::test(flavor = "multi_thread")]
async fn generates_and_reports() {
    let daemon = Daemon::start(RawConfig { expert_cache: Some(Text::from("50%")), ..Default::default() }).await;
    assert_eq!(daemon.stats().await.model, None);
    let mut first = daemon.generate(v1::GenerateRequest { model: "local".into(), ..story(8) }).await.expect("accepted");
    let Some(Event::Accepted(accepted)) = first.next().await else { panic!("the first event is Accepted") };
    assert!(accepted.prompt_tokens > 0 && accepted.fingerprint.starts_with("fp_"), "{accepted:?}");
    let (text, done) = first.finish().await;
    let done = done.expect("a reply");
    assert_eq!((done.token_ids.len(), done.finish()), (8, v1::done::Finish::Length));
    assert!(!text.is_empty());
    let usage = done.usage.expect("usage");
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (accepted.prompt_tokens, 8));

    // Two at once say the same as one alone.
    let (left, right) = tokio::join!(daemon.generate(story(8)), daemon.generate(story(8)));
    let (left, right) = tokio::join!(left.expect("accepted").finish(), right.expect("accepted").finish());
    assert_eq!((&left.0, &right.0), (&text, &text));
    assert_eq!(left.1.expect("a reply").token_ids, done.token_ids);

    let snapshot = daemon.until("three finished requests", |snapshot| running(snapshot) == 0).await;
    let requests = snapshot.requests.expect("requests");
    assert_eq!((requests.finished, requests.cancelled, requests.failed, requests.completion_tokens), (3, 0, 0, 24));
    assert!(snapshot.speed.is_some_and(|speed| speed.decode_tok_s.is_some() && speed.ttft_ms_p95.is_some()));
    let experts = snapshot.experts.expect("experts");
    assert!(experts.hits > 0 && experts.misses > 0 && !experts.layers.is_empty());
    let cache = experts.cache.expect("a cache");
    assert!(cache.slots_per_layer > 0 && cache.resident_bytes <= cache.budget_bytes);
    let model = snapshot.model.expect("a model");
    assert!(model.id == MODEL && model.unload_in_s.is_some_and(|seconds| seconds > 0.0 && seconds <= 300.0), "{model:?}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokenizes_and_lists_without_loading() {
    let daemon = Daemon::start(RawConfig::default()).await;
    let mut generate = Generate::new(daemon.channel.clone());
    let message = v1::Message { role: "user".into(), content: "Hello".into(), ..Default::default() };
    let chat = v1::Chat { messages: vec![message], ..Default::default() };
    let request = v1::TokenizeRequest { model: String::new(), prompt: Some(v1::tokenize_request::Prompt::Chat(chat)) };
    let reply = generate.tokenize(request).await.expect("tokens").into_inner();
    assert!(reply.model == MODEL && reply.ids.len() > 2 && reply.context_length > 0, "{reply:?}");
    let list = Models::new(daemon.channel.clone()).list(v1::ListRequest {}).await.expect("a list").into_inner();
    assert_eq!(list.default_model, MODEL);
    let model = list.models.iter().find(|model| model.id == MODEL).expect("the bundled model");
    assert_eq!((model.problem.as_str(), model.state(), &model.aliases[..]), ("", v1::model::State::NotLoaded, &["local".to_owned()][..]));
    assert_eq!(daemon.stats().await.model, None);
    let doctor = Admin::new(daemon.channel.clone()).doctor(v1::DoctorRequest {}).await.expect("a check-up").into_inner();
    assert!(doctor.settings.iter().any(|setting| setting.name == "threads" && setting.origin == "FLASH_THREADS"));
    assert!(doctor.checks.iter().any(|check| check.name == "socket" && check.ok), "{:?}", doctor.checks);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_be_refused_is_refused_before_the_first_event() {
    let daemon = Daemon::start(RawConfig { ctx: Some(Text::from("64")), ..Default::default() }).await;
    let check = async |request: v1::GenerateRequest, expected: &str, param: Option<&str>| {
        let status = daemon.generate(request).await.err().expect("a refusal");
        assert_eq!((code::of(&status), code::param(&status)), (Some(expected), param), "{status}");
        status.message().to_owned()
    };
    let unknown = check(v1::GenerateRequest { model: "gpt-9".into(), ..story(1) }, code::MODEL_NOT_FOUND, Some("model")).await;
    assert!(unknown.contains("`gpt-9`") && unknown.contains(MODEL), "{unknown}");
    let hot = v1::Sampling { temperature: Some(9.0), ..Default::default() };
    check(v1::GenerateRequest { sampling: Some(hot), ..story(1) }, code::INVALID_VALUE, Some("temperature")).await;
    let long = v1::generate_request::Prompt::Text("word ".repeat(100));
    let long = check(v1::GenerateRequest { prompt: Some(long), ..story(1) }, code::CONTEXT_LENGTH, Some("messages")).await;
    assert!(long.contains("maximum context length is 64 tokens"), "{long}");
    let tokens = v1::generate_request::Prompt::Tokens(v1::TokenIds { ids: vec![u32::MAX] });
    check(v1::GenerateRequest { prompt: Some(tokens), ..story(1) }, code::INVALID_VALUE, Some("prompt")).await;
    let empty = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(empty.path().join("config.json"), "{}").expect("a file");
    let path = empty.path().display().to_string();
    check(v1::GenerateRequest { model: path, ..story(1) }, code::MODEL_INVALID, Some("model")).await;
    assert_eq!(daemon.stats().await.requests.map(|requests| requests.refused), Some(5));
    daemon.generate(story(1)).await.expect("the next request is served").finish().await.1.expect("a reply");
    daemon.stop().await;
}

const TOOLS_TEMPLATE: &str = "{% for tool in tools %}<tool_call>{{ tool | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";

/// The bundled model in a folder of its own, with a template that shows tools.
fn with_tools() -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a temporary directory");
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(MODEL);
    let dir = copy.path().join(MODEL);
    std::fs::create_dir(&dir).expect("a folder");
    for file in std::fs::read_dir(bundled).expect("the model").flatten().filter(|file| file.path().is_file()) {
        std::fs::copy(file.path(), dir.join(file.file_name())).expect("a copy");
    }
    std::fs::write(dir.join("chat_template.jinja"), TOOLS_TEMPLATE).expect("a file");
    copy
}

fn tools_chat(mode: v1::tool_choice::Mode) -> v1::Chat {
    let parameters_json =
        r#"{"type":"object","properties":{"n":{"type":"integer","minimum":0,"maximum":9}},"required":["n"],"additionalProperties":false}"#;
    let tool = v1::Tool { name: "roll".into(), parameters_json: parameters_json.into(), ..Default::default() };
    v1::Chat {
        messages: vec![v1::Message { role: "user".into(), content: "Roll it.".into(), ..Default::default() }],
        tools: vec![tool],
        tool_choice: Some(v1::ToolChoice { mode: mode.into(), names: Vec::new(), single: true }),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_are_called_and_counted() {
    let daemon = Daemon::start(RawConfig::default()).await;
    let copy = with_tools();
    let model = copy.path().join(MODEL).display().to_string();
    let chat = tools_chat(v1::tool_choice::Mode::Required);
    let request =
        v1::GenerateRequest { model: model.clone(), prompt: Some(v1::generate_request::Prompt::Chat(chat.clone())), ..story(100) };
    let mut stream = daemon.generate(request).await.expect("accepted");
    let (mut name, mut arguments) = (String::new(), String::new());
    let (mut prompt_tokens, mut done) = (0, None);
    while let Some(event) = stream.next().await {
        match event {
            Event::Accepted(accepted) => prompt_tokens = accepted.prompt_tokens,
            Event::ToolCall(part) => {
                assert!(part.index == 0 && (part.name.is_empty() || name.is_empty()), "{part:?}");
                name += &part.name;
                arguments += &part.arguments;
            }
            Event::Text(text) => assert_eq!(text.text, ""),
            Event::Done(end) => done = Some(end),
            _ => {}
        }
    }
    assert_eq!((name.as_str(), done.expect("an end").finish()), ("roll", v1::done::Finish::ToolCalls));
    let arguments: serde_json::Value = serde_json::from_str(&arguments).expect("JSON");
    assert!(arguments["n"].as_u64().is_some_and(|n| n < 10), "{arguments}");

    let mut client = Generate::new(daemon.channel.clone());
    let mut count = async |chat: v1::Chat| {
        let request = v1::TokenizeRequest { model: model.clone(), prompt: Some(v1::tokenize_request::Prompt::Chat(chat)) };
        client.tokenize(request).await.expect("tokens").into_inner().ids.len()
    };
    assert_eq!(count(chat.clone()).await, prompt_tokens as usize);
    assert!(count(v1::Chat { tools: Vec::new(), ..chat }).await < prompt_tokens as usize);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_that_cannot_be_kept_are_refused() {
    let daemon = Daemon::start(RawConfig::default()).await;
    let check = async |request: v1::GenerateRequest, expected: &str, param: &str, says: &str| {
        let status = daemon.generate(request).await.err().expect("a refusal");
        assert_eq!((code::of(&status), code::param(&status)), (Some(expected), Some(param)), "{status}");
        assert!(status.message().contains(says), "{status}");
    };
    let format = |kind, strict| v1::GenerateRequest { format: Some(v1::Format { kind: Some(kind), strict }), ..story(40) };
    let odd = v1::format::Kind::JsonSchema(r#"{"type":"object","propertyNames":{"pattern":"^a"}}"#.into());
    check(format(odd.clone(), true), code::SCHEMA_NOT_SUPPORTED, "response_format", "propertyNames").await;
    check(format(v1::format::Kind::JsonSchema("[".into()), true), code::INVALID_VALUE, "response_format", "not JSON").await;
    check(format(v1::format::Kind::Regex("(".into()), true), code::SCHEMA_NOT_SUPPORTED, "response_format", "").await;
    let tools = v1::generate_request::Prompt::Chat(tools_chat(v1::tool_choice::Mode::Auto));
    check(v1::GenerateRequest { prompt: Some(tools), ..story(1) }, code::CHAT_TEMPLATE, "tools", "does not show them").await;
    let message = |role: &str| v1::Message { role: role.into(), content: "{".into(), ..Default::default() };
    let begun = v1::Chat { messages: vec![message("user"), message("assistant")], continue_final_message: true, ..Default::default() };
    let prompt = Some(v1::generate_request::Prompt::Chat(begun));
    let begun = v1::GenerateRequest { prompt, ..format(v1::format::Kind::JsonObject(true), false) };
    check(begun, code::INVALID_VALUE, "response_format", "goes on from a message").await;
    let (text, done) = daemon.generate(format(odd, false)).await.expect("accepted").finish().await;
    assert!(done.is_ok() && text.starts_with('{'), "{text}");
    let (text, done) = daemon.generate(format(v1::format::Kind::Regex("[0-9]{3}".into()), true)).await.expect("accepted").finish().await;
    assert!(done.is_ok_and(|done| done.finish() == v1::done::Finish::Stop) && text.len() == 3 && text.parse::<u32>().is_ok(), "{text}");
    let counted = |requests: v1::Requests| requests.grammar_s > 0.0 && requests.relaxed == 1;
    daemon.until("the time for grammars counts, and the laxer one", |snapshot| snapshot.requests.is_some_and(counted)).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_frees_its_place_and_a_full_queue_refuses() {
    let flags = RawConfig { parallel: Some(Text::from("1")), queue: Some(Text::from("1")), ..Default::default() };
    let daemon = Daemon::start(flags).await;
    let first = daemon.generate(endless()).await.expect("accepted").started().await;
    let second = daemon.generate(story(1)).await.expect("accepted");
    daemon.until("one running, one waiting", |snapshot| (running(snapshot), waiting(snapshot)) == (1, 1)).await;
    let held = |snapshot: &v1::Snapshot| snapshot.memory.map(|memory| (1..=memory.kv_blocks).contains(&memory.kv_busy_blocks));
    daemon.until("blocks are held", |snapshot| held(snapshot) == Some(true)).await;
    let full = daemon.generate(story(1)).await.err().expect("a refusal");
    assert_eq!(code::of(&full), Some(code::QUEUE_FULL));
    assert!(code::retry_after(&full).is_some_and(|seconds| (1..=60).contains(&seconds)), "{full}");
    // For what will never have room, there is nothing to wait for.
    let never = daemon.generate(v1::GenerateRequest { together: 3, ..story(1) }).await.err().expect("a refusal");
    assert_eq!((code::of(&never), code::param(&never), code::retry_after(&never)), (Some(code::INVALID_VALUE), Some("n"), None));
    assert!(never.message().contains("3 replies at once; this daemon has room for 2"), "{never}");
    // Counting tokens and listing models wait for nobody.
    let request = v1::TokenizeRequest { prompt: Some(v1::tokenize_request::Prompt::Text("Hello".into())), ..Default::default() };
    let reply = Generate::new(daemon.channel.clone()).tokenize(request).await.expect("tokens").into_inner();
    assert!(!reply.ids.is_empty());
    let list = Models::new(daemon.channel.clone()).list(v1::ListRequest {}).await.expect("a list").into_inner();
    assert!(list.models.iter().any(|model| model.state() == v1::model::State::Ready));
    daemon.until("both still there", |snapshot| (running(snapshot), waiting(snapshot)) == (1, 1)).await;
    // The running one leaves; the waiting one, which is not read from meanwhile, gets its place.
    drop(first);
    second.finish().await.1.expect("a reply");
    // One that waits leaves, too.
    let first = daemon.generate(endless()).await.expect("accepted").started().await;
    let waiting_one = daemon.generate(story(1)).await.expect("accepted");
    daemon.until("one waiting", |snapshot| (running(snapshot), waiting(snapshot)) == (1, 1)).await;
    drop(waiting_one);
    daemon.until("nobody waiting", |snapshot| (running(snapshot), waiting(snapshot)) == (1, 0)).await;
    drop(first);
    let snapshot = daemon.until("nobody running", |snapshot| running(snapshot) == 0).await;
    assert_eq!(snapshot.requests.map(|requests| (requests.cancelled, requests.refused)), Some((3, 2)));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_take_turns_and_each_keeps_its_order() {
    let flags = RawConfig { parallel: Some(Text::from("1")), ..Default::default() };
    let daemon = Daemon::start(flags).await;
    let of = |client: &str, request: v1::GenerateRequest| v1::GenerateRequest { client: client.into(), ..request };
    let running_one = daemon.generate(of("a", endless())).await.expect("accepted").started().await;
    let first = daemon.generate(of("a", story(1))).await.expect("accepted");
    let second = daemon.generate(of("a", story(1))).await.expect("accepted");
    let other = daemon.generate(of("b", endless())).await.expect("accepted");
    drop(running_one);
    // The one that came last runs before the second of a client that came first, and after its first.
    let other = other.started().await;
    first.finish().await.1.expect("a reply");
    daemon.until("the second still waiting", |snapshot| (running(snapshot), waiting(snapshot)) == (1, 1)).await;
    drop(other);
    second.finish().await.1.expect("a reply");
    daemon.stop().await;
}

/// What the gateway makes of `n`: as many requests, of which two run at a time.
#[tokio::test(flavor = "multi_thread")]
async fn four_replies_to_one_prompt_read_it_once() {
    const BLOCK: u32 = 32;
    let daemon = Daemon::start(RawConfig::default()).await;
    let prompt = "Once upon a time there was a little dog named Pip who lived by the river. ".repeat(8);
    let sampling = |seed| Some(v1::Sampling { temperature: Some(1.0), seed: Some(seed), ..Default::default() });
    let prompt = v1::generate_request::Prompt::Text(prompt);
    let request = |seed| v1::GenerateRequest { prompt: Some(prompt.clone()), sampling: sampling(seed), ..story(4) };
    let mut streams = Vec::new();
    for seed in 0..4 {
        streams.push(daemon.generate(request(seed)).await.expect("accepted"));
    }
    let (mut cached, mut texts, mut whole) = (Vec::new(), Vec::new(), 0);
    for stream in streams {
        let (text, done) = stream.finish().await;
        let usage = done.expect("a reply").usage.expect("usage");
        // The last token is always computed, for its logits.
        whole = (usage.prompt_tokens - 1) / BLOCK * BLOCK;
        cached.push(usage.cached_tokens);
        texts.push(text);
    }
    assert!(whole > 3 * BLOCK);
    assert_eq!(cached, [0, whole, whole, whole]);
    texts.dedup();
    assert!(texts.len() > 1, "seeds differ: {texts:?}");
    daemon.stop().await;
}

/// A daemon started by hand told of the log that an earlier one had left.
#[tokio::test(flavor = "multi_thread")]
async fn only_its_own_log_is_named() {
    for log_file in [false, true] {
        let daemon = Daemon::start(RawConfig { log_file, ..Default::default() }).await;
        let log = daemon.home.path().join("log/flashd.log");
        std::fs::create_dir_all(log.parent().expect("a folder")).expect("created");
        std::fs::write(&log, "of an earlier daemon").expect("written");
        let version = Admin::new(daemon.channel.clone()).version(v1::VersionRequest {}).await.expect("a version").into_inner();
        assert_eq!(version.log_path, if log_file { log.display().to_string() } else { String::new() });
        daemon.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_changes_and_unloads() {
    let daemon = Daemon::start(RawConfig { keep_alive: Some(Text::from("-1")), ..Default::default() }).await;
    let load = async |request: v1::LoadRequest| {
        let reply = Models::new(daemon.channel.clone()).load(request).await.expect("a load").into_inner();
        (reply.loaded_now, reply.cache.map_or(0, |cache| cache.slots_per_layer), reply.warnings.len())
    };
    let (now, all, warnings) = load(v1::LoadRequest::default()).await;
    assert!(now && all > 8 && warnings == 0);
    assert_eq!(load(v1::LoadRequest { expert_cache: Some("25%".into()), ..Default::default() }).await, (false, all / 4, 0));
    let (now, few, warnings) = load(v1::LoadRequest { expert_cache: Some("2%".into()), ..Default::default() }).await;
    assert!(!now && few < 8 && warnings == 1, "{few} {warnings}");
    let doctor = Admin::new(daemon.channel.clone()).doctor(v1::DoctorRequest {}).await.expect("a check-up").into_inner();
    let setting = doctor.settings.iter().find(|setting| setting.name == "expert_cache").expect("the setting");
    assert_eq!((setting.value.as_str(), setting.origin.as_str()), ("2%", "a load request"));

    // A cap that nothing can be loaded with is refused, by a loaded model and by one that is not, and does not stay.
    for _ in 0..2 {
        let tight = v1::LoadRequest { memory: Some("2MiB".into()), ..Default::default() };
        let status = Models::new(daemon.channel.clone()).load(tight).await.expect_err("too little");
        assert!(status.message().contains("bytes are needed (weights"), "{status:?}");
        daemon.unload(false).await;
    }
    assert!(load(v1::LoadRequest::default()).await.0);

    // Unload waits for the running request, force does not.
    let stream = daemon.generate(story(64)).await.expect("accepted").started().await;
    let (unloaded, reply) = tokio::join!(daemon.unload(false), stream.finish());
    assert!(unloaded);
    assert_eq!(reply.1.expect("a whole reply").token_ids.len(), 64);
    assert!(!daemon.unload(false).await);
    let stream = daemon.generate(endless()).await.expect("accepted").started().await;
    let (unloaded, reply) = tokio::join!(daemon.unload(true), stream.finish());
    assert!(unloaded);
    assert_eq!(reply.1.expect_err("cut off").code, code::CANCELLED);

    // A new context length means a new start; keep_alive 0 ends it after the request.
    assert!(load(v1::LoadRequest { context_length: Some("128".into()), ..Default::default() }).await.0);
    assert!(!load(v1::LoadRequest { context_length: Some("128".into()), ..Default::default() }).await.0);
    assert!(load(v1::LoadRequest { context_length: Some("64".into()), ..Default::default() }).await.0);
    let own = || Some("default".into());
    let all_own = v1::LoadRequest { expert_cache: own(), memory: own(), context_length: own(), keep_alive: own(), ..Default::default() };
    assert_eq!(load(all_own.clone()).await, (true, all, 0), "the configured settings are back");
    assert!(!load(all_own).await.0 && !load(v1::LoadRequest { context_length: Some("auto".into()), ..Default::default() }).await.0);
    let doctor = Admin::new(daemon.channel.clone()).doctor(v1::DoctorRequest {}).await.expect("a check-up").into_inner();
    assert!(doctor.settings.iter().all(|setting| setting.origin != "a load request"), "{doctor:?}");
    let brief = v1::GenerateRequest { keep_alive: Some("0".into()), ..story(4) };
    daemon.generate(brief).await.expect("accepted").finish().await.1.expect("a reply");
    daemon.until("an empty daemon", |snapshot| snapshot.model.is_none()).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_waits_for_the_one_that_runs() {
    let daemon = Daemon::start(RawConfig::default()).await;
    // The same checkpoint at another path is another model.
    let copy = tempfile::tempdir().expect("a temporary directory");
    let other = copy.path().join("other");
    std::fs::create_dir(&other).expect("a folder");
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(MODEL)).expect("the model").flatten() {
        if file.file_type().is_ok_and(|kind| kind.is_file()) {
            std::fs::copy(file.path(), other.join(file.file_name())).expect("a copy");
        }
    }
    let first = daemon.generate(endless()).await.expect("accepted").started().await;
    let request = v1::GenerateRequest { model: other.display().to_string(), ..story(4) };
    let (second, ()) = tokio::join!(daemon.generate(request), async {
        daemon.until("one in line", |snapshot| (running(snapshot), waiting(snapshot)) == (1, 1)).await;
        drop(first);
    });
    let mut second = second.expect("accepted");
    let Some(Event::Accepted(accepted)) = second.next().await else { panic!("the first event is Accepted") };
    assert_eq!(accepted.model, "other");
    second.finish().await.1.expect("a reply");
    assert_eq!(daemon.stats().await.model.map(|model| model.id).as_deref(), Some("other"));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_running_requests_finish_and_refuses_new_ones() {
    let mut daemon = Daemon::start(RawConfig::default()).await;
    let stream = daemon.generate(story(400)).await.expect("accepted").started().await;
    let mut watching =
        Admin::new(daemon.channel.clone()).watch_stats(v1::WatchStatsRequest::default()).await.expect("a stream").into_inner();
    drop(daemon.stop.take());
    let refused = async {
        loop {
            match daemon.generate(endless()).await {
                Ok(stream) => drop(stream),
                Err(status) => return status,
            }
        }
    };
    assert_eq!(code::of(&timeout(PATIENCE, refused).await.expect("a refusal")), Some(code::DRAINING));
    assert_eq!(stream.finish().await.1.expect("a whole reply").token_ids.len(), 400);
    // A stream that would never end by itself is ended.
    while let Ok(Some(_)) = timeout(PATIENCE, watching.message()).await.expect("an end") {}
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_without_grace_cuts_requests_off() {
    let daemon = Daemon::start(RawConfig::default()).await;
    let stream = daemon.generate(endless()).await.expect("accepted").started().await;
    Admin::new(daemon.channel.clone()).shutdown(v1::ShutdownRequest { grace_ms: 0 }).await.expect("an answer");
    assert_eq!(stream.finish().await.1.expect_err("cut off").code, code::DRAINING);
    timeout(PATIENCE, daemon.running).await.expect("an end in time").expect("no panic").expect("a clean end");
}

#[test]
fn the_checkout_is_the_last_place_models_are_looked_for() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let env = |name: &str| match name {
        "FLASH_HOME" => Some(OsString::from(home.path())),
        "FLASH_SOCKET" => Some(OsString::from("s")),
        _ => None,
    };
    let config = Config::resolve(RawConfig::default(), &env).expect("a good configuration");
    let last: PathBuf = config.model_roots.last().expect("a root").clone();
    assert!(last.join(MODEL).join("config.json").is_file(), "{last:?}");
}
