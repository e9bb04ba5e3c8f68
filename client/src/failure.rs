//! What went wrong, as the caller of flashctl sees it: an exit code, a machine-readable code, a message and what to do.
//! Every command returns it; only main.rs shows it.

use std::error::Error;

use flash_proto::code;
use tonic::{Code, Status};

/// The exit codes that scripts may rely on.
pub(crate) mod exit {
    pub(crate) const GENERIC: u8 = 1;
    pub(crate) const USAGE: u8 = 2;
    /// A value the daemon refuses, input that is not text.
    pub(crate) const BAD_DATA: u8 = 64;
    pub(crate) const NO_INPUT: u8 = 66;
    pub(crate) const UNAVAILABLE: u8 = 69;
    pub(crate) const INTERNAL: u8 = 70;
    pub(crate) const CANNOT_CREATE: u8 = 73;
    pub(crate) const BUSY: u8 = 75;
    pub(crate) const PERMISSION: u8 = 77;
    pub(crate) const CONFIG: u8 = 78;
    pub(crate) const TIMEOUT: u8 = 124;
    pub(crate) const SIGINT: u8 = 130;
    pub(crate) const SIGHUP: u8 = 129;
    pub(crate) const SIGTERM: u8 = 143;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) exit: u8,
    pub(crate) code: String,
    /// Empty: everything worth saying has been said.
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: u8, code: &str, message: impl Into<String>) -> Self {
        Self { exit, code: code.into(), message: message.into(), hint: None }
    }

    /// Ends the program with `exit` and without a word.
    pub(crate) fn silent(exit: u8) -> Self {
        Self::new(exit, "", "")
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// With something to do for whoever gave `command`, if nothing was said of that yet.
    pub(crate) fn or_hint(self, command: &str) -> Self {
        if self.hint.is_some() || self.message.is_empty() || self.message.contains("flashctl ") {
            return self;
        }
        let hint = match self.exit {
            exit::USAGE | exit::BAD_DATA => explained(command),
            exit::NO_INPUT => "check the path, and that you may read it".into(),
            exit::CANNOT_CREATE => "check that the folder is there, that you may write in it, and that its disk has room".into(),
            exit::CONFIG => "correct it where it is set: a flag, a FLASH_* variable, or flash.toml".into(),
            _ => "`flashctl doctor` checks this installation".into(),
        };
        self.hint(hint)
    }

    /// A status of the daemon; `doing` completes "the daemon went away while it was …".
    pub(crate) fn from_status(status: &Status, doing: &str, log: &str) -> Self {
        match code::of(status) {
            Some(code) => Self::coded(code, status, log),
            None if is_disconnect(status) => Self::went_away(doing, log),
            None => Self::uncoded(status, log),
        }
    }

    /// The connection broke, or a stream ended before its last event.
    pub(crate) fn went_away(doing: &str, log: &str) -> Self {
        let message = format!("the daemon went away while it was {doing}");
        Self::new(exit::UNAVAILABLE, "daemon_gone", message).hint(format!("its log may say why: {log}; the next command starts it again"))
    }

    /// A request that failed after it was accepted.
    pub(crate) fn from_failed(failed: &flash_proto::v1::Failed, log: &str) -> Self {
        let hint = hint_of(&failed.code, None, log);
        Self { hint, ..Self::new(exit_of(&failed.code), &failed.code, failed.message.clone()) }
    }

    fn coded(code: &str, status: &Status, log: &str) -> Self {
        let mut failure = Self::new(exit_of(code), code, status.message());
        // Of the daemon's names for what was given, the one that is not the flag's.
        let param = code::param(status).map(|param| if param == "response_format" { "--format" } else { param });
        if let Some(param) = param.filter(|param| !failure.message.contains(param)) {
            failure.message = format!("{param}: {}", failure.message);
        }
        // The daemon has said what to do already.
        if failure.message.contains("flashctl ") {
            return failure;
        }
        Self { hint: hint_of(code, code::retry_after(status), log), ..failure }
    }

    fn uncoded(status: &Status, log: &str) -> Self {
        let (exit, code) = match status.code() {
            Code::Unimplemented => (exit::UNAVAILABLE, "unimplemented"),
            Code::PermissionDenied | Code::Unauthenticated => (exit::PERMISSION, "permission_denied"),
            Code::DeadlineExceeded => (exit::UNAVAILABLE, "daemon_silent"),
            Code::ResourceExhausted | Code::OutOfRange => (exit::BAD_DATA, "too_large"),
            _ => (exit::INTERNAL, "internal"),
        };
        let hint = match status.code() {
            Code::Unimplemented => "the daemon is of another version: `flashctl daemon restart`".into(),
            _ => format!("the daemon's log may say more: {log}"),
        };
        Self::new(exit, code, format!("the daemon answered {:?}: {}", status.code(), status.message())).hint(hint)
    }
}

/// Where to read what `command` takes.
pub(crate) fn explained(command: &str) -> String {
    format!("`{}` explains what it takes", format!("flashctl help {command}").trim_end())
}

/// tonic reports a broken connection as a status of its own making, with the transport's error as its source.
pub(crate) fn is_disconnect(status: &Status) -> bool {
    code::of(status).is_none() && (status.source().is_some() || matches!(status.code(), Code::Unavailable | Code::Unknown))
}

