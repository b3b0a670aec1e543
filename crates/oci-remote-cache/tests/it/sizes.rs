//! Sizes that an upstream does not tell, or tells wrongly.

use std::time::Duration;

use bytes::Bytes;
use oci::OCI_MANIFEST;
use serde_json::json;
use testbed::cache::blob_path;
use testbed::{Content, Handler, Kind, Matcher, Request, ServeOptions, eventually, faults};
use tokio::time::sleep;

use crate::stage::{AFTER_A_FAILURE, REPO, assert_refused, up, up_as};

const MIB: usize = 1 << 20;

/// A HEAD is answered without a length, a GET in the usual way or in chunks.
fn without_length(get: Handler) -> Handler {
    Handler::new(move |mut exchange| {
        let usual = get.clone();
        Box::pin(async move {
            if exchange.method() == "HEAD" {
                let chunked = [("Transfer-Encoding", "chunked")];
                exchange.head(200, &chunked).await;
            } else {
                usual.call(exchange).await;
            }
        })
    })
}

fn in_chunks() -> Handler {
    Handler::new(move |mut exchange| {
        Box::pin(async move {
            exchange
                .head(200, &[("Transfer-Encoding", "chunked")])
                .await;
            exchange.raw(b"3\r\nabc\r\n0\r\n\r\n").await;
        })
    })
}

/// Anyone can push a manifest that lies about a layer: a HEAD without a length is not filled in from there.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_tells_the_true_size_or_none() {
    let (registry, cache) = up().await;
    let blob = Content::blob(3000, "of three thousand");
    registry.put_blob(REPO, &blob);
    let layer = json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": blob.digest.to_string(),
        "size": 77,
    });
    let config = Content::blob(20, "config");
    let body = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.descriptor(), "layers": [layer],
    });
    let lie = Content::json(&body, OCI_MANIFEST);
    registry.put_manifest(REPO, Some("lie"), &lie);
    assert_eq!(cache.manifest("up", REPO, "lie").await.status, 200);
    let head = || cache.send(Request::head(&blob_path("up", REPO, blob.digest)));
    registry.script(Kind::Blob, without_length(faults::usual()));
    let told = head().await;
    assert_eq!(
        (told.status, told.number("content-length")),
        (200, Some(3000)),
        "{told}"
    );
    let gets = registry.entries((Kind::Blob, "GET"));
    assert_eq!(gets.len(), 1);
    assert_eq!(gets[0].header("range"), Some("bytes=0-0"));
    registry.clear_scripts();
    registry.script(Kind::Blob, without_length(in_chunks()));
    let untold = head().await;
    assert_eq!(
        (untold.status, untold.header("content-length")),
        (200, None),
        "{untold}"
    );
    cache.check_invariants().await;
}

/// Pieces of a blob that was said to have another size are let go of; wrong bytes that come then are the upstream's own.
#[tokio::test(flavor = "multi_thread")]
async fn pieces_of_another_size_are_not_blamed_for_wrong_bytes() {
    let (registry, cache) = up_as(|upstream| upstream.line("connections_per_blob = 1")).await;
    let blob = Content::blob(40 * MIB, "asked for");
    registry.put_blob(REPO, &blob);
    let wrong = |size: usize| Bytes::from(vec![7; size]);
    let gets = || Matcher::blobs().method("GET").of(blob.digest);
    let half = ServeOptions::new().data(wrong(48 * MIB)).reset_at(20 << 20);
    registry.script(gets().once(), faults::serve(&blob, half));
    registry.script(gets(), faults::error(503, "UNAVAILABLE", &[]));
    let path = blob_path("up", REPO, blob.digest);
    let broken = cache.send(Request::get(&path)).await;
    assert!(!broken.is_whole(), "{broken}");
    let parked = cache.cache_dir().join("parked");
    let kept = || std::fs::read_dir(&parked).is_ok_and(|files| files.count() > 0);
    assert!(eventually(Duration::from_secs(5), kept).await);
    sleep(AFTER_A_FAILURE).await;
    registry.clear_scripts();
    let other = ServeOptions::new().data(wrong(36 * MIB));
    registry.script(gets(), faults::serve(&blob, other));
    let mismatch = cache.send(Request::get(&path)).await;
    assert!(!mismatch.is_whole(), "{mismatch}");
    let asked = registry.count(gets());
    assert_refused(&cache.send(Request::get(&path)).await, &[502]);
    assert_eq!(registry.count(gets()), asked, "the failure is shared");
    cache.check_invariants().await;
}
