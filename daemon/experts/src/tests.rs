//! The façade from outside, with real loader threads. Delays, orders and faults come in through a `Storage` that asks the
//! test before each read; nothing sleeps.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

mod ahead;

use crate::*;

/// A record's bytes: enough for two pages of 4 KiB, in three slices that are apart on disk.
const PART: u32 = 3000;
const PARTS: u32 = 3;
/// A hang is a failure, not a stuck test run.
const PATIENCE: Duration = Duration::from_secs(60);

/// Byte `i` of every test file.
fn byte(i: u64) -> u8 {
    (i ^ (i >> 8).wrapping_mul(167) ^ (i >> 16).wrapping_mul(59)) as u8
}

/// Tensors stacked as in a checkpoint: file = `[part][layer × experts + expert]`, at an odd offset.
fn layout(layers: usize, experts: usize) -> Vec<Vec<Vec<Slice>>> {
    let slice = |record: usize, part: u32| Slice {
        file: 0,
        offset: 13 + (u64::from(part) * (layers * experts) as u64 + record as u64) * u64::from(PART),
        len: PART,
        at: (PARTS - 1 - part) * PART, // the slot's order is not the file's
    };
    let expert = |record: usize| (0..PARTS).map(|part| slice(record, part)).collect();
    (0..layers).map(|l| (0..experts).map(|e| expert(l * experts + e)).collect()).collect()
}

fn records(layers: usize, experts: usize) -> Vec<Vec<Record>> {
    layout(layers, experts).into_iter().map(|layer| layer.into_iter().map(Record::unchecked).collect()).collect()
}

fn file_len(layers: usize, experts: usize) -> u64 {
    13 + (layers * experts) as u64 * u64::from(PARTS * PART)
}

#[track_caller]
fn assert_bytes(slot: &[u8], layers: usize, experts: usize, layer: u16, expert: ExpertId) {
    for Slice { offset, len, at, .. } in &layout(layers, experts)[usize::from(layer)][usize::from(expert.0)] {
        let bytes = &slot[*at as usize..][..*len as usize];
        assert!(bytes.iter().zip(*offset..).all(|(&got, i)| got == byte(i)), "layer {layer} expert {}", expert.0);
    }
}

/// What the test says to a read.
enum Verdict {
    Go,
    Fail(io::ErrorKind),
    Panic,
}

/// Asks the test what to do with each read: sends the expert and a channel for the answer.
#[derive(Debug)]
struct Gate {
    layers: usize,
    experts: usize,
    ask: SyncSender<(u16, SyncSender<Verdict>)>,
    /// Counts the storages alive.
    _alive: Arc<()>,
}

impl Storage for Gate {
    fn name(&self) -> &str {
        "gate"
    }

    fn len(&self) -> u64 {
        file_len(self.layers, self.experts)
    }

    fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
        let record = (reads[0].offset - 13) / u64::from(PART);
        let (answer, verdict) = sync_channel(COUNT);
        self.ask.send((record as u16, answer)).unwrap();
        match verdict.recv().unwrap() {
            Verdict::Go => {}
            Verdict::Fail(kind) => return Err(kind.into()),
            Verdict::Panic => panic!("planned"),
        }
        for read in reads {
            read.into.iter_mut().zip(read.offset..).for_each(|(into, i)| *into = byte(i));
        }
        Ok(())
    }
}

/// Experts behind a gate, in one layer.
struct Gated {
    experts: Experts,
    asked: Receiver<(u16, SyncSender<Verdict>)>,
    held: BTreeMap<u16, SyncSender<Verdict>>,
    alive: Arc<()>,
}

const COUNT: usize = 10;

