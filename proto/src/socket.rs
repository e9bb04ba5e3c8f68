//! Where the daemon listens, how to reach it, and how to take that place: one connector for client and gateway, one
//! listener for the daemon. The socket is 0600 in a directory of 0700; a socket nobody answers on is replaced, one that
//! answers is left alone.

use std::{
    env, fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

/// sockaddr_un holds 104 bytes on macOS, 108 on Linux, the final NUL included.
pub const PATH_BYTES_MAX: usize = 103;

/// What a reader that stopped reading lets the daemon send before its sequence pauses: some 1,500 tokens. h2 charges 256
/// bytes for a frame as small as a token's against half of the connection's window, and drops the whole connection when
/// that is used up: hence a small window for a stream, and one for the connection that holds 80 streams paused at once.
const STREAM_WINDOW_BYTES: u32 = 16 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("neither FLASH_HOME nor HOME is set; set FLASH_SOCKET to say where the daemon listens")]
    NoHome,
    #[error("the socket path {path} has {} bytes, more than {PATH_BYTES_MAX}; set FLASH_SOCKET to a shorter one", path.as_os_str().len())]
    TooLong { path: PathBuf },
    #[error("{path} belongs to another user (uid {uid}); set FLASH_SOCKET to a place of your own")]
    NotOurs { path: PathBuf, uid: u32 },
    #[error("{path} exists and is not a socket; remove it or set FLASH_SOCKET")]
    NotASocket { path: PathBuf },
    #[error("another flashd is listening on {path}; stop it with `flashctl daemon stop`")]
    InUse { path: PathBuf },
    #[error("no daemon is listening on {path}: {source}")]
    NotListening { path: PathBuf, source: io::Error },
    #[error("cannot {what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// `FLASH_HOME`, else `~/.flashd`.
pub fn home() -> Result<PathBuf, Error> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("FLASH_HOME").or_else(|| set("HOME").map(|home| home.join(".flashd"))).ok_or(Error::NoHome)
}

/// `FLASH_SOCKET`, else `$XDG_RUNTIME_DIR/flashd/flashd.sock`, else `$FLASH_HOME/run/flashd.sock`.
pub fn default_path() -> Result<PathBuf, Error> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = match (set("FLASH_SOCKET"), set("XDG_RUNTIME_DIR")) {
        (Some(path), _) => path,
        (None, Some(runtime)) => runtime.join("flashd/flashd.sock"),
        (None, None) => home()?.join("run/flashd.sock"),
    };
    checked(path)
}

fn checked(path: PathBuf) -> Result<PathBuf, Error> {
    if path.as_os_str().as_bytes().len() > PATH_BYTES_MAX { Err(Error::TooLong { path }) } else { Ok(path) }
}

/// Connects at once, so that a missing daemon is known here and not at the first call; reconnects by itself later.
pub async fn connect(path: &Path) -> Result<Channel, Error> {
    let path = checked(path.to_path_buf())?;
    let probe = tokio::net::UnixStream::connect(&path).await;
    probe.map_err(|source| Error::NotListening { path: path.clone(), source })?;
    Ok(connect_lazy(&path))
}

/// A channel that connects at its first call and again whenever the daemon came back.
pub fn connect_lazy(path: &Path) -> Channel {
    let path = path.to_path_buf();
    // tonic wants a URI; the connector ignores it.
    tuned(Endpoint::from_static("http://flashd")).connect_with_connector_lazy(tower::service_fn(move |_| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    }))
}

/// For streams of tokens that readers may leave.
pub fn tuned(endpoint: Endpoint) -> Endpoint {
    let endpoint = endpoint.initial_stream_window_size(STREAM_WINDOW_BYTES).initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    // Frames of streams that a client has left come for a while; after 1,024 of them h2 would close the connection, and with it all others.
    endpoint.http2_max_local_error_reset_streams(None)
}

/// Takes the place: creates the directory (0700), replaces a dead socket, refuses a live one. The listener is
/// non-blocking, ready for `tokio::net::UnixListener::from_std`.
///
/// The lock beside the socket is held as long as the returned guard lives, so that two daemons that start together
/// cannot both think the old socket dead.
pub fn bind(path: &Path) -> Result<(UnixListener, Bound), Error> {
    let path = checked(path.to_path_buf())?;
    let io = |what: &'static str, path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::Io { what, path, source }
    };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io("create", directory))?;
    let owner = fs::metadata(directory).map_err(io("look at", directory))?;
    if owner.uid() != rustix::process::geteuid().as_raw() {
        return Err(Error::NotOurs { path: directory.into(), uid: owner.uid() });
    }
    let lock_path = path.with_extension("lock");
    let lock = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&lock_path).map_err(io("open", &lock_path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Err(Error::InUse { path }),
        Err(fs::TryLockError::Error(source)) => return Err(Error::Io { what: "lock", path: lock_path, source }),
    }
    match fs::symlink_metadata(&path) {
        Ok(found) if !found.file_type().is_socket() => return Err(Error::NotASocket { path }),
        Ok(_) if UnixStream::connect(&path).is_ok() => return Err(Error::InUse { path }),
        Ok(_) => fs::remove_file(&path).map_err(io("remove the dead socket", &path))?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(&path).map_err(io("listen on", &path))?;
    // Nobody else can reach a socket in a 0700 directory before this; in a directory of other mode the peer check stands.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(io("restrict", &path))?;
    listener.set_nonblocking(true).map_err(io("prepare", &path))?;
    Ok((listener, Bound { path, _lock: lock }))
}

/// The taken place; dropping it removes the socket file.
#[derive(Debug)]
pub struct Bound {
    path: PathBuf,
    _lock: fs::File,
}

impl Bound {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_a_live_one_and_a_file_are_not() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("run/flashd.sock");
        let (listener, bound) = bind(&path).expect("a fresh place");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().expect("a parent")), 0o700);
        assert!(matches!(bind(&path), Err(Error::InUse { .. })));
        drop((listener, bound));
        assert!(!path.exists());
        drop(UnixListener::bind(&path).expect("a dead socket"));
        assert!(path.exists());
        let (_listener, _bound) = bind(&path).expect("a dead socket is replaced");
        let file = dir.path().join("file.sock");
        fs::write(&file, "").expect("a file");
        assert!(matches!(bind(&file), Err(Error::NotASocket { .. })));
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(bind(&long), Err(Error::TooLong { .. })));
    }
}
