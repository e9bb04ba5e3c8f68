//! The house rules that a machine can check: what every file opens with, where `unsafe` may stand, who may import whom, and that what is
//! written twice (README's commands, the experiments table) agrees with itself. Not a formatter and not a linter: rustfmt and clippy run in
//! `.ci/run`. Walks the folder instead of asking git, so that an unpacked archive is checked as well.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The visible top level, whole; tool configuration hides in dotfiles, `target` is cargo's.
const TOP: &[&str] = &[
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "client",
    "daemon",
    "gateway",
    "launchd",
    "models",
    "proto",
    "tests",
];

/// Hidden folders that are ours; any other is some tool's.
const HIDDEN: &[&str] = &[".cargo", ".ci", ".config"];

/// Where `unsafe` may stand: a path or the beginning of one, and what it is needed for.
const UNSAFE_ROOMS: &[(&str, &str)] = &[
    ("daemon/experts/src/slab/", "one allocation, handed out as disjoint slots to several threads"),
    ("daemon/experts/src/store/", "reads into memory that no safe type describes; maps"),
    ("daemon/kernels/src/simd/", "intrinsics"),
    ("daemon/engine/src/backend/cpu/blocks.rs", "bytes of a mapping as numbers"),
    ("daemon/engine/src/backend/cpu/attention.rs", "threads write KV blocks of their own requests side by side"),
    ("daemon/engine/src/backend/cpu/crew.rs", "the same"),
    ("daemon/engine/src/backend/cpu/pool.rs", "workers borrow the engine thread's buffers for the length of a call"),
    ("daemon/engine/src/backend/mlx/", "memory that MLX owns"),
    ("daemon/src/pressure/", "mach calls"),
    ("proto/src/heap.rs", "malloc_trim"),
    ("tests/tests/allocations.rs", "an allocator that counts"),
];

/// What must stand nowhere in code, and why.
const BANNED: &[(&str, &str)] = &[
    (concat!("to", "do!("), "finish it"),
    (concat!("unimple", "mented!("), "finish it"),
    (concat!("db", "g!("), "left from debugging"),
    (concat!("#[ign", "ore"), "a test that is not run says nothing: mend or delete it"),
    (concat!("allow(dead", "_code)"), "delete the dead code"),
];

/// Which of our packages each package may reach, directly or not, and what else it must never reach.
const IMPORTS: &[(&str, &[&str], &[&str])] = &[
    ("flash-proto", &[], &["tokenizers", "clap"]),
    ("flash-experts", &[], &["tokio", "tonic", "prost", "hyper", "half", "tokenizers"]),
    ("flash-kernels", &[], &["flash-experts", "rustix", "libc", "tracing", "serde"]),
    ("flash-engine", &["flash-experts", "flash-kernels"], &["tokio", "tonic", "prost", "hyper"]),
    ("flashd", &["flash-engine", "flash-experts", "flash-kernels", "flash-proto"], &["prometheus-client"]),
    ("flashctl", &["flash-proto", "launchd-plist"], &["tokenizers", "minijinja", "prometheus-client"]),
    ("flash-gateway", &["flash-proto"], &["tokenizers", "minijinja"]),
    ("launchd-plist", &[], &["tokio"]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests package lies in the workspace")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every text file of the project: path from the top with `/`, content.
fn texts() -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("a folder of the project") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("an entry has a name").to_string_lossy();
            match fs::symlink_metadata(&path).expect("metadata") {
                meta if meta.is_dir() && (name == "target" || name.starts_with('.') && !HIDDEN.contains(&&*name)) => {}
                meta if meta.is_dir() => walk(&path, found),
                // In a second work tree of git `.git` is a file, and names a path.
                meta if meta.is_file() && name != ".git" => found.push(path),
                _ => {}
            }
        }
    }
    let mut paths = Vec::new();
    walk(root(), &mut paths);
    paths.sort();
    let texts: Vec<_> = paths
        .iter()
        .filter_map(|path| {
            let name = path.strip_prefix(root()).expect("walked from the top").to_string_lossy().replace('\\', "/");
            // Weights and archives are not text; neither can hold what is looked for here.
            Some((name, String::from_utf8(fs::read(path).expect("a readable file")).ok()?))
        })
        .collect();
    assert!(texts.iter().any(|(name, _)| name == "tests/tests/tidy.rs"), "the walk does not find this very file");
    texts
}

