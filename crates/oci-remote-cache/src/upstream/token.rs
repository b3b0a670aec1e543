//! Bearer tokens: fetched once for many, kept in memory only, never used past their life.
//!
//! The cache's key holds the credential, so that one identity never sees another's token; lifetimes run on the monotonic clock, because
//! the wall clock may be set back. Which challenge to answer, and whether credentials may be shown, is decided in `auth.rs`.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use tokio::time::Instant;
use url::{Url, form_urlencoded};

use super::connect::{Door, Lane};
use super::credentials::Credentials;
use super::error::{Failure, Fault, Refused};
use super::exchange::{Call, Reply, Whole, Wire};
use super::rate::{self, RealmGates};
use super::redirect::{Origin, Trail};
use super::retry::{Decision, Tries};
use crate::clock::Timestamp;
use crate::deadline::Deadline;
use crate::names::CredentialId;
use crate::secret::Secret;

/// The life of a token whose endpoint does not say (the token specification's default).
const UNSAID: Duration = Duration::from_mins(1);
const LONGEST: Duration = Duration::from_hours(1);
/// How long a failure is shared: enough for a storm, too short to be remembered.
const FAILURE_FOR: Duration = Duration::from_secs(1);
const FETCH_LIMIT: Duration = Duration::from_secs(15);
const BODY_LIMIT: usize = 1 << 20;
/// From how many keys on dead entries are swept.
const SWEEP_FROM: usize = 1024;
/// How many keys are held at most.
const MOST: usize = 8192;
const CLIENT_ID: &str = "oci-remote-cache";

/// A token and whose rights it carries.
#[derive(Clone, Debug)]
pub(super) struct Token {
    text: Secret,
    credential: CredentialId,
    serial: u64,
}

/// What token is wanted, and from where.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) realm: Url,
    pub(super) service: Option<String>,
    pub(super) scopes: Vec<String>,
    /// Only if the realm may see them.
    pub(super) credentials: Option<Arc<Credentials>>,
}

/// All tokens of one upstream.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    slots: Mutex<HashMap<Key, Slot>>,
    serials: AtomicU64,
    limits: RealmGates,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    credential: CredentialId,
    realm: String,
    service: Option<String>,
    scopes: Vec<String>,
}

enum Slot {
    /// Being fetched since a moment; any waiter drives it, so that a leader's leaving stops nobody.
    Fetching(u64, Flight, Instant),
    Ready(Token, Instant),
    Failed(Failure, Instant),
}

type Flight = Shared<BoxFuture<'static, Result<Fresh, Failure>>>;

/// A token just received, and how long it may be used; nothing means once.
#[derive(Clone, Debug)]
struct Fresh {
    token: Token,
    usable: Option<Duration>,
}

/// What a lookup finds.
enum Found {
    Settled(Result<Token, Failure>),
    InFlight(u64, Flight),
}

impl Token {
    /// The `Authorization` value.
    pub(super) fn bearer(&self) -> Secret {
        Secret::new(format!("Bearer {}", self.text.expose()))
    }

    /// Whose rights it carries: nobody's if it was fetched without credentials.
    pub(super) fn credential(&self) -> &CredentialId {
        &self.credential
    }
}

impl Tokens {
    /// A token as `wanted`: one that is held, or the result of a fetch that all who want the same share.
    pub(super) async fn get(
        &self,
        wanted: Wanted,
        wire: &Wire,
        door: &Door,
        deadline: Deadline,
    ) -> Result<Token, Failure> {
        let key = Key::of(&wanted);
        let (serial, flight) = match self.find(&key, wanted, wire, door) {
            Found::Settled(result) => return result,
            Found::InFlight(serial, flight) => (serial, flight),
        };
        let Ok(result) = deadline.run(flight).await else {
            return Err(Fault::TokenFailed("no answer in time".into()).into());
        };
        self.settle(key, serial, &result);
        result.map(|fresh| fresh.token)
    }

    /// Forgets `token` because it was refused. Only this very token: a storm that holds it must not drop its successor.
    pub(super) fn forget(&self, token: &Token) {
        if let Ok(mut slots) = self.slots.lock() {
            slots.retain(
                |_key, slot| !matches!(slot, Slot::Ready(held, _) if held.serial == token.serial),
            );
        }
    }

