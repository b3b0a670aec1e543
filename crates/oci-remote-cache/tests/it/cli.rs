//! The commands beside serving: what is held, and what is configured.

use std::process::Output;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use testbed::{CacheProcess, Image, ImageSpec, Registry, Upstream};
use tokio::process::Command;
use tokio::time::{Instant, timeout};

use crate::stage::{BINARY, REPO, assert_holds, cache, up};

const PASSWORD: &str = "correct-horse-battery";

/// Runs the binary with these arguments in this folder.
async fn run(folder: &TempDir, arguments: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command
        .args(arguments)
        .current_dir(folder.path())
        .env_clear()
        .kill_on_drop(true);
    timeout(Duration::from_secs(20), command.output())
        .await
        .expect("an end")
        .expect("run the binary")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

async fn with_two_images() -> (Registry, CacheProcess, Image, Image) {
    let (registry, cache) = up().await;
    let first = registry.put_image(&ImageSpec::new(REPO, "v1"));
    let second = registry.put_image(&ImageSpec::new("other/app", "v2"));
    for image in [&first, &second] {
        cache.pull("up", image).await;
    }
    let parts = [&first, &second]
        .into_iter()
        .flat_map(|image| image.blobs().chain([&image.manifest]));
    assert_holds(&cache, parts).await;
    (registry, cache, first, second)
}

/// What `ls --json` lists, once it lists so much: a file lies in its place a moment before the catalog tells of it.
async fn listed(cache: &CacheProcess, count: usize) -> Vec<Value> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let text = stdout(&cache.run(&["ls", "--json"]).await);
        let rows: Vec<Value> = serde_json::from_str(&text).expect("JSON");
        if rows.len() == count {
            return rows;
        }
        assert!(Instant::now() < end, "{count} rows are wanted: {rows:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ls_shows_what_is_held_beside_a_running_server_and_without_one() {
    let (registry, cache, first, second) = with_two_images().await;
    let asked = registry.requests();
    for running in [true, false] {
        if !running {
            cache.terminate().await;
        }
        let table = stdout(&cache.run(&["ls"]).await);
        assert!(table.starts_with("REPOSITORY"), "{table}");
        for (image, place) in [(&first, "up/lib/app"), (&second, "up/other/app")] {
            let short: String = image.digest().hex().chars().take(12).collect();
            let line = table
                .lines()
                .find(|line| line.contains(&short))
                .unwrap_or_default();
            assert!(
                line.starts_with(place) && line.contains(&image.tag),
                "{place}: {table}"
            );
        }
    }
    assert_eq!(registry.requests(), asked);
    cache.restart().await;
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ls_as_json_names_everything_in_full() {
    let (_registry, cache, first, _second) = with_two_images().await;
    let rows = listed(&cache, 6).await;
    let tagged = rows.iter().find(|row| row["tag"] == "v1").expect("the tag");
    assert_eq!(
        (
            tagged["upstream"].as_str(),
            tagged["repository"].as_str(),
            tagged["digest"].as_str()
        ),
        (
            Some("up"),
            Some(REPO),
            Some(first.digest().to_string().as_str())
        )
    );
    assert_eq!(
        (tagged["size"].as_u64(), tagged["media_type"].as_str()),
        (
            Some(first.manifest.size()),
            Some(first.manifest.media_type.as_str())
        )
    );
    let layer = rows
        .iter()
        .find(|row| row["digest"] == first.layer().digest.to_string())
        .expect("the layer");
    assert_eq!(
        (layer["tag"].is_null(), layer["size"].as_u64()),
        (true, Some(first.layer().size()))
    );
    cache.check_invariants().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ls_where_nothing_is_held_says_so() {
    let folder = TempDir::new().expect("make a folder");
    let missing = run(&folder, &["ls", "--cache-dir", "nosuch"]).await;
    assert_eq!(missing.status.code(), Some(1), "{missing:?}");
    assert!(
        !folder.path().join("nosuch").exists(),
        "looking made a folder"
    );
    let (_registry, cache) = up().await;
    assert_eq!(stdout(&cache.run(&["ls", "--json"]).await).trim(), "[]");
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_history_says_how_a_tag_is_named() {
    let folder = TempDir::new().expect("make a folder");
    for (reference, words) in [
        ("quay.io/app:v1@sha256:00", "as in \"quay.io/app:v1\""),
        ("quay.io/app@sha256:00", "as in \"quay.io/app:<tag>\""),
        (
            "localhost:18080/quay.io/lab/app:v1",
            "leave it off: quay.io/lab/app:v1",
        ),
        (
            "localhost/index.docker.io/alpine",
            "leave it off: index.docker.io/alpine:latest",
        ),
        // What follows is no upstream: it may be a registry that is not configured.
        ("localhost:18080/lab/app:v1", "\"localhost:18080\""),
    ] {
        let failed = run(&folder, &["tags", "history", reference]).await;
        let told = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert_eq!(failed.status.code(), Some(1), "{reference}");
        assert!(told.contains(words), "{reference}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn config_check_judges_and_changes_nothing() {
    let registry = Registry::start().await;
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()).credentials("robot", PASSWORD))
        .start()
        .await;
    let text = stdout(&cache.run(&["config", "check"]).await);
    assert!(text.starts_with("OK"), "{text}");
    assert!(!text.contains(PASSWORD));

    let folder = TempDir::new().expect("make a folder");
    std::fs::write(folder.path().join("bad.toml"), "lisen = \"x\"\n").expect("write a file");
    let bad = run(&folder, &["config", "check", "--config", "bad.toml"]).await;
    let text = String::from_utf8_lossy(&bad.stderr).into_owned();
    assert_eq!(bad.status.code(), Some(2));
    assert!(
        text.contains("bad.toml:1") && text.contains("listen"),
        "{text}"
    );
    assert!(!folder.path().join("cache").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn config_show_tells_where_values_come_from_and_no_secret() {
    let registry = Registry::start().await;
    let cache = cache()
        .upstream(Upstream::new("up", registry.url()).credentials("robot", PASSWORD))
        .max_size("1GiB")
        .start()
        .await;
    let text = stdout(&cache.run(&["config", "show"]).await);
    assert!(!text.contains(PASSWORD), "{text}");
    assert!(
        text.contains("***") && text.contains("1GiB") && text.contains("robot"),
        "{text}"
    );
    let line = |key: &str| {
        text.lines()
            .find(|line| line.trim_start().starts_with(key))
            .unwrap_or_default()
            .to_owned()
    };
    assert!(
        line("max_size").contains('#'),
        "no source beside max_size: {text}"
    );
    assert!(
        text.contains("[upstreams.\"docker.io\"]") && text.contains("https://registry-1.docker.io"),
        "{text}"
    );
    let parsed: toml::Table = text.parse().expect("TOML");
    assert_eq!(
        parsed["upstreams"]["up"]["url"].as_str(),
        Some(registry.url().as_str())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn config_init_writes_a_file_that_is_right_and_never_over_another() {
    let folder = TempDir::new().expect("make a folder");
    let printed = stdout(&run(&folder, &["config", "init"]).await);
    assert!(printed.contains("listen"), "{printed}");
    stdout(&run(&folder, &["config", "init", "--output", "new.toml"]).await);
    let written = std::fs::read_to_string(folder.path().join("new.toml")).expect("a file");
    assert_eq!(written, printed);
    assert!(
        stdout(&run(&folder, &["config", "check", "--config", "new.toml"]).await).starts_with("OK")
    );
    let again = run(&folder, &["config", "init", "--output", "new.toml"]).await;
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(
        std::fs::read_to_string(folder.path().join("new.toml")).expect("a file"),
        written
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn config_schema_is_json_that_knows_the_keys() {
    let folder = TempDir::new().expect("make a folder");
    let text = stdout(&run(&folder, &["config", "schema"]).await);
    let schema: Value = serde_json::from_str(&text).expect("JSON");
    assert!(schema["$schema"].is_string(), "{text}");
    for key in [
        "listen",
        "admin_listen",
        "cache_dir",
        "default_upstream",
        "cache",
        "upstreams",
    ] {
        assert!(
            schema["properties"][key].is_object(),
            "{key} is not in the schema"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn help_and_version_are_answers() {
    let folder = TempDir::new().expect("make a folder");
    let version = stdout(&run(&folder, &["--version"]).await);
    assert_eq!(
        version.trim(),
        concat!("oci-remote-cache ", env!("CARGO_PKG_VERSION"))
    );
    let help = stdout(&run(&folder, &["--help"]).await);
    for word in ["serve", "ls", "config"] {
        assert!(help.contains(word), "{word} is not in the help");
    }
    assert!(stdout(&run(&folder, &["completions", "bash"]).await).contains("oci-remote-cache"));
    assert!(stdout(&run(&folder, &["man"]).await).contains(".TH"));
}

/// The page of all keys is what the binary makes of them: a key that changes changes the page.
#[tokio::test]
async fn the_reference_page_is_what_the_keys_say() {
    let folder = TempDir::new().expect("a folder");
    let made = stdout(&run(&folder, &["config", "reference"]).await);
    let kept = include_str!("../../../../docs/reference/configuration.md");
    assert!(
        made == kept,
        "docs/reference/configuration.md is old: write it again with `oci-remote-cache config reference`"
    );
}
