//! Whether clients are who they say: passwords of an htpasswd file, static tokens, certificates. What they may do is `policy/rules`.
//!
//! Passwords are hashed slowly on purpose, so that a right one is remembered: by a hash under a key that is made at start and never
//! leaves memory, over the password and the file's own line, so that a changed line forgets it. Wrong ones are never remembered, and
//! only a few are checked at once. Unknown names cost as much time as known ones.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{AUTHORIZATION, HeaderMap};
use oci::{Algorithm, Digest, ErrorCode};
use quick_cache::sync::Cache as Memory;
use tokio::sync::Semaphore;
use zeroize::{Zeroize as _, Zeroizing};

use super::problem::{Problem, Status};
use crate::policy::{ClientLogin, ClientName};
use crate::secret::Secret;
use crate::tasks::Tasks;
use crate::watched::{FileError, Watched, read_file};

/// Right passwords remembered at most.
const REMEMBERED: usize = 16_384;

/// Passwords checked at once: each takes a processor for a twentieth of a second.
const AT_ONCE: usize = 2;

/// How long a password waits to be checked.
const CHECK_WAIT: Duration = Duration::from_secs(10);

/// What passwords are checked against where the file is empty.
const NOBODYS: &str = "$2y$05$abcdefghijklmnopqrstuu5s0jRuhd0ehz1yUQ9oKr4nWlk4sLoQe";

/// Shortest token: what is shorter can be guessed.
const SHORTEST_TOKEN: usize = 16;

/// The name that a certificate proved: a request extension, set by the connection.
#[derive(Clone, Debug)]
pub struct Certified(pub ClientName);

/// Where clients' passwords and tokens are.
#[derive(Clone, Debug, Default)]
pub struct Books {
    /// `name:bcrypt` lines, as `htpasswd -B` writes them.
    pub htpasswd: Option<PathBuf>,
    /// `name token` lines.
    pub tokens: Option<PathBuf>,
}

/// Finds out who clients are.
pub struct Doorman {
    passwords: Option<Watched<HashMap<String, String>>>,
    tokens: Option<Watched<Tokens>>,
    proven: Memory<Digest, ()>,
    key: Arc<Zeroizing<[u8; 32]>>,
    checks: Semaphore,
    tasks: Tasks,
}

/// Tokens by their keyed hash: looking one up tells nothing of the others by its time.
struct Tokens(HashMap<Digest, ClientName>);

/// What a client showed.
enum Shown {
    Login { name: String, password: Secret },
    Token(Secret),
}

impl Books {
    /// The names of those whose passwords are in `htpasswd`, for who judges the file without serving. Blocks on the disk.
    pub fn with_passwords(htpasswd: &Path) -> Result<Vec<String>, FileError> {
        let passwords = read_htpasswd(&read_file(htpasswd)?);
        let passwords = passwords.map_err(|why| FileError::new(htpasswd, why))?;
        Ok(passwords.into_keys().collect())
    }

    /// The names of those whose tokens are in `tokens`.
    pub fn with_tokens(tokens: &Path) -> Result<Vec<String>, FileError> {
        // Nobody is let in by these: any key will do.
        let held = read_tokens(&read_file(tokens)?, &[0; 32]);
        let Tokens(held) = held.map_err(|why| FileError::new(tokens, why))?;
        Ok(held.into_values().map(|name| name.to_string()).collect())
    }
}

impl Doorman {
    /// Reads the files. Blocks on the disk.
    pub fn new(books: &Books, tasks: Tasks) -> Result<Self, FileError> {
        let key = Arc::new(random_key()?);
        let passwords = books
            .htpasswd
            .as_deref()
            .map(|path| Watched::open(path, read_htpasswd));
        let hashing = Arc::clone(&key);
        let tokens = books
            .tokens
            .as_deref()
            .map(|path| Watched::open(path, move |bytes| read_tokens(bytes, &hashing)));
        Ok(Self {
            passwords: passwords.transpose()?,
            tokens: tokens.transpose()?,
            proven: Memory::new(REMEMBERED),
            key,
            checks: Semaphore::new(AT_ONCE),
            tasks,
        })
    }

