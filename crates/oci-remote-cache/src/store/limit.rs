//! How much may be stored where the configuration does not say, and how many files may be kept open: what the machine has decides.

use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::layout::on_tmpfs;

/// Room that a default limit leaves to others on the disk.
const LEFT_TO_OTHERS: u64 = 2 << 30;

/// Blob files kept open at least and at most, whatever the limit of open files is.
const OPEN_FILES: (u64, u64) = (16, 512);

/// How much may be stored in the folder at `root`, where `ours` bytes are stored already. Blocks on the disk.
pub(super) fn default_max_size(root: &Path, ours: u64) -> u64 {
    let free =
        rustix::fs::statvfs(root).map_or(0, |found| found.f_bavail.saturating_mul(found.f_frsize));
    let limit = default_limit(free.saturating_add(ours));
    if on_tmpfs(root) {
        limit.min(memory() / 4)
    } else {
        limit
    }
}

/// The default limit on a disk where `available` bytes are free or ours: 80 %, but 2 GiB stay free. Where that is next to nothing, half.
fn default_limit(available: u64) -> u64 {
    let share = available / 5 * 4;
    share
        .min(available.saturating_sub(LEFT_TO_OTHERS))
        .max(available / 2)
}

/// Bytes of memory of this machine, or of this container where it has fewer.
fn memory() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| memory_total(&text));
    let container = std::fs::read_to_string("/sys/fs/cgroup/memory.max")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let least = machine.into_iter().chain(container).min();
    least.unwrap_or(0)
}

fn memory_total(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// How many blob files are kept open for the next reader.
pub(super) fn open_files() -> usize {
    share_of_files(getrlimit(Resource::Nofile).current)
}

/// An eighth of the files that the process may have open.
fn share_of_files(limit: Option<u64>) -> usize {
    let (least, most) = OPEN_FILES;
    let count = (limit.unwrap_or(u64::MAX) / 8).clamp(least, most);
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_limit_leaves_room() {
        const GIB: u64 = 1 << 30;
        assert_eq!(default_limit(100 * GIB), 80 * GIB);
        assert_eq!(default_limit(8 * GIB), 6 * GIB);
        assert_eq!(default_limit(4 * GIB), 2 * GIB);
        assert_eq!(default_limit(GIB), GIB / 2);
        assert_eq!(default_limit(0), 0);
    }

    #[test]
    fn memory_is_read_in_kib() {
        let text = "MemTotal:       16 kB\nMemFree: 1 kB\n";
        assert_eq!(memory_total(text), Some(16 << 10));
        assert_eq!(memory_total("MemFree: 1 kB"), None);
    }

    #[test]
    fn open_files_follow_the_limit() {
        assert_eq!(share_of_files(Some(64)), 16);
        assert_eq!(share_of_files(Some(1024)), 128);
        assert_eq!(share_of_files(None), 512);
    }
}
