//! A large blob over several connections, where the upstream wants no more than one: it comes as it would come by itself.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oci::{RangeHeader, Resolved, Slice};
use testbed::cache::blob_path;
use testbed::{
    CacheProcess, Content, Exchange, Handler, Kind, Matcher, Registry, Request, Response,
    ServeOptions, Upstream, eventually, faults,
};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::stage::{AFTER_A_FAILURE, REPO, cache};

const MIB: u64 = 1 << 20;

/// A blob that several connections may share.
const SIZE: usize = 40 << 20;

/// What one connection brings in a second: little enough that another one is tried.
const RATE: u64 = 8 * MIB;

/// How long a client waits for all of it: an upstream that says "in a second" to each try is asked for a while.
const PATIENCE: Duration = Duration::from_secs(90);

/// What may be on its way when a connection is closed.
const IN_A_SOCKET: u64 = 8 * MIB;

/// What becomes of a question for a range.
#[derive(Clone, Copy, Debug)]
enum Ranges {
    /// All of the blob comes.
    Ignored,
    Refused(u16),
    /// Each answer, and the plain one too, has another validator.
    OtherEachTime,
}

const UNFIT: [Ranges; 8] = [
    Ranges::Ignored,
    Ranges::OtherEachTime,
    Ranges::Refused(403),
    Ranges::Refused(404),
    Ranges::Refused(416),
    Ranges::Refused(429),
    Ranges::Refused(500),
    Ranges::Refused(503),
];

/// The blob for a plain GET, slowly; for a range what is told.
fn unfit(blob: &Content, ranges: Ranges) -> Handler {
    let answers = Arc::new(AtomicUsize::new(0));
    let blob = blob.clone();
    Handler::new(move |exchange: Exchange| {
        let asked = exchange.header("range").is_some();
        let options = ServeOptions::new().rate(RATE);
        let handler = match ranges {
            Ranges::OtherEachTime => {
                let etag = format!("\"{}\"", answers.fetch_add(1, Ordering::Relaxed));
                faults::serve(&blob, options.header("ETag", &etag))
            }
            Ranges::Refused(status) if asked => {
                faults::error(status, "DENIED", &[("Retry-After", "60")])
            }
            Ranges::Ignored | Ranges::Refused(_) => faults::serve(&blob, options.without_ranges()),
        };
        async move { handler.call(exchange).await }
    })
}

/// A cache, and for each of `kinds` a registry with a blob of 40 MiB. Their keys are `up0`, `up1` and so on.
async fn stage(kinds: &[Ranges]) -> (CacheProcess, Vec<(Registry, Content)>) {
    let mut cache = cache();
    let mut registries = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        let registry = Registry::start().await;
        let blob = Content::blob(SIZE, &format!("{kind:?}"));
        registry.put_blob(REPO, &blob);
        registry.script((Kind::Blob, "GET"), unfit(&blob, *kind));
        cache = cache.upstream(Upstream::new(&format!("up{index}"), registry.url()));
        registries.push((registry, blob));
    }
    (cache.start().await, registries)
}

fn whole(index: usize, blob: &Content) -> Request {
    Request::get(&blob_path(&format!("up{index}"), REPO, blob.digest))
        .compare(&blob.data)
        .timeout(PATIENCE)
}

fn assert_right(response: &Response, about: &dyn std::fmt::Debug) {
    let right = matches!(response.status, 200 | 206) && response.complete;
    let bytes = response.right == Some(true);
    assert!(right && bytes, "{about:?}: {response}");
}

/// The first connection goes on until another one has been answered with its range, and to its end where none is.
#[tokio::test(flavor = "multi_thread")]
async fn who_gives_no_ranges_gives_the_blob_once() {
    let (cache, registries) = stage(&UNFIT).await;
    let mut pulls = JoinSet::new();
    for (index, (_, blob)) in registries.iter().enumerate() {
        let (request, port) = (whole(index, blob), cache.port());
        pulls.spawn(async move { (index, request.send(port).await) });
    }
    for (index, response) in pulls.join_all().await {
        let (registry, blob) = &registries[index];
        let kind = UNFIT[index];
        assert_right(&response, &kind);
        let asked = registry.count((Kind::Blob, "GET"));
        assert!((2..=6).contains(&asked), "{kind:?}: asked {asked} times");
        let sent = registry.sent(Kind::Blob);
        let most = blob.size() + blob.size() / 50 + IN_A_SOCKET;
        assert!(sent <= most, "{kind:?}: {sent} bytes");
    }
    cache.check_invariants().await;
}

