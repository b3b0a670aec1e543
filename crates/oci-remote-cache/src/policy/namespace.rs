//! From a name on the wire to an upstream and a repository.
//!
//! Four shapes lead to the same place: `/v2/<key>/<name>/…` (podman, skopeo, `BuildKit`), `/<key>/v2/<name>/…` (containerd without
//! `override_path`), `?ns=<key>` (containerd, regclient), and the bare name for the default upstream (Docker's registry-mirrors). Keys,
//! aliases and `ns` are looked up in a closed table: no request can name a place to connect to.

use std::collections::HashMap;

use oci::{NamePath, RepositoryName};

use crate::names::UpstreamId;

/// How alike two names must be (Jaro–Winkler) for one to be offered in place of the other.
const ALIKE: f64 = 0.8;

/// One upstream's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The upstream.
    pub id: UpstreamId,
    /// Further names that mean it.
    pub aliases: Vec<String>,
    /// Whether one-segment repositories get `library/` in front (Docker Hub).
    pub library: bool,
}

/// The closed table of names.
#[derive(Clone, Debug)]
pub struct Names {
    table: HashMap<String, (UpstreamId, Library)>,
    default: Option<String>,
}

/// Whether one-segment names are short for `library/<name>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Library {
    Added,
    AsIs,
}

/// The request names no upstream or repository of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// The first segment reads as a host, or `ns` or the path prefix is given, and no upstream has that name.
    #[error("no upstream is called \"{name}\"{}", nearest.as_ref().map(|near| format!("; did you mean \"{near}\"?")).unwrap_or_default())]
    Upstream {
        /// The name asked for.
        name: String,
        /// The configured one most like it.
        nearest: Option<String>,
    },
    /// There is an upstream's name, but no repository behind it.
    #[error("no repository is named after \"{0}\"")]
    NoRepository(String),
    /// A name without an upstream's key, and no default upstream is configured.
    #[error("\"{0}\" names no upstream, and default_upstream is not set")]
    NoDefault(String),
    /// The repository's name is not legal.
    #[error("\"{0}\" is not a legal repository name")]
    Illegal(String),
}

/// Where a request leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The upstream.
    pub upstream: UpstreamId,
    /// The repository, as the upstream knows it.
    pub repository: RepositoryName,
}

impl Names {
    /// The table of `entries`; `default` is the key for names that begin with none.
    pub fn new(entries: &[Entry], default: Option<&str>) -> Self {
        let mut table = HashMap::new();
        for entry in entries {
            let library = if entry.library {
                Library::Added
            } else {
                Library::AsIs
            };
            for name in entry
                .aliases
                .iter()
                .map(String::as_str)
                .chain([entry.id.as_str()])
            {
                table.insert(name.to_ascii_lowercase(), (entry.id.clone(), library));
            }
        }
        Self {
            table,
            default: default.map(str::to_ascii_lowercase),
        }
    }

    /// Where `name` leads, given the path prefix before `/v2/` and the `ns` parameter. The path beats `ns`.
    pub fn resolve(
        &self,
        prefix: Option<&str>,
        name: &NamePath,
        ns: Option<&str>,
    ) -> Result<Resolved, Unknown> {
        if let Some(prefix) = prefix {
            return self.named(prefix, name.whole(), name);
        }
        if self.find(name.first()).is_some() {
            return match name.rest() {
                Some(rest) => self.named(name.first(), Some(rest), name),
                // A repository may be called like a key, when the upstream is named elsewhere.
                None if ns.is_some() => self.elsewhere(name, ns),
                None => Err(Unknown::NoRepository(name.as_str().to_owned())),
            };
        }
        self.elsewhere(name, ns)
    }

    fn elsewhere(&self, name: &NamePath, ns: Option<&str>) -> Result<Resolved, Unknown> {
        if let Some(ns) = ns {
            return self.named(ns, name.whole(), name);
        }
        if name.first_is_host_like() {
            return Err(self.unknown(name.first()));
        }
        match &self.default {
            Some(default) => self.named(default, name.whole(), name),
            None => Err(Unknown::NoDefault(name.as_str().to_owned())),
        }
    }

