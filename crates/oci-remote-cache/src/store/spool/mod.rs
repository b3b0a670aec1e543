//! One blob on its way in: a sparse file, the map of what has arrived, and the one door to [`Verified`].
//!
//! Writers add ranges in any order, readers take spans of what is there, the hash follows the unbroken prefix. Beside a large spool
//! lies a list of checksums, one for each piece that became whole, so that a transfer cut by a crash, or parked because nobody read it,
//! goes on from its pieces. What is written here is not a blob: nothing under `spool/` or `parked/` is ever served as one.

mod arrivals;
mod kept;
mod prefix;
mod writer;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use oci::{Digest, Hasher, Slice};

pub use self::prefix::{Checkpoint, PrefixHash, hash_file};
pub use self::writer::SpoolWriter;

use self::arrivals::Arrivals;
use self::kept::Kept;
use super::layout::Layout;
use super::pieces::{PIECE, PieceMap};
use super::span::Span;
use crate::names::UpstreamId;

/// Ending of the list of checksums beside a spool.
const LIST: &str = "pieces";

/// Tells the spools of manifests apart.
static TURN: AtomicU64 = AtomicU64::new(0);

/// First word of that list; the version of its form.
const LIST_HEAD: &str = "oci-remote-cache-pieces-1";

/// A blob that is being filled. Shared by its writers and readers.
#[derive(Debug)]
pub struct Spool {
    digest: Digest,
    upstream: UpstreamId,
    path: PathBuf,
    file: Arc<File>,
    size: OnceLock<u64>,
    arrivals: Arrivals,
    kept: Kept,
    list: Mutex<Option<File>>,
}

/// Proof that a spool's bytes are the blob: its size is right and they hash to the digest. Only [`Spool::verify`] makes one, and
/// publishing takes nothing else.
#[derive(Clone, Debug)]
pub struct Verified {
    digest: Digest,
    size: u64,
    path: PathBuf,
    file: Arc<File>,
}

/// What the list beside a spool says: the blob's size, and the checksum of each piece that became whole.
struct PieceList {
    size: u64,
    checksums: Vec<(u64, u32)>,
}

/// The bytes do not hash to the digest they were asked for by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{size} bytes came that hash to {found}, not to {wanted}")]
pub struct Mismatch {
    /// The digest asked for.
    pub wanted: Digest,
    /// What the bytes hash to.
    pub found: Digest,
    /// How many bytes came.
    pub size: u64,
}

