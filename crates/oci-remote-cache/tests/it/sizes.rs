//! Sizes that an upstream does not tell, or tells wrongly.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::time::Duration;

use bytes::Bytes;
use oci::OCI_MANIFEST;
use serde_json::json;
use testbed::cache::{assert_good, blob_path};
use testbed::{
    Content, Ending, Handler, Kind, Matcher, Registry, Request, ServeOptions, Upstream, eventually,
    faults,
};
use tokio::time::{Instant, sleep};

use crate::stage::{REPO, assert_refused, cache, up, up_as};

const MIB: usize = 1 << 20;

/// A failure is shared for half a second, and an upstream that failed is left alone for a second.
const LATER: Duration = Duration::from_millis(1500);

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

/// A manifest that says this of its only layer.
fn claiming(blob: &Content, size: u64) -> Content {
    let layer = json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": blob.digest.to_string(),
        "size": size,
    });
    let config = Content::blob(20, "config");
    let body = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.descriptor(), "layers": [layer],
    });
    Content::json(&body, OCI_MANIFEST)
}

/// An upstream that sends a layer in chunks does not tell its size, but the manifest does: clients see how much there is to come. Where
/// that is a lie nobody completes the answer, and the blob is right all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_tells_the_length_of_what_comes_in_chunks() {
    const SIZE: u64 = 3 * MIB as u64;
    const TOLD: [u64; 8] = [
        SIZE,
        1,
        60_000,
        1 << 20,
        2 << 20,
        SIZE - 1,
        SIZE + 1,
        2 * SIZE,
    ];
    // What is larger than `max_blob` is found out on the way, and passed through from there.
    for (max_blob, kept) in [("64MiB", true), ("1MiB", false)] {
        let registry = Registry::start().await;
        let upstream = Upstream::new("up", registry.url());
        let line = format!("max_blob = \"{max_blob}\"");
        let cache = cache().cache_line(&line).upstream(upstream).start().await;
        let mut claimed = Vec::new();
        for told in TOLD {
            let blob = Content::blob(3 * MIB, &format!("claimed to be {told}"));
            registry.put_blob(REPO, &blob);
            registry.script(Matcher::blobs().of(blob.digest), faults::chunked(&blob));
            let tag = format!("v{told}");
            registry.put_manifest(REPO, Some(&tag), &claiming(&blob, told));
            assert_eq!(cache.manifest("up", REPO, &tag).await.status, 200);
            let answer = cache.blob("up", REPO, blob.digest).await;
            assert_eq!(answer.number("content-length"), Some(told), "{answer}");
            assert_eq!(answer.is_whole(), told == SIZE, "{answer}");
            claimed.push(blob);
        }
        for blob in claimed.iter().filter(|_| kept) {
            let hit = cache.blob("up", REPO, blob.digest).await;
            assert_good(&hit, blob);
        }
        cache.check_invariants().await;
    }
}

/// What breaks off without having told its size is continued from there, where the upstream gives ranges; else it comes from the beginning.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_in_chunks_and_breaks_off_is_continued() {
    const HALF: usize = 3 * MIB / 2;
    let (registry, cache) = up().await;
    let untold = format!("bytes {HALF}-{}/*", 2 * MIB - 1);
    let second = |blob: &Content, how: &str| match how {
        "ranges" => faults::usual(),
        "ranges without a size" => {
            let rest = blob.data.slice(HALF..);
            // Not all of it, though it may look so.
            faults::status(206, &[("Content-Range", &untold)], rest.slice(..MIB / 2))
        }
        "ranges of another size" => {
            let rest = blob.data.slice(HALF..);
            let wrong = format!("bytes {HALF}-{}/{}", 3 * MIB + 4, 3 * MIB + 5);
            faults::status(206, &[("Content-Range", &wrong)], rest)
        }
        "no ranges" => faults::chunked(blob),
        _ => faults::error(416, "SIZE_INVALID", &[]),
    };
    for (how, asked, status) in [
        ("ranges", 2, 206),
        ("ranges without a size", 3, 206),
        ("ranges of another size", 3, 206),
        ("no ranges", 2, 200),
        ("refusals", 3, 416),
    ] {
        let blob = Content::blob(3 * MIB, how);
        registry.put_blob(REPO, &blob);
        let first = faults::chunked_until(&blob, HALF, Ending::Close);
        let script = vec![first, second(&blob, how), faults::chunked(&blob)];
        let gets = Matcher::blobs().method("GET").of(blob.digest);
        registry.script(gets, faults::sequence(script));
        registry.clear_log();
        assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
        let entries = registry.entries((Kind::Blob, "GET"));
        let range = entries[1].header("range").unwrap_or_default();
        let from_there = range.starts_with(&format!("bytes={HALF}-"));
        assert!(from_there, "{how}: {range}");
        let answers = (entries.len(), entries[1].status);
        assert_eq!(answers, (asked, status), "{how}");
    }
    cache.check_invariants().await;
}

