//! How a registry comes to answer us: the 401/403 state machine of one request at the registry's own origin.
//!
//! At most three sends: with what is held, bare (an expired token may be answered with somebody else's challenge: Harbor says `Basic`,
//! nvcr.io another realm), and with a new token. Content hosts never enter here. Tokens are kept in `token.rs`, and who may see a
//! password is ruled in `credentials.rs`.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use oci::{Bearer, Challenge, RepositoryName};
use quick_cache::sync::Cache;
use tokio::time::Instant;
use url::Url;

use super::connect::{Door, Lane};
use super::credentials::{self, Credentials};
use super::error::{Failure, Fault, Refused};
use super::exchange::{Call, Reply};
use super::place::{Place, asker};
use super::request::{Ask, Stakes};
use super::token::{Token, Wanted};
use crate::deadline::Deadline;
use crate::names::CredentialId;
use crate::secret::Secret;

const SENDS: u32 = 3;
const SCOPES: usize = 8;
const REMEMBERED: usize = 4096;
/// A registry that kept silent for so long counts as down, even if the request had no more time to give.
const SILENCE: Duration = Duration::from_secs(5);

/// What a registry has taught us about asking it, so that the next request can carry a token at once.
#[derive(Debug)]
pub(super) struct Learned {
    challenge: Mutex<Option<Challenge>>,
    manners: Cache<RepositoryName, Manner>,
    /// Whether it ever answered without any authorization. If so, an unknown repository is asked bare first: what it shows then is
    /// public, which an answer under credentials would hide.
    answers_bare: AtomicBool,
}

/// How a repository wants to be asked.
#[derive(Clone, Debug)]
enum Manner {
    Bare,
    Scopes(Arc<[String]>),
}

/// One request's dealings with the registry.
#[derive(Debug)]
pub(super) struct Session<'a> {
    place: &'a Place,
    pub(super) door: &'a Door,
    pub(super) ask: &'a Ask,
    pub(super) deadline: Deadline,
    /// Whom it may speak for, if anyone.
    credentials: Option<Arc<Credentials>>,
    carried: Carried,
    /// The one new token (or password) of this session was asked for.
    spent: Spent,
    /// The registry itself said 401 to our password.
    password_refused: bool,
}

#[derive(Clone, Debug)]
enum Carried {
    Nothing,
    Password,
    Token(Token),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spent {
    Nothing,
    Token,
    TokenAndScope,
}

impl Learned {
    pub(super) fn new() -> Self {
        Self {
            challenge: Mutex::default(),
            manners: Cache::new(REMEMBERED),
            answers_bare: AtomicBool::new(false),
        }
    }

    fn challenge(&self) -> Option<Challenge> {
        self.challenge.lock().ok()?.clone()
    }

    fn learn(&self, challenge: &Challenge) {
        if let Ok(mut held) = self.challenge.lock() {
            *held = Some(challenge.clone());
        }
    }
}

impl<'a> Session<'a> {
    pub(super) async fn new(
        place: &'a Place,
        door: &'a Door,
        ask: &'a Ask,
        deadline: Deadline,
    ) -> Result<Self, Failure> {
        Ok(Self {
            place,
            door,
            ask,
            deadline,
            credentials: place.credentials(ask).await?,
            carried: Carried::Nothing,
            spent: Spent::Nothing,
            password_refused: false,
        })
    }

    /// Whose rights the answers were given for.
    pub(super) fn credential(&self) -> CredentialId {
        match &self.carried {
            Carried::Nothing => CredentialId::anonymous(),
            Carried::Password => self.own_credential(),
            Carried::Token(token) => token.credential().clone(),
        }
    }

    fn own_credential(&self) -> CredentialId {
        self.credentials
            .as_ref()
            .map_or_else(CredentialId::anonymous, |held| held.id.clone())
    }

    /// Whom a refusal of the last answer meant.
    pub(super) fn refused(&self) -> Refused {
        match (self.credentials.is_some(), self.spent) {
            (true, _) if self.password_refused => Refused::Login,
            (true, Spent::Token | Spent::TokenAndScope) => Refused::Rights,
            (true, Spent::Nothing) if !self.credential().is_anonymous() => Refused::Rights,
            (true | false, _) => Refused::Anonymous,
        }
    }

    /// Picks up what the registry is known to want, before the first send.
    pub(super) async fn prepare(&mut self) -> Result<(), Failure> {
        let manner = self.place.learned.manners.get(&self.ask.repository);
        let known = manner.is_some();
        let scopes = match manner {
            Some(Manner::Bare) => return Ok(()),
            Some(Manner::Scopes(scopes)) => scopes.to_vec(),
            None if self.place.learned.answers_bare.load(Ordering::Relaxed) => return Ok(()),
            None => vec![oci::pull_scope(&self.ask.repository)],
        };
        match self.place.learned.challenge() {
            Some(Challenge::Bearer(bearer)) => {
                match self.token(&bearer, scopes).await {
                    Ok(token) => self.carried = Carried::Token(token),
                    // Of this repository it is known what a bare request would be told, each time.
                    Err(failure) if known && matches!(failure.fault, Fault::RateLimited { .. }) => {
                        return Err(failure);
                    }
                    // Any other failure is no verdict: the bare request may be answered, or name another realm.
                    Err(_failure) => {}
                }
            }
            Some(Challenge::Basic { .. }) if self.credentials.is_some() => {
                self.carried = Carried::Password;
            }
            Some(Challenge::Basic { .. } | Challenge::Other { .. }) | None => {}
        }
        Ok(())
    }

