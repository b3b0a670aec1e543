//! Clients that show their own logins at an upstream: each is served what its own opens, and bytes are stored once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use testbed::cache::{blob_path, manifest_path};
use testbed::image::ACCEPT_ALL;
use testbed::{
    Auth, Basic, Bearer, CacheBuilder, CacheProcess, Content, Exchange, Gate, Handler, Image,
    ImageSpec, Kind, Matcher, Registry, Request, Response, ServeOptions, TokenServer, Upstream,
    assert_good, faults,
};
use tokio::time::sleep;

use crate::stage::{cache, said};

pub(crate) const PUBLIC: &str = "lib/public";
pub(crate) const PRIVATE: &str = "lib/private";

pub(crate) const ALICE: &str = "alice:sesame-alice";
pub(crate) const BOB: &str = "bob:sesame-bob";
pub(crate) const CAROL: &str = "carol:sesame-carol";
const USERS: [&str; 3] = [ALICE, BOB, CAROL];

/// How long a refused login is remembered in these tests, and a little more.
const AFTER_A_REFUSAL: Duration = Duration::from_millis(1200);

/// Who may pull from the private repository; anyone may from the public one.
#[derive(Clone, Debug)]
struct Doors {
    anyone: Arc<Bearer>,
    users: Arc<HashMap<&'static str, Bearer>>,
    members: Arc<Mutex<Vec<&'static str>>>,
}

impl Auth for Doors {
    fn refuse(&self, exchange: &Exchange) -> Option<Vec<String>> {
        if exchange.entry().repo != PRIVATE {
            return self.anyone.refuse(exchange);
        }
        let members = self.members.lock().unwrap().clone();
        let admitted = members
            .iter()
            .any(|user| self.users[user].refuse(exchange).is_none());
        if admitted {
            return None;
        }
        // One whose identity nobody has: its challenge is the usual one.
        self.users["nobody"].refuse(exchange)
    }
}

pub(crate) struct Scene {
    pub(crate) registry: Registry,
    tokens: TokenServer,
    doors: Doors,
    pub(crate) cache: CacheProcess,
    public: Image,
    pub(crate) private: Image,
}

pub(crate) async fn scene(say: impl FnOnce(Upstream) -> Upstream) -> Scene {
    scene_with(say, |builder| builder).await
}

async fn scene_with(
    say: impl FnOnce(Upstream) -> Upstream,
    of_the_cache: impl FnOnce(CacheBuilder) -> CacheBuilder,
) -> Scene {
    let registry = Registry::start().await;
    let tokens = TokenServer::at(&registry);
    let mut users = HashMap::new();
    for login in USERS {
        let (name, password) = login.split_once(':').unwrap();
        tokens.add_user(name, password);
        users.insert(name, Bearer::of(&tokens).identity(name));
    }
    users.insert("nobody", Bearer::of(&tokens).identity("nobody"));
    let doors = Doors {
        anyone: Arc::new(Bearer::of(&tokens)),
        users: Arc::new(users),
        members: Arc::new(Mutex::new(vec!["alice", "carol"])),
    };
    registry.require(doors.clone());
    let upstream = Upstream::new("up", registry.url())
        .line("credentials = \"client\"")
        .negative_ttl("1s");
    let mut builder = cache().trace().upstream(say(upstream)).listen_on("0.0.0.0");
    for login in USERS {
        let (_, password) = login.split_once(':').unwrap();
        builder = builder.secret(password).secret(&STANDARD.encode(login));
    }
    Scene {
        public: registry.put_image(&ImageSpec::new(PUBLIC, "v1").seed("one")),
        private: registry.put_image(&ImageSpec::new(PRIVATE, "v1").seed("other")),
        cache: of_the_cache(builder).start().await,
        doors,
        registry,
        tokens,
    }
}

/// Proofs for an hour, tags too: what follows is the cache's own doing.
pub(crate) async fn calm_scene() -> Scene {
    scene(|upstream| upstream.tag_ttl("1h").line("client_proof_ttl = \"1h\"")).await
}

