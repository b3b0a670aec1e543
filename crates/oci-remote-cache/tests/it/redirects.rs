//! Redirects are followed here and never shown to a client, without carrying a credential to where it does not belong.

use std::time::Duration;

use testbed::cache::blob_path;
use testbed::{
    Basic, Bearer, CacheProcess, Content, ImageSpec, Kind, Matcher, Origin, Registry, Request,
    TokenServer, assert_good, faults,
};
use tokio::time::Instant;

use crate::stage::{
    REPO, assert_holds, assert_holds_nothing, assert_refused, up, up_as, up_with_blob,
    up_with_image, up_without_ttl,
};

/// A registry that redirects its one blob to a content host that refuses whoever shows a credential.
async fn with_origin(host: &str, status: u16) -> (Registry, Origin, CacheProcess, Content) {
    let (registry, cache, blob) = up_with_blob(200_000).await;
    let origin = Origin::start_on(host).await;
    origin.hold(&blob);
    registry.script(
        Kind::Blob,
        faults::redirect(&origin.location(blob.digest, "sig=1"), status),
    );
    (registry, origin, cache, blob)
}

/// R01
#[tokio::test(flavor = "multi_thread")]
async fn another_origin_never_sees_the_authorization() {
    for (host, status) in [
        ("127.0.0.1", 307),
        ("localhost", 302),
        ("127.0.0.1", 301),
        ("127.0.0.1", 303),
        ("localhost", 308),
    ] {
        let (registry, cache) = up().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        let (origin, tokens) = (Origin::start_on(host).await, TokenServer::at(&registry));
        registry.require(Bearer::of(&tokens));
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        let layer = image.layer();
        origin.hold(layer);
        registry.script(
            Kind::Blob,
            faults::redirect(&origin.location(layer.digest, "sig=1"), status),
        );
        let answer = cache.blob("up", REPO, layer.digest).await;
        assert_good(&answer, layer);
        assert_eq!(answer.header("location"), None);
        assert_eq!(
            (
                registry.count(Kind::Blob),
                origin.count((Kind::Blob, "GET"))
            ),
            (1, 1),
            "{host} {status}"
        );
        let asked = &origin.log()[0];
        assert_eq!(
            (
                asked.header("authorization"),
                asked.header("referer"),
                asked.query.as_str()
            ),
            (None, None, "sig=1")
        );
        assert_holds(&cache, [&image.manifest, layer]).await;
        cache.check_invariants().await;
    }
}

