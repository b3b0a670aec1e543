//! How often the upstream is asked: 10 000 pulls of 200 images by 50 clients over a simulated day.
//!
//! The pulls go through the front door of the real cache, whose clock is moved from one to the next. The optimum is counted out from the
//! same trace: one HEAD for each tag and expired window in which somebody asked, one GET for each new digest. docker-registry's proxy
//! mode keeps no time for tags, so that its run needs no clock. Prints manifest requests per pull; fails above 5 % over the optimum.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a measurement: what fails ends it"
)]

use std::collections::{HashMap, HashSet};
use std::io::{self, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use oci_remote_cache::app::App;
use oci_remote_cache::clock::{Clock, Timestamp};
use oci_remote_cache::config::{Config, Sources};
use testbed::cache::assert_good;
use testbed::image::ACCEPT_ALL;
use testbed::{Image, ImageSpec, Kind, Registry, Request};
use tokio::task::JoinSet;

const PULLS: usize = 10_000;
const IMAGES: u64 = 200;
const CLIENTS: u64 = 50;
const DAY: u64 = 86_400;
const TTL: u64 = 300;

/// One client's pull.
#[derive(Clone, Copy, Debug)]
struct Pull {
    second: u64,
    image: u64,
    way: Way,
}

/// How a client asks for a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// podman and skopeo: GET by tag.
    Get,
    /// docker and containerd: HEAD by tag, GET by digest.
    Head,
}

/// Numbers that are the same in every run (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// A few images are pulled most of the time: each of two draws halves the rest.
    fn image(&mut self) -> u64 {
        let first = self.below(IMAGES) + 1;
        self.below(first)
    }
}

/// Pulls in order of time; one in ten is a rollout, in which ten clients come in the same second.
fn trace() -> Vec<Pull> {
    let mut numbers = Numbers(8);
    let mut pulls = Vec::new();
    while pulls.len() < PULLS {
        let (second, image) = (numbers.below(DAY), numbers.image());
        let together = if numbers.below(10) == 0 { 10 } else { 1 };
        for _ in 0..together {
            let client = numbers.below(CLIENTS);
            let way = if client.is_multiple_of(2) {
                Way::Get
            } else {
                Way::Head
            };
            pulls.push(Pull { second, image, way });
        }
    }
    pulls.truncate(PULLS);
    pulls.sort_by_key(|pull| pull.second);
    pulls
}

/// Which build of an image its tag names: every fifth image moves every four hours, the rest never.
fn build(image: u64, second: u64) -> u64 {
    if image.is_multiple_of(5) {
        second / (4 * 3600)
    } else {
        0
    }
}

fn put(registry: &Registry, image: u64, build: u64) -> Image {
    let spec = ImageSpec::new(&repo(image), "v1")
        .seed(&format!("{image}-{build}"))
        .layers(&[10]);
    registry.put_image(&spec)
}

fn repo(image: u64) -> String {
    format!("team/app-{image}")
}

/// The fewest requests that could have answered the trace.
fn optimum(pulls: &[Pull]) -> usize {
    let (mut checked, mut held) = (HashMap::new(), HashSet::new());
    let mut requests = 0;
    for pull in pulls {
        let last = checked.get(&pull.image).copied();
        let expired = last.is_none_or(|last| pull.second >= last + TTL);
        if expired {
            checked.insert(pull.image, pull.second);
        }
        // What the tag names is what it named when it was last asked about.
        let seen = build(pull.image, checked[&pull.image]);
        let new = held.insert((pull.image, seen));
        let by_get_alone = last.is_none() && pull.way == Way::Get;
        requests += usize::from(expired && !by_get_alone) + usize::from(new);
    }
    requests
}

/// Plays the trace to the cache at `port`; returns how many manifests the registry was asked for.
async fn play(pulls: &[Pull], registry: &Registry, port: u16, clock: &Clock) -> usize {
    let start = clock.now();
    let mut builds: HashMap<u64, (u64, Image)> = HashMap::new();
    registry.clear_log();
    for pulls in pulls.chunk_by(|one, other| (one.second, one.image) == (other.second, other.image))
    {
        let Pull { second, image, .. } = pulls[0];
        move_to(clock, start, second);
        let now = build(image, second);
        if builds.get(&image).is_none_or(|(build, _)| *build != now) {
            builds.insert(image, (now, put(registry, image, now)));
        }
        let mut clients = JoinSet::new();
        for pull in pulls {
            clients.spawn(client(*pull, port));
        }
        clients.join_all().await;
    }
    registry.count(Kind::Manifest)
}