    fn find(&self, key: &Key, wanted: Wanted, wire: &Wire, door: &Door) -> Found {
        let Ok(mut slots) = self.slots.lock() else {
            let broken = Fault::TokenFailed("the token cache is broken".into());
            return Found::Settled(Err(broken.into()));
        };
        let now = Instant::now();
        match slots.get(key) {
            Some(Slot::Ready(token, until)) if now < *until => {
                return Found::Settled(Ok(token.clone()));
            }
            Some(Slot::Failed(failure, until)) if now < *until => {
                return Found::Settled(Err(failure.clone()));
            }
            // An old flight is one that everybody left; its own time is over, and so is its use.
            Some(Slot::Fetching(serial, flight, since)) if now < *since + FETCH_LIMIT => {
                return Found::InFlight(*serial, flight.clone());
            }
            _ => {}
        }
        if let Some(retry_after) = self.limits.closed_for(&key.endpoint(), now) {
            return Found::Settled(Err(Fault::RateLimited { retry_after }.into()));
        }
        if slots.len() >= SWEEP_FROM {
            slots.retain(|_key, slot| slot.is_of_use(now));
        }
        if slots.len() >= MOST {
            // Somebody asks for thousands of repositories: rather fetch again than grow.
            slots.retain(|_key, slot| matches!(slot, Slot::Fetching(..)));
        }
        let serial = self.serials.fetch_add(1, Ordering::Relaxed);
        let (wire, door) = (wire.clone(), door.clone());
        let flight: Flight = async move { fetch(&wanted, serial, &wire, &door).await }
            .boxed()
            .shared();
        let slot = Slot::Fetching(serial, flight.clone(), now);
        slots.insert(key.clone(), slot);
        Found::InFlight(serial, flight)
    }

    /// Puts a flight's result in its place, unless somebody has already.
    fn settle(&self, key: Key, serial: u64, result: &Result<Fresh, Failure>) {
        let Ok(mut slots) = self.slots.lock() else {
            return;
        };
        if !matches!(slots.get(&key), Some(Slot::Fetching(running, ..)) if *running == serial) {
            return;
        }
        let now = Instant::now();
        match result {
            Ok(Fresh {
                token,
                usable: Some(usable),
            }) => slots.insert(key, Slot::Ready(token.clone(), now + *usable)),
            Ok(Fresh { usable: None, .. }) => slots.remove(&key),
            Err(Failure {
                fault: Fault::RateLimited { retry_after },
                ..
            }) => {
                // It is the endpoint that wants to be left alone, whatever is asked of it.
                self.limits.close(key.endpoint(), *retry_after, now);
                slots.remove(&key)
            }
            Err(failure) => slots.insert(key, Slot::Failed(failure.clone(), now + FAILURE_FOR)),
        };
    }
}

impl Key {
    fn of(wanted: &Wanted) -> Self {
        let mut scopes = wanted.scopes.clone();
        scopes.sort_unstable();
        Self {
            credential: wanted.credential(),
            realm: wanted.realm.to_string(),
            service: wanted.service.clone(),
            scopes,
        }
    }

    /// Whom a rate limit of the endpoint is for.
    fn endpoint(&self) -> (CredentialId, String) {
        (self.credential.clone(), self.realm.clone())
    }
}

impl Slot {
    fn is_of_use(&self, now: Instant) -> bool {
        match self {
            Self::Fetching(_, _, since) => now < *since + FETCH_LIMIT,
            Self::Ready(_, until) | Self::Failed(_, until) => now < *until,
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fetching(..) => "Fetching",
            Self::Ready(..) => "Ready",
            Self::Failed(..) => "Failed",
        })
    }
}

impl Wanted {
    fn credential(&self) -> CredentialId {
        self.credentials
            .as_ref()
            .map_or_else(CredentialId::anonymous, |held| held.id.clone())
    }