impl Gated {
    fn new(slots_per_layer: usize, loaders: usize) -> Self {
        let ((ask, asked), alive) = (sync_channel(COUNT), Arc::new(()));
        let gate = Gate { layers: 1, experts: COUNT, ask, _alive: Arc::clone(&alive) };
        let source = Source { files: vec![Box::new(gate)], layers: records(1, COUNT) };
        let slab = Slab::anonymous((PART * PARTS) as usize, COUNT).unwrap();
        let experts = Experts::open(source, slab, Config { top_k: 1, slots_per_layer, loaders, policy: PolicyKind::Lru }).unwrap();
        // A slot that is being faulted in cannot be had: a miss beside it evicts, and would make the tests depend on the moment.
        wait_until(&experts, Experts::settled);
        Self { experts, asked, held: BTreeMap::new(), alive }
    }
}

/// Until the cache, which loaders change, says so.
fn wait_until(experts: &Experts, done: impl Fn(&Experts) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done(experts) {
        assert!(Instant::now() < deadline, "{:?}", experts.stats());
        std::thread::yield_now();
    }
}

/// Waits until a loader is at each of `records`, and at no other.
fn expect(asked: &Receiver<(u16, SyncSender<Verdict>)>, held: &mut BTreeMap<u16, SyncSender<Verdict>>, records: &[u16]) {
    for _ in records {
        let (record, answer) = asked.recv_timeout(PATIENCE).expect("a loader reads");
        assert!(records.contains(&record) && held.insert(record, answer).is_none(), "record {record} is read");
    }
    assert!(asked.try_recv().is_err());
}

fn answer(held: &mut BTreeMap<u16, SyncSender<Verdict>>, record: u16, verdict: Verdict) {
    held.remove(&record).unwrap().send(verdict).unwrap();
}

fn ids(ids: &[u16]) -> Vec<ExpertId> {
    ids.iter().copied().map(ExpertId).collect()
}

/// One token asks for these.
fn ask<'a>(experts: &'a mut Experts, layer: LayerId, wanted: &[u16]) -> Fetch<'a> {
    experts.fetch(layer, &Routing::token(&ids(wanted)))
}

/// The next arrivals: Ok = ready with the right bytes, Err = failed with this message.
fn arrivals(fetch: &mut Fetch<'_>) -> Option<Vec<Result<u16, String>>> {
    let mut arrivals = Vec::new();
    fetch.next(&mut arrivals).then_some(())?;
    let check = |arrival| match arrival {
        Arrival::Ready { expert, .. } => {
            assert_bytes(fetch.bytes(expert), 1, COUNT, 0, expert);
            Ok(expert.0)
        }
        Arrival::Failed { error, .. } => Err(error.to_string()),
    };
    Some(arrivals.into_iter().map(check).collect())
}

#[test]
fn hits_come_first_and_loads_in_the_order_they_end() {
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let Gated { mut experts, asked, mut held, .. } = Gated::new(6, 3);
        let mut fetch = ask(&mut experts, LayerId(0), &[9]);
        expect(&asked, &mut held, &[9]);
        answer(&mut held, 9, Verdict::Go);
        assert_eq!(arrivals(&mut fetch), Some(vec![Ok(9)]));
        drop(fetch);
        let mut fetch = ask(&mut experts, LayerId(0), &[0, 9, 1, 2]);
        expect(&asked, &mut held, &[0, 1, 2]);
        assert_eq!(arrivals(&mut fetch), Some(vec![Ok(9)]), "without waiting for any load");
        for record in order {
            answer(&mut held, record, Verdict::Go);
            assert_eq!(arrivals(&mut fetch), Some(vec![Ok(record)]));
        }
        assert_eq!(arrivals(&mut fetch), None);
        drop(fetch);
        let stats = experts.stats();
        assert_eq!((stats.hits, stats.misses, stats.joined, stats.loads), (1, 4, 0, 4));
        assert_eq!((stats.bytes_read, stats.layers[0].resident), (4 * u64::from(PART * PARTS), 4));
        assert!(stats.read_time > Duration::ZERO);
    }
}

