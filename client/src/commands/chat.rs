//! `flashctl chat`: a conversation that lives here and is sent whole with every message. Ctrl-C stops an answer, not the
//! program; nothing is left out of the conversation unless the user says so.

mod clipboard;
mod conversation;
mod keeping;
mod lines;
mod saved;
mod slash;
mod writing;

use std::{
    future::Future,
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use flash_proto::v1::{
    Format, ListRequest, LoadResponse, ShowRequest, StatsRequest, TokenizeRequest, TokenizeResponse, done::Finish,
    generate_request::Prompt, tokenize_request,
};
use tokio::signal::unix::Signal;

use self::{
    conversation::{Conversation, Turn},
    lines::{Line, Lines},
    saved::Session,
    slash::{Input, Show},
};
use super::{models, run, terminations};
use crate::{
    args::{ChatArgs, Generation, Global, Settings, Thinking},
    connect::{self, Daemon},
    failure::{Failure, exit},
    load, render,
    reply::{self, Reply, Said, Thoughts},
    term::{self, Paint},
};

/// A second Ctrl-C at an empty prompt within this time leaves.
const SECOND_INTERRUPT: Duration = Duration::from_secs(2);

pub(crate) async fn run(args: ChatArgs, global: &Global) -> Result<(), Failure> {
    if global.json {
        return Err(Failure::new(exit::USAGE, "usage", "a chat has no --json").hint("`flashctl run MODEL PROMPT --json` answers in JSON"));
    }
    let mut terminate = terminations()?;
    let mut lines = Lines::open(!args.no_history)?;
    tokio::select! {
        outcome = converse(args, global, &mut lines) => outcome,
        _ = terminate.recv() => Err(Failure::silent(exit::SIGTERM)),
    }
}

async fn converse(args: ChatArgs, global: &Global, lines: &mut Lines) -> Result<(), Failure> {
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
        .map_err(|error| Failure::new(exit::INTERNAL, "signals", format!("cannot listen for signals: {error}")))?;
    let mut chat = Chat::begin(args, global, &mut interrupt).await?;
    chat.greet();
    *lines.models.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = chat.model_names().await;
    let mut last_interrupt: Option<Instant> = None;
    loop {
        match next_input(lines, &mut interrupt).await? {
            Asked::Leave => return Ok(()),
            Asked::Interrupt { at_empty_prompt } => {
                if at_empty_prompt && last_interrupt.replace(Instant::now()).is_some_and(|then| then.elapsed() < SECOND_INTERRUPT) {
                    return Err(Failure::silent(exit::SIGINT));
                }
                if at_empty_prompt {
                    term::note(&Paint::stderr().dim("Ctrl-C again or Ctrl-D leaves, /help lists commands"));
                }
            }
            Asked::Input(Input::Exit) => return Ok(()),
            Asked::Input(input) => chat.obey(input, &mut interrupt).await?,
        }
    }
}

fn turns_text(turns: usize) -> String {
    if turns == 1 { "1 turn".into() } else { format!("{turns} turns") }
}

enum Asked {
    Input(Input),
    Interrupt { at_empty_prompt: bool },
    Leave,
}

/// One line, or all the lines between two `"""`.
async fn next_input(lines: &mut Lines, interrupt: &mut Signal) -> Result<Asked, Failure> {
    let mut open: Option<String> = None;
    loop {
        let prompt = if open.is_none() { ">>> " } else { "... " };
        let terminal = lines.at_terminal();
        let line = {
            let mut read = std::pin::pin!(lines.read(prompt));
            loop {
                tokio::select! {
                    line = &mut read => break line?,
                    // At a terminal it was meant for the answer that had just ended. Off one there is no line to go back to.
                    _ = interrupt.recv() => if !terminal { return Err(Failure::silent(exit::SIGINT)) },
                }
            }
        };
        let text = match (line, &mut open) {
            (Line::End, _) => return Ok(Asked::Leave),
            (Line::Interrupt(empty), open) => return Ok(Asked::Interrupt { at_empty_prompt: empty && open.is_none() }),
            (Line::Text(text), None) => match slash::parse(&text) {
                Input::Open(text) => {
                    open = Some(text);
                    continue;
                }
                input => return Ok(Asked::Input(input)),
            },
            (Line::Text(text), Some(_)) => text,
        };
        let so_far = open.take().unwrap_or_default();
        let joined = if so_far.is_empty() { text } else { format!("{so_far}\n{text}") };
        match joined.trim_end().strip_suffix(slash::QUOTES) {
            Some(whole) => return Ok(Asked::Input(slash::say(whole.trim_end_matches('\n')))),
            None => open = Some(joined),
        }
    }
}

struct Chat<'a> {
    global: &'a Global,
    /// Absent after it went away; the next message starts another.
    daemon: Option<Daemon>,
    model: String,
    loaded: LoadResponse,
    generation: Generation,
    thinking: Thinking,
    settings: Settings,
    format: Option<Format>,
    show_stats: bool,
    talk: Conversation,
    /// As the command line has it, to which /reset goes back.
    begun: (Generation, Thinking, Option<Format>, Settings),
    /// Where the conversation is kept; absent: nowhere.
    session: Option<Session>,
    /// Contents of files that go with the next message.
    files: Vec<String>,
    last: Option<Reply>,
}

