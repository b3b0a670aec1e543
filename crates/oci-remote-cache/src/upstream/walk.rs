//! One try of a request: the registry, its redirects, and the verdict on whatever answers in the end.
//!
//! Trying again after failures is `mod.rs`'s; a signed URL that has expired is a matter of this file, for the registry only needs to be
//! asked once more.

use oci::{Challenge, ContentRange};
use tokio::time::Instant;
use url::Url;

use super::auth::{Session, realm};
use super::body::{Answer, Head, Label};
use super::error::{Failure, Fault, Refused};
use super::exchange::{Call, Reply};
use super::place::Place;
use super::redirect::{Origin, Trail};
use super::request::{Ask, Method};
use super::token::{Token, Wanted};
use crate::deadline::Deadline;
use crate::names::CredentialId;

/// By which a manifest's HEAD is known to be refused.
const HEAD_NOT_ALLOWED: u16 = 405;

/// Who gave the last answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaker {
    /// The registry at its own origin: its refusals are about rights.
    Registry,
    /// Whoever a redirect led to: its refusals are about the URL that the registry gave out, whatever challenge comes with them.
    ContentHost,
}

/// What was asked of the one who gave the last answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    AsIs,
    /// The first byte, to learn a blob's size: signed URLs are good for GET only, and some registries know no HEAD.
    FirstByte,
}

/// The end of a way through redirects.
struct Arrived {
    reply: Reply,
    speaker: Speaker,
    asked: Asked,
    credential: CredentialId,
    refused: Refused,
}

/// A token for a registry that a redirect led to.
#[derive(Debug)]
struct Guest {
    origin: Origin,
    token: Token,
}

/// Asks `place` once, and once more if the signed URL it gave out has expired. A blob's HEAD that is refused for its method becomes a GET
/// of the first byte.
pub(super) async fn attempt(
    place: &Place,
    ask: &Ask,
    label: &Label,
    deadline: Deadline,
) -> Result<Answer, Failure> {
    let refused = place.heads.are_refused(ask, Instant::now());
    if !ask.is_blob_head() {
        if refused {
            return Err(Fault::Status(HEAD_NOT_ALLOWED).into());
        }
        return Box::pin(attempt_as(place, ask, Asked::AsIs, (label, deadline))).await;
    }
    if !refused {
        let by_head = Box::pin(attempt_as(place, ask, Asked::AsIs, (label, deadline))).await;
        match by_head {
            Err(failure) if failure.fault.is_of_head() => {}
            answered => return answered,
        }
    }
    let first = ask.for_first_byte();
    let answer = Box::pin(attempt_as(
        place,
        &first,
        Asked::FirstByte,
        (label, deadline),
    ))
    .await?;
    if !refused {
        place.heads.note(ask, Instant::now());
    }
    Ok(answer)
}

async fn attempt_as(
    place: &Place,
    ask: &Ask,
    asked: Asked,
    (label, deadline): (&Label, Deadline),
) -> Result<Answer, Failure> {
    let mut fresh_url_left = true;
    loop {
        let mut arrived = Box::pin(walk(place, ask, deadline)).await?;
        if asked == Asked::FirstByte {
            arrived.asked = asked;
        }
        if !is_expired(&arrived) {
            return Box::pin(settle(arrived, place, ask, label, deadline)).await;
        }
        if !fresh_url_left {
            return Err(Fault::Expired.into());
        }
        fresh_url_left = false;
    }
}

/// From the registry through its redirects to whoever does not redirect.
async fn walk(place: &Place, ask: &Ask, deadline: Deadline) -> Result<Arrived, Failure> {
    place.enter(ask)?;
    let door = place.reach.door().await?;
    let start = ask.url(&place.url);
    door.rules
        .admit(&start, &start, start.as_str())
        .map_err(|refusal| Fault::Forbidden(refusal.to_string()))?;
    let mut session = Session::new(place, &door, ask, deadline).await?;
    session.prepare().await?;
    let mut reply = session.send(&start).await?;
    let mut trail = Trail::from(&start);
    let mut guest = None;
    while reply.is_redirect() {
        let next = follow(&session, &mut trail, &reply)?;
        reply = if trail.never_left() {
            session.send(&next).await?
        } else {
            abroad(place, &session, &mut guest, next).await?
        };
    }
    let at_home = trail.never_left();
    Ok(Arrived {
        speaker: if at_home {
            Speaker::Registry
        } else {
            Speaker::ContentHost
        },
        asked: if !at_home && ask.is_blob_head() {
            Asked::FirstByte
        } else {
            Asked::AsIs
        },
        credential: session.credential().recorded(),
        refused: session.refused(),
        reply,
    })
}

/// Where a redirect leads, if it may be followed.
fn follow(session: &Session<'_>, trail: &mut Trail, reply: &Reply) -> Result<Url, Fault> {
    let location = reply.header("location").unwrap_or_default();
    let next = trail.step(&reply.url, location)?;
    let rules = &session.door.rules;
    rules
        .admit(&reply.url, &next, location)
        .map_err(|refusal| Fault::Forbidden(refusal.to_string()))?;
    Ok(next)
}

