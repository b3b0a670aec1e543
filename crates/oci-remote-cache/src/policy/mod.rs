//! Who may ask for what, and where it comes from: pure decisions over configured tables.
//!
//! A request's name becomes a [`Grant`] here and nowhere else; the floors above the store take no other key to a repository.

pub mod client;
pub mod namespace;
pub mod rules;

pub use self::client::{Client, ClientLogin, ClientName};
pub use self::namespace::{Names, Unknown};
pub use self::rules::{Door, May, Refusal, Rules};

use crate::names::{Source, UpstreamId};
use oci::RepositoryName;

/// This client may ask for this repository. Only [`admit`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    source: Source,
    client: Client,
    may: May,
}

impl Grant {
    /// Which repository of which upstream.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Who asks.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What it may do.
    pub fn may(&self) -> May {
        self.may
    }
}

/// Admits a client to a repository, if the rules allow it.
pub fn admit(
    rules: &Rules,
    client: Client,
    upstream: UpstreamId,
    repository: RepositoryName,
) -> Result<Grant, Refusal> {
    let source = Source::new(upstream, repository);
    let may = rules.decide(client.name.as_ref(), &source)?;
    Ok(Grant {
        source,
        client,
        may,
    })
}
