//! Bytes on the wire against bytes in files. Content holds no zero byte, so a zero that got out would show.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, future, stream};
use http_body_util::BodyExt as _;
use hyper::Response;
use hyper::http::request::Parts;
use rustix::net::{AddressFamily, SocketType, sockopt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::Patience;
use crate::http::body::{Body, BodyBroken, Part, ReadBody};
use crate::http::listen::Limits;
use crate::http::listen::tests::{Client, Lab, content, file, get, header, limits, span};
use crate::tasks::Tasks;

/// More than three frames, and no multiple of anything.
const LARGE: usize = (7 << 20) + 4321;

/// Answers `/<start>-<end>` from a file, in the way the query names.
fn slices() -> impl Fn(&Parts) -> Response<Body> + Send + Sync + 'static {
    let all = content(LARGE);
    let stored = file(&all);
    move |request| {
        let path = request.uri.path().trim_start_matches('/');
        let (start, end) = path.split_once('-').unwrap();
        let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
        let middle = usize::midpoint(start, end);
        let part = |start: usize, end: usize| {
            Part::Span(span(&stored, start as u64, (end - start) as u64))
        };
        let memory = |start: usize, end: usize| Part::Memory(all[start..end].to_vec().into());
        let length = Some((end - start) as u64);
        Response::new(match request.uri.query() {
            Some("memory") => Body::from(memory(start, end)),
            Some("spans") => Body::spans([
                span(&stored, start as u64, (middle - start) as u64),
                span(&stored, middle as u64, (end - middle) as u64),
            ]),
            Some("mixed") => {
                let parts = [
                    part(start, middle),
                    memory(middle, middle),
                    memory(middle, end),
                ];
                Body::stream(length, stream::iter(parts.map(Ok)))
            }
            Some("late") => {
                let parts = [memory(start, middle), part(middle, end)].map(Ok);
                let late = stream::iter(parts).then(|part| async {
                    sleep(Duration::from_millis(20)).await;
                    part
                });
                Body::stream(length, late)
            }
            Some("open") => {
                let parts = [
                    part(start, middle),
                    memory(middle, middle + 7),
                    part(middle + 7, end),
                ];
                Body::stream(None, stream::iter(parts.map(Ok)))
            }
            _ => Body::from(part(start, end)),
        })
    }
}

fn small_window(address: SocketAddr) -> Client {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_socket_recv_buffer_size(&socket, 4096).unwrap();
    rustix::net::connect(&socket, &address).unwrap();
    let stream = std::net::TcpStream::from(socket);
    stream.set_nonblocking(true).unwrap();
    Client::new(TcpStream::from_std(stream).unwrap())
}

fn write_patience(write: Duration) -> Limits {
    let patience = Patience {
        write,
        ..Patience::default()
    };
    Limits {
        patience,
        ..limits()
    }
}

async fn expect(client: &mut Client, all: &[u8], targets: &[(usize, usize, &str)]) {
    for (start, end, how) in targets {
        let answer = client.answer().await.unwrap();
        let length = header(&answer.head, "content-length").unwrap();
        assert_eq!(length, (end - start).to_string());
        assert!(answer.complete, "{start}-{end}?{how} is cut");
        assert!(
            answer.body == all[*start..*end],
            "{start}-{end}?{how} differs"
        );
    }
}

