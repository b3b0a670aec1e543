//! The one thread that writes the catalog: what is queued while a commit runs goes into the next one together.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use rusqlite::{CachedStatement, Connection, Transaction, TransactionBehavior, params};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use oci::Digest;

use super::super::error::StoreError;
use super::remembered::{Changed, Remembered, Rights, Tags};
use super::{
    BlobRecord, Change, Kind, ManifestRecord, Membership, PendingRecord, Proof, TagRecord,
};
use crate::metrics::Metrics;
use crate::names::{CredentialId, Source};

/// Jobs that go into one commit at most, so that the first of them does not wait for all the others.
const JOBS_PER_COMMIT: usize = 256;

/// Changes after which the log is written back into the database, some megabytes of it.
const CHANGES_PER_CHECKPOINT: usize = 2000;

/// Changes of digest that are remembered for one tag.
const ERAS_PER_TAG: i64 = 1000;

/// Something to commit, and who waits for it.
pub(super) struct Job {
    pub(super) changes: Vec<Change>,
    pub(super) done: oneshot::Sender<Result<(), StoreError>>,
}

/// What the thread works with.
pub(super) struct Writer {
    pub(super) path: PathBuf,
    pub(super) connection: Connection,
    pub(super) remembered: Arc<Remembered>,
    pub(super) metrics: Metrics,
    pub(super) since_checkpoint: usize,
    /// The folder's lock, kept until the last commit: nobody else opens the folder before. Dropped last.
    pub(super) lock: Option<Arc<File>>,
}

impl Writer {
    /// Starts the thread. It ends when all who could queue a job are gone and what they queued is committed.
    pub(super) fn start(self, jobs: mpsc::Receiver<Job>) -> Result<(), StoreError> {
        let path = self.path.clone();
        let started = thread::Builder::new()
            .name("catalog".to_owned())
            .spawn(move || self.run(jobs));
        started
            .map(drop)
            .map_err(|error| StoreError::new("start the writer of the catalog", &path, error))
    }

    fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(first) = queue.blocking_recv() {
            let mut jobs = vec![first];
            while jobs.len() < JOBS_PER_COMMIT
                && let Ok(job) = queue.try_recv()
            {
                jobs.push(job);
            }
            self.commit_all(jobs);
            if self.since_checkpoint >= CHANGES_PER_CHECKPOINT {
                self.checkpoint("PASSIVE");
            }
        }
        self.checkpoint("TRUNCATE");
        drop(self.connection);
        drop(self.lock);
    }

    /// Commits the jobs together; if that fails, each by itself, so that nobody fails for another's sake.
    fn commit_all(&mut self, jobs: Vec<Job>) {
        let changes: Vec<&Change> = jobs.iter().flat_map(|job| &job.changes).collect();
        let together = self.commit(&changes);
        let many = jobs.len() > 1;
        for job in jobs {
            let outcome = match &together {
                Err(_) if many => self.commit(&job.changes.iter().collect::<Vec<_>>()),
                outcome => outcome.clone(),
            };
            // Suspensions hold even where they could not be written down.
            for change in &job.changes {
                self.remembered.apply_access(change);
            }
            if let Err(error) = &outcome {
                self.metrics.store_faults.inc();
                warn!(%error, "the catalog could not be written");
            }
            // Whoever waited may have gone away.
            job.done.send(outcome).ok();
        }
    }

    fn commit(&mut self, changes: &[&Change]) -> Result<(), StoreError> {
        let outcome = transact(&mut self.connection, changes)
            .map_err(|error| StoreError::new("write to the catalog", &self.path, error))?;
        self.remembered.apply(outcome);
        self.since_checkpoint += changes.len();
        Ok(())
    }

    /// Moves the log's content into the database. It may wait for the disk, which nobody waits for.
    fn checkpoint(&mut self, mode: &str) {
        self.since_checkpoint = 0;
        let pragma = format!("PRAGMA wal_checkpoint({mode})");
        if let Err(error) = self.connection.query_row(&pragma, [], |_row| Ok(())) {
            self.metrics.store_faults.inc();
            warn!(path = %self.path.display(), %error, "the catalog's log could not be written back");
        }
    }
}

fn transact(connection: &mut Connection, changes: &[&Change]) -> rusqlite::Result<Changed> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut outcome = Changed::default();
    for change in changes {
        apply(&transaction, change, &mut outcome.rights)?;
        outcome.tags.extend(Tags::changed_by(change));
    }
    transaction.commit()?;
    Ok(outcome)
}

