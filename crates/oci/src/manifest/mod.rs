//! A read-only look into manifests, and the judgement whether one may be cached at all.
//!
//! The raw bytes are the truth: they are stored and served as they came. This view only says what they are and what
//! they name. It neither edits nor writes manifests.

use crate::descriptor::Descriptor;
use crate::json::Node;
use crate::media_type::{Kind, MediaType, OCI_INDEX, OCI_MANIFEST};

/// Largest manifest taken: 4 MiB, which registries must accept and at which clients stop.
pub const MANIFEST_LIMIT: usize = 4 << 20;

/// Blobs named by one manifest that are looked at.
const BLOB_LIMIT: usize = 10_000;

/// What a manifest is and names.
#[derive(Clone, Debug)]
pub struct ManifestView {
    media_type: MediaType,
    children: Vec<Descriptor>,
    blobs: Vec<Descriptor>,
    subject: Option<Descriptor>,
    artifact_type: Option<String>,
}

/// Why a body is not taken as a manifest. In every case the fault is upstream's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The body is over the limit.
    #[error("manifest is larger than {MANIFEST_LIMIT} bytes")]
    TooLarge,
    /// The body is not a JSON object; often an error page sent with status 200.
    #[error("manifest is not a JSON object")]
    NotJson,
    /// Two clients could read two different things from it (CVE-2021-41190).
    #[error("manifest could be read in more than one way")]
    Ambiguous,
    /// The body says that it is something else than its `Content-Type` says.
    #[error("manifest came as {declared} but says that it is {found}")]
    TypeMismatch {
        /// The `Content-Type`.
        declared: String,
        /// The body's `mediaType`.
        found: String,
    },
    /// The `Content-Type` is not one that manifests have.
    #[error("manifest came with the unusable type {0:?}")]
    UnusableType(String),
    /// Docker's first format: its digest is not that of its bytes, so it cannot be cached.
    #[error("manifest is of Docker's schema 1, which is not supported")]
    Schema1,
}

impl ManifestView {
    /// Reads and judges a manifest body beside the `Content-Type` it came with.
    ///
    /// Types that this crate does not know are taken as they are, as long as they are JSON and not contradictory.
    pub fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Self, ManifestError> {
        if bytes.len() > MANIFEST_LIMIT {
            return Err(ManifestError::TooLarge);
        }
        let declared = declared_type(content_type)?;
        let body = read_object(bytes)?;
        let media_type = agreed_type(declared, &body, content_type)?;
        check_shape(media_type.kind(), &body)?;
        let blobs = body
            .get("config")
            .into_iter()
            .chain(body.list("layers"))
            .chain(body.list("blobs"));
        Ok(Self {
            children: body
                .list("manifests")
                .iter()
                .filter_map(Descriptor::read)
                .collect(),
            blobs: blobs
                .filter_map(Descriptor::read)
                .take(BLOB_LIMIT)
                .collect(),
            subject: body.get("subject").and_then(Descriptor::read),
            artifact_type: body.text("artifacttype").map(str::to_owned),
            media_type,
        })
    }

    /// The same under another type, by which it is known already.
    #[must_use]
    pub fn as_type(self, media_type: MediaType) -> Self {
        Self { media_type, ..self }
    }

    /// The type to serve the manifest as.
    pub fn media_type(&self) -> &MediaType {
        &self.media_type
    }

    /// The manifests that an index names.
    pub fn children(&self) -> &[Descriptor] {
        &self.children
    }

    /// The config and layers that an image names, or the blobs of an artifact; at most 10 000.
    pub fn blobs(&self) -> &[Descriptor] {
        &self.blobs
    }

    /// The manifest that this one refers to.
    pub fn subject(&self) -> Option<&Descriptor> {
        self.subject.as_ref()
    }

    /// What kind of artifact this is, if it says so.
    pub fn artifact_type(&self) -> Option<&str> {
        self.artifact_type.as_deref()
    }
}

