//! What the cache did for one request: one vocabulary for the `Cache-Status` header, the access line and the metric.

use std::fmt;

/// What the cache did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Served from this disk without asking the upstream.
    Hit,
    /// Not held: this request started the fetch, and the answer is kept.
    Miss,
    /// Not held: the upstream was asked, and what it said is passed on and not kept.
    Asked,
    /// Not held, but on its way: this request reads a fetch that another one started.
    Collapsed,
    /// Held; the upstream was asked and said that it still holds.
    Revalidated,
    /// Held and past its age; the upstream could not say, so the old answer was given.
    Stale(Why),
    /// Passed through without being kept.
    Bypass(Why),
    /// Answered without any content: errors, pings, listings of our own.
    None,
}

/// Why an answer is stale, or was passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// The upstream could not be reached or did not answer in time.
    Unreachable,
    /// The upstream answered 5xx.
    UpstreamError,
    /// The upstream's rate limit is used up.
    RateLimited,
    /// The upstream's token endpoint failed.
    TokenFailed,
    /// It has just come of age, and is being asked about meanwhile.
    Revalidating,
    /// The operator has switched asking off.
    Offline,
    /// What is left of the upstream's rate limit is kept for what is not held.
    Reserved,
    /// The upstream deleted the tag, and the operator wants it served on.
    Deleted,
    /// The digest's algorithm cannot be verified here.
    UnknownAlgorithm,
    /// Larger than `cache.max_blob`.
    TooLarge,
    /// The cache's disk cannot be written.
    Disk,
    /// The client's `Accept` differs from what the cache keeps.
    Accept,
    /// The client may have only what is held, so the upstream was not asked.
    OnlyHeld,
}

/// Whether a slice was sent before its blob's digest had been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Assurance {
    /// All of the blob's bytes hash to its digest.
    Verified,
    /// A closed range of a blob that is still being filled: the bytes may yet turn out wrong.
    Unverified,
}

impl Verdict {
    /// The word in metrics and log lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss | Self::Asked => "miss",
            Self::Collapsed => "collapsed",
            Self::Revalidated => "revalidated",
            Self::Stale(_) => "stale",
            Self::Bypass(_) => "bypass",
            Self::None => "none",
        }
    }

    /// The reason, where there is one.
    pub const fn why(self) -> Option<Why> {
        match self {
            Self::Stale(why) | Self::Bypass(why) => Some(why),
            Self::Hit
            | Self::Miss
            | Self::Asked
            | Self::Collapsed
            | Self::Revalidated
            | Self::None => None,
        }
    }

    /// The `Cache-Status` field of RFC 9211; nothing for answers that no cache had a part in.
    pub fn cache_status(self, assurance: Assurance) -> Option<String> {
        let parameters = match self {
            Self::Hit => "hit".to_owned(),
            Self::Miss => "fwd=uri-miss; stored".to_owned(),
            Self::Asked => "fwd=uri-miss".to_owned(),
            Self::Collapsed => "fwd=uri-miss; collapsed".to_owned(),
            Self::Revalidated => "hit; detail=revalidated".to_owned(),
            Self::Stale(why) => format!("fwd=stale; detail={}", why.as_str()),
            Self::Bypass(why) => format!("fwd=bypass; detail={}", why.as_str()),
            Self::None => return None,
        };
        let mark = match assurance {
            Assurance::Verified => "",
            Assurance::Unverified => "; detail=unverified",
        };
        Some(format!("oci-remote-cache; {parameters}{mark}"))
    }
}

impl Why {
    /// The word in headers, metrics and log lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::UpstreamError => "upstream-error",
            Self::RateLimited => "rate-limited",
            Self::TokenFailed => "token-failed",
            Self::Revalidating => "revalidating",
            Self::Offline => "offline",
            Self::Reserved => "reserved",
            Self::Deleted => "deleted",
            Self::UnknownAlgorithm => "unknown-algorithm",
            Self::TooLarge => "too-large",
            Self::Disk => "disk",
            Self::Accept => "accept",
            Self::OnlyHeld => "only-held",
        }
    }
}

impl Why {
    /// The reason in a stale answer's `Warning`, which podman shows to its user; none where nothing is amiss.
    pub const fn warning(self) -> Option<&'static str> {
        Some(match self {
            Self::Revalidating => return None,
            Self::Unreachable => "upstream unreachable",
            Self::UpstreamError => "the upstream fails",
            Self::RateLimited => "upstream rate-limited",
            Self::TokenFailed => "upstream token-failed",
            Self::Offline => "asking the upstream is switched off",
            Self::Reserved => "the upstream's rate limit is nearly used up",
            Self::Deleted => "the upstream has deleted this tag",
            Self::OnlyHeld => "this client gets only what is held",
            Self::UnknownAlgorithm | Self::TooLarge | Self::Disk | Self::Accept => self.as_str(),
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::{Assurance, Verdict, Why};

    #[test]
    fn cache_status_follows_rfc_9211() {
        let cases = [
            (Verdict::Hit, "oci-remote-cache; hit"),
            (Verdict::Miss, "oci-remote-cache; fwd=uri-miss; stored"),
            (Verdict::Asked, "oci-remote-cache; fwd=uri-miss"),
            (
                Verdict::Collapsed,
                "oci-remote-cache; fwd=uri-miss; collapsed",
            ),
            (
                Verdict::Revalidated,
                "oci-remote-cache; hit; detail=revalidated",
            ),
            (
                Verdict::Stale(Why::Unreachable),
                "oci-remote-cache; fwd=stale; detail=unreachable",
            ),
            (
                Verdict::Bypass(Why::TooLarge),
                "oci-remote-cache; fwd=bypass; detail=too-large",
            ),
        ];
        for (verdict, header) in cases {
            assert_eq!(
                verdict.cache_status(Assurance::Verified).as_deref(),
                Some(header)
            );
        }
        assert_eq!(Verdict::None.cache_status(Assurance::Verified), None);
    }
}
