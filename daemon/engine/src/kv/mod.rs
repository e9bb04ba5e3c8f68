//! The KV cache's blocks: whose they are ([`Blocks`]), which prefixes they hold ([`Prefix`]), and those kept on disk. The bytes
//! lie in the backend; nothing here knows what is in them.
//!
//! The one contract: a block holds, for each layer, what that layer needs to go on behind the block's last position, given the
//! blocks before it. Full attention keeps keys and values of the block's positions. A layer with a sliding window keeps the same and
//! reads the last few blocks only; a recurrent layer would keep its state after the block's last position. So a prefix ends
//! where a block ends, and index and disk treat every kind of layer alike: a block is a list of layers' bytes.

mod blocks;
pub(crate) mod disk;
mod prefix;
mod record;

use std::sync::Arc;

pub(crate) use blocks::Blocks;
pub(crate) use disk::Disk;
pub(crate) use flash_kernels::attention::BLOCK;
pub(crate) use prefix::{NodeId, Prefix, edges};

/// Names a block in the backend's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct BlockId(pub(crate) u32);

/// The blocks of one sequence, in order of position.
pub(crate) type Table = Arc<[BlockId]>;
