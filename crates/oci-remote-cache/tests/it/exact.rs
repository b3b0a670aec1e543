//! No whole answer completes unless its bytes hash to the digest asked for, and nothing else is ever kept.

use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use testbed::cache::blob_path;
use testbed::image::{DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use testbed::{
    CacheProcess, Content, Ending, Gate, Handler, ImageSpec, Kind, Matcher, Registry, Request,
    Response, ServeOptions, assert_good, faults,
};
use tokio::time::sleep;

use crate::stage::{
    AFTER_A_FAILURE, DIGEST, REPO, as_it_is, assert_holds, assert_holds_nothing, assert_refused,
    get_manifest, head_manifest, said, up, up_with_blob, up_without_ttl,
};

/// Every GET of a blob is answered by this.
fn serve_badly(registry: &Registry, bad: Handler) {
    registry.script((Kind::Blob, "GET"), bad);
}

/// Fails unless the bad blob is refused and not kept, and a right one is taken right after.
async fn refused_then_clean(registry: &Registry, cache: &CacheProcess, blob: &Content) -> Response {
    let bad = Request::get(&blob_path("up", REPO, blob.digest))
        .compare(&blob.data)
        .send(cache.port())
        .await;
    assert!(bad.is_refused(), "a bad blob was served as {bad}");
    assert_holds_nothing(cache).await;
    registry.clear_scripts();
    sleep(AFTER_A_FAILURE).await;
    assert_good(&cache.blob("up", REPO, blob.digest).await, blob);
    assert_holds(cache, [blob]).await;
    cache.check_invariants().await;
    bad
}

/// How many bytes of the blob a client got; the body of an error is none of it.
fn let_out(response: &Response) -> u64 {
    if response.status == 200 {
        response.length
    } else {
        0
    }
}

fn different(size: usize) -> Bytes {
    Content::blob(size, "something else").data
}

/// F03
#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_two_blobs_are_never_mixed() {
    let (registry, cache, blob) = up_with_blob(400_000).await;
    serve_badly(
        &registry,
        faults::sequence(vec![
            faults::serve(&blob, ServeOptions::new().stop_at(200_000)),
            faults::serve(
                &blob,
                ServeOptions::new()
                    .without_ranges()
                    .data(different(400_000)),
            ),
        ]),
    );
    let bad = refused_then_clean(&registry, &cache, &blob).await;
    assert!(
        let_out(&bad) < blob.size(),
        "all bytes of a bad blob were let out"
    );
}

/// F03: where the upstream answers ranges, of the other bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_other_bytes_does_not_complete_a_blob() {
    let (registry, cache, blob) = up_with_blob(400_000).await;
    serve_badly(
        &registry,
        faults::sequence(vec![
            faults::serve(&blob, ServeOptions::new().stop_at(200_000)),
            faults::serve(&blob, ServeOptions::new().data(different(400_000))),
        ]),
    );
    refused_then_clean(&registry, &cache, &blob).await;
}

/// F03: a blob that changes its length or its validator in the middle.
#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_changes_on_the_way_is_refused() {
    let (registry, cache, blob) = up_with_blob(400_000).await;
    serve_badly(
        &registry,
        faults::sequence(vec![
            faults::serve(&blob, ServeOptions::new().stop_at(200_000)),
            faults::serve(&blob, ServeOptions::new().data(different(500_000))),
        ]),
    );
    refused_then_clean(&registry, &cache, &blob).await;
}

/// F05
#[tokio::test(flavor = "multi_thread")]
async fn a_short_body_without_a_length_is_no_blob() {
    let (registry, cache, blob) = up_with_blob(400_000).await;
    let half = blob.data.slice(..200_000);
    serve_badly(
        &registry,
        faults::declared(
            &[("Content-Type", "application/octet-stream")],
            half,
            Ending::Close,
        ),
    );
    refused_then_clean(&registry, &cache, &blob).await;
}

/// F05: a right body without a length is one.
#[tokio::test(flavor = "multi_thread")]
async fn a_whole_body_without_a_length_is_a_blob() {
    let (registry, cache, blob) = up_with_blob(400_000).await;
    let headers = [("Content-Type", "application/octet-stream")];
    serve_badly(
        &registry,
        faults::declared(&headers, blob.data.clone(), Ending::Close),
    );
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    assert_holds(&cache, [&blob]).await;
    let hit = cache.blob("up", REPO, blob.digest).await;
    assert_eq!(
        (said(&hit), hit.number("content-length")),
        ("oci-remote-cache; hit", Some(blob.size()))
    );
    assert_eq!(registry.count(Kind::Blob), 1);
    cache.check_invariants().await;
}

