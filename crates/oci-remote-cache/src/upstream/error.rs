//! What can go wrong with an upstream, in words: what was being done, to what, and whose fault it was.
//!
//! Nothing here decides about trying again (`retry.rs`) or about a client's status (the doors do). Texts never hold a URL's query or
//! user information: signed URLs are bearer secrets.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::heads;
use crate::names::UpstreamId;
use crate::verdict::Why;

/// An upstream that gave no usable answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} from {}: {fault}", By(upstream, *place))]
pub struct UpstreamError {
    upstream: UpstreamId,
    what: String,
    fault: Fault,
    retry_after: Option<Duration>,
    /// Who gave it: 0 is the upstream's URL, n its nth mirror.
    place: usize,
}

/// Whose fault it was, and what kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No connection.
    Connect(String),
    /// No response headers in time.
    Late,
    /// The connection broke, the body ended early, or the answer cannot be read.
    Broken(String),
    /// The body came too slowly.
    Stalled,
    /// A status that is no answer: 5xx and 408 after retries, or one that nobody expects here.
    Status(u16),
    /// 429, or the gate that an earlier 429 closed.
    RateLimited {
        /// When to ask again.
        retry_after: Duration,
    },
    /// Too many failures in a row: the upstream is left alone for a moment.
    BreakerOpen {
        /// When to ask again.
        retry_after: Duration,
    },
    /// 401 or 403, from the registry or from its token endpoint, after all that can be tried was tried.
    Denied {
        /// The status that was the last word.
        status: u16,
        /// The code in the registry's error body.
        code: Option<String>,
        /// Who was denied it.
        refused: Refused,
    },
    /// 404 or 410.
    NotFound {
        /// The code in the registry's error body.
        code: Option<String>,
    },
    /// 416: the range does not lie in the blob.
    RangeRefused,
    /// The content host refused the registry's signed URL, and refused a fresh one too.
    Expired,
    /// A redirect that cannot or must not be followed.
    BadRedirect(String),
    /// The upstream led to a place that the operator did not allow.
    Forbidden(String),
    /// The token endpoint could not be reached, failed, or answered nonsense.
    TokenFailed(String),
    /// The body is larger than its kind may be.
    TooLarge,
    /// The body is encoded, though only `identity` was asked for.
    Encoded(String),
    /// The operator has switched asking off.
    Offline,
}

/// Whom an upstream denies access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refused {
    /// Anyone: we came without a credential.
    Anonymous,
    /// Us: it does not take our own credential, whatever is asked for.
    Login,
    /// Us: it knows our credential, which does not open this.
    Rights,
}

/// An upstream that cannot be set up as configured.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The `ca_file` cannot be read.
    #[error("cannot read ca_file {path}")]
    ReadCa {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The `ca_file` holds no usable certificate.
    #[error("ca_file {path} holds no certificate in PEM form")]
    BadCa {
        /// The file.
        path: PathBuf,
    },
    /// A URL is not one of a registry.
    #[error("`{url}` is not the URL of a registry: {why}")]
    BadUrl {
        /// The URL without query and user information.
        url: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The `user_agent` cannot be sent as a header.
    #[error("the user agent cannot be sent as a header")]
    BadUserAgent,
}

/// A fault on its way up, before anyone knows which request it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) fault: Fault,
    /// What the other side said about when to come back.
    pub(super) retry_after: Option<Duration>,
}

impl UpstreamError {
    pub(super) fn new(upstream: UpstreamId, what: String, failure: Failure) -> Self {
        Self {
            upstream,
            what,
            retry_after: failure.retry_after,
            fault: failure.fault,
            place: 0,
        }
    }

    /// The same, given by the upstream's nth mirror where `place` is not 0.
    pub(super) fn at(self, place: usize) -> Self {
        Self { place, ..self }
    }

    /// Which upstream.
    pub fn upstream(&self) -> &UpstreamId {
        &self.upstream
    }

