//! How old an answer may be, who may be refused, and how little is asked: rules, deletions, the switch, refusals and the rate limit.

use std::time::Duration;

use oci::OCI_MANIFEST;
use oci_remote_cache::app::App;
use oci_remote_cache::clock::Clock;
use oci_remote_cache::config::{Config, Sources};
use serde_json::{Value, json};
use testbed::cache::{blob_path, manifest_path};
use testbed::client::get;
use testbed::{
    Basic, Bearer, CacheProcess, Gate, Handler, Image, ImageSpec, Kind, Matcher, Registry, Request,
    Response, TokenServer, Upstream, assert_good, eventually, faults,
};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::stage::{
    REPO, as_it_is, assert_refused, cache, get_blob, get_manifest, head_blob, head_manifest, said,
    up, up_as, up_without_ttl,
};

/// How long a refusal is shared, and a little more.
const AFTER_A_REFUSAL: Duration = Duration::from_millis(1200);

fn assert_stale(response: &Response, image: &Image, why: &str) {
    assert_good(response, &image.manifest);
    assert_eq!(
        said(response),
        format!("oci-remote-cache; fwd=stale; detail={why}")
    );
}

fn warning(response: &Response) -> &str {
    response.header("warning").unwrap_or_default()
}

/// A tag of one image moves to another.
fn moved(registry: &Registry, tag: &str) -> Image {
    registry.put_image(&ImageSpec::new(REPO, tag).seed("moved"))
}

async fn admin(cache: &CacheProcess, method: &str, path: &str) -> Response {
    Request::new(method, path).send(cache.admin_port()).await
}

async fn readyz(cache: &CacheProcess) -> (u16, Value) {
    let answer = get(cache.admin_port(), "/readyz", &[]).await;
    (answer.status, answer.json())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_rule_that_fits_a_tag_decides() {
    let rules = r#"tags = [{ pattern = 'v\d+.\d+.\d+', immutable = true }, { pattern = "v*", ttl = "1h" }]"#;
    let (registry, cache) = up_as(|upstream| upstream.tag_ttl("0s").line(rules)).await;
    for tag in ["v1.2.3", "v1", "latest"] {
        let old = registry.put_image(&ImageSpec::new(REPO, tag));
        assert_good(&cache.manifest("up", REPO, tag).await, &old.manifest);
        registry.clear_log();
        let new = moved(&registry, tag);
        let answer = cache.manifest("up", REPO, tag).await;
        if tag == "latest" {
            assert_good(&answer, &new.manifest);
            assert_eq!(
                registry.requests(),
                [head_manifest(REPO, tag), get_manifest(REPO, new.digest())]
            );
        } else {
            assert_good(&answer, &old.manifest);
            assert_eq!(
                (said(&answer), registry.requests().len()),
                ("oci-remote-cache; hit", 0)
            );
        }
    }
    cache.check_invariants().await;
}

/// Within the window nobody waits for the upstream, and the answer after is new.
#[tokio::test(flavor = "multi_thread")]
async fn a_tag_is_asked_about_behind_the_clients_back() {
    let window = |upstream: Upstream| {
        upstream
            .tag_ttl("0s")
            .line("stale_while_revalidate = \"1h\"")
    };
    let (registry, cache) = up_as(window).await;
    let old = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &old.manifest);
    let new = moved(&registry, "v1");
    let gate = Gate::new();
    registry.script((Kind::Manifest, "HEAD"), faults::held(&gate));
    registry.clear_log();
    for _ in 0..3 {
        let answer = cache.manifest("up", REPO, "v1").await;
        assert_stale(&answer, &old, "revalidating");
        assert_eq!(answer.header("warning"), None, "nothing is amiss");
    }
    gate.reached().await;
    assert_eq!(registry.requests(), [head_manifest(REPO, "v1")]);
    gate.open();
    let came = eventually(Duration::from_secs(5), || {
        registry.count((Kind::Manifest, "GET")) == 1
    })
    .await;
    assert!(came, "{:?}", registry.requests());
    sleep(Duration::from_millis(200)).await;
    assert_stale(
        &cache.manifest("up", REPO, "v1").await,
        &new,
        "revalidating",
    );
    cache.check_invariants().await;
}

