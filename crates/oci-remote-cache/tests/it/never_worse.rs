//! A cache that cannot keep anything still passes everything through, whole and verified, and says so.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use testbed::cache::blob_path;
use testbed::{
    CacheProcess, Content, Ending, Image, ImageSpec, Kind, Registry, Request, Response,
    ServeOptions, Upstream, assert_good, can_limit_disk, eventually, faults,
};

use crate::stage::{BINARY, REPO, assert_holds, cache, get_blob, said};

const MIB: usize = 1 << 20;

/// One number of the Prometheus page; 0 where there is no such line.
async fn metric(cache: &CacheProcess, name: &str) -> u64 {
    let page = cache.metrics().await;
    let lines = page.lines().filter(|line| line.starts_with(name));
    lines
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

fn bytes_stored(cache: &CacheProcess) -> u64 {
    cache
        .stored()
        .iter()
        .filter_map(|file| file.path.metadata().ok())
        .map(|file| file.len())
        .sum()
}

/// A registry and a cache whose folder lies on a disk of so many bytes, whatever its configuration believes.
async fn on_a_small_disk(bytes: usize) -> (Registry, CacheProcess) {
    let registry = Registry::start().await;
    let builder = cache()
        .upstream(Upstream::new("up", registry.url()))
        .max_size("10GiB")
        .disk(bytes as u64);
    (registry, builder.start().await)
}

/// F23
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_no_pull() {
    if !can_limit_disk() {
        return eprintln!("skipped: this machine does not let a test mount a small disk");
    }
    let (registry, cache) = on_a_small_disk(16 * MIB).await;
    let (small, large) = (
        Content::blob(100_000, "small"),
        Content::blob(24 * MIB, "large"),
    );
    for blob in [&small, &large] {
        registry.put_blob(REPO, blob);
    }
    assert_good(&cache.blob("up", REPO, small.digest).await, &small);
    cache.wait_until_stored(&small.digest).await;
    let response = Request::get(&blob_path("up", REPO, large.digest))
        .compare(&large.data)
        .send(cache.port())
        .await;
    assert!(response.is_right(), "{response}");
    assert!(
        metric(&cache, "oci_remote_cache_store_faults_total").await > 0,
        "no metric tells of it"
    );
    let told = eventually(Duration::from_secs(2), || cache.log().contains("\"WARN\"")).await;
    assert!(told, "no warning tells of it");
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    registry.stop().await;
    if cache.holds(&small.digest) {
        assert_eq!(
            said(&cache.blob("up", REPO, small.digest).await),
            "oci-remote-cache; hit"
        );
    }
    assert!(!cache.holds(&large.digest));
    assert_eq!(cache.get("/v2/").await.status, 200);
    cache.check_invariants().await;
}

/// F23: many clients of one blob that does not fit, each of whom gets all of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_on_a_full_disk_costs_no_pull() {
    if !can_limit_disk() {
        return eprintln!("skipped: this machine does not let a test mount a small disk");
    }
    let (registry, cache) = on_a_small_disk(8 * MIB).await;
    let large = Content::blob(12 * MIB, "large");
    registry.put_blob(REPO, &large);
    let before = cache.anonymous_memory();
    let request = Request::get(&blob_path("up", REPO, large.digest)).compare(&large.data);
    let responses = request.storm(cache.port(), 30).await;
    for response in &responses {
        assert!(response.is_right(), "{response} ({:?})", response.right);
    }
    assert!(
        cache.anonymous_memory() < before + (128 << 20),
        "{before} grew to {}",
        cache.anonymous_memory()
    );
    assert!(!cache.holds(&large.digest));
    cache.check_invariants().await;
}

