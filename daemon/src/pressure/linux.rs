//! Linux sensors: files of a few hundred bytes under /proc and the cgroup mounts; no subprocess. The roots are fields, so
//! that recorded trees test the parsing. Same function names as `macos.rs`.

use std::{
    fs,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use flash_engine::Bytes;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    mm::{MlockFlags, mlock_with},
};

use super::{
    Finding,
    budget::{Limit, Readings},
};

/// The least time between two looks.
const SPACING: Duration = Duration::from_millis(5);

/// Where the kernel's files are.
#[derive(Clone, Debug)]
pub(crate) struct Sensors {
    /// /proc
    pub(crate) proc_root: PathBuf,
    /// What mount points and /sys are relative to: /
    pub(crate) cgroup_root: PathBuf,
}

impl Default for Sensors {
    fn default() -> Self {
        Self { proc_root: "/proc".into(), cgroup_root: "/".into() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Sensors {
    pub(crate) fn read(&self) -> Readings {
        let groups = self.groups();
        let machine = self.machine();
        let total = machine.map_or(u64::MAX, |(_, total)| total);
        let mapped = groups.first().map_or(0, |(version, folder)| match version {
            Version::V1 => stat(*version, folder, "mapped_file"),
            Version::V2 => stat(*version, folder, "file_mapped"),
        });
        Readings {
            mapped,
            limits: groups.iter().flat_map(|(version, folder)| self.limits(*version, folder, total)).collect(),
            machine,
            stall: groups.first().and_then(|(_, folder)| pressure(&folder.join("memory.pressure"))),
            machine_stall: pressure(&self.proc_root.join("pressure/memory")),
            process: self.process(),
            ..Readings::default()
        }
    }

    /// RssAnon + RssShmem: what this process alone keeps in memory.
    pub(crate) fn process(&self) -> Option<Bytes> {
        let status = fs::read_to_string(self.proc_root.join("self/status")).ok()?;
        Some(kib(&status, "RssAnon:")? + kib(&status, "RssShmem:").unwrap_or(0))
    }

    fn machine(&self) -> Option<(Bytes, Bytes)> {
        let meminfo = fs::read_to_string(self.proc_root.join("meminfo")).ok()?;
        Some((kib(&meminfo, "MemAvailable:")?, kib(&meminfo, "MemTotal:")?))
    }

    /// The folders of the process's own memory cgroup and its ancestors, innermost first.
    fn groups(&self) -> Vec<(Version, PathBuf)> {
        let read = |name: &str| fs::read_to_string(self.proc_root.join("self").join(name)).unwrap_or_default();
        let (cgroup, mounts) = (read("cgroup"), read("mountinfo"));
        // A v1 memory controller, where there is one, is the one that counts: then v2 has none.
        let v1 = cgroup.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let controllers = fields.next()?;
            fields.next().filter(|_| controllers.split(',').any(|name| name == "memory"))
        });
        let v2 = || cgroup.lines().find_map(|line| line.strip_prefix("0::"));
        let (version, path) = match (v1, v2()) {
            (Some(path), _) => (Version::V1, path),
            (None, Some(path)) => (Version::V2, path),
            (None, None) => return Vec::new(),
        };
        let Some((root, mount)) = mounts.lines().find_map(|line| memory_mount(line, version)) else { return Vec::new() };
        let mount = self.cgroup_root.join(mount.trim_start_matches('/'));
        // In a container the mount shows a subtree; a path outside of it is answered by the mount itself.
        let inside = path.strip_prefix(root.trim_end_matches('/')).unwrap_or("").trim_start_matches('/');
        let own = mount.join(inside);
        let own = if inside.is_empty() || inside.contains("..") || !own.is_dir() { mount.clone() } else { own };
        own.ancestors().take_while(|folder| folder.starts_with(&mount)).map(|folder| (version, folder.to_owned())).collect()
    }

    /// The bounds of one cgroup. A limit of the machine's size or more is the kernel's way to say none.
    fn limits(&self, version: Version, folder: &Path, total: Bytes) -> Vec<Limit> {
        let (files, usage): (&[&str], _) = match version {
            Version::V1 => (&["memory.limit_in_bytes", "memory.soft_limit_in_bytes"], "memory.usage_in_bytes"),
            Version::V2 => (&["memory.max", "memory.high"], "memory.current"),
        };
        let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<Bytes>().ok();
        let limits: Vec<_> = files.iter().filter_map(|file| Some((file, number(file).filter(|limit| *limit < total)?))).collect();
        let Some(usage) = number(usage).filter(|_| !limits.is_empty()) else { return Vec::new() };
        // Locked code is counted with the rest of the code, by the policy.
        let file_bytes: Bytes = ["inactive_file", "active_file", "unevictable"].map(|field| stat(version, folder, field)).iter().sum();
        let held = usage.saturating_sub(file_bytes);
        let name = |file| format!("cgroup {file} of {}", folder.display());
        limits.into_iter().map(|(file, bytes)| Limit { name: name(file), bytes, held, cached: file_bytes.min(usage), code: true }).collect()
    }

    /// What only Linux can be asked by Doctor.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let readings = self.read();
        let mut findings = vec![match self.groups().first() {
            Some((version, folder)) => {
                Finding::good("cgroup", format!("{version:?} at {}, {} limits", folder.display(), readings.limits.len()))
            }
            None => Finding::good("cgroup", "none".into()),
        }];
        findings.push(match readings.stall.or(readings.machine_stall) {
            Some((some, full)) => Finding::good("pressure stalls", format!("some {some}%, full {full}% of the last 10 s")),
            None => Finding::good("pressure stalls", "this kernel does not report them; limits and available memory are watched".into()),
        });
        let swap = fs::read_to_string(self.proc_root.join("meminfo")).ok().and_then(|meminfo| kib(&meminfo, "SwapTotal:"));
        findings.push(match swap {
            Some(0) => Finding::good("swap", "none".into()),
            Some(bytes) => Finding::good("swap", format!("{} MiB; an expert in swap is slower than one on disk", bytes >> 20)),
            None => Finding::good("swap", "unknown".into()),
        });
        let thp = fs::read_to_string(self.cgroup_root.join("sys/kernel/mm/transparent_hugepage/enabled")).unwrap_or_default();
        findings.push(match thp.split_once('[').and_then(|(_, rest)| rest.split_once(']')) {
            Some(("never", _)) => {
                Finding::bad("huge pages", "never".into(), "set transparent_hugepage/enabled to madvise for faster experts")
            }
            Some((setting, _)) => Finding::good("huge pages", setting.into()),
            None => Finding::good("huge pages", "unknown".into()),
        });
        findings
    }
}

