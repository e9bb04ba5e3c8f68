//! What a failing disk does to the engine: requests that need the bytes fail and say which, all others get the right
//! tokens, nothing hangs, and when the disk is well again so is the next request.

use std::{sync::Arc, thread};

use anyhow::{Context, Result};
use flash_engine::{CacheBudget, Engine, Options, Request};
use flash_tests::{
    drive::{Outcome, drawn, greedy, ids, run},
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
    let dir = TempDir::new()?;
    TinyModel::generate(Spec { experts: EXPERTS, seed: 5, ..Spec::default() }).write(dir.path())?;
    let faults = Faults::new();
    let options = Options { expert_cache: CacheBudget::Share(2.5 / EXPERTS as f64), parallel: 4, ..Options::default() };
    let engine = Engine::load_from(dir.path(), &options, &faults.opener(), &mut |_| {})?;
    Ok(Subject { dir, faults, engine })
}

fn one(engine: &mut Engine, request: &Request) -> Result<Outcome> {
    run(engine, std::slice::from_ref(request))?.pop().context("an outcome")
}

fn names_the_place(error: &str) {
    for word in ["layer", "expert", "offset", "model.safetensors"] {
        assert!(error.contains(word), "no {word} in: {error}");
    }
}

/// Token n is byte n.
fn prompt(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn every_kind_of_failure_fails_the_request_and_passes() -> Result<()> {
    let mut subject = subject()?;
    let request = drawn(&prompt("A dog"), 12, 9);
    let expected = ids(run(&mut subject.engine, std::slice::from_ref(&request))?)?;
    for fault in [Fault::Error, Fault::Short, Fault::Vanished, Fault::Panic] {
        subject.faults.arm(When::Always, fault);
        let outcome = one(&mut subject.engine, &request)?;
        names_the_place(&outcome.error.with_context(|| format!("{fault:?} goes unnoticed"))?);
        let stats = subject.engine.report().experts;
        assert!(stats.load_errors > 0 && stats.bad_records > 0, "{fault:?}: {stats:?}");
        assert_eq!(subject.engine.report().running, 0, "{fault:?}: the request is gone");
        subject.faults.heal();
        assert_eq!(ids(run(&mut subject.engine, std::slice::from_ref(&request))?)?, expected, "after {fault:?}");
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
                names_the_place(&error);
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
    let mut subject = subject()?;
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
