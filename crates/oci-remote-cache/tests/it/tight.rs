//! Nothing fetched with a credential reaches who could not fetch it, and no request decides where the cache connects.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use testbed::cache::{blob_path, manifest_path};
use testbed::token::{TOKEN_MARK, challenge};
use testbed::{
    Auth, Bearer, CacheProcess, Content, Exchange, Gate, Image, ImageSpec, Kind, Matcher, Origin,
    Registry, Request, Response, ServeOptions, TokenServer, Upstream, assert_good, faults,
};
use tokio::time::sleep;

use crate::stage::{
    REPO, assert_holds, assert_holds_nothing, assert_refused, cache, get_blob, get_manifest,
    raw_exchange, up, up_with_blob, up_with_image, up_without_ttl,
};

const USER: &str = "robot";
const PASSWORD: &str = "correct-horse-battery";

/// How long a refusal of a whole repository may be shared, and a little more.
const AFTER_A_REFUSAL: Duration = Duration::from_millis(1100);

fn everything_below(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(everything_below(&entry.path()));
        }
        found.insert(entry.path());
    }
    found
}

/// X01
#[tokio::test(flavor = "multi_thread")]
async fn no_path_leads_out_of_the_cache() {
    let (registry, cache, _image) = up_with_image().await;
    let before = everything_below(cache.home());
    let hex = "0".repeat(61);
    for path in [
        "/v2/up/%2e%2e%2f%2e%2e%2fetc/manifests/passwd".to_owned(),
        "/v2/up/../../etc/manifests/passwd".to_owned(),
        "/v2/up/x/manifests/../../../etc/passwd".to_owned(),
        "/v2/up/x/manifests/..".to_owned(),
        "/v2/up/x/manifests/%2e%2e%2fetc".to_owned(),
        "/v2/up/x/blobs/sha256:..%2f..%2fetc".to_owned(),
        "/v2/up/x/blobs/sha256:../../x".to_owned(),
        format!("/v2/up/x/blobs/sha256:..%2f{hex}"),
        format!("/v2/up/x/blobs/sha256:../{hex}"),
        format!("/v2/up/x/blobs/sha256%3a%2e%2e%2f{hex}"),
        format!("/v2/up/x/blobs/..:{hex}"),
        format!("/v2/up/x/blobs/sha256\\..\\:{hex}"),
        "/../../etc/passwd".to_owned(),
        "/v2/../healthz/../../x".to_owned(),
        "//v2//up//x//manifests//t".to_owned(),
    ] {
        assert_refused(&cache.get(&path).await, &[400, 404]);
    }
    for raw in [
        &b"GET /v2/up/x/blobs/sha256:\xff\xfe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"[..],
        &b"GET /v2/up/x/manifests/a\x00b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"[..],
        &b"GET /v2/up/x\t/manifests/t HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"[..],
    ] {
        let answer = raw_exchange(&cache, raw).await;
        assert!(
            answer.starts_with("HTTP/1.1 400 ") || answer.starts_with("HTTP/1.1 404 "),
            "{answer}"
        );
    }
    assert_eq!(registry.connections(), 0);
    assert_eq!(
        everything_below(cache.home()),
        before,
        "a file came or went"
    );
    cache.check_invariants().await;
}

/// X02
#[tokio::test(flavor = "multi_thread")]
async fn no_name_is_a_place_to_connect_to() {
    let (registry, cache, _image) = up_with_image().await;
    let listener = Registry::start().await;
    let port = listener.port();
    for host in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0x7f.1",
        "2130706433.",
        "169.254.169.254",
        "metadata.google.internal",
        "host.docker.internal",
    ] {
        let names = [
            host.to_owned(),
            format!("{host}:{port}"),
            format!("{host}:22"),
        ];
        let paths = names.iter().flat_map(|name| {
            [
                format!("/v2/{name}/x/y/manifests/t"),
                format!("/{name}/v2/x/y/manifests/t"),
                format!("/v2/x/y/manifests/t?ns={name}"),
                format!("/v2/x/y/tags/list?ns=http://{name}"),
            ]
        });
        for path in paths {
            assert_refused(&cache.get(&path).await, &[400, 404]);
        }
    }
    let absolute = Request::get(&format!("{}/v2/x/y/manifests/t", listener.url()));
    let answer = cache.send(absolute).await;
    assert!((400..500).contains(&answer.status), "{answer}");
    assert_eq!((listener.connections(), registry.connections()), (0, 0));
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// Spellings of this machine that no registry has a reason to send, and places that are never a registry's.
fn disguises(port: u16) -> Vec<String> {
    [
        "0.0.0.0",
        "0x7f.1",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "127.1",
        "0177.0.0.1",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[::]",
        "169.254.169.254",
        "[fe80::1]",
        "224.0.0.1",
        "255.255.255.255",
    ]
    .map(|host| format!("{host}:{port}"))
    .into()
}

