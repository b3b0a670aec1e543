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

/// C22: what registries really send: `null` (Nexus), more than was asked for (GCR), names that are not ours. All of it is passed on.
#[tokio::test(flavor = "multi_thread")]
async fn lists_of_tags_are_passed_on_as_they_came() {
    let (registry, cache) = up().await;
    for (repo, body) in [
        ("nexus", "{\"name\":\"nexus\",\"tags\":null}"),
        (
            "gcr",
            "{ \"child\":[\"x\"],\"manifest\":{\"sha256:a\":{\"tag\":[\"v1\"]}},\"name\":\"proj/gcr\",\"tags\":[\"v1\"]}\n",
        ),
        (
            "jfrog",
            "{\"name\":\"a b\",\"tags\":[\"sha256__aa\",\"Z:bad\"]}",
        ),
        ("bare", "{\"tags\":[]}"),
    ] {
        let list = faults::status(200, &[("Content-Type", "text/plain")], body);
        registry.script(Matcher::from(Kind::Tags).repo(repo), list);
        for _ in 0..2 {
            let answer = cache.get(&format!("/v2/up/{repo}/tags/list")).await;
            assert_eq!(
                (answer.status, answer.header("content-type")),
                (200, Some("application/json"))
            );
            assert_eq!(answer.text(), body);
        }
        let none = cache.get(&format!("/v2/up/{repo}/tags/list?n=0")).await;
        assert_eq!((none.status, &none.json()["tags"]), (200, &json!([])));
    }
    cache.check_invariants().await;
}

/// What is no list is not passed on as one.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_list_is_a_502() {
    let (registry, cache, image) = up_with_image().await;
    let referrers = format!("referrers/{}", image.digest());
    for (kind, path, body) in [
        (Kind::Tags, "tags/list", "<html>login</html>"),
        (Kind::Tags, "tags/list", "{\"errors\":[]}"),
        (Kind::Tags, "tags/list", "[\"app\",[\"v1\"]]"),
        (Kind::Tags, "tags/list", "{\"name\":\"a\",\"tags\":[1]}"),
        (Kind::Tags, "tags/list", "{\"tags\":[]}{}"),
        (Kind::Referrers, &referrers, "<html>login</html>"),
        (Kind::Referrers, &referrers, "{\"foo\":1}"),
        (Kind::Referrers, &referrers, "{\"manifests\":{}}"),
        (Kind::Referrers, &referrers, "[[]]"),
        (Kind::Referrers, &referrers, "[]"),
    ] {
        registry.clear_scripts();
        registry.script(kind, faults::status(200, &[], body));
        let answer = cache.get(&format!("/v2/up/{REPO}/{path}")).await;
        assert_refused(&answer, &[502]);
        assert!(answer.text().contains("cannot be used"), "{body}");
    }
    cache.check_invariants().await;
}

/// A next page that lies elsewhere, or is this very page, is none: nobody goes there, and no client is sent round for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_next_page_elsewhere_is_left_out() {
    let (registry, cache) = up().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let trap = Origin::start().await;
    let tags = format!("/v2/{REPO}/tags/list");
    let referrers = format!("/v2/{REPO}/referrers/{}", image.digest());
    let index = Content::index(&[], OCI_INDEX);
    for around in [
        format!("{}/steal?n=1&last=a", trap.url()),
        format!("{}{tags}?n=1&last=a", trap.url()),
        format!("//{}{tags}?n=1&last=a", trap.authority()),
        "/v2/other/repo/tags/list?n=1&last=a".to_owned(),
        format!("{tags}?n=1"),
        format!("{tags}?n=2"),
        format!("{}/steal?next_page=abc%3D", trap.url()),
        "/v2/other/repo/referrers/sha256:00?next_page=a".to_owned(),
        referrers.clone(),
    ] {
        registry.clear_scripts();
        let link = format!("<{around}>; rel=\"next\"");
        let headers = [("Link", link.as_str())];
        let list = faults::status(200, &headers, "{\"name\":\"x\",\"tags\":[\"a\"]}");
        registry.script(Kind::Tags, list);
        registry.script(Kind::Referrers, crate::stage::as_it_is(&index, &headers));
        for path in [format!("{tags}?n=1"), referrers.clone()] {
            let path = path.replacen("/v2/", "/v2/up/", 1);
            let answer = cache.get(&path).await;
            assert_eq!(
                (answer.status, answer.header("link")),
                (200, None),
                "{around}"
            );
        }
        cache.restart().await;
    }
    assert_eq!(trap.connections(), 0);
    assert!(cache.log().contains("it leads to another server"));
    cache.check_invariants().await;
}

