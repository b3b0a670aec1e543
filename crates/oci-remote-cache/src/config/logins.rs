//! `credentials_for`: logins for some of an upstream's repositories, as they are written in a file, and printed again.
//!
//! A variable cannot hold them, since a password may hold any separator; it can hold a password that `{ env = "…" }` names.

use oci::RepositoryName;

use super::nearest::nearest;
use super::value::{SecretSource, Written, quoted, read_secret, read_username};

/// A login, and the repositories it is for.
#[derive(Debug, Clone)]
pub(super) struct PrefixLogin {
    /// The beginning of their names, whole segments.
    pub(super) repositories: String,
    /// The user.
    pub(super) username: String,
    /// Where the password is.
    pub(super) password: SecretSource,
}

const KEYS: [&str; 3] = ["repositories", "username", "password"];

const A_LOGIN: &str = "{ repositories = \"…\", username = \"…\", password = … }";

/// Reads an array of tables; the error says which table, counted from one.
pub(super) fn read(written: &Written) -> Result<Vec<PrefixLogin>, String> {
    let Written::List(items) = written else {
        return Err(format!(
            "must be an array of {A_LOGIN} in a file, found {}",
            written.found()
        ));
    };
    let mut logins: Vec<PrefixLogin> = Vec::new();
    for (item, number) in items.iter().zip(1..) {
        let login = login(item).map_err(|what| format!("login {number} {what}"))?;
        let same = |other: &PrefixLogin| other.repositories == login.repositories;
        if logins.iter().any(same) {
            let prefix = quoted(&login.repositories);
            return Err(format!("login {number} is a second one for {prefix}"));
        }
        logins.push(login);
    }
    Ok(logins)
}

/// The logins as TOML, their passwords as three stars.
pub(super) fn literal(logins: &[PrefixLogin]) -> String {
    let logins: Vec<String> = logins
        .iter()
        .map(|login| {
            format!(
                "{{ repositories = {}, username = {}, password = \"***\" }}",
                quoted(&login.repositories),
                quoted(&login.username)
            )
        })
        .collect();
    format!("[{}]", logins.join(", "))
}

fn login(written: &Written) -> Result<PrefixLogin, String> {
    let Written::Table(entries) = written else {
        return Err(format!("must be {A_LOGIN}, found {}", written.found()));
    };
    let unknown = entries
        .iter()
        .find(|(name, _)| !KEYS.contains(&name.as_str()));
    if let Some((name, _)) = unknown {
        let meant = nearest(name, KEYS).unwrap_or("repositories");
        return Err(format!(
            "has the unknown key {name:?}; did you mean {meant:?}?"
        ));
    }
    let find = |name: &str| entries.iter().find(|(key, _)| key == name);
    let text = |name: &str| match find(name) {
        Some((_, Written::Text(text))) => Ok(text.as_str()),
        Some(_) | None => Err(format!("needs {name}, as a string")),
    };
    let username =
        read_username(text("username")?).map_err(|what| format!("has a username that {what}"))?;
    let (_, password) = find("password").ok_or("needs a password")?;
    Ok(PrefixLogin {
        repositories: prefix(text("repositories")?)?,
        username,
        password: read_secret(password).map_err(|what| format!("has a password that {what}"))?,
    })
}

/// The beginning of repositories' names. A slash or `/**` at its end means the same.
fn prefix(text: &str) -> Result<String, String> {
    let short = text.strip_suffix("/**").unwrap_or(text);
    let short = short.strip_suffix('/').unwrap_or(short);
    match short.parse::<RepositoryName>() {
        Ok(name) => Ok(name.to_string()),
        Err(_illegal) => Err(format!(
            "has the bad repositories {text:?}: write the beginning of their names, as in \"acme\" or \"acme/apps\""
        )),
    }
}
