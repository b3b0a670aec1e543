//! Whose word on rights counts: the registry's and its token service's. Content hosts and mirrors speak for themselves.

use std::time::Duration;

use testbed::cache::{blob_path, manifest_path};
use testbed::image::{DOCKER_MANIFEST, OCI_MANIFEST};
use testbed::{
    Bearer, CacheProcess, Content, Handler, Image, ImageSpec, Kind, Matcher, Origin, Registry,
    Request, TokenServer, Upstream, assert_good, faults,
};

use tokio::time::sleep;

use crate::stage::{REPO, assert_refused, cache, up, up_without_ttl};

/// By then a registry that was away is asked again.
const AFTER_AN_OUTAGE: Duration = Duration::from_millis(1500);

/// A blob that leads to a content host which asks for a token, and does not take it or gives none.
#[tokio::test(flavor = "multi_thread")]
async fn a_content_host_that_wants_a_token_suspends_nothing() {
    for gives_tokens in [true, false] {
        let (registry, cache) = up_without_ttl().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        let (origin, tokens) = (Origin::start().await, TokenServer::at(&registry));
        let realm = tokens.realm();
        if !gives_tokens {
            let denied = faults::error(401, "UNAUTHORIZED", &[]);
            registry.script(Kind::Token, denied);
        }
        let challenge = format!("Bearer realm=\"{realm}\",service=\"bucket\"");
        let challenge = [("WWW-Authenticate", challenge.as_str())];
        origin.script(Matcher::any(), faults::status(401, &challenge, ""));
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        let config = cache.blob("up", REPO, image.config.digest).await;
        assert_good(&config, &image.config);
        let digest = image.layer().digest;
        let location = origin.location(digest, "sig=1");
        let lead_away = faults::redirect(&location, 307);
        registry.script(Matcher::blobs().of(digest), lead_away);
        assert_refused(&cache.blob("up", REPO, digest).await, &[502]);
        let asked = registry.count((Kind::Blob, "GET", digest));
        assert_eq!(asked, 2, "a fresh URL is asked for once");
        // Nothing was suspended, also while the registry is silent.
        let config = cache.blob("up", REPO, image.config.digest).await;
        assert_good(&config, &image.config);
        registry.stop().await;
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        let config = cache.blob("up", REPO, image.config.digest).await;
        assert_good(&config, &image.config);
        cache.check_invariants().await;
    }
}

/// What can be asked of an image, and what was never fetched.
fn questions(image: &Image) -> Vec<Request> {
    let digest = image.manifest.digest;
    vec![
        Request::get(&manifest_path("up", REPO, "v1")),
        Request::head(&manifest_path("up", REPO, "v1")),
        Request::get(&manifest_path("up", REPO, digest)),
        Request::get(&blob_path("up", REPO, image.config.digest)),
        Request::head(&blob_path("up", REPO, image.config.digest)),
        Request::get(&blob_path("up", REPO, image.layer().digest)),
        Request::head(&blob_path("up", REPO, image.layer().digest)),
        Request::get(&blob_path("up", REPO, format!("sha999:{}", "a".repeat(40)))),
        Request::get(&format!("/v2/up/{REPO}/tags/list")),
        Request::get(&format!("/v2/up/{REPO}/referrers/{digest}")),
    ]
}

async fn assert_closed(cache: &CacheProcess, image: &Image) {
    for request in questions(image) {
        let answer = cache.send(request.clone()).await;
        assert!(answer.status >= 400, "{request:?}: {answer}");
        assert_ne!(answer.status, 404, "{request:?}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_opens_nothing_that_the_upstream_has_closed() {
    let (registry, mirror) = (Registry::start().await, Registry::start().await);
    let upstream = Upstream::new("up", registry.url())
        .tag_ttl("0s")
        .negative_ttl("0s")
        .mirrors(&[mirror.url().as_str()]);
    let cache = cache().upstream(upstream).start().await;
    let spec = ImageSpec::new(REPO, "v1");
    let image = registry.put_image(&spec);
    mirror.put_image(&spec);
    mirror.set_referrers(REPO, image.manifest.digest, &[]);
    registry.set_referrers(REPO, image.manifest.digest, &[]);
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let config = cache.blob("up", REPO, image.config.digest).await;
    assert_good(&config, &image.config);
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens).identity("nobody"));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403]);
    assert_closed(&cache, &image).await;
    registry.server().stop().await;
    assert_closed(&cache, &image).await;
    assert_eq!(mirror.connections(), 0, "asked about rights");
    // The upstream's own word opens it, and then the mirror is as good as before.
    registry.require_nothing();
    registry.server().resume().await;
    sleep(AFTER_AN_OUTAGE).await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    registry.server().stop().await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let layer = cache.blob("up", REPO, image.layer().digest).await;
    assert_good(&layer, image.layer());
    cache.check_invariants().await;
}

