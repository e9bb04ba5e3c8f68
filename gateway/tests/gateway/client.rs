//! HTTP as bytes: requests written by hand, replies read by the few rules that need reading.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use crate::soon;

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// Status and error code, after a look at the shape.
    pub(crate) fn error(&self) -> (u16, String) {
        let body = self.json();
        let error = body["error"].as_object().expect("an error");
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        (self.status, error["code"].as_str().expect("a code").to_owned())
    }
}

pub(crate) struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub(crate) async fn open(address: SocketAddr) -> Self {
        Self { stream: BufReader::new(TcpStream::connect(address).await.expect("the gateway listens")) }
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        soon("writing", self.stream.write_all(bytes)).await.expect("the gateway reads");
    }

    pub(crate) async fn line(&mut self) -> String {
        let mut line = String::new();
        soon("a line", self.stream.read_line(&mut line)).await.expect("text");
        line
    }

    /// Lines up to the one that contains `part`.
    pub(crate) async fn until(&mut self, part: &str) -> String {
        let mut all = String::new();
        loop {
            let line = self.line().await;
            assert!(!line.is_empty(), "`{part}` did not come: {all}");
            all.push_str(&line);
            if line.contains(part) {
                return all;
            }
        }
    }

    async fn head(&mut self) -> Reply {
        let status = self.line().await;
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("a status line, not {status:?}"));
        let mut headers = Vec::new();
        loop {
            let line = self.line().await;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        Reply { status, headers, body: Vec::new() }
    }

    pub(crate) async fn reply(&mut self, to_head: bool) -> Reply {
        let mut reply = self.head().await;
        if to_head || reply.status == 204 {
            return reply;
        }
        if let Some(length) = reply.header("content-length") {
            reply.body = vec![0; length.parse().expect("a length")];
            soon("the body", self.stream.read_exact(&mut reply.body)).await.expect("all of it");
            return reply;
        }
        assert_eq!(reply.header("transfer-encoding"), Some("chunked"));
        loop {
            let length = usize::from_str_radix(self.line().await.trim(), 16).expect("a chunk length");
            let mut chunk = vec![0; length + 2];
            soon("a chunk", self.stream.read_exact(&mut chunk)).await.expect("all of it");
            if length == 0 {
                return reply;
            }
            reply.body.extend_from_slice(&chunk[..length]);
        }
    }

    /// Until the gateway closes the connection.
    pub(crate) async fn closed(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = soon("the end of the connection", self.stream.read_to_end(&mut rest)).await;
        rest
    }
}

pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\n");
    let given = |wanted: &str| headers.iter().any(|(name, _)| name.eq_ignore_ascii_case(wanted));
    if !given("host") {
        head.push_str("Host: localhost:8080\r\n");
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if method == "POST" {
        if !given("content-type") {
            head.push_str("Content-Type: application/json\r\n");
        }
        if !given("transfer-encoding") {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

pub(crate) async fn call(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut client = Client::open(address).await;
    client.write(&request(method, path, headers, body)).await;
    client.reply(method == "HEAD").await
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Reply {
    call(address, "GET", path, &[], b"").await
}

pub(crate) async fn post(address: SocketAddr, path: &str, body: &Value) -> Reply {
    call(address, "POST", path, &[], body.to_string().as_bytes()).await
}

pub(crate) async fn chat(address: SocketAddr, body: &Value) -> Reply {
    call(address, "POST", "/v1/chat/completions", &[], body.to_string().as_bytes()).await
}
