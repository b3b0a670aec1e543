//! Assembly: configuration in, a running cache out, and its orderly end.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use oci::{Digest, NamePath, Reference, RepositoryName, Route, Tag, Target};

use crate::admin::Admin;
use crate::admin::health::{self, Condition, Readiness};
use crate::admin::offline::Switches;
use crate::cache::{Cache, Origin, Shown};
use crate::cli::history::Era;
use crate::cli::ls::Row;
use crate::clock::Clock;
use crate::config::{Config, CredentialsConfig, Serve, TlsConfig, UpstreamConfig};
use crate::fill::{Connections, Fills};
use crate::http::dispatch::{Gate, Registry};
use crate::http::doorman::{Books, Doorman};
use crate::http::fair::{Crowd, Exempt, Pace, Rate};
use crate::http::listen::{
    BindError, Limits, Listener, Tls, TlsFiles, connection_limit, raise_open_files, serve,
};
use crate::metrics::Metrics;
use crate::names::{Source, UpstreamId};
use crate::policy::namespace::Entry;
use crate::policy::rules::RuleError;
use crate::policy::{Door, Names, Rules as ClientRules};
use crate::secret::Secret;
use crate::signals::Signals;
use crate::store::catalog::{Catalog, TagEra};
use crate::store::error::OpenError;
use crate::store::layout::Layout;
use crate::store::{Store, StoreSettings};
use crate::tasks::Tasks;
use crate::upstream::{
    HostError, Keyring, Login, LoginFile, Logins, Network, Offline, Password, Settings, SetupError,
    Switch, Upstream, system_roots,
};
use crate::watched::{FileError, Watched};

/// How long transfers under way may go on after the process was asked to stop.
const DRAIN: Duration = Duration::from_secs(25);

/// Connections the admin listener takes: it serves a scraper and an operator.
const ADMIN_CONNECTIONS: usize = 64;

/// Why the cache does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener cannot be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The cache folder cannot be used.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// An upstream cannot be set up.
    #[error("upstream \"{key}\": {error}")]
    Upstream {
        /// Its key.
        key: String,
        /// What is wrong.
        error: SetupError,
    },
    /// A host or network in the configuration is none.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A file that is needed cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// A rule in the configuration is none.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// The system refused something a process needs.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
}

/// A cache that is ready to serve.
#[derive(Debug)]
pub struct App {
    clients: Listener,
    operators: Listener,
    registry: Arc<Registry>,
    admin: Arc<Admin>,
    limits: Limits,
    metrics: Metrics,
    tasks: Tasks,
}

impl App {
    /// Puts the parts together. Listeners are bound first: when that fails nothing has been written.
    pub async fn start(config: Config, clock: Clock) -> Result<Self, StartError> {
        let limits = Limits::new(connection_limit(raise_open_files()));
        let tls = config.tls.as_ref().map(tls).transpose()?;
        let clients = Listener::bind(config.listen, "listen")?
            .with_tls(tls)
            .with_crowd(crowd(&config)?);
        let operators = Listener::bind(config.admin_listen, "admin_listen")?;
        let (metrics, tasks) = (Metrics::new(), Tasks::new());
        // Nobody waits for this now; without it the first request would.
        drop(tasks.spawn_blocking(system_roots));
        let gate = gate(&config, &tasks, &metrics)?;
        metrics.max_connections.set(limits.connections as u64);
        let own = [clients.local_addr(), operators.local_addr()];
        let everywhere = Switch::default();
        if config.offline {
            everywhere.turn_on();
        }
        let origins = origins(&config, &everywhere, &own, (&metrics, &clock, &tasks))?;
        let offline = origins.iter();
        let offline = offline.map(|(id, origin)| (id.clone(), origin.upstream.offline().clone()));
        let switches = Switches::new(everywhere, offline.collect(), metrics.clone());
        let settings = StoreSettings {
            dir: config.cache_dir.clone(),
            max_size: config.cache.max_size,
            max_blob: config.cache.max_blob,
        };
        let store = Store::open(settings, clock.clone(), metrics.clone(), tasks.clone()).await?;
        greet(&store);
        let fills = Fills::new(
            store.clone(),
            metrics.clone(),
            tasks.clone(),
            connections(&config),
        );
        let cache = Cache::new(
            store.clone(),
            fills,
            origins,
            (clock, metrics.clone(), tasks.clone()),
        );
        let watched = cache.clone();
        let readiness: Readiness = Arc::new(move || Condition {
            reasons: store.condition().into_iter().collect(),
            notes: watched.notes(),
        });
        let admin = Admin::new(metrics.clone(), Arc::clone(&readiness)).with_switches(switches);
        let aside = Box::new(move |path: &str| health::answer(path, &readiness));
        let mut registry = Registry::new(cache, names(&config), aside, gate);
        if config.catalog {
            registry = registry.with_catalog();
        }
        Ok(Self {
            clients,
            operators,
            registry: Arc::new(registry),
            admin: Arc::new(admin),
            limits,
            metrics,
            tasks,
        })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.clients.local_addr()
    }

