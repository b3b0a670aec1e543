//! What breaks on the way from the upstream is mended behind the client's back, or ends in a visible failure.

use std::time::Duration;

use testbed::cache::blob_path;
use testbed::image::OCI_MANIFEST;
use testbed::{
    CacheProcess, Content, Ending, Entry, Exchange, Gate, Handler, ImageSpec, Kind, Matcher,
    Origin, Registry, Request, Response, ServeOptions, Upstream, assert_good, faults,
};
use tokio::time::{Instant, sleep};

use crate::stage::{
    AFTER_A_FAILURE, REPO, assert_holds, assert_holds_nothing, assert_refused, cache, get_manifest,
    up, up_with_blob, up_with_image,
};

const HALF: u64 = 500_000;
const SIZE: usize = 1_000_000;

fn blob_gets(registry: &Registry, handlers: Vec<Handler>) {
    registry.script((Kind::Blob, "GET"), faults::sequence(handlers));
}

async fn fetch(cache: &CacheProcess, blob: &Content) -> Response {
    Request::get(&blob_path("up", REPO, blob.digest))
        .compare(&blob.data)
        .send(cache.port())
        .await
}

/// The `Range` of each request for a blob.
fn ranges(entries: &[Entry]) -> Vec<Option<String>> {
    entries
        .iter()
        .map(|entry| entry.header("range").map(str::to_owned))
        .collect()
}

/// F01
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_closes_early_is_continued() {
    for ending in [Ending::Close, Ending::Reset] {
        let (registry, cache, blob) = up_with_blob(SIZE).await;
        let options = ServeOptions::new();
        let broken = if ending == Ending::Close {
            options.stop_at(HALF)
        } else {
            options.reset_at(HALF)
        };
        blob_gets(
            &registry,
            vec![faults::serve(&blob, broken), faults::usual()],
        );
        let response = fetch(&cache, &blob).await;
        assert!(response.is_right(), "{ending:?}: {response}");
        let entries = registry.entries(Kind::Blob);
        assert_eq!(entries.len(), 2, "{:?}", registry.requests());
        let again = entries[1].header("range").unwrap_or_default().to_owned();
        if ending == Ending::Close {
            assert_eq!(
                again,
                format!("bytes={HALF}-{}", SIZE - 1),
                "no byte is fetched twice"
            );
            assert_eq!(registry.sent(Kind::Blob), blob.size());
        } else {
            assert!(
                again.ends_with(&format!("-{}", SIZE - 1)),
                "asked again by {again:?}"
            );
        }
        assert_holds(&cache, [&blob]).await;
        cache.check_invariants().await;
    }
}

/// F02
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_ranges_is_read_again_up_to_the_break() {
    let (registry, cache, blob) = up_with_blob(SIZE).await;
    let broken = ServeOptions::new().without_ranges().stop_at(HALF);
    blob_gets(
        &registry,
        vec![
            faults::serve(&blob, broken),
            faults::serve(&blob, ServeOptions::new().without_ranges()),
        ],
    );
    let response = fetch(&cache, &blob).await;
    assert!(response.is_right(), "{response}");
    assert_eq!(registry.count(Kind::Blob), 2);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// Registries, and what stands before them, that answer ranges badly: refused, from the beginning, or without saying what it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_answers_ranges_badly_is_read_again_up_to_the_break() {
    let blob = Content::blob(SIZE, "badly answered");
    let all = format!("bytes 0-{}/{SIZE}", SIZE - 1);
    let none = format!("bytes */{SIZE}");
    let longer = format!("bytes {HALF}-{}/{}", SIZE - 1, SIZE + 5);
    let rest = blob.data.slice(SIZE / 2..);
    for bad in [
        faults::status(416, &[("Content-Range", &none)], ""),
        faults::status(206, &[("Content-Range", &all)], blob.data.clone()),
        faults::status(206, &[], rest.clone()),
        faults::status(206, &[("Content-Range", &longer)], rest),
    ] {
        let (registry, cache) = up().await;
        registry.put_blob(REPO, &blob);
        let to_ranges = Handler::new(move |exchange: Exchange| match exchange.header("range") {
            Some(_) => bad.call(exchange),
            None => faults::usual().call(exchange),
        });
        let broken = faults::serve(&blob, ServeOptions::new().stop_at(HALF));
        blob_gets(&registry, vec![broken, to_ranges]);
        let response = fetch(&cache, &blob).await;
        assert!(response.is_right(), "{response}");
        assert_eq!(registry.count(Kind::Blob), 3);
        assert_holds(&cache, [&blob]).await;
        cache.check_invariants().await;
    }
}

