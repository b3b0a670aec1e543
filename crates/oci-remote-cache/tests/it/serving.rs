//! What is served of an upstream that has credentials, to clients nobody knows: only what anyone may pull there.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use testbed::cache::{blob_path, manifest_path};
use testbed::token::Auth;
use testbed::{
    Bearer, CacheBuilder, CacheProcess, Exchange, Handler, Image, ImageSpec, Kind, Matcher,
    Registry, Request, TokenServer, Upstream, assert_good, faults,
};

use crate::stage::{assert_holds_nothing, assert_refused, cache, head_manifest};

const USER: &str = "robot";
const PASSWORD: &str = "correct-horse-battery";
const PUBLIC: &str = "lib/public";
const PRIVATE: &str = "lib/private";

/// Tokens for everyone, and for one repository only the user's.
#[derive(Debug)]
struct Doors(Bearer, Bearer);

impl Auth for Doors {
    fn refuse(&self, exchange: &Exchange) -> Option<Vec<String>> {
        self.0.refuse(exchange).or_else(|| self.1.refuse(exchange))
    }
}

struct Scene {
    registry: Registry,
    tokens: TokenServer,
    public: Image,
    private: Image,
}

async fn scene() -> Scene {
    let registry = Registry::start().await;
    let tokens = TokenServer::at(&registry);
    tokens.add_user(USER, PASSWORD);
    let private = Bearer::of(&tokens)
        .identity(USER)
        .protects(|repo| repo == PRIVATE);
    registry.require(Doors(Bearer::of(&tokens), private));
    Scene {
        public: registry.put_image(&ImageSpec::new(PUBLIC, "v1").seed("one")),
        private: registry.put_image(&ImageSpec::new(PRIVATE, "v1").seed("other")),
        registry,
        tokens,
    }
}

impl Scene {
    fn upstream(&self) -> Upstream {
        Upstream::new("up", self.registry.url()).credentials(USER, PASSWORD)
    }

    fn open_cache(&self) -> CacheBuilder {
        cache().upstream(self.upstream()).listen_on("0.0.0.0")
    }

    /// How often the password was shown to the token service.
    fn logins(&self) -> usize {
        let asked = self.tokens.token_requests();
        asked
            .iter()
            .filter(|entry| entry.header("authorization").is_some())
            .count()
    }
}

