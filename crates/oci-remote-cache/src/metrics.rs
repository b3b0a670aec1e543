//! The process's counters and gauges, in OpenMetrics text.
//!
//! Labels come from closed sets only (configured upstream keys, our own enums, status codes): repository names and digests never
//! become labels, for they are fed from outside and would grow without bound.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::verdict::{Verdict, Why};

const RATE_CLOSED: &str = "upstream_ratelimit_closed_until_timestamp_seconds";
const RATE_ENDS: &str = "upstream_ratelimit_ends_timestamp_seconds";
const RATE_SOURCE: &str = "upstream_ratelimit_source";

/// What an answer to a client is counted under.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// `manifest`, `blob`, `tags`, `referrers`, `catalog`, `base`, `health` or `other`.
    pub kind: &'static str,
    /// The upstream's key; empty where none was named.
    pub upstream: String,
    /// The verdict's word.
    pub verdict: &'static str,
    /// HTTP status.
    pub status: u16,
}

/// What an exchange with an upstream is counted under.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct UpstreamLabels {
    /// The upstream's key.
    pub upstream: String,
    /// `manifest`, `blob`, `tags`, `referrers`, `ping` or `token`.
    pub kind: &'static str,
    /// HTTP status, or the class of failure where there was no answer.
    pub outcome: String,
}

/// An upstream by its key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct UpstreamLabel {
    /// The upstream's key.
    pub upstream: String,
}

/// Whose requests an upstream counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RateLabels {
    /// The upstream's key.
    pub upstream: String,
    /// `anonymous`, or the configured credential.
    pub credential: String,
}

/// By what an upstream tells us from others.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabels {
    /// The upstream's key.
    pub upstream: String,
    /// `anonymous`, or the configured credential.
    pub credential: String,
    /// An address or an account's id. There is one at a time.
    pub source: String,
}

/// A reason out of a closed set.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WhyLabel {
    /// The reason's word.
    pub why: &'static str,
}

/// What one address may have only so much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limited {
    /// Connections at once.
    Connections,
    /// Requests in a second.
    Requests,
}

/// How a fill, or fetching an image ahead, ended; what became of a layer that was read ahead.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabel {
    /// `published`, `failed`, `mismatch`, `parked` or `alone`; `done`, `failed`, `gave-way` or `stopped`; `started` or `used`.
    pub outcome: &'static str,
}

