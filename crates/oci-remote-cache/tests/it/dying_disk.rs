//! A disk that answers EIO: in the middle of a transfer, when it ends, and when what is stored is to be read. No pull fails of it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use testbed::cache::blob_path;
use testbed::{
    CacheBuilder, CacheProcess, Content, ImageSpec, Kind, Registry, Request, ServeOptions,
    Upstream, assert_good, eventually, faults,
};

use crate::encrypted::{Office, url};
use crate::stage::{BINARY, REPO, assert_holds, cache, said};

const MIB: usize = 1 << 20;

/// A cache between which and the kernel calls can be made to fail.
struct Ward {
    folder: TempDir,
    registry: Registry,
    cache: CacheProcess,
}

impl Ward {
    /// `None` where the calls cannot be got in between: no C compiler, or a binary that brings its own C library.
    async fn open() -> Option<Self> {
        Self::of(cache()).await
    }

    async fn of(builder: CacheBuilder) -> Option<Self> {
        let folder = tempfile::tempdir().expect("make a folder");
        let shim = folder.path().join("eio.so");
        let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/eio.c");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&shim, &source])
            .args(["-ldl"])
            .status();
        let linked = fs::read(BINARY).is_ok_and(|binary| {
            let wanted = b"libc.so.6";
            binary.windows(wanted.len()).any(|part| part == wanted)
        });
        if !linked || !built.is_ok_and(|status| status.success()) {
            eprintln!("skipped: this machine does not let a test stand before its C library");
            return None;
        }
        let registry = Registry::start().await;
        let cache = builder
            .upstream(Upstream::new("up", registry.url()))
            .environment("LD_PRELOAD", &shim.display().to_string())
            .environment("EIO", &folder.path().display().to_string())
            .start()
            .await;
        Some(Self {
            folder,
            registry,
            cache,
        })
    }

    fn ail(&self, what: &str) {
        fs::write(self.folder.path().join(what), "").expect("let calls fail");
    }

    fn heal(&self, what: &str) {
        fs::remove_file(self.folder.path().join(what)).expect("let calls succeed");
    }

    fn blob(&self, size: usize, seed: &str) -> Content {
        let blob = Content::blob(size, seed);
        self.registry.put_blob(REPO, &blob);
        blob
    }

    async fn get(&self, blob: &Content) -> testbed::Response {
        let ask = Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data);
        ask.send(self.cache.port()).await
    }

    /// A metric and a warning tell of it, and nothing of the blob is left.
    async fn assert_told(&self, blob: &Content) {
        let told = eventually(Duration::from_secs(5), || {
            self.cache.log().contains("\"WARN\"")
        });
        assert!(told.await, "no warning tells of it");
        let counted = async || {
            let page = self.cache.metrics().await;
            page.contains("oci_remote_cache_store_faults_total ")
                && !page.contains("oci_remote_cache_store_faults_total 0\n")
        };
        for _ in 0..50 {
            if counted().await {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(counted().await, "no metric tells of it");
        assert!(!self.cache.holds(&blob.digest), "it is stored");
        let swept = eventually(Duration::from_secs(5), || {
            self.cache.spool_files().is_empty()
        });
        assert!(
            swept.await,
            "left in the spool: {:?}",
            self.cache.spool_files()
        );
    }

    /// The disk is well again: what failed is fetched, stored, and a hit.
    async fn assert_recovers(&self, blob: &Content) {
        for _ in 0..40 {
            let response = self.get(blob).await;
            assert!(response.is_right(), "{response}");
            if said(&response) == "oci-remote-cache; hit" && self.cache.holds(&blob.digest) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        panic!("it is not stored again: {}", self.cache.log());
    }
}

/// F23 with EIO: a write in the middle of a transfer fails while many read along. Each gets the whole right blob.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_fails_in_mid_transfer_costs_no_reader() {
    let Some(ward) = Ward::open().await else {
        return;
    };
    let blob = ward.blob(12 * MIB, "large");
    ward.ail("write");
    ward.cache.restart().await;
    let request = Request::get(&blob_path("up", REPO, blob.digest)).compare(&blob.data);
    for response in request.storm(ward.cache.port(), 12).await {
        assert!(response.is_right(), "{response} ({:?})", response.right);
    }
    ward.assert_told(&blob).await;
    // Wrong bytes are wrong on a dying disk too.
    let wrong = ward.blob(4 * MIB, "wrong");
    let other = Content::blob(4 * MIB, "other");
    ward.registry.script(
        testbed::Matcher::blobs().of(wrong.digest),
        faults::serve(&wrong, ServeOptions::new().data(other.data.clone())),
    );
    let response = ward.get(&wrong).await;
    assert!(!response.is_whole(), "wrong bytes were completed");
    ward.registry.clear_scripts();
    ward.heal("write");
    ward.cache.restart().await;
    ward.assert_recovers(&blob).await;
    ward.cache.check_invariants().await;
}

/// The bytes are here and right, but the disk will not say that it has them: they are passed on and not kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_sync_that_fails_leaves_nothing_that_may_be_lost() {
    let Some(ward) = Ward::open().await else {
        return;
    };
    let blob = ward.blob(3 * MIB, "layer");
    ward.ail("sync");
    let response = ward.get(&blob).await;
    assert!(response.is_right(), "{response}");
    ward.assert_told(&blob).await;
    let image = ward.registry.put_image(&ImageSpec::new(REPO, "v1"));
    ward.cache.pull("up", &image).await;
    assert_holds::<Content>(&ward.cache, []).await;
    ward.heal("sync");
    ward.assert_recovers(&blob).await;
    ward.cache.check_invariants().await;
}

