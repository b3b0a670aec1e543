//! Login files as Docker (`config.json`) and podman (`auth.json`) write them, and the `docker-credential-*` programs that they name.
//!
//! An entry's key is a host, or a host and the beginning of repositories' names; the longest that fits wins, and a program wins over
//! what is written beside it. `DOCKER_AUTH_CONFIG` holds the text of such a file.

use std::collections::HashMap;
use std::fmt;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci::RepositoryName;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::credentials::Credentials;
use super::error::Fault;
use super::keyring::covers;
use crate::names::CredentialId;
use crate::secret::Secret;
use crate::tasks::Tasks;
use crate::watched::Watched;

/// How long a program may take, and how much it may say.
const HELPER_LIMIT: Duration = Duration::from_secs(15);
const HELPER_SAYS: u64 = 256 << 10;

/// How long its answer is used, unless the upstream refuses it; and how long in any case, lest a refusal for good ask it each time.
const HELPER_FOR: Duration = Duration::from_mins(10);
const HELPER_AT_LEAST: Duration = Duration::from_secs(10);

/// What such a program says when it holds nothing (docker-credential-helpers).
const NOT_FOUND: &str = "credentials not found";

/// The user name under which Docker's programs give a refresh token.
const REFRESH_USER: &str = "<token>";

/// Docker Hub's name in Docker's own files and programs.
const HUB: &str = "https://index.docker.io/v1/";

/// Login files. Clones share what helpers answered.
#[derive(Clone)]
pub struct Logins {
    variable: Option<Arc<LoginFile>>,
    file: Option<Watched<LoginFile>>,
    answers: Arc<Mutex<HashMap<Asked, Answer>>>,
    /// One program at a time: a storm of cold clients is one question.
    asking: Arc<tokio::sync::Mutex<()>>,
    tasks: Tasks,
}

/// What one file says.
#[derive(Debug, Default)]
pub struct LoginFile {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    /// The key as it stands in the file.
    key: String,
    host: String,
    /// The beginning of repositories' names; empty for all of the host's.
    prefix: String,
    held: Held,
}

#[derive(Clone, Debug)]
enum Held {
    Login { username: String, password: Secret },
    Helper(Asked),
}

/// A program, and what it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Asked {
    program: String,
    server: String,
}

#[derive(Clone)]
struct Answer {
    login: Option<(String, Secret)>,
    at: Instant,
}

#[derive(Deserialize)]
struct Written {
    #[serde(default)]
    auths: HashMap<String, WrittenAuth>,
    #[serde(default, rename = "credHelpers")]
    helpers: HashMap<String, String>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
}

#[derive(Deserialize)]
struct WrittenAuth {
    #[serde(default)]
    auth: Option<Zeroizing<String>>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<Zeroizing<String>>,
    #[serde(default)]
    identitytoken: Option<Zeroizing<String>>,
}

#[derive(Deserialize)]
struct Said {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: Zeroizing<String>,
}

impl LoginFile {
    /// Reads a file's bytes. The error does not quote them.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let written: Written = serde_json::from_slice(bytes)
            .map_err(|error| format!("it is no login file: line {}", error.line()))?;
        let mut entries = Vec::new();
        for (key, program) in &written.helpers {
            entries.push(Entry::new(key, Held::Helper(Asked::new(program, key)?)));
        }
        for (key, auth) in written.auths {
            if written.helpers.contains_key(&key) {
                continue;
            }
            match (auth.held(&key)?, &written.store) {
                (Some(held), _) => entries.push(Entry::new(&key, held)),
                // Docker leaves an empty entry for each host whose login its store holds.
                (None, Some(program)) => {
                    let asked = Asked::new(program, &key)?;
                    entries.push(Entry::new(&key, Held::Helper(asked)));
                }
                (None, None) => {}
            }
        }
        Ok(Self { entries })
    }

    /// The entry for a repository of the upstream that has these names.
    fn find(&self, names: &[String], repository: &RepositoryName) -> Option<&Entry> {
        let fits = |entry: &&Entry| {
            names
                .iter()
                .any(|name| entry.host.eq_ignore_ascii_case(name))
                && entry.covers(repository.as_str())
        };
        self.entries
            .iter()
            .filter(fits)
            .max_by_key(|entry| entry.prefix.len())
    }
}

impl Entry {
    fn new(key: &str, held: Held) -> Self {
        let place = key.split_once("://").map_or(key, |(_scheme, rest)| rest);
        let place = place.trim_end_matches('/');
        // Docker Hub's key ends in the version of an interface that is long gone.
        let place = place.strip_suffix("/v1").unwrap_or(place);
        let place = place.strip_suffix("/v2").unwrap_or(place);
        let (host, prefix) = place.split_once('/').unwrap_or((place, ""));
        Self {
            key: key.to_owned(),
            host: host.to_owned(),
            prefix: prefix.to_owned(),
            held,
        }
    }

