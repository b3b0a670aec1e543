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
    login: Option<Login>,
    /// Login files, and the names under which they may know this upstream.
    logins: Option<(Logins, Vec<String>)>,
    tasks: Tasks,
}

impl Keyring {
    /// This login and no other.
    pub fn of(login: Login, tasks: Tasks) -> Self {
        Self {
            login: Some(login),
            logins: None,
            tasks,
        }
    }

    /// Whatever `logins` hold for one of these names of the upstream.
    pub fn from_logins(logins: Logins, names: Vec<String>, tasks: Tasks) -> Self {
        Self {
            login: None,
            logins: Some((logins, names)),
            tasks,
        }
    }

    /// Whose rights a repository is asked with: from memory.
    pub(super) fn credential(&self, repository: &RepositoryName) -> CredentialId {
        if let Some(login) = &self.login {
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
        if let Some(login) = &self.login {
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