/// X03
#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_in_disguise_is_not_followed() {
    let (registry, cache) = up().await;
    let listener = Origin::start().await;
    for (n, place) in disguises(listener.port()).into_iter().enumerate() {
        let blob = Content::blob(1000, &n.to_string());
        listener.hold(&blob);
        let location = format!("http://{place}/cdn/{}?sig=1", blob.digest);
        registry.script(
            Matcher::blobs().of(blob.digest),
            faults::redirect(&location, 307),
        );
        assert_refused(&cache.blob("up", REPO, blob.digest).await, &[502]);
        let head = cache.head_blob("up", REPO, blob.digest).await;
        assert_eq!((head.status, head.length), (502, 0), "{place}");
    }
    assert_eq!(listener.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// X03
#[tokio::test(flavor = "multi_thread")]
async fn a_token_service_in_disguise_is_not_asked() {
    let listener = TokenServer::start().await;
    let (mut registries, mut builder) = (Vec::new(), cache());
    let places = disguises(listener.port());
    for (n, place) in places.iter().enumerate() {
        let registry = Registry::start().await;
        registry.put_image(&ImageSpec::new(REPO, "v1"));
        registry.require(Bearer::of(&listener).realm(&format!("http://{place}/token")));
        builder = builder
            .upstream(Upstream::new(&format!("up{n}"), registry.url()).credentials(USER, PASSWORD));
        registries.push(registry);
    }
    let cache = builder.start().await;
    for n in 0..places.len() {
        let answer = cache.manifest(&format!("up{n}"), REPO, "v1").await;
        assert_refused(&answer, &[403, 404, 502, 503]);
    }
    assert_eq!(listener.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// X03: the cache itself, on either listener.
#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_the_cache_itself_is_not_followed() {
    let (registry, cache, blob) = up_with_blob(1000).await;
    for port in [cache.port(), cache.admin_port()] {
        for host in ["127.0.0.1", "localhost"] {
            registry.clear_scripts();
            registry.script(
                Kind::Blob,
                faults::redirect(&format!("http://{host}:{port}/metrics"), 307),
            );
            assert_refused(&cache.blob("up", REPO, blob.digest).await, &[502]);
            sleep(crate::stage::AFTER_A_FAILURE).await;
        }
    }
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// Guards what belongs to one user and shows everybody the rest.
#[derive(Debug)]
struct Private(Bearer);

impl Auth for Private {
    fn refuse(&self, exchange: &Exchange) -> Option<Vec<String>> {
        if exchange.entry().repo.starts_with("private/") {
            self.0.refuse(exchange)
        } else {
            None
        }
    }
}

/// X04
#[tokio::test(flavor = "multi_thread")]
async fn a_private_blob_is_read_only_where_it_belongs() {
    let (registry, evil) = (Registry::start().await, Registry::start().await);
    let tokens = TokenServer::at(&registry);
    tokens.add_user(USER, PASSWORD);
    registry.require(Private(Bearer::of(&tokens).identity(USER)));
    let image = registry.put_image(&ImageSpec::new("private/app", "v1"));
    registry.put_image(&ImageSpec::new("public/app", "v1"));
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()).credentials(USER, PASSWORD))
        .upstream(Upstream::new("evil", evil.url()))
        .start()
        .await;
    cache.pull("up", &image).await;
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;

    // The hostile upstream says that it holds everything, and has nothing.
    let lies = [
        ("Docker-Content-Digest", "sha256:00"),
        ("Content-Length", "5000"),
    ];
    for method in [(Kind::Blob, "HEAD"), (Kind::Manifest, "HEAD")] {
        evil.script(method, faults::status(200, &lies, ""));
    }
    for (key, repo) in [
        ("up", "public/app"),
        ("up", "unknown/app"),
        ("evil", "private/app"),
        ("evil", "public/app"),
        ("up", "private/other"),
    ] {
        never_shown(&cache, (key, repo), &image).await;
    }
    let given = registry.entries((Kind::Blob, "GET", image.layer().digest));
    assert_eq!(given.iter().filter(|entry| entry.status == 200).count(), 1);
    cache.check_invariants().await;
}

/// Asks for each part of an image in a repository that does not hold it, in every way there is.
async fn never_shown(cache: &CacheProcess, (key, repo): (&str, &str), image: &Image) {
    for (path, content) in [
        (blob_path(key, repo, image.layer().digest), image.layer()),
        (manifest_path(key, repo, image.digest()), &image.manifest),
    ] {
        let tag = format!("\"{}\"", content.digest);
        for request in [
            Request::get(&path),
            Request::get(&path).range("0-9"),
            Request::get(&path).range("0-9,20-29"),
            Request::get(&path).range("0-9").header("If-Range", &tag),
        ] {
            let answer = cache.send(request).await;
            assert!(matches!(answer.status, 403 | 404 | 502), "{path}: {answer}");
            assert!(
                !answer
                    .body
                    .windows(10)
                    .any(|part| part == &content.data[..10]),
                "{path}: bytes were shown"
            );
        }
    }
}

/// X04: a fill in flight proves no more than a stored file.
#[tokio::test(flavor = "multi_thread")]
async fn a_private_blob_in_flight_is_read_only_where_it_belongs() {
    let (registry, evil) = (Registry::start().await, Registry::start().await);
    let tokens = TokenServer::at(&registry);
    tokens.add_user(USER, PASSWORD);
    registry.require(Private(Bearer::of(&tokens).identity(USER)));
    let blob = Content::blob(400_000, "private");
    registry.put_blob("private/app", &blob);
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()).credentials(USER, PASSWORD))
        .upstream(Upstream::new("evil", evil.url()))
        .start()
        .await;
    let gate = Gate::new();
    registry.script(
        Matcher::blobs()
            .repo("private/app")
            .method("GET")
            .of(blob.digest)
            .query("held"),
        faults::serve(&blob, ServeOptions::new().pause(200_000, &gate)),
    );
    // The redirect comes after the token was checked, so that the gate stands behind the authorization.
    let held = faults::redirect(&format!("/v2/private/app/blobs/{}?held", blob.digest), 307);
    assert_eq!(
        cache
            .head_blob("up", "private/app", blob.digest)
            .await
            .status,
        200
    );
    registry.script(
        Matcher::blobs().repo("private/app").method("GET").query(""),
        held,
    );
    let leader = Request::get(&blob_path("up", "private/app", blob.digest))
        .compare(&blob.data)
        .start(cache.port());
    gate.reached().await;
    let lies = [
        ("Docker-Content-Digest", "sha256:00"),
        ("Content-Length", "400000"),
    ];
    evil.script((Kind::Blob, "HEAD"), faults::status(200, &lies, ""));
    for (key, repo) in [("up", "public/app"), ("evil", "private/app")] {
        for request in [
            Request::get(&blob_path(key, repo, blob.digest)),
            Request::get(&blob_path(key, repo, blob.digest)).range("0-9"),
        ] {
            let answer = cache.send(request).await;
            assert!(
                matches!(answer.status, 403 | 404 | 502),
                "{key}/{repo}: {answer}"
            );
        }
    }
    gate.open();
    assert!(leader.response().await.is_right());
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// What was fetched anonymously is public within its upstream, once the upstream vouches for it.
#[tokio::test(flavor = "multi_thread")]
async fn public_bytes_are_linked_by_one_head() {
    let (registry, cache, blob) = up_with_blob(100_000).await;
    registry.put_blob("lib/twin", &blob);
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    cache.wait_until_stored(&blob.digest).await;
    for _ in 0..2 {
        assert_good(&cache.blob("up", "lib/twin", blob.digest).await, &blob);
    }
    assert_refused(&cache.blob("up", "lib/stranger", blob.digest).await, &[404]);
    assert_eq!(
        registry.count((Kind::Blob, "GET")),
        1,
        "{:?}",
        registry.requests()
    );
    assert_eq!(registry.count(Matcher::blobs().repo("lib/twin")), 1);
    cache.check_invariants().await;
}

