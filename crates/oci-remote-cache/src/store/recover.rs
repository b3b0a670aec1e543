//! What a start makes of the files it finds: which are blobs, which must be hashed first, and what is left of fills that were cut off.
//!
//! A file is trusted when it is exactly as it was recorded after it was hashed. Nothing here decides whether anyone may read it.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use oci::{Algorithm, Digest};

use super::catalog::{BlobRecord, Catalog, Change, PendingRecord};
use super::layout::Layout;
use super::publish::{FileIdentity, move_aside, publish, remove};
use super::spool::Verified;
use super::usage::{StoredBlob, Trust};
use crate::clock::Timestamp;
use crate::metrics::Metrics;

/// Ending of the list of pieces that lies beside a large spool.
const LIST: &str = "pieces";

/// Strays that get a line of their own in the log; the others are only counted.
const STRAYS_LOGGED: usize = 10;

/// What one start does.
pub(super) struct Recovery<'a> {
    pub(super) layout: &'a Layout,
    pub(super) catalog: &'a Catalog,
    pub(super) metrics: &'a Metrics,
    pub(super) now: Timestamp,
}

/// What was found below `blobs/`.
#[derive(Default)]
struct Scan {
    blobs: Vec<StoredBlob>,
    strays: Vec<PathBuf>,
}

impl Recovery<'_> {
    /// Finishes what a crash interrupted and returns the blobs that are there. Blocks on the disk.
    pub(super) fn run(&self) -> Vec<StoredBlob> {
        if self.layout.writable() {
            self.publish_pending();
            sweep_spool(self.layout, self.metrics);
        }
        // Without records every file is hashed before it is served; the fault was counted where it happened.
        let records = self.catalog.blobs().unwrap_or_default();
        let mut records: HashMap<Digest, BlobRecord> = records
            .into_iter()
            .map(|record| (record.digest, record))
            .collect();
        let scan = Scan::of(&self.layout.blobs_dir(), &mut records, self.now);
        if self.layout.writable() {
            self.move_strays(&scan.strays);
            self.forget_missing(records);
        }
        let unproven = |blob: &&StoredBlob| blob.trust == Trust::Unproven;
        let unproven = scan.blobs.iter().filter(unproven).count();
        if unproven > 0 {
            warn!(
                blobs = unproven,
                "blobs without a fitting record: hashed before they are served"
            );
        }
        scan.blobs
    }

    /// Publishes the spools that were verified and not renamed when the process ended.
    fn publish_pending(&self) {
        for record in self.catalog.pending().unwrap_or_default() {
            if let Err(error) = self.publish_one(&record) {
                self.metrics.store_faults.inc();
                warn!(digest = %record.digest, %error, "a finished spool cannot be published");
            }
        }
    }

    fn publish_one(&self, record: &PendingRecord) -> io::Result<()> {
        let digest = record.digest;
        let spool = plain_name(&record.spool_name).map(|name| self.layout.spool_dir().join(name));
        let verified = match spool.filter(|spool| spool.is_file()) {
            Some(spool) => Verified::recover(&spool, digest)?,
            None => None,
        };
        let change = match verified {
            Some(verified) => {
                let identity = publish(self.layout, &verified).map_err(io::Error::other)?;
                info!(%digest, size = identity.size, "published a spool that was finished before the last stop");
                Change::Blob(BlobRecord {
                    digest,
                    identity,
                    last_used: self.now,
                })
            }
            // Renamed already, or not what it should be: then the sweep removes it.
            None => Change::Abandon(digest),
        };
        let written = self.catalog.record_blocking(vec![change]);
        written.map_err(io::Error::other)
    }

    /// Moves away what has no business among the blobs: it would take room that nobody counts. It is not ours to delete.
    fn move_strays(&self, strays: &[PathBuf]) {
        for (number, stray) in strays.iter().enumerate() {
            let name = stray.file_name().unwrap_or_default().to_string_lossy();
            let to = self
                .layout
                .strays_dir()
                .join(format!("{}-{number}-{name}", self.now.0));
            let moved = move_aside(stray, &to);
            if number < STRAYS_LOGGED {
                let error = moved.err().map(|error| error.to_string());
                warn!(path = %stray.display(), to = %to.display(), error, "a file among the blobs is none: moved away");
            }
        }
        if strays.len() > STRAYS_LOGGED {
            warn!(files = strays.len(), "files among the blobs were none");
        }
    }

    fn forget_missing(&self, missing: HashMap<Digest, BlobRecord>) {
        if missing.is_empty() {
            return;
        }
        warn!(
            blobs = missing.len(),
            "recorded blobs are not there: forgotten"
        );
        let changes = missing.into_keys().map(Change::Forget).collect();
        // The rows do no harm; the next start tries again.
        self.catalog.record_blocking(changes).ok();
    }
}

