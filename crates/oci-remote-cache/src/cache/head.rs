//! What upstreams tell without sending it: whether something is there, and its size.
//!
//! What that proves, and for whom, is `right.rs`'s.

use oci::{AnyDigest, Digest, MANIFEST_LIMIT, Slice};

use super::ask;
use super::visit::Visit;
use crate::deadline::Deadline;
use crate::upstream::{Answer, Ask, Method, Resource, Upstream, UpstreamError};

/// Whether it is there, by HEAD. A registry that refuses HEAD for a manifest is asked for it by GET; for a blob that has been done by its
/// first byte already.
pub(super) async fn by_head(
    upstream: &Upstream,
    visit: &Visit,
    resource: &Resource,
) -> Result<Answer, UpstreamError> {
    let deadline = Deadline::for_answer();
    let head = ask(visit, resource.clone(), Method::Head);
    match upstream.ask(head, deadline).await {
        Err(error) if error.fault().is_of_head() && matches!(resource, Resource::Manifest(_)) => {
            let get = ask(visit, resource.clone(), Method::Get);
            let whole = upstream.whole(&get, MANIFEST_LIMIT, deadline).await;
            whole.map(|(answer, _body)| answer)
        }
        answered => answered,
    }
}

/// The size that a HEAD tells. Some tell 0 of everything; only of the empty blob is that true.
pub(super) fn told_size(answer: &Answer, resource: &Resource) -> Option<u64> {
    let is_empty = match resource {
        Resource::Blob(AnyDigest::Known(digest)) => *digest == Digest::of(digest.algorithm(), b""),
        Resource::Blob(_)
        | Resource::Manifest(_)
        | Resource::Tags(_)
        | Resource::Referrers { .. } => true,
    };
    answer.content_length().filter(|&size| size > 0 || is_empty)
}

/// The size of a blob whose HEAD does not tell it. What a manifest tells is no size to give on: anyone can push one that lies.
pub(super) async fn size_by_first_byte(
    upstream: &Upstream,
    visit: &Visit,
    resource: Resource,
) -> Option<u64> {
    let first = Ask {
        range: Some(Slice { start: 0, end: 1 }),
        ..ask(visit, resource, Method::Get)
    };
    let answer = upstream.ask(first, Deadline::for_answer()).await.ok()?;
    match answer.content_range() {
        Some(range) => range.total,
        None => answer.content_length().filter(|_| answer.status() == 200),
    }
}
