//! What the specification and its clients hold a registry to: headers, conditions, ranges, listings, digests, methods.

use std::time::Duration;

use oci::{Algorithm, Digest};
use serde_json::{Value, json};
use testbed::cache::{blob_path, manifest_path};
use testbed::image::{
    ACCEPT_ALL, DOCKER_LIST, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST,
};
use testbed::{
    CacheProcess, Connection, Content, Handler, ImageSpec, Kind, Matcher, MultiImage, Request,
    Response, ServeOptions, assert_good, faults,
};
use tokio::time::sleep;

use crate::stage::{
    REPO, as_it_is, assert_holds, assert_holds_nothing, assert_refused, get_blob, get_manifest,
    head_blob, head_manifest, lasting_headers, said, up, up_as, up_with_blob, up_with_image,
    up_without_ttl,
};

/// The largest manifest that is taken.
const MANIFEST_LIMIT: usize = 4 << 20;

const DIGEST: &str = "docker-content-digest";

async fn ranged(cache: &CacheProcess, blob: &Content, range: &str) -> Response {
    cache
        .send(Request::get(&blob_path("up", REPO, blob.digest)).range(range))
        .await
}

/// Where a `Link` leads, when it is the next page here.
fn next_page(response: &Response) -> Option<String> {
    let link = response.header("link")?;
    let target = link.strip_prefix('<')?.strip_suffix(">; rel=\"next\"")?;
    assert!(
        target.starts_with("/v2/up/lib/app/tags/list?"),
        "leads away: {link}"
    );
    Some(target.to_owned())
}

fn tags_of(response: &Response) -> Vec<String> {
    serde_json::from_value(response.json()["tags"].clone()).expect("a list of tags")
}

