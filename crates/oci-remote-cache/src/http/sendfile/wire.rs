//! The socket towards hyper: writes bytes from memory as they are, and the connection's next span where hyper writes zeros.

use std::future::Future as _;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SendAncillaryBuffer, SendFlags};
use tokio::io::{AsyncRead as _, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tracing::warn;

use super::{Line, is_zeros};
use crate::store::span::Span;

/// Bytes handed to one sendfile call: a cold file blocks the thread for so long only.
const CALL: usize = 1 << 20;

/// Bytes that go through memory at once where there is no sendfile(2).
const COPIED: usize = 64 << 10;

/// Bytes a connection may send before it lets others have the thread.
const TURN: usize = 4 << 20;

/// How long, and for how many bytes, a closed connection still listens, so that the client reads our last answer before a reset
/// (it may be in the middle of sending a body that we refused).
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1 << 20;

/// The socket towards hyper.
pub(super) struct PlainIo {
    stream: TokioIo<TcpStream>,
    line: Arc<Line>,
    stall: Stall,
    /// Bytes sent since the thread was last given up.
    turn: usize,
    linger: Option<Linger>,
}

/// Whether the client takes anything.
struct Stall {
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    waiting: bool,
}

/// The last moments of a connection.
struct Linger {
    until: Pin<Box<Sleep>>,
    budget: usize,
}

/// The pieces of one write that go out by one system call.
enum Run<'a> {
    Memory(&'a [IoSlice<'a>]),
    Zeros(usize),
}

impl PlainIo {
    pub(super) fn new(stream: TcpStream, limit: Duration, line: Arc<Line>) -> Self {
        let stall = Stall {
            limit,
            timer: None,
            waiting: false,
        };
        Self {
            stream: TokioIo::new(stream),
            line,
            stall,
            turn: 0,
            linger: None,
        }
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.turn >= TURN {
            self.turn = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            let stream = self.stream.inner();
            match stream.poll_write_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => return self.poll_blocked(cx, pieces),
            }
            match stream.try_io(Interest::WRITABLE, || send(stream, &self.line, pieces)) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Poll::Ready(self.sent(sent)),
            }
        }
    }

    /// The socket's buffer is full: waits, but not for ever.
    fn poll_blocked(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.turn = 0;
        ready!(self.stall.poll_over(cx));
        // The kernel calls a socket writable when a third of its buffer is free. A slow client may not have got there, but has it taken
        // anything, then there is room.
        match send(self.stream.inner(), &self.line, pieces) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            sent => Poll::Ready(self.sent(sent)),
        }
    }

    fn sent(&mut self, sent: io::Result<usize>) -> io::Result<usize> {
        self.stall.waiting = false;
        self.turn = self.turn.saturating_add(*sent.as_ref().unwrap_or(&0));
        sent
    }
}

impl Read for PlainIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl Write for PlainIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper asks for it when it has nothing more to write.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.line.flushed();
        Poll::Ready(Ok(()))
    }

    /// Ends our side, then listens a little longer: closing with bytes unread resets the connection, and a reset takes an answer away
    /// that the client has not read yet.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        let linger = this.linger.get_or_insert_with(Linger::new);
        linger.poll_end(cx, this.stream.inner_mut()).map(Ok)
    }
}

impl Drop for PlainIo {
    fn drop(&mut self) {
        if self.line.state().reset {
            // Where this fails the connection is gone already.
            self.stream.inner().set_zero_linger().ok();
        }
    }
}

impl Stall {
    /// Completes when the client has taken nothing for the limit.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let limit = self.limit;
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        if !self.waiting {
            self.waiting = true;
            timer.as_mut().reset(Instant::now() + limit);
        }
        timer.as_mut().poll(cx)
    }
}

impl Linger {
    fn new() -> Self {
        Self {
            until: Box::pin(tokio::time::sleep(LINGER)),
            budget: LINGER_BYTES,
        }
    }

    /// Completes when the client has closed its side, or had its chance.
    fn poll_end(&mut self, cx: &mut Context<'_>, stream: &mut TcpStream) -> Poll<()> {
        let mut discarded = [0; 4096];
        loop {
            if self.until.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            let mut buffer = ReadBuf::new(&mut discarded);
            let read = ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer));
            let bytes = buffer.filled().len();
            self.budget = self.budget.saturating_sub(bytes);
            if read.is_err() || bytes == 0 || self.budget == 0 {
                return Poll::Ready(());
            }
        }
    }
}

