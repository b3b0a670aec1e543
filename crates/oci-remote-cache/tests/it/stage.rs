//! What every test stands on: one registry behind one cache, and the questions asked of both at the end.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::time::Duration;

use oci::Digest;
use testbed::{
    CacheBuilder, CacheProcess, Connection, Content, Handler, Image, ImageSpec, Registry, Response,
    Upstream, eventually,
};
use tokio::time::sleep;

/// The binary under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_oci-remote-cache");

/// A repository that needs no explanation.
pub(crate) const REPO: &str = "lib/app";

/// Where an answer names its digest.
pub(crate) const DIGEST: &str = "docker-content-digest";

/// How long requests of one repository may share a failure, and a little more.
pub(crate) const AFTER_A_FAILURE: Duration = Duration::from_millis(700);

/// A cache of the binary under test.
pub(crate) fn cache() -> CacheBuilder {
    CacheProcess::of(BINARY)
}

/// A registry, and a cache that knows it as `up`.
pub(crate) async fn up() -> (Registry, CacheProcess) {
    up_as(|upstream| upstream).await
}

/// As [`up`], with more said of the upstream.
pub(crate) async fn up_as(say: impl FnOnce(Upstream) -> Upstream) -> (Registry, CacheProcess) {
    let registry = Registry::start().await;
    let upstream = say(Upstream::new("up", registry.url()));
    let cache = cache().upstream(upstream).start().await;
    (registry, cache)
}

/// As [`up`], with a tag that has no time to live.
pub(crate) async fn up_without_ttl() -> (Registry, CacheProcess) {
    up_as(|upstream| upstream.tag_ttl("0s")).await
}

/// As [`up`], with an image in the registry that nobody asked for yet.
pub(crate) async fn up_with_image() -> (Registry, CacheProcess, Image) {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    (registry, cache, image)
}

/// As [`up`], with a blob in the registry that nobody asked for yet.
pub(crate) async fn up_with_blob(size: usize) -> (Registry, CacheProcess, Content) {
    let (registry, cache) = up().await;
    let blob = Content::blob(size, "the blob");
    registry.put_blob(REPO, &blob);
    (registry, cache, blob)
}

/// Fails unless the store comes to hold exactly these.
pub(crate) async fn assert_holds<C: Borrow<Content>>(
    cache: &CacheProcess,
    contents: impl IntoIterator<Item = C>,
) {
    let wanted: BTreeSet<String> = contents
        .into_iter()
        .map(|content| content.borrow().digest.to_string())
        .collect();
    let same = eventually(Duration::from_secs(8), || stored(cache) == wanted).await;
    assert!(same, "stored: {:?}\nwanted: {wanted:?}", stored(cache));
}

/// Fails unless nothing is stored, and nothing comes a moment later.
pub(crate) async fn assert_holds_nothing(cache: &CacheProcess) {
    sleep(Duration::from_millis(300)).await;
    assert_holds::<Content>(cache, []).await;
    let swept = eventually(Duration::from_secs(1), || cache.spool_files().is_empty()).await;
    assert!(swept, "left in the spool: {:?}", cache.spool_files());
}

/// Fails unless the answer is one of ours that says no: one of these statuses, in the specification's words.
pub(crate) fn assert_refused(response: &Response, statuses: &[u16]) {
    assert!(
        statuses.contains(&response.status) && response.complete,
        "got {response}, want one of {statuses:?}: {}",
        response.text()
    );
    assert!(
        !response.error_code().is_empty(),
        "no error body under {response}: {}",
        response.text()
    );
    assert_eq!(
        response.header("content-type"),
        Some("application/json"),
        "{response}"
    );
    assert_eq!(
        response.all("www-authenticate"),
        Vec::<&str>::new(),
        "a challenge was passed on"
    );
    assert_eq!(
        response.header("location"),
        None,
        "a redirect was passed on"
    );
}

/// What comes back for these bytes until the connection is closed, which must happen.
pub(crate) async fn raw_exchange(cache: &CacheProcess, bytes: &[u8]) -> String {
    let mut connection = Connection::open(cache.port()).await;
    connection.send(bytes).await;
    let (answer, closed) = connection.until_closed(Duration::from_secs(5)).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(
        closed,
        "not closed after {:?}: {answer}",
        String::from_utf8_lossy(bytes)
    );
    answer
}

/// What the cache says it did.
pub(crate) fn said(response: &Response) -> &str {
    response.header("cache-status").unwrap_or_default()
}

/// The headers that must be the same on hit and miss, GET and HEAD.
pub(crate) fn lasting_headers(response: &Response) -> Vec<(String, String)> {
    const PASSING: [&str; 4] = ["date", "age", "cache-status", "connection"];
    let mut headers: Vec<(String, String)> = response
        .headers
        .iter()
        .map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
        .filter(|(name, _)| !PASSING.contains(&name.as_str()))
        .collect();
    headers.sort();
    headers
}

/// `GET /v2/<repo>/manifests/<reference>`, as a registry logs it.
pub(crate) fn get_manifest(repo: &str, reference: impl std::fmt::Display) -> String {
    format!("GET /v2/{repo}/manifests/{reference}")
}

/// `HEAD /v2/<repo>/manifests/<reference>`, as a registry logs it.
pub(crate) fn head_manifest(repo: &str, reference: impl std::fmt::Display) -> String {
    format!("HEAD /v2/{repo}/manifests/{reference}")
}

/// `GET /v2/<repo>/blobs/<digest>`, as a registry logs it.
pub(crate) fn get_blob(repo: &str, digest: Digest) -> String {
    format!("GET /v2/{repo}/blobs/{digest}")
}

/// `HEAD /v2/<repo>/blobs/<digest>`, as a registry logs it.
pub(crate) fn head_blob(repo: &str, digest: Digest) -> String {
    format!("HEAD /v2/{repo}/blobs/{digest}")
}

/// Answers with this content, and says of it what the headers say.
pub(crate) fn as_it_is(content: &Content, headers: &[(&str, &str)]) -> Handler {
    testbed::faults::status(200, headers, content.data.clone())
}

fn stored(cache: &CacheProcess) -> BTreeSet<String> {
    cache
        .stored()
        .into_iter()
        .map(|file| format!("{}:{}", file.algorithm, file.hex))
        .collect()
}
