use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use oci::Algorithm;
use tempfile::TempDir;

use super::*;
use crate::names::UpstreamId;

struct Bed {
    layout: Layout,
    metrics: Metrics,
    dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            layout: Layout::open(dir.path()).unwrap(),
            metrics: Metrics::new(),
            dir,
        }
    }

    fn path(&self) -> PathBuf {
        self.layout.catalog_path()
    }

    fn open(&self) -> Catalog {
        Catalog::open(&self.layout, Keeping::OnDisk, &self.metrics).unwrap()
    }

    /// The catalog as another process would find it if this one were killed now.
    fn killed(&self) -> (Self, Catalog) {
        let copy = Self::new();
        for name in ["catalog.db", "catalog.db-wal"] {
            fs::copy(self.dir.path().join(name), copy.dir.path().join(name)).unwrap();
        }
        let catalog = copy.open();
        (copy, catalog)
    }
}

fn digest(text: &str) -> Digest {
    Digest::of(Algorithm::Sha256, text.as_bytes())
}

fn source(upstream: &str, repository: &str) -> Source {
    Source::new(UpstreamId::new(upstream), repository.parse().unwrap())
}

fn alice() -> CredentialId {
    CredentialId::configured("alice")
}

fn member(source: &Source, digest: Digest, credential: CredentialId, proof: Proof) -> Membership {
    Membership {
        source: source.clone(),
        digest,
        kind: Kind::Blob,
        credential,
        proof,
    }
}

fn tag(digest: Digest, checked: i64) -> TagRecord {
    TagRecord {
        source: source("docker.io", "library/alpine"),
        tag: "latest".parse().unwrap(),
        digest,
        media_type: MediaType::parse(oci::OCI_INDEX).unwrap(),
        size: 7,
        checked: Timestamp(checked),
        first_seen: Timestamp(checked),
        suspended: false,
    }
}

fn identity(size: u64) -> FileIdentity {
    FileIdentity {
        size,
        mtime_ns: -5,
        inode: u64::MAX,
    }
}

#[tokio::test]
async fn what_was_recorded_survives_a_kill() {
    let bed = Bed::new();
    let catalog = bed.open();
    let here = source("docker.io", "library/alpine");
    let sha512 = Digest::of(Algorithm::Sha512, b"x");
    let media_type = MediaType::parse(oci::OCI_MANIFEST).unwrap();
    catalog
        .record_blob(sha512, identity(3), Timestamp(9))
        .await
        .unwrap();
    catalog
        .record_pending(digest("p"), 4, "spool-name".into())
        .await
        .unwrap();
    catalog
        .record_manifest(digest("m"), &media_type, 5)
        .await
        .unwrap();
    catalog.record_tag(tag(digest("m"), 1)).await.unwrap();
    catalog
        .suspend(&here, &alice(), Timestamp(2))
        .await
        .unwrap();
    let membership = member(&here, sha512, alice(), Proof::Delivered);
    catalog.record_membership(membership.clone()).await.unwrap();

    let (_bed, found) = bed.killed();
    let blob = BlobRecord {
        digest: sha512,
        identity: identity(3),
        last_used: Timestamp(9),
    };
    assert_eq!(found.blobs().unwrap(), [blob]);
    assert_eq!(found.pending().unwrap()[0].spool_name, "spool-name");
    let manifest = found.manifest(&digest("m")).unwrap().unwrap();
    assert_eq!((manifest.media_type, manifest.size), (media_type, 5));
    assert_eq!(found.tags().unwrap(), [tag(digest("m"), 1)]);
    assert!(found.is_suspended(&here, &alice()));
    assert_eq!(
        found.membership(&here, &sha512, Kind::Blob).unwrap(),
        Some(alice())
    );
    assert_eq!(
        found.delivered(&here.upstream, &sha512).unwrap(),
        Some(alice())
    );
    let holding = &found.holdings().unwrap()[0];
    assert_eq!(holding.membership, membership);
    assert_eq!(
        (holding.size, holding.last_used),
        (Some(3), Some(Timestamp(9)))
    );
    assert_eq!(bed.metrics.store_faults.get(), 0);
}

