//! Settings: three sources of raw text become one checked, immutable [`Config`] that remembers where each value came
//! from. Precedence: flag, then `FLASH_*`, then `$FLASH_HOME/flash.toml`, then the default. Changes made by a running
//! daemon's Load calls are not kept here but in the worker. Called by `main.rs` and by tests.

use std::{
    env,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use flash_engine::{Bytes, CacheBudget, DiskCache, Kernels, ModelInfo, Options, parse_bytes};
use flash_proto::socket;
use serde::Deserialize;

use crate::Error;

/// One source of settings as the user wrote it; also the daemon's command line.
#[derive(Clone, Debug, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    /// Unix socket to listen on
    #[arg(long, value_name = "PATH")]
    pub socket: Option<Text>,
    /// Model that an empty name or `local` means
    #[arg(long, value_name = "NAME")]
    pub model: Option<Text>,
    /// Folder to look for models in, before the usual places; may be repeated
    #[arg(long = "models", value_name = "DIR")]
    pub models: Vec<PathBuf>,
    /// Routed experts kept in memory: 25%, 512MiB or auto
    #[arg(long, value_name = "BUDGET")]
    pub expert_cache: Option<Text>,
    /// Cap on the memory of the whole daemon: 12GiB, or auto for none
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<Text>,
    /// Tokens of one request, prompt and completion; auto = the model's maximum, at most 32768
    #[arg(long, value_name = "TOKENS")]
    pub ctx: Option<Text>,
    /// Requests computed together
    #[arg(long, value_name = "N")]
    pub parallel: Option<Text>,
    /// Requests waiting behind those before one is refused
    #[arg(long, value_name = "N")]
    pub queue: Option<Text>,
    /// Compute threads; auto = physical cores
    #[arg(long, value_name = "N")]
    pub threads: Option<Text>,
    /// auto, cpu (fastest), fast-math (faster, and some tokens change), reference (portable, f32), or mlx where it is built in
    #[arg(long, value_name = "KIND")]
    pub kernels: Option<Text>,
    /// Same as --kernels fast-math: prompts are read faster, replies tell what it costs
    #[arg(long, conflicts_with = "kernels")]
    #[serde(skip)]
    pub fast_math: bool,
    /// How experts are read: auto (measured), direct, buffered, uring or mmap
    #[arg(long, value_name = "KIND")]
    pub io: Option<Text>,
    /// Which expert makes room for another: lfru, lru, lcp, or none to keep no expert
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<Text>,
    /// Load experts that the next layer will probably use: auto (while it pays), on or off
    #[arg(long, value_name = "MODE")]
    pub lookahead: Option<Text>,
    /// Memory for beginnings of prompts that may come again: 10% (of what is available), 2GiB, auto, or 0 for none
    #[arg(long, value_name = "BUDGET")]
    pub prefix_cache: Option<Text>,
    /// Disk for those that came again, kept across restarts: 16GiB, auto (an eighth of what is free, at most 16 GiB) or off
    #[arg(long, value_name = "BYTES")]
    pub disk_cache: Option<Text>,
    /// Same as --disk-cache off
    #[arg(long, conflicts_with = "disk_cache")]
    #[serde(skip)]
    pub no_disk_cache: bool,
    /// How long an idle model stays loaded: 5m, 1h30m, seconds; negative = forever, 0 = not at all
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub keep_alive: Option<Text>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<Text>,
    /// Log to $FLASH_HOME/log/flashd.log instead of standard error
    #[arg(long)]
    #[serde(skip)]
    pub log_file: bool,
    /// Which log lines: error, warn, info, debug, or a filter such as flashd=debug (FLASH_LOG)
    #[arg(skip)]
    pub log: Option<Text>,
    /// Threads that read experts from disk (FLASH_LOADERS)
    #[arg(skip)]
    pub loaders: Option<Text>,
    /// What the disk cache may write a day (FLASH_DISK_CACHE_WRITES)
    #[arg(skip)]
    pub disk_cache_writes: Option<Text>,
    /// Whether experts that were in memory at the last unload are read back at a load: on or off (FLASH_WARM_START)
    #[arg(skip)]
    pub warm_start: Option<Text>,
}

/// A value not yet read: TOML may spell it as a string or as a number.
#[derive(Clone, Debug)]
pub struct Text(String);

