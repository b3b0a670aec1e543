//! The plan of the house, kept by a machine: which floor may use which, what the words of the specifications may not touch, how files
//! are called and how long they grow.
//!
//! Each rule is judged from a file's text, without the compiler: comments and strings are blanked first, then every `crate::…`,
//! `super::…` and `std::…` path is read, grouped imports too.

use std::fs;
use std::path::{Path, PathBuf};

/// What every floor may use.
const GROUND: [&str; 9] = [
    "clock", "deadline", "tasks", "secret", "metrics", "names", "verdict", "watched", "signals",
];

/// The floors, and what each may use beside itself and the ground. `a::b` allows only that module of `a`.
const FLOORS: [(&str, &[&str]); 7] = [
    ("store", &[]),
    ("upstream", &[]),
    ("policy", &[]),
    ("fill", &["store", "upstream"]),
    ("cache", &["policy", "fill", "store", "upstream"]),
    ("http", &["cache", "policy", "store::span"]),
    // The doors share one vocabulary: bodies, problems, and what a listener wants of its handler.
    (
        "admin",
        &[
            "cache",
            "policy",
            "fill",
            "store",
            "upstream",
            "http::body",
            "http::problem",
            "http::listen",
        ],
    ),
];

/// What puts the floors together may use them all.
const ASSEMBLY: [&str; 5] = ["config", "cli", "app", "main", "lib"];

/// What the words of the specifications do without: no runtime, no I/O, no clock.
const NOT_IN_WORDS: [&str; 5] = [
    "tokio",
    "std::fs",
    "std::net",
    "std::time::SystemTime",
    "std::time::Instant",
];

/// Names that say nothing of what a file is for.
const EMPTY_NAMES: [&str; 14] = [
    "util", "utils", "common", "manager", "managers", "service", "services", "helper", "helpers",
    "types", "type", "traits", "trait", "misc",
];

/// Lines of product in one file, its tests at the foot not counted.
const LONGEST: usize = 600;

/// A path in the source, such as `crate::store::span`, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mention {
    line: usize,
    segments: Vec<String>,
}

/// One source file: its path below `src`, and its text.
struct Source {
    path: String,
    text: String,
}

#[test]
fn every_floor_uses_only_what_is_below() {
    let sources = sources(&product().join("src"));
    assert!(sources.len() > 40, "only {} files found", sources.len());
    report(sources.iter().flat_map(judge_floors));
}

#[test]
fn the_words_know_no_runtime_no_files_and_no_clock() {
    let sources = sources(&product().join("../oci/src"));
    assert!(sources.len() > 8, "only {} files found", sources.len());
    report(sources.iter().flat_map(judge_words));
}

#[test]
fn files_are_called_by_what_they_are_for_and_stay_short() {
    for folder in ["src", "../oci/src", "../testbed/src"] {
        report(sources(&product().join(folder)).iter().flat_map(judge_file));
    }
}

#[test]
fn the_product_ships_no_test_bed() {
    let text = fs::read_to_string(product().join("Cargo.toml")).expect("read Cargo.toml");
    report(judge_dependencies("Cargo.toml", &text));
    let words = fs::read_to_string(product().join("../oci/Cargo.toml")).expect("read Cargo.toml");
    let banned = ["tokio", "reqwest", "hyper"].map(|name| format!("\n{name} "));
    for name in banned {
        assert!(
            !words.contains(&name),
            "oci/Cargo.toml: the words depend on{name}"
        );
    }
}

