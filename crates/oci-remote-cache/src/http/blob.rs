//! Blobs, said in headers: whole, one range, or several, from the disk or from a fill under way.

use std::collections::VecDeque;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use hyper::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap,
    IF_NONE_MATCH, IF_RANGE, RANGE,
};
use hyper::{Response, StatusCode};
use oci::{AnyDigest, ContentRange, RangeHeader, RangeSpec, Resolved, Slice};

use super::body::{Alarm, Body, BodyBroken, Part};
use super::dispatch::{Answer, Request, set};
use super::manifest::{DOCKER_CONTENT_DIGEST, IMMUTABLE};
use super::problem::Problem;
use super::{conditional, failure};
use crate::cache::blob::{
    Blob, BlobAnswer, DirectReader, Open, Release, Tail, TailPart, Wish, WishRange,
};
use crate::verdict::{Assurance, Verdict};

/// What stands between the parts of several ranges; no part is text, so it need not be unguessable.
const BOUNDARY: &str = "oci-remote-cache-range";

/// Answers a GET or HEAD of a blob.
pub async fn answer(request: &Request<'_>, digest: &AnyDigest) -> Result<Answer, Problem> {
    if let AnyDigest::Known(known) = digest
        && conditional::if_none_match(request.values(&IF_NONE_MATCH), known)
    {
        return not_modified(request, digest).await;
    }
    if request.is_head() {
        return head(request, digest).await;
    }
    let ranges = ranges(request, digest);
    let wish = wish(ranges.as_ref(), request);
    let found = request
        .cache
        .blob(&request.grant, digest, wish, request.deadline)
        .await;
    match found.map_err(|error| failure::of_cache(&error))? {
        BlobAnswer::Stored(blob) => {
            let answer = stored(digest, &Local::File(blob), ranges.as_ref())?;
            Ok(guarded(answer, request, digest))
        }
        BlobAnswer::Held(body) => stored(digest, &Local::Memory(body), ranges.as_ref()),
        BlobAnswer::Filling(open, verdict) => {
            let answer = filling(digest, *open, verdict, (ranges.as_ref(), wish)).await?;
            Ok(guarded(answer, request, digest))
        }
        BlobAnswer::Passing {
            size,
            reader,
            verdict,
        } => {
            let mut response = Response::new(passing(size, *reader));
            describe(response.headers_mut(), digest, size);
            Ok(Answer::new(response, verdict))
        }
    }
}

/// The same answer; where it breaks off, what is stored of the blob is looked at.
fn guarded(answer: Answer, request: &Request<'_>, digest: &AnyDigest) -> Answer {
    let AnyDigest::Known(digest) = *digest else {
        return answer;
    };
    let cache = request.cache.clone();
    let alarm = Alarm::new(move || cache.doubt(digest));
    Answer {
        response: answer.response.map(|body| body.guarded(alarm)),
        ..answer
    }
}

async fn head(request: &Request<'_>, digest: &AnyDigest) -> Result<Answer, Problem> {
    let head = request
        .cache
        .blob_head(&request.grant, digest, request.deadline)
        .await;
    let head = head.map_err(|error| failure::of_cache(&error))?;
    let mut response = Response::new(Body::empty());
    describe(response.headers_mut(), digest, head.size);
    // A HEAD brings nothing that could be stored.
    let verdict = if head.verdict == Verdict::Miss {
        Verdict::Asked
    } else {
        head.verdict
    };
    Ok(Answer::new(response, verdict))
}

/// The client holds the blob already; whether it may know that is the cache's to say.
async fn not_modified(request: &Request<'_>, digest: &AnyDigest) -> Result<Answer, Problem> {
    let mut answer = head(request, digest).await?;
    *answer.response.status_mut() = StatusCode::NOT_MODIFIED;
    answer.response.headers_mut().remove(CONTENT_LENGTH);
    Ok(answer)
}

/// The ranges to honour: none when there is no `Range`, when it is not one, or when `If-Range` names something else.
fn ranges(request: &Request<'_>, digest: &AnyDigest) -> Option<RangeHeader> {
    let etag = format!("\"{digest}\"");
    let applies = request
        .values(&IF_RANGE)
        .next()
        .is_none_or(|value| conditional::if_range(value, &etag));
    request
        .values(&RANGE)
        .next()
        .filter(|_| applies)
        .and_then(RangeHeader::parse)
}

fn wish(ranges: Option<&RangeHeader>, request: &Request<'_>) -> Wish {
    let specs = ranges.map(RangeHeader::specs).unwrap_or_default();
    let open_ended = specs
        .iter()
        .any(|spec| matches!(spec, RangeSpec::From { .. }));
    let range = match specs.first() {
        Some(first) if !open_ended => WishRange::Part(*first),
        Some(_) | None => WishRange::Whole,
    };
    Wish {
        range,
        client: request.grant.client().address,
    }
}

