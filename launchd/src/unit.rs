//! A systemd user service as text. Only what our services need, with systemd's quoting: `%` starts a specifier
//! everywhere, `$` a variable in ExecStart, and a value with spaces is quoted.

use std::{collections::BTreeMap, fmt::Write};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    pub description: String,
    pub exec: Vec<String>,
    pub environment: BTreeMap<String, String>,
    /// Standard output and error are appended here.
    pub log: String,
    /// The unit that is started before this one.
    pub after: Option<String>,
    /// Exit codes that trying again does not cure.
    pub no_restart_on: Vec<u8>,
    /// Seconds from SIGTERM to SIGKILL: longer than the program needs to drain.
    pub stop_timeout_s: u32,
}

impl Unit {
    pub fn to_text(&self) -> String {
        let mut text = format!("[Unit]\nDescription={}\n", escape(&self.description));
        let mut line = |args: std::fmt::Arguments<'_>| writeln!(text, "{args}").expect("writing to a String");
        if let Some(after) = &self.after {
            line(format_args!("Wants={after}\nAfter={after}"));
        }
        // `$$` is a plain dollar in ExecStart only.
        let exec: Vec<String> = self.exec.iter().map(|arg| quote(arg).replace('$', "$$")).collect();
        line(format_args!("\n[Service]\nExecStart={}", exec.join(" ")));
        for (name, value) in &self.environment {
            line(format_args!("Environment={}", quote(&format!("{name}={value}"))));
        }
        let log = escape(&self.log);
        line(format_args!("StandardOutput=append:{log}\nStandardError=append:{log}"));
        line(format_args!("UMask=0077\nRestart=on-failure\nRestartSec=10"));
        if !self.no_restart_on.is_empty() {
            let codes: Vec<String> = self.no_restart_on.iter().map(u8::to_string).collect();
            line(format_args!("RestartPreventExitStatus={}", codes.join(" ")));
        }
        line(format_args!("TimeoutStopSec={}\n\n[Install]\nWantedBy=default.target", self.stop_timeout_s));
        text
    }
}

/// A line cannot end inside a value, and `%` must not start a specifier.
fn escape(value: &str) -> String {
    value.replace('%', "%%").replace(['\n', '\r'], " ")
}

fn quote(value: &str) -> String {
    let value = value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n").replace('\r', r"\r").replace('%', "%%");
    format!("\"{value}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_values_are_quoted() {
        let check = |value: &str, expected: &str| {
            let unit = Unit {
                description: "d".into(),
                exec: vec![value.into()],
                environment: BTreeMap::new(),
                log: "/l".into(),
                after: None,
                no_restart_on: vec![],
                stop_timeout_s: 40,
            };
            let text = unit.to_text();
            assert_eq!(text.lines().find(|line| line.starts_with("ExecStart")), Some(format!("ExecStart={expected}").as_str()));
        };
        check("/usr/bin/flashd", r#""/usr/bin/flashd""#);
        check("/home/A B/x", r#""/home/A B/x""#);
        check("/100%/$HOME", r#""/100%%/$$HOME""#);
        check(r#"/a"b\c"#, r#""/a\"b\\c""#);
        check("/a\nExecStart=/bin/sh", r#""/a\nExecStart=/bin/sh""#);
    }

    #[test]
    fn a_unit_is_written_whole() {
        let unit = Unit {
            description: "50% of it".into(),
            exec: vec!["/bin/x".into(), "--port".into(), "1".into()],
            environment: BTreeMap::from([("A".into(), "$HOME and 5%".into())]),
            log: "/home/A B/x%.log".into(),
            after: Some("y.service".into()),
            no_restart_on: vec![75, 78],
            stop_timeout_s: 40,
        };
        let expected = r#"[Unit]
Description=50%% of it
Wants=y.service
After=y.service

[Service]
ExecStart="/bin/x" "--port" "1"
Environment="A=$HOME and 5%%"
StandardOutput=append:/home/A B/x%%.log
StandardError=append:/home/A B/x%%.log
UMask=0077
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=75 78
TimeoutStopSec=40

[Install]
WantedBy=default.target
"#;
        assert_eq!(unit.to_text(), expected);
    }
}