#[test]
fn eight_experts_pass_through_one_slot() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(1, 2);
    let wanted = [3, 1, 4, 5, 9, 2, 6, 8];
    for (resident, loaded) in [(&[][..], &wanted[..]), (&[8], &wanted[..7])] {
        let mut fetch = ask(&mut experts, LayerId(0), &wanted);
        for &record in resident {
            assert_eq!(arrivals(&mut fetch), Some(vec![Ok(record)]));
            fetch.done(&ids(&[record]));
        }
        for &record in loaded {
            expect(&asked, &mut held, &[record]);
            answer(&mut held, record, Verdict::Go);
            assert_eq!(arrivals(&mut fetch), Some(vec![Ok(record)]));
            fetch.done(&ids(&[record]));
        }
        assert_eq!(arrivals(&mut fetch), None);
    }
    assert_eq!(experts.resident(LayerId(0)), ids(&[6]));
    assert_eq!((experts.stats().misses, experts.stats().evictions), (15, 14));
}

#[test]
#[should_panic(expected = "call Fetch::done for those")]
fn waiting_for_a_slot_that_one_holds_oneself_panics() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(1, 1);
    let mut fetch = ask(&mut experts, LayerId(0), &[0, 1]);
    expect(&asked, &mut held, &[0]);
    answer(&mut held, 0, Verdict::Go);
    assert_eq!(arrivals(&mut fetch), Some(vec![Ok(0)]));
    fetch.next(&mut Vec::new());
}

#[test]
fn a_running_load_is_joined_and_a_waiting_one_taken_back() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(4, 1);
    drop(ask(&mut experts, LayerId(0), &[])); // nothing to wait for
    let fetch = ask(&mut experts, LayerId(0), &[3, 7]);
    expect(&asked, &mut held, &[3]);
    drop(fetch);
    let mut fetch = ask(&mut experts, LayerId(0), &[3, 5]);
    answer(&mut held, 3, Verdict::Go);
    assert_eq!(arrivals(&mut fetch), Some(vec![Ok(3)]));
    expect(&asked, &mut held, &[5]); // not 7
    answer(&mut held, 5, Verdict::Go);
    assert_eq!(arrivals(&mut fetch), Some(vec![Ok(5)]));
    drop(fetch);
    let stats = experts.stats();
    assert_eq!((stats.hits, stats.misses, stats.joined, stats.loads), (0, 3, 1, 2));
    assert_eq!(experts.resident(LayerId(0)), ids(&[3, 5]));
}

#[test]
fn a_load_that_nobody_waits_for_any_more_is_kept() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(2, 2);
    let fetch = ask(&mut experts, LayerId(0), &[4]);
    expect(&asked, &mut held, &[4]);
    drop(fetch);
    answer(&mut held, 4, Verdict::Go);
    wait_until(&experts, |experts| experts.resident(LayerId(0)).contains(&ExpertId(4)));
    assert_eq!(arrivals(&mut ask(&mut experts, LayerId(0), &[4])), Some(vec![Ok(4)]));
}

#[test]
fn a_failed_read_fails_its_expert_only_and_is_tried_again() {
    let check = |verdict: Verdict, expected: &str| {
        let Gated { mut experts, asked, mut held, .. } = Gated::new(2, 2);
        let mut fetch = ask(&mut experts, LayerId(0), &[0, 1]);
        expect(&asked, &mut held, &[0, 1]);
        answer(&mut held, 0, verdict);
        let failed = arrivals(&mut fetch).unwrap();
        let [Err(message)] = &failed[..] else { panic!("{failed:?}") };
        assert!(message.contains("layer 0 expert 0: cannot read 9000 bytes from offset 13 of gate: "), "{message}");
        assert!(message.contains(expected), "{message}");
        fetch.done(&ids(&[0])); // holds nothing
        answer(&mut held, 1, Verdict::Go);
        assert_eq!(arrivals(&mut fetch), Some(vec![Ok(1)]));
        assert_eq!(arrivals(&mut fetch), None);
        drop(fetch);
        let stats = experts.stats();
        assert_eq!((stats.loads, stats.load_errors, stats.bad_records, experts.resident(LayerId(0))), (1, 1, 1, ids(&[1])));

        let mut fetch = ask(&mut experts, LayerId(0), &[0]);
        expect(&asked, &mut held, &[0]);
        answer(&mut held, 0, Verdict::Go);
        assert_eq!(arrivals(&mut fetch), Some(vec![Ok(0)]));
        drop(fetch);
        let stats = experts.stats();
        assert_eq!((stats.loads, stats.load_errors, stats.bad_records), (2, 1, 0));
    };
    check(Verdict::Fail(io::ErrorKind::UnexpectedEof), "unexpected end of file");
    check(Verdict::Fail(io::ErrorKind::TimedOut), "timed out");
    check(Verdict::Panic, "the storage panicked: planned");
}

