//! Conditions and ranges: what a client asks for beside the thing itself.

use oci::Digest;
use testbed::cache::{blob_path, manifest_path};
use testbed::{CacheProcess, Content, ImageSpec, Kind, Request, Response, assert_good};

use crate::stage::{
    DIGEST, REPO, assert_holds, get_blob, up, up_with_blob, up_with_image, up_without_ttl,
};

async fn ranged(cache: &CacheProcess, blob: &Content, range: &str) -> Response {
    cache
        .send(Request::get(&blob_path("up", REPO, blob.digest)).range(range))
        .await
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
