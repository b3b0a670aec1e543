//! What names resolve to is judged at each connection: a name may mean another place by then, or several places at once.
//!
//! Nothing leaves this machine. The upstream is one on the internet because its name also resolves to an address there, which is never
//! tried; `127.0.0.2` stands for a place that it may lead to, `127.0.0.1` for one that it may not.

use std::io::ErrorKind;
use std::net::TcpListener;

use serde_json::json;
use testbed::{
    Bearer, CacheProcess, Content, Kind, Matcher, Origin, Proxy, Registry, Response, TokenServer,
    Upstream, assert_good, can_name_hosts, faults,
};
use tokio::time::sleep;

use crate::stage::{AFTER_A_FAILURE, REPO, assert_refused, cache};

/// On the internet as the product sees it; nobody has routed it since RFC 7526.
const OUTSIDE: &str = "192.88.99.1";
const OUTSIDE_TOO: &str = "192.88.99.2";

/// Stands where nobody may come, and is asked at the end whether anybody did.
struct Trap(TcpListener);

impl Trap {
    /// At this port of 127.0.0.1, if it is free.
    fn at(port: u16) -> Option<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port)).ok()?;
        listener.set_nonblocking(true).expect("a listener");
        Some(Self(listener))
    }

    fn assert_untouched(&self) {
        let came = self.0.accept().map(|(_, peer)| peer);
        assert!(
            came.as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
            "{came:?} came"
        );
    }
}

/// A content host on 127.0.0.2, and a trap at the same port of 127.0.0.1.
async fn origin_and_trap() -> (Origin, Trap) {
    loop {
        let origin = Origin::start_on("127.0.0.2").await;
        if let Some(trap) = Trap::at(origin.port()) {
            return (origin, trap);
        }
    }
}

fn unable() -> bool {
    let unable = !can_name_hosts();
    if unable {
        eprintln!("skipped: this machine does not let a test say what names resolve to");
    }
    unable
}

/// A registry on the internet that may lead to 127.0.0.2, where `inner.test` is too for now.
async fn scene() -> (Registry, CacheProcess) {
    let registry = Registry::start().await;
    let upstream = Upstream::new("up", format!("http://registry.test:{}", registry.port()))
        .line("redirect_hosts = [\"127.0.0.2\"]");
    let cache = cache()
        .upstream(upstream)
        .name("registry.test", &["127.0.0.1", OUTSIDE])
        .name("inner.test", &["127.0.0.2"])
        .start()
        .await;
    (registry, cache)
}

/// Offers a blob by way of `inner.test`.
fn offer(registry: &Registry, origin: &Origin, seed: &str) -> Content {
    let blob = Content::blob(1000, seed);
    origin.hold(&blob);
    let location = format!(
        "http://inner.test:{}/cdn/{}?sig=1",
        origin.port(),
        blob.digest
    );
    let blobs = Matcher::blobs().of(blob.digest);
    registry.script(blobs, faults::redirect(&location, 307));
    blob
}

/// Refused in words that name the host, and the key that would allow it, but not what the name resolved to; the log tells that.
fn assert_turned_away(cache: &CacheProcess, answer: &Response, address: &str) {
    assert_refused(answer, &[502]);
    let text = answer.text();
    assert!(
        text.contains("inner.test") && text.contains("redirect_hosts"),
        "{text}"
    );
    assert!(!text.contains(address), "{text}");
    let log = cache.log();
    assert!(
        log.lines()
            .any(|line| line.contains(address) && line.contains("inner.test"))
    );
}

/// DNS rebinding: what was allowed once says nothing about the next connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_turns_inward_is_not_followed_again() {
    if unable() {
        return;
    }
    let (origin, trap) = origin_and_trap().await;
    let (registry, cache) = scene().await;
    let [first, second, third] = ["1", "2", "3"].map(|seed| offer(&registry, &origin, seed));
    assert_good(&cache.blob("up", REPO, first.digest).await, &first);
    cache.rename("inner.test", &["127.0.0.1"]);
    // A connection that is open leads where it led.
    origin.stop().await;
    origin.resume().await;
    let refused = cache.blob("up", REPO, second.digest).await;
    assert_turned_away(&cache, &refused, "127.0.0.1");
    let head = cache.head_blob("up", REPO, third.digest).await;
    assert_eq!((head.status, head.length), (502, 0), "{head}");
    trap.assert_untouched();
    cache.rename("inner.test", &["127.0.0.2"]);
    sleep(AFTER_A_FAILURE).await;
    assert_good(&cache.blob("up", REPO, second.digest).await, &second);
    trap.assert_untouched();
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_service_whose_name_turns_inward_is_not_asked_again() {
    if unable() {
        return;
    }
    let tokens = TokenServer::start_on("127.0.0.2").await;
    let Some(trap) = Trap::at(tokens.port()) else {
        return eprintln!("skipped: the port is in use");
    };
    let (registry, cache) = scene().await;
    tokens.set_expires_in(Some(json!(0)));
    let realm = format!("http://inner.test:{}/token", tokens.port());
    registry.require(Bearer::of(&tokens).realm(&realm));
    let [first, second] = ["1", "2"].map(|seed| Content::blob(1000, seed));
    for blob in [&first, &second] {
        registry.put_blob(REPO, blob);
    }
    assert_good(&cache.blob("up", REPO, first.digest).await, &first);
    cache.rename("inner.test", &["127.0.0.1"]);
    tokens.stop().await;
    tokens.resume().await;
    let refused = cache.blob("up", REPO, second.digest).await;
    assert_turned_away(&cache, &refused, "127.0.0.1");
    assert_eq!(tokens.asked(), 1);
    trap.assert_untouched();
    cache.check_invariants().await;
}