/// From now on everything of the repository is refused with this status.
fn revoke(registry: &Registry, status: u16) {
    registry.script(Matcher::any(), faults::error(status, "DENIED", &[]));
}

/// F20
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_tag_is_never_stale() {
    for status in [401, 403] {
        let (registry, cache) = up_without_ttl().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        cache.pull("up", &image).await;
        revoke(&registry, status);
        assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
        suspended(&cache, &image).await;
        registry.stop().await;
        let layers = image.blobs().map(|blob| blob_path("up", REPO, blob.digest));
        let manifests = ["v1".to_owned(), image.digest().to_string()];
        let manifests = manifests.map(|reference| manifest_path("up", REPO, reference));
        for path in layers.chain(manifests) {
            let down = cache.get(&path).await;
            assert!(
                down.status >= 400,
                "{path} was served while the upstream is down: {down}"
            );
        }
        assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
        cache.check_invariants().await;
    }
}

/// X06
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_repository_is_suspended_with_all_it_holds() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let other = registry.put_image(&ImageSpec::new("lib/other", "v1"));
    cache.pull("up", &image).await;
    cache.pull("up", &other).await;
    registry.script(Matcher::any().repo(REPO), faults::error(403, "DENIED", &[]));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
    suspended(&cache, &image).await;
    cache.restart().await;
    suspended(&cache, &image).await;
    cache.pull("up", &other).await;
    // Nothing is deleted.
    let parts = [&image, &other]
        .into_iter()
        .flat_map(|image| image.blobs().chain([&image.manifest]));
    assert_holds(&cache, parts).await;
    cache.check_invariants().await;
}

