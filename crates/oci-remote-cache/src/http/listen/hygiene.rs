//! What every request must be and every answer has, whoever answers: pure decisions.
//!
//! Requests that could be read in two ways are refused, for whoever stands in front of this server may have read them the other way
//! (request smuggling). Bodies of requests are never read.

use hyper::body::{Body as _, Incoming};
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderValue, TRANSFER_ENCODING, UPGRADE,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode, Version};
use oci::ErrorCode;

use crate::http::body::Body;
use crate::http::problem::Problem;

/// What becomes of the connection after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    KeepAlive,
    Close,
}

impl Ending {
    /// After a request with a body the connection ends: the body is not read, so what follows on it is no request.
    ///
    /// The same after `Upgrade`, which we do not know and therefore ignore (RFC 9110 section 7.8; Java's client offers h2c on every
    /// request): whoever stands in front of us may believe that the protocol changed.
    pub(super) fn of(request: &Parts, body: &Incoming) -> Self {
        if !body.is_end_stream() || request.headers.contains_key(UPGRADE) {
            Self::Close
        } else {
            Self::KeepAlive
        }
    }
}

/// A request that could be read in two ways, or is none for this server, is refused and the connection closed (RFC 9112 sections 3.2
/// and 6.3; the ways of request smuggling).
pub(super) fn refusal(request: &Parts) -> Option<Problem> {
    let headers = &request.headers;
    if request.method == Method::CONNECT {
        return Some(Problem::method_not_allowed().closing());
    }
    // In HTTP/2 both are part of every request (RFC 9113 section 8.3.1).
    let absolute = request.uri.scheme().is_some() || request.uri.authority().is_some();
    if absolute && request.version < Version::HTTP_2 {
        return Some(malformed("this is no forward proxy: ask for a path"));
    }
    let hosts = headers.get_all(HOST).iter().count();
    if hosts > 1 || (hosts == 0 && request.version == Version::HTTP_11) {
        return Some(malformed("a request has exactly one Host header"));
    }
    let reads = request.method == Method::GET || request.method == Method::HEAD;
    (reads && announces_body(headers)).then(|| malformed("GET and HEAD have no body here"))
}

fn malformed(message: &str) -> Problem {
    Problem::bad_request(ErrorCode::Unsupported, message).closing()
}

/// hyper removes Content-Length where Transfer-Encoding stands beside it, so the conflict cannot be seen: neither is taken.
fn announces_body(headers: &HeaderMap) -> bool {
    let length = headers.get(CONTENT_LENGTH).map(HeaderValue::as_bytes);
    headers.contains_key(TRANSFER_ENCODING) || length.is_some_and(|length| length != b"0")
}

/// Puts into an answer what every answer has.
pub(super) fn finish(
    mut response: Response<Body>,
    method: &Method,
    ending: Ending,
) -> Response<Body> {
    let length = response.body().length();
    let bodiless = matches!(
        response.status(),
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
    );
    let head = *method == Method::HEAD;
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if ending == Ending::Close {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if bodiless || !head {
        // hyper writes the body's own length; another one beside it would be a lie.
        headers.remove(CONTENT_LENGTH);
    } else if let Some(length @ 1..) = length {
        // An empty body may stand for one whose length is not known: containerd takes a length of zero at its word.
        headers
            .entry(CONTENT_LENGTH)
            .or_insert_with(|| HeaderValue::from(length));
    }
    if bodiless || head {
        *response.body_mut() = Body::empty();
    }
    response
}
