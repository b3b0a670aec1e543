//! The cache itself: hit, join, lead, revalidate.
//!
//! Every request comes with a [`Grant`](crate::policy::Grant). Blobs ([`blob`]) and manifests ([`manifest`]) are given only with a
//! [`Right`](right::Right), listings ([`listing`]) come and go with their repository's access. Nothing here knows of HTTP. What the
//! doors need to see of the floors below is named here again.

mod access;
mod ahead;
pub mod blob;
mod by_digest;
mod by_login;
pub mod error;
pub mod freshness;
mod head;
mod held;
pub mod listing;
pub mod manifest;
mod meaning;
mod negative;
mod passing;
pub mod pattern;
mod places;
mod proofs;
mod purge;
mod revalidate;
pub mod right;
pub mod single_flight;
mod standing;
mod visit;
pub mod warm;
mod warned;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oci::{AnyDigest, Digest, Reference, Slice};
use quick_cache::Weighter;
use quick_cache::sync::Cache as Memory;

pub use self::access::Shown;
pub use self::error::{CacheError, Thing};
pub use crate::fill::FillError;
pub use crate::upstream::{Fault, UpstreamError};

use self::freshness::Rules;
use self::listing::List;
use self::manifest::{Fetched, Held, Judged};
use self::negative::{Negatives, Refused};
use self::proofs::Proofs;
use self::right::Probe;
use self::single_flight::Flights;
use self::standing::Logins;
use self::visit::{Visit, Visitor};
use crate::clock::Clock;
use crate::fill::{Fills, Told};
use crate::metrics::Metrics;
use crate::names::{Source, UpstreamId};
use crate::store::Store;
use crate::store::error::StoreError;
use crate::tasks::Tasks;
use crate::upstream::{Ask, Method, Resource, Stakes, Upstream};

/// Manifest bytes kept in memory: 64 MiB.
const MANIFEST_MEMORY: u64 = 64 << 20;

/// Bytes of small blobs (image configs, mostly) kept in memory: 64 MiB.
const SMALL_MEMORY: u64 = 64 << 20;

/// Layers remembered from manifests.
const TOLD: usize = 50_000;

/// An upstream and how its answers age.
#[derive(Clone, Debug)]
pub struct Origin {
    /// How it is asked.
    pub upstream: Arc<Upstream>,
    /// How its tags age.
    pub rules: Rules,
    /// What is served of it.
    pub shown: Shown,
    /// Bytes of an image that are fetched before anyone has asked for them; 0 for none.
    pub read_ahead: u64,
}

/// The cache. Clones share everything.
#[derive(Clone, Debug)]
pub struct Cache {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    fills: Fills,
    origins: HashMap<UpstreamId, Origin>,
    clock: Clock,
    metrics: Metrics,
    tasks: Tasks,
    manifests: Memory<Digest, Held, ByLength>,
    small: Memory<Digest, Bytes, ByLength>,
    told: Memory<Digest, Told>,
    warned: warned::Warned,
    images: ahead::Images,
    negatives: Negatives,
    not_public: Refused,
    openings: Flights<(Source, Resource), Result<(), CacheError>>,
    proofs: Proofs,
    logins: Logins,
    tags: Flights<(Visitor, oci::Tag), Result<Fetched, CacheError>>,
    digests: Flights<(Visitor, Digest), Result<Fetched, CacheError>>,
    passes: Flights<(Visitor, String, Option<String>), Result<Judged, CacheError>>,
    doubts: Flights<Digest, ()>,
    probes: Flights<(Visitor, Thing, AnyDigest), Result<Probe, CacheError>>,
    warming: warm::Queue,
    listings: listing::Listings,
    listing_flights: Flights<(Visitor, List), Result<Arc<listing::Listing>, CacheError>>,
}

/// Weighs what is in memory by its bytes.
#[derive(Clone, Debug)]
struct ByLength;

impl Weighter<Digest, Held> for ByLength {
    fn weight(&self, _digest: &Digest, held: &Held) -> u64 {
        held.body.len() as u64 + 256
    }
}

impl Weighter<Digest, Bytes> for ByLength {
    fn weight(&self, _digest: &Digest, body: &Bytes) -> u64 {
        body.len() as u64 + 128
    }
}

impl Cache {
    /// A cache over `store` and `fills` for these upstreams.
    pub fn new(
        store: Store,
        fills: Fills,
        origins: HashMap<UpstreamId, Origin>,
        (clock, metrics, tasks): (Clock, Metrics, Tasks),
    ) -> Self {
        let by_login = |origin: &&Origin| matches!(origin.shown, Shown::Proven(_));
        let by_login = origins.values().filter(by_login);
        let by_login = by_login.map(|origin| origin.upstream.id().clone());
        let inner = Inner {
            proofs: Proofs::new(tasks.clone(), by_login),
            manifests: Memory::with_weighter(4096, MANIFEST_MEMORY, ByLength),
            small: Memory::with_weighter(4096, SMALL_MEMORY, ByLength),
            told: Memory::new(TOLD),
            warned: warned::Warned::new(),
            images: ahead::Images::new(),
            negatives: Negatives::new(clock.clone()),
            not_public: Refused::new(clock.clone()),
            openings: Flights::new(tasks.clone()),
            logins: Logins::default(),
            tags: Flights::new(tasks.clone()),
            digests: Flights::new(tasks.clone()),
            passes: Flights::new(tasks.clone()),
            doubts: Flights::new(tasks.clone()),
            probes: Flights::new(tasks.clone()),
            warming: warm::Queue::new(),
            listings: listing::Listings::new(),
            listing_flights: Flights::new(tasks.clone()),
            store,
            fills,
            origins,
            clock,
            metrics,
            tasks,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Where a repository is asked for. Grants are made for configured upstreams only, so there always is one.
    fn origin(&self, source: &Source) -> Result<&Origin, CacheError> {
        let unknown = || CacheError::Unknown {
            thing: Thing::Tags,
            code: None,
            source_: source.clone(),
        };
        self.inner.origins.get(&source.upstream).ok_or_else(unknown)
    }

    /// Remembers that the catalog failed, which no pull may fail for.
    fn store_fault(&self, error: &StoreError) {
        self.inner.metrics.store_faults.inc();
        tracing::warn!(%error, "the catalog failed; going on without it");
    }
}

/// A question about something of a visit's repository.
fn ask(visit: &Visit, resource: Resource, method: Method) -> Ask {
    Ask {
        repository: visit.repository.clone(),
        resource,
        method,
        range: None,
        accept: None,
        mirror: 0,
        mirrors: visit.mirrors,
        identity: visit.identity.clone(),
        stakes: Stakes::Needed,
    }
}

fn manifest_ask(visit: &Visit, reference: Reference, method: Method) -> Ask {
    ask(visit, Resource::Manifest(reference), method)
}

/// Everything of a blob of this size.
fn all_of(size: u64) -> Slice {
    Slice {
        start: 0,
        end: size,
    }
}

/// A refusal is shared for this long by requests that follow at once; a later one asks again.
const SHARED_REFUSAL: Duration = Duration::from_secs(1);