/// The `Content-Type`, or `None` where it says nothing: Red Hat's registry has sent `text/plain`.
fn declared_type(content_type: Option<&str>) -> Result<Option<MediaType>, ManifestError> {
    let text = content_type.map(str::trim).filter(|text| !text.is_empty());
    let Some(text) = text else { return Ok(None) };
    let media_type = read_type(text)?;
    if media_type.as_str() == "text/plain" {
        return Ok(None);
    }
    usable(media_type).map(Some)
}

fn read_type(text: &str) -> Result<MediaType, ManifestError> {
    MediaType::parse(text)
        .ok()
        .ok_or_else(|| ManifestError::UnusableType(shortened(text)))
}

fn usable(media_type: MediaType) -> Result<MediaType, ManifestError> {
    if media_type.kind() == Kind::Schema1 {
        return Err(ManifestError::Schema1);
    }
    if !media_type.is_json() {
        return Err(ManifestError::UnusableType(media_type.as_str().to_owned()));
    }
    Ok(media_type)
}

fn read_object(bytes: &[u8]) -> Result<Node, ManifestError> {
    match Node::read(bytes) {
        Ok(node @ Node::Object(_)) => Ok(node),
        Ok(Node::Repeated) => Err(ManifestError::Ambiguous),
        Ok(Node::Null | Node::Text(_) | Node::Number(_) | Node::List(_) | Node::Other) | Err(_) => {
            Err(ManifestError::NotJson)
        }
    }
}

/// The one type that header and body agree on.
fn agreed_type(
    declared: Option<MediaType>,
    body: &Node,
    content_type: Option<&str>,
) -> Result<MediaType, ManifestError> {
    let found = match body.get("mediatype") {
        None => None,
        Some(Node::Text(text)) if text.is_empty() => None,
        Some(Node::Text(text)) => Some(text.as_str()),
        Some(_) => return Err(ManifestError::Ambiguous),
    };
    let generic = declared
        .as_ref()
        .is_none_or(|declared| declared.as_str() == "application/json");
    if generic && found.is_none() && body.get("fslayers").is_some() {
        return Err(ManifestError::Schema1);
    }
    match (declared, found) {
        (None, None) => Err(ManifestError::UnusableType(shortened(
            content_type.unwrap_or("none"),
        ))),
        (Some(declared), None) => Ok(by_shape(declared, body)),
        (None, Some(found)) => read_type(found).and_then(usable),
        (Some(declared), Some(found))
            if MediaType::parse(found).is_ok_and(|found| found == declared) =>
        {
            Ok(declared)
        }
        (Some(declared), Some(found)) => Err(ManifestError::TypeMismatch {
            declared: declared.as_str().to_owned(),
            found: shortened(found),
        }),
    }
}

/// The type of a body that does not say it. The header's counts where it is one that clients know. Other words are not of the manifest, but
/// of who sent it, and anyone may send the same bytes under other ones: then its shape decides.
fn by_shape(declared: MediaType, body: &Node) -> MediaType {
    let shape = if matches!(declared.kind(), Kind::Image | Kind::Index) {
        None
    } else if body.get("config").is_some() && body.get("layers").is_some() {
        Some(OCI_MANIFEST)
    } else if body.get("manifests").is_some() {
        Some(OCI_INDEX)
    } else {
        None
    };
    let known = shape.and_then(|shape| MediaType::parse(shape).ok());
    known.unwrap_or(declared)
}

/// Refuses bodies that hold the fields of two formats, as clients must since CVE-2021-41190.
fn check_shape(kind: Kind, body: &Node) -> Result<(), ManifestError> {
    let has = |field| body.get(field).is_some();
    let ambiguous = match kind {
        Kind::Index => has("layers") || has("config") || has("fslayers"),
        Kind::Image => has("manifests") || has("fslayers"),
        Kind::Schema1 | Kind::Other => has("manifests") && has("layers"),
    };
    if ambiguous {
        Err(ManifestError::Ambiguous)
    } else {
        Ok(())
    }
}

/// Text from upstream that goes into an error and hence a log line.
fn shortened(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
mod tests;
