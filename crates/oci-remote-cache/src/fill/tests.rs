//! The engine by itself: readers of every shape against an upstream that breaks in every way, and the one look under interleavings.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use oci::{Digest, RangeHeader, RangeSpec, Resolved, Slice};
use proptest::prelude::*;
use tempfile::TempDir;
use testbed::{Content, Gate, Handler, Kind, Matcher, Registry, ServeOptions, faults};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{Instant, sleep, timeout};
use url::Url;

use super::find::Slot;
use super::tail::{Joined, Open, Part, Release, Tail};
use super::*;
use crate::clock::Clock;
use crate::deadline::Deadline;
use crate::store::{Blob, Health, StoreSettings};
use crate::upstream::{self, Identity, Upstream};

const MIB: u64 = 1 << 20;
const REPO: &str = "lib/app";

/// What a takeover may leave unread in a socket.
const IN_SOCKETS: u64 = 8 * MIB;

/// An engine over an empty store, in front of a registry that does as it is told.
struct Bench {
    registry: Registry,
    upstreams: HashMap<UpstreamId, Arc<Upstream>>,
    store: Store,
    fills: Fills,
    metrics: Metrics,
    tasks: Tasks,
    /// What manifests tell of every layer.
    in_pieces: bool,
    _dir: TempDir,
}

impl Bench {
    async fn new() -> Arc<Self> {
        Self::keeping(None, 16).await
    }

    /// Its layers were made to be read in pieces.
    async fn of_pieces() -> Arc<Self> {
        let bench = Arc::into_inner(Self::new().await).unwrap();
        Arc::new(Self {
            in_pieces: true,
            ..bench
        })
    }

    /// Keeps blobs up to this size, and has so many connections.
    async fn keeping(max_blob: Option<u64>, per_upstream: usize) -> Arc<Self> {
        let registry = Registry::start().await;
        let (metrics, tasks) = (Metrics::new(), Tasks::new());
        let dir = TempDir::new().unwrap();
        let settings = StoreSettings {
            dir: dir.path().join("cache"),
            max_size: Some(1 << 30),
            max_blob,
        };
        let store = Store::open(settings, Clock::system(), metrics.clone(), tasks.clone())
            .await
            .unwrap();
        let limit = Connections {
            per_blob: 4,
            per_upstream,
        };
        let ids = ["up", "other"].map(UpstreamId::new);
        let limits = ids.iter().map(|id| (id.clone(), limit)).collect();
        let upstreams = ids.map(|id| (id.clone(), connected(&id, &registry, &metrics)));
        Arc::new(Self {
            fills: Fills::new(store.clone(), metrics.clone(), tasks.clone(), limits),
            upstreams: HashMap::from(upstreams),
            registry,
            store,
            metrics,
            tasks,
            in_pieces: false,
            _dir: dir,
        })
    }

    fn blob(&self, size: u64, seed: &str) -> Content {
        let blob = Content::blob(usize::try_from(size).unwrap(), seed);
        self.registry.put_blob(REPO, &blob);
        self.registry.put_blob("lib/twin", &blob);
        blob
    }

    fn wanted(&self, (upstream, repo): (&str, &str), digest: Digest, standing: Standing) -> Wanted {
        let id = UpstreamId::new(upstream);
        Wanted {
            upstream: Arc::clone(&self.upstreams[&id]),
            source: Source::new(id, repo.parse().unwrap()),
            digest,
            identity: Identity::Configured,
            standing,
            wish: wish_of(None, 1),
            told: None,
        }
    }

    fn proven(&self, blob: &Content) -> Wanted {
        self.wanted(("up", REPO), blob.digest, Standing::Proven)
    }

    fn gets(&self, blob: &Content) -> usize {
        self.registry.count((Kind::Blob, "GET", blob.digest))
    }

    /// Bytes of the blob that were sent, one answer or several.
    fn sent(&self) -> u64 {
        let gets = self.registry.entries((Kind::Blob, "GET"));
        let good = gets.iter().filter(|entry| entry.status < 300);
        good.map(|entry| entry.sent).sum()
    }

    /// The `Range` of each GET.
    fn ranges(&self) -> Vec<String> {
        let gets = self.registry.entries((Kind::Blob, "GET"));
        let range = gets.iter().map(|entry| entry.header("range"));
        range
            .map(|range| range.unwrap_or("all").to_owned())
            .collect()
    }

