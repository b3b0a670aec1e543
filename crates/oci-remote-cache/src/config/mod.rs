//! What the operator decided: from defaults, a TOML file, the environment and flags to one checked [`Config`].
//!
//! Every key is said once, in `keys.rs`. [`Settings`] is the configuration as written, with the place of each value; [`Config`] is the
//! configuration as checked, which the rest of the program uses. Nothing here listens, connects or writes.

mod builtin;
mod check;
mod contents;
mod env;
mod error;
mod file;
mod hosts;
mod keys;
mod log;
mod logins;
mod nearest;
mod notes;
mod pages;
mod schema;
mod settings;
mod show;
mod tags;
mod units;
mod value;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

pub use self::contents::Contents;
pub use self::env::environment;
pub use self::error::ConfigError;
pub use self::log::log_filter;
pub use self::notes::{notes, short_lived};
pub use self::pages::{reference, template};
pub use self::schema::schema;
pub use self::settings::{Overrides, Settings, Sources};
pub use self::show::show;
use crate::cache::freshness::Rules;
use crate::secret::Secret;
use crate::upstream::Proxy;

/// A configuration that makes sense: every value judged, names unique, secrets read.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where operators connect.
    pub admin_listen: SocketAddr,
    /// Everything that is kept.
    pub cache_dir: PathBuf,
    /// The key of the upstream for names without one; none where the operator wants none.
    pub default_upstream: Option<String>,
    /// The log filter; none means the default.
    pub log: Option<String>,
    /// How much is kept.
    pub cache: CacheConfig,
    /// TLS for clients; none is plain HTTP.
    pub tls: Option<TlsConfig>,
    /// Who may pull.
    pub clients: ClientsConfig,
    /// A login file of Docker or podman.
    pub docker_config: Option<PathBuf>,
    /// The text of one, from `DOCKER_AUTH_CONFIG`.
    pub docker_auth: Option<Secret>,
    /// Whether no upstream is asked.
    pub offline: bool,
    /// Whether the names of cached repositories are listed to clients.
    pub catalog: bool,
    /// `address/prefix` of networks that count as public.
    pub trusted_networks: Vec<String>,
    /// Names of proxy variables that are set and not read.
    pub ignored: Vec<String>,
    /// All upstreams, built in or configured, by key.
    pub upstreams: Vec<UpstreamConfig>,
}

/// How much is kept. What is not said follows from the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheConfig {
    /// Bytes for everything.
    pub max_size: Option<u64>,
    /// Bytes of the largest blob that is kept.
    pub max_blob: Option<u64>,
}

/// TLS for clients, by files in PEM form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Our certificate.
    pub cert_file: PathBuf,
    /// Its key.
    pub key_file: PathBuf,
    /// Authorities for clients' certificates.
    pub client_ca_file: Option<PathBuf>,
}

/// Who may pull.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientsConfig {
    /// Where clients' passwords are.
    pub htpasswd: Option<PathBuf>,
    /// Where clients' tokens are.
    pub tokens: Option<PathBuf>,
    /// Rules, each legal by itself.
    pub rules: Vec<String>,
    /// Connections of one address.
    pub max_connections: Option<usize>,
    /// Requests of one address in a second.
    pub max_requests: Option<usize>,
    /// Requests of one address at once.
    pub burst: Option<usize>,
    /// `address/prefix` of those for whom none of this holds.
    pub unlimited: Vec<String>,
}

/// One registry.
#[derive(Debug, Clone)]
pub struct UpstreamConfig {
    /// The first path segment and `ns` value that lead here.
    pub key: String,
    /// Where it answers: http or https, perhaps with a path prefix, without `/v2`.
    pub url: Url,
    /// Further names that lead here.
    pub aliases: Vec<String>,
    /// Whether one-segment names get `library/`.
    pub library: bool,
    /// How its tags age, and how long a "not found" is believed.
    pub rules: Rules,
    /// Whether it is not asked.
    pub offline: bool,
    /// Who we are there; none is anonymous.
    pub credentials: Option<CredentialsConfig>,
    /// Who we are for repositories whose names begin so; the longest beginning wins.
    pub credentials_for: Vec<(String, CredentialsConfig)>,
    /// How long a client's own login is believed, where clients show theirs in place of one of ours.
    pub by_login: Option<Duration>,
    /// What is served of it; all, where it has no credentials.
    pub serve: Serve,
    /// `host` or `host:port` that may receive the credentials too.
    pub token_realms: Vec<String>,
    /// `host`, `host:port` or `address/prefix` that it may redirect to.
    pub redirect_hosts: Vec<String>,
    /// Tried in order when `url` fails.
    pub mirrors: Vec<Url>,
    /// The proxy that it is asked through.
    pub proxy: Option<Proxy>,
    /// A further trust root.
    pub ca_file: Option<PathBuf>,
    /// Connections for one large blob.
    pub connections_per_blob: usize,
    /// Connections for blobs in all.
    pub max_connections: usize,
    /// Bytes of an image that are fetched before anyone has asked for them.
    pub read_ahead: u64,
}

/// A user name and its password or token.
#[derive(Debug, Clone)]
pub struct CredentialsConfig {
    /// Not empty, without a colon.
    pub username: String,
    /// Not empty.
    pub password: Secret,
    /// The file it was read from.
    pub password_file: Option<PathBuf>,
}

/// What clients get from an upstream that has credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serve {
    /// Only what anyone may pull there.
    Public,
    /// All that the credentials open.
    All,
}

impl Config {
    /// Whether clients are asked who they are.
    pub fn knows_clients(&self) -> bool {
        let certificates = self
            .tls
            .as_ref()
            .is_some_and(|tls| tls.client_ca_file.is_some());
        certificates || self.clients.htpasswd.is_some() || self.clients.tokens.is_some()
    }

    /// Reads `sources`, lays them over each other and checks the outcome.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let settings = Settings::read(sources)?;
        Self::check(&settings, &sources.environment)
    }

    /// Checks `settings` as a whole: names, addresses, files. Secrets are read now, from files and `environment`.
    pub fn check(
        settings: &Settings,
        environment: &[(String, String)],
    ) -> Result<Self, ConfigError> {
        check::check(settings, environment)
    }
}
