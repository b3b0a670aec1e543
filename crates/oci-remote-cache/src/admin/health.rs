//! `/healthz`: the process lives. `/readyz`: it can do what it was configured to do, or what it cannot.
//!
//! Neither asks an upstream: a registry that is down must not get its cache restarted.

use std::sync::Arc;

use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::http::body::Body;

/// Tells how the process is.
pub type Readiness = Arc<dyn Fn() -> Condition + Send + Sync>;

/// How the process is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// Why it is not ready; nothing when it is.
    pub reasons: Vec<String>,
    /// What an operator should know besides, which no restart would mend: upstreams that refuse us.
    pub notes: Vec<String>,
}

/// The body of `/readyz`.
#[derive(Serialize)]
struct Report {
    status: &'static str,
    reasons: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

/// The answer, where `path` is one of the two.
pub fn answer(path: &str, readiness: &Readiness) -> Option<Response<Body>> {
    match path {
        "/healthz" => Some(text(StatusCode::OK, "text/plain; charset=utf-8", "ok\n")),
        "/readyz" => Some(report(readiness())),
        _ => None,
    }
}

fn report(condition: Condition) -> Response<Body> {
    let Condition { reasons, notes } = condition;
    let (code, status) = if reasons.is_empty() {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready")
    };
    let report = Report {
        status,
        reasons,
        notes,
    };
    // Strings alone always serialise.
    let body = serde_json::to_string(&report).unwrap_or_default();
    text(code, "application/json", body)
}

fn text(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<bytes::Bytes>,
) -> Response<Body> {
    let mut response = Response::new(Body::memory(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
