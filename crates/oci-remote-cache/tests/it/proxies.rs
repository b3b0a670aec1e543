//! Upstreams behind a proxy: everything goes through it, nobody sees its password, and it is no way around the guard.

use std::path::Path;

use testbed::{
    CacheProcess, Image, ImageSpec, Kind, Origin, Proxy, Registry, TlsFront, Upstream, assert_good,
    faults,
};

use crate::stage::{REPO, assert_refused, cache, said};

const PASSWORD: &str = "pr@xy-secret:1%";
const LOGIN: &str = "operator:pr%40xy-secret:1%25";

/// The registry under a name that only the proxy knows.
const NAME: &str = "registry.test.invalid";

async fn behind(proxy: &Proxy, scheme: &str, login: &str) -> (Registry, CacheProcess, Image) {
    let registry = Registry::start().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[3_000_000]));
    let url = format!("http://{NAME}:{}", registry.port());
    let cache = cache()
        .line(&format!(
            "proxy = \"{scheme}://{login}127.0.0.1:{}\"",
            proxy.port()
        ))
        .upstream(Upstream::new("up", url).tag_ttl("0s"))
        .trace()
        .secret("pr@xy-secret")
        .secret("pr%40xy-secret")
        .start()
        .await;
    (registry, cache, image)
}