/// C01
#[tokio::test(flavor = "multi_thread")]
async fn a_cold_head_of_a_tag_is_one_head_upstream() {
    let (registry, cache, image) = up_with_image().await;
    let head = cache.head_manifest("up", REPO, "v1").await;
    assert_eq!((head.status, head.length), (200, 0), "{head}");
    assert_eq!(head.number("content-length"), Some(image.manifest.size()));
    assert_eq!(head.header("content-type"), Some(OCI_MANIFEST));
    assert_eq!(
        head.header(DIGEST),
        Some(image.digest().to_string().as_str())
    );
    assert_eq!(registry.requests(), [head_manifest(REPO, "v1")]);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// C02
#[tokio::test(flavor = "multi_thread")]
async fn get_and_head_of_a_tag_have_the_same_headers() {
    let (registry, cache, image) = up_with_image().await;
    let head = cache.head_manifest("up", REPO, "v1").await;
    let miss = cache.manifest("up", REPO, "v1").await;
    assert_good(&miss, &image.manifest);
    let hit = cache.manifest("up", REPO, "v1").await;
    assert_good(&hit, &image.manifest);
    assert_eq!(lasting_headers(&head), lasting_headers(&miss));
    assert_eq!(lasting_headers(&miss), lasting_headers(&hit));
    assert_eq!(
        lasting_headers(&hit),
        lasting_headers(&cache.head_manifest("up", REPO, "v1").await)
    );
    for (name, value) in [
        ("etag", format!("\"{}\"", image.digest()).as_str()),
        ("cache-control", "no-cache"),
        ("vary", "Accept"),
        ("x-content-type-options", "nosniff"),
    ] {
        assert_eq!(hit.header(name), Some(value));
    }
    assert!(hit.number("age").is_some(), "no age on a stored manifest");
    assert_eq!(registry.count((Kind::Manifest, "HEAD")), 1);
    assert_eq!(registry.count((Kind::Manifest, "GET")), 1);
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// C03
#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_tag_is_served_without_asking() {
    let (registry, cache, image) = up_with_image().await;
    let first = cache.manifest("up", REPO, "v1").await;
    let second = cache.manifest("up", REPO, "v1").await;
    assert_good(&first, &image.manifest);
    assert_good(&second, &image.manifest);
    assert_eq!(lasting_headers(&first), lasting_headers(&second));
    assert_eq!(
        (said(&first), said(&second)),
        (
            "oci-remote-cache; fwd=uri-miss; stored",
            "oci-remote-cache; hit"
        )
    );
    assert_eq!(registry.requests(), [get_manifest(REPO, "v1")]);
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// C04
#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_tag_past_its_time_costs_one_head() {
    let (registry, cache) = up_as(|upstream| upstream.tag_ttl("1s")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    sleep(Duration::from_millis(1100)).await;
    let renewed = cache.manifest("up", REPO, "v1").await;
    assert_good(&renewed, &image.manifest);
    assert!(said(&renewed).contains("revalidated"), "{}", said(&renewed));
    // The answer to the HEAD gave the tag its time again.
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert_eq!(
        registry.requests(),
        [get_manifest(REPO, "v1"), head_manifest(REPO, "v1")]
    );
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// C05
#[tokio::test(flavor = "multi_thread")]
async fn a_moved_tag_brings_new_bytes_and_keeps_the_old_digest() {
    let (registry, cache) = up_without_ttl().await;
    let old = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &old.manifest);
    let new = registry.put_image(&ImageSpec::new(REPO, "v1").seed("moved"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &new.manifest);
    assert_good(
        &cache.manifest("up", REPO, old.digest()).await,
        &old.manifest,
    );
    let wanted = [
        get_manifest(REPO, "v1"),
        head_manifest(REPO, "v1"),
        get_manifest(REPO, new.digest()),
    ];
    assert_eq!(registry.requests(), wanted);
    assert_holds(&cache, [&old.manifest, &new.manifest]).await;
    cache.check_invariants().await;
}

/// C06
#[tokio::test(flavor = "multi_thread")]
async fn what_the_upstream_leaves_out_is_computed() {
    let (registry, cache) = up().await;
    let image = ImageSpec::new(REPO, "v1").build();
    let mut body = format!("{:x}\r\n", image.manifest.size()).into_bytes();
    body.extend_from_slice(&image.manifest.data);
    body.extend_from_slice(b"\r\n0\r\n\r\n");
    let charset = format!("{OCI_MANIFEST}; charset=utf-8");
    let headers = [
        ("Content-Type", charset.as_str()),
        ("Transfer-Encoding", "chunked"),
    ];
    registry.script(Kind::Manifest, faults::status(200, &headers, body));
    for _ in 0..2 {
        let answer = cache.manifest("up", REPO, "v1").await;
        assert_good(&answer, &image.manifest);
        assert_eq!(
            answer.header(DIGEST),
            Some(image.digest().to_string().as_str())
        );
        assert_eq!(answer.number("content-length"), Some(image.manifest.size()));
        assert_eq!(answer.header("content-type"), Some(OCI_MANIFEST));
    }
    assert_eq!(registry.requests(), [get_manifest(REPO, "v1")]);
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// C06: a registry whose HEAD says too little, or is not allowed.
#[tokio::test(flavor = "multi_thread")]
async fn a_useless_head_falls_back_to_a_get_of_the_tag() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let silent = faults::status(
        200,
        &[("Content-Type", OCI_MANIFEST)],
        image.manifest.data.clone(),
    );
    let refusals = [
        silent,
        faults::error(405, "UNSUPPORTED", &[]),
        faults::error(403, "DENIED", &[]),
    ];
    for refusal in refusals {
        registry.clear_scripts();
        registry.clear_log();
        registry.script((Kind::Manifest, "HEAD"), refusal);
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        assert_eq!(
            registry.requests(),
            [head_manifest(REPO, "v1"), get_manifest(REPO, "v1")]
        );
    }
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// C08
#[tokio::test(flavor = "multi_thread")]
async fn one_entry_serves_every_way_to_say_accept() {
    let (registry, cache, image) = up_with_image().await;
    let strict = Handler::new(|mut exchange| async move {
        let accept: Vec<&str> = exchange
            .entry()
            .headers
            .iter()
            .map(|(_, value)| value.as_str())
            .collect();
        let accept = accept.join(",");
        let full = [DOCKER_MANIFEST, DOCKER_LIST, OCI_MANIFEST, OCI_INDEX]
            .iter()
            .all(|kind| accept.contains(kind));
        if full {
            exchange.pass().await;
        } else {
            exchange.error(404, "MANIFEST_UNKNOWN", &[]).await;
        }
    });
    registry.script(Kind::Manifest, strict);
    let path = manifest_path("up", REPO, "v1");
    let lines = [
        DOCKER_MANIFEST,
        DOCKER_LIST,
        OCI_INDEX,
        OCI_MANIFEST,
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        "application/json",
    ];
    let six = lines.iter().fold(Request::get(&path), |request, line| {
        request.header("Accept", line)
    });
    let requests = [
        six,
        Request::get(&path).header("Accept", ACCEPT_ALL),
        Request::get(&path).header("Accept", "*/*"),
        Request::get(&path).header("Accept", "application/*;q=0.5"),
        Request::get(&path),
    ];
    for request in requests {
        let answer = cache.send(request).await;
        assert_good(&answer, &image.manifest);
        assert_eq!(answer.header("content-type"), Some(OCI_MANIFEST));
    }
    assert_eq!(registry.requests(), [get_manifest(REPO, "v1")]);
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// A client that takes only what the cache does not hold gets the upstream's own answer, and changes nothing for others.
#[tokio::test(flavor = "multi_thread")]
async fn a_narrow_accept_is_passed_through() {
    let (registry, cache, image) = up_with_image().await;
    let docker = ImageSpec::new(REPO, "v1")
        .media_type(DOCKER_MANIFEST)
        .build();
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    registry.script(
        Kind::Manifest,
        as_it_is(&docker.manifest, &[("Content-Type", DOCKER_MANIFEST)]),
    );
    let path = manifest_path("up", REPO, "v1");
    let narrow = cache
        .send(Request::get(&path).header("Accept", DOCKER_MANIFEST))
        .await;
    assert_good(&narrow, &docker.manifest);
    assert_eq!(
        narrow.header(DIGEST),
        Some(docker.digest().to_string().as_str())
    );
    assert!(
        said(&narrow).contains("fwd=bypass; detail=accept"),
        "{}",
        said(&narrow)
    );
    assert_eq!(
        registry.entries(Kind::Manifest)[1].header("accept"),
        Some(DOCKER_MANIFEST)
    );
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert_eq!(registry.count(Kind::Manifest), 2);
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// C10
#[tokio::test(flavor = "multi_thread")]
async fn a_cold_blob_is_one_get_and_is_stored() {
    let (registry, cache, blob) = up_with_blob(300_000).await;
    let miss = cache.blob("up", REPO, blob.digest).await;
    assert_good(&miss, &blob);
    let digest = blob.digest.to_string();
    for (name, value) in [
        ("content-type", "application/octet-stream"),
        ("content-length", "300000"),
        (DIGEST, digest.as_str()),
        ("etag", format!("\"{digest}\"").as_str()),
        ("accept-ranges", "bytes"),
        ("cache-control", "max-age=31536000, immutable"),
        ("x-content-type-options", "nosniff"),
    ] {
        assert_eq!(miss.header(name), Some(value));
    }
    assert_holds(&cache, [&blob]).await;
    let hit = cache.blob("up", REPO, blob.digest).await;
    assert_good(&hit, &blob);
    assert_eq!(lasting_headers(&miss), lasting_headers(&hit));
    assert_eq!(
        (said(&miss), said(&hit)),
        (
            "oci-remote-cache; fwd=uri-miss; stored",
            "oci-remote-cache; hit"
        )
    );
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    cache.check_invariants().await;
}

/// C11
#[tokio::test(flavor = "multi_thread")]
async fn a_cold_head_of_a_blob_fetches_nothing() {
    let (registry, cache, blob) = up_with_blob(300_000).await;
    let head = cache.head_blob("up", REPO, blob.digest).await;
    assert_eq!((head.status, head.length), (200, 0), "{head}");
    assert_eq!(head.number("content-length"), Some(blob.size()));
    assert_eq!(head.header(DIGEST), Some(blob.digest.to_string().as_str()));
    assert_eq!(registry.requests(), [head_blob(REPO, blob.digest)]);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// C12
#[tokio::test(flavor = "multi_thread")]
async fn a_warm_head_of_a_blob_is_local_and_whole() {
    let (registry, cache, blob) = up_with_blob(300_000).await;
    let get = cache.blob("up", REPO, blob.digest).await;
    assert_good(&get, &blob);
    let path = blob_path("up", REPO, blob.digest);
    for request in [
        Request::head(&path),
        Request::head(&path).range("0-9"),
        Request::head(&path).range("999999-"),
    ] {
        let head = cache.send(request).await;
        assert_eq!((head.status, head.length), (200, 0), "{head}");
        assert_eq!(lasting_headers(&head), lasting_headers(&get));
    }
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// C13
#[tokio::test(flavor = "multi_thread")]
async fn ranges_of_a_warm_blob_are_exact() {
    let (registry, cache, blob) = up_with_blob(10_000).await;
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    for (range, first, last) in [
        ("500-1499", 500, 1499),
        ("500-", 500, 9999),
        ("-500", 9500, 9999),
        ("-50000", 0, 9999),
        ("2000-50000", 2000, 9999),
        ("0-0", 0, 0),
        ("9999-", 9999, 9999),
    ] {
        let part = ranged(&cache, &blob, range).await;
        assert_eq!((part.status, part.complete), (206, true), "{range}: {part}");
        assert_eq!(
            part.header("content-range"),
            Some(format!("bytes {first}-{last}/10000").as_str())
        );
        assert_eq!(part.number("content-length"), Some(last - first + 1));
        let (first, last) = (
            usize::try_from(first).unwrap(),
            usize::try_from(last).unwrap(),
        );
        assert!(
            part.body == blob.data.slice(first..=last),
            "{range}: wrong bytes"
        );
        assert_eq!(part.header(DIGEST), Some(blob.digest.to_string().as_str()));
    }
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// C14
#[tokio::test(flavor = "multi_thread")]
async fn ranges_outside_of_a_blob_are_not_satisfiable() {
    let (registry, cache, blob) = up_with_blob(10_000).await;
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    for range in ["10000-", "20000-20001", "500-0", "-0"] {
        let answer = ranged(&cache, &blob, range).await;
        assert_eq!(answer.status, 416, "{range}: {answer}");
        assert_eq!(
            answer.header("content-range"),
            Some("bytes */10000"),
            "{range}"
        );
    }
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    cache.check_invariants().await;
}

/// What is no range of bytes is ignored, as RFC 9110 says.
#[tokio::test(flavor = "multi_thread")]
async fn ranges_that_are_none_are_ignored() {
    let (_registry, cache, blob) = up_with_blob(10_000).await;
    for range in [
        "lines=0-1",
        "bytes=",
        "bytes=a-b",
        "bytes 0-1",
        "bytes=0-1,x",
    ] {
        let request = Request::get(&blob_path("up", REPO, blob.digest)).header("Range", range);
        assert_good(&cache.send(request).await, &blob);
    }
    cache.check_invariants().await;
}

/// podman's zstd:chunked asks for several ranges at once.
#[tokio::test(flavor = "multi_thread")]
async fn several_ranges_come_as_parts() {
    let (registry, cache, blob) = up_with_blob(10_000).await;
    for _ in 0..2 {
        let answer = ranged(&cache, &blob, "0-9,100-199,-5").await;
        assert_eq!((answer.status, answer.complete), (206, true), "{answer}");
        let kind = answer.header("content-type").unwrap_or_default().to_owned();
        let boundary = kind
            .strip_prefix("multipart/byteranges; boundary=")
            .expect("a boundary")
            .trim_matches('"');
        assert_eq!(answer.number("content-length"), Some(answer.length));
        assert_eq!(
            parts(&answer.body, boundary),
            [(0, 10), (100, 100), (9995, 5)].map(|(start, length)| {
                (
                    format!("bytes {start}-{}/10000", start + length - 1),
                    blob.data.slice(start..start + length).to_vec(),
                )
            })
        );
        assert_holds(&cache, [&blob]).await;
    }
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    cache.check_invariants().await;
}

/// The parts of a multipart body: what each one's `Content-Range` says, and its bytes.
fn parts(body: &[u8], boundary: &str) -> Vec<(String, Vec<u8>)> {
    let mark = format!("--{boundary}");
    let starts: Vec<usize> = (0..body.len())
        .filter(|&at| body.get(at..at + mark.len()) == Some(mark.as_bytes()))
        .collect();
    starts
        .windows(2)
        .map(|pair| {
            let part = &body[pair[0] + mark.len() + 2..pair[1] - 2];
            let end = part
                .windows(4)
                .position(|window| window == b"\r\n\r\n")
                .expect("a part's headers");
            let headers = String::from_utf8_lossy(&part[..end]).into_owned();
            let range = headers.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-range")
                    .then(|| value.trim().to_owned())
            });
            (range.expect("a part's range"), part[end + 4..].to_vec())
        })
        .collect()
}

/// C16
#[tokio::test(flavor = "multi_thread")]
async fn if_range_honours_the_range_only_for_the_same_blob() {
    let (registry, cache, blob) = up_with_blob(10_000).await;
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    let ask = |condition: String| {
        Request::get(&blob_path("up", REPO, blob.digest))
            .range("500-1499")
            .header("If-Range", &condition)
    };
    let same = cache.send(ask(format!("\"{}\"", blob.digest))).await;
    assert_eq!(
        (same.status, same.body == blob.data.slice(500..1500)),
        (206, true),
        "{same}"
    );
    let other = Content::blob(5, "other").digest;
    for condition in [
        format!("\"{other}\""),
        format!("W/\"{}\"", blob.digest),
        "Wed, 21 Oct 2015 07:28:00 GMT".to_owned(),
    ] {
        assert_good(&cache.send(ask(condition)).await, &blob);
    }
    assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)]);
    cache.check_invariants().await;
}

/// C19
#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_holds_is_not_sent_again() {
    let (registry, cache, image) = up_with_image().await;
    cache.pull("up", &image).await;
    let asked = registry.requests();
    let (manifest, layer) = (image.digest(), image.layer().digest);
    for (path, digest) in [
        (manifest_path("up", REPO, manifest), manifest),
        (manifest_path("up", REPO, "v1"), manifest),
        (blob_path("up", REPO, layer), layer),
    ] {
        let other = Content::blob(5, "other").digest;
        for condition in [
            format!("\"{digest}\""),
            format!("W/\"{digest}\""),
            format!("\"{other}\", \"{digest}\""),
            "*".to_owned(),
            digest.to_string(),
        ] {
            assert_unchanged(&cache, (&path, digest), &condition).await;
        }
        let stale = Request::get(&path).header("If-None-Match", &format!("\"{other}\""));
        assert_eq!(cache.send(stale).await.status, 200);
    }
    assert_eq!(registry.requests(), asked);
    cache.check_invariants().await;
}

async fn assert_unchanged(cache: &CacheProcess, (path, digest): (&str, Digest), condition: &str) {
    for request in [Request::get(path), Request::head(path)] {
        let answer = cache.send(request.header("If-None-Match", condition)).await;
        assert_eq!(
            (answer.status, answer.length),
            (304, 0),
            "{path} {condition}"
        );
        assert_eq!(
            answer.header("etag"),
            Some(format!("\"{digest}\"").as_str())
        );
        assert_eq!(answer.header(DIGEST), Some(digest.to_string().as_str()));
    }
}

/// C19: past its time a tag is asked for first.
#[tokio::test(flavor = "multi_thread")]
async fn a_condition_on_an_old_tag_is_judged_by_what_the_upstream_says() {
    let (registry, cache) = up_without_ttl().await;
    let old = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &old.manifest);
    let ask = || {
        Request::get(&manifest_path("up", REPO, "v1"))
            .header("If-None-Match", &format!("\"{}\"", old.digest()))
    };
    assert_eq!(cache.send(ask()).await.status, 304);
    let new = registry.put_image(&ImageSpec::new(REPO, "v1").seed("moved"));
    assert_good(&cache.send(ask()).await, &new.manifest);
    assert_eq!(registry.count((Kind::Manifest, "HEAD", "v1")), 2);
    cache.check_invariants().await;
}

/// C20
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_blob_is_a_blob() {
    let (registry, cache) = up().await;
    let empty = Content::new(Vec::new(), "application/octet-stream");
    registry.put_blob(REPO, &empty);
    let path = blob_path("up", REPO, empty.digest);
    for _ in 0..2 {
        let whole = cache.blob("up", REPO, empty.digest).await;
        assert_good(&whole, &empty);
        assert_eq!(whole.number("content-length"), Some(0));
        let head = cache.send(Request::head(&path)).await;
        assert_eq!((head.status, head.number("content-length")), (200, Some(0)));
        for range in ["0-", "0-0", "-1"] {
            let part = cache.send(Request::get(&path).range(range)).await;
            assert_eq!(
                (part.status, part.header("content-range")),
                (416, Some("bytes */0")),
                "{range}"
            );
        }
        assert_holds(&cache, [&empty]).await;
    }
    assert_eq!(registry.count((Kind::Blob, "GET")), 1);
    cache.check_invariants().await;
}

/// C20: a range as the first request.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_a_cold_empty_blob_is_not_satisfiable() {
    let (registry, cache) = up().await;
    let empty = Content::new(Vec::new(), "application/octet-stream");
    registry.put_blob(REPO, &empty);
    let part = ranged(&cache, &empty, "0-").await;
    assert_eq!(
        (part.status, part.header("content-range")),
        (416, Some("bytes */0")),
        "{part}"
    );
    cache.check_invariants().await;
}

/// C22
#[tokio::test(flavor = "multi_thread")]
async fn tags_are_paged_under_our_own_path() {
    let (registry, cache) = up().await;
    for tag in ["a", "b", "c", "d", "e"] {
        registry.put_image(&ImageSpec::new(REPO, tag));
    }
    let mut page = Some("/v2/up/lib/app/tags/list?n=2".to_owned());
    let mut found = Vec::new();
    while let Some(path) = page {
        let answer = cache.get(&path).await;
        assert!(answer.is_whole(), "{path}: {answer}");
        assert_eq!(answer.header("content-type"), Some("application/json"));
        found.extend(tags_of(&answer));
        page = next_page(&answer);
    }
    assert_eq!(found, ["a", "b", "c", "d", "e"]);
    let queries: Vec<String> = registry
        .entries(Kind::Tags)
        .iter()
        .map(|entry| entry.query.clone())
        .collect();
    assert_eq!(queries, ["n=2", "n=2&last=b", "n=2&last=d"]);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// C22
#[tokio::test(flavor = "multi_thread")]
async fn odd_page_sizes_are_tamed() {
    let (registry, cache) = up().await;
    for tag in ["a", "b"] {
        registry.put_image(&ImageSpec::new(REPO, tag));
    }
    let none = cache.get("/v2/up/lib/app/tags/list?n=0").await;
    assert_eq!(
        (
            none.status,
            none.json()["tags"].clone(),
            none.header("link")
        ),
        (200, json!([]), None)
    );
    registry.clear_log();
    assert_eq!(
        tags_of(&cache.get("/v2/up/lib/app/tags/list?n=99999999999").await),
        ["a", "b"]
    );
    assert_eq!(
        registry.entries(Kind::Tags)[0].parameter("n").as_deref(),
        Some("1000")
    );
    registry.clear_log();
    for n in ["-1", "two", "1e3"] {
        assert_refused(
            &cache.get(&format!("/v2/up/lib/app/tags/list?n={n}")).await,
            &[400],
        );
    }
    assert_eq!(registry.count(Kind::Tags), 0);
    cache.check_invariants().await;
}

/// C22: what registries really send: `null` (Nexus), and a next page that lies elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn odd_lists_of_tags_are_tamed() {
    let (registry, cache) = up().await;
    let list = |body: &str, link: &str| {
        faults::status(
            200,
            &[("Content-Type", "text/plain"), ("Link", link)],
            body.as_bytes().to_vec(),
        )
    };
    let away = "<http://elsewhere.example/steal?n=1&last=a>; rel=\"next\"";
    registry.script(
        Matcher::from(Kind::Tags).repo("nexus"),
        list("{\"name\":\"nexus\",\"tags\":null}", ""),
    );
    registry.script(
        Matcher::from(Kind::Tags).repo("away"),
        list("{\"name\":\"away\",\"tags\":[\"a\"]}", away),
    );
    registry.script(
        Matcher::from(Kind::Tags).repo("html"),
        list("<html>login</html>", ""),
    );
    let nexus = cache.get("/v2/up/nexus/tags/list").await;
    assert_eq!(
        (nexus.status, nexus.header("content-type")),
        (200, Some("application/json"))
    );
    let led_away = cache.get("/v2/up/away/tags/list").await;
    assert_eq!(tags_of(&led_away), ["a"]);
    assert!(
        !led_away
            .header("link")
            .unwrap_or_default()
            .contains("elsewhere"),
        "{:?}",
        led_away.headers
    );
    assert_refused(&cache.get("/v2/up/html/tags/list").await, &[502, 503]);
    cache.check_invariants().await;
}

/// C24
#[tokio::test(flavor = "multi_thread")]
async fn filtered_referrers_keep_their_marks() {
    let (registry, cache, image) = up_with_image().await;
    let signature = json!({"mediaType": OCI_MANIFEST, "digest": image.digest().to_string(), "size": 1, "artifactType": "a/sig"});
    let other = json!({"mediaType": OCI_MANIFEST, "digest": image.digest().to_string(), "size": 1, "artifactType": "a/sbom"});
    registry.set_referrers(REPO, image.digest(), &[signature.clone(), other]);
    let path = format!("/v2/up/{REPO}/referrers/{}", image.digest());
    for _ in 0..2 {
        let filtered = cache.get(&format!("{path}?artifactType=a%2Fsig")).await;
        assert_eq!(
            (filtered.status, filtered.header("content-type")),
            (200, Some(OCI_INDEX))
        );
        assert_eq!(filtered.header("oci-filters-applied"), Some("artifactType"));
        assert_eq!(filtered.json()["manifests"], json!([signature]));
    }
    let all = cache.get(&path).await;
    assert_eq!(
        (
            all.header("content-type"),
            all.header("oci-filters-applied")
        ),
        (Some(OCI_INDEX), None)
    );
    assert_eq!(all.json()["manifests"].as_array().map(Vec::len), Some(2));
    let filters: Vec<Option<String>> = registry
        .entries(Kind::Referrers)
        .iter()
        .map(|entry| entry.parameter("artifactType"))
        .collect();
    assert_eq!(filters, [Some("a/sig".to_owned()), None]);
    cache.check_invariants().await;
}

/// C25
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_signature_is_a_real_404_that_ends() {
    let (registry, cache) = up_as(|upstream| upstream.negative_ttl("1s")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let referrers = cache
        .get(&format!("/v2/up/{REPO}/referrers/{}", image.digest()))
        .await;
    assert_refused(&referrers, &[404]);
    let fallback = image.digest().to_string().replace(':', "-");
    let missing = cache.manifest("up", REPO, &fallback).await;
    assert_refused(&missing, &[404]);
    assert_eq!(missing.error_code(), "MANIFEST_UNKNOWN");

    let signature = Content::index(&[], OCI_INDEX);
    registry.put_manifest(REPO, Some(&fallback), &signature);
    sleep(Duration::from_millis(1100)).await;
    assert_good(&cache.manifest("up", REPO, &fallback).await, &signature);
    assert_holds(&cache, [&signature]).await;
    cache.check_invariants().await;
}

fn assert_unsupported(answer: &Response) {
    assert_refused(answer, &[405]);
    assert_eq!(
        (answer.error_code().as_str(), answer.header("allow")),
        ("UNSUPPORTED", Some("GET, HEAD"))
    );
}

/// C26
#[tokio::test(flavor = "multi_thread")]
async fn only_reading_is_supported() {
    let (registry, cache, image) = up_with_image().await;
    for path in [
        manifest_path("up", REPO, "v1"),
        blob_path("up", REPO, image.layer().digest),
        format!("/v2/up/{REPO}/blobs/uploads/"),
        "/v2/".to_owned(),
    ] {
        for method in ["PUT", "POST", "PATCH", "DELETE", "OPTIONS"] {
            assert_unsupported(&cache.send(Request::new(method, &path)).await);
            assert_unsupported(&cache.send(Request::new(method, &path).body("{}")).await);
        }
    }
    let connect = cache
        .send(Request::new("CONNECT", &registry.authority()))
        .await;
    assert!((400..500).contains(&connect.status), "{connect}");
    assert_eq!(registry.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// C28
#[tokio::test(flavor = "multi_thread")]
async fn sha512_is_verified_and_kept() {
    let (registry, cache) = up().await;
    let blob = Content::hashed(
        Algorithm::Sha512,
        testbed::image::noise(70_000, "sha512"),
        OCI_CONFIG,
    );
    let image = ImageSpec::new(REPO, "v1").build();
    let manifest = Content::hashed(Algorithm::Sha512, image.manifest.data.clone(), OCI_MANIFEST);
    registry.put_blob(REPO, &blob);
    // The registry's own idea of the digest is another algorithm's: what was asked for is what is verified and said.
    let headers = [
        ("Content-Type", OCI_MANIFEST),
        (DIGEST, &image.digest().to_string()),
    ];
    registry.script(
        (Kind::Manifest, "GET", manifest.digest),
        as_it_is(&manifest, &headers),
    );
    for _ in 0..2 {
        let answer = cache.manifest("up", REPO, manifest.digest).await;
        assert_good(&answer, &manifest);
        assert_eq!(
            answer.header(DIGEST),
            Some(manifest.digest.to_string().as_str())
        );
        assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
        assert_holds(&cache, [&blob, &manifest]).await;
    }
    assert_eq!(
        registry.requests(),
        [
            get_manifest(REPO, manifest.digest),
            get_blob(REPO, blob.digest)
        ]
    );
    cache.check_invariants().await;
}

/// C28
#[tokio::test(flavor = "multi_thread")]
async fn digests_that_cannot_be_verified_pass_through_unkept() {
    let (registry, cache) = up().await;
    let blob = Content::blob(40_000, "foreign");
    let image = ImageSpec::new(REPO, "v1").build();
    let blake = format!("blake3:{}", "0a".repeat(32));
    for digest in [blake.as_str(), "foo+bar:baz"] {
        registry.put_blob_as(REPO, digest, &blob);
        registry.put_manifest_as(REPO, digest, &image.manifest);
        for _ in 0..2 {
            let answer = cache.blob("up", REPO, digest).await;
            assert_good(&answer, &blob);
            assert!(
                said(&answer).contains("fwd=bypass; detail=unknown-algorithm"),
                "{}",
                said(&answer)
            );
            assert_eq!(answer.header(DIGEST), Some(digest));
            let head = cache.head_blob("up", REPO, digest).await;
            assert_eq!(
                (head.status, head.number("content-length")),
                (200, Some(blob.size()))
            );
            let manifest = cache.manifest("up", REPO, digest).await;
            assert_good(&manifest, &image.manifest);
            assert_eq!(manifest.header(DIGEST), Some(digest));
        }
        assert_eq!(registry.count((Kind::Blob, "GET", digest)), 2, "{digest}");
        assert_eq!(
            registry.count((Kind::Manifest, "GET", digest)),
            2,
            "{digest}"
        );
    }
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// C29
#[tokio::test(flavor = "multi_thread")]
async fn broken_digests_are_bad_requests() {
    let (registry, cache) = up().await;
    let right = Content::blob(5, "x").digest.hex();
    for digest in [
        format!("sha256:{}", right.to_ascii_uppercase()),
        format!("sha256:{}", right.chars().skip(1).collect::<String>()),
        format!("sha256:{right}0"),
        "sha256:".to_owned(),
        "sha256:baddigeststring".to_owned(),
        format!("sha512:{right}"),
        format!("SHA256:{right}"),
        ":abc".to_owned(),
    ] {
        for kind in ["manifests", "blobs", "referrers"] {
            let answer = cache.get(&format!("/v2/up/{REPO}/{kind}/{digest}")).await;
            assert_refused(&answer, &[400]);
            assert_eq!(answer.error_code(), "DIGEST_INVALID", "{kind}/{digest}");
        }
    }
    assert_eq!(registry.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// An image manifest of exactly so many bytes.
fn manifest_of(size: usize) -> Content {
    let config = Content::json(&json!({}), OCI_CONFIG);
    let body = |pad: usize| {
        let annotations: Value = json!({"pad": "x".repeat(pad)});
        json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.descriptor(), "layers": [], "annotations": annotations})
    };
    let frame = body(0).to_string().len();
    let manifest = Content::json(&body(size - frame), OCI_MANIFEST);
    assert_eq!(manifest.data.len(), size);
    manifest
}

/// C30
#[tokio::test(flavor = "multi_thread")]
async fn manifests_are_taken_up_to_four_mebibytes() {
    let (registry, cache) = up().await;
    let (largest, larger) = (manifest_of(MANIFEST_LIMIT), manifest_of(MANIFEST_LIMIT + 1));
    registry.put_manifest(REPO, Some("largest"), &largest);
    registry.put_manifest(REPO, Some("larger"), &larger);
    assert_good(&cache.manifest("up", REPO, "largest").await, &largest);
    assert_holds(&cache, [&largest]).await;
    assert_refused(&cache.manifest("up", REPO, "larger").await, &[502]);
    assert_refused(&cache.manifest("up", REPO, larger.digest).await, &[502]);
    assert_holds(&cache, [&largest]).await;
    cache.check_invariants().await;
}

/// C30
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_never_ends_is_left() {
    let (registry, cache) = up().await;
    let kind = ("Content-Type", OCI_MANIFEST);
    let flood = 1 << 30;
    registry.script(
        Matcher::manifests().of("liar"),
        faults::flood(&[kind, ("Content-Length", "1024")], flood),
    );
    registry.script(
        Matcher::manifests().of("open"),
        faults::flood(&[kind], flood),
    );
    let before = cache.anonymous_memory();
    assert_refused(&cache.manifest("up", REPO, "liar").await, &[502]);
    assert_refused(&cache.manifest("up", REPO, "open").await, &[502]);
    assert!(
        registry.sent(Kind::Manifest) < 64 << 20,
        "{} bytes were taken",
        registry.sent(Kind::Manifest)
    );
    assert!(
        cache.anonymous_memory() < before + (64 << 20),
        "memory grew from {before} to {}",
        cache.anonymous_memory()
    );
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// C33
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_ever_encoded() {
    let (registry, cache, image) = up_with_image().await;
    let eager = Handler::new(|mut exchange| async move {
        match exchange.header("accept-encoding") {
            None | Some("identity") => exchange.pass().await,
            Some(_) => {
                let headers = [("Content-Encoding", "gzip")];
                exchange
                    .reply(200, &headers, b"not what was asked for")
                    .await;
            }
        }
    });
    registry.script(Matcher::any(), eager);
    for _ in 0..2 {
        for (path, content) in [
            (manifest_path("up", REPO, "v1"), &image.manifest),
            (blob_path("up", REPO, image.layer().digest), image.layer()),
        ] {
            let answer = cache
                .send(Request::get(&path).header("Accept-Encoding", "zstd, gzip"))
                .await;
            assert_good(&answer, content);
            assert_eq!(answer.header("content-encoding"), None, "{path}");
        }
    }
    assert!(
        registry
            .log()
            .iter()
            .all(|entry| entry.header("accept-encoding") == Some("identity"))
    );
    assert_eq!(
        registry.requests(),
        [
            get_manifest(REPO, "v1"),
            get_blob(REPO, image.layer().digest)
        ]
    );
    assert_holds(&cache, [&image.manifest, image.layer()]).await;
    cache.check_invariants().await;
}

/// C33: bytes under a `Content-Encoding` that nobody asked for are not the blob.
#[tokio::test(flavor = "multi_thread")]
async fn an_encoded_answer_is_not_taken() {
    let (registry, cache, image) = up_with_image().await;
    let blob = image.layer();
    registry.script(
        Kind::Blob,
        faults::serve(blob, ServeOptions::new().header("Content-Encoding", "gzip")),
    );
    let answer = cache.blob("up", REPO, blob.digest).await;
    assert_refused(&answer, &[502, 503]);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// Whole images of both families, under their own types, over a connection that is kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_whole_image_comes_over_one_connection() {
    let (registry, cache) = up().await;
    for media_type in [OCI_MANIFEST, DOCKER_MANIFEST] {
        let multi = registry.put_multi_image(
            &ImageSpec::new(REPO, "multi")
                .layers(&[10, 0, 200_000])
                .media_type(media_type),
        );
        let mut connection = Connection::open(cache.port()).await;
        for _ in 0..2 {
            each_part(&mut connection, &multi).await;
        }
    }
    let (indexes, manifests, blobs) = (2, 4, registry.entries((Kind::Blob, "GET")));
    assert_eq!(registry.count((Kind::Manifest, "GET")), indexes + manifests);
    let mut digests: Vec<String> = blobs.iter().map(|entry| entry.reference.clone()).collect();
    let all = digests.len();
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), all, "a blob was fetched twice");
    cache.check_invariants().await;
}

async fn each_part(connection: &mut Connection, multi: &MultiImage) {
    over(
        connection,
        &manifest_path("up", REPO, multi.index.digest),
        &multi.index,
    )
    .await;
    for image in &multi.images {
        over(
            connection,
            &manifest_path("up", REPO, image.digest()),
            &image.manifest,
        )
        .await;
        for blob in image.blobs() {
            over(connection, &blob_path("up", REPO, blob.digest), blob).await;
        }
    }
}

async fn over(connection: &mut Connection, path: &str, content: &Content) {
    connection
        .send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"))
        .await;
    let answer = connection.response("GET").await;
    assert_good(&answer, content);
    let kind = if content.media_type.contains("layer") || content.media_type == OCI_CONFIG {
        "application/octet-stream"
    } else {
        content.media_type.as_str()
    };
    assert_eq!(answer.header("content-type"), Some(kind));
}
