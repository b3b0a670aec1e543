//! What clients and upstreams write stays text: it ends no header, no answer and no line of the log, and a browser takes none of it for a
//! page.

use testbed::cache::{blob_path, manifest_path};
use testbed::{
    Bearer, CacheProcess, Content, Exchange, Handler, Image, ImageSpec, Kind, Matcher, Origin,
    Registry, Request, Response, TokenServer, Upstream, faults,
};

use crate::stage::{REPO, assert_refused, cache, raw_exchange, up, up_with_image, up_without_ttl};

/// All headers that an answer may have.
const OURS: [&str; 20] = [
    "accept-ranges",
    "age",
    "allow",
    "cache-control",
    "cache-status",
    "connection",
    "content-length",
    "content-range",
    "content-type",
    "date",
    "docker-content-digest",
    "docker-distribution-api-version",
    "etag",
    "link",
    "oci-filters-applied",
    "oci-namespace",
    "retry-after",
    "vary",
    "warning",
    "x-content-type-options",
];

/// What an upstream may send beside a body, all of it marked.
const THEIRS: [(&str, &str); 26] = [
    ("Access-Control-Allow-Origin", "http://evil.example"),
    ("Age", "31337"),
    ("Alt-Svc", "h3=\"evil.example:443\""),
    ("Cache-Control", "public, evil"),
    ("Content-Disposition", "inline; filename=evil.html"),
    ("Content-Language", "evil"),
    ("Content-Security-Policy", "default-src evil"),
    ("Docker-Content-Digest", "evil"),
    ("Docker-Distribution-Api-Version", "evil"),
    ("Docker-RateLimit-Source", "evil\"} 1"),
    ("ETag", "\"evil\""),
    ("Expires", "evil"),
    ("Link", "<http://evil.example/>; rel=\"next\""),
    ("Location", "http://evil.example/"),
    ("OCI-Namespace", "evil"),
    ("OCI-Subject", "evil"),
    ("RateLimit-Limit", "100;w=21600"),
    ("RateLimit-Remaining", "76;w=21600"),
    ("Refresh", "0; url=http://evil.example/"),
    ("Server", "evil"),
    ("Set-Cookie", "evil=1"),
    ("Strict-Transport-Security", "max-age=31337"),
    ("Vary", "evil"),
    ("Via", "evil"),
    ("Warning", "199 evil \"evil\""),
    ("WWW-Authenticate", "Basic realm=\"evil\""),
];

/// Fails unless every header is one of ours, and none holds what is not ours to say.
fn assert_ours(answer: &Response, what: &str) {
    for (name, value) in &answer.headers {
        let name = name.to_ascii_lowercase();
        assert!(OURS.contains(&name.as_str()), "{what}: {name}: {value}");
        assert!(
            !value.contains("evil") && !value.contains("31337"),
            "{what}: {name}: {value}"
        );
    }
    assert_eq!(
        answer.header("x-content-type-options"),
        Some("nosniff"),
        "{what}"
    );
}

/// Fails unless each line of the log is an object of its own: nobody ended one to write the next.
fn assert_whole_log(cache: &CacheProcess) {
    for line in cache.log().lines() {
        let read: Result<serde_json::Map<String, serde_json::Value>, _> =
            serde_json::from_str(line);
        assert!(
            read.is_ok_and(|object| object.contains_key("level")),
            "{line}"
        );
    }
}