    /// Waits until no fill runs.
    async fn calm(&self, limit: Duration) {
        let end = Instant::now() + limit;
        // One that was led just now may not have begun.
        sleep(Duration::from_millis(20)).await;
        while self.metrics.fills.get() > 0 {
            assert!(Instant::now() < end, "a fill does not end");
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn end(&self) {
        self.tasks.stop();
        assert!(
            self.tasks.ended(Duration::from_secs(10)).await,
            "{} tasks do not end",
            self.tasks.len()
        );
    }

    fn parked(&self) -> usize {
        files_in(&self.store.layout().parked_dir())
    }

    fn spooled(&self) -> usize {
        files_in(&self.store.layout().spool_dir())
    }
}

fn files_in(folder: &std::path::Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

fn connected(id: &UpstreamId, registry: &Registry, metrics: &Metrics) -> Arc<Upstream> {
    let settings = upstream::Settings {
        id: id.clone(),
        url: Url::parse(&registry.url()).unwrap(),
        mirrors: Vec::new(),
        keyring: upstream::Keyring::default(),
        token_realms: Vec::new(),
        redirect_hosts: Vec::new(),
        trusted_networks: Vec::new(),
        ca_file: None,
        proxy: None,
        own_addresses: Vec::new(),
        user_agent: "oci-remote-cache/test".into(),
        offline: upstream::Offline::default(),
    };
    Arc::new(Upstream::new(settings, metrics.clone(), Clock::system()).unwrap())
}

/// What the front door makes of a `Range`.
fn wish_of(ranges: Option<&RangeHeader>, client: u8) -> Wish {
    let specs = ranges.map(RangeHeader::specs).unwrap_or_default();
    let open = |spec: &RangeSpec| matches!(spec, RangeSpec::From { .. });
    let range = match specs.first() {
        Some(first) if !specs.iter().any(open) => WishRange::Part(*first),
        _ => WishRange::Whole,
    };
    let client = Ipv4Addr::new(10, 0, 0, client).into();
    Wish { range, client }
}

/// How a reader's answer ended.
#[derive(Debug)]
enum Seen {
    /// All of it came, and was right.
    Complete,
    /// The reader left.
    Left,
    /// It was cut, or refused.
    Cut(FillError),
    /// The range does not lie in the blob.
    Unsatisfiable,
}

impl Seen {
    fn is_complete(&self) -> bool {
        matches!(self, Self::Complete)
    }

    /// Whether it is what this reader must see where the upstream's faults can be mended.
    fn is_fair(&self, reader: &Reader) -> bool {
        match self {
            Self::Complete | Self::Unsatisfiable => true,
            Self::Left => reader.leaves.is_some(),
            Self::Cut(_) => false,
        }
    }
}

/// One reader, as a client would be.
#[derive(Clone, Debug)]
struct Reader {
    shape: Shape,
    delay: u64,
    /// Leaves after this share of its bytes.
    leaves: Option<u16>,
    client: u8,
}

/// What a reader asks for, in shares of the blob.
#[derive(Clone, Debug)]
enum Shape {
    Whole,
    From(u16),
    Closed(u16, u16),
    Suffix(u16),
    Multi(Vec<(u16, u16)>),
}

/// `share` of `size`; [`u16::MAX`] is all.
fn of(share: u16, size: u64) -> u64 {
    size * u64::from(share) / u64::from(u16::MAX)
}

impl Shape {
    fn header(&self, size: u64) -> Option<RangeHeader> {
        let closed = |a: &u16, b: &u16| {
            let (a, b) = (of(*a, size), of(*b, size));
            format!("{}-{}", a.min(b), a.max(b))
        };
        let ranges = match self {
            Self::Whole => return None,
            Self::From(first) => format!("{}-", of(*first, size)),
            Self::Closed(a, b) => closed(a, b),
            Self::Suffix(length) => format!("-{}", of(*length, size)),
            Self::Multi(parts) => {
                let parts: Vec<String> = parts.iter().map(|(a, b)| closed(a, b)).collect();
                parts.join(",")
            }
        };
        RangeHeader::parse(&format!("bytes={ranges}"))
    }

    fn waits_for_the_verdict(&self) -> bool {
        matches!(self, Self::Whole | Self::From(_))
    }
}

impl Reader {
    fn whole() -> Self {
        Self {
            shape: Shape::Whole,
            delay: 0,
            leaves: None,
            client: 1,
        }
    }

    /// Reads as the front door does, comparing each byte. Wrong bytes end the test unless `truth` is what was sent.
    async fn read(&self, bench: &Bench, blob: &Content, truth: &[u8]) -> Seen {
        sleep(Duration::from_millis(self.delay)).await;
        let header = self.shape.header(blob.size());
        let wish = wish_of(header.as_ref(), self.client);
        let wanted = Wanted {
            wish,
            told: (self.client > 1).then(|| Told {
                in_pieces: bench.in_pieces,
                ..told(blob)
            }),
            ..bench.proven(blob)
        };
        let joined = match bench.fills.find(&wanted).await {
            Found::Stored(stored) => return compare_stored(&stored, header.as_ref(), truth),
            Found::Lead(joined) | Found::Filling(joined) => joined,
            Found::Failed(error) => return Seen::Cut(error),
            Found::ProveFirst => panic!("asked to prove what is proven"),
        };
        let open = match joined.open(Deadline::for_answer()).await {
            Ok(open) => open.expect("an answer in time"),
            Err(error) => return Seen::Cut(error),
        };
        let size = open.size().expect("the registry tells the size");
        assert_eq!(size, blob.size());
        let release = match wish.range {
            WishRange::Whole => Release::Verified,
            WishRange::Part(_) => Release::Arrived,
        };
        let Some(slices) = slices(header.as_ref(), size) else {
            return Seen::Unsatisfiable;
        };
        self.read_slices(open, &slices, (wish, release), truth)
            .await
    }

    async fn read_slices(
        &self,
        open: Open,
        slices: &[Slice],
        (wish, release): (Wish, Release),
        truth: &[u8],
    ) -> Seen {
        let tails: Vec<Tail> = match slices {
            [only] => vec![open.read(Some(*only), release)],
            several => {
                let tail = |slice: &Slice| open.again(wish).read(Some(*slice), Release::Arrived);
                several.iter().map(tail).collect()
            }
        };
        let all: u64 = slices.iter().map(|slice| slice.len()).sum();
        let mut patience = self.leaves.map_or(u64::MAX, |share| of(share, all));
        for (tail, slice) in tails.into_iter().zip(slices) {
            let seen = read_tail(tail, *slice, &mut patience, truth).await;
            if !seen.is_complete() {
                return seen;
            }
        }
        Seen::Complete
    }
}

fn compare_stored(stored: &Blob, header: Option<&RangeHeader>, truth: &[u8]) -> Seen {
    let Some(slices) = slices(header, stored.size) else {
        return Seen::Unsatisfiable;
    };
    for slice in slices {
        let bytes = stored.span(slice).read().unwrap();
        assert!(bytes == part(truth, slice.start, slice.end), "stored wrong");
    }
    Seen::Complete
}

/// Reads one range to its end, or until patience runs out.
async fn read_tail(mut tail: Tail, slice: Slice, patience: &mut u64, truth: &[u8]) -> Seen {
    let mut at = slice.start;
    while *patience > 0 {
        let bytes = match tail.next().await {
            Ok(Some(Part::Span(span))) => span.read().unwrap(),
            Ok(Some(Part::Memory(bytes))) => bytes,
            Ok(None) => {
                assert_eq!(at, slice.end, "complete, and short");
                return Seen::Complete;
            }
            Err(error) => return Seen::Cut(error),
        };
        let end = at + bytes.len() as u64;
        assert!(end <= slice.end, "more than was asked for");
        assert!(bytes == part(truth, at, end), "wrong bytes from {at}");
        at = end;
        *patience = patience.saturating_sub(bytes.len() as u64);
    }
    Seen::Left
}

fn part(truth: &[u8], start: u64, end: u64) -> &[u8] {
    &truth[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()]
}

fn slices(header: Option<&RangeHeader>, size: u64) -> Option<Vec<Slice>> {
    match header.map(|header| header.resolve(size)) {
        None => Some(vec![Slice {
            start: 0,
            end: size,
        }]),
        Some(Resolved::Single(slice)) => Some(vec![slice]),
        Some(Resolved::Multiple(slices)) => Some(slices),
        Some(Resolved::Unsatisfiable) => None,
    }
}

/// All of a fill, to its end.
async fn read_out(joined: Joined, blob: &Content) -> Result<(), FillError> {
    let open = joined.open(Deadline::for_answer()).await?.expect("in time");
    let whole = Slice {
        start: 0,
        end: blob.size(),
    };
    let seen = Reader::whole()
        .read_slices(
            open,
            &[whole],
            (wish_of(None, 1), Release::Verified),
            &blob.data,
        )
        .await;
    match seen {
        Seen::Complete => Ok(()),
        Seen::Cut(error) => Err(error),
        Seen::Left | Seen::Unsatisfiable => panic!("{seen:?}"),
    }
}

// Any readers, any faults.

/// What an upstream does wrong with one request.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    Cut(u16),
    Reset(u16),
    Unavailable,
    NoRanges,
    Drip,
}

impl Trouble {
    fn handler(self, blob: &Content) -> Handler {
        let options = ServeOptions::new();
        let options = match self {
            Self::Unavailable => return faults::error(503, "UNAVAILABLE", &[]),
            Self::Cut(at) => options.stop_at(of(at, blob.size())),
            Self::Reset(at) => options.reset_at(of(at, blob.size())),
            Self::NoRanges => options.without_ranges(),
            Self::Drip => options.rate((blob.size() * 2).max(8 * MIB)),
        };
        faults::serve(blob, options)
    }

    /// Bytes that may be sent in vain because of it.
    fn cost(self, size: u64) -> u64 {
        match self {
            Self::Cut(_) | Self::Unavailable | Self::Drip => 0,
            Self::Reset(at) => of(at, size),
            Self::NoRanges => size,
        }
    }
}

fn a_shape() -> impl Strategy<Value = Shape> {
    prop_oneof![
        3 => Just(Shape::Whole),
        2 => any::<u16>().prop_map(Shape::From),
        2 => any::<(u16, u16)>().prop_map(|(a, b)| Shape::Closed(a, b)),
        1 => any::<u16>().prop_map(Shape::Suffix),
        1 => prop::collection::vec(any::<(u16, u16)>(), 2..4).prop_map(Shape::Multi),
    ]
}

fn a_reader() -> impl Strategy<Value = Reader> {
    let leaves = prop::option::weighted(0.3, any::<u16>());
    (a_shape(), 0_u64..40, leaves, 1_u8..4).prop_map(|(shape, delay, leaves, client)| Reader {
        shape,
        delay,
        leaves,
        client,
    })
}

fn troubles() -> impl Strategy<Value = Vec<Trouble>> {
    let one = prop_oneof![
        any::<u16>().prop_map(Trouble::Cut),
        any::<u16>().prop_map(Trouble::Reset),
        Just(Trouble::Unavailable),
        Just(Trouble::NoRanges),
        Just(Trouble::Drip),
    ];
    prop::collection::vec(one, 0..4)
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

async fn read_by_all(
    bench: &Arc<Bench>,
    blob: &Content,
    readers: &[Reader],
    truth: &bytes::Bytes,
) -> Vec<(Reader, Seen)> {
    let mut reading = JoinSet::new();
    for reader in readers.iter().cloned() {
        let (bench, blob, truth) = (Arc::clone(bench), blob.clone(), truth.clone());
        reading.spawn(async move {
            let seen = reader.read(&bench, &blob, &truth).await;
            (reader, seen)
        });
    }
    let all = timeout(Duration::from_mins(1), reading.join_all());
    all.await.expect("a reader waits for ever")
}

/// What a manifest says that a layer was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Ordinary,
    InPieces,
}

impl Layer {
    async fn bench(self) -> Arc<Bench> {
        match self {
            Self::Ordinary => Bench::new().await,
            Self::InPieces => Bench::of_pieces().await,
        }
    }

    /// Whether it is fetched whole whatever is asked for.
    fn is_always_whole(self, size: u64) -> bool {
        self == Self::Ordinary && size <= plan::SMALL
    }
}

/// What the upstream may send for one blob: no byte twice, but for what its own faults cost and what lies in sockets.
fn allowance(layer: Layer, size: u64, readers: &[Reader], troubles: &[Trouble]) -> u64 {
    let parts = readers
        .iter()
        .filter(|reader| !matches!(reader.shape, Shape::Whole))
        .count() as u64;
    let slack = if layer.is_always_whole(size) {
        0
    } else {
        (parts + 1) * IN_SOCKETS
    };
    let costs = troubles.iter().map(|trouble| trouble.cost(size));
    size + costs.sum::<u64>() + slack
}

async fn any_readers_any_faults(
    (layer, size): (Layer, u64),
    readers: Vec<Reader>,
    troubles: Vec<Trouble>,
) {
    let bench = layer.bench().await;
    let blob = bench.blob(size, "any");
    let handlers = troubles.iter().map(|trouble| trouble.handler(&blob));
    bench.registry.script(
        (Kind::Blob, "GET"),
        faults::sequence(handlers.chain([faults::usual()]).collect()),
    );
    for (reader, seen) in read_by_all(&bench, &blob, &readers, &blob.data).await {
        assert!(seen.is_fair(&reader), "{reader:?}: {seen:?}");
    }
    let small = layer.is_always_whole(size);
    let all_asked = readers
        .iter()
        .any(|reader| reader.shape.waits_for_the_verdict() && reader.leaves.is_none());
    if small || all_asked {
        bench.calm(Duration::from_secs(20)).await;
        assert_eq!(bench.store.check(&blob.digest).await, Health::Sound);
        assert_eq!((bench.spooled(), bench.parked()), (0, 0));
    } else if bench.store.contains(&blob.digest) {
        assert_eq!(bench.store.check(&blob.digest).await, Health::Sound);
    }
    let (sent, allowed) = (bench.sent(), allowance(layer, size, &readers, &troubles));
    assert!(sent <= allowed, "{sent} of {size} bytes were sent");
    bench.end().await;
}

async fn any_readers_of_what_is_not_kept(size: u64, readers: Vec<Reader>, troubles: Vec<Trouble>) {
    let bench = Bench::keeping(Some(100_000), 2).await;
    let blob = bench.blob(size, "passing");
    let handlers = troubles.iter().map(|trouble| trouble.handler(&blob));
    bench.registry.script(
        (Kind::Blob, "GET"),
        faults::sequence(handlers.chain([faults::usual()]).collect()),
    );
    for (reader, seen) in read_by_all(&bench, &blob, &readers, &blob.data).await {
        assert!(seen.is_fair(&reader), "{reader:?}: {seen:?}");
    }
    bench.calm(Duration::from_secs(10)).await;
    assert!(!bench.store.contains(&blob.digest));
    assert_eq!((bench.spooled(), bench.parked()), (0, 0));
    bench.end().await;
}

async fn wrong_bytes_for_any_readers(size: u64, readers: Vec<Reader>) {
    let bench = Bench::new().await;
    let blob = bench.blob(size, "wrong");
    let wrong = blob.spoiled();
    let options = ServeOptions::new().data(wrong.clone());
    bench
        .registry
        .script((Kind::Blob, "GET"), faults::serve(&blob, options));
    for (reader, seen) in read_by_all(&bench, &blob, &readers, &wrong).await {
        let held = reader.shape.waits_for_the_verdict();
        assert!(!(held && seen.is_complete()), "{reader:?} got a bad blob");
    }
    bench.calm(Duration::from_secs(10)).await;
    assert!(!bench.store.contains(&blob.digest), "a bad blob is kept");
    assert_eq!((bench.spooled(), bench.parked()), (0, 0));
    let gets = bench.gets(&blob);
    assert!(gets <= 3, "{} readers became {gets} GETs", readers.len());
    bench.end().await;
}

proptest! {
    #![proptest_config(cases(16))]

    /// Whatever the readers and whatever breaks: who completes has the right bytes, the upstream is asked for no more than it must be,
    /// and the store ends with the blob.
    #[test]
    fn readers_of_a_small_blob_get_their_bytes_whatever_breaks(
        size in prop_oneof![1 => Just(0), 2 => 1_u64..200_000, 5 => 1_u64..3 * MIB],
        readers in prop::collection::vec(a_reader(), 1..9),
        troubles in troubles(),
    ) {
        runtime().block_on(any_readers_any_faults((Layer::Ordinary, size), readers, troubles));
    }

    /// The same of layers that were made to be read in pieces, of which only what is asked for is fetched.
    #[test]
    fn readers_of_a_layer_in_pieces_get_their_bytes_whatever_breaks(
        size in 4 * MIB..12 * MIB,
        readers in prop::collection::vec(a_reader(), 1..7),
        troubles in troubles(),
    ) {
        runtime().block_on(any_readers_any_faults((Layer::InPieces, size), readers, troubles));
    }

    /// A wrong blob is completed for nobody who waits for the verdict, kept nowhere, and asked for hardly more than once.
    #[test]
    fn wrong_bytes_complete_for_nobody(size in 1_u64..MIB, readers in prop::collection::vec(a_reader(), 1..9)) {
        runtime().block_on(wrong_bytes_for_any_readers(size, readers));
    }
}

proptest! {
    // Each case waits two seconds until its fill has ended.
    #![proptest_config(cases(5))]

    /// The same where the blob is not kept, so that each reader goes alone, over two connections in all.
    #[test]
    fn readers_of_what_is_not_kept_get_their_bytes_whatever_breaks(
        size in 100_001_u64..2 * MIB,
        readers in prop::collection::vec(a_reader(), 1..7),
        troubles in troubles(),
    ) {
        runtime().block_on(any_readers_of_what_is_not_kept(size, readers, troubles));
    }
}

proptest! {
    #![proptest_config(cases(3))]

    /// The same, where several connections may share the blob and far ranges are fetched first.
    #[test]
    fn readers_of_a_large_blob_get_their_bytes_whatever_breaks(
        size in 33 * MIB..44 * MIB,
        readers in prop::collection::vec(a_reader(), 1..5),
        troubles in troubles(),
    ) {
        runtime().block_on(any_readers_any_faults((Layer::Ordinary, size), readers, troubles));
    }
}

// The one look.

/// Numbers in an order that a seed decides.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    async fn dawdle(&mut self) {
        for _ in 0..self.below(12) {
            yield_now().await;
        }
    }
}