/// The kernel's word that a v1 cgroup is being squeezed: someone lowers its limit below what it holds. Until that succeeds
/// no file shows the new limit, and without giving memory back it never does. Needs write access to the cgroup.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    group: PathBuf,
    bell: Option<OwnedFd>,
}

impl Alarm {
    /// Whether it rang since the last look.
    pub(crate) fn rang(&mut self, sensors: &Sensors) -> bool {
        match sensors.groups().into_iter().next() {
            Some((Version::V1, group)) if group != self.group => {
                self.bell = bell(&group);
                self.group = group;
            }
            Some((Version::V1, _)) => {}
            _ => *self = Self::default(),
        }
        self.bell.as_ref().is_some_and(|bell| rustix::io::read(bell, &mut [0; 8]).is_ok())
    }

    /// Returns when it rings, after `period` at the latest. Not at once: a group that churns page cache at its limit rings
    /// hundreds of times a second.
    pub(crate) fn wait(&self, period: Duration) {
        thread::sleep(SPACING);
        let mut bells: Vec<_> = self.bell.iter().map(|bell| PollFd::new(bell, PollFlags::IN)).collect();
        // Interrupted early, the caller looks once more than it had to.
        let _ = poll(&mut bells, Timespec::try_from(period.saturating_sub(SPACING)).ok().as_ref());
    }
}

