//! Prefixes on disk: found again by the next engine, written only when they come a second time or when a request says that they will,
//! never past a budget; and whatever becomes of the files, tokens and log-probabilities stay what they are and no request fails.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use flash_engine::{CacheBudget, Cleared, DiskCache, Engine, Kernels, Options, Request, Step, clear_disk_cache};
use flash_tests::{
    daemon::Home,
    drive::{Outcome, drawn, greedy, options, run},
    rng::Rng,
    tiny_model::{Spec, TinyModel},
};
use tempfile::TempDir;

const BLOCK: usize = 32;
/// Whole blocks of the prompt, without its last token.
const BLOCKS: usize = 9;

struct Subject {
    dir: TempDir,
    cache: DiskCache,
    request: Request,
    expected: Outcome,
}

impl Subject {
    fn new() -> Result<Self> {
        let dir = TempDir::new()?;
        TinyModel::generate(Spec { context: 2048, seed: 8, ..Spec::default() }).write(&dir.path().join("model"))?;
        let mut rng = Rng::new(3);
        let prompt: Vec<u32> = (0..BLOCKS * BLOCK + 9).map(|_| rng.below(256) as u32).collect();
        let request = Request { top_logprobs: Some(8), ..drawn(&prompt, 12, 4) };
        let cache = DiskCache { dir: dir.path().join("cache"), budget: Some(1 << 30), daily_writes: 1 << 30 };
        let mut subject = Self { dir, cache, request, expected: Outcome::default() };
        let off = Options { prefix_cache: CacheBudget::Bytes(0), ..subject.options(None) };
        subject.expected = run(&mut Engine::load(&subject.model(), &off, &mut |_| {})?, std::slice::from_ref(&subject.request))?.remove(0);
        Ok(subject)
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    fn options(&self, disk_cache: Option<DiskCache>) -> Options {
        Options { kernels: Kernels::Cpu, threads: Some(1), disk_cache, ..options() }
    }

    fn engine(&self) -> Result<Engine> {
        self.engine_with(self.cache.clone())
    }

    fn engine_with(&self, cache: DiskCache) -> Result<Engine> {
        Ok(Engine::load(&self.model(), &self.options(Some(cache)), &mut |_| {})?)
    }

    /// Whole blocks that were not computed. The answer is the one that is expected.
    fn ask(&self, engine: &mut Engine) -> Result<usize> {
        let got = run(engine, std::slice::from_ref(&self.request))?.remove(0);
        assert_eq!((&got.error, &got.ids, &got.bits), (&None, &self.expected.ids, &self.expected.bits));
        assert_eq!(got.cached % BLOCK, 0);
        settle(engine);
        Ok(got.cached / BLOCK)
    }

    /// An engine that has written the prompt's blocks.
    fn fill(&self) -> Result<Engine> {
        let mut engine = self.engine()?;
        assert_eq!((self.ask(&mut engine)?, self.ask(&mut engine)?), (0, BLOCKS));
        assert_eq!(self.files()?.len(), BLOCKS);
        Ok(engine)
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.cache.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "kv") {
                files.push(path);
            }
        }
        // The one that was used last, which is the prompt's first block, comes first.
        files.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).and_then(|meta| meta.modified()).expect("a time")));
        Ok(files)
    }
}

/// Until everything is written.
fn settle(engine: &mut Engine) {
    while engine.step(&mut |_, _| flash_engine::Delivery::Taken) == Step::Worked {}
}

