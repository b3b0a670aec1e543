//! Media types: which ones are manifests, and what a client's `Accept` admits.

use std::fmt;
use std::sync::Arc;

/// An OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// An OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker's manifest list: the index before OCI.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker's image manifest, version 2 schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// The artifact manifest that was taken out of the image specification again, but is still in the wild.
pub const OCI_ARTIFACT: &str = "application/vnd.oci.artifact.manifest.v1+json";
/// Docker's first manifest, unsigned.
pub const SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
/// Docker's first manifest, signed.
pub const SCHEMA1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
/// What every blob is served as.
pub const OCTET_STREAM: &str = "application/octet-stream";

/// The one `Accept` sent upstream for manifests, whatever the client sent.
///
/// The distribution registry answers 404 for types not listed, even beside `*/*`; Red Hat's answers schema 1 or
/// `text/plain`. Asking always the same keeps the mapping from tag to digest independent of who asked first.
pub const MANIFEST_ACCEPT: &str = "application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*";

/// Longest media type looked at (RFC 6838 allows 127 on either side of the slash).
const LENGTH_LIMIT: usize = 255;

/// A media type without its parameters, in lower case.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct MediaType(Arc<str>);

/// What a media type means to a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A list of manifests.
    Index,
    /// An image: a config and layers.
    Image,
    /// Docker's first format, whose digest is not that of its bytes.
    Schema1,
    /// Anything else: opaque.
    Other,
}

/// Why a text is no media type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MediaTypeError {
    /// It is too long to be one.
    #[error("media type is longer than {LENGTH_LIMIT} bytes")]
    TooLong,
    /// It is not `type/subtype`.
    #[error("{0:?} is not a media type")]
    Grammar(String),
}

impl MediaType {
    /// Reads a `Content-Type` or a descriptor's `mediaType`; parameters such as `; charset=utf-8` are dropped.
    pub fn parse(text: &str) -> Result<Self, MediaTypeError> {
        let essence = without_parameters(text);
        if essence.len() > LENGTH_LIMIT {
            return Err(MediaTypeError::TooLong);
        }
        match essence.split_once('/') {
            Some((kind, subtype)) if is_token(kind) && is_token(subtype) => {
                Ok(Self(essence.to_ascii_lowercase().into()))
            }
            _ => Err(MediaTypeError::Grammar(essence.to_owned())),
        }
    }

    /// The type as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the type means to a registry.
    pub fn kind(&self) -> Kind {
        match self.as_str() {
            OCI_INDEX | DOCKER_LIST => Kind::Index,
            OCI_MANIFEST | DOCKER_MANIFEST => Kind::Image,
            SCHEMA1 | SCHEMA1_SIGNED => Kind::Schema1,
            _ => Kind::Other,
        }
    }

    /// Whether it is a manifest's or an index's as OCI defines them.
    pub fn is_oci(&self) -> bool {
        matches!(self.as_str(), OCI_INDEX | OCI_MANIFEST)
    }

    /// Whether a body of this type is JSON. Signed schema 1 says `+prettyjws` and is JSON all the same.
    pub fn is_json(&self) -> bool {
        let text = self.as_str();
        text == "application/json" || text.ends_with("+json") || text.ends_with("+prettyjws")
    }
}