fn product() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn report(broken: impl IntoIterator<Item = String>) {
    let broken: Vec<String> = broken.into_iter().collect();
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

fn sources(folder: &Path) -> Vec<Source> {
    let mut found = Vec::new();
    collect(folder, folder, &mut found);
    found
}

fn collect(root: &Path, folder: &Path, found: &mut Vec<Source>) {
    for entry in
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
    {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(root, &path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("read a source file");
            let path = path
                .strip_prefix(root)
                .expect("below the root")
                .to_string_lossy()
                .into_owned();
            found.push(Source { path, text });
        }
    }
}

/// What of a file breaks the order of the floors.
fn judge_floors(source: &Source) -> Vec<String> {
    let modules = module_path(&source.path);
    let own = modules.first().map_or("lib", String::as_str);
    if ASSEMBLY.contains(&own) {
        return Vec::new();
    }
    let allowed: &[&str] = match FLOORS.iter().find(|(floor, _)| *floor == own) {
        Some((_, allowed)) => allowed,
        None if GROUND.contains(&own) => &[],
        None => {
            return vec![format!(
                "src/{}:1: {own} is on no floor: give it one in tests/it/floors.rs",
                source.path
            )];
        }
    };
    let blanked = blank(&source.text);
    let mentions = paths(&blanked, "crate")
        .into_iter()
        .chain(above(&blanked, &modules));
    mentions
        .filter(|mention| !is_allowed(own, allowed, &mention.segments))
        .map(|mention| {
            let used = mention.segments.join("::");
            let rule = if allowed.is_empty() {
                "the ground".to_owned()
            } else {
                format!("{} and the ground", allowed.join(", "))
            };
            format!(
                "src/{}:{}: {own} uses crate::{used}, but may use only {rule}",
                source.path, mention.line
            )
        })
        .collect()
}

fn is_allowed(own: &str, allowed: &[&str], segments: &[String]) -> bool {
    let Some(floor) = segments.first() else {
        return true;
    };
    if floor == own || GROUND.contains(&floor.as_str()) {
        return true;
    }
    allowed
        .iter()
        .any(|allowed| match allowed.split_once("::") {
            None => allowed == floor,
            Some((allowed, module)) => {
                allowed == floor && segments.get(1).is_some_and(|second| second == module)
            }
        })
}

/// What of a file the specifications' words may not touch.
fn judge_words(source: &Source) -> Vec<String> {
    let blanked = blank(&source.text);
    let mentions = paths(&blanked, "std")
        .into_iter()
        .map(|mention| ("std", mention));
    let mentions = mentions.chain(
        paths(&blanked, "tokio")
            .into_iter()
            .map(|mention| ("tokio", mention)),
    );
    let mut broken = Vec::new();
    for (root, mention) in mentions {
        let used = [&[root.to_owned()], mention.segments.as_slice()]
            .concat()
            .join("::");
        let banned = NOT_IN_WORDS
            .iter()
            .find(|banned| used == **banned || used.starts_with(&format!("{banned}::")));
        if let Some(banned) = banned {
            broken.push(format!(
                "oci/src/{}:{}: uses {used}; the words know no {banned}",
                source.path, mention.line
            ));
        }
    }
    broken
}

/// What is wrong with a file's name or length.
fn judge_file(source: &Source) -> Vec<String> {
    let mut broken = Vec::new();
    for name in source.path.trim_end_matches(".rs").split('/') {
        if EMPTY_NAMES.contains(&name) {
            broken.push(format!(
                "{}:1: {name} says nothing of what it is for",
                source.path
            ));
        }
    }
    let length = product_lines(&source.text);
    let is_product = !source.path.ends_with("tests.rs");
    if is_product && length > LONGEST {
        broken.push(format!(
            "{}:{LONGEST}: {length} lines of product; a file has at most {LONGEST}",
            source.path
        ));
    }
    broken
}

/// What of the product's dependencies is only for tests.
fn judge_dependencies(file: &str, text: &str) -> Vec<String> {
    let mut section = String::new();
    let mut broken = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            line.trim_matches(['[', ']']).clone_into(&mut section);
        }
        let shipped = section.ends_with("dependencies") && !section.ends_with("dev-dependencies");
        let named = line
            .split(['=', '.', ' '])
            .next()
            .unwrap_or_default()
            .trim_matches('"')
            == "testbed";
        let own_section = section.ends_with("dependencies.testbed")
            && !section.contains("dev-dependencies")
            && line.starts_with('[');
        if (shipped && named) || own_section {
            broken.push(format!(
                "{file}:{}: testbed is never shipped: only dev-dependencies may name it",
                number + 1
            ));
        }
    }
    broken
}

