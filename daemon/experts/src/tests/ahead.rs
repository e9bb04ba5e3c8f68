//! What is loaded before anyone waits for it, what a prompt leaves behind, and what is known from one run to the next. The
//! façade from outside, with the gates of `tests.rs`.

use super::*;
use crate::replay::{ReplayPolicy, Trace, replay};

fn resident(experts: &Experts) -> Vec<ExpertId> {
    experts.resident(LayerId(0))
}

#[test]
fn half_of_the_loaders_prefetch_until_the_fetch_comes() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(6, 4);
    experts.prefetch(LayerId(0), &ids(&[3, 4, 5, 6]));
    expect(&asked, &mut held, &[3, 4]); // two of four loaders
    answer(&mut held, 3, Verdict::Go);
    expect(&asked, &mut held, &[5]);
    wait_until(&experts, |experts| resident(experts) == ids(&[3]));
    let mut fetch = ask(&mut experts, LayerId(0), &[3, 4, 7, 8]);
    expect(&asked, &mut held, &[7, 8]); // and never 6, which is stale
    assert_eq!(arrivals(&mut fetch), Some(vec![Ok(3)]));
    for record in [4, 7, 8] {
        answer(&mut held, record, Verdict::Go);
        assert_eq!(arrivals(&mut fetch), Some(vec![Ok(record)]));
    }
    assert_eq!(arrivals(&mut fetch), None);
    drop(fetch);
    answer(&mut held, 5, Verdict::Go);
    wait_until(&experts, |experts| resident(experts).contains(&ExpertId(5)));
    experts.set_slots(1); // 5 was never used, so it goes before the others
    let stats = experts.stats();
    assert_eq!((stats.hits, stats.misses, stats.joined), (1, 2, 1));
    assert_eq!((stats.prefetched, stats.prefetch_useful, stats.prefetch_late, stats.prefetch_wasted), (3, 1, 1, 1));
    assert!(asked.try_recv().is_err());
}

#[test]
fn demand_goes_before_a_prefetch_and_another_wish_replaces_it() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(6, 1);
    let fetch = ask(&mut experts, LayerId(0), &[0, 1]);
    expect(&asked, &mut held, &[0]);
    drop(fetch); // 1 is taken back, 0 runs
    experts.prefetch(LayerId(0), &ids(&[2, 3]));
    experts.prefetch(LayerId(0), &ids(&[4, 3]));
    let mut fetch = ask(&mut experts, LayerId(0), &[5]); // and that is over, too
    fetch.prefetch(LayerId(0), &ids(&[6])); // no effect during that very layer's fetch
    answer(&mut held, 0, Verdict::Go);
    expect(&asked, &mut held, &[5]);
    answer(&mut held, 5, Verdict::Go);
    assert_eq!(arrivals(&mut fetch), Some(vec![Ok(5)]));
    drop(fetch);
    experts.prefetch(LayerId(0), &ids(&[0, 7]));
    expect(&asked, &mut held, &[7]);
    answer(&mut held, 7, Verdict::Fail(io::ErrorKind::Other)); // nobody's error
    wait_until(&experts, |experts| experts.stats().load_errors == 1);
    assert_eq!(resident(&experts), ids(&[0, 5]));
    let mut fetch = ask(&mut experts, LayerId(0), &[7]);
    expect(&asked, &mut held, &[7]);
    answer(&mut held, 7, Verdict::Go);
    assert_eq!(arrivals(&mut fetch), Some(vec![Ok(7)]));
}

#[test]
fn a_prefetch_evicts_nothing_that_is_expected_too() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(2, 1);
    for record in [1, 2] {
        let mut fetch = ask(&mut experts, LayerId(0), &[record]);
        expect(&asked, &mut held, &[record]);
        answer(&mut held, record, Verdict::Go);
        assert_eq!(arrivals(&mut fetch), Some(vec![Ok(record)]));
    }
    experts.prefetch(LayerId(0), &ids(&[1, 3, 4])); // 1 is the older one
    expect(&asked, &mut held, &[3]);
    answer(&mut held, 3, Verdict::Go);
    wait_until(&experts, |experts| resident(experts) == ids(&[1, 3]));
    let mut fetch = ask(&mut experts, LayerId(0), &[1, 3]);
    assert_eq!(arrivals(&mut fetch), Some(vec![Ok(1), Ok(3)]));
    drop(fetch);
    assert!(asked.try_recv().is_err(), "4 found no slot");
}

