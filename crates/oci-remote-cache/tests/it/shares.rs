//! One client address takes no more than its share, where there is one.

use std::time::Duration;

use testbed::{CacheBuilder, CacheProcess, Connection, ImageSpec, Registry, Upstream, eventually};

use crate::stage::{REPO, assert_refused, cache};

const PING: &[u8] = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n";

async fn with(say: impl FnOnce(CacheBuilder) -> CacheBuilder) -> (Registry, CacheProcess) {
    let registry = Registry::start().await;
    let cache = say(cache().upstream(Upstream::new("up", registry.url())));
    (registry, cache.start().await)
}

/// A connection that has been answered once and stays open. The connection that found the cache to be up may still count for a moment.
async fn taken(cache: &CacheProcess) -> Connection {
    for _ in 0..50 {
        let mut connection = Connection::open(cache.port()).await;
        connection.send(PING).await;
        if connection.response("GET").await.status == 200 {
            return connection;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("no place is free");
}

async fn metric(cache: &CacheProcess, line: &str) -> bool {
    testbed::client::get(cache.admin_port(), "/metrics", &[])
        .await
        .text()
        .contains(line)
}

async fn refused_connections(cache: &CacheProcess) -> u64 {
    let page = testbed::client::get(cache.admin_port(), "/metrics", &[]).await;
    let text = page.text();
    let line = text
        .lines()
        .find_map(|line| line.split_once("limited_total{why=\"connections\"} "));
    line.map_or(0, |(_, count)| count.trim().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_so_many_connections_and_gets_them_back() {
    let (_registry, cache) = with(|cache| cache.line("clients.max_connections = 2")).await;
    let (first, second) = (taken(&cache).await, taken(&cache).await);
    let before = refused_connections(&cache).await;
    // Told so without having asked: a request under way could lose the answer to a reset.
    let mut third = Connection::open(cache.port()).await;
    let refused = third.response("GET").await;
    assert_refused(&refused, &[429]);
    assert_eq!(refused.error_code(), "TOOMANYREQUESTS");
    let (_, closed) = third.until_closed(Duration::from_secs(5)).await;
    assert!(closed, "the connection is kept");
    assert_eq!(refused_connections(&cache).await, before + 1);
    drop((first, second));
    let mut answered = 0;
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut connection = Connection::open(cache.port()).await;
        connection.send(PING).await;
        answered = connection.response("GET").await.status;
        if answered == 200 {
            break;
        }
    }
    assert_eq!(answered, 200);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_may_be_without_limits() {
    let (registry, cache) = with(|cache| {
        cache
            .line("clients.max_connections = 1")
            .line("clients.max_requests = 1")
            .line("clients.burst = 1")
            .line("clients.unlimited = [\"127.0.0.0/8\"]")
    })
    .await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let _held = (taken(&cache).await, taken(&cache).await);
    cache.pull("up", &image).await;
    cache.check_invariants().await;
}

/// What a client claims to be is not believed: it gets no second share for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_claimed_address_is_no_address() {
    let (registry, cache) = with(|cache| {
        cache
            .line("clients.max_requests = 1")
            .line("clients.burst = 2")
    })
    .await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    let mut refused = 0;
    for n in 0..8 {
        let claimed = format!("192.0.2.{n}");
        let request = testbed::Request::get("/v2/")
            .header("X-Forwarded-For", &claimed)
            .header("Forwarded", &format!("for={claimed}"))
            .header("X-Real-IP", &claimed)
            .header("User-Agent", &format!("other/{n}"));
        refused += u32::from(cache.send(request).await.status == 429);
    }
    assert!(refused >= 5, "{refused}");
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_asks_so_often_and_is_told_when_to_come_back() {
    let (registry, cache) = with(|cache| {
        cache
            .line("clients.max_requests = 1")
            .line("clients.burst = 4")
    })
    .await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let mut last = cache.manifest("up", REPO, "v1").await;
    for _ in 0..8 {
        last = cache.manifest("up", REPO, "v1").await;
    }
    assert_refused(&last, &[429]);
    assert_eq!(last.error_code(), "TOOMANYREQUESTS");
    let wait: u64 = last.header("retry-after").unwrap().parse().unwrap();
    assert_eq!(wait, 1);
    assert_eq!(cache.get("/healthz").await.status, 200);
    assert!(metric(&cache, "limited_total{why=\"requests\"}").await);
    tokio::time::sleep(Duration::from_millis(1300)).await;
    let again = cache.manifest("up", REPO, "v1").await;
    testbed::assert_good(&again, &image.manifest);
    let log = cache.log();
    assert!(log.contains("429"), "{log}");
    assert!(
        eventually(Duration::from_secs(1), || registry
            .count(testbed::Kind::Manifest)
            == 1)
        .await
    );
}