/// A prefetch or a fetch that has ended began the read: its failure may be older than the question.
#[test]
fn what_was_joined_and_failed_is_read_again() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(2, 2);
    let failed = || Verdict::Fail(io::ErrorKind::Other);
    for (record, verdict) in [(4, Verdict::Go), (5, failed())] {
        if record == 4 {
            experts.prefetch(LayerId(0), &ids(&[record]));
            expect(&asked, &mut held, &[record]);
        } else {
            let _fetch = ask(&mut experts, LayerId(0), &[record]);
            expect(&asked, &mut held, &[record]);
        }
        let mut fetch = ask(&mut experts, LayerId(0), &[record]);
        answer(&mut held, record, failed());
        expect(&asked, &mut held, &[record]);
        answer(&mut held, record, verdict);
        assert_eq!(arrivals(&mut fetch).unwrap()[0].is_ok(), record == 4, "once, and no more");
        assert_eq!(arrivals(&mut fetch), None);
    }
    assert_eq!((experts.stats().joined, experts.stats().load_errors), (2, 3));
}

#[test]
fn a_failure_frees_the_slot_for_what_is_pending() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(1, 1);
    let mut fetch = ask(&mut experts, LayerId(0), &[0, 1]);
    expect(&asked, &mut held, &[0]);
    answer(&mut held, 0, Verdict::Fail(io::ErrorKind::Other));
    assert!(arrivals(&mut fetch).unwrap()[0].is_err());
    expect(&asked, &mut held, &[1]);
    answer(&mut held, 1, Verdict::Go);
    assert_eq!(arrivals(&mut fetch), Some(vec![Ok(1)]));
}

#[test]
fn the_budget_shrinks_and_grows_under_running_loads() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(3, 3);
    let fetch = ask(&mut experts, LayerId(0), &[0, 1, 2]);
    expect(&asked, &mut held, &[0, 1, 2]);
    drop(fetch);
    experts.set_slots(1); // two of the loads are given up
    experts.set_slots(2); // and one of those slots is wanted again, once its loader lets go
    experts.set_wanted(7);
    assert_eq!((experts.slots(), experts.stats().slots_wanted), (2, 7));
    for record in [0, 1, 2] {
        answer(&mut held, record, Verdict::Go);
    }
    // From here on every read may go.
    let answers = std::thread::spawn(move || asked.iter().for_each(|(_, go)| go.send(Verdict::Go).unwrap()));
    for wanted in [[0u16, 5], [6, 1], [2, 0]] {
        let (mut fetch, mut arrived) = (ask(&mut experts, LayerId(0), &wanted), Vec::new());
        while let Some(arrivals) = arrivals(&mut fetch) {
            arrived.extend(arrivals.into_iter().map(Result::unwrap));
        }
        arrived.sort_unstable_by_key(|id| wanted.iter().position(|wanted| wanted == id));
        assert_eq!(arrived, wanted);
    }
    assert!(experts.resident(LayerId(0)).len() <= 2);
    experts.set_slots(0);
    assert_eq!((experts.slots(), experts.resident(LayerId(0)).len()), (1, 1));
    experts.set_slots(usize::MAX);
    assert_eq!(experts.slots(), COUNT);
    drop(experts);
    answers.join().unwrap();
}

