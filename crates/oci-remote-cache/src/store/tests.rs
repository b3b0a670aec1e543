use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::time::Duration;

use oci::Algorithm;
use tempfile::TempDir;

use super::spool::{PrefixHash, Spool};
use super::*;
use crate::names::UpstreamId;

const MOMENT: Duration = Duration::from_millis(10);

/// A cache folder in which stores are opened one after the other.
struct Bed {
    dir: TempDir,
    clock: Clock,
    metrics: Metrics,
    tasks: Tasks,
    max_size: u64,
}

impl Bed {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            clock: Clock::system(),
            metrics: Metrics::new(),
            tasks: Tasks::new(),
            max_size: 1 << 30,
        }
    }

    /// Opens the store; a task of the one before may hold the lock for a moment yet.
    async fn open(&self) -> Store {
        for _ in 0..200 {
            match self.try_open().await {
                Err(OpenError::Locked { .. }) => tokio::time::sleep(MOMENT).await,
                opened => return opened.unwrap(),
            }
        }
        panic!("the lock is not given back");
    }

    async fn try_open(&self) -> Result<Store, OpenError> {
        let settings = StoreSettings {
            dir: self.dir.path().join("cache"),
            max_size: Some(self.max_size),
            max_blob: None,
        };
        let (clock, metrics) = (self.clock.clone(), self.metrics.clone());
        Store::open(settings, clock, metrics, self.tasks.clone()).await
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("cache").join(name)
    }
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, bytes)
}

/// A finished spool with these bytes.
pub(super) fn verified(layout: &Layout, bytes: &[u8]) -> Verified {
    let spool = Spool::create(layout, digest(bytes), &UpstreamId::new("docker.io")).unwrap();
    spool.settle_size(bytes.len() as u64).unwrap();
    let spool = Arc::new(spool);
    spool.writer(0).write(&[bytes.to_vec().into()]).unwrap();
    let mut hash = PrefixHash::new(&digest(bytes));
    hash.follow(&spool).unwrap();
    spool.verify(hash).unwrap()
}

async fn admit(store: &Store, bytes: &[u8]) -> Blob {
    let room = store.usage().reserve(bytes.len() as u64);
    let verified = verified(store.layout(), bytes);
    store.admit(verified, Some(room)).await.unwrap()
}

fn read(blob: &Blob) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(blob.size).unwrap()];
    blob.file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

