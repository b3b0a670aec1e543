//! Where upstream credentials may be kept: Docker's and podman's login files, their helpers, files that are written anew.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;
use testbed::token::Auth;
use testbed::{
    Basic, Bearer, CacheBuilder, Exchange, Image, ImageSpec, Registry, TokenServer, Upstream,
    assert_good,
};
use tokio::time::sleep;

use crate::stage::{REPO, assert_refused, cache};

/// Longer than a file goes unlooked at.
const A_LOOK: Duration = Duration::from_millis(1200);

struct Desk(TempDir);

impl Desk {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("write a file");
    }

    /// A credential helper that tells each call, and then what stands in `says`.
    fn helper(&self, says: &str) {
        self.write("says", says);
        let script = "#!/bin/sh\ncd \"$(dirname \"$0\")\"\necho \"$1 $(cat)\" >>calls\ncat says\n[ \"$(head -c1 says)\" = '{' ]\n";
        self.write("docker-credential-desk", script);
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.path("docker-credential-desk"), mode).expect("make it a program");
    }

    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    fn cache(&self) -> CacheBuilder {
        let path = format!("{}:/usr/bin:/bin", self.0.path().display());
        cache()
            .line(&format!("docker_config = {:?}", self.path("config.json")))
            .environment("PATH", &path)
            .trace()
    }
}

fn auth(pair: &str) -> String {
    format!("{{\"auth\": \"{}\"}}", STANDARD.encode(pair))
}

fn authority(registry: &Registry) -> String {
    registry.url().trim_start_matches("http://").to_owned()
}

/// One user for `acme/…`, another for the rest.
#[derive(Debug)]
struct ByRepository(Bearer, Bearer);

