//! The binary: arguments to settings, logs, the socket, signals, and errors to exit codes. Everything else is
//! `flashd::run`.

use std::{
    env, fs,
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use clap::Parser;
use flash_proto::socket;
use flashd::{Config, Error, LogFormat, RawConfig, Signals};
use tracing_subscriber::EnvFilter;

/// A log file larger than this is set aside at start; one old file is kept.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// Owns a Mixture-of-Experts model and its expert cache, and serves it over a Unix socket.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    config: RawConfig,
    /// Say whether the settings in FILE, else those that a start would have, are good (exit 78 if not, 66 if there is no FILE), and do nothing else
    #[arg(long, value_name = "FILE")]
    check_config: Option<Option<std::path::PathBuf>>,
}

fn main() -> ExitCode {
    let Args { config, check_config } = Args::parse();
    let outcome = match check_config {
        Some(Some(file)) => Config::check(&file, &|name| env::var_os(name)).map(|()| ExitCode::SUCCESS),
        Some(None) => Config::resolve(config, &|name| env::var_os(name)).map(|_| ExitCode::SUCCESS),
        None => start(config),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(io::stderr(), "flashd: {error}");
            ExitCode::from(exit_code(&error))
        }
    }
}

fn start(flags: RawConfig) -> Result<ExitCode, Error> {
    let config = Config::resolve(flags, &|name| env::var_os(name))?;
    log_to(&config)?;
    let (listener, bound) = socket::bind(&config.socket)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build();
    let runtime = runtime.map_err(|source| Error::Thread { name: "tokio", source })?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), socket = %bound.path().display(), "listening");
    let result = runtime.block_on(async {
        let mut signals = Signals::new().map_err(Error::Listen)?;
        let (draining, drain) = tokio::sync::oneshot::channel::<()>();
        let run = flashd::run(config, listener, async {
            // Dropped unsent only together with the run itself.
            let _ = drain.await;
        });
        let second = async {
            signals.next().await;
            let _ = draining.send(());
            signals.next().await
        };
        tokio::select! {
            result = run => result.map(|()| ExitCode::SUCCESS),
            signal = second => Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(1))),
        }
    });
    // Whatever still computes has nobody to compute for.
    runtime.shutdown_background();
    if let Err(error) = &result {
        tracing::error!(%error, "ended");
    }
    result
}

fn log_to(config: &Config) -> Result<(), Error> {
    let filter = EnvFilter::new(&config.log);
    // Else it tells of a log that cannot be written, on a full disk or a closed terminal, on standard error, and panics if that is the log.
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    if !config.log_file {
        let subscriber = subscriber.with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
        match config.log_format {
            LogFormat::Text => subscriber.init(),
            LogFormat::Json => subscriber.json().init(),
        }
        return Ok(());
    }
    let path = config.log_path();
    let create = |what, path: &std::path::Path| {
        let path = path.to_path_buf();
        move |source| Error::Create { what, path, source }
    };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(create("create", folder))?;
    }
    if fs::metadata(&path).is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
        fs::rename(&path, path.with_extension("log.1")).map_err(create("set aside", &path))?;
    }
    let file = fs::OpenOptions::new().create(true).append(true).open(&path).map_err(create("open", &path))?;
    let subscriber = subscriber.with_writer(std::sync::Mutex::new(file)).with_ansi(false);
    match config.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    Ok(())
}

/// sysexits, as flashctl documents them.
fn exit_code(error: &Error) -> u8 {
    match error {
        Error::NoFile { .. } => 66,
        Error::Socket(socket::Error::InUse { .. }) => 75,
        Error::Socket(socket::Error::Io { .. }) | Error::Create { .. } => 73,
        Error::Socket(socket::Error::NotOurs { .. }) => 77,
        Error::Setting { .. } | Error::ConfigFile { .. } | Error::Socket(_) => 78,
        _ => 70,
    }
}
