//! Scripts: which request is answered (`Matcher`), by what (`Handler`), and when it may go on (`Gate`); with
//! ready-made handlers for what real registries and networks do wrong.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};

use crate::exchange::Exchange;
use crate::image::Content;
use crate::log::{Entry, Headers};
use crate::script::{Gate, Handler};

/// How a blob is served by [`serve`].
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Whether a `Range` header is honoured (single ranges).
    pub ranges: bool,
    /// Other bytes than the content's, under its digest.
    pub data: Option<Bytes>,
    /// Where in the blob the connection ends, whatever length was promised.
    pub stop_at: Option<u64>,
    /// How it ends there.
    pub ending: Ending,
    /// Where in the blob the answer waits; those outside of what is sent are left out.
    pub pauses: Vec<(u64, Gate)>,
    /// Bytes a second on each connection.
    pub rate: Option<u64>,
    /// Further header lines.
    pub headers: Headers,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// In good order, as by a process that exits.
    Close,
    /// By a reset.
    Reset,
    /// Not at all: what was promised never comes.
    Stall,
}

enum Span {
    Whole,
    Part(usize, usize),
    Unsatisfiable,
}

/// Writes one body in order, waiting at gates and keeping to a rate.
struct Pacer<'a> {
    exchange: &'a mut Exchange,
    data: &'a [u8],
    position: usize,
    rate: Option<u64>,
    begin: Instant,
    written: u64,
}

impl Default for ServeOptions {
    fn default() -> Self {
        ServeOptions {
            ranges: true,
            data: None,
            stop_at: None,
            ending: Ending::Close,
            pauses: Vec::new(),
            rate: None,
            headers: Vec::new(),
        }
    }
}

impl ServeOptions {
    /// As a conformant registry does it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers every range with 200 and all bytes.
    #[must_use]
    pub fn without_ranges(mut self) -> Self {
        self.ranges = false;
        self
    }

    /// Sends these bytes in place of the content's.
    #[must_use]
    pub fn data(mut self, data: impl Into<Bytes>) -> Self {
        self.data = Some(data.into());
        self
    }

    /// Closes the connection at this offset of the blob.
    #[must_use]
    pub fn stop_at(mut self, offset: u64) -> Self {
        (self.stop_at, self.ending) = (Some(offset), Ending::Close);
        self
    }

    /// Resets the connection at this offset of the blob.
    #[must_use]
    pub fn reset_at(mut self, offset: u64) -> Self {
        (self.stop_at, self.ending) = (Some(offset), Ending::Reset);
        self
    }

    /// Goes silent at this offset of the blob, until the client leaves.
    #[must_use]
    pub fn stall_at(mut self, offset: u64) -> Self {
        (self.stop_at, self.ending) = (Some(offset), Ending::Stall);
        self
    }

    /// Waits at this offset of the blob until the gate is open.
    #[must_use]
    pub fn pause(mut self, offset: u64, gate: &Gate) -> Self {
        self.pauses.push((offset, gate.clone()));
        self.pauses.sort_by_key(|(at, _)| *at);
        self
    }

    /// Sends at most so many bytes a second on each connection.
    #[must_use]
    pub fn rate(mut self, bytes_per_second: u64) -> Self {
        self.rate = Some(bytes_per_second);
        self
    }

    /// Adds a header line, in place of the usual one of that name.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

impl Pacer<'_> {
    async fn write_until(&mut self, end: usize) {
        while self.position < end && !self.exchange.is_gone() {
            let step = self.rate.map_or(end, |rate| {
                usize::try_from(rate / 20)
                    .unwrap_or(end)
                    .clamp(1, 64 * 1024)
            });
            let part = &self.data[self.position..end.min(self.position.saturating_add(step))];
            self.written += part.len() as u64;
            self.keep_to_the_rate().await;
            self.exchange.write(part).await;
            self.position += part.len();
        }
    }

    /// No byte is sent before the rate allows it.
    async fn keep_to_the_rate(&self) {
        let Some(rate) = self.rate else { return };
        let due = self.begin
            + Duration::from_nanos(self.written.saturating_mul(1_000_000_000) / rate.max(1));
        tokio::select! {
            () = sleep_until(due) => {}
            () = self.exchange.gone() => {}
        }
    }

