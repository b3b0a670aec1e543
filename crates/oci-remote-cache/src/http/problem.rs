//! Answers that say no: the specification's JSON body under a 4xx or 5xx status.
//!
//! Which failure becomes which problem is decided where requests are answered, not here. An upstream's own error page is never passed
//! on: containerd would take it for content.

use std::time::Duration;

use hyper::header::{
    ALLOW, CONNECTION, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Response, StatusCode};
use oci::ErrorCode;

use super::body::Body;

/// How clients are asked who they are: one challenge, one line. containers/image takes it from the ping alone.
const CHALLENGE: &str = "Basic realm=\"oci-remote-cache\", charset=\"UTF-8\"";

/// Longest message sent; what was asked for may be echoed in it.
const MESSAGE: usize = 1024;

/// A refusal or failure on its way to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    status: Status,
    code: ErrorCode,
    message: String,
    retry_after: Option<Duration>,
    /// What a 416 says about the content's size.
    size: Option<u64>,
    /// What a 405 says may be done.
    allow: &'static str,
    close: bool,
}

/// What a person reads in a refusal, for the log: few clients show it.
#[derive(Clone, Debug)]
pub(super) struct Said(pub(super) String);

/// The statuses a problem can have: errors only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// 400: the request cannot be understood.
    BadRequest,
    /// 401: the client must say who it is.
    Unauthorized,
    /// 403: the client may not have this.
    Forbidden,
    /// 404: there is no such thing, or the client may not know.
    NotFound,
    /// 405: only GET and HEAD are served.
    MethodNotAllowed,
    /// 416: no byte of the range exists.
    RangeNotSatisfiable,
    /// 429: the upstream's rate limit is used up.
    TooManyRequests,
    /// 500: our own fault.
    Internal,
    /// 502: the upstream's answer is unusable, and asking again will not help.
    BadGateway,
    /// 503: asking again may help.
    Unavailable,
    /// 504: the upstream did not answer in time.
    GatewayTimeout,
}

impl Problem {
    /// A problem of this kind.
    pub fn new(status: Status, code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            retry_after: None,
            size: None,
            allow: "",
            close: false,
        }
    }

    /// 400.
    pub fn bad_request(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(Status::BadRequest, code, message)
    }

    /// 403.
    pub fn denied(message: impl Into<String>) -> Self {
        Self::new(Status::Forbidden, ErrorCode::Denied, message)
    }

    /// 404.
    pub fn not_found(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(Status::NotFound, code, message)
    }

    /// 405 with `Allow`.
    pub fn method_not_allowed() -> Self {
        let message = "this is a cache for pulls: only GET and HEAD are served";
        Self::only("GET, HEAD", message)
    }

    /// 405 where other methods than elsewhere may be used: `allow` lists them.
    pub fn only(allow: &'static str, message: &str) -> Self {
        Self {
            allow,
            ..Self::new(Status::MethodNotAllowed, ErrorCode::Unsupported, message)
        }
    }

    /// 416 with the content's size.
    pub fn range_not_satisfiable(size: u64) -> Self {
        let message = format!("no byte of the range exists: the size is {size}");
        let status = Status::RangeNotSatisfiable;
        Self {
            size: Some(size),
            ..Self::new(status, ErrorCode::SizeInvalid, message)
        }
    }

    /// 429, to be asked again after `wait`.
    pub fn too_many_requests(message: impl Into<String>, wait: Duration) -> Self {
        Self::new(Status::TooManyRequests, ErrorCode::TooManyRequests, message).retry_after(wait)
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Status::Internal, ErrorCode::Unavailable, message)
    }

    /// 502. containerd does not retry it: for what may pass, use [`Problem::unavailable`].
    pub fn bad_gateway(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(Status::BadGateway, code, message)
    }

    /// 503, to be asked again after `wait`.
    pub fn unavailable(message: impl Into<String>, wait: Duration) -> Self {
        Self::new(Status::Unavailable, ErrorCode::Unavailable, message).retry_after(wait)
    }

    /// 504.
    pub fn gateway_timeout(message: impl Into<String>) -> Self {
        Self::new(Status::GatewayTimeout, ErrorCode::Unavailable, message)
    }

    /// The same, with `Retry-After`.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// The same, after which the connection is closed: what follows on it cannot be trusted to be a request.
    #[must_use]
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// The status.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The specification's code.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// What a person reads.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same, with a likely reason after what is wrong.
    #[must_use]
    pub fn with_hint(mut self, hint: &str) -> Self {
        self.message = format!("{}; {hint}", self.message);
        self
    }

    /// How long the client is told to wait.
    pub fn wait(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The answer itself.
    pub fn into_response(self) -> Response<Body> {
        let message: String = self.message.chars().take(MESSAGE).collect();
        let body = Body::memory(oci::error_body(self.code, &message));
        let mut response = Response::new(body);
        *response.status_mut() = self.status.http();
        response.extensions_mut().insert(Said(message));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if let Some(wait) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(whole_seconds(wait)));
        }
        if let Some(range) = self.size.and_then(unsatisfied) {
            headers.insert(CONTENT_RANGE, range);
        }
        if self.status == Status::MethodNotAllowed {
            headers.insert(ALLOW, HeaderValue::from_static(self.allow));
        }
        if self.status == Status::Unauthorized {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(CHALLENGE));
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl Status {
    /// The status on the wire.
    pub const fn http(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::RangeNotSatisfiable => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::TooManyRequests => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::BadGateway => StatusCode::BAD_GATEWAY,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::GatewayTimeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// The word in `Cache-Status`.
    pub const fn detail(self) -> &'static str {
        match self {
            Self::BadRequest => "bad-request",
            Self::Unauthorized => "log-in",
            Self::Forbidden => "denied",
            Self::NotFound => "not-found",
            Self::MethodNotAllowed => "not-allowed",
            Self::RangeNotSatisfiable => "no-such-range",
            Self::TooManyRequests => "rate-limited",
            Self::Internal => "internal",
            Self::BadGateway => "unusable",
            Self::Unavailable => "unavailable",
            Self::GatewayTimeout => "late",
        }
    }
}