    /// Serves until SIGTERM or SIGINT (or until the terminal is closed that it was started from), then lets transfers under way end for up to
    /// `DRAIN`; a second signal ends at once.
    pub async fn run(self) -> Result<(), StartError> {
        let mut signals = Signals::new()?;
        let tasks = self.tasks.clone();
        let admin_limits = Limits {
            connections: ADMIN_CONNECTIONS,
            ..self.limits
        };
        let doors = async {
            tokio::try_join!(
                serve(
                    self.clients,
                    self.registry,
                    self.limits,
                    tasks.clone(),
                    self.metrics.clone()
                ),
                serve(
                    self.operators,
                    self.admin,
                    admin_limits,
                    tasks.clone(),
                    Metrics::new()
                ),
            )
        };
        let ended = async {
            let served = doors.await;
            tasks.ended(DRAIN).await;
            served
        };
        tokio::pin!(ended);
        tokio::select! {
            served = &mut ended => return served.map(drop).map_err(StartError::System),
            () = signals.next() => {}
        }
        tracing::info!("stopping: transfers under way may end; another signal stops at once");
        tasks.stop();
        tokio::select! {
            _ = &mut ended => tracing::info!("stopped"),
            () = tokio::time::sleep(DRAIN) => tracing::warn!("stopped with transfers under way"),
            () = signals.next() => tracing::warn!("stopped at once"),
        }
        Ok(())
    }
}

/// The first lines of a log: what runs where, and whether what it keeps will last.
fn greet(store: &Store) {
    let folder = store.layout().root();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        folder = %folder.display(),
        max_size_bytes = store.usage().max_size(),
        stored_blobs = store.usage().count(),
        stored_bytes = store.usage().total(),
        "starting"
    );
    if let Some(warning) = store.layout().lasting().warning(folder) {
        tracing::warn!("{warning}");
    }
    if store.layout().is_open_to_all() {
        tracing::warn!(
            folder = %folder.display(),
            "everybody may write in the cache's folder, and so replace or remove what is kept: chmod 0700 keeps others out"
        );
    }
}

fn connections(config: &Config) -> HashMap<UpstreamId, Connections> {
    let limits = |upstream: &UpstreamConfig| Connections {
        per_blob: upstream.connections_per_blob,
        per_upstream: upstream.max_connections,
    };
    config
        .upstreams
        .iter()
        .map(|upstream| (UpstreamId::new(&upstream.key), limits(upstream)))
        .collect()
}

fn names(config: &Config) -> Names {
    let entry = |upstream: &UpstreamConfig| Entry {
        id: UpstreamId::new(&upstream.key),
        aliases: upstream.aliases.clone(),
        library: upstream.library,
    };
    let entries: Vec<Entry> = config.upstreams.iter().map(entry).collect();
    Names::new(&entries, config.default_upstream.as_deref())
}

fn tls(config: &TlsConfig) -> Result<Tls, FileError> {
    Tls::open(&TlsFiles {
        certificate: config.cert_file.clone(),
        key: config.key_file.clone(),
        client_authorities: config.client_ca_file.clone(),
    })
}