/// The same where the range is a client's, of a blob that nobody has asked for yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_is_answered_badly_is_taken_out_of_everything() {
    let blob = Content::blob(48 << 20, "asked for by its end");
    let all = format!("bytes 0-{}/{}", blob.size() - 1, blob.size());
    let from_start = faults::status(206, &[("Content-Range", &all)], blob.data.clone());
    let unsaid = faults::status(206, &[], blob.data.slice(..1000));
    // With the size told by a manifest the range is what is asked for first.
    for (bad, told) in [
        (from_start.clone(), false),
        (unsaid.clone(), false),
        (from_start, true),
        (unsaid, true),
    ] {
        let (registry, cache) = up().await;
        registry.put_blob(REPO, &blob);
        let config = Content::blob(20, "config");
        let manifest = Content::manifest(&config, std::slice::from_ref(&blob), OCI_MANIFEST);
        registry.put_manifest(REPO, Some("v1"), &manifest);
        if told {
            assert_good(&cache.manifest("up", REPO, "v1").await, &manifest);
        }
        let to_ranges = Handler::new(move |exchange: Exchange| match exchange.header("range") {
            Some(_) => bad.call(exchange),
            None => faults::usual().call(exchange),
        });
        registry.script((Kind::Blob, "GET"), to_ranges);
        let path = blob_path("up", REPO, blob.digest);
        let first = blob.size() - 1000;
        let tail = Request::get(&path)
            .range(&format!("{first}-{}", blob.size() - 1))
            .compare_from(&blob.data, first);
        let tail = tail.send(cache.port()).await;
        assert_eq!((tail.status, tail.right), (206, Some(true)), "{tail}");
        assert!(fetch(&cache, &blob).await.is_right());
        assert!(
            registry
                .entries(Kind::Blob)
                .iter()
                .any(|entry| entry.header("range").is_some())
        );
        cache.check_invariants().await;
    }
}

