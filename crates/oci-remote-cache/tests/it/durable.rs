//! After any end, in good order or not, only whole and verified blobs are served, and what a client got is still there.

use std::time::Duration;

use testbed::cache::blob_path;
use testbed::{
    Content, Gate, ImageSpec, Kind, Registry, Request, ServeOptions, assert_good, faults,
};
use tokio::time::sleep;

use crate::stage::{
    REPO, assert_holds, head_manifest, up, up_with_blob, up_with_image, up_without_ttl,
};

fn blobs(registry: &Registry, count: usize, size: usize) -> Vec<Content> {
    let blobs: Vec<Content> = (0..count)
        .map(|n| Content::blob(size, &format!("blob {n}")))
        .collect();
    for blob in &blobs {
        registry.put_blob(REPO, blob);
    }
    blobs
}

/// F25
#[tokio::test(flavor = "multi_thread")]
async fn transfers_cut_by_a_kill_start_over_and_leave_nothing() {
    let (registry, cache) = up().await;
    let gate = Gate::new();
    let blobs = blobs(&registry, 5, 1_000_000);
    for blob in &blobs {
        registry.script(
            testbed::Matcher::blobs().of(blob.digest),
            faults::serve(blob, ServeOptions::new().pause(500_000, &gate)),
        );
    }
    let clients: Vec<_> = blobs
        .iter()
        .map(|blob| Request::get(&blob_path("up", REPO, blob.digest)).start(cache.port()))
        .collect();
    gate.reached_by(5).await;
    assert!(!cache.spool_files().is_empty(), "nothing is in flight");
    cache.kill9().await;
    for client in clients {
        let response = client.response().await;
        assert!(!response.is_whole(), "{response}");
    }
    assert_holds::<Content>(&cache, []).await;
    gate.open();
    cache.restart().await;
    for blob in &blobs {
        assert_good(&cache.blob("up", REPO, blob.digest).await, blob);
    }
    assert_holds(&cache, blobs).await;
    cache.check_invariants().await;
}

/// F25: a large one goes on from its pieces.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_transfer_cut_by_a_kill_goes_on_where_it_stopped() {
    let (registry, cache, blob) = up_with_blob(48 << 20).await;
    let gate = Gate::new();
    let slow = ServeOptions::new().pause(32 << 20, &gate).rate(400 << 20);
    registry.script((Kind::Blob, "GET"), faults::serve(&blob, slow));
    let client = Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data);
    let mut client = client.open(cache.port()).await.expect("a head");
    assert!(client.read(31 << 20).await, "{}", client.response);
    cache.kill9().await;
    client.abort();
    let before = registry.sent(Kind::Blob);
    gate.open();
    registry.clear_scripts();
    registry.clear_log();
    cache.restart().await;
    let response = Request::get(&blob_path("up", REPO, blob.digest))
        .compare(&blob.data)
        .send(cache.port())
        .await;
    assert!(response.is_right(), "{response}");
    let after = registry.sent((Kind::Blob, "GET"));
    let twice = (before + after).saturating_sub(blob.size());
    // What may be fetched twice: the piece that was not whole, and what was still in a socket.
    assert!(twice <= 12 << 20, "{twice} bytes were fetched twice");
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// F26
#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_finished_survives_a_kill_at_once() {
    for size in [0, 5000, 1_000_000, 10_000_000] {
        let (registry, cache, blob) = up_with_blob(size).await;
        assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
        cache.kill9().await;
        registry.stop().await;
        cache.restart().await;
        assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
        assert_eq!(registry.count(Kind::Blob), 1);
        assert_holds(&cache, [&blob]).await;
        cache.check_invariants().await;
    }
}

