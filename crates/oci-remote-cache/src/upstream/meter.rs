//! How much of an upstream's rate limit is left, for each credential, and when it will be used up at this pace.
//!
//! Docker Hub tells with every answer about a manifest (`ratelimit-limit: 100;w=21600`, `ratelimit-remaining: 98;w=21600`,
//! `docker-ratelimit-source`). What follows for tags is decided by the floors above; here it is read, kept and shown.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Timestamp;
use crate::metrics::{Metrics, RateLabels, SourceLabels};
use crate::names::{CredentialId, UpstreamId};

/// After so long without news one more question is worth asking, however few are left.
const LOOK_AGAIN: Duration = Duration::from_mins(1);

/// How long a limit holds that does not say.
const WINDOW: Duration = Duration::from_hours(1);

/// Longest name of a source that is shown: an address or an account's id.
const SOURCE: usize = 64;

/// How far a rate limit is used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Strain {
    /// There is no limit, or more than half of it is left.
    #[default]
    Easy,
    /// No more than half.
    Low,
    /// No more than a quarter: nothing is asked that nobody waits for.
    Scarce,
    /// No more than a tenth: that is for what is not held at all.
    Spent,
}

/// What one answer said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    pub(super) remaining: u64,
    pub(super) limit: Option<u64>,
    pub(super) window: Option<Duration>,
}

/// What an upstream's answers said lately.
#[derive(Debug, Default)]
pub(super) struct Meter {
    runs: Mutex<HashMap<CredentialId, Run>>,
}

/// A time in which what is left only fell.
#[derive(Clone, Debug)]
struct Run {
    since: Timestamp,
    from: u64,
    last: Reading,
    at: Timestamp,
    source: Option<String>,
}

impl Strain {
    /// By how much lifetimes grow.
    pub const fn stretch(self) -> u32 {
        match self {
            Self::Easy => 1,
            Self::Low => 2,
            Self::Scarce | Self::Spent => 4,
        }
    }

    /// The word in notes and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Easy => "easy",
            Self::Low => "low",
            Self::Scarce => "scarce",
            Self::Spent => "spent",
        }
    }
}

impl Reading {
    /// Reads the two headers; nothing without the second.
    pub(super) fn of(limit: Option<&str>, remaining: Option<&str>) -> Option<Self> {
        let (left, window) = amount(remaining?)?;
        let limit = limit.and_then(amount);
        Some(Self {
            remaining: left,
            limit: limit.map(|(limit, _)| limit).filter(|&limit| limit > 0),
            window: window.or_else(|| limit?.1),
        })
    }

    /// What it means so long after it was read.
    fn strain(self, age: Duration) -> Strain {
        if age >= self.window.unwrap_or(WINDOW) {
            return Strain::Easy;
        }
        // Without a limit to compare with, a hundred is taken for one.
        let limit = u128::from(self.limit.unwrap_or(100));
        let percent = u128::from(self.remaining) * 100 / limit;
        match percent {
            0..=10 if age < LOOK_AGAIN => Strain::Spent,
            0..=25 => Strain::Scarce,
            26..=50 => Strain::Low,
            _ => Strain::Easy,
        }
    }
}

impl Run {
    /// The run with one more reading; a new one where something was given back.
    fn with(before: Option<&Self>, last: Reading, at: Timestamp, source: Option<String>) -> Self {
        let start = before
            .filter(|before| last.remaining <= before.last.remaining)
            .map_or((at, last.remaining), |before| (before.since, before.from));
        Self {
            since: start.0,
            from: start.1,
            last,
            at,
            source,
        }
    }

    /// When nothing is left at this pace, if that comes before the limit is renewed.
    fn ends(&self) -> Option<Timestamp> {
        let used = self
            .from
            .checked_sub(self.last.remaining)
            .filter(|&used| used > 0)?;
        let took = u64::try_from(self.since.age(self.at).as_millis()).ok()?;
        let left = u128::from(self.last.remaining) * u128::from(took) / u128::from(used);
        let left = Duration::from_millis(u64::try_from(left).ok()?);
        let total = left.saturating_add(Duration::from_millis(took));
        if total > self.last.window.unwrap_or(WINDOW) {
            return None;
        }
        Some(Timestamp(
            self.at
                .0
                .saturating_add(i64::try_from(left.as_millis()).ok()?),
        ))
    }
}