    async fn wait_at(&mut self, gate: &Gate) {
        tokio::select! {
            () = gate.opened() => {}
            () = self.exchange.gone() => {}
        }
    }
}

/// A whole answer with this status. A `Content-Type` is the caller's.
pub fn status(code: u16, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Handler {
    let (headers, body) = (owned(headers), body.into());
    Handler::new(move |mut exchange| {
        let (headers, body) = (headers.clone(), body.clone());
        async move { exchange.reply(code, &headers, &body).await }
    })
}

/// The specification's error body under this status.
pub fn error(code: u16, oci_code: &str, headers: &[(&str, &str)]) -> Handler {
    let (oci_code, headers) = (oci_code.to_owned(), owned(headers));
    Handler::new(move |mut exchange| {
        let (oci_code, headers) = (oci_code.clone(), headers.clone());
        async move { exchange.error(code, &oci_code, &headers).await }
    })
}

/// A redirect to one place.
pub fn redirect(location: &str, code: u16) -> Handler {
    status(code, &[("Location", location)], Bytes::new())
}

/// A redirect to where the request decides.
pub fn redirect_by(
    code: u16,
    location: impl Fn(&Entry) -> String + Send + Sync + 'static,
) -> Handler {
    Handler::new(move |mut exchange| {
        let location = location(exchange.entry());
        async move { exchange.reply(code, &[("Location", location)], b"").await }
    })
}

/// One handler for each request in turn, the last one for ever.
pub fn sequence(handlers: Vec<Handler>) -> Handler {
    let next = AtomicUsize::new(0);
    Handler::new(move |exchange| {
        let index = next
            .fetch_add(1, Ordering::SeqCst)
            .min(handlers.len().saturating_sub(1));
        handlers[index].call(exchange)
    })
}

/// The usual answer, for a sequence.
pub fn usual() -> Handler {
    Handler::new(Exchange::pass)
}

/// The usual answer, once the gate is open.
pub fn held(gate: &Gate) -> Handler {
    let gate = gate.clone();
    Handler::new(move |exchange| {
        let gate = gate.clone();
        async move {
            tokio::select! {
                () = gate.opened() => {}
                () = exchange.gone() => {}
            }
            exchange.pass().await;
        }
    })
}

/// Everything, in chunks and without a length.
pub fn chunked(content: &Content) -> Handler {
    chunked_until(content, content.data.len(), Ending::Close)
}

/// The same as far as this offset, then this ending in place of the last chunk; at the blob's end the last chunk comes.
pub fn chunked_until(content: &Content, offset: usize, ending: Ending) -> Handler {
    let whole = offset == content.data.len();
    let data = content.data.slice(..offset);
    Handler::new(move |mut exchange| {
        let data = data.clone();
        Box::pin(async move {
            let head = [("Transfer-Encoding", "chunked")];
            exchange.head(200, &head).await;
            for part in data.chunks(1 << 16) {
                let size = format!("{:x}\r\n", part.len());
                exchange.raw(size.as_bytes()).await;
                exchange.raw(part).await;
                exchange.raw(b"\r\n").await;
            }
            if whole {
                exchange.raw(b"0\r\n\r\n").await;
            } else {
                end(&mut exchange, ending).await;
            }
        })
    })
}

/// The content as a blob.
pub fn serve(content: &Content, options: ServeOptions) -> Handler {
    let content = content.clone();
    Handler::new(move |exchange| {
        let (content, options) = (content.clone(), options.clone());
        async move {
            send_blob(
                exchange,
                &content.digest.to_string(),
                &content.data,
                &options,
            )
            .await;
        }
    })
}

/// Exactly these headers, then these bytes, then the end: for bodies and lengths that do not agree.
pub fn declared(headers: &[(&str, &str)], data: impl Into<Bytes>, ending: Ending) -> Handler {
    let (headers, data) = (owned(headers), data.into());
    Handler::new(move |mut exchange| {
        let (headers, data) = (headers.clone(), data.clone());
        async move {
            exchange.head(200, &headers).await;
            if exchange.method() != "HEAD" {
                exchange.write(&data).await;
            }
            end(&mut exchange, ending).await;
        }
    })
}

/// A body without end under these headers, at most `limit` bytes: for what claims little and sends much.
pub fn flood(headers: &[(&str, &str)], limit: u64) -> Handler {
    let headers = owned(headers);
    Handler::new(move |mut exchange| {
        let headers = headers.clone();
        async move {
            exchange.head(200, &headers).await;
            let part = vec![b' '; 64 * 1024];
            let mut left = limit;
            while left > 0 && !exchange.is_gone() {
                exchange.write(&part).await;
                left = left.saturating_sub(part.len() as u64);
            }
            exchange.close().await;
        }
    })
}

/// The connection is reset without an answer.
pub fn drop_connection() -> Handler {
    Handler::new(|mut exchange| async move { exchange.reset() })
}

/// The request is taken and never answered; ends when the client leaves.
pub fn silent() -> Handler {
    Handler::new(|exchange| async move { exchange.gone().await })
}

/// Serves bytes as the blob of that digest.
pub(crate) async fn send_blob(
    mut exchange: Exchange,
    digest: &str,
    data: &Bytes,
    options: &ServeOptions,
) {
    let data = options.data.as_ref().unwrap_or(data);
    let span = if options.ranges {
        span(exchange.header("range"), data.len())
    } else {
        Span::Whole
    };
    let (code, start, stop) = match span {
        Span::Whole => (200, 0, data.len()),
        Span::Part(start, stop) => (206, start, stop),
        Span::Unsatisfiable => {
            let total = format!("bytes */{}", data.len());
            return exchange.reply(416, &[("Content-Range", total)], b"").await;
        }
    };
    let mut headers = vec![
        (
            "Content-Type".to_owned(),
            "application/octet-stream".to_owned(),
        ),
        ("Docker-Content-Digest".to_owned(), digest.to_owned()),
        ("ETag".to_owned(), format!("\"{digest}\"")),
        ("Content-Length".to_owned(), (stop - start).to_string()),
    ];
    if code == 206 {
        let range = format!("bytes {start}-{}/{}", stop - 1, data.len());
        headers.push(("Content-Range".to_owned(), range));
    }
    let given = |name: &str| {
        options
            .headers
            .iter()
            .any(|(own, _)| own.eq_ignore_ascii_case(name))
    };
    headers.retain(|(name, _)| !given(name));
    headers.extend(options.headers.iter().cloned());
    exchange.head(code, &headers).await;
    if exchange.method() != "HEAD" {
        send_span(&mut exchange, data, (start, stop), options).await;
    }
}

async fn send_span(
    exchange: &mut Exchange,
    data: &[u8],
    (start, stop): (usize, usize),
    options: &ServeOptions,
) {
    let limit = options.stop_at.map_or(usize::MAX, offset);
    let last = stop.min(limit);
    let mut pacer = Pacer {
        exchange,
        data,
        position: start,
        rate: options.rate,
        begin: Instant::now(),
        written: 0,
    };
    for (at, gate) in &options.pauses {
        let at = offset(*at);
        if start <= at && at < last {
            pacer.write_until(at).await;
            pacer.wait_at(gate).await;
        }
    }
    pacer.write_until(last).await;
    if last < stop {
        end(exchange, options.ending).await;
    }
}

async fn end(exchange: &mut Exchange, ending: Ending) {
    match ending {
        Ending::Close => exchange.close().await,
        Ending::Reset => exchange.reset(),
        Ending::Stall => exchange.gone().await,
    }
}

fn offset(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Single byte ranges; everything else is ignored, as RFC 9110 allows.
fn span(header: Option<&str>, size: usize) -> Span {
    let Some((first, last)) =
        header.and_then(|value| value.strip_prefix("bytes=")?.split_once('-'))
    else {
        return Span::Whole;
    };
    let (start, stop) = match (first.parse::<usize>(), last.parse::<usize>()) {
        (Ok(first), Ok(last)) => (first, last.saturating_add(1).min(size)),
        (Ok(first), Err(_)) if last.is_empty() => (first, size),
        (Err(_), Ok(length)) if first.is_empty() => (size.saturating_sub(length), size),
        _ => return Span::Whole,
    };
    if start < stop {
        Span::Part(start, stop)
    } else {
        Span::Unsatisfiable
    }
}

fn owned(headers: &[(&str, &str)]) -> Headers {
    headers
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Request;
    use crate::log::Kind;
    use crate::registry::Registry;
    use crate::script::Matcher;

    async fn one_blob(size: usize) -> (Registry, Content, String) {
        let registry = Registry::start().await;
        let blob = Content::blob(size, "faults");
        registry.put_blob("r", &blob);
        let path = format!("/v2/r/blobs/{}", blob.digest);
        (registry, blob, path)
    }

    #[tokio::test]
    async fn a_gate_holds_the_body_and_lets_it_go() {
        let (registry, blob, path) = one_blob(1 << 20).await;
        let gate = Gate::new();
        registry.script(
            Kind::Blob,
            serve(&blob, ServeOptions::new().pause(1000, &gate)),
        );
        let mut incoming = Request::get(&path)
            .compare(&blob.data)
            .open(registry.port())
            .await
            .expect("a head");
        assert!(incoming.read(1000).await);
        gate.reached().await;
        assert_eq!(registry.sent(Kind::Blob), 1000);
        gate.open();
        assert!(incoming.finish().await.is_right());
    }

    #[tokio::test]
    async fn a_client_that_leaves_frees_the_gate() {
        let (registry, blob, path) = one_blob(5000).await;
        let gate = Gate::new();
        registry.script(
            Kind::Blob,
            serve(&blob, ServeOptions::new().pause(10, &gate)),
        );
        let mut incoming = Request::get(&path)
            .open(registry.port())
            .await
            .expect("a head");
        assert!(incoming.read(10).await);
        gate.reached().await;
        incoming.abort();
        while gate.waiting() > 0 || registry.open_connections() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn faults_take_their_turn() {
        let (registry, blob, path) = one_blob(200_000).await;
        let cut = serve(&blob, ServeOptions::new().stop_at(100_000));
        let reset = serve(&blob, ServeOptions::new().reset_at(100_000));
        let broken = vec![
            error(503, "UNAVAILABLE", &[("Retry-After", "1")]),
            drop_connection(),
            cut,
            reset,
            usual(),
        ];
        registry.script(
            Matcher::blobs().method("GET").of(blob.digest),
            sequence(broken),
        );
        let ask = || {
            Request::get(&path)
                .compare(&blob.data)
                .send(registry.port())
        };

        let first = ask().await;
        assert_eq!(
            (first.status, first.header("retry-after")),
            (503, Some("1"))
        );
        let second = ask().await;
        assert!(
            second.status == 0 && second.error.contains("reset"),
            "{second}"
        );
        let third = ask().await;
        assert_eq!(
            (third.status, third.length, third.complete, third.right),
            (200, 100_000, false, Some(true))
        );
        assert_eq!(third.error, "closed early");
        assert!(ask().await.is_refused());
        assert!(ask().await.is_right());
        assert_eq!(registry.count((Kind::Blob, "GET", blob.digest)), 5);
    }

    #[tokio::test]
    async fn a_script_is_used_up() {
        let (registry, _, path) = one_blob(5).await;
        registry.script(
            Matcher::blobs().once(),
            redirect("http://127.0.0.1:1/elsewhere", 307),
        );
        let moved = Request::get(&path).send(registry.port()).await;
        assert_eq!(
            (moved.status, moved.header("location")),
            (307, Some("http://127.0.0.1:1/elsewhere"))
        );
        assert_eq!(Request::get(&path).send(registry.port()).await.status, 200);
    }

    #[tokio::test]
    async fn a_rate_is_kept() {
        let (registry, blob, path) = one_blob(20_000).await;
        registry.script(Kind::Blob, serve(&blob, ServeOptions::new().rate(100_000)));
        let response = Request::get(&path)
            .compare(&blob.data)
            .send(registry.port())
            .await;
        assert!(
            response.is_right() && response.done_after >= Duration::from_millis(190),
            "{response:?}"
        );
    }

    #[tokio::test]
    async fn lengths_may_lie() {
        let (registry, blob, path) = one_blob(50).await;
        registry.script(
            Matcher::blobs().once(),
            declared(
                &[("Content-Length", "60")],
                blob.data.clone(),
                Ending::Close,
            ),
        );
        let short = Request::get(&path).send(registry.port()).await;
        assert_eq!((short.length, short.complete), (50, false));
        registry.script(Kind::Blob, declared(&[], blob.data.clone(), Ending::Close));
        let endless = Request::get(&path).send(registry.port()).await;
        assert!(endless.is_whole() && endless.body == blob.data);
    }
}