/// All that an answer warns of.
fn warnings(response: &Response) -> Vec<&str> {
    let lines = response.headers.iter();
    lines
        .filter(|(name, _)| name.eq_ignore_ascii_case("warning"))
        .map(|(_, value)| value.as_str())
        .collect()
}

/// podman shows people what a registry warns of. It is told with hits too, and with a list; other forms than the specification's are not.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_upstream_warns_of_reaches_everyone() {
    const SAID: &str = "299 - \"moved to \\\"new.example\\\"\"";
    let (registry, cache) = up_as(|upstream| upstream.tag_ttl("1s")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let body = image.manifest.data.clone();
    let warns = [
        ("Content-Type", image.manifest.media_type.as_str()),
        (
            "Warning",
            "110 - \"stale\", 299 evil.example \"click here\"",
        ),
        ("Warning", SAID),
    ];
    registry.script((Kind::Manifest, "GET"), faults::status(200, &warns, body));
    let get = manifest_path("up", REPO, "v1");
    for _ in 0..2 {
        for request in [Request::get(&get), Request::head(&get)] {
            let answer = cache.send(request).await;
            assert_eq!(warnings(&answer), [SAID], "{answer}");
        }
    }
    // A HEAD that says less takes nothing back; beside it stands what is our own to say.
    sleep(Duration::from_millis(1100)).await;
    assert_eq!(warnings(&cache.get(&get).await), [SAID]);
    registry.script(Matcher::any(), faults::error(503, "UNAVAILABLE", &[]));
    sleep(Duration::from_millis(1100)).await;
    let stale = cache.get(&get).await;
    let told = warnings(&stale);
    assert!(
        told.len() == 2 && told[0] == SAID && told[1].contains("served from cache"),
        "{told:?}"
    );
    registry.clear_scripts();
    let warns = [("Content-Type", "application/json"), ("Warning", SAID)];
    let list = format!("{{\"name\":\"{REPO}\",\"tags\":[\"v1\"]}}");
    registry.script(Kind::Tags, faults::status(200, &warns, list));
    sleep(Duration::from_millis(1500)).await;
    for _ in 0..2 {
        let list = cache.get(&format!("/v2/up/{REPO}/tags/list")).await;
        assert_eq!((list.status, warnings(&list)), (200, vec![SAID]), "{list}");
    }
    cache.check_invariants().await;
}

/// F19 with `on_deleted = "serve"`.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_tag_may_be_served_on() {
    let serve = |upstream: Upstream| upstream.tag_ttl("1s").line("on_deleted = \"serve\"");
    let (registry, cache) = up_as(serve).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    registry.remove_manifest(REPO, "v1");
    registry.remove_manifest(REPO, image.digest());
    sleep(Duration::from_millis(1100)).await;
    registry.clear_log();
    for _ in 0..3 {
        let answer = cache.manifest("up", REPO, "v1").await;
        assert_stale(&answer, &image, "deleted");
        assert!(
            warning(&answer).contains("has deleted this tag"),
            "{}",
            warning(&answer)
        );
    }
    assert_eq!(
        registry.requests(),
        [head_manifest(REPO, "v1")],
        "asked once for each lifetime"
    );
    registry.stop().await;
    sleep(Duration::from_millis(1100)).await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    registry.resume().await;
    let back = moved(&registry, "v1");
    sleep(Duration::from_millis(2200)).await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &back.manifest);
    // What was never held is gone, whatever the option says.
    assert_refused(&cache.manifest("up", REPO, "v2").await, &[404]);
    cache.check_invariants().await;
}

