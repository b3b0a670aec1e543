//! Whether a tag may be served without asking the upstream: a pure function of rules, record and now.
//!
//! A digest is for ever; a tag has an age. Within `tag_ttl` it is served as it is; after that the upstream is asked by HEAD. A tag that
//! the upstream deleted is kept, suspended, and asked for again each time.

use std::time::Duration;

use crate::clock::Timestamp;

/// The rules of one upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How long a tag is served without asking.
    pub tag_ttl: Duration,
    /// How long a 404 is remembered.
    pub negative_ttl: Duration,
}

/// What is known of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// When the upstream last said so.
    pub checked: Timestamp,
    /// Whether the upstream said, last time, that the tag is gone.
    pub suspended: bool,
}

/// What to do about a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Nothing is known: ask.
    Unknown,
    /// Serve it; it was checked this long ago.
    Fresh(Duration),
    /// Ask first; if the upstream cannot answer, what is held may be served.
    Expired,
    /// Ask first; if the upstream cannot answer, nothing is served: the tag was gone.
    Suspended,
}

/// Judges a tag.
pub fn judge(rules: Rules, known: Option<Known>, now: Timestamp) -> Freshness {
    let Some(known) = known else {
        return Freshness::Unknown;
    };
    let age = known.checked.age(now);
    if known.suspended {
        Freshness::Suspended
    } else if age < rules.tag_ttl {
        Freshness::Fresh(age)
    } else {
        Freshness::Expired
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules(ttl: u64) -> Rules {
        Rules {
            tag_ttl: Duration::from_millis(ttl),
            negative_ttl: Duration::ZERO,
        }
    }

    #[test]
    fn ttl_zero_is_never_fresh() {
        let known = Known {
            checked: Timestamp(1000),
            suspended: false,
        };
        assert_eq!(
            judge(rules(0), Some(known), Timestamp(1000)),
            Freshness::Expired
        );
    }

    #[test]
    fn a_suspended_tag_is_asked_for() {
        let known = Known {
            checked: Timestamp(1000),
            suspended: true,
        };
        assert_eq!(
            judge(rules(9999), Some(known), Timestamp(1000)),
            Freshness::Suspended
        );
    }

    proptest! {
        /// Once expired, a tag stays so as time goes on; a shorter lifetime never serves what a longer one would not.
        #[test]
        fn monotonic(checked in 0i64..10_000, now in 0i64..20_000, later in 0i64..20_000, ttl in 0u64..10_000, shorter in 0u64..10_000) {
            let known = Some(Known { checked: Timestamp(checked), suspended: false });
            let fresh = |ttl, now| matches!(judge(rules(ttl), known, Timestamp(now)), Freshness::Fresh(_));
            prop_assert!(fresh(ttl, now.max(checked)) || !fresh(ttl, now.max(checked) + later));
            prop_assert!(!fresh(ttl.min(shorter), now) || fresh(ttl, now));
        }
    }
}
