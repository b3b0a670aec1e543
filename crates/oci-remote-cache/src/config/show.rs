//! `config show`: the effective configuration as TOML, each value with the place it came from.
//!
//! What it prints reads back as a configuration, but for secrets, which are three stars.

use std::fmt::Write as _;

use super::error::one_line;
use super::keys::{Default, Key, KeyPath, TABLES, keys};
use super::settings::{Setting, Settings};
use super::value::{SecretSource, Typed as _, quoted};

/// `settings` as TOML.
pub fn show(settings: &Settings) -> String {
    let mut text = String::new();
    for (table, _) in TABLES {
        if *table == ["upstreams", "*"] {
            for (upstream, origin) in settings.upstreams() {
                // Writing to a String cannot fail, here and below.
                writeln!(text, "\n[upstreams.{}]  # {origin}", quoted(upstream)).ok();
                lines(&mut text, settings, table, upstream);
            }
        } else {
            if let [name] = table {
                writeln!(text, "\n[{name}]").ok();
            }
            lines(&mut text, settings, table, "");
        }
    }
    text
}

fn lines(text: &mut String, settings: &Settings, table: &[&str], upstream: &str) {
    for key in keys().filter(|key| key.table() == table) {
        let path = key.path_in(upstream);
        let line = match settings.get(&path) {
            Some(setting) => set(key, setting),
            None => unset(key, settings, &path),
        };
        writeln!(text, "{line}").ok();
    }
}

fn set(key: &Key, setting: &Setting) -> String {
    let name = key.name().join(".");
    let source = match SecretSource::of(&setting.value) {
        Some(SecretSource::File(path)) => format!(", read from {}", path.display()),
        Some(SecretSource::Variable(name)) => format!(", read from env {name}"),
        Some(SecretSource::Text(_)) | None => String::new(),
    };
    let comment = one_line(&format!("{}{source}", setting.origin));
    format!("{name} = {}  # {comment}", setting.value.literal())
}

fn unset(key: &Key, settings: &Settings, path: &KeyPath) -> String {
    let name = key.name().join(".");
    match key.default {
        Default::Words(words) => format!("# {name}  # default: {words}"),
        Default::Text(_) => {
            debug_assert!(settings.get(path).is_some(), "{path} has a default");
            format!("# {name}")
        }
    }
}
