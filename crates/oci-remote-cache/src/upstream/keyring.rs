//! Which credentials are shown to an upstream for which repository, as they are today: a configured login, or what Docker's and podman's
//! login files and credential helpers hold.
//!
//! Records name a credential by where it comes from, so that a rotated password keeps its rights and needs no file to be read.

use std::sync::Arc;

use oci::RepositoryName;

use super::credentials::Credentials;
use super::error::Fault;
use super::logins::Logins;
use crate::names::CredentialId;
use crate::secret::Secret;
use crate::tasks::Tasks;
use crate::watched::Watched;

/// A password, and where it is kept.
#[derive(Clone, Debug)]
pub enum Password {
    /// Said in the configuration.
    Said(Secret),
    /// In a file that may be written anew at any time.
    Kept(Watched<Secret>),
}

/// A login that the configuration names.
#[derive(Clone, Debug)]
pub struct Login {
    /// The user.
    pub username: String,
    /// The password, or a refresh token where the user name says so.
    pub password: Password,
}

/// All that may be shown to one upstream.
#[derive(Clone, Debug, Default)]
pub struct Keyring {
    /// Configured logins, each with the beginning of the repositories' names that it is for; empty for all.
    own: Vec<(String, Login)>,
    /// Login files, and the names under which they may know this upstream.
    logins: Option<(Logins, Vec<String>)>,
    tasks: Tasks,
}

impl Keyring {
    /// These configured logins, each with the beginning of the repositories' names that it is for; for other repositories whatever
    /// `logins` hold for one of these names of the upstream.
    pub fn new(
        own: Vec<(String, Login)>,
        logins: Option<(Logins, Vec<String>)>,
        tasks: Tasks,
    ) -> Self {
        Self { own, logins, tasks }
    }

    /// The configured login for a repository: of those whose prefix fits, the one with the longest.
    fn own(&self, repository: &RepositoryName) -> Option<&Login> {
        let fitting = self
            .own
            .iter()
            .filter(|(prefix, _)| covers(prefix, repository.as_str()));
        let longest = fitting.max_by_key(|(prefix, _)| prefix.len());
        longest.map(|(_, login)| login)
    }

    /// Whose rights a repository is asked with: from memory.
    pub(super) fn credential(&self, repository: &RepositoryName) -> CredentialId {
        if let Some(login) = self.own(repository) {
            return CredentialId::configured(&login.username);
        }
        let found = self
            .logins
            .as_ref()
            .and_then(|(logins, names)| logins.credential(names, repository));
        found.unwrap_or_else(CredentialId::anonymous)
    }

    /// What is shown for a repository today. That a helper fails is an outage: without its credentials the upstream would refuse what it
    /// allows, and that would suspend it.
    pub(super) async fn credentials(
        &self,
        repository: &RepositoryName,
    ) -> Result<Option<Arc<Credentials>>, Fault> {
        if let Some(login) = self.own(repository) {
            let password = match &login.password {
                Password::Said(password) => password.clone(),
                Password::Kept(file) => (*file.current(&self.tasks).await).clone(),
            };
            return Ok(Some(Arc::new(Credentials {
                id: CredentialId::configured(&login.username),
                username: login.username.clone(),
                password,
            })));
        }
        match &self.logins {
            Some((logins, names)) => logins.credentials(names, repository).await,
            None => Ok(None),
        }
    }

    /// What was shown is refused: helpers are asked anew.
    pub(super) fn doubt(&self) {
        if let Some((logins, _names)) = &self.logins {
            logins.doubt();
        }
    }
}

/// Whether `repository` is `prefix`, or lies below it: whole segments count.
pub(super) fn covers(prefix: &str, repository: &str) -> bool {
    match repository.strip_prefix(prefix) {
        Some(rest) => prefix.is_empty() || rest.is_empty() || rest.starts_with('/'),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_longest_prefix_of_whole_segments_wins() {
        let login = |name: &str| Login {
            username: name.to_owned(),
            password: Password::Said(Secret::new(format!("of {name}"))),
        };
        let own = [("acme/apps", "apps"), ("", "rest"), ("acme", "acme")];
        let own = own.map(|(prefix, name)| (prefix.to_owned(), login(name)));
        let keyring = Keyring::new(own.to_vec(), None, Tasks::new());
        for (repository, name) in [
            ("acme/apps/web", "apps"),
            ("acme/apps", "apps"),
            ("acme/appsmith", "acme"),
            ("acme", "acme"),
            ("acmeevil/x", "rest"),
            ("x/acme/apps", "rest"),
        ] {
            let repository = repository.parse().unwrap();
            let found = keyring.credentials(&repository).await.unwrap().unwrap();
            assert_eq!(found.username, name, "{repository}");
            assert_eq!(found.password.expose(), format!("of {name}"));
            assert_eq!(found.id, keyring.credential(&repository));
        }
    }
}
