//! Runs the real cache as a process: writes its configuration, starts it, asks it, looks at its files, kills it.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use oci::Digest;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::client::{Request, Response, get};
use crate::config::CacheBuilder;
use crate::disk::{StoredFile, among_names, files_below, hosts, on_small_disk, seen_by};
use crate::image::{ACCEPT_ALL, Content, Image};
use crate::lock;

/// Ports for the cache are taken below the range that the system hands out, so that no outgoing connection of a
/// test that runs at the same time can sit on one between two starts.
const PORTS: std::ops::Range<u16> = 12_000..30_000;

/// A running cache in a folder of its own; ended, and its files removed, when dropped.
#[derive(Debug)]
pub struct CacheProcess {
    builder: CacheBuilder,
    home: TempDir,
    port: u16,
    admin_port: u16,
    child: Mutex<Option<Child>>,
}

impl CacheProcess {
    /// A cache of this binary: `env!("CARGO_BIN_EXE_oci-remote-cache")`.
    pub fn of(binary: impl Into<PathBuf>) -> CacheBuilder {
        CacheBuilder::new(binary.into())
    }

    pub(crate) async fn launch(builder: CacheBuilder) -> Self {
        let home = TempDir::with_prefix("testbed-").expect("make a folder for the cache");
        let (port, admin_port) = (free_port(), free_port());
        let process = CacheProcess {
            builder,
            home,
            port,
            admin_port,
            child: Mutex::new(None),
        };
        process.start().await;
        process
    }

    /// The port for clients.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port for operators.
    pub fn admin_port(&self) -> u16 {
        self.admin_port
    }

    /// The cache's folder; one on a disk of its own is seen through the process.
    pub fn cache_dir(&self) -> PathBuf {
        let folder = self.home.path().join("cache");
        match &*lock(&self.child) {
            Some(child) if self.builder.disk.is_some() => seen_by(child.id(), &folder),
            _ => folder,
        }
    }