/// An eventfd that the group's vmpressure notifier writes to.
fn bell(group: &Path) -> Option<OwnedFd> {
    let level = fs::File::open(group.join("memory.pressure_level")).ok()?;
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?;
    fs::write(group.join("cgroup.event_control"), format!("{} {} critical", bell.as_raw_fd(), level.as_raw_fd())).ok()?;
    Some(bell)
}

/// Keeps the pages of our own code that have been used in memory, and those that will be. Under a limit the kernel takes them
/// first, again and again; then everything waits for the disk, the answer to the pressure included, and reading them back at the
/// limit is what gets a process killed: so this comes before any limit falls. Without the privilege only what RLIMIT_MEMLOCK
/// allows is kept, which is no worse than before.
pub(crate) fn hold_code() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for line in maps.lines().filter(|line| line.contains('/')) {
        let mut fields = line.split(' ');
        let (Some((start, end)), Some(access)) = (fields.next().and_then(|range| range.split_once('-')), fields.next()) else { continue };
        let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)) else { continue };
        if access.starts_with("r-") {
            let from = std::ptr::with_exposed_provenance_mut(start);
            // SAFETY: locking changes no contents; the worst that a range unmapped meanwhile can get is an error.
            if let Err(error) = unsafe { mlock_with(from, end - start, MlockFlags::ONFAULT) } {
                tracing::debug!(%error, line, "code is not kept in memory");
            }
        }
    }
}

/// A field of memory.stat, of the group and all below it; 0 if the kernel does not say.
fn stat(version: Version, folder: &Path, field: &str) -> Bytes {
    let text = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let prefix = if version == Version::V1 { "total_" } else { "" };
    let value = |line: &str| line.strip_prefix(prefix)?.strip_prefix(field)?.strip_prefix(' ')?.parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

/// Mount root and mount point, if this line of mountinfo is the memory controller's mount.
fn memory_mount(line: &str, version: Version) -> Option<(&str, &str)> {
    let (mount, system) = line.split_once(" - ")?;
    let mut system = system.split(' ');
    let kind = system.next()?;
    let mine = match version {
        Version::V1 => kind == "cgroup" && system.nth(1)?.split(',').any(|option| option == "memory"),
        Version::V2 => kind == "cgroup2",
    };
    let mut mount = mount.split(' ').skip(3);
    mine.then(|| Some((mount.next()?, mount.next()?))).flatten()
}

/// "some avg10=0.12 …" and "full avg10=…" of a PSI file.
fn pressure(path: &Path) -> Option<(f64, f64)> {
    let text = fs::read_to_string(path).ok()?;
    let avg10 = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        line.split_whitespace().find_map(|field| field.strip_prefix("avg10="))?.parse::<f64>().ok()
    };
    Some((avg10("some ")?, avg10("full ").unwrap_or(0.0)))
}