fn apply(db: &Transaction<'_>, change: &Change, rights: &mut Rights) -> rusqlite::Result<()> {
    match change {
        Change::Blob(record) => put_blob(db, record),
        Change::Pending(record) => put_pending(db, record),
        Change::Abandon(digest) => drop_pending(db, digest),
        Change::Forget(digest) => forget(db, digest),
        Change::Used(digest, at) => {
            let update = "UPDATE blobs SET last_used = max(last_used, ?2) WHERE digest = ?1";
            run(db.prepare_cached(update)?, params![digest.bytes(), at.0])
        }
        Change::Membership(membership) => {
            let credential = put_membership(db, membership)?;
            let key = (
                membership.source.clone(),
                membership.digest,
                membership.kind,
            );
            rights.push((key, Some(credential)));
            Ok(())
        }
        Change::Manifest(digest, record) => put_manifest(db, digest, record),
        Change::Tag(record) => put_tag(db, record),
        Change::Untag(source, tag) => untag(db, source_id(db, source)?, tag.as_str()),
        Change::Revoke(source, digest, kind) => {
            rights.push(((source.clone(), *digest, *kind), None));
            revoke(db, source_id(db, source)?, (digest, *kind))
        }
        Change::Suspend(source, credential, at) => {
            let insert = "INSERT INTO suspended (source, credential, at) VALUES (?1, ?2, ?3)
                ON CONFLICT DO UPDATE SET at = excluded.at";
            let source = source_id(db, source)?;
            let values = params![source, credential.as_str(), at.0];
            run(db.prepare_cached(insert)?, values)
        }
        Change::Lift(source, credential) => {
            let delete = "DELETE FROM suspended WHERE source = ?1 AND credential = ?2";
            let source = source_id(db, source)?;
            run(
                db.prepare_cached(delete)?,
                params![source, credential.as_str()],
            )
        }
        Change::Public(source, at) => {
            let insert = "INSERT INTO public (source, at) VALUES (?1, ?2)
                ON CONFLICT DO UPDATE SET at = excluded.at";
            let source = source_id(db, source)?;
            run(db.prepare_cached(insert)?, params![source, at.0])
        }
        Change::NotPublic(source) => {
            let source = source_id(db, source)?;
            let delete = "DELETE FROM public WHERE source = ?1";
            run(db.prepare_cached(delete)?, params![source])
        }
    }
}

fn put_blob(db: &Transaction<'_>, record: &BlobRecord) -> rusqlite::Result<()> {
    let insert =
        "INSERT INTO blobs (digest, size, mtime_ns, inode, last_used) VALUES (?1, ?2, ?3, ?4, ?5)
        ON CONFLICT DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns,
            inode = excluded.inode, last_used = max(last_used, excluded.last_used)";
    let identity = record.identity;
    let values = params![
        record.digest.bytes(),
        identity.size.cast_signed(),
        identity.mtime_ns,
        identity.inode.cast_signed(),
        record.last_used.0,
    ];
    run(db.prepare_cached(insert)?, values)?;
    drop_pending(db, &record.digest)
}

fn put_pending(db: &Transaction<'_>, record: &PendingRecord) -> rusqlite::Result<()> {
    let insert = "INSERT INTO pending (digest, size, spool_name) VALUES (?1, ?2, ?3)
        ON CONFLICT DO UPDATE SET size = excluded.size, spool_name = excluded.spool_name";
    let values = params![
        record.digest.bytes(),
        record.size.cast_signed(),
        record.spool_name,
    ];
    run(db.prepare_cached(insert)?, values)
}

fn forget(db: &Transaction<'_>, digest: &Digest) -> rusqlite::Result<()> {
    let delete = "DELETE FROM blobs WHERE digest = ?1";
    run(db.prepare_cached(delete)?, params![digest.bytes()])?;
    drop_pending(db, digest)
}

fn drop_pending(db: &Transaction<'_>, digest: &Digest) -> rusqlite::Result<()> {
    let delete = "DELETE FROM pending WHERE digest = ?1";
    run(db.prepare_cached(delete)?, params![digest.bytes()])
}

/// Returns the credential that holds now: what anyone was shown stays open to anyone.
fn put_membership(db: &Transaction<'_>, membership: &Membership) -> rusqlite::Result<CredentialId> {
    let insert = "INSERT INTO membership (digest, source, kind, credential, delivered)
        VALUES (?1, ?2, ?3, ?4, ?5)
        ON CONFLICT DO UPDATE SET
            credential = CASE WHEN credential = '' THEN '' ELSE excluded.credential END,
            delivered = max(delivered, excluded.delivered)
        RETURNING credential = ''";
    let values = params![
        membership.digest.bytes(),
        source_id(db, &membership.source)?,
        membership.kind.number(),
        membership.credential.as_str(),
        membership.proof == Proof::Delivered,
    ];
    let is_open = db
        .prepare_cached(insert)?
        .query_row(values, |row| row.get(0))?;
    Ok(if is_open {
        CredentialId::anonymous()
    } else {
        membership.credential.clone()
    })
}

fn put_manifest(
    db: &Transaction<'_>,
    digest: &Digest,
    record: &ManifestRecord,
) -> rusqlite::Result<()> {
    let insert = "INSERT INTO manifests (digest, media_type, size) VALUES (?1, ?2, ?3)
        ON CONFLICT DO UPDATE SET media_type = excluded.media_type, size = excluded.size";
    let values = params![
        digest.bytes(),
        record.media_type.as_str(),
        record.size.cast_signed(),
    ];
    run(db.prepare_cached(insert)?, values)
}

