//! What clients with the right may have done besides pulling: taking back what is held, and fetching ahead.

use std::fs;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;
use testbed::cache::{blob_path, manifest_path};
use testbed::image::{ACCEPT_ALL, OCI_MANIFEST};
use testbed::{
    CacheProcess, Content, Gate, Image, ImageSpec, Kind, Registry, Request, Response, Upstream,
    assert_good, eventually, faults,
};

use crate::stage::{REPO, assert_holds, assert_refused, cache};

const RULES: &str = "[\"boss pull+warm+purge **\", \"ci warm up/**\", \"* pull **\"]";

async fn scene() -> (TempDir, Registry, CacheProcess) {
    let folder = tempfile::tempdir().expect("a folder");
    let tokens = folder.path().join("tokens");
    let lines =
        "boss t0ken-of-boss-0123456789\nci t0ken-of-ci-0123456789\nbob t0ken-of-bob-0123456789\n";
    fs::write(&tokens, lines).expect("write the tokens");
    let registry = Registry::start().await;
    let cache = cache()
        .line(&format!("clients.tokens = {tokens:?}"))
        .line(&format!("clients.rules = {RULES}"))
        .upstream(Upstream::new("up", registry.url()))
        .upstream(Upstream::new(
            "twin",
            registry.url().replace("127.0.0.1", "localhost"),
        ))
        .start()
        .await;
    (folder, registry, cache)
}

async fn send(cache: &CacheProcess, who: &str, method: &str, path: &str) -> Response {
    let login = STANDARD.encode(format!("{who}:t0ken-of-{who}-0123456789"));
    let request = Request::new(method, path)
        .header("Accept", ACCEPT_ALL)
        .header("Authorization", &format!("Basic {login}"));
    cache.send(request).await
}

async fn pull(cache: &CacheProcess, who: &str, key: &str, image: &Image) {
    let tag = manifest_path(key, &image.repo, &image.tag);
    assert_good(&send(cache, who, "GET", &tag).await, &image.manifest);
    for part in image.blobs() {
        let blob = blob_path(key, &image.repo, part.digest);
        assert_good(&send(cache, who, "GET", &blob).await, part);
    }
}

fn warm_path(repo: &str, reference: &str, query: &str) -> String {
    format!("/v2/up/{repo}/_oci-remote-cache/warm/{reference}{query}")
}

