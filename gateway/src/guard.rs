//! Who may call: the Host check against DNS rebinding, the Origin check and CORS headers for browsers, API keys. Pure
//! functions over headers; `router.rs` applies them before anything is routed.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderValue, Method, Uri, Version, header, request::Parts};
use subtle::ConstantTimeEq;

use crate::{
    config::{Config, digest},
    error::{Code, Failure},
};

const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// A web page can make a browser call us under a name of its own; under ours it cannot.
pub(crate) fn host(parts: &Parts, config: &Config) -> Result<(), Failure> {
    let refuse = || {
        let message = "this Host is not allowed; call the gateway as localhost or start it with --allowed-host NAME";
        Err(Failure::new(Code::HostNotAllowed, message))
    };
    let header = parts.headers.get_all(header::HOST).iter().map(HeaderValue::to_str);
    let authority = parts.uri.authority().map(|authority| Ok(authority.as_str()));
    let mut found = false;
    for name in header.chain(authority) {
        match name {
            Ok(name) if host_allowed(name, &config.hosts) => found = true,
            _ => return refuse(),
        }
    }
    if found || parts.version == Version::HTTP_10 { Ok(()) } else { refuse() }
}

fn host_allowed(name: &str, allowed: &[String]) -> bool {
    let name = name.to_ascii_lowercase();
    let Some(name) = without_port(&name) else { return false };
    // A bind address in IPv6 is given without the brackets that a Host has.
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    LOOPBACK.contains(&name) || allowed.iter().any(|allowed| allowed == name || allowed == bare)
}

/// `host[:port]` → host, unless the port is no number.
fn without_port(name: &str) -> Option<&str> {
    let start = name.rfind(']').map_or(0, |at| at + 1);
    match name[start..].split_once(':') {
        None => Some(name),
        Some((rest, port)) => port.bytes().all(|byte| byte.is_ascii_digit()).then(|| &name[..start + rest.len()]),
    }
}

/// The caller's origin, if it is a browser's and welcome.
pub(crate) fn origin(method: &Method, headers: &HeaderMap, config: &Config) -> Result<Option<HeaderValue>, Failure> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(None) };
    if origin.to_str().is_ok_and(|origin| origin_allowed(origin, &config.origins)) {
        return Ok(Some(origin.clone()));
    }
    match *method {
        // Harmless, and unreadable for the page without our headers.
        Method::GET | Method::HEAD => Ok(None),
        _ => Err(Failure::new(Code::OriginNotAllowed, "this Origin is not allowed; start the gateway with --cors-origin ORIGIN")),
    }
}

fn origin_allowed(origin: &str, extra: &[String]) -> bool {
    let origin = origin.to_ascii_lowercase();
    let local = match origin.split_once("://") {
        Some(("http" | "https", rest)) => without_port(rest).is_some_and(|host| LOOPBACK.contains(&host)),
        Some(("app" | "vscode-webview" | "vscode-file", _)) => true,
        Some(("tauri", rest)) => rest == "localhost",
        _ => false,
    };
    local || extra.iter().any(|extra| extra == "*" || extra.trim_end_matches('/').eq_ignore_ascii_case(&origin))
}

/// What a browser asks before it calls.
pub(crate) fn preflight(asked: &HeaderMap, answer: &mut HeaderMap) {
    answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, HEAD, DELETE, OPTIONS"));
    answer.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        answer.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    if asked.contains_key("access-control-request-private-network") {
        answer.insert("access-control-allow-private-network", HeaderValue::from_static("true"));
    }
}

/// On every answer to a welcome origin.
pub(crate) fn cors(origin: HeaderValue, answer: &mut HeaderMap) {
    let exposed = HeaderValue::from_static("x-request-id, request-id, x-flash-model, openai-processing-ms, retry-after, x-should-retry");
    answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    answer.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
}

/// What the caller presents as its key; some send an old one in one header beside a good one in another.
pub(crate) fn credentials(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    let plain = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    [bearer, plain("x-api-key"), plain("api-key")].into_iter().flatten().filter(|key| !key.is_empty())
}

pub(crate) fn key(parts: &Parts, config: &Config, bound: IpAddr) -> Result<(), Failure> {
    if config.keys.is_empty() || exempt(&parts.method, &parts.uri, bound) {
        return Ok(());
    }
    // Every key is compared, and in full, whatever the guess.
    let known = credentials(&parts.headers)
        .map(digest)
        .fold(subtle::Choice::from(0), |known, presented| config.keys.iter().fold(known, |known, key| known | key.ct_eq(&presented)));
    if known.into() { Ok(()) } else { Err(Failure::new(Code::InvalidApiKey, "Incorrect API key provided.")) }
}

fn exempt(method: &Method, uri: &Uri, bound: IpAddr) -> bool {
    match uri.path() {
        _ if method == Method::OPTIONS => true,
        "/health" | "/livez" | "/readyz" => true,
        "/" | "/api/hello" => method == Method::HEAD,
        "/metrics" => bound.is_loopback(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let allowed = ["box.lan".to_owned(), "fe80::1".to_owned()];
        let check = |name: &str, wanted: bool| assert_eq!(host_allowed(name, &allowed), wanted, "{name}");
        for name in ["localhost", "LocalHost:8080", "127.0.0.1:1", "[::1]", "[::1]:8080", "box.lan:80", "BOX.LAN", "[fe80::1]:8080"] {
            check(name, true);
        }
        for name in [
            "",
            "evil.com",
            "localhost.evil.com",
            "127.0.0.1.nip.io",
            "localhost:evil",
            "[::1",
            "::1",
            "127.0.0.2",
            "localhost@evil.com",
            "evil.com:8080",
        ] {
            check(name, false);
        }
    }

    #[test]
    fn origins() {
        let check =
            |origin: &str, wanted: bool| assert_eq!(origin_allowed(origin, &["https://app.example/".to_owned()]), wanted, "{origin}");
        for origin in ["http://localhost", "https://localhost:3000", "http://127.0.0.1:5173", "http://[::1]:1", "app://obsidian.md"] {
            check(origin, true);
        }
        for origin in ["tauri://localhost", "vscode-webview://abc", "vscode-file://vscode-app", "https://app.example"] {
            check(origin, true);
        }
        for origin in [
            "null",
            "https://evil.com",
            "http://localhost.evil.com",
            "http://localhost:80.evil.com",
            "tauri://evil",
            "https://app.example.evil.com",
        ] {
            check(origin, false);
        }
        assert!(origin_allowed("https://anything", &["*".to_owned()]));
    }
}