impl Auth for ByRepository {
    fn refuse(&self, exchange: &Exchange) -> Option<Vec<String>> {
        let door = if exchange.entry().repo.starts_with("acme/") {
            &self.0
        } else {
            &self.1
        };
        door.refuse(exchange)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_longest_prefix_in_a_login_file_speaks_for_a_repository() {
    let (desk, registry) = (Desk::new(), Registry::start().await);
    let tokens = TokenServer::at(&registry);
    tokens.add_user("all", "sesame-all");
    tokens.add_user("acme", "sesame-acme");
    registry.require(ByRepository(
        Bearer::of(&tokens).identity("acme"),
        Bearer::of(&tokens).identity("all"),
    ));
    let host = authority(&registry);
    let file = format!(
        "{{\"auths\": {{\"{host}\": {}, \"{host}/acme\": {}}}}}",
        auth("all:sesame-all"),
        auth("acme:sesame-acme")
    );
    desk.write("config.json", &file);
    let cache = desk.cache().secret("sesame-all").secret("sesame-acme");
    let cache = cache
        .upstream(Upstream::new("up", registry.url()))
        .start()
        .await;
    for repository in ["acme/app", "acmeevil/app", "lib/app"] {
        let image = registry.put_image(&ImageSpec::new(repository, "v1").seed(repository));
        cache.pull("up", &image).await;
    }
    cache.check_invariants().await;
}

async fn guarded(desk: &Desk, password: &str) -> (Registry, Image) {
    let registry = Registry::start().await;
    registry.require(Basic::of("robot", password));
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    desk.write(
        "config.json",
        &format!(
            "{{\"credHelpers\": {{\"{}\": \"desk\"}}}}",
            authority(&registry)
        ),
    );
    (registry, image)
}

fn login(password: &str) -> String {
    format!("{{\"ServerURL\": \"x\", \"Username\": \"robot\", \"Secret\": \"{password}\"}}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_helper_is_asked_once_and_again_when_its_answer_is_refused() {
    let desk = Desk::new();
    let (registry, image) = guarded(&desk, "sesame-1").await;
    desk.helper(&login("sesame-1"));
    let upstream = Upstream::new("up", registry.url()).tag_ttl("0s");
    let cache = desk
        .cache()
        .secret("sesame-1")
        .secret("sesame-2")
        .upstream(upstream)
        .start()
        .await;
    cache.pull("up", &image).await;
    cache.pull("up", &image).await;
    assert_eq!(desk.calls(), [format!("get {}", authority(&registry))]);
    // Rotated: the old answer is refused, and not used for long.
    registry.require(Basic::of("robot", "sesame-2"));
    desk.helper(&login("sesame-2"));
    let mut status = 0;
    for _ in 0..30 {
        status = cache.manifest("up", REPO, "v1").await.status;
        if status == 200 {
            break;
        }
        sleep(Duration::from_millis(500)).await;
    }
    assert_eq!((status, desk.calls().len()), (200, 2));
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_helper_that_fails_is_an_outage_and_one_that_holds_nothing_is_not() {
    let desk = Desk::new();
    let (registry, image) = guarded(&desk, "sesame-1").await;
    desk.helper("it broke");
    let cache = desk
        .cache()
        .upstream(Upstream::new("up", registry.url()))
        .start()
        .await;
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[503]);
    assert_eq!(
        registry.requests(),
        Vec::<String>::new(),
        "it was not asked without credentials"
    );
    desk.helper("credentials not found in native keychain");
    assert_refused(&cache.manifest("up", REPO, "v1").await, &[403]);
    drop(image);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_file_is_read_again_when_it_changes() {
    let (desk, registry) = (Desk::new(), Registry::start().await);
    registry.require(Basic::of("robot", "sesame-1"));
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    desk.write("password", "sesame-1\n");
    let line = format!(
        "credentials = {{ username = \"robot\", password = {{ file = {:?} }} }}",
        desk.path("password")
    );
    let upstream = Upstream::new("up", registry.url())
        .tag_ttl("0s")
        .line(&line);
    let cache = cache()
        .upstream(upstream)
        .trace()
        .secret("sesame-1")
        .secret("sesame-2")
        .start()
        .await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    registry.require(Basic::of("robot", "sesame-2"));
    desk.write("password", "sesame-2\n");
    sleep(A_LOOK).await;
    assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_variable_holds_logins_and_an_open_cache_shows_only_what_is_public() {
    let registry = Registry::start().await;
    let tokens = TokenServer::at(&registry);
    tokens.add_user("all", "sesame-all");
    registry.require(Bearer::of(&tokens).identity("all"));
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let text = format!(
        "{{\"auths\": {{\"http://{}/v2/\": {}}}}}",
        authority(&registry),
        auth("all:sesame-all")
    );
    let start = |host: &'static str| {
        let builder = cache()
            .environment("DOCKER_AUTH_CONFIG", &text)
            .listen_on(host);
        builder
            .upstream(Upstream::new("up", registry.url()))
            .start()
    };
    start("127.0.0.1").await.pull("up", &image).await;
    let open = start("0.0.0.0").await;
    assert_refused(&open.manifest("up", REPO, "v1").await, &[403]);
    open.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_longest_configured_prefix_decides_who_asks() {
    let (desk, registry) = (Desk::new(), Registry::start().await);
    let tokens = TokenServer::at(&registry);
    tokens.add_user("acme", "acme-secret");
    tokens.add_user("rest", "rest-secret");
    registry.require(ByRepository(
        Bearer::of(&tokens).identity("acme"),
        Bearer::of(&tokens).identity("rest"),
    ));
    let ours = registry.put_image(&ImageSpec::new("acme/app", "v1").seed("ours"));
    let others = registry.put_image(&ImageSpec::new("acmes/app", "v1").seed("others"));
    desk.write("p", "acme-secret\n");
    let some = format!(
        "credentials_for = [{{ repositories = \"acme\", username = \"acme\", password = {{ file = {:?} }} }}]",
        desk.path("p")
    );
    let upstream = Upstream::new("up", registry.url())
        .credentials("rest", "rest-secret")
        .line(&some)
        .tag_ttl("0s");
    let cache = cache()
        .upstream(upstream)
        .secret("acme-secret")
        .trace()
        .start()
        .await;
    cache.pull("up", &ours).await;
    cache.pull("up", &others).await;
    // Its file is read again when it changes, as with any other.
    tokens.add_user("acme", "acme-rotated");
    tokens.revoke_all();
    desk.write("p", "acme-rotated\n");
    sleep(A_LOOK).await;
    cache.pull("up", &ours).await;
    cache.check_invariants().await;
}
