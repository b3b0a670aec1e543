//! Where clients show their own logins: what one of them runs into at the upstream is nobody else's.

use std::time::Duration;

use testbed::cache::{blob_path, manifest_path};
use testbed::{Exchange, Handler, ImageSpec, Kind, Matcher, Request, assert_good, faults};
use tokio::time::sleep;

use crate::by_login::{ALICE, BOB, CAROL, PRIVATE, PUBLIC, Scene, scene};

/// How long a 404 is remembered in these tests, and a little more.
const AFTER_A_404: Duration = Duration::from_millis(1200);

/// Tags are asked for each time, proofs last.
async fn asking_scene() -> Scene {
    scene(|upstream| upstream.tag_ttl("0s").line("client_proof_ttl = \"1h\"")).await
}

async fn tags(scene: &Scene, login: &str) -> u16 {
    let list = Request::get(&format!("/v2/up/{PRIVATE}/tags/list"));
    scene.ask(list, Some(login)).await.status
}

/// Registries answer 404 to those whom they do not show that there is something.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_hidden_from_one_login_stays_with_the_others() {
    let scene = asking_scene().await;
    scene.pull(ALICE).await;
    scene.pull(CAROL).await;
    assert_eq!(tags(&scene, ALICE).await, 200);
    let hidden = faults::error(404, "NAME_UNKNOWN", &[]);
    scene.answer(scene.is_from("alice"), hidden);
    assert_eq!(tags(&scene, ALICE).await, 404);
    assert_eq!(scene.tag(Some(ALICE)).await.status, 404);
    // Nothing shows her the repository any longer.
    assert_eq!(scene.layer(Some(ALICE)).await.status, 404);
    scene.registry.server().stop().await;
    assert_good(&scene.tag(Some(CAROL)).await, &scene.private.manifest);
    assert!(scene.layer(Some(CAROL)).await.is_whole());
    assert_eq!(tags(&scene, CAROL).await, 200);
    for answer in [
        scene.tag(Some(ALICE)).await,
        scene.layer(Some(ALICE)).await,
        scene
            .ask(
                Request::get(&format!("/v2/up/{PRIVATE}/tags/list")),
                Some(ALICE),
            )
            .await,
    ] {
        assert!(answer.status >= 400, "{answer}");
    }
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_is_gone_is_gone_for_each_login_that_is_told_so() {
    let scene = asking_scene().await;
    let other = ImageSpec::new(PRIVATE, "v2").seed("stays");
    scene.registry.put_image(&other);
    scene.pull(ALICE).await;
    scene.pull(CAROL).await;
    scene.registry.remove_manifest(PRIVATE, "v1");
    assert_eq!(scene.tag(Some(ALICE)).await.status, 404);
    let before = scene.registry.count(Kind::Manifest);
    assert_eq!(scene.tag(Some(ALICE)).await.status, 404);
    assert_eq!(scene.registry.count(Kind::Manifest), before, "remembered");
    assert_eq!(scene.tag(Some(CAROL)).await.status, 404);
    // The repository is open to both as before, and the digest too.
    let digest = manifest_path("up", PRIVATE, scene.private.manifest.digest);
    for login in [ALICE, CAROL] {
        assert!(scene.layer(Some(login)).await.is_whole());
        let by_digest = scene.ask(Request::get(&digest), Some(login)).await;
        assert_good(&by_digest, &scene.private.manifest);
    }
    scene.registry.server().stop().await;
    sleep(AFTER_A_404).await;
    for login in [ALICE, CAROL] {
        let gone = scene.tag(Some(login)).await;
        assert!(gone.status >= 400, "told that it is gone: {gone}");
    }
    scene.registry.server().resume().await;
    let manifest = &scene.private.manifest;
    scene.registry.put_manifest(PRIVATE, Some("v1"), manifest);
    sleep(AFTER_A_404).await;
    for login in [ALICE, CAROL] {
        assert_good(&scene.tag(Some(login)).await, manifest);
    }
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_one_login_is_not_shown_is_not_given_to_it_though_it_is_fresh() {
    let scene = scene(|upstream| upstream.tag_ttl("1h").line("client_proof_ttl = \"1h\"")).await;
    let other = ImageSpec::new(PRIVATE, "v2").seed("for both");
    scene.registry.put_image(&other);
    scene.pull(CAROL).await;
    // One tag alone is hidden, and she is let in by the list.
    let (alice, usual) = (scene.is_from("alice"), faults::usual());
    let hidden = faults::error(404, "MANIFEST_UNKNOWN", &[]);
    let by_login = Handler::new(move |exchange| {
        if alice(&exchange) {
            hidden.call(exchange)
        } else {
            usual.call(exchange)
        }
    });
    let tag = Matcher::manifests().repo(PRIVATE).of("v1");
    scene.registry.script(tag, by_login);
    assert_eq!(scene.tag(Some(ALICE)).await.status, 404);
    assert_eq!(scene.tag(Some(ALICE)).await.status, 404);
    assert!(scene.layer(Some(ALICE)).await.is_whole());
    assert_good(&scene.tag(Some(CAROL)).await, &scene.private.manifest);
    scene.cache.check_invariants().await;
}

/// Those who come with a token that anyone gets.
fn strangers(scene: &Scene) -> impl Fn(&Exchange) -> bool + use<> {
    let users = ["alice", "bob", "carol"].map(|user| scene.is_from(user));
    move |exchange| {
        let shown = exchange.header("authorization").is_some();
        shown && !users.iter().any(|is_from| is_from(exchange))
    }
}

/// An upstream may fail for one login, or for strangers, and be well for others.
#[tokio::test(flavor = "multi_thread")]
async fn failures_that_one_login_provokes_shut_nobody_else_out() {
    let scene = asking_scene().await;
    scene.pull(ALICE).await;
    let failed = faults::error(500, "UNKNOWN", &[]);
    scene.answer(scene.is_from("alice"), failed);
    let nothing = |n: usize| Request::get(&manifest_path("up", PRIVATE, format!("none{n}")));
    for n in 0..4 {
        let answer = scene.ask(nothing(n), Some(ALICE)).await;
        assert_eq!(answer.status, 503, "{answer}");
    }
    let before = scene.registry.count(Kind::Manifest);
    let alone = scene.ask(nothing(9), Some(ALICE)).await;
    assert_eq!(alone.status, 503, "{alone}");
    let asked = scene.registry.count(Kind::Manifest) - before;
    assert!(asked <= 1, "for her it is left alone: {asked}");
    scene.pull(CAROL).await;
    let answer = scene.ask(nothing(9), Some(CAROL)).await;
    assert_eq!(answer.status, 404, "{answer}");
    let public = scene.ask(Request::get(&manifest_path("up", PUBLIC, "v1")), None);
    assert_eq!(public.await.status, 200);
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_that_strangers_provoke_shut_no_login_out() {
    let scene = asking_scene().await;
    let failed = faults::error(500, "UNKNOWN", &[]);
    scene.answer(strangers(&scene), failed);
    for _ in 0..4 {
        assert_eq!(scene.tag(None).await.status, 503);
    }
    scene.pull(ALICE).await;
    assert_eq!(scene.tag(Some(BOB)).await.status, 403);
    assert_eq!(scene.tag(None).await.status, 503);
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_cannot_be_reached_is_left_alone_by_all() {
    let scene = asking_scene().await;
    scene.pull(ALICE).await;
    scene.pull(CAROL).await;
    scene.registry.server().stop().await;
    let nothing = |n: usize| Request::get(&manifest_path("up", PRIVATE, format!("none{n}")));
    for n in 0..3 {
        assert_eq!(scene.ask(nothing(n), Some(ALICE)).await.status, 503);
    }
    let carol = scene.ask(nothing(9), Some(CAROL)).await;
    assert!(
        carol.text().contains("too often in a row"),
        "{}",
        carol.text()
    );
    scene.cache.check_invariants().await;
}

/// Whoever was let in as anyone may be has a login too.
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_closes_to_strangers_is_asked_for_with_the_login_at_once() {
    let scene = asking_scene().await;
    let images: Vec<_> = (0..4)
        .map(|n| {
            let spec = ImageSpec::new(&format!("lib/closing{n}"), "v1").seed(&n.to_string());
            scene.registry.put_image(&spec)
        })
        .collect();
    for image in &images {
        let config = blob_path("up", &image.repo, image.config.digest);
        let config = scene.ask(Request::get(&config), Some(ALICE)).await;
        assert_good(&config, &image.config);
    }
    assert_eq!(scene.logins(), 0);
    scene.close_to_all_but("alice");
    let layer = blob_path("up", &images[1].repo, images[1].layer().digest);
    for (request, image) in [
        Request::get(&manifest_path("up", &images[0].repo, "v1")),
        Request::get(&layer),
        Request::head(&blob_path("up", &images[2].repo, images[2].layer().digest)),
        Request::get(&format!("/v2/up/{}/tags/list", images[3].repo)),
    ]
    .into_iter()
    .zip(&images)
    {
        let answer = scene.ask(request.clone(), Some(ALICE)).await;
        assert_eq!(answer.status, 200, "{request:?}: {answer}");
        let config = blob_path("up", &image.repo, image.config.digest);
        for (login, status) in [(None, 401), (Some(BOB), 403), (Some(ALICE), 200)] {
            let answer = scene.ask(Request::get(&config), login).await;
            assert_eq!(answer.status, status, "{request:?}: {answer}");
        }
    }
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_strangers_get_no_more_of_today_is_asked_for_with_the_login() {
    let scene = asking_scene().await;
    let public = manifest_path("up", PUBLIC, "v1");
    let stranger = scene.ask(Request::get(&public), Some(ALICE)).await;
    assert_eq!(stranger.status, 200);
    let (strangers, usual) = (strangers(&scene), faults::usual());
    let limited = faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "120")]);
    let by_login = Handler::new(move |exchange| {
        if strangers(&exchange) {
            limited.call(exchange)
        } else {
            usual.call(exchange)
        }
    });
    scene.registry.script(Kind::Manifest, by_login);
    let other = ImageSpec::new(PUBLIC, "v2").seed("not held yet");
    let other = scene.registry.put_image(&other);
    let asked = Request::get(&manifest_path("up", PUBLIC, "v2"));
    for login in [None, Some("someone:else-entirely")] {
        let answer = scene.ask(asked.clone(), login).await;
        assert_eq!(answer.status, 429, "{login:?}: {answer}");
    }
    assert_good(&scene.ask(asked, Some(ALICE)).await, &other.manifest);
    scene.cache.check_invariants().await;
}