/// What became of something that Ctrl-C may stop.
enum Ended<T> {
    Whole(T),
    Stopped,
}

async fn until_interrupt<T>(work: impl Future<Output = T>, interrupt: &mut Signal) -> Ended<T> {
    tokio::select! {
        whole = work => Ended::Whole(whole),
        _ = interrupt.recv() => Ended::Stopped,
    }
}

impl<'a> Chat<'a> {
    async fn begin(args: ChatArgs, global: &'a Global, interrupt: &mut Signal) -> Result<Self, Failure> {
        let (session, saved) = keeping::open(&args)?;
        let format = args.format.as_deref().map(run::format).transpose()?;
        let files = args.file.iter().map(|path| run::read_file(path)).collect::<Result<_, _>>()?;
        let model = args.model.clone().or_else(|| Some(saved.as_ref()?.model.clone())).unwrap_or_else(|| "local".into());
        let ready = async {
            let daemon = connect::connect(global).await?;
            let loaded = load::load(&daemon, &model, &args.settings, global).await?;
            Ok::<_, Failure>((daemon, loaded))
        };
        let Ended::Whole(ready) = until_interrupt(ready, interrupt).await else { return Err(Failure::silent(exit::SIGINT)) };
        let (daemon, loaded) = ready?;
        let ChatArgs { system, generation, thinking, settings, stats, .. } = args;
        let begun = (generation.clone(), thinking.clone(), format.clone(), settings.clone());
        let mut chat = Self {
            global,
            daemon: Some(daemon),
            model,
            loaded,
            generation,
            thinking,
            settings,
            format,
            show_stats: stats,
            talk: Conversation { system, ..Conversation::default() },
            begun,
            session,
            files,
            last: None,
        };
        if let Some(saved) = saved {
            chat.take_over(saved);
        }
        Ok(chat)
    }

    fn greet(&self) {
        if self.global.quiet || !io::stdin().is_terminal() {
            return;
        }
        let model = self.loaded.model.as_ref();
        let facts = model.map(|m| format!("{} · {} · context {} · ", m.id, m.quantization, m.context_length)).unwrap_or_default();
        term::note(&Paint::stderr().dim(&format!("{facts}/help lists commands, Ctrl-D leaves")));
        if !self.talk.is_empty() {
            term::note(&Paint::stderr().dim(&self.where_it_stands()));
        }
    }

    async fn model_names(&self) -> Vec<String> {
        let Some(daemon) = &self.daemon else { return Vec::new() };
        let listed = daemon.models().list(ListRequest {}).await.map(|list| list.into_inner().models).unwrap_or_default();
        listed.into_iter().filter(|model| model.problem.is_empty()).map(|model| model.id).collect()
    }

    /// Only a failure to write to standard output ends the chat; anything else is said, and the next line may do better.
    async fn obey(&mut self, input: Input, interrupt: &mut Signal) -> Result<(), Failure> {
        let outcome = match input {
            Input::Nothing | Input::Exit | Input::Open(_) => Ok(()),
            Input::Say(text) => {
                let whole = run::join_prompt(&[text], &std::mem::take(&mut self.files), None);
                self.say(whole.unwrap_or_default(), interrupt).await
            }
            Input::Edit => self.edit_last(interrupt).await,
            Input::File(path) => self.attach(&path),
            Input::Copy => self.copy().await,
            Input::Think(how) => self.think(how.as_deref()),
            Input::Format(what) => self.hold(what.as_deref()),
            Input::Save(name) => self.save(name.as_deref()),
            Input::Load(None) => keeping::list(),
            Input::Load(Some(name)) => self.load(&name, interrupt).await,
            Input::Retry => match self.talk.undo() {
                Some(text) => self.say(text, interrupt).await,
                None => self.tell("there is nothing to retry"),
            },
            Input::Stats => self.stats().await,
            Input::Models => models::run(self.global).await,
            Input::Model(Some(name)) => self.reload(name, self.settings.clone(), interrupt).await,
            Input::Model(None) => self.show_model(),
            Input::Set(Some((name, value))) => self.set(&name, &value, interrupt).await,
            Input::Set(None) => term::println(&conversation::parameters(&self.generation, &self.settings)),
            Input::Show(what) => self.show(what).await,
            Input::Help => term::println(&slash::help()),
            Input::Wrong(why) => self.tell(&why),
            Input::Reset if self.settings != self.begun.3 => {
                self.change(Input::Reset)?;
                self.reload(self.model.clone(), self.settings.clone().back_to(&self.begun.3), interrupt).await
            }
            other => self.change(other),
        };
        match outcome {
            Err(failure) if failure.message.is_empty() || failure.code == "output" => Err(failure),
            Err(failure) => {
                if failure.exit == exit::UNAVAILABLE {
                    self.daemon = None;
                }
                let failure = failure.or_hint("chat");
                let hint = failure.hint.map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
                self.tell(&format!("{} {}{hint}", Paint::stderr().bad("error:"), failure.message))
            }
            Ok(()) => Ok(()),
        }
    }

