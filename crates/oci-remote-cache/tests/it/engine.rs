//! The engine seen from its doors: full disks and broken folders, several connections and their limits, mirrors, pieces, TLS.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use testbed::cache::blob_path;
use testbed::{
    CacheProcess, Content, Ending, Gate, Handler, Incoming, Kind, Matcher, Registry, Request,
    Response, ServeOptions, TlsFront, Upstream, assert_good, can_limit_disk, eventually, faults,
};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::stage::{
    AFTER_A_FAILURE, REPO, assert_holds, assert_holds_nothing, cache, said, up, up_as, up_with_blob,
};

const MIB: u64 = 1 << 20;

/// What comes in a socket before whoever reads it stops.
const IN_A_SOCKET: u64 = 8 * MIB;

fn whole(blob: &Content) -> Request {
    Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data)
}

fn part(blob: &Content, first: u64, last: u64) -> Request {
    Request::get(&blob_path("up", REPO, blob.digest))
        .range(&format!("{first}-{last}"))
        .compare_from(&blob.data, first)
}

fn assert_right(response: &Response) {
    let right = matches!(response.status, 200 | 206) && response.complete;
    assert!(
        right && response.right == Some(true),
        "{response} ({:?})",
        response.right
    );
}

/// Two percent more than the blob.
fn hardly_more_than(blob: &Content) -> u64 {
    blob.size() + blob.size() / 50
}

fn ranges(registry: &Registry) -> Vec<String> {
    let entries = registry.entries((Kind::Blob, "GET"));
    let range = |entry: &testbed::Entry| entry.header("range").unwrap_or("all").to_owned();
    entries
        .iter()
        .map(|entry| format!("{}: {}", range(entry), entry.sent))
        .collect()
}

/// A blob of so many MiB that `registry` offers.
fn offered(registry: &Registry, mib: u64, seed: &str) -> Content {
    let blob = Content::blob(usize::try_from(mib * MIB).expect("a size"), seed);
    registry.put_blob(REPO, &blob);
    blob
}

/// Answers as told, and notes how many answers were under way at once. The moment before lets one end whose client has just left.
fn counted(handler: Handler, most: &Arc<AtomicUsize>) -> Handler {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::clone(most));
    Handler::new(move |exchange| {
        let (handler, now, most) = (handler.clone(), Arc::clone(&now), Arc::clone(&most));
        async move {
            sleep(Duration::from_millis(60)).await;
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            handler.call(exchange).await;
            now.fetch_sub(1, Ordering::SeqCst);
        }
    })
}

/// One handler for the request with that number, counted from zero, another one for all others.
fn but_for(number: usize, special: Handler, others: Handler) -> Handler {
    let next = AtomicUsize::new(0);
    Handler::new(move |exchange| {
        let special_now = next.fetch_add(1, Ordering::SeqCst) == number;
        if special_now { &special } else { &others }.call(exchange)
    })
}

/// So many clients that have read so much of the blob.
async fn readers(cache: &CacheProcess, blob: &Content, count: usize, bytes: u64) -> Vec<Incoming> {
    let mut readers = Vec::new();
    for _ in 0..count {
        let mut reader = whole(blob).open(cache.port()).await.expect("a head");
        assert!(reader.read(bytes).await, "{}", reader.response);
        readers.push(reader);
    }
    readers
}

async fn finish(readers: Vec<Incoming>) -> Vec<Response> {
    let mut ends = JoinSet::new();
    for reader in readers {
        ends.spawn(reader.finish());
    }
    ends.join_all().await
}

// Disks that are full, and folders that break.

/// Runs a script where the cache's own mounts are; `$1` is its folder.
fn among_its_mounts(cache: &CacheProcess, script: &str) {
    let done = Command::new("nsenter")
        .args(["--user", "--mount", "--preserve-credentials", "--target"])
        .arg(cache.pid().to_string())
        .args(["sh", "-ec", script, "sh"])
        .arg(cache.home().join("cache"))
        .output()
        .expect("run nsenter");
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{script}: {told}");
}

fn can_change_mounts() -> bool {
    let entered = Command::new("nsenter").arg("--version").output();
    let able = can_limit_disk() && entered.is_ok_and(|done| done.status.success());
    if !able {
        eprintln!("skipped: this machine does not let a test mount a small disk");
    }
    able
}

