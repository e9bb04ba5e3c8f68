//! Command line and environment → [`Config`], resolved and checked once. The gateway has no configuration file.
//! Called by `main.rs`; tests build a [`Config`] themselves.

use std::{fs, io, net::SocketAddr, path::PathBuf, time::Duration};

use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

/// Answers the HTTP APIs of OpenAI, Anthropic and Ollama from flashd.
#[derive(Debug, clap::Parser)]
#[command(name = "flash-gateway", version)]
pub struct Args {
    /// Address to listen on; anything but this machine needs an API key
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 takes a free one and prints it
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// Key that clients must send; may be given several times
    #[arg(long = "api-key", value_name = "KEY", env = "FLASH_API_KEY", hide_env_values = true)]
    pub api_keys: Vec<String>,
    /// Where flashd listens [default: $FLASH_SOCKET, $XDG_RUNTIME_DIR/flashd/flashd.sock or $FLASH_HOME/run/flashd.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Further host name by which clients may call this gateway
    #[arg(long = "allowed-host", value_name = "HOST")]
    pub allowed_hosts: Vec<String>,
    /// Further web origin that may call this gateway; * allows all
    #[arg(long = "cors-origin", value_name = "ORIGIN")]
    pub cors_origins: Vec<String>,
    /// Listen beyond this machine without a key
    #[arg(long)]
    pub insecure_no_auth: bool,
    /// Further name by which clients may call a model, * standing for anything in it; may be given several times
    #[arg(long = "alias", value_name = "NAME=MODEL", value_parser = alias)]
    pub aliases: Vec<(String, String)>,
    /// Refuse request fields that are not known instead of ignoring them
    #[arg(long)]
    pub strict_fields: bool,
    /// Where chat completions tell what the model thinks
    #[arg(long, value_name = "FIELD", default_value = "reasoning_content")]
    pub reasoning_field: ReasoningField,
    /// Other servers' routes to answer besides
    #[arg(long, value_name = "SERVER", value_delimiter = ',', default_value = "ollama,lmstudio")]
    pub compat: Vec<Compat>,
}

fn alias(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((name, model)) if !name.is_empty() && !model.is_empty() => Ok((name.to_owned(), model.to_owned())),
        _ => Err("it is no NAME=MODEL, such as gpt-4o=local or claude-*=flash-tiny-moe"),
    }
}

/// Names that clients look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum ReasoningField {
    ReasoningContent,
    Reasoning,
    Both,
    /// In the text, between think marks
    Inline,
}

/// A server whose own routes are answered, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Compat {
    Ollama,
    Lmstudio,
    /// No other's
    None,
}

/// Why the gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{address} can be reached from other machines; set --api-key (or FLASH_API_KEY), or say --insecure-no-auth")]
    NoKey { address: SocketAddr },
    #[error("an API key is empty; leave --api-key and FLASH_API_KEY out to serve without a key")]
    EmptyKey,
    #[error("cannot resolve --host {host}: {source}")]
    Host { host: String, source: io::Error },
    #[error("{address} is in use by {holder}; end that, or choose another --port (0 takes a free one)")]
    Busy { address: SocketAddr, holder: String },
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Socket(#[from] flash_proto::socket::Error),
}

impl Error {
    /// sysexits: 75 try later, 77 permission, 78 configuration.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Busy { .. } => 75,
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => 77,
            Self::NoKey { .. } | Self::EmptyKey | Self::Host { .. } | Self::Listen { .. } | Self::Socket(_) => 78,
        }
    }
}

/// Everything [`crate::serve`] needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    pub socket: PathBuf,
    /// SHA-256 of the keys, so that comparing takes the same time for every guess. Empty: no key is asked for.
    pub keys: Vec<[u8; 32]>,
    /// Lower-case names accepted in `Host` beside the loopback ones.
    pub hosts: Vec<String>,
    /// Origins accepted beside the local ones; `*` means all.
    pub origins: Vec<String>,
    /// Names beside the models' own, `*` standing for anything, and whose they are.
    pub aliases: Vec<(String, String)>,
    pub strict_fields: bool,
    pub reasoning_field: ReasoningField,
    pub compat: Vec<Compat>,
    pub timing: Timing,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// From a request's first byte to the end of its headers.
    pub header: Duration,
    /// Between two pieces of a request body.
    pub body_idle: Duration,
    /// A connection without a request.
    pub keep_alive: Duration,
    /// A client that does not read.
    pub write_stall: Duration,
    /// Silence in a stream before a comment is sent.
    pub heartbeat: Duration,
    /// Wait for the daemon to accept before a stream's 200 is sent regardless.
    pub commit: Duration,
    /// Longest time text is held to join it with the next; zero joins nothing.
    pub coalesce: Duration,
    /// Wait for a model that is being loaded.
    pub load_wait: Duration,
    /// Wait for requests that come first, those of another model too.
    pub queue_wait: Duration,
    /// What running requests get at shutdown.
    pub drain: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            header: seconds(10),
            body_idle: seconds(60),
            keep_alive: seconds(75),
            write_stall: seconds(60),
            heartbeat: seconds(10),
            commit: seconds(2),
            coalesce: Duration::from_millis(20),
            load_wait: seconds(300),
            queue_wait: seconds(600),
            drain: seconds(30),
        }
    }
}