#[tokio::test]
async fn what_is_taken_back_ends_what_its_tags_meant() {
    let bed = Bed::new();
    let catalog = bed.open();
    let here = source("docker.io", "library/alpine");
    let meant = || {
        catalog
            .tag_history(&here, &tag(digest("a"), 1).tag)
            .unwrap()
    };
    let record = |changes| catalog.record(changes);
    catalog.record_tag(tag(digest("a"), 1)).await.unwrap();
    catalog.record_tag(tag(digest("b"), 2)).await.unwrap();
    let revoked = Change::Revoke(here.clone(), digest("a"), Kind::Manifest);
    record(vec![revoked]).await.unwrap();
    assert!(
        !meant()[0].deleted,
        "another manifest's purge is no matter of the tag's"
    );
    let revoked = Change::Revoke(here.clone(), digest("b"), Kind::Manifest);
    record(vec![revoked]).await.unwrap();
    assert!(meant()[0].deleted && !meant()[1].deleted);
    catalog.record_tag(tag(digest("b"), 3)).await.unwrap();
    assert!(!meant()[0].deleted, "the upstream says so again");
    let untag = Change::Untag(here.clone(), tag(digest("b"), 3).tag);
    record(vec![untag]).await.unwrap();
    assert!(meant()[0].deleted);
}

/// What was shown to a login counts only where the very same text is read back.
#[tokio::test]
async fn whose_rights_it_was_is_read_back_as_written() {
    let bed = Bed::new();
    let catalog = bed.open();
    let here = source("docker.io", "library/alpine");
    let client = CredentialId::client(&digest("a login"));
    let entry = CredentialId::configured("login:https://registry.example:5000/acme");
    let whose = [CredentialId::clients(), client.recorded(), entry, alice()];
    for credential in &whose {
        let shown = digest(credential.as_str());
        let membership = member(&here, shown, credential.clone(), Proof::Delivered);
        catalog.record_membership(membership).await.unwrap();
    }

    let (_bed, found) = bed.killed();
    for credential in whose {
        let shown = digest(credential.as_str());
        let read = found.membership(&here, &shown, Kind::Blob).unwrap();
        assert_eq!(read.as_ref(), Some(&credential));
        let delivered = found.delivered(&here.upstream, &shown).unwrap();
        assert_eq!(delivered.as_ref(), Some(&credential));
        assert!(!credential.is_anonymous() && !credential.is_client());
    }
}

