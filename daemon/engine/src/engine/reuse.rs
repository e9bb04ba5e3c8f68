//! Prefixes that requests have in common: found when a request starts and while its prompt is read, published when blocks are
//! computed, evicted when their memory is wanted, written to disk when the prefix comes a second time.
//!
//! Exact, because a row's bits do not depend on the chunk or the request that it was computed in, and because shared blocks are
//! never written again: a sequence goes on behind them. Where bits do depend on the chunk (MLX), whole chunks of prompts are shared
//! that were computed as those of any other request, once their request has ended, and nothing of what was generated; not on disk yet.
//! While routing is forced, nothing is shared.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::{Instant, UNIX_EPOCH},
};

use super::Engine;
use crate::{
    Bytes, CacheBudget, Cleared, Error, Options, PrefixReport,
    backend::Backend,
    kv::{
        BLOCK, BlockId, Blocks, Disk, NodeId, Prefix,
        disk::{self, Key},
        edges,
    },
    model::families::Model,
    sequence::Sequence,
};

/// What idle blocks may take of the available memory by default, and of what `--memory` leaves.
const SHARE: Bytes = 8;
/// Blocks that wait to be written to disk; others will be when their prefix is used again.
const PENDING_MAX: usize = 4096;

/// Blocks, and what is known of them.
#[derive(Debug, Default)]
pub(super) struct Reuse {
    pub(super) blocks: Blocks,
    prefix: Prefix,
    /// [`Backend::kv_grain`]; 0: nothing is shared.
    grain: usize,
    /// Bytes of each layer in a block; empty: none is written to disk.
    layers: Vec<usize>,
    /// Memory that idle blocks may take if nobody else wants it.
    budget: Bytes,
    /// Whether `budget` is our own idea.
    auto: bool,
    /// As [`Engine::settle`] found last.
    pub(super) allowed: Bytes,
    disk: Option<Disk>,
    pending: VecDeque<(NodeId, Key, u64)>,
    /// Of `pending`.
    queued: HashSet<Key>,
    counted: PrefixReport,
}

impl Reuse {
    pub(super) fn new(backend: &Backend, model: &Model, options: &Options, available: Bytes) -> Self {
        let (budget, auto) = match options.prefix_cache {
            CacheBudget::Auto => (available / SHARE, true),
            CacheBudget::Share(share) => ((available as f64 * share) as Bytes, false),
            CacheBudget::Bytes(bytes) => (bytes, false),
        };
        let layers = backend.kv_layers().filter(|_| budget > 0).unwrap_or_default();
        let grain = if budget > 0 { backend.kv_grain() } else { 0 };
        let mut reuse = Self { grain, layers, budget, auto, allowed: budget, ..Self::default() };
        if let Some(config) = options.disk_cache.as_ref().filter(|_| !reuse.layers.is_empty()) {
            match Disk::open(config, &identity(backend, model), reuse.layers.clone()) {
                Ok(disk) => reuse.disk = Some(disk),
                Err(error) => {
                    tracing::warn!(%error, dir = %config.dir.display(), "prefixes are not kept on disk");
                    reuse.counted.disk_error = Some(format!("{}: {error}", config.dir.display()));
                }
            }
        }
        reuse
    }

    /// Blocks that a request has to be given beside those that others hold.
    pub(super) fn needed(&self, sequence: &Sequence) -> usize {
        let path: Vec<_> = self.prefix.path(sequence.reusable()).collect();
        let known = self.whole(path.len());
        let held = path[..known].iter().filter(|(_, block)| self.blocks.is_busy(*block)).count();
        sequence.positions().div_ceil(BLOCK) - held + self.copied(known)
    }

    /// Of so many blocks that are there, those that a request can begin with.
    fn whole(&self, blocks: usize) -> usize {
        blocks - blocks % (self.grain / BLOCK).max(1)
    }

    /// Of so many blocks that a request begins with, those that it has copied.
    pub(super) fn copied(&self, blocks: usize) -> usize {
        if self.grain > BLOCK { blocks } else { 0 }
    }

