//! What is served of an upstream that has credentials, to clients nobody knows: only what anyone may pull there.

use testbed::token::Auth;
use testbed::{
    Bearer, CacheBuilder, CacheProcess, Exchange, Image, ImageSpec, Kind, Registry, TokenServer,
    Upstream, assert_good,
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