fn everything(image: &Image) -> Vec<Content> {
    let blobs = image.blobs().cloned();
    std::iter::once(image.manifest.clone())
        .chain(blobs)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_has_the_right_takes_back_and_the_upstream_hears_nothing() {
    let (_folder, registry, cache) = scene().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    pull(&cache, "bob", "up", &image).await;
    assert_holds(&cache, everything(&image)).await;
    registry.server().clear_log();
    let (tag, layer) = (
        manifest_path("up", REPO, "v1"),
        blob_path("up", REPO, image.layer().digest),
    );
    for path in [&tag, &layer] {
        for who in ["bob", "ci"] {
            let refused = send(&cache, who, "DELETE", path).await;
            assert_refused(&refused, &[403]);
            assert_eq!(refused.error_code(), "DENIED");
        }
        let nobody = cache.send(Request::new("DELETE", path)).await;
        assert_eq!(nobody.status, 401, "{nobody}");
    }
    assert_holds(&cache, everything(&image)).await;
    // As skopeo does it: the digest by the tag, then the manifest by its digest.
    let head = send(&cache, "boss", "HEAD", &tag).await;
    let digest = head.header("docker-content-digest").unwrap().to_owned();
    let by_digest = manifest_path("up", REPO, &digest);
    assert_eq!(send(&cache, "boss", "DELETE", &by_digest).await.status, 202);
    assert_refused(&send(&cache, "boss", "DELETE", &by_digest).await, &[404]);
    assert_refused(&send(&cache, "boss", "DELETE", &tag).await, &[404]);
    assert_eq!(send(&cache, "boss", "DELETE", &layer).await.status, 202);
    assert_refused(&send(&cache, "boss", "DELETE", &layer).await, &[404]);
    assert_holds(&cache, [&image.config]).await;
    assert_eq!(registry.requests(), Vec::<String>::new());
    // Nothing is forbidden: the next pull brings all of it again.
    pull(&cache, "bob", "up", &image).await;
    assert_holds(&cache, everything(&image)).await;
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_back_right_behind_a_pull_leaves_no_file() {
    let (_folder, registry, cache) = scene().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let manifest = manifest_path("up", REPO, image.manifest.digest);
    let layer = blob_path("up", REPO, image.layer().digest);
    for _ in 0..20 {
        for path in [&manifest, &layer] {
            assert_eq!(send(&cache, "boss", "GET", path).await.status, 200);
            // 404 where the answer came from the transfer before, which was still being published when its record went.
            let taken = send(&cache, "boss", "DELETE", path).await;
            assert!(matches!(taken.status, 202 | 404), "{taken}");
        }
    }
    crate::stage::assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_go_on_reading_what_is_taken_back() {
    let (_folder, registry, cache) = scene().await;
    let blob = Content::blob(20_000_000, "the blob");
    registry.put_blob(REPO, &blob);
    let path = blob_path("up", REPO, blob.digest);
    assert_good(&send(&cache, "boss", "GET", &path).await, &blob);
    assert_holds(&cache, [&blob]).await;
    let login = STANDARD.encode("bob:t0ken-of-bob-0123456789");
    let mut reader = testbed::Connection::open(cache.port()).await;
    reader
        .send(format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {login}\r\n\r\n"
        ))
        .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(send(&cache, "boss", "DELETE", &path).await.status, 202);
    crate::stage::assert_holds_nothing(&cache).await;
    assert_good(&reader.response("GET").await, &blob);
    assert_eq!(registry.count((Kind::Blob, "GET")), 1);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_goes_alone_and_stays_away_after_a_restart() {
    let (_folder, registry, cache) = scene().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    pull(&cache, "bob", "up", &image).await;
    let tag = manifest_path("up", REPO, "v1");
    assert_eq!(send(&cache, "boss", "DELETE", &tag).await.status, 202);
    assert_holds(&cache, everything(&image)).await;
    cache.restart().await;
    registry.stop().await;
    assert_refused(&send(&cache, "bob", "GET", &tag).await, &[503]);
    let by_digest = manifest_path("up", REPO, image.manifest.digest);
    assert_good(
        &send(&cache, "bob", "GET", &by_digest).await,
        &image.manifest,
    );
    cache.check_invariants().await;
}

/// A tag that was taken back moves, which a HEAD tells; then the upstream goes silent.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_taken_back_is_not_fallen_back_on() {
    let (_folder, registry, cache) = scene().await;
    let bad = registry.put_image(&ImageSpec::new(REPO, "v1").seed("bad"));
    pull(&cache, "bob", "up", &bad).await;
    let tag = manifest_path("up", REPO, "v1");
    assert_eq!(send(&cache, "boss", "DELETE", &tag).await.status, 202);
    registry.put_image(&ImageSpec::new(REPO, "v1").seed("good"));
    assert_eq!(send(&cache, "bob", "HEAD", &tag).await.status, 200);
    registry.server().stop().await;
    let none = send(&cache, "bob", "GET", &tag).await;
    assert!(none.status >= 500, "{none}");
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_stay_while_anyone_holds_them() {
    let (_folder, registry, cache) = scene().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    pull(&cache, "bob", "up", &image).await;
    pull(&cache, "bob", "twin", &image).await;
    let layer = image.layer();
    for key in ["up", "twin"] {
        assert_holds(&cache, everything(&image)).await;
        let path = blob_path(key, REPO, layer.digest);
        assert_eq!(send(&cache, "boss", "DELETE", &path).await.status, 202);
        registry.server().clear_log();
    }
    assert_holds(&cache, [&image.manifest, &image.config]).await;
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_names_nobody_takes_anything_back() {
    let (registry, cache, image) = crate::stage::up_with_image().await;
    cache.pull("up", &image).await;
    for (method, path) in [
        ("DELETE", manifest_path("up", REPO, "v1")),
        ("DELETE", blob_path("up", REPO, image.layer().digest)),
        ("POST", warm_path(REPO, "v1", "")),
    ] {
        let refused = cache.send(Request::new(method, &path)).await;
        assert_refused(&refused, &[405]);
        assert_eq!(refused.header("allow"), Some("GET, HEAD"));
    }
    assert_holds(&cache, everything(&image)).await;
    assert_eq!(registry.count(Kind::Manifest), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_fetched_ahead_by_who_may() {
    let (_folder, registry, cache) = scene().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[40_000_000, 1000]));
    let path = warm_path(REPO, "v1", "?wait=true");
    let refused = send(&cache, "bob", "POST", &path).await;
    assert_refused(&refused, &[403]);
    assert_eq!(cache.send(Request::new("POST", &path)).await.status, 401);
    assert_eq!(registry.requests(), Vec::<String>::new());
    let done = send(&cache, "ci", "POST", &path).await;
    assert_eq!(done.status, 200, "{}", done.text());
    let told: serde_json::Value = serde_json::from_str(&done.text()).unwrap();
    assert_eq!(
        (&told["state"], &told["blobs"]),
        (&"done".into(), &3.into())
    );
    assert_holds(&cache, everything(&image)).await;
    // Who may have it fetched need not be let see it; and to others it is a hit.
    let tag = manifest_path("up", REPO, "v1");
    assert_refused(&send(&cache, "ci", "GET", &tag).await, &[403]);
    registry.server().clear_log();
    pull(&cache, "bob", "up", &image).await;
    assert_eq!(registry.requests(), Vec::<String>::new());
    let again = send(&cache, "ci", "POST", &path).await;
    assert_eq!(again.status, 200);
    assert_eq!(registry.requests(), Vec::<String>::new());
    let unknown = send(
        &cache,
        "ci",
        "POST",
        &warm_path(REPO, "nosuch", "?wait=true"),
    )
    .await;
    assert_refused(&unknown, &[404]);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_index_only_the_platform_that_is_wanted() {
    let (_folder, registry, cache) = scene().await;
    let multi = registry.put_multi_image(&ImageSpec::new(REPO, "v1"));
    let path = warm_path(REPO, "v1", "?wait=true&platform=linux/arm64");
    let done = send(&cache, "ci", "POST", &path).await;
    assert_eq!(done.status, 200, "{}", done.text());
    let told: serde_json::Value = serde_json::from_str(&done.text()).unwrap();
    assert_eq!(told["manifests"], 2);
    let all = send(&cache, "ci", "POST", &warm_path(REPO, "v1", "?wait=true")).await;
    let told: serde_json::Value = serde_json::from_str(&all.text()).unwrap();
    assert_eq!(told["manifests"], 3);
    let bad = send(&cache, "ci", "POST", &warm_path(REPO, "v1", "?platform=x")).await;
    assert_refused(&bad, &[400]);
    assert!(bad.text().contains("linux/arm64"), "{}", bad.text());
    let path = warm_path(REPO, "v1", "?wait=true&platform=linux/arm46");
    let slip = send(&cache, "ci", "POST", &path).await;
    assert_refused(&slip, &[404]);
    assert!(slip.text().contains("linux/amd64"), "{}", slip.text());
    let not_by_get = send(&cache, "boss", "GET", &path).await;
    assert_eq!(
        (not_by_get.status, not_by_get.header("allow")),
        (405, Some("POST"))
    );
    let parts: Vec<Content> = multi.images.iter().flat_map(everything).collect();
    assert_holds(&cache, parts.iter().chain([&multi.index])).await;
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_end_is_not_fetched() {
    let (_folder, registry, cache) = scene().await;
    let layers: Vec<Content> = (0..5001)
        .map(|n| Content::blob(8, &format!("layer {n}")))
        .collect();
    let config = Content::blob(20, "config");
    let manifest = Content::manifest(&config, &layers, OCI_MANIFEST);
    registry.put_manifest(REPO, Some("v1"), &manifest);
    let path = warm_path(REPO, "v1", "?wait=true");
    let refused = send(&cache, "ci", "POST", &path).await;
    assert_refused(&refused, &[502]);
    assert_eq!(registry.count(Kind::Blob), 0);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_on_behind_the_answer_and_ends_with_the_process() {
    let (_folder, registry, cache) = scene().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let gate = Gate::new();
    registry.script(Kind::Blob, faults::held(&gate));
    let accepted = send(&cache, "ci", "POST", &warm_path(REPO, "v1", "")).await;
    assert_eq!(accepted.status, 202);
    assert!(accepted.text().contains("accepted"), "{}", accepted.text());
    assert!(eventually(Duration::from_secs(5), || registry.count(Kind::Blob) > 0).await);
    let metrics = testbed::client::get(cache.admin_port(), "/metrics", &[]).await;
    assert!(metrics.text().contains("oci_remote_cache_warming 1"));
    gate.open();
    assert_holds(&cache, everything(&image)).await;
    assert!(eventually(Duration::from_secs(5), || cache.log().contains("warmed")).await);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_takes_no_more_than_its_share_of_the_queue() {
    let (_folder, registry, cache) = scene().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let gate = Gate::new();
    registry.script(Kind::Blob, faults::held(&gate));
    let path = warm_path(REPO, "v1", "");
    for _ in 0..16 {
        assert_eq!(send(&cache, "ci", "POST", &path).await.status, 202);
    }
    let full = send(&cache, "ci", "POST", &path).await;
    assert_refused(&full, &[429]);
    assert!(full.number("retry-after").is_some(), "{full}");
    assert!(full.text().contains("for you"), "{}", full.text());
    assert_eq!(send(&cache, "boss", "POST", &path).await.status, 202);
    gate.open();
    assert_holds(&cache, everything(&image)).await;
    let metrics = || testbed::client::get(cache.admin_port(), "/metrics", &[]);
    for _ in 0..50 {
        if metrics()
            .await
            .text()
            .contains("oci_remote_cache_warming 0")
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(send(&cache, "ci", "POST", &path).await.status, 202);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_gives_way_where_the_rate_limit_runs_low() {
    let (_folder, registry, cache) = scene().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let other = registry.put_image(&ImageSpec::new("lib/other", "v1"));
    let scarce = [
        ("ratelimit-limit", "100;w=21600"),
        ("ratelimit-remaining", "20;w=21600"),
    ];
    let scarce: Vec<(&str, &str)> = scarce
        .into_iter()
        .chain([("content-type", image.manifest.media_type.as_str())])
        .collect();
    registry.script(
        Kind::Manifest,
        crate::stage::as_it_is(&image.manifest, &scarce),
    );
    let tag = manifest_path("up", REPO, "v1");
    assert_good(&send(&cache, "bob", "GET", &tag).await, &image.manifest);
    registry.clear_scripts();
    registry.server().clear_log();
    let given_way = send(
        &cache,
        "ci",
        "POST",
        &warm_path("lib/other", "v1", "?wait=true"),
    )
    .await;
    assert_refused(&given_way, &[429]);
    assert_eq!(registry.requests(), Vec::<String>::new());
    pull(&cache, "bob", "up", &other).await;
    cache.check_invariants().await;
}