    /// The GET of the token specification: one `scope` parameter for each scope, the wanted one first.
    fn get_call(&self) -> Call {
        let mut url = self.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.service {
                query.append_pair("service", service);
            }
            for scope in &self.scopes {
                query.append_pair("scope", scope);
            }
            query.append_pair("client_id", CLIENT_ID);
            if let Some(credentials) = &self.credentials {
                query.append_pair("account", &credentials.username);
            }
        }
        Call {
            authorization: self.credentials.as_ref().map(|held| held.basic()),
            ..Self::call(url)
        }
    }

    /// The POST by which a refresh token is exchanged (`OAuth2`); nothing when what we hold is a password, or nothing.
    fn post_call(&self) -> Option<Call> {
        let credentials = self.credentials.as_ref()?;
        if !credentials.is_refresh_token() {
            return None;
        }
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", "refresh_token")
            .append_pair("client_id", CLIENT_ID)
            .append_pair("scope", &self.scopes.join(" "))
            .append_pair("refresh_token", credentials.password.expose());
        if let Some(service) = &self.service {
            form.append_pair("service", service);
        }
        Some(Call {
            method: reqwest::Method::POST,
            form: Some(Secret::new(form.finish())),
            ..Self::call(self.realm.clone())
        })
    }

    fn call(url: Url) -> Call {
        Call {
            method: reqwest::Method::GET,
            url,
            kind: "token",
            lane: Lane::Small,
            accept: "application/json".to_owned(),
            range: None,
            authorization: None,
            form: None,
        }
    }
}

/// Fetches a token, trying again where a moment may help. A rate limit is waited for by who wants the token, if at all.
async fn fetch(wanted: &Wanted, serial: u64, wire: &Wire, door: &Door) -> Result<Fresh, Failure> {
    let deadline = Deadline::after(FETCH_LIMIT);
    let mut tries = Tries::new();
    let reply = loop {
        let failure = match ask(wanted, wire, door, deadline).await {
            Ok(reply) => break reply,
            Err(failure) => failure,
        };
        if matches!(failure.fault, Fault::RateLimited { .. }) {
            return Err(failure);
        }
        match tries.after(&failure, deadline.remaining()) {
            Decision::Again(pause) => tokio::time::sleep(pause).await,
            Decision::GiveUp => return Err(as_token_fault(failure)),
        }
    };
    let read = deadline.run(reply.head_of_body(BODY_LIMIT)).await;
    let failed = |why: &str| Failure::from(Fault::TokenFailed(why.to_owned()));
    let (body, whole) = read.map_err(|_late| failed("its answer came too slowly"))?;
    if let Whole::No(why) = whole {
        return Err(failed(&format!("{why}, its answer")));
    }
    let (text, usable) = parse(&body, wire.clock.now()).map_err(failed)?;
    Ok(Fresh {
        token: Token {
            text,
            credential: wanted.credential(),
            serial,
        },
        usable,
    })
}

/// One try: POST where that is the way, else (or where the endpoint does not know POST) GET. Only 200 is a reply.
async fn ask(
    wanted: &Wanted,
    wire: &Wire,
    door: &Door,
    deadline: Deadline,
) -> Result<Reply, Failure> {
    if let Some(call) = wanted.post_call() {
        let reply = wire.send(door, call, deadline).await?;
        if !matches!(reply.status(), 400 | 401 | 404 | 405) {
            return judged(reply, wanted, wire);
        }
    }
    let mut reply = wire.send(door, wanted.get_call(), deadline).await?;
    let mut trail = Trail::from(&reply.url);
    while reply.is_redirect() {
        let location = reply.header("location").unwrap_or_default().to_owned();
        let next = trail.step(&reply.url, &location)?;
        door.rules
            .admit(&reply.url, &next, &location)
            .map_err(|refusal| Fault::Forbidden(refusal.to_string()))?;
        let mut call = Wanted::call(next.clone());
        if Origin::of(&next) == Origin::of(&wanted.realm) && trail.never_left() {
            call.authorization = wanted.credentials.as_ref().map(|held| held.basic());
        }
        reply = wire.send(door, call, deadline).await?;
    }
    judged(reply, wanted, wire)
}

fn judged(reply: Reply, wanted: &Wanted, wire: &Wire) -> Result<Reply, Failure> {
    let retry_after = wire.retry_after(&reply);
    let fault = match reply.status() {
        200 => return Ok(reply),
        status @ (401 | 403) => Fault::Denied {
            status,
            code: None,
            // GitHub's endpoint answers 403 to good credentials for what they do not open.
            refused: match (status, &wanted.credentials) {
                (_, None) => Refused::Anonymous,
                (401, Some(_)) => Refused::Login,
                (_, Some(_)) => Refused::Rights,
            },
        },
        429 => Fault::RateLimited {
            retry_after: retry_after.unwrap_or(rate::UNSAID),
        },
        status => Fault::Status(status),
    };
    Err(Failure { fault, retry_after })
}

