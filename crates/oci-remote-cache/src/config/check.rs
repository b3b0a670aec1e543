//! From settings to a [`Config`]: what values must be to each other, and the files they point at.
//!
//! Each value alone has been judged before (`value.rs`).

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use url::Url;

use super::builtin::BUILT_IN;
use super::error::{ConfigError, Origin, Problem};
use super::keys::KeyPath;
use super::logins::PrefixLogin;
use super::nearest::{hint, nearest};
use super::settings::Settings;
use super::value::{NO_PROXY, SecretSource, Typed};
use super::{
    CacheConfig, ClientsConfig, Config, CredentialsConfig, Serve, TlsConfig, UpstreamConfig,
};
use crate::cache::freshness::{OnDeleted, Rules};
use crate::secret::Secret;
use crate::upstream::{Proxy, ProxyError};

/// No password is longer; a file that is was not meant.
const LARGEST_SECRET: u64 = 64 << 10;

/// How long it is believed that a client's login opens something, where the operator says nothing.
const USUAL_PROOF: Duration = Duration::from_mins(10);

/// Longest belief in what a client's login opened.
const LONGEST_PROOF: Duration = Duration::from_hours(24);

/// The settings below one table, and what is needed to resolve them.
struct Section<'a> {
    settings: &'a Settings,
    environment: &'a [(String, String)],
    at: KeyPath,
}

/// Checks everything that needs more than one value.
pub(super) fn check(
    settings: &Settings,
    environment: &[(String, String)],
) -> Result<Config, ConfigError> {
    let top = Section {
        settings,
        environment,
        at: KeyPath(Vec::new()),
    };
    let mut problems = Vec::new();
    let mut upstreams = Vec::new();
    for (key, origin) in settings.upstreams() {
        match top.child(&["upstreams", key]).upstream(key, origin, &top) {
            Ok(upstream) => upstreams.push(upstream),
            Err(problem) => problems.push(problem),
        }
    }
    problems.extend(top.collisions());
    ConfigError::unless_any(problems, ())?;
    let listen = top.require("listen")?;
    let admin_listen = top.require("admin_listen")?;
    top.apart(listen, admin_listen)?;
    let cache = top.child(&["cache"]);
    Ok(Config {
        listen,
        admin_listen,
        cache_dir: top.cache_dir()?,
        default_upstream: top.default_upstream(&upstreams)?,
        log: top.find("log"),
        cache: CacheConfig {
            max_size: cache.find("max_size"),
            max_blob: cache.find("max_blob"),
        },
        tls: top.child(&["tls"]).tls()?,
        clients: top.child(&["clients"]).clients()?,
        docker_config: top.file("docker_config")?,
        docker_auth: variable(environment, "DOCKER_AUTH_CONFIG"),
        offline: top.require("offline")?,
        catalog: top.require("catalog")?,
        trusted_networks: top.list("trusted_networks"),
        ignored: ignored(environment),
        upstreams,
    })
}

