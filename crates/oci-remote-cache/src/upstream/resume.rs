//! A blob's bytes from an upstream, unbroken: what breaks is reopened at its offset behind the reader's back.
//!
//! A body that resets, ends short, stalls or whose signed URL died is asked for again from where it stopped, as a closed range (several
//! registries answer open-ended ones with 416 or with everything). What comes back must fit: offset, total and validator. Where the
//! answers to ranges never do, or none come, all of it is asked for at last and skipped up to the break. Tries count only while no byte
//! comes; configured mirrors take turns.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use oci::{AnyDigest, RepositoryName, Slice};
use tokio::time::{Instant, sleep_until};

use super::patience::{Failed, Patience, Whom, pause};
use super::{
    Answer, Ask, Body, Fault, Identity, Method, Mirrors, Resource, Stakes, Upstream, UpstreamError,
};
use crate::deadline::Deadline;
use crate::names::CredentialId;

/// How long an extra connection may take to be answered: what it is to bring waits for it.
const HASTE: Duration = Duration::from_secs(5);

/// How long a question may take that hurries, the first time: less than what counts as the registry's silence.
const HURRY: Duration = Duration::from_secs(4);

/// The end of a range that goes on to the end of a blob of unknown size: a server takes an end that is beyond the blob's for that
/// (RFC 9110 section 14.1.2), and it fits the signed 64 bits that some of them count with.
const BEYOND: u64 = i64::MAX as u64;

/// Which blob of which repository.
#[derive(Clone, Debug)]
pub struct BlobAsk {
    /// Where it is asked for.
    pub upstream: Arc<Upstream>,
    /// In whose name.
    pub repository: RepositoryName,
    /// Which bytes.
    pub digest: AnyDigest,
    /// Where to ask first: 0 is the upstream's URL, others are its mirrors.
    pub place: usize,
    /// Whether what breaks off at one place may go on at another.
    pub mixing: Mixing,
    /// Whose rights are used.
    pub identity: Identity,
}

/// Whether a blob's bytes may come from several places.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mixing {
    /// They may: every place has the same.
    #[default]
    Allowed,
    /// All from the one that answers first, for what came was wrong before.
    Refused,
}

/// The bytes of a blob, or of a range of it, in order.
#[derive(Debug)]
pub struct BlobStream {
    ask: BlobAsk,
    position: u64,
    end: Option<u64>,
    total: Option<u64>,
    validator: Option<String>,
    validators: Validators,
    ranges: Ranges,
    role: Role,
    credential: CredentialId,
    body: Option<Body>,
    skip: u64,
    patience: Patience,
    trouble: Option<UpstreamError>,
    not_before: Option<Instant>,
    /// The first answer did not tell the size.
    untold: bool,
    /// The next question is given little time.
    hurries: bool,
}

/// What depends on a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Nobody else brings these bytes: everything is tried.
    Sole,
    /// One of several that share a blob. It tries as often for its range; to begin at the beginning instead is not its decision.
    Part,
    /// It only saves time. Until its first answer fits, any failure is the last; then it is a part.
    OnTrial,
}

/// Whether an answer with another validator than the first is another blob's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Validators {
    Count,
    /// All was asked for again, and whatever comes is taken: the digest tells whether it is the same blob. Some registries' nodes give each
    /// their own `ETag`.
    Ignored,
}

/// Whether the rest is asked for as a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ranges {
    Asked,
    /// The last answer to one did not fit.
    Unfit,
    LeftOut,
}

impl BlobAsk {
    fn ask(&self, range: Option<Slice>, mirror: usize) -> Ask {
        self.ask_for(range, mirror, Stakes::Needed)
    }

    fn ask_for(&self, range: Option<Slice>, mirror: usize, stakes: Stakes) -> Ask {
        Ask {
            repository: self.repository.clone(),
            resource: Resource::Blob(self.digest.clone()),
            method: Method::Get,
            range,
            accept: None,
            mirror,
            mirrors: Mirrors::Welcome,
            identity: self.identity.clone(),
            stakes,
        }
    }

