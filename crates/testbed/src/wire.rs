//! One raw client connection: sends any bytes, reads responses as they are framed, and can be told apart from a
//! well-behaved client only by what a test sends over it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout};

use crate::client::Response;
use crate::log::{Headers, header, parse_headers};

/// The largest head that is read, of requests and responses.
const HEAD_LIMIT: usize = 64 * 1024;
/// One read of a head, small so that a slow reader takes little of the body with it.
const HEAD_READ: usize = 4096;
/// One read from the socket.
pub(crate) const READ: usize = 64 * 1024;

/// One client connection, for what no HTTP client would send.
#[derive(Debug)]
pub struct Connection {
    pub(crate) stream: TcpStream,
    buffer: BytesMut,
}

/// What is left of a body.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Framing {
    Length(u64),
    /// Bytes left of the chunk at hand; the next chunk's size follows.
    Chunk(u64),
    UntilClose,
}

impl Connection {
    /// Connects to 127.0.0.1.
    pub async fn open(port: u16) -> Self {
        Self::open_with(port, None)
            .await
            .unwrap_or_else(|error| panic!("connect to port {port}: {error}"))
    }

    /// Sends these bytes as they are.
    pub async fn send(&mut self, data: impl AsRef<[u8]>) {
        self.stream
            .write_all(data.as_ref())
            .await
            .expect("send raw bytes");
    }

    /// Says that nothing more will be sent.
    pub async fn finish_sending(&mut self) {
        self.stream.shutdown().await.ok();
    }

    /// Every byte up to the close or the limit; whether it was closed.
    pub async fn until_closed(&mut self, limit: Duration) -> (Vec<u8>, bool) {
        let end = Instant::now() + limit;
        loop {
            self.buffer.reserve(READ);
            let left = end.saturating_duration_since(Instant::now());
            match timeout(left, self.stream.read_buf(&mut self.buffer)).await {
                Ok(Ok(1..)) => {}
                Ok(_) => return (self.buffer.split().to_vec(), true),
                Err(_elapsed) => return (self.buffer.split().to_vec(), false),
            }
        }
    }

    /// The next response on this connection, for a request by `method`.
    pub async fn response(&mut self, method: &str) -> Response {
        let mut response = Response::default();
        let limit = Duration::from_secs(20);
        match timeout(limit, self.read_response(method, &mut response)).await {
            Ok(Ok(())) => response.complete = true,
            Ok(Err(error)) => response.error = error.to_string(),
            Err(_elapsed) => "timed out".clone_into(&mut response.error),
        }
        response.length = response.body.len() as u64;
        response
    }

    /// Hangs up with a reset.
    pub fn abort(self) {
        self.stream.set_zero_linger().ok();
    }

