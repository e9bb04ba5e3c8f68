//! launchd agents as typed property lists, and systemd user units: values in, file text out. It neither touches the
//! disk nor talks to a service manager; `flashctl service` does both.

mod agent;
mod unit;

pub use agent::{Agent, KeepAlive, ProcessType};
pub use unit::Unit;
