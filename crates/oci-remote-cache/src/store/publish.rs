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

#[cfg(test)]
mod tests {
    use oci::{Algorithm, Digest};

    use super::super::spool::hash_file;
    use super::super::tests::verified;
    use super::*;

    const STEPS: [Step; 5] = [
        Step::Restricted,
        Step::DataSynced,
        Step::FolderMade,
        Step::Renamed,
        Step::FoldersSynced,
    ];

    #[test]
    fn a_crash_after_any_step_leaves_all_or_nothing() {
        for last in STEPS {
            let temp = tempfile::tempdir().unwrap();
            let layout = Layout::open(temp.path()).unwrap();
            let spool = verified(&layout, b"hello");
            let mut taken = Vec::new();
            let outcome = publish_steps(&layout, &spool, &mut |step| {
                taken.push(step);
                let crash = (step == last).then(|| io::Error::other("crash"));
                crash.map_or(Ok(()), Err)
            });
            assert!(outcome.is_err());
            assert!(STEPS.starts_with(&taken) && taken.last() == Some(&last));
            let target = layout.blob_path(spool.digest());
            let renamed = taken.contains(&Step::Renamed);
            assert_eq!(
                (target.exists(), spool.path().exists()),
                (renamed, !renamed)
            );
            if renamed {
                assert_eq!(fs::read(&target).unwrap(), b"hello");
            }
            // A second try, as a recovery makes it, ends well.
            if !renamed {
                publish(&layout, &spool).unwrap();
                assert_eq!(fs::read(&target).unwrap(), b"hello");
            }
        }
    }

    #[test]
    fn what_is_there_is_replaced_and_read_on() {
        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::open(temp.path()).unwrap();
        let target = layout.blob_path(&Digest::of(Algorithm::Sha256, b"hello"));
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(&target, "rotten").unwrap();
        let spool = verified(&layout, b"hello");
        let identity = publish(&layout, &spool).unwrap();
        assert_eq!(identity, FileIdentity::of(spool.file()).unwrap());
        assert_eq!(identity.size, 5);
        assert_eq!(fs::read(&target).unwrap(), b"hello");
        let whole = oci::Slice { start: 0, end: 5 };
        let hasher = oci::Hasher::new(Algorithm::Sha256);
        let found = hash_file(spool.file(), whole, hasher).unwrap();
        assert_eq!(found.finish(), *spool.digest());
    }

    #[test]
    fn a_spool_that_grew_is_not_published() {
        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::open(temp.path()).unwrap();
        let spool = verified(&layout, b"hello");
        spool.file().set_len(6).unwrap();
        assert!(publish(&layout, &spool).is_err());
        assert!(!layout.blob_path(spool.digest()).exists());
    }
}
