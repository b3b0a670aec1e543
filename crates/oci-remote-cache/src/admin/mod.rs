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
use crate::http::listen::{Audience, Handler};
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hyper::header::CONTENT_TYPE;
    use hyper::{Method, Request, Response};

    use super::{Admin, Readiness};
    use crate::http::body::{Body, ReadBody};
    use crate::metrics::Metrics;
    use crate::tasks::Tasks;
    use http_body_util::BodyExt as _;

    async fn ask(admin: &Admin, method: Method, path: &str) -> (u16, String, String) {
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = path.parse().unwrap();
        let response: Response<Body> = admin.answer(&request.into_parts().0);
        let (head, body) = response.into_parts();
        let body = ReadBody::new(body, Tasks::new()).collect().await.unwrap();
        let body = String::from_utf8(body.to_bytes().to_vec()).unwrap();
        let content_type = head.headers[CONTENT_TYPE].to_str().unwrap().to_owned();
        (head.status.as_u16(), content_type, body)
    }

    #[tokio::test]
    async fn operators_see_health_and_metrics_and_nothing_else() {
        let readiness: Readiness = Arc::new(|| vec!["the cache folder is full".to_owned()]);
        let ill = Admin::new(Metrics::new(), readiness);
        let well = Admin::new(Metrics::new(), Arc::new(Vec::new));
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
}