impl<T: Into<String>> From<T> for Text {
    fn from(text: T) -> Self {
        Self(text.into())
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::String(text) => Ok(Self(text)),
            toml::Value::Integer(number) => Ok(Self(number.to_string())),
            toml::Value::Float(number) => Ok(Self(number.to_string())),
            other => Err(serde::de::Error::custom(format!("a string or a number belongs here, not a {}", other.type_str()))),
        }
    }
}

/// How long an idle model stays loaded; `None` = for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive(pub Option<Duration>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// A resolved value for `doctor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub name: &'static str,
    pub value: String,
    /// "flag", "FLASH_…", the file's path, or "default".
    pub origin: String,
}

/// Every setting, checked. Immutable: what a Load call changes lives in the worker.
#[derive(Clone, Debug)]
pub struct Config {
    pub home: PathBuf,
    pub socket: PathBuf,
    /// Where models are looked for, in this order.
    pub model_roots: Vec<PathBuf>,
    /// The configured default model.
    pub model: Option<String>,
    pub options: Options,
    pub keep_alive: KeepAlive,
    /// Read back at a load what was in memory at the last unload.
    pub warm_start: bool,
    pub log_format: LogFormat,
    pub log_file: bool,
    /// A tracing filter.
    pub log: String,
    pub settings: Vec<Setting>,
}

impl Config {
    /// Reads `$FLASH_HOME/flash.toml` and settles every value. `env` is the environment, a parameter so that tests are
    /// not at its mercy.
    pub fn resolve(flags: RawConfig, env: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        let (home, home_origin) = match env("FLASH_HOME") {
            Some(home) => (PathBuf::from(home), "FLASH_HOME"),
            None => (socket::home()?, "default"),
        };
        let path = home.join("flash.toml");
        Self::settle(flags, path, (home, home_origin), &env)
    }

    /// Whether every setting in this file can be one, whatever the environment would put in its place.
    pub fn check(path: &Path, env: &dyn Fn(&str) -> Option<OsString>) -> Result<(), Error> {
        if !path.exists() {
            return Err(Error::NoFile { path: path.into() });
        }
        let env = |name: &str| env(name).filter(|_| !name.starts_with("FLASH_"));
        Self::settle(RawConfig::default(), path.into(), (PathBuf::from("."), "default"), &env).map(|_| ())
    }

    fn settle(
        flags: RawConfig,
        path: PathBuf,
        (home, home_origin): (PathBuf, &str),
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Error> {
        let mut sources = Sources { file: read_file(&path)?, flags, env, path, settings: Vec::new() };
        sources.note("home", home.display().to_string(), home_origin.into());
        let socket = match sources.text("socket", |raw| raw.socket.as_ref())? {
            Some((path, origin)) => {
                sources.note("socket", path.clone(), origin);
                expand(Path::new(&path), env)
            }
            None => {
                let path = socket::default_path()?;
                sources.note("socket", path.display().to_string(), "default".into());
                path
            }
        };
        let model_roots = sources.model_roots(&home);
        let model =
            sources.pick("model", |raw| raw.model.as_ref(), "auto", "a name", |text| Some((text != "auto").then(|| text.into())))?;
        let options = sources.options(&home)?;
        let keep_alive = sources.pick("keep_alive", |raw| raw.keep_alive.as_ref(), "5m", KEEP_ALIVE_WANTS, parse_keep_alive)?;
        let on_off = |text: &str| match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        };
        let warm_start = sources.pick("warm_start", |raw| raw.warm_start.as_ref(), "on", "on or off", on_off)?;
        let log_format = |text: &str| match text {
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            _ => None,
        };
        let log_format = sources.pick("log_format", |raw| raw.log_format.as_ref(), "text", "text or json", log_format)?;
        let filter = |text: &str| tracing_subscriber::EnvFilter::try_new(text).ok().map(|_| text.to_owned());
        let log = sources.pick("log", |raw| raw.log.as_ref(), "info", "a log filter such as info or flashd=debug", filter)?;
        let (log_file, settings) = (sources.flags.log_file, sources.settings);
        Ok(Self { home, socket, model_roots, model, options, keep_alive, warm_start, log_format, log_file, log, settings })
    }

    /// Where `--log-file` writes, and a daemon that flashctl or a service manager has started.
    pub fn log_path(&self) -> PathBuf {
        self.home.join("log/flashd.log")
    }
}