async fn assert_offline(registry: &Registry, cache: &CacheProcess, image: &Image) {
    registry.clear_log();
    let stale = cache.manifest("up", REPO, "v1").await;
    assert_stale(&stale, image, "offline");
    assert!(
        warning(&stale).contains("switched off"),
        "{}",
        warning(&stale)
    );
    assert_good(
        &cache.manifest("up", REPO, image.digest()).await,
        &image.manifest,
    );
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    let tags = cache.get("/v2/up/lib/app/tags/list").await;
    assert_eq!(
        (tags.status, tags.json()["tags"].clone()),
        (200, json!(["v1"]))
    );
    let unheld = ImageSpec::new(REPO, "v2").seed("unheld").build();
    for path in [
        manifest_path("up", REPO, "v2"),
        manifest_path("up", REPO, unheld.digest()),
        blob_path("up", REPO, unheld.layer().digest),
        "/v2/up/other/tags/list".to_owned(),
    ] {
        let refused = cache.get(&path).await;
        assert_refused(&refused, &[503]);
        assert!(
            refused.text().contains("switched off"),
            "{path}: {}",
            refused.text()
        );
        assert!(
            refused
                .number("retry-after")
                .is_some_and(|wait| wait <= 300)
        );
    }
    assert_eq!(
        registry.requests(),
        Vec::<String>::new(),
        "asked in spite of the switch"
    );
    let (status, ready) = readyz(cache).await;
    let notes = ready["notes"].to_string();
    assert!(
        status == 200 && notes.contains("is switched offline"),
        "{ready}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_is_served_while_switched_offline() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    cache.get("/v2/up/lib/app/tags/list").await;
    for path in ["/api/v1/offline", "/api/v1/offline/up"] {
        assert_eq!(admin(&cache, "PUT", path).await.status, 200);
        assert_offline(&registry, &cache, &image).await;
        let on = admin(&cache, "GET", "/api/v1/offline").await.json();
        assert_eq!(
            (&on["all"], &on["upstreams"]["up"]),
            (
                &json!(path.ends_with("offline")),
                &json!(path.ends_with("up"))
            )
        );
        assert_eq!(admin(&cache, "DELETE", path).await.status, 200);
        let renewed = cache.manifest("up", REPO, "v1").await;
        assert_eq!(
            (said(&renewed), renewed.header("warning")),
            ("oci-remote-cache; hit; detail=revalidated", None)
        );
    }
    assert_eq!(
        admin(&cache, "PUT", "/api/v1/offline/nobody").await.status,
        404
    );
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_configured_offline_is_never_asked() {
    let registry = Registry::start().await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    let up = Upstream::new("up", registry.url()).line("offline = true");
    let other = Upstream::new("other", registry.url());
    let cache = cache().upstream(up).upstream(other).start().await;
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[503]);
    assert_eq!(registry.requests(), Vec::<String>::new());
    assert_eq!(cache.manifest("other", REPO, "v1").await.status, 200);
    cache.check_invariants().await;
}

/// F20, X06: what the upstream refuses is not served, whoever held it, also while the upstream is down; its next 200 opens it again.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_repository_is_suspended_as_a_whole() {
    for status in [401, 403] {
        let (registry, cache) = up_without_ttl().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        cache.pull("up", &image).await;
        registry.script(Matcher::any(), faults::error(status, "DENIED", &[]));
        assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
        refuses_all(&cache, &image, &[403, 404]).await;
        let (ready, report) = readyz(&cache).await;
        let note = json!(["up refuses 1 repository to anyone without a credential"]);
        assert_eq!((ready, report["notes"].clone()), (200, note));
        registry.stop().await;
        sleep(AFTER_A_REFUSAL).await;
        refuses_all(&cache, &image, &[403, 404, 502, 503, 504]).await;
        cache.restart().await;
        refuses_all(&cache, &image, &[403, 404, 502, 503, 504]).await;
        registry.resume().await;
        registry.clear_scripts();
        registry.clear_log();
        sleep(AFTER_A_REFUSAL).await;
        assert_good(
            &cache.blob("up", REPO, image.layer().digest).await,
            image.layer(),
        );
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        assert_eq!(
            registry.requests(),
            [
                head_blob(REPO, image.layer().digest),
                head_manifest(REPO, "v1")
            ]
        );
        assert_eq!(
            readyz(&cache).await.1,
            json!({"status": "ready", "reasons": []})
        );
        cache.check_invariants().await;
    }
}

async fn refuses_all(cache: &CacheProcess, image: &Image, statuses: &[u16]) {
    for path in [
        manifest_path("up", REPO, "v1"),
        manifest_path("up", REPO, image.digest()),
        blob_path("up", REPO, image.layer().digest),
    ] {
        assert_refused(&cache.get(&path).await, statuses);
    }
}