    /// What changes the conversation without the daemon.
    fn change(&mut self, input: Input) -> Result<(), Failure> {
        let outcome = match input {
            Input::Reset => {
                self.files.clear();
                self.talk = Conversation::default();
                (self.generation, self.thinking, self.format, _) = self.begun.clone();
                let kept = self.part();
                self.tell(&format!(
                    "the conversation and the system prompt are forgotten, the parameters are as this chat began with{kept}"
                ))
            }
            Input::Drop(turns) => {
                let dropped = self.talk.drop_oldest(turns);
                let unsent = if self.talk.unsent.is_some() { "; /retry sends the last message" } else { "" };
                self.tell(&format!("forgot {}, {} left{unsent}", turns_text(dropped), turns_text(self.talk.turns.len())))
            }
            Input::Undo => match self.talk.undo() {
                Some(text) => self.tell(&format!("forgot: {}", text.lines().next().unwrap_or_default())),
                None => self.tell("there is nothing to undo"),
            },
            Input::System(text) => {
                self.talk.system = text;
                self.tell(if self.talk.system.is_some() { "the system prompt is set" } else { "there is no system prompt now" })
            }
            _ => {
                self.talk.clear();
                self.files.clear();
                let kept = self.part();
                self.tell(&format!("the conversation is forgotten{kept}"))
            }
        };
        self.keep();
        outcome
    }

    fn tell(&self, text: &str) -> Result<(), Failure> {
        term::note(&Paint::stderr().dim(text));
        Ok(())
    }

    async fn daemon(&mut self) -> Result<Daemon, Failure> {
        if let Some(daemon) = &self.daemon {
            return Ok(daemon.clone());
        }
        let daemon = connect::connect(self.global).await?;
        self.loaded = load::load(&daemon, &self.model, &self.settings, self.global).await?;
        self.daemon = Some(daemon.clone());
        Ok(daemon)
    }