/// What failed at the token endpoint is said to have failed there; only its verdicts on us pass as they are.
fn as_token_fault(failure: Failure) -> Failure {
    if matches!(failure.fault, Fault::Denied { .. } | Fault::Forbidden(_)) {
        return failure;
    }
    Failure {
        fault: Fault::TokenFailed(failure.fault.to_string()),
        retry_after: failure.retry_after,
    }
}

/// The token in an endpoint's answer and how long it may be used. `token` wins over `access_token`.
fn parse(body: &[u8], now: Timestamp) -> Result<(Secret, Option<Duration>), &'static str> {
    let answer: serde_json::Value =
        serde_json::from_slice(body).map_err(|_invalid| "its answer is no JSON")?;
    let text = |field: &str| {
        let text = answer.get(field)?.as_str()?;
        (!text.is_empty()).then_some(text)
    };
    let token = text("token")
        .or_else(|| text("access_token"))
        .ok_or("its answer holds no token")?;
    if !token.chars().all(|c| c.is_ascii_graphic()) {
        return Err("its token holds characters that no header may carry");
    }
    let issued_at = answer.get("issued_at").and_then(|at| at.as_str());
    let issued_at = issued_at.and_then(Timestamp::parse_rfc3339);
    let age = issued_at.map_or(Duration::ZERO, |issued_at| issued_at.age(now));
    let usable = usable(answer.get("expires_in"), age);
    Ok((Secret::new(token.to_owned()), usable))
}

