//! Connections: clients by class and lane, a resolver that lets through only what the guard allows, and the TLS set-up.
//!
//! No proxy but the configured one, no redirects, no decoding, no `Referer`: each of them would undo a rule that is kept elsewhere. What may be
//! connected to is decided in `guard.rs`.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Client, ClientBuilder, Request, Response};
use tokio::time::Instant;

use super::error::Fault;
use super::guard::{Class, Refusal, Rules};
use super::proxy::{Proxy, Screen};
use super::trust::Trust;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const IDLE_LIMIT: Duration = Duration::from_secs(15);
/// Idle connections kept to one host: a storm's connections are not worth their descriptors afterwards.
const IDLE_MOST: usize = 8;
const KEEPALIVE: Duration = Duration::from_secs(30);
/// How often a busy HTTP/2 connection is asked whether it lives, and how long it may take to say so: a connection that a middlebox
/// forgot must not swallow every request until its timeout.
const H2_PING: Duration = Duration::from_secs(10);
const H2_PONG: Duration = Duration::from_secs(5);
/// How long an upstream's class is believed before its host is resolved again.
const CLASS_FOR: Duration = Duration::from_secs(30);
const RESOLVE_LIMIT: Duration = Duration::from_secs(5);

/// Which connections a request uses. Blobs keep to HTTP/1.1: HTTP/2 would put all transfers from a host on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// One connection for each transfer.
    Blobs,
    /// Small answers; HTTP/2 where the host speaks it.
    Small,
}

/// The way to one place and to wherever it leads.
#[derive(Debug)]
pub(super) struct Reach {
    /// The rules without the class, which is found out later.
    rules: Rules,
    trust: Trust,
    proxy: Option<Proxy>,
    class: Mutex<Option<(Class, Instant)>>,
    /// A pool for each class, so that no connection opened under laxer rules is used under stricter ones.
    doors: Mutex<HashMap<Class, Door>>,
}

/// The clients and rules of one class.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) rules: Arc<Rules>,
    blobs: Client,
    small: Client,
    /// Where requests go first.
    pub(super) proxy: Option<Proxy>,
    screen: Arc<Screen>,
}

/// Resolves names and keeps only the addresses that the rules allow.
#[derive(Debug)]
struct GuardedResolver {
    rules: Arc<Rules>,
}

/// A name that resolves to nothing at all.
#[derive(Debug, thiserror::Error)]
#[error("the name resolves to no address")]
struct NoAddress;

tokio::task_local! {
    /// The port of the connection that the running request may open: a resolver is told only the name.
    static PORT: u16;
}

/// Makes aws-lc-rs the process's TLS provider, once. Whoever comes second finds it done.
pub fn install_crypto() {
    // An error says that a provider is installed already, which is all that is wanted.
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .ok();
}

