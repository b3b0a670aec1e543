//! The configuration file: TOML to entries, each with its line.
//!
//! Refuses what is no key; values are judged by `value.rs` once all sources are known.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Origin, Problem};
use super::hosts::read_name;
use super::keys::{Found, Key, KeyPath, find};
use super::nearest::suggestion;
use super::value::Written;

/// Larger than any configuration; smaller than what `--config /dev/zero` would read.
const LARGEST_FILE: u64 = 4 << 20;

/// What a file says.
#[derive(Default)]
pub(super) struct File {
    /// Its values, in no order.
    pub(super) entries: Vec<Entry>,
    /// The upstreams it has sections for.
    pub(super) upstreams: BTreeMap<String, Origin>,
}

/// One value that a source gives to one key.
pub(super) struct Entry {
    /// The key.
    pub(super) key: &'static Key,
    /// Its path, with the upstream filled in.
    pub(super) path: KeyPath,
    /// The value, not yet judged.
    pub(super) written: Written,
    /// Who says so.
    pub(super) origin: Origin,
}

/// A file being read: its text, what was found and what is wrong.
struct Reader<'a> {
    name: Arc<str>,
    text: &'a str,
    file: File,
    problems: Vec<(usize, Problem)>,
}

/// Reads the file at `path`.
pub(super) fn read(path: &Path) -> Result<File, ConfigError> {
    let name = path.to_string_lossy();
    match content(path) {
        Ok(text) => parse(&name, &text),
        Err(error) => Err(Problem::of(&name, format!("cannot read this file: {error}")).into()),
    }
}

/// Reads `text`, which messages call `name`.
pub(super) fn parse(name: &str, text: &str) -> Result<File, ConfigError> {
    let mut reader = Reader {
        name: Arc::from(name),
        text,
        file: File::default(),
        problems: Vec::new(),
    };
    match DeTable::parse(text) {
        Ok(table) => reader.table(&KeyPath(Vec::new()), table.get_ref()),
        Err(error) => {
            let line = error.span().map_or(1, |span| reader.line(span.start));
            let what = format!("not valid TOML: {}", error.message());
            return Err(Problem::of(&format!("{name}:{line}"), what).into());
        }
    }
    // The parser sorts tables by key; people read files from the top.
    reader.problems.sort_by_key(|(line, _)| *line);
    let problems = reader.problems.into_iter().map(|(_, problem)| problem);
    ConfigError::unless_any(problems.collect(), reader.file)
}

fn content(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file = fs::File::open(path)?;
    let length = file.take(LARGEST_FILE).read_to_string(&mut text)?;
    if u64::try_from(length).unwrap_or(u64::MAX) == LARGEST_FILE {
        return Err(io::Error::other("larger than 4 MiB"));
    }
    Ok(text)
}

impl Reader<'_> {
    fn table(&mut self, at: &KeyPath, table: &DeTable<'_>) {
        for (name, value) in table {
            let path = at.child(name.get_ref());
            let line = self.line(name.span().start);
            match find(&path) {
                Found::Either(_) if value.get_ref().is_table() => self.subtable(&path, line, value),
                Found::Key(key) | Found::Either(key) => {
                    self.value(key, path, line, value.get_ref());
                }
                Found::Table => self.subtable(&path, line, value),
                Found::Nothing => self.refuse(&path, line, &unknown(&path, value.get_ref())),
            }
        }
    }

    fn subtable(&mut self, path: &KeyPath, line: usize, value: &Spanned<DeValue<'_>>) {
        let DeValue::Table(table) = value.get_ref() else {
            let found = Written::from(value.get_ref()).found();
            self.refuse(path, line, &format!("must be a table, found {found}"));
            return;
        };
        if let [first, upstream] = path.0.as_slice()
            && first == "upstreams"
        {
            if let Err(what) = read_name(upstream) {
                self.refuse(path, line, &what);
                return;
            }
            let origin = self.origin(line);
            self.file.upstreams.insert(upstream.clone(), origin);
        }
        self.table(path, table);
    }

    fn value(&mut self, key: &'static Key, path: KeyPath, line: usize, value: &DeValue<'_>) {
        let origin = self.origin(line);
        self.file.entries.push(Entry {
            key,
            path,
            written: Written::from(value),
            origin,
        });
    }

    fn refuse(&mut self, path: &KeyPath, line: usize, what: &str) {
        let problem = Problem::at(&self.origin(line), path, what);
        self.problems.push((line, problem));
    }

    fn origin(&self, line: usize) -> Origin {
        Origin::File {
            file: Arc::clone(&self.name),
            line,
        }
    }

    fn line(&self, offset: usize) -> usize {
        let before = self.text.bytes().take(offset);
        before
            .filter(|byte| *byte == b'\n')
            .count()
            .saturating_add(1)
    }
}

impl From<&DeValue<'_>> for Written {
    fn from(value: &DeValue<'_>) -> Self {
        match value {
            DeValue::String(text) => Self::Text(text.clone().into_owned()),
            DeValue::Integer(number) => {
                Self::Integer(u64::from_str_radix(number.as_str(), number.radix()).ok())
            }
            DeValue::Float(_) => Self::Other("a float"),
            DeValue::Boolean(flag) => Self::Flag(*flag),
            DeValue::Datetime(_) => Self::Other("a date"),
            DeValue::Array(items) => {
                Self::List(items.iter().map(|item| item.get_ref().into()).collect())
            }
            DeValue::Table(table) => Self::Table(
                table
                    .iter()
                    .map(|(name, value)| (name.get_ref().to_string(), value.get_ref().into()))
                    .collect(),
            ),
        }
    }
}

fn unknown(path: &KeyPath, value: &DeValue<'_>) -> String {
    if let [first, upstream, rest] = path.0.as_slice()
        && first == "upstreams"
        && value.is_table()
    {
        // [upstreams.docker.io] is a table in a table: the commonest slip with names that hold dots.
        return format!(
            "unknown key; a name with dots needs quotes, as in [upstreams.\"{upstream}.{rest}\"]"
        );
    }
    match suggestion(path) {
        Some(meant) => format!("unknown key; did you mean \"{meant}\"?"),
        None => "unknown key".to_owned(),
    }
}
