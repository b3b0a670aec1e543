//! The cache folder: its paths, and what it must be before anything in it is trusted.
//!
//! Opening takes the folder's lock and keeps it as long as the [`Layout`] lives. What the files mean is no business of this module.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, OFlags};

use oci::Digest;

use super::error::OpenError;

/// The format of the folder that this version writes, and the newest it reads.
const FORMAT: u32 = 1;

/// Links followed on the way to the folder before giving up, as many as Linux follows.
const MAX_LINKS: usize = 40;

/// Write permission for group or others.
const OTHERS_WRITE: u32 = 0o022;

/// The same for everybody.
const ANYONE_WRITES: u32 = 0o002;

/// Only owners may rename or remove what is in the folder.
const STICKY: u32 = 0o1000;

/// `f_type` of file systems that live in memory.
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// An opened cache folder.
#[derive(Debug)]
pub struct Layout {
    root: PathBuf,
    writable: bool,
    /// Closing it, once all who hold it have done so, gives the lock back.
    lock: Option<Arc<File>>,
}

/// Whether what is stored will still be there after a reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// It lies on a disk.
    Lasting,
    /// It lies in memory.
    Tmpfs,
    /// It lies under `/tmp`, which distributions clean.
    UnderTmp,
}

impl Layout {
    /// Opens the cache folder `dir` for this process alone, making it (0700) if need be. Blocks on the disk.
    ///
    /// A folder that exists but cannot be written is no error: see [`Layout::writable`].
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let root = resolve(dir)?;
        make_folder(&root)?;
        check_folder(&root)?;
        let mut intent = Intent::allowed(&root);
        let lock = lock(&root, intent)?;
        check_format(&root, intent)?;
        for folder in ["blobs", "spool", "parked"].map(|name| root.join(name)) {
            if intent == Intent::Write {
                make_folder(&folder)?;
            }
            if folder.symlink_metadata().is_ok() {
                check_folder(&folder)?;
                intent = intent.min(Intent::allowed(&folder));
            }
        }
        Ok(Self {
            root,
            writable: intent == Intent::Write,
            lock: lock.map(Arc::new),
        })
    }

    /// Looks into the cache folder `dir` beside the process that serves from it: no lock is taken, nothing is written.
    pub fn peek(dir: &Path) -> Result<Self, OpenError> {
        let root = resolve(dir)?;
        let absent = || OpenError::Absent {
            dir: dir.to_owned(),
        };
        let found = match root.symlink_metadata() {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(absent()),
            Err(error) => return Err(unreadable(&root, error)),
        };
        if !found.is_dir() {
            return Err(OpenError::NotAFolder { dir: root });
        }
        if read_format(&root)?.is_empty() && !root.join("blobs").is_dir() {
            return Err(absent());
        }
        check_format(&root, Intent::Read)?;
        Ok(Self {
            root,
            writable: false,
            lock: None,
        })
    }

    /// The folder itself, links resolved.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the blob with this digest lies, if it is stored.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        let prefix: String = hex.chars().take(2).collect();
        let mut path = self.blobs_dir();
        path.extend([digest.algorithm().name(), &prefix, &hex]);
        path
    }

    /// The folder of all blobs.
    pub fn blobs_dir(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// The folder of fills in flight.
    pub fn spool_dir(&self) -> PathBuf {
        self.root.join("spool")
    }

    /// The folder of pieces kept of fills that stopped.
    pub fn parked_dir(&self) -> PathBuf {
        self.root.join("parked")
    }

    /// The folder where files go that have no business among the blobs.
    pub fn strays_dir(&self) -> PathBuf {
        self.root.join("strays")
    }

    /// The catalog's file.
    pub fn catalog_path(&self) -> PathBuf {
        self.root.join("catalog.db")
    }

    /// Whether anything can be stored. If not, what can be read is served and the rest passes through.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The lock, for those who may write on when the store is closed.
    pub(super) fn lock(&self) -> Option<Arc<File>> {
        self.lock.clone()
    }

    /// Whether the folder is ours and everybody may put files in it and take them away. One that was made so for us, as volumes of
    /// containers are, is not ours to close.
    pub fn is_open_to_all(&self) -> bool {
        let ours = |folder: &Metadata| folder.uid() == rustix::process::geteuid().as_raw();
        let open = |folder: &Metadata| folder.mode() & (ANYONE_WRITES | STICKY) == ANYONE_WRITES;
        let folder = self.root.metadata();
        folder.is_ok_and(|folder| ours(&folder) && open(&folder))
    }

    /// Whether what is stored will last, as far as the path and the file system tell.
    pub fn lasting(&self) -> Lasting {
        if on_tmpfs(&self.root) {
            Lasting::Tmpfs
        } else if self.root.starts_with("/tmp") {
            Lasting::UnderTmp
        } else {
            Lasting::Lasting
        }
    }
}

