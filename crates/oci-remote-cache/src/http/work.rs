//! What clients may have done here besides pulling, where the rules let them: `DELETE` takes back what is held, `POST` to our extension
//! has an image fetched.
//!
//! Neither ever reaches an upstream as such. Where clients have no names nobody has these rights, and all methods but GET and HEAD are
//! refused as ever.

use std::net::SocketAddr;

use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode, header};
use oci::{AnyDigest, Platform, Reference, Route, Target};

use super::body::Body;
use super::dispatch::{Registry, kind, name, refusal, refused, set, with_outcome};
use super::failure;
use super::observe::Outcome;
use super::problem::Problem;
use crate::cache::warm::{WarmError, WarmWish, Warmed};
use crate::deadline::Deadline;
use crate::names::UpstreamId;
use crate::policy::{Client, namespace::Resolved, permit_purge, permit_warm};

/// When a full queue is worth another try.
const QUEUE_REST: std::time::Duration = std::time::Duration::from_secs(30);

/// Work asked for.
enum Work<'a> {
    Untag(&'a Reference),
    Drop(&'a AnyDigest),
    Warm {
        reference: &'a Reference,
        platform: Option<&'a Platform>,
        wait: Wait,
    },
}

/// Whether the client waits for the end.
#[derive(Clone, Copy)]
enum Wait {
    Yes,
    No,
}

impl<'a> Work<'a> {
    fn of(method: &Method, target: &'a Target) -> Option<Self> {
        match target {
            Target::Manifest { reference, .. } if method == Method::DELETE => {
                Some(Self::Untag(reference))
            }
            Target::Blob { digest, .. } if method == Method::DELETE => Some(Self::Drop(digest)),
            Target::Warm {
                reference,
                platform,
                wait,
                ..
            } if method == Method::POST => Some(Self::Warm {
                reference,
                platform: platform.as_ref(),
                wait: if *wait { Wait::Yes } else { Wait::No },
            }),
            Target::Base
            | Target::Manifest { .. }
            | Target::Blob { .. }
            | Target::Tags { .. }
            | Target::Referrers { .. }
            | Target::Catalog { .. }
            | Target::Warm { .. } => None,
        }
    }
}

impl Registry {
    /// Answers a `DELETE` or `POST` of a client that has a name.
    pub(super) async fn work(
        &self,
        parts: &Parts,
        (client, peer): (Client, SocketAddr),
    ) -> Response<Body> {
        let route = match Route::parse(parts.uri.path(), parts.uri.query()) {
            Ok(route) => route,
            Err(error) => return refused(failure::of_route(&error), "other"),
        };
        let kind = kind(&route.target);
        let asked = Work::of(&parts.method, &route.target).zip(name(&route.target));
        let Some((work, name)) = asked else {
            return refused(Problem::method_not_allowed(), kind);
        };
        let prefix = route.prefix.as_deref();
        let resolved = self.names.resolve(prefix, name, route.namespace.as_deref());
        let resolved = match resolved {
            Ok(resolved) => resolved,
            Err(unknown) => return refused(failure::of_name(&unknown), kind),
        };
        let upstream = resolved.upstream.clone();
        let client = self.with_login(&upstream, parts, client);
        let response = match self.done(work, client, resolved).await {
            Ok(response) => response,
            Err(problem) => refusal(failure::jittered(problem, peer.port())),
        };
        with_outcome(response, counted(kind, upstream))
    }

    async fn done(
        &self,
        work: Work<'_>,
        client: Client,
        place: Resolved,
    ) -> Result<Response<Body>, Problem> {
        let (upstream, repository) = (place.upstream, place.repository);
        let rules = &self.gate.rules;
        let purge = || permit_purge(rules, client.clone(), upstream.clone(), repository.clone());
        let refusal = |refusal| failure::of_refusal(refusal);
        let purged = match work {
            Work::Untag(reference) => {
                let licence = purge().map_err(refusal)?;
                self.cache.purge_manifest(&licence, reference).await
            }
            Work::Drop(digest) => {
                let licence = purge().map_err(refusal)?;
                self.cache.purge_blob(&licence, digest).await
            }
            Work::Warm {
                reference,
                platform,
                wait,
            } => {
                let licence = permit_warm(rules, client, upstream, repository).map_err(refusal)?;
                let wish = WarmWish {
                    reference: reference.clone(),
                    platform: platform.cloned(),
                };
                let begun = self.cache.warm(&licence, wish);
                let begun = begun
                    .map_err(|full| Problem::too_many_requests(full.to_string(), QUEUE_REST))?;
                return match wait {
                    Wait::No => Ok(told(StatusCode::ACCEPTED, None)),
                    Wait::Yes => waited(begun).await,
                };
            }
        };
        purged.map_err(|error| failure::of_cache(&error))?;
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::ACCEPTED;
        Ok(response)
    }
}

/// The end of the work, or that it goes on where it takes longer than any answer may.
async fn waited(
    work: tokio::task::JoinHandle<Result<Warmed, WarmError>>,
) -> Result<Response<Body>, Problem> {
    match Deadline::for_answer().run(work).await {
        Err(_late) => Ok(told(StatusCode::ACCEPTED, None)),
        Ok(Ok(Ok(warmed))) => Ok(told(StatusCode::OK, Some(warmed))),
        Ok(Ok(Err(error))) => Err(failure::of_warm(&error)),
        Ok(Err(_lost)) => Err(failure::of_warm(&WarmError::Stopping)),
    }
}

fn told(status: StatusCode, warmed: Option<Warmed>) -> Response<Body> {
    let text = match warmed {
        Some(Warmed {
            manifests,
            blobs,
            bytes,
        }) => serde_json::json!({
            "state": "done", "manifests": manifests, "blobs": blobs, "bytes": bytes,
        }),
        None => serde_json::json!({ "state": "accepted" }),
    };
    let mut response = Response::new(Body::memory(text.to_string()));
    *response.status_mut() = status;
    set(
        response.headers_mut(),
        header::CONTENT_TYPE,
        "application/json",
    );
    response
}

fn counted(kind: &'static str, upstream: UpstreamId) -> Outcome {
    Outcome {
        upstream: Some(upstream),
        ..Outcome::none(kind)
    }
}
