//! Places that refuse HEAD where they answer GET, remembered for a while, so that not each question costs two requests.
//!
//! What is asked instead is decided by who asks: for a blob its first byte, for a manifest all of it.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::request::{Ask, Method, Resource};

/// How long it is believed.
const FOR: Duration = Duration::from_mins(10);

/// The statuses by which HEAD is refused: it is not known (501), not allowed (405), or makes no sense to a gateway before the registry.
const REFUSALS: [u16; 3] = [400, 405, 501];

/// What is asked without HEAD, and until when.
#[derive(Debug, Default)]
pub(super) struct Heads {
    blobs: Mutex<Option<Instant>>,
    manifests: Mutex<Option<Instant>>,
}

impl Heads {
    /// Whether this question is known to be refused.
    pub(super) fn are_refused(&self, ask: &Ask, now: Instant) -> bool {
        let until = self.of(ask).and_then(|until| *until.lock().ok()?);
        until.is_some_and(|until| now < until)
    }

    /// The place refused this question for its method.
    pub(super) fn note(&self, ask: &Ask, now: Instant) {
        if let Some(mut until) = self.of(ask).and_then(|until| until.lock().ok()) {
            *until = Some(now + FOR);
        }
    }

    fn of(&self, ask: &Ask) -> Option<&Mutex<Option<Instant>>> {
        match (ask.method, &ask.resource) {
            (Method::Head, Resource::Blob(_)) => Some(&self.blobs),
            (Method::Head, Resource::Manifest(_)) => Some(&self.manifests),
            _ => None,
        }
    }
}

/// Whether a status may mean the method and not the thing.
pub(super) fn is_refusal(status: u16) -> bool {
    REFUSALS.contains(&status)
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::{FOR, Heads};
    use crate::upstream::{Ask, Identity, Method, Mirrors, Resource, Stakes};

    #[test]
    fn each_kind_is_remembered_for_a_while() {
        let head = |resource| Ask {
            repository: "lib/app".parse().unwrap(),
            resource,
            method: Method::Head,
            range: None,
            accept: None,
            mirror: 0,
            mirrors: Mirrors::Welcome,
            identity: Identity::Configured,
            stakes: Stakes::Needed,
        };
        let digest = format!("sha256:{}", "a".repeat(64));
        let blob = head(Resource::Blob(digest.parse().unwrap()));
        let tag = head(Resource::Manifest("v1".parse().unwrap()));
        let get = Ask {
            method: Method::Get,
            ..tag.clone()
        };
        let (heads, now) = (Heads::default(), Instant::now());
        assert!(!heads.are_refused(&blob, now));
        heads.note(&blob, now);
        heads.note(&get, now);
        assert!(heads.are_refused(&blob, now));
        assert!(!heads.are_refused(&tag, now));
        assert!(!heads.are_refused(&blob, now + FOR));
        heads.note(&tag, now);
        assert!(heads.are_refused(&tag, now) && !heads.are_refused(&get, now));
    }
}