fn read_file(path: &Path) -> Result<RawConfig, Error> {
    match fs::read_to_string(path) {
        Ok(text) => {
            toml::from_str(&text).map_err(|error| Error::ConfigFile { path: path.into(), reason: error.to_string().trim_end().into() })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(RawConfig::default()),
        Err(error) => Err(Error::ConfigFile { path: path.into(), reason: error.to_string() }),
    }
}

/// The three sources while they are being settled.
struct Sources<'a> {
    flags: RawConfig,
    env: &'a dyn Fn(&str) -> Option<OsString>,
    file: RawConfig,
    path: PathBuf,
    settings: Vec<Setting>,
}

impl Sources<'_> {
    fn note(&mut self, name: &'static str, value: String, origin: String) {
        self.settings.push(Setting { name, value, origin });
    }

    /// The winning text of a setting and where it came from.
    fn text(&self, name: &'static str, field: fn(&RawConfig) -> Option<&Text>) -> Result<Option<(String, String)>, Error> {
        if let Some(Text(text)) = field(&self.flags) {
            return Ok(Some((text.trim().into(), "flag".into())));
        }
        let variable = format!("FLASH_{}", name.to_ascii_uppercase());
        if let Some(value) = (self.env)(&variable) {
            let text = value.into_string().map_err(|value| Error::Setting {
                name,
                value: value.to_string_lossy().into(),
                origin: variable.clone(),
                wants: "UTF-8 text",
            })?;
            return Ok(Some((text.trim().into(), variable)));
        }
        Ok(field(&self.file).map(|Text(text)| (text.trim().into(), self.path.display().to_string())))
    }

    fn pick<T>(
        &mut self,
        name: &'static str,
        field: fn(&RawConfig) -> Option<&Text>,
        default: &str,
        wants: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, Error> {
        let (value, origin) = self.text(name, field)?.unwrap_or_else(|| (default.into(), "default".into()));
        let Some(parsed) = parse(&value) else { return Err(Error::Setting { name, value, origin, wants }) };
        self.note(name, value, origin);
        Ok(parsed)
    }

    fn options(&mut self, home: &Path) -> Result<Options, Error> {
        let at_least_1 = |text: &str| text.parse().ok().filter(|number| *number >= 1);
        let threads = |text: &str| parse_count(text).filter(|threads| threads.is_none_or(|threads| threads <= 256));
        if self.flags.fast_math {
            self.flags.kernels = Some("fast-math".into());
        }
        Ok(Options {
            expert_cache: self.pick(
                "expert_cache",
                |raw| raw.expert_cache.as_ref(),
                "auto",
                CacheBudget::WANTS,
                |text| text.parse::<CacheBudget>().ok(),
            )?,
            memory: self.pick("memory", |raw| raw.memory.as_ref(), "auto", MEMORY_WANTS, parse_memory)?,
            context: self.pick("ctx", |raw| raw.ctx.as_ref(), "auto", CONTEXT_WANTS, parse_count)?,
            parallel: self.pick("parallel", |raw| raw.parallel.as_ref(), "2", "a number of at least 1", at_least_1)?,
            queue: self.pick(
                "queue",
                |raw| raw.queue.as_ref(),
                "64",
                "a number from 1 to 4096",
                |text| at_least_1(text).filter(|number| *number <= QUEUE_MAX),
            )?,
            threads: self.pick("threads", |raw| raw.threads.as_ref(), "auto", "a number from 1 to 256, or auto", threads)?,
            kernels: self.pick("kernels", |raw| raw.kernels.as_ref(), "auto", Kernels::CHOICES, |text| text.parse().ok())?,
            loaders: self.pick("loaders", |raw| raw.loaders.as_ref(), "4", "a number of at least 1", at_least_1)?,
            io: self.pick("io", |raw| raw.io.as_ref(), "auto", "auto, direct, buffered, uring or mmap", |text| text.parse().ok())?,
            policy: self.pick("policy", |raw| raw.policy.as_ref(), "lfru", "lfru, lru, lcp or none", |text| text.parse().ok())?,
            lookahead: self.pick("lookahead", |raw| raw.lookahead.as_ref(), "auto", "auto, on or off", |text| text.parse().ok())?,
            prefix_cache: self.pick(
                "prefix_cache",
                |raw| raw.prefix_cache.as_ref(),
                "auto",
                CacheBudget::WANTS,
                |text| text.parse().ok(),
            )?,
            disk_cache: self.disk_cache(home)?,
            available: None,
            script: None,
        })
    }

    fn disk_cache(&mut self, home: &Path) -> Result<Option<DiskCache>, Error> {
        if self.flags.no_disk_cache {
            self.flags.disk_cache = Some("off".into());
        }
        let size = |text: &str| match text {
            "off" => Some(None),
            "auto" => Some(Some(None)),
            _ => parse_bytes(text).ok().map(|bytes| Some(Some(bytes))),
        };
        let budget = self.pick("disk_cache", |raw| raw.disk_cache.as_ref(), "auto", "a size such as 16GiB, auto or off", size)?;
        let wants = "a size such as 32GiB";
        let daily_writes =
            self.pick("disk_cache_writes", |raw| raw.disk_cache_writes.as_ref(), DAILY_WRITES, wants, |text| parse_bytes(text).ok())?;
        Ok(budget.map(|budget: Option<Bytes>| DiskCache { dir: disk_cache_dir(home), budget, daily_writes }))
    }

    /// The configured folders, then the usual ones. Folders that do not exist are kept: they may be filled later.
    fn model_roots(&mut self, home: &Path) -> Vec<PathBuf> {
        let (configured, origin) = match (&self.flags.models[..], (self.env)("FLASH_MODELS"), &self.file.models[..]) {
            ([_, ..], _, _) => (self.flags.models.clone(), "flag".into()),
            (_, Some(list), _) => (env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect(), "FLASH_MODELS".into()),
            (_, None, [_, ..]) => (self.file.models.clone(), self.path.display().to_string()),
            _ => (Vec::new(), "default".into()),
        };
        let mut roots: Vec<PathBuf> = configured.iter().map(|path| expand(path, self.env)).collect();
        self.note("models", roots.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(":"), origin);
        roots.push(home.join("models"));
        let user = (self.env)("HOME").map(PathBuf::from);
        let hugging_face = (self.env)("HF_HUB_CACHE")
            .map(PathBuf::from)
            .or_else(|| (self.env)("HF_HOME").map(|home| PathBuf::from(home).join("hub")))
            .or_else(|| user.as_ref().map(|user| user.join(".cache/huggingface/hub")));
        roots.extend(hugging_face);
        roots.extend(user.iter().flat_map(|user| [user.join(".lmstudio/models"), user.join(".cache/lm-studio/models")]));
        // An installed package keeps its model beside the executable; a fresh clone keeps it in the checkout.
        roots.extend(env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("share/flashd/models"))));
        roots.extend(Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(|checkout| checkout.join("models")).filter(|path| path.exists()));
        let mut seen = std::collections::HashSet::new();
        roots.retain(|root| seen.insert(root.clone()));
        roots
    }
}

