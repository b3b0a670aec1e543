//! What the catalog answers from memory, kept coherent with the database by the writer.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Mutex, PoisonError, RwLock};

use quick_cache::sync::Cache;

use oci::{Digest, Tag};

use super::{Change, Kind, TagRecord};
use crate::clock::Timestamp;
use crate::names::{CredentialId, Source};

/// Memberships kept in memory in front of the database.
const RIGHTS: usize = 16_384;

/// Tags kept so.
const TAGS: usize = 4096;

/// What is remembered.
#[derive(Debug)]
pub(super) struct Remembered {
    /// Memberships that were read or written.
    pub(super) rights: Cache<RightKey, CredentialId>,
    /// Tags that were read.
    tags: Cache<TagKey, TagRecord>,
    /// Whoever reads the database to add something to the two holds this for reading meanwhile, and the writer takes it for writing to
    /// change them: so no old value is put in over a new one.
    filling: RwLock<()>,
    pub(super) suspended: Mutex<HashSet<(Source, CredentialId)>>,
    pub(super) public: Mutex<HashMap<Source, Timestamp>>,
}

pub(super) type RightKey = (Source, Digest, Kind);
pub(super) type TagKey = (Source, Tag);

/// The memberships that a commit set or took back, as they are now.
pub(super) type Rights = Vec<(RightKey, Option<CredentialId>)>;

/// What a commit changed of what is remembered.
#[derive(Debug, Default)]
pub(super) struct Changed {
    pub(super) rights: Rights,
    pub(super) tags: Vec<Tags>,
}

/// Tags that are not as they were.
#[derive(Debug)]
pub(super) enum Tags {
    One(TagKey),
    AllOf(Source),
}

impl Tags {
    pub(super) fn changed_by(change: &Change) -> Option<Self> {
        match change {
            Change::Tag(record) => Some(Self::One((record.source.clone(), record.tag.clone()))),
            Change::Untag(source, tag) => Some(Self::One((source.clone(), tag.clone()))),
            Change::Revoke(source, _, Kind::Manifest) => Some(Self::AllOf(source.clone())),
            Change::Revoke(_, _, Kind::Blob)
            | Change::Blob(_)
            | Change::Pending(_)
            | Change::Abandon(_)
            | Change::Forget(_)
            | Change::Used(..)
            | Change::Membership(_)
            | Change::Manifest(..)
            | Change::Suspend(..)
            | Change::Lift(..)
            | Change::Public(..)
            | Change::NotPublic(_) => None,
        }
    }
}

impl Remembered {
    pub(super) fn new(
        suspended: HashSet<(Source, CredentialId)>,
        public: HashMap<Source, Timestamp>,
    ) -> Self {
        Self {
            rights: Cache::new(RIGHTS),
            tags: Cache::new(TAGS),
            filling: RwLock::default(),
            suspended: Mutex::new(suspended),
            public: Mutex::new(public),
        }
    }

    /// A membership; `read` asks the database for one that is not remembered.
    pub(super) fn right<E>(
        &self,
        key: RightKey,
        read: impl FnOnce(&RightKey) -> Result<Option<CredentialId>, E>,
    ) -> Result<Option<CredentialId>, E> {
        self.look(&self.rights, key, read)
    }

    /// A tag, in the same way.
    pub(super) fn tag<E>(
        &self,
        key: TagKey,
        read: impl FnOnce(&TagKey) -> Result<Option<TagRecord>, E>,
    ) -> Result<Option<TagRecord>, E> {
        self.look(&self.tags, key, read)
    }

    fn look<K: Hash + Eq, V: Clone, E>(
        &self,
        memory: &Cache<K, V>,
        key: K,
        read: impl FnOnce(&K) -> Result<Option<V>, E>,
    ) -> Result<Option<V>, E> {
        if let Some(known) = memory.get(&key) {
            return Ok(Some(known));
        }
        let filling = self.filling.read().unwrap_or_else(PoisonError::into_inner);
        let found = read(&key)?;
        if let Some(value) = &found {
            memory.insert(key, value.clone());
        }
        drop(filling);
        Ok(found)
    }

    /// Takes over what a commit changed.
    pub(super) fn apply(&self, changed: Changed) {
        if changed.rights.is_empty() && changed.tags.is_empty() {
            return;
        }
        let filling = self.filling.write().unwrap_or_else(PoisonError::into_inner);
        for (key, credential) in changed.rights {
            match credential {
                Some(credential) => self.rights.insert(key, credential),
                None => drop(self.rights.remove(&key)),
            }
        }
        for tags in changed.tags {
            match tags {
                Tags::One(key) => drop(self.tags.remove(&key)),
                Tags::AllOf(source) => self.tags.retain(|(of, _), _| *of != source),
            }
        }
        drop(filling);
    }

    /// Takes over who may read a repository now.
    pub(super) fn apply_access(&self, change: &Change) {
        let mut suspended = self
            .suspended
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut public = self.public.lock().unwrap_or_else(PoisonError::into_inner);
        match change {
            Change::Public(source, at) => {
                public.insert(source.clone(), *at);
            }
            Change::NotPublic(source) => {
                public.remove(source);
            }
            Change::Suspend(source, credential, _) => {
                suspended.insert((source.clone(), credential.clone()));
            }
            Change::Lift(source, credential) => {
                suspended.remove(&(source.clone(), credential.clone()));
            }
            Change::Blob(_)
            | Change::Pending(_)
            | Change::Abandon(_)
            | Change::Forget(_)
            | Change::Used(..)
            | Change::Membership(_)
            | Change::Manifest(..)
            | Change::Tag(_)
            | Change::Untag(..)
            | Change::Revoke(..) => {}
        }
    }
}
