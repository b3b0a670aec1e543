//! Reading the catalog beside its writer: a few connections, one indexed look for each question.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use oci::{Algorithm, Digest, MediaType, RepositoryName, Tag};

use super::super::error::StoreError;
use super::super::publish::FileIdentity;
use super::schema::Place;
use super::{
    BlobRecord, Catalog, Holding, Kind, ManifestRecord, Membership, PendingRecord, Proof, TagEra,
    TagRecord,
};
use crate::clock::Timestamp;
use crate::names::{CredentialId, Source, UpstreamId};

/// Connections kept open for the next reader.
const MAX_IDLE: usize = 4;

/// Columns of a tag, in the order in which [`tag_of`] reads them.
const TAG_COLUMNS: &str = "s.upstream, s.repository, t.tag, t.digest, t.media_type, t.size, \
    t.checked, t.first_seen, t.suspended FROM tags t JOIN sources s ON s.id = t.source";

/// The connections that read.
pub(super) struct Readers {
    place: Place,
    idle: Mutex<Vec<Connection>>,
}

impl Readers {
    pub(super) fn new(place: Place) -> Self {
        Self {
            place,
            idle: Mutex::default(),
        }
    }

    /// Asks `query` of a connection of its own.
    pub(super) fn with<T>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let idle = self.lock().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.place.connect()?,
        };
        let answer = query(&connection)?;
        let mut idle = self.lock();
        if idle.len() < MAX_IDLE {
            idle.push(connection);
        }
        Ok(answer)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Catalog {
    /// Every blob file that was published.
    pub fn blobs(&self) -> Result<Vec<BlobRecord>, StoreError> {
        let select = "SELECT digest, size, mtime_ns, inode, last_used FROM blobs";
        self.read(|db| list(db, select, blob_of))
    }

    /// Every spool that was verified and perhaps not published.
    pub fn pending(&self) -> Result<Vec<PendingRecord>, StoreError> {
        let select = "SELECT digest, size, spool_name FROM pending";
        self.read(|db| list(db, select, pending_of))
    }

    /// Whether this upstream itself delivered these bytes, and to whom: the most open credential, if to several.
    pub fn delivered(
        &self,
        upstream: &UpstreamId,
        digest: &Digest,
    ) -> Result<Option<CredentialId>, StoreError> {
        // Nobody's credential is the empty text, which is the least.
        let select = "SELECT min(m.credential) FROM membership m JOIN sources s ON s.id = m.source
            WHERE m.digest = ?1 AND m.delivered AND s.upstream = ?2";
        let values = params![digest.bytes(), upstream.as_str()];
        self.read(|db| {
            let mut statement = db.prepare_cached(select)?;
            let found: Option<String> = statement.query_row(values, |row| row.get(0))?;
            Ok(found.map(|text| CredentialId::from_record(&text)))
        })
    }

    /// Whether any repository of any upstream holds these bytes.
    pub fn is_held(&self, digest: &Digest) -> Result<bool, StoreError> {
        let select = "SELECT EXISTS (SELECT 1 FROM membership WHERE digest = ?1)";
        self.read(|db| {
            let mut statement = db.prepare_cached(select)?;
            statement.query_row([digest.bytes()], |row| row.get(0))
        })
    }

    /// Whether anything is written down about a repository.
    pub fn knows(&self, source: &Source) -> Result<bool, StoreError> {
        let select =
            "SELECT EXISTS (SELECT 1 FROM sources WHERE upstream = ?1 AND repository = ?2)";
        let values = [source.upstream.as_str(), source.repository.as_str()];
        self.read(|db| {
            db.prepare_cached(select)?
                .query_row(values, |row| row.get(0))
        })
    }

    /// What is known of a manifest.
    pub fn manifest(&self, digest: &Digest) -> Result<Option<ManifestRecord>, StoreError> {
        let select = "SELECT media_type, size FROM manifests WHERE digest = ?1";
        self.read(|db| {
            let mut statement = db.prepare_cached(select)?;
            statement
                .query_row([digest.bytes()], manifest_of)
                .optional()
        })
    }

    /// What a tag means.
    pub fn tag(&self, source: &Source, tag: &Tag) -> Result<Option<TagRecord>, StoreError> {
        let key = (source.clone(), tag.clone());
        self.inner.remembered.tag(key, |(source, tag)| {
            let select = format!(
                "SELECT {TAG_COLUMNS} WHERE s.upstream = ?1 AND s.repository = ?2 AND t.tag = ?3"
            );
            let values = [
                source.upstream.as_str(),
                source.repository.as_str(),
                tag.as_str(),
            ];
            self.read(|db| {
                let mut statement = db.prepare_cached(&select)?;
                statement.query_row(values, tag_of).optional()
            })
        })
    }

    /// The tag of a repository that its upstream spoke of last.
    pub fn latest_tag(&self, source: &Source) -> Result<Option<TagRecord>, StoreError> {
        let select = format!(
            "SELECT {TAG_COLUMNS} WHERE s.upstream = ?1 AND s.repository = ?2 AND t.suspended = 0
            ORDER BY t.checked DESC LIMIT 1"
        );
        let values = [source.upstream.as_str(), source.repository.as_str()];
        self.read(|db| {
            let mut statement = db.prepare_cached(&select)?;
            statement.query_row(values, tag_of).optional()
        })
    }

    /// What all tags mean, by upstream, repository and name.
    pub fn tags(&self) -> Result<Vec<TagRecord>, StoreError> {
        let select = format!("SELECT {TAG_COLUMNS} ORDER BY s.upstream, s.repository, t.tag");
        self.read(|db| list(db, &select, tag_of))
    }

    /// Every repository of which a blob or manifest is stored now, once for each credential that was shown any of it.
    pub fn stored_sources(&self) -> Result<Vec<(Source, CredentialId)>, StoreError> {
        let select = "SELECT DISTINCT s.upstream, s.repository, m.credential FROM sources s
            JOIN membership m ON m.source = s.id JOIN blobs b ON b.digest = m.digest";
        self.read(|db| {
            list(db, select, |row| {
                let text: String = row.get(2)?;
                Ok((source_of(row)?, CredentialId::from_record(&text)))
            })
        })
    }

    /// What a tag has meant, the latest first.
    pub fn tag_history(&self, source: &Source, tag: &Tag) -> Result<Vec<TagEra>, StoreError> {
        let select = "SELECT h.digest, h.first_seen, h.last_seen, h.deleted
            FROM tag_history h JOIN sources s ON s.id = h.source
            WHERE s.upstream = ?1 AND s.repository = ?2 AND h.tag = ?3 ORDER BY h.id DESC";
        let values = [
            source.upstream.as_str(),
            source.repository.as_str(),
            tag.as_str(),
        ];
        self.read(|db| {
            let mut statement = db.prepare_cached(select)?;
            statement.query_map(values, era_of)?.collect()
        })
    }

    /// What all repositories are known to hold, stored or not, by upstream and repository.
    pub fn holdings(&self) -> Result<Vec<Holding>, StoreError> {
        let select = "SELECT s.upstream, s.repository, m.digest, m.kind, m.credential, m.delivered,
                coalesce(b.size, f.size), f.media_type, b.last_used
            FROM membership m JOIN sources s ON s.id = m.source
            LEFT JOIN blobs b ON b.digest = m.digest
            LEFT JOIN manifests f ON f.digest = m.digest AND m.kind = 1
            ORDER BY s.upstream, s.repository, m.kind DESC, m.digest";
        self.read(|db| list(db, select, holding_of))
    }
}

