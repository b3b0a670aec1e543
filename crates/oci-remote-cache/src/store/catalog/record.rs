//! What the catalog remembers, as values: each is a row, or a change of rows.

use oci::{Digest, MediaType, Tag};

use super::super::publish::FileIdentity;
use crate::clock::Timestamp;
use crate::names::{CredentialId, Source};

/// A blob file that was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobRecord {
    /// Its name.
    pub digest: Digest,
    /// What the file was like when it was known to be right.
    pub identity: FileIdentity,
    /// When it was last asked for.
    pub last_used: Timestamp,
}

/// A spool that was verified but not yet published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingRecord {
    /// What its bytes hash to.
    pub digest: Digest,
    /// How many bytes there are.
    pub size: u64,
    /// The file's name in the spool folder.
    pub spool_name: String,
}

/// Whether a digest stands for a blob or for a manifest of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A layer or configuration.
    Blob,
    /// A manifest or index.
    Manifest,
}

/// How it is known that a repository holds a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Proof {
    /// The upstream sent the bytes for this repository.
    Delivered,
    /// The upstream said so, in answer to a HEAD.
    Vouched,
}

/// A repository holds a digest, shown to a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The repository.
    pub source: Source,
    /// What it holds.
    pub digest: Digest,
    /// As what.
    pub kind: Kind,
    /// Who was shown it.
    pub credential: CredentialId,
    /// How.
    pub proof: Proof,
}

/// What is known of a manifest beside its bytes, which are a blob file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestRecord {
    /// The type it was delivered with.
    pub media_type: MediaType,
    /// Its length in bytes.
    pub size: u64,
}

/// What a tag meant when the upstream was last asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagRecord {
    /// The repository.
    pub source: Source,
    /// The tag.
    pub tag: Tag,
    /// The manifest it names.
    pub digest: Digest,
    /// That manifest's type.
    pub media_type: MediaType,
    /// That manifest's length in bytes.
    pub size: u64,
    /// When the upstream was last asked.
    pub checked: Timestamp,
    /// When it was first seen to name this digest. Counts only when the digest is new: else the earlier time stays.
    pub first_seen: Timestamp,
    /// Whether the upstream has deleted the tag.
    pub suspended: bool,
}

/// A time during which a tag named one digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagEra {
    /// The manifest it named.
    pub digest: Digest,
    /// When that was first seen.
    pub first_seen: Timestamp,
    /// When that was last seen.
    pub last_seen: Timestamp,
    /// Whether the upstream deleted the tag at its end.
    pub deleted: bool,
}

/// Something a repository is known to hold, with what is known of it: for listings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The membership.
    pub membership: Membership,
    /// Length in bytes, where the blob is stored or a manifest's record tells.
    pub size: Option<u64>,
    /// A manifest's type.
    pub media_type: Option<MediaType>,
    /// When it was last asked for; `None` when it is not stored now.
    pub last_used: Option<Timestamp>,
}

/// One thing to write down. All changes of one `Catalog::record` are committed together or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A blob was published, or proven anew.
    Blob(BlobRecord),
    /// A spool was verified.
    Pending(PendingRecord),
    /// A spool that was verified is gone, or was not what it should be.
    Abandon(Digest),
    /// A blob is gone. What repositories hold, and manifests' types, stay known.
    Forget(Digest),
    /// A blob was asked for.
    Used(Digest, Timestamp),
    /// A repository holds a digest.
    Membership(Membership),
    /// A manifest's type and length became known.
    Manifest(Digest, ManifestRecord),
    /// A tag was looked up.
    Tag(Box<TagRecord>),
    /// A tag is taken back; its history stays.
    Untag(Source, Tag),
    /// A repository holds a digest no longer; if it was a manifest, its tags are taken back too.
    Revoke(Source, Digest, Kind),
    /// The upstream refused a repository to a credential.
    Suspend(Source, CredentialId, Timestamp),
    /// The upstream opened a repository to a credential again.
    Lift(Source, CredentialId),
    /// The upstream showed a repository to nobody in particular.
    Public(Source, Timestamp),
    /// The upstream refused a repository to nobody in particular.
    NotPublic(Source),
}
