//! Taking back what a repository holds here, at the wish of a client that may.
//!
//! The upstream hears nothing of it, and nothing is forbidden for the future: whoever may pull can bring the same again. Bytes go once no
//! repository of any upstream holds them; who reads them meanwhile reads on. A transfer or errand that is under way is left alone, and
//! its result is recorded as if it had been asked for afterwards; what was recorded and is only on its way to its file goes too.

use oci::{AnyDigest, Digest, Reference};

use super::Cache;
use super::error::{CacheError, Thing};
use crate::names::Source;
use crate::policy::PurgeLicence;
use crate::store::catalog::{Change, Kind};

impl Cache {
    /// Takes back a tag, or a manifest with the tags that name it.
    pub async fn purge_manifest(
        &self,
        licence: &PurgeLicence,
        reference: &Reference,
    ) -> Result<(), CacheError> {
        let source = licence.source();
        match reference {
            Reference::Tag(tag) => {
                self.tag_record(source, tag)
                    .ok_or_else(|| none(source, Thing::Manifest))?;
                self.take_back(licence, vec![Change::Untag(source.clone(), tag.clone())])
                    .await
            }
            Reference::Digest(AnyDigest::Known(digest)) => {
                self.purge(licence, *digest, Kind::Manifest).await
            }
            Reference::Digest(AnyDigest::Foreign(_)) => Err(none(source, Thing::Manifest)),
        }
    }

    /// Takes back a blob.
    pub async fn purge_blob(
        &self,
        licence: &PurgeLicence,
        digest: &AnyDigest,
    ) -> Result<(), CacheError> {
        match digest {
            AnyDigest::Known(digest) => self.purge(licence, *digest, Kind::Blob).await,
            AnyDigest::Foreign(_) => Err(none(licence.source(), Thing::Blob)),
        }
    }

    async fn purge(
        &self,
        licence: &PurgeLicence,
        digest: Digest,
        kind: Kind,
    ) -> Result<(), CacheError> {
        let (source, catalog) = (licence.source(), self.inner.store.catalog());
        let thing = match kind {
            Kind::Manifest => Thing::Manifest,
            Kind::Blob => Thing::Blob,
        };
        let held = catalog.membership(source, &digest, kind);
        held.map_err(|error| self.unrecorded(&error))?
            .ok_or_else(|| none(source, thing))?;
        self.take_back(licence, vec![Change::Revoke(source.clone(), digest, kind)])
            .await?;
        let still_held = catalog.is_held(&digest);
        if still_held.map_err(|error| self.unrecorded(&error))? {
            return Ok(());
        }
        self.inner.manifests.remove(&digest);
        self.inner.small.remove(&digest);
        let removed = self.inner.store.remove(&digest).await;
        removed.map(drop).map_err(|error| self.unrecorded(&error))
    }

    async fn take_back(
        &self,
        licence: &PurgeLicence,
        changes: Vec<Change>,
    ) -> Result<(), CacheError> {
        let client = licence.client().name.as_ref();
        tracing::info!(source = %licence.source(), client = client.map(crate::policy::ClientName::as_str), ?changes, "purged");
        let recorded = self.inner.store.catalog().record(changes).await;
        recorded.map_err(|error| self.unrecorded(&error))
    }

    /// A purge, unlike a pull, is worth nothing where it cannot be written down.
    fn unrecorded(&self, error: &crate::store::error::StoreError) -> CacheError {
        self.store_fault(error);
        CacheError::Disk
    }
}

fn none(source: &Source, thing: Thing) -> CacheError {
    CacheError::NotKept {
        thing,
        source_: source.clone(),
    }
}
