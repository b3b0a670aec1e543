//! Registries that refuse HEAD where they would answer GET are no worse through the cache than without it.

use testbed::cache::blob_path;
use testbed::{Content, ImageSpec, Kind, Matcher, Request, assert_good, faults};

use crate::stage::{REPO, assert_refused, get_manifest, head_manifest, up, up_without_ttl};

const OTHER: &str = "other/app";

/// What such a registry says, or the gateway before it.
const REFUSALS: [u16; 3] = [400, 405, 501];

fn refused(status: u16) -> testbed::Handler {
    faults::status(status, &[], "")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_proven_by_its_first_byte() {
    for status in REFUSALS {
        let (registry, cache) = up().await;
        let blobs = ["one", "two"].map(|name| Content::blob(90_000, name));
        for blob in &blobs {
            registry.put_blob(REPO, blob);
            registry.put_blob(OTHER, blob);
            assert_good(&cache.blob("up", REPO, blob.digest).await, blob);
        }
        registry.server().clear_log();
        registry.script((Kind::Blob, "HEAD"), refused(status));
        for blob in &blobs {
            assert_good(&cache.blob("up", OTHER, blob.digest).await, blob);
        }
        let asked = registry.entries(Kind::Blob);
        let asked: Vec<_> = asked
            .iter()
            .map(|entry| (entry.method.as_str(), entry.header("range")))
            .collect();
        let first = ("GET", Some("bytes=0-0"));
        assert_eq!(asked, [("HEAD", None), first, first], "{status}");
        cache.check_invariants().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_answered_by_the_first_byte() {
    for status in REFUSALS {
        let (registry, cache) = up().await;
        let (blob, absent) = (Content::blob(5000, "here"), Content::blob(1, "absent"));
        registry.put_blob(REPO, &blob);
        registry.script((Kind::Blob, "HEAD"), refused(status));
        let head = |blob: &Content| Request::head(&blob_path("up", REPO, blob.digest));
        let told = cache.send(head(&blob)).await;
        let size = (told.status, told.number("content-length"));
        assert_eq!(size, (200, Some(5000)), "{status}: {told}");
        assert_eq!(cache.send(head(&absent)).await.status, 404, "{status}");
        assert!(registry.count((Kind::Blob, "HEAD")) <= 1, "{status}");
        cache.check_invariants().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_is_proven_by_itself() {
    for status in REFUSALS {
        let (registry, cache) = up().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        registry.put_manifest(OTHER, None, &image.manifest);
        let digest = image.manifest.digest;
        let in_repo = |repo| cache.manifest("up", repo, digest);
        assert_good(&in_repo(REPO).await, &image.manifest);
        registry.script((Kind::Manifest, "HEAD"), refused(status));
        assert_good(&in_repo(OTHER).await, &image.manifest);
        assert_refused(&in_repo("third/app").await, &[404]);
        cache.check_invariants().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_is_asked_for_by_get_and_at_once_the_next_time() {
    for status in [405, 501] {
        let (registry, cache) = up_without_ttl().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        registry.script((Kind::Manifest, "HEAD"), refused(status));
        for _ in 0..3 {
            assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        }
        let get = || get_manifest(REPO, "v1");
        let wanted = [get(), head_manifest(REPO, "v1"), get(), get()];
        assert_eq!(registry.requests(), wanted, "{status}");
        cache.check_invariants().await;
    }
}

/// Something else that is refused makes the cache look at what it was shown before, which must not take a refused HEAD for an answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_head_suspends_no_repository() {
    for status in REFUSALS {
        let (registry, cache) = up().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        registry.script((Kind::Manifest, "HEAD"), refused(status));
        let denied = faults::error(403, "DENIED", &[]);
        registry.script(Matcher::manifests().of("v2"), denied);
        assert_refused(&cache.manifest("up", REPO, "v2").await, &[403]);
        registry.stop().await;
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    }
}
