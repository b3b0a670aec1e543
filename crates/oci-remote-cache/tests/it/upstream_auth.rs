//! How registries want to be asked: tokens fetched once, kept for their life, shown to nobody else.

use std::time::Duration;

use serde_json::{Value, json};
use testbed::cache::{blob_path, manifest_path};
use testbed::client::storm;
use testbed::token::challenge;
use testbed::{
    Auth, Basic, Bearer, CacheProcess, Exchange, Image, ImageSpec, Kind, Registry, Request,
    Response, TokenServer, Upstream, assert_good,
};
use tokio::time::sleep;

use crate::stage::{
    REPO, assert_holds, assert_holds_nothing, assert_refused, cache, get_manifest, up, up_as,
    up_with_image,
};

const USER: &str = "robot";
const PASSWORD: &str = "correct-horse-battery";

/// A registry with its own token service, and an image nobody asked for yet.
async fn guarded() -> (Registry, TokenServer, CacheProcess, Image) {
    let (registry, cache, image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    (registry, tokens, cache, image)
}

/// As [`guarded`], for one user only, whom the cache knows.
async fn guarded_for_a_user() -> (Registry, TokenServer, CacheProcess, Image) {
    let (registry, cache) = up_as(|upstream| upstream.credentials(USER, PASSWORD)).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::at(&registry);
    tokens.add_user(USER, PASSWORD);
    registry.require(Bearer::of(&tokens).identity(USER));
    (registry, tokens, cache, image)
}

/// Pulls manifests that are not held yet, one request each.
async fn ask_for_tags(registry: &Registry, cache: &CacheProcess, tags: &[&str]) {
    for tag in tags {
        let image = registry.put_image(&ImageSpec::new(REPO, tag));
        assert_good(&cache.manifest("up", REPO, tag).await, &image.manifest);
    }
}

/// A01
#[tokio::test(flavor = "multi_thread")]
async fn a_challenge_is_answered_with_its_own_scope() {
    let (registry, cache, image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens).actions("pull,push"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let asked = tokens.token_requests();
    assert_eq!(asked.len(), 1);
    assert_eq!(
        asked[0].parameters("scope"),
        ["repository:lib/app:pull,push"]
    );
    assert_eq!(asked[0].parameter("service").as_deref(), Some("testbed"));
    assert_eq!(asked[0].header("authorization"), None);
    let wanted = [
        get_manifest(REPO, "v1"),
        "GET /token".to_owned(),
        get_manifest(REPO, "v1"),
    ];
    assert_eq!(registry.requests(), wanted);
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// A02
#[tokio::test(flavor = "multi_thread")]
async fn one_token_pulls_a_whole_image() {
    let (registry, tokens, cache, image) = guarded().await;
    cache.pull("up", &image).await;
    assert_eq!((tokens.asked(), tokens.dead_tokens_seen()), (1, 0));
    assert_eq!(
        registry.count(Kind::Blob),
        2,
        "the blobs carried the token at once"
    );
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

/// Challenges as registries write them; `{r}` is the realm and `{s}` the scope, and each item is a line of its own.
const FORMS: [&[&str]; 11] = [
    &["Basic realm=\"x\", Bearer realm=\"{r}\",service=\"testbed\",scope=\"{s}\""],
    &["Bearer realm=\"{r}\",service=\"testbed\",scope=\"{s}\", Basic realm=\"x\""],
    &[
        "Bearer realm=\"{r}\",service=\"testbed\",scope=\"{s}\"",
        "Basic realm=\"x\"",
    ],
    &[
        "Basic realm=\"x\"",
        "Bearer realm=\"{r}\",service=\"testbed\",scope=\"{s}\"",
    ],
    &["bearer REALM=\"{r}\", Service=\"testbed\", scope=\"{s}\""],
    &["Bearer realm=\"{r}\",service=testbed,error=invalid_token"],
    &["Bearer realm=\"{r}\",scope=\"{s}\""],
    &["Bearer realm=\"{r}\",service=\"testbed\""],
    &["Bearer realm=\"{r}\",service=\"testbed\",scope=\"\""],
    &["Bearer realm=\"{r}\",service=\"testbed\",scope=\"{s}\","],
    &["Bearer realm=\"/token\",service=\"testbed\",scope=\"{s}\""],
];

/// A03
#[tokio::test(flavor = "multi_thread")]
async fn challenges_are_read_in_every_form() {
    let mut registries = Vec::new();
    let mut builder = cache();
    for (n, form) in FORMS.iter().enumerate() {
        let registry = Registry::start().await;
        let tokens = TokenServer::at(&registry);
        registry.require(Bearer::of(&tokens).form(|realm, scope| {
            let fill = |line: &&str| line.replace("{r}", realm).replace("{s}", scope);
            form.iter().map(fill).collect()
        }));
        builder = builder.upstream(Upstream::new(&format!("up{n}"), registry.url()));
        registries.push((registry, tokens));
    }
    let cache = builder.start().await;
    for (n, (registry, tokens)) in registries.iter().enumerate() {
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        assert_good(
            &cache.manifest(&format!("up{n}"), REPO, "v1").await,
            &image.manifest,
        );
        let asked = tokens.token_requests();
        let scopes: Vec<String> = asked
            .iter()
            .flat_map(|entry| entry.parameters("scope"))
            .collect();
        assert_eq!(scopes, ["repository:lib/app:pull"], "{:?}", FORMS[n]);
    }
    cache.check_invariants().await;
}

/// A 401 that names no way in: the ping's challenge is the one (Google's registry did so).
#[tokio::test(flavor = "multi_thread")]
async fn a_401_without_a_challenge_is_asked_about_at_the_ping() {
    let (registry, cache, image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens).form(|realm, scope| {
        if scope.is_empty() {
            challenge(realm, scope)
        } else {
            Vec::new()
        }
    }));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert_eq!((tokens.asked(), registry.count(Kind::Ping)), (1, 1));
    cache.check_invariants().await;
}

/// A04
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_found_under_both_names() {
    let shapes: [fn(&str) -> Value; 4] = [
        |token| json!({"access_token": token}),
        |token| json!({"token": token}),
        |token| json!({"token": token, "access_token": token}),
        |token| json!({"token": token, "access_token": "another one"}),
    ];
    for shape in shapes {
        let (_registry, tokens, cache, image) = guarded().await;
        tokens.set_shape(shape);
        cache.pull("up", &image).await;
        assert_eq!((tokens.asked(), tokens.dead_tokens_seen()), (1, 0));
        cache.check_invariants().await;
    }
}

/// A05: the rule at a tenth of the time; that nothing said means a minute is told by a token being used again at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_used_for_its_life_and_no_longer() {
    let (registry, cache, _image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    tokens.set_expires_in(Some(json!(2)));
    registry.require(Bearer::of(&tokens).lifetime(Duration::from_secs(2)));
    ask_for_tags(&registry, &cache, &["a", "b", "c"]).await;
    assert_eq!(tokens.asked(), 1);
    sleep(Duration::from_millis(2050)).await;
    ask_for_tags(&registry, &cache, &["d", "e"]).await;
    assert_eq!((tokens.asked(), tokens.dead_tokens_seen()), (2, 0));
    cache.check_invariants().await;
}

/// A05
#[tokio::test(flavor = "multi_thread")]
async fn a_token_without_a_life_is_used_again() {
    let (registry, tokens, cache, _image) = guarded().await;
    tokens.set_expires_in(None);
    ask_for_tags(&registry, &cache, &["a", "b", "c"]).await;
    assert_eq!((tokens.asked(), tokens.dead_tokens_seen()), (1, 0));
    cache.check_invariants().await;
}

/// A06
#[tokio::test(flavor = "multi_thread")]
async fn odd_lifetimes_are_tamed() {
    for (expires_in, asked) in [
        (json!(0), 3),
        (json!(-1), 3),
        (json!("300"), 1),
        (json!(1_000_000_000_000_u64), 1),
        (json!("soon"), 3),
    ] {
        let (registry, tokens, cache, _image) = guarded().await;
        tokens.set_expires_in(Some(expires_in.clone()));
        ask_for_tags(&registry, &cache, &["a", "b", "c"]).await;
        assert_eq!(
            (tokens.asked(), tokens.dead_tokens_seen()),
            (asked, 0),
            "{expires_in}"
        );
        cache.check_invariants().await;
    }
}

/// A07
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_not_shown_to_a_strange_host() {
    let (registry, cache) = up_as(|upstream| upstream.credentials(USER, PASSWORD)).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    // The same machine under another name is another host.
    let tokens = TokenServer::start_on("localhost").await;
    tokens.add_user(USER, PASSWORD);
    registry.require(Bearer::of(&tokens).identity(USER));
    let refused = cache.manifest("up", REPO, "v1").await;
    assert_refused(&refused, &[403, 404]);
    let shown = |entry: &testbed::Entry| {
        entry.header("authorization").is_some() || entry.query.contains(PASSWORD)
    };
    assert!(!tokens.log().iter().any(shown), "the password was shown");
    assert_eq!(
        tokens
            .token_requests()
            .iter()
            .filter(|entry| entry.method == "POST")
            .count(),
        0
    );
    assert_holds_nothing(&cache).await;

    // What is public there is served with a token that nobody logged in for.
    registry.require(Bearer::of(&tokens));
    sleep(Duration::from_millis(1100)).await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert!(!tokens.log().iter().any(shown), "the password was shown");
    cache.check_invariants().await;
}

/// A08
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_shown_to_the_hosts_that_are_named() {
    let tokens = TokenServer::start_on("localhost").await;
    tokens.add_user(USER, PASSWORD);
    for named in ["localhost".to_owned(), tokens.authority()] {
        let (registry, cache) = up_as(|upstream| {
            upstream
                .credentials(USER, PASSWORD)
                .token_realms(&[named.as_str()])
        })
        .await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        registry.require(Bearer::of(&tokens).identity(USER));
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        assert_holds(&cache, [&image.manifest]).await;
        cache.check_invariants().await;
    }
    assert_eq!(tokens.asked(), 2);
    assert!(
        tokens
            .token_requests()
            .iter()
            .all(|entry| entry.header("authorization").is_some())
    );

    let other_port = format!("localhost:{}", tokens.port() ^ 1);
    let (registry, cache) = up_as(|upstream| {
        upstream
            .credentials(USER, PASSWORD)
            .token_realms(&[other_port.as_str()])
    })
    .await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.require(Bearer::of(&tokens).identity(USER));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 404]);
    assert!(
        tokens
            .token_requests()
            .iter()
            .skip(2)
            .all(|entry| entry.header("authorization").is_none())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_used_where_the_registry_is_its_own_realm() {
    let (registry, tokens, cache, image) = guarded_for_a_user().await;
    cache.pull("up", &image).await;
    let asked = tokens.token_requests();
    assert_eq!((asked.len(), tokens.dead_tokens_seen()), (1, 0));
    assert!(
        asked[0]
            .header("authorization")
            .is_some_and(|value| value.starts_with("Basic "))
    );
    assert_eq!(registry.count(Kind::Blob), 2);
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_basic_gets_basic() {
    let (registry, cache) = up_as(|upstream| upstream.credentials(USER, PASSWORD)).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.require(Basic::of(USER, PASSWORD));
    cache.pull("up", &image).await;
    assert_eq!(
        registry.count(Kind::Blob),
        2,
        "asked with the password at once"
    );
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.check_invariants().await;
}

/// A10
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_dies_between_layers_is_renewed() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[1000, 2000, 3000]));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    for (n, layer) in image.layers.iter().enumerate() {
        if n == 2 {
            tokens.revoke_all();
        }
        assert_good(&cache.blob("up", REPO, layer.digest).await, layer);
    }
    assert_eq!((tokens.asked(), tokens.dead_tokens_seen()), (2, 1));
    cache.check_invariants().await;
}

/// A registry that answers a dead token with somebody else's challenge, as Harbor does.
#[derive(Debug)]
struct Harbor(Bearer);

impl Auth for Harbor {
    fn refuse(&self, exchange: &Exchange) -> Option<Vec<String>> {
        let challenges = self.0.refuse(exchange)?;
        let bare = exchange.header("authorization").is_none();
        Some(if bare {
            challenges
        } else {
            vec!["Basic realm=\"harbor\"".to_owned()]
        })
    }
}

/// A11
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_token_is_followed_by_a_bare_request() {
    let (registry, cache, image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    registry.require(Harbor(Bearer::of(&tokens)));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    tokens.revoke_all();
    registry.clear_log();
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    let bare: Vec<bool> = registry
        .entries(Kind::Blob)
        .iter()
        .map(|entry| entry.header("authorization").is_none())
        .collect();
    assert_eq!(bare, [false, true, false]);
    assert_eq!(tokens.asked(), 2);
    cache.check_invariants().await;
}

/// Refuses whatever it is shown.
#[derive(Debug)]
struct Never(String);

impl Auth for Never {
    fn refuse(&self, exchange: &Exchange) -> Option<Vec<String>> {
        Some(challenge(
            &self.0,
            &format!("repository:{}:pull", exchange.entry().repo),
        ))
    }
}

/// A12
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_always_refuses_is_not_asked_for_ever() {
    let (registry, cache, image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    registry.require(Never(tokens.realm()));
    let manifest = cache.manifest("up", REPO, "v1").await;
    assert_refused(&manifest, &[403, 404]);
    assert!(
        registry.count(Kind::Manifest) <= 3,
        "{:?}",
        registry.requests()
    );
    let blob = cache.blob("up", REPO, image.layer().digest).await;
    assert_refused(&blob, &[403, 404]);
    assert!(registry.count(Kind::Blob) <= 3, "{:?}", registry.requests());
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// A14
#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_two_credentials_never_cross() {
    let (first, second) = (Registry::start().await, Registry::start().await);
    let tokens = TokenServer::start().await;
    let mut builder = cache();
    let mut images = Vec::new();
    for (registry, user) in [(&first, "alice"), (&second, "bob")] {
        tokens.add_user(user, PASSWORD);
        registry.require(Bearer::of(&tokens).identity(user));
        images.push(registry.put_image(&ImageSpec::new(REPO, "v1").seed(user)));
        builder = builder.upstream(Upstream::new(user, registry.url()).credentials(user, PASSWORD));
    }
    let cache = builder.start().await;
    for (user, image) in ["alice", "bob"].iter().zip(&images) {
        cache.pull(user, image).await;
    }
    assert_eq!((tokens.asked(), tokens.dead_tokens_seen()), (2, 0));
    for (registry, user) in [(&first, "alice"), (&second, "bob")] {
        let tokens = registry
            .log()
            .iter()
            .filter_map(|entry| entry.header("authorization").map(str::to_owned))
            .collect::<Vec<_>>();
        assert!(
            !tokens.is_empty() && tokens.iter().all(|token| token.contains(user)),
            "{user}: another's token was sent"
        );
    }
    cache.check_invariants().await;
}

/// A16
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_cold_clients_share_one_token() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[10_000; 9]));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    let requests = (0..100).map(|n| match image.layers.get(n % 10) {
        Some(layer) => Request::get(&blob_path("up", REPO, layer.digest)).compare(&layer.data),
        None => Request::get(&manifest_path("up", REPO, "v1")).compare(&image.manifest.data),
    });
    let responses = storm(cache.port(), requests.collect()).await;
    assert!(
        responses.iter().all(Response::is_right),
        "{:?}",
        responses.iter().find(|response| !response.is_right())
    );
    assert_eq!((tokens.asked(), tokens.dead_tokens_seen()), (1, 0));
    assert_eq!(
        registry
            .entries(Kind::Blob)
            .iter()
            .filter(|entry| entry.status == 200)
            .count(),
        9
    );
    cache.check_invariants().await;
}

