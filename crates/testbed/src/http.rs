//! A scriptable HTTP/1.1 server on a raw socket: it logs every request and gives whoever answers byte-level
//! control. It knows how the paths of a registry are built, so that requests can be told apart, and nothing of
//! what stands behind them (that is `registry`, `cdn` and `token`).

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinSet};

use crate::exchange::Exchange;
use crate::lock;
use crate::log::{Entry, Record};
use crate::script::{Handler, Matcher};
use crate::wire::{READ, read_head};

/// What a connection's send buffer may hold.
const SEND_BUFFER: u32 = 128 * 1024;

/// An HTTP/1.1 server on a loopback port. Clones are handles to the same server; it ends with the last one.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
    running: Arc<Mutex<Running>>,
}

pub(crate) struct Shared {
    host: String,
    address: SocketAddr,
    pub(crate) usual: Handler,
    log: Mutex<Vec<Arc<Record>>>,
    scripts: Mutex<Vec<Script>>,
    errors: Mutex<Vec<String>>,
    connections: AtomicUsize,
    open: AtomicUsize,
}

struct Script {
    matcher: Matcher,
    handler: Handler,
}

enum Running {
    Up {
        stop: oneshot::Sender<()>,
        accepting: JoinSet<()>,
    },
    /// Bound but not listening: connects are refused and nobody else gets the port.
    Down(TcpSocket),
    Changing,
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    buffer: BytesMut,
}

/// Counts a connection as open for as long as its task lives.
struct Open(Arc<Shared>);

impl Server {
    /// Starts on a free port of `host` (a loopback name or address, which then stands in `url()`), with the
    /// handler that answers whatever no script matches.
    pub async fn start_on(host: &str, usual: Handler) -> Server {
        let listener = listen(bind(resolve(host).await));
        let shared = Arc::new(Shared {
            host: host.to_owned(),
            address: listener.local_addr().expect("a listener has an address"),
            usual,
            log: Mutex::default(),
            scripts: Mutex::default(),
            errors: Mutex::default(),
            connections: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
        });
        let running = Arc::new(Mutex::new(Running::up(&shared, listener)));
        Server { shared, running }
    }

    /// Stops listening and drops every connection; the port stays ours and refuses.
    pub async fn stop(&self) {
        let before = std::mem::replace(&mut *lock(&self.running), Running::Changing);
        let after = match before {
            Running::Up {
                stop,
                mut accepting,
            } => {
                drop(stop);
                accepting.join_next().await;
                Running::Down(bind(self.shared.address))
            }
            Running::Down(_) | Running::Changing => before,
        };
        *lock(&self.running) = after;
    }