/// F26
#[tokio::test(flavor = "multi_thread")]
async fn a_pulled_image_survives_a_kill_at_once() {
    let (registry, cache, image) = up_with_image().await;
    cache.pull("up", &image).await;
    cache.kill9().await;
    registry.stop().await;
    cache.restart().await;
    cache.pull("up", &image).await;
    assert_good(
        &cache.manifest("up", REPO, image.digest()).await,
        &image.manifest,
    );
    assert_eq!(registry.requests().len(), 3);
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

/// F26: a storm of pulls, killed at moments nobody chose. Each file hashes to its name, and every blob a client finished is a hit.
#[tokio::test(flavor = "multi_thread")]
async fn kills_at_any_moment_lose_nothing_that_was_finished() {
    kill_again_and_again(10).await;
}

/// F26, more of it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "kills two hundred times"]
async fn two_hundred_kills_lose_nothing_that_was_finished() {
    kill_again_and_again(200).await;
}

async fn kill_again_and_again(rounds: u64) {
    let (registry, cache) = up().await;
    let mut finished: Vec<Content> = Vec::new();
    for round in 0..rounds {
        let fresh: Vec<Content> = (0..6)
            .map(|n| Content::blob(700_000, &format!("{round}/{n}")))
            .collect();
        for blob in &fresh {
            registry.put_blob(REPO, blob);
        }
        let clients: Vec<_> = fresh
            .iter()
            .map(|blob| {
                Request::get(&blob_path("up", REPO, blob.digest))
                    .compare(&blob.data)
                    .start(cache.port())
            })
            .collect();
        sleep(Duration::from_millis(round * 9 % 97)).await;
        cache.kill9().await;
        for (client, blob) in clients.into_iter().zip(&fresh) {
            if client.response().await.is_right() {
                finished.push(blob.clone());
            }
        }
        cache.restart().await;
        registry.clear_log();
        for blob in &finished {
            assert_good(&cache.blob("up", REPO, blob.digest).await, blob);
        }
        assert_eq!(
            registry.count(Kind::Blob),
            0,
            "round {round}: a finished blob was lost"
        );
        cache.check_invariants().await;
    }
}

/// A restart in good order keeps everything, tags and their times too.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_in_good_order_keeps_everything() {
    let (registry, cache, image) = up_with_image().await;
    cache.pull("up", &image).await;
    let asked = registry.requests();
    cache.restart().await;
    cache.pull("up", &image).await;
    let head = cache.head_blob("up", REPO, image.layer().digest).await;
    assert_eq!(
        (head.status, head.number("content-length")),
        (200, Some(image.layer().size()))
    );
    assert_eq!(registry.requests(), asked);
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

/// A lost catalog loses no bytes, but who may read them must be proven again, and only the upstream's own bytes are a proof.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_catalog_is_made_again_from_the_upstream() {
    let (registry, cache, image) = up_with_image().await;
    cache.pull("up", &image).await;
    let parts = [&image.manifest, &image.config, image.layer()];
    assert_holds(&cache, parts).await;
    cache.terminate().await;
    for name in ["catalog.db", "catalog.db-wal", "catalog.db-shm"] {
        std::fs::remove_file(cache.cache_dir().join(name)).ok();
    }
    cache.restart().await;
    assert_holds(&cache, parts).await;
    registry.clear_log();
    for _ in 0..2 {
        cache.pull("up", &image).await;
    }
    assert!(registry.requests().len() <= 3, "{:?}", registry.requests());
    assert_holds(&cache, parts).await;
    cache.check_invariants().await;
}

/// A damaged catalog is set aside, once.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_catalog_is_set_aside() {
    let (registry, cache, image) = up_with_image().await;
    cache.pull("up", &image).await;
    let parts = [&image.manifest, &image.config, image.layer()];
    assert_holds(&cache, parts).await;
    cache.terminate().await;
    for name in ["catalog.db-wal", "catalog.db-shm"] {
        std::fs::remove_file(cache.cache_dir().join(name)).ok();
    }
    let noise = testbed::image::noise(8192, "damage");
    std::fs::write(cache.cache_dir().join("catalog.db"), noise).expect("damage the catalog");
    cache.restart().await;
    cache.pull("up", &image).await;
    assert_holds(&cache, parts).await;
    registry.stop().await;
    cache.restart().await;
    cache.pull("up", &image).await;
    cache.check_invariants().await;
}

/// What lies in `spool/` and belongs to nobody is swept at the start.
#[tokio::test(flavor = "multi_thread")]
async fn strange_files_are_swept_or_left_alone() {
    let (_registry, cache, image) = up_with_image().await;
    cache.pull("up", &image).await;
    cache.terminate().await;
    let root = cache.cache_dir();
    std::fs::write(root.join("spool").join("leftover"), "half a blob").expect("leave a file");
    std::fs::create_dir_all(root.join("blobs").join("sha256").join("zz")).expect("make a folder");
    std::fs::write(
        root.join("blobs")
            .join("sha256")
            .join("zz")
            .join("nonsense"),
        "x",
    )
    .expect("leave a file");
    cache.restart().await;
    cache.pull("up", &image).await;
    assert!(cache.spool_files().is_empty(), "{:?}", cache.spool_files());
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

/// What a tag's time was is known after a restart: past it the upstream is asked.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_tag_is_asked_for_after_a_restart() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    cache.restart().await;
    registry.clear_log();
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert_eq!(registry.requests(), [head_manifest(REPO, "v1")]);
    cache.check_invariants().await;
}
