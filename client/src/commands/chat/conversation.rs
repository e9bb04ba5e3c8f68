//! What has been said, and the settings it is said with. Pure: no daemon, no terminal. All of it is sent with every
//! message; nothing is ever left out but by the commands that say so.

use flash_proto::v1::Message;
use serde::{Deserialize, Serialize};

use crate::{
    args::{Generation, Settings, ctx},
    reply::message,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Turn {
    pub(super) user: String,
    /// What came, stopped or not.
    pub(super) assistant: String,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Conversation {
    #[serde(default)]
    pub(super) system: Option<String>,
    pub(super) turns: Vec<Turn>,
    /// A message that was not answered: it did not fit, or the daemon failed. /retry sends it.
    #[serde(default)]
    pub(super) unsent: Option<String>,
}

impl Conversation {
    /// The conversation, with `next` as the message to answer.
    pub(super) fn messages(&self, next: Option<&str>) -> Vec<Message> {
        let system = self.system.iter().map(|text| message("system", text));
        let turns = self.turns.iter().flat_map(|turn| [message("user", &turn.user), message("assistant", &turn.assistant)]);
        system.chain(turns).chain(next.map(|text| message("user", text))).collect()
    }

    pub(super) fn clear(&mut self) {
        self.turns.clear();
        self.unsent = None;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.turns.is_empty() && self.unsent.is_none()
    }

    /// How many turns were there to forget.
    pub(super) fn drop_oldest(&mut self, turns: usize) -> usize {
        self.turns.drain(..turns.min(self.turns.len())).count()
    }

    /// Forgets the last message: the unanswered one, else the last turn.
    pub(super) fn undo(&mut self) -> Option<String> {
        self.unsent.take().or_else(|| Some(self.turns.pop()?.user))
    }
}

/// What /set knows.
pub(super) const PARAMETERS: [&str; 14] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "max_tokens",
    "stop",
    "expert_cache",
    "memory",
    "ctx",
    "keep_alive",
];

/// Sets one parameter by its name; `default` unsets it. True if it is a setting of the daemon, which is to be told of it.
pub(super) fn set(generation: &mut Generation, settings: &mut Settings, name: &str, value: &str) -> Result<bool, String> {
    fn to<T: std::str::FromStr>(target: &mut Option<T>, name: &str, value: &str) -> Result<bool, String> {
        *target = match value {
            "default" => None,
            _ => Some(value.parse().map_err(|_| format!("`{value}` is no value for {name}"))?),
        };
        Ok(false)
    }
    // As the daemon has them, which would refuse every message from then on.
    fn within(target: &mut Option<f32>, (name, value): (&str, &str), inside: fn(f32) -> bool, wants: &str) -> Result<bool, String> {
        let mut number = None;
        to(&mut number, name, value)?;
        if number.is_some_and(|number| !inside(number)) {
            return Err(format!("`{value}` is no value for {name}: it must be {wants}"));
        }
        *target = number;
        Ok(false)
    }
    fn asked(target: &mut Option<String>, value: &str) -> Result<bool, String> {
        *target = Some(value.into());
        Ok(true)
    }
    let given = (name, value);
    let penalty = |value: f32| (-2.0..=2.0).contains(&value);
    match name.replace('-', "_").as_str() {
        "temperature" => within(&mut generation.temperature, given, |t| (0.0..=2.0).contains(&t), "from 0 to 2"),
        "top_p" => within(&mut generation.top_p, given, |p| p > 0.0 && p <= 1.0, "above 0 and at most 1"),
        "top_k" => to(&mut generation.top_k, name, value),
        "min_p" => within(&mut generation.min_p, given, |p| (0.0..1.0).contains(&p), "at least 0 and below 1"),
        "repeat_penalty" => within(&mut generation.repeat_penalty, given, |r| r > 0.0 && r <= 2.0, "above 0 and at most 2"),
        "frequency_penalty" => within(&mut generation.frequency_penalty, given, penalty, "from -2 to 2"),
        "presence_penalty" => within(&mut generation.presence_penalty, given, penalty, "from -2 to 2"),
        "seed" => to(&mut generation.seed, name, value),
        "max_tokens" => to(&mut generation.max_tokens, name, value),
        "stop" => {
            generation.stop = if value == "default" { vec![] } else { vec![value.into()] };
            Ok(false)
        }
        // Their `default` is the daemon's business, and unset once it has heard of it.
        "expert_cache" => asked(&mut settings.expert_cache, value),
        "memory" => asked(&mut settings.memory, value),
        "ctx" => {
            settings.ctx = Some(ctx(value).map_err(|wants| format!("`{value}` is no value for {name}: {wants}"))?);
            Ok(true)
        }
        "keep_alive" => asked(&mut settings.keep_alive, value),
        _ => Err(format!("there is no parameter {name}; /set alone lists them")),
    }
}

/// Every parameter with its value, one per line.
pub(super) fn parameters(generation: &Generation, settings: &Settings) -> String {
    fn shown<T: ToString>(value: &Option<T>) -> String {
        value.as_ref().map_or("default".into(), T::to_string)
    }
    let stop = if generation.stop.is_empty() { "default".into() } else { generation.stop.join(", ") };
    let values = [
        shown(&generation.temperature),
        shown(&generation.top_p),
        shown(&generation.top_k),
        shown(&generation.min_p),
        shown(&generation.repeat_penalty),
        shown(&generation.frequency_penalty),
        shown(&generation.presence_penalty),
        shown(&generation.seed),
        shown(&generation.max_tokens),
        stop,
        shown(&settings.expert_cache),
        shown(&settings.memory),
        shown(&settings.ctx),
        shown(&settings.keep_alive),
    ];
    let row = |(name, value): (&str, String)| format!("  {name:20}{value}");
    PARAMETERS.into_iter().zip(values).map(row).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(turns: usize) -> Conversation {
        let turns = (0..turns).map(|n| Turn { user: format!("q{n}"), assistant: format!("a{n}") }).collect();
        Conversation { system: Some("s".into()), turns, unsent: None }
    }

    fn texts(messages: &[Message]) -> Vec<String> {
        messages.iter().map(|message| format!("{}:{}", message.role, message.content)).collect()
    }

    #[test]
    fn everything_is_sent_and_only_dropping_forgets() {
        let mut talk = talk(2);
        assert_eq!(texts(&talk.messages(Some("q2"))), ["system:s", "user:q0", "assistant:a0", "user:q1", "assistant:a1", "user:q2"]);
        assert_eq!(talk.drop_oldest(1), 1);
        assert_eq!(texts(&talk.messages(None)), ["system:s", "user:q1", "assistant:a1"]);
        assert_eq!(talk.drop_oldest(9), 1);
        assert_eq!(texts(&talk.messages(None)), ["system:s"]);
    }

    #[test]
    fn undo_takes_the_unanswered_message_first() {
        let mut talk = talk(1);
        talk.unsent = Some("too long".into());
        assert_eq!(talk.undo().as_deref(), Some("too long"));
        assert_eq!(talk.undo().as_deref(), Some("q0"));
        assert_eq!(talk.undo(), None);
    }

    #[test]
    fn parameters_are_set_by_name() {
        let (mut generation, mut settings) = (Generation::default(), Settings::default());
        let mut check = |name, value, expected: Result<bool, &str>| {
            let set = set(&mut generation, &mut settings, name, value);
            assert_eq!(
                set.as_ref().map_err(|why| expected.is_err_and(|part| why.contains(part))),
                expected.as_ref().map_err(|_| true),
                "{set:?}"
            );
        };
        check("temperature", "0.5", Ok(false));
        check("top-k", "40", Ok(false));
        check("stop", "END", Ok(false));
        check("expert_cache", "25%", Ok(true));
        check("seed", "-1", Err("no value for seed"));
        check("seed", "default", Ok(false));
        check("temprature", "1", Err("no parameter"));
        for (name, value, wants) in [
            ("temperature", "9", "from 0 to 2"),
            ("temperature", "NaN", "from 0 to 2"),
            ("top-p", "0", "above 0 and at most 1"),
            ("min_p", "1", "at least 0 and below 1"),
            ("repeat_penalty", "0", "above 0 and at most 2"),
            ("frequency_penalty", "-2.1", "from -2 to 2"),
            ("presence_penalty", "3", "from -2 to 2"),
        ] {
            check(name, value, Err(wants));
        }
        assert_eq!((generation.temperature, generation.top_k, generation.seed), (Some(0.5), Some(40), None));
        let listed = parameters(&generation, &settings);
        for line in listed.lines() {
            let (name, value) = line.trim().split_once(' ').expect("name and value");
            assert!(set(&mut generation, &mut settings, name, value.trim()).is_ok(), "{line}");
        }
    }
}