async fn suspended(cache: &CacheProcess, image: &Image) {
    let answers = [
        cache.manifest("up", REPO, "v1").await,
        cache.manifest("up", REPO, image.digest()).await,
        cache.blob("up", REPO, image.layer().digest).await,
        cache.blob("up", REPO, image.config.digest).await,
        cache
            .send(Request::get(&blob_path("up", REPO, image.layer().digest)).range("0-9"))
            .await,
    ];
    for answer in &answers {
        assert_refused(answer, &[403, 404]);
    }
    let head = cache.head_blob("up", REPO, image.layer().digest).await;
    assert!(matches!(head.status, 403 | 404), "{head}");
    let tag = format!("\"{}\"", image.layer().digest);
    let request =
        Request::get(&blob_path("up", REPO, image.layer().digest)).header("If-None-Match", &tag);
    let condition = cache.send(request).await;
    assert!(matches!(condition.status, 403 | 404), "{condition}");
}

/// F32
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_is_opened_again_needs_no_new_bytes() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    assert_eq!(registry.requests().len(), 3);
    registry.clear_log();
    revoke(&registry, 403);
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
    assert_refused(
        &cache.blob("up", REPO, image.layer().digest).await,
        &[403, 404],
    );
    assert_refused(
        &cache.manifest("up", REPO, image.digest()).await,
        &[403, 404],
    );
    registry.clear_scripts();
    sleep(AFTER_A_REFUSAL).await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    assert_good(
        &cache.manifest("up", REPO, image.digest()).await,
        &image.manifest,
    );
    let gets: Vec<u16> = registry
        .entries((Kind::Blob, "GET"))
        .iter()
        .map(|entry| entry.status)
        .collect();
    assert!(
        gets.iter().all(|status| *status == 403),
        "a blob was fetched again: {:?}",
        registry.requests()
    );
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

