//! `/api/v1/offline`: upstreams are kept from being asked, and asked again, while the process runs.
//!
//! `GET` shows all switches, `PUT` turns one on, `DELETE` turns it off; the path names the upstream, or with none means all of them. What
//! is switched here lasts until the process ends: `offline` in the configuration is what lasts longer.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, ORIGIN};
use hyper::http::request::Parts;
use hyper::{Method, Response};
use oci::ErrorCode;
use serde::Serialize;

use crate::http::body::Body;
use crate::http::problem::Problem;
use crate::metrics::{Metrics, UpstreamLabel};
use crate::names::UpstreamId;
use crate::upstream::{Offline, Switch};

const PATH: &str = "/api/v1/offline";

/// The switches of all upstreams.
#[derive(Clone, Debug)]
pub struct Switches {
    everywhere: Switch,
    upstreams: BTreeMap<UpstreamId, Offline>,
    metrics: Metrics,
}

/// The answer to `GET`.
#[derive(Serialize)]
struct State<'a> {
    all: bool,
    upstreams: BTreeMap<&'a str, bool>,
}

impl Switches {
    /// These switches, shown in `metrics`.
    pub fn new(
        everywhere: Switch,
        upstreams: BTreeMap<UpstreamId, Offline>,
        metrics: Metrics,
    ) -> Self {
        let switches = Self {
            everywhere,
            upstreams,
            metrics,
        };
        switches.show();
        switches
    }

    /// The answer, where the path is ours.
    pub(super) fn answer(&self, request: &Parts, peer: SocketAddr) -> Option<Response<Body>> {
        let path = request.uri.path().strip_prefix(PATH)?;
        let name = match path.strip_prefix('/') {
            Some(name) => Some(name),
            None if path.is_empty() => None,
            None => return None,
        };
        if request.method == Method::GET || request.method == Method::HEAD {
            return Some(self.state());
        }
        if request.method != Method::PUT && request.method != Method::DELETE {
            let message = "PUT switches offline, DELETE back, GET tells";
            return Some(Problem::only("GET, HEAD, PUT, DELETE", message).into_response());
        }
        // A page in somebody's browser is no operator, wherever the browser runs.
        if !peer.ip().to_canonical().is_loopback() || request.headers.contains_key(ORIGIN) {
            let message = "switches are changed from this machine only, and not from a browser";
            return Some(Problem::denied(message).into_response());
        }
        Some(self.turn(name, &request.method))
    }

    fn turn(&self, name: Option<&str>, method: &Method) -> Response<Body> {
        let switch = match name {
            None => Some(&self.everywhere),
            Some(name) => self
                .upstreams
                .get(&UpstreamId::new(name))
                .map(Offline::here),
        };
        let Some(switch) = switch else {
            let message = "no upstream has this key";
            return Problem::not_found(ErrorCode::NameUnknown, message).into_response();
        };
        let upstream = name.unwrap_or("all");
        if method == Method::PUT {
            switch.turn_on();
            tracing::warn!(
                upstream,
                "switched offline: what is held is served, nothing is asked"
            );
        } else {
            switch.turn_off();
            tracing::warn!(upstream, "no longer switched offline");
        }
        self.show();
        self.state()
    }

    fn state(&self) -> Response<Body> {
        let upstreams = self.upstreams.iter();
        let state = State {
            all: self.everywhere.is_on(),
            upstreams: upstreams
                .map(|(id, offline)| (id.as_str(), offline.here().is_on()))
                .collect(),
        };
        // Strings and booleans always serialise.
        let body = serde_json::to_string(&state).unwrap_or_default();
        let mut response = Response::new(Body::memory(body));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }

    fn show(&self) {
        for (id, offline) in &self.upstreams {
            let label = UpstreamLabel {
                upstream: id.as_str().to_owned(),
            };
            let gauge = self.metrics.offline.get_or_create(&label);
            gauge.set(i64::from(offline.is_on()));
        }
    }
}