/// F04
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_gets_further_ends_in_a_visible_failure() {
    let (registry, cache, blob) = up_with_blob(SIZE).await;
    blob_gets(
        &registry,
        vec![faults::serve(&blob, ServeOptions::new().stop_at(HALF))],
    );
    let response = fetch(&cache, &blob).await;
    assert!(
        response.is_refused() && response.length < blob.size(),
        "{response}"
    );
    let tries = registry.count(Kind::Blob);
    assert!((2..=12).contains(&tries), "{tries} tries");
    assert_holds_nothing(&cache).await;
    registry.clear_scripts();
    sleep(AFTER_A_FAILURE).await;
    assert!(fetch(&cache, &blob).await.is_right());
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// Tries are counted only while nothing comes: a line that breaks every 100 kB still brings the blob.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_breaks_again_and_again_still_brings_the_blob() {
    let (registry, cache, blob) = up_with_blob(SIZE).await;
    let broken = (1..10).map(|n| faults::serve(&blob, ServeOptions::new().stop_at(n * 100_000)));
    blob_gets(&registry, broken.chain([faults::usual()]).collect());
    let response = fetch(&cache, &blob).await;
    assert!(response.is_right(), "{response}");
    assert_eq!(
        (registry.count(Kind::Blob), registry.sent(Kind::Blob)),
        (10, blob.size())
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// F10
#[tokio::test(flavor = "multi_thread")]
#[ignore = "waits out the stall limit of half a minute"]
async fn a_body_that_stalls_is_continued() {
    let (registry, cache, blob) = up_with_blob(SIZE).await;
    blob_gets(
        &registry,
        vec![
            faults::serve(&blob, ServeOptions::new().stall_at(HALF)),
            faults::usual(),
        ],
    );
    let began = Instant::now();
    let request = Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data);
    let response = request
        .timeout(Duration::from_secs(90))
        .send(cache.port())
        .await;
    assert!(response.is_right(), "{response}");
    assert!(
        began.elapsed() < Duration::from_mins(1),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(registry.count(Kind::Blob), 2);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// F10
#[tokio::test(flavor = "multi_thread")]
#[ignore = "waits out the slowest rate that is borne, over a minute"]
async fn a_body_that_drips_is_given_up_or_continued() {
    let (registry, cache, blob) = up_with_blob(SIZE).await;
    blob_gets(
        &registry,
        vec![
            faults::serve(&blob, ServeOptions::new().rate(1)),
            faults::usual(),
        ],
    );
    let request = Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data);
    let response = request
        .timeout(Duration::from_mins(2))
        .send(cache.port())
        .await;
    assert!(response.is_right() || response.is_refused(), "{response}");
    assert_ne!(response.error, "timed out in the body");
    cache.check_invariants().await;
}

/// F11
#[tokio::test(flavor = "multi_thread")]
async fn one_server_error_is_seen_by_nobody() {
    let (registry, cache) = up().await;
    for status in [500, 502, 503, 504] {
        let blob = Content::blob(SIZE, &status.to_string());
        registry.put_blob(REPO, &blob);
        registry.script(
            Matcher::blobs().of(blob.digest).once(),
            faults::error(status, "UNKNOWN", &[]),
        );
        let image = registry.put_image(&ImageSpec::new(REPO, &format!("v{status}")));
        registry.script(
            Matcher::manifests().of(&image.tag).once(),
            faults::error(status, "UNKNOWN", &[]),
        );
        assert!(fetch(&cache, &blob).await.is_right(), "{status}");
        assert_good(
            &cache.manifest("up", REPO, &image.tag).await,
            &image.manifest,
        );
        assert_eq!(
            (registry.count(Kind::Blob), registry.count(Kind::Manifest)),
            (2, 2)
        );
        registry.clear_log();
        assert_holds(&cache, [&blob, &image.manifest]).await;
        cache.restart_empty().await;
    }
    cache.check_invariants().await;
}

/// F11
#[tokio::test(flavor = "multi_thread")]
async fn four_server_errors_in_a_row_are_seen_by_nobody() {
    let (registry, cache, blob) = up_with_blob(SIZE).await;
    let errors = [500, 502, 503, 504].map(|status| faults::error(status, "UNKNOWN", &[]));
    blob_gets(
        &registry,
        errors.into_iter().chain([faults::usual()]).collect(),
    );
    let response = fetch(&cache, &blob).await;
    assert!(response.is_right(), "{response}");
    assert_eq!(registry.count(Kind::Blob), 5);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// F11: in the middle of a blob, where the rest is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn errors_in_the_middle_of_a_blob_are_seen_by_nobody() {
    let (registry, cache, blob) = up_with_blob(SIZE).await;
    blob_gets(
        &registry,
        vec![
            faults::serve(&blob, ServeOptions::new().stop_at(HALF)),
            faults::error(503, "UNAVAILABLE", &[]),
            faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "1")]),
            faults::drop_connection(),
            faults::usual(),
        ],
    );
    let response = fetch(&cache, &blob).await;
    assert!(response.is_right(), "{response}");
    let rest = format!("bytes={HALF}-{}", SIZE - 1);
    let asked = ranges(&registry.entries(Kind::Blob));
    assert_eq!(
        asked,
        [
            None,
            Some(rest.clone()),
            Some(rest.clone()),
            Some(rest.clone()),
            Some(rest)
        ]
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// A registry that refuses the first connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs_up_is_asked_again() {
    let (registry, cache, image) = up_with_image().await;
    registry.script(Matcher::any().times(2), faults::drop_connection());
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert_eq!(
        registry.requests(),
        [
            get_manifest(REPO, "v1"),
            get_manifest(REPO, "v1"),
            get_manifest(REPO, "v1")
        ]
    );
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// F13
#[tokio::test(flavor = "multi_thread")]
async fn a_short_rate_limit_is_waited_for() {
    let (registry, cache, image) = up_with_image().await;
    let limit = faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "1")]);
    registry.script(Matcher::manifests().once(), limit.clone());
    registry.script(Matcher::blobs().once(), limit);
    let began = Instant::now();
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert!(
        began.elapsed() >= Duration::from_millis(900),
        "asked again after {:?}",
        began.elapsed()
    );
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    assert_eq!(
        (registry.count(Kind::Manifest), registry.count(Kind::Blob)),
        (2, 2)
    );
    assert_holds(&cache, [&image.manifest, image.layer()]).await;
    cache.check_invariants().await;
}

