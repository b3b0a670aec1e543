//! Plain HTTP/1.1 connections on which stored bytes go from file to socket inside the kernel.
//!
//! hyper keeps all framing. Towards hyper a span's bytes are a slice of one block of zeros; the connection's IO wrapper knows that block
//! by its address and, where hyper asks it to write a piece of the block, sends the next span by sendfile(2) instead. So no body byte is
//! ever in this process's memory, and a slow client costs no more than its sockets.
//!
//! The zeros would go out as content on any transport that copies or encrypts what hyper hands it. Therefore `PlainBody` and
//! `PlainIo` are made in `serve` alone, always as a pair, and hyper is told there to write vectored. For every other transport there
//! is `body::ReadBody`.
//!
//! ```compile_fail
//! use oci_remote_cache::http::sendfile::PlainBody;
//! ```

mod wire;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioTimer;
use tokio::net::TcpStream;

use super::body::{Body, BodyBroken, Part};
use super::observe::Access;
use crate::store::span::Span;
use wire::PlainIo;

/// Bytes of a span that hyper sees as one piece; the size of the block of zeros.
const FRAME: usize = 2 << 20;

/// Request line and headers: 32 KiB of headers, and room for the line.
const HEAD: usize = 34 << 10;

/// Header lines of a request.
const HEADERS: usize = 64;

/// What spans look like to hyper. The pages are never touched, so they take no memory.
static ZEROS: LazyLock<Box<[u8]>> = LazyLock::new(|| vec![0; FRAME].into_boxed_slice());

/// How long a connection waits for its client.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a request's head, from the moment the connection is idle.
    pub head: Duration,
    /// For the client to take at least one byte of the answer.
    pub write: Duration,
}

/// Serves one connection until it is closed; once `stopping` completes, until the answer under way is given.
///
/// Errors are the connection's: it is gone already.
pub(super) async fn serve<F, A>(
    stream: TcpStream,
    patience: Patience,
    stopping: impl Future<Output = ()>,
    answer: F,
) -> hyper::Result<()>
where
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Response<Body>>,
{
    let line = Arc::new(Line::default());
    let io = PlainIo::new(stream, patience.write, Arc::clone(&line));
    let service = service_fn(|request| {
        let line = Arc::clone(&line);
        let answer = answer(request);
        async move { Ok::<_, Infallible>(answer.await.map(|body| PlainBody::new(body, line))) }
    });
    let mut connection = pin!(http(patience).serve_connection(io, service));
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = stopping => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

/// hyper's side of a connection. `writev` is what keeps it from copying the zeros; pipelined flushing would copy them too.
pub(super) fn http(patience: Patience) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.writev(true)
        .pipeline_flush(false)
        .timer(TokioTimer::new())
        .header_read_timeout(patience.head)
        .max_headers(HEADERS)
        .max_header_size(HEAD)
        .max_buf_size(HEAD)
        .half_close(false);
    http
}

/// What the two halves of a connection share: the spans that hyper was given as zeros, in that order.
#[derive(Debug, Default)]
struct Line {
    state: Mutex<LineState>,
}

#[derive(Debug, Default)]
struct LineState {
    queue: VecDeque<Queued>,
    /// hyper has been given something that it has not written yet.
    unflushed: bool,
    /// Whom to wake when it has.
    cutting: Option<Waker>,
    /// The body broke, and only a reset can tell the client so: without a length, closing would look like its end.
    reset: bool,
}

/// A span on its way to the socket, and who is told how much of it went out.
#[derive(Debug)]
struct Queued {
    span: Span,
    access: Option<Arc<Access>>,
}

/// A body towards hyper.
#[derive(Debug)]
struct PlainBody {
    body: Body,
    line: Arc<Line>,
    broken: Option<BodyBroken>,
}

/// A piece of a body towards hyper.
enum Chunk {
    Memory(Bytes),
    /// So many bytes of the span that was queued with it.
    Span(usize),
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(15),
            write: Duration::from_mins(1),
        }
    }
}