async fn assert_not_public(cache: &CacheProcess, image: &Image) {
    let layer = image.layer().digest;
    for answer in [
        cache.manifest("up", PRIVATE, "v1").await,
        cache.manifest("up", PRIVATE, image.manifest.digest).await,
        cache.blob("up", PRIVATE, layer).await,
        cache.get(&format!("/v2/up/{PRIVATE}/tags/list")).await,
        cache
            .get(&format!(
                "/v2/up/{PRIVATE}/referrers/{}",
                image.manifest.digest
            ))
            .await,
    ] {
        assert_refused(&answer, &[403]);
        assert_eq!(answer.error_code(), "DENIED");
        assert!(
            answer.text().contains("serve = \\\"all\\\""),
            "{}",
            answer.text()
        );
    }
    assert_eq!(cache.head_blob("up", PRIVATE, layer).await.status, 403);
    assert_eq!(cache.head_manifest("up", PRIVATE, "v1").await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_repository_is_refused_and_the_key_named() {
    let scene = scene().await;
    let cache = scene.open_cache().start().await;
    assert_not_public(&cache, &scene.private).await;
    assert_eq!(
        scene.logins(),
        0,
        "a private repository was asked for with the password"
    );
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_public_repository_is_shown_by_one_anonymous_head() {
    let scene = scene().await;
    let cache = scene.open_cache().start().await;
    cache.pull("up", &scene.public).await;
    cache.pull("up", &scene.public).await;
    let heads = scene
        .registry
        .requests()
        .into_iter()
        .filter(|line| *line == head_manifest(PUBLIC, "v1"));
    // Bare at first, then with an anonymous token.
    assert_eq!(heads.count(), 2);
    assert_eq!(scene.registry.count((Kind::Blob, "HEAD")), 0);
    assert!(scene.logins() > 0, "the credentials buy rate limit");
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_repositorys_bytes_are_not_shown_by_a_public_one() {
    let scene = scene().await;
    let cache = cache()
        .upstream(scene.upstream().line("serve = \"public\""))
        .start()
        .await;
    // A layer that both hold: having it by the public one opens nothing of the private one.
    scene.registry.put_blob(PRIVATE, scene.public.layer());
    cache.pull("up", &scene.public).await;
    assert_refused(
        &cache.blob("up", PRIVATE, scene.public.layer().digest).await,
        &[403],
    );
    assert_refused(
        &cache.blob("up", PUBLIC, scene.private.layer().digest).await,
        &[404],
    );
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_is_the_operators_word_and_the_default_on_loopback() {
    let scene = scene().await;
    let said = cache()
        .upstream(scene.upstream().line("serve = \"all\""))
        .listen_on("0.0.0.0")
        .start()
        .await;
    said.pull("up", &scene.private).await;
    let loopback = cache().upstream(scene.upstream()).start().await;
    loopback.pull("up", &scene.private).await;
    assert_eq!(scene.registry.count((Kind::Manifest, "HEAD")), 0);
    said.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_credentials_nothing_needs_proof() {
    let registry = Registry::start().await;
    let image = registry.put_image(&ImageSpec::new(PUBLIC, "v1"));
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()))
        .listen_on("0.0.0.0")
        .start()
        .await;
    cache.pull("up", &image).await;
    assert_eq!(registry.count((Kind::Manifest, "HEAD")), 0);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_tag_shows_nothing_but_the_list_does() {
    let scene = scene().await;
    let cache = scene.open_cache().start().await;
    assert_refused(&cache.manifest("up", PUBLIC, "nosuch").await, &[404]);
    let before = scene.registry.count((Kind::Manifest, "HEAD"));
    assert_good(
        &cache.manifest("up", PUBLIC, "v1").await,
        &scene.public.manifest,
    );
    assert_eq!(
        scene.registry.count((Kind::Manifest, "HEAD")),
        before,
        "it was proven by its list of tags"
    );
    // A private one is refused for what it has and what it has not alike.
    assert_refused(&cache.manifest("up", PRIVATE, "nosuch").await, &[403]);
    cache.check_invariants().await;
}

/// The usual answer to our user, and to who shows nothing yet; to strangers this one.
fn but_to_strangers(scene: &Scene, what: Handler) -> Handler {
    let user = Bearer::of(&scene.tokens).identity(USER);
    Handler::new(move |exchange| {
        let shown = exchange.header("authorization").is_some();
        if shown && user.refuse(&exchange).is_some() {
            return what.call(exchange);
        }
        faults::usual().call(exchange)
    })
}

/// Some registries give strangers an empty list of the tags that they hide, and say of everything else that it is not there.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_list_of_tags_shows_nothing() {
    let scene = scene().await;
    let empty = json!({ "name": PRIVATE, "tags": null }).to_string();
    let empty = faults::status(200, &[("Content-Type", "application/json")], empty);
    let missing = faults::error(404, "MANIFEST_UNKNOWN", &[]);
    for (kind, what) in [
        (Kind::Manifest, missing.clone()),
        (Kind::Blob, missing),
        (Kind::Tags, empty),
    ] {
        let matcher = Matcher::from(kind).repo(PRIVATE);
        scene
            .registry
            .script(matcher, but_to_strangers(&scene, what));
    }
    let cache = scene.open_cache().start().await;
    let image = &scene.private;
    for path in [
        manifest_path("up", PRIVATE, "v1"),
        manifest_path("up", PRIVATE, image.manifest.digest),
        blob_path("up", PRIVATE, image.layer().digest),
        format!("/v2/up/{PRIVATE}/tags/list"),
    ] {
        for request in [Request::get(&path), Request::head(&path)] {
            let answer = cache.send(request).await;
            assert_eq!(answer.status, 404, "{path}: {answer}");
        }
    }
    assert_eq!(scene.logins(), 0, "nothing was fetched for strangers");
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proof_outlives_a_restart_and_an_upstream_that_is_down() {
    let scene = scene().await;
    let cache = scene.open_cache().start().await;
    cache.pull("up", &scene.public).await;
    cache.terminate().await;
    cache.restart().await;
    scene.registry.server().stop().await;
    cache.pull("up", &scene.public).await;
    assert!(!cache.manifest("up", PRIVATE, "v1").await.is_whole());
    cache.check_invariants().await;
}

async fn listed(cache: &CacheProcess) -> serde_json::Value {
    cache.get("/v2/_catalog").await.json()["repositories"].clone()
}

/// A file is there a moment before its record is.
async fn assert_listed(cache: &CacheProcess, wanted: serde_json::Value) {
    for _ in 0..100 {
        if listed(cache).await == wanted {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(listed(cache).await, wanted);
}

/// What only the credentials open is not named to those who may not have it, though it is stored.
#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_names_only_what_is_public() {
    let scene = scene().await;
    let open = Registry::start().await;
    let bare = open.put_image(&ImageSpec::new("lib/bare", "v1").seed("bare"));
    let builder = scene.open_cache().line("catalog = true");
    let other = Upstream::new("bare", open.url()).line("serve = \"public\"");
    let cache = builder.upstream(other).start().await;
    cache.pull("up", &scene.public).await;
    // Without credentials there is nothing to hide.
    cache.pull("bare", &bare).await;
    let both = serde_json::json!(["bare/lib/bare", "up/lib/public"]);
    assert_listed(&cache, both.clone()).await;
    assert_not_public(&cache, &scene.private).await;
    assert_eq!(listed(&cache).await, both);
    cache.restart().await;
    assert_eq!(listed(&cache).await, both);
    cache.check_invariants().await;
}

/// What was stored under credentials that are configured no more is not named under others, or under none.
#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_does_not_name_what_other_credentials_opened() {
    let scene = scene().await;
    let desk = tempfile::tempdir().expect("a folder");
    let file = desk.path().join("config.json");
    let url = scene.registry.url();
    let host = url.trim_start_matches("http://");
    let login = STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let auths = serde_json::json!({ "auths": { host: { "auth": login } } });
    std::fs::write(&file, auths.to_string()).expect("write the login file");
    let builder = cache()
        .upstream(Upstream::new("up", scene.registry.url()))
        .line("catalog = true")
        .line(&format!("docker_config = {file:?}"));
    let cache = builder.start().await;
    cache.pull("up", &scene.private).await;
    cache.pull("up", &scene.public).await;
    assert_listed(
        &cache,
        serde_json::json!(["up/lib/private", "up/lib/public"]),
    )
    .await;
    std::fs::write(&file, "{}").expect("write the login file");
    cache.restart().await;
    assert_eq!(listed(&cache).await, serde_json::json!([]));
    cache.check_invariants().await;
}