impl Section<'_> {
    fn child(&self, steps: &[&str]) -> Self {
        let at = steps
            .iter()
            .fold(self.at.clone(), |path, step| path.child(step));
        Self { at, ..*self }
    }

    fn find<T: Typed>(&self, name: &str) -> Option<T> {
        self.settings.value(&self.at.child(name)).cloned()
    }

    fn list<T>(&self, name: &str) -> Vec<T>
    where
        Vec<T>: Typed,
    {
        self.find(name).unwrap_or_default()
    }

    fn require<T: Typed>(&self, name: &str) -> Result<T, Problem> {
        let missing = || Problem::at(&Origin::Default, &self.at.child(name), "has no value");
        self.find(name).ok_or_else(missing)
    }

    /// `what` is wrong with the key `name`, wherever it was said.
    fn problem(&self, name: &str, what: impl Into<String>) -> Problem {
        let path = self.at.child(name);
        let origin = self.settings.get(&path).map(|setting| &setting.origin);
        Problem::at(origin.unwrap_or(&Origin::Default), &path, what)
    }

    fn cache_dir(&self) -> Result<PathBuf, Problem> {
        let path: PathBuf = self.require("cache_dir")?;
        // What is not there yet is made when the store opens; what cannot be looked at is reported then.
        match fs::metadata(&path) {
            Ok(found) if !found.is_dir() => Err(self.problem(
                "cache_dir",
                format!("{} is there and is no folder", path.display()),
            )),
            Ok(_) | Err(_) => Ok(path),
        }
    }

    fn apart(&self, listen: SocketAddr, admin: SocketAddr) -> Result<(), Problem> {
        let same_host = listen.ip() == admin.ip()
            || listen.ip().is_unspecified()
            || admin.ip().is_unspecified();
        if listen.port() == admin.port() && listen.port() != 0 && same_host {
            let what = format!("{admin} is taken by listen = \"{listen}\"; give it another port");
            return Err(self.problem("admin_listen", what));
        }
        Ok(())
    }

    fn default_upstream(&self, upstreams: &[UpstreamConfig]) -> Result<Option<String>, Problem> {
        let named: String = self.require("default_upstream")?;
        if named.is_empty() {
            return Ok(None);
        }
        let found = upstreams
            .iter()
            .find(|upstream| upstream.key == named || upstream.aliases.contains(&named));
        if let Some(upstream) = found {
            return Ok(Some(upstream.key.clone()));
        }
        let keys = upstreams.iter().map(|upstream| upstream.key.as_str());
        let hint = hint(nearest(&named, keys));
        Err(self.problem(
            "default_upstream",
            format!("no upstream is called {named:?}{hint}"),
        ))
    }

    /// Names that lead to more than one upstream.
    fn collisions(&self) -> Vec<Problem> {
        let mut owners = BTreeMap::new();
        let mut problems = Vec::new();
        for key in self.settings.upstreams().keys() {
            let section = self.child(&["upstreams", key]);
            for alias in section.list::<String>("aliases") {
                problems.extend(self.collision(key, &alias, &owners));
                owners.insert(alias, key.as_str());
            }
        }
        problems
    }

    /// What is wrong with `alias` as an alias of `key`, reported at what the operator wrote: an alias of ours is never his mistake.
    fn collision(
        &self,
        key: &str,
        alias: &str,
        owners: &BTreeMap<String, &str>,
    ) -> Option<Problem> {
        let section = self.child(&["upstreams", key]);
        let ours = !section.is_set("aliases");
        if alias != key
            && let Some(origin) = self.settings.upstreams().get(alias)
        {
            if !ours {
                let what = format!("{alias:?} is an upstream of its own");
                return Some(section.problem("aliases", what));
            }
            let path = KeyPath::new(&["upstreams", alias]);
            let what = format!("is an alias of the upstream \"{key}\" already");
            return Some(Problem::at(origin, &path, what));
        }
        let owner = owners.get(alias).filter(|owner| **owner != key)?;
        let (section, owner) = if ours {
            (self.child(&["upstreams", owner]), key)
        } else {
            (section, *owner)
        };
        let what = format!("{alias:?} is an alias of \"{owner}\" already");
        Some(section.problem("aliases", what))
    }

    fn is_set(&self, name: &str) -> bool {
        let setting = self.settings.get(&self.at.child(name));
        setting.is_some_and(|setting| setting.origin.is_set())
    }

    fn upstream(&self, key: &str, origin: &Origin, top: &Self) -> Result<UpstreamConfig, Problem> {
        let url: Option<Url> = self.find("url");
        let url = url.ok_or_else(|| {
            let built_in = BUILT_IN.iter().map(|upstream| upstream.key);
            let hint = hint(nearest(key, built_in));
            Problem::at(
                origin,
                &self.at,
                format!("has no url and is not built in{hint}"),
            )
        })?;
        let by_login = self.by_login()?;
        let credentials = self.child(&["credentials"]).credentials()?;
        Ok(UpstreamConfig {
            key: key.to_owned(),
            url,
            aliases: self.list("aliases"),
            library: self.require("library")?,
            rules: self.rules()?,
            offline: self.require("offline")?,
            serve: self.serve(),
            by_login,
            credentials,
            credentials_for: self.credentials_for()?,
            token_realms: self.list("token_realms"),
            redirect_hosts: self.list("redirect_hosts"),
            mirrors: self.list("mirrors"),
            proxy: if self.is_set("proxy") {
                self.proxy()?
            } else {
                top.proxy()?
            },
            ca_file: self.file("ca_file")?,
            connections_per_blob: self.require("connections_per_blob")?,
            max_connections: self.require("max_connections")?,
            read_ahead: self.require("read_ahead")?,
        })
    }

    /// How long a client's own login is believed, where clients show theirs.
    fn by_login(&self) -> Result<Option<Duration>, Problem> {
        let ttl: Duration = self.require("client_proof_ttl")?;
        if self.find::<String>("credentials").is_none() {
            // What `config show` prints may be read back.
            if ttl != USUAL_PROOF {
                let what = "means nothing without credentials = \"client\"";
                return Err(self.problem("client_proof_ttl", what));
            }
            return Ok(None);
        }
        if self.is_set("credentials_for") {
            let what = "has no place beside credentials = \"client\"";
            return Err(self.problem("credentials_for", what));
        }
        let table = self.child(&["credentials"]);
        for name in ["username", "password"] {
            if table.is_set(name) {
                return Err(table.problem(name, "has no place beside credentials = \"client\""));
            }
        }
        if self.is_set("serve") {
            let what = "means nothing with credentials = \"client\": each client is served what its own login opens";
            return Err(self.problem("serve", what));
        }
        let same_header = ["htpasswd", "tokens"].into_iter().find(|name| {
            self.settings
                .get(&KeyPath::new(&["clients", name]))
                .is_some()
        });
        if let Some(name) = same_header {
            let what = format!(
                "\"client\" does not go with clients.{name}: clients would have to show both in one header; tls.client_ca_file goes with it"
            );
            return Err(self.problem("credentials", what));
        }
        if ttl.is_zero() || ttl > LONGEST_PROOF {
            return Err(self.problem(
                "client_proof_ttl",
                "must be more than nothing and at most a day",
            ));
        }
        Ok(Some(ttl))
    }

    /// Where there are no credentials, both mean the same.
    fn serve(&self) -> Serve {
        let said: Option<String> = self.find("serve");
        let all = said.map_or_else(|| !self.is_open(), |said| said == "all");
        if all { Serve::All } else { Serve::Public }
    }

    /// Whether others than this machine's own users can reach us without saying who they are.
    fn is_open(&self) -> bool {
        let listen = self
            .settings
            .value::<SocketAddr>(&KeyPath::new(&["listen"]));
        let loopback = listen.is_some_and(|listen| listen.ip().to_canonical().is_loopback());
        !loopback && !self.knows_clients()
    }

    fn knows_clients(&self) -> bool {
        let keys = [
            ["clients", "htpasswd"],
            ["clients", "tokens"],
            ["tls", "client_ca_file"],
        ];
        keys.into_iter()
            .any(|key| self.settings.get(&KeyPath::new(&key)).is_some())
    }

    fn tls(&self) -> Result<Option<TlsConfig>, Problem> {
        let files = (self.file("cert_file")?, self.file("key_file")?);
        let client_ca_file = self.file("client_ca_file")?;
        match files {
            (Some(cert_file), Some(key_file)) => Ok(Some(TlsConfig {
                cert_file,
                key_file,
                client_ca_file,
            })),
            (Some(_), None) => Err(self.problem("cert_file", "needs a key_file beside it")),
            (None, Some(_)) => Err(self.problem("key_file", "needs a cert_file beside it")),
            (None, None) if client_ca_file.is_some() => Err(self.problem(
                "client_ca_file",
                "needs a cert_file and a key_file beside it",
            )),
            (None, None) => Ok(None),
        }
    }

    fn clients(&self) -> Result<ClientsConfig, Problem> {
        let clients = ClientsConfig {
            htpasswd: self.file("htpasswd")?,
            tokens: self.file("tokens")?,
            rules: self.list("rules"),
            max_connections: self.find("max_connections"),
            max_requests: self.find("max_requests"),
            burst: self.find("burst"),
            unlimited: self.list("unlimited"),
        };
        if clients.burst.is_some() && clients.max_requests.is_none() {
            return Err(self.problem("burst", "needs max_requests beside it"));
        }
        let named = clients
            .rules
            .iter()
            .find(|rule| !rule.starts_with("anonymous "));
        match named {
            Some(rule) if !self.knows_clients() => {
                let what = format!(
                    "{rule:?} is for clients with a name, and without htpasswd, tokens or tls.client_ca_file no client has one"
                );
                Err(self.problem("rules", what))
            }
            _ => Ok(clients),
        }
    }

    fn rules(&self) -> Result<Rules, Problem> {
        let on_deleted = match self.require::<String>("on_deleted")?.as_str() {
            "serve" => OnDeleted::Serve,
            _ => OnDeleted::Remove,
        };
        Ok(Rules {
            tag_ttl: self.require("tag_ttl")?,
            patterns: self.list("tags"),
            window: self.require("stale_while_revalidate")?,
            on_deleted,
            negative_ttl: self.require("negative_ttl")?,
        })
    }

    fn credentials(&self) -> Result<Option<CredentialsConfig>, Problem> {
        let username: Option<String> = self.find("username");
        let password: Option<SecretSource> = self.find("password");
        match (username, password) {
            (None, None) => Ok(None),
            (Some(username), Some(source)) => self.login("password", username, &source).map(Some),
            (Some(_), None) => Err(self.problem("username", "needs a password beside it")),
            (None, Some(_)) => Err(self.problem("password", "needs a username beside it")),
        }
    }

    fn credentials_for(&self) -> Result<Vec<(String, CredentialsConfig)>, Problem> {
        let logins: Vec<PrefixLogin> = self.list("credentials_for");
        let logins = logins.into_iter().map(|login| {
            let found = self.login("credentials_for", login.username, &login.password)?;
            Ok((login.repositories, found))
        });
        logins.collect()
    }

    /// A user name and the password that the key `name` tells of.
    fn login(
        &self,
        name: &str,
        username: String,
        source: &SecretSource,
    ) -> Result<CredentialsConfig, Problem> {
        Ok(CredentialsConfig {
            username,
            password: self.secret(name, source)?,
            password_file: match source {
                SecretSource::File(path) => Some(path.clone()),
                SecretSource::Text(_) | SecretSource::Variable(_) => None,
            },
        })
    }

    fn proxy(&self) -> Result<Option<Proxy>, Problem> {
        let Some(source) = self.find::<SecretSource>("proxy") else {
            return Ok(None);
        };
        let text = self.secret("proxy", &source)?;
        if text.expose() == NO_PROXY {
            return Ok(None);
        }
        let proxy = text.expose().parse();
        proxy
            .map(Some)
            .map_err(|error: ProxyError| self.problem("proxy", error.to_string()))
    }

    fn secret(&self, name: &str, source: &SecretSource) -> Result<Secret, Problem> {
        let secret = match source {
            SecretSource::Text(secret) => secret.clone(),
            SecretSource::File(path) => secret_file(path).map_err(|error| {
                let what = format!("cannot read the file {}: {error}", path.display());
                self.problem(name, what)
            })?,
            SecretSource::Variable(variable) => self::variable(self.environment, variable)
                .ok_or_else(|| {
                    let what = format!("the environment variable {variable} is not set");
                    self.problem(name, what)
                })?,
        };
        if secret.is_empty() {
            return Err(self.problem(name, "is empty"));
        }
        Ok(secret)
    }

    /// The file that the key `name` points at, which can be read.
    fn file(&self, name: &str) -> Result<Option<PathBuf>, Problem> {
        let Some(path) = self.find::<PathBuf>(name) else {
            return Ok(None);
        };
        match readable(&path) {
            Ok(()) => Ok(Some(path)),
            Err(error) => {
                let what = format!("cannot read the file {}: {error}", path.display());
                Err(self.problem(name, what))
            }
        }
    }
}

fn variable(environment: &[(String, String)], name: &str) -> Option<Secret> {
    let found = environment.iter().find(|(found, _)| found == name);
    found
        .filter(|(_, value)| !value.is_empty())
        .map(|(_, value)| Secret::new(value.clone()))
}

/// The variables by which other programs are told of a proxy.
fn ignored(environment: &[(String, String)]) -> Vec<String> {
    const NAMES: [&str; 3] = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];
    let set = environment.iter().filter(|(name, value)| {
        !value.is_empty() && NAMES.iter().any(|known| known.eq_ignore_ascii_case(name))
    });
    set.map(|(name, _)| name.clone()).collect()
}

fn readable(path: &Path) -> io::Result<()> {
    let mut first = [0];
    fs::File::open(path)?.read(&mut first).map(drop)
}

fn secret_file(path: &Path) -> io::Result<Secret> {
    let mut text = String::new();
    fs::File::open(path)?
        .take(LARGEST_SECRET)
        .read_to_string(&mut text)?;
    // Editors and `echo` end a file with a line end that is no part of the password.
    text.truncate(text.trim_end_matches(['\r', '\n']).len());
    Ok(Secret::new(text))
}