const TARGETS: [(usize, usize, &str); 12] = [
    (0, 4096, "span"),
    (0, LARGE, "span"),
    (5, 5, "span"),
    (LARGE - 1, LARGE, "span"),
    (17, 3_000_000, "spans"),
    (0, 10, "memory"),
    (100, 2_097_252, "span"),
    (100, 2_097_253, "span"),
    (1, 6_000_001, "mixed"),
    (9, 10, "spans"),
    (3, 5_000_000, "late"),
    (0, LARGE, "spans"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_answers_are_right_byte_for_byte() {
    let lab = Lab::start(limits(), slices());
    let all = content(LARGE);
    for mut client in [lab.client().await, small_window(lab.address)] {
        let mut requests = String::new();
        for (start, end, how) in TARGETS {
            requests.push_str(&get(&format!("/{start}-{end}?{how}")));
        }
        client.send(requests).await;
        expect(&mut client, &all, &TARGETS).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn head_between_answers_sends_no_body() {
    let lab = Lab::start(limits(), slices());
    let all = content(LARGE);
    let mut client = lab.client().await;
    let head = "HEAD /0-3000000 HTTP/1.1\r\nHost: x\r\n\r\n";
    let requests = [&get("/0-100"), head, &get("/5-3000000"), head, &get("/1-2")].concat();
    client.send(requests).await;
    expect(&mut client, &all, &[(0, 100, "")]).await;
    assert_eq!(client.answer_to_head().await.unwrap().status, 200);
    expect(&mut client, &all, &[(5, 3_000_000, "")]).await;
    assert_eq!(client.answer_to_head().await.unwrap().status, 200);
    expect(&mut client, &all, &[(1, 2, "")]).await;
    lab.shows("oci_remote_cache_served_bytes_total 3000096")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closing_connection_sends_everything_first() {
    let lab = Lab::start(limits(), slices());
    let all = content(LARGE);
    for version in ["HTTP/1.1\r\nConnection: close", "HTTP/1.0"] {
        let mut client = lab.client().await;
        let request = format!("GET /0-{LARGE} {version}\r\nHost: x\r\n\r\n");
        client.send(request).await;
        expect(&mut client, &all, &[(0, LARGE, "")]).await;
        assert!(client.rest().await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_without_a_length_is_right_too() {
    let lab = Lab::start(limits(), slices());
    let all = content(LARGE);
    let mut client = lab.client().await;
    client.send("GET /3-6000000?open HTTP/1.0\r\n\r\n").await;
    assert!(client.answer().await.unwrap().body == all[3..6_000_000]);

    let mut client = lab.client().await;
    let request = "GET /3-6000000?open HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    client.send(request).await;
    let answer = client.answer().await.unwrap();
    assert_eq!(header(&answer.head, "transfer-encoding"), Some("chunked"));
    assert!(unchunked(&answer.body) == all[3..6_000_000]);
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let line = body.windows(2).position(|bytes| bytes == b"\r\n").unwrap();
        let size = std::str::from_utf8(&body[..line]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        let (chunk, rest) = body[line + 2..].split_at(size);
        all.extend_from_slice(chunk);
        body = rest.strip_prefix(b"\r\n").unwrap();
        if size == 0 {
            assert!(body.is_empty());
            return all;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_connections_do_not_mix() {
    let lab = Lab::start(limits(), slices());
    let all = content(LARGE);
    let connections = (0..8).map(|_| async {
        let mut client = lab.client().await;
        let smaller = TARGETS
            .into_iter()
            .filter(|(start, end, _)| end - start < 3 << 20);
        for (start, end, how) in smaller {
            client.send(get(&format!("/{start}-{end}?{how}"))).await;
            expect(&mut client, &all, &[(start, end, how)]).await;
        }
    });
    future::join_all(connections).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_ends_early_cuts_the_answer() {
    let all = content(3_000_000);
    let short = file(&all);
    let lab = Lab::start(limits(), move |_| {
        Response::new(Body::spans([span(&short, 0, 3_000_001)]))
    });
    let mut client = lab.client().await;
    let answer = client.get("/").await;
    assert!(!answer.complete);
    assert!(
        answer.body == all,
        "something else than the file's bytes came"
    );
    // The handler's answer was whole; that it was cut shows in the access line.
    let cut = r#"oci_remote_cache_requests_total{kind="other",upstream="",verdict="none",status="200"} 1"#;
    lab.shows(cut).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_shortened_on_the_way_cuts_the_answer() {
    let all = content(64 << 20);
    let stored = file(&all);
    let shortened = Arc::clone(&stored);
    let lab = Lab::start(limits(), move |_| {
        Response::new(Body::spans([span(&stored, 0, 64 << 20)]))
    });
    let mut client = small_window(lab.address);
    client.send(get("/")).await;
    assert!(client.more().await);
    shortened.set_len(32 << 20).unwrap();
    let answer = client.answer().await.unwrap();
    assert!(!answer.complete && answer.body.len() <= 32 << 20);
    assert!(all.starts_with(&answer.body));
}

#[tokio::test]
async fn bodies_are_held_to_their_length() {
    let lab = Lab::start(limits(), |request| {
        let part = |text: &'static str| Ok(Part::Memory(text.into()));
        let broken = Err(BodyBroken::new("test"));
        Response::new(match request.uri.path() {
            "/short" => Body::stream(Some(9), stream::iter([part("abc")])),
            "/long" => Body::stream(Some(4), stream::iter([part("abc"), part("def")])),
            "/broken" => Body::stream(Some(9), stream::iter([part("abc"), broken])),
            "/broken-open" => Body::stream(None, stream::iter([part("abc"), broken])),
            _ => Body::stream(None, stream::iter([part("abc"), part("def")])),
        })
    });
    for path in ["/short", "/long", "/broken"] {
        let mut client = lab.client().await;
        let answer = client.get(path).await;
        let told = (answer.complete, answer.body.as_slice());
        assert_eq!(told, (false, b"abc".as_slice()), "{path}");
    }
    let mut client = lab.client().await;
    client
        .send("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await;
    let answer = client.answer().await.unwrap();
    assert!(answer.body.ends_with(b"\r\n0\r\n\r\n"), "{answer:?}");
    let mut client = lab.client().await;
    client.send(get("/broken-open")).await;
    assert!(!client.rest().await.ends_with(b"0\r\n\r\n"));
}

/// HTTP/1.0 knows only the connection's end as the end of a body without a length: a cut must be a reset.
#[tokio::test]
async fn a_cut_without_a_length_is_a_reset() {
    let lab = Lab::start(limits(), |_| {
        let parts = [Ok(Part::Memory("abc".into())), Err(BodyBroken::new("test"))];
        let slow = stream::iter(parts).then(|part| async {
            sleep(Duration::from_millis(20)).await;
            part
        });
        Response::new(Body::stream(None, slow))
    });
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"GET / HTTP/1.0\r\n\r\n")
        .await
        .unwrap();
    let mut all = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut all).await;
    assert_eq!(
        read.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_takes_nothing_is_cut() {
    let stored = file(&content(64 << 20));
    let lab = Lab::start(write_patience(Duration::from_millis(300)), move |_| {
        Response::new(Body::spans([span(&stored, 0, 64 << 20)]))
    });
    let mut client = small_window(lab.address);
    client.send(get("/")).await;
    lab.shows("oci_remote_cache_connections 1").await;
    lab.shows("oci_remote_cache_connections 0").await;
    drop(client);
}

/// The socket's buffer holds megabytes, and counts as full until a third of it is free: that takes this client much longer than the limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_takes_little_is_not_cut() {
    let stored = file(&content(64 << 20));
    let lab = Lab::start(write_patience(Duration::from_millis(300)), move |_| {
        Response::new(Body::spans([span(&stored, 0, 64 << 20)]))
    });
    let mut client = small_window(lab.address);
    client.send(get("/")).await;
    for _ in 0..40 {
        assert!(client.more().await);
        sleep(Duration::from_millis(50)).await;
    }
    lab.shows("oci_remote_cache_connections 1").await;
}

#[tokio::test]
async fn other_transports_read_the_same_bytes() {
    let all = content(1_000_000);
    let stored = file(&all);
    let parts = [
        Part::Span(span(&stored, 0, 700_000)),
        Part::Memory(all[700_000..700_010].to_vec().into()),
        Part::Span(span(&stored, 700_010, 299_990)),
    ];
    let body = Body::stream(Some(1_000_000), stream::iter(parts.map(Ok)));
    let read = ReadBody::new(body, Tasks::new()).collect().await.unwrap();
    assert!(read.to_bytes() == all);
    let body = Body::spans([span(&stored, 999_000, 1001)]);
    let read = ReadBody::new(body, Tasks::new()).collect().await;
    assert!(read.is_err());
}
