//! Whole listeners over real sockets, seen from the wire.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::header::{CONTENT_LENGTH, ETAG, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::{BindError, Handler, Limits, Listener, Patience, connection_limit, serve};
use crate::http::body::{Body, BodyBroken, Part};
use crate::http::problem::Problem;
use crate::metrics::Metrics;
use crate::store::span::Span;
use crate::tasks::Tasks;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(20);

/// Answers by path.
struct Paths<F>(F);

/// A listener at work on a loopback port.
pub(in crate::http) struct Lab {
    pub(in crate::http) address: SocketAddr,
    pub(in crate::http) metrics: Metrics,
    pub(in crate::http) tasks: Tasks,
    server: JoinHandle<std::io::Result<()>>,
}

/// A client that sees every byte.
pub(in crate::http) struct Client {
    stream: TcpStream,
    read: Vec<u8>,
}

/// One answer as it came.
#[derive(Debug)]
pub(in crate::http) struct Answer {
    pub(in crate::http) status: u16,
    pub(in crate::http) head: String,
    pub(in crate::http) body: Vec<u8>,
    /// Whether the body was as long as announced.
    pub(in crate::http) complete: bool,
}

impl<F> Handler for Paths<F>
where
    F: Fn(&Parts) -> Response<Body> + Send + Sync + 'static,
{
    async fn handle(&self, request: Parts, _peer: SocketAddr) -> Response<Body> {
        (self.0)(&request)
    }
}

impl Lab {
    pub(in crate::http) fn start<F>(limits: Limits, answer: F) -> Self
    where
        F: Fn(&Parts) -> Response<Body> + Send + Sync + 'static,
    {
        let listener = Listener::bind(loopback(), "listen").unwrap();
        let (address, tasks, metrics) = (listener.local_addr(), Tasks::new(), Metrics::new());
        let handler = Arc::new(Paths(answer));
        let serving = serve(listener, handler, limits, tasks.clone(), metrics.clone());
        let server = tasks.spawn(serving);
        Self {
            address,
            metrics,
            tasks,
            server,
        }
    }

    pub(in crate::http) async fn client(&self) -> Client {
        let stream = TcpStream::connect(self.address).await.unwrap();
        Client::new(stream)
    }

    /// Waits for a counter's line in the metrics.
    pub(in crate::http) async fn shows(&self, line: &str) {
        let shown = async {
            while !self.metrics.render().lines().any(|shown| shown == line) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let seen = timeout(LONG, shown).await;
        assert!(seen.is_ok(), "{line} not in {}", self.metrics.render());
    }
}

impl Client {
    pub(in crate::http) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            read: Vec::new(),
        }
    }

    pub(in crate::http) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    pub(in crate::http) async fn get(&mut self, path: &str) -> Answer {
        self.send(get(path)).await;
        self.answer().await.unwrap()
    }

    /// The next answer; nothing when the connection ends before it begins.
    pub(in crate::http) async fn answer(&mut self) -> Option<Answer> {
        let mut answer = self.answer_to_head().await?;
        let length = header(&answer.head, "content-length").map(|value| value.parse().unwrap());
        (answer.body, answer.complete) = match length {
            _ if answer.status == 304 => (Vec::new(), true),
            Some(length) => self.exactly(length).await,
            None => (self.rest().await, false),
        };
        Some(answer)
    }

    /// The next answer, without a body.
    pub(in crate::http) async fn answer_to_head(&mut self) -> Option<Answer> {
        let head = timeout(LONG, self.head()).await.unwrap()?;
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Some(Answer {
            status,
            head,
            body: Vec::new(),
            complete: true,
        })
    }

    /// Everything until the server ends the connection.
    pub(in crate::http) async fn rest(&mut self) -> Vec<u8> {
        while timeout(LONG, self.more()).await.unwrap() {}
        std::mem::take(&mut self.read)
    }

    async fn head(&mut self) -> Option<String> {
        loop {
            let end = self.read.windows(4).position(|bytes| bytes == b"\r\n\r\n");
            if let Some(end) = end {
                let head = self.read.drain(..end + 4).collect();
                return Some(String::from_utf8(head).unwrap().to_ascii_lowercase());
            }
            if !self.more().await {
                assert!(self.read.is_empty(), "half a head: {:?}", self.read);
                return None;
            }
        }
    }

    async fn exactly(&mut self, length: usize) -> (Vec<u8>, bool) {
        while self.read.len() < length {
            if !timeout(LONG, self.more()).await.unwrap() {
                return (std::mem::take(&mut self.read), false);
            }
        }
        (self.read.drain(..length).collect(), true)
    }

    /// Reads once; false at the end.
    pub(in crate::http) async fn more(&mut self) -> bool {
        let mut block = vec![0; 64 << 10];
        match self.stream.read(&mut block).await {
            Ok(0) | Err(_) => false,
            Ok(bytes) => {
                self.read.extend_from_slice(&block[..bytes]);
                true
            }
        }
    }
}