impl Lasting {
    /// The line to show at start where `root` will not last.
    pub fn warning(self, root: &Path) -> Option<String> {
        let why = match self {
            Self::Lasting => return None,
            Self::Tmpfs => "is in memory (tmpfs)",
            Self::UnderTmp => "is under /tmp",
        };
        let root = root.display();
        Some(format!(
            "the cache in {root} {why} and will not last: set cache_dir to a folder on a disk"
        ))
    }
}

/// Whether `path` lies on a file system in memory.
pub(super) fn on_tmpfs(path: &Path) -> bool {
    #[expect(
        clippy::useless_conversion,
        reason = "the type of f_type differs between architectures"
    )]
    rustix::fs::statfs(path).is_ok_and(|found| IN_MEMORY.contains(&i64::from(found.f_type)))
}

/// What a folder is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Intent {
    Read,
    Write,
}

impl Intent {
    /// The most that we may do in a folder.
    fn allowed(dir: &Path) -> Self {
        match rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK) {
            Ok(()) => Self::Write,
            Err(_) => Self::Read,
        }
    }
}

/// The absolute path of `dir` with its links resolved, refusing links that others could point elsewhere. What does not exist yet is
/// kept as it is written.
fn resolve(dir: &Path) -> Result<PathBuf, OpenError> {
    let absolute = std::path::absolute(dir).map_err(|error| unreadable(dir, error))?;
    let mut ahead = parts(&absolute);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = ahead.pop_front() {
        if part == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&part);
        let Ok(found) = next.symlink_metadata() else {
            at = next;
            continue;
        };
        if !found.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS || !link_is_safe(&at, &found) {
            return Err(OpenError::Link {
                dir: dir.to_owned(),
                link: next,
            });
        }
        let target = fs::read_link(&next).map_err(|error| unreadable(&next, error))?;
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        for part in parts(&target).into_iter().rev() {
            ahead.push_front(part);
        }
    }
    Ok(at)
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
        })
        .collect()
}

/// Whether only root and ourselves can make or change this link in `folder`. In a sticky folder such as `/tmp` anyone may add a link,
/// but nobody may replace ours.
fn link_is_safe(folder: &Path, link: &Metadata) -> bool {
    let Ok(folder) = folder.metadata() else {
        return false;
    };
    let shared = folder.mode() & OTHERS_WRITE != 0;
    let sticky = folder.mode() & STICKY != 0;
    is_ours(&folder) && (!shared || sticky) && (!sticky || is_ours(link))
}

fn is_ours(found: &Metadata) -> bool {
    found.uid() == 0 || found.uid() == rustix::process::geteuid().as_raw()
}

fn make_folder(dir: &Path) -> Result<(), OpenError> {
    match dir.symlink_metadata() {
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(OpenError::NotAFolder {
                dir: dir.to_owned(),
            });
        }
        Err(error) => return Err(unreadable(dir, error)),
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| OpenError::Unmakeable {
            dir: dir.to_owned(),
            source,
        })?;
    // Blobs are synced up to this folder only, so its own name must be on the disk. Where that fails, nothing is stored yet.
    if let Some(parent) = dir.parent() {
        File::open(parent).and_then(|parent| parent.sync_all()).ok();
    }
    Ok(())
}