    /// The folder that holds configuration, log and cache; free for a test's own files.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        lock(&self.child)
            .as_ref()
            .expect("the cache is running")
            .id()
    }

    /// A request to the clients' port.
    pub async fn send(&self, request: Request) -> Response {
        request.send(self.port).await
    }

    /// A GET at the clients' port.
    pub async fn get(&self, path: &str) -> Response {
        get(self.port, path, &[]).await
    }

    /// GET of a manifest by a client that takes every type.
    pub async fn manifest(
        &self,
        key: &str,
        repo: &str,
        reference: impl std::fmt::Display,
    ) -> Response {
        self.send(Request::get(&manifest_path(key, repo, reference)).header("Accept", ACCEPT_ALL))
            .await
    }

    /// HEAD of a manifest by a client that takes every type.
    pub async fn head_manifest(
        &self,
        key: &str,
        repo: &str,
        reference: impl std::fmt::Display,
    ) -> Response {
        self.send(Request::head(&manifest_path(key, repo, reference)).header("Accept", ACCEPT_ALL))
            .await
    }

    /// GET of a blob.
    pub async fn blob(&self, key: &str, repo: &str, digest: impl std::fmt::Display) -> Response {
        self.send(Request::get(&blob_path(key, repo, digest))).await
    }

    /// HEAD of a blob.
    pub async fn head_blob(
        &self,
        key: &str,
        repo: &str,
        digest: impl std::fmt::Display,
    ) -> Response {
        self.send(Request::head(&blob_path(key, repo, digest)))
            .await
    }

    /// Pulls an image by its tag as a client does, and fails unless every part is right.
    pub async fn pull(&self, key: &str, image: &Image) {
        let manifest = self.manifest(key, &image.repo, &image.tag).await;
        assert_good(&manifest, &image.manifest);
        for part in image.blobs() {
            assert_good(&self.blob(key, &image.repo, part.digest).await, part);
        }
    }

    /// Lets a name that the cache was built with ([`CacheBuilder::name`]) resolve to these addresses from now on.
    pub fn rename(&self, name: &str, addresses: &[&str]) {
        let mut names = self.builder.names.clone();
        names.retain(|(other, _)| other != name);
        let addresses = addresses.iter().map(|&address| address.to_owned());
        names.push((name.to_owned(), addresses.collect()));
        // Written into the file that is there: another one would not be seen where this one is mounted.
        fs::write(self.hosts_path(), hosts(&names)).expect("write the names");
    }

    /// Runs a command of the binary with the same configuration.
    pub async fn run(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(None);
        command
            .args(arguments)
            .arg("--config")
            .arg(self.config_path());
        tokio::task::spawn_blocking(move || command.output())
            .await
            .expect("wait for a command")
            .expect("run a command")
    }

    /// Ends the process without a warning, as the kernel or a power failure would.
    pub async fn kill9(&self) {
        self.signal(Signal::KILL);
        self.wait(Duration::from_secs(10)).await;
    }

    /// Asks the process to end and waits; fails when it does not.
    pub async fn terminate(&self) {
        self.signal(Signal::TERM);
        let ended = self.wait(Duration::from_secs(20)).await;
        assert!(
            ended,
            "the cache did not end within 20 s of SIGTERM: {}",
            self.log_tail()
        );
    }

    /// What a closed terminal sends, and who thinks that a configuration is read again.
    pub fn hang_up(&self) {
        self.signal(Signal::HUP);
    }

    /// Ends the process in good order, unless it has ended, and starts it again on the same files and ports.
    pub async fn restart(&self) {
        if self.is_running() {
            self.terminate().await;
        }
        self.start().await;
    }

    /// As [`CacheProcess::restart`], with the cache's folder emptied in between.
    pub async fn restart_empty(&self) {
        if self.is_running() {
            self.terminate().await;
        }
        fs::remove_dir_all(self.home.path().join("cache")).expect("empty the cache's folder");
        self.start().await;
    }

    /// Whether the process lives.
    pub fn is_running(&self) -> bool {
        let mut child = lock(&self.child);
        child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// All that the process wrote since the first start. Its lines gather for some milliseconds before they are written.
    pub fn log(&self) -> String {
        std::thread::sleep(Duration::from_millis(30));
        fs::read(self.log_path())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The Prometheus page.
    pub async fn metrics(&self) -> String {
        get(self.admin_port, "/metrics", &[]).await.text()
    }

    /// Bytes of memory that are no file.
    pub fn anonymous_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))
            .expect("read the process's status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .unwrap_or_default();
        line.split_whitespace()
            .next()
            .and_then(|number| number.parse::<u64>().ok())
            .unwrap_or(0)
            * 1024
    }

    /// How many files and sockets the process has open.
    pub fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("read the process's files")
            .count()
    }

    /// The files below `blobs/`.
    pub fn stored(&self) -> Vec<StoredFile> {
        files_below(&self.cache_dir().join("blobs"))
            .into_iter()
            .filter_map(StoredFile::of)
            .collect()
    }

    /// The files below `spool/`: fills in flight.
    pub fn spool_files(&self) -> Vec<PathBuf> {
        files_below(&self.cache_dir().join("spool"))
    }

    /// Where a blob or manifest lies when it is stored.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        let (algorithm, hex) = (digest.algorithm().name(), digest.hex());
        let prefix: String = hex.chars().take(2).collect();
        self.cache_dir()
            .join("blobs")
            .join(algorithm)
            .join(prefix)
            .join(hex)
    }

    /// Whether a blob or manifest is stored.
    pub fn holds(&self, digest: &Digest) -> bool {
        self.blob_path(digest).exists()
    }

    /// Waits up to eight seconds until a blob or manifest is stored; fails when it is not.
    pub async fn wait_until_stored(&self, digest: &Digest) {
        assert!(
            eventually(Duration::from_secs(8), || self.holds(digest)).await,
            "{digest} is not stored"
        );
    }

    /// What must be true at the end of every test: each stored file hashes to its name, no spool is left five
    /// seconds later, and no secret is in the log.
    pub async fn check_invariants(&self) {
        let swept = eventually(Duration::from_secs(5), || self.spool_files().is_empty()).await;
        assert!(swept, "left in the spool: {:?}", self.spool_files());
        for file in self.stored() {
            assert!(
                file.hashes_to_its_name(),
                "{} does not hash to its name",
                file.path.display()
            );
        }
        let log = self.log();
        for secret in &self.builder.secrets {
            assert!(
                !log.contains(secret.as_str()),
                "the secret {secret:?} is in the log"
            );
        }
    }

    async fn start(&self) {
        fs::create_dir_all(self.home.path().join("cache")).expect("make the cache's folder");
        fs::write(
            self.config_path(),
            self.builder.text(
                (self.port, self.admin_port),
                &self.home.path().join("cache"),
            ),
        )
        .expect("write the configuration");
        if !self.builder.names.is_empty() {
            fs::write(self.hosts_path(), hosts(&self.builder.names)).expect("write the names");
        }
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("open the log");
        let mut command = self.command(self.builder.disk);
        command.arg("serve").arg("--config").arg(self.config_path());
        command
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("start {}: {error}", self.builder.binary.display()));
        *lock(&self.child) = Some(child);
        self.wait_until_ready().await;
    }

    /// What the machine's own environment says of proxies, logs and folders is not for the cache under test.
    fn command(&self, disk: Option<u64>) -> Command {
        let binary = &self.builder.binary;
        let mut command = match disk {
            Some(bytes) => on_small_disk(bytes, &self.home.path().join("cache"), binary),
            None if self.builder.names.is_empty() => Command::new(binary),
            None => among_names(&self.hosts_path(), binary),
        };
        command.current_dir(self.home.path()).stdin(Stdio::null());
        for name in [
            "RUST_LOG",
            "CACHE_DIRECTORY",
            "DOCKER_AUTH_CONFIG",
            "http_proxy",
            "https_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        ] {
            command.env_remove(name);
        }
        command.envs(
            self.builder
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        );
        command
    }

    async fn wait_until_ready(&self) {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            assert!(
                self.is_running(),
                "the cache ended at its start: {}",
                self.log_tail()
            );
            let ping = Request::get("/v2/").timeout(Duration::from_secs(5));
            let status = self.send(ping).await.status;
            // A port that speaks TLS says so in plain HTTP.
            if matches!(status, 200 | 401) || (self.builder.tls && status == 400) {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
        panic!("the cache did not answer within 20 s: {}", self.log_tail());
    }

    /// Waits for the end of the process; false when it lives on.
    async fn wait(&self, limit: Duration) -> bool {
        eventually(limit, || !self.is_running()).await
    }

    fn signal(&self, signal: Signal) {
        if !self.is_running() {
            return;
        }
        let pid = i32::try_from(self.pid())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a process id");
        kill_process(pid, signal).expect("signal the cache");
    }

    fn config_path(&self) -> PathBuf {
        self.home.path().join("config.toml")
    }

    fn hosts_path(&self) -> PathBuf {
        self.home.path().join("hosts")
    }

    fn log_path(&self) -> PathBuf {
        self.home.path().join("cache.log")
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines
            .iter()
            .skip(lines.len().saturating_sub(8))
            .copied()
            .collect::<Vec<&str>>()
            .join(" | ")
    }
}

