//! Streams: framing, heartbeats, joining of fast text, and the end when the client goes away or stops reading.
//! Knows no dialect: each one hands over a writer of [`Item`]s.

use std::{convert::Infallible, sync::Arc};

use axum::body::{Body, Bytes};
use flash_proto::v1::{self, generate_event::Event};
use serde::Serialize;
use tokio::{
    sync::mpsc,
    time::{Duration, Instant, sleep_until, timeout},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use crate::{
    App,
    error::{Code, Failure},
    upstream::Feeds,
};

/// Frames between the generation and the connection; a full channel pauses the sequence in the engine.
const FRAMES: usize = 8;

/// What a dialect is asked to write.
pub(crate) enum Item<'a> {
    /// Of the choice with this index.
    Event(usize, &'a Event),
    Heartbeat,
    /// The last thing: the status line has gone out already.
    Failed(&'a Failure),
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain data is always JSON")
}

/// Appends one `data:` event.
pub(crate) fn data(value: &impl Serialize, out: &mut String) {
    out.extend(["data: ", &json(value), "\n\n"]);
}

/// Appends one event that has a name, too.
pub(crate) fn named(name: &str, value: &impl Serialize, out: &mut String) {
    out.extend(["event: ", name, "\ndata: ", &json(value), "\n\n"]);
}

/// Appends what nobody reads and everybody receives.
pub(crate) fn comment(out: &mut String) {
    out.push_str(": keepalive\n\n");
}

/// The end of OpenAI's older streams.
pub(crate) const DONE: &str = "data: [DONE]\n\n";

/// Appends a line of JSON, which is how Ollama streams.
pub(crate) fn line(value: &impl Serialize, out: &mut String) {
    out.extend([&json(value), "\n"]);
}

/// The body of a stream, which begins with the events in `early`. The generation runs in a task of its own, which ends as
/// soon as the body is dropped.
pub(crate) fn stream(
    app: &Arc<App>,
    feeds: Feeds,
    early: Vec<(usize, Event)>,
    write: impl FnMut(Item<'_>, &mut String) + Send + 'static,
) -> Body {
    let (sender, receiver) = mpsc::channel(FRAMES);
    let joiners = (0..feeds.len()).map(|_| Joiner::new(app.config.timing.coalesce)).collect();
    let pump = Pump { app: app.clone(), feeds, joiners, sender, write };
    tokio::spawn(pump.run(early));
    Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>))
}

struct Pump<W> {
    app: Arc<App>,
    feeds: Feeds,
    /// One for each choice.
    joiners: Vec<Joiner>,
    sender: mpsc::Sender<Bytes>,
    write: W,
}

impl<W: FnMut(Item<'_>, &mut String)> Pump<W> {
    async fn run(mut self, early: Vec<(usize, Event)>) {
        let mut out = String::new();
        // A client that waits already hears at once that it is not forgotten.
        let mut heartbeat = Instant::now();
        if early.iter().any(|(_, event)| matches!(event, Event::Accepted(_))) {
            heartbeat += self.app.config.timing.heartbeat;
        }
        for (choice, event) in early {
            (self.write)(Item::Event(choice, &event), &mut out);
        }
        let mut over = self.feeds.over();
        while self.send(&mut out).await && !over {
            let flush = self.joiners.iter().filter_map(Joiner::flush_at).min();
            tokio::select! {
                biased;
                () = self.sender.closed() => return,
                () = self.app.cut.cancelled() => {
                    self.feeds.reason("shutdown");
                    over = true;
                    self.fail(&Failure::new(Code::Draining, "the gateway is shutting down"), &mut out);
                }
                event = self.feeds.next() => {
                    match event {
                        Ok((choice, event)) => {
                            self.event(choice, event, &mut out);
                            over = self.feeds.over();
                        }
                        Err(failure) => {
                            over = true;
                            self.fail(&failure, &mut out);
                        }
                    }
                }
                () = sleep_until(flush.unwrap_or_else(Instant::now)), if flush.is_some() => self.flush_due(&mut out),
                () = sleep_until(heartbeat) => (self.write)(Item::Heartbeat, &mut out),
            }
            if !out.is_empty() {
                heartbeat = Instant::now() + self.app.config.timing.heartbeat;
            }
        }
    }

    fn event(&mut self, choice: usize, event: Event, out: &mut String) {
        match event {
            Event::Text(text) => {
                if let Some(text) = self.joiners[choice].add(text, Instant::now()) {
                    (self.write)(Item::Event(choice, &Event::Text(text)), out);
                }
            }
            event => {
                self.flush(choice, out);
                (self.write)(Item::Event(choice, &event), out);
            }
        }
    }

    fn fail(&mut self, failure: &Failure, out: &mut String) {
        (0..self.joiners.len()).for_each(|choice| self.flush(choice, out));
        (self.write)(Item::Failed(failure), out);
    }

    fn flush_due(&mut self, out: &mut String) {
        let now = Instant::now();
        for choice in 0..self.joiners.len() {
            if self.joiners[choice].flush_at().is_some_and(|at| at <= now) {
                self.flush(choice, out);
            }
        }
    }

    fn flush(&mut self, choice: usize, out: &mut String) {
        if let Some(text) = self.joiners[choice].take() {
            (self.write)(Item::Event(choice, &Event::Text(text)), out);
        }
    }

    /// False when there is nobody to read on.
    async fn send(&mut self, out: &mut String) -> bool {
        if out.is_empty() {
            return true;
        }
        match timeout(self.app.config.timing.write_stall, self.sender.send(std::mem::take(out).into())).await {
            Ok(sent) => sent.is_ok(),
            Err(_) => {
                self.feeds.reason("stalled");
                false
            }
        }
    }
}

/// Above this rate, text is held for a moment and joined: 100 events a second.
const FAST: Duration = Duration::from_millis(10);

/// Joins texts that follow each other quickly, so that a fast model does not pay a packet per token.
struct Joiner {
    hold: Duration,
    last: Option<Instant>,
    held: Option<(v1::Text, Instant)>,
}

impl Joiner {
    fn new(hold: Duration) -> Self {
        Self { hold, last: None, held: None }
    }

    fn flush_at(&self) -> Option<Instant> {
        self.held.as_ref().map(|(_, at)| *at)
    }

    /// The text to send now, if any.
    fn add(&mut self, text: v1::Text, now: Instant) -> Option<v1::Text> {
        let fast = self.last.replace(now).is_some_and(|last| now - last < FAST);
        match &mut self.held {
            Some((held, _)) if held.channel != text.channel => {
                let before = self.take();
                self.held = Some((text, now + self.hold));
                before
            }
            Some((held, at)) => {
                held.text.push_str(&text.text);
                held.logprobs.extend(text.logprobs);
                if now >= *at { self.take() } else { None }
            }
            None if fast && !self.hold.is_zero() => {
                self.held = Some((text, now + self.hold));
                None
            }
            None => Some(text),
        }
    }

    fn take(&mut self) -> Option<v1::Text> {
        self.held.take().map(|(text, _)| text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_text_is_joined_and_slow_text_is_not() {
        // What is in brackets is reasoning.
        let check = |arrivals: &[(u64, &str)], wanted: &[&str]| {
            let start = Instant::now();
            let mut joiner = Joiner::new(Duration::from_millis(20));
            let mut sent: Vec<String> = Vec::new();
            for &(ms, text) in arrivals {
                let now = start + Duration::from_millis(ms);
                if joiner.flush_at().is_some_and(|at| at < now) {
                    sent.extend(joiner.take().map(|text| text.text));
                }
                let channel = i32::from(text.starts_with('['));
                sent.extend(joiner.add(v1::Text { text: text.into(), logprobs: Vec::new(), channel }, now).map(|text| text.text));
            }
            sent.extend(joiner.take().map(|text| text.text));
            assert_eq!(sent, wanted);
        };
        check(&[(0, "a"), (10, "b"), (20, "c")], &["a", "b", "c"]);
        check(&[(0, "a"), (5, "b"), (10, "c"), (15, "d"), (25, "e"), (26, "f")], &["a", "bcde", "f"]);
        check(&[(0, "a"), (5, "b"), (60, "c")], &["a", "b", "c"]);
        check(&[(0, "[a]"), (5, "[b]"), (6, "[c]"), (7, "d"), (8, "e"), (9, "[f]")], &["[a]", "[b][c]", "de", "[f]"]);
    }
}