/// What a registry pages by is its own matter: whatever its `Link` says comes back to it, and only that.
#[tokio::test(flavor = "multi_thread")]
async fn pages_are_found_by_whatever_the_registry_says() {
    let (registry, cache) = up().await;
    let digest = Content::blob(9, "subject").digest;
    let index = Content::index(&[], OCI_INDEX);
    for (list, extra) in [
        (format!("/v2/{REPO}/tags/list"), ""),
        (
            format!("/v2/{REPO}/referrers/{digest}"),
            "artifactType=a%2Fsig&",
        ),
    ] {
        registry.clear_log();
        registry.clear_scripts();
        let token = "nextToken=T%2b1==&$skip=2";
        let link = format!("<{list}?{extra}{token}>; rel=\"next\"");
        let headers = [("Link", link.as_str()), ("Content-Type", OCI_INDEX)];
        let names = faults::status(200, &headers, "{\"name\":\"x\",\"tags\":[\"a\"]}");
        registry.script(Kind::Tags, names);
        registry.script(Kind::Referrers, crate::stage::as_it_is(&index, &headers));
        let ours = list.replacen("/v2/", "/v2/up/", 1);
        let first = cache.get(&format!("{ours}?{extra}ns=up")).await;
        let next = first.header("link").expect("a next page");
        let next = next
            .strip_prefix('<')
            .and_then(|link| link.strip_suffix(">; rel=\"next\""));
        let next = next.expect("a link");
        assert!(
            next.starts_with(&format!("{ours}?")) && next.contains(token) && next.contains("ns=up"),
            "{next}"
        );
        let second = cache.get(next).await;
        // It leads to this very page.
        assert_eq!((second.status, second.header("link")), (200, None));
        let asked = format!("GET {list}?{extra}{token}");
        assert_eq!(registry.requests().last(), Some(&asked));
    }
    let refused = cache.get(&format!("/v2/up/{REPO}/tags/list?x=%zz")).await;
    assert_refused(&refused, &[400]);
    cache.check_invariants().await;
}

/// Links as registries and what stands before them write them.
#[tokio::test(flavor = "multi_thread")]
async fn links_are_read_however_they_are_written() {
    let (registry, cache) = up().await;
    let tags = format!("/v2/{REPO}/tags/list");
    let long = "A".repeat(2000);
    let previous = format!("<{tags}?last=0>; rel=\"prev\"");
    for (query, lines) in [
        (
            "last=a%2Cb",
            vec![format!("<{tags}?last=a,b>; rel=\"next\"")],
        ),
        (
            &format!("last={long}"),
            vec![format!("<{tags}?last={long}>; rel=\"next\"")],
        ),
        ("last=n", vec![format!("<{tags}?last=n> ; rel = \"next\"")]),
        ("last=n", vec![format!("<{tags}?last=n>; Rel=\"Next\"")]),
        (
            "last=n",
            vec![format!("<{tags}?last=n>; rel=\"last next\"")],
        ),
        (
            "last=n",
            vec![format!("{previous}, <list?last=n>; rel=next")],
        ),
        (
            "last=n",
            vec![previous.clone(), "<?last=n>; rel=next".to_owned()],
        ),
    ] {
        registry.clear_scripts();
        let headers: Vec<(&str, &str)> = lines.iter().map(|line| ("Link", line.as_str())).collect();
        registry.script(
            Kind::Tags,
            faults::status(200, &headers, "{\"name\":\"x\",\"tags\":[\"a\"]}"),
        );
        let answer = cache.get(&format!("/v2/up/{REPO}/tags/list")).await;
        let want = format!("/v2/up/{REPO}/tags/list?{query}");
        assert_eq!(next_page(&answer), Some(want), "{lines:?}");
        registry.clear_log();
        cache.get(&format!("/v2/up/{REPO}/tags/list?{query}")).await;
        assert_eq!(registry.requests(), [format!("GET {tags}?{query}")]);
        cache.restart().await;
    }
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

/// Go writes an empty list as `null`. A filter that was not asked for is not claimed.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_no_referrers_may_be_null() {
    let (registry, cache, image) = up_with_image().await;
    let none = format!("{{\"schemaVersion\":2,\"mediaType\":\"{OCI_INDEX}\",\"manifests\":null}}");
    for (applied, query) in [("foo", "?artifactType=a%2Fsig"), ("artifactType", "")] {
        let headers = [
            ("Content-Type", OCI_INDEX),
            ("OCI-Filters-Applied", applied),
        ];
        registry.clear_scripts();
        registry.script(Kind::Referrers, faults::status(200, &headers, none.clone()));
        let path = format!("/v2/up/{REPO}/referrers/{}{query}", image.digest());
        let list = cache.get(&path).await;
        assert_eq!((list.status, list.text()), (200, none.clone()));
        assert_eq!(list.header("oci-filters-applied"), None, "{list}");
    }
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