impl Kind {
    /// The number in the catalog.
    pub(super) fn number(self) -> i64 {
        match self {
            Self::Blob => 0,
            Self::Manifest => 1,
        }
    }
}

/// One row of `membership`.
pub(super) fn membership(
    db: &Connection,
    source: &Source,
    digest: &Digest,
    kind: Kind,
) -> rusqlite::Result<Option<CredentialId>> {
    let select = "SELECT m.credential FROM sources s JOIN membership m ON m.source = s.id
        WHERE s.upstream = ?1 AND s.repository = ?2 AND m.digest = ?3 AND m.kind = ?4";
    let values = params![
        source.upstream.as_str(),
        source.repository.as_str(),
        digest.bytes(),
        kind.number(),
    ];
    let found: Option<String> = db
        .prepare_cached(select)?
        .query_row(values, |row| row.get(0))
        .optional()?;
    Ok(found.map(|text| CredentialId::from_record(&text)))
}

/// Every repository that is suspended for a credential.
pub(super) fn suspended(db: &Connection) -> rusqlite::Result<HashSet<(Source, CredentialId)>> {
    let select = "SELECT s.upstream, s.repository, x.credential
        FROM suspended x JOIN sources s ON s.id = x.source";
    let rows = list(db, select, |row| {
        let text: String = row.get(2)?;
        Ok((source_of(row)?, CredentialId::from_record(&text)))
    })?;
    Ok(rows.into_iter().collect())
}

