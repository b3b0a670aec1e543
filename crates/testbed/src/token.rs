//! Who may read from a registry: a token service, and the two ways a registry asks for credentials.

use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::exchange::Exchange;
use crate::http::Server;
use crate::lock;
use crate::log::{Entry, form};
use crate::registry::Registry;
use crate::script::Handler;

/// Part of every token that is minted here, so that a log can be searched for all of them at once.
pub const TOKEN_MARK: &str = "s3cr3ts3cr3ts3cr3t";

/// The identity of whoever asks for a token without credentials.
pub const ANONYMOUS: &str = "anonymous";

/// Decides who is answered by a registry.
pub trait Auth: fmt::Debug + Send + Sync {
    /// None when the request is admitted, else the values of the `WWW-Authenticate` lines of the 401.
    fn refuse(&self, exchange: &Exchange) -> Option<Vec<String>>;
}

/// Mints bearer tokens at `/token`; also the [`Server`] that it answers on. Clones are the same service.
#[derive(Clone, Debug)]
pub struct TokenServer {
    server: Server,
    mint: Arc<Mint>,
}

#[derive(Debug, Default)]
struct Mint(Mutex<State>);

struct State {
    expires_in: Option<Value>,
    users: HashMap<String, String>,
    shape: Shape,
    grants: HashMap<String, Grant>,
    requests: Vec<Entry>,
    serial: usize,
    dead_seen: usize,
}

#[derive(Clone)]
struct Grant {
    identity: String,
    scopes: String,
    minted: Instant,
}

type Shape = Arc<dyn Fn(&str) -> Value + Send + Sync>;
type Form = Arc<dyn Fn(&str, &str) -> Vec<String> + Send + Sync>;
type Protects = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// Admits requests that carry a live token for their repository.
#[derive(Clone)]
pub struct Bearer {
    mint: Arc<Mint>,
    realm: String,
    actions: String,
    form: Form,
    protects: Protects,
    lifetime: Option<Duration>,
    identity: Option<String>,
}

/// Admits requests that carry a user's name and password, as ECR and Artifactory want it.
#[derive(Clone)]
pub struct Basic {
    expected: String,
}

impl TokenServer {
    /// At `/token` of a registry.
    pub fn at(registry: &Registry) -> Self {
        let mint = Arc::new(Mint::default());
        registry.mount_tokens(Mint::handler(&mint));
        TokenServer {
            server: registry.server().clone(),
            mint,
        }
    }

    /// On a port of its own.
    pub async fn start() -> Self {
        Self::start_on("127.0.0.1").await
    }

    /// On a port of its own, under another loopback name or address.
    pub async fn start_on(host: &str) -> Self {
        let mint = Arc::new(Mint::default());
        TokenServer {
            server: Server::start_on(host, Mint::handler(&mint)).await,
            mint,
        }
    }

    /// The URL that a challenge names.
    pub fn realm(&self) -> String {
        format!("{}/token", self.server.url())
    }

    /// What answers say of their lifetime: a number, something odd, or nothing. At first 300.
    pub fn set_expires_in(&self, value: Option<Value>) {
        self.mint.change(|state| state.expires_in = value);
    }

    /// Adds a user; others than known ones and nobody are refused with 401.
    pub fn add_user(&self, name: &str, password: &str) {
        self.mint
            .change(|state| state.users.insert(name.to_owned(), password.to_owned()));
    }

    /// What the answer looks like around a token, without `expires_in`. At first `{"token": …}`.
    pub fn set_shape(&self, shape: impl Fn(&str) -> Value + Send + Sync + 'static) {
        self.mint.change(|state| state.shape = Arc::new(shape));
    }

    /// Makes every token so far worthless.
    pub fn revoke_all(&self) {
        self.mint.change(|state| state.grants.clear());
    }

    /// The requests for tokens.
    pub fn token_requests(&self) -> Vec<Entry> {
        self.mint.change(|state| state.requests.clone())
    }

    /// How many tokens were asked for.
    pub fn asked(&self) -> usize {
        self.mint.change(|state| state.requests.len())
    }

    /// How many requests came to a registry with a token that was revoked, outlived or never minted.
    pub fn dead_tokens_seen(&self) -> usize {
        self.mint.change(|state| state.dead_seen)
    }

    /// A token as the service would mint it.
    pub fn mint(&self, identity: &str, scopes: &[&str]) -> String {
        self.mint
            .change(|state| state.mint(identity, &scopes.join(" ")))
    }
}

impl Deref for TokenServer {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

impl Mint {
    fn handler(mint: &Arc<Self>) -> Handler {
        let mint = Arc::clone(mint);
        Handler::new(move |mut exchange| {
            let mint = Arc::clone(&mint);
            async move {
                match mint.answer(&exchange) {
                    Some(body) => exchange.json(200, &body, &[]).await,
                    None => exchange.error(401, "UNAUTHORIZED", &[]).await,
                }
            }
        })
    }