/// How long a token may be used by its `expires_in`: nine tenths of its life, which the clock starts on receipt. `age` is what its
/// `issued_at` says has passed of it by then; clocks differ, so that may only shorten it.
fn usable(expires_in: Option<&serde_json::Value>, age: Duration) -> Option<Duration> {
    use serde_json::Value;
    let seconds = match expires_in {
        None | Some(Value::Null) => UNSAID.as_secs(),
        Some(Value::Number(number)) => number.as_u64()?,
        Some(Value::String(text)) => text.trim().parse().ok()?,
        Some(_) => return None,
    };
    let life = Duration::from_secs(seconds)
        .saturating_sub(age)
        .min(LONGEST);
    (!life.is_zero()).then(|| life * 9 / 10)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lifetimes() {
        let missing = usable(None, Duration::ZERO);
        assert_eq!(missing, Some(Duration::from_secs(54)));
        for (value, seconds) in [
            (json!(300), Some(270)),
            (json!("300"), Some(270)),
            (json!(10), Some(9)),
            (json!(1_000_000_000_000_u64), Some(3240)),
            (json!(null), Some(54)),
            (json!(0), None),
            (json!(-1), None),
            (json!(1.5), None),
            (json!("soon"), None),
            (json!([300]), None),
            (json!(true), None),
        ] {
            let read = usable(Some(&value), Duration::ZERO).map(|life| life.as_secs());
            assert_eq!(read, seconds, "{value}");
        }
    }

    #[test]
    fn when_a_token_was_issued_may_only_shorten_its_life() {
        let now = Timestamp::parse_rfc3339("2026-08-21T12:00:00Z").unwrap();
        for (issued_at, seconds) in [
            ("2026-08-21T12:00:00Z", Some(270)),
            ("2026-08-21T11:58:20Z", Some(180)),
            ("2026-08-21T13:58:20.123456+02:00", Some(180)),
            // A clock that is ahead of ours.
            ("2026-08-21T12:30:00Z", Some(270)),
            // Over before it came: good for the request at hand.
            ("2026-08-21T11:55:00Z", None),
            ("2026-08-20T12:00:00Z", None),
            // What Go writes when nobody set it, and what is no time.
            ("0001-01-01T00:00:00Z", Some(270)),
            ("yesterday", Some(270)),
        ] {
            let body = json!({ "token": "t", "expires_in": 300, "issued_at": issued_at });
            let (_, usable) = parse(body.to_string().as_bytes(), now).unwrap();
            assert_eq!(usable.map(|life| life.as_secs()), seconds, "{issued_at}");
        }
    }

    fn wanted(realm: &str, service: Option<&str>, scopes: &[&str], user: Option<&str>) -> Wanted {
        Wanted {
            realm: realm.parse().unwrap(),
            service: service.map(str::to_owned),
            scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
            credentials: user.map(|user| {
                Arc::new(Credentials {
                    id: CredentialId::configured(user),
                    username: user.to_owned(),
                    password: Secret::new("hunter2".to_owned()),
                })
            }),
        }
    }

    #[test]
    fn a_token_is_kept_for_one_credential_realm_service_and_set_of_scopes() {
        let key = |wanted: Wanted| Key::of(&wanted);
        let (realm, scopes) = ("https://auth.example/token", ["a:pull", "b:pull"]);
        let usual = key(wanted(realm, Some("s"), &scopes, Some("alice")));
        let turned = key(wanted(
            realm,
            Some("s"),
            &["b:pull", "a:pull"],
            Some("alice"),
        ));
        assert_eq!(usual, turned, "the order of scopes says nothing");
        for other in [
            wanted("https://auth.example/v2", Some("s"), &scopes, Some("alice")),
            wanted(realm, Some("t"), &scopes, Some("alice")),
            wanted(realm, None, &scopes, Some("alice")),
            wanted(realm, Some("s"), &["a:pull"], Some("alice")),
            wanted(realm, Some("s"), &scopes, Some("bob")),
            wanted(realm, Some("s"), &scopes, None),
        ] {
            assert_ne!(usual, key(other.clone()), "{other:?}");
        }
    }

    #[test]
    fn a_token_is_asked_for_with_the_wanted_scope_first() {
        let asked = wanted(
            "https://auth.example/token?x=y",
            Some("s"),
            &["b:pull", "a:pull"],
            Some("alice"),
        );
        let call = asked.get_call();
        let query: Vec<(String, String)> = call.url.query_pairs().into_owned().collect();
        let wanted = [
            ("x", "y"),
            ("service", "s"),
            ("scope", "b:pull"),
            ("scope", "a:pull"),
            ("client_id", "oci-remote-cache"),
            ("account", "alice"),
        ];
        let wanted = wanted.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(query, wanted);
        assert!(!call.url.as_str().contains("hunter2") && call.authorization.is_some());
        assert!(asked.post_call().is_none(), "a password is not posted");
    }

    #[test]
    fn a_refresh_token_is_posted_with_all_scopes_in_one() {
        let asked = wanted(
            "https://auth.example/token",
            None,
            &["b:pull", "a:pull"],
            Some("<token>"),
        );
        let call = asked.post_call().unwrap();
        let form = call.form.unwrap();
        let sent: Vec<(String, String)> = form_urlencoded::parse(form.expose().as_bytes())
            .into_owned()
            .collect();
        let wanted = [
            ("grant_type", "refresh_token"),
            ("client_id", "oci-remote-cache"),
            ("scope", "b:pull a:pull"),
            ("refresh_token", "hunter2"),
        ];
        let wanted = wanted.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(sent, wanted);
        assert!(call.authorization.is_none() && call.url.query().is_none());
    }

    #[test]
    fn tokens_are_found_and_checked() {
        for (body, token) in [
            (r#"{"token":"a"}"#, Ok("a")),
            (r#"{"access_token":"b"}"#, Ok("b")),
            (r#"{"token":"a","access_token":"b"}"#, Ok("a")),
            (r#"{"token":"","access_token":"b"}"#, Ok("b")),
            (r#"{"token":""}"#, Err(())),
            (r#"{"token":5}"#, Err(())),
            (r#"{"token":"a\r\nx: y"}"#, Err(())),
            (r#"{"token":"a b"}"#, Err(())),
            ("{}", Err(())),
            ("<html>", Err(())),
        ] {
            let read = parse(body.as_bytes(), Timestamp::default());
            let read = read
                .as_ref()
                .map(|(text, _)| text.expose())
                .map_err(|_why| ());
            assert_eq!(read, token, "{body}");
        }
    }
}