/// What a digest's requests have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Refusing(u64),
    Given,
}

/// Refuses so many times, then gives the blob once; a request after that, or while the blob is stored, is noted as wrong.
fn once_only(bench: &Bench, blob: &Content, refusals: u64, wrong: &Arc<Mutex<Vec<String>>>) {
    let stage = Arc::new(Mutex::new(Stage::Refusing(refusals)));
    let (store, digest, wrong) = (bench.store.clone(), blob.digest, Arc::clone(wrong));
    let handler = Handler::new(move |mut exchange| {
        let before = *stage.lock().unwrap();
        if before == Stage::Given || store.contains(&digest) {
            wrong.lock().unwrap().push(format!("{digest} came twice"));
        }
        let after = match before {
            Stage::Refusing(left @ 1..) => Stage::Refusing(left - 1),
            Stage::Refusing(0) | Stage::Given => Stage::Given,
        };
        *stage.lock().unwrap() = after;
        async move {
            match after {
                Stage::Given => exchange.pass().await,
                Stage::Refusing(_) => exchange.error(404, "BLOB_UNKNOWN", &[]).await,
            }
        }
    });
    let gets = Matcher::blobs().method("GET").of(blob.digest);
    bench.registry.script(gets, handler);
}

/// Asks again and again until it has read all of the blob, now and then leaving in between.
async fn insist(bench: Arc<Bench>, blob: Content, repo: &'static str, mut dice: Dice) {
    loop {
        dice.dawdle().await;
        let wanted = bench.wanted(("up", repo), blob.digest, Standing::Proven);
        match bench.fills.find(&wanted).await {
            Found::Stored(stored) => {
                let all = Slice {
                    start: 0,
                    end: stored.size,
                };
                assert!(stored.span(all).read().unwrap() == blob.data);
                return;
            }
            Found::Failed(_) => sleep(Duration::from_millis(dice.below(80))).await,
            Found::Lead(joined) | Found::Filling(joined) => {
                if dice.below(4) > 0 && read_out(joined, &blob).await.is_ok() {
                    return;
                }
            }
            Found::ProveFirst => panic!("asked to prove what is proven"),
        }
    }
}

