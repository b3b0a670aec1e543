//! Lists of tags and of referrers.

use std::time::Duration;

use serde_json::json;
use testbed::image::{OCI_INDEX, OCI_MANIFEST};
use testbed::{Content, ImageSpec, Kind, Matcher, Origin, Response, assert_good, faults};
use tokio::time::sleep;

use crate::stage::{
    REPO, assert_holds, assert_holds_nothing, assert_refused, up, up_as, up_with_image,
};

/// Where a `Link` leads, when it is the next page here.
fn next_page(response: &Response) -> Option<String> {
    let link = response.header("link")?;
    let target = link.strip_prefix('<')?.strip_suffix(">; rel=\"next\"")?;
    assert!(
        target.starts_with("/v2/up/lib/app/tags/list?"),
        "leads away: {link}"
    );
    Some(target.to_owned())
}

fn tags_of(response: &Response) -> Vec<String> {
    serde_json::from_value(response.json()["tags"].clone()).expect("a list of tags")
}

/// C22
#[tokio::test(flavor = "multi_thread")]
async fn tags_are_paged_under_our_own_path() {
    let (registry, cache) = up().await;
    for tag in ["a", "b", "c", "d", "e"] {
        registry.put_image(&ImageSpec::new(REPO, tag));
    }
    let mut page = Some("/v2/up/lib/app/tags/list?n=2".to_owned());
    let mut found = Vec::new();
    while let Some(path) = page {
        let answer = cache.get(&path).await;
        assert!(answer.is_whole(), "{path}: {answer}");
        assert_eq!(answer.header("content-type"), Some("application/json"));
        found.extend(tags_of(&answer));
        page = next_page(&answer);
    }
    assert_eq!(found, ["a", "b", "c", "d", "e"]);
    let queries: Vec<String> = registry
        .entries(Kind::Tags)
        .iter()
        .map(|entry| entry.query.clone())
        .collect();
    assert_eq!(queries, ["n=2", "n=2&last=b", "n=2&last=d"]);
    assert_holds_nothing(&cache).await;
    cache.check_invariants().await;
}

/// C22
#[tokio::test(flavor = "multi_thread")]
async fn odd_page_sizes_are_tamed() {
    let (registry, cache) = up().await;
    for tag in ["a", "b"] {
        registry.put_image(&ImageSpec::new(REPO, tag));
    }
    let none = cache.get("/v2/up/lib/app/tags/list?n=0").await;
    assert_eq!(
        (
            none.status,
            none.json()["tags"].clone(),
            none.header("link")
        ),
        (200, json!([]), None)
    );
    registry.clear_log();
    assert_eq!(
        tags_of(&cache.get("/v2/up/lib/app/tags/list?n=99999999999").await),
        ["a", "b"]
    );
    assert_eq!(
        registry.entries(Kind::Tags)[0].parameter("n").as_deref(),
        Some("1000")
    );
    registry.clear_log();
    for n in ["-1", "two", "1e3"] {
        assert_refused(
            &cache.get(&format!("/v2/up/lib/app/tags/list?n={n}")).await,
            &[400],
        );
    }
    assert_eq!(registry.count(Kind::Tags), 0);
    cache.check_invariants().await;
}

/// C22: what registries really send: `null` (Nexus), and a next page that lies elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn odd_lists_of_tags_are_tamed() {
    let (registry, cache) = up().await;
    let list = |body: &str, link: &str| {
        faults::status(
            200,
            &[("Content-Type", "text/plain"), ("Link", link)],
            body.as_bytes().to_vec(),
        )
    };
    let away = "<http://elsewhere.example/steal?n=1&last=a>; rel=\"next\"";
    registry.script(
        Matcher::from(Kind::Tags).repo("nexus"),
        list("{\"name\":\"nexus\",\"tags\":null}", ""),
    );
    registry.script(
        Matcher::from(Kind::Tags).repo("away"),
        list("{\"name\":\"away\",\"tags\":[\"a\"]}", away),
    );
    registry.script(
        Matcher::from(Kind::Tags).repo("html"),
        list("<html>login</html>", ""),
    );
    let nexus = cache.get("/v2/up/nexus/tags/list").await;
    assert_eq!(
        (nexus.status, nexus.header("content-type")),
        (200, Some("application/json"))
    );
    let led_away = cache.get("/v2/up/away/tags/list").await;
    assert_eq!(tags_of(&led_away), ["a"]);
    assert!(
        !led_away
            .header("link")
            .unwrap_or_default()
            .contains("elsewhere"),
        "{:?}",
        led_away.headers
    );
    assert_refused(&cache.get("/v2/up/html/tags/list").await, &[502, 503]);
    cache.check_invariants().await;
}

