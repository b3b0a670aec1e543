//! A raw HTTP/1.1 client: nothing is normalised, decoded or retried, and whatever goes wrong is a field of the
//! response instead of an error, because what a client sees is what a test asserts.

use std::fmt;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::log::{Headers, header};
use crate::wire::{Connection, Framing, READ, framing};

/// What to send and how to take the answer.
#[derive(Clone, Debug)]
pub struct Request {
    method: String,
    target: String,
    version: &'static str,
    headers: Headers,
    body: Bytes,
    stop_after: Option<u64>,
    pace: Option<(usize, Duration)>,
    compare: Option<(Bytes, u64)>,
    receive_buffer: Option<u32>,
    timeout: Duration,
}

/// What came back.
#[derive(Clone, Debug, Default)]
pub struct Response {
    /// 0 when no answer came.
    pub status: u16,
    /// As sent, in order.
    pub headers: Headers,
    /// The body; empty when it was compared instead of kept.
    pub body: Bytes,
    /// Body bytes received, kept or not.
    pub length: u64,
    /// Whether the framing says that the whole body arrived.
    pub complete: bool,
    /// Whether every byte was the expected one so far; only with [`Request::compare`].
    pub right: Option<bool>,
    /// What went wrong, empty when nothing did.
    pub error: String,
    /// From sending the request to the end of the response's head.
    pub head_after: Option<Duration>,
    /// From sending the request to the first byte of the body.
    pub first_byte_after: Option<Duration>,
    /// From sending the request to the end.
    pub done_after: Duration,
}

/// A response whose body is still to be read.
#[derive(Debug)]
pub struct Incoming {
    /// Status and headers, and what was read of the body so far.
    pub response: Response,
    connection: Connection,
    framing: Framing,
    began: Instant,
    request: Request,
    kept: BytesMut,
}

/// A request that is being sent while the test goes on; given up when dropped.
#[derive(Debug)]
pub struct Background(JoinSet<Response>);

/// A GET on a connection of its own.
pub async fn get(port: u16, path: &str, headers: &[(&str, &str)]) -> Response {
    request("GET", port, path, headers).await
}

/// A HEAD on a connection of its own.
pub async fn head(port: u16, path: &str, headers: &[(&str, &str)]) -> Response {
    request("HEAD", port, path, headers).await
}

/// Any method on a connection of its own.
pub async fn request(method: &str, port: u16, path: &str, headers: &[(&str, &str)]) -> Response {
    headers
        .iter()
        .fold(Request::new(method, path), |request, (name, value)| {
            request.header(name, value)
        })
        .send(port)
        .await
}

/// Sends all requests at once, each on a connection of its own; the responses in the same order.
pub async fn storm(port: u16, requests: Vec<Request>) -> Vec<Response> {
    let started: Vec<Background> = requests
        .into_iter()
        .map(|request| request.start(port))
        .collect();
    let mut responses = Vec::with_capacity(started.len());
    for background in started {
        responses.push(background.response().await);
    }
    responses
}

impl Request {
    /// A request for a path, which is sent as it is.
    pub fn new(method: &str, target: &str) -> Self {
        Request {
            method: method.to_owned(),
            target: target.to_owned(),
            version: "HTTP/1.1",
            headers: Headers::new(),
            body: Bytes::new(),
            stop_after: None,
            pace: None,
            compare: None,
            receive_buffer: None,
            timeout: Duration::from_secs(40),
        }
    }

    /// A GET.
    pub fn get(target: &str) -> Self {
        Self::new("GET", target)
    }

    /// A HEAD.
    pub fn head(target: &str) -> Self {
        Self::new("HEAD", target)
    }

    /// Adds a header line.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Asks for a range, such as `0-99`, `100-` or `-5`.
    #[must_use]
    pub fn range(self, range: &str) -> Self {
        self.header("Range", &format!("bytes={range}"))
    }

    /// Sends a body, with its length.
    #[must_use]
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// Speaks HTTP/1.0.
    #[must_use]
    pub fn http10(mut self) -> Self {
        self.version = "HTTP/1.0";
        self
    }

    /// Hangs up once so many body bytes have come.
    #[must_use]
    pub fn stop_after(mut self, bytes: u64) -> Self {
        self.stop_after = Some(bytes);
        self
    }

    /// Reads at most so many bytes at once and then rests.
    #[must_use]
    pub fn pace(mut self, bytes: usize, rest: Duration) -> Self {
        self.pace = Some((bytes.max(1), rest));
        self
    }

    /// Compares the body with these bytes in place of keeping it.
    #[must_use]
    pub fn compare(self, expected: &Bytes) -> Self {
        self.compare_from(expected, 0)
    }

