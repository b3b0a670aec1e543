//! Which client's login was shown to open which repository, and until when: in memory only, never longer than the operator allows.
//!
//! What is remembered is found by a hash of the login that only this process can make. Refusals are kept apart from proofs, so that
//! somebody who guesses passwords pushes out nobody's proof; and only a few logins at a time are tried at one upstream.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use quick_cache::sync::Cache as Memory;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::error::CacheError;
use super::single_flight::Flights;
use super::visit::Visitor;
use crate::names::{CredentialId, UpstreamId};
use crate::tasks::Tasks;
use crate::upstream::Resource;

/// Proofs remembered at most, and as many refusals.
const MOST: usize = 20_000;

/// Logins tried at one upstream at the same time.
const AT_ONCE: usize = 8;

/// A refusal is remembered for at least so long, whatever the operator says of "not found".
const AT_LEAST: Duration = Duration::from_secs(1);

/// Whom an upstream meant when it refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denial {
    /// It does not know the login, or wants one.
    Login,
    /// It knows the login, which does not open this.
    Rights,
}

/// What clients' logins were shown to open.
#[derive(Debug)]
pub(super) struct Proofs {
    open: Memory<Visitor, Instant>,
    refused: Memory<Visitor, (Denial, Instant)>,
    /// Logins that an upstream does not know, whatever they are for.
    wrong: Memory<(UpstreamId, CredentialId), Instant>,
    /// Questions under way.
    pub(super) questions: Flights<(Visitor, Resource), Result<(), CacheError>>,
    turns: HashMap<UpstreamId, Arc<Semaphore>>,
}

impl Proofs {
    /// None yet. `upstreams` are those that are asked with clients' logins.
    pub(super) fn new(tasks: Tasks, upstreams: impl Iterator<Item = UpstreamId>) -> Self {
        let turns = upstreams.map(|upstream| (upstream, Arc::new(Semaphore::new(AT_ONCE))));
        Self {
            open: Memory::new(MOST),
            refused: Memory::new(MOST),
            wrong: Memory::new(MOST),
            questions: Flights::new(tasks),
            turns: turns.collect(),
        }
    }

    /// A turn to try a login, to be held while that is done.
    pub(super) fn turns(&self, upstream: &UpstreamId) -> Option<Arc<Semaphore>> {
        self.turns.get(upstream).cloned()
    }

    pub(super) fn is_open(&self, visitor: &Visitor) -> bool {
        self.open
            .get(visitor)
            .is_some_and(|until| Instant::now() < until)
    }

    /// The refusal of this visitor that is not older than `ttl`.
    pub(super) fn denial(&self, visitor: &Visitor, ttl: Duration) -> Option<Denial> {
        let ttl = ttl.max(AT_LEAST);
        let login = (visitor.0.upstream.clone(), visitor.1.clone());
        if self.wrong.get(&login).is_some_and(|at| at.elapsed() < ttl) {
            return Some(Denial::Login);
        }
        let (denial, at) = self.refused.get(visitor)?;
        (at.elapsed() < ttl).then_some(denial)
    }

    /// The upstream has let the visitor in.
    pub(super) fn prove(&self, visitor: Visitor, ttl: Duration) {
        self.refused.remove(&visitor);
        self.open.insert(visitor, Instant::now() + ttl);
    }

    /// What was shown to the visitor is shown no longer, and nobody has refused it: whoever comes next asks.
    pub(super) fn end(&self, visitor: &Visitor) {
        self.open.remove(visitor);
    }

    /// The upstream has refused the visitor: what was shown before counts no longer, also while the upstream is down.
    pub(super) fn refuse(&self, visitor: Visitor, denial: Denial) {
        let now = Instant::now();
        self.open.remove(&visitor);
        if denial == Denial::Login && !visitor.1.is_anonymous() {
            let login = (visitor.0.upstream.clone(), visitor.1.clone());
            self.wrong.insert(login, now);
        }
        self.refused.insert(visitor, (denial, now));
    }
}

#[cfg(test)]
mod tests {
    use oci::{Algorithm, Digest};

    use super::*;
    use crate::names::Source;

    fn visitor(repository: &str, login: &str) -> Visitor {
        let mark = Digest::of(Algorithm::Sha256, login.as_bytes());
        let source = Source::new(UpstreamId::new("up"), repository.parse().unwrap());
        (source, CredentialId::client(&mark))
    }

    fn proofs() -> Proofs {
        Proofs::new(Tasks::new(), std::iter::once(UpstreamId::new("up")))
    }

    const TTL: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_proof_is_for_one_login_and_one_repository_and_ends() {
        let proofs = proofs();
        proofs.prove(visitor("a", "alice"), TTL);
        assert!(proofs.is_open(&visitor("a", "alice")));
        assert!(!proofs.is_open(&visitor("a", "bob")));
        assert!(!proofs.is_open(&visitor("b", "alice")));
        tokio::time::advance(TTL).await;
        assert!(!proofs.is_open(&visitor("a", "alice")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_ends_one_visitors_proof_and_is_forgotten_soon() {
        let proofs = proofs();
        proofs.prove(visitor("a", "alice"), TTL);
        proofs.prove(visitor("b", "alice"), TTL);
        proofs.refuse(visitor("a", "alice"), Denial::Rights);
        assert!(!proofs.is_open(&visitor("a", "alice")));
        assert!(proofs.is_open(&visitor("b", "alice")));
        let denial = |repository| proofs.denial(&visitor(repository, "alice"), Duration::ZERO);
        assert_eq!(denial("a"), Some(Denial::Rights));
        assert_eq!(denial("b"), None);
        tokio::time::advance(AT_LEAST).await;
        assert_eq!(denial("a"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wrong_login_is_wrong_for_every_repository() {
        let proofs = proofs();
        proofs.refuse(visitor("a", "alice"), Denial::Login);
        assert_eq!(
            proofs.denial(&visitor("b", "alice"), TTL),
            Some(Denial::Login)
        );
        assert_eq!(proofs.denial(&visitor("b", "bob"), TTL), None);
    }
}
