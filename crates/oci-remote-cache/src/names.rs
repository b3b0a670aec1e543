//! The keys every floor shares: which upstream, whose credential, which repository.
//!
//! They are parsed once (configuration, `policy/namespace`) and only carried from there on. Nothing here decides.

use std::fmt;
use std::sync::Arc;

use oci::{Digest, RepositoryName};

/// What one client's own login begins with, and what all of them are called. Configured ones begin with `user:`.
const CLIENT: &str = "client:";
const CLIENTS: &str = "clients";

/// An upstream by its configured key, for example `docker.io`. Never a dial target: the configuration says where it leads.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpstreamId(Arc<str>);

/// Whose rights an upstream answer was given for: nobody's, or a configured credential's.
///
/// The text names the credential (its user name) and is no secret; it is stored beside membership and access records.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CredentialId(Arc<str>);

/// One repository of one upstream: what membership, access and tags are recorded for.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Source {
    /// Where the repository lives.
    pub upstream: UpstreamId,
    /// Its name as the upstream knows it (with `library/` where that applies).
    pub repository: RepositoryName,
}

impl UpstreamId {
    /// The upstream with this configured key.
    pub fn new(key: &str) -> Self {
        Self(Arc::from(key))
    }

    /// The key as configured.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl CredentialId {
    /// No credential: what such an answer shows, anyone may see.
    pub fn anonymous() -> Self {
        Self(Arc::from(""))
    }

    /// The credential configured with this user name.
    pub fn configured(username: &str) -> Self {
        Self(Arc::from(format!("user:{username}").as_str()))
    }

    /// A client's own login, by a hash of it that only this process can make. It keys tokens and proofs, in memory only.
    pub fn client(mark: &Digest) -> Self {
        Self(Arc::from(format!("{CLIENT}{}", mark.hex()).as_str()))
    }

    /// All clients' own logins, as records name them: which one it was is settled anew for each request.
    pub fn clients() -> Self {
        Self(Arc::from(CLIENTS))
    }

    /// The credential as records may name it.
    #[must_use]
    pub fn recorded(self) -> Self {
        if self.is_client() {
            Self::clients()
        } else {
            self
        }
    }

    /// The credential that a record names: what [`CredentialId::as_str`] once wrote.
    pub fn from_record(text: &str) -> Self {
        Self(Arc::from(text))
    }

    /// Whether this is one client's own login.
    pub fn is_client(&self) -> bool {
        self.0.starts_with(CLIENT)
    }

    /// The credential as it is written to the catalog; empty for anonymous.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether answers under this credential are open to everyone.
    pub fn is_anonymous(&self) -> bool {
        self.0.is_empty()
    }
}

impl Source {
    /// The repository `repository` of `upstream`.
    pub fn new(upstream: UpstreamId, repository: RepositoryName) -> Self {
        Self {
            upstream,
            repository,
        }
    }
}

impl fmt::Display for UpstreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for UpstreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for CredentialId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_anonymous() {
            "anonymous"
        } else {
            &self.0
        })
    }
}

impl fmt::Debug for CredentialId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.upstream, self.repository)
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