pub(in crate::http) fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
}

pub(in crate::http) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let lines = head.lines().filter_map(|line| line.split_once(": "));
    let mut values = lines.filter(|(key, _)| *key == name).map(|(_, v)| v);
    values.next()
}

pub(in crate::http) fn limits() -> Limits {
    Limits::new(64)
}

/// Bytes in which every position differs from its neighbours, and none is the zero of the block.
pub(in crate::http) fn content(length: usize) -> Vec<u8> {
    let pattern: Vec<u8> = (1..=251).collect();
    let mut content = pattern.repeat(length / pattern.len() + 1);
    content.truncate(length);
    content
}

pub(in crate::http) fn file(content: &[u8]) -> Arc<std::fs::File> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    Arc::new(file)
}

pub(in crate::http) fn span(file: &Arc<std::fs::File>, offset: u64, len: u64) -> Span {
    Span {
        file: Arc::clone(file),
        offset,
        len,
    }
}

fn loopback() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

fn hello(_request: &Parts) -> Response<Body> {
    Response::new(Body::memory("hello"))
}

fn impatient() -> Limits {
    let patience = Patience {
        head: Duration::from_millis(200),
        write: Duration::from_millis(200),
    };
    Limits {
        patience,
        ..limits()
    }
}

/// Requests with a second one hidden behind them. `{S}` is the start of a GET, `{L}` the hidden request's length, `{H}` the hidden
/// request, `{C}` the same as a chunked body.
const HIDING: [(u16, &str); 19] = [
    (
        400,
        "{S}Transfer-Encoding: chunked\r\nContent-Length: {L}\r\n\r\n{C}",
    ),
    (400, "{S}Transfer-Encoding: chunked\r\n\r\n{C}"),
    (
        400,
        "{S}Content-Length: {L}\r\nContent-Length: 0\r\n\r\n{H}",
    ),
    (400, "{S}Content-Length: {L}\r\n\r\n{H}"),
    (400, "{S}Content-Length: {L}, {L}\r\n\r\n{H}"),
    (400, "{S}Transfer-Encoding: xchunked\r\n\r\n{C}"),
    (400, "{S}Transfer-Encoding: identity\r\n\r\n{H}"),
    (400, "{S}A: b\r\n Content-Length: 3\r\n\r\n{H}"),
    (400, "{S}Content-Length : {L}\r\n\r\n{H}"),
    (400, "{S}B\0ad: x\r\n\r\n{H}"),
    (
        400,
        "GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n{C}",
    ),
    (400, "GET / HTTP/1.1\nHost: x\nContent-Length: {L}\n\n{H}"),
    (400, "GET / HTTP/1.1\r\n\r\n{H}"),
    (400, "{S}Host: y\r\n\r\n{H}"),
    (400, "GET http://elsewhere/ HTTP/1.1\r\nHost: x\r\n\r\n{H}"),
    (405, "CONNECT elsewhere:443 HTTP/1.1\r\nHost: x\r\n\r\n{H}"),
    (
        405,
        "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: {L}\r\n\r\n{H}",
    ),
    (
        405,
        "PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{C}",
    ),
    (200, "{S}Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n{H}"),
];

#[tokio::test]
async fn hidden_requests_are_never_read() {
    let lab = Lab::start(limits(), |request| match request.method {
        Method::GET | Method::HEAD => hello(request),
        _ => Problem::method_not_allowed().into_response(),
    });
    let hidden = get("/hidden");
    let chunked = format!("{:x}\r\n{hidden}\r\n0\r\n\r\n", hidden.len());
    for (status, template) in HIDING {
        let request = template
            .replace("{S}", "GET / HTTP/1.1\r\nHost: x\r\n")
            .replace("{L}", &hidden.len().to_string())
            .replace("{H}", &hidden)
            .replace("{C}", &chunked);
        let mut client = lab.client().await;
        client.send(&request).await;
        let answer = client.answer().await.unwrap();
        assert_eq!(answer.status, status, "{request:?}");
        let connection = header(&answer.head, "connection");
        assert_eq!(connection, Some("close"), "{request:?}");
        let rest = client.rest().await;
        assert!(rest.is_empty(), "{request:?} got {rest:?}");
    }
}

