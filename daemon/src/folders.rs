//! Models' folders as folders: copied, and deleted. Only what lies in flashd's own folders is deleted; who may touch which folder meanwhile
//! is the worker's (`Command::Reserve`). Called by the services.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use flash_engine::{Progress, Tell};

use crate::Error;

/// Room that a copy leaves on its disk.
const SPARE: u64 = 64 << 20;

/// Copies a checkpoint's files into a folder that appears when it is whole; says how many bytes they have.
pub(crate) fn copy(from: &Path, to: &Path, tell: Tell<'_>) -> Result<u64, Error> {
    let failed = |what: &'static str, path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::Create { what, path, source }
    };
    if to.exists() {
        return Err(Error::Value { param: "name", reason: format!("{} exists already", to.display()) });
    }
    let files = files(from).map_err(failed("read", from))?;
    let total = files.iter().map(|(_, bytes)| bytes).sum();
    let parent = to.parent().unwrap_or(to);
    fs::create_dir_all(parent).map_err(failed("create", parent))?;
    let room = rustix::fs::statvfs(parent).map_or(u64::MAX, |disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    if room < total + SPARE {
        return Err(Error::NoSpace { path: parent.into(), needed: total + SPARE, free: room });
    }
    // Listings pass over hidden folders.
    let draft = Draft(parent.join(format!(".{}.{}", to.file_name().unwrap_or_default().to_string_lossy(), std::process::id())));
    fs::create_dir(&draft.0).map_err(failed("create", &draft.0))?;
    let mut done = 0;
    for (path, bytes) in files {
        if !tell(Progress { stage: "copying", done, total }) {
            return Err(flash_engine::Error::Cancelled.into());
        }
        let target = draft.0.join(path.file_name().unwrap_or_default());
        // The kernel shares the blocks where the file system can.
        fs::copy(&path, &target).map_err(failed("copy", &path))?;
        done += bytes;
    }
    tell(Progress { stage: "copying", done, total });
    fs::rename(&draft.0, to).map_err(failed("create", to))?;
    Ok(total)
}

/// A copy that is not whole yet; gone when it is dropped, unless it was renamed.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// When a checkpoint was last changed, as listings say it.
pub(crate) fn modified(folder: &Path) -> SystemTime {
    fs::metadata(folder.join("config.json")).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The files of a checkpoint's folder and their lengths; links are what they point to, as in Hugging Face's cache.
fn files(folder: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let meta = fs::metadata(&path)?;
        if meta.is_file() {
            files.push((path, meta.len()));
        }
    }
    Ok(files)
}

/// What the files in a folder have together.
pub(crate) fn bytes(folder: &Path) -> u64 {
    files(folder).map_or(0, |files| files.iter().map(|(_, bytes)| bytes).sum())
}

/// Deletes a model's folder if it lies in one of `roots`; says how many bytes its files had.
pub(crate) fn remove(folder: &Path, roots: &[PathBuf]) -> Result<u64, Error> {
    let inside = |root: &PathBuf| root.canonicalize().is_ok_and(|root| folder != root && folder.starts_with(root));
    if !roots.iter().any(inside) {
        let reason = format!("{} is in no folder of flashd's own; delete it with the program that made it, or by hand", folder.display());
        return Err(Error::Value { param: "model", reason });
    }
    let bytes = bytes(folder);
    let failed = |source| Error::Create { what: "delete", path: folder.into(), source };
    // At once for everybody who looks, however long the rest takes.
    let hidden = folder.with_file_name(format!(".{}.{}", folder.file_name().unwrap_or_default().to_string_lossy(), std::process::id()));
    fs::rename(folder, &hidden).map_err(failed)?;
    fs::remove_dir_all(&hidden).map_err(failed)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(folder: &Path) {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(folder.join("config.json"), "{}").expect("a file");
        fs::write(folder.join("weights"), [7; 1000]).expect("a file");
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_copy_is_whole_or_not_there() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (from, to) = (dir.path().join("a"), dir.path().join("models/b"));
        model(&from);
        assert_eq!(copy(&from, &to, &mut |_| true).expect("copied"), 1002);
        assert_eq!((names(&to), names(&dir.path().join("models"))), (vec!["config.json".into(), "weights".into()], vec!["b".into()]));
        let error = copy(&from, &to, &mut |_| true).expect_err("it is there").to_string();
        assert!(error.contains("exists already"), "{error}");
        let mut turns = 0;
        let mut tell = |_| {
            turns += 1;
            turns < 2
        };
        copy(&from, &dir.path().join("models/c"), &mut tell).expect_err("cancelled");
        assert_eq!(names(&dir.path().join("models")), ["b"], "nothing is left of what was cancelled");
    }

    #[test]
    fn only_our_own_folders_are_deleted() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let root = dir.path().canonicalize().expect("a path");
        let (ours, other) = (root.join("models"), root.join("other"));
        model(&ours.join("a"));
        model(&other.join("b"));
        let error = remove(&other.join("b"), std::slice::from_ref(&ours)).expect_err("not ours").to_string();
        assert!(error.contains("no folder of flashd's own"), "{error}");
        remove(&ours, std::slice::from_ref(&ours)).expect_err("a root is no model");
        assert_eq!(remove(&ours.join("a"), &[root.join("missing"), ours.clone()]).expect("deleted"), 1002);
        assert_eq!((names(&ours), names(&other)), (Vec::<String>::new(), vec!["b".into()]));
    }
}
