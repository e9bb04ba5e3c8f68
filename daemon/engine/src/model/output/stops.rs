//! Stop strings in content as it comes, holding back what may be the start of one. `output.rs` asks; reasoning and calls are none of
//! its business.

#[derive(Clone, Debug)]
pub(super) struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// The text that may be said now, and the stop string that ends it.
    pub(super) fn push(&mut self, piece: &str) -> (String, Option<String>) {
        if self.stops.is_empty() {
            return (piece.to_owned(), None);
        }
        self.held.push_str(piece);
        let found =
            self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop))).min_by_key(|(at, stop)| (*at, stop.len()));
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let may_start = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(may_start).unwrap_or(self.held.len());
        let held = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, held), None)
    }

    pub(super) fn release(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_may_span_pieces_and_nothing_else_is_held() {
        let check = |stops: &[&str], pieces: &[&str], expected: &[&str], ended: Option<&str>| {
            let mut matcher = Stops::new(stops.iter().map(ToString::to_string).collect());
            let mut said = Vec::new();
            for piece in pieces {
                let (text, stop) = matcher.push(piece);
                said.push(text);
                if let Some(stop) = stop {
                    assert_eq!(Some(stop.as_str()), ended);
                    assert_eq!(said, expected);
                    return;
                }
            }
            said.push(matcher.release());
            assert_eq!(ended, None);
            assert_eq!(said, expected, "{stops:?} {pieces:?}");
        };
        check(&[], &["a", "b"], &["a", "b", ""], None);
        check(&["END"], &["the E", "N", "D of"], &["the ", "", ""], Some("END"));
        check(&["END"], &["the E", "N", "x"], &["the ", "", "ENx", ""], None);
        check(&["END"], &["E"], &["", "E"], None);
        check(&["\n\n", "é!"], &["caf", "é", "\n", "\n"], &["caf", "", "é", ""], Some("\n\n"));
        check(&["aab"], &["aa", "ab"], &["", "a"], Some("aab"));
        // The earliest match wins, then the shorter stop.
        check(&["bc", "b"], &["abcd"], &["a"], Some("b"));
    }
}
