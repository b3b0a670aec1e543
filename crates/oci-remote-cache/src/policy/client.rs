//! Who is asking.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// A client, as far as it is known: by the address it connects from, and by the name it has proven. What it claims in
/// `X-Forwarded-For` or `User-Agent` is not believed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// Where it connects from.
    pub address: IpAddr,
    /// Who it has shown to be; nobody in particular without a password, token or certificate.
    pub name: Option<ClientName>,
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
