//! HTTP/1.1 as bytes on a TCP connection: what a test sends is exactly what goes out, well-formed or not, and what comes
//! back is split into status, headers and body. Not a client for anything else.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    ops::Range,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::DEADLINE;

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    /// `error.code` of an error body.
    pub fn code(&self) -> Result<String> {
        let body = self.json()?;
        Ok(body["error"]["code"].as_str().with_context(|| format!("no error code in {body}"))?.to_owned())
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

pub fn get(address: &str, path: &str) -> Result<Response> {
    send(address, "GET", path, &[], b"")
}

pub fn post(address: &str, path: &str, body: &Value) -> Result<Response> {
    post_bytes(address, path, body.to_string().as_bytes())
}

pub fn post_bytes(address: &str, path: &str, body: &[u8]) -> Result<Response> {
    send(address, "POST", path, &[("Content-Type", "application/json")], body)
}

pub fn send(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Response> {
    Stream::open(address, method, path, headers, body)?.finish()
}

/// A response whose body is still coming. Dropping it closes the connection.
#[derive(Debug)]
pub struct Stream {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
    body: Body,
}

#[derive(Clone, Copy, Debug)]
enum Body {
    /// Bytes left of the current chunk.
    Chunked(usize),
    /// Bytes left.
    Sized(usize),
    UntilClose,
    Ended,
}

impl Stream {
    pub fn open(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Self> {
        let connection = TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
        connection.set_read_timeout(Some(DEADLINE))?;
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut writer = connection.try_clone()?;
        let bytes = [head.as_bytes(), body].concat();
        // A server may refuse a large body before it has read it; the answer counts, not the broken pipe.
        let sender = thread::spawn(move || drop(writer.write_all(&bytes)));
        let mut reader = BufReader::new(connection);
        let (status, headers) = read_head(&mut reader)?;
        if body.len() < 1 << 16 {
            sender.join().expect("sending does not panic");
        }
        let length = header(&headers, "content-length").and_then(|length| length.parse().ok());
        let chunked = header(&headers, "transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
        let body = match (method, chunked, length) {
            ("HEAD", _, _) => Body::Ended,
            (_, true, _) => Body::Chunked(0),
            (_, false, Some(length)) => Body::Sized(length),
            (_, false, None) => Body::UntilClose,
        };
        Ok(Self { status, headers, reader, body })
    }

    pub fn finish(mut self) -> Result<Response> {
        let mut body = Vec::new();
        while let Some(byte) = self.byte()? {
            body.push(byte);
        }
        Ok(Response { status: self.status, headers: self.headers, body })
    }

    /// The next event's data; `None` at the end of the body. Comments and other fields are passed over.
    pub fn event(&mut self) -> Result<Option<String>> {
        let mut data = None;
        loop {
            let Some(line) = self.line()? else { return Ok(data) };
            if line.is_empty() && data.is_some() {
                return Ok(data);
            }
            if let Some(text) = line.strip_prefix("data: ") {
                data = Some(text.to_owned());
            }
        }
    }

    /// Reads up to `[DONE]`: from the first event to there, and how many tokens the usage in the last one counts.
    pub fn timed(mut self) -> Result<(Range<Instant>, u32)> {
        ensure!(self.status == 200, "status {}", self.status);
        let (mut first, mut last) = (None, String::new());
        while let Some(data) = self.event()?.filter(|data| data != "[DONE]") {
            first.get_or_insert_with(Instant::now);
            last = data;
        }
        let span = first.context("an event")?..Instant::now();
        let tokens = serde_json::from_str::<Value>(&last)?["usage"]["completion_tokens"].as_u64();
        Ok((span, tokens.with_context(|| format!("no usage in {last}"))? as u32))
    }

    /// All remaining events up to `[DONE]`, which must come.
    pub fn events(&mut self) -> Result<Vec<Value>> {
        let mut events = Vec::new();
        while let Some(data) = self.event()? {
            if data == "[DONE]" {
                return Ok(events);
            }
            events.push(serde_json::from_str(&data).with_context(|| format!("not JSON: {data}"))?);
        }
        bail!("no [DONE] after {events:?}")
    }

    fn line(&mut self) -> Result<Option<String>> {
        let mut line = Vec::new();
        loop {
            match self.byte()? {
                Some(b'\n') => return Ok(Some(String::from_utf8(line)?.trim_end_matches('\r').to_owned())),
                Some(byte) => line.push(byte),
                None if line.is_empty() => return Ok(None),
                None => bail!("the body ends inside a line"),
            }
        }
    }

    fn byte(&mut self) -> Result<Option<u8>> {
        if let Body::Chunked(0) = self.body {
            let size = read_line(&mut self.reader)?;
            let size = usize::from_str_radix(size.trim(), 16).with_context(|| format!("a chunk size, not {size:?}"))?;
            self.body = if size == 0 { Body::Ended } else { Body::Chunked(size) };
        }
        if matches!(self.body, Body::Ended | Body::Sized(0)) {
            return Ok(None);
        }
        let mut byte = [0];
        if self.reader.read(&mut byte)? == 0 {
            return match self.body {
                Body::UntilClose => Ok(None),
                cut => bail!("the connection was cut: {cut:?}"),
            };
        }
        match &mut self.body {
            Body::Chunked(left) => {
                *left -= 1;
                if *left == 0 {
                    read_line(&mut self.reader)?;
                }
            }
            Body::Sized(left) => *left -= 1,
            Body::UntilClose | Body::Ended => {}
        }
        Ok(Some(byte[0]))
    }
}

fn read_head(reader: &mut impl BufRead) -> Result<(u16, Vec<(String, String)>)> {
    let status = read_line(reader)?;
    let code = status.split(' ').nth(1).and_then(|code| code.parse().ok()).with_context(|| format!("a status line, not {status:?}"))?;
    let mut headers = Vec::new();
    loop {
        let line = read_line(reader)?;
        match line.split_once(':') {
            Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.trim().to_owned())),
            None if line.is_empty() => break,
            None => bail!("a header, not {line:?}"),
        }
    }
    // 1xx announces; the answer follows.
    if code < 200 { read_head(reader) } else { Ok((code, headers)) }
}

fn read_line(reader: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        bail!("the connection was closed");
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
