//! The operators' door: health and metrics, on a listener of their own.
//!
//! Nothing here is meant for container clients, except that [`health::answer`] answers on their listener too.

pub mod health;
pub mod metrics;

use std::fmt;
use std::net::SocketAddr;

use hyper::http::request::Parts;
use hyper::{Method, Response};
use oci::ErrorCode;

use crate::http::body::Body;
use crate::http::listen::Handler;
use crate::http::observe::Audience;
use crate::http::problem::Problem;
use crate::metrics::Metrics;
use health::Readiness;

/// The admin listener's handler.
pub struct Admin {
    metrics: Metrics,
    readiness: Readiness,
}

impl Handler for Admin {
    async fn handle(&self, request: Parts, _peer: SocketAddr) -> Response<Body> {
        self.answer(&request)
    }

    fn audience(&self) -> Audience {
        Audience::Operators
    }
}

impl Admin {
    /// Shows `metrics`, and what `readiness` says.
    pub fn new(metrics: Metrics, readiness: Readiness) -> Self {
        Self { metrics, readiness }
    }

    /// What `/readyz` asks.
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    fn answer(&self, request: &Parts) -> Response<Body> {
        if request.method != Method::GET && request.method != Method::HEAD {
            return Problem::method_not_allowed().into_response();
        }
        let path = request.uri.path();
        if path == "/metrics" {
            return metrics::answer(&self.metrics);
        }
        health::answer(path, &self.readiness).unwrap_or_else(|| {
            let message =
                "here are /healthz, /readyz and /metrics; images are pulled from the other port";
            Problem::not_found(ErrorCode::Unsupported, message).into_response()
        })
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").finish_non_exhaustive()
    }
}
