//! One request and whatever is answered to it, byte by byte.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::oneshot;

use crate::http::{Connection, Shared};
use crate::log::{Entry, Headers, Record, header};

/// One write: small enough that a count of sent bytes stays near to what the peer took.
const WRITE: usize = 64 * 1024;

/// One request being answered. Whoever holds it writes the answer; when it is dropped the connection goes on
/// to the next request, unless it was closed or nothing was answered.
#[derive(Debug)]
pub struct Exchange {
    pub(crate) shared: Arc<Shared>,
    pub(crate) record: Arc<Record>,
    pub(crate) body: Bytes,
    pub(crate) connection: Option<Connection>,
    pub(crate) back: Option<oneshot::Sender<Connection>>,
}

impl Exchange {
    /// The request.
    pub fn entry(&self) -> &Entry {
        &self.record.entry
    }

    /// The request's method.
    pub fn method(&self) -> &str {
        &self.record.entry.method
    }

    /// The first header line of that name in the request.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.record.entry.header(name)
    }

    /// The request's body.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// The URL of the server that was asked.
    pub fn server_url(&self) -> String {
        self.shared.url()
    }

    /// Answers as if no script had matched.
    pub async fn pass(self) {
        let usual = self.shared.usual.clone();
        usual.call(self).await;
    }

    /// A whole answer. `Content-Length` is added unless the headers frame the body themselves; a HEAD gets no body.
    pub async fn reply<K: AsRef<str>, V: AsRef<str>>(
        &mut self,
        status: u16,
        headers: &[(K, V)],
        body: &[u8],
    ) {
        let mut lines: Headers = headers
            .iter()
            .map(|(name, value)| (name.as_ref().to_owned(), value.as_ref().to_owned()))
            .collect();
        let framed = ["content-length", "transfer-encoding"]
            .iter()
            .any(|name| header(&lines, name).is_some());
        if !framed {
            lines.push(("Content-Length".to_owned(), body.len().to_string()));
        }
        self.head(status, &lines).await;
        if self.method() != "HEAD" {
            self.write(body).await;
        }
    }

    /// A whole answer of JSON.
    pub async fn json(&mut self, status: u16, value: &Value, headers: &[(String, String)]) {
        let mut lines = headers.to_vec();
        if header(&lines, "content-type").is_none() {
            lines.push(("Content-Type".to_owned(), "application/json".to_owned()));
        }
        self.reply(status, &lines, value.to_string().as_bytes())
            .await;
    }

    /// The specification's error body.
    pub async fn error(&mut self, status: u16, code: &str, headers: &[(String, String)]) {
        let body = json!({"errors": [{"code": code, "message": code.to_lowercase()}]});
        self.json(status, &body, headers).await;
    }

    /// The status line and headers, exactly these.
    pub async fn head<K: AsRef<str>, V: AsRef<str>>(&mut self, status: u16, headers: &[(K, V)]) {
        self.record.status.store(status, Ordering::SeqCst);
        let mut text = format!("HTTP/1.1 {status} {}\r\n", reason(status));
        for (name, value) in headers {
            text.extend([name.as_ref(), ": ", value.as_ref(), "\r\n"]);
        }
        text.push_str("\r\n");
        self.put(text.as_bytes()).await;
    }

    /// Body bytes as they are. Does nothing once the client has gone.
    pub async fn write(&mut self, data: &[u8]) {
        for part in data.chunks(WRITE) {
            self.put(part).await;
            if self.is_gone() {
                return;
            }
            self.record
                .sent
                .fetch_add(part.len() as u64, Ordering::SeqCst);
        }
    }

    /// Bytes that count neither as head nor as body: chunk sizes, interim answers, nonsense.
    pub async fn raw(&mut self, data: &[u8]) {
        self.put(data).await;
    }

    /// Ends the connection after what was written.
    pub async fn close(&mut self) {
        if let Some(mut connection) = self.connection.take() {
            connection.stream.shutdown().await.ok();
        }
    }

    /// Ends the connection with a reset, without what the peer has not taken yet.
    pub fn reset(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.stream.set_zero_linger().ok();
        }
    }

    /// Whether the client is known to have left, or the connection was closed.
    pub fn is_gone(&self) -> bool {
        self.connection.is_none() || self.record.gone.load(Ordering::SeqCst)
    }

    /// Waits until the client closes its connection.
    pub async fn gone(&self) {
        let Some(connection) = &self.connection else {
            return;
        };
        if let Ok(1..) = connection.stream.peek(&mut [0]).await {
            // The next request is already here: this client does not leave without its answers.
            std::future::pending::<()>().await;
        }
        self.record.gone.store(true, Ordering::SeqCst);
    }

    async fn put(&mut self, data: &[u8]) {
        if self.is_gone() {
            return;
        }
        let Some(connection) = &mut self.connection else {
            return;
        };
        if connection.stream.write_all(data).await.is_err() {
            self.record.gone.store(true, Ordering::SeqCst);
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let reusable = !self.is_gone()
            && self.record.status.load(Ordering::SeqCst) != 0
            && self
                .header("connection")
                .is_none_or(|value| !value.eq_ignore_ascii_case("close"));
        if let (true, Some(connection), Some(back)) =
            (reusable, self.connection.take(), self.back.take())
        {
            back.send(connection).ok();
        }
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        206 => "Partial Content",
        301 => "Moved Permanently",
        302 => "Found",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        416 => "Range Not Satisfiable",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Status",
    }
}
