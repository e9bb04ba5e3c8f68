//! Recorded routing, read from a file for the replay lab and for forced routing: a line of JSON per token, as `flashctl trace
//! record` writes them, or as other projects do without the first line. Not the replay (`flash_experts::replay`) and no writer.
//!
//! ```text
//! {"flash_trace":1,"model":"qwen3-30b-a3b","layers":48,"experts":128,"top_k":8}
//! {"tok":791,"layers":[[17,3,99,…],[5,120,…],…]}
//! ```

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use flash_experts::{ExpertId, replay::Trace};
use serde::Deserialize;

use crate::Error;

/// A hundred thousand tokens of a large model. Traces are held in memory, beside the model.
const BYTES_MAX: u64 = 256 << 20;

#[derive(Deserialize)]
struct Header {
    flash_trace: u32,
    layers: usize,
    experts: usize,
}

#[derive(Deserialize)]
struct Token {
    layers: Vec<Vec<u16>>,
}

/// Every token's experts. Without a first line that says otherwise, there are as many experts as the greatest id asks for.
pub fn read_trace(path: &Path) -> Result<Trace, Error> {
    let bad = |reason: String| Error::File { path: path.into(), reason };
    let read = |source| Error::Read { path: path.into(), source };
    let file = File::open(path).map_err(read)?;
    let len = file.metadata().map_err(read)?.len();
    if len > BYTES_MAX {
        return Err(bad(format!("{len} bytes are more than a trace may have, {BYTES_MAX}")));
    }
    let mut lines = BufReader::new(file.take(BYTES_MAX)).lines().enumerate().peekable();
    let mut header = None;
    if let Some((_, Ok(line))) = lines.peek()
        && line.contains("\"flash_trace\"")
    {
        let found: Header = serde_json::from_str(line).map_err(|error| bad(format!("line 1: {error}")))?;
        if found.flash_trace != 1 || found.layers == 0 {
            return Err(bad(format!("version {} of a trace with {} layers; this flashd reads version 1", found.flash_trace, found.layers)));
        }
        header = Some(found);
        lines.next();
    }
    let mut tokens: Vec<(usize, Token)> = Vec::new();
    for (number, line) in lines {
        let line = line.map_err(read)?;
        if !line.trim().is_empty() {
            let token: Token = serde_json::from_str(&line).map_err(|error| bad(format!("line {}: {error}", number + 1)))?;
            tokens.push((number + 1, token));
        }
    }
    let Some((_, first)) = tokens.first() else { return Err(bad("no token in it".into())) };
    let greatest = || tokens.iter().flat_map(|(_, token)| token.layers.iter().flatten()).max().map_or(0, |id| usize::from(*id) + 1);
    let (layers, experts) = header.map_or_else(|| (first.layers.len(), greatest()), |header| (header.layers, header.experts));
    if !(1..=usize::from(u16::MAX)).contains(&layers) || !(1..=usize::from(u16::MAX)).contains(&experts) {
        return Err(bad(format!("{layers} layers of {experts} experts")));
    }
    let mut trace = Trace::new(layers, experts);
    for (number, token) in &tokens {
        if token.layers.len() != layers {
            return Err(bad(format!("line {number}: {} layers and not {layers}", token.layers.len())));
        }
        for ids in &token.layers {
            let ids: Vec<ExpertId> = ids.iter().copied().map(ExpertId).collect();
            trace.push(&ids).map_err(|reason| bad(format!("line {number}: {reason}")))?;
        }
    }
    Ok(trace)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Trace, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read_trace(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn both_formats_are_read() {
        let tokens = "{\"tok\": 5, \"layers\": [[1, 0], [3, 2]]}\n\n{\"layers\":[[2],[0,1]]}\n";
        for (head, experts) in [("", 4), ("{\"flash_trace\":1,\"model\":\"m\",\"layers\":2,\"experts\":9,\"top_k\":2}\n", 9)] {
            let trace = parse(&format!("{head}{tokens}")).unwrap();
            assert_eq!((trace.layers, trace.experts, trace.tokens(), trace.top_k()), (2, experts, 2, 2));
            assert_eq!((trace.get(0, 1), trace.get(1, 0)), (&[ExpertId(3), ExpertId(2)][..], &[ExpertId(2)][..]));
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let check = |text: &str, expected: &str| {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{error} / {expected}");
        };
        check("", "no token");
        check("{\"layers\":[]}", "0 layers");
        check("{\"layers\":[[]]}", "of 0 experts");
        check("{\"layers\":[[65535]]}", "65536 experts");
        check("{\"layers\":[[1]]}\n{\"layers\":[[1],[1]]}", "line 2: 2 layers and not 1");
        check("{\"layers\":[[1,1]]}", "line 1: token 0 layer 0: expert 1 twice");
        check("{\"flash_trace\":1,\"layers\":1,\"experts\":2}\n{\"layers\":[[2]]}", "line 2: token 0 layer 0: expert 2 of 2");
        check("{\"flash_trace\":2,\"layers\":1,\"experts\":2}", "version 2");
        check("{\"flash_trace\":1}", "line 1: missing field");
        check("{\"layers\":[[-1]]}", "line 1: invalid value");
        check(&format!("{{\"layers\":[{:?}]}}", (0..600).collect::<Vec<_>>()), "600 experts for one token");
        assert!(matches!(read_trace(Path::new("/nonexistent/trace")), Err(Error::Read { .. })));
    }
}