    /// Opens the blob: all of it by a plain GET, or `range` of it. The size is known from here on, unless the upstream does not tell.
    /// Where mirrors are configured they are tried in order when a place gives no answer; a refusal is an answer.
    pub async fn open(
        mut self,
        range: Option<Slice>,
        deadline: Deadline,
    ) -> Result<BlobStream, UpstreamError> {
        let (answer, place) = self.first_answer(range, deadline).await?;
        self.place = place;
        let mut stream = self.stream(range.map_or(0, |range| range.start));
        if let Err(error) = stream.accept(answer, range) {
            if range.is_none() {
                return Err(error);
            }
            tracing::info!(%error, "a range was answered badly; asking for everything");
            let (answer, place) = stream.ask.first_answer(None, deadline).await?;
            (stream.ask.place, stream.ranges) = (place, Ranges::LeftOut);
            stream.accept(answer, None)?;
        }
        let end = range.filter(|_| !stream.comes_whole());
        let end = end.map(|range| range.end);
        stream.end = match (end, stream.total) {
            (Some(end), Some(total)) => Some(end.min(total)),
            (end, total) => end.or(total),
        };
        stream.untold = stream.total.is_none();
        Ok(stream)
    }

    /// Server errors and broken connections are tried once more than for other answers: a blob's first error ends a whole pull with
    /// skopeo and old containerd.
    async fn first_answer(
        &self,
        range: Option<Slice>,
        deadline: Deadline,
    ) -> Result<(Answer, usize), UpstreamError> {
        let ask = self.ask(range, self.place);
        match self.upstream.ask_from(ask.clone(), deadline).await {
            Err(error) if matches!(error.fault(), Fault::Status(500..) | Fault::Broken(_)) => {
                sleep_until(Instant::now() + pause(2, None)).await;
                self.upstream.ask_from(ask, deadline).await
            }
            answered => answered,
        }
    }

    /// The error for an answer that is none.
    pub fn broken(&self, what: &str) -> UpstreamError {
        self.upstream.broken(&self.ask(None, self.place), what)
    }

    /// A stream of `slice` of a blob of `total` bytes that is opened when its first byte is wanted. What comes must have `validator`.
    pub fn later(self, slice: Slice, total: u64, validator: Option<String>) -> BlobStream {
        BlobStream {
            end: Some(slice.end),
            total: Some(total),
            validator,
            ..self.stream(slice.start)
        }
    }

    fn stream(self, position: u64) -> BlobStream {
        BlobStream {
            position,
            end: None,
            total: None,
            validator: None,
            validators: Validators::Count,
            ranges: Ranges::Asked,
            role: Role::Sole,
            credential: CredentialId::anonymous(),
            body: None,
            skip: 0,
            patience: Patience::new(),
            trouble: None,
            not_before: None,
            untold: false,
            hurries: false,
            ask: self,
        }
    }
}

impl BlobStream {
    /// The blob's size in bytes, once the upstream told.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// Offset of the next byte.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Where the stream ends, exclusive, once that is known.
    pub fn end(&self) -> Option<u64> {
        self.end
    }

    /// Whose rights the upstream's last answer was given for.
    pub fn credential(&self) -> &CredentialId {
        &self.credential
    }

    /// The same as one of several streams that share the blob: it gives up where only all of the blob can be had.
    #[must_use]
    pub fn part(self) -> Self {
        let role = Role::Part;
        Self { role, ..self }
    }

    /// The same beside another stream that can bring these bytes as well. It gives up where it is not answered at once with just its
    /// range: to ask again and again, or to read all that comes before, would cost the upstream more than it saves anyone.
    #[must_use]
    pub fn on_trial(self) -> Self {
        let role = Role::OnTrial;
        Self { role, ..self }
    }

    /// The same where other questions of this transfer were left hanging, and may still take the places: its first question hurries, and is
    /// asked again on another connection when it hangs, too.
    #[must_use]
    pub fn hurried(self) -> Self {
        let hurries = true;
        Self { hurries, ..self }
    }

