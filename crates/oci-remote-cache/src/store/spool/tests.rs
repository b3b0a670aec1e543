use std::collections::HashMap;
use std::thread;

use bytes::Bytes;
use oci::Algorithm;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::store::pieces::piece;
use crate::store::publish::FileIdentity;

fn slice(start: u64, end: u64) -> Slice {
    Slice { start, end }
}

fn content(size: u64) -> Bytes {
    (0..size)
        .map(|at| u8::try_from(at * 31 % 251).unwrap())
        .collect::<Vec<u8>>()
        .into()
}

fn part(of: &Bytes, start: u64, end: u64) -> Bytes {
    of.slice(usize::try_from(start).unwrap()..usize::try_from(end).unwrap())
}

fn upstream() -> UpstreamId {
    UpstreamId::new("up")
}

/// A spool for these bytes, and what keeps its folder.
fn spool_for(bytes: &Bytes) -> (TempDir, Layout, Arc<Spool>) {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::open(folder.path()).unwrap();
    let digest = Digest::of(Algorithm::Sha256, bytes);
    let spool = Spool::create(&layout, digest, &upstream()).unwrap();
    spool.settle_size(bytes.len() as u64).unwrap();
    (folder, layout, Arc::new(spool))
}

fn hashed(spool: &Spool) -> PrefixHash {
    let mut hash = PrefixHash::new(spool.digest());
    hash.follow(spool).unwrap();
    hash
}

