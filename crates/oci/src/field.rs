//! What header fields are made of (RFC 9110, section 5.6): pieces are taken off the front of a line. What they mean is the callers' business.

/// Takes what stands before any of `ends`.
pub(crate) fn take_until<'a, const N: usize>(rest: &mut &'a str, ends: [char; N]) -> &'a str {
    let at = rest.find(ends).unwrap_or(rest.len());
    let (taken, left) = rest.split_at(at);
    *rest = left;
    taken
}

/// Takes a quoted string with its escapes; one without an end goes to the end of the line.
pub(crate) fn quoted(rest: &mut &str) -> String {
    let mut value = String::new();
    let mut characters = rest.chars();
    characters.next();
    while let Some(character) = characters.next() {
        match character {
            '"' => break,
            '\\' => value.extend(characters.next()),
            _ => value.push(character),
        }
    }
    *rest = characters.as_str();
    value
}
