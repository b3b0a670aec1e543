//! What is told about each request: one access line and the counters, once its body has ended or its connection is gone.
//!
//! The line comes from one value, `Access`, that lives as long as any byte of the answer is on its way: the connection counts what
//! the kernel took, and dropping the last handle writes the line. Client requests and answers with their headers are shown at debug
//! (target `client`), without what is secret in them.

use std::error::Error;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode, Uri};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::body::{Alarm, Body};
use super::problem::Said;
use crate::metrics::{Metrics, RequestLabels};
use crate::names::UpstreamId;
use crate::policy::ClientName;
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
    /// Who the client has shown to be.
    client: Option<ClientName>,
    answer: Option<Answer>,
    /// What a refusal said.
    said: Option<Said>,
    sent: AtomicU64,
    ended: AtomicBool,
    broken: OnceLock<String>,
    alarm: OnceLock<Alarm>,
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
            client: None,
            answer: None,
            said: None,
            sent: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            broken: OnceLock::new(),
            alarm: OnceLock::new(),
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
        self.client = response.extensions_mut().remove();
        self.said = response.extensions_mut().remove();
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
        let first = self.broken.set(why.to_owned()).is_ok();
        if let Some(alarm) = self.alarm.get().filter(|_| first) {
            alarm.ring();
        }
    }

    /// Rings when the body cannot be completed.
    pub(super) fn guarded(&self, alarm: Alarm) {
        self.alarm.set(alarm).ok();
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
        macro_rules! line {
            ($level:ident) => {
                $level!(
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
                    error = self.said.as_ref().map(|said| said.0.as_str()),
                    peer = %self.peer,
                    client = self.client.as_ref().map(ClientName::as_str),
                    agent = self.agent.as_ref().map(shown_agent),
                    "answered"
                )
            };
        }
        if status >= 500 {
            line!(warn);
        } else {
            line!(info);
        }
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

/// Writes at most `most` characters, those that could drive a terminal or break the line escaped. In as few pieces as can be: whatever
/// takes them looks at each anew.
fn write_escaped(f: &mut fmt::Formatter<'_>, text: &str, most: usize) -> fmt::Result {
    let end = text.char_indices().nth(most).map(|(end, _)| end);
    let shown = end.and_then(|end| text.get(..end)).unwrap_or(text);
    for piece in shown.split_inclusive(char::is_control) {
        let mut rest = piece.chars();
        match rest.next_back() {
            Some(last) if last.is_control() => {
                f.write_str(rest.as_str())?;
                write!(f, "{}", last.escape_default())?;
            }
            _ => f.write_str(piece)?,
        }
    }
    if end.is_some() {
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use futures_util::stream;
    use hyper::Response;
    use tokio::time::sleep;
    use tracing::subscriber::DefaultGuard;

    use super::{Outcome, milliseconds};
    use crate::http::body::{Body, BodyBroken, Part};
    use crate::http::listen::tests::{Lab, limits};
    use crate::names::UpstreamId;
    use crate::verdict::{Assurance, Verdict, Why};

    /// Keeps what is logged on this thread.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        fn open() -> (Self, DefaultGuard) {
            let log = Self::default();
            let writer = log.clone();
            let subscriber = tracing_subscriber::fmt()
                .with_max_level(tracing::Level::DEBUG)
                .with_ansi(false)
                .with_writer(move || writer.clone())
                .finish();
            (log, tracing::subscriber::set_default(subscriber))
        }

        async fn line(&self, part: &str) -> String {
            for _ in 0..1000 {
                match self.find(part) {
                    Some(line) => return line,
                    None => sleep(Duration::from_millis(5)).await,
                }
            }
            panic!("nothing with {part}");
        }

        fn find(&self, part: &str) -> Option<String> {
            let mut lines = self.all();
            lines.retain(|line| line.contains(part));
            lines.into_iter().next()
        }

        fn all(&self) -> Vec<String> {
            let log = self.0.lock().unwrap().clone();
            let text = String::from_utf8(log).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    fn shows(line: &str, fields: &[&str]) {
        for field in fields {
            assert!(line.contains(field), "{field} not in {line}");
        }
    }

    #[tokio::test]
    async fn a_line_says_what_happened_and_no_secret() {
        let (log, _guard) = Log::open();
        let lab = Lab::start(limits(), |_| {
            let mut response = Response::new(Body::memory("hello"));
            response.extensions_mut().insert(Outcome {
                verdict: Verdict::Stale(Why::RateLimited),
                kind: "manifest",
                upstream: Some(UpstreamId::new("docker.io")),
                assurance: Assurance::Verified,
            });
            response
        });
        let mut client = lab.client().await;
        let request = "GET /v2/a/%1b?ns=docker.io&token=hunter2&n=3 HTTP/1.1\r\nHost: x\r\nUser-Agent: podman/5\r\n\
                       Authorization: Basic aHVudGVyMg==\r\nCookie: c=hunter2\r\nProxy-Authorization: hunter2\r\n\r\n";
        client.send(request).await;
        client.answer().await;
        let line = log.line(" access: ").await;
        shows(
            &line,
            &[
                "INFO",
                "method=GET",
                "path=/v2/a/%1b?ns=docker.io&n=3 ",
                "status=200",
                "kind=\"manifest\"",
                "verdict=\"stale\"",
                "why=\"rate-limited\"",
                "upstream=\"docker.io\"",
                "bytes=5",
                "end=\"complete\"",
                "agent=\"podman/5\"",
            ],
        );
        let line = log.line(" client: request").await;
        shows(&line, &["authorization: ***", "cookie: ***", "host: x"]);
        let all = log.all().concat();
        assert!(
            !all.contains("hunter2") && !all.contains("aHVudGVyMg"),
            "{all}"
        );
        lab.shows(r#"oci_remote_cache_stale_total{why="rate-limited"} 1"#)
            .await;
    }

    #[tokio::test]
    async fn a_cut_is_told_with_its_reason() {
        let (log, _guard) = Log::open();
        let lab = Lab::start(limits(), |_| {
            let parts = [
                Ok(Part::Memory("abc".into())),
                Err(BodyBroken::new("the upstream went away")),
            ];
            Response::new(Body::stream(Some(9), stream::iter(parts)))
        });
        lab.client().await.get("/").await;
        let line = log.line(" access: ").await;
        shows(
            &line,
            &[
                "end=\"cut\"",
                "bytes=3",
                "broken=\"the upstream went away\"",
            ],
        );
    }

    #[tokio::test]
    async fn a_client_that_leaves_early_is_told_as_cut() {
        let (log, _guard) = Log::open();
        let lab = Lab::start(limits(), |_| {
            Response::new(Body::stream(Some(9), stream::pending()))
        });
        let mut client = lab.client().await;
        client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(client.more().await);
        drop(client);
        let line = log.line(" access: ").await;
        shows(&line, &["end=\"cut\"", "bytes=0", "status=200"]);
    }

    #[test]
    fn durations_are_told_in_milliseconds() {
        assert!((milliseconds(Duration::from_micros(1234)) - 1.234).abs() < 1e-9);
    }
}
