//! What the cache itself costs when everything is in memory: a token's experts asked for, handed out, given back, and its uses
//! learned, as the engine does it. 8 of 128 experts in 48 layers. Not a test: nothing is asserted.
//! `cargo bench -p flash-experts --bench cache`

use std::{error::Error, hint::black_box, io, time::Instant};

use flash_experts::{Arrival, Config, ExpertId, Experts, LayerId, PolicyKind, Read, Record, Routing, Slab, Slice, Source, Storage};

const LAYERS: usize = 48;
const EXPERTS: usize = 128;
const TOP_K: usize = 8;
const TOKENS: usize = 4000;

/// Bytes that cost nothing to read: what is measured begins when all is there.
#[derive(Debug)]
struct Zeros;

impl Storage for Zeros {
    fn name(&self) -> &str {
        "zeros"
    }
    fn len(&self) -> u64 {
        4096
    }
    fn read(&self, _: &mut [Read<'_>]) -> io::Result<()> {
        Ok(())
    }
}

/// Distinct, ascending, another set each time.
fn choose(state: &mut u64, ids: &mut [ExpertId; TOP_K]) {
    for (i, id) in ids.iter_mut().enumerate() {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let range = EXPERTS / TOP_K;
        *id = ExpertId((i * range + (*state >> 33) as usize % range) as u16);
    }
}

fn token(experts: &mut Experts, ids: &[[ExpertId; TOP_K]], arrivals: &mut Vec<Arrival>) {
    for (layer, ids) in (0u16..).zip(ids) {
        let mut fetch = experts.fetch(LayerId(layer), &Routing::token(ids));
        while fetch.next(arrivals) {
            black_box(&arrivals);
            fetch.done(ids);
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let slice = Slice { file: 0, offset: 0, len: 4096, at: 0 };
    let record = Record { slices: vec![slice], checksum: None, payload: 4096 };
    for policy in [PolicyKind::Lfru, PolicyKind::Lru, PolicyKind::Lcp] {
        let source = Source { files: vec![Box::new(Zeros)], layers: vec![vec![record.clone(); EXPERTS]; LAYERS] };
        let slab = Slab::anonymous(4096, LAYERS * EXPERTS)?;
        let mut experts = Experts::open(source, slab, Config { top_k: TOP_K, slots_per_layer: EXPERTS, loaders: 2, policy })?;
        let mut arrivals = Vec::new();
        let all: Vec<ExpertId> = (0..EXPERTS as u16).map(ExpertId).collect();
        for layer in 0..LAYERS as u16 {
            let mut fetch = experts.fetch(LayerId(layer), &Routing::token(&all));
            while fetch.next(&mut arrivals) {}
        }
        let mut state = 1;
        let mut choices = vec![[[ExpertId(0); TOP_K]; LAYERS]; 64];
        choices.iter_mut().flatten().for_each(|ids| choose(&mut state, ids));
        let best = (0..5).map(|_| {
            let start = Instant::now();
            (0..TOKENS).for_each(|t| token(&mut experts, &choices[t % choices.len()], &mut arrivals));
            start.elapsed().as_secs_f64() / TOKENS as f64
        });
        let best = best.fold(f64::INFINITY, f64::min);
        println!(
            "{policy}: {:.0} ns per expert, {:.1} us per token of {} lookups",
            best * 1e9 / (LAYERS * TOP_K) as f64,
            best * 1e6,
            LAYERS * TOP_K
        );
    }
    Ok(())
}