/// A registry and a cache on a disk of so many MiB, with few connections between them.
async fn on_a_disk_of(mib: u64) -> (Registry, CacheProcess) {
    let registry = Registry::start().await;
    let upstream = Upstream::new("up", registry.url())
        .line("max_connections = 8")
        .line("connections_per_blob = 4");
    let builder = cache().upstream(upstream).max_size("10GiB").disk(mib * MIB);
    (registry, builder.start().await)
}

/// S01 on a full disk: everybody gets all of it, over no more connections than are allowed, and other blobs are served meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_on_a_full_disk_stays_within_the_connections() {
    if !can_change_mounts() {
        return;
    }
    let (registry, cache) = on_a_disk_of(8).await;
    let held = offered(&registry, 1, "held");
    assert_good(&cache.blob("up", REPO, held.digest).await, &held);
    cache.wait_until_stored(&held.digest).await;
    let large = offered(&registry, 9, "large");
    let most = Arc::new(AtomicUsize::new(0));
    registry.script(
        Matcher::blobs().method("GET").of(large.digest),
        counted(faults::serve(&large, ServeOptions::new()), &most),
    );
    let request = whole(&large).timeout(Duration::from_mins(2));
    let storm: Vec<_> = (0..60)
        .map(|_| request.clone().start(cache.port()))
        .collect();
    for _ in 0..10 {
        sleep(Duration::from_millis(100)).await;
        assert_right(&whole(&held).send(cache.port()).await);
    }
    for client in storm {
        assert_right(&client.response().await);
    }
    let most = most.load(Ordering::SeqCst);
    assert!(
        (2..=8).contains(&most),
        "{most} connections at once, of eight"
    );
    assert!(!cache.holds(&large.digest));
    cache.check_invariants().await;
}

/// The disk fills up in the middle of a fill: whoever reads, from wherever, gets the rest all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_midway_is_seen_by_nobody() {
    if !can_change_mounts() {
        return;
    }
    let (registry, cache) = on_a_disk_of(64).await;
    let blob = offered(&registry, 12, "midway");
    let gate = Gate::new();
    registry.script(
        (Kind::Blob, "GET"),
        faults::serve(&blob, ServeOptions::new().pause(3 * MIB, &gate)),
    );
    let whole_ones = readers(&cache, &blob, 5, 2 * MIB).await;
    let closed = part(&blob, 8 * MIB, 9 * MIB - 1).start(cache.port());
    let across = part(&blob, 2 * MIB, 10 * MIB - 1).start(cache.port());
    let open = Request::get(&blob_path("up", REPO, blob.digest))
        .range(&format!("{MIB}-"))
        .compare_from(&blob.data, MIB)
        .start(cache.port());
    sleep(Duration::from_millis(200)).await;
    among_its_mounts(&cache, "mount -o remount,size=6m \"$1\"");
    gate.open();
    for response in finish(whole_ones).await {
        assert_right(&response);
    }
    for (client, length) in [(closed, MIB), (across, 8 * MIB), (open, 11 * MIB)] {
        let response = client.response().await;
        assert_right(&response);
        assert_eq!(response.length, length);
    }
    assert!(!cache.holds(&blob.digest));
    among_its_mounts(&cache, "mount -o remount,size=64m \"$1\"");
    sleep(Duration::from_millis(2500)).await;
    assert_right(&whole(&blob).send(cache.port()).await);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// F23: the folder becomes read-only in the middle of a fill. An open spool keeps its own file system writable, so the folders in which
