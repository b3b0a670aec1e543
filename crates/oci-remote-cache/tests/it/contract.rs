//! What the specification and its clients hold a registry to: headers, accepted types, digests, limits, methods.

use std::time::Duration;

use oci::Algorithm;
use serde_json::{Value, json};
use testbed::cache::{blob_path, manifest_path};
use testbed::image::{
    ACCEPT_ALL, DOCKER_LIST, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST,
};
use testbed::{
    Connection, Content, Ending, Gate, Handler, ImageSpec, Kind, Matcher, MultiImage, Request,
    Response, ServeOptions, assert_good, faults,
};
use tokio::time::sleep;

use crate::stage::{
    DIGEST, REPO, as_it_is, assert_holds, assert_holds_nothing, assert_refused, get_blob,
    get_manifest, head_blob, head_manifest, lasting_headers, said, up, up_as, up_with_blob,
    up_with_image, up_without_ttl,
};

/// The largest manifest that is taken.
const MANIFEST_LIMIT: usize = 4 << 20;

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
        faults::error(403, "DENIED", &[]),
        // Remembered, so it comes last.
        faults::error(405, "UNSUPPORTED", &[]),
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

/// Who wants a tag in another form causes requests, but a crowd no more than one at a time.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_with_the_same_narrow_accept_shares_one_request() {
    let (registry, cache, image) = up_with_image().await;
    let docker = ImageSpec::new(REPO, "v1")
        .media_type(DOCKER_MANIFEST)
        .build();
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let gate = Gate::new();
    let (door, manifest) = (gate.clone(), docker.manifest.clone());
    registry.script(
        Kind::Manifest,
        Handler::new(move |mut exchange| {
            let (door, manifest) = (door.clone(), manifest.clone());
            async move {
                door.opened().await;
                let headers = [("Content-Type", DOCKER_MANIFEST)];
                exchange.reply(200, &headers, &manifest.data).await;
            }
        }),
    );
    let path = manifest_path("up", REPO, "v1");
    let narrow = || cache.send(Request::get(&path).header("Accept", DOCKER_MANIFEST));
    let crowd = futures_util::future::join_all((0..20).map(|_| narrow()));
    let open = async {
        sleep(Duration::from_millis(500)).await;
        gate.open();
    };
    let (answers, ()) = tokio::join!(crowd, open);
    for answer in &answers {
        assert_good(answer, &docker.manifest);
    }
    assert_eq!(registry.count(Kind::Manifest), 2);
}

/// An upstream's HEAD may tell another length, or type, than its GET sends.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_tells_what_the_held_manifest_is() {
    let (registry, cache, image) = up_with_image().await;
    let headers = [
        ("Content-Type", OCI_INDEX),
        ("Content-Length", "77"),
        (DIGEST, &image.manifest.digest.to_string()),
    ];
    let lie = faults::declared(&headers, "", Ending::Close);
    registry.script(Matcher::manifests().method("HEAD"), lie);
    cache.head_manifest("up", REPO, "v1").await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let head = cache.head_manifest("up", REPO, "v1").await;
    let size = image.manifest.size().to_string();
    assert_eq!(head.header("content-length"), Some(size.as_str()));
    assert_eq!(head.header("content-type"), Some(OCI_MANIFEST));
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

/// What a 404 is called is the upstream's to say, in the specification's words: oras tells by it a missing repository from a registry
/// without referrers. Anything else is called what it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_404_keeps_the_upstreams_code() {
    let (registry, cache) = up().await;
    let digest = Content::blob(1, "nowhere").digest;
    let manifest = "MANIFEST_UNKNOWN";
    for (path, name, usual, unsupported) in [
        ("manifests/t".to_owned(), "manifest", manifest, manifest),
        (
            format!("blobs/{digest}"),
            "blob",
            "BLOB_UNKNOWN",
            "BLOB_UNKNOWN",
        ),
        (
            "tags/list".to_owned(),
            "tags",
            "NAME_UNKNOWN",
            "UNSUPPORTED",
        ),
        (
            format!("referrers/{digest}"),
            "referrers",
            manifest,
            "UNSUPPORTED",
        ),
    ] {
        let codes = [
            ("NAME_UNKNOWN", "NAME_UNKNOWN"),
            ("UNSUPPORTED", unsupported),
            ("UNKNOWN", usual),
            ("TOOMANYREQUESTS", usual),
        ];
        for (said, told) in codes {
            registry.clear_scripts();
            registry.script(Matcher::any(), faults::error(404, said, &[]));
            let repo = format!("{name}/{}", said.to_ascii_lowercase());
            // The second answer is remembered.
            let ask = || cache.send(Request::get(&format!("/v2/up/{repo}/{path}")));
            let (first, second) = (ask().await, ask().await);
            assert_refused(&second, &[404]);
            let codes = [first.error_code(), second.error_code()];
            assert_eq!(codes, [told, told], "{name} {said}");
        }
    }
    cache.check_invariants().await;
}