    /// The same where the upstream gives no ranges: all is asked for, and what comes before is skipped. Whether it is the same blob its
    /// digest tells, not a validator.
    #[must_use]
    pub fn from_the_beginning(mut self) -> Self {
        self.begin_again();
        self
    }

    /// Whether it is on trial and was given nothing yet.
    pub fn is_on_trial(&self) -> bool {
        self.role == Role::OnTrial
    }

    /// Whether the last answer to a question for a range did not fit, which says more than that there was none.
    pub fn is_unfit(&self) -> bool {
        self.ranges == Ranges::Unfit
    }

    /// Whether all that can be tried was tried when it gives up: nobody decides for it.
    pub fn is_sole(&self) -> bool {
        self.role == Role::Sole
    }

    /// Whether it brings all that comes behind it, since the upstream gives no ranges.
    pub fn comes_whole(&self) -> bool {
        self.ranges == Ranges::LeftOut
    }

    /// Where the bytes come from: 0 is the upstream's URL, others are its mirrors.
    pub fn place(&self) -> usize {
        self.ask.place
    }

    /// The strong validator of the first answer.
    pub fn validator(&self) -> Option<&str> {
        self.validator.as_deref()
    }

    /// Ends the stream before `end`, if it would have gone further.
    pub fn stop_at(&mut self, end: u64) {
        self.end = Some(self.end.map_or(end, |before| before.min(end)));
    }

    /// The next bytes; `None` at the end. Waits through as many reopenings as it takes, until `TRIES` in a row brought nothing.
    ///
    /// Dropping the future loses no bytes, but may lose a reopening that was under way.
    pub async fn next(&mut self) -> Result<Option<Bytes>, UpstreamError> {
        loop {
            if self.end.is_some_and(|end| self.position >= end) {
                return Ok(None);
            }
            match self.step().await {
                Ok(Step::Bytes(bytes)) => return Ok(Some(bytes)),
                Ok(Step::Again) => {}
                Ok(Step::End) => return Ok(None),
                Err(error) => self.stumble(error)?,
            }
        }
    }

    /// The next bytes, if they are there already: never waits and never reopens. What went wrong is told by [`BlobStream::next`].
    pub fn ready(&mut self) -> Option<Bytes> {
        loop {
            if self.end.is_some_and(|end| self.position >= end) || self.trouble.is_some() {
                return None;
            }
            match self.body.as_mut()?.chunk().now_or_never()? {
                Ok(Some(bytes)) => match self.take(bytes) {
                    Step::Bytes(bytes) => return Some(bytes),
                    Step::Again | Step::End => {}
                },
                Ok(None) => return None,
                Err(error) => self.trouble = Some(error),
            }
        }
    }

    async fn step(&mut self) -> Result<Step, UpstreamError> {
        if let Some(trouble) = self.trouble.take() {
            return Err(trouble);
        }
        let Some(body) = self.body.as_mut() else {
            self.reopen().await?;
            return Ok(Step::Again);
        };
        match body.chunk().await? {
            Some(bytes) => Ok(self.take(bytes)),
            None if self.end.is_none() => {
                self.end = Some(self.position);
                self.total = Some(self.position);
                Ok(Step::End)
            }
            None => Err(self.broken("the body ended before its end")),
        }
    }

    /// Counts bytes in, dropping those before our offset (an upstream that ignored our range) and those past our end.
    fn take(&mut self, mut bytes: Bytes) -> Step {
        let skipped = self.skip.min(bytes.len() as u64);
        self.skip -= skipped;
        drop(bytes.split_to(usize::try_from(skipped).unwrap_or(bytes.len())));
        let room = self.end.map_or(u64::MAX, |end| end - self.position);
        bytes.truncate(usize::try_from(room).unwrap_or(usize::MAX));
        if bytes.is_empty() {
            return Step::Again;
        }
        self.position += bytes.len() as u64;
        self.patience.note(bytes.len() as u64);
        Step::Bytes(bytes)
    }