fn put_tag(db: &Transaction<'_>, record: &TagRecord) -> rusqlite::Result<()> {
    let insert = "INSERT INTO tags
            (source, tag, digest, media_type, size, checked, first_seen, suspended)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
        ON CONFLICT DO UPDATE SET
            first_seen = CASE WHEN digest = excluded.digest
                THEN min(first_seen, excluded.first_seen) ELSE excluded.first_seen END,
            digest = excluded.digest, media_type = excluded.media_type, size = excluded.size,
            checked = excluded.checked, suspended = excluded.suspended";
    let source = source_id(db, &record.source)?;
    let values = params![
        source,
        record.tag.as_str(),
        record.digest.bytes(),
        record.media_type.as_str(),
        record.size.cast_signed(),
        record.checked.0,
        record.first_seen.0,
        record.suspended,
    ];
    run(db.prepare_cached(insert)?, values)?;
    if record.suspended {
        // The upstream said that the tag is gone, so it was not seen.
        return end_era(db, source, record.tag.as_str());
    }
    put_era(db, source, record)
}

/// What was taken back is not fallen back on either.
fn untag(db: &Transaction<'_>, source: i64, tag: &str) -> rusqlite::Result<()> {
    end_era(db, source, tag)?;
    let delete = "DELETE FROM tags WHERE source = ?1 AND tag = ?2";
    run(db.prepare_cached(delete)?, params![source, tag])
}

fn revoke(
    db: &Transaction<'_>,
    source: i64,
    (digest, kind): (&Digest, Kind),
) -> rusqlite::Result<()> {
    let delete = "DELETE FROM membership WHERE source = ?1 AND digest = ?2 AND kind = ?3";
    let values = params![source, digest.bytes(), kind.number()];
    run(db.prepare_cached(delete)?, values)?;
    if kind == Kind::Blob {
        return Ok(());
    }
    let end = "UPDATE tag_history SET deleted = 1 WHERE id IN (
        SELECT max(h.id) FROM tags t JOIN tag_history h ON h.source = t.source AND h.tag = t.tag
        WHERE t.source = ?1 AND t.digest = ?2 GROUP BY h.tag)";
    run(db.prepare_cached(end)?, params![source, digest.bytes()])?;
    let delete = "DELETE FROM tags WHERE source = ?1 AND digest = ?2";
    run(db.prepare_cached(delete)?, params![source, digest.bytes()])
}

/// Nothing that the tag meant up to now comes back while the upstream is silent.
fn end_era(db: &Transaction<'_>, source: i64, tag: &str) -> rusqlite::Result<()> {
    let end = "UPDATE tag_history SET deleted = 1
        WHERE id = (SELECT max(id) FROM tag_history WHERE source = ?1 AND tag = ?2)";
    run(db.prepare_cached(end)?, params![source, tag])
}

/// Lengthens the tag's latest era, or starts a new one where the digest is another, or the same after the tag was gone: what it meant
/// before that still does not come back.
fn put_era(db: &Transaction<'_>, source: i64, record: &TagRecord) -> rusqlite::Result<()> {
    let lengthen = "UPDATE tag_history SET last_seen = max(last_seen, ?4)
        WHERE id = (SELECT max(id) FROM tag_history WHERE source = ?1 AND tag = ?2)
            AND digest = ?3 AND NOT deleted";
    let tag = record.tag.as_str();
    let digest = record.digest.bytes();
    let values = params![source, tag, digest, record.checked.0];
    if db.prepare_cached(lengthen)?.execute(values)? > 0 {
        return Ok(());
    }
    let insert = "INSERT INTO tag_history (source, tag, digest, first_seen, last_seen)
        SELECT ?1, ?2, ?3, CASE WHEN EXISTS (SELECT 1 FROM tag_history
            WHERE id = (SELECT max(id) FROM tag_history WHERE source = ?1 AND tag = ?2)
                AND digest = ?3) THEN ?5 ELSE ?4 END, ?5";
    let values = params![source, tag, digest, record.first_seen.0, record.checked.0];
    run(db.prepare_cached(insert)?, values)?;
    let prune = "DELETE FROM tag_history WHERE source = ?1 AND tag = ?2 AND id <= (
        SELECT id FROM tag_history WHERE source = ?1 AND tag = ?2
        ORDER BY id DESC LIMIT 1 OFFSET ?3)";
    run(
        db.prepare_cached(prune)?,
        params![source, tag, ERAS_PER_TAG],
    )
}

/// The number that stands for a repository in the other tables.
fn source_id(db: &Transaction<'_>, source: &Source) -> rusqlite::Result<i64> {
    let values = [source.upstream.as_str(), source.repository.as_str()];
    let insert =
        "INSERT INTO sources (upstream, repository) VALUES (?1, ?2) ON CONFLICT DO NOTHING";
    run(db.prepare_cached(insert)?, values)?;
    let select = "SELECT id FROM sources WHERE upstream = ?1 AND repository = ?2";
    db.prepare_cached(select)?
        .query_row(values, |row| row.get(0))
}

fn run(mut statement: CachedStatement<'_>, values: impl rusqlite::Params) -> rusqlite::Result<()> {
    statement.execute(values).map(drop)
}