/// F32: a layer that is asked for first, without its tag.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_alone_opens_its_repository_again() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    revoke(&registry, 403);
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
    registry.clear_scripts();
    registry.clear_log();
    sleep(AFTER_A_REFUSAL).await;
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    assert_good(
        &cache.blob("up", REPO, image.config.digest).await,
        &image.config,
    );
    assert_eq!(
        registry.count((Kind::Blob, "GET")),
        0,
        "{:?}",
        registry.requests()
    );
    assert!(registry.requests().len() <= 1, "{:?}", registry.requests());
    cache.check_invariants().await;
}

/// X09
#[tokio::test(flavor = "multi_thread")]
async fn one_path_under_two_upstreams_is_two_things() {
    let (first, second) = (Registry::start().await, Registry::start().await);
    let one = first.put_image(&ImageSpec::new(REPO, "v1").seed("one"));
    let two = second.put_image(&ImageSpec::new(REPO, "v1").seed("two"));
    let cache = cache()
        .upstream(Upstream::new("one", first.url()))
        .upstream(Upstream::new("two", second.url()))
        .start()
        .await;
    for (key, image) in [("one", &one), ("two", &two), ("one", &one), ("two", &two)] {
        for host in ["one", "two", "registry-1.docker.io", "127.0.0.1:1"] {
            let request = Request::get(&manifest_path(key, REPO, "v1")).header("Host", host);
            assert_good(&cache.send(request).await, &image.manifest);
        }
        assert_good(
            &cache.blob(key, REPO, image.layer().digest).await,
            image.layer(),
        );
    }
    assert_refused(&cache.blob("one", REPO, two.layer().digest).await, &[404]);
    assert_refused(&cache.manifest("two", REPO, one.digest()).await, &[404]);
    for (registry, image) in [(&first, &one), (&second, &two)] {
        let asked = registry.requests();
        assert_eq!(
            asked[..2],
            [
                get_manifest(REPO, "v1"),
                get_blob(REPO, image.layer().digest)
            ]
        );
        assert_eq!(registry.count(Matcher::manifests().of("v1")), 1);
    }
    assert_holds(
        &cache,
        [&one.manifest, one.layer(), &two.manifest, two.layer()],
    )
    .await;
    cache.check_invariants().await;
}

/// The same bytes of two upstreams are two rights, and one file.
#[tokio::test(flavor = "multi_thread")]
async fn each_upstream_delivers_for_itself() {
    let (first, second) = (Registry::start().await, Registry::start().await);
    let blob = Content::blob(100_000, "shared");
    let cache = cache()
        .upstream(Upstream::new("one", first.url()))
        .upstream(Upstream::new("two", second.url()))
        .start()
        .await;
    for (key, registry) in [("one", &first), ("two", &second)] {
        registry.put_blob(REPO, &blob);
        for _ in 0..2 {
            assert_good(&cache.blob(key, REPO, blob.digest).await, &blob);
        }
        assert_eq!(registry.requests(), [get_blob(REPO, blob.digest)], "{key}");
    }
    assert_holds(&cache, [&blob]).await;
    cache.check_invariants().await;
}

/// What must not be in any log, metric, error or header: the last is a password as an `Authorization` holds it.
const SECRETS: [&str; 7] = [
    PASSWORD,
    TOKEN_MARK,
    "signed-query-secret",
    "client-bearer-secret",
    "client-cookie-secret",
    "userinfo-secret",
    "cm9ib3Q6Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5",
];

/// Asks for this as a client does that shows secrets of its own.
async fn ask(cache: &CacheProcess, path: &str) -> Response {
    let request = Request::get(path)
        .header("Authorization", "Bearer client-bearer-secret")
        .header("Cookie", "session=client-cookie-secret");
    cache.send(request).await
}

