//! The cache's files from the outside, a disk that is too small on purpose, and names that mean what a test says.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr as _;

use oci::Digest;

/// A mount namespace, and the right to mount in it also for who is not root.
const NAMESPACES: [&str; 2] = ["--map-root-user", "--mount"];

/// A file below `blobs/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// The folder it lies in, such as `sha256`.
    pub algorithm: String,
    /// Its name.
    pub hex: String,
    /// Where it is.
    pub path: PathBuf,
}

impl StoredFile {
    pub(crate) fn of(path: PathBuf) -> Option<Self> {
        let hex = path.file_name()?.to_string_lossy().into_owned();
        let algorithm = path
            .parent()?
            .parent()?
            .file_name()?
            .to_string_lossy()
            .into_owned();
        Some(StoredFile {
            algorithm,
            hex,
            path,
        })
    }

    /// Also true of a file that was evicted while this looked.
    pub(crate) fn hashes_to_its_name(&self) -> bool {
        let Ok(wanted) = Digest::from_str(&format!("{}:{}", self.algorithm, self.hex)) else {
            return false;
        };
        let mut data = Vec::new();
        let Ok(mut file) = File::open(&self.path) else {
            return !self.path.exists();
        };
        file.read_to_end(&mut data).is_ok() && Digest::of(wanted.algorithm(), &data) == wanted
    }
}

/// Whether this machine lets us give the cache a small disk ([`disk`](crate::CacheBuilder::disk)): it takes namespaces.
pub fn can_limit_disk() -> bool {
    let tried = Command::new("unshare")
        .args(NAMESPACES)
        .arg("true")
        .stderr(Stdio::null())
        .status();
    tried.is_ok_and(|status| status.success())
}

/// The binary in a mount namespace with a small tmpfs as cache folder; the process keeps its id.
pub(crate) fn on_small_disk(bytes: u64, folder: &Path, binary: &Path) -> Command {
    let script = "mount -t tmpfs -o size=$1,mode=0700 tmpfs \"$2\" && shift 2 && exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(NAMESPACES)
        .args(["sh", "-c", script, "sh", &bytes.to_string()])
        .arg(folder)
        .arg(binary);
    command
}

/// Whether this machine lets us say what names resolve to ([`name`](crate::CacheBuilder::name)): it takes namespaces, and a resolver that
/// reads `/etc/hosts` first.
pub fn can_name_hosts() -> bool {
    let folder = tempfile::tempdir().expect("make a folder for names");
    let file = folder.path().join("hosts");
    let names = [("probe.test".to_owned(), vec!["127.0.0.2".to_owned()])];
    fs::write(&file, hosts(&names)).expect("write the names");
    let looked_up = among_names(&file, Path::new("getent"))
        .args(["hosts", "probe.test"])
        .stderr(Stdio::null())
        .output();
    looked_up.is_ok_and(|output| output.stdout.starts_with(b"127.0.0.2"))
}

/// The binary in a mount namespace where this file says what names resolve to; the process keeps its id.
pub(crate) fn among_names(file: &Path, binary: &Path) -> Command {
    let script = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(NAMESPACES)
        .args(["sh", "-c", script, "sh"])
        .arg(file)
        .arg(binary);
    command
}

/// The text of such a file.
pub(crate) fn hosts(names: &[(String, Vec<String>)]) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
    for (name, addresses) in names {
        for address in addresses {
            writeln!(text, "{address} {name}").ok();
        }
    }
    text
}

pub(crate) fn seen_by(pid: u32, path: &Path) -> PathBuf {
    let inside = path.strip_prefix("/").unwrap_or(path);
    PathBuf::from(format!("/proc/{pid}/root")).join(inside)
}

pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .flat_map(|path| {
            if path.is_dir() {
                files_below(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}
