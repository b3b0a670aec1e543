//! Why a fill ended without its blob. Shared by everybody who was reading it.

use std::sync::Arc;

use crate::names::UpstreamId;
use crate::store::spool::Mismatch;
use crate::upstream::UpstreamError;

/// Why a fill failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FillError {
    /// The upstream refused, or broke off more often than we try.
    #[error(transparent)]
    Upstream(Arc<UpstreamError>),
    /// The upstream sent bytes that are not the blob.
    #[error("{upstream} sent wrong bytes: {mismatch}")]
    Mismatch {
        /// Who sent them.
        upstream: UpstreamId,
        /// What was wrong.
        mismatch: Box<Mismatch>,
    },
    /// Pieces kept from an earlier transfer turned out wrong; they are gone, and the next request starts from zero.
    #[error("pieces kept from an earlier transfer were wrong: {0}")]
    Pieces(Box<Mismatch>),
    /// All connections to the upstream were in use for as long as a client waits.
    #[error("too many transfers from {upstream} are under way")]
    Busy {
        /// Which upstream.
        upstream: UpstreamId,
    },
    /// Nobody had read the fill for a while, so it was set aside.
    #[error("the transfer was set aside")]
    Parked,
    /// The process is stopping.
    #[error("the cache is shutting down")]
    Stopping,
}

impl From<UpstreamError> for FillError {
    fn from(error: UpstreamError) -> Self {
        Self::Upstream(Arc::new(error))
    }
}