/// Askers of one blob in two repositories, each with dice of its own.
fn eight_askers(
    bench: &Arc<Bench>,
    blob: &Content,
    seed: u64,
) -> Vec<impl Future<Output = ()> + use<>> {
    let asker = |n: u64| {
        let repo = if n.is_multiple_of(3) {
            "lib/twin"
        } else {
            REPO
        };
        insist(Arc::clone(bench), blob.clone(), repo, Dice(seed + n * 7919))
    };
    (0..8).map(asker).collect()
}

/// Many askers in scripted orders, on one thread: each digest is given by the upstream exactly once.
#[tokio::test]
async fn no_digest_is_fetched_twice_in_any_order() {
    let bench = Bench::new().await;
    let wrong = Arc::new(Mutex::new(Vec::new()));
    for seed in 1..=24_u64 {
        let mut asking = JoinSet::new();
        let mut blobs = Vec::new();
        for number in 0..3 {
            let blob = bench.blob(70_000 * number + seed, &format!("{seed}/{number}"));
            let refusals = (seed + number) % 3;
            once_only(&bench, &blob, refusals, &wrong);
            let askers = eight_askers(&bench, &blob, seed * 1_000_003 + number * 101);
            asking.extend(askers);
            blobs.push((blob, refusals));
        }
        let all = timeout(Duration::from_secs(30), asking.join_all()).await;
        assert!(all.is_ok(), "seed {seed}: somebody waits for ever");
        for (blob, refusals) in blobs {
            assert_eq!(bench.gets(&blob) as u64, refusals + 1, "seed {seed}");
        }
    }
    assert_eq!(*wrong.lock().unwrap(), Vec::<String>::new());
    bench.end().await;
}

