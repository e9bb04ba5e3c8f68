//! Where a gateway is: `FLASH_HOST` and `--host` as people write them.

use std::{env, fmt, net::Ipv6Addr};

use crate::failure::{Failure, exit};

const DEFAULT_PORT: u16 = 8080;

/// Where a gateway is, or should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Url {
    pub(crate) tls: bool,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// The user said so; the default place may belong to any other program.
    pub(crate) chosen: bool,
}

/// The gateway's own default.
impl Default for Url {
    fn default() -> Self {
        Self { tls: false, host: "127.0.0.1".into(), port: DEFAULT_PORT, chosen: false }
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}:{}", if self.tls { "https" } else { "http" }, self.host, self.port)
    }
}

impl Url {
    /// `FLASH_HOST`, if it is set.
    pub(crate) fn environment() -> Option<String> {
        env::var("FLASH_HOST").ok().filter(|text| !text.trim().is_empty())
    }

    /// As an address.
    pub(crate) fn from_environment() -> Result<Option<Self>, Failure> {
        Self::environment().map(|text| Self::read(&text, "FLASH_HOST")).transpose()
    }

    /// `HOST`, `HOST:PORT`, `:PORT`, or a URL; `from` is whose value it is.
    pub(crate) fn read(text: &str, from: &str) -> Result<Self, Failure> {
        Self::parse(text.trim()).ok_or_else(|| {
            Failure::new(exit::CONFIG, "config", format!("{from} is `{text}`, which is no address"))
                .hint("it is where the gateway listens: HOST:PORT or http://HOST:PORT")
        })
    }

    /// How a socket is reached.
    pub(crate) fn address(&self) -> (&str, u16) {
        (self.host.trim_matches(['[', ']']), self.port)
    }

    fn parse(text: &str) -> Option<Self> {
        let (tls, default, rest) = match text.split_once("://") {
            Some(("http", rest)) => (false, 80, rest),
            Some(("https", rest)) => (true, 443, rest),
            Some(_) => return None,
            None => (false, DEFAULT_PORT, text),
        };
        let rest = rest.trim_end_matches('/').trim_end_matches("/v1");
        let bare = rest.parse::<Ipv6Addr>().is_ok();
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !bare && !port.ends_with(']') => (host, port.parse().ok()?),
            _ => (rest, default),
        };
        let host = match host {
            // What a server listens on, seen from a client.
            "" | "0.0.0.0" => "127.0.0.1".into(),
            "[::]" | "::" => "[::1]".into(),
            host if host.parse::<Ipv6Addr>().is_ok() => format!("[{host}]"),
            host => host.to_owned(),
        };
        let valid = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
        (port != 0 && host.chars().all(valid)).then_some(Self { tls, host, port, chosen: true })
    }

    pub(crate) fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host == "[::1]" || self.host.starts_with("127.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read() {
        let check =
            |text: &str, expected: Option<&str>| assert_eq!(Url::parse(text).map(|url| url.to_string()).as_deref(), expected, "{text}");
        check("localhost", Some("http://localhost:8080"));
        check("127.0.0.1:9", Some("http://127.0.0.1:9"));
        check(":81", Some("http://127.0.0.1:81"));
        check("0.0.0.0:81", Some("http://127.0.0.1:81"));
        check("http://box.lan", Some("http://box.lan:80"));
        check("https://box.lan/v1/", Some("https://box.lan:443"));
        check("[::1]:81", Some("http://[::1]:81"));
        check("[::1]", Some("http://[::1]:8080"));
        check("::1", Some("http://[::1]:8080"));
        for bad in ["ftp://x", "x:y", "a b", "http://x/path", "x:0", "x:99999", "a\r\nb"] {
            check(bad, None);
        }
        let local = |text| Url::parse(text).is_some_and(|url| url.is_loopback());
        assert!(local("localhost") && local("[::1]") && local("127.0.0.2") && !local("128.0.0.1"));
    }
}