    /// Gives a sequence its blocks, those of the longest known prefix first.
    pub(super) fn start(&mut self, sequence: &mut Sequence) {
        let known = self.whole(self.prefix.path(sequence.reusable()).count()) * BLOCK;
        let path = self.prefix.share(&mut self.blocks, &sequence.tokens[..known], 0);
        sequence.on_grid = known;
        let fresh = sequence.positions().div_ceil(BLOCK) - path.len();
        let fresh: Vec<_> = self.blocks.take(fresh).collect();
        sequence.blocks = path.iter().map(|(_, block)| *block).chain(fresh).collect();
        self.begun(sequence, &path);
    }

    /// The first blocks of a sequence's prompt are there.
    fn begun(&mut self, sequence: &mut Sequence, path: &[(NodeId, BlockId)]) {
        let tokens = path.len() * BLOCK;
        self.counted.memory_tokens += (tokens - sequence.cached) as u64;
        (sequence.reused, sequence.cached) = (sequence.reused + tokens - sequence.cached, tokens);
        self.write_later(&sequence.tokens, path);
    }

    /// The path is used again: what of it is not on disk goes there when the writer has room.
    fn write_later(&mut self, tokens: &[u32], path: &[(NodeId, BlockId)]) {
        let Some(disk) = &mut self.disk else { return };
        disk.hear();
        let used = disk::used();
        for ((depth, key), (node, _)) in keys(disk.root, tokens).enumerate().zip(path) {
            let used = disk::behind(used, depth);
            if disk.contains(&key) {
                disk.touch(key, used);
            } else if self.pending.len() < PENDING_MAX && !disk.writes(&key) && self.queued.insert(key) {
                self.pending.push_back((*node, key, used));
            }
        }
    }
}

/// The key of each whole block.
fn keys(root: Key, tokens: &[u32]) -> impl Iterator<Item = Key> {
    edges(tokens).scan(root, |at, edge| {
        *at = disk::key(at, edge);
        Some(*at)
    })
}

/// What else than tokens decides on a block's bytes: the weights, as far as can be told without reading them, and the code.
fn identity(backend: &Backend, model: &Model) -> Vec<u8> {
    let mut text = format!("{} {} {}\n", flash_kernels::RESULTS, backend.kernels(), model.info.quantization);
    let files = model.weights.files().iter().chain(model.packed.iter().map(|packed| &packed.path));
    for path in files.chain([&model.info.path.join("config.json")]) {
        let meta = std::fs::metadata(path).ok();
        let changed = meta.as_ref().and_then(|meta| meta.modified().ok()?.duration_since(UNIX_EPOCH).ok());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        text += &format!("{name} {} {}\n", meta.map_or(0, |meta| meta.len()), changed.unwrap_or_default().as_nanos());
    }
    text.into_bytes()
}

impl Engine {
    /// Whether what is computed now may be shared.
    fn shares(&self) -> bool {
        self.reuse.grain > 0 && self.forward.forced.is_none()
    }

    /// And whether blocks can be taken up by others while their sequence runs.
    fn shares_at_once(&self) -> bool {
        self.reuse.grain == BLOCK && self.shares()
    }

    /// Whether a neighbour is just computing what comes next in this sequence's prompt: to wait for it is to have it for nothing. Not
    /// for a small part of what that computes, which would take longer than to compute it.
    pub(super) fn waits(&self, index: usize) -> bool {
        let sequence = &self.running[index];
        if !self.shares_at_once() || sequence.pass.is_some() || sequence.suspect {
            return false;
        }
        self.running.iter().enumerate().filter(|(other, _)| *other != index).any(|(_, neighbour)| {
            let Some(pass) = neighbour.pass.as_ref().filter(|_| !neighbour.paused && !neighbour.suspect) else { return false };
            let (rows, ours) = (pass.batch.rows.len(), sequence.reusable());
            let read = &neighbour.tokens[..neighbour.cached + rows];
            let common = read.iter().zip(ours).take_while(|(read, ours)| read == ours).count() / BLOCK * BLOCK;
            let gained = common.saturating_sub(sequence.cached);
            gained > 0 && 2 * gained >= rows
        })
    }

