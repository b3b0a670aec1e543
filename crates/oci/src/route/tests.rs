//! Tables and properties for request paths.

use proptest::prelude::*;

use super::*;

const HEX: &str = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

fn target(path: &str) -> Target {
    Route::parse(path, None)
        .unwrap_or_else(|error| panic!("{path}: {error}"))
        .target
}

fn manifest(name: &str, reference: &str) -> Target {
    Target::Manifest {
        name: name.parse().unwrap(),
        reference: reference.parse().unwrap(),
    }
}

fn blob(name: &str, digest: &str) -> Target {
    Target::Blob {
        name: name.parse().unwrap(),
        digest: digest.parse().unwrap(),
    }
}

fn tags(name: &str) -> Target {
    Target::Tags {
        name: name.parse().unwrap(),
        page: Page::default(),
    }
}

fn referrers(name: &str, digest: &str) -> Target {
    let page = Page::default();
    Target::Referrers {
        name: name.parse().unwrap(),
        digest: digest.parse().unwrap(),
        artifact_type: None,
        page,
    }
}

#[test]
fn paths_are_read_from_the_right() {
    let digest = format!("sha256:{HEX}");
    for (path, expected) in [
        ("/v2".to_owned(), Target::Base),
        ("/v2/".to_owned(), Target::Base),
        (
            "/v2/_catalog".to_owned(),
            Target::Catalog {
                page: Page::default(),
            },
        ),
        (
            "/v2/a/blobs/b/manifests/t".to_owned(),
            manifest("a/blobs/b", "t"),
        ),
        (
            format!("/v2/a/blobs/b/blobs/{digest}"),
            blob("a/blobs/b", &digest),
        ),
        (
            "/v2/manifests/manifests/manifests".to_owned(),
            manifest("manifests", "manifests"),
        ),
        ("/v2/tags/list/tags/list".to_owned(), tags("tags/list")),
        ("/v2/tags/tags/list".to_owned(), tags("tags")),
        (
            "/v2/x/tags/manifests/list".to_owned(),
            manifest("x/tags", "list"),
        ),
        (
            format!("/v2/x/referrers/y/referrers/{digest}"),
            referrers("x/referrers/y", &digest),
        ),
        (
            format!("/v2/x/referrers/y/manifests/{digest}"),
            manifest("x/referrers/y", &digest),
        ),
        (format!("/v2/a/blobs/sha256%3A{HEX}"), blob("a", &digest)),
        (format!("/v2/a/blobs/sha256%3a{HEX}"), blob("a", &digest)),
        (
            "/v2/%61%2Eb/manifests/v1%2e0".to_owned(),
            manifest("a.b", "v1.0"),
        ),
        (
            "/v2/a/blobs/foo+bar:baz".to_owned(),
            blob("a", "foo+bar:baz"),
        ),
        (
            "/v2/localhost%3A5000/a/tags/list".to_owned(),
            tags("localhost:5000/a"),
        ),
        ("/v2/v2/manifests/t".to_owned(), manifest("v2", "t")),
        (
            "/v2/docker.io/v2/a/manifests/t".to_owned(),
            manifest("docker.io/v2/a", "t"),
        ),
    ] {
        assert_eq!(target(&path), expected, "{path}");
    }
}

#[test]
fn keys_in_front() {
    for (path, key) in [
        ("/docker.io/v2/library/x/manifests/latest", "docker.io"),
        ("/ghcr/v2/library/x/manifests/latest", "ghcr"),
        (
            "/localhost%3A5000/v2/library/x/manifests/latest",
            "localhost:5000",
        ),
    ] {
        let route = Route::parse(path, Some("ns=docker.io")).unwrap();
        assert_eq!(
            (route.prefix.as_deref(), route.namespace.as_deref()),
            (Some(key), Some("docker.io"))
        );
        assert_eq!(route.target, manifest("library/x", "latest"));
    }
    assert_eq!(
        Route::parse("/docker.io/v2", None).unwrap().target,
        Target::Base
    );
}

fn check_refused(paths: &[&str], status: u16, code: ErrorCode) {
    for path in paths {
        let error = Route::parse(path, None).expect_err(path);
        assert_eq!(
            (error.status(), error.code()),
            (status, code),
            "{path}: {error:?}"
        );
    }
}

#[test]
fn no_endpoints() {
    let paths = [
        "",
        "/",
        "v2/",
        "//v2/",
        "/v1/_ping",
        "/v22/a/tags/list",
        "/metrics",
        "/a/b/v2/x/tags/list",
        "/../v2/x/tags/list",
        "/Foo/v2/x/tags/list",
        "/v2/a",
        "/v2/a/tags/list/",
        "/v2/a/tags/other",
        "/v2/tags/list",
        "/v2/manifests/latest",
        "/v2/a/blobs/uploads/",
        "/v2/a/blobs/uploads/some-uuid",
        "/v2/_oci/ext/discover",
        "/v2/../../etc/passwd",
        "/v2/up/lib/blobs/sha256:../../x",
    ];
    check_refused(&paths, 404, ErrorCode::Unsupported);
}

