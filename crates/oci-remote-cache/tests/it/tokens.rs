//! The token endpoint's rarer ways: refresh tokens by POST, scopes that were too small, answers that are no token.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use testbed::cache::blob_path;
use testbed::token::ANONYMOUS;
use testbed::{
    Basic, Bearer, CacheProcess, Content, Exchange, Handler, Image, ImageSpec, Kind, Matcher,
    Registry, Request, ServeOptions, TokenServer, Upstream, assert_good, faults,
};
use tokio::time::Instant;

use crate::stage::{REPO, assert_holds_nothing, assert_refused, said, up_as};

const REFRESH: &str = "refresh-token-0123456789";

/// A registry for whoever holds the refresh token, and a cache that does.
async fn scene() -> (Registry, TokenServer, CacheProcess, Image) {
    let (registry, cache) =
        up_as(|upstream: Upstream| upstream.credentials("<token>", REFRESH)).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens).identity("<token>"));
    (registry, tokens, cache, image)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_is_exchanged_by_post() {
    let (registry, tokens, cache, image) = scene().await;
    let (forms, minted) = (
        Arc::new(Mutex::new(Vec::new())),
        tokens.mint("<token>", &["repository:lib/app:pull"]),
    );
    let seen = Arc::clone(&forms);
    let answer = Handler::new(move |mut exchange: Exchange| {
        let body = String::from_utf8_lossy(exchange.body()).into_owned();
        let shown = exchange.header("authorization").is_some();
        seen.lock().unwrap().push((body, shown));
        let token = minted.clone();
        async move {
            let answer = json!({ "access_token": token, "expires_in": 300 });
            exchange.json(200, &answer, &[]).await;
        }
    });
    registry.script(Matcher::from(Kind::Token).method("POST"), answer);
    cache.pull("up", &image).await;
    let forms = forms.lock().unwrap().clone();
    assert_eq!(forms.len(), 1, "one exchange for the whole image");
    let (form, shown) = &forms[0];
    assert!(!shown, "the refresh token was shown as a password too");
    for part in [
        "grant_type=refresh_token",
        "scope=repository%3Alib%2Fapp%3Apull",
        "service=testbed",
        "client_id=oci-remote-cache",
        &format!("refresh_token={REFRESH}"),
    ] {
        assert!(
            form.split('&').any(|found| found == part),
            "{part} not in {form}"
        );
    }
    assert_eq!(registry.count((Kind::Token, "GET")), 0);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_post_is_not_known_the_token_is_asked_for_by_get() {
    for status in [400, 401, 404, 405] {
        let (registry, tokens, cache, image) = scene().await;
        tokens.add_user("<token>", REFRESH);
        registry.script(
            Matcher::from(Kind::Token).method("POST"),
            faults::status(status, &[], ""),
        );
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        let asked = registry.server().entries((Kind::Token, "GET"));
        assert_eq!(asked.len(), 1, "{status}");
        assert_eq!(asked[0].parameter("account").as_deref(), Some("<token>"));
        assert!(asked[0].header("authorization").is_some());
        cache.check_invariants().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_that_was_too_small_is_widened_once() {
    let (registry, cache) = up_as(|upstream| upstream).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    let wider = format!(
        "Bearer realm=\"{}\",service=\"testbed\",scope=\"repository:{REPO}:pull,metadata\",error=\"insufficient_scope\"",
        tokens.realm()
    );
    let refusal = || faults::status(403, &[("WWW-Authenticate", wider.as_str())], "");
    // The first answer, to a bare request, is a challenge; the second is refused for its scope.
    registry.script(Matcher::manifests().times(1), faults::usual());
    registry.script(Matcher::manifests().times(1), refusal());
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let scopes: Vec<String> = tokens
        .token_requests()
        .iter()
        .flat_map(|entry| entry.parameters("scope"))
        .collect();
    assert_eq!(
        scopes,
        [
            "repository:lib/app:pull",
            "repository:lib/app:pull,metadata"
        ]
    );
    // For ever: it ends.
    registry.server().clear_log();
    registry.script(Matcher::manifests(), refusal());
    assert_refused(&cache.manifest("up", REPO, "nosuch").await, &[403]);
    assert!(
        registry.count(Kind::Manifest) <= 4,
        "{:?}",
        registry.requests()
    );
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_no_token_are_an_outage() {
    let huge = format!("{{\"token\": \"{}\"}}", "x".repeat(1 << 20));
    for body in [
        "",
        "<html>",
        "{}",
        "{\"token\": \"\"}",
        "{\"token\": \"a\\r\\nX: y\"}",
        huge.as_str(),
    ] {
        let (registry, cache) = up_as(|upstream| upstream).await;
        registry.put_image(&ImageSpec::new(REPO, "v1"));
        let tokens = TokenServer::at(&registry);
        registry.require(Bearer::of(&tokens).identity(ANONYMOUS));
        registry.script(
            Kind::Token,
            faults::status(
                200,
                &[("Content-Type", "application/json")],
                body.to_owned(),
            ),
        );
        assert_refused(&cache.manifest("up", REPO, "v1").await, &[503]);
        assert_holds_nothing(&cache).await;
        cache.check_invariants().await;
    }
}

/// The failure is shared by all who wait and by those who come within a second, and then it is asked again.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_fetch_is_shared_for_a_moment_only() {
    let (registry, cache) = up_as(|upstream| upstream.negative_ttl("0s")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    let fails = Handler::new(move |mut exchange: Exchange| async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        exchange.error(403, "DENIED", &[]).await;
    });
    registry.script(Kind::Token, fails);
    let digests = (0..20).map(|n| Content::blob(64 + n, "nobody has it").digest);
    let storm: Vec<Request> = digests
        .map(|digest| Request::get(&blob_path("up", REPO, digest)))
        .collect();
    let began = Instant::now();
    for answer in testbed::client::storm(cache.port(), storm).await {
        assert_refused(&answer, &[403]);
    }
    assert_eq!(registry.count(Kind::Token), 1, "one fetch for all who ask");
    assert!(began.elapsed() < Duration::from_secs(1), "too slow to tell");
    registry.clear_scripts();
    tokio::time::sleep(Duration::from_millis(1300)).await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    assert_eq!(registry.count(Kind::Token), 2);
    cache.check_invariants().await;
}

/// Push was asked for because the challenge named it; that only pull is granted is enough to pull.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_less_than_was_asked_is_tried() {
    let (registry, cache) = up_as(|upstream| upstream).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens).actions("pull,push,delete"));
    tokens.set_shape(|token| json!({ "access_token": token, "scope": "repository:lib/app:pull" }));
    cache.pull("up", &image).await;
    let asked = tokens.token_requests();
    assert_eq!(asked.len(), 1, "it is used for what follows too");
    assert_eq!(
        asked[0].parameters("scope"),
        ["repository:lib/app:pull,push,delete"]
    );
    cache.check_invariants().await;
}

