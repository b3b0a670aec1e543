//! Every answer carries its verdict in a header, a log line and a metric, and an operator can see what went on.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use testbed::cache::{blob_path, manifest_path};
use testbed::{
    Basic, CacheProcess, Connection, Content, Gate, ImageSpec, Kind, Matcher, Origin, Registry,
    Request, ServeOptions, TlsFront, TokenServer, Upstream, assert_good, eventually, faults,
};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::stage::{
    BINARY, REPO, assert_holds, cache, get_manifest, said, up, up_with_blob, up_with_image,
    up_without_ttl,
};

/// The log, line by line; fails on a line that is no JSON.
fn log_lines(cache: &CacheProcess) -> Vec<Value> {
    let read = |line: &str| {
        serde_json::from_str(line).unwrap_or_else(|error| panic!("no JSON ({error}): {line}"))
    };
    let log = cache.log();
    // What stands after the last line's end is still being written.
    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(read).collect()
}

fn access_lines(cache: &CacheProcess) -> Vec<Value> {
    let mut lines = log_lines(cache);
    lines.retain(|line| line["target"] == "access" && line["path"] != "/v2/");
    lines
}

/// Waits for so many access lines and returns the last.
async fn last_access(cache: &CacheProcess, count: usize) -> Value {
    let written = eventually(Duration::from_secs(5), || {
        access_lines(cache).len() >= count
    })
    .await;
    assert!(
        written,
        "{} of {count} access lines",
        access_lines(cache).len()
    );
    assert_eq!(access_lines(cache).len(), count);
    access_lines(cache).pop().expect("an access line")
}

/// How many answers the metrics count under these labels.
async fn answers(cache: &CacheProcess, kind: &str, verdict: &str) -> u64 {
    // An answer is counted when its last byte has left, and its client may see that byte first.
    tokio::time::sleep(Duration::from_millis(30)).await;
    let (kind, verdict) = (format!("kind=\"{kind}\""), format!("verdict=\"{verdict}\""));
    cache
        .metrics()
        .await
        .lines()
        .filter(|line| line.starts_with("oci_remote_cache_requests_total{"))
        .filter(|line| {
            line.contains(&kind) && line.contains(&verdict) && line.contains("upstream=\"up\"")
        })
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_verdict_is_in_header_log_and_metric() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let foreign = "foo+bar:baz";
    registry.put_blob_as(REPO, foreign, image.layer());
    let tag = manifest_path("up", REPO, "v1");
    let layer = blob_path("up", REPO, image.layer().digest);
    let steps = [
        (tag.clone(), "manifest", "miss", "fwd=uri-miss; stored"),
        (
            tag.clone(),
            "manifest",
            "revalidated",
            "hit; detail=revalidated",
        ),
        (layer.clone(), "blob", "miss", "fwd=uri-miss; stored"),
        (layer, "blob", "hit", "hit"),
        (
            blob_path("up", REPO, foreign),
            "blob",
            "bypass",
            "fwd=bypass; detail=unknown-algorithm",
        ),
        (tag, "manifest", "stale", "fwd=stale; detail=unreachable"),
    ];
    for (n, (path, kind, verdict, status)) in steps.iter().enumerate() {
        if *verdict == "hit" {
            cache.wait_until_stored(&image.layer().digest).await;
        }
        if *verdict == "stale" {
            registry.stop().await;
        }
        let answer = cache.get(path).await;
        assert_eq!(
            (answer.status, said(&answer)),
            (200, format!("oci-remote-cache; {status}").as_str()),
            "{path}"
        );
        let line = last_access(&cache, n + 1).await;
        assert_eq!(
            (
                line["path"].as_str(),
                line["verdict"].as_str(),
                line["kind"].as_str()
            ),
            (Some(path.as_str()), Some(*verdict), Some(*kind))
        );
        assert_eq!(answers(&cache, kind, verdict).await, 1, "{kind} {verdict}");
    }
    cache.check_invariants().await;
}