/// F32: one bad hour of an upstream's login erases nothing.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_fetched_again_after_a_refusal() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    registry.script(Matcher::manifests(), faults::error(403, "DENIED", &[]));
    registry.script(Matcher::blobs(), faults::error(403, "DENIED", &[]));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
    refuses_all(&cache, &image, &[403, 404]).await;
    registry.clear_scripts();
    registry.clear_log();
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
    assert!(
        !registry
            .requests()
            .contains(&get_blob(REPO, image.layer().digest)),
        "{:?}",
        registry.requests()
    );
    assert_eq!(registry.count((Kind::Manifest, "GET")), 0);
    cache.check_invariants().await;
}

/// The log and `/readyz` tell a credential of ours that is wrong from one that does not open everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_credential_is_told_from_a_refused_repository() {
    let credentials =
        |upstream: Upstream| upstream.tag_ttl("0s").credentials("robot", "rotated-away");
    let (registry, cache) = up_as(credentials).await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.require(Basic::of("robot", "the-new-one"));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
    let (status, report) = readyz(&cache).await;
    let notes = report["notes"].to_string();
    assert!(
        status == 200 && notes.contains("up does not take our own credential"),
        "{report}"
    );
    assert!(cache.log().contains("does not take our own credential"));
    registry.require(Basic::of("robot", "rotated-away"));
    sleep(AFTER_A_REFUSAL).await;
    assert_eq!(cache.manifest("up", REPO, "v1").await.status, 200);
    assert_eq!(readyz(&cache).await.1["notes"], Value::Null);
    registry.script(Matcher::manifests(), faults::error(403, "DENIED", &[]));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
    let notes = readyz(&cache).await.1["notes"].clone();
    assert_eq!(
        notes,
        json!(["up refuses 1 repository to our own credential user:robot"])
    );
    cache.check_invariants().await;
}

/// What is fetched in nobody's name says nothing of our credential: the note on it stays until it works again.
#[tokio::test(flavor = "multi_thread")]
async fn an_anonymous_answer_does_not_vouch_for_our_credential() {
    let (registry, cache) =
        up_as(|upstream| upstream.tag_ttl("0s").credentials("robot", "rotated-away")).await;
    let tokens = TokenServer::at(&registry);
    tokens.add_user("robot", "the-new-one");
    let door = Bearer::of(&tokens).identity("robot");
    registry.require(door.protects(|repo| repo == REPO));
    let closed = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let open = registry.put_image(&ImageSpec::new("lib/open", "v1"));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
    for _ in 0..2 {
        assert_good(
            &cache.manifest("up", "lib/open", "v1").await,
            &open.manifest,
        );
        cache.pull("up", &open).await;
        let notes = readyz(&cache).await.1["notes"].to_string();
        let note = "up does not take our own credential user:robot, for ";
        assert!(notes.contains(note), "{notes}");
    }
    tokens.add_user("robot", "rotated-away");
    sleep(AFTER_A_REFUSAL).await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &closed.manifest);
    assert_eq!(readyz(&cache).await.1["notes"], Value::Null);
    assert!(cache.log().contains("takes our own credential again"));
    cache.check_invariants().await;
}

/// An answer that tells how much is left of the rate limit.
fn with_left(image: &Image, left: u32) -> Handler {
    let (left, digest) = (format!("{left};w=21600"), image.digest().to_string());
    as_it_is(
        &image.manifest,
        &[
            ("Content-Type", OCI_MANIFEST),
            ("Docker-Content-Digest", &digest),
            ("ratelimit-limit", "100;w=21600"),
            ("ratelimit-remaining", &left),
            ("docker-ratelimit-source", "192.0.2.7"),
        ],
    )
}

