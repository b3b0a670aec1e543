//! `Warning` (distribution-spec, "Warnings"; RFC 7234 section 5.5): what a registry wants people to read, such as that an image is no
//! longer kept up.
//!
//! The specification knows one form, `299 - "text"`. Others are passed over, and so is what could be mistaken for another header's text.

use std::fmt;

use crate::field::{quoted, take_until};

/// Bytes of all warnings of one answer, as the specification has it.
const ALL: usize = 4096;

/// A registry's words to people: printable ASCII.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Warning(String);

impl Warning {
    /// The warnings in these header lines, as many as fit in 4096 bytes.
    #[expect(
        single_use_lifetimes,
        reason = "an elided lifetime in an impl Trait argument is not stable"
    )]
    pub fn parse_all<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<Self> {
        let mut room = ALL;
        lines
            .into_iter()
            .filter(|line| line.len() <= ALL)
            .flat_map(parse_line)
            .take_while(|warning| {
                let left = room.checked_sub(warning.to_string().len());
                room = left.unwrap_or(0);
                left.is_some()
            })
            .collect()
    }

    /// Its text, without quotes.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Takes one list member off the front; nothing when it is of another form.
    fn take(rest: &mut &str) -> Option<Self> {
        *rest = rest.trim_start_matches([' ', '\t', ',']);
        let said = rest.strip_prefix("299 - \"").is_some();
        let before = take_until(rest, ['"', ',']);
        if !rest.starts_with('"') {
            return None;
        }
        let text = quoted(rest);
        // A date may follow, in quotes of its own.
        let after = take_until(rest, ['"', ',']);
        if rest.starts_with('"') {
            quoted(rest);
            return None;
        }
        let fits = said && before == "299 - " && after.trim().is_empty() && !text.is_empty();
        let printable = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
        (fits && text.bytes().all(printable)).then_some(Self(text))
    }
}

fn parse_line(mut rest: &str) -> Vec<Warning> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        found.extend(Warning::take(&mut rest));
    }
    found
}

/// As a header's value.
impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("299 - \"")?;
        for character in self.0.chars() {
            if matches!(character, '"' | '\\') {
                f.write_str("\\")?;
            }
            write!(f, "{character}")?;
        }
        f.write_str("\"")
    }
}

#[cfg(test)]
mod tests {
    use super::{ALL, Warning};

    fn texts(lines: &[&str]) -> Vec<String> {
        let found = Warning::parse_all(lines.iter().copied());
        found.into_iter().map(|warning| warning.0).collect()
    }

    #[test]
    fn reads_the_form_of_the_specification_and_no_other() {
        for (line, found) in [
            (
                r#"299 - "Deprecated, use \"v2\"""#,
                &[r#"Deprecated, use "v2""#][..],
            ),
            (r#"299 - "one", 299 - "two""#, &["one", "two"]),
            (r#"  299 - "padded"  "#, &["padded"]),
            (r#"110 - "stale", 299 - "kept""#, &["kept"]),
            (r#"299 proxy.example "named agent""#, &[]),
            (
                r#"299 - "dated" "Tue, 24 Nov 2026 00:00:00 GMT", 299 - "next""#,
                &["next"],
            ),
            (r#"299 - """#, &[]),
            ("299 - bare, 299", &[]),
            ("299 - \"a\tb\"", &[]),
            ("", &[]),
        ] {
            assert_eq!(texts(&[line]), found, "{line}");
        }
    }

    #[test]
    fn what_is_read_is_written_the_same() {
        let line = r#"299 - "a \"quoted\" back\\slash""#;
        let found = Warning::parse_all([line]);
        assert_eq!(found[0].text(), r#"a "quoted" back\slash"#);
        assert_eq!(found[0].to_string(), line);
    }

    #[test]
    fn all_together_are_bounded() {
        let long = format!("299 - \"{}\"", "x".repeat(1500));
        assert_eq!(texts(&[&long, &long, &long]).len(), 2);
        let longer = format!("299 - \"{}\"", "x".repeat(ALL));
        assert!(texts(&[&longer]).is_empty());
        let many = "299 - \"x\",".repeat(400);
        assert!(texts(&[&many]).len() * 9 <= ALL);
    }
}