/// Errors say what they come of, and a HEAD that brought nothing does not say that anything was stored.
#[tokio::test(flavor = "multi_thread")]
async fn what_brings_no_content_has_its_cache_status_too() {
    let (registry, cache, blob) = up_with_blob(1000).await;
    let path = blob_path("up", REPO, blob.digest);
    let head = cache.send(Request::head(&path)).await;
    assert_eq!(
        (head.status, said(&head)),
        (200, "oci-remote-cache; fwd=uri-miss")
    );
    assert_eq!(answers(&cache, "blob", "miss").await, 1);
    assert_good(&cache.get(&path).await, &blob);
    cache.wait_until_stored(&blob.digest).await;
    let head = cache.send(Request::head(&path)).await;
    assert_eq!(said(&head), "oci-remote-cache; hit");

    let missing = manifest_path("up", REPO, "missing");
    let cases = [
        (Request::get(&missing), 404, "not-found"),
        // From here on by what is remembered of it.
        (Request::get(&missing), 404, "not-found"),
        (
            Request::get(&path).header("Range", "bytes=1000-"),
            416,
            "no-such-range",
        ),
        (
            Request::get("/v2/nosuch.example/x/manifests/t"),
            404,
            "not-found",
        ),
        (Request::get("/v2/up/x/tags/list?n=-1"), 400, "bad-request"),
        (Request::new("PUT", &missing), 405, "not-allowed"),
    ];
    for (request, status, detail) in cases {
        let answer = cache.send(request).await;
        let words = format!("oci-remote-cache; detail={detail}");
        assert_eq!((answer.status, said(&answer)), (status, words.as_str()));
    }
    let limited = faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "100")]);
    registry.script(Matcher::any(), limited);
    let answer = cache.get(&manifest_path("up", "other", "v1")).await;
    assert_eq!(
        (answer.status, said(&answer)),
        (429, "oci-remote-cache; detail=rate-limited")
    );
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_is_told_apart_from_the_leader() {
    let (registry, cache, blob) = up_with_blob(1 << 20).await;
    let gate = Gate::new();
    registry.script(
        Kind::Blob,
        faults::serve(&blob, ServeOptions::new().pause(500_000, &gate)),
    );
    let open = || {
        Request::get(&blob_path("up", REPO, blob.digest))
            .compare(&blob.data)
            .open(cache.port())
    };
    let leader = open().await.expect("a head");
    let follower = open().await.expect("a head");
    assert_eq!(
        said(&leader.response),
        "oci-remote-cache; fwd=uri-miss; stored"
    );
    assert_eq!(
        said(&follower.response),
        "oci-remote-cache; fwd=uri-miss; collapsed"
    );
    gate.open();
    assert!(leader.finish().await.is_right() && follower.finish().await.is_right());
    assert_eq!(
        (
            answers(&cache, "blob", "miss").await,
            answers(&cache, "blob", "collapsed").await
        ),
        (1, 1)
    );
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_access_line_tells_of_each_request() {
    let (_registry, cache, blob) = up_with_blob(300_000).await;
    let path = blob_path("up", REPO, blob.digest);
    let request =
        Request::get(&format!("{path}?ns=up&token=hidden")).header("User-Agent", "some-client/1.0");
    assert_good(&cache.send(request).await, &blob);
    let line = last_access(&cache, 1).await;
    assert_eq!(
        (
            line["method"].as_str(),
            line["status"].as_u64(),
            line["bytes"].as_u64()
        ),
        (Some("GET"), Some(200), Some(300_000))
    );
    assert_eq!(
        (
            line["upstream"].as_str(),
            line["end"].as_str(),
            line["level"].as_str()
        ),
        (Some("up"), Some("complete"), Some("INFO"))
    );
    assert!(
        line["path"]
            .as_str()
            .is_some_and(|shown| shown.starts_with(&path) && !shown.contains("hidden")),
        "{line}"
    );
    assert!(
        line["peer"]
            .as_str()
            .is_some_and(|peer| peer.starts_with("127.0.0.1:")),
        "{line}"
    );
    assert!(
        line["agent"]
            .as_str()
            .is_some_and(|agent| agent.contains("some-client/1.0")),
        "{line}"
    );
    assert!(
        line["duration_ms"].is_number() && line["timestamp"].is_string(),
        "{line}"
    );

    let missing = cache.get("/v2/nosuch.example/x/manifests/t").await;
    assert_eq!(missing.status, 404);
    let line = last_access(&cache, 2).await;
    assert_eq!(
        (line["status"].as_u64(), line["verdict"].as_str()),
        (Some(404), Some("none")),
        "{line}"
    );
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_did_not_reach_its_end_is_told_as_cut() {
    let (registry, cache, blob) = up_with_blob(20 << 20).await;
    let gate = Gate::new();
    registry.script(
        Kind::Blob,
        faults::serve(&blob, ServeOptions::new().pause(10 << 20, &gate)),
    );
    let mut reader = Request::get(&blob_path("up", REPO, blob.digest))
        .open(cache.port())
        .await
        .expect("a head");
    assert!(reader.read(1 << 20).await);
    reader.abort();
    gate.open();
    let line = last_access(&cache, 1).await;
    assert_eq!(line["end"].as_str(), Some("cut"), "{line}");
    assert!(
        line["bytes"]
            .as_u64()
            .is_some_and(|bytes| bytes < blob.size()),
        "{line}"
    );
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_on_both_listeners_whatever_the_upstream_does() {
    let (registry, cache) = up().await;
    registry.stop().await;
    for port in [cache.port(), cache.admin_port()] {
        for (path, text) in [("/healthz", "ok"), ("/readyz", "ready")] {
            let answer = Request::get(path).send(port).await;
            assert!(
                answer.is_whole() && answer.text().contains(text),
                "{path}: {answer}: {}",
                answer.text()
            );
            let head = Request::head(path).send(port).await;
            assert_eq!((head.status, head.length), (200, 0), "{path}");
        }
        assert_eq!(
            Request::get("/readyz").send(port).await.json()["reasons"],
            serde_json::json!([])
        );
    }
    assert_eq!(registry.connections(), 0);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_for_operators_alone() {
    let (_registry, cache, image) = up_with_image().await;
    cache.pull("up", &image).await;
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    while !cache.metrics().await.contains("fills_ended_total") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let page = Request::get("/metrics").send(cache.admin_port()).await;
    assert!(page.is_whole());
    assert!(
        page.header("content-type")
            .is_some_and(|kind| kind.starts_with("application/openmetrics-text; version=1.0.0"))
    );
    let text = page.text();
    assert!(text.ends_with("# EOF\n"));
    for name in [
        "requests",
        "served_bytes",
        "upstream_requests",
        "fills_ended",
        "store_faults",
        "evicted",
    ] {
        assert!(
            text.contains(&format!("# TYPE oci_remote_cache_{name} counter\n")),
            "no counter {name}:\n{text}"
        );
    }
    for name in [
        "fills",
        "stored_bytes",
        "stored_blobs",
        "connections",
        "connections_limit",
    ] {
        assert!(
            text.contains(&format!("# TYPE oci_remote_cache_{name} gauge\n")),
            "no gauge {name}:\n{text}"
        );
    }
    for secret in [REPO, image.layer().digest.hex().as_str(), "127.0.0.1"] {
        assert!(
            !text.contains(secret),
            "{secret} is a label, and labels must not grow"
        );
    }
    let elsewhere = Request::get("/v2/").send(cache.admin_port()).await;
    assert_eq!(
        (elsewhere.status, elsewhere.error_code().is_empty()),
        (404, false)
    );
    assert_eq!(
        Request::new("POST", "/metrics")
            .send(cache.admin_port())
            .await
            .status,
        405
    );
    assert_eq!(cache.get("/metrics").await.status, 404);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_a_rate_limit_is_a_metric() {
    let (registry, cache, image) = up_with_image().await;
    let digest = image.digest().to_string();
    let headers = [
        ("Content-Type", image.manifest.media_type.as_str()),
        ("Docker-Content-Digest", digest.as_str()),
        ("ratelimit-limit", "100;w=21600"),
        ("ratelimit-remaining", "42;w=21600"),
    ];
    registry.script(
        Kind::Manifest,
        faults::status(200, &headers, image.manifest.data.clone()),
    );
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let line = "oci_remote_cache_upstream_ratelimit_remaining{upstream=\"up\",credential=\"anonymous\"} 42";
    let page = cache.metrics().await;
    assert!(page.lines().any(|found| found == line), "{page}");
    cache.check_invariants().await;
}

/// A script that runs the binary with further flags.
fn binary_with(folder: &TempDir, flags: &str) -> std::path::PathBuf {
    let path = folder.path().join("oci-remote-cache");
    fs::write(&path, format!("#!/bin/sh\nexec {BINARY} \"$@\" {flags}\n")).expect("write a script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make a script run");
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn twice_verbose_shows_both_sides_and_no_secret() {
    const PASSWORD: &str = "correct-horse-battery";
    let folder = TempDir::new().expect("make a folder");
    let (registry, origin) = (Registry::start().await, Origin::start().await);
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::at(&registry);
    tokens.add_user("robot", PASSWORD);
    registry.require(testbed::Bearer::of(&tokens).identity("robot"));
    origin.hold(image.layer());
    let cache = CacheProcess::of(binary_with(&folder, "-vv"))
        .upstream(Upstream::new("up", registry.url()).credentials("robot", PASSWORD))
        .secret("client-secret")
        .secret("signed-secret")
        .secret("cm9ib3Q6Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5")
        .start()
        .await;
    let request = Request::get(&manifest_path("up", REPO, "v1"))
        .header("Authorization", "Bearer client-secret")
        .header("X-Mark", "from-the-client");
    assert_good(&cache.send(request).await, &image.manifest);
    let location = origin.location(image.layer().digest, "Signature=signed-secret");
    registry.script(Matcher::blobs(), faults::redirect(&location, 307));
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );

    cache.terminate().await;
    let log = cache.log();
    let lines = log_lines(&cache);
    for target in ["client", "upstream"] {
        assert!(
            lines.iter().any(|line| line["target"] == target),
            "nothing of {target}"
        );
    }
    for shown in [
        "from-the-client",
        "***",
        &format!("/v2/up/{REPO}/manifests/v1"),
        &format!("/v2/{REPO}/manifests/v1"),
        "docker-content-digest",
        "www-authenticate",
        &format!("/cdn/{}", image.layer().digest),
    ] {
        assert!(
            log.to_lowercase().contains(shown),
            "{shown} is not in the log"
        );
    }
    cache.check_invariants().await;
}

/// `RUST_LOG` beats the flags and the configuration; without it the configuration's filter counts.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_filter_is_the_operators() {
    let registry = Registry::start().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    for (line, variable, shown) in [
        ("log = \"warn\"", None, false),
        ("log = \"info\"", None, true),
        ("log = \"info\"", Some("error"), false),
    ] {
        let builder = cache()
            .upstream(Upstream::new("up", registry.url()))
            .line(line);
        let builder = match variable {
            Some(filter) => builder.environment("RUST_LOG", filter),
            None => builder,
        };
        let cache = builder.start().await;
        cache.pull("up", &image).await;
        let found = eventually(Duration::from_secs(1), || !access_lines(&cache).is_empty()).await;
        assert_eq!(found, shown, "{line} {variable:?}: {}", cache.log());
    }
    assert_eq!(registry.count(Matcher::from((Kind::Manifest, "GET"))), 3);
    assert_eq!(registry.requests()[0], get_manifest(REPO, "v1"));
}

/// A client that speaks TLS to the plain port is told apart, and its user told what to say to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_tls_hello_on_the_plain_port_is_explained() {
    let (_registry, cache, image) = up_with_image().await;
    let mut connection = Connection::open(cache.port()).await;
    connection
        .send(b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03hello\r\n\r\n")
        .await;
    assert!(
        connection.until_closed(Duration::from_secs(5)).await.1,
        "the connection stays open"
    );
    let told = eventually(Duration::from_secs(2), || {
        cache.log().contains("--tls-verify=false")
    })
    .await;
    assert!(told, "{}", cache.log());
    cache.pull("up", &image).await;
    cache.check_invariants().await;
}

/// Few clients show what an answer says, so the access line does: as a warning where a client got nothing because something failed.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusals_reason_is_in_the_log() {
    let (registry, cache) = up().await;
    let missing = cache.manifest("up", REPO, "nosuch").await;
    assert_eq!(missing.status, 404);
    let line = last_access(&cache, 1).await;
    assert_eq!(line["level"], "INFO");
    assert_eq!(line["error"], format!("up/{REPO} has no such manifest"));
    registry.stop().await;
    let down = cache.manifest("up", REPO, "v1").await;
    assert_eq!(down.status, 503);
    let line = last_access(&cache, 2).await;
    assert_eq!(line["level"], "WARN");
    let error = line["error"].as_str().unwrap();
    assert!(
        error.starts_with(&format!(
            "GET manifests/v1 of {REPO} from up: cannot connect"
        )),
        "{error}"
    );
    cache.check_invariants().await;
}

/// A server that knows no TLS, and says so to whoever comes with it.
async fn without_tls() -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
            stream.write_all(refusal).await.ok();
        }
    });
    (address, serving)
}