    /// Asks for `url`, which lies at the registry's own origin. What comes back is its last word, a refusal too.
    pub(super) async fn send(&mut self, url: &Url) -> Result<Reply, Failure> {
        let mut sends = 1;
        loop {
            let reply = self.exchange(self.call(url)).await?;
            let refused = matches!(reply.status(), 401 | 403);
            if !refused {
                self.note_success(&reply);
            }
            if !refused || sends == SENDS || !self.answer(&reply).await? {
                return Ok(reply);
            }
            sends += 1;
        }
    }

    /// Reacts to a refusal; says whether asking again makes sense.
    async fn answer(&mut self, reply: &Reply) -> Result<bool, Failure> {
        let challenges = Challenge::parse_all(reply.headers("www-authenticate"));
        let challenge = Challenge::choose(&challenges);
        if reply.status() == 403 {
            return self.widen(challenge).await;
        }
        let fresh = self.spent != Spent::Nothing;
        match std::mem::replace(&mut self.carried, Carried::Nothing) {
            Carried::Token(token) => {
                self.place.tokens.forget(&token);
                return Ok(!fresh);
            }
            Carried::Password => {
                self.password_refused = true;
                return Ok(!fresh);
            }
            Carried::Nothing if fresh => return Ok(false),
            Carried::Nothing => {}
        }
        let challenge = match challenge {
            Some(challenge) => Some(challenge.clone()),
            None => self.learned_challenge().await,
        };
        self.acquire(challenge).await
    }

    /// A 403 is final, unless it says that the token's scope was too small: then once more with the scope it names.
    async fn widen(&mut self, challenge: Option<&Challenge>) -> Result<bool, Failure> {
        let Some(Challenge::Bearer(bearer)) = challenge else {
            return Ok(false);
        };
        let too_small = bearer.error.as_deref() == Some("insufficient_scope");
        if !too_small || self.spent == Spent::TokenAndScope {
            return Ok(false);
        }
        if let Carried::Token(token) = &self.carried {
            self.place.tokens.forget(token);
        }
        self.acquire(challenge.cloned()).await?;
        self.spent = Spent::TokenAndScope;
        Ok(true)
    }

    /// Gets what `challenge` asks for; says whether there is something new to send.
    async fn acquire(&mut self, challenge: Option<Challenge>) -> Result<bool, Failure> {
        self.spent = Spent::Token;
        let Some(challenge) = challenge else {
            return Ok(false);
        };
        self.place.learned.learn(&challenge);
        match &challenge {
            Challenge::Bearer(bearer) => {
                let scopes = scopes(bearer.scope.as_deref(), &self.ask.repository);
                let manner = Manner::Scopes(scopes.clone().into());
                self.place
                    .learned
                    .manners
                    .insert(self.ask.repository.clone(), manner);
                self.carried = Carried::Token(self.token(bearer, scopes).await?);
                Ok(true)
            }
            Challenge::Basic { .. } if self.credentials.is_some() => {
                self.carried = Carried::Password;
                Ok(true)
            }
            Challenge::Basic { .. } | Challenge::Other { .. } => Ok(false),
        }
    }

    async fn token(&self, bearer: &Bearer, scopes: Vec<String>) -> Result<Token, Failure> {
        let base = &self.place.url;
        let realm = realm(self.door, base, &bearer.realm)?;
        let shown = credentials::may_see(base, &realm, &self.place.token_realms);
        let wanted = Wanted {
            credentials: self.credentials.clone().filter(|_| shown),
            service: bearer.service.clone(),
            realm,
            scopes,
        };
        let tokens = &self.place.tokens;
        tokens
            .get(wanted, &self.place.wire, self.door, self.deadline)
            .await
    }

    /// For a 401 without a challenge (GCR has sent such): what the registry said before, or says at its root.
    async fn learned_challenge(&self) -> Option<Challenge> {
        if let Some(challenge) = self.place.learned.challenge() {
            return Some(challenge);
        }
        let mut url = self.place.url.clone();
        url.set_path(&format!("{}/v2/", url.path().trim_end_matches('/')));
        let call = Call {
            method: reqwest::Method::GET,
            kind: "ping",
            lane: Lane::Small,
            range: None,
            authorization: None,
            ..self.call(&url)
        };
        let reply = self.exchange(call).await.ok()?;
        let challenges = Challenge::parse_all(reply.headers("www-authenticate"));
        Challenge::choose(&challenges).cloned()
    }

