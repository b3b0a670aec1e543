//! What upstreams warn of, an image that is no longer kept up for example: told again to everyone who is given the same manifest.

use std::sync::Arc;

use oci::{AnyDigest, Warning};
use quick_cache::sync::Cache as Memory;

use super::Cache;
use super::manifest::{ManifestAnswer, Method};
use super::visit::{Visit, Visitor};

/// Manifests remembered that somebody warns of.
const REMEMBERED: usize = 1000;

/// The warnings that came with manifests, for those in whose name they were asked for.
#[derive(Debug)]
pub(super) struct Warned {
    manifests: Memory<(Visitor, AnyDigest), Arc<[Warning]>>,
}

impl Warned {
    pub(super) fn new() -> Self {
        Self {
            manifests: Memory::new(REMEMBERED),
        }
    }
}

impl Cache {
    /// The upstream's answer about a manifest came with these warnings. A GET without any takes back what was said before; a HEAD says
    /// less than a GET.
    pub(super) fn note_warnings(
        &self,
        visit: &Visit,
        (digest, method): (AnyDigest, Method),
        warnings: Vec<Warning>,
    ) {
        let known = &self.inner.warned.manifests;
        if !warnings.is_empty() {
            known.insert((visit.visitor(), digest), warnings.into());
        } else if method == Method::Get && !known.is_empty() {
            known.remove(&(visit.visitor(), digest));
        }
    }

    /// The answer with what is known to be warned of.
    pub(super) fn warned(&self, visit: &Visit, answer: ManifestAnswer) -> ManifestAnswer {
        let known = &self.inner.warned.manifests;
        if known.is_empty() {
            return answer;
        }
        let warnings = known.get(&(visit.visitor(), answer.digest.clone()));
        ManifestAnswer { warnings, ..answer }
    }
}
