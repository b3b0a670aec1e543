//! Every name a client may send leads to the right repository of the right upstream, or nowhere.

use oci::Digest;
use serde_json::json;
use testbed::cache::{blob_path, manifest_path};
use testbed::image::OCI_INDEX;
use testbed::{CacheProcess, ImageSpec, Kind, Registry, Request, Upstream, assert_good};

use crate::stage::{
    REPO, assert_holds, assert_holds_nothing, assert_refused, cache, get_blob, get_manifest,
    head_blob, up, up_with_image,
};

/// Docker Hub as it is built in, but for the address.
async fn hub() -> (Registry, CacheProcess) {
    let registry = Registry::start().await;
    let cache = cache()
        .upstream(Upstream::new("docker.io", registry.url()))
        .start()
        .await;
    (registry, cache)
}

/// N01
#[tokio::test(flavor = "multi_thread")]
async fn the_ping_is_answered_without_any_upstream() {
    let (registry, cache) = up().await;
    registry.stop().await;
    for path in ["/v2/", "/v2"] {
        let ping = cache.get(path).await;
        assert!(ping.is_whole(), "{path}: {ping}");
        assert_eq!(ping.header("content-type"), Some("application/json"));
        assert_eq!(
            ping.header("docker-distribution-api-version"),
            Some("registry/2.0")
        );
        assert_eq!(ping.json(), json!({}));
        let head = cache.send(Request::head(path)).await;
        assert_eq!(
            (head.status, head.number("content-length"), head.length),
            (200, Some(2), 0)
        );
    }
    assert_eq!(registry.connections(), 0);
    cache.check_invariants().await;
}

/// N02
#[tokio::test(flavor = "multi_thread")]
async fn docker_hub_has_one_identity_under_all_its_names() {
    let (registry, cache) = hub().await;
    let image = registry.put_image(&ImageSpec::new("library/alpine", "latest"));
    for (key, repo) in [
        ("docker.io", "alpine"),
        ("docker.io", "library/alpine"),
        ("index.docker.io", "library/alpine"),
        ("registry-1.docker.io", "alpine"),
        ("registry.hub.docker.com", "alpine"),
    ] {
        assert_good(&cache.manifest(key, repo, "latest").await, &image.manifest);
        assert_good(
            &cache.blob(key, repo, image.layer().digest).await,
            image.layer(),
        );
    }
    let wanted = [
        get_manifest("library/alpine", "latest"),
        get_blob("library/alpine", image.layer().digest),
    ];
    assert_eq!(registry.requests(), wanted);
    assert_holds(&cache, [&image.manifest, image.layer()]).await;
    cache.check_invariants().await;
}

/// N03
#[tokio::test(flavor = "multi_thread")]
async fn every_shape_of_a_mirror_leads_to_the_same_place() {
    let (registry, cache) = hub().await;
    let image = registry.put_image(&ImageSpec::new("library/alpine", "latest"));
    for (path, namespace) in [
        (
            "/v2/library/alpine/manifests/latest?ns=docker.io",
            Some("docker.io"),
        ),
        (
            "/docker.io/v2/library/alpine/manifests/latest?ns=docker.io",
            Some("docker.io"),
        ),
        (
            "/v2/docker.io/library/alpine/manifests/latest?ns=docker.io",
            Some("docker.io"),
        ),
        ("/docker.io/v2/library/alpine/manifests/latest", None),
        ("/v2/docker.io/library/alpine/manifests/latest", None),
        ("/v2/library/alpine/manifests/latest", None),
        ("/v2/alpine/manifests/latest", None),
    ] {
        let answer = cache.get(path).await;
        assert_good(&answer, &image.manifest);
        assert_eq!(answer.header("oci-namespace"), namespace, "{path}");
    }
    let entries = registry.log();
    assert_eq!(
        registry.requests(),
        [get_manifest("library/alpine", "latest")]
    );
    assert!(
        entries.iter().all(|entry| entry.query.is_empty()),
        "ns was sent upstream"
    );
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// N04
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_may_be_named_like_a_blob() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new("a/blobs/b", "t"));
    cache.pull("up", &image).await;
    let wanted = [
        get_manifest("a/blobs/b", "t"),
        get_blob("a/blobs/b", image.config.digest),
        get_blob("a/blobs/b", image.layer().digest),
    ];
    assert_eq!(registry.requests(), wanted);
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

