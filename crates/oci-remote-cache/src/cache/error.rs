//! Why a request gets no content. `http/problem` turns each into a status in one exhaustive match.

use std::sync::Arc;

use oci::{AnyDigest, ErrorCode, ManifestError};

use crate::fill::FillError;
use crate::names::Source;
use crate::upstream::{Refused, UpstreamError};
use crate::verdict::Why;

/// What a request asked for, for the message and the specification's error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Thing {
    /// A manifest.
    Manifest,
    /// A blob.
    Blob,
    /// A repository's list of tags.
    Tags,
    /// A list of referrers.
    Referrers,
}

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CacheError {
    /// The upstream says that there is no such thing, or said so within `negative_ttl`.
    #[error("{source_} has no such {}", thing.as_str())]
    Unknown {
        /// What was asked for.
        thing: Thing,
        /// What the upstream called it, where that tells a client something.
        code: Option<ErrorCode>,
        /// Where.
        source_: Source,
    },
    /// The upstream refuses this repository to us.
    #[error("{source_}: the upstream {}", refusal(source_, *refused))]
    Denied {
        /// Which repository.
        source_: Source,
        /// To whom, where the upstream has just said so and it was not the client's own login.
        refused: Option<Refused>,
    },
    /// The upstream wants to know who this client is, or does not know the login it showed.
    #[error("{source_}: log in with your login at {}", source_.upstream)]
    LogIn {
        /// Which repository.
        source_: Source,
    },
    /// This client may have only what is held, and this is not.
    #[error("{source_}: this {} is not held here, and you may pull only what is", thing.as_str())]
    NotHeld {
        /// What was asked for.
        thing: Thing,
        /// Where.
        source_: Source,
    },
    /// There is nothing to take back.
    #[error("{source_}: this {} is not held here", thing.as_str())]
    NotKept {
        /// What was to be taken back.
        thing: Thing,
        /// Where.
        source_: Source,
    },
    /// Only the operator's credentials open this repository, and they are not everybody's.
    #[error(
        "{source_} is not public. This cache is open to everyone who can reach it, so it serves only what anyone may pull; \
         serve = \"all\" in [upstreams.\"{}\"] serves all that the credentials open",
        source_.upstream
    )]
    NotPublic {
        /// Which repository.
        source_: Source,
    },
    /// The upstream could not be asked, or answered nonsense.
    #[error(transparent)]
    Upstream(Arc<UpstreamError>),
    /// The blob's transfer failed.
    #[error(transparent)]
    Fill(FillError),
    /// What the upstream calls a manifest is none, or not one that can be passed on.
    #[error("{source_}: the upstream's manifest cannot be used: {why}")]
    BadManifest {
        /// Where it came from.
        source_: Source,
        /// What is wrong with it.
        why: ManifestError,
    },
    /// The bytes do not hash to what they were asked for, or announced, by.
    #[error("{source_}: the upstream sent a manifest that is not {wanted}")]
    WrongDigest {
        /// Where it came from.
        source_: Source,
        /// What was wanted.
        wanted: Box<AnyDigest>,
    },
    /// What the upstream calls a list is none.
    #[error("{source_}: the upstream's list of {} cannot be used: {why}", thing.listed())]
    BadList {
        /// Which list.
        thing: Thing,
        /// Where it came from.
        source_: Source,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No answer within the deadline.
    #[error("the upstream did not answer in time")]
    Late,
    /// The process is stopping.
    #[error("the cache is shutting down")]
    Stopping,
    /// The cache's own files failed and there was no way around them.
    #[error("the cache's own disk failed")]
    Disk,
}

impl Thing {
    /// The word in messages and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Blob => "blob",
            Self::Tags => "repository",
            Self::Referrers => "referrers",
        }
    }

    /// The specification's code for one that is missing.
    pub const fn code(self) -> ErrorCode {
        match self {
            Self::Manifest | Self::Referrers => ErrorCode::ManifestUnknown,
            Self::Blob => ErrorCode::BlobUnknown,
            Self::Tags => ErrorCode::NameUnknown,
        }
    }

    /// The code of an upstream's 404, if it is one that clients know for that: oras tells by it a repository that is missing from a
    /// registry that has no referrers.
    pub fn code_told(self, code: Option<&str>) -> Option<ErrorCode> {
        let code = ErrorCode::parse(code?)?;
        let is_list = matches!(self, Self::Tags | Self::Referrers);
        let fits = code == self.code()
            || code == ErrorCode::NameUnknown
            || (is_list && code == ErrorCode::Unsupported);
        fits.then_some(code)
    }

    /// The word for what a list holds.
    const fn listed(self) -> &'static str {
        match self {
            Self::Tags => "tags",
            Self::Manifest | Self::Blob | Self::Referrers => self.as_str(),
        }
    }
}

/// What an upstream refused, and the way out.
fn refusal(source: &Source, refused: Option<Refused>) -> String {
    let section = format!("[upstreams.\"{}\"]", source.upstream);
    match refused {
        None => "refuses access".to_owned(),
        Some(Refused::Anonymous) => format!(
            "refuses access to strangers, or has no such repository; `credentials` in {section} say who we are there"
        ),
        Some(Refused::Login) => format!("does not take the credentials of {section}"),
        Some(Refused::Rights) => {
            format!("refuses access to the credentials of {section}, or has no such repository")
        }
    }
}

impl From<UpstreamError> for CacheError {
    fn from(error: UpstreamError) -> Self {
        Self::Upstream(Arc::new(error))
    }
}

impl From<FillError> for CacheError {
    fn from(error: FillError) -> Self {
        Self::Fill(error)
    }
}

impl CacheError {
    /// The word for an upstream's silence, where what is held is served in its place.
    pub fn why(&self) -> Why {
        if let Self::Upstream(error) = self {
            error.why()
        } else if matches!(self, Self::BadList { .. }) {
            Why::UpstreamError
        } else {
            Why::Unreachable
        }
    }

    /// Whether the upstream gave no answer, so that what is held may be served past its age.
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Upstream(error) => error.is_outage(),
            // A page of HTML is what a proxy in between says when the registry is down.
            Self::Late | Self::BadList { .. } => true,
            Self::Unknown { .. }
            | Self::Denied { .. }
            | Self::LogIn { .. }
            | Self::NotPublic { .. }
            | Self::NotHeld { .. }
            | Self::NotKept { .. }
            | Self::Fill(_)
            | Self::BadManifest { .. }
            | Self::WrongDigest { .. }
            | Self::Stopping
            | Self::Disk => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use oci::ErrorCode;

    use super::Thing;

    #[test]
    fn only_codes_that_fit_a_404_are_kept() {
        for (thing, code, kept) in [
            (
                Thing::Manifest,
                "NAME_UNKNOWN",
                Some(ErrorCode::NameUnknown),
            ),
            (Thing::Manifest, "UNSUPPORTED", None),
            (Thing::Manifest, "UNKNOWN", None),
            (Thing::Blob, "BLOB_UNKNOWN", Some(ErrorCode::BlobUnknown)),
            (Thing::Blob, "MANIFEST_UNKNOWN", None),
            (Thing::Tags, "TOOMANYREQUESTS", None),
            (
                Thing::Referrers,
                "UNSUPPORTED",
                Some(ErrorCode::Unsupported),
            ),
            (Thing::Referrers, "UNAUTHORIZED", None),
        ] {
            assert_eq!(thing.code_told(Some(code)), kept, "{thing:?} {code}");
        }
        assert_eq!(Thing::Blob.code_told(None), None);
    }
}