    /// Listens again on the same port.
    #[expect(
        clippy::unused_async,
        reason = "reads like stop(), and may come to wait"
    )]
    pub async fn resume(&self) {
        let before = std::mem::replace(&mut *lock(&self.running), Running::Changing);
        let after = match before {
            Running::Down(socket) => Running::up(&self.shared, listen(socket)),
            Running::Up { .. } | Running::Changing => before,
        };
        *lock(&self.running) = after;
    }

    /// `http://host:port`.
    pub fn url(&self) -> String {
        self.shared.url()
    }

    /// `host:port`.
    pub fn authority(&self) -> String {
        self.shared.authority()
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.shared.address.port()
    }

    /// Lets `handler` answer the requests that match, in place of the usual answer. The first script that
    /// matches and is not used up wins.
    pub fn script(&self, matcher: impl Into<Matcher>, handler: Handler) {
        lock(&self.shared.scripts).push(Script {
            matcher: matcher.into(),
            handler,
        });
    }

    /// Forgets every script.
    pub fn clear_scripts(&self) {
        lock(&self.shared.scripts).clear();
    }

    /// Every request so far, as a snapshot, in the order they came.
    pub fn log(&self) -> Vec<Entry> {
        lock(&self.shared.log)
            .iter()
            .map(|record| record.snapshot())
            .collect()
    }

    /// Forgets the requests so far.
    pub fn clear_log(&self) {
        lock(&self.shared.log).clear();
    }

    /// The requests in short form, such as `GET /v2/lib/app/manifests/v1`.
    pub fn requests(&self) -> Vec<String> {
        self.log().iter().map(Entry::to_string).collect()
    }

    /// The requests that match.
    pub fn entries(&self, matcher: impl Into<Matcher>) -> Vec<Entry> {
        let matcher = matcher.into();
        self.log()
            .into_iter()
            .filter(|entry| matcher.fits(entry))
            .collect()
    }

    /// How many requests match.
    pub fn count(&self, matcher: impl Into<Matcher>) -> usize {
        self.entries(matcher).len()
    }

    /// The body bytes sent in answer to the requests that match.
    pub fn sent(&self, matcher: impl Into<Matcher>) -> u64 {
        self.entries(matcher).iter().map(|entry| entry.sent).sum()
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// How many connections are still being served. One whose client left counts until its handler noticed.
    pub fn open_connections(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// What was no HTTP/1.1 request, and handlers that panicked.
    pub fn errors(&self) -> Vec<String> {
        lock(&self.shared.errors).clone()
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("url", &self.url())
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn authority(&self) -> String {
        format!("{}:{}", self.host, self.address.port())
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.authority())
    }

    fn note(&self, error: String) {
        lock(&self.errors).push(error);
    }

    fn ended(&self, result: Result<(), JoinError>) {
        if let Err(error) = result
            && error.is_panic()
        {
            self.note(format!("a handler panicked: {error}"));
        }
    }

    fn handler(&self, entry: &Entry) -> Handler {
        let mut scripts = lock(&self.scripts);
        for script in scripts.iter_mut() {
            if script.matcher.take(entry) {
                return script.handler.clone();
            }
        }
        self.usual.clone()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Running {
    fn up(shared: &Arc<Shared>, listener: TcpListener) -> Running {
        let (stop, stopped) = oneshot::channel();
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(Arc::clone(shared), listener, stopped));
        Running::Up { stop, accepting }
    }
}

impl Connection {
    /// The next request; None when the client closed in good order between two.
    async fn read(&mut self) -> io::Result<Option<(Entry, Bytes)>> {
        let Some(head) = read_head(&mut self.stream, &mut self.buffer).await? else {
            return Ok(None);
        };
        let entry = Entry::parse(&head)
            .ok_or_else(|| io::Error::other(format!("not a request: {head:?}")))?;
        let length = entry
            .header("content-length")
            .and_then(|value| value.parse().ok())
            .unwrap_or(0);
        self.buffer.reserve(length.min(READ));
        while self.buffer.len() < length {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
        let body = self.buffer.split_to(length).freeze();
        Ok(Some((entry, body)))
    }
}

impl Open {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.connections.fetch_add(1, Ordering::SeqCst);
        shared.open.fetch_add(1, Ordering::SeqCst);
        Open(Arc::clone(shared))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(result) = connections.join_next() => shared.ended(result),
            Ok((stream, _)) = listener.accept() => {
                stream.set_nodelay(true).ok();
                connections.spawn(serve(Open::new(&shared), stream));
            }
        }
    }
    drop(listener);
    connections.shutdown().await;
}

async fn serve(open: Open, stream: TcpStream) {
    let shared = Arc::clone(&open.0);
    let mut connection = Connection {
        stream,
        buffer: BytesMut::new(),
    };
    loop {
        let (entry, body) = match connection.read().await {
            Ok(Some(request)) => request,
            Err(error) if error.kind() == io::ErrorKind::Other => {
                return shared.note(error.to_string());
            }
            Ok(None) | Err(_) => return,
        };
        let Some(next) = answer(&shared, connection, entry, body).await else {
            return;
        };
        connection = next;
    }
}

/// Has one request answered; the connection when it can take the next.
async fn answer(
    shared: &Arc<Shared>,
    connection: Connection,
    entry: Entry,
    body: Bytes,
) -> Option<Connection> {
    let handler = shared.handler(&entry);
    let record = Arc::new(Record::new(entry));
    lock(&shared.log).push(Arc::clone(&record));
    let (back, returned) = oneshot::channel();
    let shared = Arc::clone(shared);
    handler
        .call(Exchange {
            shared,
            record,
            body,
            connection: Some(connection),
            back: Some(back),
        })
        .await;
    returned.await.ok()
}

/// A free port at `host`; IPv4 where a name has both, as `localhost` does.
async fn resolve(host: &str) -> SocketAddr {
    let found: Vec<SocketAddr> = lookup_host(format!("{host}:0"))
        .await
        .expect("resolve a loopback name")
        .collect();
    let chosen = found
        .iter()
        .find(|address| address.is_ipv4())
        .or_else(|| found.first())
        .expect("a name with an address");
    assert!(chosen.ip().is_loopback(), "{host} is no loopback address");
    *chosen
}

fn bind(address: SocketAddr) -> TcpSocket {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }
    .expect("make a socket");
    socket.set_reuseaddr(true).expect("set SO_REUSEADDR");
    // Inherited by what is accepted: bytes in a deep buffer would count as sent long before the peer has them.
    socket
        .set_send_buffer_size(SEND_BUFFER)
        .expect("set SO_SNDBUF");
    // A listener that was just closed may still be on its way out.
    for _ in 0..100 {
        if socket.bind(address).is_ok() {
            return socket;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("bind {address}: it stays in use");
}

/// The backlog is deep because storms connect all at once.
fn listen(socket: TcpSocket) -> TcpListener {
    socket.listen(4096).expect("listen on a bound socket")
}
