//! The words of the OCI specifications: digests, names, references, media types, manifests, routes, ranges, challenges.
//!
//! Everything here is a value: parsed once at the door, carried as a type afterwards. There is no I/O, no clock and no
//! policy in this crate; what to do with a digest or a challenge is the caller's business.

pub mod challenge;
pub mod descriptor;
pub mod digest;
pub mod error;
mod field;
mod json;
pub mod link;
pub mod manifest;
pub mod media_type;
pub mod name;
pub mod range;
pub mod reference;
pub mod route;
pub mod warning;

pub use challenge::{Bearer, Challenge, Scope, pull_scope};
pub use descriptor::{Descriptor, Platform};
pub use digest::{Algorithm, AnyDigest, Digest, DigestError, ForeignDigest, Hasher};
pub use error::{ErrorCode, error_body, first_error_code};
pub use link::next_link;
pub use manifest::{MANIFEST_LIMIT, ManifestError, ManifestView};
pub use media_type::{
    DOCKER_LIST, DOCKER_MANIFEST, Kind, MANIFEST_ACCEPT, MediaType, MediaTypeError, OCI_ARTIFACT,
    OCI_INDEX, OCI_MANIFEST, OCTET_STREAM, SCHEMA1, SCHEMA1_SIGNED, accepts,
};
pub use name::{NameError, NamePath, RepositoryName};
pub use range::{ContentRange, RangeHeader, RangeSpec, Resolved, Slice};
pub use reference::{Reference, ReferenceError, Tag};
pub use route::{Page, Route, RouteError, Target};
pub use warning::Warning;