#[test]
fn v2_twice() {
    let paths = [
        "/v2/v2/library/x/manifests/latest",
        "/key/v2/v2/library/x/manifests/latest",
        "/v2/v2/",
        "/v2/v2",
    ];
    check_refused(&paths, 404, ErrorCode::NameUnknown);
}

#[test]
fn illegal_names_and_escapes() {
    let paths = [
        "/v2/Foo/bar/manifests/v1",
        "/v2/foo//bar/manifests/v1",
        "/v2//manifests/v1",
        "/v2/foo/../bar/manifests/v1",
        "/v2/foo/%2e%2e/bar/manifests/v1",
        "/v2/%2e%2e/bar/manifests/v1",
        "/v2/up/%2e%2e%2fx/manifests/v1",
        "/v2/foo%2fbar/manifests/v1",
        "/v2/foo%5Cbar/manifests/v1",
        "/v2/foo\\bar/manifests/v1",
        "/v2/foo/%00/manifests/v1",
        "/v2/foo%0d%0a/manifests/v1",
        "/v2/foo/manifests/%252e",
        "/v2/foo/manifests/a%",
        "/v2/foo/manifests/a%4",
        "/v2/foo/manifests/a%+1",
        "/v2/foo/manifests/a%zz",
        "/v2/foo/manifests/a%é",
        "/v2/up/lib/blobs/sha256:..%2f..%2fetc",
    ];
    check_refused(&paths, 400, ErrorCode::NameInvalid);
}

#[test]
fn illegal_digests() {
    let paths = [
        "/v2/foo/blobs/sha256:",
        "/v2/foo/blobs/sha256:baddigeststring",
        "/v2/foo/blobs/latest",
        "/v2/foo/blobs/uploads",
        "/v2/foo/referrers/latest",
        "/v2/foo/manifests/sha256:abc",
    ];
    check_refused(&paths, 400, ErrorCode::DigestInvalid);
    let upper = format!("/v2/foo/blobs/sha256:{}", HEX.to_uppercase());
    check_refused(&[&upper], 400, ErrorCode::DigestInvalid);
}

#[test]
fn illegal_tags() {
    let paths = ["/v2/foo/manifests/", "/v2/foo/manifests/-x"];
    check_refused(&paths, 404, ErrorCode::ManifestUnknown);
}

#[test]
fn pages() {
    let page = |query: &str| {
        let route = Route::parse("/v2/a/tags/list", Some(query))?;
        let Target::Tags { page, .. } = route.target else {
            panic!("{route:?}")
        };
        Ok::<_, RouteError>(page)
    };
    for (query, n, last, next) in [
        ("", None, None, None),
        ("n=&last=&other", None, None, None),
        ("n=2&last=v1.0&n=3", Some(2), Some("v1.0"), None),
        ("n=0", Some(0), None, None),
        ("n=1000", Some(1000), None, None),
        ("n=1001", Some(1000), None, None),
        (
            "n=99999999999&next_page=a%2Bb%3D%3D",
            Some(1000),
            None,
            Some("a+b=="),
        ),
        ("ns=docker.io&last=a+b", None, Some("a+b"), None),
    ] {
        let expected = Page {
            n,
            last: last.map(str::to_owned),
            next: next.map(str::to_owned),
            others: String::new(),
        };
        assert_eq!(page(query), Ok(expected), "{query}");
    }
    let long = |length: usize| format!("last={}", "a".repeat(length));
    assert!(page(&long(2048)).is_ok());
    for query in [
        "n=-1",
        "n=x",
        "n=%31",
        "n=+1",
        "last=%00",
        "last=%ff",
        "last=%4",
        "next_page=%0a",
        &long(2049),
    ] {
        let error = page(query).expect_err(query);
        assert_eq!(
            (error.status(), error.code()),
            (400, ErrorCode::PageInvalid),
            "{query}"
        );
    }
    assert!(Route::parse("/v2/a/manifests/t", Some("n=-1")).is_ok());
    assert!(Route::parse("/v2/_catalog", Some("n=-1")).is_err());
}

