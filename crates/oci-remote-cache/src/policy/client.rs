//! Who is asking.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use oci::Digest;

use crate::secret::Secret;

/// A client, as far as it is known: by the address it connects from, and by the name it has proven. What it claims in
/// `X-Forwarded-For` or `User-Agent` is not believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Where it connects from.
    pub address: IpAddr,
    /// Who it has shown to be; nobody in particular without a password, token or certificate.
    pub name: Option<ClientName>,
    /// Its login at the upstream it asks for, where that takes clients' own. Whether it is one, only the upstream can tell.
    pub login: Option<ClientLogin>,
}

/// A user name and password that a client showed us for an upstream.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientLogin {
    /// The user.
    pub username: String,
    /// The password.
    pub password: Secret,
    /// A hash over both that only this process can make.
    pub mark: Digest,
}

/// A client's proven name.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ClientName(Arc<str>);

impl Client {
    /// Someone at `address` of whom nothing else is known.
    pub fn anonymous(address: IpAddr) -> Self {
        Self {
            address,
            name: None,
            login: None,
        }
    }
}

impl ClientName {
    /// The client of this name. Only who checks what a client shows may make one.
    pub fn new(name: &str) -> Self {
        Self(Arc::from(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ClientLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientLogin(***)")
    }
}

impl fmt::Debug for ClientName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl fmt::Display for ClientName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
