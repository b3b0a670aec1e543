//! The catalog's tables, and how a database is opened so that what is found in it can be relied on.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use tracing::warn;

use super::super::error::StoreError;
use super::super::publish::move_aside;
use crate::metrics::Metrics;

/// "OCIC" in ASCII: marks the file as ours.
const APPLICATION_ID: i32 = 0x4f43_4943;

/// What brings a database from each `user_version` to the next; a new one is brought through all of them.
///
/// Digests are their bytes: 32 are a sha256, 64 a sha512. Times are milliseconds since the epoch. An empty credential is nobody's.
const MIGRATIONS: [&str; 3] = [
    "
    CREATE TABLE blobs (
        digest BLOB PRIMARY KEY,
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        inode INTEGER NOT NULL,
        last_used INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE pending (
        digest BLOB PRIMARY KEY,
        size INTEGER NOT NULL,
        spool_name TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE sources (
        id INTEGER PRIMARY KEY,
        upstream TEXT NOT NULL,
        repository TEXT NOT NULL,
        UNIQUE (upstream, repository)
    ) STRICT;
    CREATE TABLE membership (
        digest BLOB NOT NULL,
        source INTEGER NOT NULL,
        kind INTEGER NOT NULL,
        credential TEXT NOT NULL,
        delivered INTEGER NOT NULL,
        PRIMARY KEY (digest, source, kind)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE manifests (
        digest BLOB PRIMARY KEY,
        media_type TEXT NOT NULL,
        size INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE tags (
        source INTEGER NOT NULL,
        tag TEXT NOT NULL,
        digest BLOB NOT NULL,
        media_type TEXT NOT NULL,
        size INTEGER NOT NULL,
        checked INTEGER NOT NULL,
        first_seen INTEGER NOT NULL,
        suspended INTEGER NOT NULL,
        PRIMARY KEY (source, tag)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE tag_history (
        id INTEGER PRIMARY KEY,
        source INTEGER NOT NULL,
        tag TEXT NOT NULL,
        digest BLOB NOT NULL,
        first_seen INTEGER NOT NULL,
        last_seen INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX tag_history_by_tag ON tag_history (source, tag, id);
    CREATE TABLE suspended (
        source INTEGER NOT NULL,
        credential TEXT NOT NULL,
        at INTEGER NOT NULL,
        PRIMARY KEY (source, credential)
    ) STRICT, WITHOUT ROWID;
",
    // Repositories that anyone may pull from, and when that was last seen.
    "
    CREATE TABLE public (
        source INTEGER PRIMARY KEY,
        at INTEGER NOT NULL
    ) STRICT;
",
    // What a tag named before it was deleted does not stand in for what it names after.
    "
    ALTER TABLE tag_history ADD COLUMN deleted INTEGER NOT NULL DEFAULT 0;
    UPDATE tag_history SET deleted = 1 WHERE id IN (
        SELECT max(h.id) FROM tag_history h JOIN tags t ON t.source = h.source AND t.tag = h.tag
        WHERE t.suspended GROUP BY h.source, h.tag);
",
];

/// How long a connection waits for another process that has the database locked.
const BUSY: Duration = Duration::from_secs(5);

/// Copies of damaged databases kept at most; the last is overwritten after that.
const MAX_ASIDE: u32 = 9;

/// What must be written otherwise in the path of an SQLite URI.
const NOT_IN_URI: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'.')
    .remove(b'-')
    .remove(b'_');

/// Where further connections to an opened database lead.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// To a file.
    File(PathBuf),
    /// To a database in memory, or to a file opened in a special way, by its URI.
    Uri(String),
}

/// Why a database could not be used.
enum Trouble {
    /// It is no longer, or never was, what we wrote: to be set aside.
    Damaged(String),
    /// It could not be looked at.
    Fault(rusqlite::Error),
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Damaged(error.to_string())
            }
            _ => Self::Fault(error),
        }
    }
}

impl Place {
    /// A connection that only reads.
    pub(super) fn connect(&self) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
        let connection = match self {
            Self::File(path) => {
                Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_READ_ONLY)?
            }
            // A database in memory cannot be opened for reading only.
            Self::Uri(uri) => {
                Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_READ_WRITE)?
            }
        };
        connection.busy_timeout(BUSY)?;
        connection.pragma_update(None, "query_only", true)?;
        connection.pragma_update(None, "cache_size", -2048)?;
        plan_once(&connection)?;
        Ok(connection)
    }
}

/// Opens the file for the writer, making it (0600) or setting a damaged one aside first.
pub(super) fn open_file(path: &Path, metrics: &Metrics) -> Result<Connection, StoreError> {
    let failed = |error| StoreError::new("open the catalog", path, error);
    make_private(path)?;
    let why = match prepare_file(path) {
        Ok(connection) => return Ok(connection),
        Err(Trouble::Fault(error)) => return Err(failed(error)),
        Err(Trouble::Damaged(why)) => why,
    };
    metrics.store_faults.inc();
    let aside = set_aside(path)
        .map_err(|error| StoreError::new("set the damaged catalog aside", path, error))?;
    warn!(path = %path.display(), aside = %aside.display(), why, "the catalog is damaged: set aside, and started anew");
    make_private(path)?;
    prepare_file(path).map_err(|trouble| match trouble {
        Trouble::Fault(error) => failed(error),
        Trouble::Damaged(why) => {
            StoreError::new("open the catalog", path, std::io::Error::other(why))
        }
    })
}

