//! Where an upstream may not lead: each place is one that somebody listens at, and nobody sees a connection.

use serde_json::json;
use testbed::{
    Bearer, Content, ImageSpec, Kind, Origin, Proxy, Registry, TlsFront, TokenServer, Upstream,
    faults,
};

use crate::stage::{AFTER_A_FAILURE, REPO, assert_holds_nothing, assert_refused, cache, up};

/// X03: an upstream on the internet leads nowhere on this machine or beside it. No test may leave this machine, so the upstream has a
/// name that only a proxy knows, which makes it one on the internet; what it is led to would be asked through that proxy.
#[tokio::test(flavor = "multi_thread")]
async fn a_realm_and_a_redirect_that_point_inward_see_no_connection() {
    const NAME: &str = "registry.test.invalid";
    let (registry, proxy) = (Registry::start().await, Proxy::start().await);
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let (origin, tokens) = (Origin::start().await, TokenServer::start().await);
    let layer = image.layer();
    origin.hold(layer);
    let own = format!("{NAME}:{}", registry.port());
    let upstream = Upstream::new("up", format!("http://{own}"))
        .credentials("robot", "correct-horse")
        .token_realms(&["127.0.0.1", "localhost"])
        .line(&format!("proxy = \"http://127.0.0.1:{}\"", proxy.port()));
    let cache = cache().upstream(upstream).start().await;
    for host in [
        "127.0.0.1",
        "localhost",
        "LOCALHOST.",
        "127.0.0.2",
        "[::1]",
        "10.1.2.3",
        "172.31.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "[fd12::1]",
        "[fe80::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::10.1.2.3]",
        "[2002:7f00:1::]",
        "0.0.0.0",
        "0x7f.1",
        "2130706433",
        "127.0.0.1.",
        "metadata.google.internal",
    ] {
        registry.clear_scripts();
        let location = format!("http://{host}:{}/cdn/{}", origin.port(), layer.digest);
        registry.script(Kind::Blob, faults::redirect(&location, 307));
        registry.script(Kind::Manifest, faults::redirect(&location, 307));
        assert_refused(&cache.blob("up", REPO, layer.digest).await, &[502]);
        let head = cache.head_blob("up", REPO, layer.digest).await;
        assert_eq!(head.status, 502, "{host}: {head}");
        assert_refused(&cache.manifest("up", REPO, "v1").await, &[502]);
        tokio::time::sleep(AFTER_A_FAILURE).await;
    }
    registry.clear_scripts();
    for host in ["127.0.0.1", "localhost", "[64:ff9b::127.0.0.1]", "10.1.2.3"] {
        let realm = format!("http://{host}:{}/token", tokens.port());
        registry.require(Bearer::of(&tokens).realm(&realm));
        let refused = cache.manifest("up", REPO, "v1").await;
        assert_refused(&refused, &[403, 404, 502, 503]);
        tokio::time::sleep(AFTER_A_FAILURE).await;
    }
    assert!(registry.count(Kind::Manifest) > 0);
    let led: Vec<String> = proxy.asked();
    assert!(led.iter().all(|asked| asked.ends_with(&own)), "{led:?}");
    assert_eq!((origin.connections(), tokens.connections()), (0, 0));
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// R05: from https nothing leads to http, not even on the same machine.
#[tokio::test(flavor = "multi_thread")]
async fn https_never_leads_to_http() {
    let (registry, origin) = (Registry::start().await, Origin::start().await);
    let front = TlsFront::start(&registry).await;
    let blob = Content::blob(1000, "the blob");
    registry.put_blob(REPO, &blob);
    origin.hold(&blob);
    registry.script(
        Kind::Blob,
        faults::redirect(&origin.location(blob.digest, "sig=1"), 307),
    );
    let upstream =
        Upstream::new("up", front.url()).line(&format!("ca_file = {:?}", front.ca_file()));
    let cache = cache().upstream(upstream).start().await;
    assert_refused(&cache.blob("up", REPO, blob.digest).await, &[502]);
    assert_eq!(registry.count(Kind::Blob), 1);
    assert_eq!(origin.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// CVE-2014-5277 and its like: what is said to speak https is not asked in plain HTTP, whatever it answers, and a token service of an
/// https registry neither.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_falls_back_to_http() {
    let (registry, tokens) = (Registry::start().await, TokenServer::start().await);
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let front = TlsFront::start(&registry).await;
    let secure =
        Upstream::new("secure", front.url()).line(&format!("ca_file = {:?}", front.ca_file()));
    let plain = Upstream::new("plain", registry.url().replace("http://", "https://"));
    let cache = cache()
        .upstream(secure.credentials("robot", "correct-horse"))
        .upstream(plain)
        .start()
        .await;
    assert_refused(&cache.manifest("plain", REPO, "v1").await, &[502, 503]);
    assert_eq!(registry.requests(), Vec::<String>::new());
    registry.require(Bearer::of(&tokens));
    // The front speaks HTTP/1.1 only, to which blobs keep.
    let layer = image.layer().digest;
    assert_refused(&cache.blob("secure", REPO, layer).await, &[502]);
    assert_eq!(registry.requests(), [crate::stage::get_blob(REPO, layer)]);
    assert_eq!(tokens.connections(), 0);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// A descriptor's `urls` are for clients; here nobody looks at them, and what the registry lacks is a 404.
#[tokio::test(flavor = "multi_thread")]
async fn urls_in_a_manifest_are_never_fetched() {
    let (registry, cache) = up().await;
    let origin = Origin::start().await;
    let image = ImageSpec::new(REPO, "v1").build();
    let layer = image.layer();
    origin.hold(layer);
    let mut body: serde_json::Value = serde_json::from_slice(&image.manifest.data).unwrap();
    body["layers"][0]["urls"] = json!([origin.location(layer.digest, "")]);
    body["layers"][0]["mediaType"] =
        json!("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip");
    let manifest = Content::new(body.to_string().into_bytes(), &image.manifest.media_type);
    registry.put_manifest(REPO, Some("v1"), &manifest);
    testbed::assert_good(&cache.manifest("up", REPO, "v1").await, &manifest);
    assert_refused(&cache.blob("up", REPO, layer.digest).await, &[404]);
    assert_eq!(origin.connections(), 0);
    cache.check_invariants().await;
}

/// CVE-2021-41190 and its like: what is known as a blob is no manifest, unless the upstream says so of that very path.
#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_no_manifest_and_a_manifest_no_blob() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    cache.pull("up", &image).await;
    cache.wait_until_stored(&image.config.digest).await;
    let as_manifest = cache.manifest("up", REPO, image.config.digest).await;
    assert_refused(&as_manifest, &[404]);
    let as_blob = cache.blob("up", REPO, image.manifest.digest).await;
    assert_refused(&as_blob, &[404]);
    cache.check_invariants().await;
}