impl<'a> Run<'a> {
    /// The first run of `pieces`, and what comes after it.
    fn first(pieces: &'a [IoSlice<'a>]) -> Option<(Self, &'a [IoSlice<'a>])> {
        let (first, others) = pieces.split_first()?;
        if is_zeros(first) {
            return Some((Self::Zeros(first.len()), others));
        }
        let count = pieces.iter().take_while(|piece| !is_zeros(piece)).count();
        let (run, others) = pieces.split_at(count);
        Some((Self::Memory(run), others))
    }

    fn len(&self) -> usize {
        match self {
            Self::Memory(pieces) => pieces.iter().map(|piece| piece.len()).sum(),
            Self::Zeros(zeros) => *zeros,
        }
    }
}

/// Sends what the socket takes without waiting.
fn send(stream: &TcpStream, line: &Line, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    let mut total = 0_usize;
    let mut rest = pieces;
    while let Some((run, others)) = Run::first(rest) {
        let sent = match run {
            Run::Memory(pieces) => send_memory(stream, pieces, others),
            Run::Zeros(zeros) => send_span(stream, line, zeros),
        };
        match sent {
            Ok(bytes) if bytes == run.len() => total = total.saturating_add(bytes),
            Ok(bytes) => return Ok(total.saturating_add(bytes)),
            Err(e) if total == 0 => return Err(e),
            // What was sent has to be told first; the error comes again.
            Err(_later) => return Ok(total),
        }
        rest = others;
    }
    Ok(total)
}

/// Sends bytes from memory; those of the packet's rest wait for what comes next, so that head and body share packets.
fn send_memory(
    stream: &TcpStream,
    pieces: &[IoSlice<'_>],
    next: &[IoSlice<'_>],
) -> io::Result<usize> {
    let mut flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    flags.set(SendFlags::MORE, !next.is_empty());
    let sent = retry_on_intr(|| {
        rustix::net::sendmsg(stream, pieces, &mut SendAncillaryBuffer::default(), flags)
    })?;
    Ok(sent)
}

/// Who failed when a span was to be sent.
enum Fault {
    File(io::Error),
    Socket(io::Error),
}

/// Sends bytes of the front span in place of `zeros` bytes of the block.
fn send_span(stream: &TcpStream, line: &Line, zeros: usize) -> io::Result<usize> {
    let span = line.front(zeros)?;
    let mut offset = span.offset;
    let sent = retry_on_intr(|| {
        rustix::fs::sendfile(stream, &*span.file, Some(&mut offset), zeros.min(CALL))
    });
    let sent = match sent {
        Ok(0) => Err(Fault::File(short_file(&span))),
        Ok(bytes) => Ok(bytes),
        Err(Errno::AGAIN) => Err(Fault::Socket(Errno::AGAIN.into())),
        // Whose fault it was is not said. Some filesystems and sandboxes have no sendfile(2) at all.
        Err(_) => send_copied(stream, &span, zeros),
    };
    match sent {
        Ok(bytes) => {
            line.took(bytes);
            Ok(bytes)
        }
        Err(Fault::File(error)) => {
            warn!(error = %error, "cannot read a stored file: the answer is cut");
            line.broke(&error);
            Err(error)
        }
        Err(Fault::Socket(error)) => Err(error),
    }
}

/// The same through this process's memory.
fn send_copied(stream: &TcpStream, span: &Span, most: usize) -> Result<usize, Fault> {
    let mut block = vec![0; most.min(COPIED)];
    let read = span.file.read_at(&mut block, span.offset);
    let read = read.map_err(Fault::File)?;
    let Some(bytes) = block.get(..read).filter(|bytes| !bytes.is_empty()) else {
        return Err(Fault::File(short_file(span)));
    };
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    retry_on_intr(|| rustix::net::send(stream, bytes, flags))
        .map_err(|error| Fault::Socket(error.into()))
}

/// The file ends before the span does: someone shortened a file that is never changed.
fn short_file(span: &Span) -> io::Error {
    let (offset, len) = (span.offset, span.len);
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        format!("a stored file ends before its bytes {offset}+{len}"),
    )
}
