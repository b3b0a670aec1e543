//! One place to ask: an upstream's URL or one of its mirrors, with everything that is kept about it.
//!
//! A mirror is somebody else's machine: it never sees the upstream's credentials, and its failures and limits are its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use url::Url;

use super::auth::Learned;
use super::breaker::{Asker, Breakers};
use super::connect::Reach;
use super::credentials::{Credentials, Identity};
use super::error::{Failure, Fault, SetupError};
use super::exchange::{Reply, Wire};
use super::heads::Heads;
use super::hosts::RealmHost;
use super::keyring::Keyring;
use super::meter::{Meter, Reading};
use super::offline::Offline;
use super::rate::{self, Gate};
use super::request::Ask;
use super::token::Tokens;
use crate::metrics::UpstreamLabel;
use crate::names::CredentialId;

/// Where requests go, and what was learned there.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) url: Url,
    pub(super) keyring: Keyring,
    pub(super) token_realms: Vec<RealmHost>,
    pub(super) wire: Wire,
    pub(super) reach: Reach,
    pub(super) learned: Learned,
    pub(super) heads: Heads,
    pub(super) tokens: Tokens,
    pub(super) gate: Gate,
    pub(super) meter: Meter,
    pub(super) offline: Offline,
    pub(super) breakers: Breakers,
}

impl Place {
    /// What a request may show this place about who it is.
    pub(super) async fn credentials(&self, ask: &Ask) -> Result<Option<Arc<Credentials>>, Failure> {
        match ask.identity.clone() {
            Identity::Configured => Ok(self.keyring.credentials(&ask.repository).await?),
            // Mirrors see nobody's credentials.
            Identity::Client(login) if ask.mirror == 0 => Ok(Some(Arc::clone(&login))),
            Identity::Client(_) | Identity::Anonymous => Ok(None),
        }
    }

    /// Lets a request pass, unless the place wants to be left alone, or the operator wants it so. A client's own login has limits of its
    /// own: what others used up keeps it out no more than the other way round.
    pub(super) fn enter(&self, ask: &Ask) -> Result<(), Failure> {
        if self.offline.is_on() {
            return Err(Fault::Offline.into());
        }
        let now = Instant::now();
        let own_limits = ask.mirror == 0 && matches!(ask.identity, Identity::Client(_));
        let closed_for = self.gate.closed_for(now).filter(|_| !own_limits);
        if let Some(retry_after) = closed_for {
            return Err(Fault::RateLimited { retry_after }.into());
        }
        self.breakers
            .enter(&asker(ask), now)
            .map_err(|retry_after| Fault::BreakerOpen { retry_after }.into())
    }

    /// Keeps what an answer to `credential` says about the requests left. Clients' own limits are theirs to know.
    pub(super) fn note_rate(&self, reply: &Reply, credential: &CredentialId) {
        if credential.is_client() {
            return;
        }
        let limit = reply.header("ratelimit-limit");
        if let Some(reading) = Reading::of(limit, reply.header("ratelimit-remaining")) {
            let source = reply.header("docker-ratelimit-source");
            let Wire {
                id, clock, metrics, ..
            } = &self.wire;
            let (whose, said) = ((id, credential), (reading, source));
            self.meter.note(whose, said, clock.now(), metrics);
        }
    }

    /// Leaves the place alone after a 429 that says when to come back, perhaps. Returns how long. What one client used up with its own
    /// login keeps nobody else out.
    pub(super) fn close(&self, reply: &Reply, credential: &CredentialId) -> Duration {
        let wait = self.wire.retry_after(reply).unwrap_or(rate::UNSAID);
        if credential.is_client() {
            return wait;
        }
        self.gate.close(wait, Instant::now());
        let label = UpstreamLabel {
            upstream: self.wire.id.as_str().to_owned(),
        };
        let until = self.wire.clock.now().seconds();
        let until = until.saturating_add(i64::try_from(wait.as_secs()).unwrap_or(i64::MAX));
        self.wire
            .metrics
            .rate_closed
            .get_or_create(&label)
            .set(until);
        wait
    }
}

/// Whose failures this question's are. Mirrors see no client's login: all who come with one are strangers there.
pub(super) fn asker(ask: &Ask) -> Asker {
    match &ask.identity {
        Identity::Configured => Asker::Us,
        Identity::Client(login) if ask.mirror == 0 => Asker::One(login.id.clone()),
        Identity::Client(_) | Identity::Anonymous => Asker::One(CredentialId::anonymous()),
    }
}

/// Checks that `url` can be the base of a registry.
pub(super) fn check_base(url: &Url) -> Result<(), SetupError> {
    let bad = |why| SetupError::BadUrl {
        url: super::trace::url(url),
        why,
    };
    if !matches!(url.scheme(), "http" | "https") {
        return Err(bad("it is neither http nor https"));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(bad("it names no host"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("credentials belong into `credentials`"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("it holds a query or a fragment"));
    }
    Ok(())
}
