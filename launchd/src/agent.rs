//! The keys of launchd.plist(5) that an agent of ours sets. A misspelt key is not an error to launchd, it is ignored:
//! hence a type, and a test that holds the keys against the manual page's list.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub struct Agent {
    pub label: String,
    pub program_arguments: Vec<String>,
    pub environment_variables: BTreeMap<String, String>,
    pub run_at_load: bool,
    pub keep_alive: KeepAlive,
    /// Seconds between two starts, so that a daemon that cannot start does not spin.
    pub throttle_interval: u32,
    /// Seconds from SIGTERM to SIGKILL: longer than the program needs to drain.
    pub exit_time_out: u32,
    pub process_type: ProcessType,
    #[serde(rename = "LowPriorityIO")]
    pub low_priority_io: bool,
    pub standard_out_path: String,
    pub standard_error_path: String,
    /// Decimal, as property lists have no octal: 0o077 is 63.
    pub umask: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub struct KeepAlive {
    /// False: started again after a crash or an error, left alone after a clean exit.
    pub successful_exit: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessType {
    Background,
    Standard,
    Adaptive,
    /// No throttling of CPU and I/O: somebody waits for the tokens.
    Interactive,
}

impl Agent {
    /// The property list as XML, one key per line, ending in a newline.
    pub fn to_xml(&self) -> String {
        let mut xml = Vec::new();
        plist::to_writer_xml(&mut xml, self).expect("strings, numbers, booleans and maps of them are property list values");
        let mut xml = String::from_utf8(xml).expect("the XML writer emits UTF-8");
        xml.push('\n');
        xml
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// launchd.plist(5), macOS 14.
    const KEYS: &[&str] = &[
        "AbandonProcessGroup",
        "AssociatedBundleIdentifiers",
        "BonjourEnabled",
        "BundleProgram",
        "Debug",
        "Disabled",
        "EnableGlobbing",
        "EnablePressuredExit",
        "EnableTransactions",
        "EnvironmentVariables",
        "ExitTimeOut",
        "GroupName",
        "HardResourceLimits",
        "HopefullyExitsFirst",
        "HopefullyExitsLast",
        "InitGroups",
        "KeepAlive",
        "Label",
        "LaunchEvents",
        "LaunchOnlyOnce",
        "LegacyTimers",
        "LimitLoadFromHosts",
        "LimitLoadToHosts",
        "LimitLoadToHardware",
        "LimitLoadFromHardware",
        "LimitLoadToSessionType",
        "LowPriorityBackgroundIO",
        "LowPriorityIO",
        "MachServices",
        "MaterializeDatalessFiles",
        "Nice",
        "OnDemand",
        "ProcessType",
        "Program",
        "ProgramArguments",
        "QueueDirectories",
        "RootDirectory",
        "RunAtLoad",
        "ServiceIPC",
        "SessionCreate",
        "Sockets",
        "SoftResourceLimits",
        "StandardErrorPath",
        "StandardInPath",
        "StandardOutPath",
        "StartCalendarInterval",
        "StartInterval",
        "StartOnMount",
        "ThrottleInterval",
        "TimeOut",
        "Umask",
        "UserName",
        "WaitForDebugger",
        "WatchPaths",
        "WorkingDirectory",
        "inetdCompatibility",
    ];
    const KEEP_ALIVE_KEYS: &[&str] = &["AfterInitialDemand", "Crashed", "NetworkState", "OtherJobEnabled", "PathState", "SuccessfulExit"];

    fn unknown_keys(xml: &str) -> Vec<String> {
        let plist = plist::Value::from_reader_xml(xml.as_bytes()).expect("a property list");
        let keys = |value: &plist::Value| value.as_dictionary().map(|dict| dict.keys().cloned().collect()).unwrap_or_default();
        let top: Vec<String> = keys(&plist);
        let keep_alive: Vec<String> = plist.as_dictionary().and_then(|dict| dict.get("KeepAlive")).map(keys).unwrap_or_default();
        let unknown = |keys: Vec<String>, known: &'static [&str]| keys.into_iter().filter(|key| !known.contains(&key.as_str()));
        unknown(top, KEYS).chain(unknown(keep_alive, KEEP_ALIVE_KEYS)).collect()
    }

    fn agent(home: &str) -> Agent {
        Agent {
            label: "dev.example".into(),
            program_arguments: vec![format!("{home}/bin/flashd"), "--flag".into()],
            environment_variables: BTreeMap::from([("FLASH_HOME".into(), home.into())]),
            run_at_load: true,
            keep_alive: KeepAlive { successful_exit: false },
            throttle_interval: 10,
            exit_time_out: 40,
            process_type: ProcessType::Interactive,
            low_priority_io: false,
            standard_out_path: format!("{home}/log"),
            standard_error_path: format!("{home}/log"),
            umask: 0o077,
        }
    }

    #[test]
    fn any_home_survives_the_round_trip() {
        for home in ["/Users/you", "/Users/A & B <c>", "/Users/\"q\" 'a' ]]>", "/Users/Zoë 漢字", "/Users/ lead and trail "] {
            let written = agent(home);
            let xml = written.to_xml();
            assert_eq!(plist::from_bytes::<Agent>(xml.as_bytes()).expect("what was written is read"), written, "{xml}");
            assert_eq!(unknown_keys(&xml), Vec::<String>::new());
        }
    }

    #[test]
    fn the_umask_is_decimal() {
        let plist = plist::Value::from_reader_xml(agent("/").to_xml().as_bytes()).expect("a property list");
        let umask = plist.as_dictionary().and_then(|dict| dict.get("Umask")).and_then(plist::Value::as_unsigned_integer);
        assert_eq!(umask, Some(63));
    }

    #[test]
    fn the_shipped_agents_use_keys_that_launchd_knows() {
        for golden in [include_str!("../dev.flash.flashd.plist"), include_str!("../dev.flash.gateway.plist")] {
            assert_eq!(unknown_keys(golden), Vec::<String>::new());
            let agent: Agent = plist::from_bytes(golden.as_bytes()).expect("an agent");
            assert_eq!(agent.to_xml(), golden);
        }
    }

    #[test]
    fn a_misspelt_key_is_caught() {
        let xml = agent("/").to_xml();
        assert_eq!(unknown_keys(&xml.replace("KeepAlive", "KeepALive")), ["KeepALive"]);
        assert_eq!(unknown_keys(&xml.replace("SuccessfulExit", "SuccesfulExit")), ["SuccesfulExit"]);
        assert!(plist::from_bytes::<Agent>(xml.replace("LowPriorityIO", "LowPriorityIo").as_bytes()).is_err());
    }
}