fn gate(config: &Config, tasks: &Tasks, metrics: &Metrics) -> Result<Gate, StartError> {
    let clients = &config.clients;
    let books = Books {
        htpasswd: clients.htpasswd.clone(),
        tokens: clients.tokens.clone(),
    };
    let door = if config.knows_clients() {
        Door::Kept
    } else {
        Door::Open
    };
    let by_login = config.upstreams.iter();
    let by_login = by_login.filter(|upstream| upstream.by_login.is_some());
    Ok(Gate {
        doorman: Doorman::new(&books, tasks.clone())?,
        rules: ClientRules::new(parsed(&clients.rules)?, door),
        by_login: by_login
            .map(|upstream| UpstreamId::new(&upstream.key))
            .collect(),
        pace: pace(config)?,
        metrics: metrics.clone(),
    })
}

/// The limit on connections for each client address.
fn crowd(config: &Config) -> Result<Option<Crowd>, HostError> {
    let exempt = exempt(config)?;
    let most = config.clients.max_connections;
    Ok(most.map(|most| Crowd::new(most, exempt)))
}

/// The limit on requests for each client address.
fn pace(config: &Config) -> Result<Option<Pace>, HostError> {
    let exempt = exempt(config)?;
    let clients = &config.clients;
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Ok(clients.max_requests.map(|most| {
        let rate = Rate {
            per_second: count(most),
            burst: count(clients.burst.unwrap_or_else(|| most.saturating_mul(10))),
        };
        Pace::new(rate, exempt)
    }))
}

fn exempt(config: &Config) -> Result<Exempt, HostError> {
    let networks: Vec<Network> = parsed(&config.clients.unlimited)?;
    Ok(Arc::new(move |address| {
        networks.iter().any(|network| network.contains(address))
    }))
}

fn origins(
    config: &Config,
    everywhere: &Switch,
    own: &[SocketAddr],
    (metrics, clock, tasks): (&Metrics, &Clock, &Tasks),
) -> Result<HashMap<UpstreamId, Origin>, StartError> {
    let logins = logins(config, tasks)?;
    config
        .upstreams
        .iter()
        .map(|upstream| {
            let keyring = keyring(upstream, logins.as_ref(), tasks)?;
            let mut settings = settings(config, upstream, own, keyring)?;
            settings.offline = Offline::beside(everywhere);
            if upstream.offline {
                settings.offline.here().turn_on();
            }
            let id = settings.id.clone();
            let rules = upstream.rules.clone();
            let read_ahead = upstream.read_ahead;
            let shown = match (upstream.by_login, upstream.serve) {
                (Some(ttl), _) => Shown::Proven(ttl),
                (None, Serve::All) => Shown::All,
                (None, Serve::Public) => Shown::Public,
            };
            let made = Upstream::new(settings, metrics.clone(), clock.clone());
            let upstream = made.map_err(|error| StartError::Upstream {
                key: upstream.key.clone(),
                error,
            })?;
            Ok((
                id,
                Origin {
                    upstream: Arc::new(upstream),
                    rules,
                    shown,
                    read_ahead,
                },
            ))
        })
        .collect()
}

/// The login files, if there are any.
fn logins(config: &Config, tasks: &Tasks) -> Result<Option<Logins>, FileError> {
    let open = |path: &PathBuf| Watched::open(path, LoginFile::parse);
    let file = config.docker_config.as_ref().map(open).transpose()?;
    let variable = config.docker_auth.as_ref().map(|text| {
        LoginFile::parse(text.expose().as_bytes())
            .map_err(|why| FileError::new(Path::new("$DOCKER_AUTH_CONFIG"), why))
    });
    let variable = variable.transpose()?;
    let any = file.is_some() || variable.is_some();
    Ok(any.then(|| Logins::new(file, variable, tasks.clone())))
}

