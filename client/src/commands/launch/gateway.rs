//! The gateway that an agent is to use: where it should be, whether it is there, what it says of a model, and one of our own where there is
//! none. Speaks as much HTTP as two questions take.

use std::{io::Write, os::unix::process::CommandExt, process::Stdio, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::TcpStream,
    process::{Child, ChildStderr},
    time::timeout,
};

use crate::{
    args::Global,
    connect,
    failure::{Failure, exit},
    log_file,
    url::Url,
};

const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Far more than a gateway says of one model.
const ANSWER_BYTES: u64 = 1 << 20;

/// A gateway of ours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) daemon_up: bool,
}

/// The gateway there; `None` if this machine has none yet.
pub(super) async fn find(url: &Url) -> Result<Option<Found>, Failure> {
    // What is behind TLS is the user's business, and cannot be asked from here.
    if url.tls {
        return Ok(Some(Found { daemon_up: true }));
    }
    let unavailable = |message: String| Failure::new(exit::UNAVAILABLE, "gateway_unavailable", message).hint("FLASH_HOST names it");
    match get(url, "/health", None).await {
        Ok((_, body)) if body.get("daemon").is_some() => Ok(Some(Found { daemon_up: body["daemon"] == "up" })),
        Ok(_) if url.chosen => Err(unavailable(format!("what listens on {url} is no flash-gateway"))),
        Err(error) if url.chosen && !url.is_loopback() => Err(unavailable(format!("no gateway answers on {url}: {error}"))),
        _ => Ok(None),
    }
}

/// The context of a model, as the gateway tells it; `None` if it cannot be asked.
pub(super) async fn context(url: &Url, model: &str, key: Option<&str>) -> Result<Option<u32>, Failure> {
    if url.tls {
        return Ok(None);
    }
    let unavailable = |message: String| Failure::new(exit::UNAVAILABLE, "gateway_unavailable", message);
    let answer = get(url, &format!("/v1/models/{}", encoded(model)), key).await;
    let (status, body) = answer.map_err(|error| unavailable(format!("the gateway on {url} went away: {error}")))?;
    let told = body["error"]["message"].as_str().unwrap_or("it does not say why").to_owned();
    match status {
        200 => Ok(body["context_length"].as_u64().and_then(|tokens| u32::try_from(tokens).ok())),
        401 => Err(Failure::new(exit::PERMISSION, "invalid_api_key", format!("the gateway on {url} wants another key"))
            .hint("FLASH_API_KEY is the one it was started with")),
        404 => {
            Err(Failure::new(exit::GENERIC, "model_not_found", told).hint("`flashctl models` lists what is installed; --model names one"))
        }
        status => Err(unavailable(format!("the gateway on {url} answered {status}: {told}"))),
    }
}

fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// One question in HTTP/1.0, whose answer ends with the connection: status and JSON, null if it is none.
async fn get(url: &Url, path: &str, key: Option<&str>) -> std::io::Result<(u16, Value)> {
    let asked = async {
        let mut stream = TcpStream::connect(url.address()).await?;
        let key = key.filter(|key| !key.contains(['\r', '\n'])).map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
        let request = format!("GET {path} HTTP/1.0\r\nHost: {}:{}\r\n{key}Accept: application/json\r\n\r\n", url.host, url.port);
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = timeout(ANSWER_WITHIN, asked).await.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.strip_prefix("HTTP/1.").and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
    let status = status.ok_or_else(|| std::io::Error::other("that is no HTTP"))?;
    Ok((status, serde_json::from_str(body).unwrap_or_default()))
}

/// A gateway on a free port, and where it listens. In a process group of its own, so that Ctrl-C is between terminal and agent; its log goes
/// to a file, because the screen is the agent's.
pub(super) async fn start(global: &Global) -> Result<(Child, String), Failure> {
    let program = connect::program("flash-gateway")?;
    let mut command = std::process::Command::new(&program);
    command.process_group(0).args(["--host", "127.0.0.1", "--port", "0", "--socket"]).arg(connect::socket_path(global)?);
    let mut command = tokio::process::Command::from(command);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let failed = |message: String| Failure::new(exit::GENERIC, "gateway_start", message);
    let mut child = command.spawn().map_err(|error| failed(format!("cannot start {}: {error}", program.display())))?;
    let stderr = child.stderr.take().ok_or_else(|| failed("the gateway has no log".into()))?;
    let mut lines = BufReader::new(stderr).lines();
    let mut said = Vec::new();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some((_, base)) = line.split_once("listening on http://") {
            let base = format!("http://{}", base.trim_end_matches('/'));
            tokio::spawn(keep_log(lines));
            return Ok((child, base));
        }
        said.push(line);
    }
    let status = child.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string());
    Err(failed(format!("flash-gateway did not start ({status})\n{}", said.join("\n"))))
}

/// Read to the end even where it cannot be kept, or the gateway would stand still.
async fn keep_log(mut lines: Lines<BufReader<ChildStderr>>) {
    let path = log_file::path().map(|path| path.with_file_name("gateway.log"));
    let mut file = path.ok().and_then(|path| log_file::open(&path).ok());
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some((file, _)) = &mut file {
            let _ = writeln!(file, "{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_into_paths() {
        assert_eq!(encoded("org/a b-4bit"), "org%2Fa%20b-4bit");
    }
}
