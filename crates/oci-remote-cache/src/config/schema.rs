//! A JSON Schema of the configuration file, for editors, made from the list of keys.

use serde_json::{Map, Value as Json, json};

use super::keys::{Default, Key, Kind, TABLES, keys};
use super::pages::default_literal;

/// The schema, indented.
pub fn schema() -> String {
    let mut root = table(&[]);
    if let Some(root) = root.as_object_mut() {
        root.insert(
            "$schema".to_owned(),
            json!("https://json-schema.org/draft/2020-12/schema"),
        );
        root.insert("title".to_owned(), json!("oci-remote-cache configuration"));
    }
    format!("{root:#}\n")
}

/// The object for the table at `path`, with all that lies below it.
fn table(path: &[&'static str]) -> Json {
    let mut properties = Map::new();
    let mut any = None;
    for key in keys().filter(|key| key.path.starts_with(path)) {
        let Some(step) = key.path.get(path.len()) else {
            continue;
        };
        let below = [path, &[*step]].concat();
        let is_key = below.len() == key.path.len();
        let entry = || match (is_key, key.is_table_too()) {
            (true, true) => {
                json!({ "description": key.doc, "anyOf": [leaf(key), table(&below)] })
            }
            (true, false) => leaf(key),
            (false, _) => table(&below),
        };
        if *step == "*" {
            any.get_or_insert_with(entry);
        } else if !properties.contains_key(*step) {
            properties.insert((*step).to_owned(), entry());
        }
    }
    let mut object = json!({
        "type": "object",
        "additionalProperties": any.unwrap_or(Json::Bool(false)),
    });
    if let Some(object) = object.as_object_mut() {
        if !properties.is_empty() {
            object.insert("properties".to_owned(), Json::Object(properties));
        }
        if let Some((_, doc)) = TABLES.iter().find(|(table, _)| *table == path) {
            object.insert("description".to_owned(), json!(doc));
        }
    }
    object
}

fn leaf(key: &Key) -> Json {
    let mut leaf = shape(key.kind);
    if let Some(leaf) = leaf.as_object_mut() {
        let doc = match key.default {
            Default::Words(words) => format!("{} Default: {words}.", key.doc),
            Default::Text(_) => key.doc.to_owned(),
        };
        leaf.insert("description".to_owned(), json!(doc));
        // The literals of strings, booleans, numbers and lists of strings are the same in TOML and JSON.
        let default = default_literal(key).and_then(|text| serde_json::from_str(&text).ok());
        if let Some(default) = default {
            leaf.insert("default".to_owned(), default);
        }
        if let Ok(example) = serde_json::from_str::<Json>(key.example) {
            leaf.insert("examples".to_owned(), json!([example]));
        }
    }
    leaf
}

fn size(least: u64) -> Json {
    json!({ "anyOf": [
        { "type": "integer", "minimum": least },
        { "type": "string", "pattern": "^ *[0-9]+(\\.[0-9]+)? *([KkMmGgTt][Ii]?)?[Bb] *$|^ *[0-9]+ *$" },
    ]})
}

fn shape(kind: Kind) -> Json {
    let text = json!({ "type": "string" });
    let list = json!({ "type": "array", "items": text });
    let url = json!({ "type": "string", "pattern": "^[Hh][Tt][Tt][Pp][Ss]?://[^@?#]+$" });
    match kind {
        Kind::Address | Kind::Path | Kind::UpstreamName | Kind::LogFilter | Kind::Username => text,
        Kind::Size => size(1),
        Kind::SizeOrNothing => size(0),
        Kind::Duration => json!({
            "type": "string",
            "pattern": "^ *([0-9]+(\\.[0-9]+)?(ms|s|m|h|d) *)+$",
        }),
        Kind::Flag => json!({ "type": "boolean" }),
        Kind::Count => json!({ "type": "integer", "minimum": 1, "maximum": 65536 }),
        Kind::Url => url,
        Kind::Urls => json!({ "type": "array", "items": url }),
        Kind::Names | Kind::Hosts | Kind::HostsOrNetworks | Kind::Networks | Kind::Rules => list,
        Kind::Secret | Kind::Proxy => json!({ "anyOf": [text, only("file"), only("env")] }),
        Kind::TagRules => json!({ "type": "array", "items": {
            "type": "object",
            "properties": {
                "pattern": text,
                "ttl": shape(Kind::Duration),
                "immutable": { "type": "boolean" },
            },
            "required": ["pattern"],
            "additionalProperties": false,
        }}),
        Kind::Logins => json!({ "type": "array", "items": {
            "type": "object",
            "properties": {
                "repositories": text,
                "username": text,
                "password": shape(Kind::Secret),
            },
            "required": ["repositories", "username", "password"],
            "additionalProperties": false,
        }}),
        Kind::Choice(words) => json!({ "enum": words }),
    }
}

/// A table with this one entry.
fn only(name: &str) -> Json {
    json!({
        "type": "object",
        "properties": { name: { "type": "string" } },
        "required": [name],
        "additionalProperties": false,
    })
}
