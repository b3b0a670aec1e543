//! What an operator should know about a configuration that is right as far as it goes.
//!
//! `config check` prints these and the server logs them at its start. None keeps anything from working.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use url::Host;

use super::error::Origin;
use super::keys::{KeyPath, keys};
use super::nearest::{hint, nearest};
use super::settings::Settings;
use super::value::{SecretSource, Value};
use super::{Config, Contents, Serve, UpstreamConfig};
use crate::policy::rules::Rule;

/// What is noteworthy, one line each.
pub fn notes(config: &Config, settings: &Settings, contents: &Contents) -> Vec<String> {
    let about = [max_blob(config), nothing_default(config), ignored(config)];
    let mut notes: Vec<String> = about.into_iter().flatten().collect();
    notes.extend(nobody(contents));
    let rules = &config.clients.rules;
    notes.extend(rules.iter().flat_map(|rule| idle(config, contents, rule)));
    for upstream in &config.upstreams {
        let key = &upstream.key;
        let about = [
            clear(upstream),
            heard(config, upstream),
            open(config, upstream),
            ca(upstream),
            serve(config, settings, upstream),
            connections(settings, upstream),
            shadow(config, upstream),
        ];
        let about = about.into_iter().flatten();
        notes.extend(about.map(|note| format!("upstreams.{key}: {note}")));
    }
    notes.extend(open_secrets(settings));
    notes
}

/// Whether files in `cache_dir` go away by themselves. The store looks closer when it opens, and tells at start-up.
pub fn short_lived(config: &Config) -> Option<String> {
    let short_lived = ["/tmp", "/var/tmp", "/dev/shm", "/run"];
    let found = short_lived
        .into_iter()
        .find(|folder| config.cache_dir.starts_with(folder))?;
    Some(format!(
        "cache_dir: {} lies under {found}, where files do not last",
        config.cache_dir.display()
    ))
}

fn max_blob(config: &Config) -> Option<String> {
    let (size, blob) = (config.cache.max_size?, config.cache.max_blob?);
    (blob > size).then(|| "cache.max_blob: is larger than cache.max_size, which decides".to_owned())
}

/// Files that let nobody in.
fn nobody(contents: &Contents) -> Vec<String> {
    let about = [
        ("htpasswd", "a password", &contents.passwords),
        ("tokens", "a token", &contents.tokens),
    ];
    let empty = about
        .into_iter()
        .filter(|(_, _, names)| names.as_ref().is_some_and(Vec::is_empty));
    empty
        .map(|(key, what, _)| {
            format!("clients.{key}: the file names no client: nobody can log in with {what}")
        })
        .collect()
}

/// Why a rule decides about nothing: it is for no upstream, or for a client that nobody can be.
fn idle(config: &Config, contents: &Contents, text: &str) -> Vec<String> {
    let Ok(rule) = text.parse::<Rule>() else {
        return Vec::new();
    };
    let about = [
        no_upstream(config, &rule),
        no_client(config, contents, &rule),
    ];
    let about = about.into_iter().flatten();
    about
        .map(|why| format!("clients.rules: {text:?} decides about nothing: {why}"))
        .collect()
}

fn no_upstream(config: &Config, rule: &Rule) -> Option<String> {
    let upstreams = &config.upstreams;
    if upstreams.iter().any(|upstream| rule.is_for(&upstream.key)) {
        return None;
    }
    let said = rule.upstreams();
    let aliased = upstreams
        .iter()
        .find(|upstream| upstream.aliases.iter().any(|alias| rule.is_for(alias)));
    if let Some(upstream) = aliased {
        let key = &upstream.key;
        return Some(format!(
            "{said:?} is an alias, and rules go by keys: write {key:?}"
        ));
    }
    let keys = upstreams.iter().map(|upstream| upstream.key.as_str());
    let hint = hint(nearest(said, keys));
    Some(format!("no upstream is called {said:?}{hint}"))
}

fn no_client(config: &Config, contents: &Contents, rule: &Rule) -> Option<String> {
    let name = rule.client()?;
    // A certificate may hold any name, and no file may hold one like it.
    if name.starts_with("cert:") {
        let tls = config.tls.as_ref();
        let asked = tls.is_some_and(|tls| tls.client_ca_file.is_some());
        return (!asked).then(|| "certificates are not asked for".to_owned());
    }
    let files = [&contents.passwords, &contents.tokens];
    let names = files.into_iter().flatten().flatten().map(String::as_str);
    if names.clone().any(|known| known == name) {
        return None;
    }
    let hint = hint(nearest(name, names));
    Some(format!(
        "no file of passwords or tokens names {name:?}{hint}"
    ))
}

fn nothing_default(config: &Config) -> Option<String> {
    let none = config.default_upstream.is_none();
    none.then(|| {
        "default_upstream: is none; names that begin with no upstream's key are not found"
            .to_owned()
    })
}