fn sources() -> impl Iterator<Item = (String, String)> {
    texts().into_iter().filter(|(name, _)| name.ends_with(".rs"))
}

/// Rust with comments and the contents of strings and characters blanked; line for line the same.
fn code_only(source: &str) -> String {
    let text: Vec<char> = source.chars().collect();
    let is = |at: usize, what: &str| what.chars().enumerate().all(|(i, c)| text.get(at + i) == Some(&c));
    let name = |c: Option<&char>| c.is_some_and(|c| c.is_alphanumeric() || *c == '_');
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < text.len() {
        let end = if is(at, "//") {
            (at..text.len()).find(|&i| text[i] == '\n').unwrap_or(text.len())
        } else if is(at, "/*") {
            let (mut depth, mut i) = (1, at + 2);
            while depth > 0 && i < text.len() {
                let step = if is(i, "/*") {
                    1
                } else if is(i, "*/") {
                    -1
                } else {
                    0
                };
                depth += step;
                i += if step == 0 { 1 } else { 2 };
            }
            i
        } else if (is(at, "r\"") || is(at, "r#")) && (at == 0 || !name(text.get(at - 1)) || text[at - 1] == 'b' || text[at - 1] == 'c') {
            let hashes = text[at + 1..].iter().take_while(|c| **c == '#').count();
            if text.get(at + 1 + hashes) == Some(&'"') {
                let close = format!("\"{}", "#".repeat(hashes));
                (at + 2 + hashes..text.len()).find(|&i| is(i, &close)).map_or(text.len(), |i| i + close.len())
            } else {
                at + 2 // a raw identifier
            }
        } else if text[at] == '"' {
            let mut i = at + 1;
            while i < text.len() && text[i] != '"' {
                i += if text[i] == '\\' { 2 } else { 1 };
            }
            i + 1
        } else if is(at, "'\\") {
            (at + 3..text.len()).find(|&i| text[i] == '\'').map_or(text.len(), |i| i + 1)
        } else if text[at] == '\'' && text.get(at + 2) == Some(&'\'') {
            at + 3
        } else {
            out.push(text[at]);
            at += 1;
            continue;
        };
        let end = end.min(text.len());
        out.extend(text[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
        at = end;
    }
    out
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|part| part == word)
}

/// Lines with an `unsafe` block, impl or public function that nothing explains: on the line, in the statement it belongs to, or right above,
/// attributes between. A private `unsafe fn` may state its contract where it relies on it.
fn unexplained(source: &str) -> Vec<usize> {
    let (lines, code) = (source.lines().collect::<Vec<_>>(), code_only(source));
    let code: Vec<&str> = code.lines().map(str::trim).collect();
    let explains = |at: usize| lines[at].to_lowercase().contains("safety");
    let promises = |line: &str| {
        let declares = line.contains("unsafe fn") || line.contains("unsafe extern");
        has_word(line, "unsafe") && (!declares || line.starts_with("pub"))
    };
    let leads_on = |at: usize| {
        let comment = code[at].is_empty() && !lines[at].trim().is_empty();
        comment || code[at].starts_with("#[") || !code[at].is_empty() && !code[at].ends_with([';', '{', '}'])
    };
    let explained = |at: usize| explains(at) || (0..at).rev().take_while(|&above| leads_on(above)).any(explains);
    (0..code.len()).filter(|&at| promises(code[at]) && !explained(at)).map(|at| at + 1).collect()
}

fn none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn code_is_told_from_comments_and_strings() {
    let check = |source: &str, expected: &str| assert_eq!(code_only(source), expected, "{source}");
    check("a // unsafe\nb", "a          \nb");
    check("a /* x /* y */ z */ b", "a                   b");
    check(r#"f("uns\"afe", 'x', '\'', b"y")"#, "f(          ,    ,     , b   )".to_owned().as_str());
    check("r#\"a \" b\"# c", "           c");
    check("fn f<'a>(x: &'a str)", "fn f<'a>(x: &'a str)");
    check("\"two\nlines\" unsafe", "    \n       unsafe");
}

#[test]
fn missing_safety_comments_are_found() {
    let check = |source: &str, expected: &[usize]| assert_eq!(unexplained(source), expected, "{source}");
    check("// SAFETY: why\nlet x = unsafe { y };", &[]);
    check("// SAFETY: why\nlet x =\n    unsafe { y };", &[]);
    check("/// # Safety\n/// AVX2.\n#[target_feature(enable = \"avx2\")]\nunsafe fn f() {}", &[]);
    check("let x = unsafe { y };", &[1]);
    check("// SAFETY: of another\nlet x = unsafe { y };\nlet z = unsafe { y };", &[3]);
    check("pub unsafe fn f() {}", &[1]);
    check("unsafe fn f() {}", &[]);
    check("// SAFETY (both): why\nf: unsafe { f() },\ng: unsafe { g() },", &[]);
    check("// unsafe\n\"unsafe\"", &[]);
}

#[test]
fn every_source_file_says_what_it_is() {
    let bad = |(name, text): (String, String)| {
        let first = text.lines().next().unwrap_or_default();
        (!first.starts_with("//! ") || first.len() < 24).then_some(name)
    };
    none("files that don't open with `//!` and a sentence on what they are", sources().filter_map(bad).collect());
}

#[test]
fn nothing_banned_is_left_in_code() {
    let mut found = Vec::new();
    for (name, text) in sources() {
        let code = code_only(&text);
        for (at, line) in code.lines().enumerate() {
            found.extend(
                BANNED.iter().filter(|(word, _)| line.contains(word)).map(|(word, why)| format!("{name}:{}: `{word}`: {why}", at + 1)),
            );
            if line.contains("process::exit") && !name.ends_with("/main.rs") {
                found.push(format!("{name}:{}: `process::exit` below main: return, so that destructors run and tests can call it", at + 1));
            }
        }
    }
    none("banned in code", found);
}

#[test]
fn unsafe_stays_in_its_rooms_and_explains_itself() {
    let mut found = Vec::new();
    for (name, text) in sources() {
        let room = UNSAFE_ROOMS.iter().any(|(path, _)| name.starts_with(path));
        if !room && code_only(&text).lines().any(|line| has_word(line, "unsafe")) {
            found.push(format!("{name}: `unsafe` outside the rooms that tests/tests/tidy.rs lists"));
        }
        found.extend(unexplained(&text).iter().map(|line| format!("{name}:{line}: `unsafe` without a SAFETY comment")));
    }
    none("unsafe code", found);
}

#[test]
fn the_visible_top_level_is_whole_and_closed() {
    let names = fs::read_dir(root()).expect("the top").map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
    let found: BTreeSet<String> = names.filter(|name| !name.starts_with('.') && name != "target").collect();
    assert_eq!(found, TOP.iter().map(|name| name.to_string()).collect());
}

#[test]
fn imports_point_one_way() {
    let members = read("Cargo.toml").lines().find(|line| line.starts_with("members")).expect("a line of members").matches('"').count() / 2;
    assert_eq!(members, IMPORTS.len() + 1, "a package of the workspace has no rule here (flash-tests needs none)");
    let ours: BTreeSet<&str> = IMPORTS.iter().map(|(package, ..)| *package).collect();
    for (package, allowed, never) in IMPORTS {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "--locked", "--offline", "--edges", "normal", "--prefix", "none", "--format", "{p}", "--package", package])
            .current_dir(root())
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
        let tree = String::from_utf8(output.stdout).expect("cargo speaks UTF-8");
        let reached: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).filter(|name| name != package).collect();
        none(
            &format!("{package} must not reach"),
            reached
                .iter()
                .filter(|name| never.contains(name) || ours.contains(*name) && !allowed.contains(name))
                .map(|name| name.to_string())
                .collect(),
        );
    }
}

