//! `truncation: "auto"`: a conversation that is longer than the context loses its oldest messages, but for what the system says.
//! Which ones is decided here; the daemon counts the tokens.

use flash_proto::v1;

/// Tokens that a prompt should come down to once it does not fit, so that something can be said: a quarter of the context is left, or
/// what the request wants, up to a half.
pub(super) fn target(context: u32, max_tokens: Option<u32>) -> u32 {
    context - max_tokens.unwrap_or(context / 4).min(context / 2)
}

/// Drops the oldest messages that are `share` of the text together. The last one stays, with the call that it answers; a result goes
/// with its call. False: there is nothing to drop.
pub(super) fn shorten(messages: &mut Vec<v1::Message>, share: f64) -> bool {
    let length = |message: &v1::Message| {
        let calls: usize = message.tool_calls.iter().map(|call| call.arguments_json.len()).sum();
        // What a template puts around a message counts too.
        (message.content.len() + message.reasoning.as_ref().map_or(0, String::len) + calls + 32) as f64
    };
    let wanted = messages.iter().map(length).sum::<f64>() * share;
    let last = messages.iter().rposition(|message| message.role != "tool").unwrap_or(0);
    let (mut at, mut dropped, mut enough) = (0, 0.0, false);
    messages.retain(|message| {
        let stays = at >= last || message.role == "system";
        at += 1;
        enough |= dropped > 0.0 && dropped >= wanted && message.role != "tool";
        if stays || enough {
            return true;
        }
        dropped += length(message);
        false
    });
    dropped > 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_messages_go_first() {
        let check = |roles: &[&str], share: f64, wanted: &[usize]| {
            let of = |(at, role): (usize, &&str)| v1::Message { role: (*role).into(), content: format!("{at:0>64}"), ..Default::default() };
            let mut messages: Vec<_> = roles.iter().enumerate().map(of).collect();
            let dropped = shorten(&mut messages, share);
            let left: Vec<usize> = messages.iter().map(|message| message.content.parse().expect("a number")).collect();
            assert_eq!((left.as_slice(), dropped), (wanted, wanted.len() < roles.len()), "{roles:?} {share}");
        };
        let talk = ["system", "user", "assistant", "user", "assistant", "user"];
        check(&talk, 0.0, &[0, 2, 3, 4, 5]);
        check(&talk, 0.3, &[0, 3, 4, 5]);
        check(&talk, 1.0, &[0, 5]);
        check(&["user", "assistant", "tool", "tool", "user"], 0.4, &[4]);
        check(&["user", "assistant", "tool", "tool"], 0.9, &[1, 2, 3]);
        check(&["system", "user"], 0.5, &[0, 1]);
    }

    #[test]
    fn something_can_be_said() {
        let found = [target(1000, None), target(1000, Some(100)), target(1000, Some(5000)), target(0, None)];
        assert_eq!(found, [750, 900, 500, 0]);
    }
}
