//! Who may ask for what, and where it comes from: pure decisions over configured tables.
//!
//! A request's name becomes a [`Grant`] here and nowhere else; the floors above the store take no other key to a repository.

pub mod client;
pub mod namespace;

pub use self::client::Client;
pub use self::namespace::{Names, Unknown};

use crate::names::{Source, UpstreamId};
use oci::RepositoryName;

/// This client may ask for this repository. Only [`admit`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    source: Source,
    client: Client,
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
}

/// Admits a client to a repository. There are no rules per client yet: whoever can reach the listener may ask for what the configured
/// upstreams offer.
pub fn admit(client: Client, upstream: UpstreamId, repository: RepositoryName) -> Grant {
    Grant {
        source: Source::new(upstream, repository),
        client,
    }
}
