//! From a request to a route, a grant, and the file that answers.

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use hyper::header::{
    AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::request::Parts;
use hyper::{Method, Response};
use oci::{ErrorCode, NamePath, Route, Target};

use super::body::Body;
use super::doorman::{Certified, Doorman, unauthorized};
use super::failure;
use super::fair::Pace;
use super::listen::Handler;
use super::observe::Outcome;
use super::problem::Problem;
use super::{blob, listing, manifest};
use crate::cache::Cache;
use crate::deadline::Deadline;
use crate::metrics::{Limited, Metrics};
use crate::names::UpstreamId;
use crate::policy::{Client, Door, Grant, Names, Rules, admit};
use crate::verdict::{Assurance, Verdict};

/// Docker before 1.10 looks for this; nobody minds it.
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// The specification's mark that `ns` was understood.
const OCI_NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");

/// RFC 9211.
const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// Answers paths that are not the registry's: health.
pub type Aside = Box<dyn Fn(&str) -> Option<Response<Body>> + Send + Sync>;

/// Answers clients.
pub struct Registry {
    pub(super) cache: Cache,
    pub(super) names: Names,
    aside: Aside,
    pub(super) gate: Gate,
    catalog: Catalog,
}

/// Who may come in, and to what.
#[derive(Debug)]
pub struct Gate {
    /// Finds out who clients are.
    pub doorman: Doorman,
    /// Says what they may do.
    pub rules: Rules,
    /// Upstreams to which clients show their own logins.
    pub by_login: HashSet<UpstreamId>,
    /// Says how many requests they may make.
    pub pace: Option<Pace>,
    /// Where it is counted that they made more.
    pub metrics: Metrics,
}

/// Whether the names of cached repositories are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Catalog {
    Hidden,
    Listed,
}

/// A request for something of a repository that its client may ask for.
#[derive(Debug)]
pub struct Request<'a> {
    /// What may be asked.
    pub grant: Grant,
    /// The request line and headers.
    pub parts: &'a Parts,
    /// By when the answer's headers must have left.
    pub deadline: Deadline,
    /// The cache.
    pub cache: &'a Cache,
}

/// An answer and what the cache did for it.
#[derive(Debug)]
pub struct Answer {
    /// Status, headers and body.
    pub response: Response<Body>,
    /// What the cache did.
    pub verdict: Verdict,
    /// Whether all bytes of it are known to be right.
    pub assurance: Assurance,
}

impl Gate {
    /// Counts a request, and refuses it where its address has made too many.
    fn enter(&self, peer: SocketAddr) -> Result<(), Problem> {
        let Some(pace) = &self.pace else {
            return Ok(());
        };
        pace.enter(peer.ip()).map_err(|wait| {
            self.metrics.limited(Limited::Requests);
            let message = "your address asks more often than this cache allows";
            Problem::too_many_requests(message, wait.max(Duration::from_secs(1)))
        })
    }
}

impl Registry {
    /// Answers from `cache`, by `names`; `aside` answers what lies outside the registry's API.
    pub fn new(cache: Cache, names: Names, aside: Aside, gate: Gate) -> Self {
        Self {
            cache,
            names,
            aside,
            gate,
            catalog: Catalog::Hidden,
        }
    }

    /// Lists the repositories of which something is cached.
    #[must_use]
    pub fn with_catalog(self) -> Self {
        Self {
            catalog: Catalog::Listed,
            ..self
        }
    }

    async fn answer(&self, parts: &Parts, peer: SocketAddr) -> Response<Body> {
        let work = self.gate.rules.door() == Door::Kept
            && (parts.method == Method::DELETE || parts.method == Method::POST);
        if !work && parts.method != Method::GET && parts.method != Method::HEAD {
            return refused(Problem::method_not_allowed(), "other");
        }
        if !work && let Some(response) = (self.aside)(parts.uri.path()) {
            return with_outcome(response, Outcome::none("health"));
        }
        if let Err(problem) = self.gate.enter(peer) {
            return refused(problem, "other");
        }
        let client = match self.client(parts, peer).await {
            Ok(client) => client,
            Err(problem) => return refused(problem, "other"),
        };
        let name = client.name.clone();
        let mut response = match Route::parse(parts.uri.path(), parts.uri.query()) {
            _ if work => Box::pin(self.work(parts, (client, peer))).await,
            Ok(route) => self.routed(route, parts, (client, peer)).await,
            Err(error) => refused(failure::of_route(&error), "other"),
        };
        if let Some(name) = name {
            // For the access line.
            response.extensions_mut().insert(name);
        }
        response
    }