impl Line {
    fn push(&self, queued: Queued) {
        self.state().queue.push_back(queued);
    }

    /// The span that `zeros` bytes of the block stand for.
    fn front(&self, zeros: usize) -> io::Result<Span> {
        let state = self.state();
        let front = state.queue.front();
        front
            .filter(|front| usize::try_from(front.span.len) == Ok(zeros))
            .map(|front| front.span.clone())
            .ok_or_else(|| io::Error::other("the connection lost track of its spans"))
    }

    /// The kernel took `bytes` of the front span.
    fn took(&self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let mut state = self.state();
        let Some(front) = state.queue.front_mut() else {
            return;
        };
        front.span.offset = front.span.offset.saturating_add(bytes);
        front.span.len = front.span.len.saturating_sub(bytes);
        if let Some(access) = &front.access {
            access.sent(bytes);
        }
        let done = match front.span.len {
            0 => state.queue.pop_front(),
            _ => None,
        };
        drop(state);
        // The request's log line may be written here: not under the lock.
        drop(done);
    }

    /// hyper has written all it was given.
    fn flushed(&self) {
        let mut state = self.state();
        state.unflushed = false;
        if let Some(cutting) = state.cutting.take() {
            cutting.wake();
        }
    }

    /// The front span's file cannot be read as promised.
    fn broke(&self, error: &io::Error) {
        let state = self.state();
        let access = state.queue.front().and_then(|front| front.access.as_ref());
        if let Some(access) = access {
            access.broke(&error.to_string());
        }
    }

    fn state(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl http_body::Body for PlainBody {
    type Data = Chunk;
    type Error = BodyBroken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Chunk>, BodyBroken>>> {
        if let Some(broken) = self.broken.take() {
            return self.poll_cut(cx, broken);
        }
        match ready!(self.body.poll_part(cx, FRAME as u64)) {
            Some(Ok(part)) => Poll::Ready(Some(Ok(Frame::data(self.chunk(part))))),
            Some(Err(broken)) => self.poll_cut(cx, broken),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.broken.is_none() && self.body.is_finished()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.hint()
    }
}

impl PlainBody {
    fn new(body: Body, line: Arc<Line>) -> Self {
        line.state().unflushed = true;
        Self {
            body,
            line,
            broken: None,
        }
    }

    /// Fails, but not before what came so far is written: the client may go on from there, and hyper drops what it holds.
    fn poll_cut<T>(
        &mut self,
        cx: &Context<'_>,
        broken: BodyBroken,
    ) -> Poll<Option<Result<T, BodyBroken>>> {
        let mut state = self.line.state();
        if state.unflushed {
            state.cutting = Some(cx.waker().clone());
            self.broken = Some(broken);
            return Poll::Pending;
        }
        state.reset = self.body.length().is_none();
        Poll::Ready(Some(Err(broken)))
    }

    fn chunk(&self, part: Part) -> Chunk {
        self.line.state().unflushed = true;
        match part {
            Part::Memory(bytes) => {
                if let Some(access) = self.body.access() {
                    access.sent(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                }
                Chunk::Memory(bytes)
            }
            Part::Span(span) => {
                // Bodies cut their spans to frames, so the length fits.
                let zeros = usize::try_from(span.len).unwrap_or(FRAME);
                let access = self.body.access().map(Arc::clone);
                self.line.push(Queued { span, access });
                Chunk::Span(zeros)
            }
        }
    }
}

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        match self {
            Self::Memory(bytes) => bytes.len(),
            Self::Span(zeros) => *zeros,
        }
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Memory(bytes) => bytes,
            Self::Span(zeros) => ZEROS.get(..*zeros).unwrap_or_default(),
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Memory(bytes) => bytes.advance(count),
            Self::Span(zeros) => *zeros = zeros.saturating_sub(count),
        }
    }
}

fn is_zeros(piece: &[u8]) -> bool {
    ZEROS.as_ptr_range().contains(&piece.as_ptr())
}

#[cfg(test)]
mod tests;