/// F23: a bad blob is bad on a full disk too.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_lets_no_wrong_bytes_out() {
    if !can_limit_disk() {
        return eprintln!("skipped: this machine does not let a test mount a small disk");
    }
    let (registry, cache) = on_a_small_disk(8 * MIB).await;
    let large = Content::blob(12 * MIB, "large");
    registry.script(
        (Kind::Blob, "GET"),
        faults::serve(&large, ServeOptions::new().data(large.spoiled())),
    );
    let response = Request::get(&blob_path("up", REPO, large.digest))
        .compare(&large.data)
        .send(cache.port())
        .await;
    assert!(
        response.is_refused() && response.length < large.size(),
        "{response}"
    );
    cache.check_invariants().await;
}

/// The binary, in front of which the cache's folder becomes read-only once a file called `read-only` lies beside it.
fn binary_with_a_lock(folder: &Path) -> PathBuf {
    let script = format!(
        "#!/bin/sh\n[ -e read-only ] || exec {BINARY} \"$@\"\n\
         exec unshare --map-root-user --mount sh -c \
         'mount --bind cache cache && mount -o remount,bind,ro cache && exec \"$0\" \"$@\"' {BINARY} \"$@\"\n"
    );
    let path = folder.join("oci-remote-cache");
    fs::write(&path, script).expect("write a script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make a script run");
    path
}

async fn made_read_only(folder: &TempDir) -> (Registry, CacheProcess, Image) {
    let registry = Registry::start().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let cache = CacheProcess::of(binary_with_a_lock(folder.path()))
        .upstream(Upstream::new("up", registry.url()))
        .start()
        .await;
    cache.pull("up", &image).await;
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;
    cache.terminate().await;
    fs::write(cache.home().join("read-only"), "").expect("leave a mark");
    cache.restart().await;
    registry.clear_log();
    (registry, cache, image)
}

fn assert_bypassed(response: &Response) {
    assert!(
        said(response).contains("fwd=bypass; detail=disk"),
        "{}",
        said(response)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_cannot_be_written_is_read() {
    if !can_limit_disk() {
        return eprintln!("skipped: this machine does not let a test mount a folder read-only");
    }
    let folder = TempDir::new().expect("make a folder");
    let (registry, cache, image) = made_read_only(&folder).await;
    cache.pull("up", &image).await;
    assert_eq!(
        registry.requests(),
        Vec::<String>::new(),
        "what can be read is served"
    );

    let fresh = Content::blob(500_000, "fresh");
    registry.put_blob(REPO, &fresh);
    for _ in 0..2 {
        let answer = cache.blob("up", REPO, fresh.digest).await;
        assert_good(&answer, &fresh);
        assert_bypassed(&answer);
    }
    assert_eq!(registry.requests(), vec![get_blob(REPO, fresh.digest); 2]);
    let other = registry.put_image(&ImageSpec::new("lib/other", "v1"));
    cache.pull("up", &other).await;
    assert_holds(&cache, [&image.manifest, &image.config, image.layer()]).await;

    for port in [cache.port(), cache.admin_port()] {
        assert_eq!(Request::get("/healthz").send(port).await.status, 200);
        let ready = Request::get("/readyz").send(port).await;
        assert_eq!(ready.status, 503, "{}", ready.text());
        assert!(
            !ready.json()["reasons"][0]
                .as_str()
                .unwrap_or_default()
                .is_empty(),
            "{}",
            ready.text()
        );
    }
    cache.check_invariants().await;
}

/// The first start of all, in a folder that cannot be written.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_folder_that_cannot_be_written_is_passed_by() {
    if !can_limit_disk() {
        return eprintln!("skipped: this machine does not let a test mount a folder read-only");
    }
    let folder = TempDir::new().expect("make a folder");
    let (registry, cache, image) = made_read_only(&folder).await;
    cache.terminate().await;
    fs::remove_file(cache.home().join("read-only")).expect("take the mark away");
    fs::remove_dir_all(cache.home().join("cache")).expect("empty the folder");
    fs::create_dir(cache.home().join("cache")).expect("make the folder again");
    fs::write(cache.home().join("read-only"), "").expect("leave a mark");
    cache.restart().await;
    for _ in 0..2 {
        cache.pull("up", &image).await;
    }
    let ranged = cache
        .send(Request::get(&blob_path("up", REPO, image.layer().digest)).range("100-199"))
        .await;
    assert_eq!(
        (
            ranged.status,
            ranged.body == image.layer().data.slice(100..200)
        ),
        (206, true),
        "{ranged}"
    );
    assert!(cache.stored().is_empty());
    assert!(!registry.requests().is_empty());
    cache.check_invariants().await;
}

/// X14
#[tokio::test(flavor = "multi_thread")]
async fn the_quota_is_kept_and_every_pull_succeeds() {
    let registry = Registry::start().await;
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()))
        .max_size("8MiB")
        .start()
        .await;
    let favourite = Content::blob(MIB, "favourite");
    registry.put_blob(REPO, &favourite);
    for n in 0..40 {
        let blob = Content::blob(MIB, &format!("blob {n}"));
        registry.put_blob(REPO, &blob);
        assert_good(&cache.blob("up", REPO, favourite.digest).await, &favourite);
        assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
        cache.wait_until_stored(&blob.digest).await;
        let bounded = eventually(Duration::from_secs(5), || {
            bytes_stored(&cache) <= 8 * MIB as u64
        })
        .await;
        assert!(
            bounded,
            "{} bytes in a cache of 8 MiB",
            bytes_stored(&cache)
        );
    }
    assert_eq!(
        registry.count((Kind::Blob, "GET", favourite.digest)),
        1,
        "what is used stays"
    );
    assert!(
        cache.stored().len() >= 4,
        "{} blobs left",
        cache.stored().len()
    );
    assert!(metric(&cache, "oci_remote_cache_evicted_total").await >= 32);
    // What left can come again.
    let first = Content::blob(MIB, "blob 0");
    assert!(!cache.holds(&first.digest));
    assert_good(&cache.blob("up", REPO, first.digest).await, &first);
    cache.check_invariants().await;
}

