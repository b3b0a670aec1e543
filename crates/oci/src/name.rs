//! Repository names, and the path that stands for one on the wire.
//!
//! A [`RepositoryName`] is a name as an upstream knows it. A [`NamePath`] is what a client wrote between `/v2/` and the
//! verb: it may carry the key of an upstream in front, and only the caller, who has the table of keys, can tell.
//! Nothing is ever normalised here: what is not a name is refused.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longest name sent upstream; registries agree on 255 for host and name together.
const LENGTH_LIMIT: usize = 255;

/// A repository name of one or more segments, at most 255 bytes, as sent upstream.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepositoryName(Arc<str>);

/// What stands between `/v2/` and the verb: one or more segments, not yet split into upstream key and repository.
///
/// The first segment may be written like a host (`localhost:5000`, `[::1]`, `Registry.Example`); all others follow the
/// grammar of repository names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamePath {
    text: Arc<str>,
    first_is_legal: bool,
}

/// Why a text is no repository name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is no name.
    #[error("repository name is empty")]
    Empty,
    /// The name is longer than registries allow.
    #[error("repository name is longer than {LENGTH_LIMIT} bytes")]
    TooLong,
    /// One segment does not follow the grammar; an empty one is a doubled or stray slash.
    #[error("repository name holds the illegal segment {0:?}")]
    Segment(String),
}

impl RepositoryName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Docker Hub's rule: `alpine` is `library/alpine`; names of more than one segment stay what they are.
    ///
    /// So does a name that would become too long: no such official image can exist.
    #[must_use]
    pub fn with_library(&self) -> Self {
        let long = format!("library/{}", self.0);
        if self.0.contains('/') || long.len() > LENGTH_LIMIT {
            return self.clone();
        }
        Self(long.into())
    }

    /// The parts between the slashes.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }
}

impl fmt::Display for RepositoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RepositoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RepositoryName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        check_name(text)?;
        Ok(Self(text.into()))
    }
}

impl NamePath {
    /// The first segment: perhaps the key of an upstream.
    pub fn first(&self) -> &str {
        self.text.split('/').next().unwrap_or_default()
    }

    /// All but the first segment, as a repository; `None` when there is only one.
    pub fn rest(&self) -> Option<RepositoryName> {
        let (_, rest) = self.text.split_once('/')?;
        Some(RepositoryName(rest.into()))
    }

    /// All segments, as a repository; `None` when the first is only fit to be a key, or the whole is too long.
    pub fn whole(&self) -> Option<RepositoryName> {
        let fits = self.first_is_legal && self.text.len() <= LENGTH_LIMIT;
        fits.then(|| RepositoryName(Arc::clone(&self.text)))
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the first segment reads as a host, by Docker's rule: it holds `.` or `:`, or is `localhost`.
    pub fn first_is_host_like(&self) -> bool {
        is_host_like(self.first())
    }
}

impl fmt::Display for NamePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for NamePath {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (first, rest) = match text.split_once('/') {
            Some((first, rest)) => (first, Some(rest)),
            None => (text, None),
        };
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if first.len() > LENGTH_LIMIT {
            return Err(NameError::TooLong);
        }
        let first_is_legal = is_segment(first);
        if !first_is_legal && !is_host(first) {
            return Err(NameError::Segment(first.to_owned()));
        }
        rest.map_or(Ok(()), check_name)?;
        Ok(Self {
            text: text.into(),
            first_is_legal,
        })
    }
}

/// May this stand as one path segment for an upstream: a name segment, or written like a host?
pub(crate) fn is_key(segment: &str) -> bool {
    segment.len() <= LENGTH_LIMIT && (is_segment(segment) || is_host(segment))
}

fn check_name(text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > LENGTH_LIMIT {
        return Err(NameError::TooLong);
    }
    match text.split('/').find(|segment| !is_segment(segment)) {
        Some(segment) => Err(NameError::Segment(segment.to_owned())),
        None => Ok(()),
    }
}