fn check_folder(dir: &Path) -> Result<(), OpenError> {
    let found = dir
        .symlink_metadata()
        .map_err(|error| unreadable(dir, error))?;
    if !found.is_dir() {
        return Err(OpenError::NotAFolder {
            dir: dir.to_owned(),
        });
    }
    if !is_ours(&found) {
        return Err(OpenError::Foreign {
            dir: dir.to_owned(),
            owner: found.uid(),
        });
    }
    rustix::fs::access(dir, Access::READ_OK | Access::EXEC_OK)
        .map_err(|error| unreadable(dir, error.into()))
}

/// Takes the folder's lock. A folder that cannot be written may have no lock file, and then nobody can write to it either.
fn lock(root: &Path, intent: Intent) -> Result<Option<File>, OpenError> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(no_follow());
    if intent == Intent::Write {
        options.write(true).create(true).mode(0o600);
    }
    let path = root.join("lock");
    let file = match options.open(&path) {
        Ok(file) => file,
        Err(_) if intent == Intent::Read => return Ok(None),
        Err(error) => return Err(unreadable(&path, error)),
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked {
            dir: root.to_owned(),
        }),
        Err(TryLockError::Error(error)) => Err(unreadable(&path, error)),
    }
}

fn check_format(root: &Path, intent: Intent) -> Result<(), OpenError> {
    let found = read_format(root)?;
    if found.is_empty() {
        return match intent {
            Intent::Read => Ok(()),
            Intent::Write => write_format(root),
        };
    }
    if found
        .parse::<u32>()
        .is_ok_and(|version| version > 0 && version <= FORMAT)
    {
        return Ok(());
    }
    Err(OpenError::Newer {
        dir: root.to_owned(),
        found,
        known: FORMAT,
    })
}