/// Whether `address` is one of this machine's own. Connecting a UDP socket sends nothing; the kernel picks the source address, and
/// that equals the target only where the target is local.
pub(super) fn is_local(address: IpAddr) -> bool {
    if address.is_loopback() {
        return true;
    }
    let any: IpAddr = match address {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = || -> io::Result<IpAddr> {
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(SocketAddr::new(address, 9))?;
        Ok(socket.local_addr()?.ip())
    };
    source().is_ok_and(|source| source == address)
}

impl Reach {
    pub(super) fn new(rules: Rules, trust: Trust, proxy: Option<Proxy>) -> Self {
        install_crypto();
        Self {
            rules,
            trust,
            proxy,
            class: Mutex::default(),
            doors: Mutex::default(),
        }
    }

    /// The clients for what this place's host resolves to today.
    pub(super) async fn door(&self) -> Result<Door, Fault> {
        let class = self.class().await;
        let Ok(mut doors) = self.doors.lock() else {
            return Err(Fault::Connect("the connection pool is broken".into()));
        };
        if let Some(door) = doors.get(&class) {
            return Ok(door.clone());
        }
        let door = self.open(class).map_err(|error| {
            Fault::Connect(format!("cannot set up a client: {}", root_cause(&error)))
        })?;
        doors.insert(class, door.clone());
        Ok(door)
    }

    async fn class(&self) -> Class {
        let held = self.class.lock().ok().and_then(|held| *held);
        if let Some((class, since)) = held
            && since.elapsed() < CLASS_FOR
        {
            return class;
        }
        let (host, port) = &self.rules.own;
        let found = tokio::time::timeout(
            RESOLVE_LIMIT,
            tokio::net::lookup_host((host.as_str(), *port)),
        );
        let Ok(Ok(found)) = found.await else {
            // Without an answer there will be no connection either; until then the strictest class does no harm.
            let class = held.map_or(Class::Public, |(class, _since)| class);
            if self.proxy.is_some() {
                // A proxy may know the name all the same: no waiting for each request.
                self.note(class);
            }
            return class;
        };
        let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
        let class = Class::of(&addresses);
        self.note(class);
        class
    }

    fn note(&self, class: Class) {
        if let Ok(mut held) = self.class.lock() {
            *held = Some((class, Instant::now()));
        }
    }

    fn open(&self, class: Class) -> reqwest::Result<Door> {
        let rules = Arc::new(Rules {
            class,
            ..self.rules.clone()
        });
        Ok(Door {
            blobs: self.client(&rules, &["http/1.1"])?,
            small: self.client(&rules, &["h2", "http/1.1"])?,
            proxy: self.proxy.clone(),
            screen: Arc::default(),
            rules,
        })
    }

    fn client(&self, rules: &Arc<Rules>, protocols: &[&str]) -> reqwest::Result<Client> {
        let builder =
            plain_builder(rules).tls_backend_preconfigured(self.trust.settings(protocols));
        match self.proxy.as_ref().map(Proxy::for_client).transpose()? {
            Some(proxy) => builder.proxy(proxy).build(),
            None => builder.build(),
        }
    }
}

impl Door {
    /// Sends `request`; the caller bounds the time.
    pub(super) async fn execute(&self, lane: Lane, request: Request) -> Result<Response, Fault> {
        if self.proxy.as_ref().is_some_and(Proxy::resolves) {
            let screened = self.screen.admit(&self.rules, request.url()).await;
            screened.map_err(|refusal| Fault::Forbidden(refusal.to_string()))?;
        }
        let sent = self.send(lane, request).await;
        let response = sent.map_err(|error| fault_of(&error, self.proxy.as_ref()))?;
        match &self.proxy {
            // What refuses us is the proxy; to the registry nothing was said.
            Some(proxy) if response.status().as_u16() == 407 => Err(Fault::Connect(format!(
                "the proxy {proxy} does not take our login"
            ))),
            Some(_) | None => Ok(response),
        }
    }

    async fn send(&self, lane: Lane, request: Request) -> reqwest::Result<Response> {
        let client = match lane {
            Lane::Blobs => &self.blobs,
            Lane::Small => &self.small,
        };
        let port = request.url().port_or_known_default().unwrap_or_default();
        PORT.scope(port, client.execute(request)).await
    }
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A client prints its proxy, password and all.
        let mut shown = f.debug_struct("Door");
        shown
            .field("rules", &self.rules)
            .field("proxy", &self.proxy);
        shown.finish_non_exhaustive()
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        // Read here and not in the future: only this call is sure to run inside the request's own task.
        let port = PORT.try_with(|port| *port).unwrap_or_default();
        let rules = Arc::clone(&self.rules);
        Box::pin(async move { resolve(&rules, name.as_str(), port).await })
    }
}

/// What may be done about it, where rustls' own words do not tell people.
fn advice(error: &reqwest::Error) -> Option<&'static str> {
    use rustls::{CertificateError, InvalidMessage};
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "what rustls says of the others tells enough"
    )]
    match of_tls(error)? {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => Some(
            "no authority that is trusted here has signed it; `ca_file` of the upstream adds one",
        ),
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if format!("{other:?}").contains("CaUsedAsEndEntity") =>
        {
            Some(
                "an authority's own certificate (CA:TRUE) cannot be a server's as well: have it sign another one",
            )
        }
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            Some("the other side does not speak TLS; should its URL begin with http://?")
        }
        _ => None,
    }
}

/// The TLS library's own error. An I/O error does not name what it wraps as its source.
fn of_tls(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(found) = inner.downcast_ref() {
            return Some(found);
        }
        let wrapped = inner.downcast_ref().and_then(io::Error::get_ref);
        cause = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => inner.source(),
        };
    }
    None
}

/// The innermost cause of an error. The outer ones repeat it, and reqwest's own holds the URL.
pub(super) fn root_cause(error: &reqwest::Error) -> String {
    let mut cause = std::error::Error::source(error);
    let mut text = "the request failed".to_owned();
    while let Some(inner) = cause {
        text = inner.to_string();
        cause = inner.source();
    }
    text
}