/// A "Name:   123 kB" line, in bytes.
fn kib(text: &str, name: &str) -> Option<Bytes> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<Bytes>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MEMINFO: &str = "MemTotal:       16384 kB\nMemFree: 1 kB\nMemAvailable:    8192 kB\nSwapTotal: 0 kB\n";
    const STATUS: &str = "Name:\tflashd\nVmRSS:\t  99 kB\nRssAnon:\t    100 kB\nRssFile:\t 50 kB\nRssShmem:\t      20 kB\n";

    fn read(files: &[(&str, &str)]) -> (Readings, Vec<Finding>) {
        let tree = tempfile::tempdir().expect("a temporary directory");
        for (path, text) in files.iter().chain(&[("proc/meminfo", MEMINFO), ("proc/self/status", STATUS)]) {
            let path = tree.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        let sensors = Sensors { proc_root: tree.path().join("proc"), cgroup_root: tree.path().into() };
        let mut readings = sensors.read();
        for limit in &mut readings.limits {
            limit.name = limit.name.replace(&tree.path().display().to_string(), "");
        }
        (readings, sensors.findings())
    }

    fn limits(readings: &Readings) -> Vec<(&str, u64, u64)> {
        readings.limits.iter().map(|limit| (limit.name.as_str(), limit.bytes, limit.held)).collect()
    }

    #[test]
    fn a_machine_without_cgroups_or_psi() {
        let (readings, findings) = read(&[]);
        let expected = Readings { machine: Some((8 * MIB, 16 * MIB)), process: Some(120 * 1024), ..Readings::default() };
        assert_eq!(readings, expected);
        assert!(findings.iter().all(|finding| finding.ok));
    }

    #[test]
    fn v1_limits_of_the_group_and_its_ancestors() {
        let (readings, _) = read(&[
            ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/jobs/one\n0::/\n"),
            (
                "proc/self/mountinfo",
                "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n",
            ),
            ("proc/pressure/memory", "some avg10=1.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=1\n"),
            ("sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes", "4194304\n"),
            ("sys/fs/cgroup/memory/jobs/one/memory.soft_limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/jobs/one/memory.usage_in_bytes", "3145728\n"),
            (
                "sys/fs/cgroup/memory/jobs/one/memory.stat",
                "cache 1\ninactive_file 7\ntotal_inactive_file 700000\ntotal_active_file 400000\ntotal_mapped_file 100000\n",
            ),
            ("sys/fs/cgroup/memory/jobs/memory.limit_in_bytes", "3500000\n"),
            ("sys/fs/cgroup/memory/jobs/memory.usage_in_bytes", "3200000\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n"),
        ]);
        let expected = [
            ("cgroup memory.limit_in_bytes of /sys/fs/cgroup/memory/jobs/one", 4_194_304, 2_045_728),
            ("cgroup memory.limit_in_bytes of /sys/fs/cgroup/memory/jobs", 3_500_000, 3_200_000),
        ];
        assert_eq!(limits(&readings), expected);
        assert_eq!((readings.machine_stall, readings.mapped), (Some((1.5, 0.25)), 100_000));
    }

    #[test]
    fn v2_limits_and_pressure_of_the_own_group() {
        let (readings, _) = read(&[
            ("proc/self/cgroup", "0::/user.slice/app.scope\n"),
            ("proc/self/mountinfo", "30 23 0:26 /user.slice /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"),
            ("proc/pressure/memory", "some avg10=1.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=1\n"),
            ("sys/fs/cgroup/app.scope/memory.max", "max\n"),
            ("sys/fs/cgroup/app.scope/memory.high", "2097152\n"),
            ("sys/fs/cgroup/app.scope/memory.current", "2000000\n"),
            ("sys/fs/cgroup/app.scope/memory.stat", "anon 5\ninactive_file 300000\nactive_file 100000\nfile_mapped 50000\n"),
            (
                "sys/fs/cgroup/app.scope/memory.pressure",
                "some avg10=0.00 avg60=0 avg300=0 total=1\nfull avg10=12.00 avg60=0 avg300=0 total=1\n",
            ),
        ]);
        assert_eq!(limits(&readings), [("cgroup memory.high of /sys/fs/cgroup/app.scope", 2_097_152, 1_600_000)]);
        assert_eq!((readings.stall, readings.machine_stall, readings.mapped), (Some((0.0, 12.0)), Some((1.5, 0.25)), 50_000));
    }

    #[test]
    fn a_path_outside_the_mount_is_answered_by_the_mount() {
        let check = |cgroup: &str, root: &str| {
            let mounts = format!("30 23 0:26 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
            let (readings, _) = read(&[
                ("proc/self/cgroup", cgroup),
                ("proc/self/mountinfo", &mounts),
                ("sys/fs/cgroup/memory.max", "2097152\n"),
                ("sys/fs/cgroup/memory.current", "1000000\n"),
            ]);
            assert_eq!(limits(&readings), [("cgroup memory.max of /sys/fs/cgroup", 2_097_152, 1_000_000)], "{cgroup} {root}");
        };
        check("0::/\n", "/");
        check("0::/../../other\n", "/");
        check("0::/docker/abc\n", "/docker/abc");
        check("0::/docker/abc\n", "/elsewhere");
    }
}