#[test]
fn a_prefix_that_came_twice_survives_a_restart() -> Result<()> {
    let subject = Subject::new()?;
    let mut engine = subject.engine()?;
    assert_eq!(subject.ask(&mut engine)?, 0);
    assert_eq!(subject.files()?.len(), 0, "nothing is written for a prefix that came once");
    assert_eq!(subject.ask(&mut engine)?, BLOCKS);
    let written = engine.report().prefix.disk.context("a disk")?;
    assert_eq!((written.blocks_written, written.files), (BLOCKS as u64, BLOCKS));
    subject.ask(&mut engine)?;
    assert_eq!(engine.report().prefix.disk.context("a disk")?.blocks_written, BLOCKS as u64, "once only");
    drop(engine);
    for file in subject.files()? {
        assert_eq!(fs::metadata(file)?.permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(fs::metadata(&subject.cache.dir)?.permissions().mode() & 0o777, 0o700);
    let mut engine = subject.engine()?;
    assert_eq!(engine.report().prefix.blocks, 0);
    assert_eq!((subject.ask(&mut engine)?, subject.ask(&mut engine)?), (BLOCKS, BLOCKS));
    let found = engine.report().prefix;
    let disk = found.disk.context("a disk")?;
    assert_eq!((found.disk_tokens, found.memory_tokens), ((BLOCKS * BLOCK) as u64, (BLOCKS * BLOCK) as u64), "the second from memory");
    assert_eq!((disk.blocks_read, disk.blocks_written, disk.bad_files), (BLOCKS as u64, 0, 0));
    Ok(())
}

#[test]
fn a_boundary_that_is_marked_is_written_at_once() -> Result<()> {
    let subject = Subject::new()?;
    let mut engine = subject.engine()?;
    run(&mut engine, &[Request { keep: 4 * BLOCK + 5, ..subject.request.clone() }])?;
    settle(&mut engine);
    drop(engine);
    assert_eq!(subject.files()?.len(), 4);
    assert_eq!(subject.ask(&mut subject.engine()?)?, 4);
    Ok(())
}

/// Every way in which a file can be wrong: what is before it is used, the rest computed, and the file is gone.
#[test]
fn damaged_and_foreign_files_are_never_used() -> Result<()> {
    let subject = Subject::new()?;
    drop(subject.fill()?);
    let whole: Vec<(PathBuf, Vec<u8>)> =
        subject.files()?.into_iter().map(|path| Ok((path.clone(), fs::read(path)?))).collect::<Result<_>>()?;
    let (path, bytes) = &whole[3];
    let flip = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let mut cases = vec![
        ("empty", Vec::new()),
        ("truncated", bytes[..bytes.len() - 1].to_vec()),
        ("longer", [&bytes[..], &[0]].concat()),
        ("another block's", whole[4].1.clone()),
        ("zeros", vec![0; bytes.len()]),
    ];
    // Header, key, sizes, checksums, first and last numbers.
    cases.extend([0, 7, 8, 39, 40, 48, 60, 90, 150, bytes.len() / 2, bytes.len() - 1].map(|at| ("one bit wrong", flip(at))));
    for (what, damaged) in cases {
        for (path, bytes) in &whole {
            fs::write(path, bytes)?;
        }
        fs::write(path, &damaged)?;
        let mut engine = subject.engine()?;
        assert_eq!(subject.ask(&mut engine)?, 3, "{what}");
        assert_eq!(engine.report().prefix.disk.context("a disk")?.bad_files, 1, "{what}");
        assert!(!path.exists(), "{what}");
        assert_eq!(subject.ask(&mut engine)?, BLOCKS, "{what}");
        assert_eq!(fs::read(path)?, *bytes, "{what}: written again");
    }
    // Gone, and damaged, under the engine's feet.
    let engine = &mut subject.engine()?;
    fs::remove_file(path)?;
    assert_eq!(subject.ask(engine)?, 3);
    let engine = &mut subject.engine()?;
    OpenOptions::new().write(true).open(&whole[0].0)?.write_all_at(b"x", 200)?;
    assert_eq!(subject.ask(engine)?, 0);
    Ok(())
}

#[test]
fn another_model_or_other_kernels_find_nothing() -> Result<()> {
    let mut subject = Subject::new()?;
    drop(subject.fill()?);
    let reference = Options { kernels: Kernels::Reference, ..subject.options(Some(subject.cache.clone())) };
    let mut engine = Engine::load(&subject.model(), &reference, &mut |_| {})?;
    assert_eq!(run(&mut engine, std::slice::from_ref(&subject.request))?.remove(0).cached, 0);
    drop(engine);
    // The same shape, name and size, other weights.
    TinyModel::generate(Spec { context: 2048, seed: 9, ..Spec::default() }).write(&subject.model())?;
    let mut engine = subject.engine()?;
    let got = run(&mut engine, std::slice::from_ref(&subject.request))?.remove(0);
    assert_eq!(got.cached, 0);
    assert_ne!(got.bits, subject.expected.bits);
    subject.expected = got;
    assert_eq!(subject.ask(&mut engine)?, BLOCKS);
    assert_eq!(subject.files()?.len(), 2 * BLOCKS, "of both");
    Ok(())
}

#[test]
fn a_folder_that_cannot_be_written_is_said_and_harms_nobody() -> Result<()> {
    let subject = Subject::new()?;
    fs::write(&subject.cache.dir, "a file")?;
    let mut engine = subject.engine()?;
    let why = engine.report().prefix.disk_error.context("a reason")?;
    assert!(why.contains("cache: "), "{why}");
    assert_eq!((subject.ask(&mut engine)?, subject.ask(&mut engine)?), (0, BLOCKS));
    fs::remove_file(&subject.cache.dir)?;
    // Gone in mid-life, with everything in it.
    let mut engine = subject.engine()?;
    subject.ask(&mut engine)?;
    fs::remove_dir_all(&subject.cache.dir)?;
    assert_eq!(subject.ask(&mut engine)?, BLOCKS);
    let disk = engine.report().prefix.disk.context("a disk")?;
    assert_eq!((disk.blocks_written, disk.files), (0, 0));
    assert!(disk.failed_writes > 0);
    Ok(())
}

/// A name that leads to a device that is full.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_the_writing_and_nothing_else() -> Result<()> {
    let subject = Subject::new()?;
    let mut engine = subject.engine()?;
    subject.ask(&mut engine)?;
    std::os::unix::fs::symlink("/dev/full", subject.cache.dir.join("block.part"))?;
    assert_eq!(subject.ask(&mut engine)?, BLOCKS);
    let disk = engine.report().prefix.disk.context("a disk")?;
    assert!(disk.failed_writes > 0 && disk.failed_writes < BLOCKS as u64, "no more is tried for a while: {disk:?}");
    assert_eq!(subject.ask(&mut engine)?, BLOCKS);
    // The next engine cleans up and tries again.
    drop(engine);
    drop(subject.fill());
    Ok(())
}

#[test]
fn budgets_bound_the_files_and_what_is_written_a_day() -> Result<()> {
    let subject = Subject::new()?;
    drop(subject.fill()?);
    let size = fs::metadata(&subject.files()?[0])?.len();
    // Room for five: the prompt's end goes, its beginning stays.
    let small = DiskCache { budget: Some(5 * size + size / 2), ..subject.cache.clone() };
    let mut engine = subject.engine_with(small.clone())?;
    assert_eq!(subject.files()?.len(), 5);
    assert_eq!(subject.ask(&mut engine)?, 5);
    // Another prefix comes twice, and takes the place of what was used longest ago.
    let other: Vec<u32> = subject.request.prompt.iter().rev().copied().take(3 * BLOCK + 1).collect();
    for _ in 0..2 {
        run(&mut engine, &[greedy(&other, 1)])?;
        settle(&mut engine);
    }
    let disk = engine.report().prefix.disk.context("a disk")?;
    assert_eq!((disk.files, disk.bytes), (5, 5 * size));
    drop(engine);
    assert_eq!(subject.files()?.len(), 5);
    let mut engine = subject.engine_with(small)?;
    assert_eq!((run(&mut engine, &[greedy(&other, 1)])?.remove(0).cached / BLOCK, subject.ask(&mut engine)?), (3, 2));
    drop(engine);
    // Twelve blocks were written today, so three more of a day's fifteen, whatever the engine.
    clear_disk_cache(&subject.cache.dir)?;
    let daily = DiskCache { daily_writes: 15 * size, ..subject.cache.clone() };
    for expected in [3, 0] {
        let mut engine = subject.engine_with(daily.clone())?;
        subject.ask(&mut engine)?;
        subject.ask(&mut engine)?;
        let disk = engine.report().prefix.disk.context("a disk")?;
        assert_eq!((disk.blocks_written, disk.written_today_bytes), (expected, 15 * size), "{disk:?}");
        assert!(disk.over_budget > 0);
    }
    Ok(())
}

#[test]
fn clearing_deletes_our_files_and_no_others() -> Result<()> {
    let subject = Subject::new()?;
    let mut engine = subject.fill()?;
    fs::write(subject.cache.dir.join("notes.txt"), "mine")?;
    let bytes = engine.report().prefix.disk.context("a disk")?.bytes;
    let cleared = engine.clear_prefixes()?;
    assert_eq!((cleared.files, cleared.disk_bytes), (BLOCKS as u64, bytes));
    assert!(cleared.memory_bytes > 0);
    assert_eq!((subject.files()?.len(), engine.report().prefix.blocks), (0, 0));
    assert_eq!((subject.ask(&mut engine)?, subject.ask(&mut engine)?), (0, BLOCKS), "and goes on");
    drop(engine);
    assert_eq!(clear_disk_cache(&subject.cache.dir)?.files, BLOCKS as u64);
    assert_eq!(clear_disk_cache(Path::new("/nowhere/at/all"))?, Cleared::default());
    assert_eq!(fs::read_to_string(subject.cache.dir.join("notes.txt"))?, "mine");
    Ok(())
}

/// The whole way: flashctl, flashd, a restart, and the switch.
#[test]
fn a_daemon_keeps_prefixes_across_a_restart_until_they_are_cleared() -> Result<()> {
    let home = Home::new()?;
    let ask = || -> Result<(String, u64)> {
        let prompt = "Once upon a time there was a little dog named Pip who lived in a house by the river. ".repeat(4);
        let answer = home.ctl(&["run", "local", &prompt, "-t", "0", "-n", "8", "--json"])?;
        anyhow::ensure!(answer.code == Some(0), "{answer:?}");
        let body: serde_json::Value = serde_json::from_str(&answer.stdout)?;
        let cached = body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().context("cached tokens")?;
        Ok((body["choices"][0]["message"]["content"].to_string(), cached))
    };
    let cold = ask()?;
    let warm = ask()?;
    assert_eq!((cold.1, &warm.0), (0, &cold.0));
    assert!(warm.1 >= BLOCK as u64, "{warm:?}");
    home.ctl(&["daemon", "restart"])?;
    assert_eq!(ask()?, warm, "from disk");
    let stats: serde_json::Value = serde_json::from_str(&home.ctl(&["stats", "--json"])?.stdout)?;
    assert_eq!(stats["prefix"]["disk_tokens"], warm.1);
    assert!(stats["prefix"]["disk"]["written_today_bytes"].as_u64() > Some(0), "{stats}");
    let cleared = home.ctl(&["cache", "clear"])?;
    assert!(cleared.code == Some(0) && cleared.stdout.starts_with("cleared "), "{cleared:?}");
    assert_eq!(ask()?, cold, "computed again");
    Ok(())
}