/// Asks someone other than the registry. Without its authorization, always: object stores refuse it, and others must not see it. If it
/// turns out to be a registry that wants a token (registry.k8s.io leads to regional ones), an anonymous one is fetched for it.
async fn abroad(
    place: &Place,
    session: &Session<'_>,
    guest: &mut Option<Guest>,
    url: Url,
) -> Result<Reply, Failure> {
    let (wire, door, deadline) = (&place.wire, session.door, session.deadline);
    let origin = Origin::of(&url);
    let held = guest.as_ref().filter(|guest| guest.origin == origin);
    let call = stranger(session.ask, &url, held.map(|guest| &guest.token));
    let reply = wire.send(door, call, deadline).await?;
    if reply.status() != 401 || held.is_some() {
        return Ok(reply);
    }
    let challenges = Challenge::parse_all(reply.headers("www-authenticate"));
    let Some(Challenge::Bearer(bearer)) = Challenge::choose(&challenges) else {
        return Ok(reply);
    };
    let wanted = Wanted {
        realm: realm(door, &url, &bearer.realm)?,
        service: bearer.service.clone(),
        scopes: bearer.scope.iter().cloned().collect(),
        credentials: None,
    };
    let token = match place.tokens.get(wanted, wire, door, deadline).await {
        Ok(token) => token,
        // No token for strangers: the refusal stands as it came.
        Err(failure) if matches!(failure.fault, Fault::Denied { .. }) => return Ok(reply),
        Err(failure) => return Err(failure),
    };
    let again = stranger(session.ask, &url, Some(&token));
    let reply = wire.send(door, again, deadline).await?;
    if reply.status() == 401 {
        place.tokens.forget(&token);
    }
    *guest = Some(Guest { origin, token });
    Ok(reply)
}

/// The request as someone other than the registry gets it.
fn stranger(ask: &Ask, url: &Url, token: Option<&Token>) -> Call {
    let mut call = Call {
        authorization: token.map(Token::bearer),
        ..ask.call(url.clone())
    };
    if ask.is_blob_head() {
        call.method = reqwest::Method::GET;
        call.range = Some("bytes=0-0".to_owned());
    }
    call
}

/// Whether a content host refused the URL that the registry had signed.
fn is_expired(arrived: &Arrived) -> bool {
    arrived.speaker == Speaker::ContentHost
        && matches!(arrived.reply.status(), 400 | 401 | 403 | 410)
}

/// Makes the last reply an answer or a fault.
async fn settle(
    arrived: Arrived,
    place: &Place,
    ask: &Ask,
    label: &Label,
    deadline: Deadline,
) -> Result<Answer, Failure> {
    let reply = &arrived.reply;
    let status = reply.status();
    let length = match (arrived.asked, status) {
        (Asked::FirstByte, 200 | 206 | 416) => probed_length(reply)?,
        (Asked::AsIs, 200) => None,
        (Asked::AsIs, 206) if ask.range.is_some() => None,
        _ => return Err(refused(arrived, place, ask, deadline).await),
    };
    check_coding(reply)?;
    let method = match arrived.asked {
        Asked::AsIs => ask.method,
        Asked::FirstByte => Method::Head,
    };
    let head = Head {
        status: if arrived.asked == Asked::FirstByte {
            200
        } else {
            status
        },
        length,
        credential: arrived.credential,
        method,
        place: ask.mirror,
    };
    Ok(Answer::new(head, arrived.reply.response, label.clone()))
}

async fn refused(arrived: Arrived, place: &Place, ask: &Ask, deadline: Deadline) -> Failure {
    let reply = arrived.reply;
    let retry_after = place.wire.retry_after(&reply);
    let status = reply.status();
    if matches!(status, 405 | 501) && ask.is_manifest() {
        place.heads.note(ask, Instant::now());
    }
    let fault = match status {
        401 | 403 => {
            place.keyring.doubt();
            Fault::Denied {
                status,
                code: code(reply, ask, deadline).await,
                refused: arrived.refused,
            }
        }
        404 | 410 => Fault::NotFound {
            code: code(reply, ask, deadline).await,
        },
        416 => Fault::RangeRefused,
        429 => Fault::RateLimited {
            retry_after: retry_after.unwrap_or(super::rate::UNSAID),
        },
        _ => Fault::Status(status),
    };
    Failure { fault, retry_after }
}

async fn code(reply: Reply, ask: &Ask, deadline: Deadline) -> Option<String> {
    match ask.method {
        Method::Get => reply.error_code(deadline).await,
        Method::Head => None,
    }
}

/// A blob's size by the answer to a request for its first byte. An empty blob has none: `416`, `bytes */0`. Who ignores ranges and sends
/// all in chunks tells no size.
fn probed_length(reply: &Reply) -> Result<Option<u64>, Fault> {
    let content_range = reply.header("content-range");
    let length = match reply.status() {
        206 => content_range
            .and_then(ContentRange::parse)
            .and_then(|range| range.total),
        416 => content_range.and_then(|value| value.trim().strip_prefix("bytes */")?.parse().ok()),
        _ => {
            let length = reply.header("content-length");
            return Ok(length.and_then(|value| value.parse().ok()));
        }
    };
    let untold =
        || Fault::Broken("the answer for the first byte does not tell the size".to_owned());
    length.map(Some).ok_or_else(untold)
}

/// Refuses encoded bodies: they have another length, other ranges and another digest.
fn check_coding(reply: &Reply) -> Result<(), Fault> {
    let encoded = reply.headers("content-encoding").find(|coding| {
        !coding.trim().is_empty() && !coding.trim().eq_ignore_ascii_case("identity")
    });
    match encoded {
        Some(coding) => Err(Fault::Encoded(coding.chars().take(32).collect())),
        None => Ok(()),
    }
}