impl Scan {
    /// Looks at everything below `blobs/`, and takes the records that have a file out of `records`.
    fn of(blobs: &Path, records: &mut HashMap<Digest, BlobRecord>, now: Timestamp) -> Self {
        let mut scan = Self::default();
        for algorithm in scan.folders(blobs) {
            let name = name_of(&algorithm);
            if ![Algorithm::Sha256, Algorithm::Sha512]
                .map(Algorithm::name)
                .contains(&name.as_str())
            {
                warn!(path = %algorithm.display(), "blobs of an algorithm that cannot be verified: left alone");
                continue;
            }
            let prefixes = scan.folders(&algorithm);
            for file in prefixes.iter().flat_map(|prefix| entries(prefix)) {
                scan.file(file, records, now);
            }
        }
        scan
    }

    /// The folders in `folder`; whatever else is there is a stray.
    fn folders(&mut self, folder: &Path) -> Vec<PathBuf> {
        let is_folder = |path: &PathBuf| path.symlink_metadata().is_ok_and(|found| found.is_dir());
        let (folders, others): (Vec<_>, Vec<_>) = entries(folder).into_iter().partition(is_folder);
        self.strays.extend(others);
        folders
    }

    fn file(&mut self, path: PathBuf, records: &mut HashMap<Digest, BlobRecord>, now: Timestamp) {
        let digest = digest_of(&path);
        let found = path.symlink_metadata().ok().filter(Metadata::is_file);
        let (Some(digest), Some(found)) = (digest, found) else {
            self.strays.push(path);
            return;
        };
        let identity = FileIdentity::from(&found);
        let record = records.remove(&digest);
        let is_same = record.is_some_and(|record| record.identity == identity);
        self.blobs.push(StoredBlob {
            digest,
            identity,
            last_used: record.map_or(now, |record| record.last_used),
            trust: if is_same {
                Trust::Proven
            } else {
                Trust::Unproven
            },
        });
    }
}

/// The digest that the last three parts of a blob's path spell.
fn digest_of(path: &Path) -> Option<Digest> {
    let hex = path.file_name()?.to_str()?;
    let prefix = path.parent()?;
    let algorithm = prefix.parent()?.file_name()?.to_str()?;
    let digest = Digest::from_file_name(algorithm, hex)?;
    hex.starts_with(prefix.file_name()?.to_str()?)
        .then_some(digest)
}

/// Clears `spool/` of what fills left behind when the process ended: spools with a list of pieces are parked, where a later fill goes
/// on from them; the others are removed. Blocks on the disk.
pub fn sweep_spool(layout: &Layout, metrics: &Metrics) {
    for path in entries(&layout.spool_dir()) {
        let swept = match path.extension() {
            // Goes with its spool.
            Some(ending) if ending == LIST && path.with_extension("").exists() => Ok(()),
            _ if path.with_extension(LIST).exists() && path.extension().is_none() => {
                park(layout, &path)
            }
            _ => remove(&path),
        };
        if let Err(error) = swept {
            metrics.store_faults.inc();
            warn!(path = %path.display(), %error, "a left-over spool cannot be swept");
        }
    }
}

/// The list goes first: a spool without one is removed by the next sweep, a list without a spool is passed over.
fn park(layout: &Layout, spool: &Path) -> io::Result<()> {
    let parked = layout
        .parked_dir()
        .join(spool.file_name().unwrap_or_default());
    move_aside(&spool.with_extension(LIST), &parked.with_extension(LIST))?;
    move_aside(spool, &parked)
}

/// A name without any way out of its folder.
fn plain_name(name: &str) -> Option<&str> {
    let is_plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
    is_plain.then_some(name)
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The paths of all that is in `folder`; nothing where it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                warn!(path = %folder.display(), %error, "a folder of the cache cannot be read");
            }
            return Vec::new();
        }
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.collect()
}