    /// Who sends a request with these headers; nobody in particular when they show nothing. What is shown and wrong is refused, also
    /// where nothing need be shown: the client believes that it is logged in.
    pub async fn identify(&self, headers: &HeaderMap) -> Result<Option<ClientName>, Problem> {
        if self.passwords.is_none() && self.tokens.is_none() {
            return Ok(None);
        }
        let mut lines = headers.get_all(AUTHORIZATION).iter();
        let Some(line) = lines.next() else {
            return Ok(None);
        };
        let shown = line.to_str().ok().filter(|_| lines.next().is_none());
        let name = match shown.and_then(read) {
            Some(Shown::Login { name, password }) => self.login(name, password).await?,
            Some(Shown::Token(token)) => self.holder(&token).await,
            None => None,
        };
        name.map(Some)
            .ok_or_else(|| unauthorized("wrong user name, password or token"))
    }

    /// The login that a client shows for an upstream; what cannot be one is none. containers/image shows an empty one when it has none.
    pub fn login_shown(&self, headers: &HeaderMap) -> Option<ClientLogin> {
        let mut lines = headers.get_all(AUTHORIZATION).iter();
        let line = lines.next()?.to_str().ok()?;
        let Some(Shown::Login { name, password }) = read(line).filter(|_| lines.next().is_none())
        else {
            return None;
        };
        if name.is_empty() && password.is_empty() {
            return None;
        }
        let parts = [name.as_bytes(), password.expose().as_bytes()];
        Some(ClientLogin {
            mark: hashed(&self.key, &parts),
            username: name,
            password,
        })
    }

    /// A password may be the client's token too: `docker login` knows no other way to show one.
    async fn login(&self, name: String, password: Secret) -> Result<Option<ClientName>, Problem> {
        if let Some(holder) = self
            .holder(&password)
            .await
            .filter(|holder| holder.as_str() == name)
        {
            return Ok(Some(holder));
        }
        let Some(passwords) = &self.passwords else {
            return Ok(None);
        };
        let passwords = passwords.current(&self.tasks).await;
        let line = passwords.get(&name);
        let known = line.is_some();
        // Anybody's hash will do where there is no such name: it costs the same time to check.
        let hash = line.or_else(|| passwords.values().next()).cloned();
        let hash = hash.unwrap_or_else(|| NOBODYS.to_owned());
        let mark = hashed(
            &self.key,
            &[
                name.as_bytes(),
                password.expose().as_bytes(),
                hash.as_bytes(),
            ],
        );
        if known && self.proven.get(&mark).is_some() {
            return Ok(Some(ClientName::new(&name)));
        }
        if !(self.check(password, hash).await? && known) {
            tracing::info!(client = name, "a wrong user name or password");
            return Ok(None);
        }
        self.proven.insert(mark, ());
        Ok(Some(ClientName::new(&name)))
    }

    async fn check(&self, password: Secret, hash: String) -> Result<bool, Problem> {
        let place = tokio::time::timeout(CHECK_WAIT, self.checks.acquire()).await;
        let Ok(Ok(_place)) = place else {
            let busy = "too many passwords are being checked";
            return Err(Problem::unavailable(busy, Duration::from_secs(1)));
        };
        let checked = self
            .tasks
            .spawn_blocking(move || bcrypt::verify(password.expose(), &hash).unwrap_or(false));
        Ok(checked.await.unwrap_or(false))
    }

    async fn holder(&self, token: &Secret) -> Option<ClientName> {
        let tokens = self.tokens.as_ref()?.current(&self.tasks).await;
        let mark = hashed(&self.key, &[token.expose().as_bytes()]);
        tokens.0.get(&mark).cloned()
    }
}