/// Who may follow whom, while a fill waits for its answer.
#[tokio::test]
async fn only_another_repository_must_prove_itself() {
    let bench = Bench::new().await;
    let blob = bench.blob(50_000, "shared");
    let gate = Gate::new();
    bench.registry.script(Kind::Blob, faults::held(&gate));
    let find = async |place, standing| {
        let wanted = bench.wanted(place, blob.digest, standing);
        bench.fills.find(&wanted).await
    };
    let led = find(("up", REPO), Standing::Unproven).await;
    let Found::Lead(leader) = led else {
        panic!("{led:?}")
    };
    let same = find(("up", REPO), Standing::Unproven).await;
    assert!(matches!(same, Found::Filling(_)), "{same:?}");
    let twin = find(("up", "lib/twin"), Standing::Unproven).await;
    assert!(matches!(twin, Found::ProveFirst), "{twin:?}");
    let proven = find(("up", "lib/twin"), Standing::Proven).await;
    assert!(matches!(proven, Found::Filling(_)), "{proven:?}");
    let elsewhere = find(("other", REPO), Standing::Proven).await;
    assert!(matches!(elsewhere, Found::Lead(_)), "{elsewhere:?}");

    let key = Key {
        upstream: UpstreamId::new("up"),
        digest: blob.digest,
    };
    let source = |repo: &str| Source::new(key.upstream.clone(), repo.parse().unwrap());
    let looks = |repo, standing| bench.fills.running(&key, &source(repo), standing).is_some();
    assert!(looks(REPO, Standing::Unproven) && looks("lib/twin", Standing::Proven));
    assert!(!looks("lib/twin", Standing::Unproven));

    gate.open();
    read_out(leader, &blob).await.unwrap();
    bench.calm(Duration::from_secs(10)).await;
    // Stored now: the proven are given it, whoever is not brings a proof of its own.
    let stored = find(("up", REPO), Standing::Proven).await;
    assert!(matches!(stored, Found::Stored(_)), "{stored:?}");
    let unproven = find(("up", "lib/twin"), Standing::Unproven).await;
    assert!(matches!(unproven, Found::Lead(_)), "{unproven:?}");
    drop(unproven);
    bench.calm(Duration::from_secs(10)).await;
    assert_eq!(bench.gets(&blob), 3);
    bench.end().await;
}