    fn named(
        &self,
        key: &str,
        repository: Option<RepositoryName>,
        name: &NamePath,
    ) -> Result<Resolved, Unknown> {
        let Some((upstream, library)) = self.find(key) else {
            return Err(self.unknown(key));
        };
        let repository = repository.ok_or_else(|| Unknown::Illegal(name.as_str().to_owned()))?;
        let repository = if *library == Library::Added {
            repository.with_library()
        } else {
            repository
        };
        Ok(Resolved {
            upstream: upstream.clone(),
            repository,
        })
    }

    fn find(&self, key: &str) -> Option<&(UpstreamId, Library)> {
        // Hosts compare without case; nearly all keys arrive in lower case already.
        self.table
            .get(key)
            .or_else(|| self.table.get(&key.to_ascii_lowercase()))
    }

    fn unknown(&self, name: &str) -> Unknown {
        let score = |key: &&String| strsim::jaro_winkler(key, name);
        let nearest = self
            .table
            .keys()
            .max_by(|a, b| score(a).total_cmp(&score(b)))
            .filter(|key| score(key) > ALIKE);
        Unknown::Upstream {
            name: name.to_owned(),
            nearest: nearest.cloned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(default: Option<&str>) -> Names {
        let hub = Entry {
            id: UpstreamId::new("docker.io"),
            aliases: vec!["index.docker.io".into()],
            library: true,
        };
        let quay = Entry {
            id: UpstreamId::new("quay.io"),
            aliases: vec![],
            library: false,
        };
        Names::new(&[hub, quay], default)
    }

    fn resolve(prefix: Option<&str>, name: &str, ns: Option<&str>) -> Result<String, Unknown> {
        let name: NamePath = name.parse().unwrap();
        let found = names(Some("docker.io")).resolve(prefix, &name, ns)?;
        Ok(format!("{}/{}", found.upstream, found.repository))
    }

    #[test]
    fn every_shape_leads_to_the_same_place() {
        let place = Ok("docker.io/library/alpine".to_owned());
        assert_eq!(resolve(None, "docker.io/alpine", None), place);
        assert_eq!(resolve(None, "docker.io/library/alpine", None), place);
        assert_eq!(resolve(None, "index.docker.io/library/alpine", None), place);
        assert_eq!(resolve(Some("docker.io"), "library/alpine", None), place);
        assert_eq!(
            resolve(Some("docker.io"), "alpine", Some("docker.io")),
            place
        );
        assert_eq!(resolve(None, "library/alpine", Some("docker.io")), place);
        assert_eq!(resolve(None, "alpine", None), place);
    }

    #[test]
    fn the_path_beats_ns() {
        assert_eq!(
            resolve(None, "quay.io/a/b", Some("docker.io")),
            Ok("quay.io/a/b".to_owned())
        );
    }

    #[test]
    fn a_host_is_never_a_name_of_the_default() {
        for host in [
            "ghcr.example/x/y",
            "localhost/x/y",
            "nosuch.example:5000/x/y",
            "quay.oi/x",
        ] {
            assert!(
                matches!(resolve(None, host, None), Err(Unknown::Upstream { .. })),
                "{host}"
            );
        }
        let Err(Unknown::Upstream { nearest, .. }) = resolve(None, "quay.oi/x", None) else {
            panic!()
        };
        assert_eq!(nearest.as_deref(), Some("quay.io"));
    }

    #[test]
    fn unknown_ns_and_prefix_are_refused() {
        assert!(resolve(None, "x/y", Some("nosuch.example")).is_err());
        assert!(resolve(Some("nosuch"), "x/y", None).is_err());
        assert!(
            names(None)
                .resolve(None, &"x/y".parse().unwrap(), None)
                .is_err()
        );
    }
}
