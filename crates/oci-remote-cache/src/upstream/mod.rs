//! Other people's registries: one request in, one usable answer or one well-named fault out.
//!
//! Everything a registry makes its clients go through happens here and is over when [`Upstream::send`] returns: challenges and tokens,
//! redirects to content hosts, retries, rate limits. What an answer means for tags, rights or the disk is decided by the floors above,
//! and so is resuming a body that broke off: they ask again for the rest.

mod auth;
mod body;
mod breaker;
mod connect;
mod credentials;
mod error;
mod exchange;
mod guard;
mod heads;
mod hosts;
#[cfg(fuzzing)]
mod inward;
mod keyring;
mod logins;
mod meter;
mod mirrors;
mod offline;
mod paging;
mod patience;
mod place;
mod proxy;
mod rate;
mod redirect;
mod request;
pub mod resume;
mod retry;
mod token;
mod trace;
mod trust;
mod walk;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use oci::RepositoryName;
use reqwest::header::HeaderValue;
use tokio::time::Instant;
use url::Url;

use self::auth::Learned;
use self::body::Label;
use self::breaker::Breakers;
use self::connect::Reach;
use self::error::Failure;
use self::exchange::Wire;
use self::guard::{Class, Rules};
use self::heads::Heads;
use self::meter::Meter;
use self::place::Place;
use self::rate::Gate;
use self::retry::{Decision, Tries};
use self::token::Tokens;
use self::trust::Trust;
use crate::clock::Clock;
use crate::deadline::Deadline;
use crate::metrics::{Metrics, UpstreamLabel};
use crate::names::{CredentialId, UpstreamId};

pub use self::body::{Answer, Body};
pub use self::connect::install_crypto;
pub use self::credentials::{Credentials, Identity};
pub use self::error::{Fault, Refused, SetupError, UpstreamError};
pub use self::hosts::{HostError, HostOrNetwork, Network, RealmHost};
#[cfg(fuzzing)]
pub use self::inward::try_leading_inward;
pub use self::keyring::{Keyring, Login, Password};
pub use self::logins::{LoginFile, Logins};
pub use self::meter::Strain;
pub use self::offline::{Offline, Switch};
pub use self::proxy::{Proxy, ProxyError};
pub use self::request::{Ask, Method, Mirrors, Resource, Stakes};
pub use self::trust::{judge_ca_file, system_roots};

/// What an operator configured for one upstream.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its key.
    pub id: UpstreamId,
    /// Where it is, up to what stands before `/v2`.
    pub url: Url,
    /// Other places with the same content; they are asked without credentials.
    pub mirrors: Vec<Url>,
    /// Who we are there.
    pub keyring: Keyring,
    /// Further hosts that may receive the credentials as token endpoints.
    pub token_realms: Vec<RealmHost>,
    /// Further hosts and networks that this upstream may send us to.
    pub redirect_hosts: Vec<HostOrNetwork>,
    /// Networks that every upstream may send us to.
    pub trusted_networks: Vec<Network>,
    /// Through which all of it is asked.
    pub proxy: Option<Proxy>,
    /// Extra trust roots in PEM form.
    pub ca_file: Option<PathBuf>,
    /// Our own listeners, which are never a target.
    pub own_addresses: Vec<SocketAddr>,
    /// What we call ourselves.
    pub user_agent: String,
    /// Whether it may be asked.
    pub offline: Offline,
}

/// A registry to pull from.
pub struct Upstream {
    id: UpstreamId,
    offline: Offline,
    places: Vec<Place>,
    metrics: Metrics,
}

impl Upstream {
    /// Sets an upstream up; nothing is asked yet.
    pub fn new(settings: Settings, metrics: Metrics, clock: Clock) -> Result<Self, SetupError> {
        let trust = Trust::with(settings.ca_file.as_deref())?;
        let user_agent = HeaderValue::from_str(&settings.user_agent)
            .map_err(|_invalid| SetupError::BadUserAgent)?;
        let wire = Wire {
            id: settings.id.clone(),
            user_agent,
            metrics: metrics.clone(),
            clock,
        };
        let mut first = open(&settings, &settings.url, &wire, &trust)?;
        first.keyring = settings.keyring.clone();
        let mut places = vec![first];
        for mirror in &settings.mirrors {
            places.push(open(&settings, mirror, &wire, &trust)?);
        }
        Ok(Self {
            id: settings.id,
            offline: settings.offline,
            places,
            metrics,
        })
    }

    /// The upstream's key.
    pub fn id(&self) -> &UpstreamId {
        &self.id
    }