/// F14
#[tokio::test(flavor = "multi_thread")]
async fn a_long_rate_limit_is_passed_on_and_kept() {
    let forms = [
        "120",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "4102444800",
        "",
        "soon",
        "999999999",
    ];
    let mut registries = Vec::new();
    let mut builder = cache();
    for (n, form) in forms.iter().enumerate() {
        let registry = Registry::start().await;
        let headers = [("Retry-After", *form)];
        let headers = if form.is_empty() {
            &[]
        } else {
            headers.as_slice()
        };
        registry.script(
            Matcher::any(),
            faults::error(429, "TOOMANYREQUESTS", headers),
        );
        builder = builder.upstream(Upstream::new(&format!("up{n}"), registry.url()));
        registries.push(registry);
    }
    let cache = builder.start().await;
    for (n, (form, registry)) in forms.iter().zip(&registries).enumerate() {
        let key = format!("up{n}");
        let first = cache.manifest(&key, REPO, "v1").await;
        let asked = registry.requests().len();
        assert!((1..=3).contains(&asked), "{form:?}: {asked} requests");
        for answer in [
            first,
            cache.manifest(&key, REPO, "v1").await,
            cache.manifest(&key, "other/app", "v2").await,
        ] {
            assert_refused(&answer, &[429]);
            assert_eq!(answer.error_code(), "TOOMANYREQUESTS");
            let wait = answer.number("retry-after").unwrap_or_default();
            assert!((1..=300).contains(&wait), "{form:?}: Retry-After {wait}");
        }
        assert_eq!(
            registry.requests().len(),
            asked,
            "{form:?}: asked in spite of the limit"
        );
    }
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// F14: a limit that is over already is a limit of one second, which is waited for once.
#[tokio::test(flavor = "multi_thread")]
async fn a_rate_limit_of_less_than_nothing_is_one_of_a_second() {
    let (registry, cache, _image) = up_with_image().await;
    registry.script(
        Matcher::any(),
        faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "-5")]),
    );
    let began = Instant::now();
    let answer = cache.manifest("up", REPO, "v1").await;
    assert_refused(&answer, &[429]);
    assert!(
        (1..=300).contains(&answer.number("retry-after").unwrap_or_default()),
        "{:?}",
        answer.headers
    );
    assert!(
        began.elapsed() >= Duration::from_millis(900),
        "asked again after {:?}",
        began.elapsed()
    );
    assert_eq!(registry.count(Kind::Manifest), 2);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// A registry behind a CDN, whose signed URLs are numbered in the order they were given out.
async fn behind_a_cdn(blob: &Content) -> (Registry, Origin, CacheProcess) {
    let (registry, cache) = up().await;
    let origin = Origin::start().await;
    origin.hold(blob);
    registry.put_blob(REPO, blob);
    let signed =
        (1..20).map(|n| faults::redirect(&origin.location(blob.digest, &format!("sig={n}")), 307));
    blob_gets(&registry, signed.collect());
    (registry, origin, cache)
}

/// R07
#[tokio::test(flavor = "multi_thread")]
async fn an_expired_url_is_renewed() {
    for status in [400, 401, 403, 410] {
        let blob = Content::blob(SIZE, "signed");
        let (registry, origin, cache) = behind_a_cdn(&blob).await;
        let expired = faults::status(
            status,
            &[("Content-Type", "application/xml")],
            "<Error><Code>Expired</Code></Error>",
        );
        origin.script(Matcher::any().query("sig=1"), expired);
        let response = fetch(&cache, &blob).await;
        assert!(response.is_right(), "{status}: {response}");
        assert_eq!(registry.count(Kind::Blob), 2, "{status}");
        let queries: Vec<String> = origin
            .log()
            .iter()
            .map(|entry| entry.query.clone())
            .collect();
        assert_eq!(queries, ["sig=1", "sig=2"]);
        assert_holds(&cache, [&blob]).await;
        cache.check_invariants().await;
    }
}