async fn eventually(what: impl Fn() -> bool) {
    for _ in 0..500 {
        if what() {
            return;
        }
        tokio::time::sleep(MOMENT).await;
    }
    panic!("it did not happen");
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn an_admitted_blob_is_a_hit_now_and_after_a_restart() {
    let bed = Bed::new();
    let store = bed.open().await;
    assert!(store.blob(&digest(b"hello")).await.is_none());
    let blob = admit(&store, b"hello").await;
    assert_eq!(read(&blob), b"hello");
    assert!(store.contains(&digest(b"hello")));
    let path = store.layout().blob_path(&digest(b"hello"));
    assert_eq!(mode(&path), 0o600);
    for folder in path.ancestors().skip(1).take(4) {
        assert_eq!(mode(folder), 0o700, "{}", folder.display());
    }
    assert_eq!(store.usage().total(), 5);
    assert_eq!(fs::read_dir(store.layout().spool_dir()).unwrap().count(), 0);
    drop((store, blob));

    let store = bed.open().await;
    assert_eq!(store.list()[0].trust, Trust::Proven);
    let blob = store.blob(&digest(b"hello")).await.unwrap();
    assert_eq!(read(&blob), b"hello");
    assert_eq!(
        &*blob.span(Slice { start: 1, end: 3 }).read().unwrap(),
        b"el"
    );
    assert_eq!(bed.metrics.store_faults.get(), 0);
}

#[tokio::test]
async fn admitting_twice_is_no_change() {
    let bed = Bed::new();
    let store = bed.open().await;
    let first = admit(&store, b"hello").await;
    let second = admit(&store, b"hello").await;
    assert_eq!(
        first.file.metadata().unwrap().ino(),
        second.file.metadata().unwrap().ino()
    );
    assert_eq!((store.usage().total(), store.usage().count()), (5, 1));
    assert_eq!(fs::read_dir(store.layout().spool_dir()).unwrap().count(), 0);
}

#[tokio::test]
async fn the_empty_blob_is_a_blob() {
    let bed = Bed::new();
    let store = bed.open().await;
    assert_eq!(admit(&store, b"").await.size, 0);
    drop(store);
    assert_eq!(bed.open().await.blob(&digest(b"")).await.unwrap().size, 0);
}

#[tokio::test]
async fn one_process_at_a_time() {
    let bed = Bed::new();
    let store = bed.open().await;
    let refused = bed.try_open().await.unwrap_err().to_string();
    assert!(refused.contains("lock"), "{refused}");
    assert!(
        refused.contains(bed.file("").to_str().unwrap().trim_end_matches('/')),
        "{refused}"
    );
    drop(store);
    bed.open().await;
}

#[tokio::test]
async fn a_changed_file_is_never_served() {
    let bed = Bed::new();
    let store = bed.open().await;
    drop(admit(&store, b"hello").await);
    let path = store.layout().blob_path(&digest(b"hello"));
    drop(store);
    fs::write(&path, b"jello").unwrap();

    let store = bed.open().await;
    assert!(store.blob(&digest(b"hello")).await.is_none());
    assert!(!store.contains(&digest(b"hello")));
    assert!(!path.exists());
    assert_eq!(store.catalog().blobs().unwrap(), []);
    assert_eq!(
        (store.usage().total(), bed.metrics.store_faults.get()),
        (0, 1)
    );
}

#[tokio::test]
async fn a_file_changed_while_the_store_is_open_is_found_out_when_opened() {
    let bed = Bed::new();
    let store = bed.open().await;
    drop(admit(&store, b"hello").await);
    drop(store);
    let store = bed.open().await;
    let path = store.layout().blob_path(&digest(b"hello"));
    fs::write(&path, b"jello").unwrap();
    assert!(store.blob(&digest(b"hello")).await.is_none());
    admit(&store, b"hello").await;
    assert_eq!(
        read(&store.blob(&digest(b"hello")).await.unwrap()),
        b"hello"
    );
}

#[tokio::test]
async fn a_missing_file_is_forgotten() {
    let bed = Bed::new();
    let store = bed.open().await;
    for bytes in [b"one", b"two"] {
        drop(admit(&store, bytes).await);
    }
    drop(store);
    let store = bed.open().await;
    fs::remove_file(store.layout().blob_path(&digest(b"one"))).unwrap();
    assert!(store.blob(&digest(b"one")).await.is_none());
    assert!(!store.contains(&digest(b"one")));
    fs::remove_file(store.layout().blob_path(&digest(b"two"))).unwrap();
    drop(store);
    let store = bed.open().await;
    assert!(!store.contains(&digest(b"two")));
    assert_eq!(store.catalog().blobs().unwrap(), []);
}

#[tokio::test]
async fn a_lost_catalog_loses_no_bytes() {
    for spoil in [
        |path: &Path| fs::remove_file(path).unwrap(),
        |path: &Path| fs::write(path, "?").unwrap(),
    ] {
        let bed = Bed::new();
        let store = bed.open().await;
        drop(admit(&store, b"hello").await);
        drop(store);
        fs::remove_file(bed.file("catalog.db-wal")).ok();
        spoil(&bed.file("catalog.db"));

        let store = bed.open().await;
        assert_eq!(store.condition(), None);
        assert_eq!(
            read(&store.blob(&digest(b"hello")).await.unwrap()),
            b"hello"
        );
        eventually(|| store.list()[0].trust == Trust::Proven).await;
        drop(store);
        assert_eq!(bed.open().await.list()[0].trust, Trust::Proven);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_storm_on_an_unproven_blob_is_served() {
    let bed = Bed::new();
    let bytes = vec![7; 1 << 20];
    let store = bed.open().await;
    drop(admit(&store, &bytes).await);
    drop(store);
    fs::remove_file(bed.file("catalog.db")).unwrap();
    let store = bed.open().await;
    let wanted = digest(&bytes);
    let asked = (0..64).map(|_| store.blob(&wanted));
    let blobs = futures_util::future::join_all(asked).await;
    assert!(blobs.iter().all(Option::is_some));
    eventually(|| store.shared.proving.of(&wanted).try_lock().is_ok()).await;
}

#[tokio::test]
async fn strays_are_moved_out_of_the_blobs() {
    let bed = Bed::new();
    let store = bed.open().await;
    drop(admit(&store, b"hello").await);
    let blob = store.layout().blob_path(&digest(b"hello"));
    let elsewhere = bed.file("blobs/sha256/00").join(blob.file_name().unwrap());
    drop(store);
    fs::create_dir_all(bed.file("blobs/sha256/00/folder")).unwrap();
    fs::create_dir_all(bed.file("blobs/blake3/00")).unwrap();
    for stray in ["blobs/readme", "blobs/sha256/x", "blobs/sha256/00/abc.tmp"] {
        fs::write(bed.file(stray), "x").unwrap();
    }
    std::os::unix::fs::symlink(&blob, &elsewhere).unwrap();

    let store = bed.open().await;
    assert_eq!(store.list().len(), 1);
    assert_eq!(
        fs::read_dir(store.layout().strays_dir()).unwrap().count(),
        5
    );
    assert_eq!(
        fs::read_dir(bed.file("blobs/sha256/00")).unwrap().count(),
        0
    );
    assert!(bed.file("blobs/blake3/00").exists());
}

#[tokio::test]
async fn a_finished_spool_is_published_at_the_next_start() {
    let bed = Bed::new();
    let store = bed.open().await;
    let finished = verified(store.layout(), b"finished");
    let name = finished.path().file_name().unwrap().to_str().unwrap();
    let record = store
        .catalog()
        .record_pending(digest(b"finished"), 8, name.to_owned());
    record.await.unwrap();
    drop((store, finished));

    let store = bed.open().await;
    assert_eq!(
        read(&store.blob(&digest(b"finished")).await.unwrap()),
        b"finished"
    );
    assert_eq!(store.list()[0].trust, Trust::Proven);
    assert_eq!(store.catalog().pending().unwrap(), []);
}

#[tokio::test]
async fn a_blob_that_was_renamed_and_not_recorded_is_served() {
    let bed = Bed::new();
    let store = bed.open().await;
    let finished = verified(store.layout(), b"finished");
    let name = finished.path().file_name().unwrap().to_str().unwrap();
    let record = store
        .catalog()
        .record_pending(digest(b"finished"), 8, name.to_owned());
    record.await.unwrap();
    publish(store.layout(), &finished).unwrap();
    drop((store, finished));

    let store = bed.open().await;
    assert_eq!(store.catalog().pending().unwrap(), []);
    let blob = store.blob(&digest(b"finished")).await.unwrap();
    assert_eq!(read(&blob), b"finished");
    assert_eq!(store.list()[0].trust, Trust::Proven);
}

#[tokio::test]
async fn a_spool_that_is_not_what_was_verified_is_removed() {
    let bed = Bed::new();
    let store = bed.open().await;
    let finished = verified(store.layout(), b"finished");
    let name = finished
        .path()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    for (digest, name) in [
        (digest(b"finished"), name),
        (digest(b"other"), "../../etc/passwd".into()),
    ] {
        store
            .catalog()
            .record_pending(digest, 8, name)
            .await
            .unwrap();
    }
    fs::write(finished.path(), "fin").unwrap();
    drop((store, finished));

    let store = bed.open().await;
    assert_eq!(store.list(), []);
    assert_eq!(store.catalog().pending().unwrap(), []);
    assert_eq!(fs::read_dir(store.layout().spool_dir()).unwrap().count(), 0);
}

#[tokio::test]
async fn spools_with_pieces_are_parked_and_others_removed() {
    let bed = Bed::new();
    drop(bed.open().await);
    for name in [
        "spool/small",
        "spool/large",
        "spool/large.pieces",
        "spool/orphan.pieces",
    ] {
        fs::write(bed.file(name), vec![1; 5000]).unwrap();
    }
    let store = bed.open().await;
    assert_eq!(fs::read_dir(store.layout().spool_dir()).unwrap().count(), 0);
    assert!(bed.file("parked/large").exists() && bed.file("parked/large.pieces").exists());
    assert_eq!(
        fs::read_dir(store.layout().parked_dir()).unwrap().count(),
        2
    );
    assert!(store.usage().parked_bytes() >= 10_000);
}

#[tokio::test]
async fn parked_pieces_that_nobody_asks_for_go_after_a_week() {
    let bed = Bed::new();
    let store = bed.open().await;
    let left = [bed.file("parked/left"), bed.file("parked/left.pieces")];
    for file in &left {
        fs::write(file, vec![1; 8192]).unwrap();
    }
    bed.clock.advance(Duration::from_hours(6 * 24));
    store.count_parked().await;
    assert!(left.iter().all(|file| file.exists()));
    assert!(store.usage().parked_bytes() >= 16_384);
    bed.clock.advance(Duration::from_hours(2 * 24));
    store.count_parked().await;
    assert!(!left.iter().any(|file| file.exists()));
    assert_eq!(store.usage().parked_bytes(), 0);
}

#[tokio::test]
async fn the_limit_is_kept_by_evicting_what_was_used_least() {
    let bed = Bed {
        max_size: 100_000,
        ..Bed::new()
    };
    let store = bed.open().await;
    fs::write(bed.file("parked/old"), vec![1; 8192]).unwrap();
    store.count_parked().await;
    for number in 0..30_u8 {
        drop(admit(&store, &vec![number; 10_000]).await);
        bed.clock.advance(Duration::from_secs(1));
        store.blob(&digest(&vec![0; 10_000])).await.unwrap();
        eventually(|| store.usage().total() <= 100_000).await;
    }
    assert!(!bed.file("parked/old").exists(), "parked pieces go first");
    assert!(store.contains(&digest(&vec![29; 10_000])));
    assert!(
        store.contains(&digest(&vec![0; 10_000])),
        "what is used stays"
    );
    assert!(!store.contains(&digest(&vec![1; 10_000])));
    assert!(store.usage().count() >= 8);
    eventually(|| store.catalog().blobs().unwrap().len() == store.usage().count()).await;
    let files = |dir: &Path| {
        fs::read_dir(dir)
            .unwrap()
            .flatten()
            .map(|entry| entry.path())
            .collect::<Vec<_>>()
    };
    let blobs = files(&bed.file("blobs/sha256"))
        .iter()
        .map(|prefix| files(prefix).len())
        .sum::<usize>();
    assert_eq!(blobs, store.usage().count());
    assert!(bed.metrics.evicted.get() >= 20);
}

#[tokio::test]
async fn an_evicted_blob_is_read_to_its_end() {
    let bed = Bed::new();
    let store = bed.open().await;
    let reader = admit(&store, b"hello").await;
    assert!(!store.make_room(1).await, "a blob that is read stays");
    assert!(store.remove(&digest(b"hello")).await.unwrap());
    assert!(!store.contains(&digest(b"hello")));
    assert_eq!(read(&reader), b"hello");
    drop(admit(&store, b"world").await);
    assert!(store.make_room(5).await);
    assert!(!store.contains(&digest(b"world")));
}

#[tokio::test]
async fn uses_survive_a_restart() {
    let bed = Bed::new();
    let store = bed.open().await;
    drop(admit(&store, b"hello").await);
    bed.clock.advance(Duration::from_hours(1));
    store.blob(&digest(b"hello")).await.unwrap();
    let used = store.list()[0].last_used;
    store.close().await;
    drop(store);
    assert_eq!(bed.open().await.list()[0].last_used, used);
}

#[tokio::test]
async fn checking_tells_sound_from_damaged() {
    let bed = Bed::new();
    let store = bed.open().await;
    drop(admit(&store, b"hello").await);
    assert_eq!(store.check(&digest(b"hello")).await, Health::Sound);
    let path = store.layout().blob_path(&digest(b"hello"));
    let identity = path.metadata().unwrap().modified().unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"j", 0).unwrap();
    file.set_modified(identity).unwrap();
    assert_eq!(store.check(&digest(b"hello")).await, Health::Damaged);
    assert_eq!(store.check(&digest(b"hello")).await, Health::Absent);
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_is_served_from() {
    if rustix::process::geteuid().is_root() {
        return; // Root may write everywhere.
    }
    let bed = Bed::new();
    let store = bed.open().await;
    drop(admit(&store, b"hello").await);
    store.close().await;
    drop(store);
    fs::set_permissions(bed.file(""), fs::Permissions::from_mode(0o500)).unwrap();
    let store = bed.open().await;
    assert!(!store.writable());
    assert!(store.condition().unwrap().contains("cannot be written"));
    assert_eq!(
        read(&store.blob(&digest(b"hello")).await.unwrap()),
        b"hello"
    );
    fs::set_permissions(bed.file(""), fs::Permissions::from_mode(0o700)).unwrap();
}
