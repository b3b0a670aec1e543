//! What is told about each request: one access line and the counters, once its body has ended or its connection is gone.
//!
//! The line comes from one value, [`Access`], that lives as long as any byte of the answer is on its way: the connection counts what
//! the kernel took, and dropping the last handle writes the line. Client requests and answers with their headers are shown at debug
//! (target `client`), without what is secret in them.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode, Uri};
use tokio::time::Instant;
use tracing::{debug, info};

use super::body::Body;
use crate::metrics::{Metrics, RequestLabels};
use crate::names::UpstreamId;
use crate::verdict::{Assurance, Verdict, Why};

/// Longest path and longest user agent in a log line, in characters.
const SHOWN_PATH: usize = 1024;
const SHOWN_AGENT: usize = 160;

/// Query parameters whose values are shown; others may carry anything.
const SHOWN_PARAMETERS: [&str; 6] = ["ns", "n", "last", "artifactType", "digest", "next_page"];

/// Headers whose values are not shown.
const SECRET_HEADERS: [HeaderName; 4] = [
    header::AUTHORIZATION,
    header::PROXY_AUTHORIZATION,
    header::COOKIE,
    header::SET_COOKIE,
];

/// A client that left before its answer had a status is logged and counted under nginx's number for it.
const CLIENT_LEFT: u16 = 499;

/// What the handler tells about an answer: a response extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What the cache did.
    pub verdict: Verdict,
    /// `manifest`, `blob`, `tags`, `referrers`, `base` or `other`.
    pub kind: &'static str,
    /// The upstream, where one was named.
    pub upstream: Option<UpstreamId>,
    /// Whether the bytes had been checked when they went out.
    pub assurance: Assurance,
}

/// Whose requests a listener answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Container clients: logged at info, and counted.
    Clients,
    /// Operators and their scrapers: logged at debug, not counted.
    Operators,
}

/// Where one listener's requests are told.
#[derive(Debug)]
pub(super) struct Observer {
    metrics: Metrics,
    audience: Audience,
}

/// One request, from its arrival until the last byte of its answer was handed over or dropped.
#[derive(Debug)]
pub(super) struct Access {
    observer: Arc<Observer>,
    method: Method,
    uri: Uri,
    agent: Option<HeaderValue>,
    peer: SocketAddr,
    arrived: Instant,
    answer: Option<Answer>,
    sent: AtomicU64,
    ended: AtomicBool,
    broken: OnceLock<String>,
}

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    /// Bytes that make the answer complete; unknown for streams without a length, which say when they end.
    expected: Option<u64>,
    outcome: Outcome,
}

impl Outcome {
    /// An answer that no cache had a part in.
    pub fn none(kind: &'static str) -> Self {
        Self {
            verdict: Verdict::None,
            kind,
            upstream: None,
            assurance: Assurance::Verified,
        }
    }

    fn upstream_key(&self) -> &str {
        self.upstream.as_ref().map_or("", UpstreamId::as_str)
    }
}

impl Observer {
    pub(super) fn new(metrics: Metrics, audience: Audience) -> Self {
        Self { metrics, audience }
    }

    /// The metrics, where this listener's requests count.
    pub(super) fn counted(&self) -> Option<&Metrics> {
        match self.audience {
            Audience::Clients => Some(&self.metrics),
            Audience::Operators => None,
        }
    }

    /// Begins to follow a request.
    pub(super) fn arrived(self: &Arc<Self>, request: &Parts, peer: SocketAddr) -> Access {
        debug!(
            target: "client",
            %peer,
            method = %request.method,
            path = %ShownTarget(&request.uri),
            version = ?request.version,
            headers = %ShownHeaders(&request.headers),
            "request"
        );
        Access {
            observer: Arc::clone(self),
            method: request.method.clone(),
            uri: request.uri.clone(),
            agent: request.headers.get(header::USER_AGENT).cloned(),
            peer,
            arrived: Instant::now(),
            answer: None,
            sent: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            broken: OnceLock::new(),
        }
    }
}

impl Access {
    /// Notes the answer and follows its body from here on.
    pub(super) fn answered(mut self, mut response: Response<Body>) -> Response<Body> {
        debug!(
            target: "client",
            peer = %self.peer,
            status = response.status().as_u16(),
            headers = %ShownHeaders(response.headers()),
            "answer"
        );
        self.answer = Some(Answer {
            status: response.status(),
            expected: response.body().length(),
            outcome: response
                .extensions_mut()
                .remove()
                .unwrap_or_else(|| Outcome::none("other")),
        });
        let access = Arc::new(self);
        response.map(|body| body.watched(access))
    }

