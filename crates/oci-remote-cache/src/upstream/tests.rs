//! The dealings with a registry from the first request to the last byte, against a scripted one.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use testbed::token::challenge;
use testbed::{
    Basic, Bearer, Content, Ending, Gate, Image, ImageSpec, Kind, Matcher, Origin, Registry,
    TokenServer, faults,
};
use url::Url;

use super::{
    Answer, Ask, Fault, Identity, Keyring, Login, Method, Mirrors, Password, Resource, Settings,
    Stakes, Upstream, UpstreamError,
};
use crate::clock::Clock;
use crate::deadline::Deadline;
use crate::metrics::Metrics;
use crate::names::{CredentialId, UpstreamId};
use crate::secret::Secret;
use crate::tasks::Tasks;

const REPO: &str = "lib/app";

struct Bench {
    registry: Registry,
    image: Image,
    metrics: Metrics,
}

impl Bench {
    async fn new() -> Self {
        let registry = Registry::start().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[5000, 6000]));
        Self {
            registry,
            image,
            metrics: Metrics::new(),
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            id: UpstreamId::new("up"),
            url: Url::parse(&self.registry.url()).unwrap(),
            mirrors: Vec::new(),
            keyring: Keyring::default(),
            token_realms: Vec::new(),
            redirect_hosts: Vec::new(),
            trusted_networks: Vec::new(),
            ca_file: None,
            proxy: None,
            own_addresses: Vec::new(),
            user_agent: "oci-remote-cache/test".into(),
            offline: super::Offline::default(),
        }
    }

    fn with(&self, settings: Settings) -> Arc<Upstream> {
        Arc::new(Upstream::new(settings, self.metrics.clone(), Clock::system()).unwrap())
    }

    fn upstream(&self) -> Arc<Upstream> {
        self.with(self.settings())
    }

    fn robot(&self) -> Settings {
        let robot = Login {
            username: "robot".into(),
            password: Password::Said(Secret::new("hunter2".into())),
        };
        Settings {
            keyring: Keyring::new(vec![(String::new(), robot)], None, Tasks::new()),
            ..self.settings()
        }
    }

    /// A layer that the registry redirects to a content host.
    async fn redirected(&self) -> (Content, Origin) {
        let layer = self.image.layer().clone();
        let origin = Origin::start().await;
        origin.hold(&layer);
        let location = origin.location(layer.digest, "sig=1");
        let blob = Matcher::blobs().of(layer.digest);
        self.registry.script(blob, faults::redirect(&location, 307));
        (layer, origin)
    }
}

fn ask(resource: Resource) -> Ask {
    Ask {
        repository: REPO.parse().unwrap(),
        resource,
        method: Method::Get,
        range: None,
        accept: None,
        mirror: 0,
        mirrors: Mirrors::Welcome,
        identity: Identity::Configured,
        stakes: Stakes::Needed,
    }
}

fn tag(tag: &str) -> Ask {
    ask(Resource::Manifest(tag.parse().unwrap()))
}

fn blob(content: &Content) -> Ask {
    ask(Resource::Blob(content.digest.to_string().parse().unwrap()))
}

fn head(of: Ask) -> Ask {
    Ask {
        method: Method::Head,
        ..of
    }
}

async fn send(upstream: &Upstream, ask: &Ask) -> Result<Answer, UpstreamError> {
    upstream.send(ask, Deadline::for_answer()).await
}

async fn body(upstream: &Upstream, ask: &Ask) -> Bytes {
    let mut answer = send(upstream, ask).await.unwrap();
    answer
        .read_to(1 << 20, Deadline::for_answer())
        .await
        .unwrap()
}

async fn fault(upstream: &Upstream, ask: &Ask) -> Fault {
    send(upstream, ask).await.unwrap_err().fault().clone()
}

// Auth.

#[tokio::test]
async fn one_token_serves_a_whole_image() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench
        .registry
        .require(Bearer::of(&tokens).actions("pull,push"));
    let upstream = bench.upstream();
    assert_eq!(body(&upstream, &tag("v1")).await, bench.image.manifest.data);
    for layer in bench.image.blobs() {
        assert_eq!(body(&upstream, &blob(layer)).await, layer.data);
    }
    assert_eq!(tokens.asked(), 1);
    let scopes = tokens.token_requests()[0].parameters("scope");
    assert_eq!(scopes, ["repository:lib/app:pull,push"]);
    let refused = bench.registry.log();
    let refused = refused.iter().filter(|entry| entry.status == 401).count();
    assert_eq!(refused, 1, "only the very first request goes bare");
}

