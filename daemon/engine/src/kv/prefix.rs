//! Which prefixes are in memory: a radix tree over tokens, whose edges are whole blocks of them. A block is compared token by
//! token, so what is found is what was asked for; only computed blocks are ever put in.
//!
//! Whoever holds a block of the tree as a sequence holds all blocks before it too ([`Prefix::publish`] sees to that). So what only
//! the tree has hangs below what others hold, and can go leaf by leaf, the least recently used first.

use std::collections::{BTreeSet, HashMap};

use super::{BLOCK, BlockId, Blocks};

/// The tokens of a block.
type Edge = [u32; BLOCK];

/// Names a block's place in the tree; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u64);

const ROOT: NodeId = NodeId(0);

#[derive(Debug)]
struct Node {
    parent: NodeId,
    edge: Edge,
    block: BlockId,
    children: usize,
    /// When a sequence last began with it or added it.
    used: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Prefix {
    nodes: HashMap<NodeId, Node>,
    edges: HashMap<(NodeId, Edge), NodeId>,
    leaves: BTreeSet<(u64, NodeId)>,
    clock: u64,
    made: u64,
}

/// The whole blocks of `tokens`.
pub(crate) fn edges(tokens: &[u32]) -> impl Iterator<Item = &Edge> {
    tokens.as_chunks().0.iter()
}

impl Prefix {
    /// The longest known prefix of `tokens`, block by block.
    pub(crate) fn path(&self, tokens: &[u32]) -> impl Iterator<Item = (NodeId, BlockId)> {
        edges(tokens).scan(ROOT, |at, edge| {
            *at = *self.edges.get(&(*at, *edge))?;
            Some((*at, self.nodes[at].block))
        })
    }

    /// The same path, whose blocks a sequence holds from now on; the first `held` it holds already.
    pub(crate) fn share(&mut self, blocks: &mut Blocks, tokens: &[u32], held: usize) -> Vec<(NodeId, BlockId)> {
        let path: Vec<_> = self.path(tokens).collect();
        self.clock += 1;
        for (node, _) in &path {
            self.touch(*node);
        }
        path.iter().skip(held).for_each(|(_, block)| blocks.share(*block));
        path
    }

    /// Puts a sequence's blocks in, as far as `tokens` are computed. Where the tree has such a block already, the sequence
    /// takes that one and lets go of its own; gives those that nobody has any more.
    pub(crate) fn publish(&mut self, blocks: &mut Blocks, tokens: &[u32], table: &mut [BlockId]) -> Vec<BlockId> {
        let (mut at, mut freed) = (ROOT, Vec::new());
        self.clock += 1;
        for (edge, block) in edges(tokens).zip(table) {
            at = match self.edges.get(&(at, *edge)) {
                Some(&node) => {
                    let known = self.nodes[&node].block;
                    if known != *block {
                        blocks.share(known);
                        freed.extend(blocks.release(*block).then_some(*block));
                        *block = known;
                    }
                    node
                }
                None => {
                    blocks.keep(*block);
                    self.add(at, *edge, *block)
                }
            };
            self.touch(at);
        }
        freed
    }

    fn add(&mut self, parent: NodeId, edge: Edge, block: BlockId) -> NodeId {
        self.made += 1;
        let id = NodeId(self.made);
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children += 1;
            self.leaves.remove(&(node.used, parent));
        }
        self.edges.insert((parent, edge), id);
        self.nodes.insert(id, Node { parent, edge, block, children: 0, used: self.clock });
        self.leaves.insert((self.clock, id));
        id
    }

    fn touch(&mut self, id: NodeId) {
        let node = self.nodes.get_mut(&id).expect("on a path of the tree");
        if self.leaves.remove(&(node.used, id)) {
            self.leaves.insert((self.clock, id));
        }
        node.used = self.clock;
    }

    /// Drops the least recently used leaf that no sequence holds, and gives its block, which is free now.
    pub(crate) fn evict(&mut self, blocks: &mut Blocks) -> Option<BlockId> {
        // A sequence holds one path, so there are no more leaves to pass over than sequences.
        let (_, leaf) = *self.leaves.iter().find(|(_, node)| !blocks.is_busy(self.nodes[node].block))?;
        let block = self.remove(leaf);
        assert!(blocks.forget(block), "nobody else had it");
        Some(block)
    }

    fn remove(&mut self, leaf: NodeId) -> BlockId {
        let node = self.nodes.remove(&leaf).expect("a leaf of the tree");
        self.leaves.remove(&(node.used, leaf));
        self.edges.remove(&(node.parent, node.edge));
        if let Some(parent) = self.nodes.get_mut(&node.parent) {
            parent.children -= 1;
            if parent.children == 0 {
                self.leaves.insert((parent.used, node.parent));
            }
        }
        node.block
    }

    /// Forgets everything and gives the blocks that nobody has any more.
    pub(crate) fn clear(&mut self, blocks: &mut Blocks) -> Vec<BlockId> {
        self.edges.clear();
        self.leaves.clear();
        self.nodes.drain().map(|(_, node)| node.block).filter(|block| blocks.forget(*block)).collect()
    }