/// A failure is shared for half a second, by the same repository only.
#[tokio::test]
async fn a_failure_is_shared_for_a_moment() {
    let bench = Bench::new().await;
    let blob = Content::blob(5000, "nowhere");
    let ask = async |repo| {
        let wanted = bench.wanted(("up", repo), blob.digest, Standing::Unproven);
        match bench.fills.find(&wanted).await {
            Found::Lead(joined) => {
                let opened = joined.open(Deadline::for_answer()).await;
                assert!(matches!(opened, Err(FillError::Upstream(_))), "{opened:?}");
                "asked"
            }
            Found::Failed(FillError::Upstream(_)) => "told",
            found @ (Found::Failed(_)
            | Found::Stored(_)
            | Found::Filling(_)
            | Found::ProveFirst) => {
                panic!("{found:?}")
            }
        }
    };
    assert_eq!(ask(REPO).await, "asked");
    assert_eq!(ask(REPO).await, "told");
    assert_eq!(ask("lib/twin").await, "asked");
    assert_eq!(ask("lib/twin").await, "told");
    assert_eq!(bench.gets(&blob), 2);
    pass(Duration::from_millis(600)).await;
    assert_eq!(ask("lib/twin").await, "asked");
    assert_eq!(bench.gets(&blob), 3);
    bench.end().await;
}

/// Who asks while a fill's files are moved waits, and then one of them leads.
#[tokio::test]
async fn who_asks_while_a_fill_ends_waits_for_it() {
    let bench = Bench::new().await;
    let blob = bench.blob(50_000, "ending");
    let key = Key {
        upstream: UpstreamId::new("up"),
        digest: blob.digest,
    };
    let (told, ending) = watch::channel(Progress {
        phase: Phase::Filling,
        size: None,
        spool: None,
        credential: None,
        place: 0,
    });
    let table = || bench.fills.running.lock().unwrap();
    table().insert(key.clone(), Slot::Ending(ending));
    let mut asking = JoinSet::new();
    for asker in 0..6 {
        let (bench, wanted) = (Arc::clone(&bench), bench.proven(&blob));
        asking.spawn(async move {
            Dice(asker + 1).dawdle().await;
            bench.fills.find(&wanted).await
        });
    }
    for _ in 0..100 {
        yield_now().await;
    }
    assert!(asking.try_join_next().is_none(), "somebody did not wait");
    assert_eq!(bench.gets(&blob), 0);
    table().remove(&key);
    told.send_modify(|progress| progress.phase = Phase::Failed(FillError::Parked));
    let found = timeout(Duration::from_secs(5), asking.join_all()).await;
    let found = found.expect("who waits is told");
    let led = found.iter().filter(|found| matches!(found, Found::Lead(_)));
    let followed = found
        .iter()
        .filter(|found| matches!(found, Found::Filling(_)));
    assert_eq!((led.count(), followed.count()), (1, 5));
    drop(found);
    bench.calm(Duration::from_secs(5)).await;
    assert_eq!(bench.gets(&blob), 1);
    bench.end().await;
}

/// A manifest told of an ordinary layer.
fn told(blob: &Content) -> Told {
    Told {
        size: blob.size(),
        in_pieces: false,
    }
}