/// A blob that is all here.
#[derive(Clone)]
enum Local {
    File(Blob),
    Memory(Bytes),
}

impl Local {
    fn size(&self) -> u64 {
        match self {
            Self::File(blob) => blob.size,
            Self::Memory(body) => body.len() as u64,
        }
    }

    /// A slice that lies within the blob.
    fn part(&self, slice: Slice) -> Part {
        match self {
            Self::File(blob) => Part::Span(blob.span(slice)),
            Self::Memory(body) => {
                let at = |offset| {
                    usize::try_from(offset)
                        .unwrap_or(usize::MAX)
                        .min(body.len())
                };
                Part::Memory(body.slice(at(slice.start)..at(slice.end)))
            }
        }
    }
}

fn stored(
    digest: &AnyDigest,
    blob: &Local,
    ranges: Option<&RangeHeader>,
) -> Result<Answer, Problem> {
    let size = blob.size();
    let mut response = Response::new(Body::empty());
    match resolve(ranges, size)? {
        Wanted::Whole => {
            describe(response.headers_mut(), digest, Some(size));
            *response.body_mut() = blob
                .part(Slice {
                    start: 0,
                    end: size,
                })
                .into();
        }
        Wanted::One(slice) => {
            describe_part(&mut response, digest, slice, size);
            *response.body_mut() = blob.part(slice).into();
        }
        Wanted::Several(slices) => {
            let parts = slices
                .iter()
                .map(|slice| Section::Part(blob.part(*slice)))
                .collect();
            several(&mut response, digest, Multipart::new(&slices, parts, size));
        }
    }
    Ok(Answer::new(response, Verdict::Hit))
}

async fn filling(
    digest: &AnyDigest,
    open: Open,
    verdict: Verdict,
    (ranges, wish): (Option<&RangeHeader>, Wish),
) -> Result<Answer, Problem> {
    let mut response = Response::new(Body::empty());
    let Some(size) = open.size() else {
        // The upstream did not tell the size, so no range can be answered exactly: everything is sent (RFC 9110 section 14.2). What a
        // manifest tells is good enough for a length: where it is a lie, the answer is cut.
        let told = open.told();
        describe(response.headers_mut(), digest, told);
        let tail = begun(open.read_as_told()).await?;
        *response.body_mut() = Body::stream(told, parts(tail));
        return Ok(Answer::new(response, verdict));
    };
    let early = if open.is_verified() {
        Assurance::Verified
    } else {
        Assurance::Unverified
    };
    let assurance = match resolve(ranges, size)? {
        Wanted::Whole => {
            describe(response.headers_mut(), digest, Some(size));
            let mut tail = open.read(
                Some(Slice {
                    start: 0,
                    end: size,
                }),
                Release::Verified,
            );
            if size == 0 {
                tail.settled()
                    .await
                    .map_err(|error| failure::of_cache(&error.into()))?;
            }
            *response.body_mut() = Body::stream(Some(size), parts(begun(tail).await?));
            Assurance::Verified
        }
        Wanted::One(slice) => {
            let (release, assurance) = match wish.range {
                WishRange::Whole => (Release::Verified, Assurance::Verified),
                WishRange::Part(_) => (Release::Arrived, early),
            };
            describe_part(&mut response, digest, slice, size);
            let tail = begun(open.read(Some(slice), release)).await?;
            *response.body_mut() = Body::stream(Some(slice.len()), parts(tail));
            assurance
        }
        Wanted::Several(slices) => {
            let sections = sections(&open, &slices, wish);
            several(
                &mut response,
                digest,
                Multipart::new(&slices, sections, size),
            );
            early
        }
    };
    Ok(Answer {
        assurance,
        ..Answer::new(response, verdict)
    })
}

/// A reader that has heard from the upstream, where it reads from there by itself.
async fn begun(mut tail: Tail) -> Result<Tail, Problem> {
    match tail.begin().await {
        Ok(()) => Ok(tail),
        Err(error) => Err(failure::of_cache(&error.into())),
    }
}

/// Readers of all ranges, made known at once, so that none is fetched later than it could be.
fn sections(open: &Open, slices: &[Slice], wish: Wish) -> VecDeque<Section> {
    let tail = |slice: &Slice| open.again(wish).read(Some(*slice), Release::Arrived);
    slices
        .iter()
        .map(|slice| Section::Tail(Box::new(tail(slice))))
        .collect()
}

enum Wanted {
    Whole,
    One(Slice),
    Several(Vec<Slice>),
}

fn resolve(ranges: Option<&RangeHeader>, size: u64) -> Result<Wanted, Problem> {
    match ranges.map(|ranges| ranges.resolve(size)) {
        None => Ok(Wanted::Whole),
        Some(Resolved::Single(slice)) => Ok(Wanted::One(slice)),
        Some(Resolved::Multiple(slices)) => Ok(Wanted::Several(slices)),
        Some(Resolved::Unsatisfiable) => Err(Problem::range_not_satisfiable(size)),
    }
}

