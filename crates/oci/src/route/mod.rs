//! Request paths: which endpoint of the distribution specification is meant, and for what.
//!
//! Repositories may be called `a/blobs/b`, `manifests` or `tags/list`, so a path is read from its right end. Percent
//! escapes are decoded once, and only those that can occur in a legal path. Every path is either read whole or refused;
//! none is normalised. Methods, and which upstream a name belongs to, are the caller's business.

mod page;

use std::borrow::Cow;

use crate::descriptor::Platform;
use crate::digest::{AnyDigest, DigestError};
use crate::error::ErrorCode;
use crate::name::{NameError, NamePath, is_key};
use crate::reference::{Reference, ReferenceError};

pub use self::page::Page;

/// Longest `ns` and `artifactType`.
const VALUE_LIMIT: usize = 256;

/// What a request path asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The key in `/<key>/v2/…`: Docker and containerd put a mirror's path in front.
    pub prefix: Option<String>,
    /// The `ns` parameter: the registry that containerd means when it asks a mirror.
    pub namespace: Option<String>,
    /// The endpoint.
    pub target: Target,
}

/// An endpoint of the distribution specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The ping, `/v2/`.
    Base,
    /// A manifest.
    Manifest {
        /// Where.
        name: NamePath,
        /// By what.
        reference: Reference,
    },
    /// A blob.
    Blob {
        /// Where.
        name: NamePath,
        /// Which.
        digest: AnyDigest,
    },
    /// The list of tags.
    Tags {
        /// Where.
        name: NamePath,
        /// What part of the list.
        page: Page,
    },
    /// The manifests that refer to one.
    Referrers {
        /// Where.
        name: NamePath,
        /// The manifest referred to.
        digest: AnyDigest,
        /// The kind of artifact wanted.
        artifact_type: Option<String>,
        /// What part of the list.
        page: Page,
    },
    /// Our extension: have an image fetched (`/v2/<name>/_oci-remote-cache/warm/<reference>`).
    Warm {
        /// Where.
        name: NamePath,
        /// What.
        reference: Reference,
        /// Of an index, what is for this.
        platform: Option<Platform>,
        /// Whether the client waits for the end.
        wait: bool,
    },
    /// The list of repositories.
    Catalog {
        /// What part of the list.
        page: Page,
    },
}

/// Why a path is no route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// The path does not lie below `/v2/`.
    #[error("this path is not part of the registry API, which lies below /v2/")]
    NotApi,
    /// The path starts with `/v2/v2/`, as containerd makes it from a host with a path and no `override_path`.
    #[error(
        "the path holds /v2 twice: probably override_path is missing or wrong in the client's hosts.toml"
    )]
    DoubledV2,
    /// The path lies below `/v2/` but is no endpoint.
    #[error("the registry API has no such endpoint")]
    Unknown,
    /// The name is illegal.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The tag is illegal.
    #[error(transparent)]
    Tag(ReferenceError),
    /// The digest is illegal.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// The page parameters are illegal.
    #[error("cannot page by {0}")]
    Page(String),
    /// The path or a parameter is written in a way that is never needed.
    #[error("cannot read the request: {0}")]
    Encoding(String),
}

impl Route {
    /// Reads a request path and query, both as they stand in the request line.
    pub fn parse(path: &str, query: Option<&str>) -> Result<Self, RouteError> {
        let (prefix, rest) = split_prefix(path).ok_or(RouteError::NotApi)?;
        let rest = decode_path(rest)?;
        let query = Query(query.unwrap_or_default());
        let target = Target::read(&rest, query)?;
        Ok(Self {
            prefix,
            namespace: query.text("ns", VALUE_LIMIT)?,
            target,
        })
    }
}

impl Target {
    fn read(rest: &str, query: Query<'_>) -> Result<Self, RouteError> {
        match rest {
            "" => return Ok(Self::Base),
            "_catalog" => {
                let page = Page::known(query)?;
                return Ok(Self::Catalog { page });
            }
            _ => {}
        }
        let (name, verb, last) = split_end(rest).ok_or_else(|| no_endpoint(rest))?;
        // No repository's name has a segment that begins so, as the specification wants of extensions.
        let name = match (verb, last) {
            ("manifests" | "blobs" | "referrers", _) | ("tags", "list") => Some(name),
            ("warm", _) => name.strip_suffix("/_oci-remote-cache"),
            _ => None,
        };
        let name = name.ok_or_else(|| no_endpoint(rest))?;
        // A repository called plain `v2` can be asked for; one below `v2/` cannot be told from the mistake.
        if name.starts_with("v2/") {
            return Err(RouteError::DoubledV2);
        }
        let name = name.parse()?;
        match verb {
            "manifests" => Ok(Self::Manifest {
                name,
                reference: read_reference(last)?,
            }),
            "blobs" => Ok(Self::Blob {
                name,
                digest: last.parse()?,
            }),
            "referrers" => Ok(Self::Referrers {
                name,
                digest: last.parse()?,
                artifact_type: query.text("artifactType", VALUE_LIMIT)?,
                page: Page::of(query)?,
            }),
            "warm" => Ok(Self::Warm {
                name,
                reference: read_reference(last)?,
                platform: query.platform()?,
                wait: query.raw("wait") == Some("true"),
            }),
            _ => Ok(Self::Tags {
                name,
                page: Page::of(query)?,
            }),
        }
    }
}

