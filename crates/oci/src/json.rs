//! A bounded reading of manifest JSON: only the fields this crate knows, no deeper and no longer than it needs.
//!
//! Manifests come from strangers. A general JSON tree of a hostile 4 MiB body takes many times its size, so everything
//! unknown is checked for syntax and dropped while it is read. Nothing outside `descriptor` and `manifest` needs this.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Entries kept of one array.
const LIST_LIMIT: usize = 10_000;
/// Longest text kept; digests end at 512.
const TEXT_LIMIT: usize = 1024;
/// How deep values are kept: manifest, list, descriptor, platform, text.
const DEPTH_LIMIT: u8 = 4;
/// Where arrays are kept: as the fields of the manifest itself.
const LIST_DEPTH: u8 = 1;

/// No spelling of a field is longer.
const FIELD_LIMIT: usize = 64;

/// The fields that are kept, in lower case.
const FIELDS: [&str; 18] = [
    "mediatype",
    "digest",
    "size",
    "platform",
    "os",
    "architecture",
    "variant",
    "artifacttype",
    "manifests",
    "layers",
    "config",
    "subject",
    "blobs",
    "fslayers",
    "annotations",
    // What marks a layer that is read in pieces: podman's zstd:chunked, eStargz, nydus.
    "io.github.containers.zstd-chunked.manifest-checksum",
    "containerd.io/snapshot/stargz/toc.digest",
    "containerd.io/snapshot/nydus-blob",
];