/// What an upstream may be shown: its own credentials, or what login files hold under one of its names.
fn keyring(
    upstream: &UpstreamConfig,
    logins: Option<&Logins>,
    tasks: &Tasks,
) -> Result<Keyring, FileError> {
    if upstream.by_login.is_some() {
        return Ok(Keyring::default());
    }
    let everywhere = upstream.credentials.iter();
    let everywhere = everywhere.map(|credentials| (String::new(), credentials));
    let some = upstream.credentials_for.iter();
    let some = some.map(|(prefix, credentials)| (prefix.clone(), credentials));
    let own: Result<Vec<_>, FileError> = everywhere
        .chain(some)
        .map(|(prefix, credentials)| Ok((prefix, login(credentials)?)))
        .collect();
    let files = logins.filter(|_| upstream.credentials.is_none());
    let files = files.map(|logins| (logins.clone(), names_in_logins(upstream)));
    Ok(Keyring::new(own?, files, tasks.clone()))
}

fn login(credentials: &CredentialsConfig) -> Result<Login, FileError> {
    let password = match &credentials.password_file {
        Some(path) => Password::Kept(Watched::open(path, read_password)?),
        None => Password::Said(credentials.password.clone()),
    };
    Ok(Login {
        username: credentials.username.clone(),
        password,
    })
}

/// Key, aliases, and the address's host with its port, where it says one.
fn names_in_logins(upstream: &UpstreamConfig) -> Vec<String> {
    let host = upstream
        .url
        .host_str()
        .map(|host| match upstream.url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        });
    let names = std::iter::once(upstream.key.clone()).chain(upstream.aliases.clone());
    names.chain(host).collect()
}

fn read_password(bytes: &[u8]) -> Result<Secret, String> {
    let text = std::str::from_utf8(bytes).map_err(|_invalid| "it is not UTF-8".to_owned())?;
    // Editors and `echo` end a file with a line end that is no part of the password.
    let text = text.trim_end_matches(['\r', '\n']);
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    Ok(Secret::new(text.to_owned()))
}

fn settings(
    config: &Config,
    upstream: &UpstreamConfig,
    own: &[SocketAddr],
    keyring: Keyring,
) -> Result<Settings, HostError> {
    Ok(Settings {
        id: UpstreamId::new(&upstream.key),
        url: upstream.url.clone(),
        mirrors: upstream.mirrors.clone(),
        keyring,
        token_realms: parsed(&upstream.token_realms)?,
        redirect_hosts: parsed(&upstream.redirect_hosts)?,
        trusted_networks: parsed(&config.trusted_networks)?,
        proxy: upstream.proxy.clone(),
        ca_file: upstream.ca_file.clone(),
        own_addresses: own.to_vec(),
        user_agent: concat!("oci-remote-cache/", env!("CARGO_PKG_VERSION")).to_owned(),
        offline: Offline::default(),
    })
}

fn parsed<T: FromStr>(texts: &[String]) -> Result<Vec<T>, T::Err> {
    texts.iter().map(|text| text.parse()).collect()
}

/// Runs a cache until it is told to stop: the command `serve`.
pub fn serve_blocking(config: Config) -> Result<(), String> {
    crate::upstream::install_crypto();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| format!("cannot start the runtime: {error}"))?;
    let served = runtime.block_on(async { App::start(config, Clock::system()).await?.run().await });
    // Work on the blocking pool that is still under way after the drain is left behind: recovery knows what to do with it.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served.map_err(|error| error.to_string())
}