/// Line breaks and worse, as a URL writes them.
const BREAKS: [&str; 6] = [
    "%0d%0aSet-Cookie:%20evil=1%0d%0a%0d%0a%3Chtml%3E",
    "%0aSet-Cookie:%20evil=1",
    "%00evil",
    "%1b%5b31mevil",
    "%e2%80%a8evil",
    "%250d%250aevil",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_writes_ends_nothing() {
    let (registry, cache, image) = up_with_image().await;
    let digest = image.digest();
    for end in BREAKS {
        for path in [
            format!("/v2/up/{REPO}{end}/manifests/v1"),
            format!("/v2/up{end}/{REPO}/manifests/v1"),
            format!("/v2/up/{REPO}/manifests/v1{end}"),
            format!("/v2/up/{REPO}/manifests/{digest}{end}"),
            format!("/v2/up/{REPO}/blobs/{digest}{end}"),
            format!("/v2/up/{REPO}/referrers/{digest}{end}"),
            format!("/v2/up/{REPO}/blobs{end}/{digest}"),
            format!("/up{end}/v2/{REPO}/tags/list"),
            format!("/v2/v2{end}/x/y/tags/list"),
            format!("/v2/{REPO}/manifests/v1?ns=up{end}"),
            format!("/v2/up/{REPO}/tags/list?n=1{end}"),
            format!("/{end}"),
        ] {
            let answer = cache.get(&path).await;
            assert_refused(&answer, &[400, 404]);
            assert_ours(&answer, &path);
        }
    }
    for parameter in ["last", "next_page"] {
        for end in &BREAKS[..4] {
            let path = format!("/v2/up/{REPO}/tags/list?{parameter}=a{end}");
            let answer = cache.get(&path).await;
            assert_refused(&answer, &[400]);
            assert_ours(&answer, &path);
        }
    }
    assert_eq!(registry.connections(), 0);
    assert_whole_log(&cache);
    cache.check_invariants().await;
}

/// What cannot be escaped is raw, or in headers.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_writes_raw_ends_nothing() {
    let (_registry, cache, _image) = up_with_image().await;
    let held = manifest_path("up", REPO, "v1");
    for head in [
        &b"GET {path}\x1b[31m HTTP/1.1\r\nHost: x\r\n"[..],
        b"GET {path}\rSet-Cookie:evil HTTP/1.1\r\nHost: x\r\n",
        b"GET {path} HTTP/1.1\r\nHost: x\r\nUser-Agent: a\rSet-Cookie: evil\r\n",
        b"GET {path} HTTP/1.1\r\nHost: x\r\nUser-Agent: a\x1b[31m\r\n",
        b"GET {path} HTTP/1.1\r\nHost: x\r\nUser-Agent: a\xff\t\"},{\"level\":\"evil\r\n",
        b"GET {path} HTTP/1.1\r\nHost: evil\t\xff\r\nAccept: evil\xff\r\n",
        b"GET {path} HTTP/1.1\r\nHost: x\r\nIf-None-Match: \"evil\r\nRange: bytes=evil\r\n",
    ] {
        let text: Vec<u8> = [head, b"Connection: close\r\n\r\n"].concat();
        let at = text
            .windows(6)
            .position(|part| part == b"{path}")
            .expect("a path");
        let bytes = [&text[..at], held.as_bytes(), &text[at + 6..]].concat();
        let answer = raw_exchange(&cache, &bytes).await;
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(
            !answer.to_ascii_lowercase().contains("set-cookie"),
            "{answer}"
        );
    }
    assert_whole_log(&cache);
    cache.check_invariants().await;
}

/// Has every answer carry what is theirs, and a page where content belongs.
fn script_pages(registry: &Registry, image: &Image, page: &Content) {
    let manifest = &image.manifest;
    let html = [&THEIRS[..], &[("Content-Type", "text/html; charset=utf-8")]].concat();
    let typed = [&THEIRS[..], &[("Content-Type", &manifest.media_type)]].concat();
    for (kind, headers, body) in [
        (Kind::Blob, &html, page.data.clone()),
        (Kind::Manifest, &typed, manifest.data.clone()),
        (Kind::Tags, &html, "{\"tags\":[\"<script>\"]}".into()),
        (Kind::Referrers, &html, "{\"manifests\":[]}".into()),
    ] {
        registry.script(kind, faults::status(200, headers, body));
    }
}