pub(super) fn public(db: &Connection) -> rusqlite::Result<HashMap<Source, Timestamp>> {
    let select = "SELECT s.upstream, s.repository, p.at
        FROM public p JOIN sources s ON s.id = p.source";
    let rows = list(db, select, |row| {
        Ok((source_of(row)?, Timestamp(row.get(2)?)))
    })?;
    Ok(rows.into_iter().collect())
}

fn list<T>(
    db: &Connection,
    select: &str,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    db.prepare_cached(select)?.query_map([], read)?.collect()
}

fn blob_of(row: &Row<'_>) -> rusqlite::Result<BlobRecord> {
    let identity = FileIdentity {
        size: unsigned(row, 1)?,
        mtime_ns: row.get(2)?,
        inode: unsigned(row, 3)?,
    };
    Ok(BlobRecord {
        digest: digest_of(row, 0)?,
        identity,
        last_used: Timestamp(row.get(4)?),
    })
}

fn pending_of(row: &Row<'_>) -> rusqlite::Result<PendingRecord> {
    Ok(PendingRecord {
        digest: digest_of(row, 0)?,
        size: unsigned(row, 1)?,
        spool_name: row.get(2)?,
    })
}

fn manifest_of(row: &Row<'_>) -> rusqlite::Result<ManifestRecord> {
    Ok(ManifestRecord {
        media_type: media_type_of(row, 0)?,
        size: unsigned(row, 1)?,
    })
}

fn tag_of(row: &Row<'_>) -> rusqlite::Result<TagRecord> {
    Ok(TagRecord {
        source: source_of(row)?,
        tag: parse::<Tag>(row, 2)?,
        digest: digest_of(row, 3)?,
        media_type: media_type_of(row, 4)?,
        size: unsigned(row, 5)?,
        checked: Timestamp(row.get(6)?),
        first_seen: Timestamp(row.get(7)?),
        suspended: row.get(8)?,
    })
}

fn era_of(row: &Row<'_>) -> rusqlite::Result<TagEra> {
    Ok(TagEra {
        digest: digest_of(row, 0)?,
        first_seen: Timestamp(row.get(1)?),
        last_seen: Timestamp(row.get(2)?),
        deleted: row.get(3)?,
    })
}

fn holding_of(row: &Row<'_>) -> rusqlite::Result<Holding> {
    let credential_text: String = row.get(4)?;
    let kind = match row.get(3)? {
        1_i64 => Kind::Manifest,
        _ => Kind::Blob,
    };
    let proof = if row.get(5)? {
        Proof::Delivered
    } else {
        Proof::Vouched
    };
    let membership = Membership {
        source: source_of(row)?,
        digest: digest_of(row, 2)?,
        kind,
        credential: CredentialId::from_record(&credential_text),
        proof,
    };
    let size: Option<i64> = row.get(6)?;
    let has_type = row.get::<_, Option<String>>(7)?.is_some();
    let media_type = has_type.then(|| media_type_of(row, 7)).transpose()?;
    let last_used: Option<i64> = row.get(8)?;
    Ok(Holding {
        membership,
        size: size.map(i64::cast_unsigned),
        media_type,
        last_used: last_used.map(Timestamp),
    })
}

/// A repository from the first two columns.
fn source_of(row: &Row<'_>) -> rusqlite::Result<Source> {
    let upstream: String = row.get(0)?;
    let repository = parse::<RepositoryName>(row, 1)?;
    Ok(Source::new(UpstreamId::new(&upstream), repository))
}

fn digest_of(row: &Row<'_>, column: usize) -> rusqlite::Result<Digest> {
    let bytes: Vec<u8> = row.get(column)?;
    let algorithm = if bytes.len() == 64 {
        Algorithm::Sha512
    } else {
        Algorithm::Sha256
    };
    Digest::from_bytes(algorithm, &bytes)
        .ok_or_else(|| unreadable(column, format!("no digest has {} bytes", bytes.len())))
}

fn media_type_of(row: &Row<'_>, column: usize) -> rusqlite::Result<MediaType> {
    let text: String = row.get(column)?;
    MediaType::parse(&text).map_err(|error| unreadable(column, error))
}

fn parse<T: FromStr<Err: Error + Send + Sync + 'static>>(
    row: &Row<'_>,
    column: usize,
) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    text.parse()
        .map_err(|error: T::Err| unreadable(column, error))
}

/// Sizes and inode numbers are written as the signed number with the same bits.
fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(column).map(i64::cast_unsigned)
}

/// Text that is neither empty nor ours becomes a credential that nobody has, not one that everybody has.
fn unreadable(column: usize, error: impl Into<Box<dyn Error + Send + Sync>>) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Blob, error.into())
}
