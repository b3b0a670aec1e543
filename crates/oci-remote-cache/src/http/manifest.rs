//! Manifests, said in headers.

use hyper::header::{
    AGE, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH, VARY,
    WARNING,
};
use hyper::{Response, StatusCode, header};
use oci::{AnyDigest, Reference};

use super::body::Body;
use super::dispatch::{Answer, Request, add, set};
use super::problem::Problem;
use super::{conditional, failure};
use crate::cache::manifest::{ManifestAnswer, ManifestWish, Method};
use crate::verdict::Verdict;

/// What every client relies on; computed by us, whatever the upstream sent.
pub const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Answers by digest never change.
pub const IMMUTABLE: &str = "max-age=31536000, immutable";

/// Answers a GET or HEAD of a manifest.
pub async fn answer(request: &Request<'_>, reference: &Reference) -> Result<Answer, Problem> {
    let wish = ManifestWish {
        method: if request.is_head() {
            Method::Head
        } else {
            Method::Get
        },
        accept: request.joined(&header::ACCEPT),
    };
    let found = request
        .cache
        .manifest(&request.grant, reference, &wish, request.deadline)
        .await;
    let manifest = found.map_err(|error| failure::of_cache(&error))?;
    let verdict = manifest.verdict;
    let unchanged = match &manifest.digest {
        AnyDigest::Known(digest) => {
            conditional::if_none_match(request.values(&IF_NONE_MATCH), digest)
        }
        AnyDigest::Foreign(_) => false,
    };
    let mut response = Response::new(Body::empty());
    describe(&mut response, &manifest, reference);
    if unchanged {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(Answer::new(response, verdict));
    }
    set(
        response.headers_mut(),
        CONTENT_TYPE,
        manifest.media_type.as_str(),
    );
    set(
        response.headers_mut(),
        CONTENT_LENGTH,
        &manifest.size.to_string(),
    );
    if let Some(body) = manifest.body {
        *response.body_mut() = Body::memory(body);
    }
    Ok(Answer::new(response, verdict))
}

fn describe(response: &mut Response<Body>, manifest: &ManifestAnswer, reference: &Reference) {
    let headers = response.headers_mut();
    set(headers, DOCKER_CONTENT_DIGEST, &manifest.digest.to_string());
    set(headers, ETAG, &format!("\"{}\"", manifest.digest));
    match reference {
        Reference::Digest(_) => set(headers, CACHE_CONTROL, IMMUTABLE),
        Reference::Tag(_) => {
            set(headers, CACHE_CONTROL, "no-cache");
            set(headers, VARY, "Accept");
        }
    }
    for warning in manifest.warnings.iter().flat_map(|all| all.iter()) {
        add(headers, WARNING, &warning.to_string());
    }
    if let Some(age) = manifest.age {
        set(headers, AGE, &age.as_secs().to_string());
    }
    if let Verdict::Stale(why) = manifest.verdict
        && let Some(why) = why.warning()
    {
        let age = manifest.age.unwrap_or_default().as_secs();
        // podman prints it to its user.
        let text = format!("299 - \"served from cache, last checked {age} s ago: {why}\"");
        add(headers, WARNING, &text);
    }
}
