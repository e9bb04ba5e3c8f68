//! Reading a text without a request: logits after each of its positions, for accuracy measurements and their tests.

use std::slice::Chunks;

use super::Engine;
use crate::{
    Error,
    backend::Row,
    forward::Pass,
    kv::{BLOCK, Table},
    schedule::CHUNK_MIN,
};

impl Engine {
    /// Reads `tokens` from an empty context and hands `each` the logits after every position ≥ `from`. For accuracy
    /// measurements; running requests wait.
    pub fn score(&mut self, tokens: &[u32], from: usize, each: &mut dyn FnMut(usize, &[f32])) -> Result<(), Error> {
        self.score_parts(tokens.chunks(CHUNK_MIN), from, each)
    }

    /// As [`Engine::score`], a position at a time: what a prompt costs where it is not read at once.
    pub fn score_singly(&mut self, tokens: &[u32], from: usize, each: &mut dyn FnMut(usize, &[f32])) -> Result<(), Error> {
        self.score_parts(tokens.chunks(1), from, each)
    }

    /// Each part is a pass of its own.
    fn score_parts(&mut self, parts: Chunks<'_, u32>, from: usize, each: &mut dyn FnMut(usize, &[f32])) -> Result<(), Error> {
        parts.clone().try_for_each(|part| self.check_ids(part))?;
        let positions = parts.clone().map(<[u32]>::len).sum::<usize>();
        let blocks: Table = self.reuse.blocks.take(positions.div_ceil(BLOCK)).collect();
        let (mut result, mut first) = (Ok(()), 0);
        let mut pass = Pass::default();
        for part in parts {
            pass.start(&mut self.backend, false, |batch| {
                batch.rows.extend(part.iter().zip(first..).map(|(token, position)| Row { token: *token, position, sequence: 0 }));
                batch.tables.push(blocks.clone());
            });
            self.forward.run(&mut self.backend, &mut self.experts, &mut pass);
            self.backend.settle(&mut pass.act);
            self.experts.release();
            if let Some(lost) = pass.lost.pop() {
                result = Err(Error::Experts(lost.error));
                break;
            }
            for row in (0..part.len()).filter(|row| first + row >= from) {
                each(first + row, self.backend.logits(&mut pass.act, row..row + 1));
            }
            first += part.len();
        }
        self.release(&blocks);
        result
    }
}
