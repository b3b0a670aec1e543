//! Redirects are followed here and never shown to a client, without carrying a credential to where it does not belong.

use std::time::Duration;

use testbed::cache::blob_path;
use testbed::{
    Basic, Bearer, CacheProcess, Content, ImageSpec, Kind, Matcher, Origin, Registry, Request,
    TokenServer, assert_good, faults,
};
use tokio::time::Instant;

use crate::stage::{
    REPO, assert_holds, assert_holds_nothing, assert_refused, up, up_as, up_with_blob,
    up_with_image,
};

/// A registry that redirects its one blob to a content host that refuses whoever shows a credential.
async fn with_origin(host: &str, status: u16) -> (Registry, Origin, CacheProcess, Content) {
    let (registry, cache, blob) = up_with_blob(200_000).await;
    let origin = Origin::start_on(host).await;
    origin.hold(&blob);
    registry.script(
        Kind::Blob,
        faults::redirect(&origin.location(blob.digest, "sig=1"), status),
    );
    (registry, origin, cache, blob)
}

/// R01
#[tokio::test(flavor = "multi_thread")]
async fn another_origin_never_sees_the_authorization() {
    for (host, status) in [
        ("127.0.0.1", 307),
        ("localhost", 302),
        ("127.0.0.1", 301),
        ("127.0.0.1", 303),
        ("localhost", 308),
    ] {
        let (registry, cache) = up().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        let (origin, tokens) = (Origin::start_on(host).await, TokenServer::at(&registry));
        registry.require(Bearer::of(&tokens));
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        let layer = image.layer();
        origin.hold(layer);
        registry.script(
            Kind::Blob,
            faults::redirect(&origin.location(layer.digest, "sig=1"), status),
        );
        let answer = cache.blob("up", REPO, layer.digest).await;
        assert_good(&answer, layer);
        assert_eq!(answer.header("location"), None);
        assert_eq!(
            (
                registry.count(Kind::Blob),
                origin.count((Kind::Blob, "GET"))
            ),
            (1, 1),
            "{host} {status}"
        );
        let asked = &origin.log()[0];
        assert_eq!(
            (
                asked.header("authorization"),
                asked.header("referer"),
                asked.query.as_str()
            ),
            (None, None, "sig=1")
        );
        assert_holds(&cache, [&image.manifest, layer]).await;
        cache.check_invariants().await;
    }
}

