//! A registry that is as far away and as narrow as a measurement wants it: a round trip before each answer, a rate on each connection, a token.
//!
//! It serves one OCI layout from memory as the test bed's registry does and logs every request. It does not imitate anything else of a network: no loss,
//! no jitter, no cost for a connection.
//!
//! usage: `throttled --layout DIR --repo NAME [--rate BYTES_PER_SECOND] [--latency-ms N] [--realm URL]`
//!
//! `--realm` asks clients for a token, which this same server hands out to anyone; the URL is the one that they reach its `/token` at.
//!
//! The first line of output is its URL. `GET /bench/stats` answers with the requests so far, as SIGTERM prints them; `GET /bench/reset` forgets them.
#![expect(
    clippy::expect_used,
    reason = "a measurement without its upstream is none"
)]

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use testbed::faults::serve;
use testbed::{
    Auth as _, Bearer, Content, Entry, Exchange, Handler, Kind, Matcher, Registry, ServeOptions,
    TokenServer,
};
use tokio::signal::unix::{SignalKind, signal};

const BLOB_TYPE: &str = "application/octet-stream";

#[derive(Default)]
struct Options {
    layout: PathBuf,
    repo: String,
    rate: Option<u64>,
    latency: Duration,
    realm: Option<String>,
}

/// The registry with what stands before it.
struct Upstream {
    registry: Registry,
    latency: Duration,
    auth: Option<Bearer>,
    paced: HashMap<String, Handler>,
}

impl Options {
    fn from_args(mut args: impl Iterator<Item = String>) -> Option<Self> {
        let mut options = Options::default();
        while let Some(name) = args.next() {
            let value = args.next()?;
            match name.as_str() {
                "--layout" => options.layout = value.into(),
                "--repo" => options.repo = value,
                "--rate" => options.rate = Some(value.parse().ok()?),
                "--latency-ms" => options.latency = Duration::from_millis(value.parse().ok()?),
                "--realm" => options.realm = Some(value),
                _ => return None,
            }
        }
        (!options.repo.is_empty()).then_some(options)
    }
}

impl Upstream {
    async fn new(options: &Options) -> Self {
        let registry = Registry::start().await;
        let auth = options
            .realm
            .as_deref()
            .map(|realm| Bearer::of(&TokenServer::at(&registry)).realm(realm));
        if let Some(auth) = &auth {
            registry.require(auth.clone());
        }
        let mut upstream = Upstream {
            registry,
            latency: options.latency,
            auth,
            paced: HashMap::new(),
        };
        upstream.offer(options);
        upstream
    }

    fn offer(&mut self, options: &Options) {
        for data in blobs_of(&options.layout) {
            let blob = Content::new(data, BLOB_TYPE);
            self.registry.put_blob(&options.repo, &blob);
            if let Some(rate) = options.rate {
                let paced = serve(&blob, ServeOptions::new().rate(rate));
                self.paced.insert(blob.digest.to_string(), paced);
            }
        }
        for (tag, manifest) in manifests_of(&options.layout) {
            self.registry
                .put_manifest(&options.repo, tag.as_deref(), &manifest);
        }
    }

    async fn answer(&self, mut exchange: Exchange) {
        match exchange.entry().path.as_str() {
            "/bench/stats" => return exchange.json(200, &self.stats(), &[]).await,
            "/bench/reset" => {
                self.registry.clear_log();
                return exchange.json(200, &json!({}), &[]).await;
            }
            _ => tokio::time::sleep(self.latency).await,
        }
        match self.paced_answer(&exchange) {
            Some(handler) => handler.call(exchange).await,
            None => exchange.pass().await,
        }
    }

    /// Who answers for a blob at a rate; nobody does for a client without a token.
    fn paced_answer(&self, exchange: &Exchange) -> Option<Handler> {
        let entry = exchange.entry();
        let refused = || {
            self.auth
                .as_ref()
                .and_then(|auth| auth.refuse(exchange))
                .is_some()
        };
        (entry.kind == Kind::Blob && !refused())
            .then(|| self.paced.get(&entry.reference).cloned())
            .flatten()
    }

    fn stats(&self) -> Value {
        let requests: Vec<Value> = self
            .registry
            .log()
            .iter()
            .filter(|entry| !entry.path.starts_with("/bench/"))
            .map(described)
            .collect();
        json!({"requests": requests, "connections": self.registry.connections()})
    }
}

fn described(entry: &Entry) -> Value {
    json!({
        "method": entry.method,
        "kind": format!("{:?}", entry.kind).to_lowercase(),
        "path": entry.path,
        "range": entry.header("range"),
        "agent": entry.header("user-agent"),
        "status": entry.status,
        "sent": entry.sent,
    })
}

fn blobs_of(layout: &Path) -> impl Iterator<Item = Vec<u8>> {
    fs::read_dir(layout.join("blobs/sha256"))
        .expect("a layout with blobs")
        .map(|file| fs::read(file.expect("a listed file").path()).expect("a readable blob"))
}

/// What the layout's index lists, each with its tag.
fn manifests_of(layout: &Path) -> Vec<(Option<String>, Content)> {
    let index = fs::read(layout.join("index.json")).expect("a layout with an index");
    let index: Value = serde_json::from_slice(&index).expect("an index of JSON");
    let listed = index.get("manifests").and_then(Value::as_array);
    listed
        .into_iter()
        .flatten()
        .map(|descriptor| {
            let text = |pointer| descriptor.pointer(pointer).and_then(Value::as_str);
            let hex = text("/digest").and_then(|digest| digest.strip_prefix("sha256:"));
            let path = layout.join("blobs/sha256").join(hex.expect("a digest"));
            let data = fs::read(path).expect("the manifest of an index");
            let tag = text("/annotations/org.opencontainers.image.ref.name");
            let media_type = text("/mediaType").expect("a media type");
            (tag.map(str::to_owned), Content::new(data, media_type))
        })
        .collect()
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let options = Options::from_args(std::env::args().skip(1))
        .ok_or_else(|| io::Error::other("usage: see the head of this file"))?;
    let mut asked_to_end = signal(SignalKind::terminate())?;
    let upstream = Arc::new(Upstream::new(&options).await);
    let behind = Arc::clone(&upstream);
    let handler = Handler::new(move |exchange| {
        let upstream = Arc::clone(&behind);
        async move { upstream.answer(exchange).await }
    });
    upstream.registry.script(Matcher::any(), handler);
    writeln!(io::stdout(), "{}", upstream.registry.url())?;
    asked_to_end.recv().await;
    writeln!(io::stdout(), "{}", upstream.stats())
}