/// A manifest need not say what it is, and anyone may send the same bytes under another name: nobody else's pulls see it.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_place_calls_a_manifest_is_its_own_affair() {
    let (good, bad) = (Registry::start().await, Registry::start().await);
    let cache = cache()
        .upstream(Upstream::new("good", good.url()).tag_ttl("0s"))
        .upstream(Upstream::new("bad", bad.url()))
        .start()
        .await;
    let body = format!(
        "{{\"schemaVersion\":2,\"config\":{{\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\"size\":2,\
         \"digest\":\"sha256:{}\"}},\"layers\":[]}}",
        "1".repeat(64)
    );
    let named = |media_type: &str| Content::new(body.clone(), media_type);
    let right = named(OCI_MANIFEST);
    good.put_manifest(REPO, Some("v1"), &right);
    for (tag, other) in [
        ("a", "application/json"),
        ("b", "application/vnd.evil+json"),
        ("c", "application/vnd.docker.distribution.manifest.v2+json"),
    ] {
        bad.put_manifest(REPO, Some(tag), &named(other));
        assert_eq!(cache.manifest("bad", REPO, tag).await.status, 200);
        for reference in ["v1".to_owned(), right.digest.to_string()] {
            let manifest = cache.manifest("good", REPO, reference).await;
            assert_good(&manifest, &right);
        }
        cache.restart().await;
        let manifest = cache.manifest("good", REPO, right.digest).await;
        assert_good(&manifest, &right);
    }
    cache.check_invariants().await;
}

/// ghcr.io answers 403 for what does not exist, and lists may need other rights than pulls.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_what_was_never_shown_suspends_nothing() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    let layer = image.layer();
    let other = Content::blob(5000, "another layer");
    let denied = || faults::error(403, "DENIED", &[]);
    registry.script(Matcher::blobs().of(other.digest), denied());
    registry.script(Matcher::manifests().of("v2"), denied());
    registry.script(Kind::Tags, denied());
    for path in [
        blob_path("up", REPO, other.digest),
        manifest_path("up", REPO, "v2"),
        format!("/v2/up/{REPO}/tags/list"),
    ] {
        assert_refused(&cache.get(&path).await, &[403]);
        assert_good(&cache.blob("up", REPO, layer.digest).await, layer);
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    }
    registry.stop().await;
    assert_good(&cache.blob("up", REPO, layer.digest).await, layer);
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
}

/// Access that is gone is gone, whatever it is noticed by.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_everything_suspends_whatever_was_asked_for() {
    for asked in 0..3 {
        let (registry, cache) = up().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        cache.pull("up", &image).await;
        let tokens = TokenServer::at(&registry);
        registry.require(Bearer::of(&tokens).identity("nobody"));
        let never = Content::blob(100, "never shown");
        let paths = [
            blob_path("up", REPO, never.digest),
            manifest_path("up", REPO, "v2"),
            format!("/v2/up/{REPO}/tags/list"),
        ];
        assert_refused(&cache.get(&paths[asked]).await, &[403]);
        registry.stop().await;
        assert_closed(&cache, &image).await;
    }
}

/// Refuses who wants Docker's manifests and nothing else.
fn choosy(status: u16) -> Handler {
    Handler::new(move |mut exchange| async move {
        if exchange.header("accept") == Some(DOCKER_MANIFEST) {
            exchange.error(status, "DENIED", &[]).await;
        } else {
            exchange.pass().await;
        }
    })
}

/// The registry has nothing in the one form that a client wants: that says nothing about the tag as others ask for it.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_clients_accept_is_refused_is_nobody_elses() {
    for status in [403, 404] {
        let (registry, cache) = up_without_ttl().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        registry.script(Kind::Manifest, choosy(status));
        let path = manifest_path("up", REPO, "v1");
        for _ in 0..2 {
            let narrow = Request::get(&path).header("Accept", DOCKER_MANIFEST);
            assert_refused(&cache.send(narrow).await, &[status]);
            assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        }
        registry.stop().await;
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    }
}
