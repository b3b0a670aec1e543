//! One reader of a fill, at its own pace: it waits for *its* bytes, and for the verdict where that is due.
//!
//! Whole and open-ended answers get everything but the blob's last chunk at once; that chunk leaves when the digest has matched, so no
//! client ever completes a wrong blob. Closed ranges leave when their bytes are in, and say that they are unverified.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oci::Slice;
use tokio::sync::watch;

use super::direct::DirectReader;
use super::plan::Appetite;
use super::{Fill, FillError, Fills, Phase, Progress, Seat, Wish};
use crate::deadline::Deadline;
use crate::store::span::Span;
use crate::upstream::Identity;
use crate::verdict::Why;

/// The most that is held back until the verdict, in bytes: 64 KiB.
pub const HELD: u64 = 64 << 10;

/// How long an answer's headers wait for what the upstream says to a reader of its own.
const MOMENT: Duration = Duration::from_secs(5);

/// The longest span handed out at once: 1 MiB.
const FRAME: u64 = 1 << 20;

/// When a reader's last bytes may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// When the digest has matched: whole and open-ended answers.
    Verified,
    /// When they are in: closed, suffix and multiple ranges.
    Arrived,
}

/// Bytes on their way to a client.
#[derive(Clone, Debug)]
pub enum Part {
    /// In a file.
    Span(Span),
    /// In memory: they could not be kept on disk.
    Memory(Bytes),
}

/// A reader that does not know yet whether the upstream has the blob.
#[derive(Debug)]
pub struct Joined {
    seat: Seat,
    fills: Fills,
    progress: watch::Receiver<Progress>,
}

/// A fill whose upstream has answered.
#[derive(Debug)]
pub struct Open {
    joined: Joined,
    size: Option<u64>,
    bypass: Option<Why>,
}

/// Reads one range of a fill.
#[derive(Debug)]
pub struct Tail {
    joined: Joined,
    position: u64,
    end: Option<u64>,
    /// How many bytes the client was told to expect, where the upstream does not tell: no more are given before the verdict.
    promised: Option<u64>,
    release: Release,
    direct: Option<Box<DirectReader>>,
}

/// What a reader should do next.
enum Next {
    Span(Slice),
    Wait,
    Done,
    GoAlone(Arc<super::Alone>),
    Fail(FillError),
}

impl Joined {
    pub(super) fn new(fills: &Fills, fill: &Arc<Fill>, wish: Wish) -> Self {
        Self {
            seat: fill.join(wish),
            fills: fills.clone(),
            progress: fill.progress.subscribe(),
        }
    }

    /// Whether the fill asks in this name.
    pub fn is_led_by(&self, identity: &Identity) -> bool {
        self.seat.fill.ask.identity.is_same(identity)
    }

    /// Waits for the upstream's answer, at most until `deadline` (then `None`). The outer error is the fill's.
    pub async fn open(mut self, deadline: Deadline) -> Result<Option<Open>, FillError> {
        let answered = |progress: &Progress| !matches!(progress.phase, Phase::Opening);
        let answer = match deadline.run(self.progress.wait_for(answered)).await {
            Err(_late) => return Ok(None),
            Ok(Err(_gone)) => return Err(FillError::Stopping),
            Ok(Ok(progress)) => progress.clone(),
        };
        let bypass = match answer.phase {
            Phase::Failed(error) => return Err(error),
            Phase::Alone(alone) => Some(alone.why()),
            Phase::Opening | Phase::Filling | Phase::Verified => None,
        };
        Ok(Some(Open {
            joined: self,
            size: answer.size,
            bypass,
        }))
    }
}

impl Open {
    /// The blob's size in bytes, if the upstream told.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// The size that a manifest gives, where the upstream does not tell it.
    pub fn told(&self) -> Option<u64> {
        let told = self.joined.seat.fill.told?;
        let untold = self.size.is_none() && self.bypass.is_none();
        untold.then_some(told.size).filter(|&size| size > 0)
    }

    /// Why nothing is kept, if nothing is.
    pub fn bypass(&self) -> Option<Why> {
        self.bypass
    }

    /// Whether the digest has matched already.
    pub fn is_verified(&self) -> bool {
        matches!(self.joined.progress.borrow().phase, Phase::Verified)
    }

    /// Leaves, and ends the fill where nobody else reads: it is not what was expected.
    pub fn renounce(self) {
        self.joined.seat.renounce();
    }

    /// Reads `slice`, or everything when the size is not known.
    pub fn read(self, slice: Option<Slice>, release: Release) -> Tail {
        let end = slice.map(|slice| slice.end).or(self.size);
        let position = slice.map_or(0, |slice| slice.start);
        let aimed = Slice {
            start: position,
            end: end.unwrap_or(u64::MAX),
        };
        let appetite = match release {
            Release::Verified => Appetite::Whole,
            Release::Arrived => Appetite::Asked,
        };
        self.joined.seat.aim(aimed, appetite);
        Tail {
            joined: self.joined,
            position,
            end,
            promised: None,
            release,
            direct: None,
        }
    }

    /// Reads everything, for a client that is told the size of [`Open::told`]. Where that was a lie, the reader fails before it has given
    /// so many bytes.
    pub fn read_as_told(self) -> Tail {
        let promised = self.told();
        Tail {
            promised,
            ..self.read(None, Release::Verified)
        }
    }