impl Spool {
    /// Starts a spool for `digest` from `upstream`, from zero. Blocks on the disk.
    pub fn create(layout: &Layout, digest: Digest, upstream: &UpstreamId) -> io::Result<Self> {
        let path = layout.spool_dir().join(name(&digest, upstream));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)?;
        remove(&list_path(&path)).ok();
        Ok(Self {
            digest,
            upstream: upstream.clone(),
            path,
            file: Arc::new(file),
            size: OnceLock::new(),
            arrivals: Arrivals::new(PieceMap::new()),
            kept: Kept::default(),
            list: Mutex::default(),
        })
    }

    /// Goes on with the pieces that were parked, or left by a crash, for this digest and upstream; `None` when there are none. They are
    /// not missing, and not here either, until [`Spool::check_kept`] has looked at them: tens of gigabytes are not read while a client
    /// waits for an answer. Blocks on the disk.
    pub fn resume(
        layout: &Layout,
        digest: Digest,
        upstream: &UpstreamId,
    ) -> io::Result<Option<Self>> {
        let name = name(&digest, upstream);
        let parked = layout.parked_dir().join(&name);
        let Some(PieceList { size, checksums }) = read_list(&list_path(&parked), upstream) else {
            return Ok(None);
        };
        let path = layout.spool_dir().join(&name);
        // Eviction may have taken the parked file in the meantime.
        if !rename(&parked, &path)? || !rename(&list_path(&parked), &list_path(&path))? {
            return Ok(None);
        }
        let file = Arc::new(OpenOptions::new().read(true).write(true).open(&path)?);
        let (kept, unsure) = Kept::new(checksums, size);
        let list = OpenOptions::new().append(true).open(list_path(&path))?;
        Ok(Some(Self {
            digest,
            upstream: upstream.clone(),
            path,
            file,
            size: OnceLock::from(size),
            arrivals: Arrivals::new(unsure),
            kept,
            list: Mutex::new(Some(list)),
        }))
    }

    /// Reads the pieces of an earlier transfer, and counts those whose checksum is right; the others become gaps. Each time the one that
    /// `first` asks for goes first, and `tell` is called behind it. Ends early when the spool is given up. Blocks on the disk.
    pub fn check_kept(&self, first: impl Fn() -> u64, tell: impl Fn()) {
        let size = self.size().unwrap_or_default();
        while let Some((part, checksums)) = self.kept.take(first(), size) {
            let found = checksum_of(&self.file, part);
            let wanted = if found.is_ok_and(|found| checksums.contains(&found)) {
                self.arrivals.found_right(part)
            } else {
                self.arrivals.found_wrong(part)
            };
            if !wanted {
                return;
            }
            tell();
        }
    }

    /// Nothing comes of this spool: what was kept is not looked at any more.
    pub fn give_up(&self) {
        self.arrivals.give_up();
    }

    /// The digest the bytes must hash to.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The file's name within `spool/`.
    pub fn name(&self) -> String {
        name(&self.digest, &self.upstream)
    }

    /// The blob's size in bytes, once known.
    pub fn size(&self) -> Option<u64> {
        self.size.get().copied()
    }

    /// Settles the size; a second, different one is refused. Blobs of more than one piece get their list of checksums here.
    pub fn settle_size(&self, size: u64) -> io::Result<()> {
        if *self.size.get_or_init(|| size) != size {
            return Err(io::Error::other(
                "the upstream changed its mind about the blob's size",
            ));
        }
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if size > PIECE && list.is_none() {
            let mut file = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(list_path(&self.path))?;
            writeln!(file, "{LIST_HEAD} {size} {}", self.upstream)?;
            *list = Some(file);
        }
        Ok(())
    }

    /// A writer of what comes from `offset` on.
    pub fn writer(self: &Arc<Self>, offset: u64) -> SpoolWriter {
        SpoolWriter::new(Arc::clone(self), offset)
    }

    /// End of the unbroken run from `offset`.
    pub fn reach(&self, offset: u64) -> u64 {
        self.arrivals.reach(offset)
    }

    /// The parts of `within` that have not arrived, and were not kept from before.
    pub fn gaps(&self, within: Slice) -> Vec<Slice> {
        self.arrivals.gaps(within)
    }

    /// How many bytes have arrived, or were kept from before and were not found wrong.
    pub fn total(&self) -> u64 {
        self.arrivals.total()
    }

    /// A span of this file.
    pub fn span(&self, slice: Slice) -> Span {
        Span {
            file: Arc::clone(&self.file),
            offset: slice.start,
            len: slice.len(),
        }
    }

    /// Whether these bytes are the blob, given the hash that followed them to their end.
    pub fn verify(&self, hash: PrefixHash) -> Result<Verified, Box<Mismatch>> {
        let (found, size) = hash.finish();
        let whole = self.size().is_none_or(|settled| settled == size) && self.reach(0) == size;
        if found != self.digest || !whole {
            return Err(Box::new(Mismatch {
                wanted: self.digest,
                found,
                size,
            }));
        }
        Ok(Verified {
            digest: self.digest,
            size,
            path: self.path.clone(),
            file: Arc::clone(&self.file),
        })
    }

    /// Removes the files; readers that have them open keep reading. Blocks on the disk.
    pub fn discard(&self) -> io::Result<()> {
        self.give_up();
        remove(&list_path(&self.path))?;
        remove(&self.path)
    }

    /// Removes the list of checksums, which a published blob needs no more.
    pub fn drop_list(&self) -> io::Result<()> {
        remove(&list_path(&self.path))
    }

    /// Moves the files to `parked/`, where a later fill finds its pieces. Without a list of pieces there is nothing worth keeping.
    pub fn park(&self, layout: &Layout) -> io::Result<()> {
        // Whoever takes the pieces up finds in the file what it has written itself.
        self.arrivals.close();
        let parked = layout.parked_dir().join(self.name());
        if !list_path(&self.path).exists() {
            return self.discard();
        }
        rename(&list_path(&self.path), &list_path(&parked))?;
        rename(&self.path, &parked).map(drop)
    }

    /// Counts what a writer has claimed and written, and tells which pieces of a blob that has a list became whole by it.
    fn count(&self, written: &[Slice]) -> Vec<(u64, Slice)> {
        let listed = self.size().filter(|&size| size > PIECE);
        self.arrivals.count(written, listed)
    }

    fn note_piece(&self, index: u64, checksum: u32) -> io::Result<()> {
        let line = format!("{index} {checksum:08x}\n");
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.as_mut()
            .map_or(Ok(()), |list| list.write_all(line.as_bytes()))
    }
}