fn clear(upstream: &UpstreamConfig) -> Option<String> {
    let far = match upstream.url.host()? {
        Host::Domain(name) => name != "localhost",
        Host::Ipv4(address) => !IpAddr::V4(address).is_loopback(),
        Host::Ipv6(address) => !IpAddr::V6(address).is_loopback(),
    };
    let any = has_credentials(upstream) || upstream.by_login.is_some();
    let clear = upstream.url.scheme() == "http" && any && far;
    clear.then(|| "sends its credentials in the clear, since its url is http://".to_owned())
}

/// Logins that clients send to us where others can listen.
fn heard(config: &Config, upstream: &UpstreamConfig) -> Option<String> {
    let far = !config.listen.ip().to_canonical().is_loopback();
    let heard = upstream.by_login.is_some() && config.tls.is_none() && far;
    heard.then(|| {
        "takes clients' own logins, which they send in the clear unless [tls] or a proxy encrypts them".to_owned()
    })
}

fn has_credentials(upstream: &UpstreamConfig) -> bool {
    upstream.credentials.is_some() || !upstream.credentials_for.is_empty()
}

/// Credentials behind a door that is open to a network.
fn open(config: &Config, upstream: &UpstreamConfig) -> Option<String> {
    let open = !config.listen.ip().to_canonical().is_loopback() && !config.knows_clients();
    if !has_credentials(upstream) || !open {
        return None;
    }
    Some(match upstream.serve {
        Serve::Public => {
            "serves only repositories that anyone may pull, since everyone can reach listen; \
             serve = \"all\" serves all that its credentials open"
                .to_owned()
        }
        Serve::All => {
            "serves all that its credentials open to everyone who can reach listen".to_owned()
        }
    })
}

fn ca(upstream: &UpstreamConfig) -> Option<String> {
    let unused = upstream.ca_file.is_some() && upstream.url.scheme() == "http";
    unused.then(|| "ca_file has no effect, since its url is http://".to_owned())
}

fn serve(config: &Config, settings: &Settings, upstream: &UpstreamConfig) -> Option<String> {
    let logins = config.docker_config.is_some() || config.docker_auth.is_some();
    let unused = !logins && !has_credentials(upstream) && is_set(settings, upstream, "serve");
    unused.then(|| "serve has no effect, since it has no credentials".to_owned())
}

fn connections(settings: &Settings, upstream: &UpstreamConfig) -> Option<String> {
    let more = upstream.connections_per_blob > upstream.max_connections;
    (more && is_set(settings, upstream, "connections_per_blob"))
        .then(|| "connections_per_blob is larger than max_connections, which decides".to_owned())
}

/// Whether the operator said it.
fn is_set(settings: &Settings, upstream: &UpstreamConfig, name: &str) -> bool {
    let setting = settings.get(&KeyPath::new(&["upstreams", &upstream.key, name]));
    setting.is_some_and(|setting| setting.origin.is_set())
}

/// A name without a dot is a legal first segment of a repository's name too.
fn shadow(config: &Config, upstream: &UpstreamConfig) -> Option<String> {
    let default = config.default_upstream.as_ref()?;
    let names = std::iter::once(&upstream.key).chain(&upstream.aliases);
    let host_like = |name: &str| name.contains(['.', ':']) || name == "localhost";
    let name = names.into_iter().find(|name| !host_like(name))?;
    (default != &upstream.key).then(|| {
        format!("repositories of {default} whose names begin with {name}/ are reached only as {default}/{name}/…")
    })
}

/// Passwords written into a file that everybody on this machine can read.
fn open_secrets(settings: &Settings) -> Vec<String> {
    let secrets = keys().flat_map(|key| settings.paths(key));
    secrets
        .flat_map(|path| {
            let setting = settings.get(&path);
            let secrets = setting.into_iter().flat_map(|setting| {
                let secrets = setting.value.secrets().into_iter();
                let secrets = secrets.filter(|source| !is_open(&setting.value, source));
                secrets.map(|source| (source, &setting.origin))
            });
            let notes: Vec<String> = secrets
                .filter_map(|(source, origin)| open_secret(&path, source, origin))
                .collect();
            notes
        })
        .collect()
}

/// A proxy that wants no password is no secret.
fn is_open(value: &Value, source: &SecretSource) -> bool {
    matches!((value, source), (Value::Proxy(_), SecretSource::Text(text)) if !text.expose().contains('@'))
}

/// Operators expect other programs' variables to count; here only what is configured does.
fn ignored(config: &Config) -> Option<String> {
    let names = config.ignored.join(", ");
    (!names.is_empty()
        && config
            .upstreams
            .iter()
            .all(|upstream| upstream.proxy.is_none()))
    .then(|| format!("proxy: is not set, and {names} in the environment count for nothing"))
}

fn open_secret(path: &KeyPath, source: &SecretSource, origin: &Origin) -> Option<String> {
    let (file, holder) = match (source, origin) {
        (SecretSource::Text(_), Origin::File { file, .. }) => (Path::new(&**file), "is written in"),
        (SecretSource::File(file), _) => (file.as_path(), "is read from"),
        _ => return None,
    };
    let mode = fs::metadata(file).ok()?.mode();
    (mode & 0o004 != 0).then(|| {
        format!(
            "{path}: {holder} {}, which everybody on this machine can read",
            file.display()
        )
    })
}