/// `http/body.rs` is `[http, body]`, `store/mod.rs` is `[store]`.
fn module_path(path: &str) -> Vec<String> {
    let mut modules: Vec<String> = path
        .trim_end_matches(".rs")
        .split('/')
        .map(str::to_owned)
        .collect();
    if modules.last().is_some_and(|last| last == "mod") {
        modules.pop();
    }
    modules
}

/// The lines above the tests at a file's foot.
fn product_lines(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let tests = lines
        .windows(2)
        .position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod tests"));
    tests.unwrap_or(lines.len())
}

/// Paths by which a file leaves its floor through `super`, from the crate's root on: it takes as many as the module is deep. Modules
/// within a file add a step, so the tests at the foot are left out.
fn above(blanked: &str, modules: &[String]) -> Vec<Mention> {
    let product: String = blanked
        .lines()
        .take(product_lines(blanked))
        .flat_map(|line| [line, "\n"])
        .collect();
    // The first `super` is the word that was looked for; it is not among the segments.
    let further = modules.len() - 1;
    let at_root = |mention: &Mention| {
        mention
            .segments
            .iter()
            .take(further)
            .filter(|segment| *segment == "super")
            .count()
            == further
    };
    let mut found = paths(&product, "super");
    found.retain(at_root);
    for mention in &mut found {
        mention.segments.drain(..further);
    }
    found
}

/// Every path that starts with `root::`, as its segments after it. Of a group each member is a path of its own.
fn paths(blanked: &str, root: &str) -> Vec<Mention> {
    let text: Vec<char> = blanked.chars().collect();
    let mut found = Vec::new();
    let mut line = 1;
    for at in 0..text.len() {
        if text[at] == '\n' {
            line += 1;
        }
        let fresh = at == 0 || !is_word(text[at - 1]) && !is_path_before(&text[..at]);
        let after = at + root.chars().count();
        let here = fresh
            && text
                .get(at..after)
                .is_some_and(|word| word.iter().copied().eq(root.chars()));
        if here && text.get(after..after + 2) == Some(&[':', ':']) {
            let mut reader = Reader {
                text: &text,
                at: after + 2,
                line,
            };
            reader.tree(&[], &mut found);
        }
    }
    found
}

/// Whether `::` stands before, so that the word is the middle of a path (`$crate::` and `::std::` count as its beginning).
fn is_path_before(before: &[char]) -> bool {
    before.ends_with(&[':', ':']) && before.iter().rev().nth(2).is_some_and(|c| is_word(*c))
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Reads use-trees.
struct Reader<'a> {
    text: &'a [char],
    at: usize,
    line: usize,
}

impl Reader<'_> {
    fn peek(&mut self) -> Option<char> {
        while let Some(c) = self
            .text
            .get(self.at)
            .copied()
            .filter(|c| c.is_whitespace())
        {
            self.line += usize::from(c == '\n');
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn tree(&mut self, before: &[String], found: &mut Vec<Mention>) {
        let line = {
            self.peek();
            self.line
        };
        if self.peek() == Some('{') {
            return self.group(before, found);
        }
        let mut segments = before.to_vec();
        let start = self.at;
        while self.text.get(self.at).copied().is_some_and(is_word) {
            self.at += 1;
        }
        segments.push(self.text[start..self.at].iter().collect());
        if self.text.get(self.at..self.at + 2) == Some(&[':', ':']) {
            self.at += 2;
            return self.tree(&segments, found);
        }
        segments.retain(|segment| !segment.is_empty());
        found.push(Mention { line, segments });
    }

    fn group(&mut self, before: &[String], found: &mut Vec<Mention>) {
        self.at += 1;
        loop {
            match self.peek() {
                None => return,
                Some('}') => {
                    self.at += 1;
                    return;
                }
                Some(c) if is_word(c) || c == '{' => self.tree(before, found),
                // `*`, `as`'s new name and commas say nothing of where a path leads.
                Some(_) => self.at += 1,
            }
            self.skip_rename();
        }
    }

    fn skip_rename(&mut self) {
        self.peek();
        if self.text.get(self.at..self.at + 3) == Some(&['a', 's', ' ']) {
            self.at += 3;
            while self.text.get(self.at).copied().is_some_and(is_word) {
                self.at += 1;
            }
        }
    }
}

/// The text with comments, strings and characters blanked, line by line as long as it was.
fn blank(text: &str) -> String {
    let text: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let end = skipped(&text, at);
        if end == at {
            out.push(text[at]);
            at += 1;
        } else {
            out.extend(
                text[at..end]
                    .iter()
                    .map(|c| if *c == '\n' { '\n' } else { ' ' }),
            );
            at = end;
        }
    }
    out
}

