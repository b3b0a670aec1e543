//! The listeners: sockets in, requests to a [`Handler`], answers out, until the process stops.
//!
//! What every request and answer needs, whoever answers it, is done on the way (`hygiene`), and each request is followed to its last byte
//! (`observe`).

mod hygiene;
mod socket;
mod tls;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::CONNECTION;
use hyper::http::request::Parts;
use hyper::{Request, Response, Version};
use prometheus_client::metrics::gauge::Gauge;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::body::Body;
use super::fair::Crowd;
pub use super::observe::Audience;
use super::observe::{Chain, Observer};
use super::sendfile::{self, Patience};
use crate::metrics::{Limited, Metrics};
use crate::tasks::Tasks;
use hygiene::{Ending, finish, refusal};
pub use socket::{BindError, Listener, connection_limit, raise_open_files};
pub use tls::{Tls, TlsFiles};

/// How long accept rests after it failed: without free descriptors it would fail again at once.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// A complaint that clients can cause is logged once in so long.
const SELDOM: Duration = Duration::from_mins(1);

/// What a connection over its address's share is told.
const CROWDED: &[u8] = b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nRetry-After: 1\r\n\
Content-Length: 109\r\nConnection: close\r\n\r\n\
{\"errors\":[{\"code\":\"TOOMANYREQUESTS\",\"message\":\"your address has as many connections as this cache allows\"}]}";

/// First byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// What a listener allows its clients.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections open at once; further ones wait to be accepted.
    pub connections: usize,
    /// How long a connection waits for its client.
    pub patience: Patience,
}

/// Answers requests.
pub trait Handler: Send + Sync + 'static {
    /// The answer to `request`, whose body, if it has one, is never read.
    ///
    /// For HEAD either the body that GET would have, or an empty one beside a `Content-Length` header.
    fn handle(
        &self,
        request: Parts,
        peer: SocketAddr,
    ) -> impl Future<Output = Response<Body>> + Send;

    /// Whose requests these are.
    fn audience(&self) -> Audience {
        Audience::Clients
    }
}

/// A listener at work.
struct Server<H> {
    handler: Arc<H>,
    observer: Arc<Observer>,
    patience: Patience,
    tls: Option<Tls>,
    crowd: Option<Crowd>,
    tasks: Tasks,
    crowded: Seldom,
    accept_failed: Seldom,
    tls_spoken: Seldom,
}

/// Lets one of many equal complaints through.
#[derive(Debug, Default)]
struct Seldom {
    last: Mutex<Option<Instant>>,
}

/// A connection in the table: holds its place, and is counted.
struct Place {
    _permit: OwnedSemaphorePermit,
    open: Option<Gauge>,
}

impl Limits {
    /// So many connections, with the usual patience.
    pub fn new(connections: usize) -> Self {
        Self {
            connections,
            patience: Patience::default(),
        }
    }
}

/// Accepts connections until the process stops, then waits until those open have given the answers under way.
pub async fn serve<H: Handler>(
    listener: Listener,
    handler: Arc<H>,
    limits: Limits,
    tasks: Tasks,
    metrics: Metrics,
) -> io::Result<()> {
    let (what, address) = (listener.what(), listener.local_addr());
    let (tls, crowd) = (listener.tls(), listener.crowd());
    let socket = listener.into_tokio()?;
    let observer = Observer::new(metrics, handler.audience());
    let server = Arc::new(Server {
        handler,
        observer: Arc::new(observer),
        patience: limits.patience,
        tls,
        crowd,
        tasks: tasks.clone(),
        crowded: Seldom::default(),
        accept_failed: Seldom::default(),
        tls_spoken: Seldom::default(),
    });
    let places = Arc::new(Semaphore::new(limits.connections));
    info!(%address, what, tls = server.tls.is_some(), "listening");
    tokio::select! {
        () = tasks.stopping() => {}
        never = server.accept(&socket, &places) => match never {},
    }
    drop(socket);
    // Every place is back when every connection has ended.
    let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    drop(places.acquire_many(all).await);
    debug!(%address, what, "all connections are closed");
    Ok(())
}

impl<H: Handler> Server<H> {
    async fn accept(
        self: &Arc<Self>,
        socket: &tokio::net::TcpListener,
        places: &Arc<Semaphore>,
    ) -> Infallible {
        loop {
            // The place first: with a full table new connections stay in the kernel's queue.
            let Ok(permit) = Arc::clone(places).acquire_owned().await else {
                return std::future::pending().await;
            };
            match socket.accept().await {
                Ok((stream, peer)) => {
                    let connection = Arc::clone(self).connection(stream, peer, permit);
                    drop(self.tasks.spawn(connection));
                }
                Err(e) => self.rest(&e).await,
            }
        }
    }