/// Where in a segment we are; a segment must end in a word.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Start,
    Word,
    Dot,
    Underscore,
    Underscores,
    Dashes,
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`, from the distribution specification.
fn is_segment(segment: &str) -> bool {
    segment.bytes().try_fold(Place::Start, step) == Some(Place::Word)
}

fn step(place: Place, byte: u8) -> Option<Place> {
    match (place, byte) {
        (_, b'a'..=b'z' | b'0'..=b'9') => Some(Place::Word),
        (Place::Word, b'.') => Some(Place::Dot),
        (Place::Word, b'_') => Some(Place::Underscore),
        (Place::Underscore, b'_') => Some(Place::Underscores),
        (Place::Word | Place::Dashes, b'-') => Some(Place::Dashes),
        _ => None,
    }
}

fn is_host_like(segment: &str) -> bool {
    segment.contains(['.', ':']) || segment == "localhost"
}

/// Written like a host and made of a host's characters. Dot segments are none: they are how paths are escaped from.
fn is_host(segment: &str) -> bool {
    is_host_like(segment)
        && segment.bytes().all(is_host_byte)
        && segment.bytes().any(|byte| byte.is_ascii_alphanumeric())
        && !segment.starts_with('.')
        && !segment.contains("..")
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b':' | b'[' | b']' | b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> RepositoryName {
        text.parse().unwrap()
    }

    #[test]
    fn legal_names() {
        let longest = "a".repeat(LENGTH_LIMIT);
        for text in [
            "a",
            "library/alpine",
            "a/blobs/b",
            "x/manifests",
            "tags/list",
            "my.repo",
            "a_b",
            "a__b",
            "a---b",
            "0/9",
            &longest,
        ] {
            assert_eq!(name(text).as_str(), text);
            assert_eq!(format!("{:?}", name(text)), text);
        }
        assert_eq!(
            name("a/b-c/d").segments().collect::<Vec<_>>(),
            ["a", "b-c", "d"]
        );
    }

    #[test]
    fn illegal_names() {
        let segment = |text: &str| NameError::Segment(text.to_owned());
        for (text, error) in [
            ("", NameError::Empty),
            ("/a", segment("")),
            ("a/", segment("")),
            ("a//b", segment("")),
            ("Foo/bar", segment("Foo")),
            ("foo/../bar", segment("..")),
            ("foo/./bar", segment(".")),
            ("foo\\bar", segment("foo\\bar")),
            ("foo/\0", segment("\0")),
            ("a___b", segment("a___b")),
            ("a..b", segment("a..b")),
            ("a._b", segment("a._b")),
            ("a-_b", segment("a-_b")),
            ("-a", segment("-a")),
            ("a-", segment("a-")),
            ("a.", segment("a.")),
            ("_catalog", segment("_catalog")),
            ("a:5000/b", segment("a:5000")),
            ("bücher", segment("bücher")),
            (&"a".repeat(LENGTH_LIMIT + 1), NameError::TooLong),
        ] {
            assert_eq!(text.parse::<RepositoryName>(), Err(error), "{text}");
        }
    }

    #[test]
    fn one_segment_is_of_the_library() {
        let longest = "a".repeat(LENGTH_LIMIT - "library/".len());
        assert_eq!(name("alpine").with_library(), name("library/alpine"));
        assert_eq!(
            name("library/alpine").with_library(),
            name("library/alpine")
        );
        assert_eq!(name("a/b").with_library(), name("a/b"));
        assert_eq!(name(&longest).with_library().as_str().len(), LENGTH_LIMIT);
        let longer = format!("{longest}a");
        assert_eq!(name(&longer).with_library(), name(&longer));
    }

    #[test]
    fn paths_are_split_after_the_first_segment() {
        for (text, first, rest, whole, host_like) in [
            ("docker.io/alpine", "docker.io", Some("alpine"), true, true),
            ("a.b/x", "a.b", Some("x"), true, true),
            ("a/b/c", "a", Some("b/c"), true, false),
            ("alpine", "alpine", None, true, false),
            ("localhost/x", "localhost", Some("x"), true, true),
            (
                "localhost:5000/x/y",
                "localhost:5000",
                Some("x/y"),
                false,
                true,
            ),
            ("[::1]:22/x", "[::1]:22", Some("x"), false, true),
            (
                "Registry.Example/x",
                "Registry.Example",
                Some("x"),
                false,
                true,
            ),
            (
                "169.254.169.254/x",
                "169.254.169.254",
                Some("x"),
                true,
                true,
            ),
        ] {
            let path: NamePath = text.parse().unwrap();
            assert_eq!(
                (path.first(), path.first_is_host_like()),
                (first, host_like),
                "{text}"
            );
            assert_eq!(path.rest(), rest.map(name), "{text}");
            assert_eq!(path.whole(), whole.then(|| name(text)), "{text}");
            assert_eq!((path.as_str(), path.to_string().as_str()), (text, text));
        }
    }

    #[test]
    fn refused_paths() {
        for text in [
            "",
            "/",
            "/a",
            "a/",
            "Foo/bar",
            "foo//bar",
            "foo/../bar",
            "../foo",
            "./foo",
            "..",
            ".",
            "...",
            "foo\\bar",
            "foo.bar\\baz/x",
            "a..b/c",
            ".a/b",
            ":/x",
            "docker.io/Foo",
            "docker.io/",
            "docker.io//x",
            "docker.io/a:b",
            "_oci/ext",
            "a b.c/x",
            "é.example/x",
        ] {
            assert!(text.parse::<NamePath>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_key_does_not_count_against_the_name() {
        let longest = "a".repeat(LENGTH_LIMIT);
        let path: NamePath = format!("docker.io/{longest}").parse().unwrap();
        assert_eq!(path.rest(), Some(name(&longest)));
        assert_eq!(path.whole(), None);
        assert_eq!(
            format!("docker.io/{longest}a").parse::<NamePath>(),
            Err(NameError::TooLong)
        );
        assert_eq!(
            format!("{longest}a/b").parse::<NamePath>(),
            Err(NameError::TooLong)
        );
        assert!(
            longest
                .parse::<NamePath>()
                .is_ok_and(|path| path.whole().is_some())
        );
        assert!(is_key(&longest) && !is_key(&format!("{longest}a")));
        assert!(
            is_key("ghcr") && is_key("[::1]:80") && !is_key("Foo") && !is_key("..") && !is_key("")
        );
    }

    /// The grammar told another way: letters at both ends, and only the four kinds of separator between.
    fn by_separators(segment: &str) -> bool {
        let is_letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        segment.starts_with(is_letter)
            && segment.ends_with(is_letter)
            && segment.split(is_letter).all(|run| {
                matches!(run, "" | "." | "_" | "__") || run.bytes().all(|byte| byte == b'-')
            })
    }

    proptest! {
        #[test]
        fn segments_follow_the_grammar(segment in "[ab0._-]{0,7}|[a-z0-9A-Z._-]{0,5}") {
            prop_assert_eq!(is_segment(&segment), by_separators(&segment));
        }

        #[test]
        fn what_is_read_is_what_was_written(text in ".{0,30}|[a-zA-Z0-9./:_-]{0,12}") {
            if let Ok(name) = text.parse::<RepositoryName>() {
                prop_assert_eq!(name.to_string(), text.clone());
                prop_assert!(text.parse::<NamePath>().is_ok_and(|path| path.whole() == Some(name)));
            }
            if let Ok(path) = text.parse::<NamePath>() {
                let joined = path.rest().map_or_else(|| path.first().to_owned(), |rest| format!("{}/{rest}", path.first()));
                prop_assert_eq!(&joined, &text);
                prop_assert!(is_key(path.first()));
                prop_assert!(!text.split('/').any(|segment| matches!(segment, "" | "." | "..")));
            }
        }
    }
}
