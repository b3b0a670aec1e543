//! Every failure of the floors below, turned into the answer a client gets: one exhaustive match for each.
//!
//! Which status matters to clients: containerd retries 503 and never 502; Docker stops on DENIED and prints a hint to log in; a
//! 401 makes a client send us its credentials, so there is one only where that is wanted.

use std::time::Duration;

use oci::{ErrorCode, ManifestError, RouteError};

use super::doorman;
use super::problem::{Problem, Status};
use crate::cache::warm::WarmError;
use crate::cache::{CacheError, Fault, FillError, UpstreamError};
use crate::names::Source;
use crate::policy::{Refusal, Unknown};

/// What clients are told to wait when nobody told us.
const SOON: Duration = Duration::from_secs(5);

/// The same while an operator has switched asking off: that may take a while.
const SWITCHED_OFF: Duration = Duration::from_mins(1);

/// Retry-After values are spread over this many seconds, so that a herd does not come back as one.
const SPREAD: u64 = 5;

/// A path that is no route.
pub fn of_route(error: &RouteError) -> Problem {
    let status = if error.status() == 400 {
        Status::BadRequest
    } else {
        Status::NotFound
    };
    Problem::new(status, error.code(), error.to_string())
}

/// A name that leads nowhere.
pub fn of_name(unknown: &Unknown) -> Problem {
    let message = unknown.to_string();
    match unknown {
        Unknown::Upstream { .. } | Unknown::NoRepository(_) | Unknown::NoDefault(_) => {
            Problem::not_found(ErrorCode::NameUnknown, message)
        }
        Unknown::Illegal(_) => Problem::bad_request(ErrorCode::NameInvalid, message),
    }
}

/// The rules say no.
pub fn of_refusal(refusal: Refusal) -> Problem {
    match refusal {
        Refusal::LogIn => doorman::unauthorized(&refusal.to_string()),
        Refusal::Denied | Refusal::NotLicensed(_) => Problem::denied(refusal.to_string()),
    }
}

/// The cache has no answer.
pub fn of_cache(error: &CacheError) -> Problem {
    let message = error.to_string();
    match error {
        CacheError::Unknown { thing, code, .. } => {
            Problem::not_found(code.unwrap_or(thing.code()), message)
        }
        CacheError::NotHeld { thing, .. } | CacheError::NotKept { thing, .. } => {
            Problem::not_found(thing.code(), message)
        }
        CacheError::Denied { .. } | CacheError::NotPublic { .. } => Problem::denied(message),
        CacheError::LogIn { .. } => doorman::unauthorized(&message),
        CacheError::Upstream(error) => of_upstream(error),
        CacheError::Fill(error) => of_fill(error),
        CacheError::BadManifest {
            why: ManifestError::Schema1,
            ..
        } => Problem::not_found(ErrorCode::ManifestUnknown, message),
        CacheError::BadManifest { .. } | CacheError::WrongDigest { .. } => {
            Problem::bad_gateway(ErrorCode::ManifestInvalid, message)
        }
        CacheError::BadList { .. } => Problem::bad_gateway(ErrorCode::Unavailable, message),
        CacheError::Late => Problem::gateway_timeout(message),
        CacheError::Stopping | CacheError::Disk => Problem::unavailable(message, SOON),
    }
}

/// An image was not fetched ahead.
pub fn of_warm(error: &WarmError) -> Problem {
    let message = error.to_string();
    match error {
        WarmError::Cache(error) => of_cache(error),
        WarmError::GaveWay => Problem::too_many_requests(message, SWITCHED_OFF),
        WarmError::NoPlatform { .. } => Problem::not_found(ErrorCode::ManifestUnknown, message),
        WarmError::TooMany => Problem::bad_gateway(ErrorCode::ManifestInvalid, message),
        WarmError::Stopping => Problem::unavailable(message, SOON),
    }
}

fn of_fill(error: &FillError) -> Problem {
    match error {
        FillError::Upstream(error) => of_upstream(error),
        FillError::Mismatch { .. } => {
            Problem::bad_gateway(ErrorCode::BlobUnknown, error.to_string())
        }
        FillError::Pieces(_) | FillError::Busy { .. } | FillError::Parked | FillError::Stopping => {
            Problem::unavailable(error.to_string(), Duration::from_secs(1))
        }
    }
}

fn of_upstream(error: &UpstreamError) -> Problem {
    let message = error.to_string();
    let later = error.retry_after().unwrap_or(SOON);
    match error.fault() {
        Fault::NotFound { .. } => Problem::not_found(ErrorCode::NameUnknown, message),
        Fault::Denied { .. } => Problem::denied(message),
        Fault::RateLimited { retry_after } => Problem::too_many_requests(message, *retry_after),
        Fault::Offline => Problem::unavailable(message, SWITCHED_OFF),
        Fault::BreakerOpen { retry_after } => Problem::unavailable(message, *retry_after),
        Fault::Late | Fault::Stalled => Problem::gateway_timeout(message),
        Fault::Connect(_) | Fault::Broken(_) | Fault::TokenFailed(_) => {
            Problem::unavailable(message, later)
        }
        Fault::Status(_) if error.is_outage() => Problem::unavailable(message, later),
        Fault::Status(_)
        | Fault::RangeRefused
        | Fault::Expired
        | Fault::BadRedirect(_)
        | Fault::Forbidden(_)
        | Fault::TooLarge
        | Fault::Encoded(_) => Problem::bad_gateway(ErrorCode::Unavailable, message),
    }
}

/// Adds the likely reason where a repository that is not there is called `v2/…`: containerd puts its own `/v2` behind a host's path.
pub fn hinted(problem: Problem, source: &Source) -> Problem {
    let doubled = source.repository.as_str().starts_with("v2/");
    if doubled && problem.status() == Status::NotFound {
        return problem.with_hint(
            "the path holds /v2 twice: is override_path = true missing in the client's hosts.toml?",
        );
    }
    problem
}

/// Spreads a problem's Retry-After by the client's port, which differs from connection to connection.
pub fn jittered(problem: Problem, port: u16) -> Problem {
    match problem.wait() {
        Some(wait) => {
            let later = Duration::from_secs(u64::from(port) % SPREAD);
            problem
                .retry_after((wait + later).clamp(Duration::from_secs(1), Duration::from_mins(5)))
        }
        None => problem,
    }
}