    async fn rest(&self, error: &io::Error) {
        if error.kind() == io::ErrorKind::ConnectionAborted {
            // That client left while it was queued; the next one may be accepted.
            return;
        }
        if self.accept_failed.is_due() {
            warn!(%error, "cannot accept a connection; waiting for open ones to end");
        }
        tokio::time::sleep(ACCEPT_REST).await;
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) {
        let _place = Place::taken(permit, self.observer.counted());
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let seat = self.crowd.as_ref().map(|crowd| crowd.enter(peer.ip()));
        if matches!(seat, Some(None)) {
            return self.turn_away(stream, peer).await;
        }
        // Without it the end of each answer would wait for the client's acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%peer, %error, "the connection is gone");
            return;
        }
        let Some(first) = self.first_byte(&stream).await else {
            return;
        };
        match &self.tls {
            Some(_) if first != TLS_HANDSHAKE => {
                debug!(%peer, "plain HTTP on a TLS port");
                tls::refuse_plain(stream).await;
            }
            Some(tls) => self.encrypted(tls, stream, peer).await,
            None => self.plain(first, stream, peer).await,
        }
    }

    /// An address that has its share of connections gets no answer to a request, but is told why, where it can read it.
    async fn turn_away(&self, stream: TcpStream, peer: SocketAddr) {
        if let Some(metrics) = self.observer.counted() {
            metrics.limited(Limited::Connections);
        }
        if self.crowded.is_due() {
            warn!(%peer, "an address has all its connections (`clients.max_connections`): further ones are closed");
        }
        if self.tls.is_none() {
            tls::say(stream, CROWDED).await;
        }
    }

    async fn encrypted(self: &Arc<Self>, tls: &Tls, stream: TcpStream, peer: SocketAddr) {
        let server = Arc::clone(self);
        let answer = move |request| {
            let server = Arc::clone(&server);
            async move { server.answer(request, peer).await }
        };
        let ended = tls.serve(stream, self.patience, &self.tasks, answer).await;
        if let Err(error) = ended {
            debug!(%peer, error = %Chain(&error), "the connection ended with an error");
        }
    }

    async fn plain(&self, first: u8, stream: TcpStream, peer: SocketAddr) {
        if first == TLS_HANDSHAKE && self.tls_spoken.is_due() {
            // Left for hyper to refuse, in plain HTTP: from that Go's clients (containerd among them, for localhost) see that they
            // should speak HTTP.
            warn!(
                %peer,
                "a client speaks TLS to this plain HTTP port. Tell it to use HTTP: podman and skopeo --tls-verify=false, Docker \
                 insecure-registries, containerd an http:// URL in hosts.toml"
            );
        }
        let answer = |request| self.answer(request, peer);
        let stopping = self.tasks.stopping();
        let served = sendfile::serve(stream, self.patience, stopping, answer).await;
        if let Err(error) = served {
            debug!(%peer, error = %Chain(&error), "the connection ended with an error");
        }
    }

    /// The first byte the client sends, which stays to be read; nothing when it sends none in time.
    async fn first_byte(&self, stream: &TcpStream) -> Option<u8> {
        let mut first = [0];
        let peek = stream.peek(&mut first);
        let peeked = tokio::select! {
            peeked = tokio::time::timeout(self.patience.head, peek) => peeked,
            () = self.tasks.stopping() => return None,
        };
        let [first] = first;
        matches!(peeked, Ok(Ok(1))).then_some(first)
    }

    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
        let (request, body) = request.into_parts();
        let access = self.observer.arrived(&request, peer);
        let ending = Ending::of(&request, &body);
        // hyper takes it as a sign that the body is not wanted, and does not ask the client to send it.
        drop(body);
        let (method, version) = (request.method.clone(), request.version);
        let response = match refusal(&request) {
            Some(problem) => problem.into_response(),
            None => self.handler.handle(request, peer).await,
        };
        let mut response = finish(response, &method, ending);
        if version == Version::HTTP_2 {
            // HTTP/2 has no such header (RFC 9113 section 8.2.2), and its next request begins in a stream of its own.
            response.headers_mut().remove(CONNECTION);
        }
        access.answered(response)
    }
}

impl Place {
    fn taken(permit: OwnedSemaphorePermit, metrics: Option<&Metrics>) -> Self {
        let open = metrics.map(|metrics| metrics.connections.clone());
        if let Some(open) = &open {
            open.inc();
        }
        Self {
            _permit: permit,
            open,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(open) = &self.open {
            open.dec();
        }
    }
}

impl Seldom {
    fn is_due(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < SELDOM) {
            return false;
        }
        *last = Some(Instant::now());
        true
    }
}

#[cfg(test)]
pub(in crate::http) mod tests;