/// What the cache in `folder` holds: the command `ls`. It only reads, also beside a running server.
pub fn list(folder: &Path) -> Result<Vec<Row>, String> {
    let layout = Layout::peek(folder).map_err(|error| error.to_string())?;
    let catalog = Catalog::peek(&layout, &Metrics::new()).map_err(|error| error.to_string())?;
    let tags = catalog.tags().map_err(|error| error.to_string())?;
    let holdings = catalog.holdings().map_err(|error| error.to_string())?;
    let now = Clock::system().now();
    let tagged: HashSet<(Source, Digest)> = tags
        .iter()
        .map(|tag| (tag.source.clone(), tag.digest))
        .collect();
    let untagged = holdings.into_iter().filter(|held| {
        held.last_used.is_some()
            && !tagged.contains(&(held.membership.source.clone(), held.membership.digest))
    });
    let tags = tags.iter().map(|tag| Row {
        upstream: tag.source.upstream.to_string(),
        repository: tag.source.repository.to_string(),
        tag: Some(tag.tag.to_string()),
        digest: tag.digest.to_string(),
        media_type: tag.media_type.to_string(),
        size: tag.size,
        age: tag.checked.age(now),
    });
    let rest = untagged.map(|held| Row {
        upstream: held.membership.source.upstream.to_string(),
        repository: held.membership.source.repository.to_string(),
        tag: None,
        digest: held.membership.digest.to_string(),
        media_type: held
            .media_type
            .map(|media_type| media_type.to_string())
            .unwrap_or_default(),
        size: held.size.unwrap_or_default(),
        age: held.last_used.unwrap_or_default().age(now),
    });
    Ok(tags.chain(rest).collect())
}

/// What the tag `reference` has meant, the latest first: the command `tags history`. It only reads, also beside a running server.
pub fn history(config: &Config, reference: &str) -> Result<Vec<Era>, String> {
    let (source, tag) = tag_of(config, reference)?;
    let layout = Layout::peek(&config.cache_dir).map_err(|error| error.to_string())?;
    let catalog = Catalog::peek(&layout, &Metrics::new()).map_err(|error| error.to_string())?;
    let eras = catalog.tag_history(&source, &tag);
    let eras = eras.map_err(|error| error.to_string())?;
    if eras.is_empty() {
        return Err(format!("{source}:{tag} was never seen here"));
    }
    let era = |era: TagEra| Era {
        digest: era.digest.to_string(),
        first_seen: era.first_seen,
        last_seen: era.last_seen,
    };
    Ok(eras.into_iter().map(era).collect())
}

/// The repository and tag that clients of this cache mean by `reference`.
fn tag_of(config: &Config, reference: &str) -> Result<(Source, Tag), String> {
    if let Some((name, _digest)) = reference.split_once('@') {
        return Err(format!(
            "{reference:?} names a digest, which has no history: write the tag that is meant and no digest, as in \"{}\"",
            tagged(name)
        ));
    }
    let start = reference.rfind('/').map_or(0, |slash| slash + 1);
    let colon = reference.rfind(':').filter(|colon| *colon >= start);
    let (name, tag) = match colon.and_then(|colon| reference.split_at_checked(colon)) {
        Some((name, tag)) => (name, tag.trim_start_matches(':')),
        None => (reference, "latest"),
    };
    let path = format!("/v2/{name}/manifests/{tag}");
    let route = Route::parse(&path, None).map_err(|error| format!("{reference:?}: {error}"))?;
    let Target::Manifest {
        name,
        reference: Reference::Tag(tag),
    } = route.target
    else {
        return Err(format!("{reference:?} names no tag"));
    };
    let resolved = names(config).resolve(None, &name, None);
    let resolved = resolved.map_err(|error| match without_us(config, &name) {
        Some(rest) => format!(
            "no upstream is called \"{}\"; if that is this cache's own address, leave it off: {rest}:{tag}",
            name.first()
        ),
        None => error.to_string(),
    })?;
    Ok((Source::new(resolved.upstream, resolved.repository), tag))
}

/// `name` with a tag behind it: its own, or a placeholder.
fn tagged(name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or_default();
    if last.contains(':') {
        name.to_owned()
    } else {
        format!("{name}:<tag>")
    }
}

/// What is left of a name that begins with an address like ours, as in what clients pull, if an upstream's name comes next.
fn without_us(config: &Config, name: &NamePath) -> Option<RepositoryName> {
    let first = name.first();
    let rest = name.rest()?;
    let next = rest.segments().next()?;
    let leads = |upstream: &UpstreamConfig| {
        upstream.key == next || upstream.aliases.iter().any(|alias| alias == next)
    };
    let like_ours = first == "localhost" || first.contains(':');
    (like_ours && config.upstreams.iter().any(leads)).then_some(rest)
}