/// What is kept of a JSON value.
#[derive(Debug, PartialEq)]
pub(crate) enum Node {
    Null,
    Text(String),
    Number(u64),
    List(Vec<Node>),
    Object(Vec<(&'static str, Node)>),
    /// An object that names one field twice, be it in different spelling: readers disagree about what it says.
    Repeated,
    /// Anything else.
    Other,
}

impl Node {
    /// Reads one whole JSON text.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let mut reader = serde_json::Deserializer::from_slice(bytes);
        let node = Depth(0).deserialize(&mut reader)?;
        reader.end()?;
        Ok(node)
    }

    /// A field of an object, unless it is `null`: Go reads that as absent.
    pub(crate) fn get(&self, field: &str) -> Option<&Self> {
        let Self::Object(fields) = self else {
            return None;
        };
        fields
            .iter()
            .find(|(name, value)| *name == field && *value != Self::Null)
            .map(|(_, value)| value)
    }

    /// A field that holds a text; an empty one counts as absent, as Go's `omitempty` writes it.
    pub(crate) fn text(&self, field: &str) -> Option<&str> {
        let Self::Text(text) = self.get(field)? else {
            return None;
        };
        (!text.is_empty()).then_some(text)
    }

    /// A field that holds a whole number.
    pub(crate) fn number(&self, field: &str) -> Option<u64> {
        let Self::Number(number) = self.get(field)? else {
            return None;
        };
        Some(*number)
    }

    /// The entries of a field that holds an array; none for anything else.
    pub(crate) fn list(&self, field: &str) -> &[Self] {
        match self.get(field) {
            Some(Self::List(nodes)) => nodes,
            _ => &[],
        }
    }
}

/// Reads a value that stands this deep.
#[derive(Clone, Copy)]
struct Depth(u8);

impl<'de> DeserializeSeed<'de> for Depth {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        if self.0 > DEPTH_LIMIT {
            return deserializer
                .deserialize_ignored_any(IgnoredAny)
                .map(|_| Node::Other);
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Depth {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_u64<E>(self, number: u64) -> Result<Node, E> {
        Ok(Node::Number(number))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_str<E>(self, text: &str) -> Result<Node, E> {
        if text.len() > TEXT_LIMIT {
            return Ok(Node::Other);
        }
        Ok(Node::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
        let mut nodes = Vec::new();
        while self.0 == LIST_DEPTH && nodes.len() < LIST_LIMIT {
            match list.next_element_seed(Self(self.0 + 1))? {
                Some(node @ Node::Object(_)) => nodes.push(node),
                Some(_) => {}
                None => return Ok(Node::List(nodes)),
            }
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Node::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut fields: Vec<(&'static str, Node)> = Vec::new();
        let mut repeated = false;
        while let Some(Key(key)) = map.next_key()? {
            let Some(name) = key else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let value = map.next_value_seed(Self(self.0 + 1))?;
            repeated |= fields.iter().any(|(other, _)| *other == name);
            if !repeated {
                fields.push((name, value));
            }
        }
        Ok(if repeated {
            Node::Repeated
        } else {
            Node::Object(fields)
        })
    }
}

/// The name of a field, if it is one that is kept.
struct Key(Option<&'static str>);

impl<'de> serde::Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(KeyVisitor)
    }
}

struct KeyVisitor;

impl Visitor<'_> for KeyVisitor {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E>(self, text: &str) -> Result<Key, E> {
        Ok(Key(known_field(text)))
    }
}

/// Go's `encoding/json` ignores case when it matches field names, even for the long s that folds to `s`. What a Go client
/// would read as `manifests` must be seen as `manifests` here too.
fn known_field(text: &str) -> Option<&'static str> {
    if text.is_ascii() {
        return FIELDS
            .into_iter()
            .find(|field| field.eq_ignore_ascii_case(text));
    }
    if text.len() > FIELD_LIMIT {
        return None;
    }
    let folded = text.to_uppercase().to_lowercase();
    FIELDS.into_iter().find(|field| *field == folded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Node {
        Node::read(text.as_bytes()).unwrap()
    }

    #[test]
    fn only_known_fields_are_kept() {
        let node = read(
            r#"{"mediaType":"x","a":{"b":[1]},"size":5,"config":{"digest":"d","data":"zzz"}}"#,
        );
        let config = Node::Object(vec![("digest", Node::Text("d".to_owned()))]);
        let fields = vec![
            ("mediatype", Node::Text("x".to_owned())),
            ("size", Node::Number(5)),
            ("config", config),
        ];
        assert_eq!(node, Node::Object(fields));
    }

    #[test]
    fn kinds_of_value() {
        let node = read(
            r#"{"os":null,"size":-1,"digest":1.5,"config":true,"layers":[1,[{}],null,{},"x"],"variant":""}"#,
        );
        assert_eq!(node.get("os"), None);
        assert_eq!(node.get("architecture"), None);
        assert_eq!(
            (node.get("size"), node.number("size")),
            (Some(&Node::Other), None)
        );
        assert_eq!(node.get("digest"), Some(&Node::Other));
        assert_eq!(node.get("config"), Some(&Node::Other));
        assert_eq!(node.list("layers"), [Node::Object(vec![])]);
        assert_eq!(node.text("variant"), None);
        assert_eq!(node.list("size"), []);
        assert_eq!(read("[]").get("size"), None);
    }

    #[test]
    fn field_names_fold_as_in_go() {
        for text in [
            r#"{"MANIFESTS":[{}]}"#,
            r#"{"manife\u017fts":[{}]}"#,
            r#"{"manifeſts":[{}]}"#,
            r#"{"\u006danifests":[{}]}"#,
        ] {
            assert_eq!(read(text).list("manifests").len(), 1, "{text}");
        }
        assert_eq!(read(r#"{"manifests":[],"Manifests":[]}"#), Node::Repeated);
        assert_eq!(
            read(r#"{"config":{"size":1,"SIZE":2}}"#).get("config"),
            Some(&Node::Repeated)
        );
        assert_eq!(
            read(&format!(r#"{{"{}":1}}"#, "ſ".repeat(80))),
            Node::Object(vec![])
        );
    }

    #[test]
    fn bounds() {
        let list = |count: usize| format!(r#"{{"layers":[{}]}}"#, vec!["{}"; count].join(","));
        assert_eq!(read(&list(LIST_LIMIT)).list("layers").len(), LIST_LIMIT);
        assert_eq!(read(&list(LIST_LIMIT + 7)).list("layers").len(), LIST_LIMIT);
        let text = |length: usize| {
            read(&format!(r#"{{"os":"{}"}}"#, "a".repeat(length)))
                .text("os")
                .map(str::len)
        };
        assert_eq!(text(TEXT_LIMIT), Some(TEXT_LIMIT));
        assert_eq!(text(TEXT_LIMIT + 1), None);
        let deep = format!(
            r#"{{"config":{}1{}}}"#,
            r#"{"config":"#.repeat(100),
            "}".repeat(100)
        );
        assert!(matches!(Node::read(deep.as_bytes()), Ok(Node::Object(_))));
        let unknown = format!(r#"{{"x":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(read(&unknown), Node::Object(vec![]));
    }

    #[test]
    fn whole_texts_only() {
        for text in [
            "",
            "{",
            "{}{}",
            "{} x",
            "nul",
            r#"{"layers":[}"#,
            r#"{"size":1,}"#,
        ] {
            assert!(Node::read(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Node::read(b" {} \n").is_ok());
    }
}