    /// What was asked of it, for example `GET manifests/latest of library/alpine`.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// What went wrong.
    pub fn fault(&self) -> &Fault {
        &self.fault
    }

    /// Whether this is no answer at all, so that what is held may be served past its age. That a mirror lacks something is none: it may lag
    /// behind the upstream, which did not answer.
    pub fn is_outage(&self) -> bool {
        self.fault.is_outage() || self.is_gap_of_mirror()
    }

    /// Whether a mirror has no such thing, and the upstream itself was not heard.
    pub fn is_gap_of_mirror(&self) -> bool {
        self.place > 0 && matches!(self.fault, Fault::NotFound { .. })
    }

    /// Whether the same question without a range may be answered: something was, or may have been, said to this one.
    pub fn may_be_of_a_range(&self) -> bool {
        match self.fault {
            Fault::Broken(_)
            | Fault::Status(_)
            | Fault::RateLimited { .. }
            | Fault::BreakerOpen { .. }
            | Fault::Denied { .. }
            | Fault::NotFound { .. }
            | Fault::RangeRefused
            | Fault::Expired
            | Fault::TooLarge
            | Fault::Encoded(_) => true,
            Fault::Connect(_)
            | Fault::Late
            | Fault::Stalled
            | Fault::BadRedirect(_)
            | Fault::Forbidden(_)
            | Fault::TokenFailed(_)
            | Fault::Offline => false,
        }
    }

    /// The reason in the vocabulary of verdicts.
    pub fn why(&self) -> Why {
        self.fault.why()
    }

    /// When to ask again, where the upstream or our own care for it says so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self.fault {
            Fault::RateLimited { retry_after } | Fault::BreakerOpen { retry_after } => {
                Some(retry_after)
            }
            Fault::Connect(_)
            | Fault::Late
            | Fault::Broken(_)
            | Fault::Stalled
            | Fault::Status(_)
            | Fault::Denied { .. }
            | Fault::NotFound { .. }
            | Fault::RangeRefused
            | Fault::Expired
            | Fault::BadRedirect(_)
            | Fault::Forbidden(_)
            | Fault::TokenFailed(_)
            | Fault::TooLarge
            | Fault::Encoded(_)
            | Fault::Offline => self.retry_after,
        }
    }
}

