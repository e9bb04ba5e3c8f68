//! What a step's logits make a request say, and how those who listen take it.

use std::collections::HashSet;

use crate::{
    Delivery, Event, RequestId, Text,
    sequence::{Counters, Sequence},
};

/// Draws a request's next token and delivers what it adds.
pub(super) fn say(
    sequence: &mut Sequence,
    text: &Text,
    logits: &[f32],
    now: Counters,
    scratch: &mut Vec<f32>,
    gone: &mut HashSet<RequestId>,
    deliver: &mut dyn FnMut(RequestId, Event) -> Delivery,
) {
    let id = sequence.id;
    let said = match sequence.advance(text, logits, scratch) {
        Ok(said) => said,
        Err(error) => {
            deliver(id, Event::Failed(error));
            gone.insert(id);
            return;
        }
    };
    let mut delivery = Delivery::Taken;
    if said.finish.is_none() || !said.parts.is_empty() || !said.logprobs.is_empty() {
        delivery = deliver(id, Event::Token { parts: said.parts, logprobs: said.logprobs, channel: said.channel });
    }
    if let (Some(finish), true) = (said.finish, delivery != Delivery::Gone) {
        deliver(id, Event::Done(sequence.done(finish, now)));
        delivery = Delivery::Gone;
    }
    note(sequence, delivery, gone);
}

/// A listener that is slow, or gone.
pub(super) fn note(sequence: &mut Sequence, delivery: Delivery, gone: &mut HashSet<RequestId>) {
    match delivery {
        Delivery::Taken => {}
        Delivery::Full => sequence.paused = true,
        Delivery::Gone => drop(gone.insert(sequence.id)),
    }
}
