//! A password, and who may see it.
//!
//! Credentials go to the registry's own origin (Basic) and to a token endpoint that belongs to the registry or was named by the
//! operator; anyone else's realm is asked anonymously (CVE-2026-33540: a pull-through cache sent them to any realm). Pure.

use std::sync::Arc;

use url::{Host, Url};

use super::guard::host_text;
use super::hosts::RealmHost;
use crate::names::CredentialId;
use crate::secret::Secret;

/// What an operator configured for an upstream, or a client showed us for it.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Its name in records.
    pub id: CredentialId,
    /// The user.
    pub username: String,
    /// The password, or a refresh token where the user name says so.
    pub password: Secret,
}

/// In whose name a registry is asked.
#[derive(Clone, Debug, Default)]
pub enum Identity {
    /// With what the operator configured, where that is anything.
    #[default]
    Configured,
    /// In nobody's: what such an answer shows, anyone may see.
    Anonymous,
    /// In a client's own. Only the upstream's own address sees it, as with what is configured.
    Client(Arc<Credentials>),
}

impl Identity {
    /// Whether it is what the operator configured.
    pub fn is_configured(&self) -> bool {
        matches!(self, Self::Configured)
    }

    /// Whether both ask with the same rights.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Configured, Self::Configured) | (Self::Anonymous, Self::Anonymous) => true,
            (Self::Client(one), Self::Client(other)) => one.id == other.id,
            (Self::Configured | Self::Anonymous | Self::Client(_), _) => false,
        }
    }
}

/// User names by which clients say that the password is a refresh token: docker's and Azure's.
const REFRESH_USERS: [&str; 2] = ["<token>", "00000000-0000-0000-0000-000000000000"];

impl Credentials {
    /// The `Authorization` value of RFC 7617.
    pub(super) fn basic(&self) -> Secret {
        use base64::Engine as _;
        let pair = Secret::new(format!("{}:{}", self.username, self.password.expose()));
        let encoded = base64::engine::general_purpose::STANDARD.encode(pair.expose());
        Secret::new(format!("Basic {encoded}"))
    }

    /// Whether the password is to be exchanged by POST (`OAuth2`) rather than sent as a password.
    pub(super) fn is_refresh_token(&self) -> bool {
        REFRESH_USERS.contains(&self.username.as_str())
    }
}

/// Whether the token endpoint `realm` may see the credentials of the registry at `registry`.
pub(super) fn may_see(registry: &Url, realm: &Url, named: &[RealmHost]) -> bool {
    if registry.scheme() == "https" && realm.scheme() != "https" {
        return false;
    }
    let (ours, theirs) = (host_text(registry), host_text(realm));
    let port = realm.port_or_known_default().unwrap_or_default();
    ours == theirs
        || named.iter().any(|host| host.names(&theirs, port))
        || same_owner(registry, realm)
}

/// Whether two names lie under one registered domain. Only public suffixes that are listed count: under `svc.cluster.local` neighbours
/// are strangers.
fn same_owner(one: &Url, other: &Url) -> bool {
    match (registered(one), registered(other)) {
        (Some(one), Some(other)) => one == other,
        _ => false,
    }
}

fn registered(url: &Url) -> Option<String> {
    let Some(Host::Domain(name)) = url.host() else {
        return None;
    };
    let domain = psl::domain(name.as_bytes())?;
    if !domain.suffix().is_known() {
        return None;
    }
    String::from_utf8(domain.as_bytes().to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use url::Url;

    use super::{Credentials, may_see};
    use crate::names::CredentialId;
    use crate::secret::Secret;

    /// Registry, realm, `token_realms`, and whether the realm sees the credentials.
    const REALMS: &[(&str, &str, &str, bool)] = &[
        (
            "https://registry-1.docker.io",
            "https://auth.docker.io/token",
            "",
            true,
        ),
        (
            "https://a.example.co.uk",
            "https://b.example.co.uk/",
            "",
            true,
        ),
        ("https://a.co.uk", "https://b.co.uk/", "", false),
        ("https://me.github.io", "https://you.github.io/", "", false),
        ("https://quay.io", "https://quay.io.evil.com/", "", false),
        ("https://quay.io", "https://evil.com/?quay.io", "", false),
        ("https://lscr.io", "https://ghcr.io/token", "", false),
        ("https://lscr.io", "https://ghcr.io/token", "ghcr.io", true),
        (
            "https://lscr.io",
            "https://ghcr.io:8443/token",
            "ghcr.io:443",
            false,
        ),
        (
            "https://lscr.io",
            "https://ghcr.io/token",
            "ghcr.io:443",
            true,
        ),
        ("https://quay.io", "http://quay.io/v2/auth", "", false),
        ("https://lscr.io", "http://ghcr.io/token", "ghcr.io", false),
        (
            "http://127.0.0.1:5000",
            "http://127.0.0.1:5001/token",
            "",
            true,
        ),
        (
            "http://127.0.0.1:5000",
            "http://localhost:5001/token",
            "",
            false,
        ),
        (
            "http://127.0.0.1:5000",
            "http://127.0.0.2:5000/token",
            "",
            false,
        ),
        (
            "http://localhost:5000",
            "http://localhost:5001/token",
            "",
            true,
        ),
        (
            "http://a.svc.cluster.local",
            "http://b.svc.cluster.local/",
            "",
            false,
        ),
        ("https://io", "https://io.io/", "", false),
    ];

    #[test]
    fn only_the_registrys_own_realms_see_credentials() {
        for &(registry, realm, named, trusted) in REALMS {
            let named: Vec<_> = named
                .split_whitespace()
                .map(|n| n.parse().unwrap())
                .collect();
            let (from, to) = (Url::parse(registry).unwrap(), Url::parse(realm).unwrap());
            assert_eq!(may_see(&from, &to, &named), trusted, "{registry} {realm}");
        }
    }

    #[test]
    fn basic_is_rfc_7617() {
        let credentials = Credentials {
            id: CredentialId::configured("Aladdin"),
            username: "Aladdin".into(),
            password: Secret::new("open sesame".into()),
        };
        assert_eq!(
            credentials.basic().expose(),
            "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
        );
        assert!(!format!("{credentials:?}").contains("sesame"));
    }
}
