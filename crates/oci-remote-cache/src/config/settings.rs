//! All sources laid over each other: for every key one value, and where it was said.
//!
//! Defaults, built-in upstreams, the file, the environment, flags, in this order. Each value has been judged alone; nothing has been
//! compared or opened yet (`check.rs`).

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::builtin::BUILT_IN;
use super::env;
use super::error::{ConfigError, Origin, Problem};
use super::file::{self, Entry};
use super::keys::{self, Key, KeyPath};
use super::value::{SecretSource, Typed, Value, Written};

/// What the command line says over everything else.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--listen`.
    pub listen: Option<String>,
    /// `--admin-listen`.
    pub admin_listen: Option<String>,
    /// `--cache-dir`.
    pub cache_dir: Option<PathBuf>,
}

/// Where configuration comes from.
#[derive(Clone, Default)]
pub struct Sources {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// The process's environment, see [`super::environment`]. What is not ours is only looked at when a secret names it.
    pub environment: Vec<(String, String)>,
    /// The other flags.
    pub overrides: Overrides,
}

/// Every key's value and where it was said, before anything is compared, opened or resolved.
#[derive(Debug)]
pub struct Settings {
    values: BTreeMap<KeyPath, Setting>,
    upstreams: BTreeMap<String, Origin>,
}

/// One key's value.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    /// What it is.
    pub(super) value: Value,
    /// Who said so.
    pub(super) origin: Origin,
}

impl Settings {
    /// Reads `sources` and lays them over each other.
    pub fn read(sources: &Sources) -> Result<Self, ConfigError> {
        let written = match &sources.file {
            Some(path) => file::read(path)?,
            None => file::File::default(),
        };
        let mut settings = Self {
            values: BTreeMap::new(),
            upstreams: BUILT_IN
                .iter()
                .map(|upstream| (upstream.key.to_owned(), Origin::BuiltIn))
                .collect(),
        };
        settings.upstreams.extend(written.upstreams);
        let mut problems = Vec::new();
        for entry in settings.given_by_us() {
            settings.take(entry, &mut problems);
        }
        if let Some(entry) = env::cache_directory(&sources.environment) {
            settings.take(entry, &mut problems);
        }
        for entry in written.entries {
            settings.take(entry, &mut problems);
        }
        let names: Vec<&str> = settings.upstreams.keys().map(String::as_str).collect();
        let secrets = settings.variables_of_secrets();
        let variables = env::read(&sources.environment, &names, &secrets, &mut problems);
        for entry in variables {
            settings.take(entry, &mut problems);
        }
        for entry in flags(&sources.overrides) {
            settings.take(entry, &mut problems);
        }
        ConfigError::unless_any(problems, settings)
    }

    /// The folder of the cache, for commands that need nothing else.
    pub fn cache_dir(&self) -> Option<&Path> {
        self.value::<PathBuf>(&KeyPath::new(&["cache_dir"]))
            .map(PathBuf::as_path)
    }

    /// What `key` is and who said so.
    pub(super) fn get(&self, key: &KeyPath) -> Option<&Setting> {
        self.values.get(key)
    }

    /// What `key` is.
    pub(super) fn value<T: Typed>(&self, key: &KeyPath) -> Option<&T> {
        self.get(key).and_then(|setting| T::of(&setting.value))
    }

    /// The upstreams' keys and where each was first said.
    pub(super) fn upstreams(&self) -> &BTreeMap<String, Origin> {
        &self.upstreams
    }

    fn given_by_us(&self) -> Vec<Entry> {
        let defaults = keys::all_keys().flat_map(|key| {
            let keys::Default::Text(text) = key.default else {
                return Vec::new();
            };
            self.paths(key)
                .map(|path| Entry::text(key, path, text, Origin::Default))
                .collect()
        });
        let built_in = BUILT_IN.iter().flat_map(|upstream| {
            keys::all_keys().filter_map(|key| {
                let (_, text) = upstream
                    .values
                    .iter()
                    .find(|(name, _)| key.is_upstream() && key.name() == [*name])?;
                let path = key.path_in(upstream.key);
                Some(Entry::text(key, path, text, Origin::BuiltIn))
            })
        });
        defaults.chain(built_in).collect()
    }

    /// The places where `key` stands: one, or one for each upstream.
    pub(super) fn paths(&self, key: &'static Key) -> impl Iterator<Item = KeyPath> {
        let upstreams = self.upstreams.keys().filter(|_| key.is_upstream());
        let single = (!key.is_upstream()).then(|| key.path_in(""));
        single
            .into_iter()
            .chain(upstreams.map(|upstream| key.path_in(upstream)))
    }

    fn take(&mut self, entry: Entry, problems: &mut Vec<Problem>) {
        let Entry {
            key,
            path,
            written,
            origin,
        } = entry;
        match Value::read(key.kind, &written) {
            Ok(value) => {
                self.values.insert(path, Setting { value, origin });
            }
            Err(what) => problems.push(Problem::at(&origin, &path, what)),
        }
    }

    /// Variables that a `{ env = "…" }` names: they may begin like ours and are no keys.
    fn variables_of_secrets(&self) -> Vec<String> {
        self.values
            .values()
            .flat_map(|setting| setting.value.secrets())
            .filter_map(|source| match source {
                SecretSource::Variable(name) => Some(name.clone()),
                SecretSource::Text(_) | SecretSource::File(_) => None,
            })
            .collect()
    }
}

impl Entry {
    /// `text`, as an environment variable would give it, for `key` at `path`.
    pub(super) fn text(key: &'static Key, path: KeyPath, text: &str, origin: Origin) -> Self {
        Self {
            key,
            path,
            written: Written::from_variable(key.kind, text),
            origin,
        }
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The environment of a process holds secrets of all sorts.
        f.debug_struct("Sources")
            .field("file", &self.file)
            .field("overrides", &self.overrides)
            .finish_non_exhaustive()
    }
}

fn flags(overrides: &Overrides) -> Vec<Entry> {
    let cache_dir = overrides
        .cache_dir
        .as_ref()
        .map(|path| path.to_string_lossy().into_owned());
    [
        ("listen", "--listen", overrides.listen.clone()),
        (
            "admin_listen",
            "--admin-listen",
            overrides.admin_listen.clone(),
        ),
        ("cache_dir", "--cache-dir", cache_dir),
    ]
    .into_iter()
    .filter_map(|(name, flag, text)| {
        let text = text?;
        let key = keys::keys().find(|key| key.path == [name])?;
        Some(Entry::text(key, key.path_in(""), &text, Origin::Flag(flag)))
    })
    .collect()
}
