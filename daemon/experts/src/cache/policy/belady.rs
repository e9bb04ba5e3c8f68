//! Belady's oracle: what is used again last goes first. It must know the future, so it runs on a recorded trace only
//! (`replay.rs`), and shows what no policy can beat. A layer's experts of one token are pinned together, as in the engine.

use crate::key::ExpertId;

/// Hits of one layer whose tokens use these experts, with this many slots. Of a token that uses more than fit, as a step of several
/// sequences may, experts pass through a slot one after the other, and any may stay.
pub(crate) fn belady<'a>(tokens: impl DoubleEndedIterator<Item = &'a [ExpertId]> + Clone, experts: usize, slots: usize) -> u64 {
    // Backwards once, for each access the next one of the same expert.
    let (mut upcoming, mut next) = (vec![usize::MAX; experts], Vec::new());
    for (age, token) in tokens.clone().rev().enumerate() {
        next.extend(token.iter().rev().map(|expert| upcoming[expert.index()]));
        // Counted from the end, so that it need not be known how many tokens there are; larger is sooner.
        token.iter().for_each(|expert| upcoming[expert.index()] = age);
    }
    // Per expert in memory how soon it is used again: None is not in memory, Some(0) never.
    let mut held: Vec<Option<usize>> = vec![None; experts];
    let (mut resident, mut hits) = (0, 0);
    let mut next = next.into_iter().rev();
    for token in tokens {
        let sooner = |again: usize| if again == usize::MAX { 0 } else { again + 1 };
        let uses: Vec<(ExpertId, usize)> = token.iter().copied().zip(next.by_ref().map(sooner)).collect();
        hits += token.iter().filter(|expert| held[expert.index()].is_some()).count() as u64;
        if token.len() > slots {
            uses.iter().for_each(|(expert, sooner)| held[expert.index()] = Some(*sooner));
            let mut kept: Vec<usize> = (0..experts).filter(|&expert| held[expert].is_some()).collect();
            kept.sort_by_key(|&expert| std::cmp::Reverse(held[expert]));
            kept.drain(..slots);
            kept.into_iter().for_each(|expert| held[expert] = None);
            resident = slots;
            continue;
        }
        for (expert, sooner) in uses {
            if held[expert.index()].is_none() {
                if resident == slots {
                    let idle = (0..experts).filter(|&other| held[other].is_some() && !token.contains(&ExpertId(other as u16)));
                    let Some(victim) = idle.min_by_key(|&other| held[other]) else { continue };
                    held[victim] = None;
                    resident -= 1;
                }
                resident += 1;
            }
            held[expert.index()] = Some(sooner);
        }
    }
    hits
}