/// All metrics. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// Answers given to clients.
    pub requests: Family<RequestLabels, Counter>,
    /// Body bytes handed to clients' connections.
    pub served_bytes: Counter,
    /// Requests sent to upstreams, token endpoints included.
    pub upstream_requests: Family<UpstreamLabels, Counter>,
    /// Body bytes read from upstreams.
    pub upstream_bytes: Family<UpstreamLabel, Counter>,
    /// Requests an upstream says are left before its rate limit.
    pub rate_remaining: Family<RateLabels, Gauge>,
    /// Requests an upstream allows in its window.
    pub rate_limit: Family<RateLabels, Gauge>,
    /// When none will be left at the present pace, in Unix seconds; absent where the limit is renewed before.
    pub rate_ends: Family<RateLabels, Gauge>,
    /// By what an upstream tells us from others.
    pub rate_source: Family<SourceLabels, Gauge>,
    /// Until when an upstream is left alone after a 429, in Unix seconds.
    pub rate_closed: Family<UpstreamLabel, Gauge>,
    /// Whether asking an upstream is switched off.
    pub offline: Family<UpstreamLabel, Gauge>,
    /// Fills in flight.
    pub fills: Gauge,
    /// Fills that ended.
    pub fills_ended: Family<OutcomeLabel, Counter>,
    /// Images that are being fetched before anyone pulls them, or wait for it.
    pub warming: Gauge,
    /// Such images that came to an end.
    pub warmed: Family<OutcomeLabel, Counter>,
    /// Layers fetched before anyone asked for them, and those of them that were asked for.
    pub read_ahead: Family<OutcomeLabel, Counter>,
    /// Answers served past their age.
    pub stale: Family<WhyLabel, Counter>,
    /// Answers passed through without being kept.
    pub bypassed: Family<WhyLabel, Counter>,
    /// Failures of the cache's own disk or catalog.
    pub store_faults: Counter,
    /// Bytes of blobs, spools and parked pieces.
    pub stored_bytes: Gauge,
    /// Blobs stored.
    pub stored_blobs: Gauge,
    /// Blobs evicted to keep `cache.max_size`.
    pub evicted: Counter,
    /// What clients were refused because their address had its share.
    pub limited: Family<WhyLabel, Counter>,
    /// Client connections open.
    pub connections: Gauge,
    /// Descriptors of the process that may be used for connections.
    pub max_connections: Gauge<u64, AtomicU64>,
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("oci_remote_cache");
        let r = &mut registry;
        Self {
            requests: counter(r, "requests", "Answers given to clients"),
            served_bytes: bytes(r, "served", "Body bytes handed to clients"),
            upstream_requests: counter(
                r,
                "upstream_requests",
                "Requests sent to upstreams, token endpoints included",
            ),
            upstream_bytes: bytes(r, "upstream", "Body bytes read from upstreams"),
            rate_remaining: gauge(
                r,
                "upstream_ratelimit_remaining",
                "Requests left before the upstream's rate limit",
            ),
            rate_limit: gauge(
                r,
                "upstream_ratelimit_limit",
                "Requests the upstream allows in its window",
            ),
            rate_ends: gauge(r, RATE_ENDS, "When none will be left at the present pace"),
            rate_source: gauge(r, RATE_SOURCE, "By what the upstream tells us from others"),
            rate_closed: gauge(r, RATE_CLOSED, "Until when the upstream is left alone"),
            offline: gauge(r, "upstream_offline", "Whether it is switched offline"),
            fills: gauge(r, "fills", "Blob fetches in flight"),
            fills_ended: counter(r, "fills_ended", "Blob fetches that ended"),
            warming: gauge(
                r,
                "warming",
                "Images being fetched ahead, or waiting for it",
            ),
            warmed: counter(r, "warmed", "Images fetched ahead"),
            read_ahead: counter(r, "read_ahead", "Layers fetched before they were asked for"),
            stale: counter(r, "stale", "Answers served past their age"),
            bypassed: counter(r, "bypassed", "Answers passed through without being kept"),
            store_faults: counter(
                r,
                "store_faults",
                "Failures of the cache's own disk or catalog",
            ),
            stored_bytes: gauge(
                r,
                "stored_bytes",
                "Bytes of blobs, spools and parked pieces",
            ),
            stored_blobs: gauge(r, "stored_blobs", "Blobs stored"),
            evicted: counter(r, "evicted", "Blobs evicted to keep the size limit"),
            limited: counter(
                r,
                "limited",
                "Requests and connections refused because an address had its share",
            ),
            connections: gauge(r, "connections", "Client connections open"),
            max_connections: gauge(r, "connections_limit", "Client connections allowed"),
            registry: Arc::new(registry),
        }
    }

    /// The OpenMetrics text of `/metrics`.
    pub fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        text::encode(&mut out, &self.registry).ok();
        out
    }

    /// Counts what an address did not get.
    pub fn limited(&self, what: Limited) {
        let why = match what {
            Limited::Connections => "connections",
            Limited::Requests => "requests",
        };
        self.limited.get_or_create(&WhyLabel { why }).inc();
    }

    /// Counts an answer that was stale or passed through.
    pub fn verdict(&self, verdict: Verdict) {
        match verdict {
            Verdict::Stale(why) => drop(self.stale.get_or_create(&WhyLabel::of(why)).inc()),
            Verdict::Bypass(why) => drop(self.bypassed.get_or_create(&WhyLabel::of(why)).inc()),
            Verdict::Hit
            | Verdict::Miss
            | Verdict::Asked
            | Verdict::Collapsed
            | Verdict::Revalidated
            | Verdict::None => {}
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl WhyLabel {
    fn of(why: Why) -> Self {
        Self { why: why.as_str() }
    }
}

fn counter<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: prometheus_client::registry::Metric + Clone + Default,
{
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

fn gauge<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: prometheus_client::registry::Metric + Clone + Default,
{
    counter(registry, name, help)
}

fn bytes<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: prometheus_client::registry::Metric + Clone + Default,
{
    let metric = M::default();
    registry.register_with_unit(name, help, Unit::Bytes, metric.clone());
    metric
}

#[cfg(test)]
mod tests {
    use super::{Metrics, RequestLabels};

    #[test]
    fn counts_show_in_the_text() {
        let metrics = Metrics::new();
        let labels = RequestLabels {
            kind: "blob",
            upstream: "docker.io".into(),
            verdict: "hit",
            status: 200,
        };
        metrics.requests.get_or_create(&labels).inc();
        let text = metrics.render();
        let line = r#"oci_remote_cache_requests_total{kind="blob",upstream="docker.io",verdict="hit",status="200"} 1"#;
        assert!(text.contains(line), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
