//! What each agent must be told to talk to a gateway: variables, arguments, settings. Pure.

use serde_json::{Value, json};

use crate::args::Agent;

/// Where the model is.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// `http://HOST:PORT`.
    pub(super) base: String,
    pub(super) key: Option<String>,
    pub(super) model: String,
    /// Tokens; unknown where the gateway cannot be asked.
    pub(super) context: Option<u32>,
}

/// What a process of the agent is started with.
#[derive(Debug, Default)]
pub(super) struct Setup {
    pub(super) env: Vec<(&'static str, String)>,
    /// Variables that would lead it elsewhere.
    pub(super) unset: &'static [&'static str],
    pub(super) args: Vec<String>,
    pub(super) file: Option<File>,
}

/// A file that the agent reads, and the argument that names it.
#[derive(Debug)]
pub(super) struct File {
    pub(super) flag: &'static str,
    pub(super) name: &'static str,
    pub(super) text: String,
}

/// Agents always send a key; a gateway without one takes any.
const ANY_KEY: &str = "flash";

impl Agent {
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Claude => "claude",
            Self::Codex => "codex",
            Self::Continue => "cn",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Claude => "Claude Code",
            Self::Codex => "Codex",
            Self::Continue => "Continue",
        }
    }

    pub(super) fn package(self) -> &'static str {
        match self {
            Self::Claude => "@anthropic-ai/claude-code",
            Self::Codex => "@openai/codex",
            Self::Continue => "@continuedev/cli",
        }
    }
}

pub(super) fn setup(agent: Agent, endpoint: &Endpoint) -> Setup {
    match agent {
        Agent::Claude => Setup {
            env: claude(endpoint),
            unset: &["ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY"],
            ..Setup::default()
        },
        Agent::Codex => Setup {
            env: endpoint.key.iter().map(|key| ("FLASH_API_KEY", key.clone())).collect(),
            args: codex(endpoint).into_iter().flat_map(|(name, value)| ["-c".into(), format!("{name}={value}")]).collect(),
            ..Setup::default()
        },
        Agent::Continue => {
            let file = File { flag: "--config", name: "config.yaml", text: config(agent, endpoint) };
            Setup { file: Some(file), ..Setup::default() }
        }
    }
}

/// The settings as the agent's own file has them.
pub(super) fn config(agent: Agent, endpoint: &Endpoint) -> String {
    match agent {
        Agent::Claude => {
            let env: serde_json::Map<String, Value> =
                claude(endpoint).into_iter().map(|(name, value)| (name.into(), value.into())).collect();
            format!("{:#}\n", json!({ "env": env }))
        }
        Agent::Codex => codex(endpoint).into_iter().map(|(name, value)| format!("{name} = {value}\n")).collect(),
        Agent::Continue => {
            let context = endpoint.context.map(|tokens| format!("    defaultCompletionOptions:\n      contextLength: {tokens}\n"));
            let [model, base, key] =
                [&*endpoint.model, &format!("{}/v1", endpoint.base), endpoint.key.as_deref().unwrap_or(ANY_KEY)].map(quoted);
            format!(
                "name: flash\nversion: 1.0.0\nschema: v1\nmodels:\n  - name: {model}\n    provider: openai\n    model: {model}\n    \
                 apiBase: {base}\n    apiKey: {key}\n    roles: [chat, edit, apply, summarize]\n    capabilities: [tool_use]\n{}",
                context.unwrap_or_default()
            )
        }
    }
}

fn claude(endpoint: &Endpoint) -> Vec<(&'static str, String)> {
    let model = ["ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_OPUS_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL"];
    let mut env =
        vec![("ANTHROPIC_BASE_URL", endpoint.base.clone()), ("ANTHROPIC_AUTH_TOKEN", endpoint.key.clone().unwrap_or(ANY_KEY.into()))];
    env.extend(model.into_iter().chain(["CLAUDE_CODE_SUBAGENT_MODEL"]).map(|name| (name, endpoint.model.clone())));
    // It takes the context of a model that it does not know for a million tokens.
    env.extend(endpoint.context.map(|tokens| ("CLAUDE_CODE_MAX_CONTEXT_TOKENS", tokens.to_string())));
    env.push(("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1".into()));
    env.push(("CLAUDE_CODE_ATTRIBUTION_HEADER", "0".into()));
    env
}

