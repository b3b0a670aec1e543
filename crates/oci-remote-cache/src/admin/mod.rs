//! The operators' door: health and metrics, on a listener of their own.
//!
//! Nothing here is meant for container clients, except that [`health::answer`] answers on their listener too.

pub mod health;
pub mod metrics;
pub mod offline;

use std::fmt;
use std::net::SocketAddr;

use hyper::http::request::Parts;
use hyper::{Method, Response};
use oci::ErrorCode;

use crate::http::body::Body;
use crate::http::listen::{Audience, Handler};
use crate::http::problem::Problem;
use crate::metrics::Metrics;
use health::Readiness;
use offline::Switches;

/// The admin listener's handler.
pub struct Admin {
    metrics: Metrics,
    readiness: Readiness,
    switches: Option<Switches>,
}

impl Handler for Admin {
    async fn handle(&self, request: Parts, peer: SocketAddr) -> Response<Body> {
        self.answer(&request, peer)
    }

    fn audience(&self) -> Audience {
        Audience::Operators
    }
}

impl Admin {
    /// Shows `metrics`, and what `readiness` says.
    pub fn new(metrics: Metrics, readiness: Readiness) -> Self {
        Self {
            metrics,
            readiness,
            switches: None,
        }
    }

    /// Lets operators turn these.
    #[must_use]
    pub fn with_switches(self, switches: Switches) -> Self {
        Self {
            switches: Some(switches),
            ..self
        }
    }

    /// What `/readyz` asks.
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    fn answer(&self, request: &Parts, peer: SocketAddr) -> Response<Body> {
        let switches = self.switches.as_ref();
        if let Some(response) = switches.and_then(|switches| switches.answer(request, peer)) {
            return response;
        }
        if request.method != Method::GET && request.method != Method::HEAD {
            return Problem::method_not_allowed().into_response();
        }
        let path = request.uri.path();
        if path == "/metrics" {
            return metrics::answer(&self.metrics);
        }
        health::answer(path, &self.readiness).unwrap_or_else(|| {
            let message =
                "here are /healthz, /readyz, /metrics and /api/v1/offline; images are pulled from the other port";
            Problem::not_found(ErrorCode::Unsupported, message).into_response()
        })
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hyper::header::CONTENT_TYPE;
    use hyper::{Method, Request, Response};

    use super::health::Condition;
    use super::offline::Switches;
    use super::{Admin, Readiness};
    use crate::http::body::{Body, ReadBody};
    use crate::metrics::Metrics;
    use crate::names::UpstreamId;
    use crate::tasks::Tasks;
    use crate::upstream::{Offline, Switch};
    use http_body_util::BodyExt as _;

    async fn ask(admin: &Admin, method: Method, path: &str) -> (u16, String, String) {
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = path.parse().unwrap();
        let here = "127.0.0.1:1000".parse().unwrap();
        let response: Response<Body> = admin.answer(&request.into_parts().0, here);
        let (head, body) = response.into_parts();
        let body = ReadBody::new(body, Tasks::new()).collect().await.unwrap();
        let body = String::from_utf8(body.to_bytes().to_vec()).unwrap();
        let content_type = head.headers[CONTENT_TYPE].to_str().unwrap().to_owned();
        (head.status.as_u16(), content_type, body)
    }

    #[tokio::test]
    async fn operators_see_health_and_metrics_and_nothing_else() {
        let readiness: Readiness = Arc::new(|| Condition {
            reasons: vec!["the cache folder is full".to_owned()],
            notes: Vec::new(),
        });
        let ill = Admin::new(Metrics::new(), readiness);
        let well = Admin::new(Metrics::new(), Arc::new(Condition::default));
        let (status, _, body) = ask(&ill, Method::GET, "/healthz").await;
        assert_eq!((status, body.as_str()), (200, "ok\n"));
        let (status, content_type, body) = ask(&ill, Method::GET, "/readyz").await;
        assert_eq!((status, content_type.as_str()), (503, "application/json"));
        assert_eq!(
            body,
            r#"{"status":"not ready","reasons":["the cache folder is full"]}"#
        );
        let (status, _, body) = ask(&well, Method::GET, "/readyz?verbose").await;
        assert_eq!(
            (status, body.as_str()),
            (200, r#"{"status":"ready","reasons":[]}"#)
        );
        let (status, content_type, body) = ask(&well, Method::GET, "/metrics").await;
        assert_eq!(status, 200);
        assert!(content_type.starts_with("application/openmetrics-text; version=1.0.0"));
        assert!(body.ends_with("# EOF\n"));
        let (status, _, body) = ask(&well, Method::GET, "/v2/").await;
        assert!(status == 404 && body.starts_with("{\"errors\":["), "{body}");
        assert_eq!(ask(&well, Method::DELETE, "/healthz").await.0, 405);
    }

    #[tokio::test]
    async fn notes_do_not_make_unready() {
        let readiness: Readiness = Arc::new(|| Condition {
            reasons: Vec::new(),
            notes: vec!["docker.io is switched offline".to_owned()],
        });
        let admin = Admin::new(Metrics::new(), readiness);
        let (status, _, body) = ask(&admin, Method::GET, "/readyz").await;
        assert_eq!(
            (status, body.as_str()),
            (
                200,
                r#"{"status":"ready","reasons":[],"notes":["docker.io is switched offline"]}"#
            )
        );
    }

    #[tokio::test]
    async fn switches_are_turned_from_here_only() {
        let (all, metrics) = (Switch::default(), Metrics::new());
        let one = Offline::beside(&all);
        let upstreams = [(UpstreamId::new("docker.io"), one.clone())].into();
        let switches = Switches::new(all.clone(), upstreams, metrics.clone());
        let admin =
            Admin::new(metrics.clone(), Arc::new(Condition::default)).with_switches(switches);
        let (status, _, body) = ask(&admin, Method::PUT, "/api/v1/offline/docker.io").await;
        assert_eq!(
            (status, body.as_str()),
            (200, r#"{"all":false,"upstreams":{"docker.io":true}}"#)
        );
        assert!(one.is_on() && !all.is_on());
        let line = r#"oci_remote_cache_upstream_offline{upstream="docker.io"} 1"#;
        assert!(metrics.render().contains(line));
        assert_eq!(
            ask(&admin, Method::DELETE, "/api/v1/offline/docker.io")
                .await
                .0,
            200
        );
        assert!(!one.is_on());
        assert_eq!(ask(&admin, Method::PUT, "/api/v1/offline").await.0, 200);
        assert!(one.is_on() && all.is_on());
        assert_eq!(
            ask(&admin, Method::PUT, "/api/v1/offline/quay.io").await.0,
            404
        );
        assert_eq!(ask(&admin, Method::POST, "/api/v1/offline").await.0, 405);
        assert_eq!(ask(&admin, Method::PUT, "/api/v1/offlineX").await.0, 405);
        let mut request = Request::new(());
        *request.method_mut() = Method::DELETE;
        *request.uri_mut() = "/api/v1/offline".parse().unwrap();
        let (parts, ()) = request.into_parts();
        let afar = "192.0.2.1:1000".parse().unwrap();
        assert_eq!(admin.answer(&parts, afar).status(), 403);
        let mut browsed = parts.clone();
        browsed
            .headers
            .insert("origin", "http://127.0.0.1:8081".parse().unwrap());
        let here = "[::ffff:127.0.0.1]:1000".parse().unwrap();
        assert_eq!(admin.answer(&browsed, here).status(), 403);
        assert!(all.is_on());
        assert_eq!(admin.answer(&parts, here).status(), 200);
        assert!(!all.is_on());
    }
}
