//! What a failing disk does to the engine: requests that need the bytes fail and say which, all others get the right
//! tokens, nothing hangs, and when the disk is well again so is the next request.

use std::{path::Path, sync::Arc, thread};

use anyhow::{Context, Result};
use flash_engine::{CacheBudget, Engine, Options, Request, convert};
use flash_tests::{
    drive::{Late, Outcome, drawn, greedy, ids, options, run, run_with},
    fault_storage::{Fault, Faults, When},
    tiny_model::{Spec, TinyModel, expert_bytes},
};
use tempfile::TempDir;

const EXPERTS: usize = 16;

struct Subject {
    dir: TempDir,
    faults: Arc<Faults>,
    engine: Engine,
}

/// An engine with two slots per layer, so that nearly every token reads experts.
fn subject() -> Result<Subject> {
    prepared(|_| Ok(()))
}

/// The same with its experts in a store.
fn packed() -> Result<Subject> {
    prepared(|dir| Ok(convert(dir, false, &mut |_| true).map(drop)?))
}

fn prepared(prepare: impl FnOnce(&Path) -> Result<()>) -> Result<Subject> {
    let dir = TempDir::new()?;
    TinyModel::generate(Spec { experts: EXPERTS, seed: 5, ..Spec::default() }).write(dir.path())?;
    prepare(dir.path())?;
    let faults = Faults::new();
    let options = Options { expert_cache: CacheBudget::Share(2.5 / EXPERTS as f64), parallel: 4, ..options() };
    let engine = Engine::load_from(dir.path(), &options, &faults.opener(), &mut |_| {})?;
    Ok(Subject { dir, faults, engine })
}

fn one(engine: &mut Engine, request: &Request) -> Result<Outcome> {
    run(engine, std::slice::from_ref(request))?.pop().context("an outcome")
}

fn names_the_place(error: &str, file: &str) {
    for word in ["layer", "expert", "offset", file] {
        assert!(error.contains(word), "no {word} in: {error}");
    }
}