#[test]
fn no_machine_leaves_its_traces() {
    // The addresses package clients fetch from; a lock file or a script that names one works on one network only.
    let hosts = [
        concat!("index.", "crates.io"),
        concat!("static.", "crates.io"),
        concat!("pypi", ".org"),
        concat!("python", "hosted.org"),
        concat!("registry.", "npmjs.org"),
        concat!("deb.", "debian.org"),
        concat!("proxy.", "golang.org"),
    ];
    let top = root().to_string_lossy().into_owned();
    let home = std::env::var("HOME").unwrap_or_default();
    let mut machine = vec![concat!("/ro", "ot/"), concat!("/wo", "rk/"), top.as_str()];
    // A home of one part ("/") or none would be found everywhere.
    machine.extend(Some(home.as_str()).filter(|home| home.len() > 4));
    let begins = |text: &str, at: usize| !text[..at].ends_with(|c: char| c.is_alphanumeric() || "_-.}".contains(c));
    let mut found = Vec::new();
    for (name, text) in texts() {
        found.extend(hosts.iter().filter(|host| text.contains(**host)).map(|host| format!("{name}: the host {host}")));
        for path in &machine {
            let here = text.match_indices(path).filter(|(at, _)| begins(&text, *at));
            found.extend(here.map(|(at, _)| format!("{name}:{}: the path {path}", text[..at].lines().count())));
        }
        if name == "Cargo.lock" {
            let standard = "source = \"registry+https://github.com/rust-lang/crates.io-index\"";
            found.extend(text.lines().filter(|line| line.starts_with("source") && *line != standard).map(|line| format!("{name}: {line}")));
        }
    }
    none("traces of a machine", found);
}