/// A token that grants nothing is tried as well, once: the registry has the last word, and that is final.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_nothing_is_tried_once() {
    let (registry, cache) = up_as(|upstream| upstream).await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens).identity("somebody-else"));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403]);
    assert_eq!((tokens.asked(), registry.count(Kind::Manifest)), (1, 2));
    cache.check_invariants().await;
}

/// A storm that holds a dead token drops it once, and gets one new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_token_is_replaced_once_for_all() {
    let (registry, cache) = up_as(|upstream| upstream).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[1000; 9]));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    tokens.revoke_all();
    let storm = image
        .layers
        .iter()
        .map(|layer| Request::get(&blob_path("up", REPO, layer.digest)).compare(&layer.data));
    for answer in testbed::client::storm(cache.port(), storm.collect()).await {
        assert!(answer.is_right(), "{answer}");
    }
    assert_eq!(tokens.asked(), 2);
    cache.check_invariants().await;
}

/// A 403 that does not speak of the scope is the last word.
#[tokio::test(flavor = "multi_thread")]
async fn a_plain_403_is_final() {
    let (registry, cache) = up_as(|upstream| upstream).await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    registry.script(Matcher::manifests().once(), faults::usual());
    let plain = format!(
        "Bearer realm=\"{}\",error=\"invalid_token\"",
        tokens.realm()
    );
    let refusal = faults::status(403, &[("WWW-Authenticate", plain.as_str())], "");
    registry.script(Matcher::manifests(), refusal);
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403]);
    assert_eq!((tokens.asked(), registry.count(Kind::Manifest)), (1, 2));
    cache.check_invariants().await;
}