    /// The block, if it is still in memory.
    pub(crate) fn block(&self, node: NodeId) -> Option<BlockId> {
        self.nodes.get(&node).map(|node| node.block)
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// What happens to a cache; numbers choose among what is there.
    #[derive(Clone, Debug)]
    enum Op {
        /// A sequence begins with these tokens, each standing for a block's.
        Start(Vec<u32>),
        /// A running one computes some more blocks and says so.
        Publish(usize, usize),
        End(usize),
        Evict,
        Clear,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            4 => prop::collection::vec(0u32..3, 0..6).prop_map(Op::Start),
            4 => (0usize..8, 1usize..4).prop_map(|(which, more)| Op::Publish(which, more)),
            3 => (0usize..8).prop_map(Op::End),
            3 => Just(Op::Evict),
            1 => Just(Op::Clear),
        ];
        prop::collection::vec(op, 1..80)
    }

    struct Running {
        tokens: Vec<u32>,
        table: Vec<BlockId>,
        computed: usize,
    }

    fn spread(blocks: &[u32]) -> Vec<u32> {
        blocks.iter().flat_map(|&block| (0..BLOCK as u32).map(move |i| block * 1000 + i)).collect()
    }

    proptest! {
        /// Beside a naive one: a list of known prefixes with the time of their last use.
        #[test]
        fn it_does_what_a_list_of_prefixes_does(ops in ops()) {
            let (mut blocks, mut prefix) = (Blocks::default(), Prefix::default());
            let mut running: Vec<Running> = Vec::new();
            let mut known: HashMap<Vec<u32>, (u64, BlockId)> = HashMap::new();
            let mut now = 0;
            for op in ops {
                now += 1;
                match op {
                    Op::Start(names) => {
                        let tokens = spread(&names);
                        let longest = (0..=names.len()).rev().find(|n| (1..=*n).all(|n| known.contains_key(&tokens[..n * BLOCK]))).unwrap();
                        let path = prefix.share(&mut blocks, &tokens, 0);
                        prop_assert_eq!(path.len(), longest);
                        for n in 1..=longest {
                            let entry = known.get_mut(&tokens[..n * BLOCK]).unwrap();
                            prop_assert_eq!(path[n - 1].1, entry.1);
                            entry.0 = now;
                        }
                        let mut table: Vec<_> = path.iter().map(|(_, block)| *block).collect();
                        table.extend(blocks.take(names.len() - longest));
                        running.push(Running { tokens, table, computed: longest });
                    }
                    Op::Publish(which, more) if !running.is_empty() => {
                        let at = which % running.len();
                        let one = &mut running[at];
                        one.computed = (one.computed + more).min(one.table.len());
                        let computed = &one.tokens[..one.computed * BLOCK];
                        let own: HashSet<_> = one.table.iter().copied().collect();
                        let freed = prefix.publish(&mut blocks, computed, &mut one.table);
                        prop_assert!(freed.iter().all(|block| own.contains(block) && !one.table.contains(block)));
                        for n in 1..=one.computed {
                            let entry = known.entry(one.tokens[..n * BLOCK].to_vec()).or_insert((now, one.table[n - 1]));
                            prop_assert_eq!(entry.1, one.table[n - 1], "one block for one prefix");
                            entry.0 = now;
                        }
                    }
                    Op::End(which) if !running.is_empty() => {
                        let one = running.swap_remove(which % running.len());
                        for block in one.table {
                            let kept = known.values().any(|(_, known)| *known == block) || running.iter().any(|one| one.table.contains(&block));
                            prop_assert_eq!(blocks.release(block), !kept);
                        }
                    }
                    Op::Evict => {
                        let held = |block: &BlockId| running.iter().any(|one| one.table.contains(block));
                        let leaf = |tokens: &Vec<u32>| known.keys().all(|other| other == tokens || !other.starts_with(tokens));
                        let oldest = known.iter().filter(|(tokens, (_, block))| leaf(tokens) && !held(block)).map(|(_, (used, _))| *used).min();
                        let evicted = prefix.evict(&mut blocks);
                        prop_assert_eq!(evicted.is_some(), oldest.is_some());
                        // Everything idle can go: this is what the accounts build on.
                        prop_assert_eq!(oldest.is_some(), known.values().any(|(_, block)| !held(block)));
                        if let (Some(block), Some(oldest)) = (evicted, oldest) {
                            let (tokens, entry) = known.iter().find(|(_, (_, known))| *known == block).map(|(t, e)| (t.clone(), *e)).unwrap();
                            prop_assert!(leaf(&tokens) && !held(&block) && entry.0 == oldest, "the least recently used leaf");
                            known.remove(&tokens);
                        }
                    }
                    Op::Clear => {
                        let freed: HashSet<_> = prefix.clear(&mut blocks).into_iter().collect();
                        let held = |block: &BlockId| running.iter().any(|one| one.table.contains(block));
                        let idle: HashSet<_> = known.values().map(|(_, block)| *block).filter(|block| !held(block)).collect();
                        prop_assert_eq!(freed, idle);
                        known.clear();
                    }
                    Op::Publish(..) | Op::End(_) => {}
                }
                let held: HashSet<_> = running.iter().flat_map(|one| one.table.iter().copied()).collect();
                prop_assert_eq!((blocks.busy(), prefix.len()), (held.len(), known.len()));
                prop_assert_eq!(blocks.idle(), known.values().filter(|(_, block)| !held.contains(block)).count());
                prop_assert!(known.iter().all(|(tokens, (_, block))| prefix.path(tokens).last().is_some_and(|(_, found)| found == *block)));
            }
            // Nothing leaks: with everyone gone, everything can go.
            for block in running.drain(..).flat_map(|one| one.table) {
                let _ = blocks.release(block);
            }
            while prefix.evict(&mut blocks).is_some() {}
            prop_assert_eq!((blocks.busy(), blocks.idle(), prefix.len()), (0, 0, 0));
        }
    }
}
