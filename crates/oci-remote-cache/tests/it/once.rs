//! Any number of clients that ask for one cold thing cost the upstream one transfer, and each is served as fast as it reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use testbed::cache::{blob_path, manifest_path};
use testbed::client::storm;
use testbed::image::OCI_MANIFEST;
use testbed::{
    Background, CacheProcess, Content, Gate, Handler, ImageSpec, Kind, Registry, Request, Response,
    ServeOptions, assert_good, eventually, faults,
};
use tokio::time::sleep;

use crate::stage::{
    REPO, assert_holds, assert_holds_nothing, get_blob, get_manifest, head_manifest, said, up,
    up_as, up_with_blob,
};

const MIB: u64 = 1 << 20;

/// Every GET of a blob is answered by the registry as it is told here.
fn blobs_by(registry: &Registry, blob: &Content, options: ServeOptions) {
    registry.script((Kind::Blob, "GET"), faults::serve(blob, options));
}

fn whole(blob: &Content) -> Request {
    Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data)
}

/// So many clients, each of which has read this much already.
async fn readers(
    cache: &CacheProcess,
    blob: &Content,
    count: usize,
    bytes: u64,
) -> Vec<testbed::Incoming> {
    let mut readers = Vec::new();
    for _ in 0..count {
        let mut reader = whole(blob)
            .open(cache.port())
            .await
            .unwrap_or_else(|failed| panic!("{failed}: {}", failed.error));
        assert!(reader.read(bytes).await, "{}", reader.response);
        readers.push(reader);
    }
    readers
}

async fn finish_all(readers: Vec<testbed::Incoming>) -> Vec<Response> {
    let mut ends = tokio::task::JoinSet::new();
    for reader in readers {
        ends.spawn(reader.finish());
    }
    ends.join_all().await
}

fn all_right(responses: &[Response]) {
    for (n, response) in responses.iter().enumerate() {
        assert!(
            response.is_right(),
            "client {n} of {}: {response} ({:?})",
            responses.len(),
            response.right
        );
    }
}