/// The fifth answer breaks off after 1 MiB, and the first question for its rest is refused.
fn with_a_hole(blob: &Content, status: u16) -> Handler {
    let (blob, next) = (blob.clone(), AtomicUsize::new(0));
    let hole = Mutex::new(None);
    Handler::new(move |exchange: Exchange| {
        let slow = ServeOptions::new().rate(RATE / 2);
        let range = exchange.header("range").and_then(RangeHeader::parse);
        let asked = match range.map(|range| range.resolve(blob.size())) {
            Some(Resolved::Single(asked)) => asked,
            _ => Slice { start: 0, end: 0 },
        };
        let mut hole = hole.lock().unwrap_or_else(PoisonError::into_inner);
        let in_hole = |hole: &mut Slice| asked.end == hole.end && asked.start > hole.start;
        if next.fetch_add(1, Ordering::SeqCst) == 4 {
            *hole = Some(asked);
            return faults::serve(&blob, slow.reset_at(asked.start + MIB)).call(exchange);
        }
        match hole.take_if(in_hole) {
            Some(_refused_once) => faults::error(status, "UNKNOWN", &[]).call(exchange),
            None => faults::serve(&blob, slow).call(exchange),
        }
    })
}

/// One connection of several breaks off, and the first question for its rest is refused: a hole, and no more than that.
#[tokio::test(flavor = "multi_thread")]
async fn a_hole_that_is_refused_once_costs_one_request() {
    for status in [404, 416] {
        let registry = Registry::start().await;
        let cache = cache().upstream(Upstream::new("up0", registry.url()));
        let cache = cache.start().await;
        let blob = Content::blob(2 * SIZE, "with a hole");
        registry.put_blob(REPO, &blob);
        registry.script((Kind::Blob, "GET"), with_a_hole(&blob, status));
        let response = whole(0, &blob).send(cache.port()).await;
        assert_right(&response, &status);
        let gets = registry.entries((Kind::Blob, "GET"));
        let refused = gets.iter().filter(|entry| entry.status == status).count();
        assert_eq!(refused, 1, "nothing was refused");
        assert!(gets.len() <= 30, "{status}: asked {} times", gets.len());
        let sent = registry.sent(Kind::Blob);
        let most = blob.size() + blob.size() / 50 + IN_A_SOCKET;
        assert!(sent <= most, "{status}: {sent} bytes");
        cache.check_invariants().await;
    }
}

/// A range far ahead is fetched next; where the upstream refuses it, it comes with the rest, and nobody is cut off.
#[tokio::test(flavor = "multi_thread")]
async fn a_far_range_that_is_refused_comes_with_the_rest() {
    let refused = [
        Ranges::Refused(401),
        Ranges::Refused(403),
        Ranges::Refused(404),
    ];
    let (cache, registries) = stage(&refused).await;
    let mut pulls = JoinSet::new();
    for (index, (_, blob)) in registries.iter().enumerate() {
        let (request, port) = (whole(index, blob), cache.port());
        let last = blob.size() - 1;
        let far = Request::get(&blob_path(&format!("up{index}"), REPO, blob.digest))
            .range(&format!("{}-{last}", last - 999))
            .compare_from(&blob.data, last - 999);
        pulls.spawn(async move { (index, request.send(port).await) });
        pulls.spawn(async move {
            sleep(Duration::from_secs(1)).await;
            (index, far.send(port).await)
        });
    }
    for (index, response) in pulls.join_all().await {
        assert_right(&response, &refused[index]);
    }
    for (kind, (registry, _)) in refused.iter().zip(&registries) {
        let asked = registry.count((Kind::Blob, "GET"));
        assert!(asked <= 6, "{kind:?}: asked {asked} times");
    }
    cache.check_invariants().await;
}

