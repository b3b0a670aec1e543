//! One place to ask: an upstream's URL or one of its mirrors, with everything that is kept about it.
//!
//! A mirror is somebody else's machine: it never sees the upstream's credentials, and its failures and limits are its own.

use std::sync::Arc;

use tokio::time::Instant;
use url::Url;

use super::auth::Learned;
use super::breaker::Breaker;
use super::connect::Reach;
use super::credentials::{Credentials, Identity};
use super::error::{Failure, Fault, SetupError};
use super::exchange::{Reply, Wire};
use super::hosts::RealmHost;
use super::keyring::Keyring;
use super::rate::{self, Gate};
use super::request::Ask;
use super::token::Tokens;
use crate::metrics::UpstreamLabel;

/// Where requests go, and what was learned there.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) url: Url,
    pub(super) keyring: Keyring,
    pub(super) token_realms: Vec<RealmHost>,
    pub(super) wire: Wire,
    pub(super) reach: Reach,
    pub(super) learned: Learned,
    pub(super) tokens: Tokens,
    pub(super) gate: Gate,
    pub(super) breaker: Breaker,
}

impl Place {
    /// What a request may show this place about who it is.
    pub(super) async fn credentials(&self, ask: &Ask) -> Result<Option<Arc<Credentials>>, Failure> {
        match ask.identity {
            Identity::Configured => Ok(self.keyring.credentials(&ask.repository).await?),
            Identity::Anonymous => Ok(None),
        }
    }

    /// Lets a request pass, unless the place wants to be left alone.
    pub(super) fn enter(&self) -> Result<(), Failure> {
        let now = Instant::now();
        if let Some(retry_after) = self.gate.closed_for(now) {
            return Err(Fault::RateLimited { retry_after }.into());
        }
        self.breaker
            .enter(now)
            .map_err(|retry_after| Fault::BreakerOpen { retry_after }.into())
    }

    /// Keeps what an answer says about the requests left.
    pub(super) fn note_rate(&self, reply: &Reply) {
        let Some(left) = reply
            .header("ratelimit-remaining")
            .and_then(rate::remaining)
        else {
            return;
        };
        let label = UpstreamLabel {
            upstream: self.wire.id.as_str().to_owned(),
        };
        let gauge = self.wire.metrics.rate_remaining.get_or_create(&label);
        gauge.set(left);
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