    /// Who sends the request. Settled before its path is looked at, so that an unauthorised answer tells nothing.
    async fn client(&self, parts: &Parts, peer: SocketAddr) -> Result<Client, Problem> {
        let shown = match parts.extensions.get::<Certified>() {
            Some(Certified(name)) => Some(name.clone()),
            None => self.gate.doorman.identify(&parts.headers).await?,
        };
        if shown.is_none() && !self.gate.rules.admits_anonymous() {
            return Err(unauthorized("log in to this cache"));
        }
        Ok(Client {
            address: peer.ip(),
            name: shown,
            login: None,
        })
    }

    /// The client with the login it shows, where that is the upstream's to judge.
    pub(super) fn with_login(
        &self,
        upstream: &UpstreamId,
        parts: &Parts,
        client: Client,
    ) -> Client {
        let takes_logins = self.gate.by_login.contains(upstream);
        Client {
            login: takes_logins
                .then(|| self.gate.doorman.login_shown(&parts.headers))
                .flatten(),
            ..client
        }
    }

    async fn routed(
        &self,
        route: Route,
        parts: &Parts,
        (client, peer): (Client, SocketAddr),
    ) -> Response<Body> {
        let kind = kind(&route.target);
        let Some(name) = name(&route.target) else {
            return self.nameless((&route, parts), kind, client).await;
        };
        let resolved =
            match self
                .names
                .resolve(route.prefix.as_deref(), name, route.namespace.as_deref())
            {
                Ok(resolved) => resolved,
                Err(unknown) => return refused(failure::of_name(&unknown), kind),
            };
        let upstream = resolved.upstream.clone();
        let client = self.with_login(&upstream, parts, client);
        let grant = admit(
            &self.gate.rules,
            client,
            resolved.upstream,
            resolved.repository,
        );
        let grant = match grant {
            Ok(grant) => grant,
            Err(refusal) => return refused(failure::of_refusal(refusal), kind),
        };
        let request = Request {
            grant,
            parts,
            deadline: Deadline::for_answer(),
            cache: &self.cache,
        };
        let answer = match request.answer(&route).await {
            Ok(answer) => answer,
            Err(problem) => {
                let problem = failure::hinted(problem, request.grant.source());
                Answer::refusal(failure::jittered(problem, peer.port()))
            }
        };
        let outcome = Outcome {
            verdict: answer.verdict,
            kind,
            upstream: Some(upstream.clone()),
            assurance: answer.assurance,
        };
        let mut response = with_outcome(answer.response, outcome);
        if route.namespace.is_some()
            && let Ok(namespace) = HeaderValue::from_str(upstream.as_str())
        {
            response.headers_mut().insert(OCI_NAMESPACE, namespace);
        }
        response
    }
}

impl Registry {
    /// The two endpoints that name no repository. The catalog leaks names, and Docker Hub has none either.
    ///
    /// The ping is where containers/image and Docker learn that they should log in, so it asks for that also where some repositories are
    /// for everyone: they go on without, if they have nothing to show.
    async fn nameless(
        &self,
        (route, parts): (&Route, &Parts),
        kind: &'static str,
        client: Client,
    ) -> Response<Body> {
        let takes_logins = !self.gate.by_login.is_empty();
        let Target::Catalog { page } = &route.target else {
            if client.name.is_none() && self.gate.rules.door() == Door::Kept {
                return refused(unauthorized("log in to this cache"), kind);
            }
            if takes_logins && !parts.headers.contains_key(AUTHORIZATION) && !gives_up(parts) {
                return refused(unauthorized("log in with your login at the upstream"), kind);
            }
            return with_outcome(base(), Outcome::none(kind));
        };
        if self.catalog == Catalog::Hidden {
            let message = "the catalog is not served: see `catalog` in the configuration";
            return refused(Problem::not_found(ErrorCode::Unsupported, message), kind);
        }
        let client = Client {
            login: takes_logins
                .then(|| self.gate.doorman.login_shown(&parts.headers))
                .flatten(),
            ..client
        };
        let whom = (&self.gate.rules, &client);
        match listing::catalog(&self.cache, whom, route, page).await {
            Ok(response) => with_outcome(response, Outcome::none(kind)),
            Err(problem) => refused(problem, kind),
        }
    }
}