#[test]
fn nothing_stays_without_a_cache() {
    let Gated { mut experts, asked, mut held, .. } = Gated::new(4, 2);
    experts.set_policy(PolicyKind::None);
    for _ in 0..2 {
        experts.prefetch(LayerId(0), &ids(&[5])); // no effect
        let mut fetch = ask(&mut experts, LayerId(0), &[0, 1]);
        expect(&asked, &mut held, &[0, 1]);
        for record in [0, 1] {
            answer(&mut held, record, Verdict::Go);
            assert_eq!(arrivals(&mut fetch), Some(vec![Ok(record)]));
        }
        fetch.done(&ids(&[0]));
        drop(fetch);
        assert_eq!(resident(&experts), []);
    }
    assert_eq!(experts.counters(), (0, 4, 4 * u64::from(PART * PARTS)));
}

/// Experts in one layer whose reads all succeed.
fn open(dir: &Path, slots_per_layer: usize, loaders: usize, policy: PolicyKind) -> Experts {
    let path = dir.join("experts");
    write_file(&path, 1, COUNT);
    let source = Source { files: vec![Box::new(Pread::open(&path).unwrap())], layers: records(1, COUNT) };
    let slab = Slab::anonymous((PART * PARTS) as usize, COUNT).unwrap();
    let experts = Experts::open(source, slab, Config { top_k: 3, slots_per_layer, loaders, policy }).unwrap();
    wait_until(&experts, Experts::settled); // see `Gated::new`
    experts
}

/// As the engine does it: computes what arrives at once.
fn run(experts: &mut Experts, routing: &Routing<'_>) {
    let (mut fetch, mut arrivals) = (experts.fetch(LayerId(0), routing), Vec::new());
    while fetch.next(&mut arrivals) {
        for arrival in &arrivals {
            match arrival {
                Arrival::Ready { expert, .. } => fetch.done(&[*expert]),
                Arrival::Failed { error, .. } => panic!("{error}"),
            }
        }
    }
}

fn tokens(count: usize) -> Vec<Vec<ExpertId>> {
    let mut random = Random(7);
    let choose = |_| {
        let mut token: Vec<ExpertId> = Vec::new();
        while token.len() < 3 {
            let id = ExpertId(random.below(COUNT).min(random.below(COUNT)) as u16); // the low ones more often
            if !token.contains(&id) {
                token.push(id);
            }
        }
        token
    };
    (0..count).map(choose).collect()
}

#[test]
fn a_replay_of_recent_routing_hits_as_often_as_the_run_did() {
    let dir = tempfile::tempdir().unwrap();
    for policy in [PolicyKind::Lfru, PolicyKind::Lru, PolicyKind::Lcp, PolicyKind::None] {
        for slots in [3, 5, 8] {
            let mut experts = open(dir.path(), slots, 3, policy);
            let mut expected = Trace::new(1, COUNT);
            for token in tokens(300) {
                run(&mut experts, &Routing::token(&token));
                expected.push(&token).unwrap();
            }
            assert_eq!(experts.recent(), expected);
            let (hits, misses, _) = experts.counters();
            let replayed = replay(&expected, ReplayPolicy::Live(policy), slots);
            assert_eq!((replayed.hits, replayed.misses), (hits, misses), "{policy} with {slots} slots");
        }
    }
}

/// The tokens as one prompt: experts, where their rows start, rows.
fn prompt(tokens: &[Vec<ExpertId>]) -> (Vec<ExpertId>, Vec<usize>, Vec<u32>) {
    let (mut experts, mut first, mut rows) = (vec![], vec![0], vec![]);
    for id in (0..COUNT as u16).map(ExpertId) {
        rows.extend((0u32..).zip(tokens).filter(|(_, token)| token.contains(&id)).map(|(row, _)| row));
        if rows.len() > first[first.len() - 1] {
            experts.push(id);
            first.push(rows.len());
        }
    }
    (experts, first, rows)
}