    /// Sends the conversation with `text` at its end, unless that does not fit.
    async fn say(&mut self, text: String, interrupt: &mut Signal) -> Result<(), Failure> {
        self.talk.unsent = Some(text.clone());
        self.keep();
        let asked = async {
            let daemon = self.daemon().await?;
            let size = self.measure(&daemon, Some(&text)).await?;
            Ok::<_, Failure>((daemon, size))
        };
        let Ended::Whole(asked) = until_interrupt(asked, interrupt).await else { return self.tell("stopped; /retry sends the message") };
        let (daemon, size) = asked?;
        let (used, limit) = (size.ids.len(), size.context_length as usize);
        if used >= limit {
            let turns = turns_text(self.talk.turns.len());
            return self.tell(&format!(
                "not sent: with this message the conversation has {used} tokens and the context holds {limit}.\n\
                 /drop forgets the oldest of {turns} (then /retry), /clear all of them; --ctx or /set ctx may allow more"
            ));
        }
        let mut reply = Reply::default();
        let prompt = Prompt::Chat(reply::thinking_chat(self.talk.messages(Some(&text)), &self.thinking));
        let mut request = reply::request(&load::name_there(&self.model, self.global), prompt, &self.generation);
        request.format.clone_from(&self.format);
        let mut thoughts = Thoughts::new(&self.thinking);
        let mut sink = |said: Said<'_>| match said {
            Said::Text(text) => {
                thoughts.close();
                term::print(text)
            }
            Said::Reasoning(text) => {
                thoughts.say(text);
                Ok(())
            }
            Said::Accepted(_) | Said::Routing(_) => Ok(()),
        };
        let received = reply::receive(&daemon, request, self.global, &mut reply, &mut sink);
        let ended = until_interrupt(received, interrupt).await;
        thoughts.close();
        if !reply.text.is_empty() && !reply.text.ends_with('\n') {
            term::print("\n")?;
        }
        if let Ended::Whole(Err(failure)) = ended {
            // The text that came is on the screen but is no answer; /retry asks again.
            return Err(failure);
        }
        self.talk.unsent = None;
        self.talk.turns.push(Turn { user: text, assistant: reply.text.clone() });
        self.keep();
        self.conclude(&daemon, reply, used, limit).await
    }

    /// Says how full the context is, and why an answer ended early.
    async fn conclude(&mut self, daemon: &Daemon, reply: Reply, prompt_tokens: usize, limit: usize) -> Result<(), Failure> {
        let (used, note) = match &reply.done {
            Some(done) => {
                let usage = done.usage.unwrap_or_default();
                let used = (usage.prompt_tokens + usage.completion_tokens) as usize;
                let note = match done.finish() {
                    Finish::Length if used >= limit => " the context is full: /drop forgets the oldest turn, /clear all",
                    Finish::Length => " ended by max_tokens",
                    Finish::ToolCalls => " asks for a tool",
                    Finish::Stop => "",
                };
                (used, note)
            }
            None => (self.measure(daemon, None).await.map_or(prompt_tokens, |size| size.ids.len()), " stopped"),
        };
        self.tell(&format!("[{used}/{limit} tokens]{note}"))?;
        if self.show_stats && reply.done.is_some() {
            self.tell(&render::summary(&reply, &self.loaded))?;
        }
        self.last = Some(reply);
        Ok(())
    }

    async fn measure(&self, daemon: &Daemon, next: Option<&str>) -> Result<TokenizeResponse, Failure> {
        let prompt = tokenize_request::Prompt::Chat(reply::thinking_chat(self.talk.messages(next), &self.thinking));
        let request = TokenizeRequest { model: load::name_there(&self.model, self.global), prompt: Some(prompt) };
        let size = daemon.generate().tokenize(request).await;
        Ok(size.map_err(|status| daemon.failure(&status, "counting tokens"))?.into_inner())
    }

    async fn set(&mut self, name: &str, value: &str, interrupt: &mut Signal) -> Result<(), Failure> {
        let mut settings = self.settings.clone();
        match conversation::set(&mut self.generation, &mut settings, name, value) {
            Ok(true) => self.reload(self.model.clone(), settings, interrupt).await,
            Ok(false) => self.tell(&format!("{name} is {value}")),
            Err(why) => self.tell(&why),
        }
    }

    /// Another model, or other settings of the daemon; the old ones stay if that fails.
    async fn reload(&mut self, model: String, settings: Settings, interrupt: &mut Signal) -> Result<(), Failure> {
        let daemon = self.daemon().await?;
        let loading = load::load(&daemon, &model, &settings, self.global);
        let Ended::Whole(loaded) = until_interrupt(loading, interrupt).await else { return self.tell("stopped") };
        (self.loaded, self.model, self.settings) = (loaded?, model, settings.kept());
        self.show_model()
    }

    fn show_model(&self) -> Result<(), Failure> {
        let Some(model) = &self.loaded.model else { return Ok(()) };
        let cache = self.loaded.cache.as_ref().map(|cache| render::cache_size(cache, Some(model.experts))).unwrap_or_default();
        let facts =
            format!("{} · {} · {} · context {}", model.id, model.quantization, render::bytes(model.size_bytes), model.context_length);
        term::println(&format!("{facts} · expert cache {cache}"))
    }

    async fn show(&mut self, what: Show) -> Result<(), Failure> {
        if matches!(what, Show::All | Show::Info) {
            self.show_model()?;
        }
        if matches!(what, Show::All | Show::System) {
            term::println(&format!("system: {}", self.talk.system.as_deref().unwrap_or("none")))?;
        }
        if matches!(what, Show::All | Show::Info) {
            term::println(&self.where_it_stands())?;
        }
        if matches!(what, Show::All | Show::Params) {
            term::println(&conversation::parameters(&self.generation, &self.settings))?;
        }
        if what == Show::Template {
            let daemon = self.daemon().await?;
            let shown = daemon.models().show(ShowRequest { model: load::name_there(&self.model, self.global) }).await;
            let template = shown.map_err(|status| daemon.failure(&status, "answering"))?.into_inner().chat_template;
            term::println(if template.is_empty() { "the model has no chat template" } else { template.trim_end() })?;
        }
        Ok(())
    }

    async fn stats(&mut self) -> Result<(), Failure> {
        let daemon = self.daemon().await?;
        let stats = daemon.admin().stats(StatsRequest {}).await.map_err(|status| daemon.failure(&status, "answering"))?;
        term::println(&render::snapshot(&stats.into_inner(), Paint::stdout()))?;
        match &self.last {
            Some(reply) if reply.done.is_some() => term::println(&format!("last answer: {}", render::summary(reply, &self.loaded))),
            _ => Ok(()),
        }
    }
}
