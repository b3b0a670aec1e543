//! What can go wrong with this node's disk: [`OpenError`] keeps the store from opening, [`StoreError`] is a fault of an open one.
//!
//! Only a folder that must not be used at all is an [`OpenError`]. A folder that cannot be written, or a catalog that cannot be read, is
//! none: the store opens in a lesser condition. A [`StoreError`] never has to fail a pull; the caller goes on without the cache.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a cache folder is refused. Each message is one line that names the folder and the way out.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Something else has the folder's name.
    #[error("cache_dir {} is not a folder: name another one, or move what is there", dir.display())]
    NotAFolder {
        /// The path that is no folder.
        dir: PathBuf,
    },
    /// The folder is not there and cannot be made.
    #[error("cache_dir {} cannot be made ({source}): create it, or set cache_dir to a folder that can be written", dir.display())]
    Unmakeable {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder is there and cannot be looked into.
    #[error("cache_dir {} cannot be opened ({source}): check who may enter it", dir.display())]
    Unreadable {
        /// The folder or file.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder belongs to somebody else, who could change what is served.
    #[error("cache_dir {} belongs to user {owner}, not to root or to the user that runs this: chown it, or set cache_dir to another folder", dir.display())]
    Foreign {
        /// The folder.
        dir: PathBuf,
        /// The owner's number.
        owner: u32,
    },
    /// The way to the folder leads over a link that others could point elsewhere.
    #[error(
        "cache_dir {} is reached through the link {} in a folder that others may write: name the folder itself, or remove the link",
        dir.display(),
        link.display()
    )]
    Link {
        /// The folder as configured.
        dir: PathBuf,
        /// The link.
        link: PathBuf,
    },
    /// Another process has the folder.
    #[error("cache_dir {} is in use: another process holds its lock; stop that one, or set cache_dir to another folder", dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// A later version of this program wrote the folder.
    #[error("cache_dir {} has format {found}, newer than {known}, the newest this version knows: upgrade, or set cache_dir to another folder", dir.display())]
    Newer {
        /// The folder.
        dir: PathBuf,
        /// The format found.
        found: String,
        /// The newest format known here.
        known: u32,
    },
    /// Not even an empty catalog can be had.
    #[error("cache_dir {} has no usable catalog: {source}", dir.display())]
    Catalog {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: StoreError,
    },
    /// There is no store to look into.
    #[error("cache_dir {} holds no cache yet: check the path, or pull something first", dir.display())]
    Absent {
        /// The folder.
        dir: PathBuf,
    },
}

/// A fault of this node's disk or catalog: what was being done, to what, and what went wrong.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{doing} {}: {source}", path.display())]
pub struct StoreError {
    /// What was being done, for example `publish`.
    pub doing: &'static str,
    /// The file or folder it was done to.
    pub path: PathBuf,
    /// What went wrong.
    pub source: Cause,
}

/// What was wrong with the disk or the catalog. Shared, because one failed commit fails everyone who waits for it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Cause {
    /// The file system.
    #[error("{0}")]
    Io(Arc<io::Error>),
    /// The database.
    #[error("{0}")]
    Sqlite(Arc<rusqlite::Error>),
    /// The catalog's writer has ended.
    #[error("the catalog is closed")]
    Closed,
}

impl StoreError {
    pub(super) fn new(doing: &'static str, path: &Path, source: impl Into<Cause>) -> Self {
        Self {
            doing,
            path: path.to_owned(),
            source: source.into(),
        }
    }

    /// Whether there was no room on the disk, so that evicting may help.
    pub fn is_full(&self) -> bool {
        match &self.source {
            Cause::Io(error) => matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ),
            Cause::Sqlite(error) => {
                error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
            }
            Cause::Closed => false,
        }
    }
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

impl From<rusqlite::Error> for Cause {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(Arc::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disks_are_told_from_broken_ones() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert!(StoreError::new("publish", Path::new("/c"), full).is_full());
        let broken = io::Error::other("input/output error");
        let error = StoreError::new("publish", Path::new("/c"), broken);
        assert!(!error.is_full());
        assert_eq!(error.to_string(), "publish /c: input/output error");
    }
}
