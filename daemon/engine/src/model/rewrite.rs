//! A chat template's source, before it is compiled: the tags of transformers that minijinja lacks are replaced, and calls
//! that keep a hostile template within its limits are put where it could loop or grow. Reads tags only, expressions are not
//! parsed; the text a template renders is unchanged. Called by `template.rs`, which defines the functions.

/// Fails when time is up.
pub(super) const TICK: &str = "__tick";
/// Returns its argument, or fails if that is too large.
pub(super) const BOUND: &str = "__bound";

/// Of one tag, string literals aside; longer chains of operators cost minijinja quadratic time and a deep stack. The tags of
/// popular templates stay below 600.
const CODE_MAX: usize = 4 << 10;

/// `{% set x = e %}` becomes `{% set x = __bound((e)) %}`; a loop's or macro's body begins with a check of the time and of
/// the arguments; `generation` blocks, which only mark the assistant's part for training, become `if true`.
pub(super) fn guarded(source: &str) -> Result<String, String> {
    let mut out = String::with_capacity(source.len() * 2);
    let mut rest = source;
    let opens = |text: &str| text.match_indices('{').map(|(at, _)| at).find(|at| text[at + 1..].starts_with(['%', '{', '#']));
    while let Some(start) = opens(rest) {
        let (text, tag) = rest.split_at(start);
        out.push_str(text);
        let end = match &tag[..2] {
            "{%" => "%}",
            "{{" => "}}",
            _ => "#}",
        };
        let unclosed = || format!("line {}: `{}` is not closed", source[..source.len() - tag.len()].matches('\n').count() + 1, &tag[..2]);
        let len = if end == "#}" { tag.find(end).map(|at| at + 2) } else { tag_len(tag, end) }.ok_or_else(unclosed)?;
        let inner = &tag[2..len - 2];
        if end != "#}" && code(inner).count() > CODE_MAX {
            return Err(format!("a tag is longer than {CODE_MAX} characters: {:.40}…", inner.trim()));
        }
        rest = &tag[len..];
        if end != "%}" {
            out.push_str(&tag[..len]);
            continue;
        }
        out.push_str(&block(inner));
        if inner.trim_matches(['-', '+', ' ', '\t', '\r', '\n']) == "raw" {
            let after = rest
                .match_indices("{%")
                .find(|(at, _)| rest[at + 2..].trim_start_matches(['-', '+', ' ', '\t', '\r', '\n']).starts_with("endraw"));
            let (raw, tail) = rest.split_at(after.map_or(rest.len(), |(at, _)| at));
            out.push_str(raw);
            rest = tail;
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// Length of the tag at the beginning of `tag`, delimiters included; `end` inside strings and brackets does not count.
fn tag_len(tag: &str, end: &str) -> Option<usize> {
    let found = outermost(&tag[2..]).find(|(at, _)| tag[2 + at..].starts_with(end));
    found.map(|(at, _)| at + 4)
}

/// The characters of an expression that are in no string and no bracket.
fn outermost(text: &str) -> impl Iterator<Item = (usize, char)> {
    code(text).filter(|(_, _, depth)| *depth == 0).map(|(at, c, _)| (at, c))
}

/// The characters of an expression that are in no string, each with the number of brackets around it (its own included).
fn code(text: &str) -> impl Iterator<Item = (usize, char, usize)> {
    let (mut quote, mut escaped, mut depth) = (None, false, 0_usize);
    text.char_indices().filter_map(move |(at, c)| {
        let outer = depth;
        match (quote, c) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(open), c) => quote = quote.filter(|_| c != open),
            (None, '"' | '\'') => quote = Some(c),
            (None, '{' | '[' | '(') => depth += 1,
            (None, '}' | ']' | ')') => depth = depth.saturating_sub(1),
            (None, _) => {}
        }
        (quote.is_none()).then_some((at, c, depth.max(outer)))
    })
}

/// One `{% … %}`, from what stands between the delimiters.
fn block(inner: &str) -> String {
    let left = &inner[..usize::from(inner.starts_with(['-', '+']))];
    let right = &inner[inner.len() - usize::from(inner.len() > left.len() && inner.ends_with(['-', '+']))..];
    let body = inner[left.len()..inner.len() - right.len()].trim();
    let (word, arguments) = body.split_at(body.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(body.len()));
    let then = |head: String, checks: String| format!("{{%{left} {head} %}}{{% {checks} {right}%}}");
    match word {
        "generation" => format!("{{%{left} if true {right}%}}"),
        "endgeneration" => format!("{{%{left} endif {right}%}}"),
        "set" => match arguments.split_once('=').filter(|(target, _)| !target.contains('|')) {
            Some((target, value)) => format!("{{%{left} set{target}= {BOUND}(({value})) {right}%}}"),
            None => format!("{{%{inner}%}}"),
        },
        "for" => then(body.into(), format!("set {TICK}_ = {TICK}()")),
        "macro" => {
            let names = parameters(arguments);
            let targets: String = names.iter().map(|name| format!(", {name}")).collect();
            let values: String = names.iter().map(|name| format!(", {BOUND}({name})")).collect();
            then(body.into(), format!("set ({TICK}_{targets}) = ({TICK}(){values})"))
        }
        _ => format!("{{%{inner}%}}"),
    }
}

/// Names of a macro's parameters, from ` name(a, b="x")`.
fn parameters(arguments: &str) -> Vec<&str> {
    let list = arguments.split_once('(').and_then(|(_, list)| list.rsplit_once(')')).map_or("", |(list, _)| list);
    let starts = outermost(list).filter(|(_, c)| *c == ',').map(|(at, _)| at + 1);
    let name = |start: usize| list[start..].trim_start().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
    std::iter::once(0).chain(starts).map(name).filter(|name| !name.is_empty()).collect()
}