/// Names and values in TOML. Reading a long prompt from disk may take minutes, hence the idle timeout.
fn codex(endpoint: &Endpoint) -> Vec<(&'static str, String)> {
    let key = if endpoint.key.is_some() { ", env_key = \"FLASH_API_KEY\"" } else { "" };
    let base = quoted(&format!("{}/v1", endpoint.base));
    let provider = format!("{{ name = \"flash\", base_url = {base}, wire_api = \"responses\", stream_idle_timeout_ms = 900000{key} }}");
    let mut settings = vec![("model", quoted(&endpoint.model)), ("model_provider", quoted("flash"))];
    settings.extend(endpoint.context.map(|tokens| ("model_context_window", tokens.to_string())));
    settings.push(("model_providers.flash", provider));
    settings
}

/// A JSON string is one of TOML and YAML, too.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(key: Option<&str>, context: Option<u32>) -> Endpoint {
        Endpoint { base: "http://127.0.0.1:8080".into(), key: key.map(Into::into), model: "lo\"cal".into(), context }
    }

    #[test]
    fn codex_is_told_in_toml() {
        let args = setup(Agent::Codex, &endpoint(Some("k"), Some(4096))).args;
        assert_eq!(args.len(), 8);
        let table: Vec<&str> = args.iter().filter(|arg| *arg != "-c").map(String::as_str).collect();
        assert_eq!(table[..3], ["model=\"lo\\\"cal\"", "model_provider=\"flash\"", "model_context_window=4096"]);
        assert!(
            table[3].contains("base_url = \"http://127.0.0.1:8080/v1\"") && table[3].contains("env_key = \"FLASH_API_KEY\""),
            "{table:?}"
        );
        let keyless = config(Agent::Codex, &endpoint(None, None));
        assert!(!keyless.contains("env_key") && !keyless.contains("context_window"), "{keyless}");
        // As the agent reads it.
        let file: toml::Table = config(Agent::Codex, &endpoint(Some("k"), Some(4096))).parse().expect("TOML");
        let provider = &file["model_providers"]["flash"];
        assert_eq!((provider["wire_api"].as_str(), provider["base_url"].as_str()), (Some("responses"), Some("http://127.0.0.1:8080/v1")));
    }

    #[test]
    fn claude_never_sees_another_model() {
        let setup = setup(Agent::Claude, &endpoint(None, Some(4096)));
        let models: Vec<_> = setup.env.iter().filter(|(name, _)| name.ends_with("_MODEL")).collect();
        assert!(models.len() == 5 && models.iter().all(|(_, value)| value == "lo\"cal"), "{models:?}");
        assert!(setup.env.contains(&("CLAUDE_CODE_MAX_CONTEXT_TOKENS", "4096".into())));
        assert!(setup.env.contains(&("ANTHROPIC_AUTH_TOKEN", "flash".into())));
        let config: Value = serde_json::from_str(&config(Agent::Claude, &endpoint(Some("k"), None))).expect("JSON");
        assert_eq!((&config["env"]["ANTHROPIC_AUTH_TOKEN"], &config["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"]), (&json!("k"), &Value::Null));
    }

    #[test]
    fn continue_gets_a_file() {
        let file = setup(Agent::Continue, &endpoint(None, Some(4096))).file.expect("a file");
        assert_eq!((file.flag, file.name), ("--config", "config.yaml"));
        for line in ["    model: \"lo\\\"cal\"\n", "    apiBase: \"http://127.0.0.1:8080/v1\"\n", "      contextLength: 4096\n"] {
            assert!(file.text.contains(line), "{line} is not in\n{}", file.text);
        }
    }
}