/// None of an upstream's headers goes further, on a miss or a hit, whole or in part, kept or passed through.
#[tokio::test(flavor = "multi_thread")]
async fn headers_of_an_upstream_stay_there() {
    let (registry, cache, image) = up_with_image().await;
    let page = Content::new("<script>alert(1)</script>", "text/html");
    let foreign = format!("blake3:{}", "0a".repeat(32));
    script_pages(&registry, &image, &page);
    let blob = blob_path("up", REPO, page.digest);
    let passed = blob_path("up", REPO, &foreign);
    let requests = [
        Request::head(&blob),
        Request::get(&blob),
        Request::get(&blob),
        Request::head(&blob),
        Request::get(&blob).range("0-3"),
        Request::get(&blob).range("0-3,8-9"),
        Request::get(&blob).range("99999-"),
        Request::get(&blob).header("If-None-Match", "\"evil\""),
        Request::head(&passed),
        Request::get(&passed),
        Request::get(&manifest_path("up", REPO, "v1")),
        Request::head(&manifest_path("up", REPO, "v2")),
        Request::get(&manifest_path("up", REPO, image.digest())),
        Request::get(&manifest_path("up", REPO, &foreign)),
        Request::get(&manifest_path("up", REPO, "v1")).header("Accept", "text/html"),
        Request::get(&format!("/v2/up/{REPO}/tags/list")),
        Request::get(&format!("/v2/up/{REPO}/referrers/{}", image.digest())),
    ];
    for request in requests {
        let what = format!("{request:?}");
        let answer = cache.send(request).await;
        assert!(matches!(answer.status, 200 | 206 | 416), "{what}: {answer}");
        assert_ours(&answer, &what);
        let kind = answer.header("content-type").unwrap_or_default();
        assert!(
            kind.starts_with("application/") || kind.starts_with("multipart/byteranges"),
            "{what}: {kind}"
        );
    }
    // The one text of an upstream's that is shown, to operators, in characters that end no label.
    let metrics = cache.metrics().await;
    let shown: Vec<&str> = metrics
        .lines()
        .filter(|line| line.contains("evil"))
        .collect();
    let name = "oci_remote_cache_upstream_ratelimit_source";
    let source = format!("{name}{{upstream=\"up\",credential=\"anonymous\",source=\"evil1\"}} 1");
    assert_eq!(shown, [source]);
    assert_whole_log(&cache);
    cache.check_invariants().await;
}

/// An upstream's errors are told in our words, whatever page it sends.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstreams_errors_are_told_in_our_words() {
    let (registry, cache) = up_without_ttl().await;
    let page = [&THEIRS[..], &[("Content-Type", "text/html")]].concat();
    let body =
        "{\"errors\":[{\"code\":\"DENIED\\r\\nSet-Cookie: evil\",\"message\":\"<script>evil\"}]}";
    let errors = [400, 401, 403, 404, 406, 418, 429, 500];
    let bodies = [body, "<html>evil</html>"];
    for (status, body) in errors
        .iter()
        .flat_map(|status| bodies.map(|body| (*status, body)))
    {
        let repo = format!("lib/of{status}");
        registry.clear_scripts();
        let error = faults::status(status, &page, body);
        registry.script(Matcher::any().repo(&repo), error);
        for path in [
            manifest_path("up", &repo, "v1"),
            blob_path("up", &repo, Content::blob(9, body).digest),
            format!("/v2/up/{repo}/tags/list"),
        ] {
            let answer = cache.get(&path).await;
            assert!(answer.status >= 400, "{path}: {answer}");
            assert_refused(&answer, &[answer.status]);
            assert_ours(&answer, &path);
            assert!(!answer.text().contains("evil"), "{}", answer.text());
        }
    }
    assert_whole_log(&cache);
    cache.check_invariants().await;
}

/// A scene for challenges that are no good: the registry's, and a token service that notes who comes.
async fn challenged(line: &str) -> (Registry, TokenServer, CacheProcess) {
    let (registry, cache) = up().await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    let tokens = TokenServer::start().await;
    let line = line.replace("{realm}", &tokens.realm());
    let line = line.replace("{port}", &tokens.port().to_string());
    registry.require(Bearer::of(&tokens).form(move |_, _| vec![line.clone()]));
    (registry, tokens, cache)
}