impl fmt::Debug for Doorman {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorman")
            .field("passwords", &self.passwords)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

/// 401, with the challenge that every client knows. A `Bearer` one would send them looking for a token service.
pub fn unauthorized(message: &str) -> Problem {
    Problem::new(Status::Unauthorized, ErrorCode::Unauthorized, message)
}

/// What an `Authorization` line says.
fn read(line: &str) -> Option<Shown> {
    let (scheme, rest) = line.trim().split_once(' ')?;
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(Shown::Token(Secret::new(rest.to_owned())));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let bytes = STANDARD.decode(rest).ok()?;
    let pair = match String::from_utf8(bytes) {
        Ok(pair) => Zeroizing::new(pair),
        Err(error) => {
            error.into_bytes().zeroize();
            return None;
        }
    };
    // RFC 7617 section 2: the first colon ends the name.
    let (name, password) = pair.split_once(':')?;
    Some(Shown::Login {
        name: name.to_owned(),
        password: Secret::new(password.to_owned()),
    })
}

fn read_htpasswd(bytes: &[u8]) -> Result<HashMap<String, String>, String> {
    let mut passwords = HashMap::new();
    for (number, line) in lines(bytes)? {
        let (name, hash) = line
            .split_once(':')
            .ok_or_else(|| format!("line {number} is not name:hash"))?;
        if hash.parse::<bcrypt::HashParts>().is_err() {
            return Err(format!(
                "line {number} has no bcrypt hash; htpasswd -B makes one"
            ));
        }
        if name.is_empty() || is_reserved(name) {
            return Err(format!("line {number} has no name that a client can have"));
        }
        passwords.insert(name.to_owned(), hash.to_owned());
    }
    Ok(passwords)
}

fn read_tokens(bytes: &[u8], key: &[u8; 32]) -> Result<Tokens, String> {
    let mut tokens = HashMap::new();
    for (number, line) in lines(bytes)? {
        let (name, token) = line
            .split_once([' ', '\t'])
            .map(|(name, token)| (name, token.trim()))
            .ok_or_else(|| format!("line {number} is not a name and a token"))?;
        if token.len() < SHORTEST_TOKEN || token.contains([' ', '\t']) {
            return Err(format!(
                "line {number}: a token is one word of at least {SHORTEST_TOKEN} characters"
            ));
        }
        if is_reserved(name) {
            return Err(format!("line {number} has no name that a client can have"));
        }
        let held = tokens.insert(hashed(key, &[token.as_bytes()]), ClientName::new(name));
        if held.is_some() {
            return Err(format!("line {number}: two clients have the same token"));
        }
    }
    Ok(Tokens(tokens))
}

/// Names that mean something else in rules.
fn is_reserved(name: &str) -> bool {
    name == "anonymous" || name.contains('*') || name.starts_with("cert:")
}

/// Lines that say something, and their numbers.
fn lines(bytes: &[u8]) -> Result<impl Iterator<Item = (usize, &str)>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_invalid| "it is not UTF-8".to_owned())?;
    let lines = (1..).zip(text.lines().map(str::trim));
    Ok(lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')))
}

/// A hash that only this process can make, with each part's length before it, so that no two lists of parts are one text.
fn hashed(key: &[u8; 32], parts: &[&[u8]]) -> Digest {
    let length = parts.iter().map(|part| part.len() + 8).sum::<usize>() + key.len();
    let mut text = Zeroizing::new(Vec::with_capacity(length));
    text.extend_from_slice(key);
    for part in parts {
        text.extend_from_slice(&(part.len() as u64).to_be_bytes());
        text.extend_from_slice(part);
    }
    Digest::of(Algorithm::Sha256, &text)
}