    /// Reads several slices one after the other, in the order given.
    #[must_use]
    pub fn again(&self, wish: Wish) -> Self {
        let joined = Joined::new(&self.joined.fills, &self.joined.seat.fill, wish);
        Self {
            joined,
            size: self.size,
            bypass: self.bypass,
        }
    }
}

impl Tail {
    /// The next bytes; `None` when all have been given.
    pub async fn next(&mut self) -> Result<Option<Part>, FillError> {
        loop {
            if self.direct.is_some() {
                return self.next_direct().await;
            }
            let progress = self.joined.progress.borrow_and_update().clone();
            match self.look(&progress) {
                Next::Done => return Ok(None),
                Next::Fail(error) => return Err(error),
                Next::Span(slice) => return Ok(self.take(&progress, slice)),
                Next::GoAlone(alone) => self.direct = Some(self.go_alone(&alone).await?),
                Next::Wait => {
                    self.joined
                        .progress
                        .changed()
                        .await
                        .map_err(|_gone| FillError::Stopping)?;
                }
            }
        }
    }

    /// Where this reader goes on from the upstream by itself, waits a moment for its first bytes: as long as no headers have left, a
    /// refusal can be told by a status.
    pub async fn begin(&mut self) -> Result<(), FillError> {
        let progress = self.joined.progress.borrow().clone();
        let Next::GoAlone(alone) = self.look(&progress) else {
            return Ok(());
        };
        let begun = tokio::time::timeout(MOMENT, async {
            let mut direct = self.go_alone(&alone).await?;
            direct.begin().await?;
            Ok(direct)
        });
        match begun.await {
            Ok(Ok(direct)) => self.direct = Some(direct),
            Ok(Err(error)) => return Err(error),
            // Others have the connections. It waits for its turn when it is read.
            Err(_late) => {}
        }
        Ok(())
    }

    async fn next_direct(&mut self) -> Result<Option<Part>, FillError> {
        let Some(direct) = self.direct.as_mut() else {
            return Ok(None);
        };
        let Some(bytes) = direct.next().await? else {
            return Ok(None);
        };
        self.position += bytes.len() as u64;
        let lied = self.promised.is_some_and(|told| match direct.ended_at() {
            Some(size) => size != told,
            None => self.position >= told,
        });
        if lied {
            return Err(self.joined.seat.fill.not_as_told());
        }
        Ok(Some(Part::Memory(bytes)))
    }

    /// Waits until the next call of [`Tail::next`] would not wait: for answers of length zero, whose verdict must come before their
    /// headers.
    pub async fn settled(&mut self) -> Result<(), FillError> {
        let decided =
            |progress: &Progress| !matches!(progress.phase, Phase::Opening | Phase::Filling);
        let progress = self
            .joined
            .progress
            .wait_for(decided)
            .await
            .map_err(|_gone| FillError::Stopping)?
            .clone();
        match progress.phase {
            Phase::Failed(error) => Err(error),
            Phase::Opening | Phase::Filling | Phase::Verified | Phase::Alone(_) => Ok(()),
        }
    }

    fn look(&self, progress: &Progress) -> Next {
        match &progress.phase {
            Phase::Failed(error) => return Next::Fail(error.clone()),
            Phase::Opening => return Next::Wait,
            Phase::Filling | Phase::Verified | Phase::Alone(_) => {}
        }
        let verified = matches!(progress.phase, Phase::Verified);
        if verified && self.promised.is_some() && self.promised != progress.size {
            return Next::Fail(self.joined.seat.fill.not_as_told());
        }
        let end = self.end.or_else(|| progress.size.filter(|_| verified));
        if !self.unfinished(end) && (self.release == Release::Arrived || verified) {
            return Next::Done;
        }
        let reach = progress
            .spool
            .as_ref()
            .map_or(self.position, |spool| spool.reach(self.position));
        let here = self.released(progress, reach, end);
        if here > self.position {
            return Next::Span(Slice {
                start: self.position,
                end: here.min(self.position + FRAME),
            });
        }
        match &progress.phase {
            // What arrived before the cache stopped keeping the blob has been given; the rest comes from the upstream.
            Phase::Alone(alone) => Next::GoAlone(Arc::clone(alone)),
            Phase::Opening | Phase::Filling | Phase::Verified | Phase::Failed(_) => Next::Wait,
        }
    }

    fn unfinished(&self, end: Option<u64>) -> bool {
        end.is_none_or(|end| self.position < end)
    }

    /// How far this reader may go, given that bytes up to `reach` have arrived.
    fn released(&self, progress: &Progress, reach: u64, end: Option<u64>) -> u64 {
        let wanted = end.map_or(reach, |end| reach.min(end));
        if self.release == Release::Arrived || matches!(progress.phase, Phase::Verified) {
            return wanted;
        }
        let told = self.promised.unwrap_or(u64::MAX);
        let size = progress.size.unwrap_or(reach).min(told);
        wanted.min(size.saturating_sub(HELD))
    }

    fn take(&mut self, progress: &Progress, slice: Slice) -> Option<Part> {
        let span = progress.spool.as_ref()?.span(slice);
        self.position = slice.end;
        self.joined.seat.advance(slice.end);
        Some(Part::Span(span))
    }

    async fn go_alone(&self, alone: &Arc<super::Alone>) -> Result<Box<DirectReader>, FillError> {
        let fills = &self.joined.fills;
        let fill = &self.joined.seat.fill;
        let rest = (self.position, self.end);
        Ok(Box::new(
            alone.reader(fills, fill, rest, self.release).await?,
        ))
    }
}