/// A next page that lies elsewhere, or is this very page: only its parameters are taken, nobody goes there, and nobody walks on.
#[tokio::test(flavor = "multi_thread")]
async fn a_next_page_is_read_and_not_followed() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let trap = Origin::start().await;
    let tags = format!("/v2/{REPO}/tags/list");
    for around in [
        format!("{}/steal?n=1&last=a", trap.url()),
        format!("//{}/steal?n=1&last=a", trap.authority()),
        format!("{tags}?n=1&last=a"),
    ] {
        registry.clear_log();
        registry.clear_scripts();
        let link = format!("<{around}>; rel=\"next\"");
        let headers = [("Link", link.as_str())];
        let list = faults::status(200, &headers, "{\"name\":\"x\",\"tags\":[\"a\"]}");
        registry.script(Kind::Tags, list);
        let first = cache.get(&format!("/v2/up/{REPO}/tags/list?n=1")).await;
        assert_eq!(registry.count(Kind::Tags), 1, "{around}");
        let next = next_page(&first).expect("a next page");
        assert_eq!(next, format!("/v2/up/{REPO}/tags/list?n=1&last=a"));
        assert_eq!(tags_of(&cache.get(&next).await), ["a"]);
        let asked = registry.requests();
        assert_eq!(
            asked,
            [format!("GET {tags}?n=1"), format!("GET {tags}?n=1&last=a")]
        );
        cache.restart().await;
    }
    let referrers = format!("referrers/{}", image.digest());
    let link = format!("<{}/steal?next_page=abc%3D>; rel=\"next\"", trap.url());
    let index = Content::index(&[], OCI_INDEX);
    let headers = [("Link", link.as_str()), ("Content-Type", OCI_INDEX)];
    registry.script(Kind::Referrers, crate::stage::as_it_is(&index, &headers));
    let answer = cache
        .get(&format!("/v2/up/{REPO}/{referrers}?artifactType=a%2Fsig"))
        .await;
    let next =
        format!("</v2/up/{REPO}/{referrers}?artifactType=a%2Fsig&next_page=abc%3D>; rel=\"next\"");
    assert_eq!(answer.header("link"), Some(next.as_str()));
    assert_eq!(trap.connections(), 0);
    cache.check_invariants().await;
}

/// C24
#[tokio::test(flavor = "multi_thread")]
async fn filtered_referrers_keep_their_marks() {
    let (registry, cache, image) = up_with_image().await;
    let signature = json!({"mediaType": OCI_MANIFEST, "digest": image.digest().to_string(), "size": 1, "artifactType": "a/sig"});
    let other = json!({"mediaType": OCI_MANIFEST, "digest": image.digest().to_string(), "size": 1, "artifactType": "a/sbom"});
    registry.set_referrers(REPO, image.digest(), &[signature.clone(), other]);
    let path = format!("/v2/up/{REPO}/referrers/{}", image.digest());
    for _ in 0..2 {
        let filtered = cache.get(&format!("{path}?artifactType=a%2Fsig")).await;
        assert_eq!(
            (filtered.status, filtered.header("content-type")),
            (200, Some(OCI_INDEX))
        );
        assert_eq!(filtered.header("oci-filters-applied"), Some("artifactType"));
        assert_eq!(filtered.json()["manifests"], json!([signature]));
    }
    let all = cache.get(&path).await;
    assert_eq!(
        (
            all.header("content-type"),
            all.header("oci-filters-applied")
        ),
        (Some(OCI_INDEX), None)
    );
    assert_eq!(all.json()["manifests"].as_array().map(Vec::len), Some(2));
    let filters: Vec<Option<String>> = registry
        .entries(Kind::Referrers)
        .iter()
        .map(|entry| entry.parameter("artifactType"))
        .collect();
    assert_eq!(filters, [Some("a/sig".to_owned()), None]);
    cache.check_invariants().await;
}

/// C25
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_signature_is_a_real_404_that_ends() {
    let (registry, cache) = up_as(|upstream| upstream.negative_ttl("1s")).await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let referrers = cache
        .get(&format!("/v2/up/{REPO}/referrers/{}", image.digest()))
        .await;
    assert_refused(&referrers, &[404]);
    let fallback = image.digest().to_string().replace(':', "-");
    let missing = cache.manifest("up", REPO, &fallback).await;
    assert_refused(&missing, &[404]);
    assert_eq!(missing.error_code(), "MANIFEST_UNKNOWN");

    let signature = Content::index(&[], OCI_INDEX);
    registry.put_manifest(REPO, Some(&fallback), &signature);
    sleep(Duration::from_millis(1100)).await;
    assert_good(&cache.manifest("up", REPO, &fallback).await, &signature);
    assert_holds(&cache, [&signature]).await;
    cache.check_invariants().await;
}
