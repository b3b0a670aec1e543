//! One answer's body: nothing, bytes in memory, or spans of files and bytes as they come.
//!
//! A body says what is to be sent and holds it to the length that was announced. How a span reaches the socket is not decided here:
//! `sendfile` does it for plain HTTP/1.1, [`ReadBody`] for every transport that must see the bytes (TLS, HTTP/2).

use std::collections::VecDeque;
use std::fmt;
use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::Stream;
use http_body::{Frame, SizeHint};
use tokio::task::JoinHandle;

use super::observe::Access;
use crate::store::span::Span;
use crate::tasks::Tasks;

/// Bytes that [`ReadBody`] reads from a file at once.
const BLOCK: u64 = 256 << 10;

/// What the floors below hand up: a piece of a file, or bytes that are in memory already.
#[derive(Clone, Debug)]
pub enum Part {
    /// A piece of a file; its bytes stay there until the connection wants them.
    Span(Span),
    /// Bytes in memory.
    Memory(Bytes),
}

/// The body cannot be completed: the connection ends short of what was announced, never cleanly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer was cut: {0}")]
pub struct BodyBroken(String);

/// One answer's body.
pub struct Body {
    /// Length as announced.
    length: Option<u64>,
    /// What of it is still to be handed out.
    left: Option<u64>,
    source: Source,
    /// The rest of a span of which only a frame's worth was handed out.
    rest: Option<Span>,
    access: Option<Arc<Access>>,
    alarm: Option<Alarm>,
}

/// What is to be done when a body cannot be completed. Must not block.
pub struct Alarm(Box<dyn Fn() + Send + Sync>);

enum Source {
    Empty,
    Memory(Bytes),
    Spans(VecDeque<Span>),
    Stream(Pin<Box<dyn Stream<Item = Result<Part, BodyBroken>> + Send>>),
}

/// A [`Body`] whose spans are read into memory, off the async threads, in large blocks.
#[derive(Debug)]
pub struct ReadBody {
    body: Body,
    tasks: Tasks,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
}

impl Alarm {
    /// Does this.
    pub fn new(ring: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Box::new(ring))
    }

    pub(super) fn ring(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Alarm")
    }
}

impl BodyBroken {
    /// Says why no more bytes will come.
    pub fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

impl Body {
    /// No bytes.
    pub fn empty() -> Self {
        Self::from_source(Some(0), Source::Empty)
    }

    /// These bytes.
    pub fn memory(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        if bytes.is_empty() {
            return Self::empty();
        }
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Self::from_source(Some(length), Source::Memory(bytes))
    }

    /// These pieces of files, one after the other.
    pub fn spans(spans: impl IntoIterator<Item = Span>) -> Self {
        let spans: VecDeque<Span> = spans.into_iter().collect();
        let length = spans
            .iter()
            .fold(0_u64, |sum, span| sum.saturating_add(span.len));
        Self::from_source(Some(length), Source::Spans(spans))
    }

    /// Parts as they come. Where `length` is given, more or fewer bytes break the body.
    pub fn stream(
        length: Option<u64>,
        parts: impl Stream<Item = Result<Part, BodyBroken>> + Send + 'static,
    ) -> Self {
        Self::from_source(length, Source::Stream(Box::pin(parts)))
    }

    /// The whole length, where it is known.
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    fn from_source(length: Option<u64>, source: Source) -> Self {
        Self {
            length,
            left: length,
            source,
            rest: None,
            access: None,
            alarm: None,
        }
    }

    /// Rings when the body cannot be completed.
    #[must_use]
    pub fn guarded(mut self, alarm: Alarm) -> Self {
        self.alarm = Some(alarm);
        self
    }

    /// Reports what is sent of this body to `access`.
    pub(super) fn watched(mut self, access: Arc<Access>) -> Self {
        if let Some(alarm) = self.alarm.take() {
            access.guarded(alarm);
        }
        self.access = Some(access);
        self
    }

    /// Who is told what was sent.
    pub(super) fn access(&self) -> Option<&Arc<Access>> {
        self.access.as_ref()
    }

    /// Whether all that was announced has been handed out.
    pub(super) fn is_finished(&self) -> bool {
        let nothing_left = match self.left {
            Some(left) => left == 0,
            None => matches!(self.source, Source::Empty),
        };
        self.rest.is_none() && nothing_left
    }