    /// Compares the body with these bytes from an offset on, as for a range.
    #[must_use]
    pub fn compare_from(mut self, expected: &Bytes, offset: u64) -> Self {
        self.compare = Some((expected.clone(), offset));
        self
    }

    /// Asks the system for a receive buffer of this size, as a slow client on a thin line has it.
    #[must_use]
    pub fn receive_buffer(mut self, bytes: u32) -> Self {
        self.receive_buffer = Some(bytes);
        self
    }

    /// Gives up after this time (at first 40 s).
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Sends it to 127.0.0.1 on a connection of its own and reads the whole answer.
    pub async fn send(self, port: u16) -> Response {
        let (limit, began) = (self.timeout, Instant::now());
        let mut incoming = match self.open(port).await {
            Ok(incoming) => incoming,
            Err(response) => return response,
        };
        if timeout(
            limit.saturating_sub(began.elapsed()),
            incoming.read_to_end(),
        )
        .await
        .is_err()
        {
            "timed out in the body".clone_into(&mut incoming.response.error);
        }
        incoming.into_response()
    }

    /// Sends it while the test goes on.
    pub fn start(self, port: u16) -> Background {
        let mut task = JoinSet::new();
        task.spawn(self.send(port));
        Background(task)
    }

    /// Sends it so many times at once, each on a connection of its own.
    pub async fn storm(&self, port: u16, count: usize) -> Vec<Response> {
        storm(port, vec![self.clone(); count]).await
    }

    /// Sends it and reads the head of the answer only; the failure as a response when there is none.
    pub async fn open(self, port: u16) -> Result<Incoming, Response> {
        let (limit, began) = (self.timeout, Instant::now());
        let failed = |error: String| Response {
            error,
            done_after: began.elapsed(),
            ..Response::default()
        };
        match timeout(limit, self.exchange(port, began)).await {
            Ok(Ok(incoming)) => Ok(incoming),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_elapsed) => Err(failed("timed out before the head".to_owned())),
        }
    }

    async fn exchange(self, port: u16, began: Instant) -> io::Result<Incoming> {
        let mut connection = Connection::open_with(port, self.receive_buffer).await?;
        let head = self.bytes(port);
        connection.stream.write_all(&head).await?;
        let (status, headers) = connection.read_response_head().await?;
        let framing = framing(&self.method, status, &headers);
        let response = Response {
            status,
            headers,
            head_after: Some(began.elapsed()),
            ..Response::default()
        };
        Ok(Incoming {
            response,
            connection,
            framing,
            began,
            request: self,
            kept: BytesMut::new(),
        })
    }

    /// The request as it goes over the wire.
    fn bytes(&self, port: u16) -> Vec<u8> {
        let mut text = format!("{} {} {}\r\n", self.method, self.target, self.version);
        if header(&self.headers, "host").is_none() {
            text.extend(["Host: 127.0.0.1:", &port.to_string(), "\r\n"]);
        }
        for (name, value) in &self.headers {
            text.extend([name, ": ", value, "\r\n"]);
        }
        if !self.body.is_empty() {
            text.extend(["Content-Length: ", &self.body.len().to_string(), "\r\n"]);
        }
        if self.version == "HTTP/1.1" && header(&self.headers, "connection").is_none() {
            text.push_str("Connection: close\r\n");
        }
        text.push_str("\r\n");
        [text.as_bytes(), &self.body].concat()
    }
}

impl Response {
    /// The first header line of that name.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// Every header line of that name.
    pub fn all(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// A complete 200.
    pub fn is_whole(&self) -> bool {
        self.status == 200 && self.complete
    }

    /// A complete 200 whose every byte was the expected one ([`Request::compare`]).
    pub fn is_right(&self) -> bool {
        self.is_whole() && self.right == Some(true)
    }

    /// A gateway error or a visibly broken transfer: never a complete answer with a body.
    pub fn is_refused(&self) -> bool {
        matches!(self.status, 502..=504) || (matches!(self.status, 200 | 206) && !self.complete)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{self}: no JSON ({error}): {}", self.text()))
    }

    /// The code of the specification's error body, empty when the body is none.
    pub fn error_code(&self) -> String {
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        body["errors"][0]["code"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// The number in a header such as `Content-Length`.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.header(name)?.parse().ok()
    }
}

/// `200`, or `200 incomplete after 17 bytes (closed early)`.
impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        if self.complete {
            return Ok(());
        }
        write!(
            f,
            " incomplete after {} bytes ({})",
            self.length, self.error
        )
    }
}

impl Background {
    /// Waits for the end.
    pub async fn response(mut self) -> Response {
        let joined = self.0.join_next().await.expect("one task");
        joined.expect("a client that does not panic")
    }
}