    /// `bytes` of the body were handed over.
    pub(super) fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        if let Some(metrics) = self.observer.counted() {
            metrics.served_bytes.inc_by(bytes);
        }
    }

    /// The body came to its end.
    pub(super) fn ended(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// The body cannot be completed.
    pub(super) fn broke(&self, why: &str) {
        self.broken.set(why.to_owned()).ok();
    }

    fn is_complete(&self) -> bool {
        let sent = self.sent.load(Ordering::Relaxed);
        let expected = self.answer.as_ref().map(|answer| answer.expected);
        match expected {
            None => false,
            Some(_) if self.broken.get().is_some() => false,
            Some(Some(length)) => sent >= length,
            Some(None) => self.ended.load(Ordering::Relaxed),
        }
    }

    fn count(metrics: &Metrics, status: u16, outcome: &Outcome) {
        let labels = RequestLabels {
            kind: outcome.kind,
            upstream: outcome.upstream_key().to_owned(),
            verdict: outcome.verdict.as_str(),
            status,
        };
        metrics.requests.get_or_create(&labels).inc();
        metrics.verdict(outcome.verdict);
    }

    fn log(&self, status: u16, outcome: &Outcome) {
        info!(
            target: "access",
            method = %self.method,
            path = %ShownTarget(&self.uri),
            status,
            kind = outcome.kind,
            verdict = outcome.verdict.as_str(),
            why = outcome.verdict.why().map(Why::as_str),
            upstream = outcome.upstream_key(),
            bytes = self.sent.load(Ordering::Relaxed),
            duration_ms = milliseconds(self.arrived.elapsed()),
            end = if self.is_complete() { "complete" } else { "cut" },
            broken = self.broken.get(),
            peer = %self.peer,
            agent = self.agent.as_ref().map(shown_agent),
            "answered"
        );
    }

    fn log_operator(&self, status: u16) {
        debug!(
            target: "access",
            method = %self.method,
            path = %ShownTarget(&self.uri),
            status,
            peer = %self.peer,
            "answered an operator"
        );
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        let unanswered = Outcome::none("other");
        let (status, outcome) = match &self.answer {
            Some(answer) => (answer.status.as_u16(), &answer.outcome),
            None => (CLIENT_LEFT, &unanswered),
        };
        if let Some(metrics) = self.observer.counted() {
            Self::count(metrics, status, outcome);
            self.log(status, outcome);
        } else {
            self.log_operator(status);
        }
    }
}

/// A request target as a log line shows it: control characters escaped, only harmless parameters.
struct ShownTarget<'a>(&'a Uri);

/// Headers as a log line shows them.
struct ShownHeaders<'a>(&'a HeaderMap);

impl fmt::Display for ShownTarget<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_escaped(f, self.0.path(), SHOWN_PATH)?;
        let mut mark = '?';
        for pair in self.0.query().unwrap_or_default().split('&') {
            let Some((name, value)) = pair.split_once('=') else {
                continue;
            };
            if SHOWN_PARAMETERS.contains(&name) {
                write!(f, "{mark}{name}=")?;
                write_escaped(f, value, SHOWN_PATH)?;
                mark = '&';
            }
        }
        Ok(())
    }
}

impl fmt::Display for ShownHeaders<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.0 {
            write!(f, "{name}: ")?;
            if SECRET_HEADERS.contains(name) || value.is_sensitive() {
                f.write_str("***; ")?;
            } else {
                write_escaped(f, &String::from_utf8_lossy(value.as_bytes()), SHOWN_PATH)?;
                f.write_str("; ")?;
            }
        }
        Ok(())
    }
}

/// An error with all that caused it.
pub(super) struct Chain<'a>(pub(super) &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

/// Writes at most `most` characters, those that could drive a terminal or break the line escaped.
fn write_escaped(f: &mut fmt::Formatter<'_>, text: &str, most: usize) -> fmt::Result {
    for c in text.chars().take(most) {
        if c.is_control() {
            write!(f, "{}", c.escape_default())?;
        } else {
            f.write_char(c)?;
        }
    }
    if text.chars().nth(most).is_some() {
        f.write_str("...")?;
    }
    Ok(())
}

fn shown_agent(agent: &HeaderValue) -> String {
    let text = String::from_utf8_lossy(agent.as_bytes());
    text.chars()
        .filter(|c| !c.is_control())
        .take(SHOWN_AGENT)
        .collect()
}

/// With microseconds: a hit takes less than one millisecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