impl Drop for CacheProcess {
    fn drop(&mut self) {
        if let Some(child) = lock(&self.child).as_mut() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// `/v2/<key>/<repo>/manifests/<reference>`.
pub fn manifest_path(key: &str, repo: &str, reference: impl std::fmt::Display) -> String {
    format!("/v2/{key}/{repo}/manifests/{reference}")
}

/// `/v2/<key>/<repo>/blobs/<digest>`.
pub fn blob_path(key: &str, repo: &str, digest: impl std::fmt::Display) -> String {
    format!("/v2/{key}/{repo}/blobs/{digest}")
}

/// Fails unless the answer is a complete 200 with exactly this content.
pub fn assert_good(response: &Response, content: &Content) {
    let (what, digest) = (&content.media_type, content.digest);
    assert!(
        response.is_whole(),
        "{what} {digest}: got {response}, want 200: {}",
        response.text()
    );
    // Not assert_eq, which would print both.
    assert!(
        response.body == content.data,
        "{what} {digest}: wrong bytes"
    );
}

/// Looks every 20 ms until the condition holds or the time is up.
pub async fn eventually(limit: Duration, condition: impl Fn() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// A port nobody listens on, in an order of this process's own, so that tests in several processes do not meet.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let width = PORTS.end - PORTS.start;
    let start =
        u16::try_from(std::process::id().wrapping_mul(7919) % u32::from(width)).unwrap_or(0);
    for _ in 0..width {
        let step = NEXT.fetch_add(1, Ordering::SeqCst);
        let port = PORTS.start + (start.wrapping_add(step)) % width;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}