/// Of a disk that may be written three hundred times its size, a terabyte of it lasts for a quarter of a century.
const DAILY_WRITES: &str = "32GiB";

/// Where prefixes are kept, and nothing else.
pub(crate) fn disk_cache_dir(home: &Path) -> PathBuf {
    home.join("cache/prefix")
}

/// Beyond this a queue only turns refusals into timeouts; it also bounds the command channel.
const QUEUE_MAX: usize = 4096;

/// A request that asks for nothing in particular gets at most this context.
const CONTEXT_DEFAULT_MAX: usize = 32 * 1024;

/// Tokens that a request on this model may have.
pub(crate) fn context_length(info: &ModelInfo, configured: Option<usize>) -> usize {
    info.context_max.min(configured.unwrap_or(CONTEXT_DEFAULT_MAX))
}

pub(crate) const CONTEXT_WANTS: &str = "a number of tokens, or auto";

/// At least 1; `None` is auto.
pub(crate) fn parse_count(text: &str) -> Option<Option<usize>> {
    if text == "auto" { Some(None) } else { text.parse().ok().filter(|number| *number >= 1).map(Some) }
}

/// No model fits in less; a number as small as that is one without its unit.
const MEMORY_MIN: Bytes = 1 << 20;

pub(crate) const MEMORY_WANTS: &str = "a size such as 12GiB (at least 1MiB; a number without a unit is bytes), or auto";

