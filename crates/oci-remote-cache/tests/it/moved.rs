//! A tag that moves: what is told of it before the new manifest is held, and what an upstream that lies can do.

use std::time::Duration;

use oci::OCI_MANIFEST;
use oci_remote_cache::clock::Clock;
use serde_json::Value;
use testbed::cache::manifest_path;
use testbed::{
    CacheProcess, Content, Handler, Image, ImageSpec, Matcher, Registry, Request, Response,
    assert_good, faults,
};
use tokio::time::sleep;

use crate::freshness::in_process;
use crate::stage::{
    DIGEST, REPO, as_it_is, assert_refused, get_manifest, head_manifest, said, up_as,
    up_without_ttl,
};

/// A refusal is shared for a second, and an upstream that failed is left alone for a moment.
const LATER: Duration = Duration::from_millis(1200);

fn put(registry: &Registry, seed: &str) -> Image {
    registry.put_image(&ImageSpec::new(REPO, "v1").seed(seed))
}

async fn get_tag(cache: &CacheProcess) -> Response {
    cache.manifest("up", REPO, "v1").await
}

async fn head_tag(cache: &CacheProcess) -> Response {
    cache.head_manifest("up", REPO, "v1").await
}

/// A HEAD that is answered with this image.
fn assert_names(head: &Response, image: &Image) {
    assert_eq!(
        (head.status, head.header(DIGEST).map(str::to_owned)),
        (200, Some(image.digest().to_string())),
        "{head}"
    );
    assert_eq!(
        head.number("content-length"),
        Some(image.manifest.size()),
        "{head}"
    );
}

/// Held, told as old, and told why.
fn assert_stale(answer: &Response, why: &str) {
    assert_eq!(
        said(answer),
        format!("oci-remote-cache; fwd=stale; detail={why}")
    );
    let warning = answer.header("warning").unwrap_or_default();
    assert!(warning.starts_with("299 "), "{warning}");
}

/// What a HEAD says of a manifest that need not be there.
fn claims(content: &Content) -> Handler {
    as_it_is(
        content,
        &[
            ("Content-Type", OCI_MANIFEST),
            ("Docker-Content-Digest", &content.digest.to_string()),
        ],
    )
}

/// docker and containerd ask by HEAD, then for the digest. Between the two the upstream goes away: the tag goes on meaning what is held.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_between_head_and_get_costs_no_tag() {
    let registry = Registry::start().await;
    let clock = Clock::system();
    let (app, port, _home) = in_process(&registry, &clock, "tag_ttl = \"1h\"").await;
    let path = manifest_path("up", REPO, "v1");
    let (head, get) = (Request::head(&path), Request::get(&path));
    let old = put(&registry, "old");
    assert_good(&get.clone().send(port).await, &old.manifest);
    let new = put(&registry, "new");
    clock.advance(Duration::from_hours(1));
    assert_names(&head.clone().send(port).await, &new);
    // Until it is held it is no fresher than the upstream is awake: asked again, by HEAD.
    registry.clear_log();
    assert_names(&head.clone().send(port).await, &new);
    assert_eq!(registry.requests(), [head_manifest(REPO, "v1")]);
    registry.stop().await;
    let by_digest = Request::get(&manifest_path("up", REPO, new.digest()));
    assert_refused(&by_digest.send(port).await, &[502, 503, 504]);
    for age in [3600, 3600 + 86_400 * 7] {
        let told = head.clone().send(port).await;
        assert_names(&told, &old);
        let answer = get.clone().send(port).await;
        assert_good(&answer, &old.manifest);
        for answer in [&told, &answer] {
            assert_stale(answer, "unreachable");
            let told = answer.number("age").unwrap_or_default();
            assert!((age..age + 60).contains(&told), "{told}, not {age}");
        }
        clock.advance(Duration::from_hours(24 * 7));
    }
    registry.resume().await;
    sleep(LATER).await;
    assert_names(&head.clone().send(port).await, &new);
    assert_good(&get.clone().send(port).await, &new.manifest);
    // Now that it is held it is what the outage leaves.
    registry.stop().await;
    clock.advance(Duration::from_hours(2));
    let answer = get.send(port).await;
    assert_good(&answer, &new.manifest);
    assert_stale(&answer, "unreachable");
    drop(app);
}

/// What is fallen back on is in the catalog: a restart in the outage, or a kill, changes nothing. The history knows both.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_fallen_back_on_outlives_the_process() {
    let (registry, cache) = up_without_ttl().await;
    let old = put(&registry, "old");
    cache.pull("up", &old).await;
    let news = [put(&registry, "new"), put(&registry, "newer")];
    // Two moves that nobody fetched, one after the other.
    for new in &news {
        registry.put_manifest(REPO, Some("v1"), &new.manifest);
        assert_names(&head_tag(&cache).await, new);
    }
    registry.stop().await;
    for end in ["none", "restart", "kill"] {
        match end {
            "restart" => cache.restart().await,
            "kill" => {
                cache.kill9().await;
                cache.restart().await;
            }
            _ => {}
        }
        assert_names(&head_tag(&cache).await, &old);
        let answer = get_tag(&cache).await;
        assert_good(&answer, &old.manifest);
        assert_stale(&answer, "unreachable");
        for part in old.blobs() {
            assert_good(&cache.blob("up", REPO, part.digest).await, part);
        }
    }
    let [new, newer] = &news;
    assert_eq!(
        history(&cache).await,
        [newer.digest(), new.digest(), old.digest()].map(|digest| digest.to_string())
    );
    cache.check_invariants().await;
}