fn random_key() -> Result<Zeroizing<[u8; 32]>, FileError> {
    let mut key = Zeroizing::new([0; 32]);
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    random.fill(key.as_mut_slice()).map_err(|_no_entropy| {
        FileError::new(Path::new("/dev/urandom"), "there is no randomness")
    })?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use hyper::header::HeaderValue;

    use super::*;

    fn doorman(htpasswd: &str, tokens: &str) -> Doorman {
        let folder = tempfile::tempdir().unwrap();
        let (passwords, others) = (folder.path().join("h"), folder.path().join("t"));
        fs::write(&passwords, htpasswd).unwrap();
        fs::write(&others, tokens).unwrap();
        let books = Books {
            htpasswd: Some(passwords),
            tokens: Some(others),
        };
        Doorman::new(&books, Tasks::new()).unwrap()
    }

    fn htpasswd(pairs: &[(&str, &str)]) -> String {
        let mut text = String::new();
        for (name, password) in pairs {
            let hash = bcrypt::hash_with_salt(password, 4, [7; 16]).unwrap();
            text.extend([
                name,
                ":",
                &hash.to_string(),
                "
",
            ]);
        }
        text
    }

    async fn who(doorman: &Doorman, line: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_str(line).unwrap());
        match doorman.identify(&headers).await {
            Ok(name) => Some(name.unwrap().to_string()),
            Err(problem) => {
                assert_eq!(problem.status(), Status::Unauthorized);
                None
            }
        }
    }

    fn basic(pair: &str) -> String {
        format!("Basic {}", STANDARD.encode(pair))
    }

    const TOKEN: &str = "t0ken-0123456789";

    #[tokio::test]
    async fn passwords_and_tokens() {
        let doorman = doorman(
            &htpasswd(&[("alice", "se:same"), ("bob", "")]),
            &format!("ci {TOKEN}\n"),
        );
        for (line, name) in [
            (basic("alice:se:same"), Some("alice")),
            (basic("alice:se:same"), Some("alice")),
            (basic("alice:sesame"), None),
            (basic("bob:"), Some("bob")),
            (basic("bob:se:same"), None),
            (basic("nobody:se:same"), None),
            (basic("nobody"), None),
            (basic(&format!("ci:{TOKEN}")), Some("ci")),
            (basic(&format!("alice:{TOKEN}")), None),
            (format!("bearer {TOKEN}"), Some("ci")),
            ("Bearer t0ken".to_owned(), None),
            ("Basic !!!".to_owned(), None),
            ("Basic /w==".to_owned(), None),
            ("Digest x".to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(who(&doorman, &line).await.as_deref(), name, "{line}");
        }
        assert_eq!(doorman.identify(&HeaderMap::new()).await.unwrap(), None);
        let mut twice = HeaderMap::new();
        twice.append(
            AUTHORIZATION,
            HeaderValue::from_str(&basic("alice:se:same")).unwrap(),
        );
        twice.append(
            AUTHORIZATION,
            HeaderValue::from_str(&basic("bob:")).unwrap(),
        );
        assert!(doorman.identify(&twice).await.is_err());
        assert!(!format!("{doorman:?}").contains(TOKEN));
    }

    #[test]
    fn nobodys_hash_is_one() {
        assert!(NOBODYS.parse::<bcrypt::HashParts>().is_ok());
        assert!(!bcrypt::verify("", NOBODYS).unwrap());
    }

    #[test]
    fn bad_lines_are_told_without_what_they_hold() {
        for (text, why) in [
            ("alice", "line 1 is not name:hash"),
            (
                "# fine\nalice:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=",
                "line 2 has no bcrypt hash",
            ),
            ("alice:$apr1$x$y", "line 1 has no bcrypt hash"),
        ] {
            let error = read_htpasswd(text.as_bytes()).unwrap_err();
            assert!(error.contains(why) && !error.contains('$'), "{error}");
        }
        let anonymous = htpasswd(&[("anonymous", "x")]);
        assert!(read_htpasswd(anonymous.as_bytes()).is_err());
        for (text, why) in [
            ("ci", "line 1 is not"),
            ("ci short", "at least 16"),
            (
                "ci 0123456789abcdef\ncd 0123456789abcdef",
                "line 2: two clients",
            ),
            ("* 0123456789abcdef", "no name"),
        ] {
            let error = read_tokens(text.as_bytes(), &[0; 32]).err().unwrap();
            assert!(error.contains(why) && !error.contains("short "), "{error}");
        }
    }
}