/// A17
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_client_is_shown_upstream() {
    let (registry, cache, image) = up_with_image().await;
    let marks = [
        ("Authorization", "Bearer client-token"),
        ("Cookie", "session=client-cookie"),
        ("Proxy-Authorization", "Basic client-proxy"),
        ("Referer", "http://client.example/"),
        ("X-Forwarded-For", "192.0.2.77"),
        ("Forwarded", "for=192.0.2.77"),
        ("Origin", "http://client.example"),
        ("User-Agent", "client-agent/1.0"),
        ("X-Client", "client-header"),
    ];
    let parts = [
        (manifest_path("up", REPO, "v1"), &image.manifest),
        (blob_path("up", REPO, image.layer().digest), image.layer()),
    ];
    for (path, content) in parts {
        let request = marks
            .iter()
            .fold(Request::get(&path), |request, (name, value)| {
                request.header(name, value)
            });
        assert_good(&cache.send(request).await, content);
    }
    for entry in registry.log() {
        for (name, value) in &entry.headers {
            let theirs = value.contains("client") || value.contains("192.0.2.77");
            assert!(!theirs, "{entry}: {name}: {value}");
        }
        assert!(
            entry
                .header("user-agent")
                .is_some_and(|agent| agent.starts_with("oci-remote-cache/"))
        );
    }
    assert_eq!(registry.requests().len(), 2);
    cache.check_invariants().await;
}

/// A token service that fails is an outage, not a refusal: what is held is served.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_service_that_is_down_is_an_outage() {
    let (registry, cache) = up_as(|upstream| upstream.tag_ttl("0s")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::start().await;
    tokens.set_expires_in(Some(json!(0)));
    registry.require(Bearer::of(&tokens));
    cache.pull("up", &image).await;
    tokens.stop().await;
    let stale = cache.manifest("up", REPO, "v1").await;
    assert_good(&stale, &image.manifest);
    assert!(stale.header("warning").is_some(), "no warning");
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    assert_refused(&cache.manifest("up", REPO, "v2").await, &[502, 503, 504]);
    cache.check_invariants().await;
}
