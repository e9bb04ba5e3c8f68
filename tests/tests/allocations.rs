//! A decode step in its steady state takes no memory: every list that it needs is there from the step before.
//!
//! Counts the allocations of all threads, so it is alone in its process.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use flash_engine::{CacheBudget, Delivery, Engine, Event, Options, Request, Step};
use flash_tests::daemon::{bundled_model, wait_until};

struct Counting;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.fetch_add(1, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        TAKEN.fetch_add(1, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Before: lists grow to their size, experts are loaded, a KV block of 32 tokens is begun.
const WARM: usize = 40;

#[test]
fn a_decode_step_allocates_nothing() {
    let options = Options { threads: Some(2), expert_cache: CacheBudget::Share(1.0), ..Options::default() };
    let mut engine = Engine::load(&bundled_model(), &options, &mut |_| ()).expect("loads");
    let tokens: Vec<u32> = (0..64).map(|i| 300 + i * 7).collect();

    // Slots are faulted in by a loader meanwhile, which notes it.
    wait_until("every slot has its pages", || {
        let experts = engine.report().experts;
        experts.slab_bytes == experts.slots_per_layer as u64 * experts.layers.len() as u64 * experts.slot_bytes
    })
    .expect("they are faulted in");

    // The pass and its logits, without text. Twice, so that every expert of these tokens is there.
    for counted in [false, true] {
        let mut before = 0;
        engine
            .score_singly(&tokens, 0, &mut |position, _| {
                let taken = TAKEN.load(Relaxed);
                // A KV block begins at a multiple of 32.
                if counted && position >= WARM && position % 32 != 0 {
                    assert_eq!(taken - before, 0, "allocations for position {position}");
                }
                before = TAKEN.load(Relaxed);
            })
            .expect("scores");
    }

    // A whole step adds the token's text, which is the receiver's.
    let request = Request { max_tokens: Some(64), ignore_eos: true, ..Request::greedy(tokens[..8].to_vec()) };
    let (mut counts, mut said) = (Vec::with_capacity(128), 0);
    engine.admit(request).expect("admitted");
    loop {
        let before = TAKEN.load(Relaxed);
        let step = engine.step(&mut |_, event| {
            said += usize::from(matches!(event, Event::Token { .. }));
            Delivery::Taken
        });
        counts.push(TAKEN.load(Relaxed) - before);
        if step == Step::Idle {
            break;
        }
    }
    let mut steady = counts[counts.len() / 2..counts.len() - 2].to_vec();
    steady.sort_unstable();
    println!("allocations a step: {counts:?}");
    assert!(said > 50 && steady[steady.len() / 2] <= TEXT, "{counts:?}");
}

/// What the tokenizer's decoder takes for one token's text.
const TEXT: usize = 4;