    fn covers(&self, repository: &str) -> bool {
        covers(&self.prefix, repository)
    }

    fn id(&self) -> CredentialId {
        CredentialId::configured(&format!("login:{}", self.key))
    }
}

impl WrittenAuth {
    fn held(self, key: &str) -> Result<Option<Held>, String> {
        if let Some(token) = self.identitytoken.filter(|token| !token.is_empty()) {
            return Ok(Some(login(REFRESH_USER, &token)));
        }
        if let (Some(username), Some(password)) = (&self.username, &self.password) {
            return Ok(Some(login(username, password)));
        }
        let Some(auth) = self.auth.filter(|auth| !auth.is_empty()) else {
            return Ok(None);
        };
        let bad = |_invalid| format!("the entry {key:?} has no login that can be read");
        let pair = Zeroizing::new(STANDARD.decode(auth.trim()).map_err(|_invalid| bad(()))?);
        let pair = std::str::from_utf8(&pair).map_err(|_invalid| bad(()))?;
        let (username, password) = pair.split_once(':').ok_or_else(|| bad(()))?;
        Ok(Some(login(username, password)))
    }
}

fn login(username: &str, password: &str) -> Held {
    Held::Login {
        username: username.to_owned(),
        // Docker's files have been seen with a NUL at the end.
        password: Secret::new(password.trim_end_matches('\0').to_owned()),
    }
}

impl Asked {
    /// `program` is the end of a program's name, and must not be able to lead elsewhere.
    fn new(program: &str, key: &str) -> Result<Self, String> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if program.is_empty() || !program.chars().all(legal) {
            return Err(format!("the entry {key:?} names no credential helper"));
        }
        let hub = matches!(key, "docker.io" | "index.docker.io");
        Ok(Self {
            program: format!("docker-credential-{program}"),
            server: if hub { HUB } else { key }.to_owned(),
        })
    }

    async fn ask(&self) -> Result<Option<(String, Secret)>, Fault> {
        let failed = |why: &str| Fault::TokenFailed(format!("{} {why}", self.program));
        let run = async {
            let mut child = Command::new(&self.program)
                .arg("get")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(self.server.as_bytes()).await?;
            }
            let mut said = Zeroizing::new(Vec::new());
            if let Some(stdout) = child.stdout.take() {
                stdout.take(HELPER_SAYS).read_to_end(&mut said).await?;
            }
            Ok::<_, std::io::Error>((child.wait().await?, said))
        };
        let (status, said) = tokio::time::timeout(HELPER_LIMIT, run)
            .await
            .map_err(|_late| failed("does not answer"))?
            .map_err(|error| failed(&format!("cannot be run: {error}")))?;
        if !status.success() {
            let nothing = String::from_utf8_lossy(&said).contains(NOT_FOUND);
            return if nothing {
                Ok(None)
            } else {
                Err(failed("failed"))
            };
        }
        let said: Said = serde_json::from_slice(&said)
            .map_err(|_invalid| failed("says nothing that can be read"))?;
        let secret = Secret::new(said.secret.to_string());
        Ok(Some((said.username, secret)))
    }
}

impl Logins {
    /// The logins of a file that is read again when it changes, and of the text in `DOCKER_AUTH_CONFIG`, which goes first.
    pub fn new(
        file: Option<Watched<LoginFile>>,
        variable: Option<LoginFile>,
        tasks: Tasks,
    ) -> Self {
        Self {
            variable: variable.map(Arc::new),
            file,
            answers: Arc::default(),
            asking: Arc::default(),
            tasks,
        }
    }

    pub(super) fn credential(
        &self,
        names: &[String],
        repository: &RepositoryName,
    ) -> Option<CredentialId> {
        let file = self.file.as_ref().map(Watched::latest);
        self.found(file.as_deref(), names, repository)
            .map(|(id, _held)| id)
    }

    pub(super) async fn credentials(
        &self,
        names: &[String],
        repository: &RepositoryName,
    ) -> Result<Option<Arc<Credentials>>, Fault> {
        let file = match &self.file {
            Some(file) => Some(file.current(&self.tasks).await),
            None => None,
        };
        let Some((id, held)) = self.found(file.as_deref(), names, repository) else {
            return Ok(None);
        };
        let login = match held {
            Held::Login { username, password } => Some((username, password)),
            Held::Helper(asked) => self.helped(asked).await?,
        };
        Ok(login.map(|(username, password)| {
            Arc::new(Credentials {
                id,
                username,
                password,
            })
        }))
    }

