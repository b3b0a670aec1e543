//! What was most likely meant by a name that is none of ours.

use super::keys::{KeyPath, keys};

/// What the writer of the unknown key `path` most likely meant.
pub(super) fn suggestion(path: &KeyPath) -> Option<String> {
    elsewhere(path).or_else(|| {
        let depth = path.0.len().saturating_sub(1);
        let siblings = keys().filter_map(|key| {
            let beside = key
                .path
                .iter()
                .zip(&path.0)
                .take(depth)
                .all(|(step, written)| *step == "*" || step == written);
            key.path.get(depth).filter(|_| beside).copied()
        });
        nearest(path.last(), siblings).map(str::to_owned)
    })
}

/// The full path of a key of exactly this name in another table: the commonest slip in TOML is a key below the wrong header.
fn elsewhere(path: &KeyPath) -> Option<String> {
    let upstream = path.0.get(1).filter(|_| path.0.len() > 2);
    let key = keys().find(|key| key.path.last() == Some(&path.last()))?;
    if key.is_upstream() && upstream.is_none() {
        return Some(format!("upstreams.<key>.{}", key.name().join(".")));
    }
    Some(key.path_in(upstream.map_or("", String::as_str)).to_string())
}

/// The candidate most like `name`, if one is like it at all.
pub(super) fn nearest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    const ALIKE: f64 = 0.78;
    candidates
        .into_iter()
        .filter(|candidate| *candidate != "*")
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(score, _)| *score >= ALIKE)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, candidate)| candidate)
}

/// The end of a message about a name that is none of ours.
pub(super) fn hint(meant: Option<&str>) -> String {
    meant.map_or_else(String::new, |meant| format!("; did you mean {meant:?}?"))
}
