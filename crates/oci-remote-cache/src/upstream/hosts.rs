//! Hosts and networks as an operator writes them: `token_realms`, `redirect_hosts`, `trusted_networks`.
//!
//! Values only; what they allow is decided in `guard.rs` (where we connect) and `credentials.rs` (who may see a password).

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// A network in CIDR form, or a single address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// A host by name or address (any port, or one), or a network.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostOrNetwork {
    /// This host, whatever it resolves to.
    Host {
        /// The name in lower case, or the address without brackets.
        host: String,
        /// The one port meant; any if absent.
        port: Option<u16>,
    },
    /// Every address in this network.
    Network(Network),
}

/// A host that may receive an upstream's credentials as its token endpoint: `host` (any port) or `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RealmHost {
    host: String,
    port: Option<u16>,
}

/// Text that names no host or network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {expected}")]
pub struct HostError {
    text: String,
    expected: &'static str,
}

impl Network {
    /// Whether `address` lies in this network.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
                let differing = u32::from(ours) ^ u32::from(theirs);
                differing.leading_zeros() >= u32::from(self.prefix)
            }
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
                let differing = u128::from(ours) ^ u128::from(theirs);
                differing.leading_zeros() >= u32::from(self.prefix)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl HostOrNetwork {
    /// Whether this names `host` at `port`; a network names nobody.
    pub fn names(&self, host: &str, port: u16) -> bool {
        match self {
            Self::Host {
                host: ours,
                port: only,
            } => ours.eq_ignore_ascii_case(host) && only.is_none_or(|only| only == port),
            Self::Network(_) => false,
        }
    }
}

impl RealmHost {
    /// Whether this names `host` at `port`.
    pub fn names(&self, host: &str, port: u16) -> bool {
        self.host.eq_ignore_ascii_case(host) && self.port.is_none_or(|ours| ours == port)
    }
}

impl FromStr for Network {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        let error = || HostError::new(text, "network such as 10.0.0.0/8 or fd00::/8");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_invalid| error())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(prefix) => prefix.parse().map_err(|_invalid| error())?,
            None => longest,
        };
        if prefix > longest {
            return Err(error());
        }
        Ok(Self { address, prefix })
    }
}

impl FromStr for HostOrNetwork {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        if let Ok(network) = text.parse() {
            return Ok(Self::Network(network));
        }
        let (host, port) = host_and_port(text)
            .ok_or_else(|| HostError::new(text, "host, host:port or network"))?;
        Ok(Self::Host { host, port })
    }
}

impl FromStr for RealmHost {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        let (host, port) =
            host_and_port(text).ok_or_else(|| HostError::new(text, "host or host:port"))?;
        Ok(Self { host, port })
    }
}

impl HostError {
    fn new(text: &str, expected: &'static str) -> Self {
        Self {
            text: text.to_owned(),
            expected,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl fmt::Display for HostOrNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host { host, port } => write_host(f, host, *port),
            Self::Network(network) => network.fmt(f),
        }
    }
}

impl fmt::Display for RealmHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_host(f, &self.host, self.port)
    }
}

fn write_host(f: &mut fmt::Formatter<'_>, host: &str, port: Option<u16>) -> fmt::Result {
    match port {
        Some(port) if host.contains(':') => write!(f, "[{host}]:{port}"),
        Some(port) => write!(f, "{host}:{port}"),
        None => f.write_str(host),
    }
}

/// Splits `host`, `host:port`, `[v6]`, `[v6]:port` or a bare IPv6 address.
fn host_and_port(text: &str) -> Option<(String, Option<u16>)> {
    if let Ok(v6) = text.parse::<Ipv6Addr>() {
        return Some((v6.to_string(), None));
    }
    let (host, port) = match text.strip_prefix('[') {
        Some(literal) => {
            let (inside, after) = literal.split_once(']')?;
            let v6: Ipv6Addr = inside.parse().ok()?;
            (
                v6.to_string(),
                after
                    .strip_prefix(':')
                    .or_else(|| after.is_empty().then_some(""))?,
            )
        }
        None => match text.split_once(':') {
            Some((_, "")) => return None,
            Some((host, port)) => (name(host)?, port),
            None => (name(text)?, ""),
        },
    };
    let port = match port {
        "" => None,
        port => Some(port.parse().ok().filter(|&port: &u16| port > 0)?),
    };
    Some((host, port))
}

fn name(host: &str) -> Option<String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    (!host.is_empty() && host.chars().all(legal)).then(|| host.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::{HostOrNetwork, Network, RealmHost};

    #[test]
    fn networks_hold_their_addresses() {
        for (network, address, inside) in [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("0.0.0.0/0", "8.8.8.8", true),
            ("192.168.1.7", "192.168.1.7", true),
            ("192.168.1.7", "192.168.1.8", false),
            ("fd00::/8", "fd12::1", true),
            ("fd00::/8", "fe12::1", false),
            ("::/0", "10.0.0.1", false),
        ] {
            let parsed: Network = network.parse().unwrap();
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(parsed.contains(address), inside, "{network} {address}");
        }
        for wrong in [
            "10.0.0.0/33",
            "10.0.0/8",
            "host/8",
            "fd00::/129",
            "/8",
            "10.0.0.0/",
        ] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn realm_hosts_name_one_port_or_all() {
        let any: RealmHost = "Auth.Example".parse().unwrap();
        assert!(any.names("auth.example", 443) && any.names("auth.example", 8443));
        let one: RealmHost = "auth.example:8443".parse().unwrap();
        assert!(one.names("auth.example", 8443) && !one.names("auth.example", 443));
        let v6: RealmHost = "[::1]:5000".parse().unwrap();
        assert!(v6.names("::1", 5000) && !v6.names("::1", 5001));
        for wrong in [
            "",
            "a b",
            "host:",
            "host:0",
            "host:99999",
            "https://host",
            "[::1",
            "[::1]x",
        ] {
            assert!(wrong.parse::<RealmHost>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn hosts_and_networks_are_told_apart() {
        assert!(matches!(
            "10.0.0.0/8".parse(),
            Ok(HostOrNetwork::Network(_))
        ));
        assert!(matches!("10.0.0.1".parse(), Ok(HostOrNetwork::Network(_))));
        assert!(matches!(
            "cdn.example".parse(),
            Ok(HostOrNetwork::Host { port: None, .. })
        ));
        for text in ["cdn.example:8443", "fd00::/8", "cdn.example", "[::1]:5000"] {
            assert_eq!(text.parse::<HostOrNetwork>().unwrap().to_string(), text);
        }
    }
}
