//! Starting and stopping: each error is one clear line and an exit code, nothing is written; transfers under way are let end.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use testbed::cache::blob_path;
use testbed::{
    CacheProcess, Gate, Kind, Registry, Request, ServeOptions, Upstream, assert_good, eventually,
    faults,
};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

use crate::stage::{BINARY, REPO, assert_holds, up, up_with_blob, up_with_image};

/// How one start ended.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    /// What it said, without lines about what went well.
    said: Vec<String>,
}

/// A start in a folder of its own.
#[derive(Debug)]
struct Start {
    home: TempDir,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Start {
    fn new() -> Self {
        Self {
            home: TempDir::with_prefix("start-").expect("make a folder"),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// With a configuration of free ports, a cache folder that does not exist, and these lines.
    fn configured(lines: &str) -> Self {
        let mut start = Self::new();
        let top = ["listen", "admin_listen", "cache_dir"]
            .map(|key| (key, format!("{key} = ")))
            .map(|(key, begin)| {
                let value = if key == "cache_dir" {
                    start.cache_dir().display().to_string()
                } else {
                    "127.0.0.1:0".to_owned()
                };
                if lines.contains(&begin) {
                    String::new()
                } else {
                    format!("{begin}\"{value}\"\n")
                }
            });
        fs::write(
            start.home.path().join("config.toml"),
            format!("{}{lines}\n", top.concat()),
        )
        .expect("write a file");
        start.arguments = vec![
            "serve".to_owned(),
            "--config".to_owned(),
            "config.toml".to_owned(),
        ];
        start
    }

    fn cache_dir(&self) -> PathBuf {
        self.home.path().join("cache")
    }

    fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments = arguments
            .iter()
            .map(|argument| (*argument).to_owned())
            .collect();
        self
    }

    fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(BINARY);
        command
            .args(&self.arguments)
            .current_dir(self.home.path())
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Starts it; it must end by itself.
    async fn end(&self) -> Ended {
        let output = timeout(Duration::from_secs(20), self.command().output()).await;
        let output = output
            .expect("it serves in place of failing")
            .expect("run the binary");
        let text = [output.stdout, output.stderr]
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .concat();
        let fine = |line: &str| line.contains("\"level\":\"INFO\"");
        let said = text
            .lines()
            .filter(|line| !line.trim().is_empty() && !fine(line))
            .map(str::to_owned)
            .collect();
        Ended {
            code: output.status.code(),
            said,
        }
    }

    /// Fails unless it ends with this code and one line that holds all these words, and wrote nothing.
    async fn fails(&self, code: i32, words: &[&str]) {
        let before = everything_below(self.home.path());
        let ended = self.end().await;
        assert_eq!((ended.code, ended.said.len()), (Some(code), 1), "{ended:?}");
        for word in words {
            assert!(
                ended.said[0].contains(word),
                "{word:?} is not in {:?}",
                ended.said[0]
            );
        }
        assert_eq!(
            everything_below(self.home.path()),
            before,
            "something was written"
        );
    }

    /// Starts it; it must come to answer on this port.
    async fn serves(&self, port: u16) -> Child {
        let child = self.command().spawn().expect("start the binary");
        let end = Instant::now() + Duration::from_secs(20);
        while Request::get("/v2/")
            .timeout(Duration::from_secs(2))
            .send(port)
            .await
            .status
            != 200
        {
            assert!(Instant::now() < end, "nothing answers on port {port}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        child
    }
}

fn everything_below(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(everything_below(&entry.path()));
        }
        found.insert(entry.path());
    }
    found
}

/// Two ports that nobody listens on just now.
fn free_ports() -> (u16, u16) {
    let ports = [(), ()].map(|()| TcpListener::bind("127.0.0.1:0").expect("find a port"));
    let [first, second] = ports.map(|listener| listener.local_addr().expect("an address").port());
    (first, second)
}

fn signal(process: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(process).expect("a process id")).expect("a process id");
    kill_process(pid, signal).expect("send a signal");
}

/// Lines of a configuration, which begin in its fourth line, and words of what is said of them.
const MISTAKES: [(&str, &[&str]); 22] = [
    (
        "lisen = \"127.0.0.1:1\"",
        &["config.toml:4", "lisen", "did you mean", "listen"],
    ),
    (
        "[cache]\nmax_sze = \"1GiB\"",
        &["config.toml:5", "max_sze", "max_size"],
    ),
    (
        "[upstreams.\"docker.io\"]\ntag_tll = \"1m\"",
        &["config.toml:5", "docker.io", "tag_tll", "tag_ttl"],
    ),
    (
        "[upstreams.\"docker.io\"]\ncredentials = { usernme = \"u\", password = \"p\" }",
        &["usernme", "username"],
    ),
    ("listen = 8080", &["listen"]),
    ("default_upstream = true", &["default_upstream"]),
    (
        "[upstreams.\"docker.io\"]\naliases = \"x\"",
        &["config.toml:5", "aliases"],
    ),
    (
        "[upstreams.\"docker.io\"]\nlibrary = \"yes\"",
        &["config.toml:5", "library"],
    ),
    (
        "[cache]\nmax_size = \"50 potatoes\"",
        &["config.toml:5", "max_size", "50 potatoes"],
    ),
    ("[cache]\nmax_size = -5", &["config.toml:5", "max_size"]),
    (
        "[upstreams.\"docker.io\"]\ntag_ttl = \"soon\"",
        &["config.toml:5", "tag_ttl", "soon"],
    ),
    ("listen = \"nowhere\"", &["listen", "nowhere"]),
    (
        "[upstreams.x]\nurl = \"ftp://x.example\"",
        &["config.toml:5", "url"],
    ),
    (
        "[upstreams.x]\nurl = \"not a url\"",
        &["config.toml:5", "url"],
    ),
    ("[upstreams.x]\ntag_ttl = \"1m\"", &["x", "url"]),
    (
        "default_upstream = \"dockr.io\"",
        &["dockr.io", "docker.io"],
    ),
    (
        "[upstreams.\"docker.io\"]\naliases = [\"quay.io\"]",
        &["quay.io"],
    ),
    ("listen = ", &["config.toml"]),
    (
        "[upstreams.\"docker.io\"]\nca_file = \"nosuch.pem\"",
        &["nosuch.pem"],
    ),
    (
        "[upstreams.\"docker.io\"]\ncredentials = { username = \"u\", password = { file = \"nosuch.txt\" } }",
        &["password", "nosuch.txt"],
    ),
    (
        "[upstreams.\"docker.io\"]\ncredentials = { username = \"u\", password = { env = \"NO_SUCH\" } }",
        &["password", "NO_SUCH"],
    ),
    ("log = \"upstream=loud\"", &["log", "upstream=loud"]),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_configuration_is_said_in_one_line() {
    for (lines, words) in MISTAKES {
        let start = Start::configured(lines);
        start.fails(2, words).await;
        assert!(!start.cache_dir().exists(), "{lines}");
    }
}

/// Lines of a configuration, what is in the file `held` that they name, and words of what is said of it.
const CONTENTS: [(&str, &str, &[&str]); 7] = [
    (
        "[upstreams.\"docker.io\"]\nca_file = \"held\"",
        "s3cret",
        &["config.toml:5", "upstreams.docker.io.ca_file", "held"],
    ),
    (
        "docker_config = \"held\"",
        "{ s3cret",
        &["config.toml:4", "docker_config", "held"],
    ),
    (
        "[clients]\nhtpasswd = \"held\"",
        "alice:$apr1$s3cret",
        &["config.toml:5", "clients.htpasswd", "held", "line 1"],
    ),
    (
        "[clients]\ntokens = \"held\"",
        "ci s3cret",
        &["config.toml:5", "clients.tokens", "held", "line 1"],
    ),
    (
        "[tls]\ncert_file = \"one.crt\"\nkey_file = \"held\"",
        "s3cret",
        &["config.toml:6", "tls.key_file", "held", "no private key"],
    ),
    (
        "[tls]\nkey_file = \"one.key\"\ncert_file = \"held\"",
        "s3cret",
        &["config.toml:6", "tls.cert_file", "held", "no certificate"],
    ),
    (
        "[tls]\ncert_file = \"other.crt\"\nkey_file = \"one.key\"",
        "s3cret",
        &["config.toml:5", "tls.cert_file", "other.crt", "key"],
    ),
];

/// What is in files is judged before anything is begun, and by `config check` as by serving.
#[tokio::test(flavor = "multi_thread")]
async fn files_that_hold_something_else_are_refused_by_their_keys() {
    let check = ["config", "check", "--config", "config.toml"];
    for (lines, held, words) in CONTENTS {
        let start = Start::configured(lines);
        for name in ["one", "other"] {
            let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a key");
            let file = |end: &str| start.home.path().join(format!("{name}.{end}"));
            fs::write(file("crt"), made.cert.pem()).expect("write a certificate");
            fs::write(file("key"), made.signing_key.serialize_pem()).expect("write a key");
        }
        fs::write(start.home.path().join("held"), held).expect("write a file");
        start.fails(2, words).await;
        assert!(!start.end().await.said.concat().contains("s3cret"));
        start.arguments(&check).fails(2, words).await;
    }
    let start = Start::configured("").environment("DOCKER_AUTH_CONFIG", "{ s3cret");
    let words = ["environment variable DOCKER_AUTH_CONFIG", "no login file"];
    start.fails(2, &words).await;
    start.arguments(&check).fails(2, &words).await;
}

/// A password in a URL is refused, and not shown.
#[tokio::test(flavor = "multi_thread")]
async fn a_url_with_a_password_is_refused_without_showing_it() {
    let start = Start::configured("[upstreams.x]\nurl = \"https://user:hunter2@x.example\"");
    start.fails(2, &["url"]).await;
    assert!(!start.end().await.said.concat().contains("hunter2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_environment_is_said_in_one_line() {
    for (name, value, words) in [
        (
            "OCI_REMOTE_CACHE_LISEN",
            "127.0.0.1:1",
            &["OCI_REMOTE_CACHE_LISEN", "OCI_REMOTE_CACHE_LISTEN"][..],
        ),
        (
            "OCI_REMOTE_CACHE_LISTEN",
            "nowhere",
            &["OCI_REMOTE_CACHE_LISTEN", "nowhere"],
        ),
        (
            "OCI_REMOTE_CACHE_CACHE__MAX_SIZE",
            "much",
            &["OCI_REMOTE_CACHE_CACHE__MAX_SIZE", "much"],
        ),
        (
            "OCI_REMOTE_CACHE_UPSTREAMS__DOCKER_IO__TAG_TTL",
            "soon",
            &["OCI_REMOTE_CACHE_UPSTREAMS__DOCKER_IO__TAG_TTL", "soon"],
        ),
        ("RUST_LOG", "upstream=loud", &["RUST_LOG", "upstream=loud"]),
        ("RUST_LOG", "inof", &["RUST_LOG", "inof", "\"info\""]),
        (
            "OCI_REMOTE_CACHE_LOG",
            "inof",
            &["OCI_REMOTE_CACHE_LOG", "inof", "\"info\""],
        ),
    ] {
        let start = Start::configured("").environment(name, value);
        start.fails(2, words).await;
        // What serving refuses is found by looking, too.
        let check = ["config", "check", "--config", "config.toml"];
        start.arguments(&check).fails(2, words).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_is_code_two() {
    for arguments in [
        &["--nonsense"][..],
        &["nonsense"],
        &["serve", "--listen"],
        &["config", "nonsense"],
        &["ls", "--listen", "127.0.0.1:1"],
    ] {
        let ended = Start::new().arguments(arguments).end().await;
        assert_eq!(ended.code, Some(2), "{arguments:?}: {ended:?}");
    }
    Start::new()
        .arguments(&["serve", "--config", "nosuch.toml"])
        .fails(2, &["nosuch.toml"])
        .await;
    Start::new()
        .arguments(&["serve", "--config", "."])
        .fails(2, &["."])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("take a port");
    let address = taken.local_addr().expect("an address").to_string();
    for key in ["listen", "admin_listen"] {
        let start = Start::configured(&format!("{key} = \"{address}\""));
        start.fails(1, &[&address, key]).await;
        assert!(!start.cache_dir().exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_folder_that_is_a_file_is_refused() {
    let start = Start::configured("");
    fs::write(start.cache_dir(), "not a folder").expect("write a file");
    start.fails(2, &["cache_dir", "no folder"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_folder_that_cannot_be_made_is_refused() {
    let start = Start::configured("cache_dir = \"file/below\"");
    fs::write(start.home.path().join("file"), "not a folder").expect("write a file");
    start.fails(1, &["file/below"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_folder_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can give a folder away");
    }
    let start = Start::configured("");
    fs::create_dir(start.cache_dir()).expect("make a folder");
    chown(start.cache_dir(), Some(12_345), None).expect("give a folder away");
    start.fails(1, &["cache", "user"]).await;
}

/// Whoever may write the folder that a symlink lies in may lead the cache anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_symlink_that_others_may_change_is_refused() {
    let start = Start::configured("cache_dir = \"open/link\"");
    let (open, real) = (
        start.home.path().join("open"),
        start.home.path().join("real"),
    );
    fs::create_dir(&open).expect("make a folder");
    fs::create_dir(&real).expect("make a folder");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("open a folder");
    symlink(&real, open.join("link")).expect("make a link");
    start.fails(1, &["open/link"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_store_is_left_alone() {
    let (_registry, cache, image) = up_with_image().await;
    cache.pull("up", &image).await;
    cache.terminate().await;
    let format = cache.cache_dir().join("format");
    assert!(format.exists(), "no file tells the format");
    fs::write(format, "999\n").expect("write a newer format");
    let start = Start::configured(&format!("cache_dir = \"{}\"", cache.cache_dir().display()));
    let before = everything_below(&cache.cache_dir());
    start.fails(1, &["999", "newer"]).await;
    assert_eq!(everything_below(&cache.cache_dir()), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_on_the_same_folder_is_refused() {
    let (_registry, cache, image) = up_with_image().await;
    let folder = cache.cache_dir().display().to_string();
    let before = everything_below(&cache.cache_dir());
    Start::configured(&format!("cache_dir = \"{folder}\""))
        .fails(1, &["lock", &folder])
        .await;
    assert_eq!(everything_below(&cache.cache_dir()), before);
    cache.pull("up", &image).await;
    cache.kill9().await;
    cache.restart().await;
    cache.pull("up", &image).await;
    cache.check_invariants().await;
}

/// Flags beat the environment, which beats the file; no command means serve.
#[tokio::test(flavor = "multi_thread")]
async fn flags_beat_the_environment_which_beats_the_file() {
    let ((by_flag, admin), (by_variable, _)) = (free_ports(), free_ports());
    let start = Start::configured("listen = \"127.0.0.1:1\"\nadmin_listen = \"127.0.0.1:1\"");
    let listen = format!("127.0.0.1:{by_flag}");
    let start = start
        .arguments(&["--config", "config.toml", "--listen", &listen])
        .environment(
            "OCI_REMOTE_CACHE_LISTEN",
            &format!("127.0.0.1:{by_variable}"),
        )
        .environment(
            "OCI_REMOTE_CACHE_ADMIN_LISTEN",
            &format!("127.0.0.1:{admin}"),
        )
        .environment("CACHE_DIRECTORY", "/nonexistent");
    let mut child = start.serves(by_flag).await;
    assert_eq!(Request::get("/healthz").send(admin).await.status, 200);
    assert_eq!(Request::get("/v2/").send(by_variable).await.status, 0);
    assert!(start.cache_dir().join("blobs").is_dir());
    signal(child.id().expect("a process"), Signal::TERM);
    let status = timeout(Duration::from_secs(20), child.wait())
        .await
        .expect("an end")
        .expect("a status");
    assert_eq!(status.code(), Some(0));
}

/// systemd names the folder; a folder below `/tmp` is said not to last, with the key that changes it.
#[tokio::test(flavor = "multi_thread")]
async fn systemds_folder_is_used_and_one_that_will_not_last_is_told() {
    let (port, admin) = free_ports();
    let (listen, admin_listen) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{admin}"));
    let start = Start::new();
    let folder = start.home.path().join("systemd");
    let start = start
        .arguments(&["--listen", &listen, "--admin-listen", &admin_listen])
        .environment("CACHE_DIRECTORY", &format!("{}:/second", folder.display()));
    let child = start.serves(port).await;
    assert!(folder.join("blobs").is_dir());
    signal(child.id().expect("a process"), Signal::TERM);
    let output = timeout(Duration::from_secs(20), child.wait_with_output())
        .await
        .expect("an end")
        .expect("its output");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let told = text
        .lines()
        .filter(|line| line.contains("will not last") && line.contains("cache_dir"))
        .count();
    if folder.starts_with("/tmp") {
        assert_eq!(told, 1, "{text}");
    }
}

/// An address for both families is reached by both, where the machine has both.
#[tokio::test(flavor = "multi_thread")]
async fn one_address_serves_both_families() {
    let (port, admin) = free_ports();
    let start = Start::configured(&format!(
        "listen = \"[::]:{port}\"\nadmin_listen = \"127.0.0.1:{admin}\""
    ));
    let child = start.serves(port).await;
    if TcpListener::bind("[::1]:0").is_ok() {
        tokio::net::TcpStream::connect(("::1", port))
            .await
            .expect("connect by IPv6");
    }
    drop(child);
}

/// A cache with a client that has half of its blob.
async fn half_way() -> (
    Registry,
    CacheProcess,
    testbed::Content,
    Gate,
    testbed::Incoming,
) {
    let (registry, cache, blob) = up_with_blob(4 << 20).await;
    let gate = Gate::new();
    registry.script(
        Kind::Blob,
        faults::serve(&blob, ServeOptions::new().pause(2 << 20, &gate)),
    );
    let request = Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data);
    let mut client = request.open(cache.port()).await.expect("a head");
    assert!(client.read(1 << 20).await, "{}", client.response);
    (registry, cache, blob, gate, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_a_transfer_end() {
    let (registry, cache, blob, gate, client) = half_way().await;
    signal(cache.pid(), Signal::TERM);
    let closed = async {
        while cache.get("/v2/").await.status != 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(5), closed)
        .await
        .expect("new clients are turned away");
    assert!(cache.is_running(), "it ended with a transfer under way");
    gate.open();
    let response = client.finish().await;
    assert!(response.is_right(), "{response}");
    let ended = eventually(Duration::from_secs(15), || !cache.is_running()).await;
    assert!(ended, "it stays after the last transfer");
    registry.stop().await;
    cache.restart().await;
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    assert_eq!(registry.count(Kind::Blob), 1);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sigterm_stops_at_once() {
    let (registry, cache, blob, gate, client) = half_way().await;
    signal(cache.pid(), Signal::TERM);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(cache.is_running());
    signal(cache.pid(), Signal::TERM);
    let ended = eventually(Duration::from_secs(8), || !cache.is_running()).await;
    assert!(ended, "it stays after the second signal");
    let response = client.finish().await;
    assert!(!response.is_whole(), "{response}");
    gate.open();
    cache.restart().await;
    assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
    assert_holds(&cache, [&blob]).await;
    assert!(registry.count(Kind::Blob) <= 3);
    cache.check_invariants().await;
}

/// With nothing under way the end comes at once, in good order.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_cache_ends_at_once() {
    let (_registry, cache) = up().await;
    let mut idle = testbed::Connection::open(cache.port()).await;
    idle.send("GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(idle.response("GET").await.status, 200);
    let began = Instant::now();
    cache.terminate().await;
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "an idle connection held it for {:?}",
        began.elapsed()
    );
}

/// Who sends SIGHUP wants a service to read its configuration again, not to end.
#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_that_nobody_sees_ends_nothing() {
    let (_registry, cache) = up().await;
    cache.hang_up();
    let told = eventually(Duration::from_secs(5), || {
        cache
            .log()
            .contains("a changed configuration takes a restart")
    });
    assert!(told.await, "{}", cache.log());
    assert!(cache.is_running());
    assert_eq!(cache.get("/v2/").await.status, 200);
    cache.terminate().await;
}

/// An upstream that needs a file which is not there is told apart from one that is down.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_is_down_keeps_nobody_from_starting() {
    let cache = crate::stage::cache()
        .upstream(Upstream::new("up", "http://127.0.0.1:1"))
        .start()
        .await;
    assert_eq!(cache.get("/v2/").await.status, 200);
    assert_eq!(cache.get("/readyz").await.status, 200);
    cache.check_invariants().await;
}