impl fmt::Display for MediaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for MediaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How closely a media range names a type; the closest one decides (RFC 9110, section 12.5.1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Closeness {
    Anything,
    Family,
    Exact,
}

/// Does the client's `Accept`, all header lines joined by commas, admit this type?
///
/// Absent, empty and unreadable ones admit everything.
pub fn accepts(accept: Option<&str>, media_type: &MediaType) -> bool {
    let mut readable = false;
    let mut best: Option<(Closeness, bool)> = None;
    for item in accept.unwrap_or_default().split(',') {
        let range = without_parameters(item);
        if !range.contains('/') {
            continue;
        }
        readable = true;
        if let Some(closeness) = closeness(range, media_type) {
            best = best.max(Some((closeness, !is_refused(item))));
        }
    }
    best.map_or(!readable, |(_, admitted)| admitted)
}

fn closeness(range: &str, media_type: &MediaType) -> Option<Closeness> {
    if range == "*/*" {
        return Some(Closeness::Anything);
    }
    if range.eq_ignore_ascii_case(media_type.as_str()) {
        return Some(Closeness::Exact);
    }
    let family = range.strip_suffix("/*")?;
    let (own, _) = media_type.as_str().split_once('/')?;
    family
        .eq_ignore_ascii_case(own)
        .then_some(Closeness::Family)
}

/// Whether the media range carries a weight of zero: `q=0`, `q=0.`, `q=0.000`.
fn is_refused(item: &str) -> bool {
    item.split(';')
        .skip(1)
        .filter_map(|parameter| parameter.split_once('='))
        .any(|(name, value)| {
            let digits = value.trim();
            name.trim().eq_ignore_ascii_case("q")
                && digits.starts_with('0')
                && digits.bytes().all(|byte| matches!(byte, b'0' | b'.'))
        })
}

fn without_parameters(text: &str) -> &str {
    text.split(';').next().unwrap_or_default().trim()
}

/// RFC 9110, section 5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn media_type(text: &str) -> MediaType {
        MediaType::parse(text).unwrap()
    }

    #[test]
    fn read() {
        for (text, essence) in [
            (OCI_INDEX, OCI_INDEX),
            ("Application/JSON; charset=utf-8", "application/json"),
            (" text/plain ;x", "text/plain"),
            (
                "application/vnd.cncf.helm.config.v1+json",
                "application/vnd.cncf.helm.config.v1+json",
            ),
        ] {
            let read = media_type(text);
            assert_eq!(
                (read.as_str(), format!("{read:?}").as_str()),
                (essence, essence)
            );
        }
        for text in [
            "", "json", "/", "a/", "/b", "a/b/c", "a b/c", "a/b c", "a/b,c/d", "ä/b", "a/b\n",
        ] {
            let read = MediaType::parse(text);
            assert_eq!(read.is_err(), text != "a/b\n", "{text}");
        }
        assert!(MediaType::parse(&format!("a/{}", "b".repeat(LENGTH_LIMIT - 2))).is_ok());
        assert_eq!(
            MediaType::parse(&format!("a/{}", "b".repeat(LENGTH_LIMIT - 1))),
            Err(MediaTypeError::TooLong)
        );
    }

    #[test]
    fn kinds() {
        for (text, kind, is_json) in [
            (OCI_INDEX, Kind::Index, true),
            (DOCKER_LIST, Kind::Index, true),
            (OCI_MANIFEST, Kind::Image, true),
            (DOCKER_MANIFEST, Kind::Image, true),
            (SCHEMA1, Kind::Schema1, true),
            (SCHEMA1_SIGNED, Kind::Schema1, true),
            (OCI_ARTIFACT, Kind::Other, true),
            ("application/json", Kind::Other, true),
            (OCTET_STREAM, Kind::Other, false),
            ("text/html", Kind::Other, false),
        ] {
            let read = media_type(text);
            assert_eq!((read.kind(), read.is_json()), (kind, is_json), "{text}");
        }
    }

    #[test]
    fn what_we_ask_for_admits_every_manifest() {
        for text in [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST] {
            assert!(
                MANIFEST_ACCEPT.split(", ").any(|item| item == text),
                "{text}"
            );
        }
        assert!(MANIFEST_ACCEPT.ends_with(", */*"));
        assert!(!MANIFEST_ACCEPT.contains("  "));
    }

    #[test]
    fn accept() {
        let index = media_type(OCI_INDEX);
        for (header, admitted) in [
            (None, true),
            (Some(""), true),
            (Some(" , "), true),
            (Some("garbage"), true),
            (Some("*/*"), true),
            (Some("application/*"), true),
            (Some("text/*"), false),
            (Some("application/json"), false),
            (Some(OCI_MANIFEST), false),
            (Some(OCI_INDEX), true),
            (
                Some(
                    "application/json,\tAPPLICATION/vnd.oci.image.index.v1+json;q=0.5 , text/html",
                ),
                true,
            ),
            (
                Some("application/vnd.oci.image.index.v1+json;q=0, */*"),
                false,
            ),
            (
                Some("*/*, application/vnd.oci.image.index.v1+json ; Q = 0.000"),
                false,
            ),
            (
                Some("*/*;q=0, application/vnd.oci.image.index.v1+json"),
                true,
            ),
            (Some("*/*;q=0, application/*;q=0.1"), true),
            (Some("application/*;q=0, */*"), false),
            (Some("*/*;q=0"), false),
            (Some("*/*;q=0.001"), true),
            (Some("*/*;level=0"), true),
            (Some("garbage, text/html"), false),
        ] {
            assert_eq!(accepts(header, &index), admitted, "{header:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in any::<String>(), other in "[a-z*/,;=q0. ]{0,24}") {
            let index = media_type(OCI_INDEX);
            accepts(Some(&text), &index);
            accepts(Some(&other), &index);
            if let Ok(read) = MediaType::parse(&text) {
                prop_assert_eq!(MediaType::parse(read.as_str()), Ok(read));
            }
        }

        #[test]
        fn a_listed_type_is_admitted(before in "[a-z/, ]{0,12}", after in "[a-z/, ]{0,12}") {
            let header = format!("{before},{OCI_INDEX},{after}");
            prop_assert!(accepts(Some(&header), &media_type(OCI_INDEX)));
        }
    }
}