/// A challenge for a password that we do not have is not answered, and not with an empty one either.
#[tokio::test(flavor = "multi_thread")]
async fn basic_is_sent_only_where_it_is_configured() {
    let (registry, cache) = up_as(|upstream| upstream).await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.require(Basic::of("robot", "sesame"));
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403]);
    assert_eq!(registry.count(Kind::Manifest), 1);
    let shown = |entry: &testbed::Entry| entry.header("authorization").is_some();
    assert!(!registry.log().iter().any(shown));
    cache.check_invariants().await;
}

/// A token that was issued long ago, by an endpoint's own cache say, is used for the request at hand and not kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_issued_long_ago_is_not_kept() {
    for (issued_at, asked) in [("2020-01-01T00:00:00Z", 3), ("2999-01-01T00:00:00Z", 1)] {
        let (registry, cache) = up_as(|upstream| upstream).await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        let tokens = TokenServer::at(&registry);
        registry.require(Bearer::of(&tokens));
        tokens.set_shape(move |token| json!({ "token": token, "issued_at": issued_at }));
        cache.pull("up", &image).await;
        assert_eq!(tokens.asked(), asked, "{issued_at}");
        cache.check_invariants().await;
    }
}

/// A token that dies while a body comes stops nothing; what is left of a broken one is asked for with a new token.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_body_goes_on_with_a_new_token() {
    let (registry, cache) = up_as(|upstream| upstream).await;
    let blob = Content::blob(300_000, "broken midway");
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.put_blob(REPO, &blob);
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    assert_eq!(cache.manifest("up", REPO, "v1").await.status, 200);
    tokens.revoke_all();
    // It is given without a look at the token, as if that had been alive at the start.
    let breaks = faults::serve(&blob, ServeOptions::new().reset_at(100_000));
    registry.script(Matcher::blobs().method("GET").once(), breaks);
    let whole = Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data);
    let whole = cache.send(whole).await;
    assert!(whole.is_right(), "{whole}");
    assert_eq!((tokens.asked(), tokens.dead_tokens_seen()), (2, 1));
    cache.check_invariants().await;
}

/// Names a scope as the endpoint it leads to wants it.
fn moved_to(realm: &str) -> String {
    format!("{realm}?service=testbed&scope=repository:{REPO}:pull")
}

/// A token endpoint may redirect, and the password goes as far as its own origin.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_endpoint_that_redirects_takes_the_password_nowhere_else() {
    let (registry, cache) = up_as(|upstream| upstream.credentials("robot", "sesame-robot")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let (own, elsewhere) = (
        TokenServer::at(&registry),
        TokenServer::start_on("localhost").await,
    );
    registry.require(Bearer::of(&elsewhere).realm(&own.realm()));
    let away = faults::redirect(&moved_to(&elsewhere.realm()), 307);
    registry.script(Kind::Token, away);
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let shown = |entry: &testbed::Entry| entry.header("authorization").is_some();
    assert!(registry.entries(Kind::Token).iter().all(shown));
    assert_eq!(elsewhere.asked(), 1);
    assert!(!elsewhere.log().iter().any(shown), "the password was shown");

    // Within the origin it is shown again, and is needed.
    cache.restart_empty().await;
    registry.clear_scripts();
    own.add_user("robot", "sesame-robot");
    registry.require(Bearer::of(&own).identity("robot"));
    let near = faults::redirect(&moved_to("/token"), 307);
    registry.script(Matcher::from(Kind::Token).once(), near);
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    cache.check_invariants().await;
}