/// What the format file says, empty when there is none or a crash left it empty.
fn read_format(root: &Path) -> Result<String, OpenError> {
    let path = root.join("format");
    let file = match open_no_follow(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(unreadable(&path, error)),
    };
    let mut text = Vec::new();
    file.take(64)
        .read_to_end(&mut text)
        .map_err(|error| unreadable(&path, error))?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

/// Marks a new folder. On a full disk it stays unmarked, which is no reason not to serve what is there.
fn write_format(root: &Path) -> Result<(), OpenError> {
    let path = root.join("format");
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(no_follow())
        .open(&path)
        .and_then(|mut file| {
            writeln!(file, "{FORMAT}")?;
            file.sync_all()
        });
    match written {
        Err(error) if error.kind() != io::ErrorKind::StorageFull => Err(unreadable(&path, error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Opens a file for reading, but not through a link.
pub(super) fn open_no_follow(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(no_follow())
        .open(path)
}

fn no_follow() -> i32 {
    OFlags::NOFOLLOW.bits().cast_signed()
}

fn unreadable(dir: &Path, source: io::Error) -> OpenError {
    OpenError::Unreadable {
        dir: dir.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use oci::Algorithm;

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn folders_are_private_and_marked() {
        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::open(&temp.path().join("a/b")).unwrap();
        let folders = [
            layout.root().to_owned(),
            layout.blobs_dir(),
            layout.spool_dir(),
            layout.parked_dir(),
        ];
        for folder in folders {
            assert_eq!(folder.metadata().unwrap().mode() & 0o777, 0o700);
        }
        assert_eq!(
            fs::read_to_string(temp.path().join("a/b/format")).unwrap(),
            "1\n"
        );
        assert!(layout.writable());
    }

    #[test]
    fn blobs_lie_under_their_first_two_digits() {
        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::open(temp.path()).unwrap();
        let digest = Digest::of(Algorithm::Sha256, b"");
        let path = layout.blob_path(&digest);
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert!(path.ends_with(format!("blobs/sha256/e3/{hex}")), "{path:?}");
    }

    #[test]
    fn what_is_no_folder_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        fs::write(&file, "x").unwrap();
        for dir in [file.clone(), file.join("below")] {
            let refused = Layout::open(&dir).unwrap_err();
            assert!(matches!(refused, OpenError::NotAFolder { .. }), "{refused}");
        }
        assert_eq!(fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn a_planted_subfolder_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        symlink("/etc", temp.path().join("spool")).unwrap();
        let refused = Layout::open(temp.path()).unwrap_err();
        assert!(matches!(refused, OpenError::NotAFolder { .. }), "{refused}");
    }

    #[test]
    fn a_newer_format_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        for found in ["2", "1.5", "x"] {
            fs::write(temp.path().join("format"), found).unwrap();
            let refused = Layout::open(temp.path()).unwrap_err();
            assert!(matches!(refused, OpenError::Newer { .. }), "{refused}");
        }
        fs::write(temp.path().join("format"), "").unwrap();
        drop(Layout::open(temp.path()).unwrap());
    }

    #[test]
    fn somebody_elses_folder_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("cache");
        fs::create_dir(&dir).unwrap();
        if chown(&dir, Some(12_345), None).is_err() {
            return; // Only root may give files away.
        }
        let refused = Layout::open(&dir).unwrap_err();
        assert!(
            matches!(refused, OpenError::Foreign { owner: 12_345, .. }),
            "{refused}"
        );
    }

    #[test]
    fn a_folder_that_everybody_may_write_is_told() {
        let temp = tempfile::tempdir().unwrap();
        for (mode, open) in [
            (0o700, false),
            (0o775, false),
            (0o777, true),
            (0o1777, false),
        ] {
            let dir = temp.path().join(format!("{mode:o}"));
            fs::create_dir(&dir).unwrap();
            set_mode(&dir, mode);
            assert_eq!(
                Layout::open(&dir).unwrap().is_open_to_all(),
                open,
                "{mode:o}"
            );
        }
    }

    #[test]
    fn links_count_where_only_we_can_make_them() {
        let temp = tempfile::tempdir().unwrap();
        let (real, way) = (temp.path().join("real"), temp.path().join("way"));
        fs::create_dir(&real).unwrap();
        fs::create_dir(&way).unwrap();
        symlink("../real", way.join("link")).unwrap();
        let dir = way.join("link/cache");
        for mode in [0o700, 0o755, 0o1777] {
            set_mode(&way, mode);
            let layout = Layout::open(&dir).unwrap();
            assert!(layout.root().ends_with("real/cache"));
        }
        for mode in [0o777, 0o775] {
            set_mode(&way, mode);
            let refused = Layout::open(&dir).unwrap_err();
            assert!(matches!(refused, OpenError::Link { .. }), "{refused}");
        }
        set_mode(&way, 0o1777);
        if std::os::unix::fs::lchown(way.join("link"), Some(12_345), None).is_ok() {
            let refused = Layout::open(&dir).unwrap_err();
            assert!(matches!(refused, OpenError::Link { .. }), "{refused}");
        }
    }

    #[test]
    fn a_link_to_itself_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        symlink("self", temp.path().join("self")).unwrap();
        let refused = Layout::open(&temp.path().join("self")).unwrap_err();
        assert!(matches!(refused, OpenError::Link { .. }), "{refused}");
    }

    #[test]
    fn a_peek_needs_a_store_and_no_lock() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("cache");
        assert!(matches!(Layout::peek(&dir), Err(OpenError::Absent { .. })));
        assert!(!dir.exists());
        fs::create_dir(&dir).unwrap();
        assert!(matches!(Layout::peek(&dir), Err(OpenError::Absent { .. })));
        let layout = Layout::open(&dir).unwrap();
        assert_eq!(Layout::peek(&dir).unwrap().root(), layout.root());
        let refused = Layout::open(&dir).unwrap_err().to_string();
        assert!(refused.contains("lock"), "{refused}");
    }

    #[test]
    fn what_will_not_last_is_said() {
        let warning = Lasting::UnderTmp.warning(Path::new("/tmp/cache"));
        let warning = warning.unwrap();
        assert!(warning.contains("will not last") && warning.contains("cache_dir"));
        assert_eq!(Lasting::Lasting.warning(Path::new("/var/cache")), None);
    }
}