/// N05
#[tokio::test(flavor = "multi_thread")]
async fn repositories_may_be_named_by_any_verb() {
    let (registry, cache) = up().await;
    let mut manifests = Vec::new();
    for (repo, tag) in [
        ("manifests", "manifests"),
        ("tags/list", "list"),
        ("blobs", "tags"),
        ("x/tags/list", "t"),
    ] {
        let image = registry.put_image(&ImageSpec::new(repo, tag));
        registry.clear_log();
        assert_good(&cache.manifest("up", repo, tag).await, &image.manifest);
        let tags = cache.get(&format!("/v2/up/{repo}/tags/list")).await;
        assert_eq!(tags.json()["tags"], json!([tag]), "{repo}");
        let seen: Vec<String> = registry
            .log()
            .iter()
            .map(|entry| entry.path.clone())
            .collect();
        assert_eq!(
            seen,
            [
                format!("/v2/{repo}/manifests/{tag}"),
                format!("/v2/{repo}/tags/list")
            ]
        );
        manifests.push(image.manifest);
    }
    assert_holds(&cache, &manifests).await;
    cache.check_invariants().await;
}

/// N06
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_may_be_named_like_referrers() {
    let (registry, cache) = up().await;
    let repo = "x/referrers/y";
    let image = registry.put_image(&ImageSpec::new(repo, "t"));
    registry.set_referrers(
        repo,
        image.digest(),
        &[json!({"artifactType": "a/b", "size": 1})],
    );
    let list = cache
        .get(&format!("/v2/up/{repo}/referrers/{}", image.digest()))
        .await;
    assert_eq!(
        (list.status, list.header("content-type")),
        (200, Some(OCI_INDEX))
    );
    assert_eq!(list.json()["manifests"][0]["artifactType"], "a/b");
    let head = cache.head_blob("up", repo, image.layer().digest).await;
    assert_eq!(
        (head.status, head.number("content-length")),
        (200, Some(image.layer().size()))
    );
    let wanted = [
        format!("GET /v2/{repo}/referrers/{}", image.digest()),
        head_blob(repo, image.layer().digest),
    ];
    assert_eq!(registry.requests(), wanted);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// N08
#[tokio::test(flavor = "multi_thread")]
async fn names_outside_of_the_grammar_lead_nowhere() {
    let (registry, cache, image) = up_with_image().await;
    let names = [
        "Foo/bar",
        "foo//bar",
        "foo/../bar",
        "foo/./bar",
        "foo/%2e%2e/bar",
        "foo%2fbar",
        "foo%2Fbar",
        "foo\\bar",
        "foo%5cbar",
        "foo/%00",
        "foo%0d%0abar",
        "foo/-bar",
        "foo/bar_",
        "foo/b%zz",
        "foo/b%",
    ];
    let long = "x/".repeat(140) + "y";
    for name in names.into_iter().chain([long.as_str()]) {
        for rest in [
            "manifests/v1",
            "tags/list",
            &format!("blobs/{}", image.layer().digest),
        ] {
            let path = format!("/v2/up/{name}/{rest}");
            assert_refused(&cache.get(&path).await, &[400, 404]);
            assert_refused(
                &cache.get(&format!("/up/v2/{name}/{rest}")).await,
                &[400, 404],
            );
        }
    }
    assert_eq!(registry.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// N09
#[tokio::test(flavor = "multi_thread")]
async fn an_escaped_colon_is_a_colon() {
    let (registry, cache, image) = up_with_image().await;
    let escaped = |digest: Digest, colon: &str| digest.to_string().replace(':', colon);
    let (manifest, layer) = (image.digest(), image.layer().digest);
    for colon in ["%3A", ":", "%3a"] {
        let answer = cache
            .get(&manifest_path("up", REPO, escaped(manifest, colon)))
            .await;
        assert_good(&answer, &image.manifest);
        assert_eq!(
            answer.header("docker-content-digest"),
            Some(manifest.to_string().as_str())
        );
        assert_good(
            &cache
                .get(&blob_path("up", REPO, escaped(layer, colon)))
                .await,
            image.layer(),
        );
    }
    assert_eq!(
        registry.requests(),
        [get_manifest(REPO, manifest), get_blob(REPO, layer)]
    );
    assert_holds(&cache, [&image.manifest, image.layer()]).await;
    cache.check_invariants().await;
}

/// N10
#[tokio::test(flavor = "multi_thread")]
async fn unknown_keys_and_namespaces_are_not_found() {
    let registry = Registry::start().await;
    registry.put_image(&ImageSpec::new("x/y", "t"));
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()))
        .no_default_upstream()
        .line("default_upstream = \"\"")
        .start()
        .await;
    for path in [
        "/v2/nosuch/x/y/manifests/t",
        "/nosuch/v2/x/y/manifests/t",
        "/v2/x/y/manifests/t?ns=nosuch",
        "/v2/x/y/manifests/t?ns=nosuch.example",
        "/v2/x/y/tags/list?ns=nosuch.example:5000",
        "/v2/x/y/manifests/t",
    ] {
        let answer = cache.get(path).await;
        assert_refused(&answer, &[404]);
        assert_eq!(answer.error_code(), "NAME_UNKNOWN", "{path}");
    }
    assert_eq!(registry.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// N10
#[tokio::test(flavor = "multi_thread")]
async fn the_key_in_the_path_beats_the_namespace() {
    let (first, second) = (Registry::start().await, Registry::start().await);
    let wanted = first.put_image(&ImageSpec::new(REPO, "v1").seed("first"));
    second.put_image(&ImageSpec::new(REPO, "v1").seed("second"));
    let cache = cache()
        .upstream(Upstream::new("first", first.url()))
        .upstream(Upstream::new("second", second.url()))
        .start()
        .await;
    for path in [
        "/v2/first/lib/app/manifests/v1?ns=second",
        "/first/v2/lib/app/manifests/v1?ns=second",
    ] {
        let answer = cache.get(path).await;
        assert_good(&answer, &wanted.manifest);
        assert_eq!(answer.header("oci-namespace"), Some("first"), "{path}");
    }
    assert_eq!(
        (first.requests(), second.connections()),
        (vec![get_manifest(REPO, "v1")], 0)
    );
    assert_holds(&cache, [&wanted.manifest]).await;
    cache.check_invariants().await;
}

/// N13
#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_never_a_name_of_the_default_upstream() {
    let (registry, cache, image) = up_with_image().await;
    let digest = image.layer().digest;
    for host in [
        "ghcr.example",
        "localhost",
        "nosuch.example",
        "nosuch.example:5000",
        "localhost:5000",
        "10.0.0.1",
    ] {
        for rest in ["manifests/v1", "tags/list", &format!("blobs/{digest}")] {
            let answer = cache.get(&format!("/v2/{host}/x/y/{rest}")).await;
            assert_refused(&answer, &[404]);
            assert_eq!(answer.error_code(), "NAME_UNKNOWN", "{host} {rest}");
        }
    }
    let near = cache.get("/v2/ghcr.oi/x/y/manifests/t").await;
    assert!(
        near.text().contains("ghcr.io"),
        "the nearest key is not named: {}",
        near.text()
    );
    assert_eq!(registry.connections(), 0);

    assert_good(
        &cache.get("/v2/lib/app/manifests/v1").await,
        &image.manifest,
    );
    assert_eq!(registry.requests(), [get_manifest(REPO, "v1")]);
    cache.check_invariants().await;
}

/// The commonest mistake with containerd's `override_path`.
#[tokio::test(flavor = "multi_thread")]
async fn a_doubled_prefix_is_explained() {
    let (registry, cache, _image) = up_with_image().await;
    for path in [
        "/v2/v2/lib/app/manifests/v1",
        "/v2/v2/up/lib/app/manifests/v1",
        "/v2/v2/",
        "/v2/v2/up/lib/app/tags/list",
    ] {
        let answer = cache.get(path).await;
        assert_refused(&answer, &[404]);
        assert!(
            answer.text().contains("override_path"),
            "{path}: {}",
            answer.text()
        );
    }
    assert_eq!(registry.connections(), 0);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_else_is_asked_is_json_and_not_found() {
    let (registry, cache, _image) = up_with_image().await;
    for path in [
        "/",
        "/favicon.ico",
        "/v1/_ping",
        "/v2/_catalog",
        "/v2/up",
        "/v2/up/lib/app",
        "/v2/up/lib/app/manifests/",
        "/v2/up/lib/app/blobs/uploads/",
        "/v2/up/lib/app/_oci/ext/discover",
        "/metrics",
    ] {
        assert_refused(&cache.get(path).await, &[400, 404]);
    }
    assert_eq!(
        (registry.connections(), registry.count(Kind::Other)),
        (0, 0)
    );
    cache.check_invariants().await;
}
