//! An upstream's answer and its bytes, watched: a body that stalls, drips or ends early is an error, never a short success.
//!
//! Nothing here judges what the bytes are.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use oci::{AnyDigest, ContentRange, Warning};
use prometheus_client::metrics::counter::Counter;
use reqwest::Response;
use reqwest::header::HeaderMap;
use tokio::time::Instant;
use url::Url;

use super::connect::root_cause;
use super::error::{Fault, UpstreamError};
use super::request::Method;
use crate::deadline::Deadline;
use crate::names::{CredentialId, UpstreamId};

/// Longest wait for the next byte.
const STALL: Duration = Duration::from_secs(30);
/// What is left of that for a reader that comes back late: bytes may lie in the socket that nobody asked for meanwhile.
const GRACE: Duration = Duration::from_secs(2);
/// Over how much waiting the rate is taken, and the least that must come meanwhile (1 KiB/s).
const PACE_OVER: Duration = Duration::from_mins(1);
const PACE_BYTES: u64 = 60 << 10;

/// A usable answer: 200 or 206.
pub struct Answer {
    head: Head,
    headers: HeaderMap,
    body: Body,
}

/// The bytes of an answer, as they come.
pub struct Body {
    response: Response,
    label: Label,
    counter: Counter,
    expected: Option<u64>,
    received: u64,
    /// Since when the next byte is waited for; kept here because a reader may drop its wait and come back.
    waiting: Option<Instant>,
    ended: bool,
    pace: Pace,
}

/// What an answer is beyond its headers.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: u16,
    /// A size learnt in another way than by `Content-Length`.
    pub(super) length: Option<u64>,
    pub(super) credential: CredentialId,
    pub(super) method: Method,
    /// Who gave it: 0 is the upstream's URL, n its nth mirror.
    pub(super) place: usize,
}

/// Names an answer in errors that come later.
#[derive(Clone, Debug)]
pub(super) struct Label {
    pub(super) upstream: UpstreamId,
    pub(super) what: Arc<str>,
    pub(super) counter: Counter,
}

/// How fast a body comes, by the time that was spent waiting for it: a slow reader is not a slow upstream.
#[derive(Debug, Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

impl Answer {
    pub(super) fn new(head: Head, response: Response, label: Label) -> Self {
        let headers = response.headers().clone();
        let expected = match head.method {
            Method::Get => number(&headers, "content-length"),
            Method::Head => None,
        };
        let body = Body {
            counter: label.counter.clone(),
            response,
            label,
            expected,
            received: 0,
            waiting: None,
            ended: false,
            pace: Pace::default(),
        };
        Self {
            head,
            headers,
            body,
        }
    }

    /// 200 or 206.
    pub fn status(&self) -> u16 {
        self.head.status
    }

    /// A header's text; nothing when it is absent or no text.
    pub fn header(&self, name: &str) -> Option<&str> {
        text(&self.headers, name)
    }

    /// All values of a header that are text.
    pub(super) fn headers(&self, name: &str) -> impl Iterator<Item = &str> {
        let values = self.headers.get_all(name);
        values.iter().filter_map(|value| value.to_str().ok())
    }

    /// What the upstream wants people to read.
    pub fn warnings(&self) -> Vec<Warning> {
        Warning::parse_all(self.headers("warning"))
    }

    /// Which place gave it, and from where: redirects may have led elsewhere.
    pub(super) fn whence(&self) -> (usize, &Url) {
        (self.head.place, self.body.response.url())
    }

    /// The length of this answer's body, or of the one that a GET would have. For a blob's HEAD that led to a content host it was
    /// learnt by asking for one byte.
    pub fn content_length(&self) -> Option<u64> {
        self.head
            .length
            .or_else(|| number(&self.headers, "content-length"))
    }

    /// Which part of the content this is.
    pub fn content_range(&self) -> Option<ContentRange> {
        if self.head.status != 206 {
            return None;
        }
        ContentRange::parse(self.header("content-range")?)
    }

    /// `Docker-Content-Digest`, if it is one.
    pub fn digest(&self) -> Option<AnyDigest> {
        self.header("docker-content-digest")?.trim().parse().ok()
    }

    /// The entity tag.
    pub fn etag(&self) -> Option<&str> {
        self.header("etag")
    }