/// F06
#[tokio::test(flavor = "multi_thread")]
async fn a_length_that_promises_too_much_is_no_blob() {
    let (registry, cache, blob) = up_with_blob(100_000).await;
    serve_badly(
        &registry,
        faults::declared(
            &[("Content-Length", "100100")],
            blob.data.clone(),
            Ending::Close,
        ),
    );
    refused_then_clean(&registry, &cache, &blob).await;
}

/// F06
#[tokio::test(flavor = "multi_thread")]
async fn a_length_that_promises_too_little_is_no_blob() {
    let (registry, cache, blob) = up_with_blob(100_000).await;
    serve_badly(
        &registry,
        faults::declared(
            &[("Content-Length", "99900")],
            blob.data.clone(),
            Ending::Close,
        ),
    );
    refused_then_clean(&registry, &cache, &blob).await;
}

/// F06
#[tokio::test(flavor = "multi_thread")]
async fn two_lengths_are_no_blob() {
    let (registry, cache, blob) = up_with_blob(100_000).await;
    let lengths = [("Content-Length", "100000"), ("Content-Length", "99900")];
    serve_badly(
        &registry,
        faults::declared(&lengths, blob.data.clone(), Ending::Close),
    );
    refused_then_clean(&registry, &cache, &blob).await;
}

/// F07
#[tokio::test(flavor = "multi_thread")]
async fn one_wrong_bit_keeps_the_last_bytes_back() {
    for size in [1, 70_000, 3_000_000] {
        let (registry, cache, blob) = up_with_blob(size).await;
        serve_badly(
            &registry,
            faults::serve(&blob, ServeOptions::new().data(blob.spoiled())),
        );
        let bad = refused_then_clean(&registry, &cache, &blob).await;
        assert!(
            let_out(&bad) < blob.size(),
            "all {size} bytes of a bad blob were let out"
        );
    }
}

/// F07: an open-ended range ends at the blob's end too, so it waits for the verdict like the whole.
#[tokio::test(flavor = "multi_thread")]
async fn one_wrong_bit_keeps_the_end_of_an_open_range_back() {
    let (registry, cache, blob) = up_with_blob(3_000_000).await;
    serve_badly(
        &registry,
        faults::serve(&blob, ServeOptions::new().data(blob.spoiled())),
    );
    let bad = cache
        .send(Request::get(&blob_path("up", REPO, blob.digest)).range("1000000-"))
        .await;
    assert!(bad.is_refused(), "{bad}");
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// A closed range leaves when its bytes are in, and says that nobody has checked them yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_range_of_a_blob_in_flight_is_marked_unverified() {
    let (registry, cache, blob) = up_with_blob(400_000).await;
    let gate = Gate::new();
    serve_badly(
        &registry,
        faults::serve(&blob, ServeOptions::new().pause(200_000, &gate)),
    );
    let ask = || Request::get(&blob_path("up", REPO, blob.digest)).range("1000-1999");
    let early = cache.send(ask()).await;
    assert_eq!(
        (early.status, early.body == blob.data.slice(1000..2000)),
        (206, true),
        "{early}"
    );
    assert!(
        said(&early).contains("detail=unverified"),
        "{}",
        said(&early)
    );
    gate.open();
    cache.wait_until_stored(&blob.digest).await;
    let late = cache.send(ask()).await;
    assert_eq!((late.status, said(&late)), (206, "oci-remote-cache; hit"));
    assert_eq!(registry.count(Kind::Blob), 1);
    cache.check_invariants().await;
}

/// F08
#[tokio::test(flavor = "multi_thread")]
async fn another_blobs_bytes_are_not_this_blob() {
    let (registry, cache, blob) = up_with_blob(100_000).await;
    serve_badly(
        &registry,
        faults::serve(&blob, ServeOptions::new().data(different(100_000))),
    );
    refused_then_clean(&registry, &cache, &blob).await;
}

/// F08
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_answer_is_not_a_blob() {
    let (registry, cache, blob) = up_with_blob(100_000).await;
    serve_badly(&registry, faults::status(200, &[], Bytes::new()));
    refused_then_clean(&registry, &cache, &blob).await;
}