fn all_of(proxy: &Proxy, how: &str, place: &str) {
    let asked = proxy.asked();
    assert!(!asked.is_empty());
    for one in asked {
        assert_eq!(one, format!("{how} {place}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_only_the_proxy_knows_is_pulled_through_it() {
    for (scheme, how, login) in [
        ("http", "GET", None),
        ("http", "GET", Some(LOGIN)),
        ("socks5h", "SOCKS", None),
        ("socks5h", "SOCKS", Some(LOGIN)),
    ] {
        let proxy = Proxy::start().await;
        if login.is_some() {
            proxy.require("operator", PASSWORD);
        }
        let login = login.map_or_else(String::new, |login| format!("{login}@"));
        let (registry, cache, image) = behind(&proxy, scheme, &login).await;
        cache.pull("up", &image).await;
        all_of(&proxy, how, &format!("{NAME}:{}", registry.port()));
        assert_eq!(registry.count((Kind::Blob, "GET")), 2, "{scheme}");
        cache.check_invariants().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_refuses_is_an_outage_and_named_without_its_password() {
    for scheme in ["http", "socks5h"] {
        let proxy = Proxy::start().await;
        proxy.require("operator", PASSWORD);
        let (_registry, cache, image) = behind(&proxy, scheme, &format!("{LOGIN}@")).await;
        cache.pull("up", &image).await;
        proxy.require("operator", "another");
        // Connections that are open stay good.
        cache.restart().await;
        let stale = cache.manifest("up", REPO, "v1").await;
        assert_good(&stale, &image.manifest);
        assert!(said(&stale).contains("stale"), "{}", said(&stale));
        let cold = cache.manifest("up", REPO, "v2").await;
        assert_refused(&cold, &[503]);
        let log = cache.log();
        let named = format!("the proxy {scheme}://127.0.0.1:{}", proxy.port());
        assert!(log.contains(&named), "{scheme}: {log}");
        cache.check_invariants().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_socks5_names_are_resolved_and_judged_here() {
    let proxy = Proxy::start().await;
    let registry = Registry::start_on("localhost").await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let cache = cache()
        .upstream(
            Upstream::new("up", registry.url())
                .line(&format!("proxy = \"socks5://127.0.0.1:{}\"", proxy.port())),
        )
        .start()
        .await;
    cache.pull("up", &image).await;
    for asked in proxy.asked() {
        assert!(!asked.contains("localhost"), "{asked}");
    }
    let origin = Origin::start().await;
    let layer = image.layer();
    origin.hold(layer);
    cache.restart_empty().await;
    // Refused as ever, before the proxy hears of it.
    registry.script(
        Kind::Blob,
        faults::redirect(&format!("http://0.0.0.0:{}/x", origin.port()), 307),
    );
    assert_refused(&cache.blob("up", REPO, layer.digest).await, &[502, 503]);
    assert_eq!(origin.connections(), 0);
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_goes_through_a_tunnel() {
    for scheme in ["http", "https", "socks5", "socks5h"] {
        let registry = Registry::start().await;
        let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
        let (proxy, front) = (Proxy::start().await, TlsFront::start(&registry).await);
        proxy.require("operator", PASSWORD);
        let before = TlsFront::before(proxy.port()).await;
        let (host, roots) = match scheme {
            "https" => {
                let at = before.url().replace("https://", "");
                (at, [front.ca_file(), before.ca_file()])
            }
            _ => (
                format!("127.0.0.1:{}", proxy.port()),
                [front.ca_file(), front.ca_file()],
            ),
        };
        let folder = tempfile::tempdir().expect("a folder");
        let ca = folder.path().join("roots.pem");
        let pem = roots.map(|path: &Path| std::fs::read_to_string(path).expect("a root"));
        std::fs::write(&ca, pem.concat()).expect("write the roots");
        let cache = cache()
            .upstream(
                Upstream::new("up", front.url())
                    .line(&format!("proxy = \"{scheme}://{LOGIN}@{host}\""))
                    .line(&format!("ca_file = {ca:?}")),
            )
            .secret("pr@xy-secret")
            .start()
            .await;
        // The front speaks HTTP/1.1 only, to which blobs keep.
        let layer = image.layer();
        assert_good(&cache.blob("up", REPO, layer.digest).await, layer);
        let how = if scheme.starts_with("http") {
            "CONNECT"
        } else {
            "SOCKS"
        };
        let place = front.url().replace("https://", "");
        all_of(&proxy, how, &place);
        cache.check_invariants().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_is_no_way_inward() {
    for scheme in ["http", "socks5h"] {
        let proxy = Proxy::start().await;
        let (registry, cache, image) = behind(&proxy, scheme, "").await;
        assert_good(&cache.manifest("up", REPO, "v1").await, &image.manifest);
        let before = proxy.asked().len();
        let (inside, digest) = (Origin::start().await, image.layer().digest);
        for host in [
            "127.0.0.1",
            "localhost",
            "0x7f.1",
            "10.0.0.1",
            "169.254.169.254",
            "[::ffff:127.0.0.1]",
            "metadata.google.internal",
            "printer",
        ] {
            registry.clear_scripts();
            let location = format!("http://{host}:{}/x", inside.port());
            registry.script(Kind::Blob, faults::redirect(&location, 307));
            let answer = cache.blob("up", REPO, digest).await;
            assert_refused(&answer, &[502, 503]);
            tokio::time::sleep(crate::stage::AFTER_A_FAILURE).await;
        }
        let led = proxy.asked().split_off(before);
        let own = format!("{NAME}:{}", registry.port());
        assert!(led.iter().all(|asked| asked.ends_with(&own)), "{led:?}");
        assert_eq!(inside.connections(), 0);
        cache.check_invariants().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn none_asks_directly_and_variables_count_for_nothing() {
    let (proxy, registry) = (Proxy::start().await, Registry::start().await);
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let url = format!("http://u:{PASSWORD}@127.0.0.1:{}", proxy.port());
    let cache = cache()
        .line(&format!("proxy = \"socks5h://127.0.0.1:{}\"", proxy.port()))
        .environment("HTTP_PROXY", &url)
        .environment("http_proxy", &url)
        .environment("ALL_PROXY", &url)
        .upstream(Upstream::new("up", registry.url()).line("proxy = \"none\""))
        .start()
        .await;
    cache.pull("up", &image).await;
    assert_eq!(proxy.asked(), Vec::<String>::new());
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_shown_of_it_is_where_and_not_who() {
    let registry = Registry::start().await;
    let cache = cache()
        .line("proxy = \"http://operator:pr%40xy-secret@proxy.example:3128\"")
        .upstream(Upstream::new("up", registry.url()).line("proxy = \"none\""))
        .start()
        .await;
    let shown = cache.run(&["config", "show"]).await;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(
        shown.contains("proxy = \"http://***@proxy.example:3128\""),
        "{shown}"
    );
    assert!(shown.contains("proxy = \"none\""), "{shown}");
    assert!(
        !shown.contains("operator") && !shown.contains("xy-secret"),
        "{shown}"
    );
}
