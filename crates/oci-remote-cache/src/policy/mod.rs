//! Who may ask for what, and where it comes from: pure decisions over configured tables.
//!
//! A request's name becomes a [`Grant`] here and nowhere else; the floors above the store take no other key to a repository.

pub mod client;
pub mod namespace;
pub mod rules;

pub use self::client::{Client, ClientLogin, ClientName};
pub use self::namespace::{Names, Unknown};
pub use self::rules::{Deed, Door, May, Refusal, Rules};

use crate::names::{Source, UpstreamId};
use oci::RepositoryName;

/// This client may ask for this repository. Only [`admit`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    source: Source,
    client: Client,
    may: May,
}

/// This client may have something of this repository taken back. Only [`permit_purge`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PurgeLicence {
    source: Source,
    client: Client,
}

/// This client may have something of this repository fetched. Only [`permit_warm`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmLicence {
    grant: Grant,
}

impl PurgeLicence {
    /// Which repository of which upstream.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Who asks.
    pub fn client(&self) -> &Client {
        &self.client
    }
}

impl WarmLicence {
    /// The grant under which things are fetched; what is fetched is not shown to the client.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }
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

/// Lets a client have something taken back, if the rules allow it.
pub fn permit_purge(
    rules: &Rules,
    client: Client,
    upstream: UpstreamId,
    repository: RepositoryName,
) -> Result<PurgeLicence, Refusal> {
    let source = Source::new(upstream, repository);
    rules.permit(client.name.as_ref(), &source, Deed::Purge)?;
    Ok(PurgeLicence { source, client })
}

/// Lets a client have something fetched, if the rules allow it.
pub fn permit_warm(
    rules: &Rules,
    client: Client,
    upstream: UpstreamId,
    repository: RepositoryName,
) -> Result<WarmLicence, Refusal> {
    let source = Source::new(upstream, repository);
    rules.permit(client.name.as_ref(), &source, Deed::Warm)?;
    let grant = Grant {
        source,
        client,
        may: May::Pull,
    };
    Ok(WarmLicence { grant })
}