#[test]
fn shrinking_keeps_what_was_used_last() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(4, 1);
    for record in [3, 2, 1, 0] {
        let mut fetch = ask(&mut experts, LayerId(0), &[record]);
        expect(&asked, &mut held, &[record]);
        answer(&mut held, record, Verdict::Go);
        assert_eq!(arrivals(&mut fetch), Some(vec![Ok(record)]));
    }
    drop(ask(&mut experts, LayerId(0), &[3]));
    experts.set_slots(2);
    assert_eq!(experts.resident(LayerId(0)), ids(&[0, 3]));
    assert_eq!(arrivals(&mut ask(&mut experts, LayerId(0), &[0, 3])), Some(vec![Ok(0), Ok(3)]));
    assert_eq!(experts.stats().resident_bytes, 2 * experts.slot_bytes());
}

#[test]
fn dropping_it_ends_the_loaders() {
    let Gated { mut experts, asked, mut held, alive } = Gated::new(4, 2);
    drop(ask(&mut experts, LayerId(0), &[0]));
    let fetch = ask(&mut experts, LayerId(0), &[1, 2, 3]);
    let (first, go) = asked.recv_timeout(PATIENCE).unwrap();
    held.insert(first, go);
    drop(fetch);
    drop(held); // reads fail from here on: their answer cannot come
    drop(asked);
    drop(experts);
    assert_eq!(Arc::strong_count(&alive), 1);
}

#[test]
fn wrong_settings_and_wrong_calls_are_refused() {
    let open = |slots: usize, top_k: usize| {
        let (ask, _) = sync_channel(COUNT);
        let gate = Gate { layers: 2, experts: 3, ask, _alive: Arc::new(()) };
        let slab = Slab::anonymous((PART * PARTS) as usize, slots).unwrap();
        let source = Source { files: vec![Box::new(gate)], layers: records(2, 3) };
        Experts::open(source, slab, Config { top_k, slots_per_layer: 9, loaders: 0, policy: PolicyKind::Lru })
    };
    let check = |slots, top_k, expected: &str| {
        let error = open(slots, top_k).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(6, 0, "top-0 of 3 experts");
    check(6, 4, "top-4 of 3 experts");
    check(1, 2, "1 slots for 2 layers");
    assert_eq!(open(5, 3).unwrap().slots(), 2, "what the slab has room for");
    let panics = |layer, list: &[u16]| {
        let mut experts = open(6, 1).unwrap();
        let fetch = std::panic::AssertUnwindSafe(|| drop(ask(&mut experts, LayerId(layer), list)));
        std::panic::catch_unwind(fetch).is_err()
    };
    assert!(panics(2, &[]) && panics(0, &[3]) && panics(0, &[1, 1]) && !panics(1, &[]));
}

/// Small deterministic pseudo-random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        (1..list.len()).for_each(|i| list.swap(i, self.below(i + 1)));
    }
}

/// Every seventh read fails, so that failures mix with everything else.
#[derive(Debug)]
struct Faulty(Pread, std::sync::atomic::AtomicUsize);

impl Storage for Faulty {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
        let count = self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        reads[0].into.fill(0xEE); // a failed read may leave anything behind
        if count % 7 == 6 { Err(io::Error::other("planned")) } else { self.0.read(reads) }
    }
}

fn write_file(path: &Path, layers: usize, experts: usize) {
    std::fs::write(path, (0..file_len(layers, experts)).map(byte).collect::<Vec<_>>()).unwrap();
}

