//! `flashctl doctor`: what this side can see (programs, folder, socket), then the daemon's own checks and settings.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use flash_proto::{
    socket,
    v1::{Check, DoctorResponse},
};

use crate::{
    args::Global,
    connect,
    failure::{Failure, exit},
    json, render,
    term::{self, Paint},
};

pub(crate) async fn run(global: &Global) -> Result<(), Failure> {
    let flashd = program("flashd");
    let config = flashd.ok.then(config);
    let checks = [home(), flashd, program("flash-gateway")].into_iter().chain(config).collect();
    let mut report = DoctorResponse { checks, settings: vec![] };
    match ask_daemon(global).await {
        Ok((check, theirs)) => {
            report.checks.push(check);
            report.checks.extend(theirs.checks);
            report.settings = theirs.settings;
        }
        Err(failure) => report.checks.push(Check {
            name: "daemon".into(),
            ok: false,
            finding: failure.message,
            fix: failure.hint.unwrap_or_else(|| "see `flashctl daemon logs`".into()),
        }),
    }
    if global.json {
        term::print_json(&json::doctor(&report))?
    } else {
        term::println(&text(&report, Paint::stdout()))?
    }
    if report.checks.iter().all(|check| check.ok) { Ok(()) } else { Err(Failure::silent(exit::GENERIC)) }
}

async fn ask_daemon(global: &Global) -> Result<(Check, DoctorResponse), Failure> {
    let daemon = connect::connect(global).await?;
    let version = &daemon.version;
    let started = if daemon.started { ", started just now" } else { "" };
    let finding =
        format!("flashd {} answers on {} (pid {}{started})", version.version, connect::socket_path(global)?.display(), version.pid);
    let check = Check { name: "daemon".into(), ok: true, finding, fix: String::new() };
    Ok((check, daemon.report().await?))
}

fn home() -> Check {
    let (ok, finding, fix) = match socket::home() {
        Err(error) => (false, error.to_string(), "set HOME or FLASH_HOME".into()),
        Ok(home) => match fs::metadata(&home) {
            _ if let Some((finding, fix)) = unwritable(&home) => (false, finding, fix),
            Err(_) => (true, format!("{} (made at the daemon's first start)", home.display()), String::new()),
            Ok(found) if found.permissions().mode() & 0o022 != 0 => {
                (false, format!("{} can be changed by other users", home.display()), format!("chmod go-w {}", home.display()))
            }
            Ok(_) => (true, home.display().to_string(), String::new()),
        },
    };
    Check { name: "home".into(), ok, finding, fix }
}

/// Why nothing can be written in this folder, or the first one above it that is there, and what helps.
fn unwritable(home: &Path) -> Option<(String, String)> {
    use rustix::fs::{Access, access};
    let home = std::path::absolute(home).unwrap_or_else(|_| home.into());
    let (folder, found) = home.ancestors().find_map(|path| Some((path, fs::metadata(path).ok()?)))?;
    let elsewhere = "set FLASH_HOME to a folder in which you may write".to_owned();
    if !found.is_dir() {
        return Some((format!("{} is not a folder", folder.display()), elsewhere));
    }
    let error = access(folder, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).err()?;
    let ours = found.uid() == rustix::process::geteuid().as_raw() && error == rustix::io::Errno::ACCESS;
    let fix = if ours { format!("chmod u+rwx {}", folder.display()) } else { elsewhere };
    Some((format!("{} cannot be written: {error}", folder.display()), fix))
}

/// What a running daemon does not know: it has read its settings at its start.
fn config() -> Check {
    let (ok, finding, fix) = match connect::check_config(None) {
        Ok(()) => (true, "a start would take every setting".into(), String::new()),
        Err(refused) => {
            let fix = "correct it where it is set; `flashctl config path` says where flash.toml is".into();
            (false, refused.message, refused.hint.unwrap_or(fix))
        }
    };
    Check { name: "config".into(), ok, finding, fix }
}

fn program(name: &str) -> Check {
    match connect::program(name) {
        Ok(path) => Check { name: name.into(), ok: true, finding: path.display().to_string(), fix: String::new() },
        Err(failure) => Check { name: name.into(), ok: false, finding: failure.message, fix: failure.hint.unwrap_or_default() },
    }
}

fn text(report: &DoctorResponse, paint: Paint) -> String {
    let mut lines = Vec::new();
    for check in &report.checks {
        let mark = if check.ok { paint.good("ok ") } else { paint.bad("BAD") };
        lines.push(format!("{mark}  {}: {}", check.name, check.finding));
        if !check.fix.is_empty() {
            let what = if check.ok { "try" } else { "fix" };
            lines.push(format!("     {what}: {}", check.fix));
        }
    }
    if !report.settings.is_empty() {
        let rows: Vec<_> = report.settings.iter().map(|s| [s.name.clone(), s.value.clone(), s.origin.clone()]).collect();
        lines.push(format!("\n{}", render::table(["SETTING", "VALUE", "FROM"], &rows, paint)));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use flash_proto::v1::Setting;

    use super::*;

    #[test]
    fn a_home_that_cannot_be_written_is_found() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("file");
        fs::write(&file, "").expect("written");
        assert_eq!(unwritable(dir.path()), None);
        assert_eq!(unwritable(&dir.path().join("a/b")), None);
        for home in [file.join("home"), file.clone()] {
            let (finding, fix) = unwritable(&home).expect("a file is in the way");
            assert!(finding.contains(&format!("{} is not a folder", file.display())) && fix.contains("FLASH_HOME"), "{finding}: {fix}");
        }
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o500)).expect("changed");
        // For root there is nothing that it may not write.
        if !rustix::process::geteuid().is_root() {
            assert_eq!(unwritable(dir.path()).expect("read-only").1, format!("chmod u+rwx {}", dir.path().display()));
        }
    }

    #[test]
    fn a_failed_check_says_what_to_do() {
        let bad = Check { name: "fds".into(), ok: false, finding: "limit 64".into(), fix: "ulimit -n 1024".into() };
        let setting = Setting { name: "memory".into(), value: "auto".into(), origin: "default".into() };
        let text = text(&DoctorResponse { checks: vec![bad], settings: vec![setting] }, Paint::plain());
        assert_eq!(text, "BAD  fds: limit 64\n     fix: ulimit -n 1024\n\nSETTING  VALUE  FROM\nmemory   auto   default");
    }
}