#[tokio::test]
async fn challenges_in_all_forms() {
    type Form = fn(&str, &str) -> Vec<String>;
    let forms: [Form; 6] = [
        |realm, scope| {
            vec![format!(
                r#"Basic realm="b", Bearer realm="{realm}",service="s",scope="{scope}""#
            )]
        },
        |realm, scope| [challenge(realm, scope), vec![r#"Basic realm="b""#.into()]].concat(),
        |realm, scope| {
            vec![format!(
                r#"bearer realm="{realm}",service=s,scope="{scope}","#
            )]
        },
        |realm, _scope| vec![format!(r#"Bearer realm="{realm}""#)],
        |_realm, scope| vec![format!(r#"Bearer realm="/token",scope="{scope}""#)],
        |_realm, _scope| vec![r#"Bearer realm="/token",scope="""#.into()],
    ];
    for (number, form) in forms.into_iter().enumerate() {
        let bench = Bench::new().await;
        let tokens = TokenServer::at(&bench.registry);
        bench.registry.require(Bearer::of(&tokens).form(form));
        let read = body(&bench.upstream(), &tag("v1")).await;
        assert_eq!(read, bench.image.manifest.data, "form {number}");
    }
}

#[tokio::test]
async fn a_revoked_token_is_renewed_once() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let upstream = bench.upstream();
    body(&upstream, &tag("v1")).await;
    tokens.revoke_all();
    let (one, other) = (tag("v1"), blob(bench.image.layer()));
    tokio::join!(body(&upstream, &one), body(&upstream, &other));
    assert_eq!(tokens.asked(), 2);
}

#[tokio::test]
async fn a_storm_needs_one_token() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let upstream = bench.upstream();
    let manifest = tag("v1");
    let storm = (0..100).map(|_| body(&upstream, &manifest));
    let answers = futures_util::future::join_all(storm).await;
    assert!(
        answers
            .iter()
            .all(|read| *read == bench.image.manifest.data)
    );
    assert_eq!(tokens.asked(), 1);
}

#[tokio::test]
async fn tokens_without_a_life_are_used_once() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let upstream = bench.upstream();
    for life in [0, -1] {
        tokens.set_expires_in(Some(json!(life)));
        body(&upstream, &tag("v1")).await;
        tokens.revoke_all();
        body(&upstream, &tag("v1")).await;
        tokens.revoke_all();
    }
    assert_eq!(tokens.dead_tokens_seen(), 0);
}

#[tokio::test]
async fn a_wall_clock_that_jumps_changes_no_tokens_life() {
    const DAY: Duration = Duration::from_hours(24);
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let (clock, metrics) = (Clock::system(), bench.metrics.clone());
    let upstream = Upstream::new(bench.settings(), metrics, clock.clone()).unwrap();
    body(&upstream, &tag("v1")).await;
    clock.advance(DAY);
    body(&upstream, &tag("v1")).await;
    assert_eq!(tokens.asked(), 1, "the token lives");
    tokens.revoke_all();
    tokens.set_expires_in(Some(json!(1)));
    body(&upstream, &tag("v1")).await;
    clock.set_back(3 * DAY);
    tokio::time::sleep(Duration::from_secs(1)).await;
    body(&upstream, &tag("v1")).await;
    assert_eq!(tokens.asked(), 3, "the token is dead");
    assert_eq!(tokens.dead_tokens_seen(), 1, "the one that was revoked");
}

#[tokio::test]
async fn a_strange_challenge_to_an_expired_token_is_asked_again_bare() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let upstream = bench.upstream();
    body(&upstream, &tag("v1")).await;
    tokens.revoke_all();
    bench.registry.script(
        Matcher::manifests().once(),
        faults::status(401, &[("WWW-Authenticate", r#"Basic realm="harbor""#)], ""),
    );
    body(&upstream, &tag("v1")).await;
    let auth: Vec<bool> = bench
        .registry
        .entries(Kind::Manifest)
        .iter()
        .map(|entry| entry.header("authorization").is_some())
        .collect();
    assert_eq!(auth, [false, true, true, false, true]);
}

#[tokio::test]
async fn who_is_always_refused_stops_asking() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench
        .registry
        .require(Bearer::of(&tokens).identity("nobody"));
    let upstream = bench.upstream();
    for sends in [2, 3] {
        bench.registry.clear_log();
        let denied = fault(&upstream, &tag("v1")).await;
        assert!(
            matches!(&denied, Fault::Denied { status: 401, .. }),
            "{denied:?}"
        );
        assert_eq!(bench.registry.count(Kind::Manifest), sends);
    }
}

#[tokio::test]
async fn a_plain_403_is_final() {
    let bench = Bench::new().await;
    let denied = faults::error(403, "DENIED", &[]);
    bench.registry.script(Matcher::manifests(), denied);
    let expected = Fault::Denied {
        status: 403,
        code: Some("DENIED".into()),
        refused: super::Refused::Anonymous,
    };
    assert_eq!(fault(&bench.upstream(), &tag("v1")).await, expected);
    assert_eq!(bench.registry.count(Kind::Manifest), 1);
}

#[tokio::test]
async fn a_token_endpoint_that_denies_has_the_last_word() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let denied = faults::error(403, "DENIED", &[]);
    bench.registry.script(Kind::Token, denied);
    let denied = fault(&bench.upstream(), &tag("v1")).await;
    assert!(matches!(denied, Fault::Denied { status: 403, .. }));
    let robot = fault(&bench.with(bench.robot()), &tag("v1")).await;
    assert!(
        matches!(
            robot,
            Fault::Denied {
                refused: super::Refused::Rights,
                ..
            }
        ),
        "{robot:?}"
    );
    bench.registry.clear_scripts();
    let wrong = faults::error(401, "UNAUTHORIZED", &[]);
    bench.registry.script(Kind::Token, wrong);
    let robot = fault(&bench.with(bench.robot()), &tag("v1")).await;
    assert!(
        matches!(
            robot,
            Fault::Denied {
                refused: super::Refused::Login,
                ..
            }
        ),
        "{robot:?}"
    );
    bench.registry.clear_scripts();
    let broken = faults::error(500, "UNKNOWN", &[]);
    bench.registry.script(Kind::Token, broken);
    let failed = fault(&bench.upstream(), &tag("v1")).await;
    assert!(matches!(failed, Fault::TokenFailed(_)), "{failed:?}");
    assert!(failed.is_outage());
}

#[tokio::test]
async fn credentials_stay_with_the_registrys_own_realm() {
    let bench = Bench::new().await;
    let stranger = TokenServer::start_on("localhost").await;
    stranger.add_user("robot", "hunter2");
    bench.registry.require(Bearer::of(&stranger));
    let upstream = bench.with(bench.robot());
    let answer = send(&upstream, &tag("v1")).await.unwrap();
    assert!(answer.credential().is_anonymous());
    let seen = stranger.token_requests();
    assert!(
        seen.iter()
            .all(|entry| entry.header("authorization").is_none())
    );
    assert!(
        seen.iter()
            .all(|entry| entry.parameter("account").is_none())
    );

    let named = Settings {
        token_realms: vec!["localhost".parse().unwrap()],
        ..bench.robot()
    };
    bench
        .registry
        .require(Bearer::of(&stranger).identity("robot"));
    let answer = send(&bench.with(named), &tag("v1")).await.unwrap();
    assert_eq!(*answer.credential(), CredentialId::configured("robot"));
}

#[tokio::test]
async fn basic_is_sent_to_who_asks_for_it() {
    let bench = Bench::new().await;
    bench.registry.require(Basic::of("robot", "hunter2"));
    let upstream = bench.with(bench.robot());
    for _ in 0..2 {
        let answer = send(&upstream, &tag("v1")).await.unwrap();
        assert_eq!(*answer.credential(), CredentialId::configured("robot"));
    }
    assert_eq!(
        bench.registry.count(Kind::Manifest),
        3,
        "the second at once"
    );
    let denied = fault(&bench.upstream(), &tag("v1")).await;
    assert!(matches!(denied, Fault::Denied { status: 401, .. }));
}

#[tokio::test]
async fn what_is_open_to_all_is_asked_bare_and_stays_public() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    tokens.add_user("robot", "hunter2");
    let private = Bearer::of(&tokens).protects(|repo| repo == "lib/private");
    bench.registry.require(private);
    bench
        .registry
        .put_image(&ImageSpec::new("lib/private", "v1"));
    bench.registry.put_image(&ImageSpec::new("lib/other", "v1"));
    let upstream = bench.with(bench.robot());
    for (repository, anonymous) in [(REPO, true), ("lib/private", false), ("lib/other", true)] {
        let ask = Ask {
            repository: repository.parse().unwrap(),
            ..tag("v1")
        };
        let answer = send(&upstream, &ask).await.unwrap();
        assert_eq!(
            answer.credential().is_anonymous(),
            anonymous,
            "{repository}"
        );
    }
}

#[tokio::test]
async fn a_401_without_challenge_is_explained_by_the_root() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let silent = faults::status(401, &[], "");
    bench.registry.script(Matcher::manifests().once(), silent);
    let read = body(&bench.upstream(), &tag("v1")).await;
    assert_eq!(read, bench.image.manifest.data);
    assert_eq!(bench.registry.count(Kind::Ping), 1);
}

#[tokio::test]
async fn a_token_fetch_outlives_who_started_it() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let upstream = bench.upstream();
    let gate = Gate::new();
    bench.registry.script(Kind::Token, faults::held(&gate));
    let manifest = tag("v1");
    tokio::select! {
        read = body(&upstream, &manifest) => panic!("read {} bytes without a token", read.len()),
        () = gate.reached() => {}
    }
    let follower = body(&upstream, &manifest);
    let opener = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        gate.open();
    };
    let (read, ()) = tokio::join!(follower, opener);
    assert_eq!(read, bench.image.manifest.data);
    assert_eq!(bench.registry.count(Kind::Token), 1);
}