/// What holds for a blob's redirects holds for a token endpoint's: no circles, and nothing that is inward or in disguise.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_endpoints_redirects_lead_nowhere_bad() {
    let elsewhere = TokenServer::start().await;
    let port = elsewhere.port();
    for (location, statuses) in [
        ("/token?around".to_owned(), [502, 503]),
        (format!("http://0x7f.1:{port}/token"), [502, 502]),
        (format!("http://0.0.0.0:{port}/token"), [502, 502]),
        (format!("http://u:p@127.0.0.1:{port}/token"), [502, 503]),
        ("file:///etc/passwd".to_owned(), [502, 503]),
    ] {
        let (registry, cache) = up_as(|upstream| upstream).await;
        registry.put_image(&ImageSpec::new(REPO, "v1"));
        registry.require(Bearer::of(&TokenServer::at(&registry)));
        registry.script(Kind::Token, faults::redirect(&location, 307));
        assert_refused(&cache.manifest("up", REPO, "v1").await, &statuses);
        assert!(registry.count(Kind::Token) <= 6, "{location}");
        cache.check_invariants().await;
    }
    assert_eq!(elsewhere.connections(), 0);
}

/// A refresh token is in the body of a POST, and that is sent to the realm alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_is_never_sent_on() {
    let elsewhere = TokenServer::start().await;
    for status in [301, 302, 303, 307, 308] {
        let (registry, _tokens, cache, _image) = scene().await;
        let away = faults::redirect(&moved_to(&elsewhere.realm()), status);
        registry.script(Matcher::from(Kind::Token).method("POST"), away);
        assert_refused(&cache.manifest("up", REPO, "v1").await, &[502, 503]);
        cache.check_invariants().await;
    }
    assert_eq!(elsewhere.connections(), 0);
}

/// The endpoint's 429 is a rate limit like the registry's: passed on, and kept for as long as it says, whatever token is wanted.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_endpoints_rate_limit_is_kept() {
    let (registry, cache) = up_as(|upstream| upstream).await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.require(Bearer::of(&TokenServer::at(&registry)));
    let limited = faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "60")]);
    registry.script(Kind::Token, limited);
    for repo in [REPO, REPO, "other/app"] {
        let answer = cache.manifest("up", repo, "v1").await;
        assert_refused(&answer, &[429]);
        assert_eq!(answer.error_code(), "TOOMANYREQUESTS");
        let wait = answer.number("retry-after").unwrap_or_default();
        assert!((55..=65).contains(&wait), "Retry-After {wait}");
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    assert_eq!(registry.count(Kind::Token), 1);
    assert!(registry.count(Kind::Manifest) <= 2, "the second is spared");
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_is_served_while_the_token_endpoint_limits_us() {
    let (registry, cache) = up_as(|upstream| upstream.tag_ttl("0s")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    cache.pull("up", &image).await;
    tokens.revoke_all();
    let limited = faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "60")]);
    registry.script(Kind::Token, limited);
    for _ in 0..2 {
        let stale = cache.manifest("up", REPO, "v1").await;
        assert_good(&stale, &image.manifest);
        assert!(said(&stale).contains("detail=rate-limited"), "{stale}");
    }
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_endpoints_short_rate_limit_is_waited_for_once() {
    for (times, status) in [(1, 200), (9, 429)] {
        let (registry, cache) = up_as(|upstream| upstream).await;
        registry.put_image(&ImageSpec::new(REPO, "v1"));
        registry.require(Bearer::of(&TokenServer::at(&registry)));
        let limited = faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "1")]);
        registry.script(Matcher::from(Kind::Token).times(times), limited);
        assert_eq!(cache.manifest("up", REPO, "v1").await.status, status);
        assert_eq!(registry.count(Kind::Token), 2);
        cache.check_invariants().await;
    }
}