/// What is left of the limit is shown, and in the end kept for what is not held.
#[tokio::test(flavor = "multi_thread")]
async fn revalidation_gives_way_to_misses() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.script(Matcher::manifests().of("v1"), with_left(&image, 60));
    for _ in 0..2 {
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    }
    assert_eq!(
        registry.requests(),
        [get_manifest(REPO, "v1"), head_manifest(REPO, "v1")]
    );
    registry.clear_scripts();
    registry.script(Matcher::manifests().of("v1"), with_left(&image, 5));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    registry.clear_log();
    for _ in 0..3 {
        let kept = cache.manifest("up", REPO, "v1").await;
        assert_stale(&kept, &image, "reserved");
        assert!(
            warning(&kept).contains("nearly used up"),
            "{}",
            warning(&kept)
        );
    }
    assert_eq!(registry.requests(), Vec::<String>::new());
    let unheld = registry.put_image(&ImageSpec::new(REPO, "v2"));
    assert_good(&cache.manifest("up", REPO, "v2").await, &unheld.manifest);
    assert_eq!(registry.requests(), [get_manifest(REPO, "v2")]);
    let metrics = cache.metrics().await;
    let labels = r#"{upstream="up",credential="anonymous""#;
    for line in [
        format!("oci_remote_cache_upstream_ratelimit_limit{labels}}} 100\n"),
        format!("oci_remote_cache_upstream_ratelimit_remaining{labels}}} 5\n"),
        format!("oci_remote_cache_upstream_ratelimit_source{labels},source=\"192.0.2.7\"}} 1\n"),
        format!("oci_remote_cache_upstream_ratelimit_ends_timestamp_seconds{labels}}} "),
    ] {
        assert!(metrics.contains(&line), "{line}\n{metrics}");
    }
    let notes = readyz(&cache).await.1["notes"].clone();
    assert_eq!(
        notes,
        json!(["up has a rate limit of which little is left (spent) to anonymous"])
    );
    cache.check_invariants().await;
}

