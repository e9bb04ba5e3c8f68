//! Which experts were in memory when a model was unloaded, kept in `$FLASH_HOME/state` so that the next load can read them
//! back. What is in such a file is `flash_experts`' business. Failing is never worse than a cold cache, so it is logged and
//! no one else's error. Called by the worker.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use flash_engine::{Engine, Hot};

/// Far beyond what any model needs; a larger file is not ours.
const BYTES_MAX: u64 = 16 << 20;

/// The folder, or that nothing is kept.
#[derive(Clone, Debug)]
pub(crate) struct HotSets(pub(crate) Option<PathBuf>);

impl HotSets {
    pub(crate) fn restore(&self, engine: &mut Engine) {
        let Some(path) = self.path(engine) else { return };
        match read(&path).map(|bytes| bytes.map(|bytes| Hot::from_bytes(&bytes))) {
            Ok(None) => {}
            Ok(Some(Ok(hot))) => engine.warm(hot),
            Ok(Some(Err(error))) => tracing::warn!(path = %path.display(), %error, "starting cold: the hot set cannot be used"),
            Err(error) => tracing::warn!(path = %path.display(), %error, "starting cold: the hot set cannot be read"),
        }
    }

    pub(crate) fn save(&self, engine: &Engine) {
        let Some(path) = self.path(engine).filter(|_| was_used(engine)) else { return };
        if let Err(error) = write(&path, &engine.hot().to_bytes()) {
            tracing::warn!(path = %path.display(), %error, "the hot set cannot be saved");
        }
    }

    fn path(&self, engine: &Engine) -> Option<PathBuf> {
        let id = engine.info().id.replace('/', "--");
        Some(self.0.as_ref()?.join(format!("{id}-{}.hot", engine.fingerprint())))
    }
}

/// An engine that answered nobody knows no better than the file.
fn was_used(engine: &Engine) -> bool {
    let experts = engine.report().experts;
    experts.hits + experts.misses > 0
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(io::Error::other(format!("it has more than {BYTES_MAX} bytes")));
    }
    Ok(Some(bytes))
}

/// A reader sees the old file or the new one.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let part = path.with_extension("part");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
    file.write_all(bytes)?;
    fs::rename(&part, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_private_and_replaced_whole() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let path = home.path().join("state/m-fp_1.hot");
        assert_eq!(read(&path).expect("no error"), None);
        for bytes in [&b"one"[..], b"another"] {
            write(&path, bytes).expect("written");
            assert_eq!(read(&path).expect("read").as_deref(), Some(bytes));
        }
        assert_eq!(fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(home.path().join("state")).expect("a folder").count(), 1, "nothing else is left");
        File::create(&path).and_then(|file| file.set_len(BYTES_MAX + 1)).expect("a large file");
        assert!(read(&path).is_err());
    }
}