/// Lets time pass at once.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// A client that takes one piece of a large blob and leaves.
async fn one_piece_read(bench: &Bench, blob: &Content) {
    let piece = RangeSpec::Closed {
        first: 24 * MIB,
        last: 28 * MIB - 1,
    };
    let wish = Wish {
        range: WishRange::Part(piece),
        client: Ipv4Addr::new(10, 0, 0, 1).into(),
    };
    let wanted = Wanted {
        wish,
        told: Some(told(blob)),
        ..bench.proven(blob)
    };
    let Found::Lead(joined) = bench.fills.find(&wanted).await else {
        panic!("somebody leads already")
    };
    let open = joined.open(Deadline::for_answer()).await.unwrap().unwrap();
    let slice = Slice {
        start: 24 * MIB,
        end: 28 * MIB,
    };
    let seen = Reader::whole()
        .read_slices(open, &[slice], (wish, Release::Arrived), &blob.data)
        .await;
    assert!(seen.is_complete(), "{seen:?}");
    assert_eq!(bench.sent(), 4 * MIB, "more than was asked for");
    let total = bench.store.usage().total();
    assert!(total <= 5 * MIB, "{total} bytes are kept free for it");
    // The list is written after the bytes are given; half a minute will be over at once.
    let list = bench.store.layout().spool_dir().join(format!(
        "sha256-{}-{:08x}.pieces",
        blob.digest.hex(),
        crc32fast::hash(b"up")
    ));
    let noted = async || {
        while std::fs::read_to_string(&list).unwrap().lines().count() < 2 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let noted = timeout(Duration::from_secs(5), noted()).await;
    assert!(noted.is_ok(), "the piece is not written down");
}

/// A fill that nobody reads is set aside after half a minute, and its pieces are what the next one begins with.
#[tokio::test]
async fn a_fill_that_was_set_aside_is_taken_up_again() {
    let bench = Bench::new().await;
    let blob = bench.blob(40 * MIB, "parked");
    one_piece_read(&bench, &blob).await;
    pass(Duration::from_secs(15)).await;
    sleep(Duration::from_millis(50)).await;
    assert_eq!(bench.parked(), 0, "set aside too early");
    pass(Duration::from_secs(16)).await;
    bench.calm(Duration::from_secs(10)).await;
    assert_eq!((bench.spooled(), bench.parked()), (0, 2));
    let usage = bench.store.usage();
    assert!(usage.parked_bytes() >= 4 * MIB);

    let whole = Reader::whole();
    let read = timeout(
        Duration::from_secs(20),
        whole.read(&bench, &blob, &blob.data),
    );
    let seen = read.await.expect("who asks for a parked blob is answered");
    assert!(seen.is_complete(), "{seen:?}");
    bench.calm(Duration::from_secs(10)).await;
    assert_eq!(bench.store.check(&blob.digest).await, Health::Sound);
    assert_eq!((bench.spooled(), bench.parked()), (0, 0));
    let sent = bench.sent();
    assert!(
        sent <= blob.size() + blob.size() / 50,
        "{sent} bytes: the piece was fetched again"
    );
    assert_eq!((usage.parked_bytes(), usage.total()), (0, blob.size()));
    bench.end().await;
}

/// Pieces were parked of a blob that is larger than what is kept today.
#[tokio::test]
async fn what_was_kept_of_a_blob_that_is_too_large_now_goes() {
    let bench = Bench::keeping(Some(100_000), 4).await;
    let blob = bench.blob(9 * MIB, "too large now");
    let layout = bench.store.layout();
    let spool = Spool::create(layout, blob.digest, &UpstreamId::new("up")).unwrap();
    spool.settle_size(blob.size()).unwrap();
    let spool = Arc::new(spool);
    let first = blob.data.slice(..usize::try_from(PIECE).unwrap());
    spool.writer(0).write(&[first]).unwrap();
    spool.park(layout).unwrap();
    let seen = Reader::whole().read(&bench, &blob, &blob.data).await;
    assert!(seen.is_complete(), "{seen:?}");
    bench.calm(Duration::from_secs(10)).await;
    assert_eq!((bench.spooled(), bench.parked()), (0, 0));
    bench.end().await;
}

/// A manifest says that a layer is larger than it is. Anyone can push one.
#[tokio::test]
async fn a_size_that_a_manifest_lies_about_harms_nobody() {
    let bench = Bench::new().await;
    for (size, name) in [(5 * MIB, "small"), (40 * MIB, "large")] {
        let blob = bench.blob(size, name);
        let wish = Wish {
            range: WishRange::Part(RangeSpec::Suffix { length: 65_536 }),
            client: Ipv4Addr::new(10, 0, 0, 1).into(),
        };
        let lie = Told {
            size: 64 * MIB,
            in_pieces: false,
        };
        let wanted = Wanted {
            wish,
            told: Some(lie),
            ..bench.proven(&blob)
        };
        let Found::Lead(joined) = bench.fills.find(&wanted).await else {
            panic!("somebody leads already")
        };
        let open = joined.open(Deadline::for_answer()).await;
        let open = open.expect("it is there").expect("in time");
        assert_eq!(open.size(), Some(size));
        let footer = Slice {
            start: size - 65_536,
            end: size,
        };
        let seen = Reader::whole()
            .read_slices(open, &[footer], (wish, Release::Arrived), &blob.data)
            .await;
        assert!(seen.is_complete(), "{seen:?}");
    }
    bench.end().await;
}

/// A client was promised the length that a manifest gives, and reads only when all of the blob is here.
#[tokio::test]
async fn nobody_is_given_as_many_bytes_as_a_lie_promised() {
    let bench = Bench::new().await;
    for told in [MIB, 2 * MIB, 3 * MIB, 4 * MIB] {
        let blob = bench.blob(3 * MIB, &format!("said to be {told}"));
        let gets = Matcher::blobs().method("GET").of(blob.digest);
        bench.registry.script(gets, faults::chunked(&blob));
        let size = Told {
            size: told,
            in_pieces: false,
        };
        let wanted = Wanted {
            told: Some(size),
            ..bench.proven(&blob)
        };
        let Found::Lead(joined) = bench.fills.find(&wanted).await else {
            panic!("somebody leads already")
        };
        let open = joined.open(Deadline::for_answer()).await;
        let open = open.expect("it is there").expect("in time");
        assert_eq!((open.size(), open.told()), (None, Some(told)));
        let mut tail = open.read_as_told();
        tail.settled().await.expect("the blob itself is right");
        let mut given = 0;
        let ended = loop {
            match tail.next().await {
                Ok(Some(Part::Span(span))) => given += span.len,
                Ok(Some(Part::Memory(bytes))) => given += bytes.len() as u64,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if told == blob.size() {
            assert_eq!((ended.is_ok(), given), (true, told));
        } else {
            assert!(ended.is_err() && given < told, "{given} of {told}");
        }
    }
    bench.end().await;
}

/// Waits until a connection is free, or none is.
async fn until_free(bench: &Bench, free: usize) {
    let places = &bench.fills.places[&UpstreamId::new("up")];
    let reached = async {
        while places.free.available_permits() != free {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let reached = timeout(Duration::from_secs(5), reached).await;
    assert!(reached.is_ok(), "not {free} connections are free");
}

/// A reader of a fill that has no connection any more waits for one no longer than those who came before it.
#[tokio::test]
async fn a_fill_without_a_connection_has_its_turn() {
    let bench = Bench::keeping(None, 1).await;
    let lazy = bench.blob(40 * MIB, "lazy");
    one_piece_read(&bench, &lazy).await;
    until_free(&bench, 1).await;
    let mut led = Vec::new();
    for name in ["first", "second", "third"] {
        let (blob, gate) = (bench.blob(5000, name), Gate::new());
        let gets = Matcher::blobs().method("GET").of(blob.digest);
        bench.registry.script(gets, faults::held(&gate));
        led.push((blob, gate));
    }
    let ask_for = async |at: usize| {
        let found = bench.fills.find(&bench.proven(&led[at].0)).await;
        sleep(Duration::from_millis(50)).await;
        found
    };
    let first = ask_for(0).await;
    until_free(&bench, 0).await;
    let second = ask_for(1).await;
    let reader = Reader {
        shape: Shape::Closed(0, 1000),
        ..Reader::whole()
    };
    let (reading, content) = (Arc::clone(&bench), lazy.clone());
    let mut reading =
        JoinSet::from_iter([async move { reader.read(&reading, &content, &content.data).await }]);
    sleep(Duration::from_millis(50)).await;
    let third = ask_for(2).await;
    led[0].1.open();
    led[1].1.open();
    let seen = timeout(Duration::from_secs(5), reading.join_next()).await;
    let seen = seen.expect("it is passed over").unwrap().unwrap();
    assert!(seen.is_complete(), "{seen:?}");
    led[2].1.open();
    drop((first, second, third));
    bench.end().await;
}

/// No byte can be written from the beginning.
#[tokio::test]
async fn a_full_disk_is_seen_by_nobody() {
    let bench = Bench::keeping(None, 2).await;
    let blob = bench.blob(3 * MIB, "full");
    let name = format!(
        "sha256-{}-{:08x}",
        blob.digest.hex(),
        crc32fast::hash(b"up")
    );
    let spool = bench.store.layout().spool_dir().join(name);
    std::os::unix::fs::symlink("/dev/full", spool).unwrap();
    let whole = Reader::whole();
    let shapes = [
        Shape::Whole,
        Shape::From(20_000),
        Shape::Closed(9000, 40_000),
        Shape::Suffix(3000),
        Shape::Multi(vec![(100, 5000), (60_000, 65_000)]),
    ];
    let readers = shapes.map(|shape| Reader {
        shape,
        ..whole.clone()
    });
    for (reader, seen) in read_by_all(&bench, &blob, &readers, &blob.data).await {
        assert!(seen.is_complete(), "{reader:?}: {seen:?}");
    }
    bench.calm(Duration::from_secs(10)).await;
    assert!(!bench.store.contains(&blob.digest));
    assert_eq!((bench.spooled(), bench.parked()), (0, 0));
    assert!(bench.metrics.store_faults.get() > 0);
    bench.end().await;
}

async fn read_late(bench: Arc<Bench>, blob: Content, mut dice: Dice) -> Seen {
    dice.dawdle().await;
    dice.dawdle().await;
    Reader::whole().read(&bench, &blob, &blob.data).await
}

/// Askers that come just as a fill is set aside either keep it or wait for its files; no byte comes twice.
#[tokio::test]
async fn who_asks_while_a_fill_is_set_aside_loses_nothing() {
    for seed in 1..=3_u64 {
        let bench = Bench::new().await;
        let blob = bench.blob(33 * MIB, "closing");
        one_piece_read(&bench, &blob).await;
        let mut asking = JoinSet::new();
        pass(Duration::from_secs(31)).await;
        for asker in 0..6 {
            let dice = Dice(seed * 131 + asker * 17 + 1);
            asking.spawn(read_late(Arc::clone(&bench), blob.clone(), dice));
        }
        let all = timeout(Duration::from_secs(20), asking.join_all()).await;
        for seen in all.expect("somebody waits for ever") {
            assert!(seen.is_complete(), "seed {seed}: {seen:?}");
        }
        bench.calm(Duration::from_secs(10)).await;
        assert_eq!(bench.store.check(&blob.digest).await, Health::Sound);
        assert_eq!((bench.spooled(), bench.parked()), (0, 0));
        let sent = bench.sent();
        assert!(
            sent <= blob.size() + blob.size() / 50,
            "seed {seed}: {sent} bytes: {:?}",
            bench.ranges()
        );
        bench.end().await;
    }
}