/// X14
#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_passes_uncached() {
    let registry = Registry::start().await;
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()))
        .max_size("8MiB")
        .start()
        .await;
    let large = Content::blob(6 * MIB, "large");
    registry.put_blob(REPO, &large);
    for _ in 0..2 {
        let response = cache.blob("up", REPO, large.digest).await;
        assert_good(&response, &large);
        assert!(
            said(&response).contains("fwd=bypass; detail=too-large"),
            "{}",
            said(&response)
        );
    }
    let part = cache
        .send(Request::get(&blob_path("up", REPO, large.digest)).range("1000-1999"))
        .await;
    assert_eq!(
        (part.status, part.body == large.data.slice(1000..2000)),
        (206, true),
        "{part}"
    );
    assert!(cache.stored().is_empty());
    cache.check_invariants().await;
}

/// X14
#[tokio::test(flavor = "multi_thread")]
async fn ten_tebibytes_are_passed_on_and_not_kept() {
    let registry = Registry::start().await;
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()))
        .start()
        .await;
    let blob = Content::blob(2 * MIB, "the beginning");
    let size: u64 = 10 << 40;
    let headers = [
        ("Content-Type", "application/octet-stream"),
        ("Content-Length", "10995116277760"),
    ];
    registry.script(
        (Kind::Blob, "GET"),
        faults::declared(&headers, blob.data.clone(), Ending::Stall),
    );
    let request = Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data);
    let mut incoming = request.open(cache.port()).await.expect("a head");
    assert_eq!(
        (
            incoming.response.status,
            incoming.response.number("content-length")
        ),
        (200, Some(size))
    );
    assert!(
        said(&incoming.response).contains("fwd=bypass; detail=too-large"),
        "{}",
        said(&incoming.response)
    );
    assert!(incoming.read(MIB as u64).await, "{}", incoming.response);
    assert!(cache.spool_files().is_empty() && cache.stored().is_empty());
    incoming.abort();
    cache.check_invariants().await;
}
