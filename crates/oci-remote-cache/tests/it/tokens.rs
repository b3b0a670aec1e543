//! The token endpoint's rarer ways: refresh tokens by POST, scopes that were too small, answers that are no token.

use std::sync::{Arc, Mutex};

use serde_json::json;
use testbed::token::ANONYMOUS;
use testbed::{
    Bearer, CacheProcess, Exchange, Handler, Image, ImageSpec, Kind, Matcher, Registry,
    TokenServer, Upstream, assert_good, faults,
};

use crate::stage::{REPO, assert_holds_nothing, assert_refused, up_as};

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
