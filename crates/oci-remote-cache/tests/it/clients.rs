//! Our own clients: who they are, and what each may pull.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;
use testbed::cache::{blob_path, manifest_path};
use testbed::image::ACCEPT_ALL;
use testbed::{
    CacheBuilder, CacheProcess, Image, ImageSpec, Registry, Request, Response, Upstream,
    assert_good,
};

use crate::stage::{REPO, cache, said};

const TOKEN: &str = "t0ken-of-ci-0123456789";

/// The operator's files.
struct Books(TempDir);

impl Books {
    fn new() -> Self {
        let books = Self(tempfile::tempdir().expect("a folder"));
        books.passwords(&[("alice", "sesame-alice"), ("bob", "sesame-bob")]);
        fs::write(
            books.path("tokens"),
            format!("# for machines\nci {TOKEN}\n"),
        )
        .expect("write the tokens");
        books
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn passwords(&self, pairs: &[(&str, &str)]) {
        let line = |(name, password): &(&str, &str)| {
            let hash = bcrypt::hash_with_salt(password, 4, [7; 16]).expect("a hash");
            format!("{name}:{hash}\n")
        };
        let text: String = pairs.iter().map(line).collect();
        fs::write(self.path("htpasswd"), text).expect("write the passwords");
    }

    fn cache(&self, rules: &str) -> CacheBuilder {
        cache()
            .line(&format!("clients.htpasswd = {:?}", self.path("htpasswd")))
            .line(&format!("clients.tokens = {:?}", self.path("tokens")))
            .line(&format!("clients.rules = {rules}"))
            .secret(TOKEN)
            .secret("sesame-alice")
            .secret(&STANDARD.encode("alice:sesame-alice"))
    }
}

async fn scene(rules: &str, tag_ttl: &str) -> (Books, Registry, CacheProcess, Image) {
    let (books, registry) = (Books::new(), Registry::start().await);
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let upstream = Upstream::new("up", registry.url()).tag_ttl(tag_ttl);
    let cache = books.cache(rules).trace().upstream(upstream).start().await;
    (books, registry, cache, image)
}

fn login(pair: &str) -> String {
    format!("Basic {}", STANDARD.encode(pair))
}

async fn ask(cache: &CacheProcess, path: &str, authorization: Option<&str>) -> Response {
    let request = Request::get(path).header("Accept", ACCEPT_ALL);
    let request = match authorization {
        Some(value) => request.header("Authorization", value),
        None => request,
    };
    cache.send(request).await
}

fn assert_challenged(answer: &Response) {
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (401, "UNAUTHORIZED"),
        "{answer}"
    );
    let challenges = answer.all("www-authenticate");
    assert_eq!(
        challenges,
        ["Basic realm=\"oci-remote-cache\", charset=\"UTF-8\""]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_comes_in_without_a_name() {
    let (_books, registry, cache, image) = scene("[]", "1h").await;
    for path in [
        "/v2/".to_owned(),
        "/v2".to_owned(),
        manifest_path("up", REPO, "v1"),
        blob_path("up", REPO, image.layer().digest),
        format!("/v2/up/{REPO}/tags/list"),
        manifest_path("nosuch.example", REPO, "v1"),
        "/v2/up/..%2f..%2fetc".to_owned(),
        "/nonsense".to_owned(),
    ] {
        assert_challenged(&ask(&cache, &path, None).await);
        for wrong in [
            "alice:wrong",
            "nobody:sesame-alice",
            "ci:sesame-alice",
            "alice",
        ] {
            assert_challenged(&ask(&cache, &path, Some(&login(wrong))).await);
        }
        assert_challenged(&ask(&cache, &path, Some("Bearer t0ken-of-nobody-at-all")).await);
    }
    assert_eq!(registry.requests(), Vec::<String>::new());
    assert_eq!(cache.get("/healthz").await.status, 200);
    cache.check_invariants().await;
}

/// What a client calls itself, or says of whom it stands for, is no name (GHSA-wrw5-gmvj-gf23, GHSA-8jm4), nor does it change what is asked.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_calls_itself_opens_nothing() {
    let (_books, registry, cache, image) = scene("[]", "1h").await;
    let path = manifest_path("up", REPO, "v1");
    let alice = login("alice:sesame-alice");
    assert_good(&ask(&cache, &path, Some(&alice)).await, &image.manifest);
    registry.server().clear_log();
    for (name, value) in [
        ("User-Agent", "docker/28.0.0 go/1.24"),
        ("User-Agent", "kube-probe/1.30"),
        ("User-Agent", "harbor-registry-client"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Real-IP", "127.0.0.1"),
        ("Forwarded", "for=127.0.0.1"),
        ("X-Forwarded-User", "alice"),
        ("X-Forwarded-Proto", "https"),
        ("Remote-User", "alice"),
        ("X-Original-URL", "/healthz"),
        ("X-Rewrite-URL", "/healthz"),
        ("X-HTTP-Method-Override", "DELETE"),
        ("X-Client-Cert", "CN=alice"),
        ("Host", "localhost"),
        ("Cookie", "sid=alice"),
    ] {
        for path in [path.as_str(), "/v2/"] {
            let answer = cache.send(Request::get(path).header(name, value)).await;
            assert_challenged(&answer);
        }
        let named = Request::get(&path)
            .header("Authorization", &alice)
            .header(name, value);
        assert_good(&cache.send(named).await, &image.manifest);
    }
    assert_eq!(registry.requests(), Vec::<String>::new());
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_and_tokens_open_the_door_and_go_no_further() {
    let (_books, registry, cache, image) = scene("[]", "1h").await;
    let path = manifest_path("up", REPO, "v1");
    let bearer = format!("Bearer {TOKEN}");
    for right in [
        login("alice:sesame-alice"),
        login(&format!("ci:{TOKEN}")),
        bearer,
    ] {
        assert_eq!(ask(&cache, "/v2/", Some(&right)).await.status, 200);
        assert_good(&ask(&cache, &path, Some(&right)).await, &image.manifest);
        let blob = ask(
            &cache,
            &blob_path("up", REPO, image.layer().digest),
            Some(&right),
        )
        .await;
        assert_good(&blob, image.layer());
    }
    for entry in registry.log() {
        assert_eq!(entry.header("authorization"), None, "{}", entry.path);
    }
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_say_who_pulls_what() {
    let rules = "[\"alice pull up/lib/**\", \"* deny up/lib/app\", \"* pull up/**\", \"anonymous pull up/open\"]";
    let (_books, registry, cache, image) = scene(rules, "1h").await;
    let open = registry.put_image(&ImageSpec::new("open", "v1"));
    let other = registry.put_image(&ImageSpec::new("other/x", "v1"));
    let (alice, bob) = (login("alice:sesame-alice"), login("bob:sesame-bob"));
    assert_good(
        &ask(&cache, &manifest_path("up", REPO, "v1"), Some(&alice)).await,
        &image.manifest,
    );
    // Cached or not, by tag, digest or blob: the answer is the same, and the upstream hears nothing of it.
    registry.server().clear_log();
    for path in [
        manifest_path("up", REPO, "v1"),
        manifest_path("up", REPO, image.manifest.digest),
        blob_path("up", REPO, image.layer().digest),
        manifest_path("up", REPO, "nosuch"),
    ] {
        let answer = ask(&cache, &path, Some(&bob)).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (403, "DENIED"),
            "{path}"
        );
        assert_challenged(&ask(&cache, &path, None).await);
    }
    assert_eq!(registry.requests(), Vec::<String>::new());
    assert_good(
        &ask(&cache, &manifest_path("up", "other/x", "v1"), Some(&bob)).await,
        &other.manifest,
    );
    assert_eq!(
        ask(&cache, &manifest_path("up", "other/x", "v1"), Some(&alice))
            .await
            .status,
        200
    );
    assert_good(
        &ask(&cache, &manifest_path("up", "open", "v1"), None).await,
        &open.manifest,
    );
    // Where some things are open the ping still asks, or nobody would ever log in.
    assert_challenged(&ask(&cache, "/v2/", None).await);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_pull_what_is_held_brings_nothing_in() {
    let (_books, registry, cache, image) =
        scene("[\"alice pull **\", \"bob pull-cached **\"]", "0s").await;
    let (alice, bob) = (login("alice:sesame-alice"), login("bob:sesame-bob"));
    let (tag, layer) = (
        manifest_path("up", REPO, "v1"),
        blob_path("up", REPO, image.layer().digest),
    );
    let list = format!("/v2/up/{REPO}/tags/list");
    for path in [&tag, &layer, &list] {
        let answer = ask(&cache, path, Some(&bob)).await;
        assert_eq!(answer.status, 404, "{path}: {answer}");
        assert!(answer.text().contains("not held"), "{}", answer.text());
    }
    assert_eq!(registry.requests(), Vec::<String>::new());
    assert_good(&ask(&cache, &tag, Some(&alice)).await, &image.manifest);
    assert_good(&ask(&cache, &layer, Some(&alice)).await, image.layer());
    cache.wait_until_stored(&image.layer().digest).await;
    registry.server().clear_log();
    let stale = ask(&cache, &tag, Some(&bob)).await;
    assert_good(&stale, &image.manifest);
    assert!(
        said(&stale).contains("detail=only-held"),
        "{}",
        said(&stale)
    );
    assert_good(&ask(&cache, &layer, Some(&bob)).await, image.layer());
    let head = cache
        .send(Request::head(&layer).header("Authorization", &bob))
        .await;
    assert_eq!(
        (head.status, head.number("content-length")),
        (200, Some(image.layer().size()))
    );
    assert_eq!(registry.requests(), Vec::<String>::new());
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_counts_at_once_and_a_spoilt_one_does_not() {
    let (books, _registry, cache, _image) = scene("[]", "1h").await;
    let status = async |pair: &str| ask(&cache, "/v2/", Some(&login(pair))).await.status;
    assert_eq!(status("alice:sesame-alice").await, 200);
    books.passwords(&[("alice", "another")]);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(status("alice:another").await, 200);
    assert_eq!(
        status("alice:sesame-alice").await,
        401,
        "it was remembered, and its line is gone"
    );
    assert_eq!(status("bob:sesame-bob").await, 401);
    fs::write(books.path("htpasswd"), "alice:{SHA}AAAA").expect("spoil the passwords");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(status("alice:another").await, 200);
    cache.check_invariants().await;
}

/// The catalog names to each client what it may pull, and to nobody what it may not.
#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_names_to_each_client_what_it_may_pull() {
    let (books, registry) = (Books::new(), Registry::start().await);
    let rules = "[\"alice pull up/**\", \"* deny up/secret/**\", \"* pull-cached up/lib/**\", \"* pull up/other\", \"anonymous pull up/open\"]";
    let upstream = Upstream::new("up", registry.url());
    let builder = books.cache(rules).line("catalog = true");
    let cache = builder.upstream(upstream).start().await;
    let (alice, bob) = (login("alice:sesame-alice"), login("bob:sesame-bob"));
    for repo in ["lib/app", "open", "other", "secret/plans", "unnamed"] {
        let image = registry.put_image(&ImageSpec::new(repo, "v1"));
        let path = manifest_path("up", repo, "v1");
        assert_good(&ask(&cache, &path, Some(&alice)).await, &image.manifest);
        cache.wait_until_stored(&image.digest()).await;
    }
    let listed = async |query: &str, who: Option<&str>| {
        let answer = ask(&cache, &format!("/v2/_catalog{query}"), who).await;
        let link = answer.header("link").map(str::to_owned);
        (answer.json()["repositories"].clone(), link)
    };
    let all = serde_json::json!([
        "up/lib/app",
        "up/open",
        "up/other",
        "up/secret/plans",
        "up/unnamed"
    ]);
    // A file is there a moment before its record is.
    for _ in 0..100 {
        if listed("", Some(&alice)).await.0 == all {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(listed("", Some(&alice)).await, (all, None));
    let of_bob = serde_json::json!(["up/lib/app", "up/other"]);
    assert_eq!(listed("", Some(&bob)).await, (of_bob, None));
    // Neither the number of names on a page nor the mark where it goes on tells of what lies between.
    let (first, link) = listed("?n=1", Some(&bob)).await;
    assert_eq!(first, serde_json::json!(["up/lib/app"]));
    let next = "</v2/_catalog?n=1&last=up%2Flib%2Fapp>; rel=\"next\"";
    assert_eq!(link.as_deref(), Some(next));
    let (second, link) = listed("?n=1&last=up%2Flib%2Fapp", Some(&bob)).await;
    assert_eq!((second, link), (serde_json::json!(["up/other"]), None));
    let beyond = listed("?last=up%2Fother", Some(&bob)).await;
    assert_eq!(beyond, (serde_json::json!([]), None));
    for path in ["/v2/_catalog", "/v2/_catalog?n=1"] {
        let answer = ask(&cache, path, None).await;
        let text = answer.text();
        assert!(
            !text.contains("secret") && !text.contains("lib/app") && !text.contains("other"),
            "{text}"
        );
    }
    cache.check_invariants().await;
}