    async fn reopen(&mut self) -> Result<(), UpstreamError> {
        if let Some(moment) = self.not_before {
            sleep_until(moment).await;
            self.not_before = None;
        }
        let range = self.rest().filter(|_| self.ranges != Ranges::LeftOut);
        let stakes = match self.role {
            Role::OnTrial => Stakes::Haste,
            Role::Sole | Role::Part => Stakes::Needed,
        };
        let ask = self.ask.ask_for(range, self.ask.place, stakes);
        let hurries = std::mem::take(&mut self.hurries);
        let deadline = match stakes {
            Stakes::Haste => Deadline::for_answer().at_most(HASTE),
            Stakes::Needed if hurries => Deadline::for_answer().at_most(HURRY),
            Stakes::Needed => Deadline::for_answer(),
        };
        match self.ask.upstream.send(&ask, deadline).await {
            Ok(answer) => {
                let accepted = self.accept(answer, range);
                if accepted.is_err() && range.is_some() {
                    self.ranges = Ranges::Unfit;
                }
                accepted
            }
            Err(error) if self.ask.upstream.is_to_strangers(&ask, &error) => {
                Err(self.broken("a mirror that refuses strangers"))
            }
            Err(error) => Err(error),
        }
    }

    /// What is missing of a blob that has begun; of one that has not, if its size is known.
    fn rest(&self) -> Option<Slice> {
        let start = self.position;
        let end = self.end.or_else(|| (start > 0).then_some(BEYOND))?;
        Some(Slice { start, end })
    }

    /// Takes an answer as the continuation at our offset, if it is one. `asked` is the range that was asked for, if one was.
    fn accept(&mut self, answer: Answer, asked: Option<Slice>) -> Result<(), UpstreamError> {
        let (start, total) = match (answer.status(), answer.content_range()) {
            (206, Some(range)) => (range.slice.start, range.total),
            (206, None) => return Err(self.broken("a 206 without Content-Range")),
            _ => (0, answer.content_length()),
        };
        let whole = asked.is_some() && answer.status() != 206;
        let unfit = match self.role {
            Role::Sole => false,
            Role::Part => self.position > 0,
            Role::OnTrial => true,
        };
        if whole && unfit {
            return Err(self.broken("everything in place of a range"));
        }
        if start > self.position || (answer.status() == 206 && start != self.position) {
            return Err(self.broken("another range than the one asked for"));
        }
        if self.untold && answer.status() != 206 {
            // Only a range has told a size, in answer to an end that was made up. Where a reader stops is another matter.
            let stop = self.end.filter(|_| self.end != self.total);
            (self.total, self.end) = (None, stop);
        }
        let made_up = asked.is_some_and(|asked| asked.end == BEYOND);
        if made_up && answer.status() == 206 && total.is_none() {
            // Where it stops says nothing of where the blob does.
            return Err(self.broken("a range of a blob of unknown size"));
        }
        if let (Some(known), Some(told)) = (self.total, total)
            && known != told
        {
            return Err(self.broken("another total length than before"));
        }
        if self.validators == Validators::Count
            && let (Some(known), Some(told)) = (self.validator.as_deref(), answer.etag())
            && known != told
            && is_strong(known)
            && is_strong(told)
        {
            return Err(self.broken("another ETag than before"));
        }
        self.total = self.total.or(total);
        self.end = self.end.or(self.total);
        self.validator = self
            .validator
            .take()
            .or_else(|| answer.etag().map(str::to_owned));
        if self.role == Role::OnTrial {
            self.role = Role::Part;
        }
        if whole {
            self.ranges = Ranges::LeftOut;
        }
        self.skip = self.position - start;
        self.credential = answer.credential().clone();
        self.body = Some(answer.into_body());
        Ok(())
    }