/// `None` is auto.
pub(crate) fn parse_memory(text: &str) -> Option<Option<Bytes>> {
    if text == "auto" { Some(None) } else { parse_bytes(text).ok().filter(|bytes| *bytes >= MEMORY_MIN).map(Some) }
}

pub(crate) const KEEP_ALIVE_WANTS: &str = "a duration such as 5m, 1h30m or 300 (seconds); -1 = for ever, 0 = unload at once";

/// Reads ollama's syntax: Go durations, plain seconds, negative for ever, 0 at once.
pub(crate) fn parse_keep_alive(text: &str) -> Option<KeepAlive> {
    let text = text.trim();
    let (negative, mut rest) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    if rest.is_empty() {
        return None;
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().ok()?;
        let tail = &rest[digits..];
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        seconds += number
            * match &tail[..unit_end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                "" if digits == text.len() - usize::from(negative) => 1.0,
                _ => return None,
            };
        rest = &tail[unit_end..];
    }
    // A century is for ever, and keeps deadlines within what an Instant can hold.
    let forever = negative && seconds > 0.0 || seconds > 3e9;
    Some(KeepAlive(if forever { None } else { Some(Duration::try_from_secs_f64(seconds).ok()?) }))
}

/// `~/` as a shell would read it: TOML files and FLASH_MODELS are not seen by one.
fn expand(path: &Path, env: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
    match (path.strip_prefix("~"), env("HOME")) {
        (Ok(rest), Some(home)) => Path::new(&home).join(rest),
        _ => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use flash_engine::{Io, Lookahead, PolicyKind};

    use super::*;

    fn resolve(flags: RawConfig, env: &[(&str, &str)], file: &str) -> Result<Config, Error> {
        let home = tempfile::tempdir().expect("a temporary directory");
        fs::write(home.path().join("flash.toml"), file).expect("a config file");
        let mut env: HashMap<&str, OsString> = env.iter().map(|(name, value)| (*name, OsString::from(value))).collect();
        env.insert("FLASH_HOME", home.path().into());
        env.entry("FLASH_SOCKET").or_insert_with(|| home.path().join("s").into());
        Config::resolve(flags, &|name| env.get(name).cloned())
    }

    #[test]
    fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
        let check = |flag: Option<&str>, env: Option<&str>, file: &str, expected: (usize, &str)| {
            let flags = RawConfig { parallel: flag.map(Text::from), ..RawConfig::default() };
            let env: Vec<_> = env.map(|value| ("FLASH_PARALLEL", value)).into_iter().collect();
            let config = resolve(flags, &env, file).expect("a good configuration");
            let setting = config.settings.iter().find(|setting| setting.name == "parallel").expect("parallel is listed");
            assert_eq!((config.options.parallel, setting.value.as_str()), (expected.0, expected.0.to_string().as_str()));
            assert!(setting.origin.ends_with(expected.1), "{} should end with {}", setting.origin, expected.1);
        };
        check(Some("7"), Some("6"), "parallel = 5", (7, "flag"));
        check(None, Some("6"), "parallel = 5", (6, "FLASH_PARALLEL"));
        check(None, None, "parallel = \"5\"", (5, "flash.toml"));
        check(None, Some(""), "", (2, "default"));
    }

    #[test]
    fn every_setting_is_read_and_listed() {
        let file = "model = 'm'\nmodels = ['~/a', '/b']\nexpert_cache = '25%'\nmemory = '1GiB'\nctx = 4096\nqueue = 9\nthreads = 3\n\
                    kernels = 'reference'\nkeep_alive = -1\nlog_format = 'json'\nlog = 'flashd=debug'\nloaders = 2\n\
                    io = 'buffered'\npolicy = 'lru'\nlookahead = 'off'\nwarm_start = 'off'\nprefix_cache = '10%'\n\
                    disk_cache = '1GiB'\ndisk_cache_writes = '2GiB'";
        let config = resolve(RawConfig::default(), &[("HOME", "/home/u")], file).expect("a good configuration");
        assert_eq!(config.model.as_deref(), Some("m"));
        assert_eq!(config.model_roots[..2], [PathBuf::from("/home/u/a"), PathBuf::from("/b")]);
        assert!(config.model_roots.contains(&PathBuf::from("/home/u/.cache/huggingface/hub")));
        let options = &config.options;
        assert_eq!((options.expert_cache, options.memory, options.context), (CacheBudget::Share(0.25), Some(1 << 30), Some(4096)));
        assert_eq!((options.queue, options.threads, options.kernels, options.loaders), (9, Some(3), Kernels::Reference, 2));
        assert_eq!((options.io, options.policy, options.lookahead), (Io::Buffered, PolicyKind::Lru, Lookahead::Off));
        assert!(!config.warm_start);
        assert_eq!(options.prefix_cache, CacheBudget::Share(0.1));
        let disk = options.disk_cache.as_ref().expect("a disk cache");
        assert_eq!((disk.budget, disk.daily_writes, disk.dir.ends_with("cache/prefix")), (Some(1 << 30), 2 << 30, true));
        assert_eq!((config.keep_alive, config.log_format, config.log.as_str()), (KeepAlive(None), LogFormat::Json, "flashd=debug"));
        let names: Vec<_> = config.settings.iter().map(|setting| setting.name).collect();
        let expected = ["home", "socket", "models", "model", "expert_cache", "memory", "ctx", "parallel", "queue", "threads", "kernels"];
        assert_eq!(names[..11], expected);
        assert_eq!(
            names[11..],
            [
                "loaders",
                "io",
                "policy",
                "lookahead",
                "prefix_cache",
                "disk_cache",
                "disk_cache_writes",
                "keep_alive",
                "warm_start",
                "log_format",
                "log"
            ]
        );
    }

    #[test]
    fn the_disk_cache_can_be_switched_off_everywhere() {
        let check = |flags: RawConfig, env: &[(&str, &str)], file: &str, on: bool| {
            let config = resolve(flags, env, file).expect("a good configuration");
            assert_eq!(config.options.disk_cache.is_some(), on, "{env:?} {file}");
        };
        let off = || RawConfig { no_disk_cache: true, ..RawConfig::default() };
        check(RawConfig::default(), &[], "", true);
        check(off(), &[("FLASH_DISK_CACHE", "1GiB")], "disk_cache = '2GiB'", false);
        check(RawConfig::default(), &[("FLASH_DISK_CACHE", "off")], "", false);
        check(RawConfig::default(), &[], "disk_cache = 'off'", false);
    }

    #[test]
    fn fast_math_is_a_choice_of_kernels() {
        let fast = RawConfig { fast_math: true, ..RawConfig::default() };
        assert_eq!(resolve(fast, &[("FLASH_KERNELS", "cpu")], "").expect("a good configuration").options.kernels, Kernels::FastMath);
    }

    #[test]
    fn a_bad_value_names_itself_and_its_origin() {
        let check = |env: &[(&str, &str)], file: &str, expected: &str| {
            let message = resolve(RawConfig::default(), env, file).expect_err(expected).to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(&[("FLASH_EXPERT_CACHE", "120%")], "", "expert_cache = `120%` (from FLASH_EXPERT_CACHE)");
        check(&[("FLASH_CTX", "0")], "", "ctx = `0`");
        check(&[("FLASH_MEMORY", "12")], "", "memory = `12` (from FLASH_MEMORY) is not a size such as 12GiB (at least 1MiB");
        check(&[("FLASH_QUEUE", "0")], "", "queue = `0`");
        check(&[], "kernels = 'fast'", "flash.toml) is not auto, cpu");
        check(&[], "paralel = 2", "unknown field `paralel`");
        check(&[], "parallel = [2]", "a string or a number");
        check(&[], "parallel = ", "flash.toml: ");
    }

    #[test]
    fn keep_alive_is_read_as_ollama_does() {
        let check = |text: &str, expected: Option<Option<f64>>| {
            let expected = expected.map(|seconds| KeepAlive(seconds.map(Duration::from_secs_f64)));
            assert_eq!(parse_keep_alive(text), expected, "{text}");
        };
        check("5m", Some(Some(300.0)));
        check("1h30m", Some(Some(5400.0)));
        check("1.5h", Some(Some(5400.0)));
        check("250ms", Some(Some(0.25)));
        check("300", Some(Some(300.0)));
        check("0", Some(Some(0.0)));
        check("-1", Some(None));
        check("-5m", Some(None));
        check("99999999999999h", Some(None));
        for bad in ["", "-", "5 m", "m", "5x", "1h30", "1e3", "NaN", "½", "."] {
            check(bad, None);
        }
    }
}