/// What becomes of questions for a range after the first one.
#[derive(Clone, Copy, Debug)]
enum Later {
    Refused(u16),
    /// They are answered with another validator, and so is the plain one.
    OtherValidator,
    /// Half of the range comes, and half of the rest, and so on.
    Halved,
}

const LATER: [Later; 7] = [
    Later::Refused(403),
    Later::Refused(404),
    Later::Refused(416),
    Later::Refused(429),
    Later::Refused(503),
    Later::OtherValidator,
    Later::Halved,
];

/// The range that is asked for, of a blob of `size` bytes; nothing for a plain question.
fn asked_range(exchange: &Exchange, size: u64) -> Option<Slice> {
    let header = RangeHeader::parse(exchange.header("range")?)?;
    match header.resolve(size) {
        Resolved::Single(slice) => Some(slice),
        Resolved::Multiple(_) | Resolved::Unsatisfiable => None,
    }
}

/// The first half of a range, as if it were all of it.
fn first_half(blob: &Content, asked: Slice) -> Handler {
    let range = format!("bytes {}-{}/{}", asked.start, asked.end - 1, blob.size());
    let half = asked.start..asked.start + asked.len() / 2;
    let offset = |at| usize::try_from(at).unwrap_or(usize::MAX);
    let body = blob.data.slice(offset(half.start)..offset(half.end));
    faults::status(206, &[("Content-Range", &range)], body)
}

/// One range is given, slowly; then what is told.
fn for_a_while(blob: &Content, later: Later) -> Handler {
    let (blob, given) = (blob.clone(), AtomicUsize::new(0));
    Handler::new(move |exchange: Exchange| {
        let asked = asked_range(&exchange, blob.size());
        let over = match asked {
            Some(_) => given.fetch_add(1, Ordering::SeqCst) >= 1,
            None => given.load(Ordering::SeqCst) > 1,
        };
        let etag = if over { "\"after\"" } else { "\"before\"" };
        let slow = ServeOptions::new().rate(RATE).header("ETag", etag);
        let handler = match (later, asked) {
            (Later::Refused(status), Some(_)) if over => {
                faults::error(status, "DENIED", &[("Retry-After", "1")])
            }
            (Later::Halved, Some(asked)) if over => first_half(&blob, asked),
            _ => faults::serve(&blob, slow),
        };
        async move { handler.call(exchange).await }
    })
}

/// The first connection has given its rest away to others, which bring it no more: it comes from the beginning.
#[tokio::test(flavor = "multi_thread")]
async fn who_gives_no_more_ranges_gives_everything_once_more() {
    let mut cache = cache();
    let mut registries = Vec::new();
    for (index, later) in LATER.iter().enumerate() {
        let registry = Registry::start().await;
        let blob = Content::blob(SIZE, &format!("{later:?}"));
        registry.put_blob(REPO, &blob);
        registry.script((Kind::Blob, "GET"), for_a_while(&blob, *later));
        cache = cache.upstream(Upstream::new(&format!("up{index}"), registry.url()));
        registries.push((registry, blob));
    }
    let cache = cache.start().await;
    let mut pulls = JoinSet::new();
    for (index, (_, blob)) in registries.iter().enumerate() {
        let (request, port) = (whole(index, blob), cache.port());
        pulls.spawn(async move { (index, request.send(port).await) });
    }
    for (index, response) in pulls.join_all().await {
        let (later, (registry, blob)) = (LATER[index], &registries[index]);
        assert_right(&response, &later);
        let asked = registry.count((Kind::Blob, "GET"));
        assert!((4..=60).contains(&asked), "{later:?}: asked {asked} times");
        let sent = registry.sent(Kind::Blob);
        let most = 2 * blob.size() + IN_A_SOCKET;
        assert!(sent <= most, "{later:?}: {sent} bytes");
    }
    cache.check_invariants().await;
}

/// What an upstream sees that takes so many connections at a time.
#[derive(Debug, Default)]
struct Crowd {
    open: AtomicUsize,
    refused: AtomicUsize,
    /// The most that were open at once after one was refused.
    most_after: AtomicUsize,
}