impl Meter {
    /// Keeps what an answer to `credential` said, and shows it.
    pub(super) fn note(
        &self,
        (upstream, credential): (&UpstreamId, &CredentialId),
        (reading, source): (Reading, Option<&str>),
        now: Timestamp,
        metrics: &Metrics,
    ) {
        let source = source.map(plain).filter(|source| !source.is_empty());
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let before = runs.get(credential);
        let run = Run::with(before, reading, now, source);
        let known = before.and_then(|before| before.source.clone());
        runs.insert(credential.clone(), run.clone());
        drop(runs);
        let labels = RateLabels {
            upstream: upstream.as_str().to_owned(),
            credential: credential.to_string(),
        };
        show(metrics, &labels, &run);
        if known != run.source {
            tracing::info!(%upstream, %credential, limit = reading.limit, remaining = reading.remaining,
                source = run.source.as_deref(), "the upstream counts our requests");
            show_source(metrics, &labels, (known, run.source));
        }
    }

    /// The credential whose limit is used up most.
    pub(super) fn worst(&self, now: Timestamp) -> Option<(CredentialId, Strain)> {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let strains = runs.iter();
        let strains = strains.map(|(id, run)| (id.clone(), run.last.strain(run.at.age(now))));
        strains.max_by_key(|(_, strain)| *strain)
    }

    /// How far the limit of `credential` is used up; of whoever asked last, where nothing was said to that one.
    pub(super) fn strain(&self, credential: &CredentialId, now: Timestamp) -> Strain {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let last = || runs.values().max_by_key(|run| run.at);
        let own = runs.get(credential).or_else(last);
        own.map_or(Strain::Easy, |run| run.last.strain(run.at.age(now)))
    }
}

fn show(metrics: &Metrics, labels: &RateLabels, run: &Run) {
    let gauge = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let left = metrics.rate_remaining.get_or_create(labels);
    left.set(gauge(run.last.remaining));
    if let Some(limit) = run.last.limit {
        metrics.rate_limit.get_or_create(labels).set(gauge(limit));
    }
    match run.ends() {
        Some(ends) => drop(metrics.rate_ends.get_or_create(labels).set(ends.seconds())),
        None => drop(metrics.rate_ends.remove(labels)),
    }
}

/// One source at a time is shown, so that nobody can make labels grow.
fn show_source(metrics: &Metrics, labels: &RateLabels, change: (Option<String>, Option<String>)) {
    let labelled = |source| SourceLabels {
        upstream: labels.upstream.clone(),
        credential: labels.credential.clone(),
        source,
    };
    if let Some(before) = change.0 {
        metrics.rate_source.remove(&labelled(before));
    }
    if let Some(now) = change.1 {
        metrics.rate_source.get_or_create(&labelled(now)).set(1);
    }
}

/// Reads `98;w=21600`: how many, and for how many seconds.
fn amount(value: &str) -> Option<(u64, Option<Duration>)> {
    let mut parts = value.split(',').next()?.split(';').map(str::trim);
    let number: i64 = parts.next()?.parse().ok()?;
    let window = parts.find_map(|part| part.strip_prefix("w=")?.trim().parse().ok());
    let window = window
        .filter(|&seconds| seconds > 0)
        .map(Duration::from_secs);
    Some((u64::try_from(number).unwrap_or(0), window))
}