    /// Goes on in a prompt with blocks that are there by now, in memory or on disk. False: the time is up, and there are more.
    pub(super) fn reuse(&mut self, index: usize, end: Instant) -> bool {
        let Sequence { record, suspect, cached, .. } = self.running[index];
        if !self.shares_at_once() || record || suspect || !cached.is_multiple_of(BLOCK) {
            return true;
        }
        self.publish(index);
        let sequence = &mut self.running[index];
        let held = sequence.cached / BLOCK;
        let path = self.reuse.prefix.share(&mut self.reuse.blocks, sequence.reusable(), held);
        if path.len() > held {
            for (own, (_, block)) in Arc::make_mut(&mut sequence.blocks).iter_mut().zip(&path).skip(held) {
                // Never written: it has no bytes yet.
                assert!(self.reuse.blocks.release(*own), "a sequence's next blocks are its own");
                *own = *block;
            }
            self.reuse.begun(sequence, &path);
        }
        let done = self.read_from_disk(index, end);
        self.publish(index);
        done
    }

    fn read_from_disk(&mut self, index: usize, end: Instant) -> bool {
        let Self { reuse, running, backend, .. } = self;
        let (Some(disk), sequence) = (&mut reuse.disk, &mut running[index]) else { return true };
        disk.hear();
        let (used, first) = (disk::used(), sequence.cached / BLOCK);
        let keys: Vec<Key> = keys(disk.root, sequence.reusable()).skip(first).take_while(|key| disk.contains(key)).collect();
        for (number, batch) in keys.chunks(disk.batch()).enumerate() {
            if number > 0 && Instant::now() >= end {
                return false;
            }
            let at = sequence.cached / BLOCK;
            let read = disk.read(batch, &mut |index, mut payload| {
                for (layer, bytes) in reuse.layers.iter().enumerate() {
                    let part;
                    (part, payload) = payload.split_at(*bytes);
                    backend.kv_state_mut(sequence.blocks[at + index], layer).copy_from_slice(part);
                }
            });
            for (depth, key) in (at..).zip(&batch[..read]) {
                disk.touch(*key, disk::behind(used, depth));
            }
            reuse.counted.disk_tokens += (read * BLOCK) as u64;
            (sequence.reused, sequence.cached) = (sequence.reused + read * BLOCK, sequence.cached + read * BLOCK);
            if read < batch.len() {
                return true;
            }
        }
        true
    }

    /// Lets others find what a sequence has computed.
    pub(super) fn publish(&mut self, index: usize) {
        let shares = self.shares_at_once();
        let sequence = &mut self.running[index];
        if shares && !sequence.suspect {
            let freed = share_computed(&mut self.reuse, sequence, sequence.cached);
            freed.into_iter().for_each(|block| self.backend.free_kv(block));
        }
    }

    /// A sequence has ended: its blocks stay for others as far as they are computed, and as long as there is room.
    pub(super) fn end(&mut self, mut sequence: Sequence) {
        if sequence.suspect {
            self.forget_prefixes();
        } else if self.shares() {
            let (own, grain) = (sequence.blocks.last().copied(), self.reuse.grain);
            let computed = if grain == BLOCK { sequence.cached } else { sequence.on_grid };
            let freed = share_computed(&mut self.reuse, &mut sequence, computed);
            let lasts: Vec<_> =
                sequence.blocks[..computed / BLOCK].chunks_exact(grain / BLOCK).map(|chunk| chunk[chunk.len() - 1]).collect();
            let kept = own.is_none_or(|own| self.backend.end_kv(own, &lasts));
            freed.into_iter().for_each(|block| self.backend.free_kv(block));
            if !kept {
                self.forget_prefixes();
            }
        }
        let counted = &mut self.reuse.counted;
        *(if sequence.reused > 0 { &mut counted.hits } else { &mut counted.misses }) += 1;
        self.release(&sequence.blocks);
    }

    pub(super) fn release(&mut self, table: &[BlockId]) {
        for block in table {
            if self.reuse.blocks.release(*block) {
                self.backend.free_kv(*block);
            }
        }
    }

    /// Drops idle blocks until they take `allowed` bytes at most.
    pub(super) fn evict(&mut self, allowed: Bytes) {
        let block_bytes = self.backend.kv_block_bytes();
        while self.reuse.blocks.idle() as Bytes * block_bytes > allowed {
            let block = self.reuse.prefix.evict(&mut self.reuse.blocks).expect("idle blocks hang below those in use");
            self.backend.free_kv(block);
            self.reuse.counted.evicted += 1;
        }
    }