    /// The media type as sent.
    pub fn content_type(&self) -> Option<&str> {
        self.header("content-type")
    }

    /// Whose rights this was given for; anonymous when no credential was involved, and then anyone may see it.
    pub fn credential(&self) -> &CredentialId {
        &self.head.credential
    }

    /// The same where the upstream itself answered. A mirror's answer says nothing about rights there.
    pub fn allowed(&self) -> Option<&CredentialId> {
        (self.head.place == 0).then_some(&self.head.credential)
    }

    /// The bytes.
    pub fn into_body(self) -> Body {
        self.body
    }

    /// The whole body, if it has at most `limit` bytes. A larger one is dropped with its connection, whatever its length claims.
    pub async fn read_to(
        &mut self,
        limit: usize,
        deadline: Deadline,
    ) -> Result<Bytes, UpstreamError> {
        let body = &mut self.body;
        let claimed = body.expected.unwrap_or(0);
        if claimed > u64::try_from(limit).unwrap_or(u64::MAX) {
            return Err(body.error(Fault::TooLarge));
        }
        let label = body.label.clone();
        match deadline.run(body.collect(limit)).await {
            Ok(read) => read,
            Err(_late) => Err(label.error(Fault::Late)),
        }
    }
}

impl Body {
    /// The next bytes; nothing after the last. An error means that what came before is not all. Dropping the future loses no bytes.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, UpstreamError> {
        if self.ended {
            return Ok(None);
        }
        let now = Instant::now();
        let began = *self.waiting.get_or_insert(now);
        let limit = (began + STALL).max(now + GRACE);
        let next = tokio::time::timeout_at(limit, self.response.chunk()).await;
        self.waiting = None;
        match next {
            Err(_elapsed) => Err(self.error(Fault::Stalled)),
            Ok(Err(error)) => Err(self.error(Fault::Broken(root_cause(&error)))),
            Ok(Ok(None)) if self.expected.is_some_and(|all| self.received < all) => {
                Err(self.error(Fault::Broken("the body ended early".to_owned())))
            }
            Ok(Ok(None)) => {
                self.ended = true;
                Ok(None)
            }
            Ok(Ok(Some(chunk))) => {
                let size = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
                self.received = self.received.saturating_add(size);
                self.counter.inc_by(size);
                if self.pace.is_too_slow(began.elapsed(), size) {
                    return Err(self.error(Fault::Stalled));
                }
                Ok(Some(chunk))
            }
        }
    }

    async fn collect(&mut self, limit: usize) -> Result<Bytes, UpstreamError> {
        let mut whole = BytesMut::new();
        while let Some(chunk) = self.chunk().await? {
            if whole.len() + chunk.len() > limit {
                return Err(self.error(Fault::TooLarge));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }

    fn error(&self, fault: Fault) -> UpstreamError {
        self.label.error(fault)
    }
}

impl Label {
    fn error(&self, fault: Fault) -> UpstreamError {
        UpstreamError::new(self.upstream.clone(), self.what.to_string(), fault.into())
    }
}

impl Pace {
    /// Takes in `bytes` that were waited for so long; says whether they come too slowly.
    fn is_too_slow(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.waited < PACE_OVER {
            return false;
        }
        let slow = self.bytes < PACE_BYTES;
        *self = Self::default();
        slow
    }
}

// Written by hand: a response's own shows its URL, and that may be a signed one.

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("head", &self.head)
            .field("body", &self.body)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body")
            .field("upstream", &self.label.upstream)
            .field("what", &self.label.what)
            .field("expected", &self.expected)
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Pace;

    #[test]
    fn a_kibibyte_a_second_is_the_least() {
        let mut pace = Pace::default();
        let second = Duration::from_secs(1);
        for _ in 0..600 {
            assert!(!pace.is_too_slow(second, 1024));
        }
        let mut pace = Pace::default();
        let verdicts: Vec<bool> = (0..60).map(|_| pace.is_too_slow(second, 1000)).collect();
        assert_eq!(verdicts.iter().position(|&slow| slow), Some(59));
    }

    #[test]
    fn only_waiting_counts() {
        let mut pace = Pace::default();
        for _ in 0..1000 {
            assert!(!pace.is_too_slow(Duration::ZERO, 1));
        }
    }
}
