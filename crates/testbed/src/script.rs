//! Scripts: which request is answered (`Matcher`), by what (`Handler`), and when it may go on (`Gate`).

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::watch;

use crate::exchange::Exchange;
use crate::log::{Entry, Kind};

/// What a handler returns.
pub type BoxFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Answers an exchange.
#[derive(Clone)]
pub struct Handler(Arc<dyn Fn(Exchange) -> BoxFuture + Send + Sync>);

/// Which requests are meant; fields that are not set match all. Also made from a [`Kind`], from
/// `(kind, method)` and from `(kind, method, reference)`.
#[derive(Clone, Debug, Default)]
pub struct Matcher {
    kind: Option<Kind>,
    method: Option<String>,
    repo: Option<String>,
    reference: Option<String>,
    query: Option<String>,
    times: Option<usize>,
}

/// A door in an upstream's answer: handlers wait at it until the test opens it. Clones are the same door.
#[derive(Clone, Debug)]
pub struct Gate(Arc<watch::Sender<GateState>>);

#[derive(Clone, Copy, Debug, Default)]
struct GateState {
    open: bool,
    waiting: usize,
}

impl Handler {
    /// From a closure, such as `Handler::new(|mut x| async move { x.error(404, "BLOB_UNKNOWN", &[]).await })`.
    pub fn new<F, A>(answer: F) -> Self
    where
        F: Fn(Exchange) -> A + Send + Sync + 'static,
        A: Future<Output = ()> + Send + 'static,
    {
        Handler(Arc::new(move |exchange| Box::pin(answer(exchange))))
    }

    /// Answers.
    pub fn call(&self, exchange: Exchange) -> BoxFuture {
        (self.0)(exchange)
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handler")
    }
}

impl Matcher {
    /// Every request.
    pub fn any() -> Self {
        Self::default()
    }

    /// Requests for manifests.
    pub fn manifests() -> Self {
        Kind::Manifest.into()
    }

    /// Requests for blobs.
    pub fn blobs() -> Self {
        Kind::Blob.into()
    }

    /// Only with this method.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        self.method = Some(method.to_owned());
        self
    }

    /// Only for this tag or digest.
    #[must_use]
    pub fn of(mut self, reference: impl fmt::Display) -> Self {
        self.reference = Some(reference.to_string());
        self
    }

    /// Only in this repository.
    #[must_use]
    pub fn repo(mut self, repo: &str) -> Self {
        self.repo = Some(repo.to_owned());
        self
    }

    /// Only with exactly this query, such as the signature of a CDN's URL.
    #[must_use]
    pub fn query(mut self, query: &str) -> Self {
        self.query = Some(query.to_owned());
        self
    }

    /// Only the first so many (for scripts; counting ignores it).
    #[must_use]
    pub fn times(mut self, times: usize) -> Self {
        self.times = Some(times);
        self
    }

    /// Only the first.
    #[must_use]
    pub fn once(self) -> Self {
        self.times(1)
    }

    /// Whether the request is meant.
    pub fn fits(&self, entry: &Entry) -> bool {
        let same = |wanted: &Option<String>, found: &str| {
            wanted.as_ref().is_none_or(|wanted| wanted == found)
        };
        self.kind.is_none_or(|kind| kind == entry.kind)
            && same(&self.method, &entry.method)
            && same(&self.repo, &entry.repo)
            && same(&self.reference, &entry.reference)
            && same(&self.query, &entry.query)
    }

    /// Whether the request is meant, and if so uses up one time.
    pub(crate) fn take(&mut self, entry: &Entry) -> bool {
        if self.times == Some(0) || !self.fits(entry) {
            return false;
        }
        self.times = self.times.map(|left| left - 1);
        true
    }
}

impl From<Kind> for Matcher {
    fn from(kind: Kind) -> Self {
        Matcher {
            kind: Some(kind),
            ..Self::default()
        }
    }
}

impl From<(Kind, &str)> for Matcher {
    fn from((kind, method): (Kind, &str)) -> Self {
        Matcher::from(kind).method(method)
    }
}

impl<R: fmt::Display> From<(Kind, &str, R)> for Matcher {
    fn from((kind, method, reference): (Kind, &str, R)) -> Self {
        Matcher::from(kind).method(method).of(reference)
    }
}

impl Gate {
    /// A closed one.
    pub fn new() -> Self {
        Gate(Arc::new(watch::Sender::default()))
    }

    /// Lets everyone through, now and later.
    pub fn open(&self) {
        self.0.send_modify(|state| state.open = true);
    }

    /// Stops whoever comes from now on.
    pub fn close(&self) {
        self.0.send_modify(|state| state.open = false);
    }

    /// Waits until it is open.
    pub async fn opened(&self) {
        let _waiting = Waiting::at(self);
        self.0
            .subscribe()
            .wait_for(|state| state.open)
            .await
            .expect("the gate holds its sender");
    }

    /// Waits until so many stand before it at the same time.
    pub async fn reached_by(&self, count: usize) {
        self.0
            .subscribe()
            .wait_for(|state| state.waiting >= count)
            .await
            .expect("the gate holds its sender");
    }

    /// Waits until someone stands before it.
    pub async fn reached(&self) {
        self.reached_by(1).await;
    }

    /// How many stand before it.
    pub fn waiting(&self) -> usize {
        self.0.borrow().waiting
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts one who stands before a gate, also when he gives up.
struct Waiting<'a>(&'a Gate);

impl<'a> Waiting<'a> {
    fn at(gate: &'a Gate) -> Self {
        gate.0.send_modify(|state| state.waiting += 1);
        Waiting(gate)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.waiting -= 1);
    }
}
