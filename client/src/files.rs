//! Files that are the user's own business: written whole or not at all, readable by nobody else.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use crate::failure::{Failure, exit};

/// Replaces `path` in one step, 0600 in folders of 0700; what was there stays if this fails.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    replace(path, bytes).map_err(|error| Failure::new(exit::CANNOT_CREATE, "file", format!("cannot write {}: {error}", path.display())))
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = folder.join(format!(".{name}.{}", std::process::id()));
    let written = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft).and_then(|mut file| {
        file.write_all(bytes)?;
        // Or a crash of the machine could leave an empty file under the new name.
        file.sync_all()?;
        fs::rename(&draft, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("a/b/file");
        write_private(&path, b"one").expect("written");
        write_private(&path, b"two").expect("replaced");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!((fs::read(&path).expect("read"), mode(&path), mode(path.parent().expect("a parent"))), (b"two".to_vec(), 0o600, 0o700));
        assert_eq!(fs::read_dir(path.parent().expect("a parent")).expect("a folder").count(), 1, "no draft is left");
        fs::create_dir(dir.path().join("folder")).expect("a folder");
        let failure = write_private(&dir.path().join("folder"), b"x").expect_err("a folder is in the way");
        assert_eq!(failure.exit, 73);
        assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 2, "no draft is left");
    }
}
