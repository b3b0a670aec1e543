//! Layers are read ahead: what a client is about to ask for is on its way, and what it will not ask for is not.

use std::time::Duration;

use testbed::cache::{blob_path, manifest_path};
use testbed::image::ACCEPT_ALL;
use testbed::{
    CacheProcess, Content, Gate, Handler, Image, ImageSpec, Matcher, Registry, Request,
    ServeOptions, Upstream, assert_good, eventually, faults,
};
use tokio::time::sleep;

use crate::stage::{REPO, cache, get_blob, said, up, up_as};

const KIB: usize = 1 << 10;

/// Long enough for a fetch that should not be to be seen.
const A_MOMENT: Duration = Duration::from_millis(300);

fn image_of(registry: &Registry, layers: &[usize]) -> Image {
    let mut spec = ImageSpec::new(REPO, "v1");
    spec.layers = layers.to_vec();
    registry.put_image(&spec)
}

async fn get_image_manifest(cache: &CacheProcess, image: &Image) {
    let answer = cache.get(&manifest_path("up", REPO, &image.tag)).await;
    assert_good(&answer, &image.manifest);
}

/// One after the other, as they are named.
async fn get_blobs(cache: &CacheProcess, blobs: impl IntoIterator<Item = &Content>) {
    for blob in blobs {
        let answer = cache.get(&blob_path("up", REPO, blob.digest)).await;
        assert_good(&answer, blob);
    }
}