/// Where the comment, string or character that starts here ends; here when none starts.
fn skipped(text: &[char], at: usize) -> usize {
    let rest = &text[at..];
    let before = at.checked_sub(1).map(|before| text[before]);
    match rest {
        ['/', '/', ..] => at + rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
        ['/', '*', ..] => at + block_comment(rest),
        ['"', ..] => at + quoted(rest, '"'),
        ['r', ..] if !before.is_some_and(is_word) || before == Some('b') => at + raw_string(rest),
        ['\'', '\\', ..] => at + quoted(rest, '\''),
        ['\'', _, '\'', ..] => at + 3,
        _ => at,
    }
}

fn block_comment(rest: &[char]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        match &rest[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    at
}

fn quoted(rest: &[char], mark: char) -> usize {
    let mut at = 1;
    while let Some(c) = rest.get(at) {
        match c {
            '\\' => at += 2,
            c if *c == mark => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

fn raw_string(rest: &[char]) -> usize {
    let hashes = rest[1..].iter().take_while(|c| **c == '#').count();
    if rest.get(1 + hashes) != Some(&'"') {
        return 0;
    }
    let end: Vec<char> = std::iter::once('"')
        .chain(std::iter::repeat_n('#', hashes))
        .collect();
    let body = 2 + hashes;
    let length = rest[body..]
        .windows(end.len())
        .position(|window| window == end);
    length.map_or(rest.len(), |length| body + length + end.len())
}

fn source(path: &str, text: &str) -> Source {
    Source {
        path: path.to_owned(),
        text: text.to_owned(),
    }
}

#[test]
fn a_floor_that_looks_up_is_found() {
    let cases = [
        ("store/spool.rs", "use crate::upstream::Body;", 1),
        (
            "store/spool.rs",
            "\n\nfn f() -> crate::fill::Key { todo!() }",
            3,
        ),
        ("upstream/mod.rs", "use crate::store::Store;", 1),
        (
            "policy/mod.rs",
            "use crate::{\n    names::Source,\n    cache::Cache,\n};",
            3,
        ),
        ("fill/find.rs", "use crate::policy::Grant;", 1),
        ("cache/blob.rs", "use crate::http::body::Body;", 1),
        ("http/blob.rs", "use crate::store::Blob;", 1),
        (
            "http/blob.rs",
            "use crate::store::{span::Span, spool::Spool};",
            1,
        ),
        ("http/blob.rs", "use crate::store;", 1),
        ("http/blob.rs", "use crate::config::Config;", 1),
        ("admin/mod.rs", "use crate::http::dispatch::Registry;", 1),
        ("clock.rs", "use crate::store::Store;", 1),
        ("clock.rs", "use super::store::Store;", 1),
        ("http/listen/mod.rs", "use super::super::fill::Fills;", 1),
        ("http/body.rs", "use super::super::fill::Fills;", 1),
        ("nowhere/mod.rs", "", 1),
    ];
    for (path, text, line) in cases {
        let broken = judge_floors(&source(path, text));
        assert_eq!(broken.len(), 1, "{path}: {text}: {broken:?}");
        assert!(
            broken[0].starts_with(&format!("src/{path}:{line}: ")),
            "{broken:?}"
        );
    }
}

#[test]
fn a_floor_that_looks_down_is_left_alone() {
    let cases = [
        (
            "store/spool.rs",
            "use super::span::Span; use crate::store::pieces::PieceMap; use crate::{clock::Clock, metrics::Metrics};",
        ),
        (
            "store/spool.rs",
            "// use crate::fill::Fills;\n/* crate::http::x */ const A: &str = \"crate::http::body\";",
        ),
        (
            "store/spool.rs",
            "const A: &str = r#\"use crate::http::\"body\";\"#; const B: char = '\"'; use crate::names::Source;",
        ),
        (
            "store/catalog/write.rs",
            "use super::super::span::Span; use super::super::super::names::Source;",
        ),
        (
            "http/blob.rs",
            "use crate::store::span::Span; use crate::cache::blob::{Blob, Tail}; use super::body::Body;",
        ),
        (
            "http/blob.rs",
            "pub(crate) fn f<'a>(a: &'a str) -> &'a str { a }",
        ),
        (
            "admin/mod.rs",
            "use crate::http::{body::Body, listen::Handler, problem::Problem}; use crate::store::Store;",
        ),
        ("fill/mod.rs", "mod tests { use super::*; }"),
        (
            "app.rs",
            "use crate::cli::ls::Row; use crate::store::Store;",
        ),
        ("lib.rs", "pub mod store;"),
    ];
    for (path, text) in cases {
        let broken = judge_floors(&source(path, text));
        assert!(broken.is_empty(), "{path}: {text}: {broken:?}");
    }
}

#[test]
fn words_that_reach_out_are_found() {
    for text in [
        "use tokio::sync::Mutex;",
        "use std::fs::File;",
        "use std::{fmt, fs};",
        "use std::net::{IpAddr, Ipv4Addr};",
        "fn f() { std::time::SystemTime::now(); }",
        "use std::time::{Duration, SystemTime};",
    ] {
        assert!(
            !judge_words(&source("digest.rs", text)).is_empty(),
            "{text}"
        );
    }
    for text in [
        "use std::fmt;",
        "use std::time::Duration;",
        "// tokio::spawn",
        "use std::str::FromStr; use std::collections::{HashMap, HashSet};",
    ] {
        assert_eq!(
            judge_words(&source("digest.rs", text)),
            Vec::<String>::new(),
            "{text}"
        );
    }
}

#[test]
fn files_that_break_the_rules_are_found() {
    let long = "fn f() {}\n".repeat(LONGEST + 1);
    let tested = format!("fn f() {{}}\n#[cfg(test)]\nmod tests {{\n{long}}}\n");
    assert_eq!(judge_file(&source("store/helper.rs", "")).len(), 1);
    assert_eq!(judge_file(&source("util/x.rs", "")).len(), 1);
    assert_eq!(judge_file(&source("store/x.rs", &long)).len(), 1);
    assert_eq!(
        judge_file(&source("store/media_type.rs", &tested)),
        Vec::<String>::new()
    );
    assert_eq!(
        judge_file(&source("store/tests.rs", &long)),
        Vec::<String>::new()
    );
}

#[test]
fn a_shipped_test_bed_is_found() {
    for text in [
        "[dependencies]\ntestbed = { workspace = true }",
        "[build-dependencies]\ntestbed.workspace = true",
        "[dependencies.testbed]\npath = \"../testbed\"",
        "[target.'cfg(unix)'.dependencies]\ntestbed = \"1\"",
    ] {
        assert_eq!(judge_dependencies("Cargo.toml", text).len(), 1, "{text}");
    }
    let fine = "[dependencies]\nbytes = \"1\"\n[dev-dependencies]\ntestbed = { workspace = true }\n[dev-dependencies.testbed]\npath = \"x\"";
    assert_eq!(judge_dependencies("Cargo.toml", fine), Vec::<String>::new());
}
