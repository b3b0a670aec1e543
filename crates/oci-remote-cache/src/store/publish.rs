//! From spool to blob: the one place where a file gets a name under which it is served.
//!
//! Whether the bytes are right was decided before: [`publish`] takes only a [`Verified`]. The order of its steps is what makes a crash
//! at any moment harmless, so they stay together: data reaches the disk before the name does, the name before anyone relies on it.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::error::StoreError;
use super::layout::Layout;
use super::spool::Verified;

/// Nanoseconds in a second.
const NANOS: i64 = 1_000_000_000;

/// What tells a file that was left alone from one that was changed or replaced behind our back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileIdentity {
    /// Length in bytes.
    pub size: u64,
    /// Time of the last change, in nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// Number of the inode.
    pub inode: u64,
}

/// The file operations of a publish, in their order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Restricted,
    DataSynced,
    FolderMade,
    Renamed,
    FoldersSynced,
}

impl FileIdentity {
    /// The identity of an open file.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|found| Self::from(&found))
    }
}

impl From<&fs::Metadata> for FileIdentity {
    fn from(found: &fs::Metadata) -> Self {
        Self {
            size: found.len(),
            mtime_ns: found
                .mtime()
                .saturating_mul(NANOS)
                .saturating_add(found.mtime_nsec()),
            inode: found.ino(),
        }
    }
}

/// Makes verified bytes a blob, durably. Whoever has the spool open keeps reading the same file. If the digest is published already, its
/// file is replaced by these bytes, which are known to be right. Blocks on the disk.
pub fn publish(layout: &Layout, verified: &Verified) -> Result<FileIdentity, StoreError> {
    publish_steps(layout, verified, &mut |_step| Ok(()))
        .map_err(|error| StoreError::new("publish", &layout.blob_path(verified.digest()), error))
}

/// [`publish`] with a look in after each step, so that a test can end the process, as it were, at any of them.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the rename that publishes"
)]
fn publish_steps(
    layout: &Layout,
    verified: &Verified,
    after: &mut dyn FnMut(Step) -> io::Result<()>,
) -> io::Result<FileIdentity> {
    let file = verified.file();
    let identity = FileIdentity::of(file)?;
    if identity.size != verified.size() {
        return Err(io::Error::other("the file changed after it was verified"));
    }
    file.set_permissions(Permissions::from_mode(0o600))?;
    after(Step::Restricted)?;
    file.sync_all()?;
    after(Step::DataSynced)?;
    let target = layout.blob_path(verified.digest());
    let mut changed = make_parents(layout.root(), &target)?;
    after(Step::FolderMade)?;
    fs::rename(verified.path(), &target)?;
    after(Step::Renamed)?;
    changed.extend(target.parent().map(Path::to_owned));
    for folder in changed.iter().rev() {
        sync_folder(folder)?;
    }
    after(Step::FoldersSynced)?;
    Ok(identity)
}

/// Moves a file that is not published, for example to be looked at later. Makes the folder it goes to.
#[expect(
    clippy::disallowed_methods,
    reason = "no name under blobs/ is given here: the file leaves the readers' sight"
)]
pub(super) fn move_aside(from: &Path, to: &Path) -> io::Result<()> {
    if let Some(parent) = to.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)?;
    }
    fs::rename(from, to)
}

/// Removes a file; one that is not there is removed already.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Makes the folders of `target` below `root` and returns those that got a new entry, which must be synced too.
fn make_parents(root: &Path, target: &Path) -> io::Result<Vec<PathBuf>> {
    let mut missing = Vec::new();
    let mut folder = target.parent();
    while let Some(at) = folder.filter(|at| *at != root && !at.is_dir()) {
        missing.push(at.to_owned());
        folder = at.parent();
    }
    let mut changed = Vec::new();
    for at in missing.iter().rev() {
        match DirBuilder::new().mode(0o700).create(at) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => changed.extend(at.parent().map(Path::to_owned)),
        }
    }
    Ok(changed)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