    fn note_success(&self, reply: &Reply) {
        if matches!(self.carried, Carried::Nothing) && reply.status() < 400 {
            let learned = &self.place.learned;
            learned.answers_bare.store(true, Ordering::Relaxed);
            let repository = self.ask.repository.clone();
            learned.manners.insert(repository, Manner::Bare);
        }
    }

    fn call(&self, url: &Url) -> Call {
        Call {
            authorization: self.authorization(),
            ..self.ask.call(url.clone())
        }
    }

    fn authorization(&self) -> Option<Secret> {
        match &self.carried {
            Carried::Nothing => None,
            Carried::Password => self.credentials.as_ref().map(|held| held.basic()),
            Carried::Token(token) => Some(token.bearer()),
        }
    }

    /// One exchange with the registry, told to its breakers and its gate.
    async fn exchange(&self, call: Call) -> Result<Reply, Failure> {
        let (place, asker) = (self.place, asker(self.ask));
        let needed = self.ask.stakes == Stakes::Needed;
        let began = Instant::now();
        let reply = match place.wire.send(self.door, call, self.deadline).await {
            Ok(reply) => reply,
            Err(fault) => {
                let silent = fault == Fault::Late && began.elapsed() >= SILENCE;
                let silent = silent || matches!(fault, Fault::Connect(_));
                if silent && needed {
                    place.breakers.silent(&asker, Instant::now());
                }
                return Err(fault.into());
            }
        };
        match reply.status() {
            500.. if needed => place.breakers.failed(&asker, Instant::now()),
            500.. => {}
            _ => place.breakers.answered(&asker),
        }
        place.note_rate(&reply, &self.credential());
        if reply.status() == 429 && needed {
            let retry_after = place.close(&reply, &self.credential());
            return Err(Fault::RateLimited { retry_after }.into());
        }
        Ok(reply)
    }
}

/// The token endpoint that a challenge met at `at` names, if we may go there.
pub(super) fn realm(door: &Door, at: &Url, named: &str) -> Result<Url, Fault> {
    let forbidden = |why: &str| Fault::Forbidden(format!("the token endpoint {why}"));
    let realm = at
        .join(named)
        .map_err(|_invalid| forbidden("has an unreadable URL"))?;
    if !matches!(realm.scheme(), "http" | "https") {
        return Err(forbidden("is neither http nor https"));
    }
    if at.scheme() == "https" && realm.scheme() == "http" {
        return Err(forbidden("of an https registry is http"));
    }
    if !realm.username().is_empty() || realm.password().is_some() {
        return Err(forbidden("has user information in its URL"));
    }
    door.rules
        .admit(at, &realm, named)
        .map_err(|refusal| Fault::Forbidden(refusal.to_string()))?;
    Ok(realm)
}

/// The scopes to ask for: those of the challenge that name this repository, as they stand, or pull alone.
fn scopes(challenged: Option<&str>, repository: &RepositoryName) -> Vec<String> {
    let named: Vec<String> = challenged
        .unwrap_or_default()
        .split_ascii_whitespace()
        .filter(|scope| names(scope, repository.as_str()))
        .take(SCOPES)
        .map(str::to_owned)
        .collect();
    if named.is_empty() {
        vec![oci::pull_scope(repository)]
    } else {
        named
    }
}

/// Whether `scope` (`type:name:actions`) names `repository`, perhaps with a prefix that a registry behind a path prepends. The name may
/// hold a `host:port`, so the type is split off from the left and the actions from the right.
fn names(scope: &str, repository: &str) -> bool {
    let Some((_type, rest)) = scope.split_once(':') else {
        return false;
    };
    let Some((name, _actions)) = rest.rsplit_once(':') else {
        return false;
    };
    match name.strip_suffix(repository) {
        Some(before) => before.is_empty() || before.ends_with('/'),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::scopes;

    #[test]
    fn scopes_go_as_challenged_when_they_name_the_repository() {
        let repository = "lib/app".parse().unwrap();
        for (challenged, sent) in [
            (
                Some("repository:lib/app:pull,push"),
                vec!["repository:lib/app:pull,push"],
            ),
            (
                Some("repository:other:pull repository:lib/app:pull"),
                vec!["repository:lib/app:pull"],
            ),
            (
                Some("repository:host:5000/lib/app:pull"),
                vec!["repository:host:5000/lib/app:pull"],
            ),
            (
                Some("repository:other:pull"),
                vec!["repository:lib/app:pull"],
            ),
            (
                Some("repository:xlib/app:pull"),
                vec!["repository:lib/app:pull"],
            ),
            (Some("registry:catalog:*"), vec!["repository:lib/app:pull"]),
            (Some(""), vec!["repository:lib/app:pull"]),
            (Some("nonsense"), vec!["repository:lib/app:pull"]),
            (None, vec!["repository:lib/app:pull"]),
        ] {
            assert_eq!(scopes(challenged, &repository), sent, "{challenged:?}");
        }
    }
}