impl Incoming {
    /// Reads on until so many more body bytes have come or the body ends; false when it ended before.
    pub async fn read(&mut self, bytes: u64) -> bool {
        let wanted = self.response.length + bytes;
        while self.response.length < wanted {
            let most = usize::try_from(wanted - self.response.length).unwrap_or(READ);
            if !self.step(most).await {
                return false;
            }
        }
        true
    }

    /// Reads the rest, within the request's time limit.
    pub async fn finish(mut self) -> Response {
        if timeout(self.request.timeout, self.read_to_end())
            .await
            .is_err()
        {
            "timed out in the body".clone_into(&mut self.response.error);
        }
        self.into_response()
    }

    /// The body bytes read so far, when they are kept.
    pub fn so_far(&self) -> &[u8] {
        &self.kept
    }

    /// Hangs up with a reset.
    pub fn abort(self) {
        self.connection.abort();
    }

    /// What was read so far; the connection is closed.
    pub fn into_response(mut self) -> Response {
        self.response.body = self.kept.freeze();
        self.response.done_after = self.began.elapsed();
        self.response
    }

    async fn read_to_end(&mut self) {
        let stop = self.request.stop_after.unwrap_or(u64::MAX);
        loop {
            if self.response.length >= stop {
                "stopped by the test".clone_into(&mut self.response.error);
                return;
            }
            if !self
                .step(usize::try_from(stop - self.response.length).unwrap_or(READ))
                .await
            {
                return;
            }
        }
    }

    /// Reads one piece of the body; false at its end, in whatever way.
    async fn step(&mut self, most: usize) -> bool {
        let most = most
            .min(self.request.pace.map_or(READ, |(bytes, _)| bytes))
            .min(READ);
        match self.connection.read_piece(&mut self.framing, most).await {
            Ok(Some(piece)) => self.take(&piece),
            Ok(None) => {
                self.response.complete = true;
                return false;
            }
            Err(error) => {
                self.response.error = error.to_string();
                return false;
            }
        }
        if let Some((_, rest)) = self.request.pace {
            sleep(rest).await;
        }
        true
    }

    fn take(&mut self, piece: &[u8]) {
        self.response
            .first_byte_after
            .get_or_insert_with(|| self.began.elapsed());
        match &self.request.compare {
            None => self.kept.extend_from_slice(piece),
            Some((expected, offset)) => {
                let start = usize::try_from(offset + self.response.length).unwrap_or(usize::MAX);
                let same = expected.get(start..start.saturating_add(piece.len())) == Some(piece);
                self.response.right = Some(self.response.right.unwrap_or(true) && same);
            }
        }
        self.response.length += piece.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Server;
    use crate::script::Handler;

    async fn answering(parts: &'static [&'static str]) -> Server {
        let handler = Handler::new(move |mut exchange| async move {
            for part in parts {
                exchange.raw(part.as_bytes()).await;
                sleep(Duration::from_millis(5)).await;
            }
            exchange.close().await;
        });
        Server::start_on("127.0.0.1", handler).await
    }

    #[tokio::test]
    async fn reads_chunks_wherever_they_are_cut() {
        let parts = &[
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-",
            "Encoding: chunked\r\n\r\n3\r",
            "\nabc\r\n4;x=y\r\nde",
            "fg\r\n0\r\nTrailer: t\r\n\r\n",
        ];
        let response = get(answering(parts).await.port(), "/", &[]).await;
        assert_eq!(
            (response.text().as_str(), response.complete),
            ("abcdefg", true)
        );
        let cut = &["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"];
        let response = get(answering(cut).await.port(), "/", &[]).await;
        assert_eq!(
            response.to_string(),
            "200 incomplete after 3 bytes (closed early)"
        );
    }

    #[tokio::test]
    async fn storms_and_runs_in_the_background() {
        let body = "the same for all";
        let handler = crate::faults::status(200, &[], body);
        let server = Server::start_on("127.0.0.1", handler).await;
        let request = Request::get("/").compare(&Bytes::from_static(body.as_bytes()));
        let background = request.clone().start(server.port());
        assert!(
            request
                .storm(server.port(), 20)
                .await
                .iter()
                .all(Response::is_right)
        );
        assert!(background.response().await.is_right());
        assert_eq!(server.connections(), 21);
    }

    #[tokio::test]
    async fn stops_and_times_out() {
        let server = answering(&[
            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabcde",
            "fghij",
        ])
        .await;
        let stopped = Request::get("/").stop_after(4).send(server.port()).await;
        assert_eq!(
            (stopped.text().as_str(), stopped.error.as_str()),
            ("abcd", "stopped by the test")
        );
        let silent = Server::start_on("127.0.0.1", crate::faults::silent()).await;
        let response = Request::get("/")
            .timeout(Duration::from_millis(50))
            .send(silent.port())
            .await;
        assert_eq!(
            (response.status, response.error.as_str()),
            (0, "timed out before the head")
        );
    }
}