/// What is stored cannot be read: it is asked for upstream, and the client sees nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_fetched() {
    let Some(ward) = Ward::open().await else {
        return;
    };
    let image = ward.registry.put_image(&ImageSpec::new(REPO, "v1"));
    let blob = ward.blob(3 * MIB, "layer");
    for what in ["open", "read"] {
        ward.cache.pull("up", &image).await;
        ward.assert_recovers(&blob).await;
        for part in [&image.manifest, image.layer()] {
            ward.cache.wait_until_stored(&part.digest).await;
        }
        // Nothing is open any more, and nothing in memory.
        ward.cache.restart().await;
        ward.ail(what);
        for _ in 0..2 {
            let answer = ward.cache.manifest("up", REPO, "v1").await;
            assert_good(&answer, &image.manifest);
            ward.cache.pull("up", &image).await;
            assert!(ward.get(&blob).await.is_right());
        }
        assert!(
            ward.registry.count((Kind::Manifest, "GET")) > 0,
            "nothing failed"
        );
        ward.heal(what);
    }
    ward.assert_recovers(&blob).await;
    ward.cache.pull("up", &image).await;
    ward.cache.check_invariants().await;
}

/// A stored blob turns out to be unreadable when its first bytes are out already: that answer is cut, and the next is whole again. By TLS
/// and from file to socket; the kernel's own read behind sendfile(2) is out of reach, so it fails from its first byte.
#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_off_is_fetched_the_next_time() {
    let office = Office::new();
    for encrypted in [true, false] {
        let builder = if encrypted { office.cache() } else { cache() };
        let Some(ward) = Ward::of(builder).await else {
            return;
        };
        if !encrypted {
            ward.ail("send");
            ward.cache.restart().await;
        }
        let blob = ward.blob(3 * MIB, "layer");
        let client = office.client(|builder| builder);
        let path = blob_path("up", REPO, blob.digest);
        let path = if encrypted {
            url(&ward.cache, &path)
        } else {
            format!("http://127.0.0.1:{}{path}", ward.cache.port())
        };
        let get = async || client.get(&path).send().await?.bytes().await;
        assert!(get().await.is_ok_and(|bytes| bytes == blob.data));
        ward.cache.wait_until_stored(&blob.digest).await;
        // From the disk, and not from the end of the transfer.
        ward.cache.restart().await;
        ward.ail("late");
        assert!(get().await.is_err(), "what cannot be read was completed");
        let gone = eventually(Duration::from_secs(5), || !ward.cache.holds(&blob.digest));
        assert!(gone.await, "it would be cut for ever");
        ward.heal("late");
        assert!(get().await.is_ok_and(|bytes| bytes == blob.data));
        assert_eq!(ward.registry.count((Kind::Blob, "GET")), 2);
        assert_holds(&ward.cache, [&blob]).await;
        ward.cache.check_invariants().await;
    }
}

/// Some sandboxes and filesystems have no sendfile(2): what is stored is served all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_without_sendfile_serves_as_well() {
    let Some(ward) = Ward::open().await else {
        return;
    };
    ward.ail("unsent");
    ward.cache.restart().await;
    let blob = ward.blob(5 * MIB + 123, "layer");
    for _ in 0..2 {
        let path = blob_path("up", REPO, blob.digest);
        let requests = Request::get(&path).compare(&blob.data);
        for response in requests.storm(ward.cache.port(), 8).await {
            assert!(response.is_right(), "{response} ({:?})", response.right);
        }
    }
    let part =
        Request::get(&blob_path("up", REPO, blob.digest)).header("Range", "bytes=100-1999999");
    let part = ward.cache.send(part).await;
    assert_eq!(
        (part.status, &part.body[..]),
        (206, &blob.data[100..2_000_000])
    );
    assert!(!ward.cache.log().contains("cannot read a stored file"));
    assert_eq!(ward.registry.count((Kind::Blob, "GET")), 1);
    ward.cache.check_invariants().await;
}