/// R02
#[tokio::test(flavor = "multi_thread")]
async fn the_same_origin_sees_the_authorization() {
    let (registry, cache, image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    let path = format!("/v2/{REPO}/blobs/{}", image.layer().digest);
    for (n, location) in [
        format!("{}{path}?download=1", registry.url()),
        format!("{path}?download=1"),
    ]
    .iter()
    .enumerate()
    {
        registry.clear_scripts();
        registry.clear_log();
        registry.script(Matcher::blobs().query(""), faults::redirect(location, 302));
        assert_good(
            &cache.blob("up", REPO, image.layer().digest).await,
            image.layer(),
        );
        let last = registry.log().pop().expect("a request");
        assert_eq!(
            (last.query.as_str(), last.status),
            ("download=1", 200),
            "{n}"
        );
        assert!(
            last.header("authorization")
                .is_some_and(|value| value.starts_with("Bearer "))
        );
        assert_holds(&cache, [image.layer()]).await;
        cache.restart_empty().await;
    }
    cache.check_invariants().await;
}

/// R02: a password too.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_origin_sees_the_password() {
    let (registry, cache) =
        up_as(|upstream| upstream.credentials("robot", "correct-horse-battery")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    registry.require(Basic::of("robot", "correct-horse-battery"));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let path = format!("/v2/{REPO}/blobs/{}?download=1", image.layer().digest);
    registry.script(Matcher::blobs().query(""), faults::redirect(&path, 307));
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    cache.check_invariants().await;
}

/// A way that leaves the origin and comes back carries nothing any more.
#[tokio::test(flavor = "multi_thread")]
async fn an_authorization_that_was_dropped_stays_dropped() {
    let (registry, cache, image) = up_with_image().await;
    let tokens = TokenServer::at(&registry);
    registry.require(Bearer::of(&tokens));
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    let origin = Origin::start().await;
    let back = format!("{}/elsewhere", registry.url());
    registry.script(
        Kind::Blob,
        faults::redirect(&origin.location(image.layer().digest, "sig=1"), 307),
    );
    registry.script(
        Kind::Other,
        faults::status(200, &[], image.layer().data.clone()),
    );
    origin.script(Matcher::any(), faults::redirect(&back, 307));
    assert_good(
        &cache.blob("up", REPO, image.layer().digest).await,
        image.layer(),
    );
    assert_eq!(
        registry.entries(Kind::Other)[0].header("authorization"),
        None
    );
    cache.check_invariants().await;
}

/// R04
#[tokio::test(flavor = "multi_thread")]
async fn redirects_end() {
    let (registry, cache, blob) = up_with_blob(1000).await;
    let path = format!("/v2/{REPO}/blobs/{}", blob.digest);
    let numbered = faults::redirect_by(307, |entry| {
        let hop: u32 = entry.query.parse().unwrap_or(0);
        format!("{}?{}", entry.path, hop + 1)
    });
    for endless in [
        faults::redirect(&path, 307),
        faults::redirect(&format!("{path}?again"), 307),
        numbered,
    ] {
        registry.clear_scripts();
        registry.clear_log();
        registry.script(Kind::Blob, endless);
        let began = Instant::now();
        assert_refused(&cache.blob("up", REPO, blob.digest).await, &[502]);
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{:?}",
            began.elapsed()
        );
        assert!(
            registry.count(Kind::Blob) <= 7,
            "{} hops",
            registry.count(Kind::Blob)
        );
        tokio::time::sleep(crate::stage::AFTER_A_FAILURE).await;
    }
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// R05
#[tokio::test(flavor = "multi_thread")]
async fn redirects_that_lead_nowhere_are_refused() {
    let (registry, cache) = up().await;
    let listener = Origin::start().await;
    let authority = listener.authority();
    let bad = [
        Some("file:///etc/passwd".to_owned()),
        Some(format!("http://user:secret@{authority}/cdn/x")),
        Some(format!("ftp://{authority}/cdn/x")),
        Some("javascript:alert(1)".to_owned()),
        Some("http://".to_owned()),
        Some("http://[::1/".to_owned()),
        None,
    ];
    for (n, location) in bad.iter().enumerate() {
        let blob = Content::blob(1000, &n.to_string());
        let headers: Vec<(&str, &str)> = location
            .iter()
            .map(|location| ("Location", location.as_str()))
            .collect();
        registry.script(
            Matcher::blobs().of(blob.digest),
            faults::status(307, &headers, ""),
        );
        let refused = cache.blob("up", REPO, blob.digest).await;
        assert_refused(&refused, &[502]);
        assert!(!refused.text().contains("secret"), "{}", refused.text());
    }
    assert_eq!(listener.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// R06
#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_answered_although_the_content_host_refuses_head() {
    for host in ["127.0.0.1", "localhost"] {
        let (_registry, origin, cache, blob) = with_origin(host, 307).await;
        origin.script((Kind::Blob, "HEAD"), faults::status(403, &[], ""));
        let head = cache.head_blob("up", REPO, blob.digest).await;
        assert_eq!(
            (head.status, head.number("content-length")),
            (200, Some(blob.size())),
            "{head}"
        );
        assert!(
            origin.sent(Kind::Blob) <= 1,
            "{} bytes for a HEAD",
            origin.sent(Kind::Blob)
        );
        assert_eq!(origin.count((Kind::Blob, "HEAD")), 0, "signed for GET");
        assert_holds_nothing(&cache).await;
        cache.check_invariants().await;
    }
}

/// Manifests are redirected too (registry.k8s.io).
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_behind_a_redirect_is_fetched() {
    let (registry, cache, _) = up_with_blob(1).await;
    let (other, image) = (
        Registry::start().await,
        ImageSpec::new("images/app", "v1").build(),
    );
    other.put_manifest("images/app", Some("v1"), &image.manifest);
    let tokens = TokenServer::at(&other);
    other.require(Bearer::of(&tokens));
    registry.script(
        Kind::Manifest,
        faults::redirect(&format!("{}/v2/images/app/manifests/v1", other.url()), 307),
    );
    let answer = cache.manifest("up", REPO, "v1").await;
    assert_good(&answer, &image.manifest);
    assert_eq!(answer.header("location"), None);
    assert_eq!(
        (registry.count(Kind::Manifest), tokens.asked()),
        (1, 1),
        "anonymous at where it leads"
    );
    assert_holds(&cache, [&image.manifest]).await;
    cache.check_invariants().await;
}

/// A range of a redirected blob is a range of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_a_redirected_blob_is_exact() {
    let (registry, origin, cache, blob) = with_origin("127.0.0.1", 307).await;
    let part = cache
        .send(Request::get(&blob_path("up", REPO, blob.digest)).range("100-199"))
        .await;
    assert_eq!(
        (part.status, part.body == blob.data.slice(100..200)),
        (206, true),
        "{part}"
    );
    assert_holds(&cache, [&blob]).await;
    assert_eq!(
        (registry.count(Kind::Blob), origin.count(Kind::Blob)),
        (1, 1)
    );
    cache.check_invariants().await;
}

/// R04: as many hops as are allowed.
#[tokio::test(flavor = "multi_thread")]
async fn five_hops_are_followed_and_a_sixth_is_not() {
    for (hops, followed) in [(5, true), (6, false)] {
        let (registry, cache, blob) = up_with_blob(1000).await;
        let path = format!("/v2/{REPO}/blobs/{}", blob.digest);
        for hop in 0..hops {
            let from = match hop {
                0 => String::new(),
                _ => format!("hop={hop}"),
            };
            let next = faults::redirect(&format!("{path}?hop={}", hop + 1), 307);
            registry.script(Matcher::blobs().query(&from), next);
        }
        let answer = cache.blob("up", REPO, blob.digest).await;
        if followed {
            assert_good(&answer, &blob);
        } else {
            assert_refused(&answer, &[502]);
        }
        assert_eq!(registry.count(Kind::Blob), 6, "{hops} hops");
        cache.check_invariants().await;
    }
}

/// Five statuses say where to go on; others do not, whatever they carry (305 once named a proxy).
#[tokio::test(flavor = "multi_thread")]
async fn other_statuses_are_no_redirects() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let origin = Origin::start().await;
    let layer = image.layer();
    origin.hold(layer);
    for status in [300, 304, 305, 306, 399] {
        registry.clear_scripts();
        let away = faults::redirect(&origin.location(layer.digest, "sig=1"), status);
        registry.script(Matcher::any(), away);
        assert_refused(&cache.blob("up", REPO, layer.digest).await, &[502]);
        assert_refused(&cache.manifest("up", REPO, "v1").await, &[502]);
        tokio::time::sleep(crate::stage::AFTER_A_FAILURE).await;
    }
    assert_eq!(origin.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// Where a redirect led is forgotten at once, also where it calls itself permanent.
#[tokio::test(flavor = "multi_thread")]
async fn a_permanent_redirect_is_not_remembered() {
    for status in [301, 308] {
        let (registry, cache) = up_without_ttl().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        let origin = Origin::start().await;
        origin.hold(image.layer());
        let forever = [("Cache-Control", "max-age=31536000, immutable")];
        let kept = |location: String| {
            let headers = [("Location", location.as_str()), forever[0]];
            faults::status(status, &headers, "")
        };
        let blob = kept(origin.location(image.layer().digest, "sig=1"));
        registry.script(Kind::Blob, blob);
        let manifest = kept(format!("/v2/{REPO}/manifests/v1?moved"));
        registry.script(Matcher::manifests().query(""), manifest);
        for _ in 0..2 {
            let head = cache.head_blob("up", REPO, image.layer().digest).await;
            assert_eq!(head.status, 200);
            assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        }
        assert_eq!(registry.count(Kind::Blob), 2, "{status}");
        assert_eq!(registry.count(Matcher::manifests().query("")), 2);
        cache.check_invariants().await;
    }
}

/// A content host that asks for a login gets none: not the password, not the registry's token. An anonymous token is all that it may
/// be shown, also where its realm is the registry's own, which knows our password.
#[tokio::test(flavor = "multi_thread")]
async fn a_content_host_that_challenges_is_shown_nothing_of_ours() {
    let (registry, cache) = up_as(|upstream| upstream.credentials("robot", "sesame-robot")).await;
    let tokens = TokenServer::at(&registry);
    tokens.add_user("robot", "sesame-robot");
    registry.require(Bearer::of(&tokens).identity("robot"));
    let origin = Origin::start().await;
    let own_realm = format!("Bearer realm=\"{}\",service=\"testbed\"", tokens.realm());
    let challenges = ["Basic realm=\"cdn\"", &own_realm];
    for (n, challenge) in challenges.iter().enumerate() {
        let repo = format!("lib/app{n}");
        let (led, own) = (
            Content::blob(1000, &repo),
            Content::blob(2000, &format!("{repo} at home")),
        );
        registry.put_blob(&repo, &own);
        assert_good(&cache.blob("up", &repo, own.digest).await, &own);
        let away = faults::redirect(&origin.location(led.digest, "sig=1"), 307);
        registry.script(Matcher::blobs().of(led.digest), away);
        let refusal = faults::status(401, &[("WWW-Authenticate", challenge)], "");
        origin.script(Matcher::blobs().of(led.digest), refusal);
        let refused = cache.blob("up", &repo, led.digest).await;
        assert_refused(&refused, &[403, 502, 503]);
    }
    for entry in origin.log() {
        let shown = entry
            .header("authorization")
            .unwrap_or("Bearer tok-anonymous-");
        assert!(shown.starts_with("Bearer tok-anonymous-"), "{shown}");
    }
    let with_password: Vec<Vec<String>> = tokens
        .token_requests()
        .iter()
        .filter(|entry| entry.header("authorization").is_some())
        .map(|entry| entry.parameters("scope"))
        .collect();
    // One for each repository, at the registry's word: the content host's 401 dropped none and asked for none.
    let wanted = ["repository:lib/app0:pull", "repository:lib/app1:pull"];
    assert_eq!(with_password, wanted.map(|scope| vec![scope.to_owned()]));
    cache.check_invariants().await;
}

/// The token of a registry that a redirect led to is that registry's: the next one, and a realm in disguise, see nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_on_the_way_goes_no_further() {
    let (registry, cache, blob) = up_with_blob(1000).await;
    let (regional, origin) = (Registry::start().await, Origin::start().await);
    let tokens = TokenServer::at(&regional);
    regional.require(Bearer::of(&tokens));
    origin.hold(&blob);
    let further = faults::redirect(&origin.location(blob.digest, "sig=1"), 307);
    // Whoever has no token is refused before the redirect.
    regional.script(Matcher::blobs().once(), faults::usual());
    regional.script(Kind::Blob, further);
    let there = format!("{}/v2/region/app/blobs/{}", regional.url(), blob.digest);
    registry.script(Kind::Blob, faults::redirect(&there, 307));
    // The origin refuses whoever shows an authorization.
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    let shown = |entry: &testbed::Entry| entry.header("authorization").is_some();
    assert_eq!(
        regional.log().iter().filter(|entry| shown(entry)).count(),
        1
    );
    assert!(!origin.log().iter().any(shown) && !registry.log().iter().any(shown));

    let (other, stranger) = (Content::blob(1000, "other"), TokenServer::start().await);
    let disguised = format!("http://0x7f.1:{}/token", stranger.port());
    regional.clear_scripts();
    regional.require(Bearer::of(&tokens).realm(&disguised));
    let there = format!("{}/v2/region/app/blobs/{}", regional.url(), other.digest);
    registry.clear_scripts();
    registry.script(Kind::Blob, faults::redirect(&there, 307));
    assert_refused(&cache.blob("up", REPO, other.digest).await, &[502]);
    assert_eq!(stranger.connections(), 0);
    cache.check_invariants().await;
}
