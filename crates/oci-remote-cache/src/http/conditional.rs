//! What a request's `If-None-Match` and `If-Range` say about a digest. Pure.
//!
//! Our entity tags are digests in quotes: strong, and the same for ever.

use oci::Digest;

/// Whether one of the `If-None-Match` lines names `digest`, so that the client has the content already.
///
/// The comparison is weak (RFC 9110 section 13.1.2). The registry `distribution` takes a digest without quotes too, so some clients
/// send one.
pub fn if_none_match(lines: impl IntoIterator<Item: AsRef<str>>, digest: &Digest) -> bool {
    let tag = digest.to_string();
    lines.into_iter().any(|line| {
        let mut entries = line.as_ref().split(',').map(str::trim);
        entries.any(|entry| entry == "*" || opaque(entry) == tag)
    })
}

/// Whether the `If-Range` value lets the `Range` count: the same strong entity tag.
///
/// A weak tag never matches (RFC 9110 section 13.1.5). Neither does a date: we send no `Last-Modified`.
pub fn if_range(value: &str, etag: &str) -> bool {
    let value = value.trim();
    !value.starts_with("W/") && value.starts_with('"') && value == etag
}

/// The entry without its weakness mark and quotes.
fn opaque(entry: &str) -> &str {
    let entry = entry.strip_prefix("W/").unwrap_or(entry);
    entry
        .strip_prefix('"')
        .and_then(|inner| inner.strip_suffix('"'))
        .unwrap_or(entry)
}

#[cfg(test)]
mod tests {
    use oci::{Algorithm, Digest};

    use super::{if_none_match, if_range};

    #[test]
    fn if_none_match_takes_every_spelling_of_the_digest() {
        let digest = Digest::of(Algorithm::Sha256, b"x");
        let other = Digest::of(Algorithm::Sha256, b"y");
        let matching = [
            vec![format!("\"{digest}\"")],
            vec![format!("W/\"{digest}\"")],
            vec![digest.to_string()],
            vec!["*".to_owned()],
            vec![format!("\"abc\", \"{digest}\"")],
            vec![format!("\"{other}\""), format!("  \"{digest}\"  ")],
        ];
        for lines in matching {
            assert!(if_none_match(&lines, &digest), "{lines:?}");
        }
        let foreign = [
            vec![],
            vec![String::new()],
            vec![format!("\"{other}\"")],
            vec![format!("\"{digest}")],
            vec![format!("w/\"{digest}\"")],
        ];
        for lines in foreign {
            assert!(!if_none_match(&lines, &digest), "{lines:?}");
        }
    }

    #[test]
    fn if_range_wants_the_same_strong_tag() {
        let etag = "\"sha256:aa\"";
        assert!(if_range(etag, etag));
        assert!(if_range(" \"sha256:aa\" ", etag));
        for value in [
            "W/\"sha256:aa\"",
            "\"sha256:bb\"",
            "sha256:aa",
            "*",
            "",
            "Wed, 21 Oct 2015 07:28:00 GMT",
        ] {
            assert!(!if_range(value, etag), "{value}");
        }
    }
}