#[test]
fn a_prompt_teaches_what_its_tokens_would_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let (mut one_by_one, mut at_once) = (open(dir.path(), 4, 2, PolicyKind::Lfru), open(dir.path(), 4, 2, PolicyKind::Lfru));
    let tokens = tokens(200);
    tokens.iter().for_each(|token| run(&mut one_by_one, &Routing::token(token)));
    let (experts, first, rows) = prompt(&tokens);
    let routing = Routing { experts: &experts, first: &first, rows: &rows, tokens: tokens.len() as u32, first_time: true };
    run(&mut at_once, &routing);
    run(&mut at_once, &Routing::rest(&experts, tokens.len() as u32)); // counts nothing
    let uses = |experts: &Experts| experts.hot().layers.into_iter().map(|layer| (layer.tick, layer.uses)).collect::<Vec<_>>();
    for ((tick, a), (other, b)) in uses(&one_by_one).into_iter().zip(uses(&at_once)) {
        assert_eq!((tick, a.into_iter().map(|(seen, _)| seen).collect::<Vec<_>>()), (other, b.into_iter().map(|(seen, _)| seen).collect()));
    }
    assert_eq!(at_once.stats().hits + at_once.stats().misses, experts.len() as u64);
    assert_eq!(at_once.recent().tokens(), 0, "a prompt is not decoding");
}

#[test]
fn rare_experts_of_a_prompt_pass_through_beside_frequent_ones() {
    let dir = tempfile::tempdir().unwrap();
    let mut experts = open(dir.path(), 6, 1, PolicyKind::Lfru);
    let favourites: Vec<Vec<ExpertId>> = (0..60).map(|i| ids(&[i % 6, (i + 1) % 6, (i + 2) % 6])).collect();
    favourites.iter().for_each(|token| run(&mut experts, &Routing::token(token)));
    // Every token still uses favourites; 6 to 9 come once each.
    let mut tokens = favourites[..40].to_vec();
    (6..10).for_each(|id| tokens[usize::from(id)].push(ExpertId(id)));
    let (list, first, rows) = prompt(&tokens);
    run(&mut experts, &Routing { experts: &list, first: &first, rows: &rows, tokens: 40, first_time: true });
    let stats = experts.stats();
    assert_eq!(stats.loads, 6 + 4, "each is read once");
    let kept = resident(&experts).into_iter().filter(|id| id.0 < 6).count();
    assert_eq!(kept, 4, "one loader and the computation need two slots");
}

#[test]
fn a_warm_start_brings_the_dearest_back_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = open(dir.path(), 4, 2, PolicyKind::Lfru);
    for token in [&[1][..], &[2, 7], &[2, 7], &[2]] {
        run(&mut before, &Routing::token(&ids(token)));
    }
    let hot = Hot::from_bytes(&before.hot().to_bytes()).unwrap();
    assert_eq!(hot, before.hot());

    let Gated { mut experts, asked, mut held, .. } = Gated::new(2, 1);
    experts.warm(&hot);
    for record in [2, 7] {
        expect(&asked, &mut held, &[record]);
        answer(&mut held, record, Verdict::Go);
    }
    wait_until(&experts, |experts| resident(experts) == ids(&[2, 7])); // 1 finds no free slot
    assert_eq!(experts.stats().warm_loads, 2);
    experts.set_policy(PolicyKind::Lfru);
    drop(ask(&mut experts, LayerId(0), &[]));
    experts.set_slots(1);
    assert_eq!(resident(&experts), ids(&[2]), "what was learned came with it");
    experts.clear();
    assert_eq!(resident(&experts), []);
    assert!(asked.try_recv().is_err());

    let mut other = experts.hot();
    other.experts += 1;
    experts.warm(&other); // of another model: passed over
    assert_eq!(experts.stats().warm_loads, 2);
}