/// The same headers on hit and miss, GET and HEAD. The upstream's type is never passed on: a blob must not be taken for a page.
fn describe(headers: &mut HeaderMap, digest: &AnyDigest, size: Option<u64>) {
    set(headers, CONTENT_TYPE, oci::OCTET_STREAM);
    set(headers, DOCKER_CONTENT_DIGEST, &digest.to_string());
    set(headers, ETAG, &format!("\"{digest}\""));
    set(headers, CACHE_CONTROL, IMMUTABLE);
    set(headers, ACCEPT_RANGES, "bytes");
    if let Some(size) = size {
        set(headers, CONTENT_LENGTH, &size.to_string());
    }
}

fn describe_part(response: &mut Response<Body>, digest: &AnyDigest, slice: Slice, size: u64) {
    *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    describe(response.headers_mut(), digest, Some(slice.len()));
    let range = ContentRange {
        slice,
        total: Some(size),
    };
    set(response.headers_mut(), CONTENT_RANGE, &range.to_string());
}

fn several(response: &mut Response<Body>, digest: &AnyDigest, multipart: Multipart) {
    *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    describe(response.headers_mut(), digest, Some(multipart.length));
    let media_type = format!("multipart/byteranges; boundary={BOUNDARY}");
    set(response.headers_mut(), CONTENT_TYPE, &media_type);
    *response.body_mut() = Body::stream(Some(multipart.length), multipart.parts());
}

/// `multipart/byteranges` (RFC 9110 section 14.6), with its exact length known before its first byte.
struct Multipart {
    length: u64,
    heads: VecDeque<Bytes>,
    sections: VecDeque<Section>,
    open: Option<Section>,
}

/// Where one range's bytes come from.
enum Section {
    Part(Part),
    Tail(Box<Tail>),
    Sent,
}

impl Multipart {
    fn new(slices: &[Slice], sections: VecDeque<Section>, size: u64) -> Self {
        let head = |(index, slice): (usize, &Slice)| {
            let lead = if index == 0 { "" } else { "\r\n" };
            let range = ContentRange {
                slice: *slice,
                total: Some(size),
            };
            Bytes::from(format!(
                "{lead}--{BOUNDARY}\r\nContent-Type: {}\r\nContent-Range: {range}\r\n\r\n",
                oci::OCTET_STREAM
            ))
        };
        let mut heads: VecDeque<Bytes> = slices.iter().enumerate().map(head).collect();
        heads.push_back(Bytes::from(format!("\r\n--{BOUNDARY}--\r\n")));
        let written: u64 = heads.iter().map(|head| head.len() as u64).sum();
        let length = written + slices.iter().map(|slice| slice.len()).sum::<u64>();
        Self {
            length,
            heads,
            sections,
            open: None,
        }
    }

    fn parts(self) -> impl Stream<Item = Result<Part, BodyBroken>> {
        stream::unfold(self, |mut multipart| async move {
            let part = multipart.next().await?;
            Some((part, multipart))
        })
    }

    async fn next(&mut self) -> Option<Result<Part, BodyBroken>> {
        loop {
            match self.open.as_mut() {
                None => {
                    let head = self.heads.pop_front()?;
                    self.open = self.sections.pop_front().or(Some(Section::Sent));
                    return Some(Ok(Part::Memory(head)));
                }
                Some(section) => match section.next().await {
                    Some(part) => return Some(part),
                    None => self.open = None,
                },
            }
        }
    }
}

impl Section {
    async fn next(&mut self) -> Option<Result<Part, BodyBroken>> {
        match self {
            Self::Part(part) => {
                let part = part.clone();
                *self = Self::Sent;
                Some(Ok(part))
            }
            Self::Tail(tail) => next_part(tail).await,
            Self::Sent => None,
        }
    }
}

fn parts(tail: Tail) -> impl Stream<Item = Result<Part, BodyBroken>> {
    stream::unfold(tail, |mut tail| async move {
        let part = next_part(&mut tail).await?;
        Some((part, tail))
    })
}

async fn next_part(tail: &mut Tail) -> Option<Result<Part, BodyBroken>> {
    match tail.next().await {
        Ok(Some(TailPart::Span(span))) => Some(Ok(Part::Span(span))),
        Ok(Some(TailPart::Memory(bytes))) => Some(Ok(Part::Memory(bytes))),
        Ok(None) => None,
        Err(error) => Some(Err(BodyBroken::new(error.to_string()))),
    }
}

fn passing(size: Option<u64>, reader: DirectReader) -> Body {
    let parts = stream::unfold(reader, |mut reader| async move {
        let part = match reader.next().await {
            Ok(bytes) => Ok(Part::Memory(bytes?)),
            Err(error) => Err(BodyBroken::new(error.to_string())),
        };
        Some((part, reader))
    });
    Body::stream(size, parts)
}
