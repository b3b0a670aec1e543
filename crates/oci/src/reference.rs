//! What a manifest is asked by: a tag or a digest.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::digest::{AnyDigest, DigestError};

/// Longest tag that the distribution specification allows.
const TAG_LIMIT: usize = 128;

/// A tag: `[A-Za-z0-9_][A-Za-z0-9._-]{0,127}`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(Arc<str>);

/// A tag or a digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    /// A name that may move.
    Tag(Tag),
    /// A name that cannot.
    Digest(AnyDigest),
}

/// Why a text is no reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// There is no tag.
    #[error("tag is empty")]
    TagEmpty,
    /// The tag is too long.
    #[error("tag is longer than {TAG_LIMIT} bytes")]
    TagTooLong,
    /// The tag holds a character that no tag may hold, or starts with `.` or `-`.
    #[error("tag {0:?} holds an illegal character")]
    TagCharacter(String),
    /// The text holds a colon, so it is meant as a digest, and is none.
    #[error(transparent)]
    Digest(#[from] DigestError),
}

impl Tag {
    /// The tag as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Tag {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::TagEmpty);
        }
        if text.len() > TAG_LIMIT {
            return Err(ReferenceError::TagTooLong);
        }
        if text.starts_with(['.', '-']) || !text.bytes().all(is_tag_byte) {
            return Err(ReferenceError::TagCharacter(text.to_owned()));
        }
        Ok(Self(text.into()))
    }
}

impl Reference {
    /// The digest, if this is one.
    pub fn digest(&self) -> Option<&AnyDigest> {
        match self {
            Self::Tag(_) => None,
            Self::Digest(digest) => Some(digest),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => tag.fmt(f),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.contains(':') {
            return Ok(Self::Digest(text.parse()?));
        }
        text.parse().map(Self::Tag)
    }
}

fn is_tag_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn legal_tags() {
        let longest = "a".repeat(TAG_LIMIT);
        for text in [
            "latest",
            "_",
            "V1.0-rc_2",
            "0",
            "sha256-abc.sig",
            "manifests",
            &longest,
        ] {
            let tag: Tag = text.parse().unwrap();
            assert_eq!((tag.as_str(), format!("{tag:?}").as_str()), (text, text));
            assert_eq!(text.parse::<Reference>(), Ok(Reference::Tag(tag)));
        }
    }

    #[test]
    fn illegal_tags() {
        for text in [
            ".a", "-a", "a b", "a/b", "..", "a\\b", "a%2fb", "ä", "a\0", "a@b",
        ] {
            assert_eq!(
                text.parse::<Tag>(),
                Err(ReferenceError::TagCharacter(text.to_owned())),
                "{text}"
            );
        }
        assert_eq!("".parse::<Tag>(), Err(ReferenceError::TagEmpty));
        assert_eq!(
            "a".repeat(TAG_LIMIT + 1).parse::<Tag>(),
            Err(ReferenceError::TagTooLong)
        );
    }

    #[test]
    fn a_colon_makes_a_digest() {
        let text = format!("sha256:{}", "0".repeat(64));
        let reference: Reference = text.parse().unwrap();
        assert_eq!(reference.digest().map(ToString::to_string), Some(text));
        assert_eq!("latest".parse::<Reference>().unwrap().digest(), None);
        assert!(matches!(
            "sha256:".parse::<Reference>(),
            Err(ReferenceError::Digest(_))
        ));
    }

    proptest! {
        #[test]
        fn what_is_read_prints_the_same(text in ".{0,20}|[A-Za-z0-9._:+-]{0,20}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string(), text);
            }
        }

        #[test]
        fn every_tag_of_the_grammar_is_read(text in "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}") {
            prop_assert!(text.parse::<Tag>().is_ok());
        }
    }
}
