//! A file that is read again when it changes: certificates, passwords and tokens are replaced while we run.
//!
//! It is looked at when somebody wants it, at most once a second. What cannot be read or understood any more changes nothing: the last
//! good content stays, and the log says so.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::tasks::Tasks;

/// How long a look is good for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// No file of this kind is larger; one that is was not meant.
const LARGEST: u64 = 4 << 20;

/// Why a file's content cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the file {}: {why}", path.display())]
pub struct FileError {
    path: PathBuf,
    why: String,
}

/// Makes content of a file's bytes, or says what is wrong with them. It must not quote them.
type Reader<T> = Box<dyn Fn(&[u8]) -> Result<T, String> + Send + Sync>;

/// The same for several files together.
type ReaderOfAll<T> = Box<dyn Fn(&[PathBuf]) -> Result<T, FileError> + Send + Sync>;

/// Files and what their bytes mean, as they last were. Clones share it.
pub struct Watched<T> {
    inner: Arc<Inner<T>>,
}

struct Inner<T> {
    paths: Vec<PathBuf>,
    read: ReaderOfAll<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    content: Arc<T>,
    seen: Vec<Option<Mark>>,
    looked: Instant,
}

/// What tells one content of a path from another without reading it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mark {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileError {
    /// `why` the file at `path` is of no use.
    pub fn new(path: &Path, why: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            why: why.into(),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl<T: Send + Sync + 'static> Watched<T> {
    /// Reads the file at `path` now, and again whenever it changes. Blocks on the disk.
    pub fn open(
        path: &Path,
        read: impl Fn(&[u8]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, FileError> {
        let read: Reader<T> = Box::new(read);
        Self::open_all(vec![path.to_owned()], move |paths| {
            let mut contents = None;
            for path in paths {
                let bytes = read_file(path)?;
                contents = Some(read(&bytes).map_err(|why| FileError::new(path, why))?);
            }
            contents.ok_or_else(|| FileError::new(Path::new(""), "it has no name"))
        })
    }

    /// As [`Watched::open`], for files that only make sense together (a certificate and its key).
    pub fn open_all(
        paths: Vec<PathBuf>,
        read: impl Fn(&[PathBuf]) -> Result<T, FileError> + Send + Sync + 'static,
    ) -> Result<Self, FileError> {
        // Looked at before it is read: what changes in between is read once more.
        let seen = marks(&paths);
        let state = State {
            content: Arc::new(read(&paths)?),
            seen,
            looked: Instant::now(),
        };
        let inner = Inner {
            paths,
            read: Box::new(read),
            state: Mutex::new(state),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The content as it is now.
    pub async fn current(&self, tasks: &Tasks) -> Arc<T> {
        if self.inner.is_due() {
            let inner = Arc::clone(&self.inner);
            // A look that was lost to shutdown changes nothing.
            tasks.spawn_blocking(move || inner.look()).await.ok();
        }
        self.latest()
    }

    /// The content as it was when it was last looked at.
    pub fn latest(&self) -> Arc<T> {
        Arc::clone(&self.inner.lock().content)
    }
}

impl<T> Inner<T> {
    fn is_due(&self) -> bool {
        let mut state = self.lock();
        let due = state.looked.elapsed() >= LOOK_EVERY;
        if due {
            state.looked = Instant::now();
        }
        due
    }

    fn look(&self) {
        let now = marks(&self.paths);
        if self.lock().seen == now {
            return;
        }
        let read = (self.read)(&self.paths);
        let mut state = self.lock();
        state.seen = now;
        match read {
            Ok(content) => {
                state.content = Arc::new(content);
                drop(state);
                tracing::info!(files = ?self.paths, "changed, and read again");
            }
            Err(error) => {
                drop(state);
                tracing::warn!(%error, "changed for the worse; what it held before stays in force");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Clone for Watched<T> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<T> fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watched").field(&self.inner.paths).finish()
    }
}

/// The whole of a file that is not large. The bytes are wiped when dropped: they may be a key or a password.
pub fn read_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let read = || -> io::Result<Zeroizing<Vec<u8>>> {
        let file = File::open(path)?;
        let length = file.metadata()?.len().min(LARGEST);
        // With its room from the start the buffer does not move, which would leave copies behind.
        let room = usize::try_from(length).unwrap_or(0).saturating_add(1);
        let mut bytes = Zeroizing::new(Vec::with_capacity(room));
        file.take(LARGEST + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| FileError::new(path, error.to_string()))?;
    if bytes.len() as u64 > LARGEST {
        return Err(FileError::new(path, "it is larger than 4 MiB"));
    }
    Ok(bytes)
}

fn marks(paths: &[PathBuf]) -> Vec<Option<Mark>> {
    let mark = |found: Metadata| Mark {
        inode: found.ino(),
        size: found.size(),
        modified: (found.mtime(), found.mtime_nsec()),
        changed: (found.ctime(), found.ctime_nsec()),
    };
    paths
        .iter()
        .map(|path| fs::metadata(path).ok().map(mark))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8]) -> Result<String, String> {
        let text = String::from_utf8_lossy(bytes).into_owned();
        if text.contains("bad") {
            return Err("it is bad".to_owned());
        }
        Ok(text)
    }

    #[tokio::test(start_paused = true)]
    async fn what_changes_is_read_again_and_what_spoils_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (path, tasks) = (folder.path().join("f"), Tasks::new());
        fs::write(&path, "one").unwrap();
        let watched = Watched::open(&path, text).unwrap();
        fs::write(&path, "other").unwrap();
        assert_eq!(*watched.current(&tasks).await, "one", "looked at just now");
        tokio::time::advance(LOOK_EVERY).await;
        assert_eq!(*watched.current(&tasks).await, "other");
        for spoil in [
            |path: &Path| fs::write(path, "bad thing").unwrap(),
            |path: &Path| fs::remove_file(path).unwrap(),
        ] {
            spoil(&path);
            tokio::time::advance(LOOK_EVERY).await;
            assert_eq!(*watched.current(&tasks).await, "other");
        }
        fs::write(&path, "third").unwrap();
        tokio::time::advance(LOOK_EVERY).await;
        assert_eq!(*watched.current(&tasks).await, "third");
    }

    #[test]
    fn what_is_missing_or_bad_at_first_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        assert!(Watched::open(&path, text).is_err());
        fs::write(&path, "bad s3cret").unwrap();
        let error = Watched::open(&path, text).unwrap_err().to_string();
        assert!(
            error.ends_with("it is bad") && !error.contains("s3cret"),
            "{error}"
        );
    }
}