/// At least one second: clients take zero for "at once", all of them together.
fn whole_seconds(wait: Duration) -> u64 {
    let up = u64::from(wait.subsec_nanos() > 0);
    wait.as_secs().saturating_add(up).max(1)
}

fn unsatisfied(size: u64) -> Option<HeaderValue> {
    HeaderValue::try_from(format!("bytes */{size}")).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hyper::header;
    use oci::ErrorCode;

    use super::{Problem, Status};

    #[test]
    fn headers_follow_the_kind() {
        let response = Problem::method_not_allowed().closing().into_response();
        assert_eq!(response.status(), 405);
        assert_eq!(response.headers()[header::ALLOW], "GET, HEAD");
        assert_eq!(response.headers()[header::CONNECTION], "close");
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        assert_eq!(
            response.headers()[header::X_CONTENT_TYPE_OPTIONS],
            "nosniff"
        );

        let response = Problem::range_not_satisfiable(7).into_response();
        assert_eq!(response.status(), 416);
        assert_eq!(response.headers()[header::CONTENT_RANGE], "bytes */7");
        assert!(!response.headers().contains_key(header::CONNECTION));

        let wait = Duration::from_millis(1500);
        let response = Problem::unavailable("later", wait).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        let response = Problem::too_many_requests("later", Duration::ZERO).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }

    #[test]
    fn a_message_from_outside_cannot_break_out() {
        let message = "no \"such\"\r\nSet-Cookie: a=b".repeat(1000);
        let problem = Problem::not_found(ErrorCode::NameUnknown, message);
        let response = problem.into_response();
        assert!(response.body().length().unwrap_or(u64::MAX) < 3000);
        assert_eq!(response.headers().len(), 2);
    }

    #[test]
    fn only_errors_are_problems() {
        for status in [
            Status::BadRequest,
            Status::Unauthorized,
            Status::Forbidden,
            Status::NotFound,
            Status::MethodNotAllowed,
            Status::RangeNotSatisfiable,
            Status::TooManyRequests,
            Status::Internal,
            Status::BadGateway,
            Status::Unavailable,
            Status::GatewayTimeout,
        ] {
            let http = status.http();
            assert!(http.is_client_error() || http.is_server_error());
        }
    }
}
