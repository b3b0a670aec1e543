//! `tags`: how long tags of some patterns last, as it is written in a file or a variable, and printed again.
//!
//! What the rules mean is the cache's own business (`cache/freshness.rs`).

use super::nearest::nearest;
use super::units::{duration_text, parse_duration};
use super::value::{Written, quoted};
use crate::cache::freshness::Lasting;
use crate::cache::pattern::Pattern;

/// Which tags, and how long they last.
pub(super) type TagRule = (Pattern, Lasting);

const KEYS: [&str; 3] = ["pattern", "ttl", "immutable"];

const A_RULE: &str = "{ pattern = \"…\", ttl = \"…\" } or { pattern = \"…\", immutable = true }";

/// `PATTERN=ttl` or `PATTERN=immutable`: no tag holds a `=`, so neither does a pattern.
pub(super) fn from_variable(item: &str) -> Written {
    let Some((pattern, lasting)) = item.split_once('=') else {
        return Written::Text(item.to_owned());
    };
    let lasting = match lasting.trim() {
        "immutable" => ("immutable".to_owned(), Written::Flag(true)),
        ttl => ("ttl".to_owned(), Written::Text(ttl.to_owned())),
    };
    let pattern = Written::Text(pattern.trim().to_owned());
    Written::Table(vec![("pattern".to_owned(), pattern), lasting])
}

/// Reads an array of tables; the error says which table, counted from one.
pub(super) fn read(written: &Written) -> Result<Vec<TagRule>, String> {
    let Written::List(items) = written else {
        return Err(format!(
            "must be an array of {A_RULE}, found {}",
            written.found()
        ));
    };
    let rules = items.iter().zip(1..);
    rules
        .map(|(item, number)| rule(item).map_err(|what| format!("rule {number} {what}")))
        .collect()
}

/// The rules as TOML.
pub(super) fn literal(rules: &[TagRule]) -> String {
    let rules: Vec<String> = rules
        .iter()
        .map(|(pattern, lasting)| {
            let pattern = quoted(&pattern.to_string());
            match lasting {
                Lasting::For(ttl) => {
                    format!(
                        "{{ pattern = {pattern}, ttl = {} }}",
                        quoted(&duration_text(*ttl))
                    )
                }
                Lasting::Ever => format!("{{ pattern = {pattern}, immutable = true }}"),
            }
        })
        .collect();
    format!("[{}]", rules.join(", "))
}

fn rule(written: &Written) -> Result<TagRule, String> {
    let Written::Table(entries) = written else {
        return Err(format!("must be {A_RULE}, found {}", written.found()));
    };
    if let Some((name, _)) = entries
        .iter()
        .find(|(name, _)| !KEYS.contains(&name.as_str()))
    {
        let meant = nearest(name, KEYS).unwrap_or("ttl");
        return Err(format!(
            "has the unknown key {name:?}; did you mean {meant:?}?"
        ));
    }
    let find = |name: &str| {
        entries
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value)
    };
    let pattern = match find("pattern") {
        Some(Written::Text(pattern)) => pattern
            .parse()
            .map_err(|error| format!("has the bad pattern {pattern:?}: {error}"))?,
        Some(_) | None => return Err("needs a pattern, as a string".to_owned()),
    };
    let lasting = match (find("ttl"), find("immutable")) {
        (Some(Written::Text(ttl)), None | Some(Written::Flag(false))) => {
            Lasting::For(parse_duration(ttl).map_err(|what| format!("has a {what}"))?)
        }
        (None, Some(Written::Flag(true))) => Lasting::Ever,
        _ => return Err(format!("must be {A_RULE}")),
    };
    Ok((pattern, lasting))
}