/// files are made and renamed are what is locked.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_becomes_read_only_midway_is_seen_by_nobody() {
    if !can_change_mounts() {
        return;
    }
    let (registry, cache) = on_a_disk_of(64).await;
    let (running, fresh) = (
        offered(&registry, 12, "running"),
        offered(&registry, 2, "fresh"),
    );
    let gate = Gate::new();
    registry.script(
        Matcher::blobs().of(running.digest),
        faults::serve(&running, ServeOptions::new().pause(3 * MIB, &gate)),
    );
    let readers = readers(&cache, &running, 5, 2 * MIB).await;
    among_its_mounts(
        &cache,
        "for folder in spool blobs parked; do mount --bind \"$1/$folder\" \"$1/$folder\"; mount -o remount,bind,ro \"$1/$folder\"; done",
    );
    gate.open();
    for response in finish(readers).await {
        assert_right(&response);
    }
    for blob in [&fresh, &running] {
        for _ in 0..2 {
            assert_right(&whole(blob).send(cache.port()).await);
        }
        assert_right(&part(blob, 1000, 1999).send(cache.port()).await);
        assert!(!cache.holds(&blob.digest));
    }
    let bypassed = whole(&fresh).send(cache.port()).await;
    let words = said(&bypassed);
    assert!(words.contains("fwd=bypass; detail=disk"), "{words}");
    assert!(cache.is_running());
}

/// What is not kept is read through few connections too, whatever part of it each client wants: none is held by an answer nobody reads.
#[tokio::test(flavor = "multi_thread")]
async fn one_connection_is_enough_for_parts_of_what_is_not_kept() {
    let registry = Registry::start().await;
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()).line("max_connections = 1"))
        .cache_line("max_blob = \"1MiB\"")
        .start()
        .await;
    let blobs = [
        offered(&registry, 2, "one"),
        offered(&registry, 40, "another"),
    ];
    for blob in &blobs {
        assert_right(&part(blob, 0, 99_999).send(cache.port()).await);
    }
    let mut clients = Vec::new();
    for blob in &blobs {
        for first in [100, MIB, 0] {
            clients.push(part(blob, first, first + 99_999).start(cache.port()));
        }
        clients.push(whole(blob).start(cache.port()));
    }
    for client in clients {
        assert_right(&client.response().await);
    }
    assert!(cache.stored().is_empty());
    cache.check_invariants().await;
}

/// A cache that keeps no blob of more than 1 MiB.
async fn keeping_little() -> (Registry, CacheProcess) {
    let registry = Registry::start().await;
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()))
        .cache_line("max_blob = \"1MiB\"")
        .start()
        .await;
    (registry, cache)
}

/// Each reader of what is not kept asks the upstream itself, and what that says right behind a good answer is told as it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_what_is_not_kept_is_told_before_any_headers() {
    for (status, told) in [(503, 503), (404, 404), (403, 403), (429, 429)] {
        let (registry, cache) = keeping_little().await;
        let blob = offered(&registry, 2, "not kept");
        assert_right(&whole(&blob).send(cache.port()).await);
        let refusal = faults::error(status, "DENIED", &[("Retry-After", "30")]);
        registry.script(Matcher::blobs().of(blob.digest), refusal);
        let answer = whole(&blob).send(cache.port()).await;
        assert_eq!(answer.status, told, "{answer}");
        cache.check_invariants().await;
    }
}

/// An answer that does not tell its length.
fn without_a_length(blob: &Content) -> Handler {
    let headers = [("Content-Type", "application/octet-stream")];
    faults::declared(&headers, blob.data.clone(), Ending::Close)
}

/// A blob whose size nobody told turns out too large to be kept: who reads it gets the rest all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_turns_out_too_large_midway_is_passed_on() {
    let (registry, cache) = keeping_little().await;
    let blob = offered(&registry, 20, "no length");
    registry.script((Kind::Blob, "GET"), without_a_length(&blob));
    for response in whole(&blob).storm(cache.port(), 3).await {
        assert_right(&response);
    }
    assert!(cache.stored().is_empty());
    cache.check_invariants().await;
}

/// The same where the disk is too small.
#[tokio::test(flavor = "multi_thread")]
async fn a_blob_of_unknown_size_on_a_full_disk_is_passed_on() {
    if !can_change_mounts() {
        return;
    }
    let (registry, cache) = on_a_disk_of(8).await;
    let blob = offered(&registry, 20, "no length");
    registry.script((Kind::Blob, "GET"), without_a_length(&blob));
    for response in whole(&blob).storm(cache.port(), 3).await {
        assert_right(&response);
    }
    assert!(cache.stored().is_empty());
    cache.check_invariants().await;
}

// Several connections.