fn exit_of(code: &str) -> u8 {
    match code {
        code::INVALID_VALUE | code::SCHEMA_NOT_SUPPORTED => exit::BAD_DATA,
        code::FIM_NOT_SUPPORTED => exit::USAGE,
        // The gateway's own, of the way to a daemon on another machine.
        "daemon_unavailable" => exit::UNAVAILABLE,
        "invalid_api_key" | "host_not_allowed" => exit::PERMISSION,
        code::NO_SPACE => exit::CANNOT_CREATE,
        code::MODEL_LOADING | code::QUEUE_FULL | code::DRAINING | code::BUSY => exit::BUSY,
        _ => exit::GENERIC,
    }
}

fn hint_of(code: &str, retry_after: Option<u64>, log: &str) -> Option<String> {
    let hint = match (code, retry_after) {
        // What it takes is in the help of the command, which is not known here.
        (code::INVALID_VALUE, _) => return None,
        (code::MODEL_NOT_FOUND, _) => "`flashctl models` lists what is installed; a path to a checkpoint is accepted too".into(),
        (code::MODEL_INVALID, _) => "`flashctl models` shows what is wrong with the checkpoint".into(),
        (code::CONTEXT_LENGTH, _) => "shorten the prompt, or raise --ctx if the model allows it".into(),
        (code::FIM_NOT_SUPPORTED, _) => "leave out --suffix; `flashctl show MODEL` says of a model that can: filling gaps".into(),
        (code::SCHEMA_NOT_SUPPORTED, _) => "correct the schema, or ask for any object with --format json".into(),
        (code::INSUFFICIENT_MEMORY, _) => "raise --memory, or lower --ctx or --expert-cache".into(),
        (code::QUEUE_FULL | code::MODEL_LOADING, Some(seconds)) => format!("try again in {seconds} s"),
        (code::QUEUE_FULL | code::MODEL_LOADING, None) => "try again in a moment".into(),
        (code::NO_SPACE, _) => "free some space on that disk; `flashctl convert --in-place` needs room for one shard only".into(),
        (code::BUSY, _) => "`flashctl ps` shows what runs, `flashctl stop` unloads the model".into(),
        ("invalid_api_key", _) => "FLASH_API_KEY is one of the keys that the gateway there was started with".into(),
        ("host_not_allowed", _) => "the gateway there wants to be told by what name others call it: --allowed-host NAME".into(),
        (code::DRAINING, _) => "the daemon is shutting down; the next command starts it again".into(),
        _ => format!("the daemon's log may say more: {log}"),
    };
    Some(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_become_exit_codes() {
        let check = |status: Status, exit: u8, code: &str| {
            let failure = Failure::from_status(&status, "answering", "/log");
            assert_eq!((failure.exit, failure.code.as_str()), (exit, code), "{status:?}");
        };
        check(code::status(code::MODEL_NOT_FOUND, "no"), 1, "model_not_found");
        check(code::status(code::CONTEXT_LENGTH, "no"), 1, "context_length_exceeded");
        check(code::status(code::INVALID_VALUE, "no"), 64, "invalid_value");
        check(code::status(code::FIM_NOT_SUPPORTED, "no"), 2, "fim_not_supported");
        check(code::status(code::SCHEMA_NOT_SUPPORTED, "no"), 64, "schema_not_supported");
        check(code::status(code::QUEUE_FULL, "no"), 75, "queue_full");
        check(code::status(code::DRAINING, "no"), 75, "draining");
        check(code::status(code::ENGINE, "no"), 1, "engine_error");
        check(Status::unavailable("connection refused"), 69, "daemon_gone");
        check(Status::unknown("h2 protocol error"), 69, "daemon_gone");
        check(Status::from_error(Box::new(std::io::Error::other("broken pipe"))), 69, "daemon_gone");
        check(Status::unimplemented("Fit"), 69, "unimplemented");
        check(Status::permission_denied("uid"), 77, "permission_denied");
        check(Status::internal("?"), 70, "internal");
    }

    #[test]
    fn what_to_do_is_said_once() {
        let busy = |message: &str| Failure::from_status(&code::status(code::BUSY, message), "", "").hint;
        assert_eq!(busy("m is loaded; unload it first: flashctl stop m"), None);
        assert_eq!(Failure::new(1, "", "try flashctl stop m").or_hint("rm").hint, None);
        assert_eq!(Failure::silent(1).or_hint("rm").hint, None);
        let help = Some("`flashctl help bench synth` explains what it takes");
        assert_eq!(Failure::new(64, "", "no").or_hint("bench synth").hint.as_deref(), help);
        assert!(busy("m is being packed").is_some_and(|hint| hint.contains("flashctl ps")));
    }

    #[test]
    fn a_refusal_names_the_field_and_when_to_come_back() {
        let refused = code::with_param(code::status(code::INVALID_VALUE, "must be at most 2"), "temperature");
        assert_eq!(Failure::from_status(&refused, "", "").message, "temperature: must be at most 2");
        let full = code::with_retry_after(code::status(code::QUEUE_FULL, "64 requests are waiting"), 7);
        assert_eq!(Failure::from_status(&full, "", "").hint.as_deref(), Some("try again in 7 s"));
        let gone = Failure::went_away("answering", "/home/you/log");
        assert_eq!(gone.message, "the daemon went away while it was answering");
        assert!(gone.hint.is_some_and(|hint| hint.contains("/home/you/log")));
    }
}