/// S01
#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_clients_cost_one_transfer() {
    let (registry, cache, blob) = up_with_blob(2 << 20).await;
    let gate = Gate::new();
    blobs_by(&registry, &blob, ServeOptions::new().pause(MIB, &gate));
    let before = cache.anonymous_memory();
    // Each has its first byte while the upstream is still at the half.
    let readers = readers(&cache, &blob, 500, 1).await;
    let statuses: Vec<&str> = readers
        .iter()
        .map(|reader| said(&reader.response))
        .collect();
    assert_eq!(
        statuses
            .iter()
            .filter(|said| said.contains("stored"))
            .count(),
        1,
        "one leads"
    );
    assert_eq!(
        statuses
            .iter()
            .filter(|said| said.contains("collapsed"))
            .count(),
        499,
        "all others follow"
    );
    gate.open();
    all_right(&finish_all(readers).await);
    assert!(
        cache.anonymous_memory() < before + (64 << 20),
        "{before} grew to {}",
        cache.anonymous_memory()
    );
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    assert_eq!(registry.sent(Kind::Blob), blob.size());
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// S01 at its full size.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "moves 32 GiB over loopback"]
async fn five_hundred_clients_of_a_large_blob_cost_one_transfer() {
    let (registry, cache, blob) = up_with_blob(64 << 20).await;
    let before = cache.anonymous_memory();
    let request = whole(&blob).timeout(Duration::from_mins(5));
    all_right(&request.storm(cache.port(), 500).await);
    assert!(
        cache.anonymous_memory() < before + (64 << 20),
        "{before} grew to {}",
        cache.anonymous_memory()
    );
    let sent = registry.sent(Kind::Blob);
    assert!(
        sent <= blob.size() + blob.size() / 50,
        "{sent} bytes: {:?}",
        ranges(&registry)
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// S02
#[tokio::test(flavor = "multi_thread")]
async fn the_leaders_leaving_ends_nobodys_transfer() {
    let (registry, cache, blob) = up_with_blob(4 << 20).await;
    let gate = Gate::new();
    blobs_by(&registry, &blob, ServeOptions::new().pause(2 * MIB, &gate));
    let mut all = readers(&cache, &blob, 100, 400_000).await;
    all.remove(0).abort();
    sleep(Duration::from_millis(50)).await;
    gate.open();
    let responses = finish_all(all).await;
    assert_eq!(responses.len(), 99);
    all_right(&responses);
    assert_eq!(
        (registry.count(Kind::Blob), registry.sent(Kind::Blob)),
        (1, blob.size())
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// S02: with nobody left at all a small blob is finished all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_blob_that_everybody_left_is_finished() {
    let (registry, cache, blob) = up_with_blob(4 << 20).await;
    let gate = Gate::new();
    blobs_by(&registry, &blob, ServeOptions::new().pause(2 * MIB, &gate));
    for reader in readers(&cache, &blob, 3, 1000).await {
        reader.abort();
    }
    sleep(Duration::from_millis(50)).await;
    gate.open();
    assert_holds(&cache, [&blob]).await;
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    cache.check_invariants().await;
}

/// A client that reads slowly holds nobody up, and costs no memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_holds_nobody_up() {
    let (registry, cache, blob) = up_with_blob(8 << 20).await;
    let crawl = || {
        whole(&blob)
            .receive_buffer(4096)
            .pace(1024, Duration::from_millis(100))
    };
    let before = cache.anonymous_memory();
    let mut slow = Vec::new();
    for _ in 0..20 {
        slow.push(crawl().open(cache.port()).await.expect("a head"));
    }
    let fast = whole(&blob).send(cache.port()).await;
    assert!(fast.is_right(), "{fast}");
    assert!(
        cache.anonymous_memory() < before + (32 << 20),
        "{before} grew to {}",
        cache.anonymous_memory()
    );
    for mut reader in slow {
        assert!(reader.read(5000).await, "{}", reader.response);
        assert_eq!(reader.response.right, Some(true));
        reader.abort();
    }
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// S04
#[tokio::test(flavor = "multi_thread")]
async fn a_reset_in_the_middle_is_seen_by_nobody() {
    let (registry, cache, blob) = up_with_blob(4 << 20).await;
    let gate = Gate::new();
    let broken = ServeOptions::new().pause(MIB, &gate).reset_at(2 * MIB);
    registry.script(
        (Kind::Blob, "GET"),
        faults::sequence(vec![faults::serve(&blob, broken), faults::usual()]),
    );
    let readers = readers(&cache, &blob, 200, 1).await;
    gate.open();
    all_right(&finish_all(readers).await);
    let gets = registry.entries((Kind::Blob, "GET"));
    assert_eq!(gets.len(), 2, "{:?}", registry.requests());
    let again = gets[1].header("range").unwrap_or_default();
    assert!(
        again.ends_with(&format!("-{}", blob.size() - 1)),
        "asked again by {again:?}"
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// S05
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_on_a_bad_blob_is_no_storm_on_the_upstream() {
    let (registry, cache, blob) = up_with_blob(1 << 20).await;
    blobs_by(&registry, &blob, ServeOptions::new().data(blob.spoiled()));
    let responses = whole(&blob).storm(cache.port(), 300).await;
    for response in &responses {
        assert!(response.is_refused(), "a bad blob was served as {response}");
        assert!(
            response.length < blob.size(),
            "all bytes of a bad blob were let out"
        );
    }
    let asked = registry.count(Kind::Blob);
    assert!(asked <= 10, "300 clients became {asked} requests");
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// S07
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_on_an_expired_tag_is_one_head() {
    let (registry, cache) = up_as(|upstream| upstream.tag_ttl("1s")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    sleep(Duration::from_millis(1100)).await;
    let gate = Gate::new();
    registry.script((Kind::Manifest, "HEAD"), faults::held(&gate));
    let ask = Request::get(&manifest_path("up", REPO, "v1")).compare(&image.manifest.data);
    let storm: Vec<Background> = (0..300).map(|_| ask.clone().start(cache.port())).collect();
    gate.reached().await;
    sleep(Duration::from_millis(300)).await;
    gate.open();
    for background in storm {
        let response = background.response().await;
        assert!(response.is_right(), "{response}");
    }
    assert_eq!(
        registry.requests(),
        [get_manifest(REPO, "v1"), head_manifest(REPO, "v1")]
    );
    cache.check_invariants().await;
}

/// S07: a cold tag.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_on_a_cold_tag_is_one_get() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let ask = Request::get(&manifest_path("up", REPO, "v1")).compare(&image.manifest.data);
    all_right(&ask.storm(cache.port(), 300).await);
    assert_eq!(registry.requests(), [get_manifest(REPO, "v1")]);
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// S09
#[tokio::test(flavor = "multi_thread")]
async fn heads_gets_and_ranges_together_cost_one_get() {
    let (registry, cache, blob) = up_with_blob(4 << 20).await;
    let path = blob_path("up", REPO, blob.digest);
    let requests = (0..300_u64).map(|n| match n % 3 {
        0 => Request::head(&path),
        1 => whole(&blob),
        _ => Request::get(&path)
            .range(&format!("{}-{}", n * 10_000, n * 10_000 + 49_999))
            .compare_from(&blob.data, n * 10_000),
    });
    for (n, response) in storm(cache.port(), requests.collect())
        .await
        .iter()
        .enumerate()
    {
        let right = match n % 3 {
            0 => response.status == 200 && response.number("content-length") == Some(blob.size()),
            1 => response.is_right(),
            _ => {
                (
                    response.status,
                    response.length,
                    response.right,
                    response.complete,
                ) == (206, 50_000, Some(true), true)
            }
        };
        assert!(right, "request {n}: {response}");
    }
    assert_eq!(registry.count((Kind::Blob, "GET")), 1);
    assert_eq!(registry.sent((Kind::Blob, "GET")), blob.size());
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// C17
#[tokio::test(flavor = "multi_thread")]
async fn an_open_range_of_a_cold_blob_flows_before_the_blob_is_in() {
    let (registry, cache, blob) = up_with_blob(1 << 20).await;
    let gate = Gate::new();
    blobs_by(&registry, &blob, ServeOptions::new().pause(600_000, &gate));
    let request = Request::get(&blob_path("up", REPO, blob.digest))
        .range("5000-")
        .compare_from(&blob.data, 5000);
    let mut reader = request.open(cache.port()).await.expect("a head");
    let size = blob.size();
    assert_eq!(reader.response.status, 206);
    assert_eq!(
        reader.response.header("content-range"),
        Some(format!("bytes 5000-{}/{size}", size - 1).as_str())
    );
    assert!(
        reader.read(500_000).await,
        "nothing flows: {}",
        reader.response
    );
    assert_eq!(
        gate.waiting(),
        1,
        "the upstream is not at the half any more"
    );
    gate.open();
    let response = reader.finish().await;
    assert_eq!(
        (response.length, response.right, response.complete),
        (size - 5000, Some(true), true),
        "{response}"
    );
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// C18
#[tokio::test(flavor = "multi_thread")]
async fn four_open_ranges_that_hang_up_early_cost_one_transfer() {
    let (registry, cache, blob) = up_with_blob(4 << 20).await;
    let requests = (0..4_u64).map(|n| {
        Request::get(&blob_path("up", REPO, blob.digest))
            .range(&format!("{}-", n * MIB))
            .compare_from(&blob.data, n * MIB)
            .stop_after(MIB)
    });
    for (n, response) in storm(cache.port(), requests.collect())
        .await
        .iter()
        .enumerate()
    {
        assert_eq!(
            (response.status, response.length, response.right),
            (206, MIB, Some(true)),
            "slice {n}: {response}"
        );
    }
    assert_holds(&cache, [&blob]).await;
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    assert_eq!(registry.sent(Kind::Blob), blob.size());
    cache.check_invariants().await;
}

/// Two repositories of one upstream share the bytes of a fill in flight, but not the right to them.
#[tokio::test(flavor = "multi_thread")]
async fn another_repository_joins_by_its_own_right() {
    let (registry, cache, blob) = up_with_blob(1 << 20).await;
    registry.put_blob("lib/twin", &blob);
    let gate = Gate::new();
    blobs_by(&registry, &blob, ServeOptions::new().pause(500_000, &gate));
    let leader = readers(&cache, &blob, 1, 1).await;
    let twin = Request::get(&blob_path("up", "lib/twin", blob.digest))
        .compare(&blob.data)
        .start(cache.port());
    let stranger = cache.blob("up", "lib/stranger", blob.digest).await;
    assert_eq!(
        (stranger.status, stranger.error_code().as_str()),
        (404, "BLOB_UNKNOWN"),
        "{stranger}"
    );
    gate.open();
    all_right(&finish_all(leader).await);
    assert!(twin.response().await.is_right());
    assert_eq!(registry.count((Kind::Blob, "GET")), 1);
    assert_eq!(registry.count((Kind::Blob, "HEAD")), 2);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// After a storm nothing is left open towards the upstream or the clients, and no file of a fill.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_leaves_nothing_open() {
    let (registry, cache, blob) = up_with_blob(1 << 20).await;
    let calm = cache.open_files();
    all_right(&whole(&blob).storm(cache.port(), 200).await);
    // What may stay: the blob's own file and one idle connection to the upstream.
    let closed = eventually(Duration::from_secs(5), || cache.open_files() <= calm + 4).await;
    assert!(closed, "{calm} open files grew to {}", cache.open_files());
    assert_eq!(registry.count(Kind::Blob), 1);
    cache.check_invariants().await;
}

/// A client that asks only for pieces of a large blob (podman's zstd:chunked, stargz) costs the upstream little more than these pieces.
#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_client_costs_what_it_asks_for() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[48 << 20]));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    // The footer first, then what it points at.
    let pieces = [
        (image.layer().size() - 65_536, 65_536),
        (20 * MIB, 512 << 10),
        (5 * MIB, 512 << 10),
        (40 * MIB, 512 << 10),
    ];
    costs_what_is_asked_for((&registry, &cache), image.layer(), &pieces).await;
    cache.terminate().await;
    cache.check_invariants().await;
}

/// Most layers are not large. One whose manifest says that it is read in pieces is fetched in pieces all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_made_for_pieces_is_fetched_in_pieces() {
    for annotation in [
        "io.github.containers.zstd-chunked.manifest-checksum",
        "containerd.io/snapshot/stargz/toc.digest",
        "containerd.io/snapshot/nydus-blob",
    ] {
        let (registry, cache) = up().await;
        let layer = Content::blob(12 << 20, annotation);
        let config = Content::json(&json!({}), "application/vnd.oci.image.config.v1+json");
        let mut described = layer.descriptor();
        described["annotations"] = json!({annotation: "x"});
        let body = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.descriptor(), "layers": [described]});
        let manifest = Content::json(&body, OCI_MANIFEST);
        registry.put_blob(REPO, &layer);
        registry.put_manifest(REPO, Some("v1"), &manifest);
        assert_good(&cache.manifest("up", REPO, "v1").await, &manifest);
        let pieces = [
            (layer.size() - 65_536, 65_536),
            (5 * MIB, 512 << 10),
            (MIB, 512 << 10),
        ];
        costs_what_is_asked_for((&registry, &cache), &layer, &pieces).await;
        assert_good(&cache.blob("up", REPO, layer.digest).await, &layer);
        let sent = registry.sent(Kind::Blob);
        assert!(
            sent <= layer.size() + layer.size() / 50,
            "{sent} bytes: pieces were fetched again"
        );
        cache.terminate().await;
        cache.check_invariants().await;
    }
}

/// Asks for these pieces, each a start and a length, one after the other.
async fn costs_what_is_asked_for(
    (registry, cache): (&Registry, &CacheProcess),
    layer: &Content,
    pieces: &[(u64, u64)],
) {
    let path = blob_path("up", REPO, layer.digest);
    for &(start, length) in pieces {
        let request = Request::get(&path).range(&format!("{start}-{}", start + length - 1));
        let part = request
            .compare_from(&layer.data, start)
            .send(cache.port())
            .await;
        assert_eq!(
            (part.status, part.length, part.right, part.complete),
            (206, length, Some(true), true),
            "{part}"
        );
    }
    sleep(Duration::from_millis(500)).await;
    let (asked, sent) = (
        pieces.iter().map(|(_, length)| length).sum::<u64>(),
        registry.sent(Kind::Blob),
    );
    assert!(
        sent <= asked + asked / 10,
        "{asked} bytes were asked for and {sent} fetched: {:?}",
        ranges(registry)
    );
}

/// Asked for again, pieces that were fetched are not fetched again, and the whole brings only the rest.
#[tokio::test(flavor = "multi_thread")]
async fn pieces_are_not_fetched_again() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[48 << 20]));
    let layer = image.layer();
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let piece = || {
        let range = format!("{}-{}", 20 * MIB, 21 * MIB - 1);
        Request::get(&blob_path("up", REPO, layer.digest))
            .range(&range)
            .compare_from(&layer.data, 20 * MIB)
    };
    for _ in 0..2 {
        let part = piece().send(cache.port()).await;
        assert_eq!(
            (part.status, part.length, part.right),
            (206, MIB, Some(true)),
            "{part}"
        );
    }
    let response = whole(layer).send(cache.port()).await;
    assert!(response.is_right(), "{response}");
    let sent = registry.sent(Kind::Blob);
    assert!(
        sent <= layer.size() + layer.size() / 50,
        "{sent} bytes: {:?}",
        ranges(&registry)
    );
    assert_holds(&cache, [&image.manifest, layer]).await;
    cache.check_invariants().await;
}

/// Answers as told, and notes how many answers were under way at once.
fn counted(handler: Handler, most: &Arc<AtomicUsize>) -> Handler {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::clone(most));
    Handler::new(move |exchange| {
        let (handler, now, most) = (handler.clone(), Arc::clone(&now), Arc::clone(&most));
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            handler.call(exchange).await;
            now.fetch_sub(1, Ordering::SeqCst);
        }
    })
}

/// Where each connection is slow, a large blob comes over several, of which no byte comes twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_line_is_shared_by_several_connections() {
    let (registry, cache, blob) = up_with_blob(64 << 20).await;
    let most = Arc::new(AtomicUsize::new(0));
    let slow = faults::serve(&blob, ServeOptions::new().rate(8 << 20));
    registry.script((Kind::Blob, "GET"), counted(slow, &most));
    let response = whole(&blob).send(cache.port()).await;
    assert!(response.is_right(), "{response}");
    // One connection alone would take eight seconds.
    assert!(
        response.done_after < Duration::from_secs(7),
        "{:?}",
        response.done_after
    );
    let most = most.load(Ordering::SeqCst);
    assert!((2..=8).contains(&most), "{most} connections at once");
    let sent = registry.sent(Kind::Blob);
    assert!(
        sent <= blob.size() + blob.size() / 50,
        "{sent} bytes: {:?}",
        ranges(&registry)
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

fn ranges(registry: &Registry) -> Vec<String> {
    let entries = registry.entries(Kind::Blob);
    entries
        .iter()
        .map(|entry| {
            format!(
                "{} {}: {}",
                entry.method,
                entry.header("range").unwrap_or("all"),
                entry.sent
            )
        })
        .collect()
}