/// Meets every secret there is, in good answers and in errors.
async fn meet_secrets(
    cache: &CacheProcess,
    registry: &Registry,
    tokens: &TokenServer,
) -> Vec<Response> {
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[10_000, 20_000]));
    let origin = Origin::start().await;
    origin.hold(image.layer());
    let (tag, good, bad) = (
        manifest_path("up", REPO, "v1"),
        blob_path("up", REPO, image.layer().digest),
        blob_path("up", REPO, image.layers[1].digest),
    );
    let signed = origin.location(image.layer().digest, "X-Amz-Signature=signed-query-secret");
    registry.script(
        Matcher::blobs().of(image.layer().digest),
        faults::redirect(&signed, 307),
    );
    let userinfo = format!(
        "http://user:userinfo-secret@{}/x?sig=signed-query-secret",
        origin.authority()
    );
    registry.script(
        Matcher::blobs().of(image.layers[1].digest),
        faults::redirect(&userinfo, 307),
    );
    let mut shown = vec![
        ask(cache, &tag).await,
        ask(cache, &good).await,
        ask(cache, &bad).await,
    ];
    let statuses: Vec<u16> = shown.iter().map(|response| response.status).collect();
    assert_eq!(statuses, [200, 200, 502]);
    tokens.revoke_all();
    shown.push(ask(cache, &tag).await);
    registry.script(Kind::Token, faults::error(401, "UNAUTHORIZED", &[]));
    tokens.revoke_all();
    shown.push(ask(cache, &tag).await);
    shown.push(ask(cache, "/v2/up/lib/app/tags/list?secret=signed-query-secret").await);
    registry.stop().await;
    shown.push(ask(cache, &manifest_path("up", REPO, "v9")).await);
    shown
}

/// X12
#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_ever_shown() {
    let registry = Registry::start().await;
    let tokens = TokenServer::at(&registry);
    tokens.add_user(USER, PASSWORD);
    registry.require(Bearer::of(&tokens).identity(USER));
    let upstream = Upstream::new("up", registry.url())
        .credentials(USER, PASSWORD)
        .tag_ttl("0s");
    let cache = cache().upstream(upstream).trace().start().await;
    let mut seen = String::new();
    for response in meet_secrets(&cache, &registry, &tokens).await {
        for (name, value) in &response.headers {
            seen.extend([name, ": ", value, "\n"]);
        }
        if response.status != 200 {
            seen.push_str(&response.text());
        }
    }
    seen.push_str(&cache.metrics().await);
    // The log is whole when the process has ended.
    cache.terminate().await;
    let log = cache.log();
    assert!(
        log.contains(&format!("/v2/{REPO}/manifests/v1")),
        "the log shows what was asked"
    );
    for secret in SECRETS {
        assert!(!seen.contains(secret), "{secret} was shown");
        let line = log.lines().find(|line| line.contains(secret));
        assert!(line.is_none(), "{secret} is in the log: {line:?}");
    }
    cache.check_invariants().await;
}

/// The catalog and the configuration's output keep no secret either.
#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_kept_on_disk() {
    let registry = Registry::start().await;
    let tokens = TokenServer::at(&registry);
    tokens.add_user(USER, PASSWORD);
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.require(Bearer::of(&tokens).identity(USER).form(challenge));
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()).credentials(USER, PASSWORD))
        .start()
        .await;
    cache.pull("up", &image).await;
    cache.terminate().await;
    for path in everything_below(&cache.cache_dir())
        .into_iter()
        .filter(|path| path.is_file())
    {
        let data = std::fs::read(&path).expect("read a file of the cache");
        for secret in [PASSWORD, TOKEN_MARK] {
            let found = data
                .windows(secret.len())
                .any(|part| part == secret.as_bytes());
            assert!(!found, "{secret} is in {}", path.display());
        }
    }
    assert_eq!(tokens.dead_tokens_seen(), 0);
}

/// Files are for nobody else to read.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn files_are_ours_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let (_registry, cache, image) = up_with_image().await;
    cache.pull("up", &image).await;
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    for path in everything_below(&cache.cache_dir()) {
        let mode = std::fs::symlink_metadata(&path)
            .expect("look at a file")
            .permissions()
            .mode()
            & 0o777;
        let wanted = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode & !wanted, 0, "{} is {mode:o}", path.display());
    }
    cache.check_invariants().await;
}