impl Fault {
    /// Whether this is no answer at all.
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Connect(_)
            | Self::Late
            | Self::Broken(_)
            | Self::Stalled
            | Self::RateLimited { .. }
            | Self::BreakerOpen { .. }
            | Self::Expired
            | Self::Offline
            | Self::TokenFailed(_) => true,
            Self::Status(status) => *status >= 500 || *status == 408,
            Self::Denied { .. }
            | Self::NotFound { .. }
            | Self::RangeRefused
            | Self::BadRedirect(_)
            | Self::Forbidden(_)
            | Self::TooLarge
            | Self::Encoded(_) => false,
        }
    }

    /// Whether it may be the method that was refused, where that was HEAD.
    pub fn is_of_head(&self) -> bool {
        matches!(self, Self::Status(status) if heads::is_refusal(*status))
    }

    fn why(&self) -> Why {
        match self {
            Self::Connect(_)
            | Self::Late
            | Self::Broken(_)
            | Self::Stalled
            | Self::BreakerOpen { .. } => Why::Unreachable,
            Self::RateLimited { .. } => Why::RateLimited,
            Self::TokenFailed(_) => Why::TokenFailed,
            Self::Offline => Why::Offline,
            Self::TooLarge => Why::TooLarge,
            Self::Status(_)
            | Self::Denied { .. }
            | Self::NotFound { .. }
            | Self::RangeRefused
            | Self::Expired
            | Self::BadRedirect(_)
            | Self::Forbidden(_)
            | Self::Encoded(_) => Why::UpstreamError,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(why) => write!(f, "cannot connect: {why}"),
            Self::Late => f.write_str("no answer in time"),
            Self::Broken(why) => write!(f, "the answer broke off or cannot be read: {why}"),
            Self::Stalled => f.write_str("the body came too slowly"),
            Self::Status(status) => write!(f, "it answered {status}"),
            Self::RateLimited { retry_after } => {
                write!(f, "its rate limit is used up for {}", Wait(*retry_after))
            }
            Self::BreakerOpen { retry_after } => {
                let wait = Wait(*retry_after);
                write!(f, "it failed too often in a row, asking again in {wait}")
            }
            Self::Denied {
                status,
                code,
                refused,
            } => {
                let code = Code(code.as_deref());
                write!(f, "it {refused} ({status}{code})")
            }
            Self::NotFound { code } => write!(f, "it has no such thing{}", Code(code.as_deref())),
            Self::RangeRefused => f.write_str("it says the range lies outside the content"),
            Self::Expired => f.write_str("its content host refused two signed URLs in a row"),
            Self::BadRedirect(why) => write!(f, "it sent a redirect that {why}"),
            Self::Forbidden(why) => {
                write!(f, "it led to a place that is not allowed: {why}")
            }
            Self::TokenFailed(why) => write!(f, "its token endpoint failed: {why}"),
            Self::TooLarge => f.write_str("the answer is larger than its kind may be"),
            Self::Encoded(coding) => write!(
                f,
                "it encoded the answer ({coding}) though identity was asked for"
            ),
            Self::Offline => f.write_str("asking it is switched off (`offline`)"),
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "denied access",
            Self::Login => "does not take our own credential",
            Self::Rights => "denied access to our own credential",
        })
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self {
            fault,
            retry_after: None,
        }
    }
}

/// Who gave an answer, or none.
struct By<'a>(&'a UpstreamId, usize);

impl fmt::Display for By<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            0 => write!(f, "{}", self.0),
            mirror => write!(f, "mirror {mirror} of {}", self.0),
        }
    }
}

/// A time as people say it: in whole seconds, rounded up.
struct Wait(Duration);

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = u64::from(self.0.subsec_nanos() > 0);
        write!(f, "{} s", self.0.as_secs().saturating_add(more))
    }
}

/// An error code in brackets' inside, or nothing.
struct Code<'a>(Option<&'a str>);

impl fmt::Display for Code<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(code) => write!(f, " {code}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Failure, Fault, Refused, UpstreamError};
    use crate::names::UpstreamId;

    #[test]
    fn says_what_to_what_and_whose_fault() {
        let error = UpstreamError::new(
            UpstreamId::new("docker.io"),
            "GET manifests/latest of library/alpine".into(),
            Failure::from(Fault::Denied {
                status: 403,
                code: Some("DENIED".into()),
                refused: Refused::Anonymous,
            }),
        );
        assert_eq!(
            error.to_string(),
            "GET manifests/latest of library/alpine from docker.io: it denied access (403 DENIED)"
        );
    }

    #[test]
    fn says_how_long_and_which_mirror() {
        let limited = Failure::from(Fault::RateLimited {
            retry_after: Duration::from_millis(119_900),
        });
        let what = "GET tags/list of a".to_owned();
        let error = UpstreamError::new(UpstreamId::new("docker.io"), what, limited).at(2);
        assert_eq!(
            error.to_string(),
            "GET tags/list of a from mirror 2 of docker.io: its rate limit is used up for 120 s"
        );
    }

    #[test]
    fn only_missing_answers_are_outages() {
        for (fault, outage) in [
            (Fault::Status(503), true),
            (Fault::Status(408), true),
            (Fault::Status(418), false),
            (Fault::Late, true),
            (Fault::NotFound { code: None }, false),
            (Fault::TokenFailed(String::new()), true),
            (Fault::Forbidden(String::new()), false),
        ] {
            assert_eq!(fault.is_outage(), outage, "{fault:?}");
        }
    }
}
