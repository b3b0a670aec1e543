//! What was pulled once stays pullable when the upstream is down, limited or has deleted it, and says so.

use std::time::Duration;

use testbed::cache::blob_path;
use testbed::{CacheProcess, Image, ImageSpec, Kind, Request, Response, assert_good, faults};
use tokio::time::sleep;

use crate::stage::{
    REPO, assert_holds, assert_refused, get_blob, get_manifest, head_manifest, lasting_headers,
    said, up_as, up_with_image, up_without_ttl,
};

fn assert_stale(response: &Response, image: &Image) {
    assert_good(response, &image.manifest);
    let warning = response.header("warning").unwrap_or_default();
    assert!(
        warning.starts_with("299 - \"") && warning.ends_with('"'),
        "Warning: {warning:?}"
    );
    assert!(
        said(response).contains("fwd=stale; detail="),
        "{}",
        said(response)
    );
    assert!(response.number("age").is_some(), "no age");
}

/// C07
#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_by_digest_needs_no_upstream() {
    let (registry, cache, image) = up_with_image().await;
    assert_good(
        &cache.manifest("up", REPO, image.digest()).await,
        &image.manifest,
    );
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    let asked = registry.requests();
    assert_eq!(
        asked,
        [
            get_manifest(REPO, image.digest()),
            get_blob(REPO, image.layer().digest)
        ]
    );
    registry.stop().await;
    let manifest = cache.manifest("up", REPO, image.digest()).await;
    assert_good(&manifest, &image.manifest);
    assert_eq!(
        manifest.header("cache-control"),
        Some("max-age=31536000, immutable")
    );
    assert_eq!(
        (said(&manifest), manifest.header("warning")),
        ("oci-remote-cache; hit", None)
    );
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    assert_eq!(
        cache.head_manifest("up", REPO, image.digest()).await.status,
        200
    );
    assert_eq!(registry.requests(), asked);
    assert_holds(&cache, [&image.manifest, image.layer()]).await;
    cache.check_invariants().await;
}

/// F12
#[tokio::test(flavor = "multi_thread")]
async fn an_old_tag_is_served_while_the_upstream_fails() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    registry.clear_log();
    registry.script(Kind::Manifest, faults::error(503, "UNAVAILABLE", &[]));
    assert_stale(&cache.manifest("up", REPO, "v1").await, &image);
    assert_eq!(
        registry.requests(),
        vec![head_manifest(REPO, "v1"); 3],
        "three tries"
    );
    // It is still the tag of before, and is new again once the upstream says so.
    registry.clear_scripts();
    sleep(Duration::from_millis(1100)).await;
    let renewed = cache.manifest("up", REPO, "v1").await;
    assert_good(&renewed, &image.manifest);
    assert_eq!(renewed.header("warning"), None);
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// F12: every way of giving no answer.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_tag_is_served_whatever_keeps_the_upstream_from_answering() {
    for (fault, why) in [
        (faults::error(500, "UNKNOWN", &[]), "upstream-error"),
        (
            faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "100")]),
            "rate-limited",
        ),
        (faults::drop_connection(), "unreachable"),
    ] {
        let (registry, cache) = up_without_ttl().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        cache.pull("up", &image).await;
        registry.script(Kind::Manifest, fault);
        for _ in 0..2 {
            let stale = cache.manifest("up", REPO, "v1").await;
            assert_stale(&stale, &image);
            assert!(said(&stale).contains(why), "{}", said(&stale));
        }
        let head = cache.head_manifest("up", REPO, "v1").await;
        assert_eq!(
            (head.status, head.header("warning").is_some()),
            (200, true),
            "{head}"
        );
        assert_good(
            &cache.blob("up", REPO, image.layer().digest).await,
            image.layer(),
        );
        assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
        cache.check_invariants().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_image_is_pullable_while_the_upstream_is_down() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[0, 10, 300_000]));
    cache.pull("up", &image).await;
    let tags = cache.get("/v2/up/lib/app/tags/list").await;
    registry.stop().await;
    for _ in 0..8 {
        // Past the fifth failure the upstream is left alone, which must change nothing.
        assert_stale(&cache.manifest("up", REPO, "v1").await, &image);
    }
    cache.pull("up", &image).await;
    let stale = cache.get("/v2/up/lib/app/tags/list").await;
    assert_eq!(
        (stale.status, stale.json()),
        (200, tags.json()),
        "{}",
        stale.text()
    );
    assert!(stale.header("warning").is_some());
    let unknown = cache.manifest("up", REPO, "v2").await;
    assert_refused(&unknown, &[502, 503, 504]);
    registry.resume().await;
    sleep(Duration::from_millis(1100)).await;
    let renewed = cache.manifest("up", REPO, "v1").await;
    assert_eq!(renewed.header("warning"), None, "{}", said(&renewed));
    cache.check_invariants().await;
}