/// Token n is byte n.
fn prompt(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn every_kind_of_failure_fails_the_request_and_passes() -> Result<()> {
    let loud = [Fault::Error, Fault::Short, Fault::Vanished, Fault::Panic];
    // A flipped bit is noticed where there is a checksum to hold the bytes against. Last, since a read that nobody waits for any more
    // is still counted, and so could be taken for the next fault's.
    let every = [Fault::Error, Fault::Short, Fault::Vanished, Fault::Panic, Fault::Flip];
    for (mut subject, file, faults) in [(subject()?, "model.safetensors", &loud[..]), (packed()?, "experts.flash", &every[..])] {
        let request = drawn(&prompt("A dog"), 12, 9);
        let expected = ids(run(&mut subject.engine, std::slice::from_ref(&request))?)?;
        for &fault in faults {
            let before = subject.engine.report().experts.checksum_errors;
            subject.faults.arm(When::Always, fault);
            let outcome = one(&mut subject.engine, &request)?;
            names_the_place(&outcome.error.with_context(|| format!("{fault:?} goes unnoticed"))?, file);
            let stats = subject.engine.report().experts;
            assert!(stats.load_errors > 0 && stats.bad_records > 0, "{fault:?}: {stats:?}");
            assert_eq!(stats.checksum_errors > before, fault == Fault::Flip, "{fault:?}: {stats:?}");
            assert_eq!(subject.engine.report().running, 0, "{fault:?}: the request is gone");
            subject.faults.heal();
            assert_eq!(ids(run(&mut subject.engine, std::slice::from_ref(&request))?)?, expected, "after {fault:?}");
        }
    }
    Ok(())
}

/// A byte that is wrong on the disk itself stays wrong: whoever needs that expert fails, each time, and nobody else does.
#[test]
fn a_damaged_record_fails_those_that_need_it() -> Result<()> {
    let Subject { dir, mut engine, .. } = packed()?;
    let requests: Vec<Request> = ["a", "Zq", "0", "~~", "dog", "\u{1}"].map(|text| greedy(&prompt(text), 3)).to_vec();
    let expected = ids(run(&mut engine, &requests)?)?;
    drop(engine);
    let path = dir.path().join("experts.flash");
    let good = std::fs::read(&path)?;
    let mut told_apart = 0;
    for expert in 0..EXPERTS {
        let store = flash_experts::StoreReader::open(&path, flash_engine::Io::Buffered)?;
        let entry = store.records().nth(1).context("layer 1")?[expert];
        let mut bytes = good.clone();
        bytes[usize::try_from(entry.offset)? + entry.payload as usize / 2] ^= 1;
        std::fs::write(&path, bytes)?;
        let options = Options { expert_cache: CacheBudget::Share(0.5), parallel: 4, ..options() };
        let mut engine = Engine::load(dir.path(), &options, &mut |_| {})?;
        let mut failures = 0;
        for _ in 0..2 {
            for (outcome, expected) in run(&mut engine, &requests)?.into_iter().zip(&expected) {
                match outcome.error {
                    Some(error) => {
                        failures += 1;
                        names_the_place(&error, "experts.flash");
                        assert!(error.contains(&format!("layer 1 expert {expert}:")) && error.contains("flashctl verify"), "{error}");
                    }
                    None => assert_eq!(outcome.ids, *expected),
                }
            }
        }
        assert_eq!(engine.report().experts.checksum_errors > 0, failures > 0);
        told_apart += usize::from(failures > 0 && failures < 2 * requests.len());
        std::fs::write(&path, &good)?;
    }
    assert!(told_apart > 0, "no expert told the requests apart");
    Ok(())
}

/// The disk goes away in mid-stream: who needs it fails, naming the record; who does not ends as ever.
#[test]
fn a_disk_that_vanishes_in_mid_stream() -> Result<()> {
    for mut subject in [subject()?, packed()?] {
        let requests: Vec<Request> = ["one", "two", "three"].map(|text| greedy(&prompt(text), 24)).to_vec();
        let expected = ids(run(&mut subject.engine, &requests)?)?;
        let late: Vec<Late> = requests.iter().map(|request| Late { at: 0, request: request.clone() }).collect();
        for gone_at in [0, 1, 5, 20] {
            let faults = Arc::clone(&subject.faults);
            let outcomes = run_with(&mut subject.engine, &late, &mut |_, step| {
                if step == gone_at {
                    faults.arm(When::Always, Fault::Vanished);
                }
            })?;
            let mut failed = 0;
            for (outcome, expected) in outcomes.into_iter().zip(&expected) {
                match outcome.error {
                    Some(error) => {
                        failed += 1;
                        names_the_place(&error, "");
                    }
                    None => assert_eq!(outcome.ids, *expected, "gone at step {gone_at}"),
                }
            }
            assert!(failed > 0, "nobody needed the disk after step {gone_at}");
            subject.faults.heal();
            assert_eq!(ids(run(&mut subject.engine, &requests)?)?, expected);
        }
    }
    Ok(())
}

/// The n-th read fails, for every n in the life of a request: it fails and says where, or it never needed that read.
#[test]
fn a_failure_at_every_point_of_a_request() -> Result<()> {
    let mut subject = subject()?;
    let request = greedy(&prompt("Once"), 6);
    let expected = ids(run(&mut subject.engine, std::slice::from_ref(&request))?)?.concat();
    let mut failures = 0;
    for n in 0..40 {
        let struck = subject.faults.struck();
        subject.faults.arm(When::Nth(n), Fault::Error);
        let outcome = one(&mut subject.engine, &request)?;
        match outcome.error {
            Some(error) => {
                failures += 1;
                names_the_place(&error, "model.safetensors");
                assert!(subject.faults.struck() > struck);
            }
            None => assert_eq!(outcome.ids, expected, "read {n}"),
        }
        subject.faults.heal();
        assert_eq!(one(&mut subject.engine, &request)?.ids, expected, "the request after read {n} failed");
    }
    assert!(failures > 10, "only {failures} of 40 single failures met the request");
    Ok(())
}

#[test]
fn only_requests_that_need_the_bytes_fail() -> Result<()> {
    let mut subject = subject()?;
    let requests: Vec<Request> = ["a", "Zq", "0", "~~", "dog", "\u{1}"].map(|text| greedy(&prompt(text), 3)).to_vec();
    let expected = ids(run(&mut subject.engine, &requests)?)?;
    let mut mixed = 0;
    for expert in 0..EXPERTS {
        let (file, range) = expert_bytes(subject.dir.path(), 1, expert, "up_proj")?;
        subject.faults.arm(When::Touches(file, range), Fault::Error);
        // Alone, each request shows whether it needs this expert.
        let mut needs = Vec::new();
        for request in &requests {
            // Or the expert may be there from before.
            subject.engine.clear_cache();
            needs.push(one(&mut subject.engine, request)?.error.is_some());
        }
        for ((outcome, needs), expected) in run(&mut subject.engine, &requests)?.into_iter().zip(&needs).zip(&expected) {
            match outcome.error {
                Some(error) => {
                    assert!(needs, "a neighbour's expert failed this request: {error}");
                    assert!(error.contains("layer 1") && error.contains(&format!("expert {expert}")), "{error}");
                }
                None => {
                    assert!(!needs, "expert {expert} was needed, could not be read, and the request went on");
                    assert_eq!(outcome.ids, *expected);
                }
            }
        }
        mixed += usize::from(needs.contains(&true) && needs.contains(&false));
        subject.faults.heal();
    }
    assert!(mixed > 0, "no expert told the requests apart");
    assert_eq!(ids(run(&mut subject.engine, &requests)?)?, expected);
    Ok(())
}

/// A disk that does not answer stops the step, not the process; when it answers, the tokens are right.
#[test]
fn reads_that_hang_for_a_while() -> Result<()> {
    for subject in [subject()?, packed()?] {
        hangs_for_a_while(subject)?;
    }
    Ok(())
}

fn hangs_for_a_while(mut subject: Subject) -> Result<()> {
    let request = greedy(&prompt("wait"), 6);
    let expected = ids(run(&mut subject.engine, std::slice::from_ref(&request))?)?;
    // Another prompt, so that the slots hold other experts.
    run(&mut subject.engine, &[drawn(&prompt("elsewhere"), 8, 1)])?;
    let Subject { faults, mut engine, .. } = subject;
    let held = faults.hold();
    let stepping = thread::spawn(move || run(&mut engine, std::slice::from_ref(&request)));
    faults.wait_held(1);
    drop(held);
    assert_eq!(ids(stepping.join().expect("no panic")?)?, expected);
    Ok(())
}

/// Dropping an engine while its disk fails ends its threads.
#[test]
fn an_engine_with_a_broken_disk_can_be_dropped() -> Result<()> {
    let mut subject = subject()?;
    subject.faults.arm(When::Always, Fault::Vanished);
    assert!(one(&mut subject.engine, &greedy(&prompt("x"), 4))?.error.is_some());
    drop(subject.engine);
    Ok(())
}