#[test]
fn readmes_commands_are_those_that_ci_runs() {
    let readme = read("README.md");
    let block = readme.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next()).expect("README has a first block of commands");
    let expected = [
        "cargo build --release && target/release/flashctl run local \"Tell me a short story about a little dog named Pip.\" --expert-cache 25%",
        "cargo test --workspace",
    ];
    assert_eq!(block.lines().collect::<Vec<_>>(), expected, "README's first block is its two commands, one a line");
    let ci = read(".ci/run");
    for line in [1, 2] {
        assert!(ci.contains(&format!("readme_command {line}")), ".ci/run has no step that runs README's command {line}");
    }
}

#[test]
fn experiments_are_rows_of_one_table() {
    let table = read("tests/experiments.tsv");
    let mut rows = table.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    let head = rows.next().expect("a header");
    assert_eq!(head, ["date", "base", "machine", "model", "idea", "before", "after", "bound", "verdict", "why"]);
    for row in rows {
        assert_eq!(row.len(), head.len(), "columns of {row:?}");
        assert!(row.iter().all(|cell| !cell.trim().is_empty()), "an empty cell in {row:?}; write `-` where there is nothing to say");
        let date: Vec<usize> = row[0].split('-').map(str::len).collect();
        assert!(date == [4, 2, 2] && row[0].chars().all(|c| c.is_ascii_digit() || c == '-'), "the date of {row:?}");
        assert!(["keep", "discard", "pending"].contains(&row[8]), "the verdict of {row:?}");
    }
}

/// A report, not a gate: a kernel or a page of decoder that reads better whole stays whole. Shown by `--nocapture`.
#[test]
fn long_files_are_reported() {
    let mut long: Vec<_> = sources().map(|(name, text)| (text.lines().count(), name)).filter(|(lines, _)| *lines > 600).collect();
    long.sort();
    long.iter().rev().for_each(|(lines, name)| println!("{lines:6} {name}"));
}
