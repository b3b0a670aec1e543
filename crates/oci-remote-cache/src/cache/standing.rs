//! How we stand with the upstreams: who refuses us, and whether it is our own credential that is refused.
//!
//! For people who look (`/readyz`, the log). What a refusal means for a request is `right.rs`'s.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use super::Cache;
use crate::clock::Timestamp;
use crate::names::{CredentialId, Source, UpstreamId};
use crate::upstream::{Strain, Upstream};

/// Our credentials that an upstream did not take when they were last shown to it.
#[derive(Debug, Default)]
pub(super) struct Logins {
    refused: Mutex<HashMap<(UpstreamId, CredentialId), Timestamp>>,
}

impl Logins {
    /// An upstream did not take this credential.
    pub(super) fn note(&self, source: &Source, credential: &CredentialId, now: Timestamp) {
        let mut held = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (source.upstream.clone(), credential.clone());
        let known = held.contains_key(&key);
        held.entry(key).or_insert(now);
        drop(held);
        if !known {
            tracing::error!(upstream = %source.upstream, %credential,
                "the upstream does not take our own credential: see `credentials` of this upstream");
        }
    }

    /// An upstream answered 200 to this credential. What it answers to nobody in particular says nothing of ours.
    pub(super) fn accepted(&self, source: &Source, credential: &CredentialId) {
        let mut held = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (source.upstream.clone(), credential.clone());
        if held.remove(&key).is_some() {
            tracing::info!(upstream = %source.upstream, %credential, "the upstream takes our own credential again");
        }
    }

    fn all(&self) -> HashMap<(UpstreamId, CredentialId), Timestamp> {
        self.refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Cache {
    /// What an operator should know about the upstreams, one line for each matter. Repositories are counted, not named: clients may read
    /// this too.
    pub fn notes(&self) -> Vec<String> {
        let mut origins = self.inner.origins.values();
        let everywhere = origins.any(|origin| origin.upstream.offline().everywhere().is_on());
        let everywhere = everywhere.then(|| "every upstream is switched offline".to_owned());
        let mut notes = self.refusals();
        for (upstream, origin) in &self.inner.origins {
            let limits = limits(&origin.upstream);
            notes.extend(limits.into_iter().map(|note| (upstream.clone(), note)));
        }
        // By upstream; the order of one upstream's notes stays.
        notes.sort_by(|one, other| one.0.cmp(&other.0));
        let of_one = notes.into_iter();
        let of_one = of_one.map(|(upstream, note)| format!("{upstream} {note}"));
        everywhere.into_iter().chain(of_one).collect()
    }

    /// Who refuses us, and whether it is our own credential that is refused.
    fn refusals(&self) -> Vec<(UpstreamId, String)> {
        let now = self.inner.clock.now();
        let mut notes: Vec<(UpstreamId, String)> = Vec::new();
        for ((upstream, credential), since) in self.inner.logins.all() {
            let age = since.age(now).as_secs();
            let note = format!("does not take our own credential {credential}, for {age} s");
            notes.push((upstream, note));
        }
        let mut suspended = BTreeMap::<_, usize>::new();
        for (source, credential) in self.inner.store.catalog().suspended() {
            *suspended.entry((source.upstream, credential)).or_default() += 1;
        }
        for ((upstream, credential), count) in suspended {
            let whom = if credential.is_anonymous() {
                "anyone without a credential".to_owned()
            } else {
                format!("our own credential {credential}")
            };
            let what = if count == 1 {
                "repository"
            } else {
                "repositories"
            };
            notes.push((upstream, format!("refuses {count} {what} to {whom}")));
        }
        notes
    }
}

/// What keeps an upstream from being asked, or soon will.
fn limits(upstream: &Upstream) -> Vec<String> {
    let mut notes = Vec::new();
    if upstream.offline().here().is_on() {
        notes.push("is switched offline".to_owned());
    }
    let (credential, strain) = upstream.worst_strain();
    if let Some(wait) = upstream.closed_for() {
        let wait = wait.as_secs() + 1;
        notes.push(format!(
            "has limited our rate, and is left alone for {wait} s"
        ));
    } else if strain >= Strain::Scarce {
        let strain = strain.as_str();
        notes.push(format!(
            "has a rate limit of which little is left ({strain}) to {credential}"
        ));
    }
    notes
}