fn plain(source: &str) -> String {
    let shown = |c: &char| c.is_ascii_alphanumeric() || ".:_-".contains(*c);
    source.chars().filter(shown).take(SOURCE).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Meter, Reading, Run, Strain, amount};
    use crate::clock::Timestamp;
    use crate::metrics::Metrics;
    use crate::names::{CredentialId, UpstreamId};

    fn reading(remaining: u64) -> Reading {
        Reading::of(Some("100;w=21600"), Some(&format!("{remaining};w=21600"))).unwrap()
    }

    #[test]
    fn amounts_in_all_forms() {
        for (value, read) in [
            ("98;w=21600", Some((98, Some(21600)))),
            (" 98 ; w=60 ", Some((98, Some(60)))),
            ("100, 100;w=10", Some((100, None))),
            ("0", Some((0, None))),
            ("-3;w=0", Some((0, None))),
            ("many", None),
            ("", None),
        ] {
            let read = read.map(|(n, w)| (n, w.map(Duration::from_secs)));
            assert_eq!(amount(value), read, "{value:?}");
        }
        assert_eq!(Reading::of(Some("100"), None), None);
    }

    #[test]
    fn strain_grows_as_less_is_left() {
        for (remaining, seconds, strain) in [
            (100, 0, Strain::Easy),
            (51, 0, Strain::Easy),
            (50, 0, Strain::Low),
            (26, 0, Strain::Low),
            (25, 0, Strain::Scarce),
            (11, 0, Strain::Scarce),
            (10, 0, Strain::Spent),
            (0, 59, Strain::Spent),
            (0, 60, Strain::Scarce),
            (0, 21600, Strain::Easy),
        ] {
            let age = Duration::from_secs(seconds);
            assert_eq!(
                reading(remaining).strain(age),
                strain,
                "{remaining} after {age:?}"
            );
        }
        let unlimited = Reading::of(None, Some("5")).unwrap();
        assert_eq!(unlimited.strain(Duration::ZERO), Strain::Spent);
    }

    #[test]
    fn the_forecast_follows_the_pace() {
        let run = |steps: &[(i64, u64)]| {
            let mut run: Option<Run> = None;
            for &(seconds, left) in steps {
                let at = Timestamp(seconds * 1000);
                run = Some(Run::with(run.as_ref(), reading(left), at, None));
            }
            run.unwrap().ends().map(Timestamp::seconds)
        };
        assert_eq!(run(&[(0, 100)]), None);
        assert_eq!(run(&[(0, 100), (60, 100)]), None);
        assert_eq!(run(&[(0, 100), (60, 90)]), Some(600));
        assert_eq!(
            run(&[(0, 20), (30, 100), (60, 90)]),
            Some(330),
            "it was renewed"
        );
        assert_eq!(run(&[(0, 100), (3600, 99)]), None, "it is renewed before");
        assert_eq!(run(&[(0, 100), (60, 0)]), Some(60));
    }

    #[test]
    fn what_is_left_is_shown() {
        let (meter, metrics) = (Meter::default(), Metrics::new());
        let (upstream, anonymous) = (UpstreamId::new("docker.io"), CredentialId::anonymous());
        let note = |left, source, seconds: i64| {
            let now = Timestamp(seconds * 1000);
            meter.note(
                (&upstream, &anonymous),
                (reading(left), Some(source)),
                now,
                &metrics,
            );
        };
        assert_eq!(meter.strain(&anonymous, Timestamp(0)), Strain::Easy);
        note(100, "192.0.2.1", 0);
        note(9, "192.0.2.2\u{7f}\"", 91);
        assert_eq!(meter.strain(&anonymous, Timestamp(91_000)), Strain::Spent);
        let text = metrics.render();
        let labels = r#"upstream="docker.io",credential="anonymous""#;
        for line in [
            format!("oci_remote_cache_upstream_ratelimit_remaining{{{labels}}} 9\n"),
            format!("oci_remote_cache_upstream_ratelimit_limit{{{labels}}} 100\n"),
            format!("oci_remote_cache_upstream_ratelimit_ends_timestamp_seconds{{{labels}}} 100\n"),
            format!(
                "oci_remote_cache_upstream_ratelimit_source{{{labels},source=\"192.0.2.2\"}} 1\n"
            ),
        ] {
            assert!(text.contains(&line), "{line}{text}");
        }
        assert!(!text.contains("192.0.2.1"), "{text}");
    }
}