/// What a challenge names becomes a URL and its parameters, of which it cannot write more than it was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_challenge_adds_nothing_to_the_question() {
    let (_registry, tokens, cache) = challenged(
        "Bearer realm=\"{realm}\",service=\"s&account=root#%0d%0a\\\"\",scope=\"repository:lib/app:pull&account=root\"",
    )
    .await;
    cache.manifest("up", REPO, "v1").await;
    let asked = tokens.token_requests();
    assert_eq!(asked.len(), 1);
    assert_eq!(
        asked[0].parameter("service").as_deref(),
        Some("s&account=root#%0d%0a\"")
    );
    assert_eq!(
        asked[0].parameters("scope"),
        ["repository:lib/app:pull&account=root"]
    );
    assert_eq!(asked[0].parameter("account"), None);

    for realm in [
        "http://127.0.0.1:{port}/to\tken",
        "http://127.0.0.\t1:{port}/token",
        "\u{e9}{realm}",
    ] {
        let line = format!("Bearer realm=\"{realm}\",service=\"s\"");
        let (_registry, tokens, cache) = challenged(&line).await;
        assert_refused(&cache.manifest("up", REPO, "v1").await, &[403, 502, 503]);
        assert_eq!(tokens.connections(), 0, "{line}");
        assert_whole_log(&cache);
    }
}

/// A `Location` that holds what no URL holds is none, and a list that breaks out of its `Link` has no next page.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_upstream_writes_of_places_ends_nothing() {
    let (registry, cache) = up().await;
    let origin = Origin::start().await;
    for (n, between) in ["\t", "\u{e9}\t", "\u{a0}"].iter().enumerate() {
        let blob = Content::blob(1000, &n.to_string());
        origin.hold(&blob);
        let location = format!(
            "http://127.0.0.1{between}:{}/cdn/{}",
            origin.port(),
            blob.digest
        );
        let away = faults::redirect(&location, 307);
        registry.script(Matcher::blobs().of(blob.digest), away);
        assert_refused(&cache.blob("up", REPO, blob.digest).await, &[502]);
    }
    assert_eq!(origin.connections(), 0);
    let links = [
        "</x?n=1&last=a%0d%0aSet-Cookie:%20evil>; rel=\"next\"",
        "</x?n=1&last=a\t>; rel=\"next\"",
        "</x?n=1&next_page=%00evil>; rel=\"next\"",
    ];
    for (n, link) in links.iter().enumerate() {
        let repo = format!("lib/{n}");
        let tags = "{\"tags\":[\"a\\r\\nSet-Cookie: evil\"]}";
        let list = faults::status(200, &[("Link", *link)], tags);
        registry.script(Matcher::from(Kind::Tags).repo(&repo), list);
        let answer = cache.get(&format!("/v2/up/{repo}/tags/list")).await;
        assert_ours(&answer, link);
        assert_eq!(
            (answer.status, answer.header("link")),
            (200, None),
            "{link}"
        );
        assert_eq!(answer.json()["tags"][0], "a\r\nSet-Cookie: evil");
    }
    assert_whole_log(&cache);
    cache.check_invariants().await;
}

/// Heads that an upstream breaks with lines of its own, or that say two things.
const BROKEN: [&str; 7] = [
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: a\rSet-Cookie: evil=1\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: a\r\n folded\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX\0: a\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    "HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}",
    "HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\n{}",
    "<html>evil</html>\r\n\r\n",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_head_of_an_upstream_is_no_answer() {
    let (mut registries, mut builder) = (Vec::new(), cache());
    for (n, head) in BROKEN.into_iter().enumerate() {
        let registry = Registry::start().await;
        let raw = Handler::new(move |mut exchange: Exchange| async move {
            exchange.raw(head.as_bytes()).await;
            exchange.close().await;
        });
        registry.script(Matcher::any(), raw);
        builder = builder.upstream(Upstream::new(&format!("up{n}"), registry.url()));
        registries.push(registry);
    }
    let cache = builder.start().await;
    for (n, head) in BROKEN.iter().enumerate() {
        let path = format!("/v2/up{n}/{REPO}/tags/list");
        let answer = cache.get(&path).await;
        assert_refused(&answer, &[502, 503]);
        assert_ours(&answer, head);
    }
    assert_whole_log(&cache);
    cache.check_invariants().await;
}