/// Where each connection is slow, a large blob comes over several at once, never more than are allowed, and no byte twice.
#[tokio::test(flavor = "multi_thread")]
async fn as_many_connections_as_allowed_share_a_slow_line() {
    let (registry, cache) = up_as(|upstream| upstream.line("connections_per_blob = 4")).await;
    let blob = offered(&registry, 48, "shared");
    let most = Arc::new(AtomicUsize::new(0));
    let slow = faults::serve(&blob, ServeOptions::new().rate(4 * MIB));
    registry.script((Kind::Blob, "GET"), counted(slow, &most));
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(whole(&blob).start(cache.port()));
    }
    for client in clients {
        let response = client.response().await;
        assert_right(&response);
        // One connection alone would take twelve seconds.
        let took = response.done_after;
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
    let most = most.load(Ordering::SeqCst);
    assert!((2..=4).contains(&most), "{most} connections at once");
    let sent = registry.sent((Kind::Blob, "GET"));
    assert!(
        sent <= hardly_more_than(&blob),
        "{sent} bytes: {:?}",
        ranges(&registry)
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// One of the connections crawls: what it was to bring comes over another.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_straggler_was_to_bring_comes_over_another_connection() {
    let (registry, cache) = up_as(|upstream| upstream.line("connections_per_blob = 4")).await;
    let blob = offered(&registry, 64, "straggler");
    let at = |rate| faults::serve(&blob, ServeOptions::new().rate(rate));
    registry.script((Kind::Blob, "GET"), but_for(2, at(64 << 10), at(6 * MIB)));
    let response = whole(&blob)
        .timeout(Duration::from_mins(1))
        .send(cache.port())
        .await;
    assert_right(&response);
    // A segment of 8 MiB alone would take over two minutes on the slow one.
    let took = response.done_after;
    assert!(
        took < Duration::from_secs(30),
        "{took:?}: {:?}",
        ranges(&registry)
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

// Upstreams that break, lie or change.

/// A registry, a mirror of it, and a cache that knows both.
async fn with_a_mirror() -> (Registry, Registry, CacheProcess) {
    let (registry, mirror) = (Registry::start().await, Registry::start().await);
    let upstream = Upstream::new("up", registry.url()).mirrors(&[mirror.url().as_str()]);
    let cache = cache().upstream(upstream).start().await;
    (registry, mirror, cache)
}

/// The registry breaks in the middle of a large blob and stays broken: its mirror brings the rest, and no byte comes twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_finishes_what_a_broken_registry_began() {
    let (registry, mirror, cache) = with_a_mirror().await;
    let blob = offered(&registry, 40, "mirrored");
    mirror.put_blob(REPO, &blob);
    let half = faults::serve(&blob, ServeOptions::new().stop_at(20 * MIB));
    registry.script(
        (Kind::Blob, "GET"),
        faults::sequence(vec![half, faults::drop_connection()]),
    );
    for response in whole(&blob).storm(cache.port(), 5).await {
        assert_right(&response);
    }
    let sent = registry.sent(Kind::Blob) + mirror.sent(Kind::Blob);
    assert!(mirror.sent(Kind::Blob) >= 20 * MIB);
    assert!(sent <= hardly_more_than(&blob), "{sent} bytes");
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// A line that breaks once is an accident: the registry brings the rest, and its mirror, which may have other bytes, is not asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_breaks_once_finishes_itself() {
    let (registry, mirror, cache) = with_a_mirror().await;
    let blob = offered(&registry, 2, "an accident");
    mirror.script(
        Kind::Blob,
        faults::serve(&blob, ServeOptions::new().data(blob.spoiled())),
    );
    registry.script(
        Matcher::blobs().once(),
        faults::serve(&blob, ServeOptions::new().reset_at(MIB)),
    );
    assert_right(&whole(&blob).send(cache.port()).await);
    assert_eq!(mirror.count(Kind::Blob), 0, "the mirror was asked");
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// Wrong bytes are never completed; the next request asks the other place first.
#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_sent_wrong_bytes_is_not_asked_first_again() {
    let (registry, mirror, cache) = with_a_mirror().await;
    let blob = offered(&registry, 1, "wrong");
    mirror.put_blob(REPO, &blob);
    registry.script(
        (Kind::Blob, "GET"),
        faults::serve(&blob, ServeOptions::new().data(blob.spoiled())),
    );
    let first = whole(&blob).send(cache.port()).await;
    assert!(first.is_refused() && first.length < blob.size(), "{first}");
    assert_holds_nothing(&cache).await;
    let asked = registry.count(Kind::Blob);
    sleep(AFTER_A_FAILURE).await;
    assert_right(&whole(&blob).send(cache.port()).await);
    assert_eq!(registry.count(Kind::Blob), asked, "the bad place was asked");
    assert_eq!(mirror.count((Kind::Blob, "GET")), 1);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// The mirror that was to finish a blob brings other bytes: nobody completes the mixture, and the next one is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_continues_with_wrong_bytes_spoils_one_try() {
    let (registry, mirror, cache) = with_a_mirror().await;
    let blob = offered(&registry, 2, "mixture");
    mirror.script(
        Kind::Blob,
        faults::serve(&blob, ServeOptions::new().data(blob.spoiled())),
    );
    let half = faults::serve(&blob, ServeOptions::new().stop_at(MIB));
    registry.script(
        (Kind::Blob, "GET"),
        faults::sequence(vec![
            half,
            faults::drop_connection(),
            faults::drop_connection(),
            faults::drop_connection(),
            faults::usual(),
        ]),
    );
    let mixture = whole(&blob).send(cache.port()).await;
    assert!(
        mixture.is_refused() && mixture.length < blob.size(),
        "{mixture}"
    );
    assert_holds_nothing(&cache).await;
    let (asked, sent) = (mirror.count(Kind::Blob), mirror.sent(Kind::Blob));
    assert!(sent > 0, "it was no mixture");
    sleep(AFTER_A_FAILURE).await;
    assert_right(&whole(&blob).send(cache.port()).await);
    assert_eq!(mirror.count(Kind::Blob), asked, "the mirror was asked");
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// A continuation under other headers, with other bytes of the same length.
fn continuation(blob: &Content, at: u64, (etag, total): (&str, u64)) -> Handler {
    let last = blob.size() - 1;
    let from = usize::try_from(at).expect("an offset");
    faults::status(
        206,
        &[
            ("ETag", etag),
            ("Content-Range", &format!("bytes {at}-{last}/{total}")),
        ],
        blob.spoiled().slice(from..),
    )
}

/// What changes midway is never mixed with what came before: it is asked for again until it is the same again.
#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_changes_midway_is_never_mixed() {
    let size = 2_000_000;
    let half = size / 2;
    let changes = [("\"another\"", size), ("\"same\"", size + 1)];
    for (n, (etag, total)) in changes.into_iter().enumerate() {
        let (registry, cache) = up().await;
        let blob = Content::blob(2_000_000, &format!("changing {n}"));
        let etag = etag.replace("same", &blob.digest.to_string());
        registry.put_blob(REPO, &blob);
        let broken = faults::serve(&blob, ServeOptions::new().stop_at(half));
        let other = continuation(&blob, half, (&etag, total));
        registry.script(
            (Kind::Blob, "GET"),
            faults::sequence(vec![broken, other, faults::usual()]),
        );
        assert_right(&whole(&blob).send(cache.port()).await);
        assert_eq!(registry.count(Kind::Blob), 3);
        assert_holds(&cache, [&blob]).await;
        cache.check_invariants().await;
    }
}

/// One that has changed for good ends in a visible failure, and nothing of it stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_has_changed_for_good_is_cut() {
    let (registry, cache, blob) = up_with_blob(2_000_000).await;
    let broken = faults::serve(&blob, ServeOptions::new().stop_at(MIB));
    let changed = continuation(&blob, MIB, ("\"another\"", blob.size()));
    registry.script((Kind::Blob, "GET"), faults::sequence(vec![broken, changed]));
    let response = whole(&blob).send(cache.port()).await;
    assert!(
        response.is_refused() && response.right == Some(true),
        "{response}"
    );
    assert!(registry.count(Kind::Blob) <= 12);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

// Pieces.

/// The pieces that lie in `parked/`, without their list.
fn parked(cache: &CacheProcess) -> Vec<PathBuf> {
    let Ok(files) = fs::read_dir(cache.cache_dir().join("parked")) else {
        return Vec::new();
    };
    files
        .filter_map(|file| Some(file.ok()?.path()))
        .filter(|path| path.extension().is_none())
        .collect()
}

/// A blob of 48 MiB of which a client has read 31, and of which 32 have come.
async fn two_thirds_in() -> (Registry, CacheProcess, Content, Incoming) {
    let (registry, cache) = up().await;
    let blob = offered(&registry, 48, "pieces");
    let gate = Gate::new();
    let paused = ServeOptions::new().pause(32 * MIB, &gate).rate(400 * MIB);
    registry.script((Kind::Blob, "GET"), faults::serve(&blob, paused));
    let mut client = whole(&blob).open(cache.port()).await.expect("a head");
    assert!(client.read(31 * MIB).await, "{}", client.response);
    (registry, cache, blob, client)
}

/// Asks for the whole blob and returns how many bytes the upstream sent for it.
async fn fetched_for(registry: &Registry, cache: &CacheProcess, blob: &Content) -> u64 {
    registry.clear_scripts();
    registry.clear_log();
    assert_right(&whole(blob).send(cache.port()).await);
    assert_holds(cache, [blob]).await;
    cache.check_invariants().await;
    registry.sent((Kind::Blob, "GET"))
}

/// The blob for a plain GET, and this status for a range.
fn only_whole(blob: &Content, status: u16) -> Handler {
    let usual = faults::serve(blob, ServeOptions::new());
    let refused = faults::error(status, "UNSUPPORTED", &[]);
    Handler::new(move |exchange| match exchange.header("range") {
        Some(_) => refused.call(exchange),
        None => usual.call(exchange),
    })
}

/// An upstream that refuses ranges, in whatever words, still gives what pieces were kept of.
#[tokio::test(flavor = "multi_thread")]
async fn kept_pieces_ask_for_no_more_than_the_upstream_knows() {
    for status in [400, 403, 404, 416, 501, 503] {
        let (registry, cache, blob, client) = two_thirds_in().await;
        cache.kill9().await;
        client.abort();
        cache.restart().await;
        assert_eq!(parked(&cache).len(), 1, "the pieces are kept");
        registry.clear_scripts();
        registry.script((Kind::Blob, "GET"), only_whole(&blob, status));
        assert_right(&whole(&blob).send(cache.port()).await);
        assert_holds(&cache, [&blob]).await;
        cache.check_invariants().await;
    }
}

/// An upstream that is away for a while, so long that it is left alone, costs no pieces: it is asked for the rest once it is back.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_costs_no_kept_pieces() {
    let (registry, cache, blob, client) = two_thirds_in().await;
    cache.kill9().await;
    client.abort();
    cache.restart().await;
    registry.server().stop().await;
    for _ in 0..4 {
        let refused = whole(&blob).send(cache.port()).await;
        assert_eq!(refused.status, 503, "{refused}");
        sleep(AFTER_A_FAILURE).await;
    }
    registry.clear_scripts();
    registry.clear_log();
    registry.server().resume().await;
    // It is left alone for a second, and who asks too early hears so.
    let mut answer = whole(&blob).send(cache.port()).await;
    for _ in 0..40 {
        if answer.status == 200 {
            break;
        }
        sleep(Duration::from_millis(100)).await;
        answer = whole(&blob).send(cache.port()).await;
    }
    assert_right(&answer);
    let fetched = registry.sent((Kind::Blob, "GET"));
    assert!(
        fetched <= 16 * MIB + 4 * MIB,
        "{fetched} bytes: {:?}",
        ranges(&registry)
    );
    cache.check_invariants().await;
}

/// F25: pieces survive a kill, and a second one; only those whose bytes are right are used.
#[tokio::test(flavor = "multi_thread")]
async fn pieces_that_rotted_are_fetched_again() {
    let (registry, cache, blob, client) = two_thirds_in().await;
    cache.kill9().await;
    client.abort();
    cache.restart().await;
    assert_eq!(parked(&cache).len(), 1, "the pieces are kept");
    cache.kill9().await;
    cache.restart().await;
    let pieces = parked(&cache);
    assert_eq!(pieces.len(), 1, "the pieces are kept");
    let file = File::options().write(true).open(&pieces[0]);
    file.and_then(|file| file.write_all_at(b"rot", 9 * MIB))
        .expect("damage a piece");
    let fetched = fetched_for(&registry, &cache, &blob).await;
    // A third was missing, one piece is bad, and the last one may not have been whole.
    let (least, most) = (16 * MIB + 4 * MIB, 16 * MIB + 8 * MIB + IN_A_SOCKET);
    assert!(
        (least..=most).contains(&fetched),
        "{fetched} bytes: {:?}",
        ranges(&registry)
    );
}

/// A list that lies is found out at the end: the bytes are fetched once more, from zero, and nobody gets a wrong blob.
#[tokio::test(flavor = "multi_thread")]
async fn pieces_whose_list_lies_spoil_nothing() {
    let (registry, cache, blob, client) = two_thirds_in().await;
    cache.kill9().await;
    client.abort();
    cache.restart().await;
    let pieces = parked(&cache);
    // Other bytes, with the checksum that fits them.
    let other = vec![7_u8; 4 << 20];
    let file = File::options().write(true).open(&pieces[0]);
    file.and_then(|file| file.write_all_at(&other, 8 * MIB))
        .expect("damage a piece");
    let list = pieces[0].with_extension("pieces");
    let text = fs::read_to_string(&list).expect("read the list");
    let lie = |line| {
        if str::starts_with(line, "2 ") {
            "2 ab97b9fb"
        } else {
            line
        }
    };
    let lying: Vec<&str> = text.lines().map(lie).chain([""]).collect();
    fs::write(&list, lying.join("\n")).expect("write the list");
    registry.clear_scripts();
    registry.clear_log();
    let mut tries = 0;
    loop {
        let response = whole(&blob).send(cache.port()).await;
        if response.is_right() {
            break;
        }
        assert!(!response.complete || response.status >= 500, "{response}");
        tries += 1;
        assert!(tries < 2, "the next one starts from zero");
        sleep(AFTER_A_FAILURE).await;
    }
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// A process that is told to end sets aside what nobody reads, and goes on from there.
#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_fill_is_set_aside_at_the_end() {
    let (registry, cache, blob, client) = two_thirds_in().await;
    client.abort();
    sleep(Duration::from_millis(200)).await;
    cache.terminate().await;
    let left = eventually(Duration::from_secs(1), || parked(&cache).len() == 1).await;
    assert!(left, "nothing was set aside");
    cache.restart().await;
    assert!(cache.spool_files().is_empty());
    let fetched = fetched_for(&registry, &cache, &blob).await;
    assert!(
        fetched <= 16 * MIB + 4 * MIB + IN_A_SOCKET,
        "{fetched} bytes: {:?}",
        ranges(&registry)
    );
}

// TLS.

/// Blobs come over HTTP/1.1, each transfer on a connection of its own, although the upstream offers HTTP/2 first.
#[tokio::test(flavor = "multi_thread")]
async fn blobs_keep_to_http_1_where_http_2_is_offered() {
    let registry = Registry::start().await;
    let front = TlsFront::start(&registry).await;
    let upstream = Upstream::new("up", front.url())
        .line(&format!("ca_file = \"{}\"", front.ca_file().display()))
        .line("connections_per_blob = 4");
    let cache = cache().upstream(upstream).start().await;
    let blob = offered(&registry, 40, "over TLS");
    let most = Arc::new(AtomicUsize::new(0));
    let slow = faults::serve(&blob, ServeOptions::new().rate(4 * MIB));
    registry.script((Kind::Blob, "GET"), counted(slow, &most));
    assert_right(&whole(&blob).send(cache.port()).await);
    let most = most.load(Ordering::SeqCst);
    assert!((2..=4).contains(&most), "{most} transfers at once");
    let protocols = front.protocols();
    assert!(
        protocols.len() >= most && protocols.iter().all(|protocol| protocol == "http/1.1"),
        "{protocols:?}"
    );
    assert!(
        protocols.len() <= registry.count((Kind::Blob, "GET")),
        "{protocols:?}"
    );
    assert_holds(&cache, [&blob]).await;

    // The front does offer HTTP/2: what is small takes it.
    drop(cache.manifest("up", REPO, "v1").await);
    let last = front.protocols().pop();
    assert_eq!(last.as_deref(), Some("h2"));
    cache.check_invariants().await;
}
