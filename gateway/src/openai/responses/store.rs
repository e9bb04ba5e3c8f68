//! Earlier responses, so that a client can go on from one by its id: in memory, bounded in number, bytes and age, the
//! longest unused first to go. Everyone finds only their own. They are kept as bytes: trees of them would take several times the
//! memory, in blocks so small that each holds a page of what was freed around it.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use flash_proto::v1;
use prost::Message;
use serde_json::Value;

const COUNT_MAX: usize = 256;
const BYTES_MAX: usize = 64 << 20;
const AGE_MAX: Duration = Duration::from_secs(3600);

#[derive(Debug)]
pub(crate) struct Stored {
    /// Whose it is.
    pub(crate) client: String,
    id: String,
    /// JSON, as it was sent.
    pub(crate) response: Box<str>,
    /// Its own input: a list of items, JSON.
    pub(crate) input: Box<str>,
    /// A [`v1::Chat`].
    messages: Box<[u8]>,
}

impl Stored {
    /// `messages`: the conversation up to and with the response, without instructions.
    pub(crate) fn new(client: String, response: &Value, messages: Vec<v1::Message>, input: &str) -> Self {
        let id = response["id"].as_str().unwrap_or_default().to_owned();
        let messages = v1::Chat { messages, ..Default::default() }.encode_to_vec().into();
        Self { client, id, response: response.to_string().into(), input: input.into(), messages }
    }

    pub(crate) fn messages(&self) -> Vec<v1::Message> {
        v1::Chat::decode(&*self.messages).expect("it was encoded above").messages
    }

    /// One of what it was asked with and answered.
    pub(crate) fn item(&self, id: &str) -> Option<Value> {
        let response: Value = serde_json::from_str(&self.response).ok()?;
        let input: Value = serde_json::from_str(&self.input).ok()?;
        let items = [&response["output"], &input].into_iter().filter_map(Value::as_array).flatten();
        items.filter(|item| item["type"] != "item_reference").find(|item| item["id"] == id).cloned()
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + self.client.len() + self.id.len() + self.response.len() + self.input.len() + self.messages.len()
    }
}

#[derive(Debug)]
struct Entry {
    stored: Arc<Stored>,
    at: Instant,
}

/// The longest unused entry first.
#[derive(Debug, Default)]
pub(crate) struct Store {
    entries: VecDeque<Entry>,
    bytes: usize,
}

impl Store {
    pub(crate) fn put(&mut self, stored: Stored) {
        let bytes = stored.bytes();
        if bytes > BYTES_MAX {
            tracing::debug!(bytes, "a response is too large to be kept");
            return;
        }
        self.bytes += bytes;
        self.entries.push_back(Entry { stored: Arc::new(stored), at: Instant::now() });
        while self.entries.len() > COUNT_MAX || self.bytes > BYTES_MAX {
            self.take(0);
        }
    }

    pub(crate) fn get(&mut self, id: &str, client: &str) -> Option<Arc<Stored>> {
        let entry = self.position(id, client).and_then(|at| self.entries.remove(at))?;
        let stored = entry.stored.clone();
        self.entries.push_back(entry);
        Some(stored)
    }

    /// Whether it was there.
    pub(crate) fn remove(&mut self, id: &str, client: &str) -> bool {
        self.position(id, client).map(|at| self.take(at)).is_some()
    }

    fn position(&mut self, id: &str, client: &str) -> Option<usize> {
        while let Some(old) = self.entries.iter().position(|entry| entry.at.elapsed() > AGE_MAX) {
            self.take(old);
        }
        self.entries.iter().position(|entry| entry.stored.id == id && entry.stored.client == client)
    }

    fn take(&mut self, at: usize) {
        if let Some(entry) = self.entries.remove(at) {
            self.bytes -= entry.stored.bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stored(id: usize, client: &str, content: usize) -> Stored {
        let message = v1::Message { content: "x".repeat(content), ..Default::default() };
        Stored::new(client.into(), &json!({"id": format!("resp_{id}")}), vec![message], "[]")
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let mut store = Store::default();
        for id in 0..COUNT_MAX {
            store.put(stored(id, "a", 0));
        }
        assert!(store.get("resp_0", "a").is_some());
        store.put(stored(COUNT_MAX, "a", 0));
        assert!(store.get("resp_0", "a").is_some() && store.get("resp_1", "a").is_none() && store.get("resp_256", "a").is_some());
        store.put(stored(999, "a", BYTES_MAX - 1000));
        assert!(store.get("resp_999", "a").is_some() && store.entries.len() < 20, "{}", store.entries.len());
        store.put(stored(1000, "a", BYTES_MAX));
        assert!(store.get("resp_1000", "a").is_none() && store.get("resp_999", "a").is_some());
        assert!(store.remove("resp_999", "a") && !store.remove("resp_999", "a"));
        assert_eq!(store.bytes, store.entries.iter().map(|entry| entry.stored.bytes()).sum::<usize>());
    }

    #[test]
    fn everyone_finds_only_their_own() {
        let mut store = Store::default();
        store.put(stored(1, "a", 0));
        assert!(store.get("resp_1", "b").is_none() && !store.remove("resp_1", "b") && store.get("resp_1", "a").is_some());
    }
}
