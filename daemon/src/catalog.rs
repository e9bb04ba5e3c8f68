//! Which models are on disk, by name, and their text sides. Looks at files only; what is loaded is the worker's
//! business. Called by the services.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use flash_engine::{ModelInfo, Text, hub};
use tokio::{sync::Semaphore, task::spawn_blocking};

use crate::{Error, folders, worker::Model};

/// How long a listing is believed; a stale one is still answered while the next is made.
const LISTING_TTL: Duration = Duration::from_secs(5);
/// Prompts rendered and encoded at the same time: they are CPU work beside the engine's.
const ENCODERS: usize = 2;
/// The bundled model, last resort for `local`.
const BUNDLED: &str = "flash-tiny-moe";

#[derive(Debug)]
pub(crate) struct Catalog {
    roots: Vec<PathBuf>,
    /// The configured default model.
    default: Option<String>,
    listing: tokio::sync::Mutex<Option<Listing>>,
    /// How often something was written that a listing tells of.
    forgotten: AtomicU64,
    refreshing: Arc<Semaphore>,
    /// The text side used last of a model that is not loaded.
    text: Mutex<Option<(PathBuf, Arc<Text>)>>,
    encoders: Semaphore,
}

#[derive(Clone, Debug)]
struct Listing {
    at: Instant,
    entries: Arc<Vec<Entry>>,
}

/// One checkpoint; unlike [`hub::Installed`] its error is text, so that a listing can be shared.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) model: Model,
    pub(crate) modified: std::time::SystemTime,
    pub(crate) info: Result<ModelInfo, String>,
    /// Of its whole folder.
    pub(crate) disk_bytes: u64,
}

impl Catalog {
    pub(crate) fn new(roots: Vec<PathBuf>, default: Option<String>) -> Self {
        Self {
            roots,
            default,
            listing: tokio::sync::Mutex::new(None),
            forgotten: AtomicU64::new(0),
            refreshing: Arc::new(Semaphore::new(1)),
            text: Mutex::new(None),
            encoders: Semaphore::new(ENCODERS),
        }
    }

    /// What is installed, from memory if it was looked at before; a stale listing is renewed in the background.
    pub(crate) async fn list(self: &Arc<Self>) -> Arc<Vec<Entry>> {
        let mut listing = self.listing.lock().await;
        let Some(known) = listing.clone() else {
            let fresh = self.scan().await;
            *listing = Some(fresh.clone());
            return fresh.entries;
        };
        if known.at.elapsed() > LISTING_TTL
            && let Ok(permit) = self.refreshing.clone().try_acquire_owned()
        {
            let catalog = self.clone();
            tokio::spawn(async move {
                catalog.rescan().await;
                drop(permit);
            });
        }
        known.entries
    }

    /// A fresh listing: something was not found in the known one.
    async fn rescan(&self) -> Arc<Vec<Entry>> {
        let forgotten = self.forgotten.load(SeqCst);
        let fresh = self.scan().await;
        let mut listing = self.listing.lock().await;
        // Else it may be older than what was written meanwhile.
        if self.forgotten.load(SeqCst) == forgotten {
            *listing = Some(fresh.clone());
        }
        fresh.entries
    }

    async fn scan(&self) -> Listing {
        // The default model is one of them, wherever it lies.
        let roots: Vec<_> = self.roots.iter().cloned().chain(self.as_path("")).collect();
        let entries = spawn_blocking(move || hub::installed(&roots).into_iter().map(entry).collect()).await.unwrap_or_else(|error| {
            tracing::error!(%error, "looking for models failed");
            Vec::new()
        });
        Listing { at: Instant::now(), entries: Arc::new(entries) }
    }

    /// The id of what an empty name or `local` means now; a configured name that is nobody's as it is.
    pub(crate) fn default_model(&self, entries: &[Entry]) -> Option<String> {
        self.default_entry(entries).map(|entry| entry.model.id.clone()).or_else(|| self.default.clone())
    }

