//! Lists of tags and referrers, said in headers. The next page always lies here, under the path the client used.

use std::fmt::Write as _;

use hyper::Response;
use hyper::header::{CONTENT_TYPE, HeaderName, LINK, WARNING};
use oci::{AnyDigest, OCI_INDEX, Page, Route, Target};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::body::Body;
use super::dispatch::{Answer, Request, add, set};
use super::failure;
use super::problem::Problem;
use crate::cache::Cache;
use crate::cache::listing::{Content, List, Listing};
use crate::policy::{Client, Rules};
use crate::verdict::Verdict;

/// The specification's mark that the upstream filtered by artifact type.
const OCI_FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");

/// Names on a page of the catalog whose size nobody set.
const CATALOG_PAGE: u32 = 1000;

/// What a query value may hold as it is.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Answers `tags/list`.
pub async fn tags(request: &Request<'_>, route: &Route, page: &Page) -> Result<Answer, Problem> {
    let (listing, verdict) = list(request, List::Tags(page.clone())).await?;
    let Content::Tags(tags) = &listing.content else {
        return Err(Problem::internal("a list of tags was expected"));
    };
    let mut response = Response::new(Body::memory(tags.clone()));
    set(response.headers_mut(), CONTENT_TYPE, "application/json");
    next(&mut response, route, &listing, None);
    Ok(said(response, &listing, verdict))
}

/// Answers `referrers/<digest>`.
pub async fn referrers(
    request: &Request<'_>,
    route: &Route,
    (digest, artifact_type, page): (&AnyDigest, Option<&str>, &Page),
) -> Result<Answer, Problem> {
    let wanted = List::Referrers {
        digest: digest.clone(),
        artifact_type: artifact_type.map(str::to_owned),
        page: page.clone(),
    };
    let (listing, verdict) = list(request, wanted).await?;
    let Content::Referrers { index, filtered } = &listing.content else {
        return Err(Problem::internal("a list of referrers was expected"));
    };
    let mut response = Response::new(Body::memory(index.clone()));
    // oras compares the whole value.
    set(response.headers_mut(), CONTENT_TYPE, OCI_INDEX);
    if *filtered {
        set(response.headers_mut(), OCI_FILTERS_APPLIED, "artifactType");
    }
    next(&mut response, route, &listing, artifact_type);
    Ok(said(response, &listing, verdict))
}

/// Answers `_catalog`: what is cached, under the names by which clients ask for it here.
pub async fn catalog(
    cache: &Cache,
    whom: (&Rules, &Client),
    route: &Route,
    page: &Page,
) -> Result<Response<Body>, Problem> {
    let most = page.n.unwrap_or(CATALOG_PAGE);
    let after = page.last.as_deref().unwrap_or_default();
    let found = cache
        .repositories(whom, after, most.saturating_add(1))
        .await;
    let mut names = found.map_err(|error| failure::of_cache(&error))?;
    let more = names.len() > most as usize;
    names.truncate(most as usize);
    let body = serde_json::json!({ "repositories": names }).to_string();
    let mut response = Response::new(Body::memory(body));
    set(response.headers_mut(), CONTENT_TYPE, "application/json");
    if let Some(last) = names.pop().filter(|_| more) {
        let next = Page {
            n: Some(most),
            last: Some(last),
            ..Page::default()
        };
        let link = format!("</v2/_catalog?{}>; rel=\"next\"", query(route, &next, None));
        set(response.headers_mut(), LINK, &link);
    }
    Ok(response)
}

async fn list(
    request: &Request<'_>,
    list: List,
) -> Result<(std::sync::Arc<Listing>, Verdict), Problem> {
    let answer = request
        .cache
        .listing(&request.grant, list, request.deadline)
        .await;
    answer.map_err(|error| failure::of_cache(&error))
}

fn said(mut response: Response<Body>, listing: &Listing, verdict: Verdict) -> Answer {
    for warning in &listing.warnings {
        add(response.headers_mut(), WARNING, &warning.to_string());
    }
    if let Verdict::Stale(why) = verdict
        && let Some(why) = why.warning()
    {
        let text = format!("299 - \"served from cache: {why}\"");
        add(response.headers_mut(), WARNING, &text);
    }
    Answer::new(response, verdict)
}

fn next(
    response: &mut Response<Body>,
    route: &Route,
    listing: &Listing,
    artifact_type: Option<&str>,
) {
    let Some(page) = &listing.next else { return };
    let link = format!(
        "<{}?{}>; rel=\"next\"",
        path(route),
        query(route, page, artifact_type)
    );
    set(response.headers_mut(), LINK, &link);
}

/// The path the client used, made again from its parsed parts.
fn path(route: &Route) -> String {
    let prefix = route
        .prefix
        .as_ref()
        .map(|prefix| format!("/{prefix}"))
        .unwrap_or_default();
    let rest = match &route.target {
        Target::Referrers { digest, .. } => format!("referrers/{digest}"),
        Target::Tags { .. }
        | Target::Base
        | Target::Manifest { .. }
        | Target::Blob { .. }
        | Target::Warm { .. }
        | Target::Catalog { .. } => "tags/list".to_owned(),
    };
    format!("{prefix}/v2/{}/{rest}", name(route))
}

fn query(route: &Route, page: &Page, artifact_type: Option<&str>) -> String {
    // These stand as they came, and hold nothing that could end a link.
    let mut query = page.others.clone();
    let n = page.n.map(|n| n.to_string());
    let parameters = [
        ("artifactType", artifact_type),
        ("n", n.as_deref()),
        ("last", page.last.as_deref()),
        ("next_page", page.next.as_deref()),
        ("ns", route.namespace.as_deref()),
    ];
    for (name, value) in parameters
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
    {
        let separator = if query.is_empty() { "" } else { "&" };
        // Writing to a String cannot fail.
        write!(
            query,
            "{separator}{name}={}",
            utf8_percent_encode(value, QUERY)
        )
        .ok();
    }
    query
}

fn name(route: &Route) -> &str {
    match &route.target {
        Target::Tags { name, .. }
        | Target::Referrers { name, .. }
        | Target::Manifest { name, .. }
        | Target::Warm { name, .. }
        | Target::Blob { name, .. } => name.as_str(),
        Target::Base | Target::Catalog { .. } => "",
    }
}