/// How often each of these was asked for at the registry.
fn asked(registry: &Registry, blobs: &[Content]) -> Vec<usize> {
    let requests = registry.requests();
    let count = |blob: &Content| {
        let line = get_blob(REPO, blob.digest);
        requests.iter().filter(|request| **request == line).count()
    };
    blobs.iter().map(count).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_layers_are_fetched_and_none_of_them_twice() {
    let (registry, cache) = up().await;
    let image = image_of(&registry, &[64 * KIB; 20]);
    get_image_manifest(&cache, &image).await;
    get_blobs(&cache, [&image.config, &image.layers[0], &image.layers[1]]).await;
    sleep(A_MOMENT).await;
    assert_eq!(asked(&registry, &image.layers[2..]), [0; 18], "too early");
    get_blobs(&cache, [&image.layers[2]]).await;
    let ahead = || asked(&registry, &image.layers[3..11]) == [1; 8];
    assert!(
        eventually(Duration::from_secs(5), ahead).await,
        "{:?}",
        registry.requests()
    );
    sleep(A_MOMENT).await;
    assert_eq!(asked(&registry, &image.layers[11..]), [0; 9], "too far");
    let next = cache
        .get(&blob_path("up", REPO, image.layers[3].digest))
        .await;
    assert!(said(&next).contains("hit"), "{next}");
    get_blobs(&cache, &image.layers).await;
    assert_eq!(asked(&registry, &image.layers), [1; 20]);
    let metrics = cache.metrics().await;
    for line in ["started\"} 17", "used\"} 17"] {
        let line = format!("oci_remote_cache_read_ahead_total{{outcome=\"{line}");
        assert!(metrics.contains(&line), "{metrics}");
    }
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_wants_parts_or_little_causes_nothing() {
    let (registry, cache) = up().await;
    let image = image_of(&registry, &[64 * KIB; 12]);
    get_image_manifest(&cache, &image).await;
    for layer in &image.layers[..6] {
        let path = blob_path("up", REPO, layer.digest);
        let part = cache
            .send(Request::get(&path).header("Range", "bytes=100-199"))
            .await;
        assert_eq!(part.status, 206, "{part}");
        let head = cache.send(Request::new("HEAD", &path)).await;
        assert_eq!(head.status, 200, "{head}");
    }
    // The same blob again and again is one.
    for _ in 0..6 {
        get_blobs(&cache, [&image.config]).await;
    }
    sleep(A_MOMENT).await;
    assert_eq!(asked(&registry, &image.layers[6..]), [0; 6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_layers_are_left_to_the_client_and_zero_turns_it_off() {
    let (registry, cache) = up_as(|upstream| upstream.line("read_ahead = \"200KiB\"")).await;
    let sizes = [1, 1, 1, 150, 300, 100, 20].map(|kib| kib * KIB);
    let image = image_of(&registry, &sizes);
    get_image_manifest(&cache, &image).await;
    get_blobs(&cache, [&image.config]).await;
    get_blobs(&cache, &image.layers[..3]).await;
    let fitting = || asked(&registry, &image.layers[3..]) == [1, 0, 0, 1];
    assert!(
        eventually(Duration::from_secs(5), fitting).await,
        "{:?}",
        registry.requests()
    );
    sleep(A_MOMENT).await;
    assert!(fitting(), "{:?}", registry.requests());

    let (registry, cache) = up_as(|upstream| upstream.line("read_ahead = 0")).await;
    let image = image_of(&registry, &[KIB; 10]);
    get_image_manifest(&cache, &image).await;
    get_blobs(&cache, &image.layers[..6]).await;
    sleep(A_MOMENT).await;
    assert_eq!(asked(&registry, &image.layers[6..]), [0; 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_have_only_what_is_held_has_nothing_read_ahead() {
    let registry = Registry::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let tokens = folder.path().join("tokens");
    std::fs::write(
        &tokens,
        "ci t0ken-of-ci-0123456789\nbob t0ken-of-bob-0123456789\n",
    )
    .unwrap();
    let cache = cache()
        .line(&format!("clients.tokens = {tokens:?}"))
        .line("clients.rules = [\"ci pull **\", \"bob pull-cached **\"]")
        .upstream(Upstream::new("up", registry.url()))
        .start()
        .await;
    let image = image_of(&registry, &[KIB; 12]);
    let request = |who: &str, path: &str| {
        let bearer = format!("Bearer t0ken-of-{who}-0123456789");
        Request::get(path)
            .header("Authorization", &bearer)
            .header("Accept", ACCEPT_ALL)
    };
    let manifest = cache
        .send(request("ci", &manifest_path("up", REPO, "v1")))
        .await;
    assert_good(&manifest, &image.manifest);
    let path = |layer: &Content| blob_path("up", REPO, layer.digest);
    for layer in &image.layers[..3] {
        assert_good(&cache.send(request("ci", &path(layer))).await, layer);
    }
    // A part brings all of a small layer, and is no sign that the image is being pulled.
    let fourth = &image.layers[3];
    let part = request("ci", &path(fourth)).header("Range", "bytes=0-9");
    assert_eq!(cache.send(part).await.status, 206);
    cache.wait_until_stored(&fourth.digest).await;
    assert_good(&cache.send(request("bob", &path(fourth))).await, fourth);
    sleep(A_MOMENT).await;
    assert_eq!(asked(&registry, &image.layers[4..]), [0; 8]);
}

/// Anyone can push a manifest that lies about its layers' sizes: what is larger than it was said to be is not brought for nobody.
#[tokio::test(flavor = "multi_thread")]
async fn sizes_that_lie_bring_no_more_than_was_said() {
    let (registry, cache) = up().await;
    let sizes = [1, 1, 1, 2000, 2000, 2000, 2000].map(|kib| kib * KIB);
    let image = image_of(&registry, &sizes);
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest.data).unwrap();
    let (honest, large) = image.layers.split_at(3);
    for (n, layer) in large.iter().enumerate() {
        manifest["layers"][3 + n]["size"] = 10.into();
        let slow = faults::serve(layer, ServeOptions::new().rate(1 << 20));
        registry.script(Matcher::blobs().of(layer.digest), slow);
    }
    let manifest = Content::new(
        manifest.to_string().into_bytes(),
        &image.manifest.media_type,
    );
    registry.put_manifest(REPO, Some("v1"), &manifest);
    let answer = cache.get(&manifest_path("up", REPO, "v1")).await;
    assert_good(&answer, &manifest);
    get_blobs(&cache, [&image.config].into_iter().chain(honest)).await;
    let tried = || asked(&registry, large) == [1; 4];
    assert!(
        eventually(Duration::from_secs(5), tried).await,
        "{:?}",
        registry.requests()
    );
    sleep(Duration::from_secs(3)).await;
    for layer in large {
        let sent = registry.sent(Matcher::blobs().of(layer.digest));
        assert!(sent < 1000 << 10, "{sent} bytes were taken");
        assert!(!cache.holds(&layer.digest));
    }
    // Whoever asks for it is given it.
    get_blobs(&cache, &large[..1]).await;
    cache.check_invariants().await;
}

/// Of few connections half are left to those who wait.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_ahead_keeps_nobody_waiting_for_a_connection() {
    let (registry, cache) = up_as(|upstream| upstream.line("max_connections = 4")).await;
    let image = image_of(&registry, &[64 * KIB; 12]);
    let (first, rest) = image.layers.split_at(3);
    let gate = Gate::new();
    for layer in rest {
        registry.script(Matcher::blobs().of(layer.digest), faults::held(&gate));
    }
    get_image_manifest(&cache, &image).await;
    for blob in [&image.config].into_iter().chain(first) {
        // By then the connection of the one before is free again.
        sleep(Duration::from_millis(100)).await;
        get_blobs(&cache, [blob]).await;
    }
    sleep(A_MOMENT).await;
    let other = Content::blob(1000, "what somebody else wants");
    registry.put_blob(REPO, &other);
    get_blobs(&cache, [&other]).await;
    let asked = asked(&registry, rest).iter().sum::<usize>();
    assert!((1..=2).contains(&asked), "{asked}");
    gate.open();
    get_blobs(&cache, &image.layers).await;
}

/// What nobody asked for yet may be refused; whoever pulled the rest keeps it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_what_was_read_ahead_takes_nothing_away() {
    let (registry, cache) = up().await;
    let image = image_of(&registry, &[64 * KIB; 8]);
    let refused = &image.layers[5];
    let gate = Gate::new();
    let door = gate.clone();
    let late = Handler::new(move |mut exchange| {
        let door = door.clone();
        async move {
            door.opened().await;
            exchange.error(403, "DENIED", &[]).await;
        }
    });
    registry.script(Matcher::blobs().of(refused.digest), late);
    get_image_manifest(&cache, &image).await;
    get_blobs(
        &cache,
        [&image.config].into_iter().chain(&image.layers[..5]),
    )
    .await;
    gate.open();
    sleep(A_MOMENT).await;
    registry.stop().await;
    get_image_manifest(&cache, &image).await;
    get_blobs(&cache, &image.layers[..5]).await;
}