/// A closed gate is told, and nobody waits for it who asks for what is held.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_gate_is_told() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    registry.script(
        Matcher::any(),
        faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "100")]),
    );
    assert_stale(
        &cache.manifest("up", REPO, "v1").await,
        &image,
        "rate-limited",
    );
    let notes = readyz(&cache).await.1["notes"][0].to_string();
    assert!(
        notes.contains("up has limited our rate, and is left alone for "),
        "{notes}"
    );
    let metrics = cache.metrics().await;
    assert!(metrics.contains(
        "oci_remote_cache_upstream_ratelimit_closed_until_timestamp_seconds{upstream=\"up\"} "
    ));
    registry.clear_log();
    for _ in 0..50 {
        assert_stale(
            &cache.manifest("up", REPO, "v1").await,
            &image,
            "rate-limited",
        );
    }
    assert_eq!(registry.requests(), Vec::<String>::new());
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_lists_what_is_stored_when_it_is_switched_on() {
    let registry = Registry::start().await;
    let up = Upstream::new("up", registry.url());
    let cache = cache().upstream(up).line("catalog = true").start().await;
    for repo in ["b/two", "a/one", "c/three"] {
        let image = registry.put_image(&ImageSpec::new(repo, "v1"));
        assert_good(&cache.manifest("up", repo, "v1").await, &image.manifest);
        cache.wait_until_stored(&image.digest()).await;
    }
    // A file is there a moment before its record is.
    for _ in 0..100 {
        let found = cache.get("/v2/_catalog").await.json();
        if found["repositories"].as_array().map(Vec::len) == Some(3) {
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
    let all = cache.get("/v2/_catalog").await;
    assert_eq!(
        all.json(),
        json!({"repositories": ["up/a/one", "up/b/two", "up/c/three"]})
    );
    let page = cache.get("/v2/_catalog?n=2").await;
    assert_eq!(
        page.json(),
        json!({"repositories": ["up/a/one", "up/b/two"]})
    );
    assert_eq!(
        page.header("link"),
        Some("</v2/_catalog?n=2&last=up%2Fb%2Ftwo>; rel=\"next\"")
    );
    let rest = cache.get("/v2/_catalog?n=2&last=up%2Fb%2Ftwo").await;
    assert_eq!(
        (rest.json(), rest.header("link")),
        (json!({"repositories": ["up/c/three"]}), None)
    );
    let none = cache.get("/v2/_catalog?n=0").await;
    assert_eq!(
        (none.json(), none.header("link")),
        (json!({"repositories": []}), None)
    );
    cache.check_invariants().await;
    let (_registry, silent) = crate::stage::up().await;
    assert_refused(&silent.get("/v2/_catalog").await, &[404]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tags_history_is_kept_and_shown() {
    let (registry, cache) = up_without_ttl().await;
    let old = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.manifest("up", REPO, "v1").await;
    let new = moved(&registry, "v1");
    for _ in 0..2 {
        cache.manifest("up", REPO, "v1").await;
    }
    let shown = cache
        .run(&["tags", "history", "lib/app:v1", "--json"])
        .await;
    let eras: Value = serde_json::from_slice(&shown.stdout).expect("read the history");
    let digests: Vec<&str> = eras
        .as_array()
        .expect("an array")
        .iter()
        .filter_map(|era| era["digest"].as_str())
        .collect();
    assert_eq!(
        digests,
        [new.digest().to_string(), old.digest().to_string()]
    );
    assert!(
        eras[0]["first_seen"].as_str() >= eras[1]["last_seen"].as_str(),
        "{eras}"
    );
    let table = cache.run(&["tags", "history", "up/lib/app:v1"]).await;
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(
        table
            .lines()
            .nth(2)
            .is_some_and(|line| line.ends_with(&old.digest().to_string())),
        "{table}"
    );
    for (reference, code, words) in [
        ("up/lib/app:v9", 1, "was never seen here"),
        ("nowhere.example/app:v1", 1, "no upstream is called"),
        ("up/lib/app:v1@sha256:00", 1, ""),
    ] {
        let failed = cache.run(&["tags", "history", reference]).await;
        let told = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert!(
            failed.status.code() == Some(code) && told.contains(words),
            "{reference}: {told}"
        );
    }
    cache.check_invariants().await;
}

/// C03, C04, C07, F19 and F31 under a clock that is moved: no sleep stands between an answer and the end of its life.
#[tokio::test(flavor = "multi_thread")]
async fn a_tags_life_is_as_long_as_it_is_said() {
    let registry = Registry::start().await;
    let clock = Clock::system();
    let (app, port, _home) =
        in_process(&registry, &clock, "tag_ttl = \"1h\"\nnegative_ttl = \"0s\"").await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let ask = Request::get(&manifest_path("up", REPO, "v1"));
    assert_good(&ask.clone().send(port).await, &image.manifest);
    clock.advance(Duration::from_secs(3590));
    let fresh = ask.clone().send(port).await;
    assert_eq!(
        (
            said(&fresh),
            fresh.number("age").is_some_and(|age| age >= 3590)
        ),
        ("oci-remote-cache; hit", true)
    );
    clock.advance(Duration::from_secs(10));
    let renewed = ask.clone().send(port).await;
    assert!(
        said(&renewed).ends_with("detail=revalidated"),
        "{}",
        said(&renewed)
    );
    clock.advance(Duration::from_secs(3599));
    assert_eq!(said(&ask.clone().send(port).await), "oci-remote-cache; hit");
    assert_eq!(
        registry.requests(),
        [get_manifest(REPO, "v1"), head_manifest(REPO, "v1")]
    );
    registry.stop().await;
    clock.advance(Duration::from_hours(30 * 24));
    let month_old = ask.clone().send(port).await;
    assert_stale(&month_old, &image, "unreachable");
    assert!(
        month_old.number("age").is_some_and(|age| age > 30 * 86_400),
        "{:?}",
        month_old.headers
    );
    let by_digest = Request::get(&manifest_path("up", REPO, image.digest()))
        .send(port)
        .await;
    assert_eq!(
        (said(&by_digest), by_digest.status),
        ("oci-remote-cache; hit", 200)
    );
    registry.resume().await;
    registry.remove_manifest(REPO, "v1");
    sleep(AFTER_A_REFUSAL).await;
    assert_refused(&ask.send(port).await, &[404]);
    drop(app);
}

/// What the upstream does not have is asked for again once `negative_ttl` has passed by the clock by which everything ages here.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_remembered_as_long_as_it_is_said() {
    let registry = Registry::start().await;
    let clock = Clock::system();
    let (app, port, _home) = in_process(&registry, &clock, "negative_ttl = \"1h\"").await;
    let image = ImageSpec::new(REPO, "v1").build();
    let paths = [
        manifest_path("up", REPO, "v1"),
        manifest_path("up", REPO, image.digest()),
        blob_path("up", REPO, image.layer().digest),
        "/v2/up/lib/none/tags/list".to_owned(),
    ];
    let ask = async |status: u16| {
        for path in &paths {
            let answer = Request::get(path).send(port).await;
            assert_eq!(answer.status, status, "{path}: {answer}");
        }
    };
    ask(404).await;
    let once = registry.requests().len();
    ask(404).await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.put_image(&ImageSpec::new("lib/none", "v1"));
    clock.advance(Duration::from_secs(3590));
    ask(404).await;
    assert_eq!(registry.requests().len(), once, "asked within its life");
    clock.advance(Duration::from_secs(11));
    // A transfer that failed is shared for half a second.
    sleep(AFTER_A_REFUSAL).await;
    ask(200).await;
    drop(app);
}

/// The cache in this process, under a clock that the test moves.
pub(crate) async fn in_process(
    registry: &Registry,
    clock: &Clock,
    lines: &str,
) -> (JoinSet<()>, u16, tempfile::TempDir) {
    oci_remote_cache::upstream::install_crypto();
    let home = tempfile::tempdir().expect("make a folder");
    let file = home.path().join("config.toml");
    let text = format!(
        "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\ncache_dir = {:?}\ndefault_upstream = \"up\"\n[upstreams.up]\nurl = {:?}\n{lines}\n",
        home.path().join("cache").display().to_string(),
        registry.url(),
    );
    std::fs::write(&file, text).expect("write the configuration");
    let sources = Sources {
        file: Some(file),
        ..Sources::default()
    };
    let config = Config::load(&sources).expect("load the configuration");
    let app = App::start(config, clock.clone())
        .await
        .expect("start the cache");
    let port = app.address().port();
    let mut running = JoinSet::new();
    running.spawn(async move { app.run().await.expect("serve") });
    (running, port, home)
}

/// Storms on an expired tag that has moved cost one HEAD and one GET: S07 with the window open, which must not cost more.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_within_the_window_is_one_question() {
    let (registry, cache) = up_as(|upstream| {
        upstream
            .tag_ttl("0s")
            .line("stale_while_revalidate = \"1h\"")
    })
    .await;
    let old = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &old.manifest);
    moved(&registry, "v1");
    let gate = Gate::new();
    registry.script((Kind::Manifest, "HEAD"), faults::held(&gate));
    registry.clear_log();
    let ask = Request::get(&manifest_path("up", REPO, "v1")).compare(&old.manifest.data);
    let storm: Vec<_> = (0..100).map(|_| ask.clone().start(cache.port())).collect();
    for background in storm {
        assert!(background.response().await.is_right());
    }
    gate.open();
    sleep(Duration::from_millis(300)).await;
    assert_eq!(registry.count((Kind::Manifest, "HEAD")), 1);
    assert_eq!(registry.count((Kind::Manifest, "GET")), 1);
    cache.check_invariants().await;
}

/// A repository that refused before anything of it was held leaves no trace in `/readyz`.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_held_is_not_suspended() {
    let (registry, cache) = up().await;
    registry.script(Matcher::any(), faults::error(403, "DENIED", &[]));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
    assert_eq!(
        readyz(&cache).await.1,
        json!({"status": "ready", "reasons": []})
    );
    cache.check_invariants().await;
}

/// S07 with both kinds of clients: whoever comes first asks, and the others wait for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_heads_and_gets_is_one_question() {
    let (registry, cache) = up_without_ttl().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let new = moved(&registry, "v1");
    let gate = Gate::new();
    registry.script((Kind::Manifest, "HEAD"), faults::held(&gate));
    registry.clear_log();
    let path = manifest_path("up", REPO, "v1");
    let get = Request::get(&path).compare(&new.manifest.data);
    let storm: Vec<_> = (0..100)
        .map(|n| {
            if n % 2 == 0 {
                Request::head(&path)
            } else {
                get.clone()
            }
        })
        .map(|request| request.start(cache.port()))
        .collect();
    gate.reached().await;
    sleep(Duration::from_millis(300)).await;
    gate.open();
    let digest = new.digest().to_string();
    for background in storm {
        let response = background.response().await;
        assert_eq!(
            (response.status, response.header("docker-content-digest")),
            (200, Some(digest.as_str()))
        );
    }
    assert_eq!(
        registry.requests(),
        [head_manifest(REPO, "v1"), get_manifest(REPO, new.digest())]
    );
    cache.check_invariants().await;
}