/// Waits for nothing but the cache itself: whatever is ready is checked, held for a while, and given back in any order.
fn random_fetch(experts: &mut Experts, random: &mut Random, layers: usize, count: usize) {
    let (layer, spare) = (random.below(layers) as u16, experts.slots() - 1);
    let mut wanted: Vec<u16> = (0..count as u16).collect();
    random.shuffle(&mut wanted);
    wanted.truncate(random.below(count) + 1);
    let (mut fetch, mut holding, mut arrived) = (ask(experts, LayerId(layer), &wanted), Vec::new(), Vec::new());
    let mut arrivals = Vec::new();
    while fetch.next(&mut arrivals) {
        for arrival in arrivals.drain(..) {
            match arrival {
                Arrival::Ready { expert, .. } => {
                    assert_bytes(fetch.bytes(expert), layers, count, layer, expert);
                    holding.push(expert);
                    arrived.push(expert.0);
                }
                Arrival::Failed { expert, error } => {
                    assert!(error.to_string().contains("planned"));
                    arrived.push(expert.0);
                }
            }
        }
        if random.below(16) == 0 {
            return; // the request was cancelled
        }
        random.shuffle(&mut holding);
        for expert in holding.drain(random.below(holding.len() + 1).min(spare)..) {
            assert_bytes(fetch.bytes(expert), layers, count, layer, expert); // nobody wrote to it meanwhile
            fetch.done(&[expert]);
        }
    }
    arrived.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(arrived, wanted, "each exactly once");
}

#[test]
fn slots_hold_the_files_bytes_whatever_happens() {
    let (layers, count) = (4, 12);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("experts");
    write_file(&path, layers, count);
    for (seed, policy) in [PolicyKind::Lfru, PolicyKind::Lru, PolicyKind::Lcp, PolicyKind::None].into_iter().enumerate() {
        let file = Faulty(Pread::open(&path).unwrap(), Default::default());
        let source = Source { files: vec![Box::new(file)], layers: records(layers, count) };
        let slab = Slab::anonymous((PART * PARTS) as usize, layers * count).unwrap();
        let mut experts = Experts::open(source, slab, Config { top_k: 4, slots_per_layer: 5, loaders: 3, policy }).unwrap();
        let mut random = Random(seed as u64);
        for _ in 0..500 {
            random_fetch(&mut experts, &mut random, layers, count);
            if random.below(8) == 0 {
                experts.set_slots(random.below(count) + 1);
            }
        }
        let stats = experts.stats();
        assert!(
            (stats.hits > 0 || policy == PolicyKind::None) && stats.loads > 0 && stats.load_errors > 0 && stats.evictions > 0,
            "{stats:?}"
        );
    }
}

/// A backend that computes later reads the slots after the fetch.
#[test]
fn what_is_held_stays_until_the_next_fetch_or_release() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("experts");
    write_file(&path, 2, COUNT);
    let source = Source { files: vec![Box::new(Pread::open(&path).unwrap())], layers: records(2, COUNT) };
    let slab = Slab::anonymous((PART * PARTS) as usize, 2 * COUNT).unwrap();
    // Without a cache nothing stays that is not pinned.
    let config = Config { top_k: 1, slots_per_layer: 2, loaders: 1, policy: PolicyKind::None };
    let mut experts = Experts::open(source, slab, config).unwrap();
    let hold = |experts: &mut Experts, layer: u16, ids: &[ExpertId]| {
        let (mut fetch, mut arrivals) = (experts.fetch(LayerId(layer), &Routing::token(ids)), Vec::new());
        while fetch.next(&mut arrivals) {}
        fetch.hold();
    };
    let resident = |experts: &Experts| [0, 1].map(|layer| experts.resident(LayerId(layer)).len());
    hold(&mut experts, 0, &[ExpertId(3), ExpertId(4)]);
    assert_eq!(resident(&experts), [2, 0]);
    hold(&mut experts, 1, &[ExpertId(5)]);
    assert_eq!(resident(&experts), [0, 1]);
    experts.release();
    assert_eq!(resident(&experts), [0, 0]);
    experts.set_slots(1); // which wants nothing pinned
}
