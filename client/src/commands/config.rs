//! `flashctl config`: flash.toml, and the settings that hold. What a setting may be is the daemon's to say: `flashd --check-config` looks at a
//! draft before it becomes the file, so that a typo cannot keep the daemon from starting.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use flash_proto::{socket, v1::ShowRequest};
use serde_json::json;
use toml_edit::{DocumentMut, Item, Value};

use crate::{
    args::{ConfigCommand, Global},
    connect,
    failure::{Failure, exit},
    files, render,
    term::{self, Paint},
};

pub(crate) async fn run(command: ConfigCommand, global: &Global) -> Result<(), Failure> {
    let home = socket::home().map_err(|error| Failure::new(exit::CONFIG, "config", error.to_string()))?;
    let path = std::path::absolute(home.join("flash.toml")).unwrap_or_default();
    match command {
        ConfigCommand::Path if global.json => term::print_json(&json!({"path": path.display().to_string()})),
        ConfigCommand::Path => term::println(&path.display().to_string()),
        ConfigCommand::Get { name } => get(name, global).await,
        ConfigCommand::Set { name, .. } if name == "socket" => {
            let failure =
                Failure::new(exit::BAD_DATA, "config", "socket in flash.toml is for the daemon only; its clients would not find it");
            Err(failure.hint("set FLASH_SOCKET, which both read, or use the default"))
        }
        ConfigCommand::Set { name, value } => {
            change(&path, |document| {
                document[&name.replace('-', "_")] = Item::Value(read_value(&value));
                Ok(())
            })?;
            if name == "model" && value != "auto" && !global.quiet {
                warn_of_model(&value, global).await;
            }
            tell(&path, &name, global).await
        }
        ConfigCommand::Unset { name } => {
            change(&path, |document| {
                let missing = || {
                    Failure::new(exit::BAD_DATA, "config", format!("{} does not set {name}", path.display()))
                        .hint("`flashctl config get` says where each setting comes from")
                };
                document.remove(&name.replace('-', "_")).map(|_| ()).ok_or_else(missing)
            })?;
            tell(&path, &name, global).await
        }
    }
}

/// A model may be named before it is there; a typo would only be told at the next `local`. No daemon is started for this.
async fn warn_of_model(name: &str, global: &Global) {
    let Ok(Some(daemon)) = connect::find(global).await else { return };
    if let Err(status) = daemon.models().show(ShowRequest { model: name.into() }).await {
        term::note(&format!("warning: {}", status.message()));
    }
}

async fn get(name: Option<String>, global: &Global) -> Result<(), Failure> {
    let daemon = connect::connect(global).await?;
    let settings = daemon.report().await?.settings;
    let one = |setting: &flash_proto::v1::Setting| json!({"name": setting.name, "value": setting.value, "origin": setting.origin});
    let Some(name) = name else {
        if global.json {
            return term::print_json(&json!({"settings": settings.iter().map(one).collect::<Vec<_>>()}));
        }
        let rows: Vec<_> = settings.into_iter().map(|setting| [setting.name, setting.value, setting.origin]).collect();
        return term::println(&render::table(["SETTING", "VALUE", "FROM"], &rows, Paint::stdout()));
    };
    match settings.iter().find(|setting| setting.name == name.replace('-', "_")) {
        Some(setting) if global.json => term::print_json(&one(setting)),
        Some(setting) => term::println(&setting.value),
        None => {
            let names: Vec<&str> = settings.iter().map(|setting| setting.name.as_str()).collect();
            let failure = Failure::new(exit::BAD_DATA, "config", format!("there is no setting {name}"));
            Err(failure.hint(format!("there are {}", names.join(", "))))
        }
    }
}

/// A list or a plain number is written as one, anything else as text.
fn read_value(text: &str) -> Value {
    let digits = !text.is_empty() && text.len() < 18 && text.bytes().all(|byte| byte.is_ascii_digit());
    let typed = (digits || text.starts_with('[')).then(|| text.parse::<Value>().ok()).flatten();
    typed.unwrap_or_else(|| text.into())
}

/// The file with a change, if it is a good one then.
fn change(path: &Path, change: impl FnOnce(&mut DocumentMut) -> Result<(), Failure>) -> Result<(), Failure> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Failure::new(exit::CONFIG, "config", format!("cannot read {}: {error}", path.display()))),
    };
    let unreadable = |error: toml_edit::TomlError| {
        Failure::new(exit::CONFIG, "config", format!("{}: {}", path.display(), error.to_string().trim_end())).hint("mend it in an editor")
    };
    let mut document: DocumentMut = text.parse().map_err(unreadable)?;
    change(&mut document)?;
    let text = document.to_string();
    check(path, &text)?;
    // Where the file is a link, what it points to is the file.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    files::write_private(&target, text.as_bytes())
}

fn check(path: &Path, text: &str) -> Result<(), Failure> {
    let draft = Draft(path.with_file_name(format!(".flash.toml.{}.draft", std::process::id())));
    files::write_private(&draft.0, text.as_bytes())?;
    connect::check_config(Some(&draft.0)).map_err(|refused| {
        let message = refused.message.replace(&draft.0.display().to_string(), &path.display().to_string());
        let exit = if refused.exit == exit::CONFIG { exit::BAD_DATA } else { refused.exit };
        Failure { exit, message, ..refused }.hint("nothing was changed; `flashctl config get` lists the settings")
    })
}

/// Gone when it is dropped.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

async fn tell(path: &Path, name: &str, global: &Global) -> Result<(), Failure> {
    let running = connect::find(global).await?.is_some();
    if global.json {
        return term::print_json(&json!({"path": path.display().to_string(), "name": name, "restart_needed": running}));
    }
    if running && !global.quiet {
        term::note("hint: it takes effect with `flashctl daemon restart`");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_type_they_look_like() {
        let check = |text: &str, expected: &str| assert_eq!(read_value(text).to_string(), expected, "{text}");
        check("8192", "8192");
        check("25%", "\"25%\"");
        check("-1", "\"-1\"");
        check("5m", "\"5m\"");
        check("", "\"\"");
        check("['/a', '/b']", "['/a', '/b']");
        check("[broken", "\"[broken\"");
        check("123456789012345678901234567890", "\"123456789012345678901234567890\"");
    }
}