/// The mistakes that people make with a registry's URL and certificate: what is said names the way out.
#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_us_from_a_registry_is_said_with_the_way_out() {
    let registry = Registry::start().await;
    let front = TlsFront::start(&registry).await;
    let secretive = Registry::start().await;
    secretive.require(Basic::of("robot", "hunter2-hunter2"));
    let (address, _serving) = without_tls().await;
    let plain = format!("https://{address}");
    let cache = cache()
        .upstream(Upstream::new("plain", plain))
        .upstream(Upstream::new("untrusted", front.url()))
        .upstream(Upstream::new("closed", secretive.url()))
        .start()
        .await;
    for (key, status, wanted) in [
        ("plain", 503, "begin with http://"),
        ("untrusted", 503, "`ca_file`"),
        ("closed", 403, "`credentials` in [upstreams.\"closed\"]"),
    ] {
        let answer = cache.manifest(key, REPO, "v1").await;
        assert_eq!(answer.status, status, "{answer}");
        let said: Value = serde_json::from_str(&answer.text()).unwrap();
        let said = said["errors"][0]["message"].as_str().unwrap();
        assert!(said.contains(wanted), "{key}: {said}");
    }
    cache.check_invariants().await;
}

/// An error names what was being done, to what, and whose fault it is, and shows no URL's query.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_says_whose_fault_it_is() {
    let (registry, cache) = up().await;
    let blob = Content::blob(100, "error");
    registry.script(Matcher::any(), faults::error(502, "UNKNOWN", &[]));
    for path in [
        manifest_path("up", REPO, "v1"),
        blob_path("up", REPO, blob.digest),
    ] {
        let answer = cache.get(&path).await;
        let text = answer.text();
        assert!(
            answer.status >= 500 && text.contains("up") && text.contains(REPO),
            "{text}"
        );
        assert!(!text.contains("127.0.0.1") || !text.contains('?'), "{text}");
    }
    cache.check_invariants().await;
}