    /// What is left, for `Body::size_hint`.
    pub(super) fn hint(&self) -> SizeHint {
        self.left
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    /// The next part, a span of at most `most` bytes. After an error nothing more comes.
    pub(super) fn poll_part(
        &mut self,
        cx: &mut Context<'_>,
        most: u64,
    ) -> Poll<Option<Result<Part, BodyBroken>>> {
        if let Some(span) = self.rest.take() {
            return Poll::Ready(Some(Ok(Part::Span(self.cut(span, most)))));
        }
        let part = loop {
            match ready!(self.source.poll_next(cx)) {
                Some(Ok(part)) if part.is_empty() => {}
                Some(Ok(part)) => break part,
                Some(Err(broken)) => return Poll::Ready(Some(Err(self.broke(broken)))),
                None => return Poll::Ready(self.ended().map(Err)),
            }
        };
        if let Err(broken) = self.take_from_left(part.len()) {
            return Poll::Ready(Some(Err(self.broke(broken))));
        }
        Poll::Ready(Some(Ok(match part {
            Part::Span(span) => Part::Span(self.cut(span, most)),
            Part::Memory(bytes) => Part::Memory(bytes),
        })))
    }

    fn take_from_left(&mut self, len: u64) -> Result<(), BodyBroken> {
        let Some(left) = self.left else {
            return Ok(());
        };
        let after = left
            .checked_sub(len)
            .ok_or_else(|| BodyBroken::new("more bytes came than were announced"))?;
        self.left = Some(after);
        Ok(())
    }

    fn cut(&mut self, span: Span, most: u64) -> Span {
        if span.len <= most {
            return span;
        }
        let front = Span {
            len: most,
            ..span.clone()
        };
        self.rest = Some(Span {
            offset: span.offset.saturating_add(most),
            len: span.len.saturating_sub(most),
            ..span
        });
        front
    }

    fn ended(&mut self) -> Option<BodyBroken> {
        self.source = Source::Empty;
        let missing = self.left.unwrap_or(0);
        if missing > 0 {
            let why = format!("it ended {missing} bytes short");
            return Some(self.broke(BodyBroken::new(why)));
        }
        if let Some(access) = &self.access {
            access.ended();
        }
        None
    }

    fn broke(&mut self, broken: BodyBroken) -> BodyBroken {
        self.source = Source::Empty;
        self.rest = None;
        if let Some(access) = &self.access {
            access.broke(&broken.0);
        }
        broken
    }
}

impl ReadBody {
    /// Reads the spans of `body` on the blocking pool of `tasks`.
    pub fn new(body: Body, tasks: Tasks) -> Self {
        Self {
            body,
            tasks,
            reading: None,
        }
    }

    fn sent(&self, bytes: Bytes) -> Frame<Bytes> {
        if let Some(access) = self.body.access() {
            access.sent(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        }
        Frame::data(bytes)
    }
}

impl http_body::Body for ReadBody {
    type Data = Bytes;
    type Error = BodyBroken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyBroken>>> {
        loop {
            if let Some(reading) = &mut self.reading {
                let read = ready!(Pin::new(reading).poll(cx));
                self.reading = None;
                let bytes = read
                    .map_err(io::Error::other)
                    .and_then(|bytes| bytes)
                    .map_err(|e| self.body.broke(BodyBroken::new(e.to_string())));
                return Poll::Ready(Some(bytes.map(|bytes| self.sent(bytes))));
            }
            match ready!(self.body.poll_part(cx, BLOCK)) {
                None => return Poll::Ready(None),
                Some(Err(broken)) => return Poll::Ready(Some(Err(broken))),
                Some(Ok(Part::Memory(bytes))) => {
                    return Poll::Ready(Some(Ok(self.sent(bytes))));
                }
                Some(Ok(Part::Span(span))) => {
                    self.reading = Some(self.tasks.spawn_blocking(move || span.read()));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.reading.is_none() && self.body.is_finished()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.hint()
    }
}

impl Part {
    /// How many bytes this is.
    pub fn len(&self) -> u64 {
        match self {
            Self::Span(span) => span.len,
            Self::Memory(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Source {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Part, BodyBroken>>> {
        match self {
            Self::Empty => Poll::Ready(None),
            Self::Memory(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Self::Empty;
                Poll::Ready(Some(Ok(Part::Memory(bytes))))
            }
            Self::Spans(spans) => Poll::Ready(spans.pop_front().map(|span| Ok(Part::Span(span)))),
            Self::Stream(parts) => parts.as_mut().poll_next(cx),
        }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body")
            .field("length", &self.length)
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

impl From<Part> for Body {
    fn from(part: Part) -> Self {
        match part {
            Part::Span(span) => Self::spans([span]),
            Part::Memory(bytes) => Self::memory(bytes),
        }
    }
}