fn move_to(clock: &Clock, start: Timestamp, second: u64) {
    let wanted = start.0 + i64::try_from(second * 1000).expect("a day is short");
    let ahead = u64::try_from(wanted - clock.now().0).unwrap_or(0);
    clock.advance(Duration::from_millis(ahead));
}

async fn client(pull: Pull, port: u16) {
    let path = |reference: &str| format!("/v2/{}/manifests/{reference}", repo(pull.image));
    let ask = |request: Request| request.header("Accept", ACCEPT_ALL).send(port);
    let answer = match pull.way {
        Way::Get => ask(Request::get(&path("v1"))).await,
        Way::Head => {
            let head = ask(Request::head(&path("v1"))).await;
            let digest = head
                .header("docker-content-digest")
                .unwrap_or_default()
                .to_owned();
            ask(Request::get(&path(&digest))).await
        }
    };
    assert!(answer.is_whole(), "{pull:?}: {answer}");
}

/// The cache in this process.
async fn ours(pulls: &[Pull]) -> usize {
    let (registry, clock) = (Registry::start().await, Clock::system());
    let home = tempfile::tempdir().expect("make a folder");
    let file = home.path().join("config.toml");
    let text = format!(
        "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\ncache_dir = {:?}\ndefault_upstream = \"up\"\n\
         [upstreams.up]\nurl = {:?}\ntag_ttl = \"{TTL}s\"\n",
        home.path().join("cache").display().to_string(),
        registry.url(),
    );
    std::fs::write(&file, text).expect("write the configuration");
    let sources = Sources {
        file: Some(file),
        ..Sources::default()
    };
    let config = Config::load(&sources).expect("load the configuration");
    let app = App::start(config, clock.clone())
        .await
        .expect("start the cache");
    let port = app.address().port();
    let mut running = JoinSet::new();
    running.spawn(async move { app.run().await.expect("serve") });
    play(pulls, &registry, port, &clock).await
}

/// docker-registry as a proxy, where it is installed.
async fn theirs(pulls: &[Pull]) -> Option<usize> {
    let registry = Registry::start().await;
    let home = tempfile::tempdir().expect("make a folder");
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("find a port");
    let port = free.local_addr().expect("find a port").port();
    drop(free);
    let file = home.path().join("config.yml");
    let text = format!(
        "version: 0.1\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\n\
         storage: {{ filesystem: {{ rootdirectory: {:?} }} }}\nhttp: {{ addr: \"127.0.0.1:{port}\" }}\nproxy: {{ remoteurl: {:?} }}\n",
        home.path().join("data").display().to_string(),
        registry.url(),
    );
    std::fs::write(&file, text).expect("write its configuration");
    let mut command = Command::new("docker-registry");
    command
        .arg("serve")
        .arg(&file)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let _ended = Ended(command.spawn().ok()?);
    let image = put(&registry, 0, 0);
    let answers = async {
        loop {
            let path = format!("/v2/{}/manifests/{}", repo(0), image.digest());
            let ask = Request::get(&path)
                .header("Accept", ACCEPT_ALL)
                .timeout(Duration::from_secs(2));
            if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
                assert_good(&ask.send(port).await, &image.manifest);
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), answers)
        .await
        .ok()?;
    Some(play(pulls, &registry, port, &Clock::system()).await)
}

/// Ends the process it holds.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn tell(what: &str, requests: usize, best: usize) {
    let per_pull = per_mille(requests, PULLS);
    let over = per_mille(requests, best);
    let line = format!(
        "{what:<24} {requests:>6} requests   {}.{:03} per pull   {}.{:03} of the optimum",
        per_pull / 1000,
        per_pull % 1000,
        over / 1000,
        over % 1000
    );
    writeln!(io::stdout(), "{line}").ok();
}

fn per_mille(part: usize, whole: usize) -> usize {
    part * 1000 / whole
}

fn main() {
    oci_remote_cache::upstream::install_crypto();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("start the runtime");
    let pulls = trace();
    let best = optimum(&pulls);
    writeln!(
        io::stdout(),
        "{PULLS} pulls of {IMAGES} images by {CLIENTS} clients in a day, tag_ttl {TTL} s"
    )
    .ok();
    tell("offline optimum", best, best);
    let ours = runtime.block_on(ours(&pulls));
    tell("oci-remote-cache", ours, best);
    match runtime.block_on(theirs(&pulls)) {
        Some(theirs) => tell("docker-registry, proxy", theirs, best),
        None => drop(writeln!(io::stdout(), "docker-registry is not installed")),
    }
    assert!(ours * 100 <= best * 105, "more than 5 % above the optimum");
}