async fn history(cache: &CacheProcess) -> Vec<String> {
    let shown = cache
        .run(&["tags", "history", "lib/app:v1", "--json"])
        .await;
    let eras: Value = serde_json::from_slice(&shown.stdout).expect("read the history");
    let eras = eras.as_array().expect("an array");
    let digests = eras.iter().filter_map(|era| era["digest"].as_str());
    digests.map(str::to_owned).collect()
}

/// Switched offline, the tag means what is held.
#[tokio::test(flavor = "multi_thread")]
async fn offline_a_tag_means_what_is_held() {
    let (registry, cache) = up_without_ttl().await;
    let old = put(&registry, "old");
    assert_good(&get_tag(&cache).await, &old.manifest);
    let new = put(&registry, "new");
    assert_names(&head_tag(&cache).await, &new);
    let switch = Request::new("PUT", "/api/v1/offline");
    assert_eq!(switch.send(cache.admin_port()).await.status, 200);
    assert_names(&head_tag(&cache).await, &old);
    let answer = get_tag(&cache).await;
    assert_good(&answer, &old.manifest);
    assert_stale(&answer, "offline");
    cache.check_invariants().await;
}

/// An earlier meaning stands in for silence. It never stands in for a refusal.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_the_new_one_brings_nothing_old_back() {
    for status in [401, 403] {
        let (registry, cache) = up_without_ttl().await;
        let old = put(&registry, "old");
        assert_good(&get_tag(&cache).await, &old.manifest);
        let new = put(&registry, "new");
        assert_names(&head_tag(&cache).await, &new);
        let refuse = faults::error(status, "DENIED", &[]);
        registry.script(Matcher::manifests().of(new.digest()), refuse);
        assert_refused(&get_tag(&cache).await, &[403, 404]);
        registry.stop().await;
        sleep(LATER).await;
        let refused = [403, 404, 502, 503, 504];
        assert_refused(&get_tag(&cache).await, &refused);
        assert!(refused.contains(&head_tag(&cache).await.status));
        cache.check_invariants().await;
    }
}

/// The same where the tag comes back as it was before it went: an older meaning is from before that too.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_and_restored_brings_nothing_older_back() {
    let (registry, cache) = up_as(|upstream| upstream.tag_ttl("0s").negative_ttl("0s")).await;
    let old = put(&registry, "old");
    assert_good(&get_tag(&cache).await, &old.manifest);
    let new = put(&registry, "new");
    assert_names(&head_tag(&cache).await, &new);
    registry.remove_manifest(REPO, "v1");
    assert_refused(&get_tag(&cache).await, &[404]);
    registry.put_manifest(REPO, Some("v1"), &new.manifest);
    for _ in 0..2 {
        assert_names(&head_tag(&cache).await, &new);
    }
    registry.stop().await;
    assert_refused(&get_tag(&cache).await, &[502, 503, 504]);
    cache.restart().await;
    assert_refused(&get_tag(&cache).await, &[502, 503, 504]);
    cache.check_invariants().await;
}

/// What a tag meant before the upstream deleted it does not come back with a new meaning that nobody fetched.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_does_not_stand_in() {
    let (registry, cache) = up_as(|upstream| upstream.tag_ttl("0s").negative_ttl("0s")).await;
    let old = put(&registry, "old");
    assert_good(&get_tag(&cache).await, &old.manifest);
    registry.remove_manifest(REPO, "v1");
    assert_refused(&get_tag(&cache).await, &[404]);
    let new = put(&registry, "new");
    assert_names(&head_tag(&cache).await, &new);
    registry.stop().await;
    assert_refused(&get_tag(&cache).await, &[502, 503, 504]);
    cache.restart().await;
    assert_refused(&get_tag(&cache).await, &[502, 503, 504]);
    // Back where it was, it is what it was.
    registry.resume().await;
    sleep(LATER).await;
    registry.put_manifest(REPO, Some("v1"), &old.manifest);
    assert_names(&head_tag(&cache).await, &old);
    registry.stop().await;
    assert_good(&get_tag(&cache).await, &old.manifest);
    cache.check_invariants().await;
}