    fn answer(&self, exchange: &Exchange) -> Option<Value> {
        let sent = String::from_utf8_lossy(exchange.body()).into_owned();
        let scopes = [exchange.entry().parameters("scope"), form(&sent, "scope")]
            .concat()
            .join(" ");
        let login = exchange
            .header("authorization")
            .map(basic)
            .or_else(|| in_form(&sent));
        self.change(|state| {
            state.requests.push(exchange.entry().clone());
            let identity = state.identity(login)?;
            let token = state.mint(&identity, &scopes);
            let mut body = (state.shape)(&token);
            if let Some(expires_in) = &state.expires_in {
                body["expires_in"] = expires_in.clone();
            }
            Some(body)
        })
    }

    fn grant(&self, token: &str, lifetime: Option<Duration>) -> Option<Grant> {
        self.change(|state| {
            let alive =
                |grant: &&Grant| lifetime.is_none_or(|lifetime| grant.minted.elapsed() <= lifetime);
            let grant = state.grants.get(token).filter(alive).cloned();
            state.dead_seen += usize::from(grant.is_none());
            grant
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut lock(&self.0))
    }
}

impl State {
    /// Who a login is: nobody in particular without one, None when the password is wrong.
    fn identity(&self, login: Option<(String, String)>) -> Option<String> {
        let Some((user, password)) = login else {
            return Some(ANONYMOUS.to_owned());
        };
        (self.users.get(&user) == Some(&password)).then_some(user)
    }

    fn mint(&mut self, identity: &str, scopes: &str) -> String {
        self.serial += 1;
        let token = format!("tok-{identity}-{:04}-{TOKEN_MARK}", self.serial);
        let grant = Grant {
            identity: identity.to_owned(),
            scopes: scopes.to_owned(),
            minted: Instant::now(),
        };
        self.grants.insert(token.clone(), grant);
        token
    }
}

impl Default for State {
    fn default() -> Self {
        State {
            expires_in: Some(json!(300)),
            users: HashMap::new(),
            shape: Arc::new(|token| json!({"token": token})),
            grants: HashMap::new(),
            requests: Vec::new(),
            serial: 0,
            dead_seen: 0,
        }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("requests", &self.requests.len())
            .finish_non_exhaustive()
    }
}

impl Bearer {
    /// For the tokens of this service, with a usual challenge.
    pub fn of(tokens: &TokenServer) -> Self {
        Bearer {
            mint: Arc::clone(&tokens.mint),
            realm: tokens.realm(),
            actions: "pull".to_owned(),
            form: Arc::new(challenge),
            protects: Arc::new(|_| true),
            lifetime: None,
            identity: None,
        }
    }

    /// Names another realm than the service's own.
    #[must_use]
    pub fn realm(mut self, realm: &str) -> Self {
        realm.clone_into(&mut self.realm);
        self
    }

    /// Asks for these actions, such as `pull,push`.
    #[must_use]
    pub fn actions(mut self, actions: &str) -> Self {
        actions.clone_into(&mut self.actions);
        self
    }

    /// Writes the `WWW-Authenticate` lines from realm and scope.
    #[must_use]
    pub fn form(
        mut self,
        form: impl Fn(&str, &str) -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        self.form = Arc::new(form);
        self
    }

    /// Protects only some repositories (the ping has an empty name).
    #[must_use]
    pub fn protects(mut self, protects: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        self.protects = Arc::new(protects);
        self
    }

    /// Lets tokens die after this time, whatever the service said.
    #[must_use]
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = Some(lifetime);
        self
    }

    /// Admits only this user.
    #[must_use]
    pub fn identity(mut self, identity: &str) -> Self {
        self.identity = Some(identity.to_owned());
        self
    }

    fn admits(&self, exchange: &Exchange) -> bool {
        let Some(token) = exchange
            .header("authorization")
            .and_then(|value| value.strip_prefix("Bearer "))
        else {
            return false;
        };
        let Some(grant) = self.mint.grant(token, self.lifetime) else {
            return false;
        };
        let repo = &exchange.entry().repo;
        let in_scope = grant
            .scopes
            .split(' ')
            .any(|scope| scope.contains(&format!(":{repo}:")));
        self.identity
            .as_ref()
            .is_none_or(|identity| *identity == grant.identity)
            && (repo.is_empty() || grant.scopes.is_empty() || in_scope)
    }
}

impl Auth for Bearer {
    fn refuse(&self, exchange: &Exchange) -> Option<Vec<String>> {
        let repo = &exchange.entry().repo;
        if !(self.protects)(repo) || self.admits(exchange) {
            return None;
        }
        let scope = if repo.is_empty() {
            String::new()
        } else {
            format!("repository:{repo}:{}", self.actions)
        };
        Some((self.form)(&self.realm, &scope))
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bearer")
            .field("realm", &self.realm)
            .finish_non_exhaustive()
    }
}

impl Basic {
    /// For one user.
    pub fn of(user: &str, password: &str) -> Self {
        Basic {
            expected: format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))),
        }
    }
}