impl Crowd {
    fn note(&self, open: usize) {
        if self.refused.load(Ordering::SeqCst) > 0 {
            self.most_after.fetch_max(open, Ordering::SeqCst);
        }
    }
}

/// What becomes of a connection too many.
#[derive(Clone, Copy, Debug)]
enum TooMany {
    Refused(u16),
    /// It is left without an answer.
    Hangs,
}

impl TooMany {
    fn handler(self) -> Handler {
        match self {
            Self::Refused(status) => {
                faults::error(status, "TOOMANYREQUESTS", &[("Retry-After", "60")])
            }
            Self::Hangs => faults::silent(),
        }
    }
}

/// The blob, slowly, for as many as `limit` at a time.
fn limited(blob: &Content, (limit, too_many): (usize, TooMany), crowd: &Arc<Crowd>) -> Handler {
    let (blob, crowd) = (blob.clone(), Arc::clone(crowd));
    Handler::new(move |exchange: Exchange| {
        let (blob, crowd) = (blob.clone(), Arc::clone(&crowd));
        async move {
            let open = crowd.open.fetch_add(1, Ordering::SeqCst) + 1;
            let handler = if open > limit {
                crowd.refused.fetch_add(1, Ordering::SeqCst);
                too_many.handler()
            } else {
                crowd.note(open);
                faults::serve(&blob, ServeOptions::new().rate(RATE / 2))
            };
            handler.call(exchange).await;
            crowd.open.fetch_sub(1, Ordering::SeqCst);
        }
    })
}

/// An upstream that takes so many connections at a time and no others, and a cache that pulls a large blob from it.
async fn pull_in_a_crowd(limit: usize, too_many: TooMany, seed: usize) -> Arc<Crowd> {
    let registry = Registry::start().await;
    let cache = cache().upstream(Upstream::new("up0", registry.url()));
    let cache = cache.start().await;
    let blob = Content::blob(SIZE, &format!("crowded {seed}"));
    let other = Content::blob(1000, "meanwhile");
    registry.put_blob(REPO, &blob);
    registry.put_blob(REPO, &other);
    let crowd = Arc::new(Crowd::default());
    let large = Matcher::blobs().of(blob.digest);
    registry.script(large, limited(&blob, (limit, too_many), &crowd));
    let (request, port) = (whole(0, &blob), cache.port());
    let mut pull = JoinSet::new();
    pull.spawn(async move { request.send(port).await });
    let refused = || crowd.refused.load(Ordering::SeqCst) > 0;
    eventually(Duration::from_secs(10), refused).await;
    assert_right(&whole(0, &other).send(cache.port()).await, &"meanwhile");
    for response in pull.join_all().await {
        assert_right(&response, &too_many);
    }
    cache.check_invariants().await;
    crowd
}

/// The same until one is refused: a machine that has no time for a third connection tries none.
async fn crowded(limit: usize, too_many: TooMany) -> Arc<Crowd> {
    for seed in 0..4 {
        let crowd = pull_in_a_crowd(limit, too_many, seed).await;
        if crowd.refused.load(Ordering::SeqCst) > 0 {
            return crowd;
        }
    }
    Arc::default()
}

/// As many connections go on as were taken; the upstream is not asked for more again and again, and what else is asked there meanwhile is
/// not kept waiting.
#[tokio::test(flavor = "multi_thread")]
async fn who_takes_so_many_connections_gets_so_many() {
    for too_many in [TooMany::Refused(429), TooMany::Refused(503), TooMany::Hangs] {
        let crowd = crowded(2, too_many).await;
        let refused = crowd.refused.load(Ordering::SeqCst);
        assert!(
            (1..=8).contains(&refused),
            "{too_many:?}: {refused} refusals"
        );
        let most = crowd.most_after.load(Ordering::SeqCst);
        assert_eq!(most, 2, "{too_many:?}: connections after a refusal");
    }
}

/// The blob, slowly; the first question for a range finds a closed connection.
fn closing_once(blob: &Content) -> Handler {
    let (blob, dropped) = (blob.clone(), AtomicUsize::new(0));
    Handler::new(move |exchange: Exchange| {
        // Once more at once, as it is asked again for a connection that was kept too long.
        let closes = asked_range(&exchange, blob.size()).is_some()
            && dropped.fetch_add(1, Ordering::SeqCst) < 2;
        let handler = if closes {
            faults::drop_connection()
        } else {
            faults::serve(&blob, ServeOptions::new().rate(RATE / 2))
        };
        async move { handler.call(exchange).await }
    })
}