    /// Of memory that running requests leave, what idle blocks may have: `left` beside the least slab, `None` without a cap.
    pub(super) fn idle_allowed(&self, left: Option<Bytes>) -> Bytes {
        // Pressure takes from them before the slab has to give more.
        let squeezed = self.ceiling.map_or(0, |ceiling| self.slab.bytes(self.wanted).saturating_sub(ceiling));
        let left = left.map_or(Bytes::MAX, |left| if self.reuse.auto { left / SHARE } else { left });
        self.reuse.budget.saturating_sub(squeezed).min(left)
    }

    /// What was computed until now is not what would be computed from now on.
    pub(super) fn distrust(&mut self) {
        self.running.iter_mut().for_each(|sequence| sequence.suspect = true);
        self.forget_prefixes();
    }

    /// Nothing that was computed until now is found again in memory.
    fn forget_prefixes(&mut self) {
        self.reuse.pending.clear();
        self.reuse.queued.clear();
        let freed = self.reuse.prefix.clear(&mut self.reuse.blocks);
        freed.into_iter().for_each(|block| self.backend.free_kv(block));
    }

    /// Forgets every prefix, in memory and on disk, there those of all models. Running requests keep what they have.
    pub fn clear_prefixes(&mut self) -> Result<Cleared, Error> {
        let memory_bytes = self.reuse.blocks.idle() as Bytes * self.backend.kv_block_bytes();
        self.forget_prefixes();
        self.settle();
        let cleared = self.reuse.disk.as_mut().map_or(Ok(Cleared::default()), Disk::clear)?;
        Ok(Cleared { memory_bytes, ..cleared })
    }

    /// Hands blocks to the disk's writer as far as it has room; with nothing else to do, waits a moment for it. True: look again
    /// soon.
    pub(super) fn write_back(&mut self, idle: bool) -> bool {
        let Reuse { disk: Some(disk), pending, queued, prefix, layers, .. } = &mut self.reuse else { return false };
        while !pending.is_empty() && disk.takes() {
            if !disk.affords(pending.len()) {
                pending.clear();
                queued.clear();
                break;
            }
            let Some((node, key, used)) = pending.pop_front() else { break };
            queued.remove(&key);
            let Some(block) = prefix.block(node) else { continue };
            let mut payload = Vec::with_capacity(layers.iter().sum());
            (0..layers.len()).for_each(|layer| payload.extend_from_slice(self.backend.kv_state(block, layer)));
            disk.write(key, used, payload);
        }
        idle && disk.wait()
    }

    pub(super) fn prefix_report(&self) -> PrefixReport {
        let (reuse, block_bytes) = (&self.reuse, self.backend.kv_block_bytes());
        PrefixReport {
            on: reuse.grain > 0,
            blocks: reuse.prefix.len(),
            bytes: reuse.prefix.len() as Bytes * block_bytes,
            block_tokens: BLOCK,
            idle_bytes: reuse.blocks.idle() as Bytes * block_bytes,
            budget_bytes: reuse.allowed,
            disk: reuse.disk.as_ref().map(Disk::report),
            ..reuse.counted.clone()
        }
    }

    /// Of the disk's writer.
    pub(super) fn buffer_bytes(&self) -> Bytes {
        self.reuse.disk.as_ref().map_or(0, Disk::buffer_bytes)
    }
}

/// Puts a sequence's blocks into the index, of its first tokens; gives those that nobody has any more.
fn share_computed(reuse: &mut Reuse, sequence: &mut Sequence, computed: usize) -> Vec<BlockId> {
    let computed = &sequence.tokens[..computed];
    let freed = reuse.prefix.publish(&mut reuse.blocks, computed, Arc::make_mut(&mut sequence.blocks));
    let keep = sequence.keep.min(sequence.cached);
    if keep >= BLOCK {
        let path: Vec<_> = reuse.prefix.path(&sequence.tokens[..keep]).collect();
        reuse.write_later(&sequence.tokens[..keep], &path);
    }
    freed
}