impl Scene {
    pub(crate) async fn ask(&self, request: Request, login: Option<&str>) -> Response {
        self.cache.send(signed(request, login)).await
    }

    pub(crate) async fn tag(&self, login: Option<&str>) -> Response {
        self.ask(Request::get(&manifest_path("up", PRIVATE, "v1")), login)
            .await
    }

    pub(crate) async fn layer(&self, login: Option<&str>) -> Response {
        let path = blob_path("up", PRIVATE, self.private.layer().digest);
        self.ask(Request::get(&path), login).await
    }

    /// Everything that can be asked of the private image.
    fn questions(&self) -> Vec<Request> {
        let layer = blob_path("up", PRIVATE, self.private.layer().digest);
        let digest = self.private.manifest.digest;
        let by_digest = manifest_path("up", PRIVATE, digest);
        vec![
            Request::get(&manifest_path("up", PRIVATE, "v1")),
            Request::head(&manifest_path("up", PRIVATE, "v1")),
            Request::get(&by_digest),
            Request::head(&by_digest),
            Request::get(&layer),
            Request::head(&layer),
            Request::get(&layer).range("bytes=0-99"),
            Request::get(&blob_path("up", PRIVATE, self.private.config.digest)),
            Request::get(&format!("/v2/up/{PRIVATE}/tags/list")),
            Request::get(&format!("/v2/up/{PRIVATE}/referrers/{digest}")),
            // What is not there is refused alike.
            Request::get(&manifest_path("up", PRIVATE, "nosuch")),
        ]
    }

    pub(crate) async fn pull(&self, login: &str) {
        assert_good(&self.tag(Some(login)).await, &self.private.manifest);
        assert_good(&self.layer(Some(login)).await, self.private.layer());
        let config = blob_path("up", PRIVATE, self.private.config.digest);
        let config = self.ask(Request::get(&config), Some(login)).await;
        assert_good(&config, &self.private.config);
    }

    pub(crate) fn expel(&self, name: &str) {
        self.doors
            .members
            .lock()
            .unwrap()
            .retain(|user| *user != name);
        self.tokens.revoke_all();
    }

    /// Whether a request comes with this user's token.
    pub(crate) fn is_from(&self, name: &'static str) -> impl Fn(&Exchange) -> bool + use<> {
        let users = Arc::clone(&self.doors.users);
        move |exchange| users[name].refuse(exchange).is_none()
    }

    /// From now on those requests for the private repository are answered so.
    pub(crate) fn answer(
        &self,
        whose: impl Fn(&Exchange) -> bool + Send + Sync + 'static,
        other: Handler,
    ) {
        let by_login = Handler::new(move |exchange| {
            if whose(&exchange) {
                other.call(exchange)
            } else {
                faults::usual().call(exchange)
            }
        });
        for kind in [Kind::Manifest, Kind::Blob, Kind::Tags] {
            let private = Matcher::from(kind).repo(PRIVATE);
            self.registry.script(private, by_login.clone());
        }
    }

    /// What anyone may pull is for one user from now on.
    pub(crate) fn close_to_all_but(&self, name: &str) {
        let alone = Bearer::of(&self.tokens).identity(name);
        self.registry.require(alone);
        self.tokens.revoke_all();
    }

    /// How often a login was shown to the token service.
    pub(crate) fn logins(&self) -> usize {
        let asked = self.tokens.token_requests();
        let shown = asked
            .iter()
            .filter(|entry| entry.header("authorization").is_some());
        shown.count()
    }
}

pub(crate) fn signed(request: Request, login: Option<&str>) -> Request {
    let request = request.header("Accept", ACCEPT_ALL);
    match login {
        Some(pair) => request.header("Authorization", &format!("Basic {}", STANDARD.encode(pair))),
        None => request,
    }
}