    pub(crate) async fn open_with(port: u16, receive_buffer: Option<u32>) -> io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        if let Some(size) = receive_buffer {
            socket.set_recv_buffer_size(size)?;
        }
        let stream = socket
            .connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
            .await?;
        stream.set_nodelay(true)?;
        Ok(Connection {
            stream,
            buffer: BytesMut::new(),
        })
    }

    async fn read_response(&mut self, method: &str, response: &mut Response) -> io::Result<()> {
        (response.status, response.headers) = self.read_response_head().await?;
        let mut framing = framing(method, response.status, &response.headers);
        let mut body = BytesMut::new();
        let mut result = Ok(());
        loop {
            match self.read_piece(&mut framing, READ).await {
                Ok(Some(piece)) => body.extend_from_slice(&piece),
                Ok(None) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        response.body = body.freeze();
        result
    }

    /// Status and headers; interim answers are skipped.
    pub(crate) async fn read_response_head(&mut self) -> io::Result<(u16, Headers)> {
        loop {
            let head = read_head(&mut self.stream, &mut self.buffer).await?;
            let head = head.ok_or_else(|| io::Error::other("closed without an answer"))?;
            let mut lines = head.split("\r\n");
            let line = lines.next().unwrap_or_default();
            let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
            let status: u16 =
                status.ok_or_else(|| io::Error::other(format!("not a status line: {line:?}")))?;
            if !(100..200).contains(&status) {
                return Ok((status, parse_headers(lines)));
            }
        }
    }

    /// At most `most` bytes of the body; None at its end.
    pub(crate) async fn read_piece(
        &mut self,
        framing: &mut Framing,
        most: usize,
    ) -> io::Result<Option<Bytes>> {
        if let Framing::Chunk(0) = framing {
            *framing = match self.read_chunk_size().await? {
                0 => Framing::Length(0),
                size => Framing::Chunk(size),
            };
        }
        match framing {
            Framing::Length(0) => Ok(None),
            Framing::UntilClose => Ok(self.read_some(most).await?),
            Framing::Length(left) => {
                let piece = self.read_promised(*left, most).await?;
                *left -= piece.len() as u64;
                Ok(Some(piece))
            }
            Framing::Chunk(left) => {
                let piece = self.read_promised(*left, most).await?;
                *left -= piece.len() as u64;
                if *left == 0 {
                    self.read_line().await?;
                }
                Ok(Some(piece))
            }
        }
    }

    async fn read_promised(&mut self, left: u64, most: usize) -> io::Result<Bytes> {
        let most = usize::try_from(left).unwrap_or(most).min(most);
        self.read_some(most)
            .await?
            .ok_or_else(|| io::Error::other("closed early"))
    }

    /// What is buffered, else one read that takes no more than `most`, so that a slow reader is slow on the wire too.
    async fn read_some(&mut self, most: usize) -> io::Result<Option<Bytes>> {
        if self.buffer.is_empty() {
            self.buffer.reserve(most);
            let mut limited = (&mut self.stream).take(most as u64);
            if limited.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
        let length = self.buffer.len().min(most);
        Ok(Some(self.buffer.split_to(length).freeze()))
    }

    /// The size of the next chunk; after the last one also its trailers are read.
    async fn read_chunk_size(&mut self) -> io::Result<u64> {
        let line = self.read_line().await?;
        let digits = line.split(';').next().unwrap_or_default().trim();
        let size = u64::from_str_radix(digits, 16)
            .map_err(|error| io::Error::other(format!("{line:?}: {error}")))?;
        while size == 0 && !self.read_line().await?.is_empty() {}
        Ok(size)
    }

    async fn read_line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|window| window == b"\r\n") {
                let line = self.buffer.split_to(end + 2);
                return Ok(line.iter().take(end).copied().map(char::from).collect());
            }
            self.buffer.reserve(HEAD_READ);
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::Error::other("closed early"));
            }
        }
    }
}

/// How long the body is, by RFC 9112 section 6.3.
pub(crate) fn framing(method: &str, status: u16, headers: &[(String, String)]) -> Framing {
    if method == "HEAD" || matches!(status, 204 | 304) {
        return Framing::Length(0);
    }
    if header(headers, "transfer-encoding")
        .is_some_and(|value| value.eq_ignore_ascii_case("chunked"))
    {
        return Framing::Chunk(0);
    }
    header(headers, "content-length")
        .and_then(|value| value.parse().ok())
        .map_or(Framing::UntilClose, Framing::Length)
}

/// Everything up to the empty line, without it; None when the peer closed before the first byte of it.
pub(crate) async fn read_head(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
) -> io::Result<Option<String>> {
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = buffer.split_to(end);
            buffer.advance(4);
            // Latin-1, so that every byte of a header survives.
            return Ok(Some(head.iter().copied().map(char::from).collect()));
        }
        if buffer.len() > HEAD_LIMIT {
            return Err(io::Error::other("a head without end"));
        }
        buffer.reserve(HEAD_READ);
        if stream.read_buf(buffer).await? == 0 {
            return if buffer.is_empty() {
                Ok(None)
            } else {
                Err(io::ErrorKind::UnexpectedEof.into())
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Server;

    #[tokio::test]
    async fn pipelines_raw_bytes() {
        let server =
            Server::start_on("127.0.0.1", crate::faults::error(404, "NAME_UNKNOWN", &[])).await;
        let mut connection = Connection::open(server.port()).await;
        connection
            .send("GET /a HTTP/1.1\r\n\r\nPUT /b HTTP/1.1\r\nContent-Length: 2\r\n\r\nxy")
            .await;
        assert_eq!(
            connection.response("GET").await.error_code(),
            "NAME_UNKNOWN"
        );
        assert_eq!(
            connection.response("PUT").await.error_code(),
            "NAME_UNKNOWN"
        );
        connection.send("nonsense\r\n\r\n").await;
        assert!(connection.until_closed(Duration::from_secs(5)).await.1);
        assert_eq!(server.requests(), ["GET /a", "PUT /b"]);
        assert_eq!(server.errors().len(), 1);
    }
}