    fn default_entry<'a>(&self, entries: &'a [Entry]) -> Option<&'a Entry> {
        let mut usable = entries.iter().filter(|entry| entry.info.is_ok());
        match (&self.default, usable.next(), usable.next()) {
            (Some(default), ..) => named(entries, default).or_else(|| {
                let path = self.as_path("")?;
                entries.iter().find(|entry| entry.model.path == path)
            }),
            (None, Some(only), None) => Some(only),
            _ => entries.iter().find(|entry| entry.model.id == BUNDLED),
        }
    }

    /// The model a name means: an id (exact, then any case, then its last part, then without `:latest`), or a path.
    pub(crate) async fn resolve(self: &Arc<Self>, name: &str) -> Result<Model, Error> {
        let entries = self.list().await;
        if let Some(found) = self.find(&entries, name) {
            return Ok(found);
        }
        if let Some(path) = self.as_path(name) {
            let described = spawn_blocking(move || hub::describe(&path)).await;
            let info = described.map_err(|error| flash_engine::Error::Internal(error.to_string()))?;
            let id = name.to_owned();
            return match info {
                Ok(info) => Ok(Model { id: info.id, path: info.path }),
                Err(source) => Err(Error::Load { id, source: source.into() }),
            };
        }
        let entries = self.rescan().await;
        self.find(&entries, name).ok_or_else(|| {
            let ids: Vec<_> = entries.iter().filter(|entry| entry.info.is_ok()).map(|entry| entry.model.id.as_str()).collect();
            let available = if ids.is_empty() { "none is".into() } else { format!("available: {}", ids.join(", ")) };
            Error::ModelNotFound { wanted: if name.is_empty() { "local".into() } else { name.into() }, available }
        })
    }

    /// As [`Catalog::resolve`], but a path may hold a checkpoint that cannot be served: packing may be what it needs.
    pub(crate) async fn locate(self: &Arc<Self>, name: &str) -> Result<Model, Error> {
        match (self.resolve(name).await, self.as_path(name)) {
            (Err(Error::Load { .. }), Some(path)) => {
                let id = path.file_name().map(|name| name.to_string_lossy().into_owned());
                Ok(Model { id: id.unwrap_or_else(|| name.into()), path })
            }
            (found, _) => found,
        }
    }

    /// Something was written: the next listing looks again. For threads that may block.
    pub(crate) fn forget_listing(&self) {
        let mut listing = self.listing.blocking_lock();
        self.forgotten.fetch_add(1, SeqCst);
        *listing = None;
    }

    fn find(&self, entries: &[Entry], name: &str) -> Option<Model> {
        let found = match name {
            "" | "local" | "local:latest" => self.default_entry(entries),
            name => named(entries, name),
        };
        found.map(|entry| entry.model.clone())
    }

    /// The folder a name points to: the name itself, or a configured default that is a path.
    fn as_path(&self, name: &str) -> Option<PathBuf> {
        let name = if matches!(name, "" | "local") { self.default.as_deref()? } else { name };
        let path = Path::new(name);
        if path.join("config.json").is_file() { path.canonicalize().ok() } else { None }
    }

    /// Tokenizer and template of `model`: those of the loaded one if it is that, else opened now.
    pub(crate) async fn text(&self, model: &Model, loaded: Option<(&Model, &Arc<Text>)>) -> Result<Arc<Text>, Error> {
        {
            let mut known = self.text.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, text)) = loaded.filter(|(loaded, _)| loaded.path == model.path) {
                known.take_if(|(path, _)| *path == model.path);
                return Ok(text.clone());
            }
            if let Some((_, text)) = known.as_ref().filter(|(path, _)| *path == model.path) {
                return Ok(text.clone());
            }
        }
        let path = model.path.clone();
        let text = self.encode(move || Text::open(&path)).await.map_err(|error| match error {
            Error::Engine(source) => Error::Load { id: model.id.clone(), source: source.into() },
            error => error,
        })?;
        let text = Arc::new(text);
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = Some((model.path.clone(), text.clone()));
        Ok(text)
    }

    /// The engine has a text side of its own now: a second copy of a tokenizer is tens of megabytes.
    pub(crate) fn forget_text(&self, model: &Model) {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).take_if(|(path, _)| *path == model.path);
    }

    /// Runs text work off the async threads, a few at a time. A panic in it is an error of this request alone.
    pub(crate) async fn encode<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, flash_engine::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let _permit = self.encoders.acquire().await.expect("the semaphore is never closed");
        match spawn_blocking(work).await {
            Ok(result) => Ok(result?),
            Err(error) => Err(flash_engine::Error::Internal(format!("preparing the prompt failed: {error}")).into()),
        }
    }
}