#[tokio::test]
async fn nothing_printed_shows_a_secret() {
    let bench = Bench::new().await;
    let (layer, _origin) = bench.redirected().await;
    let settings = bench.robot();
    assert!(!format!("{settings:?}").contains("hunter2"));
    let upstream = bench.with(settings);
    let answer = send(&upstream, &blob(&layer)).await.unwrap();
    let shown = format!("{upstream:?} {answer:?}");
    assert!(!shown.contains("sig"), "{shown}");
}

// Redirects.

#[tokio::test]
async fn authorization_stays_at_home() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let upstream = bench.upstream();
    body(&upstream, &tag("v1")).await;
    let (layer, origin) = bench.redirected().await;
    assert_eq!(body(&upstream, &blob(&layer)).await, layer.data);
    let asked = bench.registry.entries((Kind::Blob, "GET"));
    assert!(asked[0].header("authorization").is_some());
    let seen = origin.log();
    assert_eq!(seen.len(), 1);
    assert!(seen[0].header("authorization").is_none());
    assert!(seen[0].header("referer").is_none());
    assert_eq!(seen[0].header("accept-encoding"), Some("identity"));
}

#[tokio::test]
async fn authorization_is_kept_within_the_origin() {
    let bench = Bench::new().await;
    let tokens = TokenServer::at(&bench.registry);
    bench.registry.require(Bearer::of(&tokens));
    let layer = bench.image.layer().clone();
    let other = format!("/v2/{REPO}/blobs/{}?download", layer.digest);
    let redirect = faults::redirect(&other, 302);
    bench
        .registry
        .script(Matcher::blobs().of(layer.digest).query(""), redirect);
    let upstream = bench.upstream();
    body(&upstream, &tag("v1")).await;
    assert_eq!(body(&upstream, &blob(&layer)).await, layer.data);
    assert_eq!(tokens.asked(), 1);
}