/// R02
#[tokio::test(flavor = "multi_thread")]
async fn the_same_origin_sees_the_authorization() {
    let (registry, cache, image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    let path = format!("/v2/{REPO}/blobs/{}", image.layer().digest);
    for (n, location) in [
        format!("{}{path}?download=1", registry.url()),
        format!("{path}?download=1"),
    ]
    .iter()
    .enumerate()
    {
        registry.clear_scripts();
        registry.clear_log();
        registry.script(Matcher::blobs().query(""), faults::redirect(location, 302));
        assert_good(
            &cache.blob("up", REPO, image.layer().digest).await,
            image.layer(),
        );
        let last = registry.log().pop().expect("a request");
        assert_eq!(
            (last.query.as_str(), last.status),
            ("download=1", 200),
            "{n}"
        );
        assert!(
            last.header("authorization")
                .is_some_and(|value| value.starts_with("Bearer "))
        );
        assert_holds(&cache, [image.layer()]).await;
        cache.restart_empty().await;
    }
    cache.check_invariants().await;
}

/// R02: a password too.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_origin_sees_the_password() {
    let (registry, cache) =
        up_as(|upstream| upstream.credentials("robot", "correct-horse-battery")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.require(Basic::of("robot", "correct-horse-battery"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let path = format!("/v2/{REPO}/blobs/{}?download=1", image.layer().digest);
    registry.script(Matcher::blobs().query(""), faults::redirect(&path, 307));
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    cache.check_invariants().await;
}

/// A way that leaves the origin and comes back carries nothing any more.
#[tokio::test(flavor = "multi_thread")]
async fn an_authorization_that_was_dropped_stays_dropped() {
    let (registry, cache, image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let origin = Origin::start().await;
    let back = format!("{}/elsewhere", registry.url());
    registry.script(
        Kind::Blob,
        faults::redirect(&origin.location(image.layer().digest, "sig=1"), 307),
    );
    registry.script(
        Kind::Other,
        faults::status(200, &[], image.layer().data.clone()),
    );
    origin.script(Matcher::any(), faults::redirect(&back, 307));
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    assert_eq!(
        registry.entries(Kind::Other)[0].header("authorization"),
        None
    );
    cache.check_invariants().await;
}

/// R04
#[tokio::test(flavor = "multi_thread")]
async fn redirects_end() {
    let (registry, cache, blob) = up_with_blob(1000).await;
    let path = format!("/v2/{REPO}/blobs/{}", blob.digest);
    let numbered = faults::redirect_by(307, |entry| {
        let hop: u32 = entry.query.parse().unwrap_or(0);
        format!("{}?{}", entry.path, hop + 1)
    });
    for endless in [
        faults::redirect(&path, 307),
        faults::redirect(&format!("{path}?again"), 307),
        numbered,
    ] {
        registry.clear_scripts();
        registry.clear_log();
        registry.script(Kind::Blob, endless);
        let began = Instant::now();
        assert_refused(&cache.blob("up", REPO, blob.digest).await, &[502]);
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{:?}",
            began.elapsed()
        );
        assert!(
            registry.count(Kind::Blob) <= 7,
            "{} hops",
            registry.count(Kind::Blob)
        );
        tokio::time::sleep(crate::stage::AFTER_A_FAILURE).await;
    }
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// R05
#[tokio::test(flavor = "multi_thread")]
async fn redirects_that_lead_nowhere_are_refused() {
    let (registry, cache) = up().await;
    let listener = Origin::start().await;
    let authority = listener.authority();
    let bad = [
        Some("file:///etc/passwd".to_owned()),
        Some(format!("http://user:secret@{authority}/cdn/x")),
        Some(format!("ftp://{authority}/cdn/x")),
        Some("javascript:alert(1)".to_owned()),
        Some("http://".to_owned()),
        Some("http://[::1/".to_owned()),
        None,
    ];
    for (n, location) in bad.iter().enumerate() {
        let blob = Content::blob(1000, &n.to_string());
        let headers: Vec<(&str, &str)> = location
            .iter()
            .map(|location| ("Location", location.as_str()))
            .collect();
        registry.script(
            Matcher::blobs().of(blob.digest),
            faults::status(307, &headers, ""),
        );
        let refused = cache.blob("up", REPO, blob.digest).await;
        assert_refused(&refused, &[502]);
        assert!(!refused.text().contains("secret"), "{}", refused.text());
    }
    assert_eq!(listener.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// R06
#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_answered_although_the_content_host_refuses_head() {
    for host in ["127.0.0.1", "localhost"] {
        let (_registry, origin, cache, blob) = with_origin(host, 307).await;
        origin.script((Kind::Blob, "HEAD"), faults::status(403, &[], ""));
        let head = cache.head_blob("up", REPO, blob.digest).await;
        assert_eq!(
            (head.status, head.number("content-length")),
            (200, Some(blob.size())),
            "{head}"
        );
        assert!(
            origin.sent(Kind::Blob) <= 1,
            "{} bytes for a HEAD",
            origin.sent(Kind::Blob)
        );
        assert_holds_nothing(&cache).await;
        cache.check_invariants().await;
    }
}

/// Manifests are redirected too (registry.k8s.io).
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_behind_a_redirect_is_fetched() {
    let (registry, cache, _) = up_with_blob(1).await;
    let (other, image) = (
        Registry::start().await,
        ImageSpec::new("images/app", "v1").build(),
    );
    other.put_manifest("images/app", Some("v1"), &image.manifest);
    let tokens = TokenServer::at(&other);
    other.require(Bearer::of(&tokens));
    registry.script(
        Kind::Manifest,
        faults::redirect(&format!("{}/v2/images/app/manifests/v1", other.url()), 307),
    );
    let answer = cache.manifest("up", REPO, "v1").await;
    assert_good(&answer, &image.manifest);
    assert_eq!(answer.header("location"), None);
    assert_eq!(
        (registry.count(Kind::Manifest), tokens.asked()),
        (1, 1),
        "anonymous at where it leads"
    );
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// A range of a redirected blob is a range of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_a_redirected_blob_is_exact() {
    let (registry, origin, cache, blob) = with_origin("127.0.0.1", 307).await;
    let part = cache
        .send(Request::get(&blob_path("up", REPO, blob.digest)).range("100-199"))
        .await;
    assert_eq!(
        (part.status, part.body == blob.data.slice(100..200)),
        (206, true),
        "{part}"
    );
    assert_holds(&cache, [&blob]).await;
    assert_eq!(
        (registry.count(Kind::Blob), origin.count(Kind::Blob)),
        (1, 1)
    );
    cache.check_invariants().await;
}