    pub(super) fn doubt(&self) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.retain(|_asked, answer| answer.at.elapsed() < HELPER_AT_LEAST);
    }

    fn found(
        &self,
        file: Option<&LoginFile>,
        names: &[String],
        repository: &RepositoryName,
    ) -> Option<(CredentialId, Held)> {
        let said = self
            .variable
            .as_ref()
            .and_then(|variable| variable.find(names, repository));
        let written = file.and_then(|file| file.find(names, repository));
        let entry = match (said, written) {
            (Some(said), Some(written)) if written.prefix.len() > said.prefix.len() => written,
            (said, written) => said.or(written)?,
        };
        Some((entry.id(), entry.held.clone()))
    }

    async fn helped(&self, asked: Asked) -> Result<Option<(String, Secret)>, Fault> {
        if let Some(answer) = self.answered(&asked) {
            return Ok(answer.login);
        }
        let _turn = self.asking.lock().await;
        if let Some(answer) = self.answered(&asked) {
            return Ok(answer.login);
        }
        let login = asked.ask().await?;
        let answer = Answer {
            login: login.clone(),
            at: Instant::now(),
        };
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.insert(asked, answer);
        Ok(login)
    }

    fn answered(&self, asked: &Asked) -> Option<Answer> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = answers.get(asked)?;
        (answer.at.elapsed() < HELPER_FOR).then(|| answer.clone())
    }
}

impl fmt::Debug for Logins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logins")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found for a repository: the entry's key and, where it is written down, the login.
    fn found(file: &str, names: &[&str], repository: &str) -> Option<(String, Option<String>)> {
        let file = LoginFile::parse(file.as_bytes()).unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let entry = file.find(&names, &repository.parse().unwrap())?;
        let login = match &entry.held {
            Held::Login { username, password } => Some(format!("{username}:{}", password.expose())),
            Held::Helper(_) => None,
        };
        Some((entry.key.clone(), login))
    }

    #[test]
    fn the_longest_prefix_of_whole_segments_wins() {
        let auth = |pair: &str| STANDARD.encode(pair);
        let file = format!(
            r#"{{"auths": {{
                "quay.io": {{"auth": "{}"}}, "quay.io/acme": {{"auth": "{}"}}, "quay.io/acme/app": {{"auth": "{}"}},
                "https://index.docker.io/v1/": {{"auth": "{}"}}, "ghcr.io": {{"identitytoken": "idt"}}, "empty.io": {{}}
            }}, "credHelpers": {{"helped.io": "ecr-login", "quay.io/helped": "pass"}}, "HttpHeaders": {{}}}}"#,
            auth("all:1"),
            auth("acme:2:3"),
            auth("app:4"),
            auth("hub:5")
        );
        for (names, repository, key, login) in [
            (["quay.io"], "x/y", "quay.io", Some("all:1")),
            (["QUAY.io"], "acme/x", "quay.io/acme", Some("acme:2:3")),
            (["quay.io"], "acme", "quay.io/acme", Some("acme:2:3")),
            (["quay.io"], "acmeevil/x", "quay.io", Some("all:1")),
            (["quay.io"], "acme/app/z", "quay.io/acme/app", Some("app:4")),
            (["quay.io"], "helped/x", "quay.io/helped", None),
            (["index.docker.io"], "library/x", HUB, Some("hub:5")),
            (["ghcr.io"], "x", "ghcr.io", Some("<token>:idt")),
            (["helped.io"], "x", "helped.io", None),
        ] {
            let wanted = (key.to_owned(), login.map(str::to_owned));
            assert_eq!(
                found(&file, &names, repository),
                Some(wanted),
                "{repository}"
            );
        }
        assert_eq!(found(&file, &["empty.io"], "x"), None);
        assert_eq!(found(&file, &["other.io"], "x"), None);
    }

    #[test]
    fn an_empty_entry_is_the_stores() {
        let file = r#"{"auths": {"quay.io": {}}, "credsStore": "pass"}"#;
        assert_eq!(
            found(file, &["quay.io"], "x"),
            Some(("quay.io".to_owned(), None))
        );
        assert_eq!(found(file, &["ghcr.io"], "x"), None);
    }

    #[test]
    fn what_is_wrong_is_told_without_what_is_secret() {
        for file in [
            "{",
            r#"{"auths": {"quay.io": {"auth": "!s3cret!"}}}"#,
            r#"{"auths": {"quay.io": {"auth": "czNjcmV0"}}}"#,
            r#"{"credHelpers": {"quay.io": "../s3cret"}}"#,
        ] {
            let error = LoginFile::parse(file.as_bytes()).unwrap_err();
            assert!(
                !error.contains("s3cret") && !error.contains("czNj"),
                "{error}"
            );
        }
        let file = format!(
            r#"{{"auths": {{"quay.io": {{"auth": "{}"}}}}}}"#,
            STANDARD.encode("u:s3cret")
        );
        let shown = format!("{:?}", LoginFile::parse(file.as_bytes()).unwrap());
        assert!(!shown.contains("s3cret"), "{shown}");
    }
}
