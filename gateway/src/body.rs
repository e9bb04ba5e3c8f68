//! Request bodies: the content type that only a willing client sends, size limits on the wire and decoded, a client that
//! stops sending. Hands JSON to the dialects; the JSON rules themselves are in `json.rs`.

use std::{
    io::{self, Read},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::Request,
    http::{HeaderMap, header, request::Parts},
};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::time::{Instant, timeout, timeout_at};

use crate::{
    config::Timing,
    error::{Code, Dialect, Failure},
    json,
};

const WIRE_MAX: usize = 32 << 20;
const DECODED_MAX: u64 = 64 << 20;
/// What is read and thrown away so that a client that is still sending gets to read its refusal.
const DISCARD_MAX: usize = 64 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(5);

pub(crate) async fn json(request: Request, timing: &Timing) -> Result<Value, Failure> {
    let (parts, mut body) = request.into_parts();
    let read = match checked(&parts, &body) {
        Ok(coding) => collect(&mut body, timing.body_idle).await.map(|bytes| (coding, bytes)),
        Err(failure) => Err(failure),
    };
    match read {
        Ok((Coding::Identity, bytes)) if bytes.len() < 1 << 16 => json::parse(&bytes),
        // Decoding and parsing megabytes would hold up everyone else's streams.
        Ok((coding, bytes)) => {
            let parsed = tokio::task::spawn_blocking(move || json::parse(&decode(coding, bytes)?)).await;
            parsed.map_err(|_| Failure::new(Code::Engine, "the request body could not be read"))?
        }
        Err(failure) => {
            // After a body that stopped or broke off nothing more will come.
            if failure.code != Code::InvalidJson {
                discard(&parts.headers, body).await;
            }
            Err(failure)
        }
    }
}

#[derive(Clone, Copy)]
enum Coding {
    Identity,
    Gzip,
    Zstd,
}

/// What the headers alone can tell.
fn checked(parts: &Parts, body: &Body) -> Result<Coding, Failure> {
    let text = |name| parts.headers.get(name).map(|value| value.to_str().unwrap_or("?").trim().to_ascii_lowercase());
    let media = text(header::CONTENT_TYPE).unwrap_or_default();
    let media = media.split(';').next().unwrap_or_default().trim();
    // Ollama looks at no Content-Type, and its own examples and litellm send none. What it would keep off, a page of another site, has
    // an Origin and was refused for it.
    let any = Dialect::of(parts.uri.path(), &parts.headers) == Dialect::Ollama && matches!(media, "" | "application/x-www-form-urlencoded");
    if !any && media != "application/json" && !(media.starts_with("application/") && media.ends_with("+json")) {
        let message = "Content-Type must be application/json; with curl: -H 'Content-Type: application/json'";
        return Err(Failure::new(Code::UnsupportedMediaType, message));
    }
    let coding = match text(header::CONTENT_ENCODING).as_deref() {
        None | Some("" | "identity") => Coding::Identity,
        Some("gzip" | "x-gzip") => Coding::Gzip,
        Some("zstd") => Coding::Zstd,
        Some(_) => return Err(Failure::new(Code::UnsupportedMediaType, "Content-Encoding must be identity, gzip or zstd")),
    };
    if body.size_hint().lower() > WIRE_MAX as u64 { Err(too_large()) } else { Ok(coding) }
}

fn too_large() -> Failure {
    let message = format!("the request body is larger than {} MiB ({} MiB decoded)", WIRE_MAX >> 20, DECODED_MAX >> 20);
    Failure::new(Code::RequestTooLarge, message)
}

pub(crate) async fn collect(body: &mut Body, idle: Duration) -> Result<Bytes, Failure> {
    let mut collected = Vec::new();
    loop {
        let frame = timeout(idle, body.frame()).await;
        let frame = frame.map_err(|_| Failure::new(Code::InvalidJson, "the request body stopped arriving"))?;
        let Some(frame) = frame else { return Ok(collected.into()) };
        let frame = frame.map_err(|_| Failure::new(Code::InvalidJson, "the request body broke off"))?;
        let Ok(data) = frame.into_data() else { continue };
        if collected.len() + data.len() > WIRE_MAX {
            return Err(too_large());
        }
        collected.extend_from_slice(&data);
    }
}

fn decode(coding: Coding, bytes: Bytes) -> Result<Vec<u8>, Failure> {
    let broken = |_| Failure::new(Code::InvalidJson, "the request body cannot be decompressed");
    let bounded = |reader: &mut dyn Read| {
        let mut decoded = Vec::new();
        reader.take(DECODED_MAX + 1).read_to_end(&mut decoded).map(|_| decoded)
    };
    let decoded = match coding {
        Coding::Identity => Ok(bytes.into()),
        Coding::Gzip => bounded(&mut flate2::read::MultiGzDecoder::new(&*bytes)),
        Coding::Zstd => frames(&bytes),
    };
    let decoded = decoded.map_err(broken)?;
    if decoded.len() as u64 > DECODED_MAX { Err(too_large()) } else { Ok(decoded) }
}

/// One frame after the other.
fn frames(mut bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut decoded = Vec::new();
    while !bytes.is_empty() && decoded.len() as u64 <= DECODED_MAX {
        let left = DECODED_MAX + 1 - decoded.len() as u64;
        let frame = ruzstd::decoding::StreamingDecoder::new(&mut bytes).map_err(io::Error::other)?;
        frame.take(left).read_to_end(&mut decoded)?;
    }
    Ok(decoded)
}

/// Reads what a refused client is still sending: closing on it would reset the connection and lose the refusal.
pub(crate) async fn discard(headers: &HeaderMap, mut body: Body) {
    // A client that waits for 100 Continue sends nothing, unless it is asked to by being read.
    if headers.contains_key(header::EXPECT) || body.size_hint().lower() > DISCARD_MAX as u64 {
        return;
    }
    let deadline = Instant::now() + DISCARD_TIME;
    let mut left = DISCARD_MAX;
    while let Ok(Some(Ok(frame))) = timeout_at(deadline, body.frame()).await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn compressed_bodies_are_bounded() {
        let gzip = |bytes: &[u8]| {
            let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            writer.write_all(bytes).expect("compress");
            writer.finish().expect("compress")
        };
        let zstd = |bytes: &[u8]| ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
        let check = |coding, bytes: Vec<u8>, wanted: Result<usize, Code>| {
            assert_eq!(decode(coding, bytes.into()).map(|decoded| decoded.len()).map_err(|failure| failure.code), wanted);
        };
        let bomb = vec![b' '; usize::try_from(DECODED_MAX).expect("64 MiB") + 1];
        check(Coding::Gzip, gzip(b"{}"), Ok(2));
        check(Coding::Zstd, zstd(b"{}"), Ok(2));
        check(Coding::Zstd, [zstd(b"{"), zstd(b"}"), zstd(b" ")].concat(), Ok(3));
        check(Coding::Zstd, [zstd(b"{}"), b"x".to_vec()].concat(), Err(Code::InvalidJson));
        check(Coding::Gzip, gzip(&bomb), Err(Code::RequestTooLarge));
        check(Coding::Zstd, zstd(&bomb), Err(Code::RequestTooLarge));
        check(Coding::Gzip, b"{}".to_vec(), Err(Code::InvalidJson));
        check(Coding::Zstd, b"{}".to_vec(), Err(Code::InvalidJson));
        check(Coding::Gzip, gzip(b"{}")[..12].to_vec(), Err(Code::InvalidJson));
    }
}
