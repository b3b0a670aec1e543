//! One who was let in to one repository, and in whose name the upstream is asked for it. Only [`super::access`] makes one.

use std::ops::Deref;

use crate::names::{CredentialId, Source};
use crate::policy::{Grant, May};
use crate::upstream::{Identity, Mirrors};

/// A repository, and whose rights its upstream is asked with.
#[derive(Clone, Debug)]
pub(super) struct Visit {
    pub(super) source: Source,
    pub(super) identity: Identity,
    pub(super) may: May,
    pub(super) mirrors: Mirrors,
}

/// What is remembered of one identity's dealings with a repository is found by this. What the operator configured, and nobody, have no
/// name here: no upstream is asked with both.
pub(super) type Visitor = (Source, CredentialId);

impl Visit {
    pub(super) fn new(grant: &Grant, identity: Identity) -> Self {
        Self {
            source: grant.source().clone(),
            identity,
            may: grant.may(),
            mirrors: Mirrors::Welcome,
        }
    }

    /// The same for a repository that the upstream itself has closed, and only it can open again.
    pub(super) fn without_mirrors(self) -> Self {
        Self {
            mirrors: Mirrors::LeftOut,
            ..self
        }
    }

    /// Who this is, without what only the upstream may see.
    pub(super) fn visitor(&self) -> Visitor {
        let credential = match &self.identity {
            Identity::Client(login) => login.id.clone(),
            Identity::Configured | Identity::Anonymous => CredentialId::anonymous(),
        };
        (self.source.clone(), credential)
    }

    pub(super) fn is_anonymous(&self) -> bool {
        matches!(self.identity, Identity::Anonymous)
    }

    /// Whether the rights are this client's own (or nobody's), and not all clients'.
    pub(super) fn is_personal(&self) -> bool {
        !self.identity.is_configured()
    }
}

impl Deref for Visit {
    type Target = Source;

    fn deref(&self) -> &Source {
        &self.source
    }
}