/// F19
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_tag_is_gone_and_its_digest_stays() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    registry.remove_manifest(REPO, "v1");
    registry.remove_manifest(REPO, image.digest());
    registry.remove_blob(REPO, image.layer().digest);
    let gone = cache.manifest("up", REPO, "v1").await;
    assert_refused(&gone, &[404]);
    assert_eq!(gone.error_code(), "MANIFEST_UNKNOWN");
    by_digest(&cache, &image).await;
    registry.stop().await;
    let down = cache.manifest("up", REPO, "v1").await;
    assert!(
        down.status >= 400,
        "a deleted tag was served while the upstream is down: {down}"
    );
    by_digest(&cache, &image).await;
    registry.resume().await;
    let back = registry.put_image(&ImageSpec::new(REPO, "v1"));
    sleep(Duration::from_millis(1100)).await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &back.manifest);
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

async fn by_digest(cache: &CacheProcess, image: &Image) {
    assert_good(
        &cache.manifest("up", REPO, image.digest()).await,
        &image.manifest,
    );
    for blob in image.blobs() {
        assert_good(&cache.blob("up", REPO, blob.digest).await, blob);
    }
}

/// F31
#[tokio::test(flavor = "multi_thread")]
async fn what_docker_pulled_by_head_and_digest_is_held_by_tag() {
    let (registry, cache) = up_as(|upstream| upstream.tag_ttl("1s")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let first = cache.head_manifest("up", REPO, "v1").await;
    assert_eq!(first.status, 200, "{first}");
    by_digest(&cache, &image).await;
    let asked = [
        head_manifest(REPO, "v1"),
        get_manifest(REPO, image.digest()),
        get_blob(REPO, image.config.digest),
        get_blob(REPO, image.layer().digest),
    ];
    assert_eq!(registry.requests(), asked);
    registry.stop().await;
    sleep(Duration::from_millis(1100)).await;
    for _ in 0..2 {
        let head = cache.head_manifest("up", REPO, "v1").await;
        assert_eq!(head.status, 200, "{head}");
        assert!(head.header("warning").is_some());
        let mut headers = lasting_headers(&head);
        headers.retain(|(name, _)| name != "warning");
        assert_eq!(headers, lasting_headers(&first));
    }
    assert_stale(&cache.manifest("up", REPO, "v1").await, &image);
    by_digest(&cache, &image).await;
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

/// A mapping alone, whose manifest nobody fetched, is no answer to a GET when the upstream is down.
#[tokio::test(flavor = "multi_thread")]
async fn a_mapping_without_its_manifest_is_no_manifest() {
    let (registry, cache) = up_without_ttl().await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_eq!(cache.head_manifest("up", REPO, "v1").await.status, 200);
    registry.stop().await;
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[502, 503, 504]);
    cache.check_invariants().await;
}

/// What is not held is refused in good time, in JSON, with a word on when to come back.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_held_is_refused_in_good_time() {
    let (registry, cache, image) = up_with_image().await;
    registry.stop().await;
    for path in [
        "/v2/up/lib/app/manifests/v1".to_owned(),
        blob_path("up", REPO, image.layer().digest),
        "/v2/up/lib/app/tags/list".to_owned(),
    ] {
        let answer = Request::get(&path)
            .timeout(Duration::from_secs(20))
            .send(cache.port())
            .await;
        assert_refused(&answer, &[502, 503, 504]);
        assert!(
            answer.number("retry-after").is_some(),
            "{path}: no Retry-After"
        );
    }
    cache.check_invariants().await;
}

/// A registry that takes a request and never answers is an outage like any other, within the time that containerd waits.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "waits out the deadline of half a minute"]
async fn an_upstream_that_keeps_silent_is_down() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    registry.script(Kind::Manifest, faults::silent());
    let stale = cache.manifest("up", REPO, "v1").await;
    assert_stale(&stale, &image);
    assert!(
        stale
            .head_after
            .is_some_and(|after| after < Duration::from_secs(28)),
        "{:?}",
        stale.head_after
    );
    cache.check_invariants().await;
}