#[tokio::test]
async fn redirects_that_go_nowhere() {
    let bench = Bench::new().await;
    let layer = blob(bench.image.layer());
    let upstream = bench.upstream();
    let around = format!("/v2/{REPO}/blobs/{}", bench.image.layer().digest);
    let elsewhere = Origin::start().await;
    let port = elsewhere.port();
    for location in [
        around,
        "file:///etc/passwd".into(),
        "http://u:p@127.0.0.1/".into(),
    ] {
        bench.registry.clear_scripts();
        let redirect = faults::redirect(&location, 307);
        bench.registry.script(Matcher::blobs(), redirect);
        let fault = fault(&upstream, &layer).await;
        assert!(
            matches!(fault, Fault::BadRedirect(_)),
            "{location}: {fault:?}"
        );
    }
    for host in [
        "0.0.0.0",
        "[::ffff:127.0.0.1]",
        "0x7f.1",
        "2130706433",
        "169.254.169.254",
    ] {
        bench.registry.clear_scripts();
        let location = format!("http://{host}:{port}/x");
        bench
            .registry
            .script(Matcher::blobs(), faults::redirect(&location, 307));
        let blocked = fault(&upstream, &layer).await;
        assert!(
            matches!(blocked, Fault::Forbidden(_)),
            "{host}: {blocked:?}"
        );
        let realm = format!(r#"Bearer realm="http://{host}:{port}/token""#);
        let challenge = faults::status(401, &[("WWW-Authenticate", &realm)], "");
        bench.registry.script(Matcher::manifests(), challenge);
        let blocked = fault(&upstream, &tag("v1")).await;
        assert!(
            matches!(blocked, Fault::Forbidden(_)),
            "{host}: {blocked:?}"
        );
    }
    assert_eq!(elsewhere.connections(), 0);
}

#[tokio::test]
async fn our_own_listener_is_no_target() {
    let bench = Bench::new().await;
    let (layer, origin) = bench.redirected().await;
    let own = format!("127.0.0.1:{}", origin.port());
    let settings = Settings {
        own_addresses: vec![own.parse().unwrap()],
        ..bench.settings()
    };
    let by_address = fault(&bench.with(settings.clone()), &blob(&layer)).await;
    assert!(matches!(by_address, Fault::Forbidden(_)), "{by_address:?}");
    let named = format!("http://localhost:{}/x", origin.port());
    bench.registry.clear_scripts();
    bench
        .registry
        .script(Matcher::blobs(), faults::redirect(&named, 307));
    let by_name = fault(&bench.with(settings), &blob(&layer)).await;
    assert!(matches!(by_name, Fault::Forbidden(_)), "{by_name:?}");
    assert_eq!(origin.connections(), 0);
}

#[tokio::test]
async fn an_expired_signed_url_is_asked_for_again() {
    let basic = ("WWW-Authenticate", r#"Basic realm="cdn""#);
    let cases: [(u16, &[(&str, &str)]); 5] = [
        (400, &[]),
        (401, &[]),
        (401, &[basic]),
        (403, &[]),
        (410, &[]),
    ];
    for (status, headers) in cases {
        let bench = Bench::new().await;
        let (layer, origin) = bench.redirected().await;
        let expired = || faults::status(status, headers, "<Error/>");
        origin.script(Matcher::blobs().once(), expired());
        let upstream = bench.upstream();
        assert_eq!(body(&upstream, &blob(&layer)).await, layer.data);
        assert_eq!(bench.registry.count(Kind::Blob), 2);
        origin.script(Matcher::blobs(), expired());
        assert_eq!(fault(&upstream, &blob(&layer)).await, Fault::Expired);
        assert_eq!(bench.registry.count(Kind::Blob), 4);
    }
}

#[tokio::test]
async fn head_of_a_redirected_blob_asks_for_one_byte() {
    let bench = Bench::new().await;
    let (layer, origin) = bench.redirected().await;
    let no_head = faults::status(403, &[], "<Error/>");
    origin.script(Matcher::blobs().method("HEAD"), no_head);
    let upstream = bench.upstream();
    let answer = send(&upstream, &head(blob(&layer))).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.content_length(), Some(layer.size()));
    assert_eq!(answer.content_range(), None);
    let empty = faults::status(416, &[("Content-Range", "bytes */0")], "");
    origin.script(Matcher::blobs().method("GET"), empty);
    let answer = send(&upstream, &head(blob(&layer))).await.unwrap();
    assert_eq!(answer.content_length(), Some(0));
}

#[tokio::test]
async fn a_registry_behind_a_redirect_gets_an_anonymous_token() {
    let bench = Bench::new().await;
    let regional = Registry::start().await;
    let tokens = TokenServer::at(&regional);
    regional.require(Bearer::of(&tokens));
    let image = regional.put_image(&ImageSpec::new("region/app", "v1"));
    let location = format!("{}/v2/region/app/manifests/v1", regional.url());
    bench
        .registry
        .script(Matcher::manifests(), faults::redirect(&location, 307));
    let upstream = bench.with(bench.robot());
    let mut answer = send(&upstream, &tag("v1")).await.unwrap();
    assert!(answer.credential().is_anonymous());
    let read = answer.read_to(1 << 20, Deadline::for_answer()).await;
    assert_eq!(read.unwrap(), image.manifest.data);
    let seen = tokens.token_requests();
    assert!(
        seen.iter()
            .all(|entry| entry.header("authorization").is_none())
    );
}

// Faults.

#[tokio::test]
async fn passing_failures_are_tried_again() {
    let bench = Bench::new().await;
    let upstream = bench.upstream();
    let layer = bench.image.layer().clone();
    for status in [500, 502, 503, 504] {
        let failing = faults::error(status, "UNKNOWN", &[]);
        bench.registry.script(Matcher::blobs().once(), failing);
        assert_eq!(body(&upstream, &blob(&layer)).await, layer.data, "{status}");
    }
    let reset = faults::drop_connection();
    bench.registry.script(Matcher::blobs().times(2), reset);
    assert_eq!(body(&upstream, &blob(&layer)).await, layer.data);
}

#[tokio::test]
async fn a_dead_registry_trips_the_breaker() {
    let bench = Bench::new().await;
    let upstream = bench.upstream();
    let failing = faults::error(503, "UNAVAILABLE", &[]);
    bench.registry.script(Matcher::any(), failing);
    assert_eq!(fault(&upstream, &tag("v1")).await, Fault::Status(503));
    assert_eq!(fault(&upstream, &tag("v1")).await, Fault::Status(503));
    assert_eq!(bench.registry.count(Kind::Manifest), 5);
    let open = fault(&upstream, &tag("v1")).await;
    assert!(matches!(open, Fault::BreakerOpen { .. }), "{open:?}");
    assert_eq!(bench.registry.count(Kind::Manifest), 5);
    bench.registry.clear_scripts();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    body(&upstream, &tag("v1")).await;
    body(&upstream, &tag("v1")).await;
}

#[tokio::test]
async fn nobody_there_is_a_connect_fault() {
    let bench = Bench::new().await;
    let settings = Settings {
        url: Url::parse("http://127.0.0.1:1").unwrap(),
        ..bench.settings()
    };
    let fault = fault(&bench.with(settings), &tag("v1")).await;
    assert!(matches!(fault, Fault::Connect(_)), "{fault:?}");
    let text = bench.metrics.render();
    assert!(text.contains(r#"outcome="connect"} 3"#), "{text}");
}

#[tokio::test]
async fn a_short_rate_limit_is_waited_for_and_a_long_one_closes_the_gate() {
    let bench = Bench::new().await;
    let upstream = bench.upstream();
    let limited = |after| faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", after)]);
    bench
        .registry
        .script(Matcher::manifests().once(), limited("1"));
    body(&upstream, &tag("v1")).await;
    assert_eq!(bench.registry.count(Kind::Manifest), 2);
    bench.registry.script(Matcher::manifests(), limited("120"));
    for _ in 0..3 {
        let Fault::RateLimited { retry_after } = fault(&upstream, &tag("v1")).await else {
            panic!("no rate limit");
        };
        assert!(
            (100..=120).contains(&retry_after.as_secs()),
            "{retry_after:?}"
        );
    }
    assert_eq!(
        bench.registry.count(Kind::Manifest),
        3,
        "the gate is closed"
    );
}

#[tokio::test]
async fn bodies_that_are_not_what_they_claim() {
    let bench = Bench::new().await;
    let upstream = bench.upstream();
    let length = [("Content-Length", "100")];
    bench.registry.script(
        Matcher::manifests().of("short"),
        faults::declared(&length, "only this", Ending::Close),
    );
    let mut answer = send(&upstream, &tag("short")).await.unwrap();
    let read = answer.read_to(1000, Deadline::for_answer()).await;
    assert!(matches!(read.unwrap_err().fault(), Fault::Broken(_)));

    bench.registry.script(
        Matcher::manifests().of("flood"),
        faults::flood(&[("Connection", "close")], 1 << 20),
    );
    let mut answer = send(&upstream, &tag("flood")).await.unwrap();
    let read = answer.read_to(100_000, Deadline::for_answer()).await;
    assert_eq!(*read.unwrap_err().fault(), Fault::TooLarge);

    let gzip = [("Content-Encoding", "gzip")];
    let coded = faults::status(200, &gzip, "x");
    bench
        .registry
        .script(Matcher::manifests().of("gzip"), coded);
    let encoded = fault(&upstream, &tag("gzip")).await;
    assert_eq!(encoded, Fault::Encoded("gzip".into()));
}

#[tokio::test]
async fn ranges_are_asked_for_closed_and_told() {
    let bench = Bench::new().await;
    let upstream = bench.upstream();
    let layer = bench.image.layer().clone();
    let ask = Ask {
        range: Some(oci::Slice { start: 10, end: 20 }),
        ..blob(&layer)
    };
    let answer = send(&upstream, &ask).await.unwrap();
    assert_eq!(answer.status(), 206);
    let range = answer.content_range().unwrap();
    assert_eq!((range.slice.start, range.slice.end), (10, 20));
    let mut body = answer.into_body();
    let mut read = Vec::new();
    while let Some(chunk) = body.chunk().await.unwrap() {
        read.extend_from_slice(&chunk);
    }
    assert_eq!(read, layer.data[10..20]);
    assert_eq!(body.chunk().await.unwrap(), None, "the end stays the end");
    let seen = bench.registry.entries(Kind::Blob);
    assert_eq!(seen[0].header("range"), Some("bytes=10-19"));

    let outside = faults::status(416, &[], "");
    bench.registry.script(Matcher::blobs(), outside);
    assert_eq!(fault(&upstream, &ask).await, Fault::RangeRefused);
}

#[tokio::test]
async fn mirrors_never_see_the_credentials() {
    let bench = Bench::new().await;
    let mirror = Registry::start().await;
    let tokens = TokenServer::at(&mirror);
    tokens.add_user("robot", "hunter2");
    mirror.require(Bearer::of(&tokens));
    mirror.put_image(&ImageSpec::new(REPO, "v1"));
    let settings = Settings {
        mirrors: vec![Url::parse(&mirror.url()).unwrap()],
        ..bench.robot()
    };
    let upstream = bench.with(settings);
    assert_eq!(upstream.places(), 2);
    let second = Ask {
        mirror: 1,
        ..tag("v1")
    };
    let answer = send(&upstream, &second).await.unwrap();
    assert!(answer.credential().is_anonymous());
    assert!(mirror.log().iter().all(|entry| {
        !entry
            .header("authorization")
            .is_some_and(|value| value.starts_with("Basic"))
    }));
    assert!(bench.registry.log().is_empty());
}

#[tokio::test]
async fn not_found_keeps_the_code() {
    let bench = Bench::new().await;
    let missing = fault(&bench.upstream(), &tag("nope")).await;
    let expected = Fault::NotFound {
        code: Some("MANIFEST_UNKNOWN".into()),
    };
    assert_eq!(missing, expected);
}

/// A question that hurries and hangs is asked again long before an answer's time is up.
#[tokio::test]
async fn a_question_that_hurries_is_asked_again() {
    let bench = Bench::new().await;
    let layer = bench.image.layer().clone();
    let script = faults::sequence(vec![faults::silent(), faults::usual()]);
    bench
        .registry
        .script(Matcher::blobs().of(layer.digest), script);
    let blob = super::resume::BlobAsk {
        upstream: bench.upstream(),
        repository: REPO.parse().unwrap(),
        digest: layer.digest.to_string().parse().unwrap(),
        place: 0,
        mixing: super::resume::Mixing::Allowed,
        identity: Identity::Configured,
    };
    let whole = oci::Slice {
        start: 0,
        end: layer.size(),
    };
    let mut stream = blob.later(whole, layer.size(), None).hurried();
    let first = tokio::time::timeout(Duration::from_secs(10), stream.next()).await;
    assert!(first.unwrap().unwrap().is_some());
}