/// F16
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_manifest_is_refused() {
    let (registry, cache) = up().await;
    for (tag, bad) in bad_manifests() {
        registry.put_manifest(REPO, Some(tag), &bad);
        assert_refused(&cache.manifest("up", REPO, tag).await, &[502]);
        assert_refused(&cache.manifest("up", REPO, bad.digest).await, &[502]);
        let asked = [get_manifest(REPO, tag), get_manifest(REPO, bad.digest)];
        assert_eq!(registry.requests(), asked, "{tag}");
        registry.clear_log();
    }
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// F16
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_manifest_leaves_the_old_tag() {
    for (_, bad) in bad_manifests() {
        let (registry, cache) = up_without_ttl().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        registry.put_manifest(REPO, Some("v1"), &bad);
        assert_refused(&cache.manifest("up", REPO, "v1").await, &[502]);
        registry.stop().await;
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        assert_holds(&cache, [&image.manifest]).await;
        cache.check_invariants().await;
    }
}

fn bad_manifests() -> Vec<(&'static str, Content)> {
    let image = ImageSpec::new(REPO, "bad").build();
    let both = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": image.config.descriptor(),
        "layers": [image.layer().descriptor()], "manifests": [image.manifest.descriptor()]});
    vec![
        ("both", Content::json(&both, OCI_MANIFEST)),
        (
            "mistyped",
            Content::new(image.manifest.data.clone(), DOCKER_MANIFEST),
        ),
        (
            "as-index",
            Content::new(image.manifest.data.clone(), OCI_INDEX),
        ),
        (
            "broken",
            Content::new("{\"schemaVersion\": 2,", OCI_MANIFEST),
        ),
        (
            "html",
            Content::new("<html><body>Please log in</body></html>", "text/html"),
        ),
        ("array", Content::new("[]", OCI_MANIFEST)),
    ]
}

/// F17
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_hashes_to_something_else_is_refused() {
    let (registry, cache) = up().await;
    let (asked, sent) = (
        ImageSpec::new(REPO, "a").build(),
        ImageSpec::new(REPO, "b").build(),
    );
    registry.put_manifest_as(REPO, &asked.digest().to_string(), &sent.manifest);
    assert_refused(&cache.manifest("up", REPO, asked.digest()).await, &[502]);
    let lie = [
        ("Content-Type", OCI_MANIFEST),
        (DIGEST, &asked.digest().to_string()),
    ];
    registry.script(
        Matcher::manifests().of("lie"),
        as_it_is(&sent.manifest, &lie),
    );
    assert_refused(&cache.manifest("up", REPO, "lie").await, &[502]);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// F18
#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_between_head_and_get_stays_consistent() {
    for first_is_there in [true, false] {
        let (registry, cache) = up().await;
        let first = ImageSpec::new(REPO, "v1").seed("first").build();
        let second = registry.put_image(&ImageSpec::new(REPO, "v1").seed("second"));
        if first_is_there {
            registry.put_manifest(REPO, None, &first.manifest);
        }
        let digest = first.digest().to_string();
        let headers = [("Content-Type", OCI_MANIFEST), (DIGEST, digest.as_str())];
        registry.script(
            (Kind::Manifest, "HEAD", "v1"),
            as_it_is(&first.manifest, &headers),
        );
        assert_eq!(
            cache.head_manifest("up", REPO, "v1").await.header(DIGEST),
            Some(digest.as_str())
        );
        let wanted = if first_is_there {
            &first.manifest
        } else {
            &second.manifest
        };
        for _ in 0..2 {
            let answer = cache.manifest("up", REPO, "v1").await;
            assert_good(&answer, wanted);
            assert_eq!(
                answer.header(DIGEST),
                Some(wanted.digest.to_string().as_str())
            );
        }
        let mut asked = vec![
            head_manifest(REPO, "v1"),
            get_manifest(REPO, first.digest()),
        ];
        if !first_is_there {
            asked.push(get_manifest(REPO, "v1"));
        }
        assert_eq!(registry.requests(), asked);
        assert_holds(&cache, [wanted]).await;
        cache.check_invariants().await;
    }
}

/// A file that somebody changed is never served: its time or size differs from what was noted, so it is hashed first.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changed_on_disk_is_fetched_again() {
    let (registry, cache, blob) = up_with_blob(100_000).await;
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    cache.wait_until_stored(&blob.digest).await;
    cache.terminate().await;
    sleep(Duration::from_millis(20)).await;
    for damage in [blob.spoiled(), blob.data.slice(..50_000), Bytes::new()] {
        std::fs::write(cache.blob_path(&blob.digest), damage).expect("damage the file");
        cache.restart().await;
        assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
        cache.wait_until_stored(&blob.digest).await;
        cache.terminate().await;
    }
    assert_eq!(registry.count((Kind::Blob, "GET")), 4);
    cache.restart().await;
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// A file that lies under a digest without any record is hashed before it counts, and gives nobody a right.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_without_a_record_proves_nothing() {
    let (registry, cache, blob) = up_with_blob(100_000).await;
    let planted = Content::blob(50_000, "planted");
    cache.terminate().await;
    for (content, data) in [(&blob, blob.spoiled()), (&planted, planted.data.clone())] {
        let path = cache.blob_path(&content.digest);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("make a folder");
        std::fs::write(path, data).expect("plant a file");
    }
    cache.restart().await;
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    assert_refused(&cache.blob("up", REPO, planted.digest).await, &[404]);
    assert_eq!(registry.count((Kind::Blob, "GET", blob.digest)), 1);
    cache.check_invariants().await;
}