    /// The credential for a repository, or anonymous: whose rights answers may carry.
    pub fn credential(&self, repository: &RepositoryName) -> CredentialId {
        self.places
            .first()
            .map_or_else(CredentialId::anonymous, |place| {
                place.keyring.credential(repository)
            })
    }

    /// The switch that keeps it from being asked.
    pub fn offline(&self) -> &Offline {
        &self.offline
    }

    /// How far its rate limit for this repository's credential is used up. Mirrors have limits of their own, and are not what is spared.
    pub fn strain(&self, repository: &RepositoryName) -> Strain {
        self.places.first().map_or(Strain::Easy, |place| {
            let now = place.wire.clock.now();
            place
                .meter
                .strain(&place.keyring.credential(repository), now)
        })
    }

    /// The credential whose rate limit is used up most.
    pub fn worst_strain(&self) -> (CredentialId, Strain) {
        let place = self.places.first();
        let worst = place.and_then(|place| place.meter.worst(place.wire.clock.now()));
        worst.unwrap_or_else(|| (CredentialId::anonymous(), Strain::Easy))
    }

    /// How long a 429 keeps us from asking it; nothing when it does not.
    pub fn closed_for(&self) -> Option<Duration> {
        self.places.first()?.gate.closed_for(Instant::now())
    }

    /// Whether what is left of its rate limit is for those who wait for an answer.
    pub fn is_short(&self, repository: &RepositoryName) -> bool {
        self.strain(repository) >= Strain::Scarce || self.closed_for().is_some()
    }

    /// How many places there are to ask: the URL and its mirrors.
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// Asks, and tries again where that may help, until there is an answer, a verdict, or no time left.
    pub async fn send(&self, ask: &Ask, deadline: Deadline) -> Result<Answer, UpstreamError> {
        let fail =
            |failure| UpstreamError::new(self.id.clone(), ask.describe(), failure).at(ask.mirror);
        let Some(place) = self.places.get(ask.mirror) else {
            let none = Fault::Connect(format!("there is no mirror {}", ask.mirror));
            return Err(fail(none.into()));
        };
        let label = self.label(ask);
        let mut tries = Tries::new();
        let mut last: Option<Failure> = None;
        loop {
            let attempt = deadline.run(Box::pin(walk::attempt(place, ask, &label, deadline)));
            let failure = match attempt.await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(failure)) => failure,
                Err(_late) => Fault::Late.into(),
            };
            // Tries that opened the breaker themselves are better explained by what they met.
            let failure = match (failure.fault, last.take()) {
                (Fault::BreakerOpen { .. }, Some(met)) => return Err(fail(met)),
                (fault, _) => Failure { fault, ..failure },
            };
            // That a connection kept from before has been closed meanwhile says nothing.
            let stale = last.is_none() && matches!(failure.fault, Fault::Broken(_));
            if ask.stakes == Stakes::Haste && !stale {
                return Err(fail(failure));
            }
            match tries.after(&failure, deadline.remaining()) {
                Decision::GiveUp => return Err(fail(failure)),
                Decision::Again(pause) => tokio::time::sleep(pause).await,
            }
            last = Some(failure);
        }
    }

    fn label(&self, ask: &Ask) -> Label {
        let upstream = UpstreamLabel {
            upstream: self.id.as_str().to_owned(),
        };
        let counter = self.metrics.upstream_bytes.get_or_create(&upstream).clone();
        Label {
            upstream: self.id.clone(),
            what: ask.describe().into(),
            counter,
        }
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Upstream").field(&self.id).finish()
    }
}

/// The place at `url`, without credentials.
fn open(settings: &Settings, url: &Url, wire: &Wire, trust: &Trust) -> Result<Place, SetupError> {
    place::check_base(url)?;
    let port = url.port_or_known_default().unwrap_or_default();
    let rules = Rules {
        // Found out when the host is resolved; until then the strictest.
        class: Class::Public,
        own: (guard::host_text(url), port),
        named: settings.redirect_hosts.clone(),
        trusted: settings.trusted_networks.clone(),
        listeners: settings.own_addresses.clone(),
        proxy: settings.proxy.as_ref().map(Proxy::host),
        is_local: connect::is_local,
    };
    Ok(Place {
        url: url.clone(),
        keyring: Keyring::default(),
        token_realms: settings.token_realms.clone(),
        wire: wire.clone(),
        reach: Reach::new(rules, trust.clone(), settings.proxy.clone()),
        learned: Learned::new(),
        heads: Heads::default(),
        tokens: Tokens::default(),
        gate: Gate::default(),
        meter: Meter::default(),
        offline: settings.offline.clone(),
        breakers: Breakers::default(),
    })
}

#[cfg(test)]
mod tests;
