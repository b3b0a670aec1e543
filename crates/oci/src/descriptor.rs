//! Descriptors: how a manifest names what belongs to it.
//!
//! A descriptor is read leniently: one that cannot be read is skipped by [`crate::ManifestView`], because the manifest's
//! bytes are served as they are and what is read here only serves to look ahead.

use std::fmt;

use crate::digest::AnyDigest;
use crate::json::Node;
use crate::media_type::MediaType;

/// A reference from a manifest to a blob or to another manifest. Its `urls` and `data` are never read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The digest of the content.
    pub digest: AnyDigest,
    /// The length of the content in bytes.
    pub size: u64,
    /// The type of the content, if it is said and legal.
    pub media_type: Option<MediaType>,
    /// What machine the content is for; found in an index.
    pub platform: Option<Platform>,
    /// What kind of artifact the content is; found in an index.
    pub artifact_type: Option<String>,
    /// Whether the content was made to be read in pieces: its annotations name a table of contents (zstd:chunked, eStargz, nydus).
    pub in_pieces: bool,
}

/// Annotations of a layer that clients read in pieces.
const IN_PIECES: [&str; 3] = [
    "io.github.containers.zstd-chunked.manifest-checksum",
    "containerd.io/snapshot/stargz/toc.digest",
    "containerd.io/snapshot/nydus-blob",
];

/// The machine an image is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Platform {
    /// The operating system, in Go's spelling.
    pub os: String,
    /// The processor, in Go's spelling.
    pub architecture: String,
    /// The processor's variant, such as `v8`.
    pub variant: Option<String>,
}

impl Descriptor {
    pub(crate) fn read(node: &Node) -> Option<Self> {
        Some(Self {
            digest: node.text("digest")?.parse().ok()?,
            size: node.number("size")?,
            media_type: node
                .text("mediatype")
                .and_then(|text| MediaType::parse(text).ok()),
            platform: node.get("platform").and_then(Platform::read),
            artifact_type: node.text("artifacttype").map(str::to_owned),
            in_pieces: node
                .get("annotations")
                .is_some_and(|notes| IN_PIECES.iter().any(|name| notes.text(name).is_some())),
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl Platform {
    /// Reads `os/architecture` or `os/architecture/variant`.
    pub fn parse(text: &str) -> Option<Self> {
        let legal = |part: &&str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            !part.is_empty() && part.bytes().all(plain)
        };
        let parts: Vec<&str> = text.split('/').filter(legal).collect();
        let slashes = text.matches('/').count();
        let (os, architecture, variant) = match *parts.as_slice() {
            [os, architecture] if slashes == 1 => (os, architecture, None),
            [os, architecture, variant] if slashes == 2 => (os, architecture, Some(variant)),
            _ => return None,
        };
        Some(Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        })
    }

    /// Whether `found` is what is meant: any variant, where this names none.
    pub fn covers(&self, found: &Self) -> bool {
        self.os == found.os
            && self.architecture == found.architecture
            && (self.variant.is_none() || self.variant == found.variant)
    }

    fn read(node: &Node) -> Option<Self> {
        Some(Self {
            os: node.text("os")?.to_owned(),
            architecture: node.text("architecture")?.to_owned(),
            variant: node.text("variant").map(str::to_owned),
        })
    }
}