/// That a connection was closed says nothing about ranges: others are tried after a while.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_connection_keeps_no_others_away() {
    let mut served = 0;
    for seed in 0..4 {
        if served > 1 {
            break;
        }
        let registry = Registry::start().await;
        let cache = cache().upstream(Upstream::new("up0", registry.url()));
        let cache = cache.start().await;
        let blob = Content::blob(2 * SIZE, &format!("closed {seed}"));
        registry.put_blob(REPO, &blob);
        registry.script((Kind::Blob, "GET"), closing_once(&blob));
        assert_right(&whole(0, &blob).send(cache.port()).await, &"closed once");
        let gets = registry.entries((Kind::Blob, "GET"));
        served = gets.iter().filter(|entry| entry.status == 206).count();
        cache.check_invariants().await;
    }
    assert!(served > 1, "it went on alone");
}

/// After wrong bytes the blob is asked for in the plainest way, on one connection: ranges may have been what was wrong.
#[tokio::test(flavor = "multi_thread")]
async fn after_wrong_bytes_one_plain_question_is_asked() {
    let registry = Registry::start().await;
    let cache = cache().upstream(Upstream::new("up0", registry.url()));
    let cache = cache.start().await;
    let blob = Content::blob(SIZE, "wrong at first");
    registry.put_blob(REPO, &blob);
    registry.script(
        Matcher::blobs().once(),
        faults::serve(&blob, ServeOptions::new().data(blob.spoiled())),
    );
    let wrong = whole(0, &blob).send(cache.port()).await;
    assert!(wrong.is_refused(), "{wrong}");
    registry.clear_log();
    registry.script(
        (Kind::Blob, "GET"),
        faults::serve(&blob, ServeOptions::new().rate(RATE)),
    );
    sleep(AFTER_A_FAILURE).await;
    assert_right(&whole(0, &blob).send(cache.port()).await, &"right now");
    assert_eq!(registry.count((Kind::Blob, "GET")), 1);
    cache.check_invariants().await;
}

/// A blob of which a plain question brings no more than half, and of which ranges are given from the second question on.
fn half_or_range(blob: &Content, first: Handler) -> Handler {
    let (blob, asked) = (blob.clone(), AtomicUsize::new(0));
    let answers = AtomicUsize::new(0);
    Handler::new(move |exchange: Exchange| {
        let etag = format!("\"{}\"", answers.fetch_add(1, Ordering::SeqCst) % 2);
        let options = ServeOptions::new().header("ETag", &etag);
        let handler = match asked_range(&exchange, blob.size()) {
            None => faults::serve(&blob, options.stop_at(blob.size() / 2)),
            Some(_) if asked.fetch_add(1, Ordering::SeqCst) == 0 => first.clone(),
            Some(_) => faults::serve(&blob, options),
        };
        async move { handler.call(exchange).await }
    })
}

/// A range that is refused once, or whose answer comes from a node with a validator of its own, is asked for again when all else fails.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_refused_once_is_asked_for_again() {
    let registry = Registry::start().await;
    let cache = cache().upstream(Upstream::new("up0", registry.url()));
    let cache = cache.start().await;
    for first in [404, 416, 200] {
        let blob = Content::blob(1 << 20, &format!("refused once by {first}"));
        registry.put_blob(REPO, &blob);
        let refusal = if first == 200 {
            faults::serve(&blob, ServeOptions::new().header("ETag", "\"another\""))
        } else {
            faults::error(first, "UNKNOWN", &[])
        };
        let gets = Matcher::blobs().of(blob.digest);
        registry.script(gets, half_or_range(&blob, refusal));
        registry.clear_log();
        assert_right(&whole(0, &blob).send(cache.port()).await, &first);
        let asked = registry.count((Kind::Blob, "GET"));
        assert!((4..=6).contains(&asked), "{first}: asked {asked} times");
    }
    cache.check_invariants().await;
}
