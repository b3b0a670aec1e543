//! The commented template of `config init` and the reference page, both made from the list of keys.

use std::fmt::Write as _;

use super::builtin::BUILT_IN;
use super::env::variable;
use super::keys::{Default, Key, Kind, TABLES, keys};
use super::value::{Value, Written};

/// How wide comments get.
const WIDTH: usize = 100;

/// A configuration file in which every key is explained and nothing is set.
pub fn template() -> String {
    let mut text = String::from(
        "# Configuration of oci-remote-cache. Everything here is optional: what is commented out shows the default or an example.\n\
         # Environment variables and flags override this file; `oci-remote-cache config show` tells where each value came from.\n",
    );
    for (table, doc) in TABLES {
        text.push('\n');
        comment(&mut text, doc);
        match table {
            ["upstreams", "*"] => {
                comment(&mut text, &format!("Built in: {}.", built_in()));
                text.push_str("#[upstreams.\"registry.example.com\"]\n");
            }
            [name] => line(&mut text, &format!("[{name}]")),
            _ => {}
        }
        for key in keys().filter(|key| key.table() == *table) {
            text.push('\n');
            template_key(&mut text, key);
        }
    }
    text
}

/// The reference page, in Markdown.
pub fn reference() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         TOML, given with `--config FILE`. Environment variables override the file, flags override both. Everything is optional; \
         `oci-remote-cache config check` judges a configuration and `config show` tells where each value came from.\n\n\
         In the names of variables `__` steps into a table and every character but letters and digits becomes `_`. Lists are \
         separated by commas. A variable can set keys of upstreams that are built in or in the file, but add none.\n\n\
         Sizes are bytes or carry a unit (`50GiB`, `500MB`); durations are like `10s`, `1m`, `1h30m` or `1.5s`. A password is text, \
         `{ file = \"…\" }` or `{ env = \"…\" }`; variables for the latter two end in `__FILE` and `__ENV`.\n",
    );
    for (table, doc) in TABLES {
        let title = match table {
            [] => "Top level".to_owned(),
            ["upstreams", ..] => "`[upstreams.\"<key>\"]`".to_owned(),
            _ => format!("`[{}]`", table.join(".")),
        };
        write!(text, "\n## {title}\n\n{doc}\n").ok();
        if table.first() == Some(&"upstreams") {
            write!(text, "\nBuilt in: {}.\n", built_in()).ok();
        }
        for key in keys().filter(|key| key.table() == *table) {
            reference_key(&mut text, key);
        }
    }
    text
}

/// What a kind of value is called.
fn shape(kind: Kind) -> String {
    let name = match kind {
        Kind::Address => "`address:port`",
        Kind::Path => "path",
        Kind::UpstreamName => "key or alias of an upstream",
        Kind::LogFilter => "log filter",
        Kind::Size => "size",
        Kind::SizeOrNothing => "size or `0`",
        Kind::Duration => "duration",
        Kind::Flag => "`true` or `false`",
        Kind::Count => "whole number",
        Kind::Url => "URL",
        Kind::Urls => "list of URLs",
        Kind::Names => "list of names",
        Kind::Hosts => "list of `host` or `host:port`",
        Kind::HostsOrNetworks => "list of `host`, `host:port` or `address/prefix`",
        Kind::Networks => "list of `address/prefix`",
        Kind::Rules => "list of `who what where`",
        Kind::Username => "text",
        Kind::Secret => "secret",
        Kind::Proxy => "proxy",
        Kind::TagRules => {
            "list of `{ pattern = \"…\", ttl = \"…\" }` or `{ pattern = \"…\", immutable = true }`"
        }
        Kind::Logins => "list of `{ repositories = \"…\", username = \"…\", password = … }`",
        Kind::Choice(words) => {
            let words: Vec<String> = words.iter().map(|word| format!("`\"{word}\"`")).collect();
            return words.join(" or ");
        }
    };
    name.to_owned()
}

/// The default as TOML, where there is one that can be written.
pub(super) fn default_literal(key: &Key) -> Option<String> {
    let Default::Text(text) = key.default else {
        return None;
    };
    let value = Value::read(key.kind, &Written::from_variable(key.kind, text));
    value.ok().map(|value| value.literal())
}

fn template_key(text: &mut String, key: &Key) {
    comment(text, key.doc);
    let value = match key.default {
        Default::Text(_) => default_literal(key),
        Default::Words(words) => {
            comment(text, &format!("Default: {words}."));
            None
        }
    };
    let value = value.unwrap_or_else(|| key.example.to_owned());
    let setting = format!("{} = {value}", key.name().join("."));
    if key.is_table_too() {
        // The keys of the table follow, and only one of both can be set.
        comment(text, &setting);
    } else {
        line(text, &setting);
    }
}

fn reference_key(text: &mut String, key: &Key) {
    let default = match (key.default, default_literal(key)) {
        (Default::Words(words), _) => words.to_owned(),
        (Default::Text(_), Some(literal)) => format!("`{literal}`"),
        (Default::Text(text), None) => text.to_owned(),
    };
    let name = key.name().join(".");
    write!(
        text,
        "\n### `{name}`\n\n{}\n\n- Value: {}\n- Default: {default}\n- Example: `{name} = {}`\n",
        key.doc,
        shape(key.kind),
        key.example,
    )
    .ok();
    if key.kind != Kind::Logins {
        writeln!(text, "- Variable: `{}`", variable_of(key)).ok();
    }
}

/// The variable for `key`, with `<KEY>` in place of an upstream's own key.
fn variable_of(key: &Key) -> String {
    let name = variable(key.path);
    if key.is_upstream() {
        // The star of the path became an underscore.
        name.replacen("UPSTREAMS_____", "UPSTREAMS__<KEY>__", 1)
    } else {
        name
    }
}

fn built_in() -> String {
    let names: Vec<&str> = BUILT_IN.iter().map(|upstream| upstream.key).collect();
    names.join(", ")
}

/// A line that takes effect when its `#` is removed.
fn line(text: &mut String, setting: &str) {
    writeln!(text, "#{setting}").ok();
}

/// A comment: its `#` is followed by a space.
fn comment(text: &mut String, words: &str) {
    let mut length = 0;
    for word in words.split_whitespace() {
        let needed = word.chars().count().saturating_add(1);
        if length > 0 && length + needed > WIDTH {
            text.push('\n');
            length = 0;
        }
        text.push_str(if length == 0 { "# " } else { " " });
        text.push_str(word);
        length += needed;
    }
    text.push('\n');
}
