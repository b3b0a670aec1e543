//! `Link` (RFC 8288): where a registry says that the next page is.
//!
//! Targets may hold commas and semicolons, so a line is read and not split. Reading never fails; what cannot be read is skipped. Whether
//! a target may be followed is decided elsewhere.

use crate::field::{quoted, take_until};

/// Longest header looked at: page tokens have up to 2048 bytes, and each may take three when it is escaped.
const HEADER_LIMIT: usize = 16 << 10;
/// Links, and parameters of one link, looked at.
const ITEM_LIMIT: usize = 32;

/// White space between the parts of a link.
const SPACE: [char; 2] = [' ', '\t'];

/// The target of the first link among these header lines whose relation is `next`, as it is written.
///
/// Links about another resource than the one that was asked for (`anchor`) are passed over.
pub fn next_link<'a>(lines: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    lines
        .into_iter()
        .filter(|line| line.len() <= HEADER_LIMIT)
        .find_map(next_in)
}

fn next_in(line: &str) -> Option<&str> {
    let mut rest = line;
    for _ in 0..ITEM_LIMIT {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let Some(found) = rest.strip_prefix('<') else {
            // No link: whatever it is ends at the next comma.
            take_until(&mut rest, [',']);
            if rest.is_empty() {
                return None;
            }
            continue;
        };
        let (target, after) = found.split_once('>')?;
        rest = after;
        if is_next(&mut rest) {
            return Some(target);
        }
    }
    None
}

/// Takes a link's parameters off the line, and tells whether they call it the next.
fn is_next(rest: &mut &str) -> bool {
    // Only the first of each counts (RFC 8288, section 3.3).
    let (mut relation, mut anchored) = (None, false);
    for _ in 0..ITEM_LIMIT {
        *rest = rest.trim_start_matches(SPACE);
        let Some(after) = rest.strip_prefix(';') else {
            break;
        };
        *rest = after.trim_start_matches(SPACE);
        let name = take_until(rest, ['=', ';', ',', ' ', '\t']);
        let value = value(rest);
        if name.eq_ignore_ascii_case("rel") {
            relation.get_or_insert(value);
        } else if name.eq_ignore_ascii_case("anchor") {
            anchored = true;
        }
    }
    let relation = relation.unwrap_or_default();
    !anchored
        && relation
            .split_ascii_whitespace()
            .any(|word| word.eq_ignore_ascii_case("next"))
}

/// Takes a parameter's value, if it has one. Space around the sign is wrong and occurs.
fn value(rest: &mut &str) -> String {
    let Some(after) = rest.trim_start_matches(SPACE).strip_prefix('=') else {
        return String::new();
    };
    *rest = after.trim_start_matches(SPACE);
    if rest.starts_with('"') {
        quoted(rest)
    } else {
        take_until(rest, [';', ',', ' ', '\t']).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_way_to_write_the_next() {
        for line in [
            r#"<T>; rel="next""#,
            "<T>; rel=next",
            "<T>;rel=next",
            r#"<T> ; rel = "next""#,
            r#"<T>; Rel="Next""#,
            "<T>; REL=NEXT",
            r#"<T>; rel="last next""#,
            r#"<T>; rel="ne\xt""#,
            r#"<T>; title="a; rel=prev, b"; rel="next""#,
            r#"<T>; rel="next"; rel="prev""#,
            r#"<T>;; rel="next";"#,
            "<T>; crossorigin; rel=next",
            r#"</p>; rel="prev", <T>; rel="next""#,
            r#"</p>; title="<x>; rel=next"; rel="prev", <T>; rel="next""#,
            r#", ,<T>; rel="next","#,
            r#"garbage, <T>; rel="next""#,
        ] {
            let target = "/v2/a/tags/list?last=a,b;c&n=2";
            let line = line.replace('T', target);
            // The mark stands in `NEXT` and `title` too.
            let line = line.replace(&format!("NEX{target}"), "NEXT");
            assert_eq!(next_link([line.as_str()]), Some(target), "{line}");
        }
    }

    #[test]
    fn what_is_not_the_next() {
        let long = format!("<{}>; rel=next", "a".repeat(HEADER_LIMIT));
        for line in [
            "",
            "garbage",
            "<",
            "<a",
            "<a>",
            "<a>; rel",
            "<a>; rel=",
            r#"<a>; rel="prev""#,
            r#"<a>; rel="nextish""#,
            r#"<a>; rel="prev"; rel="next""#,
            r#"<a>; title="rel=next""#,
            r#"<a>; xrel="next""#,
            r#"<a>; rel="next"; anchor="/other""#,
            r#"a; rel="next""#,
            &long,
        ] {
            assert_eq!(next_link([line]), None, "{line}");
        }
    }

    #[test]
    fn all_lines_are_read() {
        let lines = ["</a>; rel=prev", "</b>; rel=next", "</c>; rel=next"];
        assert_eq!(next_link(lines), Some("/b"));
        assert_eq!(next_link([]), None);
    }

    proptest! {
        #[test]
        fn any_target_comes_out_as_it_went_in(
            before in prop::collection::vec("<[a-z/?&=,;]{0,9}>; ?(rel=prev|rel=\"prev\"|title=\"[a-z<>,;= ]{0,9}\")", 0..4),
            target in "[!-;=?-~]{0,40}",
            after in "(; ?[a-z]{1,3}(=[a-z]{0,3})?)?(, <[a-z]{0,5}>; rel=next)?",
        ) {
            let mut links = before;
            links.push(format!("<{target}>; rel=\"next\"{after}"));
            let line = links.join(", ");
            prop_assert_eq!(next_link([line.as_str()]), Some(target.as_str()), "{}", line);
        }

        #[test]
        fn any_line_is_survived(line in any::<String>(), close in "[<>;,= \"\\\\a-c]{0,40}(rel=next)?[\"<>;, ]{0,5}") {
            for line in [line.as_str(), close.as_str()] {
                if let Some(target) = next_link([line]) {
                    prop_assert!(line.contains(target));
                }
            }
        }
    }
}