fn assert_challenged(answer: &Response) {
    assert_eq!(answer.status, 401, "{answer}");
    assert_eq!(
        answer.all("www-authenticate"),
        ["Basic realm=\"oci-remote-cache\", charset=\"UTF-8\""]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_private_image_is_for_those_whose_login_opens_it() {
    let scene = calm_scene().await;
    scene.pull(ALICE).await;
    for request in scene.questions() {
        let bob = scene.ask(request.clone(), Some(BOB)).await;
        assert_eq!(bob.status, 403, "{request:?}: {bob}");
        assert_challenged(&scene.ask(request.clone(), None).await);
        let wrong = scene.ask(request, Some("alice:sesame-bob")).await;
        assert_challenged(&wrong);
    }
    let before = scene.registry.count((Kind::Blob, "GET"));
    scene.pull(CAROL).await;
    assert_eq!(
        scene.registry.count((Kind::Blob, "GET")),
        before,
        "bytes are stored once"
    );
    assert!(said(&scene.layer(Some(CAROL)).await).contains("hit"));
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_fill_in_flight_is_for_those_whose_login_opens_it() {
    let scene = calm_scene().await;
    let blob = Content::blob(400_000, "private");
    scene.registry.put_blob(PRIVATE, &blob);
    let gate = Gate::new();
    scene.registry.script(
        Matcher::blobs()
            .repo(PRIVATE)
            .method("GET")
            .of(blob.digest)
            .query("held"),
        faults::serve(&blob, ServeOptions::new().pause(200_000, &gate)),
    );
    // Both have been let in before the redirect, which is given without a look at the token.
    assert_eq!(scene.tag(Some(ALICE)).await.status, 200);
    assert_eq!(scene.tag(Some(CAROL)).await.status, 200);
    let held = faults::redirect(&format!("/v2/{PRIVATE}/blobs/{}?held", blob.digest), 307);
    scene.registry.script(
        Matcher::blobs()
            .repo(PRIVATE)
            .method("GET")
            .of(blob.digest)
            .query(""),
        held,
    );
    let path = blob_path("up", PRIVATE, blob.digest);
    let leader = signed(Request::get(&path).compare(&blob.data), Some(ALICE));
    let leader = leader.start(scene.cache.port());
    gate.reached().await;
    for request in [
        Request::get(&path),
        Request::get(&path).range("bytes=0-99"),
        Request::head(&path),
    ] {
        assert_eq!(scene.ask(request.clone(), Some(BOB)).await.status, 403);
        assert_challenged(&scene.ask(request, None).await);
    }
    let joined = signed(Request::get(&path).compare(&blob.data), Some(CAROL));
    let joined = joined.start(scene.cache.port());
    sleep(Duration::from_millis(200)).await;
    gate.open();
    let leader = leader.response().await;
    assert!(leader.is_right(), "{leader}");
    let joined = joined.response().await;
    assert!(
        joined.is_right() && said(&joined).contains("collapsed"),
        "{joined}"
    );
    assert_eq!(
        scene.registry.count((Kind::Blob, "GET", blob.digest)),
        2,
        "one transfer, and the redirect to it"
    );
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proof_ends_with_its_time() {
    let scene = scene(|upstream| upstream.tag_ttl("1h").line("client_proof_ttl = \"2s\"")).await;
    scene.pull(ALICE).await;
    scene.expel("alice");
    assert_eq!(
        scene.layer(Some(ALICE)).await.status,
        200,
        "within its time the proof is enough"
    );
    sleep(Duration::from_millis(2200)).await;
    for request in scene.questions() {
        assert_eq!(scene.ask(request, Some(ALICE)).await.status, 403);
    }
    scene.pull(CAROL).await;
    // Let in again, she needs nothing to be fetched.
    scene.doors.members.lock().unwrap().push("alice");
    sleep(AFTER_A_REFUSAL).await;
    let before = scene.registry.count((Kind::Blob, "GET"));
    scene.pull(ALICE).await;
    assert_eq!(scene.registry.count((Kind::Blob, "GET")), before);
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_lengthens_no_proof() {
    let scene = scene(|upstream| upstream.tag_ttl("0s").line("client_proof_ttl = \"3s\"")).await;
    scene.pull(ALICE).await;
    scene.registry.server().stop().await;
    assert_good(&scene.tag(Some(ALICE)).await, &scene.private.manifest);
    assert!(scene.layer(Some(ALICE)).await.is_whole());
    let bob = scene.layer(Some(BOB)).await;
    assert!(bob.status >= 500, "nobody can say whether he may: {bob}");
    sleep(Duration::from_millis(3200)).await;
    assert!(scene.tag(Some(ALICE)).await.status >= 500);
    assert!(scene.layer(Some(ALICE)).await.status >= 500);
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_for_one_login_alone() {
    let scene = scene(|upstream| upstream.tag_ttl("0s").line("client_proof_ttl = \"1h\"")).await;
    scene.pull(ALICE).await;
    scene.pull(CAROL).await;
    scene.expel("alice");
    // Her next question about the tag is answered with a refusal, which ends her proof for all that is held.
    assert_eq!(scene.tag(Some(ALICE)).await.status, 403);
    assert_eq!(scene.layer(Some(ALICE)).await.status, 403);
    scene.pull(CAROL).await;
    scene.registry.server().stop().await;
    assert_good(&scene.tag(Some(CAROL)).await, &scene.private.manifest);
    assert!(scene.layer(Some(CAROL)).await.is_whole());
    let alice = scene.layer(Some(ALICE)).await;
    assert!(alice.status >= 400, "{alice}");
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_transfer_does_not_fall_with_its_leader() {
    let scene = calm_scene().await;
    assert_eq!(scene.tag(Some(ALICE)).await.status, 200);
    assert_eq!(scene.tag(Some(CAROL)).await.status, 200);
    scene.expel("alice");
    let blob = Content::blob(300_000, "asked for by both");
    scene.registry.put_blob(PRIVATE, &blob);
    // Alice's transfer waits for its answer, a refusal, while Carol joins it.
    let gate = Gate::new();
    scene.registry.script(
        Matcher::blobs()
            .repo(PRIVATE)
            .method("GET")
            .of(blob.digest)
            .once(),
        faults::held(&gate),
    );
    let path = blob_path("up", PRIVATE, blob.digest);
    let alice = signed(Request::get(&path), Some(ALICE)).start(scene.cache.port());
    gate.reached().await;
    let carol = signed(Request::get(&path).compare(&blob.data), Some(CAROL));
    let carol = carol.start(scene.cache.port());
    sleep(Duration::from_millis(200)).await;
    gate.open();
    assert_eq!(alice.response().await.status, 403);
    let carol = carol.response().await;
    assert!(carol.is_right(), "{carol}");
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_strangers_used_up_keeps_no_login_out() {
    let scene = calm_scene().await;
    let users = Arc::clone(&scene.doors.users);
    let limited = faults::error(429, "TOOMANYREQUESTS", &[("Retry-After", "120")]);
    let by_login = Handler::new(move |exchange| {
        let shown = exchange.header("authorization").is_some();
        if shown && users["alice"].refuse(&exchange).is_some() {
            limited.call(exchange)
        } else {
            faults::usual().call(exchange)
        }
    });
    scene.registry.script(Kind::Manifest, by_login.clone());
    scene.registry.script(Kind::Blob, by_login);
    assert_eq!(scene.tag(None).await.status, 429);
    scene.pull(ALICE).await;
    assert_eq!(scene.tag(None).await.status, 429);
    scene.cache.check_invariants().await;
}

/// The usual answer to Carol; to others this one, once the gate is open.
fn but_for_carol(scene: &Scene, (gate, other): (&Gate, Handler)) -> Handler {
    let (users, gate) = (Arc::clone(&scene.doors.users), gate.clone());
    Handler::new(move |exchange| {
        let (gate, other) = (gate.clone(), other.clone());
        if users["carol"].refuse(&exchange).is_none() {
            return faults::usual().call(exchange);
        }
        Box::pin(async move {
            gate.opened().await;
            other.call(exchange).await;
        })
    })
}

/// Registries hide by 404 too: what one login is not shown, another may be.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_leader_is_not_shown_is_asked_for_with_the_next_login() {
    let scene = calm_scene().await;
    assert_eq!(scene.tag(Some(ALICE)).await.status, 200);
    assert_eq!(scene.tag(Some(CAROL)).await.status, 200);
    let blob = Content::blob(300_000, "shown to one");
    scene.registry.put_blob(PRIVATE, &blob);
    let gate = Gate::new();
    let hidden = faults::error(404, "BLOB_UNKNOWN", &[]);
    let by_login = but_for_carol(&scene, (&gate, hidden));
    let gets = Matcher::blobs().repo(PRIVATE).method("GET");
    scene.registry.script(gets.of(blob.digest), by_login);
    let path = blob_path("up", PRIVATE, blob.digest);
    let alice = signed(Request::get(&path), Some(ALICE)).start(scene.cache.port());
    gate.reached().await;
    let carol = signed(Request::get(&path).compare(&blob.data), Some(CAROL));
    let carol = carol.start(scene.cache.port());
    sleep(Duration::from_millis(200)).await;
    gate.open();
    assert_eq!(alice.response().await.status, 404);
    let carol = carol.response().await;
    assert!(carol.is_right(), "{carol}");
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_one_question_for_all_who_wait_with_the_same_login() {
    let scene = calm_scene().await;
    assert_eq!(scene.tag(Some(ALICE)).await.status, 200);
    scene.expel("alice");
    let blob = Content::blob(300_000, "asked for by many");
    scene.registry.put_blob(PRIVATE, &blob);
    let gate = Gate::new();
    let gets = Matcher::blobs().repo(PRIVATE).method("GET");
    let first = gets.of(blob.digest).once();
    scene.registry.script(first, faults::held(&gate));
    let path = blob_path("up", PRIVATE, blob.digest);
    let ask = |_| signed(Request::get(&path), Some(ALICE)).start(scene.cache.port());
    let waiting: Vec<_> = (0..20).map(ask).collect();
    gate.reached().await;
    sleep(Duration::from_millis(300)).await;
    gate.open();
    for one in waiting {
        assert_eq!(one.response().await.status, 403);
    }
    let asked = scene.registry.count((Kind::Blob, "GET", blob.digest));
    assert!(asked <= 3, "{asked}: with a token, bare, with a new one");
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_anyone_may_pull_needs_no_login_and_sees_none() {
    let scene = calm_scene().await;
    let tag = manifest_path("up", PUBLIC, "v1");
    let layer = blob_path("up", PUBLIC, scene.public.layer().digest);
    for login in [None, Some("someone:else-entirely"), Some(":"), Some(ALICE)] {
        let manifest = scene.ask(Request::get(&tag), login).await;
        assert_good(&manifest, &scene.public.manifest);
        let layer = scene.ask(Request::get(&layer), login).await;
        assert_good(&layer, scene.public.layer());
    }
    assert_eq!(scene.logins(), 0, "a login was shown where none was needed");
    // A layer that both hold opens nothing of the private one.
    let shared = scene.public.layer();
    scene.registry.put_blob(PRIVATE, shared);
    let path = blob_path("up", PRIVATE, shared.digest);
    assert_challenged(&scene.ask(Request::get(&path), None).await);
    assert_eq!(scene.ask(Request::get(&path), Some(BOB)).await.status, 403);
    let alice = scene.ask(Request::get(&path), Some(ALICE)).await;
    assert_good(&alice, shared);
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_wrong_passwords_is_none_at_the_upstream() {
    let scene = scene(|upstream| {
        upstream
            .line("client_proof_ttl = \"1h\"")
            .negative_ttl("1h")
    })
    .await;
    scene.pull(ALICE).await;
    let before = scene.logins();
    let path = manifest_path("up", PRIVATE, "v1");
    let wrong = signed(Request::get(&path), Some("alice:guess"));
    for answer in wrong.storm(scene.cache.port(), 60).await {
        assert_challenged(&answer);
    }
    for n in 0..20 {
        let other = manifest_path("up", &format!("lib/private{n}"), "v1");
        let answer = scene.ask(Request::get(&other), Some("alice:guess")).await;
        assert!(matches!(answer.status, 401 | 404), "{answer}");
    }
    assert_eq!(
        scene.logins() - before,
        1,
        "one wrong login is asked about once"
    );
    scene.pull(ALICE).await;
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ping_asks_for_a_login_where_clients_need_that() {
    let scene = calm_scene().await;
    assert_challenged(&scene.ask(Request::get("/v2/"), None).await);
    for login in [ALICE, "someone:else-entirely", ":"] {
        let answer = scene.ask(Request::get("/v2/"), Some(login)).await;
        assert_eq!(answer.status, 200, "{answer}");
    }
    let docker = Request::get("/v2/").header("User-Agent", "docker/28.2.2 go/go1.24");
    assert_eq!(scene.ask(docker, None).await.status, 200);
    assert_eq!(scene.logins(), 0);
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_basic_gets_the_clients_own() {
    let registry = Registry::start().await;
    let image = registry.put_image(&ImageSpec::new(PRIVATE, "v1"));
    registry.require(Basic::of("alice", "sesame-alice"));
    let upstream = Upstream::new("up", registry.url()).line("credentials = \"client\"");
    let cache = cache().upstream(upstream).start().await;
    let path = manifest_path("up", PRIVATE, "v1");
    let ask = |login| cache.send(signed(Request::get(&path), login));
    assert_challenged(&ask(None).await);
    assert_good(&ask(Some(ALICE)).await, &image.manifest);
    assert_challenged(&ask(Some("alice:wrong")).await);
    assert_good(&ask(Some(ALICE)).await, &image.manifest);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_login_began_another_may_finish() {
    const MIB: u64 = 1 << 20;
    let scene = scene(|upstream| {
        let upstream = upstream.line("connections_per_blob = 1");
        upstream.tag_ttl("1h").line("client_proof_ttl = \"1h\"")
    })
    .await;
    let blob = Content::blob(40 << 20, "of forty MiB");
    scene.registry.put_blob(PRIVATE, &blob);
    assert_eq!(scene.tag(Some(ALICE)).await.status, 200);
    assert_eq!(scene.tag(Some(CAROL)).await.status, 200);
    scene.expel("alice");
    let breaks = faults::serve(&blob, ServeOptions::new().reset_at(20 * MIB));
    let gets = Matcher::blobs().method("GET").of(blob.digest);
    scene.registry.script(gets.once(), breaks);
    let path = blob_path("up", PRIVATE, blob.digest);
    let alice = scene.ask(Request::get(&path), Some(ALICE)).await;
    assert!(!alice.is_whole(), "her login was refused midway: {alice}");
    assert_eq!(scene.layer(Some(ALICE)).await.status, 403);
    let carol = Request::get(&path).compare(&blob.data);
    let carol = scene.ask(carol, Some(CAROL)).await;
    assert!(carol.is_right(), "{carol}");
    let sent = scene.registry.sent((Kind::Blob, "GET", blob.digest));
    assert!(sent < 50 * MIB, "{sent} bytes came for 40 MiB");
    scene.cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_names_what_ones_own_login_was_shown_to_open() {
    let scene = scene_with(
        |upstream| upstream.line("client_proof_ttl = \"1h\""),
        |builder| builder.line("catalog = true"),
    )
    .await;
    let public = manifest_path("up", PUBLIC, "v1");
    assert_eq!(scene.ask(Request::get(&public), None).await.status, 200);
    scene.pull(ALICE).await;
    assert_eq!(scene.tag(Some(BOB)).await.status, 403);
    scene
        .cache
        .wait_until_stored(&scene.private.manifest.digest)
        .await;
    scene
        .cache
        .wait_until_stored(&scene.public.manifest.digest)
        .await;
    let (public, private) = (format!("up/{PUBLIC}"), format!("up/{PRIVATE}"));
    for (login, names) in [
        (Some(ALICE), vec![private, public.clone()]),
        (Some(BOB), vec![public.clone()]),
        (Some("alice:wrong"), vec![public.clone()]),
        (None, vec![public]),
    ] {
        let answer = scene.ask(Request::get("/v2/_catalog"), login).await;
        assert_eq!(
            answer.json()["repositories"],
            serde_json::json!(names),
            "{login:?}"
        );
    }
    scene.cache.check_invariants().await;
}