fn read(file: &File, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A connection that was overtaken brings the rest of its batch when the blob is verified, and other bytes at that.
#[test]
fn what_was_hashed_is_not_written_again() {
    let right = content(9 << 20);
    let size = right.len() as u64;
    let (_folder, _layout, spool) = spool_for(&right);
    let mut overtaken = spool.writer(5 << 20);
    spool.writer(0).write(std::slice::from_ref(&right)).unwrap();
    let verified = spool.verify(hashed(&spool)).unwrap();
    let identity = FileIdentity::of(verified.file()).unwrap();
    let wrong = Bytes::from(vec![7; 2 << 20]);
    assert_eq!(overtaken.write(&[wrong]).unwrap(), 7 << 20);
    assert!(read(verified.file(), size) == right, "it is not the blob");
    // Else it would be hashed again at its first use.
    assert_eq!(FileIdentity::of(verified.file()).unwrap(), identity);
}

/// Who takes up what was parked is not written to by those who were writing before.
#[test]
fn nobody_writes_into_what_was_parked() {
    let right = content(9 << 20);
    let size = right.len() as u64;
    let (_folder, layout, spool) = spool_for(&right);
    spool.writer(0).write(&[part(&right, 0, 4 << 20)]).unwrap();
    let mut late = spool.writer(4 << 20);
    spool.park(&layout).unwrap();
    let again = Spool::resume(&layout, *spool.digest(), &upstream()).unwrap();
    let again = Arc::new(again.unwrap());
    assert_eq!(again.gaps(slice(0, size)), [slice(4 << 20, size)]);
    assert_eq!(again.reach(0), 0, "not looked at yet");
    again.check_kept(|| 0, || ());
    assert_eq!(again.reach(0), 4 << 20);
    again
        .writer(4 << 20)
        .write(&[part(&right, 4 << 20, size)])
        .unwrap();
    let verified = again.verify(hashed(&again)).unwrap();
    late.write(&[vec![7; 1 << 20].into()]).unwrap();
    assert!(read(verified.file(), size) == right, "it is not the blob");
}

/// Pieces of before are looked at one by one: those that are right are here, those that rotted are missing.
#[test]
fn each_kept_piece_counts_when_it_was_looked_at() {
    let right = content(4 * PIECE);
    let size = right.len() as u64;
    let (_folder, layout, spool) = spool_for(&right);
    spool
        .writer(0)
        .write(&[part(&right, 0, 3 * PIECE)])
        .unwrap();
    spool.park(&layout).unwrap();
    let parked = layout.parked_dir().join(spool.name());
    let file = OpenOptions::new().write(true).open(parked).unwrap();
    file.write_all_at(b"rot", PIECE).unwrap();
    let again = Spool::resume(&layout, *spool.digest(), &upstream()).unwrap();
    let again = Arc::new(again.unwrap());
    assert_eq!(again.total(), 3 * PIECE);
    let told = std::cell::RefCell::new(Vec::new());
    let tell = || {
        let runs = [0, PIECE, 2 * PIECE].map(|at| again.reach(at) > at);
        told.borrow_mut().push(runs);
    };
    again.check_kept(|| 2 * PIECE, tell);
    let wanted = [
        [false, false, true],
        [true, false, true],
        [true, false, true],
    ];
    assert_eq!(told.into_inner(), wanted);
    let missing = [slice(PIECE, 2 * PIECE), slice(3 * PIECE, size)];
    assert_eq!(again.gaps(slice(0, size)), missing);
    for gap in missing {
        again
            .writer(gap.start)
            .write(&[part(&right, gap.start, gap.end)])
            .unwrap();
    }
    assert!(again.verify(hashed(&again)).is_ok());
    // And taken up once more, the piece that came again counts by its new checksum.
    again.park(&layout).unwrap();
    let third = Spool::resume(&layout, *spool.digest(), &upstream()).unwrap();
    let third = third.unwrap();
    third.check_kept(|| 0, || ());
    assert_eq!(third.reach(0), size);
}

#[test]
fn a_spool_that_was_given_up_is_not_read_to_its_end() {
    let right = content(3 * PIECE);
    let (_folder, layout, spool) = spool_for(&right);
    spool.writer(0).write(std::slice::from_ref(&right)).unwrap();
    spool.park(&layout).unwrap();
    let again = Spool::resume(&layout, *spool.digest(), &upstream()).unwrap();
    let again = again.unwrap();
    let told = std::cell::Cell::new(0);
    again.check_kept(
        || 0,
        || {
            told.set(told.get() + 1);
            again.give_up();
        },
    );
    assert_eq!(told.get(), 1);
    assert_eq!(again.reach(0), PIECE);
}

/// One connection: what it brings, and in which portions.
#[derive(Clone, Debug)]
struct Connection {
    from: u16,
    length: u16,
    portion: u64,
}

impl Connection {
    fn run(&self, spool: &Arc<Spool>, bytes: &Bytes) {
        let size = bytes.len() as u64;
        let share = |share: u16| size * u64::from(share) / u64::from(u16::MAX);
        let mut at = share(self.from);
        let end = (at + share(self.length)).min(size);
        let mut writer = spool.writer(at);
        while at < end {
            let (middle, next) = (
                (at + self.portion / 3).min(end),
                (at + self.portion).min(end),
            );
            let batch = [part(bytes, at, middle), part(bytes, middle, next)];
            at = writer.write(&batch).unwrap();
            assert_eq!(at, next);
        }
    }
}

fn connections() -> impl Strategy<Value = Vec<Connection>> {
    let one = (any::<u16>(), any::<u16>(), 50_000_u64..3_000_000);
    let one = one.prop_map(|(from, length, portion)| Connection {
        from,
        length,
        portion,
    });
    prop::collection::vec(one, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever connections there are, in whatever portions they write, and whatever they bring twice: the list holds the checksum of
    /// each piece as it lies in the file, and the file the blob.
    #[test]
    fn the_list_says_what_the_file_holds(size in PIECE + 1..2 * PIECE + 100_000, connections in connections()) {
        let bytes = content(size);
        let (_folder, _layout, spool) = spool_for(&bytes);
        thread::scope(|scope| {
            for connection in &connections {
                scope.spawn(|| connection.run(&spool, &bytes));
            }
        });
        for gap in spool.gaps(slice(0, size)) {
            spool.writer(gap.start).write(&[part(&bytes, gap.start, gap.end)]).unwrap();
        }
        prop_assert_eq!(spool.total(), size);
        let list = read_list(&list_path(&spool.path), &upstream()).unwrap();
        let noted: HashMap<u64, u32> = list.checksums.iter().copied().collect();
        for index in 0..size.div_ceil(PIECE) {
            let held = checksum_of(&spool.file, piece(index, size)).unwrap();
            prop_assert_eq!(noted.get(&index), Some(&held), "piece {}", index);
        }
        prop_assert_eq!(list.checksums.len(), noted.len(), "a piece is noted twice");
        prop_assert!(spool.verify(hashed(&spool)).is_ok());
    }
}