/// R07: a place that refuses for ever is not asked for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_url_that_never_works_is_given_up() {
    let blob = Content::blob(SIZE, "signed");
    let (registry, origin, cache) = behind_a_cdn(&blob).await;
    origin.script(Matcher::any(), faults::status(403, &[], "<Error/>"));
    let response = cache.blob("up", REPO, blob.digest).await;
    assert_refused(&response, &[502, 503]);
    assert!(
        !response.text().contains("sig="),
        "a signature was shown: {}",
        response.text()
    );
    assert!(
        registry.count(Kind::Blob) <= 4,
        "{} requests",
        registry.count(Kind::Blob)
    );
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// R08
#[tokio::test(flavor = "multi_thread")]
async fn a_url_that_expires_in_the_middle_is_renewed_and_continued() {
    let blob = Content::blob(SIZE, "signed");
    let (registry, origin, cache) = behind_a_cdn(&blob).await;
    let broken = faults::serve(&blob, ServeOptions::new().stop_at(HALF));
    let expired = faults::status(403, &[("Content-Type", "application/xml")], "<Error/>");
    origin.script(
        Matcher::any().query("sig=1"),
        faults::sequence(vec![broken, expired.clone()]),
    );
    origin.script(Matcher::any().query("sig=2"), expired);
    let response = fetch(&cache, &blob).await;
    assert!(response.is_right(), "{response}");
    assert!(
        (3..=4).contains(&registry.count(Kind::Blob)),
        "{:?}",
        registry.requests()
    );
    let last = origin
        .log()
        .last()
        .and_then(|entry| entry.header("range").map(str::to_owned));
    assert_eq!(last, Some(format!("bytes={HALF}-{}", SIZE - 1)));
    let right: u64 = origin
        .log()
        .iter()
        .filter(|entry| entry.status < 300)
        .map(|entry| entry.sent)
        .sum();
    assert_eq!(right, blob.size(), "bytes were fetched twice");
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// C36
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_large_cold_blob_comes_at_once() {
    let (registry, cache, blob) = up_with_blob(48 << 20).await;
    let gate = Gate::new();
    // The plain GET stands at 4 MiB; a closed range beyond it is served at once.
    registry.script(
        (Kind::Blob, "GET"),
        faults::serve(&blob, ServeOptions::new().pause(4 << 20, &gate)),
    );
    let path = blob_path("up", REPO, blob.digest);
    let first = blob.size() - 1024;
    let tail = Request::get(&path)
        .range(&format!("{first}-{}", blob.size() - 1))
        .compare_from(&blob.data, first);
    let tail = tail
        .timeout(Duration::from_secs(10))
        .send(cache.port())
        .await;
    assert_eq!(
        (tail.status, tail.length, tail.right),
        (206, 1024, Some(true)),
        "{tail}"
    );
    assert_eq!(
        tail.header("content-range"),
        Some(format!("bytes {first}-{}/{}", blob.size() - 1, blob.size()).as_str())
    );
    gate.open();
    let whole = fetch(&cache, &blob).await;
    assert!(whole.is_right(), "{whole}");
    assert!(
        registry.sent(Kind::Blob) <= blob.size() + blob.size() / 50,
        "{} bytes",
        registry.sent(Kind::Blob)
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// A manifest that breaks off is asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_breaks_off_is_asked_for_again() {
    let (registry, cache, image) = up_with_image().await;
    let length = image.manifest.size().to_string();
    let headers = [
        ("Content-Type", OCI_MANIFEST),
        ("Content-Length", length.as_str()),
    ];
    let half = image.manifest.data.slice(..image.manifest.data.len() / 2);
    registry.script(
        Matcher::manifests().once(),
        faults::declared(&headers, half, Ending::Close),
    );
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert_eq!(registry.count(Kind::Manifest), 2);
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// A registry, a mirror of it, and a cache that knows both.
async fn with_a_mirror() -> (Registry, Registry, CacheProcess) {
    let (registry, mirror) = (Registry::start().await, Registry::start().await);
    let upstream = Upstream::new("up", registry.url())
        .tag_ttl("0s")
        .mirrors(&[mirror.url().as_str()]);
    let cache = cache().upstream(upstream).start().await;
    (registry, mirror, cache)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_asked_while_the_registry_is_down() {
    let (registry, mirror, cache) = with_a_mirror().await;
    let image = mirror.put_image(&ImageSpec::new(REPO, "v1"));
    registry.stop().await;
    cache.pull("up", &image).await;
    assert_eq!(registry.connections(), 0);
    assert_eq!(
        (mirror.count(Kind::Manifest), mirror.count(Kind::Blob)),
        (1, 2)
    );
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

/// A mirror is asked as a stranger: what it refuses to strangers, or hides from them, was not refused by the upstream. Nor was what it
/// lacks: it may lag behind.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_mirror_refuses_to_strangers_is_no_word_of_the_upstream() {
    for (status, credentials) in [(401, false), (403, false), (404, true), (404, false)] {
        let (registry, mirror) = (Registry::start().await, Registry::start().await);
        let mut upstream = Upstream::new("up", registry.url())
            .tag_ttl("0s")
            .mirrors(&[mirror.url().as_str()]);
        if credentials {
            upstream = upstream.credentials("robot", "correct-horse-battery");
        }
        let cache = cache().upstream(upstream).start().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        cache.pull("up", &image).await;
        mirror.script(Matcher::any(), faults::error(status, "DENIED", &[]));
        registry.stop().await;
        for _ in 0..2 {
            let stale = cache.manifest("up", REPO, "v1").await;
            assert_good(&stale, &image.manifest);
            assert!(stale.header("warning").is_some(), "{stale}");
        }
        assert!(mirror.count(Kind::Manifest) > 0);
        cache.pull("up", &image).await;
        if (status, credentials) == (404, false) {
            let unheard_of = cache.manifest("up", REPO, "v2").await;
            assert_refused(&unheard_of, &[404]);
        }
        cache.check_invariants().await;
    }
}

/// A manifest that comes with other bytes than its digest's is asked of the next place.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_with_wrong_bytes_is_asked_of_a_mirror() {
    let (registry, mirror, cache) = with_a_mirror().await;
    let image = mirror.put_image(&ImageSpec::new(REPO, "v1"));
    let wrong = [("Content-Type", image.manifest.media_type.as_str())];
    let wrong = faults::status(200, &wrong, image.manifest.spoiled());
    registry.script((Kind::Manifest, "GET"), wrong);
    let answer = cache.manifest("up", REPO, image.digest()).await;
    assert_good(&answer, &image.manifest);
    assert_eq!(mirror.count((Kind::Manifest, "GET")), 1);
    cache.check_invariants().await;
}

/// What an upstream says about when to come back reaches the client, and a 408 is no reason to give up.
#[tokio::test(flavor = "multi_thread")]
async fn when_to_come_back_is_told() {
    let (registry, cache) = up().await;
    let later = faults::error(503, "UNAVAILABLE", &[("Retry-After", "100")]);
    registry.script(Matcher::any(), later);
    let answer = cache.manifest("up", REPO, "v1").await;
    assert_eq!(answer.status, 503, "{answer}");
    assert!(answer.number("retry-after") >= Some(100), "{answer}");
    registry.clear_scripts();
    registry.script(Matcher::any(), faults::error(408, "UNKNOWN", &[]));
    sleep(AFTER_A_FAILURE).await;
    let answer = cache.manifest("up", REPO, "v2").await;
    assert_eq!(answer.status, 503, "{answer}");
    cache.check_invariants().await;
}

/// One mirror lacks what the next one has.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_lacks_something_is_not_the_last_one_asked() {
    let registry = Registry::start().await;
    let (empty, full) = (Registry::start().await, Registry::start().await);
    let mirrors = [empty.url(), full.url()];
    let mirrors: Vec<_> = mirrors.iter().map(String::as_str).collect();
    let upstream = Upstream::new("up", registry.url()).mirrors(&mirrors);
    let cache = cache().upstream(upstream).start().await;
    let image = full.put_image(&ImageSpec::new(REPO, "v1"));
    registry.stop().await;
    cache.pull("up", &image).await;
    assert!(empty.count(Kind::Manifest) > 0);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_left_alone_while_the_registry_answers() {
    let (registry, mirror, cache) = with_a_mirror().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    assert_eq!((registry.requests().len(), mirror.connections()), (3, 0));
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_continues_what_the_registry_began() {
    let (registry, mirror, cache) = with_a_mirror().await;
    let blob = Content::blob(SIZE, "mirrored");
    mirror.put_blob(REPO, &blob);
    let broken = faults::serve(&blob, ServeOptions::new().stop_at(HALF));
    blob_gets(
        &registry,
        vec![broken, faults::error(503, "UNAVAILABLE", &[])],
    );
    let response = fetch(&cache, &blob).await;
    assert!(response.is_right(), "{response}");
    assert_eq!(
        ranges(&mirror.entries(Kind::Blob)),
        [Some(format!("bytes={HALF}-{}", SIZE - 1))]
    );
    assert_eq!(
        registry.entries(Kind::Blob)[0].sent + mirror.sent(Kind::Blob),
        blob.size()
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}
