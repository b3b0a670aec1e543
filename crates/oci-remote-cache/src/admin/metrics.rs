//! `/metrics` in OpenMetrics text.

use hyper::Response;
use hyper::header::{CONTENT_TYPE, HeaderValue};

use crate::http::body::Body;
use crate::metrics::Metrics;

/// What the text is called, so that Prometheus parses it as OpenMetrics.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The answer.
pub fn answer(metrics: &Metrics) -> Response<Body> {
    let mut response = Response::new(Body::memory(metrics.render()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(OPEN_METRICS));
    response
}