/// The tag has moved, and the new manifest cannot be had: whatever way that goes, what is held stays what is served.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_manifest_that_cannot_be_had_leaves_the_old() {
    let (registry, cache) = up_without_ttl().await;
    let old = put(&registry, "old");
    assert_good(&get_tag(&cache).await, &old.manifest);
    let new = put(&registry, "new");
    for handler in [
        faults::error(500, "UNKNOWN", &[]),
        faults::error(503, "UNAVAILABLE", &[]),
        faults::drop_connection(),
    ] {
        registry.clear_scripts();
        registry.script(Matcher::manifests().of(new.digest()), handler);
        for _ in 0..2 {
            assert_good(&get_tag(&cache).await, &old.manifest);
        }
        assert_eq!(history(&cache).await, [old.digest().to_string()]);
    }
    registry.clear_scripts();
    sleep(LATER).await;
    assert_good(&get_tag(&cache).await, &new.manifest);
    cache.check_invariants().await;
}

/// There and back again: each time what the upstream says, and what came twice is fetched once.
#[tokio::test(flavor = "multi_thread")]
async fn a_tag_may_move_back() {
    let (registry, cache) = up_without_ttl().await;
    let old = put(&registry, "old");
    assert_good(&get_tag(&cache).await, &old.manifest);
    let new = put(&registry, "new");
    assert_good(&get_tag(&cache).await, &new.manifest);
    registry.clear_log();
    registry.put_manifest(REPO, Some("v1"), &old.manifest);
    assert_good(&get_tag(&cache).await, &old.manifest);
    assert_names(&head_tag(&cache).await, &old);
    registry.stop().await;
    assert_good(&get_tag(&cache).await, &old.manifest);
    let digests = [old.digest(), new.digest(), old.digest()];
    assert_eq!(
        history(&cache).await,
        digests.map(|digest| digest.to_string())
    );
    let gets: Vec<_> = registry
        .requests()
        .into_iter()
        .filter(|line| line.starts_with("GET"))
        .collect();
    assert!(
        gets.len() <= 1,
        "what is held was fetched more than once: {gets:?}"
    );
    cache.check_invariants().await;
}

/// A HEAD may claim what it likes: what is served hashes to what it is called, and a lie moves nothing that is held.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_lies_moves_nothing() {
    let (registry, cache) = up_without_ttl().await;
    let old = put(&registry, "old");
    assert_good(&get_tag(&cache).await, &old.manifest);
    let claimed = ImageSpec::new(REPO, "v1").seed("claimed").build();
    let head = || Matcher::manifests().of("v1").method("HEAD");
    // A digest that nobody has: the tag itself says what it is.
    registry.script(head(), claims(&claimed.manifest));
    registry.clear_log();
    assert_good(&get_tag(&cache).await, &old.manifest);
    assert_eq!(
        registry.requests(),
        [
            head_manifest(REPO, "v1"),
            get_manifest(REPO, claimed.digest()),
            get_manifest(REPO, "v1"),
        ]
    );
    // Other bytes under that digest: refused, and never kept under either name.
    let other = put(&registry, "other");
    registry.script(
        Matcher::manifests().of(claimed.digest()).method("GET"),
        as_it_is(&other.manifest, &[("Content-Type", OCI_MANIFEST)]),
    );
    sleep(LATER).await;
    let answer = get_tag(&cache).await;
    assert!(
        answer.status != 200 || answer.body == old.manifest.data,
        "{answer}"
    );
    assert!(!cache.holds(&claimed.digest()) && !cache.holds(&other.digest()));
    let eras = history(&cache).await;
    assert_eq!(eras, [old.digest().to_string()]);
    // The client's own HEAD is told the claim. In an outage the tag is what is held.
    assert_names(&head_tag(&cache).await, &claimed);
    registry.clear_scripts();
    registry.stop().await;
    assert_names(&head_tag(&cache).await, &old);
    assert_good(&get_tag(&cache).await, &old.manifest);
    cache.check_invariants().await;
}

/// A clock that is set back makes no tag young again.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_set_back_keeps_nothing_fresh() {
    let registry = Registry::start().await;
    let clock = Clock::system();
    clock.advance(Duration::from_hours(24));
    let lines = "tag_ttl = \"1h\"\nnegative_ttl = \"1h\"";
    let (app, port, _home) = in_process(&registry, &clock, lines).await;
    let get = Request::get(&manifest_path("up", REPO, "v1"));
    let tags = Request::get("/v2/up/lib/app/tags/list");
    let old = put(&registry, "old");
    assert_good(&get.clone().send(port).await, &old.manifest);
    assert_eq!(tags.clone().send(port).await.status, 200);
    clock.set_back(Duration::from_hours(24));
    let new = put(&registry, "new");
    registry.put_manifest(REPO, Some("v2"), &new.manifest);
    assert_good(&get.clone().send(port).await, &new.manifest);
    let list = tags.send(port).await;
    assert!(list.text().contains("v2"), "{}", list.text());
    let again = get.send(port).await;
    assert_eq!(said(&again), "oci-remote-cache; hit");
    drop(app);
}
