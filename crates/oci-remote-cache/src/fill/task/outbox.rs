//! Bytes on their way from a connection to the spool: what comes while one batch is written waits here and is written with the next.
//!
//! The writer runs on the blocking pool for as long as there is something to write, so that a fast upstream costs few hand-overs, and a
//! slow one holds no thread.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use super::fetch::{Range, Shared};
use crate::store::spool::SpoolWriter;
use crate::tasks::Tasks;

/// Bytes that may wait or be in the writer's hands before the connection is left unread: 1 MiB.
pub(super) const MOST: usize = 1 << 20;

/// What one connection has brought and the disk has not taken yet.
pub(super) struct Outbox {
    state: Mutex<State>,
    /// Rung when the writer has taken a batch to its end.
    progress: Notify,
    range: Arc<Range>,
    shared: Arc<Shared>,
}

struct State {
    waiting: Vec<Bytes>,
    /// Waiting or being written.
    bytes: usize,
    writer: Writer,
}

/// Where the writer is.
#[derive(Debug)]
enum Writer {
    Idle(SpoolWriter),
    Away,
    /// The disk refused; the error until somebody has taken it.
    Broken(Option<io::Error>),
}

impl Outbox {
    pub(super) fn new(writer: SpoolWriter, range: &Arc<Range>, shared: &Arc<Shared>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                waiting: Vec::new(),
                bytes: 0,
                writer: Writer::Idle(writer),
            }),
            progress: Notify::new(),
            range: Arc::clone(range),
            shared: Arc::clone(shared),
        })
    }

    /// Hands over a batch; returns when there is room for another one.
    pub(super) async fn put(self: &Arc<Self>, batch: Vec<Bytes>, tasks: &Tasks) -> io::Result<()> {
        if let Some(writer) = self.add(batch) {
            let outbox = Arc::clone(self);
            drop(tasks.spawn_blocking(move || outbox.drain(writer)));
        }
        self.until(|state| state.bytes < MOST).await
    }

    /// Returns when all that was handed over is written.
    pub(super) async fn written(&self) -> io::Result<()> {
        self.until(|state| state.bytes == 0).await
    }

    /// Adds a batch; returns the writer when it is not at work.
    fn add(&self, batch: Vec<Bytes>) -> Option<SpoolWriter> {
        let mut state = self.state();
        state.bytes += batch.iter().map(Bytes::len).sum::<usize>();
        state.waiting.extend(batch);
        match std::mem::replace(&mut state.writer, Writer::Away) {
            Writer::Idle(writer) => Some(writer),
            other @ (Writer::Away | Writer::Broken(_)) => {
                state.writer = other;
                None
            }
        }
    }

    async fn until(&self, done: impl Fn(&State) -> bool) -> io::Result<()> {
        loop {
            let rung = self.progress.notified();
            if let Some(settled) = self.state().settled(&done) {
                return settled;
            }
            rung.await;
        }
    }

    /// Writes until nothing waits any more, and tells the readers from here, so that they do not wait for what comes next.
    fn drain(&self, writer: SpoolWriter) {
        let mut at_work = Some(writer);
        while let Some(mut writer) = at_work {
            let batch = std::mem::take(&mut self.state().waiting);
            let written = writer.write(&batch).map(|position| {
                self.range.position.store(position, Ordering::Relaxed);
                self.shared.tell();
            });
            at_work = self.after(&batch, writer, written);
        }
    }

    /// Counts a batch out; gives the writer back when more waits.
    fn after(
        &self,
        batch: &[Bytes],
        writer: SpoolWriter,
        written: io::Result<()>,
    ) -> Option<SpoolWriter> {
        let mut state = self.state();
        state.bytes -= batch.iter().map(Bytes::len).sum::<usize>();
        let more = match written {
            Err(error) => {
                state.writer = Writer::Broken(Some(error));
                None
            }
            Ok(()) if state.waiting.is_empty() => {
                state.writer = Writer::Idle(writer);
                None
            }
            Ok(()) => Some(writer),
        };
        drop(state);
        self.progress.notify_one();
        more
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The end of waiting: for what was waited for, or with the disk's error.
    fn settled(&mut self, done: impl Fn(&Self) -> bool) -> Option<io::Result<()>> {
        if let Writer::Broken(error) = &mut self.writer {
            let known = || io::Error::other("the disk refused before");
            return Some(Err(error.take().unwrap_or_else(known)));
        }
        done(self).then_some(Ok(()))
    }
}