impl Auth for Basic {
    fn refuse(&self, exchange: &Exchange) -> Option<Vec<String>> {
        let admitted = exchange.header("authorization") == Some(&self.expected);
        (!admitted).then(|| vec!["Basic realm=\"testbed\"".to_owned()])
    }
}

impl fmt::Debug for Basic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Basic")
    }
}

/// The usual challenge.
pub fn challenge(realm: &str, scope: &str) -> Vec<String> {
    vec![format!(
        "Bearer realm=\"{realm}\",service=\"testbed\",scope=\"{scope}\""
    )]
}

/// The login of an `Authorization: Basic` header; one that cannot be read is a login nobody has.
fn basic(value: &str) -> (String, String) {
    let encoded = value.split_once(' ').map_or(value, |(_, rest)| rest);
    let plain = STANDARD
        .decode(encoded)
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .unwrap_or_default();
    let (user, password) = plain.split_once(':').unwrap_or_default();
    (user.to_owned(), password.to_owned())
}

/// The login of a form by the OAuth 2 password grant.
fn in_form(sent: &str) -> Option<(String, String)> {
    let user = form(sent, "username").into_iter().next()?;
    let password = form(sent, "password")
        .into_iter()
        .next()
        .unwrap_or_default();
    Some((user, password))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Request, get, request};
    use crate::image::ImageSpec;

    const PATH: &str = "/v2/lib/app/manifests/v1";

    async fn protected() -> (Registry, TokenServer) {
        let registry = Registry::start().await;
        registry.put_image(&ImageSpec::new("lib/app", "v1"));
        let tokens = TokenServer::at(&registry);
        (registry, tokens)
    }

    async fn token(tokens: &TokenServer, scope: &str, authorization: Option<&str>) -> Value {
        let ask = Request::get(&format!("/token?service=s&scope={scope}"));
        let ask = authorization
            .into_iter()
            .fold(ask, |ask, value| ask.header("Authorization", value));
        ask.send(tokens.port()).await.json()
    }

    #[tokio::test]
    async fn a_token_opens_its_repository_until_it_is_revoked() {
        let (registry, tokens) = protected().await;
        registry.require(Bearer::of(&tokens).actions("pull,push"));
        let refused = get(registry.port(), PATH, &[]).await;
        let expected = challenge(&tokens.realm(), "repository:lib/app:pull,push");
        assert_eq!(
            (refused.status, refused.all("www-authenticate")),
            (401, vec![expected[0].as_str()])
        );

        let body = token(&tokens, "repository%3Alib/app%3Apull", None).await;
        assert_eq!(body["expires_in"], 300);
        let bearer = format!("Bearer {}", body["token"].as_str().expect("a token"));
        assert!(
            get(registry.port(), PATH, &[("Authorization", &bearer)])
                .await
                .is_whole()
        );
        assert_eq!(
            get(
                registry.port(),
                "/v2/other/manifests/v1",
                &[("Authorization", &bearer)]
            )
            .await
            .status,
            401
        );
        tokens.revoke_all();
        assert_eq!(
            get(registry.port(), PATH, &[("Authorization", &bearer)])
                .await
                .status,
            401
        );
        assert_eq!((tokens.asked(), tokens.dead_tokens_seen()), (1, 1));
    }

    #[tokio::test]
    async fn an_identity_may_be_required() {
        let (registry, tokens) = protected().await;
        tokens.add_user("robot", "hunter2");
        tokens.set_expires_in(None);
        tokens.set_shape(|token| json!({"access_token": token}));
        registry.require(
            Bearer::of(&tokens)
                .identity("robot")
                .protects(|repo| !repo.is_empty()),
        );
        assert_eq!(get(registry.port(), "/v2/", &[]).await.status, 200);

        let anonymous = token(&tokens, "repository:lib/app:pull", None).await;
        assert_eq!(anonymous.get("expires_in"), None);
        for (login, status) in [(None, 401), (Some("Basic cm9ib3Q6aHVudGVyMg=="), 200)] {
            let body = token(&tokens, "repository:lib/app:pull", login).await;
            let bearer = format!("Bearer {}", body["access_token"].as_str().expect("a token"));
            assert_eq!(
                get(registry.port(), PATH, &[("Authorization", &bearer)])
                    .await
                    .status,
                status
            );
        }
        let wrong = request(
            "GET",
            tokens.port(),
            "/token",
            &[("Authorization", "Basic cm9ib3Q6bm8=")],
        )
        .await;
        assert_eq!(wrong.status, 401);
    }

    #[tokio::test]
    async fn basic_wants_its_user() {
        let (registry, _tokens) = protected().await;
        registry.require(Basic::of("robot", "hunter2"));
        assert_eq!(
            get(registry.port(), PATH, &[])
                .await
                .header("www-authenticate"),
            Some("Basic realm=\"testbed\"")
        );
        let login = ("Authorization", "Basic cm9ib3Q6aHVudGVyMg==");
        assert!(get(registry.port(), PATH, &[login]).await.is_whole());
    }
}