pub fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

impl Args {
    pub fn resolve(&self) -> Result<Config, Error> {
        if self.api_keys.iter().any(String::is_empty) {
            return Err(Error::EmptyKey);
        }
        let hosts = self.allowed_hosts.iter().chain([&self.host]).map(|host| host.to_ascii_lowercase()).collect();
        Ok(Config {
            socket: self.socket.clone().map_or_else(flash_proto::socket::default_path, Ok)?,
            keys: self.api_keys.iter().map(|key| digest(key)).collect(),
            hosts,
            origins: self.cors_origins.clone(),
            aliases: self.aliases.clone(),
            strict_fields: self.strict_fields,
            reasoning_field: self.reasoning_field,
            compat: self.compat.clone(),
            timing: Timing::default(),
        })
    }

    /// Takes the port, unless that would expose a gateway that asks for no key.
    pub async fn listen(&self) -> Result<TcpListener, Error> {
        let resolve = |source| Error::Host { host: self.host.clone(), source };
        let mut addresses = tokio::net::lookup_host((self.host.as_str(), self.port)).await.map_err(resolve)?;
        let address = addresses.next().ok_or_else(|| resolve(io::ErrorKind::NotFound.into()))?;
        if !address.ip().is_loopback() && self.api_keys.is_empty() && !self.insecure_no_auth {
            return Err(Error::NoKey { address });
        }
        TcpListener::bind(address).await.map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => {
                let holder = holder(address.port()).unwrap_or_else(|| "another program".into());
                Error::Busy { address, holder }
            }
            _ => Error::Listen { address, source },
        })
    }
}

/// Who listens on a port, where /proc tells: of one's own processes.
fn holder(port: u16) -> Option<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default()).concat();
    let (port, listening) = (format!(":{port:04X}"), "0A");
    let sockets: Vec<PathBuf> = tables
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields.len() > 9 && fields[1].ends_with(&port) && fields[3] == listening)
        .map(|fields| format!("socket:[{}]", fields[9]).into())
        .collect();
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        // Not `self`, which is the one that asks.
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let mut files = fs::read_dir(process.path().join("fd")).ok()?.flatten();
        files.find(|file| fs::read_link(file.path()).is_ok_and(|target| sockets.contains(&target)))?;
        let name = fs::read_to_string(process.path().join("comm")).ok()?;
        Some(format!("{} (pid {pid})", name.trim_end()))
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn args(line: &str) -> Args {
        Args::parse_from(std::iter::once("flash-gateway").chain(line.split_whitespace()))
    }

    #[tokio::test]
    async fn only_a_key_or_an_explicit_word_opens_the_gateway_to_others() {
        for (line, code) in [
            ("--port 0", None),
            ("--port 0 --host ::1", None),
            ("--port 0 --host 0.0.0.0", Some(78)),
            ("--port 0 --host 0.0.0.0 --api-key k", None),
            ("--port 0 --host 0.0.0.0 --insecure-no-auth", None),
        ] {
            let outcome = args(line).listen().await.map(drop).map_err(|error| error.exit_code());
            // A machine without IPv6 cannot take ::1, which is not what is tested here.
            if !(line.contains("::1") && outcome.is_err()) {
                assert_eq!(outcome.err(), code, "{line}");
            }
        }
    }

    #[tokio::test]
    async fn a_busy_port_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = taken.local_addr().expect("its address");
        let error = args(&format!("--port {}", address.port())).listen().await.expect_err("it is taken");
        assert_eq!(error.exit_code(), 75);
        assert!(error.to_string().contains(&address.to_string()), "{error}");
        let holder = format!("(pid {}); end that, or choose another --port", std::process::id());
        assert!(error.to_string().contains(&holder) || !cfg!(target_os = "linux"), "{error}");
    }

    #[test]
    fn an_empty_key_is_no_key() {
        assert_eq!(args("--socket s --api-key=").resolve().expect_err("an empty key").exit_code(), 78);
        assert_eq!(args("--socket s --api-key a --api-key b").resolve().expect("two keys").keys, [digest("a"), digest("b")]);
    }
}