/// A range is answered without the size of the whole, or with the whole in chunks: an end is found all the same, also by who comes later.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_tells_no_size_leads_to_an_end() {
    for in_chunks in [false, true] {
        let (registry, cache) = up().await;
        let blob = Content::blob(40 * MIB, "of untold size");
        registry.put_blob(REPO, &blob);
        let manifest = claiming(&blob, blob.size());
        registry.put_manifest(REPO, Some("v1"), &manifest);
        assert_eq!(cache.manifest("up", REPO, "v1").await.status, 200);
        let (first, last) = (24 * MIB, 24 * MIB + 99_999);
        let untold = format!("bytes {first}-{last}/*");
        let part = blob.data.slice(first..=last);
        let answer = if in_chunks {
            faults::chunked(&blob)
        } else {
            faults::status(206, &[("Content-Range", &untold)], part.clone())
        };
        let gets = Matcher::blobs().method("GET").of(blob.digest);
        registry.script(gets.once(), answer);
        let path = blob_path("up", REPO, blob.digest);
        let asked = Request::get(&path).range(&format!("{first}-{last}"));
        let answer = cache.send(asked).await;
        assert_eq!((answer.status, &answer.body), (206, &part), "{in_chunks}");
        let whole = cache.blob("up", REPO, blob.digest).await;
        assert_good(&whole, &blob);
        cache.check_invariants().await;
    }
}

/// Anyone can push a manifest that lies about a layer: a HEAD without a length is not filled in from there.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_tells_the_true_size_or_none() {
    let (registry, cache) = up().await;
    let blob = Content::blob(3000, "of three thousand");
    registry.put_blob(REPO, &blob);
    let lie = claiming(&blob, 77);
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

/// Only of the empty blob is it true.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_says_nothing_is_there_is_not_believed() {
    let (registry, cache) = up().await;
    let (blob, empty) = (Content::blob(5000, "of some"), Content::blob(0, ""));
    for blob in [&blob, &empty] {
        registry.put_blob(REPO, blob);
    }
    let zero = faults::status(200, &[], "");
    registry.script((Kind::Blob, "HEAD"), zero);
    for (blob, size) in [(&blob, 5000), (&empty, 0)] {
        let head = Request::head(&blob_path("up", REPO, blob.digest));
        let told = cache.send(head).await;
        assert_eq!(
            (told.status, told.number("content-length")),
            (200, Some(size)),
            "{told}"
        );
    }
    assert_eq!(registry.count((Kind::Blob, "GET")), 1);
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
    let kept = || fs::read_dir(&parked).is_ok_and(|files| files.count() > 0);
    assert!(eventually(Duration::from_secs(5), kept).await);
    sleep(LATER).await;
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

/// Reading back what was kept of a very large blob takes minutes: headers and first bytes wait for none of it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_of_a_large_blob_holds_up_no_answer() {
    const SIZE: u64 = 64 << 30;
    const PIECE: u64 = 4 << 20;
    let registry = Registry::start().await;
    let upstream = Upstream::new("up", registry.url());
    let builder = cache().max_size("400GiB");
    let cache = builder.upstream(upstream).start().await;
    cache.terminate().await;
    // Of the blob all but the first piece is here: zeros, which take no room.
    let digest = Content::blob(1, "never whole").digest;
    let key = crc32(b"up");
    let file = cache
        .cache_dir()
        .join(format!("parked/sha256-{}-{key:08x}", digest.hex()));
    let sparse = File::create(&file).expect("a file");
    sparse.set_len(SIZE).expect("a sparse file");
    let sum = crc32(&vec![0; usize::try_from(PIECE).unwrap()]);
    let mut list = format!("oci-remote-cache-pieces-1 {SIZE} up\n");
    for index in 1..SIZE / PIECE {
        writeln!(list, "{index} {sum:08x}").expect("a line");
    }
    fs::write(file.with_extension("pieces"), list).expect("a list");
    let piece = Bytes::from(vec![1; usize::try_from(PIECE).unwrap()]);
    let range = format!("bytes 0-{}/{SIZE}", PIECE - 1);
    let first = faults::status(206, &[("Content-Range", &range)], piece);
    registry.script((Kind::Blob, "GET"), first);
    cache.restart().await;
    let began = Instant::now();
    let client = Request::get(&blob_path("up", REPO, digest)).open(cache.port());
    let mut client = client.await.expect("a head");
    assert_eq!(client.response.status, 200, "{}", client.response);
    assert!(client.read(3 * PIECE).await, "{}", client.response);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    let asked = registry.entries((Kind::Blob, "GET"));
    let ranges: Vec<_> = asked.iter().map(|entry| entry.header("range")).collect();
    assert_eq!(ranges, [Some("bytes=0-4194303")], "nothing comes twice");
    client.abort();
    cache.terminate().await;
    assert!(file.exists(), "it is kept on");
}

/// The checksum of the list of pieces, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let each = |crc: u32, byte: &u8| {
        let shifted = |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        (0..8).fold(crc ^ u32::from(*byte), shifted)
    };
    !bytes.iter().fold(!0, each)
}