impl RouteError {
    /// The code for the error body.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NotApi | Self::Unknown => ErrorCode::Unsupported,
            Self::DoubledV2 => ErrorCode::NameUnknown,
            Self::Name(_) | Self::Encoding(_) => ErrorCode::NameInvalid,
            Self::Tag(_) => ErrorCode::ManifestUnknown,
            Self::Digest(_) => ErrorCode::DigestInvalid,
            Self::Page(_) => ErrorCode::PageInvalid,
        }
    }

    /// The status to answer with. A tag that is illegal cannot exist, and 404 is what clients probing for tags expect.
    pub fn status(&self) -> u16 {
        match self {
            Self::NotApi | Self::DoubledV2 | Self::Unknown | Self::Tag(_) => 404,
            Self::Name(_) | Self::Digest(_) | Self::Page(_) | Self::Encoding(_) => 400,
        }
    }
}

/// Splits `/v2/<rest>` and `/<key>/v2/<rest>`; `/v2` without a slash is pinged too.
fn split_prefix(path: &str) -> Option<(Option<String>, &str)> {
    let path = path.strip_prefix('/')?;
    if let Some(rest) = below_v2(path) {
        return Some((None, rest));
    }
    let (key, path) = path.split_once('/')?;
    let rest = below_v2(path)?;
    let key = decode_path(key).ok()?;
    is_key(&key).then(|| (Some(key.into_owned()), rest))
}

fn below_v2(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("v2")?;
    if rest.is_empty() {
        Some(rest)
    } else {
        rest.strip_prefix('/')
    }
}

/// Splits off the last two segments: `<name>/<verb>/<last>`.
fn split_end(rest: &str) -> Option<(&str, &str, &str)> {
    let (head, last) = rest.rsplit_once('/')?;
    let (name, verb) = head.rsplit_once('/')?;
    Some((name, verb, last))
}

fn no_endpoint(rest: &str) -> RouteError {
    if below_v2(rest).is_some() {
        RouteError::DoubledV2
    } else {
        RouteError::Unknown
    }
}

fn read_reference(text: &str) -> Result<Reference, RouteError> {
    text.parse().map_err(|error| match error {
        ReferenceError::Digest(error) => RouteError::Digest(error),
        error @ (ReferenceError::TagEmpty
        | ReferenceError::TagTooLong
        | ReferenceError::TagCharacter(_)) => RouteError::Tag(error),
    })
}

/// A raw query; read by scanning, since most requests carry `ns` at most.
#[derive(Clone, Copy)]
struct Query<'a>(&'a str);

impl<'a> Query<'a> {
    fn pairs(self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.split('&').filter_map(|pair| pair.split_once('='))
    }

    /// The first value of this name, raw; empty counts as absent.
    fn raw(self, name: &str) -> Option<&'a str> {
        self.pairs()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
            .filter(|value| !value.is_empty())
    }

    fn text(self, name: &str, limit: usize) -> Result<Option<String>, RouteError> {
        let Some(raw) = self.raw(name) else {
            return Ok(None);
        };
        decode_value(raw, limit)
            .map(Some)
            .ok_or_else(|| RouteError::Encoding(format!("illegal value of `{name}`")))
    }

    fn platform(self) -> Result<Option<Platform>, RouteError> {
        let illegal = || {
            let form = "os/architecture or os/architecture/variant, such as linux/arm64";
            RouteError::Encoding(format!("illegal value of `platform`: it is {form}"))
        };
        let text = self.text("platform", VALUE_LIMIT)?;
        text.map(|text| Platform::parse(&text).ok_or_else(illegal))
            .transpose()
    }
}

/// Decodes a path once. `%3A` occurs in digests, and unreserved characters mean the same when escaped (RFC 3986,
/// section 2.3); nothing else is ever escaped in a legal path.
fn decode_path(text: &str) -> Result<Cow<'_, str>, RouteError> {
    if !text.contains('%') {
        return Ok(Cow::Borrowed(text));
    }
    unescape(text, is_path_byte)
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .map(Cow::Owned)
        .ok_or_else(|| {
            RouteError::Encoding(
                "the path holds a percent escape that no legal path needs".to_owned(),
            )
        })
}

/// Decodes a query value. A plus stays a plus: no legal value holds a space, while media types do hold pluses.
fn decode_value(raw: &str, limit: usize) -> Option<String> {
    let text = String::from_utf8(unescape(raw, |_| true)?).ok()?;
    (text.len() <= limit && !text.chars().any(char::is_control)).then_some(text)
}

fn is_path_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b':')
}

/// Whether every percent sign begins an escape.
fn is_escaped(text: &str) -> bool {
    unescape(text, |_| true).is_some()
}

fn unescape(text: &str, admits: fn(u8) -> bool) -> Option<Vec<u8>> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (code, plain) = part.split_at_checked(2)?;
        let digits = code.bytes().all(|byte| byte.is_ascii_hexdigit());
        let byte = u8::from_str_radix(code, 16)
            .ok()
            .filter(|byte| digits && admits(*byte))?;
        bytes.push(byte);
        bytes.extend_from_slice(plain.as_bytes());
    }
    Some(bytes)
}

#[cfg(test)]
mod tests;