impl Request<'_> {
    async fn answer(&self, route: &Route) -> Result<Answer, Problem> {
        // Boxed, because these are several KiB which every connection would keep room for and every request would be moved with.
        match &route.target {
            Target::Manifest { reference, .. } => Box::pin(manifest::answer(self, reference)).await,
            Target::Blob { digest, .. } => Box::pin(blob::answer(self, digest)).await,
            Target::Tags { page, .. } => Box::pin(listing::tags(self, route, page)).await,
            Target::Referrers {
                digest,
                artifact_type,
                page,
                ..
            } => {
                let about = (digest, artifact_type.as_deref(), page);
                Box::pin(listing::referrers(self, route, about)).await
            }
            Target::Warm { .. } => {
                let message = "images are fetched ahead by POST, for clients that may `warm`";
                Err(Problem::only("POST", message))
            }
            Target::Base | Target::Catalog { .. } => Ok(Answer::plain(base())),
        }
    }

    /// All values of a header, joined as one list (RFC 9110 section 5.3): podman sends six `Accept` lines.
    pub fn joined(&self, name: &HeaderName) -> Option<String> {
        let mut values = self.values(name).peekable();
        values.peek()?;
        Some(values.collect::<Vec<_>>().join(", "))
    }

    /// All values of a header that are text.
    pub fn values(&self, name: &HeaderName) -> impl Iterator<Item = &str> {
        self.parts
            .headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
    }

    /// Whether no body is wanted.
    pub fn is_head(&self) -> bool {
        self.parts.method == Method::HEAD
    }
}

impl Answer {
    /// An answer of verified bytes.
    pub fn new(response: Response<Body>, verdict: Verdict) -> Self {
        Self {
            response,
            verdict,
            assurance: Assurance::Verified,
        }
    }

    fn plain(response: Response<Body>) -> Self {
        Self::new(response, Verdict::None)
    }

    fn refusal(problem: Problem) -> Self {
        Self::plain(refusal(problem))
    }
}

impl Handler for Registry {
    async fn handle(&self, request: Parts, peer: SocketAddr) -> Response<Body> {
        let mut response = self.answer(&request, peer).await;
        let headers = response.headers_mut();
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
        response
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

/// Sets a header whose value we made ourselves; a value that is no header text is left out.
pub fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Adds one more line of a header; a value that cannot be one is left out.
pub fn add(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.append(name, value);
    }
}

/// Docker with an image store of its own gives up a pull when the ping asks for a login that it does not have, also where none is
/// needed. What is told apart here opens nothing.
fn gives_up(parts: &Parts) -> bool {
    let agent = parts
        .headers
        .get(USER_AGENT)
        .and_then(|agent| agent.to_str().ok());
    agent.is_some_and(|agent| agent.starts_with("docker/"))
}

fn base() -> Response<Body> {
    let mut response = Response::new(Body::memory("{}"));
    set(response.headers_mut(), CONTENT_TYPE, "application/json");
    response
}

pub(super) fn refused(problem: Problem, kind: &'static str) -> Response<Body> {
    with_outcome(refusal(problem), Outcome::none(kind))
}

/// A refusal that says in `Cache-Status`, too, what it comes of: neither that it was forwarded nor that it is kept, for many never left
/// this house.
pub(super) fn refusal(problem: Problem) -> Response<Body> {
    let status = format!("oci-remote-cache; detail={}", problem.status().detail());
    let mut response = problem.into_response();
    set(response.headers_mut(), CACHE_STATUS, &status);
    response
}

pub(super) fn with_outcome(mut response: Response<Body>, outcome: Outcome) -> Response<Body> {
    if let Some(status) = outcome.verdict.cache_status(outcome.assurance) {
        set(response.headers_mut(), CACHE_STATUS, &status);
    }
    response.extensions_mut().insert(outcome);
    response
}

pub(super) fn kind(target: &Target) -> &'static str {
    match target {
        Target::Base => "base",
        Target::Manifest { .. } => "manifest",
        Target::Blob { .. } => "blob",
        Target::Tags { .. } => "tags",
        Target::Referrers { .. } => "referrers",
        Target::Catalog { .. } => "catalog",
        Target::Warm { .. } => "warm",
    }
}

pub(super) fn name(target: &Target) -> Option<&NamePath> {
    match target {
        Target::Manifest { name, .. }
        | Target::Blob { name, .. }
        | Target::Tags { name, .. }
        | Target::Referrers { name, .. }
        | Target::Warm { name, .. } => Some(name),
        Target::Base | Target::Catalog { .. } => None,
    }
}