#[test]
fn what_a_registry_pages_by_is_carried_as_it_stands() {
    let digest = format!("sha256:{HEX}");
    let query = "n=2&nextToken=a%2bb+c/d==&ns=up&$skip=7&empty=&alone&access_token=s3cret&page.x=1";
    for path in ["tags/list".to_owned(), format!("referrers/{digest}")] {
        let route = Route::parse(&format!("/v2/a/{path}"), Some(query)).unwrap();
        let (Target::Tags { page, .. } | Target::Referrers { page, .. }) = route.target else {
            panic!("{path}")
        };
        assert_eq!(page.others, "nextToken=a%2bb+c/d==&$skip=7&page.x=1");
        assert_eq!(Page::parse(query), Ok(page));
    }
    let most = |count: usize, length: usize| {
        let pair = |n: usize| format!("p{n}={}", "a".repeat(length));
        (0..count).map(pair).collect::<Vec<_>>().join("&")
    };
    for good in [most(8, 9), most(1, 2048)] {
        assert_eq!(Page::parse(&good).unwrap().others, good);
    }
    for bad in [
        most(9, 1),
        most(1, 2049),
        most(3, 2000),
        format!("{}=1", "a".repeat(65)),
    ] {
        assert!(Page::parse(&bad).is_err(), "{bad}");
    }
    for bad in [
        "a=%zz", "a=%", "a=<b>", "a=b\"c", "%61=b", "a b=c", "a=\u{e4}", "a=b#c", "=b",
    ] {
        let error = Page::parse(bad).expect_err(bad);
        assert_eq!(
            (error.status(), error.code()),
            (400, ErrorCode::PageInvalid)
        );
    }
    // Our own list is not paged by what others think of.
    let own = Route::parse("/v2/_catalog", Some("last=a&x=%zz")).unwrap();
    let page = Page {
        last: Some("a".into()),
        ..Page::default()
    };
    assert_eq!(own.target, Target::Catalog { page });
}

#[test]
fn pages_of_different_length_begin_alike() {
    let page = |query| Page::parse(query).unwrap();
    assert!(page("n=2&last=a&x=1").begins_with(&page("last=a&x=1")));
    for other in ["last=a&x=2", "last=b&x=1", "x=1", "last=a&next_page=a&x=1"] {
        assert!(!page("n=2&last=a&x=1").begins_with(&page(other)), "{other}");
    }
}

#[test]
fn other_parameters() {
    let path = format!("/v2/a/referrers/sha256:{HEX}");
    let query = "artifactType=application/vnd.x+json&ns=localhost%3A5000&n=5";
    let route = Route::parse(&path, Some(query)).unwrap();
    assert_eq!(route.namespace.as_deref(), Some("localhost:5000"));
    let Target::Referrers {
        artifact_type,
        page,
        ..
    } = route.target
    else {
        panic!("{route:?}")
    };
    assert_eq!(
        (artifact_type.as_deref(), page.n),
        (Some("application/vnd.x+json"), Some(5))
    );
    for query in ["ns=%00", "ns=a%0d%0ab", "ns=%", "artifactType=%ff"] {
        let error = Route::parse(&path, Some(query)).expect_err(query);
        assert_eq!(
            (error.status(), error.code()),
            (400, ErrorCode::NameInvalid),
            "{query}"
        );
    }
    assert_eq!(Route::parse("/v2/", Some("ns=")).unwrap().namespace, None);
}

/// Names made of the words that paths are read by.
fn tricky_name() -> impl Strategy<Value = String> {
    let segment = "manifests|blobs|tags|list|referrers|uploads|a|x[.]y|b-c";
    (
        segment,
        prop::collection::vec(prop_oneof![segment, Just("v2".to_owned())], 0..5),
    )
        .prop_map(|(first, rest)| [vec![first], rest].concat().join("/"))
}

fn escaped(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c == '/' {
                "/".to_owned()
            } else {
                format!("%{:02x}", u32::from(c))
            }
        })
        .collect()
}

proptest! {
    #[test]
    fn every_name_can_be_asked_for(name in tricky_name(), tag in "[a-z0-9_][a-z0-9._-]{0,9}", key in "[a-z]{1,5}(\\.io)?") {
        prop_assume!(key != "v2");
        let digest = format!("sha256:{HEX}");
        for (rest, expected) in [
            (format!("{name}/manifests/{tag}"), manifest(&name, &tag)),
            (format!("{name}/manifests/{digest}"), manifest(&name, &digest)),
            (format!("{name}/blobs/{digest}"), blob(&name, &digest)),
            (format!("{name}/tags/list"), tags(&name)),
            (format!("{name}/referrers/{digest}"), referrers(&name, &digest)),
        ] {
            prop_assert_eq!(target(&format!("/v2/{rest}")), expected.clone());
            prop_assert_eq!(target(&format!("/v2/{}", escaped(&rest))), expected.clone());
            let route = Route::parse(&format!("/{key}/v2/{rest}"), None).unwrap();
            prop_assert_eq!(route, Route { prefix: Some(key.clone()), namespace: None, target: expected });
        }
    }

    #[test]
    fn any_path_is_survived(path in any::<String>(), close in "[a-z%2eEfF./:\\\\]{0,30}", query in any::<String>()) {
        for path in [path.clone(), format!("/v2/{path}"), format!("/v2/{close}/manifests/t"), format!("/v2/a/blobs/{close}")] {
            if let Ok(route) = Route::parse(&path, Some(&query)) {
                let printed = format!("{route:?}");
                prop_assert!(!printed.contains(".."), "{}", printed);
            }
        }
        Route::parse("/v2/a/tags/list", Some(&format!("n={query}&last={close}&ns={path}"))).ok();
    }
}