fn named<'a>(entries: &'a [Entry], name: &str) -> Option<&'a Entry> {
    let find = |name: &str| {
        let matching = |same: &dyn Fn(&str) -> bool| entries.iter().find(|entry| same(&entry.model.id));
        let basename = |id: &str| id.rsplit('/').next().is_some_and(|last| last.eq_ignore_ascii_case(name));
        matching(&|id| id == name).or_else(|| matching(&|id| id.eq_ignore_ascii_case(name))).or_else(|| matching(&basename))
    };
    find(name).or_else(|| find(name.strip_suffix(":latest")?))
}

fn entry(found: hub::Installed) -> Entry {
    let model = Model { id: found.id, path: found.path };
    let disk_bytes = folders::bytes(&model.path);
    Entry { model, modified: found.modified, info: found.info.map_err(|error| error.to_string()), disk_bytes }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn entries(ids: &[&str]) -> Vec<Entry> {
        let info = |id: &str| ModelInfo {
            id: id.into(),
            path: id.into(),
            arch: "qwen3_moe".into(),
            params: 1,
            active_params: 1,
            quantization: "bf16".into(),
            size_bytes: 1,
            context_max: 1,
            layers: 1,
            experts: 1,
            top_k: 1,
            vocab_size: 1,
            expert_bytes: 1,
            trunk_bytes: 1,
            packed: false,
            tools: false,
            thinks: false,
        };
        let entry = |id: &&str| {
            let (id, info) = id.strip_prefix('!').map_or_else(|| (*id, Ok(info(id))), |id| (id, Err("bad".into())));
            Entry { model: Model { id: id.into(), path: id.into() }, modified: SystemTime::UNIX_EPOCH, info, disk_bytes: 1 }
        };
        ids.iter().map(entry).collect()
    }

    #[test]
    fn names_find_the_closest_id() {
        let installed = entries(&["Qwen/Tiny", "tiny", "TINY", "pub/Other-MoE", "pub/x:latest"]);
        let catalog = Catalog::new(Vec::new(), None);
        let check = |name: &str, expected: Option<&str>| {
            assert_eq!(catalog.find(&installed, name).map(|model| model.id).as_deref(), expected, "{name}");
        };
        check("TINY", Some("TINY"));
        check("Tiny", Some("tiny"));
        check("qwen/tiny", Some("Qwen/Tiny"));
        check("other-moe", Some("pub/Other-MoE"));
        check("pub/Other-MoE:latest", Some("pub/Other-MoE"));
        check("x:latest", Some("pub/x:latest"));
        check("moe", None);
        check("local", None);
    }

    #[test]
    fn local_is_the_default_or_the_only_one_or_the_bundled_one() {
        let check = |configured: Option<&str>, ids: &[&str], expected: Option<&str>| {
            let catalog = Catalog::new(Vec::new(), configured.map(String::from));
            assert_eq!(catalog.default_model(&entries(ids)).as_deref(), expected, "{configured:?} {ids:?}");
        };
        check(Some("b"), &["a", "b"], Some("b"));
        check(Some("B:latest"), &["a", "Org/b"], Some("Org/b"));
        check(Some("c"), &["a", "b"], Some("c"));
        check(None, &["a"], Some("a"));
        check(None, &["a", "!broken"], Some("a"));
        check(None, &["a", "b"], None);
        check(None, &["a", "flash-tiny-moe"], Some("flash-tiny-moe"));
        check(None, &[], None);
    }

    #[tokio::test]
    async fn a_default_that_is_a_path_is_listed_wherever_it_lies() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let far = home.path().join("far");
        std::fs::create_dir(&far).expect("a folder");
        for file in ["config.json", "model.safetensors"] {
            std::fs::write(far.join(file), "{}").expect("written");
        }
        let catalog = Arc::new(Catalog::new(Vec::new(), Some(far.display().to_string())));
        let listed = catalog.list().await;
        assert_eq!(listed.iter().map(|entry| entry.model.id.as_str()).collect::<Vec<_>>(), ["far"]);
        assert_eq!(catalog.default_model(&listed).as_deref(), Some("far"));
    }
}