/// Opens a database in memory that starts from what can be read of the file.
pub(super) fn open_memory(path: &Path) -> Result<(Connection, Place), StoreError> {
    /// Tells the databases in memory of one process apart.
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let uri = format!("file:/oci-remote-cache-{number}?vfs=memdb");
    let failed = |error| StoreError::new("make a catalog in memory", path, error);
    let connection = Connection::open_with_flags(&uri, OpenFlags::default()).map_err(failed)?;
    if let Err(error) = copy_into(path, &uri) {
        warn!(path = %path.display(), %error, "the catalog cannot be read: starting from an empty one in memory");
    }
    configure(&connection).map_err(failed)?;
    migrate(&connection).map_err(failed)?;
    Ok((connection, Place::Uri(uri)))
}

/// How the file can be read when it must not be written: as it is, or, where not even a lock file can be made beside it, as one that
/// nobody changes.
pub(super) fn find_readable(path: &Path) -> Result<Place, StoreError> {
    let place = Place::File(path.to_owned());
    let Err(first) = try_reading(&place) else {
        return Ok(place);
    };
    let encoded = utf8_percent_encode(&path.to_string_lossy(), NOT_IN_URI).to_string();
    let frozen = Place::Uri(format!("file:{encoded}?mode=ro&immutable=1"));
    match try_reading(&frozen) {
        Ok(()) => Ok(frozen),
        Err(_) => Err(StoreError::new("read the catalog", path, first)),
    }
}

fn try_reading(place: &Place) -> rusqlite::Result<()> {
    let connection = place.connect()?;
    let version = user_version(&connection)?;
    if version == current_version() {
        return Ok(());
    }
    Err(rusqlite::Error::InvalidParameterName(format!(
        "the catalog has version {version}, not {}",
        current_version()
    )))
}

/// Fills the empty database at `uri` with the whole of the file.
fn copy_into(path: &Path, uri: &str) -> Result<(), StoreError> {
    if !path.exists() {
        return Ok(());
    }
    let copy = |place: Place| {
        let connection = place.connect()?;
        connection.pragma_update(None, "query_only", false)?;
        connection.execute("VACUUM INTO ?1", [uri])
    };
    find_readable(path).and_then(|place| {
        copy(place).map_err(|error| StoreError::new("copy the catalog", path, error))?;
        Ok(())
    })
}

/// Makes the file with mode 0600 before SQLite does so with another; SQLite gives the files beside it the same mode.
fn make_private(path: &Path) -> Result<(), StoreError> {
    let made = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path);
    made.map(drop)
        .map_err(|error| StoreError::new("make the catalog", path, error))
}

fn prepare_file(path: &Path) -> Result<Connection, Trouble> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let connection = Connection::open_with_flags(path, flags)?;
    configure(&connection)?;
    examine(&connection)?;
    migrate(&connection)?;
    Ok(connection)
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "normal")?;
    connection.pragma_update(None, "cache_size", -8192)?;
    connection.pragma_update(None, "temp_store", "memory")?;
    connection.pragma_update(None, "trusted_schema", false)?;
    // The writer does so itself, after it has told those who wait that their commit is done.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
    connection.set_prepared_statement_cache_capacity(32);
    plan_once(connection)
}

/// Keeps a statement's plan whatever is bound to it. Else a join is parsed and planned anew each time it is asked, since its parameters
/// are cleared in between, which costs more than the look itself.
fn plan_once(connection: &Connection) -> rusqlite::Result<()> {
    connection
        .set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)
        .map(drop)
}

/// Whether this is a database that we wrote and whose pages hang together.
fn examine(connection: &Connection) -> Result<(), Trouble> {
    let count = "SELECT count(*) FROM sqlite_schema";
    let objects: i64 = connection.query_row(count, [], |row| row.get(0))?;
    if objects == 0 {
        return Ok(());
    }
    let id: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    if id != APPLICATION_ID {
        return Err(Trouble::Damaged("it is another program's".to_owned()));
    }
    let version = user_version(connection)?;
    if version > current_version() {
        let newer = format!("its version {version} is newer than {}", current_version());
        return Err(Trouble::Damaged(newer));
    }
    let check = "PRAGMA quick_check(1)";
    let verdict: String = connection.query_row(check, [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(Trouble::Damaged(verdict));
    }
    Ok(())
}

fn migrate(connection: &Connection) -> rusqlite::Result<()> {
    let done = user_version(connection)?;
    for (version, migration) in (1..).zip(MIGRATIONS) {
        if version > done {
            let mark = format!(
                "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {version};"
            );
            connection.execute_batch(&format!("BEGIN IMMEDIATE; {migration} {mark} COMMIT;"))?;
        }
    }
    Ok(())
}

fn user_version(connection: &Connection) -> rusqlite::Result<i32> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

fn current_version() -> i32 {
    i32::try_from(MIGRATIONS.len()).unwrap_or(i32::MAX)
}

/// Moves the database and the files SQLite keeps beside it to names that tell what they are.
fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let free = (1..=MAX_ASIDE)
        .map(|number| with_suffix(path, &format!(".damaged-{number}")))
        .find(|to| !to.exists());
    let to = free.unwrap_or_else(|| with_suffix(path, &format!(".damaged-{MAX_ASIDE}")));
    for beside in ["-wal", "-shm"] {
        let from = with_suffix(path, beside);
        if from.exists() {
            move_aside(&from, &with_suffix(&to, beside))?;
        }
    }
    move_aside(path, &to)?;
    Ok(to)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