/// What a request that got no response headers died of.
fn fault_of(error: &reqwest::Error, proxy: Option<&Proxy>) -> Fault {
    if let Some(refusal) = refusal(error) {
        return Fault::Forbidden(refusal);
    }
    let cause = match advice(error) {
        Some(advice) => format!("{} ({advice})", root_cause(error)),
        None => root_cause(error),
    };
    let cause = match proxy {
        Some(proxy) => format!("through the proxy {proxy}: {cause}"),
        None => cause,
    };
    if error.is_connect() || error.is_dns() {
        return Fault::Connect(cause);
    }
    if error.is_timeout() {
        return Fault::Late;
    }
    Fault::Broken(cause)
}

/// The guard's refusal, if that is why a request failed.
fn refusal(error: &reqwest::Error) -> Option<String> {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(refusal) = inner.downcast_ref::<Refusal>() {
            return Some(refusal.to_string());
        }
        cause = inner.source();
    }
    None
}

fn plain_builder(rules: &Arc<Rules>) -> ClientBuilder {
    Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .referer(false)
        .connect_timeout(CONNECT_LIMIT)
        .pool_idle_timeout(IDLE_LIMIT)
        .pool_max_idle_per_host(IDLE_MOST)
        .tcp_keepalive(KEEPALIVE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(H2_PING)
        .http2_keep_alive_timeout(H2_PONG)
        .dns_resolver(GuardedResolver {
            rules: Arc::clone(rules),
        })
}

/// Tells the operator which address it was: the refusal itself, which clients see, does not.
pub(super) fn turned_away(refusal: &Refusal, address: SocketAddr) {
    tracing::warn!(target: "upstream", %refusal, %address, "not connecting to an address that a name resolves to");
}

async fn resolve(
    rules: &Rules,
    name: &str,
    port: u16,
) -> Result<Addrs, Box<dyn std::error::Error + Send + Sync>> {
    let name = name.trim_start_matches('[').trim_end_matches(']');
    if rules.is_proxy(name) {
        // Its own URL says its port; `port` is that of what is asked for through it.
        let found = tokio::net::lookup_host((name, 0)).await?;
        return Ok(Box::new(found.collect::<Vec<_>>().into_iter()));
    }
    let found = tokio::net::lookup_host((name, port)).await?;
    let mut allowed = Vec::new();
    let mut refused = None;
    for address in found {
        match rules.judge(name, address) {
            Ok(()) => allowed.push(address),
            Err(refusal) => {
                turned_away(&refusal, address);
                refused = Some(refusal);
            }
        }
    }
    match (allowed.is_empty(), refused) {
        (false, _) => Ok(Box::new(allowed.into_iter())),
        (true, Some(refusal)) => Err(refusal.into()),
        (true, None) => Err(NoAddress.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Class, Refusal, Rules, is_local, resolve};

    fn rules() -> Rules {
        Rules {
            class: Class::Public,
            own: ("registry.example".into(), 443),
            named: Vec::new(),
            trusted: Vec::new(),
            listeners: Vec::new(),
            proxy: None,
            is_local,
        }
    }

    #[tokio::test]
    async fn of_a_name_only_the_addresses_that_are_allowed_are_found() {
        let inward = resolve(&rules(), "localhost", 443).await.err().unwrap();
        let refusal = inward.downcast_ref::<Refusal>().unwrap().to_string();
        assert!(refusal.starts_with("localhost:443 is on this machine"));
        let widened = Rules {
            named: vec!["127.0.0.1".parse().unwrap()],
            ..rules()
        };
        // That it has another one too is nothing to go by.
        let found = resolve(&widened, "localhost", 443).await.unwrap();
        let found: Vec<String> = found.map(|address| address.to_string()).collect();
        assert!(!found.is_empty() && found.iter().all(|address| address == "127.0.0.1:443"));
    }

    #[tokio::test]
    async fn a_proxy_is_met_at_its_own_port() {
        let rules = Rules {
            proxy: Some("localhost".into()),
            ..rules()
        };
        let found = resolve(&rules, "localhost", 443).await.unwrap();
        let ports: Vec<u16> = found.map(|address| address.port()).collect();
        // The connector puts its URL's port, said or implied, where there is none.
        assert!(!ports.is_empty() && ports.iter().all(|port| *port == 0));
    }

    #[test]
    fn loopback_is_local_and_the_internet_is_not() {
        assert!(is_local("127.0.0.1".parse().unwrap()));
        assert!(is_local("127.3.4.5".parse().unwrap()));
        assert!(!is_local("8.8.8.8".parse().unwrap()));
        assert!(!is_local("2606:4700::1".parse().unwrap()));
    }
}
