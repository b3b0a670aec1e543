//! One HTTP exchange with anyone an upstream has to do with: bounded, counted, logged.
//!
//! It knows nothing of registries: who is asked, with which authorization, and what a status means is decided by its callers.

use std::time::Duration;

use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE,
    RETRY_AFTER, USER_AGENT,
};
use reqwest::{Request, Response};
use tokio::time::Instant;
use url::Url;

use super::connect::{Door, Lane};
use super::error::Fault;
use super::{rate, trace};
use crate::clock::Clock;
use crate::deadline::Deadline;
use crate::metrics::{Metrics, UpstreamLabels};
use crate::names::UpstreamId;
use crate::secret::Secret;

/// Longest wait for one exchange's response headers: two of them must fit before containerd's 30 s.
const HEADERS_LIMIT: Duration = Duration::from_secs(20);
/// Most of an error body that is read, and how long that may take.
const ERROR_LIMIT: usize = 64 << 10;
const ERROR_TIME: Duration = Duration::from_secs(5);

/// What all exchanges of an upstream have in common.
#[derive(Clone, Debug)]
pub(super) struct Wire {
    pub(super) id: UpstreamId,
    pub(super) user_agent: HeaderValue,
    pub(super) metrics: Metrics,
    pub(super) clock: Clock,
}

/// One request, ready to be sent. Not `Debug`: its URL may be a signed one.
pub(super) struct Call {
    pub(super) method: reqwest::Method,
    pub(super) url: Url,
    /// The word under which it is counted.
    pub(super) kind: &'static str,
    pub(super) lane: Lane,
    pub(super) accept: String,
    pub(super) range: Option<String>,
    /// The whole `Authorization` value.
    pub(super) authorization: Option<Secret>,
    /// A form to post.
    pub(super) form: Option<Secret>,
}

/// Response headers, with the body still to come. Not `Debug`, for its URL's sake.
pub(super) struct Reply {
    pub(super) url: Url,
    pub(super) response: Response,
}

impl Wire {
    /// Sends `call` through `door`. An error means that there are no response headers.
    pub(super) async fn send(
        &self,
        door: &Door,
        call: Call,
        deadline: Deadline,
    ) -> Result<Reply, Fault> {
        let (kind, lane, url) = (call.kind, call.lane, call.url.clone());
        let request = self.request(call)?;
        tracing::trace!(target: "upstream", upstream = %self.id, method = %request.method(), url = trace::url(&url),
            headers = trace::headers(request.headers()), "request");
        let method = request.method().clone();
        let began = Instant::now();
        let limit = deadline.at_most(HEADERS_LIMIT);
        let sent = limit.run(Box::pin(door.execute(lane, request))).await;
        let result = match sent {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(fault)) => Err(fault),
            Err(_late) => Err(Fault::Late),
        };
        let outcome = match &result {
            Ok(response) => response.status().as_str().to_owned(),
            Err(fault) => outcome(fault).to_owned(),
        };
        let millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::debug!(target: "upstream", upstream = %self.id, %method, url = trace::url(&url), outcome, millis, "exchange");
        self.count(kind, outcome);
        let response = result?;
        tracing::trace!(target: "upstream", upstream = %self.id, url = trace::url(&url), status = response.status().as_u16(),
            headers = trace::headers(response.headers()), "response");
        Ok(Reply { url, response })
    }

    /// What an answer says about when to come back.
    pub(super) fn retry_after(&self, reply: &Reply) -> Option<Duration> {
        rate::retry_after(reply.header(RETRY_AFTER.as_str())?, self.clock.now())
    }

    fn request(&self, call: Call) -> Result<Request, Fault> {
        let mut request = Request::new(call.method, call.url);
        let headers = request.headers_mut();
        headers.insert(USER_AGENT, self.user_agent.clone());
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        insert(headers, ACCEPT, &call.accept)?;
        if let Some(range) = &call.range {
            insert(headers, RANGE, range)?;
        }
        if let Some(authorization) = &call.authorization {
            let mut value = header_value(authorization.expose())?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        if let Some(form) = call.form {
            let urlencoded = HeaderValue::from_static("application/x-www-form-urlencoded");
            headers.insert(CONTENT_TYPE, urlencoded);
            *request.body_mut() = Some(form.expose().to_owned().into());
        }
        Ok(request)
    }

    fn count(&self, kind: &'static str, outcome: String) {
        let labels = UpstreamLabels {
            upstream: self.id.as_str().to_owned(),
            kind,
            outcome,
        };
        self.metrics.upstream_requests.get_or_create(&labels).inc();
    }
}

impl Reply {
    pub(super) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// A header's text; nothing when it is absent or no text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// All values of a header that are text.
    pub(super) fn headers(&self, name: &str) -> impl Iterator<Item = &str> {
        let values = self.response.headers().get_all(name);
        values.iter().filter_map(|value| value.to_str().ok())
    }

    /// Whether this sends us elsewhere.
    pub(super) fn is_redirect(&self) -> bool {
        matches!(self.status(), 301 | 302 | 303 | 307 | 308)
    }

    /// The code in a registry's error body. Such a body is never passed on: it may be HTML or larger than memory.
    pub(super) async fn error_code(self, deadline: Deadline) -> Option<String> {
        let limit = deadline.at_most(ERROR_TIME);
        let (body, _whole) = limit.run(self.head_of_body(ERROR_LIMIT)).await.ok()?;
        oci::first_error_code(&body)
    }

    /// The first bytes of the body, at most `limit`, and whether that is all of it.
    pub(super) async fn head_of_body(mut self, limit: usize) -> (Vec<u8>, Whole) {
        let mut body = Vec::new();
        loop {
            match self.response.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() > limit => {
                    return (body, Whole::No("it is too large"));
                }
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Ok(None) => return (body, Whole::Yes),
                Err(_broken) => return (body, Whole::No("it broke off")),
            }
        }
    }
}

/// Whether a body was read to its end, and why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whole {
    Yes,
    No(&'static str),
}

/// The word under which an exchange without an answer is counted.
fn outcome(fault: &Fault) -> &'static str {
    if matches!(fault, Fault::Connect(_)) {
        "connect"
    } else if matches!(fault, Fault::Late) {
        "late"
    } else if matches!(fault, Fault::Forbidden(_)) {
        "forbidden"
    } else {
        "broken"
    }
}

fn insert(
    headers: &mut HeaderMap,
    name: reqwest::header::HeaderName,
    value: &str,
) -> Result<(), Fault> {
    headers.insert(name, header_value(value)?);
    Ok(())
}

fn header_value(text: &str) -> Result<HeaderValue, Fault> {
    HeaderValue::from_str(text)
        .map_err(|_invalid| Fault::Broken("a header value cannot be sent".to_owned()))
}