#[tokio::test]
async fn the_file_is_private() {
    let bed = Bed::new();
    let catalog = bed.open();
    catalog.flush().await.unwrap();
    for name in ["catalog.db", "catalog.db-wal", "catalog.db-shm"] {
        let mode = bed
            .dir
            .path()
            .join(name)
            .metadata()
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

#[tokio::test]
async fn the_most_open_credential_stays() {
    let bed = Bed::new();
    let catalog = bed.open();
    let (here, x) = (source("docker.io", "a/b"), digest("x"));
    let seen = || catalog.membership(&here, &x, Kind::Blob).unwrap();
    assert_eq!(seen(), None);
    let bob = CredentialId::configured("bob");
    let steps = [
        (alice(), alice()),
        (bob.clone(), bob),
        (CredentialId::anonymous(), CredentialId::anonymous()),
        (alice(), CredentialId::anonymous()),
    ];
    for (shown_to, expected) in steps {
        let membership = member(&here, x, shown_to, Proof::Vouched);
        catalog.record_membership(membership).await.unwrap();
        assert_eq!(seen(), Some(expected.clone()));
        assert_eq!(
            bed.killed().1.membership(&here, &x, Kind::Blob).unwrap(),
            Some(expected)
        );
    }
    assert_eq!(catalog.membership(&here, &x, Kind::Manifest).unwrap(), None);
    assert_eq!(
        catalog
            .membership(&source("quay.io", "a/b"), &x, Kind::Blob)
            .unwrap(),
        None
    );
}

#[tokio::test]
async fn vouching_delivers_nothing() {
    let bed = Bed::new();
    let catalog = bed.open();
    let (here, there) = (source("docker.io", "a/b"), source("docker.io", "c/d"));
    let (x, docker) = (digest("x"), UpstreamId::new("docker.io"));
    let vouched = member(&here, x, CredentialId::anonymous(), Proof::Vouched);
    catalog.record_membership(vouched).await.unwrap();
    assert_eq!(catalog.delivered(&docker, &x).unwrap(), None);
    let delivered = member(&there, x, alice(), Proof::Delivered);
    catalog.record_membership(delivered).await.unwrap();
    assert_eq!(catalog.delivered(&docker, &x).unwrap(), Some(alice()));
    assert_eq!(
        catalog.delivered(&UpstreamId::new("quay.io"), &x).unwrap(),
        None
    );
    let delivered = member(&here, x, CredentialId::anonymous(), Proof::Delivered);
    catalog.record_membership(delivered).await.unwrap();
    assert_eq!(
        catalog.delivered(&docker, &x).unwrap(),
        Some(CredentialId::anonymous())
    );
    // A later HEAD does not take the delivery back.
    let vouched = member(&there, x, alice(), Proof::Vouched);
    catalog.record_membership(vouched).await.unwrap();
    assert_eq!(
        catalog.delivered(&docker, &x).unwrap(),
        Some(CredentialId::anonymous())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_never_see_an_older_right_than_was_written() {
    let bed = Bed::new();
    let catalog = bed.open();
    let here = source("docker.io", "a/b");
    for round in 0..50 {
        let x = digest(&round.to_string());
        let first = member(&here, x, alice(), Proof::Delivered);
        catalog.record_membership(first).await.unwrap();
        // Forces the readers to the database.
        catalog.inner.remembered.rights.clear();
        let reader = catalog.clone();
        let (at, key) = (here.clone(), x);
        let look = move || (0..20).all(|_| reader.membership(&at, &key, Kind::Blob).is_ok());
        let reading = tokio::task::spawn_blocking(look);
        let open = member(&here, x, CredentialId::anonymous(), Proof::Vouched);
        catalog.record_membership(open).await.unwrap();
        assert!(reading.await.unwrap());
        let seen = catalog.membership(&here, &x, Kind::Blob).unwrap();
        assert_eq!(seen, Some(CredentialId::anonymous()));
    }
}

#[tokio::test]
async fn many_writers_share_commits() {
    let bed = Bed::new();
    let catalog = bed.open();
    let writes = (0..2000_u64).map(|number| {
        let name = digest(&number.to_string());
        catalog.record_blob(name, identity(number), Timestamp(0))
    });
    for outcome in futures_util::future::join_all(writes).await {
        outcome.unwrap();
    }
    assert_eq!(catalog.blobs().unwrap().len(), 2000);
}

#[tokio::test]
async fn one_batch_is_one_commit() {
    let bed = Bed::new();
    let catalog = bed.open();
    let record = BlobRecord {
        digest: digest("x"),
        identity: identity(1),
        last_used: Timestamp(3),
    };
    let here = source("docker.io", "a/b");
    let batch = vec![
        Change::Pending(PendingRecord {
            digest: digest("x"),
            size: 1,
            spool_name: "s".into(),
        }),
        Change::Membership(member(&here, digest("x"), alice(), Proof::Delivered)),
        Change::Blob(record),
        Change::Used(digest("x"), Timestamp(8)),
        Change::Used(digest("x"), Timestamp(5)),
        Change::Used(digest("unknown"), Timestamp(5)),
    ];
    catalog.record(batch).await.unwrap();
    let used = BlobRecord {
        last_used: Timestamp(8),
        ..record
    };
    assert_eq!(catalog.blobs().unwrap(), [used]);
    assert_eq!(catalog.pending().unwrap(), []);
    catalog.forget_blob(digest("x")).await.unwrap();
    assert_eq!(catalog.blobs().unwrap(), []);
    assert_eq!(
        catalog.membership(&here, &digest("x"), Kind::Blob).unwrap(),
        Some(alice())
    );
}

#[tokio::test]
async fn a_tag_keeps_its_history() {
    let bed = Bed::new();
    let catalog = bed.open();
    let (a, b) = (digest("a"), digest("b"));
    for (digest, checked) in [(a, 1), (a, 2), (b, 3), (b, 4), (a, 5)] {
        catalog.record_tag(tag(digest, checked)).await.unwrap();
    }
    let gone = TagRecord {
        suspended: true,
        ..tag(a, 6)
    };
    catalog.record_tag(gone).await.unwrap();
    let asked = tag(a, 0);
    let found = catalog.tag(&asked.source, &asked.tag).unwrap().unwrap();
    assert!(found.suspended);
    assert_eq!(
        (found.first_seen, found.checked),
        (Timestamp(5), Timestamp(6))
    );
    let eras = catalog.tag_history(&asked.source, &asked.tag).unwrap();
    let eras: Vec<_> = eras
        .iter()
        .map(|era| (era.digest, era.first_seen.0, era.last_seen.0, era.deleted))
        .collect();
    assert_eq!(eras, [(a, 5, 5, true), (b, 3, 4, false), (a, 1, 2, false)]);
    // Seen again, it begins anew: that it was away is not forgotten.
    for checked in [7, 8] {
        let again = TagRecord {
            first_seen: Timestamp(5),
            ..tag(a, checked)
        };
        catalog.record_tag(again).await.unwrap();
    }
    let eras = catalog.tag_history(&asked.source, &asked.tag).unwrap();
    let latest: Vec<_> = eras
        .iter()
        .take(2)
        .map(|era| (era.digest, era.first_seen.0, era.last_seen.0, era.deleted))
        .collect();
    assert_eq!(eras.len(), 4);
    assert_eq!(latest, [(a, 7, 8, false), (a, 5, 5, true)]);
    assert_eq!(
        catalog
            .tag(&asked.source, &"other".parse().unwrap())
            .unwrap(),
        None
    );
}

#[tokio::test]
async fn history_is_bounded() {
    let bed = Bed::new();
    let catalog = bed.open();
    let digests = [digest("a"), digest("b")].into_iter().cycle();
    let flips = digests
        .zip(0..1010)
        .map(|(digest, at)| Change::Tag(Box::new(tag(digest, at))));
    catalog.record(flips.collect()).await.unwrap();
    let asked = tag(digest("a"), 0);
    let eras = catalog.tag_history(&asked.source, &asked.tag).unwrap();
    assert_eq!((eras.len(), eras[0].first_seen), (1000, Timestamp(1009)));
}

#[tokio::test]
async fn suspensions_come_and_go() {
    let bed = Bed::new();
    let catalog = bed.open();
    let here = source("docker.io", "a/b");
    catalog
        .suspend(&here, &alice(), Timestamp(1))
        .await
        .unwrap();
    assert!(catalog.is_suspended(&here, &alice()));
    assert!(!catalog.is_suspended(&here, &CredentialId::anonymous()));
    catalog.lift(&here, &alice()).await.unwrap();
    assert!(!catalog.is_suspended(&here, &alice()));
    assert!(!bed.killed().1.is_suspended(&here, &alice()));
}

#[tokio::test]
async fn a_damaged_file_is_set_aside() {
    let bed = Bed::new();
    fs::write(bed.path(), b"SQLite format 3\0 and then nonsense").unwrap();
    bed.open()
        .record_blob(digest("x"), identity(1), Timestamp(0))
        .await
        .unwrap();
    let aside = bed.dir.path().join("catalog.db.damaged-1");
    assert!(fs::read(aside).unwrap().ends_with(b"nonsense"));
    assert_eq!(bed.metrics.store_faults.get(), 1);
    assert_eq!(bed.open().blobs().unwrap().len(), 1);
}

#[tokio::test]
async fn damaged_pages_are_found_at_start() {
    let bed = Bed::new();
    let catalog = bed.open();
    for number in 0..500_u64 {
        let change = Change::Blob(BlobRecord {
            digest: digest(&number.to_string()),
            identity: identity(number),
            last_used: Timestamp(0),
        });
        catalog.record(vec![change]).await.unwrap();
    }
    let copy = Bed::new();
    Connection::open(bed.path())
        .unwrap()
        .execute("VACUUM INTO ?1", [copy.path().to_str().unwrap()])
        .unwrap();
    let mut bytes = fs::read(copy.path()).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 4096].fill(0xa5);
    fs::write(copy.path(), bytes).unwrap();
    assert_eq!(copy.open().blobs().unwrap(), []);
    assert!(copy.dir.path().join("catalog.db.damaged-1").exists());
}

#[tokio::test]
async fn other_programs_and_later_versions_are_set_aside() {
    for pragma in ["application_id = 5", "user_version = 99"] {
        let bed = Bed::new();
        bed.open().flush().await.unwrap();
        let connection = Connection::open(bed.path()).unwrap();
        connection
            .execute_batch(&format!("PRAGMA {pragma}"))
            .unwrap();
        drop(connection);
        bed.open().flush().await.unwrap();
        assert!(
            bed.dir.path().join("catalog.db.damaged-1").exists(),
            "{pragma}"
        );
    }
}

#[tokio::test]
async fn the_catalog_in_memory_starts_from_the_file() {
    let bed = Bed::new();
    let kept = bed.open();
    kept.record_blob(digest("x"), identity(1), Timestamp(0))
        .await
        .unwrap();
    let catalog = Catalog::open(&bed.layout, Keeping::InMemory, &bed.metrics).unwrap();
    assert_eq!(catalog.blobs().unwrap().len(), 1);
    let here = source("docker.io", "a/b");
    let membership = member(&here, digest("x"), alice(), Proof::Delivered);
    catalog.record_membership(membership).await.unwrap();
    catalog.inner.remembered.rights.clear();
    assert_eq!(
        catalog.membership(&here, &digest("x"), Kind::Blob).unwrap(),
        Some(alice())
    );
    assert_eq!(
        kept.membership(&here, &digest("x"), Kind::Blob).unwrap(),
        None
    );
    let empty = Bed::new();
    let catalog = Catalog::open(&empty.layout, Keeping::InMemory, &empty.metrics).unwrap();
    assert_eq!(catalog.blobs().unwrap(), []);
    assert!(!empty.path().exists());
}

#[tokio::test]
async fn a_peek_reads_beside_the_writer() {
    let bed = Bed::new();
    assert!(Catalog::peek(&bed.layout, &bed.metrics).is_err());
    let catalog = bed.open();
    catalog.record_tag(tag(digest("m"), 1)).await.unwrap();
    let peek = Catalog::peek(&bed.layout, &bed.metrics).unwrap();
    assert_eq!(peek.tags().unwrap().len(), 1);
    catalog.record_tag(tag(digest("n"), 2)).await.unwrap();
    assert_eq!(peek.tags().unwrap()[0].digest, digest("n"));
    assert!(peek.flush().await.is_err());
}

#[test]
fn a_question_is_planned_once() {
    let bed = Bed::new();
    let catalog = bed.open();
    let select = "SELECT m.credential FROM sources s JOIN membership m ON m.source = s.id
        WHERE s.upstream = ?1 AND s.repository = ?2 AND m.digest = ?3";
    let ask = |db: &Connection| {
        for n in 0..3 {
            let digest = digest(&format!("layer {n}"));
            let mut statement = db.prepare_cached(select)?;
            assert!(!statement.exists(rusqlite::params!["up", "lib/app", digest.bytes()])?);
        }
        let statement = db.prepare_cached(select)?;
        Ok(statement.get_status(rusqlite::StatementStatus::RePrepare))
    };
    assert_eq!(catalog.read(ask).unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_is_read_as_it_was_written_last() {
    let bed = Bed::new();
    let catalog = bed.open();
    let first = tag(digest("manifest"), 0);
    let (source, name) = (first.source.clone(), first.tag.clone());
    let over = Arc::new(AtomicBool::new(false));
    let (reads, until) = (catalog.clone(), Arc::clone(&over));
    let key = (source.clone(), name.clone());
    let reader = std::thread::spawn(move || {
        while !until.load(Ordering::Relaxed) {
            reads.tag(&key.0, &key.1).unwrap();
        }
    });
    for checked in 0..500 {
        let written = tag(digest("manifest"), checked);
        catalog.record_tag(written).await.unwrap();
        let read = catalog.tag(&source, &name).unwrap().unwrap();
        assert_eq!(read.checked, Timestamp(checked));
    }
    for ending in [
        Change::Untag(source.clone(), name.clone()),
        Change::Revoke(source.clone(), first.digest, Kind::Manifest),
    ] {
        catalog.record_tag(first.clone()).await.unwrap();
        assert!(catalog.tag(&source, &name).unwrap().is_some());
        catalog.record(vec![ending]).await.unwrap();
        assert_eq!(catalog.tag(&source, &name).unwrap(), None);
    }
    over.store(true, Ordering::Relaxed);
    reader.join().unwrap();
}