/// Of the addresses of a name only those that are allowed are tried, whichever come first.
#[tokio::test(flavor = "multi_thread")]
async fn of_several_addresses_only_those_allowed_are_tried() {
    if unable() {
        return;
    }
    let (origin, trap) = origin_and_trap().await;
    let (registry, cache) = scene().await;
    for (n, addresses) in [
        ["127.0.0.1", "127.0.0.2"],
        ["127.0.0.2", "127.0.0.1"],
        ["::1", "127.0.0.2"],
    ]
    .iter()
    .enumerate()
    {
        cache.rename("inner.test", addresses);
        let blob = offer(&registry, &origin, &n.to_string());
        assert_good(&cache.blob("up", REPO, blob.digest).await, &blob);
        origin.stop().await;
        origin.resume().await;
    }
    // The one that is allowed is not there: the other is no way out.
    origin.stop().await;
    let blob = offer(&registry, &origin, "nobody is there");
    assert_refused(&cache.blob("up", REPO, blob.digest).await, &[503]);
    cache.rename("inner.test", &["127.0.0.1", "::1", "10.1.2.3"]);
    sleep(AFTER_A_FAILURE).await;
    let refused = cache.blob("up", REPO, blob.digest).await;
    assert_turned_away(&cache, &refused, "127.0.0.1");
    trap.assert_untouched();
    cache.check_invariants().await;
}

/// Names, what they resolve to, and whether a proxy that is given addresses, and one that resolves names itself, is asked for them.
const PLACES: [(&str, &[&str], bool, bool); 6] = [
    ("outside.test", &[OUTSIDE_TOO], true, true),
    ("both.test", &[OUTSIDE_TOO, "10.1.2.3"], true, false),
    ("loopback.test", &["127.0.0.1"], false, false),
    ("private.test", &["10.1.2.3"], false, false),
    ("private6.test", &["fd12::1"], false, false),
    ("metadata.test", &["169.254.169.254"], false, false),
];

/// A proxy that is given addresses is given those that are allowed; one that resolves names itself is not asked for a name of which any
/// address is inward.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_asked_for_no_name_that_resolves_inward() {
    if unable() {
        return;
    }
    for scheme in ["socks5", "socks5h", "http"] {
        let (registry, origin) = (Registry::start().await, Origin::start().await);
        let proxy = Proxy::start().await;
        let upstream = Upstream::new("up", format!("http://registry.test:{}", registry.port()));
        let line = format!("proxy = \"{scheme}://127.0.0.1:{}\"", proxy.port());
        let mut builder = cache()
            .upstream(upstream.line(&line))
            .name("registry.test", &[OUTSIDE]);
        for (name, addresses, ..) in PLACES {
            builder = builder.name(name, addresses);
        }
        let cache = builder.start().await;
        for (name, _, by_address, by_name) in PLACES {
            let blob = Content::blob(1000, name);
            origin.hold(&blob);
            let location = format!("http://{name}:{}/cdn/{}", origin.port(), blob.digest);
            let blobs = Matcher::blobs().of(blob.digest);
            registry.script(blobs, faults::redirect(&location, 307));
            let answer = cache.blob("up", REPO, blob.digest).await;
            let asked = [by_name, by_address][usize::from(scheme == "socks5")];
            assert_eq!(
                answer.status,
                [502, 200][usize::from(asked)],
                "{scheme} {name}"
            );
            assert!(asked || answer.text().contains(name), "{}", answer.text());
        }
        let inward = [
            "10.1.2.3",
            "127.0.0.1",
            "fd12::1",
            "169.254",
            "both",
            "private",
        ];
        for place in proxy.asked() {
            let led = inward.iter().any(|inward| place.contains(inward));
            assert!(!led, "{scheme}: {place}");
        }
        assert_eq!(registry.count(Kind::Blob), PLACES.len(), "{scheme}");
        cache.check_invariants().await;
    }
}

/// An upstream whose class changes leads where its new class may, also over a connection that was opened under the old one.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "waits until an upstream's name is looked up again, half a minute"]
async fn an_open_connection_is_no_way_around_a_stricter_class() {
    if unable() {
        return;
    }
    let (registry, origin) = (Registry::start().await, Origin::start().await);
    let url = format!("http://registry.test:{}", registry.port());
    let cache = cache()
        .upstream(Upstream::new("up", url))
        .name("registry.test", &["127.0.0.1"])
        .name("inner.test", &["127.0.0.1"])
        .start()
        .await;
    let usual = offer(&registry, &origin, "0");
    assert_good(&cache.blob("up", REPO, usual.digest).await, &usual);
    cache.rename("registry.test", &["127.0.0.1", OUTSIDE]);
    let mut refused = 0;
    for n in 1..=7 {
        // Oftener than an idle connection is closed.
        sleep(std::time::Duration::from_secs(5)).await;
        let blob = offer(&registry, &origin, &n.to_string());
        let answer = cache.blob("up", REPO, blob.digest).await;
        refused += usize::from(answer.status == 502);
        assert!(matches!(answer.status, 200 | 502), "{answer}");
    }
    assert!((1..=2).contains(&refused), "{refused} refused");
    assert_eq!(origin.connections(), 1, "the connection was kept");
    cache.check_invariants().await;
}
