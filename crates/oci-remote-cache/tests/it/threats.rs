//! The guide's table of threats says what guards each; what it names must exist, and be tests.

use std::fs;
use std::path::{Path, PathBuf};

/// The repository's own folder.
fn root() -> &'static Path {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    root.expect("a crate two folders below the root")
}

/// The rows of the table, without its head.
fn rows() -> Vec<[String; 3]> {
    let guide = fs::read_to_string(root().join("docs/guide/security.md")).expect("the guide");
    guide
        .lines()
        .skip_while(|line| *line != "| threat | defence | guarded by |")
        .skip(2)
        .take_while(|line| line.starts_with("| "))
        .map(|line| {
            let cells = line
                .trim_matches(['|', ' '])
                .split(" | ")
                .map(str::to_owned);
            let cells: Vec<String> = cells.collect();
            cells
                .try_into()
                .unwrap_or_else(|cells| panic!("three cells: {cells:?}"))
        })
        .collect()
}

/// Where a name of the last column lies: front-door tests are called by their name alone.
fn place(name: &str) -> PathBuf {
    if name == "deny.toml" {
        root().join(name)
    } else if name.contains('/') {
        root().join("crates").join(name)
    } else {
        root().join("crates/oci-remote-cache/tests/it").join(name)
    }
}

#[test]
fn what_guards_against_each_threat_exists() {
    let rows = rows();
    assert!(rows.len() > 50, "{} rows: is this the table?", rows.len());
    for [threat, _defence, guards] in rows {
        let names: Vec<&str> = guards.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "nothing guards against: {threat}");
        for name in names {
            let place = place(name);
            if place.extension().is_none_or(|extension| extension != "rs") {
                assert!(place.exists(), "{threat}: no {name}");
                continue;
            }
            let text = fs::read_to_string(&place);
            let text = text.unwrap_or_else(|error| panic!("{threat}: {name}: {error}"));
            let tests = text.contains("#[test]") || text.contains("#[tokio::test");
            assert!(tests, "{threat}: {name} holds no test");
        }
    }
}