    /// Notes a failed try; `Err` when there were too many, or when trying again cannot help.
    fn stumble(&mut self, error: UpstreamError) -> Result<(), UpstreamError> {
        let broke_off = self.body.take().is_some() && matches!(error.fault(), Fault::Broken(_));
        let failed = if broke_off {
            Failed::BrokeOff
        } else if is_refusal(error.fault()) {
            Failed::Refused
        } else {
            Failed::Unanswered
        };
        let whom = self.patience.fail(failed);
        if self.is_on_trial() || self.is_hopeless(&error) {
            return Err(error);
        }
        self.choose_question(failed, &error);
        if whom == Whom::Next {
            self.turn();
        }
        let pause = self.patience.pause(error.retry_after());
        self.not_before = Some(Instant::now() + pause);
        tracing::info!(%error, position = self.position, failures = self.patience.failures(), "a blob broke off; going on from there");
        Ok(())
    }

    /// Whether the same will fail again, as far as one can tell.
    fn is_hopeless(&self, error: &UpstreamError) -> bool {
        if self.patience.is_refused() && self.places() == 1 {
            return true;
        }
        match self.role {
            Role::Sole => {
                let all_asked = self.patience.is_at_its_last()
                    || self.ranges == Ranges::LeftOut
                    || !error.may_be_of_a_range();
                self.patience.is_over() && all_asked
            }
            Role::Part | Role::OnTrial => {
                self.is_unfit_everywhere() || self.patience.wears_thin(error.retry_after())
            }
        }
    }

    /// For the rest or, where nobody else would, for everything. Who refused the one may give the other, and now and then the first again.
    fn choose_question(&mut self, failed: Failed, error: &UpstreamError) {
        let refused = failed == Failed::Refused && self.are_all_asked();
        let sole = self.role == Role::Sole;
        // Where the size is not known the end of the range was made up, which may be what was disliked.
        let made_up = self.end.is_none() && failed != Failed::BrokeOff;
        let vain = refused || made_up || self.is_unfit_everywhere();
        match self.ranges {
            Ranges::Asked | Ranges::Unfit if sole && vain => {
                self.leave_ranges_out();
            }
            Ranges::Asked | Ranges::Unfit
                if sole
                    && !self.patience.is_at_its_last()
                    && self.patience.wears_thin(error.retry_after()) =>
            {
                self.begin_again();
            }
            Ranges::LeftOut if failed == Failed::Unanswered => {}
            // Another place may know ranges better.
            Ranges::Asked | Ranges::Unfit | Ranges::LeftOut => self.ranges = Ranges::Asked,
        }
    }

    /// No place has answered with the range that was asked for.
    fn is_unfit_everywhere(&self) -> bool {
        self.ranges == Ranges::Unfit && self.are_all_asked()
    }

    fn are_all_asked(&self) -> bool {
        self.patience.failures() as usize >= self.places()
    }

    fn leave_ranges_out(&mut self) {
        self.ranges = Ranges::LeftOut;
        self.validators = Validators::Ignored;
    }

    /// All is asked for, for a last few times.
    fn begin_again(&mut self) {
        self.leave_ranges_out();
        self.patience.begin_again(self.places());
    }

    /// Goes on to the next place, if there is one.
    fn turn(&mut self) {
        let places = self.places();
        if places > 1 {
            // Another place has another validator; the total and, in the end, the digest still decide.
            self.ask.place = (self.ask.place + 1) % places;
            self.validator = None;
        }
    }

    /// How many places may be asked.
    fn places(&self) -> usize {
        match self.ask.mixing {
            Mixing::Allowed => self.ask.upstream.places(),
            Mixing::Refused => 1,
        }
    }

    fn broken(&self, what: &str) -> UpstreamError {
        self.ask.broken(what)
    }
}

enum Step {
    Bytes(Bytes),
    Again,
    End,
}

/// Weak validators say nothing about bytes (RFC 9110 section 8.8.1).
fn is_strong(etag: &str) -> bool {
    !etag.starts_with("W/")
}

/// A plain no, to this question at least.
fn is_refusal(fault: &Fault) -> bool {
    matches!(
        fault,
        Fault::Denied { .. } | Fault::NotFound { .. } | Fault::RangeRefused
    )
}