impl Verified {
    /// Writes a body that is in memory to a spool of its own, if it hashes to `digest`: manifests. Blocks on the disk.
    pub fn write(layout: &Layout, digest: Digest, body: &[u8]) -> io::Result<Option<Self>> {
        let size = body.len() as u64;
        if Digest::of(digest.algorithm(), body) != digest {
            return Ok(None);
        }
        // Several requests may bring the same manifest at once, so each gets a file of its own.
        let turn = TURN.fetch_add(1, Ordering::Relaxed);
        let path = layout.spool_dir().join(format!(
            "{}-{}-m{turn}",
            digest.algorithm().name(),
            digest.hex()
        ));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)?;
        if let Err(error) = file.write_all(body) {
            // A full disk must not fill up with what did not fit.
            remove(&path).ok();
            return Err(error);
        }
        Ok(Some(Self {
            digest,
            size,
            path,
            file: Arc::new(file),
        }))
    }

    /// Removes the spool file, when it could not be published. Blocks on the disk.
    pub fn discard(&self) -> io::Result<()> {
        remove(&self.path)
    }

    /// The spool file's name within `spool/`.
    pub fn spool_name(&self) -> String {
        self.path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// Takes a spool that a crash left between its verification and its rename: `path` is hashed anew. Blocks on disk and CPU.
    pub fn recover(path: &Path, digest: Digest) -> io::Result<Option<Self>> {
        let file = Arc::new(OpenOptions::new().read(true).write(true).open(path)?);
        let size = file.metadata()?.len();
        let whole = Slice {
            start: 0,
            end: size,
        };
        let found = hash_file(&file, whole, Hasher::new(digest.algorithm()))?.finish();
        Ok((found == digest).then(|| Self {
            digest,
            size,
            path: path.to_owned(),
            file,
        }))
    }

    /// What the bytes hash to.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// How many bytes there are.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where they lie.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }
}

/// One fill at a time runs for an upstream and digest, so this names its spool for good. Only the key's checksum goes into the name:
/// the list beside the file holds the key itself.
fn name(digest: &Digest, upstream: &UpstreamId) -> String {
    format!(
        "{}-{}-{:08x}",
        digest.algorithm().name(),
        digest.hex(),
        crc32fast::hash(upstream.as_str().as_bytes())
    )
}

fn list_path(spool: &Path) -> PathBuf {
    spool.with_extension(LIST)
}

/// Renames a file among spools and parked pieces; says whether it was there.
#[expect(
    clippy::disallowed_methods,
    reason = "spools and parked pieces are no blobs: nothing is published here"
)]
fn rename(from: &Path, to: &Path) -> io::Result<bool> {
    match fs::rename(from, to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn checksum_of(file: &File, part: Slice) -> io::Result<u32> {
    let length = usize::try_from(part.len()).map_err(|_too_large| io::ErrorKind::InvalidInput)?;
    let mut block = vec![0; length];
    file.read_exact_at(&mut block, part.start)?;
    Ok(crc32fast::hash(&block))
}

/// Reads the list at `path`; `None` when it is missing or tells of another upstream. A last line cut short by a crash, like any other
/// that cannot be read, is no piece.
fn read_list(path: &Path, upstream: &UpstreamId) -> Option<PieceList> {
    let text = fs::read_to_string(path).ok()?;
    let mut lines = text.split_inclusive('\n');
    let mut head = lines.next()?.trim_end().splitn(3, ' ');
    let (form, size, from) = (head.next()?, head.next()?.parse().ok()?, head.next()?);
    if form != LIST_HEAD || from != upstream.as_str() {
        return None;
    }
    let checksums = lines
        .filter(|line| line.ends_with('\n'))
        .filter_map(|line| {
            let (index, checksum) = line.trim_end().split_once(' ')?;
            Some((index.parse().ok()?, u32::from_str_radix(checksum, 16).ok()?))
        });
    Some(PieceList {
        size,
        checksums: checksums.collect(),
    })
}

#[cfg(test)]
mod tests;