#[tokio::test]
async fn other_methods_without_a_body_keep_the_connection() {
    let lab = Lab::start(limits(), |request| match request.method {
        Method::GET => hello(request),
        _ => Problem::method_not_allowed().into_response(),
    });
    let mut client = lab.client().await;
    for method in ["DELETE", "OPTIONS", "POST"] {
        client
            .send(format!(
                "{method} / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
            ))
            .await;
        let answer = client.answer().await.unwrap();
        assert_eq!(
            (answer.status, header(&answer.head, "allow")),
            (405, Some("get, head"))
        );
        assert!(answer.body.starts_with(b"{\"errors\":["), "{answer:?}");
    }
    assert_eq!(client.get("/").await.body, b"hello");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_gets_its_refusal_and_no_invitation() {
    let lab = Lab::start(limits(), |_| Problem::method_not_allowed().into_response());
    let mut client = lab.client().await;
    client
        .send("PUT / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n")
        .await;
    assert_eq!(client.answer().await.unwrap().status, 405);

    // A client that sends without waiting must be able to read the answer before its connection is reset.
    for _ in 0..20 {
        let mut client = lab.client().await;
        client
            .send("PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n")
            .await;
        client.send(vec![7; 500_000]).await;
        let answer = client.answer().await.unwrap();
        assert_eq!((answer.status, answer.complete), (405, true));
    }
}

#[tokio::test]
async fn head_has_the_length_of_get_and_no_body() {
    let lab = Lab::start(limits(), |request| {
        let mut response = Response::new(Body::empty());
        match request.uri.path() {
            "/body" => *response.body_mut() = Body::memory("hello"),
            "/header" => {
                response
                    .headers_mut()
                    .insert(CONTENT_LENGTH, HeaderValue::from_static("77"));
            }
            "/zero" => {
                response
                    .headers_mut()
                    .insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
            }
            "/unknown" => {}
            "/stream" => *response.body_mut() = Body::stream(None, futures_util::stream::empty()),
            _ => response = Problem::not_found(oci::ErrorCode::NameUnknown, "no").into_response(),
        }
        response
    });
    let mut client = lab.client().await;
    let not_found = client.get("/else").await.body.len().to_string();
    for (path, length) in [
        ("/body", Some("5")),
        ("/header", Some("77")),
        ("/zero", Some("0")),
        ("/unknown", None),
        ("/stream", None),
        ("/else", Some(not_found.as_str())),
    ] {
        client
            .send(format!("HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n"))
            .await;
        let answer = client.answer_to_head().await.unwrap();
        assert_eq!(header(&answer.head, "content-length"), length, "{path}");
        assert_eq!(header(&answer.head, "transfer-encoding"), None, "{path}");
        assert_eq!(
            header(&answer.head, "x-content-type-options"),
            Some("nosniff")
        );
    }
    assert_eq!(client.get("/body").await.body, b"hello");
}

#[tokio::test]
async fn not_modified_has_no_length() {
    let lab = Lab::start(limits(), |_| {
        let mut response = Response::new(Body::memory("hello"));
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response
            .headers_mut()
            .insert(ETAG, HeaderValue::from_static("\"e\""));
        response
    });
    let mut client = lab.client().await;
    for _ in 0..2 {
        let answer = client.get("/").await;
        assert_eq!(
            (answer.status, header(&answer.head, "content-length")),
            (304, None)
        );
        assert_eq!(header(&answer.head, "etag"), Some("\"e\""));
    }
}

#[tokio::test]
async fn heads_are_bounded() {
    let lab = Lab::start(limits(), hello);
    let request = |lines: usize, bytes: usize| {
        let mut text = "GET / HTTP/1.1\r\nHost: x\r\n".to_owned();
        for line in 1..lines {
            let value = "v".repeat(bytes / lines);
            write!(text, "h{line}: {value}\r\n").unwrap();
        }
        text + "\r\n"
    };
    for (lines, bytes, status) in [
        (64, 6400, 200),
        (65, 6500, 431),
        (9, 32 << 10, 200),
        (9, 50 << 10, 431),
    ] {
        let mut client = lab.client().await;
        client.send(request(lines, bytes)).await;
        let answer = client.answer().await.unwrap();
        assert_eq!(answer.status, status, "{lines} lines, {bytes} bytes");
    }
}

#[tokio::test]
async fn a_slow_head_and_an_idle_connection_are_closed() {
    let lab = Lab::start(impatient(), hello);
    let mut silent = lab.client().await;
    let mut slow = lab.client().await;
    slow.send("GET / HT").await;
    let mut idle = lab.client().await;
    assert_eq!(idle.get("/").await.body, b"hello");
    for client in [&mut silent, &mut slow, &mut idle] {
        assert!(client.rest().await.is_empty());
    }
    lab.shows("oci_remote_cache_connections 0").await;
}

#[tokio::test]
async fn a_full_table_makes_new_connections_wait() {
    let lab = Lab::start(Limits::new(1), hello);
    let mut first = lab.client().await;
    assert_eq!(first.get("/").await.status, 200);
    let mut second = lab.client().await;
    second.send(get("/")).await;
    let early = timeout(Duration::from_millis(100), second.answer()).await;
    assert!(early.is_err(), "served beyond the limit");
    drop(first);
    assert_eq!(second.answer().await.unwrap().status, 200);
}

#[tokio::test]
async fn a_tls_hello_is_answered_in_plain_http() {
    let lab = Lab::start(limits(), hello);
    let mut client = lab.client().await;
    client
        .send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03abcdefgh")
        .await;
    let answer = client.answer().await.unwrap();
    assert_eq!(answer.status, 400);
    assert!(client.rest().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_lets_answers_end_and_takes_no_new_ones() {
    let blob = file(&content(8 << 20));
    let lab = Lab::start(limits(), move |_| {
        Response::new(Body::spans([span(&blob, 0, 8 << 20)]))
    });
    let mut busy = lab.client().await;
    let mut idle = lab.client().await;
    idle.get("/").await;
    busy.send(get("/")).await;
    assert!(busy.more().await);
    lab.tasks.stop();
    assert!(idle.rest().await.is_empty());
    sleep(Duration::from_millis(50)).await;
    assert!(TcpStream::connect(lab.address).await.is_err());
    assert!(!lab.server.is_finished());
    let answer = busy.answer().await.unwrap();
    assert!(answer.complete && answer.body == content(8 << 20));
    assert!(busy.rest().await.is_empty());
    timeout(LONG, lab.server).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn requests_are_counted_when_their_body_has_ended() {
    let lab = Lab::start(impatient(), |request| match request.uri.path() {
        "/broken" => {
            let parts = [Ok(Part::Memory("abc".into())), Err(BodyBroken::new("test"))];
            Response::new(Body::stream(Some(9), futures_util::stream::iter(parts)))
        }
        _ => hello(request),
    });
    let mut client = lab.client().await;
    client.get("/").await;
    lab.shows("oci_remote_cache_served_bytes_total 5").await;
    let answer = client.get("/broken").await;
    assert!(!answer.complete);
    let line = r#"oci_remote_cache_requests_total{kind="other",upstream="",verdict="none",status="200"} 2"#;
    lab.shows(line).await;
}

#[test]
fn a_taken_port_names_the_way_out() {
    let first = Listener::bind(loopback(), "listen").unwrap();
    let error = Listener::bind(first.local_addr(), "listen").unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }));
    let text = error.to_string();
    assert!(
        text.contains(&first.local_addr().to_string()) && text.contains("`listen`"),
        "{text}"
    );
    let nowhere = SocketAddr::from(([192, 0, 2, 1], 0));
    let error = Listener::bind(nowhere, "admin_listen").unwrap_err();
    assert!(matches!(error, BindError::NoSuchAddress { .. }), "{error}");
}

#[tokio::test]
async fn any_address_takes_ipv4() {
    let listener = Listener::bind("[::]:0".parse().unwrap(), "listen").unwrap();
    let target = SocketAddr::from((Ipv4Addr::LOCALHOST, listener.local_addr().port()));
    assert!(TcpStream::connect(target).await.is_ok());
}

#[test]
fn connections_follow_from_open_files() {
    for (files, connections) in [
        (0, 16),
        (1024, 576),
        (16_384, 10_000),
        (65_536, 32_640),
        (u64::MAX, 100_000),
    ] {
        assert_eq!(connection_limit(files), connections, "{files}");
    }
}
